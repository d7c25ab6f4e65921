//! Tandem: two databases in sync while applications write to both.
pgrx::pg_module_magic!();
