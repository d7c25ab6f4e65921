//! A ledger of balances that two nodes write at once, and its audit: every committed balance must still
//! be there, or have been replaced by somebody who had seen it, or stand in the conflict history with
//! its value. Plain decisions over what was logged; who logs and asks is [`crate::tpcb`].
//!
//! Every write notes the version that it replaced. A version is taken once, so the chain from the first
//! balance of a row to any later one is exact, whatever balances happen to be alike.

use std::collections::{BTreeMap, HashMap, HashSet};

/// One balance: its table, and the number of its row.
pub type Place = (String, i64);

/// One committed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    pub node: u32,
    /// What its writer saw: the version (0: the one of before pairing) and the balance.
    pub seen: (u64, i64),
    pub version: u64,
    pub balance: i64,
}

/// One record of the conflict history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    pub losing: u64,
    pub winning: u64,
    /// The balance that the record keeps of the losing side; none if it keeps none.
    pub balance: Option<i64>,
}

/// All that is known of one balance.
#[derive(Clone, Debug, Default)]
struct Account {
    /// By version.
    writes: BTreeMap<u64, Write>,
    losses: Vec<Loss>,
    /// The version and the balance at the end.
    last: Option<(u64, i64)>,
}

/// What was written, what there is in the end, and what is on record.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    accounts: HashMap<Place, Account>,
    /// Writes that changed nothing, which make no version.
    idle: usize,
}

/// How the writes of one table ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub writes: usize,
    /// Shows in the end.
    pub last: usize,
    /// Replaced by somebody who had seen it, and never lost.
    pub replaced: usize,
    /// Lost, and on record with its value.
    pub recorded: usize,
    /// The other side wrote the same balance over the same one: nothing was lost.
    pub alike: usize,
    /// Sum of all that was added to balances.
    pub added: i64,
    /// Of that, what no present balance descends from.
    pub missing: i64,
    /// Sum of the balances at the end.
    pub sum: i64,
    /// What must not be.
    pub faults: Vec<String>,
}

impl Ledger {
    pub fn write(&mut self, place: Place, write: Write) {
        if write.version == write.seen.0 {
            self.idle += 1;
            return;
        }
        self.accounts.entry(place).or_default().writes.insert(write.version, write);
    }

    pub fn loss(&mut self, place: Place, loss: Loss) {
        self.accounts.entry(place).or_default().losses.push(loss);
    }

    pub fn last(&mut self, place: Place, version: u64, balance: i64) {
        self.accounts.entry(place).or_default().last = Some((version, balance));
    }

    /// Writes that changed nothing.
    pub fn idle(&self) -> usize {
        self.idle
    }

    /// Judges every write of a table.
    pub fn audit(&self, table: &str) -> Outcome {
        let mut outcome = Outcome::default();
        for ((name, id), account) in &self.accounts {
            if name == table {
                account.audit(&format!("{name} {id}"), &mut outcome);
            }
        }
        outcome
    }
}

impl Account {
    fn audit(&self, name: &str, outcome: &mut Outcome) {
        let mut fault = |text: String| outcome.faults.push(format!("{name}: {text}"));
        let Some((last, balance)) = self.last else {
            return fault("the row is gone".to_string());
        };
        outcome.sum += balance;
        if let Err(text) = self.check((last, balance)) {
            fault(format!("in the end {text}"));
        }
        for write in self.writes.values() {
            if let Err(text) = self.check(write.seen) {
                fault(format!("the writer of {} saw what {text}", write.version));
            }
        }
        for loss in &self.losses {
            if let Err(text) = self.check_loss(loss) {
                fault(text);
            }
        }
        let replaced: HashSet<u64> = self.writes.values().map(|write| write.seen.0).collect();
        let recorded: HashSet<u64> = self.losses.iter().map(|loss| loss.losing).collect();
        let present: HashSet<u64> = self.line(last).collect();
        for (version, write) in &self.writes {
            let added = write.balance - write.seen.1;
            outcome.writes += 1;
            outcome.added += added;
            if !present.contains(version) {
                outcome.missing += added;
            }
            if *version == last {
                outcome.last += 1;
            } else if recorded.contains(version) {
                outcome.recorded += 1;
            } else if replaced.contains(version) {
                outcome.replaced += 1;
            } else if self.has_twin(write) {
                outcome.alike += 1;
            } else {
                outcome.faults.push(format!("{name}: lost without a record: {write:?}"));
            }
        }
    }

    /// Is this a version that somebody wrote, with the balance that was written?
    fn check(&self, (version, balance): (u64, i64)) -> Result<(), String> {
        match self.writes.get(&version) {
            None if version == 0 && balance == 0 => Ok(()),
            None => Err(format!("nobody wrote: {balance} at {version}")),
            Some(write) if write.balance == balance => Ok(()),
            Some(write) => Err(format!("was written otherwise: {balance}, by {write:?}")),
        }
    }

