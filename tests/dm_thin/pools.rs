//! Pools, volumes and branches in them, and what differs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use libtest_mimic::Failed;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal};

use crate::kernel::{Case, Done, detach, ensure, failure, is, loop_device, output};
use crate::site::{Site, pretend};

pub(crate) const CASES: &[Case] = &[
    ("a_pool_is_made_shown_and_removed", a_pool_is_made_shown_and_removed),
    ("a_device_that_holds_something_is_refused", a_device_that_holds_something_is_refused),
    ("a_full_pool_is_enlarged_in_use", a_full_pool_is_enlarged_in_use),
    ("an_enlargement_is_whole_or_undone", an_enlargement_is_whole_or_undone),
    ("a_pool_on_a_device_has_the_size_that_was_asked_for", a_pool_on_a_device_has_the_size_that_was_asked_for),
    ("a_pool_leaves_the_device_of_another", a_pool_leaves_the_device_of_another),
    ("a_pool_comes_up_on_its_own_metadata_only", a_pool_comes_up_on_its_own_metadata_only),
    ("a_volume_that_is_away_is_named", a_volume_that_is_away_is_named),
    ("a_volume_for_which_there_is_no_room_is_told", a_volume_for_which_there_is_no_room_is_told),
    ("a_volume_that_was_not_completed_is_undone", a_volume_that_was_not_completed_is_undone),
    ("a_volume_that_others_made_is_known", a_volume_that_others_made_is_known),
    ("a_branch_is_a_volume", a_branch_is_a_volume),
    ("a_branch_survives_a_restart", a_branch_survives_a_restart),
    ("kills_leave_nothing", kills_leave_nothing),
    ("a_short_pool_refuses", a_short_pool_refuses),
    ("btrfs_is_left_to_its_own_backend", btrfs_is_left_to_its_own_backend),
    ("diff_reads_only_what_can_differ", diff_reads_only_what_can_differ),
    ("a_killed_diff_leaves_no_copy_of_the_metadata", a_killed_diff_leaves_no_copy_of_the_metadata),
    #[cfg(feature = "fuse")]
    ("an_unlinked_file_comes_back", an_unlinked_file_comes_back),
];

#[cfg(feature = "fuse")]
fn an_unlinked_file_comes_back() -> Done {
    for file_system in ["ext4", "xfs"] {
        crate::unlinked::it_comes_back(&Site::with_volume("1G", file_system)?.dir)?;
    }
    Ok(())
}

fn a_pool_is_made_shown_and_removed() -> Done {
    let site = Site::new("1G")?;
    let pool = site.listed()?;
    ensure(pool["up"] == true && pool["state"] == "works" && pool["made_by_fsnap"] == true, &pool.to_string())?;
    ensure(pool["data"]["total"] == 1_u64 << 30, &pool.to_string())?;
    // No more than the block that says whose data these are.
    ensure(pool["data"]["used"] == 1 << 16, &pool.to_string())?;
    let again = site.fails(&["pool", "create", &site.path("other"), "--name", &site.pool, "--size", "1G"])?;
    ensure(again.contains("exists already"), &again)?;
    let there = site.fails(&["pool", "create", &site.path("pool"), "--name", "other", "--size", "1G"])?;
    ensure(there.contains(&format!("the file {} exists already", site.path("pool/metadata"))), &there)?;
    let small = ["pool", "add-volume", &site.pool, "small", "--size", "8M", "--file-system", "xfs"];
    let small = site.fails(&small)?;
    ensure(small.contains("cannot run mkfs.xfs: ") && !small.contains("Usage"), &small)?;

    site.add_volume("db", "ext4")?;
    let pool = site.listed()?;
    ensure(pool["volumes"][0]["name"] == "db" && pool["data"]["used"].as_u64() > Some(1 << 16), &pool.to_string())?;
    // Before `db`, so that it is stopped first.
    site.fsnap(&["pool", "add-volume", &site.pool, "away", "--size", "16M"])?;
    let doctor = site.fsnap(&["doctor", &site.path("db")])?;
    ensure(doctor.contains(&format!("ok  pool: {} works; data ", site.pool)), &doctor)?;
    ensure(doctor.contains("% of 1.00 GiB, metadata "), &doctor)?;

    // What is in use stays.
    for (arguments, why) in [
        (&["pool", "remove", &site.pool][..], "the volumes away, db are in it"),
        (&["pool", "remove", &site.pool, "--with-volumes"], "it is mounted"),
        (&["pool", "stop", &site.pool], "it is mounted"),
        (&["pool", "remove-volume", &site.pool, "db"], "it is mounted"),
    ] {
        let said = site.fails(arguments)?;
        ensure(said.contains(why), &format!("{arguments:?}: {said}"))?;
        // All of it.
        ensure(site.devices()?.0 == 2, &format!("after {arguments:?} a volume is away"))?;
    }
    // A killed call leaves a volume away.
    output(Command::new("dmsetup").args(["remove", "--retry", &format!("{}-volume-away", site.pool)]))?;
    let started = site.fsnap(&["pool", "start", &site.pool])?;
    ensure(started.contains(" away /dev/") && started.contains(" db /dev/"), &started)?;
    site.fsnap(&["init", &site.path("db")])?;
    let said = site.fails(&["pool", "remove", &site.pool, "--with-volumes"])?;
    ensure(said.contains("fsnap rm --volume db") && !said.contains("hint"), &said)?;
    site.fsnap(&["rm", "--volume", "db"])?;
    fs::write(site.db().join("file"), "kept")?;

    // As after a start of the machine.
    site.unmount("db")?;
    site.fsnap(&["pool", "stop", &site.pool])?;
    ensure(site.listed()?["state"] == "down", "it is not down")?;
    let started = site.fsnap(&["pool", "start", &site.pool])?;
    ensure(started.contains(" db /dev/"), &started)?;
    site.mount("db", "ext4")?;
    is(&site.db().join("file"), "kept")?;
    site.unmount("db")?;

    site.fsnap(&["pool", "remove", &site.pool, "--with-volumes"])?;
    ensure(site.listed().is_err(), "it is still listed")?;
    ensure(fs::read_dir(site.dir.join("pool"))?.next().is_none(), "its files are still there")?;
    ensure(!output(Command::new("losetup").arg("--list"))?.contains(&site.path("pool")), "a loop device is left")
}

