//! The hook, called by CRIU, and everything that can go wrong around it.
//!
//! After each failure three things must hold: the process runs on and has noticed nothing; there is no checkpoint; and the
//! next command has left nothing of it, neither in the catalog nor in a store.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Case;
use crate::alone::classes;
use crate::oracle::Oracle;
use crate::site::{Site, Volume, create_subvolume, end, id_in, run, wait_until};

pub(crate) const CASES: &[Case] = &[
    ("what_cannot_be_dumped_leaves_no_checkpoint", what_cannot_be_dumped_leaves_no_checkpoint),
    ("a_full_image_directory_leaves_no_checkpoint", a_full_image_directory_leaves_no_checkpoint),
    ("a_record_that_cannot_be_written_fails_the_dump", a_record_that_cannot_be_written_fails_the_dump),
    ("a_snapshot_that_fails_takes_the_others_with_it", a_snapshot_that_fails_takes_the_others_with_it),
    ("a_store_that_is_full_fails_the_dump", a_store_that_is_full_fails_the_dump),
    ("a_pre_dump_that_fails_ends_it_before_the_freeze", a_pre_dump_that_fails_ends_it_before_the_freeze),
    ("the_deadline_ends_a_hook_that_hangs", the_deadline_ends_a_hook_that_hangs),
    ("sigterm_in_the_middle_fails_the_dump", sigterm_in_the_middle_fails_the_dump),
    ("a_search_for_writers_that_is_cut_off_claims_less", a_search_for_writers_that_is_cut_off_claims_less),
    ("a_search_for_writers_that_takes_long_is_waited_for", a_search_for_writers_that_takes_long_is_waited_for),
    ("what_the_processes_had_in_use_is_recorded", what_the_processes_had_in_use_is_recorded),
    ("what_lies_outside_can_refuse_the_dump", what_lies_outside_can_refuse_the_dump),
    ("called_twice_it_is_one_checkpoint", called_twice_it_is_one_checkpoint),
    ("an_image_directory_used_again_is_a_new_checkpoint", an_image_directory_used_again_is_a_new_checkpoint),
    ("another_script_that_fails_fails_the_checkpoint", another_script_that_fails_fails_the_checkpoint),
    ("the_name_of_the_image_directory_does_not_matter", the_name_of_the_image_directory_does_not_matter),
    ("strangers_in_the_image_directory_are_harmless", strangers_in_the_image_directory_are_harmless),
    ("an_image_directory_inside_the_volume_is_refused", an_image_directory_inside_the_volume_is_refused),
    ("volumes_are_named_by_environment_and_setting", volumes_are_named_by_environment_and_setting),
    ("a_volume_that_was_replaced_is_refused", a_volume_that_was_replaced_is_refused),
    ("a_volume_that_was_removed_is_refused", a_volume_that_was_removed_is_refused),
    ("thirty_two_at_once", thirty_two_at_once),
];

/// What must hold after a dump that has failed.
pub(crate) fn untouched(site: &Site, oracle: &Oracle) {
    oracle.goes_on();
    site.holds_nothing_but(0);
    // And nothing of it stands in the way of the next one.
    let (id, _) = site.checkpoint(oracle.pid);
    assert_eq!(site.ids(), [id]);
    oracle.goes_on();
}

/// Makes sure that the text says all of these.
pub(crate) fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

fn what_cannot_be_dumped_leaves_no_checkpoint() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    // A device that CRIU does not know.
    let mut sleeper = Command::new("setsid")
        .args(["sh", "-c", "exec 3<>/dev/loop-control 4>>file; exec sleep infinity"])
        .current_dir(&site.volumes[0])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = sleeper.id().cast_signed();
    wait_until("the program", || fs::read(format!("/proc/{pid}/comm")).is_ok_and(|name| name == b"sleep\n"));
    let images = site.images();
    site.failing_dump(pid, &images, &site.hook_after("pre-dump", ":"));
    assert_eq!(site.calls(), ["pre-dump"]);
    // Its sleep goes on: it neither is stopped nor traced.
    wait_until("the end of the freeze", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains("(sleep) S ")
    });
    assert!(!images.join("fsnap.json").exists());
    site.holds_nothing_but(0);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}

fn a_full_image_directory_leaves_no_checkpoint() {
    let mut site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let images = site.images();
    site.mount_small(&images, 200);
    site.failing_dump(oracle.pid, &images, &site.hook());
    untouched(&site, &oracle);
}

