//! The oracle agrees with itself, and with nothing else.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use fsnap_oracle::criu::Criu;
use fsnap_oracle::{Kind, Verdict, ask, examine};
use rustix::process::{Pid, Signal, WaitIdOptions, WaitOptions};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fsnap-oracle");

/// A running oracle in a temporary directory; killed on drop.
struct Running {
    dir: tempfile::TempDir,
    dirs: Vec<PathBuf>,
    pid: i32,
    asked: u32,
}

impl Running {
    fn start(volumes: usize, kinds: &[Kind], pace: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = (0..volumes).map(|index| dir.path().join(format!("volume-{index}"))).collect();
        let kinds: Vec<String> = kinds.iter().map(Kind::to_string).collect();
        let mut args = vec!["run".into(), "--reports".into(), dir.path().as_os_str().to_owned()];
        args.extend(["--kinds".into(), kinds.join(",").into(), "--pace".into(), pace.to_string().into()]);
        args.extend(dirs.iter().map(Into::into));
        let pid = fsnap_oracle::start(Path::new(PROGRAM), args).unwrap();
        Self { dir, dirs, pid, asked: 0 }
    }

    fn reports(&self) -> &Path {
        self.dir.path()
    }

    fn ask(&mut self) -> Verdict {
        self.asked += 1;
        ask(self.pid, self.reports(), &format!("original-{}", self.asked), Duration::from_secs(60)).unwrap()
    }

    fn process(&self) -> Pid {
        Pid::from_raw(self.pid).unwrap()
    }

    /// Runs `act` while every thread stands still.
    fn frozen<T>(&self, act: impl FnOnce() -> T) -> T {
        rustix::process::kill_process(self.process(), Signal::STOP).unwrap();
        let id = rustix::process::WaitId::Pid(self.process());
        rustix::process::waitid(id, WaitIdOptions::STOPPED).unwrap();
        let result = act();
        rustix::process::kill_process(self.process(), Signal::CONT).unwrap();
        result
    }

    fn copies(&self, name: &str) -> Vec<PathBuf> {
        self.dirs.iter().map(|dir| dir.with_extension(name)).collect()
    }

    /// Copies every volume, and returns the copies.
    fn copy(&self, name: &str) -> Vec<PathBuf> {
        let copies = self.copies(name);
        for (dir, copy) in self.dirs.iter().zip(&copies) {
            // A file that vanishes under a running writer is the fault of the copier, not of the copy.
            let _ = Command::new("cp").args(["-a", "--sparse=always"]).args([dir, copy]).output().unwrap();
        }
        copies
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.process(), Signal::KILL);
        let _ = rustix::process::waitpid(Some(self.process()), WaitOptions::empty());
    }
}

/// Waits until every writer has made `steps` more steps; every verdict on the way must be good.
fn after(oracle: &mut Running, steps: u64) -> Verdict {
    let first = oracle.ask();
    let mut last = first.clone();
    while last.writers.iter().zip(&first.writers).any(|(last, first)| last.done < first.done + steps) {
        assert!(last.ok, "{last:?}");
        last = oracle.ask();
    }
    last
}

#[test]
fn the_oracle_agrees_with_itself() {
    for pace in [0, 300] {
        let mut oracle = Running::start(2, &Kind::ALL, pace);
        let last = after(&mut oracle, 100);
        assert!(last.ok, "{last:?}");
        assert_eq!(last.writers.len(), 17, "eight writers in each volume, and one over both");
        let asked = last.asked.unwrap();
        assert_eq!((asked.pid as i32, asked.generation), (oracle.pid, oracle.asked.into()));
    }
}

#[test]
fn a_changed_byte_is_found_and_stays_found() {
    for kind in Kind::ALL {
        let mut oracle = Running::start(1, &[kind], 100);
        after(&mut oracle, 100);
        let mut first = damaged(&mut oracle, kind);
        // A step that was under way may have replaced what was damaged: ten times in a row it does not.
        for _ in 1..10 {
            if first.ok {
                first = damaged(&mut oracle, kind);
            }
        }
        assert!(!first.ok, "{kind}: the damage was not seen: {first:?}");
        assert_eq!(first.faulty(), [kind.writer_name(0)]);
        let second = oracle.ask();
        assert_eq!(second.writers[0].fault, first.writers[0].fault, "{kind}: the evidence changed");
    }
}

