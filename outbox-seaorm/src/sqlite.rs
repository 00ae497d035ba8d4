//! All SQL for SQLite.
//!
//! A write transaction excludes all others, so nothing here needs row locks; what must be atomic is in one transaction.
//! `strftime('%Y-%m-%dT%H:%M:%fZ', 'now', …)` is the database's clock in the tables' format.

use crate::sql::{Flush, ListEvents, Route, Settle, SettleSteps, Sql};

macro_rules! list_events {
    ($of:literal) => {
        concat!(
            "select e.* from outbox_events e where ",
            $of,
            " and ($1 is null or e.event_type = $1) and ($2 is null or e.aggregate_type = $2)
              and ($3 is null or e.aggregate_id = $3) and ($4 is null or e.tenant = $4)
              and ($5 is null or e.actor_kind = $5) and ($6 is null or e.recorded_at >= $6)
              and ($7 is null or e.recorded_at < $7) and ($8 is null or e.position < $8)
            order by e.position desc limit $9"
        )
    };
}

macro_rules! of_dead_letters {
    () => {
        " from outbox_dead_letters x
          join outbox_subscriptions s on s.id = x.subscription_id
          left join outbox_events e on e.position = x.position
         where ($1 is null or x.id in (select value from json_each($1))) and ($2 is null or x.subscription_id = $2)
           and ($3 is null or e.event_type = $3) and ($4 is null or x.died_at >= $4) and ($5 is null or x.died_at < $5)"
    };
}

/// Of an event `e` and the rules $1: when it is old, and that nobody needs it.
macro_rules! old {
    () => {
        " where e.recorded_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', (
                   select value->>'seconds' from json_each($1)
                    where e.event_type = value->>'name'
                       or value->>'prefix' and substr(e.event_type, 1, length(value->>'name')) = value->>'name'
                    order by key limit 1)))
           and not exists (select 1 from outbox_unrouted where position = e.position)
           and not exists (
               select 1 from outbox_subscriptions s
                where s.backfill_from <= e.position
                   or exists (select 1 from outbox_deliveries
                               where subscription_id = s.id and position = e.position)
                   or exists (select 1 from outbox_dead_letters
                               where subscription_id = s.id and position = e.position)
                   or exists (select 1 from outbox_delivered
                               where subscription_id = s.id and position = e.position
                                 and delivered_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', (
                                     select value->>'seconds' from json_each($1)
                                      where e.event_type = value->>'name'
                                         or value->>'prefix'
                                            and substr(e.event_type, 1, length(value->>'name')) = value->>'name'
                                      order by key limit 1)))))"
    };
}

/// What routing reads of an event `e`: no payload. When it is due is calculated when its delivery is inserted.
macro_rules! subject {
    () => {
        "e.position, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, e.tenant, e.tags,
         max(0.0, (julianday('now') - julianday(e.recorded_at)) * 86400) as age, 0.0 as due"
    };
}

