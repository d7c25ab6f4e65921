//! The trigger functions on synced tables: raw C functions, since they run for every row.
//!
//! | trigger | when | does |
//! |---|---|---|
//! | `~tandem_stamp` | BEFORE INSERT OR UPDATE, last by name | sets `_hlc` and `_cells`, whatever the statement said |
//! | `~tandem_delete` | BEFORE DELETE | takes the delete's version |
//! | `!tandem_capture` | AFTER INSERT OR UPDATE OR DELETE, first by name | puts the change into the buffer |
//! | `!tandem_truncate` | AFTER TRUNCATE | the same for the whole table |
//!
//! All are ENABLE ALWAYS: only [`super::applying`] silences them.
use super::buffer::{self, Met};
use super::change::{self, Facts, Row, build, datum};
use super::netting;
use crate::counter;
use crate::displaced;
use crate::error::{Error, Result};
use crate::pg::heap;
use crate::pg::identity::ActingAs;
use crate::registry;
use crate::relation::{self, SyncedRelation};
use crate::shmem;
use crate::tombstone::{self, Tombstone};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use tandem_model::change::{Item, Op};
use tandem_model::hlc::Hlc;
use tandem_model::versions::Versions;

/// A deleted row on its way from BEFORE to AFTER DELETE: table, block and offset.
type Place = (u32, u32, u16);

thread_local! {
    /// Versions of deletes that wait for AFTER DELETE, each with the subtransaction that made it.
    static DELETES: RefCell<HashMap<Place, (Hlc, pg_sys::SubTransactionId)>> = RefCell::default();
}

/// Forgets the waiting deletes at the end of a transaction.
pub fn reset() {
    DELETES.with_borrow_mut(|d| {
        if !d.is_empty() {
            d.clear();
        }
    });
}

/// A savepoint was released: its deletes are its parent's.
pub fn merge_savepoint(mine: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) {
    DELETES.with_borrow_mut(|d| d.values_mut().filter(|(_, id)| *id >= mine).for_each(|(_, id)| *id = parent));
}

/// A savepoint was rolled back.
pub fn roll_back_to(mine: pg_sys::SubTransactionId) {
    DELETES.with_borrow_mut(|d| d.retain(|_, (_, id)| *id < mine));
}

/// Declares a C function of version 1 and its entry point.
macro_rules! trigger_function {
    ($name:ident, $info:ident, $body:path) => {
        /// Tells Postgres which calling convention the function has.
        #[unsafe(no_mangle)]
        #[doc(hidden)]
        pub extern "C" fn $info() -> &'static pg_sys::Pg_finfo_record {
            const RECORD: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
            &RECORD
        }

        /// Entry point, called by Postgres's trigger manager.
        ///
        /// # Safety
        /// Only Postgres may call this, as a trigger.
        #[unsafe(no_mangle)]
        #[pg_guard]
        pub unsafe extern "C-unwind" fn $name(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
            // SAFETY: context is a TriggerData if and only if the manager made the call.
            let data = unsafe { called_as_trigger(fcinfo, stringify!($name)) };
            match $body(data) {
                Ok(tuple) => pg_sys::Datum::from(tuple),
                Err(e) => e.raise(),
            }
        }
    };
}

trigger_function!(tandem_stamp, pg_finfo_tandem_stamp, stamp);
trigger_function!(tandem_stamp_delete, pg_finfo_tandem_stamp_delete, stamp_delete);
trigger_function!(tandem_capture, pg_finfo_tandem_capture, capture);
trigger_function!(tandem_capture_truncate, pg_finfo_tandem_capture_truncate, capture_truncate);

pgrx::extension_sql!(
    "create function stamp() returns trigger language c as 'MODULE_PATHNAME', 'tandem_stamp';
create function stamp_delete() returns trigger language c as 'MODULE_PATHNAME', 'tandem_stamp_delete';
create function capture() returns trigger language c as 'MODULE_PATHNAME', 'tandem_capture';
create function capture_truncate() returns trigger language c as 'MODULE_PATHNAME', 'tandem_capture_truncate';",
    name = "trigger_functions"
);

