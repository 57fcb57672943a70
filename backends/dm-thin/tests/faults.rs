//! Pools that are full, pools that others manage, pools with the parts of another, numbers that others have taken, and volumes that are suspended already.

mod support;
#[path = "../../../tests/support/thin.rs"]
mod thin;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use fsnap_backend::{Backend, ErrorKind, ImageState, Source};
use fsnap_dm_thin::{FileSystem, Limits, Store};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::{Mounted, TestPool, device_of, dmsetup, is_suspended};
use tempfile::TempDir;

type Done = Result<(), Failed>;

/// A name and what it runs.
type Case = (&'static str, fn() -> Done);

fn ensure(holds: bool, what: &str) -> Done {
    if holds { Ok(()) } else { Err(what.to_owned().into()) }
}

/// Writes and syncs until there is no room.
fn fill(file: &Path) -> io::Result<u64> {
    let mut file = File::create(file)?;
    let chunk = vec![0x5a; 1 << 20];
    for written in 0..1 << 12 {
        if file.write_all(&chunk).and_then(|()| file.sync_all()).is_err() {
            return Ok(written);
        }
    }
    Err(io::Error::other("it takes everything"))
}

/// A pool without room for data takes no snapshot, keeps those it has, and goes on when there is room.
fn data_full() -> Done {
    let pool = TestPool::new(96 << 20);
    let store = pool.store();
    let dir = pool.volume("volume", FileSystem::Ext4);
    fs::write(dir.join("file"), "before")?;
    let volume = store.adopt(&dir)?;
    let before = support::snapshot(&store, &volume);
    let at = store.reserve(Source::Volume(&volume), &Default::default())?;
    let device = device_of(&dir)?;
    ensure(fill(&dir.join("large"))? > 8, "there was no room to begin with")?;

    for refused in [
        store.reserve(Source::Volume(&volume), &Default::default()).map(drop),
        store.prime(&volume, &at),
        store.snapshot(&volume, &at).map(drop),
        store.clone_snapshot(&before, &place_for_a_clone(&at)?),
    ] {
        let error = refused.err().ok_or("a full pool takes images")?;
        ensure(error.kind() == ErrorKind::NoSpace && error.to_string().contains("data space"), &error.to_string())?;
    }
    ensure(!is_suspended(&device), "the volume is suspended")?;
    ensure(store.list()?.iter().all(|image| image.at == before.at), "something is left")?;
    ensure(store.verify(&before)?.is_empty(), "the snapshot is damaged")?;
    let mounted = Mounted::image(&store, &before.at);
    ensure(fs::read(mounted.path().join("file"))? == b"before", "the snapshot has changed")?;
    drop(mounted);
    store.deactivate(&before.at)?;

    drop(volume);
    support::remove_volume(&dir)?;
    let dir = pool.volume("next", FileSystem::Ext4);
    support::snapshot(&store, &store.adopt(&dir)?);
    Ok(())
}

/// A locator that a clone could have.
fn place_for_a_clone(at: &fsnap_backend::Locator) -> Result<fsnap_backend::Locator, Failed> {
    Ok(format!("v{}", &at.as_str()[1..]).parse()?)
}

/// What is dirty does not fit any more: whoever finds that out, and when, there is no snapshot of it.
fn data_full_in_the_middle() -> Done {
    let pool = TestPool::new(64 << 20);
    let mut store = pool.store();
    store.keep_free(Limits { free_data: 0, free_metadata: 0 });
    let dir = pool.volume("volume", FileSystem::Ext4);
    let volume = store.adopt(&dir)?;
    let device = device_of(&dir)?;
    let at = store.reserve(Source::Volume(&volume), &Default::default())?;
    store.prime(&volume, &at)?;
    // The kernel may begin to write it out before all of it is there, and then this call may fail as well.
    let written = fs::write(dir.join("large"), vec![0x5a; 100 << 20]);
    let taken = store.snapshot(&volume, &at);
    ensure(!is_suspended(&device), "the volume is suspended")?;
    let error = taken.err().ok_or_else(|| format!("there is a snapshot of what could not be written: {written:?}"))?;
    // What a call leaves that failed in its first checks is for its caller to remove.
    store.delete(&at)?;
    ensure(store.list()?.is_empty(), &format!("something is left, after: {error}"))
}

/// A snapshot is refused also when a part of the dirty contents was lost before it began, and the pool has room again.
fn what_was_lost_is_in_no_snapshot() -> Done {
    let pool = TestPool::new(64 << 20);
    let mut store = pool.store();
    store.keep_free(Limits { free_data: 0, free_metadata: 0 });
    let dir = pool.volume("volume", FileSystem::Ext4);
    let other = pool.volume("other", FileSystem::Ext4);
    let file = File::create(dir.join("file"))?;
    let volume = store.adopt(&dir)?;
    let at = store.reserve(Source::Volume(&volume), &Default::default())?;
    store.prime(&volume, &at)?;
    fill(&other.join("large"))?;
    file.write_all_at(&vec![0x5a; 32 << 20], 0)?;
    // Written out through a descriptor of its own, as the kernel does after a while: nobody hears that it failed.
    rustix::fs::sync();
    support::remove_volume(&other)?;
    let taken = store.snapshot(&volume, &at);
    let error = taken.err().ok_or("there is a snapshot of what was lost")?;
    ensure(!is_suspended(&device_of(&dir)?), "the volume is suspended")?;
    store.delete(&at)?;
    ensure(store.list()?.is_empty(), &format!("something is left, after: {error}"))
}

/// A pool that somebody made with `dmsetup`, with little room for metadata.
struct SmallPool {
    name: String,
    loops: Vec<String>,
    dir: TempDir,
}

impl SmallPool {
    fn new(uuid: &str, metadata: u64) -> Result<Self, Failed> {
        let dir = tempfile::tempdir()?;
        let name = format!("small-{}-{}", std::process::id(), uuid.len());
        let mut pool = Self { name, loops: Vec::new(), dir };
        for (file, bytes) in [("metadata", metadata), ("data", 1 << 30)] {
            let path = pool.dir.path().join(file);
            File::create(&path)?.set_len(bytes)?;
            let out = Command::new("losetup").args(["--find", "--show"]).arg(&path).output()?;
            pool.loops.push(String::from_utf8_lossy(&out.stdout).trim().to_owned());
        }
        let table = format!("0 {} thin-pool {} {} 128 0 1 error_if_no_space", 1 << 21, pool.loops[0], pool.loops[1]);
        let mut arguments = vec!["create", &pool.name, "--table", &table];
        if !uuid.is_empty() {
            arguments.extend(["--uuid", uuid]);
        }
        dmsetup(&arguments);
        Ok(pool)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        for name in ["volume", "thin"] {
            umount2(&self.path(name), MntFlags::MNT_DETACH).ok();
        }
        thin::remove_devices(&self.path("store"));
        let thins = ["thin0", "thin1"].map(|thin| format!("{}-{thin}", self.name));
        for name in thins.iter().chain([&self.name]) {
            Command::new("dmsetup").args(["remove", "--force", "--retry", name]).output().ok();
        }
        for device in &self.loops {
            Command::new("losetup").args(["--detach", device]).output().ok();
        }
    }
}

/// Without room for metadata the pool refuses in time; pushed over that, it fails, and what it has is still there.
fn metadata_full() -> Done {
    let pool = SmallPool::new("", 2 << 20)?;
    let mut store = Store::create_for(&pool.path("store"), &pool.name)?;
    let node = store.make_volume("volume", 256 << 20, FileSystem::Ext4)?;
    let dir = pool.path("volume");
    fs::create_dir(&dir)?;
    mount(Some(&node), &dir, Some("ext4"), MsFlags::empty(), None::<&str>)?;
    let file = File::create(dir.join("file"))?;
    file.set_len(128 << 20)?;
    let volume = store.adopt(&dir)?;
    let device = device_of(&dir)?;
    let (mut taken, mut refused) = (Vec::new(), None);
    let error = loop {
        let round = taken.len();
        // Scattered, so that much has to be remembered.
        for part in 0..24_u64 {
            file.write_all_at(format!("{round:04}").as_bytes(), ((part * 83 + round as u64 * 37) % 2000) << 16)?;
        }
        ensure(round < 1000, "the metadata never get full")?;
        let made = store.reserve(Source::Volume(&volume), &Default::default()).and_then(|at| {
            store.prime(&volume, &at)?;
            store.snapshot(&volume, &at)?;
            store.settle(&at)
        });
        match made {
            Ok(snapshot) => taken.push(snapshot),
            Err(error) if refused.is_none() => {
                ensure(error.kind() == ErrorKind::NoSpace, &error.to_string())?;
                ensure(error.to_string().contains("of its metadata space is free"), &error.to_string())?;
                refused = Some(round);
                store.keep_free(Limits { free_data: 0, free_metadata: 0 });
            }
            Err(error) => break error,
        }
        ensure(!is_suspended(&device), "the volume is suspended")?;
    };
    ensure(refused.is_some_and(|refused| refused > 3), &format!("it was refused at {refused:?}"))?;
    ensure(matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Damaged | ErrorKind::Io), &error.to_string())?;
    ensure(!is_suspended(&device), &format!("the volume is suspended, after: {error}"))?;
    for snapshot in [&taken[0], &taken[taken.len() / 2]] {
        let whole = |image: &fsnap_backend::Image| image.at == snapshot.at && image.state == ImageState::Whole;
        ensure(store.list()?.iter().any(whole), "a snapshot is gone")?;
    }
    // Nothing can be removed any more, and what can be done is told.
    let error = store.delete(&taken[0].at).err().ok_or("a read-only pool has changed")?;
    ensure(error.kind() == ErrorKind::Damaged && error.to_string().contains("enlarge"), &error.to_string())
}

