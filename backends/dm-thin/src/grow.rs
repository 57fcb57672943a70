//! Enlarging a pool that fsnap made, while it is in use.
//!
//! The kernel takes up what has been added when the pool gets a table of that length; what uses the pool waits for that moment. What
//! was asked for is durable before, in the length of the files, or in the store's settings for a device. So a call that was
//! killed is completed when the pool is brought up next, or by the same call again.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use fsnap_backend::{Error, IoContext, Result, beneath};

use crate::KIND;
use crate::bring_up::{self, BLOCK, Backing, SECTOR};
use crate::dm::{By, Number, Target};
use crate::pool::{Limits, Refusal};
use crate::record::Lock;
use crate::store::{self, FILE, Store, VOLUMES};

/// The bytes of a block of metadata.
const METADATA_BLOCK: u64 = 4096;

/// The kernel uses a little more, and no pool needs it.
const MOST_METADATA: u64 = 15 << 30;

const SMALLER: &str = "make a pool smaller";
const ENLARGE: &str = "enlarge a pool";

impl Store {
    /// Enlarges the pool's room for data to so many bytes, and the room for metadata; without `data`, to what there is now of what the
    /// pool stands on. The metadata of files grow with the data, or to `metadata` bytes.
    ///
    /// Succeeds if the pool is as large as that. Fails with [`ErrorKind::Unsupported`](fsnap_backend::ErrorKind::Unsupported) if it is
    /// larger, if fsnap did not make it, and if there is nothing to be added; with
    /// [`ErrorKind::Damaged`](fsnap_backend::ErrorKind::Damaged) if the kernel cannot write the pool's metadata. What cannot be added is
    /// given back.
    pub fn grow_pool(&mut self, data: Option<u64>, metadata: Option<u64>) -> Result<()> {
        self.check_made_here(ENLARGE)?;
        // Whoever brings the pool up holds it as well.
        let lock = beneath::open_dir(&self.root, OsStr::new(VOLUMES)).context("open", self.place.join(VOLUMES))?;
        let _lock = Lock::take(lock.into()).context("lock", &self.place)?;
        // As another call has left them meanwhile.
        if let Some(read) = store::read(&self.root).context("read the settings of", &self.place)? {
            self.settings.backing = read.backing;
        }
        let backing = self.check_made_here(ENLARGE)?.clone();
        let fill = self.fill()?;
        if let Some(broken @ Refusal::Broken(_)) = fill.refusal(&Limits { free_data: 0, free_metadata: 0 }) {
            return Err(self.pool.refused(broken));
        }
        let before = (fill.data.1 * BLOCK * SECTOR, fill.metadata.1 * METADATA_BLOCK);
        let data = data.map(|bytes| bytes.next_multiple_of(BLOCK * SECTOR));
        let metadata = metadata.map(|bytes| bytes.next_multiple_of(METADATA_BLOCK));
        for (asked, has, what) in [(data, before.0, "data"), (metadata, before.1, "metadata")] {
            if asked.is_some_and(|asked| asked < has) {
                let reason = format!("{} has {} MiB of {what}", self.pool, has >> 20);
                return Err(Error::Unsupported { kind: KIND, action: SMALLER, reason });
            }
        }
        match backing {
            Backing::Files { data: data_file, metadata: metadata_file } => {
                if metadata.is_some_and(|bytes| bytes > MOST_METADATA) {
                    return Err(self.no_room("no pool can use more than 15 GiB of metadata".to_owned()));
                }
                let metadata = metadata.or_else(|| Some(before.1.max(bring_up::metadata_for(data?))));
                self.grow_files([(&metadata_file, metadata), (&data_file, data)], before)
            }
            Backing::Device { device, metadata: begin, data: recorded } => {
                if metadata.is_some_and(|bytes| bytes > before.1) {
                    let why = "they are the first part of a device, and end where its data begin";
                    return Err(self.no_room(format!("the metadata cannot be enlarged, for {why}")));
                }
                self.grow_device(&device, begin, (data.map(|bytes| bytes / SECTOR), recorded), before.0)
            }
        }
    }

    fn no_room(&self, reason: String) -> Error {
        Error::Unsupported { kind: KIND, action: ENLARGE, reason }
    }

    /// Enlarges the files of the metadata and of the data, each to so many bytes, and lets the pool take that up.
    ///
    /// The metadata first: they have to tell of the data.
    fn grow_files(&self, files: [(&Path, Option<u64>); 2], before: (u64, u64)) -> Result<()> {
        let [metadata_on, data_on] = self.stands_on()?;
        let [(metadata, metadata_wanted), (data, data_wanted)] = files;
        let parts = [(metadata, metadata_on, metadata_wanted, before.1), (data, data_on, data_wanted, before.0)];
        let mut lengths = Vec::new();
        for (file, on, wanted, has) in parts {
            let length = extend(file, wanted)?;
            let taken = use_all_of(on, file).and_then(|()| {
                lengths.push(length);
                let data = if lengths.len() == 2 { length } else { before.0 };
                self.take_up([metadata_on, data_on], data / SECTOR, lengths[0])
            });
            // The pool would not come up again on what it could not take up.
            taken.map_err(|error| error.and_undo(self.give_back(file, on, wanted, has)))?;
        }
        if metadata_wanted.is_none() && data_wanted.is_none() && (lengths[1], lengths[0]) == before {
            let why = format!("{} has become no larger; say how large it is to be, with --size", data.display());
            return Err(self.no_room(why));
        }
        Ok(())
    }

