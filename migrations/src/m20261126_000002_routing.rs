//! Version 2: a request stores its events with a mark each, and workers route them.
//!
//! A flush of version 1 fails loudly afterwards, since the generation has another name. What waits for a lock here gives up
//! after two seconds, because everything else waits behind it: [`up`](crate::up) tries again.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager,
    async_trait::async_trait,
    sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement},
};

use crate::DEFAULT_PREFIX;

pub(crate) struct Migration {
    prefix: String,
}

impl Migration {
    pub(crate) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    async fn run(&self, manager: &SchemaManager<'_>, statements: &[&str]) -> Result<(), DbErr> {
        for statement in statements {
            manager.get_connection().execute_unprepared(&self.named(statement)).await?;
        }
        Ok(())
    }

    /// The functions work in the schema of the tables, whatever search path a trigger has that calls them.
    async fn create_record(&self, manager: &SchemaManager<'_>) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let schema = "select quote_ident(n.nspname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
                       where c.oid = to_regclass('outbox_meta')";
        let row = db.query_one_raw(Statement::from_string(DbBackend::Postgres, self.named(schema))).await?;
        let row = row.ok_or_else(|| DbErr::Migration(self.named("the table outbox_meta is missing")))?;
        let schema: String = row.try_get_by_index(0)?;
        for function in [RECORD_TEXT, RECORD_JSON, RECORD_JSONB] {
            db.execute_unprepared(&self.named(&function.replace("outbox$schema", &schema))).await?;
        }
        Ok(())
    }

    fn named(&self, statement: &str) -> String {
        statement.replace(DEFAULT_PREFIX, &self.prefix)
    }

    /// An error with this text if the query finds something.
    async fn refuse(&self, manager: &SchemaManager<'_>, query: &str, why: &str) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let query = Statement::from_string(manager.get_database_backend(), self.named(query));
        match db.query_one_raw(query).await? {
            Some(_) => Err(DbErr::Migration(self.named(why))),
            None => Ok(()),
        }
    }
}

impl MigrationName for Migration {
    fn name(&self) -> &'static str {
        "m20261126_000002_routing"
    }
}

#[expect(elided_lifetimes_in_paths, reason = "async_trait takes the signature only as the trait spells it")]
#[async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        match manager.get_database_backend() {
            DbBackend::Sqlite => self.run(manager, SQLITE_UP).await,
            _ => {
                self.run(manager, &["set local lock_timeout = '2s'", "lock table outbox_events, outbox_subscriptions"])
                    .await?;
                self.refuse(manager, UNSETTLED, UNSETTLED_WHY).await?;
                self.run(manager, POSTGRES_UP).await?;
                self.create_record(manager).await
            }
        }
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DbBackend::Sqlite {
            self.refuse(manager, UNROUTED, UNROUTED_WHY).await?;
            return self.run(manager, SQLITE_DOWN).await;
        }
        self.run(manager, &["set local lock_timeout = '2s'", "lock table outbox_events, outbox_unrouted"]).await?;
        self.refuse(manager, UNROUTED, UNROUTED_WHY).await?;
        self.run(manager, POSTGRES_DOWN).await
    }
}

const UNSETTLED: &str = "select name from outbox_subscriptions where changed_in is not null limit 1";
const UNSETTLED_WHY: &str = "a subscription was registered or changed a moment ago, and workers of the version before have to look after it first; \
     let one run for some seconds (until changed_in is null in all rows of outbox_subscriptions) and migrate again; nothing \
     was changed";

const UNROUTED: &str = "select position from outbox_unrouted limit 1";
const UNROUTED_WHY: &str = "some events are not routed yet, or set aside, and the version before would never deliver them; stop what writes \
     events and let a worker route them (`outbox unrouted` shows them), then go back; nothing was changed";

