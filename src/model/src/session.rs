//! The exchange as a state machine without I/O, on the pulling side: `step(event) -> actions`.
//!
//! The worker turns what happens (libpq, latch, apply) into events and executes the actions in order. One
//! reply of the peer is one batch; the next is asked for while the present one is applied, never more.
//! Frames are kept by the worker: in memory ([`Action::Buffer`]) or in a file ([`Action::Spool`]).
//!
//! Invariants: what is applied rises without gaps or repeats, whatever the link and the peer do; a
//! transaction is applied only when it is here whole; a watermark counts in stream order: it is noted
//! after everything before it is applied, never earlier (its `seen` would acknowledge too much).
use crate::hlc::{Hlc, Mark, Position};

mod machine;
pub use machine::Session;

/// What `tandem.status` shows of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No connection; one is being made, or waits for its time.
    Connecting,
    /// Connected; who is who is being settled.
    Handshake,
    /// Tables are being joined first.
    Joining,
    /// Behind what the peer had when the connection was made.
    Catchup,
    Streaming,
    /// By the user: fetched as far as one batch, not applied.
    Paused,
    /// By the user, or by an apply error that needs the operator (tried again now and then).
    Stopped,
    /// The peer, or its answer, is not the right one (tried again now and then).
    Refused,
}

/// Limits and delays; each is a setting.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of buffered frames that a reply may hold; the frame that goes past it must be the last.
    pub batch_bytes: u64,
    /// First and greatest delay before another try, milliseconds; each failure doubles it.
    pub backoff_ms: (u64, u64),
}

/// What the handshake found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// False: the tables have to be joined before the stream is applied ([`Event::Joined`]).
    pub joined: bool,
    /// The peer's position now; below it the session is catching up.
    pub horizon: Position,
}

/// What there is to know of a frame to decide about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameFacts {
    Descriptor {
        len: u64,
    },
    Transaction {
        mark: Mark,
        chunks: u32,
        len: u64,
    },
    Chunk {
        position: Position,
        index: u32,
        len: u64,
    },
    Watermark(Watermark),
}

/// The end of a reply, as in [`crate::wire::Frame::Watermark`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermark {
    pub mark: Mark,
    pub seen: Mark,
    pub stable: Hlc,
}

/// How an apply failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Lock timeout, serialization: soon again.
    Retry,
    /// Somebody has to look: tried again at the longest delay, or at once on [`Event::Resume`].
    Operator,
}

/// What a timer is for; each purpose has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    Reconnect,
    Retry,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Start,
    Connected,
    ConnectFailed,
    HandshakeReply(Facts),
    HandshakeRefused,
    /// The tables are joined as of this position of the peer's stream.
    Joined {
        position: Position,
    },
    /// `wait_for_commit` answered; the frames of the pull behind it follow.
    WaitDone,
    Frame(FrameFacts),
    /// The pull is answered whole.
    ReplyEnd,
    /// Committed and flushed here up to this position; may come several times for one [`Action::Apply`].
    Applied {
        position: Position,
    },
    ApplyFailed(Failure),
    LinkLost,
    Timer(Alarm),
    Pause,
    Resume,
    Stop,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Connect,
    Handshake,
    /// Call `wait_for_commit`. After `Position(u64::MAX)` it ends by its timeout: a sign of life.
    RequestWait {
        after: Position,
    },
    /// Call `pull`, in the pipeline behind the wait. With `chunk` > 0 the reply goes on within the
    /// transaction that comes next after `after`, at that chunk, without its `Transaction` frame.
    RequestPull {
        after: Position,
        chunk: u32,
    },
    /// Keep the frame just reported in memory.
    Buffer,
    /// Keep it in a file.
    Spool,
    /// Drop all kept frames of transactions above this position, and unfinished ones.
    Discard {
        above: Position,
    },
    /// Apply the kept transactions up to and including this position.
    Apply {
        upto: Position,
    },
    /// All of the stream up to `mark` is applied: take note of what the peer has seen, and of its stable point.
    NoteWatermark(Watermark),
    Announce(State),
    SetTimer(Alarm, u64),
    /// The peer broke the protocol; a `Disconnect` follows.
    Fail(Fault),
    Disconnect,
}

/// What a peer can do wrong in its stream (I13). Nothing of such a reply is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("a frame that was not asked for")]
    Unasked,
    #[error("position {got} after {last}: positions must rise")]
    NotRising { got: Position, last: Position },
    #[error("transaction {0} is cut short")]
    CutShort(Position),
    #[error("chunk {index} of {position} is not the one that comes next")]
    WrongChunk { position: Position, index: u32 },
    #[error("a reply without a watermark at its end")]
    NoWatermark,
    #[error("a reply above {0} bytes")]
    TooLarge(u64),
}
