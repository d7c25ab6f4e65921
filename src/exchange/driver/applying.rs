//! Applying the head of the queue, and what comes of it.
use super::Driver;
use crate::apply::{Body, Transaction};
use crate::error::{Class, Error, Result};
use crate::exchange::status::State;
use crate::exchange::{catalog, process};
use pgrx::prelude::*;
use tandem_model::hlc::Position;
use tandem_model::session::Event;

impl Driver {
    /// Applies (or passes over) the first so many of the queue.
    pub(super) fn apply(&mut self, count: usize) -> Event<'static> {
        let Some(contact) = &mut self.contact else { return Event::ApplyFailed { retry: true } };
        let Some(first) = self.queue.front() else { return Event::Applied(count) };
        let first = first.mark.position;
        let skip = self.peer.skip == Some(first);
        let count = if skip { 1 } else { count };
        process::report_activity(true, &format!("applying {first}"));
        let batch: Result<Vec<Transaction>> = self.queue.iter().take(count).map(copy).collect();
        let applied = match (batch, skip) {
            (Err(error), _) => Err(error),
            (Ok(mut batch), true) => {
                let why = self.trouble.as_ref().map_or("", |(_, e)| e.message.as_str());
                contact.applier.skip(batch.remove(0), why).and_then(|mark| {
                    catalog::clear_skip(&self.peer.name)?;
                    Ok(mark)
                })
            }
            (Ok(batch), false) => contact.applier.apply(batch),
        };
        process::report_activity(false, "tandem exchange");
        match applied {
            Ok(mark) => {
                self.queue.drain(..count);
                self.database.worker.applied(mark, count);
                self.database.worker.stuck_at(Position(0));
                self.trouble = None;
                self.peer.skip = self.peer.skip.filter(|_| !skip);
                Event::Applied(count)
            }
            Err(error) => {
                // Those before the one that fails are applied.
                let mark = contact.applier.progress();
                let count = self.queue.iter().take_while(|t| t.mark.position <= mark.position).count();
                self.queue.drain(..count);
                self.database.worker.applied(mark, count);
                self.database.worker.stuck_at(self.queue.front().map_or(Position(0), |t| t.mark.position));
                let retry = error.class == Class::Retry;
                let state = if retry { State::CatchUp } else { State::Stopped };
                let error = gave_way(error);
                self.complain(state, &error);
                self.trouble = Some((state, error));
                if count > 0 { Event::Applied(count) } else { Event::ApplyFailed { retry } }
            }
        }
    }
}

/// That applying gave way to a user is nothing to worry about: say so.
fn gave_way(mut error: Error) -> Error {
    if error.sqlstate == PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE {
        error.message = "a session holds a lock that applying needs; tried again until it is free".to_string();
        error.hint = Some("blocked_by in tandem.status is its process id.".to_string());
    }
    error
}

/// Applying takes its argument for good, and may have to be done again.
fn copy(transaction: &Transaction) -> Result<Transaction> {
    let body = match &transaction.body {
        Body::Inline(items) => Body::Inline(items.clone()),
        Body::Spooled(file) => {
            let mut file = file.try_clone().map_err(failed)?;
            std::io::Seek::rewind(&mut file).map_err(failed)?;
            Body::Spooled(file)
        }
    };
    Ok(Transaction { mark: transaction.mark, seen: transaction.seen, stable: transaction.stable, body })
}

fn failed(error: std::io::Error) -> Error {
    Error::retry(PgSqlErrorCode::ERRCODE_IO_ERROR, format!("could not read a spooled transaction: {error}"))
}
