//! Table descriptors: what a change refers to, so that it outlives DDL.
use crate::versions::CellId;
use serde::{Deserialize, Serialize};

pub type DescriptorId = u32;

/// How values of a column travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// The bytes of a text-like varlena in the server's encoding.
    Raw,
    /// The type's send and receive functions.
    Binary,
    /// The type's output and input functions, under pinned settings.
    Text,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnShape {
    /// Attribute number on the sending node: the column's identity across renames.
    pub attnum: u16,
    pub name: String,
    /// `format_type` with typmod, schema-qualified: what must agree on both sides.
    pub type_name: String,
    pub transport: Transport,
    pub cell: CellId,
}

/// A table as its changes describe it. Stored once, named by its id in every change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub id: DescriptorId,
    /// Oid of the table on the sending node (the identity across renames of the table).
    pub relid: u32,
    pub schema: String,
    pub table: String,
    /// Without generated and dropped columns and without `_hlc` and `_cells`; by attnum.
    pub columns: Vec<ColumnShape>,
    /// Attribute numbers of the key, in key order.
    pub key: Vec<u16>,
}

/// Why two descriptors of one table name don't go together; text for `tandem.tables`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference(pub String);

impl Descriptor {
    /// Compares by names: columns, types, key, cells (as sets of column names). Order and numbers don't matter.
    pub fn agrees(&self, other: &Descriptor) -> Result<(), Difference> {
        todo!("{other:?}")
    }
    /// The columns of a cell in attnum order, key columns excluded.
    pub fn cell_columns(&self, cell: CellId) -> impl Iterator<Item = &ColumnShape> {
        self.columns.iter().filter(move |c| c.cell == cell && !self.key.contains(&c.attnum))
    }
}
