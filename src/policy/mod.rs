//! The policy log in the catalog (`tandem.policy`): who writes it, how it travels, what it says of a table.
//!
//! | step | where |
//! |---|---|
//! | a DBA calls `tandem.set_policy` | [`set`]: on the arbiter an entry, on the other node a wish; both travel in the node's stream |
//! | an entry or a wish arrives | [`receive`]: stored |
//! | the arbiter finds a wish | [`grant`]: an entry that answers it, in a transaction of its own |
//! | a pair is judged | [`of_table`], kept with the relation's description, renewed with it |
//!
//! The arbiter stamps an entry while it holds a lock that no writer of the table shares: every write is before
//! it by version and by position, or after it by both. So the entry is on the other node before any write
//! that it applies to, and whoever judges knows which side of it a write is on.
//!
//! All this is for arbitrated policies. Lattice policies say who wins at once: they are fixed before a table is
//! paired, on both nodes, and compared as cells are ([`tandem_model::policy_log::fixed`]).
pub mod check;
mod wish;

use crate::capture;
use crate::error::{self, Error, Result};
use crate::pg::identity::ActingAs;
use crate::pg::settings::Local;
use crate::registry;
use crate::relation::{self, SyncedRelation};
use crate::shmem;
use pgrx::prelude::*;
use serde_bytes::Bytes;
use tandem_model::change::Item;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::policy::{Kind, Policy};
use tandem_model::policy_log::{Entry, PolicyLog, arbiter, fixed};
use tandem_model::record::ConflictType;

pub use wish::{grant, receive, refuse, wishes};

/// How long set_policy waits for those who are writing, unless lock_timeout says otherwise.
const PATIENCE: &std::ffi::CStr = c"10s";

/// What is to be set, and on what.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub policy: Policy,
    /// Empty: the table.
    pub columns: Vec<String>,
    pub conflict_type: Option<ConflictType>,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    InForce,
    /// The other node is the arbiter: it will answer.
    Pending,
}

/// True if this node writes the log: it is the lower one, or there is no other yet.
fn is_arbiter() -> Result<bool> {
    let database = shmem::database();
    let own = database.node().ok_or_else(|| Error::bug("this database is not a node"))?;
    let peer = peer_node()?;
    Ok(peer.is_none_or(|peer| arbiter(own, peer) == own))
}

/// The other node, once it was reached.
fn peer_node() -> Result<Option<NodeId>> {
    let _superuser = ActingAs::superuser();
    let id: Option<i16> = crate::pg::query::value("select node_id from tandem.peer limit 1", &[])?;
    Ok(id.and_then(|id| NodeId::new(i64::from(id))))
}

/// Sets a policy of a synced table: in force at once, or asked of the arbiter. The caller's rights are checked.
/// `is_paired` tells whether changes of the peer may have been applied to the table.
pub fn set(
    relid: pg_sys::Oid,
    wanted: &Wanted,
    set_by: &str,
    is_paired: impl FnOnce(&SyncedRelation) -> Result<bool>,
) -> Result<Outcome> {
    let rel = relation::synced_by_oid(relid)?;
    check::all(&rel, wanted)?;
    if wanted.is_fixed(&rel) {
        wait_for_writers(&rel)?;
        if is_paired(&rel)? {
            return Err(is_paired_already(&rel, wanted));
        }
        let rel = relation::synced_by_oid(relid)?;
        check::all(&rel, wanted)?;
        fix(&rel, wanted, set_by)?;
        return Ok(Outcome::InForce);
    }
    if !is_arbiter()? {
        let version = registry::stamp();
        publish(&rel, &entry(wanted, version, set_by))?;
        return Ok(Outcome::Pending);
    }
    wait_for_writers(&rel)?;
    // Again, now that nobody can change the table.
    let rel = relation::synced_by_oid(relid)?;
    check::all(&rel, wanted)?;
    let version = registry::stamp();
    publish(&rel, &entry(wanted, version, set_by))?;
    Ok(Outcome::InForce)
}

impl Wanted {
    /// True if it is about who wins at once: a lattice policy, or the end of one.
    fn is_fixed(&self, rel: &SyncedRelation) -> bool {
        let default = self.policy == Policy::LastUpdateWins;
        let judged_by = &rel.judged_by;
        let known = match self.columns.is_empty() {
            true => [&judged_by.existence, &judged_by.others].iter().any(|p| **p != Policy::LastUpdateWins),
            false => {
                rel.columns.iter().any(|c| self.columns.contains(&c.name) && judged_by.cells.contains_key(&c.cell))
            }
        };
        self.policy.kind() == Kind::Lattice && self.conflict_type.is_none() && (!default || known)
    }
}

fn is_paired_already(rel: &SyncedRelation, wanted: &Wanted) -> Error {
    let name = rel.display_name();
    Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("policy {} is set before a table is paired, and table {name} is", wanted.policy.name()),
        format!(
            "On both servers: SELECT tandem.remove_table('{name}'); then tandem.add_table() and tandem.set_policy()."
        ),
    )
}