fn a_device_that_holds_something_is_refused() -> Done {
    let site = Site::new("1G")?;
    let device = loop_device(&site.dir.join("image"), 64 << 20)?;
    let tried = || -> Done {
        output(Command::new("mkfs.ext4").args(["-q", &device]))?;
        let other = format!("{}-device", site.pool);
        let said = site.fails(&["pool", "create", &device, "--name", &other])?;
        ensure(said.contains("it holds ext4"), &said)?;
        output(Command::new("wipefs").args(["--all", &device]))?;
        site.fsnap(&["pool", "create", &device, "--name", &other])?;
        site.fsnap(&["pool", "add-volume", &other, "v", "--size", "16M"])?;
        site.fsnap(&["pool", "remove-volume", &other, "v"])?;
        site.fsnap(&["pool", "remove", &other])?;
        Ok(())
    };
    let done = tried();
    detach(&device);
    done
}

/// What takes no snapshots since it fills up takes them again, and nothing in it has to be unmounted.
fn a_full_pool_is_enlarged_in_use() -> Done {
    let site = Site::with_volume("128M", "ext4")?;
    let config = site.dir.join("config.toml");
    fs::write(&config, "[dm-thin]\nfree_data = 50\n")?;
    let checkpoint = || {
        let mut command = site.command(&["checkpoint"]);
        command.env("FSNAP_CONFIG", &config);
        command
    };
    fs::write(site.db().join("large"), vec![7; 80 << 20])?;
    let refused = failure(&mut checkpoint())?;
    ensure(refused.contains("enlarge it (`fsnap pool grow`, if fsnap made it)"), &refused)?;

    let grow = |arguments: &[&str]| site.fsnap(&[&["pool", "grow", &site.pool], arguments].concat());
    let refuses = |arguments: &[&str]| site.fails(&[&["pool", "grow", &site.pool], arguments].concat());
    let smaller = refuses(&["--size", "100M"])?;
    ensure(smaller.contains(&format!("a pool smaller: the pool {} has 128 MiB of data", site.pool)), &smaller)?;
    let smaller = refuses(&["--metadata-size", "16M"])?;
    ensure(smaller.contains("has 32 MiB of metadata"), &smaller)?;
    let nothing = refuses(&[])?;
    ensure(nothing.contains("pool/data has become no larger; say how large it is to be, with --size"), &nothing)?;
    let said = refuses(&["--metadata-size", "16G"])?;
    ensure(said.contains("no pool can use more than 15 GiB of metadata"), &said)?;

    let said = grow(&["--size", "600M"])?;
    ensure(said.contains("% of 600.00 MiB, metadata "), &said)?;
    grow(&["--size", "600M"])?;
    let total = |what: &str| -> Result<Option<u64>, Failed> { Ok(site.listed()?[what]["total"].as_u64()) };
    ensure(total("data")? == Some(600 << 20) && total("metadata")? == Some(32 << 20), "it has not grown to that")?;
    output(&mut checkpoint())?;
    // More than it had room for.
    fs::write(site.db().join("larger"), vec![9; 150 << 20])?;
    File::open(site.db().join("larger"))?.sync_all()?;
    grow(&["--metadata-size", "64M"])?;
    ensure(total("data")? == Some(600 << 20) && total("metadata")? == Some(64 << 20), "the metadata have not grown")?;
    // Somebody else made the file larger.
    File::options().write(true).open(site.dir.join("pool/data"))?.set_len(700 << 20)?;
    grow(&[])?;
    ensure(total("data")? == Some(700 << 20), "it does not use what there is")?;

    // What holds many blocks holds much about them.
    grow(&["--size", "100G"])?;
    ensure(total("metadata")? == Some(100 << 20), "the metadata have not grown with the data")?;
    site.fsnap(&["verify"])?;
    site.unmount("db")?;
    site.fsnap(&["pool", "stop", &site.pool])?;
    site.fsnap(&["pool", "start", &site.pool])?;
    ensure(total("data")? == Some(100 << 30) && total("metadata")? == Some(100 << 20), "it came up smaller")?;
    site.mount("db", "ext4")?;
    ensure(fs::read(site.db().join("larger"))? == vec![9; 150 << 20], "what was written is not there")
}

