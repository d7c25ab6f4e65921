//! The clock's values: [`Hlc`] (a version: when a row was written), [`Position`] (when a transaction
//! committed) and [`Mark`] (a position with its low mark). A version and a position are never compared.
//!
//! All are one `u64`, in the layout of the crate `hlc-gen` with the node in the low 6 bits of its counter:
//! 42 bits of milliseconds since 2024-01-01 UTC, 16 bits of counter, 6 bits of node. Every `u64` is a
//! value and has one text form (`2026-11-23 15:45:12.345Z/17@1`; `0` for 0), which parses back to it.
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

pub use crate::clock::Clock;

/// 2024-01-01 00:00:00 UTC in milliseconds since the Unix epoch: where [`Hlc`] counts from.
pub const EPOCH_UNIX_MS: i64 = 1_704_067_200_000;

pub(crate) const COUNTER_SHIFT: u32 = 6;
pub(crate) const MILLIS_SHIFT: u32 = 22;
pub(crate) const NODE_MASK: u64 = (1 << COUNTER_SHIFT) - 1;
const MILLIS_MAX: u64 = (1 << (64 - MILLIS_SHIFT)) - 1;

/// Number of a node, 1 to 63. 0 stands for no node: version 0 is "before pairing".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u8);

impl NodeId {
    /// The greatest number a node can have.
    pub const MAX: NodeId = NodeId(63);

    /// A node's number, if it is one (1 to 63).
    pub fn new(id: i64) -> Option<NodeId> {
        u8::try_from(id).ok().filter(|id| (1..=Self::MAX.0).contains(id)).map(NodeId)
    }
}

/// Version of a written row: 42 bits of milliseconds since 2024-01-01 UTC, 16 bits of counter, 6 bits of node.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hlc(pub u64);

/// Commit HLC of a transaction, same layout as [`Hlc`], never compared with one.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position(pub u64);

/// A position with its low mark: every version at or below `low` belongs to a transaction whose
/// position is at or below `position`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub position: Position,
    pub low: Hlc,
}

/// Text that is not the text form of a version or a position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a version: expected a form like 2026-11-23 15:45:12.345Z/17@1")]
pub struct ParseError;

macro_rules! parts {
    ($type:ident) => {
        impl $type {
            /// The value of these parts; `None` if the time is before 2024 or after 2163, or the node above 63.
            pub fn from_parts(unix_ms: i64, counter: u16, node: NodeId) -> Option<$type> {
                let ms = u64::try_from(unix_ms.checked_sub(EPOCH_UNIX_MS)?).ok()?;
                (ms <= MILLIS_MAX && node <= NodeId::MAX).then(|| $type(pack(ms, counter) | u64::from(node.0)))
            }
            /// Milliseconds since the Unix epoch.
            pub fn unix_millis(self) -> i64 {
                (self.0 >> MILLIS_SHIFT) as i64 + EPOCH_UNIX_MS
            }
            /// The counter within the millisecond.
            pub fn counter(self) -> u16 {
                (self.0 >> COUNTER_SHIFT) as u16
            }
            /// The node that took it; `NodeId(0)` for 0.
            pub fn node(self) -> NodeId {
                NodeId((self.0 & NODE_MASK) as u8)
            }
            /// True for 0: "before pairing", or forgotten.
            pub fn is_zero(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format(self.0, f)
            }
        }

        impl FromStr for $type {
            type Err = ParseError;
            /// Reads the text form, and only that: what parses prints as it was.
            fn from_str(text: &str) -> Result<$type, ParseError> {
                if text == "0" {
                    return Ok($type(0));
                }
                parse(text).map($type).filter(|value| value.to_string() == text).ok_or(ParseError)
            }
        }
    };
}

parts!(Hlc);
parts!(Position);

/// Milliseconds since 2024 and counter in their places, node bits 0.
pub(crate) fn pack(ms: u64, counter: u16) -> u64 {
    (ms << MILLIS_SHIFT) | (u64::from(counter) << COUNTER_SHIFT)
}

const MS_PER_DAY: i64 = 86_400_000;

fn format(raw: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if raw == 0 {
        return f.write_str("0");
    }
    let hlc = Hlc(raw);
    let ms = hlc.unix_millis();
    let (year, month, day) = civil_from_days(ms.div_euclid(MS_PER_DAY));
    let time = ms.rem_euclid(MS_PER_DAY);
    let (hour, minute, second, milli) = (time / 3_600_000, time / 60_000 % 60, time / 1_000 % 60, time % 1_000);
    let (counter, node) = (hlc.counter(), hlc.node().0);
    write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{milli:03}Z/{counter}@{node}")
}

