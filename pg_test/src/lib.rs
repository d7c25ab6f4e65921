//! Harness for what needs real servers: throw-away clusters of any installed Postgres version, a
//! network between them that can be cut, and waits that end.
//!
//! A test usually takes the pair of its process, makes a table of its own on both nodes, and writes:
//!
//! ```no_run
//! let pair = tandem_pg_test::shared();
//! pair.table("s1", "id int primary key, a text");
//! pair.a.exec("insert into s1 values (1, 'one')");
//! pair.sync();
//! pair.assert_converged("s1");
//! ```
//!
//! A test that kills servers starts a pair for itself: [`Pair::new`].
//!
//! Everything panics on failure and says what it was doing: this crate is only for tests and the demo.

pub mod client;
pub mod cluster;
pub mod conflict;
pub mod ledger;
pub mod mixed;
pub mod node;
pub mod pair;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod shared;
pub mod tamper;
pub mod tpcb;
pub mod wait;
pub mod workload;

pub use client::Client;
pub use cluster::{Cluster, Stop};
pub use conflict::conflict;
pub use node::Node;
pub use pair::Pair;
pub use shared::shared;
pub use wait::{tick, until, until_for};