/// What cannot be taken up is given back, and a killed call is completed by the next, or by the next start.
fn an_enlargement_is_whole_or_undone() -> Done {
    let site = Site::with_volume("128M", "ext4")?;
    let total = || -> Result<Option<u64>, Failed> { Ok(site.listed()?["data"]["total"].as_u64()) };
    let length = |file: &str| -> Result<u64, Failed> { Ok(fs::metadata(site.dir.join("pool").join(file))?.len()) };
    let usual = std::env::var("PATH")?;
    let grow = |losetup: &str, size: &str| -> Result<Command, Failed> {
        let programs = pretend(&site, "losetup", losetup)?.display().to_string();
        let mut command = site.command(&["pool", "grow", &site.pool, "--size", size]);
        command.env("PATH", format!("{programs}:{usual}"));
        Ok(command)
    };
    let said = failure(&mut grow("exit 1", "100G")?)?;
    ensure(said.contains("cannot run losetup"), &said)?;
    ensure(length("data")? == 128 << 20 && length("metadata")? == 32 << 20, "a file is longer")?;
    ensure(total()? == Some(128 << 20), "the pool is larger")?;
    // It answers, and nothing has become larger.
    let said = failure(&mut grow("exit 0", "256M")?)?;
    ensure(said.contains(&format!("cannot enlarge the pool {}", site.pool)), &said)?;
    ensure(length("data")? == 128 << 20 && total()? == Some(128 << 20), "it is larger")?;
    site.fsnap(&["checkpoint"])?;

    let kill = "kill -9 $PPID";
    ensure(!grow(kill, "200M")?.status()?.success(), "it was not killed")?;
    ensure(length("data")? == 128 << 20 || total()? == Some(128 << 20), "it was killed too late")?;
    site.fsnap(&["pool", "grow", &site.pool, "--size", "200M"])?;
    ensure(total()? == Some(200 << 20), "the next call did not complete it")?;
    // At the metadata it calls the first time, which have not become larger.
    let later = format!("test -e {0} && {kill}; : >{0}; exec /sbin/losetup \"$@\"", site.path("called"));
    ensure(!grow(&later, "300M")?.status()?.success(), "it was not killed")?;
    ensure(length("data")? == 300 << 20 && total()? == Some(200 << 20), "it was killed elsewhere")?;
    fs::write(site.db().join("file"), "second")?;
    site.unmount("db")?;
    site.fsnap(&["pool", "stop", &site.pool])?;
    site.fsnap(&["pool", "start", &site.pool])?;
    ensure(total()? == Some(300 << 20), "the next start did not complete it")?;
    site.mount("db", "ext4")?;
    is(&site.db().join("file"), "second")
}

