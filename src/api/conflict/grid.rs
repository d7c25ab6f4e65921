//! Lays out a table of texts for a terminal: columns as wide as they must be, long values wrapped within
//! their column, no line longer than asked for.

/// Lines that one value may take before it is cut.
const MAX_LINES: usize = 5;
const SEPARATOR: &str = " | ";
/// Between a name and what it is.
const GAP: &str = "  ";
const MIN_WIDTH: usize = 8;

/// The lines of a table, the first row being its heading.
pub fn lines(rows: &[Vec<String>], line_width: usize) -> Vec<String> {
    let widths = fit(natural_widths(rows), line_width);
    let mut lines = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        lines.extend(row_lines(row, &widths, SEPARATOR));
        if i == 0 {
            let dashes: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
            lines.push(dashes.join("-+-"));
        }
    }
    lines
}

/// The lines of names and what they are, without a frame.
pub fn facts(rows: &[Vec<String>], line_width: usize) -> Vec<String> {
    let names = rows.iter().filter_map(|row| row.first()).map(|name| width(name)).max().unwrap_or(0);
    let widths = [names, line_width.saturating_sub(names + GAP.len())];
    rows.iter().flat_map(|row| row_lines(row, &widths, GAP)).collect()
}

fn natural_widths(rows: &[Vec<String>]) -> Vec<usize> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    (0..columns).map(|c| rows.iter().filter_map(|r| r.get(c)).map(|text| width(text)).max().unwrap_or(0)).collect()
}

/// Takes from the widest column until all fit.
fn fit(mut widths: Vec<usize>, line_width: usize) -> Vec<usize> {
    let room = line_width.saturating_sub(SEPARATOR.len() * widths.len().saturating_sub(1));
    while widths.iter().sum::<usize>() > room {
        match widths.iter_mut().max() {
            Some(widest) if *widest > MIN_WIDTH => *widest -= 1,
            _ => break,
        }
    }
    widths
}

fn row_lines(row: &[String], widths: &[usize], separator: &str) -> Vec<String> {
    let cells: Vec<Vec<String>> = row.iter().zip(widths).map(|(text, width)| wrap(text, *width)).collect();
    let height = cells.iter().map(Vec::len).max().unwrap_or(0);
    (0..height)
        .map(|i| {
            let parts =
                cells.iter().zip(widths).map(|(cell, width)| pad(cell.get(i).map_or("", String::as_str), *width));
            parts.collect::<Vec<_>>().join(separator).trim_end().to_string()
        })
        .collect()
}

/// The lines of a text. The mark that it may begin with stays on the first one, the others are as far in.
fn wrap(text: &str, room: usize) -> Vec<String> {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    for mark in ["  ", "* ", "> "] {
        if let Some(bare) = text.strip_prefix(mark) {
            let lines = wrap_bare(bare, room.saturating_sub(mark.len()));
            let margin = std::iter::once(mark).chain(std::iter::repeat("  "));
            return lines.iter().zip(margin).map(|(line, margin)| format!("{margin}{line}")).collect();
        }
    }
    wrap_bare(&text, room)
}

/// Breaks after a blank where there is one in the second half of the line, else anywhere.
fn wrap_bare(text: &str, room: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = text;
    while width(rest) > room && lines.len() + 1 < MAX_LINES {
        let (line, next) = rest.split_at(break_point(rest, room));
        lines.push(line.trim_end().to_string());
        rest = next;
    }
    if width(rest) > room {
        let cut = break_point(rest, room.saturating_sub(1));
        lines.push(format!("{}…", rest[..cut].trim_end()));
    } else {
        lines.push(rest.to_string());
    }
    lines
}

/// Byte offset at which a text that is too wide is broken; above 0.
fn break_point(text: &str, room: usize) -> usize {
    let mut used = 0;
    let mut after_blank = None;
    for (at, c) in text.char_indices() {
        used += char_width(c);
        if used > room && at > 0 {
            return after_blank.unwrap_or(at);
        }
        if c == ' ' && used > room / 2 {
            after_blank = Some(at + 1);
        }
    }
    text.len()
}

fn pad(text: &str, room: usize) -> String {
    format!("{text}{}", " ".repeat(room.saturating_sub(width(text))))
}

fn width(text: &str) -> usize {
    text.chars().map(char_width).sum()
}

/// Columns of a terminal that a character takes: two for East Asian wide ones and most emoji.
fn char_width(c: char) -> usize {
    match c as u32 {
        0x0300..=0x036f | 0x200b..=0x200f => 0,
        0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff | 0xfe30..=0xfe6f => 2,
        0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f300..=0x1faff | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}
