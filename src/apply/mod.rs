//! Apply: the peer's transactions become local ones, whole, in order, exactly once.
//!
//! The exchange worker owns one [`Applier`] and calls it in its own process. A source transaction goes
//! through [`batch`] (one local commit for several of them), each change through [`route`] (the sender's
//! columns → ours), [`row`] (lock, judge, write) and, if something was lost by it, [`conflict`], whose records
//! [`history`] keeps and [`announce`] tells of. What cannot be applied yet waits in [`held`]; [`tables`] says
//! why. A transaction that runs into a constraint is applied once more by way of [`careful`]; what cannot show
//! is asked again in [`reconsider`]. [`progress`] remembers how far we are.
mod announce;
mod arbiter;
mod batch;
mod body;
mod careful;
pub mod conflict;
mod constraints;
mod held;
pub mod history;
mod image;
mod merging;
mod parents;
mod progress;
mod reconsider;
mod report;
mod route;
mod row;
mod session;
mod table;
pub mod tables;
mod truncate;

use crate::clock;
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::shmem;
use pgrx::prelude::*;
use progress::{Progress, State};
use route::Route;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use tandem_model::descriptor::{Descriptor, DescriptorId};
use tandem_model::hlc::{Hlc, Mark, NodeId};
use uuid::Uuid;

pub use announce::sum_up as sum_up_log;
pub use arbiter::forget as forget_reinstated;
pub use body::{Body, Transaction};
pub use row::key_bytes;

/// Who the peer is, as the handshake told.
#[derive(Debug, Clone)]
pub struct PeerIdentity {
    pub name: String,
    pub node: NodeId,
    pub nonce: Uuid,
}

/// One of the peer's tables, as far as applying goes.
struct Target {
    peer: tables::PeerTable,
    state: tables::State,
    /// The local table, if there is one of that name.
    own: Option<tables::OwnTable>,
}

/// Applies one peer's stream.
pub struct Applier {
    peer: PeerIdentity,
    own: NodeId,
    state: State,
    progress: Progress,
    descriptors: HashMap<DescriptorId, Rc<Descriptor>>,
    routes: HashMap<DescriptorId, Rc<Route>>,
    /// By the table's oid on the peer.
    targets: HashMap<u32, Target>,
    /// The peer's tables that have held changes: all later ones are held too.
    held: HashSet<u32>,
    /// Tables whose shape on the peer is newer than the last contact told.
    renewed: HashSet<u32>,
    /// When the displaced rows were asked last.
    rounds: reconsider::Rounds,
}

impl Applier {
    /// Reads back how far we are. The process must be free of transactions, now and at every call below.
    pub fn new(peer: PeerIdentity) -> Result<Applier> {
        session::prepare();
        let mut applier = session::transaction(|| {
            let own = shmem::database().node().ok_or_else(|| Error::bug("this database is not a node"))?;
            let (progress, state) = Progress::recover(&peer)?;
            Ok(Applier {
                own,
                held: held::relids(&peer.name)?.into_iter().collect(),
                peer,
                state: state.unwrap_or_default(),
                progress,
                descriptors: HashMap::new(),
                routes: HashMap::new(),
                targets: HashMap::new(),
                renewed: HashSet::new(),
                rounds: reconsider::Rounds::default(),
            })
        })?;
        applier.state.frozen = !applier.held.is_empty();
        if !applier.state.frozen {
            applier.state.seen = applier.state.applied;
        }
        applier.refresh_tables()?;
        Ok(applier)
    }

    /// Position to continue after.
    pub fn progress(&self) -> Mark {
        self.state.applied
    }

    /// Takes in a descriptor that later changes refer to.
    pub fn descriptor(&mut self, descriptor: Descriptor) {
        if let Some(target) = self.targets.get_mut(&descriptor.relid)
            && descriptor.id > target.peer.shape.id
        {
            target.peer.shape = descriptor.clone();
            judge(target);
            self.renewed.insert(descriptor.relid);
            self.routes.clear();
        }
        self.routes.remove(&descriptor.id);
        self.descriptors.insert(descriptor.id, Rc::new(descriptor));
    }

    /// Judges every synced table against `tandem.peer_table`, and applies the held changes of those that have
    /// become active. Cheap when nothing changed: call it after each contact, after `add_table` and now and then.
    pub fn refresh_tables(&mut self) -> Result<()> {
        let name = self.peer.name.clone();
        let (own, theirs) = session::transaction(|| Ok((tables::own()?, tables::of_peer(&name)?)))?;
        self.routes.clear();
        let mut own: HashMap<(String, String), tables::OwnTable> =
            own.into_iter().map(|t| ((t.schema.clone(), t.table.clone()), t)).collect();
        self.targets = theirs
            .into_iter()
            .map(|peer| {
                let own = own.remove(&(peer.shape.schema.clone(), peer.shape.table.clone()));
                let mut target = Target { peer, own, state: tables::State::MissingHere };
                judge(&mut target);
                (target.peer.shape.relid, target)
            })
            .collect();
        let due = self.held.iter().any(|relid| self.is_active(*relid));
        if due { self.drain() } else { Ok(()) }
    }

