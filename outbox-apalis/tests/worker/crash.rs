use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use outbox_apalis::{Handlers, Worker};
use outbox_core::DeliveryError;
use outbox_seaorm::{
    DeliveryState::{Dead, Delivered},
    Outbox,
};
use tokio::runtime::Handle;

use crate::fixture::{
    Fixture, MS, Noted, Seen, each_noted, eventually, hanging, noted, policy, run, subscription, within, worker,
};

/// How many deliveries are under way, and how many there were at most.
#[derive(Clone, Debug, Default)]
struct UnderWay(Arc<(AtomicUsize, AtomicUsize)>);

impl UnderWay {
    fn handlers(&self) -> Handlers {
        let Self(counts) = self.clone();
        Handlers::new().on(move |_: Noted, _| {
            let counts = counts.clone();
            async move {
                counts.1.fetch_max(counts.0.fetch_add(1, SeqCst) + 1, SeqCst);
                tokio::time::sleep(20 * MS).await;
                counts.0.fetch_sub(1, SeqCst);
                Ok(())
            }
        })
    }

    fn most(&self) -> usize {
        self.0.1.load(SeqCst)
    }
}

/// An outbox that counts its statements that write an attempt log before the attempt.
async fn counting_notes(fixture: &Fixture) -> (Outbox, Arc<AtomicUsize>) {
    let notes = Arc::new(AtomicUsize::new(0));
    let counted = notes.clone();
    let (mut writer, reader) = (fixture.impatient_connection().await, fixture.impatient_connection().await);
    writer.set_metric_callback(move |info| {
        let notes = info.statement.sql.contains("set attempt_log");
        counted.fetch_add(usize::from(notes), SeqCst);
    });
    (Outbox::with_connections(writer, reader), notes)
}

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

/// A worker whose deliveries have a single attempt.
fn with_one_attempt(outbox: &Outbox, under_way: &UnderWay) -> Worker {
    let worker = worker(outbox).lease(Duration::from_secs(30)).unwrap();
    worker.handlers(subscription("s").retry(policy(1)), under_way.handlers())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_had_leased_in_advance_is_tried_in_small_groups() {
    let fixture = Fixture::new().await;
    let (outbox, notes) = counting_notes(&fixture).await;
    let under_way = UnderWay::default();
    let started = with_one_attempt(&outbox, &under_way).start().await.unwrap();
    fixture.push((0..300).flat_map(|key| each_noted(&[&key.to_string()], 1))).await;
    fixture.execute("update outbox_lanes set leased_by = 'killed', attempts = 1").await;
    let all = || async { fixture.count("outbox_delivered").await == 300 };
    started.run_until(within(Duration::from_secs(30), "the deliveries", all)).await;
    let (most, notes) = (under_way.most(), notes.load(SeqCst));
    assert!(most > 1 && (300 / 32..=100).contains(&notes), "{most} at once, {notes} notes");
    // One attempt is all they had, and it was lost: that was not their fault.
    assert_eq!(fixture.states("s").await, [(Delivered, 2); 300]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_had_in_a_group_is_tried_alone() {
    let fixture = Fixture::new().await;
    let (outbox, notes) = counting_notes(&fixture).await;
    let under_way = UnderWay::default();
    let started = with_one_attempt(&outbox, &under_way).start().await.unwrap();
    fixture.push((0..20).flat_map(|key| each_noted(&[&key.to_string()], 1))).await;
    // Some were leased again, beside another group.
    let group = r#"[{"attempt":2,"counted":1,"error":"tried in a group","milliseconds":null,"group":32}]"#;
    let killed = format!("leased_by = 'killed', attempts = 2 + abs(random() % 3), attempt_log = '{group}'");
    fixture.execute(&format!("update outbox_lanes set {killed}")).await;
    started.run_until(fixture.delivered(20)).await;
    assert_eq!((under_way.most(), notes.load(SeqCst)), (1, 20));
    assert!(fixture.states("s").await.iter().all(|(state, _)| *state == Delivered));
    fixture.is_at_rest().await;
}

/// In the order in which they come into question as the one that killed the worker: those in question least first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_that_were_tried_alone_come_last() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let started = fixture.worker().handlers(subscription("s").retry(policy(3)), seen.handlers()).start().await.unwrap();
    fixture.push(["dead", "alone", "group", "leased"].map(|key| noted(key, 0))).await;
    for (key, attempts, log) in [
        ("dead", 4, r#"[{"attempt":4,"counted":3,"milliseconds":null}]"#),
        ("alone", 3, r#"[{"attempt":3,"counted":2,"milliseconds":null}]"#),
        ("group", 2, r#"[{"attempt":2,"counted":1,"milliseconds":null,"group":32}]"#),
        ("leased", 1, "null"),
    ] {
        let killed = format!("leased_by = 'killed', attempts = {attempts}, attempt_log = '{log}'");
        fixture.execute(&format!("update outbox_lanes set {killed} where key = 'note/{key}'")).await;
    }
    started.run_until(fixture.delivered(3)).await;
    assert_eq!(seen.calls().iter().map(|call| call.key.as_str()).collect::<Vec<_>>(), ["leased", "group", "alone"]);
    assert_eq!(fixture.states("s").await, [(Dead, 4), (Delivered, 4), (Delivered, 3), (Delivered, 2)]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_often_a_delivery_was_lost_beside_others_that_counts_once() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|_, _| Err(DeliveryError::retry("no")));
    let started = fixture.worker().handlers(subscription("s").retry(policy(3)), handlers).start().await.unwrap();
    let keys: Vec<String> = (0..12).map(|key| key.to_string()).collect();
    fixture.push(keys.iter().map(|key| noted(key, 0))).await;
    let group = r#"[{"attempt":2,"counted":1,"milliseconds":null,"group":32}]"#;
    fixture.execute("update outbox_lanes set leased_by = 'killed', attempts = 1 + abs(random() % 5)").await;
    let tried = format!("attempts = 2 + abs(random() % 5), attempt_log = '{group}'");
    fixture.execute(&format!("update outbox_lanes set {tried} where key in ('note/0', 'note/1', 'note/2')")).await;
    started.run_until(fixture.dead(12)).await;
    assert!(keys.iter().all(|key| seen.of(key) == [0, 0]), "one was lost, and two have failed");
    fixture.is_at_rest().await;
}
