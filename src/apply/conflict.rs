//! Conflict records: what a change met here and what was lost by it, written in the transaction that
//! dropped the value, and the join of those that come from the peer.
use super::arbiter;
use super::history;
use super::image::{self, Content};
use super::route::{Arrived, Local};
use super::row::Work;
use crate::clock;
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::relation::SyncedRelation;
use pgrx::prelude::*;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use tandem_model::change::Op;
use tandem_model::hlc::Hlc;
use tandem_model::judge::{Effect, Existence, Loss, RowState, Side, Verdict};
use tandem_model::record::{ConflictType, Decision, Image, Record, Status};
use tandem_model::stable::Stable;
use tandem_model::versions::CellId;
use uuid::Uuid;

/// The policy under which both sides settle by themselves.
const LAST_UPDATE_WINS: &str = "last_update_wins";
/// Bytes of one record that are still written; two images of a row must fit.
const MAX_RECORD: usize = 512 * 1024 * 1024;

/// A change and what it met.
pub struct Pair<'a> {
    pub rel: &'a SyncedRelation,
    pub local: &'a Local<'a>,
    pub state: &'a RowState,
    pub stable: &'a Stable,
    pub verdict: &'a Verdict,
    /// What is stored, of the row or of its tombstone.
    pub stored: &'a Content,
    /// What the counters hold afterwards that the change added to.
    pub counted: &'a Arrived,
}

/// Writes a record for each loss, here now and to the peer with this commit.
pub fn record(pair: &Pair<'_>, work: &mut Work) -> Result<()> {
    let key = image::key_json(pair.rel, &pair.local.key)?;
    let tuples = pair.tuples(work)?;
    let result = pair.result()?;
    for loss in &pair.verdict.losses {
        let decided = arbiter::decided(pair, loss, work);
        let record = Record {
            conflict_id: Record::id(&pair.rel.schema, &pair.rel.table, key.get(), loss.losing),
            schema: pair.rel.schema.clone(),
            table: pair.rel.table.clone(),
            key: key.clone(),
            conflict_type: loss.conflict,
            constraint_name: None,
            losing: loss.losing,
            winning: loss.winning,
            rival: None,
            cells: cell_names(pair.rel, &loss.cells),
            lost: pair.lost(loss)?,
            replaced: pair.replaced(loss)?,
            overruled: BTreeMap::new(),
            base: pair.base(loss)?,
            tuples: tuples.clone(),
            result: result.clone(),
            policy: decided.name(),
            detected_at: now_us(),
            decision: Decision { status: decided.status(), ..undecided() },
        };
        arbiter::consider(pair, loss, &decided, &record, work)?;
        if history::upsert(record.clone())? {
            work.records.push(to_bytes(&record)?);
        }
    }
    Ok(())
}

/// At detection nobody has decided.
pub fn undecided() -> Decision {
    Decision { version: Hlc(0), status: Status::Auto, by: None, at: None, resolution: None, note: None }
}

pub fn to_bytes(record: &Record) -> Result<Vec<u8>> {
    serde_json::to_vec(record).map_err(|e| Error::bug(format!("a conflict record is not JSON: {e}")))
}

/// Microseconds since the Unix epoch.
pub fn now_us() -> i64 {
    const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }.saturating_add(POSTGRES_EPOCH_US)
}

