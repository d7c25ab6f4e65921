//! A synced table while it is applied to: open, with executor state and slots, for one local transaction.
//!
//! [`Table::open`] takes the lock; [`Table::close`] gives everything back before the commit. After an ERROR
//! nothing is closed by hand: the abort does it.
use super::constraints::{self, Checks, Written};
use super::parents;
use crate::error::{Error, Result};
use crate::pg::heap;
use crate::relation::{self, Column, SyncedRelation};
use pgrx::prelude::*;
use std::collections::HashMap;
use std::rc::Rc;
use tandem_model::hlc::Hlc;
use tandem_model::versions::Versions;

/// The values of a row by attribute number (`row[attnum - 1]`).
pub type Row = Vec<Option<pg_sys::Datum>>;

/// An open table. The pointers live as long as the local transaction.
pub struct Table {
    rel: pg_sys::Relation,
    pub synced: Rc<SyncedRelation>,
    estate: *mut pg_sys::EState,
    row_context: pg_sys::MemoryContext,
    info: *mut pg_sys::ResultRelInfo,
    epq: Box<pg_sys::EPQState>,
    /// Holds the key that is looked for.
    search: *mut pg_sys::TupleTableSlot,
    /// The stored row that was found, locked.
    found: *mut pg_sys::TupleTableSlot,
    /// The row that is written.
    fresh: *mut pg_sys::TupleTableSlot,
    defaults: HashMap<i16, *mut pg_sys::ExprState>,
    /// Triggers of the user that fire here, by name.
    pub user_triggers: Vec<String>,
    /// One of them is for TRUNCATE.
    pub fires_on_truncate: bool,
    /// Where a trigger of the user (UPDATE OF) finds which columns change; null if there is none.
    updated: *mut *mut pg_sys::Bitmapset,
    /// Constraints that are looked at when the source transaction is whole.
    checks: Option<Checks>,
    /// Foreign keys on this table whose action is the source's business, but whose outcome is checked here.
    pub parents_of: Vec<parents::Referenced>,
}