// No CHECK: one for what routing calculates with takes a tenth of a request's time in the database, since PostgreSQL reads
// its expression anew in each statement. Routing can calculate with any value; `outbox_record` checks what SQL inserts.
//
// `ahead` is null for almost every event, and nulls take no room. A `seq` that is drawn begins above all positions, which
// backfills and replays insert: they come first.
const POSTGRES_UP: &[&str] = &[
    "alter table outbox_meta rename column generation to routing_generation",
    "update outbox_meta set schema_version = 2, routing_generation = (random() * 4e18)::bigint",
    "alter table outbox_events drop column transaction_id",
    "drop index outbox_events_type",
    "drop index outbox_events_tenant",
    "create table outbox_unrouted (
       position bigint primary key,
       ahead boolean,
       set_aside_at timestamptz,
       error text)
       with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)",
    "create index outbox_unrouted_rare on outbox_unrouted (position) where ahead or set_aside_at is not null",
    "alter table outbox_deliveries add column seq bigint",
    "update outbox_deliveries set seq = position",
    "alter table outbox_deliveries alter column seq set not null",
    "alter table outbox_deliveries alter column seq add generated by default as identity (start with 1099511627776)",
    "alter table outbox_deliveries drop constraint outbox_deliveries_pkey",
    "alter table outbox_deliveries add primary key (subscription_id, key, seq)",
    "drop index outbox_deliveries_position",
    "create unique index outbox_deliveries_position on outbox_deliveries (subscription_id, position)",
    "update outbox_subscriptions set backfill_from = null where backfill_from = 9223372036854775807",
    "alter table outbox_subscriptions drop column changed_at, drop column changed_in, drop column settled_after,
       add column backfill_until bigint",
];

const POSTGRES_DOWN: &[&str] = &[
    "drop function outbox_record(text, text, text, jsonb, text, text, text, text, text, jsonb, integer, integer, interval,
                                 timestamptz, integer, timestamptz, uuid)",
    "drop function outbox_record(text, text, text, json, text, text, text, text, text, jsonb, integer, integer, interval,
                                 timestamptz, integer, timestamptz, uuid)",
    "drop function outbox_record(text, text, text, text, text, text, text, text, text, jsonb, integer, integer, interval,
                                 timestamptz, integer, timestamptz, uuid)",
    "drop table outbox_unrouted",
    "alter table outbox_deliveries drop constraint outbox_deliveries_pkey",
    "alter table outbox_deliveries drop column seq",
    "alter table outbox_deliveries add primary key (subscription_id, key, position)",
    "drop index outbox_deliveries_position",
    "create index outbox_deliveries_position on outbox_deliveries (subscription_id, position)",
    "alter table outbox_events add column transaction_id xid8 not null default pg_current_xact_id()",
    "create index outbox_events_type on outbox_events (event_type, position)",
    "create index outbox_events_tenant on outbox_events (tenant, position) where tenant is not null",
    "alter table outbox_subscriptions drop column backfill_until,
       add column changed_at timestamptz not null default clock_timestamp(),
       add column changed_in pg_snapshot default pg_current_snapshot(), add column settled_after xid8",
    "update outbox_subscriptions set changed_in = null",
    "alter table outbox_meta rename column routing_generation to generation",
    "update outbox_meta set schema_version = 1, generation = (random() * 4e18)::bigint",
];

