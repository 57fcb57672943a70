//! The backend: images are sealed states of copy-on-write trees.
//!
//! ```text
//! <place>/identity       what the store is
//! <place>/images/<at>    one image: the number of its layer, the identity of the tree's own store, and where that is
//! <place>/images/.<at>   the same of one that is being taken, with no number yet
//! ```
//!
//! The layers themselves stay with the tree that they were written in, in its own store, which notes in `holds` who needs them:
//! a tree that is given up is removed with its last image. A place may be the store of such a tree itself.
//!
//! A snapshot is asked of the server of the tree, through the tree: setting the attribute [`SEAL`] on its root seals the layer and
//! names the image that it is for. Then the image is recorded, by one rename, and is whole. A call that is killed in between
//! leaves a note of the tree that was asked, by which a deletion finds what the tree holds for it. Reading an image takes no server.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{ErrorKind as IoKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsnap_backend::{
    Backend, Capabilities, Consistency, Damage, Error, Identity, Image, ImageKind, ImageState, IoContext, Locator,
    MountSpec, Result, Snapshot, Source, StoreInfo, Volume, beneath,
};
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::deeper::deeper;
use super::origin::{self, Origins};
use super::shared::{self, State};
use super::store::Purpose;
use super::{Overlay, object, seal, store, verify};

/// The backend's name.
pub const KIND: &str = "layers";
/// The attribute of a tree's root that says where its store is.
pub const STORE: &str = "fsnap.store";
/// The attribute of a tree's root by which its layer is sealed; the value names the image.
pub const SEAL: &str = "fsnap.seal";

/// The attribute of a tree's root by whose setting layers are merged that no image needs.
pub const MERGE: &str = "fsnap.merge";

const IMAGES: &str = "images";
const IDENTITY: &str = "identity";
const HOLDS: &str = "holds";
const ABANDONED: &str = "abandoned";
/// Stands for the number of a layer that is not sealed yet.
const NONE: &str = "-";

/// A store of images.
#[derive(Debug)]
pub struct Store {
    place: PathBuf,
    info: StoreInfo,
    origins: Origins,
}

/// What an image's file says.
struct Record {
    /// `None` of one that is being taken.
    layer: Option<u64>,
    /// Of the tree's own store.
    identity: String,
    tree: PathBuf,
}

impl Store {
    /// Tells whether the directory can be a volume, and where its images are noted: with its layers.
    pub fn probe(dir: &Path) -> Result<PathBuf> {
        let root = beneath::open_volume(dir, KIND)?;
        tree_of(&root, dir)
    }

