//! Files that have no name any more: kept with the checkpoint, and given back.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use fsnap_oracle::Kind;

use crate::Case;
use crate::consistency::CaseOn;
use crate::runs::Running;
use crate::site::{Site, Volume, end, said, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("every_kind_on_btrfs", || every_kind(Volume::Btrfs, 300)),
    ("every_kind_on_rsync", || every_kind(Volume::Rsync, 20)),
    ("what_is_no_file_without_a_name_is_not_left_out", what_is_no_file_without_a_name_is_not_left_out),
    ("two_that_the_engine_cannot_tell_apart", two_that_the_engine_cannot_tell_apart),
    ("a_note_that_is_lost_with_the_power", a_note_that_is_lost_with_the_power),
];

/// Where a program is played instead of run, a few MiB are as dense as many.
pub(crate) const ON_OTHER_KERNELS: &[CaseOn] = &[
    ("every_kind_on_dm_thin", &[Volume::DmThin], |_| every_kind(Volume::DmThin, 20)),
    ("every_kind_on_nilfs2", &[Volume::Nilfs2], |_| every_kind(Volume::Nilfs2, 20)),
];

/// Has files without names in all ways that there are, changes them, and says the number of the round while all are as they must be.
const PROGRAM: &str = r#"
import fcntl, mmap, os, struct, sys, time
MIB, GIB = 1 << 20, 1 << 30
blocks, labelled = int(sys.argv[1]), sys.argv[2] == "labelled"
def make(name, flags=os.O_RDWR, mode=0o640):
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
def block(number): return bytes([number % 251]) * MIB
one = make("one", mode=0o604); os.write(one, b"x")
sparse = make("sparse"); os.ftruncate(sparse, 2 * GIB); os.pwrite(sparse, b"middle", GIB); os.pwrite(sparse, b"end", 2 * GIB - 3)
dense = make("dense")
for number in range(blocks): os.write(dense, block(number))
only = make("only", os.O_WRONLY | os.O_APPEND)
reader = os.open("dense", os.O_RDONLY); os.lseek(reader, 1234, 0); twice = os.dup(reader)
def mapped(name, flags):
    fd = make(name); os.write(fd, b"m" * 8192); memory = mmap.mmap(fd, 8192, flags=flags); os.unlink(name)
    for other in os.listdir("/proc/self/fd"):
        try:
            if os.readlink("/proc/self/fd/" + other).endswith(name + " (deleted)"): os.close(int(other))
        except OSError: pass
    return memory
shared, private = mapped("shared", mmap.MAP_SHARED), mapped("private", mmap.MAP_PRIVATE)
private[:3] = b"own"
# In no volume: CRIU saves it.
elsewhere = os.open("/tmp/elsewhere", os.O_RDWR | os.O_CREAT, 0o600); os.write(elsewhere, block(9) * 3); os.unlink("/tmp/elsewhere")
try: nameless = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
except OSError:
    # NILFS2 makes none.
    nameless = make("nameless"); os.unlink("nameless")
# A capability, as the kernel writes it; a list that lets one user more read, for which the mode has its bits.
capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in [(1, 6, -1 % 2**32), (2, 4, 12), (4, 4, -1 % 2**32), (16, 4, -1 % 2**32), (32, 0, -1 % 2**32)])
labels = [(one, "user.note", b"any \0 \xff"), (one, "user.long", b"l" * 3000), (one, "trusted.note", b""), (dense, "security.capability", capability),
    (only, "system.posix_acl_access", acl)] if labelled else []
for fd, name, value in labels: os.setxattr(fd, name, value)
for name in ["one", "sparse", "dense", "only"]: os.unlink(name)
# Another process has the same descriptors, and moves their common position.
there, here = os.pipe(), os.pipe()
if os.fork() == 0:
    while os.read(there[0], 1):
        os.lseek(sparse, 1, 1); os.write(here[1], b"!")
    os._exit(0)
