//! Arbitrated policies over random histories: rows converge by last-update-wins, the arbiter answers with a
//! later write, and both nodes end with the same rows, which hold what the policy promises.
//!
//! Transactions here are single statements; the commit protocol has its own histories (`histories/`).
//! `TANDEM_MODEL_HISTORIES` sets how many; a failure names its seed.
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use tandem_model::arbiter::{Own, first_update_wins};
use tandem_model::change::{CellChange, Change, Op};
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::judge::{Effect, Existence, Loss, RowState, Side, judge};
use tandem_model::policy::{Policies, Policy};
use tandem_model::record::ConflictType::{InsertExists, UpdateOriginDiffers};
use tandem_model::stable::Stable;
use tandem_model::versions::{CellId, Versions};

const CELLS: [CellId; 2] = [2, 3];
const KEYS: u8 = 2;
type Value = u32;

/// Who settles a pair: the arbiter by a later write, or (broken) whoever meets it, in place.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    Sound,
    InPlace,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Row {
    live: bool,
    hlc: Hlc,
    versions: Versions,
    values: BTreeMap<CellId, Value>,
}

/// A change on its way.
struct Sent {
    key: u8,
    change: Change<'static>,
    values: BTreeMap<CellId, Value>,
    /// What of the receiver's stream its node had applied, and its stable point.
    seen: Hlc,
    stable: Hlc,
}

struct Node {
    id: NodeId,
    clock: u64,
    rows: BTreeMap<u8, Row>,
    stable: Stable,
    applied: Hlc,
    inbox: VecDeque<Sent>,
    /// What writes of the arbiter stand for.
    reinstated: BTreeMap<(Hlc, CellId), Hlc>,
}

/// What a user wrote: node, version, what it knew of the other node, key, cell, value.
type Written = (NodeId, Hlc, Hlc, u8, CellId, Value);

struct World {
    rng: SmallRng,
    policy: Policy,
    rule: Rule,
    /// Rows are born and die as well.
    lives: bool,
    next: Value,
    written: Vec<Written>,
    answers: usize,
}

fn node(id: u8) -> Node {
    let (own, peer) = ((NodeId(id), Hlc(0)), (NodeId(3 - id), Hlc(0)));
    Node {
        id: NodeId(id),
        clock: 0,
        rows: BTreeMap::new(),
        stable: Stable { own, peer },
        applied: Hlc(0),
        inbox: VecDeque::new(),
        reinstated: BTreeMap::new(),
    }
}

impl Node {
    fn tick(&mut self, wall: u64) -> Hlc {
        self.clock = (self.clock + 1).max(wall);
        Hlc(self.clock * 64 + u64::from(self.id.0))
    }
    fn observe(&mut self, version: Hlc) {
        self.clock = self.clock.max(version.0 / 64);
    }
    fn sent(&self, key: u8, change: Change<'static>, values: BTreeMap<CellId, Value>) -> Sent {
        Sent { key, change, values, seen: self.applied, stable: self.stable.own.1 }
    }
    /// An update of these cells, as capture sees it.
    fn update(&mut self, key: u8, version: Hlc, values: BTreeMap<CellId, Value>) -> Sent {
        let stable = self.stable;
        let row = self.rows.get_mut(&key).expect("a row that shows");
        row.versions.trim(&stable);
        let base = Versions {
            birth: row.versions.birth,
            dead: row.versions.dead,
            cells: values.keys().map(|c| (*c, row.versions.cell(*c))).collect(),
            ..Versions::default()
        };
        let change = change(Op::Update, version, base.birth, base, values.keys().copied());
        values.iter().for_each(|(cell, value)| {
            row.versions.set(*cell, version);
            row.values.insert(*cell, *value);
        });
        row.hlc = version;
        self.sent(key, change, values)
    }
}

fn change(op: Op, version: Hlc, life: Hlc, base: Versions, cells: impl Iterator<Item = CellId>) -> Change<'static> {
    let cells = cells.map(|cell| CellChange { cell, version, new: vec![None], old: vec![], delta: None }).collect();
    Change { descriptor: 1, op, key: vec![Some(Bytes::new(b"k"))], version, life, base, cells, moved: None }
}

