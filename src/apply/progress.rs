//! How far the peer's stream is applied: a row inserted by each local commit, read back at a start, and
//! what is published (to the peer, to waiting sessions) once that commit is flushed.
use super::PeerIdentity;
use crate::error::Result;
use crate::pg::heap::{self, Table};
use crate::pg::identity::ActingAs;
use crate::shmem;
use pgrx::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::AcqRel;
use tandem_model::hlc::{Hlc, Mark, Position};

/// Rows in one of the two tables before the other one takes its turn.
const MAX_ROWS: i64 = 10_000;

/// What a progress row says.
#[derive(Debug, Clone, Copy, Default)]
pub struct State {
    /// Everything of the peer's stream up to here is applied (or held).
    pub applied: Mark,
    /// What the peer may be told: the same, or the place before the first held transaction.
    pub seen: Mark,
    /// What of our stream the peer has, durably.
    pub acked: Mark,
    /// With held changes our own stable point stays: they were made by somebody who had not seen it.
    pub frozen: bool,
    pub stable_peer: Hlc,
}

impl State {
    fn stable_own(&self) -> Hlc {
        let database = shmem::database();
        let present = Hlc(database.stable_own.load(std::sync::atomic::Ordering::Acquire));
        if self.frozen { present } else { present.max(Hlc(self.acked.low.0.min(self.acked.position.0))) }
    }
}

/// A commit that is not known to be flushed.
struct Pending {
    end: pg_sys::XLogRecPtr,
    state: State,
}

/// Which table takes the rows, and what waits to be published.
pub struct Progress {
    table: u32,
    rows: i64,
    pending: VecDeque<Pending>,
}

impl Progress {
    /// Reads back the greatest row of the peer. Needs a transaction.
    pub fn recover(peer: &PeerIdentity) -> Result<(Progress, Option<State>)> {
        const QUERY: &str = "
            with progress as (
                select 0 as number, * from tandem.progress_0 union all select 1, * from tandem.progress_1
            )
            select number, \"position\"::int8, low::int8, seen::int8, seen_low::int8, acked::int8, stable_peer::int8,
                   (select count(*) from progress p where p.number = l.number)
            from progress l where peer = $1
            order by l.\"position\" desc, l.seen desc, l.acked desc, l.stable_peer desc limit 1";
        let _superuser = ActingAs::superuser();
        Spi::connect(|client| {
            let row = client.select(QUERY, Some(1), &[peer.name.as_str().into()])?.first();
            if row.is_empty() {
                return Ok((Progress { table: 0, rows: 0, pending: VecDeque::new() }, None));
            }
            let value = |i| -> Result<u64> { Ok(row.get::<i64>(i)?.unwrap_or(0) as u64) };
            let mark = |i| -> Result<Mark> { Ok(Mark { position: Position(value(i)?), low: Hlc(value(i + 1)?) }) };
            let state = State {
                applied: mark(2)?,
                seen: mark(4)?,
                acked: Mark { position: Position(value(6)?), low: Hlc(0) },
                frozen: false,
                stable_peer: Hlc(value(7)?),
            };
            let table = row.get::<i32>(1)?.unwrap_or(0) as u32;
            Ok((Progress { table, rows: value(8)? as i64, pending: VecDeque::new() }, Some(state)))
        })
    }

    /// Adds a row to this transaction.
    pub fn insert(&mut self, peer: &PeerIdentity, state: &State) {
        let _superuser = ActingAs::superuser();
        let table = Table::open(&format!("progress_{}", self.table), pg_sys::RowExclusiveLock);
        let mut nonce = *peer.nonce.as_bytes();
        // SAFETY: a text value in the current memory context.
        let name = unsafe { pg_sys::cstring_to_text_with_len(peer.name.as_ptr().cast(), peer.name.len() as i32) };
        table.insert(&[
            Some(name.into()),
            Some(pg_sys::Datum::from(nonce.as_mut_ptr())),
            heap::int8(state.applied.position.0),
            heap::int8(state.applied.low.0),
            heap::int8(state.seen.position.0),
            heap::int8(state.seen.low.0),
            heap::int8(state.acked.position.0),
            heap::int8(state.stable_own().0),
            heap::int8(state.stable_peer.0),
        ]);
        self.rows += 1;
    }

    /// True if the other table should take its turn: [`Progress::turn`].
    pub fn is_full(&self) -> bool {
        self.rows > MAX_ROWS
    }

    /// Empties the other table and goes on there. The present one keeps the greatest row until it is its
    /// turn to be emptied. Needs a transaction of its own; an error (a reader holds a lock) is no harm.
    pub fn turn(&self) -> Result<u32> {
        let other = 1 - self.table;
        let _superuser = ActingAs::superuser();
        Spi::connect_mut(|client| {
            client.update(format!("truncate tandem.progress_{other}").as_str(), None, &[]).map(drop)
        })?;
        Ok(other)
    }

    /// The turn is committed.
    pub fn turned(&mut self, table: u32) {
        (self.table, self.rows) = (table, 0);
    }

    /// The turn did not work: not again before as many rows more.
    pub fn not_turned(&mut self) {
        self.rows -= MAX_ROWS / 10;
    }

    /// A transaction with a row of this state was committed just now.
    pub fn committed(&mut self, state: State) {
        // SAFETY: set by the commit before.
        let end = unsafe { pg_sys::XactLastCommitEnd };
        self.pending.push_back(Pending { end, state });
        shmem::database().applied.fetch_max(state.applied.position.0, AcqRel);
        shmem::wake_waiters();
        self.publish();
    }

    /// The peer's stream went on without anything to write down.
    pub fn passed(&mut self, state: State) {
        match self.pending.back_mut() {
            Some(last) => last.state.seen = state.seen,
            None => shmem::database().publish_seen(state.seen),
        }
        shmem::database().applied.fetch_max(state.applied.position.0, AcqRel);
        shmem::wake_waiters();
    }

    /// Publishes what is flushed.
    pub fn publish(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        // SAFETY: reads a shared counter.
        let flushed = unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) };
        let mut latest = None;
        while let Some(first) = self.pending.front().filter(|p| p.end <= flushed) {
            latest = Some(first.state);
            self.pending.pop_front();
        }
        let Some(state) = latest else { return };
        let database = shmem::database();
        if state.frozen {
            database.acked.fetch_max(state.acked.position.0, AcqRel);
        } else if !state.acked.position.is_zero() {
            database.acknowledge(state.acked);
        }
        database.raise_stable_peer(state.stable_peer);
        database.publish_seen(state.seen);
        shmem::wake_waiters();
    }

    /// Flushes and publishes everything.
    pub fn flush(&mut self) {
        if let Some(last) = self.pending.back() {
            // SAFETY: the end of a commit record of this server.
            unsafe { pg_sys::XLogFlush(last.end) };
            self.publish();
        }
    }
}