const SQLITE_UP: &[&str] = &[
    "alter table outbox_meta rename column generation to routing_generation",
    "update outbox_meta set schema_version = 2, routing_generation = random() & 9223372036854775807",
    "create trigger outbox_events_routable before insert on outbox_events
      when not coalesce(new.wait_seconds between -2000000 and 31622400000 and length(new.aggregate_id) <= 1000, false)
     begin
       select raise(abort, 'outbox_events: wait_seconds or aggregate_id is out of range');
     end",
    "drop index outbox_events_type",
    "drop index outbox_events_tenant",
    "create table outbox_unrouted (
       position integer primary key,
       ahead integer,
       set_aside_at text,
       error text)",
    "create index outbox_unrouted_rare on outbox_unrouted (position) where ahead or set_aside_at is not null",
    "create table outbox_new_deliveries (
       subscription_id integer not null,
       key text not null,
       seq integer not null,
       position integer not null,
       due_at text not null,
       primary key (subscription_id, key, seq)) without rowid",
    "insert into outbox_new_deliveries
     select subscription_id, key, position, position, due_at from outbox_deliveries",
    "drop table outbox_deliveries",
    "alter table outbox_new_deliveries rename to outbox_deliveries",
    "create unique index outbox_deliveries_position on outbox_deliveries (subscription_id, position)",
    "alter table outbox_subscriptions add column backfill_until integer",
    "create view outbox_record as
     select event_type, aggregate_type, aggregate_id, payload, tenant, actor_kind, actor_id, correlation_id, causation_id,
            tags, schema_version, 0 as priority, 0.0 as delay_seconds, not_before, max_attempts, occurred_at, event_id
       from outbox_events",
    RECORD_SQLITE,
];

const SQLITE_DOWN: &[&str] = &[
    "drop view outbox_record",
    "drop trigger outbox_events_routable",
    "drop table outbox_unrouted",
    "create table outbox_old_deliveries (
       subscription_id integer not null,
       key text not null,
       position integer not null,
       due_at text not null,
       primary key (subscription_id, key, position)) without rowid",
    "insert into outbox_old_deliveries select subscription_id, key, position, due_at from outbox_deliveries",
    "drop table outbox_deliveries",
    "alter table outbox_old_deliveries rename to outbox_deliveries",
    "create index outbox_deliveries_position on outbox_deliveries (subscription_id, position)",
    "create index outbox_events_type on outbox_events (event_type, position)",
    "create index outbox_events_tenant on outbox_events (tenant, position) where tenant is not null",
    "alter table outbox_subscriptions drop column backfill_until",
    "alter table outbox_meta rename column routing_generation to generation",
    "update outbox_meta set schema_version = 1, generation = random() & 9223372036854775807",
];

// An event from SQL, with the checks of a push. Its id is a UUID of version 7: 48 bits of time in milliseconds, the version, and chance.
const RECORD_TEXT: &str = "
create function outbox_record(
    event_type text, aggregate_type text, aggregate_id text, payload text,
    tenant text default null, actor_kind text default null, actor_id text default null,
    correlation_id text default null, causation_id text default null, tags jsonb default null,
    schema_version integer default 1, priority integer default 0, delay interval default null,
    not_before timestamptz default null, max_attempts integer default null, occurred_at timestamptz default null,
    event_id uuid default null)
returns uuid language plpgsql set search_path = outbox$schema, pg_temp as $record$
#variable_conflict use_variable
declare
    a_name constant text = '^[A-Za-z0-9_.:/-]{1,128}$';
    wrong text;
    id uuid;
    wait float8;
    place bigint;
