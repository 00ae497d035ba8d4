//! What can happen to a todo. Each payload is `{"data": …, "previous": …}`.

use outbox_core::{Change, Event};
use serde::{Deserialize, Serialize};

/// The state of a todo after the event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TodoData {
    pub(crate) id: i64,
    pub(crate) title: String,
    pub(crate) completed: bool,
    /// Counts the events of the todo: 1, 2, 3 …
    pub(crate) version: i64,
}

macro_rules! todo_events {
    ($($name:ident = $event_type:literal;)*) => {$(
        #[derive(Clone, Debug, Serialize, Deserialize)]
        pub(crate) struct $name(pub(crate) Change<TodoData>);

        impl Event for $name {
            const TYPE: &'static str = $event_type;
            const AGGREGATE_TYPE: &'static str = "todo";

            fn aggregate_id(&self) -> String {
                self.0.data.id.to_string()
            }
        }
    )*};
}

todo_events! {
    TodoCreated = "todo.created";
    TodoRenamed = "todo.renamed";
    TodoCompleted = "todo.completed";
    TodoReopened = "todo.reopened";
    TodoDeleted = "todo.deleted";
}
