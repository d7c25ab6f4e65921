//! What a row lists of its versions: birth, dead and cells (the content of `_cells`).
//!
//! Sparse: a cell without an entry of its own was written by the birth (`cell()` gives `birth`, which
//! is 0 once it is forgotten). An entry may be an explicit 0: forgotten while the birth is not.
use crate::hlc::Hlc;
use crate::stable::Stable;
use serde::{Deserialize, Serialize};

/// A cell: the group of columns that is decided as one. 0 is the whole row (granularity `row`),
/// otherwise the smallest attribute number (of the node that uses it) of the group.
pub type CellId = u16;

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Version of the INSERT that began this life; 0 if forgotten.
    pub birth: Hlc,
    /// Version of the DELETE that ended it (or was outlived); 0: none, or forgotten.
    pub dead: Hlc,
    /// Sorted by cell.
    pub cells: Vec<(CellId, Hlc)>,
}

impl Versions {
    /// The version of a cell: its own entry, else the birth.
    pub fn cell(&self, cell: CellId) -> Hlc {
        todo!("{cell}")
    }
    /// Sets the entry of a cell.
    pub fn set(&mut self, cell: CellId, version: Hlc) {
        todo!("{cell}{version:?}")
    }
    /// Forgets what is stable, without changing what any cell reads as under [`Stable`].
    pub fn trim(&mut self, stable: &Stable) {
        todo!("{stable:?}")
    }
    /// True when nothing is listed: `_cells` is NULL.
    pub fn is_empty(&self) -> bool {
        todo!()
    }
    /// Appends the binary form that `tandem.cells` stores.
    pub fn encode(&self, out: &mut Vec<u8>) {
        todo!("{out:?}")
    }
    /// Reads the binary form; any bytes give a value or an error.
    pub fn decode(bytes: &[u8]) -> Result<Versions, crate::wire::DecodeError> {
        todo!("{bytes:?}")
    }
}
