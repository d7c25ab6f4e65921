//! Who listens for conflicts: a session of its own, since notifications come with a commit.
use super::conflicts::{met, store};
use tandem_model::record::Status;

#[pgrx::pg_schema]
mod tests {
    use super::*;
    use pgrx::prelude::*;

    /// Records so many conflicts in this transaction, as the worker does.
    #[pg_extern]
    fn meet(table: &str, count: i32, open: bool) {
        let status = if open { Status::Open } else { Status::Auto };
        (0..count).for_each(|key| store(&met(table, key, status)));
    }

    #[test]
    fn listeners_are_told_of_conflicts_that_wait_for_a_person() {
        use postgres::fallible_iterator::FallibleIterator;
        use std::time::Duration;
        pgrx_tests::run_test("a_test_server_is_there", None, crate::pg_test::postgresql_conf_options())
            .expect("a server");
        let (mut session, _) = pgrx_tests::client().expect("a session");
        let (mut listener, _) = pgrx_tests::client().expect("a session");
        let mut exec =
            |statement: &str| session.batch_execute(statement).unwrap_or_else(|e| panic!("{statement}: {e:?}"));
        exec("select tandem.create_node('tokyo', 1) where not exists (select from tandem.node)");
        listener.batch_execute("listen tandem_conflict").expect("it listens");
        exec("begin; select tests.meet('Odd \"Name', 1, true); rollback");
        exec("select tests.meet('decided', 3, false)");
        exec("select tests.meet('Odd Name', 1, true)");
        exec("select tests.meet('storm', 1000, true)");
        // Notifications come in the order of commits: behind this one there are none of ours.
        exec("notify tandem_conflict, 'done'");
        let mut payloads = Vec::new();
        let mut notifications = listener.notifications();
        let mut waiting = notifications.timeout_iter(Duration::from_secs(30));
        while let Some(notification) = waiting.next().expect("the session is there") {
            match notification.payload() {
                "done" => break,
                payload => payloads.push(serde_json::from_str::<serde_json::Value>(payload).expect("JSON")),
            }
        }
        assert_eq!(payloads.len(), 1 + 100 + 1, "{payloads:?}");
        assert_eq!(payloads[0]["table"], "public.\"Odd Name\"");
        assert_eq!(payloads[0]["type"], "update_origin_differs");
        assert_eq!(payloads[0]["conflict_id"].as_str().map(str::len), Some(36));
        assert_eq!(payloads[101], serde_json::json!({ "more": true }));
        exec("delete from tandem.conflict where table_name in ('decided', 'Odd Name', 'storm')");
    }
}