/// What fsnap could not bring up again is not taken down by it, and stays.
fn pools_of_others_stay_up() -> Done {
    let pool = SmallPool::new("", 2 << 20)?;
    let store = Store::create_for(&pool.path("store"), &pool.name)?;
    let node = store.make_volume("volume", 64 << 20, FileSystem::Ext4)?;
    for refused in [store.stop_pool(), Store::open(&pool.path("store")).and_then(Store::remove_pool)] {
        let error = refused.err().ok_or("it was taken down")?;
        ensure(error.kind() == ErrorKind::Unsupported && error.to_string().contains(&pool.name), &error.to_string())?;
        ensure(node.exists() && !dmsetup(&["status", &pool.name]).is_empty(), "the pool is gone")?;
    }
    Ok(())
}

/// Pools that LVM manages, told by the UUIDs that it gives, are left as they are.
fn pools_of_lvm_are_refused() -> Done {
    let pool = SmallPool::new("LVM-AbcdefGhijklMnopqrStuvwxYzabcdefGhijklMnopqrStuvwx-tpool", 4 << 20)?;
    dmsetup(&["message", &pool.name, "0", "create_thin 0"]);
    let status = || dmsetup(&["status", &pool.name]);
    let before = status();
    let created = Store::create_for(&pool.path("store"), &pool.name).map(drop);
    let error = created.err().ok_or("a store is made in LVM's pool")?;
    ensure(error.kind() == ErrorKind::NotAStore && error.to_string().contains("belongs to LVM"), &error.to_string())?;

    let dir = pool.path("thin");
    fs::create_dir(&dir)?;
    for (number, uuid) in ["LVM-AbcdefGhijklMnopqrStuvwxYzabcdefGhijklMnopqrStuvwx", ""].into_iter().enumerate() {
        let name = format!("{}-thin{number}", pool.name);
        let table = format!("0 {} thin /dev/mapper/{} 0", 1 << 18, pool.name);
        let node = dmsetup(&["info", "-c", "--noheadings", "-o", "minor", &pool.name]);
        let table = table.replace(&format!("/dev/mapper/{}", pool.name), &format!("/dev/dm-{}", node.trim()));
        let mut arguments = vec!["create", &name, "--table", &table];
        if !uuid.is_empty() {
            arguments.extend(["--uuid", uuid]);
        }
        dmsetup(&arguments);
        let minor = dmsetup(&["info", "-c", "--noheadings", "-o", "minor", &name]);
        let node = format!("/dev/dm-{}", minor.trim());
        ensure(Command::new("mkfs.ext4").args(["-q", "-F", &node]).status()?.success(), "mkfs.ext4 failed")?;
        mount(Some(&*node), &dir, Some("ext4"), MsFlags::empty(), None::<&str>)?;
        let probed = Store::probe(&dir);
        umount2(&dir, MntFlags::empty())?;
        dmsetup(&["remove", "--retry", &name]);
        let error = probed.err().ok_or("a volume of LVM's is taken")?;
        ensure(error.kind() == ErrorKind::NotAVolume, &error.to_string())?;
        ensure(error.to_string().contains("lvcreate --snapshot"), &error.to_string())?;
    }
    let transaction = |status: &str| status.split(' ').nth(3).map(str::to_owned);
    ensure(transaction(&before) == transaction(&status()), "the pool was changed")
}

