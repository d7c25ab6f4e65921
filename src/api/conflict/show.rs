//! One conflict as a page of text.
use super::grid;
use super::stored::{Side, Stored, status_name};
use pgrx::prelude::*;
use serde_json::{Map, Value};
use tandem_model::hlc::NodeId;

/// What a terminal surely has.
const LINE_WIDTH: usize = 100;

pub fn lines(stored: &Stored) -> Vec<String> {
    let mut lines = heading(stored);
    lines.push(String::new());
    lines.extend(grid::lines(&table(stored), LINE_WIDTH));
    lines.push(String::new());
    lines.push("> lost in this conflict   * differs from base   (unknown): not on record".to_string());
    lines
}

fn heading(stored: &Stored) -> Vec<String> {
    let record = &stored.record;
    let constraint = record.constraint_name.as_deref().map(|c| format!(" ({c})")).unwrap_or_default();
    let mut lines = vec![
        format!("conflict {}", record.conflict_id),
        format!("{}{constraint} on {}, key {}", type_name(stored), stored.table_name(), record.key.get()),
        format!(
            "{} lost ({}) against {} ({})",
            node_name(stored, record.losing.node()),
            record.losing,
            node_name(stored, record.winning.node()),
            record.winning
        ),
        match record.cells.is_empty() {
            true => "lost: the row as a whole".to_string(),
            false => format!("lost: {}", record.cells.join("; ")),
        },
        format!(
            "detected {}, policy {}, status {}",
            timestamp(record.detected_at),
            record.policy,
            status_name(record.decision.status)
        ),
    ];
    let decision = &record.decision;
    if let Some(by) = &decision.by {
        let at = decision.at.map(|at| format!(" at {}", timestamp(at))).unwrap_or_default();
        let how = decision.resolution.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
        lines.push(format!("decided by {by}{at}{how}"));
    }
    if let Some(note) = &decision.note {
        lines.push(format!("note: {note}"));
    }
    lines
}

/// The rows of the table: column, base, local, remote, result.
fn table(stored: &Stored) -> Vec<Vec<String>> {
    let remote_name = stored.peer_name.as_deref().map(|n| format!("remote ({n})"));
    let mut rows = vec![vec![
        "  column".to_string(),
        "base".to_string(),
        format!("local ({})", stored.own_name),
        remote_name.unwrap_or_else(|| "remote".to_string()),
        "result".to_string(),
    ]];
    let sides = [stored.base(), stored.local(), stored.remote(), stored.result()];
    if sides.iter().any(|side| !matches!(side, Side::Row(_))) {
        let word = |side: &Side<'_>| match side {
            Side::Row(_) => "",
            Side::NoRow => "(no row)",
            Side::Unknown => "(unknown)",
        };
        rows.push([String::new()].into_iter().chain(sides.iter().map(|s| word(s).to_string())).collect());
    }
    let images = sides.map(parse);
    rows.extend(names(&images).iter().map(|name| row(stored, name, &images)));
    rows
}

fn row(stored: &Stored, name: &str, images: &[Option<Map<String, Value>>; 4]) -> Vec<String> {
    let cells = &stored.record.cells;
    let lost = cells.iter().any(|cell| cell == name || cell.split(',').any(|part| part == name) || cell == "row");
    let mark = if lost { ">" } else { " " };
    let base = images[0].as_ref().and_then(|base| base.get(name));
    let mut texts = vec![format!("{mark} {name}")];
    for image in images {
        texts.push(match image.as_ref().map(|columns| columns.get(name)) {
            None => String::new(),
            Some(None) => "(unknown)".to_string(),
            Some(Some(v)) if base.is_some_and(|base| base != v) => format!("{v} *"),
            Some(Some(v)) => v.to_string(),
        });
    }
    texts
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
        own if own == stored.own => stored.own_name.clone(),
        NodeId(id) => stored.peer_name.clone().unwrap_or_else(|| format!("node {id}")),
    }
}

/// Microseconds since the Unix epoch, to the second, as the session shows times.
fn timestamp(micros: i64) -> String {
    let at: TimestampWithTimeZone = crate::types::unix_millis(micros.div_euclid(1_000_000) * 1000);
    at.to_iso_string()
}
