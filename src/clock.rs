//! The clock of this server: hybrid logical time from shared memory, reserved ahead in the catalog so
//! that no reading is ever handed out twice, and suspicious of a wall clock that jumps ahead.
use crate::error::{Error, Result};
use crate::guc;
use crate::pg::identity::ActingAs;
use crate::shmem::{self, Database, Locked};
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::{Hlc, Position};

/// How far ahead (ms) the clock is reserved at a time.
const RESERVE_AHEAD_MS: i64 = 3_000;
/// Within this (ms) of the anchor the wall clock is believed without a look at the other clock.
const ANCHOR_SPAN_MS: i64 = 1_000;

fn read_clock(id: libc::clockid_t) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(id, &mut time) };
    time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}

/// Milliseconds since the machine started, suspension included: no step of the wall clock shows here.
pub fn boot_ms() -> i64 {
    read_clock(libc::CLOCK_BOOTTIME)
}

/// Milliseconds since the Unix epoch as the wall clock has them.
pub fn wall_ms() -> i64 {
    read_clock(libc::CLOCK_REALTIME)
}

/// The wall clock as far as it is believed: one that jumped ahead by more than `tandem.max_clock_skew`
/// is not followed until [`accept_skew`].
pub fn now_ms() -> i64 {
    let anchor = &shmem::region().anchor;
    let wall = wall_ms();
    let anchored = anchor.wall.load(Acquire);
    if (0..=ANCHOR_SPAN_MS).contains(&(wall - anchored)) && anchor.ahead.load(Acquire) == 0 {
        return wall;
    }
    let boot = boot_ms();
    let expected = anchored + (boot - anchor.boot.load(Acquire));
    let known = Hlc(shmem::region().clock.read()).unix_millis();
    let ahead = wall - expected.max(known);
    if anchored != 0 && ahead > i64::from(guc::MAX_CLOCK_SKEW.get()) {
        anchor.ahead.store(ahead, Release);
        return expected;
    }
    anchor.wall.store(wall, Release);
    anchor.boot.store(boot, Release);
    anchor.ahead.store(0, Release);
    wall
}

/// Believes the wall clock as it is now: an operator has looked into the jump.
pub fn accept_skew() {
    let anchor = &shmem::region().anchor;
    anchor.wall.store(wall_ms(), Release);
    anchor.boot.store(boot_ms(), Release);
    anchor.ahead.store(0, Release);
}

/// A reading with everything ticked so far at or below it, and everything ticked later above it.
pub fn read() -> u64 {
    shmem::region().clock.read()
}

fn tick_raw(database: &Database) -> Hlc {
    let Some(node) = database.node() else {
        Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "this database is not a tandem node",
            "SELECT tandem.create_node('name', 1);",
        )
        .raise()
    };
    let hlc = shmem::region().clock.tick(now_ms(), node);
    if hlc.0 > database.reserved.load(Acquire) {
        reserve(database, hlc);
    }
    hlc
}

/// A new version, greater than every version this node has made or seen.
pub fn tick() -> Hlc {
    tick_raw(shmem::database())
}

/// A new position, greater than every position this node has taken.
pub fn tick_position() -> Position {
    Position(tick_raw(shmem::database()).0)
}

/// Raises the reservation above `hlc`, as nextval does: logged and flushed, not transactional.
fn reserve(database: &Database, hlc: Hlc) {
    let _lock = Locked::exclusive();
    if hlc.0 <= database.reserved.load(Acquire) {
        return;
    }
    let to = Hlc::from_parts(hlc.unix_millis() + RESERVE_AHEAD_MS, 0, hlc.node()).unwrap_or(hlc);
    let _superuser = ActingAs::superuser();
    let sequence = crate::pg::names::relation_oid("clock_reservation");
    // SAFETY: setval on a sequence of ours; the flush waits for WAL that this backend has just inserted.
    unsafe {
        pg_sys::DirectFunctionCall2Coll(
            Some(setval_oid),
            pg_sys::InvalidOid,
            pg_sys::Datum::from(sequence),
            pg_sys::Datum::from(to.0 as i64),
        );
        pg_sys::XLogFlush(pg_sys::XactLastRecEnd);
    }
    database.reserved.fetch_max(to.0, AcqRel);
}

unsafe extern "C-unwind" {
    fn setval_oid(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum;
}

/// Moves past a value that the peer sent. Errors (operator) if it is further ahead of the wall clock than
/// `tandem.max_clock_skew`.
pub fn observe(raw: u64) -> Result<()> {
    let now = now_ms();
    let ahead = Hlc(raw).unix_millis() - now;
    if ahead > i64::from(guc::MAX_CLOCK_SKEW.get()) {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_DATA_EXCEPTION,
            format!("the peer's clock is {ahead} ms ahead of this server's"),
            "Set both clocks right: the stream goes on by itself. If this server's clock is the one that \
             jumped, look into it and call tandem.accept_skew().",
        ));
    }
    shmem::region().clock.observe(now, raw);
    Ok(())
}
