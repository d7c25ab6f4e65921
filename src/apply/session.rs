//! The worker's own transactions, and the settings under which it applies.
use super::announce;
use crate::error::{self, Result};
use crate::guc;
use pgrx::prelude::*;
use std::ffi::{CStr, CString};

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
fn lock_timeout() -> CString {
    // SAFETY: reads a setting.
    let deadlock = unsafe { pg_sys::DeadlockTimeout };
    let ms = guc::APPLY_LOCK_TIMEOUT.get().min(deadlock.saturating_sub(1)).max(1);
    CString::new(format!("{ms}ms")).unwrap_or_default()
}

/// Runs `f` in a transaction of its own and commits it; on an error it is aborted.
pub fn transaction<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: no transaction is open in this process, which belongs to the worker; each step pairs with
    // the commit or the abort below.
    let result = error::catch(|| unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        set_local(c"synchronous_commit", c"off");
        set_local(c"lock_timeout", &lock_timeout());
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
