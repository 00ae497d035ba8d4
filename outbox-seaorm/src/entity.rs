//! SeaORM entities of the outbox tables, for queries of your own. Only read through them: rows change through
//! [`Outbox`](crate::Outbox) alone. They name the tables with the default prefix.
//!
//! ```no_run
//! use outbox_seaorm::entity::events;
//! use sea_orm::{ColumnTrait, DatabaseConnection, DbErr, EntityTrait, QueryFilter};
//!
//! # async fn example(db: &DatabaseConnection) -> Result<(), DbErr> {
//! let of_order_7 = events::Entity::find()
//!     .filter(events::Column::AggregateType.eq("order"))
//!     .filter(events::Column::AggregateId.eq("7"))
//!     .all(db)
//!     .await?;
//! # Ok(())
//! # }
//! ```

#![allow(missing_docs, reason = "columns carry the names of the tables, which the module of the store explains")]

/// A recorded event.
pub mod events {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_events")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub position: i64,
        #[sea_orm(unique)]
        pub event_id: Uuid,
        pub event_type: String,
        pub schema_version: i32,
        pub aggregate_type: String,
        pub aggregate_id: String,
        pub payload: Json,
        pub occurred_at: DateTimeUtc,
        pub recorded_at: DateTimeUtc,
        pub tenant: Option<String>,
        pub actor_kind: Option<String>,
        pub actor_id: Option<String>,
        pub correlation_id: Option<String>,
        pub causation_id: Option<String>,
        pub traceparent: Option<String>,
        pub tracestate: Option<String>,
        pub tags: Option<Json>,
        pub max_attempts: Option<i32>,
        pub wait_seconds: f64,
        pub not_before: Option<DateTimeUtc>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A subscription.
pub mod subscriptions {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_subscriptions")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i32,
        #[sea_orm(unique)]
        pub name: String,
        pub filter: Json,
        pub ordering: Json,
        pub backfill_from: Option<i64>,
        pub backfill_until: Option<i64>,
        pub paused_at: Option<DateTimeUtc>,
        pub circuit_until: Option<DateTimeUtc>,
        pub circuit_failures: i32,
        pub created_at: DateTimeUtc,
        /// Until when the rate of all workers together is reserved.
        pub rate_at: Option<DateTimeUtc>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// An event that a subscription still has to get.
pub mod deliveries {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_deliveries")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub subscription_id: i32,
        #[sea_orm(primary_key, auto_increment = false)]
        pub key: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub seq: i64,
        pub position: i64,
        pub due_at: DateTimeUtc,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The marks of events that are not routed yet, or were set aside.
pub mod unrouted {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_unrouted")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub position: i64,
        pub ahead: Option<bool>,
        pub set_aside_at: Option<DateTimeUtc>,
        pub error: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The ordered queue of one key of one subscription.
pub mod lanes {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_lanes")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub subscription_id: i32,
        #[sea_orm(primary_key, auto_increment = false)]
        pub key: String,
        /// That of its first event when it was created.
        pub tenant: Option<String>,
        pub pending: i32,
        pub due_at: DateTimeUtc,
        pub attempts: i32,
        pub lease_token: i64,
        pub leased_by: Option<String>,
        pub last_error: Option<String>,
        pub attempt_log: Option<Json>,
        pub held_at: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A delivery that succeeded.
pub mod delivered {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_delivered")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub subscription_id: i32,
        #[sea_orm(primary_key, auto_increment = false)]
        pub position: i64,
        pub attempts: i32,
        pub attempt_log: Option<Json>,
        pub delivered_at: DateTimeUtc,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A delivery that was given up.
pub mod dead_letters {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_dead_letters")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i64,
        pub subscription_id: i32,
        pub position: i64,
        pub key: String,
        pub attempts: i32,
        pub error: String,
        pub attempt_log: Option<Json>,
        pub died_at: DateTimeUtc,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// An event that retention has taken out of the outbox.
pub mod archive {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_archive")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub position: i64,
        #[sea_orm(unique)]
        pub event_id: Uuid,
        pub archived_at: DateTimeUtc,
        /// All columns of the event.
        pub event: Json,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// An event that a consumer has handled.
pub mod inbox {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_inbox")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub consumer: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub event_id: Uuid,
        pub handled_at: DateTimeUtc,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A worker process that was seen lately.
pub mod workers {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_workers")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub subscriptions: Json,
        pub started_at: DateTimeUtc,
        pub last_seen_at: DateTimeUtc,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// An action of an operator.
pub mod audit {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_audit")]
    pub struct Model {
        #[sea_orm(primary_key)]
        pub id: i64,
        pub at: DateTimeUtc,
        pub actor: String,
        pub action: String,
        pub target: String,
        pub details: Option<Json>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