impl Table {
    /// Opens a synced table for writing; `None` if it is gone or no longer synced.
    pub fn open(relid: pg_sys::Oid) -> Result<Option<Table>> {
        // SAFETY: null if there is no such relation; the lock is kept until the transaction ends.
        let rel = unsafe { pg_sys::try_table_open(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE) };
        if rel.is_null() {
            return Ok(None);
        }
        let synced = match relation::synced(rel) {
            Ok(synced) => synced,
            Err(e) => {
                // SAFETY: opened above.
                unsafe { pg_sys::table_close(rel, pg_sys::NoLock as pg_sys::LOCKMODE) };
                return if e.sqlstate == PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE {
                    Ok(None)
                } else {
                    Err(e)
                };
            }
        };
        if synced.hlc_attnum == 0 || synced.cells_attnum == 0 {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("table {} has lost its column _hlc or _cells", synced.display_name()),
                format!("SELECT tandem.remove_table('{0}'); SELECT tandem.add_table('{0}');", synced.display_name()),
            ));
        }
        // SAFETY: executor structures of an open relation, in the estate's own memory context.
        let table = unsafe {
            // The memory of the moment may be that of a row of another table.
            let previous = pg_sys::MemoryContextSwitchTo(pg_sys::CurTransactionContext);
            let estate = pg_sys::CreateExecutorState();
            pg_sys::MemoryContextSwitchTo((*estate).es_query_cxt);
            let row_context = (*pg_sys::MakePerTupleExprContext(estate)).ecxt_per_tuple_memory;
            let info = pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
            (*info).type_ = pg_sys::NodeTag::T_ResultRelInfo;
            pg_sys::InitResultRelInfo(info, rel, 0, std::ptr::null_mut(), 0);
            pg_sys::ExecOpenIndices(info, false);
            let checks = Checks::of(&*info, estate)?;
            let user_triggers = constraints::keep_users((*info).ri_TrigDesc);
            let fires_on_truncate = constraints::has_truncate((*info).ri_TrigDesc);
            let mut updated = std::ptr::null_mut();
            if constraints::any((*info).ri_TrigDesc) {
                updated = range_table(estate, rel);
                (*info).ri_RangeTableIndex = 1;
            } else {
                (*info).ri_TrigDesc = std::ptr::null_mut();
            }
            let mut epq = Box::new(pg_sys::EPQState::default());
            init_epq(&mut epq, estate);
            let table = Table {
                rel,
                parents_of: parents::referenced(rel),
                synced,
                estate,
                row_context,
                info,
                epq,
                search: pg_sys::MakeSingleTupleTableSlot((*rel).rd_att, &raw const pg_sys::TTSOpsVirtual),
                found: pg_sys::table_slot_create(rel, std::ptr::null_mut()),
                fresh: pg_sys::MakeSingleTupleTableSlot((*rel).rd_att, &raw const pg_sys::TTSOpsVirtual),
                defaults: HashMap::new(),
                user_triggers,
                fires_on_truncate,
                updated,
                checks,
            };
            pg_sys::MemoryContextSwitchTo(previous);
            table
        };
        Ok(Some(table))
    }

    /// Gives back what [`Table::open`] took, but for the lock.
    pub fn close(self) {
        // SAFETY: all of it was made by open() in this transaction, and no ERROR came in between.
        unsafe {
            pg_sys::EvalPlanQualEnd(&raw const *self.epq as *mut pg_sys::EPQState);
            pg_sys::ExecDropSingleTupleTableSlot(self.search);
            pg_sys::ExecDropSingleTupleTableSlot(self.found);
            pg_sys::ExecDropSingleTupleTableSlot(self.fresh);
            pg_sys::ExecCloseIndices(self.info);
            // Slots that triggers and checks were given.
            pg_sys::ExecResetTupleTable((*self.estate).es_tupleTable, false);
            pg_sys::FreeExecutorState(self.estate);
            pg_sys::table_close(self.rel, pg_sys::NoLock as pg_sys::LOCKMODE);
        }
    }

    /// Switches to memory that lives until the next call: one change is worked on at a time.
    pub fn enter_row_memory(&self) -> RowMemory {
        // SAFETY: the context lives as long as the estate; what it held was of the change before.
        unsafe {
            pg_sys::ExecClearTuple(self.found);
            pg_sys::ExecClearTuple(self.fresh);
            pg_sys::ExecClearTuple(self.search);
            if !self.updated.is_null() {
                *self.updated = std::ptr::null_mut(); // It lived in the memory that goes now.
            }
            pg_sys::MemoryContextReset(self.row_context);
            RowMemory(pg_sys::MemoryContextSwitchTo(self.row_context))
        }
    }

    /// Looks for the row of a key (values in key order) and locks it, waiting for whoever is writing it.
    pub fn lock_row(&mut self, key: &[pg_sys::Datum], exclusive: bool) -> Option<Row> {
        let mode = if exclusive {
            pg_sys::LockTupleMode::LockTupleExclusive
        } else {
            pg_sys::LockTupleMode::LockTupleNoKeyExclusive
        };
        let mut row = vec![None; self.synced.natts];
        for (value, column) in key.iter().zip(&self.synced.key) {
            row[(self.synced.columns[*column].attnum - 1) as usize] = Some(*value);
        }
        // SAFETY: slots of this relation; the key index was found with the relation's description.
        unsafe {
            fill(self.search, &row);
            pg_sys::RelationFindReplTupleByIndex(self.rel, self.synced.key_index, mode, self.search, self.found)
                .then(|| self.found_row())
        }
    }

    unsafe fn found_row(&self) -> Row {
        // SAFETY: the slot holds a tuple of this relation.
        unsafe {
            pg_sys::slot_getallattrs(self.found);
            let natts = self.synced.natts;
            let values = std::slice::from_raw_parts((*self.found).tts_values, natts);
            let nulls = std::slice::from_raw_parts((*self.found).tts_isnull, natts);
            values.iter().zip(nulls).map(|(value, null)| (!null).then_some(*value)).collect()
        }
    }

    /// Inserts a row, with indexes, constraints and the triggers that fire here.
    pub fn insert(&mut self, row: &Row) {
        // SAFETY: as for every executor call below: slots, estate and result relation belong together.
        unsafe {
            fill(self.fresh, row);
            self.step(|t| pg_sys::ExecSimpleRelationInsert(t.info, t.estate, t.fresh));
            self.check(Written::Insert(self.fresh));
        }
    }

    /// Replaces the row that was found.
    pub fn update(&mut self, row: &Row) {
        // SAFETY: the found slot holds the locked row.
        unsafe {
            if !self.updated.is_null() {
                *self.updated = self.changed_columns(row);
            }
            fill(self.fresh, row);
            self.step(|t| pg_sys::ExecSimpleRelationUpdate(t.info, t.estate, &mut *t.epq, t.found, t.fresh));
            let place = &raw mut (*self.found).tts_tid;
            self.check(Written::Update(place, self.fresh));
        }
    }

    /// The columns in which a row differs from the one that was found, in row memory.
    unsafe fn changed_columns(&self, row: &Row) -> *mut pg_sys::Bitmapset {
        // SAFETY: the found slot holds the locked row; members are attribute numbers as Postgres offsets them.
        unsafe {
            let old = self.found_row();
            let changed = self.synced.columns.iter().filter(|column| {
                !crate::value::equal(column, value_of(&old, column.attnum), value_of(row, column.attnum))
            });
            changed.fold(std::ptr::null_mut(), |set, column| {
                let member = i32::from(column.attnum) - pg_sys::FirstLowInvalidHeapAttributeNumber;
                pg_sys::bms_add_member(set, member)
            })
        }
    }

    /// Deletes the row that was found.
    pub fn delete(&mut self) {
        // SAFETY: the found slot holds the locked row.
        unsafe {
            self.step(|t| pg_sys::ExecSimpleRelationDelete(t.info, t.estate, &mut *t.epq, t.found));
            let place = &raw mut (*self.found).tts_tid;
            self.check(Written::Delete(place));
        }
    }

    /// One executor step, with the user's triggers that fire here.
    unsafe fn step(&mut self, step: impl FnOnce(&mut Self)) {
        let queues = !self.user_triggers.is_empty();
        // SAFETY: Begin and End pair up, or the abort clears the queue.
        unsafe {
            if queues {
                pg_sys::AfterTriggerBeginQuery();
            }
            step(self);
            if queues {
                pg_sys::AfterTriggerEndQuery(self.estate);
            }
        }
    }

    /// Queues the constraints' checks; what was done is visible to the next step.
    unsafe fn check(&mut self, written: Written) {
        // SAFETY: slots and places of this table.
        unsafe {
            if let Some(checks) = &self.checks {
                checks.queue(written);
            }
            pg_sys::CommandCounterIncrement();
        }
    }

    /// True if something waits at the end of the source transaction after a row was written.
    pub fn has_checks(&self) -> bool {
        self.checks.is_some()
    }

    /// A copy of a row that outlives the change it came with (until the estate goes).
    pub fn keep(&mut self, row: &Row) -> pg_sys::HeapTuple {
        // SAFETY: a tuple in the estate's context.
        unsafe {
            fill(self.fresh, row);
            let previous = pg_sys::MemoryContextSwitchTo((*self.estate).es_query_cxt);
            let tuple = pg_sys::ExecCopySlotHeapTuple(self.fresh);
            pg_sys::MemoryContextSwitchTo(previous);
            tuple
        }
    }

    /// The values of a row that [`Table::keep`] copied.
    pub fn kept(&self, tuple: pg_sys::HeapTuple) -> Row {
        // SAFETY: a tuple of this relation.
        unsafe { heap::deform(tuple, (*self.rel).rd_att) }
    }

    /// The default of a column that a change says nothing about; evaluated anew for each row.
    pub fn default_of(&mut self, attnum: i16) -> Option<pg_sys::Datum> {
        // SAFETY: planning and evaluating an expression of the catalog, states kept in the estate's context.
        unsafe {
            let state = match self.defaults.get(&attnum) {
                Some(state) => *state,
                None => {
                    let previous = pg_sys::MemoryContextSwitchTo((*self.estate).es_query_cxt);
                    let node = pg_sys::build_column_default(self.rel, i32::from(attnum));
                    let state = if node.is_null() {
                        std::ptr::null_mut()
                    } else {
                        pg_sys::ExecInitExpr(pg_sys::expression_planner(node.cast()), std::ptr::null_mut())
                    };
                    pg_sys::MemoryContextSwitchTo(previous);
                    self.defaults.insert(attnum, state);
                    state
                }
            };
            if state.is_null() {
                return None;
            }
            let mut null = false;
            let value = pg_sys::ExecEvalExpr(state, (*self.estate).es_per_tuple_exprcontext, &mut null);
            (!null).then_some(value)
        }
    }

    /// `_hlc` and `_cells` of a row.
    pub fn versions_of(&self, row: &Row) -> Result<(Hlc, Versions)> {
        let hlc = value_of(row, self.synced.hlc_attnum).map_or(0, |d| d.value() as u64);
        let versions = match value_of(row, self.synced.cells_attnum) {
            None => Versions::default(),
            // SAFETY: `_cells` is a varlena.
            Some(cells) => Versions::decode(&unsafe { heap::bytes(cells) })?,
        };
        Ok((Hlc(hlc), versions))
    }

    /// Sets `_hlc` and `_cells` of a row.
    pub fn set_versions(&self, row: &mut Row, hlc: Hlc, versions: &Versions) {
        row[(self.synced.hlc_attnum - 1) as usize] = heap::int8(hlc.0);
        row[(self.synced.cells_attnum - 1) as usize] = (!versions.is_empty()).then(|| {
            let mut cells = Vec::new();
            versions.encode(&mut cells);
            heap::bytea(&cells)
        });
    }

    /// A row as one value of the table's row type, in the current memory context, and that type.
    pub fn composite(&mut self, row: &Row) -> (pg_sys::Datum, pg_sys::Oid) {
        // SAFETY: a tuple of this relation, copied.
        unsafe {
            fill(self.fresh, row);
            let tuple = pg_sys::ExecCopySlotHeapTuple(self.fresh);
            (pg_sys::heap_copy_tuple_as_datum(tuple, (*self.rel).rd_att), (*(*self.rel).rd_rel).reltype)
        }
    }

    /// The row at a place, locked, waiting for whoever is writing it. Errors (retry) if it is gone or changed.
    pub fn lock_place(&mut self, place: pg_sys::ItemPointerData) -> Result<Row> {
        let mut place = place;
        let mut failure = pg_sys::TM_FailureData::default();
        // SAFETY: a slot of this relation; every table access method can lock.
        let result = unsafe {
            let lock = (*(*self.rel).rd_tableam).tuple_lock.ok_or_else(|| Error::bug("a table that can't lock"))?;
            lock(
                self.rel,
                &mut place,
                pg_sys::GetLatestSnapshot(),
                self.found,
                pg_sys::GetCurrentCommandId(false),
                pg_sys::LockTupleMode::LockTupleExclusive,
                pg_sys::LockWaitPolicy::LockWaitBlock,
                0,
                &mut failure,
            )
        };
        if result == pg_sys::TM_Result::TM_Ok {
            // SAFETY: the slot holds the locked row.
            return Ok(unsafe { self.found_row() });
        }
        Err(Error::retry(
            PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
            format!("a row of table {} changed while it was looked at", self.synced.display_name()),
        ))
    }

    /// True if a stored row was found and not yet given up.
    pub fn is_found(&self) -> bool {
        // SAFETY: the slot is ours.
        unsafe { (*self.found).tts_flags & pg_sys::TTS_FLAG_EMPTY as u16 == 0 }
    }

    /// A row of what is known of it; the other columns take their defaults.
    pub fn row_of_content(&mut self, content: &[Option<Option<pg_sys::Datum>>]) -> Row {
        let rel = self.synced.clone();
        let mut row = vec![None; rel.natts];
        for (column, known) in rel.columns.iter().zip(content) {
            let value = match known {
                Some(value) => *value,
                None => self.default_of(column.attnum),
            };
            set_value(&mut row, column, value);
        }
        row
    }

    /// The place of the row that was found.
    pub fn found_place(&self) -> (u32, u16) {
        // SAFETY: the found slot holds a stored row.
        pgrx::itemptr::item_pointer_get_both(unsafe { (*self.found).tts_tid })
    }

    /// Shows every row to `f`, in memory that is reset after each.
    pub fn scan(&mut self, mut f: impl FnMut(&Table, &Row)) {
        // SAFETY: a scan of the open relation under a registered snapshot, ended before it returns; an ERROR
        // releases both.
        unsafe {
            let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
            let scan = pg_sys::table_beginscan(self.rel, snapshot, 0, std::ptr::null_mut());
            let previous = pg_sys::MemoryContextSwitchTo(self.row_context);
            while pg_sys::table_scan_getnextslot(scan, pg_sys::ScanDirection::ForwardScanDirection, self.found) {
                f(self, &self.found_row());
                pg_sys::MemoryContextReset(self.row_context);
            }
            pg_sys::MemoryContextSwitchTo(previous);
            pg_sys::ExecClearTuple(self.found);
            pg_sys::table_endscan(scan);
            pg_sys::UnregisterSnapshot(snapshot);
        }
    }

    /// Deletes the row that was found and inserts it again as a local write, captured like any other.
    pub fn rewrite(&mut self) -> Result<()> {
        let (block, offset) = self.found_place();
        let quote = |name: &str| pgrx::spi::quote_identifier(name);
        let columns: Vec<_> = self.synced.columns.iter().map(|c| quote(&c.name)).collect();
        let (columns, name) =
            (columns.join(", "), pgrx::spi::quote_qualified_identifier(&self.synced.schema, &self.synced.table));
        let query = format!(
            "with gone as (delete from only {name} where ctid = '({block},{offset})'::pg_catalog.tid returning {columns}) \
             insert into {name} ({columns}) overriding system value select {columns} from gone"
        );
        let written = Spi::connect_mut(|client| client.update(query.as_str(), None, &[]).map(|t| t.len()))?;
        if written == 1 {
            return Ok(());
        }
        Err(Error::retry(
            PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
            format!("a row of table {} was not there to be written again", self.synced.display_name()),
        ))
    }
}