    /// Shortens a file to what it had, unless the pool has more.
    fn give_back(&self, file: &Path, on: Number, wanted: Option<u64>, had: u64) -> Result<()> {
        let fill = self.fill()?;
        let [metadata, _] = self.stands_on()?;
        let has = if on == metadata { fill.metadata.1 * METADATA_BLOCK } else { fill.data.1 * BLOCK * SECTOR };
        if wanted.is_none() || has != had {
            return Ok(());
        }
        let opened = OpenOptions::new().write(true).open(file);
        opened.and_then(|file| file.set_len(had).and_then(|()| file.sync_all())).context("shorten", file)?;
        use_all_of(on, file)
    }

    /// Enlarges the part of a device that holds the data, and lets the pool take that up.
    ///
    /// `begin` is where it begins, in sectors; then how long it is to be, and how long it was to be before.
    fn grow_device(&mut self, device: &Path, begin: u64, data: (Option<u64>, Option<u64>), before: u64) -> Result<()> {
        let (wanted, recorded) = data;
        let all = bring_up::length_of(device)?.saturating_sub(begin);
        let length = wanted.unwrap_or(all);
        let length = length / BLOCK * BLOCK;
        if length > all {
            let has = format!("{} has room for {} MiB of data", device.display(), (all * SECTOR) >> 20);
            return Err(self.no_room(format!("{has}: enlarge it first")));
        }
        if length * SECTOR <= before {
            if wanted.is_some() {
                return Ok(());
            }
            return Err(self.no_room(format!("{} has become no larger: enlarge it first", device.display())));
        }
        let [metadata_on, data_on] = self.stands_on()?;
        self.record_length(wanted)?;
        let part = |length| {
            let on = Number::of(rdev(device)?);
            let name = format!("{}-data", self.pool.name);
            let target = Target { length, kind: "linear".into(), text: format!("{on} {begin}") };
            let loaded = self.mapper.load(&name, &[target], false).and_then(|()| self.mapper.start(&name));
            loaded.map(drop).context("enlarge", By::Name(&name).to_string())
        };
        let bytes = self.fill()?.metadata.1 * METADATA_BLOCK;
        let taken = part(length).and_then(|()| self.take_up([metadata_on, data_on], length, bytes));
        let Err(error) = taken else { return Ok(()) };
        let undone = part(before / SECTOR).and_then(|()| self.record_length(recorded.or(Some(before / SECTOR))));
        Err(error.and_undo(undone))
    }

    /// Remembers how many sectors of a device hold the data; all that are left, if none are given.
    fn record_length(&mut self, sectors: Option<u64>) -> Result<()> {
        if let Some(Backing::Device { data, .. }) = &mut self.settings.backing {
            *data = sectors;
        }
        store::write(&self.root, &self.settings).context("write", self.place.join(FILE))
    }

    /// The devices of the pool's metadata and of its data.
    fn stands_on(&self) -> Result<[Number; 2]> {
        let table = self.mapper.table(&self.pool.name)?.map(|(_, table)| table).unwrap_or_default();
        let mut words = table.first().map(|target| target.text.as_str()).unwrap_or_default().split(' ');
        let mut number = || words.next().and_then(Number::parse);
        number().zip(number()).map(|(metadata, data)| [metadata, data]).ok_or_else(|| Error::Damaged {
            what: self.pool.to_string(),
            reason: "its table cannot be understood".to_owned(),
        })
    }

    /// Gives the pool a table for so many sectors of data, and makes sure that it uses them, and so many bytes of metadata.
    fn take_up(&self, on: [Number; 2], sectors: u64, metadata: u64) -> Result<()> {
        let name = &self.pool.name;
        let before = self.fill()?.data.1;
        let give = |blocks| {
            let table = bring_up::pool_table(on[0], on[1], blocks);
            let given = self.mapper.load(name, &[table], false).and_then(|()| self.mapper.start(name));
            given.map(drop).context("enlarge", self.pool.to_string())
        };
        give(sectors / BLOCK).map_err(|error| error.and_undo(give(before)))?;
        let fill = self.fill()?;
        let has = (fill.data.1, fill.metadata.1);
        let wanted = (sectors / BLOCK, metadata / METADATA_BLOCK);
        if has.0 >= wanted.0 && has.1 >= wanted.1 {
            return Ok(());
        }
        let reason = format!(
            "the kernel gives it {} blocks of data and {} of metadata, where there are {} and {}",
            has.0, has.1, wanted.0, wanted.1
        );
        Err(Error::Damaged { what: self.pool.to_string(), reason })
    }
}

/// Makes a file so many bytes long, if it is shorter, and tells how long it is.
fn extend(path: &Path, bytes: Option<u64>) -> Result<u64> {
    let extend = || {
        let file = OpenOptions::new().write(true).open(path)?;
        let length = file.metadata()?.len();
        let Some(bytes) = bytes.filter(|bytes| *bytes > length) else { return Ok(length) };
        file.set_len(bytes)?;
        file.sync_all().map(|()| bytes)
    };
    extend().context("enlarge", path)
}

/// Lets the loop device have the length of its file.
fn use_all_of(on: Number, file: &Path) -> Result<()> {
    let said = format!("/sys/dev/block/{on}/loop/backing_file");
    let under = fs::read_to_string(&said).context("read", &said)?;
    if Path::new(under.trim_end_matches('\n')) != file {
        let moved = format!("the pool is up on {}, and not on that", under.trim_end().escape_debug());
        return Err(io::Error::other(moved)).context("enlarge", file);
    }
    let node = on.node_of_any()?;
    bring_up::losetup(&[OsStr::new("--set-capacity"), node.as_os_str()]).map(drop)
}

fn rdev(device: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(File::open(device).and_then(|file| file.metadata()).context("look at", device)?.rdev())
}
