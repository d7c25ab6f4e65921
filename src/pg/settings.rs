//! Settings changed for a moment.
use pgrx::prelude::*;
use std::ffi::CStr;

/// Settings within a nest level that ends when this is dropped (or with an abort).
pub struct Local(i32);

impl Local {
    /// Sets each; the caller has the rights of the current user.
    pub fn new(settings: &[(&CStr, &CStr)]) -> Local {
        // SAFETY: a nest level that Drop (or an abort) ends.
        let level = unsafe { pg_sys::NewGUCNestLevel() };
        for (name, value) in settings {
            // SAFETY: raises if the setting is unknown or not allowed.
            unsafe {
                let context =
                    if pg_sys::superuser() { pg_sys::GucContext::PGC_SUSET } else { pg_sys::GucContext::PGC_USERSET };
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
                    context,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_SAVE,
                    true,
                    0,
                    false,
                );
            }
        }
        Local(level)
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // SAFETY: ends the level of new().
        unsafe { pg_sys::AtEOXact_GUC(true, self.0) };
    }
}
