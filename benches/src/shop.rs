//! The application that writes: one business row and its events, by hand and with the layer.

use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    routing::post,
};
use outbox_axum::{Error, Events, OutboxLayer, Tx};
use outbox_seaorm::Outbox;
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, DbErr, EntityTrait, Set, Statement, TransactionTrait};
use uuid::Uuid;

use crate::{events::Happened, measure::Result};

/// The business rows.
mod order {
    use sea_orm::entity::prelude::{
        ActiveModelBehavior, DeriveEntityModel, DerivePrimaryKey, DeriveRelation, EntityTrait, EnumIter,
        PrimaryKeyTrait,
    };

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "orders")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: uuid::Uuid,
        pub(crate) title: String,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The outbox that people write by hand: one table.
mod row {
    use sea_orm::entity::prelude::{
        ActiveModelBehavior, DeriveEntityModel, DerivePrimaryKey, DeriveRelation, EntityTrait, EnumIter,
        PrimaryKeyTrait,
    };

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_by_hand")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: uuid::Uuid,
        pub(crate) event_type: String,
        pub(crate) aggregate_type: String,
        pub(crate) aggregate_id: String,
        pub(crate) payload: sea_orm::JsonValue,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) const POSTGRES: &[&str] = &[
    "create table orders (id uuid primary key, title text not null, created_at timestamptz not null default now())",
    "create table outbox_by_hand (
       id uuid primary key, event_type text not null, aggregate_type text not null, aggregate_id text not null,
       payload jsonb not null, created_at timestamptz not null default now(), delivered_at timestamptz)",
    "create index outbox_by_hand_pending on outbox_by_hand (created_at) where delivered_at is null",
];

pub(crate) const SQLITE: &[&str] = &[
    "create table orders (id blob primary key, title text not null, created_at text not null default current_timestamp)",
    "create table outbox_by_hand (
       id blob primary key, event_type text not null, aggregate_type text not null, aggregate_id text not null,
       payload text not null, created_at text not null default current_timestamp, delivered_at text)",
    "create index outbox_by_hand_pending on outbox_by_hand (created_at) where delivered_at is null",
];

pub(crate) async fn create_tables(db: &DatabaseConnection, statements: &[&str]) -> Result<()> {
    for statement in statements {
        db.execute_unprepared(statement).await?;
    }
    Ok(())
}

/// `POST /{n}` writes an order and n events; `POST /hot` writes an order and an event of the aggregate of all of them.
pub(crate) fn with_layer(outbox: &Outbox) -> Router {
    Router::new()
        .route("/{events}", post(order_with_events))
        .route("/hot", post(order_of_one))
        .layer(OutboxLayer::new(outbox.clone()))
}

async fn order_of_one(tx: Tx, events: Events) -> Result<StatusCode, Error> {
    insert_order(&tx, Uuid::now_v7()).await?;
    events.push(Happened::new(0, 0))?;
    Ok(StatusCode::CREATED)
}

async fn order_with_events(tx: Tx, events: Events, Path(number): Path<usize>) -> Result<StatusCode, Error> {
    let id = Uuid::now_v7();
    insert_order(&tx, id).await?;
    for n in 0..number {
        events.push(Happened::of(n, id.to_string()))?;
    }
    Ok(StatusCode::CREATED)
}

/// `POST /{n}` writes an order and n rows of a hand-written outbox; `POST /least` writes an order and an event with the
/// least that our tables take.
pub(crate) fn by_hand(db: &DatabaseConnection) -> Router {
    Router::new().route("/{events}", post(order_by_hand)).route("/least", post(order_with_least)).with_state(db.clone())
}

async fn order_by_hand(State(db): State<DatabaseConnection>, Path(n): Path<usize>) -> Result<StatusCode, StatusCode> {
    write_by_hand(&db, n).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(StatusCode::CREATED)
}

async fn write_by_hand(db: &DatabaseConnection, number: usize) -> Result<(), DbErr> {
    let id = Uuid::now_v7();
    let tx = db.begin().await?;
    insert_order(&tx, id).await?;
    let rows = (0..number)
        .map(|n| {
            let payload = serde_json::to_value(Happened::of(n, id.to_string()));
            Ok(row::ActiveModel {
                id: Set(Uuid::now_v7()),
                event_type: Set("bench.happened".to_owned()),
                aggregate_type: Set("bench".to_owned()),
                aggregate_id: Set(id.to_string()),
                payload: Set(payload.map_err(|error| DbErr::Json(error.to_string()))?),
            })
        })
        .collect::<Result<Vec<_>, DbErr>>()?;
    row::Entity::insert_many(rows).exec_without_returning(&tx).await?;
    tx.commit().await
}

async fn order_with_least(State(db): State<DatabaseConnection>) -> Result<StatusCode, StatusCode> {
    write_least(&db).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(StatusCode::CREATED)
}

/// Event, lane and delivery as constants wherever possible: no check whether the subscriptions are current, no context.
async fn write_least(db: &DatabaseConnection) -> Result<(), DbErr> {
    const LEAST: &str = "
        with event as (
               insert into outbox_events (
                   event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at)
               values ($2, 'bench.happened', 1, 'bench', $1, $3::text::json, clock_timestamp())
               returning position)
        insert into outbox_unrouted (position) select position from event";
    let id = Uuid::now_v7();
    let tx = db.begin().await?;
    insert_order(&tx, id).await?;
    let payload =
        serde_json::to_string(&Happened::of(0, id.to_string())).map_err(|error| DbErr::Json(error.to_string()))?;
    let values = [id.to_string().into(), Uuid::now_v7().into(), payload.into()];
    tx.execute_raw(Statement::from_sql_and_values(DbBackend::Postgres, LEAST, values)).await?;
    tx.commit().await
}

async fn insert_order(db: &impl ConnectionTrait, id: Uuid) -> Result<(), DbErr> {
    let order = order::ActiveModel { id: Set(id), title: Set("ten of them".to_owned()) };
    order::Entity::insert(order).exec_without_returning(db).await.map(|_| ())
}
