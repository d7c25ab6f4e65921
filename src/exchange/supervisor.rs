//! The supervisor: a static background worker that keeps one exchange worker running per database that
//! has a peer.
//!
//! After a start it has every database looked into once; from then on only those that use Tandem (they
//! have an entry in shared memory), when their catalog changes. The looking is done by the exchange worker
//! itself: it ends at once where there is no peer, and says so in its status.
use crate::clock::boot_ms;
use crate::error::{Error, Result};
use crate::exchange::process;
use crate::exchange::status::State;
use crate::shmem::{self, Database};
use pgrx::bgworkers::{BackgroundWorkerBuilder, BackgroundWorkerStatus, DynamicBackgroundWorker};
use pgrx::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

/// How often (ms) shared memory is looked at though nobody woke us.
const PACE_MS: i64 = 1_000;
/// A change may be told before it is committed: look again after so many ms.
const LOOKS_MS: [i64; 3] = [0, 500, 3_000];
/// Pauses before a worker that ended is started again.
const FIRST_DELAY_MS: i64 = 200;
const LONGEST_DELAY_MS: i64 = 10_000;
/// A worker that ran so long is not failing over and over.
const STEADY_MS: i64 = 30_000;
/// Databases not known to have a peer that are looked into at the same time.
const LOOKING_AT_ONCE: usize = 2;

/// `datconnlimit` of a database whose DROP was interrupted.
const HALF_DROPPED: i32 = -2;

/// Registers the supervisor. On a standby it starts when that is promoted.
pub fn register() {
    BackgroundWorkerBuilder::new("tandem supervisor")
        .set_type("tandem supervisor")
        .set_library("tandem")
        .set_function("tandem_supervisor_main")
        .enable_spi_access()
        .set_restart_time(Some(Duration::from_secs(5)))
        .load();
}

/// One database as the supervisor sees it.
struct Watched {
    oid: pg_sys::Oid,
    worker: Option<DynamicBackgroundWorker>,
    /// When (ms since boot) to start a worker; none: it is not needed.
    due: Option<i64>,
    started: i64,
    failures: u32,
    /// Looks that are left, of [`LOOKS_MS`], and the catalog's generation that they are for.
    looks: usize,
    generation: u64,
    /// It was not yet logged that no slot is free.
    quiet: bool,
}

impl Watched {
    fn new(oid: pg_sys::Oid, generation: u64) -> Watched {
        Watched { oid, worker: None, due: Some(0), started: 0, failures: 0, looks: 1, generation, quiet: true }
    }

    fn entry(&self) -> Option<&'static Database> {
        shmem::region().databases.iter().find(|d| d.oid.load(Acquire) == self.oid.to_u32())
    }

    /// True if a worker is there, ours or one of a supervisor before us.
    fn is_running(&mut self, now: i64) -> bool {
        match self.worker.as_ref().map(DynamicBackgroundWorker::pid) {
            Some(Ok(_) | Err(BackgroundWorkerStatus::NotYetStarted)) => return true,
            Some(Err(_)) => {
                self.worker = None;
                self.ended(now);
            }
            None => {}
        }
        self.entry().is_some_and(|d| process::is_alive(d.worker.pid.load(Acquire)))
    }

    /// A worker has ended: wanted again, looked again, or not needed.
    fn ended(&mut self, now: i64) {
        let wanted = self.entry().is_some_and(|d| d.worker.wanted.load(Acquire) != 0);
        self.failures = if now - self.started > STEADY_MS { 0 } else { self.failures.saturating_add(1) };
        let delay = FIRST_DELAY_MS.saturating_mul(1 << self.failures.min(10)).min(LONGEST_DELAY_MS);
        self.due = match (wanted, LOOKS_MS.get(self.looks)) {
            (true, _) => Some(now + delay),
            (false, Some(pause)) => Some(now + pause),
            (false, None) => None,
        };
        self.looks += 1;
    }

    /// Notices a change of the database's catalog.
    fn notice(&mut self, now: i64) {
        let generation = self.entry().map_or(0, |d| d.catalog_generation.load(Acquire));
        if generation != self.generation {
            self.generation = generation;
            self.looks = 1;
            self.failures = 0;
            self.due = Some(now);
        }
    }

    fn start(&mut self, now: i64) {
        let worker = BackgroundWorkerBuilder::new("tandem exchange")
            .set_type("tandem exchange")
            .set_library("tandem")
            .set_function("tandem_exchange_main")
            .enable_spi_access()
            .set_argument(Some(pg_sys::Datum::from(self.oid)))
            .set_notify_pid(process::pid())
            .load_dynamic();
        self.started = now;
        match worker {
            Ok(worker) => {
                self.worker = Some(worker);
                self.due = None;
                self.quiet = true;
            }
            Err(_) => {
                self.due = Some(now + LONGEST_DELAY_MS / 2);
                if std::mem::take(&mut self.quiet) {
                    pgrx::warning!("tandem supervisor: no background worker slot is free; raise max_worker_processes");
                }
                let Some(database) = self.entry() else { return };
                let error = Error::operator(
                    PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                    "no background worker slot is free for the exchange",
                    "Raise max_worker_processes and restart the server; see SELECT * FROM tandem.check();",
                );
                database.worker.note_error(&error);
                database.worker.enter(State::Stopped, &error.message, error.hint.as_deref());
            }
        }
    }
}

