//! One net effect per key: the changes of keys that a transaction touched more than once become one change
//! each, and their tombstones what the peer computes from it (see `tandem_model::net`).
use super::buffer::{self, Buffer, Met};
use crate::displaced;
use crate::error::Error;
use crate::relation::SyncedRelation;
use crate::tombstone::{self, Tombstone};
use crate::value;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use tandem_model::change::{Change, Item, Op};
use tandem_model::descriptor::DescriptorId;
use tandem_model::wire;

/// Hash of what a change is about: which changes may have to be netted with each other.
pub fn key_hash(change: &Change<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    change.descriptor.hash(&mut hasher);
    for value in &change.key {
        value.map(|v| &v[..]).hash(&mut hasher);
    }
    hasher.finish()
}

/// What a change is about: descriptor and key as the catalog knows it.
type Key = (DescriptorId, Vec<u8>);

fn key_of(change: &Change<'_>) -> Key {
    (change.descriptor, value::encode_key(&change.key.iter().map(|v| v.map(|v| &v[..])).collect::<Vec<_>>()))
}

/// Nets the buffer. Changes of keys that were touched once keep their place; the netted ones come last.
pub fn net(buffer: &mut Buffer) {
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
    let changes: Vec<Change<'_>> = repeated
        .iter()
        .flat_map(|bytes| wire::items(bytes))
        .filter_map(|item| match item {
            Ok(Item::Change(change)) => Some(change),
            _ => None,
        })
        .collect();
    let netted = tandem_model::net::net(changes.clone());
    bury(buffer, changes, &netted);
    for change in netted {
        kept.push_plain(&Item::Change(change));
    }
    buffer.body = kept.body;
    buffer.spool = kept.spool;
}

/// Makes the tombstones of netted keys those of the net effect: what began and ended within the
/// transaction never was.
fn bury(buffer: &Buffer, mut changes: Vec<Change<'_>>, netted: &[Change<'_>]) {
    changes.sort_by_key(|c| c.version);
    let mut keys: HashMap<Key, Vec<&Change<'_>>> = HashMap::new();
    for change in &changes {
        keys.entry(key_of(change)).or_default().push(change);
    }
    let netted: HashMap<Key, &Change<'_>> = netted.iter().map(|change| (key_of(change), change)).collect();
    for (key, changes) in keys.into_iter().filter(|(_, changes)| changes.iter().any(|c| c.op == Op::Delete)) {
        let Some(rel) = buffer.relations.get(&key.0) else {
            Error::bug("a change refers to a table that this transaction did not touch").raise()
        };
        let met = buffer.met.get(&key);
        match netted.get(&key) {
            None => match met {
                Some(Met::Displaced(row)) => {
                    tombstone::remove(rel.relid, &key.1);
                    displaced::put_back(rel.relid, &key.1, row);
                }
                Some(Met::Tombstone(tombstone)) => tombstone::put(rel.relid, &key.1, tombstone),
                None => {
                    tombstone::remove(rel.relid, &key.1);
                }
            },
            Some(delete) if delete.op == Op::Delete => {
                let Some(now) = met.map(|met| met.row().clone()).or_else(|| tombstone::find(rel.relid, &key.1)) else {
                    Error::bug("a deleted row has no tombstone").raise()
                };
                let mut versions = delete.base.clone();
                versions.end(delete.version);
                let image = image_before(rel, &now, &changes);
                let tombstone = Tombstone { hlc: delete.version, versions, image, descriptor: now.descriptor };
                tombstone::put(rel.relid, &key.1, &tombstone);
            }
            Some(_) => {}
        }
    }
}

/// The row's content before the transaction: as it was when it was deleted, without the transaction's own
/// updates of that life.
fn image_before(rel: &SyncedRelation, tombstone: &Tombstone, changes: &[&Change<'_>]) -> Vec<u8> {
    let mut image = value::decode_image(&tombstone.image).unwrap_or_else(|e| e.raise());
    let updates: Vec<_> = changes.iter().take_while(|c| c.op == Op::Update).collect();
    for cell in updates.iter().rev().flat_map(|c| &c.cells) {
        for (column, old) in rel.cell_columns(cell.cell).zip(&cell.old) {
            if let Some(entry) = image.iter_mut().find(|(attnum, _)| *attnum == column.attnum as u16) {
                entry.1 = old.map(|v| v.to_vec());
            }
        }
    }
    value::encode_image(&image.iter().map(|(a, v)| (*a, v.as_deref())).collect::<Vec<_>>())
}

/// Notes what an insert found of its key: the first is what was there before this life.
pub fn note_met(rel: &SyncedRelation, key: &[u8], met: &Met) {
    buffer::with(|b| {
        b.met.entry((rel.descriptor, key.to_vec())).or_insert_with(|| met.clone());
    });
}

/// Closes the temporary file of a transaction that has nothing to say after all.
pub fn drop_spool(buffer: &mut Buffer) {
    if let Some(spool) = buffer.spool.take() {
        spool.close();
    }
}
