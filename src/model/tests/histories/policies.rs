//! The lattice policies over the same histories: what converges, and that what shows is what each policy
//! says of the committed writes and who had seen what.
use crate::node::{CELLS, Check, Node, Rule, Stored};
use crate::world::{COMMON, World, Write};
use crate::{budget, must_fail_by, must_hold, must_hold_in};
use tandem_model::change::Op;
use tandem_model::hlc::NodeId;
use tandem_model::policy::{Policies, Policy};
use tandem_model::versions::CellId;

const FIRST: Policy = Policy::NodePriority(NodeId(1));
const SECOND: Policy = Policy::NodePriority(NodeId(2));

fn table(existence: Policy, others: Policy) -> Policies {
    Policies { existence, others, ..Policies::default() }
}

/// The later of two writes had seen the earlier.
fn knew(later: &Write, earlier: &Write) -> bool {
    if later.node == earlier.node { later.position > earlier.position } else { later.knew >= earlier.position }
}

impl World {
    /// What each key holds is what its policies say.
    pub fn policies_hold(&self, node: &Node) -> Check {
        for (key, row) in &node.rows {
            let writes: Vec<_> = self.writes.iter().filter(|w| w.key == *key).collect();
            let life: Vec<_> = writes.iter().copied().filter(|w| w.life == row.life).collect();
            let shows = match &node.policies.existence {
                Policy::DeleteWins => Some(life.iter().all(|w| w.op != Op::Delete)),
                Policy::UpdateWins => outlived(node, row, &life),
                Policy::NodePriority(first)
                    if node.policies == table(Policy::NodePriority(*first), Policy::NodePriority(*first)) =>
                {
                    wins_of_two_lives(*first, row, &writes)?;
                    let theirs: Vec<_> = life.iter().filter(|w| w.node == *first).collect();
                    let ends = |d: &&Write| d.node == *first || theirs.iter().all(|w| knew(d, w));
                    Some(!life.iter().filter(|w| w.op == Op::Delete).any(ends))
                }
                _ => None,
            };
            if shows.is_some_and(|shows| shows != row.live) {
                return Err(format!("row {key} should show: {shows:?}: {row:?}"));
            }
            for cell in CELLS {
                if let (Policy::NodePriority(first), Some(held)) = (node.policies.cell(cell), written(row, &life, cell))
                {
                    let of_cell = |w: &&&Write| w.cells.iter().any(|c| c.0 == cell) && w.node == *first;
                    if held.node != *first && life.iter().filter(of_cell).any(|w| !knew(held, w)) {
                        return Err(format!("cell {cell} of row {key} is not of node {}: {row:?}", first.0));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The write that a cell's content is of, if the content is of one write only.
fn written<'a>(row: &Stored, life: &[&'a Write], cell: CellId) -> Option<&'a Write> {
    let value = row.values.get(&cell).copied().filter(|value| *value >= COMMON)?;
    life.iter().copied().find(|w| w.cells.iter().any(|c| (c.0, c.2) == (cell, value)))
}

/// All the writes that a cell's content is made of: of a counter every one since it was set.
fn made_of<'a>(node: &Node, row: &Stored, life: &[&'a Write], cell: CellId) -> Option<Vec<&'a Write>> {
    if node.policies.cell(cell) != &Policy::Counter {
        return written(row, life, cell).map(|w| vec![w]);
    }
    let counts = |w: &&Write| w.counted.iter().any(|c| c.0 == cell && Some(&c.1) == row.bases.get(&cell));
    Some(life.iter().copied().filter(counts).collect())
}

/// Under `update_wins`: whether some cell holds what no delete of the life had seen whole.
fn outlived(node: &Node, row: &Stored, life: &[&Write]) -> Option<bool> {
    let cells: Vec<_> = CELLS.iter().map(|cell| made_of(node, row, life, *cell)).collect::<Option<_>>()?;
    let deletes: Vec<_> = life.iter().filter(|w| w.op == Op::Delete).collect();
    let ended = |writes: &Vec<&Write>| deletes.iter().any(|d| writes.iter().all(|w| knew(d, w)));
    Some(deletes.is_empty() || !cells.iter().all(ended))
}

/// A life of the other node stands only where it had seen every birth of the first one's.
fn wins_of_two_lives(first: NodeId, row: &Stored, writes: &[&Write]) -> Check {
    let mut births = writes.iter().filter(|w| w.op == Op::Insert);
    let Some(birth) = births.clone().find(|w| w.life == row.life).filter(|w| w.node != first) else {
        return Ok(());
    };
    match births.find(|w| w.node == first && !knew(birth, w)) {
        Some(lost) => Err(format!("the life of {} gave way to {row:?}", lost.version)),
        None => Ok(()),
    }
}

#[test]
fn delete_wins_holds_in_every_history() {
    must_hold("delete_wins", &table(Policy::DeleteWins, Policy::LastUpdateWins));
}
#[test]
fn update_wins_holds_in_every_history() {
    must_hold("update_wins", &table(Policy::UpdateWins, Policy::LastUpdateWins));
}
#[test]
fn node_priority_holds_in_every_history() {
    must_hold("node_priority(1)", &table(FIRST, FIRST));
    must_hold("node_priority(2)", &table(SECOND, SECOND));
}
#[test]
fn policies_of_cells_and_of_existence_go_together() {
    for existence in [Policy::LastUpdateWins, Policy::DeleteWins, Policy::UpdateWins, FIRST, SECOND] {
        for others in [Policy::LastUpdateWins, FIRST, SECOND] {
            let mut policies = table(existence.clone(), others);
            policies.cells.insert(CELLS[1], SECOND);
            must_hold_in(budget() / 8, &format!("{existence}, cells {}, one {SECOND}", policies.others), &policies);
        }
    }
}

#[test]
fn both_nodes_judge_by_one_policy() {
    for existence in [Policy::DeleteWins, Policy::UpdateWins, FIRST] {
        must_fail_by(Rule::PolicyOfOne, &table(existence, Policy::LastUpdateWins));
    }
    must_fail_by(Rule::PolicyOfOne, &table(Policy::LastUpdateWins, FIRST));
}
#[test]
fn the_version_of_a_row_counts_what_lost() {
    must_fail_by(Rule::LowHlc, &table(FIRST, FIRST));
}
#[test]
fn the_later_birth_is_not_the_named_nodes() {
    must_fail_by(Rule::LaterLife, &table(FIRST, FIRST));
}
