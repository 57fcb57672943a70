//! The program as its users see it: what they type, what they read, and what is there afterwards.
//!
//! A test is a session: lines that a shell runs, and one snapshot of everything that was printed. Lines run with an
//! environment of their own, in a directory of their own; a session on btrfs has a file system of its own.

mod redact;
mod site;
#[path = "../support/thin.rs"]
mod thin;
#[path = "../support/volumes.rs"]
mod volumes;

mod branch;
mod checkpoint;
mod diff;
mod doctor;
mod faults;
mod help;
mod help_of_runs;
mod hostile;
mod init;
mod install_hooks;
mod lost_log;
mod output;
mod overlay;
mod processes;
mod readme;
mod references;
