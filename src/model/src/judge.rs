//! The only place that judges a pair of writes: the join of a change into a row, and what is lost by it.
//!
//! The join (DESIGN 4), where the later version wins throughout: the greater birth wins whole; within a life
//! each cell takes the greater version and `dead` takes the greater; a row shows while its `hlc` is above
//! `dead`. What the sender had not seen is what its bases don't name (DESIGN 3). Other policies change who
//! wins, as `life` (of two lives), `row` (whether it exists) and `cell` say, each of their own subject.
//!
//! Rules of the record:
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
//! - A delete that loses to an update is the only loss of that pair: other unseen updates live on.
mod cell;
mod life;
mod row;

use crate::change::{Change, Op};
use crate::hlc::Hlc;
use crate::policy::Policies;
use crate::record::ConflictType;
use crate::stable::Stable;
use crate::versions::{CellId, Versions};

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
    /// `_hlc`: greatest version of this life, its delete and what lost included, kept for good; 0 if absent.
    /// (Under `node_priority` also of a life that the peer's took the place of: it never falls.)
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

/// Judges `change` (cell ids already translated to the receiver's) against what the receiver holds, by the
/// policies that hold for this pair: the same on both nodes.
/// `same_value(cell)` tells whether the change's new value of a cell equals the stored one; it is asked
/// only about cells in conflict.
///
/// A change that comes again right after it was judged is kept out and brings no new loss. One whose
/// version is stable was joined and acknowledged before: it is kept out too.
pub fn judge(
    row: &RowState,
    change: &Change<'_>,
    stable: &Stable,
    policies: &Policies,
    same_value: &mut dyn FnMut(CellId) -> bool,
) -> Verdict {
    let mut pair = Pair { row, change, stable, policies, same_value, losses: Vec::new(), met: false };
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
    policies: &'a Policies,
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
            (Op::Insert, existence) if self.life_wins() => match existence {
                Existence::Live => self.replace(),
                _ => self.be_born(Effect::Insert),
            },
            (Op::Update | Op::Delete, Existence::Absent) => self.missing(),
            (Op::Update, _) if same_life => self.update(),
            (Op::Delete, _) if same_life => self.delete(),
            (Op::Update | Op::Delete, _) if self.life_is_unknown() => self.missing(),
            (_, _) => self.lost_life(),
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

    /// These versions are stored; the content stays.
    fn restamp(&self, hlc: Hlc, versions: Versions) -> Outcome {
        let unchanged = hlc == self.row.hlc && versions == self.row.versions;
        (if unchanged { Effect::Keep } else { Effect::Restamp }, hlc, versions)
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