/// A number that somebody else has taken meanwhile is theirs, and the next try has another.
fn a_taken_number_is_left() -> Done {
    let pool = TestPool::new(1 << 30);
    let store = pool.store();
    let volume = store.adopt(&pool.volume("volume", FileSystem::Ext4))?;
    let taken = store.reserve(Source::Volume(&volume), &Default::default())?;
    let number = u32::from_str_radix(&taken.as_str()[2..8], 16)?;
    dmsetup(&["message", &pool.name, "0", &format!("create_thin {number}")]);
    for refused in [store.prime(&volume, &taken), store.snapshot(&volume, &taken).map(drop)] {
        let kind = refused.map_err(|error| error.kind());
        ensure(kind == Err(ErrorKind::Exists), &format!("{kind:?}"))?;
        ensure(store.list()?.is_empty(), "a record is left")?;
    }
    // The other's is still there: it can be removed, once.
    let delete = format!("delete {number}");
    dmsetup(&["message", &pool.name, "0", &delete]);
    let again = Command::new("dmsetup").args(["message", &pool.name, "0", &delete]).output()?;
    ensure(!again.status.success(), "there is no end to it")?;
    support::snapshot(&store, &volume);
    Ok(())
}

/// Calls for one volume at the same time all succeed: each waits until the volume runs again.
fn calls_for_one_volume_follow_each_other() -> Done {
    let pool = TestPool::new(1 << 30);
    let dir = pool.volume("volume", FileSystem::Ext4);
    let take = || -> Result<(), fsnap_backend::Error> {
        let store = pool.store();
        for _ in 0..4 {
            let volume = store.adopt(&dir)?;
            let at = store.reserve(Source::Volume(&volume), &Default::default())?;
            store.prime(&volume, &at)?;
            store.snapshot(&volume, &at)?;
            store.settle(&at)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..6).map(|_| scope.spawn(take)).collect();
        calls.into_iter().try_for_each(|call| call.join().expect("no call panics"))
    })?;
    ensure(!is_suspended(&device_of(&dir)?), "the volume is suspended")?;
    ensure(pool.store().list()?.len() == 24, "a snapshot is missing")
}

