//! What a transaction did: one net change per key.
use crate::descriptor::DescriptorId;
use crate::hlc::Hlc;
use crate::versions::{CellId, Versions};
use serde::{Deserialize, Serialize};

/// A column value as it travels; `None` is NULL.
pub type Value<'a> = Option<&'a [u8]>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// A birth: of a key that held nothing, a tombstone, or (replace) a living row.
    Insert,
    Update,
    Delete,
}

/// The new content of one cell, and what it replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellChange<'a> {
    pub cell: CellId,
    pub version: Hlc,
    /// Values of the cell's columns, as `Descriptor::cell_columns` orders them.
    #[serde(borrow)]
    pub new: Vec<Option<&'a serde_bytes::Bytes>>,
    /// The values replaced; empty for an insert.
    pub old: Vec<Option<&'a serde_bytes::Bytes>>,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<'a> {
    pub descriptor: DescriptorId,
    pub op: Op,
    /// Key values, in the descriptor's key order.
    #[serde(borrow)]
    pub key: Vec<Option<&'a serde_bytes::Bytes>>,
    /// The greatest version in this change: the row's `_hlc` afterwards, or the version of the delete.
    pub version: Hlc,
    /// Birth of the life that this change belongs to (of an insert: its own first version).
    pub life: Hlc,
    /// The versions it replaced. Insert and delete: all that the node listed for the key (tombstone
    /// included). Update: birth, dead, and an explicit entry for each changed cell.
    pub base: Versions,
    /// Insert: every cell. Update: the changed ones. Delete: none.
    pub cells: Vec<CellChange<'a>>,
    /// The other key of a primary-key update: of the insert the old key, of the delete the new one.
    pub moved: Option<Vec<Option<&'a serde_bytes::Bytes>>>,
}

/// What a transaction's body is a sequence of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Item<'a> {
    #[serde(borrow)]
    Change(Change<'a>),
    Truncate { descriptor: DescriptorId, version: Hlc },
    /// A conflict record or a decision on one: serde_json of [`crate::record::Record`].
    Record(#[serde(borrow)] &'a serde_bytes::Bytes),
}
