//! What fires and what is checked on apply. Replica role switches off Postgres's own constraint triggers
//! together with the users'; the apply has the checks queued all the same and fired at the end of each
//! source transaction ([`Checks::fire`]): foreign keys from the child's side, and from the parent's where
//! the action is to do nothing, and deferrable unique constraints.
//!
//! A parent whose foreign key cascades is the exception: its trigger would change children that the source
//! knew nothing of. There [`super::parents`] looks whether a child is left.
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use pgrx::prelude::*;
use std::ffi::CStr;

/// Functions of Postgres's constraint triggers that only check (OIDs are fixed in pg_proc.dat).
mod function {
    pub const UNIQUE_RECHECK: u32 = 1250;
    pub const CHECK_INSERT: u32 = 1644;
    pub const CHECK_UPDATE: u32 = 1645;
    pub const CASCADE_DELETE: u32 = 1646;
    pub const RESTRICT_DELETE: u32 = 1648;
    pub const RESTRICT_UPDATE: u32 = 1649;
    pub const SETDEFAULT_UPDATE: u32 = 1653;
    pub const NOACTION_DELETE: u32 = 1654;
    pub const NOACTION_UPDATE: u32 = 1655;
}

fn only_checks(function: u32) -> bool {
    use function::*;
    matches!(
        function,
        UNIQUE_RECHECK
            | CHECK_INSERT
            | CHECK_UPDATE
            | RESTRICT_DELETE
            | RESTRICT_UPDATE
            | NOACTION_DELETE
            | NOACTION_UPDATE
    )
}

/// True if it is one of those that change children when their parent goes.
pub fn acts_on_children(function: u32) -> bool {
    (function::CASCADE_DELETE..=function::SETDEFAULT_UPDATE).contains(&function)
        && !matches!(function, function::RESTRICT_DELETE | function::RESTRICT_UPDATE)
}

/// Reduces a result relation's copy of its triggers to the user's that fire on apply (ENABLE ALWAYS, ENABLE
/// REPLICA), at once even if they are deferred constraint triggers, and returns their names. Tandem's own
/// are left out: nothing is captured here (I9).
///
/// # Safety
/// `desc` is null or the copy that InitResultRelInfo made.
pub unsafe fn keep_users(desc: *mut pg_sys::TriggerDesc) -> Vec<String> {
    let ours = crate::pg::names::schema_oid();
    let mut names = Vec::new();
    // SAFETY: see retain; names and functions are the trigger's own.
    unsafe {
        retain(desc, |trigger| {
            let fires = [pg_sys::TRIGGER_FIRES_ALWAYS, pg_sys::TRIGGER_FIRES_ON_REPLICA];
            let kept = !trigger.tgisinternal
                && fires.contains(&(trigger.tgenabled as u8))
                && pg_sys::get_func_namespace(trigger.tgfoid) != ours;
            if kept {
                trigger.tgdeferrable = false;
                trigger.tginitdeferred = false;
                names.push(CStr::from_ptr(trigger.tgname).to_string_lossy().into_owned());
            }
            kept
        });
    }
    names
}

/// Keeps the triggers that pass `keep`, which may change them.
///
/// # Safety
/// As for [`keep_users`].
unsafe fn retain(desc: *mut pg_sys::TriggerDesc, mut keep: impl FnMut(&mut pg_sys::Trigger) -> bool) {
    // SAFETY: `triggers` has `numtriggers` entries, and the copy is ours to change.
    unsafe {
        let Some(desc) = desc.as_mut() else { return };
        let mut kept = 0;
        for i in 0..desc.numtriggers as usize {
            let mut trigger = *desc.triggers.add(i);
            if keep(&mut trigger) {
                *desc.triggers.add(kept) = trigger;
                kept += 1;
            }
        }
        desc.numtriggers = kept as i32;
        set_flags(desc);
    }
}