/// A volume that another call has suspended is waited for, also if that call is killed; one that a stranger has, is not.
fn whose_suspension_it_is_matters() -> Done {
    let pool = TestPool::new(1 << 30);
    let store = pool.store();
    let dir = pool.volume("volume", FileSystem::Ext4);
    let device = device_of(&dir)?;
    let volume = store.adopt(&dir)?;
    let suspend = || dmsetup(&["suspend", &device]);

    suspend();
    for refused in [
        store.adopt(&dir).map(drop),
        store
            .reserve(Source::Volume(&volume), &Default::default())
            .and_then(|at| store.snapshot(&volume, &at).map(drop)),
    ] {
        let error = refused.err().ok_or("what a stranger has suspended is taken")?;
        ensure(error.kind() == ErrorKind::Busy && error.to_string().contains("dmsetup resume"), &error.to_string())?;
    }
    ensure(is_suspended(&device), "a stranger's suspension was ended")?;
    dmsetup(&["resume", &device]);

    let table = dmsetup(&["table", &device]);
    let id = table.trim().rsplit(' ').next().ok_or("the device has no table")?;
    let field = |name| dmsetup(&["info", "-c", "--noheadings", "-o", name, &device]).trim().to_owned();
    let (uuid, major, minor) = (field("uuid"), field("major"), field("minor"));
    let note = format!(r#"{{"device":"{device}","uuid":"{uuid}","number":"{major}:{minor}"}}"#);
    for _ in 0..2 {
        let path = pool.dir().join(support::POOL).join("suspended").join(id);
        fs::write(&path, &note)?;
        let author = File::open(&path)?;
        author.lock()?;
        suspend();
        // A guard that has only begun keeps its parent's lock for a moment, when the parent is killed.
        let late = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            drop(author);
        });
        let again = store.adopt(&dir);
        late.join().expect("the lock is given back");
        ensure(again?.identity() == volume.identity(), "it became another volume")?;
        ensure(!is_suspended(&device), "the volume is suspended")?;
        ensure(!path.exists(), "the note of a call that is gone is left")?;
        support::snapshot(&store, &volume);
    }
    Ok(())
}

