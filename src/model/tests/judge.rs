//! Single verdicts: what the histories meet seldom or never.
use serde_bytes::Bytes;
use tandem_model::change::{CellChange, Change, Op};
use tandem_model::counter::Delta;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::judge::{Effect, Existence, Loss, RowState, Side, Verdict, judge};
use tandem_model::policy::Policies;
use tandem_model::record::ConflictType::*;
use tandem_model::stable::Stable;
use tandem_model::versions::Versions;

/// Versions of this node and of the peer.
fn own(counter: u64) -> Hlc {
    Hlc(counter * 64 + 1)
}
fn peer(counter: u64) -> Hlc {
    Hlc(counter * 64 + 2)
}
fn stable(own_point: u64, peer_point: u64) -> Stable {
    Stable { own: (NodeId(1), own(own_point)), peer: (NodeId(2), peer(peer_point)) }
}
fn versions(birth: Hlc, dead: Hlc, cells: &[(u16, Hlc)]) -> Versions {
    Versions { birth, dead, cells: cells.to_vec(), ..Versions::default() }
}
fn row(existence: Existence, hlc: Hlc, versions: Versions) -> RowState {
    RowState { existence, hlc, versions }
}
fn change(op: Op, life: Hlc, cells: &[(u16, Hlc)], base: Versions) -> Change<'static> {
    let cells: Vec<_> = cells
        .iter()
        .map(|&(cell, version)| CellChange { cell, version, new: vec![None], old: vec![], delta: None })
        .collect();
    let version = cells.iter().map(|c| c.version).max().unwrap_or(life);
    Change { descriptor: 1, op, key: vec![Some(Bytes::new(b"k"))], version, life, base, cells, moved: None }
}
fn delete(version: Hlc, life: Hlc, base: Versions) -> Change<'static> {
    Change { version, ..change(Op::Delete, life, &[], base) }
}
/// A verdict where no content agrees.
fn verdict(row: &RowState, change: &Change<'_>, stable: Stable) -> Verdict {
    judge(row, change, &stable, &Policies::default(), &mut |_| false)
}
fn unchanged(row: &RowState, verdict: &Verdict) -> bool {
    (verdict.hlc, &verdict.versions) == (row.hlc, &row.versions)
}

#[test]
fn what_is_stable_does_not_come_again() {
    // The cell was written here since, knowing the update.
    let held = row(Existence::Live, own(9), versions(Hlc(0), Hlc(0), &[(2, own(9))]));
    let base = versions(Hlc(0), Hlc(0), &[(2, Hlc(0))]);
    let again = change(Op::Update, Hlc(0), &[(2, peer(5))], base);
    let v = verdict(&held, &again, stable(0, 5));
    assert_eq!((&v.effect, v.losses.len()), (&Effect::Keep, 0));
    assert!(unchanged(&held, &v));
}

#[test]
fn an_insert_that_comes_again_does_nothing() {
    // A cell was written here since, knowing the insert.
    let held = row(Existence::Live, own(9), versions(peer(5), Hlc(0), &[(2, own(9))]));
    let again = change(Op::Insert, peer(5), &[(2, peer(5)), (3, peer(5))], Versions::default());
    let v = verdict(&held, &again, stable(0, 0));
    assert_eq!((&v.effect, v.losses.len(), v.merged), (&Effect::Keep, 0, false));
    assert!(unchanged(&held, &v));
}

#[test]
fn an_update_that_comes_again_does_nothing() {
    let base = versions(own(1), Hlc(0), &[(2, own(1))]);
    let update = change(Op::Update, own(1), &[(2, peer(5))], base);
    let held = row(Existence::Live, own(1), versions(own(1), Hlc(0), &[]));
    let first = verdict(&held, &update, stable(0, 0));
    assert_eq!((&first.effect, first.losses.len()), (&Effect::Update(vec![2]), 0));
    let held = row(Existence::Live, first.hlc, first.versions);
    let second = verdict(&held, &update, stable(0, 0));
    assert_eq!((&second.effect, second.losses.len()), (&Effect::Keep, 0));
}

