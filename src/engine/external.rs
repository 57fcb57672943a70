//! Files that CRIU was told to leave out of its images: by `--external file[MOUNT:INODE]`, both in hexadecimal digits.
//!
//! Which those are is read from the images themselves, in which each open file is a message of protocol buffers
//! (`file_entry` in CRIU's `fdinfo.proto`, with a `reg_file_entry` of `regfile.proto`): the command line may name others, which are closed by then, or named again.

use std::collections::BTreeSet;
use std::io::Read;

use super::criu::COMMON_MAGIC;
use super::{Error, Images, Result};

/// The file of all open files.
const FILES: &str = "files.img";
const FILES_MAGIC: u32 = 0x5630_3138;
/// More than a million files need.
const LIMIT: u64 = 256 << 20;

/// What CRIU calls the file with that number on that mount.
pub fn key(mount: i32, inode: u64) -> String {
    format!("file[{mount:x}:{inode:x}]")
}

/// What CRIU calls the files of which the images lack the content.
pub(super) fn files(images: &Images) -> Result<BTreeSet<String>> {
    let bad = |reason: String| Error::ImageFile { dir: images.path().into(), file: FILES, reason };
    let Some(file) = images.file(FILES, LIMIT)? else { return Ok(BTreeSet::new()) };
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes).map_err(|error| bad(error.to_string()))?;
    parse(&bytes).ok_or_else(|| bad("it is not what CRIU writes".into()))
}

fn parse(bytes: &[u8]) -> Option<BTreeSet<String>> {
    let (head, mut rest) = bytes.split_at_checked(8)?;
    if head != [COMMON_MAGIC.to_le_bytes(), FILES_MAGIC.to_le_bytes()].concat() {
        return None;
    }
    let mut found = BTreeSet::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk()?;
        let (entry, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        rest = after;
        let mut regular = None;
        each_field(entry, |number, value| {
            if let (3, Value::Bytes(bytes)) = (number, value) {
                regular = Some(bytes);
            }
        })?;
        let (mut name, mut external) = (None, false);
        each_field(regular.unwrap_or_default(), |number, value| match (number, value) {
            (6, Value::Bytes(bytes)) => name = std::str::from_utf8(bytes).ok(),
            (9, Value::Number(number)) => external = number != 0,
            _ => {}
        })?;
        found.extend(name.filter(|_| external).map(str::to_owned));
    }
    Some(found)
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Shows every field of a message of protocol buffers; `None` if it is none.
fn each_field<'a>(mut bytes: &'a [u8], mut visit: impl FnMut(u64, Value<'a>)) -> Option<()> {
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut bytes)?),
            1 => Value::Bytes(bytes.split_off(..8)?),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                Value::Bytes(bytes.split_off(..length)?)
            }
            5 => Value::Bytes(bytes.split_off(..4)?),
            _ => return None,
        };
        visit(tag >> 3, value);
    }
    Some(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
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
        let mut regular = vec![8, 1, 16, 2, 24, 0x80, 1, 42, 0, 50, u8::try_from(name.len()).unwrap()];
        regular.extend(name);
        regular.extend([72, u8::from(external), 80, 0xa4, 0x83, 2]);
        [&[8, 1, 16, 7, 26, u8::try_from(regular.len()).unwrap()][..], &regular].concat()
    }

    #[test]
    fn only_external_files_are_found() {
        let (one, other) = (entry(b"file[1b:98e06f]", true), entry(b"srv/db/a", false));
        let pipe = [8, 2, 16, 9];
        let whole = image(&[&one, &pipe, &other]);
        assert_eq!(parse(&whole), Some(BTreeSet::from([key(0x1b, 0x98_e06f)])));
        assert_eq!(parse(&image(&[])), Some(BTreeSet::new()));
        // Cut anywhere but between two entries, it is no image.
        let ends = [8, 12 + one.len(), 16 + one.len() + pipe.len()];
        for end in (0..whole.len()).filter(|end| !ends.contains(end)) {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
    }
}