/// The rest of the device is left alone until the pool is enlarged by it.
fn a_pool_on_a_device_has_the_size_that_was_asked_for() -> Done {
    let site = Site::without_pool()?;
    let image = site.dir.join("image");
    let device = loop_device(&image, 256 << 20)?;
    let total = || -> Result<Option<u64>, Failed> { Ok(site.listed()?["data"]["total"].as_u64()) };
    let tried = || -> Done {
        let grow = |arguments: &[&str]| site.fsnap(&[&["pool", "grow", &site.pool], arguments].concat());
        let refuses = |arguments: &[&str]| site.fails(&[&["pool", "grow", &site.pool], arguments].concat());
        let create = ["pool", "create", &device, "--name", &site.pool, "--size"];
        let said = site.fails(&[&create[..], &["10G"]].concat())?;
        ensure(said.contains("it has room for 224 MiB of data; give a smaller --size"), &said)?;
        site.fsnap(&[&create[..], &["100M"]].concat())?;
        ensure(total()? == Some(100 << 20), "it has another size")?;
        grow(&["--size", "150M"])?;
        ensure(total()? == Some(150 << 20), "it has not grown to that")?;
        site.fsnap(&["pool", "stop", &site.pool])?;
        site.fsnap(&["pool", "start", &site.pool])?;
        ensure(total()? == Some(150 << 20), "it came up in another size")?;
        let said = refuses(&["--size", "300M"])?;
        ensure(said.contains("has room for 224 MiB of data: enlarge it first"), &said)?;
        let said = refuses(&["--size", "200M", "--metadata-size", "64M"])?;
        ensure(said.contains("the metadata cannot be enlarged"), &said)?;
        ensure(total()? == Some(150 << 20), "what was refused was done")?;
        grow(&[])?;
        ensure(total()? == Some(224 << 20), "it does not use all of the device")?;
        let said = refuses(&[])?;
        ensure(said.contains("has become no larger: enlarge it first"), &said)?;
        File::options().write(true).open(&image)?.set_len(512 << 20)?;
        output(Command::new("losetup").args(["--set-capacity", &device]))?;
        site.add_volume("db", "ext4")?;
        grow(&[])?;
        ensure(total()? == Some(480 << 20), "it does not use what was added to the device")?;
        fs::write(site.db().join("large"), vec![7; 300 << 20])?;
        File::open(site.db().join("large"))?.sync_all()?;
        site.unmount("db")?;
        site.fsnap(&["pool", "stop", &site.pool])?;
        site.fsnap(&["pool", "start", &site.pool])?;
        ensure(total()? == Some(480 << 20), "it came up in another size")?;
        site.fsnap(&["pool", "remove", &site.pool, "--with-volumes"]).map(drop)
    };
    let done = tried();
    if done.is_err() {
        crate::kernel::unmount_below(&site.dir);
        let _ = site.fsnap(&["pool", "remove", &site.pool, "--with-volumes"]);
    }
    detach(&device);
    done
}

/// A pool that is called like a part of another is not taken for that.
fn a_pool_leaves_the_device_of_another() -> Done {
    let site = Site::without_pool()?;
    let device = loop_device(&site.dir.join("image"), 128 << 20)?;
    let other = format!("{}-data", site.pool);
    let tried = || -> Done {
        site.fsnap(&["pool", "create", &device, "--name", &site.pool])?;
        site.fsnap(&["pool", "stop", &site.pool])?;
        site.fsnap(&["pool", "create", &site.path("pool"), "--name", &other, "--size", "64M"])?;
        let refused = site.fails(&["pool", "start", &site.pool])?;
        ensure(refused.contains(&format!("the device {other} exists already")), &refused)?;
        ensure(site.listed()?["up"] == false, "it is up")?;
        let status = output(Command::new("dmsetup").args(["status", &other]))?;
        ensure(status.contains("thin-pool"), &format!("the other is gone: {status}"))?;
        site.fsnap(&["pool", "remove", &other])?;
        site.fsnap(&["pool", "start", &site.pool])?;
        site.fsnap(&["pool", "remove", &site.pool]).map(drop)
    };
    let done = tried();
    if done.is_err() {
        let _ = site.fsnap(&["pool", "remove", &other]);
        let _ = site.fsnap(&["pool", "remove", &site.pool]);
    }
    detach(&device);
    done
}

/// Where the kernel would make a new, empty pool, as on a loop device that leads elsewhere after a restart, nothing is written.
fn a_pool_comes_up_on_its_own_metadata_only() -> Done {
    let site = Site::with_volume("1G", "ext4")?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    site.unmount("db")?;
    site.fsnap(&["pool", "stop", &site.pool])?;
    let (own, away) = (site.dir.join("pool/metadata"), site.dir.join("away"));
    fs::rename(&own, &away)?;
    let gone = site.fails(&["pool", "start"])?;
    ensure(gone.contains(&site.pool) && gone.contains("No such file"), &gone)?;
    for length in [0, 32 << 20] {
        File::create(&own)?.set_len(length)?;
        let said = site.fails(&["pool", "start", &site.pool])?;
        ensure(said.contains(&format!("cannot bring up the pool {} on {}", site.pool, own.display())), &said)?;
        ensure(said.contains("no part of a pool"), &said)?;
        ensure(fs::read(&own)?.iter().all(|byte| *byte == 0), "it was written to")?;
        // What can be told without the pool is told.
        ensure(site.fsnap(&["log"])?.contains("(one)"), "the checkpoint is not listed")?;
    }
    fs::rename(&away, &own)?;
    site.fsnap(&["pool", "start"])?;
    site.mount("db", "ext4")?;
    is(&site.db().join("file"), "first")?;
    let verified = site.fsnap(&["verify"])?;
    ensure(verified.contains("1 checkpoint: 0 damaged"), &verified)
}

