//! The net effect of a transaction on each key.
use crate::change::Change;

/// TODO
pub fn net(changes: Vec<Change<'_>>) -> Vec<Change<'_>> {
    changes
}
