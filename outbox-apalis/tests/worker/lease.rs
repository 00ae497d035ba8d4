use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use outbox_apalis::Handlers;
use outbox_core::DeliveryError;
use outbox_seaorm::{
    DeliveryState::{Delivered, Leased},
    Outbox,
};
use sea_orm::{ConnectionTrait, DbBackend, Statement};
use tokio::sync::Semaphore;

use crate::fixture::{
    Fixture, MS, NEVER, Noted, Seen, each_noted, eventually, noted, policy, run, subscription, within, worker, working,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_renewed_as_long_as_its_handler_works() {
    let fixture = Fixture::new().await;
    let (seen, lease) = (Seen::default(), 500 * MS);
    let other = fixture.another_process().await;
    let mut workers = Vec::new();
    for outbox in [&fixture.outbox, &other] {
        let worker = worker(outbox).lease(lease).unwrap().timeout(NEVER).unwrap();
        workers.push(run(worker.handlers(subscription("s"), working(&seen, 5 * lease))).await);
    }
    fixture.push(each_noted(&["a", "b"], 1)).await;
    eventually("both are at work", || async { seen.len() == 2 }).await;
    assert_eq!(fixture.states("s").await, [(Leased, 1), (Leased, 1)]);
    fixture.delivered(2).await;
    for worker in workers {
        worker.stop().await;
    }
    assert_eq!((seen.of("a"), seen.of("b")), (vec![0], vec![0]));
    assert_eq!(fixture.states("s").await, [(Delivered, 1), (Delivered, 1)]);
}

/// What another worker does that takes a lane over: its lease lasts long enough for this test.
const TAKE_OVER: &str = "
    update outbox_lanes
       set lease_token = lease_token + 1, leased_by = 'other', attempts = attempts + 1,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+0.6 seconds')";

/// Renewals are far away: the loss is noticed when the result is to be stored.
async fn a_late_result_changes_nothing(answer: fn() -> Result<(), DeliveryError>) {
    let fixture = Fixture::new().await;
    let (seen, gate) = (Seen::default(), Arc::new(Semaphore::new(0)));
    let handlers = {
        let (seen, gate) = (seen.clone(), gate.clone());
        Handlers::new().on(move |event: Noted, delivery| {
            seen.add(&event, &delivery);
            let (gate, first) = (gate.clone(), seen.len() == 1);
            async move {
                if first {
                    gate.acquire().await?.forget();
                    return answer();
                }
                Ok(())
            }
        })
    };
    let worker = fixture.worker().lease(30_000 * MS).unwrap();
    let worker = run(worker.handlers(subscription("s"), handlers)).await;
    fixture.push([noted("a", 0)]).await;
    eventually("the handler is at work", || async { seen.len() == 1 }).await;
    fixture.execute(TAKE_OVER).await;
    gate.add_permits(1);
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 3)]);
    assert_eq!(seen.len(), 2);
    assert_eq!(fixture.count("outbox_dead_letters").await, 0);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_success_after_a_lost_lease_changes_nothing() {
    a_late_result_changes_nothing(|| Ok(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_failure_after_a_lost_lease_changes_nothing() {
    a_late_result_changes_nothing(|| Err(DeliveryError::retry("late"))).await;
    a_late_result_changes_nothing(|| Err(DeliveryError::permanent("late"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_whose_lease_was_lost_is_cancelled_at_the_next_renewal() {
    struct Count(Arc<AtomicUsize>);
    impl Drop for Count {
        fn drop(&mut self) {
            self.0.fetch_add(1, SeqCst);
        }
    }
    let fixture = Fixture::new().await;
    let (seen, cancelled) = (Seen::default(), Arc::new(AtomicUsize::new(0)));
    let handlers = {
        let (seen, cancelled) = (seen.clone(), cancelled.clone());
        Handlers::new().on(move |event: Noted, delivery| {
            seen.add(&event, &delivery);
            let (dropped, first) = (Count(cancelled.clone()), seen.len() == 1);
            async move {
                let _dropped = dropped;
                if first {
                    std::future::pending::<()>().await;
                }
                Ok(())
            }
        })
    };
    let worker = fixture.worker().lease(1200 * MS).unwrap().timeout(NEVER).unwrap();
    let worker = run(worker.handlers(subscription("s"), handlers)).await;
    fixture.push([noted("a", 0)]).await;
    eventually("the handler is at work", || async { seen.len() == 1 }).await;
    fixture.execute(TAKE_OVER).await;
    within(800 * MS, "the cancellation", || async { cancelled.load(SeqCst) == 1 }).await;
    assert_eq!(fixture.count("outbox_delivered").await, 0);
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(seen.len(), 2);
}

/// A machine that was asleep finds its own leases over and takes the same lanes again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_claims_its_own_lanes_again_starts_each_delivery_once() {
    let fixture = Fixture::new().await;
    let (seen, gate) = (Seen::default(), Arc::new(Semaphore::new(0)));
    let handlers = {
        let (seen, gate) = (seen.clone(), gate.clone());
        Handlers::new().on(move |event: Noted, delivery| {
            seen.add(&event, &delivery);
            let gate = gate.clone();
            async move {
                if event.key.starts_with("slow") {
                    gate.acquire().await?.forget();
                }
                // Long enough for a second start.
                tokio::time::sleep(20 * MS).await;
                Ok(())
            }
        })
    };
    let worker = fixture.worker().lease(30_000 * MS).unwrap().concurrency(4).unwrap();
    let worker = run(worker.handlers(subscription("s"), handlers)).await;
    fixture.push(each_noted(&["slow 1", "slow 2", "slow 3", "slow 4"], 1)).await;
    eventually("all are at work", || async { seen.len() == 4 }).await;
    fixture.push(each_noted(&["a", "b"], 3)).await;
    eventually("two lanes wait", || async { fixture.count("outbox_lanes where leased_by is not null").await == 6 })
        .await;
    let over =
        "update outbox_lanes set due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') where key in ('note/a', 'note/b')";
    fixture.execute(over).await;
    let claimed = "outbox_lanes where key in ('note/a', 'note/b') and attempts = 2";
    eventually("they are claimed again", || async { fixture.count(claimed).await == 2 }).await;
    gate.add_permits(4);
    fixture.delivered(10).await;
    // What was counted wrongly would be missing here.
    fixture.push((0..40).map(|n| noted(&format!("late {n}"), 0))).await;
    fixture.delivered(50).await;
    worker.stop().await;
    assert_eq!((seen.of("a"), seen.of("b")), (vec![0, 1, 2], vec![0, 1, 2]));
    assert_eq!(seen.len(), 50);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_that_block_every_thread_stop_no_renewal_and_become_dead_letters() {
    let fixture = Fixture::new().await;
    let blocked = Seen::default();
    let blocking = blocked.answering(|_, _| {
        std::thread::sleep(900 * MS);
        Ok(())
    });
    // Leases last 300 ms, attempts 400 ms: without renewal a lease would run out under an attempt.
    let worker = fixture.worker().lease(300 * MS).unwrap().timeout(400 * MS).unwrap();
    let worker = run(worker.handlers(subscription("s").retry(policy(2)), blocking)).await;
    let (url, seen) = (fixture.url(), blocked.clone());
    // On a thread of its own: those of this runtime are blocked.
    let witness = std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let outbox = Outbox::connect(&url, 1).await.unwrap();
            eventually("both threads are blocked", || async { seen.len() >= 2 }).await;
            let over = "select count(*) from outbox_lanes where leased_by is not null
                          and due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";
            let mut ran_out = 0;
            for _ in 0..35 {
                tokio::time::sleep(10 * MS).await;
                let row = outbox.reader().query_one_raw(Statement::from_string(DbBackend::Sqlite, over)).await;
                ran_out += row.unwrap().unwrap().try_get_by_index::<i64>(0).unwrap();
            }
            ran_out
        })
    });
    // As many as there are threads.
    fixture.push([noted("a", 0), noted("b", 0)]).await;
    let dead = || async { fixture.count("outbox_dead_letters").await == 2 };
    within(Duration::from_secs(15), "the dead letters", dead).await;
    assert_eq!(witness.join().unwrap(), 0, "leases that ran out");
    let errors: Vec<String> = fixture.column("select error from outbox_dead_letters").await;
    assert!(errors.iter().all(|error| error.contains("no result within 400ms")), "{errors:?}");
    worker.stop().await;
}
