//! The arithmetic of counters: Postgres adds, as `numeric`, what the model only moves (`tandem_model::counter`).
//!
//! Called by capture (what an update added) and by apply (what a cell holds that both nodes added to).
use crate::capture::change::{Row, datum};
use crate::error::{Error, Result};
use crate::relation::{Column, SyncedRelation};
use pgrx::AnyNumeric;
use pgrx::prelude::*;
use tandem_model::counter::Counter;
use tandem_model::hlc::Hlc;
use tandem_model::policy::Policy;
use tandem_model::versions::{CellId, Versions};

/// Only history that was lost begins another.
const EPOCH: u32 = 0;

/// True for the types that a counter may have: their sums depend on no order.
pub fn is_number(typid: pg_sys::Oid) -> bool {
    [pg_sys::INT2OID, pg_sys::INT4OID, pg_sys::INT8OID, pg_sys::NUMERICOID].contains(&typid)
}

/// The number that a column holds; nothing for NULL, and for what cannot be added to (NaN, Infinity).
fn number(column: &Column, value: Option<pg_sys::Datum>) -> Option<AnyNumeric> {
    let value = value?;
    // SAFETY: a value of the column's type, not null.
    let number = unsafe {
        match column.typid {
            pg_sys::INT2OID => i16::from_datum(value, false)?.into(),
            pg_sys::INT4OID => i32::from_datum(value, false)?.into(),
            pg_sys::INT8OID => i64::from_datum(value, false)?.into(),
            pg_sys::NUMERICOID => AnyNumeric::from_datum(value, false)?,
            _ => return None,
        }
    };
    let finite = number.to_string().bytes().all(|b| b.is_ascii_digit() || b == b'-' || b == b'.');
    finite.then_some(number)
}

fn parse(text: &str) -> Result<AnyNumeric> {
    AnyNumeric::try_from(text).map_err(|e| Error::bug(format!("a sum is no number: {e}")))
}

/// Stamps the write of a cell: an update of a counter adds to it, whatever else sets the cell.
pub fn stamp(rel: &SyncedRelation, versions: &mut Versions, cell: CellId, version: Hlc, old: &Row, new: &Row) {
    match added(rel, versions, cell, version, old, new) {
        Some((held, sum)) => versions.add(cell, version, EPOCH, &held, sum),
        None => versions.set(cell, version),
    }
}

/// The number that a counter held, and all that this node has added to it.
fn added(
    rel: &SyncedRelation,
    versions: &Versions,
    cell: CellId,
    version: Hlc,
    old: &Row,
    new: &Row,
) -> Option<(String, String)> {
    if rel.judged_by.cell(cell) != &Policy::Counter {
        return None;
    }
    let column = rel.cell_columns(cell).next()?;
    let held = number(column, datum(old, column.attnum))?;
    let delta = number(column, datum(new, column.attnum))? - held.clone();
    let sum = match versions.sum(cell, version.node(), EPOCH) {
        Some(before) => parse(before).unwrap_or_else(|e| e.raise()) + delta,
        None => delta,
    };
    Some((held.to_string(), sum.to_string()))
}

/// What a column holds that was set once and added to since.
pub fn value(rel: &SyncedRelation, column: &Column, counter: &Counter) -> Result<Option<pg_sys::Datum>> {
    let add = |a: &str, b: &str| Ok::<_, Error>((parse(a)? + parse(b)?).to_string());
    let total = counter.value(add)?;
    let too_great = || {
        Error::operator(
            PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
            format!(
                "column \"{}\" of table {} cannot hold {total}, what both nodes added up to",
                column.name,
                rel.display_name()
            ),
            "Give the column a wider type on both nodes; applying goes on by itself then.",
        )
    };
    match column.typid {
        pg_sys::INT2OID => Ok(total.parse::<i16>().map_err(|_| too_great())?.into_datum()),
        pg_sys::INT4OID => Ok(total.parse::<i32>().map_err(|_| too_great())?.into_datum()),
        pg_sys::INT8OID => Ok(total.parse::<i64>().map_err(|_| too_great())?.into_datum()),
        _ => Ok(parse(&total)?.into_datum()),
    }
}
