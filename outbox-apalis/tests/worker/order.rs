use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use outbox_apalis::Handlers;
use outbox_core::{AfterDeadLetter, DeliveryError, Ordering};
use outbox_seaorm::DeliveryState::Delivered;
use sea_orm::ConnectionTrait;
use tokio::sync::Semaphore;

use crate::fixture::{
    Counted, Fixture, MS, Noted, Seen, counted, each_noted, eventually, hanging, noted, policy, run, subscription,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aggregate_that_fails_holds_back_only_itself() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| if event.key == "bad" { Err(DeliveryError::retry("no")) } else { Ok(()) });
    let retry = outbox_core::RetryPolicy::default().backoff(crate::fixture::NEVER, crate::fixture::NEVER).unwrap();
    let worker = run(fixture.worker().concurrency(1).unwrap().handlers(subscription("s").retry(retry), handlers)).await;
    fixture.push(each_noted(&["bad", "good"], 20)).await;
    fixture.delivered(20).await;
    worker.stop().await;
    assert_eq!((seen.of("bad"), seen.of("good")), (vec![0], (0..20).collect()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_events_of_an_aggregate_are_delivered_in_order_whatever_fails() {
    let fixture = Fixture::new().await;
    let (seen, delivered) = (Seen::default(), Seen::default());
    let handlers = {
        let (seen, delivered) = (seen.clone(), delivered.clone());
        Handlers::new().on(move |event: Noted, delivery| {
            let (seen, delivered) = (seen.clone(), delivered.clone());
            async move {
                seen.add(&event, &delivery);
                tokio::time::sleep(fastrand::u32(..3) * MS).await;
                if fastrand::u32(..8) == 0 {
                    return Err(DeliveryError::retry("bad luck"));
                }
                assert!(fastrand::u32(..40) != 0, "worse luck");
                delivered.add(&event, &delivery);
                Ok(())
            }
        })
    };
    let worker = fixture.worker().concurrency(8).unwrap().batch(7).unwrap();
    let worker = run(worker.handlers(subscription("s").retry(policy(100)), handlers)).await;
    let keys: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    // Some before the worker is at it, some while it is.
    for n in 0..20 {
        fixture.push(keys.iter().map(|key| noted(key, n))).await;
    }
    fixture.delivered(400).await;
    worker.stop().await;
    for key in keys {
        assert_eq!(delivered.of(key), (0..20).collect::<Vec<_>>(), "{key}");
        assert!(seen.of(key).is_sorted(), "{key}: {:?}", seen.of(key));
    }
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_order_a_failing_event_holds_back_nothing() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| if event.n == 0 { Err(DeliveryError::retry("no")) } else { Ok(()) });
    let subscription = subscription("s").ordering(Ordering::None);
    let worker = run(fixture.worker().handlers(subscription, handlers)).await;
    fixture.push(each_noted(&["a"], 10)).await;
    fixture.delivered(9).await;
    worker.stop().await;
    let mut delivered = seen.of("a");
    delivered.retain(|n| *n != 0);
    delivered.sort_unstable();
    assert_eq!(delivered, (1..10).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_global_order_every_event_waits_for_all_before_it() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers =
        seen.answering(
            |event, attempt| {
                if event.n % 3 == 0 && attempt == 1 { Err(DeliveryError::retry("no")) } else { Ok(()) }
            },
        );
    let subscription = subscription("s").ordering(Ordering::Global);
    let worker = run(fixture.worker().batch(4).unwrap().handlers(subscription, handlers)).await;
    fixture.push((0..12).map(|n| noted(&format!("{}", n % 5), n))).await;
    fixture.delivered(12).await;
    worker.stop().await;
    let order: Vec<i64> = seen.calls().iter().map(|call| call.n).collect();
    assert_eq!(order, [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_keeps_its_order_across_plain_and_transactional_handlers() {
    let fixture = Fixture::new().await;
    let handlers = || {
        let outbox = fixture.outbox.clone();
        Handlers::new()
            .on(move |event: Noted, delivery| {
                let outbox = outbox.clone();
                async move {
                    let sql =
                        format!("insert into effects values ('{}', {}, {})", event.key, event.n, delivery.attempt());
                    outbox.writer().execute_unprepared(&sql).await?;
                    Ok(())
                }
            })
            .on_tx(|event: Counted, effect| async move {
                let sql = format!("insert into effects values ('{}', {}, 1)", event.key, event.n);
                effect.tx().execute_unprepared(&sql).await?;
                if event.n % 7 == 0 && effect.delivery().attempt() == 1 {
                    return Err(DeliveryError::retry("once"));
                }
                Ok(())
            })
    };
    let worker = run(fixture.worker().batch(5).unwrap().handlers(subscription("s"), handlers())).await;
    let event = |key: &str, n: i64| if n % 3 == 0 { noted(key, n) } else { counted(key, n) };
    fixture.push((0..24).flat_map(|n| ["a", "b"].map(|key| event(key, n)))).await;
    fixture.delivered(48).await;
    worker.stop().await;
    for key in ["a", "b"] {
        let sql = format!("select n from effects where key = '{key}' order by rowid");
        assert_eq!(fixture.column::<i64>(&sql).await, (0..24).collect::<Vec<_>>(), "{key}");
    }
    let attempts: Vec<u32> = fixture.states("s").await.iter().map(|(_, attempts)| *attempts).collect();
    let expected: Vec<u32> = (0..48).map(|n| if (n / 2) % 7 == 0 && (n / 2) % 3 != 0 { 2 } else { 1 }).collect();
    assert_eq!(attempts, expected);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_subscription_delays_no_other() {
    let fixture = Fixture::new().await;
    let (slow, quick) = (Seen::default(), Seen::default());
    let worker = fixture.worker().concurrency(2).unwrap().shutdown_grace(MS);
    let worker =
        worker.handlers(subscription("slow"), hanging(&slow)).handlers(subscription("quick"), quick.handlers());
    let worker = run(worker).await;
    fixture.push(each_noted(&["a", "b", "c"], 10)).await;
    fixture.delivered(30).await;
    worker.stop().await;
    assert_eq!((slow.len(), quick.len()), (2, 30));
    assert_eq!(fixture.states("quick").await, [(Delivered, 1); 30]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_never_more_handlers_at_work_than_the_concurrency_allows() {
    let fixture = Fixture::new().await;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let handlers = {
        let (now, most, gate) = (now.clone(), most.clone(), gate.clone());
        Handlers::new().on(move |_: Noted, _| {
            let (now, most, gate) = (now.clone(), most.clone(), gate.clone());
            async move {
                most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                gate.acquire().await?.forget();
                tokio::time::sleep(MS).await;
                now.fetch_sub(1, SeqCst);
                if fastrand::bool() { Err(DeliveryError::retry("no")) } else { Ok(()) }
            }
        })
    };
    let worker = fixture.worker().concurrency(3).unwrap();
    let worker = run(worker.handlers(subscription("s").retry(policy(100)), handlers)).await;
    fixture.push((0..30).map(|n| noted(&n.to_string(), n))).await;
    eventually("three are at work", || async { now.load(SeqCst) == 3 }).await;
    gate.add_permits(10_000);
    fixture.delivered(30).await;
    worker.stop().await;
    assert_eq!(most.load(SeqCst), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_holds_its_key_if_that_is_wanted() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = || {
        seen.answering(|event, _| match (event.key.as_str(), event.n) {
            ("bad", 1) => Err(DeliveryError::permanent("no")),
            _ => Ok(()),
        })
    };
    let hold = || subscription("s").after_dead_letter(AfterDeadLetter::Hold);
    let worker = run(fixture.worker().handlers(hold(), handlers())).await;
    fixture.push(each_noted(&["bad", "good"], 4)).await;
    fixture.delivered(5).await;
    fixture.dead(1).await;
    // What comes later waits as well, also after a restart.
    worker.stop().await;
    let worker = run(fixture.worker().handlers(hold(), handlers())).await;
    fixture.push([noted("bad", 4), noted("good", 4)]).await;
    fixture.delivered(6).await;
    worker.stop().await;
    assert_eq!((seen.of("bad"), seen.of("good")), (vec![0, 1], (0..5).collect()));
    let held: Vec<i64> = fixture.column("select pending from outbox_lanes where held_at is not null").await;
    assert_eq!(held, [3]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_held_also_if_its_last_event_died() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| if event.n == 0 { Err(DeliveryError::permanent("no")) } else { Ok(()) });
    let hold = subscription("s").after_dead_letter(AfterDeadLetter::Hold);
    let worker = run(fixture.worker().handlers(hold, handlers)).await;
    fixture.push([noted("bad", 0)]).await;
    fixture.dead(1).await;
    fixture.push([noted("bad", 1), noted("good", 1)]).await;
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(seen.of("bad"), [0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_held_goes_on_when_an_operator_has_decided() {
    for discarded in [false, true] {
        let fixture = Fixture::new().await;
        let seen = Seen::default();
        let handlers = seen.answering(|event, _| match event.n {
            1 => Err(DeliveryError::permanent("no")),
            _ => Ok(()),
        });
        let hold = || subscription("s").after_dead_letter(AfterDeadLetter::Hold);
        let worker = || fixture.worker().handlers(hold(), seen.handlers());
        worker().drain().await.unwrap();
        fixture.push(each_noted(&["a"], 4)).await;
        fixture.worker().handlers(hold(), handlers).drain().await.unwrap();
        let (all, by) = (outbox_seaorm::DeadLetterFilter::default(), outbox_seaorm::By::new("me"));
        let done = match discarded {
            true => fixture.outbox.discard_dead_letters(&all, false, &by).await.unwrap(),
            false => fixture.outbox.replay_dead_letters(&all, false, &by).await.unwrap(),
        };
        assert_eq!(done.changed, 1);
        worker().drain().await.unwrap();
        let expected = if discarded { vec![0, 1, 2, 3] } else { vec![0, 1, 1, 2, 3] };
        assert_eq!(seen.of("a"), expected);
        fixture.is_at_rest().await;
    }
}
