//! Thin wrappers over `pg_sys`, one idea per file.
pub mod heap;
pub mod identity;
pub mod names;
pub mod query;
pub mod settings;
pub mod subtransaction;
