//! Bounded waits on a condition. Whoever waits says for what; when the time is over the panic shows
//! what was last seen. There are no other waits in the tests.

use std::fmt::Display;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What a wait allows unless told otherwise. Long enough for a loaded machine with two cores.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Calls `probe` until it says Ok, for at most [`PATIENCE`]. An Err is what was seen instead.
#[track_caller]
pub fn until<T, E: Display>(what: &str, probe: impl FnMut() -> Result<T, E>) -> T {
    until_for(PATIENCE, what, probe)
}

/// [`until`] with its own limit.
#[track_caller]
pub fn until_for<T, E: Display>(limit: Duration, what: &str, mut probe: impl FnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        let seen = match probe() {
            Ok(value) => return value,
            Err(seen) => seen,
        };
        if start.elapsed() >= limit {
            panic!("waited {limit:?} for: {what}\n  last seen: {seen}");
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// A condition that has only yes and no.
#[track_caller]
pub fn until_true(what: &str, mut probe: impl FnMut() -> bool) {
    until(what, || if probe() { Ok(()) } else { Err("not yet") });
}

/// Lets the wall clock move on, so that what is written next is later than what was written before,
/// on whichever server of this machine.
pub fn tick() {
    sleep(Duration::from_millis(5));
}

/// Should the tests run at full size (`TANDEM_FULL=1`)? Otherwise large ones are cut to what a
/// developer waits for.
pub fn full_size() -> bool {
    std::env::var_os("TANDEM_FULL").is_some()
}
