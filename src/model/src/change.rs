//! What a transaction did: one net change per key.
use crate::counter::Delta;
use crate::descriptor::DescriptorId;
use crate::hlc::{Hlc, NodeId};
use crate::versions::{CellId, Versions};
use crate::wire::DecodeError;
use serde::{Deserialize, Serialize};

/// A column value as it travels; `None` is NULL.
pub type Value<'a> = Option<&'a [u8]>;

/// What a change does to its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// A birth: of a key that held nothing, a tombstone, or (replace) a living row.
    Insert,
    /// New values of some cells of a living row.
    Update,
    /// The end of a life.
    Delete,
}

/// The new content of one cell, and what it replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellChange<'a> {
    pub cell: CellId,
    pub version: Hlc,
    /// Values of the cell's columns, as `Descriptor::cell_columns` orders them.
    #[serde(borrow, deserialize_with = "crate::bounded::list")]
    pub new: Vec<Option<&'a serde_bytes::Bytes>>,
    /// The values replaced; empty for an insert.
    #[serde(borrow, deserialize_with = "crate::bounded::list")]
    pub old: Vec<Option<&'a serde_bytes::Bytes>>,
    /// The write added to a counter; without it, it set the cell.
    #[serde(borrow)]
    pub delta: Option<Delta<'a>>,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<'a> {
    pub descriptor: DescriptorId,
    pub op: Op,
    /// Key values, in the descriptor's key order.
    #[serde(borrow, deserialize_with = "crate::bounded::list")]
    pub key: Vec<Option<&'a serde_bytes::Bytes>>,
    /// The greatest version in this change: the row's `_hlc` afterwards, or the version of the delete.
    pub version: Hlc,
    /// Birth of the life that this change belongs to (of an insert: its own first version).
    pub life: Hlc,
    /// The versions it replaced. Insert and delete: all that the node listed for the key (tombstone
    /// included). Update: birth, dead, and an explicit entry (and counter) for each changed cell.
    pub base: Versions,
    /// Insert: every cell. Update: the changed ones. Delete: none.
    #[serde(borrow, deserialize_with = "crate::bounded::list")]
    pub cells: Vec<CellChange<'a>>,
    /// The other key of a primary-key update: of the insert the old key, of the delete the new one.
    #[serde(borrow, deserialize_with = "crate::bounded::optional")]
    pub moved: Option<Vec<Option<&'a serde_bytes::Bytes>>>,
}

