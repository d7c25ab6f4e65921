//! Shared memory: the clock, the slots of open transactions, and per database what triggers, the serving
//! side and the apply worker have to tell each other without a table.
//!
//! Everything in here is derived: after a start it is read back from the catalog ([`crate::recovery`]),
//! and nothing leaves a server on the strength of shared memory alone.
use crate::error::Error;
use pgrx::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};
use tandem_model::hlc::{Clock, Hlc, Mark, NodeId, Position};
use tandem_model::stable::Stable;
use uuid::Uuid;

/// Databases of one server that can use Tandem at once.
pub const MAX_DATABASES: usize = 32;

/// One transaction that is open (it has stamped a row) or committing. A slot belongs to one backend.
#[repr(C)]
pub struct Slot {
    pub database: AtomicU32,
    /// Position, or a lower bound of the one about to be taken; 0: not committing.
    pub position: AtomicU64,
    /// First version, or a lower bound of the one about to be taken; 0: nothing stamped.
    pub first: AtomicU64,
}

/// The wall clock as it was last believed, to notice jumps (ms, of CLOCK_REALTIME and CLOCK_BOOTTIME).
#[repr(C)]
pub struct WallAnchor {
    pub wall: AtomicI64,
    pub boot: AtomicI64,
    /// ms that the wall clock is ahead of what is believed; 0 when it is believed.
    pub ahead: AtomicI64,
}

/// One database of this server.
#[repr(C)]
pub struct Database {
    pub oid: AtomicU32,
    /// Set once the fields below are read back from the catalog.
    pub loaded: AtomicBool,
    /// Node id; 0: `create_node` was not called.
    pub node: AtomicU32,
    /// Node id of the peer, as it was last reached; 0: never.
    pub peer_node: AtomicU32,
    /// No version above this is handed out before the reservation is raised.
    pub reserved: AtomicU64,
    /// Position in our stream up to which the peer has everything, durably.
    pub acked: AtomicU64,
    pub stable_own: AtomicU64,
    pub stable_peer: AtomicU64,
    seen_at: AtomicU64,
    seen_position: AtomicU64,
    seen_low: AtomicU64,
    /// Position in the peer's stream that is applied and visible here (maybe not yet flushed).
    pub applied: AtomicU64,
    /// Greatest position of a commit here.
    pub last_position: AtomicU64,
    /// Where the start of the server before this one ended, plus 1; 0: not looked up.
    ended: AtomicU64,
    /// This start's incarnation, once it is recorded.
    nonce: [AtomicU64; 2],
    /// Segment of the journal that is written now.
    pub segment: AtomicU32,
    /// Greatest position in each segment of the journal, at least.
    pub segment_last: [AtomicU64; crate::journal::SEGMENTS as usize],
    /// Counts changes of the extension's own catalog that the worker should notice.
    pub catalog_generation: AtomicU64,
    /// A row of this database may be displaced.
    pub has_displaced: AtomicBool,
    /// Sessions that wait for the peer to acknowledge a position.
    pub peer_waiters: AtomicU32,
    pub worker: crate::exchange::WorkerStatus,
}

#[repr(C)]
pub struct Region {
    pub clock: Clock,
    pub anchor: WallAnchor,
    /// End of the last commit record that a journal's rows belong to: what must be flushed before shipping.
    pub flush_lsn: AtomicU64,
    /// Process id of the supervisor, to wake it; 0: none yet.
    pub supervisor: AtomicI32,
    commits: AtomicU64,
    waiters: AtomicU32,
    changed: pg_sys::ConditionVariable,
    /// Guards the table of databases and the clock's reservation.
    pub lock: pg_sys::LWLock,
    pub databases: [Database; MAX_DATABASES],
    slot_count: usize,
    // `slot_count` slots follow.
}

static REGION: AtomicPtr<Region> = AtomicPtr::new(std::ptr::null_mut());
static mut PREVIOUS_REQUEST_HOOK: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP_HOOK: pg_sys::shmem_startup_hook_type = None;

/// Asks for the memory; only while shared_preload_libraries are loaded.
pub fn init() {
    // SAFETY: hooks are chained in _PG_init, before any backend exists.
    unsafe {
        PREVIOUS_REQUEST_HOOK = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP_HOOK = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

fn slots_needed() -> usize {
    // SAFETY: set before the request hook runs.
    unsafe { pg_sys::MaxBackends as usize + 64 }
}

fn size() -> usize {
    size_of::<Region>() + slots_needed() * size_of::<Slot>()
}

#[pg_guard]
unsafe extern "C-unwind" fn request() {
    // SAFETY: the postmaster calls this once, where requests are allowed.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST_HOOK {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(size());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup() {
    // SAFETY: the memory is ours, zeroed when it is new, and initialised under AddinShmemInitLock.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP_HOOK {
            previous();
        }
        let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
        pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let mut found = false;
        let region: *mut Region = pg_sys::ShmemInitStruct(c"tandem".as_ptr(), size(), &mut found).cast();
        if !found {
            region.cast::<u8>().write_bytes(0, size());
            (&raw mut (*region).clock).write(Clock::new());
            pg_sys::ConditionVariableInit(&raw mut (*region).changed);
            let tranche = pg_sys::LWLockNewTrancheId();
            pg_sys::LWLockInitialize(&raw mut (*region).lock, tranche);
            (*region).slot_count = slots_needed();
        }
        REGION.store(region, Release);
        pg_sys::LWLockRelease(lock);
    }
}

