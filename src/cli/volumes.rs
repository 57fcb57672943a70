//! `fsnap volumes`

use fsnap::stores;
use fsnap_backend::Capabilities;
use serde_json::json;

use super::{Context, Outcome, Output, json};

/// List the volumes: name, path, backend, what the backend can do
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print an array of JSON objects
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> Outcome {
    let context = Context::load()?;
    let (coordinator, options) = (context.read()?, context.config.stores());
    let catalog = coordinator.catalog();
    let mut rows = Vec::new();
    for volume in catalog.volumes()? {
        let store = catalog.store(&volume.store)?;
        // A store that is away is said so in the list; the others are listed all the same.
        let opened =
            store.as_ref().map(|record| stores::open(record, &options).map(|backend| backend.store().capabilities));
        rows.push((volume, store, opened));
    }
    let out = Output::new();
    if args.json {
        let list: Vec<_> = rows
            .iter()
            .map(|(volume, store, opened)| {
                let object = json!({
                    "name": volume.name,
                    "backend": store.as_ref().map(|store| &store.backend),
                    "store": store.as_ref().map(|store| store.place.as_path().to_string_lossy()),
                    "capabilities": opened.as_ref().and_then(|opened| opened.as_ref().ok()),
                });
                json::with_path(object, "path", volume.path.as_path())
            })
            .collect();
        return out.json(&list);
    }
    let row =
        |(volume, store, opened): &(_, Option<fsnap::volume::StoreRecord>, Option<fsnap::Result<Capabilities>>)| {
            let volume: &fsnap::volume::RegisteredVolume = volume;
            let can = match opened {
                Some(Ok(capabilities)) => words(capabilities),
                Some(Err(error)) => error.to_string(),
                None => "its store is not in the catalog".into(),
            };
            let backend = store.as_ref().map_or("?", |store| &store.backend);
            vec![volume.name.to_string(), volume.path.to_string(), backend.to_owned(), can]
        };
    out.table(&["NAME", "PATH", "BACKEND", "CAPABILITIES"], &rows.iter().map(row).collect::<Vec<_>>())
}

fn words(can: &Capabilities) -> String {
    let clones = if can.constant_time_clones { "instant branches" } else { "branches" };
    let words = [
        (can.clones, clones),
        (can.xattrs, "xattrs"),
        (can.acls, "acls"),
        (can.ownership, "owners"),
        (can.verifies_contents, "checksums"),
    ];
    words.into_iter().filter(|(has, _)| *has).map(|(_, word)| word).collect::<Vec<_>>().join(", ")
}
