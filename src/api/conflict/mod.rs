//! Deciding conflicts. A decision is an ordinary later write (I11): made here, captured and replicated like
//! any other, and the record it closes travels with it in the same transaction.
mod choice;
mod grid;
mod row;
mod show;
mod stored;

use super::answer;
use crate::error::{Error, Result};
use crate::relation;
use choice::{Choice, Request};
use pgrx::iter::SetOfIterator;
use pgrx::prelude::*;
use pgrx::{Json, PgRelation};
use stored::Stored;
use tandem_model::record::Status;

/// Decides a conflict by writing what was chosen; see `tandem.conflicts` for what there is to choose from.
#[pg_extern]
fn resolve(
    conflict_id: pgrx::Uuid,
    resolution: default!(Option<&str>, "null"),
    with_tuple: default!(Option<Json>, "null"),
    note: default!(Option<&str>, "null"),
    force: default!(bool, "false"),
) {
    let request = answer(Request::new(resolution, with_tuple));
    match answer(resolve_one(conflict_id, &request, note, force)) {
        Outcome::Done => {}
        Outcome::RowChanged(error) => error.raise(),
    }
}

/// Decides every open conflict of a table alike. Returns how many; those whose row has changed since stay open.
#[pg_extern]
fn resolve_all(rel: PgRelation, resolution: &str, note: default!(Option<&str>, "null")) -> i64 {
    let (schema, table) = (rel.namespace().to_string(), rel.name().to_string());
    drop(rel);
    let request = answer(Request::new(Some(resolution), None));
    answer(resolve_table(&schema, &table, &request, note))
}

/// Closes a conflict and leaves the row as it is.
#[pg_extern]
fn ignore(conflict_id: pgrx::Uuid, note: default!(Option<&str>, "null")) {
    answer(Stored::locked(conflict_id).and_then(|mut stored| {
        stored.require_open(false)?;
        stored.close(Status::Ignored, None, note)
    }));
}

/// A conflict for a person at psql: base, local, remote and result side by side, 100 columns wide.
#[pg_extern]
fn show_conflict(conflict_id: pgrx::Uuid) -> SetOfIterator<'static, String> {
    SetOfIterator::new(answer(Stored::read(conflict_id).map(|stored| show::lines(&stored))))
}

enum Outcome {
    Done,
    /// Nothing was written: the row is no longer what the conflict left behind.
    RowChanged(Error),
}

fn resolve_one(id: pgrx::Uuid, request: &Request, note: Option<&str>, force: bool) -> Result<Outcome> {
    let mut stored = Stored::locked(id)?;
    stored.require_open(force)?;
    let relid = stored.relid.ok_or_else(|| stored.table_is_gone())?;
    let relation = relation::synced_by_oid(relid)?;
    let choice = Choice::of(request, &stored, &relation)?;
    if let Some(error) = row::write(&relation, &stored, &choice, force)? {
        return Ok(Outcome::RowChanged(error));
    }
    stored.close(Status::Resolved, Some(&request.label(&stored)), note)?;
    Ok(Outcome::Done)
}

fn resolve_table(schema: &str, table: &str, request: &Request, note: Option<&str>) -> Result<i64> {
    let (mut done, mut changed) = (0, 0);
    for id in stored::open_ids(schema, table)? {
        match resolve_one(id, request, note, false)? {
            Outcome::Done => done += 1,
            Outcome::RowChanged(_) => changed += 1,
        }
    }
    if changed > 0 {
        super::advice::warn(
            &format!("{changed} conflicts were left open: their rows have changed since"),
            Some(
                "Look at them in tandem.open_conflicts and decide each with tandem.resolve(conflict_id, …, force => true).",
            ),
        );
    }
    Ok(done)
}
