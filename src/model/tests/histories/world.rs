//! What an onlooker knows of a history: every committed write, who had seen what, and the checks.
use crate::node::{CELLS, Check, Key, Node, Stored};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use tandem_model::change::{CellChange, Change, Op};
use tandem_model::counter::Delta;
use tandem_model::hlc::{Hlc, NodeId, Position};
use tandem_model::judge::{Loss, Side};
use tandem_model::policy::Policy;
use tandem_model::versions::{CellId, Versions};

/// Values below `COMMON` are written again and again; the others once.
pub type Value = u32;
pub const COMMON: Value = 3;

fn bytes(value: Value) -> &'static [u8] {
    static TABLE: OnceLock<Vec<[u8; 4]>> = OnceLock::new();
    let table = TABLE.get_or_init(|| (0..1 << 16).map(|n: u32| n.to_be_bytes()).collect());
    &table[value as usize]
}

/// The new value that a change gives a cell.
pub fn value_of(cell: &CellChange<'_>) -> Value {
    let bytes = cell.new[0].expect("never null here");
    Value::from_be_bytes(bytes.as_ref().try_into().expect("4 bytes"))
}

fn old_value_of(cell: &CellChange<'_>) -> Value {
    let bytes = cell.old[0].expect("never null here");
    Value::from_be_bytes(bytes.as_ref().try_into().expect("4 bytes"))
}

pub fn parse(number: &str) -> i64 {
    number.parse().expect("a number")
}

const ZERO_DELTA: Delta<'static> = Delta { base: Hlc(0), value: "0", sets: false, epoch: 0, sum: "0" };

/// The net effect of a committed transaction on one key.
pub struct Write {
    pub node: NodeId,
    pub key: Key,
    pub op: Op,
    pub version: Hlc,
    pub position: Position,
    /// What of the peer's stream its node had applied.
    pub knew: Position,
    /// The life it belongs to, never forgotten.
    pub life: Hlc,
    pub cells: Vec<(CellId, Hlc, Value)>,
    /// Of its counters: cell, true version of the base, the number that the base set if this write set it,
    /// and how much was added.
    pub counted: Vec<(CellId, Hlc, Option<i64>, i64)>,
}

impl Write {
    fn only_adds(&self, cell: CellId) -> bool {
        self.counted.iter().any(|c| c.0 == cell && c.2.is_none())
    }
}

/// Where the values of counters begin.
const ZERO: i64 = 40_000;

/// The number that the value of a counter stands for.
pub fn number(value: Value) -> i64 {
    i64::from(value) - ZERO
}
/// The value of a counter that holds a number.
pub fn counted(number: i64) -> Value {
    Value::try_from(number + ZERO).expect("small")
}
fn text(number: i64) -> &'static str {
    const MOST: i64 = 25_000;
    static TABLE: OnceLock<Vec<String>> = OnceLock::new();
    let table = TABLE.get_or_init(|| (-MOST..=MOST).map(|n| n.to_string()).collect());
    &table[usize::try_from(number + MOST).expect("small")]
}

pub struct World {
    pub rng: SmallRng,
    pub wall: i64,
    /// Transactions of one statement.
    pub short: bool,
    /// Counters are never set again.
    pub no_resets: bool,
    next_value: Value,
    life_of_value: HashMap<Value, Hlc>,
    pub writes: Vec<Write>,
    by_version: HashMap<Hlc, usize>,
}

