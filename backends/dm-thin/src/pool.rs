//! A thin pool: what is in it, what room it has, and the messages that it takes.

use std::fmt;
use std::io;

use devicemapper::{ThinPoolNoSpacePolicy, ThinPoolStatus, ThinPoolStatusSummary};
use fsnap_backend::{Error, IoContext, Result};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::dm::{Device, Mapper, Number, Target};

/// The number of a thin device in its pool: of 24 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ThinId(pub(crate) u32);

impl ThinId {
    /// fsnap takes its numbers from the upper half: others count from 0.
    pub(crate) const FIRST: u32 = 1 << 23;
    /// One more than the largest.
    pub(crate) const END: u32 = 1 << 24;
}

impl fmt::Display for ThinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How much must be free before an image is made, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Of the pool's data space.
    pub free_data: u8,
    /// Of the pool's metadata space.
    pub free_metadata: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self { free_data: 5, free_metadata: 10 }
    }
}

/// What a pool is able to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    Works,
    /// It has no room for data: writes fail or wait.
    OutOfData,
    /// Its metadata cannot be written.
    ReadOnly,
    /// It fails altogether.
    Fails,
}

/// How full a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Blocks of data that are in use, and all there are.
    pub data: (u64, u64),
    /// Blocks of metadata that are in use, and all there are.
    pub metadata: (u64, u64),
    /// What it is able to do.
    pub mode: Mode,
    /// The kernel wants its metadata checked before it writes them again.
    pub needs_check: bool,
    /// Without room, writes wait instead of failing.
    pub waits_for_room: bool,
}

impl Fill {
    const FAILED: Self =
        Self { data: (0, 0), metadata: (0, 0), mode: Mode::Fails, needs_check: false, waits_for_room: false };

    fn parse(line: &str) -> Option<Self> {
        let working = match line.parse().ok()? {
            ThinPoolStatus::Working(working) => working,
            ThinPoolStatus::Error | ThinPoolStatus::Fail => return Some(Self::FAILED),
        };
        let usage = working.usage;
        Some(Self {
            data: (*usage.used_data, *usage.total_data),
            metadata: (*usage.used_meta, *usage.total_meta),
            mode: match working.summary {
                ThinPoolStatusSummary::Good => Mode::Works,
                ThinPoolStatusSummary::OutOfSpace => Mode::OutOfData,
                ThinPoolStatusSummary::ReadOnly => Mode::ReadOnly,
            },
            needs_check: working.needs_check,
            waits_for_room: working.no_space_policy == ThinPoolNoSpacePolicy::Queue,
        })
    }

    /// Of the data space, in percent, rounded down.
    pub fn free_data(&self) -> u64 {
        free_percent(self.data)
    }

    /// Of the metadata space, in percent, rounded down.
    pub fn free_metadata(&self) -> u64 {
        free_percent(self.metadata)
    }

    /// Why no image can be made in the pool, if none can.
    pub fn refusal(&self, limits: &Limits) -> Option<Refusal> {
        let short = |what, free: u64, least: u8| {
            (free < u64::from(least)).then(|| {
                let how = "remove checkpoints, enlarge it (`fsnap pool grow`, if fsnap made it), or set another limit by \
                           `[dm-thin]` in the settings";
                Refusal::NoRoom(format!("{free} % of its {what} space is free, less than {least} %: {how}"))
            })
        };
        if self.needs_check {
            return Some(Refusal::Broken(CHECK));
        }
        match self.mode {
            Mode::Works => short("metadata", self.free_metadata(), limits.free_metadata)
                .or_else(|| short("data", self.free_data(), limits.free_data)),
            Mode::OutOfData => Some(Refusal::NoRoom(
                "it is out of data space: enlarge it (`fsnap pool grow`, if fsnap made it), or remove checkpoints"
                    .into(),
            )),
            Mode::ReadOnly => Some(Refusal::Broken(
                "its metadata cannot be written, or are full, so that images can be read, and neither made nor removed: \
                 take it down, as by `fsnap pool stop`, enlarge what its metadata lie on if they are full, and run `thin_check \
                 --clear-needs-check-flag` on that before it comes up again",
            )),
            Mode::Fails => Some(Refusal::Broken(FAILS)),
        }
    }
}

/// What is to be done about metadata that could not be written once. The check alone leaves the mark, and the pool as it is.
const CHECK: &str = "its metadata need a check, because they could not be written: unmount what lies in it, take it down, as by \
                     `fsnap pool stop`, and run `thin_check --clear-needs-check-flag` on what its metadata lie on";

