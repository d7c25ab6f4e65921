//! What the worker does beside the stream, about once a second: it keeps the stable point durable, collects
//! tombstones, truncates the journal, has old conflicts leave the history, answers the peer's wishes for
//! policies, and writes the rare heartbeat.
use crate::clock::boot_ms;
use crate::error::{Class, Result};
use crate::exchange::process;
use crate::exchange::retention::Retention;
use crate::shmem::Database;
use crate::{apply, capture, journal, policy, tombstone};
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::NodeId;
use tandem_model::policy_log::arbiter;

/// Pace (ms) of everything here.
const PACE_MS: i64 = 1_000;
/// Tombstones collected in one transaction.
const TOMBSTONES_AT_ONCE: usize = 1_000;
/// No commit for so long (ms): then what the last ones left unstable is worth a heartbeat.
const QUIET_MS: i64 = 2_000;

/// When what was done last, and what the rates are counted from.
pub struct Housekeeping {
    due: i64,
    counted: (u64, u64),
    counted_at: i64,
    /// The newest position that was seen, since when, and the heartbeat that was written for it.
    newest: u64,
    newest_since: i64,
    heartbeat: u64,
    retention: Retention,
}

impl Housekeeping {
    pub fn new(database: &Database) -> Housekeeping {
        let now = boot_ms();
        let counted = database.worker.counts();
        let retention = Retention::new();
        Housekeeping { due: now, counted, counted_at: now, newest: 0, newest_since: now, heartbeat: 0, retention }
    }

    /// How long (ms) until there is something to do.
    pub fn due_in(&self, now: i64) -> i64 {
        (self.due - now).max(0)
    }

    /// Does what is due; `idle`: there is nothing else to do.
    pub fn run(&mut self, database: &Database, peer: Option<NodeId>, idle: bool) -> Result<()> {
        let now = boot_ms();
        if now < self.due {
            return Ok(());
        }
        self.due = now + PACE_MS;
        self.rates(database, now);
        persist_stable(database)?;
        process::transaction(journal::maintain)?;
        self.retention.run(database)?;
        apply::sum_up_log();
        if let (Some(own), Some(peer)) = (database.node(), peer) {
            answer_wishes(own, peer)?;
        }
        if let (true, Some(own), Some(peer)) = (idle, database.node(), peer) {
            process::transaction(|| tombstone::collect(TOMBSTONES_AT_ONCE, own, peer))?;
            process::transaction(|| apply::forget_reinstated(TOMBSTONES_AT_ONCE))?;
            self.heartbeat(database, now)?;
        }
        process::report_statistics();
        Ok(())
    }

    fn rates(&mut self, database: &Database, now: i64) {
        let counts = database.worker.counts();
        let elapsed = (now - self.counted_at).max(1) as u64;
        let rate = |now: u64, before: u64| now.saturating_sub(before) * 1000 / elapsed;
        database.worker.set_rates(rate(counts.0, self.counted.0), rate(counts.1, self.counted.1));
        self.counted = counts;
        self.counted_at = now;
    }

    /// Transactions that ran beside each other leave the stable point below their versions until the next
    /// commit. At rest there is none: one heartbeat takes its place, once.
    fn heartbeat(&mut self, database: &Database, now: i64) -> Result<()> {
        let newest = database.last_position.load(Acquire);
        if newest != self.newest {
            self.newest = newest;
            self.newest_since = now;
        }
        let acked = database.acked.load(Acquire);
        let behind = acked >= newest && database.stable_own.load(Acquire) < newest;
        if newest == 0 || newest == self.heartbeat || !behind || now - self.newest_since < QUIET_MS {
            return Ok(());
        }
        process::transaction(|| {
            capture::heartbeat();
            Ok(())
        })?;
        self.heartbeat = capture::last_position().0;
        Ok(())
    }
}

/// As the arbiter, answers what the peer wishes for the policy log. A wish whose table is busy waits.
fn answer_wishes(own: NodeId, peer: NodeId) -> Result<()> {
    if arbiter(own, peer) != own {
        return Ok(());
    }
    for (relid, wish) in process::transaction(|| policy::wishes(peer))? {
        match process::transaction(|| policy::grant(relid, wish)) {
            Ok(()) => {}
            Err(busy) if busy.class == Class::Retry => {}
            Err(error) => process::transaction(|| policy::refuse(relid, wish, &error))?,
        }
    }
    Ok(())
}

/// A stable point is announced only once it can't be lost.
fn persist_stable(database: &Database) -> Result<()> {
    let stable = database.stable_own.load(Acquire);
    if stable <= database.worker.announced_stable.load(Acquire) {
        return Ok(());
    }
    process::transaction(|| {
        Spi::run("set local synchronous_commit = local")?;
        Spi::run_with_args(
            "update tandem.journal_trim set stable = $1::int8::tandem.hlc where stable::int8 < $1",
            &[(stable as i64).into()],
        )?;
        Ok(())
    })?;
    database.worker.announced_stable.fetch_max(stable, AcqRel);
    Ok(())
}
