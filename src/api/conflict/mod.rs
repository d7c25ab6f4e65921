//! Deciding conflicts. A decision is an ordinary later write (I11): made here, captured and replicated like
//! any other, and the record it closes travels with it in the same transaction, under the version of that
//! write. So of two decisions that cross, record and row follow the same one.
mod choice;
mod columns;
mod desk;
mod grid;
mod row;
mod show;
mod stored;

use super::answer;
use desk::{Desk, Outcome};
use pgrx::iter::SetOfIterator;
use pgrx::prelude::*;
use pgrx::{Json, PgRelation};
use stored::{Filter, Stored};
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
    let request = answer(choice::Request::new(resolution, with_tuple));
    match answer(desk::resolve_one(conflict_id, &request, note, force)) {
        Outcome::Done => {}
        Outcome::Left(error) => error.raise(),
    }
}

/// Decides the open conflicts of a table alike, those that the filter lets through. Returns how many; those
/// that cannot be decided so, or whose row has changed since, stay open.
#[pg_extern]
fn resolve_all(
    rel: PgRelation,
    resolution: &str,
    note: default!(Option<&str>, "null"),
    conflict_type: default!(Option<&str>, "null"),
    detected_after: default!(Option<TimestampWithTimeZone>, "null"),
    detected_before: default!(Option<TimestampWithTimeZone>, "null"),
    columns: default!(Option<Vec<String>>, "null"),
) -> i64 {
    let (relid, schema, table) = (rel.oid(), rel.namespace().to_string(), rel.name().to_string());
    drop(rel);
    let request = answer(choice::Request::new(Some(resolution), None));
    let conflict_type = conflict_type.map(str::to_string);
    let filter = Filter { schema, table, conflict_type, detected_after, detected_before, columns };
    answer(Desk::of(relid).and_then(|mut desk| desk.resolve_all(&filter, &request, note)))
}

/// Closes a conflict and leaves the row as it is.
#[pg_extern]
fn ignore(conflict_id: pgrx::Uuid, note: default!(Option<&str>, "null")) {
    answer(Stored::locked(conflict_id).and_then(|mut stored| {
        stored.require_open(false)?;
        stored.close(Status::Ignored, None, note, None)
    }));
}

/// A conflict for a person at psql: base, local, remote and result side by side, 100 columns wide.
#[pg_extern]
fn show_conflict(conflict_id: pgrx::Uuid) -> SetOfIterator<'static, String> {
    SetOfIterator::new(answer(Stored::read(conflict_id).map(|stored| show::lines(&stored))))
}
