//! One simulated node: rows and tombstones, open transactions, the commit protocol, its stream.
//!
//! Steps are as small as their interleavings matter: a commit reads the clock, scans the registry, takes
//! its position and becomes visible in four steps; a reply of the exchange is begun and finished.
use crate::world::{Value, World, Write};
use rand::Rng;
use serde_bytes::Bytes;
use std::collections::BTreeMap;
use tandem_model::change::{CellChange, Change, Item, Op};
use tandem_model::hlc::{Clock, Hlc, Mark, NodeId, Position};
use tandem_model::judge::{Effect, Existence, Loss, RowState, judge};
use tandem_model::net::net;
use tandem_model::record::{Decision, Record, Status};
use tandem_model::stable::Stable;
use tandem_model::versions::{CellId, Versions};
use tandem_model::wire::{Frame, items, push_item};
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
}

/// A row or a tombstone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub live: bool,
    pub hlc: Hlc,
    pub versions: Versions,
    pub values: BTreeMap<CellId, Value>,
    /// Its birth, never forgotten: for the checks only.
    pub life: Hlc,
}

enum Phase {
    Open,
    Read { clock: u64, seen: Mark },
    Scanned { low: Hlc, seen: Mark },
    Positioned { mark: Mark, seen: Mark },
}

pub struct Tx {
    /// The first version: what the registry holds.
    first: Option<Hlc>,
    changes: Vec<Change<'static>>,
    knew: BTreeMap<Key, Position>,
    /// What its keys held before it.
    before: BTreeMap<Key, Option<Stored>>,
    savepoint: Option<(usize, BTreeMap<Key, Option<Stored>>)>,
    phase: Phase,
}

struct Entry {
    mark: Mark,
    frame: Vec<u8>,
}

pub struct Node {
    pub id: NodeId,
    rule: Rule,
    clock: Clock,
    pub skew: i64,
    pub rows: BTreeMap<Key, Stored>,
    pub open: Vec<Tx>,
    log: BTreeMap<Position, Entry>,
    /// How far the peer's worker has read this log, and the reply being made.
    sent: Position,
    reply: Option<(u64, Mark)>,
    /// Frames on their way here.
    pub inbox: std::collections::VecDeque<Vec<u8>>,
    applied: Mark,
    pub stable: Stable,
    pub records: BTreeMap<Uuid, Record>,
}

pub type Check<T = ()> = Result<T, String>;

impl Node {
    pub fn new(id: u8, peer: u8, rule: Rule) -> Node {
        Node {
            id: NodeId(id),
            rule,
            clock: Clock::new(),
            skew: 0,
            rows: BTreeMap::new(),
            open: Vec::new(),
            log: BTreeMap::new(),
            sent: Position(0),
            reply: None,
            inbox: Default::default(),
            applied: Mark::default(),
            stable: Stable {
                own: (NodeId(id), Hlc(0)),
                peer: (NodeId(peer), Hlc(0)),
            },
            records: BTreeMap::new(),
        }
    }