/// The value of a text of about the right form; the caller compares it with what it prints as.
fn parse(text: &str) -> Option<u64> {
    let (time, rest) = text.split_once("Z/")?;
    let (counter, node) = rest.split_once('@')?;
    let mut numbers = time.split(['-', ' ', ':', '.']).map(|n| n.parse::<i64>().ok());
    let mut next = |range: std::ops::RangeInclusive<i64>| numbers.next().flatten().filter(|n| range.contains(n));
    let days = days_from_civil(next(2024..=2199)?, next(1..=12)?, next(1..=31)?);
    let (hour, minute, second, milli) = (next(0..=23)?, next(0..=59)?, next(0..=59)?, next(0..=999)?);
    let ms = days * MS_PER_DAY + hour * 3_600_000 + minute * 60_000 + second * 1_000 + milli;
    Hlc::from_parts(ms, counter.parse().ok()?, NodeId(node.parse().ok()?)).map(|hlc| hlc.0)
}

/// Days since 1970-01-01 to (year, month, day), proleptic Gregorian; years count from March here.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, date)
}

/// The reverse of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, date: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
    let month = (month + 9) % 12;
    let day = (153 * month + 2) / 5 + date - 1;
    era * 146_097 + year * 365 + year / 4 - year / 100 + day - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_is_the_documented_one() {
        let hlc = Hlc::from_parts(1_795_448_712_345, 17, NodeId(1)).unwrap();
        assert_eq!(hlc.to_string(), "2026-11-23 15:45:12.345Z/17@1");
        assert_eq!("2026-11-23 15:45:12.345Z/17@1".parse(), Ok(hlc));
        assert_eq!((hlc.unix_millis(), hlc.counter(), hlc.node()), (1_795_448_712_345, 17, NodeId(1)));
        assert_eq!(Hlc(0).to_string(), "0");
        assert_eq!("0".parse(), Ok(Position(0)));
        assert_eq!(Position(u64::MAX).to_string(), "2163-05-15 07:35:11.103Z/65535@63");
    }

    #[test]
    fn only_the_text_form_parses() {
        for bad in [
            "",
            "1",
            "00",
            " 0",
            "2026-11-23",
            "2026-11-23 15:45:12.345Z/17",
            "2026-11-23 15:45:12.345Z/17@64",
            "2026-11-23 15:45:12.345Z/65536@1",
            "2026-02-30 15:45:12.345Z/17@1",
            "2026-11-23 24:45:12.345Z/17@1",
            "2026-11-23 15:45:12.345Z/017@1",
            "2026-11-23 15:45:12.345Z/17@+1",
            "2026/11/23 15:45:12.345Z/17@1",
            "2023-12-31 23:59:59.999Z/0@1",
            "2024-01-01 00:00:00.000Z/0@0",
            "9999999999-11-23 15:45:12.345Z/17@1",
            "2026-11-23 15:45:12.345Z/17@1 ",
            "2026-11-23 15:45:12.3.4Z/17@1",
            "2163-05-15 07:35:11.104Z/0@1",
        ] {
            assert_eq!(bad.parse::<Hlc>(), Err(ParseError), "{bad}");
        }
    }

    #[test]
    fn every_day_has_its_date() {
        let (mut year, mut month, mut date) = (1970, 1, 1);
        for days in 0..80_000 {
            assert_eq!(civil_from_days(days), (year, month, date));
            assert_eq!(days_from_civil(year, month, date), days);
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + i64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (date, month) = if date < length { (date + 1, month) } else { (1, month + 1) };
            (month, year) = if month < 13 { (month, year) } else { (1, year + 1) };
        }
    }

    #[test]
    fn parts_out_of_range_are_none() {
        assert_eq!(Hlc::from_parts(EPOCH_UNIX_MS - 1, 0, NodeId(1)), None);
        assert_eq!(Hlc::from_parts(i64::MIN, 0, NodeId(1)), None);
        assert_eq!(Hlc::from_parts(EPOCH_UNIX_MS + (1 << 42), 0, NodeId(1)), None);
        assert_eq!(Hlc::from_parts(EPOCH_UNIX_MS, 0, NodeId(64)), None);
        assert_eq!((NodeId::new(0), NodeId::new(63), NodeId::new(64)), (None, Some(NodeId(63)), None));
    }

    proptest::proptest! {
        #[test]
        fn every_value_prints_and_parses_back(raw: u64) {
            proptest::prop_assert_eq!(Hlc(raw).to_string().parse(), Ok(Hlc(raw)));
            let hlc = Hlc(raw);
            proptest::prop_assert_eq!(Hlc::from_parts(hlc.unix_millis(), hlc.counter(), hlc.node()), Some(hlc));
        }

        #[test]
        fn any_text_parses_or_not(text in ".{0,40}") {
            let _ = text.parse::<Hlc>();
        }
    }
}
