//! The journal: a ring of segments that holds this node's stream until the peer has it.
//!
//! A transaction is one row, written at pre-commit; the parts of a large one go into the segment's chunk
//! table first. A segment is truncated whole, never deleted from. When no segment is free the present one
//! goes on growing: nobody waits.
use crate::error::{Error, Result};
use crate::guc;
use crate::pg::heap::{self, Table};
use crate::pg::identity::ActingAs;
use crate::pg::names;
use crate::pg::query;
use crate::registry;
use crate::shmem;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::{Hlc, Mark, Position};

/// Segments of the ring (see `sql/catalog.sql`).
pub const SEGMENTS: u32 = 4;

/// A transaction in the journal.
#[derive(Debug, Clone)]
pub struct Row {
    pub mark: Mark,
    pub seen: Mark,
    pub stable: Hlc,
    /// Its first version: what its chunks are found by.
    pub first: Hlc,
    pub chunks: u32,
    pub payload: Vec<u8>,
}

/// A transaction as it is read, and the segment that holds it (and its chunks).
pub struct Found {
    pub row: Row,
    pub segment: u32,
}

/// The segment that this transaction writes to: locked, so that it can't be truncated before the commit.
pub struct Segment {
    pub number: u32,
    rows: Table,
    chunks: Table,
}

impl Segment {
    /// Picks the segment in use, and looks again once it is locked.
    pub fn pick() -> Segment {
        let database = shmem::database();
        loop {
            let number = database.segment.load(Acquire);
            let segment = Segment {
                number,
                rows: Table::open(&format!("journal_{number}"), pg_sys::RowExclusiveLock),
                chunks: Table::open(&format!("journal_chunk_{number}"), pg_sys::RowExclusiveLock),
            };
            if database.segment.load(Acquire) == number {
                return segment;
            }
        }
    }

    /// Writes a part of a large transaction.
    pub fn append_chunk(&self, first: Hlc, ordinal: u32, payload: &[u8]) {
        let ordinal = pg_sys::Datum::from(ordinal as i32);
        self.chunks.insert(&[heap::int8(first.0), Some(ordinal), Some(heap::bytea(payload))]);
    }

    /// Writes the row that makes a transaction part of the stream.
    pub fn append(&self, row: &Row) {
        self.rows.insert(&[
            heap::int8(row.mark.position.0),
            heap::int8(row.mark.low.0),
            heap::int8(row.seen.position.0),
            heap::int8(row.seen.low.0),
            heap::int8(row.stable.0),
            heap::int8(row.first.0),
            Some(pg_sys::Datum::from(row.chunks as i32)),
            Some(heap::bytea(&row.payload)),
        ]);
    }
}

/// The query over the segments that may hold something above `after`: the others are left to be truncated.
fn query_above(after: Position) -> Option<String> {
    let database = shmem::database();
    let holding: Vec<String> = (0..SEGMENTS)
        .filter(|n| database.segment_last[*n as usize].load(Acquire) > after.0)
        .map(|n| format!("select {n}::int4 as segment, * from tandem.journal_{n}"))
        .collect();
    (!holding.is_empty()).then(|| {
        format!(
            "select \"position\"::int8, low::int8, seen::int8, seen_low::int8, stable::int8, first::int8, chunks, payload, \
             segment from ({}) j where \"position\" > $1::int8::tandem.position \
             and \"position\" <= $2::int8::tandem.position order by \"position\"",
            holding.join(" union all ")
        )
    })
}

/// Reads the stream above `after` up to `upto` (a horizon taken before this statement's snapshot), until
/// `f` returns false. Errors (55000) if the journal no longer reaches back to `after`.
pub fn read(after: Position, upto: Position, mut f: impl FnMut(Found) -> Result<bool>) -> Result<()> {
    const ROWS_AT_A_TIME: i64 = 64;
    let _superuser = ActingAs::superuser();
    let Some(query) = query_above(after) else { return check_reach(after) };
    Spi::connect(|client| -> Result<()> {
        let mut cursor = client.try_open_cursor(query.as_str(), &[(after.0 as i64).into(), (upto.0 as i64).into()])?;
        loop {
            let rows = cursor.fetch(ROWS_AT_A_TIME)?;
            let none = rows.is_empty();
            for row in rows {
                let number = |i| -> Result<u64> { Ok(row.get::<i64>(i)?.unwrap_or(0) as u64) };
                let segment = row.get::<i32>(9)?.unwrap_or(0) as u32;
                let row = Row {
                    mark: Mark { position: Position(number(1)?), low: Hlc(number(2)?) },
                    seen: Mark { position: Position(number(3)?), low: Hlc(number(4)?) },
                    stable: Hlc(number(5)?),
                    first: Hlc(number(6)?),
                    chunks: row.get::<i32>(7)?.unwrap_or(0) as u32,
                    payload: row.get::<Vec<u8>>(8)?.unwrap_or_default(),
                };
                if !f(Found { row, segment })? {
                    return Ok(());
                }
            }
            if none {
                return Ok(());
            }
        }
    })?;
    check_reach(after)
}