/// Number of AddinShmemInitLock in Postgres's list of named locks, the same in 15 to 18.
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

/// True if the library was preloaded.
pub fn available() -> bool {
    !REGION.load(Acquire).is_null()
}

/// The shared memory. Raises 55000 if the library was not preloaded.
pub fn region() -> &'static Region {
    // SAFETY: set once at startup, before any backend, and never freed while one lives.
    match unsafe { REGION.load(Acquire).as_ref() } {
        Some(region) => region,
        None => Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "tandem is not loaded",
            "Add tandem to shared_preload_libraries and restart the server.",
        )
        .raise(),
    }
}

/// The slots of all backends.
pub fn slots() -> &'static [Slot] {
    let region = region();
    // SAFETY: `slot_count` slots follow the region (see size()).
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(region).add(1).cast::<Slot>(), region.slot_count) }
}

/// This backend's slot.
pub fn my_slot() -> &'static Slot {
    my_slot_if_any().unwrap_or_else(|| Error::bug("this backend has no slot").raise())
}

/// The same; none in a process that is not a backend.
pub fn my_slot_if_any() -> Option<&'static Slot> {
    // SAFETY: set when the backend started.
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    let number = unsafe { pg_sys::MyBackendId };
    // SAFETY: as above.
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    let number = unsafe { pg_sys::MyProcNumber };
    usize::try_from(number).ok().and_then(|number| slots().get(number))
}

/// Holds the region's lock until dropped (or until an ERROR, which releases all such locks).
pub struct Locked;

impl Locked {
    pub fn exclusive() -> Locked {
        // SAFETY: the lock lives in shared memory and was initialised at startup.
        unsafe { pg_sys::LWLockAcquire((&raw const region().lock).cast_mut(), pg_sys::LWLockMode::LW_EXCLUSIVE) };
        Locked
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        let lock = (&raw const region().lock).cast_mut();
        // SAFETY: as above; after an ERROR it is no longer held.
        unsafe {
            if pg_sys::LWLockHeldByMe(lock) {
                pg_sys::LWLockRelease(lock);
            }
        }
    }
}

/// The entry of this session's database, loaded from the catalog at its first use after a start.
pub fn database() -> &'static Database {
    let database = entry();
    if !database.loaded.load(Acquire) {
        crate::recovery::load(database);
    }
    database
}

/// The entry of this session's database, if it has one.
pub fn entry_if_any() -> Option<&'static Database> {
    // SAFETY: set when the backend connected.
    let oid = unsafe { pg_sys::MyDatabaseId }.to_u32();
    region().databases.iter().find(|d| d.oid.load(Acquire) == oid)
}

/// The entry without loading it.
pub fn entry() -> &'static Database {
    // SAFETY: set when the backend connected.
    let oid = unsafe { pg_sys::MyDatabaseId }.to_u32();
    let databases = &region().databases;
    let find = || databases.iter().find(|d| d.oid.load(Acquire) == oid);
    if let Some(found) = find() {
        return found;
    }
    let _lock = Locked::exclusive();
    if let Some(found) = find() {
        return found;
    }
    match databases.iter().find(|d| d.oid.load(Acquire) == 0) {
        Some(free) => {
            free.oid.store(oid, Release);
            free
        }
        None => Error::operator(
            PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            format!("more than {MAX_DATABASES} databases of this server use tandem"),
            "Restart the server to forget dropped databases.",
        )
        .raise(),
    }
}

impl Database {
    /// This node's id; none before `create_node`.
    pub fn node(&self) -> Option<NodeId> {
        match self.node.load(Acquire) {
            0 => None,
            id => Some(NodeId(id as u8)),
        }
    }

    /// The stable points in force, for rows of this database.
    pub fn stable_points(&self) -> Stable {
        self.stable(NodeId(self.node.load(Acquire) as u8), NodeId(self.peer_node.load(Acquire) as u8))
    }

    /// The stable points in force, of these two nodes.
    pub fn stable(&self, own: NodeId, peer: NodeId) -> Stable {
        Stable { own: (own, Hlc(self.stable_own.load(Acquire))), peer: (peer, Hlc(self.stable_peer.load(Acquire))) }
    }

    /// What of the peer's stream is applied and flushed here. May pair a newer position with an older low
    /// mark, never the other way round.
    pub fn seen(&self) -> Mark {
        let low = Hlc(self.seen_low.load(Acquire));
        Mark { position: Position(self.seen_position.load(Acquire)), low }
    }

