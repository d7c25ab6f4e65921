//! The policies: their names, what each may be set on, and what of a pair each decides.
//!
//! Two kinds (DESIGN 4). *Lattice* policies are decided at once and alike on both nodes, by
//! [`judge`](crate::judge::judge). *Arbitrated* policies converge by last-update-wins first; then one
//! node, the arbiter, makes a later write where its policy wants another outcome.
//!
//! A table has two things to decide: whether a row exists ([`Subject::Existence`]), and what its cells hold
//! ([`Subject::Cells`], each cell by the policy of its columns, else by that of the table). A policy that
//! decides one of them leaves the other as it was.
//!
//! | policy | kind | decides | set on |
//! |---|---|---|---|
//! | `last_update_wins` | lattice | both | table, columns |
//! | `node_priority(id)` | lattice | both | table, columns |
//! | `delete_wins`, `update_wins` | lattice | existence | table |
//! | `counter` | lattice | cells | columns |
//! | `greatest`, `least`, `set_union` | arbitrated | cells | columns |
//! | `first_update_wins` | arbitrated | cells | table, columns |
//! | `custom(handler)`, `manual` | arbitrated | both | table, columns |
//!
//! Only arbitrated policies are set on a conflict type. The type of a conflict comes from what won and what
//! lost, so a policy that decides who wins can't depend on it; an arbitrated one looks at a settled pair.
use crate::hlc::NodeId;
use crate::record::ConflictType;
use crate::versions::CellId;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How a conflict is decided.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// The later version.
    #[default]
    LastUpdateWins,
    /// Of two writes that had not seen each other, that of this node.
    NodePriority(NodeId),
    /// Updates of a numeric column are deltas, and all of them count.
    Counter,
    /// A delete ends the row, whatever was written unseen.
    DeleteWins,
    /// A row that was updated unseen outlives its delete.
    UpdateWins,
    /// The greater value.
    Greatest,
    /// The lesser value.
    Least,
    /// The earlier version.
    FirstUpdateWins,
    /// All elements of both.
    SetUnion,
    /// What a function of the user says, named as the user wrote it.
    Custom(String),
    /// What a person says; until then the conflict is open.
    Manual,
}

/// The policies by which a pair is judged, cells as the receiver numbers them. By default the later
/// version wins throughout. Arbitrated policies are last-update-wins here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policies {
    /// Whether the row shows: the table's policy that decides it.
    pub existence: Policy,
    /// What cells hold that have no policy of their own.
    pub others: Policy,
    /// Cells of columns that have one.
    pub cells: BTreeMap<CellId, Policy>,
}

impl Policies {
    /// The policy of a cell.
    pub fn cell(&self, cell: CellId) -> &Policy {
        self.cells.get(&cell).unwrap_or(&self.others)
    }
}

/// Who settles a pair, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Each node by itself, at once, alike.
    Lattice,
    /// The arbiter, by a later write; last-update-wins until then.
    Arbitrated,
}

/// What of a pair is to be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Whether the row shows.
    Existence,
    /// The values of one cell.
    Cells,
}

/// What a policy is set on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Some columns only, not the whole table.
    pub columns: bool,
    /// Conflicts of this type only.
    pub conflict_type: Option<ConflictType>,
}

/// Why a policy can't be set where it was wanted; the text completes "policy … ".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misplaced {
    #[error("is set on columns, not on a table")]
    NeedsColumns,
    #[error("decides whether a row exists: it is set on a table, not on columns")]
    NeedsTable,
    #[error("decides who wins, which the type of a conflict follows from: it is not set on a conflict type")]
    NotByType,
    #[error("does not decide conflicts of type {0}")]
    OtherType(&'static str),
}

/// Text that names no policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("unknown policy")]
    Unknown,
    #[error("policy node_priority names the node that wins, by its id: node_priority(1)")]
    NeedsNode,
    #[error("policy custom names its handler: custom(schema.function)")]
    NeedsHandler,
    #[error("this policy takes no argument")]
    NoArgument,
}