/// Makes a lattice policy part of the table's shape, which both nodes compare: each has it set by itself.
fn fix(rel: &SyncedRelation, wanted: &Wanted, set_by: &str) -> Result<()> {
    let places: Vec<Vec<String>> = match wanted.columns.is_empty() {
        true => vec![Vec::new()],
        false => wanted.columns.iter().map(|column| vec![column.clone()]).collect(),
    };
    for columns in places {
        let only_rows = matches!(wanted.policy, Policy::DeleteWins | Policy::UpdateWins);
        {
            let _superuser = ActingAs::superuser();
            Spi::run_with_args(
                "delete from tandem.policy where relid = $1 and fixed and columns = $2
                 and (not $3 or policy in ('delete_wins', 'update_wins'))",
                &[rel.relid.into(), columns.clone().into(), only_rows.into()],
            )?;
        }
        // Of a table it is the default; a column's own comes before what the table has.
        if wanted.policy == Policy::LastUpdateWins && columns.is_empty() {
            continue;
        }
        let wanted = Wanted { columns, ..wanted.clone() };
        store(rel.relid, rel, &Entry { fixed: true, ..entry(&wanted, registry::stamp(), set_by) })?;
    }
    renew(rel.relid);
    Ok(())
}

/// The table is taken out of sync: should it come back, it begins without policies, on both nodes. The other
/// node keeps what it has: the arbiter alone writes the log.
pub fn reset(relid: pg_sys::Oid, set_by: &str) -> Result<()> {
    {
        let _superuser = ActingAs::superuser();
        Spi::run_with_args("delete from tandem.policy where relid = $1 and fixed", &[relid.into()])?;
    }
    if !is_arbiter()? || stored(relid)?.is_empty() {
        return Ok(());
    }
    let rel = relation::synced_by_oid(relid)?;
    let default = Wanted { policy: Policy::LastUpdateWins, columns: Vec::new(), conflict_type: None };
    let reset = Entry { reset: true, ..entry(&default, registry::stamp(), set_by) };
    announce(&rel, &reset)?;
    let _superuser = ActingAs::superuser();
    Spi::run_with_args("delete from tandem.policy where relid = $1", &[relid.into()])?;
    Ok(())
}

fn entry(wanted: &Wanted, version: Hlc, set_by: &str) -> Entry {
    Entry {
        version,
        columns: wanted.columns.clone(),
        conflict_type: wanted.conflict_type,
        policy: wanted.policy.clone(),
        reset: false,
        fixed: false,
        wish: Hlc(0),
        refused: None,
        set_by: set_by.to_string(),
        set_at: crate::clock::wall_ms() * 1000,
    }
}

/// Takes the lock that writers of the table don't share, and keeps it to the end of the transaction.
fn wait_for_writers(rel: &SyncedRelation) -> Result<()> {
    // SAFETY: a variable of this backend.
    let unlimited = unsafe { pg_sys::LockTimeout } == 0;
    let _limit = unlimited.then(|| Local::new(&[(c"lock_timeout", PATIENCE)]));
    let lock = pg_sys::ShareRowExclusiveLock as pg_sys::LOCKMODE;
    error::catch(|| {
        // SAFETY: a table that exists, or Postgres raises; released at the end of the transaction.
        unsafe { pg_sys::LockRelationOid(rel.relid, lock) };
        Ok(())
    })
    .map_err(|e| match e.sqlstate {
        PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE => Error {
            message: format!("table {} is being written to: its policy was not changed", rel.display_name()),
            detail: Some("A policy begins between two writes, so it waits for open transactions that wrote.".into()),
            hint: Some("Try again, or give it more time: SET lock_timeout = '1min'.".into()),
            ..e
        },
        _ => e,
    })
}

/// Stores an entry (or a wish) here and sends it to the other node.
fn publish(rel: &SyncedRelation, entry: &Entry) -> Result<()> {
    store(rel.relid, rel, entry)?;
    announce(rel, entry)
}

fn announce(rel: &SyncedRelation, entry: &Entry) -> Result<()> {
    let json = serde_json::to_vec(entry).map_err(|e| Error::bug(format!("a policy is not JSON: {e}")))?;
    capture::emit(&Item::Policy { descriptor: rel.descriptor, entry: Bytes::new(&json) });
    Ok(())
}

/// Writes a row of the log, in place of the wish that it answers. What is there already stays.
fn store(relid: pg_sys::Oid, rel: &SyncedRelation, entry: &Entry) -> Result<()> {
    const INSERT: &str = "
        insert into tandem.policy (version, relid, columns, attnums, conflict_type, policy, reset, fixed, wish, refused,
            set_by, set_at)
        values ($1::int8::tandem.hlc, $2, $3, $4, $5, $6, $7, $8, $9::int8::tandem.hlc, $10, $11,
                'epoch'::timestamptz + $12 * interval '1 microsecond')
        on conflict do nothing";
    let _superuser = ActingAs::superuser();
    let attnum = |name: &String| rel.columns.iter().find(|c| c.name == *name).map_or(0, |c| c.attnum);
    Spi::run_with_args(
        INSERT,
        &[
            (entry.version.0 as i64).into(),
            relid.into(),
            entry.columns.clone().into(),
            entry.columns.iter().map(attnum).collect::<Vec<i16>>().into(),
            entry.conflict_type.map(ConflictType::name).into(),
            entry.policy.to_string().into(),
            entry.reset.into(),
            entry.fixed.into(),
            (entry.wish.0 as i64).into(),
            entry.refused.as_deref().into(),
            entry.set_by.as_str().into(),
            entry.set_at.into(),
        ],
    )?;
    if !entry.wish.is_zero() {
        Spi::run_with_args(
            "delete from tandem.policy where version = $1::int8::tandem.hlc",
            &[(entry.wish.0 as i64).into()],
        )?;
    }
    renew(relid);
    Ok(())
}