    /// Clock reading at which `seen` was published, at least.
    pub fn seen_at(&self) -> u64 {
        self.seen_at.load(Acquire)
    }

    /// Publishes what is applied and flushed; only the apply worker does. It never falls.
    pub fn publish_seen(&self, seen: Mark) {
        self.seen_at.fetch_max(region().clock.read(), AcqRel);
        self.seen_position.fetch_max(seen.position.0, AcqRel);
        self.seen_low.fetch_max(seen.low.0, AcqRel);
        wake_waiters();
    }

    pub fn raise_stable_own(&self, to: Hlc) {
        self.stable_own.fetch_max(to.0, AcqRel);
    }

    pub fn raise_stable_peer(&self, to: Hlc) {
        self.stable_peer.fetch_max(to.0, AcqRel);
    }

    /// The peer has our stream up to `mark`, durably: S(own) follows.
    pub fn acknowledge(&self, mark: Mark) {
        if self.acked.fetch_max(mark.position.0, AcqRel) < mark.position.0 {
            wake_waiters();
        }
        self.raise_stable_own(Hlc(mark.low.0.min(mark.position.0)));
    }

    /// Where the start of the server before this one ended, as the first look at the journal found it: later
    /// ones may find positions of this start.
    pub fn recovered_end(&self) -> u64 {
        self.ended.load(Acquire).saturating_sub(1)
    }

    pub fn set_recovered_end(&self, position: u64) {
        let _ = self.ended.compare_exchange(0, position + 1, AcqRel, Acquire);
    }

    /// This start's incarnation; none until it is durably recorded.
    pub fn nonce(&self) -> Option<Uuid> {
        let (high, low) = (self.nonce[0].load(Acquire), self.nonce[1].load(Acquire));
        (high != 0 && low != 0).then(|| Uuid::from_u64_pair(high, low))
    }

    pub fn set_nonce(&self, nonce: Uuid) {
        let (high, low) = nonce.as_u64_pair();
        self.nonce[0].store(high, Release);
        self.nonce[1].store(low, Release);
    }

    /// The extension's catalog is about to change: supervisor, worker and the peer's session look at it when
    /// this transaction has committed.
    pub fn bump_generation(&self) {
        pgrx::register_xact_callback(pgrx::PgXactCallbackEvent::Commit, || {
            if let Some(database) = entry_if_any() {
                database.catalog_generation.fetch_add(1, AcqRel);
                wake_waiters();
                crate::exchange::wake(database);
            }
        });
    }

    /// Forgets everything: the extension was created anew in this database.
    pub fn reset(&self) {
        for field in [
            &self.reserved,
            &self.acked,
            &self.stable_own,
            &self.stable_peer,
            &self.seen_at,
            &self.seen_position,
            &self.seen_low,
            &self.applied,
            &self.last_position,
            &self.ended,
            &self.nonce[0],
            &self.nonce[1],
        ] {
            field.store(0, Release);
        }
        self.node.store(0, Release);
        self.peer_node.store(0, Release);
        self.segment.store(0, Release);
        self.segment_last.iter().for_each(|last| last.store(0, Release));
        self.worker.announced_stable.store(0, Release);
        self.has_displaced.store(false, Release);
        self.loaded.store(false, Release);
    }
}

/// Commits that wrote to a journal, and other news that waiters want, since the start.
pub fn commits() -> u64 {
    region().commits.load(Acquire)
}

/// Counts one, and wakes who waits.
pub fn wake_waiters() {
    let region = region();
    region.commits.fetch_add(1, AcqRel);
    if region.waiters.load(SeqCst) > 0 {
        // SAFETY: initialised at startup.
        unsafe { pg_sys::ConditionVariableBroadcast((&raw const region.changed).cast_mut()) };
    }
}

/// Counts a waiter for as long as it lives; an ERROR unwinds through it.
struct Waiter;

impl Drop for Waiter {
    fn drop(&mut self) {
        region().waiters.fetch_sub(1, SeqCst);
    }
}

/// Sleeps until [`commits`] is no longer `seen`, or for `timeout_ms`. Interruptible. Returns the count.
pub fn wait_for_commit(seen: u64, timeout_ms: i64) -> u64 {
    let region = region();
    let changed = (&raw const region.changed).cast_mut();
    region.waiters.fetch_add(1, SeqCst);
    let _waiter = Waiter;
    let deadline = crate::clock::boot_ms() + timeout_ms;
    // SAFETY: the condition variable is initialised; cancelled below and by any abort.
    unsafe { pg_sys::ConditionVariablePrepareToSleep(changed) };
    loop {
        let now = commits();
        let left = deadline - crate::clock::boot_ms();
        if now != seen || left <= 0 {
            // SAFETY: ends the sleep that was prepared above.
            unsafe { pg_sys::ConditionVariableCancelSleep() };
            return now;
        }
        // SAFETY: as above; interrupts are processed within.
        unsafe { pg_sys::ConditionVariableTimedSleep(changed, left, pg_sys::PG_WAIT_EXTENSION) };
    }
}
