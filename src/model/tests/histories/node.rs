//! One simulated node: its rows and tombstones, its open transactions, and what capture makes of writes.
use crate::world::{Value, World, value_of};
use rand::Rng;
use serde_bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use tandem_model::change::{Change, Op};
use tandem_model::hlc::{Clock, Hlc, Mark, NodeId, Position};
use tandem_model::policy::{Policies, Policy};
use tandem_model::record::Record;
use tandem_model::stable::Stable;
use tandem_model::versions::{CellId, Versions};
use uuid::Uuid;

pub const CELLS: [CellId; 3] = [2, 3, 5];
pub type Key = u8;

/// The rules as designed, and what must not do instead of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Sound,
    /// The stable point is the acknowledged position.
    NaiveStable,
    /// The peer's versions are forgotten when they are applied.
    Eager,
    /// Cells of any life merge by version alone.
    Mix,
    /// A watermark's `seen` is read after its horizon.
    LateSeenWatermark,
    /// A watermark tells what was seen though a commit in flight holds its horizon back.
    HeldBackWatermark,
    /// A commit's `seen` is read after its position was taken.
    LateSeenCommit,
    /// The clock for the low mark is read after the scan of the registry.
    LateClock,
    /// The low mark leaves out the other open transactions.
    NoScan,
    /// The tombstone of a delete keeps what the same transaction updated before.
    LeakyTombstone,
    /// The nodes judge by different policies: the second by the default.
    PolicyOfOne,
    /// Nothing is kept of what a delete had seen that the row outlived.
    ForgetEnded,
    /// `_hlc` is that of what shows, whatever lost.
    LowHlc,
    /// Of two births the later wins, whatever the policy.
    LaterLife,
    /// Deltas are applied as values.
    DeltasAreValues,
    /// Bases don't tell what the node had seen added.
    SumsUntold,
    /// Sums are forgotten when they are stable.
    SumsForgotten,
}

/// A row or a tombstone.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stored {
    pub live: bool,
    pub hlc: Hlc,
    pub versions: Versions,
    pub values: BTreeMap<CellId, Value>,
    /// Its birth, never forgotten: for the checks only.
    pub life: Hlc,
    /// Versions of the sets of its counters, likewise.
    pub bases: BTreeMap<CellId, Hlc>,
}

/// How far a commit has come.
pub enum Phase {
    Open,
    Read { clock: u64, seen: Mark },
    Scanned { low: Hlc, seen: Mark },
    Positioned { mark: Mark, seen: Mark },
}

/// An open transaction.
pub struct Tx {
    /// The first version: what the registry holds.
    pub first: Option<Hlc>,
    pub changes: Vec<Change<'static>>,
    pub knew: BTreeMap<Key, Position>,
    /// What its keys held before it.
    pub before: BTreeMap<Key, Option<Stored>>,
    pub savepoint: Option<(usize, BTreeMap<Key, Option<Stored>>)>,
    pub phase: Phase,
}

/// A committed transaction in the stream.
pub struct Entry {
    pub mark: Mark,
    pub frame: Vec<u8>,
}

/// A node.
pub struct Node {
    pub id: NodeId,
    pub rule: Rule,
    pub policies: Policies,
    pub clock: Clock,
    pub skew: i64,
    pub rows: BTreeMap<Key, Stored>,
    pub open: Vec<Tx>,
    pub log: BTreeMap<Position, Entry>,
    /// How far the peer's worker has read this log, and the reply being made.
    pub sent: Position,
    pub reply: Option<(u64, Mark)>,
    /// Frames on their way here.
    pub inbox: VecDeque<Vec<u8>>,
    pub applied: Mark,
    pub stable: Stable,
    pub records: BTreeMap<Uuid, Record>,
}

pub type Check<T = ()> = Result<T, String>;

impl Node {
    pub fn new(id: u8, peer: u8, rule: Rule, policies: &Policies) -> Node {
        let by_default = rule == Rule::PolicyOfOne && id == 2;
        Node {
            id: NodeId(id),
            rule,
            policies: if by_default { Policies::default() } else { policies.clone() },
            clock: Clock::new(),
            skew: 0,
            rows: BTreeMap::new(),
            open: Vec::new(),
            log: BTreeMap::new(),
            sent: Position(0),
            reply: None,
            inbox: Default::default(),
            applied: Mark::default(),
            stable: Stable { own: (NodeId(id), Hlc(0)), peer: (NodeId(peer), Hlc(0)) },
            records: BTreeMap::new(),
        }
    }

    pub fn tick(&self, w: &World) -> Hlc {
        self.clock.tick(w.wall + self.skew, self.id)
    }
    pub fn locked(&self, key: Key) -> bool {
        self.open.iter().any(|t| t.before.contains_key(&key))
    }

    // ------------------------------------------------------------------ local writes
    pub fn begin(&mut self) -> usize {
        self.open.push(Tx {
            first: None,
            changes: vec![],
            knew: BTreeMap::new(),
            before: BTreeMap::new(),
            savepoint: None,
            phase: Phase::Open,
        });
        self.open.len() - 1
    }

