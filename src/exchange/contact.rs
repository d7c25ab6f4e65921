//! The first words on a new link, and the statements that are sent over it.
use crate::error::{Class, Error, Result};
use crate::exchange::catalog::{self, Peer};
use crate::exchange::handshake::{self, Introduction};
use crate::exchange::link::{Link, Reply};
use crate::exchange::process;
use crate::guc;
use pgrx::prelude::*;
use std::ffi::CStr;

/// The peer's tables as they are today; numbers as text.
pub const PEER_TABLES: &CStr =
    c"select schema_name, table_name, shape, initial_rows::text, initial_digest::text from tandem.peer_tables()";
/// Alone before its sync: it commits.
pub const WAIT: &CStr = c"call tandem.wait_for_commit($1::int8::tandem.position, $2::int4)";
pub const PULL: &CStr = c"select tandem.pull($1::int8::tandem.position, $2::int4, $3::int4)";

const HANDSHAKE: &CStr =
    c"select tandem.handshake($1::int4, $2::int4, $3::text, $4::uuid, $5::uuid, $6::int8::tandem.position)::text";

/// Nothing of the role's or the database's settings may end or bend the exchange.
const SETTINGS: &CStr = c"select set_config(name, value, false) from (values
    ('search_path', 'pg_catalog, pg_temp'), ('statement_timeout', '0'), ('lock_timeout', '0'),
    ('idle_in_transaction_session_timeout', '0'), ('idle_session_timeout', '0'), ('transaction_timeout', '0'),
    ('default_transaction_isolation', 'read committed'), ('default_transaction_deferrable', 'off'),
    ('jit', 'off'), ('plan_cache_mode', 'auto')) s (name, value)
    where exists (select from pg_catalog.pg_settings g where g.name = s.name)";

/// Checks that the two go together; returns what the peer is and its tables.
pub fn shake_hands(link: &mut Link, peer: &Peer) -> Result<(Introduction, Option<Reply>)> {
    let timeout = i64::from(guc::PEER_TIMEOUT.get());
    link.query(SETTINGS, &[], timeout)?;
    let ours = process::transaction(handshake::introduce)?;
    let reached = catalog::reached(&peer.name)?;
    let answer = link.query(
        HANDSHAKE,
        &[
            Some(&ours.protocol.to_string()),
            Some(&ours.node_id.to_string()),
            Some(&ours.node_name),
            Some(&ours.nonce.to_string()),
            reached.map(|(nonce, _)| nonce.to_string()).as_deref(),
            reached.map(|(_, position)| position.0.to_string()).as_deref(),
        ],
        timeout,
    )?;
    let answer = answer.as_ref().and_then(|a| a.text(0, 0)).unwrap_or_default();
    let theirs: Introduction = serde_json::from_str(answer).map_err(|_| stranger())?;
    process::transaction(|| handshake::accept(&theirs))?;
    catalog::note_introduction(peer, &theirs)?;
    if !theirs.confirmed {
        return Err(Error::retry(
            PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW,
            "the peer's own connection to this node reaches another start of it, or another server",
        )
        .hint(
            "After a restart this goes on by itself within seconds. If it stays, look at tandem.status on the peer: \
             this database may be a copy of the node that the peer is paired with.",
        ));
    }
    let tables = link.query(PEER_TABLES, &[], timeout)?;
    Ok((theirs, tables))
}

fn stranger() -> Error {
    Error {
        class: Class::Operator,
        sqlstate: PgSqlErrorCode::ERRCODE_PROTOCOL_VIOLATION,
        message: "the peer does not introduce itself as this version of tandem understands it".to_string(),
        detail: None,
        hint: Some("Install the same version of tandem on both servers.".to_string()),
    }
}
