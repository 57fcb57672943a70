//! What is recorded of processes, and what of it lies outside.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use fsnap::name::Name;
use fsnap::processes::{
    AuditRules, Candidate, CandidateKind, Medium, OpenKind, Outside, Pattern, Policy, ProcessId, Tree, TreeRecord, Via,
    observe, process_changes,
};

use crate::live::{Case, Live, signal, wait_until};
use crate::reach::Place;

pub(crate) const CASES: &[Case] = &[
    ("what_a_process_has_in_use_is_recorded", what_a_process_has_in_use_is_recorded),
    ("what_lies_outside_is_named", what_lies_outside_is_named),
    ("a_mount_that_may_not_be_entered_is_not_named", a_mount_that_may_not_be_entered_is_not_named),
    ("what_lies_above_a_changed_root_is_not_named", what_lies_above_a_changed_root_is_not_named),
    ("what_does_not_matter_is_counted", what_does_not_matter_is_counted),
    ("refusal_tells_why", refusal_tells_why),
    ("a_command_line_that_never_comes_keeps_nobody_waiting", a_command_line_that_never_comes_keeps_nobody_waiting),
    ("a_reused_pid_is_nobody_of_the_tree", a_reused_pid_is_nobody_of_the_tree),
    ("ten_thousand_descriptors_are_recorded", ten_thousand_descriptors_are_recorded),
    ("a_root_that_is_renamed_meanwhile_is_the_same", a_root_that_is_renamed_meanwhile_is_the_same),
    ("changes_between_two_looks_are_told", changes_between_two_looks_are_told),
];

fn volumes(dir: &Path) -> Vec<(Name, Candidate)> {
    vec![("db".parse().unwrap(), Candidate::of(dir, CandidateKind::Registered).unwrap())]
}

fn rules(policy: Policy) -> AuditRules {
    AuditRules { policy, ..AuditRules::default() }
}

fn look(live: &Live, dir: &Path) -> TreeRecord {
    observe(&live.tree(), volumes(dir), &rules(Policy::Record)).unwrap().finish()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A process with one of each, its volume, and a directory that is none.
fn everything(place: &Place) -> (Live, std::path::PathBuf, std::path::PathBuf) {
    let (db, other) = (place.dir("db"), place.dir("other"));
    (Live::start(&["everything", text(&db), text(&other)]), db, other)
}

fn what_a_process_has_in_use_is_recorded() {
    let place = Place::new();
    let (live, db, other) = everything(&place);
    let record = look(&live, &db);
    assert_eq!(record.processes.len(), 2);
    let process = record.process(live.pid()).unwrap();
    let arguments: Vec<_> = process.arguments.iter().map(|argument| argument.to_string()).collect();
    assert_eq!(arguments[1..], ["everything", text(&db), text(&other)]);
    assert_eq!((process.start_time, process.unread.as_ref()), (live.id.start_time, None));
    let cwd = process.cwd.as_ref().unwrap();
    assert_eq!(cwd.path.as_path(), db);
    assert_eq!(cwd.volume.as_ref().unwrap().path.as_path(), Path::new(""));
    assert_eq!(process.root.as_ref().unwrap().path.as_path(), Path::new("/"));
    assert!(process.program.as_ref().unwrap().path.as_path().ends_with("helper"));

    let file = |fd| process.files.iter().find(|file| file.fd == fd).unwrap();
    let inside = |fd: i32| file(fd).place.volume.as_ref().map(|volume| volume.path.to_string());
    let data = file(50);
    assert_eq!((data.kind, data.access(), data.offset), (OpenKind::File, "rw", 7));
    assert_eq!(data.inode, std::os::unix::fs::MetadataExt::ino(&fs::metadata(db.join("data")).unwrap()));
    assert_eq!(inside(50).as_deref(), Some("data"));
    // A name may look like the kernel's own words.
    assert_eq!((inside(51).as_deref(), file(51).place.unlinked), (Some("a name (deleted)"), false));
    assert_eq!((file(51).access(), file(51).flags & 0o2000), ("w", 0o2000));
    assert_eq!((inside(52).as_deref(), file(52).place.unlinked), (Some("gone"), true));
    assert_eq!(file(52).place.path.as_path(), db.join("gone"));
    assert_eq!((file(53).access(), inside(53)), ("r", None));
    assert_eq!(file(61).kind, OpenKind::Socket);

    let mapped = process.mapped.iter().find(|file| file.place.path.as_path() == other.join("mapped")).unwrap();
    assert!(mapped.place.unlinked && mapped.shared && mapped.writable);
    let child = record.processes.iter().find(|process| process.pid != live.pid()).unwrap();
    assert_eq!(child.parent, live.pid());
    assert_eq!(child.cwd.as_ref().unwrap().path.as_path(), other);
    let json = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<TreeRecord>(&json).unwrap(), record);
}

