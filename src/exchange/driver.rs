//! The driver of one peer's session: does what `tandem_model::session` decides, over the link and with the
//! applier, and keeps the status. One turn of its loop takes what has arrived, or waits for more.
mod applying;
mod telling;

use crate::apply::{Applier, Body, PeerIdentity, Transaction};
use crate::clock::boot_ms;
use crate::error::{Class, Error, Result};
use crate::exchange::catalog::{self, Peer};
use crate::exchange::handshake::Introduction;
use crate::exchange::housekeeping::Housekeeping;
use crate::exchange::link::{Event as Arrival, Link, Reply};
use crate::exchange::spool::Spool;
use crate::exchange::status::State;
use crate::exchange::{contact, process, refusal};
use crate::guc;
use crate::shmem::Database;
use pgrx::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::{Mark, NodeId, Position};
use tandem_model::session::{Action, Event, Limits, Session};
use tandem_model::wire::{DecodeError, Frame};

/// The peer's tables are asked for again after an empty reply, at most every so many ms.
const TABLES_PACE_MS: i64 = 250;
/// Peer and tables are looked at again after so many ms though nobody told of a change.
const PEER_PACE_MS: i64 = 5_000;

/// What the next results on the link belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Tables,
    Wait,
    Pull,
}

/// A connection that has shaken hands.
struct Contact {
    link: Link,
    applier: Applier,
    expected: VecDeque<Expected>,
    tables: Option<Reply>,
    /// The reply under way has told nothing.
    empty: bool,
    node: NodeId,
}

pub struct Driver {
    database: &'static Database,
    peer: Peer,
    session: Session,
    contact: Option<Contact>,
    /// The applier of the last contact, while there is none: displaced rows don't need the peer.
    resting: Option<Applier>,
    /// Received whole and not yet applied.
    queue: VecDeque<Transaction>,
    spool: Option<Spool>,
    housekeeping: Housekeeping,
    /// The catalog's generation that was looked at, and when to look again though it is the same.
    generation: u64,
    look_at: i64,
    tables_wanted: bool,
    tables_at: i64,
    /// Why displaced rows could not be asked again, until they were.
    unasked: Option<String>,
    /// Why the peer is not reached, until it is.
    failure: Option<Error>,
    /// Why the next transaction is not applied, and the state that makes; until it is.
    trouble: Option<(State, Error)>,
}

fn limits() -> Limits {
    Limits {
        batch_transactions: guc::BATCH_TRANSACTIONS.get().max(1) as usize,
        batch_bytes: guc::BATCH_SIZE.get().max(1) as usize * 1024,
        poll_ms: i64::from(guc::POLL_INTERVAL.get()),
        peer_timeout_ms: i64::from(guc::PEER_TIMEOUT.get()),
        max_delay_ms: i64::from(guc::MAX_RECONNECT_DELAY.get()),
    }
}

impl Driver {
    pub fn new(database: &'static Database, peer: Peer) -> Driver {
        let now = boot_ms();
        Driver {
            database,
            peer,
            session: Session::new(limits(), now),
            contact: None,
            resting: None,
            queue: VecDeque::new(),
            spool: None,
            housekeeping: Housekeeping::new(database),
            generation: database.catalog_generation.load(Acquire),
            look_at: now,
            tables_wanted: false,
            tables_at: now,
            unasked: None,
            failure: None,
            trouble: None,
        }
    }

    /// One turn: false when there is no peer any more.
    pub fn turn(&mut self) -> Result<bool> {
        process::check();
        if !self.look()? {
            return Ok(false);
        }
        self.session.set_limits(limits());
        self.step(Event::Tick);
        while self.receive() {
            process::check();
        }
        // Nothing more to do at once: what is applied gets flushed, told, and tidied up after.
        if let Some(contact) = &mut self.contact {
            contact.applier.flush();
        }
        self.reconsider();
        let node = self.contact.as_ref().map(|c| c.node);
        let idle = self.session.is_idle();
        self.housekeeping.run(self.database, node, idle)?;
        self.show();
        self.wait();
        Ok(true)
    }

    /// Looks at the catalog if it has changed, or may have.
    fn look(&mut self) -> Result<bool> {
        let generation = self.database.catalog_generation.load(Acquire);
        let now = boot_ms();
        let changed = generation != self.generation;
        if !changed && now < self.look_at {
            return Ok(true);
        }
        self.look_at = now + PEER_PACE_MS;
        self.generation = generation;
        let Some(peer) = catalog::peer()? else {
            self.database.worker.wanted.store(0, Release);
            return Ok(false);
        };
        if (&peer.name, &peer.conninfo) != (&self.peer.name, &self.peer.conninfo) {
            // Another peer: a new worker begins from the start.
            return Err(Error::retry(PgSqlErrorCode::ERRCODE_ADMIN_SHUTDOWN, "the peer has changed"));
        }
        let news = changed || peer != self.peer;
        self.peer = peer;
        self.refresh_tables();
        if news {
            self.step(Event::Retry);
        }
        self.step(Event::Paused(self.peer.paused));
        Ok(true)
    }

