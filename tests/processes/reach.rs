//! Which volumes processes can write to, and who else writes.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fsnap::processes::{BootTicks, Candidate, CandidateKind, How, ProcessId, Tree, reach, users, writers, writers_at};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::live::{Case, Live, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("a_file_open_for_writing_counts", a_file_open_for_writing_counts),
    ("a_mapping_counts_without_a_descriptor", a_mapping_counts_without_a_descriptor),
    ("directories_in_hand_count", directories_in_hand_count),
    ("an_unlinked_file_counts", an_unlinked_file_counts),
    ("root_reaches_what_it_sees", root_reaches_what_it_sees),
    ("a_user_reaches_what_the_modes_permit", a_user_reaches_what_the_modes_permit),
    ("a_read_only_mount_is_not_reached", a_read_only_mount_is_not_reached),
    ("what_is_mounted_over_hides", what_is_mounted_over_hides),
    ("a_changed_root_confines", a_changed_root_confines),
    ("the_same_place_counts_under_any_path", the_same_place_counts_under_any_path),
    ("what_cannot_be_told_makes_no_user", what_cannot_be_told_makes_no_user),
    ("a_part_of_a_volume_counts", a_part_of_a_volume_counts),
    ("a_branch_counts_where_it_is_mounted", a_branch_counts_where_it_is_mounted),
    ("a_nested_subvolume_belongs_to_its_volume", a_nested_subvolume_belongs_to_its_volume),
    ("a_name_of_any_bytes_hides_nothing", a_name_of_any_bytes_hides_nothing),
    ("a_volume_made_again_is_another", a_volume_made_again_is_another),
    ("a_process_whose_first_thread_ended_is_seen", a_process_whose_first_thread_ended_is_seen),
    ("writers_outside_the_tree_are_named", writers_outside_the_tree_are_named),
    ("what_the_tree_forks_later_belongs_to_it", what_the_tree_forks_later_belongs_to_it),
];

/// Directories on a tmpfs that only this thread, and what it starts, sees.
pub(crate) struct Place {
    pub(crate) root: PathBuf,
    _temp: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o755)).unwrap();
        mount(Some("tmpfs"), temp.path(), Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
        Self { root: temp.path().into(), _temp: temp }
    }

    pub(crate) fn dir(&self, name: impl AsRef<Path>) -> PathBuf {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn volume(dir: &Path) -> Candidate {
    Candidate::of(dir, CandidateKind::Registered).unwrap()
}

fn branch(dir: &Path) -> Candidate {
    Candidate::of(dir, CandidateKind::Branch).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What of the candidates the process's tree can write to, and how.
fn reached(live: &Live, candidates: &[Candidate]) -> Vec<(usize, How)> {
    reach(&live.tree(), candidates).unwrap().into_iter().map(|found| (found.candidate, found.how)).collect()
}

fn is_mount(found: &[(usize, How)], expected: &[usize]) -> bool {
    found.iter().all(|(_, how)| matches!(how, How::Mount(_)))
        && found.iter().map(|(candidate, _)| *candidate).eq(expected.iter().copied())
}

fn a_file_open_for_writing_counts() {
    let place = Place::new();
    let (one, other) = (place.dir("one"), place.dir("other"));
    fs::write(other.join("file"), "").unwrap();
    // Branches, which count by use only.
    let candidates = [branch(&one), branch(&other)];
    let live = Live::start(&["write", text(&one.join("deep file"))]);
    assert_eq!(reached(&live, &candidates), [(0, How::Descriptor(3))]);
    let live = Live::start(&["read", text(&other.join("file"))]);
    assert_eq!(reached(&live, &candidates), []);
    // A name that begins alike is another directory.
    let live = Live::start(&["write", text(&place.dir("one2").join("file"))]);
    assert_eq!(reached(&live, &candidates), []);
    let found = reach(&live.tree(), &[branch(&place.dir("one2"))]).unwrap().remove(0);
    assert_eq!((found.process, found.command.as_str()), (live.id, "helper"));
    assert_eq!(found.how.to_string(), "has descriptor 3 open for writing");
}

fn a_mapping_counts_without_a_descriptor() {
    let place = Place::new();
    let live = Live::start(&["map", text(&place.dir("one").join("a b"))]);
    assert_eq!(reached(&live, &[branch(&place.dir("one"))]), [(0, How::Mapping)]);
}

fn directories_in_hand_count() {
    let place = Place::new();
    let inner = place.dir("one/inner");
    let candidates = [branch(&place.dir("one"))];
    let live = Live::start(&["cwd", text(&inner)]);
    assert_eq!(reached(&live, &candidates), [(0, How::Cwd)]);
    let live = Live::start(&["directory", text(&inner)]);
    assert_eq!(reached(&live, &candidates), [(0, How::Directory(3))]);
    let live = Live::start(&["chroot", text(&inner)]);
    // The working directory is asked for first, and is the new root too.
    assert_eq!(reached(&live, &candidates), [(0, How::Cwd)]);
}

fn an_unlinked_file_counts() {
    let place = Place::new();
    let live = Live::start(&["write-unlinked", text(&place.dir("one").join("file"))]);
    assert_eq!(reached(&live, &[branch(&place.dir("one"))]), [(0, How::Descriptor(3))]);
}

fn root_reaches_what_it_sees() {
    let place = Place::new();
    let dir = place.dir("one");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o000)).unwrap();
    let live = Live::start(&["read", "/dev/null"]);
    let found = reached(&live, &[volume(&dir), branch(&place.dir("two"))]);
    assert_eq!(found, [(0, How::Mount(place.root.clone()))]);
}

