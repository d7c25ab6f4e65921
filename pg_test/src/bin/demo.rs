//! `make demo`: two servers, both written to, kept in sync; a line that is cut and healed; a conflict
//! and its resolution. Exits with 0 if both databases are equal in the end.
//!
//! `KEEP=1` leaves the pair running. `SECONDS_OF_LOAD` (10) and `SCALE` (1) size the load.

use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tandem_pg_test::proxy::{Line, Proxy};
use tandem_pg_test::{Client, Node, Pair, tick, tpcb};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [line, ports @ ..] = arguments.as_slice()
        && line == "line"
    {
        keep_line(ports);
        return ExitCode::SUCCESS;
    }
    let keep = std::env::var("KEEP").is_ok_and(|keep| !keep.is_empty() && keep != "0");

    let pair = start(keep);
    load(&pair);
    let conflict = disagree(&pair);
    resolve(&pair, &conflict);
    let equal = compare(&pair);
    if keep {
        leave_running(pair);
    }
    if equal {
        say("Both databases are equal.");
        ExitCode::SUCCESS
    } else {
        say("The databases differ!");
        ExitCode::FAILURE
    }
}

fn start(keep: bool) -> Pair {
    chapter("Two servers");
    let pair = Pair::builder().kept(keep).unconnected().start();
    for node in pair.nodes() {
        let server = &node.cluster;
        say(&format!("{}: {}, port {}", node.name.to_uppercase(), server.installation.version, server.port()));
    }
    let scale = setting("SCALE", 1);
    say(&format!("pgbench -i -s {scale} on both, and one table of our own; then:"));
    for node in pair.nodes() {
        tpcb::init(node, scale);
        node.exec("create table customers (id int primary key, name text, email text, credit numeric)");
    }
    both(&pair, "select tandem.add_tables_in_schema('public')");
    for (node, peer) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        run(node, &format!("select tandem.add_peer('{}', '{}')", peer.name, peer.conninfo_for_peer()));
    }
    pair.wait_streaming();
    for table in tpcb::TABLES {
        pair.wait_active(table);
    }
    pair.wait_active("customers");
    show(&pair.a, "select relation, state from tandem.tables order by 1");
    pair
}

fn load(pair: &Pair) {
    let seconds = setting("SECONDS_OF_LOAD", 10);
    chapter(&format!("TPC-B on both at once, {seconds} s"));
    let runs = pair.nodes().map(|node| tpcb::start(node, 2, seconds));
    let names = ["A", "B"];
    for (run, name) in runs.into_iter().zip(names) {
        let report = run.wait();
        say(&format!("{name}: {} transactions, {:.0} a second", report.transactions, report.tps));
    }
    let start = Instant::now();
    pair.sync();
    say(&format!("Everything was on both {:.1} s later.", start.elapsed().as_secs_f64()));
    show(&pair.a, "select relation, conflict_type, count(*) from tandem.conflicts group by 1, 2 order by 1, 2");
    say("Branches and tellers are updated on both sides all the time: each lost balance is in the history.");
}

/// Cuts the line, lets both sides change the same rows, and heals it. Returns the conflict.
fn disagree(pair: &Pair) -> String {
    chapter("The line is cut");
    run(&pair.a, "insert into customers values (1, 'Ada', 'ada@example.com', 100), (2, 'Bo', 'bo@example.com', 100)");
    pair.sync();
    pair.set_lines(Line::Cut);
    for node in pair.nodes() {
        node.wait_state("connecting");
    }
    show(&pair.a, "select peer, state, reason from tandem.status");
    say("Both sides go on writing:");
    run(&pair.a, "update customers set email = 'ada@new.example' where id = 1");
    run(&pair.b, "update customers set name = 'Ada L.' where id = 1");
    run(&pair.a, "update customers set credit = 70 where id = 2");
    tick();
    run(&pair.b, "update customers set credit = 50 where id = 2");

    chapter("The line is healed");
    pair.heal();
    show(&pair.a, "select peer, state, reason from tandem.status");
    say("Changes of different columns are merged; where both changed the same one, the later write shows:");
    show(&pair.a, "select id, name, email, credit from customers order by id");
    say("The other one is not lost. On A, and mirrored on B:");
    let condition = "relation = 'customers'::regclass";
    for node in pair.nodes() {
        show(
            node,
            &format!(
                "select conflict_type, key_tuple as key, base_tuple->'credit' as base, local_tuple->'credit' as local,
                        remote_tuple->'credit' as remote, result_tuple->'credit' as result, status
                 from tandem.conflicts where {condition}"
            ),
        );
    }
    pair.a.one(&format!("select conflict_id from tandem.conflicts where {condition}"))
}

