//! A worker and a peer around the session, with lost links, repeated and missing frames, failing applies,
//! pauses and restarts. After a while trouble ends, and everything must have come through.
use crate::{LIMITS, chunk, transaction, watermark};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::VecDeque;
use tandem_model::hlc::Position;
use tandem_model::session::*;

fn of_a_reply(event: &Event) -> bool {
    matches!(event, Event::Frame(_) | Event::ReplyEnd)
}

/// Of a lost transaction nothing would tell: that is TCP's to keep from us. Nor of an end that never comes.
fn can_be_missed(event: &Event) -> bool {
    use FrameFacts::{Chunk, Descriptor, Watermark};
    matches!(
        event,
        Event::Frame(Chunk { .. } | Descriptor { .. } | Watermark(_))
    )
}

/// The worker and the peer, with everything that can go wrong between them.
pub struct Sim {
    rng: SmallRng,
    session: Session,
    /// The peer's stream: position and chunks.
    stream: Vec<(u64, u32)>,
    /// Frames kept by the worker: (position, chunks announced, chunks here); 0 of 0 is whole.
    kept: VecDeque<(u64, u32, u32)>,
    last_frame: Option<FrameFacts>,
    /// What is on its way to the session, in order; a new connection starts anew.
    wire: VecDeque<Event>,
    applying: Option<u64>,
    done: Vec<u64>,
    alarms: Vec<Alarm>,
    waiting: Option<(u64, Option<u32>)>,
}