impl World {
    fn new(seed: u64, policy: Policy, rule: Rule, lives: bool) -> World {
        let rng = SmallRng::seed_from_u64(seed);
        World { rng, policy, rule, lives, next: 0, written: vec![], answers: 0 }
    }
    /// What a user puts into a cell: something greater, lesser or more than what is there.
    fn value(&mut self, old: Value) -> Value {
        self.next += 1;
        match self.policy {
            // A set of up to 32 elements; nobody takes one out.
            Policy::SetUnion => old | 1 << (self.next % 32),
            Policy::FirstUpdateWins => self.next,
            // Who lowers the greatest knowingly lowers what beat others that he doesn't know: no promise.
            _ if self.lives => self.rng.random_range(0..1000),
            Policy::Greatest => old + self.rng.random_range(1..10),
            _ => old.saturating_sub(self.rng.random_range(1..10)),
        }
    }

    /// A user's statement on node `n`.
    fn write(&mut self, nodes: &mut [Node; 2], n: usize, wall: u64) {
        let key = self.rng.random_range(0..KEYS);
        let node = &mut nodes[n];
        let version = node.tick(wall);
        let held = node.rows.get(&key).cloned().unwrap_or_default();
        let sent = if !held.live {
            let first = if self.policy == Policy::Least { 1000 } else { 0 };
            let values: BTreeMap<_, _> = CELLS.iter().map(|c| (*c, self.value(first))).collect();
            let base = held.versions;
            let versions = Versions { birth: version, ..Versions::default() };
            node.rows.insert(key, Row { live: true, hlc: version, versions, values: values.clone() });
            node.sent(key, change(Op::Insert, version, version, base, CELLS.into_iter()), values)
        } else if self.lives && self.rng.random_bool(0.2) {
            let mut row = held;
            row.versions.trim(&node.stable);
            let base = row.versions.clone();
            row.versions.end(version);
            (row.live, row.hlc) = (false, version);
            node.rows.insert(key, row);
            node.sent(key, change(Op::Delete, version, base.birth, base, std::iter::empty()), BTreeMap::new())
        } else {
            let cells = if self.rng.random_bool(0.3) { &CELLS[..] } else { &CELLS[..1] };
            let values = cells.iter().map(|c| (*c, self.value(held.values[c]))).collect();
            node.update(key, version, values)
        };
        let knew = node.applied;
        let id = node.id;
        self.written.extend(sent.values.iter().map(|(c, v)| (id, version, knew, key, *c, *v)));
        nodes[1 - n].inbox.push_back(sent);
    }

    /// Node `n` applies what comes next; the arbiter answers in the same transaction.
    fn apply(&mut self, nodes: &mut [Node; 2], n: usize, wall: u64) {
        let Some(sent) = nodes[n].inbox.pop_front() else { return };
        let node = &mut nodes[n];
        node.stable.peer.1 = node.stable.peer.1.max(sent.stable);
        node.observe(sent.change.version);
        node.applied = sent.change.version;
        let held = node.rows.get(&sent.key).cloned();
        let mut row = held.clone().unwrap_or_default();
        let state = RowState {
            existence: match &held {
                None => Existence::Absent,
                Some(row) if row.live => Existence::Live,
                Some(_) => Existence::Tombstone,
            },
            hlc: row.hlc,
            versions: row.versions.clone(),
        };
        let mut same = |c: CellId| sent.values.contains_key(&c) && sent.values.get(&c) == row.values.get(&c);
        let verdict = judge(&state, &sent.change, &node.stable, &Policies::default(), &mut same);
        let taken = match &verdict.effect {
            Effect::Insert | Effect::Replace => CELLS.to_vec(),
            Effect::Update(cells) | Effect::Revive(cells) | Effect::UpdateTombstone(cells) => cells.clone(),
            _ => vec![],
        };
        match &verdict.effect {
            Effect::Insert | Effect::Replace | Effect::Revive(_) => row.live = true,
            Effect::Delete => row.live = false,
            Effect::Missing => panic!("a key is missing"),
            _ => {}
        }
        row.values.extend(taken.iter().map(|c| (*c, sent.values[c])));
        (row.hlc, row.versions) = (verdict.hlc, verdict.versions.clone());
        let before = held.unwrap_or_default();
        node.rows.insert(sent.key, row);
        for loss in verdict.losses.iter().filter(|l| matches!(l.conflict, InsertExists | UpdateOriginDiffers)) {
            self.settle(nodes, n, &sent, &before, loss, wall);
        }
        let node = &mut nodes[n];
        node.stable.own.1 = node.stable.own.1.max(sent.seen);
    }

