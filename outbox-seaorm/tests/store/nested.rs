//! What SeaORM's own code does with a transaction, and what comes after the commit.

use std::sync::Arc;

use outbox_core::Context;
use outbox_seaorm::{CommitError, NestedTx, Outbox, SavepointError, TransactionError, Tx, UnitOfWork};
use sea_orm::{
    AccessMode, ConnectionTrait, DatabaseConnection, DbBackend, DbErr, EntityTrait, IsolationLevel, TransactionSession,
    TransactionTrait,
};
use tokio::sync::mpsc;

use super::{
    database,
    fixture::{Store, poll_once, todo},
};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[expect(unreachable_pub, reason = "the macros of SeaORM spell it")]
mod author {
    use sea_orm::entity::prelude::*;

    #[sea_orm::model]
    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "authors")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i32,
        pub name: String,
        #[sea_orm(has_many)]
        pub books: HasMany<super::book::Entity>,
    }

    impl ActiveModelBehavior for ActiveModel {}
}

#[expect(unreachable_pub, reason = "the macros of SeaORM spell it")]
mod book {
    use sea_orm::entity::prelude::*;

    #[sea_orm::model]
    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "books")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i32,
        pub author_id: i32,
        #[sea_orm(unique)]
        pub title: String,
        #[sea_orm(belongs_to, from = "author_id", to = "id")]
        pub author: BelongsTo<super::author::Entity>,
    }

    impl ActiveModelBehavior for ActiveModel {}
}

async fn insert(tx: &impl ConnectionTrait, text: &str) -> Result<(), DbErr> {
    tx.execute_unprepared(&format!("insert into notes values ('{text}')")).await.map(|_| ())
}

/// A row and an event.
async fn write(tx: &NestedTx, text: &str) {
    insert(tx, text).await.unwrap();
    tx.events().push(todo(text)).unwrap();
}

async fn stored(store: &Store) -> (Vec<String>, Vec<String>) {
    let notes = store.column("select text from notes order by text").await;
    (notes, store.column("select aggregate_id from outbox_events order by aggregate_id").await)
}

fn both(texts: &[&str]) -> (Vec<String>, Vec<String>) {
    let texts: Vec<String> = texts.iter().copied().map(String::from).collect();
    (texts.clone(), texts)
}

#[tokio::test]
async fn a_transaction_inside_is_kept_or_taken_back_with_its_events() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let kept = TransactionTrait::begin(&tx).await.unwrap();
    write(&kept, "kept").await;
    let inner = kept.begin().await.unwrap();
    write(&inner, "inner").await;
    TransactionSession::commit(inner).await.unwrap();
    let inner = kept.begin().await.unwrap();
    write(&inner, "inner gone").await;
    TransactionSession::rollback(inner).await.unwrap();
    kept.commit().await.unwrap();
    let gone = tx.begin().await.unwrap();
    write(&gone, "gone").await;
    let inner = gone.begin().await.unwrap();
    write(&inner, "inner kept").await;
    inner.commit().await.unwrap();
    gone.rollback().await.unwrap();
    insert(&tx, "z").await.unwrap();
    unit.events().push(todo("z")).unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(stored(&store).await, both(&["inner", "kept", "z"]));
    store.is_whole().await;
}

#[tokio::test]
async fn a_transaction_inside_that_is_dropped_fails_the_whole() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let dropped = unit.tx().begin().await.unwrap();
    write(&dropped, "lost").await;
    drop(dropped);
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    store.is_empty().await;
}

#[tokio::test]
async fn a_transaction_inside_whose_statement_failed_cannot_commit() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    insert(&tx, "there").await.unwrap();
    let inside = tx.begin().await.unwrap();
    write(&inside, "lost").await;
    let _ignored = insert(&inside, "there").await;
    let error = inside.commit().await.unwrap_err();
    assert!(error.to_string().contains("an earlier statement of this transaction failed"), "{error}");
    unit.events().push(todo("there")).unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(stored(&store).await, both(&["there"]));
    store.is_whole().await;
}

#[tokio::test]
async fn a_transaction_inside_has_no_isolation_level_of_its_own() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    for (level, mode) in [(Some(IsolationLevel::Serializable), None), (None, Some(AccessMode::ReadOnly))] {
        let error = tx.begin_with_config(level, mode).await.unwrap_err();
        assert!(error.to_string().contains("begin it without"), "{error}");
    }
    tx.begin_with_config(None, None).await.unwrap().commit().await.unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    store.is_empty().await;
}