start = os.lseek(sparse, 0, 1)
n = 0
while True:
    n += 1
    text = b"%08d" % n
    os.pwrite(one, text[-1:], 0); os.pwrite(sparse, text, 5 * MIB); os.write(only, text); shared[:8] = text
    os.pwrite(nameless, text, 0)
    os.write(there[1], b"?"); os.read(here[0], 1)
    seen = "/proc/self/fd/%d"
    number = n % blocks
    checks = dict(
        one=os.pread(one, 9, 0) == text[-1:] and os.fstat(one).st_mode & 0o7777 == 0o604,
        sparse=os.pread(sparse, 8, 5 * MIB) == text and os.pread(sparse, 6, GIB) == b"middle"
            and os.pread(sparse, 9, 2 * GIB - 3) == b"end" and os.pread(sparse, 8, GIB // 2) == bytes(8),
        holes=os.fstat(sparse).st_blocks * 512 < MIB,
        dense=os.pread(dense, MIB, number * MIB) == block(number) and os.fstat(dense).st_size == blocks * MIB,
        only=open(seen % only, "rb").read()[-16:][-8:] == text and os.fstat(only).st_size == 8 * n,
        flags=fcntl.fcntl(only, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY | os.O_APPEND,
        position=os.lseek(reader, 0, 1) == os.lseek(twice, 0, 1) == 1234 and os.lseek(sparse, 0, 1) == start + n,
        shared=shared[:8] == text and shared[8:] == b"m" * 8184,
        private=private[:4] == b"ownm",
        nameless=os.pread(nameless, 9, 0) == text,
        labels=all(os.getxattr(fd, name) == value for fd, name, value in labels)
            and sum(len(os.listxattr(fd)) for fd in {label[0] for label in labels}) == len(labels),
        elsewhere=os.pread(elsewhere, 4 * MIB, 0) == block(9) * 3,
        gone=all(os.fstat(fd).st_nlink == 0 for fd in (one, sparse, dense, only, reader, nameless, elsewhere)),
    )
    wrong = [name for name, right in checks.items() if not right]
    print(("wrong: %s in round %d" % (wrong, n)) if wrong else n, flush=True)
    if wrong: sys.exit(1)
    time.sleep(0.01)
"#;

/// Only btrfs is sure to have extended attributes here: the other volumes lie wherever the tests do.
fn start(site: &Site, name: &str, volume: Volume, blocks: u32) {
    let (blocks, labelled) = (blocks.to_string(), if volume == Volume::Btrfs { "labelled" } else { "plain" });
    let mut command = site.command(["run", "--name", name, "--volume", "v0", "--", "/usr/bin/python3", "-c", PROGRAM]);
    let output = command.args([&blocks, labelled]).current_dir(&site.volumes[0]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

/// A byte, two sparse GiB, so many dense MiB, files that can only be written, appended to, or are mapped only: all of them go on in two copies of the
/// run, and in a copy of one of those, and no two share any.
fn every_kind(volume: Volume, blocks: u32) {
    let site = Site::new(&[volume]);
    let running = Running(&site);
    start(&site, "one", volume, blocks);
    running.says("one", "3");
    // NILFS2 tells no holes, and a program that is played reads two GiB slowly.
    let first = site.ok(["checkpoint", "one", "--deadline", "3600"]);
    left_to_fsnap(&site, &first, 1);
    running.counts_on("one");
    site.ok(["branch", &first, "copy", "--run", "--count", "2"]);
    for name in ["one", "copy-1", "copy-2"] {
        running.counts_on(name);
    }
    let second = site.ok(["checkpoint", "copy-1", "--deadline", "3600"]);
    // On an overlay, which a branch of NILFS2 is, those that are mapped only are shown as the layer's, and cannot be left out.
    left_to_fsnap(&site, &second, if volume == Volume::Nilfs2 { 3 } else { 1 });
    site.ok(["branch", &second, "grandchild", "--run"]);
    let names = ["one", "copy-1", "copy-2", "grandchild"];
    for name in names {
        running.counts_on(name);
    }
    site.ok([&["stop", "-t", "1"][..], &names].concat());
    for name in names {
        let log = running.said(name);
        assert!(!log.contains("wrong") && !log.contains("Error"), "{name}: {log}");
    }
    // A copy begins where its original stood, and its files with it.
    assert!(running.said("copy-1").lines().next().unwrap().parse::<u32>().unwrap() > 3);
    for branch in &names[1..] {
        site.ok(["rm", "--branch", branch]);
    }
    site.holds_nothing_but(2);
    site.ok(["rm", &first]);
    site.ok(["rm", &second]);
    site.holds_nothing_but(0);
}

/// Makes sure that the engine left the volume's files to fsnap, and saved only so many itself.
fn left_to_fsnap(site: &Site, id: &str, saved: usize) {
    let shown = site.json(["show", id, "--json"]);
    let unlinked = shown["unlinked"].as_array().unwrap();
    assert!(unlinked.iter().all(|one| one["kept"] == true), "{shown:#}");
    let left = unlinked.iter().filter(|one| one["external"].is_string()).count();
    assert_eq!((left, unlinked.len()), (8 - saved, 8), "{shown:#}");
    let images = Path::new(shown["engine"]["images"].as_str().unwrap());
    let files: Vec<_> = fs::read_dir(images).unwrap().map(|entry| entry.unwrap()).collect();
    let ghosts = files.iter().filter(|file| file.file_name().to_string_lossy().starts_with("ghost-file-"));
    assert_eq!(ghosts.count(), saved, "{files:?}");
    assert!(files.iter().all(|file| file.metadata().unwrap().len() < 100 << 20), "{files:?}");
    assert!(site.ok(["show", id]).contains("bytes, kept here alone"));
}

/// CRIU is told to leave out a file that has a name, or one for another: there is no checkpoint of that, and the process runs on.
fn what_is_no_file_without_a_name_is_not_left_out() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let told = site.ok(["criu-args", &oracle.pid.to_string()]);
    assert_eq!(told.lines().collect::<Vec<_>>(), ["--link-remap", "--ghost-limit", "1024G"]);
    let key = a_named_file(oracle.pid, &site.volumes[0]);
    let hook = site.hook();
    let args = ["--action-script".as_ref(), hook.as_os_str(), "--external".as_ref(), key.as_ref()];
    let images = site.images();
    site.criu().dump(oracle.pid, &images, args).unwrap_err();
    let log = fs::read_to_string(images.join("dump.log")).unwrap();
    assert!(log.contains(&format!("the engine has left {key} out of its images")), "{log}");
    oracle.goes_on();
    site.holds_nothing_but(0);
    site.checkpoint(oracle.pid);
    site.holds_nothing_but(1);
}

/// Has a file without a name in one subvolume, and a named one of the same number in another, whose name goes with the next signal.
const DOUBLES: &str = r#"
import os, signal, sys, time
os.closerange(3, 1024)
one, other = (os.open(dir + "/file", os.O_RDWR | os.O_CREAT) for dir in sys.argv[1:])
assert os.fstat(one).st_ino == os.fstat(other).st_ino and os.fstat(one).st_dev != os.fstat(other).st_dev
os.unlink(sys.argv[1] + "/file")
signal.signal(signal.SIGUSR1, lambda *_: os.unlink(sys.argv[2] + "/file"))
print("ready", flush=True)
while True: time.sleep(0.01)
"#;

/// CRIU would copy one of them, for both: such a dump is refused before the freeze, and fails if the second loses its name after that look.
fn two_that_the_engine_cannot_tell_apart() {
    let site = Site::new(&[Volume::Btrfs, Volume::Btrfs]);
    let log = site.path("said");
    let mut command = Command::new("setsid");
    command.args(["/usr/bin/python3", "-c", DOUBLES]).args(&site.volumes).current_dir("/").stdin(Stdio::null());
    let output = fs::File::create(&log).unwrap();
    let mut child = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
    wait_until("its word", || fs::read_to_string(&log).unwrap().contains("ready"));
    let pid = child.id().cast_signed();
    let named = site.volumes[1].join("file");
    let unlink = format!("kill -USR1 {pid}; while [ -e '{0}' ]; do sleep 0.01; done", named.display());
    let late = site.hook_between("pre-dump", ":", &unlink);
    for (script, calls) in
        [(&late, ["pre-dump", "post-dump"].as_slice()), (&site.hook_after("none", ""), &["pre-dump"])]
    {
        let log = site.failing_dump(pid, &site.images(), script);
        assert!(log.contains("the engine would take one for the other"), "{log}");
        assert!(
            site.calls().ends_with(&calls.iter().map(|call| (*call).to_owned()).collect::<Vec<_>>()),
            "{:?}",
            site.calls()
        );
        site.holds_nothing_but(0);
    }
    assert!(child.try_wait().unwrap().is_none());
    // Their contents can be kept all the same.
    let id = site.ok(["checkpoint", "--pid", &pid.to_string()]);
    end(pid);
    child.wait().unwrap();
    let shown = site.json(["show", &id, "--json"]);
    let kept: Vec<_> = shown["unlinked"].as_array().unwrap().iter().map(|one| &one["kept"]).collect();
    assert_eq!(kept, [true, true], "{shown:#}");
}

/// What CRIU calls a file below the directory that the process has open.
fn a_named_file(pid: i32, dir: &Path) -> String {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|fd| fd.unwrap());
    let inside = |fd: &fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(dir));
    let fd = fds.filter(inside).find(|fd| fs::metadata(fd.path()).is_ok_and(|meta| meta.is_file())).unwrap();
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display())).unwrap();
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).unwrap().trim().parse::<u32>().unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(fd.path()).unwrap());
    format!("file[{mount:x}:{inode:x}]")
}