    fn settle(&mut self, nodes: &mut [Node; 2], n: usize, sent: &Sent, before: &Row, loss: &Loss, wall: u64) {
        let node = &mut nodes[n];
        if !node.rows[&sent.key].live || (self.rule == Rule::Sound && node.id != NodeId(1)) {
            return;
        }
        let (mut values, mut originals) = (BTreeMap::new(), BTreeMap::new());
        for cell in &loss.cells {
            let held = if loss.loser == Side::Local { &before.values } else { &sent.values };
            let Some(&lost) = held.get(cell) else { continue };
            let shown = node.rows[&sent.key].values[cell];
            let own = before.versions.cell(*cell);
            let stands_for = node.reinstated.get(&(own, *cell)).copied().unwrap_or(own);
            let peer = sent.change.cells.iter().find(|c| c.cell == *cell).map_or(sent.change.version, |c| c.version);
            let wanted = match self.policy {
                Policy::Greatest => shown.max(lost),
                Policy::Least => shown.min(lost),
                Policy::SetUnion => shown | lost,
                _ => {
                    let base = sent.change.base.cell(*cell);
                    let (side, original) = first_update_wins(Own { version: own, stands_for }, peer, base);
                    if side == loss.loser {
                        originals.insert(*cell, original);
                        lost
                    } else {
                        shown
                    }
                }
            };
            if wanted != shown {
                values.insert(*cell, wanted);
            }
        }
        if values.is_empty() {
            return;
        }
        self.answers += 1;
        if self.rule == Rule::InPlace {
            let row = node.rows.get_mut(&sent.key).expect("it shows");
            row.values.extend(values);
            return;
        }
        let version = node.tick(wall);
        node.reinstated.extend(originals.into_iter().map(|(cell, original)| ((version, cell), original)));
        let answer = node.update(sent.key, version, values);
        nodes[1 - n].inbox.push_back(answer);
    }

    /// Values that nobody who knew them has overwritten, in rows that never died.
    fn not_overwritten(&self) -> impl Iterator<Item = &Written> {
        self.written.iter().filter(|(node, version, _, key, cell, _)| {
            !self.written.iter().any(|(other, later, knew, k, c, _)| {
                (k, c) == (key, cell) && if other == node { later > version } else { knew >= version }
            })
        })
    }
}

fn run(seed: u64, policy: Policy, rule: Rule, lives: bool) -> Result<usize, String> {
    let mut w = World::new(seed, policy, rule, lives);
    let mut nodes = [node(1), node(2)];
    let skew = w.rng.random_range(0..20);
    let mut wall = 1;
    let busy = w.rng.random_range(20..80);
    for _ in 0..w.rng.random_range(10..80) {
        wall += w.rng.random_range(0..2);
        let n = w.rng.random_range(0..2);
        let here = wall + if n == 0 { skew } else { 0 };
        if w.rng.random_range(0..100) < busy { w.write(&mut nodes, n, here) } else { w.apply(&mut nodes, n, here) }
    }
    // Each apply takes one away; only the arbiter adds, one at most for one of the peer's.
    let mut steps = 0;
    while nodes.iter().any(|n| !n.inbox.is_empty()) {
        (0..2).for_each(|n| w.apply(&mut nodes, n, wall));
        steps += 1;
        if steps > 1000 {
            return Err("it does not come to rest".into());
        }
    }
    let mut stable = nodes[0].stable;
    stable.own.1 = stable.own.1.max(nodes[1].stable.peer.1);
    stable.peer.1 = stable.peer.1.max(nodes[1].stable.own.1);
    let rows = |n: &Node| -> Vec<_> {
        let known = n.rows.iter().filter(|(_, r)| r.live || !r.versions.collectable(&stable));
        known
            .map(|(key, r)| {
                let mut r = r.clone();
                r.versions.trim(&stable);
                (*key, r)
            })
            .collect()
    };
    if rows(&nodes[0]) != rows(&nodes[1]) {
        return Err(format!("diverged: {:?} and {:?}", rows(&nodes[0]), rows(&nodes[1])));
    }
    if !lives {
        for (_, _, _, key, cell, value) in w.not_overwritten() {
            let shown = nodes[0].rows[key].values[cell];
            let kept = match w.policy {
                Policy::Greatest => shown >= *value,
                Policy::Least => shown <= *value,
                Policy::SetUnion => shown & value == *value,
                _ => true,
            };
            if !kept {
                return Err(format!("{value} of {key}.{cell} is not in {shown}"));
            }
        }
    }
    Ok(w.answers)
}

