//! The serving side: what the peer's exchange worker calls in a session here.
//!
//! `wait_for_commit` waits without a snapshot until there is something to tell and notes in its session
//! how far the stream may be read (the horizon); `pull`, a statement of its own and so with a newer
//! snapshot, reads up to there and no further. Together they give commit order without gaps (I3), and
//! only what is on disk (I2).
use crate::clock::boot_ms;
use crate::error::{Error, Result};
use crate::exchange::process;
use crate::journal;
use crate::registry;
use crate::shmem::{self, Database};
use crate::types::SqlPosition;
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::sync::atomic::Ordering::*;
use tandem_model::change::Item;
use tandem_model::descriptor::{Descriptor, DescriptorId};
use tandem_model::hlc::{Hlc, Mark, Position};
use tandem_model::wire::{Frame, items};

/// Longest wait (ms) that a caller can ask for.
const MAX_WAIT_MS: i64 = 3_600_000;
/// While a commit below the newest one is still under way: how long (ms) before what is there is told.
const GRACE_MS: i64 = 20;
/// A mere acknowledgement is told at this pace (ms), unless a transaction carries it.
const SEEN_PACE_MS: i64 = 10;
/// A mere stable point, at this.
const STABLE_PACE_MS: i64 = 1_000;
/// Descriptors that a session remembers as told; then all are told anew.
const MAX_TOLD: usize = 10_000;

/// What this session's caller may be told next, and was told last.
#[derive(Debug, Clone, Copy, Default)]
struct Noted {
    /// The stream may be read up to here; 0: nothing was noted.
    horizon: Position,
    /// Applied and flushed here, and every transaction that did not know it is at or below the horizon.
    seen: Mark,
    /// The last reply stopped short of the horizon.
    more: bool,
    told_seen: Position,
    told_stable: Hlc,
    /// When (ms since boot) the last reply was given.
    told_at: i64,
    /// Of the catalog, when the caller was last given a reason to ask for our tables.
    generation: u64,
}

thread_local! {
    static NOTED: Cell<Noted> = const { Cell::new(Noted {
        horizon: Position(0),
        seen: Mark { position: Position(0), low: Hlc(0) },
        more: false,
        told_seen: Position(0),
        told_stable: Hlc(0),
        told_at: 0,
        generation: 0,
    }) };
    /// Descriptors that this session's caller knows.
    static TOLD: RefCell<HashSet<DescriptorId>> = RefCell::default();
}

/// Waits until the stream has something above `after`, or an acknowledgement or a stable point is news,
/// or the time is over; then notes the horizon.
fn wait_for_news(database: &Database, after: Position, timeout_ms: i64) {
    let deadline = boot_ms() + timeout_ms.clamp(0, MAX_WAIT_MS);
    let mut noted = NOTED.get();
    // The newest commit that was there when this call first saw one, and when that was.
    let mut target: Option<(Position, i64)> = None;
    let (horizon, seen) = loop {
        let commits = shmem::commits();
        // In this order: what was seen, then the horizon.
        let seen = database.seen();
        let seen_at = database.seen_at();
        let horizon = registry::horizon();
        let last = Position(database.last_position.load(Acquire));
        let seen = if horizon.0 >= seen_at { seen } else { noted.seen };
        let now = boot_ms();
        let mut until = deadline;
        // A new session is told at once where things are.
        if noted.more || noted.horizon == Position(0) {
            break (horizon, seen);
        }
        if last > after && horizon > noted.horizon {
            let (whole, since) = *target.get_or_insert((last, now));
            if horizon >= whole || now >= since + GRACE_MS {
                break (horizon, seen);
            }
            until = until.min(since + GRACE_MS);
        }
        let generation = database.catalog_generation.load(Acquire);
        if generation != noted.generation {
            // An empty reply makes the caller ask for our tables.
            noted.generation = generation;
            break (horizon, seen);
        }
        for (news, pace) in [
            (seen.position > noted.told_seen, SEEN_PACE_MS),
            (announced_stable(database) > noted.told_stable, STABLE_PACE_MS),
        ] {
            if news {
                until = until.min(noted.told_at + pace);
            }
        }
        if now >= until {
            break (horizon, seen);
        }
        shmem::wait_for_commit(commits, until - now);
    };
    // Never back: a position at or below one that was read stays unread for good.
    noted.horizon = noted.horizon.max(horizon);
    noted.seen = seen;
    NOTED.set(noted);
}

