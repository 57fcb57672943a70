//! Making files, directories, links and nodes.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;
use rustix::thread::CapabilitiesSecureBits;

use super::attr::Attr;
use super::data::{OpenFile, Source};
use super::look::{Seen, is_whiteout};
use super::node::{Ino, Node};
use super::object::{Object, SAFE};
use super::{Caller, Overlay, Result, Tree};

/// What is to be made.
#[derive(Debug, Clone, Copy)]
enum What<'a> {
    Dir,
    Symlink(&'a OsStr),
    Node(FileType, u64),
}

impl Overlay {
    /// Makes a directory.
    pub fn make_dir(&self, parent: Ino, name: &OsStr, mode: u32, umask: u32, by: Caller) -> Result<Attr> {
        self.tree().make(parent, name, What::Dir, mode, umask, by)
    }

    /// Makes a symbolic link.
    pub fn make_symlink(&self, parent: Ino, name: &OsStr, target: &OsStr, by: Caller) -> Result<Attr> {
        self.tree().make(parent, name, What::Symlink(target), 0o777, 0, by)
    }

    /// Makes a file that is neither a directory nor a link; `mode` has its kind.
    pub fn make_node(&self, parent: Ino, name: &OsStr, mode: u32, umask: u32, rdev: u64, by: Caller) -> Result<Attr> {
        let kind = match FileType::from_raw_mode(mode) {
            FileType::Unknown => FileType::RegularFile,
            FileType::Directory | FileType::Symlink => return Err(Errno::INVAL),
            kind => kind,
        };
        self.tree().make(parent, name, What::Node(kind, rdev), mode, umask, by)
    }

    /// Makes a regular file and opens it.
    pub fn create(
        &self,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
        by: Caller,
    ) -> Result<(Attr, Arc<OpenFile>)> {
        self.tree().create(parent, name, mode, umask, by)
    }
}

/// Longer names are refused before anything is copied up for them.
pub(super) fn check_length(name: &OsStr) -> Result<()> {
    if name.len() > 255 { Err(Errno::NAMETOOLONG) } else { Ok(()) }
}

impl Tree {
    fn make(&mut self, parent: Ino, name: &OsStr, what: What<'_>, mode: u32, umask: u32, by: Caller) -> Result<Attr> {
        self.place(parent, name, what, mode, umask, by)?;
        let seen = self.look(parent, name)?.ok_or(Errno::IO)?;
        Ok(self.remember(parent, name, seen))
    }

    /// Makes a regular file. What it is like is known without a look at the marks that older ones may bear.
    fn create(
        &mut self,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        umask: u32,
        by: Caller,
    ) -> Result<(Attr, Arc<OpenFile>)> {
        let what = What::Node(FileType::RegularFile, 0);
        let file = self.place(parent, name, what, mode, umask, by)?.ok_or(Errno::IO)?;
        let stat = rustix::fs::fstat(&file)?;
        let file = Arc::new(OpenFile::new(Source::Whole(Arc::new(File::from(file))), self.store.gate.clone()));
        let mut node = Node::new(FileType::RegularFile);
        node.upper = true;
        let ino = self.own_number(&stat);
        let attr = Attr { ino, kind: node.kind, rdev: 0, nlink: 1, stat, upper: true };
        let attr = self.remember(parent, name, Seen { ino, attr, node, upper_name: true });
        let node = self.node_mut(ino)?;
        node.opens += 1;
        node.incapable = true;
        node.file = Some(file.clone());
        Ok((attr, file))
    }

    /// Puts something new under a name that nothing has; returns the file if it is a regular one.
    fn place(
        &mut self,
        parent: Ino,
        name: &OsStr,
        what: What<'_>,
        mode: u32,
        umask: u32,
        by: Caller,
    ) -> Result<Option<OwnedFd>> {
        check_length(name)?;
        let below = self.lower_at(parent, name)?.is_some();
        if below && !self.is_white(parent, name)? {
            return Err(Errno::EXIST);
        }
        self.copy_up(parent, true)?;
        let dir = self.upper_dir(parent)?;
        // As the kernel has it: a default ACL takes the place of the umask.
        let masked = !matches!(what, What::Symlink(_)) && umask != 0;
        let keeps = masked && self.hands_on(parent, &dir)?;
        let mode = Mode::from_raw_mode(mode & 0o7777 & if keeps { !0 } else { !umask });
        if !below {
            match self.make_at(&dir, name, what, mode, by) {
                // There are whiteouts that hide nothing.
                Err(Errno::EXIST) if self.is_white(parent, name)? => {}
                made => return made,
            }
        }
        self.make_over_whiteout(&dir, name, what, mode, by)
    }

    fn is_white(&mut self, parent: Ino, name: &OsStr) -> Result<bool> {
        Ok(self.upper_at(parent, name)?.is_some_and(|stat| is_whiteout(&stat)))
    }

    /// Whether a directory of the upper has a default ACL.
    fn hands_on(&mut self, ino: Ino, dir: &Arc<OwnedFd>) -> Result<bool> {
        if let Some(known) = self.node(ino)?.hands_on {
            return Ok(known);
        }
        let found = Object::of(dir.clone()).xattr("system.posix_acl_default")?.is_some();
        self.node_mut(ino)?.hands_on = Some(found);
        Ok(found)
    }

