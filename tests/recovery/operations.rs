//! The operations that are cut short, and what may be left of each.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::companion::{Beside, Companions};
use crate::site::{Shell, Site};
use crate::thin;
use crate::volumes::Volume;

/// A command of fsnap that changes something.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    /// What happens before it, each time.
    prepare: &'static [&'static str],
    /// Its arguments.
    args: &'static [&'static str],
    /// Variables of its environment.
    variables: &'static [(&'static str, &'static str)],
    /// What runs beside it.
    beside: Beside,
    /// Whether it was done, as one can see afterwards.
    done: fn(&Scene) -> bool,
    /// What happens after it, so that it can be done again.
    clean: &'static [&'static str],
}

/// What CRIU calls its action script with while the processes stand.
const POST_DUMP: &[(&str, &str)] = &[
    ("CRTOOLS_SCRIPT_ACTION", "post-dump"),
    ("CRTOOLS_IMAGE_DIR", "/proc/%ENGINE/fd/8"),
    ("CRTOOLS_INIT_PID", "%WRITER"),
];

/// Every operation starts with the volume registered and the checkpoints `one` and `two` taken, but `init`.
pub(crate) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "init",
        prepare: &["mkdir -p other"],
        args: &["init", "--backend", "rsync", "--store", "other-store", "other"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.json("volumes").as_array().unwrap().len() == 2,
        clean: &["fsnap init --backend rsync --store other-store other || :", "fsnap rm --volume other"],
    },
    Operation {
        name: "checkpoint",
        prepare: &[],
        args: &["checkpoint", "-m", "new", "-t", "new"],
        variables: &[],
        beside: Beside::Nobody,
        done: is_checkpointed,
        clean: &["fsnap rm new || :"],
    },
    Operation {
        name: "checkpoint_pid",
        prepare: &[],
        args: &["checkpoint", "-t", "new", "--pid", "%WRITER"],
        variables: &[],
        beside: Beside::Writer,
        done: is_checkpointed,
        clean: &["fsnap rm new || :"],
    },
    Operation {
        name: "checkpoint_cgroup",
        prepare: &[],
        args: &["checkpoint", "-t", "new", "--cgroup", "%CGROUP"],
        variables: &[],
        beside: Beside::WriterInCgroup,
        done: is_checkpointed,
        clean: &["fsnap rm new || :"],
    },
    Operation {
        name: "checkpoint_writers",
        prepare: &[],
        args: &["checkpoint", "-t", "new", "--freeze-writers"],
        variables: &[],
        beside: Beside::Writer,
        done: is_checkpointed,
        clean: &["fsnap rm new || :"],
    },
    Operation {
        name: "hook_before_the_freeze",
        prepare: &[],
        args: &["hook", "criu"],
        variables: &[
            ("CRTOOLS_SCRIPT_ACTION", "pre-dump"),
            ("CRTOOLS_IMAGE_DIR", "/proc/%ENGINE/fd/8"),
            ("CRTOOLS_INIT_PID", "%WRITER"),
        ],
        beside: Beside::WriterAndEngine,
        // The engine has ended without its second call.
        done: |scene| {
            assert_eq!(scene.checkpoints(), 2);
            true
        },
        clean: &[],
    },
    Operation {
        name: "hook_in_the_frozen_window",
        prepare: &[
            "CRTOOLS_SCRIPT_ACTION=pre-dump CRTOOLS_IMAGE_DIR=/proc/%ENGINE/fd/8 CRTOOLS_INIT_PID=%WRITER fsnap hook criu",
        ],
        args: &["hook", "criu"],
        variables: POST_DUMP,
        beside: Beside::WriterAndEngine,
        done: dumped,
        clean: &["[ $(fsnap log | wc -l) -lt 4 ] || fsnap rm @latest"],
    },
    Operation {
        name: "hook_without_attendant",
        prepare: &[
            "printf '[hook]\\nattendant = false\\n' >alone.toml",
            "FSNAP_CONFIG=alone.toml CRTOOLS_SCRIPT_ACTION=pre-dump CRTOOLS_IMAGE_DIR=/proc/%ENGINE/fd/8 CRTOOLS_INIT_PID=%WRITER fsnap hook criu",
        ],
        args: &["hook", "criu"],
        variables: POST_DUMP,
        beside: Beside::WriterAndEngine,
        done: dumped,
        clean: &["[ $(fsnap log | wc -l) -lt 4 ] || fsnap rm @latest"],
    },
    Operation {
        name: "branch",
        prepare: &[],
        args: &["branch", "one", "work"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| {
            let branches = scene.json("branches");
            let Some(branch) = branches.as_array().unwrap().first() else { return false };
            let path = Path::new(branch["members"][0]["path"].as_str().unwrap());
            assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one\n");
            assert_eq!(fs::read_to_string(path.join("sub/b")).unwrap(), "two\n");
            true
        },
        clean: &["fsnap rm --branch work || :"],
    },
    Operation {
        name: "rm",
        prepare: &["fsnap checkpoint -m new -t new"],
        args: &["rm", "new"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.checkpoints() == 2,
        clean: &["fsnap rm new || :"],
    },
    Operation {
        name: "rm_branch",
        prepare: &["fsnap branch one work"],
        args: &["rm", "--branch", "work"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.json("branches").as_array().unwrap().is_empty(),
        clean: &["fsnap rm --branch work || :"],
    },
    Operation {
        name: "tag",
        prepare: &[],
        args: &["tag", "one", "another"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.json("log")[1]["tags"].as_array().unwrap().len() == 2,
        clean: &["fsnap tag --delete another || :"],
    },
    Operation {
        name: "recover_a_checkpoint",
        prepare: &["FSNAP_FAILPOINT=take:all=kill fsnap checkpoint -t new || :"],
        args: &["recover"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.checkpoints() == 2,
        clean: &[],
    },
    Operation {
        name: "recover_a_seal",
        prepare: &["FSNAP_FAILPOINT=take:recorded=kill fsnap checkpoint -t new || :"],
        args: &["recover"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| {
            // Everything was taken: nothing may be lost, however recovery is cut short.
            assert_eq!(scene.checkpoints(), 3);
            true
        },
        clean: &["fsnap rm new"],
    },
    Operation {
        name: "recover_a_branch",
        prepare: &["FSNAP_FAILPOINT=branch:cloned=kill fsnap branch one work || :"],
        args: &["recover"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.json("branches").as_array().unwrap().is_empty(),
        clean: &[],
    },
    Operation {
        name: "recover_a_removal",
        prepare: &["fsnap checkpoint -t new && FSNAP_FAILPOINT=remove:recorded=kill fsnap rm new || :"],
        args: &["recover"],
        variables: &[],
        beside: Beside::Nobody,
        done: |scene| scene.checkpoints() == 2,
        clean: &[],
    },
];

/// Whether there is a third checkpoint, which an engine's hook took.
fn dumped(scene: &Scene) -> bool {
    let there = scene.checkpoints() == 3;
    if there {
        scene.expect_difference("@latest", "");
        assert_eq!(scene.json("log")[0]["engine"]["name"], "criu");
    }
    there
}

fn is_checkpointed(scene: &Scene) -> bool {
    let there = scene.checkpoints() == 3;
    if there {
        scene.expect_difference("new", "");
        assert_eq!(scene.json("log")[0]["tags"], serde_json::json!(["new"]));
    }
    there
}

/// What the volume is, and how the tests of it are called.
pub(crate) const PLACES: &[(Volume, &str)] =
    &[(Volume::Btrfs, "btrfs"), (Volume::Rsync, "rsync"), (Volume::DmThin, "dm-thin"), (Volume::Nilfs2, "nilfs2")];

/// A site on which one operation is tried again and again.
#[derive(Debug)]
pub(crate) struct Scene {
    // They end before what they have open is unmounted.
    companions: Option<Companions>,
    site: Site,
    volume: Volume,
    operation: &'static Operation,
    mounts: usize,
    tries: usize,
}

impl Scene {
    /// The site, with everything ready for the first try.
    pub(crate) fn new(volume: Volume, operation: &'static Operation) -> Self {
        let site = match volume {
            Volume::Btrfs => Site::btrfs(),
            Volume::Rsync => Site::plain(),
            Volume::DmThin | Volume::Nilfs2 => Site::on(volume),
        };
        let mut scene = Self { site, volume, operation, companions: None, mounts: mounts(), tries: 0 };
        scene.shell().run("fsnap init db && fsnap checkpoint -t one");
        scene.shell().run("echo more >>db/a && mkdir db/new && mv db/sub/b db/new && fsnap checkpoint -t two");
        scene.shell().run("truncate -s 100k db/a && echo again >>db/new/b");
        scene.prepare();
        scene
    }

    pub(crate) fn shell(&self) -> Shell<'_> {
        self.site.top()
    }

    /// The line by which a shell does the operation.
    pub(crate) fn line(&self) -> String {
        let variables = self.operation.variables.iter().map(|(name, value)| format!("{name}={} ", self.fill_in(value)));
        let args = self.operation.args.iter().map(|argument| self.fill_in(argument) + " ");
        format!("exec env {}fsnap {}", variables.collect::<String>(), args.collect::<String>())
    }

    /// The operation as a program that is started without a shell.
    pub(crate) fn fsnap(&self) -> Command {
        let like = self.shell().command("");
        let mut command = Command::new(env!("CARGO_BIN_EXE_fsnap"));
        command.args(self.operation.args.iter().map(|argument| self.fill_in(argument)));
        command.current_dir(like.get_current_dir().unwrap());
        command.envs(like.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.envs(self.operation.variables.iter().map(|(name, value)| (name, self.fill_in(value))));
        command
    }

    fn fill_in(&self, text: &str) -> String {
        self.companions.as_ref().map_or_else(|| text.to_owned(), |companions| companions.fill_in(text))
    }

    fn prepare(&mut self) {
        self.companions = None;
        self.companions = Companions::start(self.operation.beside, &self.shell());
        for line in self.operation.prepare {
            self.shell().run(&self.fill_in(line));
        }
    }

    /// Looks at what an operation left that was cut short, or that came through (`done`); then gets ready for the next.
    pub(crate) fn check(&mut self, what: &str, done: Option<bool>) {
        // Whatever fails below says what happened before.
        let context = Context(what);
        if let Some(companions) = &mut self.companions {
            // Nobody but fsnap and its guard was here yet.
            companions.expect_running();
            companions.end_engine();
        }
        // Every command recovers, whichever is the next.
        let next = ["recover", "log", "verify", "branches"][self.tries % 4];
        self.tries += 1;
        let said = self.shell().output(&format!("fsnap {next}"));
        assert!(said.status.success(), "{said:?}");
        let done_now = (self.operation.done)(self);
        assert!(done.is_none_or(|done| done == done_now), "done: {done_now}, but it was said to be {done:?}");
        self.expect_order();
        for line in self.operation.clean {
            self.shell().run(line);
        }
        self.prepare();
        drop(context);
    }

    /// Nothing is half done, nothing is in the stores that is not recorded, every checkpoint is what it was.
    fn expect_order(&self) {
        let told = self.shell().run(
            "fsnap recover && fsnap verify | sed 's/.*: //' && ls $FSNAP_STATE/intents && fsnap diff one && echo - && fsnap diff two",
        );
        let expected = "nothing is half done\n0 damaged\n\
                        M db/a\nA db/new\nA db/new/b\nD db/sub/b\n-\nM db/a\nM db/new/b";
        assert_eq!(told, expected);
        let names = |list: &str, key: &str| -> Vec<String> {
            let list = self.json(list);
            let members = list.as_array().unwrap().iter().flat_map(|one| one["members"].as_array().unwrap());
            let text = |member: &Value| member[key].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
            members.map(text).collect()
        };
        let (mut recorded, branches) = (names("log", "snapshot"), names("branches", "path"));
        let mut found = self.site.images(self.site.store());
        for name in &mut found {
            name.drain(..name.rfind('/').map_or(0, |slash| slash + 1));
        }
        let snapshots = recorded.len();
        let mut mounted = branches.len();
        match self.volume {
            Volume::Btrfs | Volume::Rsync => {
                recorded.extend(branches);
                mounted = 0;
            }
            // A branch is a clone that is mounted elsewhere; and the pool has a record of the volume itself.
            Volume::DmThin => {
                let clones = found.iter().filter(|name| name.starts_with("v-")).count();
                assert_eq!(clones, mounted);
                found.retain(|name| name != "db" && !name.starts_with("v-"));
                self.expect_in_pool(snapshots, clones);
            }
            // A branch is an overlay over the snapshot.
            Volume::Nilfs2 => {
                let marks = self.shell().run("lscp -s $(findmnt -no SOURCE db) | tail -n +2 | wc -l");
                assert_eq!(marks, snapshots.to_string());
            }
        }
        let set = |names: Vec<String>| names.into_iter().collect::<BTreeSet<_>>();
        assert_eq!(set(found), set(recorded));
        assert_eq!(mounts(), self.mounts + mounted, "something is mounted");
    }

    /// So many snapshots and clones are in the pool beside the volume; of these, the clones are in use, and nothing is suspended.
    fn expect_in_pool(&self, snapshots: usize, clones: usize) {
        let store = self.site.store();
        let settings: Value = serde_json::from_slice(&fs::read(store.join("fsnap-store")).unwrap()).unwrap();
        let pool = settings["pool"].as_str().unwrap();
        let in_pool = self.shell().run(&format!(
            "dmsetup message {pool} 0 reserve_metadata_snap
             metadata=$(dmsetup table {pool} | cut -d ' ' -f 4)
             thin_ls --metadata-snap --no-headers --format DEV /dev/$(basename $(readlink /sys/dev/block/$metadata)) | wc -l
             dmsetup message {pool} 0 release_metadata_snap"
        ));
        // The volume itself, and the device with the pool's signature.
        assert_eq!(in_pool, (2 + snapshots + clones).to_string());
        let devices = thin::devices(&store);
        let used = |kind: &str| devices.iter().filter(|device| device.what.starts_with(kind)).count();
        assert_eq!((used("s-"), used("v-")), (0, clones), "{devices:?}");
        assert!(devices.iter().all(|device| !device.suspended), "{devices:?}");
    }

    fn checkpoints(&self) -> usize {
        self.json("log").as_array().unwrap().len()
    }

    fn json(&self, command: &str) -> Value {
        serde_json::from_str(&self.shell().run(&format!("fsnap {command} --json"))).unwrap()
    }

    fn expect_difference(&self, checkpoint: &str, expected: &str) {
        assert_eq!(self.shell().run(&format!("fsnap diff {checkpoint}")), expected, "since {checkpoint}");
    }
}

/// Says, when a check fails, after what.
struct Context<'a>(&'a str);

impl Drop for Context<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "after {}", self.0);
        }
    }
}

fn mounts() -> usize {
    // Other tests mount and unmount beside this one: only what lies in a store or a state directory is counted.
    let table = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
    table.lines().filter(|line| line.contains("/.fsnap/") || line.contains("/state/")).count()
}
