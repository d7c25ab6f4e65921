//! Scenes that chance finds once in ten thousand histories. Two are of an acknowledgement that overtakes a write
//! which had not seen what it acknowledges. The peer forgets too early, and the write finds nothing.
use crate::node::{Check, Node, Rule};
use crate::world::World;
use tandem_model::change::Op;
use tandem_model::policy::{Policies, Policy};

fn commit(w: &mut World, node: &mut Node, key: u8, op: Op) {
    let tx = node.begin();
    node.write(w, tx, key, op);
    while !node.commit_step(w, tx) {}
}
fn reply(from: &mut Node, to: &mut Node) {
    from.begin_reply();
    to.inbox.extend(from.finish_reply());
}
fn apply_all(w: &mut World, node: &mut Node) -> Check {
    while node.apply_next(w)? {
        (0..2).for_each(|key| node.tidy(key));
    }
    Ok(())
}

/// `b` has a commit in flight, updates a row that `a` has deleted, and commits that. Then the delete
/// arrives, and only then does `first` happen: the commit ends, or a reply goes out before it does.
fn scene(rule: Rule, reply_first: bool) -> Check {
    let (mut w, default) = (World::new(1), Policies::default());
    let (mut a, mut b) = (Node::new(1, 2, rule, &default), Node::new(2, 1, rule, &default));
    commit(&mut w, &mut a, 0, Op::Insert);
    reply(&mut a, &mut b);
    apply_all(&mut w, &mut b)?;
    reply(&mut b, &mut a);
    apply_all(&mut w, &mut a)?;
    commit(&mut w, &mut a, 0, Op::Delete);

    let slow = b.begin();
    b.write(&mut w, slow, 1, Op::Insert);
    while !b.in_flight(slow) {
        b.commit_step(&mut w, slow);
    }
    w.wall += 1;
    commit(&mut w, &mut b, 0, Op::Update);
    reply(&mut a, &mut b);
    apply_all(&mut w, &mut b)?;
    if reply_first {
        reply(&mut b, &mut a);
        apply_all(&mut w, &mut a)?;
    }
    while !b.commit_step(&mut w, slow) {}
    for _ in 0..2 {
        reply(&mut b, &mut a);
        apply_all(&mut w, &mut a)?;
        reply(&mut a, &mut b);
        apply_all(&mut w, &mut b)?;
    }
    w.same_rows([&a, &b])?;
    assert!(a.rows.get(&0).is_some_and(|r| r.live), "the later update revives the row");
    w.same_records([&a, &b])?;
    w.no_silent_loss(&a)
}

#[test]
fn a_watermark_that_is_held_back_acknowledges_nothing() {
    assert_eq!(scene(Rule::Sound, true), Ok(()));
    assert!(scene(Rule::HeldBackWatermark, true).is_err_and(|why| why.contains("missing")));
}

#[test]
fn a_commit_reads_seen_before_its_position() {
    assert_eq!(scene(Rule::Sound, false), Ok(()));
    assert!(scene(Rule::LateSeenCommit, false).is_err_and(|why| why.contains("missing")));
}

/// Both nodes update another cell of a row and delete it, in transactions of their own.
fn both_delete(rule: Rule) -> Check {
    let policies = Policies { existence: Policy::UpdateWins, ..Policies::default() };
    let (mut w, mut shown) = (World::new(1), 0);
    for _ in 0..50 {
        let (mut a, mut b) = (Node::new(1, 2, rule, &policies), Node::new(2, 1, rule, &policies));
        commit(&mut w, &mut a, 0, Op::Insert);
        reply(&mut a, &mut b);
        apply_all(&mut w, &mut b)?;
        for node in [&mut a, &mut b] {
            commit(&mut w, node, 0, Op::Update);
            commit(&mut w, node, 0, Op::Delete);
            w.wall += 1;
        }
        for _ in 0..2 {
            reply(&mut b, &mut a);
            reply(&mut a, &mut b);
            apply_all(&mut w, &mut a)?;
            apply_all(&mut w, &mut b)?;
        }
        w.same_rows([&a, &b])?;
        shown += usize::from(a.rows.get(&0).is_some_and(|r| r.live));
    }
    if shown == 0 { Ok(()) } else { Err(format!("{shown} of 50 rows show")) }
}

#[test]
fn two_deletes_that_saw_everything_between_them_end_the_row() {
    assert_eq!(both_delete(Rule::Sound), Ok(()));
    assert!(both_delete(Rule::ForgetEnded).is_err_and(|why| why.contains("rows show")));
}
