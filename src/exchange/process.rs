//! What a background worker of ours is as a process: its signals, its latch, its transactions.
//!
//! It can always be stopped at once: SIGTERM goes to Postgres's own `die`, which ends it at the next
//! interrupt check, also while it waits for a lock, and every wait below checks.
use crate::error::{self, Result};
use pgrx::prelude::*;
use std::ffi::{CString, c_int};

// The handler itself, not pgrx's guarded wrapper of it: a signal may arrive anywhere.
unsafe extern "C-unwind" {
    fn die(signal: c_int);
    fn SignalHandlerForConfigReload(signal: c_int);
}

/// Installs the signal handlers; first thing in a worker's main function.
pub fn begin() {
    let handle = |signal: u32, handler: unsafe extern "C-unwind" fn(c_int)| {
        // SAFETY: signals are blocked until the handlers are in place.
        #[cfg(not(feature = "pg18"))]
        unsafe {
            pg_sys::pqsignal(signal as c_int, Some(handler));
        }
        // SAFETY: as above.
        #[cfg(feature = "pg18")]
        unsafe {
            pg_sys::pqsignal_be(signal as c_int, Some(handler));
        }
    };
    handle(pg_sys::SIGTERM, die);
    handle(pg_sys::SIGHUP, SignalHandlerForConfigReload);
    // SAFETY: once, in a background worker.
    unsafe { pg_sys::BackgroundWorkerUnblockSignals() };
}

/// Connects to a database, or (`None`) to the shared catalogs only. FATAL if the database is gone.
pub fn connect(database: Option<pg_sys::Oid>) {
    // SAFETY: once, in a background worker that asked for a database connection.
    unsafe {
        match database {
            Some(oid) => pg_sys::BackgroundWorkerInitializeConnectionByOid(oid, pg_sys::InvalidOid, 0),
            None => pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0),
        }
    }
}

/// What a wait waits for beside the latch and the time.
#[derive(Debug, Clone, Copy)]
pub struct Socket {
    pub fd: i32,
    pub readable: bool,
    pub writable: bool,
}

/// Waits until the latch is set, the socket is ready or the time (ms) is over. Processes interrupts (and
/// doesn't return if the process shall end) and a changed configuration. True if the socket is ready.
pub fn wait(socket: Option<Socket>, timeout_ms: i64) -> bool {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    let mut fd = pg_sys::PGINVALID_SOCKET;
    if let Some(socket) = socket.filter(|s| s.fd >= 0) {
        fd = socket.fd;
        events |= if socket.readable { pg_sys::WL_SOCKET_READABLE } else { 0 };
        events |= if socket.writable { pg_sys::WL_SOCKET_WRITEABLE } else { 0 };
    }
    let timeout = timeout_ms.clamp(0, 3_600_000);
    // SAFETY: the process's own latch; the socket is open while its owner is borrowed by the caller.
    let woken = unsafe {
        let woken = pg_sys::WaitLatchOrSocket(pg_sys::MyLatch, events as c_int, fd, timeout, pg_sys::PG_WAIT_EXTENSION);
        if woken & pg_sys::WL_LATCH_SET as c_int != 0 {
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
        woken
    };
    check();
    woken & (pg_sys::WL_SOCKET_READABLE | pg_sys::WL_SOCKET_WRITEABLE) as c_int != 0
}

/// Processes interrupts and a changed configuration without waiting.
pub fn check() {
    pgrx::check_for_interrupts!();
    // SAFETY: a flag of this process, and the reaction that every Postgres process has to it.
    unsafe {
        if (&raw const pg_sys::ConfigReloadPending).read_volatile() != 0 {
            (&raw mut pg_sys::ConfigReloadPending).write_volatile(0);
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// Runs `f` in a transaction of its own. An error, also one of the commit, aborts it and comes back.
pub fn transaction<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    let result = error::catch(|| {
        // SAFETY: no transaction is open in this process; the snapshot is popped below or by the abort.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        let result = f()?;
        // SAFETY: ends what was begun above.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(result)
    });
    if result.is_err() {
        // SAFETY: the transaction is open or failed; nothing of it is in use any more.
        unsafe { pg_sys::AbortCurrentTransaction() };
    }
    result
}

/// What `pg_stat_activity` shows of this process.
pub fn report_activity(working: bool, what: &str) {
    let text = CString::new(what.replace('\0', "")).unwrap_or_default();
    let state = if working { pg_sys::BackendState::STATE_RUNNING } else { pg_sys::BackendState::STATE_IDLE };
    // SAFETY: copies the text.
    unsafe { pg_sys::pgstat_report_activity(state, text.as_ptr()) };
}

/// Sends collected table statistics, as a session does between statements. Not inside a transaction.
pub fn report_statistics() {
    // SAFETY: no transaction is open.
    unsafe { pg_sys::pgstat_report_stat(false) };
}

/// Returns when the WAL up to `lsn` is on disk.
pub fn flush_to(lsn: u64) {
    // SAFETY: `lsn` is the end of a record that was inserted.
    unsafe { pg_sys::XLogFlush(lsn) };
}

/// The id of this process.
pub fn pid() -> i32 {
    // SAFETY: set at its start.
    unsafe { pg_sys::MyProcPid }
}

/// True if the extension is (still) installed in this database. In a transaction.
pub fn extension_installed() -> bool {
    // SAFETY: a catalog lookup with missing_ok.
    unsafe { pg_sys::get_extension_oid(c"tandem".as_ptr(), true) != pg_sys::InvalidOid }
}

/// Sets the latch of another process of this server, if it is there.
pub fn wake(pid: i32) {
    if pid == 0 {
        return;
    }
    // SAFETY: PGPROC entries live in shared memory for good; waking the wrong process is harmless.
    unsafe {
        let process = pg_sys::BackendPidGetProc(pid);
        if !process.is_null() {
            pg_sys::SetLatch(&raw mut (*process).procLatch);
        }
    }
}

/// True if a process of this id is connected to this server.
pub fn is_alive(pid: i32) -> bool {
    // SAFETY: looks into the list of processes.
    pid != 0 && unsafe { !pg_sys::BackendPidGetProc(pid).is_null() }
}
