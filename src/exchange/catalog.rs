//! What the worker reads and writes in the extension's own tables: the peer, where its stream is, and what
//! it said of its tables. All in transactions of their own.
use crate::error::{Error, Result};
use crate::exchange::handshake::Introduction;
use crate::exchange::incarnation::sql_uuid;
use crate::exchange::link::Reply;
use crate::exchange::process;
use crate::shmem;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::Position;
use uuid::Uuid;

/// The row of `tandem.peer`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub name: String,
    pub conninfo: String,
    pub paused: bool,
    pub skip: Option<Position>,
    pub node_id: Option<i16>,
}

/// The peer of this database; none if there is none, or no extension.
pub fn peer() -> Result<Option<Peer>> {
    process::transaction(|| {
        if !process::extension_installed() {
            return Ok(None);
        }
        Spi::connect(|client| {
            let query = "select name, conninfo, paused, skip_position::int8, node_id from tandem.peer order by added_at limit 1";
            let Some(row) = client.select(query, Some(1), &[])?.next() else { return Ok(None) };
            Ok(Some(Peer {
                name: row.get(1)?.unwrap_or_default(),
                conninfo: row.get(2)?.unwrap_or_default(),
                paused: row.get(3)?.unwrap_or_default(),
                skip: row.get::<i64>(4)?.map(|p| Position(p as u64)),
                node_id: row.get(5)?,
            }))
        })
    })
}

/// The start of the peer that was last heard of, and the position in its stream that was reached in it.
pub fn reached(peer: &str) -> Result<Option<(Uuid, Position)>> {
    process::transaction(|| {
        Spi::connect(|client| {
            let query = "select nonce, \"position\"::int8 from (select * from tandem.progress_0 \
                         union all select * from tandem.progress_1) p where peer = $1 order by \"position\" desc limit 1";
            let Some(row) = client.select(query, Some(1), &[peer.into()])?.next() else { return Ok(None) };
            let (nonce, position) = (row.get::<pgrx::Uuid>(1)?, row.get::<i64>(2)?);
            Ok(nonce.zip(position).map(|(n, p)| (Uuid::from_bytes(*n.as_bytes()), Position(p as u64))))
        })
    })
}

/// Notes what the peer said of itself. A peer that was another node before is refused.
pub fn note_introduction(peer: &Peer, theirs: &Introduction) -> Result<()> {
    if let Some(known) = peer.node_id.filter(|known| *known != i16::from(theirs.node_id)) {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("peer \"{}\" was node {known} and says now that it is node {}", peer.name, theirs.node_id),
            "The connection string leads to another database than before. Set that right, or remove_peer and join anew.",
        ));
    }
    process::transaction(|| {
        Spi::run_with_args(
            "update tandem.peer set node_id = $2, node_name = $3, nonce = $4 where name = $1 \
             and (node_id, node_name, nonce) is distinct from ($2, $3, $4)",
            &[
                peer.name.as_str().into(),
                i16::from(theirs.node_id).into(),
                theirs.node_name.as_str().into(),
                sql_uuid(theirs.nonce).into(),
            ],
        )?;
        Ok(())
    })?;
    shmem::entry().peer_node.store(u32::from(theirs.node_id), Release);
    Ok(())
}

/// Ends `tandem.skip`: the transaction is passed over.
pub fn clear_skip(peer: &str) -> Result<()> {
    process::transaction(|| {
        Spi::run_with_args("update tandem.peer set skip_position = null where name = $1", &[peer.into()])?;
        Ok(())
    })
}

/// Rewrites `tandem.peer_table` with what the peer answered, if it is anything new. True if it was.
pub fn store_tables(peer: &str, answer: Option<&Reply>) -> Result<bool> {
    let rows = answer.map_or(0, Reply::rows);
    let column = |i: i32| -> Vec<Option<String>> {
        (0..rows).map(|row| answer.and_then(|a| a.text(row, i)).map(str::to_string)).collect()
    };
    const TOLD: &str = "select * from unnest($2::text[], $3::text[], $4::text[], $5::text[]::int8[], $6::text[]::numeric[]) \
                        as t (schema_name, table_name, shape, initial_rows, initial_digest)";
    process::transaction(|| {
        let arguments =
            [peer.into(), column(0).into(), column(1).into(), column(2).into(), column(3).into(), column(4).into()];
        // Mostly nothing is new: find out without a write (and an XID).
        let same = format!(
            "select not exists ((({TOLD}) except {KNOWN}) union all ({KNOWN} except ({TOLD})))",
            KNOWN = "select schema_name, table_name, shape, initial_rows, initial_digest from tandem.peer_table where peer = $1"
        );
        let same = Spi::connect(|client| client.select(same.as_str(), Some(1), &arguments)?.first().get_one::<bool>())?;
        if same == Some(true) {
            return Ok(false);
        }
        Spi::connect_mut(|client| {
            let gone = format!(
                "delete from tandem.peer_table p where peer = $1 and not exists (select from ({TOLD}) t \
                 where (t.schema_name, t.table_name, t.shape, t.initial_rows, t.initial_digest) \
                     = (p.schema_name, p.table_name, p.shape, p.initial_rows, p.initial_digest))"
            );
            let new = format!(
                "insert into tandem.peer_table (peer, schema_name, table_name, shape, initial_rows, initial_digest) \
                 select $1, t.* from ({TOLD}) t on conflict do nothing"
            );
            let gone = client.update(gone.as_str(), None, &arguments)?.len();
            let new = client.update(new.as_str(), None, &arguments)?.len();
            Ok(gone + new > 0)
        })
    })
}
