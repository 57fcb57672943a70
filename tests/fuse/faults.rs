//! Servers that are killed, and servers that are too many.

use std::fs;
use std::io::Write;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::Case;
use crate::site::{Site, is_mounted};
use crate::tree;

pub(crate) const CASES: &[Case] = &[
    ("killed_while_writing_keeps_what_was_synced", killed_while_writing_keeps_what_was_synced),
    ("killed_between_renames_shows_one_name", killed_between_renames_shows_one_name),
    ("a_full_store_changes_nothing_by_halves", a_full_store_changes_nothing_by_halves),
    ("a_second_server_is_refused", a_second_server_is_refused),
    ("a_store_of_something_else_is_refused", a_store_of_something_else_is_refused),
];

/// How often each is killed, each time a little later.
const KILLS: u64 = 6;

fn killed_while_writing_keeps_what_was_synced() {
    let site = Site::new(|lower| fs::write(lower.join("log"), vec![b'.'; 100_000]).unwrap());
    let mut synced_before = 0;
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
        let mut synced = told.recv_timeout(Duration::from_secs(20)).expect("a record is written");
        std::thread::sleep(Duration::from_millis(7 * kill));
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
        told.recv_timeout(Duration::from_secs(20)).expect("a name is changed");
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
    for name in ["f", "h", "d/in"] {
        fs::File::options().append(true).open(site.at(name)).unwrap().write_all(b"more").unwrap();
    }
    site.remount();
    for (name, first) in [("f", "f"), ("g", "g"), ("h", "g"), ("d/in", "d/in")] {
        assert_eq!(fs::read_to_string(site.at(name)).unwrap(), first.repeat(5000) + "more", "{name}");
    }
    site.end();
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