/// When an event `e` asks to be delivered. One that was stored while the clock was ahead asks for it now.
macro_rules! asked_for {
    ($more:literal) => {
        concat!(
            "max(coalesce(strftime('%Y-%m-%dT%H:%M:%fZ',
                                   min(e.recorded_at, strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
                                   printf('%+.3f seconds', e.wait_seconds), ",
            $more,
            "), strftime('%Y-%m-%dT%H:%M:%fZ', 'now')), coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', e.not_before, ",
            $more,
            "), ''))"
        )
    };
}

pub(crate) static SQLITE: Sql = Sql {
    schema_version: "select schema_version from outbox_meta",

    write_the_same: "update outbox_meta set schema_version = schema_version",

    generation: "select routing_generation as generation,
                        exists (select 1 from outbox_unrouted where set_aside_at is null) as waits from outbox_meta",

    lock_generation: None,

    instance: "select instance, strftime('%Y-%m-%dT%H:%M:%fZ', 'now') as now from outbox_meta",

    // At random, as on PostgreSQL: a file may be put back from a backup.
    bump_generation: "update outbox_meta set routing_generation = random() & 9223372036854775807",

    restore_meta: "
        insert into outbox_meta (id, schema_version, routing_generation, instance)
        values (1, $1, abs(random() / 4096), lower(hex(randomblob(8)))) on conflict do nothing",

    subscriptions: "select id, name, filter, ordering from outbox_subscriptions order by id",

    // Local statements cost no round trips.
    flush: Flush::Routed {
        insert_events: "
    insert into outbox_events (
        event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at,
        tags, max_attempts, wait_seconds, not_before, tenant, actor_kind, actor_id, correlation_id, causation_id, traceparent, tracestate)
    select unhex(value->>'id'), value->>'event_type', value->>'schema_version', value->>'aggregate_type',
           value->>'aggregate_id', value->>'payload', value->>'occurred_at', value->>'tags', value->>'max_attempts',
           value->>'wait', value->>'not_before', $2, $3, $4, $5, $6, $7, $8
      from json_each($1) order by key
    returning position, event_id",

        insert_marks: "
    insert into outbox_unrouted (position, ahead)
    select position, case when wait_seconds < 0 then true end from outbox_events
     where position in (select value from json_each($1))",
    },

    unrouted: concat!(
        "select (select routing_generation from outbox_meta) as generation, u.position as mark, ",
        subject!(),
        " from (select * from (select position from outbox_unrouted
                  where ahead and set_aside_at is null and position <= $1 order by position limit 100)
                union all
                select * from (select position from outbox_unrouted
                  where position > $1 and set_aside_at is null order by position limit $2)) u
          left join outbox_events e on e.position = u.position
         order by u.position"
    ),

    unrouted_ahead: concat!(
        "select u.position as mark, ",
        subject!(),
        " from (select position from outbox_unrouted
                 where ahead and set_aside_at is null and position > $1 order by position limit $2) u
          left join outbox_events e on e.position = u.position
         order by u.position"
    ),

    last_unrouted: "
    select position from outbox_unrouted where position > $1 and set_aside_at is null order by position desc limit 1",

    unrouted_until: "
    select position from outbox_unrouted
     where position > $1 and position <= $2 and set_aside_at is null order by position limit 1",

    route: Route::InSteps {
        take_marks: "delete from outbox_unrouted where position in (select value from json_each($1))",
    },

    count_unrouted: "
    select (select count(*) from (select 1 from outbox_unrouted where set_aside_at is null limit 1000000)) as waiting,
           (select count(*) from outbox_unrouted where set_aside_at is not null) as set_aside,
           (select max(0.0, (julianday('now') - julianday(recorded_at)) * 86400) from outbox_events
             where position = (select min(position) from outbox_unrouted where set_aside_at is null)) as oldest_age_seconds",

    unrouted_mark: "select set_aside_at, error from outbox_unrouted where position = $1",

    list_set_aside: "
    select u.position, u.set_aside_at, coalesce(u.error, '') as error, e.event_id, e.event_type
      from outbox_unrouted u left join outbox_events e on e.position = u.position
     where u.set_aside_at is not null and ($1 is null or u.position < $1)
     order by u.position desc limit $2",

    put_back: "
    update outbox_unrouted set set_aside_at = null, error = null, ahead = true
     where set_aside_at is not null and ($1 is null or position in (select value from json_each($1)))",

    discard_set_aside: "
    delete from outbox_unrouted
     where set_aside_at is not null and ($1 is null or position in (select value from json_each($1)))",

    set_aside: "
    update outbox_unrouted set set_aside_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), error = $2
     where position = $1 and set_aside_at is null",

    insert_deliveries: "
    insert into outbox_deliveries (subscription_id, key, seq, position, due_at)
    select d.value->>'subscription', d.value->>'key', e.position, e.position,
           max(coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', e.recorded_at, printf('%+.3f seconds', e.wait_seconds)),
                        strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
               coalesce(e.not_before, ''))
      from json_each($1) d
     cross join outbox_events e on e.position = d.value->>'position'
     where true
    on conflict do nothing",

    upsert_lanes: "
    insert into outbox_lanes (subscription_id, key, tenant, pending, lease_token, due_at)
    select value->>'subscription', value->>'key',
           (select e.tenant from outbox_deliveries d cross join outbox_events e on e.position = d.position
             where d.subscription_id = value->>'subscription' and d.key = value->>'key' order by seq limit 1),
           value->>'deliveries', abs(random() / 2),
           (select due_at from outbox_deliveries d
             where d.subscription_id = value->>'subscription' and d.key = value->>'key' order by seq limit 1)
      from json_each($1) where true
    on conflict (subscription_id, key) do update set pending = pending + excluded.pending",

    due_with_head: "
    update outbox_lanes
       set due_at = (select d.due_at from outbox_deliveries d
                      where d.subscription_id = outbox_lanes.subscription_id and d.key = outbox_lanes.key
                      order by seq limit 1)
     where subscription_id = $1 and key in (select value from json_each($2)) and attempts = 0 and last_error is null",

    next_due: "
    select s.id, circuit_failures, (julianday(circuit_until) - julianday('now')) * 86400.0 as circuit_seconds,
           (select (julianday(nullif(due_at, '9999-12-31T23:59:59.999Z')) - julianday('now')) * 86400.0 from outbox_lanes
             where subscription_id = s.id order by due_at limit 1) as seconds
      from json_each($1) wanted
      join outbox_subscriptions s on s.id = wanted.value
     where paused_at is null and backfill_from is null",

    // Of one subscription: a limit cannot be another one for each row.
    claim: "
    update outbox_lanes
       set attempts = attempts + $4, lease_token = lease_token + 1, leased_by = $3,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
     where subscription_id = $1->>'$[0].subscription'
       and key in (select key from outbox_lanes
                    where subscription_id = $1->>'$[0].subscription'
                      and due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                    order by due_at, key limit $1->>'$[0].lanes')
       and exists (select 1 from outbox_subscriptions
                    where id = $1->>'$[0].subscription' and paused_at is null and backfill_from is null
                      and (circuit_until is null or $1->>'$[0].probe'))
    returning subscription_id, key, lease_token, leased_by, attempts + 1 - $4 as attempts, attempt_log,
              null as was_due_at",

    claim_others: "
    with recursive tenant(name, n) as (
           select * from (select tenant, 1 from outbox_lanes where subscription_id = $1 and tenant > $2
                           order by tenant limit 1)
           union all
           select (select tenant from outbox_lanes where subscription_id = $1 and tenant > before.name
                    order by tenant limit 1), n + 1
             from tenant before where name is not null and n < 100),
         due as (
           select (select key from outbox_lanes
                    where subscription_id = $1 and tenant = name and due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                    order by due_at, key limit 1) as key
             from tenant where name is not null and name not in (select value from json_each($3)))
    update outbox_lanes
       set attempts = attempts + 1, lease_token = lease_token + 1, leased_by = $6,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $5))
     where subscription_id = $1
       and key in (select key from due where key is not null limit $4)
       and exists (select 1 from outbox_subscriptions
                    where id = $1 and paused_at is null and backfill_from is null and circuit_until is null)
    returning subscription_id, key, lease_token, leased_by, attempts, attempt_log, tenant",

    take_probe: "
    update outbox_subscriptions
       set circuit_until = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
     where id = $1 and circuit_until <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')",

    reserve: "
    update outbox_subscriptions
       set rate_at = strftime('%Y-%m-%dT%H:%M:%fZ',
                              case when rate_at > now
                                    and rate_at <= strftime('%Y-%m-%dT%H:%M:%fZ', now, printf('%+.3f seconds', longest))
                                   then rate_at else now end,
                              printf('%+.3f seconds', time))
      from (select value->>'subscription' as subscription, value->>'time' as time, value->>'longest' as longest,
                   strftime('%Y-%m-%dT%H:%M:%fZ', 'now') as now
              from json_each($1)) a
     where id = a.subscription
       and (coalesce(rate_at, '') < strftime('%Y-%m-%dT%H:%M:%fZ', now, '+1 second')
            or rate_at > strftime('%Y-%m-%dT%H:%M:%fZ', now, printf('%+.3f seconds', longest)))
    returning id, (julianday(rate_at) - julianday('now')) * 86400.0
                  - (select value->>'time' from json_each($1)
                      where value->>'subscription' = outbox_subscriptions.id) as after",

    open_circuit: "
    update outbox_subscriptions
       set circuit_until = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2)),
           circuit_failures = circuit_failures + $3
     where id = $1",

    close_circuit: "
    update outbox_subscriptions set circuit_until = null, circuit_failures = 0
     where id = $1 and circuit_until is not null",

    // The first of each lane come first. Only the length of a payload is looked up before it is known to come along.
    runs: "
    with queued as (
           select d.subscription_id as subscription, d.key, d.position as queued, d.seq, d.due_at,
                  octet_length(e.payload) as bytes, lane.value->>'run' as run,
                  row_number() over (partition by d.subscription_id, d.key order by d.seq) as number
             from json_each($1) lane
            cross join outbox_deliveries d
               on d.subscription_id = lane.value->>'subscription' and d.key = lane.value->>'key'
              and d.seq in (select seq from outbox_deliveries
                             where subscription_id = lane.value->>'subscription' and key = lane.value->>'key'
                             order by seq limit $3)
             left join outbox_events e on e.position = d.position),
         counted as (
           select *, coalesce(sum(bytes) over (
                         partition by subscription
                         order by number, seq rows between unbounded preceding and 1 preceding), 0) as before
             from queued where number <= run)
    select q.subscription, q.key, q.queued, julianday(q.due_at) as since,
           q.due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now') as due, e.*
      from counted q
      left join outbox_events e on e.position = q.queued
     where q.before < $2
     order by q.number, q.seq",

    held: "
    select r.key as report from json_each($1) r
      join outbox_lanes l on l.subscription_id = r.value->>'subscription' and l.key = r.value->>'key'
       and l.lease_token = r.value->>'token' and l.leased_by = r.value->>'worker'",

    note_attempts: "
    update outbox_lanes
       set attempt_log = case when outbox_lanes.attempts > 0 then r.log end
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'token' as token,
                   value->>'worker' as worker, value->>'log' as log
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane
       and outbox_lanes.lease_token = r.token and outbox_lanes.leased_by = r.worker
    returning outbox_lanes.subscription_id, outbox_lanes.key, outbox_lanes.lease_token, outbox_lanes.leased_by",

    settle: Settle::InSteps(SettleSteps {
    delete_deliveries: "
    delete from outbox_deliveries
     where (subscription_id, position) in (select value->>'subscription', value->>'position' from json_each($1))
    returning subscription_id, key, position",

    insert_delivered: "
    insert into outbox_delivered (subscription_id, position, attempts, attempt_log, delivered_at)
    select value->>'subscription', value->>'position', value->>'attempts', value->>'log',
           strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      from json_each($1) where value->>'error' is null
    on conflict (subscription_id, position) do update
       set attempts = excluded.attempts, attempt_log = excluded.attempt_log, delivered_at = excluded.delivered_at",

    insert_dead_letters: "
    insert into outbox_dead_letters (subscription_id, position, key, attempts, error, attempt_log, died_at)
    select value->>'subscription', value->>'position', value->>'key', value->>'attempts', value->>'error',
           value->>'log', strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      from json_each($1) where value->>'error' is not null
    on conflict (subscription_id, position) do update
       set attempts = excluded.attempts, error = excluded.error, attempt_log = excluded.attempt_log,
           died_at = excluded.died_at",

    advance_lanes: "
    update outbox_lanes
       set pending = outbox_lanes.pending - r.finished,
           attempts = case when outbox_lanes.attempts = 0 then 0 else r.attempts end,
           leased_by = case r.next when 'keep' then leased_by end,
           due_at = case
               when r.next = 'keep' then outbox_lanes.due_at
               when r.next = 'retry' and outbox_lanes.attempts > 0 then strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', r.wait))
               when r.next = 'hold' then '9999-12-31T23:59:59.999Z'
               else coalesce((select d.due_at from outbox_deliveries d
                               where d.subscription_id = r.subscription and d.key = r.lane
                               order by seq limit 1), outbox_lanes.due_at) end,
           last_error = case when r.next = 'release' or outbox_lanes.attempts = 0 then last_error else r.error end,
           attempt_log = case when outbox_lanes.attempts > 0 then r.log end,
           held_at = r.held_at
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'finished' as finished,
                   value->>'attempts' as attempts, value->>'next' as next, value->>'wait' as wait,
                   value->>'error' as error, value->>'log' as log, value->>'held_at' as held_at
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane",
    }),

    delete_empty_lanes: "
    delete from outbox_lanes
     where pending <= 0 and held_at is null
       and (subscription_id, key) in (select value->>'subscription', value->>'key' from json_each($1))",

    take_over: "
    update outbox_lanes
       set attempts = attempts + 1, lease_token = lease_token + 1, leased_by = $3,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'token' as token,
                   value->>'worker' as worker
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane
       and outbox_lanes.lease_token = r.token and outbox_lanes.leased_by = r.worker
       and outbox_lanes.leased_by like '% (relay)'
    returning outbox_lanes.subscription_id, outbox_lanes.key, outbox_lanes.lease_token, outbox_lanes.leased_by,
              outbox_lanes.attempts,
              outbox_lanes.attempt_log",

    relayed: "
    select r.key as report from json_each($1) r
      join outbox_lanes l on l.subscription_id = r.value->>'subscription' and l.key = r.value->>'key'
       and l.lease_token = r.value->>'token' and l.leased_by = r.value->>'worker' and l.leased_by like '% (relay)'",

    renew: "
    update outbox_lanes
       set due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'token' as token,
                   value->>'worker' as worker
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane
       and outbox_lanes.lease_token = r.token and outbox_lanes.leased_by = r.worker
    returning outbox_lanes.subscription_id, outbox_lanes.key, outbox_lanes.lease_token, outbox_lanes.leased_by",

    subscription_by_name: "
    select id, filter, ordering, backfill_from, backfill_until from outbox_subscriptions where name = $1",

    insert_subscription: "
    insert into outbox_subscriptions (name, filter, ordering, backfill_from, backfill_until)
    values ($1, $2, $3, $4, $5) returning id",

    update_subscription: "
    update outbox_subscriptions set filter = $2, ordering = $3 where id = $1",

    pause: "update outbox_subscriptions set paused_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
             where name = $1 and paused_at is null",

    resume: "update outbox_subscriptions set paused_at = null where name = $1 and paused_at is not null",

    remove: "delete from outbox_subscriptions where id = $1",

    orphans: "
    with recursive lanes as (
           select min(subscription_id) as id from outbox_lanes
            union all
           select (select min(subscription_id) from outbox_lanes where subscription_id > lanes.id)
             from lanes where lanes.id is not null),
         deliveries as (
           select min(subscription_id) as id from outbox_deliveries
            union all
           select (select min(subscription_id) from outbox_deliveries where subscription_id > deliveries.id)
             from deliveries where deliveries.id is not null),
         delivered as (
           select min(subscription_id) as id from outbox_delivered
            union all
           select (select min(subscription_id) from outbox_delivered where subscription_id > delivered.id)
             from delivered where delivered.id is not null),
         dead as (
           select min(subscription_id) as id from outbox_dead_letters
            union all
           select (select min(subscription_id) from outbox_dead_letters where subscription_id > dead.id)
             from dead where dead.id is not null)
    select id from (select id from lanes union select id from deliveries
                    union select id from delivered union select id from dead)
     where id is not null and id not in (select id from outbox_subscriptions)",

    sweep: &[
        "delete from outbox_lanes where subscription_id = $1 and key in (
           select key from outbox_lanes where subscription_id = $1 limit $2)",
        "delete from outbox_deliveries where subscription_id = $1 and position in (
           select position from outbox_deliveries where subscription_id = $1 limit $2)",
        "delete from outbox_delivered where subscription_id = $1 and position in (
           select position from outbox_delivered where subscription_id = $1 limit $2)",
        "delete from outbox_dead_letters where subscription_id = $1 and position in (
           select position from outbox_dead_letters where subscription_id = $1 limit $2)",
    ],

    first_position_since: "
    select min(position) as position from outbox_events where recorded_at >= $1",

    set_backfill: "
    update outbox_subscriptions
       set backfill_from = $2, backfill_until = case when $2 is not null then backfill_until end
     where id = $1",

    positions_known: "
    select position from outbox_deliveries
     where subscription_id = $1 and position in (select value from json_each($2))
    union select position from outbox_delivered
     where subscription_id = $1 and position in (select value from json_each($2))
    union select position from outbox_dead_letters
     where subscription_id = $1 and position in (select value from json_each($2))",

    inbox_insert_within: None,

    inbox_insert: "
    insert into outbox_inbox (consumer, event_id) values ($1, $2) on conflict do nothing",

    heartbeat: "
    insert into outbox_workers (id, subscriptions, started_at, last_seen_at)
    values ($1, $2, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
    on conflict (id) do update set subscriptions = excluded.subscriptions, last_seen_at = excluded.last_seen_at
    returning last_seen_at",

    forget_workers: "
    delete from outbox_workers
     where last_seen_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', $1))",

    forget_worker: "delete from outbox_workers where id = $1",

    workers: "
    select id, subscriptions, started_at, last_seen_at,
           max(0.0, (julianday('now') - julianday(last_seen_at)) * 86400) as last_seen_seconds
      from outbox_workers order by id",

    status: "
    select s.id, s.name, s.paused_at is not null as paused,
           case when s.circuit_until is null then 'closed'
                when s.circuit_until > strftime('%Y-%m-%dT%H:%M:%fZ', 'now') then 'open'
                else 'half-open' end as circuit,
           coalesce(l.pending, 0) as pending, coalesce(l.leased, 0) as leased,
           (select count(*) from (select 1 from outbox_delivered where subscription_id = s.id limit $1)) as delivered,
           (select count(*) from outbox_dead_letters where subscription_id = s.id) as dead,
           (select max(0.0, (julianday('now') - julianday(recorded_at)) * 86400) from outbox_events
             where position = (select min(position) from outbox_deliveries where subscription_id = s.id)
           ) as oldest_pending_age_seconds,
           coalesce(x.last_error,
                    (select error from outbox_dead_letters
                      where subscription_id = s.id order by id desc limit 1)) as last_error
      from outbox_subscriptions s
      left join (select subscription_id, sum(pending) as pending,
                        sum(leased_by is not null and due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')) as leased
                   from outbox_lanes group by subscription_id) l on l.subscription_id = s.id
      left join (select subscription_id, max(due_at), last_error
                   from outbox_lanes where last_error is not null group by subscription_id) x
        on x.subscription_id = s.id
     order by s.name",

    postponed: concat!(
        "select s.name, count(*) as deliveries, max((julianday(l.due_at) - julianday('now')) * 86400.0) as seconds
           from outbox_subscriptions s
           join outbox_lanes l on l.subscription_id = s.id
            and l.due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+1 second') and l.due_at < '9999-12-31'
           join outbox_events e on e.position = (
                select position from outbox_deliveries
                 where subscription_id = l.subscription_id and key = l.key order by seq limit 1)
          where case when l.leased_by is null and l.last_error is null
                     then l.due_at > ",
        asked_for!("'+1 second'"),
        " else l.due_at > ",
        asked_for!("'+1 day'"),
        " end
          group by s.name order by s.name"
    ),

    lock_waiting: "
    select key from outbox_lanes
     where subscription_id = $1 and due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now') and leased_by is null
       and held_at is null",

    due_as_asked: concat!(
        "update outbox_deliveries set due_at = asked.due_at
           from (select e.position, ",
        asked_for!("'+0 seconds'"),
        " as due_at from outbox_events e
              where e.position in (
                    select position from outbox_deliveries
                     where subscription_id = $1 and due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                       and key in (select value from json_each($2)))) asked
          where outbox_deliveries.subscription_id = $1 and outbox_deliveries.position = asked.position
            and outbox_deliveries.due_at > asked.due_at
            and outbox_deliveries.key in (select value from json_each($2))"
    ),

    due_with_heads: "
    update outbox_lanes set due_at = head.due_at
      from (select k.value as lane, (select d.due_at from outbox_deliveries d
                                      where d.subscription_id = $1 and d.key = k.value
                                      order by seq limit 1) as due_at
              from json_each($2) k) head
     where outbox_lanes.subscription_id = $1 and outbox_lanes.key = head.lane and outbox_lanes.due_at > head.due_at",

    activity: "
    select cast(julianday('now', 'start of day') - julianday(substr(delivered_at, 1, 10)) as integer) as days_ago,
           count(*) as deliveries
      from outbox_delivered
     where subscription_id = $1 and delivered_at >= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', 'start of day', '-6 days')
     group by 1",

    newest_unfinished: "
    select d.position
      from outbox_deliveries d
      join outbox_lanes l on l.subscription_id = d.subscription_id and l.key = d.key
     where d.subscription_id = $1
       and $2 = (l.leased_by is not null and l.due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                 and d.seq = (select min(seq) from outbox_deliveries h
                                    where h.subscription_id = d.subscription_id and h.key = d.key))
     order by d.position desc limit $3",

    newest_delivered: "
    select f.position from outbox_delivered f where f.subscription_id = $1 order by f.position desc limit $2",

    newest_dead: "
    select f.position from outbox_dead_letters f where f.subscription_id = $1 order by f.position desc limit $2",

    list_unfinished: "
    select l.attempts as lane_attempts, nullif(l.due_at, '9999-12-31T23:59:59.999Z') as lane_due_at, l.leased_by,
           l.last_error, d.due_at,
           d.seq = (select min(seq) from outbox_deliveries h
                          where h.subscription_id = d.subscription_id and h.key = d.key) as head,
           e.*
      from outbox_deliveries d
      join outbox_lanes l on l.subscription_id = d.subscription_id and l.key = d.key
      join outbox_events e on e.position = d.position
     where d.subscription_id = $1
       and $2 = (l.leased_by is not null and l.due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                 and d.seq = (select min(seq) from outbox_deliveries h
                                    where h.subscription_id = d.subscription_id and h.key = d.key))
       and d.position <= $3
     order by d.position desc limit $4",

    list_delivered: "
    select f.attempts, f.delivered_at as finished_at, null as error, e.*
      from outbox_delivered f join outbox_events e on e.position = f.position
     where f.subscription_id = $1 and f.position <= $2 order by f.position desc limit $3",

    list_dead: "
    select f.attempts, f.died_at as finished_at, f.error, e.*
      from outbox_dead_letters f join outbox_events e on e.position = f.position
     where f.subscription_id = $1 and f.position <= $2 order by f.position desc limit $3",

    list_events: ListEvents {
        of_aggregate: list_events!("e.aggregate_type = $2 and e.aggregate_id = $3"),
        of_type: list_events!("e.event_type = $1"),
        of_tenant: list_events!("e.tenant = $4"),
        of_all: list_events!("true"),
    },

    event_by_id: "select * from outbox_events where event_id = $1",

    checkup: None,

    event_exists: "select 1 from outbox_events where event_id = $1",

    standing: "
    select s.id, s.name, s.filter, s.created_at, s.paused_at, s.circuit_until, s.backfill_from,
           strftime('%Y-%m-%dT%H:%M:%fZ', 'now') as now,
           d.key, d.due_at, l.attempts as lane_attempts, l.leased_by, l.last_error, l.attempt_log as lane_log,
           nullif(l.due_at, '9999-12-31T23:59:59.999Z') as lane_due_at,
           (select min(position) from outbox_deliveries where subscription_id = d.subscription_id and key = d.key) as head,
           (select event_id from outbox_events
             where position = (select min(position) from outbox_deliveries
                                where subscription_id = d.subscription_id and key = d.key)) as head_event,
           l.held_at, (select event_id from outbox_events where position = l.held_at) as held_event,
           (select id from outbox_dead_letters where subscription_id = s.id and position = l.held_at) as held_by,
           f.attempts as delivered_attempts, f.attempt_log as delivered_log, f.delivered_at,
           x.id as dead_letter, x.attempts as dead_attempts, x.attempt_log as dead_log, x.error, x.died_at
      from outbox_subscriptions s
      left join outbox_deliveries d on d.subscription_id = s.id and d.position = $1
      left join outbox_lanes l on l.subscription_id = s.id and l.key = d.key
      left join outbox_delivered f on f.subscription_id = s.id and f.position = $1
      left join outbox_dead_letters x on x.subscription_id = s.id and x.position = $1
     where $2 is null or s.id = $2
     order by s.name",

    list_dead_letters: concat!(
        "select x.id, s.name, x.position, x.attempts, x.error, x.attempt_log, x.died_at, e.event_id, e.event_type,
                e.aggregate_type, e.aggregate_id",
        of_dead_letters!(),
        " and ($6 is null or x.id < $6) order by x.id desc limit $7"
    ),

    count_dead_letters: concat!("select count(*) as matched", of_dead_letters!()),

    next_dead_letters: concat!(
        "select x.id, x.subscription_id",
        of_dead_letters!(),
        " and x.id > $6 and x.id <= $7 order by x.id limit $8"
    ),

    last_dead_letter: "select max(id) as last from outbox_dead_letters",

    // The write transaction holds all locks there are.
    lock_subscriptions: "select id from outbox_subscriptions where id in (select value from json_each($1))",

    take_dead_letters: "
    delete from outbox_dead_letters
     where id in (select value from json_each($1))
       and (not $2 or exists (select 1 from outbox_events where position = outbox_dead_letters.position))
    returning subscription_id, key, position",

    lock_lanes: "select $1 is null",

    release_lanes: "
    update outbox_lanes
       set held_at = null,
           due_at = coalesce((select d.due_at from outbox_deliveries d
                               where d.subscription_id = outbox_lanes.subscription_id and d.key = outbox_lanes.key
                               order by seq limit 1), due_at)
     where (subscription_id, key) in (select value->>'subscription', value->>'key' from json_each($1))
       and exists (select 1 from json_each($1)
                    where value->>'subscription' = subscription_id and value->>'key' = outbox_lanes.key
                      and value->>'position' = held_at)",

    // A lane that is leased has at least one attempt: that it has none tells its holder's report that the head is another.
    restart_lanes: "
    update outbox_lanes
       set attempts = 0, attempt_log = null, last_error = null,
           due_at = case when leased_by is null then (
               select d.due_at from outbox_deliveries d
                where d.subscription_id = outbox_lanes.subscription_id and d.key = outbox_lanes.key
                order by seq limit 1) else due_at end
     where (subscription_id, key) in (select value->>'subscription', value->>'key' from json_each($1))
       and held_at is null
       and exists (select 1 from json_each($1)
                    where value->>'subscription' = subscription_id and value->>'key' = outbox_lanes.key
                      and value->>'position' = (select min(position) from outbox_deliveries d
                                                 where d.subscription_id = outbox_lanes.subscription_id
                                                   and d.key = outbox_lanes.key))",

    last_position: "select max(position) as last from outbox_events",

    next_positions: "
    select position from outbox_events
     where position > $1 and position <= $2 and ($3 is null or event_type = $3) order by position limit $4",

    positions_of: "
    select position from outbox_events where event_id in (select unhex(value) from json_each($1)) order by position",

    // No payloads: nobody reads them. One that cannot be read stays so.
    lock_events: "
    select position, event_id, event_type, schema_version, aggregate_type, aggregate_id,
           case when typeof(payload) = 'text' then 'null' else payload end as payload, occurred_at, recorded_at, tenant,
           actor_kind, actor_id, correlation_id, causation_id, traceparent, tracestate, tags, max_attempts, wait_seconds,
           not_before
      from outbox_events e where position in (select value from json_each($1))
       and not exists (select 1 from outbox_unrouted u where u.position = e.position) order by position",

    positions_unfinished: "
    select position from outbox_deliveries
     where subscription_id = $1 and position in (select value from json_each($2))",

    take_delivered: "
    delete from outbox_delivered where subscription_id = $1 and position in (select value from json_each($2))",

    take_dead_letters_at: "
    delete from outbox_dead_letters
     where subscription_id = $1 and position in (select value from json_each($2))
    returning key, position",

    insert_audit: "
    insert into outbox_audit (actor, action, target, details) values ($1, $2, $3, $4) returning id",

    update_audit: "update outbox_audit set details = $2 where id = $1",

    list_audit: "select id, at, actor, action, target, details from outbox_audit order by id desc limit $1",

    definitions: "select details from outbox_audit where action = $1 and target = $2 order by id",

    old_events: concat!(
        "select e.position, e.recorded_at as recorded_at from outbox_events e",
        old!(),
        " and e.recorded_at >= $3
            and e.recorded_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', $2))
          order by e.recorded_at limit $4"
    ),

    still_old: "select value as position from json_each($2) where $1 is not null",

    archive_events: "
    insert into outbox_archive (position, event_id, event)
    select position, event_id, json_object(
           'position', position, 'event_id', lower(hex(event_id)), 'event_type', cast(event_type as text),
           'schema_version', schema_version, 'aggregate_type', cast(aggregate_type as text),
           'aggregate_id', cast(aggregate_id as text), 'payload', cast(payload as text), 'occurred_at', occurred_at,
           'recorded_at', recorded_at, 'tenant', tenant, 'actor_kind', actor_kind, 'actor_id', actor_id,
           'correlation_id', correlation_id, 'causation_id', causation_id, 'traceparent', traceparent,
           'tracestate', tracestate, 'tags', cast(tags as text), 'max_attempts', max_attempts,
           'wait_seconds', wait_seconds, 'not_before', not_before)
      from outbox_events where position in (select value from json_each($1))
    on conflict do nothing",

    purge_delivered: "
    delete from outbox_delivered
     where (subscription_id, position) in (
           select s.id, p.value from json_each($1) p cross join outbox_subscriptions s)",

    purge_events: "delete from outbox_events where position in (select value from json_each($1))",

    purge_inbox: "
    delete from outbox_inbox
     where (consumer, event_id) in (
           select consumer, event_id from outbox_inbox i
            where handled_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', $1))
              and not exists (select 1 from outbox_events e where e.event_id = i.event_id)
            order by handled_at limit $2)",
};
