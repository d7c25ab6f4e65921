//! The row that a conflict is about, as it is now, and the ordinary statement that a decision becomes.
//!
//! Both run with the rights of the table's owner in a security-restricted operation, as applying does: an
//! administrator may decide about a table without having been granted it, and the owner's triggers gain
//! nothing by that.
use super::choice::{self, Choice};
use super::columns::Columns;
use super::stored::{Side, Stored};
use crate::error::{Error, Result};
use crate::pg::identity::ActingAs;
use crate::pg::settings::Local;
use crate::relation::{Column, SyncedRelation};
use crate::value;
use crate::{apply, capture, tombstone};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use pgrx::spi::{OwnedPreparedStatement, SpiClient, quote_identifier, quote_qualified_identifier};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::ffi::CString;
use std::rc::Rc;
use tandem_model::hlc::Hlc;

/// A value of a column, ready to be a parameter.
type Parameter = Option<pg_sys::Datum>;

/// The row as it is now.
struct Present {
    hlc: Hlc,
    /// In the order of the relation's columns.
    values: Vec<Parameter>,
}

/// What came of it.
pub enum Written {
    /// The version that the decision got by its write; none if there was nothing to write.
    Done(Option<Hlc>),
    /// Nothing was written: the row has changed since the conflict in a column that would be overwritten.
    Changed(Error),
}

/// Writes what was chosen. What was lost is written also where it stays as it is: of two decisions that cross,
/// the row then follows the later one on both nodes.
pub fn write(table: &Table, stored: &Stored, columns: &Columns, choice: &Choice, force: bool) -> Result<Written> {
    let relation = &*columns.relation;
    let _owner = ActingAs::unfiltered_owner(relation.owner);
    // The table's own triggers are used to the path of the session that writes.
    let _path = Local::new(&[(c"search_path", table.search_path.as_c_str())]);
    let mut affirmed: Vec<_> = choice::lost_columns(stored, columns)
        .into_iter()
        .chain(choice.set_names())
        .filter_map(|name| choice::column(relation, name))
        .filter(|c| c.key_ordinal.is_none())
        .map(|c| c.cell)
        .collect();
    affirmed.sort_unstable();
    affirmed.dedup();
    Spi::connect_mut(|client| {
        let key = key_of(columns, stored)?;
        let present = table.lock(client, &key)?;
        let overwrites = !force && !matches!(choice, Choice::Beside(_));
        if overwrites && let Some(error) = changed_since(columns, stored, choice, present.as_ref())? {
            return Ok(Written::Changed(error));
        }
        let version =
            capture::affirming(relation.relid, affirmed, || table.apply(client, &key, present.as_ref(), choice))?;
        Ok(Written::Done(version))
    })
}

fn search_path() -> Result<CString> {
    let path = Spi::get_one::<String>("select pg_catalog.current_setting('search_path')")?;
    CString::new(path.unwrap_or_default()).map_err(|e| Error::bug(e.to_string()))
}

