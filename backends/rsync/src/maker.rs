//! Taking the content of a file: shared where the file system can, else copied, or kept as a patch.
//!
//! Sharing the file's blocks (`FICLONE`) takes it as of one instant, and needs no more room. Where volume and store do not
//! lie on one file system that can, the ranges that hold data are copied; a large file of which the version before is
//! known is kept as the difference to it (see [`crate::delta`]).

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fsnap_backend::{IoContext, Result, beneath};
use rustix::io::Errno;

use crate::chunks;
use crate::content::{self, BUFFER, Live, Summer, copy, equal, open};
use crate::delta::{self, How, Old, Outcome};
use crate::manifest::{Known, Made};
use crate::record::{BatchId, ContentRef, Form};
use crate::store::{Inner, content_name};

/// Up to this size a file that is taken in the frozen window is copied: sharing the blocks of a file that was just
/// written makes the kernel write them out first, and the writers stand still meanwhile.
const COPY_WHEN_FROZEN: u64 = 64 << 10;

/// What all makers of one batch share.
#[derive(Debug)]
pub(crate) struct Making {
    pub(crate) batch: BatchId,
    /// The next directory of contents.
    next_chunk: AtomicU64,
    /// Cleared when the file system says that it cannot share blocks.
    reflinks: AtomicBool,
    /// Writers stand still.
    frozen: bool,
}

impl Making {
    /// Goes on after the contents that a batch has.
    pub(crate) fn new(store: &Inner, batch: BatchId, frozen: bool) -> Result<Self> {
        let path = store.batch_dir(batch);
        let mut next = 0;
        for entry in fs::read_dir(&path).context("list", &path)? {
            let name = entry.context("list", &path)?.file_name();
            if let Some(chunk) = name.to_str().and_then(|name| u64::from_str_radix(name, 16).ok()) {
                next = next.max(chunk + 1);
            }
        }
        Ok(Self { batch, next_chunk: AtomicU64::new(next), reflinks: AtomicBool::new(true), frozen })
    }
}

/// Makes contents for one thread.
#[derive(Debug)]
pub(crate) struct Maker<'a> {
    store: &'a Inner,
    making: &'a Making,
    /// The directory that this thread alone fills, and the next number in it.
    chunk: Option<(OwnedFd, u64)>,
    pub(crate) buffer: Vec<u8>,
    /// What was made, for the batch's table.
    pub(crate) made: Vec<Made>,
}

/// What became of a file's content.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is what the file had before.
    Kept,
    /// It was taken as of one instant; so long it is. If the file was [steady](Subject::steady), and changed meanwhile, its sum must
    /// be forgotten.
    Shared(ContentRef, u64),
    /// It was read piece by piece: whether the file changed meanwhile must be looked at.
    Copied(ContentRef),
    /// The file became shorter meanwhile.
    Torn,
}

/// The content that a file had before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    pub(crate) content: ContentRef,
    pub(crate) length: u64,
    /// Nothing says that the bytes changed since.
    pub(crate) likely_equal: bool,
}

impl Before {
    fn known(&self) -> Known {
        if self.content.form == Form::Whole { Known::Before(self.content) } else { Known::Nothing }
    }
}

/// What is taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) file: &'a File,
    /// In bytes, and not 0.
    pub(crate) length: u64,
    /// If its attributes are the same afterwards, nobody has written to it meanwhile.
    pub(crate) steady: bool,
}

impl<'a> Maker<'a> {
    pub(crate) fn new(store: &'a Inner, making: &'a Making) -> Self {
        Self { store, making, chunk: None, buffer: vec![0; BUFFER], made: Vec::new() }
    }

