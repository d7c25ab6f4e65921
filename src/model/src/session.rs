//! The exchange as a state machine without I/O: `step(now, event) -> actions`.
//!
//! The driver owns link, queue and applier and does what it is told; it holds the received transactions
//! in a queue, of which this machine knows the marks and sizes. Time is milliseconds of any clock that
//! never goes back.
//!
//! What must hold: positions only rise; a transaction is applied once, in order, whole; a watermark counts
//! after everything that came before it is applied; at most one request is under way and at most two
//! replies are held; a silent peer is noticed; no failure is retried without a pause.
use crate::descriptor::Descriptor;
use crate::hlc::{Hlc, Mark, Position};
use crate::wire::{DecodeError, Frame};
use std::collections::VecDeque;

/// How much, how often, how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Source transactions in one local commit.
    pub batch_transactions: usize,
    /// Bytes that one request asks for.
    pub batch_bytes: usize,
    /// How long (ms) a request may wait at the peer for something to tell.
    pub poll_ms: i64,
    /// How long (ms) beyond that the peer may be silent.
    pub peer_timeout_ms: i64,
    /// Longest pause (ms) between two attempts to reach the peer, or to apply what needs the operator.
    pub max_delay_ms: i64,
}

/// First pause (ms) between two attempts; it doubles.
const FIRST_DELAY_MS: i64 = 100;
/// First and longest pause (ms) before applying is tried again after a failure that goes away by itself.
const FIRST_RETRY_MS: i64 = 20;
const LONGEST_RETRY_MS: i64 = 1_000;
/// Pace (ms) of requests for acknowledgements while nothing is applied.
const IDLE_PACE_MS: i64 = 1_000;

/// What has happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// Time has passed, or the catalog has changed.
    Tick,
    /// Connected, and the two nodes go together; the stream goes on above this mark.
    Ready(Mark),
    /// A row of a reply.
    Frame(Frame<'a>),
    /// A reply is complete.
    ReplyEnded,
    /// The link is gone, could not be made, or the peer answered with an error.
    Lost,
    /// The first so many transactions of the queue are applied, or passed over.
    Applied(usize),
    /// Applying failed; `retry`: it goes away by itself, and soon.
    ApplyFailed { retry: bool },
    /// Whether this node's applying is paused.
    Paused(bool),
    /// What applying waits for may have been mended: try at once.
    Retry,
}

/// What the driver has to do, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect and shake hands; then `Ready` or `Lost`.
    Connect,
    /// Close the link; the queue and a half-received transaction are forgotten.
    Disconnect,
    /// Ask for the stream above `after`; `bytes` 0: only for what the peer acknowledges.
    Request { after: Position, chunks_done: u32, bytes: usize },
    /// Tell the applier of a table's shape.
    Describe(Descriptor),
    /// Put this transaction (the frame at hand) at the end of the queue.
    Queue { mark: Mark, seen: Mark, stable: Hlc, items: Vec<u8> },
    /// Open a spool for a large transaction.
    Spool { mark: Mark, seen: Mark, stable: Hlc },
    /// Append to the spool.
    Chunk(Vec<u8>),
    /// The spool is whole: put it at the end of the queue.
    QueueSpool,
    /// Apply the first so many of the queue in one commit; then `Applied` or `ApplyFailed`.
    Apply(usize),
    /// Everything before it is applied: acknowledgement and stable point are in force.
    Watermark { mark: Mark, seen: Mark, stable: Hlc },
    /// The peer has our stream up to here; nothing else follows from it.
    Acknowledged(Position),
}