impl Sim {
    /// One history.
    pub fn run(seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut position, mut stream) = (0, vec![]);
        for _ in 0..rng.random_range(1..25) {
            position += rng.random_range(1..5);
            stream.push((
                position,
                if rng.random_bool(0.3) {
                    rng.random_range(1..6)
                } else {
                    0
                },
            ));
        }
        let session = Session::new(Position(0), LIMITS);
        let (kept, wire) = (VecDeque::new(), VecDeque::new());
        let mut sim = Sim {
            rng,
            session,
            stream,
            kept,
            wire,
            last_frame: None,
            applying: None,
            done: vec![],
            alarms: vec![],
            waiting: None,
        };
        sim.feed(Event::Start);
        for turn in 0..100_000 {
            // Trouble ends after a while: then everything must get through.
            sim.turn(turn < 400);
            if sim.done.len() == sim.stream.len() && turn > 400 {
                break;
            }
        }
        assert_eq!(
            sim.done,
            sim.stream.iter().map(|t| t.0).collect::<Vec<_>>(),
            "seed {seed}"
        );
    }

    fn turn(&mut self, trouble: bool) {
        match self.rng.random_range(0..100) {
            0..3 if trouble => {
                self.wire.clear();
                self.feed(Event::LinkLost);
            }
            3 if trouble => self.restart(),
            4..6 if trouble => self.feed(Event::Pause),
            6 if trouble => {
                self.feed(Event::Stop);
                self.feed(Event::Start);
            }
            // A part of a reply comes again later, a frame twice, a frame not at all.
            7 if trouble => {
                let count = self.rng.random_range(0..8);
                let again = self
                    .wire
                    .iter()
                    .take(count)
                    .filter(|e| of_a_reply(e))
                    .cloned();
                let again: Vec<_> = again.collect();
                self.wire.extend(again);
            }
            8 if trouble && self.wire.front().is_some_and(can_be_missed) => {
                self.wire.pop_front();
            }
            9 if trouble => {
                let again = self.wire.front().filter(|e| of_a_reply(e)).cloned();
                again.into_iter().for_each(|e| self.wire.push_front(e));
            }
            10..20 => self.feed(Event::Resume),
            20..50 => self.apply_some(trouble),
            50..60 => {
                if let Some(alarm) = self.alarms.pop() {
                    self.feed(Event::Timer(alarm));
                }
            }
            _ => match self.wire.pop_front() {
                Some(event) => self.feed(event),
                None => self.answer(),
            },
        }
    }

    fn restart(&mut self) {
        // The process dies: a commit in progress is done or not, all else is lost.
        if let Some(upto) = self.applying.take().filter(|_| self.rng.random_bool(0.5)) {
            self.commit(upto);
        }
        self.kept.clear();
        self.wire.clear();
        self.alarms.clear();
        self.waiting = None;
        self.session = Session::new(Position(self.done.last().copied().unwrap_or(0)), LIMITS);
        self.feed(Event::Start);
    }

    fn commit(&mut self, upto: u64) {
        while let Some((position, chunks, here)) = self.kept.pop_front_if(|t| t.0 <= upto) {
            assert_eq!(chunks, here, "a transaction in parts");
            self.done.push(position);
        }
    }

    fn apply_some(&mut self, trouble: bool) {
        let Some(upto) = self.applying else { return };
        if trouble && self.rng.random_bool(0.3) {
            self.applying = None;
            let failure = if self.rng.random_bool(0.5) {
                Failure::Retry
            } else {
                Failure::Operator
            };
            return self.feed(Event::ApplyFailed(failure));
        }
        let first = self.kept.front().map_or(upto, |t| t.0.min(upto));
        let part = if self.rng.random_bool(0.5) {
            first
        } else {
            upto
        };
        self.commit(part);
        if part == upto {
            self.applying = None;
        }
        self.feed(Event::Applied {
            position: Position(part),
        });
    }

    /// The peer answers a request, within its limits: some transactions or chunks, then the watermark.
    fn answer(&mut self) {
        let Some((after, pull)) = self.waiting.take() else {
            return;
        };
        self.wire.push_back(Event::WaitDone);
        let Some(mut chunk_from) = pull else { return };
        let (mut upto, mut frames) = (after, self.rng.random_range(0..6));
        for &(position, chunks) in self.stream.iter().filter(|t| t.0 > after) {
            if frames == 0 {
                break;
            }
            if chunk_from == 0 {
                self.wire.push_back(transaction(position, chunks));
            }
            let sent = chunks.min(chunk_from + frames);
            self.wire
                .extend((chunk_from..sent).map(|i| chunk(position, i)));
            frames = frames.saturating_sub((sent - chunk_from).max(1));
            if sent < chunks {
                break;
            }
            (upto, chunk_from) = (position, 0);
        }
        self.wire.extend([watermark(upto), Event::ReplyEnd]);
    }

    fn feed(&mut self, event: Event) {
        if let Event::Frame(frame) = event {
            self.last_frame = Some(frame);
        }
        for action in self.session.step(event) {
            self.execute(action);
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Connect if self.rng.random_bool(0.8) => self.wire.push_back(Event::Connected),
            Action::Connect => self.wire.push_back(Event::ConnectFailed),
            Action::Handshake if self.rng.random_bool(0.9) => {
                let horizon = Position(self.stream.last().expect("not empty").0);
                self.wire.push_back(Event::HandshakeReply(Facts {
                    joined: true,
                    horizon,
                }));
            }
            Action::Handshake => self.wire.push_back(Event::HandshakeRefused),
            Action::RequestWait { after } => {
                assert!(self.waiting.is_none(), "two requests at once");
                self.waiting = Some((after.0, None));
            }
            Action::RequestPull { after, chunk } => self.waiting = Some((after.0, Some(chunk))),
            Action::Buffer | Action::Spool => {
                match self.last_frame.expect("a frame was reported") {
                    FrameFacts::Transaction { mark, chunks, .. } => {
                        self.kept.push_back((mark.position.0, chunks, 0))
                    }
                    FrameFacts::Chunk { .. } => {
                        self.kept.back_mut().expect("its transaction").2 += 1
                    }
                    _ => {}
                }
            }
            Action::Discard { above } => self.kept.retain(|t| t.0 <= above.0),
            Action::Apply { upto } => {
                assert!(self.applying.is_none(), "two batches at once");
                self.applying = Some(upto.0);
            }
            Action::NoteWatermark(Watermark { mark, .. }) => {
                let before = self
                    .stream
                    .iter()
                    .filter(|t| t.0 <= mark.position.0)
                    .count();
                assert!(
                    self.done.len() >= before,
                    "a watermark before what precedes it"
                );
            }
            Action::SetTimer(alarm, _) => self.alarms.push(alarm),
            Action::Disconnect => {
                self.wire.clear();
                self.waiting = None;
            }
            Action::Announce(_) | Action::Fail(_) => {}
        }
    }
}
