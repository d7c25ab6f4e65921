//! Displaced rows: alive, with versions like any other, and not in their table because a constraint forbids
//! it. What shows is derived (`tandem_model::showing`, `tandem_model::orphan`); these are asked again after
//! each commit that may have changed the answer.
use crate::error::Result;
use crate::pg::heap;
use crate::pg::identity::ActingAs;
use crate::shmem;
use crate::stash::{Stash, Stashed};
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;

const STASH: Stash = Stash { table: "displaced", index: "displaced_pkey" };

/// What a displaced row waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// A greater row holds one of its unique values.
    Place,
    /// The row that it points at doesn't show.
    Parent,
    /// The row shows, but not as merging would have it: that breaks a CHECK.
    Check,
}

impl WaitsFor {
    pub fn name(self) -> &'static str {
        match self {
            WaitsFor::Place => "place",
            WaitsFor::Parent => "parent",
            WaitsFor::Check => "check",
        }
    }

    fn of(name: &str) -> WaitsFor {
        match name {
            "place" => WaitsFor::Place,
            "parent" => WaitsFor::Parent,
            _ => WaitsFor::Check,
        }
    }
}

/// A displaced row.
#[derive(Debug, Clone)]
pub struct Displaced {
    pub row: Stashed,
    pub waits_for: WaitsFor,
    /// The constraint that keeps it out.
    pub constraint: String,
}

/// False if no row of this database is displaced: the common case, which costs no look-up.
pub fn any() -> bool {
    shmem::database().has_displaced.load(Acquire)
}

/// The displaced row of a key, after whoever is writing it has finished.
pub fn find(relid: pg_sys::Oid, key: &[u8]) -> Option<Displaced> {
    if !any() {
        return None;
    }
    let text = |value: &Option<pg_sys::Datum>| {
        // SAFETY: columns of type text, not null.
        value.map(|datum| String::from_utf8_lossy(&unsafe { heap::bytes(datum) }).into_owned()).unwrap_or_default()
    };
    let found = STASH.find(relid, key, |rest| (rest.first().map(text), rest.get(1).map(text)));
    found.map(|(row, (waits_for, constraint))| Displaced {
        row,
        waits_for: WaitsFor::of(&waits_for.unwrap_or_default()),
        constraint: constraint.unwrap_or_default(),
    })
}

/// Sets a row aside, in place of one of its key that may be there.
pub fn put(relid: pg_sys::Oid, key: &[u8], displaced: &Displaced) {
    // Before the row is there: whoever doesn't look now has its own row in the heap already, where it is seen.
    shmem::database().has_displaced.store(true, Release);
    // SAFETY: reads the clock.
    let since = pg_sys::Datum::from(unsafe { pg_sys::GetCurrentTimestamp() });
    let text = |text: &str| Some(heap::bytea(text.as_bytes()));
    let rest = [text(displaced.waits_for.name()), text(&displaced.constraint), Some(since)];
    STASH.put(relid, key, &displaced.row, &rest);
}

/// Sets a row aside again that was taken up within this transaction; what it waits for is found out anew.
pub fn put_back(relid: pg_sys::Oid, key: &[u8], row: &Stashed) {
    put(relid, key, &Displaced { row: row.clone(), waits_for: WaitsFor::Place, constraint: String::new() });
}

/// The row of a key shows again, or is dead. False if it was not displaced.
pub fn remove(relid: pg_sys::Oid, key: &[u8]) -> bool {
    any() && STASH.remove(relid, key)
}

/// A place in the table of displaced rows, as [`all`] lists them.
pub struct Listed {
    pub relid: pg_sys::Oid,
    pub key: Vec<u8>,
    pub waits_for: WaitsFor,
}

/// Displaced rows of all tables, or of one; the greatest versions first.
pub fn all(relid: Option<pg_sys::Oid>) -> Result<Vec<Listed>> {
    if !any() {
        return Ok(Vec::new());
    }
    let query = "select relid, key, waits_for from tandem.displaced
                 where $1 is null or relid = $1 order by hlc::int8 desc, key desc";
    let _superuser = ActingAs::superuser();
    Spi::connect_mut(|client| {
        let mut found = Vec::new();
        // An update, as far as SPI goes: so that it sees what this transaction has done.
        for row in client.update(query, None, &[relid.into()])? {
            let (Some(relid), Some(key)) = (row.get::<pg_sys::Oid>(1)?, row.get::<Vec<u8>>(2)?) else { continue };
            let waits_for = WaitsFor::of(&row.get::<String>(3)?.unwrap_or_default());
            found.push(Listed { relid, key, waits_for });
        }
        Ok(found)
    })
}
