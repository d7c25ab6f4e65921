//! Counters: numeric cells whose updates are deltas, all of which count (policy `counter`).
//!
//! A plain write of the cell (an insert, an explicit reset, NULL or a value that is no number) *sets* it: the
//! later set is the base of what follows and takes the place of the earlier with all that was added to it. An
//! update of a number by another is a *delta*. Per node the deltas since the base are summed up; the join of
//! two sums of one node is the later one, so it is idempotent; the value is the base's plus every node's sum.
//! What had been added unseen to a base that lost is on record, and so is a delta that comes after.
//!
//! A cell that nobody has added to keeps nothing: its base is its version and its value. The first delta makes
//! a [`Counter`] of it, kept in `_cells` for good (the base's version is forgotten when it is stable, the
//! sums never are), until the next set or the end of the life.
//!
//! # What the edge does
//!
//! The model never adds: it moves sums, as decimal text, and the edge has Postgres add them (`numeric`).
//!
//! - **Setting the policy**: only on a column that is a cell of its own, of an exact numeric type (smallint,
//!   integer, bigint, numeric, not a float: a sum must not depend on the order of its parts).
//! - **Stamping an update** of such a column: if old and new value are finite numbers, `delta = new - old`, and
//!   instead of [`Versions::set`] it calls [`Versions::add`] with the old value and
//!   `sum + delta`, `sum` being [`Versions::sum`] (nothing: the delta itself). Else, and under the setting by
//!   which a user resets a counter: `set`.
//! - **Capturing it**: [`Versions::delta`] of the stamped versions goes into the cell's change, beside the new
//!   and the old value; the base lists the counter that was replaced ([`Versions::list`]).
//! - **Applying**: where the verdict takes a cell (insert, replace, update, revive, tombstone) and its versions
//!   hold a [`Counter`] of it, the value to be stored is [`Counter::value`], not the change's. It may be one
//!   that its column can't hold or a CHECK forbids, though neither of the values added together was: an error
//!   that names table, key and column, as for any row that can't be applied.
//! - **Translating** between the two nodes' cell numbers: [`Versions::translated`].
use crate::hlc::{Hlc, NodeId};
use crate::versions::{CellId, Versions};
use crate::wire::DecodeError;
use serde::{Deserialize, Serialize};

/// Bytes of a number: Postgres's `numeric` has at most 131,072 digits before the point and 16,383 after it.
pub const MAX_NUMBER: usize = 131_072 + 16_383 + 2;
/// Sums of one counter: two nodes, each with an epoch for every time that it lost history.
const MAX_TALLIES: usize = 1_000;

/// The state of a cell since it was last set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    pub cell: CellId,
    /// Version of the write that set it; 0 if forgotten.
    pub base: Hlc,
    /// The number that it was set to.
    pub value: String,
    /// What each node has added since: by node and epoch, never empty.
    #[serde(deserialize_with = "crate::bounded::list")]
    pub tallies: Vec<Tally>,
}

/// What one node has added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Changes only when the node has lost history: what it had added before stays.
    pub epoch: u32,
    /// Version of its last delta.
    pub last: Hlc,
    /// The sum of its deltas.
    pub sum: String,
}

/// What the write of a cell says if it added to the cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta<'a> {
    /// Version of the base that was added to, as the sender lists it.
    pub base: Hlc,
    /// The number that the base set.
    pub value: &'a str,
    /// The same transaction set the base.
    pub sets: bool,
    pub epoch: u32,
    /// All that the sender has added to this base.
    pub sum: &'a str,
}

impl Tally {
    fn source(&self) -> (NodeId, u32) {
        (self.last.node(), self.epoch)
    }
}

