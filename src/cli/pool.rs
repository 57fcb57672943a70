//! `fsnap pool`

use std::path::{Path, PathBuf};

use fsnap::stores::pools::{FileSystem, Fill, Mode, Plan, PoolState, STORES, Store, survey};
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, Output, json};

/// Make, list, enlarge and remove thin pools of device-mapper, for those who have none
///
/// A pool holds volumes, file systems on thin devices, and all snapshots and branches of them, which share every block
/// that does not differ. Pools that LVM or Stratis manage are listed, and never changed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a pool on a block device, or in sparse files in a directory
    Create {
        /// An empty block device, or a directory for the files
        #[arg(value_name = "DIR|DEVICE")]
        on: PathBuf,
        /// What device-mapper is to call it
        #[arg(long, default_value = "fsnap")]
        name: String,
        /// The room for data in it, such as 20G; all of a device, if not given
        #[arg(long, value_parser = bytes)]
        size: Option<u64>,
    },
    /// List the pools of this machine: how full each is, and the volumes that fsnap made in it
    List {
        /// Print an array of JSON objects
        #[arg(long)]
        json: bool,
    },
    /// Enlarge a pool that fsnap made, while it is in use
    ///
    /// A pool of files takes `--size`; one on a block device takes up what was added to the device. The volumes in the pool stay as
    /// large as they are.
    Grow {
        /// The pool
        pool: String,
        /// The room for data that it is to have, such as 200G; without it, all of what it stands on
        #[arg(long, value_parser = bytes)]
        size: Option<u64>,
        /// The room for metadata that a pool of files is to have, such as 1G, where the data need no more than before
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        metadata_size: Option<u64>,
    },
    /// Make a volume in a pool that fsnap made, with a file system on it, and print its device, which is to be mounted
    AddVolume {
        /// The pool
        pool: String,
        /// The volume's name
        volume: String,
        /// Its size, such as 5G; it takes room in the pool only where it is written
        #[arg(long, value_parser = bytes)]
        size: u64,
        /// The file system on it
        #[arg(long, default_value = "ext4", value_parser = ["ext4", "xfs"])]
        file_system: String,
    },
    /// Remove a volume that fsnap made, and all its files; its snapshots stay
    RemoveVolume {
        /// The pool
        pool: String,
        /// The volume's name
        volume: String,
    },
    /// Bring up the pools that fsnap made, and their volumes, as after a start of the machine
    ///
    /// Every command that needs a pool does so by itself; this one is for whatever mounts the volumes.
    Start {
        /// Only these
        #[arg(value_name = "POOL")]
        pools: Vec<String>,
    },
    /// Take a pool down until it is needed again; refused while anything in it is in use
    Stop {
        /// The pool
        pool: String,
    },
    /// Remove a pool that fsnap made, and what it stands on; refused while anything is in it
    Remove {
        /// The pool
        pool: String,
        /// Remove the volumes in it too, and all their files
        #[arg(long)]
        with_volumes: bool,
    },
}

pub(crate) fn run(args: Args) -> Outcome {
    let out = Output::new();
    match args.command {
        Command::Create { on, name, size } => {
            let on = std::path::absolute(&on).map_err(|source| fsnap::Error::Io {
                action: "resolve",
                object: fsnap::printable(on.as_os_str()),
                source,
            })?;
            let store = Store::create_pool(&Plan { place: place(&name), name, on, size })?;
            let fill = store.fill()?;
            out.line(format_args!("pool {}: {} blocks of data are free", store.pool_name(), fill.data.1 - fill.data.0))
        }
        Command::List { json } => list(&out, json),
        Command::Grow { pool, size, metadata_size } => {
            let mut store = open(&pool)?;
            store.grow_pool(size, metadata_size)?;
            let (data, metadata) = room(&store.fill()?, store.block()?);
            out.line(format_args!("pool {pool}: data {data}, metadata {metadata}"))
        }
        Command::AddVolume { pool, volume, size, file_system } => {
            let file_system = if file_system == "xfs" { FileSystem::Xfs } else { FileSystem::Ext4 };
            let node = open(&pool)?.make_volume(&volume, size, file_system)?;
            out.line(fsnap::printable(node.as_os_str()))
        }
        Command::RemoveVolume { pool, volume } => Ok(open(&pool)?.remove_volume(&volume)?),
        Command::Start { pools } => start(&out, &pools),
        Command::Stop { pool } => Ok(open(&pool)?.stop_pool()?),
        Command::Remove { pool, with_volumes } => remove(&pool, with_volumes),
    }
}

/// Opens the store of a pool.
fn open(pool: &str) -> Result<Store, fsnap::Error> {
    open_known(&survey(Path::new(STORES))?, pool)
}

fn open_known(known: &[PoolState], pool: &str) -> Result<Store, fsnap::Error> {
    let stores = known.iter().filter_map(|state| Some((&state.name, state.place.as_ref()?)));
    match stores.clone().find(|(name, _)| *name == pool) {
        Some((_, place)) => Ok(Store::open(place)?),
        None => {
            let near = stores.map(|(name, _)| name.clone()).collect();
            Err(fsnap::Error::NoSuchPool { name: pool.to_owned(), near })
        }
    }
}

/// Where the store of a pool lies.
fn place(pool: &str) -> PathBuf {
    Path::new(STORES).join(pool)
}