unsafe fn called_as_trigger<'a>(fcinfo: pg_sys::FunctionCallInfo, name: &str) -> &'a pg_sys::TriggerData {
    // SAFETY: fcinfo is valid for the call; the node tag tells what context is.
    unsafe {
        let context = (*fcinfo).context;
        if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_TriggerData {
            Error::operator(
                PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                format!("{name} was not called as a trigger"),
                "Synced tables get their triggers from tandem.add_table().",
            )
            .raise();
        }
        &*context.cast::<pg_sys::TriggerData>()
    }
}

fn event_is(data: &pg_sys::TriggerData, op: u32) -> bool {
    data.tg_event & pg_sys::TRIGGER_EVENT_OPMASK == op
}

fn synced(data: &pg_sys::TriggerData) -> Result<Rc<SyncedRelation>> {
    relation::synced(data.tg_relation)
}

/// The tuple's attributes.
fn deform(data: &pg_sys::TriggerData, tuple: pg_sys::HeapTuple) -> Vec<Option<pg_sys::Datum>> {
    // SAFETY: the trigger manager's tuples are of the trigger's relation.
    unsafe { heap::deform(tuple, (*data.tg_relation).rd_att) }
}

/// What a stored row lists of its versions.
pub fn listed(rel: &SyncedRelation, row: &Row) -> Result<Versions> {
    match datum(row, rel.cells_attnum) {
        None => Ok(Versions::default()),
        // SAFETY: `_cells` is a varlena.
        Some(cells) => Ok(Versions::decode(&unsafe { heap::bytes(cells) })?),
    }
}

/// BEFORE INSERT OR UPDATE: a new version for what changes, the old ones for what doesn't.
fn stamp(data: &pg_sys::TriggerData) -> Result<pg_sys::HeapTuple> {
    let insert = event_is(data, pg_sys::TRIGGER_EVENT_INSERT);
    let tuple = if insert { data.tg_trigtuple } else { data.tg_newtuple };
    if super::is_applying() {
        return Ok(tuple);
    }
    let rel = synced(data)?;
    let (hlc, versions) = if insert {
        let birth = registry::stamp();
        (birth, Versions { birth, ..Versions::default() })
    } else {
        let (old, new) = (deform(data, data.tg_trigtuple), deform(data, tuple));
        if !change::same_key(&rel, &old, &new) {
            let birth = registry::stamp();
            (birth, Versions { birth, ..Versions::default() })
        } else {
            let mut versions = listed(&rel, &old)?;
            let changed = super::with_affirmed(rel.relid, change::changed_cells(&rel, &old, &new));
            if changed.is_empty() {
                (Hlc(datum(&old, rel.hlc_attnum).map_or(0, |d| d.value() as u64)), versions)
            } else {
                let version = registry::stamp();
                versions.trim(&shmem::database().stable_points());
                changed.into_iter().for_each(|cell| counter::stamp(&rel, &mut versions, cell, version, &old, &new));
                (version, versions)
            }
        }
    };
    Ok(with_versions(data, &rel, tuple, hlc, &versions))
}

/// A copy of the tuple with these versions.
fn with_versions(
    data: &pg_sys::TriggerData,
    rel: &SyncedRelation,
    tuple: pg_sys::HeapTuple,
    hlc: Hlc,
    versions: &Versions,
) -> pg_sys::HeapTuple {
    let mut columns = [i32::from(rel.hlc_attnum), i32::from(rel.cells_attnum)];
    let mut values = [pg_sys::Datum::from(hlc.0 as i64), pg_sys::Datum::from(0usize)];
    let mut nulls = [false, true];
    if !versions.is_empty() {
        let mut cells = Vec::new();
        versions.encode(&mut cells);
        values[1] = heap::bytea(&cells);
        nulls[1] = false;
    }
    // SAFETY: two columns of this relation, with values of their types.
    unsafe {
        pg_sys::heap_modify_tuple_by_cols(
            tuple,
            (*data.tg_relation).rd_att,
            2,
            columns.as_mut_ptr(),
            values.as_mut_ptr(),
            nulls.as_mut_ptr(),
        )
    }
}