begin
    wrong = case
        when event_type is null or event_type !~ a_name then 'the event type has to have 1 to 128 of A-Z a-z 0-9 _ . : / -'
        when aggregate_type is null or aggregate_type !~ a_name
        then 'the aggregate type has to have 1 to 128 of A-Z a-z 0-9 _ . : / -'
        when aggregate_id is null or octet_length(aggregate_id) not between 1 and 255
        then 'the aggregate id has to have 1 to 255 bytes'
        when payload is null then 'the payload is null; the JSON text null is a payload'
        when octet_length(payload) > 1048576 then 'the payload has more than 1 MiB'
        when octet_length(tenant) not between 1 and 255 then 'the tenant has to have 1 to 255 bytes'
        when actor_kind is null <> (actor_id is null) then 'an actor has a kind and an id'
        when actor_kind !~ a_name then 'the kind of the actor has to have 1 to 128 of A-Z a-z 0-9 _ . : / -'
        when octet_length(actor_id) not between 1 and 255 then 'the id of the actor has to have 1 to 255 bytes'
        when octet_length(correlation_id) not between 1 and 255 then 'the correlation id has to have 1 to 255 bytes'
        when octet_length(causation_id) not between 1 and 255 then 'the causation id has to have 1 to 255 bytes'
        when jsonb_typeof(tags) <> 'object' then 'the tags have to be a JSON object'
        when schema_version is null or schema_version < 1 then 'the schema version begins at 1'
        when priority is null or priority not between 0 and 32767 then 'the priority is between 0 and 32767'
        when delay < interval '0' or delay > interval '1000 years' then 'the delay is between nothing and 1000 years'
        when not_before not between '0001-01-01' and '9999-12-31' or occurred_at not between '0001-01-01' and '9999-12-31'
        then 'times are in the years 1 to 9999'
        when max_attempts < 1 then 'max_attempts begins at 1'
    end;
    if wrong is null and tags is not null then
        select case
            when count(*) > 64 then 'an event has 64 tags at most'
            when bool_or(t.key !~ a_name) then 'a tag has to have 1 to 128 of A-Z a-z 0-9 _ . : / -'
            when bool_or(jsonb_typeof(t.value) <> 'string' or octet_length(t.value #>> '{}') not between 1 and 255)
            then 'the value of a tag is a text of 1 to 255 bytes' end
          into wrong from jsonb_each(tags) t;
    end if;
    if wrong is not null then
        raise exception 'outbox_record: %', wrong using errcode = 'invalid_parameter_value';
    end if;
    id = coalesce(event_id, encode(
        set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
                                placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                                from 1 for 6), 52, 1), 53, 1), 'hex')::uuid);
    wait = case when delay is null and not_before is null then priority * -60.0
                else coalesce(extract(epoch from delay), 0) end;
    begin
        insert into outbox_events (
            event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at, tenant, actor_kind,
            actor_id, correlation_id, causation_id, tags, max_attempts, wait_seconds, not_before)
        values (id, event_type, schema_version, aggregate_type, aggregate_id, payload::json,
                coalesce(occurred_at, clock_timestamp()), tenant, actor_kind, actor_id, correlation_id, causation_id,
                nullif(tags, '{}'), max_attempts, wait, not_before)
        returning position into place;
    exception when invalid_text_representation then
        raise exception 'outbox_record: the payload is not JSON: %', sqlerrm using errcode = 'invalid_parameter_value';
    end;
    insert into outbox_unrouted (position, ahead) values (place, case when wait < 0 then true end);
    return id;
end $record$";

// What triggers have: the result of `to_jsonb(new)`, `jsonb_build_object(…)` or `json_build_object(…)`.
macro_rules! record_of {
    ($json:literal) => {
        concat!(
            "create function outbox_record(
                event_type text, aggregate_type text, aggregate_id text, payload ",
            $json,
            ", tenant text default null, actor_kind text default null, actor_id text default null,
                correlation_id text default null, causation_id text default null, tags jsonb default null,
                schema_version integer default 1, priority integer default 0, delay interval default null,
                not_before timestamptz default null, max_attempts integer default null,
                occurred_at timestamptz default null, event_id uuid default null)
             returns uuid language sql set search_path = outbox$schema, pg_temp as $record$
                select outbox_record($1, $2, $3, $4::text, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
             $record$"
        )
    };
}

const RECORD_JSON: &str = record_of!("json");
const RECORD_JSONB: &str = record_of!("jsonb");

