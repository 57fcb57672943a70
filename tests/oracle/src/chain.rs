//! Files that are written one after the other, always in the same order.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::Fault;
use crate::fault::compare;
use crate::kind::Writer;

/// Files that each hold the number of the step, the first one first: none is ever ahead of the one before it.
///
/// The files may lie in different volumes: then the order holds only if all are snapshotted at one instant.
#[derive(Debug)]
pub(crate) struct Chain {
    files: Vec<(PathBuf, File)>,
    done: u64,
}

impl Chain {
    pub(crate) fn create(paths: Vec<PathBuf>) -> Result<Self, Fault> {
        let mut files = Vec::new();
        for path in paths {
            let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
            let file = opened.map_err(|error| Fault::call(&path, "open", error))?;
            file.write_all_at(&line(0), 0).map_err(|error| Fault::call(&path, "pwrite", error))?;
            files.push((path, file));
        }
        Ok(Self { files, done: 0 })
    }

    pub(crate) fn examine(paths: &[PathBuf]) -> Result<u64, Fault> {
        let mut steps = Vec::new();
        for path in paths {
            let found = std::fs::read(path).map_err(|error| Fault::call(path, "read", error))?;
            let text = String::from_utf8_lossy(&found);
            let step = text.trim_end().strip_prefix("step ").and_then(|digits| digits.parse().ok());
            let step: u64 = step.ok_or_else(|| Fault::new(path, 0, "the number of a step", text.clone()))?;
            compare(path, 0, &format!("step {step}"), &line(step), &found)?;
            steps.push(step);
        }
        let first = steps[0];
        let mut before = first;
        for (path, &step) in paths.iter().zip(&steps) {
            if step > before || step + 1 < first {
                let expected = format!("step {} to {before}, as the files before it hold", first.saturating_sub(1));
                return Err(Fault::new(path, 0, expected, format!("step {step}")));
            }
            before = step;
        }
        Ok(first)
    }
}

/// What a file holds after `step`: readable, because people look at these files in demonstrations.
fn line(step: u64) -> Vec<u8> {
    format!("step {step:012}\n").into_bytes()
}

fn check_file(path: &Path, step: u64, found: std::io::Result<Vec<u8>>) -> Result<(), Fault> {
    let found = found.map_err(|error| Fault::call(path, "read", error))?;
    compare(path, 0, &format!("step {step}"), &line(step), &found)
}

fn read(file: &File) -> std::io::Result<Vec<u8>> {
    let mut found = line(0);
    let len = file.read_at(&mut found, 0)?;
    found.truncate(len);
    Ok(found)
}

impl Writer for Chain {
    fn done(&self) -> u64 {
        self.done
    }

    fn step(&mut self, pause: &mut dyn FnMut()) -> Result<(), Fault> {
        let next = self.done + 1;
        for (path, file) in &self.files {
            pause();
            check_file(path, self.done, read(file))?;
            file.write_all_at(&line(next), 0).map_err(|error| Fault::call(path, "pwrite", error))?;
        }
        pause();
        self.done = next;
        Ok(())
    }

    fn check(&self) -> Result<(), Fault> {
        for (path, _) in &self.files {
            check_file(path, self.done, std::fs::read(path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_writes_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("a"), dir.path().join("b"), dir.path().join("c")];
        let judge = |steps: [u64; 3]| {
            for (path, step) in paths.iter().zip(steps) {
                std::fs::write(path, line(step)).unwrap();
            }
            Chain::examine(&paths).ok()
        };
        assert_eq!(judge([7, 7, 7]), Some(7));
        assert_eq!(judge([8, 7, 7]), Some(8));
        assert_eq!(judge([8, 8, 7]), Some(8));
        assert_eq!(judge([7, 8, 7]), None);
        assert_eq!(judge([8, 7, 8]), None);
        assert_eq!(judge([8, 7, 6]), None);
        assert_eq!(judge([8, 6, 6]), None);
    }
}
