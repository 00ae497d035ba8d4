//! What only a file can be: locked as a whole, and safe on disk by settings of the connection.

use outbox_core::Context;
use outbox_seaorm::{CommitError, NotReady, Outbox, SavepointError, SchemaError, UnitOfWork, is_transient};
use sea_orm::{ConnectOptions, ConnectionTrait, Database, TransactionTrait};

use super::{
    database::Place,
    fixture::{Store, todo},
};

#[tokio::test]
async fn connections_confirm_commits_only_when_they_are_on_disk() {
    let store = Store::new().await;
    for db in [store.outbox.writer(), store.outbox.reader()] {
        for (pragma, expected) in [
            ("journal_mode", "wal"),
            ("synchronous", "2"),
            ("foreign_keys", "1"),
            ("busy_timeout", "5000"),
            ("journal_size_limit", "67108864"),
        ] {
            let sql = format!("select cast({pragma} as text) from pragma_{pragma}");
            let sql = if pragma == "busy_timeout" { sql.replacen(pragma, "timeout", 1) } else { sql };
            let statement = sea_orm::Statement::from_string(sea_orm::DbBackend::Sqlite, sql);
            let row = db.query_one_raw(statement).await.unwrap().unwrap();
            assert_eq!(row.try_get_by_index::<String>(0).unwrap(), expected, "{pragma}");
        }
    }
}

#[tokio::test]
async fn a_database_that_another_process_has_locked_is_transient() {
    let store = Store::new().await;
    let other = store.another_process().await;
    other.writer().execute_unprepared("pragma busy_timeout = 10").await.unwrap();
    let writing = store.outbox.begin(Context::default());
    writing.tx().begin_now().await.unwrap();
    let unit = other.begin(Context::default());
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Begin(_)) && error.is_transient(), "{error:?}");
    let syntax = other.writer().execute_unprepared("no sql").await.unwrap_err();
    assert!(!is_transient(&syntax), "{syntax:?}");
    writing.rollback().await;
    store.is_empty().await;
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_not_told_to_migrate() {
    let place = Place::migrated().await;
    let outbox = place.connect(1).await;
    outbox.reader().clone().close().await.unwrap();
    let error = outbox.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::Unanswered(_)), "{error:?}");
}

/// What makes SQLite end a transaction by itself, as the statement that does it.
const ENDINGS: [(&str, &str); 3] = [
    ("raise(rollback)", "insert into notes values ('refused')"),
    ("or rollback", "insert or rollback into notes values ('there')"),
    ("disk full", "insert into notes values (hex(zeroblob(1000000)))"),
];

/// An outbox whose connection for writing is made to meet all [`ENDINGS`].
async fn about_to_end(outbox: &Outbox) {
    outbox
        .writer()
        .execute_unprepared(
            "insert or ignore into notes values ('there');
             create trigger if not exists refuse before insert on notes when new.text = 'refused'
             begin select raise(rollback, 'refused'); end;
             pragma max_page_count = 200",
        )
        .await
        .unwrap();
}

/// A unit of work as most: one row and one event.
async fn write(outbox: &Outbox, text: &str) -> UnitOfWork {
    let unit = outbox.begin(Context::default());
    unit.tx().execute_unprepared(&format!("insert into notes values ('{text}')")).await.unwrap();
    unit.events().push(todo(text)).unwrap();
    unit
}

/// Units of work after one whose transaction SQLite has ended: what is confirmed is stored, and nobody is locked out.
async fn nothing_is_poisoned(store: &Store, outbox: &Outbox, how: &str) {
    write(outbox, &format!("{how} 1")).await.commit().await.unwrap();
    write(outbox, &format!("{how} refused")).await.rollback().await;
    for n in [2, 3] {
        write(outbox, &format!("{how} {n}")).await.commit().await.unwrap();
    }
    let another = store.another_process().await;
    let stored = format!("notes where text like '{how} _'");
    assert_eq!(store.count(&stored).await, 3, "{how}: what was confirmed is stored");
    assert_eq!(store.count("outbox_events where aggregate_id like '%refused'").await, 0, "{how}");
    write(&another, &format!("{how} 4")).await.commit().await.unwrap();
    assert_eq!(store.count(&stored).await, 4, "{how}: another process can write");
}

