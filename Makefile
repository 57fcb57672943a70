# What there is to do here; `make` alone lists it.

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

# Linked statically, the hook starts a third of a millisecond earlier, while processes stand; and as much again where nothing of
# it has to be relocated, for which its text has a fixed address (stack, heap and mappings have random ones). A target must be
# named then, since the programs that run during the build need a dynamic linker.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
STATIC = RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"

.DEFAULT_GOAL := help
.PHONY: help setup setup-build build demo test suites vm-shell bench doc check

help: ## list these targets
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: ## install what is missing to build, test and demonstrate (Debian, as root)
	@tests/support/setup.sh

setup-build:
	@tests/support/setup.sh build

build: setup-build ## build the release binary, target/release/fsnap
	$(STATIC) cargo build --release --locked --package fsnap --target $(HOST)
	install -D target/$(HOST)/release/fsnap target/release/fsnap

demo: setup ## show the whole story on real parts (as root)
	cargo build --locked --package fsnap --package fsnap-oracle
	@tests/demo/demo.sh

test: setup ## run everything that must pass; the last line counts it
	@tests/support/run-all.sh

suites: setup ## run the POSIX suites of others on a branch: pjdfstest, fsx, stress-ng
	@tests/support/setup.sh suites
	FSNAP_SUITES=$(CURDIR)/target/suites/bin cargo test --locked --package fsnap --test suites

vm-shell: setup ## give a prompt in a virtual machine
	cargo run --quiet --locked --package vm-tests -- --shell

bench: setup ## measure against bare system calls and peers
	$(STATIC) FSNAP_CRIU=$(CURDIR)/target/criu/criu cargo bench --locked --target $(HOST)

doc: setup-build ## build the documentation, target/doc/fsnap/index.html
	cargo doc --locked --workspace --no-deps

check: setup-build ## look at the code only: format and lints
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
