//! The net effect of a transaction on each key: what it sends is one change per key.
//!
//! The peer sees a transaction whole or not at all, so what began and ended within it never was. A net
//! change replaces what the node listed *before* the transaction, and what the node stores afterwards
//! must be what the peer computes from the net change. With capture storing rows and tombstones:
//!
//! | before | statements | net change | what the node must hold afterwards |
//! |---|---|---|---|
//! | nothing | I … D | none | nothing: no tombstone |
//! | tombstone | I … D | none | the tombstone as it was, image and versions |
//! | nothing, tombstone | I U* | insert | the row; birth: the (last) insert, later cells their own entries |
//! | row | U+ | update | the row; each changed cell its last version |
//! | row | U* D | delete | a tombstone of the life and image *before the transaction*: versions as they were before it, without its own updates; dead = the delete |
//! | row | U* D … I U* | insert (replace) | the row; nothing of the older life, `dead` = 0 |
//! | row | U* D (I … D)+ | delete | as for `U* D`, dead = the last delete |
//!
//! A counter's update after a set within the transaction tells its base with it; sums run on, so of several
//! deltas the last says all.
//!
//! In each tombstone `hlc` = `dead`. The image matters because an unseen update of the peer may revive
//! the row from it: the peer revives the image that it knows, and that has nothing of this transaction.
use crate::change::{Change, Op};
use crate::counter::Delta;
use crate::descriptor::DescriptorId;
use crate::versions::Versions;
use serde_bytes::Bytes;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// Key values, as [`Change::key`] holds them.
type Key<'a> = Vec<Option<&'a Bytes>>;

/// The net changes of one transaction, by version. Changes of one key count in the order of their
/// versions, whatever order they come in. Keys are told apart by descriptor and bytes: a key written
/// under two descriptors (DDL in between) stays two changes, each with the base that holds before it.
pub fn net(mut changes: Vec<Change<'_>>) -> Vec<Change<'_>> {
    if repeats_a_key(&changes) {
        changes.sort_by(|a, b| (a.descriptor, &a.key, a.version).cmp(&(b.descriptor, &b.key, b.version)));
        let (mut folded, mut hops) = (Vec::new(), Vec::new());
        let mut rest = changes.into_iter().peekable();
        while let Some(first) = rest.next() {
            let mut key = KeyEffect::new(first, &mut hops);
            while let Some(next) = rest.next_if(|next| key.is_of(next)) {
                key.then(next);
            }
            folded.extend(key.effect);
        }
        relink(&mut folded, &hops);
        changes = folded;
    }
    if !changes.is_sorted_by_key(|c| c.version) {
        changes.sort_by_key(|c| c.version);
    }
    changes
}

/// False if each key is written once, as nearly always; by hashes, so it may be true without need.
fn repeats_a_key(changes: &[Change<'_>]) -> bool {
    let (state, mut met) = (RandomState::new(), HashSet::with_capacity(changes.len()));
    changes.iter().any(|c| !met.insert(state.hash_one((c.descriptor, &c.key))))
}

/// A key that a row moved through within the transaction: it came from one key and went to another.
struct Hop<'a> {
    descriptor: DescriptorId,
    through: Key<'a>,
    from: Option<Key<'a>>,
    to: Option<Key<'a>>,
}

/// The fold over the changes of one key.
struct KeyEffect<'a, 'h> {
    descriptor: DescriptorId,
    key: Key<'a>,
    /// The net change so far; `None`: as before the transaction.
    effect: Option<Change<'a>>,
    /// All that was listed before the transaction, if a change told it.
    listed: Versions,
    /// The delete of the life that the transaction met, once it has ended.
    ended: Option<Change<'a>>,
    hops: &'h mut Vec<Hop<'a>>,
}

impl<'a, 'h> KeyEffect<'a, 'h> {
    fn new(first: Change<'a>, hops: &'h mut Vec<Hop<'a>>) -> Self {
        KeyEffect {
            descriptor: first.descriptor,
            key: first.key.clone(),
            listed: first.base.clone(),
            ended: (first.op == Op::Delete).then(|| first.clone()),
            effect: Some(first),
            hops,
        }
    }

    fn is_of(&self, change: &Change<'a>) -> bool {
        self.descriptor == change.descriptor && self.key == change.key
    }

    fn then(&mut self, mut next: Change<'a>) {
        let before = self.effect.take();
        self.effect = match (before, next.op) {
            (Some(mut row), Op::Update) if row.op != Op::Delete => {
                merge(&mut row, next);
                Some(row)
            }
            (Some(row), Op::Delete) if row.op == Op::Insert => self.unborn(row, next),
            (Some(row), Op::Delete) if row.op == Op::Update => {
                for cell in &row.cells {
                    next.base.list(cell.cell, &row.base);
                }
                self.listed = next.base.clone();
                self.ended = Some(next.clone());
                Some(next)
            }
            (_, Op::Insert) => {
                next.base = self.listed.clone();
                Some(next)
            }
            // A row that is gone is neither updated nor deleted: not from capture.
            (_, Op::Update | Op::Delete) => Some(next),
        };
    }

    /// The life that the transaction began is over: what is left is the end of the life before, if any.
    fn unborn(&mut self, row: Change<'a>, end: Change<'a>) -> Option<Change<'a>> {
        self.hops.push(Hop { descriptor: self.descriptor, through: end.key, from: row.moved, to: end.moved });
        let mut ended = self.ended.clone()?;
        ended.version = end.version;
        Some(ended)
    }
}

