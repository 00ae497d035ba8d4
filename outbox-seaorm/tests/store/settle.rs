use std::time::{Duration, Instant};

use outbox_core::{AttemptLog, Context};
use outbox_seaorm::{ClaimedLane, CommitError, Finished, LaneRef, LaneReport, Next, Settled};
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};

use super::{
    database,
    fixture::{
        LONG, SHORT, Store, attempt_log, delivered, delivered_run, eventually, failed, hang_up_after, is_about, record,
        runs, todo,
    },
};

/// A lane that a worker has lost, and the same lane as its next holder has it.
async fn taken_over(store: &Store, subscription: i32) -> (ClaimedLane, ClaimedLane) {
    let lost = store.claim_one(subscription, SHORT).await;
    (lost, store.claim_when_due(subscription).await.remove(0))
}

fn dead(lane: &ClaimedLane, n: usize, error: &str, next: Next) -> LaneReport {
    let mut report = delivered(lane, n, next);
    let head = report.finished.last_mut().unwrap();
    (head.error, head.log) = (Some(error.to_owned()), attempt_log(error));
    report
}

/// Everything that a report could change.
async fn tables(store: &Store) -> Vec<Value> {
    let mut rows = Vec::new();
    for (columns, from) in [
        (
            "subscription_id, key, position, cast(due_at as text)",
            "from outbox_deliveries order by subscription_id, position",
        ),
        (
            "subscription_id, key, pending, cast(due_at as text), attempts, lease_token, leased_by, last_error,
             cast(attempt_log as text)",
            "from outbox_lanes order by subscription_id, key",
        ),
        (
            "subscription_id, position, attempts, cast(attempt_log as text)",
            "from outbox_delivered order by subscription_id, position",
        ),
        ("subscription_id, position, attempts, error", "from outbox_dead_letters order by subscription_id, position"),
    ] {
        rows.extend(store.arrays(columns, from).await);
    }
    rows
}

#[tokio::test]
async fn a_result_that_comes_too_late_changes_nothing() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a"]).await;
    let (lost, held) = taken_over(&store, id).await;
    let before = tables(&store).await;
    for late in [
        delivered_run(&lost),
        delivered(&lost, 1, Next::Keep),
        dead(&lost, 1, "late", Next::Yield),
        failed(&lost, LONG, "late"),
        delivered(&lost, 0, Next::Release { attempts: 0, log: AttemptLog::default() }),
    ] {
        assert_eq!(store.outbox.settle(&[late]).await.unwrap(), [Settled::Superseded]);
        assert_eq!(tables(&store).await, before);
    }
    assert_eq!(store.outbox.settle(&[delivered_run(&held)]).await.unwrap(), [Settled::Done]);
    store.is_whole().await;
}

/// A failover that has lost a claim gives its token out again.
#[tokio::test]
async fn a_token_that_came_again_for_another_worker_is_no_lease() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a"]).await;
    let lost = store.claim_one(id, LONG).await;
    store.execute("update outbox_lanes set leased_by = 'another'").await;
    let (before, lane) = (tables(&store).await, std::slice::from_ref(&lost.lane));
    for late in [
        delivered_run(&lost),
        delivered(&lost, 1, Next::Keep),
        dead(&lost, 1, "late", Next::Hold { position: 1 }),
        failed(&lost, LONG, "late"),
        delivered(&lost, 0, Next::Release { attempts: 0, log: AttemptLog::default() }),
    ] {
        assert_eq!(store.outbox.settle(&[late]).await.unwrap(), [Settled::Superseded]);
    }
    assert_eq!(store.outbox.held(lane).await.unwrap(), []);
    assert_eq!(store.outbox.renew(lane, LONG).await.unwrap(), []);
    assert!(store.outbox.note_attempts(&[(lost.lane.clone(), AttemptLog::default())]).await.unwrap().is_empty());
    assert_eq!(tables(&store).await, before);
    // A relay that has lost its claim, and another one.
    store.execute("update outbox_lanes set leased_by = 'another (relay)'").await;
    let job = LaneRef { worker: "lost (relay)".to_owned(), ..lost.lane.clone() };
    assert!(store.outbox.take_over(id, "worker", &[job], 10, LONG).await.unwrap().is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn a_result_of_a_lane_that_is_gone_is_superseded() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let (lost, held) = taken_over(&store, id).await;
    store.outbox.settle(&[delivered_run(&held)]).await.unwrap();
    assert_eq!(store.count("outbox_lanes").await, 0);
    let late = [delivered_run(&lost), failed(&lost, LONG, "late"), delivered_run(&held)];
    assert_eq!(store.outbox.settle(&late).await.unwrap(), [Settled::Superseded; 3]);
    assert_eq!(store.count("outbox_delivered").await, 1);
    assert!(store.outbox.renew(&[lost.lane, held.lane], LONG).await.unwrap().is_empty());
    store.is_whole().await;
}

