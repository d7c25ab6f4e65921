//! Rows that don't show, by table and key, with their versions and content: the storage behind
//! [`crate::tombstone`] and [`crate::displaced`].
//!
//! Written by whoever takes a row away (capture, apply), in the same transaction; looked up under a dirty
//! snapshot, so that an INSERT that waited for a concurrent DELETE finds what that left.
use crate::error::{Error, Result};
use crate::pg::heap::{self, Table};
use pgrx::prelude::*;
use tandem_model::hlc::Hlc;
use tandem_model::versions::Versions;

/// A row that doesn't show.
#[derive(Debug, Clone)]
pub struct Stashed {
    pub hlc: Hlc,
    pub versions: Versions,
    /// Content, see [`crate::value::encode_image`].
    pub image: Vec<u8>,
    /// The descriptor that the image's values are of.
    pub descriptor: u32,
}

/// Columns that all of these tables have.
const COLUMNS: usize = 6;

/// A table of such rows: `relid, key, hlc, cells, image, descriptor`, and what else it has.
pub struct Stash {
    pub table: &'static str,
    pub index: &'static str,
}

impl Stash {
    fn open(&self) -> Table {
        Table::open(self.table, pg_sys::RowExclusiveLock)
    }

    /// The row of a key, after whoever is writing it has finished, and what `rest` makes of the further columns.
    pub fn find<R>(
        &self,
        relid: pg_sys::Oid,
        key: &[u8],
        rest: impl FnOnce(&[Option<pg_sys::Datum>]) -> R,
    ) -> Option<(Stashed, R)> {
        let mut keys = keys(relid, key);
        let found = self.open().find(self.index, &mut keys, |_, row| {
            let (stashed, further) = row.split_at(COLUMNS.min(row.len()));
            read(stashed).map(|stashed| (stashed, rest(further)))
        });
        found.map(|found| found.unwrap_or_else(|e| e.raise()))
    }

    fn place(&self, table: &Table, relid: pg_sys::Oid, key: &[u8]) -> Option<pg_sys::ItemPointerData> {
        table.find(self.index, &mut keys(relid, key), |place, _| place)
    }

    /// Writes the row of a key in place of one that may be there; `rest` are the further columns.
    pub fn put(&self, relid: pg_sys::Oid, key: &[u8], row: &Stashed, rest: &[Option<pg_sys::Datum>]) {
        let table = self.open();
        if let Some(place) = self.place(&table, relid, key) {
            table.delete(place);
        }
        let mut cells = Vec::new();
        row.versions.encode(&mut cells);
        let mut columns = vec![
            Some(relid.into()),
            Some(heap::bytea(key)),
            heap::int8(row.hlc.0),
            Some(heap::bytea(&cells)),
            Some(heap::bytea(&row.image)),
            Some(pg_sys::Datum::from(row.descriptor as i32)),
        ];
        columns.extend_from_slice(rest);
        table.insert(&columns);
    }

    /// Removes the row of a key. False if there was none.
    pub fn remove(&self, relid: pg_sys::Oid, key: &[u8]) -> bool {
        let table = self.open();
        self.place(&table, relid, key).is_some_and(|place| table.delete(place))
    }
}

fn keys(relid: pg_sys::Oid, key: &[u8]) -> [pg_sys::ScanKeyData; 2] {
    [heap::equals(1, pg_sys::F_OIDEQ, relid.into()), heap::equals(2, pg_sys::F_BYTEAEQ, heap::bytea(key))]
}

fn read(row: &[Option<pg_sys::Datum>]) -> Result<Stashed> {
    let &[_, _, Some(hlc), Some(cells), Some(image), Some(descriptor)] = row else {
        return Err(Error::bug("a row that doesn't show has a NULL"));
    };
    // SAFETY: columns 4 and 5 are varlenas, not null.
    let (cells, image) = unsafe { (heap::bytes(cells), heap::bytes(image)) };
    Ok(Stashed {
        hlc: Hlc(hlc.value() as u64),
        versions: Versions::decode(&cells)?,
        image,
        descriptor: descriptor.value() as u32,
    })
}
