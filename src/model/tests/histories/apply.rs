//! The receiving side: a frame at a time, judged, executed, and judged again.
use crate::node::{Check, Key, Node, Rule};
use crate::world::{World, counted, parse, value_of};
use serde_bytes::Bytes;
use std::collections::BTreeMap;
use tandem_model::change::{Change, Item, Op};
use tandem_model::hlc::Hlc;
use tandem_model::judge::{Effect, Existence, Loss, RowState, Verdict, judge};
use tandem_model::policy::{Policies, Policy};
use tandem_model::record::{Decision, Record, Status};
use tandem_model::versions::CellId;
use tandem_model::wire::{Frame, items};

impl Node {
    /// Takes the next frame; false if there is none or it has to wait for a local lock.
    pub fn apply_next(&mut self, w: &mut World) -> Check<bool> {
        let Some(bytes) = self.inbox.pop_front() else {
            return Ok(false);
        };
        match Frame::decode(&bytes).map_err(|e| e.to_string())? {
            Frame::Watermark { seen, stable, .. } => self.acknowledge(seen, stable),
            Frame::Transaction { mark, seen, stable, items: body, .. } => {
                let body: Vec<_> = items(body).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
                let blocked = body.iter().any(|i| matches!(i, Item::Change(c) if self.locked(w.key_of(c))));
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
                        Item::Truncate { .. } | Item::Policy { .. } => {}
                    }
                }
                if !found.is_empty() {
                    let json: Vec<_> = found.iter().map(|r| serde_json::to_vec(r).expect("json")).collect();
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
        change.check(self.stable.peer.0).map_err(|e| e.to_string())?;
        if self.stable.covers(change.version) || change.cells.iter().any(|c| self.stable.covers(c.version)) {
            return Err("a stable point above something that was still to come".into());
        }
        self.clock.observe(w.wall, change.version.0);
        let mut change = change.clone();
        if let (Rule::Mix, Some(row)) = (self.rule, self.rows.get(&key)) {
            change.life = row.versions.birth;
            change.op = if change.op == Op::Insert { Op::Update } else { change.op };
        }
        if self.rule == Rule::DeltasAreValues {
            change.cells.iter_mut().for_each(|c| c.delta = None);
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
        let mut row = self.rows.remove(&key).unwrap_or_default();
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
            let added = |a: &str, b: &str| Ok::<_, String>((parse(a) + parse(b)).to_string());
            let value = match verdict.versions.counter(cell.cell) {
                Some(counter) => counted(parse(&counter.value(added)?)),
                None => value_of(cell),
            };
            row.values.insert(cell.cell, value);
            match cell.delta {
                None => drop(row.bases.insert(cell.cell, cell.version)),
                Some(delta) if delta.sets => drop(row.bases.insert(cell.cell, delta.base)),
                Some(_) => {}
            }
        }
        let before = row.hlc;
        (row.hlc, row.versions) = (verdict.hlc, verdict.versions);
        match self.rule {
            Rule::ForgetEnded => row.versions.ended.clear(),
            Rule::LowHlc => {
                let versions = row.versions.cells.iter().map(|c| c.1).chain([row.versions.birth, row.versions.dead]);
                row.hlc = versions.max().unwrap_or_default();
            }
            _ => {}
        }
        // Under `node_priority` it doesn't fall with a new life either.
        let new_life = change.op == Op::Insert && !matches!(self.policies.existence, Policy::NodePriority(_));
        if row.hlc < before && !new_life {
            return Err(format!("_hlc falls from {before} to {} by {change:?}", row.hlc));
        }
        if self.rule == Rule::Eager && row.live {
            let mut eager = self.stable;
            eager.peer.1 = Hlc(u64::MAX);
            row.versions.trim(&eager);
        }
        self.rows.insert(key, row);
        if self.rule == Rule::Sound {
            let again = self.judge(key, &change);
            let known = |l: &Loss| verdict.losses.iter().any(|k| (k.losing, k.conflict) == (l.losing, l.conflict));
            if again.effect != Effect::Keep || !again.losses.iter().all(known) {
                return Err(format!(
                    "not idempotent: {change:?}: {verdict_text:?}, then {again:?}",
                    verdict_text = verdict.effect
                ));
            }
        }
        Ok(())
    }
    fn judge(&self, key: Key, change: &Change<'_>) -> Verdict {
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
            let new = change.cells.iter().find(|c| c.cell == id).map(value_of);
            new.is_some() && new == held.and_then(|r| r.values.get(&id).copied())
        };
        let mut policies = self.policies.clone();
        if self.rule == Rule::LaterLife && change.op == Op::Insert {
            policies.existence = Policies::default().existence;
        }
        judge(&state, change, &self.stable, &policies, &mut same)
    }
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
        rival: None,
        cells: loss.cells.iter().map(|c| c.to_string()).collect(),
        lost: BTreeMap::new(),
        replaced: BTreeMap::new(),
        overruled: BTreeMap::new(),
        base: None,
        tuples: BTreeMap::new(),
        result: None,
        policy: "last_update_wins".into(),
        detected_at: 0,
        decision: Decision { version: Hlc(0), status: Status::Auto, by: None, at: None, resolution: None, note: None },
    }
}
