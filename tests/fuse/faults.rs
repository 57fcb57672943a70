//! Servers that are killed, and servers that are too many.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use fsnap::stores::{Kind, layers};
use fsnap_backend::{Dir, MountSpec, Source, beneath};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags};

use crate::Case;
use crate::operations;
use crate::site::{Site, fsnap, is_mounted};
use crate::sys::Lease;
use crate::tree;
use crate::waiting::wait_until;

pub(crate) const CASES: &[Case] = &[
    ("killed_while_writing_keeps_what_was_synced", killed_while_writing_keeps_what_was_synced),
    ("killed_between_renames_shows_one_name", killed_between_renames_shows_one_name),
    ("killed_while_sealing_is_before_or_after", killed_while_sealing_is_before_or_after),
    ("eight_writers_while_layers_are_sealed", eight_writers_while_layers_are_sealed),
    ("a_server_that_is_to_end_leaves_no_mount", a_server_that_is_to_end_leaves_no_mount),
    ("a_full_store_changes_nothing_by_halves", a_full_store_changes_nothing_by_halves),
    ("what_a_store_cannot_keep_of_a_file_is_not_copied_up", what_a_store_cannot_keep_of_a_file_is_not_copied_up),
    ("more_layers_than_a_tree_can_have_are_refused", more_layers_than_a_tree_can_have_are_refused),
    ("a_second_server_is_refused", a_second_server_is_refused),
    ("a_second_mount_at_the_same_place_is_refused", a_second_mount_at_the_same_place_is_refused),
    ("a_mount_that_others_have_as_well_goes_on_being_served", a_mount_that_others_have_as_well_goes_on_being_served),
    ("a_lease_on_a_stored_file_is_waited_for", a_lease_on_a_stored_file_is_waited_for),
    ("a_store_of_something_else_is_refused", a_store_of_something_else_is_refused),
    ("what_is_mounted_in_the_lower_is_in_no_snapshot", what_is_mounted_in_the_lower_is_in_no_snapshot),
];

/// The sealed state of that number, read without the server.
fn sealed_state(site: &Site, number: u64) -> Arc<dyn Dir> {
    let lower = layers::Below::Dir(beneath::open_root(&site.lower()).unwrap());
    layers::Overlay::sealed(lower, &site.store(), number).unwrap()
}

fn content(dir: &dyn Dir, name: &str) -> Vec<u8> {
    let content = dir.open_file(name.as_ref()).unwrap();
    let mut bytes = vec![0; content.len() as usize];
    let mut read = 0;
    while read < bytes.len() {
        match content.read_at(&mut bytes[read..], read as u64).unwrap() {
            0 => panic!("{name} is not as long as it says"),
            more => read += more,
        }
    }
    bytes
}

fn killed_while_sealing_is_before_or_after() {
    let site = Site::new(|lower| fs::write(lower.join("below"), "below").unwrap());
    let mut sealed = 0;
    for round in 0..12_u64 {
        let text = format!("round {round}");
        fs::write(site.at("file"), &text).unwrap();
        let mut open = fs::File::options().append(true).open(site.at("file")).unwrap();
        open.write_all(b" and more").unwrap();
        let (dir, image) = (site.dir(), format!("round.{round}"));
        site.hold(&image);
        let sealer = std::thread::spawn(move || {
            rustix::fs::setxattr(&dir, layers::SEAL, image.as_bytes(), XattrFlags::empty()).is_ok()
        });
        std::thread::sleep(Duration::from_micros(150 * round));
        site.kill();
        let told = sealer.join().unwrap();
        drop(open);
        site.mount();
        let expected = format!("{text} and more");
        assert_eq!(fs::read_to_string(site.at("file")).unwrap(), expected);
        assert_eq!(fs::read_to_string(site.at("below")).unwrap(), "below");
        let layers = fs::read_dir(site.store().join("layers")).map_or(0, |names| names.count() as u64);
        assert!(layers == sealed || layers == sealed + 1, "{layers} layers after {sealed}");
        assert!(!told || layers == sealed + 1, "what was answered is lost");
        if layers > sealed {
            assert_eq!(content(sealed_state(&site, sealed).as_ref(), "file"), expected.as_bytes());
        }
        sealed = layers;
    }
    site.end();
}

