//! Versioned migrations of the outbox tables, for the application's own SeaORM `Migrator`.
//!
//! ```
//! use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
//!
//! struct Migrator;
//!
//! impl MigratorTrait for Migrator {
//!     fn migrations() -> Vec<Box<dyn MigrationTrait>> {
//!         let mut migrations = outbox_migrations::all();
//!         // migrations.push(Box::new(m20270101_000001_todos::Migration));
//!         migrations
//!     }
//! }
//!
//! # async fn start(db: sea_orm_migration::sea_orm::DatabaseConnection) -> Result<(), outbox_migrations::MigrateError> {
//! outbox_migrations::up::<Migrator>(&db).await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`up`] may be started by any number of processes at once and killed at any moment: one at a time works, in one
//! transaction. Each migration has a real `down`, which drops its tables with everything in them.

use std::{collections::HashSet, time::Duration};

pub use sea_orm_migration;
use sea_orm_migration::{
    MigrationTrait, MigratorTrait,
    sea_orm::{
        ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, SqliteTransactionMode,
        TransactionOptions, TransactionTrait, sqlx::ConnectOptions as _,
    },
};

mod m20261121_000001_outbox;
mod m20261126_000002_routing;
mod m20261127_000003_fairness;

/// The version of the tables that these migrations end with, as written to `outbox_meta`.
pub const SCHEMA_VERSION: i32 = 3;

/// What the names of all tables start with, unless [`with_prefix`] says otherwise.
pub const DEFAULT_PREFIX: &str = "outbox_";

/// All migrations of the outbox, in their order, with the default table names.
#[must_use]
pub fn all() -> Vec<Box<dyn MigrationTrait>> {
    with_prefix(DEFAULT_PREFIX)
}

/// All migrations of the outbox with table names that start with `prefix` instead of `outbox_`.
///
/// # Panics
///
/// If the prefix has other characters than `a-z`, `0-9` and `_`, starts with a digit, or is longer than 32 characters.
#[must_use]
pub fn with_prefix(prefix: &str) -> Vec<Box<dyn MigrationTrait>> {
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
    assert!(
        (1..=32).contains(&prefix.len())
            && prefix.bytes().all(allowed)
            && !prefix.starts_with(|c: char| c.is_ascii_digit()),
        "a table prefix has 1 to 32 of the characters a-z, 0-9 and '_' and starts with no digit"
    );
    vec![
        Box::new(m20261121_000001_outbox::Migration::new(prefix)),
        Box::new(m20261126_000002_routing::Migration::new(prefix)),
        Box::new(m20261127_000003_fairness::Migration::new(prefix)),
    ]
}

/// Why the database could not be brought to this program's version.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// A later version of the program has migrated the database.
    #[error(
        "the database was migrated by a newer version of this program (it has the migration {newest:?}); start that \
         version, or restore a backup from before the upgrade"
    )]
    NewerDatabase {
        /// The newest migration that this program does not know.
        newest: String,
    },
    /// A migration refuses this state of the database, for the reason that its text has; nothing was changed.
    #[error("the database cannot be migrated now: {0}")]
    Refused(String),
    /// The database refused; nothing was changed.
    #[error("the database could not be migrated; nothing was changed")]
    Database(#[source] DbErr),
}

impl From<DbErr> for MigrateError {
    fn from(error: DbErr) -> Self {
        match error {
            DbErr::Migration(why) => Self::Refused(why),
            error => Self::Database(error),
        }
    }
}

/// Applies all migrations of `M` that are missing, in one transaction.
///
/// Waits for another process that is migrating. Killed halfway, nothing is changed.
///
/// # Errors
///
/// [`MigrateError::NewerDatabase`] if the database has migrations that `M` does not know, [`MigrateError::Refused`] if
/// something has to be done first, as its text says.
pub async fn up<M: MigratorTrait>(db: &DatabaseConnection) -> Result<(), MigrateError> {
    migrate::<M>(db, None).await
}

/// Takes back the last `steps` migrations of `M`, in one transaction. Their tables are dropped with everything in them.
///
/// # Errors
///
/// As [`up`].
pub async fn down<M: MigratorTrait>(db: &DatabaseConnection, steps: u32) -> Result<(), MigrateError> {
    migrate::<M>(db, Some(steps)).await
}

/// How often a migration is tried that does not get its locks, and the pause between: whoever waits behind it goes on
/// meanwhile.
const TRIES: u32 = 15;
const PAUSE: Duration = Duration::from_secs(1);

/// Up, or some steps down. A table that somebody is at for long is not waited for in one go: all that came later would
/// wait behind.
async fn migrate<M: MigratorTrait>(db: &DatabaseConnection, down: Option<u32>) -> Result<(), MigrateError> {
    let mut tries = 1;
    loop {
        match try_to_migrate::<M>(db, down).await {
            Err(MigrateError::Database(error)) if tries < TRIES && is_lock_timeout(&error) => {
                tracing::warn!(%error, "the migration waits for a lock; trying again");
                tokio::time::sleep(PAUSE).await;
                tries += 1;
            }
            ended => return ended,
        }
    }
}