/// Entry point of the background worker.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn tandem_supervisor_main(_argument: pg_sys::Datum) {
    process::begin();
    process::connect(None);
    shmem::region().supervisor.store(process::pid(), Release);
    let mut watched: BTreeMap<u32, Watched> = match databases() {
        Ok(found) => found.into_iter().map(|oid| (oid.to_u32(), Watched::new(oid, 0))).collect(),
        Err(error) => error.raise(),
    };
    loop {
        let now = boot_ms();
        for database in &shmem::region().databases {
            let oid = database.oid.load(Acquire);
            if oid != 0 {
                watched.entry(oid).or_insert_with(|| Watched::new(pg_sys::Oid::from(oid), 0));
            }
        }
        if let Err(error) = turn(&mut watched, now) {
            pgrx::warning!("tandem supervisor: {error}");
        }
        process::wait(None, PACE_MS);
    }
}

/// Starts what is due.
fn turn(watched: &mut BTreeMap<u32, Watched>, now: i64) -> Result<()> {
    let mut looking = 0;
    let mut due = Vec::new();
    for (oid, database) in watched.iter_mut() {
        database.notice(now);
        let known = database.entry().is_some_and(|d| d.worker.wanted.load(Acquire) != 0);
        if database.is_running(now) {
            looking += usize::from(!known);
        } else if database.due.is_some_and(|due| due <= now) {
            due.push((*oid, known));
        }
    }
    if due.is_empty() {
        return Ok(());
    }
    let present = databases()?;
    for (oid, known) in due {
        if !present.iter().any(|p| p.to_u32() == oid) {
            forget(oid);
            watched.remove(&oid);
            continue;
        }
        looking += usize::from(!known);
        if (known || looking <= LOOKING_AT_ONCE)
            && let Some(database) = watched.get_mut(&oid)
        {
            database.start(now);
        }
    }
    Ok(())
}

/// The database was dropped: nobody can be connected to it, its entry is free.
fn forget(oid: u32) {
    let _lock = shmem::Locked::exclusive();
    if let Some(database) = shmem::region().databases.iter().find(|d| d.oid.load(Acquire) == oid) {
        database.reset();
        database.worker.forget();
        database.oid.store(0, Release);
    }
}

/// Databases that can be connected to, templates excepted: a worker there would be in the way of
/// CREATE DATABASE.
fn databases() -> Result<Vec<pg_sys::Oid>> {
    process::transaction(|| {
        let mut found = Vec::new();
        // SAFETY: a scan of a shared catalog under a catalog snapshot; rows have the catalog's form. This
        // process is connected to no database, so there is no SPI.
        unsafe {
            let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
            let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let row = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
                let open = (*row).datallowconn && (*row).datconnlimit != HALF_DROPPED;
                if open && !(*row).datistemplate {
                    found.push((*row).oid);
                }
            }
            pg_sys::table_endscan(scan);
            pg_sys::table_close(relation, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        }
        Ok(found)
    })
}