impl Pair<'_> {
    fn same_life(&self) -> bool {
        self.local.change.op != Op::Insert
            && self.state.existence != Existence::Absent
            && self.stable.same(self.local.change.life, self.state.versions.birth)
    }

    /// This node's row, and the peer's: as far as the change tells, completed from the row it belongs to.
    fn tuples(&self, work: &Work) -> Result<BTreeMap<u8, Image>> {
        let mut tuples = BTreeMap::new();
        if self.state.existence == Existence::Live {
            let tuple = image::to_json(self.rel, self.stored)?;
            tuples.insert(work.own.0, Image { rank: (1, self.state.hlc), tuple });
        }
        let change = &self.local.change;
        if change.op != Op::Delete {
            let content = if self.same_life() {
                let mut content = self.stored.clone();
                image::overlay(&mut content, &self.local.new);
                content
            } else {
                image::of_arrived(self.rel, &self.local.key, &self.local.new)
            };
            let tuple = image::to_json(self.rel, &content)?;
            tuples.insert(work.peer.0, Image { rank: (0, change.version), tuple });
        }
        Ok(tuples)
    }

    /// The values of the losing write in the cells that it lost.
    fn lost(&self, loss: &Loss) -> Result<BTreeMap<String, Box<RawValue>>> {
        let held = match loss.loser {
            Side::Local => self.stored.clone(),
            Side::Remote => image::of_arrived(self.rel, &[], &self.local.new),
        };
        self.values(loss, &held)
    }

    /// What an update of the peer replaced in those cells.
    fn replaced(&self, loss: &Loss) -> Result<BTreeMap<String, Box<RawValue>>> {
        if self.local.change.op != Op::Update {
            return Ok(BTreeMap::new());
        }
        let old = image::of_arrived(self.rel, &[], &self.local.old_values(&loss.cells));
        self.values(loss, &old)
    }

    fn values(&self, loss: &Loss, content: &Content) -> Result<BTreeMap<String, Box<RawValue>>> {
        let columns = self.rel.columns.iter().zip(content);
        columns
            .filter(|(column, _)| column.key_ordinal.is_none() && loss.cells.contains(&column.cell))
            .filter_map(|(column, known)| Some((column, (*known)?)))
            .map(|(column, value)| Ok((column.name.clone(), image::literal(column, value)?)))
            .collect()
    }

    /// What both sides started from: the values that the change replaced, over the row they belong to.
    fn base(&self, loss: &Loss) -> Result<Option<Image>> {
        let change = &self.local.change;
        if !self.same_life() || change.op != Op::Update {
            return Ok(None);
        }
        let all: Vec<CellId> = change.cells.iter().map(|c| c.cell).collect();
        let cells = if loss.cells.is_empty() { &all } else { &loss.cells };
        let mut content = self.stored.clone();
        image::overlay(&mut content, &self.local.old_values(cells));
        let version = cells.iter().map(|c| change.base.cell(*c)).max().unwrap_or_default();
        Ok(Some(Image { rank: (0, version), tuple: image::to_json(self.rel, &content)? }))
    }

    /// What the row is afterwards; nothing if it doesn't show.
    fn result(&self) -> Result<Option<Image>> {
        let taken = |cells: &[CellId]| {
            let mut content = self.stored.clone();
            let arrived = self.local.new.iter().filter(|(i, _)| cells.contains(&self.rel.columns[*i].cell));
            image::overlay(&mut content, &arrived.copied().collect::<Vec<_>>());
            image::overlay(&mut content, self.counted);
            content
        };
        let live = self.state.existence == Existence::Live;
        let content = match &self.verdict.effect {
            Effect::Insert | Effect::Replace => image::of_arrived(self.rel, &self.local.key, &self.local.new),
            Effect::Update(cells) | Effect::Revive(cells) => taken(cells),
            Effect::Keep | Effect::Restamp if live => self.stored.clone(),
            _ => return Ok(None),
        };
        let tuple = image::to_json(self.rel, &content)?;
        Ok(Some(Image { rank: (0, self.verdict.hlc), tuple }))
    }
}

