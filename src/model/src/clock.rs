//! The hybrid logical clock of a server: `hlc-gen`'s generator, driven by a wall clock that the caller reads.
//!
//! Plain data without pointers, meant for shared memory; every operation is lock-free. Invariant: ticks
//! are unique and rise, whatever the wall clock does; a full counter carries into the millisecond.
use crate::hlc::{COUNTER_SHIFT, EPOCH_UNIX_MS, Hlc, MILLIS_SHIFT, NODE_MASK, NodeId, Position, pack};
use hlc_gen::source::ManualClock;
use hlc_gen::{HlcGenerator, HlcTimestamp};

/// 2099-05-07, ten years before the end of `hlc-gen`'s time (2^42 ms of Unix time). The wall clock is cut
/// here and nothing beyond is observed, so that a carry always has somewhere to go: a tick can't fail.
const LAST_UNIX_MS: i64 = (1 << 42) - 10 * 366 * 86_400_000;

/// The clock. One per server.
pub struct Clock(HlcGenerator<ManualClock>);

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// A clock that has not ticked.
    pub fn new() -> Clock {
        // No drift check here: whether a value is acceptable is decided before it is observed.
        Clock(HlcGenerator::manual(0))
    }

    /// A new version: above every earlier tick and every value observed.
    pub fn tick(&self, wall_unix_ms: i64, node: NodeId) -> Hlc {
        Hlc(self.next(wall_unix_ms) | (u64::from(node.0) & NODE_MASK))
    }

    /// A new position, from the same sequence as [`Clock::tick`].
    pub fn tick_position(&self, wall_unix_ms: i64, node: NodeId) -> Position {
        Position(self.next(wall_unix_ms) | (u64::from(node.0) & NODE_MASK))
    }

    /// Moves past a value received from elsewhere: later ticks are greater. False, and nothing moves, if
    /// the value lies beyond what the clock can reach (2099).
    pub fn observe(&self, wall_unix_ms: i64, raw: u64) -> bool {
        let hlc = Hlc(raw);
        if hlc.unix_millis() > LAST_UNIX_MS {
            return false;
        }
        self.0.set_current_timestamp(wall_unix_ms.clamp(EPOCH_UNIX_MS, LAST_UNIX_MS));
        let received = (hlc.unix_millis(), u64::from(hlc.counter()));
        if self.0.timestamp().parts() >= received {
            return true; // The next tick is above it already; spend no counter.
        }
        HlcTimestamp::from_parts(received.0, received.1).and_then(|stamp| self.0.update(&stamp)).is_ok()
    }

    /// A reading, node bits all ones: everything ticked so far is at or below it, everything ticked later above.
    pub fn read(&self) -> u64 {
        let (ms, count) = self.0.timestamp().parts();
        // A count above the maximum stands for ticks on their way into the next millisecond.
        let counter = u16::try_from(count).unwrap_or(u16::MAX);
        pack((ms - EPOCH_UNIX_MS) as u64, counter) | NODE_MASK
    }

    fn next(&self, wall_unix_ms: i64) -> u64 {
        self.0.set_current_timestamp(wall_unix_ms.clamp(EPOCH_UNIX_MS, LAST_UNIX_MS));
        let mut stamp = self.0.next_timestamp();
        loop {
            let full = match stamp {
                Some(stamp) => match u16::try_from(stamp.count()) {
                    Ok(counter) => {
                        return pack((stamp.timestamp() - EPOCH_UNIX_MS) as u64, counter);
                    }
                    Err(_) => stamp.timestamp(),
                },
                None => self.0.timestamp().timestamp(),
            };
            // Each successful update moves the state, so what it returns belongs to this caller alone.
            stamp = HlcTimestamp::from_parts(full + 1, 0).and_then(|carried| self.0.update(&carried)).ok();
        }
    }
}

const _: () = assert!(MILLIS_SHIFT - COUNTER_SHIFT == u16::BITS);

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const NOON: i64 = 1_795_448_712_345;

    #[test]
    fn ticks_follow_the_wall_clock_and_never_go_back() {
        let clock = Clock::new();
        let first = clock.tick(NOON, NodeId(1));
        assert_eq!((first.unix_millis(), first.node()), (NOON, NodeId(1)));
        let second = clock.tick(NOON - 5_000, NodeId(2));
        assert!(second > first && second.unix_millis() == NOON);
        assert_eq!(clock.tick(NOON + 1, NodeId(1)).to_string(), "2026-11-23 15:45:12.346Z/0@1");
        assert!(clock.tick(i64::MIN, NodeId(1)) > second);
    }

    #[test]
    fn a_full_counter_carries() {
        let clock = Clock::new();
        let mut last = clock.tick(NOON, NodeId(1));
        for _ in 0..200_000 {
            let read = clock.read();
            let next = clock.tick(NOON, NodeId(1));
            assert!(last.0 <= read && read < next.0);
            last = next;
        }
        assert_eq!(last.unix_millis(), NOON + 3);
    }

    #[test]
    fn the_clock_moves_past_what_it_observes() {
        let clock = Clock::new();
        for counter in [0, 7, u16::MAX] {
            let far = Hlc::from_parts(NOON + 1_000, counter, NodeId(63)).unwrap();
            assert!(clock.observe(NOON, far.0));
            assert!(clock.read() >= far.0);
            assert!(clock.tick(NOON, NodeId(1)) > far);
        }
        let before = clock.read();
        assert!(clock.observe(NOON, 5));
        assert_eq!(clock.read(), before);
    }

    #[test]
    fn the_end_of_time_is_out_of_reach() {
        let clock = Clock::new();
        assert!(!clock.observe(NOON, u64::MAX));
        assert_eq!(clock.tick(NOON, NodeId(1)).unix_millis(), NOON);
        let late = clock.tick(i64::MAX, NodeId(1));
        assert!(late.unix_millis() == LAST_UNIX_MS);
        assert!((0..70_000).all(|_| clock.tick(i64::MAX, NodeId(1)) > late));
    }

    #[test]
    fn threads_never_share_a_tick_and_readings_separate() {
        let clock = Clock::new();
        let ticks: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|i| {
                    let clock = &clock;
                    scope.spawn(move || {
                        let mut ticks = Vec::new();
                        for n in 0..50_000u64 {
                            if n % 1_000 == i {
                                clock.observe(NOON, clock.read());
                            }
                            let before = clock.read();
                            let tick = clock.tick(NOON, NodeId(1)).0;
                            assert!(before < tick && tick <= clock.read());
                            ticks.push(tick);
                        }
                        ticks
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert!(ticks.iter().all(|mine| mine.is_sorted()));
        let all: HashSet<u64> = ticks.iter().flatten().copied().collect();
        assert_eq!(all.len(), 400_000);
    }
}
