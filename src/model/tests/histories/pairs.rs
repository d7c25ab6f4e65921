//! Every pair of single unseen changes of one key: both nodes end with the same row, and each finds by
//! itself, whichever change came to it, the same records: ids, types, cells, winners.
use crate::node::{Node, Rule};
use crate::world::World;
use tandem_model::change::Op;
use tandem_model::hlc::NodeId;
use tandem_model::policy::{Policies, Policy};
use tandem_model::record::ConflictType::{self, *};

const REPLACE: [Op; 2] = [Op::Delete, Op::Insert];

/// What the key held on both nodes before.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    Row,
    /// Updated since, on the second node; all of it forgotten or none.
    UpdatedRow,
    Tombstone,
}

fn transaction(w: &mut World, node: &mut Node, ops: &[Op]) {
    let tx = node.begin();
    ops.iter().for_each(|op| node.write(w, tx, 0, *op));
    while !node.commit_step(w, tx) {}
    w.wall += 1;
}
fn exchange(w: &mut World, a: &mut Node, b: &mut Node) {
    a.begin_reply();
    b.begin_reply();
    let (to_b, to_a) = (a.finish_reply(), b.finish_reply());
    a.inbox.extend(to_a);
    b.inbox.extend(to_b);
    for node in [a, b] {
        while node.apply_next(w).expect("it applies") {}
    }
}

/// The conflicts of two unseen transactions, the first one earlier: (type, lost by the first).
fn conflicts(policies: &Policies, seed: u64, before: Before, first: &[Op], second: &[Op]) -> Vec<(ConflictType, bool)> {
    let mut w = World::new(seed);
    let (mut a, mut b) = (Node::new(1, 2, Rule::Sound, policies), Node::new(2, 1, Rule::Sound, policies));
    if before != Before::Nothing {
        transaction(&mut w, &mut a, &[Op::Insert]);
        exchange(&mut w, &mut a, &mut b);
    }
    match before {
        Before::UpdatedRow => transaction(&mut w, &mut b, &[Op::Update]),
        Before::Tombstone => transaction(&mut w, &mut a, &[Op::Delete]),
        _ => {}
    }
    for _ in 0..seed % 4 {
        // None, some or all of it acknowledged.
        exchange(&mut w, &mut a, &mut b);
        [&mut a, &mut b].into_iter().for_each(|n| n.tidy(0));
    }
    exchange(&mut w, &mut a, &mut b);
    let (early, late) = if seed % 8 < 4 { (&mut a, &mut b) } else { (&mut b, &mut a) };
    transaction(&mut w, early, first);
    transaction(&mut w, late, second);
    exchange(&mut w, &mut a, &mut b);
    let text = format!("seed {seed}, {before:?}, {first:?} and {second:?}");
    assert_eq!(w.same_rows([&a, &b]), Ok(()), "{text}");
    assert_eq!(w.one_life(&a), Ok(()), "{text}");
    assert_eq!(w.same_records([&a, &b]), Ok(()), "{text}");
    assert_eq!(w.no_silent_loss(&a), Ok(()), "{text}");
    assert_eq!(w.policies_hold(&a), Ok(()), "{text}");
    let early = if seed % 8 < 4 { a.id } else { b.id };
    a.records.values().map(|r| (r.conflict_type, r.losing.node() == early)).collect()
}

