use std::time::Duration;

use outbox_apalis::Handlers;
use outbox_core::{DeliveryError, Event, Jitter, NewEvent, RetryPolicy};
use outbox_seaorm::DeliveryState::{Dead, Delivered, Pending};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::fixture::{
    Fixture, MS, NEVER, Noted, Seen, counted, each_noted, eventually, hanging, noted, policy, push, run, subscription,
    within, worker,
};

/// Stores each wait between attempts as the database computed it.
const WAITS: &str = "
    create table waits (key text, attempts integer, wait real);
    create trigger waits after update of due_at on outbox_lanes
      when new.last_error is not null and new.leased_by is null
    begin
      insert into waits values (new.key, new.attempts, (julianday(new.due_at) - julianday('now')) * 86400000);
    end";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_delivery_is_tried_at_growing_and_jittered_times_and_becomes_a_dead_letter() {
    let fixture = Fixture::new().await;
    fixture.execute(WAITS).await;
    let seen = Seen::default();
    let policy = RetryPolicy::default().max_attempts(5).unwrap().backoff(40 * MS, 150 * MS).unwrap();
    let handlers = seen.answering(|_, attempt| Err(DeliveryError::retry(format!("no answer to attempt {attempt}"))));
    let worker = run(fixture.worker().poll(NEVER).unwrap().handlers(subscription("s").retry(policy), handlers)).await;
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    fixture.push(each_noted(&keys, 1)).await;
    fixture.dead(8).await;
    worker.stop().await;

    for (attempts, wait) in [(1, 40.0), (2, 80.0), (3, 150.0), (4, 150.0)] {
        let waits: Vec<f64> = fixture.column(&format!("select wait from waits where attempts = {attempts}")).await;
        assert_eq!(waits.len(), 8);
        assert!(waits.iter().all(|each| (wait / 2.0 - 1.0..=wait + 1.0).contains(each)), "{attempts}: {waits:?}");
        let (least, most) = waits.iter().fold((f64::MAX, 0.0_f64), |(a, b), each| (a.min(*each), b.max(*each)));
        assert!(most - least > 1.0, "{attempts}: no jitter: {waits:?}");
    }
    for key in keys {
        let calls: Vec<_> = seen.calls().into_iter().filter(|call| call.key == key).collect();
        assert_eq!(calls.iter().map(|call| call.attempt).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        for (attempts, pair) in (1..).zip(calls.windows(2)) {
            let sql = format!("select wait from waits where attempts = {attempts} and key = 'note/{key}'");
            let wait = Duration::from_secs_f64(fixture.value::<f64>(&sql).await / 1000.0);
            assert!(pair[1].at - pair[0].at + 2 * MS >= wait, "attempt {attempts} came early");
        }
    }
    let (error, log): (Vec<String>, Vec<String>) = (
        fixture.column("select error from outbox_dead_letters").await,
        fixture.column("select attempt_log from outbox_dead_letters").await,
    );
    assert_eq!(error, ["no answer to attempt 5"; 8]);
    for log in log {
        let log: Vec<Value> = serde_json::from_str(&log).unwrap();
        for (attempt, entry) in (1..).zip(&log) {
            assert_eq!(entry["attempt"], json!(attempt));
            assert_eq!(entry["error"], json!(format!("no answer to attempt {attempt}")));
            assert!(entry["at"].is_string() && entry["worker"].is_string() && entry["milliseconds"].is_number());
        }
        assert_eq!(log.len(), 5);
    }
    fixture.is_at_rest().await;
    assert_eq!(fixture.states("s").await, [(Dead, 5); 8]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_attempt_waits_for_the_poll_when_its_time_has_come() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|_, _| Err(DeliveryError::retry("no")));
    let retry = RetryPolicy::default().max_attempts(15).unwrap().backoff(11 * MS, 11 * MS).unwrap();
    let retry = retry.jitter(Jitter::Full);
    let outbox = fixture.slowly_reading_outbox().await;
    let worker = run(worker(&outbox).poll(NEVER).unwrap().handlers(subscription("s").retry(retry), handlers)).await;
    push(&outbox, each_noted(&["a", "b", "c"], 1)).await;
    fixture.dead(3).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Dead, 15); 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn between_attempts_the_delivery_shows_its_last_error_and_the_failed_attempts() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let retry = RetryPolicy::default().backoff(NEVER, NEVER).unwrap();
    let handlers = seen.answering(|_, _| Err(DeliveryError::retry("the mail server is away")));
    let worker = run(fixture.worker().handlers(subscription("s").retry(retry), handlers)).await;
    fixture.push([noted("a", 0), noted("a", 1)]).await;
    let failed = "outbox_lanes where leased_by is null and last_error is not null";
    eventually("the failure", || async { fixture.count(failed).await == 1 }).await;
    assert_eq!(fixture.states("s").await, [(Pending, 1), (Pending, 0)]);
    assert_eq!(fixture.deliveries("s").await[0].error.as_deref(), Some("the mail server is away"));
    let log: String = fixture.value("select attempt_log from outbox_lanes").await;
    assert_eq!(serde_json::from_str::<Value>(&log).unwrap()[0]["error"], json!("the mail server is away"));
    worker.stop().await;
    assert_eq!(seen.of("a"), [0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_success_after_failures_keeps_their_log() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|_, attempt| if attempt < 3 { Err(DeliveryError::retry("not yet")) } else { Ok(()) });
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.push([noted("a", 0), noted("a", 1)]).await;
    fixture.delivered(2).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 3); 2]);
    for log in fixture.column::<String>("select attempt_log from outbox_delivered").await {
        assert_eq!(serde_json::from_str::<Vec<Value>>(&log).unwrap().len(), 2);
    }
    assert_eq!(seen.of("a"), [0, 0, 0, 1, 1, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_events_own_limit_of_attempts_wins() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|_, _| Err(DeliveryError::retry("no")));
    let worker = run(fixture.worker().handlers(subscription("s").retry(policy(3)), handlers)).await;
    fixture.push([noted("a", 0), noted("b", 0).max_attempts(1), noted("c", 0).max_attempts(5)]).await;
    fixture.dead(3).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Dead, 3), (Dead, 1), (Dead, 5)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_may_ask_for_a_longer_wait_but_not_for_a_shorter_one() {
    let fixture = Fixture::new().await;
    fixture.execute(WAITS).await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, attempt| {
        let asked = if event.key == "long" { 300 * MS } else { MS };
        if attempt == 1 { Err(DeliveryError::retry_after(asked, "busy")) } else { Ok(()) }
    });
    let retry = RetryPolicy::default().backoff(100 * MS, 100 * MS).unwrap();
    let worker = run(fixture.worker().handlers(subscription("s").retry(retry), handlers)).await;
    fixture.push([noted("long", 0), noted("short", 0)]).await;
    fixture.delivered(2).await;
    worker.stop().await;
    let wait = |key| format!("select wait from waits where key = 'note/{key}'");
    let (long, short): (f64, f64) = (fixture.value(&wait("long")).await, fixture.value(&wait("short")).await);
    assert!((299.0..=301.0).contains(&long), "{long}");
    assert!((49.0..=101.0).contains(&short), "{short}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_asks_for_an_endless_wait_stops_nothing_else() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| match event.key.as_str() {
        "endless" => Err(DeliveryError::retry_after(Duration::MAX, "never again")),
        _ => Ok(()),
    });
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.push([noted("endless", 0), noted("a", 0)]).await;
    fixture.delivered(1).await;
    fixture.push([noted("b", 0)]).await;
    fixture.delivered(2).await;
    worker.stop().await;
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permanent_error_is_a_dead_letter_after_one_attempt_and_the_lane_goes_on() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| match event.n {
        1 => Err(DeliveryError::permanent("no such address")),
        _ => Ok(()),
    });
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.push(each_noted(&["a"], 3)).await;
    fixture.delivered(2).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1), (Dead, 1), (Delivered, 1)]);
    assert_eq!(fixture.deliveries("s").await[1].error.as_deref(), Some("no such address"));
    assert_eq!(seen.of("a"), [0, 1, 2]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_is_a_failed_attempt_that_disturbs_nobody_else() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| {
        assert!(event.n != 1, "number {} is unlucky", event.n);
        Ok(())
    });
    let worker = run(fixture.worker().handlers(subscription("s").retry(policy(2)), handlers)).await;
    fixture.push(each_noted(&["a", "b"], 3)).await;
    fixture.delivered(4).await;
    fixture.dead(2).await;
    worker.stop().await;
    let errors: Vec<String> = fixture.column("select error from outbox_dead_letters").await;
    assert_eq!(errors, ["the handler panicked: number 1 is unlucky"; 2]);
    assert_eq!((seen.of("a"), seen.of("b")), (vec![0, 1, 1, 2], vec![0, 1, 1, 2]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_cannot_be_decoded_is_a_dead_letter_at_once() {
    let fixture = Fixture::new().await;
    let (plain, seen) = (Seen::default(), Seen::default());
    let transactional = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            async { Ok(()) }
        })
    };
    let worker = fixture.worker().handlers(subscription("plain"), plain.handlers());
    let started = worker.handlers(subscription("transactional"), transactional).start().await.unwrap();
    fixture.push(each_noted(&["a", "b"], 3)).await;
    let broken = "update outbox_events set payload = '{\"key\":7}' where payload = '{\"key\":\"a\",\"n\":1}'";
    fixture.execute(broken).await;
    started.run_until(fixture.delivered(10)).await;
    assert_eq!(fixture.count("outbox_inbox").await, 5, "a dead letter is not handled");
    for (name, seen) in [("plain", plain), ("transactional", seen)] {
        assert_eq!((seen.of("a"), seen.of("b")), (vec![0, 2], vec![0, 1, 2]), "{name}");
        let dead: Vec<_> = fixture.deliveries(name).await.into_iter().filter(|each| each.state == Dead).collect();
        let (error, attempts) = (dead[0].error.as_deref().unwrap(), dead[0].attempts);
        assert_eq!((dead.len(), attempts), (1, 1));
        assert!(error.starts_with("the payload of note.noted version 1 cannot be decoded: invalid type"), "{error}");
    }
}

