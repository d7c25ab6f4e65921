//! Sequences that never collide: both nodes count in steps of 64, each from an offset of its own.
use super::{answer, node};
use crate::error::{Error, Result};
use crate::shmem;
use pgrx::PgRelation;
use pgrx::prelude::*;
use pgrx::spi::quote_qualified_identifier;

/// One more than the greatest node id, so that every node has a residue of its own.
const STEP: i64 = 64;

/// Returns the next value that the sequence will give.
#[pg_extern]
fn stagger_sequence(sequence: PgRelation) -> i64 {
    answer(stagger(&sequence))
}

struct Range {
    min: i64,
    max: i64,
    last: i64,
}

fn stagger(sequence: &PgRelation) -> Result<i64> {
    node::require()?;
    let offset = i64::from(shmem::database().node().map_or(0, |n| n.0));
    let name = quote_qualified_identifier(sequence.namespace(), sequence.name());
    check(sequence)?;
    // Takes the lock that nextval waits for: what is read below is then the last word.
    Spi::run(&format!("alter sequence {name} increment by {STEP}"))?;
    let range = read(sequence, &name)?;
    let next = first_above(range.last.max(greatest_used(sequence)?), offset);
    if next > range.max {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_SEQUENCE_GENERATOR_LIMIT_EXCEEDED,
            format!("sequence {name} has no room left to count in steps of {STEP}"),
            format!("Widen it first: ALTER SEQUENCE {name} AS bigint;"),
        ));
    }
    let start = first_above(range.min - 1, offset);
    Spi::run(&format!("alter sequence {name} start with {start} restart with {next}"))?;
    Ok(next)
}

/// The least number above `floor` that leaves `offset` when divided by the step.
fn first_above(floor: i64, offset: i64) -> i64 {
    floor + 1 + (offset - (floor + 1)).rem_euclid(STEP)
}

fn check(sequence: &PgRelation) -> Result<()> {
    // SAFETY: rd_rel is set for an open relation.
    let kind = unsafe { (*sequence.rd_rel).relkind } as u8;
    if kind != pg_sys::RELKIND_SEQUENCE {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            format!("\"{}\" is not a sequence", sequence.name()),
            "Name the sequence: SELECT tandem.stagger_sequence(pg_get_serial_sequence('orders', 'id'));",
        ));
    }
    let query = "select seqincrement < 0 or seqcycle from pg_catalog.pg_sequence where seqrelid = $1";
    if Spi::get_one_with_args::<bool>(query, &[sequence.oid().into()])? == Some(true) {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("sequence {} counts down or cycles, and cannot be staggered", sequence.name()),
            "ALTER SEQUENCE … INCREMENT BY 1 NO CYCLE; first.",
        ));
    }
    Ok(())
}

fn read(sequence: &PgRelation, name: &str) -> Result<Range> {
    let bounds = "select seqmin, seqmax from pg_catalog.pg_sequence where seqrelid = $1";
    let (min, max) = Spi::get_two_with_args::<i64, i64>(bounds, &[sequence.oid().into()])?;
    let last = Spi::get_one::<i64>(&format!(
        "select case when is_called then last_value else last_value - 1 end from {name}"
    ))?;
    Ok(Range { min: min.unwrap_or(1), max: max.unwrap_or(i64::MAX), last: last.unwrap_or(0) })
}

/// The greatest value in the column that the sequence belongs to (a serial or an identity): the peer's rows
/// are in there too.
fn greatest_used(sequence: &PgRelation) -> Result<i64> {
    let owner = "select format('select max(%I)::int8 from %I.%I', a.attname, n.nspname, c.relname)
        from pg_catalog.pg_depend d
        join pg_catalog.pg_class c on c.oid = d.refobjid
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        join pg_catalog.pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
        where d.classid = 'pg_catalog.pg_class'::regclass and d.objid = $1
          and d.refclassid = 'pg_catalog.pg_class'::regclass and d.deptype in ('a', 'i')";
    match Spi::get_one_with_args::<String>(owner, &[sequence.oid().into()]) {
        Ok(Some(query)) => Ok(Spi::get_one::<i64>(&query)?.unwrap_or(i64::MIN)),
        Ok(None) | Err(pgrx::spi::Error::InvalidPosition) => Ok(i64::MIN),
        Err(e) => Err(e.into()),
    }
}
