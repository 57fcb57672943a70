//! Device-mapper's devices and tables, with errors that name the device.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use devicemapper::errors::Error as CoreError;
use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, DmUuid};
use fsnap_backend::{Error, IoContext, Result, mounts};
use rustix::io::Errno;

use crate::{KIND, sys};

/// The device through which all calls go.
const CONTROL: &str = "/dev/mapper/control";

/// A block device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Number {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl Number {
    pub(crate) fn of(device: u64) -> Self {
        Self { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
    }

    /// Reads it as tables show it: `253:4`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    /// The node of a device-mapper device, which the kernel itself makes.
    pub(crate) fn node(self) -> PathBuf {
        format!("/dev/dm-{}", self.minor).into()
    }

    /// The node of any block device.
    pub(crate) fn node_of_any(self) -> Result<PathBuf> {
        let path = format!("/sys/dev/block/{self}/uevent");
        let text = fs::read_to_string(&path).context("read", &path)?;
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| Error::NotFound { what: format!("the node of the block device {self}") })?;
        Ok(PathBuf::from("/dev").join(name))
    }

    /// The node by which users know the device of that name, if udev has made one: it leads to the same device after a
    /// restart.
    pub(crate) fn named_node(self, name: &str) -> PathBuf {
        let named = PathBuf::from(format!("/dev/mapper/{name}"));
        let leads_here = fs::metadata(&named).is_ok_and(|meta| Self::of(meta.rdev()) == self);
        if leads_here { named } else { self.node() }
    }
}

impl From<mounts::Device> for Number {
    fn from(device: mounts::Device) -> Self {
        Self { major: device.major, minor: device.minor }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What device-mapper says of one of its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// Given by whoever made it, and never changed; empty if none was given.
    pub(crate) uuid: String,
    pub(crate) number: Number,
    pub(crate) suspended: bool,
    /// It has a table, so that it can be read.
    pub(crate) active: bool,
    /// How many have it open; a mounted file system is one.
    pub(crate) users: i32,
}

/// One line of a table or of a status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// In sectors.
    pub(crate) length: u64,
    pub(crate) kind: String,
    pub(crate) text: String,
}

/// How a device is named in a call.
#[derive(Debug, Clone, Copy)]
pub(crate) enum By<'a> {
    Name(&'a str),
    Uuid(&'a str),
}

impl fmt::Display for By<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Name(text) | Self::Uuid(text)) = self;
        write!(f, "the device {text}")
    }
}

/// The kernel's device-mapper.
#[derive(Debug)]
pub(crate) struct Mapper {
    dm: DmHandle,
}

/// `DM` has no `Debug`.
struct DmHandle(DM);

impl fmt::Debug for DmHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(CONTROL)
    }
}

impl Mapper {
    /// Opens it; where the kernel has none, says so.
    pub(crate) fn open() -> Result<Self> {
        let open = || {
            fs::File::open(CONTROL)?;
            DM::new().map_err(to_io)
        };
        match open() {
            Ok(dm) => Ok(Self { dm: DmHandle(dm) }),
            Err(error) if missing(&error) => Err(Error::Unsupported {
                kind: KIND,
                action: "work here",
                reason: "this kernel has no device-mapper, or its module dm_mod is not loaded".into(),
            }),
            Err(error) => Err(error).context("open", CONTROL),
        }
    }

