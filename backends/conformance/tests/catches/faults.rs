//! The faults, and what must catch them.

use fsnap_backend::Capabilities;

use crate::copy_store::CAPABILITIES;

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident: $($trial:literal says $text:literal),+;)+) => {
        /// One thing that a backend can do wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Fault {
            $($(#[$doc])* $fault,)+
        }

        impl Fault {
            pub(crate) const ALL: &[Self] = &[$(Self::$fault),+];

            pub(crate) fn name(self) -> &'static str {
                match self {
                    $(Self::$fault => stringify!($fault),)+
                }
            }

            /// The trials that must fail with this fault, and a part of what they must say.
            pub(crate) fn caught_by(self) -> &'static [(&'static str, &'static str)] {
                match self {
                    $(Self::$fault => &[$(($trial, $text)),+],)+
                }
            }
        }
    };
}

faults! {
    /// The store's identity is made anew at each opening.
    NewIdentityEachTime: "store_is_stable" says "opened again";
    /// Every store has the same identity.
    OneIdentityForAll: "store_is_stable" says "two stores";
    /// A capability that the fixture does not pin.
    ClaimsMore: "capabilities_are_pinned" says "constant_time_clones: true";
    /// The fixture pins no ignored case.
    PinsNothing: "ignored_cases_are_pinned" says "the fixture pins []";

    /// A volume is its path.
    IdentifiesByPath: "adopt_identifies" says "removed and made again";
    /// A volume is the time of its last change.
    IdentifiesByTime: "adopt_identifies" says "the same tree was";
    /// A symbolic link to a volume is one.
    AdoptsThroughLinks: "adopt_refuses_symlinks" says "symbolic link to a volume";
    /// A missing directory is made.
    AdoptsWhatIsMissing: "adopt_missing" says "adopt of nothing";
    /// The directory of a clone is no volume.
    RefusesClones: "clone_can_be_snapshotted" says "it lies in the store";

    /// A call fails while another thread is in it.
    OneThreadOnly: "threads" says "is in use";

    /// A lock is given up by closing its descriptor, of which a child may have a copy.
    LocksUntilClosed: "beside_forks" says "is in use";

    /// What the caller has recorded is not heeded.
    ReservesAgain: "reserve_is_new" says "is in `known`";
    /// The image is made at once.
    ReservesByMaking: "reserve_shows_nothing" says "appear";

    /// Without prime, something is missing.
    NeedsPrime: "prime_is_optional" says "a snapshot without prime";
    /// What was written after prime is not in the snapshot.
    FixesAtPrime: "prime_fixes_nothing" says "changed after prime", "histories" says " differs in ";
    /// Prime makes the snapshot.
    PrimeIsEnough: "prime_is_optional" says "prime alone", "killed_prime" says "prime made a whole image";

    ForgetsXattrs: "snapshot_is_complete" says "/attributes: xattr user.of-a-directory should be Some(\"d\"), is None";
    ForgetsAcls: "snapshot_is_complete" says "xattr system.posix_acl_access";
    RoundsTimes: "snapshot_is_complete" says "mtime should be";
    SplitsHardLinks: "snapshot_is_complete" says "number of names should be 3";
    FillsHoles: "snapshot_is_complete" says "holes were filled";
    CutsTrailingHoles: "snapshot_is_complete" says "size should be 10485760, is 0";
    DropsFifos: "snapshot_is_complete" says "/links/fifo: is missing";
    FollowsLinks: "snapshot_is_complete" says "kind should be Symlink, is File";
    DropsOddNames: "snapshot_is_complete" says "not UTF-8 \\xc3: is missing";
    DropsSetId: "snapshot_is_complete" says "mode should be 4755, is 0755";
    OwnsEverything: "snapshot_is_complete" says "owner should be (1000, 1001), is (0, 0)";
    MistakesDevices: "snapshot_is_complete" says "device should be 0";
    /// Files of the same size are thought to be the same.
    TrustsSizes: "snapshot_has_fresh_writes" says "content differs";
    /// The files of a snapshot are those of the volume.
    SharesInodes: "snapshot_is_independent" says "content differs";
    /// What was left out is not named.
    OmitsSilently: "snapshot_omits_aloud" says "is not among the omissions";
    /// More is left out than is named.
    ForgetsAFileToo: "snapshot_omits_aloud" says "not named among the omissions";
    /// What was left out is named once, and then forgotten.
    SettleForgetsOmissions: "snapshot_omits_aloud" says "settle";
    /// A repeated call fails.
    RefusesToRepeat: "snapshot_repeats" says "exists already";
    /// A repeated call takes another snapshot.
    RepeatsAnew: "snapshot_repeats" says "became";
    /// The volume is whatever lies at its path.
    TakesAnyVolume: "snapshot_refuses_another_volume" says "it succeeded";
    /// The refusal comes after the image was made.
    RefusesTooLate: "snapshot_refuses_another_volume" says "the refused snapshot is there";

    /// Settle knows only what this process has taken.
    SettlesFromMemory: "settle_returns_the_snapshot" says "settle in a store opened again";
    /// Settle takes a partial image for whole.
    SettlesPartial:
        "settle_refuses_partial" says "settle of a partial image",
        "killed_snapshot" says "settle of what is not whole";
    /// Settle takes the mark away for a moment.
    SettlesByRewriting: "killed_settle" says "settle after the kill";

    CloneForgetsTimes: "clone_is_equal" says "mtime should be";
    /// All clones are the same directory.
    ClonesAreOne: "clone_is_isolated" says "another clone after the first was written to";
    /// Deleting a snapshot deletes its clones.
    DeleteTakesClones: "clone_outlives_its_snapshot" says "there should be";
    /// Whatever lies at the snapshot's locator is cloned.
    ClonesWithoutLooking: "clone_checks_identity" says "it succeeded";
    /// The capability says no, the call says yes.
    ClonesAnyway: "clone_needs_the_capability" says "it succeeded";
    /// A clone is marked as whole before it is.
    ClonesMarkTooEarly: "killed_clone" says "the clone differs";

    ListsNoClones: "list_is_complete" says "there should be";
    ListsTwice: "list_is_complete" says "listed twice";
    /// List knows only what this process has taken.
    ListsFromMemory: "list_survives_reopening" says "opened again";

    ActivatesWritable: "activate_refuses_writes" says "is not read-only";
    /// There is a recipe for what does not exist.
    ActivatesAnything: "activate_missing" says "it succeeded";
    /// Deactivate needs an activate before it.
    DeactivatesOnce: "deactivate_is_idempotent" says "does not exist";

    SeesGhosts: "verify_passes_whole_images" says "ghost";
    VerifiesNothing: "verify_names_damage" says "verify found []";
    NamesNoFile: "verify_names_damage" says "path: \"\"";

    /// The last state comes first.
    HistoryFallsBack: "history_is_in_order" says "do not rise";
    /// The present is taken for a past state where none are kept.
    PinsWithoutHistory: "history_needs_a_keeper" says "pin: expected Unsupported, but it succeeded";
    /// The present is taken for every past state.
    PinsThePresent: "pin_is_of_that_state" says "a pinned state";
    /// A repeated pin fails.
    PinsOnce: "pin_repeats" says "exists already";
    /// Deleting one snapshot of a state deletes all.
    UnpinsAll: "pin_is_counted" says "there should be";
    /// For a state that is gone, another one is taken.
    PinsTheLast: "pin_missing" says "it succeeded";
    /// Only the first difference is told.
    TellsOneDifference: "differences_miss_nothing" says "is in no range";

    /// Deleting nothing fails.
    DeletesOnce: "delete_is_idempotent" says "only reserved";
    /// Older snapshots go too.
    DeletesOlder: "delete_leaves_relatives" says "does not exist", "histories" says "there should be";
    /// What was deleted is no longer whole, and stays.
    DeletesTheMarkOnly: "delete_frees_the_locator" says "still listed";
    /// A locator is taken for the name of a file.
    DeletesWhatItIsTold: "delete_touches_only_its_own" says "it succeeded";

    /// A snapshot is marked as whole before it is.
    MarksTooEarly: "killed_snapshot" says "the snapshot that is listed as whole";
    /// A partial image cannot be finished.
    RefusesToFinish: "killed_snapshot" says "exists already";
    /// Deleting a partial image leaves something.
    LeavesScraps: "kills_leave_nothing" says "the store has";
    /// Different trees share a token.
    OneTokenForAll: "histories" says "shares its token";
    /// The files go while the image is still marked as whole.
    DeletesFilesFirst: "killed_delete" says "listed as whole";
}

impl Fault {
    /// The capabilities of the store that has the fault: some faults need something that it cannot do.
    pub(crate) fn capabilities(self) -> Capabilities {
        match self {
            Self::OmitsSilently | Self::SettleForgetsOmissions => Capabilities { ownership: false, ..CAPABILITIES },
            Self::ClonesAnyway | Self::PinsWithoutHistory => Capabilities { clones: false, ..CAPABILITIES },
            _ => CAPABILITIES,
        }
    }
}
