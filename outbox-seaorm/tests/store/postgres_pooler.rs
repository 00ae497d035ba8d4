//! The store through PgBouncer in its mode `transaction`: few sessions, and each transaction gets any of them.

use std::time::{Duration, Instant};

use outbox_core::{AttemptLog, Context, StartPosition, Subscription};
use outbox_seaorm::{DeliveryState, Next, Outbox, Settled, once};
use outbox_test_servers::PgBouncer;
use sea_orm::{ConnectionTrait, EntityTrait, Statement};
use tokio::task::JoinSet;
use uuid::Uuid;

use super::{
    database::{self, Place},
    fixture::{LONG, Migrator, Store, delivered, delivered_run, failed, todo},
};

/// A pooler with so many sessions, and the URL of a database behind it as the outbox wants it.
fn behind_pooler(place: &Place, sessions: u32) -> (PgBouncer, String) {
    let pooler = PgBouncer::start(database::server(), sessions);
    let url = format!("{}?statement-cache-capacity=0", pooler.url(&place.url()));
    (pooler, url)
}

#[tokio::test]
async fn migrations_run_through_a_pooler_after_others_have_used_its_sessions() {
    let place = Place::empty().await;
    let (_pooler, url) = behind_pooler(&place, 2);
    let mut processes = JoinSet::new();
    for _ in 0..4 {
        let url = url.clone();
        processes.spawn(async move {
            let outbox = Outbox::connect(&url, 2).await.unwrap();
            outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
            outbox.check_schema().await.unwrap();
        });
    }
    while let Some(process) = processes.join_next().await {
        process.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_and_workers_share_two_sessions_and_lose_nothing() {
    let store = Store::new().await;
    let (_pooler, url) = behind_pooler(&store.place, 2);
    let id = Outbox::connect(&url, 1).await.unwrap().register(&Subscription::new("s").unwrap()).await.unwrap();
    let mut writers = JoinSet::new();
    for writer in 0..4 {
        let outbox = Outbox::connect(&url, 2).await.unwrap();
        writers.spawn(async move {
            for n in 0..25 {
                let written = outbox.transaction(Context::default(), |tx, events| async move {
                    let values = [format!("{writer} {n}").into()];
                    let sql = "insert into notes (text) values ($1)";
                    tx.execute_raw(Statement::from_sql_and_values(database::BACKEND, sql, values)).await?;
                    events.push(todo(&(n % 5).to_string()))?;
                    Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
                });
                written.await.unwrap();
            }
        });
    }
    let mut workers = JoinSet::new();
    let deadline = Instant::now() + Duration::from_secs(30);
    for worker in ["a", "b", "c"] {
        let (outbox, direct) = (Outbox::connect(&url, 1).await.unwrap(), store.outbox.clone());
        workers.spawn(async move {
            while direct.status().await.unwrap().subscriptions[0].delivered < 100 {
                assert!(Instant::now() < deadline, "not everything was delivered");
                outbox.route_waiting().await.unwrap();
                for lane in outbox.claim(id, worker, 3, 10, LONG).await.unwrap().lanes {
                    // A commit that holds the lane at this moment is over soon.
                    while outbox.renew(std::slice::from_ref(&lane.lane), LONG).await.unwrap().is_empty() {}
                    while outbox.settle(&[delivered_run(&lane)]).await.unwrap() == [Settled::Busy] {}
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }
    for result in writers.join_all().await.into_iter().chain(workers.join_all().await) {
        let () = result;
    }
    assert_eq!((store.count("notes").await, store.count("outbox_delivered").await), (100, 100));
    assert_eq!(store.count("outbox_lanes").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn every_call_works_through_a_pooler() {
    let store = Store::new().await;
    let (_pooler, url) = behind_pooler(&store.place, 2);
    // Two that take turns on the same sessions, with the same names for other statements.
    let (outbox, other) = (Outbox::connect(&url, 1).await.unwrap(), Outbox::connect(&url, 1).await.unwrap());
    store.record_todos(&["old"]).await;
    let s = Subscription::new("s").unwrap().start(StartPosition::Beginning);
    let id = outbox.register(&s).await.unwrap();
    assert_eq!(other.register(&s).await.unwrap(), id);
    let unit = other.begin(Context::default());
    unit.events().push(todo("new")).unwrap();
    assert!(once(&other, &unit.tx(), "mailer", Uuid::now_v7()).await.unwrap());
    unit.commit().await.unwrap();
    outbox.route_waiting().await.unwrap();
    outbox.sweep_removed().await.unwrap();
    assert!(outbox.pause("s").await.unwrap() && other.resume("s").await.unwrap());
    assert!(outbox.next_due(id).await.unwrap().is_some());
    let lanes = other.claim(id, "worker", 10, 10, LONG).await.unwrap().lanes;
    assert_eq!(lanes.len(), 2);
    let refs = [lanes[0].lane.clone(), lanes[1].lane.clone()];
    assert_eq!(outbox.held(&refs).await.unwrap().len(), 2);
    assert_eq!(other.note_attempts(&[(refs[0].clone(), AttemptLog::default())]).await.unwrap().len(), 1);
    assert_eq!(outbox.settle(&[failed(&lanes[0], LONG, "no")]).await.unwrap(), [Settled::Done]);
    let unit = other.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('effect')").await.unwrap();
    assert_eq!(unit.commit_with(delivered(&lanes[1], 1, Next::Yield)).await.unwrap(), Settled::Done);
    outbox.heartbeat("worker", &[&Subscription::new("s").unwrap()]).await.unwrap();
    let status = other.status().await.unwrap();
    assert_eq!((status.subscriptions[0].pending, status.subscriptions[0].delivered, status.workers.len()), (1, 1, 1));
    for (state, records) in [(DeliveryState::Delivered, 1), (DeliveryState::Pending, 1), (DeliveryState::Dead, 0)] {
        assert_eq!(outbox.deliveries(Some("s"), Some(state), 0, 10).await.unwrap().len(), records);
    }
    assert_eq!(other.activity("s").await.unwrap()[6], 1);
    outbox.forget_workers(Duration::ZERO).await.unwrap();
    other.forget_worker("worker").await.unwrap();
    // Statements of the application in a unit of work, prepared as well.
    let unit = outbox.begin(Context::default());
    let events = outbox_seaorm::entity::events::Entity::find().all(&unit.tx()).await.unwrap();
    assert_eq!(events.len(), 2);
    unit.rollback().await;
    assert!(other.remove("s").await.unwrap());
    assert_eq!(store.count("notes").await, 1);
    store.is_whole().await;
}

/// The only session has all the names that a process gives its statements, for other statements.
#[tokio::test]
async fn listings_work_where_others_have_used_the_same_names() {
    let store = Store::new().await;
    store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let (_pooler, url) = behind_pooler(&store.place, 1);
    let (outbox, other) = (Outbox::connect(&url, 1).await.unwrap(), Outbox::connect(&url, 1).await.unwrap());
    for _ in 0..3 {
        let prepare =
            "do $$ begin for n in 0..200 loop execute format('prepare sqlx_s_%s as select 1', n); end loop; end $$";
        other.writer().execute_unprepared("deallocate all").await.unwrap();
        other.writer().execute_unprepared(prepare).await.unwrap();
        assert_eq!(outbox.deliveries(Some("s"), None, 0, 10).await.unwrap().len(), 1);
        other.writer().execute_unprepared("deallocate all").await.unwrap();
        other.writer().execute_unprepared(prepare).await.unwrap();
        assert_eq!(outbox.status().await.unwrap().subscriptions[0].pending, 1);
    }
    store.is_whole().await;
}
