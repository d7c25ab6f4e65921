//! Displaced rows are asked again: after a commit, by the peer or by a local user, that may have freed what they
//! wait for. What shows is derived, so this may happen at any time, and repeats nothing if nothing has changed.
use super::batch::Batch;
use super::careful;
use super::row::key_bytes;
use super::{Applier, conflict, report, session};
use crate::displaced;
use crate::error::{self, Result};
use crate::pg::identity::ActingAs;
use crate::shmem;
use crate::value;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};
use tandem_model::record::Record;

/// Rest between two rounds, and for how much longer than a round took: many displaced rows must not slow down
/// what is applied.
const PACE: Duration = Duration::from_millis(20);
const RATIO: u32 = 10;

/// When the displaced rows were asked last.
#[derive(Default)]
pub struct Rounds {
    /// Position of our last commit, and of what was applied last.
    seen: (u64, u64),
    due: Option<Instant>,
}

impl Applier {
    /// How long until displaced rows are due to be asked; none if nothing has changed for them.
    pub fn reconsiders_in(&self) -> Option<Duration> {
        let waits = displaced::any() && self.rounds.seen != self.now();
        let due = self.rounds.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
        waits.then_some(due)
    }

    /// Position of our last commit, and of what was applied last.
    fn now(&self) -> (u64, u64) {
        (shmem::database().last_position.load(Acquire), self.state.applied.position.0)
    }

    /// Asks the displaced rows again, if there are any and something has changed since they were asked last.
    pub fn reconsider(&mut self) -> Result<()> {
        if self.reconsiders_in() != Some(Duration::ZERO) {
            return Ok(());
        }
        let now = self.now();
        let started = Instant::now();
        self.make_room();
        let asked = session::transaction(|| {
            let mut batch = Batch::new(&mut *self, true);
            error::catch(|| batch.ask_again())?;
            batch.end_of_source()?;
            batch.close_settled()?;
            let left = !displaced::all(None)?.is_empty();
            Ok((batch.finish()?, left))
        })
        .map_err(|e| report::name_peer(e, &self.peer.name));
        self.rounds.due = Some(Instant::now() + PACE.max(started.elapsed() * RATIO));
        let ((state, newly_held), left) = asked?;
        self.committed(state, newly_held);
        self.rounds.seen = now;
        if !left {
            // Nobody but this process sets rows aside.
            shmem::database().has_displaced.store(false, Release);
        }
        Ok(())
    }
}

impl Batch<'_> {
    /// Puts every displaced row that may show by now up for its place.
    fn ask_again(&mut self) -> Result<()> {
        for listed in displaced::all(None)? {
            careful::ask(&mut self.tables, &mut self.work, &listed)?;
        }
        Ok(())
    }

    /// Closes the open records of rows that show again, or are gone.
    fn close_settled(&mut self) -> Result<()> {
        for relid in with_open_records()? {
            let Ok(rel) = crate::relation::synced_by_oid(relid) else { continue };
            for record in conflict::open_of_constraints(&rel)? {
                let Some(key) = stored_key(&rel, &record) else { continue };
                if displaced::find(relid, &key).is_none() {
                    conflict::supersede(record, "what kept the row out is gone", &mut self.work)?;
                }
            }
        }
        Ok(())
    }
}

/// The key of a record as displaced rows are known by; none if the table's key is another one by now.
fn stored_key(rel: &crate::relation::SyncedRelation, record: &Record) -> Option<Vec<u8>> {
    let key: serde_json::Map<String, serde_json::Value> = serde_json::from_str(record.key.get()).ok()?;
    let values: Option<Vec<_>> = rel
        .key
        .iter()
        .map(|i| key.get(&rel.columns[*i].name).and_then(|value| value::from_json(&rel.columns[*i], value)))
        .collect();
    Some(key_bytes(rel, &values?))
}

/// Synced tables of which a constraint keeps rows out, by what is on record.
fn with_open_records() -> Result<Vec<pg_sys::Oid>> {
    let query = "select distinct s.relid::oid from tandem.conflict f
                 join pg_catalog.pg_namespace n on n.nspname = f.schema_name
                 join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = f.table_name
                 join tandem.synced_table s on s.relid = c.oid
                 where f.status = 'open' and f.constraint_name is not null";
    let _superuser = ActingAs::superuser();
    Spi::connect_mut(|client| {
        let mut found = Vec::new();
        for row in client.update(query, None, &[])? {
            found.extend(row.get::<pg_sys::Oid>(1)?);
        }
        Ok(found)
    })
}