/// Without the note nobody knows which files the engine left to fsnap: then there is no checkpoint. What it saved itself is whole.
fn a_note_that_is_lost_with_the_power() {
    for (dump, sealed) in [(Site::checkpoint as fn(&Site, i32) -> _, 1), (Site::checkpoint_as_told, 0)] {
        let site = Site::new(&[Volume::Btrfs]);
        let oracle = site.oracle(&[Kind::Append, Kind::Unlinked], 1000);
        dump(&site, oracle.pid);
        // A process that stands by takes back what has no note, and after a power cut there is none.
        wait_until("the end of all others", || site.fsnaps().is_empty());
        let intents = fs::read_dir(site.path("state/intents")).unwrap().map(|file| file.unwrap().path());
        let notes: Vec<_> = intents.filter(|path| path.extension().is_some_and(|end| end == "taken")).collect();
        assert_eq!(notes.len(), 1);
        fs::remove_file(&notes[0]).unwrap();
        let boot = site.path("boot");
        fs::write(&boot, "00000000-0000-0000-0000-000000000000\n").unwrap();
        let script = r#"mount --bind "$1" /proc/sys/kernel/random/boot_id && exec "$2" recover"#;
        let mut recover = site.command_of(Path::new("unshare"));
        recover.args(["--mount", "sh", "-c", script, "sh"]).arg(boot).arg(env!("CARGO_BIN_EXE_fsnap"));
        let output = recover.output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        site.holds_nothing_but(sealed);
        oracle.goes_on();
    }
}