impl Policy {
    /// Names of all policies, as SQL knows them.
    pub const NAMES: [&'static str; 11] = [
        "last_update_wins",
        "node_priority",
        "counter",
        "delete_wins",
        "update_wins",
        "greatest",
        "least",
        "first_update_wins",
        "set_union",
        "custom",
        "manual",
    ];

    /// The name without an argument.
    pub fn name(&self) -> &'static str {
        match self {
            Policy::LastUpdateWins => "last_update_wins",
            Policy::NodePriority(_) => "node_priority",
            Policy::Counter => "counter",
            Policy::DeleteWins => "delete_wins",
            Policy::UpdateWins => "update_wins",
            Policy::Greatest => "greatest",
            Policy::Least => "least",
            Policy::FirstUpdateWins => "first_update_wins",
            Policy::SetUnion => "set_union",
            Policy::Custom(_) => "custom",
            Policy::Manual => "manual",
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Policy::LastUpdateWins
            | Policy::NodePriority(_)
            | Policy::Counter
            | Policy::DeleteWins
            | Policy::UpdateWins => Kind::Lattice,
            Policy::Greatest
            | Policy::Least
            | Policy::FirstUpdateWins
            | Policy::SetUnion
            | Policy::Custom(_)
            | Policy::Manual => Kind::Arbitrated,
        }
    }

    /// True if the policy has a say in it.
    pub fn decides(&self, subject: Subject) -> bool {
        match (self, subject) {
            (Policy::DeleteWins | Policy::UpdateWins, Subject::Cells) => false,
            (
                Policy::Counter | Policy::Greatest | Policy::Least | Policy::SetUnion | Policy::FirstUpdateWins,
                Subject::Existence,
            ) => false,
            (_, _) => true,
        }
    }

    /// Whether the policy may be set there.
    pub fn fits(&self, target: Target) -> Result<(), Misplaced> {
        match self {
            Policy::Counter | Policy::Greatest | Policy::Least | Policy::SetUnion if !target.columns => {
                return Err(Misplaced::NeedsColumns);
            }
            Policy::DeleteWins | Policy::UpdateWins if target.columns => return Err(Misplaced::NeedsTable),
            _ => {}
        }
        let Some(conflict_type) = target.conflict_type else {
            return Ok(());
        };
        if self.kind() == Kind::Lattice {
            return Err(Misplaced::NotByType);
        }
        let of_cells = matches!(conflict_type, ConflictType::InsertExists | ConflictType::UpdateOriginDiffers);
        let decided = of_cells || (!target.columns && self.decides(Subject::Existence));
        if decided { Ok(()) } else { Err(Misplaced::OtherType(conflict_type.name())) }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::NodePriority(node) => write!(f, "node_priority({})", node.0),
            Policy::Custom(handler) => write!(f, "custom({handler})"),
            _ => f.write_str(self.name()),
        }
    }
}