/// The lane is deleted when it is empty and made again by the next event of its key: a token must not come again.
#[tokio::test]
async fn a_result_from_before_the_lane_was_empty_is_superseded() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for late in [0, 1] {
        store.record_todos(&["a"]).await;
        let (lost, held) = taken_over(&store, id).await;
        store.outbox.settle(&[delivered_run(&held)]).await.unwrap();
        store.record_todos(&["a"]).await;
        let next = store.claim_one(id, LONG).await;
        let reports = [delivered_run(&lost), failed(&lost, LONG, "late")];
        assert_eq!(store.outbox.settle(&reports[late..=late]).await.unwrap(), [Settled::Superseded]);
        assert_eq!(store.outbox.settle(&[delivered_run(&held)]).await.unwrap(), [Settled::Superseded]);
        assert!(store.outbox.renew(&[lost.lane, held.lane], LONG).await.unwrap().is_empty());
        assert_eq!(store.count("outbox_lanes where pending = 1 and leased_by is not null").await, 1);
        assert_eq!(store.outbox.settle(&[delivered_run(&next)]).await.unwrap(), [Settled::Done]);
    }
    store.is_whole().await;
}

#[tokio::test]
async fn a_lease_that_its_holder_has_ended_takes_no_more_results() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for end in [0, 1, 2] {
        store.record_todos(&["a", "a"]).await;
        let lane = store.claim_one(id, LONG).await;
        let release = Next::Release { attempts: 0, log: AttemptLog::default() };
        let ends = [delivered(&lane, 1, Next::Yield), delivered(&lane, 0, release), failed(&lane, LONG, "no")];
        store.outbox.settle(&ends[end..=end]).await.unwrap();
        let before = tables(&store).await;
        for again in [failed(&lane, LONG, "again"), delivered_run(&lane), delivered(&lane, 1, Next::Keep)] {
            assert_eq!(store.outbox.settle(&[again]).await.unwrap(), [Settled::Superseded]);
        }
        assert!(store.outbox.renew(std::slice::from_ref(&lane.lane), LONG).await.unwrap().is_empty());
        assert_eq!(tables(&store).await, before);
        store.time_passes().await;
        store.deliver_all(id).await;
    }
    store.is_whole().await;
}

