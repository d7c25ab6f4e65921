//! The exchange: this node's stream served to the peer, and the peer's stream taken and handed to
//! [`crate::apply`].
//!
//! [`supervisor`] starts a [`worker`] per database; its [`driver`] lets `tandem_model::session` decide and
//! does what that says over a [`link`] (the only file that touches libpq). [`serve`] and [`handshake`] are
//! what the peer's worker calls here; [`status`] is what everybody may see of it.
mod catalog;
mod contact;
mod driver;
mod handshake;
mod housekeeping;
mod incarnation;
pub mod link;
mod process;
mod refusal;
mod retention;
mod serve;
mod spool;
mod status;
mod supervisor;
mod worker;

pub use status::WorkerStatus;

use crate::shmem;
use pgrx::prelude::*;
use std::sync::atomic::Ordering::*;

/// Registers the supervisor; called once from `_PG_init` while shared_preload_libraries are loaded.
pub fn init() {
    supervisor::register();
}

/// Wakes the worker of a database and the supervisor: something they act on has changed (peer, pause, tables,
/// skew) and is committed. Must not raise.
pub fn wake(database: &shmem::Database) {
    process::wake(database.worker.pid.load(Acquire));
    process::wake(shmem::region().supervisor.load(Acquire));
}

extension_sql_file!(
    "../../sql/exchange.sql",
    name = "exchange",
    requires = ["catalog", handshake::handshake, serve::pull, serve::peer_tables, status::peer_status]
);
