//! The exchange worker of one database: a background worker that looks for the peer and, while there is
//! one, runs the exchange with it. It ends where there is none, or when it has gone.
use crate::error::Result;
use crate::exchange::catalog::{self, Peer};
use crate::exchange::driver::Driver;
use crate::exchange::status::State;
use crate::exchange::{incarnation, process};
use crate::shmem;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;

/// Entry point of the background worker; the argument is the database's oid.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn tandem_exchange_main(argument: pg_sys::Datum) {
    process::begin();
    process::connect(Some(pg_sys::Oid::from(argument.value() as u32)));
    process::report_activity(false, "tandem exchange");
    if let Err(error) = run() {
        // The supervisor starts it again, with a pause.
        if is_installed() {
            let status = &shmem::entry().worker;
            status.note_error(&error);
            status.enter(State::Stopped, &error.message, error.hint.as_deref());
        }
        pgrx::warning!("tandem exchange has to start anew: {error}");
    }
}

fn is_installed() -> bool {
    process::transaction(|| Ok(process::extension_installed())).unwrap_or(false)
}

fn run() -> Result<()> {
    let Some(peer) = find_peer()? else { return Ok(()) };
    let database = shmem::entry();
    database.worker.begin(&peer.name);
    // SAFETY: called once, in this process; it only writes to shared memory.
    unsafe { pg_sys::before_shmem_exit(Some(at_exit), pg_sys::Datum::from(0usize)) };
    incarnation::ensure()?;
    let mut driver = Driver::new(database, peer);
    while driver.turn()? {}
    // Whoever waits for this peer looks again.
    shmem::wake_waiters();
    Ok(())
}

/// The peer, if this database is a node and has one; says in shared memory whether a worker is needed.
fn find_peer() -> Result<Option<Peer>> {
    if !is_installed() {
        if let Some(database) = shmem::entry_if_any() {
            database.worker.wanted.store(0, Release);
        }
        return Ok(None);
    }
    let peer = catalog::peer()?;
    let node = process::transaction(|| Ok(shmem::database().node()))?;
    let peer = peer.filter(|_| node.is_some());
    if peer.is_none() {
        shmem::entry().worker.wanted.store(0, Release);
    }
    Ok(peer)
}

#[pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: i32, _argument: pg_sys::Datum) {
    if let Some(database) = shmem::entry_if_any() {
        database.worker.end();
    }
}