#[tokio::test]
async fn held_and_superseded_reports_may_come_in_one_batch() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("other").await);
    store.record_todos(&["a", "b", "c", "d"]).await;
    let lost = store.claim(id).await;
    store.time_passes().await;
    let held = store.outbox.claim(id, "other worker", 2, 1, LONG).await.unwrap().lanes;
    let others = store.claim(other).await;
    let reports = [
        failed(&lost[0], LONG, "late"),
        delivered_run(&held[0]),
        dead(&lost[1], 1, "late", Next::Yield),
        // Its lease is over and nobody has taken it: still its holder's.
        delivered_run(&lost[2]),
        failed(&held[1], LONG, "down"),
        delivered_run(&others[0]),
    ];
    let (done, superseded) = (Settled::Done, Settled::Superseded);
    let settled = store.outbox.settle(&reports).await.unwrap();
    assert_eq!(settled, [superseded, done, superseded, done, done, done]);
    assert_eq!(
        store.column::<i64>("select position from outbox_delivered order by subscription_id, position").await,
        [1, 3, 1]
    );
    assert_eq!(store.count("outbox_dead_letters").await, 0);
    assert_eq!(
        store.column::<String>("select last_error from outbox_lanes where last_error is not null").await,
        ["down"]
    );
    store.is_whole().await;
}

#[tokio::test]
async fn a_result_that_is_reported_twice_counts_once() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let first = delivered(&lane, 1, Next::Keep);
    // As after an answer that was lost on its way.
    assert_eq!(store.outbox.settle(std::slice::from_ref(&first)).await.unwrap(), [Settled::Done]);
    assert_eq!(store.outbox.settle(std::slice::from_ref(&first)).await.unwrap(), [Settled::Done]);
    store.is_whole().await;
    // Two reports of one lane in one batch.
    assert_eq!(store.outbox.settle(&[first, delivered(&lane, 2, Next::Yield)]).await.unwrap(), [Settled::Done; 2]);
    store.is_whole().await;
    assert_eq!(store.deliver_all(id).await, [3]);
    assert_eq!(store.count("outbox_lanes").await, 0);
    assert_eq!(store.count("outbox_delivered").await, 3);
    store.is_whole().await;
}

#[tokio::test]
async fn a_lane_may_be_reported_in_parts_within_one_batch() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let mut second = delivered(&lane, 2, Next::Keep);
    second.finished.remove(0);
    let third = failed(&lane, Duration::ZERO, "third");
    store.outbox.settle(&[delivered(&lane, 1, Next::Keep), second, third]).await.unwrap();
    store.is_whole().await;
    let again = store.claim_when_due(id).await.remove(0);
    assert_eq!((again.attempts, runs(std::slice::from_ref(&again))), (2, vec![("todo/a", vec![3])]));
    store.is_whole().await;
}

#[tokio::test]
async fn a_failure_stores_when_the_lane_is_due_again() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    assert_eq!(store.outbox.settle(&[failed(&lane, LONG / 2, "it's \"down\"")]).await.unwrap(), [Settled::Done]);
    let due = store.next_due(id).await.unwrap();
    assert!(is_about(due, LONG / 2), "{due:?}");
    let columns = format!("pending, attempts, leased_by, last_error, {}", database::json("attempt_log"));
    let log = attempt_log("it's \"down\"");
    assert_eq!(store.arrays(&columns, "from outbox_lanes").await, [json!([2, 1, null, "it's \"down\"", log])]);
    assert!(store.claim(id).await.is_empty());
    store.time_passes().await;
    let again = store.claim_one(id, LONG).await;
    assert_eq!(again.attempts, 2);
    assert_eq!(again.attempt_log, log);
    let begun = Instant::now();
    store.outbox.settle(&[failed(&again, SHORT, "down")]).await.unwrap();
    assert_eq!(store.claim_when_due(id).await[0].attempts, 3);
    assert!(begun.elapsed() >= SHORT - Duration::from_millis(2), "{:?}", begun.elapsed());
    store.is_whole().await;
}

