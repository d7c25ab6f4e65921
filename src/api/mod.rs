//! The SQL surface: what users call. Functions here are a few lines each and call down; what is plain SQL
//! (views, `tandem.check()`, roles, grants, comments) is in `sql/`.
//!
//! Rights: EXECUTE is granted in `sql/surface.sql` and to nobody else. Functions run as their caller; what
//! they do to the extension's own tables they do under [`crate::pg::identity::ActingAs::superuser`].
mod advice;
mod canonical;
mod conflict;
mod digest;
mod node;
mod peer;
mod policy;
mod sequence;
mod table;
mod table_state;
mod wait;

#[cfg(any(test, feature = "pg_test"))]
mod tests;

use crate::error::Result;

/// The edge: an error becomes a Postgres ERROR here.
fn answer<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|e| e.raise())
}

pgrx::extension_sql_file!("../../sql/roles.sql", name = "roles", requires = ["catalog"]);
pgrx::extension_sql_file!("../../sql/check.sql", name = "check", requires = ["catalog"]);
pgrx::extension_sql_file!("../../sql/surface.sql", name = "surface", finalize);
