use std::time::Duration;

use sea_orm::DbErr;
use uuid::Uuid;

use crate::{Outbox, Tx};

/// Whether `consumer` sees this event for the first time: remembers it in the transaction of the effect, so the effect
/// happens exactly once however often the event is delivered.
///
/// ```no_run
/// # use outbox_seaorm::{Outbox, Tx};
/// # use sea_orm::{ConnectionTrait, DbErr};
/// # async fn handle(outbox: &Outbox, tx: &Tx, event_id: uuid::Uuid) -> Result<(), DbErr> {
/// if outbox_seaorm::once(outbox, tx, "mailer", event_id).await? {
///     tx.execute_unprepared("update counters set mails = mails + 1").await?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// If the database fails; the transaction cannot commit then.
///
/// # Cancel safety
///
/// Dropping the future leaves the transaction failed: nothing can be committed.
pub async fn once(outbox: &Outbox, tx: &Tx, consumer: &str, event: Uuid) -> Result<bool, DbErr> {
    Ok(outbox.execute(tx, outbox.sql().inbox_insert, [consumer.into(), event.into()]).await? == 1)
}

/// As [`once`], in a transaction that PostgreSQL ends when it has waited this long for its next statement: a client that
/// is gone without a word holds no lock for longer. For workers.
///
/// # Errors
///
/// As [`once`].
///
/// # Cancel safety
///
/// As [`once`].
pub async fn once_within(outbox: &Outbox, tx: &Tx, consumer: &str, event: Uuid, idle: Duration) -> Result<bool, DbErr> {
    let Some(sql) = outbox.sql().inbox_insert_within else { return once(outbox, tx, consumer, event).await };
    // Zero would be no limit, and it is a 32-bit number.
    let idle = idle.as_millis().clamp(1, i32::MAX as u128).to_string();
    Ok(outbox.execute(tx, sql, [consumer.into(), event.into(), idle.into()]).await? == 1)
}
