//! The pair that the tests of one process share, one test at a time: starting two servers takes
//! seconds, and most tests need no more than tables of their own. A test that fails leaves the pair
//! in an unknown state; the next one then gets a fresh pair.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pair::Pair;

static SHARED: Mutex<Option<Pair>> = Mutex::new(None);

/// The shared pair, for as long as this is held.
pub struct SharedPair {
    held: MutexGuard<'static, Option<Pair>>,
}

/// Takes the pair of this process, with both lines whole and both nodes streaming.
#[track_caller]
pub fn shared() -> SharedPair {
    let mut held = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if held.is_none() {
        *held = Some(Pair::new());
    }
    let pair = SharedPair { held };
    pair.wait_streaming();
    pair
}

impl Deref for SharedPair {
    type Target = Pair;

    fn deref(&self) -> &Pair {
        self.held.as_ref().expect("it is there from shared() to drop")
    }
}

impl Drop for SharedPair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Stops its servers, which prints the end of their logs.
            *self.held = None;
            return;
        }
        for node in self.nodes() {
            node.line.heal();
            node.hang_up();
        }
    }
}
