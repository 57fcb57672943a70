//! The record of one directory: its attributes, and those of everything in it.
//!
//! A record is canonical bytes, named by their BLAKE3 hash. The entry of a subdirectory holds the hash and the place of
//! that directory's record, so the records of a snapshot form a Merkle tree: a directory in and below which nothing
//! changed is the same record in the next snapshot, and costs it nothing.
//!
//! ```text
//! record  := version (1 byte) batches own count (varint) entry*
//! batches := count (varint) batch id (16 bytes)*          the batches that this record refers to, by their index
//! own     := item                                         the directory itself; its name is empty
//! entry   := item body                                    sorted by name, each name once
//! item    := name (bytes) flags (2 bytes) ino (signed, less the ino before)
//!            [mode uid gid nlink rdev (varints)]          unless equal to the item before
//!            size (varint) ctime [mtime] [atime] [btime] [xattrs]
//! time    := seconds (signed; of an entry: less those of the directory's mtime) nanoseconds (varint)
//! xattrs  := count (varint) (name value (bytes))*         sorted by name
//! body    := file:    0, or 1 + batch index (varint), 2 × number + (1 if a patch) (varint)
//!            dir:     batch index, offset, length (varints), hash (32 bytes)
//!            symlink: target (bytes)
//!            others:  nothing
//! ```

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use fsnap_backend::{FileKind, FileMeta, Timestamp, Xattrs};

use crate::format::{Malformed, Parsed, Reader, Writer};

/// The only version there is; see the version rule in [`crate::format`].
const RECORD_VERSION: u8 = 1;

/// Names what one snapshot added to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct BatchId(pub(crate) [u8; 16]);

impl std::fmt::Display for BatchId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Where a record lies, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RecordRef {
    pub(crate) batch: BatchId,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    pub(crate) hash: [u8; 32],
}

/// Where the content of a regular file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ContentRef {
    pub(crate) batch: BatchId,
    pub(crate) number: u64,
    pub(crate) form: Form,
}

/// How a content is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Form {
    /// As a file of exactly these bytes.
    Whole,
    /// As the difference to another content.
    Patch,
}

/// One directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) meta: FileMeta,
    pub(crate) xattrs: Xattrs,
    pub(crate) items: Vec<Item>,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) name: OsString,
    pub(crate) meta: FileMeta,
    /// It may have been changed after it was read without its times telling: see [`crate::walk`].
    pub(crate) racy: bool,
    /// Empty for a directory, whose own record has them.
    pub(crate) xattrs: Xattrs,
    pub(crate) body: Body,
}

/// What only entries of one kind have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// A regular file; an empty one has no content.
    File(Option<ContentRef>),
    Dir(RecordRef),
    Symlink(OsString),
    /// A fifo, socket or device.
    Node,
}

impl Record {
    /// The entry `name`.
    pub(crate) fn item(&self, name: &OsStr) -> Option<&Item> {
        let at = self.items.binary_search_by(|item| item.name.as_bytes().cmp(name.as_bytes())).ok()?;
        self.items.get(at)
    }
}

const RACY: u8 = 1 << 3;
const HAS_XATTRS: u8 = 1 << 4;
const LIKE_BEFORE: u8 = 1 << 5;
const HAS_BTIME: u8 = 1 << 6;
const KIND: u8 = 0b111;

const MTIME_IS_CTIME: u8 = 1;
const ATIME_IS_MTIME: u8 = 1 << 1;
const BTIME_IS_MTIME: u8 = 1 << 2;

fn kind_bits(kind: FileKind) -> u8 {
    match kind {
        FileKind::File => 0,
        FileKind::Dir => 1,
        FileKind::Symlink => 2,
        FileKind::Fifo => 3,
        FileKind::Socket => 4,
        FileKind::CharDevice => 5,
        FileKind::BlockDevice => 6,
    }
}

fn kind_of(bits: u8) -> Parsed<FileKind> {
    Ok(match bits {
        0 => FileKind::File,
        1 => FileKind::Dir,
        2 => FileKind::Symlink,
        3 => FileKind::Fifo,
        4 => FileKind::Socket,
        5 => FileKind::CharDevice,
        6 => FileKind::BlockDevice,
        _ => return Err(Malformed("a file has an unknown kind")),
    })
}

/// What an item repeats of the one before it.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
struct Common {
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u32,
    rdev: u64,
}

impl From<&FileMeta> for Common {
    fn from(meta: &FileMeta) -> Self {
        Self { mode: meta.mode, uid: meta.uid, gid: meta.gid, nlink: meta.nlink, rdev: meta.rdev }
    }
}

