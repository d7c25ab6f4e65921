//! What the arbiter compares where a later write may reinstate an earlier one.
//!
//! Arbitrated policies converge by last-update-wins at once; where a policy wants another outcome the
//! arbiter makes a later write (I11). Under `first_update_wins` that write stands for the one whose value it
//! reinstates: compared by its own version it would lose to everything that came before it.
use crate::hlc::Hlc;
use crate::judge::Side;

/// The arbiter's side of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    pub version: Hlc,
    /// The write whose value this one reinstated; of a user's write, itself.
    pub stands_for: Hlc,
}

/// Which of two concurrent writes of a cell `first_update_wins` wants to show, and what that one stands for.
/// `base` is what the peer's write replaced: one that knowingly replaced the reinstated write is its
/// successor, not its rival.
pub fn first_update_wins(own: Own, peer: Hlc, base: Hlc) -> (Side, Hlc) {
    let successor = own.stands_for != own.version && base == own.stands_for;
    if successor || peer < own.stands_for { (Side::Remote, peer) } else { (Side::Local, own.stands_for) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(counter: u64, node: u64) -> Hlc {
        Hlc(counter * 64 + node)
    }

    #[test]
    fn the_earlier_write_is_wanted() {
        let own = Own { version: v(5, 1), stands_for: v(5, 1) };
        assert_eq!(first_update_wins(own, v(4, 2), Hlc(0)), (Side::Remote, v(4, 2)));
        assert_eq!(first_update_wins(own, v(6, 2), Hlc(0)), (Side::Local, v(5, 1)));
    }

    #[test]
    fn a_write_that_reinstates_is_as_old_as_what_it_stands_for() {
        let own = Own { version: v(9, 1), stands_for: v(4, 2) };
        assert_eq!(first_update_wins(own, v(6, 2), v(5, 1)), (Side::Local, v(4, 2)));
        // Who replaced that one knowingly goes on from it.
        assert_eq!(first_update_wins(own, v(6, 2), v(4, 2)), (Side::Remote, v(6, 2)));
    }
}
