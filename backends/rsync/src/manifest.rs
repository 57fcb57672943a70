//! The small files of the store: what a whole snapshot is, what a begun one is, and the sums of contents.
//!
//! ```text
//! sums    := count (varint) (number, length (varints) way (1 byte; from version 2 on) sum (32 bytes))*
//! way     := 0: at once, the only one in version 1; 1: in chunks (see `chunks`)
//! table   := made*                                   in no frame: the manifest has its hash
//! made    := number, length (varints) known
//! known   := 0: nothing; 1: sum (32 bytes), computed at once; 2: whole content of the version before, of which blocks
//!            may be shared: batch id (16 bytes), number (varint)
//! ```

use std::collections::BTreeMap;

use fsnap_backend::{Identity, Locator, Omission, Timestamp};

use crate::format::{Malformed, Parsed, Reader, Writer};
use crate::record::{BatchId, ContentRef, Form, RecordRef};

/// A whole snapshot. That this file exists under its name is what makes the snapshot whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// What the snapshot added.
    pub(crate) batch: BatchId,
    /// Snapshots that may share records and contents have the same family: the batch of the first of them.
    pub(crate) family: BatchId,
    /// Of which volume.
    pub(crate) volume: Identity,
    /// When it was taken; orders the snapshots of a volume where no hint does.
    pub(crate) taken: Timestamp,
    /// The record of the volume's root.
    pub(crate) root: RecordRef,
    pub(crate) omissions: Vec<Omission>,
    /// While the snapshot is not settled, what settling needs to know.
    pub(crate) unsettled: Option<Unsettled>,
}

/// Tells whether the bytes that a snapshot wrote can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unsettled {
    /// The start of the system that wrote them: in the same, the page cache still has all of them.
    pub(crate) boot: [u8; 16],
    /// The hash of the batch's table of contents.
    pub(crate) table: [u8; 32],
}

/// A snapshot that was begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Partial {
    pub(crate) batch: BatchId,
    pub(crate) family: BatchId,
    pub(crate) volume: Identity,
    /// The snapshot that it shares with; not removed before this one ends.
    pub(crate) base: Option<Locator>,
    /// What `prime` left.
    pub(crate) primed: Option<Primed>,
}

/// What `prime` left for `snapshot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Primed {
    pub(crate) root: RecordRef,
    /// How much of the batch's records and table it wrote; what follows is of a call that was cut short.
    pub(crate) records: u64,
    pub(crate) table: u64,
    /// Just before the volume was flushed.
    pub(crate) flushed: Timestamp,
}

/// The length of a content in bytes, and its sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) length: u64,
    pub(crate) way: Way,
    pub(crate) hash: [u8; 32],
}

/// How a sum was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the first byte to the last: see [`crate::content`].
    AtOnce,
    /// See [`crate::chunks`].
    InChunks,
}

/// The sums of all contents of one batch, by number.
pub(crate) type Sums = BTreeMap<u64, Sum>;

impl Manifest {
    pub(crate) const MAGIC: &'static [u8; 8] = b"fsnapMAN";

    pub(crate) fn encode(&self) -> Writer {
        let mut writer = Writer::default();
        writer.raw(&self.batch.0);
        writer.raw(&self.family.0);
        writer.bytes(self.volume.as_str().as_bytes());
        encode_time(&mut writer, self.taken);
        encode_ref(&mut writer, &self.root);
        writer.varint(self.omissions.len() as u64);
        for omission in &self.omissions {
            writer.bytes(omission.path.as_bytes());
            writer.bytes(omission.reason.as_bytes());
        }
        match &self.unsettled {
            None => writer.byte(0),
            Some(unsettled) => {
                writer.byte(1);
                writer.raw(&unsettled.boot);
                writer.raw(&unsettled.table);
            }
        }
        writer
    }

    pub(crate) fn decode(mut reader: Reader<'_>) -> Parsed<Self> {
        let batch = BatchId(reader.array()?);
        let family = BatchId(reader.array()?);
        let volume = Identity::new(text(&mut reader)?);
        let taken = decode_time(&mut reader)?;
        let root = decode_ref(&mut reader)?;
        let count = reader.count(2)?;
        let omissions = (0..count)
            .map(|_| Ok(Omission { path: text(&mut reader)?.to_owned(), reason: text(&mut reader)?.to_owned() }))
            .collect::<Parsed<_>>()?;
        let unsettled = match reader.byte()? {
            0 => None,
            1 => Some(Unsettled { boot: reader.array()?, table: reader.array()? }),
            _ => return Err(Malformed("it is neither settled nor unsettled")),
        };
        reader.end()?;
        Ok(Self { batch, family, volume, taken, root, omissions, unsettled })
    }