#[tokio::test]
async fn the_handle_around_waits_for_a_transaction_inside() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let inside = tx.begin().await.unwrap();
    write(&inside, "gone").await;
    let mut waiting = Box::pin(insert(&tx, "kept"));
    for _ in 0..20 {
        assert!(poll_once(&mut waiting).await.is_pending());
        tokio::task::yield_now().await;
    }
    unit.events().push(todo("kept")).unwrap();
    inside.rollback().await.unwrap();
    waiting.await.unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(stored(&store).await, both(&["kept"]));
    store.is_whole().await;
}

#[tokio::test]
async fn a_closure_of_seaorm_is_a_savepoint() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let around = tx.clone();
    tx.transaction::<_, _, DbErr>(|tx| {
        Box::pin(async move {
            write(tx, "kept").await;
            Ok(())
        })
    })
    .await
    .unwrap();
    let undone = tx.transaction::<_, (), DbErr>(|tx| {
        Box::pin(async move {
            write(tx, "gone").await;
            Err(DbErr::Custom("no".to_owned()))
        })
    });
    assert!(matches!(undone.await, Err(sea_orm::TransactionError::Transaction(_))));
    drop(tx);
    let moved = around.clone();
    let refused = around.transaction::<_, (), DbErr>(|_| Box::pin(async move { insert(&moved, "around").await }));
    assert!(matches!(refused.await, Err(sea_orm::TransactionError::Transaction(_))), "it would wait for itself");
    drop(around);
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    store.is_empty().await;
}

#[tokio::test]
async fn a_model_is_written_together_with_its_relations() {
    let store = Store::new().await;
    let id = if database::BACKEND == DbBackend::Sqlite { "integer" } else { "serial" };
    for table in [
        format!("create table authors (id {id} primary key, name text not null)"),
        format!("create table books (id {id} primary key, author_id int not null, title text not null unique)"),
    ] {
        store.execute(&table).await;
    }
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let author = author::ActiveModel::builder()
        .set_name("Ursula")
        .add_book(book::ActiveModel::builder().set_title("The Dispossessed"))
        .add_book(book::ActiveModel::builder().set_title("The Lathe of Heaven"));
    author.save(&tx).await.unwrap();
    let twice = author::ActiveModel::builder()
        .set_name("Somebody")
        .add_book(book::ActiveModel::builder().set_title("The Dispossessed"));
    twice.save(&tx).await.unwrap_err();
    unit.events().push(todo("1")).unwrap();
    drop(tx);
    // SeaORM drops its transaction when a statement in it fails.
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));

    let work = store.outbox.transaction(Context::default(), |tx, events| async move {
        let author = author::ActiveModel::builder().set_name("Ursula");
        author.add_book(book::ActiveModel::builder().set_title("The Dispossessed")).save(&tx).await?;
        events.push(todo("1"))?;
        Ok::<_, Error>(())
    });
    work.await.unwrap();
    assert_eq!((store.count("authors").await, store.count("books").await), (1, 1));
    assert_eq!(author::Entity::find().all(store.outbox.reader()).await.unwrap()[0].name, "Ursula");
    store.is_whole().await;
}

/// Says its name when it runs, and nothing more when it is dropped.
fn says(name: &'static str, to: &mpsc::UnboundedSender<&'static str>) -> impl Future<Output = ()> + Send + 'static {
    let to = to.clone();
    async move { to.send(name).unwrap() }
}

#[tokio::test]
async fn what_comes_after_the_commit_is_dropped_with_a_rollback() {
    let store = Store::new().await;
    let (to, mut said) = mpsc::unbounded_channel();
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    insert(&tx, "a").await.unwrap();
    tx.after_commit(says("unit", &to)).unwrap();
    for keep in [true, false] {
        let inside = tx.begin().await.unwrap();
        inside.after_commit(says(if keep { "kept" } else { "gone" }, &to)).unwrap();
        if keep { inside.commit().await.unwrap() } else { inside.rollback().await.unwrap() }
    }
    let around = &tx;
    let refused = tx.savepoint(|_, _| async move { around.after_commit(async {}) }).await;
    assert!(matches!(refused, Err(SavepointError::Work(_))));
    assert!(said.try_recv().is_err(), "nothing is committed yet");
    let source = unit.source();
    drop(tx);
    unit.commit().await.unwrap();
    let mut all = [said.recv().await.unwrap(), said.recv().await.unwrap()];
    all.sort_unstable();
    assert_eq!(all, ["kept", "unit"]);
    source.tx().after_commit(async {}).unwrap_err();

    let unwritten = |unit: &UnitOfWork| unit.tx().after_commit(says("nothing", &to)).unwrap();
    let (rolled_back, dropped, refused) = (
        store.outbox.begin(Context::default()),
        store.outbox.begin(Context::default()),
        store.outbox.begin(Context::default()),
    );
    unwritten(&rolled_back);
    unwritten(&dropped);
    unwritten(&refused);
    rolled_back.rollback().await;
    drop(dropped);
    let _ = refused.tx().execute_unprepared("no sql").await;
    refused.commit().await.unwrap_err();
    let idle = store.outbox.begin(Context::default());
    idle.tx().after_commit(says("idle", &to)).unwrap();
    idle.commit().await.unwrap();
    drop(to);
    assert_eq!(said.recv().await, Some("idle"));
    assert_eq!(said.recv().await, None);
    store.is_whole().await;
}