    /// Displaced rows may have found their place.
    fn reconsider(&mut self) {
        if self.peer.paused {
            return;
        }
        let Some(applier) = self.contact.as_mut().map(|c| &mut c.applier).or(self.resting.as_mut()) else { return };
        match applier.reconsider() {
            Ok(()) => self.unasked = None,
            Err(error) => {
                // Once, if it goes away by itself, is a user who holds a lock.
                let again = self.unasked.replace(error.message.clone());
                if again.as_ref() == Some(&error.message) || error.class != Class::Retry {
                    self.database.worker.note_error(&error);
                }
                if again.as_ref() != Some(&error.message) {
                    pgrx::log!("tandem exchange: displaced rows could not be asked again: {error}");
                }
            }
        }
    }

    fn wait(&mut self) {
        let now = boot_ms();
        let due = self.session.due_in(now).min(self.housekeeping.due_in(now)).min(self.look_at - now).max(0);
        let applier = self.contact.as_ref().map(|c| &c.applier).or(self.resting.as_ref());
        let asks = applier.filter(|_| !self.peer.paused).and_then(Applier::reconsiders_in);
        let asks = asks.map_or(i64::MAX, |due| i64::try_from(due.as_millis()).unwrap_or(i64::MAX).max(1));
        let due = due.min(asks);
        let waited = match &mut self.contact {
            Some(contact) => contact.link.wait(due),
            None => {
                process::wait(None, due);
                Ok(())
            }
        };
        if let Err(error) = waited {
            self.fail(error);
        }
    }

