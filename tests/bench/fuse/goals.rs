//! What there is to reach, and whether it was.

use crate::Costs;
use crate::contender::Kind;
use crate::measure::{head, row};
use crate::work::Cost;

/// By what a work is measured.
type By = fn(&Cost, &Cost) -> f64;

/// A work, the first or the second time, of whom, by what, compared with whom, and at most how many times that.
type Goal = (&'static str, usize, Kind, By, Kind, f64);

const GOALS: &[Goal] = &[
    ("sequential read", 0, Kind::Mount, Cost::wall, Kind::Native, 1.05),
    ("sequential read", 0, Kind::Attached, Cost::wall, Kind::Native, 1.05),
    ("sequential read", 0, Kind::Mount, Cost::wall, Kind::Snapshot, 1.05),
    ("sequential read", 0, Kind::Attached, Cost::wall, Kind::Snapshot, 1.05),
    ("sequential read", 0, Kind::Overlay, Cost::wall, Kind::Native, 1.05),
    ("random 4 KiB reads", 0, Kind::Mount, Cost::wall, Kind::Native, 1.1),
    ("random 4 KiB reads", 0, Kind::Attached, Cost::wall, Kind::Native, 1.1),
    ("random 4 KiB reads", 0, Kind::Mount, Cost::wall, Kind::Snapshot, 1.1),
    ("random 4 KiB reads", 0, Kind::Attached, Cost::wall, Kind::Snapshot, 1.1),
    ("random 4 KiB reads", 0, Kind::Overlay, Cost::wall, Kind::Native, 1.1),
    ("walk", 0, Kind::Mount, Cost::cpu, Kind::Native, 3.3),
    ("walk", 0, Kind::Overlay, Cost::cpu, Kind::Native, 3.3),
    ("walk", 0, Kind::Attached, Cost::cpu, Kind::Native, 3.3),
    ("walk", 0, Kind::Mount, Cost::wall, Kind::Overlayfs, 1.5),
    ("walk", 0, Kind::Attached, Cost::wall, Kind::Overlayfs, 1.5),
    ("walk", 0, Kind::Overlay, Cost::wall, Kind::Overlayfs, 1.5),
    ("walk", 1, Kind::Mount, Cost::cpu, Kind::Native, 1.4),
    ("walk", 1, Kind::Attached, Cost::cpu, Kind::Native, 1.4),
    ("walk", 1, Kind::Overlay, Cost::cpu, Kind::Native, 1.4),
    ("tar of small files", 0, Kind::Mount, Cost::cpu, Kind::Native, 3.0),
    ("tar of small files", 1, Kind::Mount, Cost::cpu, Kind::Native, 1.25),
    ("tar of small files", 0, Kind::Attached, Cost::cpu, Kind::Native, 3.0),
    ("tar of small files", 1, Kind::Attached, Cost::cpu, Kind::Native, 1.25),
    ("tar of small files", 1, Kind::Mount, Cost::cpu, Kind::Snapshot, 1.25),
    ("tar of small files", 1, Kind::Attached, Cost::cpu, Kind::Snapshot, 1.25),
    ("tar of small files", 0, Kind::Overlay, Cost::cpu, Kind::Native, 3.0),
    ("tar of small files", 1, Kind::Overlay, Cost::cpu, Kind::Native, 1.5),
    ("tar of small files", 0, Kind::Mount, Cost::wall, Kind::FuseOverlayfs, 1.0),
    ("tar of small files", 0, Kind::Overlay, Cost::wall, Kind::FuseOverlayfs, 1.0),
    ("sequential write", 0, Kind::Overlay, Cost::wall, Kind::Native, 1.1),
    ("sequential write", 0, Kind::Overlay, Cost::wall, Kind::FuseOverlayfs, 1.0),
    ("creation of small files", 0, Kind::Overlay, Cost::wall, Kind::Overlayfs, 3.0),
    ("creation of small files", 0, Kind::Overlay, Cost::wall, Kind::FuseOverlayfs, 1.0),
];

pub fn print(costs: &Costs) {
    head("goals", &["", "whose", "compared with", "ratio", "goal"]);
    for &(work, time, whose, by, with, most) in GOALS {
        let (Some(ours), Some(other)) = (costs.get(&(work, whose)), costs.get(&(work, with))) else { continue };
        let ratio = by(&ours[time], &other[time]);
        let of = if std::ptr::fn_addr_eq(by, Cost::wall as By) { "clock" } else { "processors" };
        row(&[
            format!("{work}{}, {of}", if time == 0 { "" } else { " again" }),
            whose.name().into(),
            with.name().into(),
            format!("{ratio:.2} x"),
            format!("<= {most} x: {}", if ratio <= most { "met" } else { "missed" }),
        ]);
    }
}
