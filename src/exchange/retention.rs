//! Retention: closed conflicts leave the history `tandem.conflict_retention` after they last changed here;
//! open ones stay. How many there were stays in `tandem.conflict_count`, and what was decided about them in
//! `tandem.conflict_removed` for as long again, should one be told once more.
//!
//! Nothing goes before the peer has all that this node had told when it became due: until then the peer
//! may still meet the same losing write and tell of it, and that has to find the decision here.
use crate::apply::history::PARTS;
use crate::clock::{boot_ms, wall_ms};
use crate::error::Result;
use crate::exchange::process;
use crate::guc;
use crate::pg::identity::ActingAs;
use crate::pg::{names, query};
use crate::shmem::Database;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;

/// Records removed in one transaction.
const AT_ONCE: i32 = 1_000;
/// Longest and shortest pause (ms) between two looks.
const PAUSE_MS: (i64, i64) = (1_000, 60_000);

/// What the worker remembers between two looks.
pub struct Retention {
    due: i64,
    /// What had changed last before this (µs since the Unix epoch) goes once the peer has this position.
    agreed: Option<(i64, u64)>,
    /// There is more of it than one transaction took.
    more: bool,
}

/// Statistics and decisions of removed records are kept; `{source}` has the records.
const KEEP: &str = "
    kept as (
        insert into tandem.conflict_removed (conflict_id, decision)
        select conflict_id, record -> 'decision' from {source} where decision_version::int8 > 0
        on conflict (conflict_id) do update set decision = excluded.decision, removed_at = excluded.removed_at)
    insert into tandem.conflict_count as c (schema_name, table_name, conflict_type, removed, last_detected_at)
    select schema_name, table_name, conflict_type, count(*), max(detected_at) from {source}
    group by schema_name, table_name, conflict_type
    on conflict (schema_name, table_name, conflict_type) do update
    set removed = c.removed + excluded.removed,
        last_detected_at = greatest(c.last_detected_at, excluded.last_detected_at)";

impl Retention {
    pub fn new() -> Retention {
        Retention { due: boot_ms(), agreed: None, more: false }
    }

    /// Removes what is due and settled.
    pub fn run(&mut self, database: &Database) -> Result<()> {
        let keep_seconds = i64::from(guc::CONFLICT_RETENTION.get());
        let now = boot_ms();
        if keep_seconds < 0 || now < self.due {
            return Ok(());
        }
        let pause = if self.more { PAUSE_MS.0 } else { (keep_seconds * 100).clamp(PAUSE_MS.0, PAUSE_MS.1) };
        self.due = now + pause;
        let (before, position) = *self.agreed.get_or_insert_with(|| {
            let before = (wall_ms() - keep_seconds * 1000) * 1000;
            (before, database.last_position.load(Acquire))
        });
        if database.acked.load(Acquire) < position {
            return Ok(());
        }
        self.more = false;
        for part in 0..PARTS {
            self.more |= process::transaction(|| clear_part(part, before))?;
        }
        if !self.more {
            self.agreed = None;
            process::transaction(|| forget_decisions(before))?;
        }
        Ok(())
    }
}

/// Removes from one part what last changed before a time; true if some of it is left.
fn clear_part(part: u32, before: i64) -> Result<bool> {
    let _superuser = ActingAs::superuser();
    let is_due = "status <> 'open' and changed_at < 'epoch'::timestamptz + $1 * interval '1 microsecond'";
    let any = format!("select exists (select from tandem.conflict_{part} where {is_due})");
    if query::value::<bool>(&any, &[before.into()])? != Some(true) {
        return Ok(false);
    }
    if truncate_part(part, before, is_due)? {
        return Ok(false);
    }
    let keep = KEEP.replace("{source}", "gone");
    let statement = format!(
        "with gone as (
             delete from tandem.conflict_{part} where conflict_id in (
                 select conflict_id from tandem.conflict_{part} where {is_due} limit $2 for update skip locked)
             returning conflict_id, schema_name, table_name, conflict_type, detected_at, decision_version, record),
         {keep}"
    );
    Spi::run_with_args(&statement, &[before.into(), AT_ONCE.into()])?;
    Ok(query::value::<bool>(&any, &[before.into()])? == Some(true))
}

/// Empties a part at once if nothing in it has to stay and nobody is using it. True if it did.
fn truncate_part(part: u32, before: i64, is_due: &str) -> Result<bool> {
    let stays = format!("select exists (select from tandem.conflict_{part} where not ({is_due}))");
    if query::value::<bool>(&stays, &[before.into()])? != Some(false) {
        return Ok(false);
    }
    let table = names::relation_oid(&format!("conflict_{part}"));
    let lock = pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: takes the lock or returns at once; it is held until the transaction ends.
    if !unsafe { pg_sys::ConditionalLockRelationOid(table, lock) } {
        return Ok(false);
    }
    // SAFETY: a snapshot that sees whoever held the lock before; popped below, or by the abort.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let empty = query::value::<bool>(&stays, &[before.into()])? == Some(false);
    if empty {
        let source = format!("tandem.conflict_{part}");
        let keep = KEEP.replace("{source}", &source);
        Spi::run(&format!("with {}", keep.trim_start()))?;
        Spi::run(&format!("truncate {source}"))?;
    }
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    Ok(empty)
}

/// Decisions that have been kept for as long again as their records.
fn forget_decisions(before: i64) -> Result<()> {
    let _superuser = ActingAs::superuser();
    let old = "removed_at < 'epoch'::timestamptz + $1 * interval '1 microsecond'";
    let any = format!("select exists (select from tandem.conflict_removed where {old})");
    if query::value::<bool>(&any, &[before.into()])? == Some(true) {
        Spi::run_with_args(&format!("delete from tandem.conflict_removed where {old}"), &[before.into()])?;
    }
    Ok(())
}
