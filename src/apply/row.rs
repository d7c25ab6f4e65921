//! One change of one row: lock first, look at the versions, let the model judge, do what it says.
use super::arbiter::Ruling;
use super::careful::Careful;
use super::conflict;
use super::image::{self, Content};
use super::merging;
use super::parents::Gone;
use super::route::{Arrived, Local, Route};
use super::table::{Row, Table, set_value, value_of};
use crate::counter;
use crate::displaced::{self, Displaced};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::registry;
use crate::relation::{Column, SyncedRelation};
use crate::shmem;
use crate::stash::Stashed;
use crate::tombstone::{self, Tombstone};
use crate::value;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::Acquire;
use tandem_model::change::{Change, Op};
use tandem_model::hlc::{Hlc, Mark, NodeId};
use tandem_model::judge::{Effect, Existence, RowState, Verdict, judge};
use tandem_model::stable::Stable;
use tandem_model::versions::CellId;

/// What one source transaction needs to know, and what it leaves behind for its end.
pub struct Work {
    pub own: NodeId,
    pub peer: NodeId,
    /// The peer's stable point that is in force for this source transaction.
    pub stable_peer: Hlc,
    pub mark: Mark,
    /// Conflict records that this node made: they travel with this local commit.
    pub records: Vec<Vec<u8>>,
    /// What the arbiter is to settle once the source transaction is whole.
    pub rulings: Vec<Ruling>,
    /// Parents that went, to be looked at once the source transaction is whole.
    pub gone: Vec<Gone>,
    /// Something waits in the trigger queue.
    pub queued: bool,
    /// What of our stream the source transaction had seen.
    pub seen: Mark,
    /// The source transaction ran into a constraint, and is applied once more.
    pub careful: Option<Careful>,
    /// This local transaction has taken versions of its own on purpose.
    pub writes_own: bool,
}

impl Work {
    pub fn stable(&self) -> Stable {
        let own = shmem::database().stable_own.load(Acquire);
        Stable { own: (self.own, Hlc(own)), peer: (self.peer, self.stable_peer) }
    }
}

/// What this node holds of the key.
struct Held {
    row: Option<Row>,
    /// Beside a row that shows: what of it can't show.
    displaced: Option<Displaced>,
    tombstone: Option<Tombstone>,
    state: RowState,
}

/// Applies a change. A Postgres ERROR passes through.
pub fn apply(table: &mut Table, route: &Route, sent: &Change<'_>, work: &mut Work) -> Result<()> {
    validate(sent, work)?;
    let _memory = table.enter_row_memory();
    let _owner = ActingAs::owner(table.synced.owner);
    let mut local = route.translate(sent)?;
    let key = key_bytes(&table.synced, &local.key);
    let held = hold(table, &local, &key)?;
    let stable = work.stable();
    let stored = Stored::new(table, &held)?;
    let verdict = {
        let rel = &table.synced;
        let mut same = |cell: CellId| stored.same(rel, &local, cell);
        judge(&held.state, &local.change, &stable, &rel.judged_by, &mut same)
    };
    let counted = counted(&table.synced, &verdict)?;
    if !verdict.losses.is_empty() {
        let pair = conflict::Pair {
            counted: &counted,
            rel: &table.synced,
            local: &local,
            state: &held.state,
            stable: &stable,
            verdict: &verdict,
            stored: &stored.content,
        };
        conflict::record(&pair, work)?;
    }
    local.new.retain(|(column, _)| !counted.iter().any(|(i, _)| i == column));
    local.new.extend(counted);
    execute(table, &local, &key, held, &stored.content, &verdict, work)?;
    work.queued |= table.has_checks();
    refuse_trigger_writes(table, work)
}

/// What the counters hold that the change added to: what it says of them is what its node knows.
fn counted(rel: &SyncedRelation, verdict: &Verdict) -> Result<Arrived> {
    let (Effect::Update(taken) | Effect::Revive(taken) | Effect::UpdateTombstone(taken)) = &verdict.effect else {
        return Ok(Vec::new());
    };
    let mut counted = Vec::new();
    for counter in verdict.versions.counters.iter().filter(|c| taken.contains(&c.cell)) {
        for (i, column) in rel.columns.iter().enumerate().filter(|(_, column)| column.cell == counter.cell) {
            counted.push((i, counter::value(rel, column, counter)?));
        }
    }
    Ok(counted)
}

