//! CRIU: its action scripts, its images, its program.
//!
//! CRIU runs an action script without arguments and tells it by the environment what goes on ([action scripts]): the stage, the image directory as a
//! link into its own `/proc` directory, which is dead once it has ended, and the pid of the tree's root.
//!
//! | stage | phase |
//! |---|---|
//! | `pre-dump` | [`Phase::Starting`] |
//! | `post-dump` | [`Phase::Frozen`] |
//! | `pre-restore` | [`Phase::Restoring`] |
//! | `post-restore` | [`Phase::Restored`] |
//! | `post-resume` | [`Phase::Resumed`] |
//!
//! All other stages, also those of later releases, are none of fsnap's business.
//!
//! [action scripts]: https://criu.org/Action_scripts

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{CWD, Mode, OFlags};

use super::{Error, Images, Phase, Result};
use crate::processes::ProcessId;

/// The engine's name in checkpoints.
pub const NAME: &str = "criu";

/// One call of CRIU's action script that concerns fsnap.
#[derive(Debug)]
pub struct HookCall {
    /// Which engine.
    pub name: &'static str,
    /// Where CRIU stands.
    pub phase: Phase,
    /// The directory of images.
    pub images: Images,
    /// The pid of the tree's root, in the pid namespace of CRIU; not known before a restore.
    pub tree: Option<i32>,
    /// The pid of CRIU itself.
    pub engine: i32,
}

impl HookCall {
    /// Understands the environment that CRIU calls an action script with; `None` for a stage that does not concern fsnap.
    ///
    /// `variable` looks up one variable. `caller` is taken for CRIU where the image directory is not told as a link into
    /// CRIU's own `/proc` directory: when the call is made by hand.
    pub fn parse(variable: impl Fn(&str) -> Option<OsString>, caller: i32) -> Result<Option<Self>> {
        const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
        const IMAGES: &str = "CRTOOLS_IMAGE_DIR";
        const TREE: &str = "CRTOOLS_INIT_PID";
        let wrong = |variable, problem| Error::Environment { variable, problem };
        let action = variable(ACTION).ok_or_else(|| wrong(ACTION, "is not set"))?;
        let Some(phase) = action.to_str().and_then(phase_of) else { return Ok(None) };
        let link = PathBuf::from(variable(IMAGES).ok_or_else(|| wrong(IMAGES, "is not set"))?);
        let engine = engine_of(&link).unwrap_or(caller);
        let tree = match variable(TREE) {
            Some(pid) => {
                let pid = pid.to_str().and_then(|pid| pid.parse().ok()).filter(|&pid| pid > 0);
                Some(pid.ok_or_else(|| wrong(TREE, "is not a pid"))?)
            }
            None if matches!(phase, Phase::Starting | Phase::Frozen) => return Err(wrong(TREE, "is not set")),
            None => None,
        };
        // That the engine lives is not looked up while processes are frozen; only what failed is looked into.
        let images = open_images(&link).map_err(|error| process_of(engine).err().unwrap_or(error))?;
        Ok(Some(Self { name: NAME, phase, images, tree, engine }))
    }

    /// CRIU itself, told apart from later processes with its pid.
    pub fn engine(&self) -> Result<ProcessId> {
        process_of(self.engine)
    }
}

fn process_of(engine: i32) -> Result<ProcessId> {
    let gone = |_| Error::Environment { variable: "CRTOOLS_IMAGE_DIR", problem: "names a process that has ended" };
    ProcessId::of(engine).map_err(gone)
}

fn phase_of(action: &str) -> Option<Phase> {
    Some(match action {
        "pre-dump" => Phase::Starting,
        "post-dump" => Phase::Frozen,
        "pre-restore" => Phase::Restoring,
        "post-restore" => Phase::Restored,
        "post-resume" => Phase::Resumed,
        _ => return None,
    })
}

/// The pid in `/proc/PID/fd/N`.
fn engine_of(link: &Path) -> Option<i32> {
    let mut components = link.components();
    let mut next = || match components.next()? {
        Component::Normal(name) => name.to_str(),
        Component::RootDir => Some("/"),
        _ => None,
    };
    let (root, proc, pid, fd, number) = (next()?, next()?, next()?, next()?, next()?);
    let is_link = (root, proc, fd) == ("/", "proc", "fd") && number.parse::<u32>().is_ok();
    if !is_link || components.next().is_some() {
        return None;
    }
    pid.parse().ok().filter(|&pid| pid > 0)
}

/// Opens the directory behind the link, and asks for its name at once: CRIU may end at any time.
fn open_images(link: &Path) -> Result<Images> {
    let failed = |source| Error::ImageDir { dir: link.into(), source };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(CWD, link, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let path = fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).map_err(failed)?;
    Ok(Images::new(dir, path))
}

/// What CRIU writes at the end of a dump, when everything else is there.
const INVENTORY: &str = "inventory.img";
/// The first four bytes of it: `INVENTORY_MAGIC` in CRIU's `magic.h`.
const INVENTORY_MAGIC: u32 = 0x5831_3116;
/// The processes of the dump.
const PSTREE: &str = "pstree.img";
/// What image files begin with, but the inventory: `IMG_COMMON_MAGIC`, and then one of their kind.
pub(super) const COMMON_MAGIC: u32 = 0x5456_4319;
const PSTREE_MAGIC: u32 = 0x5027_3030;
/// Far more than either file ever has.
const IMAGE_LIMIT: u64 = 64 << 20;

