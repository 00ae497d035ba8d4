use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement};

use crate::pooler::Connections;

const DEFAULT_PREFIX: &str = "outbox_";

/// What the tables are called: their prefix and, on PostgreSQL, the schema in which they were found. A unit of work may
/// set another `search_path` for itself, and find tables of the same names there.
pub(crate) struct Names {
    prefix: String,
    schema: OnceLock<String>,
    /// The statements with these names, by the place of the original and whether the schema was known.
    statements: RwLock<HashMap<(usize, usize, bool), Arc<str>>>,
}

/// Without the statements, which would be pages of SQL in the `Debug` of an outbox.
impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names")
            .field("prefix", &self.prefix)
            .field("schema", &self.schema.get())
            .finish_non_exhaustive()
    }
}

impl Default for Names {
    fn default() -> Self {
        Self::with_prefix(DEFAULT_PREFIX)
    }
}

impl Names {
    pub(crate) fn with_prefix(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned(), schema: OnceLock::new(), statements: RwLock::default() }
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Looks for the schema unless it is known, with connections whose `search_path` is the one they began with. Finds
    /// nothing before the tables are there.
    pub(crate) async fn find(&self, db: &Connections) -> Result<(), DbErr> {
        if self.schema.get().is_some() || db.get_database_backend() != DbBackend::Postgres {
            return Ok(());
        }
        let find = Statement::from_sql_and_values(
            DbBackend::Postgres,
            "select quote_ident(n.nspname) as schema from pg_class c join pg_namespace n on n.oid = c.relnamespace
              where c.oid = to_regclass($1) and strpos(n.nspname, '''') = 0",
            [format!("{}meta", self.prefix).into()],
        );
        if let Some(row) = db.query_one_raw(find).await? {
            // Another task may have found it meanwhile.
            let _ = self.schema.set(row.try_get("", "schema")?);
        }
        Ok(())
    }

    /// A statement with these names.
    pub(crate) fn apply(&self, sql: &'static str) -> String {
        let schema = self.schema.get();
        if schema.is_none() && self.prefix == DEFAULT_PREFIX {
            return sql.to_owned();
        }
        let place = (sql.as_ptr().addr(), sql.len(), schema.is_some());
        if let Some(known) = self.statements.read().unwrap_or_else(PoisonError::into_inner).get(&place) {
            return (**known).to_owned();
        }
        let prefix = schema.map_or_else(|| self.prefix.clone(), |schema| format!("{schema}.{}", self.prefix));
        let named = sql.replace(DEFAULT_PREFIX, &prefix);
        self.statements.write().unwrap_or_else(PoisonError::into_inner).insert(place, named.as_str().into());
        named
    }
}