/// As after a start of the machine: who forgot to mount a volume is told which, and how to go on.
fn a_volume_that_is_away_is_named() -> Done {
    let site = Site::with_volume("1G", "ext4")?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    site.unmount("db")?;
    site.fsnap(&["pool", "stop", &site.pool])?;
    for arguments in [&["checkpoint"][..], &["diff", "one"]] {
        let said = site.fails(arguments)?;
        ensure(said.contains("the volume db is not there: ") && said.contains("the root of a mounted"), &said)?;
        ensure(said.contains("mount it there again, after `fsnap pool start`"), &said)?;
    }
    let said = site.fails(&["pool", "add-volume", "no-such-pool", "db", "--size", "16M"])?;
    ensure(said.contains("no pool \"no-such-pool\"") && said.contains(&site.pool), &said)?;
    ensure(site.fsnap(&["log"])?.lines().count() == 2, "something was recorded")
}

/// A file system may be larger than its pool, but not so large that it does not fit while it is empty.
fn a_volume_for_which_there_is_no_room_is_told() -> Done {
    let site = Site::new("100M")?;
    for (file_system, size, mib) in [("ext4", "15T", 15 << 20), ("xfs", "8T", 8 << 20)] {
        let arguments = ["pool", "add-volume", &site.pool, "big", "--size", size, "--file-system", file_system];
        let said = site.fails(&arguments)?;
        let told = format!(
            "an empty {file_system} of {mib} MiB takes more than the 99 MiB that are free of the 100 MiB of the pool {}",
            site.pool
        );
        ensure(said.contains(&told) && said.contains("nothing was left behind"), &said)?;
        let pool = site.listed()?;
        ensure(pool["volumes"] == serde_json::json!([]) && pool["state"] == "works", &pool.to_string())?;
        // No more than the block that says whose data these are.
        ensure(pool["data"]["used"] == 1 << 16, &pool.to_string())?;
        ensure(site.devices()?.0 == 0, "a device is left")?;
    }
    // What reads as zeroes is not written: a journal alone would not fit.
    let add = ["pool", "add-volume", &site.pool, "big", "--size", "200G"];
    site.fsnap(&add)?;
    let used = |pool: &serde_json::Value| pool["data"]["used"].as_u64();
    let pool = site.listed()?;
    ensure(used(&pool) < Some(50 << 20), &format!("an empty file system takes too much: {pool}"))?;
    let node = site.node(&format!("{}-volume-big", site.pool))?;
    let groups = output(Command::new("dumpe2fs").arg(&node))?;
    let cleared = groups.lines().filter(|line| line.contains("ITABLE_ZEROED")).count();
    ensure(cleared == 1600, &format!("the kernel will write the inodes of all but {cleared} groups"))?;

    // An older mkfs knows less.
    site.fsnap(&["pool", "remove-volume", &site.pool, "big"])?;
    let older = "case \"$*\" in *prezeroed*) echo 'Bad option(s) specified: assume_storage_prezeroed=1' >&2; exit 1;; esac\n\
                 exec /sbin/mkfs.ext4 \"$@\"";
    let older = pretend(&site, "mkfs.ext4", older)?.display().to_string();
    output(site.command(&add).env("PATH", format!("{older}:/usr/bin:/bin")))?;
    let pool = site.listed()?;
    ensure(used(&pool) < Some(50 << 20), &format!("an empty file system takes too much: {pool}"))
}

/// Killed while mkfs runs, it leaves nothing that the next command would not remove; but not before mkfs has ended.
fn a_volume_that_was_not_completed_is_undone() -> Done {
    let site = Site::new("100M")?;
    let add = ["pool", "add-volume", &site.pool, "db", "--size", "200M"];
    let pid = site.path("pid");
    // It fills the pool, and goes on when fsnap is gone.
    let mkfs = format!(
        "for device; do :; done; dd if=/dev/urandom of=$device bs=1M count=99 oflag=direct 2>/dev/null\n\
         echo $$ >{pid}.new && mv {pid}.new {pid} && kill -9 $PPID && exec sleep 1000 >/dev/null 2>&1"
    );
    let killing = pretend(&site, "mkfs.ext4", &mkfs)?.display().to_string();
    let status = site.command(&add).env("PATH", format!("{killing}:/usr/bin:/bin")).status()?;
    ensure(!status.success(), "it was not killed")?;

    let mkfs = Pid::from_raw(fs::read_to_string(&pid)?.trim().parse()?).ok_or("mkfs has no number")?;
    let started = site.fsnap(&["pool", "start", &site.pool]);
    let (devices, _) = site.devices()?;
    let pool = site.listed()?;
    rustix::process::kill_process(mkfs, Signal::KILL)?;
    ensure(started?.is_empty() && pool["volumes"] == serde_json::json!([]), &format!("it is shown: {pool}"))?;
    ensure(devices == 1 && pool["data"]["used"].as_u64() > Some(90 << 20), &format!("it was undone: {pool}"))?;

    // Whatever command opens the pool. The lock goes with the last who has it, and nothing tells when that is.
    let begun = Instant::now();
    while site.devices()?.0 > 0 && begun.elapsed() < Duration::from_secs(20) {
        site.fsnap(&["pool", "start", &site.pool])?;
    }
    let pool = site.listed()?;
    ensure(site.devices()?.0 == 0 && pool["data"]["used"] == 1 << 16, &format!("it is left: {pool}"))?;
    ensure(!site.store().join("new-volume").exists(), "the note is left")?;
    site.fsnap(&add)?;
    ensure(site.listed()?["volumes"][0]["name"] == "db", "it cannot be made again")?;
    ensure(!site.store().join("new-volume").exists(), "a note is left")
}