impl FromStr for Policy {
    type Err = ParseError;
    /// Reads the text form: a name, and for two of them an argument in parentheses.
    fn from_str(text: &str) -> Result<Policy, ParseError> {
        let text = text.trim();
        let (name, argument) = match text.split_once('(') {
            Some((name, rest)) => (name.trim_end(), Some(rest.strip_suffix(')').ok_or(ParseError::Unknown)?.trim())),
            None => (text, None),
        };
        let policy = match (name, argument) {
            ("node_priority", Some(id)) => {
                let id = id.parse().ok().and_then(NodeId::new).ok_or(ParseError::NeedsNode)?;
                return Ok(Policy::NodePriority(id));
            }
            ("custom", Some(handler)) if !handler.is_empty() => return Ok(Policy::Custom(handler.to_string())),
            ("node_priority", None) => return Err(ParseError::NeedsNode),
            ("custom", _) => return Err(ParseError::NeedsHandler),
            ("last_update_wins", _) => Policy::LastUpdateWins,
            ("counter", _) => Policy::Counter,
            ("delete_wins", _) => Policy::DeleteWins,
            ("update_wins", _) => Policy::UpdateWins,
            ("greatest", _) => Policy::Greatest,
            ("least", _) => Policy::Least,
            ("first_update_wins", _) => Policy::FirstUpdateWins,
            ("set_union", _) => Policy::SetUnion,
            ("manual", _) => Policy::Manual,
            (_, _) => return Err(ParseError::Unknown),
        };
        if argument.is_some() { Err(ParseError::NoArgument) } else { Ok(policy) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Policy> {
        let argument = |name: &&str| match *name {
            "node_priority" => "node_priority(63)".to_string(),
            "custom" => "custom(app.merge(json))".to_string(),
            name => name.to_string(),
        };
        Policy::NAMES.iter().map(argument).map(|text| text.parse().expect("a policy")).collect()
    }
    fn on(columns: bool, conflict_type: Option<ConflictType>) -> Target {
        Target { columns, conflict_type }
    }

    #[test]
    fn every_policy_prints_and_parses_back() {
        for (policy, name) in all().into_iter().zip(Policy::NAMES) {
            assert_eq!(policy.name(), name);
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert_eq!(" node_priority ( 7 ) ".parse(), Ok(Policy::NodePriority(NodeId(7))));
        assert_eq!(Policy::Custom("app.merge(json)".into()).to_string(), "custom(app.merge(json))");
        assert_eq!(Policy::default(), Policy::LastUpdateWins);
    }

    #[test]
    fn what_names_no_policy_says_why() {
        for (text, why) in [
            ("", ParseError::Unknown),
            ("Counter", ParseError::Unknown),
            ("last_update_win", ParseError::Unknown),
            ("counter(", ParseError::Unknown),
            ("counter()", ParseError::NoArgument),
            ("manual(1)", ParseError::NoArgument),
            ("node_priority", ParseError::NeedsNode),
            ("node_priority()", ParseError::NeedsNode),
            ("node_priority(0)", ParseError::NeedsNode),
            ("node_priority(64)", ParseError::NeedsNode),
            ("node_priority(tokyo)", ParseError::NeedsNode),
            ("custom", ParseError::NeedsHandler),
            ("custom()", ParseError::NeedsHandler),
        ] {
            assert_eq!(text.parse::<Policy>(), Err(why), "{text}");
        }
    }

    #[test]
    fn each_policy_decides_something_and_has_a_place() {
        for policy in all() {
            let (existence, cells) = (policy.decides(Subject::Existence), policy.decides(Subject::Cells));
            assert!(existence || cells, "{policy}");
            let (table, columns) = (policy.fits(on(false, None)), policy.fits(on(true, None)));
            assert!(table.is_ok() || columns.is_ok(), "{policy}");
            // What decides cells may be set on some of them.
            assert_eq!(columns.is_ok(), cells, "{policy}");
        }
    }

    #[test]
    fn a_conflict_type_is_for_policies_that_look_at_it() {
        use ConflictType::*;
        let delete = Some(UpdateDeleted);
        assert_eq!(Policy::DeleteWins.fits(on(false, delete)), Err(Misplaced::NotByType));
        assert_eq!(Policy::LastUpdateWins.fits(on(false, Some(InsertExists))), Err(Misplaced::NotByType));
        assert_eq!(Policy::Manual.fits(on(false, delete)), Ok(()));
        // Columns have no existence of their own.
        let refused = Err(Misplaced::OtherType("update_deleted"));
        assert_eq!(Policy::Manual.fits(on(true, delete)), refused);
        assert_eq!(Policy::FirstUpdateWins.fits(on(false, delete)), refused);
        assert_eq!(Policy::Greatest.fits(on(true, Some(UpdateOriginDiffers))), Ok(()));
        assert_eq!(Policy::Greatest.fits(on(false, None)), Err(Misplaced::NeedsColumns));
        assert_eq!(Policy::UpdateWins.fits(on(true, None)), Err(Misplaced::NeedsTable));
    }
}
