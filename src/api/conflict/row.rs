//! The row that a conflict is about, as it is now, and the ordinary statement that a decision becomes.
//!
//! Both run with the rights of the table's owner in a security-restricted operation, as applying does: an
//! administrator may decide about a table without having been granted it, and the owner's triggers gain
//! nothing by that.
use super::choice::{self, Choice};
use super::stored::{Side, Stored};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::pg::settings::Local;
use crate::relation::{Column, SyncedRelation};
use crate::value;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::{SpiClient, quote_identifier, quote_qualified_identifier};
use serde_json::{Map, Value};
use std::ffi::CString;
use tandem_model::hlc::Hlc;

/// A value of a column, ready to be a parameter.
type Parameter = Option<pg_sys::Datum>;

/// The row as it is now.
struct Present {
    hlc: Hlc,
    /// In the order of the relation's columns.
    values: Vec<Parameter>,
}

/// Writes what was chosen. Returns an error, having written nothing, if the row has changed since the
/// conflict in a column that would be overwritten.
pub fn write(relation: &SyncedRelation, stored: &Stored, choice: &Choice, force: bool) -> Result<Option<Error>> {
    let table = Table::of(relation)?;
    let immediate = DeferredChecks::now(relation)?;
    let path = search_path()?;
    let changed = {
        let _owner = ActingAs::owner(relation.owner);
        // The table's own triggers are used to the path of the session that writes.
        let _path = Local::new(&[(c"search_path", path.as_c_str())]);
        Spi::connect_mut(|client| -> Result<Option<Error>> {
            let key = key_of(relation, stored)?;
            let present = table.lock(client, &key)?;
            let overwrites = !force && !matches!(choice, Choice::Beside(_));
            if overwrites && let Some(error) = changed_since(relation, stored, choice, present.as_ref())? {
                return Ok(Some(error));
            }
            table.apply(client, &key, present.as_ref(), choice).map(|()| None)
        })?
    };
    immediate.restore()?;
    Ok(changed)
}

fn search_path() -> Result<CString> {
    let path = Spi::get_one::<String>("select pg_catalog.current_setting('search_path')")?;
    CString::new(path.unwrap_or_default()).map_err(|e| Error::bug(e.to_string()))
}

/// The record's key as parameters.
fn key_of(relation: &SyncedRelation, stored: &Stored) -> Result<Vec<Parameter>> {
    let key: Map<String, Value> = serde_json::from_str(stored.record.key.get())
        .map_err(|e| Error::bug(format!("a record's key cannot be read: {e}")))?;
    relation
        .key
        .iter()
        .map(|i| {
            let column = &relation.columns[*i];
            key.get(&column.name).map(|v| value::from_json(column, v)).ok_or_else(|| {
                Error::operator(
                    PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                    format!("the key of table {} is another one than at the conflict", relation.display_name()),
                    format!("SELECT tandem.ignore('{}'); closes the conflict.", stored.record.conflict_id),
                )
            })
        })
        .collect()
}

/// Compares the row with what the conflict left behind, in the columns that were lost or are to be set.
fn changed_since(
    relation: &SyncedRelation,
    stored: &Stored,
    choice: &Choice,
    present: Option<&Present>,
) -> Result<Option<Error>> {
    let left = match stored.result() {
        Side::Row(image) => Some(choice::content(image, relation)?),
        Side::NoRow | Side::Unknown => None,
    };
    let changed = match (present, &left) {
        (None, left) => left.is_some(),
        (Some(p), _) if p.hlc <= stored.record.winning => false,
        (Some(_), None) => true,
        (Some(p), Some(left)) => differing(relation, stored, choice, p, left),
    };
    if !changed || choice.holds_already(relation, present) {
        return Ok(None);
    }
    let now = present.map_or("The row is gone.".to_string(), |p| {
        format!("It now holds {}, of version {}.", p.to_json(relation), p.hlc)
    });
    let error = Error::operator(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("the row of table {} has changed since the conflict", relation.display_name()),
        "tandem.resolve(conflict_id, …, force => true) overwrites it; tandem.ignore(conflict_id) leaves it as it is.",
    );
    Ok(Some(error.detail(now)))
}

/// True if a column that matters no longer has the value that the conflict left it with.
fn differing(
    relation: &SyncedRelation,
    stored: &Stored,
    choice: &Choice,
    present: &Present,
    left: &Map<String, Value>,
) -> bool {
    let lost = choice::lost_columns(stored, relation);
    relation.columns.iter().zip(&present.values).any(|(column, now)| {
        let is_lost = lost.contains(column.name.as_str());
        match left.get(&column.name) {
            Some(then) if is_lost || choice.sets(&column.name) => {
                !value::equal(column, value::from_json(column, then), *now)
            }
            Some(_) => false,
            None => is_lost,
        }
    })
}

