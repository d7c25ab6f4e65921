//! Acting as another role for a moment.
use pgrx::prelude::*;

/// Restores user and security context (and settings, if a nest level was opened) when dropped; an abort
/// of the transaction restores them as well.
pub struct ActingAs {
    user: pg_sys::Oid,
    context: i32,
    nest_level: Option<i32>,
}

impl ActingAs {
    /// The extension's own catalog work: as the bootstrap superuser, whoever the session is.
    pub fn superuser() -> ActingAs {
        ActingAs::become_user(pg_sys::Oid::from(10), pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32, false)
    }

    /// Applying to a table: as its owner, in a security-restricted operation, settings undone at the end.
    pub fn owner(owner: pg_sys::Oid) -> ActingAs {
        let flags = pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION;
        ActingAs::become_user(owner, flags as i32, true)
    }

    fn become_user(user: pg_sys::Oid, flags: i32, nest: bool) -> ActingAs {
        let mut before = ActingAs { user: pg_sys::InvalidOid, context: 0, nest_level: None };
        // SAFETY: plain getters and setters of this backend's user; Drop or abort restores them.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut before.user, &mut before.context);
            pg_sys::SetUserIdAndSecContext(user, before.context | flags);
            if nest {
                before.nest_level = Some(pg_sys::NewGUCNestLevel());
            }
        }
        before
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        // SAFETY: restores what become_user read.
        unsafe {
            if let Some(level) = self.nest_level {
                pg_sys::AtEOXact_GUC(false, level);
            }
            pg_sys::SetUserIdAndSecContext(self.user, self.context);
        }
    }
}
