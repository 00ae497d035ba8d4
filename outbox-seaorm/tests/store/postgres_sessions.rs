//! What servers, roles and applications set for sessions and transactions, and sessions that are not good any more.

use std::time::Duration;

use outbox_core::{Context, Subscription};
use outbox_seaorm::{CommitError, Complaint, Outbox, Retention, SchemaError, is_transient, once};
use outbox_test_servers::PgBouncer;
use sea_orm::{ConnectOptions, ConnectionTrait, Database, Statement};
use tokio::task::JoinSet;
use uuid::Uuid;

use super::{
    database::{self, BACKEND},
    fixture::{LONG, Store, delivered, migrate, record, todo},
};

async fn isolation(outbox: &Outbox) -> String {
    let unit = outbox.begin(Context::default());
    let ask = Statement::from_string(BACKEND, "select current_setting('transaction_isolation')");
    let level = unit.tx().query_one_raw(ask).await.unwrap().unwrap().try_get_by_index(0).unwrap();
    unit.rollback().await;
    level
}

#[tokio::test]
async fn transactions_are_read_committed_whatever_is_set() {
    let store = Store::new().await;
    let url = format!("{}?options[default_transaction_isolation]=serializable", store.place.url());
    assert_eq!(isolation(&Outbox::connect(&url, 1).await.unwrap()).await, "read committed");
    let database: String = store.value("select current_database()::text").await;
    store.execute(&format!("alter database {database} set default_transaction_isolation = 'repeatable read'")).await;
    let outbox = store.another_process().await;
    assert_eq!(isolation(&outbox).await, "read committed");
    assert_eq!(isolation(&outbox.with_own_store(std::time::Duration::from_secs(10))).await, "read committed");
    let pooler = PgBouncer::start(database::server(), 1);
    let url = format!("{}?statement-cache-capacity=0", pooler.url(&store.place.url()));
    assert_eq!(isolation(&Outbox::connect(&url, 1).await.unwrap()).await, "read committed");
}

/// A pool of the application's own, at another isolation level.
async fn serializable(store: &Store) -> Outbox {
    let url = format!("{}?options[default_transaction_isolation]=serializable", store.place.url());
    let mut options = ConnectOptions::new(url);
    options.max_connections(4).sqlx_logging(false);
    Outbox::new(Database::connect(options).await.unwrap())
}

