//! TPC-B on both nodes at once, and an audit of every balance that was written:
//! `cargo run -p tandem-pg-test --bin tpcb`. With the argument `plain`, pgbench's own script, without the log; with
//! `counter`, the same with the balances as counters: their sums must be what the history adds up to.
//!
//! `SCALE` (10), `CLIENTS` (2) on each node and `SECONDS_OF_LOAD` (60) size it. Exits with 0 if both databases
//! are equal, and every balance that isn't there any more was seen by its successor or is on record.

use std::process::ExitCode;
use std::time::Instant;

use tandem_pg_test::ledger::Ledger;
use tandem_pg_test::{Pair, tpcb};

fn main() -> ExitCode {
    let argument = std::env::args().nth(1).unwrap_or_default();
    let counter = argument == "counter";
    let plain = counter || argument == "plain";
    let scale = setting("SCALE", 10);
    let pair = Pair::builder().unconnected().start();
    for node in pair.nodes() {
        tpcb::init(node, scale);
    }
    pair.exec("select tandem.add_tables_in_schema('public')");
    if counter {
        for (table, _, balance) in tpcb::BALANCES {
            pair.exec(&format!("select tandem.set_policy('{table}', 'counter', columns => '{{{balance}}}')"));
        }
    }
    pair.connect();
    for table in tpcb::TABLES {
        pair.wait_active(table);
    }

    load(&pair, scale, plain);
    let mut good = compare(&pair);
    let agree = sums(&pair);
    if counter {
        good &= agree;
    }
    if !plain {
        good &= audit(&pair, &tpcb::ledger(&pair));
    }
    println!("{}", if good { "As it should be." } else { "NOT as it should be." });
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn load(pair: &Pair, scale: u32, plain: bool) {
    let (clients, seconds) = (setting("CLIENTS", 2), setting("SECONDS_OF_LOAD", 60));
    println!("TPC-B on both, scale {scale}, {clients} clients each, {seconds} s");
    let runs = pair.nodes().map(|node| match plain {
        true => tpcb::start(node, clients, seconds),
        false => tpcb::start_logged(node, scale, clients, seconds),
    });
    for (run, node) in runs.into_iter().zip(pair.nodes()) {
        let report = run.wait();
        println!("  {}: {} transactions, {:.0} a second", node.name, report.transactions, report.tps);
    }
    let start = Instant::now();
    pair.sync();
    println!("  everything was on both {:.1} s later", start.elapsed().as_secs_f64());
}

/// Rows with their versions, and the history with its values.
fn compare(pair: &Pair) -> bool {
    println!("Compared");
    let mut equal = true;
    for table in tpcb::TABLES {
        let query = format!("select count(*), sum(hashtextextended((to_jsonb(t) - '_cells')::text, 0)) from {table} t");
        let (on_a, on_b) = (pair.a.rows(&query), pair.b.rows(&query));
        equal &= on_a == on_b;
        let rows = on_a[0].split('|').next().unwrap_or_default();
        println!("  {table:<18} {rows:>8} rows  {}", if on_a == on_b { "equal" } else { "DIFFERENT" });
    }
    let (on_a, on_b) = (pair.a.rows(&tpcb::losses()), pair.b.rows(&tpcb::losses()));
    equal &= on_a == on_b;
    println!(
        "  {:<18} {:>8} rows  {}",
        "conflicts",
        on_a.len(),
        if on_a == on_b { "the same" } else { "NOT the same" }
    );
    for row in pair.a.rows("select relation, conflict_type, count(*) from tandem.conflicts group by 1, 2 order by 1, 2")
    {
        println!("    {row}");
    }
    equal
}

/// True if all balances add up to the history, on both nodes.
fn sums(pair: &Pair) -> bool {
    println!("Sums");
    let mut agree = true;
    let history = pair.a.number("select sum(delta) from pgbench_history");
    println!("  all that was added (history) {history}");
    for (table, _, balance) in tpcb::BALANCES {
        let sum = pair.a.number(&format!("select sum({balance}) from {table}"));
        println!("  {table:<28} {sum:>8}  ({} from it)", sum - history);
        agree &= sum == history && sum == pair.b.number(&format!("select sum({balance}) from {table}"));
    }
    agree
}

fn audit(pair: &Pair, ledger: &Ledger) -> bool {
    println!("Every balance that was written ({} changed nothing)", ledger.idle());
    let mut good = true;
    let history = pair.a.number("select sum(delta) from pgbench_history");
    for (table, ..) in tpcb::BALANCES {
        let outcome = ledger.audit(table);
        println!(
            "  {table:<18} {} writes: {} show, {} were replaced by who had seen them, {} were lost and are on record, \
             {} alike on both sides, {} lost without a record",
            outcome.writes,
            outcome.last,
            outcome.replaced,
            outcome.recorded,
            outcome.alike,
            outcome.writes - outcome.last - outcome.replaced - outcome.recorded - outcome.alike
        );
        println!(
            "  {:<18} added {}, of that {} in no present balance; sum {}",
            "", outcome.added, outcome.missing, outcome.sum
        );
        // Two independent accounts of the same: what is not missing is there, and pgbench's own history agrees.
        let adds_up = outcome.added - outcome.missing == outcome.sum && outcome.added == history;
        if !adds_up {
            println!("  {:<18} DOES NOT ADD UP: the history says {history}", "");
        }
        for fault in outcome.faults.iter().take(20) {
            println!("  FAULT {fault}");
        }
        good &= adds_up && outcome.faults.is_empty();
    }
    good
}

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}
