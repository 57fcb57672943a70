//! Trees that are hard to keep.

use std::ffi::OsString;

use fsnap_backend::{Capabilities, Timestamp};

use crate::op::Op;
use crate::view::is_root;

/// Bytes that look random, the same for the same seed, and are nowhere else.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    // splitmix64 (Steele, Lea, Flood 2014).
    let mut state = seed;
    let mut words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    });
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&words.next().unwrap_or_default().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A POSIX ACL for the mode `u=rwx,g=rx,o=`, that gives the user `uid` the group's rights.
///
/// The layout is that of `linux/posix_acl_xattr.h`: version 2, then tag, permissions and id of each entry.
pub fn acl(uid: u32) -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] =
        [(0x01, 7, u32::MAX), (0x02, 5, uid), (0x04, 5, u32::MAX), (0x10, 5, u32::MAX), (0x20, 0, u32::MAX)];
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// A few files of each common kind: enough where the case is not about completeness.
pub fn small() -> Vec<Op> {
    let path = |text: &str| text.as_bytes().to_vec();
    vec![
        Op::Create(path("file")),
        Op::Write(path("file"), 0, noise(1, 10_000)),
        Op::Create(path("empty")),
        Op::MakeDir(path("dir")),
        Op::Create(path("dir/inner")),
        Op::Write(path("dir/inner"), 0, b"inner".to_vec()),
        Op::Link(path("dir/inner"), path("other name")),
        Op::Symlink(path("link"), path("dir/inner")),
        Op::Touch(path("dir"), Timestamp { seconds: 1_000_000_000, nanoseconds: 123_456_789 }),
    ]
}

/// Changes to what [`small`] makes that touch every file of it, some without any sign but the time of change.
pub fn small_changed() -> Vec<Op> {
    let path = |text: &str| text.as_bytes().to_vec();
    vec![
        Op::Write(path("file"), 5_000, noise(2, 100)),
        Op::Store(path("file"), 100, noise(3, 50)),
        Op::Write(path("empty"), 0, b"not any more".to_vec()),
        Op::Write(path("other name"), 0, b"INNER".to_vec()),
        Op::Chmod(path("dir"), 0o711),
        Op::Create(path("dir/new")),
        Op::Remove(path("link")),
        Op::Symlink(path("link"), path("elsewhere")),
        Op::Touch(path("empty"), Timestamp { seconds: 1, nanoseconds: 1 }),
    ]
}

/// Everything that a file system can hold, as far as this process may make it and `capabilities` say it is kept.
pub fn rich(capabilities: &Capabilities) -> Vec<Op> {
    let mut ops = Vec::new();
    names(&mut ops);
    contents(&mut ops);
    links(&mut ops);
    attributes(&mut ops, capabilities);
    deep(&mut ops);
    many(&mut ops);
    times(&mut ops);
    ops
}

/// The same for a file system that has no holes to those who read: nothing is punched, and no file is huge.
pub fn without_holes(ops: Vec<Op>) -> Vec<Op> {
    let huge = |op: &Op| match op {
        Op::Create(path) | Op::Write(path, ..) | Op::Truncate(path, _) => path == HUGE,
        _ => false,
    };
    let plain = |op| match op {
        Op::Punch(path, offset, length) => Op::Write(path, offset, vec![0; length as usize]),
        op => op,
    };
    ops.into_iter().filter(|op| !huge(op)).map(plain).collect()
}

/// A sparse file that cannot be read whole.
const HUGE: &[u8] = b"contents/a terabyte";

/// Names of any bytes.
fn names(ops: &mut Vec<Op>) {
    ops.push(Op::MakeDir(b"names".to_vec()));
    let longest = "n".repeat(255);
    let names: [&[u8]; 16] = [
        b"new\nline",
        b"\xff\xfe not UTF-8 \xc3",
        b"-rf",
        b" ",
        b"*",
        b"...",
        b".hidden",
        b".wh.file",
        b"file (deleted)",
        b"tab\tand\\backslash",
        b"\x1b[31mred",
        b"\x01\x7f",
        "\u{fc}ml\u{e4}ut \u{1f980}".as_bytes(),
        b"a-b",
        b"a",
        longest.as_bytes(),
    ];
    for name in names {
        let path = [b"names/", name].concat();
        ops.push(Op::Create(path.clone()));
        ops.push(Op::Write(path, 0, name.to_vec()));
    }
    // `a-b` sorts before `a/b` as a path, and after `a` as a name.
    ops.extend([Op::Remove(b"names/a".to_vec()), Op::MakeDir(b"names/a".to_vec()), Op::Create(b"names/a/b".to_vec())]);
    for name in [&b"directory\n"[..], b"\x80"] {
        let dir = [b"names/", name].concat();
        let inner = [&dir[..], b"/\xfe"].concat();
        ops.extend([Op::MakeDir(dir), Op::Create(inner)]);
    }
}

