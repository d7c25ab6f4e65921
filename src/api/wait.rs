//! Waiting for the other side: read your writes, and "is it over there yet". Nothing here takes a
//! transaction id or runs a query while it waits.
use super::{answer, node};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::types::SqlPosition;
use crate::{capture, clock, registry, shmem};
use pgrx::datum::Interval;
use pgrx::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering::*};
use tandem_model::hlc::Hlc;

/// Longest sleep (ms) between two looks: not everything that is waited for wakes the sleepers.
const LONGEST_SLEEP_MS: i64 = 50;
/// A sleep is this part of the time waited so far, so that a short wait ends in good time.
const SLEEP_PART: i64 = 8;

#[pg_extern(volatile, parallel_restricted)]
fn last_position() -> SqlPosition {
    SqlPosition(capture::last_position())
}

#[pg_extern(volatile, parallel_unsafe)]
fn wait_for(position: SqlPosition, timeout: default!(Option<Interval>, "null")) -> bool {
    answer(node::require());
    let database = shmem::database();
    let own = database.node().is_some_and(|own| Hlc(position.0.0).node() == own);
    until(timeout, || match own {
        true => registry::horizon() >= position.0,
        false => database.applied.load(Acquire) >= position.0.0,
    })
}

#[pg_extern(volatile, parallel_unsafe)]
fn wait_for_peer(timeout: default!(Option<Interval>, "null")) -> bool {
    answer(require_peer());
    let database = shmem::database();
    let target = database.last_position.load(Acquire);
    let _waiter = PeerWaiter::enter(&database.peer_waiters);
    until(timeout, || database.acked.load(Acquire) >= target)
}

/// Tells the worker for as long as it lives that somebody waits for an acknowledgement.
struct PeerWaiter(&'static AtomicU32);

impl PeerWaiter {
    fn enter(count: &'static AtomicU32) -> PeerWaiter {
        count.fetch_add(1, AcqRel);
        shmem::wake_waiters();
        PeerWaiter(count)
    }
}

impl Drop for PeerWaiter {
    fn drop(&mut self) {
        self.0.fetch_sub(1, AcqRel);
    }
}

/// Sleeps until `done`, or for `timeout` (for ever without one); tells which.
fn until(timeout: Option<Interval>, done: impl Fn() -> bool) -> bool {
    let start = clock::boot_ms();
    let limit = timeout.map(|t| (t.as_micros() / 1000).clamp(0, i128::from(i64::MAX / 2)) as i64);
    loop {
        let commits = shmem::commits();
        if done() {
            return true;
        }
        let waited = clock::boot_ms() - start;
        let left = limit.map_or(LONGEST_SLEEP_MS, |limit| limit - waited);
        if left <= 0 {
            return false;
        }
        shmem::wait_for_commit(commits, left.min((waited / SLEEP_PART).clamp(1, LONGEST_SLEEP_MS)));
        pgrx::check_for_interrupts!();
    }
}

fn require_peer() -> Result<()> {
    node::require()?;
    let _catalog = ActingAs::superuser();
    if crate::pg::query::value::<bool>("select exists (select from tandem.peer)", &[])? == Some(true) {
        return Ok(());
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        "there is no peer to wait for",
        "SELECT tandem.add_peer('osaka', 'host=… dbname=…');",
    ))
}
