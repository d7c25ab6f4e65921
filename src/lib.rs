//! Tandem: two databases in sync while applications write to both.
//!
//! A change goes this way:
//!
//! ```text
//!            node A                                                     node B
//!  user's statement
//!    │ BEFORE ROW  capture::trigger   stamps _hlc, _cells
//!    │ AFTER ROW   capture::trigger   change → capture::buffer (follows savepoints)
//!  COMMIT
//!    │ pre-commit  capture::flush     net effect per key → journal row, at a position
//!    │ visible     registry::clear    wakes who waits
//!    ▼
//!  journal (a ring of tables) ──── exchange::serve ────────────▶ exchange::worker (pulls, over libpq)
//!                                  up to the horizon, flushed      │ model::session decides what is next
//!                                                                  ▼
//!                                                                apply: lock the row, model::judge decides,
//!                                                                the executor writes; what was lost becomes
//!                                                                a record; progress in the same commit
//! ```
//!
//! and the same the other way round. What B has applied and flushed it tells A in its own stream (`seen`);
//! that acknowledgement is what lets A forget versions, tombstones and journal (the *stable point*).
//!
//! | room | owns |
//! |---|---|
//! | `model` (crate `tandem-model`) | every rule: versions, net effect, the join, who had seen what, records, codec, session; plain Rust, tested over random histories |
//! | [`types`] | `tandem.hlc`, `tandem.position`, `tandem.cells` in SQL |
//! | [`shmem`], [`recovery`] | what sessions share, and how it is read back after a start |
//! | [`clock`] | versions and positions: never twice, never behind what was seen |
//! | [`registry`] | open and committing transactions: the horizon and the low mark |
//! | [`relation`], [`value`] | what a synced table looks like, and how its values travel |
//! | [`policy`] | the policy log: which policy was in force at which version |
//! | [`capture`], [`journal`] | from a row trigger to the stream |
//! | [`stash`], [`tombstone`], [`displaced`] | rows that don't show: dead, or alive without a place |
//! | [`exchange`] | supervisor, one worker per peer, libpq, the serving side |
//! | [`apply`] | from the stream into tables, conflicts on record |
//! | [`api`] | the SQL functions of schema `tandem`, a few lines each |
//! | [`pg`] | thin wrappers over `pg_sys` |
//!
//! Imports run one way: api, exchange → capture, apply → catalog, pg → pgrx; everybody → model; model →
//! nothing. Why things are as they are stands at the top of each file. The promises that everything here
//! keeps (captured if and only if committed, shipped only when flushed, commit order without gaps, exactly
//! once, atomic, convergent, nothing lost without a record) are spelled out in the README.
// These pages are for who reads the source: links to private rooms are meant.
#![allow(rustdoc::private_intra_doc_links)]

pgrx::pg_module_magic!(name, version);

mod api;
mod apply;
mod capture;
mod clock;
mod counter;
mod displaced;
mod error;
mod exchange;
mod guc;
mod journal;
mod pg;
mod policy;
mod recovery;
mod registry;
mod relation;
mod shmem;
mod stash;
mod tombstone;
mod types;
mod value;

use pgrx::prelude::*;

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    guc::init();
    // SAFETY: a plain flag of the server.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        shmem::init();
        capture::init();
        exchange::init();
    }
}

/// What `cargo pgrx test` needs to know of its server.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'tandem'"]
    }
}