/// The pool is down: the devices and the loop devices that are left of it.
fn left_of(pool: &TestPool) -> String {
    let devices = dmsetup(&["info", "-c", "--noheadings", "-o", "name"]);
    let devices = devices.lines().filter(|name| name.starts_with(&pool.name));
    let loops = Command::new("losetup").args(["--list", "--noheadings", "--output", "BACK-FILE"]).output();
    let loops = String::from_utf8_lossy(&loops.expect("run losetup").stdout).into_owned();
    let loops = loops.lines().filter(|file| Path::new(file.trim()).starts_with(pool.dir()));
    devices.chain(loops).collect::<Vec<_>>().join(" ")
}

/// With the files of two pools exchanged, neither comes up, so that no file system is written into the other's blocks.
fn a_pool_takes_no_parts_of_another() -> Done {
    let pools = [TestPool::new(256 << 20), TestPool::new(256 << 20)];
    let node_of = |pool: &TestPool, store: &Store| -> Result<PathBuf, Failed> {
        let volumes = store.volumes()?;
        let (name, _) = volumes.first().ok_or_else(|| format!("{} has no volume", pool.name))?;
        Ok(store.volume_node(name)?)
    };
    for pool in &pools {
        // Made in the same way, so that the same blocks are in use.
        let dir = pool.volume("volume", FileSystem::Ext4);
        fs::write(dir.join("file"), &pool.name)?;
        umount2(&dir, MntFlags::empty())?;
        pool.store().stop_pool()?;
    }
    let exchange = |part: &str| -> io::Result<()> {
        let [one, other] = pools.each_ref().map(|pool| pool.dir().join("pool").join(part));
        let (cwd, how) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
        Ok(rustix::fs::renameat_with(cwd, &one, cwd, &other, how)?)
    };
    for parts in [&["data"][..], &["metadata"], &["data", "metadata"]] {
        parts.iter().try_for_each(|part| exchange(part))?;
        // Too much to be compared byte by byte.
        let data = |pool: &TestPool| fs::metadata(pool.dir().join("pool/data")).and_then(|meta| meta.modified());
        let written = || pools.iter().map(data).collect::<io::Result<Vec<_>>>();
        let before = written()?;
        for (pool, other) in [(&pools[0], &pools[1]), (&pools[1], &pools[0])] {
            let opened = Store::open(&pool.dir().join(support::POOL)).map(drop);
            let error = opened.err().ok_or_else(|| format!("it came up with the {parts:?} of another"))?;
            ensure(error.kind() == ErrorKind::WrongIdentity, &error.to_string())?;
            let said = error.to_string();
            let part = if parts.contains(&"metadata") { "metadata" } else { "data" };
            ensure(said.contains(&format!("pool/{part}, from which the pool {}", pool.name)), &said)?;
            ensure(said.contains(&format!("expected the {part} of the pool {}, whose store", pool.name)), &said)?;
            // The stores lie beside each other nowhere in these tests; the data say whose they are.
            let found = if part == "data" { &*other.name } else { "transaction number" };
            ensure(said.contains("found those of") && said.contains(found), &said)?;
            ensure(left_of(pool).is_empty(), &format!("left after {said}: {}", left_of(pool)))?;
        }
        ensure(before == written()?, "data were written to")?;
        parts.iter().try_for_each(|part| exchange(part))?;
    }
    for pool in &pools {
        let store = pool.store();
        let dir = pool.dir().join("volume");
        mount(Some(&node_of(pool, &store)?), &dir, Some("ext4"), MsFlags::empty(), None::<&str>)?;
        ensure(fs::read_to_string(dir.join("file"))? == pool.name, "it is another's file")?;
        support::snapshot(&store, &store.adopt(&dir)?);
    }
    Ok(())
}