/// TRUNCATE is not MVCC: only after a read one can tell whether something that was asked for is gone.
fn check_reach(after: Position) -> Result<()> {
    let trimmed = trimmed_to()?;
    if after < trimmed {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("the journal starts after {trimmed}, the peer asks from {after}"),
            "The two databases have to be joined anew: remove the tables on one side and add them again.",
        ));
    }
    Ok(())
}

/// A part of the large transaction in this segment whose first version is `first`.
pub fn chunk(segment: u32, first: Hlc, ordinal: u32) -> Result<Option<Vec<u8>>> {
    let _superuser = ActingAs::superuser();
    let query = format!(
        "select payload from tandem.journal_chunk_{segment} where first = $1::int8::tandem.hlc and ordinal = $2"
    );
    query::value(&query, &[(first.0 as i64).into(), (ordinal as i32).into()])
}

/// Rows at or below this position are gone, as committed now (not as of the statement's snapshot).
pub fn trimmed_to() -> Result<Position> {
    let _superuser = ActingAs::superuser();
    // SAFETY: a snapshot of now for one query, popped below; an ERROR pops it as well.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let trimmed: Option<i64> = query::value("select trimmed_to::int8 from tandem.journal_trim", &[])?;
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    trimmed.map(|p| Position(p as u64)).ok_or_else(|| Error::bug("tandem.journal_trim is empty"))
}

fn size_of_segment(number: u32) -> Result<i64> {
    let query = format!(
        "select pg_total_relation_size('tandem.journal_{number}') + pg_total_relation_size('tandem.journal_chunk_{number}')"
    );
    Ok(query::value::<i64>(&query, &[])?.unwrap_or(0))
}

fn is_empty(number: u32) -> Result<bool> {
    let query = format!(
        "select not exists (select from tandem.journal_{number}) and not exists (select from tandem.journal_chunk_{number})"
    );
    Ok(query::value::<bool>(&query, &[])?.unwrap_or(false))
}

/// Goes on in the next segment when the present one is large enough, or when everything is acknowledged and
/// it takes more than `IDLE_SIZE`; truncates the others once the peer has all of them. Call it in a
/// transaction of its own.
pub fn maintain() -> Result<()> {
    /// What may be left behind at rest.
    const IDLE_SIZE: i64 = 256 * 1024;
    let _superuser = ActingAs::superuser();
    let database = shmem::database();
    let current = database.segment.load(Acquire);
    let acked = Position(database.acked.load(Acquire));
    for number in (0..SEGMENTS).filter(|n| *n != current) {
        truncate(number, acked)?;
    }
    let size = size_of_segment(current)?;
    let all_acked = database.last_position.load(Acquire) <= acked.0;
    let limit = i64::from(guc::JOURNAL_SEGMENT_SIZE.get()) * 1024;
    let next = (current + 1) % SEGMENTS;
    if (size > limit || (all_acked && size > IDLE_SIZE)) && is_empty(next)? {
        database.segment.store(next, Release);
    }
    Ok(())
}

/// Truncates a segment if no writer can be in it and the peer has everything in it.
fn truncate(number: u32, acked: Position) -> Result<()> {
    // The lock is logged for standbys, with an XID: first look whether it is worth it.
    if shmem::database().segment_last[number as usize].load(Acquire) > acked.0 || is_empty(number)? {
        return Ok(());
    }
    for table in [format!("journal_{number}"), format!("journal_chunk_{number}")] {
        let lock = pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE;
        // SAFETY: takes the lock or returns at once; it is held until the transaction ends.
        if !unsafe { pg_sys::ConditionalLockRelationOid(names::relation_oid(&table), lock) } {
            return Ok(());
        }
    }
    let horizon = registry::horizon();
    // SAFETY: a snapshot that sees every writer that held the lock before; popped below.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot()) };
    let last: Option<i64> = query::value(&format!("select max(\"position\")::int8 from tandem.journal_{number}"), &[])?;
    let last = Position(last.unwrap_or(0) as u64);
    if last <= acked && last <= horizon {
        let stable = shmem::database().stable_own.load(Acquire);
        Spi::run_with_args(
            "update tandem.journal_trim set trimmed_to = greatest(trimmed_to, $1::int8::tandem.position), \
             stable = greatest(stable, $2::int8::tandem.hlc)",
            &[(last.0 as i64).into(), (stable as i64).into()],
        )?;
        Spi::run(&format!("truncate tandem.journal_{number}, tandem.journal_chunk_{number}"))?;
        Spi::run("set local synchronous_commit = local")?;
    }
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    Ok(())
}
