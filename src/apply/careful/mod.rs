//! Applying once more, carefully, what ran into a constraint: nothing stops the stream, and what cannot show
//! is set aside.
//!
//! A source transaction is first applied as it came. Only if that violates a constraint is it begun again with
//! a [`Careful`]: rows in whose way others stand are put off to its end ([`unique`]), rows and their parents are
//! looked at together then ([`parents`]), and what merging makes of a row is checked before it is written
//! ([`check`]). Postgres's own checks follow all the same: what this overlooks is an error, not a damage.
pub mod check;
pub mod own;
mod parents;
mod question;
pub mod rules;
mod unique;

use super::row::{Work, key_bytes, key_of};
use super::table::{Row, Table};
use super::{conflict, merging};
use crate::displaced::{self, Displaced, Listed, WaitsFor};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use pgrx::prelude::*;
use rules::Rules;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use tandem_model::showing::Rank;

/// What a source transaction that is applied carefully leaves for its end.
#[derive(Default)]
pub struct Careful {
    /// Rows that are not in their tables and may not find a place there.
    placeless: Vec<(pg_sys::Oid, pg_sys::HeapTuple)>,
    keys: HashSet<(pg_sys::Oid, Vec<u8>)>,
    /// Rows that were written and point at others.
    children: Vec<(pg_sys::Oid, pg_sys::HeapTuple)>,
    /// Rows that were there and others may point at.
    gone: Vec<(pg_sys::Oid, pg_sys::HeapTuple)>,
    rules: HashMap<pg_sys::Oid, Rc<Rules>>,
}

impl Careful {
    /// The constraints of a table.
    pub fn rules(&mut self, table: &Table) -> Result<Rc<Rules>> {
        let relid = table.synced.relid;
        if let Some(rules) = self.rules.get(&relid) {
            return Ok(rules.clone());
        }
        let rules = Rc::new(Rules::of(relid, table.synced.key_index)?);
        self.rules.insert(relid, rules.clone());
        Ok(rules)
    }

    /// True if a stored row (other than that of the same key) stands in the way of `row`.
    pub fn is_contested(&mut self, table: &mut Table, row: &Row) -> Result<bool> {
        let rules = self.rules(table)?;
        let own = table.is_found().then(|| table.found_place());
        for unique in &rules.uniques {
            let places = question::places(table, row, &unique.rivals, unique.owners_code)?;
            if places.into_iter().any(|place| Some(pgrx::itemptr::item_pointer_get_both(place)) != own) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts a row off to the end.
    pub fn put_off(&mut self, table: &mut Table, key: &[u8], row: &Row) {
        let relid = table.synced.relid;
        self.placeless.push((relid, table.keep(row)));
        self.keys.insert((relid, key.to_vec()));
    }

    /// True if a row of this key was put off.
    pub fn has_put_off(&self, relid: pg_sys::Oid, key: &[u8]) -> bool {
        !self.keys.is_empty() && self.keys.contains(&(relid, key.to_vec()))
    }

    /// A row was written: its parents are looked for at the end.
    pub fn wrote(&mut self, table: &mut Table, row: &Row) -> Result<()> {
        if !self.rules(table)?.points_at.is_empty() {
            let kept = table.keep(row);
            self.children.push((table.synced.relid, kept));
        }
        Ok(())
    }

    /// A row went, or gave way to another: who points at it is looked for at the end.
    pub fn took(&mut self, table: &mut Table, old: &Row) -> Result<()> {
        if !self.rules(table)?.pointed_at.is_empty() {
            let kept = table.keep(old);
            self.gone.push((table.synced.relid, kept));
        }
        Ok(())
    }
}

/// The tables of a local transaction while its constraints are settled.
pub struct Scene<'a> {
    pub tables: &'a mut HashMap<pg_sys::Oid, Table>,
    pub work: &'a mut Work,
    careful: Careful,
}

/// Settles what the source transaction has left: afterwards everything shows that can, and what can't is
/// displaced.
pub fn settle(tables: &mut HashMap<pg_sys::Oid, Table>, work: &mut Work) -> Result<()> {
    let Some(careful) = work.careful.take() else { return Ok(()) };
    let mut scene = Scene { tables, work, careful };
    let result = scene.settle();
    let Scene { work, mut careful, .. } = scene;
    careful.keys.clear();
    work.careful = Some(careful);
    result
}

/// Puts a displaced row up for its place, if it may have one by now.
pub fn ask(tables: &mut HashMap<pg_sys::Oid, Table>, work: &mut Work, listed: &Listed) -> Result<()> {
    let Some(careful) = work.careful.take() else { return Ok(()) };
    let mut scene = Scene { tables, work, careful };
    let result = scene.ask(listed);
    let Scene { work, careful, .. } = scene;
    work.careful = Some(careful);
    result
}

impl Scene<'_> {
    fn ask(&mut self, listed: &Listed) -> Result<()> {
        let Some(displaced) = displaced::find(listed.relid, &listed.key) else { return Ok(()) };
        // A table that is no longer kept in sync, or not yet again: its rows wait.
        let Some(table) = self.table(listed.relid)? else { return Ok(()) };
        let _memory = table.enter_row_memory();
        let row = unique::row_of(table, &displaced.row)?;
        let kept = table.keep(&row);
        if listed.waits_for != WaitsFor::Check {
            let key = key_values(table, &listed.key)?;
            if let Some(shown) = table.lock_row(&key, false) {
                // The key shows another row by now: that is the one that counts.
                let (by, _) = table.versions_of(&shown)?;
                let rel = table.synced.clone();
                conflict::inserted_over(&rel, &listed.key, &displaced.row, by)?;
                self.work.writes_own = true;
                displaced::remove(listed.relid, &listed.key);
                return Ok(());
            }
        }
        match listed.waits_for {
            // Also who waits for a parent: rows that came meanwhile may hold what it claims.
            WaitsFor::Place | WaitsFor::Parent => {}
            WaitsFor::Check => return self.merge_again(listed, &displaced),
        }
        self.careful.placeless.push((listed.relid, kept));
        Ok(())
    }