impl Counter {
    /// The version of a node's last delta; 0: none.
    pub fn last(&self, node: NodeId, epoch: u32) -> Hlc {
        self.at(node, epoch).map_or(Hlc(0), |i| self.tallies[i].last)
    }
    fn at(&self, node: NodeId, epoch: u32) -> Result<usize, usize> {
        self.tallies.binary_search_by_key(&(node, epoch), Tally::source)
    }
    /// Takes the later of two sums of one node.
    fn join(&mut self, tally: Tally) {
        match self.at(tally.last.node(), tally.epoch) {
            Ok(at) if self.tallies[at].last < tally.last => self.tallies[at] = tally,
            Ok(_) => {}
            Err(at) => self.tallies.insert(at, tally),
        }
    }
    /// The number that the cell holds.
    pub fn value<E>(&self, mut add: impl FnMut(&str, &str) -> Result<String, E>) -> Result<String, E> {
        self.tallies.iter().try_fold(self.value.clone(), |sum, tally| add(&sum, &tally.sum))
    }
    /// What a decoded one must be.
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        let numbers = self.tallies.iter().all(|t| is_number(&t.sum) && t.last.node() != NodeId(0));
        let ordered = self.tallies.is_sorted_by(|a, b| a.source() < b.source());
        let some = (1..=MAX_TALLIES).contains(&self.tallies.len());
        if some && ordered && numbers && is_number(&self.value) {
            return Ok(());
        }
        Err(DecodeError { what: "counter", why: "sums out of order, or no numbers".into() })
    }
}

impl Delta<'_> {
    /// Checks what a peer could get wrong of a delta under `version`, in a row of this life.
    pub(crate) fn check(&self, version: Hlc, life: Hlc, insert: bool) -> Result<(), DecodeError> {
        let wrong = |why: &str| Err(DecodeError { what: "counter", why: why.into() });
        if !is_number(self.value) || !is_number(self.sum) {
            return wrong("no number");
        }
        if self.base >= version {
            return wrong("a base newer than what is added to it");
        }
        if insert && !self.sets {
            return wrong("an insert that adds to what was before it");
        }
        if self.sets && (self.base.node() != version.node() || self.base < life) {
            return wrong("a base is not the sending node's");
        }
        Ok(())
    }
}

/// A number as text: digits, perhaps with a sign before and a point between.
fn is_number(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, "0"));
    text.len() <= MAX_NUMBER && digits(whole) && digits(fraction)
}