/// Contents around the sizes of blocks, and holes everywhere.
fn contents(ops: &mut Vec<Op>) {
    ops.push(Op::MakeDir(b"contents".to_vec()));
    for (seed, size) in [0, 1, 4095, 4096, 4097, 65_536, 300_001].into_iter().enumerate() {
        let path = format!("contents/{size}").into_bytes();
        ops.extend([Op::Create(path.clone()), Op::Write(path, 0, noise(seed as u64, size))]);
    }
    let zeros = b"contents/zeros".to_vec();
    ops.extend([Op::Create(zeros.clone()), Op::Write(zeros, 0, vec![0; 20_000])]);

    let (mib, tib) = (1 << 20, 1 << 40);
    let holes = b"contents/holes".to_vec();
    ops.extend([
        Op::Create(holes.clone()),
        Op::Write(holes.clone(), mib, noise(20, 5000)),
        Op::Write(holes.clone(), 3 * mib + 17, noise(21, 100_000)),
        Op::Truncate(holes.clone(), 5 * mib + 1),
    ]);
    let punched = b"contents/punched".to_vec();
    ops.extend([
        Op::Create(punched.clone()),
        Op::Write(punched.clone(), 0, noise(22, 400_000)),
        Op::Punch(punched, 8192, 300_000),
    ]);
    let only_hole = b"contents/only a hole".to_vec();
    ops.extend([Op::Create(only_hole.clone()), Op::Truncate(only_hole, 10 * mib)]);
    // Read or written byte by byte, it would take hours.
    let huge = HUGE.to_vec();
    ops.extend([
        Op::Create(huge.clone()),
        Op::Write(huge.clone(), tib / 2 + 123, b"middle".to_vec()),
        Op::Truncate(huge, tib),
    ]);
}

/// Hard and symbolic links, and the other kinds of files.
fn links(ops: &mut Vec<Op>) {
    let path = |text: &str| [b"links/", text.as_bytes()].concat();
    ops.push(Op::MakeDir(b"links".to_vec()));
    ops.push(Op::MakeDir(path("dir")));
    ops.extend([
        Op::Create(path("one")),
        Op::Write(path("one"), 0, b"one file, three names".to_vec()),
        Op::Link(path("one"), path("two")),
        Op::Link(path("one"), path("dir/three")),
        // Equal content, but a file of its own.
        Op::Create(path("copy")),
        Op::Write(path("copy"), 0, b"one file, three names".to_vec()),
        Op::Create(path("lonely after all")),
        Op::Link(path("lonely after all"), path("dir/gone")),
        Op::Remove(path("dir/gone")),
    ]);
    for (name, target) in [
        ("relative", "dir/three"),
        ("dangling", "no such file"),
        ("absolute", "/etc/passwd"),
        ("upwards", "../../../.."),
        ("to a directory", "dir"),
        ("to itself", "to itself"),
    ] {
        ops.push(Op::Symlink(path(name), target.as_bytes().to_vec()));
    }
    ops.push(Op::Symlink(path("long"), vec![b'x'; 1000]));
    ops.push(Op::Symlink(path("bytes"), b"\xff\n".to_vec()));
    ops.extend([Op::Fifo(path("fifo")), Op::Socket(path("socket"))]);
    ops.extend([Op::Link(path("fifo"), path("fifo again")), Op::Link(path("relative"), path("relative again"))]);
}