    /// A row that shows without what was merged into it.
    fn merge_again(&mut self, listed: &Listed, waiting: &Displaced) -> Result<()> {
        let table = self.open_table(listed.relid)?;
        let _memory = table.enter_row_memory();
        let key = key_values(table, &listed.key)?;
        let Some(row) = table.lock_row(&key, false) else {
            displaced::remove(listed.relid, &listed.key);
            return Ok(());
        };
        let content = merging::joined(table, &row, waiting)?;
        let mut merged = row.clone();
        for (column, value) in table.synced.clone().columns.iter().zip(&content) {
            super::table::set_value(&mut merged, column, value.flatten());
        }
        let Scene { tables, careful, work } = self;
        let table = tables.get_mut(&listed.relid).ok_or_else(|| Error::bug("a table was closed too early"))?;
        if check::broken(careful, table, &merged)?.is_some() {
            return Ok(());
        }
        displaced::remove(listed.relid, &listed.key);
        if careful.is_contested(table, &merged)? {
            careful.put_off(table, &listed.key, &merged);
            as_owner(table, Table::delete);
        } else {
            as_owner(table, |table| table.update(&merged));
            careful.wrote(table, &merged)?;
        }
        work.queued |= table.has_checks();
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        loop {
            let placeless = std::mem::take(&mut self.careful.placeless);
            let (children, gone) = (std::mem::take(&mut self.careful.children), std::mem::take(&mut self.careful.gone));
            if placeless.is_empty() && children.is_empty() && gone.is_empty() {
                return Ok(());
            }
            unique::place(self, placeless)?;
            parents::settle(self, children, gone)?;
        }
    }

    /// The table, open; none if it is not kept in sync.
    fn table(&mut self, relid: pg_sys::Oid) -> Result<Option<&mut Table>> {
        if let std::collections::hash_map::Entry::Vacant(free) = self.tables.entry(relid) {
            match Table::open(relid)? {
                Some(table) => drop(free.insert(table)),
                None => return Ok(None),
            }
        }
        Ok(self.tables.get_mut(&relid))
    }

    /// The same of a table that was open before.
    fn open_table(&mut self, relid: pg_sys::Oid) -> Result<&mut Table> {
        self.table(relid)?.ok_or_else(|| Error::bug("a table is no longer kept in sync"))
    }
}

/// A row's place in the order in which rows are asked whether they show.
fn rank_of(table: &Table, row: &Row) -> Result<Rank> {
    let (hlc, _) = table.versions_of(row)?;
    Ok(Rank { hlc, key: key_bytes(&table.synced, &key_of(&table.synced, row)) })
}

/// Values of a key as they are stored with tombstones and displaced rows.
fn key_values(table: &Table, key: &[u8]) -> Result<Vec<pg_sys::Datum>> {
    let values = crate::value::decode_key(key)?;
    if values.len() != table.synced.key.len() {
        return Err(Error::bug("a displaced row has the key of another table"));
    }
    let decoded = table.synced.key.iter().zip(&values);
    Ok(decoded.map(|(column, bytes)| crate::value::decode(&table.synced.columns[*column], bytes)).collect())
}

/// Runs `f` with the rights that writing rows of a table has.
fn as_owner<R>(table: &mut Table, f: impl FnOnce(&mut Table) -> R) -> R {
    let _owner = ActingAs::owner(table.synced.owner);
    f(table)
}
