//! Reading and changing records; each change is one transaction.

use std::collections::BTreeMap;

use fsnap_backend::{Identity, Locator};
use rusqlite::{OptionalExtension, Params, Row, Transaction, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Catalog, Doomed, Error, ImageRef, Intent, IntentId, IntentLock, Result, RoomRef, format};
use crate::branch::Branch;
use crate::checkpoint::{Checkpoint, CheckpointId, PathText};
use crate::name::Name;
use crate::processes::TreeRecord;
use crate::volume::{RegisteredVolume, StoreRecord};

pub(super) fn digest(body: &str) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(body.as_bytes()).as_bytes()[..16]);
    short
}

/// A record as it is stored: its JSON and the digest of that.
type Encoded = (String, [u8; 16]);

pub(super) fn encode<T: Serialize>(record: &T) -> Encoded {
    let body = serde_json::to_string(record).expect("a record has string keys and no failing serializer");
    let digest = digest(&body);
    (body, digest)
}

/// The columns `body` and `digest` of a row.
type Stored = (String, Vec<u8>);

fn stored(row: &Row<'_>) -> rusqlite::Result<Stored> {
    Ok((row.get("body")?, row.get("digest")?))
}

/// Who needs an image, as the column `holder` says it.
enum Holder<'a> {
    Checkpoint(&'a CheckpointId),
    Branch(&'a Name),
    Intent(IntentId),
}

impl std::fmt::Display for Holder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Checkpoint(id) => write!(f, "checkpoint {id}"),
            Self::Branch(name) => write!(f, "branch {name}"),
            Self::Intent(id) => write!(f, "intent {id}"),
        }
    }
}

/// The branches of which something has to be mounted, by their index where there is one.
///
/// Only a hint, so that the others need not be read: names in a body may look like it.
const TO_MOUNT: &str = "SELECT body, digest FROM branch \
                        WHERE instr(body, '\"overlay\"') OR instr(body, '\"home\"') ORDER BY seq";

/// What came of a request to remove a record.
#[derive(Debug)]
pub enum Removal {
    /// Nothing by that name is recorded.
    Missing,
    /// The record stays: these branches grew from it.
    Needed(Vec<Name>),
    /// The record is gone, and the images that nothing else holds are the intent's to delete.
    Begun(IntentId, IntentLock, Doomed),
}

impl Catalog {
    fn decode<T: DeserializeOwned>(&self, what: &str, (body, found): Stored) -> Result<T> {
        if found != digest(&body) {
            return Err(self.damaged(format!("the record of {what} does not match its digest")));
        }
        serde_json::from_str(&body)
            .map_err(|error| self.damaged(format!("the record of {what} cannot be read: {error}")))
    }

    pub(super) fn one<T: DeserializeOwned>(&self, what: &str, query: &str, key: impl Params) -> Result<Option<T>> {
        let mut statement = self.db.prepare_cached(query).map_err(|e| self.failed(e))?;
        let row = statement.query_row(key, stored).optional().map_err(|e| self.failed(e))?;
        row.map(|row| self.decode(what, row)).transpose()
    }

    fn all<T: DeserializeOwned>(&self, what: &str, query: &str, key: impl Params) -> Result<Vec<T>> {
        self.each(what, query, key, |record| record)
    }

    /// What `told` makes of each record: so that of a record that is read for a line of a list, only the line is kept.
    fn each<T: DeserializeOwned, U>(
        &self,
        what: &str,
        query: &str,
        key: impl Params,
        mut told: impl FnMut(T) -> U,
    ) -> Result<Vec<U>> {
        let mut statement = self.db.prepare_cached(query).map_err(|e| self.failed(e))?;
        let rows = statement.query_map(key, stored).map_err(|e| self.failed(e))?;
        rows.map(|row| Ok(told(self.decode(what, row.map_err(|e| self.failed(e))?)?))).collect()
    }

    fn column<T: std::str::FromStr>(&self, query: &str, key: impl Params) -> Result<Vec<T>> {
        let mut statement = self.db.prepare_cached(query).map_err(|e| self.failed(e))?;
        let rows = statement.query_map(key, |row| row.get::<_, String>(0)).map_err(|e| self.failed(e))?;
        rows.map(|row| {
            let text = row.map_err(|e| self.failed(e))?;
            text.parse().map_err(|_| self.damaged(format!("{text:?} stands where a name belongs")))
        })
        .collect()
    }

