//! A file that a process has open and that has no name any more, on a volume that only some kernels can have.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::kernel::{Done, ensure, fsnap, output};

/// More than an engine would copy by itself, and not of a whole number of blocks.
const LENGTH: usize = (5 << 20) + 1;

/// It comes back as it was when the checkpoint was taken, whatever was written to it later, and goes with the checkpoint.
///
/// `db` in `dir` is a registered volume.
pub(crate) fn it_comes_back(dir: &Path) -> Done {
    let mut content: Vec<u8> = (0..LENGTH).map(|at| (at * at / 7) as u8).collect();
    fs::write(dir.join("db/gone"), &content)?;
    // What it says, it has done; what it is told, it may do.
    let script =
        "exec 6>>gone 7<gone; rm gone; echo first >&6; echo open; read go; echo second >&6; echo written; read go";
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).current_dir(dir.join("db")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = Holder(shell.spawn()?);
    let (mut told, mut said) = (holder.0.stdin.take().ok_or("no pipe")?, String::new());
    let mut says = BufReader::new(holder.0.stdout.take().ok_or("no pipe")?);
    says.read_line(&mut said)?;
    let pid = holder.0.id();
    let id = output(&mut fsnap(dir, &["checkpoint", "--pid", &pid.to_string(), "db"]))?.trim().to_owned();
    content.extend(b"first\n");
    told.write_all(b"go\n")?;
    says.read_line(&mut said)?;
    ensure(said == "open\nwritten\n", &said)?;

    let shown = dir.join("past");
    fs::create_dir(&shown)?;
    output(&mut fsnap(dir, &["mount", &shown.to_string_lossy()]))?;
    let past = shown.join("ids").join(&id);
    for descriptor in ["6", "7"] {
        let kept = fs::read(past.join(format!(".fsnap/processes/{pid}/fd/{descriptor}")))?;
        ensure(kept == content, &format!("descriptor {descriptor}: {} bytes came back otherwise", kept.len()))?;
    }
    ensure(!past.join("db/gone").exists(), "it has its name again")?;
    output(&mut fsnap(dir, &["umount", &shown.to_string_lossy()]))?;
    // The process still has its own.
    let mut own = Vec::new();
    std::io::Read::read_to_end(&mut File::open(format!("/proc/{pid}/fd/7"))?, &mut own)?;
    ensure(own == [&content[..], b"second\n"].concat(), "the process's own file is another")
}

/// Ends with the case.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