#[derive(Default)]
struct Context {
    common: Common,
    ino: u64,
    /// What seconds count from: 0 for the directory itself, then its mtime, since most of the times in it lie near.
    epoch: i64,
}

/// Writes the record of a directory.
pub(crate) fn encode(meta: &FileMeta, xattrs: &Xattrs, items: &[Item]) -> Vec<u8> {
    let mut batches: Vec<BatchId> = Vec::new();
    let mut index = HashMap::new();
    for item in items {
        let batch = match &item.body {
            Body::File(Some(content)) => content.batch,
            Body::Dir(record) => record.batch,
            _ => continue,
        };
        index.entry(batch).or_insert_with(|| {
            batches.push(batch);
            batches.len() as u64 - 1
        });
    }
    let mut writer = Writer(Vec::with_capacity(64 + items.len() * 56));
    writer.byte(RECORD_VERSION);
    writer.varint(batches.len() as u64);
    batches.iter().for_each(|batch| writer.raw(&batch.0));
    let mut context = Context::default();
    encode_item(&mut writer, &mut context, OsStr::new(""), meta, false, xattrs);
    context.epoch = meta.mtime.seconds;
    writer.varint(items.len() as u64);
    for item in items {
        encode_item(&mut writer, &mut context, &item.name, &item.meta, item.racy, &item.xattrs);
        match &item.body {
            Body::File(None) => writer.varint(0),
            Body::File(Some(content)) => {
                writer.varint(1 + index[&content.batch]);
                writer.varint(content.number << 1 | u64::from(content.form == Form::Patch));
            }
            Body::Dir(record) => {
                writer.varint(index[&record.batch]);
                writer.varint(record.offset);
                writer.varint(record.length.into());
                writer.raw(&record.hash);
            }
            Body::Symlink(target) => writer.bytes(target.as_bytes()),
            Body::Node => {}
        }
    }
    writer.0
}

fn encode_item(writer: &mut Writer, context: &mut Context, name: &OsStr, meta: &FileMeta, racy: bool, xattrs: &Xattrs) {
    let flag = |set: bool, bit: u8| if set { bit } else { 0 };
    let common = Common::from(meta);
    let like_before = common == context.common;
    writer.bytes(name.as_bytes());
    writer.byte(
        kind_bits(meta.kind)
            | flag(racy, RACY)
            | flag(!xattrs.is_empty(), HAS_XATTRS)
            | flag(like_before, LIKE_BEFORE)
            | flag(meta.btime.is_some(), HAS_BTIME),
    );
    writer.byte(
        flag(meta.mtime == meta.ctime, MTIME_IS_CTIME)
            | flag(meta.atime == meta.mtime, ATIME_IS_MTIME)
            | flag(meta.btime == Some(meta.mtime), BTIME_IS_MTIME),
    );
    writer.signed(meta.ino.wrapping_sub(context.ino) as i64);
    if !like_before {
        for number in [common.mode, common.uid, common.gid, common.nlink] {
            writer.varint(number.into());
        }
        writer.varint(common.rdev);
    }
    writer.varint(meta.size);
    let mut time = |time: Timestamp| {
        writer.signed(time.seconds.wrapping_sub(context.epoch));
        writer.varint(time.nanoseconds.into());
    };
    time(meta.ctime);
    if meta.mtime != meta.ctime {
        time(meta.mtime);
    }
    if meta.atime != meta.mtime {
        time(meta.atime);
    }
    if let Some(btime) = meta.btime.filter(|&btime| btime != meta.mtime) {
        time(btime);
    }
    if !xattrs.is_empty() {
        writer.varint(xattrs.len() as u64);
        for (name, value) in xattrs {
            writer.bytes(name.as_bytes());
            writer.bytes(value);
        }
    }
    context.common = common;
    context.ino = meta.ino;
}

