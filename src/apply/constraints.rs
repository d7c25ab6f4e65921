//! What fires and what is checked on apply. Replica role switches off Postgres's own constraint triggers
//! together with the users'; the apply has the checks queued all the same and fired at the end of each
//! source transaction ([`Checks::fire`]): foreign keys from the child's side, and from the parent's where
//! the action is to do nothing, and deferrable unique constraints.
//!
//! A parent whose foreign key cascades is the exception: its trigger would change children that the source
//! knew nothing of. There [`Referenced`] only looks whether a child is left.
use super::table::{Row, value_of};
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

fn acts_on_children(function: u32) -> bool {
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

/// A foreign key that points at a table and acts (cascade, set null, set default) when its parent goes.
#[derive(Debug, Clone)]
pub struct Referenced {
    pub constraint: pg_sys::Oid,
    /// The referenced columns of the parent.
    pub attnums: Vec<i16>,
}

/// The acting foreign keys that point at `rel`.
///
/// # Safety
/// `rel` is open.
pub unsafe fn referenced(rel: pg_sys::Relation) -> Vec<Referenced> {
    let mut found: Vec<Referenced> = Vec::new();
    // SAFETY: the relcache's own triggers, read only.
    let triggers = unsafe {
        match (*rel).trigdesc.as_ref() {
            None => return found,
            Some(desc) => std::slice::from_raw_parts(desc.triggers, desc.numtriggers as usize),
        }
    };
    for trigger in triggers {
        let acts = trigger.tgisinternal
            && acts_on_children(trigger.tgfoid.to_u32())
            && trigger.tgenabled as u8 != pg_sys::TRIGGER_DISABLED;
        if acts && !found.iter().any(|f| f.constraint == trigger.tgconstraint) {
            found.push(Referenced { constraint: trigger.tgconstraint, attnums: Vec::new() });
        }
    }
    for key in &mut found {
        key.attnums = referenced_columns(key.constraint);
    }
    found.retain(|key| !key.attnums.is_empty());
    found
}

fn referenced_columns(constraint: pg_sys::Oid) -> Vec<i16> {
    let query = "select confkey from pg_catalog.pg_constraint where oid = $1";
    Spi::connect(|client| -> std::result::Result<_, pgrx::spi::Error> {
        client.select(query, Some(1), &[constraint.into()])?.first().get_one::<Vec<i16>>()
    })
    .ok()
    .flatten()
    .unwrap_or_default()
}

/// A parent's values that are gone: looked up at the end of the source transaction.
pub struct Gone {
    constraint: pg_sys::Oid,
    /// The values as text, in the order of the constraint.
    values: Vec<String>,
}

impl Referenced {
    /// What has to be looked for when `old` gave way to `new` (or to nothing); none if the key stays.
    pub fn gone(&self, rel: &crate::relation::SyncedRelation, old: &Row, new: Option<&Row>) -> Option<Gone> {
        let mut values = Vec::new();
        let mut changed = new.is_none();
        for attnum in &self.attnums {
            let column = rel.columns.iter().find(|c| c.attnum == *attnum)?;
            let value = value_of(old, *attnum)?;
            changed |= new.is_some_and(|new| !crate::value::equal(column, Some(value), value_of(new, *attnum)));
            values.push(output(column.typid, value));
        }
        changed.then_some(Gone { constraint: self.constraint, values })
    }
}

fn output(typid: pg_sys::Oid, value: pg_sys::Datum) -> String {
    let (mut function, mut varlena) = (pg_sys::InvalidOid, false);
    // SAFETY: the output function of the value's type gives a C string.
    unsafe {
        pg_sys::getTypeOutputInfo(typid, &mut function, &mut varlena);
        let text = pg_sys::OidOutputFunctionCall(function, value);
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        pg_sys::pfree(text.cast());
        owned
    }
}

struct Names {
    name: String,
    child: String,
    parent: String,
    child_owner: pg_sys::Oid,
    /// Of each column pair: child column, parent column, type of the parent column.
    columns: Vec<(String, String, String)>,
}

fn names(constraint: pg_sys::Oid) -> Result<Option<Names>> {
    let query = "
        select c.conname::text, c.conrelid::regclass::text, c.confrelid::regclass::text, r.relowner,
               array_agg(quote_ident(k.attname) order by i)::text[], array_agg(quote_ident(p.attname) order by i)::text[],
               array_agg(format_type(p.atttypid, p.atttypmod) order by i)::text[]
        from pg_catalog.pg_constraint c
        join pg_catalog.pg_class r on r.oid = c.conrelid
        cross join lateral generate_subscripts(c.conkey, 1) i
        join pg_catalog.pg_attribute k on k.attrelid = c.conrelid and k.attnum = c.conkey[i]
        join pg_catalog.pg_attribute p on p.attrelid = c.confrelid and p.attnum = c.confkey[i]
        where c.oid = $1
        group by c.oid, r.oid, c.conname, c.conrelid, c.confrelid, r.relowner";
    Spi::connect(|client| {
        let row = client.select(query, Some(1), &[constraint.into()])?.first();
        if row.is_empty() {
            return Ok(None);
        }
        let text = |i| -> Result<String> { Ok(row.get::<String>(i)?.unwrap_or_default()) };
        let list = |i| -> Result<Vec<String>> { Ok(row.get::<Vec<String>>(i)?.unwrap_or_default()) };
        let columns = list(5)?.into_iter().zip(list(6)?).zip(list(7)?).map(|((k, p), t)| (k, p, t)).collect();
        Ok(Some(Names {
            name: text(1)?,
            child: text(2)?,
            parent: text(3)?,
            child_owner: row.get::<pg_sys::Oid>(4)?.unwrap_or(pg_sys::InvalidOid),
            columns,
        }))
    })
}

impl Gone {
    /// Errors (23503) if a child still points at the values and no parent has them again.
    pub fn check(&self) -> Result<()> {
        let Some(names) = names(self.constraint)? else { return Ok(()) };
        let pairs = |prefix: &str, pick: fn(&(String, String, String)) -> &str| {
            let mut conditions = Vec::new();
            for (i, column) in names.columns.iter().enumerate() {
                conditions.push(format!("{prefix}.{} = ${}::text::{}", pick(column), i + 1, column.2));
            }
            conditions.join(" and ")
        };
        let query = format!(
            "select 1 from only {} c where {} and not exists (select 1 from {} p where {}) limit 1 for key share of c",
            names.child,
            pairs("c", |c| &c.0),
            names.parent,
            pairs("p", |c| &c.1),
        );
        let arguments: Vec<_> = self.values.iter().map(|v| v.as_str().into()).collect();
        let orphan = {
            let _owner = ActingAs::owner(names.child_owner);
            // An update, as far as SPI goes: so that it looks with a new snapshot.
            Spi::connect_mut(|client| client.update(query.as_str(), Some(1), &arguments).map(|t| !t.is_empty()))?
        };
        if !orphan {
            return Ok(());
        }
        let columns: Vec<_> = names.columns.iter().map(|c| c.1.as_str()).collect();
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
            format!(
                "the peer deleted or changed a row of table {} that is still referenced from table {} by foreign key \"{}\"",
                names.parent, names.child, names.name
            ),
            super::report::MEND,
        )
        .detail(format!("Key ({})=({}).", columns.join(", "), self.values.join(", "))))
    }
}
