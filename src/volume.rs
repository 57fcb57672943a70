//! A registered volume, and the store that holds its snapshots.

use fsnap_backend::Identity;
use serde::{Deserialize, Serialize};

use crate::checkpoint::PathText;
use crate::name::Name;

/// A directory that `fsnap init` put under fsnap's care.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredVolume {
    /// Its name.
    pub name: Name,
    /// Where its files are.
    pub path: PathText,
    /// What it was when it was registered: a tree that was made again under the same path is refused.
    pub identity: Identity,
    /// The store that holds its snapshots.
    pub store: Identity,
}

/// A store that fsnap keeps snapshots in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRecord {
    /// What it is: compared whenever it is opened.
    pub identity: Identity,
    /// The backend's name.
    pub backend: String,
    /// Where it is, in the backend's own words.
    pub place: PathText,
}