/// The causes of an error, one after the other.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[tokio::test]
async fn errors_of_savepoints_and_transactions_are_those_of_anybody() {
    async fn by_anyhow(tx: &Tx) -> anyhow::Result<()> {
        tx.savepoint(|_, _| async move { Err::<(), _>(anyhow::anyhow!("inner").context("outer")) }).await?;
        Ok(())
    }
    async fn by_box(tx: &Tx) -> Result<(), Error> {
        tx.savepoint(|_, _| async move { Err::<(), Error>("boxed".into()) }).await?;
        Ok(())
    }
    async fn database_by_anyhow(tx: &Tx) -> anyhow::Result<()> {
        tx.savepoint(|_, _| async move { Err::<(), _>(DbErr::Custom("database".to_owned())) }).await?;
        Ok(())
    }
    async fn whole_by_anyhow(outbox: &Outbox) -> anyhow::Result<()> {
        outbox
            .transaction(
                Context::default(),
                |_, _| async move { Err::<(), _>(anyhow::anyhow!("inner").context("outer")) },
            )
            .await?;
        Ok(())
    }
    async fn whole_by_box(outbox: &Outbox) -> Result<(), Error> {
        outbox.transaction(Context::default(), |_, _| async move { Err::<(), Error>("boxed".into()) }).await?;
        Ok(())
    }
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    assert_eq!(format!("{:#}", by_anyhow(&tx).await.unwrap_err()), "outer: inner");
    assert_eq!(chain(&*by_box(&tx).await.unwrap_err()), "boxed");
    assert_eq!(format!("{:#}", database_by_anyhow(&tx).await.unwrap_err()), "Custom Error: database");
    assert_eq!(format!("{:#}", whole_by_anyhow(&store.outbox).await.unwrap_err()), "outer: inner");
    assert_eq!(chain(&*whole_by_box(&store.outbox).await.unwrap_err()), "boxed");
    let database = SavepointError::<DbErr>::Database(DbErr::Custom("gone".to_owned()));
    assert_eq!(chain(&database), "the savepoint could not be set or ended: Custom Error: gone");
    let refused = TransactionError::<DbErr>::Commit(CommitError::Flush(DbErr::Custom("gone".to_owned())));
    assert_eq!(chain(&refused), "the events could not be flushed: Custom Error: gone");
    drop(tx);
    unit.rollback().await;
    store.is_empty().await;
}

#[tokio::test]
async fn connections_to_nothing_are_refused_with_a_sentence() {
    // A mock, a proxy and MySQL are other variants of the same.
    let outbox = Arc::new(Outbox::new(DatabaseConnection::default()).with_own_store(std::time::Duration::from_secs(1)));
    let unit = outbox.begin(Context::default());
    unit.events().push(todo("1")).unwrap();
    let error = insert(&unit.tx(), "a").await.unwrap_err();
    assert!(error.to_string().contains("the outbox works on pools of SQLite and PostgreSQL"), "{error}");
    unit.rollback().await;
    assert!(outbox.check_schema().await.is_err());
    assert!(outbox.status().await.is_err());
    let pushed = outbox.begin(Context::default());
    pushed.events().push(todo("1")).unwrap();
    assert!(matches!(pushed.commit().await, Err(CommitError::Begin(_))));
}

/// Runs with the whole workspace, where another package asks for the feature.
#[cfg(feature = "stream")]
#[tokio::test]
async fn rows_are_streamed_and_a_dropped_stream_fails_nothing() {
    use futures_util::StreamExt;
    use sea_orm::{Statement, StreamTrait};

    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.execute_unprepared("insert into notes values ('a'), ('b'), ('c')").await.unwrap();
    let all = || Statement::from_string(database::BACKEND, "select text from notes order by text");
    let rows: Vec<String> =
        tx.stream_raw(all()).await.unwrap().map(|row| row.unwrap().try_get_by_index(0).unwrap()).collect().await;
    assert_eq!(rows, ["a", "b", "c"]);
    let mut halfway = tx.stream_raw(all()).await.unwrap();
    assert!(halfway.next().await.is_some());
    drop(halfway);
    assert!(tx.stream_raw(Statement::from_string(database::BACKEND, "select nothing from nowhere")).await.is_err());
    drop(tx);
    assert!(
        matches!(unit.commit().await, Err(CommitError::StatementFailed)),
        "the failed stream is a failed statement"
    );
}
