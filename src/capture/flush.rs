//! At pre-commit the buffer becomes journal rows: net effect per key, chunks first, then the position is
//! taken and written in one closing row.
use super::buffer::{self, Buffer};
use super::netting;
use crate::journal::{Row, Segment};
use crate::registry;
use crate::shmem;
use pgrx::prelude::*;
use tandem_model::hlc::{Hlc, Position};

/// Writes this transaction to the journal, if it has anything to say.
pub fn at_pre_commit() {
    // The buffer is taken out: a failure below aborts the transaction, which resets it anyway.
    let mut buffer = buffer::with(|b| {
        let worth_it = !b.is_empty() || b.heartbeat;
        worth_it.then(|| std::mem::take(b))
    });
    let Some(buffer) = &mut buffer else { return };
    if !buffer.again.is_empty() {
        netting::net(buffer);
    }
    if buffer.is_empty() && !buffer.heartbeat {
        netting::drop_spool(buffer);
        return;
    }
    // SAFETY: TOAST wants a snapshot; popped below, or by the abort.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let (position, segment) = write(buffer);
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    buffer::with(|b| {
        b.position = Some(position);
        b.segment = segment;
    });
}

fn write(buffer: &mut Buffer) -> (Position, u32) {
    let segment = Segment::pick();
    let first = registry::first();
    let mut chunks = 0;
    if let Some(mut spool) = buffer.spool.take() {
        if !buffer.body.is_empty() {
            spool.append(&buffer.body);
            buffer.body.clear();
        }
        spool.for_each(|block| {
            segment.append_chunk(first, chunks, block);
            chunks += 1;
        });
        spool.close();
    }
    // `seen` before the position: whatever this node had not seen is then below every position that
    // says it was.
    let database = shmem::database();
    let seen = buffer.carry.unwrap_or_else(|| database.seen());
    let stable = Hlc(database.stable_own.load(std::sync::atomic::Ordering::Acquire));
    let mark = registry::enter();
    segment.append(&Row { mark, seen, stable, first, chunks, payload: std::mem::take(&mut buffer.body) });
    (mark.position, segment.number)
}
