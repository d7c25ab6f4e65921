//! What shows of a table that has unique or exclusion constraints: a function of the lattice.
//!
//! The lattice knows nothing of such constraints, so two rows may be alive that a table cannot hold
//! together. Of all living rows those show that a walk in the order of their [`Rank`]s, downward, finds free:
//! a row shows unless a row that shows already claims one of its values. The others are set aside
//! (displaced): they are alive, change and die as any row does, and come back when their place is free.
//!
//! Whether a row shows depends on greater rows alone, so the walk can be continued from any state: [`place`]
//! takes the rows that may have to change places, greatest first, and whatever they push aside. Once it was
//! given every displaced row, what shows is what a walk from the start would find: so they are asked again after
//! each commit, by whomever, that may have freed a place. (Deciding value by value has no unique answer with two constraints and none with
//! three: rows that claim each other's values in a ring would change places for ever.)
//!
//! The rank is the row's `_hlc`: kept for good and the same on both nodes. (The greatest version over the
//! claiming cells alone would have to be kept from being forgotten while a claim is contested, and would say
//! the same of nearly every conflict: the row that was written last shows.)
use crate::hlc::Hlc;
use std::collections::BTreeMap;

/// The order in which rows are asked whether they show; greater comes first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank {
    /// The row's `_hlc`.
    pub hlc: Hlc,
    /// Its key as it travels: rows from before pairing have the same version.
    pub key: Vec<u8>,
}

/// A table as far as [`place`] goes.
pub trait Shelf {
    /// A living row that is not on the shelf.
    type Row;
    type Error;
    /// The rows on the shelf that hold a value which `row` claims, with their ranks.
    fn rivals(&mut self, row: &Self::Row) -> Result<Vec<Rank>, Self::Error>;
    /// Takes a row off the shelf.
    fn take(&mut self, rank: &Rank) -> Result<Self::Row, Self::Error>;
    /// Puts a row onto the shelf: nothing there is in its way.
    fn show(&mut self, rank: Rank, row: Self::Row) -> Result<(), Self::Error>;
    /// Sets a row aside; `winners` stand in its way.
    fn displace(&mut self, rank: Rank, row: Self::Row, winners: &[Rank]) -> Result<(), Self::Error>;
}

/// Decides of each of these rows, none of which is on the shelf, whether it shows.
pub fn place<S: Shelf>(shelf: &mut S, rows: impl IntoIterator<Item = (Rank, S::Row)>) -> Result<(), S::Error> {
    let mut waiting: BTreeMap<Rank, S::Row> = rows.into_iter().collect();
    while let Some((rank, row)) = waiting.pop_last() {
        let rivals = shelf.rivals(&row)?;
        let (above, below): (Vec<Rank>, Vec<Rank>) = rivals.into_iter().partition(|rival| *rival > rank);
        if !above.is_empty() {
            shelf.displace(rank, row, &above)?;
            continue;
        }
        // Only lesser rows are taken off and asked again, so this ends.
        for lesser in below {
            let taken = shelf.take(&lesser)?;
            waiting.insert(lesser, taken);
        }
        shelf.show(rank, row)?;
    }
    Ok(())
}
