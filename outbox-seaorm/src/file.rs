//! The file of a SQLite database, as it was when it was opened.
//!
//! Unix keeps a file that is deleted or replaced for those who have it open: everything works, and nobody else sees it.

use std::{
    fs::Metadata,
    path::{Path, PathBuf},
};

use sea_orm::{DatabaseConnection, DatabaseConnectionType, DbErr, RuntimeErr};

use crate::Outbox;

#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl File {
    /// Of connections that are open; `None` if there is no such file.
    pub(crate) fn of(db: &DatabaseConnection) -> Option<Self> {
        if !matches!(db.inner, DatabaseConnectionType::SqlxSqlitePoolConnection(_)) {
            return None;
        }
        let options = db.get_sqlite_connection_pool().connect_options();
        // Wherever the process goes to.
        let path = std::path::absolute(options.get_filename()).ok()?;
        let identity = identity(&std::fs::metadata(&path).ok()?);
        Some(Self { path, identity })
    }

    /// Refuses what would be stored in a file that nobody finds again.
    pub(crate) fn check(&self) -> Result<(), DbErr> {
        let now = std::fs::metadata(&self.path).ok();
        if now.is_some_and(|now| identity(&now) == self.identity) {
            return Ok(());
        }
        let text = format!(
            "the database file {} was deleted or replaced while it was open; end the programs that use it, see which file is \
             the right one, and start them again",
            self.path.display()
        );
        Err(DbErr::Conn(RuntimeErr::Internal(text)))
    }
}

/// Device and number; on other systems an open file cannot be deleted.
#[cfg(unix)]
#[allow(clippy::unnecessary_wraps, reason = "other systems have none")]
fn identity(metadata: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;

    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> Option<(u64, u64)> {
    None
}

impl Outbox {
    /// How large the write-ahead log is that lies beside the file of a SQLite database, in bytes; `None` if there is none.
    ///
    /// It grows while a reader keeps an old snapshot, and is cut to 64 MiB when it can be begun anew.
    #[must_use]
    pub fn write_ahead_log(&self) -> Option<u64> {
        let mut log = self.connections().file.as_ref()?.path.clone().into_os_string();
        log.push("-wal");
        std::fs::metadata(Path::new(&log)).ok().map(|log| log.len())
    }
}