/// The peer did what it must not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl From<Violation> for DecodeError {
    fn from(v: Violation) -> DecodeError {
        DecodeError { what: "stream", why: v.0 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not connected; tries at this time.
    Waiting(i64),
    Connecting,
    Open,
}

/// A request under way.
#[derive(Debug, Clone, Copy)]
struct Request {
    /// The peer is dead if nothing was heard by then.
    deadline: i64,
    /// It asked for acknowledgements only.
    idle: bool,
}

/// A large transaction of which not all is there.
#[derive(Debug, Clone, Copy)]
struct Partial {
    mark: Mark,
    chunks: u32,
    done: u32,
}

/// A transaction in the driver's queue, or a watermark between two of them.
#[derive(Debug, Clone, Copy)]
enum Held {
    Transaction { bytes: usize },
    Watermark { mark: Mark, seen: Mark, stable: Hlc },
}

/// One node's side of taking the stream of its peer.
#[derive(Debug)]
pub struct Session {
    limits: Limits,
    phase: Phase,
    failures: u32,
    /// The last transaction that is received whole.
    received: Mark,
    partial: Option<Partial>,
    request: Option<Request>,
    /// No request for mere acknowledgements before this time.
    next_request: i64,
    held: VecDeque<Held>,
    held_bytes: usize,
    reply_bytes: usize,
    /// The last reply was as large as it may be: more is to come.
    behind: bool,
    paused: bool,
    applying: bool,
    /// Transactions to apply in one commit: 1 after a failure, then doubling.
    at_once: usize,
    apply_failures: u32,
    apply_at: i64,
}

impl Session {
    pub fn new(limits: Limits, now: i64) -> Session {
        Session {
            limits,
            phase: Phase::Waiting(now),
            failures: 0,
            received: Mark::default(),
            partial: None,
            request: None,
            next_request: now,
            held: VecDeque::new(),
            held_bytes: 0,
            reply_bytes: 0,
            behind: false,
            paused: false,
            applying: false,
            at_once: limits.batch_transactions.max(1),
            apply_failures: 0,
            apply_at: now,
        }
    }

    /// New limits, from the next step on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.at_once = self.at_once.min(limits.batch_transactions).max(1);
    }

    /// True while the peer has more than one reply that is not here.
    pub fn is_behind(&self) -> bool {
        self.behind || self.partial.is_some() || self.apply_failures > 0
    }

    /// True if everything that was received is applied and nothing is due.
    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.partial.is_none()
    }

    /// True while connected and shaken hands.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// How long (ms) until something is due though nothing happens.
    pub fn due_in(&self, now: i64) -> i64 {
        let due = match self.phase {
            Phase::Waiting(until) => until,
            Phase::Connecting => now,
            Phase::Open => {
                let ask = if self.is_stuck() { self.next_request } else { now };
                let request = self.request.map_or(ask, |r| r.deadline);
                let apply = if self.held.is_empty() || self.paused { i64::MAX } else { self.apply_at };
                request.min(apply)
            }
        };
        (due - now).max(0)
    }

    /// Takes an event; errors if the peer broke the protocol (then the link is to be given up: `Lost`).
    pub fn step(&mut self, now: i64, event: Event<'_>) -> Result<Vec<Action>, Violation> {
        let mut actions = Vec::new();
        match event {
            Event::Tick => {}
            Event::Ready(mark) => self.open(mark, now),
            Event::Frame(frame) => {
                self.heard(now);
                self.take(frame, &mut actions)?;
            }
            Event::ReplyEnded => self.reply_ended(now)?,
            Event::Lost => self.lost(now, &mut actions),
            Event::Applied(count) => self.applied(count, now),
            Event::ApplyFailed { retry } => self.apply_failed(retry, now),
            Event::Paused(paused) => self.paused = paused,
            Event::Retry => {
                self.apply_at = now;
                if let Phase::Waiting(until) = &mut self.phase {
                    *until = now;
                }
            }
        }
        self.proceed(now, &mut actions);
        Ok(actions)
    }

    fn open(&mut self, mark: Mark, now: i64) {
        self.phase = Phase::Open;
        self.received = mark;
        self.next_request = now;
        self.behind = true;
        self.apply_failures = 0;
        self.apply_at = now;
    }

    fn heard(&mut self, now: i64) {
        if let Some(request) = &mut self.request {
            request.deadline = now + self.limits.peer_timeout_ms;
        }
    }

    fn lost(&mut self, now: i64, actions: &mut Vec<Action>) {
        self.phase = Phase::Waiting(now + backoff(FIRST_DELAY_MS, self.limits.max_delay_ms, self.failures));
        self.failures = self.failures.saturating_add(1);
        self.forget();
        actions.push(Action::Disconnect);
    }

    /// What was received and not applied comes again on the next link.
    fn forget(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
        self.partial = None;
        self.request = None;
        self.reply_bytes = 0;
        self.applying = false;
    }

    fn take(&mut self, frame: Frame<'_>, actions: &mut Vec<Action>) -> Result<(), Violation> {
        let Some(request) = self.request else { return Err(Violation("nothing was asked for".into())) };
        match frame {
            Frame::Descriptor(descriptor) => actions.push(Action::Describe(descriptor)),
            Frame::Transaction { mark, seen, stable, chunks, items } => {
                if self.partial.is_some() {
                    return Err(Violation("a transaction begins within another".into()));
                }
                if mark.position <= self.received.position {
                    return Err(Violation(format!("{} comes after {}", mark.position, self.received.position)));
                }
                self.reply_bytes += items.len();
                if chunks > 0 {
                    self.partial = Some(Partial { mark, chunks, done: 0 });
                    actions.push(Action::Spool { mark, seen, stable });
                    return Ok(());
                }
                self.received = mark;
                self.hold(items.len());
                actions.push(Action::Queue { mark, seen, stable, items: items.to_vec() });
            }
            Frame::Chunk { position, index, items } => {
                let Some(partial) = self.partial.as_mut() else {
                    return Err(Violation("a part of no transaction".into()));
                };
                if position != partial.mark.position || index != partial.done {
                    return Err(Violation(format!("part {index} of {position} is out of turn")));
                }
                partial.done += 1;
                let whole = (partial.done == partial.chunks).then_some(partial.mark);
                self.reply_bytes += items.len();
                actions.push(Action::Chunk(items.to_vec()));
                if let Some(mark) = whole {
                    self.partial = None;
                    self.received = mark;
                    self.hold(0);
                    actions.push(Action::QueueSpool);
                }
            }
            Frame::Watermark { seen, .. } if request.idle => actions.push(Action::Acknowledged(seen.position)),
            Frame::Watermark { mark, seen, stable } => {
                if mark.position != self.received.position {
                    return Err(Violation(format!(
                        "a watermark at {} after {}",
                        mark.position, self.received.position
                    )));
                }
                self.received.low = self.received.low.max(mark.low);
                self.held.push_back(Held::Watermark { mark: self.received, seen, stable });
            }
        }
        Ok(())
    }

    fn hold(&mut self, bytes: usize) {
        self.held.push_back(Held::Transaction { bytes });
        self.held_bytes += bytes;
    }

    fn reply_ended(&mut self, now: i64) -> Result<(), Violation> {
        let Some(request) = self.request.take() else { return Err(Violation("nothing was asked for".into())) };
        self.failures = 0;
        if !request.idle {
            self.behind = self.reply_bytes >= self.limits.batch_bytes;
        }
        self.reply_bytes = 0;
        self.next_request = now + IDLE_PACE_MS;
        Ok(())
    }

    fn applied(&mut self, count: usize, now: i64) {
        self.was_busy(now);
        self.apply_failures = 0;
        self.apply_at = now;
        self.at_once = (self.at_once * 2).min(self.limits.batch_transactions).max(1);
        let mut left = count;
        while left > 0 {
            match self.held.pop_front() {
                Some(Held::Transaction { bytes }) => {
                    self.held_bytes -= bytes;
                    left -= 1;
                }
                Some(Held::Watermark { .. }) => {}
                None => break,
            }
        }
    }

    /// The driver was applying and did not listen: the peer gets its time anew.
    fn was_busy(&mut self, now: i64) {
        self.applying = false;
        if let Some(request) = &mut self.request {
            request.deadline = request.deadline.max(now + self.limits.peer_timeout_ms);
        }
    }

    fn apply_failed(&mut self, retry: bool, now: i64) {
        self.was_busy(now);
        // One at a time from here on, so that what is in order before the failing one gets applied.
        self.at_once = 1;
        let delay = match retry {
            true => backoff(FIRST_RETRY_MS, LONGEST_RETRY_MS, self.apply_failures),
            false => backoff(FIRST_DELAY_MS, self.limits.max_delay_ms, self.apply_failures),
        };
        self.apply_failures = self.apply_failures.saturating_add(1);
        self.apply_at = now + delay;
    }

    /// Everything that can be done now.
    fn proceed(&mut self, now: i64, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Waiting(until) if now >= until => {
                self.phase = Phase::Connecting;
                actions.push(Action::Connect);
                return;
            }
            Phase::Open => {}
            _ => return,
        }
        if self.request.is_some_and(|r| now >= r.deadline) {
            self.lost(now, actions);
            return;
        }
        // Ask for the next before this one is applied.
        self.ask(now, actions);
        // Only between replies: the rest of this one is on its way.
        let (idle, mid_reply) = (self.request.is_some_and(|r| r.idle), self.reply_bytes > 0);
        if !self.paused && !self.applying && (!mid_reply || idle) {
            self.apply(now, actions);
        }
    }

    fn ask(&mut self, now: i64, actions: &mut Vec<Action>) {
        let stuck = self.is_stuck();
        if self.request.is_some() || (stuck && now < self.next_request) {
            return;
        }
        self.request = Some(Request { deadline: now + self.limits.poll_ms + self.limits.peer_timeout_ms, idle: stuck });
        actions.push(Action::Request {
            after: self.received.position,
            chunks_done: self.partial.map_or(0, |p| p.done),
            bytes: if stuck { 0 } else { self.limits.batch_bytes.max(1) },
        });
    }

    /// Nothing more is to be fetched: what is here can't be applied.
    fn is_stuck(&self) -> bool {
        let full = self.held_bytes >= self.limits.batch_bytes.saturating_mul(2).max(1);
        self.paused || full || (self.apply_failures > 0 && !self.held.is_empty())
    }

    fn apply(&mut self, now: i64, actions: &mut Vec<Action>) {
        while let Some(Held::Watermark { mark, seen, stable }) = self.held.front().copied() {
            self.held.pop_front();
            actions.push(Action::Watermark { mark, seen, stable });
        }
        if self.held.is_empty() || now < self.apply_at {
            return;
        }
        // Watermarks in between are passed over by the transactions that follow them.
        let (mut count, mut bytes) = (0, 0);
        for held in &self.held {
            let Held::Transaction { bytes: size } = held else { continue };
            if count == self.at_once || (count > 0 && bytes + size > self.limits.batch_bytes) {
                break;
            }
            count += 1;
            bytes += size;
        }
        self.applying = true;
        actions.push(Action::Apply(count));
    }
}