/// Goes back to the memory context of before when dropped.
pub struct RowMemory(pg_sys::MemoryContext);

impl Drop for RowMemory {
    fn drop(&mut self) {
        // SAFETY: the context that was current before is of the transaction or longer.
        unsafe { pg_sys::MemoryContextSwitchTo(self.0) };
    }
}

/// Value of a column in a row.
pub fn value_of(row: &Row, attnum: i16) -> Option<pg_sys::Datum> {
    row.get((attnum - 1) as usize).copied().flatten()
}

/// The same, and the place to set it.
pub fn set_value(row: &mut Row, column: &Column, value: Option<pg_sys::Datum>) {
    row[(column.attnum - 1) as usize] = value;
}

unsafe fn fill(slot: *mut pg_sys::TupleTableSlot, row: &Row) {
    // SAFETY: a virtual slot of a relation with as many attributes as the row.
    unsafe {
        pg_sys::ExecClearTuple(slot);
        for (i, value) in row.iter().enumerate() {
            *(*slot).tts_values.add(i) = value.unwrap_or(pg_sys::Datum::from(0usize));
            *(*slot).tts_isnull.add(i) = value.is_none();
        }
        pg_sys::ExecStoreVirtualTuple(slot);
    }
}

unsafe fn init_epq(epq: &mut pg_sys::EPQState, estate: *mut pg_sys::EState) {
    let none = std::ptr::null_mut;
    // SAFETY: as native logical replication does for a single relation: no plan, no row marks.
    #[cfg(feature = "pg15")]
    unsafe {
        pg_sys::EvalPlanQualInit(epq, estate, none(), std::ptr::null_mut(), -1)
    };
    // SAFETY: as above.
    #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
    unsafe {
        pg_sys::EvalPlanQualInit(epq, estate, none(), std::ptr::null_mut(), -1, std::ptr::null_mut())
    };
}

