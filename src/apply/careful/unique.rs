//! Unique and exclusion constraints: the walk of `tandem_model::showing` over a real table.
use super::super::table::{Row, Table};
use super::super::{conflict, image};
use super::{Scene, as_owner, key_values, parents, question, rank_of};
use crate::displaced::{self, Displaced, WaitsFor};
use crate::error::{self, Error, Result};
use crate::stash::Stashed;
use pgrx::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use tandem_model::record::{ConflictType, Image};
use tandem_model::showing::{self, Rank};

/// Gives each of these rows, which are not in their tables, its place or sets it aside.
pub fn place(scene: &mut Scene<'_>, rows: Vec<(pg_sys::Oid, pg_sys::HeapTuple)>) -> Result<()> {
    let mut by_table: BTreeMap<u32, Vec<(Rank, pg_sys::HeapTuple)>> = BTreeMap::new();
    for (relid, tuple) in rows {
        let table = scene.open_table(relid)?;
        let _memory = table.enter_row_memory();
        let row = table.kept(tuple);
        by_table.entry(relid.to_u32()).or_default().push((rank_of(table, &row)?, tuple));
    }
    for (relid, rows) in by_table {
        let mut shelf = TableShelf { scene, relid: pg_sys::Oid::from(relid), reasons: BTreeMap::new() };
        showing::place(&mut shelf, rows)?;
    }
    Ok(())
}

struct TableShelf<'s, 'a> {
    scene: &'s mut Scene<'a>,
    relid: pg_sys::Oid,
    /// Of the row asked about last: the constraints that each rival stands for.
    reasons: BTreeMap<Rank, BTreeSet<String>>,
}

impl TableShelf<'_, '_> {
    fn table(&mut self) -> Result<&mut Table> {
        self.scene.open_table(self.relid)
    }

    /// A displaced row as a row of the table.
    fn stashed_row(&mut self, key: &[u8]) -> Result<Option<Row>> {
        match displaced::find(self.relid, key) {
            Some(found) => row_of(self.table()?, &found.row).map(Some),
            None => Ok(None),
        }
    }
}

/// A row that doesn't show as a row of its table.
pub fn row_of(table: &mut Table, stashed: &Stashed) -> Result<Row> {
    let rel = table.synced.clone();
    let content = image::of_tombstone(&rel, stashed)?;
    let mut row = table.row_of_content(&content);
    table.set_versions(&mut row, stashed.hlc, &stashed.versions);
    Ok(row)
}

/// The inverse.
pub fn stashed(table: &Table, row: &Row) -> Result<Stashed> {
    let rel = &table.synced;
    let (hlc, versions) = table.versions_of(row)?;
    let image = image::to_bytes(rel, &image::of_row(rel, row));
    Ok(Stashed { hlc, versions, image, descriptor: rel.descriptor })
}

impl showing::Shelf for TableShelf<'_, '_> {
    type Row = pg_sys::HeapTuple;
    type Error = Error;

    fn rivals(&mut self, tuple: &pg_sys::HeapTuple) -> Result<Vec<Rank>> {
        self.scene.open_table(self.relid)?;
        let rules = self.scene.careful.rules(self.scene.tables.get(&self.relid).ok_or_else(gone)?)?;
        let table = self.scene.tables.get_mut(&self.relid).ok_or_else(gone)?;
        let _memory = table.enter_row_memory();
        let row = table.kept(*tuple);
        let own = rank_of(table, &row)?;
        let mut reasons: BTreeMap<Rank, BTreeSet<String>> = BTreeMap::new();
        for unique in &rules.uniques {
            for place in question::places(table, &row, &unique.rivals, unique.owners_code)? {
                let other = table.lock_place(place)?;
                let rank = rank_of(table, &other)?;
                if rank.key != own.key {
                    reasons.entry(rank).or_default().insert(unique.name.clone());
                }
            }
        }
        // Rows that wait for a parent go on claiming.
        let waiting = displaced::all(Some(self.relid))?;
        for waiter in waiting.iter().filter(|w| w.waits_for == WaitsFor::Parent && w.key != own.key) {
            let Some(other) = self.stashed_row(&waiter.key)? else { continue };
            let table = self.table()?;
            for unique in &rules.uniques {
                if question::holds(table, &[&row, &other], &unique.excludes, unique.owners_code)? {
                    reasons.entry(rank_of(table, &other)?).or_default().insert(unique.name.clone());
                }
            }
        }
        self.reasons = reasons;
        Ok(self.reasons.keys().cloned().collect())
    }

