//! The sending side: the commit protocol and the replies of the exchange.
//!
//! Steps are as small as their interleavings matter: a commit reads `seen` and the clock, scans the
//! registry, takes its position and becomes visible in four steps; a reply is begun and finished.
use crate::node::{Entry, Node, Phase, Rule, Stored};
use crate::world::World;
use serde_bytes::Bytes;
use tandem_model::change::{Item, Op};
use tandem_model::hlc::{Hlc, Mark, Position};
use tandem_model::net::net;
use tandem_model::policy::Policy;
use tandem_model::wire::{Frame, push_item};

impl Node {
    /// The next step of a commit; true when it is visible.
    pub fn commit_step(&mut self, w: &mut World, tx: usize) -> bool {
        let (clock, seen) = (self.clock.read(), self.applied);
        self.open[tx].phase = match self.open[tx].phase {
            Phase::Open => Phase::Read { clock, seen },
            Phase::Read { clock, seen } => Phase::Scanned { low: self.low(clock, Some(tx)), seen },
            Phase::Scanned { low, seen } => {
                let low = if self.rule == Rule::LateClock { Hlc(low.0.min(clock)) } else { low };
                let position = self.clock.tick_position(w.wall + self.skew, self.id);
                Phase::Positioned { mark: Mark { position, low }, seen }
            }
            Phase::Positioned { mark, seen } => {
                let seen = if self.rule == Rule::LateSeenCommit { self.applied } else { seen };
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
    pub fn low(&self, clock: u64, except: Option<usize>) -> Hlc {
        if self.rule == Rule::NoScan {
            return Hlc(clock);
        }
        let others = self.open.iter().enumerate().filter(|(i, _)| Some(*i) != except);
        let firsts = others.filter_map(|(_, t)| t.first).map(|first| first.0 - 1);
        // The broken order: what the scan found counts, the clock's reading comes later.
        let clock = if self.rule == Rule::LateClock { u64::MAX } else { clock };
        Hlc(firsts.min().unwrap_or(u64::MAX).min(clock))
    }
    fn finish_commit(&mut self, w: &mut World, tx: usize, mark: Mark, seen: Mark) {
        let tx = self.open.remove(tx);
        let changes = net(tx.changes);
        for change in &changes {
            let key = w.key_of(change);
            let of = if change.op == Op::Delete { tx.before[&key].as_ref() } else { self.rows.get(&key) };
            let counts = |c| self.policies.cell(c) == &Policy::Counter;
            w.committed(self.id, mark.position, tx.knew[&key], change, of, counts);
        }
        for (key, before) in tx.before {
            // The tombstones that `net` wants: see its table.
            let Some(after) = self.rows.get(&key).filter(|row| !row.live) else {
                continue;
            };
            let dead = after.versions.dead;
            match before {
                Some(before) if before.live && self.rule != Rule::LeakyTombstone => {
                    let mut row = Stored { live: false, hlc: dead, ..before };
                    row.versions.end(dead);
                    self.rows.insert(key, row);
                }
                Some(before) if before.live => {}
                before => self.put(key, before),
            }
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
        let frame = Frame::Transaction { mark, seen, stable, chunks: 0, items: Bytes::new(&body) }.encode();
        self.log.insert(mark.position, Entry { mark, frame });
    }
    /// A transaction of the apply worker: records, or nothing (a heartbeat).
    pub fn worker_commit(&mut self, w: &World, seen: Mark, items: &[Item<'_>]) {
        let clock = self.clock.read();
        let low = Hlc(self.low(clock, None).0.min(clock));
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
        let seen = if self.rule == Rule::LateSeenWatermark { self.applied } else { seen };
        let upto = self.log.range(..=Position(horizon)).next_back().map(|e| e.1.mark).unwrap_or_default();
        let new = self.log.range(Position(self.sent.0 + 1)..).take_while(|e| e.0.0 <= horizon);
        let mut frames: Vec<_> = new.map(|e| e.1.frame.clone()).collect();
        self.sent = self.sent.max(upto.position);
        frames.push(Frame::Watermark { mark: upto, seen, stable: self.stable.own.1 }.encode());
        frames
    }

    pub fn acknowledge(&mut self, seen: Mark, stable: Hlc) {
        let point = match self.rule {
            Rule::NaiveStable => seen.position.0,
            _ => seen.low.0.min(seen.position.0),
        };
        self.stable.own.1 = self.stable.own.1.max(Hlc(point));
        self.stable.peer.1 = self.stable.peer.1.max(stable);
    }
}