/// What `recover` cannot explain is told, and a registered volume needs no explanation.
fn a_volume_that_others_made_is_known() -> Done {
    let site = Site::with_volume("1G", "ext4")?;
    let name = format!("{}-others", site.pool);
    let pool = output(Command::new("dmsetup").args(["info", "-c", "--noheadings", "-o", "major,minor", &site.pool]))?;
    output(Command::new("dmsetup").args(["message", &site.pool, "0", "create_thin 7"]))?;
    output(Command::new("dmsetup").args(["create", &name, "--table", &format!("0 204800 thin {} 7", pool.trim())]))?;
    let tried = || -> Done {
        let told = site.fsnap(&["recover"])?;
        ensure(told.contains("unknown: foreign:7 in the dm-thin store"), &told)?;
        let device = site.node(&name)?;
        output(Command::new("mkfs.ext4").arg("-q").arg(&device))?;
        fs::create_dir(site.dir.join("others"))?;
        rustix::mount::mount(device, site.dir.join("others"), "ext4", MountFlags::empty(), None)?;
        site.fsnap(&["init", &site.path("others")])?;
        site.fsnap(&["checkpoint"])?;
        let told = site.fsnap(&["recover"])?;
        ensure(told.trim() == "nothing is half done", &told)?;
        let told = site.fsnap(&["verify"])?;
        ensure(!told.contains("unknown"), &told)
    };
    let done = tried();
    crate::kernel::unmount_below(&site.dir);
    let _ = Command::new("dmsetup").args(["remove", "--retry", &name]).output();
    done
}

/// A branch is mounted, written independently, captured itself, branched again, and gone when it is removed.
fn a_branch_is_a_volume() -> Done {
    for file_system in ["ext4", "xfs"] {
        let site = Site::with_volume("2G", file_system)?;
        site.fsnap(&["checkpoint", "--tag", "one"])?;
        fs::write(site.db().join("file"), "second")?;
        let files = PathBuf::from(site.fsnap(&["branch", "one", "try"])?.trim());
        is(&files.join("file"), "first")?;
        fs::write(files.join("file"), "on the branch")?;
        is(&site.db().join("file"), "second")?;
        site.fsnap(&["checkpoint", "--branch", "try", "--tag", "two"])?;
        let again = PathBuf::from(site.fsnap(&["branch", "two", "again"])?.trim());
        is(&again.join("file"), "on the branch")?;
        let (before, _) = site.devices()?;
        let mut user = Command::new("sleep").arg("1000").current_dir(&files).spawn()?;
        let refused = site.fails(&["rm", "--branch", "try"]);
        user.kill()?;
        user.wait()?;
        ensure(refused?.contains("in use"), "it was removed under a process that uses it")?;
        is(&files.join("file"), "on the branch")?;
        site.fsnap(&["rm", "--branch", "again"])?;
        site.fsnap(&["rm", "two"])?;
        site.fsnap(&["rm", "--branch", "try"])?;
        ensure(!site.dir.join("state/branches/try").exists(), "the branch's directory is still there")?;
        ensure(site.devices()?.0 < before, "the branches' devices are still there")?;
        site.fsnap(&["rm", "one"])?;
        let said = site.fsnap(&["recover"])?;
        ensure(said.trim() == "nothing is half done", &said)?;
    }
    Ok(())
}

