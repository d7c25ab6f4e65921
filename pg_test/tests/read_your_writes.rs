//! Scenario 85: what was written on one node can be waited for on the other.

use std::time::{Duration, Instant};

use tandem_pg_test::shared;

#[test]
fn s85_wait_for_shows_the_write() {
    let pair = shared();
    pair.table("s85", "id int primary key, n int");
    pair.a.exec("insert into s85 values (1, 0)");
    let (mut writer, mut reader) = (pair.a.session(), pair.b.session());
    for n in 1..=50 {
        writer.exec(&format!("update s85 set n = {n}"));
        let position = writer.one("select tandem.last_position()");
        assert!(reader.is_true(&format!("select tandem.wait_for('{position}', '30s')")));
        let seen: i32 = reader.query_one("select n from s85");
        assert_eq!(seen, n);
    }
}

#[test]
fn s85_wait_for_gives_up_in_time() {
    let pair = shared();
    pair.table("s85_late", "id int primary key");
    pair.sync();
    pair.b.exec("select tandem.pause()");
    pair.b.wait_state("paused");
    let mut writer = pair.a.session();
    writer.exec("insert into s85_late values (1)");
    let position = writer.one("select tandem.last_position()");
    let start = Instant::now();
    assert!(!pair.b.is_true(&format!("select tandem.wait_for('{position}', '500ms')")));
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(450) && waited < Duration::from_secs(5), "{waited:?}");
    assert!(!pair.a.is_true("select tandem.wait_for_peer('200ms')"));
    assert_eq!(pair.b.rows("select count(*) from s85_late"), ["0"]);
    pair.b.exec("select tandem.resume()");
    assert!(pair.b.is_true(&format!("select tandem.wait_for('{position}', '30s')")));
    assert_eq!(pair.b.rows("select count(*) from s85_late"), ["1"]);
    pair.wait_streaming();
}

#[test]
fn s85_a_pause_survives_a_restart() {
    let pair = shared();
    pair.table("s85_pause", "id int primary key");
    pair.sync();
    pair.b.exec("select tandem.pause()");
    pair.b.restart(tandem_pg_test::Stop::Fast);
    pair.a.exec("insert into s85_pause values (1)");
    pair.b.wait_state("paused");
    // The other direction is not paused.
    pair.b.exec("insert into s85_pause values (2)");
    assert!(pair.b.is_true("select tandem.wait_for_peer('30s')"));
    assert_eq!(pair.b.rows("select id from s85_pause"), ["2"]);
    pair.b.exec("select tandem.resume()");
    pair.wait_streaming();
    pair.sync();
    pair.assert_converged("s85_pause");
}

#[test]
fn s85_a_version_is_not_a_position() {
    let pair = shared();
    pair.table("s85_type", "id int primary key");
    pair.a.exec("insert into s85_type values (1)");
    let failure = pair.b.fails("select tandem.wait_for((select _hlc from s85_type), '1s')");
    assert_eq!(failure.sqlstate, "42883", "{failure}");
    // A transaction that wrote nothing synced has nothing to wait for.
    assert!(pair.a.is_true("select tandem.wait_for_peer('30s')"));
}