fn a_record_that_cannot_be_written_fails_the_dump() {
    let mut site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let images = site.images();
    site.mount_small(&images, 20_000);
    // Whole images, and then no room.
    let script = site.hook_after("post-dump", "cat /dev/zero >\"$CRTOOLS_IMAGE_DIR/rest\" 2>/dev/null");
    let log = site.failing_dump(oracle.pid, &images, &script);
    assert_eq!(site.calls(), ["pre-dump", "post-dump"]);
    assert!(!images.join("fsnap.json").exists(), "{log}");
    untouched(&site, &oracle);
}

fn a_snapshot_that_fails_takes_the_others_with_it() {
    let site = Site::new(&[Volume::Rsync, Volume::Btrfs, Volume::Btrfs]);
    let oracle = site.small_oracle();
    let place = site.path("mnt/.fsnap/snapshots");
    let script = site.hook_after("post-dump", &format!("chattr +i '{}'", place.display()));
    let log = site.failing_dump(oracle.pid, &site.images(), &script);
    run(Command::new("chattr").arg("-i").arg(&place));
    says(&log, &["fsnap: error: "]);
    untouched(&site, &oracle);
}

fn a_store_that_is_full_fails_the_dump() {
    let mut site = Site::new(&[Volume::Btrfs]);
    let small = site.path("small");
    site.mount_small(&small, 40_000);
    let volume = small.join("volume");
    fs::create_dir(&volume).unwrap();
    site.ok(["init".as_ref(), "--backend".as_ref(), "rsync".as_ref(), volume.as_os_str()]);
    site.volumes.push(volume);
    let oracle = site.small_oracle();
    let rest = small.join("rest");
    let script = site.hook_after("post-dump", &format!("cat /dev/zero >'{}' 2>/dev/null", rest.display()));
    let log = site.failing_dump(oracle.pid, &site.images(), &script);
    says(&log, &["fsnap: error: ", "No space left on device"]);
    fs::remove_file(&rest).unwrap();
    // The writers in that volume had no room either.
    drop(oracle);
    site.holds_nothing_but(0);
}

fn a_pre_dump_that_fails_ends_it_before_the_freeze() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let script = site.hook_after("pre-dump", "export FSNAP_VOLUMES=v0,absent");
    let log = site.failing_dump(oracle.pid, &site.images(), &script);
    says(&log, &["absent", "`fsnap volumes` lists the volumes"]);
    assert_eq!(site.calls(), ["pre-dump"]);
    untouched(&site, &oracle);
}

fn the_deadline_ends_a_hook_that_hangs() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    site.configure("[hook]\ndeadline_seconds = 0.3\n");
    // Before anything is taken, between two members, with all taken, and with even the record beside the images.
    for place in ["hook:frozen", "take:snapshot", "take:all", "hook:taken", "hook:written"] {
        let script = site.hook_after("post-dump", &format!("export FSNAP_FAILPOINT={place}=sleep:3600000"));
        let log = site.failing_dump(oracle.pid, &site.images(), &script);
        says(&log, &["fsnap: error: taking the snapshots took longer than 0.3 s"]);
        oracle.goes_on();
        site.holds_nothing_but(0);
    }
    site.configure("");
    untouched(&site, &oracle);
}

fn sigterm_in_the_middle_fails_the_dump() {
    let site = Site::without_attendant(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    for place in ["hook:frozen", "take:all", "hook:written"] {
        let pid_file = site.new_path("pid");
        let lines = format!("echo $$ >'{}'; export FSNAP_FAILPOINT={place}=sleep:3600000", pid_file.display());
        let script = site.hook_after("post-dump", &lines);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut pid = None;
                // Where it waits, the kernel says: the script's own process becomes fsnap, and sleeps.
                wait_until("the hook's sleep", || {
                    pid = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok());
                    pid.is_some_and(is_asleep)
                });
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.unwrap()), nix::sys::signal::Signal::SIGTERM)
                    .unwrap();
            });
            site.failing_dump(oracle.pid, &site.images(), &script);
        });
        oracle.goes_on();
        site.holds_nothing_but(0);
    }
    untouched(&site, &oracle);
}

/// Whether any thread of fsnap sleeps for a given time.
pub(crate) fn is_asleep(pid: i32) -> bool {
    let is_fsnap = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("fsnap"));
    let calls = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let number = nix::libc::SYS_clock_nanosleep.to_string();
    let sleeps = |call: String| call.split(' ').next() == Some(&number);
    is_fsnap && calls.into_iter().any(|task| fs::read_to_string(task.path().join("syscall")).is_ok_and(sleeps))
}

