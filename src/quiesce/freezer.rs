//! The freezer of a control group, in both of the kernel's interfaces.
//!
//! Unified hierarchy: `cgroup.freeze`, and `cgroup.events`, which can be polled ([cgroup-v2]). Older one: `freezer.state`, which
//! must be read again until it says `FROZEN`, since a look at it is what completes the transition ([freezer-subsystem]).
//!
//! [cgroup-v2]: https://docs.kernel.org/admin-guide/cgroup-v2.html
//! [freezer-subsystem]: https://docs.kernel.org/admin-guide/cgroup-v1/freezer-subsystem.html

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Deadline, Error, Result};
use crate::processes::{Cgroup, CgroupVersion, says_frozen};

/// A control group that can be frozen as a whole.
#[derive(Debug, Clone)]
pub(super) struct Freezer {
    cgroup: Cgroup,
}

impl Freezer {
    /// The freezer of the group, if it has one: the root has none, nor has a group of another controller.
    pub(super) fn of(cgroup: Cgroup) -> Option<Self> {
        let freezer = Self { cgroup };
        freezer.control().exists().then_some(freezer)
    }

    pub(super) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    fn control(&self) -> PathBuf {
        self.cgroup.dir().join(match self.cgroup.version() {
            CgroupVersion::V1 => "freezer.state",
            CgroupVersion::V2 => "cgroup.freeze",
        })
    }

    /// Whether somebody has asked for this very group to be frozen, or a group above it is.
    pub(super) fn is_asked_for(&self) -> Result<bool> {
        let content = read(self.control())?;
        Ok(match self.cgroup.version() {
            CgroupVersion::V1 => content.trim() != "THAWED",
            CgroupVersion::V2 => content.trim() == "1" || self.is_frozen()?,
        })
    }

    /// Asks for the group to be frozen, or thawed. A group that was removed has nothing to thaw.
    pub(super) fn ask(&self, frozen: bool) -> Result<()> {
        let word = match (self.cgroup.version(), frozen) {
            (CgroupVersion::V1, true) => "FROZEN",
            (CgroupVersion::V1, false) => "THAWED",
            (CgroupVersion::V2, true) => "1",
            (CgroupVersion::V2, false) => "0",
        };
        let path = self.control();
        let opened = OpenOptions::new().write(true).open(&path);
        match opened.and_then(|mut control| control.write_all(word.as_bytes())) {
            Err(error) if !frozen && is_removed(&error) => Ok(()),
            Err(source) => Err(Error::Freezer { path, source }),
            Ok(()) => Ok(()),
        }
    }

    fn is_frozen(&self) -> Result<bool> {
        Ok(match self.cgroup.version() {
            CgroupVersion::V1 => read(self.control())?.trim() == "FROZEN",
            CgroupVersion::V2 => says_frozen(&read(self.cgroup.dir().join("cgroup.events"))?),
        })
    }

    /// Checks that the group is frozen.
    pub(super) fn check(&self) -> Result<()> {
        if self.is_frozen()? {
            return Ok(());
        }
        let pid = self.cgroup.pids()?.into_iter().next();
        match pid.and_then(|pid| crate::processes::ProcessId::of(pid).ok()) {
            Some(process) => Err(Error::Resumed { process, command: format!("in {}", self.cgroup) }),
            // All of its processes were killed.
            None => Ok(()),
        }
    }

    /// Waits until every process of the group stands.
    pub(super) fn wait_frozen(&self, deadline: Deadline) -> Result<()> {
        match self.cgroup.version() {
            CgroupVersion::V1 => self.wait_by_reading(deadline),
            CgroupVersion::V2 => self.wait_for_event(deadline),
        }
    }

    fn wait_for_event(&self, deadline: Deadline) -> Result<()> {
        let path = self.cgroup.dir().join("cgroup.events");
        let failed = |source| Error::Freezer { path: path.clone(), source };
        let mut events = File::open(&path).map_err(failed)?;
        loop {
            let mut content = String::new();
            events.rewind().and_then(|()| events.read_to_string(&mut content)).map_err(failed)?;
            if says_frozen(&content) {
                return Ok(());
            }
            let left = deadline.left();
            if left.is_zero() {
                return Err(self.too_late(deadline));
            }
            let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    fn wait_by_reading(&self, deadline: Deadline) -> Result<()> {
        let mut pause = Duration::from_micros(20);
        while !self.is_frozen()? {
            if Instant::now() >= deadline.at {
                return Err(self.too_late(deadline));
            }
            std::thread::sleep(pause.min(deadline.left()));
            pause = (pause * 2).min(Duration::from_millis(2));
        }
        Ok(())
    }

    fn too_late(&self, deadline: Deadline) -> Error {
        Error::CgroupDeadline { cgroup: self.cgroup.clone(), within: deadline.within }
    }
}

fn read(path: PathBuf) -> Result<String> {
    fs::read_to_string(&path).map_err(|source| Error::Freezer { path, source })
}

fn is_removed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}