fn budget() -> u64 {
    std::env::var("TANDEM_MODEL_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000)
}

fn holds(policy: Policy) {
    let mut answers = 0;
    for seed in 0..budget() {
        let lives = seed % 2 == 0;
        match run(seed, policy.clone(), Rule::Sound, lives) {
            Ok(n) => answers += n,
            Err(why) => panic!("{policy}, seed {seed}: {why}"),
        }
    }
    println!("{policy}: {answers} later writes");
    assert!(answers as u64 > budget() / 4, "the histories hardly need the arbiter");
}

/// What looks like a join and is none: in so many histories the nodes differ.
fn fails_in_place(policy: Policy) {
    let all = budget().min(2_000);
    let failures = (0..all).filter(|seed| run(*seed, policy.clone(), Rule::InPlace, false).is_err()).count();
    println!("{policy} in place: {failures} of {all} histories diverge");
    assert!(failures as u64 > all / 20);
}

#[test]
fn greatest_converges_and_holds_the_greatest() {
    holds(Policy::Greatest);
}
#[test]
fn least_converges_and_holds_the_least() {
    holds(Policy::Least);
}
#[test]
fn set_union_converges_and_holds_every_element() {
    holds(Policy::SetUnion);
}
#[test]
fn first_update_wins_converges() {
    holds(Policy::FirstUpdateWins);
}
#[test]
fn a_policy_decided_in_place_diverges() {
    fails_in_place(Policy::Greatest);
    fails_in_place(Policy::FirstUpdateWins);
}

/// Two nodes that have one row, then write unseen in this order (true: the arbiter), then exchange all.
/// Returns the number of the write that shows.
fn first(turns: &[bool]) -> usize {
    let mut w = World::new(1, Policy::FirstUpdateWins, Rule::Sound, false);
    let mut nodes = [node(1), node(2)];
    let values = CELLS.iter().map(|c| (*c, 100)).collect::<BTreeMap<_, _>>();
    let birth = nodes[0].tick(1);
    for n in &mut nodes {
        n.observe(birth);
        let versions = Versions { birth, ..Versions::default() };
        n.rows.insert(0, Row { live: true, hlc: birth, versions, values: values.clone() });
    }
    for (i, arbiter) in turns.iter().enumerate() {
        let (n, wall) = (usize::from(!arbiter), 10 + i as u64);
        let version = nodes[n].tick(wall);
        let sent = nodes[n].update(0, version, BTreeMap::from([(2, i as Value)]));
        nodes[1 - n].inbox.push_back(sent);
    }
    while nodes.iter().any(|n| !n.inbox.is_empty()) {
        (0..2).for_each(|n| w.apply(&mut nodes, n, 99));
    }
    assert_eq!(nodes[0].rows, nodes[1].rows);
    nodes[0].rows[&0].values[&2] as usize
}

#[test]
fn the_first_update_shows_and_what_was_written_over_it_knowingly() {
    assert_eq!(first(&[true, false]), 0);
    assert_eq!(first(&[false, true]), 0);
    assert_eq!(first(&[true, false, false]), 0);
    // The peer's first was the earliest: its second goes on from there.
    assert_eq!(first(&[false, true, false]), 2);
    assert_eq!(first(&[false, false, true]), 1);
    // The pair that meets is the arbiter's last write and the peer's first.
    assert_eq!(first(&[true, false, true]), 1);
}
