//! Files that CRIU was told to leave out of its images: by `--external file[MOUNT:INODE]`, both in hexadecimal digits.
//!
//! Which those are is read from the images themselves, in which each open file is a message of protocol buffers
//! (`file_entry` in CRIU's `fdinfo.proto`, with a `reg_file_entry` of `regfile.proto`): the command line may name others, which are closed by then, or named again.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::criu::COMMON_MAGIC;
use super::{Error, Images, Result};

/// The file of all open files.
const FILES: &str = "files.img";
const FILES_MAGIC: u32 = 0x5630_3138;
/// More than a million files need.
const LIMIT: u64 = 256 << 20;

/// What CRIU calls the file with that number on that mount.
pub fn key(mount: u64, inode: u64) -> String {
    format!("file[{mount:x}:{inode:x}]")
}

/// What CRIU calls the files of which the images lack the content.
///
/// Makes sure that these can be inherited: CRIU opens what it inherits once more by a link in `/proc`, with the flags that its image has, and
/// `O_NOFOLLOW` forbids that. The flag means nothing for a file that is open, so that it is taken out of the image.
pub(super) fn files(images: &Images) -> Result<BTreeSet<String>> {
    let bad = |reason: String| Error::ImageFile { dir: images.path().into(), file: FILES, reason };
    let Some(file) = images.file(FILES, LIMIT)? else { return Ok(BTreeSet::new()) };
    let mut bytes = Vec::new();
    (&file).take(LIMIT).read_to_end(&mut bytes).map_err(|error| bad(error.to_string()))?;
    let external = parse(&bytes).ok_or_else(|| bad("it is not what CRIU writes".into()))?;
    for byte in external.iter().filter_map(|one| one.no_follow) {
        let write = || {
            let same = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            same.write_all_at(&[bytes[byte] & !NO_FOLLOW.1], byte as u64)
        };
        write().map_err(|error: io::Error| bad(error.to_string()))?;
    }
    Ok(external.into_iter().map(|one| one.key).collect())
}

/// `O_NOFOLLOW` in a number of the kind varint: which of its bytes, and which bit.
const NO_FOLLOW: (usize, u8) =
    ((nix::libc::O_NOFOLLOW.trailing_zeros() / 7) as usize, 1 << (nix::libc::O_NOFOLLOW.trailing_zeros() % 7));

/// An open file of which the images lack the content.
#[derive(Debug, PartialEq, Eq)]
struct External {
    key: String,
    /// The byte of the image with the bit that says that it was opened with `O_NOFOLLOW`.
    no_follow: Option<usize>,
}

fn parse(bytes: &[u8]) -> Option<Vec<External>> {
    let (head, mut rest) = bytes.split_at_checked(8)?;
    if head != [COMMON_MAGIC.to_le_bytes(), FILES_MAGIC.to_le_bytes()].concat() {
        return None;
    }
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk()?;
        let (entry, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        rest = after;
        let mut regular = None;
        each_field(entry, |number, value, _| {
            if let (3, Value::Bytes(bytes)) = (number, value) {
                regular = Some(bytes);
            }
        })?;
        let regular = regular.unwrap_or_default();
        let (mut name, mut external, mut no_follow) = (None, false, None);
        each_field(regular, |number, value, left| match (number, value) {
            (2, Value::Number(encoded)) => {
                let there = encoded.get(NO_FOLLOW.0).is_some_and(|byte| byte & NO_FOLLOW.1 != 0);
                // How much is left of all when this number begins tells where it is.
                let behind = after.len() + trailing(entry, regular) + left + encoded.len();
                no_follow = there.then(|| bytes.len() - behind + NO_FOLLOW.0);
            }
            (6, Value::Bytes(bytes)) => name = std::str::from_utf8(bytes).ok(),
            (9, Value::Number(encoded)) => external = encoded.iter().any(|byte| byte & 0x7f != 0),
            _ => {}
        })?;
        found.extend(name.filter(|_| external).map(|key| External { key: key.to_owned(), no_follow }));
    }
    Some(found)
}

/// How many bytes of `whole` follow its part.
fn trailing(whole: &[u8], part: &[u8]) -> usize {
    (whole.as_ptr_range().end as usize).saturating_sub(part.as_ptr_range().end as usize)
}

enum Value<'a> {
    /// As it is encoded.
    Number(&'a [u8]),
    Bytes(&'a [u8]),
}

/// Shows every field of a message of protocol buffers, with its number and how many bytes follow it; `None` if it is none.
fn each_field<'a>(mut bytes: &'a [u8], mut visit: impl FnMut(u64, Value<'a>, usize)) -> Option<()> {
    while !bytes.is_empty() {
        let tag = number(varint(&mut bytes)?);
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut bytes)?),
            1 => Value::Bytes(bytes.split_off(..8)?),
            2 => {
                let length = usize::try_from(number(varint(&mut bytes)?)).ok()?;
                Value::Bytes(bytes.split_off(..length)?)
            }
            5 => Value::Bytes(bytes.split_off(..4)?),
            _ => return None,
        };
        visit(tag >> 3, value, bytes.len());
    }
    Some(())
}

/// Takes the bytes of a number away.
fn varint<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    const LONGEST: usize = 10;
    let end = bytes.iter().take(LONGEST).position(|byte| byte & 0x80 == 0)?;
    bytes.split_off(..=end)
}

fn number(varint: &[u8]) -> u64 {
    varint.iter().rev().fold(0, |number, byte| number << 7 | u64::from(byte & 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(entries: &[&[u8]]) -> Vec<u8> {
        let mut bytes = [COMMON_MAGIC.to_le_bytes(), FILES_MAGIC.to_le_bytes()].concat();
        for entry in entries {
            bytes.extend(u32::try_from(entry.len()).unwrap().to_le_bytes());
            bytes.extend(*entry);
        }
        bytes
    }

    fn entry(name: &[u8], external: bool) -> Vec<u8> {
        // Opened by O_RDWR | O_NOFOLLOW.
        let mut regular = vec![8, 1, 16, 0x82, 0x80, 8, 24, 0x80, 1, 42, 0, 50, u8::try_from(name.len()).unwrap()];
        regular.extend(name);
        regular.extend([72, u8::from(external), 80, 0xa4, 0x83, 2]);
        [&[8, 1, 16, 7, 26, u8::try_from(regular.len()).unwrap()][..], &regular].concat()
    }

    #[test]
    fn only_external_files_are_found() {
        let (one, other) = (entry(b"file[1b:98e06f]", true), entry(b"srv/db/a", false));
        let pipe = [8, 2, 16, 9];
        let whole = image(&[&one, &pipe, &other]);
        let found = parse(&whole).unwrap();
        let byte = found[0].no_follow.unwrap();
        assert_eq!((found.len(), &found[0].key), (1, &key(0x1b, 0x98_e06f)));
        assert_eq!((byte, whole[byte]), (8 + 4 + 4 + 2 + 5, 8));
        let mut changed = whole.clone();
        changed[byte] &= !NO_FOLLOW.1;
        assert_eq!(parse(&changed).unwrap()[0].no_follow, None);
        assert_eq!(parse(&image(&[])), Some(Vec::new()));
        // Cut anywhere but between two entries, it is no image.
        let ends = [8, 12 + one.len(), 16 + one.len() + pipe.len()];
        for end in (0..whole.len()).filter(|end| !ends.contains(end)) {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
    }
}
