//! What the exchange worker is doing, in shared memory: written by the worker (by the supervisor while
//! there is none), read by `tandem.peer_status()`, on which the view `tandem.status` is built.
//!
//! All plain atomics: a reader takes them under a turn counter and looks again if the writer was at it.
use crate::error::{Class, Error};
use crate::exchange::process;
use crate::pg::identity::ActingAs;
use pgrx::prelude::*;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering::*};
use tandem_model::hlc::{Mark, Position};

/// State of the exchange with a peer. Not durable: set anew after each start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// No worker yet, or none any more; the reason says why. Set by worker and supervisor.
    Stopped = 0,
    /// Reaching the peer, or waiting to try again; the reason is the last failure.
    Connecting = 1,
    /// Connected; the two are looking at each other's protocol, identity and tables.
    Handshake = 2,
    /// Tables are being brought together.
    Joining = 3,
    /// Behind the peer by more than one reply.
    CatchUp = 4,
    /// All that the peer has told of is applied, or about to be.
    Streaming = 5,
    /// `tandem.pause()` was called: the peer is read from, nothing is applied.
    Paused = 6,
    /// The two can't go together; the reason and the hint say why. Tried again all the same.
    Refused = 7,
}

impl State {
    /// The name that SQL shows.
    pub fn name(self) -> &'static str {
        match self {
            State::Stopped => "stopped",
            State::Connecting => "connecting",
            State::Handshake => "handshake",
            State::Joining => "joining",
            State::CatchUp => "catchup",
            State::Streaming => "streaming",
            State::Paused => "paused",
            State::Refused => "refused",
        }
    }

    fn from_number(number: u32) -> State {
        use State::*;
        [Stopped, Connecting, Handshake, Joining, CatchUp, Streaming, Paused, Refused]
            .into_iter()
            .find(|s| *s as u32 == number)
            .unwrap_or(Stopped)
    }
}

/// A text of at most `N` bytes.
#[repr(C)]
struct Text<const N: usize> {
    length: AtomicU32,
    bytes: [AtomicU8; N],
}

impl<const N: usize> Text<N> {
    fn set(&self, text: &str) {
        let mut end = text.len().min(N);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        for (slot, byte) in self.bytes.iter().zip(text[..end].bytes()) {
            slot.store(byte, Relaxed);
        }
        self.length.store(end as u32, Relaxed);
    }

