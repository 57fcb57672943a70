//! The content of an open file: below, above, or a part of each.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use fsnap_backend::{Content, data_in};
use rustix::fs::{FallocateFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;

use super::Result;
use super::below::{self, LowerContent};
use super::store::Keys;

/// An open regular file, shared by all handles on it.
///
/// It follows the file: when the file is copied up, handles that were opened before read the new content.
#[derive(Debug)]
pub struct OpenFile {
    source: RwLock<Source>,
    /// Held for a write to a file that is partly below: its first and last blocks are read before they are written.
    writing: Mutex<()>,
    gate: Arc<Gate>,
}

/// What every change of a content passes through: closed while a layer is sealed.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) changes: RwLock<()>,
    /// A layer was sealed and has not been synced since.
    pub(super) unsettled: AtomicBool,
    /// Any file of the store's file system.
    pub(super) store: Arc<OwnedFd>,
}

impl Gate {
    pub(super) fn new(store: Arc<OwnedFd>) -> Self {
        Self { changes: RwLock::default(), unsettled: AtomicBool::new(false), store }
    }

    fn enter(&self) -> std::sync::RwLockReadGuard<'_, ()> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a layer was sealed, the first who wants something durable makes all of it so: it may lie in a layer that the disk does not
    /// have yet. Tells whether that was done.
    pub(super) fn settle(&self) -> Result<bool> {
        if !self.unsettled.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.unsettled.store(false, Ordering::Release);
        rustix::fs::syncfs(&self.store).inspect_err(|_| self.unsettled.store(true, Ordering::Release))?;
        Ok(true)
    }
}

/// A file that has to be copied up before it is written.
fn below() -> Errno {
    Errno::ROFS
}

/// Where the bytes are.
#[derive(Debug)]
pub(super) enum Source {
    /// In the lower, unchanged.
    Lower(LowerContent),
    /// In the upper, all of them.
    Whole(Arc<File>),
    /// In the upper as far as they were written, else in the lower.
    Partial(Partial),
    /// Where they were when the layer was sealed, never to be written again.
    Sealed(Box<Source>),
}

/// A file of the upper whose holes stand for the content of one of the lower.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) file: Arc<File>,
    pub(super) lower: LowerContent,
    /// From here on, a hole is a hole. The file was never shorter since it was copied up.
    pub(super) valid: u64,
    pub(super) block: u64,
    pub(super) keys: Keys,
    /// The lower file's path, as the attribute has it.
    pub(super) path: Vec<u8>,
}

/// What is copied at once.
const CHUNK: u64 = 1 << 20;
/// Longer ranges are not filled with zeros; the file is completed, so that the file system can punch them.
const MOST_ZEROS: u64 = 8 << 20;

fn io_errno(error: io::Error) -> Errno {
    below::io_errno(&error)
}

/// Copies a whole content, holes left out.
pub(super) fn copy_all(from: &LowerContent, to: &OwnedFd) -> Result<()> {
    rustix::fs::ftruncate(to, from.length())?;
    let mut at = 0;
    while let Some(data) = from.data_after(at)? {
        at = data.start;
        while at < data.end {
            let mut buffer = vec![0; CHUNK.min(data.end - at) as usize];
            let read = from.read(&mut buffer, at)?;
            if read == 0 {
                return Ok(());
            }
            let mut written = 0;
            while written < read {
                written += rustix::io::pwrite(to, &buffer[written..read], at + written as u64)?;
            }
            at += read as u64;
        }
    }
    Ok(())
}

/// What the attribute of a file that is in the upper by parts says: up to where its holes stand for the file below, and which that is.
pub(super) fn parts_of(value: &[u8], size: u64) -> Result<(u64, Vec<u8>)> {
    let space = value.iter().position(|&byte| byte == b' ').ok_or(Errno::IO)?;
    let valid = std::str::from_utf8(&value[..space]).map_err(|_| Errno::IO)?;
    // A server that was killed between the two steps of making it shorter had done the first.
    let valid = u64::from_str_radix(valid, 16).map_err(|_| Errno::IO)?.min(size);
    Ok((valid, value[space + 1..].to_vec()))
}

