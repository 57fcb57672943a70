//! Reads a whole sealed state.

use std::path::PathBuf;
use std::sync::Arc;

use fsnap_backend::{Content, Damage, Dir, Error, FileKind, Result};

const CHUNK: usize = 1 << 20;

/// Reads everything, and names what cannot be read.
pub(super) fn verify(root: &dyn Dir) -> Result<Vec<Damage>> {
    let mut damage = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let mut pending: Vec<(PathBuf, Arc<dyn Dir>)> = Vec::new();
    read(root, &PathBuf::new(), &mut pending, &mut damage, &mut buffer)?;
    while let Some((path, dir)) = pending.pop() {
        if let Err(error) = read(dir.as_ref(), &path, &mut pending, &mut damage, &mut buffer) {
            damage.push(unreadable(&path, &error));
        }
    }
    Ok(damage)
}

fn unreadable(path: &std::path::Path, error: &Error) -> Damage {
    Damage { path: path.as_os_str().to_owned(), what: error.to_string() }
}

fn read(
    dir: &dyn Dir,
    path: &std::path::Path,
    pending: &mut Vec<(PathBuf, Arc<dyn Dir>)>,
    damage: &mut Vec<Damage>,
    buffer: &mut [u8],
) -> Result<()> {
    dir.own_xattrs()?;
    for entry in dir.entries()? {
        let path = path.join(&entry.name);
        let done = match entry.meta.kind {
            FileKind::Dir => dir.open_dir(&entry.name).map(|below| pending.push((path.clone(), Arc::from(below)))),
            FileKind::File => dir.open_file(&entry.name).and_then(|content| read_content(content.as_ref(), buffer)),
            FileKind::Symlink => dir.read_link(&entry.name).map(drop),
            _ => Ok(()),
        };
        if let Err(error) = done.and_then(|()| dir.xattrs(&entry.name).map(drop)) {
            damage.push(unreadable(&path, &error));
        }
    }
    Ok(())
}

fn read_content(content: &dyn Content, buffer: &mut [u8]) -> Result<()> {
    let failed = |source| Error::Io { action: "read", object: "its content".into(), source };
    let mut at = 0;
    while let Some(data) = content.data_after(at).map_err(failed)? {
        at = data.start;
        while at < data.end {
            let length = buffer.len().min((data.end - at) as usize);
            match content.read_at(&mut buffer[..length], at).map_err(failed)? {
                0 => return Ok(()),
                read => at += read as u64,
            }
        }
    }
    Ok(())
}
