//! Foreign keys: a parent went on one node while a child came on the other.
//!
//! The lattice knows nothing of foreign keys. A child whose parent does not show waits in `displaced` and comes
//! back with a parent; it goes on claiming its unique values, so that the order in which constraints are looked
//! at doesn't matter. The node that deleted the parent meets the child too, and settles it by a write of its own:
//! exactly one node does.
//!
//! (Letting a parent that the peer deleted go on showing until the peer has settled it converges as well, and
//! needs a state of its own for rows that are dead and show; the child waits for a round trip instead.)
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What a table wants when a row of it points at a parent that was deleted unseen (`on_fk`).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFk {
    /// The parent lives again.
    #[default]
    Revive,
    /// The child is deleted.
    Cascade,
    /// The child waits for a person, or for a parent.
    Report,
}

/// What is known of the parent that a living child points at, and that does not show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// This node deleted it; its image is remembered.
    DeletedHere,
    /// The peer deleted it, and will settle it; or it is forgotten, was never here, or waits itself.
    Gone,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Write the parent anew from its image, as a write of this node.
    Revive,
    /// Delete the child, as a write of this node.
    DeleteChild,
    /// The child does not show.
    Wait,
}

/// Decides about a living child whose parent does not show.
pub fn remedy(on_fk: OnFk, parent: Parent) -> Remedy {
    match (parent, on_fk) {
        (Parent::Gone, _) | (_, OnFk::Report) => Remedy::Wait,
        (Parent::DeletedHere, OnFk::Revive) => Remedy::Revive,
        (Parent::DeletedHere, OnFk::Cascade) => Remedy::DeleteChild,
    }
}

impl OnFk {
    /// The name that SQL knows it by.
    pub fn name(self) -> &'static str {
        match self {
            OnFk::Revive => "revive",
            OnFk::Cascade => "cascade",
            OnFk::Report => "report",
        }
    }
}

impl fmt::Display for OnFk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names none of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected revive, cascade or report")]
pub struct ParseError;

impl FromStr for OnFk {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<OnFk, ParseError> {
        [OnFk::Revive, OnFk::Cascade, OnFk::Report].into_iter().find(|o| o.name() == text).ok_or(ParseError)
    }
}
