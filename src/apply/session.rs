//! The worker's own transactions, and the settings under which it applies.
use super::announce;
use crate::error::{self, Result};
use crate::guc;
use pgrx::prelude::*;
use std::ffi::{CStr, CString};

/// Longest wait (ms) for a lock while those of an earlier source transaction are held: a commit under way ends in it.
const BRIEF_WAIT_MS: i32 = 10;

/// Settings for the life of the worker.
const SETTINGS: &[(&CStr, &CStr)] = &[
    (c"session_replication_role", c"replica"),
    // Schema tandem for the operators of its own types; it belongs to a superuser.
    (c"search_path", c"pg_catalog, tandem, pg_temp"),
    // The name of a violated constraint is read from the message.
    (c"lc_messages", c"C"),
    (c"statement_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    (c"row_security", c"off"),
];

/// Prepares this process for applying.
pub fn prepare() {
    for (name, value) in SETTINGS {
        // SAFETY: as a superuser's session, above what ALTER ROLE or ALTER DATABASE say.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}

fn set_local(name: &CStr, value: &CStr) {
    // SAFETY: a setting that exists, until the end of the transaction.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

/// Local users have the right of way: the apply gives up before Postgres looks for deadlocks.
fn lock_timeout(longest_ms: i32) -> CString {
    // SAFETY: reads a setting.
    let deadlock = unsafe { pg_sys::DeadlockTimeout };
    let ms = longest_ms.min(guc::APPLY_LOCK_TIMEOUT.get()).min(deadlock.saturating_sub(1)).max(1);
    CString::new(format!("{ms}ms")).unwrap_or_default()
}

/// From here to the end of the transaction no lock is waited for long.
pub fn wait_briefly() {
    set_local(c"lock_timeout", &lock_timeout(BRIEF_WAIT_MS));
}

/// Does a session wait for this transaction to end, for a row that it has changed or locked, say?
pub fn is_waited_for() -> bool {
    // SAFETY: looks into the lock table for a lock that this process holds once it has an id.
    unsafe {
        let id = pg_sys::GetTopTransactionIdIfAny();
        if id == pg_sys::InvalidTransactionId {
            return false;
        }
        let tag = pg_sys::LOCKTAG {
            locktag_field1: id.into_inner(),
            locktag_field2: 0,
            locktag_field3: 0,
            locktag_field4: 0,
            locktag_type: pg_sys::LockTagType::LOCKTAG_TRANSACTION as u8,
            locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
        };
        pg_sys::LockHasWaiters(&tag, pg_sys::ExclusiveLock as i32, false)
    }
}

/// Runs `f` in a transaction of its own and commits it; on an error it is aborted.
pub fn transaction<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: no transaction is open in this process, which belongs to the worker; each step pairs with
    // the commit or the abort below.
    let result = error::catch(|| unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        set_local(c"synchronous_commit", c"off");
        set_local(c"lock_timeout", &lock_timeout(i32::MAX));
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let value = f()?;
        if pg_sys::ActiveSnapshotSet() {
            pg_sys::PopActiveSnapshot();
        }
        pg_sys::CommitTransactionCommand();
        pg_sys::pgstat_report_stat(false);
        Ok(value)
    });
    if result.is_err() {
        // SAFETY: ends whatever state the error left; does nothing if there is no transaction.
        unsafe { pg_sys::AbortCurrentTransaction() };
        announce::aborted();
    } else {
        announce::committed();
    }
    result
}

/// A new snapshot for the next source transaction.
pub fn renew_snapshot() {
    // SAFETY: transaction() pushed one.
    unsafe {
        pg_sys::PopActiveSnapshot();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
}