fn backoff(first: i64, longest: i64, failures: u32) -> i64 {
    first.saturating_mul(1 << failures.min(20)).min(longest.max(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_bytes::Bytes;

    const LIMITS: Limits = Limits {
        batch_transactions: 10,
        batch_bytes: 100,
        poll_ms: 1_000,
        peer_timeout_ms: 2_000,
        max_delay_ms: 5_000,
    };

    fn mark(position: u64) -> Mark {
        Mark { position: Position(position), low: Hlc(position) }
    }

    fn transaction(position: u64, chunks: u32) -> Event<'static> {
        let items = Bytes::new(b"0123456789");
        Event::Frame(Frame::Transaction { mark: mark(position), seen: mark(0), stable: Hlc(0), chunks, items })
    }

    fn watermark(position: u64) -> Event<'static> {
        Event::Frame(Frame::Watermark { mark: mark(position), seen: mark(7), stable: Hlc(3) })
    }

    fn request(after: u64, chunks_done: u32, bytes: usize) -> Action {
        Action::Request { after: Position(after), chunks_done, bytes }
    }

    fn noted(position: u64) -> Action {
        Action::Watermark { mark: mark(position), seen: mark(7), stable: Hlc(3) }
    }

    /// A session that is connected, its first request sent.
    fn open() -> Session {
        let mut session = Session::new(LIMITS, 0);
        assert_eq!(session.step(0, Event::Tick), Ok(vec![Action::Connect]));
        assert_eq!(session.step(0, Event::Ready(mark(5))), Ok(vec![request(5, 0, 100)]));
        session
    }

    fn run(session: &mut Session, now: i64, events: Vec<Event<'_>>) -> Vec<Action> {
        events.into_iter().flat_map(|e| session.step(now, e).expect("the peer keeps to the protocol")).collect()
    }

    #[test]
    fn the_next_batch_is_asked_for_before_this_one_is_applied() {
        let mut s = open();
        let actions = run(&mut s, 1, vec![transaction(6, 0), transaction(8, 0), watermark(8), Event::ReplyEnded]);
        assert_eq!(actions[2..], [request(8, 0, 100), Action::Apply(2)]);
        assert_eq!(run(&mut s, 2, vec![Event::Applied(2)]), [noted(8)]);
        assert!(s.is_idle());
    }

    #[test]
    fn what_is_out_of_order_is_refused() {
        assert!(open().step(1, transaction(5, 0)).is_err());
        assert!(open().step(1, watermark(9)).is_err());
        assert!(
            open()
                .step(1, Event::Frame(Frame::Chunk { position: Position(6), index: 0, items: Bytes::new(b"") }))
                .is_err()
        );
        let mut s = open();
        run(&mut s, 1, vec![transaction(6, 2)]);
        assert!(s.step(1, transaction(7, 0)).is_err());
    }

    #[test]
    fn a_large_transaction_goes_on_in_the_next_reply() {
        let mut s = open();
        let chunk = |index| Event::Frame(Frame::Chunk { position: Position(6), index, items: Bytes::new(b"x") });
        let actions = run(&mut s, 1, vec![transaction(6, 2), chunk(0), watermark(5), Event::ReplyEnded]);
        assert_eq!(actions[2..], [request(5, 1, 100), noted(5)]);
        let actions = run(&mut s, 2, vec![chunk(1), watermark(6), Event::ReplyEnded]);
        assert_eq!(actions[1..], [Action::QueueSpool, request(6, 0, 100), Action::Apply(1)]);
    }

    #[test]
    fn failures_wait_longer_each_time_and_go_on_one_by_one() {
        let mut s = open();
        run(&mut s, 1, vec![transaction(6, 0), transaction(7, 0), watermark(7), Event::ReplyEnded]);
        assert_eq!(run(&mut s, 2, vec![Event::ApplyFailed { retry: true }, Event::Tick]), []);
        assert_eq!(run(&mut s, 22, vec![Event::Tick]), [Action::Apply(1)]);
        assert_eq!(run(&mut s, 23, vec![Event::Applied(1)]), [Action::Apply(1)]);
        assert_eq!(run(&mut s, 24, vec![Event::Applied(1)]), [noted(7)]);
        let mut s = open();
        assert_eq!(run(&mut s, 9, vec![Event::Lost, Event::Tick]), [Action::Disconnect]);
        assert_eq!(s.due_in(9), 100);
        assert_eq!(run(&mut s, 109, vec![Event::Tick]), [Action::Connect]);
        assert_eq!(run(&mut s, 109, vec![Event::Lost]), [Action::Disconnect]);
        assert_eq!(s.due_in(109), 200);
    }

    #[test]
    fn a_silent_peer_is_given_up() {
        let mut s = open();
        assert_eq!(run(&mut s, 2_999, vec![Event::Tick]), []);
        assert_eq!(run(&mut s, 3_000, vec![Event::Tick]), [Action::Disconnect]);
    }

    #[test]
    fn a_paused_node_applies_nothing_and_hears_acknowledgements() {
        let mut s = open();
        run(&mut s, 1, vec![Event::Paused(true), transaction(6, 0)]);
        assert_eq!(run(&mut s, 2, vec![watermark(6), Event::ReplyEnded]), []);
        assert_eq!(run(&mut s, 1_002, vec![Event::Tick]), [request(6, 0, 0)]);
        assert_eq!(run(&mut s, 1_003, vec![watermark(6)]), [Action::Acknowledged(Position(7))]);
        assert_eq!(run(&mut s, 1_004, vec![Event::ReplyEnded]), []);
        assert_eq!(run(&mut s, 1_005, vec![Event::Paused(false)]), [request(6, 0, 100), Action::Apply(1)]);
    }
}
