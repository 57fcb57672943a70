//! What both adapters keep of what the kernel has open: numbered handles, and the names of directories.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{FileAttr, FileType, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::wire::{GENERATION, nothing};

/// Locks what no panic can leave half changed.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer of that length, of this thread's own. A fresh one for each reading would have to be filled with zeros, or with
/// pages of the kernel, which takes as long as to read.
pub(super) fn with_buffer<T>(length: u32, read: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        let length = length as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        read(&mut buffer[..length])
    })
}

/// Open handles by their numbers, none of which is used twice, and none of which is 0.
#[derive(Debug)]
pub(super) struct Table<H> {
    open: Mutex<HashMap<u64, Arc<H>>>,
    last: AtomicU64,
}

impl<H> Default for Table<H> {
    fn default() -> Self {
        Self { open: Mutex::default(), last: AtomicU64::default() }
    }
}

impl<H> Table<H> {
    pub(super) fn add(&self, handle: H) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        locked(&self.open).insert(number, Arc::new(handle));
        number
    }

    pub(super) fn is_empty(&self) -> bool {
        locked(&self.open).is_empty()
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<H>> {
        locked(&self.open).get(&number).cloned()
    }

    pub(super) fn remove(&self, number: u64) -> Option<Arc<H>> {
        locked(&self.open).remove(&number)
    }
}

/// The names of an open directory, as they were when it was read from the beginning.
#[derive(Debug)]
pub(super) struct Names<T>(Mutex<Option<List<T>>>);

/// The names of a directory at one moment.
pub(super) type List<T> = Arc<Vec<T>>;

impl<T> Default for Names<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Names<T> {
    /// The names for a reading that goes on at `offset`; `read` reads them where it begins, and is told whether that is for the first time.
    pub(super) fn at<E>(&self, offset: u64, read: impl FnOnce(bool) -> Result<List<T>, E>) -> Result<List<T>, E> {
        let mut names = locked(&self.0);
        match &*names {
            Some(names) if offset != 0 => Ok(names.clone()),
            _ => {
                let fresh = read(names.is_none())?;
                *names = Some(fresh.clone());
                Ok(fresh)
            }
        }
    }
}

/// The directory itself and the one above, which come before all names in a listing.
#[derive(Debug)]
pub(super) struct Dots {
    pub(super) own: u64,
    pub(super) parent: u64,
}

impl Dots {
    /// How many they are.
    pub(super) const COUNT: usize = 2;

    fn from(&self, offset: u64) -> impl Iterator<Item = (u64, INodeNo, &'static str)> {
        let dots = [(1, INodeNo(self.own), "."), (2, INodeNo(self.parent), "..")];
        dots.into_iter().skip(offset as usize)
    }

    /// Adds those from `offset` on; `true` if the reply is full.
    pub(super) fn add_to(&self, reply: &mut ReplyDirectory, offset: u64) -> bool {
        self.from(offset).any(|(at, number, name)| reply.add(number, at, FileType::Directory, name))
    }

    /// The same with attributes, of which the kernel looks at nothing here but the number and the kind.
    pub(super) fn add_to_plus(&self, reply: &mut ReplyDirectoryPlus, offset: u64) -> bool {
        self.from(offset).any(|(at, ino, name)| {
            let attr = FileAttr { ino, kind: FileType::Directory, ..nothing() };
            reply.add(ino, at, name, &Duration::ZERO, &attr, GENERATION)
        })
    }
}
