//! The history as it is stored: `tandem.conflict`, one row per losing write, into which records are joined.
//!
//! The table is a ring of parts, by the time of the losing write: that never changes for an id, so that an
//! id is unique in the whole table because it is so in its part. Every statement here names the part.
use super::announce;
use super::conflict::to_bytes;
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::OwnedPreparedStatement;
use serde_json::value::RawValue;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use tandem_model::hlc::Hlc;
use tandem_model::record::{Decision, Record, Status};
use uuid::Uuid;

/// Parts of the ring (see `sql/catalog.sql`).
pub const PARTS: u32 = 12;
/// Losing writes of so many ms share a part: a ring is a year, a part a month.
const PART_MS: u64 = 30 * 24 * 3600 * 1000;

/// What is done to a part; each is prepared once per backend and part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Statement {
    Lock,
    Insert,
    Update,
}

thread_local! {
    static PREPARED: RefCell<HashMap<(Statement, u32), OwnedPreparedStatement>> = RefCell::default();
}

/// The part that holds the conflicts of a losing write.
pub fn part_of(losing: Hlc) -> u32 {
    const COUNTER_AND_NODE_BITS: u32 = 22;
    let part = (losing.0 >> COUNTER_AND_NODE_BITS) / PART_MS % u64::from(PARTS);
    part as u32
}

/// Joins a record into the table. False if it said nothing new.
pub fn upsert(mut record: Record) -> Result<bool> {
    let _superuser = ActingAs::superuser();
    let Some(stored) = read_for_update(&record)? else {
        let known = recall(&mut record)?;
        write(&record, Statement::Insert)?;
        if !known {
            announce::detected(&record)?;
        }
        return Ok(true);
    };
    let before = to_bytes(&stored)?;
    let was_open = stored.decision.status == Status::Open;
    let mut joined = stored;
    joined.join(record);
    if to_bytes(&joined)? == before {
        return Ok(false);
    }
    write(&joined, Statement::Update)?;
    if !was_open {
        announce::notify_if_open(&joined)?;
    }
    Ok(true)
}

/// The record of an id, locked until the end of the transaction.
pub fn find(id: Uuid) -> Result<Option<Record>> {
    let _superuser = ActingAs::superuser();
    let query = "select record::text from tandem.conflict where conflict_id = $1 for update";
    let text = Spi::connect_mut(|client| -> std::result::Result<Option<String>, pgrx::spi::Error> {
        let rows = client.update(query, Some(1), &[sql_uuid(id).into()])?;
        rows.into_iter().next().map_or(Ok(None), |row| row.get(1))
    })?;
    text.map(|text| parse(id, &text)).transpose()
}

fn parse(id: Uuid, text: &str) -> Result<Record> {
    serde_json::from_str(text).map_err(|e| Error::bug(format!("conflict {id} cannot be read: {e}")))
}

/// Writes the decision of a record that this transaction has read and locked.
pub fn decide(record: &Record) -> Result<()> {
    let _superuser = ActingAs::superuser();
    write(record, Statement::Update)
}

/// A record that is told again after retention has removed it keeps the decision that it had: nobody is
/// asked a second time. True if it had been here.
fn recall(record: &mut Record) -> Result<bool> {
    let query = "select decision::text from tandem.conflict_removed where conflict_id = $1";
    let decision: Option<String> = crate::pg::query::value(query, &[sql_uuid(record.conflict_id).into()])?;
    let Some(text) = decision else { return Ok(false) };
    // It counts as one that is here again.
    let (schema, table) = (record.schema.as_str(), record.table.as_str());
    Spi::run_with_args(
        "delete from tandem.conflict_removed where conflict_id = $1",
        &[sql_uuid(record.conflict_id).into()],
    )?;
    Spi::run_with_args(
        "update tandem.conflict_count set removed = removed - 1
         where schema_name = $1 and table_name = $2 and conflict_type = $3 and removed > 0",
        &[schema.into(), table.into(), name_of(&record.conflict_type)?.into()],
    )?;
    let decision: Decision = serde_json::from_str(&text)
        .map_err(|e| Error::bug(format!("the decision of a removed conflict cannot be read: {e}")))?;
    let mut before = record.clone();
    before.decision = decision;
    record.join(before);
    Ok(true)
}

fn sql_uuid(id: Uuid) -> pgrx::Uuid {
    pgrx::Uuid::from_bytes(*id.as_bytes())
}

fn read_for_update(record: &Record) -> Result<Option<Record>> {
    let id = record.conflict_id;
    let text = run(Statement::Lock, part_of(record.losing), &[sql_uuid(id).into()])?;
    text.map(|text| parse(id, &text)).transpose()
}

