//! Direct access to the extension's own small tables, without SPI and without a snapshot: index scans
//! that see what is in progress, inserts, and deletes that don't mind being second.
use crate::pg::names;
use pgrx::prelude::*;

/// A table of ours, open and locked until the end of the transaction.
pub struct Table(pg_sys::Relation);

impl Table {
    /// Opens `tandem.<name>` with a lock that is kept until the transaction ends.
    pub fn open(name: &str, lock: u32) -> Table {
        // SAFETY: the oid was just looked up; table_open raises if it is gone.
        Table(unsafe { pg_sys::table_open(names::relation_oid(name), lock as pg_sys::LOCKMODE) })
    }

    /// Inserts a row; one value per column, `None` is NULL.
    pub fn insert(&self, values: &[Option<pg_sys::Datum>]) {
        let mut nulls: Vec<bool> = values.iter().map(Option::is_none).collect();
        let mut datums: Vec<_> = values.iter().map(|v| v.unwrap_or(pg_sys::Datum::from(0usize))).collect();
        // SAFETY: as many values as the table has columns, of their types.
        unsafe {
            assert_eq!((*(*self.0).rd_att).natts as usize, values.len());
            let tuple = pg_sys::heap_form_tuple((*self.0).rd_att, datums.as_mut_ptr(), nulls.as_mut_ptr());
            pg_sys::CatalogTupleInsert(self.0, tuple);
            pg_sys::heap_freetuple(tuple);
        }
    }

    /// The first row that the index finds for `keys` (one equality per index column), as `f` sees it: under
    /// a dirty snapshot, after whoever is writing it has finished. `f` gets the row's place and its values.
    pub fn find<R>(
        &self,
        index: &str,
        keys: &mut [pg_sys::ScanKeyData],
        f: impl FnOnce(pg_sys::ItemPointerData, &[Option<pg_sys::Datum>]) -> R,
    ) -> Option<R> {
        let index = names::relation_oid(index);
        loop {
            let mut snapshot =
                pg_sys::SnapshotData { snapshot_type: pg_sys::SnapshotType::SNAPSHOT_DIRTY, ..Default::default() };
            // SAFETY: table and index belong together; the scan is ended on both ways out; an ERROR releases it.
            unsafe {
                let scan = pg_sys::systable_beginscan(
                    self.0,
                    index,
                    true,
                    &mut snapshot,
                    keys.len() as i32,
                    keys.as_mut_ptr(),
                );
                let tuple = pg_sys::systable_getnext(scan);
                let writer = [snapshot.xmin, snapshot.xmax].into_iter().find(|x| *x != pg_sys::InvalidTransactionId);
                if tuple.is_null() || writer.is_none() {
                    let result = (!tuple.is_null()).then(|| f((*tuple).t_self, &self.deform(tuple)));
                    pg_sys::systable_endscan(scan);
                    return result;
                }
                pg_sys::systable_endscan(scan);
                if let Some(xid) = writer {
                    pg_sys::XactLockTableWait(
                        xid,
                        std::ptr::null_mut(),
                        std::ptr::null_mut(),
                        pg_sys::XLTW_Oper::XLTW_None,
                    );
                }
            }
        }
    }

    fn deform(&self, tuple: pg_sys::HeapTuple) -> Vec<Option<pg_sys::Datum>> {
        // SAFETY: the tuple is of this table.
        unsafe { deform(tuple, (*self.0).rd_att) }
    }

    /// Deletes a row. False if somebody else did.
    pub fn delete(&self, place: pg_sys::ItemPointerData) -> bool {
        let mut place = place;
        let mut failure = pg_sys::TM_FailureData::default();
        // SAFETY: a row of this table; waits for a concurrent writer and reports what it did.
        let result = unsafe {
            pg_sys::CommandCounterIncrement();
            pg_sys::heap_delete(
                self.0,
                &mut place,
                pg_sys::GetCurrentCommandId(true),
                std::ptr::null_mut(),
                true,
                &mut failure,
                false,
            )
        };
        result == pg_sys::TM_Result::TM_Ok
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: opened by open(); after an ERROR the resource owner has closed it, and this is not reached
        // in a failed transaction with the reference still counted.
        unsafe {
            if pg_sys::IsTransactionState() {
                pg_sys::table_close(self.0, pg_sys::NoLock as pg_sys::LOCKMODE);
            }
        }
    }
}

/// All attributes of a tuple, missing ones included.
///
/// # Safety
/// `tuple` must be of the row type `desc`.
pub unsafe fn deform(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc) -> Vec<Option<pg_sys::Datum>> {
    // SAFETY: both arrays have natts entries.
    unsafe {
        let natts = (*desc).natts as usize;
        let mut datums = vec![pg_sys::Datum::from(0usize); natts];
        let mut nulls = vec![true; natts];
        pg_sys::heap_deform_tuple(tuple, desc, datums.as_mut_ptr(), nulls.as_mut_ptr());
        datums.into_iter().zip(nulls).map(|(d, null)| (!null).then_some(d)).collect()
    }
}

/// An equality on an index column.
pub fn equals(column: i16, function: u32, value: pg_sys::Datum) -> pg_sys::ScanKeyData {
    let mut key = pg_sys::ScanKeyData::default();
    // SAFETY: fills in the key; the function is a built-in equality.
    unsafe {
        pg_sys::ScanKeyInit(&mut key, column, pg_sys::BTEqualStrategyNumber as u16, pg_sys::Oid::from(function), value);
    }
    key
}

/// A bytea in the current memory context.
pub fn bytea(bytes: &[u8]) -> pg_sys::Datum {
    let size = bytes.len() + pg_sys::VARHDRSZ;
    // SAFETY: palloc raises if it can't; header and bytes fit exactly.
    unsafe {
        let varlena = pg_sys::palloc(size).cast::<pg_sys::varlena>();
        pgrx::set_varsize_4b(varlena, size as i32);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), varlena.cast::<u8>().add(pg_sys::VARHDRSZ), bytes.len());
        pg_sys::Datum::from(varlena)
    }
}

/// The bytes of a bytea (or of any varlena), detoasted.
///
/// # Safety
/// `datum` must be a non-null varlena.
pub unsafe fn bytes(datum: pg_sys::Datum) -> Vec<u8> {
    // SAFETY: see above; a detoasted copy stays in the current context.
    unsafe { pgrx::varlena_to_byte_slice(pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr())).to_vec() }
}

/// An 8-byte value.
pub fn int8(value: u64) -> Option<pg_sys::Datum> {
    Some(pg_sys::Datum::from(value as i64))
}
