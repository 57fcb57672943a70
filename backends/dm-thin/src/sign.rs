//! What ties the data and the metadata of a pool to each other, and both to the store that brings the pool up.
//!
//! The kernel takes any data with any metadata that it is given. With the files of two pools exchanged, one pool's file system would be written
//! into the other's blocks. So a pool that fsnap made is signed twice:
//!
//! * its metadata by the transaction number, which the kernel keeps for whoever manages a pool, and which outlives
//!   `thin_repair`: the first 60 bits of the store's UUID;
//! * its data by a thin device of one block, below the numbers of images, that says in words which pool it is.
//!
//! A pool of an earlier fsnap is signed when it is up next, and has room.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use fsnap_backend::{Error, Identity, IoContext, Result};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::bring_up::{BLOCK, remove_own};
use crate::dm::{By, Mapper, Target};
use crate::pool::{Limits, Mode, Pool, ThinId};
use crate::store::Settings;
use crate::survey;

/// The thin device with the words: the last of the numbers that are left to others, who count from 0.
pub(crate) const ID: ThinId = ThinId(ThinId::FIRST - 1);

/// So much of a device is read and written at once.
const PAGE: usize = 4096;

/// What the words begin with; then the pool's name and its device-mapper UUID, a line each.
const WORDS: &str = "fsnap data of\n";

/// The last part of the name and UUID of the device through which the words are read and written.
const DEVICE: &str = "sign";

/// The same of the pool that is only there to be looked at.
const TRIAL: &str = "trial";

/// What of the kernel's `struct thin_disk_superblock` matters here; see dm-thin-metadata.c.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// The transaction number.
    number: u64,
    /// How many blocks of data there are.
    pub(crate) blocks: u64,
}