/// The verdict after one file was changed.
fn damaged(oracle: &mut Running, kind: Kind) -> Verdict {
    oracle.frozen(|| damage(kind, &oracle.dirs[0], oracle.pid));
    oracle.ask()
}

/// Changes one file of the writer behind its back.
fn damage(kind: Kind, dir: &Path, pid: i32) {
    let flip = |path: &Path, offset: u64| {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    };
    match kind {
        Kind::Append => {
            let file = OpenOptions::new().write(true).open(dir.join("append")).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        }
        Kind::Overwrite => flip(&dir.join("overwrite"), 17_777),
        Kind::Mmap => flip(&dir.join("mmap"), 512 * 7 + 2),
        Kind::Rename => flip(&dir.join("rename"), 55),
        Kind::Order => flip(&dir.join("order-second"), 16),
        // In a hole between two slots: only a comparison of all bytes can find it.
        Kind::Sparse => flip(&dir.join("sparse"), (64 << 20) - 5),
        Kind::Names => symlink("stray", dir.join("names/stray")).unwrap(),
        Kind::Volumes => flip(&dir.join("volumes"), 16),
        Kind::Unlinked => {
            let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            let deleted = |path: &PathBuf| std::fs::read_link(path).unwrap().ends_with("unlinked (deleted)");
            let path = descriptors.map(|entry| entry.unwrap().path()).find(deleted).unwrap();
            flip(&path, 17_777);
        }
    }
}

#[test]
fn an_old_state_is_found() {
    // Each kind alone: the files of one instant under the memory of a later one.
    for kind in Kind::ALL.into_iter().filter(|&kind| kind != Kind::Unlinked) {
        let mut oracle = Running::start(1, &[kind], 100);
        let copies = oracle.frozen(|| oracle.copy("old"));
        after(&mut oracle, 100);
        let between_steps = || {
            // A file that is about to be renamed would hide what is put back under its new name.
            if names(&oracle.dirs[0]).any(|name| name.extension().is_some_and(|end| end == "new")) {
                return false;
            }
            for name in names(&copies[0]) {
                put_back(&copies[0].join(&name), &oracle.dirs[0].join(&name));
            }
            true
        };
        while !oracle.frozen(between_steps) {}
        let verdict = oracle.ask();
        assert_eq!(verdict.faulty(), [kind.writer_name(0)], "{kind}: {verdict:?}");
    }
}

fn names(dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into())
}

/// Gives `to` the content of `from`, in the same inode where it is a file.
fn put_back(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::remove_dir_all(to).unwrap();
        assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    } else {
        let to = OpenOptions::new().write(true).create(true).truncate(false).open(to).unwrap();
        let content = File::open(from).unwrap();
        // Sparse files are put back sparsely: what was a hole is one again.
        to.set_len(0).unwrap();
        to.set_len(content.metadata().unwrap().len()).unwrap();
        let mut at = 0;
        while let Ok(data) = rustix::fs::seek(&content, rustix::fs::SeekFrom::Data(at)) {
            at = rustix::fs::seek(&content, rustix::fs::SeekFrom::Hole(data)).unwrap();
            let mut bytes = vec![0; (at - data) as usize];
            content.read_exact_at(&mut bytes, data).unwrap();
            to.write_all_at(&bytes, data).unwrap();
        }
    }
}

#[test]
fn frozen_trees_pass_the_examination() {
    let mut oracle = Running::start(2, &Kind::ALL, 200);
    for round in 0..20 {
        let copies = oracle.frozen(|| oracle.copy(&format!("round-{round}")));
        let verdict = examine(&copies).unwrap();
        assert!(verdict.ok, "round {round}: {verdict:?}");
        let later = after(&mut oracle, 20);
        // Both count the same steps.
        for writer in verdict.writers.iter().filter(|writer| !writer.name.starts_with("append")) {
            assert!(writer.done <= later.done(&writer.name).unwrap(), "{writer:?} of {later:?}");
        }
        for copy in copies {
            std::fs::remove_dir_all(copy).unwrap();
        }
    }
}

#[test]
fn copies_of_running_writers_fail_the_examination() {
    let oracle = Running::start(2, &Kind::ALL, 0);
    let is_torn = |round: &u32| {
        let copies = oracle.copy(&format!("round-{round}"));
        let torn = examine(&copies).is_ok_and(|verdict| !verdict.ok);
        copies.iter().for_each(|copy| std::fs::remove_dir_all(copy).unwrap());
        torn
    };
    // Not every copy is torn: on a busy machine the writers may rest meanwhile.
    assert_eq!((0..100).filter(is_torn).take(5).count(), 5, "copies of running writers pass for whole");
}