    fn tick(&self, w: &World) -> Hlc {
        self.clock.tick(w.wall + self.skew, self.id)
    }
    fn locked(&self, key: Key) -> bool {
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
        self.open[tx]
            .before
            .entry(key)
            .or_insert_with(|| held.clone());
        self.open[tx]
            .knew
            .entry(key)
            .or_insert(self.applied.position);
        let mut row = held.unwrap_or_else(|| Stored {
            live: false,
            hlc: Hlc(0),
            versions: Versions::default(),
            values: BTreeMap::new(),
            life: Hlc(0),
        });
        if row.live && w.rng.random_bool(0.5) {
            row.versions.trim(&self.stable);
        }
        let mut change = Change {
            descriptor: 1,
            op,
            key: vec![Some(Bytes::new(w.key(key)))],
            version,
            life: row.versions.birth,
            base: row.versions.clone(),
            cells: vec![],
            moved: None,
        };
        match op {
            Op::Insert => {
                assert!(
                    version > row.versions.birth && version > row.versions.dead,
                    "inflationary"
                );
                change.life = version;
                row.life = version;
                row.versions = Versions {
                    birth: version,
                    ..Versions::default()
                };
                change.cells = CELLS
                    .iter()
                    .map(|&c| w.cell(c, version, row.life, None))
                    .collect();
            }
            Op::Update => {
                let count = w.rng.random_range(1..=CELLS.len());
                let first = w.rng.random_range(0..CELLS.len());
                let mut cells: Vec<_> = (first..first + count)
                    .map(|i| CELLS[i % CELLS.len()])
                    .collect();
                cells.sort();
                change.base.cells = cells.iter().map(|&c| (c, row.versions.cell(c))).collect();
                for &c in &cells {
                    row.versions.set(c, version);
                }
                change.cells = cells
                    .iter()
                    .map(|&c| w.cell(c, version, row.life, row.values.get(&c).copied()))
                    .collect();
            }
            Op::Delete => {
                row.versions.dead = version;
                w.deleted(version, row.life);
            }
        }
        for cell in &change.cells {
            row.values.insert(cell.cell, world_value(cell));
        }
        row.hlc = version;
        row.live = op != Op::Delete;
        self.rows.insert(key, row);
        self.open[tx].changes.push(change);
    }