    /// A record tells of two writes that were made, with the loser's value, and of a true conflict.
    fn check_loss(&self, loss: &Loss) -> Result<(), String> {
        let Some(write) = self.writes.get(&loss.losing) else {
            return Err(format!("on record as lost, and never written: {loss:?}"));
        };
        if loss.balance != Some(write.balance) {
            return Err(format!("on record with another value than {}: {loss:?}", write.balance));
        }
        if !self.writes.contains_key(&loss.winning) {
            return Err(format!("lost to what nobody wrote: {loss:?}"));
        }
        if self.line(loss.winning).any(|version| version == loss.losing) {
            return Err(format!("on record as lost to a writer who had seen it: {loss:?}"));
        }
        Ok(())
    }

    /// A version and those before it, each seen by the writer of the next.
    fn line(&self, version: u64) -> impl Iterator<Item = u64> {
        let before = |version: &u64| self.writes.get(version).map(|write| write.seen.0).filter(|seen| seen < version);
        std::iter::successors(Some(version), before)
    }

    /// Did the other side write the same balance at the same time, and count as the later one?
    fn has_twin(&self, write: &Write) -> bool {
        let is_twin =
            |other: &Write| other.node != write.node && other.balance == write.balance && other.seen.0 < write.version;
        self.writes.range(write.version + 1..).any(|(_, other)| is_twin(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (node, version seen, balance seen, version, balance)
    fn ledger(writes: &[(u32, u64, i64, u64, i64)], losses: &[(u64, u64, i64)], last: (u64, i64)) -> Ledger {
        let mut ledger = Ledger::default();
        let place = || ("t".to_string(), 1);
        for &(node, seen, old, version, balance) in writes {
            ledger.write(place(), Write { node, seen: (seen, old), version, balance });
        }
        for &(losing, winning, balance) in losses {
            ledger.loss(place(), Loss { losing, winning, balance: Some(balance) });
        }
        ledger.last(place(), last.0, last.1);
        ledger
    }

    const BOTH: [(u32, u64, i64, u64, i64); 4] =
        [(1, 0, 0, 10, 5), (1, 10, 5, 11, 7), (2, 0, 0, 12, -3), (2, 12, -3, 13, 1)];

    #[track_caller]
    fn assert_fault(ledger: &Ledger, part: &str) {
        let faults = ledger.audit("t").faults;
        assert!(faults.len() == 1 && faults[0].contains(part), "{faults:?}");
    }

    #[test]
    fn every_write_ends_in_one_way() {
        let outcome = ledger(&BOTH, &[(11, 12, 7)], (13, 1)).audit("t");
        let expected = Outcome {
            writes: 4,
            last: 1,
            replaced: 2,
            recorded: 1,
            added: 8,
            missing: 7,
            sum: 1,
            ..Outcome::default()
        };
        assert_eq!(outcome, expected);
    }

    #[test]
    fn a_loss_without_a_record_is_noticed() {
        assert_fault(&ledger(&BOTH, &[], (13, 1)), "lost without a record");
    }

    #[test]
    fn a_record_with_another_value_is_noticed() {
        assert_fault(&ledger(&BOTH, &[(11, 12, 5)], (13, 1)), "another value");
    }

    #[test]
    fn a_record_of_no_conflict_is_noticed() {
        assert_fault(&ledger(&BOTH, &[(11, 12, 7), (12, 13, -3)], (13, 1)), "who had seen it");
        assert_fault(&ledger(&BOTH, &[(11, 12, 7), (9, 13, 7)], (13, 1)), "never written");
        assert_fault(&ledger(&BOTH, &[(11, 14, 7)], (13, 1)), "nobody wrote");
    }

    #[test]
    fn a_balance_from_nowhere_is_noticed() {
        assert_fault(&ledger(&[(1, 0, 0, 10, 5)], &[], (10, 6)), "otherwise");
        assert_fault(&ledger(&[(1, 0, 0, 10, 5), (1, 10, 4, 11, 6)], &[], (11, 6)), "otherwise");
        assert_fault(
            &ledger(&[(1, 0, 0, 10, 5), (1, 10, 5, 11, 6), (1, 9, 3, 12, 6)], &[(11, 12, 6)], (12, 6)),
            "nobody wrote",
        );
    }

    #[test]
    fn the_same_balance_from_both_sides_is_no_loss() {
        let outcome = ledger(&[(1, 0, 0, 10, 5), (2, 0, 0, 11, 5)], &[], (11, 5)).audit("t");
        assert_eq!((outcome.alike, outcome.last, outcome.faults.len()), (1, 1, 0));
        // Not so on one side, nor long after: there is nothing concurrent about it.
        assert_fault(&ledger(&[(1, 0, 0, 10, 5), (1, 0, 0, 11, 5)], &[], (11, 5)), "lost without a record");
        let later = [(1, 0, 0, 10, 5), (2, 0, 0, 11, 2), (2, 11, 2, 12, 5)];
        assert_fault(&ledger(&later, &[], (12, 5)), "lost without a record");
    }

    #[test]
    fn a_write_that_changes_nothing_is_none() {
        let ledger = ledger(&[(1, 0, 0, 10, 5), (1, 10, 5, 10, 5)], &[], (10, 5));
        assert_eq!((ledger.idle(), ledger.audit("t").writes), (1, 1));
    }
}
