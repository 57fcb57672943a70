//! The devices that fsnap has made for a thin pool, and their end: nothing of a test stays, however it ends.
#![allow(dead_code, reason = "every test uses another part of it")]

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A device of device-mapper.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// What it is, by its UUID: `pool`, `volume-…`, `s-…` for a snapshot, `v-…` for a clone, or what the pool lies on.
    pub(crate) what: String,
    pub(crate) suspended: bool,
}

/// The devices of the store at `place`: images, volumes, and the pool if fsnap made it, with what it lies on; the upper before the lower.
///
/// Each of them has the store's identity in its UUID, by which they are told from those of other pools. A table tells less: a
/// device that was loaded and never resumed shows none, and holds the pool all the same.
pub(crate) fn devices(place: &Path) -> Vec<Device> {
    let settings = fs::read(place.join("fsnap-store")).ok();
    let settings = settings.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    // Without a store, or with one whose making was cut short, there are none.
    let Some(store) = settings.as_ref().and_then(|settings| settings["uuid"].as_str()) else { return Vec::new() };
    let columns = ["info", "-c", "--noheadings", "--separator", " ", "-o", "suspended,name,uuid"];
    let listed = Command::new("dmsetup").args(columns).output().expect("run dmsetup");
    let (pool, others) = (format!("FSNAP-POOL-{store}"), format!("FSNAP-{store}-"));
    let device = |line: &str| {
        let [suspended, name, uuid] = line.splitn(3, ' ').collect::<Vec<_>>().try_into().ok()?;
        let what = if uuid == pool { "pool" } else { uuid.strip_prefix(&others)? };
        Some(Device { name: name.into(), what: what.into(), suspended: suspended == "Suspended" })
    };
    let mut found: Vec<_> = String::from_utf8_lossy(&listed.stdout).lines().filter_map(device).collect();
    found.sort_by_key(|Device { what, .. }| match what.split('-').next() {
        Some("s" | "v" | "volume" | "sign") => 0,
        Some("pool" | "trial") => 1,
        _ => 2,
    });
    found
}

/// Removes the devices of the store at `place`, whoever uses them.
pub(crate) fn remove_devices(place: &Path) {
    for Device { name, .. } in devices(place) {
        let _ = Command::new("dmsetup").args(["resume", &name]).output();
        let _ = Command::new("dmsetup").args(["remove", "--force", "--retry", &name]).output();
    }
}