fn a_search_for_writers_that_is_cut_off_claims_less() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    for (count, place) in ["search:started", "search:tree", "search:found"].into_iter().enumerate() {
        let script = site.hook_after("post-dump", &format!("export FSNAP_FAILPOINT={place}=kill"));
        let images = site.images();
        site.dump(oracle.pid, &images, &script).unwrap();
        let checkpoint = site.json(["show", "--json", &id_in(&images)]);
        assert_eq!(classes(&checkpoint), ["crash-consistent", "fuzzy"], "{checkpoint}");
        let writers = checkpoint["members"][1]["writers"].to_string();
        says(&writers, &["perhaps others", "cut off"]);
        site.holds_nothing_but(count + 1);
    }
    oracle.goes_on();
}

fn a_search_for_writers_that_takes_long_is_waited_for() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let script = site.hook_after("post-dump", "export FSNAP_FAILPOINT=search:found=sleep:1500");
    let images = site.images();
    site.dump(oracle.pid, &images, &script).unwrap();
    let checkpoint = site.json(["show", "--json", &id_in(&images)]);
    assert_eq!(classes(&checkpoint), ["point-in-time"], "{checkpoint}");
    oracle.goes_on();
    site.holds_nothing_but(1);
}

fn called_twice_it_is_one_checkpoint() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let images = site.images();
    // The second call of each pair is that of the script's end.
    let once = format!("'{}' >>'{}' || exit", site.hook().display(), site.path("ids").display());
    let script = site.path("twice");
    fs::write(&script, format!("#!/bin/sh\n{once}\n{once}\n")).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    site.dump(oracle.pid, &images, &script).unwrap();
    let ids = fs::read_to_string(site.path("ids")).unwrap();
    assert_eq!(ids.lines().collect::<Vec<_>>(), [id_in(&images).as_str(); 4]);
    site.holds_nothing_but(1);
    oracle.goes_on();
}

fn an_image_directory_used_again_is_a_new_checkpoint() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let (first, images) = site.checkpoint(oracle.pid);
    site.dump(oracle.pid, &images, &site.hook()).unwrap();
    let second = id_in(&images);
    assert_eq!(site.ids(), [second.clone(), first.clone()]);
    // The images of the first are gone: what is there belongs to the second.
    let refused = site.command(["restore", &first]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    says(&String::from_utf8_lossy(&refused.stderr), &[&second]);
    assert_eq!(site.json(["branches", "--json"]).as_array().unwrap().len(), 0);
    let restored = site.json(["restore", &second, "--json"]);
    end(i32::try_from(restored["init"].as_i64().unwrap()).unwrap());
}

fn another_script_that_fails_fails_the_checkpoint() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let failing = site.path("failing");
    fs::write(&failing, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n").unwrap();
    fs::set_permissions(&failing, fs::Permissions::from_mode(0o755)).unwrap();
    // CRIU calls them in the reverse order: fsnap is done when the other one fails.
    let images = site.images();
    let args = ["--action-script".as_ref(), failing.as_os_str(), "--action-script".as_ref(), site.hook().as_os_str()]
        .map(ToOwned::to_owned);
    site.criu().dump(oracle.pid, &images, args).unwrap_err();
    oracle.goes_on();
    // fsnap cannot know of it. What it took is whole: the images are complete, and the files are those of their instant.
    site.holds_nothing_but(1);
    oracle.goes_on();
}

fn the_name_of_the_image_directory_does_not_matter() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let outside = site.path("touched");
    let hostile =
        format!("a b'\"\n\\; touch {} #$(touch x)`touch y`*..%s", outside.display().to_string().replace('/', "_"));
    let images = site.path(&hostile);
    fs::create_dir(&images).unwrap();
    site.dump(oracle.pid, &images, &site.hook()).unwrap();
    let id = id_in(&images);
    let restored = site.json(["restore", &id, "--json"]);
    end(i32::try_from(restored["init"].as_i64().unwrap()).unwrap());
    assert!(!outside.exists());
    oracle.goes_on();
}