fn a_user_reaches_what_the_modes_permit() {
    let place = Place::new();
    let names = ["open", "closed", "outer/inner"];
    let dirs = names.map(|name| place.dir(name));
    fs::set_permissions(&dirs[1], fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(place.dir("outer"), fs::Permissions::from_mode(0o700)).unwrap();
    let live = Live::start(&["user", "4242"]);
    let candidates = dirs.each_ref().map(|dir| volume(dir));
    assert!(is_mount(&reached(&live, &candidates), &[0]));
    fs::set_permissions(&dirs[1], fs::Permissions::from_mode(0o701)).unwrap();
    std::os::unix::fs::chown(place.dir("outer"), Some(4242), None).unwrap();
    assert!(is_mount(&reached(&live, &candidates), &[0, 1, 2]));
}

fn a_read_only_mount_is_not_reached() {
    let place = Place::new();
    let dir = place.dir("one");
    fs::write(dir.join("file"), "").unwrap();
    let script = format!("mount --bind -o ro '{0}' '{0}'", dir.display());
    let live = Live::start_in_namespace(&script, &["cwd", text(&dir)]);
    assert_eq!(reached(&live, &[volume(&dir)]), []);
    let live = Live::start_in_namespace(&script, &["directory", text(&dir)]);
    assert_eq!(reached(&live, &[volume(&dir)]), []);
}

fn what_is_mounted_over_hides() {
    let place = Place::new();
    let (dir, other) = (place.dir("one"), place.dir("other"));
    let script = format!("mount --bind '{}' '{}'", other.display(), dir.display());
    let live = Live::start_in_namespace(&script, &["read", "/dev/null"]);
    let found = reached(&live, &[volume(&dir), branch(&other)]);
    assert_eq!(found, [(1, How::Mount(dir.clone()))]);
    // A file opened before it was covered is still in use.
    let script = format!("exec 9>'{0}/file'; mount --bind '{1}' '{0}'", dir.display(), other.display());
    let live = Live::start_in_namespace(&script, &["read", "/dev/null"]);
    assert_eq!(reached(&live, &[volume(&dir)]), [(0, How::Descriptor(9))]);
}

fn a_changed_root_confines() {
    let place = Place::new();
    let (dir, jail, inner) = (place.dir("one"), place.dir("jail"), place.dir("jail/inner"));
    let live = Live::start(&["chroot", text(&jail)]);
    let found = reached(&live, &[volume(&dir), volume(&inner), branch(&jail)]);
    assert_eq!(found, [(1, How::Mount(place.root.clone())), (2, How::Cwd)]);
    // In a namespace of its own, where only the jail's mounts are shown.
    let live = Live::start_in_namespace("true", &["chroot", text(&jail)]);
    let found = reached(&live, &[volume(&dir), branch(&jail)]);
    assert_eq!(found, [(1, How::Cwd)]);
}

fn the_same_place_counts_under_any_path() {
    let place = Place::new();
    let (dir, elsewhere) = (place.dir("one"), place.dir("else where"));
    let file = elsewhere.join("file");
    let script = format!("mount --bind '{}' '{}'", dir.display(), elsewhere.display());
    let live = Live::start_in_namespace(&script, &["write", text(&file)]);
    assert_eq!(reached(&live, &[volume(&dir)]), [(0, How::Descriptor(3))]);
    let live = Live::start_in_namespace(&script, &["map", text(&file)]);
    assert_eq!(reached(&live, &[branch(&dir)]), [(0, How::Mapping)]);
    let live = Live::start_in_namespace(&script, &["cwd", text(&elsewhere)]);
    assert_eq!(reached(&live, &[branch(&dir)]), [(0, How::Cwd)]);
    // Behind a mount that is detached now, and in no table any more.
    let script = format!("{script}; exec 9>'{}'; umount -l '{}'", file.display(), elsewhere.display());
    let live = Live::start_in_namespace(&script, &["read", "/dev/null"]);
    assert_eq!(reached(&live, &[branch(&dir)]), [(0, How::Descriptor(9))]);
}

/// `fsnap rm --branch` was refused because of a process that had a file elsewhere on the file system, behind a mount that
/// nobody shows any more.
fn what_cannot_be_told_makes_no_user() {
    let place = Place::new();
    let (used, other, elsewhere) = (place.dir("used"), place.dir("other"), place.dir("elsewhere"));
    let (file, from, to) = (elsewhere.join("file"), other.display(), elsewhere.display());
    let script = format!("mount --bind '{from}' '{to}'; exec 9>'{}'; umount -l '{to}'", file.display());
    let doubtful = Live::start_in_namespace(&script, &["read", "/dev/null"]);
    assert_eq!(reached(&doubtful, &[branch(&used)]), [(0, How::Descriptor(9))]);
    let sure = Live::start(&["write", text(&used.join("file"))]);
    let found: Vec<_> = users(&[branch(&used)]).unwrap().into_iter().map(|user| user.id).collect();
    assert_eq!(found, [sure.id]);
}

fn a_part_of_a_volume_counts() {
    let place = Place::new();
    let (outer, inner, elsewhere) = (place.dir("outer"), place.dir("outer/inner"), place.dir("elsewhere"));
    let candidates = [volume(&outer)];
    let script = format!(
        "mount --bind '{}' '{1}'; mount -t tmpfs tmpfs '{2}'",
        inner.display(),
        elsewhere.display(),
        outer.display()
    );
    let live = Live::start_in_namespace(&script, &["read", "/dev/null"]);
    assert_eq!(reached(&live, &candidates), [(0, How::Mount(elsewhere))]);
}

fn a_branch_counts_where_it_is_mounted() {
    let place = Place::new();
    let (dir, store) = (place.dir("one"), place.dir("one/store"));
    let (used, unused) = (place.dir("one/store/used"), place.dir("one/store/unused"));
    let candidates = [volume(&dir), branch(&used), branch(&unused)];
    let script = format!("mount --bind '{}' '{}'", used.display(), dir.display());
    let live = Live::start_in_namespace(&script, &["write", text(&dir.join("file"))]);
    assert_eq!(reached(&live, &candidates), [(1, How::Descriptor(3))]);
    // A branch that is a mount of its own at its own place is merely there.
    mount(Some("tmpfs"), &store, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let live = Live::start(&["read", "/dev/null"]);
    assert_eq!(reached(&live, &[branch(&store)]), []);
}

fn a_nested_subvolume_belongs_to_its_volume() {
    let place = Place::new();
    let (image, top) = (place.root.join("image"), place.dir("top"));
    fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
    };
    run("mkfs.btrfs", &["-q", text(&image)]);
    run("mount", &["-o", "loop", text(&image), text(&top)]);
    let (one, nested, other) = (top.join("one"), top.join("one/nested"), top.join("other"));
    for dir in [&one, &nested, &other] {
        run("btrfs", &["subvolume", "create", text(dir)]);
    }
    let candidates = [branch(&one), branch(&other)];
    let elsewhere = place.dir("elsewhere");
    let script = format!("mount --bind '{}' '{}'", nested.display(), elsewhere.display());
    for behaviour in ["write", "map"] {
        let live = Live::start(&[behaviour, text(&nested.join("file"))]);
        assert_eq!(reached(&live, &candidates).len(), 1, "{behaviour}");
        let live = Live::start_in_namespace(&script, &[behaviour, text(&elsewhere.join("file"))]);
        let found = reached(&live, &candidates);
        assert_eq!(found.iter().map(|(candidate, _)| *candidate).collect::<Vec<_>>(), [0], "{behaviour}");
    }
    let root = Live::start(&["read", "/dev/null"]);
    assert!(is_mount(&reached(&root, &[volume(&one), volume(&other)]), &[0, 1]));
    drop(root);
    run("umount", &[text(&top)]);
}

fn a_name_of_any_bytes_hides_nothing() {
    let place = Place::new();
    let dir = place.dir("one");
    let odd = place.dir(OsStr::from_bytes(b"a\xff \n\\b"));
    let script = format!("mount --bind '{}' \"$ODD\"", dir.display());
    let script = format!("ODD=$(printf '{}/a\\377 \\n\\\\b'); {script}", place.root.display());
    let live = Live::start_in_namespace(&script, &["read", "/dev/null"]);
    assert!(odd.exists());
    assert_eq!(reached(&live, &[branch(&dir)]), [(0, How::Mount(odd))]);
}

fn a_volume_made_again_is_another() {
    let place = Place::new();
    let dir = place.dir("one");
    let before = volume(&dir);
    fs::create_dir(place.root.join("new")).unwrap();
    fs::rename(place.root.join("new"), &dir).unwrap();
    let live = Live::start(&["read", "/dev/null"]);
    assert_eq!(reached(&live, std::slice::from_ref(&before)), []);
    fs::remove_dir(&dir).unwrap();
    assert_eq!(reached(&live, &[before]), []);
}

fn a_process_whose_first_thread_ended_is_seen() {
    let place = Place::new();
    let dir = place.dir("one");
    let live = Live::start(&["first-thread-ends", text(&dir)]);
    let stat = || fs::read_to_string(format!("/proc/{}/stat", live.id)).unwrap();
    wait_until("the end of the first thread", || stat().contains(") Z "));
    wait_until("its file", || fs::read_dir(&dir).unwrap().next().is_some());
    let found = writers(&[volume(&dir)], &Tree::of_processes([]), &[]).unwrap().writers;
    assert_eq!(found.iter().map(|found| found.process).collect::<Vec<_>>(), [live.id]);
    assert_eq!(reached(&live, &[volume(&dir)]).len(), 1);
}

fn writers_outside_the_tree_are_named() {
    let place = Place::new();
    let (one, other) = (place.dir("one"), place.dir("other"));
    let volumes = [volume(&one), volume(&other)];
    let member = Live::start(&["write", text(&one.join("a"))]);
    let writer = Live::start(&["write", text(&one.join("b"))]);
    let mapper = Live::start(&["map", text(&other.join("c"))]);
    let engine = Live::start(&["write", text(&one.join("d"))]);
    let _readers = [
        Live::start(&["read", text(&one.join("a"))]),
        Live::start(&["cwd", text(&one)]),
        Live::start(&["directory", text(&one)]),
    ];
    let scan = writers(&volumes, &member.tree(), &[engine.pid()]).unwrap();
    let mut found: Vec<_> =
        scan.writers.into_iter().map(|found| (found.process, found.candidate, found.how, found.path)).collect();
    found.sort_by_key(|found| found.1);
    let expected = [(writer.id, 0, How::Descriptor(3), one.join("b")), (mapper.id, 1, How::Mapping, other.join("c"))];
    assert_eq!(found, expected);
    let own = [&writer, &mapper, &member, &engine];
    assert!(scan.unseen.iter().all(|unseen| own.iter().all(|live| live.id != unseen.id)));
    let nobody = Tree::of_processes([]);
    assert_eq!(writers(&volumes, &nobody, &[]).unwrap().writers.len(), 4);
}

fn what_the_tree_forks_later_belongs_to_it() {
    let place = Place::new();
    let dir = place.dir("one");
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"exec 3>>"$0"; read go; (read end); true"#]).arg(dir.join("file"));
    let mut shell = shell.stdin(Stdio::piped()).spawn().unwrap();
    wait_until("its file", || dir.join("file").exists());
    let tree = Tree::of_processes([ProcessId::of(shell.id().cast_signed()).unwrap()]);
    let (moment, volumes) = (BootTicks::now(), [volume(&dir)]);
    // A moment lasts a tick: a hundredth of a second.
    std::thread::sleep(Duration::from_millis(20));
    shell.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let outside =
        |scan: fsnap::processes::WriterScan| scan.writers.iter().map(|writer| writer.process).collect::<Vec<_>>();
    let now = || outside(writers(&volumes, &tree, &[]).unwrap());
    wait_until("the child", || now().len() == 1);
    assert_eq!(outside(writers_at(moment, &volumes, &tree, &[]).unwrap()), []);
    // Who was there before, beside a tree that stood, may have written meanwhile.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(outside(writers_at(BootTicks::now(), &volumes, &tree, &[]).unwrap()), now());
    drop(shell.stdin.take());
    shell.wait().unwrap();
}
