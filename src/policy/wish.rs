//! What travels: entries of the arbiter, wishes of the other node, and the arbiter's answers.
use super::{Wanted, announce, check, entry, store, stored};
use crate::error::{Error, Result};
use crate::guc;
use crate::pg::identity::ActingAs;
use crate::pg::settings::Local;
use crate::registry;
use crate::relation::{self, SyncedRelation};
use pgrx::prelude::*;
use std::ffi::CString;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::policy::{Kind, Policy};
use tandem_model::policy_log::{Entry, arbiter};

/// Bytes of an entry that are still read: as many columns as a table can have, and their names.
const MAX_ENTRY: usize = 1 << 20;

/// Stores what the peer sent of a table's log. `name_here` gives the local name of the peer's column.
pub fn receive(
    bytes: &[u8],
    rel: &SyncedRelation,
    own: NodeId,
    peer: NodeId,
    name_here: impl Fn(&str) -> Option<String>,
) -> Result<()> {
    let damaged = |why: String| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
            format!("the peer sent a policy that cannot be read: {why}"),
            "The sending side is damaged or speaks another protocol; see its server log.",
        )
    };
    if bytes.len() > MAX_ENTRY {
        return Err(damaged(format!("{} bytes", bytes.len())));
    }
    let mut entry: Entry = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
    if entry.fixed || (entry.policy.kind() == Kind::Lattice && entry.policy != Policy::LastUpdateWins) {
        return Err(damaged(format!("policy {} does not travel", entry.policy)));
    }
    let answers_us = entry.wish.is_zero() || (entry.wish.node() == own && arbiter(own, peer) == peer);
    if entry.version.node() != peer || !answers_us {
        return Err(damaged("its version is not the sending node's".to_string()));
    }
    crate::clock::observe(entry.version.0)?;
    for column in &mut entry.columns {
        if let Some(name) = name_here(column) {
            *column = name;
        }
    }
    if let Some(why) = &entry.refused {
        warn(rel, &entry, why);
    }
    store(rel.relid, rel, &entry)
}

fn warn(rel: &SyncedRelation, entry: &Entry, why: &str) {
    pgrx::log!("tandem: policy {} of table {} is refused: {why}", entry.policy, rel.display_name());
}

/// The peer's wishes that have no answer.
pub fn wishes(peer: NodeId) -> Result<Vec<(pg_sys::Oid, Hlc)>> {
    let query = "select relid::oid, version::int8 from tandem.policy
                 where tandem.hlc_node(version) = $1 and refused is null order by version";
    let _superuser = ActingAs::superuser();
    Spi::connect(|client| {
        let mut found = Vec::new();
        for row in client.select(query, None, &[i32::from(peer.0).into()])? {
            if let (Some(relid), Some(version)) = (row.get::<pg_sys::Oid>(1)?, row.get::<i64>(2)?) {
                found.push((relid, Hlc(version as u64)));
            }
        }
        Ok(found)
    })
}

fn read(relid: pg_sys::Oid, wish: Hlc) -> Result<Option<Entry>> {
    Ok(stored(relid)?.into_iter().find(|e| e.version == wish))
}

/// As the arbiter, grants a wish. Waits for the writers of its table only as long as applying does. The
/// transaction is the wish's own: no lock is held that the wait could be for.
pub fn grant(relid: pg_sys::Oid, wish: Hlc) -> Result<()> {
    let Some(asked) = read(relid, wish)? else { return Ok(()) };
    let wanted = Wanted { policy: asked.policy, columns: asked.columns, conflict_type: asked.conflict_type };
    let rel = relation::synced_by_oid(relid)?;
    check::all(&rel, &wanted)?;
    {
        let limit = CString::new(format!("{}ms", guc::APPLY_LOCK_TIMEOUT.get())).unwrap_or_default();
        let _limit = Local::new(&[(c"lock_timeout", limit.as_c_str())]);
        let lock = pg_sys::ShareRowExclusiveLock as pg_sys::LOCKMODE;
        // SAFETY: a table that exists, or Postgres raises; released at the end of the transaction.
        unsafe { pg_sys::LockRelationOid(relid, lock) };
    }
    let rel = relation::synced_by_oid(relid)?;
    check::all(&rel, &wanted)?;
    let granted = Entry { wish, set_at: asked.set_at, ..entry(&wanted, registry::stamp(), &asked.set_by) };
    store(relid, &rel, &granted)?;
    announce(&rel, &granted)
}

/// As the arbiter, says why a wish is not granted.
pub fn refuse(relid: pg_sys::Oid, wish: Hlc, error: &Error) -> Result<()> {
    let Some(asked) = read(relid, wish)? else { return Ok(()) };
    let rel = relation::synced_by_oid(relid)?;
    let refused = Entry { wish, version: registry::stamp(), refused: Some(error.message.clone()), ..asked };
    warn(&rel, &refused, &error.message);
    store(relid, &rel, &refused)?;
    announce(&rel, &refused)
}
