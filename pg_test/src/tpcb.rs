//! pgbench's TPC-B on one node or both. Any installation's pgbench serves: not every package has one.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::node::{DATABASE, Node};
use crate::postgres::{Installation, as_server};

/// The tables of TPC-B.
pub const TABLES: [&str; 4] = ["pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"];

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
    let (clients, seconds) = (clients.to_string(), seconds.to_string());
    let mut command = pgbench(node);
    command.args(["-n", "-c", &clients, "-j", &clients, "-T", &seconds]).arg(DATABASE);
    Run { child: command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pgbench starts") }
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