/// What of one process was named, without mounts.
fn named(record: &TreeRecord, pid: i32) -> Vec<(Via, &Path, bool)> {
    let of = record.outside.iter().filter(|outside| outside.pid == pid && outside.via != Via::Mount);
    let mut named: Vec<_> = of
        .map(|outside| (outside.via, outside.path.as_path(), outside.unlinked))
        .filter(|(_, path, _)| path.is_absolute())
        .collect();
    named.retain(|(via, _, _)| !matches!(via, Via::Descriptor { fd: 0..=2 }));
    named
}

fn what_lies_outside_is_named() {
    let place = Place::new();
    let (live, db, other) = everything(&place);
    let record = look(&live, &db);
    assert_eq!(
        named(&record, live.pid()),
        [
            (Via::Descriptor { fd: 60 }, other.join("log").as_path(), false),
            (Via::Mapping, other.join("mapped").as_path(), true),
            (Via::Socket { fd: 61 }, other.join("socket").as_path(), false),
        ]
    );
    let mount = |point: &Path| record.outside.iter().find(|one| one.via == Via::Mount && one.path.as_path() == point);
    // The volume lies on it, and so does more.
    let tmpfs = mount(&place.root).unwrap();
    assert_eq!((tmpfs.medium, tmpfs.file_system.as_str()), (Medium::Memory, "tmpfs"));
    assert!(mount(Path::new("/proc")).is_none(), "the kernel's own has no files of anybody's");
    // A mount that shows the volume only is none.
    let shown = place.dir("shown");
    nix::mount::mount(Some(&db), &shown, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>).unwrap();
    let record = look(&live, &db);
    assert!(!record.outside.iter().any(|one| one.path.as_path() == shown));
    nix::mount::umount(&shown).unwrap();
    assert_eq!(record.outside.iter().filter(|one| one.path.as_path() == place.root).count(), 1, "each mount once");
    // Nobody looks, if that is what was asked for.
    let ignoring = observe(&live.tree(), volumes(&db), &rules(Policy::Ignore)).unwrap().finish();
    assert_eq!((ignoring.outside.len(), ignoring.processes.len()), (0, 2));
}

fn a_mount_that_may_not_be_entered_is_not_named() {
    let place = Place::new();
    let db = place.dir("db");
    let private = place.dir("private");
    nix::mount::mount(Some("tmpfs"), &private, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).unwrap();
    let user = Live::start(&["user", "65534"]);
    let names = |live: &Live| {
        let record = look(live, &db);
        record.outside.iter().any(|one| one.via == Via::Mount && one.path.as_path() == private)
    };
    let root = Live::start(&["cwd", "/"]);
    assert_eq!((names(&root), names(&user)), (true, false));
    nix::mount::umount(&private).unwrap();
}

