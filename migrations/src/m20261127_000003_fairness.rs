//! Version 3: lanes know their tenant, so that tenants share a subscription's slots, and limits of rate hold for all workers
//! together.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager,
    async_trait::async_trait,
    sea_orm::{ConnectionTrait, DbBackend, DbErr},
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
            let statement = statement.replace(DEFAULT_PREFIX, &self.prefix);
            manager.get_connection().execute_unprepared(&statement).await?;
        }
        Ok(())
    }
}

impl MigrationName for Migration {
    fn name(&self) -> &'static str {
        "m20261127_000003_fairness"
    }
}

#[expect(elided_lifetimes_in_paths, reason = "async_trait takes the signature only as the trait spells it")]
#[async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let (first, time) = match manager.get_database_backend() {
            DbBackend::Sqlite => (&[][..], "text"),
            _ => (POSTGRES_UP, "timestamptz"),
        };
        self.run(manager, first).await?;
        // Most lanes of most applications have no tenant, and cost nothing here.
        self.run(
            manager,
            &[
                "update outbox_meta set schema_version = 3",
                "alter table outbox_lanes add column tenant text",
                "create index outbox_lanes_tenant on outbox_lanes (subscription_id, tenant, due_at, key)
              where tenant is not null",
                &format!("alter table outbox_subscriptions add column rate_at {time}"),
            ],
        )
        .await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() != DbBackend::Sqlite {
            self.run(manager, POSTGRES_DOWN).await?;
        }
        self.run(
            manager,
            &[
                "drop index outbox_lanes_tenant",
                "alter table outbox_lanes drop column tenant",
                "alter table outbox_subscriptions drop column rate_at",
                "update outbox_meta set schema_version = 2",
            ],
        )
        .await
    }
}

// What waits for a lock gives up, because everything else waits behind it: `up` tries again.
//
// A lane is looked up by its key, and never through the index of due lanes. While the table was empty at its last vacuum,
// both cost the same to the planner, and a plan with the other index reads all lanes of the subscription for each. With a
// condition it cannot be used for that; it has no lanes that are held, which nobody claims.
const POSTGRES_UP: &[&str] = &[
    "set local lock_timeout = '2s'",
    "drop index outbox_lanes_due",
    "create index outbox_lanes_due on outbox_lanes (subscription_id, due_at, key) where due_at < 'infinity'",
];

const POSTGRES_DOWN: &[&str] = &[
    "set local lock_timeout = '2s'",
    "drop index outbox_lanes_due",
    "create index outbox_lanes_due on outbox_lanes (subscription_id, due_at, key)",
];