fn place(data: &pg_sys::TriggerData) -> Place {
    // SAFETY: a row-level trigger has a tuple with its place, and an open relation.
    unsafe {
        let tid = (*data.tg_trigtuple).t_self;
        let (block, offset) = pgrx::itemptr::item_pointer_get_both(tid);
        ((*data.tg_relation).rd_id.to_u32(), block, offset)
    }
}

/// BEFORE DELETE: the version is taken now, so that a later insert of the key in the same statement is later.
fn stamp_delete(data: &pg_sys::TriggerData) -> Result<pg_sys::HeapTuple> {
    if !super::is_applying() {
        let version = registry::stamp();
        // SAFETY: reads this backend's transaction state.
        let subtransaction = unsafe { pg_sys::GetCurrentSubTransactionId() };
        DELETES.with_borrow_mut(|d| d.insert(place(data), (version, subtransaction)));
    }
    Ok(data.tg_trigtuple)
}

/// AFTER INSERT OR UPDATE OR DELETE.
fn capture(data: &pg_sys::TriggerData) -> Result<pg_sys::HeapTuple> {
    if super::is_applying() {
        return Ok(std::ptr::null_mut());
    }
    let rel = synced(data)?;
    let row = deform(data, data.tg_trigtuple);
    if event_is(data, pg_sys::TRIGGER_EVENT_INSERT) {
        let hlc = stamped(&rel, &row)?;
        capture_insert(data, &rel, data.tg_trigtuple, &row, hlc, None)?;
    } else if event_is(data, pg_sys::TRIGGER_EVENT_DELETE) {
        let version = DELETES.with_borrow_mut(|d| d.remove(&place(data))).map(|(version, _)| version);
        let version = version.ok_or_else(|| Error::bug("a row was deleted without trigger ~tandem_delete"))?;
        capture_delete(&rel, &row, version, None)?;
    } else {
        let new = deform(data, data.tg_newtuple);
        capture_update(data, &rel, &row, &new)?;
    }
    Ok(std::ptr::null_mut())
}

fn stamped(rel: &SyncedRelation, row: &Row) -> Result<Hlc> {
    datum(row, rel.hlc_attnum).map(|d| Hlc(d.value() as u64)).ok_or_else(|| Error::bug("a synced row has no _hlc"))
}

fn capture_update(data: &pg_sys::TriggerData, rel: &Rc<SyncedRelation>, old: &Row, new: &Row) -> Result<()> {
    let version = stamped(rel, new)?;
    if version == stamped(rel, old)? {
        return Ok(());
    }
    if !change::same_key(rel, old, new) {
        capture_delete(rel, old, version, Some(new))?;
        return capture_insert(data, rel, data.tg_newtuple, new, version, Some(old));
    }
    let mut before = listed(rel, old)?;
    before.trim(&shmem::database().stable_points());
    let after = listed(rel, new)?;
    let cells: Vec<_> = after.cells.iter().filter(|(_, v)| *v == version).map(|(cell, _)| *cell).collect();
    let mut base = Versions { birth: before.birth, dead: before.dead, ..Versions::default() };
    cells.iter().for_each(|cell| base.list(*cell, &before));
    let facts = Facts { op: Op::Update, version, life: before.birth, base, cells, listed: Some(&after) };
    build(rel, facts, new, Some(old), None, |change| buffer::push_change(rel, change));
    Ok(())
}