/// Writes the parts that `file` has into `below`, for whose content up to `valid` its holes stand: both read the same afterwards.
pub(super) fn write_parts_back(file: &File, valid: u64, below: &File, keys: Keys) -> Result<()> {
    let (size, end) = (file.metadata().map_err(io_errno)?.len(), below.metadata().map_err(io_errno)?.len());
    if let Some(value) = super::object::xattr_of(below, &keys.partial())? {
        let (own, path) = parts_of(&value, end)?;
        if own > valid {
            let value = [format!("{valid:x} ").as_bytes(), &path].concat();
            rustix::fs::fsetxattr(below, keys.partial(), &value, XattrFlags::empty())?;
        }
    }
    rustix::fs::ftruncate(below, end.min(valid))?;
    rustix::fs::ftruncate(below, size)?;
    let mut at = 0;
    let mut buffer = vec![0; CHUNK as usize];
    while let Some(data) = next_data(file, at)?.filter(|&data| data < size) {
        at = data;
        let end = rustix::fs::seek(file, SeekFrom::Hole(at))?.min(size);
        while at < end {
            let length = CHUNK.min(end - at) as usize;
            let read = read_file(file, &mut buffer[..length], at)?;
            if read == 0 {
                return Err(Errno::IO);
            }
            below.write_all_at(&buffer[..read], at).map_err(io_errno)?;
            at += read as u64;
        }
    }
    Ok(())
}

/// The first offset at or after `at` that is no hole.
fn next_data(file: impl AsFd, at: u64) -> Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => Ok(None),
        found => found.map(Some),
    }
}