/// Checks that CRIU's dump into this directory is complete.
pub fn complete(images: &Images) -> Result<()> {
    let incomplete = |reason: String| Error::Incomplete { dir: images.path().into(), reason };
    let file = images.file(INVENTORY, IMAGE_LIMIT)?;
    let mut file = file.ok_or_else(|| incomplete(format!("there is no {INVENTORY}")))?;
    match read_u32(&mut file) {
        Ok(INVENTORY_MAGIC) => {}
        Ok(_) => return Err(incomplete(format!("{INVENTORY} is of another kind"))),
        Err(error) => return Err(incomplete(format!("{INVENTORY}: {error}"))),
    }
    let length = read_u32(&mut file).map_err(|error| incomplete(format!("{INVENTORY}: {error}")))?;
    let rest = file.take(IMAGE_LIMIT).read_to_end(&mut Vec::new());
    match rest {
        Ok(rest) if rest > 0 && rest as u64 >= u64::from(length) => Ok(()),
        Ok(_) => Err(incomplete(format!("{INVENTORY} is cut short"))),
        Err(error) => Err(incomplete(format!("{INVENTORY}: {error}"))),
    }
}

/// The pid of the root of the dumped tree, in its own pid namespace; `None` if the images do not say.
pub fn root_pid(images: &Images) -> Result<Option<i32>> {
    let Some(mut file) = images.file(PSTREE, IMAGE_LIMIT)? else { return Ok(None) };
    Ok(first_pid(&mut file))
}

fn first_pid(file: &mut File) -> Option<i32> {
    let kind = (read_u32(file).ok()?, read_u32(file).ok()?);
    let _length = read_u32(file).ok()?;
    let mut entry = [0; 6];
    file.read_exact(&mut entry).ok()?;
    // A protocol-buffer message whose first field, number 1 of the kind varint, is the pid.
    let (8, varint) = (entry[0], &entry[1..]) else { return None };
    let end = varint.iter().position(|byte| byte & 0x80 == 0)?;
    let pid = varint[..=end].iter().rev().fold(0_u64, |pid, byte| pid << 7 | u64::from(byte & 0x7f));
    let pid = i32::try_from(pid).ok().filter(|&pid| pid > 0);
    pid.filter(|_| kind == (COMMON_MAGIC, PSTREE_MAGIC))
}

fn read_u32(file: &mut File) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// The program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criu {
    program: PathBuf,
}

/// A release of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number, 0 if there is none.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Version {
    /// Reads the first two or three numbers of a text such as `4.1.1` or `6.18.44-generic`.
    fn parse(text: &str) -> Option<Self> {
        let digits = |part: &str| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse().ok()
        };
        let mut parts = text.trim().split('.');
        let (major, minor) = (digits(parts.next()?)?, digits(parts.next()?)?);
        Some(Self { major, minor, patch: parts.next().and_then(digits).unwrap_or(0) })
    }
}

/// What stands between a machine and a working CRIU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Diagnosis {
    /// `criu check` is content.
    Works,
    /// This release fails on every kernel as new as the running one.
    TooOld {
        /// The oldest release that works.
        needed: Version,
    },
    /// `criu check` is not content.
    Fails {
        /// The last lines that it wrote.
        said: String,
    },
}

/// The kernel that splits its time data into two mappings, and the first release that knows them.
const SPLIT_VVAR: (Version, Version) =
    (Version { major: 6, minor: 13, patch: 0 }, Version { major: 4, minor: 1, patch: 0 });

impl Criu {
    /// Finds the program: the configured one, or the first that exists of `search`.
    pub fn find(configured: Option<&Path>, search: &[PathBuf]) -> Result<Self> {
        let is_program = |program: &&Path| program.is_absolute() && program.is_file();
        let found = match configured {
            Some(program) => Some(program).filter(is_program),
            None => search.iter().map(PathBuf::as_path).find(is_program),
        };
        match found {
            Some(program) => Ok(Self { program: program.into() }),
            None => Err(Error::NoCriu { named: configured.map(Path::to_owned) }),
        }
    }

    /// Its path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Asks it for its release.
    pub fn version(&self) -> Result<Version> {
        let (_, said) = self.ask("--version")?;
        let line = said.lines().find_map(|line| line.strip_prefix("Version:"));
        line.and_then(Version::parse).ok_or_else(|| self.failed(io::Error::other("it does not say its version")))
    }

    /// Tries out whether it can work on this machine.
    pub fn diagnose(&self) -> Result<Diagnosis> {
        let (kernel, needed) = SPLIT_VVAR;
        let running = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        let running = running.as_deref().and_then(Version::parse);
        if running.is_some_and(|running| running >= kernel) && self.version()? < needed {
            return Ok(Diagnosis::TooOld { needed });
        }
        match self.ask("check")? {
            (true, _) => Ok(Diagnosis::Works),
            (false, said) => Ok(Diagnosis::Fails { said: tail(&said, 5) }),
        }
    }

    fn ask(&self, what: &str) -> Result<(bool, String)> {
        let output = Command::new(&self.program).arg(what).stdin(Stdio::null()).output();
        let output = output.map_err(|source| self.failed(source))?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Run { program: self.program.clone(), source }
    }
}

/// The last lines of a text, without its control characters.
pub(super) fn tail(text: &str, lines: usize) -> String {
    let lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(lines).collect();
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    lines.iter().rev().map(|line| line.chars().map(printable).collect::<String>()).collect::<Vec<_>>().join("\n")
}