fn eight_writers_while_layers_are_sealed() {
    const RECORDS: usize = 300;
    let site = Site::new(|lower| {
        for writer in 0..8 {
            fs::write(lower.join(format!("w{writer}")), "").unwrap();
        }
    });
    let record = |number: usize| format!("{number:0>99}\n");
    let whole: String = (0..RECORDS).map(record).collect();
    let (tell, midway) = channel();
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let tell = tell.clone();
            let (name, other) = (site.at(&format!("w{writer}")), site.at(&format!("moved{writer}")));
            std::thread::spawn(move || {
                let mut held = fs::File::options().append(true).open(&name).unwrap();
                for number in 0..RECORDS {
                    if number == RECORDS / 3 {
                        let _ = tell.send(());
                    }
                    // Half of them keep the file open, half open it anew each time; names move to and fro.
                    let mut fresh = None;
                    if writer % 2 == 1 {
                        fresh = Some(fs::File::options().append(true).open(&name).unwrap());
                    }
                    let file = fresh.as_mut().unwrap_or(&mut held);
                    file.write_all(format!("{number:0>99}\n").as_bytes()).unwrap();
                    if number % 50 == 49 {
                        fs::rename(&name, &other).unwrap();
                        fs::rename(&other, &name).unwrap();
                    }
                }
            })
        })
        .collect();
    drop(tell);
    // All of them have files open, and most of their work before them.
    assert_eq!(midway.iter().take(8).count(), 8);
    let mut sealed = 0;
    while sealed < 2 || !writers.iter().all(std::thread::JoinHandle::is_finished) && sealed < 20 {
        site.seal(&format!("state.{sealed}"));
        sealed += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    for writer in 0..8 {
        assert_eq!(fs::read_to_string(site.at(&format!("w{writer}"))).unwrap(), whole, "writer {writer}");
    }
    let mut before = [0; 8];
    for number in 0..sealed {
        let state = sealed_state(&site, number);
        for (writer, before) in before.iter_mut().enumerate() {
            let names = [format!("w{writer}"), format!("moved{writer}")];
            let there: Vec<&String> =
                names.iter().filter(|name| state.entry(name.as_ref()).unwrap().is_some()).collect();
            assert_eq!(there.len(), 1, "writer {writer} in state {number}");
            let found = content(state.as_ref(), there[0]);
            assert!(whole.as_bytes().starts_with(&found), "writer {writer} in state {number}");
            assert!(found.len() >= *before, "writer {writer} went back in state {number}");
            *before = found.len();
        }
    }
    site.remount();
    for writer in 0..8 {
        assert_eq!(fs::read_to_string(site.at(&format!("w{writer}"))).unwrap(), whole, "writer {writer}");
    }
    site.end();
}