    pub fn savepoint(&mut self, tx: usize) {
        let rows = self.open[tx]
            .before
            .keys()
            .map(|k| (*k, self.rows.get(k).cloned()))
            .collect();
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
            let restored: Vec<_> = tx
                .before
                .iter()
                .map(|(k, before)| (*k, rows.get(k).unwrap_or(before).clone()))
                .collect();
            restored.into_iter().for_each(|(k, row)| self.put(k, row));
        }
    }
    /// Also after the position was taken.
    pub fn abort(&mut self, tx: usize) {
        let tx = self.open.remove(tx);
        tx.before.into_iter().for_each(|(k, row)| self.put(k, row));
    }
    fn put(&mut self, key: Key, row: Option<Stored>) {
        match row {
            Some(row) => drop(self.rows.insert(key, row)),
            None => drop(self.rows.remove(&key)),
        }
    }

    // ------------------------------------------------------------------ commit
    /// The next step of a commit; true when it is visible.
    pub fn commit_step(&mut self, w: &mut World, tx: usize) -> bool {
        let (clock, seen) = (self.clock.read(), self.applied);
        self.open[tx].phase = match self.open[tx].phase {
            Phase::Open => Phase::Read { clock, seen },
            Phase::Read { clock, seen } => Phase::Scanned {
                low: self.low(clock, Some(tx)),
                seen,
            },
            Phase::Scanned { low, seen } => {
                let low = if self.rule == Rule::LateClock {
                    self.scanned_before(low, clock)
                } else {
                    low
                };
                let position = self.clock.tick_position(w.wall + self.skew, self.id);
                Phase::Positioned {
                    mark: Mark { position, low },
                    seen,
                }
            }
            Phase::Positioned { mark, seen } => {
                let seen = if self.rule == Rule::LateSeenCommit {
                    self.applied
                } else {
                    seen
                };
                self.finish_commit(w, tx, mark, seen);
                return true;
            }
        };
        false
    }
    /// True once its position is taken and published.
    pub fn in_flight(&self, tx: usize) -> bool {
        matches!(self.open[tx].phase, Phase::Positioned { .. })
    }
    /// The low mark: below the clock's reading and below the first version of every other open transaction.
    fn low(&self, clock: u64, except: Option<usize>) -> Hlc {
        if self.rule == Rule::NoScan {
            return Hlc(clock);
        }
        let others = self
            .open
            .iter()
            .enumerate()
            .filter(|(i, _)| Some(*i) != except);
        let firsts = others.filter_map(|(_, t)| t.first).map(|first| first.0 - 1);
        // The broken order: what the scan found counts, the clock's reading comes later.
        let clock = if self.rule == Rule::LateClock {
            u64::MAX
        } else {
            clock
        };
        Hlc(firsts.min().unwrap_or(u64::MAX).min(clock))
    }
    fn scanned_before(&self, low: Hlc, clock: u64) -> Hlc {
        Hlc(low.0.min(clock))
    }
    fn finish_commit(&mut self, w: &mut World, tx: usize, mark: Mark, seen: Mark) {
        let tx = self.open.remove(tx);
        let changes = net(tx.changes);
        for (key, before) in tx.before {
            // The tombstones that `net` wants: see its table.
            let Some(after) = self.rows.get(&key).filter(|row| !row.live) else {
                continue;
            };
            let dead = after.versions.dead;
            match before {
                Some(before) if before.live && self.rule != Rule::LeakyTombstone => {
                    let mut row = Stored {
                        live: false,
                        hlc: dead,
                        ..before
                    };
                    row.versions.dead = dead;
                    self.rows.insert(key, row);
                }
                Some(before) if before.live => {}
                before => self.put(key, before),
            }
        }
        for change in &changes {
            w.committed(self.id, mark.position, tx.knew[&w.key_of(change)], change);
        }
        let items: Vec<_> = changes.into_iter().map(Item::Change).collect();
        self.append(mark, seen, &items);
    }
    fn append(&mut self, mark: Mark, seen: Mark, items: &[Item<'_>]) {
        let mut body = Vec::new();
        for item in items {
            push_item(&mut body, item).expect("small");
        }
        let stable = self.stable.own.1;
        let frame = Frame::Transaction {
            mark,
            seen,
            stable,
            chunks: 0,
            items: Bytes::new(&body),
        }
        .encode();
        self.log.insert(mark.position, Entry { mark, frame });
    }
    /// A transaction of the apply worker: records, or nothing (a heartbeat).
    pub fn worker_commit(&mut self, w: &World, seen: Mark, items: &[Item<'_>]) {
        let low = self.low(self.clock.read(), None);
        let low = if self.rule == Rule::LateClock {
            self.scanned_before(low, self.clock.read())
        } else {
            low
        };
        let position = self.clock.tick_position(w.wall + self.skew, self.id);
        self.append(Mark { position, low }, seen, items);
    }
    pub fn heartbeat(&mut self, w: &World) {
        self.worker_commit(w, self.applied, &[]);
    }

    // ------------------------------------------------------------------ the exchange
    /// First half of a reply: `seen`, then the horizon.
    ///
    /// A commit in flight holds the horizon back, and with it later positions that are visible already.
    /// Those may have been written before what is `seen` now was applied, and are not sent yet: such a
    /// watermark acknowledges nothing (transactions do: they come in the order of their positions).
    pub fn begin_reply(&mut self) {
        let (seen, clock) = (self.applied, self.clock.read());
        let in_flight = self.open.iter().filter_map(|t| match t.phase {
            Phase::Positioned { mark, .. } => Some(mark.position.0 - 1),
            _ => None,
        });
        let (horizon, seen) = match in_flight.min() {
            None => (clock, seen),
            Some(below) if self.rule == Rule::HeldBackWatermark => (below, seen),
            Some(below) => (below, Mark::default()),
        };
        self.reply.get_or_insert((horizon, seen));
    }
    /// Second half: what is visible up to the horizon, and the watermark.
    pub fn finish_reply(&mut self) -> Vec<Vec<u8>> {
        let Some((horizon, seen)) = self.reply.take() else {
            return vec![];
        };
        let seen = if self.rule == Rule::LateSeenWatermark {
            self.applied
        } else {
            seen
        };
        let upto = self
            .log
            .range(..=Position(horizon))
            .next_back()
            .map(|e| e.1.mark)
            .unwrap_or_default();
        let new = self
            .log
            .range(Position(self.sent.0 + 1)..)
            .take_while(|e| e.0.0 <= horizon);
        let mut frames: Vec<_> = new.map(|e| e.1.frame.clone()).collect();
        self.sent = self.sent.max(upto.position);
        frames.push(
            Frame::Watermark {
                mark: upto,
                seen,
                stable: self.stable.own.1,
            }
            .encode(),
        );
        frames
    }

    fn acknowledge(&mut self, seen: Mark, stable: Hlc) {
        let point = match self.rule {
            Rule::NaiveStable => seen.position.0,
            _ => seen.low.0.min(seen.position.0),
        };
        self.stable.own.1 = self.stable.own.1.max(Hlc(point));
        self.stable.peer.1 = self.stable.peer.1.max(stable);
    }

    /// Takes the next frame; false if there is none or it has to wait for a local lock.
    pub fn apply_next(&mut self, w: &mut World) -> Check<bool> {
        let Some(bytes) = self.inbox.pop_front() else {
            return Ok(false);
        };
        match Frame::decode(&bytes).map_err(|e| e.to_string())? {
            Frame::Watermark { seen, stable, .. } => self.acknowledge(seen, stable),
            Frame::Transaction {
                mark,
                seen,
                stable,
                items: body,
                ..
            } => {
                let body: Vec<_> = items(body)
                    .collect::<Result<_, _>>()
                    .map_err(|e| e.to_string())?;
                let blocked = body
                    .iter()
                    .any(|i| matches!(i, Item::Change(c) if self.locked(w.key_of(c))));
                if blocked {
                    self.inbox.push_front(bytes);
                    return Ok(false);
                }
                if mark.position <= self.applied.position {
                    return Err("a position came twice or late".into());
                }
                self.acknowledge(seen, stable);
                self.applied = mark;
                self.clock.observe(w.wall, mark.position.0);
                let mut found = Vec::new();
                for item in &body {
                    match item {
                        Item::Change(change) => self.apply(w, change, &mut found)?,
                        Item::Record(json) => {
                            let record = serde_json::from_slice(json).map_err(|e| e.to_string())?;
                            self.record(record);
                        }
                        Item::Truncate { .. } => {}
                    }
                }
                if !found.is_empty() {
                    let json: Vec<_> = found
                        .iter()
                        .map(|r| serde_json::to_vec(r).expect("json"))
                        .collect();
                    let items: Vec<_> = json.iter().map(|j| Item::Record(Bytes::new(j))).collect();
                    self.worker_commit(w, mark, &items);
                    found.into_iter().for_each(|r| self.record(r));
                }
            }
            _ => return Err("an unknown frame".into()),
        }
        Ok(true)
    }
    fn record(&mut self, record: Record) {
        match self.records.get_mut(&record.conflict_id) {
            Some(held) => held.join(record),
            None => drop(self.records.insert(record.conflict_id, record)),
        }
    }

    fn apply(&mut self, w: &mut World, change: &Change<'_>, found: &mut Vec<Record>) -> Check {
        let key = w.key_of(change);
        change
            .check(self.stable.peer.0)
            .map_err(|e| e.to_string())?;
        if self.stable.covers(change.version)
            || change.cells.iter().any(|c| self.stable.covers(c.version))
        {
            return Err("a stable point above something that was still to come".into());
        }
        self.clock.observe(w.wall, change.version.0);
        let mut change = change.clone();
        if let (Rule::Mix, Some(row)) = (self.rule, self.rows.get(&key)) {
            change.life = row.versions.birth;
            change.op = if change.op == Op::Insert {
                Op::Update
            } else {
                change.op
            };
        }
        let verdict = self.judge(key, &change);
        if verdict.effect == Effect::Missing {
            return Err(format!("a key is missing: {change:?}"));
        }
        if self.rule != Rule::Mix {
            w.truly_concurrent(&change, &verdict.losses)?;
        }
        found.extend(verdict.losses.iter().map(|loss| record(w.key(key), loss)));
        let was = self.rows.get(&key).map(|r| r.live);
        let mut row = self.rows.remove(&key).unwrap_or_else(|| Stored {
            live: false,
            hlc: Hlc(0),
            versions: Versions::default(),
            values: BTreeMap::new(),
            life: Hlc(0),
        });
        let taken: Vec<CellId> = match &verdict.effect {
            Effect::Insert | Effect::Replace => {
                assert_eq!(verdict.effect == Effect::Replace, was == Some(true));
                (row.live, row.life) = (true, change.life);
                row.values.clear();
                change.cells.iter().map(|c| c.cell).collect()
            }
            Effect::Revive(cells) => {
                row.live = true;
                cells.clone()
            }
            Effect::Update(cells) | Effect::UpdateTombstone(cells) => cells.clone(),
            Effect::Delete => {
                row.live = false;
                vec![]
            }
            Effect::Keep | Effect::Restamp | Effect::Missing => vec![],
        };
        for cell in change.cells.iter().filter(|c| taken.contains(&c.cell)) {
            row.values.insert(cell.cell, world_value(cell));
        }
        (row.hlc, row.versions) = (verdict.hlc, verdict.versions);
        if self.rule == Rule::Eager && row.live {
            let mut eager = self.stable;
            eager.peer.1 = Hlc(u64::MAX);
            row.versions.trim(&eager);
        }
        self.rows.insert(key, row);
        if self.rule == Rule::Sound {
            let again = self.judge(key, &change);
            let known = |l: &Loss| {
                verdict
                    .losses
                    .iter()
                    .any(|k| (k.losing, k.conflict) == (l.losing, l.conflict))
            };
            if again.effect != Effect::Keep || !again.losses.iter().all(known) {
                return Err(format!(
                    "not idempotent: {change:?}: {verdict_text:?}, then {again:?}",
                    verdict_text = verdict.effect
                ));
            }
        }
        Ok(())
    }
    fn judge(&self, key: Key, change: &Change<'_>) -> tandem_model::judge::Verdict {
        let held = self.rows.get(&key);
        let state = RowState {
            existence: match held {
                None => Existence::Absent,
                Some(row) if row.live => Existence::Live,
                Some(_) => Existence::Tombstone,
            },
            hlc: held.map(|r| r.hlc).unwrap_or_default(),
            versions: held.map(|r| r.versions.clone()).unwrap_or_default(),
        };
        let mut same = |id: CellId| {
            let new = change.cells.iter().find(|c| c.cell == id).map(world_value);
            new.is_some() && new == held.and_then(|r| r.values.get(&id).copied())
        };
        judge(&state, change, &self.stable, &mut same)
    }

    // ------------------------------------------------------------------ forgetting
    /// What the worker does now and then: forget in a row, collect a tombstone.
    pub fn tidy(&mut self, key: Key) {
        if self.locked(key) {
            return;
        }
        let stable = self.stable;
        if let Some(row) = self.rows.get_mut(&key) {
            if row.live {
                row.versions.trim(&stable);
            } else if row.versions.collectable(&stable) {
                self.rows.remove(&key);
            }
        }
    }
}

pub fn world_value(cell: &CellChange<'_>) -> Value {
    let bytes = cell.new[0].expect("never null here");
    Value::from_be_bytes(bytes.as_ref().try_into().expect("4 bytes"))
}

fn record(key: &[u8], loss: &Loss) -> Record {
    let key = format!("{{\"id\":{}}}", key[0]);
    Record {
        conflict_id: Record::id("public", "t", &key, loss.losing),
        schema: "public".into(),
        table: "t".into(),
        key: serde_json::value::RawValue::from_string(key).expect("json"),
        conflict_type: loss.conflict,
        constraint_name: None,
        losing: loss.losing,
        winning: loss.winning,
        cells: loss.cells.iter().map(|c| c.to_string()).collect(),
        base: None,
        tuples: BTreeMap::new(),
        result: None,
        policy: "last_update_wins".into(),
        detected_at: 0,
        decision: Decision {
            version: Hlc(0),
            status: Status::Auto,
            by: None,
            at: None,
            resolution: None,
            note: None,
        },
    }
}

/// So that `Write` is told where it comes from.
impl From<(&Change<'_>, NodeId)> for Write {
    fn from((change, node): (&Change<'_>, NodeId)) -> Write {
        Write {
            node,
            version: change.version,
            op: change.op,
            cells: change
                .cells
                .iter()
                .map(|c| (c.cell, c.version, world_value(c)))
                .collect(),
            key: 0,
            position: Position(0),
            knew: Position(0),
            life: Hlc(0),
        }
    }
}
