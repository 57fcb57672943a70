//! The contract between fsnap and the storage technologies it drives.
//!
//! A [`Backend`] keeps images of directory trees in one *store*: a btrfs file system, a thin pool, a NILFS2 file
//! system, or a plain directory. The coordinator decides when images are made, records them, and removes them;
//! a backend knows nothing of checkpoints, engines or catalogs, and no backend knows of another.
//!
//! # Words
//!
//! * A **store** is the place where a backend keeps images. One opened store is one [`Backend`] value.
//! * A **volume** is a live, writable tree that can be snapshotted as one unit: [`Volume`] is such a tree, opened and
//!   pinned by a descriptor.
//! * A **snapshot** is a complete image of one volume that never changes: [`Snapshot`].
//! * To **clone** is to make a new volume that starts equal to a snapshot.
//! * A **locator** says where an image lives, in the backend's own words: [`Locator`]. It is opaque to all others.
//!
//! Other systems use the same words otherwise. A NILFS2 *checkpoint* is any consistent point of its log, and a NILFS2
//! *snapshot* is our snapshot. dm-thin and btrfs call a writable copy a "snapshot"; ours can never be written. CRIU's
//! script action `pre-dump` is not its command `criu pre-dump`.
//!
//! # The life of an image
//!
//! ```text
//!            reserve            prime*           snapshot            settle
//!  (nothing) ───────► locator ─────────► locator ─────────► whole ──────────► whole and durable
//!                        │                  │  crash: partial │                    │
//!                        └──────── delete ──┴─────────────────┴────────────────────┘
//! ```
//!
//! A whole image is used through [`Backend::activate`], which returns a recipe ([`MountSpec`]) and mounts nothing, or
//! as the source of [`Backend::clone_snapshot`].
//!
//! # One worked story
//!
//! An engine is about to freeze a process that writes to `/srv/db`. The coordinator opens the directory with
//! [`Backend::adopt`] and compares its [`Identity`] with the one it recorded when the volume was registered. It asks
//! [`Backend::reserve`] for a locator and writes that locator into its own durable record *before* anything exists
//! there. Then it calls [`Backend::prime`], which flushes and copies ahead while the process still runs. The engine
//! freezes the process; [`Backend::snapshot`] fixes the content. Should fsnap be killed now, the next command finds the
//! recorded locator, and [`Backend::settle`] tells whether the image there is whole: it is kept, or [`Backend::delete`]
//! removes whatever there is. When all goes well, the process runs on, and `settle` makes the image durable.
//!
//! Later somebody wants a writable line of work from that instant: `reserve` with the snapshot as the source,
//! `clone_snapshot`, `activate`; the recipe is carried out in the mount namespace where the restored process will
//! live, and the directory can be adopted as a volume again.
//!
//! # How a store is opened
//!
//! Opening differs from technology to technology in nothing but the meaning of a *place*: a directory, a subvolume, a
//! pool's device. Each backend's crate has a type `Store` that implements [`Backend`], and three functions of it:
//!
//! * `Store::probe(dir) -> Result<PathBuf>` tells whether the directory can be a volume of this backend, and the place
//!   where its store lies unless the user names another; the error says why not.
//! * `Store::create(place) -> Result<Store>` makes a store there, or opens the one that fsnap made before.
//! * `Store::open(place) -> Result<Store>` opens an existing one and changes nothing in it, so that a read-only store can be
//!   browsed; but a volume that a killed call left stopped runs again once its store was opened.
//!
//! They are functions and not methods of the trait because there is no value to call them on yet; one file of fsnap,
//! `src/stores.rs`, names all backends and calls them.
//!
//! # Rules for every method
//!
//! Methods block, may be called from several threads at once, and are told nothing about phases. A method that fails
//! has changed nothing that a caller could see, except for a *partial* image at the locator it was given. No method
//! follows a symbolic link of a volume, and none resolves a path of a volume except through [`beneath`].
//!
//! Every rule that a method's documentation states as a list item begins with a name in backticks; the conformance
//! suite has one case of that name, and at least one deliberately broken backend fails it.
//!
//! # Code map
//!
//! * `backend`: the trait; `capabilities`: what a store can do; `locator`, `image`, `mount_spec`: what the methods take and give; `error`.
//! * [`beneath`]: the one way to a volume's files; `tree`: reading a tree wherever it is kept; `dir_tree`: one that lies in a directory;
//!   `read_all`: reading all of it.
//! * [`mounts`]: the kernel's table of mounts.

mod backend;
pub mod beneath;
mod capabilities;
mod dir_tree;
mod error;
mod image;
mod locator;
mod mount_spec;
pub mod mounts;
mod read_all;
mod tree;

pub use backend::{Backend, Differences, Kept, Moment, StoreInfo};
pub use capabilities::{Capabilities, Consistency};
pub use dir_tree::{DirTree, WholeFile, data_in};
pub use error::{Error, ErrorKind, IoContext, Result};
pub use image::{Damage, Image, ImageKind, ImageState, Omission, Snapshot, Source, Volume};
pub use locator::{Identity, InvalidLocator, Locator};
pub use mount_spec::MountSpec;
pub use read_all::read_all;
pub use tree::{Content, Dir, Entry, FileKind, FileMeta, Timestamp, Xattrs, seek};
