use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use outbox_apalis::{Effect, Handlers};
use outbox_core::{Actor, Context, DeliveryError, PushError, RecordedEvent};
use outbox_seaorm::{
    DeliveryState::{Dead, Delivered},
    Outbox,
};
use outbox_test_servers::Postgres;
use sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement};

use crate::fixture::{
    Fixture, MS, Migrator, Noted, Seen, counted, each_noted, eventually, noted, policy, push, run, subscription,
    within, worker,
};

/// What the handlers of these tests write.
async fn write(event: &Noted, effect: &Effect) -> Result<(), DbErr> {
    let attempt = effect.delivery().attempt();
    let sql = format!("insert into effects values ('{}', {}, {attempt})", event.key, event.n);
    effect.tx().execute_unprepared(&sql).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effect_inbox_and_acknowledgement_are_one_transaction() {
    let fixture = Fixture::new().await;
    let handlers = Handlers::new().on_tx(|event: Noted, effect| async move {
        write(&event, &effect).await?;
        match (event.n, effect.delivery().attempt()) {
            (1, 1) => Err(DeliveryError::retry("after the effect")),
            (2, 1) => panic!("after the effect"),
            (3, _) => Err(DeliveryError::permanent("after the effect")),
            _ => Ok(()),
        }
    });
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.push(each_noted(&["a", "b"], 5)).await;
    fixture.delivered(8).await;
    fixture.dead(2).await;
    worker.stop().await;
    for key in ["a", "b"] {
        let effects = fixture.column::<i64>(&format!("select n * 10 + attempt from effects where key = '{key}'")).await;
        assert_eq!(effects, [1, 12, 22, 41]);
    }
    assert_eq!(fixture.count("outbox_inbox").await, 8);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_branch_of_an_effect_beside_a_savepoint_that_fails_is_stored() {
    let fixture = Fixture::new().await;
    let handlers = Handlers::new().on_tx(|event: Noted, effect| async move {
        let shown = format!("{effect:?}");
        assert!(!shown.contains(r#""n""#), "a payload in a log: {shown}");
        let savepoint = effect.tx().savepoint(|tx, _| async move {
            tx.execute_unprepared("insert into effects values ('savepoint', 1, 1)").await?;
            tokio::time::sleep(30 * MS).await;
            Err::<(), _>(DbErr::Custom("no".to_owned()))
        });
        let (failed, written) = tokio::join!(savepoint, write(&event, &effect));
        assert!(failed.is_err());
        Ok(written?)
    });
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.push([noted("branch", 1)]).await;
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(fixture.column::<String>("select key from effects").await, ["branch"]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_effect_whose_lease_was_taken_over_is_rolled_back_and_happens_once() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            let first = seen.of(&event.key).len() == 1;
            async move {
                write(&event, &effect).await?;
                if first {
                    // As another worker's claim. It could come before the first statement of this transaction and not
                    // be seen by it; SQLite lets it come later only from within.
                    let taken_over = "update outbox_lanes set lease_token = lease_token + 1, leased_by = 'other'";
                    effect.tx().execute_unprepared(taken_over).await?;
                }
                effect.events().push(counted(&event.key, event.n))?;
                Ok(())
            }
        })
    };
    let subscription = subscription("s").events(["note.noted"]).unwrap();
    let worker = run(fixture.worker().lease(500 * MS).unwrap().handlers(subscription, handlers)).await;
    fixture.push([noted("a", 0)]).await;
    eventually("the first call", || async { seen.len() == 1 }).await;
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(seen.of("a"), [0, 0]);
    assert_eq!(fixture.column::<i64>("select attempt from effects").await, [2]);
    assert_eq!(fixture.count("outbox_events").await, 2, "the events of the first call are rolled back");
    assert_eq!(fixture.states("s").await, [(Delivered, 2)]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_delivered_again_has_no_second_effect() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            async move { Ok(write(&event, &effect).await?) }
        })
    };
    let worker = run(fixture.worker().handlers(subscription("s"), handlers)).await;
    fixture.push([noted("a", 0)]).await;
    fixture.delivered(1).await;
    fixture
        .execute(
            "begin immediate;
             insert into outbox_deliveries select subscription_id, 'note/a', position, position, delivered_at
               from outbox_delivered;
             insert into outbox_lanes (subscription_id, key, pending, due_at)
             select subscription_id, 'note/a', 1, delivered_at from outbox_delivered;
             delete from outbox_delivered;
             commit",
        )
        .await;
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!((seen.len(), fixture.count("effects").await), (1, 1));
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_a_handler_pushes_belong_to_the_same_story() {
    let fixture = Fixture::new().await;
    let caused: Arc<Mutex<Vec<RecordedEvent>>> = Arc::default();
    let handlers = {
        let caused = caused.clone();
        Handlers::new()
            .on_tx(|event: Noted, effect| async move {
                effect.events().push(counted(&event.key, event.n + 1))?;
                Ok(())
            })
            .on(move |_: crate::fixture::Counted, delivery| {
                caused.lock().unwrap().push(delivery.event().clone());
                async { Ok(()) }
            })
    };
    let poll = crate::fixture::NEVER;
    let worker = run(fixture.worker().poll(poll).unwrap().handlers(subscription("s"), handlers)).await;
    let mut context = Context::default();
    context.tenant = Some("acme".to_owned());
    context.actor = Some(Actor::new("user", "42").unwrap());
    context.correlation_id = Some("request-7".to_owned());
    context.causation_id = Some("the command".to_owned());
    context.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
    let event = noted("a", 0);
    let id = event.id();
    fixture
        .outbox
        .transaction(context.clone(), |_, events| async move { events.push(event).map(|_| ()) })
        .await
        .map_err(|error: outbox_seaorm::TransactionError<PushError>| error)
        .unwrap();
    fixture.delivered(2).await;
    worker.stop().await;
    let caused = caused.lock().unwrap();
    assert_eq!(caused.len(), 1);
    assert_eq!(caused[0].causation_id, Some(id.to_string()));
    assert_eq!(caused[0].correlation_id, context.correlation_id);
    assert_eq!((&caused[0].tenant, &caused[0].actor), (&context.tenant, &context.actor));
    assert_eq!(caused[0].traceparent, context.traceparent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_statement_whose_error_is_ignored_fails_the_attempt() {
    let fixture = Fixture::new().await;
    let handlers = Handlers::new().on_tx(|event: Noted, effect| async move {
        write(&event, &effect).await?;
        effect.events().push(counted(&event.key, 0))?;
        let _ = effect.tx().execute_unprepared("insert into nowhere values (1)").await;
        Ok(())
    });
    let subscription = subscription("s").events(["note.noted"]).unwrap().retry(policy(2));
    let worker = run(fixture.worker().handlers(subscription, handlers)).await;
    fixture.push([noted("a", 0)]).await;
    fixture.dead(1).await;
    worker.stop().await;
    let error = fixture.deliveries("s").await[0].error.clone().unwrap();
    assert!(error.starts_with("a statement of the transaction failed and its error was ignored"), "{error}");
    assert_eq!(fixture.states("s").await, [(Dead, 2)]);
    for table in ["effects", "outbox_inbox"] {
        assert_eq!(fixture.count(table).await, 0, "{table}");
    }
    assert_eq!(fixture.count("outbox_events").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_that_outlives_its_handler_fails_the_attempt() {
    let fixture = Fixture::new().await;
    let kept: Arc<Mutex<Vec<Effect>>> = Arc::default();
    let handlers = {
        let kept = kept.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            let kept = kept.clone();
            async move {
                write(&event, &effect).await?;
                kept.lock().unwrap().push(effect);
                Ok(())
            }
        })
    };
    let worker = run(fixture.worker().handlers(subscription("s").retry(policy(1)), handlers)).await;
    fixture.push([noted("a", 0)]).await;
    fixture.dead(1).await;
    worker.stop().await;
    let error = fixture.deliveries("s").await[0].error.clone().unwrap();
    assert!(error.starts_with("the transaction handle is still in use"), "{error}");
    assert_eq!((fixture.count("effects").await, kept.lock().unwrap().len()), (0, 1));
}

/// On PostgreSQL, where a deferred trigger makes the COMMIT itself wait for the test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_is_committing_is_not_cancelled() {
    let outbox = Outbox::connect(&Postgres::shared().database(), 4).await.unwrap();
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    let gate = "
        create table effects (key text, n integer, attempt integer);
        create function wait() returns trigger language plpgsql as
            $$ begin perform pg_advisory_xact_lock(7); return null; end $$;
        create constraint trigger wait after insert on effects deferrable initially deferred
            for each row execute function wait()";
    outbox.writer().execute_unprepared(gate).await.unwrap();
    let holder = outbox.begin(Context::default());
    holder.tx().execute_unprepared("select pg_advisory_xact_lock(7)").await.unwrap();
    let one = async |sql: &str| {
        let row = outbox.reader().query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await.unwrap();
        row.unwrap().try_get_by_index::<String>(0).unwrap()
    };

    let (seen, time) = (Seen::default(), 1000 * MS);
    let handlers = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            async move { Ok(write(&event, &effect).await?) }
        })
    };
    let worker = worker(&outbox).lease(10_000 * MS).unwrap().timeout(time).unwrap();
    let worker = run(worker.handlers(subscription("s"), handlers)).await;
    push(&outbox, each_noted(&["a"], 3)).await;
    let waiting = "select count(*)::text from pg_locks where locktype = 'advisory' and not granted";
    eventually("a COMMIT that waits", || async { one(waiting).await == "1" }).await;
    let committing = Instant::now();
    within(10 * time, "the end of the handler's time", || async { committing.elapsed() > 2 * time }).await;
    assert_eq!(one(waiting).await, "1", "it still waits");
    holder.rollback().await;
    let delivered = "select count(*)::text from outbox_delivered";
    eventually("the deliveries", || async { one(delivered).await == "3" }).await;
    worker.stop().await;
    let logs = "select string_agg(attempts || coalesce(' ' || attempt_log::text, ''), ', ') from outbox_delivered";
    assert_eq!(one(logs).await, "1, 1, 1");
    assert_eq!((seen.of("a"), one("select count(*)::text from effects").await.as_str()), (vec![0, 1, 2], "3"));
}