fn capture_delete(rel: &Rc<SyncedRelation>, row: &Row, version: Hlc, moved: Option<&Row>) -> Result<()> {
    let mut base = listed(rel, row)?;
    base.trim(&shmem::database().stable_points());
    base.ended.clear();
    let mut versions = base.clone();
    versions.end(version);
    let key = change::key_of(rel, row);
    let image = change::image_of(rel, row);
    tombstone::put(rel.relid, &key, &Tombstone { hlc: version, versions, image, descriptor: rel.descriptor });
    let facts = Facts { op: Op::Delete, version, life: base.birth, base, cells: Vec::new(), listed: None };
    build(rel, facts, row, None, moved, |change| buffer::push_change(rel, change));
    Ok(())
}

/// The row is in the heap: what its key held before can no longer change under us.
fn capture_insert(
    data: &pg_sys::TriggerData,
    rel: &Rc<SyncedRelation>,
    tuple: pg_sys::HeapTuple,
    row: &Row,
    stamped: Hlc,
    moved: Option<&Row>,
) -> Result<()> {
    let key = change::key_of(rel, row);
    let mut version = stamped;
    let mut base = Versions::default();
    let dead = tombstone::find(rel.relid, &key).map(Met::Tombstone);
    if let Some(met) = dead.or_else(|| displaced::find(rel.relid, &key).map(|found| Met::Displaced(found.row))) {
        let found = met.row();
        base = found.versions.clone();
        base.trim(&shmem::database().stable_points());
        base.ended.clear();
        if found.hlc >= version {
            // The INSERT was stamped, then waited while a DELETE of the key went through.
            version = registry::stamp();
            restamp(data, rel, tuple, version)?;
        }
        netting::note_met(rel, &key, &met);
        tombstone::remove(rel.relid, &key);
        displaced::remove(rel.relid, &key);
    }
    let facts = Facts { op: Op::Insert, version, life: version, base, cells: rel.cell_ids(), listed: None };
    build(rel, facts, row, None, moved, |change| buffer::push_change(rel, change));
    Ok(())
}

/// Gives a row that is already in the heap a later birth.
fn restamp(data: &pg_sys::TriggerData, rel: &SyncedRelation, tuple: pg_sys::HeapTuple, birth: Hlc) -> Result<()> {
    let mut cells = Vec::new();
    Versions { birth, ..Versions::default() }.encode(&mut cells);
    // SAFETY: the tuple is in the heap, so it has a place; the relation is open.
    let (place, rel_name) = unsafe {
        let name = pgrx::PgRelation::from_pg(data.tg_relation);
        let quoted = pgrx::spi::quote_qualified_identifier(name.namespace(), name.name());
        ((*tuple).t_self, quoted)
    };
    let (block, offset) = pgrx::itemptr::item_pointer_get_both(place);
    let _superuser = ActingAs::superuser();
    let _quiet = crate::pg::settings::Local::new(&[(c"session_replication_role", c"replica")]);
    let query = format!(
        "update only {rel_name} set _hlc = $1::int8::tandem.hlc, _cells = $2::text::tandem.cells \
         where ctid = '({block},{offset})'::pg_catalog.tid"
    );
    let cells_text = format!("birth={birth}");
    let updated = super::applying(|| {
        Spi::connect_mut(|client| {
            client.update(query.as_str(), None, &[(birth.0 as i64).into(), cells_text.into()]).map(|t| t.len())
        })
    })?;
    if updated == 1 { Ok(()) } else { Err(Error::bug(format!("a new row of {} was gone at once", rel.display_name()))) }
}

/// AFTER TRUNCATE.
fn capture_truncate(data: &pg_sys::TriggerData) -> Result<pg_sys::HeapTuple> {
    if !super::is_applying() {
        let rel = synced(data)?;
        let version = registry::stamp();
        buffer::push(&Item::Truncate { descriptor: rel.descriptor, version }, None);
    }
    Ok(std::ptr::null_mut())
}