fn what_lies_above_a_changed_root_is_not_named() {
    let place = Place::new();
    let db = place.dir("jail/db");
    let hidden = place.dir("hidden");
    let none: Option<&str> = None;
    nix::mount::mount(Some("tmpfs"), &hidden, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let live = Live::start(&["chroot", text(&place.root.join("jail"))]);
    let record = look(&live, &db);
    let mounts: Vec<_> =
        record.outside.iter().filter(|one| one.via == Via::Mount).map(|one| one.path.as_path()).collect();
    // Its root lies on it.
    assert_eq!(mounts, [place.root.as_path()]);
    assert_eq!(record.processes[0].root.as_ref().unwrap().path.as_path(), place.root.join("jail"));
    nix::mount::umount(&hidden).unwrap();
}

fn what_does_not_matter_is_counted() {
    let place = Place::new();
    let (live, db, other) = everything(&place);
    let ignore: Vec<Pattern> = vec![format!("{}/*", other.display()).parse().unwrap(), "tmpfs".parse().unwrap()];
    let observed = observe(&live.tree(), volumes(&db), &AuditRules { ignore, ..rules(Policy::Refuse) }).unwrap();
    let objection = observed.objection();
    let record = observed.finish();
    assert_eq!(named(&record, live.pid()), []);
    assert!(record.ignored >= 5, "{record:?}");
    let left = record.outside.iter().map(Outside::to_string).collect::<Vec<_>>();
    assert_eq!(objection.is_some(), !left.is_empty(), "{left:?}");
    let all: Vec<Pattern> = vec!["/".parse().unwrap()];
    let observed = observe(&live.tree(), volumes(&db), &AuditRules { ignore: all, ..rules(Policy::Refuse) }).unwrap();
    assert_eq!(observed.objection(), None);
}

fn refusal_tells_why() {
    let place = Place::new();
    let (live, db, other) = everything(&place);
    let all_but = ["/**/log", "/**/mapped", "/**/gone", "/dev", "/sys"];
    let mut ignore: Vec<Pattern> = all_but.map(|text| text.parse().unwrap()).into();
    // What else this machine has mounted.
    let mounts = look(&live, &db).outside;
    let mounts = mounts.iter().filter(|one| one.via == Via::Mount && one.path.as_path() != place.root);
    ignore.extend(
        mounts.filter(|one| one.path.as_path() != Path::new("/")).map(|one| one.path.to_string().parse().unwrap()),
    );
    let rules = AuditRules { ignore, ..rules(Policy::Refuse) };
    let objection = observe(&live.tree(), volumes(&db), &rules).unwrap().objection().unwrap();
    // A socket's file as well, though it takes a look at a list of all sockets.
    let expected =
        format!("{} (helper) has a socket bound as descriptor 61: {}/socket (tmpfs)", live.pid(), other.display());
    assert!(objection.contains(&expected), "{objection}");
    assert!(objection.contains(&format!("can write to the mount at {} (tmpfs)", place.root.display())), "{objection}");
    assert!(!objection.contains("/log"), "{objection}");
    assert_eq!(observe(&live.tree(), volumes(&db), &self::rules(Policy::Record)).unwrap().objection(), None);
}

/// A process can let its own command line lie where nobody ever delivers it.
fn a_command_line_that_never_comes_keeps_nobody_waiting() {
    let place = Place::new();
    let db = place.dir("db");
    let live = Live::start(&["no-command-line", text(&db.join("log"))]);
    let record = look(&live, &db);
    let process = record.process(live.pid()).unwrap();
    assert_eq!((process.arguments.len(), process.unread.as_ref()), (0, None));
    assert!(process.files.iter().any(|file| file.place.volume.is_some()), "{process:?}");
}

fn a_reused_pid_is_nobody_of_the_tree() {
    let place = Place::new();
    let db = place.dir("db");
    let live = Live::start(&["write", text(&db.join("a"))]);
    let tree = live.tree();
    let earlier = Tree::of_processes([ProcessId { start_time: live.id.start_time - 1, ..live.id }]);
    assert!(earlier.is_empty());
    let id = live.id;
    signal(id, "KILL");
    wait_until("the end", || !id.is_alive());
    // The tree was looked at while it lived: nothing is said of whoever has its pid now.
    let record = observe(&tree, volumes(&db), &rules(Policy::Refuse)).unwrap();
    assert_eq!(record.objection(), None);
    let record = record.finish();
    assert_eq!((record.processes[0].files.len(), record.processes[0].unread.as_ref()), (0, None));
}

fn ten_thousand_descriptors_are_recorded() {
    let place = Place::new();
    let db = place.dir("db");
    let script = format!(
        "ulimit -n 20000; i=0; while [ $i -lt 10000 ]; do eval \"exec {{fd}}>{}/f\"; i=$((i+1)); done; echo ready; sleep 1000",
        db.display()
    );
    let live = Live::run(Command::new("bash").args(["-c", &script]));
    let record = look(&live, &db);
    let files = &record.process(live.pid()).unwrap().files;
    assert!(files.iter().filter(|file| file.place.volume.is_some()).count() >= 10_000);
    assert!(!record.cut_off && files.is_sorted_by_key(|file| file.fd));
}

/// A process may rename its root, or a directory of it, at any time: a path is only what the kernel says at one instant, and
/// what it leads to is told by the mount table.
fn a_root_that_is_renamed_meanwhile_is_the_same() {
    let place = Place::new();
    let db = place.dir("db");
    let elsewhere = place.dir("elsewhere");
    fs::write(elsewhere.join("log"), "").unwrap();
    let live = Live::start(&["write", text(&db.join("log"))]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (moved, link) = (place.root.join("moved"), place.root.join("link"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(&db, &moved).unwrap();
                symlink(&elsewhere, &db).unwrap();
                fs::remove_file(&db).unwrap();
                fs::rename(&moved, &db).unwrap();
            }
        });
        let pinned = loop {
            // A link in its place is refused.
            if let Ok(candidate) = Candidate::of(&db, CandidateKind::Registered) {
                break candidate;
            }
        };
        for _ in 0..300 {
            let volumes = vec![("db".parse().unwrap(), pinned.clone())];
            let record = observe(&live.tree(), volumes, &rules(Policy::Record)).unwrap().finish();
            for file in &record.process(live.pid()).unwrap().files {
                if let Some(volume) = &file.place.volume {
                    assert_eq!(volume.path.as_path(), Path::new("log"));
                }
                assert!(!file.place.path.as_path().starts_with(&elsewhere), "{file:?}");
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(!link.exists());
}

fn changes_between_two_looks_are_told() {
    let place = Place::new();
    let db = place.dir("db");
    let script = format!(
        "cd {0}; exec 5>a 6>b; echo ready; read line <fifo; exec 5>&- 6>c 7>d; cd /; sleep 1000; :",
        db.display()
    );
    nix::unistd::mkfifo(&db.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let live = Live::run(Command::new("bash").args(["-c", &script]));
    let before = look(&live, &db);
    fs::write(db.join("fifo"), "go\n").unwrap();
    wait_until("its child", || live.tree().members().any(|member| member.command == "sleep"));
    let after = look(&live, &db);
    let told: Vec<String> = process_changes(&before, &after)
        .iter()
        .map(|change| match change {
            fsnap::processes::ProcessChange::Started(process) => format!("started {}", process.command),
            fsnap::processes::ProcessChange::Ended(process) => format!("ended {}", process.command),
            fsnap::processes::ProcessChange::Opened(_, file) => format!("opened {}", file.fd),
            fsnap::processes::ProcessChange::Closed(_, file) => format!("closed {}", file.fd),
            fsnap::processes::ProcessChange::Moved(_, to) => format!("moved {}", to.path),
        })
        .collect();
    assert_eq!(told, ["moved /", "closed 5", "closed 6", "opened 6", "opened 7", "started sleep"]);
    assert_eq!(process_changes(&after, &after), []);
}
