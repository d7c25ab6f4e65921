//! A digest of a table's content that does not depend on the order of rows or columns, nor on who asks:
//! two servers that hold the same rows compute the same one.
use crate::error::{Error, Result};
use crate::relation::SyncedRelation;
use pgrx::prelude::*;
use pgrx::spi::{quote_identifier, quote_qualified_identifier};

/// Columns in one call of format(): a function takes at most 100 arguments.
const COLUMNS_PER_CALL: usize = 64;

pub struct Digest {
    pub rows: i64,
    pub sum: AnyNumeric,
}

/// Reads the table whole, with the rights of the caller. The caller holds a lock against writers.
pub fn of(relation: &SyncedRelation) -> Result<Digest> {
    let table = quote_qualified_identifier(&relation.schema, &relation.table);
    let query = format!(
        "select count(*), coalesce(sum(hashtextextended(({}) collate \"C\", 0)::numeric), 0) from only {table}",
        row_text(relation)
    );
    let _canonical = super::canonical::canonical();
    // A mutable connection: the snapshot must be newer than the lock.
    let row = Spi::connect_mut(|client| -> std::result::Result<_, pgrx::spi::Error> {
        client.update(&query, Some(1), &[])?.first().get_two::<i64, AnyNumeric>()
    })?;
    match row {
        (Some(rows), Some(sum)) => Ok(Digest { rows, sum }),
        _ => Err(Error::bug("a digest came back empty")),
    }
}

/// An expression for the text of a row: its values quoted, columns by name.
fn row_text(relation: &SyncedRelation) -> String {
    let mut columns: Vec<&str> = relation.columns.iter().map(|c| c.name.as_str()).collect();
    columns.sort_unstable();
    let calls: Vec<String> = columns
        .chunks(COLUMNS_PER_CALL)
        .map(|chunk| {
            let form = vec!["%L"; chunk.len()].join(",");
            let values: Vec<String> = chunk.iter().map(quote_identifier).collect();
            format!("format('{form}', {})", values.join(", "))
        })
        .collect();
    calls.join(" || ',' || ")
}
