//! Errors of applying, with table, key and what to do.
use super::route::Route;
use crate::error::{Class, Error};
use pgrx::prelude::*;
use tandem_model::change::{Change, Op};
use tandem_model::descriptor::Transport;
use tandem_model::hlc::Mark;

/// What helps against a row that cannot be applied.
pub const MEND: &str = "Remove the cause: the stream goes on by itself. Or pass over this one transaction of the peer \
                        with tandem.skip('<peer>'): it stays on record whole.";

/// Adds what was being applied to an error of a row.
pub fn on_row(mut error: Error, route: &Route, change: &Change<'_>, mark: Mark) -> Error {
    let rel = &route.local;
    if violates(&error, &route.key_index_name) {
        // A local session inserted the key after it was looked for: it will be found next time.
        error.class = Class::Retry;
    }
    let verb = match change.op {
        Op::Insert => "INSERT into",
        Op::Update => "UPDATE of",
        Op::Delete => "DELETE from",
    };
    let place = format!(
        "While applying {verb} table {}, {}, of the peer's transaction {}.",
        rel.display_name(),
        key_text(route, change),
        mark.position
    );
    add(error, place)
}

/// Adds the transaction to an error of its end.
pub fn at_end(error: Error, mark: Mark) -> Error {
    add(error, format!("While applying the peer's transaction {}.", mark.position))
}

fn add(mut error: Error, place: String) -> Error {
    // What Postgres says of a failing row is the row: no log is the place for it.
    let detail = error.detail.take().filter(|detail| !detail.starts_with("Failing row contains"));
    error.detail = Some(match detail {
        Some(detail) => format!("{detail} {place}"),
        None => place,
    });
    if error.class == Class::Operator && error.hint.is_none() {
        error.hint = Some(MEND.to_string());
    }
    error
}

/// Puts the peer's name where a hint speaks of it.
pub fn name_peer(mut error: Error, peer: &str) -> Error {
    error.hint = error.hint.map(|hint| hint.replace("<peer>", &peer.replace('\'', "''")));
    error
}

/// True if a constraint was violated that applying can look after.
pub fn is_constraint_violation(error: &Error) -> bool {
    is_unique_violation(error)
        || error.sqlstate == PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION
        || error.sqlstate == PgSqlErrorCode::ERRCODE_CHECK_VIOLATION
}

fn is_unique_violation(error: &Error) -> bool {
    error.sqlstate == PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION
        || error.sqlstate == PgSqlErrorCode::ERRCODE_EXCLUSION_VIOLATION
}

/// A place that was free when it was looked at was taken meanwhile: by a local session, that is seen next time.
pub fn retry_if_unique(mut error: Error) -> Error {
    if is_unique_violation(&error) {
        error.class = Class::Retry;
    }
    error
}

/// The worker runs with lc_messages = C, so the constraint's name is in the message in quotes.
fn violates(error: &Error, constraint: &str) -> bool {
    error.sqlstate == PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION && error.message.ends_with(&format!("\"{constraint}\""))
}

/// `key (id)=(7)`, from the bytes that travelled: no function of the server is called in a failed transaction.
fn key_text(route: &Route, change: &Change<'_>) -> String {
    let shapes = route.descriptor.key.iter().filter_map(|a| route.descriptor.columns.iter().find(|c| c.attnum == *a));
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for (shape, value) in shapes.zip(&change.key) {
        names.push(shape.name.as_str());
        values.push(match value {
            None => "null".to_string(),
            Some(bytes) => readable(&shape.type_name, shape.transport, bytes),
        });
    }
    format!("key ({})=({})", names.join(", "), values.join(", "))
}

fn readable(type_name: &str, transport: Transport, bytes: &[u8]) -> String {
    const LONGEST: usize = 200;
    if transport != Transport::Binary {
        return String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]).into_owned();
    }
    match (type_name, bytes) {
        ("smallint", &[a, b]) => i16::from_be_bytes([a, b]).to_string(),
        ("integer", &[a, b, c, d]) => i32::from_be_bytes([a, b, c, d]).to_string(),
        ("bigint", bytes) if bytes.len() == 8 => {
            bytes.iter().fold(0i64, |value, byte| (value << 8) | i64::from(*byte)).to_string()
        }
        ("uuid", bytes) if bytes.len() == 16 => {
            bytes.try_into().map(|b| uuid::Uuid::from_bytes(b).to_string()).unwrap_or_default()
        }
        (_, bytes) => {
            let hex: String = bytes.iter().take(LONGEST).map(|b| format!("{b:02x}")).collect();
            format!("\\x{hex}")
        }
    }
}