/// A later version of the same event.
#[derive(Serialize, Deserialize)]
struct NotedBetter {
    key: String,
    text: String,
}

impl Event for NotedBetter {
    const TYPE: &'static str = Noted::TYPE;
    const AGGREGATE_TYPE: &'static str = Noted::AGGREGATE_TYPE;
    const SCHEMA_VERSION: i32 = 2;

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_without_handler_waits_for_a_worker_that_has_one() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    let better = NewEvent::of(&NotedBetter { key: "b".to_owned(), text: String::new() }).unwrap();
    fixture.push([noted("a", 0), counted("a", 1), noted("a", 2), better, noted("c", 0)]).await;
    let left_alone = "outbox_lanes where leased_by is null and attempts = 0 and last_error is not null";
    eventually("two lanes wait", || async { fixture.count(left_alone).await == 2 }).await;
    fixture.delivered(2).await;
    worker.stop().await;
    let waiting = [(Delivered, 1), (Pending, 0), (Pending, 0), (Pending, 0), (Delivered, 1)];
    assert_eq!(fixture.states("s").await, waiting);
    let errors: Vec<String> = fixture.column("select last_error from outbox_lanes order by key").await;
    assert_eq!(errors[0], "no handler in this worker for note.counted version 1; no attempt was spent");
    assert_eq!(errors[1], "no handler in this worker for note.noted version 2; no attempt was spent");

