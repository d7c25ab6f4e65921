//! Two lives of one key: which of them the key holds.
//!
//! A key holds one life, and never cells of two. The later birth wins whole: its insert carries every
//! cell, whatever the policy of the cells. Under `node_priority` of the table, of two births that had not
//! seen each other that of the named node wins, though it may be the earlier; a birth that had seen the
//! other is its successor and wins as before. Only births are compared: an update of the named node that
//! the other node's delete and re-insert had not seen loses to the new life (the other node no longer has
//! the cells that the update would need).
use super::{Effect, Outcome, Pair, Side, Write, conflict_type, kind};
use crate::change::Op;
use crate::policy::Policy;
use crate::versions::Versions;

impl Pair<'_> {
    /// Whether the life that the change begins takes the place of the one that is held.
    pub(super) fn life_wins(&self) -> bool {
        let (held, change) = (&self.row.versions, self.change);
        match self.policies.existence {
            // A birth of the same node is later or earlier, never unseen.
            Policy::NodePriority(_) if held.birth.node() == change.life.node() && held.birth > change.life => false,
            Policy::NodePriority(node) if change.life.node() == node => true,
            Policy::NodePriority(_) => self.stable.same(held.birth, change.base.birth),
            _ => change.life > held.birth,
        }
    }

    /// Whether a change of another life than the held one is of a life that never came here. A life that
    /// lost did come; where the later doesn't always win, its version doesn't tell.
    pub(super) fn life_is_unknown(&self) -> bool {
        let by_version = !matches!(self.policies.existence, Policy::NodePriority(_));
        by_version && self.change.life > self.row.versions.birth
    }

    /// The change's life is the one that wins, or the only one: it stands as it was written.
    pub(super) fn be_born(&self, effect: Effect) -> Outcome {
        let mut versions = Versions { birth: self.change.life, ..Versions::default() };
        for cell in self.change.cells.iter().filter(|c| c.version != self.change.life) {
            match &cell.delta {
                Some(delta) => versions.join_delta(cell.cell, cell.version, delta, false),
                None => versions.set(cell.cell, cell.version),
            }
        }
        let hlc = match self.policies.existence {
            Policy::NodePriority(_) => self.row.hlc.max(self.change.version),
            _ => self.change.version,
        };
        (effect, hlc, versions)
    }

    /// A life that wins against a living row: whatever the sender had not seen of the row is lost.
    pub(super) fn replace(&mut self) -> Outcome {
        let held = &self.row.versions;
        let written = self.change.cells.iter().map(|c| c.cell);
        let unwritten = held.written();
        let unwritten = unwritten.filter(|id| !self.change.cells.iter().any(|c| c.cell == *id));
        for id in written.chain(unwritten).collect::<Vec<_>>() {
            let seen = self.seen(id);
            self.met |= !seen;
            if !seen && !self.agrees(id) {
                self.lose_unseen(id, Write::Insert, self.change.life);
            }
        }
        self.be_born(Effect::Replace)
    }

    /// A change of a life that has given way to another loses whole. Its node can't have seen the other.
    pub(super) fn lost_life(&mut self) -> Outcome {
        self.met = true;
        let birth = self.row.versions.birth;
        for cell in &self.change.cells {
            if cell.delta.is_some() || !(self.same_value)(cell.cell) {
                let loser = match self.change.op {
                    Op::Insert => kind(cell.version, self.change.life),
                    _ => Write::Update,
                };
                let conflict = conflict_type(Write::Insert, loser);
                self.lose(conflict, Side::Remote, cell.version, birth, Some(cell.cell));
            }
        }
        match self.policies.existence {
            Policy::NodePriority(_) => self.restamp(self.row.hlc.max(self.change.version), self.row.versions.clone()),
            _ => self.keep(),
        }
    }
}
