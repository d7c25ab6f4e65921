//! One value from the catalog, without an XID (`Spi::get_one` takes one each time).
use crate::error::Result;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;

/// The first column of the first row; `None` if there is no row, or NULL in it.
pub fn value<T: FromDatum + IntoDatum>(query: &str, arguments: &[DatumWithOid<'_>]) -> Result<Option<T>> {
    Spi::connect(|client| {
        let rows = client.select(query, Some(1), arguments)?;
        match rows.into_iter().next() {
            Some(row) => Ok(row.get::<T>(1)?),
            None => Ok(None),
        }
    })
}
