# What there is to do here; `make` alone lists it.

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

.DEFAULT_GOAL := help
.PHONY: help setup setup-build build demo test bench doc check

help: ## list these targets
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: ## install what is missing to build, test and demonstrate (Debian, as root)
	@tests/support/setup.sh

setup-build:
	@tests/support/setup.sh build

build: setup-build ## build the release binary, target/release/fsnap
	cargo build --release --locked

demo: setup ## show the whole story on real parts (as root)
	cargo build --locked --package fsnap --package fsnap-oracle
	@tests/demo/demo.sh

test: setup ## run everything that must pass; the last line counts it
	@tests/support/run-all.sh

bench: setup ## measure against bare system calls and peers
	cargo bench --locked

doc: setup-build ## build the documentation, target/doc/fsnap/index.html
	cargo doc --locked --workspace --no-deps

check: setup-build ## look at the code only: format and lints
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