/// What is to be done about metadata that the kernel could not use. They may be whole, on a device that failed for a while.
const FAILS: &str = "the kernel cannot use its metadata: unmount what lies in it, take it down, as by `fsnap pool stop`, and run \
                     `thin_check --clear-needs-check-flag` on what its metadata lie on; what that finds, `thin_repair` repairs";

fn free_percent((used, total): (u64, u64)) -> u64 {
    (100 * total.saturating_sub(used)).checked_div(total).unwrap_or(0)
}

/// Why a pool takes no new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// There is too little room.
    NoRoom(String),
    /// It cannot be changed at all.
    Broken(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoom(why) => why.fmt(f),
            Self::Broken(why) => why.fmt(f),
        }
    }
}

/// A pool that is up.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) number: Number,
}

impl Pool {
    /// Takes the device of that name as a pool, if it is one.
    pub(crate) fn named(mapper: &Mapper, name: &str) -> Result<Option<Self>> {
        let Some((device, table)) = mapper.table(name)? else { return Ok(None) };
        let is_pool = matches!(&table[..], [target] if target.kind == "thin-pool");
        Ok(is_pool.then_some(Self { name: device.name, uuid: device.uuid, number: device.number }))
    }

    /// Why fsnap may not change the pool, if others manage it.
    pub(crate) fn owner(&self) -> Option<&'static str> {
        owner(&self.uuid)
    }

    /// How full it is; `exact` waits for a commit.
    pub(crate) fn fill(&self, mapper: &Mapper, exact: bool) -> Result<Fill> {
        let status = mapper.status(&self.name, exact)?;
        let line = status.first().map(|target| target.text.as_str()).unwrap_or_default();
        Fill::parse(line).ok_or_else(|| Error::Damaged {
            what: self.to_string(),
            reason: format!("its status cannot be understood: {}", line.escape_debug()),
        })
    }

    /// The bytes of one of its data blocks.
    pub(crate) fn block(&self, mapper: &Mapper) -> Result<u64> {
        let table = mapper.table(&self.name)?.map(|(_, table)| table).unwrap_or_default();
        // The devices of the metadata and of the data, and then the sectors of a block.
        let sectors = table.first().and_then(|target| target.text.split(' ').nth(2)?.parse::<u64>().ok());
        Ok(sectors.unwrap_or(0) * 512)
    }

    /// Refuses when no image can be made.
    pub(crate) fn check_room(&self, mapper: &Mapper, limits: &Limits, exact: bool) -> Result<()> {
        match self.fill(mapper, exact)?.refusal(limits) {
            None => Ok(()),
            Some(refusal) => Err(self.refused(refusal)),
        }
    }

    pub(crate) fn refused(&self, refusal: Refusal) -> Error {
        match refusal {
            Refusal::NoRoom(why) => Error::Io {
                action: "make an image in",
                object: format!("{self}, because {why}"),
                source: io::Error::from(Errno::NOSPC),
            },
            Refusal::Broken(reason) => Error::Damaged { what: self.to_string(), reason: reason.to_owned() },
        }
    }

    /// Makes `id` a copy of `origin`, which must be suspended if anybody writes to it.
    ///
    /// The kernel commits the pool's metadata before it answers, and does not say if that failed: [`Pool::fill`] does.
    pub(crate) fn copy(&self, mapper: &Mapper, id: ThinId, origin: ThinId) -> io::Result<()> {
        mapper.message(&self.name, &format!("create_snap {id} {origin}"))
    }

    /// Makes `id` a new, empty device.
    pub(crate) fn create(&self, mapper: &Mapper, id: ThinId) -> io::Result<()> {
        mapper.message(&self.name, &format!("create_thin {id}"))
    }

    /// Gives the metadata another transaction number; refused if the old one is not that.
    pub(crate) fn set_number(&self, mapper: &Mapper, old: u64, new: u64) -> io::Result<()> {
        mapper.message(&self.name, &format!("set_transaction_id {old} {new}"))
    }

    /// Removes `id`; succeeds if it is not there.
    pub(crate) fn delete(&self, mapper: &Mapper, id: ThinId) -> Result<()> {
        match mapper.message(&self.name, &format!("delete {id}")) {
            Err(error) if error.raw_os_error() == Some(Errno::NODATA.raw_os_error()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Err(Error::Busy {
                what: format!("thin device {id} of {self}"),
                by: "somebody has activated it".to_owned(),
            }),
            deleted => {
                // A pool that takes no message says only by its status why.
                if deleted.is_err() {
                    self.check_commit(mapper)?;
                }
                deleted.context("delete", format!("thin device {id} of {self}"))?;
                self.check_commit(mapper)
            }
        }
    }

    /// Makes sure that the last message was committed.
    pub(crate) fn check_commit(&self, mapper: &Mapper) -> Result<()> {
        let fill = self.fill(mapper, false)?;
        match fill.mode {
            Mode::Works | Mode::OutOfData if !fill.needs_check => Ok(()),
            _ => {
                let why = fill.refusal(&Limits { free_data: 0, free_metadata: 0 });
                Err(self.refused(why.unwrap_or(Refusal::Broken("its metadata were not committed"))))
            }
        }
    }

    /// The table of the thin device `id`.
    pub(crate) fn table(&self, id: ThinId, length: u64) -> Target {
        Target { length, kind: "thin".into(), text: format!("{} {id}", self.number) }
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the pool {}", self.name)
    }
}