/// Reads a record.
pub(crate) fn decode(bytes: &[u8]) -> Parsed<Record> {
    let mut reader = Reader::new(bytes);
    if reader.byte()? != RECORD_VERSION {
        return Err(Malformed("a record has an unknown version"));
    }
    let count = reader.count(16)?;
    let batches = (0..count).map(|_| reader.array().map(BatchId)).collect::<Parsed<Vec<_>>>()?;
    let batch = |index: u64| -> Parsed<BatchId> {
        usize::try_from(index).ok().and_then(|at| batches.get(at)).copied().ok_or(Malformed("a batch is not listed"))
    };
    let mut context = Context::default();
    let own = decode_item(&mut reader, &mut context)?;
    if own.meta.kind != FileKind::Dir || !own.name.is_empty() {
        return Err(Malformed("a record is not of a directory"));
    }
    context.epoch = own.meta.mtime.seconds;
    let count = reader.count(8)?;
    let mut items: Vec<Item> = Vec::with_capacity(count);
    for _ in 0..count {
        let mut item = decode_item(&mut reader, &mut context)?;
        let name = item.name.as_bytes();
        let follows = items.last().is_none_or(|before| before.name.as_bytes() < name);
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) || !follows {
            return Err(Malformed("a name is not allowed, or not in order"));
        }
        item.body = match item.meta.kind {
            FileKind::File => Body::File(match reader.varint()? {
                0 => None,
                index => {
                    let number = reader.varint()?;
                    let form = if number & 1 == 0 { Form::Whole } else { Form::Patch };
                    Some(ContentRef { batch: batch(index - 1)?, number: number >> 1, form })
                }
            }),
            FileKind::Dir => Body::Dir(RecordRef {
                batch: batch(reader.varint()?)?,
                offset: reader.varint()?,
                length: reader.small()?,
                hash: reader.array()?,
            }),
            FileKind::Symlink => Body::Symlink(OsString::from_vec(reader.bytes()?.to_vec())),
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => Body::Node,
        };
        items.push(item);
    }
    reader.end()?;
    Ok(Record { meta: own.meta, xattrs: own.xattrs, items })
}