    /// Makes a store at `place`, or opens the one that is there.
    pub fn create(place: &Path) -> Result<Self> {
        let refused = |reason: &str| Error::NotAStore { dir: place.into(), kind: KIND, reason: reason.into() };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(place).context("make the directory", place)?;
        let names: Vec<_> = fs::read_dir(place)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>())
            .context("list", place)?;
        let has = |name: &str| names.iter().any(|found| found == name);
        if !names.is_empty() && !has(IDENTITY) && !has("version") && !has(IMAGES) {
            return Err(refused("it has other things in it; name another directory"));
        }
        let images = place.join(IMAGES);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&images).context("make the directory", &images)?;
        if !has(IDENTITY) {
            let random = store::random().map_err(std::io::Error::from).context("make up a name for", place)?;
            write_whole(place, IDENTITY, format!("{random}\n").as_bytes())?;
        }
        beneath::open_root(place).and_then(|dir| Ok(rustix::fs::fsync(dir)?)).context("sync", place)?;
        Self::open(place)
    }

    /// Opens the store at `place`; changes nothing.
    pub fn open(place: &Path) -> Result<Self> {
        Self::open_with(place, origin::DIRS)
    }

    /// The same; what trees began with is opened by `origins`.
    pub fn open_with(place: &Path, origins: Origins) -> Result<Self> {
        let identity = fs::read_to_string(place.join(IDENTITY));
        let identity = match identity {
            Err(error) if error.kind() == IoKind::NotFound => {
                return Err(Error::NotFound { what: format!("the {KIND} store at {}", place.display()) });
            }
            identity => identity.context("read the identity of", place)?,
        };
        let ownership = rustix::process::geteuid().is_root();
        let capabilities = Capabilities {
            clones: false,
            constant_time_clones: false,
            xattrs: true,
            acls: true,
            ownership,
            mountable: false,
            verifies_contents: false,
            live: Consistency::Fuzzy,
        };
        let identity = Identity::new(format!("{KIND}:{}", identity.trim()));
        let info = StoreInfo { kind: KIND, identity, capabilities };
        Ok(Self { place: place.to_owned(), info, origins })
    }

    fn images(&self) -> PathBuf {
        self.place.join(IMAGES)
    }

    /// What is known of a whole image, with the number of its layer.
    fn record(&self, at: &Locator) -> Result<(Record, u64)> {
        let record = self.note(at, at.as_str())?;
        let damaged = || Error::Damaged { what: format!("the image {at}"), reason: "its record has no layer".into() };
        let layer = record.layer.ok_or_else(damaged)?;
        Ok((record, layer))
    }

    fn note(&self, at: &Locator, name: &str) -> Result<Record> {
        let no_image = || Error::NotFound { what: format!("the image {at}") };
        if !is_ours(at) {
            return Err(no_image());
        }
        let path = self.images().join(name);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == IoKind::NotFound => return Err(no_image()),
            text => text.context("read", &path)?,
        };
        let damaged = || Error::Damaged { what: format!("the image {at}"), reason: "its record cannot be read".into() };
        let mut lines = text.splitn(3, |&byte| byte == b'\n');
        let mut text_line = || std::str::from_utf8(lines.next()?).ok().map(str::to_owned);
        let layer = text_line().and_then(|line| if line == NONE { Some(None) } else { line.parse().ok().map(Some) });
        let identity = text_line();
        let tree = lines.next().map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())));
        match (layer, identity, tree) {
            (Some(layer), Some(identity), Some(tree)) => Ok(Record { layer, identity, tree }),
            _ => Err(damaged()),
        }
    }

    fn snapshot_of(&self, at: &Locator, (record, layer): &(Record, u64)) -> Snapshot {
        let identity = Identity::new(format!("{KIND}:{}:{layer}", record.identity));
        Snapshot { at: at.clone(), identity, omissions: Vec::new() }
    }

    /// By which name a tree knows that an image needs its layers.
    fn hold(&self, at: &Locator) -> String {
        format!("{}.{at}", self.info.identity.as_str().rsplit(':').next().unwrap_or_default())
    }

    fn open_image(&self, at: &Locator) -> Result<std::sync::Arc<dyn fsnap_backend::Dir>> {
        let (record, layer) = self.record(at)?;
        let found = identity_of(&record.tree)?;
        if found != record.identity {
            let (expected, found) = (Identity::new(record.identity), Identity::new(found));
            return Err(Error::WrongIdentity { what: format!("the store {}", record.tree.display()), expected, found });
        }
        let Record { tree, identity, .. } = record;
        shared::state(State { tree: tree.clone(), identity, layer }, || {
            // What it lies over may be opened by this way, too.
            let opened = deeper(|| {
                let below = (self.origins.open)(&origin::read(&tree)?)?;
                Overlay::sealed(below, &tree, layer).map_err(|error| of_the_layers(&tree, error))
            });
            opened.context("open", &tree)?
        })
    }
}

/// Why the layers of a tree could not be opened; the system's answer stays one.
fn of_the_layers(tree: &Path, error: store::Error) -> Error {
    match error {
        store::Error::Io { action, object, source } => {
            Error::Io { action, object: object.display().to_string(), source }
        }
        error => Error::Io {
            action: "open the layers of",
            object: tree.display().to_string(),
            source: std::io::Error::other(error.to_string()),
        },
    }
}

impl Store {
    /// Has the tree hold what is going to be sealed for the image, when it is noted that it does.
    fn begin(&self, at: &Locator, tree: &Path, identity: &str) -> Result<String> {
        let record = Record { layer: None, identity: identity.to_owned(), tree: tree.to_owned() };
        write_whole(&self.images(), &taken_as(at), &record.text())?;
        let (image, holds) = (self.hold(at), tree.join(HOLDS));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&holds).context("make the directory", &holds)?;
        fs::write(holds.join(&image), "").context("write in", &holds)?;
        Ok(image)
    }

    /// Gives back the room of a layer that was needed until now. Where a server has the tree, he does it; what is not done now is done when the tree is
    /// opened next.
    fn merge_at_rest(&self, tree: &Path) {
        let Ok(origin) = origin::read(tree) else { return };
        if let Ok(below) = (self.origins.open)(&origin)
            && let Ok(overlay) = Overlay::open_for(below, tree, Purpose::Merge, Duration::ZERO)
        {
            let _ = overlay.merge(|| ((), Vec::new()));
        }
        (self.origins.let_go)(&origin);
    }
}

