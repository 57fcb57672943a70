//! `fsnap branch CKPT --run`: live copies of a run.

use std::ffi::OsString;

use fsnap::checkpoint::Checkpoint;
use fsnap::coordinator::{Coordinator, RestoreRequest};
use fsnap::engine::{Images, PidSpace};
use fsnap::name::Name;
use fsnap::run::{RESTORE_ARGS, RunRecord, Runs};
use fsnap::Error;
use serde_json::json;

use super::{Context, Failure, Outcome, Output, environment, internal, json};

/// Restores `count` copies, each onto a branch of its own and under its name, and prints the names.
///
/// When one cannot be made, those before it go on, and are told.
pub(crate) fn run(
    context: &Context,
    coordinator: &Coordinator,
    checkpoint: &Checkpoint,
    name: Option<Name>,
    (count, as_json, args): (u32, bool, &[OsString]),
) -> Outcome {
    let engine = checkpoint.engine.as_ref().ok_or(Error::NoProcessImage { id: checkpoint.id })?;
    let images = Images::open(engine.images.as_path()).map_err(Error::from)?;
    let original = RunRecord::of_images(&images)?.ok_or(Error::NotOfARun { id: checkpoint.id })?;
    let out = Output::new();
    let mut made = Vec::new();
    for number in 1..=count {
        let name = match &name {
            Some(name) if count == 1 => name.clone(),
            Some(name) => format!("{name}-{number}").parse::<Name>().map_err(Error::from)?,
            None => super::branch::free_name(coordinator, &checkpoint.id)?,
        };
        let copy = one(context, coordinator, checkpoint, &original, name, args)?;
        match as_json {
            true => made.push(copy),
            false => out.line(copy["name"].as_str().unwrap_or_default())?,
        }
    }
    if as_json { out.json(&made) } else { Ok(()) }
}

fn one(
    context: &Context,
    coordinator: &Coordinator,
    checkpoint: &Checkpoint,
    original: &RunRecord,
    name: Name,
    args: &[OsString],
) -> Result<serde_json::Value, Failure> {
    let runs = Runs::of(&context.state);
    let mut record = RunRecord::new(
        name.clone(),
        original.command.clone(),
        original.confinement.clone(),
        original.volumes.clone(),
    );
    record.checkpoint = Some(checkpoint.id);
    record.branch = Some(name.clone());
    let mut engine_args: Vec<OsString> = RESTORE_ARGS.map(OsString::from).to_vec();
    engine_args.extend_from_slice(args);
    let place = runs.create(&record)?;
    let restored = coordinator.restore(&RestoreRequest {
        checkpoint,
        branch: &name,
        criu: &environment::find_criu(&context.config)?,
        args: &engine_args,
        stage: &internal::stage_command(),
        pids: PidSpace::New,
        run: Some((&record, place.path())),
    });
    match restored {
        Ok((branch, restored)) => {
            place.started(restored.root)?;
            let mut object = json::branch(&branch);
            object["init"] = json!(restored.init.pid);
            object["pid"] = json!(restored.root.map(|root| root.pid));
            Ok(object)
        }
        Err(error) => Err(error.and_undo(place.discard()).into()),
    }
}
