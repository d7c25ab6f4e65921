//! One table whose conflicts are being decided: what that needs to know of the table, looked up once for all
//! of them.
use super::choice::{self, Choice, Request};
use super::columns::{Columns, Shapes};
use super::row::{self, DeferredChecks, Table, Written};
use super::stored::{Filter, Stored};
use crate::api::advice;
use crate::error::{self, Error, Result};
use crate::relation::{self, SyncedRelation};
use pgrx::prelude::*;
use std::rc::Rc;
use tandem_model::record::Status;

/// Records that are read and locked at once.
const PAGE: i64 = 500;

pub struct Desk {
    relation: Rc<SyncedRelation>,
    table: Table,
    shapes: Shapes,
}

pub enum Outcome {
    Done,
    /// Nothing was written, for this reason, and the conflict is as open as it was.
    Left(Error),
}

/// Decides one conflict.
pub fn resolve_one(id: pgrx::Uuid, request: &Request, note: Option<&str>, force: bool) -> Result<Outcome> {
    let mut stored = Stored::locked(id)?;
    stored.require_open(force)?;
    let relid = stored.relid.ok_or_else(|| stored.table_is_gone())?;
    let mut desk = Desk::of(relid)?;
    let checks = DeferredChecks::now(&desk.relation)?;
    let outcome = desk.decide(&mut stored, request, note, force)?;
    checks.restore()?;
    if matches!(outcome, Outcome::Done) {
        desk.note_dropped(&stored);
    }
    Ok(outcome)
}

impl Desk {
    /// Errors (55000) if the table is not kept in sync.
    pub fn of(relid: pg_sys::Oid) -> Result<Desk> {
        let relation = relation::synced_by_oid(relid)?;
        Ok(Desk { table: Table::of(relation.clone())?, shapes: Shapes::of(relid)?, relation })
    }

    /// Decides the open conflicts of the table that the filter lets through, oldest first.
    pub fn resolve_all(&mut self, filter: &Filter, request: &Request, note: Option<&str>) -> Result<i64> {
        filter.check(&self.relation)?;
        let checks = DeferredChecks::now(&self.relation)?;
        let (mut done, mut left, mut after) = (0, Vec::new(), None);
        loop {
            let page = filter.page(self.relation.relid, after, PAGE)?;
            let Some(last) = page.last() else { break };
            after = Some((last.record.detected_at, last.record.conflict_id));
            for mut stored in page {
                let id = stored.record.conflict_id;
                // What Postgres says against it does not tell of which conflict it speaks.
                let outcome = error::catch(|| self.decide(&mut stored, request, note, false)).map_err(|e| match e {
                    Error { detail: None, .. } => e.detail(format!("This is about conflict {id}; none was decided.")),
                    told => told,
                })?;
                match outcome {
                    Outcome::Done => done += 1,
                    Outcome::Left(error) => left.push(error),
                }
            }
        }
        checks.restore()?;
        warn_of_left(&left);
        Ok(done)
    }

    fn decide(&mut self, stored: &mut Stored, request: &Request, note: Option<&str>, force: bool) -> Result<Outcome> {
        let columns = Columns::of(stored, self.relation.clone(), &self.shapes);
        let choice = match Choice::of(request, stored, &columns) {
            Ok(choice) => choice,
            Err(e) if e.sqlstate == PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE => {
                return Ok(Outcome::Left(e));
            }
            Err(e) => return Err(e),
        };
        match row::write(&self.table, stored, &columns, &choice, force)? {
            Written::Changed(error) => Ok(Outcome::Left(error)),
            Written::Done(version) => {
                stored.close(Status::Resolved, Some(&request.label(stored)), note, version)?;
                Ok(Outcome::Done)
            }
        }
    }

    /// A person should know that part of what was lost had nowhere to go.
    fn note_dropped(&self, stored: &Stored) {
        let columns = Columns::of(stored, self.relation.clone(), &self.shapes);
        let dropped = choice::dropped_columns(stored, &columns);
        if !dropped.is_empty() {
            let table = self.relation.display_name();
            pgrx::notice!("no longer in table {table}, and left out: column \"{}\"", dropped.join("\", \""));
        }
    }
}

fn warn_of_left(left: &[Error]) {
    let Some(first) = left.first() else { return };
    let (subject, pronoun) = if left.len() == 1 { ("conflict was", "It is") } else { ("conflicts were", "They are") };
    advice::warn(
        &format!("{} {subject} left open; the first: {}", left.len(), first.message),
        Some(&format!(
            "{pronoun} in tandem.open_conflicts: decide each with tandem.resolve(conflict_id, …), with force => true to \
             overwrite a row that has changed since."
        )),
    );
}
