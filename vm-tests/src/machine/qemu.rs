//! QEMU with Debian's stock kernel: what user-mode Linux lacks, CRIU above all.
//!
//! The kernel starts with an initial file system of this program alone ([`Archive`]), which mounts the host's root by 9p,
//! read-only, and goes on from there as in any other machine.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use super::Plan;
use super::initramfs::Archive;
use crate::error::Context;
use crate::{Error, Result, modules::Modules};

/// QEMU's program.
const PROGRAM: &str = "qemu-system-x86_64";
/// What `tests/support/setup.sh` unpacks below `target/vm`: a kernel, its modules and a CRIU, of one release of Debian.
const DEBIAN: &str = "debian";
/// The tags of the two directories that both sides see.
pub(super) const ROOT_TAG: &str = "root";
pub(super) const EXCHANGE_TAG: &str = "exchange";

/// What is needed to see the host's root and the disk.
const TO_START: &[&str] =
    &["virtio_pci", "9pnet_virtio", "9p", "virtio_blk", "virtio_console", "crc32c_generic", "ext4", "overlay"];

/// What a file system of ours, CRIU or a test may need.
pub(super) const TO_LOAD: &[&str] = &[
    // What others ask for while they are loaded, although no index says so.
    "crc32c_generic",
    "loop",
    "fuse",
    "btrfs",
    "xfs",
    "nilfs2",
    "dm-mod",
    "dm-thin-pool",
    "dm-flakey",
    "dm-log-writes",
    "dm-delay",
    "dm-snapshot",
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "af_packet_diag",
    "netlink_diag",
    "nf_tables",
    "nfnetlink",
    "veth",
    "tun",
];

fn missing(what: &Path) -> Error {
    Error::Missing { what: what.display().to_string(), package: "linux-image-amd64 or criu" }
}

/// Where Debian's kernel and CRIU are.
fn debian() -> Result<PathBuf> {
    Ok(crate::run::target_dir()?.join("vm").join(DEBIAN))
}

/// The one entry of a directory whose name begins so.
fn only(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).map_err(|_| missing(dir))?;
    let mut found: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.retain(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes())));
    found.sort();
    found.pop().ok_or_else(|| missing(&dir.join(prefix)))
}

/// Where the modules of the kernel are.
pub(super) fn module_dir() -> Result<PathBuf> {
    only(&debian()?.join("tree/lib/modules"), "")
}

/// The CRIU that knows this kernel.
fn criu() -> Result<PathBuf> {
    let criu = debian()?.join("criu");
    if criu.is_file() { Ok(criu) } else { Err(missing(&criu)) }
}

/// What runs the machine's instructions.
#[derive(Debug)]
pub(crate) enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU plays a processor, for this reason.
    Played(&'static str),
}

impl Accelerator {
    /// As QEMU calls it.
    fn name(&self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Played(_) => "tcg",
        }
    }

    /// The one that works here; found out once, by starting a machine if there is any hope.
    ///
    /// A `/dev/kvm` alone says little: there are some that run only guests which know of them, and leave others hanging.
    pub(crate) fn here() -> &'static Self {
        static HERE: OnceLock<Accelerator> = OnceLock::new();
        HERE.get_or_init(|| {
            let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let flags = processor.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
            if !flags.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag)) {
                return Self::Played("this processor cannot virtualize");
            }
            if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
                return Self::Played("/dev/kvm cannot be opened");
            }
            match probe("kvm", PROBE_DEADLINE) {
                Ok(true) => Self::Kvm,
                Ok(false) | Err(_) => Self::Played("a machine that was tried with /dev/kvm did not start"),
            }
        })
    }
}

/// Where the processor itself works, a kernel is up after a second or two.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// What the kernel says, by the first process, when it is up.
const ALIVE: &str = "vm-tests: the machine works";

/// Whether a machine starts so, within the time: its first process says so and ends.
fn probe(accelerator: &str, within: Duration) -> Result<bool> {
    let dir = tempfile::tempdir().during("make", "a directory")?;
    let (initramfs, log) = (dir.path().join("initramfs"), dir.path().join("log"));
    let mut archive = Archive::create(&initramfs)?;
    archive.program(Path::new("/proc/self/exe"), "init")?;
    archive.finish()?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    bare(&mut command, accelerator, 512)?;
    command.arg("-initrd").arg(&initramfs).arg("-serial").arg(format!("file:{}", log.display()));
    command.args(["-append", &format!("{KERNEL} -- probe")]);
    let mut machine = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().during("run", PROGRAM)?;
    let begun = Instant::now();
    let alive = || fs::read(&log).is_ok_and(|log| String::from_utf8_lossy(&log).contains(ALIVE));
    while !alive() && begun.elapsed() < within && !crate::run::interrupted() {
        thread::sleep(Duration::from_millis(50));
    }
    // It has nothing to lose, and may have ended by itself.
    let _ = machine.kill();
    machine.wait().during("wait for", PROGRAM)?;
    Ok(alive())
}

