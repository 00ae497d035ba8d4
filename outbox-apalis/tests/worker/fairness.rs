//! Tenants share the slots of a subscription; limits that hold for all workers together.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use outbox_apalis::Handlers;
use outbox_core::{Context, Delivery};
use outbox_seaorm::Outbox;

use super::fixture::{Fixture, MS, Noted, eventually, noted, run, subscription};

/// Events of new keys, committed by a tenant.
async fn push_of(outbox: &Outbox, tenant: Option<&str>, events: usize) {
    let mut context = Context::default();
    context.tenant = tenant.map(str::to_owned);
    let unit = outbox.begin(context);
    for n in 0..events {
        unit.events().push(noted(&format!("{tenant:?} {n} {:x}", fastrand::u64(..)), 0)).unwrap();
    }
    unit.commit().await.unwrap();
}

/// Attempts under way, by tenant, and how many there were at most.
#[derive(Clone, Default)]
struct UnderWay {
    now: Arc<Mutex<HashMap<Option<String>, (usize, usize)>>>,
}

impl UnderWay {
    fn handlers(&self, takes: Duration) -> Handlers {
        let now = self.now.clone();
        Handlers::new().on(move |_: Noted, delivery: Delivery| {
            let (now, tenant) = (now.clone(), delivery.event().tenant.clone());
            async move {
                {
                    let mut now = now.lock().unwrap();
                    let (running, most) = now.entry(tenant.clone()).or_default();
                    *running += 1;
                    *most = (*most).max(*running);
                }
                tokio::time::sleep(takes).await;
                now.lock().unwrap().get_mut(&tenant).unwrap().0 -= 1;
                Ok(())
            }
        })
    }

    fn most(&self, tenant: &str) -> usize {
        self.now.lock().unwrap().get(&Some(tenant.to_owned())).map_or(0, |(_, most)| *most)
    }
}

/// What is delivered of a tenant, of whom all else waits for.
async fn delivered_of(fixture: &Fixture, tenant: &str) -> i64 {
    let sql = format!(
        "select count(*) as n from outbox_delivered d join outbox_events e on e.position = d.position \
          where e.tenant = '{tenant}'"
    );
    fixture.rows(&sql).await[0].try_get("", "n").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_tenant_does_not_hold_up_the_others() {
    let fixture = Fixture::new().await;
    let under_way = UnderWay::default();
    let worker = fixture.worker().concurrency(4).unwrap();
    let worker = run(worker.handlers(subscription("s"), under_way.handlers(20 * MS))).await;
    push_of(&fixture.outbox, Some("busy"), 400).await;
    eventually("the busy one has all slots", || async { under_way.most("busy") == 4 }).await;
    for tenant in ["a", "b", "c"] {
        push_of(&fixture.outbox, Some(tenant), 2).await;
    }
    let others = || async {
        let mut delivered = 0;
        for tenant in ["a", "b", "c"] {
            delivered += delivered_of(&fixture, tenant).await;
        }
        delivered == 6
    };
    eventually("the others are delivered", others).await;
    // 400 of them take two seconds and more.
    let of_busy = delivered_of(&fixture, "busy").await;
    assert!(of_busy < 200, "{of_busy} of the busy one came before the others");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_of_a_tenant_are_under_way_than_its_limit() {
    let fixture = Fixture::new().await;
    let under_way = UnderWay::default();
    let limited = subscription("s").concurrency_per_tenant(2).unwrap();
    let worker = run(fixture.worker().concurrency(10).unwrap().handlers(limited, under_way.handlers(5 * MS))).await;
    push_of(&fixture.outbox, Some("a"), 20).await;
    push_of(&fixture.outbox, Some("b"), 20).await;
    fixture.delivered(40).await;
    worker.stop().await;
    assert_eq!((under_way.most("a"), under_way.most("b")), (2, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_keep_the_rate_that_they_have_together() {
    let fixture = Fixture::new().await;
    let begun: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let handlers = || {
        let begun = begun.clone();
        Handlers::new().on(move |_: Noted, _| {
            begun.lock().unwrap().push(Instant::now());
            std::future::ready(Ok(()))
        })
    };
    let limited = subscription("s").fleet_rate(100.0).unwrap();
    let one = run(fixture.worker().handlers(limited.clone(), handlers())).await;
    let other = run(fixture.worker().handlers(limited, handlers())).await;
    push_of(&fixture.outbox, None, 250).await;
    fixture.delivered(250).await;
    one.stop().await;
    other.stop().await;
    let mut begun = begun.lock().unwrap().clone();
    begun.sort_unstable();
    // Whatever is reserved late may come faster for 50 ms, of each worker.
    let took = begun[249] - begun[0];
    assert!(took >= Duration::from_millis(2250), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_starts_beside_another_has_its_share_and_both_keep_to_the_whole() {
    let fixture = Fixture::new().await;
    let (at_work, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let of: Arc<Mutex<Vec<usize>>> = Arc::default();
    let handlers = |worker: usize| {
        let (at_work, most, of) = (at_work.clone(), most.clone(), of.clone());
        Handlers::new().on(move |_: Noted, _| {
            let (at_work, most, of) = (at_work.clone(), most.clone(), of.clone());
            async move {
                most.fetch_max(at_work.fetch_add(1, SeqCst) + 1, SeqCst);
                of.lock().unwrap().push(worker);
                tokio::time::sleep(20 * MS).await;
                at_work.fetch_sub(1, SeqCst);
                Ok(())
            }
        })
    };
    let limited = subscription("s").fleet_concurrency(3).unwrap();
    let one = run(fixture.worker().handlers(limited.clone(), handlers(1))).await;
    push_of(&fixture.outbox, None, 20).await;
    fixture.delivered(20).await;
    assert_eq!(most.load(SeqCst), 3, "it is alone");
    // Between two heartbeats of the first: it knows of the other before that begins.
    tokio::time::sleep(2 * Duration::from_secs(1)).await;
    let other = run(fixture.worker().handlers(limited, handlers(2))).await;
    push_of(&fixture.outbox, None, 2000).await;
    let both = || async { of.lock().unwrap().iter().filter(|worker| **worker == 2).count() > 20 };
    eventually("the other one has its share", both).await;
    assert_eq!(most.load(SeqCst), 3, "both together");
    one.stop().await;
    other.stop().await;
}
