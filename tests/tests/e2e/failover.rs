//! An address that leads to another server from one moment to the next.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::{Context, NewEvent};
use outbox_seaorm::{Outbox, TransactionError};
use outbox_test_servers::{Fault, Postgres, Proxy};
use outbox_tests::{Database, eventually, texts};
use reqwest::{Client, StatusCode};
use sea_orm::{ConnectionTrait, DbErr};
use serde_json::json;
use tokio::task::{JoinSet, block_in_place};

use crate::{
    example::start,
    faults::{Ledger, QUICK, assert_consistent},
    postgres::Migrator,
};

/// Writes a note, and pushes an event with the same name.
async fn note(outbox: Arc<Outbox>, text: String, pushes: bool) -> Result<(), TransactionError<DbErr>> {
    let work = |tx: outbox_seaorm::Tx, events: outbox_core::Events| async move {
        tx.execute_unprepared(&format!("insert into notes values ('{text}')")).await?;
        if pushes {
            events.push(NewEvent::dynamic("note.taken", "note", &text, &()).unwrap()).unwrap();
        }
        Ok(())
    };
    outbox.transaction(Context::default(), work).await
}

/// The commits reach the old primary, the standby does not hear of them, and becomes the new primary. There, others get
/// the same transaction ids.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_the_new_primary_lacks_is_never_committed() {
    let old = Postgres::start(&[]);
    let url = old.database();
    let direct = Outbox::connect(&url, 1).await.unwrap();
    outbox_migrations::up::<Migrator>(direct.writer()).await.unwrap();
    direct.writer().execute_unprepared("create table notes (text text primary key)").await.unwrap();
    let replication = Proxy::start(old.port()).await;
    let new = block_in_place(|| old.standby(replication.port()));
    replication.set(Fault::Freeze);

    let address = Proxy::start(old.port()).await;
    let outbox = Arc::new(Outbox::connect(&address.url(&url, old.port()), 20).await.unwrap());
    address.set(Fault::MuteAfterCommit);
    let mut lost = JoinSet::new();
    for n in 0..12 {
        lost.spawn(note(outbox.clone(), format!("lost {n}"), n % 2 == 0));
    }
    eventually(Duration::from_secs(20), "the commits", || async {
        texts(&direct, "select text from notes").await.len() == 12
    })
    .await;

    address.switch(new.port());
    address.set(Fault::None);
    block_in_place(|| new.promote());
    address.close_existing();
    let mut others = 0;
    while !lost.is_empty() {
        while let Some(ended) = lost.try_join_next() {
            let answer = ended.unwrap();
            assert!(matches!(answer, Err(TransactionError::Commit(_))), "{answer:?} after {others} others");
        }
        // The first may find a connection that is gone.
        let other = note(outbox.clone(), format!("other {others}"), true).await;
        others += u32::from(other.is_ok());
    }
    let on_the_new = Outbox::connect(&address.url(&url, old.port()), 1).await.unwrap();
    let stored = texts(&on_the_new, "select text from notes where text like 'lost%'").await;
    assert_eq!(stored, Vec::<String>::new());
}

/// The address shows to a standby that takes no writes, and then to the new primary. Nothing closes the connections that
/// were made in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_address_that_moves_by_way_of_a_standby_serves_again() {
    let old = Postgres::start(&[]);
    let url = old.database();
    let address = Proxy::start(old.port()).await;
    let database = Database::Postgres(address.url(&url, old.port()));
    let ledger = Ledger::default();
    let app = start("all", &database, QUICK).await;
    let clients = ledger.load_through_errors(&app, 4);
    let (shown, new) = block_in_place(|| (old.standby(old.port()), old.standby(old.port())));
    let todos = format!("{}/todos", app.http);
    let client = Client::new();
    let post = async |title: String| {
        let answer = client.post(&todos).json(&json!({ "title": title })).send().await;
        answer.unwrap().status()
    };

    let direct = Outbox::connect(&url, 1).await.unwrap();
    let following = "select count(*)::text from pg_stat_replication where state = 'streaming'";
    eventually(Duration::from_secs(60), "both standbys follow", || async { texts(&direct, following).await == ["2"] })
        .await;
    drop(direct);
    address.switch(shown.port());
    // It waits until both have everything; one that did not follow would have been left behind.
    block_in_place(|| old.stop("fast"));
    for n in 0..2 {
        let status = post(format!("during the failover {n}")).await;
        assert!(status.is_server_error(), "{status}");
    }
    block_in_place(|| new.promote());
    address.switch(new.port());
    let moved = Instant::now();
    let attempt = std::sync::atomic::AtomicUsize::new(0);
    eventually(Duration::from_secs(10), "service is back", || async {
        let n = attempt.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        post(format!("after the failover {n}")).await == StatusCode::CREATED
    })
    .await;
    println!("back after {:?}", moved.elapsed());
    for n in 0..100 {
        assert_eq!(post(format!("long after the failover {n}")).await, StatusCode::CREATED);
    }
    ledger.stop();
    clients.join_all().await;
    assert_consistent(&database, &ledger, &app).await;
}
