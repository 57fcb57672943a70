//! The bytes that the store's files are made of.
//!
//! # The store's format, version 2
//!
//! ```text
//! <store>/                       mode 0700
//!   fsnap-store                  frame "fsnapSTO": the store's id, 16 random bytes; from which length on a changed file
//!                                is kept as a difference (varint; missing in a store without differences)
//!   lock, sweep.lock             empty; flock(2) on them orders snapshots and removals (see `store`)
//!   batches/<batch>/             what one snapshot added; <batch> is 32 hex digits, random, never used again
//!     records                    directory records, one after the other (see `record`)
//!     table                      until settled: the contents that were made, and their sums where known
//!     sums                       frame "fsnapSUM": the sum of each content, by number (see `manifest`)
//!     <hi>/<lo>                  content number 256 × hi + lo, both in hex: exactly the file's bytes and holes
//!     <hi>/<lo>.patch            the same, as the difference to other contents (see `patch`)
//!     <hi>/<lo>.sums             frame "fsnapCHU": the sums of its chunks (see `chunks`); a missing one costs time
//!   partials/<locator>           frame "fsnapPAR": a snapshot that was begun
//!   snapshots/<locator>          frame "fsnapMAN": the manifest of a whole snapshot
//!   doomed/<locator>             the manifest of a snapshot that is being removed
//!   hints/<volume>               locator of the volume's newest snapshot; a wrong one costs time, nothing else
//!   volumes/<locator>/           a clone; `<locator>.part` and `<locator>.links` while it is made or removed
//! ```
//!
//! A *frame* is a file of its own: 8 bytes of magic, the version as 4 bytes, the payload, and the BLAKE3 hash of all
//! that, 32 bytes. Fixed-size integers are little-endian. A *varint* holds 7 bits per byte, the lowest first, the
//! highest bit of a byte saying that another follows; the shortest form is the only one. A *signed* varint maps 0, -1,
//! 1, -2 to 0, 1, 2, 3. *Bytes* are a varint of their number and themselves.
//!
//! Version rule: a reader refuses a file whose version is higher than it knows ([`Error::NewerVersion`]), and reads all
//! lower ones. Whoever changes a layout raises the version, which all frames share; nothing is ever reinterpreted.
//!
//! | version | what it brought |
//! |---|---|
//! | 1 | |
//! | 2 | sums in chunks: `<lo>.sums`, how each sum in `sums` was computed, the version before in `table` |
//!
//! Everything read is untrusted: a length is compared with what is there before anything of that size is allocated,
//! and a malformed input is an error, never a panic.

use std::path::Path;

use fsnap_backend::{Error, Result};

/// The newest version of every frame.
pub(crate) const VERSION: u32 = 2;

const MAGIC_LEN: usize = 8;
const HEAD_LEN: usize = MAGIC_LEN + 4;
const HASH_LEN: usize = 32;

/// Why some bytes are not what they should be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl Malformed {
    /// Says which object it is.
    pub(crate) fn of(self, what: impl Into<String>) -> Error {
        Error::Damaged { what: what.into(), reason: self.0.to_owned() }
    }
}

/// The result of reading untrusted bytes.
pub(crate) type Parsed<T> = std::result::Result<T, Malformed>;

/// Puts a payload into a frame.
pub(crate) fn seal(magic: &[u8; MAGIC_LEN], payload: Writer) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_LEN + payload.0.len() + HASH_LEN);
    bytes.extend_from_slice(magic);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&payload.0);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

/// Takes the payload out of a frame; `path` names it in messages.
pub(crate) fn unseal<'a>(magic: &[u8; MAGIC_LEN], bytes: &'a [u8], path: &Path) -> Result<Reader<'a>> {
    let damaged = |reason: &'static str| Malformed(reason).of(path.display().to_string());
    if bytes.len() < HEAD_LEN + HASH_LEN || &bytes[..MAGIC_LEN] != magic {
        return Err(damaged("it does not begin as it should"));
    }
    let (body, hash) = bytes.split_at(bytes.len() - HASH_LEN);
    let version = u32::from_le_bytes([body[8], body[9], body[10], body[11]]);
    // A later release may hash otherwise: its version is looked at before its hash.
    if version > VERSION {
        return Err(Error::NewerVersion { what: path.display().to_string(), found: version, supported: VERSION });
    }
    if version == 0 || blake3::hash(body).as_bytes() != hash {
        return Err(damaged("its hash is wrong"));
    }
    Ok(Reader::of_version(&body[HEAD_LEN..], version))
}