    fixture.execute("update outbox_lanes set due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')").await;
    let handlers = seen.handlers();
    let handlers = handlers.on(|_: crate::fixture::Counted, _| async { Ok(()) });
    let handlers = handlers.on(|_: NotedBetter, _| async { Ok(()) });
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.delivered(5).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 5]);
    assert_eq!(seen.of("a"), [0, 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_handler_is_cancelled_after_the_timeout_and_its_neighbours_go_on() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = {
        let seen = seen.clone();
        Handlers::new().on(move |event: Noted, delivery| {
            seen.add(&event, &delivery);
            async move {
                if event.key == "hangs" && event.n == 0 {
                    std::future::pending::<()>().await;
                }
                Ok(())
            }
        })
    };
    let worker = fixture.worker().timeout(100 * MS).unwrap().concurrency(2).unwrap();
    let worker = run(worker.handlers(subscription("s").retry(policy(3)), handlers)).await;
    fixture.push(each_noted(&["hangs", "a", "b"], 2)).await;
    fixture.delivered(5).await;
    worker.stop().await;
    assert_eq!(seen.of("hangs"), [0, 0, 0, 1]);
    let calls: Vec<_> = seen.calls().into_iter().filter(|call| call.key == "hangs").collect();
    assert!(calls.windows(2).take(2).all(|pair| (100 * MS..800 * MS).contains(&(pair[1].at - pair[0].at))));
    let (error, attempts) = (&fixture.deliveries("s").await[0].error, fixture.states("s").await[0].1);
    assert_eq!((error.as_deref(), attempts), (Some("no result within 100ms"), 3));
    assert_eq!((seen.of("a"), seen.of("b")), (vec![0, 1], vec![0, 1]));
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_never_yields_holds_up_no_other_delivery() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| {
        if event.key == "blocks" {
            std::thread::sleep(400 * MS);
        }
        Ok(())
    });
    let worker = run(fixture.worker().timeout(100 * MS).unwrap().handlers(subscription("s"), handlers)).await;
    fixture.push([noted("blocks", 0)]).await;
    eventually("the handler blocks", || async { seen.len() == 1 }).await;
    fixture.push([noted("a", 0)]).await;
    within(300 * MS, "the other delivery", || async { seen.of("a") == [0] }).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_that_killed_its_worker_alone_becomes_a_dead_letter_and_one_beside_others_does_not() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let subscription = subscription("s").retry(policy(3));
    let started = fixture.worker().handlers(subscription, seen.handlers()).start().await.unwrap();
    fixture.push([noted("kills", 0), noted("kills", 1), noted("unlucky", 0)]).await;
    // As workers leave it: killed in the third attempt, which was begun alone; and killed twenty times with others.
    let alone = r#"[{"attempt":3,"counted":3,"error":"tried alone","milliseconds":null}]"#;
    let kills = "leased_by = 'killed', attempts = 3, attempt_log = ";
    fixture.execute(&format!("update outbox_lanes set {kills} '{alone}' where key = 'note/kills'")).await;
    fixture.execute("update outbox_lanes set leased_by = 'killed', attempts = 20 where key = 'note/unlucky'").await;
    started.run_until(fixture.delivered(2)).await;
    assert_eq!(fixture.states("s").await, [(Dead, 3), (Delivered, 1), (Delivered, 21)]);
    let error = fixture.deliveries("s").await[0].error.clone().unwrap();
    assert!(error.contains("ended without a result"), "{error}");
    assert_eq!((seen.of("kills"), seen.of("unlucky")), (vec![1], vec![0]));
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_was_lowered_meanwhile_spends_one_more_attempt() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers =
        |seen: &Seen| seen.answering(|_, attempt| if attempt < 4 { Err(DeliveryError::retry("no")) } else { Ok(()) });
    let retry =
        RetryPolicy::default().max_attempts(9).unwrap().backoff(10 * MS, 300 * MS).unwrap().multiplier(5.0).unwrap();
    let worker = run(fixture.worker().handlers(subscription("s").retry(retry), handlers(&seen))).await;
    fixture.push([noted("a", 0)]).await;
    let failed = "outbox_lanes where leased_by is null and attempts = 3";
    eventually("three failures", || async { fixture.count(failed).await == 1 }).await;
    worker.stop().await;
    let worker = run(fixture.worker().handlers(subscription("s").retry(policy(2)), handlers(&seen))).await;
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 4)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_attempt_is_one_apalis_task_and_apalis_repeats_none() {
    let tasks = crate::board::apalis_tasks();
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|_, _| Err(DeliveryError::retry("no")));
    let worker = run(fixture.worker().handlers(subscription("attempts").retry(policy(3)), handlers)).await;
    let event = noted("a", 0);
    let task = format!("attempts:{}", event.id());
    fixture.push([event]).await;
    fixture.dead(1).await;
    worker.stop().await;
    let attempts: Vec<String> =
        tasks.lock().unwrap().iter().filter(|(id, _)| *id == task).map(|(_, attempt)| attempt.clone()).collect();
    assert_eq!(attempts, ["1", "2", "3"]);
    assert_eq!(seen.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_default_timeout_is_the_lease() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = fixture.worker().lease(200 * MS).unwrap();
    let worker = run(worker.handlers(subscription("s").retry(policy(1)), hanging(&seen))).await;
    fixture.push([noted("a", 0)]).await;
    fixture.dead(1).await;
    worker.stop().await;
    assert_eq!(fixture.deliveries("s").await[0].error.as_deref(), Some("no result within 200ms"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_were_damaged_by_hand_are_dead_letters_and_all_others_are_delivered() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = || fixture.worker().handlers(subscription("s"), seen.handlers());
    worker().drain().await.unwrap();
    let keys: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    fixture.push(keys.iter().map(|key| noted(key, 0))).await;
    fixture.push(keys.iter().map(|key| noted(key, 1))).await;
    for (position, damage) in [
        (10, "set payload = '{'"),
        (20, "set payload = x'ff00ff'"),
        (30, "set tags = '[1]'"),
        (40, "set event_id = x'00'"),
        (50, "set occurred_at = 'yesterday'"),
        (60, "set payload = '{\"key\": 7}'"),
    ] {
        fixture.execute(&format!("update outbox_events {damage} where position = {position}")).await;
    }
    fixture.execute("delete from outbox_events where position = 70").await;
    let done = worker().drain().await.unwrap();
    assert_eq!((done.delivered, done.dead), (193, 7));
    let errors: Vec<String> = fixture.column("select error from outbox_dead_letters order by position").await;
    let unreadable = errors.iter().filter(|error| error.starts_with("the event's row cannot be read: ")).count();
    assert_eq!(unreadable, 5, "{errors:?}");
    assert_eq!(errors[6], "the event's row cannot be read: it is gone");
    // The key of a damaged event goes on.
    assert_eq!(seen.of("9"), [1]);
    fixture.is_at_rest().await;
}
