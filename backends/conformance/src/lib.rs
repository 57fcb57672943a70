//! One suite for all backends: a case per rule of the contract, random histories, and kills at every change.
//!
//! # How a backend uses it
//!
//! Its `Cargo.toml` turns the standard harness off for one test, and that test says what the suite needs to know:
//!
//! ```toml
//! [[test]]
//! name = "conformance"
//! harness = false
//! ```
//!
//! ```no_run
//! use std::{io, path::Path, process::ExitCode, sync::Arc};
//! use fsnap_backend::{Backend, Capabilities, Result};
//! use fsnap_conformance::{Damage, Fixture, Suite, Unkeepable, Workplace};
//! # struct Store;
//! # impl Store {
//! #     fn create(_: &Path) -> Result<Arc<dyn Backend>> { unreachable!() }
//! #     fn open(_: &Path) -> Result<Arc<dyn Backend>> { unreachable!() }
//! # }
//! # const CAPABILITIES: Capabilities = Capabilities {
//! #     clones: true, constant_time_clones: false, xattrs: true, acls: true, ownership: true, mountable: true,
//! #     verifies_contents: true, live: fsnap_backend::Consistency::Fuzzy,
//! # };
//!
//! struct OnTemp;
//!
//! impl Fixture for OnTemp {
//!     fn capabilities(&self) -> Capabilities { CAPABILITIES }
//!     fn ignored(&self) -> &'static [&'static str] {
//!         &[
//!             "clone_needs_the_capability",
//!             "history_is_in_order", "pin_is_of_that_state", "pin_repeats", "pin_is_counted", "pin_missing",
//!             "differences_miss_nothing",
//!         ]
//!     }
//!     fn workplace(&self) -> io::Result<Workplace> { Ok(Box::new(tempfile::tempdir()?)) }
//!     fn create_store(&self, place: &Path) -> Result<Arc<dyn Backend>> { Ok(Store::create(place)?) }
//!     fn open_store(&self, place: &Path) -> Result<Arc<dyn Backend>> { Ok(Store::open(place)?) }
//!     fn damage(&self) -> Option<Damage> { Some(fsnap_conformance::flip_a_byte_below) }
//!     fn unkeepable(&self) -> Option<Unkeepable> { Some(fsnap_conformance::mount_below) }
//! }
//!
//! fn main() -> ExitCode {
//!     fsnap_conformance::main(vec![Suite::new("temp", OnTemp)])
//! }
//! ```
//!
//! Several suites may be given, one for each kind of file system: their names come before those of the cases.
//!
//! # What runs
//!
//! * Every case of [`CASES`], chosen by capability. A case that says nothing about a store is reported as ignored,
//!   with the reason; the fixture pins which ones these are.
//! * `capabilities_are_pinned` and `ignored_cases_are_pinned`.
//! * `histories`: random sequences of changes, snapshots, clones and removals, in which every image and every volume is
//!   compared with the [`Model`] after each step. `PROPTEST_CASES` sets their number.
//! * `threads`: calls from several threads at once; `beside_forks`: calls while another thread starts programs.
//! * `killed_prime`, `killed_snapshot`, `killed_settle`, `killed_clone`, `killed_delete`: the call runs in a child
//!   process that is killed before its first change to anything outside itself, before its second, and so on until it
//!   comes through. The child is the test's own executable, started again with an argument that [`main`] knows.
//! * `kills_leave_nothing`: the store does not grow when killed snapshots are deleted.
//!
//! # The oracle
//!
//! [`Model`] holds a tree of files in memory, and makes each change both to it and, by real system calls, to a live
//! directory. [`Listing`] is what a tree holds, read through the contract or computed by the model; two of them are
//! compared with a readable result.
//!
//! # Code map
//!
//! * `suite`: the suite as a test program; `fixture`: what a backend tells it; `site`: a fresh store and volumes for one case; `failure`.
//! * `cases`: the rules; `history`, `crash`, `threads`: the rest of what runs.
//! * `model`: the oracle; `op`: the changes that it knows; `bytes`, `listing`: what is compared; [`samples`]: trees that are hard to keep;
//!   `view`: carrying out a recipe, to read what is in an image.
//! * [`measure`]: what the benchmarks of the backends share; `sys`: calls without a safe wrapper.

mod bytes;
mod cases;
mod crash;
mod failure;
mod fixture;
mod history;
mod listing;
pub mod measure;
mod model;
mod op;
pub mod samples;
mod site;
mod suite;
mod sys;
mod threads;
mod view;

pub use bytes::Bytes;
pub use cases::{CASES, Case};
pub use failure::{During, Failure, Verdict};
pub use fixture::{Damage, Fixture, Unkeepable, Workplace, flip_a_byte_below, mount_below};
pub use listing::{Difference, Item, Listing};
pub use model::Model;
pub use op::{Live, Op, TreePath};
pub use site::{LiveVolume, Site};
pub use suite::{Suite, Trial, as_tests, main, main_ignoring, main_with};
pub use view::{MountPoint, View};