fn resolve(pair: &Pair, conflict: &str) {
    chapter("A person decides");
    show(&pair.a, &format!("select * from tandem.show_conflict('{conflict}')"));
    run(
        &pair.a,
        &format!(
            "select tandem.resolve('{conflict}', with_tuple => '{{\"credit\": 20}}', note => 'both withdrawals happened')"
        ),
    );
    pair.sync();
    say("The decision is a write like any other; B has it too:");
    show(&pair.b, "select id, name, email, credit from customers order by id");
    show(
        &pair.b,
        &format!(
            "select status, conflict_resolution, resolved_by, note from tandem.conflicts where conflict_id = '{conflict}'"
        ),
    );
}

/// Compares every table, versions included.
fn compare(pair: &Pair) -> bool {
    chapter("Are they equal?");
    let mut equal = true;
    for table in tpcb::TABLES.into_iter().chain(["customers"]) {
        let query = format!(
            "select count(*), coalesce(sum(hashtextextended((to_jsonb(t) - '_cells')::text, 0)), 0) from {table} t"
        );
        let (on_a, on_b) = (pair.a.rows(&query), pair.b.rows(&query));
        let same = on_a == on_b;
        equal &= same;
        let rows = on_a[0].split('|').next().unwrap_or_default().to_string();
        say(&format!("{table:<18} {rows:>8} rows  {}", if same { "equal" } else { "DIFFERENT" }));
    }
    let history =
        "select count(*), md5(string_agg(conflict_id || status, ',' order by conflict_id)) from tandem.conflicts";
    let same = pair.a.rows(history) == pair.b.rows(history);
    say(&format!("the conflict history is {} on both", if same { "the same" } else { "NOT the same" }));
    equal && same
}

/// The servers live on; the lines between them move into a process of their own.
#[expect(clippy::zombie_processes, reason = "it outlives this process, on purpose")]
fn leave_running(pair: Pair) {
    chapter("The pair is left running");
    let mut line = Command::new(std::env::current_exe().expect("this program"));
    line.arg("line").process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    for node in pair.nodes() {
        line.arg(node.line.port().to_string()).arg(node.cluster.port().to_string());
        let psql = node.cluster.installation.bindir.join("psql");
        say(&format!("{}: {} '{}'", node.name.to_uppercase(), psql.display(), node.cluster.conninfo("app")));
    }
    let pids = pair.nodes().map(|node| node.cluster.pid().map_or_else(String::new, |pid| pid.to_string()));
    let dirs = pair.nodes().map(|node| node.cluster.dir().display().to_string());
    drop(pair);
    line.spawn().expect("the lines start");
    say(&format!("To stop it: kill {}; rm -r {}", pids.join(" "), dirs.join(" ")));
}

/// What `demo line PORT SERVER PORT SERVER` does: passes traffic until both servers are gone.
fn keep_line(ports: &[String]) {
    let ports: Vec<u16> = ports.iter().filter_map(|port| port.parse().ok()).collect();
    let ends: Vec<(u16, u16)> = ports.chunks_exact(2).map(|ends| (ends[0], ends[1])).collect();
    // The ports are those of the proxies that just ended.
    let is_free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    while !ends.iter().all(|(port, _)| is_free(*port)) {
        thread::sleep(Duration::from_millis(50));
    }
    let _lines: Vec<Proxy> = ends.iter().map(|(port, server)| Proxy::start(*port, *server)).collect();
    let is_there = |server: u16| std::net::TcpStream::connect(("127.0.0.1", server)).is_ok();
    while ends.iter().any(|(_, server)| is_there(*server)) {
        thread::sleep(Duration::from_secs(5));
    }
}

fn both(pair: &Pair, sql: &str) {
    quote("A, B", sql);
    pair.exec(sql);
}

fn run(node: &Node, sql: &str) {
    quote(&node.name.to_uppercase(), sql);
    node.exec(sql);
}

fn show(node: &Node, sql: &str) {
    quote(&node.name.to_uppercase(), sql);
    let mut client: Client = node.session();
    match client.table(sql) {
        Ok(table) => println!("{}", indented(&table)),
        Err(failure) => panic!("{failure}\n  query: {sql}"),
    }
}

fn chapter(title: &str) {
    if std::io::stdout().is_terminal() {
        println!("\n\x1b[1;34m── {title} ──\x1b[0m");
    } else {
        println!("\n── {title} ──");
    }
}

fn say(text: &str) {
    println!("{text}");
}

fn quote(place: &str, sql: &str) {
    let words: Vec<&str> = sql.split_whitespace().collect();
    println!("  {place}> {};", words.join(" "));
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}
