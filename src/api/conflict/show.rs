//! One conflict as a page of text.
use super::columns::names_column;
use super::grid;
use super::stored::{Side, Stored, status_name};
use pgrx::prelude::*;
use serde_json::{Map, Value};
use tandem_model::hlc::{Hlc, NodeId};
use tandem_model::record::{ConflictType, Status};

/// What a terminal surely has: 100 with what psql puts around a column.
const LINE_WIDTH: usize = 98;

pub fn lines(stored: &Stored) -> Vec<String> {
    let mut lines = heading(stored);
    lines.push(String::new());
    lines.extend(grid::lines(&table(stored), LINE_WIDTH));
    lines.push(String::new());
    lines.push(
        "> lost in this conflict   * differs from base   (as base): same value   (unknown): not on record".to_string(),
    );
    lines.extend(next_step(stored));
    lines
}

fn heading(stored: &Stored) -> Vec<String> {
    let record = &stored.record;
    let constraint = record.constraint_name.as_deref().map(|c| format!(" ({c})")).unwrap_or_default();
    let mut facts = vec![
        vec![format!("conflict {}", record.conflict_id), String::new()],
        vec!["what".to_string(), format!("{}{constraint} on {}", type_name(stored), stored.table_name())],
        vec!["key".to_string(), record.key.get().to_string()],
        vec!["kept".to_string(), written(stored, record.winning, kept_deed(stored))],
        vec!["lost".to_string(), format!("{}: {}", written(stored, record.losing, lost_deed(stored)), lost(stored))],
        vec!["detected".to_string(), format!("{}, policy {}", timestamp(record.detected_at), record.policy)],
    ];
    let first = facts.remove(0).swap_remove(0);
    let decision = &record.decision;
    let mut status = status_name(decision.status).to_string();
    if let Some(by) = &decision.by {
        let at = decision.at.map(|at| format!(", {}", timestamp(at))).unwrap_or_default();
        let how = decision.resolution.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
        status.push_str(&format!("{how}, by {by} on {}{at}", node_name(stored, decision.version.node())));
    }
    facts.push(vec!["status".to_string(), status]);
    facts.extend(decision.note.iter().map(|note| vec!["note".to_string(), note.clone()]));
    std::iter::once(first).chain(grid::facts(&facts, LINE_WIDTH)).collect()
}

/// Who wrote it, where and when.
fn written(stored: &Stored, version: Hlc, deed: &str) -> String {
    let side = match version.node() {
        NodeId(0) => return node_name(stored, version.node()),
        own if own == stored.around.own => "local",
        _ => "remote",
    };
    let at = timestamp_of(version);
    format!("{} ({side}) {deed} at {at}", node_name(stored, version.node()))
}

fn kept_deed(stored: &Stored) -> &'static str {
    use ConflictType::*;
    match stored.record.conflict_type {
        InsertExists => "inserted",
        UpdateOriginDiffers | UpdateDeleted => "updated",
        DeleteOriginDiffers => "deleted",
        _ => "wrote",
    }
}

fn lost_deed(stored: &Stored) -> &'static str {
    use ConflictType::*;
    match stored.record.conflict_type {
        InsertExists => "inserted",
        UpdateOriginDiffers | DeleteOriginDiffers | UpdateMissing => "updated",
        UpdateDeleted | DeleteMissing => "deleted",
        TruncateOriginDiffers => "truncated",
        _ => "wrote",
    }
}

fn lost(stored: &Stored) -> String {
    match &stored.record.cells[..] {
        [] => "the row as a whole".to_string(),
        [row] if row == "row" => "the row as a whole".to_string(),
        [column] => format!("column {column}"),
        cells => format!("columns {}", cells.join("; ")),
    }
}

/// What a person can do about it.
fn next_step(stored: &Stored) -> Option<String> {
    let undecided = matches!(stored.record.decision.status, Status::Open | Status::Auto);
    let id = stored.record.conflict_id;
    undecided.then(|| format!("SELECT tandem.resolve('{id}', 'local');  -- 'remote', 'base', …"))
}

/// Characters of a value that is worth repeating.
const LONG: usize = 20;
/// Of what a long value has in common with the base, this much is shown before the difference.
const CONTEXT: usize = 10;