/// What the peer says must be its own to say (I13).
fn validate(change: &Change<'_>, work: &Work) -> Result<()> {
    let limit = work.mark.position.0;
    let bad = |v: Hlc| v.node() != work.peer || v.0 > limit;
    let birth = change.op == Op::Insert && bad(change.life);
    if !bad(change.version) && !birth && !change.cells.iter().any(|c| bad(c.version) || c.version > change.version) {
        return Ok(());
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
        "the peer sent a change under a version that is not its own or lies above the transaction's position",
        "The sending side is damaged or not what it says it is; see its server log.",
    ))
}

fn hold(table: &mut Table, local: &Local<'_>, key: &[u8]) -> Result<Held> {
    let row = table.lock_row(&local.key, local.change.op == Op::Delete);
    let displaced = displaced::find(table.synced.relid, key);
    if let Some(row) = row {
        let (hlc, versions) = table.versions_of(&row)?;
        let state = RowState { existence: Existence::Live, hlc, versions };
        return Ok(Held { row: Some(row), displaced, tombstone: None, state });
    }
    if let Some(Displaced { row, .. }) = &displaced {
        let state = RowState { existence: Existence::Live, hlc: row.hlc, versions: row.versions.clone() };
        return Ok(Held { row: None, displaced, tombstone: None, state });
    }
    let tombstone = tombstone::find(table.synced.relid, key);
    let state = match &tombstone {
        Some(t) => RowState { existence: Existence::Tombstone, hlc: t.hlc, versions: t.versions.clone() },
        None => RowState { existence: Existence::Absent, hlc: Hlc(0), versions: Default::default() },
    };
    Ok(Held { row: None, displaced: None, tombstone, state })
}

/// The stored content, of a row or of a tombstone.
struct Stored {
    content: Content,
}

impl Stored {
    fn new(table: &Table, held: &Held) -> Result<Stored> {
        let content = match (&held.row, &held.displaced, &held.tombstone) {
            (Some(row), Some(waiting), _) => merging::joined(table, row, waiting)?,
            (Some(row), None, _) => image::of_row(&table.synced, row),
            (None, Some(displaced), _) => image::of_tombstone(&table.synced, &displaced.row)?,
            (None, None, Some(tombstone)) => image::of_tombstone(&table.synced, tombstone)?,
            (None, None, None) => vec![None; table.synced.columns.len()],
        };
        Ok(Stored { content })
    }

    /// True if all that the change says of a cell is stored already.
    fn same(&self, rel: &SyncedRelation, local: &Local<'_>, cell: CellId) -> bool {
        local.new.iter().filter(|(column, _)| rel.columns[*column].cell == cell).all(|(column, new)| {
            match self.content[*column] {
                Some(stored) => value::equal(&rel.columns[*column], stored, *new),
                None => false,
            }
        })
    }
}

