//! What the peer's server, or the way to it, says when it says no: SQLSTATE, whose turn it is, what to do.
use crate::error::{Class, Error};
use pgrx::prelude::*;

/// The error of a peer that doesn't answer.
pub fn silent() -> Error {
    Error::retry(PgSqlErrorCode::ERRCODE_CONNECTION_FAILURE, "the peer does not answer")
        .hint("Check the network, and what the peer's server is doing; tandem.peer_timeout sets how long is waited.")
}

/// The error of a connection that could not be made, from libpq's verbose message.
pub fn of_connecting(message: &str) -> Error {
    let lines = message.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("LOCATION:"));
    let (mut code, mut texts) = (None, Vec::new());
    for line in lines {
        match split_sqlstate(line) {
            Some((found, text)) => {
                code = Some(found);
                texts.push(text);
            }
            None => texts.push(line.to_string()),
        }
    }
    let message = format!("could not connect to the peer: {}", texts.join("; "));
    // libpq's own words, without a code: the peer asked for a password and there is none.
    if code.is_none() && message.contains("no password supplied") {
        let hint = "Put it into ~/.pgpass of the account that this server runs under, or name a passfile in the connection string.";
        return classify("28P01".to_string(), message, Some(hint.to_string()));
    }
    classify(code.unwrap_or_else(|| "08001".to_string()), message, None)
}

/// Splits "…: FATAL:  28P01: text" into the code and the line without it.
fn split_sqlstate(line: &str) -> Option<(String, String)> {
    let (start, _) = line.match_indices(":  ").find(|(i, _)| {
        let rest = &line.as_bytes()[i + 3..];
        rest.len() > 6 && rest[5] == b':' && rest[..5].iter().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
    })?;
    let code = line[start + 3..start + 8].to_string();
    Some((code, format!("{}:{}", &line[..start], &line[start + 9..])))
}

/// The error of a SQLSTATE that came from the peer: whose turn it is, and what to do.
pub fn classify(code: String, message: String, hint: Option<String>) -> Error {
    let (class, remedy) = match code.as_str() {
        "28P01" | "28000" => {
            (Class::Operator, "Check user and password of the connection string, and pg_hba.conf of the peer.")
        }
        "3D000" => (Class::Operator, "Check dbname in the connection string, or create the database on the peer."),
        "3F000" | "42883" => {
            (Class::Operator, "On the peer, in the database of the connection string: CREATE EXTENSION tandem;")
        }
        "42501" => (Class::Operator, "On the peer: GRANT tandem_peer TO the user of the connection string;"),
        "57P03" => (Class::Retry, "The peer's server is starting up or shutting down; this goes on by itself."),
        "53300" => (Class::Retry, "Raise max_connections on the peer."),
        "08001" => (Class::Retry, "Check that the peer is up and that the connection string leads to it."),
        c if matches!(&c[..c.len().min(2)], "08" | "40" | "53" | "57" | "58") || c == "55P03" => (Class::Retry, ""),
        _ => (Class::Operator, ""),
    };
    let hint = hint.or_else(|| (!remedy.is_empty()).then(|| remedy.to_string()));
    Error { class, sqlstate: sqlstate(&code), message, detail: None, hint }
}

fn sqlstate(code: &str) -> PgSqlErrorCode {
    let packed = code
        .bytes()
        .take(5)
        .enumerate()
        .fold(0, |sum, (i, b)| sum | (i32::from(b.wrapping_sub(b'0') & 0x3f) << (6 * i)));
    PgSqlErrorCode::from(packed)
}
