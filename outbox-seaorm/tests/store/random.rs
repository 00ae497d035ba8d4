use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use fastrand::Rng;
use outbox_core::{AttemptLog, Context, NewEvent, Ordering, Subscription};
use outbox_seaorm::{ClaimedLane, Next, Settled};

use super::fixture::{LONG, Store, delivered, todo};

/// What two subscriptions, one in order and one without, have got: (subscription, key) with its positions.
#[derive(Default)]
struct Delivered {
    in_order: HashMap<(i32, String), Vec<i64>>,
}

impl Delivered {
    fn add(&mut self, lane: &ClaimedLane, finished: usize) {
        let run = self.in_order.entry((lane.lane.subscription, lane.lane.key.clone())).or_default();
        for event in &lane.run[..finished] {
            assert!(run.last() < Some(&event.position), "{} after {run:?} in {:?}", event.position, lane.lane);
            run.push(event.position);
        }
    }

    fn of(&self, subscription: i32) -> BTreeSet<i64> {
        let lanes = self.in_order.iter().filter(|((id, _), _)| *id == subscription);
        lanes.flat_map(|(_, positions)| positions.iter().copied()).collect()
    }
}

fn random_event(random: &mut Rng) -> NewEvent {
    let event = todo(random.choice(["a", "b", "c", "d"]).unwrap());
    match random.u8(..10) {
        0 => event.delay(Duration::from_millis(random.u64(..4))),
        1 => event.priority(random.i16(..3)),
        _ => event,
    }
}

/// A part of a run is over, dead or delivered, and the rest is kept, given back or tried again.
async fn report(store: &Store, random: &mut Rng, lane: &mut ClaimedLane, done: &mut Delivered) -> bool {
    let finished = random.usize(..=lane.run.len());
    let next = match random.u8(..4) {
        0 if finished < lane.run.len() => Next::Keep,
        1 if finished < lane.run.len() => {
            let after = Duration::from_millis(random.u64(..3));
            Next::Retry { after, attempts: lane.attempts, error: "down".to_owned(), log: AttemptLog::default() }
        }
        2 if finished == 0 => Next::Release { attempts: lane.attempts - 1, log: AttemptLog::default() },
        _ => Next::Yield,
    };
    let keeps = matches!(next, Next::Keep);
    let mut report = delivered(lane, finished, next);
    for delivery in report.finished.iter_mut().filter(|_| random.u8(..5) == 0) {
        delivery.error = Some("no".to_owned());
    }
    let settled = if random.bool() {
        store.outbox.settle(&[report]).await.unwrap()[0]
    } else {
        store.outbox.begin(Context::default()).commit_with(report).await.unwrap()
    };
    if settled == Settled::Done {
        done.add(lane, finished);
        lane.run.drain(..finished);
        lane.attempts = 1;
    }
    keeps && settled == Settled::Done
}

#[tokio::test]
async fn whatever_workers_do_every_event_is_finished_once_and_in_the_order_of_its_key() {
    for seed in 0..4 {
        let mut random = Rng::with_seed(seed);
        let store = Store::new().await;
        let ids = [
            store.subscribe("ordered").await,
            store.register(Subscription::new("unordered").unwrap().ordering(Ordering::None)).await,
        ];
        let (mut held, mut done) = (Vec::<ClaimedLane>::new(), Delivered::default());
        for step in 0..150 {
            match random.u8(..10) {
                0..=2 => {
                    let events: Vec<_> = (0..random.u8(1..4)).map(|_| random_event(&mut random)).collect();
                    store.record(events).await;
                }
                3..=5 => {
                    let lease = if random.bool() { LONG } else { Duration::from_millis(random.u64(..3)) };
                    let (lanes, run) = (random.u32(1..4), random.u32(1..4));
                    let id = *random.choice(&ids).unwrap();
                    held.extend(store.outbox.claim(id, "worker", lanes, run, lease).await.unwrap().lanes);
                }
                6 if !held.is_empty() => {
                    let lanes: Vec<_> = held.iter().map(|lane| lane.lane.clone()).collect();
                    store.outbox.renew(&lanes, Duration::from_millis(random.u64(..5))).await.unwrap();
                }
                _ if !held.is_empty() => {
                    let mut lane = held.swap_remove(random.usize(..held.len()));
                    if report(&store, &mut random, &mut lane, &mut done).await {
                        held.push(lane);
                    }
                }
                _ => {}
            }
            if step % 10 == 0 {
                store.is_whole().await;
            }
        }
        // All workers die; one finishes everything.
        let mut rounds = 0..1000;
        while store.count("outbox_deliveries").await > 0 {
            assert!(rounds.next().is_some(), "deliveries are left that nobody can finish");
            store.time_passes().await;
            for id in ids {
                for lane in store.claim(id).await {
                    let finished = lane.run.len();
                    assert_eq!(
                        store.outbox.settle(&[delivered(&lane, finished, Next::Yield)]).await.unwrap(),
                        [Settled::Done]
                    );
                    done.add(&lane, finished);
                }
            }
        }
        let events: BTreeSet<i64> = store.column("select position from outbox_events").await.into_iter().collect();
        for id in ids {
            assert_eq!(done.of(id), events, "seed {seed}");
        }
        assert_eq!(store.count("outbox_lanes").await, 0);
        store.is_whole().await;
    }
}
