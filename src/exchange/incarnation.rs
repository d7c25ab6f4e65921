//! Incarnations: each start of this server is one (a nonce), recorded durably with where the one before
//! ended, before anything is served under it. By them a server notices that it has lost history: the peer
//! remembers (nonce, position), and a position beyond the end of its nonce was lost here.
use crate::error::{Error, Result};
use crate::exchange::process;
use crate::pg::query;
use crate::shmem;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;
use tandem_model::hlc::Position;
use uuid::Uuid;

/// Starts that are remembered: a peer that last heard of an older one has to join anew.
const KEPT: i64 = 1_000;

/// Records this start, unless it is. In no transaction: it makes one and waits until it is on disk.
pub fn ensure() -> Result<Uuid> {
    let fresh = Uuid::new_v4();
    let known = process::transaction(|| {
        let database = shmem::database();
        if let Some(nonce) = database.nonce() {
            return Ok(Some(nonce));
        }
        Spi::run("set local synchronous_commit = local")?;
        Spi::run_with_args(
            "insert into tandem.incarnation (nonce, previous_end) values ($1, $2::int8::tandem.position)",
            &[sql_uuid(fresh).into(), (database.recovered_end() as i64).into()],
        )?;
        Spi::run_with_args(
            "delete from tandem.incarnation where ordinal <= (select max(ordinal) from tandem.incarnation) - $1",
            &[KEPT.into()],
        )?;
        Ok(None)
    })?;
    if let Some(nonce) = known {
        return Ok(nonce);
    }
    // The commit has waited for its flush: from here on the peer may be told.
    shmem::entry().set_nonce(fresh);
    Ok(fresh)
}

/// Checks that what the peer has of our stream is still ours to continue. In a transaction.
pub fn check(nonce: Uuid, position: Position) -> Result<()> {
    const END: &str = "
        select coalesce((select previous_end::int8 from tandem.incarnation next
                          where next.ordinal > i.ordinal order by ordinal limit 1), $2)
          from tandem.incarnation i where nonce = $1";
    let last = shmem::database().last_position.load(Acquire) as i64;
    let end: Option<i64> = query::value(END, &[sql_uuid(nonce).into(), last.into()])?;
    let lost = |message: String| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            message,
            "It was restored from a backup, or is another server. The two have to be joined anew: on both, \
             remove_table and remove_peer, then add_peer and add_table.",
        )
    };
    match end {
        None => Err(lost("this server does not know the start that the peer last heard of".to_string())),
        Some(end) if position.0 > end as u64 => Err(lost(format!(
            "this server has lost history: its stream ended at {}, the peer has it up to {position}",
            Position(end as u64)
        ))),
        Some(_) => Ok(()),
    }
}

/// A uuid as SQL takes it.
pub fn sql_uuid(uuid: Uuid) -> pgrx::Uuid {
    pgrx::Uuid::from_bytes(*uuid.as_bytes())
}
