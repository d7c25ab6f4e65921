//! Retention: closed conflicts leave the history `tandem.conflict_retention` after they last changed here;
//! open ones stay. How many there were stays in `tandem.conflict_count`, and what a person decided about them in
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
/// Attempts to have a part that can be truncated for oneself, before its rows are deleted instead.
const ATTEMPTS: u32 = 10;
/// Shortest and longest pause (ms) between two looks.
const PAUSE_MS: (i64, i64) = (1_000, 60_000);

/// What the worker remembers between two looks.
pub struct Retention {
    due: i64,
    /// The setting (s) that this is about: a new one is looked at at once.
    kept_for: i64,
    /// What had changed last before this (µs since the Unix epoch) goes once the peer has this position.
    agreed: Option<(i64, u64)>,
    /// There is more of it than one transaction took.
    more: bool,
    /// How often somebody was using a part that could have been truncated.
    busy: u32,
}

/// What became of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cleared {
    Whole,
    Partly,
    /// Nothing of it yet: somebody is using it.
    Busy,
}

/// Statistics and decisions of removed records are kept; `{source}` has the records.
const KEEP: &str = "
    kept as (
        insert into tandem.conflict_removed (conflict_id, decision)
        select conflict_id, record -> 'decision' from {source} where status in ('resolved', 'ignored')
        on conflict (conflict_id) do update set decision = excluded.decision, removed_at = excluded.removed_at)
    insert into tandem.conflict_count as c (schema_name, table_name, conflict_type, removed, last_detected_at)
    select schema_name, table_name, conflict_type, count(*), max(detected_at) from {source}
    group by schema_name, table_name, conflict_type
    on conflict (schema_name, table_name, conflict_type) do update
    set removed = c.removed + excluded.removed,
        last_detected_at = greatest(c.last_detected_at, excluded.last_detected_at)";

impl Retention {
    pub fn new() -> Retention {
        Retention { due: boot_ms(), kept_for: -1, agreed: None, more: false, busy: 0 }
    }

    /// Removes what is due and settled.
    pub fn run(&mut self, database: &Database) -> Result<()> {
        let keep_seconds = i64::from(guc::CONFLICT_RETENTION.get());
        let now = boot_ms();
        if keep_seconds != self.kept_for {
            *self = Retention { kept_for: keep_seconds, ..Retention::new() };
        }
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
        let patient = self.busy < ATTEMPTS;
        let mut busy = false;
        for part in 0..PARTS {
            let cleared = process::transaction(|| clear_part(part, before, patient))?;
            self.more |= cleared != Cleared::Whole;
            busy |= cleared == Cleared::Busy;
        }
        self.busy = if busy { self.busy + 1 } else { 0 };
        if !self.more {
            self.agreed = None;
            process::transaction(|| forget_decisions(before))?;
        }
        Ok(())
    }
}

/// Removes from one part what last changed before a time.
fn clear_part(part: u32, before: i64, patient: bool) -> Result<Cleared> {
    let _superuser = ActingAs::superuser();
    let is_due = "status <> 'open' and changed_at < 'epoch'::timestamptz + $1 * interval '1 microsecond'";
    let any = format!("select exists (select from tandem.conflict_{part} where {is_due})");
    if query::value::<bool>(&any, &[before.into()])? != Some(true) {
        return Ok(Cleared::Whole);
    }
    match truncate_part(part, before, is_due)? {
        Some(Cleared::Busy) if !patient => {}
        Some(cleared) => return Ok(cleared),
        None => {}
    }
    let keep = KEEP.replace("{source}", "gone");
    let statement = format!(
        "with gone as (
             delete from tandem.conflict_{part} where conflict_id in (
                 select conflict_id from tandem.conflict_{part} where {is_due} limit $2 for update skip locked)
             returning conflict_id, schema_name, table_name, conflict_type, detected_at, status, record),
         {keep}"
    );
    Spi::run_with_args(&statement, &[before.into(), AT_ONCE.into()])?;
    let left = query::value::<bool>(&any, &[before.into()])? == Some(true);
    Ok(if left { Cleared::Partly } else { Cleared::Whole })
}

/// Empties a part at once if nobody is using it; none if something in it has to stay.
fn truncate_part(part: u32, before: i64, is_due: &str) -> Result<Option<Cleared>> {
    let stays = format!("select exists (select from tandem.conflict_{part} where not ({is_due}))");
    if query::value::<bool>(&stays, &[before.into()])? != Some(false) {
        return Ok(None);
    }
    let table = names::relation_oid(&format!("conflict_{part}"));
    let lock = pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: takes the lock or returns at once; it is held until the transaction ends.
    if !unsafe { pg_sys::ConditionalLockRelationOid(table, lock) } {
        return Ok(Some(Cleared::Busy));
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
    Ok(empty.then_some(Cleared::Whole))
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
