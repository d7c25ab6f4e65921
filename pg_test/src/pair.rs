//! Two nodes that are kept in sync, each reaching the other through a proxy.

use crate::conflict::{self, Expected, Record};
use crate::node::Node;
use crate::postgres::Installation;
use crate::proxy::Line;
use crate::wait::until;

/// The pair. Dropping it stops both servers.
pub struct Pair {
    pub a: Node,
    pub b: Node,
}

/// What a pair is to be like.
pub struct Builder {
    installations: [Installation; 2],
    settings: [Vec<String>; 2],
    connected: bool,
    kept: bool,
}

impl Pair {
    /// A pair of the chosen versions, connected and streaming.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "starting two servers is no default")]
    pub fn new() -> Pair {
        Pair::builder().start()
    }

    /// A pair to be described first.
    pub fn builder() -> Builder {
        Builder {
            installations: [Installation::a(), Installation::b()],
            settings: [Vec::new(), Vec::new()],
            connected: true,
            kept: false,
        }
    }

    /// Both nodes, A first.
    pub fn nodes(&self) -> [&Node; 2] {
        [&self.a, &self.b]
    }

    /// Runs the same statements on both.
    #[track_caller]
    pub fn exec(&self, sql: &str) {
        self.a.exec(sql);
        self.b.exec(sql);
    }

    /// Makes each node the other's peer, and waits until both stream.
    #[track_caller]
    pub fn connect(&self) {
        for (node, peer) in [(&self.a, &self.b), (&self.b, &self.a)] {
            node.exec(&format!("select tandem.add_peer('{}', '{}')", peer.name, peer.conninfo_for_peer()));
        }
        self.wait_streaming();
    }

    /// Waits until both exchanges are in the state `streaming`.
    #[track_caller]
    pub fn wait_streaming(&self) {
        for node in self.nodes() {
            node.wait_state("streaming");
        }
    }

    /// Creates a table on both nodes, adds it on both, and waits until it is active.
    #[track_caller]
    pub fn table(&self, name: &str, columns: &str) {
        self.table_with(name, columns, "");
    }

    /// [`table`](Self::table) with further arguments of `add_table`: `", granularity => 'row'"`.
    #[track_caller]
    pub fn table_with(&self, name: &str, columns: &str, options: &str) {
        self.exec(&format!("create table {name} ({columns})"));
        self.add_table(name, options);
    }

    /// Adds a table that exists on both nodes, and waits until it is active.
    #[track_caller]
    pub fn add_table(&self, name: &str, options: &str) {
        self.exec(&format!("select tandem.add_table('{name}'{options})"));
        self.wait_active(name);
    }

    /// Waits until a table is active on both nodes.
    #[track_caller]
    pub fn wait_active(&self, name: &str) {
        for node in self.nodes() {
            node.wait_table(name, "active");
        }
    }

    /// Waits until everything committed so far on either node is visible on the other.
    #[track_caller]
    pub fn sync(&self) {
        // Twice: what is applied may lead to writes that go back.
        for node in [&self.a, &self.b, &self.a, &self.b] {
            match node.try_one("select tandem.wait_for_peer('60s')") {
                Ok(answer) if answer == "t" => {}
                answer => panic!("{}: waiting for the peer: {answer:?}\n{}", node.name, self.report()),
            }
        }
    }

    /// Nothing passes between the nodes until [`heal`](Self::heal); both go on writing.
    pub fn partition(&self) {
        self.set_lines(Line::Stalled);
    }

    pub fn set_lines(&self, line: Line) {
        self.a.line.set(line);
        self.b.line.set(line);
    }

    /// The lines are whole again; doesn't wait for anything.
    pub fn heal_lines(&self) {
        self.a.line.heal();
        self.b.line.heal();
    }

    /// The lines are whole again; returns when everything has been exchanged.
    #[track_caller]
    pub fn heal(&self) {
        self.heal_lines();
        self.wait_streaming();
        self.sync();
    }

    /// The table holds the same rows, with the same versions, on both nodes.
    #[track_caller]
    pub fn assert_converged(&self, table: &str) {
        if let Err(difference) = self.compare(table) {
            panic!("{difference}\n{}", self.report());
        }
    }

