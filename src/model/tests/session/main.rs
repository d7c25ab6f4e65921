//! The session against a simulated peer: whatever happens to the link, each transaction is applied once,
//! in order, whole, and a watermark counts only when everything before it is applied.
mod sim;

use tandem_model::hlc::{Hlc, Mark, Position};
use tandem_model::session::*;

const LIMITS: Limits = Limits {
    batch_bytes: 100,
    backoff_ms: (100, 60_000),
};

fn at(position: u64) -> Mark {
    Mark {
        position: Position(position),
        low: Hlc(position),
    }
}
fn transaction(position: u64, chunks: u32) -> Event {
    Event::Frame(FrameFacts::Transaction {
        mark: at(position),
        chunks,
        len: 10,
    })
}
fn chunk(position: u64, index: u32) -> Event {
    Event::Frame(FrameFacts::Chunk {
        position: Position(position),
        index,
        len: 10,
    })
}
fn mark(position: u64) -> Watermark {
    Watermark {
        mark: at(position),
        seen: Mark::default(),
        stable: Hlc(0),
    }
}
fn watermark(position: u64) -> Event {
    Event::Frame(FrameFacts::Watermark(mark(position)))
}
fn request(after: u64, chunk: u32) -> [Action; 2] {
    let after = Position(after);
    [
        Action::RequestWait { after },
        Action::RequestPull { after, chunk },
    ]
}
fn apply(upto: u64) -> Action {
    Action::Apply {
        upto: Position(upto),
    }
}
fn steps(session: &mut Session, events: impl IntoIterator<Item = Event>) -> Vec<Action> {
    events
        .into_iter()
        .flat_map(|event| session.step(event))
        .collect()
}
/// Connected, nothing applied yet, the first request out.
fn connected() -> Session {
    let mut session = Session::new(Position(0), LIMITS);
    assert_eq!(
        session.step(Event::Start),
        [Action::Connect, Action::Announce(State::Connecting)]
    );
    assert_eq!(
        session.step(Event::Connected),
        [Action::Handshake, Action::Announce(State::Handshake)]
    );
    let facts = Facts {
        joined: true,
        horizon: Position(20),
    };
    let [wait, pull] = request(0, 0);
    assert_eq!(
        session.step(Event::HandshakeReply(facts)),
        [wait, pull, Action::Announce(State::Catchup)]
    );
    session
}
fn fault(session: &mut Session, events: impl IntoIterator<Item = Event>) -> Fault {
    let actions = steps(session, events);
    let fault = actions.iter().find_map(|a| {
        if let Action::Fail(fault) = a {
            Some(*fault)
        } else {
            None
        }
    });
    assert!(actions.contains(&Action::Disconnect) && session.state() == State::Connecting);
    fault.expect("a fault")
}

#[test]
fn the_next_batch_is_fetched_while_one_is_applied() {
    let mut s = connected();
    steps(
        &mut s,
        [
            Event::WaitDone,
            transaction(10, 0),
            transaction(11, 0),
            watermark(11),
        ],
    );
    let [wait, pull] = request(11, 0);
    assert_eq!(s.step(Event::ReplyEnd), [apply(11), wait, pull]);
    // The next comes while that is applied: it waits, and nothing more is asked for.
    let end = [
        Event::WaitDone,
        transaction(20, 0),
        watermark(20),
        Event::ReplyEnd,
    ];
    assert_eq!(steps(&mut s, end), [Action::Buffer]);
    assert_eq!(
        s.step(Event::Applied {
            position: Position(10)
        }),
        []
    );
    let [wait, pull] = request(20, 0);
    let done = s.step(Event::Applied {
        position: Position(11),
    });
    assert_eq!(
        done,
        [Action::NoteWatermark(mark(11)), apply(20), wait, pull]
    );
    let done = s.step(Event::Applied {
        position: Position(20),
    });
    assert_eq!(
        done,
        [
            Action::NoteWatermark(mark(20)),
            Action::Announce(State::Streaming)
        ]
    );
}

#[test]
fn a_watermark_waits_for_what_is_before_it() {
    let mut s = connected();
    steps(
        &mut s,
        [
            Event::WaitDone,
            transaction(10, 0),
            watermark(10),
            Event::ReplyEnd,
        ],
    );
    let idle = steps(&mut s, [Event::WaitDone, watermark(12), Event::ReplyEnd]);
    assert!(
        !idle.iter().any(|a| matches!(a, Action::NoteWatermark(_))),
        "10 is not applied yet"
    );
    assert_eq!(
        s.step(Event::Applied {
            position: Position(10)
        }),
        [Action::NoteWatermark(mark(12))]
    );
    assert_eq!(s.applied(), Position(12));
    let idle = steps(&mut s, [Event::WaitDone, watermark(13), Event::ReplyEnd]);
    let [wait, pull] = request(13, 0);
    assert_eq!(idle[..3], [Action::NoteWatermark(mark(13)), wait, pull]);
}

