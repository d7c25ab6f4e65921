//! Counters: every delta counts once on both nodes, or is on record, in whatever order it comes.
use crate::node::{CELLS, Node, Rule};
use crate::world::{World, number};
use crate::{budget, exchange, must_fail_by, must_hold, must_hold_in};
use rand::Rng;
use tandem_model::change::Op;
use tandem_model::hlc::NodeId;
use tandem_model::policy::{Policies, Policy};

fn one_counter(existence: Policy) -> Policies {
    Policies { existence, cells: [(CELLS[2], Policy::Counter)].into(), ..Policies::default() }
}

#[test]
fn counters_hold_in_every_history() {
    must_hold("counter", &one_counter(Policy::LastUpdateWins));
}

#[test]
fn counters_go_with_every_policy_of_existence() {
    let first = Policy::NodePriority(NodeId(1));
    for existence in [Policy::DeleteWins, Policy::UpdateWins, first.clone(), Policy::NodePriority(NodeId(2))] {
        let mut policies = one_counter(existence);
        must_hold_in(budget() / 4, &format!("{}, counter", policies.existence), &policies);
        policies.others = first.clone();
        policies.cells.insert(CELLS[0], Policy::Counter);
        must_hold_in(budget() / 4, &format!("{}, two counters, {first}", policies.existence), &policies);
    }
}

/// Both nodes add to a row that both have, in transactions of any length, whatever the exchange does.
fn only_deltas(seed: u64) {
    let mut w = World::new(seed);
    w.no_resets = true;
    let policies = one_counter(Policy::LastUpdateWins);
    let mut nodes = [Node::new(1, 2, Rule::Sound, &policies), Node::new(2, 1, Rule::Sound, &policies)];
    let tx = nodes[0].begin();
    nodes[0].write(&mut w, tx, 0, Op::Insert);
    while !nodes[0].commit_step(&mut w, tx) {}
    exchange(&mut w, &mut nodes).expect("it applies");
    for _ in 0..w.rng.random_range(5..60) {
        w.wall += w.rng.random_range(0..2);
        let who = w.rng.random_range(0..2);
        let [first, second] = &mut nodes;
        let (a, b) = if who == 0 { (first, second) } else { (second, first) };
        match (w.rng.random_range(0..6), a.open.is_empty()) {
            (0..2, true) => drop(a.begin()),
            (0..2, false) => a.write(&mut w, 0, 0, Op::Update),
            (2, false) if w.rng.random_bool(0.3) => a.abort(0),
            (2 | 3, false) => drop(a.commit_step(&mut w, 0)),
            (4, _) => a.begin_reply(),
            (5, _) => {
                b.inbox.extend(a.finish_reply());
                b.apply_next(&mut w).expect("it applies");
            }
            _ => a.tidy(0),
        }
    }
    for node in &mut nodes {
        while !node.open.is_empty() {
            node.commit_step(&mut w, 0);
        }
    }
    (0..3).for_each(|_| exchange(&mut w, &mut nodes).expect("it applies"));
    let counted = w.writes.iter().flat_map(|write| &write.counted);
    let total: i64 = counted.map(|c| c.2.unwrap_or_default() + c.3).sum();
    for node in &nodes {
        assert_eq!(number(node.rows[&0].values[&CELLS[2]]), total, "seed {seed}, node {}", node.id.0);
        let lost = node.records.values().filter(|r| r.cells.contains(&CELLS[2].to_string()));
        assert_eq!(lost.count(), 0, "seed {seed}: a delta on record");
    }
}

#[test]
fn with_deltas_alone_the_value_is_the_first_and_all_that_was_added() {
    (0..budget() / 2).for_each(only_deltas);
}

#[test]
fn a_delta_is_no_value() {
    must_fail_by(Rule::DeltasAreValues, &one_counter(Policy::LastUpdateWins));
}
#[test]
fn a_set_tells_what_it_had_seen_added() {
    must_fail_by(Rule::SumsUntold, &one_counter(Policy::LastUpdateWins));
}
#[test]
fn sums_are_kept_for_good() {
    must_fail_by(Rule::SumsForgotten, &one_counter(Policy::LastUpdateWins));
}
