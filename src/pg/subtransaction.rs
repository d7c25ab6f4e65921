//! A part of a transaction that may fail by itself.
use crate::error::{self, Result};
use pgrx::prelude::*;

/// Runs `f` in a subtransaction: on an error, Postgres's or ours, what it did is undone and the error comes
/// back; the transaction goes on. What `f` opens it must close, unless it fails.
pub fn run<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: the pattern of Postgres's own procedural languages: memory context and resource owner are those
    // of before on both ways out.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(context);
        let result = error::catch(f);
        pg_sys::MemoryContextSwitchTo(context);
        match &result {
            Ok(_) => pg_sys::ReleaseCurrentSubTransaction(),
            Err(_) => pg_sys::RollbackAndReleaseCurrentSubTransaction(),
        }
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::CurrentResourceOwner = owner;
        result
    }
}