#[test]
fn a_large_transaction_is_whole_before_it_is_applied() {
    let mut s = connected();
    let first = [
        Event::WaitDone,
        transaction(10, 0),
        transaction(11, 3),
        chunk(11, 0),
        watermark(10),
        Event::ReplyEnd,
    ];
    let [wait, pull] = request(10, 1);
    assert_eq!(
        steps(&mut s, first),
        [
            Action::Buffer,
            Action::Spool,
            Action::Spool,
            apply(10),
            wait,
            pull
        ]
    );
    let rest = [
        Event::WaitDone,
        chunk(11, 1),
        chunk(11, 2),
        watermark(11),
        Event::ReplyEnd,
    ];
    assert_eq!(steps(&mut s, rest), [Action::Spool, Action::Spool]);
    assert_eq!(
        s.step(Event::Applied {
            position: Position(10)
        })[1],
        apply(11)
    );
}

#[test]
fn faults_of_the_peer_end_the_session_by_name() {
    use Event::{ReplyEnd, WaitDone};
    let not_rising = |got, last| Fault::NotRising {
        got: Position(got),
        last: Position(last),
    };
    let wrong = |position, index| Fault::WrongChunk {
        position: Position(position),
        index,
    };
    let big = Event::Frame(FrameFacts::Transaction {
        mark: at(5),
        chunks: 0,
        len: 101,
    });
    let descriptor = Event::Frame(FrameFacts::Descriptor { len: 1 });
    let cases: Vec<(Vec<Event>, Fault)> = vec![
        (vec![transaction(10, 0)], Fault::Unasked),
        (vec![ReplyEnd], Fault::Unasked),
        (
            vec![WaitDone, transaction(10, 0), transaction(10, 0)],
            not_rising(10, 10),
        ),
        (
            vec![WaitDone, transaction(10, 0), transaction(9, 0)],
            not_rising(9, 10),
        ),
        (
            vec![WaitDone, transaction(10, 0), watermark(9)],
            not_rising(9, 10),
        ),
        (vec![WaitDone, transaction(0, 0)], not_rising(0, 0)),
        (
            vec![WaitDone, transaction(10, 2), transaction(11, 0)],
            Fault::CutShort(Position(10)),
        ),
        (
            vec![WaitDone, transaction(10, 2), watermark(10)],
            Fault::CutShort(Position(10)),
        ),
        (
            vec![WaitDone, transaction(10, 2), chunk(10, 1)],
            wrong(10, 1),
        ),
        (
            vec![WaitDone, transaction(10, 2), chunk(10, 0), chunk(10, 0)],
            wrong(10, 0),
        ),
        (
            vec![WaitDone, transaction(10, 2), chunk(11, 0)],
            wrong(11, 0),
        ),
        (vec![WaitDone, chunk(10, 0)], wrong(10, 0)),
        (
            vec![WaitDone, transaction(10, 1), chunk(10, 0), chunk(10, 1)],
            wrong(10, 1),
        ),
        (
            vec![WaitDone, transaction(10, 0), ReplyEnd],
            Fault::NoWatermark,
        ),
        (
            vec![WaitDone, watermark(10), transaction(11, 0)],
            Fault::Unasked,
        ),
        (vec![WaitDone, big, descriptor], Fault::TooLarge(100)),
        (
            vec![
                WaitDone,
                watermark(1),
                ReplyEnd,
                WaitDone,
                WaitDone,
                ReplyEnd,
            ],
            Fault::NoWatermark,
        ),
    ];
    for (events, expected) in cases {
        let text = format!("{events:?}");
        let mut s = connected();
        assert_eq!(fault(&mut s, events), expected, "{text}");
        // Nothing of it is applied: the stream goes on where it was.
        s.step(Event::Timer(Alarm::Reconnect));
        s.step(Event::Connected);
        let again = s.step(Event::HandshakeReply(Facts {
            joined: true,
            horizon: Position(0),
        }));
        assert!(
            matches!(
                again[1],
                Action::RequestPull {
                    after: Position(0 | 1),
                    chunk: 0
                }
            ),
            "{text}"
        );
    }
}

