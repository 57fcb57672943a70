//! Names made and removed in a directory.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::fault::compare;
use crate::kind::Writer;
use crate::{Fault, Stream};

/// A directory in which every step makes or removes one symbolic link: changes that touch no file's content.
///
/// The target of a link is the number of the step that made it.
#[derive(Debug)]
pub(crate) struct Names {
    stream: Stream,
    path: PathBuf,
    done: u64,
    /// The steps that made the links, by their number.
    links: BTreeMap<u64, u64>,
}

/// How many different names there are.
const COUNT: u64 = 100;

impl Names {
    pub(crate) fn create(stream: Stream, path: PathBuf) -> Result<Self, Fault> {
        std::fs::create_dir(&path).map_err(|error| Fault::call(&path, "mkdir", error))?;
        Ok(Self { stream, path, done: 0, links: BTreeMap::new() })
    }

    pub(crate) fn examine(stream: Stream, path: &Path) -> Result<u64, Fault> {
        let found = read(path)?;
        let steps = found.values().filter_map(|target| target.to_str()?.parse::<u64>().ok());
        let latest = steps.max().unwrap_or(0);
        let mut names = Self { stream, path: path.to_owned(), done: 0, links: BTreeMap::new() };
        for _ in 0..latest {
            names.advance();
        }
        // The links that later steps made can only be missing because still later steps removed them: soon one is not.
        let mut result = names.check();
        for _ in 0..COUNT {
            if result.is_ok() {
                break;
            }
            names.advance();
            result = result.or(names.check());
        }
        result.map(|()| names.done)
    }

    fn number(&self, step: u64) -> u64 {
        self.stream.choose(step) % COUNT
    }

    fn advance(&mut self) {
        self.done += 1;
        let number = self.number(self.done);
        if self.links.remove(&number).is_none() {
            self.links.insert(number, self.done);
        }
    }
}

fn name(number: u64) -> OsString {
    format!("link-{number}").into()
}

fn read(path: &Path) -> Result<BTreeMap<OsString, OsString>, Fault> {
    let failed = |call: &'static str| move |error| Fault::call(path, call, error);
    let mut links = BTreeMap::new();
    for entry in std::fs::read_dir(path).map_err(failed("readdir"))? {
        let entry = entry.map_err(failed("readdir"))?;
        let target = std::fs::read_link(entry.path()).map_err(failed("readlink"))?;
        links.insert(entry.file_name(), target.into_os_string());
    }
    Ok(links)
}

impl Writer for Names {
    fn done(&self) -> u64 {
        self.done
    }

    fn step(&mut self, pause: &mut dyn FnMut()) -> Result<(), Fault> {
        let next = self.done + 1;
        let number = self.number(next);
        let link = self.path.join(name(number));
        pause();
        let target = match std::fs::read_link(&link) {
            Ok(target) => Some(target.into_os_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(Fault::call(&link, "readlink", error)),
        };
        let expected = self.links.get(&number).map(|step| step.to_string().into());
        compare(&link, 0, "the target", bytes(&expected), bytes(&target))?;
        match target {
            Some(_) => std::fs::remove_file(&link).map_err(|error| Fault::call(&link, "unlink", error))?,
            None => symlink(next.to_string(), &link).map_err(|error| Fault::call(&link, "symlink", error))?,
        }
        pause();
        self.advance();
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        let found = read(&self.path)?;
        let expected: BTreeMap<OsString, OsString> =
            self.links.iter().map(|(&number, step)| (name(number), step.to_string().into())).collect();
        for key in expected.keys().chain(found.keys()) {
            let (expected, found) = (expected.get(key).cloned(), found.get(key).cloned());
            compare(&self.path.join(key), 0, &format!("after step {}", self.done), bytes(&expected), bytes(&found))?;
        }
        Ok(())
    }
}

fn bytes(target: &Option<OsString>) -> &[u8] {
    target.as_deref().map_or(b"nothing", OsStr::as_bytes)
}
