//! Stable points: what may be read as 0.
use crate::hlc::{Hlc, NodeId};

/// The stable points that are in force on this node: of itself and of its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stable {
    pub own: (NodeId, Hlc),
    pub peer: (NodeId, Hlc),
}

impl Stable {
    /// True if `v` is 0 or at or below the stable point of the node that wrote it.
    pub fn covers(&self, v: Hlc) -> bool {
        todo!("{v:?}")
    }
    /// Two versions are equal: the same, or both read as 0.
    pub fn same(&self, a: Hlc, b: Hlc) -> bool {
        todo!("{a:?}{b:?}")
    }
}
