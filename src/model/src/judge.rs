//! The only place that judges a pair of writes: the join of a change into a row, and what is lost by it.
//!
//! The join (DESIGN 4): the greater birth wins whole; within a life each cell takes the greater version
//! and `dead` takes the greater; a row shows while its `hlc` is above `dead`. What the sender had not seen
//! is what its bases don't name (DESIGN 3). Rules of the record:
//!
//! - The type comes from what won and what lost, never from who came first: both nodes find the same.
//!
//!   | won | lost | type |
//!   |---|---|---|
//!   | insert | insert | `insert_exists` |
//!   | insert (a newer life), update | update | `update_origin_differs` |
//!   | update | delete | `update_deleted` |
//!   | delete | update | `delete_origin_differs` |
//!
//! - Equal content is no loss: the versions are joined, nothing is on record.
//! - A delete whose effect holds lost nothing: both deleted; or the life that it named has since given
//!   way to a newer one (a delete is never compared with an insert of another life).
//! - What was already dead here can't be lost again: it was ended knowingly, or is on record since.
//! - A delete that loses to a later update is the only loss of that pair: earlier unseen updates live on.
use crate::change::{Change, Op};
use crate::hlc::Hlc;
use crate::record::ConflictType;
use crate::stable::Stable;
use crate::versions::{CellId, Versions};
use std::cmp::Ordering;

/// Whether a key shows on the receiving node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existence {
    /// Neither row nor tombstone.
    Absent,
    /// Deleted, remembered with its image.
    Tombstone,
    Live,
}

/// What the receiving node holds of a key. Cell ids are the receiver's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowState {
    pub existence: Existence,
    /// `_hlc`: greatest version of this life, its delete included, kept for good; 0 if absent.
    pub hlc: Hlc,
    pub versions: Versions,
}

/// Whose write it was, seen from the receiving node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Local,
    Remote,
}

/// What is to be done with the stored row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing at all is written.
    Keep,
    /// The content stays, `hlc` and `versions` are written (to the row, or to the tombstone).
    Restamp,
    /// A row is born where there was none (a tombstone goes).
    Insert,
    /// The living row gives way whole to the change's.
    Replace,
    /// These cells take the change's values.
    Update(Vec<CellId>),
    /// The tombstone's image comes back with these cells from the change.
    Revive(Vec<CellId>),
    /// The tombstone's image takes these cells from the change and stays dead.
    UpdateTombstone(Vec<CellId>),
    /// The living row goes, a tombstone with its image stays.
    Delete,
    /// An update or delete of a key that is not there and not remembered: nothing is written but the record.
    Missing,
}

/// One losing write, met in this pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    pub conflict: ConflictType,
    pub loser: Side,
    /// The version that lost and the one that won.
    pub losing: Hlc,
    pub winning: Hlc,
    /// The cells lost; empty: the existence of the row (a delete lost, or a row lost whole).
    pub cells: Vec<CellId>,
}

/// The outcome of one change on one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub effect: Effect,
    /// Of the stored row or tombstone afterwards (untouched for `Keep` and `Missing`). Versions of a row
    /// that shows are trimmed, those of a tombstone are not.
    pub hlc: Hlc,
    pub versions: Versions,
    pub losses: Vec<Loss>,
    /// Unseen writes of both sides met in what this change compares (the changed cells of an update, the
    /// whole row else) and were united without loss.
    pub merged: bool,
}

/// Judges `change` (cell ids already translated to the receiver's) against what the receiver holds.
/// `same_value(cell)` tells whether the change's new value of a cell equals the stored one; it is asked
/// only about cells in conflict.
///
/// A change that comes again right after it was judged is kept out and brings no new loss. One whose
/// version is stable was joined and acknowledged before: it is kept out too.
pub fn judge(
    row: &RowState,
    change: &Change<'_>,
    stable: &Stable,
    same_value: &mut dyn FnMut(CellId) -> bool,
) -> Verdict {
    let mut pair = Pair { row, change, stable, same_value, losses: Vec::new(), met: false };
    let (effect, hlc, versions) = pair.join();
    let shows = matches!(
        (&effect, row.existence),
        (Effect::Insert | Effect::Replace | Effect::Revive(_) | Effect::Update(_), _)
            | (Effect::Restamp, Existence::Live)
    );
    let mut verdict = Verdict {
        merged: pair.met && pair.losses.is_empty() && !matches!(effect, Effect::Missing),
        effect,
        hlc,
        versions,
        losses: pair.losses,
    };
    if shows {
        verdict.versions.trim(stable);
    }
    verdict
}