impl Partial {
    /// Reads from both layers; short only at the end of the file.
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let size = self.file.metadata().map_err(io_errno)?.len();
        let end = size.min(offset.saturating_add(buffer.len() as u64));
        let mut at = offset;
        while at < end {
            let data = next_data(&*self.file, at)?.unwrap_or(end).min(end);
            if data > at {
                let (from, to) = ((at - offset) as usize, (data - offset) as usize);
                self.read_lower(&mut buffer[from..to], at)?;
                at = data;
                continue;
            }
            let hole = rustix::fs::seek(&*self.file, SeekFrom::Hole(at))?.min(end);
            let (from, to) = ((at - offset) as usize, (hole - offset) as usize);
            let read = self.file.read_at(&mut buffer[from..to], at).map_err(io_errno)?;
            if read == 0 {
                break;
            }
            at += read as u64;
        }
        Ok(at.saturating_sub(offset) as usize)
    }

    fn read_lower(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let wanted = (self.valid.saturating_sub(offset)).min(buffer.len() as u64) as usize;
        let (below, beyond) = buffer.split_at_mut(wanted);
        self.lower.read_exact(below, offset)?;
        beyond.fill(0);
        Ok(())
    }

    fn is_below(&self, block: u64) -> Result<bool> {
        Ok(block < self.valid && next_data(&*self.file, block)? != Some(block))
    }

    /// Writes whole blocks: what surrounds the data in the first and the last one is brought up with it.
    fn write(&self, data: &[u8], offset: u64) -> Result<usize> {
        let size = self.file.metadata().map_err(io_errno)?.len();
        let end = offset + data.len() as u64;
        let (first, last) = (offset - offset % self.block, end - end % self.block);
        let mut whole = Vec::new();
        let mut start = offset;
        if first < offset && self.is_below(first)? {
            whole.resize((offset - first) as usize, 0);
            let read = self.read(&mut whole, first)?;
            whole[read..].fill(0);
            start = first;
        }
        let tail_end = size.min(last + self.block);
        let tail = if last < end && end < tail_end && self.is_below(last)? {
            let mut tail = vec![0; (tail_end - end) as usize];
            self.read(&mut tail, end)?;
            tail
        } else {
            Vec::new()
        };
        if whole.is_empty() && tail.is_empty() {
            return self.file.write_at(data, offset).map_err(io_errno);
        }
        whole.extend_from_slice(data);
        whole.extend_from_slice(&tail);
        self.file.write_all_at(&whole, start).map_err(io_errno)?;
        Ok(data.len())
    }

    fn truncate(&mut self, size: u64) -> Result<()> {
        rustix::fs::ftruncate(&*self.file, size)?;
        if size < self.valid {
            self.valid = size;
            let mut value = format!("{size:x} ").into_bytes();
            value.extend_from_slice(&self.path);
            rustix::fs::fsetxattr(&*self.file, self.keys.partial(), &value, XattrFlags::empty())?;
        }
        Ok(())
    }

    /// Brings the rest up.
    pub(super) fn complete(&self) -> Result<()> {
        let mut at = 0;
        while at < self.valid {
            let above = next_data(&*self.file, at)?.unwrap_or(self.valid).min(self.valid);
            self.bring_up(at, above)?;
            at = above;
            if at < self.valid {
                at = rustix::fs::seek(&*self.file, SeekFrom::Hole(at))?;
            }
        }
        rustix::fs::fdatasync(&*self.file)?;
        rustix::fs::fremovexattr(&*self.file, self.keys.partial())
    }

    /// Copies what is below in a range of which nothing is above. Holes stay holes.
    fn bring_up(&self, mut at: u64, end: u64) -> Result<()> {
        while let Some(data) = self.lower.data_after(at)?.filter(|data| data.start < end) {
            let hole = data.end.min(end);
            at = data.start;
            while at < hole {
                let mut buffer = vec![0; CHUNK.min(hole - at) as usize];
                self.read_lower(&mut buffer, at)?;
                self.file.write_all_at(&buffer, at).map_err(io_errno)?;
                at += buffer.len() as u64;
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, end: u64) -> Result<()> {
        let mut at = offset;
        while at < end {
            let zeros = vec![0; CHUNK.min(end - at) as usize];
            at += self.write(&zeros, at)? as u64;
        }
        Ok(())
    }

    /// As [`Source::data_after`]. The lower is asked once: it may be a file in parts as well, and so on downwards.
    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let size = self.file.metadata().map_err(io_errno)?.len();
        let above = data_in(&self.file, size, offset).map_err(io_errno)?;
        let valid = self.valid.min(size);
        let lower = if offset < valid { self.lower.data_after(offset)? } else { None };
        let lower = lower.filter(|data| data.start < valid).map(|data| data.start..data.end.min(valid));
        Ok(match (above, lower) {
            (Some(one), Some(other)) => {
                let (first, second) = if one.start <= other.start { (one, other) } else { (other, one) };
                let joined = if second.start <= first.end { first.end.max(second.end) } else { first.end };
                Some(first.start..joined)
            }
            (one, other) => one.or(other),
        })
    }
}

impl Source {
    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        match self {
            Self::Lower(content) => content.read(buffer, offset),
            Self::Whole(file) => read_file(file, buffer, offset),
            Self::Partial(partial) => partial.read(buffer, offset),
            Self::Sealed(sealed) => sealed.read(buffer, offset),
        }
    }

    /// The first range at or after `offset` that is no hole; another may follow it at once.
    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        match self {
            Self::Lower(content) => content.data_after(offset),
            Self::Whole(file) => data_in(file, self.length()?, offset).map_err(io_errno),
            Self::Partial(partial) => partial.data_after(offset),
            Self::Sealed(sealed) => sealed.data_after(offset),
        }
    }

    fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        fsnap_backend::seek(self.length()?, offset, hole, |at| self.data_after(at))?.ok_or(Errno::NXIO)
    }

    /// The file of the upper; `None` where it was never written.
    fn written(&self) -> Option<Arc<File>> {
        match self {
            Self::Lower(_) => None,
            Self::Whole(file) => Some(file.clone()),
            Self::Partial(partial) => Some(partial.file.clone()),
            Self::Sealed(sealed) => sealed.written(),
        }
    }

    /// The file that holds exactly these bytes, if there is one.
    pub(super) fn as_file(&self) -> Option<&File> {
        match self {
            Self::Lower(content) => content.as_file(),
            Self::Whole(file) => Some(file),
            Self::Partial(_) => None,
            Self::Sealed(sealed) => sealed.as_file(),
        }
    }

    pub(super) fn length(&self) -> Result<u64> {
        match self {
            Self::Lower(content) => Ok(content.length()),
            Self::Whole(file) => Ok(file.metadata().map_err(io_errno)?.len()),
            Self::Partial(partial) => Ok(partial.file.metadata().map_err(io_errno)?.len()),
            Self::Sealed(sealed) => sealed.length(),
        }
    }
}

