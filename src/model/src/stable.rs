//! Stable points: what may be read as 0.
//!
//! A version is stable when its transaction is acknowledged and nothing of its node at or below it can
//! still come. From then on nobody can write against it unseen, and it reads as 0 (DESIGN 3).
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
        v.is_zero() || [self.own, self.peer].iter().any(|&(node, point)| v.node() == node && v <= point)
    }
    /// Two versions are equal: the same, or both read as 0.
    pub fn same(&self, a: Hlc, b: Hlc) -> bool {
        a == b || (self.covers(a) && self.covers(b))
    }
    /// The version as it reads: 0 if covered.
    pub fn read(&self, v: Hlc) -> Hlc {
        if self.covers(v) { Hlc(0) } else { v }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_has_its_own_point() {
        let v = |counter: u64, node: u64| Hlc(counter * 64 + node);
        let stable = Stable { own: (NodeId(1), v(5, 63)), peer: (NodeId(2), v(9, 2)) };
        assert!(stable.covers(Hlc(0)));
        assert!(stable.covers(v(5, 1)) && !stable.covers(v(6, 1)));
        assert!(stable.covers(v(9, 2)) && !stable.covers(v(10, 2)));
        assert!(!stable.covers(v(1, 3)), "a node that is neither has no point");
        assert!(stable.same(v(5, 1), v(9, 2)) && stable.same(Hlc(0), v(1, 1)) && stable.same(v(7, 1), v(7, 1)));
        assert!(!stable.same(v(6, 1), v(5, 1)) && !stable.same(v(6, 1), v(7, 1)));
        assert_eq!((stable.read(v(5, 1)), stable.read(v(6, 1))), (Hlc(0), v(6, 1)));
    }
}