impl Backend for Store {
    fn store(&self) -> &StoreInfo {
        &self.info
    }

    fn adopt(&self, dir: &Path) -> Result<Volume> {
        let root = beneath::open_volume(dir, KIND)?;
        let tree = tree_of(&root, dir)?;
        Ok(Volume::new(dir, Identity::new(format!("{KIND}:{}", identity_of(&tree)?)), root))
    }

    fn reserve(&self, _: Source<'_>, known: &BTreeSet<Locator>) -> Result<Locator> {
        loop {
            let random = store::random().map_err(std::io::Error::from).context("make up a name in", &self.place)?;
            let at: Locator = format!("s-{}", &random[..16]).parse().expect("a letter, a dash and digits");
            if !known.contains(&at) {
                return Ok(at);
            }
        }
    }

    fn prime(&self, volume: &Volume, _: &Locator) -> Result<()> {
        let tree = tree_of(volume.as_fd(), volume.dir())?;
        // Before anybody stands still for it. What cannot be merged now takes no room from this snapshot.
        let _ = rustix::fs::setxattr(magic(volume.as_fd()), MERGE, b"", XattrFlags::empty());
        let opened = beneath::open_root(&tree).context("open", &tree)?;
        rustix::fs::syncfs(opened).map_err(std::io::Error::from).context("sync", &tree)
    }

    fn snapshot(&self, volume: &Volume, at: &Locator) -> Result<Snapshot> {
        match self.record(at) {
            Ok(record) => return Ok(self.snapshot_of(at, &record)),
            Err(Error::NotFound { .. }) if is_ours(at) => {}
            Err(error) => return Err(error),
        }
        let now = self.adopt(volume.dir())?;
        if now.identity() != volume.identity() {
            return Err(Error::WrongIdentity {
                what: format!("the volume at {}", volume.dir().display()),
                expected: volume.identity().clone(),
                found: now.identity().clone(),
            });
        }
        let tree = tree_of(volume.as_fd(), volume.dir())?;
        let identity = identity_of(&tree)?;
        let image = self.begin(at, &tree, &identity)?;
        match rustix::fs::setxattr(magic(volume.as_fd()), SEAL, image.as_bytes(), XattrFlags::empty()) {
            Err(Errno::MLINK) => {
                let reason = format!(
                    "it has {} layers, and checkpoints need them all, or somebody reads them: remove old checkpoints, or make \
                     a branch of the last one and go on there",
                    seal::MOST_LAYERS
                );
                return Err(Error::Unsupported { kind: KIND, action: "seal another layer", reason });
            }
            sealed => sealed.map_err(std::io::Error::from).context("seal the layer of", volume.dir())?,
        }
        let opened = beneath::open_root(&tree).context("open", &tree)?;
        let layer = seal::layer_of(&opened, &image).map_err(std::io::Error::from).context("read", &tree)?;
        let layer = layer.ok_or_else(|| Error::NotFound { what: format!("the layer that was sealed for {at}") })?;
        let record = Record { layer: Some(layer), identity, tree };
        write_whole(&self.images(), at.as_str(), &record.text())?;
        remove_file(&self.images().join(taken_as(at)))?;
        Ok(self.snapshot_of(at, &(record, layer)))
    }

    fn settle(&self, at: &Locator) -> Result<Snapshot> {
        let found = self.record(at)?;
        for dir in [&found.0.tree, &self.images()] {
            let opened = beneath::open_root(dir).context("open", dir)?;
            rustix::fs::syncfs(opened).map_err(std::io::Error::from).context("sync", dir)?;
        }
        Ok(self.snapshot_of(at, &found))
    }

    fn clone_snapshot(&self, _: &Snapshot, _: &Locator) -> Result<()> {
        let reason = "its branches are written through `fsnap mount`: `mkdir branches/NAME@CKPT` there".to_owned();
        Err(Error::Unsupported { kind: KIND, action: "clone a snapshot", reason })
    }