unsafe fn set_flags(desc: &mut pg_sys::TriggerDesc) {
    // SAFETY: as in keep_what_fires.
    let triggers = unsafe { std::slice::from_raw_parts(desc.triggers, desc.numtriggers as usize) };
    let has = |timing: u32, event: u32| {
        triggers.iter().any(|t| {
            let kind = t.tgtype as u32;
            kind & pg_sys::TRIGGER_TYPE_ROW != 0
                && kind & (pg_sys::TRIGGER_TYPE_BEFORE | pg_sys::TRIGGER_TYPE_INSTEAD) == timing
                && kind & event != 0
        })
    };
    use pg_sys::{
        TRIGGER_TYPE_BEFORE as BEFORE, TRIGGER_TYPE_DELETE as DELETE, TRIGGER_TYPE_INSERT as INSERT,
        TRIGGER_TYPE_UPDATE as UPDATE,
    };
    const AFTER: u32 = 0;
    desc.trig_insert_before_row = has(BEFORE, INSERT);
    desc.trig_insert_after_row = has(AFTER, INSERT);
    desc.trig_update_before_row = has(BEFORE, UPDATE);
    desc.trig_update_after_row = has(AFTER, UPDATE);
    desc.trig_delete_before_row = has(BEFORE, DELETE);
    desc.trig_delete_after_row = has(AFTER, DELETE);
    // Nobody fires statement triggers here, so no transition tables are kept for them either.
    desc.trig_insert_new_table = false;
    desc.trig_update_old_table = false;
    desc.trig_update_new_table = false;
    desc.trig_delete_old_table = false;
}

/// True if something is left to fire.
///
/// # Safety
/// As for [`keep_what_fires`].
pub unsafe fn any(desc: *mut pg_sys::TriggerDesc) -> bool {
    // SAFETY: see above.
    unsafe { desc.as_ref() }.is_some_and(|d| d.numtriggers > 0)
}

/// True if one of them is for TRUNCATE.
///
/// # Safety
/// As for [`keep_users`].
pub unsafe fn has_truncate(desc: *mut pg_sys::TriggerDesc) -> bool {
    // SAFETY: see above.
    unsafe {
        desc.as_ref().is_some_and(|d| {
            let triggers = std::slice::from_raw_parts(d.triggers, d.numtriggers as usize);
            triggers.iter().any(|t| t.tgtype as u32 & pg_sys::TRIGGER_TYPE_TRUNCATE != 0)
        })
    }
}

/// The constraint checks of a table, apart from the users' triggers: these run in a security-restricted
/// operation, where nothing may be put off.
pub struct Checks {
    /// A result relation with nothing but the checks for triggers, all of them deferred.
    info: *mut pg_sys::ResultRelInfo,
    estate: *mut pg_sys::EState,
    /// Deferrable unique indexes.
    recheck: *mut pg_sys::List,
}

/// What was done with a row.
pub enum Written {
    Insert(*mut pg_sys::TupleTableSlot),
    Update(pg_sys::ItemPointer, *mut pg_sys::TupleTableSlot),
    Delete(pg_sys::ItemPointer),
}

impl Checks {
    /// The checks of an open table; none if it has no constraint that needs them. Errors (0A000) for a
    /// deferrable constraint that would run code of the table's owner at a time when that can't be confined.
    ///
    /// # Safety
    /// `main` is the result relation that rows are written through, its indexes open; the current memory
    /// context lives as long as `estate`.
    pub unsafe fn of(main: &pg_sys::ResultRelInfo, estate: *mut pg_sys::EState) -> Result<Option<Checks>> {
        // SAFETY: a second result relation of the same open table, never opened for indexes.
        unsafe {
            let info = pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
            (*info).type_ = pg_sys::NodeTag::T_ResultRelInfo;
            pg_sys::InitResultRelInfo(info, main.ri_RelationDesc, 0, std::ptr::null_mut(), 0);
            let mut recheck = Vec::new();
            retain((*info).ri_TrigDesc, |trigger| {
                let kept = trigger.tgisinternal
                    && only_checks(trigger.tgfoid.to_u32())
                    && trigger.tgenabled as u8 != pg_sys::TRIGGER_DISABLED;
                trigger.tgenabled = pg_sys::TRIGGER_FIRES_ALWAYS as std::ffi::c_char;
                trigger.tgdeferrable = true;
                trigger.tginitdeferred = true;
                if kept && trigger.tgfoid.to_u32() == function::UNIQUE_RECHECK {
                    recheck.push(trigger.tgconstrindid);
                }
                kept
            });
            if !any((*info).ri_TrigDesc) {
                return Ok(None);
            }
            let mut list = std::ptr::null_mut();
            for index in recheck {
                refuse_expressions(main, index)?;
                list = pg_sys::lappend_oid(list, index);
            }
            Ok(Some(Checks { info, estate, recheck: list }))
        }
    }