/// What a write was: it decides, with what the other was, the type of their conflict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    Insert,
    Update,
    Delete,
}

/// The type of a conflict, from the kinds of the winning and the losing write.
fn conflict_type(winner: Write, loser: Write) -> ConflictType {
    match (winner, loser) {
        (Write::Insert, Write::Insert) => ConflictType::InsertExists,
        (_, Write::Delete) => ConflictType::UpdateDeleted,
        (Write::Delete, _) => ConflictType::DeleteOriginDiffers,
        (Write::Insert | Write::Update, _) => ConflictType::UpdateOriginDiffers,
    }
}

/// The kind of write that a cell's version stands for: that of the birth, or a later one.
fn kind(version: Hlc, birth: Hlc) -> Write {
    if version == birth { Write::Insert } else { Write::Update }
}

type Outcome = (Effect, Hlc, Versions);

struct Pair<'a> {
    row: &'a RowState,
    change: &'a Change<'a>,
    stable: &'a Stable,
    same_value: &'a mut dyn FnMut(CellId) -> bool,
    losses: Vec<Loss>,
    /// The sender had not seen something of what it wrote over.
    met: bool,
}

impl Pair<'_> {
    fn join(&mut self) -> Outcome {
        let (row, change) = (self.row, self.change);
        if self.stable.covers(change.version) {
            return self.keep();
        }
        let same_life = self.stable.same(change.life, row.versions.birth);
        match (change.op, row.existence) {
            (Op::Insert, Existence::Absent) => self.be_born(Effect::Insert),
            (Op::Insert, _) if same_life => self.keep(), // A life is born once: this is the same insert again.
            (Op::Insert, existence) if change.life > row.versions.birth => match existence {
                Existence::Live => self.replace(),
                _ => self.be_born(Effect::Insert),
            },
            (Op::Update | Op::Delete, Existence::Absent) => self.missing(),
            (Op::Update, _) if same_life => self.update(),
            (Op::Delete, _) if same_life => self.delete(),
            (Op::Update | Op::Delete, _) if change.life > row.versions.birth => self.missing(),
            (_, _) => self.older_life(),
        }
    }

    fn keep(&self) -> Outcome {
        (Effect::Keep, self.row.hlc, self.row.versions.clone())
    }

    /// An update or delete of a life that is not known here.
    fn missing(&mut self) -> Outcome {
        if self.change.op == Op::Delete {
            self.lose(ConflictType::DeleteMissing, Side::Remote, self.change.version, Hlc(0), None);
        }
        for cell in &self.change.cells {
            self.lose(ConflictType::UpdateMissing, Side::Remote, cell.version, Hlc(0), Some(cell.cell));
        }
        (Effect::Missing, self.row.hlc, self.row.versions.clone())
    }

    /// The change's life is the newer one, or the only one: it stands as it was written.
    fn be_born(&self, effect: Effect) -> Outcome {
        let mut versions = Versions { birth: self.change.life, ..Versions::default() };
        for cell in self.change.cells.iter().filter(|c| c.version != self.change.life) {
            versions.set(cell.cell, cell.version);
        }
        (effect, self.change.version, versions)
    }

    /// A newer life against a living row: whatever the sender had not seen of the older is lost.
    fn replace(&mut self) -> Outcome {
        let held = &self.row.versions;
        let written = self.change.cells.iter().map(|c| c.cell);
        let unwritten = held.cells.iter().map(|c| c.0);
        let unwritten = unwritten.filter(|id| !self.change.cells.iter().any(|c| c.cell == *id));
        for id in written.chain(unwritten).collect::<Vec<_>>() {
            let mine = held.cell(id);
            let seen = mine.is_zero() || self.stable.same(mine, self.change.base.cell(id));
            self.met |= !seen;
            let same = !seen && self.change_has(id) && (self.same_value)(id);
            if !seen && !same {
                let conflict = conflict_type(Write::Insert, kind(mine, held.birth));
                self.lose(conflict, Side::Local, mine, self.change.life, Some(id));
            }
        }
        self.be_born(Effect::Replace)
    }

    /// A change of a life that has given way to a newer one loses whole. Its node can't have seen the newer.
    fn older_life(&mut self) -> Outcome {
        self.met = true;
        let birth = self.row.versions.birth;
        for cell in &self.change.cells {
            if !(self.same_value)(cell.cell) {
                let loser = match self.change.op {
                    Op::Insert => kind(cell.version, self.change.life),
                    _ => Write::Update,
                };
                let conflict = conflict_type(Write::Insert, loser);
                self.lose(conflict, Side::Remote, cell.version, birth, Some(cell.cell));
            }
        }
        self.keep()
    }

    fn delete(&mut self) -> Outcome {
        let (row, dead) = (self.row, self.change.version);
        let held = &row.versions;
        if held.dead >= dead {
            self.met = held.dead > dead;
            return self.keep();
        }
        let mut versions = held.clone();
        versions.dead = dead;
        let hlc = row.hlc.max(dead);
        if row.existence == Existence::Tombstone {
            self.met = !self.stable.same(held.dead, self.change.base.dead);
            return (Effect::Restamp, hlc, versions);
        }
        if row.hlc > dead {
            self.lose(ConflictType::UpdateDeleted, Side::Remote, dead, row.hlc, None);
            return (Effect::Restamp, hlc, versions);
        }
        for &(id, mine) in &held.cells {
            if !mine.is_zero() && !self.stable.same(mine, self.change.base.cell(id)) {
                let conflict = conflict_type(Write::Delete, kind(mine, held.birth));
                self.lose(conflict, Side::Local, mine, dead, Some(id));
            }
        }
        (Effect::Delete, hlc, versions)
    }

    fn update(&mut self) -> Outcome {
        let (row, change) = (self.row, self.change);
        let held = &row.versions;
        let was_live = row.existence == Existence::Live;
        let shows = was_live || change.version > held.dead;
        if !was_live && shows && !self.stable.same(held.dead, change.base.dead) {
            self.lose(ConflictType::UpdateDeleted, Side::Local, held.dead, change.version, None);
        }
        let mut versions = held.clone();
        let (mut taken, mut all_same) = (Vec::new(), true);
        for cell in &change.cells {
            let (id, mine) = (cell.cell, held.cell(cell.cell));
            let order = cell.version.cmp(&mine);
            if order == Ordering::Greater {
                versions.set(id, cell.version);
                taken.push(id);
            }
            if order == Ordering::Equal {
                continue; // It came before.
            }
            let seen = mine.is_zero() || self.stable.same(mine, change.base.cell(id));
            // What a delete ends has no content to agree with: it is lost, whatever the tombstone shows.
            let same = shows && !seen && (self.same_value)(id);
            self.met |= !seen;
            all_same &= same || order == Ordering::Less;
            if same {
                continue;
            }
            if !shows {
                // The tombstone stands: whatever the cells say, the update is lost to the delete.
                self.lose(ConflictType::DeleteOriginDiffers, Side::Remote, cell.version, held.dead, Some(id));
            } else if !seen && order == Ordering::Greater {
                let conflict = conflict_type(Write::Update, kind(mine, held.birth));
                self.lose(conflict, Side::Local, mine, cell.version, Some(id));
            } else if !seen {
                let conflict = conflict_type(kind(mine, held.birth), Write::Update);
                self.lose(conflict, Side::Remote, cell.version, mine, Some(id));
            }
        }
        let effect = match (was_live, shows) {
            (false, true) => Effect::Revive(taken),
            _ if taken.is_empty() => return self.keep(),
            (false, false) => Effect::UpdateTombstone(taken),
            (true, _) if all_same => Effect::Restamp,
            (true, _) => Effect::Update(taken),
        };
        (effect, row.hlc.max(change.version), versions)
    }

    fn change_has(&self, id: CellId) -> bool {
        self.change.cells.iter().any(|c| c.cell == id)
    }

    /// One loss for each losing write: cells of one version go together.
    fn lose(&mut self, conflict: ConflictType, loser: Side, losing: Hlc, winning: Hlc, cell: Option<CellId>) {
        let known = self.losses.iter_mut().find(|l| l.losing == losing && l.conflict == conflict);
        match known {
            Some(loss) => {
                loss.winning = loss.winning.max(winning);
                loss.cells.extend(cell);
            }
            None => self.losses.push(Loss { conflict, loser, losing, winning, cells: cell.into_iter().collect() }),
        }
    }
}