/// S(own) as it is durable here.
fn announced_stable(database: &Database) -> Hlc {
    Hlc(database.worker.announced_stable.load(Acquire))
}

/// `CALL tandem.wait_for_commit(after, timeout_ms)`: commits first, so that it holds no snapshot while it
/// waits. A C-language procedure, since only such a one can do that.
///
/// # Safety
/// Postgres calls it, with the two arguments of its declaration.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn tandem_wait_for_commit(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: two arguments, by value, not strict: null is looked for.
    let (after, timeout_ms) =
        unsafe { (pgrx::fcinfo::pg_getarg::<i64>(fcinfo, 0), pgrx::fcinfo::pg_getarg::<i32>(fcinfo, 1)) };
    let after = Position(after.unwrap_or(0) as u64);
    // Loads the database's entry, if it must, while there is a snapshot.
    let database = shmem::database();
    // SAFETY: commits the caller's transaction, which CALL allows at top level (else SPI_commit raises), and
    // leaves a new one without a snapshot. Nothing of the old one is used afterwards.
    unsafe {
        pg_sys::SPI_connect_ext(pg_sys::SPI_OPT_NONATOMIC as i32);
        pg_sys::SPI_commit();
    }
    wait_for_news(database, after, i64::from(timeout_ms.unwrap_or(0)));
    // SAFETY: ends what was connected above.
    unsafe { pg_sys::SPI_finish() };
    pg_sys::Datum::from(0usize)
}

/// Says that the function above has the version 1 calling convention.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_tandem_wait_for_commit() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// One reply while it is put together.
struct Batch {
    frames: Vec<Vec<u8>>,
    bytes: usize,
    limit: usize,
    told: HashSet<DescriptorId>,
    /// The last transaction that is in it whole: its mark, and what it acknowledged and announced itself.
    last: Option<(Mark, Mark, Hlc)>,
    more: bool,
}

impl Batch {
    fn full(&self) -> bool {
        self.bytes >= self.limit
    }

    fn push(&mut self, frame: &Frame<'_>) {
        let bytes = frame.encode();
        self.bytes += bytes.len();
        self.frames.push(bytes);
    }

    /// Descriptors come before the first change that refers to them.
    fn describe(&mut self, body: &[u8]) -> Result<()> {
        for item in items(body) {
            let id = match item? {
                Item::Change(change) => change.descriptor,
                Item::Truncate { descriptor, .. } | Item::Policy { descriptor, .. } => descriptor,
                Item::Record(_) => continue,
            };
            if self.told.insert(id) {
                let descriptor = descriptor(id)?;
                self.push(&Frame::Descriptor(descriptor));
            }
        }
        Ok(())
    }

    /// Takes a transaction, of a large one the chunks from `done` on. False when the reply is full.
    fn take(&mut self, journal::Found { row, segment }: &journal::Found, done: u32) -> Result<bool> {
        if self.full() {
            self.more = true;
            return Ok(false);
        }
        self.describe(&row.payload)?;
        if done == 0 {
            self.push(&Frame::Transaction {
                mark: row.mark,
                seen: row.seen,
                stable: row.stable,
                chunks: row.chunks,
                items: serde_bytes::Bytes::new(&row.payload),
            });
        }
        for index in done..row.chunks {
            if self.full() && index > done {
                self.more = true;
                return Ok(false);
            }
            let chunk = journal::chunk(*segment, row.first, index)?.ok_or_else(|| {
                Error::bug(format!("chunk {index} of the transaction at {} is gone", row.mark.position))
            })?;
            self.describe(&chunk)?;
            self.push(&Frame::Chunk { position: row.mark.position, index, items: serde_bytes::Bytes::new(&chunk) });
        }
        self.last = Some((row.mark, row.seen, row.stable));
        Ok(true)
    }
}

fn descriptor(id: DescriptorId) -> Result<Descriptor> {
    let shape: Option<String> =
        crate::pg::query::value("select shape from tandem.descriptor where id = $1", &[(id as i32).into()])?;
    let shape =
        shape.ok_or_else(|| Error::bug(format!("the journal refers to descriptor {id}, which is not there")))?;
    let mut descriptor: Descriptor =
        serde_json::from_str(&shape).map_err(|e| Error::bug(format!("descriptor {id} is damaged: {e}")))?;
    descriptor.id = id;
    Ok(descriptor)
}

fn prerequisite(message: &str, hint: &str) -> Error {
    Error::operator(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, message, hint)
}