#[tokio::test]
async fn a_transaction_that_sqlite_ended_poisons_no_connection() {
    let store = Store::new().await;
    for (how, statement) in ENDINGS {
        about_to_end(&store.outbox).await;
        let unit = write(&store.outbox, "lost").await;
        unit.tx().execute_unprepared(statement).await.unwrap_err();
        let refused = unit.commit().await.unwrap_err();
        assert!(matches!(refused, CommitError::StatementFailed | CommitError::StatementBusy), "{how}");
        assert_eq!(refused.is_transient(), how == "disk full", "{how}");
        nothing_is_poisoned(&store, &store.outbox, how).await;
    }
    assert_eq!(store.count("notes where text = 'lost'").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn a_transaction_that_sqlite_ended_fails_its_savepoint_and_its_unit() {
    let store = Store::new().await;
    // A full disk that is only said to be full leaves the savepoint as it is.
    for (how, statement) in &ENDINGS[..2] {
        about_to_end(&store.outbox).await;
        let unit = write(&store.outbox, "lost").await;
        let ended = unit.tx().savepoint(|tx, _| async move { tx.execute_unprepared(statement).await }).await;
        assert!(matches!(ended, Err(SavepointError::Database(_))), "{how}: {ended:?}");
        assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)), "{how}");
        nothing_is_poisoned(&store, &store.outbox, how).await;
    }
    store.is_whole().await;
}

#[tokio::test]
async fn a_flush_whose_transaction_sqlite_ended_poisons_no_connection() {
    let store = Store::new().await;
    store
        .execute(
            "create trigger refuse before insert on outbox_events when new.aggregate_id = 'refused'
             begin select raise(rollback, 'refused'); end",
        )
        .await;
    let unit = write(&store.outbox, "lost").await;
    unit.events().push(todo("refused")).unwrap();
    assert!(matches!(unit.commit().await, Err(CommitError::Flush(_))));
    nothing_is_poisoned(&store, &store.outbox, "flush").await;
    assert_eq!(store.count("notes where text = 'lost'").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn a_pool_of_somebody_else_that_was_poisoned_is_healed() {
    let store = Store::new().await;
    for connections in [1, 3] {
        let mut options = ConnectOptions::new(store.place.url());
        options.max_connections(connections).sqlx_logging(false);
        let db = Database::connect(options).await.unwrap();
        let outbox = Outbox::new(db.clone());
        for (how, statement) in ENDINGS {
            // The application's own transactions, one of them inside another.
            for _ in 0..2 {
                about_to_end(&outbox).await;
                let own = db.begin().await.unwrap();
                let inner = own.begin().await.unwrap();
                let _ = inner.execute_unprepared(statement).await;
                drop((inner, own));
            }
            about_to_end(&outbox).await;
            let unit = outbox.begin(Context::default());
            unit.tx().begin_now().await.unwrap();
            let _ = unit.tx().execute_unprepared(statement).await;
            unit.rollback().await;
            nothing_is_poisoned(&store, &outbox, &format!("{connections} {how}")).await;
        }
    }
    store.is_whole().await;
}

#[tokio::test]
async fn a_task_that_waits_for_the_savepoint_that_waits_for_it_is_an_error() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let (tx, around) = (unit.tx(), unit.tx());
    let ended = tx.savepoint(|_, _| async move {
        let task = tokio::spawn(async move { around.execute_unprepared("insert into notes values ('a')").await });
        task.await.unwrap()
    });
    let Err(SavepointError::Work(error)) = ended.await else { panic!("it would wait for ever") };
    assert!(error.to_string().contains("a savepoint was not over after 10 s"), "{error}");
    drop(tx);
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    store.is_empty().await;
}

/// Unix keeps the old file for those who have it open: what is written to it is gone when they end.
#[tokio::test]
async fn a_file_that_was_deleted_or_replaced_is_written_no_more() {
    for replaced in [false, true] {
        let store = Store::new().await;
        store.record_todos(&["1"]).await;
        assert!(store.outbox.ready().await.is_ok());
        let path = store.outbox.reader().get_sqlite_connection_pool().connect_options().get_filename().to_path_buf();
        let copy = path.with_extension("copy");
        std::fs::copy(&path, &copy).unwrap();
        if replaced { std::fs::rename(&copy, &path) } else { std::fs::remove_file(&path) }.unwrap();
        let error = store.outbox.ready().await.unwrap_err();
        assert!(matches!(error, NotReady::File(_)), "{error:?}");
        let unit = store.outbox.begin(Context::default());
        unit.events().push(todo("2")).unwrap();
        let error = unit.commit().await.unwrap_err();
        assert!(matches!(error, CommitError::Begin(_)) && error.is_transient(), "{error:?}");
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("deleted or replaced"), "{error:?}");
    }
}