    fn is_active(&self, relid: u32) -> bool {
        self.targets.get(&relid).is_some_and(|t| t.state == tables::State::Active)
    }

    /// Applies transactions in stream order, several in one local commit; if that fails, one by one. Those
    /// before the one that fails stay applied: [`Applier::progress`] tells. The error says whose turn it is.
    pub fn apply(&mut self, mut batch: Vec<Transaction>) -> Result<Mark> {
        if batch.is_empty() {
            return Ok(self.state.applied);
        }
        self.make_room();
        let error = match self.run(&mut batch, false) {
            Ok(()) => return Ok(self.state.applied),
            Err(error) => error,
        };
        if let [single] = &mut batch[..] {
            self.apply_carefully(single, error)?;
            return Ok(self.state.applied);
        }
        let applied = self.state.applied.position;
        for transaction in batch.iter_mut().filter(|t| t.mark.position > applied) {
            if let Err(error) = self.run(std::slice::from_mut(transaction), false) {
                self.apply_carefully(transaction, error)?;
            }
        }
        Ok(self.state.applied)
    }

    /// Once more, and carefully, if a constraint was the trouble.
    fn apply_carefully(&mut self, transaction: &mut Transaction, error: Error) -> Result<()> {
        let hopeful = report::is_constraint_violation(&error) && error.class != crate::error::Class::Retry;
        if !hopeful {
            return Err(error);
        }
        self.run(std::slice::from_mut(transaction), true)
    }

    /// The peer's stream is complete up to `mark`; the peer has ours up to `seen`.
    pub fn note_watermark(&mut self, mark: Mark, seen: Mark, stable: Hlc) -> Result<()> {
        self.check_marks(mark, seen, stable)?;
        clock::observe(mark.position.0)?;
        let mut state = self.state;
        if mark.position > state.applied.position {
            state.applied = mark;
        }
        if !state.frozen {
            state.seen = state.applied;
        }
        let news = seen.position > state.acked.position || seen.low > state.acked.low || stable > state.stable_peer;
        state.acked = later(state.acked, seen);
        state.stable_peer = state.stable_peer.max(stable);
        if !news {
            self.state = state;
            self.progress.passed(state);
            return Ok(());
        }
        self.make_room();
        session::transaction(|| {
            self.progress.insert(&self.peer, &state);
            Ok(())
        })?;
        self.state = state;
        self.progress.committed(state);
        Ok(())
    }

    /// Passes over a transaction that can't be applied; it stays on record whole, with the error.
    pub fn skip(&mut self, mut transaction: Transaction, error: &str) -> Result<Mark> {
        self.check_marks(transaction.mark, transaction.seen, transaction.stable)?;
        clock::observe(transaction.mark.position.0)?;
        let mut state = self.state;
        state.applied = transaction.mark;
        if !state.frozen {
            state.seen = state.applied;
        }
        state.acked = later(state.acked, transaction.seen);
        state.stable_peer = state.stable_peer.max(transaction.stable);
        session::transaction(|| {
            let items = transaction.body.read_whole()?;
            let _superuser = ActingAs::superuser();
            let query = "insert into tandem.skipped (peer, \"position\", error, items) \
                         values ($1, $2::int8::tandem.position, $3, $4) on conflict do nothing";
            let arguments = [
                self.peer.name.as_str().into(),
                (transaction.mark.position.0 as i64).into(),
                error.into(),
                items.into(),
            ];
            Spi::connect_mut(|client| client.update(query, None, &arguments).map(drop))?;
            self.progress.insert(&self.peer, &state);
            Ok(())
        })?;
        self.state = state;
        self.progress.committed(state);
        Ok(state.applied)
    }

    /// Flushes and publishes everything; call it before going idle.
    pub fn flush(&mut self) {
        self.progress.flush();
    }

    /// Lets the two progress tables take turns.
    fn make_room(&mut self) {
        if !self.progress.is_full() {
            return;
        }
        match session::transaction(|| self.progress.turn()) {
            Ok(table) => self.progress.turned(table),
            // Somebody reads it: later, then.
            Err(_) => self.progress.not_turned(),
        }
    }

    /// The peer speaks for itself only, and can't have seen what we have not said (I13).
    fn check_marks(&self, mark: Mark, seen: Mark, stable: Hlc) -> Result<()> {
        let beyond = |position: u64| position > clock::read();
        let foreign = mark.position.node() != self.peer.node && !mark.position.is_zero();
        if !foreign && !beyond(seen.position.0) && stable.0 <= mark.position.0.max(self.state.applied.position.0) {
            return Ok(());
        }
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
            "the peer sent a position that is not its own to tell",
            "It is not the node that it was, or this server has lost history; see tandem.status on both sides.",
        ))
    }
}

/// Judges a table anew.
fn judge(target: &mut Target) {
    target.state = match &target.own {
        None => tables::State::MissingHere,
        Some(own) => tables::compare(own, &target.peer).0,
    };
}

/// The later of two acknowledgements, part by part.
fn later(a: Mark, b: Mark) -> Mark {
    Mark { position: a.position.max(b.position), low: a.low.max(b.low) }
}