#[tokio::test]
async fn a_wait_beyond_all_calendars_does_not_stop_the_other_results() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "b"]).await;
    let lanes = store.claim(id).await;
    let reports = [failed(&lanes[0], Duration::MAX, "come back never"), delivered_run(&lanes[1])];
    assert_eq!(store.outbox.settle(&reports).await.unwrap(), [Settled::Done; 2]);
    assert!(store.next_due(id).await > Some(LONG));
    store.record_todos(&["c"]).await;
    let lane = store.claim_one(id, Duration::MAX).await;
    assert_eq!(store.outbox.renew(std::slice::from_ref(&lane.lane), Duration::MAX).await.unwrap(), [lane.lane]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_failure_after_a_part_of_the_run_keeps_what_was_delivered() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let next = Next::Retry { after: Duration::ZERO, attempts: 1, error: "down".to_owned(), log: AttemptLog::default() };
    store.outbox.settle(&[delivered(&lane, 1, next)]).await.unwrap();
    let again = store.claim_when_due(id).await.remove(0);
    assert_eq!((again.attempts, runs(std::slice::from_ref(&again))), (2, vec![("todo/a", vec![2])]));
    store.is_whole().await;
}

#[tokio::test]
async fn a_dead_letter_does_not_stop_its_lane() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let keep = dead(&lane, 1, "no such address", Next::Keep);
    store.outbox.settle(&[keep]).await.unwrap();
    let mut rest = delivered(&lane, 2, Next::Yield);
    rest.finished.remove(0);
    store.outbox.settle(&[rest]).await.unwrap();
    let columns = format!("subscription_id, position, key, attempts, error, {}", database::json("attempt_log"));
    let log = attempt_log("no such address");
    let stored = store.arrays(&columns, "from outbox_dead_letters").await;
    assert_eq!(stored, [json!([id, 1, "todo/a", 1, "no such address", log])]);
    assert_eq!(store.column::<i64>("select position from outbox_delivered").await, [2]);
    let next = store.claim_one(id, LONG).await;
    assert_eq!((next.attempts, next.attempt_log.is_empty(), next.run[0].position), (1, true, 3));
    store.is_whole().await;
}

#[tokio::test]
async fn an_attempt_that_was_not_made_is_given_back() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    store
        .outbox
        .settle(&[delivered(&lane, 0, Next::Release { attempts: 0, log: AttemptLog::default() })])
        .await
        .unwrap();
    let lane = store.claim_one(id, LONG).await;
    assert_eq!((lane.attempts, lane.run.len()), (1, 2));
    store.outbox.settle(&[failed(&lane, Duration::ZERO, "down")]).await.unwrap();
    let lane = store.claim_when_due(id).await.remove(0);
    assert_eq!(lane.attempts, 2);
    let release = Next::Release { attempts: 1, log: lane.attempt_log.clone() };
    store.outbox.settle(&[delivered(&lane, 0, release)]).await.unwrap();
    assert_eq!(store.value::<Option<String>>("select last_error from outbox_lanes").await.as_deref(), Some("down"));
    let again = store.claim_one(id, LONG).await;
    assert_eq!((again.attempts, &again.attempt_log, again.run.len()), (2, &lane.attempt_log, 1));
    store.is_whole().await;
}

#[tokio::test]
async fn keeping_the_lease_begins_the_next_delivery_at_its_first_attempt() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let (_, lane) = taken_over(&store, id).await;
    assert_eq!((lane.attempts, lane.run.len()), (2, 1));
    let due: String = store.value("select cast(due_at as text) from outbox_lanes").await;
    store.outbox.settle(&[delivered(&lane, 1, Next::Keep)]).await.unwrap();
    let kept = store.arrays("pending, attempts, leased_by, cast(due_at as text)", "from outbox_lanes").await;
    assert_eq!(kept, [json!([2, 1, "worker", due])]);
    assert!(store.claim(id).await.is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn delivered_events_move_to_the_history_and_an_empty_lane_disappears() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "b", "a"]).await;
    let lanes = store.claim(id).await;
    let mut report = delivered_run(&lanes[0]);
    report.finished[0] = Finished { position: 1, attempts: 4, log: attempt_log("x"), error: None };
    assert_eq!(store.outbox.settle(&[report]).await.unwrap(), [Settled::Done]);
    let columns = format!("subscription_id, position, attempts, {}", database::json("attempt_log"));
    let history = store.arrays(&columns, "from outbox_delivered order by position").await;
    assert_eq!(history, [json!([id, 1, 4, attempt_log("x")]), json!([id, 3, 1, null])]);
    let (from, to) = (database::before(database::NOW, "60"), database::NOW);
    assert_eq!(store.count(&format!("outbox_delivered where delivered_at between {from} and {to}")).await, 2);
    assert_eq!(store.column::<String>("select key from outbox_lanes").await, ["todo/b"]);
    assert_eq!(store.column::<i64>("select position from outbox_deliveries").await, [2]);
    store.is_whole().await;
}

