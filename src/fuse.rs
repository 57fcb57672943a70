//! fsnap's own file system: trees that are written copy-on-write, served through FUSE.
//!
//! [`overlay`] holds the rules: a lower directory that never changes, a store that keeps every change, and the tree that
//! the two make together. It is plain code over descriptors and is tested without FUSE. [`adapter`] translates the
//! kernel's requests into calls of it and decides nothing but caching. [`session`] mounts and serves.
//!
//! [`browse`] is the tree of past states, and [`browse_adapter`] its way to the kernel; [`branches`] are the copy-on-write trees
//! that the same mount shows, and [`mount_adapter`] decides to whom a request goes. Snapshots that the kernel can mount
//! may be attached to it ([`browse::Natives`]); then no request for their files comes at all.
//!
//! Beside these: [`lower`] opens what a tree begins with, `mounting` puts a file system where it is seen, `open`, `handles` and `readers` are
//! what the kernel has open, `given` what it is given before it asks, and `wire` has both sides' values.
//!
//! Architecture Invariant: no path of a served tree is ever put together as a string and resolved. Every step goes from a
//! directory's descriptor by one name, and no symbolic link of the tree is followed.
//!
//! Architecture Invariant: the number of descriptors does not grow with the number of files that are known, only with the
//! number that is open.

pub mod adapter;
pub mod branches;
pub mod browse;
pub mod browse_adapter;
mod given;
mod handles;
pub mod lower;
pub mod mount_adapter;
mod mounting;
mod open;
pub mod places;
mod readers;
pub mod session;
mod sys;
mod watch;
mod wire;

pub use crate::stores::layers as overlay;
