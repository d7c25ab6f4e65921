//! The changes of the present transaction, in this backend's memory, beyond a limit in a temporary file.
//! Places are offsets into the whole (file and memory together), so that a savepoint is one number.
use super::netting;
use super::spool::Spool;
use crate::error::Error;
use crate::guc;
use crate::relation::SyncedRelation;
use crate::stash::Stashed;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use tandem_model::change::{Change, Item};
use tandem_model::descriptor::DescriptorId;
use tandem_model::hlc::{Mark, Position};
use tandem_model::wire;

/// What a key held that showed no row.
#[derive(Clone)]
pub enum Met {
    Tombstone(Stashed),
    Displaced(Stashed),
}

impl Met {
    pub fn row(&self) -> &Stashed {
        match self {
            Met::Tombstone(row) | Met::Displaced(row) => row,
        }
    }
}

/// What a transaction has to say to the journal.
#[derive(Default)]
pub struct Buffer {
    /// Items that are not in the file.
    pub body: Vec<u8>,
    pub spool: Option<Spool>,
    /// Hashes of the keys that were touched, and of those touched more than once: only these need netting.
    once: HashSet<u64>,
    pub again: HashSet<u64>,
    /// Relations behind the descriptors of this transaction's changes.
    pub relations: HashMap<DescriptorId, Rc<SyncedRelation>>,
    /// What inserts found, by descriptor and key: what a key that is deleted again goes back to.
    pub met: HashMap<(DescriptorId, Vec<u8>), Met>,
    savepoints: Vec<(pg_sys::SubTransactionId, u64)>,
    /// The `seen` that this commit reaches, if it applies the peer's changes.
    pub carry: Option<Mark>,
    pub heartbeat: bool,
    /// Set at pre-commit: nothing may be added any more.
    pub position: Option<Position>,
    /// The segment of the journal that it is in.
    pub segment: u32,
    used: bool,
}

thread_local! {
    static BUFFER: RefCell<Buffer> = RefCell::default();
}

/// Works on this backend's buffer.
pub fn with<R>(f: impl FnOnce(&mut Buffer) -> R) -> R {
    BUFFER.with_borrow_mut(f)
}

/// Forgets everything at the end of a transaction.
pub fn reset() {
    with(|b| {
        if b.used || b.heartbeat || b.carry.is_some() || b.position.is_some() {
            *b = Buffer::default();
        }
    });
}

/// Adds an item; `key` is the hash of the key that it changes.
pub fn push(item: &Item<'_>, key: Option<u64>) {
    with(|b| b.push(item, key));
}

/// Adds a change of a row of `rel`.
pub fn push_change(rel: &Rc<SyncedRelation>, change: &Change<'_>) {
    with(|b| {
        b.relations.entry(rel.descriptor).or_insert_with(|| rel.clone());
        b.push(&Item::Change(change.clone()), Some(netting::key_hash(change)));
    });
}

impl Buffer {
    pub fn is_empty(&self) -> bool {
        self.body.is_empty() && self.spool.as_ref().is_none_or(|s| s.len() == 0)
    }

    fn push(&mut self, item: &Item<'_>, key: Option<u64>) {
        if self.position.is_some() {
            Error::operator(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                "a synced table was changed while the transaction was already being committed",
                "Another extension writes at commit time: leave its tables out of what tandem keeps in sync.",
            )
            .raise();
        }
        self.used = true;
        // SAFETY: reads this backend's transaction state.
        let current = unsafe { pg_sys::GetCurrentSubTransactionId() };
        const TOP: pg_sys::SubTransactionId = 1;
        if current != TOP && self.savepoints.last().is_none_or(|(id, _)| *id < current) {
            let place = self.len();
            self.savepoints.push((current, place));
        }
        if let Some(key) = key.filter(|key| !self.once.insert(*key)) {
            self.again.insert(key);
        }
        self.push_plain(item);
    }

    /// Appends an item without looking at what it is about.
    pub fn push_plain(&mut self, item: &Item<'_>) {
        wire::push_item(&mut self.body, item).unwrap_or_else(|e| Error::from(e).raise());
        if self.body.len() > guc::CAPTURE_MEMORY.get() as usize * 1024 {
            self.spool();
        }
    }

    fn len(&self) -> u64 {
        self.spool.as_ref().map_or(0, Spool::len) + self.body.len() as u64
    }

    /// Moves what is in memory to the file.
    pub fn spool(&mut self) {
        let spool = self.spool.get_or_insert_with(Spool::create);
        spool.append(&self.body);
        self.body.clear();
    }

    /// A savepoint was released: its changes are its parent's.
    pub fn merge_savepoint(&mut self, mine: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) {
        while let Some((_, place)) = self.savepoints.pop_if(|(id, _)| *id >= mine) {
            if parent != 1 && self.savepoints.last().is_none_or(|(id, _)| *id < parent) {
                self.savepoints.push((parent, place));
                return;
            }
        }
    }

    /// A savepoint was rolled back: its changes never happened.
    pub fn roll_back_to(&mut self, mine: pg_sys::SubTransactionId) {
        let mut cut = None;
        while let Some((_, place)) = self.savepoints.pop_if(|(id, _)| *id >= mine) {
            cut = Some(place);
        }
        let Some(place) = cut else { return };
        let spooled = self.spool.as_ref().map_or(0, Spool::len);
        if place >= spooled {
            self.body.truncate((place - spooled) as usize);
        } else {
            self.body.clear();
            if let Some(spool) = &mut self.spool {
                spool.truncate(place);
            }
        }
    }
}
