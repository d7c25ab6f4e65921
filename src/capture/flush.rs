//! At pre-commit the buffer becomes journal rows: net effect per key, chunks first, then the position is
//! taken and written in one closing row.
use super::buffer::{self, Buffer};
use super::spool::Spool;
use crate::error::Error;
use crate::journal::{Row, Segment};
use crate::registry;
use crate::shmem;
use pgrx::prelude::*;
use std::hash::{DefaultHasher, Hash, Hasher};
use tandem_model::change::{Change, Item};
use tandem_model::hlc::Hlc;
use tandem_model::wire;

/// Hash of what a change is about: which changes have to be netted with each other.
pub fn key_hash(change: &Change<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    change.descriptor.hash(&mut hasher);
    for value in &change.key {
        value.map(|v| &v[..]).hash(&mut hasher);
    }
    hasher.finish()
}

/// Writes this transaction to the journal, if it has anything to say.
pub fn at_pre_commit() {
    // The buffer is taken out: a failure below aborts the transaction, which resets it anyway.
    let mut buffer = buffer::with(|b| {
        let worth_it = !b.is_empty() || b.heartbeat;
        worth_it.then(|| std::mem::take(b))
    });
    let Some(buffer) = &mut buffer else { return };
    if !buffer.again.is_empty() {
        net(buffer);
    }
    if buffer.is_empty() && !buffer.heartbeat {
        buffer.spool.take().map(Spool::close);
        return;
    }
    // SAFETY: TOAST wants a snapshot; popped below, or by the abort.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let position = write(buffer);
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
    buffer::with(|b| b.position = Some(position));
}

fn write(buffer: &mut Buffer) -> tandem_model::hlc::Position {
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
    mark.position
}

/// Replaces the changes of keys that were touched more than once by one change each. The others keep
/// their place; the netted ones come last.
fn net(buffer: &mut Buffer) {
    let again = std::mem::take(&mut buffer.again);
    let mut kept = Buffer::default();
    let mut repeated: Vec<Vec<u8>> = Vec::new();
    let mut sort = |block: &[u8]| {
        for item in wire::items(block) {
            let item = item.unwrap_or_else(|e| Error::from(e).raise());
            match &item {
                Item::Change(change) if again.contains(&key_hash(change)) => {
                    let mut bytes = Vec::new();
                    wire::push_item(&mut bytes, &item).unwrap_or_else(|e| Error::from(e).raise());
                    repeated.push(bytes);
                }
                _ => kept.push_plain(&item),
            }
        }
    };
    if let Some(mut spool) = buffer.spool.take() {
        spool.for_each(&mut sort);
        spool.close();
    }
    sort(&buffer.body);
    let changes = repeated
        .iter()
        .flat_map(|bytes| wire::items(bytes))
        .filter_map(|item| match item {
            Ok(Item::Change(change)) => Some(change),
            _ => None,
        })
        .collect();
    for change in tandem_model::net::net(changes) {
        kept.push_plain(&Item::Change(change));
    }
    buffer.body = kept.body;
    buffer.spool = kept.spool;
}
