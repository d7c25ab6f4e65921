//! How the session steps: its state, and what each event does to it.
//!
//! `fetched` runs ahead of `applied` by what is being applied and what is ready; on a lost link it falls
//! back to what was handed over, so nothing is fetched twice or left out.
use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    Connecting,
    Handshake,
    Refused,
    Up,
}

/// Transactions that are here whole, and the watermark behind them.
#[derive(Debug, Clone, Copy)]
struct Batch {
    upto: Position,
    watermark: Option<Watermark>,
}

/// The reply that is asked for.
#[derive(Debug, Clone, Copy, Default)]
struct Reply {
    /// Only a wait, as a sign of life: no frames follow.
    probe: bool,
    waited: bool,
    bytes: u64,
    whole: bool,
    watermark: Option<Watermark>,
}

/// A transaction whose chunks are still coming.
#[derive(Debug, Clone, Copy)]
struct Partial {
    position: Position,
    next: u32,
    chunks: u32,
}

/// The state of one exchange; see [`crate::session`].
pub struct Session {
    limits: Limits,
    link: Link,
    state: State,
    stopped: bool,
    paused: bool,
    joined: bool,
    horizon: Position,
    /// Applied here, durably.
    applied: Position,
    /// The last position that is here whole.
    fetched: Position,
    applying: Option<Batch>,
    /// The apply failed and waits for its time.
    failed: Option<Failure>,
    ready: Option<Batch>,
    reply: Option<Reply>,
    partial: Option<Partial>,
    connect_failures: u32,
    apply_failures: u32,
}

impl Session {
    /// A session that goes on after what is applied; it waits for [`Event::Start`].
    pub fn new(applied: Position, limits: Limits) -> Session {
        Session {
            limits,
            link: Link::Down,
            state: State::Stopped,
            stopped: true,
            paused: false,
            joined: false,
            horizon: Position(0),
            applied,
            fetched: applied,
            applying: None,
            failed: None,
            ready: None,
            reply: None,
            partial: None,
            connect_failures: 0,
            apply_failures: 0,
        }
    }
    /// What is applied, as far as the events told.
    pub fn applied(&self) -> Position {
        self.applied
    }
    /// The state last announced.
    pub fn state(&self) -> State {
        self.state
    }

