//! The other database: adding and removing it, stopping and resuming what comes from it.
use super::{answer, node};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use pgrx::prelude::*;

#[pg_extern]
fn add_peer(name: &str, conninfo: &str) {
    answer(add(name, conninfo));
    crate::shmem::entry().bump_generation();
}

#[pg_extern]
fn remove_peer(name: &str) {
    answer(change("delete from tandem.peer where name = $1 returning name", name));
    answer(forget_held(name));
    crate::shmem::entry().bump_generation();
}

#[pg_extern]
fn pause() {
    answer(set_paused(true));
}

#[pg_extern]
fn resume() {
    answer(set_paused(false));
}

#[pg_extern]
fn skip(peer: &str) {
    answer(skip_failing(peer));
    crate::shmem::entry().bump_generation();
}

fn add(name: &str, conninfo: &str) -> Result<()> {
    // SAFETY: looks at this session's user.
    if !unsafe { pg_sys::superuser() } {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "must be superuser to add a peer",
            "A connection string can read files of the server: let a superuser call tandem.add_peer().",
        ));
    }
    node::require()?;
    node::check_name("peer", name)?;
    check_conninfo(conninfo)?;
    let _catalog = ActingAs::superuser();
    Spi::run("lock table tandem.peer in share row exclusive mode")?;
    if let Some(present) = the_peer()? {
        return Err(already(name, &present));
    }
    Spi::run_with_args("insert into tandem.peer (name, conninfo) values ($1, $2)", &[name.into(), conninfo.into()])?;
    Ok(())
}

fn already(name: &str, present: &str) -> Error {
    if name == present {
        return Error::operator(
            PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT,
            format!("peer \"{name}\" already exists"),
            format!("To change its connection string: SELECT tandem.remove_peer('{name}'); and add it again."),
        );
    }
    Error::operator(
        PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
        format!("this database has a peer already, \"{present}\", and can have only one"),
        format!("SELECT tandem.remove_peer('{present}'); first."),
    )
}

/// Anything that is wrong beyond syntax is a state of the peer, not an error here.
fn check_conninfo(conninfo: &str) -> Result<()> {
    crate::exchange::link::check_conninfo(conninfo).map_err(|why| {
        Error::operator(
            PgSqlErrorCode::ERRCODE_SYNTAX_ERROR,
            format!("invalid connection string: {}", why.trim_end()),
            "It is what psql takes: 'host=db2 dbname=bank user=tandem' or 'postgresql://tandem@db2/bank'.",
        )
    })
}

/// Name of the one peer.
pub fn the_peer() -> Result<Option<String>> {
    let _catalog = ActingAs::superuser();
    match Spi::get_one::<String>("select name from tandem.peer limit 1") {
        Err(pgrx::spi::Error::InvalidPosition) => Ok(None),
        other => Ok(other?),
    }
}

/// Runs a statement that returns a row if there is such a peer; raises 42704 if there is none.
pub fn change(statement: &str, name: &str) -> Result<()> {
    let _catalog = ActingAs::superuser();
    let found = Spi::connect_mut(|client| client.update(statement, None, &[name.into()]).map(|rows| !rows.is_empty()))?;
    if found {
        return Ok(());
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
        format!("peer \"{name}\" does not exist"),
        "SELECT peer FROM tandem.status; shows the one there is.",
    ))
}

fn forget_held(name: &str) -> Result<()> {
    let _catalog = ActingAs::superuser();
    Spi::run_with_args("delete from tandem.held where peer = $1", &[name.into()])?;
    Ok(())
}

/// Marks the transaction that fails right now: should it go through before, nothing is passed over.
fn skip_failing(name: &str) -> Result<()> {
    change("select name from tandem.peer where name = $1", name)?;
    let _catalog = ActingAs::superuser();
    let failing = "update tandem.peer p set skip_position = s.failing from tandem.peer_status() s
                   where p.name = $1 and s.peer = p.name and s.failing is not null returning p.name";
    let found = Spi::connect_mut(|client| client.update(failing, None, &[name.into()]).map(|rows| !rows.is_empty()))?;
    if found {
        return Ok(());
    }
    Err(Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("no transaction of peer \"{name}\" fails to be applied"),
        "SELECT state, reason, last_error FROM tandem.status; shows what holds it up.",
    ))
}

fn set_paused(paused: bool) -> Result<()> {
    node::require()?;
    let Some(name) = the_peer()? else {
        return Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "there is no peer to take changes from",
            "SELECT tandem.add_peer('osaka', 'host=… dbname=…');",
        ));
    };
    let _catalog = ActingAs::superuser();
    Spi::run_with_args("update tandem.peer set paused = $2 where name = $1", &[name.into(), paused.into()])?;
    crate::shmem::entry().bump_generation();
    Ok(())
}
