//! The hook, called as CRIU calls it, with everything in its environment that CRIU would not set, or not in that order.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::Case;
use crate::oracle::Oracle;
use crate::site::{Site, Volume, id_in, said};

pub(crate) const CASES: &[Case] = &[
    ("what_is_none_of_its_business_succeeds", what_is_none_of_its_business_succeeds),
    ("what_is_missing_is_named", what_is_missing_is_named),
    ("nonsense_is_refused_and_does_nothing", nonsense_is_refused_and_does_nothing),
    ("any_way_to_the_image_directory_is_the_same", any_way_to_the_image_directory_is_the_same),
    ("stages_out_of_order_take_nothing", stages_out_of_order_take_nothing),
    ("images_that_are_not_whole_take_nothing", images_that_are_not_whole_take_nothing),
    ("nobody_need_listen", nobody_need_listen),
];

/// A process with files in two volumes, and an image directory of it, complete, that no hook has seen.
struct ByHand {
    site: Site,
    oracle: Oracle,
    images: PathBuf,
}

impl ByHand {
    fn new() -> Self {
        let site = Site::new(&[Volume::Btrfs, Volume::Rsync]);
        let oracle = site.small_oracle();
        let images = site.images();
        site.criu().dump(oracle.pid, &images, [""; 0]).unwrap();
        let by_hand = Self { site, oracle, images };
        // As for a hook that CRIU calls: rsync refuses a file that changes all the time while it is read.
        by_hand.signal(Signal::STOP);
        by_hand
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.oracle.pid).unwrap(), signal).unwrap();
    }

    /// The process runs again, and must find nothing changed.
    fn goes_on(&self) {
        self.signal(Signal::CONT);
        self.oracle.goes_on();
    }

    fn call(&self, action: &str) -> Command {
        let pid = self.oracle.pid.to_string();
        self.call_with(&[
            ("CRTOOLS_SCRIPT_ACTION", action.as_ref()),
            ("CRTOOLS_IMAGE_DIR", self.images.as_os_str()),
            ("CRTOOLS_INIT_PID", pid.as_ref()),
        ])
    }

    fn call_with(&self, environment: &[(&str, &OsStr)]) -> Command {
        let mut command = self.site.command_of(&self.site.hook());
        command.envs(environment.iter().copied());
        command
    }

    /// Calls that must all fail, say this, and leave nothing.
    fn refused(&self, command: &mut Command, part: &str) {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {}", said(&output));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.starts_with("fsnap: error: ") && text.contains(part), "{command:?}: {part:?} is not in: {text}");
        assert!(!self.images.join("fsnap.json").exists());
        self.site.holds_nothing_but(0);
    }
}

fn succeeds(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    output
}

fn what_is_none_of_its_business_succeeds() {
    let by_hand = ByHand::new();
    let mut actions: Vec<OsString> =
        ["network-lock", "network-unlock", "query-ext-files", "setup-namespaces", "pre-resume"]
            .into_iter()
            .chain([
                "",
                "PRE-DUMP",
                " pre-dump",
                "pre-dump\n",
                "post-dump;post-dump",
                "../pre-dump",
                "orphan-pts-master",
            ])
            .map(OsString::from)
            .collect();
    actions.push(OsString::from_vec(b"pre-dump\xff".to_vec()));
    for action in &actions {
        // Whatever the other variables are, or none.
        succeeds(&mut by_hand.call_with(&[("CRTOOLS_SCRIPT_ACTION", action)]));
        succeeds(&mut by_hand.call_with(&[
            ("CRTOOLS_SCRIPT_ACTION", action),
            ("CRTOOLS_IMAGE_DIR", "/absent".as_ref()),
            ("CRTOOLS_INIT_PID", "-1".as_ref()),
        ]));
    }
    // What CRIU says after a restore needs nothing done either.
    succeeds(&mut by_hand.call("post-restore"));
    succeeds(&mut by_hand.call("post-resume"));
    by_hand.site.holds_nothing_but(0);
}

fn what_is_missing_is_named() {
    let by_hand = ByHand::new();
    by_hand.refused(&mut by_hand.call_with(&[]), "CRTOOLS_SCRIPT_ACTION is not set");
    for action in ["pre-dump", "post-dump", "pre-restore"] {
        by_hand.refused(
            by_hand.call(action).env_remove("CRTOOLS_IMAGE_DIR"),
            "CRTOOLS_IMAGE_DIR is not set: this command is an action script of CRIU",
        );
    }
    for action in ["pre-dump", "post-dump"] {
        by_hand.refused(by_hand.call(action).env_remove("CRTOOLS_INIT_PID"), "CRTOOLS_INIT_PID is not set");
    }
}

fn nonsense_is_refused_and_does_nothing() {
    let by_hand = ByHand::new();
    let big = "9".repeat(100_000);
    for pid in ["", " ", "0", "-1", "1; touch x", "$(touch x)", "0x10", "4294967297", "1 2", "../1", &big] {
        for action in ["pre-dump", "post-dump", "pre-restore"] {
            by_hand.refused(by_hand.call(action).env("CRTOOLS_INIT_PID", pid), "CRTOOLS_INIT_PID is not a pid");
        }
    }
    // A pid that nobody has.
    by_hand.refused(by_hand.call("pre-dump").env("CRTOOLS_INIT_PID", "4194303"), "4194303");
    let fifo = by_hand.site.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let long = "/x".repeat(50_000);
    let places = ["", "/absent", "/etc/passwd", fifo.to_str().unwrap(), "/proc/4194303/fd/3", &long];
    for place in places {
        for action in ["pre-dump", "post-dump", "pre-restore"] {
            let part = if place.starts_with("/proc") { "names a process that has ended" } else { "image directory" };
            by_hand.refused(by_hand.call(action).env("CRTOOLS_IMAGE_DIR", place), part);
        }
    }
    by_hand.goes_on();
}