fn start(out: &Output, pools: &[String]) -> Outcome {
    let known = survey(Path::new(STORES))?;
    let made_here = known.iter().filter(|state| state.made_here || state.trouble.is_some());
    let wanted: Vec<String> =
        if pools.is_empty() { made_here.map(|state| state.name.clone()).collect() } else { pools.to_vec() };
    let mut failed = Vec::new();
    for pool in wanted {
        match open_known(&known, &pool) {
            Ok(store) => {
                // Also when the pool is up: a killed call may have got no further.
                store.start_volumes()?;
                for (volume, _) in store.volumes()? {
                    let node = store.volume_node(&volume)?;
                    out.line(format_args!("{pool} {volume} {}", fsnap::printable(node.as_os_str())))?;
                }
            }
            Err(error) => failed.push(error),
        }
    }
    fsnap::Error::of_all(failed).map_or(Ok(()), |error| Err(error.into()))
}

fn remove(pool: &str, with_volumes: bool) -> Outcome {
    let store = open(pool)?;
    let busy = |by: String| Failure::from(fsnap_backend::Error::Busy { what: format!("the pool {pool}"), by });
    let context = Context::load()?;
    if context.state.join(fsnap::catalog::format::FILE).exists() {
        let coordinator = context.read()?;
        for volume in coordinator.catalog().volumes()? {
            let record = coordinator.catalog().store(&volume.store)?;
            if record.is_some_and(|record| record.place.as_path() == place(pool)) {
                let how =
                    format!("fsnap takes snapshots of {0} in it; forget it by `fsnap rm --volume {0}`", volume.name);
                return Err(busy(how));
            }
        }
    }
    let volumes = store.volumes()?;
    if !with_volumes && !volumes.is_empty() {
        let names: Vec<_> = volumes.into_iter().map(|(name, _)| name).collect();
        return Err(busy(format!(
            "the volumes {} are in it; `--with-volumes` removes them and all their files",
            names.join(", ")
        )));
    }
    Ok(store.remove_pool()?)
}

fn list(out: &Output, as_json: bool) -> Outcome {
    let pools = survey(Path::new(STORES))?;
    if as_json {
        return out.json(&pools.iter().map(json_of).collect::<Vec<_>>());
    }
    let rows = pools.iter().map(|pool| {
        let volumes: Vec<_> = pool.volumes.iter().map(|(name, _)| name.as_str()).collect();
        let (data, metadata) = pool.fill.map(|fill| room(&fill, pool.block)).unwrap_or_default();
        vec![pool.name.clone(), state(pool), data, metadata, volumes.join(",")]
    });
    out.table(&["POOL", "STATE", "DATA", "METADATA", "VOLUMES"], &rows.collect::<Vec<_>>())
}

/// What a pool can do now, in a word or two.
pub(crate) fn state(pool: &PoolState) -> String {
    let works = match pool.fill {
        None => "down",
        Some(fill) if fill.needs_check => "needs check",
        Some(fill) => match fill.mode {
            Mode::Works => "works",
            Mode::OutOfData => "out of data space",
            Mode::ReadOnly => "read-only",
            Mode::Fails => "fails",
        },
    };
    match (&pool.trouble, pool.not_for_us) {
        (Some(trouble), _) => fsnap::printable(trouble.as_ref()),
        (None, Some(_)) => format!("{works}, managed by others"),
        (None, None) => works.to_owned(),
    }
}

/// How full its data and its metadata are.
pub(crate) fn room(fill: &Fill, block: u64) -> (String, String) {
    let part = |(used, total): (u64, u64), free: u64, block: u64| {
        format!("{} % of {}", 100 - free, indicatif::BinaryBytes(total * block)).replace("100 % of 0 B", "unknown")
            + if used == total && total > 0 { ", full" } else { "" }
    };
    (part(fill.data, fill.free_data(), block), part(fill.metadata, fill.free_metadata(), METADATA_BLOCK))
}

/// The kernel counts metadata in blocks of so many bytes.
const METADATA_BLOCK: u64 = 4096;

fn json_of(pool: &PoolState) -> Value {
    let part = |(used, total): (u64, u64), block: u64| json!({ "used": used * block, "total": total * block });
    let volumes = pool.volumes.iter().map(|(name, volume)| {
        let node = pool.volume_node(name).ok().flatten();
        let object = json!({ "name": name, "bytes": volume.bytes(), "file_system": volume.file_system.name() });
        match node {
            Some(node) => json::with_path(object, "device", &node),
            None => object,
        }
    });
    let object = json!({
        "name": pool.name,
        "up": pool.fill.is_some(),
        "state": state(pool),
        "data": pool.fill.map(|fill| part(fill.data, pool.block)),
        "metadata": pool.fill.map(|fill| part(fill.metadata, METADATA_BLOCK)),
        "made_by_fsnap": pool.made_here,
        "limits": pool.limits.map(|limits| json!({
            "free_data": limits.free_data, "free_metadata": limits.free_metadata
        })),
        "volumes": volumes.collect::<Vec<_>>(),
    });
    match &pool.place {
        Some(place) => json::with_path(object, "store", place),
        None => object,
    }
}

/// Reads a size: a number, and K, M, G or T for powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let unit = |c: char| "KMGT".find(c.to_ascii_uppercase()).map(|power| 10 * (power + 1));
    let (digits, shift) = match text.chars().last().map(|last| (last, unit(last))) {
        Some((last, Some(shift))) => (&text[..text.len() - last.len_utf8()], shift),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "a size is a number with K, M, G or T after it, such as 20G")?;
    let size =
        number.checked_shl(shift as u32).filter(|size| size >> shift == number && (1 << 20..1 << 60).contains(size));
    size.ok_or_else(|| "a size lies between 1M and 1 EiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_not() {
        assert_eq!(bytes("1M"), Ok(1 << 20));
        assert_eq!(bytes("20g"), Ok(20 << 30));
        assert_eq!(bytes("2097152"), Ok(2 << 20));
        for bad in ["", "M", "1", "-1M", "1MB", "1.5G", "99999999999T", "18446744073709551615K", "1é"] {
            assert!(bytes(bad).is_err(), "{bad:?} was taken");
        }
    }
}
