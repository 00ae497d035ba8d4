//! The statements as they stand in the store, explained by PostgreSQL with a long history: with the values at hand, and
//! as the plan for all values that a prepared statement has after a while.
//!
//! 100,000 delivered rows and 50,000 dead letters; with `OUTBOX_LONG_TESTS=1` a million and 100,000.

use super::fixture::Store;
use crate::sql::{Flush, Route, Settle};

#[allow(dead_code, reason = "only some of the statements are explained")]
#[path = "../../src/postgres.rs"]
mod statements;

use statements::POSTGRES;

/// A history, and 20,000 keys of two subscriptions that wait.
async fn with_a_long_history() -> Store {
    let store = Store::new().await;
    for name in ["s", "t"] {
        store.subscribe(name).await;
    }
    let is_long = std::env::var_os("OUTBOX_LONG_TESTS").is_some_and(|value| value == "1");
    let (delivered, dead) = if is_long { (1_000_000, 100_000) } else { (100_000, 50_000) };
    let waiting = 40_000;
    for sql in [
        format!(
            "insert into outbox_events (event_id, event_type, schema_version, aggregate_type, aggregate_id, payload,
                                        occurred_at, recorded_at)
             select gen_random_uuid(), 'todo.created', 1, 'todo', (n % 20000)::text, '{{}}', now(),
                    now() - ({delivered} - n) * interval '1 second'
               from generate_series(1, {delivered} + {dead} + {waiting}) n"
        ),
        format!(
            "insert into outbox_delivered (subscription_id, position, attempts, delivered_at)
             select 1 + n % 2, n, 1, now() - ({delivered} - n) * interval '1 second' from generate_series(1, {delivered}) n"
        ),
        format!(
            "insert into outbox_dead_letters (subscription_id, position, key, attempts, error, died_at)
             select 1 + n % 2, {delivered} + n, 'todo/' || n % 20000, 6, 'no', now() - n * interval '1 second'
               from generate_series(1, {dead}) n"
        ),
        format!(
            "insert into outbox_unrouted (position, ahead)
             select n, case when n % 50 = 0 then true end from generate_series(1, {waiting}) n"
        ),
        format!(
            "insert into outbox_deliveries (subscription_id, key, position, due_at)
             select s, 'todo/' || n % 20000, {delivered} + {dead} + n, now() - interval '1 minute'
               from generate_series(1, {waiting}) n, generate_series(1, 2) s"
        ),
        "insert into outbox_lanes (subscription_id, key, pending, due_at)
         select subscription_id, key, count(*), min(due_at) from outbox_deliveries group by 1, 2"
            .to_owned(),
        "analyze".to_owned(),
    ] {
        store.execute(&sql).await;
    }
    store
}

/// The plan of a statement with these parameters, as `EXECUTE` takes them.
async fn plan(store: &Store, mode: &str, sql: &str, parameters: &str) -> String {
    store.rows(&format!("set plan_cache_mode = {mode}")).await;
    store.rows(&format!("prepare explained as {sql}")).await;
    let parameters = if parameters.is_empty() { String::new() } else { format!("({parameters})") };
    let plan = store.column::<String>(&format!("explain execute explained{parameters}")).await.join("\n");
    store.rows("deallocate explained").await;
    plan
}

