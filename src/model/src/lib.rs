//! The rules of Tandem in plain Rust: no Postgres, no clock of its own, no I/O.
//!
//! Everything that decides (who had seen what, who wins, what is on record, what may be forgotten) is
//! here, so that it can be tested over random histories without a server. The edges load facts, call
//! this crate, and execute what it decides.
#![forbid(unsafe_code)]

pub mod arbiter;
mod bounded;
pub mod change;
mod clock;
pub mod counter;
pub mod descriptor;
pub mod hlc;
pub mod judge;
pub mod net;
pub mod orphan;
pub mod pace;
pub mod policy;
pub mod policy_log;
pub mod record;
pub mod session;
pub mod showing;
pub mod stable;
pub mod versions;
pub mod wire;