    /// Queues the checks of a row that was just written.
    ///
    /// # Safety
    /// Slots and places are of this table.
    pub unsafe fn queue(&self, written: Written) {
        let _unrestricted = Unrestricted::new();
        let none = std::ptr::null_mut;
        // SAFETY: see above; Begin and End pair up, or the abort clears the queue. All that is queued is
        // deferred, so nothing runs here but the comparison of a foreign key's old and new values.
        unsafe {
            pg_sys::AfterTriggerBeginQuery();
            match written {
                Written::Insert(slot) => {
                    pg_sys::ExecARInsertTriggers(self.estate, self.info, slot, self.recheck, std::ptr::null_mut());
                }
                Written::Update(place, slot) => pg_sys::ExecARUpdateTriggers(
                    self.estate,
                    self.info,
                    none(),
                    none(),
                    place,
                    std::ptr::null_mut(),
                    slot,
                    self.recheck,
                    std::ptr::null_mut(),
                    false,
                ),
                Written::Delete(place) => pg_sys::ExecARDeleteTriggers(
                    self.estate,
                    self.info,
                    place,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    false,
                ),
            }
            pg_sys::AfterTriggerEndQuery(self.estate);
        }
    }

    /// Fires what the source transaction queued, of all tables. Raises 23503 or 23505.
    pub fn fire() {
        let _restricted = ActingAs::superuser();
        // SAFETY: no query is open; the function takes a snapshot of its own, and foreign keys are looked
        // up with the rights of the tables' owners.
        unsafe { pg_sys::AfterTriggerFireDeferred() };
    }
}

unsafe fn refuse_expressions(main: &pg_sys::ResultRelInfo, index: pg_sys::Oid) -> Result<()> {
    for i in 0..main.ri_NumIndices as usize {
        // SAFETY: both arrays have ri_NumIndices entries.
        let (relation, info) = unsafe { (*main.ri_IndexRelationDescs.add(i), &**main.ri_IndexRelationInfo.add(i)) };
        // SAFETY: an open index.
        let this = unsafe { (*relation).rd_id } == index;
        if this && !(info.ii_Expressions.is_null() && info.ii_Predicate.is_null()) {
            // SAFETY: an open index has a name.
            let name = unsafe { CStr::from_ptr((*(*relation).rd_rel).relname.data.as_ptr()) };
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                format!("constraint \"{}\" is deferrable and has expressions", name.to_string_lossy()),
                "Changes of the peer can't be applied to a table with such a constraint: make it not deferrable.",
            ));
        }
    }
    Ok(())
}

/// Leaves a security-restricted operation for a moment, as the same user.
struct Unrestricted(pg_sys::Oid, i32);

impl Unrestricted {
    fn new() -> Unrestricted {
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        // SAFETY: plain getters and setters; Drop or an abort restores them.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
            pg_sys::SetUserIdAndSecContext(user, context & !(pg_sys::SECURITY_RESTRICTED_OPERATION as i32));
        }
        Unrestricted(user, context)
    }
}

impl Drop for Unrestricted {
    fn drop(&mut self) {
        // SAFETY: restores what new() read.
        unsafe { pg_sys::SetUserIdAndSecContext(self.0, self.1) };
    }
}