#[tokio::test]
async fn every_statement_reads_a_long_history_through_the_index_made_for_it() {
    let store = with_a_long_history().await;
    let Flush::Marked { one, many } = POSTGRES.flush else { panic!("one round trip") };
    let Route::AtOnce(route) = &POSTGRES.route else { panic!("one round trip") };
    let event = r#"[{"id":"019361b4-0000-7000-8000-000000000000","event_type":"a","schema_version":1,"aggregate_type":"a","aggregate_id":"1","payload":"{}","occurred_at":"2026-01-01","wait":0}]"#;
    let shared = "null, null, null, null, null, null, null";
    let flushed = format!("{shared}, '{event}'");
    let (given, matches) = (r#"[{"position":1,"due":0}]"#, r#"[{"lane":0,"position":1}]"#);
    let (numbered, takers) =
        (r#"[{"n":0,"subscription":1,"key":"todo/1"}]"#, r#"[{"subscription":1,"worker":"w","lanes":10,"lease":30}]"#);
    let routed = format!("3, '{given}', '{numbered}', '{matches}', '{takers}', 0, 1, 1");
    let looked = format!("3, '{given}', '{numbered}', '{matches}', '{takers}', 0, 1, null");
    let locked = format!("'{numbered}'");
    let mark = "using outbox_unrouted_pkey on outbox_unrouted";
    let single = "'019361b4-0000-7000-8000-000000000000', 'a', 1, 'a', '1', '{}', '2026-01-01', null, 0, null, null";
    let single = format!("{shared}, {single}");
    let lanes = r#"'[{"subscription":1,"key":"todo/1","token":1,"finished":1,"attempts":0,"next":"yield","wait":0}]'"#;
    let Settle::AtOnce(settle) = POSTGRES.settle else { panic!("one round trip") };
    let settled = format!(r#"{lanes}, '[{{"lease":0,"position":1,"attempts":1}}]'"#);
    let renewed = format!("{lanes}, 30");
    let uuid = "'019361b4-0000-7000-8000-000000000000'";
    let (due, lane) = ("using outbox_lanes_due on outbox_lanes", "using outbox_lanes_pkey on outbox_lanes");
    let tenants = "using outbox_lanes_tenant on outbox_lanes";
    let found = "Conflict Arbiter Indexes: outbox_lanes_pkey";
    let after = "AND (ROW(due_at, key) > ROW(";
    let (delivery, event) =
        ("using outbox_deliveries_pkey on outbox_deliveries", "using outbox_events_pkey on outbox_events");
    let listed = "using outbox_deliveries_position on outbox_deliveries d";
    let delivered = "Backward using outbox_delivered_pkey on outbox_delivered f";
    let dead = "Backward using outbox_dead_letters_subscription_id_position_key on outbox_dead_letters f";
    let died = "Backward using outbox_dead_letters_pkey on outbox_dead_letters";
    let (list, of) = (&POSTGRES.list_events, |what: &str| format!("{what}, null, null, null, null, null, 50"));
    let rules = r#"'[{"name":"","prefix":true,"seconds":604800}]'"#;
    let (old, still_old) = (format!("{rules}, 604800, '', 1000"), format!("{rules}, '[1,2,3]'"));
    let one_routed =
        format!("1, 1000, 0, '{}', 0", r#"[{"subscription":1,"key":"todo/1","token":1,"worker":"w","lease":30}]"#);
    let taken = format!("{lanes}, 30, 'w'");
    let of_two = r#"[{"subscription":1,"lanes":100,"probe":false,"after":null,"key":""},
                     {"subscription":2,"lanes":100,"probe":false,"after":"2026-01-01T00:00:00Z","key":"todo/1"}]"#;
    let claimed = format!("'{of_two}', 30, 'w', 1");
    let runs = r#"[{"subscription":1,"key":"todo/1","run":100},{"subscription":2,"key":"todo/2","run":7}]"#;
    let run = format!("'{runs}', 8388608, 100");
    let mut wrong = Vec::new();
    for (name, sql, parameters, indexes) in [
        ("next due", POSTGRES.next_due, "'[1,2]'", &[due][..]),
        ("claim", POSTGRES.claim, &claimed, &[due, found, after]),
        ("claim of others", POSTGRES.claim_others, r#"1, 'a', '["b"]', 9, 30, 'w'"#, &[tenants, found]),
        ("runs", POSTGRES.runs, &run, &[delivery, event]),
        ("flush of many", many, &flushed, &[]),
        ("flush of one", one, &single, &[]),
        ("route what was handed over", route.route, &routed, &[mark]),
        ("route what was read", route.route, &looked, &[mark]),
        ("route one", route.route_one, &one_routed, &[mark]),
        ("what waits", POSTGRES.unrouted, "0, 500", &[mark, "using outbox_unrouted_rare on", event]),
        ("what waits, whole", route.unrouted_whole, "0, 500", &[mark, "using outbox_unrouted_rare on", event]),
        ("what waits out of turn", POSTGRES.unrouted_ahead, "0, 100", &["using outbox_unrouted_rare on", event]),
        ("the last that waits", POSTGRES.last_unrouted, "0", &["Backward using outbox_unrouted_pkey on"]),
        ("whether something waits", POSTGRES.unrouted_until, "0, 1000", &[mark]),
        ("locked lanes", route.held_lanes, &locked, &[lane]),
        ("locked marks", route.held_marks, "'[1,2,3]'", &[mark]),
        ("held", POSTGRES.held, lanes, &[lane]),
        ("settle", settle, &settled, &[lane, "using outbox_deliveries_position on outbox_deliveries"]),
        ("delete empty lanes", POSTGRES.delete_empty_lanes, lanes, &[lane]),
        ("note attempts", POSTGRES.note_attempts, lanes, &[lane]),
        ("renew", POSTGRES.renew, &renewed, &[lane]),
        ("take over", POSTGRES.take_over, &taken, &[lane]),
        ("relayed", POSTGRES.relayed, lanes, &[lane]),
        ("list unfinished", POSTGRES.list_unfinished, "1, false, 900, 50", &[listed, event]),
        ("list leased", POSTGRES.list_unfinished, "1, true, 900, 50", &[event]),
        ("list delivered", POSTGRES.list_delivered, "1, 900, 50", &[delivered, event]),
        ("list dead", POSTGRES.list_dead, "1, 900, 50", &[dead, event]),
        ("positions unfinished", POSTGRES.newest_unfinished, "1, false, 50", &[listed]),
        ("positions delivered", POSTGRES.newest_delivered, "1, 50", &["Backward using outbox_delivered_pkey on"]),
        ("an event", POSTGRES.event_by_id, uuid, &["using outbox_events_event_id_key on outbox_events"]),
        ("positions of a backfill", POSTGRES.positions_known, "1, '[1,2,3]'", &[]),
        ("list all events", list.of_all, &of("null, null, null"), &["Backward using outbox_events_pkey on"]),
        ("list events of one", list.of_aggregate, &of("null, 'todo', '1'"), &["using outbox_events_aggregate on"]),
        ("dead letters", POSTGRES.list_dead_letters, "null, null, null, null, null, null, 50", &[died, event]),
        ("one event everywhere", POSTGRES.standing, "1000, null", &["using outbox_delivered_pkey on outbox_delivered"]),
        ("retention", POSTGRES.old_events, &old, &["using outbox_events_recorded on outbox_events"]),
        ("retention again", POSTGRES.still_old, &still_old, &[event]),
        ("purge the history", POSTGRES.purge_delivered, "'[1,2,3]'", &["using outbox_delivered_pkey on"]),
        ("purge events", POSTGRES.purge_events, "'[1,2,3]'", &[event]),
        ("orphans", POSTGRES.orphans, "", &["using outbox_lanes_pkey on", "using outbox_deliveries_"]),
        ("beginning", POSTGRES.first_position_since, "now()::text", &[]),
    ] {
        // Of filters that may be null the server makes a plan for each call: a generic one costs more.
        let modes = if name.starts_with("list") && name.contains("events") { 1 } else { 2 };
        for mode in ["force_custom_plan", "force_generic_plan"].into_iter().take(modes) {
            let plan = plan(&store, mode, sql, parameters).await;
            for index in indexes.iter().filter(|index| !plan.contains(**index)) {
                wrong.push(format!("{name}, {mode}: not {index}\n{plan}"));
            }
            // Small tables are read as a whole, and nothing but the lanes says which are leased.
            let mut small = vec!["outbox_meta", "outbox_subscriptions"];
            small.extend((name == "list leased").then_some("outbox_lanes"));
            let mut read_whole = plan.lines().filter(|step| step.contains("Seq Scan on outbox_"));
            if read_whole.any(|step| !small.iter().any(|table| step.contains(table))) {
                wrong.push(format!("{name}, {mode}: a whole table\n{plan}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// A worker plans its statements once, and the first time perhaps while the tables are empty: then the index of due lanes
/// would cost as much as that of the keys, and read all lanes of the subscription for each later on.
#[tokio::test]
async fn lanes_are_found_by_their_key_also_in_a_plan_from_an_empty_table() {
    let store = Store::new().await;
    store.execute("vacuum analyze").await;
    store.execute("set enable_seqscan = off").await;
    let lanes = r#"'[{"subscription":1,"key":"todo/1","token":1,"finished":1,"attempts":0,"next":"yield","wait":0}]'"#;
    let Settle::AtOnce(settle) = POSTGRES.settle else { panic!("one round trip") };
    let settled = format!(r#"{lanes}, '[{{"lease":0,"position":1,"attempts":1}}]'"#);
    for (name, sql, parameters) in [
        ("held", POSTGRES.held, lanes),
        ("settle", settle, &settled),
        ("delete empty lanes", POSTGRES.delete_empty_lanes, lanes),
        ("note attempts", POSTGRES.note_attempts, lanes),
        ("renew", POSTGRES.renew, &format!("{lanes}, 30")),
        ("take over", POSTGRES.take_over, &format!("{lanes}, 30, 'w'")),
        ("relayed", POSTGRES.relayed, lanes),
    ] {
        let plan = plan(&store, "force_generic_plan", sql, parameters).await;
        assert!(plan.contains("using outbox_lanes_pkey on") && !plan.contains("outbox_lanes_due"), "{name}: {plan}");
    }
    let of_one = r#"'[{"subscription":1,"lanes":9,"probe":false,"after":null,"key":""}]', 30, 'w', 1"#;
    for (name, sql, parameters) in [("claim", POSTGRES.claim, of_one), ("next due", POSTGRES.next_due, "'[1]'")] {
        let plan = plan(&store, "force_generic_plan", sql, parameters).await;
        assert!(
            plan.contains("using outbox_lanes_due on") && !plan.contains("using outbox_lanes_pkey"),
            "{name}: {plan}"
        );
    }
}
