//! The operations that are cut short, and what may be left of each.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::companion::{Beside, Companions};
use crate::site::{Shell, Site};

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

/// Where the volume lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Where {
    Btrfs,
    Plain,
}

pub(crate) const WHERE: &[Where] = &[Where::Btrfs, Where::Plain];

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Btrfs => "btrfs",
            Self::Plain => "rsync",
        })
    }
}

/// A site on which one operation is tried again and again.
#[derive(Debug)]
pub(crate) struct Scene {
    // They end before what they have open is unmounted.
    companions: Option<Companions>,
    site: Site,
    dir: &'static str,
    operation: &'static Operation,
    mounts: usize,
    tries: usize,
}

impl Scene {
    /// The site, with everything ready for the first try.
    pub(crate) fn new(place: Where, operation: &'static Operation) -> Self {
        let (site, dir) = match place {
            Where::Btrfs => (Site::btrfs(), "fs"),
            Where::Plain => (Site::plain(), "."),
        };
        let mut scene = Self { site, dir, operation, companions: None, mounts: mounts(), tries: 0 };
        scene.shell().run("fsnap init db && fsnap checkpoint -t one");
        scene.shell().run("echo more >>db/a && mkdir db/new && mv db/sub/b db/new && fsnap checkpoint -t two");
        scene.shell().run("truncate -s 100k db/a && echo again >>db/new/b");
        scene.prepare();
        scene
    }

    pub(crate) fn shell(&self) -> Shell<'_> {
        self.site.in_dir(self.dir)
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
        let named = |image: &Value, key: &str| {
            let text = image[key].as_str().unwrap();
            text.rsplit('/').next().unwrap().to_owned()
        };
        let mut recorded = BTreeSet::new();
        for (list, key) in [("log", "snapshot"), ("branches", "path")] {
            for one in self.json(list).as_array().unwrap() {
                recorded.extend(one["members"].as_array().unwrap().iter().map(|member| named(member, key)));
            }
        }
        let images = self.site.images(&format!("{}/.fsnap", self.dir));
        let found: BTreeSet<String> = images.iter().map(|name| name.rsplit('/').next().unwrap().into()).collect();
        assert_eq!(found, recorded);
        assert_eq!(mounts(), self.mounts, "something is mounted");
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
