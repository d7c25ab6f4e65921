//! Who is told of a conflict, once, when it is first recorded here: the server log, in Postgres's own
//! form, and, if it waits for a person, whoever listens to the channel `tandem_conflict`.
//!
//! The notification belongs to the transaction that records; the log line is written when that has been
//! committed, so that a transaction that is tried again doesn't repeat it. Both have a limit: a storm of
//! conflicts drowns neither the log nor the applying.
use super::history::name_of;
use crate::clock;
use crate::error::Result;
use crate::guc::{self, LogConflicts};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::spi::quote_identifier;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::pace::Pace;
use tandem_model::record::{ConflictType, Record, Status};

const CHANNEL: &CStr = c"tandem_conflict";
/// Notifications of one transaction; after them one that says there are more.
const NOTIFICATIONS: u32 = 100;
/// Lines a second.
const LOG_LINES: u32 = 10;

unsafe extern "C-unwind" {
    /// Of Postgres's commands/async.c, which the bindings leave out.
    fn Async_Notify(channel: *const c_char, payload: *const c_char);
}

/// A line of the server log that waits for the commit.
struct Line {
    sqlstate: PgSqlErrorCode,
    message: String,
    detail: String,
}

/// What this process has told, and what waits to be.
struct Told {
    transaction: pg_sys::TransactionId,
    notifications: u32,
    pace: Pace,
    waiting: Vec<Line>,
}

thread_local! {
    static TOLD: RefCell<Told> = const {
        RefCell::new(Told {
            transaction: pg_sys::InvalidTransactionId,
            notifications: 0,
            pace: Pace::new(LOG_LINES),
            waiting: Vec::new(),
        })
    };
}

/// A record that this node didn't have.
pub fn detected(record: &Record) -> Result<()> {
    note_line(record)?;
    notify_if_open(record)
}

/// Tells listeners of a conflict that waits for a person.
pub fn notify_if_open(record: &Record) -> Result<()> {
    if record.decision.status != Status::Open {
        return Ok(());
    }
    // SAFETY: the caller has just written to a table: the transaction has an id.
    let transaction = unsafe { pg_sys::GetTopTransactionId() };
    let number = TOLD.with_borrow_mut(|told| {
        if told.transaction != transaction {
            told.transaction = transaction;
            told.notifications = 0;
        }
        told.notifications = told.notifications.saturating_add(1);
        told.notifications
    });
    let payload = match number {
        ..=NOTIFICATIONS => serde_json::json!({
            "conflict_id": record.conflict_id,
            "table": relation_name(record),
            "type": name_of(&record.conflict_type)?,
        }),
        n if n == NOTIFICATIONS + 1 => serde_json::json!({ "more": true }),
        _ => return Ok(()),
    };
    notify(&payload.to_string());
    Ok(())
}

fn notify(payload: &str) {
    let payload = CString::new(payload).unwrap_or_default();
    // SAFETY: two C strings, which are copied; raises if the payload is too long, which three names are not.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| Async_Notify(CHANNEL.as_ptr(), payload.as_ptr()));
    }
}

fn note_line(record: &Record) -> Result<()> {
    let how = guc::LOG_CONFLICTS.get();
    let due = how != LogConflicts::Off && TOLD.with_borrow_mut(|told| told.pace.admit(clock::boot_ms()));
    if !due {
        return Ok(());
    }
    let mut detail = detail(record)?;
    if how == LogConflicts::Key {
        detail.pop();
        detail.push_str(&format!("; replica identity {}.", key(record)));
    }
    let line = Line {
        sqlstate: sqlstate(record.conflict_type),
        message: format!(
            "conflict detected on relation \"{}.{}\": conflict={}",
            record.schema,
            record.table,
            name_of(&record.conflict_type)?
        ),
        detail: format!("{detail}\nLost: the write {}; conflict_id={}.", made(record.losing)?, record.conflict_id),
    };
    TOLD.with_borrow_mut(|told| told.waiting.push(line));
    Ok(())
}

/// The transaction has been committed: writes its lines.
pub fn committed() {
    let lines = TOLD.with_borrow_mut(|told| std::mem::take(&mut told.waiting));
    for line in lines {
        ErrorReport::new(line.sqlstate, line.message, pgrx::function_name!())
            .set_detail(line.detail)
            .report(PgLogLevel::LOG);
    }
}

