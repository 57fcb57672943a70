//! The btrfs ioctls, each behind a safe function that takes descriptors.
//!
//! Layouts and numbers are the kernel's own ([`linux_raw_sys`], made from `linux/btrfs.h` and `linux/btrfs_tree.h`).
//! `libbtrfsutil` makes the store's subvolume; the calls here are those that it cannot make as needed: its binding
//! takes paths only, which a volume's owner could lead elsewhere, loses the kernel's error, and follows a snapshot with
//! a wait for the running transaction, which would lie in the frozen window.
#![allow(unsafe_code)]

use std::ffi::{OsStr, OsString, c_char};
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use linux_raw_sys::{btrfs as raw, general};
use nix::libc;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

mod call {
    use linux_raw_sys::btrfs as raw;
    use linux_raw_sys::ioctl as number;
    use nix::sys::ioctl::ioctl_num_type as Number;

    nix::ioctl_write_ptr_bad!(snap_create, number::BTRFS_IOC_SNAP_CREATE_V2 as Number, raw::btrfs_ioctl_vol_args_v2);
    nix::ioctl_write_ptr_bad!(snap_destroy, number::BTRFS_IOC_SNAP_DESTROY_V2 as Number, raw::btrfs_ioctl_vol_args_v2);
    nix::ioctl_read_bad!(info, number::BTRFS_IOC_GET_SUBVOL_INFO as Number, raw::btrfs_ioctl_get_subvol_info_args);
    nix::ioctl_read_bad!(fs_info, number::BTRFS_IOC_FS_INFO as Number, raw::btrfs_ioctl_fs_info_args);
    nix::ioctl_readwrite_bad!(tree_search, number::BTRFS_IOC_TREE_SEARCH as Number, raw::btrfs_ioctl_search_args);
    nix::ioctl_read_bad!(get_flags, number::BTRFS_IOC_SUBVOL_GETFLAGS as Number, u64);
    nix::ioctl_write_ptr_bad!(set_flags, number::BTRFS_IOC_SUBVOL_SETFLAGS as Number, u64);
}

/// The inode number of every subvolume's root.
pub(crate) const ROOT_INODE: u64 = raw::BTRFS_FIRST_FREE_OBJECTID as u64;

/// The inode number of the empty directory that a snapshot shows where its origin has a nested subvolume.
pub(crate) const PLACEHOLDER_INODE: u64 = raw::BTRFS_EMPTY_SUBVOL_DIR_OBJECTID as u64;

/// The id of the subvolume that no other contains.
pub(crate) const TOP_LEVEL: u64 = raw::BTRFS_FS_TREE_OBJECTID as u64;

/// A UUID as btrfs keeps it; all zeroes means that there is none.
pub(crate) type Uuid = [u8; 16];

/// What the kernel says of a subvolume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SubvolumeInfo {
    /// Its number in the file system, used again once the subvolume is gone.
    pub(crate) id: u64,
    /// The subvolume that contains it; 0 for the top level.
    pub(crate) parent: u64,
    /// Its own UUID, never used again.
    pub(crate) uuid: Uuid,
    /// The UUID of the subvolume that it is a snapshot of.
    pub(crate) origin: Uuid,
    /// It refuses every write.
    pub(crate) read_only: bool,
}

/// Where a subvolume hangs in the one that contains it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    /// The other end: the contained subvolume's id in [`children`], the containing one's in [`parent`].
    pub(crate) id: u64,
    /// The inode number of the directory that holds it.
    pub(crate) dir: u64,
    /// Its name there.
    pub(crate) name: OsString,
}

/// Reads what the kernel says of the subvolume that `file` lies in; `ENOENT` once it is deleted.
pub(crate) fn info(file: impl AsFd) -> io::Result<SubvolumeInfo> {
    // SAFETY: the structure is plain integers, for which all zeroes is a value.
    let mut found: raw::btrfs_ioctl_get_subvol_info_args = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open for the call, and the kernel writes one such structure.
    unsafe { call::info(file.as_fd().as_raw_fd(), &mut found) }?;
    Ok(SubvolumeInfo {
        id: found.treeid,
        parent: found.parent_id,
        uuid: found.uuid,
        origin: found.parent_uuid,
        read_only: found.flags & u64::from(raw::BTRFS_ROOT_SUBVOL_RDONLY) != 0,
    })
}

