//! pgbench's TPC-B on one node or both. Any installation's pgbench serves: not every package has one.
//!
//! [`start_logged`] runs the same transactions with a log of every balance that was written and of what it
//! replaced, for [`crate::ledger`] to audit.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::ledger::{Ledger, Loss, Write};
use crate::node::{DATABASE, Node};
use crate::pair::Pair;
use crate::postgres::{Installation, as_server};

/// The tables of TPC-B.
pub const TABLES: [&str; 4] = ["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"];

/// Tables that hold balances: name, key, balance.
pub const BALANCES: [(&str, &str, &str); 3] = [
    ("pgbench_accounts", "aid", "abalance"),
    ("pgbench_tellers", "tid", "tbalance"),
    ("pgbench_branches", "bid", "bbalance"),
];

/// What pgbench said at the end.
#[derive(Clone, Debug)]
pub struct Report {
    /// Transactions that were committed.
    pub transactions: u64,
    /// Transactions a second, without the time to connect.
    pub tps: f64,
}

/// A run under way.
pub struct Run {
    child: Child,
}

/// Creates and fills the tables, each with a key; the content is the same whoever does it.
pub fn init(node: &Node, scale: u32) {
    let scale = scale.to_string();
    let mut command = pgbench(node);
    command.args(["-i", "-q", "-s", &scale]).arg(DATABASE);
    finish(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pgbench starts"));
    node.exec("alter table pgbench_history add column id uuid primary key default gen_random_uuid()");
}

/// Starts the TPC-B-like transactions; [`Run::wait`] for them.
pub fn start(node: &Node, clients: u32, seconds: u32) -> Run {
    run(node, clients, seconds, &[])
}

/// The same transactions, and a row in `tpcb.log` of this node for each balance written, with the version and
/// the balance that it replaced: what the writer had seen, since it holds the row's lock when it looks.
pub fn start_logged(node: &Node, scale: u32, clients: u32, seconds: u32) -> Run {
    node.exec(
        "drop schema if exists tpcb cascade; create schema tpcb;
         create unlogged table tpcb.log (relation text, id int8, seen int8, old int8, version int8, balance int8)",
    );
    let mut script = String::from(
        "\\set aid random(1, 100000 * :scale)\n\\set bid random(1, 1 * :scale)\n\\set tid random(1, 10 * :scale)\n\
         \\set delta random(-5000, 5000)\nbegin;\n",
    );
    for (table, key, balance) in BALANCES {
        script += &format!(
            "with seen as (select {key}, {balance}, _hlc from {table} where {key} = :{key} for no key update), \
             wrote as (update {table} t set {balance} = seen.{balance} + :delta from seen where t.{key} = seen.{key} \
             returning t.{key}, seen._hlc::int8, seen.{balance}, t._hlc::int8, t.{balance}) \
             insert into tpcb.log select '{table}', * from wrote;\n"
        );
    }
    script += "insert into pgbench_history (tid, bid, aid, delta, mtime) \
               values (:tid, :bid, :aid, :delta, current_timestamp);\nend;\n";
    let path = node.cluster.dir().join("tpcb.sql");
    fs::write(&path, script).expect("the script can be written");
    run(node, clients, seconds, &["-D", &format!("scale={scale}"), "-f", &path.display().to_string()])
}

fn run(node: &Node, clients: u32, seconds: u32, options: &[&str]) -> Run {
    let (clients, seconds) = (clients.to_string(), seconds.to_string());
    let mut command = pgbench(node);
    command.args(["-n", "-c", &clients, "-j", &clients, "-T", &seconds]).args(options).arg(DATABASE);
    Run { child: command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pgbench starts") }
}

/// What both nodes logged, what the tables hold, and the conflict history; all of it from after [`Pair::sync`].
/// Tables and history are taken from A: compare them before.
pub fn ledger(pair: &Pair) -> Ledger {
    let mut ledger = Ledger::default();
    for node in pair.nodes() {
        for row in node.rows("select relation, id, seen, old, version, balance from tpcb.log") {
            let (place, [seen, old, version, balance]) = parse(&row);
            let write = Write {
                node: node.id,
                seen: (unsigned(seen), value(old)),
                version: unsigned(version),
                balance: value(balance),
            };
            ledger.write(place, write);
        }
    }
    for row in pair.a.rows(&losses()) {
        let (place, [losing, winning, balance, ..]) = parse(&row);
        ledger.loss(place, Loss { losing: unsigned(losing), winning: unsigned(winning), balance });
    }
    for (table, key, balance) in BALANCES {
        for row in pair.a.rows(&format!("select '{table}', {key}, _hlc::int8, {balance} from {table}")) {
            let (place, [version, balance, ..]) = parse(&row);
            ledger.last(place, unsigned(version), value(balance));
        }
    }
    ledger
}

/// The conflicts about balances: whose it was, the versions, and the losing balance; the same on both nodes.
pub fn losses() -> String {
    let parts = BALANCES.map(|(table, key, balance)| {
        format!(
            "select '{table}', key_tuple->>'{key}', losing_version::int8, winning_version::int8,
                    case losing_node when local_node then local_tuple else remote_tuple end ->>'{balance}', conflict_id
             from tandem.conflicts where relation = '{table}'::regclass"
        )
    });
    parts.join(" union all ") + " order by conflict_id"
}

/// Table, key, and up to four numbers of a row of text.
fn parse(row: &str) -> ((String, i64), [Option<i64>; 4]) {
    let mut columns = row.split('|');
    let table = columns.next().unwrap_or_default().to_string();
    let mut number = || columns.next().and_then(|text| text.parse().ok());
    let id = number().unwrap_or_else(|| panic!("no key in {row:?}"));
    ((table, id), [number(), number(), number(), number()])
}

fn value(number: Option<i64>) -> i64 {
    number.expect("it is not null")
}

fn unsigned(version: Option<i64>) -> u64 {
    value(version).cast_unsigned()
}

impl Run {
    /// Waits for the end; panics if pgbench failed.
    pub fn wait(self) -> Report {
        let output = finish(self.child);
        let after = |what: &str| {
            let line = output.lines().find(|line| line.starts_with(what));
            let line = line.unwrap_or_else(|| panic!("pgbench says nothing of {what:?}:\n{output}"));
            let number = line[what.len()..].trim().split(|c: char| !(c.is_ascii_digit() || c == '.'));
            number.into_iter().next().unwrap_or_default().to_string()
        };
        Report {
            transactions: after("number of transactions actually processed:").parse().expect("a count"),
            tps: after("tps =").parse().expect("a rate"),
        }
    }
}

fn finish(child: Child) -> String {
    let output = child.wait_with_output().expect("pgbench ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "pgbench failed:\n{}", text(&output.stderr));
    text(&output.stdout)
}

fn pgbench(node: &Node) -> Command {
    let mut command = Command::new(program());
    as_server(&mut command);
    let port = node.cluster.port().to_string();
    command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port]);
    command
}

fn program() -> PathBuf {
    let installations = [Installation::a(), Installation::b()].into_iter().chain(Installation::all());
    installations
        .map(|installation| installation.bindir.join("pgbench"))
        .chain([PathBuf::from("/usr/bin/pgbench")])
        .find(|program| program.exists())
        .expect("some installation has pgbench")
}