fn decode_item(reader: &mut Reader<'_>, context: &mut Context) -> Parsed<Item> {
    let name = OsString::from_vec(reader.bytes()?.to_vec());
    let [flags, times] = reader.array()?;
    let kind = kind_of(flags & KIND)?;
    if flags >> 7 != 0 || times >> 3 != 0 {
        return Err(Malformed("a flag is unknown"));
    }
    let ino = context.ino.wrapping_add(reader.signed()? as u64);
    if flags & LIKE_BEFORE == 0 {
        context.common = Common {
            mode: reader.small()?,
            uid: reader.small()?,
            gid: reader.small()?,
            nlink: reader.small()?,
            rdev: reader.varint()?,
        };
    }
    let Common { mode, uid, gid, nlink, rdev } = context.common;
    if mode > 0o7777 {
        return Err(Malformed("a mode is not allowed"));
    }
    let size = reader.varint()?;
    let mut time = || -> Parsed<Timestamp> {
        let seconds = context.epoch.wrapping_add(reader.signed()?);
        let nanoseconds = reader.small()?;
        if nanoseconds > 999_999_999 {
            return Err(Malformed("a time is not allowed"));
        }
        Ok(Timestamp { seconds, nanoseconds })
    };
    let ctime = time()?;
    let mtime = if times & MTIME_IS_CTIME == 0 { time()? } else { ctime };
    let atime = if times & ATIME_IS_MTIME == 0 { time()? } else { mtime };
    let btime = match (flags & HAS_BTIME != 0, times & BTIME_IS_MTIME != 0) {
        (true, true) => Some(mtime),
        (true, false) => Some(time()?),
        (false, false) => None,
        (false, true) => return Err(Malformed("a time of birth contradicts itself")),
    };
    let mut xattrs = Xattrs::new();
    if flags & HAS_XATTRS != 0 {
        let count = reader.count(2)?;
        xattrs.reserve_exact(count);
        for _ in 0..count {
            let name = reader.bytes()?;
            if name.is_empty() || name.contains(&0) {
                return Err(Malformed("an attribute's name is not allowed"));
            }
            xattrs.push((OsString::from_vec(name.to_vec()), reader.bytes()?.to_vec()));
        }
    }
    context.ino = ino;
    let meta = FileMeta { kind, ino, nlink, mode, uid, gid, rdev, size, atime, mtime, ctime, btime };
    Ok(Item { name, meta, racy: flags & RACY != 0, xattrs, body: Body::Node })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time() -> impl Strategy<Value = Timestamp> {
        (prop_oneof![-5_000_000_000..5_000_000_000_i64, any::<i64>()], 0..1_000_000_000_u32)
            .prop_map(|(seconds, nanoseconds)| Timestamp { seconds, nanoseconds })
    }

    fn meta(kind: FileKind) -> impl Strategy<Value = FileMeta> {
        let numbers = (any::<u64>(), any::<u32>(), 0..=0o7777_u32, any::<(u32, u32)>(), any::<u64>(), any::<u64>());
        let times = (time(), time(), time(), proptest::option::of(time()), any::<bool>());
        (numbers, times).prop_map(move |((ino, nlink, mode, (uid, gid), rdev, size), (a, m, c, btime, alike))| {
            let (atime, mtime, ctime, btime) = if alike { (m, m, m, btime.map(|_| m)) } else { (a, m, c, btime) };
            FileMeta { kind, ino, nlink, mode, uid, gid, rdev, size, atime, mtime, ctime, btime }
        })
    }

    fn xattrs() -> impl Strategy<Value = Xattrs> {
        proptest::collection::btree_map("[a-z.]{1,9}", any::<Vec<u8>>(), 0..3)
            .prop_map(|map| map.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }

    fn batch() -> impl Strategy<Value = BatchId> {
        (0..3_u8).prop_map(|byte| BatchId([byte; 16]))
    }

    fn item() -> impl Strategy<Value = Item> {
        let content = (batch(), 0..1_u64 << 62, any::<bool>()).prop_map(|(batch, number, patch)| ContentRef {
            batch,
            number,
            form: if patch { Form::Patch } else { Form::Whole },
        });
        let record = (batch(), any::<(u64, u32, [u8; 32])>()).prop_map(|(batch, (offset, length, hash))| RecordRef {
            batch,
            offset,
            length,
            hash,
        });
        let body = prop_oneof![
            proptest::option::of(content).prop_map(|content| (FileKind::File, Body::File(content))),
            record.prop_map(|record| (FileKind::Dir, Body::Dir(record))),
            any::<Vec<u8>>().prop_map(|to| (FileKind::Symlink, Body::Symlink(OsString::from_vec(to)))),
            Just((FileKind::Fifo, Body::Node)),
            Just((FileKind::Socket, Body::Node)),
            Just((FileKind::CharDevice, Body::Node)),
            Just((FileKind::BlockDevice, Body::Node)),
        ];
        (body, any::<bool>(), xattrs()).prop_flat_map(|((kind, body), racy, xattrs)| {
            meta(kind).prop_map(move |meta| Item {
                name: OsString::new(),
                meta,
                racy,
                xattrs: xattrs.clone(),
                body: body.clone(),
            })
        })
    }

    fn name() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>().prop_filter("allowed", |&b| b != 0 && b != b'/'), 1..20)
            .prop_filter("allowed", |name| name != b"." && name != b"..")
    }

    /// Any record that the format can hold.
    pub(crate) fn record() -> impl Strategy<Value = Record> {
        let items = proptest::collection::btree_map(name(), item(), 0..12).prop_map(|items| {
            items.into_iter().map(|(name, item)| Item { name: OsString::from_vec(name), ..item }).collect()
        });
        (meta(FileKind::Dir), xattrs(), items).prop_map(|(meta, xattrs, items)| Record { meta, xattrs, items })
    }

    proptest! {
        #[test]
        fn a_record_comes_back(record in record()) {
            let bytes = encode(&record.meta, &record.xattrs, &record.items);
            prop_assert_eq!(decode(&bytes), Ok(record));
        }

        #[test]
        fn arbitrary_bytes_are_no_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_damaged_record_is_no_panic(
            record in record(),
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut: prop::sample::Index,
        ) {
            let mut bytes = encode(&record.meta, &record.xattrs, &record.items);
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _ = decode(&bytes);
            let _ = decode(&bytes[..cut.index(bytes.len())]);
        }
    }

    #[test]
    fn an_entry_takes_few_bytes() {
        let time = |seconds| Timestamp { seconds, nanoseconds: 123_456_789 };
        let items: Vec<_> = (0..1000_u64)
            .map(|n| Item {
                name: format!("file-{n:05}").into(),
                meta: FileMeta {
                    kind: FileKind::File,
                    ino: 1_000_000 + n,
                    nlink: 1,
                    mode: 0o644,
                    uid: 1000,
                    gid: 1000,
                    rdev: 0,
                    size: 10_000,
                    atime: time(1_700_000_000),
                    mtime: time(1_700_000_001),
                    ctime: time(1_700_000_001),
                    btime: Some(time(1_700_000_000)),
                },
                racy: false,
                xattrs: Xattrs::new(),
                body: Body::File(Some(ContentRef { batch: BatchId([7; 16]), number: n, form: Form::Whole })),
            })
            .collect();
        let own = FileMeta { kind: FileKind::Dir, ..items[0].meta };
        let each = encode(&own, &Xattrs::new(), &items).len() / items.len();
        assert!(each <= 45, "{each} bytes for one entry");
    }
}