    fn take(&mut self, rank: &Rank) -> Result<pg_sys::HeapTuple> {
        let relid = self.relid;
        let table = self.table()?;
        let _memory = table.enter_row_memory();
        let key = key_values(table, &rank.key)?;
        if let Some(row) = table.lock_row(&key, true) {
            let kept = table.keep(&row);
            as_owner(table, Table::delete);
            self.scene.work.queued |= self.scene.tables.get(&relid).is_some_and(Table::has_checks);
            return Ok(kept);
        }
        let row = self.stashed_row(&rank.key)?.ok_or_else(gone)?;
        Ok(self.table()?.keep(&row))
    }

    fn show(&mut self, rank: Rank, tuple: pg_sys::HeapTuple) -> Result<()> {
        let relid = self.relid;
        let waits = displaced::find(relid, &rank.key).is_some_and(|known| known.waits_for == WaitsFor::Parent);
        if waits && !parents::may_show(self.scene, relid, tuple)? {
            return Ok(()); // It has its place, and still no parent.
        }
        let table = self.table()?;
        let _memory = table.enter_row_memory();
        let row = table.kept(tuple);
        // A local session may have taken the place meanwhile: it is seen next time.
        error::catch(|| {
            as_owner(table, |table| table.insert(&row));
            Ok(())
        })
        .map_err(super::super::report::retry_if_unique)?;
        let has_checks = table.has_checks();
        displaced::remove(relid, &rank.key);
        let Scene { tables, work, careful } = self.scene;
        work.queued |= has_checks;
        careful.wrote(tables.get_mut(&relid).ok_or_else(gone)?, &row)
    }

    fn displace(&mut self, rank: Rank, tuple: pg_sys::HeapTuple, winners: &[Rank]) -> Result<()> {
        let relid = self.relid;
        let constraints: BTreeSet<String> =
            winners.iter().filter_map(|winner| self.reasons.get(winner)).flatten().cloned().collect();
        let known = displaced::find(relid, &rank.key);
        let winner = winners.iter().max().ok_or_else(|| Error::bug("a row was displaced by none"))?;
        let table = self.table()?;
        let _memory = table.enter_row_memory();
        let row = table.kept(tuple);
        let stashed = stashed(table, &row)?;
        let constraint = constraints.iter().cloned().collect::<Vec<_>>().join(", ");
        let as_before = known.is_some_and(|known| {
            known.waits_for == WaitsFor::Place && known.constraint == constraint && known.row.hlc == stashed.hlc
        });
        if !as_before {
            displaced::put(relid, &rank.key, &Displaced { row: stashed, waits_for: WaitsFor::Place, constraint });
        }
        self.record(&row, winner, &constraints)?;
        let Scene { tables, careful, .. } = self.scene;
        careful.took(tables.get_mut(&relid).ok_or_else(gone)?, &row)
    }
}

impl TableShelf<'_, '_> {
    fn record(&mut self, row: &Row, winner: &Rank, constraints: &BTreeSet<String>) -> Result<()> {
        let table = self.table()?;
        let rel = table.synced.clone();
        let winner_key = key_values(table, &winner.key)?;
        let winner_row = match table.lock_row(&winner_key, false) {
            Some(row) => row,
            None => self.stashed_row(&winner.key)?.ok_or_else(gone)?,
        };
        let table = self.table()?;
        let (hlc, versions) = table.versions_of(row)?;
        let born = !versions.birth.is_zero() && versions.birth == hlc;
        let conflict_type = match (constraints.len(), born) {
            (2.., _) => ConflictType::MultipleUniqueConflicts,
            (_, true) => ConflictType::InsertExists,
            (_, false) => ConflictType::UpdateExists,
        };
        let image = |row: &Row| image::to_json(&rel, &image::of_row(&rel, row));
        let (loser, winner_image) = (image(row)?, image(&winner_row)?);
        let key = super::super::row::key_of(&rel, row);
        let mut record =
            conflict::record_of(&rel, image::key_json(&rel, &key)?, conflict_type, hlc, winner.hlc, Default::default());
        if winner.hlc.node() != hlc.node() {
            record.tuples.insert(winner.hlc.node().0, Image { rank: (0, winner.hlc), tuple: winner_image.clone() });
        }
        record.tuples.insert(hlc.node().0, Image { rank: (1, hlc), tuple: loser });
        record.result = Some(Image { rank: (0, winner.hlc), tuple: winner_image });
        record.constraint_name = Some(constraints.iter().cloned().collect::<Vec<_>>().join(", "));
        record.over(image::key_json(&rel, &winner_key)?);
        conflict::keep_open(record, self.scene.work)
    }
}

fn gone() -> Error {
    Error::bug("a row or table that was there is gone")
}
