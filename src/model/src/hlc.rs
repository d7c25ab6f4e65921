//! The clock's values: [`Hlc`] (a version: when a row was written), [`Position`] (when a transaction
//! committed) and [`Mark`] (a position with its low mark). A version and a position are never compared.
use serde::{Deserialize, Serialize};

/// Number of a node, 1 to 63. 0 stands for no node: version 0 is "before pairing".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u8);

/// Version of a written row: 42 bits of milliseconds since 2024-01-01 UTC, 16 bits of counter, 6 bits of node.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hlc(pub u64);

/// Commit HLC of a transaction, same layout as [`Hlc`], never compared with one.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position(pub u64);

/// A position with its low mark: every version at or below `low` belongs to a transaction whose
/// position is at or below `position`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub position: Position,
    pub low: Hlc,
}
