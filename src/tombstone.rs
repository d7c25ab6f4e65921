//! Tombstones: deleted rows with their versions and last image, kept until the deletion is stable.
//!
//! Written by whoever deletes (capture, apply), in the same transaction; looked up under a dirty snapshot,
//! so that an INSERT that waited for a concurrent DELETE finds what that left.
use crate::error::{Error, Result};
use crate::pg::heap::{self, Table};
use crate::pg::identity::ActingAs;
use crate::shmem;
use pgrx::prelude::*;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::stable::Stable;
use tandem_model::versions::Versions;

/// A deleted row.
#[derive(Debug, Clone)]
pub struct Tombstone {
    pub hlc: Hlc,
    pub versions: Versions,
    /// Last content, see [`crate::value::encode_image`].
    pub image: Vec<u8>,
    /// The descriptor that the image's values are of.
    pub descriptor: u32,
}

fn keys(relid: pg_sys::Oid, key: &[u8]) -> [pg_sys::ScanKeyData; 2] {
    [heap::equals(1, pg_sys::F_OIDEQ, relid.into()), heap::equals(2, pg_sys::F_BYTEAEQ, heap::bytea(key))]
}

fn open() -> Table {
    Table::open("tombstone", pg_sys::RowExclusiveLock)
}

/// The tombstone of a key, after whoever is writing it has finished.
pub fn find(relid: pg_sys::Oid, key: &[u8]) -> Option<Tombstone> {
    find_in(&open(), relid, key).map(|(_, t)| t.unwrap_or_else(|e| e.raise()))
}

fn find_in(table: &Table, relid: pg_sys::Oid, key: &[u8]) -> Option<(pg_sys::ItemPointerData, Result<Tombstone>)> {
    table.find("tombstone_pkey", &mut keys(relid, key), |place, row| (place, read(row)))
}

fn read(row: &[Option<pg_sys::Datum>]) -> Result<Tombstone> {
    let &[_, _, Some(hlc), Some(cells), Some(image), Some(descriptor)] = row else {
        return Err(Error::bug("a tombstone has a NULL"));
    };
    // SAFETY: columns 4 and 5 are varlenas, not null.
    let (cells, image) = unsafe { (heap::bytes(cells), heap::bytes(image)) };
    Ok(Tombstone {
        hlc: Hlc(hlc.value() as u64),
        versions: Versions::decode(&cells)?,
        image,
        descriptor: descriptor.value() as u32,
    })
}

/// Writes the tombstone of a key in place of one that may be there.
pub fn put(relid: pg_sys::Oid, key: &[u8], tombstone: &Tombstone) {
    let table = open();
    if let Some((place, _)) = find_in(&table, relid, key) {
        table.delete(place);
    }
    let mut cells = Vec::new();
    tombstone.versions.encode(&mut cells);
    table.insert(&[
        Some(relid.into()),
        Some(heap::bytea(key)),
        heap::int8(tombstone.hlc.0),
        Some(heap::bytea(&cells)),
        Some(heap::bytea(&tombstone.image)),
        Some(pg_sys::Datum::from(tombstone.descriptor as i32)),
    ]);
}

/// Removes the tombstone of a key. False if there was none.
pub fn remove(relid: pg_sys::Oid, key: &[u8]) -> bool {
    let table = open();
    find_in(&table, relid, key).is_some_and(|(place, _)| table.delete(place))
}

/// Deletes up to `limit` tombstones of which everything is stable. The caller's transaction makes the stable
/// point durable with it (a progress row, or a journal row). Returns how many went.
pub fn collect(limit: usize, own: NodeId, peer: NodeId) -> Result<u64> {
    let stable: Stable = shmem::database().stable(own, peer);
    let bound = stable.own.1.max(stable.peer.1);
    let _superuser = ActingAs::superuser();
    Spi::connect_mut(|client| -> Result<u64> {
        let query = "select relid, key, cells::text from tandem.tombstone where hlc <= $1::int8::tandem.hlc \
                     order by hlc limit $2";
        let mut due = Vec::new();
        for row in client.select(query, None, &[(bound.0 as i64).into(), (limit as i64).into()])? {
            let (Some(relid), Some(key), Some(cells)) =
                (row.get::<pg_sys::Oid>(1)?, row.get::<Vec<u8>>(2)?, row.get::<String>(3)?)
            else {
                continue;
            };
            if crate::types::parse_cells(&cells).is_some_and(|v| v.collectable(&stable)) {
                due.push((relid, key));
            }
        }
        for (relid, key) in &due {
            let query = "delete from tandem.tombstone where relid = $1 and key = $2";
            client.update(query, None, &[(*relid).into(), key.clone().into()])?;
        }
        Ok(due.len() as u64)
    })
}
