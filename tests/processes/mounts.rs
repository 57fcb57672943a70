//! Recipes carried out.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap::mount::{Error, Mounted, Prepared, Restrictions, mount};
use fsnap_backend::{DirTree, MountSpec, mounts};

use crate::live::Case;
use crate::reach::Place;

pub(crate) const CASES: &[Case] = &[
    ("a_bind_shows_the_image_until_it_is_dropped", a_bind_shows_the_image_until_it_is_dropped),
    ("a_snapshot_refuses_writes", a_snapshot_refuses_writes),
    ("device_nodes_and_set_id_bits_have_no_effect", device_nodes_and_set_id_bits_have_no_effect),
    ("a_symbolic_link_is_no_mount_point", a_symbolic_link_is_no_mount_point),
    ("what_is_in_use_stays_mounted", what_is_in_use_stays_mounted),
    ("what_covers_it_is_not_unmounted", what_covers_it_is_not_unmounted),
    ("a_file_system_is_mounted_with_its_options", a_file_system_is_mounted_with_its_options),
    ("a_tree_cannot_be_mounted", a_tree_cannot_be_mounted),
    ("nothing_is_left_of_what_was_not_attached", nothing_is_left_of_what_was_not_attached),
    ("a_mount_is_found_whatever_its_name", a_mount_is_found_whatever_its_name),
];

fn bind(dir: &Path, read_only: bool) -> MountSpec {
    MountSpec::Bind { dir: dir.into(), read_only }
}

fn image(place: &Place) -> PathBuf {
    let image = place.dir("image");
    fs::write(image.join("file"), "content").unwrap();
    image
}

/// The options of the topmost mount at the path; `None` if there is none.
fn options(at: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let mut fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.rfind(|fields| Path::new(fields[4]) == at).map(|fields| fields[5].to_owned())
}

fn a_bind_shows_the_image_until_it_is_dropped() {
    let place = Place::new();
    let (image, at) = (image(&place), place.dir("at"));
    let mounted = mount(&bind(&image, false), &at, Restrictions::default()).unwrap();
    assert_eq!(mounted.path(), at);
    fs::write(at.join("new"), "x").unwrap();
    assert_eq!(fs::read(image.join("new")).unwrap(), b"x");
    drop(mounted);
    assert_eq!(options(&at), None);
    mount(&bind(&image, false), &at, Restrictions::default()).unwrap().keep();
    assert!(options(&at).is_some());
}

fn a_snapshot_refuses_writes() {
    let place = Place::new();
    let (image, at) = (image(&place), place.dir("at"));
    let mounted = mount(&bind(&image, true), &at, Restrictions::default()).unwrap();
    let refused = fs::write(at.join("file"), "x").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::read(at.join("file")).unwrap(), b"content");
    fs::write(image.join("file"), "the image itself is no business of the mount").unwrap();
    mounted.unmount().unwrap();
    assert_eq!(options(&at), None);
}