/// After a start of the machine nothing is mounted and no pool is up; what was written is there.
fn a_branch_survives_a_restart() -> Done {
    let site = Site::with_volume("2G", "ext4")?;
    let homes = site.dir.join("homes");
    let config = site.dir.join("config.toml");
    fs::write(&config, format!("branches = {homes:?}\n"))?;
    let fsnap = |arguments: &[&str]| output(site.command(arguments).env("FSNAP_CONFIG", &config));
    fsnap(&["checkpoint", "--tag", "one"])?;
    let files = PathBuf::from(fsnap(&["branch", "one", "try"])?.trim());
    ensure(files.starts_with(&homes), &format!("it is mounted at {}", files.display()))?;
    fs::write(files.join("file"), "on the branch")?;
    rustix::mount::unmount(&files, UnmountFlags::empty())?;
    site.unmount("db")?;
    site.fsnap(&["pool", "stop", &site.pool])?;

    let said = fsnap(&["recover"])?;
    ensure(said.contains("mounted: branch try"), &said)?;
    is(&files.join("file"), "on the branch")?;
    fsnap(&["checkpoint", "--branch", "try"])?;
    rustix::mount::unmount(&files, UnmountFlags::empty())?;
    fsnap(&["branches"])?;
    is(&files.join("file"), "on the branch")?;
    fsnap(&["rm", "@latest"])?;
    fsnap(&["rm", "--branch", "try"]).map(drop)
}

/// Killed at every step, the making and the removal of a branch leave nothing.
fn kills_leave_nothing() -> Done {
    let site = Site::with_volume("2G", "ext4")?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    let (before, _) = site.devices()?;
    let clean = |point: &str| -> Done {
        site.fsnap(&["recover"])?;
        ensure(!site.dir.join("state/branches/try").exists(), &format!("{point}: the directory is still there"))?;
        ensure(site.devices()?.0 == before, &format!("{point}: a device is left"))
    };
    for point in ["branch:recorded", "branch:cloned", "branch:mounted", "branch:grown"] {
        let status =
            site.command(&["branch", "one", "try"]).env("FSNAP_FAILPOINT", format!("{point}=kill")).status()?;
        ensure(!status.success(), &format!("it was not killed at {point}"))?;
        clean(point)?;
    }
    for point in ["remove:recorded", "remove:deleted"] {
        site.fsnap(&["branch", "one", "try"])?;
        let status =
            site.command(&["rm", "--branch", "try"]).env("FSNAP_FAILPOINT", format!("{point}=kill")).status()?;
        ensure(!status.success(), &format!("it was not killed at {point}"))?;
        clean(point)?;
    }
    Ok(())
}

/// A pool with less room than the settings want refuses before anything stands.
fn a_short_pool_refuses() -> Done {
    let site = Site::with_volume("1G", "ext4")?;
    let config = site.dir.join("config.toml");
    for (what, text) in [("data", "free_data = 100"), ("metadata", "free_metadata = 100")] {
        fs::write(&config, format!("[dm-thin]\n{text}\n"))?;
        let said = failure(site.command(&["checkpoint"]).env("FSNAP_CONFIG", &config))?;
        ensure(said.contains(&format!("of its {what} space is free, less than")), &said)?;
        ensure(said.contains("`[dm-thin]` in the settings") && said.contains("nothing was left behind"), &said)?;
        let doctor = output(site.command(&["doctor"]).env("FSNAP_CONFIG", &config))?;
        ensure(doctor.contains(&format!("no  pool: {}", site.pool)), &doctor)?;
        let (_, suspended) = site.devices()?;
        ensure(!suspended, "a device is suspended")?;
    }
    fs::write(&config, "[dm-thin]\nfree_data = 1\n")?;
    output(site.command(&["checkpoint"]).env("FSNAP_CONFIG", &config))?;
    let log = site.fsnap(&["log"])?;
    ensure(log.lines().count() == 2, &log)
}

/// A file system whose copies the kernel would confuse with it is refused, and its own backend takes it.
fn btrfs_is_left_to_its_own_backend() -> Done {
    let site = Site::new("1G")?;
    site.add_volume("db", "ext4")?;
    site.unmount("db")?;
    let device = site.node(&format!("{}-volume-db", site.pool))?;
    output(Command::new("mkfs.btrfs").args(["-q", "-f"]).arg(&device))?;
    site.mount("db", "btrfs")?;
    let said = site.fails(&["init", &site.path("db"), "--backend", "dm-thin"])?;
    ensure(said.contains("it is btrfs") && said.contains("choose the btrfs backend"), &said)?;
    let said = site.fsnap(&["init", &site.path("db")])?;
    ensure(said.contains("btrfs snapshots"), &said)
}

