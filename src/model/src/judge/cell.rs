//! One cell of one life: which of two writes it holds.
//!
//! - By default the greater version.
//! - `node_priority`: of two writes that had not seen each other that of the named node, though it may have
//!   the lesser version; one that had seen the other replaces it. So what arrives from the named node always
//!   wins, and what arrives there wins if its base is what the cell holds.
use super::Pair;
use crate::change::CellChange;
use crate::policy::Policy;
use crate::versions::CellId;
use std::cmp::Ordering;

impl Pair<'_> {
    /// True if the sender had seen what is held of a cell when it wrote.
    pub(super) fn seen(&self, id: CellId) -> bool {
        let mine = self.row.versions.cell(id);
        mine.is_zero() || self.stable.same(mine, self.change.base.cell(id))
    }

    /// How the change's write of a cell stands to what is held: `Greater` wins, `Equal` came before.
    pub(super) fn order(&self, cell: &CellChange<'_>) -> Ordering {
        let mine = self.row.versions.cell(cell.cell);
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
}