/// Data that are not the pool's are found out before the pool grows with them, which it could not undo.
fn a_pool_grows_with_its_own_data_only() -> Done {
    let (pool, larger) = (TestPool::new(256 << 20), TestPool::new(512 << 20));
    for pool in [&pool, &larger] {
        pool.store().stop_pool()?;
    }
    let [own, other] = [&pool, &larger].map(|pool| pool.dir().join("pool/data"));
    let away = pool.dir().join("away");
    fs::rename(&own, &away)?;
    fs::copy(&other, &own)?;
    let opened = Store::open(&pool.dir().join(support::POOL)).map(drop);
    let error = opened.err().ok_or("it came up with the data of another")?;
    ensure(error.kind() == ErrorKind::WrongIdentity, &error.to_string())?;
    fs::rename(&away, &own)?;
    let blocks = |store: &Store| store.fill().map(|fill| fill.data.1);
    let store = pool.store();
    ensure(blocks(&store)? == 4096, "it has grown")?;
    store.stop_pool()?;
    File::options().write(true).open(&own)?.set_len(512 << 20)?;
    let store = pool.store();
    ensure(blocks(&store)? == 8192, "it has not grown")?;
    store.stop_pool()?;
    File::options().write(true).open(&own)?.set_len(256 << 20)?;
    let opened = Store::open(&pool.dir().join(support::POOL)).map(drop);
    let said = opened.err().ok_or("it came up on half of its data")?.to_string();
    ensure(said.contains("it has room for 4096 blocks, and the pool has 8192"), &said)
}

/// A pool that an earlier fsnap made, or that was only half signed when a call was killed, is signed when it is opened.
fn a_pool_is_signed_late() -> Done {
    let pool = TestPool::new(256 << 20);
    let settings = pool.dir().join(support::POOL).join("fsnap-store");
    let signed = || fs::read_to_string(&settings).map(|text| text.contains(r#""signed": true"#));
    let number = || dmsetup(&["status", &pool.name]).split(' ').nth(3).map(str::to_owned);
    let (id, own) = ((1 << 23) - 1, number().ok_or("the pool has no status")?);
    ensure(signed()? && own != "0", "it was made without")?;
    for half in [false, true] {
        fs::write(&settings, fs::read_to_string(&settings)?.replace(r#""signed": true"#, r#""signed": false"#))?;
        dmsetup(&["message", &pool.name, "0", &format!("set_transaction_id {own} 0")]);
        if !half {
            dmsetup(&["message", &pool.name, "0", &format!("delete {id}")]);
        }
        drop(pool.store());
        ensure(signed()? && number().as_ref() == Some(&own), &format!("half: {half}: it is not signed"))?;
        pool.store().stop_pool()?;
        drop(pool.store());
    }
    // What a killed call left is in nobody's way.
    let store: String = fs::read_to_string(&settings)?;
    let uuid = store.split('"').skip_while(|word| *word != "uuid").nth(2).ok_or("the store has no UUID")?;
    pool.store().stop_pool()?;
    for part in ["sign", "trial"] {
        let arguments = [&format!("{}-{part}", pool.name), "--uuid", &format!("FSNAP-{uuid}-{part}"), "--notable"];
        dmsetup(&[&["create"][..], &arguments].concat());
    }
    drop(pool.store());
    let left = left_of(&pool);
    ensure(!left.contains("-sign") && !left.contains("-trial"), &left)
}

fn main() -> ExitCode {
    let cases: &[Case] = &[
        ("data_full", data_full),
        ("data_full_in_the_middle", data_full_in_the_middle),
        ("what_was_lost_is_in_no_snapshot", what_was_lost_is_in_no_snapshot),
        ("metadata_full", metadata_full),
        ("pools_of_others_stay_up", pools_of_others_stay_up),
        ("pools_of_lvm_are_refused", pools_of_lvm_are_refused),
        ("a_pool_takes_no_parts_of_another", a_pool_takes_no_parts_of_another),
        ("a_pool_grows_with_its_own_data_only", a_pool_grows_with_its_own_data_only),
        ("a_pool_is_signed_late", a_pool_is_signed_late),
        ("a_taken_number_is_left", a_taken_number_is_left),
        ("calls_for_one_volume_follow_each_other", calls_for_one_volume_follow_each_other),
        ("whose_suspension_it_is_matters", whose_suspension_it_is_matters),
    ];
    let trial = |&(name, case): &Case| {
        Trial::ignorable_test(name, move || match support::missing() {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => case().map(|()| Completion::Completed),
        })
    };
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, cases.iter().map(trial).collect()).exit_code()
}