    /// One statement on one key, as capture sees it.
    pub fn write(&mut self, w: &mut World, tx: usize, key: Key, op: Op) {
        let mine = self.open[tx].before.contains_key(&key);
        if !matches!(self.open[tx].phase, Phase::Open) || (!mine && self.locked(key)) {
            return;
        }
        let held = self.rows.get(&key).cloned();
        if held.as_ref().is_some_and(|r| r.live) == (op == Op::Insert) {
            return;
        }
        let version = self.tick(w);
        self.open[tx].first.get_or_insert(version);
        self.open[tx].before.entry(key).or_insert_with(|| held.clone());
        self.open[tx].knew.entry(key).or_insert(self.applied.position);
        let mut row = held.unwrap_or_default();
        if row.live && w.rng.random_bool(0.5) {
            row.versions.trim(&self.stable);
        }
        let mut base = row.versions.clone();
        base.ended.clear();
        let mut change = Change {
            descriptor: 1,
            op,
            key: vec![Some(Bytes::new(w.key(key)))],
            version,
            life: row.versions.birth,
            base,
            cells: vec![],
            moved: None,
        };
        match op {
            Op::Insert => {
                assert!(version > row.versions.birth && version > row.versions.dead, "inflationary");
                change.life = version;
                row.life = version;
                row.versions = Versions { birth: version, ..Versions::default() };
                let counts = |c| self.policies.cell(c) == &Policy::Counter;
                change.cells =
                    CELLS
                        .iter()
                        .map(|&c| {
                            if counts(c) { w.set_counter(c, version, None) } else { w.cell(c, version, row.life, None) }
                        })
                        .collect();
                row.bases = CELLS.iter().map(|c| (*c, version)).collect();
            }
            Op::Update => {
                let count = w.rng.random_range(1..=CELLS.len());
                let first = w.rng.random_range(0..CELLS.len());
                let mut cells: Vec<_> = (first..first + count).map(|i| CELLS[i % CELLS.len()]).collect();
                cells.sort();
                let mut base = Versions { cells: vec![], counters: vec![], ..change.base };
                cells.iter().for_each(|&c| base.list(c, &row.versions));
                if self.rule == Rule::SumsUntold {
                    base.counters.clear();
                }
                change.base = base;
                for &c in &cells {
                    let old = row.values.get(&c).copied();
                    let counts = self.policies.cell(c) == &Policy::Counter;
                    change.cells.push(match old {
                        Some(old) if counts && !w.resets() => w.add_to_counter(c, version, old, &mut row.versions),
                        old => {
                            row.versions.set(c, version);
                            row.bases.insert(c, version);
                            if counts { w.set_counter(c, version, old) } else { w.cell(c, version, row.life, old) }
                        }
                    });
                }
            }
            Op::Delete => row.versions.end(version),
        }
        for cell in &change.cells {
            row.values.insert(cell.cell, value_of(cell));
        }
        row.hlc = version;
        row.live = op != Op::Delete;
        self.rows.insert(key, row);
        self.open[tx].changes.push(change);
    }

    pub fn savepoint(&mut self, tx: usize) {
        let rows = self.open[tx].before.keys().map(|k| (*k, self.rows.get(k).cloned())).collect();
        let tx = &mut self.open[tx];
        if matches!(tx.phase, Phase::Open) {
            tx.savepoint = Some((tx.changes.len(), rows));
        }
    }
    pub fn rollback_to_savepoint(&mut self, tx: usize) {
        let tx = &mut self.open[tx];
        if let Some((length, rows)) = tx.savepoint.take() {
            if !matches!(tx.phase, Phase::Open) {
                return;
            }
            tx.changes.truncate(length);
            let restored: Vec<_> =
                tx.before.iter().map(|(k, before)| (*k, rows.get(k).unwrap_or(before).clone())).collect();
            restored.into_iter().for_each(|(k, row)| self.put(k, row));
        }
    }
    /// Also after the position was taken.
    pub fn abort(&mut self, tx: usize) {
        let tx = self.open.remove(tx);
        tx.before.into_iter().for_each(|(k, row)| self.put(k, row));
    }
    pub fn put(&mut self, key: Key, row: Option<Stored>) {
        match row {
            Some(row) => drop(self.rows.insert(key, row)),
            None => drop(self.rows.remove(&key)),
        }
    }

    /// What the worker does now and then: forget in a row, collect a tombstone.
    pub fn tidy(&mut self, key: Key) {
        if self.locked(key) {
            return;
        }
        let stable = self.stable;
        if let Some(row) = self.rows.get_mut(&key) {
            if row.live {
                row.versions.trim(&stable);
                if self.rule == Rule::SumsForgotten {
                    row.versions.counters.retain(|c| !c.tallies.iter().all(|t| stable.covers(t.last)));
                }
            } else if row.versions.collectable(&stable) {
                self.rows.remove(&key);
            }
        }
    }
}
