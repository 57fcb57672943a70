//! fsnap takes an atomic snapshot of every volume that processes can write to, at each of their checkpoints.
//!
//! A checkpoint/restore engine (CRIU, and whatever calls CRIU) freezes processes and saves them; nothing rolls their
//! *files* back. fsnap is called by the engine, fixes the files at the very same instant, and makes writable branches
//! from any past checkpoint, onto which the processes can be restored.
//!
//! This page is the map of the code. The contract of the storage backends is a crate of its own, [`fsnap_backend`];
//! decisions that are not obvious from the code have a page each in [`design`].
//!
//! # Bird's-eye view
//!
//! ```text
//!   CRIU ──environment──► cli::hook ─┐                           ┌─► Catalog (SQLite): what is recorded
//!   people ──arguments──► cli::…  ───┼──► Coordinator ───────────┤
//!                                    │      │                    └─► dyn Backend: btrfs, rsync, …: what is stored
//!                                    │      ├─► processes: which volumes a tree can write to, who else writes
//!                                    │      ├─► quiesce: stop them, and never leave them stopped
//!                                    │      └─► engine, mount: restore them onto a branch
//! ```
//!
//! A checkpoint goes through three steps, because an engine calls its hooks as separate processes:
//!
//! 1. [`begin`](coordinator::Coordinator::begin), while the processes run: find the volumes, reserve a place for each
//!    snapshot, record the [intent](catalog::Intent) durably, flush and copy ahead.
//! 2. [`take`](coordinator::Window::take), while they are frozen: one snapshot per volume, side by side; note that it is
//!    done, without syncing. A process that the first step left behind [stands by](design::frozen_window) for it.
//! 3. [`seal`](coordinator::Coordinator::seal), when they run again: make it durable, and put the checkpoint in the place
//!    of its intent. The engine gives no hook here, so that the next command does it: every command begins with
//!    [`recover`](coordinator::Coordinator::recover).
//!
//! # Where things are
//!
//! | module | what it knows |
//! |---|---|
//! | [`checkpoint`], [`branch`], [`volume`], [`name`] | the records, and nothing else |
//! | [`catalog`] | the database: its [format](catalog::format), intents, holds, one transaction per change |
//! | [`coordinator`] | the order of things; one file per operation |
//! | [`reference`](mod@reference) | what users write for a checkpoint |
//! | [`processes`] | `/proc`: trees, what they have in use and can write to, who else writes |
//! | [`quiesce`] | stopping and thawing; the guard that thaws when fsnap is killed |
//! | [`engine`] | CRIU's hooks, images, dumps and restores; the namespaces of a run |
//! | [`run`] | commands that can be saved and copied live: where they are recorded, and how they are saved |
//! | [`unlinked`] | contents of files that have no name any more: where they are kept, and how they come back |
//! | [`mount`](mod@mount) | carrying out a backend's mount recipe |
//! | [`stores`] | from a backend's name to an opened store: the only file that names them all |
//! | [`config`] | settings |
//! | [`progress`] | what is told of long work while it goes on |
//! | [`failpoint`] | where tests make fsnap die |
//! | `error` | what can go wrong, and the one table to `errno` |
//! | `fuse` | past states and copy-on-write trees, served through FUSE |
//! | `cli` (in the binary) | arguments, environment, text and JSON; a file for each command, and three that they share |
//!
//! The backends are the crates `backends/*`; `backends/conformance` is the suite that all of them pass; `tests/` drives
//! the binary as users do, and `tests/oracle` is a process that knows what its files must hold.
//!
//! # Invariants
//!
//! Architecture Invariant: a checkpoint that is listed is whole, durable and restorable. What is not yet so is an intent.
//!
//! Architecture Invariant: the order is *intent, act, result*. No backend is called inside a transaction, and nothing
//! outside changes before the intent for it is durable.
//!
//! Architecture Invariant: fsnap deletes only images that it recorded. Others are shown, never touched.
//!
//! Architecture Invariant: in the frozen window fsnap does not sync, does not start a program, and does not look at what
//! has not changed.
//!
//! Architecture Invariant: nothing is frozen that would stay frozen if fsnap were killed at the next instruction.
//!
//! Architecture Invariant: a volume's files are touched beneath a descriptor only ([`fsnap_backend::beneath`]). Volumes,
//! image directories and records are untrusted input.
//!
//! Architecture Invariant: a backend sees the contract and nothing else.
//!
//! Architecture Invariant: `unsafe` lives in files named `sys.rs`, at most one per directory of `src` and per other package.
//!
//! Architecture Invariant: the library never prints and never reads the environment; the command line does.

pub mod branch;
pub mod catalog;
pub mod checkpoint;
pub mod config;
pub mod coordinator;
pub mod design;
pub mod engine;
mod error;
pub mod failpoint;
#[cfg(feature = "fuse")]
pub mod fuse;
pub mod mount;
pub mod name;
pub mod processes;
pub mod progress;
pub mod quiesce;
pub mod reference;
pub mod run;
pub mod stores;
pub mod unlinked;
pub mod volume;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

pub use error::{Error, Result};

/// Bytes that nobody can guess or repeat.
fn random_bytes<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

/// Names the running kernel's boot ([random(4)](https://man7.org/linux/man-pages/man4/random.4.html), `boot_id`).
fn boot_id() -> std::io::Result<String> {
    static ID: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    if let Some(id) = ID.get() {
        return Ok(id.clone());
    }
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    Ok(ID.get_or_init(|| id).clone())
}

/// A name or path of any bytes, fit for a terminal: what controls a terminal or turns the direction of text is escaped,
/// and so are bytes that are not UTF-8.
pub fn printable(text: &OsStr) -> String {
    let mut shown = String::new();
    for chunk in text.as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || turns_text(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    shown
}

/// Whether the character makes a terminal show other characters in another order than they stand in.
fn turns_text(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