#[test]
fn delays_double_to_their_limit_and_start_anew() {
    let mut s = Session::new(Position(0), LIMITS);
    s.step(Event::Start);
    let mut delays = vec![];
    for _ in 0..40 {
        let actions = s.step(Event::ConnectFailed);
        delays.extend(actions.iter().filter_map(|a| {
            if let Action::SetTimer(_, ms) = a {
                Some(*ms)
            } else {
                None
            }
        }));
        assert_eq!(s.step(Event::Timer(Alarm::Reconnect)), [Action::Connect]);
    }
    assert_eq!(delays[..4], [100, 200, 400, 800]);
    assert!(delays[10..].iter().all(|ms| *ms == 60_000));
    let facts = Facts {
        joined: true,
        horizon: Position(0),
    };
    steps(
        &mut s,
        [
            Event::Connected,
            Event::HandshakeReply(facts),
            Event::WaitDone,
            watermark(1),
            Event::ReplyEnd,
        ],
    );
    assert!(
        s.step(Event::LinkLost)
            .contains(&Action::SetTimer(Alarm::Reconnect, 100))
    );
}

#[test]
fn paused_fetches_one_batch_and_shows_signs_of_life() {
    let mut s = connected();
    assert_eq!(s.step(Event::Pause), [Action::Announce(State::Paused)]);
    let probe = Action::RequestWait {
        after: Position(u64::MAX),
    };
    let reply = [
        Event::WaitDone,
        transaction(10, 0),
        watermark(10),
        Event::ReplyEnd,
    ];
    assert_eq!(steps(&mut s, reply), [Action::Buffer, probe.clone()]);
    assert_eq!(s.step(Event::WaitDone), [probe]);
    assert_eq!(
        s.step(Event::Resume),
        [apply(10), Action::Announce(State::Catchup)]
    );
}

#[test]
fn a_failed_apply_is_tried_again() {
    let mut s = connected();
    steps(
        &mut s,
        [
            Event::WaitDone,
            transaction(30, 0),
            watermark(30),
            Event::ReplyEnd,
        ],
    );
    assert_eq!(
        s.step(Event::ApplyFailed(Failure::Retry)),
        [Action::SetTimer(Alarm::Retry, 100)]
    );
    assert_eq!(s.step(Event::Timer(Alarm::Retry)), [apply(30)]);
    let stopped = [
        Action::SetTimer(Alarm::Retry, 60_000),
        Action::Announce(State::Stopped),
    ];
    assert_eq!(s.step(Event::ApplyFailed(Failure::Operator)), stopped);
    // The link may go meanwhile: what is being applied stays.
    assert!(s.step(Event::LinkLost).contains(&Action::Discard {
        above: Position(30)
    }));
    assert_eq!(s.step(Event::Resume), [apply(30)]);
    assert_eq!(
        s.step(Event::Applied {
            position: Position(30)
        }),
        [Action::NoteWatermark(mark(30))]
    );
}

#[test]
fn refused_joining_and_stopped_fetch_nothing() {
    let mut s = Session::new(Position(5), LIMITS);
    steps(&mut s, [Event::Start, Event::Connected]);
    let refused = s.step(Event::HandshakeRefused);
    assert!(
        refused.contains(&Action::SetTimer(Alarm::Reconnect, 60_000))
            && s.state() == State::Refused
    );
    steps(&mut s, [Event::Timer(Alarm::Reconnect), Event::Connected]);
    let facts = Facts {
        joined: false,
        horizon: Position(9),
    };
    assert_eq!(
        s.step(Event::HandshakeReply(facts)),
        [Action::Announce(State::Joining)]
    );
    let [wait, pull] = request(8, 0);
    assert_eq!(
        s.step(Event::Joined {
            position: Position(8)
        }),
        [wait, pull, Action::Announce(State::Catchup)]
    );
    assert_eq!(s.step(Event::Stop)[0], Action::Disconnect);
    assert_eq!(s.state(), State::Stopped);
    for event in [
        Event::Timer(Alarm::Reconnect),
        Event::Connected,
        Event::WaitDone,
        Event::Resume,
        Event::LinkLost,
    ] {
        assert_eq!(s.step(event.clone()), [], "{event:?}");
    }
}

#[test]
fn each_transaction_is_applied_once_and_in_order() {
    let budget = std::env::var("TANDEM_MODEL_HISTORIES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(20_000);
    (0..budget).for_each(sim::Sim::run);
}
