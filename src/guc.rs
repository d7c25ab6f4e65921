//! The settings `tandem.*`, each with unit, range and default.
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};

/// How far (ms) a version may lie ahead of the wall clock before the stream stops.
pub static MAX_CLOCK_SKEW: GucSetting<i32> = GucSetting::<i32>::new(10_000);
/// The apply worker's lock_timeout (ms); below deadlock_timeout, so that it always gives up first.
pub static APPLY_LOCK_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(500);
/// Size (kB) at which the journal goes on in its next segment.
pub static JOURNAL_SEGMENT_SIZE: GucSetting<i32> = GucSetting::<i32>::new(16 * 1024);
/// Memory (kB) that the changes of one transaction take before they go to a temporary file.
pub static CAPTURE_MEMORY: GucSetting<i32> = GucSetting::<i32>::new(4 * 1024);
/// Bytes (kB) of changes in one reply of the exchange.
pub static BATCH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(1024);
/// Source transactions in one local commit while catching up.
pub static BATCH_TRANSACTIONS: GucSetting<i32> = GucSetting::<i32>::new(200);
/// Longest pause (ms) between two attempts to reach the peer.
pub static MAX_RECONNECT_DELAY: GucSetting<i32> = GucSetting::<i32>::new(5_000);
/// How long (ms) the peer may stay silent beyond what was asked of it before the link counts as lost.
pub static PEER_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(15_000);
/// How long (ms) a request waits at the peer for a commit.
pub static POLL_INTERVAL: GucSetting<i32> = GucSetting::<i32>::new(5_000);

/// How long (ms) a handler of conflicts may run.
pub static HANDLER_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(1_000);
/// How long (s) a closed conflict stays in the history; -1: for ever.
pub static CONFLICT_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(90 * 86_400);
/// Ten years.
const MAX_RETENTION_S: i32 = 3_650 * 86_400;
/// What the server log says of a conflict.
pub static LOG_CONFLICTS: GucSetting<LogConflicts> = GucSetting::<LogConflicts>::new(LogConflicts::On);

/// What the server log says of a conflict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
pub enum LogConflicts {
    Off,
    /// Type, table, times and nodes; nothing that stood in a row.
    On,
    /// The row's key as well.
    Key,
}

/// Registers the settings; called once from `_PG_init`.
pub fn init() {
    let ms = GucFlags::UNIT_MS;
    let kb = GucFlags::UNIT_KB;
    let int = |name, short, long, setting, min, max, flags| {
        GucRegistry::define_int_guc(name, short, long, setting, min, max, GucContext::Sighup, flags);
    };
    int(
        c"tandem.max_clock_skew",
        c"How far a version may lie ahead of the wall clock.",
        c"Beyond it the stream stops and says so.",
        &MAX_CLOCK_SKEW,
        1,
        86_400_000,
        ms,
    );
    int(
        c"tandem.apply_lock_timeout",
        c"How long applying waits for a lock before it gives way and tries again.",
        c"Keep it below deadlock_timeout: then a local user is never the victim.",
        &APPLY_LOCK_TIMEOUT,
        1,
        60_000,
        ms,
    );
    int(
        c"tandem.handler_timeout",
        c"How long a handler of conflicts may run.",
        c"Beyond it the conflict is left open: applying goes on.",
        &HANDLER_TIMEOUT,
        1,
        60_000,
        ms,
    );
    int(
        c"tandem.journal_segment_size",
        c"Size at which the journal goes on in its next segment.",
        c"A segment is truncated whole once the peer has everything in it.",
        &JOURNAL_SEGMENT_SIZE,
        64,
        4 * 1024 * 1024,
        kb,
    );
    int(
        c"tandem.capture_memory",
        c"Memory for the changes of one transaction.",
        c"Beyond it they go to a temporary file.",
        &CAPTURE_MEMORY,
        64,
        1024 * 1024,
        kb,
    );
    int(
        c"tandem.batch_size",
        c"Size of one reply of the exchange.",
        c"One transaction or chunk is sent whole even if it is larger.",
        &BATCH_SIZE,
        16,
        64 * 1024,
        kb,
    );
    int(
        c"tandem.batch_transactions",
        c"Source transactions in one local commit while catching up.",
        c"1 applies each in a commit of its own.",
        &BATCH_TRANSACTIONS,
        1,
        10_000,
        GucFlags::default(),
    );
    int(
        c"tandem.max_reconnect_delay",
        c"Longest pause between two attempts to reach the peer.",
        c"The pause doubles from 100 ms up to this.",
        &MAX_RECONNECT_DELAY,
        100,
        3_600_000,
        ms,
    );
    int(
        c"tandem.peer_timeout",
        c"How long the peer may stay silent before the link counts as lost.",
        c"Counted beyond the time that a request was allowed to wait.",
        &PEER_TIMEOUT,
        100,
        3_600_000,
        ms,
    );
    int(
        c"tandem.poll_interval",
        c"How long a request waits at the peer for a commit.",
        c"A commit wakes it at once; this is the pace of an idle pair.",
        &POLL_INTERVAL,
        10,
        600_000,
        ms,
    );
    int(
        c"tandem.conflict_retention",
        c"How long a closed conflict stays in the history.",
        c"Counted from its last change; open conflicts stay until they are decided. -1 keeps all for ever.",
        &CONFLICT_RETENTION,
        -1,
        MAX_RETENTION_S,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_enum_guc(
        c"tandem.log_conflicts",
        c"What the server log says of a conflict: off, on, or key for the row's key as well.",
        c"At most ten lines a second; values other than the key are never logged.",
        &LOG_CONFLICTS,
        GucContext::Sighup,
        GucFlags::default(),
    );
}
