//! All SQL for PostgreSQL.
//!
//! Lists travel as one JSON parameter, as on SQLite. Durations are in seconds; `clock_timestamp()` is the database's
//! clock. Everything runs at READ COMMITTED.
//!
//! Locks: a request only inserts. Routing holds the row of `outbox_meta`, so one process routes at a time, and upserts
//! lanes sorted by (subscription, key); it waits for a lane 50 ms at most. Claims and settlements take lanes with SKIP
//! LOCKED: they never wait. So no request waits for a worker, and none is the victim of a deadlock.

use crate::sql::{Flush, ListEvents, Route, RouteStatements, Settle, Sql};

/// A time of an event; nothing if it is none, `infinity` for example: the driver panics at it, and not every server can
/// calculate with it.
macro_rules! readable_time {
    ($column:literal) => {
        concat!("case when ", $column, " > '4000-01-01 BC' and ", $column, " < '200000-01-01' then ", $column, " end")
    };
}

/// How long an event `e` waits: within what a push takes, whatever was stored.
macro_rules! wait {
    () => {
        "least(greatest(e.wait_seconds, -2000000), 31622400000) * interval '1 second'"
    };
}

/// The columns of the events `e` as the store reads them: JSON as text. The payload may be another expression, where
/// nobody reads it and many of them would fill the memory.
macro_rules! event_columns {
    () => {
        event_columns!("e.payload::text")
    };
    ($payload:literal) => {
        concat!(
            "e.position, e.event_id, e.event_type, e.schema_version, e.aggregate_type, e.aggregate_id, ",
            $payload,
            " as payload, ",
            readable_time!("e.occurred_at"),
            " as occurred_at, ",
            readable_time!("e.recorded_at"),
            " as recorded_at, e.tenant, e.actor_kind, e.actor_id, e.correlation_id, e.causation_id, e.traceparent,
             e.tracestate, e.tags::text as tags, e.max_attempts, e.wait_seconds, e.not_before"
        )
    };
}

macro_rules! list_events {
    ($of:literal) => {
        concat!(
            "select ",
            event_columns!(),
            " from outbox_events e where ",
            $of,
            " and ($1::text is null or e.event_type = $1) and ($2::text is null or e.aggregate_type = $2)
              and ($3::text is null or e.aggregate_id = $3) and ($4::text is null or e.tenant = $4)
              and ($5::text is null or e.actor_kind = $5) and ($6::text is null or e.recorded_at >= $6::timestamptz)
              and ($7::text is null or e.recorded_at < $7::timestamptz) and ($8::bigint is null or e.position < $8)
            order by e.position desc limit $9"
        )
    };
}

macro_rules! of_dead_letters {
    () => {
        " from outbox_dead_letters x
          join outbox_subscriptions s on s.id = x.subscription_id
          left join outbox_events e on e.position = x.position
         where ($1::text is null or x.id in (select value::bigint from jsonb_array_elements_text($1::text::jsonb)))
           and ($2::integer is null or x.subscription_id = $2) and ($3::text is null or e.event_type = $3)
           and ($4::text is null or x.died_at >= $4::timestamptz)
           and ($5::text is null or x.died_at < $5::timestamptz)"
    };
}

/// Of an event `e` and the rules $1: when it is old, and that nobody needs it; neither a subscription that changes, nor a
/// backfill. Times are of the statement, so that they can be looked up in an index.
macro_rules! old {
    () => {
        concat!(
            " cross join lateral (
               select statement_timestamp() - r.seconds * interval '1 second' as at
                 from rows from (jsonb_to_recordset($1::text::jsonb) as (name text, prefix boolean, seconds float8))
                      with ordinality as r(name, prefix, seconds, ordinality)
                where e.event_type = r.name or r.prefix and starts_with(e.event_type, r.name)
                order by r.ordinality limit 1) cutoff
         where e.recorded_at <= cutoff.at
           and not exists (select 1 from outbox_unrouted where position = e.position)
           and not exists (
               select 1 from outbox_subscriptions s
                where s.backfill_from <= e.position
                   or exists (select 1 from outbox_deliveries
                               where subscription_id = s.id and position = e.position)
                   or exists (select 1 from outbox_dead_letters
                               where subscription_id = s.id and position = e.position)
                   or exists (select 1 from outbox_delivered
                               where subscription_id = s.id and position = e.position and delivered_at > cutoff.at))"
        )
    };
}

/// When an event `e` asks to be delivered. One that was stored while the clock was ahead asks for it now.
macro_rules! asked_for {
    () => {
        concat!(
            "greatest(least(coalesce(",
            readable_time!("e.recorded_at"),
            ", clock_timestamp()), clock_timestamp()) + ",
            wait!(),
            ", ",
            readable_time!("e.not_before"),
            ")"
        )
    };
}

/// What a flush answers with, of an `event`: what routing needs besides what the process has, and what finds out about a
/// COMMIT whose answer is lost.
macro_rules! flushed {
    () => {
        "position, recorded_at,
         extract(epoch from greatest(recorded_at + wait_seconds * interval '1 second', not_before))::float8 as due,
         pg_backend_pid() as session, pg_postmaster_start_time() as server, now() as began"
    };
}

/// What routing reads of an event `e`: no payload.
macro_rules! subject {
    () => {
        concat!(
            "e.position, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, e.tenant, e.tags::text as tags,
             extract(epoch from clock_timestamp() - ",
            readable_time!("e.recorded_at"),
            ")::float8 as age, extract(epoch from ",
            asked_for!(),
            ")::float8 as due"
        )
    };
}

/// The marks `u` after the floor with their events `e`.
macro_rules! waiting {
    () => {
        " from ((select position from outbox_unrouted
                  where ahead and set_aside_at is null and position <= $1 order by position limit 100)
                union all
                (select position from outbox_unrouted
                  where position > $1 and set_aside_at is null order by position limit $2)) u
          left join lateral (select * from outbox_events e where e.position = u.position offset 0) e on true
         order by u.position"
    };
}