#[tokio::test]
async fn a_pool_at_another_isolation_level_is_refused() {
    let store = Store::new().await;
    let error = serializable(&store).await.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::Isolation { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the connections begin transactions at \"serializable\", and a second commit at a time fails there; open them \
         with `Outbox::connect`, or set default_transaction_isolation = 'read committed' for the role of the outbox"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registrations_that_are_in_each_others_way_begin_again() {
    let store = Store::new().await;
    let mut registering = JoinSet::new();
    for n in 0..8 {
        let outbox = serializable(&store).await;
        registering.spawn(async move {
            outbox.register(&Subscription::new("same").unwrap()).await.unwrap();
            outbox.register(&Subscription::new(format!("s{n}")).unwrap()).await.unwrap();
        });
    }
    registering.join_all().await;
    assert_eq!(store.count("outbox_subscriptions").await, 9);
}

/// The transaction sees everything as it was at its first statement; its events go to whom there is when it commits.
#[tokio::test]
async fn a_unit_that_cannot_see_a_new_subscription_gives_it_its_events() {
    for level in ["repeatable read", "serializable"] {
        let store = Store::new().await;
        let unit = store.outbox.begin(Context::default());
        unit.tx().execute_unprepared(&format!("set transaction isolation level {level}")).await.unwrap();
        unit.tx().execute_unprepared("select count(*) from notes").await.unwrap();
        let other = store.another_process().await;
        let id = other.register(&Subscription::new("new").unwrap()).await.unwrap();
        unit.events().push(todo("1")).unwrap();
        unit.events().push(todo("2")).unwrap();
        unit.commit().await.unwrap();
        assert_eq!(store.deliver_all(id).await.len(), 2, "{level}");
        store.is_whole().await;
    }
}

/// A schema for each tenant, with tables from the time when each had an outbox of its own.
#[tokio::test]
async fn events_go_where_workers_look_whatever_the_search_path() {
    let store = Store::new().await;
    store.execute("create schema tenant").await;
    let url = format!("{}?options[search_path]=tenant", store.place.url());
    migrate(&Outbox::connect(&url, 1).await.unwrap()).await;
    let id = store.subscribe("s").await;
    let begin = async |outbox: &Outbox| {
        let unit = outbox.begin(Context::default());
        unit.tx().execute_unprepared("set local search_path = tenant").await.unwrap();
        unit.tx().execute_unprepared("insert into notes values (gen_random_uuid()::text)").await.unwrap();
        unit
    };
    let unit = begin(&store.outbox).await;
    unit.events().push(todo("1")).unwrap();
    assert!(once(&store.outbox, &unit.tx(), "mailer", Uuid::now_v7()).await.unwrap());
    unit.commit().await.unwrap();
    let lane = store.claim_one(id, LONG).await;
    let unit = begin(&store.outbox).await;
    unit.events().push(todo("2")).unwrap();
    unit.events().push(todo("3")).unwrap();
    unit.commit_with(delivered(&lane, 1, outbox_seaorm::Next::Yield)).await.unwrap();
    // A pool whose schema nobody has asked for yet.
    let mut options = ConnectOptions::new(store.place.url());
    options.max_connections(1).sqlx_logging(false);
    let unit = begin(&Outbox::new(Database::connect(options).await.unwrap())).await;
    unit.events().push(todo("4")).unwrap();
    unit.commit().await.unwrap();

    assert_eq!((store.count("tenant.notes").await, store.count("public.notes").await), (3, 0));
    for table in ["events", "deliveries", "inbox", "lanes"] {
        assert_eq!(store.count(&format!("tenant.outbox_{table}")).await, 0, "{table}");
    }
    assert_eq!(store.count("public.outbox_events").await, 4);
    assert_eq!((store.count("public.outbox_inbox").await, store.count("public.outbox_delivered").await), (1, 1));
    store.is_whole().await;
}

/// The grants that the guide names for the role of a request.
#[tokio::test]
async fn a_request_role_needs_the_grants_of_the_guide() {
    let store = Store::new().await;
    let role = format!("tenant_{:08x}", fastrand::u32(..));
    let prepare = format!(
        "create role {role}; grant insert on notes to {role};
         grant select, insert on outbox_events to {role};
         grant insert on outbox_unrouted to {role};"
    );
    store.execute(&prepare).await;
    store.subscribe("s").await;
    for events in [1, 3] {
        let unit = store.outbox.begin(Context::default());
        unit.tx().execute_unprepared(&format!("set local role {role}")).await.unwrap();
        unit.tx().execute_unprepared(&format!("insert into notes values ('{events}')")).await.unwrap();
        for n in 0..events {
            unit.events().push(todo(&n.to_string())).unwrap();
        }
        unit.commit().await.unwrap();
    }
    assert_eq!(store.count("outbox_events").await, 4);
    store.execute(&format!("drop owned by {role}; drop role {role}")).await;
    store.is_whole().await;
}

async fn insert(outbox: &Outbox, note: &str) -> Result<(), sea_orm::DbErr> {
    let unit = outbox.begin(Context::default());
    let insert = Statement::from_sql_and_values(BACKEND, "insert into notes values ($1)", [note.into()]);
    let inserted = unit.tx().execute_raw(insert).await;
    match inserted {
        Ok(_) => unit.commit().await.unwrap(),
        Err(_) => unit.rollback().await,
    }
    inserted.map(|_| ())
}

#[tokio::test]
async fn a_session_that_takes_no_writes_is_not_used_again() {
    let store = Store::new().await;
    let read_only = "set session characteristics as transaction read only";
    store.outbox.writer().execute_unprepared(read_only).await.unwrap();
    let error = insert(&store.outbox, "a").await.unwrap_err();
    assert!(is_transient(&error), "{error:?}");
    insert(&store.outbox, "b").await.unwrap();
    store.is_whole().await;
}

#[tokio::test]
async fn a_changed_column_costs_no_connection_its_life() {
    let store = Store::new().await;
    let read = async || {
        let unit = store.outbox.begin(Context::default());
        let row = unit.tx().query_all_raw(Statement::from_string(BACKEND, "select * from notes")).await;
        unit.rollback().await;
        row.map(|_| ())
    };
    read().await.unwrap();
    store.execute("alter table notes add column more text").await;
    let error = read().await.unwrap_err();
    assert!(is_transient(&error), "{error:?}");
    read().await.unwrap();
    // What else has the same code is an error of the application.
    let error =
        store.outbox.writer().execute_unprepared("select 1 from notes for update of nothing").await.unwrap_err();
    assert!(!is_transient(&error), "{error:?}");
}

/// Who finds out about a lost COMMIT looks for its event.
#[tokio::test]
async fn an_event_stays_for_a_minute_whatever_retention_says() {
    let store = Store::new().await;
    store.record_todos(&["1"]).await;
    let nothing = Retention::default().keep(Duration::ZERO);
    assert_eq!(store.outbox.purge(&nothing).await.unwrap().events, 0);
    store.execute("update outbox_events set recorded_at = recorded_at - interval '60 seconds'").await;
    assert_eq!(store.outbox.purge(&nothing).await.unwrap().events, 1);
}

#[tokio::test]
async fn a_sequence_that_was_set_back_is_named() {
    let store = Store::new().await;
    store.record_todos(&["1", "2", "3"]).await;
    store.execute("alter table outbox_events alter column position restart with 1").await;
    let unit = store.outbox.begin(Context::default());
    unit.events().push(todo("2")).unwrap();
    let error = unit.commit().await.unwrap_err();
    let CommitError::Flush(cause) = &error else { panic!("{error:?}") };
    assert!(cause.to_string().contains("sequence behind the column position"), "{cause}");
    let found = store.outbox.checkup().await.unwrap();
    let repeated = |found: &[Complaint]| found.iter().find(|each| each.problem.contains("given out twice")).cloned();
    let repeated_before = repeated(&found).unwrap_or_else(|| panic!("{found:?}"));
    store.execute(&repeated_before.to_do).await;
    assert_eq!(repeated(&store.outbox.checkup().await.unwrap()), None);
    record(&store.outbox, [todo("3")]).await;
    assert_eq!(store.count("outbox_events").await, 4);
}

#[tokio::test]
async fn a_sequence_with_a_cache_is_named() {
    let store = Store::new().await;
    for (table, column) in [("events", "position"), ("deliveries", "seq")] {
        store.execute(&format!("alter table outbox_{table} alter column {column} set cache 50")).await;
        let found = store.outbox.checkup().await.unwrap();
        assert!(found.iter().any(|each| each.problem.contains("not given out in their order")), "{found:?}");
        store.execute(&format!("alter table outbox_{table} alter column {column} set cache 1")).await;
    }
    assert!(!store.outbox.checkup().await.unwrap().iter().any(|each| each.problem.contains("order")));
}

#[tokio::test]
async fn an_error_of_the_server_is_not_the_statements() {
    let store = Store::new().await;
    let raised = async |code: &str| {
        let raise = format!("do $$ begin raise exception using errcode = '{code}'; end $$");
        store.outbox.writer().execute_unprepared(&raise).await.unwrap_err()
    };
    for code in ["53100", "53200", "53300", "58030", "08006", "57P01", "57P05", "40001", "25006"] {
        assert!(is_transient(&raised(code).await), "{code}");
    }
    for code in ["0A000", "22012", "23505", "42P01", "42501", "P0001"] {
        assert!(!is_transient(&raised(code).await), "{code}");
    }
}
