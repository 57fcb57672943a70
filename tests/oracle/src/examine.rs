//! Judging files without their process.

use std::io;
use std::path::PathBuf;

use crate::process::{MANIFEST, Manifest};
use crate::{Kind, Verdict, WriterVerdict};

/// Judges the trees at `dirs`, given in the order in which the oracle was given its directories.
///
/// Right is what a frozen oracle can have left: every file is what its writer had after some number of steps, or in
/// the middle of the next one. How many steps the writers should have made is not known here, only in memory; so a tree
/// that is wholly old passes, and one of which a part is older than another fails where an order was kept.
///
/// Fails when the trees do not say which run they belong to, or belong to different runs.
pub fn examine(dirs: &[PathBuf]) -> io::Result<Verdict> {
    let mut manifests = Vec::new();
    for dir in dirs {
        let manifest: Manifest = serde_json::from_slice(&std::fs::read(dir.join(MANIFEST))?)?;
        manifests.push(manifest);
    }
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let first = manifests.first().ok_or_else(|| invalid("no directory was given"))?;
    if manifests.iter().any(|manifest| manifest.run != first.run) {
        return Err(invalid("the directories belong to different runs"));
    }
    let run = u64::from_str_radix(&first.run, 16).map_err(|_| invalid("the run's name is no number"))?;
    // Part of the volumes can be judged too, but not their order.
    let all = dirs.len() == first.volumes;
    let mut writers = Vec::new();
    for index in 0..dirs.len() {
        for &kind in &first.kinds {
            let judged = match kind {
                Kind::Unlinked => false,
                Kind::Volumes => all && index == 0,
                _ => true,
            };
            if judged {
                let found = kind.examine(run, index, dirs);
                let (done, fault) = found.map_or_else(|fault| (0, Some(fault)), |done| (done, None));
                writers.push(WriterVerdict { name: kind.writer_name(index), done, fault });
            }
        }
    }
    Ok(Verdict::new(run, None, writers))
}