/// A content that never changes, for whoever reads a sealed state.
impl Content for Source {
    fn len(&self) -> u64 {
        self.length().unwrap_or(0)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(self.read(buffer, offset)?)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Self::data_after(self, offset)?)
    }

    fn as_file(&self) -> Option<&File> {
        Self::as_file(self)
    }
}

fn read_file(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_errno(error)),
        }
    }
    Ok(done)
}

impl OpenFile {
    pub(super) fn new(source: Source, gate: Arc<Gate>) -> Self {
        Self { source: RwLock::new(source), writing: Mutex::new(()), gate }
    }

    /// The layer that it was written to is sealed.
    pub(super) fn seal(&self) {
        let mut source = self.source.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(*source, Source::Whole(_) | Source::Partial(_)) {
            let nothing = Source::Sealed(Box::new(Source::Lower(LowerContent::Content(Box::new(Nothing)))));
            *source = Source::Sealed(Box::new(std::mem::replace(&mut *source, nothing)));
        }
    }

    /// Whether it has to be copied up before it can be written.
    pub(super) fn is_below(&self) -> bool {
        matches!(*self.source(), Source::Lower(_) | Source::Sealed(_))
    }

    /// The file has been copied up.
    pub(super) fn replace(&self, source: Source) {
        *self.source.write().unwrap_or_else(PoisonError::into_inner) = source;
    }

    fn source(&self) -> std::sync::RwLockReadGuard<'_, Source> {
        self.source.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of the upper that has the whole content, and will have it for as long as the file is open.
    pub fn whole(&self) -> Option<Arc<File>> {
        match &*self.source() {
            Source::Whole(file) => Some(file.clone()),
            _ => None,
        }
    }

    /// The length of a content that nobody has written to.
    pub fn unwritten(&self) -> Option<u64> {
        match &*self.source() {
            Source::Lower(content) => Some(content.length()),
            _ => None,
        }
    }

