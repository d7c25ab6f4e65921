//! Tandem: two databases in sync while applications write to both.
pgrx::pg_module_magic!(name, version);

mod apply;
mod capture;
mod clock;
mod error;
mod exchange;
mod guc;
mod journal;
mod pg;
mod recovery;
mod registry;
mod relation;
mod shmem;
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