    /// How a table differs between the nodes.
    #[track_caller]
    pub fn compare(&self, table: &str) -> Result<(), String> {
        let columns = self.a.one(&format!(
            "select string_agg(quote_ident(attname) || '::text', ', ' order by attnum) from pg_attribute
             where attrelid = '{table}'::regclass and attnum > 0 and not attisdropped and attname <> '_cells'"
        ));
        let key = self.a.one(&format!(
            "select coalesce(string_agg(quote_ident(attname), ', ' order by attnum), '1') from pg_index
             join pg_attribute on attrelid = indrelid and attnum = any(indkey)
             where indrelid = '{table}'::regclass and indisprimary"
        ));
        let query = format!("select {columns} from {table} order by {key}");
        let (on_a, on_b) = (self.a.rows(&query), self.b.rows(&query));
        if on_a == on_b {
            return Ok(());
        }
        Err(format!("{table} differs ({columns}):\n{}", difference(&on_a, &on_b)))
    }

    /// The table holds exactly these rows (columns joined by `|`) on both nodes, and has converged.
    #[track_caller]
    pub fn assert_rows(&self, query: &str, expected: &[&str]) {
        for node in self.nodes() {
            assert_eq!(node.rows(query), expected, "on {}: {query}", node.name);
        }
    }

    /// The history of a table is the same on both nodes, mirrored, and is exactly this.
    #[track_caller]
    pub fn assert_conflicts(&self, table: &str, expected: &[Expected]) {
        let (on_a, on_b) = (self.a.conflicts(table), self.b.conflicts(table));
        if let Err(faults) = conflict::check(&on_a, &on_b, expected) {
            panic!("the conflicts of {table} are not as expected:\n{faults}");
        }
    }

    /// Nothing goes on any more: neither node writes anything once everything is exchanged.
    #[track_caller]
    pub fn assert_quiet(&self) {
        self.sync();
        let positions = || self.nodes().map(|node| node.one("select pg_current_wal_insert_lsn()"));
        until("both nodes to come to rest", || {
            let before = positions();
            // The time over which rest is observed, not a wait for something to happen.
            std::thread::sleep(std::time::Duration::from_secs(1));
            let after = positions();
            if before == after { Ok(()) } else { Err(format!("{before:?} became {after:?}")) }
        });
    }

    /// The history of a table as A has it, after checking that B's mirrors it.
    #[track_caller]
    pub fn history(&self, table: &str) -> Vec<Record> {
        let (on_a, on_b) = (self.a.conflicts(table), self.b.conflicts(table));
        if let Err(faults) = conflict::check_same(&on_a, &on_b) {
            panic!("the histories of {table} differ:\n{faults}");
        }
        on_a
    }

    /// What both nodes say of themselves, for a panic.
    pub fn report(&self) -> String {
        self.nodes().map(Node::report).join("\n")
    }
}

impl Builder {
    /// Other installations than the chosen ones.
    pub fn versions(mut self, a: Installation, b: Installation) -> Builder {
        self.installations = [a, b];
        self
    }

    /// Lines of postgresql.conf for both.
    pub fn settings(mut self, lines: &[&str]) -> Builder {
        for settings in &mut self.settings {
            settings.extend(lines.iter().map(ToString::to_string));
        }
        self
    }

    /// Two nodes that don't know of each other yet.
    pub fn unconnected(mut self) -> Builder {
        self.connected = false;
        self
    }

    /// The servers go on running when this process ends.
    pub fn kept(mut self, kept: bool) -> Builder {
        self.kept = kept;
        self
    }

    /// Starts both servers.
    #[track_caller]
    pub fn start(self) -> Pair {
        let [a, b] = &self.installations;
        let pair = Pair {
            a: Node::start(a, "a", 1, &self.settings[0], self.kept),
            b: Node::start(b, "b", 2, &self.settings[1], self.kept),
        };
        if self.connected {
            pair.connect();
        }
        pair
    }
}

/// The rows that only one side has.
fn difference(on_a: &[String], on_b: &[String]) -> String {
    const SHOWN: usize = 20;
    let only = |these: &[String], those: &[String], name: &str| {
        let those: std::collections::HashSet<&String> = those.iter().collect();
        let only: Vec<&String> = these.iter().filter(|row| !those.contains(row)).collect();
        let mut text = format!("{} rows on {name}, {} of them only there:", these.len(), only.len());
        for row in only.iter().take(SHOWN) {
            text.push_str(&format!("\n  {row}"));
        }
        text
    };
    only(on_a, on_b, "A") + "\n" + &only(on_b, on_a, "B")
}