#[test]
fn an_update_lost_to_a_delete_is_lost_whatever_the_tombstone_shows() {
    let base = versions(own(1), Hlc(0), &[(2, own(1))]);
    let update = change(Op::Update, own(1), &[(2, peer(5))], base);
    // The cell was updated here too, unseen, to the same content.
    let held = row(Existence::Tombstone, own(9), versions(own(1), own(9), &[(2, own(4))]));
    let v = judge(&held, &update, &stable(0, 0), &Policies::default(), &mut |_| true);
    assert_eq!(v.effect, Effect::UpdateTombstone(vec![2]));
    let loss =
        Loss { conflict: DeleteOriginDiffers, loser: Side::Remote, losing: peer(5), winning: own(9), cells: vec![2] };
    assert_eq!(v.losses, [loss]);
    assert_eq!((v.hlc, v.versions), (own(9), versions(own(1), own(9), &[(2, peer(5))])));
}

#[test]
fn a_tombstone_forgets_nothing_before_all_of_it() {
    let held = row(Existence::Live, own(4), versions(own(1), Hlc(0), &[(2, own(4))]));
    let base = versions(own(1), Hlc(0), &[(2, own(4))]);
    let v = verdict(&held, &delete(peer(7), own(1), base), stable(4, 0));
    assert_eq!((v.effect, v.losses.len()), (Effect::Delete, 0));
    assert_eq!((v.hlc, v.versions), (peer(7), versions(own(1), peer(7), &[(2, own(4))])));
}

#[test]
fn a_row_that_shows_is_trimmed() {
    let held = row(Existence::Live, own(4), versions(own(1), Hlc(0), &[(2, own(4)), (3, own(3))]));
    let base = versions(Hlc(0), Hlc(0), &[(2, Hlc(0))]);
    let v = verdict(&held, &change(Op::Update, Hlc(0), &[(2, peer(7))], base), stable(4, 0));
    assert_eq!((v.effect, v.versions), (Effect::Update(vec![2]), versions(Hlc(0), Hlc(0), &[(2, peer(7))])));
}

#[test]
fn a_key_that_is_not_known_is_missing() {
    let absent = row(Existence::Absent, Hlc(0), Versions::default());
    // Also where another life is held, older than the one the change names.
    let older = row(Existence::Live, own(2), versions(own(2), Hlc(0), &[]));
    for held in [absent, older] {
        let v = verdict(
            &held,
            &change(Op::Update, peer(3), &[(2, peer(5)), (3, peer(5)), (5, peer(6))], Versions::default()),
            stable(0, 0),
        );
        assert_eq!(v.effect, Effect::Missing);
        assert!(unchanged(&held, &v) && !v.merged);
        let told: Vec<_> = v.losses.iter().map(|l| (l.conflict, l.loser, l.losing, l.cells.as_slice())).collect();
        assert_eq!(
            told,
            [(UpdateMissing, Side::Remote, peer(5), &[2, 3][..]), (UpdateMissing, Side::Remote, peer(6), &[5])]
        );
        let v = verdict(&held, &delete(peer(5), peer(3), Versions::default()), stable(0, 0));
        assert_eq!((v.effect, v.losses[0].conflict, v.losses[0].losing), (Effect::Missing, DeleteMissing, peer(5)));
    }
}

#[test]
fn a_delete_whose_effect_holds_is_no_loss() {
    // The life it named was deleted here too, and the key born again since.
    let reborn = row(Existence::Live, own(8), versions(own(8), Hlc(0), &[]));
    let late = delete(peer(9), own(1), versions(own(1), Hlc(0), &[]));
    let v = verdict(&reborn, &late, stable(0, 0));
    assert_eq!((&v.effect, v.losses.len(), v.merged), (&Effect::Keep, 0, true));
    // The other node: its tombstone gives way to the newer life.
    let tombstone = row(Existence::Tombstone, own(9), versions(own(1), own(9), &[]));
    let birth = change(Op::Insert, peer(8), &[(2, peer(8))], versions(own(1), peer(7), &[]));
    let v = verdict(&tombstone, &birth, stable(0, 0));
    assert_eq!((v.effect, v.losses.len()), (Effect::Insert, 0));
    assert_eq!((v.hlc, v.versions), (peer(8), versions(peer(8), Hlc(0), &[])));
    // Both deleted: the greater stands.
    let v = verdict(&tombstone, &delete(peer(10), own(1), versions(own(1), Hlc(0), &[])), stable(0, 0));
    assert_eq!((v.effect, v.hlc, v.losses.len(), v.merged), (Effect::Restamp, peer(10), 0, true));
}