fn reply(after: Position, chunks_done: u32, max_bytes: usize) -> Result<Vec<Vec<u8>>> {
    let database = shmem::database();
    let mut noted = NOTED.get();
    if noted.horizon == Position(0) {
        return Err(prerequisite("tandem.pull was called before a wait", "CALL tandem.wait_for_commit(...) first."));
    }
    // SAFETY: a variable of this session.
    if unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32 {
        return Err(prerequisite(
            "tandem.pull needs isolation level READ COMMITTED",
            "SET default_transaction_isolation.",
        ));
    }
    if database.nonce().is_none() {
        return Err(Error::retry(
            PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW,
            "the exchange of this database has not begun",
        ));
    }
    let told = TOLD.take();
    let told = if told.len() > MAX_TOLD { HashSet::new() } else { told };
    let mut batch = Batch { frames: Vec::new(), bytes: 0, limit: max_bytes, told, last: None, more: false };
    let mut done = chunks_done;
    journal::read(after, noted.horizon, |found| batch.take(&found, std::mem::take(&mut done)))?;
    if !batch.frames.is_empty() {
        // Every commit at or below the horizon had told its end of WAL before the horizon was taken.
        process::flush_to(shmem::region().flush_lsn.load(Acquire));
    }
    // A bare clock reading never leaves: the mark is one that the caller has, or just got. What was seen by
    // the horizon may be told only with everything up to the horizon: a commit in between may not have seen it.
    let known = Mark { position: after, low: Hlc(0) };
    let (mark, seen, stable) = match (batch.last, batch.more) {
        (Some((mark, ..)), false) => (mark, noted.seen, announced_stable(database)),
        (Some(last), true) => last,
        (None, false) => (known, noted.seen, announced_stable(database)),
        // Who asks for nothing else may hear of it: it counts for no more than what the journal may drop.
        (None, true) if max_bytes == 0 => (known, noted.seen, Hlc(0)),
        (None, true) => (known, Mark::default(), Hlc(0)),
    };
    batch.push(&Frame::Watermark { mark, seen, stable });
    noted.more = batch.more;
    noted.told_seen = noted.told_seen.max(seen.position);
    noted.told_stable = noted.told_stable.max(stable);
    noted.told_at = boot_ms();
    NOTED.set(noted);
    TOLD.set(batch.told);
    Ok(batch.frames)
}

/// The stream above `after` up to the horizon that the last wait noted, about `max_bytes` of it, as frames
/// of the wire codec; of a large transaction the chunks from `chunks_done` on. Ends with a watermark.
#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn pull(after: SqlPosition, chunks_done: i32, max_bytes: i32) -> SetOfIterator<'static, Vec<u8>> {
    let frames = reply(after.0, chunks_done.max(0) as u32, max_bytes.max(0) as usize);
    SetOfIterator::new(frames.unwrap_or_else(|e| e.raise()))
}

/// This node's synced tables as they are today, for the peer to compare with its own.
#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
#[allow(clippy::type_complexity)]
fn peer_tables() -> TableIterator<
    'static,
    (
        name!(schema_name, String),
        name!(table_name, String),
        name!(shape, String),
        name!(initial_rows, i64),
        name!(initial_digest, pgrx::AnyNumeric),
    ),
> {
    TableIterator::new(tables().unwrap_or_else(|e| e.raise()))
}

type TableRow = (String, String, String, i64, pgrx::AnyNumeric);

fn tables() -> Result<Vec<TableRow>> {
    let found = Spi::connect(|client| -> Result<Vec<(pg_sys::Oid, i64, pgrx::AnyNumeric)>> {
        let rows = client.select(
            "select s.relid::oid, s.initial_rows, s.initial_digest from tandem.synced_table s \
             join pg_catalog.pg_class c on c.oid = s.relid order by s.relid",
            None,
            &[],
        )?;
        let mut found = Vec::new();
        for row in rows {
            if let (Some(relid), Some(count), Some(digest)) = (row.get(1)?, row.get(2)?, row.get(3)?) {
                found.push((relid, count, digest));
            }
        }
        Ok(found)
    })?;
    let mut tables = Vec::new();
    for (relid, count, digest) in found {
        let shape = match crate::relation::synced_by_oid(relid) {
            Ok(synced) => synced.shape(),
            // Dropped since the query.
            Err(e) if e.sqlstate == PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE => continue,
            Err(e) => return Err(e),
        };
        let text = serde_json::to_string(&shape).map_err(|e| Error::bug(format!("a table has no shape: {e}")))?;
        tables.push((shape.schema, shape.table, text, count, digest));
    }
    Ok(tables)
}