fn strangers_in_the_image_directory_are_harmless() {
    let site = Site::new(&[Volume::Btrfs]);
    let oracle = site.small_oracle();
    let precious = site.path("precious");
    fs::write(&precious, "precious").unwrap();
    type Plant<'a> = &'a dyn Fn(&Path);
    let link = |path: &Path| symlink(&precious, path).unwrap();
    let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let file = |path: &Path| {
        fs::write(path, "{}").unwrap();
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    };
    let plants: [Plant<'_>; 3] = [&link, &fifo, &file];
    for plant in plants {
        for name in ["fsnap.json", ".fsnap.json.new"] {
            let images = site.images();
            std::os::unix::fs::chown(&images, Some(65534), Some(65534)).unwrap();
            plant(&images.join(name));
            site.dump(oracle.pid, &images, &site.hook()).unwrap();
            let record = images.join("fsnap.json").symlink_metadata().unwrap();
            assert!(record.is_file(), "{name}: {record:?}");
            assert_eq!(fs::read(&precious).unwrap(), b"precious");
            assert_eq!(site.ids()[0], id_in(&images));
        }
        // One that comes later is refused when the images are restored, whatever it is, without waiting for it.
        let (id, images) = site.checkpoint(oracle.pid);
        fs::remove_file(images.join("fsnap.json")).unwrap();
        plant(&images.join("fsnap.json"));
        let refused = site.command(["restore", &id]).output().unwrap();
        assert_eq!(refused.status.code(), Some(1));
        says(&String::from_utf8_lossy(&refused.stderr), &["fsnap.json"]);
    }
    // A directory cannot be replaced by a file: the dump fails.
    let images = site.images();
    fs::create_dir(images.join("fsnap.json")).unwrap();
    let before = site.ids().len();
    let log = site.failing_dump(oracle.pid, &images, &site.hook());
    says(&log, &["fsnap.json"]);
    site.holds_nothing_but(before);
    oracle.goes_on();
}

fn an_image_directory_inside_the_volume_is_refused() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    for volume in &site.volumes {
        let images = volume.join("a").join("images");
        fs::create_dir_all(&images).unwrap();
        let log = site.failing_dump(oracle.pid, &images, &site.hook_after("pre-dump", ":"));
        says(&log, &[volume.to_str().unwrap(), images.to_str().unwrap(), "outside every volume"]);
        assert!(!images.join("fsnap.json").exists());
    }
    assert_eq!(site.calls(), ["pre-dump", "pre-dump"]);
    untouched(&site, &oracle);
}

