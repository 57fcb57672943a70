//! The trait that a storage technology implements.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Capabilities, Damage, Error, Identity, Image, Locator, MountSpec, Result, Snapshot, Source, Volume};

/// What never changes about an opened store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreInfo {
    /// The backend's name as users write it: `btrfs`, `dm-thin`, `nilfs2`, `layers`, `rsync`.
    pub kind: &'static str,
    /// Names this store and no other, for as long as it exists.
    pub identity: Identity,
    /// What this store can do.
    pub capabilities: Capabilities,
}

/// The driver of one storage technology, opened on one store.
///
/// The [crate documentation](crate) explains the words and the life of an image. Implementations hold no state that
/// would be lost with the process: what they need to remember lies in the store.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Describes the store.
    ///
    /// * `store_is_stable`: the same store opened again describes itself equally; another store has another identity.
    fn store(&self) -> &StoreInfo;

    /// Opens the live tree at `dir` as a volume, pinned by a descriptor.
    ///
    /// Requires `dir` to be an absolute path of a directory; its last component may not be a symbolic link.
    ///
    /// * `adopt_identifies`: two adoptions of one tree have the same identity, two trees have different ones, and a
    ///   tree that was removed and made again under the same path has a new one.
    /// * `adopt_refuses_symlinks`: a path whose last component is a symbolic link is refused with
    ///   [`ErrorKind::NotAVolume`](crate::ErrorKind::NotAVolume), and so is a path that is no directory.
    /// * `adopt_missing`: a path that does not exist is refused with
    ///   [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    fn adopt(&self, dir: &Path) -> Result<Volume>;

    /// Chooses a place for a new image of `source`.
    ///
    /// `known` are locators that the caller has recorded and wants avoided, though nothing may be there. Nothing is visible at the new one yet; a place that is
    /// reserved and not used needs no clean-up, though `delete` accepts it.
    ///
    /// * `reserve_is_new`: the locator is not in `known` and has no whole image.
    /// * `reserve_shows_nothing`: `reserve` alone adds no whole image to `list`.
    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator>;

    /// Does ahead what makes `snapshot` short, while writers still run: flushes, copies.
    ///
    /// Optional and repeatable.
    ///
    /// * `prime_is_optional`: a snapshot is equally complete with and without it.
    /// * `prime_fixes_nothing`: what is written between `prime` and `snapshot` is in the snapshot.
    fn prime(&self, volume: &Volume, at: &Locator) -> Result<()>;

    /// Fixes the content of `volume` at `at`.
    ///
    /// When no process writes to the volume during the call, the snapshot is its content at that instant; otherwise
    /// it has the consistency that [`Capabilities::live`] names. The call may run while processes stand frozen, so it
    /// does no work that `prime` or `settle` can do.
    ///
    /// * `snapshot_is_complete`: it equals the volume in names, kinds, contents, holes, owners, modes, times to the
    ///   nanosecond and hard links, and in xattrs and ACLs where the capabilities say so; names may be any bytes.
    /// * `snapshot_has_fresh_writes`: data written a moment before through any descriptor or shared mapping, not yet
    ///   flushed by anybody, is in it.
    /// * `snapshot_is_independent`: it does not change when the volume does, nor when the volume is removed.
    /// * `snapshot_omits_aloud`: what could not be kept is named in [`Snapshot::omissions`].
    /// * `snapshot_repeats`: called again with the same volume and locator, it succeeds, whether the first call ended
    ///   or was cut short; the result is one whole image. One that is whole already stays as it is, and is returned,
    ///   though the volume has changed since.
    /// * `snapshot_refuses_another_volume`: a volume whose directory was replaced since `adopt` is refused with
    ///   [`ErrorKind::WrongIdentity`](crate::ErrorKind::WrongIdentity).
    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot>;

    /// Makes the snapshot at `at` durable and returns it, if it is whole.
    ///
    /// Called after the writers run again, and by recovery, which has nothing but the locator.
    ///
    /// * `settle_returns_the_snapshot`: it equals what `snapshot` returned, omissions included.
    /// * `settle_refuses_partial`: where there is no image, or a partial one, it fails with
    ///   [`ErrorKind::NotFound`](crate::ErrorKind::NotFound); `delete` then removes what there is.
    fn settle(&self, at: &Locator) -> Result<Snapshot>;

    /// Makes a volume at `at` that starts equal to `snapshot`, and durable: a power cut after the return does not take it away.
    ///
    /// Requires [`Capabilities::clones`]; without it, fails with
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported).
    ///
    /// * `clone_is_equal`: the new volume equals the snapshot, times and hard links included.
    /// * `clone_is_isolated`: writes to the clone change neither the snapshot nor another clone.
    /// * `clone_outlives_its_snapshot`: deleting the snapshot leaves the clone whole, or fails with
    ///   [`ErrorKind::Busy`](crate::ErrorKind::Busy).
    /// * `clone_can_be_snapshotted`: the directory of an activated clone can be adopted and snapshotted.
    /// * `clone_checks_identity`: a snapshot whose identity is not the one at its locator is refused with
    ///   [`ErrorKind::WrongIdentity`](crate::ErrorKind::WrongIdentity), and nothing is made.
    /// * `clone_needs_the_capability`: in a store that cannot clone, nothing is made.
    fn clone_snapshot(&self, snapshot: &Snapshot, at: &Locator) -> Result<()>;

    /// Lists every image of the store, partial and foreign ones included.
    ///
    /// Callers delete only what they recorded.
    ///
    /// * `list_is_complete`: every image that was made and not deleted is listed once, under its own locator.
    /// * `list_survives_reopening`: a store opened again lists the same.
    fn list(&self) -> Result<Vec<Image>>;

    /// Makes the image at `at` usable and returns the recipe for it; mounts nothing.
    ///
    /// Repeatable: a second call returns an equal recipe. The recipe holds until `deactivate`.
    ///
    /// * `activate_refuses_writes`: through the recipe of a snapshot, a write fails with `EROFS`, for root too.
    /// * `activate_missing`: without a whole image there, it fails with
    ///   [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    fn activate(&self, at: &Locator) -> Result<MountSpec>;

    /// Undoes `activate`; succeeds when there is nothing to undo.
    ///
    /// * `deactivate_is_idempotent`: twice in a row, or without `activate`, it succeeds and the image stays whole.
    fn deactivate(&self, at: &Locator) -> Result<()>;

    /// Reads the whole snapshot and names what is damaged; an empty list means that none was found.
    ///
    /// * `verify_passes_whole_images`: an undamaged snapshot has no damage.
    /// * `verify_names_damage`: where the store [verifies contents](Capabilities::verifies_contents), a changed byte
    ///   below fsnap is found, and the file it belongs to is named.
    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>>;

    /// Lists the past states of `volume` that its file system keeps by itself, asked or not.
    ///
    /// * `history_is_in_order`: the oldest is first, and numbers rise; what was written to the volume and synced is in the last
    ///   one.
    /// * `history_needs_a_keeper`: where the file system keeps no states, this and `pin` fail with
    ///   [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported), and nothing is made.
    fn history(&self, volume: &Volume) -> Result<Vec<Moment>> {
        let _ = volume;
        Err(no_history(self.store().kind))
    }

    /// Makes a past state of `volume` the snapshot at `at`, so that it stays: what `snapshot` is for the present one.
    ///
    /// * `pin_is_of_that_state`: the snapshot equals the volume as it was in that state, whatever was written since.
    /// * `pin_repeats`: called again with the same arguments, it succeeds with the same snapshot.
    /// * `pin_is_counted`: of several snapshots of one state, `history` names each as the reason why it stays, and each is whole until
    ///   it is deleted itself.
    /// * `pin_missing`: where the state is not there any more, or never was, it fails with
    ///   [`ErrorKind::NotFound`](crate::ErrorKind::NotFound), and nothing is made.
    fn pin(&self, volume: &Volume, number: u64, at: &Locator) -> Result<Snapshot> {
        let _ = (volume, number, at);
        Err(no_history(self.store().kind))
    }

    /// Tells ahead in which parts of files `new` can differ from `old`, so that a comparison need not read the rest.
    ///
    /// `new` is another state of the same line of work: a snapshot, or a volume as it is now. `None`: it is not known, and
    /// everything has to be read.
    ///
    /// * `differences_miss_nothing`: outside of the [ranges](Differences::ranges) told for a file, its bytes are equal in both
    ///   states; written a moment before or long ago, flushed or not.
    fn differences(&self, old: &Snapshot, new: Source<'_>) -> Result<Option<Box<dyn Differences>>> {
        let _ = (old, new);
        Ok(None)
    }

    /// Names a directory of the store, in which callers keep files of their own beside the images: on the same file system, so that
    /// contents can be shared, and entered by nobody else. Nothing may be there yet; what is there is no image.
    ///
    /// `None`: the store lies in no directory.
    fn beside(&self) -> Option<PathBuf> {
        None
    }

    /// Removes the image at `at`, whole or partial.
    ///
    /// * `delete_is_idempotent`: succeeds if nothing is there.
    /// * `delete_leaves_relatives`: other snapshots of the volume, its clones and the volume itself stay as they are.
    /// * `delete_frees_the_locator`: `list` no longer shows it, and `settle` fails with
    ///   [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    /// * `delete_touches_only_its_own`: a locator that this backend could not have made is refused with
    ///   [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) and nothing is removed, whatever the locator says.
    fn delete(&self, at: &Locator) -> Result<()>;
}