/// The record's key as parameters.
fn key_of(columns: &Columns, stored: &Stored) -> Result<Vec<Parameter>> {
    let relation = &*columns.relation;
    let key: Map<String, Value> = serde_json::from_str(stored.record.key.get())
        .map_err(|e| Error::bug(format!("a record's key cannot be read: {e}")))?;
    relation
        .key
        .iter()
        .map(|i| {
            let column = &relation.columns[*i];
            let then = columns.then(column).and_then(|name| key.get(name));
            then.map(|v| value::from_json(column, v)).ok_or_else(|| {
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
    columns: &Columns,
    stored: &Stored,
    choice: &Choice,
    present: Option<&Present>,
) -> Result<Option<Error>> {
    let relation = &*columns.relation;
    let left = match stored.result() {
        Side::Row(image) => Some(choice::content(image, columns)?),
        Side::NoRow | Side::Unknown => None,
    };
    let changed = match (present, &left) {
        (None, left) => left.is_some(),
        (Some(p), _) if p.hlc <= stored.record.winning => false,
        (Some(_), None) => true,
        (Some(p), Some(left)) => differing(columns, stored, choice, p, left),
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
    columns: &Columns,
    stored: &Stored,
    choice: &Choice,
    present: &Present,
    left: &Map<String, Value>,
) -> bool {
    let lost = choice::lost_columns(stored, columns);
    columns.relation.columns.iter().zip(&present.values).any(|(column, now)| {
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

    fn set_names(&self) -> impl Iterator<Item = &str> {
        let set = match self {
            Choice::Row { set, .. } => Some(set),
            Choice::Nothing | Choice::Beside(_) => None,
        };
        set.into_iter().flat_map(Map::keys).map(String::as_str)
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
pub struct Table {
    relation: Rc<SyncedRelation>,
    name: String,
    /// `"id" operator(pg_catalog.=) $1 and …`
    by_key: String,
    /// Of the session.
    search_path: CString,
    lock: RefCell<Option<OwnedPreparedStatement>>,
}

impl Table {
    pub fn of(relation: Rc<SyncedRelation>) -> Result<Table> {
        let terms: Vec<String> = relation
            .key
            .iter()
            .zip(equality_operators(&relation)?)
            .enumerate()
            .map(|(i, (column, operator))| {
                format!("{} {operator} ${}", quote_identifier(&relation.columns[*column].name), i + 1)
            })
            .collect();
        Ok(Table {
            name: quote_qualified_identifier(&relation.schema, &relation.table),
            by_key: terms.join(" and "),
            search_path: search_path()?,
            lock: RefCell::default(),
            relation,
        })
    }

    fn key_parameters(&self, key: &[Parameter]) -> Vec<DatumWithOid<'static>> {
        self.relation.key.iter().zip(key).map(|(i, datum)| parameter(&self.relation.columns[*i], *datum)).collect()
    }

    /// Reads and locks the row. The datums live as long as the SPI connection.
    fn lock(&self, client: &mut SpiClient<'_>, key: &[Parameter]) -> Result<Option<Present>> {
        let names: Vec<String> = self.relation.columns.iter().map(|c| quote_identifier(&c.name)).collect();
        let mut lock = self.lock.borrow_mut();
        let statement = match &*lock {
            Some(statement) => statement,
            None => {
                let query = format!(
                    "select {}, _hlc::int8 from only {} where {} for update",
                    names.join(", "),
                    self.name,
                    self.by_key
                );
                let types: Vec<_> =
                    self.relation.key.iter().map(|i| pg_sys::PgOid::from(self.relation.columns[*i].typid)).collect();
                lock.insert(client.prepare_mut(query.as_str(), &types)?.keep())
            }
        };
        let rows = client.update(statement, Some(1), &self.key_parameters(key))?.first();
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
    ) -> Result<Option<Hlc>> {
        match (choice, present) {
            (Choice::Row { set, .. }, Some(present)) => self.update(client, key, present, set).map(Some),
            (Choice::Beside(tuple), Some(present)) => {
                self.insert(client, tuple)?;
                self.update(client, key, present, &Map::new()).map(Some)
            }
            (Choice::Row { whole: Some(tuple), .. }, None) | (Choice::Beside(tuple), None) => {
                self.insert(client, tuple).map(Some)
            }
            (Choice::Row { whole: None, .. }, None) => Err(Error::operator(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                format!("the row of table {} is gone", self.relation.display_name()),
                "Name the side to take the other columns from: tandem.resolve(conflict_id, 'local', with_tuple => '{…}').",
            )),
            (Choice::Nothing, Some(_)) => self.delete(client, key).map(Some),
            // The decision is as old as the deletion that it leaves standing: a row written since beats it.
            (Choice::Nothing, None) => Ok(self.tombstone(key)),
        }
    }

    /// Sets what is not so already; what is affirmed gets a new version all the same.
    fn update(
        &self,
        client: &mut SpiClient<'_>,
        key: &[Parameter],
        present: &Present,
        set: &Map<String, Value>,
    ) -> Result<Hlc> {
        let mut parameters = self.key_parameters(key);
        let mut terms = vec!["_hlc = _hlc".to_string()];
        for (column, now) in self.relation.columns.iter().zip(&present.values) {
            let Some(wanted) = set.get(&column.name).map(|v| value::from_json(column, v)) else { continue };
            if !value::equal(column, wanted, *now) {
                parameters.push(parameter(column, wanted));
                terms.push(format!("{} = ${}", quote_identifier(&column.name), parameters.len()));
            }
        }
        let statement =
            format!("update only {} set {} where {} returning _hlc::int8", self.name, terms.join(", "), self.by_key);
        self.run(client, &statement, &parameters)
    }

    fn insert(&self, client: &mut SpiClient<'_>, tuple: &Map<String, Value>) -> Result<Hlc> {
        let (mut names, mut places, mut parameters) = (Vec::new(), Vec::new(), Vec::new());
        for (name, value) in tuple {
            let Some(column) = choice::column(&self.relation, name) else { continue };
            parameters.push(parameter(column, value::from_json(column, value)));
            names.push(quote_identifier(name));
            places.push(format!("${}", parameters.len()));
        }
        let (names, places) = (names.join(", "), places.join(", "));
        let statement = format!(
            "insert into {} ({names}) overriding system value values ({places}) returning _hlc::int8",
            self.name
        );
        self.run(client, &statement, &parameters)
    }

    fn delete(&self, client: &mut SpiClient<'_>, key: &[Parameter]) -> Result<Hlc> {
        let statement = format!("delete from only {} where {} returning _hlc::int8", self.name, self.by_key);
        let held = self.run(client, &statement, &self.key_parameters(key))?;
        Ok(self.tombstone(key).unwrap_or(held))
    }

    /// The version of the deletion that the key stands under.
    fn tombstone(&self, key: &[Parameter]) -> Option<Hlc> {
        let key: Vec<pg_sys::Datum> = key.iter().copied().collect::<Option<_>>()?;
        tombstone::find(self.relation.relid, &apply::key_bytes(&self.relation, &key)).map(|t| t.hlc)
    }

    /// Runs a statement that must change exactly one row, and returns its version.
    fn run(&self, client: &mut SpiClient<'_>, statement: &str, parameters: &[DatumWithOid<'_>]) -> Result<Hlc> {
        let rows = client.update(statement, None, parameters)?;
        if rows.len() == 1 {
            let version = rows.first().get_one::<i64>()?.unwrap_or(0);
            return Ok(Hlc(version as u64));
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
pub struct DeferredChecks(String);

impl DeferredChecks {
    pub fn now(relation: &SyncedRelation) -> Result<DeferredChecks> {
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

    pub fn restore(&self) -> Result<()> {
        self.set("deferred")
    }

    fn set(&self, when: &str) -> Result<()> {
        if !self.0.is_empty() {
            Spi::run(&format!("set constraints {} {when}", self.0))?;
        }
        Ok(())
    }
}
