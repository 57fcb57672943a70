//! What files cost through `fsnap mount` and `fsnap overlay`, beside the file system itself and the programs that people use today.
//!
//! `cargo bench --bench fuse` makes a tree on a loop-mounted btrfs, a checkpoint of it, and a restic repository; then everybody does the
//! same work on the same tree in turns: on a fresh mount, and once more on the same one. What lies below is in the page cache, so
//! that no disk is measured. Time is that of the clock, and that of the processors for whoever works and whoever serves together.
//! Only ratios mean anything. Requires root, btrfs, fuse-overlayfs, unionfs-fuse and restic. `FSNAP_BENCH_FILES`
//! says how many files there are (100,000); the large file shrinks with it. Arguments choose among the works, and among `branch` (what a
//! branch and a mount cost by the size of what they show), `large` (the first write into a large file) and `calls` (what a file costs
//! in requests and system calls; requires strace).

#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr, reason = "a program")]

#[path = "fuse/calls.rs"]
mod calls;
#[path = "fuse/contender.rs"]
mod contender;
#[path = "../support/copies.rs"]
mod copies;
#[path = "fuse/goals.rs"]
mod goals;
#[path = "fuse/large.rs"]
mod large;
mod measure;
#[path = "fuse/sizes.rs"]
mod sizes;
mod tree;
#[path = "fuse/work.rs"]
mod work;

use std::collections::BTreeMap;
use std::process::ExitCode;

use contender::{Kind, Peers};
use measure::{Failure, head, row};
use rustix::mount::MountPropagationFlags;
use work::{Cost, Work};

/// How often each contender does each work.
const ROUNDS: usize = 3;

/// The costs of each work, by contender: the first time on a mount, and the second.
type Costs = BTreeMap<(&'static str, Kind), [Cost; 2]>;

fn bench(wanted: &dyn Fn(&str) -> bool) -> Result<(), Failure> {
    if Work::ALL.iter().any(|work| wanted(work.name)) {
        works(wanted)?;
    }
    if wanted("branch") {
        sizes::bench(&tree::Tree::new()?)?;
    }
    if wanted("large") {
        large::bench()?;
    }
    if wanted("calls") {
        calls::bench()?;
    }
    Ok(())
}

fn works(wanted: &dyn Fn(&str) -> bool) -> Result<(), Failure> {
    let peers = Peers::new()?;
    let mut costs = Costs::new();
    for work in Work::ALL.iter().filter(|work| wanted(work.name)) {
        measure(&peers, work, &mut costs)?;
    }
    for (title, cell) in [
        (
            "time by the clock, as multiples of btrfs itself (the volume); the first time on a mount / the second",
            Cost::wall as fn(&Cost, &Cost) -> f64,
        ),
        ("time of processors, client and server, as multiples of btrfs itself", Cost::cpu),
    ] {
        table(title, &costs, cell);
    }
    let title = format!("btrfs itself, with {} files and {} MiB in one", peers.tree.files(), peers.tree.large() >> 20);
    head(&title, &["", "clock", "again", "processors", "again"]);
    for work in Work::ALL {
        if let Some([first, again]) = costs.get(&(work.name, Kind::Native)) {
            row(&[
                work.name.into(),
                measure::ms(first.wall),
                measure::ms(again.wall),
                measure::ms(first.cpu),
                measure::ms(again.cpu),
            ]);
        }
    }
    goals::print(&costs);
    Ok(())
}

/// The median costs of one work, done by the contenders in turns.
fn measure(peers: &Peers, work: &Work, costs: &mut Costs) -> Result<(), Failure> {
    let mut taken: BTreeMap<Kind, [Vec<Cost>; 2]> = BTreeMap::new();
    for round in 0..ROUNDS {
        // What is slow by a hundred times need not be measured thrice.
        for kind in Kind::ALL.into_iter().filter(|kind| kind.does(work) && (round == 0 || *kind != Kind::Restic)) {
            let mount = peers.mount(kind)?;
            for times in taken.entry(kind).or_default() {
                work.prepare(&mount)?;
                times.push(work.cost(&mount)?);
            }
        }
    }
    costs.extend(taken.into_iter().map(|(kind, rounds)| ((work.name, kind), rounds.map(Cost::median))));
    Ok(())
}

fn table(title: &str, costs: &Costs, cell: fn(&Cost, &Cost) -> f64) {
    let names: Vec<_> = std::iter::once("").chain(Kind::PEERS.iter().map(|kind| kind.name())).collect();
    head(title, &names);
    for work in Work::ALL {
        let Some([native, again]) = costs.get(&(work.name, Kind::Native)) else { continue };
        let cells = Kind::PEERS.iter().map(|&kind| match costs.get(&(work.name, kind)) {
            Some([one, two]) => format!("{:.2} / {:.2}", cell(one, native), cell(two, again)),
            None => "-".into(),
        });
        row(&std::iter::once(work.name.into()).chain(cells).collect::<Vec<String>>());
    }
}

fn main() -> ExitCode {
    // `cargo test --benches` runs it too, and asks only whether it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return ExitCode::SUCCESS;
    }
    let named: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|one| name.contains(one.as_str()));
    // There is one thread yet; what the contenders mount goes with the last of their processes.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    let namespace = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(Failure::from);
    let namespace = namespace.and_then(|()| Ok(rustix::mount::mount_change("/", private)?));
    match namespace.and_then(|()| bench(&wanted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark could not run: {error}");
            ExitCode::FAILURE
        }
    }
}