fn no_history(kind: &'static str) -> Error {
    let reason = "its file system keeps no states that nobody asked for".to_owned();
    Error::Unsupported { kind, action: "show the history of a volume", reason }
}

/// A past state of a volume that its file system keeps by itself, at least for some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Its number: a later state has a larger one.
    pub number: u64,
    /// When it was made, in seconds since 1970 by the clock of that moment.
    pub seconds: u64,
    /// No file differs from the state before.
    pub same: bool,
    /// Why it stays.
    pub kept: Kept,
}

/// Why a past state stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// It does not: the file system takes it back when it wants the room.
    Not,
    /// These snapshots of the store are of it.
    ByStore(Vec<Locator>),
    /// Somebody else wants it to stay.
    ByOthers,
    /// These snapshots of the store are of it, and somebody else wants it to stay when they are gone.
    ByBoth(Vec<Locator>),
}

impl Kept {
    /// The snapshots of the store that are of it.
    pub fn snapshots(&self) -> &[Locator] {
        match self {
            Self::ByStore(snapshots) | Self::ByBoth(snapshots) => snapshots,
            Self::Not | Self::ByOthers => &[],
        }
    }
}

/// Where two states of a volume can differ: what [`Backend::differences`] found out.
pub trait Differences: fmt::Debug + Send + Sync {
    /// The parts in which the content of a file can differ, in order; `None`: anywhere, as where its length differs.
    ///
    /// `old` and `new` are the file in the two states, mounted by the kernel. Outside of the parts both have the same bytes.
    fn ranges(&self, old: &File, new: &File) -> io::Result<Option<Vec<Range<u64>>>>;
}