impl Versions {
    /// The counter of a cell, if something was added to it.
    pub fn counter(&self, cell: CellId) -> Option<&Counter> {
        self.counters.binary_search_by_key(&cell, |c| c.cell).ok().map(|at| &self.counters[at])
    }
    /// The version of the write that set a cell, whatever was added since.
    pub fn base_of(&self, cell: CellId) -> Hlc {
        self.counter(cell).map_or_else(|| self.cell(cell), |counter| counter.base)
    }
    /// What a node has added to a cell.
    pub fn sum(&self, cell: CellId, node: NodeId, epoch: u32) -> Option<&str> {
        let counter = self.counter(cell)?;
        counter.at(node, epoch).ok().map(|at| counter.tallies[at].sum.as_str())
    }
    /// Adds to a cell: `sum` is all that the node of `version` has added to it in this epoch, `old` the
    /// number that it held before.
    pub fn add(&mut self, cell: CellId, version: Hlc, epoch: u32, old: &str, sum: String) {
        let delta = Delta { base: self.base_of(cell), value: old, sets: false, epoch, sum: &sum };
        self.take_delta(cell, version, &delta);
    }
    /// Joins a delta into the cell: into its counter if that has the delta's base, else in its place.
    pub(crate) fn join_delta(&mut self, cell: CellId, version: Hlc, delta: &Delta<'_>, same_base: bool) {
        if !same_base {
            self.set(cell, version);
        }
        self.take_delta(cell, version, delta);
    }
    fn take_delta(&mut self, cell: CellId, version: Hlc, delta: &Delta<'_>) {
        let tally = Tally { epoch: delta.epoch, last: version, sum: delta.sum.to_string() };
        match self.counters.binary_search_by_key(&cell, |c| c.cell) {
            Ok(at) => self.counters[at].join(tally),
            Err(at) => {
                let (base, value) = (delta.base, delta.value.to_string());
                self.counters.insert(at, Counter { cell, base, value, tallies: vec![tally] });
            }
        }
        self.set_entry(cell, version.max(self.cell(cell)));
    }
    /// What the change of a cell says if `version`, of this node, added to it.
    pub fn delta(&self, cell: CellId, version: Hlc) -> Option<Delta<'_>> {
        let counter = self.counter(cell)?;
        let tally = counter.tallies.iter().find(|t| t.last == version)?;
        let (base, value) = (counter.base, counter.value.as_str());
        Some(Delta { base, value, sets: false, epoch: tally.epoch, sum: &tally.sum })
    }
    /// Lists a cell as another list has it: its version and its counter.
    pub fn list(&mut self, cell: CellId, from: &Versions) {
        self.set(cell, from.cell(cell));
        if let Some(counter) = from.counter(cell)
            && let Err(at) = self.counters.binary_search_by_key(&cell, |c| c.cell)
        {
            self.counters.insert(at, counter.clone());
        }
    }
    /// The same list with other cell numbers; a cell without one is left out.
    pub fn translated(&self, number: impl Fn(CellId) -> Option<CellId>) -> Versions {
        let mut cells: Vec<_> = self.cells.iter().filter_map(|&(id, v)| Some((number(id)?, v))).collect();
        let mut ended: Vec<_> = self.ended.iter().filter_map(|&id| number(id)).collect();
        let counters = self.counters.iter().filter_map(|c| Some(Counter { cell: number(c.cell)?, ..c.clone() }));
        let mut counters: Vec<_> = counters.collect();
        cells.sort_unstable_by_key(|c| c.0);
        ended.sort_unstable();
        counters.sort_unstable_by_key(|c| c.cell);
        Versions { birth: self.birth, dead: self.dead, cells, ended, counters }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(counter: u64, node: u64) -> Hlc {
        Hlc(counter * 64 + node)
    }
    fn plus(a: &str, b: &str) -> Result<String, std::num::ParseIntError> {
        Ok((a.parse::<i64>()? + b.parse::<i64>()?).to_string())
    }

    #[test]
    fn all_deltas_count_once() {
        let mut row = Versions { birth: v(1, 1), ..Versions::default() };
        row.add(3, v(2, 1), 0, "10", "-3".into());
        let theirs = Delta { base: v(1, 1), value: "10", sets: false, epoch: 0, sum: "-4" };
        for _ in 0..2 {
            row.join_delta(3, v(3, 2), &theirs, true);
        }
        assert_eq!(row.counter(3).map(|c| c.value(plus)), Some(Ok("3".into())));
        assert_eq!((row.cell(3), row.base_of(3), row.sum(3, NodeId(2), 0)), (v(3, 2), v(1, 1), Some("-4")));
        assert_eq!(row.delta(3, v(2, 1)), Some(Delta { base: v(1, 1), value: "10", sets: false, epoch: 0, sum: "-3" }));
        assert_eq!(row.delta(3, v(4, 1)), None);
        // An epoch of its own adds to what was before.
        row.add(3, v(4, 1), 1, "3", "5".into());
        assert_eq!(row.counter(3).map(|c| c.value(plus)), Some(Ok("8".into())));
        row.set(3, v(5, 1));
        assert_eq!((row.counter(3), row.base_of(3)), (None, v(5, 1)));
    }

    #[test]
    fn a_number_is_a_number() {
        for text in ["0", "-1", "12.50", "-0.001"] {
            assert!(is_number(text), "{text}");
        }
        for text in ["", "-", ".", "1.", ".5", "+1", "1e5", "NaN", "Infinity", " 1", "1.2.3", "--1"] {
            assert!(!is_number(text), "{text}");
        }
        assert!(!is_number(&"1".repeat(MAX_NUMBER + 1)));
    }
}
