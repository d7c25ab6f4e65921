//! From rows to [`Change`]s: values as they travel, keys, cells and what they replaced.
use crate::relation::{Column, SyncedRelation};
use crate::value;
use pgrx::prelude::*;
use serde_bytes::Bytes;
use std::ops::Range;
use tandem_model::change::{CellChange, Change, Op};
use tandem_model::hlc::Hlc;
use tandem_model::versions::{CellId, Versions};

/// The attributes of a row by number (`row[attnum - 1]`).
pub type Row = [Option<pg_sys::Datum>];

/// Value of a column in a row.
pub fn datum(row: &Row, attnum: i16) -> Option<pg_sys::Datum> {
    row.get((attnum - 1) as usize).copied().flatten()
}

/// Bytes of values, all in one allocation.
#[derive(Default)]
struct Arena(Vec<u8>);

impl Arena {
    fn encode(&mut self, column: &Column, row: &Row) -> Option<Range<usize>> {
        let value = datum(row, column.attnum)?;
        let start = self.0.len();
        value::encode(column, value, &mut self.0);
        Some(start..self.0.len())
    }
    fn get(&self, range: &Option<Range<usize>>) -> Option<&Bytes> {
        range.clone().map(|r| Bytes::new(&self.0[r]))
    }
}

/// The bytes by which a row's key is known in the catalog.
pub fn key_of(rel: &SyncedRelation, row: &Row) -> Vec<u8> {
    let mut arena = Arena::default();
    let key: Vec<_> = rel.key.iter().map(|i| arena.encode(&rel.columns[*i], row)).collect();
    value::encode_key(&key.iter().map(|k| arena.get(k).map(|b| &b[..])).collect::<Vec<_>>())
}

/// The whole content of a row, for its tombstone.
pub fn image_of(rel: &SyncedRelation, row: &Row) -> Vec<u8> {
    let mut arena = Arena::default();
    let values: Vec<_> = rel.columns.iter().map(|c| (c.attnum as u16, arena.encode(c, row))).collect();
    value::encode_image(&values.iter().map(|(a, v)| (*a, arena.get(v).map(|b| &b[..]))).collect::<Vec<_>>())
}

/// The cells whose columns differ between two rows of one key.
pub fn changed_cells(rel: &SyncedRelation, old: &Row, new: &Row) -> Vec<CellId> {
    let mut changed = Vec::new();
    for column in rel.columns.iter().filter(|c| c.key_ordinal.is_none()) {
        if changed.contains(&column.cell) {
            continue;
        }
        if !value::equal(column, datum(old, column.attnum), datum(new, column.attnum)) {
            changed.push(column.cell);
        }
    }
    changed
}

/// True if both rows have the same key.
pub fn same_key(rel: &SyncedRelation, old: &Row, new: &Row) -> bool {
    rel.key.iter().all(|i| {
        let column = &rel.columns[*i];
        value::equal(column, datum(old, column.attnum), datum(new, column.attnum))
    })
}

/// What a change says of the row besides its values.
pub struct Facts<'a> {
    pub op: Op,
    pub version: Hlc,
    pub life: Hlc,
    pub base: Versions,
    /// Cells that the change carries.
    pub cells: Vec<CellId>,
    /// What the row lists of its versions afterwards: of an update, it tells which cells were added to.
    pub listed: Option<&'a Versions>,
}

/// Builds the change of a row and hands it to `f`. `old` is the row that was replaced (for an update the
/// values of the changed cells travel as well); `moved` the row under the other key of a key update.
pub fn build<R>(
    rel: &SyncedRelation,
    facts: Facts<'_>,
    row: &Row,
    old: Option<&Row>,
    moved: Option<&Row>,
    f: impl FnOnce(&Change<'_>) -> R,
) -> R {
    let mut arena = Arena::default();
    let mut key_values =
        |row: &Row| -> Vec<_> { rel.key.iter().map(|i| arena.encode(&rel.columns[*i], row)).collect() };
    let key = key_values(row);
    let moved = moved.map(key_values);
    let mut cells = Vec::with_capacity(facts.cells.len());
    for cell in &facts.cells {
        let new: Vec<_> = rel.cell_columns(*cell).map(|c| arena.encode(c, row)).collect();
        let old: Vec<_> = match old {
            Some(old) => rel.cell_columns(*cell).map(|c| arena.encode(c, old)).collect(),
            None => Vec::new(),
        };
        cells.push((*cell, new, old));
    }
    let get = |values: &Vec<Option<Range<usize>>>| values.iter().map(|v| arena.get(v)).collect::<Vec<_>>();
    let change = Change {
        descriptor: rel.descriptor,
        op: facts.op,
        key: get(&key),
        version: facts.version,
        life: facts.life,
        base: facts.base,
        cells: cells
            .iter()
            .map(|(cell, new, old)| CellChange {
                cell: *cell,
                version: facts.version,
                new: get(new),
                old: get(old),
                delta: facts.listed.and_then(|listed| listed.delta(*cell, facts.version)),
            })
            .collect(),
        moved: moved.as_ref().map(get),
    };
    f(&change)
}