impl Choice {
    fn sets(&self, name: &str) -> bool {
        matches!(self, Choice::Row { set, .. } if set.contains_key(name))
    }

    /// Nothing would be overwritten.
    fn holds_already(&self, relation: &SyncedRelation, present: Option<&Present>) -> bool {
        match (self, present) {
            (Choice::Nothing, None) => true,
            (Choice::Row { set, .. }, Some(present)) => relation.columns.iter().zip(&present.values).all(|(c, now)| {
                set.get(&c.name).is_none_or(|wanted| value::equal(c, value::from_json(c, wanted), *now))
            }),
            _ => false,
        }
    }
}

impl Present {
    fn to_json(&self, relation: &SyncedRelation) -> String {
        let columns = relation.columns.iter().zip(&self.values).map(|(column, datum)| {
            format!("{}: {}", Value::from(column.name.as_str()), value::to_json(column, *datum))
        });
        format!("{{{}}}", columns.collect::<Vec<_>>().join(", "))
    }
}

/// Statements on one table, by key.
struct Table<'a> {
    relation: &'a SyncedRelation,
    name: String,
    /// `"id" operator(pg_catalog.=) $1 and …`
    by_key: String,
}

impl Table<'_> {
    fn of(relation: &SyncedRelation) -> Result<Table<'_>> {
        let terms: Vec<String> = relation
            .key
            .iter()
            .zip(equality_operators(relation)?)
            .enumerate()
            .map(|(i, (column, operator))| {
                format!("{} {operator} ${}", quote_identifier(&relation.columns[*column].name), i + 1)
            })
            .collect();
        Ok(Table {
            relation,
            name: quote_qualified_identifier(&relation.schema, &relation.table),
            by_key: terms.join(" and "),
        })
    }

    fn key_parameters(&self, key: &[Parameter]) -> Vec<DatumWithOid<'static>> {
        self.relation.key.iter().zip(key).map(|(i, datum)| parameter(&self.relation.columns[*i], *datum)).collect()
    }

    /// Reads and locks the row. The datums live as long as the SPI connection.
    fn lock(&self, client: &mut SpiClient<'_>, key: &[Parameter]) -> Result<Option<Present>> {
        let names: Vec<String> = self.relation.columns.iter().map(|c| quote_identifier(&c.name)).collect();
        let query =
            format!("select {}, _hlc::int8 from only {} where {} for update", names.join(", "), self.name, self.by_key);
        let rows = client.update(&query, Some(1), &self.key_parameters(key))?.first();
        if rows.is_empty() {
            return Ok(None);
        }
        let values: std::result::Result<_, pgrx::spi::Error> =
            (1..=names.len()).map(|i| rows.get_datum_by_ordinal(i)).collect();
        let hlc = rows.get::<i64>(names.len() + 1)?.unwrap_or(0);
        Ok(Some(Present { hlc: Hlc(hlc as u64), values: values? }))
    }

    fn apply(
        &self,
        client: &mut SpiClient<'_>,
        key: &[Parameter],
        present: Option<&Present>,
        choice: &Choice,
    ) -> Result<()> {
        match (choice, present) {
            (Choice::Row { set, .. }, Some(present)) => self.update(client, key, present, set),
            (Choice::Row { whole: Some(tuple), .. }, None) | (Choice::Beside(tuple), _) => self.insert(client, tuple),
            (Choice::Row { whole: None, .. }, None) => Err(Error::operator(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("the row of table {} is gone", self.relation.display_name()),
                "Name the side to take the other columns from: tandem.resolve(conflict_id, 'local', with_tuple => '{…}').",
            )),
            (Choice::Nothing, Some(_)) => self.delete(client, key),
            (Choice::Nothing, None) => Ok(()),
        }
    }

    /// Sets what is not so already: a statement that changes nothing is not made.
    fn update(
        &self,
        client: &mut SpiClient<'_>,
        key: &[Parameter],
        present: &Present,
        set: &Map<String, Value>,
    ) -> Result<()> {
        let mut parameters = self.key_parameters(key);
        let mut terms = Vec::new();
        for (column, now) in self.relation.columns.iter().zip(&present.values) {
            let Some(wanted) = set.get(&column.name).map(|v| value::from_json(column, v)) else { continue };
            if !value::equal(column, wanted, *now) {
                parameters.push(parameter(column, wanted));
                terms.push(format!("{} = ${}", quote_identifier(&column.name), parameters.len()));
            }
        }
        if terms.is_empty() {
            return Ok(());
        }
        self.run(
            client,
            &format!("update only {} set {} where {}", self.name, terms.join(", "), self.by_key),
            &parameters,
        )
    }

    fn insert(&self, client: &mut SpiClient<'_>, tuple: &Map<String, Value>) -> Result<()> {
        let (mut names, mut places, mut parameters) = (Vec::new(), Vec::new(), Vec::new());
        for (name, value) in tuple {
            let Some(column) = choice::column(self.relation, name) else { continue };
            parameters.push(parameter(column, value::from_json(column, value)));
            names.push(quote_identifier(name));
            places.push(format!("${}", parameters.len()));
        }
        let (names, places) = (names.join(", "), places.join(", "));
        self.run(
            client,
            &format!("insert into {} ({names}) overriding system value values ({places})", self.name),
            &parameters,
        )
    }

    fn delete(&self, client: &mut SpiClient<'_>, key: &[Parameter]) -> Result<()> {
        self.run(client, &format!("delete from only {} where {}", self.name, self.by_key), &self.key_parameters(key))
    }

    /// Runs a statement that must change exactly one row.
    fn run(&self, client: &mut SpiClient<'_>, statement: &str, parameters: &[DatumWithOid<'_>]) -> Result<()> {
        if client.update(statement, None, parameters)?.len() == 1 {
            return Ok(());
        }
        Err(Error::operator(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("the row of table {} was not written", self.relation.display_name()),
            "A trigger, a rule or a row-level security policy of the table suppresses the statement.",
        ))
    }
}

