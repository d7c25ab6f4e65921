//! CHECK constraints that merging would break: each side's row holds them, the joined one does not.
//!
//! The lattice joins cells and knows nothing of constraints. Where the joined row breaks one, the arbiter (the
//! node with the lower id) settles it in the same transaction: its own row stands, as a write of its own over
//! the cells that came. The other node goes on showing its row, under the joined versions, so that whatever is
//! written to it meanwhile is later than both; the values that wait stand in `displaced` until the arbiter's
//! write has overtaken them, or until the row can take them.
use super::super::table::{Row, Table};
use super::Careful;
use super::question;
use crate::error::Result;
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::versions::Versions;

/// The CHECK constraint that a row breaks, if any.
pub fn broken(careful: &mut Careful, table: &mut Table, row: &Row) -> Result<Option<String>> {
    let rules = careful.rules(table)?;
    for check in &rules.checks {
        if question::holds(table, &[row], &check.broken, true)? {
            return Ok(Some(check.name.clone()));
        }
    }
    Ok(None)
}

/// True if a row lists a version of `own` that whoever had seen our stream up to `low` can't have seen: only
/// then the joined row is one that nobody has written.
pub fn is_mixed(versions: &Versions, own: NodeId, low: Hlc) -> bool {
    let unseen = |v: Hlc| v.node() == own && v > low;
    unseen(versions.birth) || versions.cells.iter().any(|(_, v)| unseen(*v))
}
