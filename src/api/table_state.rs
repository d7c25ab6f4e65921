//! What `tandem.tables` shows of each table that either side keeps in sync.
use super::answer;
use crate::apply::tables;
use pgrx::prelude::*;

#[pg_extern(volatile, parallel_unsafe)]
fn table_states() -> TableIterator<
    'static,
    (name!(schema_name, String), name!(table_name, String), name!(state, &'static str), name!(reason, Option<String>)),
> {
    let lines = answer(tables::states()).into_iter();
    TableIterator::new(lines.map(|line| {
        let reason = (!line.reason.is_empty()).then_some(line.reason);
        (line.schema, line.table, line.state.name(), reason)
    }))
}
