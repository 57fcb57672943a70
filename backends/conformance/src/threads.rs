//! Calls from several threads at once, and beside the start of programs.

use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fsnap_backend::{Backend, ImageKind, Locator, Snapshot, Source};

use crate::failure::{During, Failure, Verdict, ensure};
use crate::{LiveVolume, Site, samples, sys};

const THREADS: usize = 4;

/// How long calls are made beside forks.
const BESIDE_FORKS: Duration = Duration::from_secs(1);

/// Snapshots, clones and removals of several volumes of one store, all at the same time.
///
/// The locators are reserved one after the other: which of them are taken is the caller's record, not the store's.
pub(crate) fn threads(site: &mut Site<'_>) -> Verdict {
    let mut work = Vec::new();
    for number in 0..THREADS {
        let mut live = site.volume(&format!("volume-{number}"))?;
        live.apply(&samples::small())?;
        let first = site.snapshot(&live)?;
        live.apply(&samples::small_changed())?;
        let at = site.reserve(Source::Volume(&live.volume))?;
        let clone = if site.capabilities().clones { Some(site.reserve(Source::Snapshot(&first))?) } else { None };
        work.push((live, first, at, clone));
    }
    let start = Barrier::new(THREADS);
    let store = &*site.store;
    let results: Vec<Verdict> = thread::scope(|scope| {
        let one = |(live, first, at, clone)| {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                at_once(store, live, first, at, clone)
            })
        };
        let running: Vec<_> =
            work.iter().map(|(live, first, at, clone)| one((live, first, at, clone.as_ref()))).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Verdict>| {
            thread.join().unwrap_or_else(|_| Err(Failure::new("panic")))
        };
        running.into_iter().map(join).collect()
    });
    results.into_iter().collect::<Verdict>().during("several threads at once")?;

    let snapshots = work.iter().flat_map(|(_, first, at, _)| [&first.at, at]).map(|at| (at, ImageKind::Snapshot));
    let clones = work.iter().filter_map(|(_, _, _, clone)| Some((clone.as_ref()?, ImageKind::Volume)));
    site.expect_images(snapshots.chain(clones))?;
    for (live, _, at, _) in &work {
        site.expect(at, &live.listing(), "a snapshot that was taken beside others")?;
    }
    Ok(())
}

fn at_once(store: &dyn Backend, live: &LiveVolume, first: &Snapshot, at: &Locator, clone: Option<&Locator>) -> Verdict {
    store.prime(&live.volume, at).during("prime")?;
    let taken = store.snapshot(&live.volume, at).during("snapshot")?;
    let settled = store.settle(at).during("settle")?;
    ensure!(settled == taken, "snapshot returned {taken:?}, settle {settled:?}");
    if let Some(clone) = clone {
        store.clone_snapshot(first, clone).during("clone_snapshot")?;
    }
    // Nothing was made of the second snapshot, so nothing keeps it from going.
    store.delete(at).during("delete")?;
    let again = store.snapshot(&live.volume, at).during("snapshot at a locator that was freed")?;
    ensure!(again.at == *at, "a snapshot at {at} says that it is at {}", again.at);
    Ok(())
}

/// Calls while another thread of this process starts programs.
///
/// Between fork and exec, a child has a copy of every descriptor. A lock of flock(2) that is given up by closing its
/// descriptor is held by the child until then, and a store that finds its own lock taken must not call itself busy:
/// locks are to be given up by unlocking.
pub(crate) fn beside_forks(site: &mut Site<'_>) -> Verdict {
    let mut live = site.volume("volume")?;
    live.apply(&samples::small())?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let forks: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| fork_until(&done))).collect();
        // A fast call meets a fork only now and then: many are made.
        let begun = Instant::now();
        let mut rounds = std::iter::from_fn(|| (begun.elapsed() < BESIDE_FORKS).then_some(()));
        let result = rounds.try_for_each(|()| {
            let snapshot = site.snapshot(&live)?;
            // At once, while a child may still hold what the call before has locked.
            site.snapshot_at(&live.volume, &snapshot.at)?;
            site.store.delete(&snapshot.at).during("delete")?;
            let again = site.snapshot_at(&live.volume, &snapshot.at)?;
            if site.capabilities().clones {
                let clone = site.clone_of(&again)?;
                site.store.delete(&clone).during("delete of a clone")?;
            }
            site.expect(&again.at, &live.listing(), "the snapshot")?;
            site.store.delete(&again.at).during("delete")?;
            site.reopen()
        });
        done.store(true, Ordering::Relaxed);
        let join = |thread: thread::ScopedJoinHandle<'_, Verdict>| {
            thread.join().unwrap_or_else(|_| Err(Failure::new("panic")))
        };
        let forked = forks.into_iter().try_for_each(join);
        forked.and(result)
    })
    .during("while programs were started")
}

/// Starts one program after the other, each of which lingers between fork and exec.
fn fork_until(done: &AtomicBool) -> Verdict {
    while !done.load(Ordering::Relaxed) {
        let child =
            sys::spawn_slowly(&mut Command::new("true"), Duration::from_millis(30)).during("start a program")?;
        child.wait_with_output()?;
    }
    Ok(())
}