/// Gives the estate a range table of the one relation. Returns where the updated columns are noted.
unsafe fn range_table(estate: *mut pg_sys::EState, rel: pg_sys::Relation) -> *mut *mut pg_sys::Bitmapset {
    // SAFETY: nodes in the estate's own memory context, as native logical replication makes them.
    unsafe {
        let entry = pg_sys::palloc0(size_of::<pg_sys::RangeTblEntry>()).cast::<pg_sys::RangeTblEntry>();
        (*entry).type_ = pg_sys::NodeTag::T_RangeTblEntry;
        (*entry).rtekind = pg_sys::RTEKind::RTE_RELATION;
        (*entry).relid = (*rel).rd_id;
        (*entry).relkind = (*(*rel).rd_rel).relkind;
        (*entry).rellockmode = pg_sys::RowExclusiveLock as i32;
        let entries = pg_sys::lappend(std::ptr::null_mut(), entry.cast());
        #[cfg(feature = "pg15")]
        {
            pg_sys::ExecInitRangeTable(estate, entries);
            &raw mut (*entry).updatedCols
        }
        #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
        {
            let mut permissions = std::ptr::null_mut();
            let permission = pg_sys::addRTEPermissionInfo(&mut permissions, entry);
            #[cfg(not(feature = "pg18"))]
            pg_sys::ExecInitRangeTable(estate, entries, permissions);
            #[cfg(feature = "pg18")]
            pg_sys::ExecInitRangeTable(estate, entries, permissions, pg_sys::bms_make_singleton(1));
            &raw mut (*permission).updatedCols
        }
    }
}