impl World {
    pub fn new(seed: u64) -> World {
        World {
            rng: SmallRng::seed_from_u64(seed),
            wall: 1_795_448_712_345,
            short: false,
            no_resets: false,
            next_value: COMMON,
            life_of_value: HashMap::new(),
            writes: vec![],
            by_version: HashMap::new(),
        }
    }
    pub fn key(&self, key: Key) -> &'static [u8] {
        &bytes(Value::from(key))[3..]
    }
    pub fn key_of(&self, change: &Change<'_>) -> Key {
        change.key[0].expect("a key is not null")[0]
    }
    /// A new value for a cell, now and then one that others write too.
    pub fn cell(&mut self, cell: CellId, version: Hlc, life: Hlc, old: Option<Value>) -> CellChange<'static> {
        let mut value = if self.rng.random_bool(0.2) { self.rng.random_range(0..COMMON) } else { Value::MAX };
        if value == Value::MAX || Some(value) == old {
            value = self.next_value;
            self.next_value += 1;
            self.life_of_value.insert(value, life);
        }
        let old = old.map(|v| Some(Bytes::new(bytes(v)))).into_iter().collect();
        CellChange { cell, version, new: vec![Some(Bytes::new(bytes(value)))], old, delta: None }
    }
    /// Whether an update sets a counter instead of adding to it.
    pub fn resets(&mut self) -> bool {
        !self.no_resets && self.rng.random_bool(0.15)
    }
    pub fn set_counter(&mut self, cell: CellId, version: Hlc, old: Option<Value>) -> CellChange<'static> {
        let value = counted(self.rng.random_range(0..1_000));
        let old = old.map(|v| Some(Bytes::new(bytes(v)))).into_iter().collect();
        CellChange { cell, version, new: vec![Some(Bytes::new(bytes(value)))], old, delta: None }
    }
    /// What capture makes of an update of a counter, stamp included.
    pub fn add_to_counter(&mut self, c: CellId, at: Hlc, old: Value, row: &mut Versions) -> CellChange<'static> {
        let delta = self.rng.random_range(1..50) * if self.rng.random_bool(0.5) { -1 } else { 1 };
        let sum = row.sum(c, at.node(), 0).map_or(0, parse) + delta;
        row.add(c, at, 0, text(number(old)), sum.to_string());
        let told = row.delta(c, at).expect("just added");
        let told = Delta { base: told.base, value: text(parse(told.value)), sum: text(sum), ..ZERO_DELTA };
        let value = |v: Value| vec![Some(Bytes::new(bytes(v)))];
        CellChange {
            cell: c,
            version: at,
            new: value(counted(number(old) + delta)),
            old: value(old),
            delta: Some(told),
        }
    }
    /// A net change, and the true life that it belongs to.
    pub fn committed(
        &mut self,
        node: NodeId,
        position: Position,
        knew: Position,
        change: &Change<'_>,
        row: Option<&Stored>,
        counts: impl Fn(CellId) -> bool,
    ) {
        let life = row.map(|row| row.life).unwrap_or_default();
        let counted = change.cells.iter().filter(|c| counts(c.cell)).map(|c| {
            let base = row.and_then(|row| row.bases.get(&c.cell).copied()).unwrap_or_default();
            let old = c.old.first().map(|_| number(old_value_of(c)));
            match &c.delta {
                None => (c.cell, base, Some(number(value_of(c))), 0),
                Some(d) if d.sets => (c.cell, base, Some(parse(d.value)), parse(d.sum)),
                Some(_) => (c.cell, base, None, number(value_of(c)) - old.expect("an update")),
            }
        });
        let counted: Vec<_> = counted.collect();
        let write = Write {
            node,
            key: self.key_of(change),
            op: change.op,
            version: change.version,
            position,
            knew,
            life,
            cells: change.cells.iter().map(|c| (c.cell, c.version, value_of(c))).collect(),
            counted,
        };
        for version in write
            .cells
            .iter()
            .map(|c| c.1)
            .chain(write.counted.iter().map(|c| c.1))
            .chain([change.version, change.life])
        {
            if version.node() == node {
                self.by_version.entry(version).or_insert(self.writes.len());
            }
        }
        self.by_version.insert(change.version, self.writes.len());
        self.writes.push(write);
    }
    fn write_of(&self, version: Hlc) -> Option<&Write> {
        self.by_version.get(&version).map(|&i| &self.writes[i])
    }

    /// No false conflict: who wrote over a value must not have known it.
    pub fn truly_concurrent(&self, change: &Change<'_>, losses: &[Loss]) -> Check {
        let Some(remote) = self.write_of(change.version) else {
            return Err("a write from nowhere".into());
        };
        for loss in losses {
            let held = if loss.loser == Side::Local { loss.losing } else { loss.winning };
            if held.is_zero() {
                continue; // Lost to a delete that has been overtaken by one that was seen.
            }
            let Some(held) = self.write_of(held) else {
                return Err(format!("an unknown version in {loss:?}"));
            };
            if held.node == remote.node || held.position <= remote.knew {
                return Err(format!("false conflict: {loss:?} by {change:?}"));
            }
        }
        Ok(())
    }

    /// Rows and their versions are the same on both nodes, whatever each has forgotten.
    pub fn same_rows(&self, [a, b]: [&Node; 2]) -> Check {
        let mut stable = a.stable;
        stable.own.1 = stable.own.1.max(b.stable.peer.1);
        stable.peer.1 = stable.peer.1.max(b.stable.own.1);
        let rows = |n: &Node| -> BTreeMap<_, _> {
            let rows = n.rows.iter().filter(|(_, r)| r.live || !r.versions.collectable(&stable));
            rows.map(|(key, r)| {
                let mut versions = r.versions.clone();
                versions.trim(&stable);
                (*key, (r.live, r.hlc, versions, r.values.clone()))
            })
            .collect()
        };
        let (a, b) = (rows(a), rows(b));
        if a != b {
            return Err(format!("diverged: {a:?} and {b:?}"));
        }
        Ok(())
    }

    /// No row has values of two lives.
    pub fn one_life(&self, node: &Node) -> Check {
        for row in node.rows.values().filter(|r| r.live) {
            let lives = row.values.values().filter_map(|v| self.life_of_value.get(v));
            if lives.clone().any(|life| *life != row.life) || row.values.len() != CELLS.len() {
                return Err(format!("mixed lives: {row:?}"));
            }
        }
        Ok(())
    }

    /// Every committed value that doesn't show was overwritten by somebody who knew it, or is on record.
    pub fn no_silent_loss(&self, node: &Node) -> Check {
        for (i, write) in self.writes.iter().enumerate() {
            for &(cell, version, value) in &write.cells {
                if !self.accounted(node, i, cell, version, value, &mut vec![]) {
                    return Err(format!("silent loss of {value} at {version} in cell {cell} of {}", write.key));
                }
            }
            let shows = node.rows.get(&write.key).is_some_and(|r| r.live && r.life == write.life);
            if write.op == Op::Delete && shows && !self.on_record(node, write.key, write.version, None) {
                return Err(format!("silent loss of a delete at {}", write.version));
            }
        }
        Ok(())
    }
    fn accounted(&self, node: &Node, i: usize, cell: CellId, version: Hlc, value: Value, met: &mut Vec<usize>) -> bool {
        let write = &self.writes[i];
        let row = node.rows.get(&write.key).filter(|r| r.live);
        let shows = row.is_some_and(|r| match write.counted.iter().find(|c| c.0 == cell) {
            Some(counted) => r.life == write.life && r.bases.get(&cell) == Some(&counted.1),
            None => r.values.get(&cell) == Some(&value),
        });
        if shows || met.contains(&i) {
            return !met.contains(&i);
        }
        met.push(i);
        let others = || self.writes.iter().enumerate().filter(|(j, o)| *j != i && o.key == write.key);
        let covers = |o: &Write| o.op == Op::Delete || o.cells.iter().any(|c| c.0 == cell) && !o.only_adds(cell);
        let knowing = |o: &Write| {
            if o.node == write.node { o.position > write.position } else { o.knew >= write.position }
        };
        others().any(|(_, o)| covers(o) && knowing(o))
            || self.on_record(node, write.key, version, Some(cell))
            // The same content from both sides is one value: it is accounted for if the other is.
            || others().any(|(j, o)| {
                let set = !write.only_adds(cell) && !o.only_adds(cell);
                let twin = o.cells.iter().find(|c| set && c.0 == cell && c.2 == value);
                o.node != write.node && twin.is_some_and(|c| self.accounted(node, j, cell, c.1, value, met))
            })
    }
    fn on_record(&self, node: &Node, key: Key, losing: Hlc, cell: Option<CellId>) -> bool {
        node.records.values().any(|r| {
            r.losing == losing
                && r.key.get() == format!("{{\"id\":{key}}}")
                && cell.is_none_or(|c| r.cells.is_empty() || r.cells.contains(&c.to_string()))
        })
    }

    /// The history of conflicts is the same on both nodes.
    pub fn same_records(&self, [a, b]: [&Node; 2]) -> Check {
        let list =
            |n: &Node| -> Vec<String> { n.records.values().map(|r| serde_json::to_string(r).expect("json")).collect() };
        let (a, b) = (list(a), list(b));
        if a != b {
            return Err(format!("records differ: {a:?} and {b:?}"));
        }
        Ok(())
    }

    /// A counter holds what it was set to, and all that was added since on either side.
    pub fn counters_add_up(&self, node: &Node) -> Check {
        for (key, row) in node.rows.iter().filter(|(_, row)| row.live) {
            for (cell, value) in row.values.iter().filter(|(cell, _)| node.policies.cell(**cell) == &Policy::Counter) {
                let of_row = self.writes.iter().filter(|w| w.key == *key && w.life == row.life);
                let counted: Vec<_> = of_row
                    .flat_map(|w| &w.counted)
                    .filter(|c| c.0 == *cell && Some(&c.1) == row.bases.get(cell))
                    .collect();
                let set = counted.iter().find_map(|c| c.2).ok_or("a counter that was never set")?;
                let sum = set + counted.iter().map(|c| c.3).sum::<i64>();
                if sum != number(*value) {
                    return Err(format!("counter {cell} of {key} should be {sum}, not {}: {row:?}", number(*value)));
                }
            }
        }
        Ok(())
    }

    /// After the last acknowledgement nothing is listed any more, but for what was added to counters.
    pub fn collected(&self, node: &Node) -> Check {
        let listed = |row: &Stored| !Versions { counters: vec![], ..row.versions.clone() }.is_empty();
        match node.rows.iter().find(|(_, r)| !r.live || listed(r)) {
            Some((key, row)) => Err(format!("not collected: {key}: {row:?}, {:?}", node.stable)),
            None => Ok(()),
        }
    }
}
