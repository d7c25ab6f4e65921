//! Asking a question of [`super::rules`]: SQL with rows as parameters.
use super::super::table::{Row, Table};
use crate::error::Result;
use crate::pg::identity::ActingAs;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;

/// The places of the stored rows that a question finds for a row of `table`. `owners_code`: it runs
/// expressions of the table's owner.
pub fn places(table: &mut Table, row: &Row, question: &str, owners_code: bool) -> Result<Vec<pg_sys::ItemPointerData>> {
    let parameters = [parameter(table, row)];
    let _rights = rights(table, owners_code);
    Spi::connect_mut(|client| {
        let mut places = Vec::new();
        // An update, as far as SPI goes: so that it looks with a new snapshot.
        for found in client.update(question, None, &parameters)? {
            places.extend(found.get::<pg_sys::ItemPointerData>(1)?);
        }
        Ok(places)
    })
}

/// True if a question about one or two rows of `table` finds something.
pub fn holds(table: &mut Table, rows: &[&Row], question: &str, owners_code: bool) -> Result<bool> {
    let parameters: Vec<_> = rows.iter().map(|row| parameter(table, row)).collect();
    let _rights = rights(table, owners_code);
    let found = Spi::connect_mut(|client| client.update(question, Some(1), &parameters).map(|rows| !rows.is_empty()))?;
    Ok(found)
}

fn parameter(table: &mut Table, row: &Row) -> DatumWithOid<'static> {
    let (datum, row_type) = table.composite(row);
    // SAFETY: a value of the table's row type in the memory of the row that is worked on.
    unsafe { DatumWithOid::new(datum, row_type) }
}

fn rights(table: &Table, owners_code: bool) -> ActingAs {
    if owners_code { ActingAs::owner(table.synced.owner) } else { ActingAs::superuser() }
}
