//! Loading kernel modules with those that they need.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::Result;
use crate::error::Context;

const NO_PARAMETERS: &CStr = c"";

/// The modules below one directory, by the file `modules.dep` in it.
#[derive(Debug)]
pub(crate) struct Modules {
    dir: PathBuf,
    /// Each module's path below `dir` and the paths of those that it needs, by its name.
    by_name: BTreeMap<String, (String, Vec<String>)>,
}

impl Modules {
    /// Reads what there is.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let index = dir.join("modules.dep");
        let text = fs::read_to_string(&index).during("read", &index)?;
        Ok(Self { dir: dir.to_owned(), by_name: parse(&text) })
    }

    /// Loads a module and what it needs; does nothing if it is built in, or not there at all.
    ///
    /// Whoever needs one that is missing will say so better than a name here could.
    pub(crate) fn load(&self, name: &str, loaded: &mut BTreeSet<String>) -> Result<()> {
        let Some((path, needs)) = self.by_name.get(&canonical(name)) else { return Ok(()) };
        // The file lists direct and indirect ones, the first to be loaded last.
        for path in needs.iter().rev().chain([path]) {
            if loaded.insert(path.clone()) {
                self.insert(path)?;
            }
        }
        Ok(())
    }

    /// The files of these modules and of those that they need.
    pub(crate) fn files(&self, names: &[&str]) -> BTreeSet<String> {
        let found = names.iter().filter_map(|name| self.by_name.get(&canonical(name)));
        found.flat_map(|(path, needs)| needs.iter().chain([path])).cloned().collect()
    }

    fn insert(&self, path: &str) -> Result<()> {
        let path = self.dir.join(path);
        let file = File::open(&path).during("open", &path)?;
        match finit_module(&file, NO_PARAMETERS, ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(errno) => Err(errno).during("load the module", &path),
        }
    }
}

/// A module's name as the kernel writes it.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn parse(index: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let line = |line: &str| {
        let (path, needs) = line.split_once(':')?;
        let file = path.rsplit('/').next()?;
        let name = file.split(".ko").next()?;
        let needs = needs.split_whitespace().map(str::to_owned).collect();
        Some((canonical(name), (path.to_owned(), needs)))
    };
    index.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_read() {
        let parsed = parse("k/dm-mod.ko:\nk/dm-thin-pool.ko: k/dm-bufio.ko k/dm-mod.ko\n");
        assert_eq!(parsed["dm_mod"], ("k/dm-mod.ko".into(), vec![]));
        let needs = vec!["k/dm-bufio.ko".into(), "k/dm-mod.ko".into()];
        assert_eq!(parsed["dm_thin_pool"], ("k/dm-thin-pool.ko".into(), needs));
    }

    #[test]
    fn a_dash_is_an_underscore() {
        assert_eq!(canonical("dm-thin-pool"), "dm_thin_pool");
    }
}
