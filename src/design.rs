//! Decisions, one page each: what was chosen, why, and what was turned down.
//!
//! A page is written when the choice is made and changed when the choice is; the code says *what*, the page says *why*.

macro_rules! page {
    ($name:ident, $file:literal) => {
        #[doc = include_str!(concat!("design/", $file))]
        pub mod $name {}
    };
}

page!(priorities, "priorities.md");
page!(contract, "contract.md");
page!(frozen_window, "frozen-window.md");
page!(which_volumes, "which-volumes.md");
page!(consistency, "consistency.md");
page!(processes, "processes.md");
page!(unlinked_files, "unlinked-files.md");
page!(generic_door, "generic-door.md");
page!(freezing, "freezing.md");
page!(catalog, "catalog.md");
page!(thin_pools, "thin-pools.md");
page!(nilfs2_locators, "nilfs2-locators.md");
page!(overlay_branches, "overlay-branches.md");
page!(rsync_deltas, "rsync-deltas.md");
page!(rsync_sums, "rsync-sums.md");
page!(identity, "identity.md");
page!(restore, "restore.md");
page!(packages, "packages.md");
page!(overlay_format, "overlay-format.md");
page!(browsing, "browsing.md");
page!(fuse_costs, "fuse-costs.md");
page!(layers, "layers.md");
page!(semantics, "semantics.md");
page!(runs, "runs.md");
page!(containers, "containers.md");