/// What a transaction's body is a sequence of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Item<'a> {
    #[serde(borrow)]
    Change(Change<'a>),
    /// The table was emptied; the version is its table-level `dead`.
    Truncate { descriptor: DescriptorId, version: Hlc },
    /// A conflict record or a decision on one: serde_json of [`crate::record::Record`].
    Record(#[serde(borrow)] &'a serde_bytes::Bytes),
    /// An entry of a table's policy log, or the wish for one: serde_json of [`crate::policy_log::Entry`].
    Policy { descriptor: DescriptorId, entry: &'a serde_bytes::Bytes },
}

impl Change<'_> {
    /// Checks what a peer could get wrong (I13): every version in the change is one of `sender`'s, the
    /// greatest of them is `version`, cells are in order, and the shape fits the operation.
    pub fn check(&self, sender: NodeId) -> Result<(), DecodeError> {
        let wrong = |why: &str| Err(DecodeError { what: "change", why: why.into() });
        let of_sender = |v: Hlc| v.node() == sender && !v.is_zero();
        if !of_sender(self.version) || !self.cells.iter().all(|c| of_sender(c.version)) {
            return wrong("a version is not the sending node's");
        }
        if self.cells.iter().any(|c| c.version > self.version) {
            return wrong("a cell is newer than the change");
        }
        if !self.cells.is_sorted_by(|a, b| a.cell < b.cell) {
            return wrong("cells out of order");
        }
        if self.key.is_empty() || self.key.iter().any(Option::is_none) {
            return wrong("a key without a value");
        }
        for cell in &self.cells {
            if let Some(delta) = &cell.delta {
                delta.check(cell.version, self.life, self.op == Op::Insert)?;
            }
        }
        let greatest = self.cells.iter().map(|c| c.version).max();
        match self.op {
            Op::Insert if !of_sender(self.life) || self.life > self.version => {
                wrong("a birth is not the sending node's")
            }
            Op::Insert if self.version != self.life && greatest != Some(self.version) => {
                wrong("no cell has the version")
            }
            Op::Insert if self.cells.iter().any(|c| c.version < self.life) => wrong("a cell is older than its row"),
            Op::Update if greatest != Some(self.version) => wrong("no cell has the version"),
            Op::Update | Op::Delete if self.life >= self.version => wrong("a row born after its change"),
            Op::Delete if !self.cells.is_empty() => wrong("a delete with cells"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(counter: u64) -> Hlc {
        Hlc(counter * 64 + 2)
    }
    fn change(op: Op) -> Change<'static> {
        let cell = |cell, at| CellChange { cell, version: v(at), new: vec![None], old: vec![], delta: None };
        Change {
            descriptor: 1,
            op,
            key: vec![Some(serde_bytes::Bytes::new(b"k"))],
            version: if op == Op::Insert { v(5) } else { v(7) },
            life: v(5),
            base: Versions::default(),
            cells: match op {
                Op::Insert => vec![cell(2, 5), cell(3, 5)],
                Op::Update => vec![cell(2, 6), cell(3, 7)],
                Op::Delete => vec![],
            },
            moved: None,
        }
    }

    fn delta(base: Hlc, sets: bool) -> Delta<'static> {
        Delta { base, value: "1", sets, epoch: 0, sum: "2" }
    }

    /// Breaks a change in one way.
    type Break = fn(&mut Change<'static>);

    #[test]
    fn what_capture_makes_passes() {
        for op in [Op::Insert, Op::Update, Op::Delete] {
            assert_eq!(change(op).check(NodeId(2)), Ok(()));
            assert!(change(op).check(NodeId(1)).is_err(), "{op:?} of another node");
        }
        let mut netted = change(Op::Insert);
        (netted.cells[1].version, netted.version) = (v(9), v(9));
        assert_eq!(netted.check(NodeId(2)), Ok(()));
        let mut added = change(Op::Update);
        added.cells[0].delta = Some(delta(Hlc(0), false));
        assert_eq!(added.check(NodeId(2)), Ok(()));
        added.cells[0].delta = Some(delta(Hlc(5 * 64 + 1), false));
        assert_eq!(added.check(NodeId(2)), Ok(()), "added to the other node's base");
        let mut set = change(Op::Insert);
        (set.cells[1].version, set.version) = (v(9), v(9));
        set.cells[1].delta = Some(delta(v(5), true));
        assert_eq!(set.check(NodeId(2)), Ok(()));
        let mut forgotten = change(Op::Update);
        forgotten.life = Hlc(0);
        assert_eq!(forgotten.check(NodeId(2)), Ok(()));
    }

    #[test]
    fn what_a_hostile_peer_makes_does_not() {
        let cases: [(Op, Break); 19] = [
            (Op::Insert, |c| c.version = Hlc(0)),
            (Op::Insert, |c| c.life = Hlc(0)),
            (Op::Insert, |c| c.life = v(6)),
            (Op::Insert, |c| c.version = v(6)),
            (Op::Insert, |c| c.cells[0].version = v(4)),
            (Op::Insert, |c| c.cells.reverse()),
            (Op::Insert, |c| c.cells[1].cell = 2),
            (Op::Insert, |c| c.key = vec![]),
            (Op::Insert, |c| c.key = vec![None]),
            (Op::Update, |c| c.cells[0].version = Hlc(6 * 64 + 1)),
            (Op::Update, |c| c.version = v(8)),
            (Op::Update, |c| c.cells[0].delta = Some(delta(v(6), false))),
            (Op::Update, |c| c.cells[0].delta = Some(delta(v(4), true))),
            (Op::Update, |c| c.cells[1].delta = Some(delta(Hlc(6 * 64 + 1), true))),
            (Op::Update, |c| c.cells[0].delta = Some(Delta { sum: "1;", ..delta(Hlc(0), false) })),
            (Op::Update, |c| c.cells[0].delta = Some(Delta { value: "", ..delta(Hlc(0), false) })),
            (Op::Insert, |c| {
                (c.cells[1].version, c.version) = (v(9), v(9));
                c.cells[1].delta = Some(delta(v(5), false));
            }),
            (Op::Delete, |c| c.life = v(8)),
            (Op::Delete, |c| c.cells = change(Op::Update).cells),
        ];
        for (i, (op, edit)) in cases.into_iter().enumerate() {
            let mut bad = change(op);
            edit(&mut bad);
            assert!(bad.check(NodeId(2)).is_err(), "case {i}");
        }
    }
}