async fn try_to_migrate<M: MigratorTrait>(db: &DatabaseConnection, down: Option<u32>) -> Result<(), MigrateError> {
    let transaction = lock(db).await?;
    refuse_newer::<M>(&transaction).await?;
    match down {
        None => M::up(&transaction, None).await?,
        steps => M::down(&transaction, steps).await?,
    }
    transaction.commit().await?;
    Ok(())
}

fn is_lock_timeout(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return false;
    };
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some("55P03")
}

async fn lock(db: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    let options =
        TransactionOptions { sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate), ..Default::default() };
    let transaction = db.begin_with_options(options).await?;
    if transaction.get_database_backend() == DbBackend::Postgres {
        // Whatever the server's default is: what waits for another process has to see what that one has done.
        transaction.execute_unprepared("set transaction isolation level read committed").await?;
        if is_pooled(db) {
            // Statements of other clients that have used this session, under the names that sqlx is about to use.
            transaction.execute_unprepared("deallocate all").await?;
        }
        // Any constant does, as long as every version of this crate uses the same.
        transaction.execute_unprepared("select pg_advisory_xact_lock(8024719303)").await?;
    }
    Ok(transaction)
}

/// Whether a connection pooler may give each transaction another session: the URL says `statement-cache-capacity=0`.
fn is_pooled(db: &DatabaseConnection) -> bool {
    let url = db.get_postgres_connection_pool().connect_options().to_url_lossy();
    url.query_pairs().any(|(name, value)| name == "statement-cache-capacity" && value == "0")
}

async fn refuse_newer<M: MigratorTrait>(transaction: &DatabaseTransaction) -> Result<(), MigrateError> {
    let known: HashSet<String> = M::migrations().iter().map(|migration| migration.name().to_owned()).collect();
    let applied = M::get_migration_models(transaction).await?;
    match applied.into_iter().map(|model| model.version).filter(|version| !known.contains(version)).max() {
        Some(newest) => Err(MigrateError::NewerDatabase { newest }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use sea_orm_migration::sea_orm::{ConnectOptions, Database, Statement};

    use super::*;

    struct Migrator;

    impl MigratorTrait for Migrator {
        fn migrations() -> Vec<Box<dyn MigrationTrait>> {
            all()
        }
    }

    struct Prefixed;

    impl MigratorTrait for Prefixed {
        fn migrations() -> Vec<Box<dyn MigrationTrait>> {
            with_prefix("shop_events_")
        }
    }

    async fn sqlite(directory: &tempfile::TempDir) -> DatabaseConnection {
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let mut options = ConnectOptions::new(url);
        options.max_connections(1).sqlx_logging(false);
        Database::connect(options).await.unwrap()
    }

    async fn tables(db: &DatabaseConnection) -> Vec<String> {
        let sql = "select name from sqlite_master where type = 'table' and name not like 'sqlite_%' order by name";
        let rows = db.query_all_raw(Statement::from_string(DbBackend::Sqlite, sql)).await.unwrap();
        rows.iter().map(|row| row.try_get::<String>("", "name").unwrap()).filter(|n| n != "seaql_migrations").collect()
    }

    #[tokio::test]
    async fn up_down_up() {
        let directory = tempfile::tempdir().unwrap();
        let db = sqlite(&directory).await;
        up::<Migrator>(&db).await.unwrap();
        let first = tables(&db).await;
        assert!(first.contains(&"outbox_events".to_owned()), "{first:?}");
        down::<Migrator>(&db, all().len() as u32).await.unwrap();
        assert_eq!(tables(&db).await, Vec::<String>::new());
        up::<Migrator>(&db).await.unwrap();
        up::<Migrator>(&db).await.unwrap();
        assert_eq!(tables(&db).await, first);
    }

    #[tokio::test]
    async fn eight_processes_may_migrate_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut running = Vec::new();
        for _ in 0..8 {
            let db = sqlite(&directory).await;
            running.push(tokio::spawn(async move { up::<Migrator>(&db).await }));
        }
        for migration in running {
            migration.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_database_from_a_newer_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let db = sqlite(&directory).await;
        up::<Migrator>(&db).await.unwrap();
        db.execute_unprepared("insert into seaql_migrations values ('m29990101_000001_future', 0)").await.unwrap();
        let error = up::<Migrator>(&db).await.unwrap_err();
        assert!(error.to_string().contains("newer version") && error.to_string().contains("m29990101_000001_future"));
    }

    #[tokio::test]
    async fn the_table_prefix_can_be_chosen() {
        let directory = tempfile::tempdir().unwrap();
        let db = sqlite(&directory).await;
        up::<Prefixed>(&db).await.unwrap();
        let tables = tables(&db).await;
        assert!(tables.iter().all(|table| table.starts_with("shop_events_")), "{tables:?}");
        down::<Prefixed>(&db, all().len() as u32).await.unwrap();
    }
}