    fn get(&self) -> String {
        let length = (self.length.load(Relaxed) as usize).min(N);
        let bytes: Vec<u8> = self.bytes[..length].iter().map(|b| b.load(Relaxed)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Embedded in [`crate::shmem::Database`]; all zeroes is a valid value.
#[repr(C)]
pub struct WorkerStatus {
    /// Odd while texts are being written.
    turn: AtomicU32,
    pub pid: AtomicI32,
    /// 1 while `tandem.peer` has a row, as the worker last saw it: then the supervisor starts it again.
    pub wanted: AtomicU32,
    state: AtomicU32,
    /// ms since the Unix epoch, here and below.
    since: AtomicI64,
    peer: Text<64>,
    reason: Text<400>,
    hint: Text<400>,
    error: Text<400>,
    error_sqlstate: AtomicU32,
    error_class: AtomicU32,
    error_at: AtomicI64,
    received: AtomicU64,
    applied: AtomicU64,
    /// The transaction that can't be applied; 0: none.
    stuck_at: AtomicU64,
    /// Reading of the peer's clock (ms) at the last complete reply; what lag is measured against.
    current_at: AtomicI64,
    transactions: AtomicU64,
    bytes: AtomicU64,
    /// Per second, over the last seconds.
    transaction_rate: AtomicU64,
    byte_rate: AtomicU64,
    /// S(own) as it is durable: what may be announced to the peer.
    pub announced_stable: AtomicU64,
}

impl WorkerStatus {
    fn write(&self, f: impl FnOnce()) {
        self.turn.fetch_add(1, AcqRel);
        f();
        self.turn.fetch_add(1, AcqRel);
    }

    /// A worker of this peer begins.
    pub fn begin(&self, peer: &str) {
        self.write(|| self.peer.set(peer));
        self.received.store(0, Release);
        self.pid.store(process::pid(), Release);
        self.wanted.store(1, Release);
    }

    /// The worker is gone; the supervisor may have more to say.
    pub fn end(&self) {
        self.pid.store(0, Release);
        self.transaction_rate.store(0, Release);
        self.byte_rate.store(0, Release);
        if self.state() != State::Stopped {
            self.enter(State::Stopped, "the worker has ended", None);
        }
    }

    /// The database is gone.
    pub fn forget(&self) {
        self.end();
        self.wanted.store(0, Release);
        self.write(|| self.peer.set(""));
        for field in [&self.received, &self.applied, &self.transactions, &self.bytes, &self.announced_stable] {
            field.store(0, Release);
        }
    }

    /// Sets the state; `since` only moves when it is another one.
    pub fn enter(&self, state: State, reason: &str, hint: Option<&str>) {
        self.write(|| {
            if self.state.swap(state as u32, AcqRel) != state as u32 || self.since.load(Relaxed) == 0 {
                self.since.store(crate::clock::wall_ms(), Release);
            }
            self.reason.set(reason);
            self.hint.set(hint.unwrap_or(""));
        });
    }

    /// Records an error as the last one.
    pub fn note_error(&self, error: &Error) {
        self.write(|| {
            let detail = error.detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default();
            self.error.set(&format!("{}{detail}", error.message));
            self.error_sqlstate.store(error.sqlstate as u32, Release);
            self.error_class.store(error.class as u32 + 1, Release);
            self.error_at.store(crate::clock::wall_ms(), Release);
        });
    }

    pub fn state(&self) -> State {
        State::from_number(self.state.load(Acquire))
    }

    /// The stream is received up to here, and `bytes` more went over the line.
    pub fn received(&self, position: Position, bytes: usize) {
        self.received.fetch_max(position.0, AcqRel);
        self.bytes.fetch_add(bytes as u64, AcqRel);
    }

    /// The stream is applied up to here, `transactions` more than before.
    pub fn applied(&self, mark: Mark, transactions: usize) {
        self.applied.fetch_max(mark.position.0, AcqRel);
        self.transactions.fetch_add(transactions as u64, AcqRel);
    }

    /// This transaction can't be applied; 0: all can.
    pub fn stuck_at(&self, position: Position) {
        self.stuck_at.store(position.0, Release);
    }

    /// Everything that was there at this time (ms) is applied here.
    pub fn current_at(&self, ms: i64) {
        self.current_at.store(ms, Release);
    }

    /// Transactions and bytes so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.transactions.load(Acquire), self.bytes.load(Acquire))
    }

    pub fn set_rates(&self, transactions: u64, bytes: u64) {
        self.transaction_rate.store(transactions, Release);
        self.byte_rate.store(bytes, Release);
    }

    /// The texts, all of one moment: peer, reason, hint, error.
    fn texts(&self) -> [String; 4] {
        /// A writer that died half-way must not hold up the readers.
        const TRIES: usize = 1000;
        let read = || [self.peer.get(), self.reason.get(), self.hint.get(), self.error.get()];
        for _ in 0..TRIES {
            let before = self.turn.load(Acquire);
            let texts = read();
            std::sync::atomic::fence(Acquire);
            if before.is_multiple_of(2) && self.turn.load(Relaxed) == before {
                return texts;
            }
            std::hint::spin_loop();
        }
        read()
    }
}

fn class_name(number: u32) -> Option<&'static str> {
    const NAMES: [(Class, &str); 3] = [(Class::Retry, "retry"), (Class::Operator, "operator"), (Class::Bug, "bug")];
    NAMES.iter().find(|(class, _)| *class as u32 + 1 == number).map(|(_, name)| *name)
}

/// SQLSTATE as text.
fn sqlstate_text(code: u32) -> String {
    (0..5).map(|i| char::from((((code >> (6 * i)) & 0x3f) as u8).wrapping_add(b'0'))).collect()
}

fn millis(ms: i64) -> Option<TimestampWithTimeZone> {
    (ms != 0).then(|| crate::types::unix_millis(ms))
}

fn interval_ms(ms: i64) -> Option<Interval> {
    Interval::from_micros(ms.max(0) * 1000).into()
}

/// The first of those who hold a lock that this process waits for.
fn blocked_by(pid: i32) -> Option<i32> {
    let blockers: Option<Vec<i32>> =
        crate::pg::query::value("select pg_catalog.pg_blocking_pids($1)", &[pid.into()]).ok().flatten();
    blockers?.into_iter().find(|p| *p != 0)
}

/// Name of the peer in the catalog.
fn the_peer() -> Option<String> {
    let _superuser = ActingAs::superuser();
    Spi::get_one("select name from tandem.peer limit 1").ok().flatten()
}

/// The exchange workers of this database: what `tandem.status` shows beside the catalog.
#[pg_extern(volatile, parallel_restricted)]
#[allow(clippy::type_complexity)]
fn peer_status() -> TableIterator<
    'static,
    (
        name!(peer, String),
        name!(state, String),
        name!(reason, Option<String>),
        name!(hint, Option<String>),
        name!(since, Option<TimestampWithTimeZone>),
        name!(received, crate::types::SqlPosition),
        name!(applied, crate::types::SqlPosition),
        name!(acknowledged, crate::types::SqlPosition),
        name!(failing, Option<crate::types::SqlPosition>),
        name!(lag, Option<Interval>),
        name!(transactions, i64),
        name!(bytes, i64),
        name!(transactions_per_second, i64),
        name!(bytes_per_second, i64),
        name!(last_error, Option<String>),
        name!(last_error_sqlstate, Option<String>),
        name!(last_error_class, Option<String>),
        name!(last_error_at, Option<TimestampWithTimeZone>),
        name!(pid, Option<i32>),
        name!(blocked_by, Option<i32>),
    ),
> {
    let database = crate::shmem::database();
    let status = &database.worker;
    let [peer, reason, hint, error] = status.texts();
    // Before the first worker only the catalog knows the name; the supervisor may have said why there is none.
    let peer = if peer.is_empty() { the_peer() } else { Some(peer) };
    let Some(peer) = peer else { return TableIterator::new(Vec::new()) };
    let position = |raw: u64| crate::types::SqlPosition(Position(raw));
    let text = |text: String| (!text.is_empty()).then_some(text);
    let pid = Some(status.pid.load(Acquire)).filter(|p| *p != 0);
    let sqlstate = status.error_sqlstate.load(Acquire);
    let current_at = status.current_at.load(Acquire);
    let lag = match status.state() {
        _ if current_at == 0 => None,
        State::Streaming => interval_ms(0),
        _ => interval_ms(crate::clock::wall_ms() - current_at),
    };
    TableIterator::once((
        peer,
        status.state().name().to_string(),
        text(reason),
        text(hint),
        millis(status.since.load(Acquire)),
        position(status.received.load(Acquire)),
        position(status.applied.load(Acquire).max(database.applied.load(Acquire))),
        position(database.acked.load(Acquire)),
        Some(position(status.stuck_at.load(Acquire))).filter(|p| !p.0.is_zero()),
        lag,
        status.transactions.load(Acquire) as i64,
        status.bytes.load(Acquire) as i64,
        status.transaction_rate.load(Acquire) as i64,
        status.byte_rate.load(Acquire) as i64,
        text(error),
        (sqlstate != 0).then(|| sqlstate_text(sqlstate)),
        class_name(status.error_class.load(Acquire)).map(str::to_string),
        millis(status.error_at.load(Acquire)),
        pid,
        pid.and_then(blocked_by),
    ))
}