    fn list(&self) -> Result<Vec<Image>> {
        let images = self.images();
        let mut found = Vec::new();
        for entry in fs::read_dir(&images).context("list", &images)? {
            let name = entry.context("list", &images)?.file_name();
            let Some(name) = name.to_str() else { continue };
            let begun = name.strip_prefix('.').filter(|name| !images.join(name).exists());
            let Ok(at) = begun.unwrap_or(name).parse::<Locator>() else { continue };
            let state = match is_ours(&at) {
                // What was being written has a dot before its name.
                false if begun.is_some() => continue,
                false => ImageState::Foreign,
                true if self.record(&at).is_ok() => ImageState::Whole,
                true => ImageState::Partial,
            };
            found.push(Image { at, kind: ImageKind::Snapshot, state });
        }
        Ok(found)
    }

    fn activate(&self, at: &Locator) -> Result<MountSpec> {
        Ok(MountSpec::Tree(self.open_image(at)?))
    }

    fn deactivate(&self, at: &Locator) -> Result<()> {
        if !is_ours(at) {
            return Err(Error::NotFound { what: format!("the image {at}") });
        }
        // Nothing is held for an active image but what its tree began with.
        if let Ok(origin) = self.record(at).and_then(|(record, _)| origin::read(&record.tree)) {
            (self.origins.let_go)(&origin);
        }
        Ok(())
    }

    fn verify(&self, snapshot: &Snapshot) -> Result<Vec<Damage>> {
        let damage = self.open_image(&snapshot.at).and_then(|opened| verify::verify(opened.as_ref()));
        self.deactivate(&snapshot.at)?;
        damage
    }

    fn delete(&self, at: &Locator) -> Result<()> {
        if !is_ours(at) {
            return Err(Error::NotFound { what: format!("the image {at}") });
        }
        let (whole, begun) = (at.as_str().to_owned(), taken_as(at));
        let mut tree = None;
        for name in [&whole, &begun] {
            match self.note(at, name) {
                Err(Error::NotFound { .. } | Error::Damaged { .. }) => {}
                record => tree = Some(record?.tree),
            }
        }
        // The note goes last: who is killed before finds the tree by it.
        let rests = tree.map_or(Ok(None), |tree| Ok(release(&tree, &self.hold(at))?.then_some(tree)))?;
        for name in [whole, begun] {
            remove_file(&self.images().join(unfinished(&name)))?;
            remove_file(&self.images().join(name))?;
        }
        if let Some(tree) = rests {
            self.merge_at_rest(&tree);
        }
        Ok(())
    }
}

impl Record {
    fn text(&self) -> Vec<u8> {
        let layer = self.layer.map_or(NONE.to_owned(), |layer| layer.to_string());
        let mut text = format!("{layer}\n{}\n", self.identity).into_bytes();
        text.extend_from_slice(self.tree.as_os_str().as_bytes());
        text
    }
}

/// The name of the note on an image that is being taken.
fn taken_as(at: &Locator) -> String {
    format!(".{at}")
}

/// Makes the directory for a tree that is to have this identity as a volume, unless it is there.
pub fn prepare(tree: &Path, identity: &Identity) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(tree) {
        Err(error) if error.kind() == IoKind::AlreadyExists => {}
        made => made.context("make the directory", tree)?,
    }
    if tree.join(IDENTITY).exists() {
        return Ok(());
    }
    let text =
        identity.as_str().strip_prefix(KIND).and_then(|text| text.strip_prefix(':')).unwrap_or(identity.as_str());
    let path = tree.join(IDENTITY);
    let written = fs::File::create(&path).and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()));
    written.context("write", &path)
}

/// Gives up a tree. `false` if no image needs its layers: then the caller may remove it; else it goes with the last image.
pub fn abandon(tree: &Path) -> Result<bool> {
    let held = is_held(tree)?;
    if held {
        write_whole(tree, ABANDONED, b"")?;
    }
    Ok(held)
}

/// Whether images need the layers of a tree.
fn is_held(tree: &Path) -> Result<bool> {
    match fs::read_dir(tree.join(HOLDS)) {
        Err(error) if error.kind() == IoKind::NotFound => Ok(false),
        entries => Ok(entries.context("list", tree)?.next().is_some()),
    }
}

/// An image does not need the layers of a tree any more. Tells whether there still is a tree.
fn release(tree: &Path, hold: &str) -> Result<bool> {
    remove_file(&tree.join(HOLDS).join(hold))?;
    if tree.join(ABANDONED).exists() && !is_held(tree)? {
        remove_dir(tree)?;
        return Ok(false);
    }
    Ok(tree.exists())
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if matches!(error.kind(), IoKind::NotFound | IoKind::NotADirectory) => Ok(()),
        removed => removed.context("remove", path),
    }
}