    /// What an event leads to. Events that don't fit the state (a late timer, say) lead to nothing.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match (event, self.link) {
            (Event::Start, Link::Down) if self.stopped => {
                self.stopped = false;
                self.connect(&mut out);
            }
            (Event::Connected, Link::Connecting) => {
                self.link = Link::Handshake;
                out.push(Action::Handshake);
            }
            (Event::HandshakeReply(facts), Link::Handshake) => {
                (self.joined, self.horizon) = (facts.joined, facts.horizon);
                self.link = Link::Up;
            }
            (Event::HandshakeRefused, Link::Handshake) => {
                self.drop_link(&mut out);
                self.link = Link::Refused;
                out.push(Action::SetTimer(Alarm::Reconnect, self.limits.backoff_ms.1));
            }
            (Event::Joined { position }, _) => {
                self.joined = true;
                self.applied = self.applied.max(position);
                self.fetched = self.fetched.max(position);
            }
            (Event::ConnectFailed, Link::Connecting)
            | (Event::LinkLost, Link::Connecting | Link::Handshake | Link::Up) => {
                self.lose_link(&mut out)
            }
            (Event::Timer(Alarm::Reconnect), Link::Down | Link::Refused) if !self.stopped => {
                self.connect(&mut out);
            }
            (Event::WaitDone, Link::Up) => match &mut self.reply {
                Some(reply) if reply.probe => self.reply = None,
                Some(reply) => reply.waited = true,
                None => self.fail(Fault::Unasked, &mut out),
            },
            (Event::Frame(frame), Link::Up) => {
                if let Err(fault) = self.receive(frame, &mut out) {
                    self.fail(fault, &mut out);
                }
            }
            (Event::ReplyEnd, Link::Up) => {
                if let Err(fault) = self.end_reply(&mut out) {
                    self.fail(fault, &mut out);
                }
            }
            (Event::Applied { position }, _) => self.note_applied(position, &mut out),
            (Event::ApplyFailed(failure), _) if self.applying.is_some() => {
                self.apply_failures += 1;
                self.failed = Some(failure);
                let delay = match failure {
                    Failure::Retry => self.backoff(self.apply_failures),
                    Failure::Operator => self.limits.backoff_ms.1,
                };
                out.push(Action::SetTimer(Alarm::Retry, delay));
            }
            (Event::Timer(Alarm::Retry), _) if !self.paused => self.apply_again(&mut out),
            (Event::Pause, _) => self.paused = true,
            (Event::Resume, _) => {
                self.paused = false;
                self.apply_again(&mut out);
            }
            (Event::Stop, _) if !self.stopped => {
                self.stopped = true;
                self.drop_link(&mut out);
            }
            _ => {}
        }
        self.go_on(&mut out);
        let state = self.state_now();
        if state != self.state {
            self.state = state;
            out.push(Action::Announce(state));
        }
        out
    }

    fn state_now(&self) -> State {
        match self.link {
            _ if self.stopped => State::Stopped,
            Link::Refused => State::Refused,
            Link::Down | Link::Connecting => State::Connecting,
            Link::Handshake => State::Handshake,
            Link::Up if !self.joined => State::Joining,
            Link::Up if self.paused => State::Paused,
            Link::Up if self.failed == Some(Failure::Operator) => State::Stopped,
            Link::Up if self.applied < self.horizon => State::Catchup,
            Link::Up => State::Streaming,
        }
    }

    /// Hands over what is ready, and asks for what comes next.
    fn go_on(&mut self, out: &mut Vec<Action>) {
        if self.stopped {
            return;
        }
        if self.applying.is_none() && !self.paused {
            self.applying = self.ready.take();
            out.extend(
                self.applying
                    .map(|batch| Action::Apply { upto: batch.upto }),
            );
        }
        if self.link != Link::Up || !self.joined || self.reply.is_some() {
            return;
        }
        if self.ready.is_none() || self.partial.is_some() {
            let chunk = self.partial.map_or(0, |p| p.next);
            out.push(Action::RequestWait {
                after: self.fetched,
            });
            out.push(Action::RequestPull {
                after: self.fetched,
                chunk,
            });
            self.reply = Some(Reply::default());
        } else if self.paused {
            out.push(Action::RequestWait {
                after: Position(u64::MAX),
            });
            self.reply = Some(Reply {
                probe: true,
                ..Reply::default()
            });
        }
    }

    fn receive(&mut self, frame: FrameFacts, out: &mut Vec<Action>) -> Result<(), Fault> {
        let batch_bytes = self.limits.batch_bytes;
        let reply = self
            .reply
            .as_mut()
            .filter(|r| r.waited && r.watermark.is_none());
        let reply = reply.ok_or(Fault::Unasked)?;
        let mut buffer = |len: u64, out: &mut Vec<Action>| {
            if reply.bytes > batch_bytes {
                return Err(Fault::TooLarge(batch_bytes));
            }
            reply.bytes = reply.bytes.saturating_add(len);
            out.push(Action::Buffer);
            Ok(())
        };
        match (frame, &mut self.partial) {
            (FrameFacts::Descriptor { len }, _) => buffer(len, out)?,
            (FrameFacts::Transaction { .. }, Some(partial)) => {
                return Err(Fault::CutShort(partial.position));
            }
            (
                FrameFacts::Transaction {
                    mark: Mark { position, .. },
                    chunks,
                    len,
                },
                None,
            ) => {
                if position <= self.fetched {
                    return Err(Fault::NotRising {
                        got: position,
                        last: self.fetched,
                    });
                }
                if chunks == 0 {
                    buffer(len, out)?;
                    (self.fetched, reply.whole) = (position, true);
                } else {
                    out.push(Action::Spool);
                    self.partial = Some(Partial {
                        position,
                        next: 0,
                        chunks,
                    });
                }
            }
            (
                FrameFacts::Chunk {
                    position, index, ..
                },
                Some(partial),
            ) if (partial.position, partial.next) == (position, index) => {
                out.push(Action::Spool);
                partial.next += 1;
                if partial.next == partial.chunks {
                    (self.fetched, self.partial, reply.whole) = (position, None, true);
                }
            }
            (
                FrameFacts::Chunk {
                    position, index, ..
                },
                _,
            ) => return Err(Fault::WrongChunk { position, index }),
            (FrameFacts::Watermark(watermark), partial) => {
                let got = watermark.mark.position;
                if got < self.fetched {
                    return Err(Fault::NotRising {
                        got,
                        last: self.fetched,
                    });
                }
                if let Some(partial) = partial.filter(|p| got >= p.position) {
                    return Err(Fault::CutShort(partial.position));
                }
                reply.watermark = Some(watermark);
            }
        }
        Ok(())
    }

    fn end_reply(&mut self, out: &mut Vec<Action>) -> Result<(), Fault> {
        let reply = self.reply.filter(|r| r.waited).ok_or(Fault::Unasked)?;
        let watermark = reply.watermark.ok_or(Fault::NoWatermark)?;
        (self.reply, self.connect_failures) = (None, 0);
        if reply.whole {
            self.ready = Some(Batch {
                upto: self.fetched,
                watermark: Some(watermark),
            });
        } else if let Some(before) = self.ready.as_mut().or(self.applying.as_mut()) {
            before.watermark = Some(watermark);
        } else {
            self.note(watermark, out);
        }
        self.fetched = self.fetched.max(watermark.mark.position);
        Ok(())
    }

    fn note(&mut self, watermark: Watermark, out: &mut Vec<Action>) {
        self.applied = self.applied.max(watermark.mark.position);
        out.push(Action::NoteWatermark(watermark));
    }

    fn note_applied(&mut self, position: Position, out: &mut Vec<Action>) {
        let Some(batch) = self
            .applying
            .filter(|b| self.applied < position && position <= b.upto)
        else {
            return;
        };
        self.applied = position;
        (self.failed, self.apply_failures) = (None, 0);
        if position == batch.upto {
            self.applying = None;
            if let Some(watermark) = batch.watermark {
                self.note(watermark, out);
            }
        }
    }

    fn apply_again(&mut self, out: &mut Vec<Action>) {
        if let (Some(batch), Some(_)) = (self.applying, self.failed.take()) {
            out.push(Action::Apply { upto: batch.upto });
        }
    }

    fn connect(&mut self, out: &mut Vec<Action>) {
        self.link = Link::Connecting;
        out.push(Action::Connect);
    }
    fn fail(&mut self, fault: Fault, out: &mut Vec<Action>) {
        out.push(Action::Fail(fault));
        self.lose_link(out);
    }
    fn lose_link(&mut self, out: &mut Vec<Action>) {
        self.drop_link(out);
        self.connect_failures += 1;
        out.push(Action::SetTimer(
            Alarm::Reconnect,
            self.backoff(self.connect_failures),
        ));
    }
    /// Everything that is not being applied is forgotten and will be fetched again.
    fn drop_link(&mut self, out: &mut Vec<Action>) {
        (self.reply, self.partial, self.ready) = (None, None, None);
        self.fetched = self.applying.map_or(self.applied, |batch| batch.upto);
        self.link = Link::Down;
        out.push(Action::Disconnect);
        out.push(Action::Discard {
            above: self.fetched,
        });
    }
    fn backoff(&self, failures: u32) -> u64 {
        let (first, last) = self.limits.backoff_ms;
        let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(32));
        doubled.min(last)
    }
}