/// Modes, owners, device nodes, extended attributes and ACLs.
fn attributes(ops: &mut Vec<Op>, capabilities: &Capabilities) {
    let path = |text: &str| [b"attributes/", text.as_bytes()].concat();
    ops.push(Op::MakeDir(b"attributes".to_vec()));
    let owned = capabilities.ownership && is_root();
    let modes: &[u32] = if is_root() { &[0o000, 0o4755, 0o2711, 0o7777, 0o444] } else { &[0o700, 0o1755, 0o777] };
    for mode in modes {
        let (file, dir) = (path(&format!("file {mode:o}")), path(&format!("dir {mode:o}")));
        ops.extend([Op::Create(file.clone()), Op::MakeDir(dir.clone())]);
        if owned {
            // First the owner: a change of it takes capabilities and set-id bits away.
            ops.extend([Op::Chown(file.clone(), 1000, 1001), Op::Chown(dir.clone(), 1002, 1003)]);
        }
        ops.extend([Op::Chmod(file, *mode), Op::Chmod(dir, *mode)]);
    }
    if owned {
        ops.extend([Op::Create(path("nobody's")), Op::Chown(path("nobody's"), u32::MAX - 1, u32::MAX - 1)]);
        ops.extend([Op::Symlink(path("link"), b"x".to_vec()), Op::Chown(path("link"), 1, 2)]);
        ops.push(Op::CharDevice(path("null"), 1, 3));
        ops.push(Op::CharDevice(path("whiteout"), 0, 0));
        ops.push(Op::BlockDevice(path("loop"), 7, 300));
    }
    let key = |text: &str| OsString::from(text);
    if capabilities.xattrs {
        for name in ["with xattrs", "with many"] {
            ops.push(Op::Create(path(name)));
        }
        ops.push(Op::SetXattr(path("with xattrs"), key("user.plain"), b"value".to_vec()));
        ops.push(Op::SetXattr(path("with xattrs"), key("user.empty"), Vec::new()));
        ops.push(Op::SetXattr(path("with xattrs"), key("user.binary"), b"\0\xff\n".to_vec()));
        ops.push(Op::SetXattr(path("with many"), key("user.big"), noise(30, 2500)));
        for number in 0..20 {
            ops.push(Op::SetXattr(path("with many"), key(&format!("user.number-{number}")), vec![number]));
        }
        ops.push(Op::SetXattr(b"attributes".to_vec(), key("user.of-a-directory"), b"d".to_vec()));
        ops.push(Op::SetXattr(Vec::new(), key("user.of-the-root"), b"r".to_vec()));
        if is_root() {
            ops.push(Op::SetXattr(path("with xattrs"), key("trusted.overlay.origin"), b"foreign".to_vec()));
            ops.push(Op::Symlink(path("link with xattrs"), b"y".to_vec()));
            ops.push(Op::SetXattr(path("link with xattrs"), key("trusted.of-a-link"), b"l".to_vec()));
            // cap_net_raw, permitted and effective, in the layout of linux/capability.h, version 2.
            let raw = [0x0200_0001_u32, 1 << 13, 0, 0, 0].map(u32::to_le_bytes).concat();
            ops.push(Op::SetXattr(path("with xattrs"), key("security.capability"), raw));
        }
    }
    if capabilities.acls {
        ops.extend([Op::Create(path("with an ACL")), Op::MakeDir(path("dir with ACLs"))]);
        for name in ["with an ACL", "dir with ACLs"] {
            ops.push(Op::Chmod(path(name), 0o750));
            ops.push(Op::SetXattr(path(name), key("system.posix_acl_access"), acl(1234)));
        }
        ops.push(Op::SetXattr(path("dir with ACLs"), key("system.posix_acl_default"), acl(4321)));
    }
}

/// A path longer than any system call takes.
fn deep(ops: &mut Vec<Op>) {
    let mut path = b"deep".to_vec();
    ops.push(Op::MakeDir(path.clone()));
    for level in 0..40 {
        path.extend_from_slice(format!("/{level:0>120}").as_bytes());
        ops.push(Op::MakeDir(path.clone()));
    }
    let file = [&path[..], b"/file"].concat();
    ops.extend([Op::Create(file.clone()), Op::Write(file, 0, b"at the bottom".to_vec())]);
}

/// More entries than one call of getdents(2) returns.
fn many(ops: &mut Vec<Op>) {
    ops.push(Op::MakeDir(b"many".to_vec()));
    for number in 0..300 {
        ops.push(Op::Create(format!("many/a file with a long name, number {number}").into_bytes()));
    }
}

/// Times from before 1970 to after 2038, to the nanosecond; last, because other changes change them.
fn times(ops: &mut Vec<Op>) {
    ops.push(Op::MakeDir(b"times".to_vec()));
    let times =
        [(-300_000_000, 0), (-2, 500_000_000), (0, 0), (0, 1), (1_700_000_000, 999_999_999), (4_200_000_000, 7)];
    for (number, (seconds, nanoseconds)) in times.into_iter().enumerate() {
        let time = Timestamp { seconds, nanoseconds };
        let (file, dir) = (format!("times/file {number}").into_bytes(), format!("times/dir {number}").into_bytes());
        let link = format!("times/link {number}").into_bytes();
        ops.extend([Op::Create(file.clone()), Op::MakeDir(dir.clone()), Op::Symlink(link.clone(), b"z".to_vec())]);
        ops.extend([Op::Touch(file, time), Op::Touch(dir, time), Op::Touch(link, time)]);
    }
    for dir in [&b"times"[..], b"links/dir", b"deep", b""] {
        ops.push(Op::Touch(dir.to_vec(), Timestamp { seconds: 1_234_567_890, nanoseconds: 987_654_321 }));
    }
}
