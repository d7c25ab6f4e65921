//! The only place that judges a pair of writes: the join of a change into a row, and what is lost by it.
use crate::change::Change;
use crate::hlc::Hlc;
use crate::record::ConflictType;
use crate::stable::Stable;
use crate::versions::{CellId, Versions};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existence {
    /// Neither row nor tombstone.
    Absent,
    /// Deleted, remembered with its image.
    Tombstone,
    Live,
}

/// What the receiving node holds of a key. Cell ids are the receiver's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowState {
    pub existence: Existence,
    /// `_hlc`: greatest version of the row, kept for good; 0 if absent.
    pub hlc: Hlc,
    pub versions: Versions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Local,
    Remote,
}

/// What is to be done with the stored row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing at all is written.
    Keep,
    /// The content stays, `hlc` and `versions` are written (to the row, or to the tombstone).
    Restamp,
    /// A row is born where there was none (a tombstone goes).
    Insert,
    /// The living row gives way whole to the change's.
    Replace,
    /// These cells take the change's values.
    Update(Vec<CellId>),
    /// The tombstone's image comes back with these cells from the change.
    Revive(Vec<CellId>),
    /// The tombstone's image takes these cells from the change and stays dead.
    UpdateTombstone(Vec<CellId>),
    /// The living row goes, a tombstone with its image stays.
    Delete,
    /// An update or delete of a key that is not there and not remembered: nothing is written but the record.
    Missing,
}

/// One losing write, met in this pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    pub conflict: ConflictType,
    pub loser: Side,
    /// The version that lost and the one that won.
    pub losing: Hlc,
    pub winning: Hlc,
    /// The cells lost; empty: the existence of the row (a delete lost, or a row lost whole).
    pub cells: Vec<CellId>,
}

/// The outcome of one change on one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub effect: Effect,
    /// Of the stored row or tombstone afterwards (untouched for `Keep` and `Missing`).
    pub hlc: Hlc,
    pub versions: Versions,
    pub losses: Vec<Loss>,
    /// Unseen writes of both sides were united without loss.
    pub merged: bool,
}

/// Judges `change` (cell ids already translated to the receiver's) against what the receiver holds.
/// `same_value(cell)` tells whether the change's new value of a cell equals the stored one.
pub fn judge(row: &RowState, change: &Change<'_>, stable: &Stable, same_value: &mut dyn FnMut(CellId) -> bool) -> Verdict {
    todo!("{row:?}{change:?}{stable:?}{}", same_value(0))
}