    /// Reads at `offset`; fewer bytes than asked for only at the end.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        self.source().read(buffer, offset)
    }

    /// Writes at `offset`.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<usize> {
        let _open = self.gate.enter();
        match &*self.source() {
            Source::Lower(_) | Source::Sealed(_) => Err(below()),
            Source::Whole(file) => file.write_all_at(data, offset).map(|()| data.len()).map_err(io_errno),
            Source::Partial(partial) => {
                let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
                partial.write(data, offset)
            }
        }
    }

    /// Makes what was written durable.
    pub fn sync(&self, content_only: bool) -> Result<()> {
        let Some(file) = self.source().written() else { return Ok(()) };
        if self.gate.settle()? {
            return Ok(());
        }
        if content_only { rustix::fs::fdatasync(&*file) } else { rustix::fs::fsync(&*file) }
    }

    pub(super) fn truncate(&self, size: u64) -> Result<()> {
        match &mut *self.source.write().unwrap_or_else(PoisonError::into_inner) {
            Source::Lower(_) | Source::Sealed(_) => Err(below()),
            Source::Whole(file) => rustix::fs::ftruncate(&**file, size),
            Source::Partial(partial) => partial.truncate(size),
        }
    }

    /// `fallocate(2)`.
    pub(super) fn allocate(&self, mode: u32, offset: u64, length: u64) -> Result<()> {
        let _open = self.gate.enter();
        let flags = FallocateFlags::from_bits_retain(mode);
        let removes = FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let shifts = FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE;
        let mut source = self.source.write().unwrap_or_else(PoisonError::into_inner);
        let mut offset = offset;
        let end = offset.checked_add(length).ok_or(Errno::FBIG)?;
        if let Source::Partial(partial) = &mut *source {
            let below = partial.valid.min(end).saturating_sub(offset);
            if flags.intersects(shifts) || (flags.intersects(removes) && below > MOST_ZEROS) {
                partial.complete()?;
                let file = partial.file.clone();
                *source = Source::Whole(file);
            } else if flags.intersects(removes) && below > 0 {
                partial.zero(offset, offset + below)?;
                offset += below;
            }
        }
        match &*source {
            Source::Lower(_) | Source::Sealed(_) => Err(below()),
            _ if offset == end => Ok(()),
            Source::Whole(file) => rustix::fs::fallocate(&**file, flags, offset, end - offset),
            Source::Partial(partial) => rustix::fs::fallocate(&*partial.file, flags, offset, end - offset),
        }
    }

    /// `lseek(2)` with `SEEK_DATA` or `SEEK_HOLE`.
    pub fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        self.source().seek(offset, hole)
    }

    /// Copies from another file, or from this one, as much as can be done at once.
    pub(super) fn copy_from(self: &Arc<Self>, other: &Arc<Self>, from: u64, to: u64, length: u64) -> Result<u64> {
        if !Arc::ptr_eq(self, other) {
            let _open = self.gate.enter();
            let (source, target) = (other.source(), self.source());
            if let (Some(file), Source::Whole(target)) = (source.as_file(), &*target) {
                let (mut from, mut to) = (from, to);
                let copied = copy_range(file, &mut from, target, &mut to, length);
                if !matches!(copied, Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP)) {
                    return copied;
                }
            }
        }
        let mut buffer = vec![0; length.min(CHUNK) as usize];
        let read = other.read(&mut buffer, from)?;
        let mut written = 0;
        while written < read {
            written += self.write(&buffer[written..read], to + written as u64)?;
        }
        Ok(read as u64)
    }
}

/// No bytes at all.
#[derive(Debug)]
struct Nothing;

impl Content for Nothing {
    fn len(&self) -> u64 {
        0
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn data_after(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }
}

fn copy_range(from: &File, at: &mut u64, to: &File, target: &mut u64, length: u64) -> Result<u64> {
    let length = usize::try_from(length).unwrap_or(usize::MAX).min(1 << 30);
    Ok(rustix::fs::copy_file_range(from, Some(at), to, Some(target), length)? as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn in_memory(length: u64) -> File {
        let file = rustix::fs::memfd_create("content", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, length).unwrap();
        file.into()
    }

    fn partial(file: Arc<File>, lower: LowerContent, valid: u64) -> Partial {
        let keys = super::super::store::keys_of_ours();
        Partial { file, lower, valid, block: 4096, keys, path: Vec::new() }
    }

    /// A content that counts how often it is asked for its data.
    #[derive(Debug)]
    struct Counted(Vec<u8>, Arc<AtomicUsize>);

    impl Content for Counted {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let rest = &self.0[self.0.len().min(offset as usize)..];
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            Ok(length)
        }

        fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            self.1.fetch_add(1, Ordering::SeqCst);
            Ok((offset < self.len()).then(|| offset..self.len()))
        }
    }

