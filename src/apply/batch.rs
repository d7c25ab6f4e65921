//! One local transaction: several source transactions in stream order, their ends checked one by one, then
//! the records, the progress row, and the commit.
use super::body::Transaction;
use super::careful::{self, Careful};
use super::held::{self, Held};
use super::progress::State;
use super::report;
use super::route::Route;
use super::row::{self, Work};
use super::table::Table;
use super::{Applier, Target, arbiter, conflict, constraints, later, session, tables, truncate};
use crate::capture;
use crate::clock;
use crate::error::{self, Error, Result};
use crate::pg::identity::ActingAs;
use crate::policy;
use crate::relation::SyncedRelation;
use pgrx::prelude::*;
use serde_bytes::Bytes;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tandem_model::change::{Change, Item};
use tandem_model::descriptor::{Descriptor, DescriptorId};
use tandem_model::hlc::{Hlc, Mark};
use tandem_model::wire;

/// After this long no further source transaction joins a local commit: local writers wait for its row locks.
const LONGEST_COMMIT: Duration = Duration::from_millis(20);

/// A local transaction in the making. What it says of progress counts only once it is committed.
pub(super) struct Batch<'a> {
    applier: &'a mut Applier,
    state: State,
    newly_held: Vec<u32>,
    pub(super) tables: HashMap<pg_sys::Oid, Table>,
    pub(super) work: Work,
}

/// Where a change goes.
enum Destination {
    Table(pg_sys::Oid, Rc<Route>),
    Wait(Rc<Descriptor>),
}

impl Applier {
    /// Applies transactions in as few local commits as hold no lock for long. On an error those of earlier
    /// commits stay applied; nothing else of this process's state changes.
    pub(super) fn run(&mut self, transactions: &mut [Transaction], careful: bool) -> Result<()> {
        let mut rest = transactions;
        while !rest.is_empty() {
            let started = Instant::now();
            let mut count = 0;
            let (state, newly_held) = session::transaction(|| {
                let mut batch = Batch::new(&mut *self, careful);
                for transaction in rest.iter_mut() {
                    batch.transaction(transaction)?;
                    count += 1;
                    // A write of ours is one of a commit by itself: what comes after it had not seen it.
                    if batch.work.writes_own || started.elapsed() > LONGEST_COMMIT || session::is_waited_for() {
                        break;
                    }
                    // Users know in which order their transactions lock rows, not how ours follow each other: from
                    // the second one on a wait may be half of a deadlock. Each by itself waits as long as it may.
                    session::wait_briefly();
                }
                batch.finish()
            })
            .map_err(|e| report::name_peer(e, &self.peer.name))?;
            self.committed(state, newly_held);
            rest = &mut rest[count..];
        }
        Ok(())
    }

    pub(super) fn committed(&mut self, state: State, newly_held: Vec<u32>) {
        self.state = state;
        self.held.extend(newly_held);
        self.renewed.clear();
        self.progress.committed(state);
    }

    /// Applies, in order and in one local commit, the held changes of tables that are active now.
    pub(super) fn drain(&mut self) -> Result<()> {
        let due: Vec<u32> = self.held.iter().copied().filter(|relid| self.is_active(*relid)).collect();
        let rest = self.held.iter().any(|relid| !due.contains(relid));
        let (state, newly_held) = session::transaction(|| {
            let mut batch = Batch::new(&mut *self, false);
            let mut ordinal = 0;
            loop {
                let page = held::page(&batch.applier.peer.name, ordinal)?;
                let Some(last) = page.last() else { break };
                ordinal = last.ordinal;
                let mine: Vec<&Held> = page.iter().filter(|h| due.contains(&h.descriptor.relid)).collect();
                for held in &mine {
                    batch.held(held)?;
                    arbiter::settle(&mut batch.work)?;
                }
                held::delete(&mine.iter().map(|h| h.ordinal).collect::<Vec<_>>())?;
            }
            batch.end_of_source()?;
            if !rest {
                batch.state.frozen = false;
                batch.state.seen = batch.state.applied;
            }
            batch.finish()
        })
        .map_err(|e| report::name_peer(e, &self.peer.name))?;
        self.held.retain(|relid| !due.contains(relid));
        self.committed(state, newly_held);
        Ok(())
    }
}

