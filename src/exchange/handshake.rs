//! The handshake: who the two nodes are, and whether they go together. The serving side refuses by name;
//! the calling side checks what it was told.
use crate::error::{Error, Result};
use crate::exchange::incarnation;
use crate::shmem;
use crate::types::SqlPosition;
use pgrx::prelude::*;
use serde::{Deserialize, Serialize};
use tandem_model::hlc::{NodeId, Position};
use tandem_model::wire::PROTOCOL;
use uuid::Uuid;

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    pub protocol: u32,
    pub node_id: u8,
    pub node_name: String,
    pub nonce: Uuid,
    pub server_version: i32,
    pub encoding: String,
    pub extension_version: String,
    /// Milliseconds since the Unix epoch.
    pub clock_ms: i64,
    /// The caller's start is the one that this node's own connection string for it reaches (or nothing was
    /// reached yet). A copy of a node, and a restored dump, are not confirmed and must not join.
    #[serde(default)]
    pub confirmed: bool,
}

/// This node's introduction. In a transaction.
pub fn introduce() -> Result<Introduction> {
    let database = shmem::database();
    let (Some(node), Some(name)) = (database.node(), node_name()?) else {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "this database is not a tandem node",
            "SELECT tandem.create_node('name', 1);",
        ));
    };
    let nonce = database.nonce().ok_or_else(|| {
        Error::retry(
            PgSqlErrorCode::ERRCODE_CANNOT_CONNECT_NOW,
            "the exchange of this database has not begun since the server's start",
        )
        .hint("It begins by itself once this node has a peer: SELECT tandem.add_peer('name', 'connection string');")
    })?;
    Ok(Introduction {
        protocol: PROTOCOL,
        node_id: node.0,
        node_name: name,
        nonce,
        // SAFETY: a constant of the server's headers, and a name that ends with a zero byte.
        server_version: pg_sys::PG_VERSION_NUM as i32,
        encoding: encoding(),
        extension_version: env!("CARGO_PKG_VERSION").to_string(),
        clock_ms: crate::clock::wall_ms(),
        confirmed: true,
    })
}

fn node_name() -> Result<Option<String>> {
    crate::pg::query::value("select name from tandem.node", &[])
}

fn encoding() -> String {
    crate::pg::query::value("select pg_catalog.getdatabaseencoding()::text", &[]).ok().flatten().unwrap_or_default()
}

/// Checks that a node can be ours's peer; by both sides, so that both say why not.
fn check(ours: &Introduction, protocol: u32, node: u8, name: &str) -> Result<()> {
    if protocol != ours.protocol {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!(
                "node {name:?} speaks version {protocol} of the protocol, node {:?} version {}",
                ours.node_name, ours.protocol
            ),
            "Install the same version of tandem on both servers.",
        ));
    }
    if NodeId::new(i64::from(node)).is_none() {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("node id {node} is out of range"),
            "Node ids are 1 to 63.",
        ));
    }
    if node == ours.node_id {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
            format!("node {name:?} and node {:?} have the same node id {node}", ours.node_name),
            "The two nodes need different ids: see tandem.create_node(name, id).",
        ));
    }
    Ok(())
}

/// Checks what the peer said of itself. In a transaction.
pub fn accept(theirs: &Introduction) -> Result<()> {
    let ours = introduce()?;
    check(&ours, theirs.protocol, theirs.node_id, &theirs.node_name)?;
    if theirs.encoding != ours.encoding {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            format!("the peer's database has encoding {}, this one {}", theirs.encoding, ours.encoding),
            "Both databases need the same encoding.",
        ));
    }
    Ok(())
}

/// Called by the peer's exchange first of all: checks that the two nodes go together and that the stream
/// can go on where the caller left it; returns what this node is.
#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn handshake(
    protocol: i32,
    node_id: i32,
    node_name: &str,
    my_nonce: pgrx::Uuid,
    your_nonce: Option<pgrx::Uuid>,
    your_position: Option<SqlPosition>,
) -> pgrx::Json {
    let answer = || -> Result<pgrx::Json> {
        let mut ours = introduce()?;
        check(&ours, protocol.max(0) as u32, u8::try_from(node_id).unwrap_or(0), node_name)?;
        let position = your_position.map_or(Position(0), |p| p.0);
        if let Some(nonce) = your_nonce.filter(|_| position.0 != 0) {
            incarnation::check(Uuid::from_bytes(*nonce.as_bytes()), position)?;
        }
        let known: Option<pgrx::Uuid> = crate::pg::query::value("select nonce from tandem.peer", &[])?;
        ours.confirmed = known.is_none_or(|known| known == my_nonce);
        let value = serde_json::to_value(&ours).map_err(|e| Error::bug(format!("no introduction: {e}")))?;
        Ok(pgrx::Json(value))
    };
    answer().unwrap_or_else(|e| e.raise())
}
