//! One life of a row: whether it shows, and what its cells hold.
//!
//! Cells are joined alike whether the row shows or not; whether it does depends on the table's policy:
//!
//! - By default a row shows while its `hlc` is above `dead`: an update revives what was deleted before it.
//! - `delete_wins`: a row shows until there is a delete. `dead` is final, whatever the versions say; every
//!   update that had not seen it is lost.
//! - `update_wins`: a row shows until there is a delete that had seen all that its cells hold; an update that
//!   wins its cell lets the row show again. For each cell it is kept whether some delete had seen what it
//!   holds ([`Versions::ended`]), so that two deletes which had each seen what the other had not end the row
//!   together, in whatever order they come.
//! - `node_priority`: a delete of the named node ends the row. One of the other node does if it had seen all
//!   that the cells hold; else the row shows, and there it shows again as soon as the unseen update comes.
use super::{Effect, Existence, Outcome, Pair, Side, Write, conflict_type, kind};
use crate::change::CellChange;
use crate::hlc::Hlc;
use crate::policy::Policy;
use crate::record::ConflictType;
use crate::versions::{CellId, Versions};
use std::cmp::Ordering;

impl Pair<'_> {
    pub(super) fn delete(&mut self) -> Outcome {
        let (row, dead) = (self.row, self.change.version);
        let held = &row.versions;
        let by_version =
            !matches!(self.policies.existence, Policy::DeleteWins | Policy::UpdateWins | Policy::NodePriority(_));
        if by_version && held.dead >= dead {
            self.met = held.dead > dead;
            return self.keep();
        }
        let hlc = row.hlc.max(dead);
        let mut versions = held.clone();
        versions.dead = held.dead.max(dead);
        if row.existence == Existence::Tombstone {
            self.met = !self.stable.same(held.dead, self.change.base.dead);
            return self.restamp(hlc, versions);
        }
        let unseen: Vec<CellId> = held.written().filter(|id| !self.seen(*id)).collect();
        if let Some(winner) = self.outlives(&mut versions, &unseen) {
            self.lose(ConflictType::UpdateDeleted, Side::Remote, dead, winner, None);
            return self.restamp(hlc, versions);
        }
        // What another delete had seen was not lost by this one.
        for id in unseen.into_iter().filter(|id| held.ended.binary_search(id).is_err()) {
            self.lose_unseen(id, Write::Delete, dead);
        }
        versions.end(dead);
        (Effect::Delete, hlc, versions)
    }

    /// The version by which a living row outlives the change, a delete that hadn't seen these cells of it.
    fn outlives(&self, versions: &mut Versions, unseen: &[CellId]) -> Option<Hlc> {
        let (row, dead) = (self.row, self.change.version);
        let greatest = |cells: &[CellId]| cells.iter().flat_map(|id| self.unseen(*id)).max();
        match self.policies.existence {
            Policy::DeleteWins => None,
            Policy::NodePriority(node) if dead.node() == node => None,
            Policy::NodePriority(_) => greatest(unseen),
            Policy::UpdateWins => {
                let seen = row.versions.written().filter(|id| !unseen.contains(id));
                seen.for_each(|id| versions.end_cell(id));
                let left: Vec<_> =
                    unseen.iter().copied().filter(|id| versions.ended.binary_search(id).is_err()).collect();
                greatest(&left)
            }
            _ => (row.hlc > dead).then_some(row.hlc),
        }
    }

    /// Whether the row shows after the change, an update that takes these cells of it.
    fn shows_after_update(&self, taken: &[CellId]) -> bool {
        if self.row.existence == Existence::Live {
            return true;
        }
        let version = self.change.version;
        match self.policies.existence {
            Policy::DeleteWins => false,
            Policy::UpdateWins => !taken.is_empty(),
            Policy::NodePriority(node) => version.node() == node && !taken.is_empty(),
            _ => version > self.row.versions.dead,
        }
    }

    pub(super) fn update(&mut self) -> Outcome {
        let (row, change) = (self.row, self.change);
        let held = &row.versions;
        let was_live = row.existence == Existence::Live;
        let orders: Vec<_> = change.cells.iter().map(|cell| self.order(cell)).collect();
        let winners = change.cells.iter().zip(&orders).filter(|(_, order)| **order == Ordering::Greater);
        let taken: Vec<CellId> = winners.map(|(cell, _)| cell.cell).collect();
        let shows = self.shows_after_update(&taken);
        let revived = !was_live && shows;
        if revived && !self.stable.same(held.dead, change.base.dead) {
            self.lose(ConflictType::UpdateDeleted, Side::Local, held.dead, change.version, None);
        }
        let mut versions = held.clone();
        if revived && self.policies.existence == Policy::UpdateWins {
            held.cells.iter().for_each(|(id, _)| versions.end_cell(*id));
        }
        let mut all_same = true;
        for (cell, order) in change.cells.iter().zip(orders) {
            if order == Ordering::Greater {
                self.take(&mut versions, cell);
            }
            if order != Ordering::Equal {
                all_same &= self.meet(cell, order, shows) || order == Ordering::Less;
            }
        }
        let hlc = row.hlc.max(change.version);
        match (was_live, shows) {
            (false, true) => (Effect::Revive(taken), hlc, versions),
            _ if taken.is_empty() => self.restamp(hlc, versions),
            (false, false) => (Effect::UpdateTombstone(taken), hlc, versions),
            (true, _) if all_same => (Effect::Restamp, hlc, versions),
            (true, _) => (Effect::Update(taken), hlc, versions),
        }
    }

    /// Puts on record what is lost where the change's write of a cell meets the held one. True if both are
    /// of one content.
    fn meet(&mut self, cell: &CellChange<'_>, order: Ordering, shows: bool) -> bool {
        let held = &self.row.versions;
        let (id, mine) = (cell.cell, held.base_of(cell.cell));
        let seen = self.seen(id);
        // What a delete ends has no content to agree with: it is lost, whatever the tombstone shows.
        let same = shows && !seen && self.agrees(id);
        self.met |= !seen;
        if same {
            return true;
        }
        if !shows {
            // The tombstone stands: whatever the cells say, the update is lost to the delete. If it had seen the
            // latest one, it is lost to another, whose version the peer will name.
            let winner = if self.stable.same(held.dead, self.change.base.dead) { Hlc(0) } else { held.dead };
            self.lose(ConflictType::DeleteOriginDiffers, Side::Remote, cell.version, winner, Some(id));
        } else if order == Ordering::Greater {
            // What both sides add counts.
            if !self.adds(cell) {
                self.lose_unseen(id, Write::Update, cell.version);
            }
        } else if !seen || cell.delta.is_some() {
            let conflict = conflict_type(kind(mine, held.birth), Write::Update);
            self.lose(conflict, Side::Remote, cell.version, mine, Some(id));
        }
        false
    }
}