    fn call<T>(&self, by: By<'_>, call: impl FnOnce(&DM, &DevId<'_>) -> Result<T, DmError>) -> io::Result<T> {
        match by {
            By::Name(name) => call(&self.dm.0, &DevId::Name(DmName::new(name).map_err(to_io)?)),
            By::Uuid(uuid) => call(&self.dm.0, &DevId::Uuid(DmUuid::new(uuid).map_err(to_io)?)),
        }
        .map_err(to_io)
    }

    /// Looks for a device.
    pub(crate) fn find(&self, by: By<'_>) -> Result<Option<Device>> {
        match self.call(by, |dm, id| dm.device_info(id)) {
            Ok(info) => Ok(Some(describe(&info))),
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => Ok(None),
            Err(error) => Err(error).context("look at", by.to_string()),
        }
    }

    /// Tells the name of the device of that number; `None` if it is not one of device-mapper's.
    pub(crate) fn name_of(&self, number: Number) -> Result<Option<String>> {
        let path = format!("/sys/dev/block/{number}/dm/name");
        match fs::read_to_string(&path) {
            Ok(name) => Ok(Some(name.trim_end().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read", path),
        }
    }

    /// The names of all devices.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let list = self.dm.0.list_devices().map_err(to_io).context("list", "the devices of device-mapper")?;
        Ok(list.into_iter().map(|(name, ..)| name.to_string()).collect())
    }

    /// Looks for a device and its table, which is empty for one without.
    pub(crate) fn table(&self, name: &str) -> Result<Option<(Device, Vec<Target>)>> {
        self.lines(name, DmFlags::DM_STATUS_TABLE)
    }

    /// The status of a device's targets; `flush` lets a pool commit before, so that the figures are exact.
    pub(crate) fn status(&self, name: &str, flush: bool) -> Result<Vec<Target>> {
        let found = self.lines(name, if flush { DmFlags::empty() } else { DmFlags::DM_NOFLUSH })?;
        found.map(|(_, lines)| lines).ok_or_else(|| Error::NotFound { what: By::Name(name).to_string() })
    }

    fn lines(&self, name: &str, flags: DmFlags) -> Result<Option<(Device, Vec<Target>)>> {
        let options = DmOptions::default().set_flags(flags);
        match self.call(By::Name(name), |dm, id| dm.table_status(id, options)) {
            Ok((info, lines)) => {
                let target = |(_, length, kind, text)| Target { length, kind, text };
                Ok(Some((describe(&info), lines.into_iter().map(target).collect())))
            }
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => Ok(None),
            Err(error) => Err(error).context("read the table of", By::Name(name).to_string()),
        }
    }

    /// Makes a device without a table.
    pub(crate) fn create(&self, name: &str, uuid: &str) -> io::Result<()> {
        let (name, uuid) = (DmName::new(name).map_err(to_io)?, DmUuid::new(uuid).map_err(to_io)?);
        self.dm.0.device_create(name, Some(uuid), DmOptions::private()).map_err(to_io).map(drop)
    }

    /// Gives a device a table, which it uses once it is resumed.
    pub(crate) fn load(&self, name: &str, targets: &[Target], read_only: bool) -> io::Result<()> {
        let mut start = 0;
        let mut lines = Vec::new();
        for target in targets {
            lines.push((start, target.length, target.kind.clone(), target.text.clone()));
            start += target.length;
        }
        let flags = if read_only { DmFlags::DM_READONLY } else { DmFlags::empty() };
        let options = DmOptions::private().set_flags(flags);
        self.call(By::Name(name), |dm, id| dm.table_load(id, &lines, options)).map(drop)
    }

    /// Makes a device ready for use.
    ///
    /// udev's rules leave it alone: it may have the UUID of a file system that is mounted, and `/dev/disk/by-uuid` must
    /// go on naming that one.
    pub(crate) fn start(&self, name: &str) -> io::Result<Device> {
        self.call(By::Name(name), |dm, id| dm.device_suspend(id, DmOptions::private())).map(|info| describe(&info))
    }

    /// Makes a device with its table, ready for use; one that cannot be is gone again.
    pub(crate) fn make(&self, name: &str, uuid: &str, targets: &[Target], read_only: bool) -> Result<Device> {
        let shown = || By::Name(name).to_string();
        self.create(name, uuid).map_err(|error| match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::BUSY) => Error::Exists { what: shown() },
            _ => Error::Io { action: "make", object: shown(), source: error },
        })?;
        let made = self
            .load(name, targets, read_only)
            .context("load the table of", shown())
            .and_then(|()| self.start(name).context("start", shown()));
        made.map_err(|error| error.and_undo(self.remove(name).context("remove", shown())))
    }

    /// Removes a device; waits a little for users that are about to go.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match self.call(By::Name(name), |dm, id| dm.device_remove(id, DmOptions::private())) {
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => Ok(()),
            removed => removed.map(drop),
        }
    }

    /// Suspends a device, which freezes the file system on it and writes out what is dirty.
    pub(crate) fn suspend(&self, name: &str) -> io::Result<()> {
        let options = DmOptions::default().set_flags(DmFlags::DM_SUSPEND);
        self.call(By::Name(name), |dm, id| dm.device_suspend(id, options)).map(drop)
    }

    /// The device through which all calls go.
    pub(crate) fn control(&self) -> BorrowedFd<'_> {
        self.dm.0.file().as_fd()
    }

    /// Has the device resumed if the process has to end at once, until the value is dropped.
    pub(crate) fn remember(&self, name: &str) -> sys::Remembered<'_> {
        sys::Remembered::new(self.control(), name)
    }

    /// Resumes a device, and waits for nobody.
    pub(crate) fn resume(&self, name: &str) -> io::Result<()> {
        sys::resume(self.control(), name)
    }

    /// Sends a message to the first target of a device.
    pub(crate) fn message(&self, name: &str, message: &str) -> io::Result<()> {
        self.call(By::Name(name), |dm, id| dm.target_msg(id, None, message)).map(drop)
    }
}

fn describe(info: &devicemapper::DeviceInfo) -> Device {
    let device = info.device();
    Device {
        name: info.name().map(ToString::to_string).unwrap_or_default(),
        uuid: info.uuid().map(ToString::to_string).unwrap_or_default(),
        number: Number { major: device.major, minor: device.minor },
        suspended: info.flags().contains(DmFlags::DM_SUSPEND),
        active: info.flags().contains(DmFlags::DM_ACTIVE_PRESENT),
        users: info.open_count(),
    }
}

fn missing(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::NOENT | Errno::NODEV | Errno::NXIO))
}

/// The kernel's own answer, if it was one.
fn to_io(error: DmError) -> io::Error {
    match error {
        DmError::Core(CoreError::Ioctl(_, _, _, errno)) => io::Error::from_raw_os_error(*errno as i32),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_tables_show_them() {
        assert_eq!(Number::parse("253:4"), Some(Number { major: 253, minor: 4 }));
        assert_eq!(Number::parse("253"), None);
        assert_eq!(Number::of(rustix::fs::makedev(253, 300)).to_string(), "253:300");
    }
}