/// Reads the UUID of the file system that `file` lies on.
pub(crate) fn file_system(file: impl AsFd) -> io::Result<Uuid> {
    // SAFETY: the structure is plain integers, for which all zeroes is a value.
    let mut found: raw::btrfs_ioctl_fs_info_args = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open for the call, and the kernel writes one such structure.
    unsafe { call::fs_info(file.as_fd().as_raw_fd(), &mut found) }?;
    Ok(found.fsid)
}

/// The options of the file system as the mount shows them through which `file` was opened, as [statmount(2)] has them since Linux 6.11.
///
/// Unlike a look into the table of mounts, its price does not grow with their number.
///
/// [statmount(2)]: https://man7.org/linux/man-pages/man2/statmount.2.html
pub(crate) fn mount_options(file: impl AsFd) -> io::Result<Vec<u8>> {
    let unique = StatxFlags::from_bits_retain(general::STATX_MNT_ID_UNIQUE);
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, unique)?;
    if found.stx_mask & unique.bits() == 0 {
        return Err(Errno::NOSYS.into());
    }
    let wanted = general::STATMOUNT_MNT_OPTS;
    let size = general::MNT_ID_REQ_SIZE_VER0;
    let request = general::mnt_id_req { size, spare: 0, mnt_id: found.stx_mnt_id, param: wanted.into(), mnt_ns_id: 0 };
    // SAFETY: the structure is plain integers and bytes, for which all zeroes is a value.
    let mut answer: MountAnswer = unsafe { std::mem::zeroed() };
    let call = libc::c_long::from(general::__NR_statmount);
    // SAFETY: the kernel reads a request of the size that is told it, and writes no more than the answer's size.
    let done = unsafe { libc::syscall(call, &raw const request, &raw mut answer, size_of::<MountAnswer>(), 0) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    if answer.head.mask & u64::from(wanted) == 0 {
        return Err(Errno::NOSYS.into());
    }
    let options = answer.text.get(answer.head.mnt_opts as usize..).ok_or(Errno::INVAL)?;
    Ok(options.iter().copied().take_while(|&byte| byte != 0).collect())
}

/// What statmount(2) answers, with room for the options of btrfs: names, numbers, and a path.
#[repr(C)]
struct MountAnswer {
    head: general::statmount,
    text: [u8; 4096],
}

