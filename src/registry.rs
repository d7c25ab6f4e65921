//! The registry of open and committing transactions: what makes a node's stream gapless (I3) and its
//! stable point sound.
//!
//! A value is published in two steps, first a lower bound, then, once it is taken from the clock, the
//! value itself: a scanner that read the clock earlier either sees the entry or is smaller than it. The
//! reader takes the horizon first and its snapshot after. A slot is cleared when the commit is visible.
use crate::clock;
use crate::shmem::{self, Slot};
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::{Hlc, Mark, Position};

fn mine() -> &'static Slot {
    let slot = shmem::my_slot();
    // SAFETY: set when the backend connected.
    slot.database.store(unsafe { pg_sys::MyDatabaseId }.to_u32(), Release);
    slot
}

/// Takes a version; the first one of a transaction enters the registry.
pub fn stamp() -> Hlc {
    let slot = shmem::my_slot();
    if slot.first.load(Relaxed) != 0 {
        return clock::tick();
    }
    let slot = mine();
    // A tick may read the catalog or write the reservation at first use: do that before the bound.
    shmem::database();
    slot.first.store(clock::read() + 1, SeqCst);
    let first = clock::tick();
    slot.first.store(first.0, SeqCst);
    first
}

/// The first version of this transaction; 0 if it stamped nothing.
pub fn first() -> Hlc {
    Hlc(shmem::my_slot().first.load(Relaxed))
}

/// Takes this transaction's position and its low mark. The slot stays until [`clear`].
pub fn enter() -> Mark {
    let slot = mine();
    shmem::database();
    let before = clock::read();
    slot.position.store(before + 1, SeqCst);
    let low = before.min(oldest_first(slot).saturating_sub(1));
    let position = clock::tick_position();
    slot.position.store(position.0, SeqCst);
    Mark { position, low: Hlc(low) }
}

/// Least first version among the other open transactions of this database.
fn oldest_first(own: &Slot) -> u64 {
    let database = own.database.load(Relaxed);
    shmem::slots()
        .iter()
        .filter(|slot| !std::ptr::eq(*slot, own))
        .filter_map(|slot| {
            let first = slot.first.load(SeqCst);
            (first != 0 && slot.database.load(Acquire) == database).then_some(first)
        })
        .min()
        .unwrap_or(u64::MAX)
}

/// Everything at or below this position is visible to a snapshot taken afterwards.
pub fn horizon() -> Position {
    // SAFETY: set when the backend connected.
    let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
    let before = clock::read();
    let committing = shmem::slots().iter().filter_map(|slot| {
        let position = slot.position.load(SeqCst);
        (position != 0 && slot.database.load(Acquire) == database).then(|| position - 1)
    });
    Position(committing.min().unwrap_or(u64::MAX).min(before))
}

/// Ends this transaction's entry: its outcome is visible to everybody. Never raises.
pub fn clear() {
    let Some(slot) = shmem::my_slot_if_any() else { return };
    if slot.first.load(Relaxed) != 0 || slot.position.load(Relaxed) != 0 {
        slot.position.store(0, SeqCst);
        slot.first.store(0, SeqCst);
    }
}