/// It was not: nothing has happened.
pub fn aborted() {
    TOLD.with_borrow_mut(|told| told.waiting.clear());
}

/// Says how many conflicts were not logged, once that is known. Call it now and then.
pub fn sum_up() {
    let held_back = TOLD.with_borrow_mut(|told| told.pace.take_held_back(clock::boot_ms()));
    if let Some(count) = held_back {
        pgrx::log!("{count} more conflicts were detected; see tandem.conflicts");
    }
}

/// As Postgres says it, without values.
fn detail(record: &Record) -> Result<String> {
    use ConflictType::*;
    // What the change met is this node's own write, whether it won or lost.
    let own = crate::shmem::database().node();
    let there = if Some(record.winning.node()) == own { record.winning } else { record.losing };
    let by = format!("modified {}", made(there)?);
    let what = match (record.conflict_type, &record.constraint_name) {
        (InsertExists | UpdateExists | MultipleUniqueConflicts, Some(index)) => {
            format!("Key already exists in unique index \"{index}\", {by}")
        }
        (InsertExists | UpdateExists | MultipleUniqueConflicts, None) => format!("Key already exists, {by}"),
        (UpdateOriginDiffers, _) => format!("Updating the row that was {by}"),
        (DeleteOriginDiffers, _) => format!("Deleting the row that was {by}"),
        (UpdateMissing | DeleteMissing, _) => {
            let verb = if record.conflict_type == UpdateMissing { "updated" } else { "deleted" };
            format!("Could not find the row to be {verb}")
        }
        (UpdateDeleted, _) => format!("Updating the row that was deleted, {by}"),
        (ForeignKeyViolation | CheckViolation, Some(constraint)) => {
            format!("Merging both nodes' rows would violate constraint \"{constraint}\"")
        }
        (ForeignKeyViolation | CheckViolation, None) => {
            "Merging both nodes' rows would violate a constraint".to_string()
        }
        (TruncateOriginDiffers, _) => format!("Truncating a row that was {by}"),
        (InitialDiffers, _) => "The row differed when the table was joined".to_string(),
    };
    Ok(format!("{what}."))
}

fn made(version: Hlc) -> Result<String> {
    let at = time(version);
    Ok(match version.node() {
        NodeId(0) => "before pairing".to_string(),
        node if Some(node) == crate::shmem::database().node() => format!("locally at {at}"),
        node => format!("by a different origin \"{}\" at {at}", peer_name(node)?),
    })
}

fn peer_name(node: NodeId) -> Result<String> {
    let query = "select coalesce(node_name, name) from tandem.peer where node_id = $1 limit 1";
    let name: Option<String> = crate::pg::query::value(query, &[i32::from(node.0).into()])?;
    Ok(name.unwrap_or_else(|| node.0.to_string()))
}

fn time(version: Hlc) -> String {
    crate::types::unix_millis(version.unix_millis()).to_iso_string()
}

/// As `regclass` reads it.
fn relation_name(record: &Record) -> String {
    format!("{}.{}", quote_identifier(&record.schema), quote_identifier(&record.table))
}

/// `(id)=(7)`.
fn key(record: &Record) -> String {
    let key: Map<String, Value> = serde_json::from_str(record.key.get()).unwrap_or_default();
    let values = key.values().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_string));
    let (names, values): (Vec<_>, Vec<_>) = (key.keys().cloned().collect(), values.collect());
    format!("({})=({})", names.join(", "), values.join(", "))
}

/// Postgres's choice for its own types, and the nearest for ours.
fn sqlstate(conflict_type: ConflictType) -> PgSqlErrorCode {
    use ConflictType::*;
    match conflict_type {
        InsertExists | UpdateExists | MultipleUniqueConflicts => PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
        ForeignKeyViolation => PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
        CheckViolation => PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
        UpdateOriginDiffers
        | UpdateMissing
        | UpdateDeleted
        | DeleteOriginDiffers
        | DeleteMissing
        | TruncateOriginDiffers
        | InitialDiffers => PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
    }
}