/// Makes a snapshot of the subvolume `source` as `name` in `dir`, and commits the transaction that made it.
///
/// The kernel writes out what is dirty in `source` first, and so the call takes as long as that takes.
pub(crate) fn snapshot(source: impl AsFd, dir: impl AsFd, name: &OsStr, read_only: bool) -> io::Result<()> {
    let mut args = by_name(name)?;
    args.fd = i64::from(source.as_fd().as_raw_fd());
    args.flags = if read_only { u64::from(raw::BTRFS_SUBVOL_RDONLY) } else { 0 };
    // SAFETY: both descriptors are open for the call, and the kernel only reads the structure.
    unsafe { call::snap_create(dir.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Destroys the subvolume `name` in `dir` with its files; the running transaction is not committed.
pub(crate) fn destroy(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    let args = by_name(name)?;
    // SAFETY: the descriptor is open for the call, and the kernel only reads the structure.
    unsafe { call::snap_destroy(dir.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Destroys the subvolume `id` of the file system that `file` lies on, whatever it is called by now.
pub(crate) fn destroy_by_id(file: impl AsFd, id: u64) -> io::Result<()> {
    let mut args = by_name(OsStr::new(""))?;
    args.flags = u64::from(raw::BTRFS_SUBVOL_SPEC_BY_ID);
    args.__bindgen_anon_2.subvolid = id;
    // SAFETY: the descriptor is open for the call, and the kernel only reads the structure.
    unsafe { call::snap_destroy(file.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

fn by_name(name: &OsStr) -> io::Result<raw::btrfs_ioctl_vol_args_v2> {
    let bytes = name.as_bytes();
    if bytes.len() > raw::BTRFS_VOL_NAME_MAX as usize {
        return Err(Errno::NAMETOOLONG.into());
    }
    let mut name = [0; 4040];
    for (to, from) in name.iter_mut().zip(bytes) {
        *to = c_char::from_ne_bytes([*from]);
    }
    Ok(raw::btrfs_ioctl_vol_args_v2 {
        fd: 0,
        transid: 0,
        flags: 0,
        __bindgen_anon_1: raw::btrfs_ioctl_vol_args_v2__bindgen_ty_1 { unused: [0; 4] },
        __bindgen_anon_2: raw::btrfs_ioctl_vol_args_v2__bindgen_ty_2 { name },
    })
}

/// Makes the subvolume whose root is `root` refuse writes, or take them again.
pub(crate) fn set_read_only(root: impl AsFd, read_only: bool) -> io::Result<()> {
    let descriptor = root.as_fd().as_raw_fd();
    let mut flags = 0;
    // SAFETY: the descriptor is open for the call, and the kernel writes one u64.
    unsafe { call::get_flags(descriptor, &mut flags) }?;
    let bit = u64::from(raw::BTRFS_SUBVOL_RDONLY);
    let flags = if read_only { flags | bit } else { flags & !bit };
    // SAFETY: the descriptor is open for the call, and the kernel reads one u64.
    unsafe { call::set_flags(descriptor, &flags) }?;
    Ok(())
}

/// The subvolumes that the subvolume `id` contains directly, in the order of their ids.
pub(crate) fn children(file: impl AsFd, id: u64) -> io::Result<Vec<Link>> {
    let mut found = Vec::new();
    let mut from = 0;
    loop {
        let key = Key { tree: raw::BTRFS_ROOT_TREE_OBJECTID.into(), object: id, kind: raw::BTRFS_ROOT_REF_KEY, from };
        let items = search(&file, key)?;
        let Some(last) = items.last() else { return Ok(found) };
        let next = last.offset.checked_add(1);
        for item in &items {
            found.push(root_ref(item)?);
        }
        match next {
            Some(next) => from = next,
            None => return Ok(found),
        }
    }
}

/// The subvolume that contains the subvolume `id`, and where; `None` for the top level and for a deleted one.
pub(crate) fn parent(file: impl AsFd, id: u64) -> io::Result<Option<Link>> {
    let key =
        Key { tree: raw::BTRFS_ROOT_TREE_OBJECTID.into(), object: id, kind: raw::BTRFS_ROOT_BACKREF_KEY, from: 0 };
    search(file, key)?.first().map(root_ref).transpose()
}

/// The names that lead from the root of the subvolume `tree` to its directory `inode`.
///
/// One step up at a time, and so without a limit of length; not atomic against renames.
pub(crate) fn path_of(file: impl AsFd, tree: u64, inode: u64) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    let mut at = inode;
    while at != ROOT_INODE {
        let items = search(&file, Key { tree, object: at, kind: raw::BTRFS_INODE_REF_KEY, from: 0 })?;
        // A directory has one name; without any it was removed meanwhile.
        let item = items.first().ok_or(Errno::NOENT)?;
        let name_at = size_of::<raw::btrfs_inode_ref>();
        names.push(item.name(offset_of!(raw::btrfs_inode_ref, name_len), name_at)?);
        at = item.offset;
        if names.len() > DEEPEST {
            return Err(Errno::LOOP.into());
        }
    }
    names.reverse();
    Ok(names)
}

/// More levels than any tree can have that was made by system calls of this age; a damaged one could have a cycle.
const DEEPEST: usize = 1 << 20;

fn root_ref(item: &Item) -> io::Result<Link> {
    let name_at = size_of::<raw::btrfs_root_ref>();
    Ok(Link {
        id: item.offset,
        dir: item.number(offset_of!(raw::btrfs_root_ref, dirid))?,
        name: item.name(offset_of!(raw::btrfs_root_ref, name_len), name_at)?,
    })
}

/// Items of one object and one type in a tree, from one offset on.
#[derive(Clone, Copy)]
struct Key {
    tree: u64,
    object: u64,
    kind: u32,
    from: u64,
}

/// One found item: the last part of its key, and its bytes as they lie on disk.
struct Item {
    offset: u64,
    bytes: Vec<u8>,
}

impl Item {
    fn slice<const N: usize>(&self, at: usize) -> io::Result<[u8; N]> {
        let part = self.bytes.get(at..at + N).and_then(|part| part.try_into().ok());
        part.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn number(&self, at: usize) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.slice(at)?))
    }

    fn name(&self, length_at: usize, name_at: usize) -> io::Result<OsString> {
        let length = usize::from(u16::from_le_bytes(self.slice(length_at)?));
        let name = self.bytes.get(name_at..name_at + length);
        Ok(OsString::from_vec(name.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?.to_vec()))
    }
}

fn search(file: impl AsFd, wanted: Key) -> io::Result<Vec<Item>> {
    // SAFETY: the structure is plain integers, for which all zeroes is a value.
    let mut args: raw::btrfs_ioctl_search_args = unsafe { std::mem::zeroed() };
    args.key = raw::btrfs_ioctl_search_key {
        tree_id: wanted.tree,
        min_objectid: wanted.object,
        max_objectid: wanted.object,
        min_offset: wanted.from,
        max_offset: u64::MAX,
        max_transid: u64::MAX,
        min_type: wanted.kind,
        max_type: wanted.kind,
        nr_items: u32::MAX,
        ..args.key
    };
    // SAFETY: the descriptor is open for the call, and the kernel writes no more than the structure.
    unsafe { call::tree_search(file.as_fd().as_raw_fd(), &mut args) }?;
    let buffer = args.buf.map(|byte| byte.to_ne_bytes()[0]);
    parse(&buffer, args.key.nr_items)
}

/// Takes the items out of what `BTRFS_IOC_TREE_SEARCH` wrote: a header in the machine's order before each.
fn parse(buffer: &[u8], count: u32) -> io::Result<Vec<Item>> {
    use raw::btrfs_ioctl_search_header as Header;
    let short = || io::Error::from(io::ErrorKind::InvalidData);
    let mut rest = buffer;
    let mut items = Vec::new();
    for _ in 0..count {
        let (header, after) = rest.split_at_checked(size_of::<Header>()).ok_or_else(short)?;
        let offset = header[offset_of!(Header, offset)..][..8].try_into().map_err(|_| short())?;
        let length = header[offset_of!(Header, len)..][..4].try_into().map_err(|_| short())?;
        let (bytes, next) = after.split_at_checked(u32::from_ne_bytes(length) as usize).ok_or_else(short)?;
        items.push(Item { offset: u64::from_ne_bytes(offset), bytes: bytes.to_vec() });
        rest = next;
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_that_ends_early_is_refused() {
        let mut buffer = vec![0; size_of::<raw::btrfs_ioctl_search_header>()];
        buffer[offset_of!(raw::btrfs_ioctl_search_header, len)] = 4;
        assert!(parse(&buffer, 1).is_err(), "an item beyond the buffer was read");
        buffer.extend([1, 2, 3, 4]);
        assert_eq!(parse(&buffer, 1).unwrap()[0].bytes, [1, 2, 3, 4]);
        assert!(parse(&buffer, 2).is_err(), "a header beyond the buffer was read");
    }

    #[test]
    fn a_name_longer_than_its_item_is_refused() {
        let item = Item { offset: 0, bytes: vec![0, 0, 9, 0, b'a'] };
        assert!(item.name(2, 4).is_err());
        assert!(item.number(0).is_err());
    }

    #[test]
    fn a_name_that_btrfs_cannot_hold_is_refused() {
        assert!(by_name(OsStr::new(&"x".repeat(255))).is_ok());
        assert!(by_name(OsStr::new(&"x".repeat(256))).is_err());
    }

    #[test]
    fn options_of_a_mount_are_those_of_the_table() {
        let root = std::fs::File::open("/").unwrap();
        let options = match mount_options(&root) {
            Ok(options) => options,
            // Before Linux 6.11, and for no other reason.
            Err(error) => return assert_eq!(error.raw_os_error(), Some(Errno::NOSYS.raw_os_error())),
        };
        let mount = fsnap_backend::mounts::of_file(&root).unwrap().unwrap();
        // There, a word on writing stands before them.
        let table: Vec<&[u8]> = mount.options().skip(1).collect();
        assert_eq!(options, table.join(&b','));
    }
}