    /// What a caller knows the snapshot by.
    pub(crate) fn identity(&self) -> Identity {
        Identity::new(format!("rsync:{}", self.batch))
    }
}

impl Partial {
    pub(crate) const MAGIC: &'static [u8; 8] = b"fsnapPAR";

    pub(crate) fn encode(&self) -> Writer {
        let mut writer = Writer::default();
        writer.raw(&self.batch.0);
        writer.raw(&self.family.0);
        writer.bytes(self.volume.as_str().as_bytes());
        writer.bytes(self.base.as_ref().map_or("", Locator::as_str).as_bytes());
        match &self.primed {
            None => writer.byte(0),
            Some(primed) => {
                writer.byte(1);
                encode_ref(&mut writer, &primed.root);
                writer.varint(primed.records);
                writer.varint(primed.table);
                encode_time(&mut writer, primed.flushed);
            }
        }
        writer
    }

    pub(crate) fn decode(mut reader: Reader<'_>) -> Parsed<Self> {
        let batch = BatchId(reader.array()?);
        let family = BatchId(reader.array()?);
        let volume = Identity::new(text(&mut reader)?);
        let base = match text(&mut reader)? {
            "" => None,
            base => Some(base.parse().map_err(|_| Malformed("it names an impossible locator"))?),
        };
        let primed = match reader.byte()? {
            0 => None,
            1 => Some(Primed {
                root: decode_ref(&mut reader)?,
                records: reader.varint()?,
                table: reader.varint()?,
                flushed: decode_time(&mut reader)?,
            }),
            _ => return Err(Malformed("it is neither primed nor not")),
        };
        reader.end()?;
        Ok(Self { batch, family, volume, base, primed })
    }
}

pub(crate) const SUMS_MAGIC: &[u8; 8] = b"fsnapSUM";

pub(crate) fn encode_sums(sums: &Sums) -> Writer {
    let mut writer = Writer::default();
    writer.varint(sums.len() as u64);
    for (number, sum) in sums {
        writer.varint(*number);
        writer.varint(sum.length);
        writer.byte(match sum.way {
            Way::AtOnce => 0,
            Way::InChunks => 1,
        });
        writer.raw(&sum.hash);
    }
    writer
}

pub(crate) fn decode_sums(mut reader: Reader<'_>) -> Parsed<Sums> {
    let count = reader.count(34)?;
    let mut sums = Sums::new();
    for _ in 0..count {
        let number = reader.varint()?;
        if sums.last_key_value().is_some_and(|(&last, _)| last >= number) {
            return Err(Malformed("its numbers are not in order"));
        }
        let length = reader.varint()?;
        let way = match reader.version {
            1 => Way::AtOnce,
            _ => match reader.byte()? {
                0 => Way::AtOnce,
                1 => Way::InChunks,
                _ => return Err(Malformed("a sum was computed in an unknown way")),
            },
        };
        sums.insert(number, Sum { length, way, hash: reader.array()? });
    }
    reader.end()?;
    Ok(sums)
}

/// One line of a batch's table: a content that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) number: u64,
    pub(crate) length: u64,
    pub(crate) known: Known,
}

/// What is known of a content that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Nothing,
    /// Its sum, computed on the way and at once.
    Sum([u8; 32]),
    /// The whole content that its file had before: they may share blocks.
    Before(ContentRef),
}

impl Made {
    /// Its sum, if that is known.
    pub(crate) fn sum(&self) -> Option<[u8; 32]> {
        match self.known {
            Known::Sum(hash) => Some(hash),
            Known::Nothing | Known::Before(_) => None,
        }
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.varint(self.number);
        writer.varint(self.length);
        match &self.known {
            Known::Nothing => writer.byte(0),
            Known::Sum(hash) => {
                writer.byte(1);
                writer.raw(hash);
            }
            Known::Before(content) => {
                writer.byte(2);
                writer.raw(&content.batch.0);
                writer.varint(content.number);
            }
        }
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Parsed<Self> {
        let number = reader.varint()?;
        let length = reader.varint()?;
        let known = match reader.byte()? {
            0 => Known::Nothing,
            1 => Known::Sum(reader.array()?),
            2 => {
                let batch = BatchId(reader.array()?);
                Known::Before(ContentRef { batch, number: reader.varint()?, form: Form::Whole })
            }
            _ => return Err(Malformed("what is known of a content is unknown")),
        };
        Ok(Self { number, length, known })
    }
}

fn text<'a>(reader: &mut Reader<'a>) -> Parsed<&'a str> {
    std::str::from_utf8(reader.bytes()?).map_err(|_| Malformed("a text is not UTF-8"))
}