    fn make_at(
        &mut self,
        dir: &Arc<OwnedFd>,
        name: &OsStr,
        what: What<'_>,
        mode: Mode,
        by: Caller,
    ) -> Result<Option<OwnedFd>> {
        let nothing = |made: Result<()>| made.map(|()| None);
        match what {
            What::Dir => nothing(as_caller(by, dir, name, || rustix::fs::mkdirat(dir, name, mode))),
            What::Symlink(target) => nothing(as_caller(by, dir, name, || rustix::fs::symlinkat(target, dir, name))),
            What::Node(FileType::CharacterDevice, 0) => {
                as_caller(by, dir, name, || rustix::fs::mknodat(dir, name, FileType::RegularFile, mode, 0))?;
                nothing(self.mark(&Object::at(dir.clone(), name), self.store.keys().node(), b"c 0 0"))
            }
            What::Node(FileType::RegularFile, _) => as_caller(by, dir, name, || {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | SAFE;
                rustix::fs::openat(dir, name, flags, mode).map(Some)
            }),
            What::Node(kind, rdev) => {
                nothing(as_caller(by, dir, name, || rustix::fs::mknodat(dir, name, kind, mode, rdev)))
            }
        }
    }

    /// Makes it in a directory that hands on the same things as its place does, and moves it there.
    fn make_over_whiteout(
        &mut self,
        dir: &Arc<OwnedFd>,
        name: &OsStr,
        what: What<'_>,
        mode: Mode,
        by: Caller,
    ) -> Result<Option<OwnedFd>> {
        let (work, nest, child) = (self.store.work()?, self.store.fresh(), OsString::from("n"));
        rustix::fs::mkdirat(&work, &nest, Mode::RWXU)?;
        let nested = Arc::new(super::object::open_dir(&work, &nest)?);
        let (from, to) = (Object::of(dir.clone()), Object::of(nested.clone()));
        let stat = from.stat()?;
        if stat.st_mode & 0o2000 != 0 {
            to.chown(None, Some(stat.st_gid))?;
            to.chmod(Mode::RWXU | Mode::SGID)?;
        }
        if let Some(acl) = from.xattr("system.posix_acl_default")? {
            to.set_xattr("system.posix_acl_default", &acl, XattrFlags::empty())?;
        }
        let made = self.make_at(&nested, &child, what, mode, by)?;
        if let What::Dir = what {
            self.mark(&Object::at(nested.clone(), child.clone()), self.store.keys().opaque(), b"y")?;
            rustix::fs::renameat_with(&nested, &child, dir, name, RenameFlags::EXCHANGE)?;
            rustix::fs::unlinkat(&nested, &child, AtFlags::empty())?;
        } else {
            rustix::fs::renameat(&nested, &child, dir, name)?;
        }
        rustix::fs::unlinkat(&work, &nest, AtFlags::REMOVEDIR)?;
        Ok(made)
    }
}

/// How this thread makes files for others.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ability {
    Unknown,
    /// It takes their ids for the moment of the making, and keeps its own rights.
    Become,
    /// It hands the file over afterwards.
    Give,
    /// It makes files of its own only.
    Own,
}

thread_local! {
    static ABILITY: Cell<Ability> = const { Cell::new(Ability::Unknown) };
}

fn ability() -> Ability {
    if ABILITY.get() == Ability::Unknown {
        let found = if !rustix::process::geteuid().is_root() {
            Ability::Own
        } else {
            // A thread's own: without it, the capabilities would go with the id.
            let bits = rustix::thread::capabilities_secure_bits().unwrap_or(CapabilitiesSecureBits::empty());
            let bits = bits | CapabilitiesSecureBits::NO_SETUID_FIXUP;
            match rustix::thread::set_capabilities_secure_bits(bits) {
                Ok(()) => Ability::Become,
                Err(_) => Ability::Give,
            }
        };
        ABILITY.set(found);
    }
    ABILITY.get()
}

/// Makes a file as its owner, so that it is never there with another one.
fn as_caller<T>(by: Caller, dir: &OwnedFd, name: &OsStr, make: impl FnOnce() -> Result<T>) -> Result<T> {
    use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
    if (by.uid, by.gid) == (0, 0) {
        return make();
    }
    match ability() {
        Ability::Unknown | Ability::Own => make(),
        Ability::Give => {
            let made = make()?;
            let (uid, gid) = (rustix::fs::Uid::from_raw(by.uid), rustix::fs::Gid::from_raw(by.gid));
            let inherits = rustix::fs::statat(dir, ".", AtFlags::empty())?.st_mode & 0o2000 != 0;
            rustix::fs::chownat(dir, name, Some(uid), (!inherits).then_some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            Ok(made)
        }
        Ability::Become => {
            setfsgid(Gid::from_raw(by.gid));
            setfsuid(Uid::from_raw(by.uid));
            let made = make();
            setfsuid(Uid::from_raw(0));
            setfsgid(Gid::from_raw(0));
            made
        }
    }
}
