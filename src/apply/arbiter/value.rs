//! Comparing and uniting the two values of a cell, by the operators of their own type, whatever the search
//! path. Runs as the table's owner in a security-restricted operation: operators may be the owner's.
use crate::error::{Error, Result};
use crate::relation::{Column, SyncedRelation};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use std::cmp::Ordering;

/// The lost value if it lies beyond the one that shows, on this side. A NULL is beyond nothing.
pub fn beyond(
    rel: &SyncedRelation,
    column: &Column,
    shown: Option<pg_sys::Datum>,
    lost: Option<pg_sys::Datum>,
    side: Ordering,
) -> Result<Option<pg_sys::Datum>> {
    let Some(lost) = lost else { return Ok(None) };
    let Some(shown) = shown else { return Ok(Some(lost)) };
    let collation = collation(rel, column)?;
    // SAFETY: the default order of the values' own type, which set_policy has asked for.
    let order = unsafe {
        let cache = pg_sys::lookup_type_cache(column.typid, pg_sys::TYPECACHE_CMP_PROC_FINFO as i32);
        if (*cache).cmp_proc == pg_sys::InvalidOid {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
                format!("type {} has lost its order", column.type_name),
                "Set another policy for the column.",
            ));
        }
        pg_sys::FunctionCall2Coll(&raw mut (*cache).cmp_proc_finfo, collation, lost, shown).value() as i32
    };
    Ok((order.cmp(&0) == side).then_some(lost))
}

fn collation(rel: &SyncedRelation, column: &Column) -> Result<pg_sys::Oid> {
    let query = "select attcollation from pg_catalog.pg_attribute where attrelid = $1 and attnum = $2";
    let found: Option<pg_sys::Oid> = crate::pg::query::value(query, &[rel.relid.into(), column.attnum.into()])?;
    Ok(found.unwrap_or(pg_sys::InvalidOid))
}

/// Grouping takes the default equality of the elements' type from the catalog, not from the search path.
const OF_ARRAYS: &str = "
    select pg_catalog.array_cat($1, added) from (
        select pg_catalog.array_agg(e order by n) as added from (
            select e, pg_catalog.min(n) as n from (
                select e, 0::int8 as n from unnest($1) x (e)
                union all select e, n from unnest($2) with ordinality y (e, n)) u
            group by e) g where n > 0) s
    where added is not null";
const OF_JSON: &str = "
    select $1 || added from (
        select pg_catalog.jsonb_agg(e order by n) as added from (
            select e, pg_catalog.min(n) as n from (
                select e, 0::int8 as n from pg_catalog.jsonb_array_elements($1) x (e)
                union all select e, n from pg_catalog.jsonb_array_elements($2) with ordinality y (e, n)) u
            group by e) g where n > 0) s
    where added is not null";

/// The value that shows with the elements that only the lost one has behind its own; none if there are none.
pub fn union(
    column: &Column,
    shown: Option<pg_sys::Datum>,
    lost: Option<pg_sys::Datum>,
) -> Result<Option<pg_sys::Datum>> {
    let Some(lost) = lost else { return Ok(None) };
    let Some(shown) = shown else { return Ok(Some(lost)) };
    let query = if column.typid == pg_sys::JSONBOID { OF_JSON } else { OF_ARRAYS };
    // SAFETY: values of the column's type.
    let argument = |datum| unsafe { DatumWithOid::new(Some(datum), column.typid) };
    // SAFETY: the context that the caller works in: what is found outlives the query there.
    let context = unsafe { pg_sys::CurrentMemoryContext };
    Spi::connect(|client| {
        let rows = client.select(query, Some(1), &[argument(shown), argument(lost)])?.first();
        if rows.is_empty() {
            return Ok(None);
        }
        let found = rows.get_datum_by_ordinal(1)?;
        // SAFETY: a varlena of the query's memory is copied to the caller's.
        Ok(found.map(|datum| unsafe {
            let previous = pg_sys::MemoryContextSwitchTo(context);
            let copy = pg_sys::pg_detoast_datum_copy(datum.cast_mut_ptr());
            pg_sys::MemoryContextSwitchTo(previous);
            pg_sys::Datum::from(copy)
        }))
    })
}
