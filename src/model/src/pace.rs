//! A pace for what may come in storms: so many events a second pass, the others are counted.

/// Length of the window (ms) in which events are counted.
const WINDOW_MS: i64 = 1_000;

/// Lets through `limit` events a second.
#[derive(Debug)]
pub struct Pace {
    limit: u32,
    /// Begin of the present window, ms of any steady clock; none before the first event.
    began: Option<i64>,
    passed: u32,
    held_back: u64,
}

impl Pace {
    pub const fn new(limit: u32) -> Pace {
        Pace { limit, began: None, passed: 0, held_back: 0 }
    }

    /// Counts an event; true if it passes.
    pub fn admit(&mut self, now: i64) -> bool {
        if self.is_over(now) {
            self.began = Some(now);
            self.passed = 0;
        }
        if self.passed < self.limit {
            self.passed += 1;
            return true;
        }
        self.held_back += 1;
        false
    }

    /// How many were held back, once their window is over; they are told of once.
    pub fn take_held_back(&mut self, now: i64) -> Option<u64> {
        if self.held_back == 0 || !self.is_over(now) {
            return None;
        }
        Some(std::mem::take(&mut self.held_back))
    }

    /// A clock that went back begins a new window as well.
    fn is_over(&self, now: i64) -> bool {
        self.began.is_none_or(|began| !(began..began + WINDOW_MS).contains(&now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_cut_to_its_limit_and_counted() {
        let mut pace = Pace::new(3);
        let passed = (0..10).filter(|i| pace.admit(1_000 + i)).count();
        assert_eq!(passed, 3);
        assert_eq!(pace.take_held_back(1_999), None, "its second is not over");
        assert_eq!(pace.take_held_back(2_000), Some(7));
        assert_eq!(pace.take_held_back(2_000), None, "told once");
        assert!(pace.admit(2_000), "the next second begins anew");
    }

    #[test]
    fn what_comes_slowly_all_passes() {
        let mut pace = Pace::new(1);
        assert!((0..100).all(|i| pace.admit(i * WINDOW_MS)));
        assert_eq!(pace.take_held_back(i64::MAX), None);
        assert!(pace.admit(5), "also after the clock went back");
    }
}
