//! Handlers of the user: `f(conflict json) returns json`, the columns to set; NULL leaves the row as it is.
//!
//! A handler runs as the table's owner in a security-restricted operation, in a read-only subtransaction, for
//! at most `tandem.handler_timeout`.
use super::super::row::Work;
use crate::error::{Class, Error, Result};
use crate::guc;
use crate::pg::subtransaction;
use crate::relation::SyncedRelation;
use crate::value;
use pgrx::prelude::*;
use serde_json::{Map, Value, json};
use tandem_model::record::Record;
use tandem_model::versions::CellId;

/// One call for one conflict.
pub struct Call {
    /// Quoted and qualified.
    handler: String,
    argument: Map<String, Value>,
}

/// Notes a call; the cells of one conflict that have the same handler go together.
pub fn call(
    calls: &mut Vec<Call>,
    handler: &str,
    rel: &SyncedRelation,
    cell: CellId,
    record: &Record,
    work: &Work,
) -> Result<()> {
    let names: Vec<Value> = rel.cell_columns(cell).map(|c| Value::from(c.name.as_str())).collect();
    if let Some(known) = calls.iter_mut().find(|c| c.handler == handler) {
        if let Some(Value::Array(columns)) = known.argument.get_mut("columns") {
            columns.extend(names);
        }
        return Ok(());
    }
    let parsed =
        |text: &str| serde_json::from_str::<Value>(text).map_err(|e| Error::bug(format!("an image is not JSON: {e}")));
    let shown = record.settled();
    let image = |node: u8| shown.tuples.get(&node).map_or(Ok(Value::Null), |i| parsed(i.tuple.get()));
    let version = |own: bool| {
        let of_node = |v: &tandem_model::hlc::Hlc| (v.node() == work.own) == own;
        [record.losing, record.winning].iter().find(|v| of_node(v)).map(ToString::to_string)
    };
    let types: Map<String, Value> =
        rel.columns.iter().map(|c| (c.name.clone(), Value::from(c.type_name.as_str()))).collect();
    let argument = json!({
        "conflict_id": record.conflict_id.to_string(),
        "conflict_type": record.conflict_type.name(),
        "relation": format!("{}.{}", record.schema, record.table),
        "key": parsed(record.key.get())?,
        "columns": names,
        "base": shown.base.as_ref().map_or(Ok(Value::Null), |i| parsed(i.tuple.get()))?,
        "local": image(work.own.0)?,
        "remote": image(work.peer.0)?,
        "types": types,
        "versions": {"local": version(true), "remote": version(false)},
    });
    if let Value::Object(argument) = argument {
        calls.push(Call { handler: handler.to_string(), argument });
    }
    Ok(())
}

impl Call {
    /// Asks the handler. The values live in the current memory context.
    pub fn run(&self, rel: &SyncedRelation) -> Result<Vec<(usize, Option<pg_sys::Datum>)>> {
        let answer = subtransaction::run(|| self.ask()).map_err(|error| self.failed(error))?;
        let Some(answer) = answer else { return Ok(Vec::new()) };
        let columns = match serde_json::from_str(&answer) {
            Ok(Value::Null) => return Ok(Vec::new()),
            Ok(Value::Object(columns)) => columns,
            _ => return Err(self.wrong("returned something else than an object of columns".to_string())),
        };
        let mut values = Vec::new();
        for (name, wanted) in &columns {
            let Some(i) = rel.columns.iter().position(|c| c.name == *name) else {
                return Err(self.wrong(format!("named column \"{name}\", which the table does not have")));
            };
            let column = &rel.columns[i];
            if column.key_ordinal.is_some() {
                return Err(self.wrong(format!("named column \"{name}\", which belongs to the key")));
            }
            values.push((i, value::from_json(column, wanted)));
        }
        Ok(values)
    }

    fn ask(&self) -> Result<Option<String>> {
        // SAFETY: a variable of this backend, set back with the end of the subtransaction; a transaction that
        // is read-only stays so until then.
        unsafe { pg_sys::XactReadOnly = true };
        let _limit = Limit::start(guc::HANDLER_TIMEOUT.get());
        let argument = Value::Object(self.argument.clone()).to_string();
        let query = format!("select {}($1::pg_catalog.json)::pg_catalog.text", self.handler);
        crate::pg::query::value(&query, &[argument.into()])
    }

    /// Out of time is the handler's fault, not a reason to try again.
    fn failed(&self, error: Error) -> Error {
        let class = match error.sqlstate {
            PgSqlErrorCode::ERRCODE_QUERY_CANCELED => Class::Operator,
            _ => error.class,
        };
        Error { message: format!("handler {}: {}", self.handler, error.message), class, ..error }
    }

    fn wrong(&self, what: String) -> Error {
        Error::operator(
            PgSqlErrorCode::ERRCODE_E_R_I_E_INVALID_SQLSTATE_RETURNED,
            format!("handler {} {what}", self.handler),
            "It returns the columns to set, as {\"column\": value}, or NULL.",
        )
    }
}

// Of Postgres's utils/misc/timeout.c, which the bindings leave out.
unsafe extern "C-unwind" {
    fn enable_timeout_after(id: std::ffi::c_uint, delay_ms: std::ffi::c_int);
    fn disable_timeout(id: std::ffi::c_uint, keep_indicator: bool);
}

/// Place in the enum TimeoutId, the same in 15 to 18.
const STATEMENT_TIMEOUT: std::ffi::c_uint = 3;

/// Cancels what runs when the time is over, until dropped.
struct Limit;

impl Limit {
    fn start(ms: i32) -> Limit {
        // SAFETY: registered when the process connected; applying itself runs without a limit.
        unsafe { enable_timeout_after(STATEMENT_TIMEOUT, ms) };
        Limit
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // SAFETY: enabled above.
        unsafe { disable_timeout(STATEMENT_TIMEOUT, false) };
    }
}
