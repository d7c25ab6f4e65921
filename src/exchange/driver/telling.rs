//! What the driver says of itself: in the status, and in the log.
use super::Driver;
use crate::error::Error;
use crate::exchange::status::State;
use pgrx::prelude::*;

impl Driver {
    /// Shows an error and logs it, unless it is the one that is shown already.
    pub(super) fn complain(&self, state: State, error: &Error) {
        let status = &self.database.worker;
        status.note_error(error);
        status.enter(state, &error.message, error.hint.as_deref());
        let told = self.trouble.as_ref().map(|(_, e)| e).into_iter().chain(&self.failure);
        let ordinary = error.sqlstate == PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE;
        if !ordinary && !told.into_iter().any(|t| t.message == error.message) {
            // Without the detail: it may quote rows. `tandem.status` has it.
            pgrx::log!("tandem exchange with \"{}\" is {}: {error}", self.peer.name, state.name());
        }
    }

    /// While there is a failure to tell, that is what is shown, not the attempt to mend it.
    pub(super) fn show_contacting(&self, state: State) {
        if self.failure.is_none() {
            self.database.worker.enter(state, "", None);
        }
    }

    /// Shows what is going on, unless a failure is shown.
    pub(super) fn show(&self) {
        let status = &self.database.worker;
        if self.failure.is_some() || !self.session.is_open() {
            return;
        }
        if let (false, Some((state, error))) = (self.peer.paused, &self.trouble) {
            return status.enter(*state, &error.message, error.hint.as_deref());
        }
        let (state, reason) = match (self.peer.paused, self.session.is_behind()) {
            (true, _) => (State::Paused, "tandem.pause() was called"),
            (false, true) => (State::CatchUp, ""),
            (false, false) => (State::Streaming, ""),
        };
        if state == State::Streaming && self.session.is_idle() {
            status.current_at(crate::clock::wall_ms());
        }
        let hint = (state == State::Paused).then_some("SELECT tandem.resume();");
        status.enter(state, reason, hint);
    }
}