    /// Every registered volume, by name.
    pub fn volumes(&self) -> Result<Vec<RegisteredVolume>> {
        self.all("a volume", "SELECT body, digest FROM volume ORDER BY name", [])
    }

    /// The volume of that name.
    pub fn volume(&self, name: &Name) -> Result<Option<RegisteredVolume>> {
        let query = "SELECT body, digest FROM volume WHERE name = ?1";
        self.one(&format!("volume {name}"), query, [name.as_str()])
    }

    /// Every store.
    pub fn stores(&self) -> Result<Vec<StoreRecord>> {
        self.all("a store", "SELECT body, digest FROM store ORDER BY identity", [])
    }

    /// The store of that identity.
    pub fn store(&self, identity: &Identity) -> Result<Option<StoreRecord>> {
        self.one("a store", "SELECT body, digest FROM store WHERE identity = ?1", [identity.as_str()])
    }

    /// Records a store, or where it is now.
    pub(crate) fn add_store(&self, store: &StoreRecord) -> Result<()> {
        self.transact(|tx| self.add_store_in(tx, store))
    }

    fn add_store_in(&self, tx: &Transaction<'_>, store: &StoreRecord) -> Result<()> {
        let (body, digest) = encode(store);
        let query = "INSERT INTO store VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET body = ?2, digest = ?3";
        tx.execute(query, params![store.identity.as_str(), body, digest]).map_err(|e| self.failed(e)).map(drop)
    }

    /// Records a volume and the store that holds its snapshots; `false` if the name is taken.
    pub(crate) fn add_volume(&self, volume: &RegisteredVolume, store: &StoreRecord) -> Result<bool> {
        self.transact(|tx| {
            self.add_store_in(tx, store)?;
            let (body, digest) = encode(volume);
            let added = tx
                .execute(
                    "INSERT INTO volume VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
                    params![volume.name.as_str(), body, digest],
                )
                .map_err(|e| self.failed(e))?;
            Ok(added == 1)
        })
    }

    /// Forgets a volume; `false` if there is none of that name. Its checkpoints stay.
    pub(crate) fn forget_volume(&self, name: &Name) -> Result<bool> {
        self.transact(|tx| {
            let gone = tx.execute("DELETE FROM volume WHERE name = ?1", [name.as_str()]).map_err(|e| self.failed(e))?;
            Ok(gone == 1)
        })
    }

    /// Every checkpoint, newest first.
    pub fn checkpoints(&self) -> Result<Vec<Checkpoint>> {
        self.newest(usize::MAX, |checkpoint| checkpoint)
    }

    /// What `told` makes of the newest checkpoints, at most `limit`, newest first.
    pub fn newest<T>(&self, limit: usize, told: impl FnMut(Checkpoint) -> T) -> Result<Vec<T>> {
        let query = "SELECT body, digest FROM checkpoint ORDER BY seq DESC LIMIT ?1";
        self.each("a checkpoint", query, [i64::try_from(limit).unwrap_or(i64::MAX)], told)
    }

    /// When each checkpoint was taken, oldest first: for listings, so that no record is read as a whole.
    pub fn times(&self) -> Result<Vec<(CheckpointId, jiff::Timestamp)>> {
        let query = "SELECT id || ' ' || json_extract(body, '$.time') FROM checkpoint ORDER BY seq";
        let found: Vec<String> = self.column(query, [])?;
        let parsed = |line: &str| {
            let (id, time) = line.split_once(' ')?;
            Some((id.parse().ok()?, time.parse().ok()?))
        };
        found
            .iter()
            .map(|line| {
                parsed(line).ok_or_else(|| self.damaged(format!("{line:?} stands where an id and a time belong")))
            })
            .collect()
    }

    /// The checkpoint of that id.
    pub fn checkpoint(&self, id: &CheckpointId) -> Result<Option<Checkpoint>> {
        let query = "SELECT body, digest FROM checkpoint WHERE id = ?1";
        self.one(&format!("checkpoint {id}"), query, [id.to_string()])
    }