/// Who manages a device of that UUID, and has to be asked instead of fsnap.
pub(crate) fn owner(uuid: &str) -> Option<&'static str> {
    if uuid.starts_with("LVM-") {
        Some(
            "it belongs to LVM, which keeps its own record of what is in a pool: take snapshots of it by \
             `lvcreate --snapshot`, choose the rsync backend, or use a pool that nobody else manages",
        )
    } else if uuid.starts_with("stratis-") {
        Some(
            "it belongs to Stratis: take snapshots of it by `stratis filesystem snapshot`, or choose the rsync backend",
        )
    } else {
        None
    }
}

/// A thin device in use: where it is, and what it is in its pool.
#[derive(Debug, Clone)]
pub(crate) struct ThinDevice {
    pub(crate) device: Device,
    pub(crate) pool: Number,
    pub(crate) id: ThinId,
    pub(crate) length: u64,
}

impl ThinDevice {
    /// Takes the device of that name as a thin device, or says why it is none that can be a volume.
    pub(crate) fn named(mapper: &Mapper, name: &str) -> Result<Result<Self, &'static str>> {
        let Some((device, table)) = mapper.table(name)? else { return Ok(Err("its device is gone")) };
        let [Target { length, kind, text }] = &table[..] else {
            return Ok(Err("its device is put together of several targets"));
        };
        if kind != "thin" {
            return Ok(Err("its device is not a thin device of device-mapper"));
        }
        let mut words = text.split(' ');
        let parsed = words.next().and_then(Number::parse).zip(words.next().and_then(|id| id.parse().ok()));
        Ok(match (parsed, words.next()) {
            (Some((pool, id)), None) => Ok(Self { device, pool, id: ThinId(id), length: *length }),
            (Some(_), Some(_)) => Err("its device takes what is not in the pool from another device"),
            (None, _) => Err("its table cannot be understood"),
        })
    }

    /// Refuses a device on which every access waits.
    pub(crate) fn check_running(&self) -> Result<()> {
        if !self.device.suspended {
            return Ok(());
        }
        Err(Error::Busy {
            what: format!("the device {}", self.device.name),
            by: "somebody has suspended it, so that every access waits; `dmsetup resume` ends that".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "1 100/1000 900/1000 - rw discard_passdown error_if_no_space - 24";

    #[test]
    fn a_status_is_understood() {
        let fill = Fill::parse(GOOD).unwrap();
        assert_eq!((fill.free_metadata(), fill.free_data()), (90, 10));
        assert_eq!(fill.refusal(&Limits::default()), None);
        assert_eq!(Fill::parse("Fail").unwrap().mode, Mode::Fails);
        assert_eq!(Fill::parse("nonsense"), None);
    }

    #[test]
    fn a_pool_that_is_short_or_broken_refuses() {
        let refusal = |line: &str| Fill::parse(line).unwrap().refusal(&Limits::default());
        let no_room = |refusal| matches!(refusal, Some(Refusal::NoRoom(_)));
        let broken = |refusal| matches!(refusal, Some(Refusal::Broken(_)));
        assert!(no_room(refusal("1 100/1000 951/1000 - rw discard_passdown queue_if_no_space - 24")));
        assert!(no_room(refusal("1 901/1000 10/1000 - rw discard_passdown queue_if_no_space - 24")));
        assert!(no_room(refusal("1 1/10 10/10 - out_of_data_space discard_passdown queue_if_no_space - 24")));
        assert!(broken(refusal("1 1/10 1/10 - ro discard_passdown queue_if_no_space - 24")));
        assert!(broken(refusal("1 1/10 1/10 - rw discard_passdown queue_if_no_space needs_check 24")));
        assert!(broken(refusal("Fail")));
    }

    #[test]
    fn pools_of_others_are_known_by_their_uuid() {
        assert!(owner("LVM-nMq6bVtpool").is_some());
        assert!(owner("").is_none());
    }
}
