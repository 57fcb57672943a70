//! What thin pools there are: those that fsnap made, up or not, and those that somebody else did.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use fsnap_backend::{IoContext, Result, beneath};

use crate::bring_up::{self, PoolVolume};
use crate::dm::{By, Mapper};
use crate::pool::{Fill, Limits, Pool};
use crate::store::{FILE, Settings, VOLUMES, open_root};

/// A thin pool, and what is known of it without changing anything.
#[derive(Debug)]
pub struct PoolState {
    /// What device-mapper calls it.
    pub name: String,
    /// Where its store lies, if there is one at the usual place.
    pub place: Option<PathBuf>,
    /// fsnap made it, and can bring it up and remove it.
    pub made_here: bool,
    /// Why it is not for fsnap, if others manage it.
    pub not_for_us: Option<&'static str>,
    /// How full it is; `None` if it is not up.
    pub fill: Option<Fill>,
    /// The bytes of one of its data blocks; 0 if it is not up.
    pub block: u64,
    /// How much must be free before an image is made, as its store says.
    pub limits: Option<Limits>,
    /// The volumes that fsnap made in it, by name.
    pub volumes: Vec<(String, PoolVolume)>,
    /// Why its store cannot be used, if it cannot.
    pub trouble: Option<String>,
}

impl PoolState {
    fn unknown(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            place: None,
            made_here: false,
            not_for_us: None,
            fill: None,
            block: 0,
            limits: None,
            volumes: Vec::new(),
            trouble: None,
        }
    }

    /// The node of the device of one of its volumes.
    pub fn volume_node(&self, volume: &str) -> Result<Option<PathBuf>> {
        let device = Mapper::open()?.find(By::Name(&bring_up::volume_device(&self.name, volume)))?;
        Ok(device.filter(|device| device.active).map(|device| device.number.named_node(&device.name)))
    }
}

/// Looks for pools: those of device-mapper, and those that have a store in the directory `stores` and are not up.
///
/// Brings nothing up. Sorted by name.
pub fn survey(stores: &Path) -> Result<Vec<PoolState>> {
    let mapper = Mapper::open()?;
    let mut found = BTreeMap::new();
    for name in mapper.names()? {
        // Any may be gone since it was listed.
        let Some(pool) = Pool::named(&mapper, &name)? else { continue };
        let mut state = PoolState::unknown(&name);
        state.not_for_us = pool.owner();
        state.fill = Some(pool.fill(&mapper, false)?);
        state.block = pool.block(&mapper)?;
        found.insert(name, state);
    }
    for (place, settings) in places(stores)? {
        match settings {
            Ok((settings, volumes)) => {
                let state = found.entry(settings.pool.clone());
                let state = state.or_insert_with(|| PoolState::unknown(&settings.pool));
                state.place = Some(place);
                state.made_here = settings.backing.is_some();
                state.limits = Some(settings.limits);
                state.volumes = volumes;
            }
            Err(error) => {
                let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let state = found.entry(name.clone()).or_insert_with(|| PoolState::unknown(&name));
                state.place = Some(place);
                state.trouble = Some(error.to_string());
            }
        }
    }
    Ok(found.into_values().collect())
}

pub(crate) type Known = Result<(Settings, Vec<(String, PoolVolume)>)>;

/// The stores in a directory, and what each says.
pub(crate) fn places(stores: &Path) -> Result<Vec<(PathBuf, Known)>> {
    let dir = match beneath::open_root(stores) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        dir => dir.context("open", stores)?,
    };
    let mut found = Vec::new();
    for name in beneath::names(&dir).context("list", stores)? {
        let place = stores.join(&name);
        if !place.join(FILE).exists() {
            continue;
        }
        let read = || {
            let (root, settings) = open_root(&place)?;
            let dir = beneath::open_dir(&root, OsStr::new(VOLUMES)).context("open", place.join(VOLUMES))?;
            Ok((settings, bring_up::volumes(&dir, &place)?))
        };
        let known = read();
        found.push((place, known));
    }
    Ok(found)
}