    /// The newest checkpoint of a state that was present when it was taken.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        // In a body, nothing but the field itself reads so: within a text, its quotes would be escaped.
        let query = "SELECT body, digest FROM checkpoint \
                     WHERE body NOT LIKE '%\"pinned\":true%' ORDER BY seq DESC LIMIT 1";
        self.one("the latest checkpoint", query, [])
    }

    /// The ids that begin with `prefix` (lower-case hexadecimal digits), at most `limit`.
    pub fn ids_with_prefix(&self, prefix: &str, limit: u32) -> Result<Vec<CheckpointId>> {
        // 'g' sorts after every hexadecimal digit, so that the range holds the prefix's ids and no others.
        let query = "SELECT id FROM checkpoint WHERE id >= ?1 AND id < ?1 || 'g' ORDER BY id LIMIT ?2";
        self.column(query, params![prefix, limit])
    }

    /// The newest checkpoint on a line of work that has one of these volumes.
    pub fn tip(&self, line: Option<&Name>, volumes: &[&Name]) -> Result<Option<CheckpointId>> {
        let query = "SELECT checkpoint FROM tip JOIN checkpoint ON id = checkpoint \
                     WHERE line = ?1 AND volume IN (SELECT value FROM json_each(?2)) ORDER BY seq DESC LIMIT 1";
        let volumes = serde_json::to_string(volumes).expect("names are strings");
        Ok(self.column(query, params![line.map_or("", Name::as_str), volumes])?.pop())
    }

    /// The tags of a checkpoint, sorted.
    pub fn tags_of(&self, id: &CheckpointId) -> Result<Vec<Name>> {
        self.column("SELECT name FROM tag WHERE checkpoint = ?1 ORDER BY name", [id.to_string()])
    }

    /// All tags, by checkpoint.
    pub fn tags(&self) -> Result<BTreeMap<CheckpointId, Vec<Name>>> {
        let mut tags: BTreeMap<_, Vec<Name>> = BTreeMap::new();
        for name in self.column::<Name>("SELECT name FROM tag ORDER BY name", [])? {
            if let Some(id) = self.tagged(&name)? {
                tags.entry(id).or_default().push(name);
            }
        }
        Ok(tags)
    }

    /// The checkpoint that carries a tag.
    pub fn tagged(&self, tag: &Name) -> Result<Option<CheckpointId>> {
        Ok(self.column("SELECT checkpoint FROM tag WHERE name = ?1", [tag.as_str()])?.pop())
    }

    /// Sets a tag; returns the checkpoint that carries it if that is another one, and then changes nothing, unless it is to be moved.
    pub(crate) fn set_tag(&self, tag: &Name, id: &CheckpointId, moved: bool) -> Result<Option<CheckpointId>> {
        self.transact(|tx| {
            if moved {
                tx.execute("DELETE FROM tag WHERE name = ?1", [tag.as_str()]).map_err(|e| self.failed(e))?;
            }
            self.set_tag_in(tx, tag, id)
        })
    }

    fn set_tag_in(&self, tx: &Transaction<'_>, tag: &Name, id: &CheckpointId) -> Result<Option<CheckpointId>> {
        let carrier = self.tagged(tag)?.filter(|carrier| carrier != id);
        if carrier.is_none() {
            tx.execute("INSERT OR REPLACE INTO tag VALUES (?1, ?2)", [tag.as_str(), &id.to_string()])
                .map_err(|e| self.failed(e))?;
        }
        Ok(carrier)
    }

    /// Removes a tag; `false` if there is none of that name.
    pub(crate) fn remove_tag(&self, tag: &Name) -> Result<bool> {
        self.transact(|tx| {
            let gone = tx.execute("DELETE FROM tag WHERE name = ?1", [tag.as_str()]).map_err(|e| self.failed(e))?;
            Ok(gone == 1)
        })
    }

    /// Every branch, oldest first.
    pub fn branches(&self) -> Result<Vec<Branch>> {
        self.all("a branch", "SELECT body, digest FROM branch ORDER BY seq", [])
    }

    /// The branches of which something has to be mounted, oldest first.
    pub fn branches_to_mount(&self) -> Result<Vec<Branch>> {
        self.all("a branch", TO_MOUNT, [])
    }

    /// Replaces the record of a branch; `false` if it is gone.
    pub(crate) fn update_branch(&self, branch: &Branch) -> Result<bool> {
        self.transact(|tx| {
            let (body, digest) = encode(branch);
            let changed = tx
                .execute(
                    "UPDATE branch SET body = ?2, digest = ?3 WHERE name = ?1",
                    params![branch.name.as_str(), body, digest],
                )
                .map_err(|e| self.failed(e))?;
            Ok(changed == 1)
        })
    }

    /// The branch of that name.
    pub fn branch(&self, name: &Name) -> Result<Option<Branch>> {
        let query = "SELECT body, digest FROM branch WHERE name = ?1";
        self.one(&format!("branch {name}"), query, [name.as_str()])
    }

    /// Whether the image is recorded: it belongs to a checkpoint, a branch, or an intent.
    pub fn is_held(&self, store: &Identity, at: &Locator) -> Result<bool> {
        let query = "SELECT 1 FROM hold WHERE store = ?1 AND locator = ?2 LIMIT 1";
        let mut statement = self.db.prepare_cached(query).map_err(|e| self.failed(e))?;
        statement.exists([store.as_str(), at.as_str()]).map_err(|e| self.failed(e))
    }

    /// The locators of a store that are recorded.
    pub fn held(&self, store: &Identity) -> Result<std::collections::BTreeSet<Locator>> {
        let found = self.column("SELECT DISTINCT locator FROM hold WHERE store = ?1", [store.as_str()])?;
        Ok(found.into_iter().collect())
    }

    /// Every pending intent, oldest first.
    pub fn intents(&self) -> Result<Vec<(IntentId, Intent)>> {
        let mut statement =
            self.db.prepare_cached("SELECT seq, body, digest FROM intent ORDER BY seq").map_err(|e| self.failed(e))?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, stored(row)?))).map_err(|e| self.failed(e))?;
        rows.map(|row| {
            let (seq, stored) = row.map_err(|e| self.failed(e))?;
            Ok((IntentId(seq), self.decode(&format!("intent {seq}"), stored)?))
        })
        .collect()
    }

    /// The intent of that number, if it is still pending.
    pub fn intent(&self, id: IntentId) -> Result<Option<Intent>> {
        self.one(&format!("intent {id}"), "SELECT body, digest FROM intent WHERE seq = ?1", [id.0])
    }

    /// Records an intent and locks it.
    pub fn begin(&self, intent: &Intent) -> Result<(IntentId, IntentLock)> {
        let record = encode(intent);
        let change = |tx: &Transaction<'_>| self.begin_as(tx, intent, &record);
        if record.0.len() < super::SMALL { self.transact_in_one_sync(change) } else { self.transact(change) }
    }

    fn begin_in(&self, tx: &Transaction<'_>, intent: &Intent) -> Result<(IntentId, IntentLock)> {
        self.begin_as(tx, intent, &encode(intent))
    }

    fn begin_as(
        &self,
        tx: &Transaction<'_>,
        intent: &Intent,
        (body, digest): &Encoded,
    ) -> Result<(IntentId, IntentLock)> {
        tx.execute("INSERT INTO intent (body, digest) VALUES (?1, ?2)", params![body, digest])
            .map_err(|e| self.failed(e))?;
        let id = IntentId(tx.last_insert_rowid());
        self.hold(tx, &intent.images(), &Holder::Intent(id))?;
        // Nobody else knows of it before the commit, so that taking its lock here can wait for nobody.
        let lock = self.lock_intent(id)?.ok_or_else(|| self.damaged(format!("intent {id} was used before")))?;
        Ok((id, lock))
    }

    fn hold(&self, tx: &Transaction<'_>, images: &[ImageRef], holder: &Holder<'_>) -> Result<()> {
        let mut insert =
            tx.prepare_cached("INSERT OR IGNORE INTO hold VALUES (?1, ?2, ?3)").map_err(|e| self.failed(e))?;
        for image in images {
            insert
                .execute([image.store.as_str(), image.at.as_str(), &holder.to_string()])
                .map_err(|e| self.failed(e))?;
        }
        Ok(())
    }

    /// Replaces the body of a pending intent; `false` if it is gone.
    pub(crate) fn update(&self, id: IntentId, intent: &Intent) -> Result<bool> {
        self.transact(|tx| {
            let (body, digest) = encode(intent);
            let changed = tx
                .execute("UPDATE intent SET body = ?2, digest = ?3 WHERE seq = ?1", params![id.0, body, digest])
                .map_err(|e| self.failed(e))?;
            self.drop_holds_in(tx, &Holder::Intent(id))?;
            self.hold(tx, &intent.images(), &Holder::Intent(id))?;
            Ok(changed == 1)
        })
    }

    /// Drops an intent whose images are gone.
    pub(crate) fn drop_intent(&self, id: IntentId) -> Result<()> {
        self.transact(|tx| self.drop_intent_in(tx, id).map(drop))
    }

    fn drop_intent_in(&self, tx: &Transaction<'_>, id: IntentId) -> Result<bool> {
        self.drop_holds_in(tx, &Holder::Intent(id))?;
        let gone = tx.execute("DELETE FROM intent WHERE seq = ?1", [id.0]).map_err(|e| self.failed(e))?;
        Ok(gone == 1)
    }

    /// Gives up a holder's holds; returns the images that nothing holds any more.
    fn release_in(&self, tx: &Transaction<'_>, holder: &Holder<'_>) -> Result<Vec<ImageRef>> {
        let query = "SELECT store, locator FROM hold AS mine WHERE holder = ?1 AND NOT EXISTS \
                     (SELECT 1 FROM hold WHERE store = mine.store AND locator = mine.locator AND holder <> ?1)";
        let mut statement = tx.prepare_cached(query).map_err(|e| self.failed(e))?;
        let rows = statement
            .query_map([holder.to_string()], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
            .map_err(|e| self.failed(e))?;
        let mut images = Vec::new();
        for row in rows {
            let (store, at) = row.map_err(|e| self.failed(e))?;
            let at = at.parse().map_err(|_| self.damaged(format!("{at:?} stands where a locator belongs")))?;
            images.push(ImageRef { store: Identity::new(store), at });
        }
        self.drop_holds_in(tx, holder)?;
        Ok(images)
    }

    fn drop_holds_in(&self, tx: &Transaction<'_>, holder: &Holder<'_>) -> Result<()> {
        let dropped = tx.execute("DELETE FROM hold WHERE holder = ?1", [holder.to_string()]);
        dropped.map(drop).map_err(|e| self.failed(e))
    }

    /// Replaces an intent by the checkpoint that came of it; `false` if another process was faster.
    ///
    /// `tree` is what was seen of its processes.
    pub fn seal(
        &self,
        id: IntentId,
        checkpoint: &Checkpoint,
        tags: &[Name],
        tree: Option<&TreeRecord>,
    ) -> Result<bool> {
        self.transact(|tx| {
            if !self.drop_intent_in(tx, id)? {
                return Ok(false);
            }
            let (body, digest) = encode(checkpoint);
            let (key, parent) = (checkpoint.id.to_string(), checkpoint.parent.map(|parent| parent.to_string()));
            tx.execute(
                "INSERT INTO checkpoint (id, parent, body, digest) VALUES (?1, ?2, ?3, ?4)",
                params![key, parent, body, digest],
            )
            .map_err(|e| self.failed(e))?;
            if let Some(tree) = tree {
                self.add_tree_in(tx, &checkpoint.id, tree)?;
            }
            let line = checkpoint.branch.as_ref().map_or("", Name::as_str);
            for member in &checkpoint.members {
                if !checkpoint.pinned {
                    tx.execute("INSERT OR REPLACE INTO tip VALUES (?1, ?2, ?3)", [line, member.volume.as_str(), &key])
                        .map_err(|e| self.failed(e))?;
                }
                let image = ImageRef { store: member.store.clone(), at: member.snapshot.at.clone() };
                self.hold(tx, &[image], &Holder::Checkpoint(&checkpoint.id))?;
                self.hold(tx, &member.needs, &Holder::Checkpoint(&checkpoint.id))?;
            }
            for tag in tags {
                // A tag that was taken meanwhile stays where it is: losing the checkpoint for it would be worse.
                self.set_tag_in(tx, tag, &checkpoint.id)?;
            }
            Ok(true)
        })
    }

    /// Replaces an intent by the branch that came of it; `false` if the name was taken meanwhile. Unless it is to be durable, a power cut
    /// may leave the intent in its place.
    pub(crate) fn add_branch(&self, id: IntentId, branch: &Branch, durable: bool) -> Result<bool> {
        let change =
            |tx: &Transaction<'_>| Ok(self.add_branch_in(tx, branch)? && self.drop_intent_in(tx, id).map(|_| true)?);
        let added = if durable { self.transact(change) } else { self.transact_unsynced(change) }?;
        self.leave_own_log()?;
        Ok(added)
    }

    /// Records a branch for which nothing was made yet; `false` if the name was taken or the checkpoint removed meanwhile.
    pub(crate) fn add_unmade_branch(&self, branch: &Branch) -> Result<bool> {
        self.transact(|tx| self.add_branch_in(tx, branch))
    }

    fn add_branch_in(&self, tx: &Transaction<'_>, branch: &Branch) -> Result<bool> {
        if !branch.homes().is_empty() {
            tx.execute_batch(format::TO_MOUNT_INDEX).map_err(|e| self.failed(e))?;
        }
        let (body, digest) = encode(branch);
        let added = tx
            .execute(
                "INSERT INTO branch (name, checkpoint, body, digest) SELECT ?1, ?2, ?3, ?4 \
                     WHERE EXISTS (SELECT 1 FROM checkpoint WHERE id = ?2) ON CONFLICT DO NOTHING",
                params![branch.name.as_str(), branch.checkpoint.to_string(), body, digest],
            )
            .map_err(|e| self.failed(e))?;
        if added == 0 {
            return Ok(false);
        }
        for member in &branch.members {
            let image = ImageRef { store: member.store.clone(), at: member.at.clone() };
            self.hold(tx, &[image], &Holder::Branch(&branch.name))?;
        }
        Ok(true)
    }

    /// Takes a checkpoint out of the record, if no branch grew from it; its children become its parent's.
    pub(crate) fn remove_checkpoint(&self, id: &CheckpointId) -> Result<Removal> {
        self.transact(|tx| {
            let Some(checkpoint) = self.checkpoint(id)? else { return Ok(Removal::Missing) };
            let key = id.to_string();
            let by = self.column("SELECT name FROM branch WHERE checkpoint = ?1 ORDER BY name", [&key])?;
            if !by.is_empty() {
                return Ok(Removal::Needed(by));
            }
            let children: Vec<Checkpoint> =
                self.all("a checkpoint", "SELECT body, digest FROM checkpoint WHERE parent = ?1", [&key])?;
            for mut child in children {
                child.parent = checkpoint.parent;
                let (body, digest) = encode(&child);
                tx.execute(
                    "UPDATE checkpoint SET parent = ?2, body = ?3, digest = ?4 WHERE id = ?1",
                    params![child.id.to_string(), child.parent.map(|p| p.to_string()), body, digest],
                )
                .map_err(|e| self.failed(e))?;
            }
            tx.execute("DELETE FROM tag WHERE checkpoint = ?1", [&key]).map_err(|e| self.failed(e))?;
            match checkpoint.parent {
                Some(parent) => {
                    tx.execute("UPDATE tip SET checkpoint = ?2 WHERE checkpoint = ?1", [&key, &parent.to_string()])
                }
                None => tx.execute("DELETE FROM tip WHERE checkpoint = ?1", [&key]),
            }
            .map_err(|e| self.failed(e))?;
            tx.execute("DELETE FROM checkpoint WHERE id = ?1", [&key]).map_err(|e| self.failed(e))?;
            self.begin_removal(tx, &Holder::Checkpoint(id), Vec::new(), checkpoint.rooms())
        })
    }

    /// Takes a branch out of the record. Checkpoints that were taken on it stay.
    pub(crate) fn remove_branch(&self, name: &Name) -> Result<Removal> {
        self.transact(|tx| {
            let overlays = self.branch(name)?.map(|branch| branch.homes()).unwrap_or_default();
            let gone = tx.execute("DELETE FROM branch WHERE name = ?1", [name.as_str()]).map_err(|e| self.failed(e))?;
            if gone == 0 {
                return Ok(Removal::Missing);
            }
            tx.execute("DELETE FROM tip WHERE line = ?1", [name.as_str()]).map_err(|e| self.failed(e))?;
            self.begin_removal(tx, &Holder::Branch(name), overlays, Vec::new())
        })
    }

    fn begin_removal(
        &self,
        tx: &Transaction<'_>,
        holder: &Holder<'_>,
        overlays: Vec<PathText>,
        rooms: Vec<RoomRef>,
    ) -> Result<Removal> {
        let doomed = Doomed { images: self.release_in(tx, holder)?, overlays, rooms };
        let (id, lock) = self.begin_in(tx, &Intent::removal(&doomed))?;
        Ok(Removal::Begun(id, lock, doomed))
    }

    /// Turns an intent that was given up into the removal of its images; `None` if it is gone.
    pub(crate) fn abandon(&self, id: IntentId) -> Result<Option<Doomed>> {
        self.transact(|tx| {
            let images = self.release_in(tx, &Holder::Intent(id))?;
            let intent = self.intent(id)?;
            let overlays = intent.as_ref().map(Intent::overlays).unwrap_or_default();
            let rooms = intent.as_ref().map(Intent::rooms).unwrap_or_default();
            let doomed = Doomed { images, overlays, rooms };
            let (body, digest) = encode(&Intent::removal(&doomed));
            let changed = tx
                .execute("UPDATE intent SET body = ?2, digest = ?3 WHERE seq = ?1", params![id.0, body, digest])
                .map_err(|e| self.failed(e))?;
            self.hold(tx, &doomed.images, &Holder::Intent(id))?;
            Ok((changed == 1).then_some(doomed))
        })
    }

    /// Names every record that cannot be read.
    pub(super) fn damaged_records(&self) -> Result<Vec<String>> {
        let mut damage = Vec::new();
        let mut tables = vec![
            ("store", "identity"),
            ("volume", "name"),
            ("checkpoint", "id"),
            ("branch", "name"),
            ("intent", "seq"),
        ];
        tables.extend(self.has_trees()?.then_some(("tree", "checkpoint")));
        for (table, key) in tables {
            let query = format!("SELECT CAST({key} AS TEXT), body, digest FROM {table}");
            let mut statement = self.db.prepare(&query).map_err(|e| self.failed(e))?;
            let mut rows = statement.query([]).map_err(|e| self.failed(e))?;
            while let Some(row) = rows.next().map_err(|e| self.failed(e))? {
                let (key, (body, found)): (String, Stored) =
                    (row.get(0).map_err(|e| self.failed(e))?, stored(row).map_err(|e| self.failed(e))?);
                if found != digest(&body) {
                    damage.push(format!("the record of {table} {key} does not match its digest"));
                }
            }
        }
        Ok(damage)
    }
}