/// Runs as the first process of a machine that is tried: says that it works.
pub(crate) fn say_that_it_works() -> Result<()> {
    fs::write("/dev/kmsg", format!("<3>{ALIVE}\n")).during("write to", "/dev/kmsg")
}

/// What programs inside find in their environment.
pub(super) fn environment() -> Result<Vec<(&'static str, String)>> {
    // The CRIU that works on the host knows newer kernels only.
    let mut environment = vec![("FSNAP_CRIU", criu()?.to_string_lossy().into_owned())];
    environment.push(("FSNAP_ORACLE_CHECKPOINTS", "10".into()));
    if let Accelerator::Played(_) = Accelerator::here() {
        // Dozens of writers, and those of three restored processes, would leave nothing of the processor to what is tested. They
        // pause in the middle of their steps, so that there they are found all the same.
        environment.push(("FSNAP_ORACLE_PACE", "1000000".into()));
    }
    Ok(environment)
}

/// What every kernel is told.
const KERNEL: &str = "console=ttyS0 loglevel=7 panic=-1 rdinit=/init net.ifnames=0";

/// A machine with a kernel, and nothing else.
fn bare(command: &mut Command, accelerator: &str, memory_mib: u32) -> Result<()> {
    let installed = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(PROGRAM).is_file()));
    if !installed {
        return Err(Error::Missing { what: PROGRAM.into(), package: "qemu-system-x86" });
    }
    let kernel = only(&debian()?.join("tree/boot"), "vmlinuz-")?;
    command.arg(PROGRAM);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"]);
    // What the bits are that `max` would have, some hosts do not let anybody set; five levels of page tables cost and give nothing.
    let processor = "max,arch-capabilities=off,la57=off";
    command.args(["-accel", accelerator, "-cpu", processor, "-smp", "2"]);
    command.args(["-m", &format!("{memory_mib}M")]).arg("-kernel").arg(kernel);
    Ok(())
}

/// The program's part of the command that starts the machine.
pub(super) fn start(command: &mut Command, plan: &Plan<'_>, guest: &Path) -> Result<()> {
    let initramfs = plan.dir.join("initramfs");
    make_initramfs(&initramfs)?;
    bare(command, Accelerator::here().name(), plan.memory_mib)?;
    command.arg("-initrd").arg(&initramfs);
    // The kernel's messages go to the standard error, the program's output to the standard output.
    command.args(["-serial", "file:/dev/stderr", "-chardev", "stdio,id=program,signal=off"]);
    command.args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=program"]);
    for (tag, path, rest) in
        [(ROOT_TAG, Path::new("/"), ",readonly=on,multidevs=remap"), (EXCHANGE_TAG, plan.exchange, "")]
    {
        command.args(["-fsdev", &format!("local,id={tag},path={},security_model=none{rest}", path.display())]);
        command.args(["-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
    }
    // The disk is thrown away with the machine.
    let drive = format!("file={},format=raw,if=none,id=scratch,cache=unsafe", plan.scratch.display());
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=scratch"]);
    command.args(["-append", &format!("{KERNEL} -- initramfs {} {}", plan.exchange.display(), guest.display())]);
    Ok(())
}

/// This program as the first process, and the modules that it needs to go on.
fn make_initramfs(path: &Path) -> Result<()> {
    let mut archive = Archive::create(path)?;
    archive.program(Path::new("/proc/self/exe"), "init")?;
    let dir = module_dir()?;
    let modules = Modules::open(&dir)?;
    archive.file(&dir.join("modules.dep"), "modules/modules.dep")?;
    for file in modules.files(TO_START) {
        archive.file(&dir.join(&file), &format!("modules/{file}"))?;
    }
    archive.finish()
}

/// Runs as the first process in the initial file system: makes the host's root the root, and goes on as the guest's side.
pub(crate) fn initramfs(exchange: &Path, guest: &Path) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    use std::os::unix::process::CommandExt as _;

    let modules = Modules::open(Path::new("/modules"))?;
    let mut loaded = Default::default();
    for name in TO_START {
        modules.load(name, &mut loaded)?;
    }
    let root = Path::new("/host");
    fs::create_dir_all(root).during("make", root)?;
    let options = "trans=virtio,version=9p2000.L,cache=loose,msize=512000";
    mount(Some(ROOT_TAG), root, Some("9p"), MsFlags::MS_RDONLY, Some(options)).during("mount", root)?;
    mount(Some("dev"), "/host/dev", Some("devtmpfs"), MsFlags::empty(), None::<&str>).during("mount", "/host/dev")?;
    std::env::set_current_dir(root).during("enter", root)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).during("move the root to", "/")?;
    nix::unistd::chroot(".").during("change the root to", root)?;
    let error = Command::new(guest).args(["guest", "qemu"]).arg(exchange).env_clear().exec();
    Err(error).during("run", guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_tried_before_it_is_relied_upon() {
        assert!(!probe("tcg", Duration::from_millis(100)).unwrap(), "no kernel starts in that time");
        assert!(!probe("nonsense", Duration::from_secs(3)).unwrap(), "there is no such accelerator");
    }
}