/// Every session describes the table anew: with this log, once it is committed.
fn renew(relid: pg_sys::Oid) {
    // SAFETY: queues invalidations; ours take effect with the next command.
    unsafe {
        pg_sys::CacheInvalidateRelcacheByRelid(relid);
        pg_sys::CommandCounterIncrement();
    }
}

/// Completes a table's description with its policies as they are now, whatever the statement's snapshot: who
/// judges by it holds a lock on the table.
pub fn describe(rel: &mut SyncedRelation) -> Result<()> {
    // SAFETY: a snapshot of now for one query, popped below; an ERROR pops it as well.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let entries = stored(rel.relid)?;
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    let cell = |name: &str| rel.columns.iter().find(|c| c.name == name).map(|c| c.cell);
    rel.judged_by = fixed(&entries, cell);
    rel.policies = PolicyLog::new(entries);
    Ok(())
}

/// What is stored of a table, by version. A column is known by its name, and once it was renamed by its number.
fn stored(relid: pg_sys::Oid) -> Result<Vec<Entry>> {
    const QUERY: &str = "
        select version::int8, array(
                   select coalesce(
                       (select a.attname::text from pg_catalog.pg_attribute a
                        where a.attrelid = p.relid and a.attname = u.name and not a.attisdropped and a.attnum > 0),
                       (select a.attname::text from pg_catalog.pg_attribute a
                        where a.attrelid = p.relid and a.attnum = u.attnum and not a.attisdropped and a.attnum > 0),
                       u.name)
                   from unnest(columns, attnums) with ordinality u (name, attnum, n) order by u.n),
               conflict_type, policy, reset, wish::int8, refused, set_by,
               (extract(epoch from set_at) * 1000000)::int8, fixed
        from tandem.policy p where relid = $1 order by version";
    let _superuser = ActingAs::superuser();
    Spi::connect(|client| {
        let mut entries = Vec::new();
        for row in client.select(QUERY, None, &[relid.into()])? {
            let text = |i| -> Result<Option<String>> { Ok(row.get::<String>(i)?) };
            let number = |i| -> Result<i64> { Ok(row.get::<i64>(i)?.unwrap_or(0)) };
            let policy = text(4)?.unwrap_or_default();
            entries.push(Entry {
                version: Hlc(number(1)? as u64),
                columns: row.get::<Vec<String>>(2)?.unwrap_or_default(),
                conflict_type: text(3)?.as_deref().and_then(ConflictType::of_name),
                policy: policy
                    .parse()
                    .map_err(|e| Error::bug(format!("a stored policy cannot be read: {e}: {policy}")))?,
                reset: row.get::<bool>(5)?.unwrap_or(false),
                fixed: row.get::<bool>(10)?.unwrap_or(false),
                wish: Hlc(number(6)? as u64),
                refused: text(7)?,
                set_by: text(8)?.unwrap_or_default(),
                set_at: number(9)?,
            });
        }
        Ok(entries)
    })
}

/// Where an entry of the log stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    InForce,
    /// The arbiter has not answered.
    Pending,
    /// The arbiter said no: the row says why.
    Refused,
    /// A later entry has taken its place.
    Superseded,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::InForce => "in force",
            State::Pending => "pending",
            State::Refused => "refused",
            State::Superseded => "superseded",
        }
    }
}

/// The state of every entry of the log, by version.
pub fn states() -> Result<Vec<(Hlc, State)>> {
    let database = shmem::database();
    let Some(own) = database.node() else { return Ok(Vec::new()) };
    let writer = peer_node()?.map_or(own, |peer| arbiter(own, peer));
    let tables: Vec<pg_sys::Oid> = {
        let _superuser = ActingAs::superuser();
        Spi::connect(|client| -> std::result::Result<Vec<_>, pgrx::spi::Error> {
            let rows = client.select("select distinct relid::oid from tandem.policy", None, &[])?;
            rows.filter_map(|row| row.get::<pg_sys::Oid>(1).transpose()).collect()
        })?
    };
    let mut states = Vec::new();
    for relid in tables {
        let entries = stored(relid)?;
        let log = PolicyLog::new(entries.clone());
        states.extend(entries.into_iter().map(|entry| {
            let state = match &entry {
                e if e.refused.is_some() => State::Refused,
                e if e.fixed => State::InForce,
                e if e.version.node() != writer => State::Pending,
                e if log.is_in_force(e) => State::InForce,
                _ => State::Superseded,
            };
            (entry.version, state)
        }));
    }
    Ok(states)
}