    /// Takes the content of a file.
    pub(crate) fn take(&mut self, subject: Subject<'_>, before: Option<Before>) -> io::Result<Taken> {
        match self.try_take(subject, before) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Taken::Torn),
            taken => taken,
        }
    }

    fn try_take(&mut self, subject: Subject<'_>, before: Option<Before>) -> io::Result<Taken> {
        let Subject { file, length, steady } = subject;
        let live = Live { file, length };
        // Sharing the blocks of a large file again is faster than reading it twice to learn that it is the same.
        if length > chunks::FROM
            && let Some(taken) = self.share(file, before.map_or(Known::Nothing, |before| before.known()))?
        {
            return Ok(taken);
        }
        // A content that cannot be opened is damaged: it is not compared with, and the file is taken anew.
        if let Some(before) = before.filter(|before| before.length == length && before.likely_equal)
            && let Ok(old) = open(self.store, &before.content, length)
            && equal(&live, &*old, &mut self.buffer)?
        {
            return Ok(Taken::Kept);
        }
        if length <= chunks::FROM
            && !(self.making.frozen && length <= COPY_WHEN_FROZEN)
            && self.making.reflinks.load(Ordering::Relaxed)
        {
            // Whoever wrote the file has left its bytes in memory; the shared content would be read from the disk.
            let sum = steady && !self.making.frozen;
            let sum = sum.then(|| content::sum(&live, &mut self.buffer)).transpose()?;
            if let Some(taken) = self.share(file, sum.map_or(Known::Nothing, Known::Sum))? {
                return Ok(taken);
            }
        }
        let delta = |before: &Before| length >= self.store.deltas_from && before.length > 0;
        if let Some(before) = before.filter(delta)
            && !self.making.reflinks.load(Ordering::Relaxed)
            && let Some(taken) = self.difference(&live, before)?
        {
            return Ok(taken);
        }
        let (content, to) = self.create(Form::Whole)?;
        let mut sum = Summer::default();
        match copy(&live, Some(&to), Some(&mut sum), &mut self.buffer) {
            Ok(()) => {
                let known = Known::Sum(sum.finish(length));
                self.made.push(Made { number: content.number, length, known });
                Ok(Taken::Copied(content))
            }
            Err(error) => {
                self.unlink(&content)?;
                Err(error)
            }
        }
    }

    /// Keeps the file as the difference to its version before; `None` if it is better kept whole.
    fn difference(&mut self, live: &Live<'_>, before: Before) -> io::Result<Option<Taken>> {
        let Ok(old) = Old::open(self.store, &before.content, before.length) else { return Ok(None) };
        let hows = if self.making.frozen { &[How::ByBlocks][..] } else { &[How::ByBlocks, How::BySearch] };
        for &how in hows {
            let (content, to) = self.create(Form::Patch)?;
            let outcome = delta::make(live, &old, &to, how, &mut self.buffer);
            if let Ok(Outcome::Made { sum }) = outcome {
                self.made.push(Made { number: content.number, length: live.length, known: Known::Sum(sum) });
                return Ok(Some(Taken::Copied(content)));
            }
            self.unlink(&content)?;
            if outcome? == Outcome::Equal {
                return Ok(Some(Taken::Kept));
            }
        }
        Ok(None)
    }

    /// Shares the file's blocks; `None` if that cannot be done.
    fn share(&mut self, file: &File, known: Known) -> io::Result<Option<Taken>> {
        if !self.making.reflinks.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (content, to) = self.create(Form::Whole)?;
        match rustix::fs::ioctl_ficlone(&to, file) {
            Ok(()) => {
                let length = to.metadata()?.len();
                self.made.push(Made { number: content.number, length, known });
                Ok(Some(Taken::Shared(content, length)))
            }
            Err(error) => {
                self.unlink(&content)?;
                match error {
                    // Another file system, or one that cannot: true of all other files, too.
                    Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => {
                        self.making.reflinks.store(false, Ordering::Relaxed);
                        Ok(None)
                    }
                    // This file cannot be shared: a swap file, one without checksums beside one with them.
                    Errno::INVAL | Errno::TXTBSY | Errno::PERM | Errno::ACCESS => Ok(None),
                    error => Err(error.into()),
                }
            }
        }
    }

    fn create(&mut self, form: Form) -> io::Result<(ContentRef, File)> {
        if self.chunk.as_ref().is_none_or(|(_, next)| next & 0xff == 0) {
            let chunk = self.making.next_chunk.fetch_add(1, Ordering::Relaxed);
            let batch = beneath::open_root(&self.store.batch_dir(self.making.batch))?;
            let dir = beneath::make_dir(batch, content_name(chunk << 8, form).0.as_ref())?;
            self.chunk = Some((dir, chunk << 8));
        }
        let Some((dir, next)) = &mut self.chunk else { unreachable!("it was made above") };
        let number = *next;
        let file = beneath::create_file(dir, content_name(number, form).1.as_ref(), 0o600)?;
        *next += 1;
        Ok((ContentRef { batch: self.making.batch, number, form }, file))
    }

    /// Forgets what is known of a content that this maker made, because the file changed meanwhile.
    pub(crate) fn forget(&mut self, content: &ContentRef) {
        self.made.iter_mut().filter(|made| made.number == content.number).for_each(|made| made.known = Known::Nothing);
    }

    /// Removes a content that this maker made.
    pub(crate) fn discard(&mut self, content: &ContentRef) -> io::Result<()> {
        self.made.retain(|made| made.number != content.number);
        self.unlink(content)
    }

    fn unlink(&self, content: &ContentRef) -> io::Result<()> {
        fs::remove_file(self.store.content_path(content))
    }
}