pub(crate) static POSTGRES: Sql = Sql {
    schema_version: "select schema_version from outbox_meta",

    write_the_same: "update outbox_meta set schema_version = schema_version",

    generation: "select routing_generation as generation, true as waits from outbox_meta",

    instance: "select instance, clock_timestamp() as now from outbox_meta",

    // A statement of its own: what is computed from the tables comes after it, or it would be from before the lock. What
    // waits for this lock is the routing of the whole service, so it is given back soon whatever becomes of the client.
    lock_generation: Some(
        "/* outbox:meta */ with limits as materialized (
                select set_config('lock_timeout', '100ms', true),
                       set_config('idle_in_transaction_session_timeout', '1s', true))
         select m.routing_generation as generation from outbox_meta m, limits for update of m",
    ),

    // At random: what was changed and is lost with a failover may not have the number of what is changed then.
    bump_generation: "
        /* outbox:meta */ update outbox_meta
           set routing_generation =
               ('x' || left(md5(gen_random_uuid()::text), 16))::bit(64)::bigint & 9223372036854775807",

    restore_meta: "
        insert into outbox_meta (id, schema_version, routing_generation, instance)
        values (1, $1, (random() * 4e18)::bigint, left(replace(gen_random_uuid()::text, '-', ''), 16))
        on conflict do nothing",

    subscriptions: "select id, name, filter::text as filter, ordering::text as ordering
                      from outbox_subscriptions order by id",

    // One round trip, and no lock that anybody else wants. `one` does the same for what most requests push.
    flush: Flush::Marked {
        one: concat!(
            "with event as (
                insert into outbox_events (
                    event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at, tags,
                    max_attempts, wait_seconds, not_before,
                    tenant, actor_kind, actor_id, correlation_id, causation_id, traceparent, tracestate)
                values ($8, $9, $10, $11, $12, $13::text::json, $14::text::timestamptz, $15::text::jsonb, $18, $16,
                        $17::text::timestamptz, $1, $2, $3, $4, $5, $6, $7)
                returning position, recorded_at, wait_seconds, not_before),
              mark as (
                insert into outbox_unrouted (position, ahead)
                select position, case when wait_seconds < 0 then true end from event)
         select ",
            flushed!(),
            " from event"
        ),
        many: concat!(
            "with input as materialized (
                select e.*
                  from rows from (jsonb_to_recordset($8::text::jsonb) as (
                         id uuid, event_type text, schema_version integer, aggregate_type text, aggregate_id text,
                         payload text, occurred_at timestamptz, tags jsonb, max_attempts integer, wait float8,
                         not_before timestamptz)) with ordinality as e),
              event as (
                insert into outbox_events (
                    event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at, tags,
                    max_attempts, wait_seconds, not_before,
                    tenant, actor_kind, actor_id, correlation_id, causation_id, traceparent, tracestate)
                select e.id, e.event_type, e.schema_version, e.aggregate_type, e.aggregate_id, e.payload::json,
                       e.occurred_at, e.tags, e.max_attempts, e.wait, e.not_before, $1, $2, $3, $4, $5, $6, $7
                  from input e
                 order by e.ordinality
                returning position, recorded_at, wait_seconds, not_before),
              mark as (
                insert into outbox_unrouted (position, ahead)
                select position, case when wait_seconds < 0 then true end from event)
         select ",
            flushed!(),
            " from event order by position"
        ),
    },

    // What was put back lies below the floor, and comes first. Read in one snapshot: what has to come before an event is
    // there if the event is.
    unrouted: concat!(
        "select (select routing_generation from outbox_meta) as generation, u.position as mark, ",
        subject!(),
        waiting!()
    ),

    unrouted_ahead: concat!(
        "select u.position as mark, ",
        subject!(),
        " from (select position from outbox_unrouted
                  where ahead and set_aside_at is null and position > $1 order by position limit $2) u
          left join lateral (select * from outbox_events e where e.position = u.position offset 0) e on true
         order by u.position"
    ),

    last_unrouted: "
        select position from outbox_unrouted
         where position > $1 and set_aside_at is null order by position desc limit 1",

    unrouted_until: "
        select position from outbox_unrouted
         where position > $1 and position <= $2 and set_aside_at is null order by position limit 1",

    // ONE statement, and its own transaction: no lock of it is held across a round trip. It answers with numbers only, since
    // an answer that a frozen client does not read would hold its locks. Whoever has the row of `outbox_meta` routes; the
    // generation is checked again with the lock. `taken` waits for marks that somebody has locked, and never skips one: a
    // later event of its key would come before it. Unless the given events were read in one snapshot, `seen` looks for marks
    // up to the last of them that are not among them: those come first. Counting would not do, since a given one may be
    // routed already. `seq` is drawn here, so what commits late comes behind what workers have tried.
    //
    // A crash of the server may take the routing back, marks included: nothing waits for the disk. An effect that commits
    // makes the routing before it durable.
    route: Route::AtOnce(RouteStatements {
        unrouted_whole: concat!(
            "select (select routing_generation from outbox_meta) as generation, u.position as mark, ",
            event_columns!(
                "case when pg_column_size(e.payload) <= 4096 and octet_length(e.payload::text) <= 4096
                      then e.payload::text end"
            ),
            ", extract(epoch from ",
            asked_for!(),
            ")::float8 as due",
            waiting!()
        ),

    route: "
        /* outbox:meta */ with
              limits as materialized (
                select set_config('lock_timeout', '50ms', true), set_config('synchronous_commit', 'off', true),
                       set_config('idle_in_transaction_session_timeout', '1s', true)),
              meta as materialized (
                select 1 from outbox_meta m, limits where m.routing_generation = $1 for update of m skip locked),
              given as materialized (
                select g.position, g.due
                  from jsonb_to_recordset($2::text::jsonb) as g(position bigint, due float8), meta),
              seen as materialized (
                select bool_and(given.position is not null) as complete
                  from (select position from outbox_unrouted
                         where position > $6 and position <= $7 and set_aside_at is null
                           and $8::bigint is not null and exists (select from meta)
                         order by position limit $8 + 1) found
                  left join given using (position)),
              taken as (
                delete from outbox_unrouted
                 where position = any (array(select position from given))
                   and coalesce((select complete from seen), true)
                returning position),
              matched as materialized (
                select m.lane, m.position, to_timestamp(given.due) as due_at
                  from jsonb_to_recordset($4::text::jsonb) as m(lane integer, position bigint)
                  join given using (position) join taken using (position)),
              lane as materialized (
                select l.n, l.subscription, l.key, l.tenant, l.passed, m.pending, m.due_at,
                       (random() * 4e18)::bigint as token
                  from jsonb_to_recordset($3::text::jsonb) as l(
                         n integer, subscription integer, key text, tenant text, passed boolean)
                  join (select lane, count(*)::integer as pending, (array_agg(due_at order by position))[1] as due_at
                          from matched group by lane) m on m.lane = l.n),
              leased as materialized (
                select l.n, t.worker, t.lease
                  from (select n, subscription, row_number() over (partition by subscription order by due_at, n) as nth
                          from lane where due_at <= clock_timestamp() and passed is not true) l
                  join jsonb_to_recordset($5::text::jsonb) as t(
                         subscription integer, worker text, lanes integer, lease float8)
                    on t.subscription = l.subscription and l.nth <= t.lanes
                  join outbox_subscriptions s
                    on s.id = l.subscription and s.paused_at is null and s.backfill_from is null
                   and s.circuit_until is null),
              new as materialized (select * from lane left join leased using (n)),
              deliveries as (
                insert into outbox_deliveries (subscription_id, key, position, due_at)
                select lane.subscription, lane.key, m.position, m.due_at
                  from matched m join lane on lane.n = m.lane
                 order by m.position),
              lanes as (
                insert into outbox_lanes as old (
                    subscription_id, key, tenant, pending, lease_token, due_at, attempts, leased_by)
                select subscription, key, tenant, pending, token,
                       coalesce(clock_timestamp() + lease * interval '1 second', due_at),
                       case when worker is null then 0 else 1 end, worker
                  from new
                 order by subscription, key
                on conflict (subscription_id, key) do update set pending = old.pending + excluded.pending
                returning subscription_id, key, lease_token),
              written as (
                select new.n, new.subscription, new.token, new.worker is not null and new.token = lanes.lease_token as mine
                  from lanes join new on new.subscription = lanes.subscription_id and new.key = lanes.key),
              answer as (
                select json_agg(json_build_array(n, token)) filter (where mine)::text as leased,
                       json_agg(distinct subscription) filter (where not mine)::text as others
                  from written)
        select (select routing_generation from outbox_meta) as generation, exists (select from meta) as locked,
               (select count(*) from taken) as taken, coalesce((select complete from seen), true) as complete,
               extract(epoch from clock_timestamp())::float8 as now, leased, others
          from answer",

    // Most commits store one event, and somebody waits for it. No list has to be read, ordered or shared out. A
    // lane is new if it has the token that it was given here.
    route_one: "
        /* outbox:meta */ with
              limits as materialized (
                select set_config('lock_timeout', '50ms', true), set_config('synchronous_commit', 'off', true),
                       set_config('idle_in_transaction_session_timeout', '1s', true)),
              meta as materialized (
                select 1 from outbox_meta m, limits where m.routing_generation = $1 for update of m skip locked),
              earlier as materialized (
                select position from outbox_unrouted
                 where position > $5 and position < $2 and set_aside_at is null and exists (select from meta)
                 limit 1),
              taken as (
                delete from outbox_unrouted
                 where position = $2 and exists (select from meta) and not exists (select from earlier)
                returning position),
              lane as materialized (
                select l.*
                  from taken, jsonb_to_recordset($4::text::jsonb) as l(
                         subscription integer, key text, tenant text, token bigint, worker text, lease float8)),
              deliveries as (
                insert into outbox_deliveries (subscription_id, key, position, due_at)
                select subscription, key, $2, to_timestamp($3) from lane),
              lanes as (
                insert into outbox_lanes as old (
                    subscription_id, key, tenant, pending, lease_token, due_at, attempts, leased_by)
                select l.subscription, l.key, l.tenant, 1, l.token,
                       case when s.id is null then to_timestamp($3) else clock_timestamp() + l.lease * interval '1 second' end,
                       case when s.id is null then 0 else 1 end, case when s.id is not null then l.worker end
                  from lane l
                  left join outbox_subscriptions s
                    on s.id = l.subscription and l.worker is not null and to_timestamp($3) <= clock_timestamp()
                   and s.paused_at is null and s.backfill_from is null and s.circuit_until is null
                 order by l.subscription
                on conflict (subscription_id, key) do update set pending = old.pending + excluded.pending
                returning subscription_id, lease_token, leased_by is not null as leased)
        select (select routing_generation from outbox_meta) as generation, exists (select from meta) as locked,
               (select count(*) from taken) as taken, not exists (select from earlier) as complete,
               extract(epoch from clock_timestamp())::float8 as now, lanes.*
          from (select) one left join lanes on true",

    // At once, and all of them: a lock that is held by somebody else is not waited for.
    held_lanes: "
        with wanted as materialized (
                select * from jsonb_to_recordset($1::text::jsonb) as l(n integer, subscription integer, key text)),
              free as materialized (
                select w.n from wanted w
                 cross join lateral (
                       select from outbox_lanes l where l.subscription_id = w.subscription and l.key = w.key
                          for update skip locked) l)
        select w.n from wanted w
         cross join lateral (
               select from outbox_lanes l where l.subscription_id = w.subscription and l.key = w.key offset 0) l
         where w.n not in (select n from free)",

    held_marks: "
        with free as materialized (
                select position from outbox_unrouted
                 where position = any (array(select value::bigint from jsonb_array_elements_text($1::text::jsonb)))
                   for update skip locked)
        select position from outbox_unrouted
         where position = any (array(select value::bigint from jsonb_array_elements_text($1::text::jsonb)))
           and position not in (select position from free)",

    // A writer has this lock before it draws a position, and until its transaction ends; a prepared one has it too.
    writers: "
        select coalesce(virtualtransaction, '') as writer from pg_locks
          where relation = 'outbox_events'::regclass and mode = 'RowExclusiveLock' and granted
            and database = (select oid from pg_database where datname = current_database())",

    end_stuck: "
        select pg_terminate_backend(pid) as ended from pg_stat_activity
          where datname = current_database() and usename = current_user and pid <> pg_backend_pid()
            and ltrim(query, E' \\n') like '/* outbox:meta */%' and state <> 'idle'
            and xact_start < clock_timestamp() - interval '3 seconds'",
    }),

    count_unrouted: concat!(
        "select (select count(*) from (select from outbox_unrouted where set_aside_at is null limit 1000000) u) as waiting,
                (select count(*) from outbox_unrouted where set_aside_at is not null) as set_aside,
                (select greatest(0, extract(epoch from clock_timestamp() - ",
        readable_time!("e.recorded_at"),
        "))::float8 from outbox_events e
                  where e.position = (select min(position) from outbox_unrouted where set_aside_at is null)
                ) as oldest_age_seconds"
    ),

    unrouted_mark: "select set_aside_at, error from outbox_unrouted where position = $1",

    list_set_aside: "
        select u.position, u.set_aside_at, coalesce(u.error, '') as error, e.event_id, e.event_type
          from outbox_unrouted u left join outbox_events e on e.position = u.position
         where u.set_aside_at is not null and ($1::bigint is null or u.position < $1)
         order by u.position desc limit $2",

    put_back: "
        update outbox_unrouted set set_aside_at = null, error = null, ahead = true
         where set_aside_at is not null
           and ($1::text is null or position in (select value::bigint from jsonb_array_elements_text($1::text::jsonb)))",

    discard_set_aside: "
        delete from outbox_unrouted
         where set_aside_at is not null
           and ($1::text is null or position in (select value::bigint from jsonb_array_elements_text($1::text::jsonb)))",

    set_aside: "
        update outbox_unrouted set set_aside_at = clock_timestamp(), error = $2 where position = $1 and set_aside_at is null",

    insert_deliveries: concat!(
        "insert into outbox_deliveries (subscription_id, key, seq, position, due_at)
         select d.subscription, d.key, d.position, d.position,
                greatest(coalesce(",
        readable_time!("e.recorded_at"),
        ", clock_timestamp()) + ",
        wait!(),
        ", ",
        readable_time!("e.not_before"),
        ") from jsonb_to_recordset($1::text::jsonb) as d(subscription integer, key text, position bigint)
          join outbox_events e on e.position = d.position
        on conflict do nothing"
    ),

    // The lane of a delivery that waits keeps its due time; see the same statement for SQLite about the token.
    upsert_lanes: "
        insert into outbox_lanes as lane (subscription_id, key, tenant, pending, lease_token, due_at)
        select subscription, key,
               (select e.tenant from outbox_deliveries d join outbox_events e on e.position = d.position
                 where d.subscription_id = n.subscription and d.key = n.key order by seq limit 1),
               deliveries, (random() * 4e18)::bigint,
               (select due_at from outbox_deliveries d
                 where d.subscription_id = n.subscription and d.key = n.key order by seq limit 1)
          from jsonb_to_recordset($1::text::jsonb) as n(subscription integer, key text, deliveries integer)
         order by subscription, key
        on conflict (subscription_id, key) do update set pending = lane.pending + excluded.pending",

    next_due: "
        select s.id, circuit_failures, extract(epoch from circuit_until - clock_timestamp())::float8 as circuit_seconds,
               (select extract(epoch from due_at - clock_timestamp())::float8 from outbox_lanes
                 where subscription_id = s.id and due_at < 'infinity' order by due_at limit 1) as seconds
          from jsonb_array_elements_text($1::text::jsonb) wanted(id)
          join outbox_subscriptions s on s.id = wanted.id::integer
         where paused_at is null and backfill_from is null",

    // The lanes exist and are locked, so nothing is ever inserted: an upsert finds each by its primary key, whatever plan is
    // made. An update is planned once, by the first idle look, when the table is empty; with that plan it compared every lane
    // of the subscription with every key, 40 ms for 500 of 5,000.
    claim: "
        with wanted as materialized (
                select w.* from jsonb_to_recordset($1::text::jsonb) as w(
                         subscription integer, lanes integer, probe boolean, after timestamptz, key text)
                  join outbox_subscriptions s on s.id = w.subscription
                 where s.paused_at is null and s.backfill_from is null and (s.circuit_until is null or w.probe)),
              due as materialized (
                select d.* from wanted cross join lateral (
                       select subscription_id, key, due_at from outbox_lanes
                        where subscription_id = wanted.subscription and due_at <= clock_timestamp()
                          and due_at < 'infinity' and (due_at, key) > (coalesce(wanted.after, '-infinity'), wanted.key)
                        order by due_at, key limit wanted.lanes for update skip locked) d),
              last as materialized (
                select distinct on (subscription_id) subscription_id, key, due_at from due where due_at > '-infinity'
                 order by subscription_id, due_at desc, key desc)
        insert into outbox_lanes as lane (subscription_id, key, pending, lease_token, due_at)
        select subscription_id, key, 0, 0, due_at from due
        on conflict (subscription_id, key) do update
           set attempts = lane.attempts + $4, lease_token = lane.lease_token + 1, leased_by = $3,
               due_at = clock_timestamp() + $2 * interval '1 second'
        returning subscription_id, key, lease_token, leased_by, attempts + 1 - $4 as attempts,
                  attempt_log::text as attempt_log,
                  case when (subscription_id, key) in (select subscription_id, key from last)
                       then (select due_at from last where last.subscription_id = lane.subscription_id) end as was_due_at",

    // A tenant after another, by the index: however many lanes the passed ones have, none of theirs is looked at.
    claim_others: "
        with recursive tenant(name, n) as (
                (select tenant, 1 from outbox_lanes where subscription_id = $1 and tenant > $2 order by tenant limit 1)
                union all
                select (select tenant from outbox_lanes where subscription_id = $1 and tenant > before.name
                         order by tenant limit 1), n + 1
                  from tenant before where name is not null and n < 100),
              due as materialized (
                select d.* from tenant cross join lateral (
                       select key, due_at from outbox_lanes
                        where subscription_id = $1 and tenant = name and due_at <= clock_timestamp()
                        order by due_at, key limit 1 for update skip locked) d
                 where name <> all (array(select jsonb_array_elements_text($3::text::jsonb)))
                 limit $4)
        insert into outbox_lanes as lane (subscription_id, key, pending, lease_token, due_at)
        select $1, key, 0, 0, due_at from due
         where exists (select from outbox_subscriptions
                        where id = $1 and paused_at is null and backfill_from is null and circuit_until is null)
        on conflict (subscription_id, key) do update
           set attempts = lane.attempts + 1, lease_token = lane.lease_token + 1, leased_by = $6,
               due_at = clock_timestamp() + $5 * interval '1 second'
        returning subscription_id, key, lease_token, leased_by, attempts, attempt_log::text as attempt_log, tenant",

    take_probe: "
        update outbox_subscriptions set circuit_until = clock_timestamp() + $2 * interval '1 second'
         where id = $1 and circuit_until <= clock_timestamp()",

    reserve: "
        with asked as materialized (
                select * from jsonb_to_recordset($1::text::jsonb) as a(subscription integer, time float8, longest float8)),
              time as materialized (select clock_timestamp() as now)
        update outbox_subscriptions s
           set rate_at = case when s.rate_at > now and s.rate_at <= now + longest * interval '1 second' then s.rate_at else now end
                       + a.time * interval '1 second'
          from asked a, time
         where s.id = a.subscription
           and (coalesce(s.rate_at, now) < now + interval '1 second' or s.rate_at > now + longest * interval '1 second')
        returning s.id, extract(epoch from s.rate_at - now)::float8 - a.time as after",

    open_circuit: "
        update outbox_subscriptions
           set circuit_until = clock_timestamp() + $2 * interval '1 second', circuit_failures = circuit_failures + $3
         where id = $1",

    close_circuit: "
        update outbox_subscriptions set circuit_until = null, circuit_failures = 0
         where id = $1 and circuit_until is not null",

    // The first of each lane come first. A payload is counted where it lies, and read if it comes along.
    runs: concat!(
        "select e.subscription, e.key, e.queued,
                date_part('epoch', e.due_at) as since, e.due_at <= clock_timestamp() as due, ",
        event_columns!(),
        " from (select lane.subscription, lane.key, d.position as queued, d.seq, d.due_at, d.number, e.*,
                       coalesce(sum(octet_length(e.payload::text)) over (
                           partition by lane.subscription
                           order by d.number, d.seq rows between unbounded preceding and 1 preceding), 0) as before
                  from jsonb_to_recordset($1::text::jsonb) as lane(subscription integer, key text, run integer)
                 cross join lateral (
                       select position, seq, due_at, row_number() over (order by seq) as number
                         from outbox_deliveries
                        where subscription_id = lane.subscription and key = lane.key order by seq
                        limit least(lane.run, $3)) d
                  left join lateral (select * from outbox_events e where e.position = d.position offset 0) e on true) e
         where e.before < $2
         order by e.number, e.seq"
    ),

    held: "
        select (r.ordinality - 1)::bigint as report
          from rows from (jsonb_to_recordset($1::text::jsonb) as (subscription integer, key text, token bigint,
                                                                 worker text))
               with ordinality as r(subscription, key, token, worker, ordinality)
         cross join lateral (
               select from outbox_lanes l
                where l.subscription_id = r.subscription and l.key = r.key
                  and l.lease_token = r.token and l.leased_by = r.worker offset 0) l",

    note_attempts: "
        with held as materialized (
                select l.subscription_id, l.key, r.log
                  from jsonb_to_recordset($1::text::jsonb) as r(
                         subscription integer, key text, token bigint, worker text, log text)
                 cross join lateral (
                       select l.subscription_id, l.key from outbox_lanes l
                        where l.subscription_id = r.subscription and l.key = r.key
                          and l.lease_token = r.token and l.leased_by = r.worker
                          for update skip locked) l)
        update outbox_lanes l
           set attempt_log = case when l.attempts > 0 then held.log::jsonb end
          from held
         where l.subscription_id = held.subscription_id and l.key = held.key
           and l.key = any (array(select key from held))
        returning l.subscription_id, l.key, l.lease_token, l.leased_by",

    // One round trip. Everything depends on `held`, so the lanes are locked before anything of them changes, and `pending`
    // is that of the locked row. What the statement reads besides is from before the locks: a delivery that a commit has
    // added in between is counted in `pending`, and if it is not seen as the lane's next one, the lane is due at once. The
    // sub-selects hold the planner to the primary keys; for the joins at the end, `BEGIN_OF_WORKER` in sessions.rs does.
    // An effect settles in its own transaction: one that is not committed within a second loses its locks, since routing
    // waits for them.
    settle: Settle::AtOnce(
        "with lease as materialized (
                select r.*, r.ordinality - 1 as n
                  from rows from (jsonb_to_recordset($1::text::jsonb) as (
                         subscription integer, key text, token bigint, worker text, next text, attempts integer, wait float8,
                         error text, log text, held_at bigint)) with ordinality as r),
              soon_over as materialized (select set_config('idle_in_transaction_session_timeout', '1s', true)),
              held as materialized (
                select lease.*, l.pending, l.attempts = 0 as overtaken
                  from lease cross join soon_over cross join lateral (
                       select pending, attempts from outbox_lanes l
                        where l.subscription_id = lease.subscription and l.key = lease.key
                          and l.lease_token = lease.token and l.leased_by = lease.worker
                          for update skip locked) l),
              finished as materialized (
                select f.*, held.subscription, held.key, d.ctid as place, d.seq
                  from jsonb_to_recordset($2::text::jsonb) as f(
                         lease bigint, position bigint, attempts integer, log text, error text)
                  join held on held.n = f.lease
                 cross join lateral (
                       select ctid, seq from outbox_deliveries d
                        where d.subscription_id = held.subscription and d.position = f.position and d.key = held.key
                       offset 0) d),
              deleted as (
                delete from outbox_deliveries where ctid = any (array(select place from finished))
                returning subscription_id as subscription, position),
              moved as materialized (select f.* from finished f join deleted using (subscription, position)),
              delivered as (
                insert into outbox_delivered (subscription_id, position, attempts, attempt_log, delivered_at)
                select subscription, position, attempts, log::jsonb, clock_timestamp() from moved where error is null
                on conflict (subscription_id, position) do update
                   set attempts = excluded.attempts, attempt_log = excluded.attempt_log,
                       delivered_at = excluded.delivered_at),
              dead as (
                insert into outbox_dead_letters (subscription_id, position, key, attempts, error, attempt_log, died_at)
                select subscription, position, key, attempts, error, log::jsonb, clock_timestamp()
                  from moved where error is not null
                on conflict (subscription_id, position) do update
                   set attempts = excluded.attempts, error = excluded.error, attempt_log = excluded.attempt_log,
                       died_at = excluded.died_at),
              ended as materialized (
                select held.*, coalesce(m.number, 0) as moved, coalesce(m.last, 0) as last,
                       held.pending <= coalesce(m.number, 0) and held.held_at is null as empty
                  from held
                  left join (select lease, count(*) as number, max(seq) as last from moved group by lease) m
                    on m.lease = held.n),
              emptied as (
                delete from outbox_lanes l using ended
                 where ended.empty and l.subscription_id = ended.subscription and l.key = ended.key),
              advanced as (
                update outbox_lanes l
                   set pending = l.pending - ended.moved,
                       attempts = case when ended.overtaken then 0 else ended.attempts end,
                       leased_by = case ended.next when 'keep' then l.leased_by end,
                       due_at = case
                           when ended.next = 'keep' then l.due_at
                           when ended.next = 'retry' and not ended.overtaken
                           then clock_timestamp() + ended.wait * interval '1 second'
                           when ended.next = 'hold' then 'infinity'
                           else coalesce(
                               -- Unless one came late before those that are over: the claim finds out when it is due.
                               case when not ended.overtaken and ended.moved = (
                                    select count(*) from outbox_deliveries d
                                     where d.subscription_id = ended.subscription and d.key = ended.key
                                       and d.seq <= ended.last)
                               then (select d.due_at from outbox_deliveries d
                                      where d.subscription_id = ended.subscription and d.key = ended.key
                                        and d.seq > ended.last order by seq limit 1) end,
                               clock_timestamp()) end,
                       last_error = case when ended.next = 'release' or ended.overtaken then l.last_error
                                         else ended.error end,
                       attempt_log = case when not ended.overtaken then ended.log::jsonb end,
                       held_at = ended.held_at
                  from ended
                 where not ended.empty and l.subscription_id = ended.subscription and l.key = ended.key)
         select n::bigint as lease, true as done from held
         union all
         select lease.n::bigint, false
           from lease cross join lateral (
                select from outbox_lanes l
                 where l.subscription_id = lease.subscription and l.key = lease.key
                   and l.lease_token = lease.token and l.leased_by = lease.worker offset 0) l
          where lease.n not in (select n from held)",
    ),

    due_with_head: "
        update outbox_lanes l
           set due_at = (select d.due_at from outbox_deliveries d
                          where d.subscription_id = l.subscription_id and d.key = l.key order by seq limit 1)
         where l.subscription_id = $1 and l.key in (select jsonb_array_elements_text($2::text::jsonb))
           and l.attempts = 0 and l.last_error is null",

    take_over: "
        with held as materialized (
                select l.subscription_id, l.key
                  from jsonb_to_recordset($1::text::jsonb) as r(
                         subscription integer, key text, token bigint, worker text)
                 cross join lateral (
                       select l.subscription_id, l.key from outbox_lanes l
                        where l.subscription_id = r.subscription and l.key = r.key
                          and l.lease_token = r.token and l.leased_by = r.worker and l.leased_by like '% (relay)'
                          for update skip locked) l)
        update outbox_lanes l
           set attempts = attempts + 1, lease_token = lease_token + 1, leased_by = $3,
               due_at = clock_timestamp() + $2 * interval '1 second'
          from held
         where l.subscription_id = held.subscription_id and l.key = held.key
           and l.key = any (array(select key from held))
        returning l.subscription_id, l.key, l.lease_token, l.leased_by, l.attempts, l.attempt_log::text as attempt_log",

    relayed: "
        select (r.ordinality - 1)::bigint as report
          from rows from (jsonb_to_recordset($1::text::jsonb) as (subscription integer, key text, token bigint,
                                                                 worker text))
               with ordinality as r(subscription, key, token, worker, ordinality)
         cross join lateral (
               select from outbox_lanes l
                where l.subscription_id = r.subscription and l.key = r.key
                  and l.lease_token = r.token and l.leased_by = r.worker and l.leased_by like '% (relay)' offset 0) l",

    renew: "
        with held as materialized (
                select l.subscription_id, l.key
                  from jsonb_to_recordset($1::text::jsonb) as r(
                         subscription integer, key text, token bigint, worker text)
                 cross join lateral (
                       select l.subscription_id, l.key from outbox_lanes l
                        where l.subscription_id = r.subscription and l.key = r.key
                          and l.lease_token = r.token and l.leased_by = r.worker
                          for update skip locked) l)
        update outbox_lanes l
           set due_at = clock_timestamp() + $2 * interval '1 second'
          from held
         where l.subscription_id = held.subscription_id and l.key = held.key
           and l.key = any (array(select key from held))
        returning l.subscription_id, l.key, l.lease_token, l.leased_by",

    subscription_by_name: "
        select id, filter::text as filter, ordering::text as ordering, backfill_from, backfill_until
          from outbox_subscriptions where name = $1 for update",

    insert_subscription: "
        /* outbox:meta */ insert into outbox_subscriptions (name, filter, ordering, backfill_from, backfill_until)
        values ($1, $2::text::jsonb, $3::text::jsonb, $4, $5)
        on conflict (name) do nothing returning id",

    update_subscription: "
        /* outbox:meta */ update outbox_subscriptions
           set filter = $2::text::jsonb, ordering = $3::text::jsonb
         where id = $1",

    pause: "update outbox_subscriptions set paused_at = clock_timestamp() where name = $1 and paused_at is null",

    resume: "update outbox_subscriptions set paused_at = null where name = $1 and paused_at is not null",

    remove: "/* outbox:meta */ delete from outbox_subscriptions where id = $1",

    // From one subscription to the next along the indexes: however many rows there are, few are read.
    orphans: "
        with recursive lanes as (
                (select subscription_id as id from outbox_lanes order by 1 limit 1)
                 union all
                select (select subscription_id from outbox_lanes where subscription_id > lanes.id order by 1 limit 1)
                  from lanes where lanes.id is not null),
              deliveries as (
                (select subscription_id as id from outbox_deliveries order by 1 limit 1)
                 union all
                select (select subscription_id from outbox_deliveries
                         where subscription_id > deliveries.id order by 1 limit 1)
                  from deliveries where deliveries.id is not null),
              delivered as (
                (select subscription_id as id from outbox_delivered order by 1 limit 1)
                 union all
                select (select subscription_id from outbox_delivered
                         where subscription_id > delivered.id order by 1 limit 1)
                  from delivered where delivered.id is not null),
              dead as (
                (select subscription_id as id from outbox_dead_letters order by 1 limit 1)
                 union all
                select (select subscription_id from outbox_dead_letters
                         where subscription_id > dead.id order by 1 limit 1)
                  from dead where dead.id is not null)
        select id from (select id from lanes union select id from deliveries
                        union select id from delivered union select id from dead) found
         where id is not null and id not in (select id from outbox_subscriptions)",

    sweep: &[
        "delete from outbox_lanes where ctid = any (array(
                select ctid from outbox_lanes where subscription_id = $1 limit $2 for update skip locked))",
        "delete from outbox_deliveries where ctid = any (array(
                select ctid from outbox_deliveries where subscription_id = $1 limit $2 for update skip locked))",
        "delete from outbox_delivered where ctid = any (array(
                select ctid from outbox_delivered where subscription_id = $1 limit $2 for update skip locked))",
        "delete from outbox_dead_letters where ctid = any (array(
                select ctid from outbox_dead_letters where subscription_id = $1 limit $2 for update skip locked))",
    ],

    first_position_since: "
        select min(position) as position from outbox_events
         where recorded_at >= coalesce(nullif($1, '')::timestamptz, '-infinity')",

    set_backfill: "
        update outbox_subscriptions
           set backfill_from = $2, backfill_until = case when $2::bigint is not null then backfill_until end
         where id = $1",

    positions_known: "
        select position from outbox_deliveries
         where subscription_id = $1 and position in (select value::bigint from jsonb_array_elements_text($2::text::jsonb))
        union select position from outbox_delivered
         where subscription_id = $1 and position in (select value::bigint from jsonb_array_elements_text($2::text::jsonb))
        union select position from outbox_dead_letters
         where subscription_id = $1 and position in (select value::bigint from jsonb_array_elements_text($2::text::jsonb))",

    inbox_insert_within: Some(
        "with idle as materialized (select set_config('idle_in_transaction_session_timeout', $3, true))
         insert into outbox_inbox (consumer, event_id) select $1, $2 from idle on conflict do nothing",
    ),

    inbox_insert: "insert into outbox_inbox (consumer, event_id) values ($1, $2) on conflict do nothing",

    heartbeat: "
        insert into outbox_workers (id, subscriptions, started_at, last_seen_at)
        values ($1, $2::text::jsonb, clock_timestamp(), clock_timestamp())
        on conflict (id) do update set subscriptions = excluded.subscriptions, last_seen_at = excluded.last_seen_at
        returning last_seen_at",

    forget_workers: "
        delete from outbox_workers where last_seen_at < clock_timestamp() - $1 * interval '1 second'",

    forget_worker: "delete from outbox_workers where id = $1",

    workers: "
        select id, subscriptions::text as subscriptions, started_at, last_seen_at,
               greatest(0, extract(epoch from clock_timestamp() - last_seen_at))::float8 as last_seen_seconds
          from outbox_workers order by id",

    status: "
        select s.id, s.name, s.paused_at is not null as paused,
               case when s.circuit_until is null then 'closed' when s.circuit_until > clock_timestamp() then 'open'
                    else 'half-open' end as circuit,
               coalesce(l.pending, 0)::bigint as pending, coalesce(l.leased, 0) as leased,
               (select count(*) from (select 1 from outbox_delivered
                                       where subscription_id = s.id limit $1) f) as delivered,
               (select count(*) from outbox_dead_letters where subscription_id = s.id) as dead,
               (select greatest(0, extract(epoch from clock_timestamp() - recorded_at))::float8 from outbox_events
                 where position = (select min(position) from outbox_deliveries where subscription_id = s.id)
                   and recorded_at > '-infinity' and recorded_at < '200000-01-01') as oldest_pending_age_seconds,
               coalesce(l.last_error,
                        (select error from outbox_dead_letters
                          where subscription_id = s.id order by id desc limit 1)) as last_error
          from outbox_subscriptions s
          left join (select subscription_id, sum(pending) as pending,
                            count(*) filter (where leased_by is not null and due_at > clock_timestamp()) as leased,
                            (array_agg(last_error order by due_at desc)
                               filter (where last_error is not null))[1] as last_error
                       from outbox_lanes group by subscription_id) l on l.subscription_id = s.id
         order by s.name",

    postponed: concat!(
        "select s.name, count(*) as deliveries,
                max(extract(epoch from l.due_at - clock_timestamp()))::float8 as seconds
           from outbox_subscriptions s
          cross join lateral (
                select * from outbox_lanes
                 where subscription_id = s.id and due_at > clock_timestamp() + interval '1 second' and due_at < 'infinity'
                 order by due_at desc limit 1000) l
          cross join lateral (
                select position from outbox_deliveries
                 where subscription_id = l.subscription_id and key = l.key order by seq limit 1) d
          cross join lateral (select * from outbox_events e where e.position = d.position offset 0) e
          where l.due_at > ",
        asked_for!(),
        " + interval '1 second' + case when l.leased_by is null and l.last_error is null then interval '0'
                                       else interval '1 day' end
          group by s.name order by s.name"
    ),

    lock_waiting: "
        select key from outbox_lanes
         where subscription_id = $1 and due_at > clock_timestamp() and leased_by is null and held_at is null
         order by subscription_id, key for update",

    due_as_asked: concat!(
        "update outbox_deliveries d set due_at = asked.due_at
           from (select e.position, ",
        asked_for!(),
        " as due_at from outbox_events e
              where e.position in (
                    select position from outbox_deliveries
                     where subscription_id = $1 and due_at > clock_timestamp()
                       and key in (select jsonb_array_elements_text($2::text::jsonb)))) asked
          where d.subscription_id = $1 and d.position = asked.position and d.due_at > asked.due_at
            and d.key in (select jsonb_array_elements_text($2::text::jsonb))"
    ),

    due_with_heads: "
        update outbox_lanes l set due_at = head.due_at
          from (select k.key, (select d.due_at from outbox_deliveries d
                                where d.subscription_id = $1 and d.key = k.key order by seq limit 1) as due_at
                  from jsonb_array_elements_text($2::text::jsonb) k(key)) head
         where l.subscription_id = $1 and l.key = head.key and l.due_at > head.due_at",

    activity: "
        select ((now() at time zone 'UTC')::date - (delivered_at at time zone 'UTC')::date)::bigint as days_ago,
               count(*) as deliveries
          from outbox_delivered
         where subscription_id = $1
           and delivered_at >= ((now() at time zone 'UTC')::date - 6)::timestamp at time zone 'UTC'
         group by 1",

    newest_unfinished: "
        select d.position
          from outbox_deliveries d
         cross join lateral (
               select * from outbox_lanes
                where subscription_id = d.subscription_id and key = d.key offset 0) l
         where d.subscription_id = $1
           and $2 = (l.leased_by is not null and l.due_at > clock_timestamp()
                     and d.seq = (select min(seq) from outbox_deliveries h
                                        where h.subscription_id = d.subscription_id and h.key = d.key))
         order by d.position desc limit $3",

    newest_delivered: "
        select f.position from outbox_delivered f where f.subscription_id = $1 order by f.position desc limit $2",

    newest_dead: "
        select f.position from outbox_dead_letters f where f.subscription_id = $1 order by f.position desc limit $2",

    // The lateral parts keep the planner to the order of the deliveries' index, whatever the limit is.
    list_unfinished: concat!(
        "select l.attempts as lane_attempts, nullif(l.due_at, 'infinity') as lane_due_at, l.leased_by, l.last_error,
                d.due_at,
                d.seq = (select min(seq) from outbox_deliveries h
                               where h.subscription_id = d.subscription_id and h.key = d.key) as head, ",
        event_columns!(),
        " from outbox_deliveries d
         cross join lateral (
               select * from outbox_lanes
                where subscription_id = d.subscription_id and key = d.key offset 0) l
         cross join lateral (select * from outbox_events where position = d.position offset 0) e
         where d.subscription_id = $1
           and $2 = (l.leased_by is not null and l.due_at > clock_timestamp()
                     and d.seq = (select min(seq) from outbox_deliveries h
                                        where h.subscription_id = d.subscription_id and h.key = d.key))
           and d.position <= $3
         order by d.position desc limit $4"
    ),

    list_delivered: concat!(
        "select f.attempts, f.delivered_at as finished_at, null::text as error, ",
        event_columns!(),
        " from outbox_delivered f join outbox_events e on e.position = f.position
         where f.subscription_id = $1 and f.position <= $2 order by f.position desc limit $3"
    ),

    list_dead: concat!(
        "select f.attempts, f.died_at as finished_at, f.error, ",
        event_columns!(),
        " from outbox_dead_letters f join outbox_events e on e.position = f.position
         where f.subscription_id = $1 and f.position <= $2 order by f.position desc limit $3"
    ),

    list_events: ListEvents {
        of_aggregate: list_events!("e.aggregate_type = $2 and e.aggregate_id = $3"),
        of_type: list_events!("e.event_type = $1"),
        of_tenant: list_events!("e.tenant = $4"),
        of_all: list_events!("true"),
    },

    event_by_id: concat!("select ", event_columns!(), " from outbox_events e where e.event_id = $1"),

    event_exists: "select 1 from outbox_events where event_id = $1",

    standing: "
        select s.id, s.name, s.filter::text as filter, s.created_at, s.paused_at, s.circuit_until, s.backfill_from,
               clock_timestamp() as now,
               d.key, d.due_at, l.attempts as lane_attempts, l.leased_by, l.last_error, l.attempt_log::text as lane_log,
               nullif(l.due_at, 'infinity') as lane_due_at,
               h.position as head, (select event_id from outbox_events where position = h.position) as head_event,
               l.held_at, (select event_id from outbox_events where position = l.held_at) as held_event,
               (select id from outbox_dead_letters where subscription_id = s.id and position = l.held_at) as held_by,
               f.attempts as delivered_attempts, f.attempt_log::text as delivered_log, f.delivered_at,
               x.id as dead_letter, x.attempts as dead_attempts, x.attempt_log::text as dead_log, x.error, x.died_at
          from outbox_subscriptions s
          left join outbox_deliveries d on d.subscription_id = s.id and d.position = $1
          left join outbox_lanes l on l.subscription_id = s.id and l.key = d.key
          left join lateral (select position from outbox_deliveries
                              where subscription_id = d.subscription_id and key = d.key order by seq limit 1) h on true
          left join outbox_delivered f on f.subscription_id = s.id and f.position = $1
          left join outbox_dead_letters x on x.subscription_id = s.id and x.position = $1
         where $2::integer is null or s.id = $2
         order by s.name",

    list_dead_letters: concat!(
        "select x.id, s.name, x.position, x.attempts, x.error, x.attempt_log::text as attempt_log, x.died_at,
                e.event_id, e.event_type, e.aggregate_type, e.aggregate_id",
        of_dead_letters!(),
        " and ($6::bigint is null or x.id < $6) order by x.id desc limit $7"
    ),

    count_dead_letters: concat!("select count(*) as matched", of_dead_letters!()),

    next_dead_letters: concat!(
        "select x.id, x.subscription_id",
        of_dead_letters!(),
        " and x.id > $6 and x.id <= $7 order by x.id limit $8"
    ),

    last_dead_letter: "select max(id) as last from outbox_dead_letters",

    lock_subscriptions: "
        select id from outbox_subscriptions
         where id in (select value::integer from jsonb_array_elements_text($1::text::jsonb)) order by id for update",

    take_dead_letters: "
        delete from outbox_dead_letters x
         where id in (select value::bigint from jsonb_array_elements_text($1::text::jsonb))
           and (not $2 or exists (select 1 from outbox_events e where e.position = x.position))
        returning subscription_id, key, position",

    lock_lanes: "
        select 1 from outbox_lanes
         where (subscription_id, key) in (
                 select subscription, key from jsonb_to_recordset($1::text::jsonb) as r(subscription integer, key text))
         order by subscription_id, key for update",

    delete_empty_lanes: "
        delete from outbox_lanes l
         using jsonb_to_recordset($1::text::jsonb) as r(subscription integer, key text)
         where l.subscription_id = r.subscription and l.key = r.key and l.pending <= 0 and l.held_at is null",

    release_lanes: "
        update outbox_lanes l
           set held_at = null,
               due_at = coalesce((select d.due_at from outbox_deliveries d
                                   where d.subscription_id = l.subscription_id and d.key = l.key
                                   order by seq limit 1), l.due_at)
          from jsonb_to_recordset($1::text::jsonb) as r(subscription integer, key text, position bigint)
         where l.subscription_id = r.subscription and l.key = r.key and l.held_at = r.position",

    // A lane that is leased has at least one attempt: that it has none tells its holder's report that the head is another.
    restart_lanes: "
        update outbox_lanes l
           set attempts = 0, attempt_log = null, last_error = null,
               due_at = case when leased_by is null then (
                   select d.due_at from outbox_deliveries d
                    where d.subscription_id = l.subscription_id and d.key = l.key order by seq limit 1)
                   else l.due_at end
          from jsonb_to_recordset($1::text::jsonb) as r(subscription integer, key text, position bigint)
         where l.subscription_id = r.subscription and l.key = r.key and l.held_at is null
           and r.position = (select position from outbox_deliveries d
                              where d.subscription_id = l.subscription_id and d.key = l.key order by seq limit 1)",

    // A role that may not see the sequence gets null. Its value is what the next position comes after; a restore can set it
    // back.
    checkup: Some(
        "select coalesce((select max(position) from outbox_events), 0) as last,
                case when has_sequence_privilege(pg_get_serial_sequence('outbox_events', 'position'), 'select')
                     then coalesce(
                         pg_sequence_last_value(pg_get_serial_sequence('outbox_events', 'position')::regclass), 0) end as drawn,
                pg_get_serial_sequence('outbox_events', 'position') as sequence,
                coalesce((select bool_and(seqcache = 1 and seqincrement > 0) from pg_sequence
                           where seqrelid in (
                                 pg_get_serial_sequence('outbox_events', 'position')::regclass,
                                 pg_get_serial_sequence('outbox_deliveries', 'seq')::regclass)), true) as in_order,
                (select string_agg(pid || ' (' || coalesce(state, 'unknown') || ')', ', ') from pg_stat_activity
                  where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'
                    and ltrim(query, E' \\n') like '/* outbox:meta */%'
                    and xact_start < clock_timestamp() - interval '3 seconds') as stuck,
                current_setting('synchronous_commit') as synchronous_commit, current_setting('fsync') as fsync,
                current_setting('full_page_writes') as full_page_writes,
                current_setting('default_transaction_read_only') as read_only",
    ),

    last_position: "select max(position) as last from outbox_events",

    next_positions: "
        select position from outbox_events
         where position > $1 and position <= $2 and ($3::text is null or event_type = $3) order by position limit $4",

    positions_of: "
        select position from outbox_events
         where event_id in (select value::uuid from jsonb_array_elements_text($1::text::jsonb)) order by position",

    lock_events: concat!(
        "select ",
        event_columns!("'null'"),
        " from outbox_events e
         where e.position in (select value::bigint from jsonb_array_elements_text($1::text::jsonb))
           and not exists (select from outbox_unrouted u where u.position = e.position)
         order by e.position for key share of e"
    ),

    positions_unfinished: "
        select position from outbox_deliveries
         where subscription_id = $1
           and position in (select value::bigint from jsonb_array_elements_text($2::text::jsonb))",

    take_delivered: "
        delete from outbox_delivered
         where subscription_id = $1
           and position in (select value::bigint from jsonb_array_elements_text($2::text::jsonb))",

    take_dead_letters_at: "
        delete from outbox_dead_letters
         where subscription_id = $1
           and position in (select value::bigint from jsonb_array_elements_text($2::text::jsonb))
        returning key, position",

    insert_audit: "
        insert into outbox_audit (actor, action, target, details) values ($1, $2, $3, $4::text::jsonb) returning id",

    update_audit: "update outbox_audit set details = $2::text::jsonb where id = $1",

    list_audit: "
        select id, at, actor, action, target, details::text as details from outbox_audit order by id desc limit $1",

    definitions: "
        select details::text as details from outbox_audit where action = $1 and target = $2 order by id",

    old_events: concat!(
        "select e.position, e.recorded_at::text as recorded_at from outbox_events e",
        old!(),
        " and e.recorded_at >= coalesce(nullif($3, '')::timestamptz, '-infinity')
          and e.recorded_at <= statement_timestamp() - $2 * interval '1 second'
        order by e.recorded_at limit $4 for update of e skip locked"
    ),

    still_old: concat!(
        "select e.position from jsonb_array_elements_text($2::text::jsonb) p(position)
           join outbox_events e on e.position = p.position::bigint",
        old!()
    ),

    // The payload as the text it is: not all JSON can be `jsonb`.
    archive_events: concat!(
        "insert into outbox_archive (position, event_id, event)
         select r.position, r.event_id, to_jsonb(r) from (select ",
        event_columns!(),
        " from outbox_events e
           where e.position in (select value::bigint from jsonb_array_elements_text($1::text::jsonb))) r
         on conflict do nothing"
    ),

    purge_delivered: "
        delete from outbox_delivered f
         using jsonb_array_elements_text($1::text::jsonb) p(position) cross join outbox_subscriptions s
         where f.subscription_id = s.id and f.position = p.position::bigint",

    purge_events: "
        delete from outbox_events
         where position in (select value::bigint from jsonb_array_elements_text($1::text::jsonb))",

    purge_inbox: "
        delete from outbox_inbox
         where (consumer, event_id) in (
                 select consumer, event_id from outbox_inbox i
                  where handled_at <= statement_timestamp() - $1 * interval '1 second'
                    and not exists (select 1 from outbox_events e where e.event_id = i.event_id)
                  order by handled_at limit $2 for update skip locked)",
};
