//! A volume is a btrfs subvolume.
//!
//! # What is captured
//!
//! A snapshot is a read-only snapshot of the volume's subvolume. The kernel writes out what is dirty in the subvolume
//! before it captures it, so that nothing of what was written before the call is missing; `prime` does most of that
//! ahead, by `syncfs`, while the writers still run.
//!
//! **Nested subvolumes are part of the volume.** btrfs captures one subvolume at a time and shows an empty directory in
//! place of a nested one. This backend captures each, one right after the other, and puts them together again for
//! whoever looks into the snapshot or clones it. When all writers stand, they are of one instant. The list of nested
//! subvolumes is read again after the last capture: should one have been made, moved or removed meanwhile, everything is
//! captured anew. A volume without any costs one snapshot ioctl.
//!
//! **The store is not part of a volume.** By default it is the subvolume `.fsnap` at the root of the mount; where that
//! root is the volume itself, the store and its images are left out, and an empty directory `.fsnap` stands in each
//! snapshot and clone, as btrfs makes it. It cannot be written to, and can be removed from a clone.
//!
//! # Code map
//!
//! * `store`: finding, making and opening a store, and its layout on disk.
//! * `nested`: the subvolumes below a volume's root; `images`: finding, capturing and removing images; `group`: one image made of several
//!   subvolumes; `remove`: subvolumes together with what is nested in them; `mounts`: who has an image mounted.
//! * `sys`: the ioctls; `refusal`: the kernel's refusals, in words that say what to do.
//!
//! # Limits
//!
//! * Only root (`CAP_SYS_ADMIN`) can use this backend: btrfs lets nobody else look for subvolumes or delete them.
//! * A nested subvolume that is both made and removed again while the call runs may show as an empty directory. When the
//!   writers stand, as an engine has them, there is no such thing.
//! * The directory that holds a nested subvolume gets its own times back in a clone, except the time of the last change
//!   of its attributes, which nobody can set.
//! * `verify` relies on btrfs's checksums. Files with the attribute `C` (`chattr +C`) have none: their blocks are read,
//!   but a changed byte in them goes unseen. So it is for the whole file system when it is mounted with `nodatasum`
//!   or `nodatacow`, and then the capability [`verifies_contents`](fsnap_backend::Capabilities::verifies_contents) is
//!   not there.
//! * A subvolume with an active swap file cannot be captured: the kernel refuses it.

mod group;
mod images;
mod mounts;
mod nested;
mod refusal;
mod remove;
mod store;
mod sys;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use fsnap_backend::{
    Backend, Damage, Error, ErrorKind, Image, ImageKind, ImageState, IoContext, Locator, MountSpec, Result, Snapshot,
    Source, StoreInfo, Volume, beneath,
};
use rustix::rand::GetRandomFlags;

use crate::images::{Found, hidden, no_image};
use crate::refusal::explained;
pub use crate::store::Store;
use crate::store::{ImageDir, identity, open_volume};

/// The backend's name, as users write it.
const KIND: &str = "btrfs";

/// How often a volume is captured anew because its nested subvolumes changed meanwhile.
const ATTEMPTS: usize = 4;

