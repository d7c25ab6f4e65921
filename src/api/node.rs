//! This database as a member of a pair.
use super::answer;
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::{clock, shmem};
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;

/// Longest name of a node or a peer, in bytes: that of an identifier.
const MAX_NAME: usize = 63;

#[pg_extern]
fn create_node(name: &str, id: i32) {
    answer(create(name, id));
}

#[pg_extern]
fn accept_skew() {
    clock::accept_skew();
    // The worker may be waiting for just this.
    shmem::entry().bump_generation();
}

fn create(name: &str, id: i32) -> Result<()> {
    // Raises unless the library is preloaded.
    shmem::entry();
    check_name("node", name)?;
    if !(1..=63).contains(&id) {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("node id {id} is out of range"),
            "It is a number from 1 to 63, another one on each server: SELECT tandem.create_node('tokyo', 1);",
        ));
    }
    let _catalog = ActingAs::superuser();
    let args = [name.into(), (id as i16).into()];
    let insert = "insert into tandem.node (name, id) values ($1, $2) on conflict do nothing returning id";
    let inserted = Spi::connect_mut(|client| client.update(insert, None, &args).map(|rows| !rows.is_empty()))?;
    if !inserted {
        let known = Spi::get_one::<String>("select format('%s (id %s)', name, id) from tandem.node")?;
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("this database is already node {}", known.unwrap_or_default()),
            "A node keeps its name and id: every version it wrote carries them. See SELECT * FROM tandem.check();",
        ));
    }
    // The extension may have been in this database before: what shared memory has of then counts no more.
    shmem::entry().reset();
    forget_on_abort();
    shmem::entry().bump_generation();
    Ok(())
}

/// Whoever looked at the node within this transaction has put it into shared memory: look again.
fn forget_on_abort() {
    pgrx::register_xact_callback(pgrx::PgXactCallbackEvent::Abort, || {
        shmem::entry().loaded.store(false, Release);
    });
}

/// Names of nodes and peers: not empty, no longer than an identifier.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    if name.trim().is_empty() || name.len() > MAX_NAME {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("invalid {what} name \"{name}\""),
            format!("A {what} name has 1 to {MAX_NAME} bytes."),
        ));
    }
    Ok(())
}

/// Raises 55000 unless this database is a node.
pub fn require() -> Result<()> {
    match shmem::database().node() {
        Some(_) => Ok(()),
        None => Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "this database is not a tandem node",
            "SELECT tandem.create_node('tokyo', 1);",
        )),
    }
}
