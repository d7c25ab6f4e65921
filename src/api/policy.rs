//! Policies: how a table's conflicts are decided.
use super::{answer, node, table};
use crate::apply::tables;
use crate::error::{Error, Result};
use crate::policy::{self, Outcome, Wanted, check};
use crate::relation;
use crate::types::SqlHlc;
use pgrx::PgRelation;
use pgrx::prelude::*;
use tandem_model::policy::{ParseError, Policy};
use tandem_model::record::ConflictType;

/// Sets the policy of a table, of some of its columns, of one type of conflict. Returns 'in force', or
/// 'pending' until the other node has put it in force.
#[pg_extern(sql = "create function set_policy(\"table\" regclass, policy text, columns text[] default null, \
    conflict_type text default null, handler text default null) returns text \
    language c as 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn set_policy(
    rel: Option<PgRelation>,
    policy: Option<&str>,
    columns: Option<Vec<Option<String>>>,
    conflict_type: Option<&str>,
    handler: Option<&str>,
) -> &'static str {
    let Some((relid, name)) =
        rel.map(|rel| (rel.oid(), pgrx::spi::quote_qualified_identifier(rel.namespace(), rel.name())))
    else {
        invalid("no table is named", "SELECT tandem.set_policy('accounts', 'greatest', columns => '{balance}');")
            .raise()
    };
    let outcome = answer(set(relid, &name, policy.unwrap_or_default(), columns, conflict_type, handler));
    crate::shmem::entry().bump_generation();
    match outcome {
        Outcome::InForce => "in force",
        Outcome::Pending => "pending",
    }
}

/// Where each entry of the policy log stands, for the view `tandem.policies`.
#[pg_extern(volatile, parallel_unsafe)]
fn policy_states() -> TableIterator<'static, (name!(version, SqlHlc), name!(state, &'static str))> {
    let states = answer(policy::states()).into_iter();
    TableIterator::new(states.map(|(version, state)| (SqlHlc(version), state.name())))
}

fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Error {
    Error::operator(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, hint)
}

fn set(
    relid: pg_sys::Oid,
    name: &str,
    policy: &str,
    columns: Option<Vec<Option<String>>>,
    conflict_type: Option<&str>,
    handler: Option<&str>,
) -> Result<Outcome> {
    node::require()?;
    table::require_owner(relid, name)?;
    let owner = relation::synced_by_oid(relid)?.owner;
    let columns = columns.unwrap_or_default().into_iter().collect::<Option<Vec<String>>>();
    let wanted = Wanted {
        policy: parse(policy, handler, owner)?,
        columns: columns.ok_or_else(|| invalid("columns holds a NULL", "For example columns => '{balance}'."))?,
        conflict_type: conflict_type.map(parse_type).transpose()?,
    };
    let set_by = Spi::get_one::<String>("select session_user::text")?.unwrap_or_default();
    policy::set(relid, &wanted, &set_by, is_paired)
}

/// True unless the peer's changes of the table have been waiting ever since it was added.
fn is_paired(rel: &relation::SyncedRelation) -> Result<bool> {
    use tables::State::*;
    let lines = tables::states()?;
    let line = lines.iter().find(|line| (&line.schema, &line.table) == (&rel.schema, &rel.table));
    Ok(line.is_some_and(|line| !matches!(line.state, MissingOnPeer | PolicyDiffers | JoinRequired)))
}

/// A handler is named by the argument, or in parentheses; it is kept under its full name.
fn parse(policy: &str, handler: Option<&str>, owner: pg_sys::Oid) -> Result<Policy> {
    let text = match handler {
        Some(handler) if policy.trim() == "custom" => format!("custom({handler})"),
        Some(_) => return Err(invalid(format!("policy {policy} takes no handler"), "Only policy custom has one.")),
        None => policy.to_string(),
    };
    match text.parse() {
        Ok(Policy::Custom(name)) => Ok(Policy::Custom(check::handler(&name, owner)?)),
        Ok(policy) => Ok(policy),
        Err(ParseError::Unknown) => {
            let hint = format!("It is one of {}.", Policy::NAMES.join(", "));
            Err(invalid(format!("policy \"{policy}\" is not known"), hint))
        }
        Err(ParseError::NeedsHandler) => Err(invalid(
            "policy custom needs a handler",
            "For example tandem.set_policy('stock', 'custom', handler => 'app.merge').",
        )),
        Err(why) => Err(invalid(why.to_string(), "See the policies in the README.")),
    }
}

fn parse_type(name: &str) -> Result<ConflictType> {
    ConflictType::of_name(name).ok_or_else(|| {
        let names = ConflictType::ALL.map(ConflictType::name).join(", ");
        invalid(format!("conflict type \"{name}\" is not known"), format!("It is one of {names}."))
    })
}
