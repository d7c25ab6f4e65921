//! A TRUNCATE of the peer: everything that it had seen goes. Rows that it had not seen stay: one that was
//! born here since arrives there by itself, one that was only updated here is written anew as a whole,
//! since the peer has nothing left to apply the update to.
use super::conflict;
use super::image;
use super::row::{Work, key_of};
use super::table::Table;
use crate::capture;
use crate::error::Result;
use crate::pg::identity::ActingAs;
use crate::value;
use pgrx::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;
use tandem_model::hlc::{Hlc, Mark, NodeId};
use tandem_model::record::{ConflictType, Image};
use tandem_model::versions::Versions;

/// Attempts to get the table for ourselves, and the pause between them: local users go first.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(10);

/// What a row has that the truncate had not seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unseen {
    Nothing,
    Birth,
    Update,
}

/// A version of ours above the low mark of what the truncate had seen counts as unseen.
fn unseen(versions: &Versions, own: NodeId, seen: Mark) -> Unseen {
    let new = |v: Hlc| v.node() == own && v > seen.low;
    if new(versions.birth) {
        Unseen::Birth
    } else if versions.cells.iter().any(|(_, v)| new(*v)) {
        Unseen::Update
    } else {
        Unseen::Nothing
    }
}

/// Applies a truncate of `version`, made by a transaction that had seen our stream up to `seen`. The table
/// comes back open, or not at all if it was closed on the way.
pub fn apply(table: Table, version: Hlc, seen: Mark, work: &mut Work) -> Result<Option<Table>> {
    let _owner = ActingAs::owner(table.synced.owner);
    let mut table = table;
    let exclusive = lock_exclusively(table.synced.relid);
    let keys = keys(&mut table, work.own, seen)?;
    // A trigger of the user that fires on it might write: row by row it does not fire, and that is as well.
    if exclusive && keys.unseen == 0 && !keys.referenced && !table.fires_on_truncate {
        truncate(table);
        return Ok(None);
    }
    for key in keys.keys {
        let memory = table.enter_row_memory();
        one_row(&mut table, &key, version, seen, work)?;
        drop(memory);
    }
    work.queued |= table.has_checks();
    Ok(Some(table))
}

fn lock_exclusively(relid: pg_sys::Oid) -> bool {
    for _ in 0..ATTEMPTS {
        // SAFETY: a lock that is kept until the transaction ends.
        if unsafe { pg_sys::ConditionalLockRelationOid(relid, pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE) } {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    false
}

struct Keys {
    /// Key values as they travel, row by row.
    keys: Vec<Vec<Vec<u8>>>,
    unseen: usize,
    referenced: bool,
}

/// The keys of all rows.
fn keys(table: &mut Table, own: NodeId, seen: Mark) -> Result<Keys> {
    let mut found = Keys { keys: Vec::new(), unseen: 0, referenced: is_referenced(table.synced.relid) };
    let rel = table.synced.clone();
    let mut failure = None;
    table.scan(|table, row| {
        match table.versions_of(row) {
            Ok((_, versions)) => found.unseen += usize::from(unseen(&versions, own, seen) != Unseen::Nothing),
            Err(e) => failure = Some(e),
        }
        let encoded = key_of(&rel, row).into_iter().zip(&rel.key).map(|(value, i)| {
            let mut out = Vec::new();
            value::encode(&rel.columns[*i], value, &mut out);
            out
        });
        found.keys.push(encoded.collect());
    });
    match failure {
        Some(e) => Err(e),
        None => Ok(found),
    }
}

fn is_referenced(relid: pg_sys::Oid) -> bool {
    // SAFETY: lists in the current memory context.
    unsafe {
        let list = pg_sys::lappend_oid(std::ptr::null_mut(), relid);
        !pg_sys::heap_truncate_find_FKs(list).is_null()
    }
}

fn truncate(table: Table) {
    let relid = table.synced.relid;
    table.close();
    // SAFETY: locked exclusively by this transaction; the lists live in the current memory context.
    unsafe {
        let rel = pg_sys::table_open(relid, pg_sys::NoLock as pg_sys::LOCKMODE);
        let rels = pg_sys::lappend(std::ptr::null_mut(), rel.cast());
        let oids = pg_sys::lappend_oid(std::ptr::null_mut(), relid);
        capture::applying(|| {
            let none = std::ptr::null_mut();
            #[cfg(feature = "pg15")]
            pg_sys::ExecuteTruncateGuts(rels, oids, none, pg_sys::DropBehavior::DROP_RESTRICT, false);
            #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
            pg_sys::ExecuteTruncateGuts(rels, oids, none, pg_sys::DropBehavior::DROP_RESTRICT, false, false);
        });
        pg_sys::table_close(rel, pg_sys::NoLock as pg_sys::LOCKMODE);
        pg_sys::CommandCounterIncrement();
    }
}

fn one_row(table: &mut Table, key: &[Vec<u8>], version: Hlc, seen: Mark, work: &mut Work) -> Result<()> {
    let rel = table.synced.clone();
    let key: Vec<_> = key.iter().zip(&rel.key).map(|(bytes, i)| value::decode(&rel.columns[*i], bytes)).collect();
    let Some(row) = table.lock_row(&key, true) else { return Ok(()) };
    let (hlc, versions) = table.versions_of(&row)?;
    match unseen(&versions, work.own, seen) {
        Unseen::Birth => Ok(()),
        Unseen::Nothing => {
            for parent in &table.parents_of {
                work.gone.extend(parent.gone(&rel, &row, None));
            }
            table.delete();
            Ok(())
        }
        Unseen::Update => {
            let tuple = image::to_json(&rel, &image::of_row(&rel, &row))?;
            let tuples = BTreeMap::from([(work.own.0, Image { rank: (1, hlc), tuple: tuple.clone() })]);
            let key_json = image::key_json(&rel, &key)?;
            let mut record =
                conflict::record_of(&rel, key_json, ConflictType::TruncateOriginDiffers, version, hlc, tuples);
            record.result = Some(Image { rank: (0, hlc), tuple });
            conflict::keep(record, work)?;
            work.writes_own = true;
            table.rewrite()
        }
    }
}
