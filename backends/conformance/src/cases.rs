//! One case per rule of the contract.

mod activate;
mod adopt;
mod clone;
mod delete;
mod differences;
mod history;
mod list;
mod reserve;
mod settle;
mod snapshot;
mod store;
mod verify;

use crate::failure::Verdict;
use crate::view::is_root;
use crate::{Fixture, Site};

/// The case of one rule.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// The rule's name in the contract.
    pub name: &'static str,
    /// Why the case says nothing about this fixture, if so.
    pub ignored: fn(&dyn Fixture) -> Option<&'static str>,
    /// Runs it on a fresh store.
    pub run: fn(&mut Site<'_>) -> Verdict,
}

macro_rules! case {
    ($module:ident::$name:ident) => {
        case!($module::$name, needs always)
    };
    ($module:ident::$name:ident, needs $need:ident) => {
        Case { name: stringify!($name), ignored: $need, run: $module::$name }
    };
}

/// Every rule, in the order of the contract.
pub const CASES: &[Case] = &[
    case!(store::store_is_stable),
    case!(adopt::adopt_identifies),
    case!(adopt::adopt_refuses_symlinks),
    case!(adopt::adopt_missing),
    case!(reserve::reserve_is_new),
    case!(reserve::reserve_shows_nothing),
    case!(snapshot::prime_is_optional),
    case!(snapshot::prime_fixes_nothing),
    case!(snapshot::snapshot_is_complete),
    case!(snapshot::snapshot_has_fresh_writes),
    case!(snapshot::snapshot_is_independent),
    case!(snapshot::snapshot_omits_aloud, needs unkeepable),
    case!(snapshot::snapshot_repeats),
    case!(snapshot::snapshot_refuses_another_volume),
    case!(settle::settle_returns_the_snapshot),
    case!(settle::settle_refuses_partial),
    case!(clone::clone_is_equal, needs clones),
    case!(clone::clone_is_isolated, needs clones),
    case!(clone::clone_outlives_its_snapshot, needs clones),
    case!(clone::clone_can_be_snapshotted, needs clones),
    case!(clone::clone_checks_identity, needs clones),
    case!(clone::clone_needs_the_capability, needs no_clones),
    case!(list::list_is_complete),
    case!(list::list_survives_reopening),
    case!(activate::activate_refuses_writes),
    case!(activate::activate_missing),
    case!(activate::deactivate_is_idempotent),
    case!(verify::verify_passes_whole_images),
    case!(verify::verify_names_damage, needs damage),
    case!(history::history_is_in_order, needs history),
    case!(history::history_needs_a_keeper, needs no_history),
    case!(history::pin_is_of_that_state, needs history),
    case!(history::pin_repeats, needs history),
    case!(history::pin_is_counted, needs history),
    case!(history::pin_missing, needs history),
    case!(differences::differences_miss_nothing, needs differences),
    case!(delete::delete_is_idempotent),
    case!(delete::delete_leaves_relatives),
    case!(delete::delete_frees_the_locator),
    case!(delete::delete_touches_only_its_own),
];

fn always(_: &dyn Fixture) -> Option<&'static str> {
    None
}

fn clones(fixture: &dyn Fixture) -> Option<&'static str> {
    (!fixture.capabilities().clones).then_some("the store cannot clone")
}

fn no_clones(fixture: &dyn Fixture) -> Option<&'static str> {
    fixture.capabilities().clones.then_some("the store can clone")
}

fn history(fixture: &dyn Fixture) -> Option<&'static str> {
    (!fixture.keeps_history()).then_some("the file system keeps no states by itself")
}

fn no_history(fixture: &dyn Fixture) -> Option<&'static str> {
    fixture.keeps_history().then_some("the file system keeps states by itself")
}

fn differences(fixture: &dyn Fixture) -> Option<&'static str> {
    (!fixture.tells_differences()).then_some("the store does not know where two states differ")
}

fn damage(fixture: &dyn Fixture) -> Option<&'static str> {
    if !fixture.capabilities().verifies_contents {
        return Some("the store does not verify contents");
    }
    fixture.damage().is_none().then_some("the fixture has no way to damage a content")
}

fn unkeepable(fixture: &dyn Fixture) -> Option<&'static str> {
    let device = !fixture.capabilities().ownership && is_root();
    (fixture.unkeepable().is_none() && !device).then_some("nothing is known that a snapshot cannot keep")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::CASES;

    /// The names that stand in backticks at the beginning of the list items of the contract.
    fn rules() -> Vec<&'static str> {
        include_str!("../../api/src/backend.rs")
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("/// * `")?.split_once("`: ").map(|(name, _)| name))
            .collect()
    }

    #[test]
    fn every_rule_has_a_case_and_every_case_a_rule() {
        let cases: Vec<_> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(rules(), cases);
        assert_eq!(cases.iter().collect::<BTreeSet<_>>().len(), cases.len(), "a name is used twice");
    }
}