#[tokio::test]
async fn yielding_makes_the_lane_due_with_its_next_delivery() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("a"), todo("a").delay(LONG), todo("b"), todo("b")]).await;
    let lanes = store.outbox.claim(id, "worker", 10, 1, LONG).await.unwrap().lanes;
    for lane in &lanes {
        store.outbox.settle(&[delivered_run(lane)]).await.unwrap();
    }
    assert_eq!(runs(&store.claim(id).await), [("todo/b", vec![4])]);
    assert!(store.next_due(id).await > Some(LONG / 2));
    store.is_whole().await;
}

#[tokio::test]
async fn an_event_that_is_flushed_into_a_leased_lane_is_not_lost() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let lane = store.claim_one(id, LONG).await;
    store.record_todos(&["a"]).await;
    assert!(store.claim(id).await.is_empty(), "the lane is leased with all that comes");
    store.outbox.settle(&[delivered_run(&lane)]).await.unwrap();
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![2])]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_event_that_is_flushed_into_a_lane_that_waits_does_not_shorten_its_wait() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let next = Next::Retry {
        after: LONG,
        attempts: 0,
        error: "the destination is down".to_owned(),
        log: AttemptLog::default(),
    };
    store.outbox.settle(&[delivered(&lane, 0, next)]).await.unwrap();
    store.record([todo("a").priority(100)]).await;
    assert!(store.claim(id).await.is_empty());
    store.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushes_and_results_that_race_lose_nothing() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let other = store.another_process().await;
    let writer = tokio::spawn(async move {
        for n in 0..150 {
            record(&other, [todo(if n % 3 == 0 { "a" } else { "b" })]).await;
        }
    });
    let mut delivered = Vec::new();
    while !writer.is_finished() {
        delivered.extend(store.deliver_all(id).await);
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
    delivered.extend(store.deliver_all(id).await);
    assert_eq!(delivered.len(), 150);
    assert_eq!(store.count("outbox_delivered").await, 150);
    assert_eq!(store.count("outbox_lanes").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn an_effect_and_its_acknowledgement_are_one_transaction() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('effect')").await.unwrap();
    unit.events().push(todo("caused")).unwrap();
    assert_eq!(unit.commit_with(delivered(&lane, 1, Next::Keep)).await.unwrap(), Settled::Done);
    assert_eq!(store.column::<String>("select text from notes").await, ["effect"]);
    assert_eq!(store.column::<i64>("select position from outbox_delivered").await, [1]);
    assert_eq!(runs(&store.claim(id).await), [("todo/caused", vec![3])]);
    // Without an effect too.
    let mut rest = delivered_run(&lane);
    rest.finished.remove(0);
    assert_eq!(store.outbox.begin(Context::default()).commit_with(rest).await.unwrap(), Settled::Done);
    assert_eq!(store.column::<i64>("select position from outbox_delivered").await, [1, 2]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_effect_whose_lease_was_lost_is_rolled_back() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let (lost, _held) = taken_over(&store, id).await;
    let before = tables(&store).await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('effect')").await.unwrap();
    unit.events().push(todo("caused")).unwrap();
    assert_eq!(unit.commit_with(delivered_run(&lost)).await.unwrap(), Settled::Superseded);
    assert_eq!(tables(&store).await, before);
    assert_eq!(store.count("notes").await, 0);
    assert_eq!(store.count("outbox_events").await, 1);
    store.is_whole().await;
}

#[tokio::test]
async fn an_effect_whose_statement_failed_acknowledges_nothing() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let lane = store.claim_one(id, LONG).await;
    let before = tables(&store).await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("no sql").await.unwrap_err();
    let error = unit.commit_with(delivered_run(&lane)).await.unwrap_err();
    assert!(matches!(error, CommitError::StatementFailed), "{error:?}");
    assert_eq!(tables(&store).await, before);
    store.is_whole().await;
}

#[tokio::test]
async fn results_whose_storing_is_cancelled_anywhere_are_stored_as_a_whole_or_not_at_all() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for polls in 0..60 {
        store.record_todos(&["a", "b"]).await;
        let lanes = store.claim(id).await;
        let reports: Vec<_> = lanes.iter().map(delivered_run).collect();
        let _ = hang_up_after(polls, store.outbox.settle(&reports)).await;
        store.is_whole().await;
        let left = store.count("outbox_deliveries").await;
        assert!(left == 0 || left == 2, "{left} after {polls} polls");
        // What was hung up on may reach the server only now.
        let settled = eventually("the lanes", async || {
            let settled = store.outbox.settle(&reports).await.unwrap();
            Some(settled).filter(|settled| !settled.contains(&Settled::Busy))
        });
        let settled = settled.await;
        assert!(
            settled == [Settled::Superseded; 2] || left == 2 && settled == [Settled::Done; 2],
            "{left}: {settled:?}"
        );
    }
    assert_eq!(store.count("outbox_delivered").await, 120);
    store.is_whole().await;
}