fn any_way_to_the_image_directory_is_the_same() {
    let by_hand = ByHand::new();
    let (site, images) = (&by_hand.site, &by_hand.images);
    let name = images.file_name().unwrap().to_str().unwrap();
    std::os::unix::fs::symlink(images, site.path("link")).unwrap();
    let winding = format!("../{}/./state/../{name}/", site.path("").file_name().unwrap().to_str().unwrap());
    succeeds(by_hand.call("pre-dump").env("CRTOOLS_IMAGE_DIR", site.path("link")));
    let second = succeeds(by_hand.call("pre-dump").env("CRTOOLS_IMAGE_DIR", winding).current_dir(site.path("")));
    let third = succeeds(&mut by_hand.call("post-dump"));
    assert_eq!(second.stdout, third.stdout);
    assert_eq!(format!("{}\n", id_in(images)).as_bytes(), third.stdout);
    assert_eq!(site.ids(), [id_in(images)]);
    by_hand.goes_on();
}

fn stages_out_of_order_take_nothing() {
    let by_hand = ByHand::new();
    by_hand.refused(&mut by_hand.call("post-dump"), "no checkpoint was begun");
    // These images belong to no checkpoint, so that there is nothing to check.
    let output = succeeds(&mut by_hand.call("pre-restore"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("their files are not checked"), "{}", said(&output));
    succeeds(&mut by_hand.call("pre-dump"));
    succeeds(&mut by_hand.call("pre-restore"));
    succeeds(&mut by_hand.call("pre-dump"));
    let first = succeeds(&mut by_hand.call("post-dump")).stdout;
    assert_eq!(succeeds(&mut by_hand.call("post-dump")).stdout, first);
    by_hand.site.holds_nothing_but(1);
    // Sealed by now: it cannot be taken once more.
    let output = by_hand.call("post-dump").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    by_hand.site.holds_nothing_but(1);
    by_hand.goes_on();
}

fn images_that_are_not_whole_take_nothing() {
    let by_hand = ByHand::new();
    let inventory = by_hand.images.join("inventory.img");
    let whole = fs::read(&inventory).unwrap();
    let refused = |by_hand: &ByHand, part: &str| {
        succeeds(&mut by_hand.call("pre-dump"));
        let output = by_hand.call("post-dump").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{part:?} is not in: {}", said(&output));
        assert!(!by_hand.images.join("fsnap.json").exists());
        assert_eq!(by_hand.site.ids(), [""; 0]);
    };
    fs::remove_file(&inventory).unwrap();
    refused(&by_hand, "there is no inventory.img");
    for end in [0, 3, 4, 7, 8, whole.len() - 1] {
        fs::write(&inventory, &whole[..end]).unwrap();
        refused(&by_hand, "inventory.img");
    }
    fs::write(&inventory, [b"x", &whole[1..]].concat()).unwrap();
    refused(&by_hand, "of another kind");
    fs::remove_file(&inventory).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &inventory).unwrap();
    refused(&by_hand, "it is a symbolic link");
    fs::remove_file(&inventory).unwrap();
    nix::unistd::mkfifo(&inventory, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused(&by_hand, "it is not a regular file");
    fs::remove_file(&inventory).unwrap();
    fs::write(&inventory, &whole).unwrap();
    std::os::unix::fs::chown(&inventory, Some(65534), None).unwrap();
    refused(&by_hand, "it belongs to user 65534");
    std::os::unix::fs::chown(&inventory, Some(0), None).unwrap();
    succeeds(&mut by_hand.call("pre-dump"));
    succeeds(&mut by_hand.call("post-dump"));
    assert_eq!(by_hand.site.ids(), [id_in(&by_hand.images)]);
}

fn nobody_need_listen() {
    let by_hand = ByHand::new();
    let closed = |output: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$0\" {output}")]).arg(by_hand.site.hook());
        command
    };
    let broken_pipe = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let ways: [&dyn Fn(&Path) -> Command; 4] = [
        &|_| closed("<&- >&- 2>&-"),
        &|_| closed(">&-"),
        &|hook| {
            let mut command = Command::new(hook);
            command.stdout(broken_pipe()).stderr(broken_pipe());
            command
        },
        &|hook| {
            let mut command = Command::new(hook);
            command.stdout(full()).stderr(full());
            command
        },
    ];
    for (number, way) in ways.into_iter().enumerate() {
        for action in ["pre-dump", "post-dump", "pre-restore"] {
            let mut command = way(&by_hand.site.hook());
            let known = by_hand.call(action);
            command.envs(known.get_envs().filter_map(|(name, value)| Some((name, value?))));
            assert!(command.status().unwrap().success(), "{command:?}");
        }
        let ids = by_hand.site.ids();
        assert_eq!(ids.len(), number + 1);
        assert_eq!(ids[0], id_in(&by_hand.images));
    }
    by_hand.site.holds_nothing_but(4);
    by_hand.goes_on();
}