fn execute(
    table: &mut Table,
    local: &Local<'_>,
    key: &[u8],
    held: Held,
    stored: &Content,
    verdict: &Verdict,
    work: &mut Work,
) -> Result<()> {
    let waiting = held.displaced;
    if held.row.is_none()
        && let Some(displaced) = waiting
    {
        return execute_displaced(table, local, key, displaced, stored, verdict);
    }
    let had_tombstone = held.tombstone.is_some();
    match (&verdict.effect, held.row) {
        (Effect::Keep, _) => {}
        (Effect::Missing, None) => nothing_came_meanwhile(table, local)?,
        (Effect::Missing, Some(_)) => {}
        (Effect::Insert, None) => {
            let mut row = born(table, local);
            table.set_versions(&mut row, verdict.hlc, &verdict.versions);
            put_row(table, key, &row, had_tombstone, work)?;
        }
        (Effect::Revive(cells), None) => {
            let mut content = stored.clone();
            image::overlay(&mut content, &of_cells(table, local, cells));
            let mut row = row_of(table, local, &content);
            table.set_versions(&mut row, verdict.hlc, &verdict.versions);
            put_row(table, key, &row, had_tombstone, work)?;
        }
        (Effect::Restamp, Some(row)) => replace_row(table, key, &row, row.clone(), verdict, work)?,
        (Effect::Update(cells), Some(old)) => {
            let mut content = stored.clone();
            image::overlay(&mut content, &of_cells(table, local, cells));
            let mut row = old.clone();
            for (column, value) in table.synced.columns.iter().zip(&content) {
                set_value(&mut row, column, value.flatten());
            }
            let merge =
                merging::Merge { key, old: &old, cells, verdict, state: &held.state, waiting: waiting.as_ref() };
            if !merging::settle(table, &merge, &row, work)? {
                replace_row(table, key, &old, row, verdict, work)?;
            }
        }
        (Effect::Replace, Some(old)) => {
            let row = born(table, local);
            displaced::remove(table.synced.relid, key);
            replace_row(table, key, &old, row, verdict, work)?;
        }
        (Effect::Delete, Some(old)) => {
            bury(table, key, stored, verdict);
            displaced::remove(table.synced.relid, key);
            note_gone(table, &old, None, work)?;
            table.delete();
        }
        (Effect::Restamp | Effect::Delete, None) => {
            bury(table, key, stored, verdict);
            nothing_came_meanwhile(table, local)?;
        }
        (Effect::UpdateTombstone(cells), None) => {
            let mut content = stored.clone();
            image::overlay(&mut content, &of_cells(table, local, cells));
            bury(table, key, &content, verdict);
            nothing_came_meanwhile(table, local)?;
        }
        (effect, row) => {
            let what = if row.is_some() { "a row that shows" } else { "a row that does not show" };
            return Err(Error::bug(format!("{effect:?} on {what}")));
        }
    }
    Ok(())
}

/// A row that is alive and doesn't show changes as any other, where it waits; whether it can show now is asked
/// soon after.
fn execute_displaced(
    table: &mut Table,
    local: &Local<'_>,
    key: &[u8],
    displaced: Displaced,
    stored: &Content,
    verdict: &Verdict,
) -> Result<()> {
    let relid = table.synced.relid;
    let content = match &verdict.effect {
        Effect::Keep | Effect::Missing => return Ok(()),
        Effect::Delete => {
            bury(table, key, stored, verdict);
            displaced::remove(relid, key);
            return nothing_came_meanwhile(table, local);
        }
        Effect::Restamp => stored.clone(),
        Effect::Update(cells) => {
            let mut content = stored.clone();
            image::overlay(&mut content, &of_cells(table, local, cells));
            content
        }
        Effect::Replace => {
            let row = born(table, local);
            image::of_row(&table.synced, &row)
        }
        effect => return Err(Error::bug(format!("{effect:?} on a displaced row"))),
    };
    let row = Stashed {
        hlc: verdict.hlc,
        versions: verdict.versions.clone(),
        image: image::to_bytes(&table.synced, &content),
        descriptor: table.synced.descriptor,
    };
    displaced::put(relid, key, &Displaced { row, ..displaced });
    nothing_came_meanwhile(table, local)
}

/// The values that arrived for these cells.
fn of_cells(table: &Table, local: &Local<'_>, cells: &[CellId]) -> super::route::Arrived {
    local.new.iter().filter(|(column, _)| cells.contains(&table.synced.columns[*column].cell)).copied().collect()
}

/// A row of what arrived; columns that the change doesn't know take their defaults.
fn born(table: &mut Table, local: &Local<'_>) -> Row {
    let content = image::of_arrived(&table.synced, &local.key, &local.new);
    row_of(table, local, &content)
}

fn row_of(table: &mut Table, local: &Local<'_>, content: &Content) -> Row {
    let rel = table.synced.clone();
    let mut row = table.row_of_content(content);
    for (value, column) in local.key.iter().zip(&rel.key) {
        set_value(&mut row, &rel.columns[*column], Some(*value));
    }
    row
}