    /// A branch of a branch of a branch: each of them reads the one below as a content.
    #[test]
    fn what_lies_deep_is_asked_once_for_its_data() {
        const DEPTH: usize = 32;
        const LENGTH: u64 = 1 << 20;
        let asked = Arc::new(AtomicUsize::new(0));
        let mut whole = Source::Lower(LowerContent::Content(Box::new(Counted(vec![1; 4096], asked.clone()))));
        let mut parts =
            Source::Lower(LowerContent::Content(Box::new(Counted(vec![1; LENGTH as usize], asked.clone()))));
        for level in 0..DEPTH {
            whole = Source::Lower(LowerContent::Content(Box::new(whole)));
            let above = in_memory(LENGTH);
            above.write_all_at(&[2; 4096], 8192 * level as u64).unwrap();
            parts = Source::Partial(partial(Arc::new(above), LowerContent::Content(Box::new(parts)), LENGTH));
        }
        assert_eq!(whole.data_after(0).unwrap(), Some(0..4096));
        assert_eq!(asked.swap(0, Ordering::SeqCst), 1);
        assert_eq!(parts.seek(0, true).unwrap(), LENGTH);
        assert_eq!(parts.seek(0, false).unwrap(), 0);
        let asked = asked.load(Ordering::SeqCst);
        assert!(asked <= 2 * DEPTH, "{asked}");
    }

    /// Wherever the pieces of two layers meet, overlap or end, what is told is what is read.
    #[test]
    fn data_are_where_either_layer_has_them() {
        const BLOCK: u64 = 4096;
        for shape in 0_u32..1 << 10 {
            let (below, above) = (in_memory(5 * BLOCK), in_memory(5 * BLOCK));
            for block in 0..5_u32 {
                for (file, bit) in [(&below, block), (&above, block + 5)] {
                    if shape & (1 << bit) != 0 {
                        file.write_all_at(&[1; BLOCK as usize], u64::from(block) * BLOCK).unwrap();
                    }
                }
            }
            let valid = 4 * BLOCK;
            let source = Source::Partial(partial(Arc::new(above), LowerContent::File(below, 5 * BLOCK), valid));
            let mut told = 0;
            let mut at = 0;
            while let Some(data) = source.data_after(at).unwrap() {
                assert!(at <= data.start && data.start < data.end && data.end <= 5 * BLOCK, "{shape:b}: {data:?}");
                (data.start / BLOCK..data.end / BLOCK).for_each(|block| told |= 1_u32 << block);
                at = data.end;
            }
            // From `valid` on, what is below does not show.
            assert_eq!(told, (shape >> 5) | (shape & 0b1111), "{shape:b}");
            for block in 0..5_u64 {
                let from = block * BLOCK;
                let next = |hole: bool| (block..5).find(|block| (told & (1 << block) == 0) == hole);
                let hole = next(true).map_or(5 * BLOCK, |block| block * BLOCK);
                assert_eq!(source.seek(from, true), Ok(hole), "{shape:b}");
                assert_eq!(
                    source.seek(from, false),
                    next(false).map(|block| block * BLOCK).ok_or(Errno::NXIO),
                    "{shape:b}"
                );
            }
        }
    }

    #[test]
    fn what_is_brought_up_keeps_its_holes() {
        const LENGTH: u64 = 3 << 20;
        let (below, above) = (in_memory(LENGTH), Arc::new(in_memory(LENGTH)));
        below.write_all_at(&[b'x'; 8192], 1 << 20).unwrap();
        above.write_all_at(&[b'y'; 4096], 0).unwrap();
        let partial = partial(above.clone(), LowerContent::File(below, LENGTH), LENGTH);
        partial.bring_up(4096, LENGTH).unwrap();
        let mut content = vec![0; LENGTH as usize];
        above.read_exact_at(&mut content, 0).unwrap();
        let expected = |at: usize| match at {
            0..0x1000 => b'y',
            0x10_0000..0x10_2000 => b'x',
            _ => 0,
        };
        assert!(content.iter().enumerate().all(|(at, &byte)| byte == expected(at)));
        assert_eq!(next_data(&*above, 4096).unwrap(), Some(1 << 20), "the hole before the data was filled");
        assert_eq!(next_data(&*above, (1 << 20) + 8192).unwrap(), None, "the hole behind the data was filled");
    }
}