#[test]
fn the_silent_and_the_dead_are_named() {
    let mut oracle = Running::start(1, &[Kind::Append], 100);
    let reports = oracle.reports().to_owned();
    oracle.frozen(|| {
        let error = ask(oracle.pid, &reports, "silent", Duration::from_millis(50)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("process {} gave no verdict silent within 0 s: is it an oracle, and does it run?", oracle.pid)
        );
    });
    let taken = oracle.ask().asked.unwrap().tag;
    assert!(ask(oracle.pid, &reports, &taken, Duration::from_secs(9)).is_err(), "a tag was used twice");
    assert!(ask(oracle.pid, &reports, "../x", Duration::from_secs(9)).is_err(), "a tag left the directory");
    rustix::process::kill_process(oracle.process(), Signal::KILL).unwrap();
    let error = ask(oracle.pid, &reports, "dead", Duration::from_secs(9)).unwrap_err();
    assert_eq!(error.to_string(), format!("process {} is gone and gave no verdict dead", oracle.pid));
}

/// The script that copies the volumes at `action`; CRIU starts it without arguments.
fn copying_script(oracle: &Running, name: &str, action: &str) -> PathBuf {
    let mut script = format!("#!/bin/sh -e\n[ \"$CRTOOLS_SCRIPT_ACTION\" = {action} ] || exit 0\n");
    for (dir, copy) in oracle.dirs.iter().zip(oracle.copies(name)) {
        script += &format!("cp -a --sparse=always '{}' '{}'\n", dir.display(), copy.display());
    }
    let path = oracle.reports().join(format!("copy-{name}.sh"));
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn restored_onto_files_of_the_same_instant_it_agrees() {
    let criu = Criu::find();
    let mut oracle = Running::start(2, &Kind::ALL, 300);
    let mut restored = Vec::new();
    for round in 0..5 {
        let name = format!("round-{round}");
        let images = oracle.reports().join(format!("images-{round}"));
        std::fs::create_dir(&images).unwrap();
        let script = copying_script(&oracle, &name, "post-dump");
        criu.dump(oracle.pid, &images, ["--action-script".as_ref(), script.as_os_str()]).unwrap();
        assert!(after(&mut oracle, 20).ok);
        let binds: Vec<_> = oracle.copies(&name).into_iter().zip(oracle.dirs.clone()).collect();
        restored.push(criu.restore(oracle.pid, &images, &binds, [""; 0]).unwrap());
    }
    // Side by side, each with its own files.
    for (round, process) in restored.iter().enumerate() {
        for time in 0..3 {
            let tag = format!("restored-{round}-{time}");
            let verdict = ask(process.pid(), oracle.reports(), &tag, Duration::from_secs(60)).unwrap();
            assert!(verdict.ok, "{tag}: {verdict:?}");
            assert_eq!(verdict.asked.unwrap().pid as i32, oracle.pid);
        }
    }
    let verdict = oracle.ask();
    assert!(verdict.ok, "the original noticed: {verdict:?}");
}

#[test]
fn restored_onto_files_of_another_instant_it_disagrees_or_is_refused() {
    let criu = Criu::find();
    // Files whose length never changes, so that CRIU's own check of lengths lets most of them pass.
    let kinds = [Kind::Overwrite, Kind::Mmap, Kind::Rename, Kind::Order, Kind::Sparse, Kind::Names, Kind::Volumes];
    for kind in kinds {
        let mut oracle = Running::start(1, &[kind], 300);
        let images = oracle.reports().join("images");
        std::fs::create_dir(&images).unwrap();
        let early = oracle.copy("early");
        after(&mut oracle, 100);
        criu.dump(oracle.pid, &images, [""; 0]).unwrap();
        let binds: Vec<_> = early.into_iter().zip(oracle.dirs.clone()).collect();
        match criu.restore(oracle.pid, &images, &binds, [""; 0]) {
            Ok(process) => {
                let verdict = ask(process.pid(), oracle.reports(), "restored", Duration::from_secs(60)).unwrap();
                assert_eq!(verdict.faulty(), [kind.writer_name(0)], "{kind}: {verdict:?}");
            }
            Err(error) => assert_eq!(kind, Kind::Rename, "{kind}: only an open temporary file may be missed: {error}"),
        }
    }
}