/// The rows of the table: column, base, local, remote, result.
fn table(stored: &Stored) -> Vec<Vec<String>> {
    let remote_name = stored.around.peer_name.as_deref().map(|n| format!("  remote ({n})"));
    let mut rows = vec![vec![
        "  column".to_string(),
        "  base".to_string(),
        format!("  local ({})", stored.around.own_name),
        remote_name.unwrap_or_else(|| "  remote".to_string()),
        "  result".to_string(),
    ]];
    let sides = [stored.base(), stored.local(), stored.remote(), stored.result()];
    if sides.iter().any(|side| !matches!(side, Side::Row(_))) {
        let word = |side: &Side<'_>| match side {
            Side::Row(_) => "",
            Side::NoRow => "  (no row)",
            Side::Unknown => "  (unknown)",
        };
        rows.push([String::new()].into_iter().chain(sides.iter().map(|s| word(s).to_string())).collect());
    }
    let images = sides.map(parse);
    rows.extend(names(&images).iter().map(|name| row(stored, name, &images)));
    rows
}

fn row(stored: &Stored, name: &str, images: &[Option<Map<String, Value>>; 4]) -> Vec<String> {
    const SIDES: [&str; 4] = ["base", "local", "remote", "result"];
    let cells = &stored.record.cells;
    let lost = cells.iter().any(|cell| names_column(cell, name));
    let mark = if lost { ">" } else { " " };
    let values: Vec<_> = images.iter().map(|image| image.as_ref().map(|columns| columns.get(name))).collect();
    let base = values[0].flatten();
    let mut texts = vec![format!("{mark} {name}")];
    for (i, value) in values.iter().enumerate() {
        texts.push(match value {
            None => String::new(),
            Some(None) => "  (unknown)".to_string(),
            Some(Some(v)) => {
                let mark = if base.is_some_and(|base| base != *v) { "*" } else { " " };
                // A long value is shown once, and where it differs from the base.
                let before = (0..i).find(|earlier| values[*earlier] == Some(Some(*v)));
                let text = match before {
                    Some(side) if v.to_string().chars().count() > LONG => format!("(as {})", SIDES[side]),
                    _ => excerpt(&v.to_string(), base.filter(|_| i > 0).map(Value::to_string).as_deref()),
                };
                format!("{mark} {text}")
            }
        });
    }
    texts
}

/// A long value from shortly before where it begins to differ.
fn excerpt(text: &str, base: Option<&str>) -> String {
    let Some(base) = base.filter(|base| *base != text && text.chars().count() > LONG) else {
        return text.to_string();
    };
    let same = text.chars().zip(base.chars()).take_while(|(a, b)| a == b).count();
    if same <= LONG {
        return text.to_string();
    }
    format!("…{}", text.chars().skip(same - CONTEXT).collect::<String>())
}

/// The columns of all images, in the order of the fullest.
fn names(images: &[Option<Map<String, Value>>]) -> Vec<String> {
    let mut by_size: Vec<_> = images.iter().flatten().collect();
    by_size.sort_by_key(|image| std::cmp::Reverse(image.len()));
    let mut names: Vec<String> = Vec::new();
    for name in by_size.into_iter().flat_map(Map::keys) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

fn parse(side: Side<'_>) -> Option<Map<String, Value>> {
    match side {
        Side::Row(image) => serde_json::from_str(image.tuple.get()).ok(),
        Side::NoRow | Side::Unknown => None,
    }
}

fn type_name(stored: &Stored) -> String {
    serde_json::to_value(stored.record.conflict_type)
        .ok()
        .and_then(|v| v.as_str().map(str::to_string))
        .unwrap_or_default()
}

fn node_name(stored: &Stored, node: NodeId) -> String {
    match node {
        NodeId(0) => "a row from before pairing".to_string(),
        own if own == stored.around.own => stored.around.own_name.clone(),
        NodeId(id) => stored.around.peer_name.clone().unwrap_or_else(|| format!("node {id}")),
    }
}

/// Microseconds since the Unix epoch, to the millisecond, as the session shows times.
fn timestamp(micros: i64) -> String {
    shown(crate::types::unix_millis(micros.div_euclid(1_000)))
}

fn timestamp_of(version: Hlc) -> String {
    shown(crate::types::unix_millis(version.unix_millis()))
}

fn shown(at: TimestampWithTimeZone) -> String {
    // SAFETY: the output function of timestamptz on a value of it; a C string in the current context.
    let text = at.into_datum().map(|datum| unsafe {
        let text = pg_sys::OidOutputFunctionCall(pg_sys::F_TIMESTAMPTZ_OUT.into(), datum);
        std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
    });
    text.unwrap_or_default()
}