#[tokio::test]
async fn a_lost_lease_is_not_renewed() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("other").await);
    store.record_todos(&["a"]).await;
    let (lost, held) = taken_over(&store, id).await;
    let others = store.claim_one(other, LONG).await;
    let asked = [lost.lane.clone(), others.lane.clone(), held.lane.clone()];
    assert_eq!(store.outbox.renew(&asked, LONG).await.unwrap(), [others.lane, held.lane.clone()]);
    assert_eq!(store.outbox.renew(&[lost.lane], SHORT).await.unwrap(), []);
    assert!(store.next_due(id).await > Some(LONG / 2));
    assert_eq!(store.outbox.renew(&[], LONG).await.unwrap(), []);
    store.is_whole().await;
}

#[tokio::test]
async fn attempts_are_noted_where_the_lease_is_held() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("other").await);
    store.record_todos(&["a"]).await;
    let (lost, held) = taken_over(&store, id).await;
    let others = store.claim_one(other, LONG).await;
    let notes = [(&lost, "1"), (&others, "2"), (&held, "3")];
    let notes = notes.map(|(lane, error)| (lane.lane.clone(), attempt_log(error)));
    assert_eq!(store.outbox.note_attempts(&notes).await.unwrap(), [others.lane, held.lane].into());
    let logs =
        store.column::<String>("select cast(attempt_log as text) from outbox_lanes order by subscription_id").await;
    assert_eq!(logs.iter().map(|log| AttemptLog::parse(log)).collect::<Vec<_>>(), ["3", "2"].map(attempt_log));
    assert!(store.outbox.note_attempts(&[]).await.unwrap().is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn a_renewed_lease_ends_later() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let lane = store.claim_one(id, SHORT).await;
    assert_eq!(store.outbox.renew(std::slice::from_ref(&lane.lane), LONG).await.unwrap(), [lane.lane]);
    tokio::time::sleep(SHORT).await;
    assert!(store.claim(id).await.is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn no_reports_are_no_work() {
    let store = Store::new().await;
    assert_eq!(store.outbox.settle(&[]).await.unwrap(), []);
    store.is_whole().await;
}