/// A difference is found whether the pool tells where it can be or not, and what the pool says is equal is not read.
fn diff_reads_only_what_can_differ() -> Done {
    for (file_system, options) in [("ext4", ""), ("xfs", ""), ("ext4", "data=journal")] {
        let site = Site::with_volume("2G", file_system)?;
        let db = site.db();
        site.unmount("db")?;
        let device = site.node(&format!("{}-volume-db", site.pool))?;
        let options = (!options.is_empty()).then(|| std::ffi::CString::new(options)).transpose()?;
        rustix::mount::mount(device, &db, file_system, MountFlags::empty(), options.as_deref())?;
        let bytes = |seed: u32| -> Vec<u8> {
            (0..24_u32 << 18).flat_map(|at| at.wrapping_mul(2_654_435_761).wrapping_add(seed).to_le_bytes()).collect()
        };
        for name in ["changed", "grown", "rewritten", "touched", "punched", "zeros"] {
            fs::write(db.join(name), bytes(7))?;
        }
        let sparse = File::create(db.join("sparse"))?;
        sparse.set_len(8 << 20)?;
        site.fsnap(&["checkpoint", "--tag", "one"])?;

        let open = |name: &str| File::options().write(true).open(db.join(name));
        open("changed")?.write_all_at(b"!", 20 << 20)?;
        open("grown")?.write_all_at(b"!", 24 << 20)?;
        fs::write(db.join("rewritten"), bytes(7))?;
        open("touched")?.set_modified(SystemTime::UNIX_EPOCH)?;
        let (punch, keep) = (rustix::fs::FallocateFlags::PUNCH_HOLE, rustix::fs::FallocateFlags::KEEP_SIZE);
        rustix::fs::fallocate(open("punched")?, punch | keep, 1 << 20, 1 << 20)?;
        let zero = rustix::fs::FallocateFlags::ZERO_RANGE;
        rustix::fs::fallocate(open("zeros")?, zero, 5 << 20, 4096)?;
        rustix::fs::fallocate(&sparse, rustix::fs::FallocateFlags::empty(), 0, 1 << 20)?;
        site.fsnap(&["checkpoint", "--tag", "two"])?;
        open("touched")?.write_all_at(b"?", 10 << 20)?;

        let expected = "M db/changed\nM db/grown\nM db/punched\nM db/zeros\n";
        let later = "M db/changed\nM db/grown\nM db/punched\nM db/touched\nM db/zeros\n";
        let with_path = |path: &str, arguments: &[&str]| output(site.command(arguments).env("PATH", path));
        let usual = std::env::var("PATH")?;
        let counting = pretend(&site, "thin_delta", "exec /usr/sbin/thin_delta \"$@\"")?.display().to_string();
        for path in ["/nowhere", &format!("{counting}:{usual}")] {
            let found = with_path(path, &["diff", "one", "two"])?;
            ensure(found == expected, &format!("{file_system} {options:?} by {path}: {found}"))?;
            let found = with_path(path, &["diff", "one"])?;
            ensure(found == later, &format!("{file_system} {options:?} now, by {path}: {found}"))?;
        }
        ensure(site.dir.join("programs/thin_delta.called").exists(), "thin_delta was not asked")?;
        // Whoever believes this reads no content.
        let all = "<superblock uuid=\"\" data_block_size=\"128\">\n<diff>\n</diff>\n</superblock>";
        let nothing = pretend(&site, "thin_delta", &format!("cat <<END\n{all}\nEND"))?.display().to_string();
        let found = with_path(&format!("{nothing}:{usual}"), &["diff", "one", "two"])?;
        ensure(!found.contains("changed") && found.contains("grown"), &format!("the pool was not believed: {found}"))?;
        // A failing program is as good as none, and the pool can be asked again.
        let failing = pretend(&site, "thin_delta", "exit 1")?.display().to_string();
        let found = with_path(&format!("{failing}:{usual}"), &["diff", "one", "two"])?;
        ensure(found == expected, &found)?;
        let found = site.fsnap(&["diff", "one", "two"])?;
        ensure(found == expected, &found)?;
        let status = output(Command::new("dmsetup").args(["status", &site.pool]))?;
        ensure(status.split(' ').nth(6) == Some("-"), &format!("a copy of the metadata is left: {status}"))?;
    }
    Ok(())
}

/// Killed while it asks the pool, it leaves nothing that the next command would not give back.
fn a_killed_diff_leaves_no_copy_of_the_metadata() -> Done {
    let site = Site::with_volume("1G", "ext4")?;
    site.fsnap(&["checkpoint", "--tag", "one"])?;
    site.fsnap(&["checkpoint", "--tag", "two"])?;
    let killing = pretend(&site, "thin_delta", "kill -9 $PPID")?.display().to_string();
    let status = site.command(&["diff", "one", "two"]).env("PATH", format!("{killing}:/bin")).status()?;
    ensure(!status.success(), "it was not killed")?;
    let copy = || -> Result<bool, Failed> {
        let status = output(Command::new("dmsetup").args(["status", &site.pool]))?;
        Ok(status.split(' ').nth(6) != Some("-"))
    };
    ensure(copy()?, "there was no copy")?;
    site.fsnap(&["checkpoint"])?;
    ensure(!copy()?, "the copy is left")
}
