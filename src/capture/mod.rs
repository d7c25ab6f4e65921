//! Capture: what a transaction did to synced tables, from the row triggers to its row in the journal.
//!
//! [`trigger`] stamps rows and hands each change to [`buffer`], which follows savepoints; [`flush`] writes
//! the buffer to the journal at pre-commit and takes the transaction's position.
mod buffer;
pub mod change;
mod flush;
mod netting;
mod spool;
mod trigger;

use crate::registry;
use crate::relation::SyncedRelation;
use crate::shmem;
pub use change::changed_cells;
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tandem_model::change::{Item, Op};
use tandem_model::hlc::{Hlc, Mark, Position};
use tandem_model::versions::{CellId, Versions};

thread_local! {
    /// While Tandem applies: its own triggers are silent.
    static APPLYING: Cell<bool> = const { Cell::new(false) };
    /// Cells of one table that get a new version with the next update though their content stays.
    static AFFIRMED: RefCell<(u32, Vec<CellId>)> = const { RefCell::new((0, Vec::new())) };
    static LAST_POSITION: Cell<Position> = const { Cell::new(Position(0)) };
}

/// Registers the transaction callbacks; called once from `_PG_init` in the postmaster.
pub fn init() {
    // SAFETY: the callbacks live as long as the library; backends inherit them.
    unsafe {
        pg_sys::RegisterXactCallback(Some(at_transaction), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(at_subtransaction), std::ptr::null_mut());
    }
}

/// Runs `f` with Tandem's own triggers silent: what it writes is not captured (I9).
pub fn applying<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            APPLYING.set(self.0);
        }
    }
    let _restore = Restore(APPLYING.replace(true));
    f()
}

/// Runs `f`, in which an update of the table gives these cells a new version, changed or not: a decision is a
/// write also where it leaves a value as it is.
pub fn affirming<R>(relid: pg_sys::Oid, cells: Vec<CellId>, f: impl FnOnce() -> R) -> R {
    struct Restore((u32, Vec<CellId>));
    impl Drop for Restore {
        fn drop(&mut self) {
            AFFIRMED.set(std::mem::take(&mut self.0));
        }
    }
    let _restore = Restore(AFFIRMED.replace((relid.to_u32(), cells)));
    f()
}

/// Adds the affirmed cells of a table to those that have changed.
fn with_affirmed(relid: pg_sys::Oid, mut changed: Vec<CellId>) -> Vec<CellId> {
    AFFIRMED.with_borrow(|(affirmed, cells)| {
        if *affirmed == relid.to_u32() {
            changed.extend(cells.iter().filter(|cell| !changed.contains(cell)).copied().collect::<Vec<_>>());
        }
    });
    changed
}

/// True within [`applying`].
pub fn is_applying() -> bool {
    APPLYING.get()
}

/// Adds an item that no trigger sees (a conflict record, a decision) to this transaction's journal row.
pub fn emit(item: &Item<'_>) {
    if registry::first().0 == 0 {
        // The first version is also what a large transaction's chunks are found by.
        registry::stamp();
    }
    buffer::push(item, None);
}

/// An update that this node makes by itself while it applies: takes a version, sets it in what the row lists, and
/// buffers the change. The row is written by the caller, with these versions.
pub fn own_update(
    rel: &Rc<SyncedRelation>,
    listed: &mut Versions,
    cells: Vec<CellId>,
    old: &change::Row,
    new: &change::Row,
) -> Hlc {
    let version = registry::stamp();
    listed.trim(&shmem::database().stable_points());
    let mut base = Versions { birth: listed.birth, dead: listed.dead, ..Versions::default() };
    cells.iter().for_each(|cell| base.list(*cell, listed));
    cells.iter().for_each(|cell| listed.set(*cell, version));
    let facts = change::Facts { op: Op::Update, version, life: base.birth, base, cells, listed: None };
    change::build(rel, facts, new, Some(old), None, |change| buffer::push_change(rel, change));
    version
}

/// The `seen` that this very commit reaches: of a transaction that applies the peer's changes.
pub fn carry(seen: Mark) {
    buffer::with(|b| b.carry = Some(seen));
}

/// Makes this transaction write a journal row even if it changes nothing.
pub fn heartbeat() {
    buffer::with(|b| b.heartbeat = true);
}

/// Position of this session's last commit that wrote to the journal; 0 if there was none.
pub fn last_position() -> Position {
    LAST_POSITION.get()
}

#[pg_guard]
unsafe extern "C-unwind" fn at_transaction(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_PRE_COMMIT => flush::at_pre_commit(),
        XACT_EVENT_PRE_PREPARE if buffer::with(|b| !b.is_empty()) => crate::error::Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            "cannot PREPARE a transaction that wrote to synced tables",
            "COMMIT it, or leave the tables that tandem keeps in sync out of it.",
        )
        .raise(),
        XACT_EVENT_COMMIT => at_commit(),
        XACT_EVENT_ABORT => at_abort(),
        _ => {}
    }
}

/// The commit is visible. Must not raise.
fn at_commit() {
    if let Some((position, segment)) = buffer::with(|b| b.position.take().map(|p| (p, b.segment))) {
        LAST_POSITION.set(position);
        let database = shmem::entry();
        database.last_position.fetch_max(position.0, std::sync::atomic::Ordering::AcqRel);
        database.segment_last[segment as usize].fetch_max(position.0, std::sync::atomic::Ordering::AcqRel);
        // SAFETY: set by this very commit. It is published before the slot is cleared, so that whoever takes
        // a horizon above this position also knows what to flush (I2).
        let end = unsafe { pg_sys::XactLastCommitEnd };
        shmem::region().flush_lsn.fetch_max(end, std::sync::atomic::Ordering::AcqRel);
        registry::clear();
        shmem::wake_waiters();
    } else if shmem::available() {
        registry::clear();
    }
    buffer::reset();
    trigger::reset();
    crate::relation::at_commit();
}

/// Nothing of it happened. Must not raise.
fn at_abort() {
    if shmem::available() {
        registry::clear();
    }
    APPLYING.set(false);
    AFFIRMED.take();
    buffer::reset();
    trigger::reset();
    crate::relation::at_abort();
}

#[pg_guard]
unsafe extern "C-unwind" fn at_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    mine: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => {
            buffer::with(|b| b.merge_savepoint(mine, parent));
            trigger::merge_savepoint(mine, parent);
        }
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => {
            buffer::with(|b| b.roll_back_to(mine));
            trigger::roll_back_to(mine);
            crate::relation::at_abort();
        }
        _ => {}
    }
}