// The program `sqlite3` of today's distributions lacks newer functions, so an id that is not given is chance without a
// version.
const RECORD_SQLITE: &str = "
create trigger outbox_record_insert instead of insert on outbox_record begin
    select raise(abort, 'outbox_record: the event type has to have 1 to 128 of A-Z a-z 0-9 _ . : / -')
     where new.event_type is null or length(new.event_type) not between 1 and 128
        or new.event_type glob '*[^A-Za-z0-9_.:/-]*';
    select raise(abort, 'outbox_record: the aggregate type has to have 1 to 128 of A-Z a-z 0-9 _ . : / -')
     where new.aggregate_type is null or length(new.aggregate_type) not between 1 and 128
        or new.aggregate_type glob '*[^A-Za-z0-9_.:/-]*';
    select raise(abort, 'outbox_record: the aggregate id has to have 1 to 255 bytes')
     where new.aggregate_id is null or length(cast(new.aggregate_id as blob)) not between 1 and 255;
    select raise(abort, 'outbox_record: the payload is not JSON')
     where new.payload is null or not json_valid(new.payload);
    select raise(abort, 'outbox_record: the payload has more than 1 MiB')
     where length(cast(new.payload as blob)) > 1048576;
    select raise(abort, 'outbox_record: the tenant has to have 1 to 255 bytes')
     where length(cast(new.tenant as blob)) not between 1 and 255;
    select raise(abort, 'outbox_record: an actor has a kind and an id')
     where (new.actor_kind is null) <> (new.actor_id is null)
        or length(new.actor_kind) not between 1 and 128 or new.actor_kind glob '*[^A-Za-z0-9_.:/-]*'
        or length(cast(new.actor_id as blob)) not between 1 and 255;
    select raise(abort, 'outbox_record: correlation and causation id have to have 1 to 255 bytes')
     where length(cast(new.correlation_id as blob)) not between 1 and 255
        or length(cast(new.causation_id as blob)) not between 1 and 255;
    select raise(abort, 'outbox_record: the tags have to be a JSON object')
     where new.tags is not null and (not json_valid(new.tags) or json_type(new.tags) <> 'object');
    select raise(abort, 'outbox_record: a tag is a name with a text of 1 to 255 bytes, and there are 64 at most')
      from (select count(*) as tags,
                   max(type <> 'text' or length(cast(value as blob)) not between 1 and 255
                       or length(key) not between 1 and 128 or key glob '*[^A-Za-z0-9_.:/-]*') as wrong
              from json_each(coalesce(new.tags, '{}'))) t
     where t.tags > 64 or t.wrong;
    select raise(abort, 'outbox_record: the schema version begins at 1') where new.schema_version < 1;
    select raise(abort, 'outbox_record: the priority is between 0 and 32767')
     where new.priority not between 0 and 32767 or typeof(coalesce(new.priority, 0)) <> 'integer';
    select raise(abort, 'outbox_record: delay_seconds is between 0 and 31622400000')
     where new.delay_seconds not between 0 and 31622400000
        or typeof(coalesce(new.delay_seconds, 0)) not in ('integer', 'real');
    select raise(abort, 'outbox_record: a time cannot be read')
     where (new.not_before is not null and strftime('%Y', new.not_before) is null)
        or (new.occurred_at is not null and strftime('%Y', new.occurred_at) is null);
    select raise(abort, 'outbox_record: max_attempts begins at 1') where new.max_attempts < 1;
    select raise(abort, 'outbox_record: the event id has to be a blob of 16 bytes')
     where new.event_id is not null and (typeof(new.event_id) <> 'blob' or length(new.event_id) <> 16);
    insert into outbox_events (
        event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at, tenant, actor_kind,
        actor_id, correlation_id, causation_id, tags, max_attempts, wait_seconds, not_before)
    values (coalesce(new.event_id, randomblob(16)), new.event_type, coalesce(new.schema_version, 1), new.aggregate_type,
            cast(new.aggregate_id as text), new.payload,
            strftime('%Y-%m-%dT%H:%M:%fZ', coalesce(new.occurred_at, 'now')), new.tenant, new.actor_kind, new.actor_id,
            new.correlation_id, new.causation_id, nullif(new.tags, '{}'), new.max_attempts,
            case when new.delay_seconds is null and new.not_before is null then coalesce(new.priority, 0) * -60.0
                 else coalesce(new.delay_seconds, 0.0) end,
            strftime('%Y-%m-%dT%H:%M:%fZ', new.not_before));
    insert into outbox_unrouted (position, ahead)
    select position, case when wait_seconds < 0 then true end from outbox_events where position = last_insert_rowid();
end";