fn volumes_are_named_by_environment_and_setting() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync, Volume::Btrfs]);
    let oracle = site.small_oracle();
    let members = |script: &Path| {
        let images = site.images();
        site.dump(oracle.pid, &images, script).unwrap();
        let shown = site.json(["show", &id_in(&images), "--json"]);
        let members = shown["members"].as_array().unwrap();
        members.iter().map(|member| member["volume"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(members(&site.hook()), ["v0", "v1", "v2"]);
    site.configure("[hook]\nvolumes = ['v1']\n");
    assert_eq!(members(&site.hook()), ["v1"]);
    let script = site.hook_after("pre-dump", "export FSNAP_VOLUMES=' v2, v0'");
    assert_eq!(members(&script), ["v0", "v2"]);
    oracle.goes_on();
}

fn a_volume_that_was_replaced_is_refused() {
    for kind in [Volume::Btrfs, Volume::Rsync] {
        let site = Site::new(&[kind, Volume::Rsync]);
        let oracle = site.small_oracle();
        let (volume, away, other) =
            (&site.volumes[0], site.volumes[0].with_extension("away"), site.volumes[0].with_extension("other"));
        if kind == Volume::Btrfs {
            create_subvolume(&other);
        } else {
            fs::create_dir(&other).unwrap();
        }
        let [volume, away, other] = [volume, &away, &other].map(|path| path.display().to_string());
        // The process must not run where its files are not.
        let script = site.hook_between(
            "post-dump",
            &format!("mv '{volume}' '{away}' && mv '{other}' '{volume}'"),
            &format!("mv '{volume}' '{other}' && mv '{away}' '{volume}'"),
        );
        let log = site.failing_dump(oracle.pid, &site.images(), &script);
        says(&log, &["fsnap: error: ", "v0", &volume, "mount the right file system there"]);
        untouched(&site, &oracle);
    }
}

fn a_volume_that_was_removed_is_refused() {
    for kind in [Volume::Btrfs, Volume::Rsync] {
        let site = Site::new(&[kind, Volume::Rsync]);
        let oracle = site.small_oracle();
        let volume = site.volumes[0].display();
        let (there, back) = (format!("mv '{volume}' '{volume}.away'"), format!("mv '{volume}.away' '{volume}'"));
        let log = site.failing_dump(oracle.pid, &site.images(), &site.hook_between("post-dump", &there, &back));
        says(&log, &["fsnap: error: ", &volume.to_string()]);
        untouched(&site, &oracle);
    }
}

fn thirty_two_at_once() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    // Small trees: a shell and its child, both with files of the volumes open.
    let script = format!(
        "exec 3>>'{}/shared' 4>>'{}/own-'$$; sleep infinity & echo $! >&4; wait",
        site.volumes[0].display(),
        site.volumes[1].display()
    );
    let mut trees: Vec<_> = (0..32)
        .map(|_| {
            let mut command = Command::new("setsid");
            command.args(["sh", "-c", &script]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for tree in &trees {
        let own = site.volumes[1].join(format!("own-{}", tree.id()));
        wait_until("the tree", || fs::read(&own).is_ok_and(|text| !text.is_empty()));
    }
    // All of them wait for their turn on two cores meanwhile.
    site.configure("[hook]\ndeadline_seconds = 60\n");
    let mut ids: Vec<String> = std::thread::scope(|scope| {
        let site = &site;
        let dumps: Vec<_> =
            trees.iter().map(|tree| scope.spawn(|| site.checkpoint(tree.id().cast_signed()).0)).collect();
        dumps.into_iter().map(|dump| dump.join().unwrap()).collect()
    });
    let mut found = site.ids();
    ids.sort();
    found.sort();
    assert_eq!(found, ids);
    site.holds_nothing_but(32);
    for tree in &mut trees {
        assert!(tree.try_wait().unwrap().is_none(), "a tree has ended");
        let own = fs::read_to_string(site.volumes[1].join(format!("own-{}", tree.id()))).unwrap();
        end(own.trim().parse().unwrap());
        tree.wait().unwrap();
    }
}

fn what_the_processes_had_in_use_is_recorded() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    let oracle = site.small_oracle();
    let (id, _) = site.checkpoint(oracle.pid);
    let processes = site.json(["show", "--processes", "--json", &id]);
    assert_eq!(processes[0]["pid"], oracle.pid);
    let arguments = processes[0]["arguments"].to_string();
    says(&arguments, &["oracle", "--kinds", "append,overwrite,rename,volumes"]);
    let files = processes[0]["files"].as_array().unwrap();
    for volume in ["v0", "v1"] {
        let written = files.iter().filter(|file| file["volume"] == volume && file["access"] != "r").count();
        assert!(written > 0, "no file of {volume}: {files:?}");
    }
    // The engine and the hook are none of its processes.
    assert_eq!(processes.as_array().unwrap().len(), 1, "{processes}");
    let shown = site.json(["show", "--json", &id]);
    says(&shown["outside"].to_string(), &["\"via\":\"mount\""]);
    oracle.goes_on();
}

fn what_lies_outside_can_refuse_the_dump() {
    let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
    site.configure("[audit]\npolicy = 'refuse'\n");
    let oracle = site.small_oracle();
    let log = site.failing_dump(oracle.pid, &site.images(), &site.hook_after("pre-dump", ":"));
    says(&log, &["the processes can write to what the checkpoint would not hold", "fsnap audit PID"]);
    assert_eq!(site.calls(), ["pre-dump"], "before the freeze");
    oracle.goes_on();
    site.holds_nothing_but(0);

    // A mount of another type than all that are there comes between the hooks.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let types = mounts.lines().filter_map(|line| line.split_once(" - ")?.1.split(' ').next());
    let types: std::collections::BTreeSet<_> = types.map(|name| format!("'{name}'")).collect();
    assert!(!types.contains("'ramfs'"));
    let types = types.into_iter().collect::<Vec<_>>().join(", ");
    site.configure(&format!("[audit]\npolicy = 'refuse'\nignore = [{types}]\n"));
    let late = site.path("late");
    fs::create_dir(&late).unwrap();
    let script = site.hook_after("post-dump", &format!("mount -t ramfs late '{}'", late.display()));
    let log = site.failing_dump(oracle.pid, &site.images(), &script);
    rustix::mount::unmount(&late, rustix::mount::UnmountFlags::empty()).unwrap();
    says(&log, &["can write to the mount at", "late (ramfs)"]);
    oracle.goes_on();
    site.holds_nothing_but(0);

    // Who cannot be asked does not agree.
    let script = site.hook_after("post-dump", "export FSNAP_FAILPOINT=search:started=kill");
    let log = site.failing_dump(oracle.pid, &site.images(), &script);
    says(&log, &["the look at them was cut off"]);
    untouched(&site, &oracle);
}