impl Superblock {
    /// Reads it; `None` if there are no metadata of a pool.
    pub(crate) fn read(path: &Path) -> io::Result<Option<Self>> {
        /// At the byte 32.
        const MAGIC: u64 = 27_022_010;
        let device = std::fs::metadata(path)?.file_type().is_block_device();
        // The pool writes past what the kernel keeps of the device in memory.
        let flags = if device { OFlags::DIRECT } else { OFlags::empty() };
        let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
        let mut memory = vec![0; 2 * PAGE];
        let aligned = memory.as_ptr().align_offset(PAGE);
        let page = &mut memory[aligned..aligned + PAGE];
        match file.read_exact_at(page, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let word = |at: usize| page[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        // The blocks are the first word of the root of the data's space map.
        Ok((word(32) == MAGIC).then(|| Self { number: word(48), blocks: word(64) }))
    }
}

/// The number that the metadata of a store's pool have.
fn number(settings: &Settings) -> Result<u64> {
    let number = settings.uuid.get(..15).and_then(|digits| u64::from_str_radix(digits, 16).ok());
    number.map(|number| number.max(1)).ok_or_else(|| Error::Damaged {
        what: format!("the settings of the store of the pool {}", settings.pool),
        reason: "its UUID is not of hexadecimal digits".to_owned(),
    })
}

/// What the signing device says.
fn words(settings: &Settings) -> String {
    format!("{WORDS}{}\n{}\n", settings.pool, settings.pool_uuid)
}

/// The pool of a store that lies beside the one at `place`, as most do.
fn other(place: &Path, is: impl Fn(&Settings) -> bool) -> Option<String> {
    survey::places(place.parent()?).ok()?.into_iter().find_map(|(other, known)| {
        let (of_other, _) = known.ok()?;
        let found = of_other.backing.is_some() && is(&of_other);
        found.then(|| format!("those of the pool {}, whose store is {}", of_other.pool, other.display()))
    })
}

fn wrong(settings: &Settings, place: &Path, what: &str, on: &Path, found: &str) -> Error {
    let pool = &settings.pool;
    let expected = format!("{what} of the pool {pool}, whose store is {}", place.display());
    Error::WrongIdentity {
        what: format!("{}, from which the pool {pool} is to be brought up,", on.display()),
        expected: Identity::new(expected),
        found: Identity::new(format!("{found}; put back what the pool was made on, and bring it up again")),
    }
}

/// Refuses metadata that are not of the store's pool.
pub(crate) fn check_metadata(settings: &Settings, place: &Path, on: &Path, found: &Superblock) -> Result<()> {
    let unsigned = !settings.signed && found.number == 0;
    if unsigned || found.number == number(settings)? {
        return Ok(());
    }
    let of_other = other(place, |other| number(other).is_ok_and(|number| number == found.number));
    let found = of_other.unwrap_or_else(|| match found.number {
        0 => "those of a pool that nobody signed".to_owned(),
        number => format!("those of another pool, which has the transaction number {number}"),
    });
    Err(wrong(settings, place, "the metadata", on, &found))
}

/// Refuses data that are not of the store's pool: brings it up for a moment, under a name that nobody looks for, and nothing
/// larger than it was.
///
/// `table` is that of the pool.
pub(crate) fn check_data(mapper: &Mapper, settings: &Settings, place: &Path, on: &Path, table: &Target) -> Result<()> {
    end_trial(mapper, settings)?;
    let uuid = own(settings, TRIAL);
    let trial = mapper.make(&name(settings, TRIAL), &uuid, std::slice::from_ref(table), false)?;
    let read = || {
        let pool = Pool { name: trial.name.clone(), uuid, number: trial.number };
        if pool.fill(mapper, false)?.mode == Mode::Fails {
            // Neither can anything be written to it.
            return Ok(None);
        }
        with_device(mapper, settings, &pool, true, read_words).map(Some)
    };
    let found = match read() {
        Err(error) => Err(error.and_undo(end_trial(mapper, settings))),
        found => end_trial(mapper, settings).and(found),
    }?;
    match found {
        None => Ok(()),
        Some(Some(found)) if found == words(settings) => Ok(()),
        Some(found) => {
            let found = found.unwrap_or_default();
            let of_other = other(place, |other| words(other) == found);
            let found = of_other.unwrap_or_else(|| match found.strip_prefix(WORDS) {
                Some(other) => format!("those of the pool {}", other.trim_end().replace('\n', ", ").escape_debug()),
                None => "what no pool of fsnap's has there".to_owned(),
            });
            Err(wrong(settings, place, "the data", on, &found))
        }
    }
}

/// Signs a pool that is up; false if that cannot be done now.
pub(crate) fn sign(mapper: &Mapper, settings: &Settings, pool: &Pool) -> Result<bool> {
    let fill = pool.fill(mapper, true)?;
    if fill.refusal(&Limits { free_data: 0, free_metadata: 0 }).is_some() || fill.data.0 == fill.data.1 {
        return Ok(false);
    }
    match pool.create(mapper, ID) {
        // A killed call got as far as that.
        Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
        made => made.context("make", format!("the signing device of {pool}"))?,
    }
    end_device(mapper, settings)?;
    let wanted = words(settings);
    let written = with_device(mapper, settings, pool, false, |file| match read_words(file)? {
        Some(found) => Ok(found == wanted),
        None => {
            let mut page = wanted.clone().into_bytes();
            page.resize(PAGE, 0);
            file.write_all_at(&page, 0)?;
            file.sync_all().map(|()| true)
        }
    })?;
    if !written {
        // Somebody else uses a device of that number.
        return Ok(false);
    }
    let number = number(settings)?;
    // A killed call may have got as far as that, too. Another number is somebody else's.
    Ok([0, number].iter().any(|old| pool.set_number(mapper, *old, number).is_ok()) && pool.check_commit(mapper).is_ok())
}

fn name(settings: &Settings, part: &str) -> String {
    format!("{}-{part}", settings.pool)
}

/// Names a device of that store's only.
fn own(settings: &Settings, part: &str) -> String {
    format!("FSNAP-{}-{part}", settings.uuid)
}

/// Removes what a killed call left, and everything at the end.
pub(crate) fn end_trial(mapper: &Mapper, settings: &Settings) -> Result<()> {
    end_device(mapper, settings)?;
    remove_own(mapper, &own(settings, TRIAL))
}

fn end_device(mapper: &Mapper, settings: &Settings) -> Result<()> {
    remove_own(mapper, &own(settings, DEVICE))
}

/// Does something with the signing device of a pool, if the pool has it.
fn with_device<T: Default>(
    mapper: &Mapper,
    settings: &Settings,
    pool: &Pool,
    read_only: bool,
    act: impl FnOnce(&File) -> io::Result<T>,
) -> Result<T> {
    let (name, table) = (name(settings, DEVICE), pool.table(ID, BLOCK));
    mapper.create(&name, &own(settings, DEVICE)).context("make", By::Name(&name).to_string())?;
    let acted = || match mapper.load(&name, &[table], read_only) {
        Err(error) if error.raw_os_error() == Some(Errno::NODATA.raw_os_error()) => Ok(T::default()),
        loaded => {
            let node = loaded.and_then(|()| mapper.start(&name)).map(|device| device.number.node());
            let node = node.context("start", By::Name(&name).to_string())?;
            let file = OpenOptions::new().read(true).write(!read_only).open(&node).context("open", &node)?;
            act(&file).context("read or write", &node)
        }
    };
    match acted() {
        Err(error) => Err(error.and_undo(end_device(mapper, settings))),
        done => end_device(mapper, settings).and(done),
    }
}

/// The words that are there; `None` if nothing was ever written.
fn read_words(file: &File) -> io::Result<Option<String>> {
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0)?;
    let text = page.split(|byte| *byte == 0).next().unwrap_or_default();
    let nothing = page.iter().all(|byte| *byte == 0);
    Ok((!nothing).then(|| String::from_utf8_lossy(text).into_owned()))
}
