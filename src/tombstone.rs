//! Tombstones: deleted rows with their versions and last image, kept until the deletion is stable.
use crate::error::Result;
use crate::pg::identity::ActingAs;
use crate::shmem;
use crate::stash::{Stash, Stashed};
use pgrx::prelude::*;
use tandem_model::hlc::NodeId;
use tandem_model::stable::Stable;

/// A deleted row. Its `hlc` is its `dead`.
pub type Tombstone = Stashed;

const STASH: Stash = Stash { table: "tombstone", index: "tombstone_pkey" };

/// The tombstone of a key, after whoever is writing it has finished.
pub fn find(relid: pg_sys::Oid, key: &[u8]) -> Option<Tombstone> {
    STASH.find(relid, key, |_| ()).map(|(found, ())| found)
}

/// Writes the tombstone of a key in place of one that may be there.
pub fn put(relid: pg_sys::Oid, key: &[u8], tombstone: &Tombstone) {
    STASH.put(relid, key, tombstone, &[]);
}

/// Removes the tombstone of a key. False if there was none.
pub fn remove(relid: pg_sys::Oid, key: &[u8]) -> bool {
    STASH.remove(relid, key)
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