impl<'a> Batch<'a> {
    pub(super) fn new(applier: &'a mut Applier, careful: bool) -> Batch<'a> {
        let work = Work {
            own: applier.own,
            peer: applier.peer.node,
            stable_peer: applier.state.stable_peer,
            mark: applier.state.applied,
            records: Vec::new(),
            rulings: Vec::new(),
            gone: Vec::new(),
            queued: false,
            seen: Mark::default(),
            careful: careful.then(Careful::default),
            writes_own: false,
        };
        Batch { state: applier.state, applier, newly_held: Vec::new(), tables: HashMap::new(), work }
    }

    fn transaction(&mut self, transaction: &mut Transaction) -> Result<()> {
        let (mark, seen) = (transaction.mark, transaction.seen);
        if mark.position <= self.state.applied.position {
            return Ok(()); // It came before.
        }
        self.applier.check_marks(mark, seen, transaction.stable)?;
        clock::observe(mark.position.0)?;
        session::renew_snapshot();
        // The peer's stable point is in force from here. Our own follows the acknowledgement after the commit:
        // until then the peer can't have forgotten by it, and a transaction that is tried again must not be
        // judged by what a later one said.
        self.work.stable_peer = self.work.stable_peer.max(transaction.stable);
        self.work.mark = mark;
        self.work.seen = seen;
        let mut body = std::mem::replace(&mut transaction.body, super::Body::Inline(Vec::new()));
        let result = body.for_each(|item| self.item(item, seen));
        transaction.body = body;
        result?;
        self.end_of_source().map_err(|e| report::at_end(e, mark))?;
        self.state.applied = mark;
        self.state.acked = later(self.state.acked, seen);
        self.state.stable_peer = self.work.stable_peer;
        if !self.state.frozen {
            self.state.seen = mark;
        }
        Ok(())
    }

    fn item(&mut self, item: &Item<'_>, seen: Mark) -> Result<()> {
        let id = match item {
            Item::Record(bytes) => return conflict::receive(bytes),
            Item::Change(change) => change.descriptor,
            Item::Truncate { descriptor, .. } | Item::Policy { descriptor, .. } => *descriptor,
        };
        match (self.destination(id)?, item) {
            (Destination::Wait(descriptor), _) => self.hold(&descriptor, item),
            (Destination::Table(relid, route), Item::Change(change)) => self.change(relid, &route, change),
            (Destination::Table(relid, _), Item::Truncate { version, .. }) => self.truncate(relid, *version, seen),
            (Destination::Table(relid, route), Item::Policy { entry, .. }) => self.policy(relid, &route, entry),
            (Destination::Table(..), Item::Record(_)) => Ok(()),
        }
    }

    /// Keeps an item for later; from the first one on the peer is not told of more.
    fn hold(&mut self, descriptor: &Descriptor, item: &Item<'_>) -> Result<()> {
        if !self.state.frozen {
            self.state.frozen = true;
            self.state.seen = self.state.applied;
        }
        self.newly_held.push(descriptor.relid);
        held::put(&self.applier.peer.name, self.work.mark, descriptor, item)
    }

    fn destination(&mut self, id: DescriptorId) -> Result<Destination> {
        let Some(descriptor) = self.applier.descriptors.get(&id).cloned() else {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
                format!("the peer sent a change of descriptor {id}, which it has not described"),
                "The sending side is damaged or speaks another protocol; see its server log.",
            ));
        };
        let relid = descriptor.relid;
        if self.applier.held.contains(&relid) || self.newly_held.contains(&relid) {
            return Ok(Destination::Wait(descriptor));
        }
        match self.route(&descriptor)? {
            Some((relid, route)) => Ok(Destination::Table(relid, route)),
            None => Ok(Destination::Wait(descriptor)),
        }
    }

    /// The way into the local table, open; none if the table is not ready.
    fn route(&mut self, descriptor: &Rc<Descriptor>) -> Result<Option<(pg_sys::Oid, Rc<Route>)>> {
        let Some(target) = self.applier.targets.get_mut(&descriptor.relid) else { return Ok(None) };
        let (tables::State::Active, Some(own)) = (target.state, &target.own) else { return Ok(None) };
        let oid = own.relid;
        if let std::collections::hash_map::Entry::Vacant(free) = self.tables.entry(oid) {
            match Table::open(oid)? {
                Some(table) => drop(free.insert(table)),
                None => {
                    target.state = tables::State::MissingHere;
                    return Ok(None);
                }
            }
        }
        let Some(table) = self.tables.get(&oid) else { return Ok(None) };
        if !still_active(target, &table.synced) {
            return Ok(None);
        }
        if let Some(route) = self.applier.routes.get(&descriptor.id)
            && Rc::ptr_eq(&route.local, &table.synced)
        {
            return Ok(Some((oid, route.clone())));
        }
        match Route::new(descriptor, &target.peer.shape, table.synced.clone()) {
            Ok(route) => {
                let route = Rc::new(route);
                self.applier.routes.insert(descriptor.id, route.clone());
                Ok(Some((oid, route)))
            }
            Err(_) => {
                target.state = tables::State::SchemaDiffers;
                Ok(None)
            }
        }
    }

    fn change(&mut self, relid: pg_sys::Oid, route: &Route, change: &Change<'_>) -> Result<()> {
        let mark = self.work.mark;
        self.settle_if_put_off(relid, route, change)?;
        let Some(table) = self.tables.get_mut(&relid) else { return Err(Error::bug("a table was closed too early")) };
        let work = &mut self.work;
        error::catch(|| row::apply(table, route, change, work)).map_err(|e| report::on_row(e, route, change, mark))
    }

    /// A key is changed once per transaction; should it come again, its row finds its place first.
    fn settle_if_put_off(&mut self, relid: pg_sys::Oid, route: &Route, change: &Change<'_>) -> Result<()> {
        if self.work.careful.is_none() {
            return Ok(());
        }
        let local = route.translate(change)?;
        let key = row::key_bytes(&route.local, &local.key);
        let again = self.work.careful.as_ref().is_some_and(|careful| careful.has_put_off(relid, &key));
        if again { self.settle() } else { Ok(()) }
    }

    /// Of a transaction that is applied carefully: what shows, and what is displaced.
    fn settle(&mut self) -> Result<()> {
        let (tables, work) = (&mut self.tables, &mut self.work);
        error::catch(|| careful::settle(tables, work))
    }

    fn truncate(&mut self, relid: pg_sys::Oid, version: Hlc, seen: Mark) -> Result<()> {
        self.settle()?;
        if version.node() != self.work.peer || version.0 > self.work.mark.position.0 {
            return Err(Error::operator(
                PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
                "the peer sent a truncate under a version that is not its own",
                "The sending side is damaged or not what it says it is; see its server log.",
            ));
        }
        let Some(table) = self.tables.remove(&relid) else { return Err(Error::bug("a table was closed too early")) };
        if let Some(table) = truncate::apply(table, version, seen, &mut self.work)? {
            self.tables.insert(relid, table);
        }
        Ok(())
    }

    /// An entry of the peer's policy log. The table is opened anew, with it, for the next change.
    fn policy(&mut self, relid: pg_sys::Oid, route: &Route, entry: &[u8]) -> Result<()> {
        self.settle()?;
        policy::receive(entry, &route.local, self.work.own, self.work.peer, |name| route.local_name(name))?;
        if let Some(table) = self.tables.remove(&relid) {
            table.close();
        }
        Ok(())
    }

    /// What a source transaction owes at its end: rows without a place, foreign keys, arbitrated conflicts,
    /// deferred unique constraints.
    pub(super) fn end_of_source(&mut self) -> Result<()> {
        self.settle()?;
        arbiter::settle(&mut self.work)?;
        let gone = std::mem::take(&mut self.work.gone);
        for parent in gone {
            parent.check()?;
        }
        if std::mem::take(&mut self.work.queued) {
            error::catch(|| {
                constraints::Checks::fire();
                Ok(())
            })?;
        }
        Ok(())
    }

    fn held(&mut self, held: &Held) -> Result<()> {
        self.work.mark = held.mark;
        let relid = held.descriptor.relid;
        let descriptor = Rc::new(held.descriptor.clone());
        let Some((oid, route)) = self.route(&descriptor)? else {
            let target = self.applier.targets.get(&relid).map_or("gone", |t| t.state.name());
            return Err(Error::retry(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("table {}.{} is {target} again", held.descriptor.schema, held.descriptor.table),
            ));
        };
        for item in wire::items(&held.item) {
            match item? {
                Item::Change(change) => self.change(oid, &route, &change)?,
                Item::Truncate { version, .. } => self.truncate(oid, version, Mark::default())?,
                Item::Policy { entry, .. } => self.policy(oid, &route, entry)?,
                Item::Record(_) => {}
            }
        }
        Ok(())
    }

    /// Everything but the commit itself.
    pub(super) fn finish(mut self) -> Result<(State, Vec<u32>)> {
        for (_, table) in self.tables.drain() {
            table.close();
        }
        if !self.work.records.is_empty() || self.work.writes_own {
            capture::carry(self.state.seen);
        }
        for record in &self.work.records {
            capture::emit(&Item::Record(Bytes::new(record)));
        }
        self.note_renewed()?;
        self.applier.progress.insert(&self.applier.peer, &self.state);
        Ok((self.state, self.newly_held))
    }

    /// Shapes that came with the stream are what `tandem.tables` should judge by.
    fn note_renewed(&self) -> Result<()> {
        let _superuser = ActingAs::superuser();
        for relid in &self.applier.renewed {
            let Some(target) = self.applier.targets.get(relid) else { continue };
            let shape = serde_json::to_string(&target.peer.shape).map_err(|e| Error::bug(e.to_string()))?;
            let query = "update tandem.peer_table set shape = $4 \
                         where peer = $1 and schema_name = $2 and table_name = $3";
            let own_names = (target.peer.shape.schema.as_str(), target.peer.shape.table.as_str());
            let arguments =
                [self.applier.peer.name.as_str().into(), own_names.0.into(), own_names.1.into(), shape.into()];
            Spi::connect_mut(|client| client.update(query, None, &arguments).map(drop))?;
        }
        Ok(())
    }
}

/// Looks again if the local table has changed since it was judged.
fn still_active(target: &mut Target, synced: &Rc<SyncedRelation>) -> bool {
    let Some(own) = &mut target.own else { return false };
    let known = matches!(&own.relation, Ok(known) if Rc::ptr_eq(known, synced));
    if !known {
        own.relation = Ok(synced.clone());
        let renamed = own.schema != synced.schema || own.table != synced.table;
        target.state = if renamed { tables::State::MissingHere } else { tables::compare(own, &target.peer).0 };
    }
    target.state == tables::State::Active
}
