//! What merging makes of a row that shows: written if the table's CHECKs allow it, else settled as
//! [`super::careful::check`] says.
use super::careful::{check, own};
use super::conflict;
use super::image::{self, Content};
use super::row::{Work, key_of};
use super::table::{Row, Table};
use crate::displaced::{self, Displaced, WaitsFor};
use crate::error::{Error, Result};
use crate::stash::Stashed;
use pgrx::prelude::*;
use tandem_model::judge::{RowState, Verdict};
use tandem_model::record::{ConflictType, Image};
use tandem_model::versions::CellId;

/// A change that updates a row which shows.
pub struct Merge<'a> {
    pub key: &'a [u8],
    /// The row as it is stored.
    pub old: &'a Row,
    /// The cells that the change wins.
    pub cells: &'a [CellId],
    pub verdict: &'a Verdict,
    pub state: &'a RowState,
    /// What of the row could not show before.
    pub waiting: Option<&'a Displaced>,
}

/// The row as the lattice has it: what is stored, and over it what waits and was not overtaken since.
pub fn joined(table: &Table, row: &Row, waiting: &Displaced) -> Result<Content> {
    let rel = &table.synced;
    let (_, versions) = table.versions_of(row)?;
    let mut content = image::of_row(rel, row);
    if waiting.waits_for != WaitsFor::Check {
        return Ok(content);
    }
    let values = image::of_tombstone(rel, &waiting.row)?;
    for ((column, value), place) in rel.columns.iter().zip(values).zip(&mut content) {
        let current = versions.cell(column.cell) == waiting.row.versions.cell(column.cell);
        if let (Some(value), true, None) = (value, current, column.key_ordinal) {
            *place = Some(value);
        }
    }
    Ok(content)
}

/// Settles a row that can't show as merging has it. False if it can: then it is to be written as ever.
pub fn settle(table: &mut Table, merge: &Merge<'_>, row: &Row, work: &mut Work) -> Result<bool> {
    let relid = table.synced.relid;
    let Some(careful) = &mut work.careful else {
        return match merge.waiting {
            None => Ok(false),
            // What waits is looked at when the transaction is applied carefully.
            Some(_) => Err(Error::operator(
                PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
                format!("a row of table {} waits to be merged", table.synced.display_name()),
                super::report::MEND,
            )),
        };
    };
    let mixed = merge.waiting.is_some() || check::is_mixed(&merge.state.versions, work.own, work.seen.low);
    let broken = if mixed { check::broken(careful, table, row)? } else { None };
    let Some(constraint) = broken else {
        displaced::remove(relid, merge.key);
        return Ok(false);
    };
    record(table, merge, row, &constraint, work)?;
    let arbiter = work.own < work.peer;
    if arbiter {
        let versions = &merge.verdict.versions;
        own::update_cells(table, row, merge.old, versions, merge.cells)?;
        work.writes_own = true;
        return Ok(true);
    }
    let mut shown = merge.old.clone();
    table.set_versions(&mut shown, merge.verdict.hlc, &merge.verdict.versions);
    let waiting = Stashed {
        hlc: merge.verdict.hlc,
        versions: merge.verdict.versions.clone(),
        image: image::to_bytes(&table.synced, &differing(table, merge.old, row)),
        descriptor: table.synced.descriptor,
    };
    displaced::put(relid, merge.key, &Displaced { row: waiting, waits_for: WaitsFor::Check, constraint });
    table.update(&shown);
    Ok(true)
}

/// The columns in which the joined row differs from the one that shows.
fn differing(table: &Table, shown: &Row, joined: &Row) -> Content {
    let rel = &table.synced;
    let columns = rel.columns.iter().map(|column| {
        let value = super::table::value_of(joined, column.attnum);
        let same = crate::value::equal(column, super::table::value_of(shown, column.attnum), value);
        (!same).then_some(value)
    });
    columns.collect()
}

fn record(table: &Table, merge: &Merge<'_>, row: &Row, constraint: &str, work: &mut Work) -> Result<()> {
    let rel = &table.synced;
    let unseen = merge.state.versions.cells.iter().map(|(_, v)| *v).chain([merge.state.versions.birth]);
    let ours = unseen.filter(|v| v.node() == work.own).max().unwrap_or(merge.state.hlc);
    let theirs = merge.cells.iter().map(|cell| merge.verdict.versions.cell(*cell)).max().unwrap_or_default();
    // The arbiter's row stands: what came to it, or what it meets at the other node, is the write that loses.
    let (losing, winning) = if work.own < work.peer { (theirs, ours) } else { (ours, theirs) };
    let image = |row: &Row| image::to_json(rel, &image::of_row(rel, row));
    let key = image::key_json(rel, &key_of(rel, merge.old))?;
    let mut record =
        conflict::record_of(rel, key.clone(), ConflictType::CheckViolation, losing, winning, Default::default());
    record.tuples.insert(work.own.0, Image { rank: (1, merge.state.hlc), tuple: image(merge.old)? });
    record.tuples.insert(work.peer.0, Image { rank: (0, theirs), tuple: image(row)? });
    record.constraint_name = Some(constraint.to_string());
    record.over(key);
    conflict::keep(record, work)
}
