//! The file system class of stress-ng.

use std::path::Path;
use std::process::Command;

use crate::branch::Branch;
use crate::{Case, run, setting};

/// The class in version 0.15, and why some are left out.
const STRESSORS: &[(&str, Option<&str>)] = &[
    ("access", None),
    ("bind-mount", Some("mounts of its own, which have nothing to do with this file system")),
    ("binderfs", Some("a file system of its own")),
    ("chattr", None),
    ("chdir", None),
    ("chmod", None),
    ("chown", None),
    ("copy-file", None),
    ("dentry", None),
    ("dir", None),
    ("dirdeep", None),
    ("dirmany", None),
    ("dnotify", None),
    ("dup", None),
    ("eventfd", Some("uses no file")),
    ("fallocate", None),
    ("fanotify", None),
    ("fcntl", None),
    ("fiemap", None),
    ("file-ioctl", None),
    ("filename", None),
    ("flock", None),
    ("fpunch", None),
    ("fsize", None),
    ("fstat", None),
    ("getdent", None),
    ("handle", None),
    ("hdd", None),
    ("inode-flags", None),
    ("inotify", None),
    ("io", None),
    ("iomix", None),
    ("ioprio", None),
    ("lease", None),
    ("link", None),
    ("locka", None),
    ("lockf", None),
    ("lockofd", None),
    ("mknod", None),
    ("open", None),
    ("procfs", Some("reads /proc")),
    ("rename", None),
    ("symlink", None),
    ("sync-file", None),
    ("touch", None),
    ("utime", None),
    ("verity", None),
    ("xattr", None),
];

pub(crate) fn cases() -> Vec<Case> {
    let case = |&(stressor, left_out)| Case {
        name: format!("stress_ng_{stressor}"),
        left_out,
        run: Box::new(move |branch: &Branch, _: &Path| case(branch, stressor)),
    };
    STRESSORS.iter().map(case).collect()
}

fn case(branch: &Branch, stressor: &str) -> Result<(), String> {
    let seconds = setting("FSNAP_SUITES_SECONDS", 1);
    let mut command = Command::new("stress-ng");
    command.arg(format!("--{stressor}")).args(["2", "--verify", "--timeout"]).arg(seconds.to_string());
    let (done, said) = run(command.arg("--temp-path").arg(branch.dir()))?;
    if done && !said.contains("fail:") { Ok(()) } else { Err(said) }
}