impl Error {
    /// Whether trying again later may help.
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Locked { .. })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::catalog::Access;

    #[test]
    fn what_has_to_be_mounted_is_found_by_its_index() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&dir.path().join("state"), Access::Create, Duration::ZERO).unwrap();
        let indexed = || {
            let plan: Vec<String> = catalog
                .db
                .prepare(&format!("EXPLAIN QUERY PLAN {TO_MOUNT}"))
                .unwrap()
                .query_map([], |row| row.get("detail"))
                .unwrap()
                .map(Result::unwrap)
                .collect();
            plan.concat().contains("branch_to_mount")
        };
        assert!(indexed());
        // A catalog of an earlier release.
        catalog.db.execute_batch("DROP INDEX branch_to_mount").unwrap();
        assert!(!indexed());
        assert!(catalog.branches_to_mount().unwrap().is_empty());
        let branch = |form: &str| -> Branch {
            let member = format!(
                r#"{{"volume":"data","backend":"b","store":"s","at":"1","path":"/b","identity":"i","origin":"/v"{form}}}"#
            );
            let time = jiff::Timestamp::UNIX_EPOCH;
            let id = "0123456789abcdef0123456789abcdef";
            let body = format!(r#"{{"name":"work","checkpoint":"{id}","time":"{time}","members":[{member}]}}"#);
            serde_json::from_str(&body).unwrap()
        };
        // There is no such checkpoint.
        assert!(!catalog.add_unmade_branch(&branch("")).unwrap());
        assert!(!indexed(), "nothing has to be mounted of that one");
        assert!(!catalog.add_unmade_branch(&branch(r#","home":"/b/work""#)).unwrap());
        assert!(indexed());
    }
}