/// Runs a statement on a part. Returns the first column of its row, if there is one.
fn run(statement: Statement, part: u32, arguments: &[DatumWithOid<'_>]) -> Result<Option<String>> {
    PREPARED.with_borrow_mut(|prepared| {
        Spi::connect_mut(|client| -> Result<Option<String>> {
            let plan = match prepared.entry((statement, part)) {
                std::collections::hash_map::Entry::Occupied(held) => held.into_mut(),
                std::collections::hash_map::Entry::Vacant(free) => {
                    let types: Vec<_> = arguments.iter().map(|a| pg_sys::PgOid::from(a.oid())).collect();
                    free.insert(client.prepare_mut(statement.text(part).as_str(), &types)?.keep())
                }
            };
            let rows = client.update(&*plan, None, arguments)?;
            match rows.into_iter().next() {
                Some(row) => Ok(row.get::<String>(1)?),
                None => Ok(None),
            }
        })
    })
}

impl Statement {
    fn text(self, part: u32) -> String {
        match self {
            Statement::Lock => {
                format!("select record::text from tandem.conflict_{part} where conflict_id = $1 for update")
            }
            Statement::Insert => format!(
                "insert into tandem.conflict_{part} (conflict_id, schema_name, table_name, conflict_type, constraint_name,
                     key_tuple, losing_version, winning_version, cells, status, decision_version, detected_at, resolved_by,
                     resolved_at, conflict_resolution, note, policy, record, images, part, changed_at)
                 values ($1, $2, $3, $4, $5, $6::json, $7::int8::tandem.hlc, $8::int8::tandem.hlc, $9, $10,
                     $11::int8::tandem.hlc, 'epoch'::timestamptz + $12 * interval '1 microsecond', $13,
                     'epoch'::timestamptz + $14 * interval '1 microsecond', $15, $16, $17, $18::json, $19::json, {part},
                     clock_timestamp())
                 returning status"
            ),
            Statement::Update => format!(
                "update tandem.conflict_{part} set schema_name = $2, table_name = $3, conflict_type = $4,
                     constraint_name = $5, key_tuple = $6::json, losing_version = $7::int8::tandem.hlc,
                     winning_version = $8::int8::tandem.hlc, cells = $9, status = $10,
                     decision_version = $11::int8::tandem.hlc,
                     detected_at = 'epoch'::timestamptz + $12 * interval '1 microsecond', resolved_by = $13,
                     resolved_at = 'epoch'::timestamptz + $14 * interval '1 microsecond', conflict_resolution = $15,
                     note = $16, policy = $17, record = $18::json, images = $19::json, changed_at = clock_timestamp()
                 where conflict_id = $1
                 returning status"
            ),
        }
    }
}

fn write(record: &Record, statement: Statement) -> Result<()> {
    let decision = &record.decision;
    let text = String::from_utf8(to_bytes(record)?).map_err(|e| Error::bug(e.to_string()))?;
    let arguments = [
        sql_uuid(record.conflict_id).into(),
        record.schema.as_str().into(),
        record.table.as_str().into(),
        name_of(&record.conflict_type)?.into(),
        record.constraint_name.as_deref().into(),
        record.key.get().into(),
        (record.losing.0 as i64).into(),
        (record.winning.0 as i64).into(),
        record.cells.clone().into(),
        name_of(&decision.status)?.into(),
        (decision.version.0 as i64).into(),
        record.detected_at.into(),
        decision.by.as_deref().into(),
        decision.at.into(),
        decision.resolution.as_deref().into(),
        decision.note.as_deref().into(),
        record.policy.as_str().into(),
        text.as_str().into(),
        images_of(record)?.into(),
    ];
    match run(statement, part_of(record.losing), &arguments)? {
        Some(_) => Ok(()),
        None => Err(Error::bug(format!("conflict {} was not written", record.conflict_id))),
    }
}

/// The images as they are shown: `base`, `result`, and one by node id.
fn images_of(record: &Record) -> Result<String> {
    let shown = record.settled();
    let mut images: BTreeMap<String, &RawValue> = BTreeMap::new();
    images.extend(shown.base.as_ref().map(|image| ("base".to_string(), &*image.tuple)));
    images.extend(shown.result.as_ref().map(|image| ("result".to_string(), &*image.tuple)));
    images.extend(shown.tuples.iter().map(|(node, image)| (node.to_string(), &*image.tuple)));
    serde_json::to_string(&images).map_err(|e| Error::bug(format!("the images of a conflict are not JSON: {e}")))
}

/// The name that serde gives a variant: the one that users see.
pub fn name_of(value: &impl serde::Serialize) -> Result<String> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => Ok(name),
        _ => Err(Error::bug("a conflict type or status without a name")),
    }
}