fn put_row(table: &mut Table, key: &[u8], row: &Row, had_tombstone: bool, work: &mut Work) -> Result<()> {
    if had_tombstone {
        tombstone::remove(table.synced.relid, key);
    }
    if let Some(careful) = &mut work.careful {
        if careful.is_contested(table, row)? {
            careful.put_off(table, key, row);
            return Ok(());
        }
        careful.wrote(table, row)?;
    }
    table.insert(row);
    Ok(())
}

fn replace_row(
    table: &mut Table,
    key: &[u8],
    old: &Row,
    mut row: Row,
    verdict: &Verdict,
    work: &mut Work,
) -> Result<()> {
    table.set_versions(&mut row, verdict.hlc, &verdict.versions);
    note_gone(table, old, Some(&row), work)?;
    if let Some(careful) = &mut work.careful {
        if careful.is_contested(table, &row)? {
            careful.put_off(table, key, &row);
            table.delete();
            return Ok(());
        }
        careful.wrote(table, &row)?;
    }
    table.update(&row);
    Ok(())
}

/// Writes a tombstone with the row's last content.
fn bury(table: &Table, key: &[u8], content: &Content, verdict: &Verdict) {
    let rel = &table.synced;
    let tombstone = Tombstone {
        hlc: verdict.hlc,
        versions: verdict.versions.clone(),
        image: image::to_bytes(rel, content),
        descriptor: rel.descriptor,
    };
    tombstone::put(rel.relid, key, &tombstone);
}

/// A local session may have inserted the key after it was looked for; it looks for tombstones after its
/// row is in the heap, so one of the two sees the other.
fn nothing_came_meanwhile(table: &mut Table, local: &Local<'_>) -> Result<()> {
    if table.lock_row(&local.key, false).is_none() {
        return Ok(());
    }
    Err(Error::retry(
        PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
        format!("a row of table {} was inserted while a change of its key was applied", table.synced.display_name()),
    ))
}

fn note_gone(table: &mut Table, old: &Row, new: Option<&Row>, work: &mut Work) -> Result<()> {
    if let Some(careful) = &mut work.careful {
        return careful.took(table, old);
    }
    for key in &table.parents_of {
        work.gone.extend(key.gone(&table.synced, old, new));
    }
    Ok(())
}

/// What an ENABLE ALWAYS trigger writes to a synced table would be a local write in the peer's name.
pub fn refuse_trigger_writes(table: &Table, work: &Work) -> Result<()> {
    if table.user_triggers.is_empty() || work.writes_own || registry::first().is_zero() {
        return Ok(());
    }
    let names = table.user_triggers.join("\", \"");
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_TRIGGERED_ACTION_EXCEPTION,
        format!(
            "trigger \"{names}\" of table {} wrote to a synced table while a change of the peer was applied",
            table.synced.display_name()
        ),
        "What the trigger writes comes from the peer already: let it not fire on apply (ALTER TABLE … ENABLE TRIGGER …).",
    ))
}

/// The bytes of a key, as tombstones know it.
pub fn key_bytes(rel: &SyncedRelation, key: &[pg_sys::Datum]) -> Vec<u8> {
    let values = encoded_key(rel, key);
    value::encode_key(&values.iter().map(|v| Some(v.as_slice())).collect::<Vec<_>>())
}

/// The values of a key as they travel.
pub fn encoded_key(rel: &SyncedRelation, key: &[pg_sys::Datum]) -> Vec<Vec<u8>> {
    key.iter().zip(&rel.key).map(|(value, column)| encoded(&rel.columns[*column], *value)).collect()
}

/// A value as it travels.
pub fn encoded(column: &Column, value: pg_sys::Datum) -> Vec<u8> {
    let mut out = Vec::new();
    value::encode(column, value, &mut out);
    out
}

/// The key of a stored row.
pub fn key_of(rel: &SyncedRelation, row: &Row) -> Vec<pg_sys::Datum> {
    rel.key.iter().filter_map(|i| value_of(row, rel.columns[*i].attnum)).collect()
}
