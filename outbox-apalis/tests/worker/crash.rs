use outbox_seaorm::{DeliveryState::Delivered, Outbox};
use tokio::runtime::Handle;

use crate::fixture::{Fixture, MS, Seen, each_noted, eventually, hanging, noted, run, subscription, worker};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_had_leased_is_delivered_by_another_after_the_lease() {
    let fixture = Fixture::new().await;
    let (lost, seen, url) = (Seen::default(), Seen::default(), fixture.url());
    let killed = {
        let lost = lost.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let outbox = Outbox::connect(&url, 1).await.unwrap();
            let worker = worker(&outbox).lease(700 * MS).unwrap().concurrency(2).unwrap();
            worker.handlers(subscription("s"), hanging(&lost)).run_until(std::future::pending()).await.unwrap();
        });
        runtime
    };
    eventually("it is registered", || async { fixture.count("outbox_subscriptions").await == 1 }).await;
    fixture.push(each_noted(&["a", "b", "c"], 2)).await;
    eventually("two are at work", || async { lost.len() == 2 }).await;
    killed.shutdown_background();
    eventually("nothing of it is left", || async { fixture.outbox.writer().ping().await.is_ok() }).await;
    assert_eq!(fixture.count("outbox_lanes where leased_by is not null").await, 3);

    let second = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.delivered(6).await;
    second.stop().await;
    assert!(["a", "b", "c"].iter().all(|key| seen.of(key) == [0, 1]));
    // Three lanes were leased: their heads count the attempt that was lost.
    assert_eq!(fixture.states("s").await, [[(Delivered, 2); 3], [(Delivered, 1); 3]].concat());
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dropped_worker_had_under_way_is_delivered_by_another() {
    let fixture = Fixture::new().await;
    let (lost, seen) = (Seen::default(), Seen::default());
    let first = run(fixture.worker().concurrency(1).unwrap().handlers(subscription("s"), hanging(&lost))).await;
    fixture.push(each_noted(&["a", "b", "c"], 2)).await;
    eventually("one is at work", || async { lost.len() == 1 }).await;
    first.drop_future().await;
    let second = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.delivered(6).await;
    second.stop().await;
    assert!(["a", "b", "c"].iter().all(|key| seen.of(key) == [0, 1]));
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_dropped_worker_goes_on() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let first = run(fixture.worker().handlers(subscription("s"), hanging(&seen))).await;
    fixture.push([noted("a", 0)]).await;
    eventually("the first heartbeat", || async { fixture.count("outbox_workers").await == 1 }).await;
    eventually("it is at work", || async { seen.len() == 1 }).await;
    assert!(tasks() > before);
    first.drop_future().await;
    eventually("its tasks end", || async { tasks() <= before }).await;
}