/// Builds a payload.
#[derive(Debug, Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    pub(crate) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub(crate) fn signed(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)) as u64);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }
}

/// Takes a payload apart.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    /// Of the frame; the newest for what is in none.
    pub(crate) version: u32,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self::of_version(bytes, VERSION)
    }

    /// What is in a frame of a lower version, or of this one.
    pub(crate) fn of_version(bytes: &'a [u8], version: u32) -> Self {
        Self { rest: bytes, version }
    }

    pub(crate) fn raw(&mut self, length: usize) -> Parsed<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed("it ends too early"))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(*self.raw(N)?.first_chunk().expect("exactly that many bytes were taken"))
    }

    pub(crate) fn byte(&mut self) -> Parsed<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn varint(&mut self) -> Parsed<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(Malformed("a number is too large"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return if byte == 0 && shift > 0 {
                    Err(Malformed("a number is not in its shortest form"))
                } else {
                    Ok(value)
                };
            }
        }
        Err(Malformed("a number is too long"))
    }

    pub(crate) fn signed(&mut self) -> Parsed<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A varint that fits 32 bits.
    pub(crate) fn small(&mut self) -> Parsed<u32> {
        u32::try_from(self.varint()?).map_err(|_| Malformed("a number is too large"))
    }

    pub(crate) fn bytes(&mut self) -> Parsed<&'a [u8]> {
        let length = self.varint()?;
        self.raw(usize::try_from(length).map_err(|_| Malformed("a length is too large"))?)
    }

    /// The number of things that follow, each of at least `least` bytes: never more than there is room for.
    pub(crate) fn count(&mut self, least: usize) -> Parsed<usize> {
        let count = self.varint()?;
        if count > (self.rest.len() / least) as u64 {
            return Err(Malformed("it ends too early"));
        }
        Ok(count as usize)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn end(self) -> Parsed<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed("something follows its end")) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_newer_frame_is_told_from_a_damaged_one() {
        let path = Path::new("/store/fsnap-store");
        let mut bytes = seal(b"fsnapSTO", Writer(vec![1, 2, 3]));
        assert!(unseal(b"fsnapSTO", &bytes, path).is_ok());
        assert!(matches!(unseal(b"fsnapMAN", &bytes, path), Err(Error::Damaged { .. })));
        bytes[8] = 3;
        let newer = unseal(b"fsnapSTO", &bytes, path);
        assert!(matches!(newer, Err(Error::NewerVersion { found: 3, supported: 2, .. })), "{newer:?}");
    }

    proptest! {
        #[test]
        fn numbers_come_back(number: u64, signed: i64) {
            let mut writer = Writer::default();
            writer.varint(number);
            writer.signed(signed);
            let mut reader = Reader::new(&writer.0);
            prop_assert_eq!(reader.varint(), Ok(number));
            prop_assert_eq!(reader.signed(), Ok(signed));
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn a_flipped_bit_never_passes(payload: Vec<u8>, at: prop::sample::Index, bit in 0..8) {
            let mut bytes = seal(b"fsnapSTO", Writer(payload));
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(unseal(b"fsnapSTO", &bytes, Path::new("x")).is_err());
        }

        #[test]
        fn a_number_has_one_form(bytes: Vec<u8>) {
            let mut reader = Reader::new(&bytes);
            if let Ok(number) = reader.varint() {
                let mut writer = Writer::default();
                writer.varint(number);
                prop_assert!(bytes.starts_with(&writer.0));
            }
        }
    }
}