/// Names by which both nodes know cells: the sorted names of their columns.
pub fn cell_names(rel: &SyncedRelation, cells: &[CellId]) -> Vec<String> {
    let mut names: Vec<String> = cells
        .iter()
        .map(|cell| {
            let mut columns: Vec<_> = rel.cell_columns(*cell).map(|c| c.name.as_str()).collect();
            columns.sort_unstable();
            if *cell == 0 { "row".to_string() } else { columns.join(",") }
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// A record that this node makes outside of a pair (a truncate, say).
pub fn record_of(
    rel: &SyncedRelation,
    key: Box<RawValue>,
    conflict_type: ConflictType,
    losing: Hlc,
    winning: Hlc,
    tuples: BTreeMap<u8, Image>,
) -> Record {
    Record {
        conflict_id: Record::id(&rel.schema, &rel.table, key.get(), losing),
        schema: rel.schema.clone(),
        table: rel.table.clone(),
        key,
        conflict_type,
        constraint_name: None,
        losing,
        winning,
        rival: None,
        cells: Vec::new(),
        lost: BTreeMap::new(),
        replaced: BTreeMap::new(),
        overruled: BTreeMap::new(),
        base: None,
        tuples,
        result: None,
        policy: LAST_UPDATE_WINS.to_string(),
        detected_at: now_us(),
        decision: undecided(),
    }
}

/// Writes a record that this node made, and has it travel.
pub fn keep(record: Record, work: &mut Work) -> Result<()> {
    let bytes = to_bytes(&record)?;
    if history::upsert(record)? {
        work.records.push(bytes);
    }
    Ok(())
}

/// The same of a conflict that waits for a person: open, also if it was closed because its cause was gone, and
/// now is there again.
pub fn keep_open(mut record: Record, work: &mut Work) -> Result<()> {
    record.decision.status = Status::Open;
    let known = history::find(record.conflict_id)?;
    if known.is_some_and(|known| known.decision.status == Status::Superseded) {
        record.decision.version = clock::tick();
        record.decision.at = Some(now_us());
    }
    keep(record, work)
}

/// Closes what has settled itself.
pub fn supersede(mut record: Record, note: &str, work: &mut Work) -> Result<()> {
    record.decision = Decision {
        version: clock::tick(),
        status: Status::Superseded,
        by: None,
        at: Some(now_us()),
        resolution: None,
        note: Some(note.to_string()),
    };
    keep(record, work)
}

/// The open records of rows that a constraint keeps out of a table.
pub fn open_of_constraints(rel: &SyncedRelation) -> Result<Vec<Record>> {
    let query = "select record::text from tandem.conflict
                 where schema_name = $1 and table_name = $2 and status = 'open' and constraint_name is not null";
    let _superuser = ActingAs::superuser();
    let texts = Spi::connect_mut(|client| -> std::result::Result<Vec<String>, pgrx::spi::Error> {
        let rows = client.update(query, None, &[rel.schema.as_str().into(), rel.table.as_str().into()])?;
        rows.filter_map(|row| row.get::<String>(1).transpose()).collect()
    })?;
    let parse = |text: String| serde_json::from_str(&text).map_err(|e| Error::bug(format!("a conflict record: {e}")));
    texts.into_iter().map(parse).collect()
}

/// Changes a record that this node made in this transaction, and has it travel.
pub fn amend(id: Uuid, work: &mut Work, f: impl FnOnce(&mut Record)) -> Result<()> {
    let Some(mut record) = history::find(id)? else { return Err(Error::bug(format!("conflict {id} is not there"))) };
    f(&mut record);
    keep(record, work)
}

/// Joins a record (or a decision) of the peer into the history.
pub fn receive(bytes: &[u8]) -> Result<()> {
    let damaged = |why: String| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
            format!("the peer sent a conflict record that cannot be read: {why}"),
            "The sending side is damaged or speaks another protocol; see its server log.",
        )
    };
    if bytes.len() > MAX_RECORD {
        return Err(damaged(format!("{} bytes", bytes.len())));
    }
    let record: Record = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
    if record.derived_id() != record.conflict_id {
        return Err(damaged("its id is not that of its key and version".to_string()));
    }
    // A later decision here must be later than this one; and no version may come from the far future.
    for version in [record.decision.version, record.losing, record.winning] {
        clock::observe(version.0)?;
    }
    history::upsert(record).map(drop)
}