    /// Takes one thing that has arrived; false if nothing has.
    fn receive(&mut self) -> bool {
        let Some(contact) = &mut self.contact else { return false };
        match contact.link.poll() {
            Ok(Some(arrival)) => {
                if let Err(error) = self.arrived(arrival) {
                    self.fail(error);
                }
                true
            }
            Ok(None) => false,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    fn arrived(&mut self, arrival: Arrival) -> Result<()> {
        let Some(contact) = &mut self.contact else { return Ok(()) };
        let expected = contact.expected.front().copied();
        match (arrival, expected) {
            (Arrival::Rows(reply), Some(Expected::Pull)) => {
                for row in 0..reply.rows() {
                    self.frame(reply.bytes(row, 0).unwrap_or_default())?;
                }
            }
            (Arrival::Rows(reply), Some(Expected::Tables)) => contact.tables = Some(reply),
            (Arrival::Failed(error), _) => return Err(error),
            (Arrival::Synced, Some(done)) => {
                contact.expected.pop_front();
                if contact.expected.front() == Some(&Expected::Pull) {
                    contact.link.stream_rows();
                }
                match done {
                    Expected::Tables => self.tables_arrived()?,
                    Expected::Pull => self.reply_ended()?,
                    Expected::Wait => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn frame(&mut self, bytes: &[u8]) -> Result<()> {
        let frame = Frame::decode(bytes)?;
        if let (Frame::Transaction { .. } | Frame::Chunk { .. } | Frame::Descriptor(_), Some(contact)) =
            (&frame, &mut self.contact)
        {
            contact.empty = false;
        }
        let position = match &frame {
            Frame::Transaction { mark, .. } => mark.position,
            _ => Position(0),
        };
        self.database.worker.received(position, bytes.len());
        self.try_step(Event::Frame(frame))
    }

    fn reply_ended(&mut self) -> Result<()> {
        let now = boot_ms();
        let empty = self.contact.as_mut().is_some_and(|c| std::mem::replace(&mut c.empty, true));
        // The peer may have told of nothing but that its tables have changed.
        self.tables_wanted |= empty && now >= self.tables_at + TABLES_PACE_MS;
        self.failure = None;
        self.try_step(Event::ReplyEnded)
    }

    fn tables_arrived(&mut self) -> Result<()> {
        let Some(contact) = &mut self.contact else { return Ok(()) };
        let answer = contact.tables.take();
        if catalog::store_tables(&self.peer.name, answer.as_ref())? {
            self.refresh_tables();
        }
        Ok(())
    }

    /// Has the applier judge every table anew.
    fn refresh_tables(&mut self) {
        if let Some(contact) = &mut self.contact
            && let Err(error) = contact.applier.refresh_tables()
        {
            self.complain(State::Joining, &error);
            self.failure = Some(error);
        }
    }

    fn step(&mut self, event: Event<'_>) {
        if let Err(error) = self.try_step(event) {
            self.fail(error);
        }
    }

    fn try_step(&mut self, event: Event<'_>) -> Result<()> {
        let mut actions: VecDeque<Action> = self.decide(event)?.into();
        while let Some(action) = actions.pop_front() {
            if let Some(event) = self.act(action)? {
                actions.extend(self.decide(event)?);
            }
        }
        Ok(())
    }

    fn decide(&mut self, event: Event<'_>) -> Result<Vec<Action>> {
        Ok(self.session.step(boot_ms(), event).map_err(DecodeError::from)?)
    }

    /// Does one thing; what comes of it is the next event.
    fn act(&mut self, action: Action) -> Result<Option<Event<'static>>> {
        match action {
            Action::Connect => return Ok(Some(self.connect())),
            Action::Disconnect => {
                if self.contact.is_some() {
                    // The session's own decision: nothing was heard in time.
                    let error = refusal::silent();
                    self.complain(State::Connecting, &error);
                    self.failure = Some(error);
                }
                self.disconnect();
            }
            Action::Request { after, chunks_done, bytes } => self.request(after, chunks_done, bytes)?,
            Action::Describe(descriptor) => {
                if let Some(contact) = &mut self.contact {
                    contact.applier.descriptor(descriptor);
                }
                self.tables_wanted = true;
            }
            Action::Queue { mark, seen, stable, items } => {
                self.queue.push_back(Transaction { mark, seen, stable, body: Body::Inline(items) });
            }
            Action::Spool { mark, seen, stable } => self.spool = Some(Spool::create(mark, seen, stable)?),
            Action::Chunk(bytes) => {
                if let Some(spool) = &mut self.spool {
                    spool.append(&bytes)?;
                }
            }
            Action::QueueSpool => {
                if let Some(spool) = self.spool.take() {
                    let (mark, seen, stable) = (spool.mark, spool.seen, spool.stable);
                    self.database.worker.received(mark.position, 0);
                    self.queue.push_back(Transaction { mark, seen, stable, body: Body::Spooled(spool.finish()?) });
                }
            }
            Action::Apply(count) => return Ok(Some(self.apply(count))),
            Action::Watermark { mark, seen, stable } => {
                if let Some(contact) = &mut self.contact {
                    contact.applier.note_watermark(mark, seen, stable)?;
                }
                self.database.worker.applied(mark, 0);
            }
            Action::Acknowledged(position) => {
                self.database.acked.fetch_max(position.0, AcqRel);
                crate::shmem::wake_waiters();
            }
        }
        Ok(None)
    }

    fn connect(&mut self) -> Event<'static> {
        self.show_contacting(State::Connecting);
        let reached = self.try_connect();
        match reached {
            Ok(mark) => {
                self.failure = None;
                Event::Ready(mark)
            }
            Err((state, error)) => {
                self.complain(state, &error);
                self.failure = Some(error);
                Event::Lost
            }
        }
    }

    /// Connects and shakes hands; an error comes with the state that it is about.
    fn try_connect(&mut self) -> std::result::Result<Mark, (State, Error)> {
        let mut link = Link::connect(&self.peer.conninfo).map_err(|e| (State::Connecting, e))?;
        self.show_contacting(State::Handshake);
        let of_handshake = |error: Error| match error.class {
            Class::Operator => (State::Refused, error),
            _ => (State::Handshake, error),
        };
        let (theirs, tables) = contact::shake_hands(&mut link, &self.peer).map_err(of_handshake)?;
        self.greet(link, &theirs, tables).map_err(of_handshake)
    }

    /// Both sides agree: the applier takes over where it was.
    fn greet(&mut self, link: Link, theirs: &Introduction, tables: Option<Reply>) -> Result<Mark> {
        let node = NodeId(theirs.node_id);
        let identity = PeerIdentity { name: self.peer.name.clone(), node, nonce: theirs.nonce };
        catalog::store_tables(&self.peer.name, tables.as_ref())?;
        self.resting = None;
        let mut applier = Applier::new(identity)?;
        applier.refresh_tables()?;
        let mark = applier.progress();
        self.database.worker.applied(mark, 0);
        self.tables_at = boot_ms();
        self.contact = Some(Contact { link, applier, expected: VecDeque::new(), tables: None, empty: true, node });
        Ok(mark)
    }

    fn disconnect(&mut self) {
        if let Some(mut contact) = self.contact.take() {
            contact.applier.flush();
            self.resting = Some(contact.applier);
        }
        self.queue.clear();
        self.spool = None;
    }

    fn request(&mut self, after: Position, chunks_done: u32, bytes: usize) -> Result<()> {
        let now = boot_ms();
        let Some(contact) = &mut self.contact else { return Ok(()) };
        if std::mem::take(&mut self.tables_wanted) {
            contact.link.send(contact::PEER_TABLES, &[], false)?;
            contact.expected.push_back(Expected::Tables);
            self.tables_at = now;
        }
        let (after, done, bytes) = (after.0.to_string(), chunks_done.to_string(), bytes.to_string());
        let timeout = guc::POLL_INTERVAL.get().to_string();
        contact.link.send(contact::WAIT, &[Some(&after), Some(&timeout)], false)?;
        contact.link.send(contact::PULL, &[Some(&after), Some(&done), Some(&bytes)], true)?;
        contact.expected.extend([Expected::Wait, Expected::Pull]);
        Ok(())
    }

    /// The link is of no use any more.
    fn fail(&mut self, error: Error) {
        let state = match error.class {
            Class::Retry => State::Connecting,
            Class::Operator | Class::Bug => State::Refused,
        };
        self.complain(state, &error);
        self.failure = Some(error);
        match self.session.step(boot_ms(), Event::Lost) {
            Ok(_) => self.disconnect(),
            Err(violation) => pgrx::warning!("tandem exchange: {}", violation.0),
        }
    }
}