fn encode_time(writer: &mut Writer, time: Timestamp) {
    writer.signed(time.seconds);
    writer.varint(time.nanoseconds.into());
}

fn decode_time(reader: &mut Reader<'_>) -> Parsed<Timestamp> {
    let (seconds, nanoseconds) = (reader.signed()?, reader.small()?);
    if nanoseconds > 999_999_999 {
        return Err(Malformed("a time is not allowed"));
    }
    Ok(Timestamp { seconds, nanoseconds })
}

fn encode_ref(writer: &mut Writer, record: &RecordRef) {
    writer.raw(&record.batch.0);
    writer.varint(record.offset);
    writer.varint(record.length.into());
    writer.raw(&record.hash);
}

fn decode_ref(reader: &mut Reader<'_>) -> Parsed<RecordRef> {
    Ok(RecordRef {
        batch: BatchId(reader.array()?),
        offset: reader.varint()?,
        length: reader.small()?,
        hash: reader.array()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn root() -> RecordRef {
        RecordRef { batch: BatchId([1; 16]), offset: 7, length: 90, hash: [2; 32] }
    }

    fn manifest() -> Manifest {
        Manifest {
            batch: BatchId([1; 16]),
            family: BatchId([3; 16]),
            volume: Identity::new("volume"),
            taken: Timestamp { seconds: -1, nanoseconds: 5 },
            root: root(),
            omissions: vec![Omission { path: "a/b".into(), reason: "why".into() }],
            unsettled: Some(Unsettled { boot: [4; 16], table: [5; 32] }),
        }
    }

    fn partial() -> Partial {
        let flushed = Timestamp { seconds: 1 << 40, nanoseconds: 0 };
        Partial {
            batch: BatchId([1; 16]),
            family: BatchId([1; 16]),
            volume: Identity::new("volume"),
            base: Some("s-0".parse().unwrap()),
            primed: Some(Primed { root: root(), records: 97, table: 3, flushed }),
        }
    }

    #[test]
    fn what_is_written_comes_back() {
        let settled = Manifest { unsettled: None, ..manifest() };
        for manifest in [manifest(), settled] {
            assert_eq!(Manifest::decode(Reader::new(&manifest.encode().0)), Ok(manifest));
        }
        let begun = Partial { base: None, primed: None, ..partial() };
        for partial in [partial(), begun] {
            assert_eq!(Partial::decode(Reader::new(&partial.encode().0)), Ok(partial));
        }
        let sum = |length, way| Sum { length, way, hash: [length as u8; 32] };
        let sums = Sums::from([(0, sum(9, Way::AtOnce)), (300, sum(1, Way::InChunks))]);
        assert_eq!(decode_sums(Reader::new(&encode_sums(&sums).0)), Ok(sums));
        let before = ContentRef { batch: BatchId([7; 16]), number: 1 << 40, form: Form::Whole };
        for known in [Known::Nothing, Known::Sum([3; 32]), Known::Before(before)] {
            let (made, mut writer) = (Made { number: 300, length: 5, known }, Writer::default());
            made.encode(&mut writer);
            assert_eq!(Made::decode(&mut Reader::new(&writer.0)), Ok(made));
        }
    }

    #[test]
    fn sums_of_the_first_version_are_understood() {
        let mut writer = Writer::default();
        writer.varint(2);
        for number in [0, 300] {
            writer.varint(number);
            writer.varint(9);
            writer.raw(&[number as u8; 32]);
        }
        let sum = |byte| Sum { length: 9, way: Way::AtOnce, hash: [byte; 32] };
        let reader = Reader::of_version(&writer.0, 1);
        assert_eq!(decode_sums(reader), Ok(Sums::from([(0, sum(0)), (300, sum(44))])));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_no_panic(bytes: Vec<u8>) {
            let _ = Manifest::decode(Reader::new(&bytes));
            let _ = Partial::decode(Reader::new(&bytes));
            let _ = decode_sums(Reader::new(&bytes));
            let _ = Made::decode(&mut Reader::new(&bytes));
        }

        #[test]
        fn damaged_bytes_are_no_panic(at: prop::sample::Index, value: u8) {
            let mut bytes = manifest().encode().0;
            let index = at.index(bytes.len());
            bytes[index] = value;
            let _ = Manifest::decode(Reader::new(&bytes));
            let mut bytes = partial().encode().0;
            let index = at.index(bytes.len());
            bytes[index] = value;
            let _ = Partial::decode(Reader::new(&bytes));
        }
    }
}
