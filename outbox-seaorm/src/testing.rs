//! For tests of applications: an outbox on a temporary file, and what is recorded in it.
//!
//! With the feature `testing`, which belongs into `[dev-dependencies]`. `outbox_core::testing` has a publisher that
//! remembers and a clock; `Worker::drain` of `outbox-apalis` delivers until nothing is due.

use std::{fmt::Debug, future::Future, io, ops::Deref, panic::Location};

use outbox_core::{Event, RecordedEvent};
use tempfile::TempDir;

use crate::{ConnectError, EventFilter, Outbox};

/// Connections for reading.
const READERS: u32 = 2;

/// How many events one query reads.
const PAGE: u32 = 1000;

/// An [`Outbox`] on a SQLite file of its own, which goes with it. Needs no setup; use it wherever an `Outbox` is wanted.
///
/// The file is empty: run your migrations on [`writer`](Outbox::writer), as your program does at its start.
#[derive(Debug)]
pub struct TestOutbox {
    outbox: Outbox,
    directory: TempDir,
}

/// Why there is no temporary database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestError {
    /// There is no place for the file.
    #[error("no folder for a temporary database could be made")]
    Folder(#[from] io::Error),
    /// The file did not open.
    #[error(transparent)]
    Open(#[from] ConnectError),
}

impl TestOutbox {
    /// Opens an empty database.
    ///
    /// # Errors
    ///
    /// If the system's folder for temporary files cannot be written.
    ///
    /// # Cancel safety
    ///
    /// Safe: dropping the future leaves nothing.
    pub async fn sqlite() -> Result<Self, TestError> {
        let directory = tempfile::tempdir()?;
        Ok(Self { outbox: Outbox::connect(&url(&directory), READERS).await?, directory })
    }

    /// Where the database is, for a process that is started by the test.
    #[must_use]
    pub fn url(&self) -> String {
        url(&self.directory)
    }
}

impl Deref for TestOutbox {
    type Target = Outbox;

    fn deref(&self) -> &Outbox {
        &self.outbox
    }
}

fn url(directory: &TempDir) -> String {
    format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display())
}

/// The events of type `E` that are stored, oldest first.
///
/// # Panics
///
/// If the database fails, or one of them has another schema version or a payload of another shape.
pub async fn recorded<E: Event>(outbox: &Outbox) -> Vec<E> {
    let filter = EventFilter { event_type: Some(E::TYPE.to_owned()), ..EventFilter::default() };
    let events = stored(outbox, &filter).await;
    events.iter().map(|event| event.decode().unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Makes sure that exactly these events of type `E` are stored, in this order. Events of other types do not matter.
///
/// # Panics
///
/// If they are not, or as [`recorded`].
#[track_caller]
pub fn assert_recorded<E: Event + Debug + PartialEq + Sync>(
    outbox: &Outbox,
    expected: &[E],
) -> impl Future<Output = ()> + Send {
    let caller = Location::caller();
    async move {
        let found = recorded::<E>(outbox).await;
        assert!(found == expected, "{caller}: recorded {}\n expected: {expected:#?}\n    found: {found:#?}", E::TYPE);
    }
}

/// Makes sure that no event of any type is stored.
///
/// # Panics
///
/// If there is one, or the database fails.
#[track_caller]
pub fn assert_nothing_recorded(outbox: &Outbox) -> impl Future<Output = ()> + Send {
    let caller = Location::caller();
    async move {
        let found = stored(outbox, &EventFilter::default()).await;
        let types: Vec<_> = found.iter().map(|event| &event.event_type).collect();
        assert!(types.is_empty(), "{caller}: nothing should be recorded, but there is {types:?}");
    }
}

async fn stored(outbox: &Outbox, filter: &EventFilter) -> Vec<RecordedEvent> {
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = outbox.events(filter, before, PAGE).await;
        let page = page.unwrap_or_else(|error| panic!("the events could not be read: {error}"));
        found.extend(page.events);
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use outbox_core::{Context, NewEvent, PushError};
    use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
    use serde::{Deserialize, Serialize};

    use super::*;

    struct Migrator;

    impl MigratorTrait for Migrator {
        fn migrations() -> Vec<Box<dyn MigrationTrait>> {
            outbox_migrations::all()
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Placed(u32);

    impl Event for Placed {
        const TYPE: &'static str = "order.placed";
        const AGGREGATE_TYPE: &'static str = "order";

        fn aggregate_id(&self) -> String {
            self.0.to_string()
        }
    }

    async fn with(placed: u32) -> TestOutbox {
        let outbox = TestOutbox::sqlite().await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        let push = |_, events: outbox_core::Events| async move {
            for n in 0..placed {
                events.push(Placed(n))?;
                events.push(NewEvent::dynamic("order.seen", "order", "1", &n)?)?;
            }
            Ok::<_, PushError>(())
        };
        outbox.transaction(Context::default(), push).await.unwrap();
        outbox
    }

    #[tokio::test]
    async fn what_was_recorded_comes_back_in_its_order_however_much_it_is() {
        let outbox = with(PAGE + 1).await;
        let all: Vec<_> = (0..=PAGE).map(Placed).collect();
        assert_recorded(&outbox, &all).await;
    }

    #[tokio::test]
    #[should_panic(expected = "testing.rs")]
    async fn another_event_than_the_expected_is_a_panic_that_names_the_test() {
        let outbox = with(2).await;
        assert_recorded(&outbox, &[Placed(0)]).await;
    }

    #[tokio::test]
    async fn nothing_recorded_is_nothing_recorded() {
        let outbox = with(0).await;
        assert_nothing_recorded(&outbox).await;
    }

    #[tokio::test]
    #[should_panic(expected = "order.seen")]
    async fn an_event_where_none_should_be_is_a_panic_that_names_it() {
        let outbox = with(1).await;
        assert_nothing_recorded(&outbox).await;
    }
}