/// While a transaction writes, SQLite lets no lease be renewed: the handler's own time must end before its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transactional_handler_that_hangs_becomes_a_dead_letter_too() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            async move {
                if event.key == "hangs" {
                    std::future::pending::<()>().await;
                }
                Ok(write(&event, &effect).await?)
            }
        })
    };
    let worker =
        run(fixture.worker().lease(900 * MS).unwrap().handlers(subscription("s").retry(policy(3)), handlers)).await;
    fixture.push([noted("hangs", 0), noted("a", 0)]).await;
    fixture.dead(1).await;
    fixture.delivered(1).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Dead, 3), (Delivered, 1)]);
    assert_eq!(seen.of("hangs"), [0, 0, 0]);
}

/// The renewal of its lease waits behind its transaction, and comes when the lane is already somebody else's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewal_that_comes_late_does_not_hold_up_the_lane() {
    let fixture = Fixture::new().await;
    let handlers = Handlers::new().on_tx(|event: Noted, effect| async move {
        tokio::time::sleep(300 * MS).await;
        Ok(write(&event, &effect).await?)
    });
    let worker = fixture.worker().lease(1800 * MS).unwrap().batch(1).unwrap();
    let started = worker.handlers(subscription("s"), handlers).start().await.unwrap();
    fixture.push(each_noted(&["a"], 4)).await;
    let begun = Instant::now();
    started.run_until(fixture.delivered(4)).await;
    assert!(begun.elapsed() < 2900 * MS, "{:?}", begun.elapsed());
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 4]);
}
