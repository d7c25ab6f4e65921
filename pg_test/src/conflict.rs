//! What a test expects of the conflict history, and how the two nodes' histories are compared: the
//! same records under the same ids, each node's `local` being the other one's `remote`.

use std::fmt::Write as _;

use serde_json::Value;

use crate::client::Client;

/// One row of `tandem.conflicts`, as JSON.
pub type Record = Value;

/// What a record must hold. What isn't named isn't looked at; of an image only the named columns are.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    conflict_type: String,
    key: Option<Value>,
    base: Option<Value>,
    a: Option<Value>,
    b: Option<Value>,
    result: Option<Value>,
    status: Option<String>,
    constraint: Option<String>,
}

/// Those of the values that are in no image of these records.
pub fn missing_values(records: &[Record], values: &[&str]) -> Vec<String> {
    let mut kept = Vec::new();
    for record in records {
        for image in ["base_tuple", "local_tuple", "remote_tuple"] {
            let columns = record[image].as_object().into_iter().flat_map(|tuple| tuple.values());
            kept.extend(columns.filter_map(|value| value.as_str()));
        }
    }
    values.iter().filter(|value| !kept.contains(value)).map(ToString::to_string).collect()
}

/// Begins an expectation: `conflict("insert_exists").key(r#"{"id": 1}"#).a(…).b(…)`.
pub fn conflict(conflict_type: &str) -> Expected {
    Expected { conflict_type: conflict_type.to_string(), ..Expected::default() }
}

impl Expected {
    /// The key of the row.
    pub fn key(self, json: &str) -> Expected {
        Expected { key: Some(parse(json)), ..self }
    }

    /// What both had seen before; `null` for no row.
    pub fn base(self, json: &str) -> Expected {
        Expected { base: Some(parse(json)), ..self }
    }

    /// The image on node A: its own `local`, and B's `remote`.
    pub fn a(self, json: &str) -> Expected {
        Expected { a: Some(parse(json)), ..self }
    }

    /// The image on node B: its own `local`, and A's `remote`.
    pub fn b(self, json: &str) -> Expected {
        Expected { b: Some(parse(json)), ..self }
    }

    /// The row as it was decided.
    pub fn result(self, json: &str) -> Expected {
        Expected { result: Some(parse(json)), ..self }
    }

    pub fn status(self, status: &str) -> Expected {
        Expected { status: Some(status.to_string()), ..self }
    }

    pub fn constraint(self, name: &str) -> Expected {
        Expected { constraint: Some(name.to_string()), ..self }
    }

    /// Does this record of node A fit?
    pub fn fits(&self, on_a: &Record) -> bool {
        let text = |expected: &Option<String>, column: &str| {
            expected.as_ref().is_none_or(|expected| on_a[column].as_str() == Some(expected))
        };
        let image = |expected: &Option<Value>, column: &str| {
            expected.as_ref().is_none_or(|expected| holds(&on_a[column], expected))
        };
        on_a["conflict_type"].as_str() == Some(&self.conflict_type)
            && text(&self.status, "status")
            && text(&self.constraint, "constraint_name")
            && image(&self.key, "key_tuple")
            && image(&self.base, "base_tuple")
            && image(&self.a, "local_tuple")
            && image(&self.b, "remote_tuple")
            && image(&self.result, "result_tuple")
    }
}

/// The records of one table on one node, in the order of their ids.
pub fn records(client: &mut Client, table: &str) -> Vec<Record> {
    let query = format!(
        "select row_to_json(c) from tandem.conflicts c \
         where c.relation::text = '{table}'::regclass::text order by c.conflict_id"
    );
    client.rows(&query).iter().map(|row| parse(row)).collect()
}

/// Checks that the nodes' histories mirror each other and hold exactly what is expected.
pub fn check(on_a: &[Record], on_b: &[Record], expected: &[Expected]) -> Result<(), String> {
    let mut faults = compare(on_a, on_b);
    let mut left: Vec<&Record> = on_a.iter().collect();
    for expectation in expected {
        match left.iter().position(|record| expectation.fits(record)) {
            Some(found) => drop(left.remove(found)),
            None => drop(writeln!(faults, "no record fits {expectation:?}")),
        }
    }
    for record in left {
        let _ = writeln!(faults, "unexpected: {} {}", record["conflict_type"], record["key_tuple"]);
    }
    verdict(faults, on_a, on_b)
}

/// Checks that the nodes' histories mirror each other.
pub fn check_same(on_a: &[Record], on_b: &[Record]) -> Result<(), String> {
    verdict(compare(on_a, on_b), on_a, on_b)
}

fn compare(on_a: &[Record], on_b: &[Record]) -> String {
    let ids = |records: &[Record]| -> Vec<String> {
        records.iter().map(|record| record["conflict_id"].to_string()).collect()
    };
    if ids(on_a) != ids(on_b) {
        return "the nodes hold different records\n".to_string();
    }
    let mut faults = String::new();
    for (a, b) in on_a.iter().zip(on_b) {
        check_mirrored(a, b, &mut faults);
    }
    faults
}

fn verdict(mut faults: String, on_a: &[Record], on_b: &[Record]) -> Result<(), String> {
    if faults.is_empty() {
        return Ok(());
    }
    for (node, records) in [("A", on_a), ("B", on_b)] {
        let _ = writeln!(faults, "records on {node}:");
        for record in records {
            let _ = writeln!(faults, "  {record}");
        }
    }
    Err(faults)
}

fn check_mirrored(a: &Record, b: &Record, faults: &mut String) {
    let columns = [
        ("conflict_type", "conflict_type"),
        ("constraint_name", "constraint_name"),
        ("key_tuple", "key_tuple"),
        ("cells", "cells"),
        ("base_tuple", "base_tuple"),
        ("local_tuple", "remote_tuple"),
        ("remote_tuple", "local_tuple"),
        ("result_tuple", "result_tuple"),
        ("losing_version", "losing_version"),
        ("winning_version", "winning_version"),
        ("losing_node", "losing_node"),
        ("status", "status"),
        ("conflict_resolution", "conflict_resolution"),
        ("resolved_by", "resolved_by"),
    ];
    for (on_a, on_b) in columns {
        if a[on_a] != b[on_b] {
            let _ = writeln!(faults, "{}: {on_a} on A is {}, {on_b} on B is {}", a["conflict_id"], a[on_a], b[on_b]);
        }
    }
}

/// Is everything that is expected in the image?
fn holds(actual: &Value, expected: &Value) -> bool {
    match (actual, expected) {
        (Value::Object(actual), Value::Object(expected)) => {
            expected.iter().all(|(name, value)| actual.get(name) == Some(value))
        }
        _ => actual == expected,
    }
}

fn parse(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or_else(|e| panic!("{json} is not JSON: {e}"))
}