fn device_nodes_and_set_id_bits_have_no_effect() {
    let place = Place::new();
    let (image, at) = (image(&place), place.dir("at"));
    let null = image.join("null");
    nix::sys::stat::mknod(
        &null,
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::from_bits_truncate(0o666),
        nix::sys::stat::makedev(1, 3),
    )
    .unwrap();
    let mounted = mount(&bind(&image, false), &at, Restrictions::default()).unwrap();
    assert_eq!(fs::read(at.join("null")).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert!(options(&at).unwrap().contains("nosuid,nodev"));
    mounted.unmount().unwrap();
    let own = Restrictions::of(&place.root).unwrap();
    assert_eq!(own, Restrictions { nosuid: false, nodev: false, noexec: false });
    let mounted = mount(&bind(&image, false), &at, own).unwrap();
    assert_eq!(fs::read(at.join("null")).unwrap(), b"");
    mounted.unmount().unwrap();
}

fn a_symbolic_link_is_no_mount_point() {
    let place = Place::new();
    let (image, at) = (image(&place), place.dir("at"));
    std::os::unix::fs::symlink(&at, place.root.join("link")).unwrap();
    for (name, expected) in [("link", "it is a symbolic link"), ("image/file", "it is not a directory")] {
        match mount(&bind(&image, false), &place.root.join(name), Restrictions::default()) {
            Err(Error::NotAMountPoint { reason, .. }) => assert_eq!(reason, expected),
            other => panic!("{other:?}"),
        }
    }
    let absent = mount(&bind(&image, false), &place.root.join("absent"), Restrictions::default());
    assert!(matches!(absent, Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound));
    assert_eq!(options(&at), None);
}

fn what_is_in_use_stays_mounted() {
    let place = Place::new();
    let (image, at) = (image(&place), place.dir("at"));
    let mounted = mount(&bind(&image, false), &at, Restrictions::default()).unwrap();
    let open = fs::File::open(at.join("file")).unwrap();
    assert!(matches!(mounted.unmount(), Err(Error::Busy { dir }) if dir == at));
    assert!(options(&at).is_some());
    drop(open);
}

fn what_covers_it_is_not_unmounted() {
    let place = Place::new();
    let (image, at) = (image(&place), place.dir("at"));
    let lower = mount(&bind(&image, false), &at, Restrictions::default()).unwrap();
    let upper: Mounted = mount(&bind(&place.dir("other"), true), &at, Restrictions::default()).unwrap();
    assert!(matches!(lower.unmount(), Err(Error::Covered { .. })));
    assert!(options(&at).unwrap().starts_with("ro"));
    upper.unmount().unwrap();
}

fn a_file_system_is_mounted_with_its_options() {
    let place = Place::new();
    let at = place.dir("at");
    let spec = |options: &str, read_only| MountSpec::Mount {
        fstype: "tmpfs".into(),
        source: "image".into(),
        options: options.into(),
        read_only,
    };
    let mounted = mount(&spec("size=1m,mode=711", false), &at, Restrictions::default()).unwrap();
    fs::write(at.join("small"), "x").unwrap();
    assert!(fs::write(at.join("large"), vec![0; 2 << 20]).is_err());
    mounted.unmount().unwrap();
    let mounted = mount(&spec("", true), &at, Restrictions::default()).unwrap();
    assert_eq!(fs::write(at.join("file"), "x").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    mounted.unmount().unwrap();
    let error = mount(&spec("no-such-option", false), &at, Restrictions::default()).unwrap_err().to_string();
    assert!(error.contains("no-such-option"), "{error}");
    assert_eq!(options(&at), None);
}

fn a_tree_cannot_be_mounted() {
    let place = Place::new();
    let tree = MountSpec::Tree(Arc::new(DirTree::open(&place.root).unwrap()));
    assert!(matches!(Prepared::new(&tree, Restrictions::default()), Err(Error::NotMountable)));
}

fn nothing_is_left_of_what_was_not_attached() {
    let place = Place::new();
    let before = fs::read("/proc/thread-self/mountinfo").unwrap();
    drop(Prepared::new(&bind(&image(&place), true), Restrictions::default()).unwrap());
    assert_eq!(fs::read("/proc/thread-self/mountinfo").unwrap(), before);
}

fn a_mount_is_found_whatever_its_name() {
    let place = Place::new();
    let part = place.dir("part");
    let long = [b'\n'; 255];
    let names: [&[u8]; 6] = [b"a b\tc", b"a\nb", b"\\040", b"\xff\xfe", b"7 1 0:9 ! ! rw - proc proc rw", &long];
    for name in names.map(OsStr::from_bytes) {
        let at = place.dir(name);
        rustix::mount::mount(name, &at, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        let found = mounts::at(&at).unwrap().expect("the mount is in the table");
        assert_eq!((found.source.as_os_str(), &*found.fstype, found.writable), (name, &b"tmpfs"[..], true));
        let file = at.join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(mounts::of_file(fs::File::open(&file).unwrap()).unwrap(), Some(found.clone()));
        // A directory in it, shown elsewhere: the same file system, and the directory's name as its root.
        let inside = at.join(name);
        fs::create_dir(&inside).unwrap();
        rustix::mount::mount_bind(&inside, &part).unwrap();
        let shown = mounts::at(&part).unwrap().expect("the part is in the table");
        assert_eq!(Some(shown.root), found.place(&inside));
    }
}
