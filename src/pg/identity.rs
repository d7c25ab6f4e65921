//! Acting as another role for a moment.
use crate::pg::settings::Local;
use pgrx::prelude::*;

/// Restores user and security context (and settings, if a nest level was opened) when dropped; an abort
/// of the transaction restores them as well.
pub struct ActingAs {
    user: pg_sys::Oid,
    context: i32,
    settings: Option<Local>,
}

impl ActingAs {
    /// The extension's own catalog work: as the bootstrap superuser, whoever the session is, with a search
    /// path that finds Postgres's and Tandem's own objects and nothing else.
    pub fn superuser() -> ActingAs {
        let bootstrap = pg_sys::Oid::from(pg_sys::BOOTSTRAP_SUPERUSERID);
        ActingAs::become_user(bootstrap, pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32)
    }

    /// Applying to a table: as its owner, in a security-restricted operation, settings undone at the end.
    pub fn owner(owner: pg_sys::Oid) -> ActingAs {
        let flags = pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION;
        ActingAs::become_user(owner, flags as i32)
    }

    /// Deciding about a row of a table: as its owner likewise, who sees every row, also where FORCE ROW LEVEL
    /// SECURITY would hide it (as Postgres's own referential checks do).
    pub fn unfiltered_owner(owner: pg_sys::Oid) -> ActingAs {
        let flags =
            pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION | pg_sys::SECURITY_NOFORCE_RLS;
        ActingAs::become_user(owner, flags as i32)
    }

    fn become_user(user: pg_sys::Oid, flags: i32) -> ActingAs {
        let mut before = ActingAs { user: pg_sys::InvalidOid, context: 0, settings: None };
        // SAFETY: plain getters and setters of this backend's user; Drop or abort restores them.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut before.user, &mut before.context);
            pg_sys::SetUserIdAndSecContext(user, before.context | flags);
        }
        before.settings = Some(Local::new(&[(c"search_path", c"pg_catalog, tandem, pg_temp")]));
        before
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        drop(self.settings.take());
        // SAFETY: restores what become_user read.
        unsafe { pg_sys::SetUserIdAndSecContext(self.user, self.context) };
    }
}
