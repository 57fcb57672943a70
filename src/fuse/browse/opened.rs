//! A file that is open for reading.

use std::fs::File;
use std::io;

use fsnap_backend::{Content, WholeFile};
use rustix::io::Errno;

use super::Result;
use super::tree::Used;

/// A file that is open for reading.
#[derive(Debug)]
pub struct Opened {
    content: Bytes,
    // After the content: a snapshot is let go of only when nothing of it is open.
    _used: Option<Used>,
}

#[derive(Debug)]
enum Bytes {
    Text(Vec<u8>),
    Content(Box<dyn Content>),
}

impl Opened {
    pub(super) fn text(text: Vec<u8>) -> Self {
        Self { content: Bytes::Text(text), _used: None }
    }

    pub(super) fn content(content: Box<dyn Content>, used: Used) -> Self {
        Self { content: Bytes::Content(content), _used: Some(used) }
    }

    /// A file that belongs to no snapshot.
    pub(super) fn file(file: File) -> io::Result<Self> {
        Ok(Self { content: Bytes::Content(Box::new(WholeFile::new(file)?)), _used: None })
    }

    /// Whether it was made for whoever opened it: the next one may find other bytes.
    pub fn is_text(&self) -> bool {
        matches!(self.content, Bytes::Text(_))
    }

    /// The file that holds exactly these bytes, if there is one.
    pub fn whole(&self) -> Option<&File> {
        match &self.content {
            Bytes::Text(_) => None,
            Bytes::Content(content) => content.as_file(),
        }
    }

    /// Reads at `offset` as much as there is, up to the buffer's length.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        // Its end is known: nothing is asked for behind it.
        let wanted =
            usize::try_from(self.length().saturating_sub(offset)).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let buffer = &mut buffer[..wanted];
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_some(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            }
        }
        Ok(filled)
    }

    fn read_some(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match &self.content {
            Bytes::Content(content) => content.read_at(buffer, offset),
            Bytes::Text(text) => {
                let rest = usize::try_from(offset).ok().and_then(|offset| text.get(offset..)).unwrap_or(&[]);
                let length = rest.len().min(buffer.len());
                buffer[..length].copy_from_slice(&rest[..length]);
                Ok(length)
            }
        }
    }

    /// Where the next hole or the next data begins, at or after `offset`.
    pub fn seek(&self, offset: u64, hole: bool) -> Result<u64> {
        let Bytes::Content(content) = &self.content else { return seek_text(self.length(), offset, hole) };
        fsnap_backend::seek(content.len(), offset, hole, |at| content.data_after(at))
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?
            .ok_or(Errno::NXIO)
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        match &self.content {
            Bytes::Text(text) => text.len() as u64,
            Bytes::Content(content) => content.len(),
        }
    }
}

fn seek_text(length: u64, offset: u64, hole: bool) -> Result<u64> {
    match offset < length {
        false => Err(Errno::NXIO),
        true if hole => Ok(length),
        true => Ok(offset),
    }
}
