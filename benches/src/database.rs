//! Fresh databases for each side of each round, copied from one that was filled once.

use std::time::Duration;

use outbox_core::{Context, Subscription};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::Outbox;
use outbox_test_servers::Postgres;
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};
use uuid::Uuid;

use crate::{
    events::{Happened, SUBSCRIPTION},
    measure::{Result, progress},
    processor,
};

/// Events in one transaction of a fill.
const FILL_BATCH: usize = 2000;

/// Enough for the clients of a load; a worker has connections of its own.
const CONNECTIONS: u32 = 16;

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

pub(crate) async fn migrate(db: &DatabaseConnection) -> Result<()> {
    Ok(outbox_migrations::up::<Migrator>(db).await?)
}

/// A PostgreSQL server: a private one, or that of a URL.
pub(crate) struct Server {
    url: String,
    admin: DatabaseConnection,
    pub(crate) private: Option<Postgres>,
}

impl Server {
    pub(crate) async fn start(url: Option<&str>) -> Result<Self> {
        let private = url.is_none().then(|| Postgres::start(&["max_connections=200", "shared_buffers=1GB"]));
        let url = match (&private, url) {
            (Some(server), _) => format!("postgres://postgres@127.0.0.1:{}/postgres", server.port()),
            (None, url) => url.unwrap_or_default().to_owned(),
        };
        let admin = sea_orm::Database::connect(&url).await?;
        Ok(Self { url, admin, private })
    }

    /// A database with the tables of the outbox and no subscriptions.
    pub(crate) async fn empty(&self) -> Result<Database> {
        let database = self.create("").await?;
        migrate(database.outbox().await?.writer()).await?;
        Ok(database)
    }

    /// A database of its own with the same content. Nobody may be connected to `filled`.
    pub(crate) async fn copy(&self, filled: &Database) -> Result<Database> {
        self.create(&format!("template {} strategy file_copy", filled.name)).await
    }

    async fn create(&self, options: &str) -> Result<Database> {
        let name = format!("outbox_bench_{}", Uuid::now_v7().simple());
        self.admin.execute_unprepared(&format!("create database {name} {options}")).await?;
        let (server, _) = self.url.rsplit_once('/').ok_or("the URL has no database")?;
        Ok(Database { url: format!("{server}/{name}"), name, admin: self.admin.clone() })
    }

    /// How much processor time all its sessions have used so far; nothing of a server on another machine.
    pub(crate) async fn processor_time(&self) -> Result<Duration> {
        if self.private.is_none() {
            return Ok(Duration::ZERO);
        }
        let session = self.admin.query_one_raw(Statement::from_string(DbBackend::Postgres, "select pg_backend_pid()"));
        let session: i32 = session.await?.ok_or("no answer")?.try_get_by_index(0)?;
        processor::used_by_children(&processor::parent(&session.to_string())?)
    }

    /// A database where this many events wait for one subscription, spread over this many keys.
    pub(crate) async fn backlog(&self, events: usize, keys: usize) -> Result<Database> {
        let database = self.empty().await?;
        database.fill(events, keys).await?;
        database.execute("vacuum analyze").await?;
        Ok(database)
    }
}

/// A database that is dropped with [`drop`](Self::drop), and at the latest with its private server.
pub(crate) struct Database {
    pub(crate) url: String,
    name: String,
    admin: DatabaseConnection,
}

impl Database {
    pub(crate) async fn outbox(&self) -> Result<Outbox> {
        Ok(Outbox::connect(&self.url, CONNECTIONS).await?)
    }

    pub(crate) async fn execute(&self, statement: &str) -> Result<()> {
        let db = sea_orm::Database::connect(&self.url).await?;
        db.execute_unprepared(statement).await?;
        Ok(db.close().await?)
    }

    /// Adds events that wait, for a subscription that was registered long ago.
    pub(crate) async fn fill(&self, events: usize, keys: usize) -> Result<()> {
        let outbox = self.outbox().await?;
        outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
        for first in (0..events).step_by(FILL_BATCH) {
            let unit = outbox.begin(Context::default());
            for n in first..events.min(first + FILL_BATCH) {
                unit.events().push(Happened::new(n, n % keys))?;
            }
            unit.commit().await?;
            if (first / FILL_BATCH).is_multiple_of(25) {
                progress(&format!("filling: {first} of {events} events"));
            }
        }
        Ok(())
    }

    pub(crate) async fn drop(self) -> Result<()> {
        // What still disconnects is given a moment by `force`.
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.admin.execute_unprepared(&format!("drop database {} with (force)", self.name)).await?;
        Ok(())
    }
}
