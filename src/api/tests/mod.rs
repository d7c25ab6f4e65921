//! Tests of what one server shows. Those in `mod tests` run inside the server, each in a transaction that is
//! rolled back; what needs a commit runs over a session of its own (`journal.rs`).
mod conflicts;
mod errors;
mod journal;
mod notify;
mod policies;
mod rights;
mod tables;
mod types;

use pgrx::prelude::*;

/// Makes this database a node, unless it is one: statements for one transaction. Tests run beside each other, and
/// each may be the first. Whoever finds no node looks again when nobody else is about to make it: those inside the
/// server hold the lock until they are rolled back, a session until its commit. One that finds a node takes no lock.
const NODE: [&str; 2] = [
    "select pg_advisory_xact_lock(hashtext('tandem tests: the node')) where not exists (select from tandem.node)",
    "select tandem.create_node('tokyo', 1) where not exists (select from tandem.node)",
];

/// Makes this database a node, unless it is one. Operators of Tandem's types are found by their path.
fn ready() {
    run("set local search_path = public, tandem");
    NODE.into_iter().for_each(run);
}

/// Runs a query for one value.
fn value<T: FromDatum + IntoDatum>(query: &str) -> T {
    Spi::get_one::<T>(query).expect(query).expect(query)
}

fn run(statement: &str) {
    Spi::run(statement).expect(statement);
}

/// What a statement is refused with.
#[derive(Debug, Default, PartialEq, Eq)]
struct Refusal {
    sqlstate: String,
    message: String,
    detail: String,
    hint: String,
}

const REFUSAL: &str = "
    create function pg_temp.refusal(statement text) returns text[] language plpgsql as $$
         declare state text; message text; detail text; hint text;
         begin
             execute statement;
             return null;
         exception when others then
             get stacked diagnostics state = returned_sqlstate, message = message_text,
                 detail = pg_exception_detail, hint = pg_exception_hint;
             return array[state, message, detail, hint];
         end $$";

/// Runs a statement that must fail, in a subtransaction.
fn refusal(statement: &str) -> Refusal {
    if value::<bool>("select to_regprocedure('pg_temp.refusal(text)') is null") {
        run(REFUSAL);
    }
    let fields: Option<Vec<String>> =
        Spi::get_one_with_args("select pg_temp.refusal($1)", &[statement.into()]).expect(statement);
    let mut fields = fields.unwrap_or_else(|| panic!("was not refused: {statement}")).into_iter();
    let mut next = || fields.next().unwrap_or_default();
    Refusal { sqlstate: next(), message: next(), detail: next(), hint: next() }
}

/// Asserts that a statement is refused with this SQLSTATE and a hint.
fn refused(sqlstate: &str, statement: &str) -> Refusal {
    let refusal = refusal(statement);
    assert_eq!(refusal.sqlstate, sqlstate, "{statement}: {refusal:?}");
    assert!(!refusal.hint.is_empty(), "no hint: {statement}: {refusal:?}");
    refusal
}