#[test]
fn both_nodes_find_the_same_conflicts() {
    use Before::*;
    use Op::*;
    // Before, the earlier transaction, the later; the conflicts that may come of it, and whether one
    // always does. Updates may be of different cells and contents may be equal: then there is none.
    type Expected<'a> = &'a [(ConflictType, bool)];
    let on_rows: &[(&[Op], &[Op], Expected)] = &[
        (&[Update], &[Update], &[(UpdateOriginDiffers, true)]),
        (&[Update], &[Delete], &[(DeleteOriginDiffers, true)]),
        (&[Delete], &[Update], &[(UpdateDeleted, true)]),
        (&[Delete], &[Delete], &[]),
        (&[Update], &REPLACE, &[(UpdateOriginDiffers, true)]),
        (&REPLACE, &[Update], &[(UpdateOriginDiffers, false)]),
        // The delete named the older life, which is gone.
        (&[Delete], &REPLACE, &[]),
        (&REPLACE, &[Delete], &[]),
        (&REPLACE, &REPLACE, &[(InsertExists, true)]),
        (&[Update, Update], &[Update, Delete], &[(DeleteOriginDiffers, true)]),
        (&[Update, Delete], &[Update, Update], &[(UpdateDeleted, true)]),
        (&[Delete, Insert, Update], &[Update, Update], &[(UpdateOriginDiffers, false)]),
        (&[Delete, Insert, Delete], &[Update], &[(UpdateDeleted, true)]),
        (&[Update], &[Delete, Insert, Delete], &[(DeleteOriginDiffers, true)]),
    ];
    let on_nothing: &[(&[Op], &[Op], Expected)] = &[
        (&[Insert], &[Insert], &[(InsertExists, true)]),
        (&[Insert], &[Insert, Update], &[(InsertExists, true)]),
        // A cell that was updated since its insert is an update that lost.
        (&[Insert, Update], &[Insert], &[(InsertExists, true), (UpdateOriginDiffers, true)]),
        (&[Insert, Delete], &[Insert], &[]),
        (&[Insert], &[Insert, Delete], &[]),
    ];
    for (befores, cases) in [(&[Row, UpdatedRow], on_rows), (&[Nothing, Tombstone], on_nothing)] {
        for (before, (first, second, expected)) in befores.iter().flat_map(|b| cases.iter().map(move |c| (*b, *c))) {
            let mut met = 0;
            for seed in 0..200 {
                let found = conflicts(&Policies::default(), seed, before, first, second);
                assert!(
                    found.iter().all(|c| expected.contains(c)),
                    "seed {seed}, {before:?}: {first:?}, {second:?}: {found:?}"
                );
                met += usize::from(!found.is_empty());
            }
            let enough = if expected.is_empty() { met == 0 } else { met > 80 };
            assert!(enough, "{before:?}: {first:?}, {second:?}: {met} of 200");
        }
    }
}

#[test]
fn a_policy_decides_who_loses() {
    use Op::*;
    // Under the policy an update and a delete, the earlier first; the conflict, and whether the first lost.
    let cases = [
        (Policy::DeleteWins, [Update, Delete], (DeleteOriginDiffers, true)),
        (Policy::DeleteWins, [Delete, Update], (DeleteOriginDiffers, false)),
        (Policy::UpdateWins, [Update, Delete], (UpdateDeleted, false)),
        (Policy::UpdateWins, [Delete, Update], (UpdateDeleted, true)),
    ];
    for (existence, [first, second], expected) in cases {
        let policies = Policies { existence, ..Policies::default() };
        for seed in 0..200 {
            let found = conflicts(&policies, seed, Before::Row, &[first], &[second]);
            assert_eq!(found, [expected], "seed {seed}, {}: {first:?}, {second:?}", policies.existence);
        }
    }
    // The first transaction is of node 1 in half of the seeds.
    let policy = Policy::NodePriority(NodeId(1));
    let policies = Policies { existence: policy.clone(), others: policy, ..Policies::default() };
    let cases: [(Before, &[Op], &[Op]); 5] = [
        (Before::Row, &[Update], &[Update]),
        (Before::Row, &[Update], &[Delete]),
        (Before::Row, &[Delete], &[Update]),
        (Before::Row, &REPLACE, &REPLACE),
        (Before::Nothing, &[Insert], &[Insert]),
    ];
    for (before, first, second) in cases {
        for seed in 0..200 {
            let found = conflicts(&policies, seed, before, first, second);
            let by_first = seed % 8 >= 4;
            assert!(found.iter().all(|c| c.1 == by_first), "seed {seed}: {first:?}, {second:?}: {found:?}");
        }
    }
}
