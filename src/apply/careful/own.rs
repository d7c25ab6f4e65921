//! Writes of this node within an apply (I11): statements on the table, captured and sent like any user's. The
//! user's triggers don't fire, as for everything that is applied.
use super::super::table::{Row, Table, value_of};
use crate::capture;
use crate::error::{Error, Result};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use tandem_model::hlc::Hlc;
use tandem_model::versions::{CellId, Versions};

/// Inserts a row. The table's key must be free.
pub fn insert(table: &Table, row: &Row) -> Result<()> {
    let rel = &table.synced;
    let (mut names, mut places, mut parameters) = (Vec::new(), Vec::new(), Vec::new());
    for column in &rel.columns {
        names.push(pgrx::spi::quote_identifier(&column.name));
        parameters.push(match value_of(row, column.attnum) {
            // SAFETY: a value of the column's type, in memory that outlives the statement.
            Some(datum) => unsafe { DatumWithOid::new(datum, column.typid) },
            None => DatumWithOid::null_oid(column.typid),
        });
        places.push(format!("${}", parameters.len()));
    }
    let statement = format!(
        "insert into {} ({}) overriding system value values ({})",
        pgrx::spi::quote_qualified_identifier(&rel.schema, &rel.table),
        names.join(", "),
        places.join(", ")
    );
    one_row(table, &statement, &parameters)
}

/// Deletes the row that was found.
pub fn delete(table: &Table) -> Result<()> {
    let name = pgrx::spi::quote_qualified_identifier(&table.synced.schema, &table.synced.table);
    let (block, offset) = table.found_place();
    one_row(table, &format!("delete from only {name} where ctid = '({block},{offset})'::pg_catalog.tid"), &[])
}

fn one_row(table: &Table, statement: &str, parameters: &[DatumWithOid<'_>]) -> Result<()> {
    match Spi::connect_mut(|client| client.update(statement, None, parameters).map(|rows| rows.len()))? {
        1 => Ok(()),
        _ => Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("a row of table {} was not written", table.synced.display_name()),
            "A rule or a row-level security policy of the table suppresses the statement.",
        )),
    }
}

/// Gives cells of the row that was found a new version of this node, with the values in `new`; `versions` is
/// what the row listed before, its own and what was joined into it.
pub fn update_cells(table: &mut Table, old: &Row, new: &Row, versions: &Versions, cells: &[CellId]) -> Result<Hlc> {
    let mut after = versions.clone();
    let rel = table.synced.clone();
    let version = capture::own_update(&rel, &mut after, cells.to_vec(), old, new);
    let mut row = new.clone();
    table.set_versions(&mut row, version, &after);
    table.update(&row);
    Ok(version)
}