fn remove_dir(dir: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(()) };
    let opened = beneath::open_root(parent).context("open", parent)?;
    beneath::remove_tree(&opened, name).context("remove", dir)?;
    // The last volume of a branch takes the branch's directory with it.
    let _ = fs::remove_dir(parent);
    Ok(())
}

fn is_ours(at: &Locator) -> bool {
    let digits = at.as_str().strip_prefix("s-");
    digits.is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn unfinished(name: &str) -> String {
    format!(".{name}.new")
}

/// Writes a small file as a whole. Not synced.
fn write_whole(dir: &Path, name: &str, content: &[u8]) -> Result<()> {
    let temporary = dir.join(unfinished(name));
    let written = fs::File::create(&temporary).and_then(|mut file| file.write_all(content));
    written.context("write", &temporary)?;
    fs::rename(&temporary, dir.join(name)).context("rename", &temporary)
}

/// A path that leads to an open file, for calls that take no descriptor of a handle.
fn magic(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Where the store of the tree is whose root this is.
fn tree_of(root: impl AsFd, dir: &Path) -> Result<PathBuf> {
    let refused = |reason: &str| Error::NotAVolume { dir: dir.to_owned(), kind: KIND, reason: reason.to_owned() };
    let not_served = || refused("it is not the root of a tree that `fsnap overlay` or `fsnap mount` serves");
    let mut buffer = vec![0; 4096];
    let length = match rustix::fs::getxattr(magic(root.as_fd()), STORE, &mut buffer) {
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::ACCESS) => return Err(not_served()),
        length => length.map_err(std::io::Error::from).context("examine", dir)?,
    };
    let tree = PathBuf::from(OsStr::from_bytes(&buffer[..length]));
    // Whoever serves a tree could name any directory: it must be his own.
    use std::os::unix::fs::MetadataExt;
    let owner = fs::metadata(&tree).context("examine", &tree)?.uid();
    let server = object::server_of(root.as_fd()).context("examine", dir)?;
    if !tree.is_absolute() || server != Some(owner) {
        return Err(refused("it names a store that is not its server's own"));
    }
    Ok(tree)
}

fn identity_of(tree: &Path) -> Result<String> {
    let path = tree.join(IDENTITY);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == IoKind::NotFound => {
            Err(Error::NotFound { what: format!("the store {}", tree.display()) })
        }
        text => Ok(text.context("read", &path)?.trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever a call that was killed has left, a deletion finds it by the image's place alone.
    #[test]
    fn what_a_killed_snapshot_or_deletion_left_is_found() {
        let base = tempfile::tempdir().unwrap();
        let (place, tree) = (base.path().join("images"), base.path().join("tree"));
        fs::create_dir(&tree).unwrap();
        let store = Store::create(&place).unwrap();
        let held = || fs::read_dir(tree.join(HOLDS)).map_or(0, Iterator::count);
        let kept = || fs::read_dir(store.images()).unwrap().count();
        let at: Locator = "s-0123456789abcdef".parse().unwrap();
        let record = |layer| Record { layer, identity: "some".into(), tree: tree.clone() }.text();
        type Left<'a> = &'a dyn Fn();
        let begun = || drop(store.begin(&at, &tree, "some").unwrap());
        let states: [Left<'_>; 4] = [
            &|| write_whole(&store.images(), &taken_as(&at), &record(None)).unwrap(),
            &begun,
            // Recorded, with the note still there.
            &|| {
                begun();
                write_whole(&store.images(), at.as_str(), &record(Some(0))).unwrap();
            },
            // A deletion has taken the hold away, and not the record.
            &|| {
                write_whole(&store.images(), at.as_str(), &record(Some(0))).unwrap();
            },
        ];
        for (number, left) in states.iter().enumerate() {
            left();
            let listed = store.list().unwrap();
            let expected = if number < 2 { ImageState::Partial } else { ImageState::Whole };
            assert_eq!(listed.iter().map(|image| image.state).collect::<Vec<_>>(), [expected], "{number}");
            store.delete(&at).unwrap();
            assert_eq!((held(), kept()), (0, 0), "{number}");
        }
    }
}