fn a_server_that_is_to_end_leaves_no_mount() {
    let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = |name: &str| base.path().join(name);
    for name in ["lower", "mnt", "volume"] {
        fs::create_dir(path(name)).unwrap();
    }
    let fsnap = || {
        let mut command = crate::site::fsnap();
        command.env("FSNAP_STATE", path("state")).current_dir(base.path()).stdin(Stdio::null());
        command
    };
    assert!(fsnap().args(["init", "volume", "--backend", "rsync"]).output().unwrap().status.success());
    let manager = UnixDatagram::bind(path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    for (arguments, signal) in [
        (&["mount", "--foreground", "mnt"][..], Signal::SIGTERM),
        (&["overlay", "--foreground", "lower", "store", "mnt"], Signal::SIGINT),
    ] {
        for held in [false, true] {
            let mut server = fsnap().args(arguments).env("NOTIFY_SOCKET", path("notify")).spawn().unwrap();
            let mut said = [0; 64];
            let length = manager.recv(&mut said).unwrap();
            assert_eq!(&said[..length], b"READY=1");
            assert!(is_mounted(&path("mnt")));
            // Whoever has a file open does not keep it.
            let open = held.then(|| fs::File::open(path("mnt")).unwrap());
            nix::sys::signal::kill(Pid::from_raw(server.id().cast_signed()), signal).unwrap();
            assert!(server.wait().unwrap().success(), "{arguments:?}");
            assert!(!is_mounted(&path("mnt")));
            drop(open);
        }
    }
    // Who unmounts knows that the server has ended.
    for _ in 0..5 {
        let mut server =
            fsnap().args(["mount", "--foreground", "mnt"]).env("NOTIFY_SOCKET", path("notify")).spawn().unwrap();
        manager.recv(&mut [0; 64]).unwrap();
        assert!(fsnap().args(["umount", "mnt"]).output().unwrap().status.success());
        // It has let go of its lock, and has nothing more to do than to be waited for.
        assert!(server.wait().unwrap().success());
        assert_eq!(fs::read_dir(path("state/servers")).unwrap().count(), 0);
    }
}

/// How often each is killed, each time a little later.
const KILLS: u64 = 6;

fn killed_while_writing_keeps_what_was_synced() {
    let site = Site::new(|lower| fs::write(lower.join("log"), vec![b'.'; 100_000]).unwrap());
    let (mut synced_before, mut sealed) = (0, 0);
    for kill in 0..KILLS {
        let path = site.at("log");
        let (tell, told) = channel();
        // Whole records of 1,000 bytes, each synced before it is told of, until the server is gone.
        let writer = std::thread::spawn(move || {
            let mut file = fs::File::options().append(true).open(path).unwrap();
            for record in synced_before.. {
                let text = format!("{record:0>999}\n");
                if file.write_all(text.as_bytes()).and_then(|()| file.sync_data()).is_err() {
                    return;
                }
                let _ = tell.send(record + 1);
            }
        });
        let mut synced = told.recv_timeout(Duration::from_secs(120)).expect("a record is written");
        std::thread::sleep(Duration::from_millis(3 * kill));
        // Every other time, what was written so far is in a layer that was sealed under the writer's hands.
        if kill % 2 == 1 {
            site.seal(&format!("kill.{kill}"));
            sealed += 1;
        }
        std::thread::sleep(Duration::from_millis(4 * kill));
        site.kill();
        writer.join().unwrap();
        synced = told.try_iter().last().unwrap_or(synced);
        assert!(is_mounted(&site.dir()), "a killed server leaves its mount, which the next one clears");
        site.mount();
        let content = fs::read_to_string(site.at("log")).unwrap();
        let records = content.strip_prefix(&".".repeat(100_000)).expect("what the lower had is there");
        for record in 0..synced {
            let found = records.get(1000 * record..1000 * (record + 1));
            assert_eq!(found, Some(&*format!("{record:0>999}\n")), "after kill {kill}: {synced} were synced");
        }
        // The next writer goes on after the last whole record.
        synced_before = records.len() / 1000;
        let end = 100_000 + 1000 * synced_before as u64;
        fs::File::options().write(true).open(site.at("log")).unwrap().set_len(end).unwrap();
    }
    assert_eq!(sealed, KILLS / 2);
    site.end();
}

fn killed_between_renames_shows_one_name() {
    let site = Site::new(|lower| {
        fs::create_dir(lower.join("d")).unwrap();
        fs::write(lower.join("d/in"), "inside").unwrap();
    });
    for kill in 0..KILLS {
        let (path, (tell, told)) = (site.dir(), channel());
        // A directory of the lower changes its name as fast as it can.
        let renamer = std::thread::spawn(move || {
            let names = [path.join("d"), path.join("e")];
            let mut at = usize::from(!names[0].exists());
            while fs::rename(&names[at], &names[1 - at]).is_ok() {
                at = 1 - at;
                let _ = tell.send(());
            }
        });
        told.recv_timeout(Duration::from_secs(120)).expect("a name is changed");
        std::thread::sleep(Duration::from_millis(kill));
        site.kill();
        renamer.join().unwrap();
        site.mount();
        let names: Vec<_> = fs::read_dir(site.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names == ["d"] || names == ["e"], "after kill {kill}: {names:?}");
        assert_eq!(fs::read_to_string(site.dir().join(&names[0]).join("in")).unwrap(), "inside");
    }
    site.end();
}

fn a_full_store_changes_nothing_by_halves() {
    let site = Site::on_small_store(1 << 20, |lower| {
        fs::create_dir(lower.join("d")).unwrap();
        for name in ["f", "g", "d/in"] {
            fs::write(lower.join(name), name.repeat(5000)).unwrap();
        }
        fs::hard_link(lower.join("g"), lower.join("h")).unwrap();
    });
    let mut filler = fs::File::create(site.at("filler")).unwrap();
    let full = loop {
        if let Err(error) = filler.write_all(&[1; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let before = tree::of(&site.dir());
    for name in ["f", "g", "h", "d/in"] {
        // It may be refused when the file is copied up, or when its first block is.
        let written = fs::File::options().append(true).open(site.at(name)).and_then(|mut file| file.write_all(b"more"));
        assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::StorageFull, "{name}");
        tree::assert_equal(&before, &tree::of(&site.dir()), name);
        assert_eq!(fs::read_dir(site.store().join("work")).unwrap().count(), 0, "{name} left something behind");
    }
    drop(filler);
    fs::remove_file(site.at("filler")).unwrap();
    // The kernel tells of a closing when it has returned already, and only then is the room free.
    let has_room = || rustix::fs::statvfs(site.store()).is_ok_and(|space| space.f_bfree > space.f_blocks / 2);
    wait_until("there is room again", has_room);
    for name in ["f", "h", "d/in"] {
        fs::File::options().append(true).open(site.at(name)).unwrap().write_all(b"more").unwrap();
    }
    site.remount();
    for (name, first) in [("f", "f"), ("g", "g"), ("h", "g"), ("d/in", "d/in")] {
        assert_eq!(fs::read_to_string(site.at(name)).unwrap(), first.repeat(5000) + "more", "{name}");
    }
    site.end();
}

fn what_a_store_cannot_keep_of_a_file_is_not_copied_up() {
    let site = Site::on_store_without_acls(|lower| {
        fs::create_dir(lower.join("private")).unwrap();
        for name in ["shut", "plain", "private/file"] {
            fs::write(lower.join(name), name).unwrap();
        }
        for (acl, name) in [("u:12345:-,o::r", "shut"), ("d:u:12345:-,d:o::r", "private")] {
            assert!(Command::new("setfacl").args(["-m", acl]).arg(lower.join(name)).status().unwrap().success());
        }
    });
    let refused = |done: std::io::Result<()>| assert_eq!(operations::errno(done.unwrap_err()), Errno::OPNOTSUPP);
    for _ in 0..2 {
        refused(fs::File::options().append(true).open(site.at("shut")).map(drop));
        refused(fs::set_permissions(site.at("shut"), PermissionsExt::from_mode(0o600)));
        refused(fs::rename(site.at("shut"), site.at("open")));
        refused(fs::write(site.at("private/new"), ""));
        fs::write(site.at("plain"), "changed").unwrap();
        assert_eq!(fs::read_to_string(site.at("shut")).unwrap(), "shut");
        assert!(rustix::fs::getxattr(site.at("shut"), "system.posix_acl_access", &mut [0; 256]).is_ok());
        assert_eq!(fs::read_dir(site.store().join("work")).unwrap().count(), 0);
        site.remount();
    }
    site.end();
}

fn more_layers_than_a_tree_can_have_are_refused() {
    let site = Site::new(|lower| fs::write(lower.join("below"), "below").unwrap());
    for number in 1..layers::MOST_LAYERS {
        fs::write(site.at("file"), number.to_string()).unwrap();
        site.seal(&format!("state.{number}"));
    }
    let images = tempfile::tempdir().unwrap();
    let store = Kind::named("layers").unwrap().create(&images.path().join("images")).unwrap();
    let volume = store.adopt(&site.dir()).unwrap();
    let at = store.reserve(Source::Volume(&volume), &BTreeSet::new()).unwrap();
    let refused = store.snapshot(&volume, &at).unwrap_err().to_string();
    assert!(refused.contains("128 layers") && refused.contains("remove old checkpoints"), "{refused}");
    // The tree goes on, and so does taking snapshots of it, when one that is old is gone.
    store.delete(&at).unwrap();
    fs::write(site.at("file"), "more").unwrap();
    site.release("state.3");
    let snapshot = store.snapshot(&volume, &at).unwrap();
    drop(volume);
    fs::write(site.at("file"), "later").unwrap();
    let MountSpec::Tree(tree) = store.activate(&snapshot.at).unwrap() else { panic!("it is no tree") };
    assert_eq!((content(&*tree, "file"), content(&*tree, "below")), (b"more".into(), b"below".into()));
    assert_eq!(content(&*sealed_state(&site, 0), "file"), b"1");
    assert_eq!(fs::read_to_string(site.at("file")).unwrap(), "later");
    site.remount();
    assert_eq!(fs::read_to_string(site.at("file")).unwrap(), "later");
    site.end();
}

fn a_second_mount_at_the_same_place_is_refused() {
    let site = Site::new(|lower| fs::write(lower.join("file"), "below").unwrap());
    fs::write(site.at("file"), "changed").unwrap();
    let mount = || {
        let mut command = fsnap();
        command.arg("overlay").args([site.lower(), site.store().with_file_name("other store"), site.dir()]);
        command.output().unwrap()
    };
    let refused = mount();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("mounted at") && said.contains("already: unmount it first"), "{said}");
    assert_eq!(fs::read_to_string(site.at("file")).unwrap(), "changed");
    // What a killed server has left there is taken off.
    site.kill();
    assert!(mount().status.success());
    assert_eq!(fs::read_to_string(site.at("file")).unwrap(), "below");
    wait_until("it is unmounted", || fsnap().arg("umount").arg(site.dir()).status().unwrap().success());
}

fn a_second_server_is_refused() {
    let site = Site::new(|lower| fs::write(lower.join("f"), "below").unwrap());
    fs::write(site.at("g"), "above").unwrap();
    let before = tree::of(&site.dir());
    let output = site.second_server();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is in use by another server") && said.contains("fsnap umount"), "{said}");
    tree::assert_equal(&before, &tree::of(&site.dir()), "after the second server");
    site.end();
}

fn a_mount_that_others_have_as_well_goes_on_being_served() {
    let site = Site::new(|lower| fs::write(lower.join("f"), "below").unwrap());
    // As a mount namespace that is made meanwhile has one, but of this mount alone.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = rustix::mount::open_tree(rustix::fs::CWD, site.dir(), flags).unwrap();
    let output = fsnap().arg("umount").arg(site.dir()).output().unwrap();
    drop(copy);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("goes on being served"), "{said}");
    site.ends();
    site.mount();
    site.end();
}

/// The server itself has one for an instant, to see whether a file is mapped.
fn a_lease_on_a_stored_file_is_waited_for() {
    let site = Site::new(|lower| fs::write(lower.join("below"), "below").unwrap());
    fs::write(site.at("file"), "file").unwrap();
    site.remount();
    for (path, name) in [(site.store().join("upper/file"), "file"), (site.lower().join("below"), "below")] {
        let lease = Lease::new(fs::File::options().write(true).open(path).unwrap()).unwrap();
        let (tell, ended) = channel();
        let through = site.at(name);
        std::thread::spawn(move || tell.send(fs::read_to_string(through)).unwrap());
        wait_until("the lease is wanted back", || lease.is_wanted().unwrap());
        drop(lease);
        assert_eq!(ended.recv().unwrap().unwrap(), name);
    }
    site.end();
}

fn a_store_of_something_else_is_refused() {
    let site = Site::new(|lower| fs::write(lower.join("f"), "below").unwrap());
    site.unmount();
    fs::write(site.store().join("letter"), "not fsnap's").unwrap();
    let output = site.second_server();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("neither empty nor a store"), "{said}");
    assert_eq!(fs::read_to_string(site.store().join("letter")).unwrap(), "not fsnap's");
    fs::remove_file(site.store().join("letter")).unwrap();
    site.mount();
    site.end();
}

fn what_is_mounted_in_the_lower_is_in_no_snapshot() {
    let site = Site::new(|lower| {
        fs::create_dir(lower.join("d")).unwrap();
        fs::write(lower.join("d/file"), "below").unwrap();
        rustix::mount::mount("above", lower.join("d"), "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(lower.join("d/file"), "above").unwrap();
    });
    assert_eq!(fs::read(site.at("d/file")).unwrap(), b"below");
    let (kind, images) = (Kind::named("layers").unwrap(), tempfile::tempdir().unwrap());
    let place = images.path().join("images");
    let store = kind.create(&place).unwrap();
    let volume = store.adopt(&site.dir()).unwrap();
    let at = store.reserve(Source::Volume(&volume), &BTreeSet::new()).unwrap();
    store.snapshot(&volume, &at).unwrap();
    drop(volume);
    let MountSpec::Tree(tree) = kind.open(&place).unwrap().activate(&at).unwrap() else { panic!("it is no tree") };
    assert_eq!(content(&*tree.open_dir("d".as_ref()).unwrap(), "file"), b"below");
    drop(tree);
    site.unmount();
    rustix::mount::unmount(site.lower().join("d"), UnmountFlags::DETACH).unwrap();
}
