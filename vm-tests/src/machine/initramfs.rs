//! Writes a kernel's initial file system.
//!
//! The format is the kernel's own ([initramfs buffer format]): for each file a header of ASCII digits, its name, its content.
//!
//! [initramfs buffer format]: https://docs.kernel.org/driver-api/early-userspace/buffer-format.html

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::Context;

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
/// The name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive that is being written.
pub(super) struct Archive {
    path: PathBuf,
    file: BufWriter<File>,
    inode: u32,
    written: usize,
    there: BTreeSet<String>,
}

impl Archive {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = BufWriter::new(File::create(path).during("make", path)?);
        Ok(Self { path: path.into(), file, inode: 0, written: 0, there: BTreeSet::new() })
    }

    /// Adds the program that runs, with the libraries that it runs with.
    pub(super) fn program(&mut self, program: &Path, name: &str) -> Result<()> {
        self.file(program, name)?;
        let maps = Path::new("/proc/self/maps");
        let text = fs::read_to_string(maps).during("read", maps)?;
        for library in libraries(&text) {
            self.file(Path::new(library), library.trim_start_matches('/'))?;
        }
        // Libraries and their loader are looked for without `usr`.
        for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            self.link(link, target)?;
        }
        let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
        if let Ok(real) = loader.canonicalize() {
            let real = real.to_string_lossy().into_owned();
            self.file(Path::new(&real), real.trim_start_matches('/'))?;
            let named = "usr/lib64/ld-linux-x86-64.so.2";
            if named != real.trim_start_matches('/') {
                self.link(named, &real)?;
            }
        }
        Ok(())
    }

    /// Adds a copy of a file.
    pub(super) fn file(&mut self, from: &Path, name: &str) -> Result<()> {
        let content = fs::read(from).during("read", from)?;
        self.add(name, REGULAR, &content)
    }

    fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.add(name, LINK, target.as_bytes())
    }

    /// Adds an entry after the directories above it, unless it is there.
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        if !self.there.insert(name.to_owned()) {
            return Ok(());
        }
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.add(parent, DIRECTORY, b"")?;
        }
        self.entry(name, mode, content)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let mut header = String::from("070701");
        let length = u32::try_from(content.len()).map_err(std::io::Error::other).during("store", name)?;
        let name_length = name.len() as u32 + 1;
        // Inode, mode, owner, group, links, time, length, four device numbers, length of the name, a sum that is not used.
        for field in [self.inode, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0] {
            header += &format!("{field:08x}");
        }
        self.write(header.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(b"\0")?;
        self.pad()?;
        self.write(content)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len();
        self.file.write_all(bytes).during("write", &self.path)
    }

    /// Fills up to a multiple of four.
    fn pad(&mut self) -> Result<()> {
        let rest = self.written.wrapping_neg() % 4;
        self.write(&[0; 3][..rest])
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Result<()> {
        self.entry(TRAILER, 0, b"")?;
        self.file.flush().during("write", &self.path)
    }
}

/// The shared libraries in a list of a process's mappings.
fn libraries(maps: &str) -> BTreeSet<&str> {
    let is_library = |path: &&str| path.rsplit('/').next().is_some_and(|name| name.contains(".so"));
    maps.lines().filter_map(|line| Some(&line[line.find('/')?..])).filter(is_library).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive");
        let mut archive = Archive::create(&path).unwrap();
        archive.add("a/b", REGULAR, b"hello").unwrap();
        archive.link("c", "a/b").unwrap();
        archive.finish().unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).unwrap();
        let order: Vec<_> = ["070701", "a\0", "a/b\0", "hello\0", "c\0", TRAILER].map(|part| text.find(part)).into();
        assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{order:?}");
        let header = "07070100000002000081ed000000000000000000000001000000000000000500000000000000000000000000000000";
        assert!(text.contains(&format!("{header}0000000400000000a/b\0")), "{text}");
    }

    #[test]
    fn libraries_are_found_among_mappings() {
        let maps = "00-01 r-xp 00 fe:00 12 /bin/vm-tests\n00-01 r-xp 00 fe:00 12   /usr/lib/x/libc.so.6\n\
                    00-01 rw-p 00 00:00 0 [heap]\n00-01 rw-p 00 00:00 0\n00-02 r--p 00 fe:00 12 /usr/lib/x/libc.so.6\n";
        assert_eq!(Vec::from_iter(libraries(maps)), ["/usr/lib/x/libc.so.6"]);
    }
}
