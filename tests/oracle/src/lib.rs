//! A process that knows what its files must hold, and says whether they do.
//!
//! A checkpoint is right when the memory of a process and its files belong to the same instant. The oracle is a process
//! for which that can be decided: its threads, the *writers*, count steps in memory, and each step changes files in
//! one of the ways in which programs change files ([`Kind`]). The bytes that a file must hold follow from the number
//! of steps alone ([`Stream`]), so the comparison is of all bytes, and no copy of them is kept that could be wrong
//! as well.
//!
//! # Why the answer is exact
//!
//! A thread can be frozen anywhere within a step, with its counter one behind its file. But a frozen thread stands
//! between two system calls, and restored it goes on from there. So nothing is compared in the middle: a verdict first
//! lets every writer finish its step, and then memory and files must be *equal*.
//!
//! Steps after a restore could hide the evidence by writing over it. Hence the one rule of all writers: **nothing is
//! overwritten that was not compared with memory just before**. A writer that finds a difference stops for good, leaves
//! the file as it found it, and every verdict from then on names it.
//!
//! Steps go through descriptors and mappings that were opened once; verdicts read the same files by their paths. A
//! restored process whose descriptors lead into the original's files while its paths lead into the branch is found out
//! by the difference.
//!
//! # Asking
//!
//! `SIGUSR1` asks, because a signal needs nothing that a checkpoint would have to carry. The asker writes a *tag* into the
//! file `request` of the report directory, and the verdict appears there as `<tag>.json`, whole or not at all. [`ask()`]
//! does both, and waits. `SIGTERM` ends the process.
//!
//! A tree without its process, such as a snapshot, is judged by [`examine()`]: each file must be what its writer can have
//! left after some number of steps, and the files that are written in a fixed order must agree on that order.
//!
//! # Code map
//!
//! * `process`: the process, its threads and signals; `kind`: the ways to write, and `log`, `slots`, `replace`, `names`, `chain`: one each;
//!   `content`: what a file must hold.
//! * `verdict`: what it says; `fault`: a difference; `examine`: files without their process.
//! * `args`, `start`, `ask`: how it is called, started and asked; [`criu`]: dumps and restores of it; `sys`: calls without a safe wrapper.

mod args;
mod ask;
mod chain;
mod content;
pub mod criu;
mod examine;
mod fault;
mod kind;
mod log;
mod names;
mod process;
mod replace;
mod slots;
mod start;
mod sys;
mod verdict;

pub use args::main;
pub use ask::{AskError, ask};
pub use content::Stream;
pub use examine::examine;
pub use fault::Fault;
pub use kind::Kind;
pub use process::{Plan, run};
pub use start::{StartError, start};
pub use verdict::{Asked, Verdict, WriterVerdict};
