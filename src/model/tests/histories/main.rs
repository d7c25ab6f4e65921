//! Random histories of two nodes: the rules hold in all of them, and each shortcut fails in some.
//!
//! `TANDEM_MODEL_HISTORIES` sets how many; a failure names its seed, `TANDEM_MODEL_SEED` runs one alone.
mod node;
mod world;

use node::{Check, Node, Rule};
use rand::Rng;
use tandem_model::change::Op;
use world::World;

const KEYS: u8 = 3;

/// One history.
fn run(seed: u64, rule: Rule) -> Check<usize> {
    let mut w = World::new(seed);
    let mut nodes = [Node::new(1, 2, rule), Node::new(2, 1, rule)];
    nodes[1].skew = w.rng.random_range(-20..20);
    for _ in 0..w.rng.random_range(20..160) {
        step(&mut w, &mut nodes)?;
    }
    for node in &mut nodes {
        while !node.open.is_empty() {
            node.commit_step(&mut w, 0);
        }
    }
    for _ in 0..3 {
        exchange(&mut w, &mut nodes)?;
    }
    let [a, b] = &nodes;
    w.same_rows([a, b])?;
    w.one_life(a)?;
    w.same_records([a, b])?;
    w.no_silent_loss(a)?;
    // What an aborted transaction held back needs one more position on each side.
    nodes.iter_mut().for_each(|n| n.heartbeat(&w));
    for _ in 0..3 {
        exchange(&mut w, &mut nodes)?;
        nodes.iter_mut().for_each(|n| (0..KEYS).for_each(|key| n.tidy(key)));
    }
    let [a, b] = &nodes;
    w.same_rows([a, b])?;
    w.collected(a)?;
    w.collected(b)?;
    Ok(a.records.len())
}

fn step(w: &mut World, nodes: &mut [Node; 2]) -> Check {
    w.wall += w.rng.random_range(0..2);
    let at = w.rng.random_range(0..2);
    let (low, high) = nodes.split_at_mut(1);
    let (a, b) = if at == 0 { (&mut low[0], &mut high[0]) } else { (&mut high[0], &mut low[0]) };
    let tx = (!a.open.is_empty()).then(|| w.rng.random_range(0..a.open.len()));
    match (w.rng.random_range(0..100), tx) {
        (0..40, tx) => {
            let go_on = tx.filter(|_| a.open.len() >= 3 || w.rng.random_bool(0.6));
            let tx = go_on.unwrap_or_else(|| a.begin());
            for _ in 0..w.rng.random_range(1..4) {
                let key = w.rng.random_range(0..KEYS);
                match w.rng.random_range(0..8) {
                    0..2 => a.write(w, tx, key, Op::Insert),
                    2..5 => a.write(w, tx, key, Op::Update),
                    5..7 => a.write(w, tx, key, Op::Delete),
                    _ => {
                        a.write(w, tx, key, Op::Delete);
                        a.write(w, tx, key, Op::Insert);
                    }
                }
            }
        }
        (40..43, Some(tx)) => a.savepoint(tx),
        (43..46, Some(tx)) => a.rollback_to_savepoint(tx),
        (46..48, Some(tx)) => a.abort(tx),
        (48..58, Some(tx)) => drop(a.commit_step(w, tx)),
        (58..66, Some(tx)) => while !a.commit_step(w, tx) {},
        (66..74, _) => a.begin_reply(),
        (74..82, _) => b.inbox.extend(a.finish_reply()),
        (82..96, _) => drop(a.apply_next(w)?),
        _ => (0..KEYS).for_each(|key| a.tidy(key)),
    }
    Ok(())
}

/// Both streams to their ends.
fn exchange(w: &mut World, nodes: &mut [Node; 2]) -> Check {
    let [a, b] = nodes;
    for (from, to) in [(a as &mut Node, b as &mut Node)] {
        for _ in 0..2 {
            // A reply that was begun before is finished first.
            to.inbox.extend(from.finish_reply());
            from.inbox.extend(to.finish_reply());
            from.begin_reply();
            to.inbox.extend(from.finish_reply());
            while to.apply_next(w)? {}
            to.begin_reply();
            from.inbox.extend(to.finish_reply());
            while from.apply_next(w)? {}
        }
    }
    Ok(())
}

fn budget() -> u64 {
    std::env::var("TANDEM_MODEL_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000)
}

#[test]
fn the_rules_hold_in_every_history() {
    let seed = std::env::var("TANDEM_MODEL_SEED").ok().and_then(|n| n.parse().ok());
    let seeds = seed.map_or(0..budget(), |seed: u64| seed..seed + 1);
    let (count, mut records) = (seeds.end - seeds.start, 0);
    for seed in seeds {
        match run(seed, Rule::Sound) {
            Ok(found) => records += found,
            Err(why) => panic!("seed {seed}: {why}"),
        }
    }
    println!("{count} histories, {records} records");
    assert!(count < 100 || records > count as usize / 4, "the histories have hardly a conflict");
}

/// A broken rule fails in some history; the kinds of failure are printed.
fn must_fail(rule: Rule) {
    for seed in 0..budget() {
        if let Err(why) = run(seed, rule) {
            println!("{rule:?}: seed {seed}: {}", why.chars().take(300).collect::<String>());
            return;
        }
    }
    panic!("{rule:?}: no counterexample in {} histories", budget());
}

#[test]
fn the_acknowledged_position_is_no_stable_point() {
    must_fail(Rule::NaiveStable);
}
#[test]
fn what_is_applied_may_not_be_forgotten() {
    must_fail(Rule::Eager);
}
#[test]
fn cells_of_two_lives_do_not_mix() {
    must_fail(Rule::Mix);
}
#[test]
fn a_watermark_reads_seen_before_its_horizon() {
    must_fail(Rule::LateSeenWatermark);
}
#[test]
fn a_commit_reads_seen_before_its_position() {
    must_fail(Rule::LateSeenCommit);
}
#[test]
fn a_low_mark_reads_the_clock_before_the_scan() {
    must_fail(Rule::LateClock);
}
#[test]
fn a_low_mark_knows_the_other_open_transactions() {
    must_fail(Rule::NoScan);
}
#[test]
fn a_tombstone_holds_nothing_of_the_transaction_that_made_it() {
    must_fail(Rule::LeakyTombstone);
}
