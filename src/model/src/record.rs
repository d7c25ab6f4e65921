//! Conflict records: a replicated set with a join, so that both nodes hold the same history.
use crate::hlc::{Hlc, NodeId};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use uuid::Uuid;

/// Postgres's own names, and ours where it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictType {
    InsertExists,
    UpdateOriginDiffers,
    UpdateExists,
    UpdateMissing,
    UpdateDeleted,
    DeleteOriginDiffers,
    DeleteMissing,
    MultipleUniqueConflicts,
    ForeignKeyViolation,
    CheckViolation,
    TruncateOriginDiffers,
    InitialDiffers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Decided by the policy.
    Auto,
    Open,
    Resolved,
    Ignored,
    Superseded,
}

/// An image of the row, as one node had it. Joined by rank: greatest wins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    /// (1 if the node told its own image, else 0; version the image shows; then the text itself).
    pub rank: (u8, Hlc),
    pub tuple: Box<RawValue>,
}

/// A decision is a cell with its own version, 0 at detection, so that a late detection never reopens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Decision {
    pub version: Hlc,
    pub status: Status,
    pub by: Option<String>,
    /// Microseconds since the Unix epoch.
    pub at: Option<i64>,
    pub resolution: Option<String>,
    pub note: Option<String>,
}

/// One losing write.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub conflict_id: Uuid,
    pub schema: String,
    pub table: String,
    /// The key as a JSON object, columns in key order.
    pub key: Box<RawValue>,
    pub conflict_type: ConflictType,
    pub constraint_name: Option<String>,
    pub losing: Hlc,
    /// The greatest version that is known to have won against it.
    pub winning: Hlc,
    /// Names of the cells lost, sorted; empty: the row's existence.
    pub cells: Vec<String>,
    pub base: Option<Image>,
    /// By node id.
    pub tuples: BTreeMap<u8, Image>,
    pub result: Option<Image>,
    pub policy: String,
    /// Microseconds since the Unix epoch; the earliest detection.
    pub detected_at: i64,
    pub decision: Decision,
}

impl Record {
    /// The same on both nodes: derived from table, key and losing version.
    pub fn id(schema: &str, table: &str, key_json: &str, losing: Hlc) -> Uuid {
        todo!("{schema}{table}{key_json}{losing:?}")
    }
    pub fn losing_node(&self) -> NodeId {
        todo!()
    }
    /// The join: commutative, associative, idempotent.
    pub fn join(&mut self, other: Record) {
        todo!("{other:?}")
    }
}