#[test]
fn the_same_row_inserted_on_both_sides_is_no_conflict() {
    let held = row(Existence::Live, own(4), versions(own(4), Hlc(0), &[]));
    let insert = change(Op::Insert, peer(5), &[(2, peer(5)), (3, peer(5))], Versions::default());
    let v = judge(&held, &insert, &stable(0, 0), &Policies::default(), &mut |_| true);
    assert_eq!((v.effect, v.losses.len(), v.merged), (Effect::Replace, 0, true));
    // Where one cell differs, that one is lost.
    let v = judge(&held, &insert, &stable(0, 0), &Policies::default(), &mut |cell| cell == 2);
    let loss = Loss { conflict: InsertExists, loser: Side::Local, losing: own(4), winning: peer(5), cells: vec![3] };
    assert_eq!(v.losses, [loss]);
    // A table of keys alone has nothing to lose.
    let v = verdict(&held, &change(Op::Insert, peer(5), &[], Versions::default()), stable(0, 0));
    assert_eq!((v.effect, v.losses.len(), v.versions.birth), (Effect::Replace, 0, peer(5)));
}

#[test]
fn equal_updates_only_restamp() {
    let held = row(Existence::Live, own(4), versions(own(1), Hlc(0), &[(2, own(4))]));
    let base = versions(own(1), Hlc(0), &[(2, own(1))]);
    let update = change(Op::Update, own(1), &[(2, peer(5))], base);
    let v = judge(&held, &update, &stable(0, 0), &Policies::default(), &mut |_| true);
    assert_eq!((v.effect, v.hlc, v.losses.len(), v.merged), (Effect::Restamp, peer(5), 0, true));
    assert_eq!(v.versions, versions(own(1), Hlc(0), &[(2, peer(5))]));
}

fn added(base: Hlc, version: Hlc, sum: &'static str, listed: Versions) -> Change<'static> {
    let mut update = change(Op::Update, own(1), &[(2, version)], listed);
    update.cells[0].delta = Some(Delta { base, value: "10", sets: false, epoch: 0, sum });
    update
}

#[test]
fn what_both_sides_add_counts_once() {
    let mut held = row(Existence::Live, own(4), versions(own(1), Hlc(0), &[]));
    held.versions.add(2, own(4), 0, "10", "-3".into());
    let theirs = added(own(1), peer(5), "-4", versions(own(1), Hlc(0), &[(2, own(1))]));
    let v = verdict(&held, &theirs, stable(0, 0));
    assert_eq!((&v.effect, v.losses.len(), v.merged), (&Effect::Update(vec![2]), 0, true));
    let counter = v.versions.counter(2).expect("something was added");
    let sum = |a: &str, b: &str| Ok::<_, ()>((a.parse::<i64>().unwrap() + b.parse::<i64>().unwrap()).to_string());
    assert_eq!(counter.value(sum), Ok("3".into()));
    let again = row(Existence::Live, v.hlc, v.versions);
    assert_eq!(verdict(&again, &theirs, stable(0, 0)).effect, Effect::Keep);
}

#[test]
fn a_delta_on_a_base_that_is_not_here_is_lost_on_record() {
    // One that gave way to a later, and one that a peer makes up.
    for base in [own(1), peer(4)] {
        let held = row(Existence::Live, own(3), versions(own(1), Hlc(0), &[(2, own(3))]));
        let theirs = added(base, peer(5), "-4", versions(own(1), Hlc(0), &[(2, own(1))]));
        let v = verdict(&held, &theirs, stable(0, 0));
        let told: Vec<_> = v.losses.iter().map(|l| (l.conflict, l.loser, l.losing, l.winning)).collect();
        assert_eq!(told, [(UpdateOriginDiffers, Side::Remote, peer(5), own(3))]);
        assert_eq!((v.effect, v.versions), (Effect::Restamp, held.versions));
    }
}

#[test]
fn a_set_loses_what_was_added_unseen_and_only_that() {
    let mut held = row(Existence::Live, own(6), versions(own(1), Hlc(0), &[]));
    held.versions.add(2, own(4), 0, "10", "1".into());
    let mut seen = versions(own(1), Hlc(0), &[]);
    seen.list(2, &held.versions);
    let set = change(Op::Update, own(1), &[(2, peer(9))], seen);
    let v = verdict(&held, &set, stable(0, 0));
    assert_eq!((&v.effect, v.losses.len(), v.versions.counter(2)), (&Effect::Update(vec![2]), 0, None));
    held.versions.add(2, own(7), 0, "11", "2".into());
    let v = verdict(&held, &set, stable(0, 0));
    let told: Vec<_> = v.losses.iter().map(|l| (l.conflict, l.loser, l.losing, l.winning)).collect();
    assert_eq!(told, [(UpdateOriginDiffers, Side::Local, own(7), peer(9))]);
}