impl Backend for Store {
    fn store(&self) -> &StoreInfo {
        &self.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        let refused = |reason| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason };
        let (root, found) = open_volume(dir)?;
        let file_system = sys::file_system(&root).context("identify the file system of", dir)?;
        if file_system != self.file_system {
            return Err(refused(format!("it lies on another file system than the store {}", self.place.display())));
        }
        if found.id == self.id {
            return Err(refused("it is the store itself".to_owned()));
        }
        Ok(Volume::new(dir, identity(&file_system, &found), root))
    }

    fn reserve(&self, source: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        let dir = match source {
            Source::Volume(_) => ImageDir::Snapshots,
            Source::Snapshot(_) => ImageDir::Volumes,
        };
        loop {
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, GetRandomFlags::empty()).context("ask for", "random bytes")?;
            let text = format!("{}{:016x}", dir.prefix(), u64::from_ne_bytes(random));
            let at = Locator::try_from(text).map_err(|error| Error::NotFound { what: error.to_string() })?;
            if !known.contains(&at) && self.state(dir, &at)?.is_none() {
                return Ok(at);
            }
        }
    }

    fn prime(&self, volume: &Volume, _: &Locator) -> Result<()> {
        // BTRFS_IOC_START_SYNC would not do: it commits the trees and leaves in memory what was written to files.
        rustix::fs::syncfs(volume).context("write out the file system of", volume.dir())
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        let subvolume = self.check(volume)?;
        match self.find(at)? {
            Found::Nothing => {}
            Found::Plain(_, found) | Found::Group(_, found) if found.origin == subvolume.uuid => {
                return Ok(self.record(at, &found));
            }
            Found::Plain(..) | Found::Group(..) | Found::Foreign => return Err(Error::Exists { what: self.shown(at) }),
            Found::Damaged(reason) => return Err(self.damaged(at, reason)),
            // Its parts are of another instant.
            Found::Partial => self.remove(ImageDir::Snapshots, at)?,
        }
        let list = || {
            let nested = nested::list(volume, subvolume.id, Some(self.id));
            nested.map_err(explained).context("look for subvolumes in", volume.dir())
        };
        let mut nested = list()?;
        for _ in 0..ATTEMPTS {
            let captured = match nested.is_empty() {
                true => self.capture_plain(volume, at),
                false => self.capture_group(volume, subvolume.id, &nested, at),
            };
            let undo = |error: Error| match error.kind() {
                // Another call for this locator came first: what is there is not of this one's making.
                ErrorKind::Exists => error,
                _ => error.and_undo(self.remove(ImageDir::Snapshots, at)),
            };
            let after = list().map_err(undo)?;
            if after == nested {
                let found = captured.map_err(undo)?;
                if !nested.is_empty() {
                    self.reveal(ImageDir::Snapshots, at).map_err(undo)?;
                }
                return Ok(self.record(at, &found));
            }
            self.remove(ImageDir::Snapshots, at)?;
            nested = after;
        }
        Err(Error::Changed { path: volume.dir().to_owned() })
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        match self.find(at)? {
            // The commit that ends the snapshot ioctl has made it durable.
            Found::Plain(_, found) => Ok(self.record(at, &found)),
            Found::Group(group, found) => match self.make_view(&group, at) {
                // What is read-only is durable. The parts are whole; only nobody can look into them together.
                Err(error) if error.kind() == ErrorKind::ReadOnly => Ok(self.record(at, &found)),
                made => made.map(|()| self.record(at, &found)),
            },
            Found::Damaged(reason) => Err(self.damaged(at, reason)),
            Found::Nothing | Found::Partial | Found::Foreign => Err(no_image(at)),
        }
    }

    fn clone_snapshot(&self, snapshot: &Snapshot, at: &Locator) -> Result<()> {
        let source = self.whole(snapshot)?;
        if !ImageDir::Volumes.owns(at) {
            return Err(no_image(at));
        }
        let place = self.place_of(ImageDir::Volumes, at);
        match self.state(ImageDir::Volumes, at)? {
            None => {}
            Some(ImageState::Partial) => self.remove(ImageDir::Volumes, at)?,
            Some(ImageState::Whole | ImageState::Foreign) => {
                return Err(Error::Exists { what: place.display().to_string() });
            }
        }
        let name = hidden(at);
        let made = match source {
            Found::Plain(root, _) => {
                return sys::snapshot(root, &self.volumes, OsStr::new(at.as_str()), false)
                    .map_err(explained)
                    .context("make the clone", place);
            }
            Found::Group(group, _) => group.assemble(&self.volumes, OsStr::new(&name), false),
            _ => return Err(no_image(&snapshot.at)),
        };
        (made.map_err(explained).context("make the clone", &place))
            .and_then(|()| self.reveal(ImageDir::Volumes, at))
            .and_then(|()| images::commit(&self.volumes).context("make durable", &place))
            .map_err(|error| error.and_undo(self.remove(ImageDir::Volumes, at)))
    }

    fn list(&self) -> Result<Vec<Image>> {
        let mut images = BTreeSet::new();
        for kind in [ImageKind::Snapshot, ImageKind::Volume] {
            let dir = ImageDir::of(kind);
            for name in beneath::names(self.dir(dir)).context("list", self.place.join(dir.name()))? {
                let own = name.to_str().map(|name| name.strip_prefix('.').unwrap_or(name));
                let own = own.and_then(|name| name.parse().ok()).filter(|at| dir.owns(at));
                // Either may be gone since the directory was read.
                let image = match own.map(|at| self.state(dir, &at).map(|state| (at, state))).transpose()? {
                    Some((_, None)) => None,
                    Some((at, Some(state))) if state != ImageState::Foreign => Some(Image { at, kind, state }),
                    _ => self.foreign(dir, &name)?.map(|at| Image { at, kind, state: ImageState::Foreign }),
                };
                images.extend(image);
            }
        }
        Ok(images.into_iter().collect())
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        if ImageDir::Volumes.owns(at) {
            let dir = self.place_of(ImageDir::Volumes, at);
            return match self.state(ImageDir::Volumes, at)? {
                Some(ImageState::Whole) => Ok(MountSpec::Bind { dir, read_only: false }),
                _ => Err(no_image(at)),
            };
        }
        let mut dir = self.place_of(ImageDir::Snapshots, at);
        match self.find(at)? {
            Found::Plain(..) => {}
            Found::Group(group, _) => {
                self.make_view(&group, at)?;
                dir.push(group::VIEW);
            }
            Found::Damaged(reason) => return Err(self.damaged(at, reason)),
            Found::Nothing | Found::Partial | Found::Foreign => return Err(no_image(at)),
        }
        Ok(MountSpec::Bind { dir, read_only: true })
    }

    fn deactivate(&self, _: &Locator) -> Result<()> {
        Ok(())
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        let place = self.place_of(ImageDir::Snapshots, &snapshot.at);
        match self.whole(snapshot)? {
            Found::Plain(root, _) => fsnap_backend::read_all(root, &place, &[]),
            Found::Group(group, _) => {
                let mut damage = Vec::new();
                for number in 0..=group.parts.len() {
                    let prefix = group.path(number).context("find the parts of", &place)?;
                    let part = group.open_part(number).context("open a part of", &place)?;
                    damage.extend(fsnap_backend::read_all(part, &place, &prefix)?);
                }
                Ok(damage)
            }
            _ => Err(no_image(&snapshot.at)),
        }
    }

    fn beside(&self) -> Option<PathBuf> {
        Some(self.place.join(store::BESIDE))
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        let dir = [ImageDir::Snapshots, ImageDir::Volumes].into_iter().find(|dir| dir.owns(at));
        let dir = dir.ok_or_else(|| no_image(at))?;
        match self.state(dir, at)? {
            None => Ok(()),
            Some(ImageState::Foreign) => Err(no_image(at)),
            Some(ImageState::Whole | ImageState::Partial) => {
                self.check_unused(dir, at)?;
                self.remove(dir, at)
            }
        }
    }
}
