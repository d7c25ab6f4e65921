//! One cell of one life: which of two writes it holds.
//!
//! - By default the greater version.
//! - `node_priority`: of two writes that had not seen each other that of the named node, though it may have
//!   the lesser version; one that had seen the other replaces it. So what arrives from the named node always
//!   wins, and what arrives there wins if its base is what the cell holds.
//! - A counter ([`crate::counter`]): the greater base with all that is added to it; of one base each node's
//!   later sum. That a write adds is said by the write itself, so it needs no policy.
use super::{Pair, Side, Write, conflict_type, kind};
use crate::change::CellChange;
use crate::hlc::Hlc;
use crate::policy::Policy;
use crate::versions::{CellId, Versions};
use std::cmp::Ordering;

impl Pair<'_> {
    /// True if the sender had seen all that is held of a cell when it wrote.
    pub(super) fn seen(&self, id: CellId) -> bool {
        self.unseen(id).next().is_none()
    }

    /// The versions of a cell that the sender had not seen: of its base, and of what was added to it.
    pub(super) fn unseen(&self, id: CellId) -> impl Iterator<Item = Hlc> {
        let (held, base, stable) = (&self.row.versions, &self.change.base, *self.stable);
        let mine = held.base_of(id);
        let seen_base = mine.is_zero() || stable.same(mine, base.base_of(id));
        let tallies = held.counter(id).map_or(&[][..], |counter| &counter.tallies);
        let added = tallies.iter().filter(move |tally| {
            let told = if seen_base { base.counter(id) } else { None };
            let told = told.map_or(Hlc(0), |counter| counter.last(tally.last.node(), tally.epoch));
            !stable.same(tally.last, told)
        });
        (!seen_base).then_some(mine).into_iter().chain(added.map(|tally| tally.last))
    }

    /// What is held of a cell and was not seen is lost to the change, on record.
    pub(super) fn lose_unseen(&mut self, id: CellId, winner: Write, winning: Hlc) {
        let held = &self.row.versions;
        for mine in self.unseen(id).collect::<Vec<_>>() {
            self.lose(conflict_type(winner, kind(mine, held.birth)), Side::Local, mine, winning, Some(id));
        }
    }

    /// True if the change and what is held agree about the content of a cell. What was added has no content
    /// of its own to agree about.
    pub(super) fn agrees(&mut self, id: CellId) -> bool {
        let written = self.change.cells.iter().find(|c| c.cell == id);
        let plain = written.is_some_and(|c| c.delta.is_none()) && self.row.versions.counter(id).is_none();
        plain && (self.same_value)(id)
    }

    /// How the change's write of a cell stands to what is held: `Greater` wins, `Equal` came before.
    pub(super) fn order(&self, cell: &CellChange<'_>) -> Ordering {
        let held = &self.row.versions;
        let mine = held.base_of(cell.cell);
        if let Some(delta) = &cell.delta {
            if self.adds(cell) {
                let last = held.counter(cell.cell).map_or(Hlc(0), |c| c.last(cell.version.node(), delta.epoch));
                return if cell.version > last { Ordering::Greater } else { Ordering::Equal };
            }
            // A base that is not here and did not come with the change can't be added to.
            return if delta.sets && delta.base > mine { Ordering::Greater } else { Ordering::Less };
        }
        let by_version = cell.version.cmp(&mine);
        let Policy::NodePriority(node) = *self.policies.cell(cell.cell) else {
            return by_version;
        };
        if mine.node() == cell.version.node() {
            by_version // Writes of one node are never unseen by each other.
        } else if cell.version.node() == node || self.seen(cell.cell) {
            Ordering::Greater
        } else {
            Ordering::Less
        }
    }

    /// True if the write adds to the base that is held.
    pub(super) fn adds(&self, cell: &CellChange<'_>) -> bool {
        let mine = self.row.versions.base_of(cell.cell);
        cell.delta.as_ref().is_some_and(|delta| self.stable.same(delta.base, mine))
    }

    /// Stores the write of a cell.
    pub(super) fn take(&self, versions: &mut Versions, cell: &CellChange<'_>) {
        match &cell.delta {
            Some(delta) => versions.join_delta(cell.cell, cell.version, delta, self.adds(cell)),
            None => versions.set(cell.cell, cell.version),
        }
    }
}