/// An update after an insert or an update of the row: the last values, the first bases.
fn merge<'a>(row: &mut Change<'a>, update: Change<'a>) {
    row.version = row.version.max(update.version);
    for cell in update.cells {
        match row.cells.iter_mut().find(|c| c.cell == cell.cell) {
            Some(held) => {
                // Added to what this transaction set, now or in a step before.
                let sets = held.delta.is_none_or(|delta| delta.sets);
                held.delta = cell.delta.map(|delta| Delta { sets, ..delta });
                (held.version, held.new) = (cell.version, cell.new);
            }
            None => {
                if row.op == Op::Update {
                    row.base.list(cell.cell, &update.base);
                }
                row.cells.push(cell);
            }
        }
    }
    row.cells.sort_by_key(|c| c.cell);
}

/// Links the ends of a row's moves: a key in between never held it as far as the peer is concerned.
fn relink<'a>(changes: &mut [Change<'a>], hops: &[Hop<'a>]) {
    for change in changes.iter_mut() {
        let mut here = &change.key;
        // Every turn uses one hop, so there are no more turns than hops.
        for _ in hops {
            let Some(other) = &change.moved else { break };
            let forward = change.op == Op::Delete;
            let hop = hops.iter().find(|hop| {
                let near = if forward { &hop.from } else { &hop.to };
                hop.descriptor == change.descriptor && hop.through == *other && near.as_ref() == Some(here)
            });
            let Some(hop) = hop else { break };
            here = &hop.through;
            change.moved = if forward { hop.to.clone() } else { hop.from.clone() };
        }
        if change.moved.as_ref() == Some(&change.key) {
            change.moved = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::CellChange;
    use crate::hlc::Hlc;

    fn v(counter: u64) -> Hlc {
        Hlc(counter * 64 + 1)
    }
    fn value(text: &'static str) -> Vec<Option<&'static Bytes>> {
        vec![Some(Bytes::new(text.as_bytes()))]
    }
    /// Listed before: born at 1, cell 2 written at 2, all else by the birth.
    fn listed() -> Versions {
        Versions { birth: v(1), dead: Hlc(0), cells: vec![(2, v(2))], ..Versions::default() }
    }
    fn change(
        op: Op,
        key: &'static str,
        version: u64,
        life: u64,
        cells: &[(u16, &'static str)],
        base: Versions,
    ) -> Change<'static> {
        let cells = cells.iter().map(|&(cell, new)| CellChange {
            cell,
            version: v(version),
            new: value(new),
            old: if op == Op::Update { value("old") } else { vec![] },
            delta: None,
        });
        let cells = cells.collect();
        Change { descriptor: 1, op, key: value(key), version: v(version), life: v(life), base, cells, moved: None }
    }
    fn insert(version: u64, base: Versions) -> Change<'static> {
        change(Op::Insert, "k", version, version, &[(2, "i2"), (3, "i3")], base)
    }
    fn update(version: u64, life: u64, cell: u16, new: &'static str, base: Hlc) -> Change<'static> {
        let base = Versions { birth: v(life), dead: Hlc(0), cells: vec![(cell, base)], ..Versions::default() };
        change(Op::Update, "k", version, life, &[(cell, new)], base)
    }
    fn delete(version: u64, life: u64, base: Versions) -> Change<'static> {
        change(Op::Delete, "k", version, life, &[], base)
    }
    fn one(changes: Vec<Change<'static>>) -> Change<'static> {
        let mut all = net(changes);
        assert_eq!(all.len(), 1);
        all.remove(0)
    }
    fn cells(change: &Change<'static>) -> Vec<(u16, Hlc, &'static str)> {
        let text = |c: &CellChange<'static>| std::str::from_utf8(c.new[0].expect("set")).expect("text");
        change.cells.iter().map(|c| (c.cell, c.version, text(c))).collect()
    }

    #[test]
    fn updates_keep_the_first_base_and_the_last_value() {
        // Out of order, as triggers may fire.
        let second = update(6, 1, 2, "b", v(5));
        let net = one(vec![second, update(5, 1, 2, "a", v(2)), update(7, 1, 3, "c", v(1))]);
        assert_eq!(cells(&net), [(2, v(6), "b"), (3, v(7), "c")]);
        assert_eq!((net.op, net.version, net.life), (Op::Update, v(7), v(1)));
        assert_eq!(
            net.base,
            Versions { birth: v(1), dead: Hlc(0), cells: vec![(2, v(2)), (3, v(1))], ..Versions::default() }
        );
        assert_eq!(net.cells[0].old, value("old"));
    }

    #[test]
    fn an_insert_takes_in_its_updates() {
        let tombstone = Versions { birth: v(1), dead: v(2), cells: vec![], ..Versions::default() };
        let net = one(vec![insert(5, tombstone.clone()), update(6, 5, 3, "c", v(5))]);
        assert_eq!(cells(&net), [(2, v(5), "i2"), (3, v(6), "c")]);
        assert_eq!((net.op, net.version, net.life, net.base), (Op::Insert, v(6), v(5), tombstone));
        assert!(net.cells.iter().all(|c| c.old.is_empty()));
    }

    #[test]
    fn a_delete_names_what_was_before_the_transaction() {
        let mut seen = listed();
        seen.set(2, v(5));
        let net = one(vec![update(5, 1, 2, "a", v(2)), delete(6, 1, seen)]);
        assert_eq!((net.op, net.version, net.life, net.base), (Op::Delete, v(6), v(1), listed()));
    }

    #[test]
    fn delete_and_insert_is_a_replace() {
        let mut seen = listed();
        seen.set(3, v(5));
        let between = Versions { birth: v(1), dead: v(6), cells: vec![(2, v(2))], ..Versions::default() };
        let net =
            one(vec![update(5, 1, 3, "a", v(1)), delete(6, 1, seen), insert(7, between), update(8, 7, 2, "b", v(7))]);
        assert_eq!((net.op, net.version, net.life), (Op::Insert, v(8), v(7)));
        assert_eq!((2..5).map(|c| net.base.cell(c)).collect::<Vec<_>>(), [v(2), v(1), v(1)]);
        assert_eq!((net.base.birth, net.base.dead), (v(1), Hlc(0)));
    }

    #[test]
    fn what_began_and_ended_within_never_was() {
        assert_eq!(
            net(vec![insert(5, Versions::default()), delete(6, 5, Versions { birth: v(5), ..Versions::default() })]),
            []
        );
        // Over a living row the delete of that row is left, at the last delete's version.
        let born = Versions { birth: v(7), ..Versions::default() };
        let net = one(vec![delete(6, 1, listed()), insert(7, listed()), delete(8, 7, born)]);
        assert_eq!((net.op, net.version, net.life, net.base), (Op::Delete, v(8), v(1), listed()));
    }

    #[test]
    fn an_insert_after_all_that_lists_what_was_before() {
        let tombstone = Versions { birth: v(1), dead: v(2), cells: vec![], ..Versions::default() };
        let born = Versions { birth: v(5), ..Versions::default() };
        let net = one(vec![insert(5, tombstone.clone()), delete(6, 5, born.clone()), insert(7, born)]);
        assert_eq!((net.op, net.life, net.base), (Op::Insert, v(7), tombstone));
    }

    #[test]
    fn moves_are_linked_end_to_end() {
        let step = |from: &'static str, to: &'static str, at: u64, life: u64| {
            let mut away = change(Op::Delete, from, at, life, &[], listed());
            let mut here = change(Op::Insert, to, at + 1, at + 1, &[(2, "x")], Versions::default());
            (away.moved, here.moved) = (Some(value(to)), Some(value(from)));
            [away, here]
        };
        let links = |changes: Vec<Change<'static>>| -> Vec<_> {
            net(changes).into_iter().map(|c| (c.op, c.key, c.moved)).collect()
        };
        let far = [step("a", "b", 10, 1), step("b", "c", 12, 11), step("c", "d", 14, 13)].concat();
        assert_eq!(
            links(far.clone()),
            [(Op::Delete, value("a"), Some(value("d"))), (Op::Insert, value("d"), Some(value("a")))]
        );
        let back = [step("a", "b", 10, 1), step("b", "a", 12, 11)].concat();
        assert_eq!(links(back), [(Op::Insert, value("a"), None)]);
        let gone = [far, vec![change(Op::Delete, "d", 20, 15, &[], listed())]].concat();
        assert_eq!(links(gone), [(Op::Delete, value("a"), None)]);
        let shifted = [step("c", "d", 10, 1), step("b", "c", 12, 2), step("a", "b", 14, 3)].concat();
        assert_eq!(links(shifted)[0], (Op::Insert, value("d"), Some(value("c"))));
    }

    #[test]
    fn keys_of_their_own_stay_as_they_are() {
        let mut other = insert(4, Versions::default());
        other.descriptor = 2;
        let all = vec![insert(5, Versions::default()), other.clone()];
        assert_eq!(net(all.clone()), [other, all[0].clone()]);
    }
}