fn parameter(column: &Column, datum: Parameter) -> DatumWithOid<'static> {
    match datum {
        // SAFETY: a value of the column's type, alive until the SPI connection ends.
        Some(datum) => unsafe { DatumWithOid::new(datum, column.typid) },
        None => DatumWithOid::null_oid(column.typid),
    }
}

/// The operators by which the key's index tells its values apart, in key order, schema-qualified: the
/// search_path of the caller may hold others.
fn equality_operators(relation: &SyncedRelation) -> Result<Vec<String>> {
    const BTREE_EQUAL: i32 = 3;
    let query = "select pg_catalog.format('operator(%I.%s)', n.nspname, o.oprname)
        from pg_catalog.pg_index i
        cross join lateral pg_catalog.unnest(i.indclass) with ordinality as k(opclass, place)
        join pg_catalog.pg_opclass c on c.oid = k.opclass
        join pg_catalog.pg_amop a on a.amopfamily = c.opcfamily and a.amoplefttype = c.opcintype
             and a.amoprighttype = c.opcintype and a.amopstrategy = $2
        join pg_catalog.pg_operator o on o.oid = a.amopopr
        join pg_catalog.pg_namespace n on n.oid = o.oprnamespace
        where i.indexrelid = $1 and k.place <= i.indnkeyatts order by k.place";
    let _catalog = ActingAs::superuser();
    let operators: Vec<String> = Spi::connect(|client| -> std::result::Result<_, pgrx::spi::Error> {
        client
            .select(query, None, &[relation.key_index.into(), BTREE_EQUAL.into()])?
            .filter_map(|row| row.get::<String>(1).transpose())
            .collect()
    })?;
    match operators.len() == relation.key.len() {
        true => Ok(operators),
        false => Err(Error::bug(format!("the key index of {} has no equality", relation.display_name()))),
    }
}

/// The table's initially deferred constraints, checked at once while this lives: within a
/// security-restricted operation nothing may be left for the commit.
struct DeferredChecks(String);

impl DeferredChecks {
    fn now(relation: &SyncedRelation) -> Result<DeferredChecks> {
        let query = "select pg_catalog.string_agg(pg_catalog.format('%I.%I', n.nspname, c.conname), ', ')
            from pg_catalog.pg_constraint c join pg_catalog.pg_namespace n on n.oid = c.connamespace
            where c.condeferred and (c.conrelid = $1 or c.confrelid = $1)";
        let names = {
            let _catalog = ActingAs::superuser();
            Spi::get_one_with_args::<String>(query, &[relation.relid.into()])?.unwrap_or_default()
        };
        let checks = DeferredChecks(names);
        checks.set("immediate")?;
        Ok(checks)
    }

    fn restore(&self) -> Result<()> {
        self.set("deferred")
    }

    fn set(&self, when: &str) -> Result<()> {
        if !self.0.is_empty() {
            Spi::run(&format!("set constraints {} {when}", self.0))?;
        }
        Ok(())
    }
}
