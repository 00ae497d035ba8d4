//! The API of the todo list. Every writing handler works in the request's transaction and pushes what happened.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use outbox_axum::{Error, Events, Tx};
use outbox_core::Change;
use outbox_seaorm::Outbox;
use sea_orm::{ActiveValue::Set, ConnectionTrait, DbBackend, DbErr, QueryOrder, QuerySelect, entity::prelude::*};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::events::{TodoCompleted, TodoCreated, TodoData, TodoDeleted, TodoRenamed, TodoReopened};

const LONGEST_TITLE: usize = 500;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, DeriveEntityModel)]
#[sea_orm(table_name = "todos")]
pub(crate) struct Model {
    #[sea_orm(primary_key)]
    id: i64,
    title: String,
    completed: bool,
    version: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub(crate) enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    fn data(&self) -> TodoData {
        TodoData { id: self.id, title: self.title.clone(), completed: self.completed, version: self.version }
    }
}

/// Why a request was not carried out.
#[derive(Debug)]
pub(crate) enum TodoError {
    Title(&'static str),
    Exists(String),
    NotFound,
    Outbox(Error),
}

impl<E: Into<Error>> From<E> for TodoError {
    fn from(error: E) -> Self {
        Self::Outbox(error.into())
    }
}

impl IntoResponse for TodoError {
    fn into_response(self) -> Response {
        let (status, text) = match self {
            Self::Title(text) => (StatusCode::UNPROCESSABLE_ENTITY, text.to_owned()),
            Self::Exists(title) => (StatusCode::CONFLICT, format!("there is a todo {title:?} already")),
            Self::NotFound => (StatusCode::NOT_FOUND, "there is no such todo".to_owned()),
            Self::Outbox(error) => return error.into_response(),
        };
        (status, Json(json!({ "error": text }))).into_response()
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct NewTodo {
    title: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TodoPatch {
    title: Option<String>,
    completed: Option<bool>,
}

fn checked(title: &str) -> Result<String, TodoError> {
    let title = title.trim();
    if title.is_empty() {
        return Err(TodoError::Title("a todo needs a title"));
    }
    if title.chars().count() > LONGEST_TITLE {
        return Err(TodoError::Title("a title has at most 500 characters"));
    }
    if title.contains('\0') {
        return Err(TodoError::Title("a title has no NUL character"));
    }
    Ok(title.to_owned())
}

pub(crate) async fn list(State(outbox): State<Outbox>) -> Result<Json<Vec<Model>>, TodoError> {
    Ok(Json(Entity::find().order_by_asc(Column::Id).all(outbox.reader()).await?))
}

pub(crate) async fn get(State(outbox): State<Outbox>, Path(id): Path<i64>) -> Result<Json<Model>, TodoError> {
    Ok(Json(Entity::find_by_id(id).one(outbox.reader()).await?.ok_or(TodoError::NotFound)?))
}

pub(crate) async fn create(
    tx: Tx,
    events: Events,
    Json(todo): Json<NewTodo>,
) -> Result<(StatusCode, Json<Model>), TodoError> {
    let todo = insert(&tx, &events, checked(&todo.title)?).await?;
    Ok((StatusCode::CREATED, Json(todo)))
}

/// All or nothing: one bad title, and neither a todo nor an event of the request exists.
pub(crate) async fn import(
    tx: Tx,
    events: Events,
    Json(todos): Json<Vec<NewTodo>>,
) -> Result<(StatusCode, Json<Vec<Model>>), TodoError> {
    let titles = todos.iter().map(|todo| checked(&todo.title)).collect::<Result<Vec<_>, _>>()?;
    if tx.get_database_backend() == DbBackend::Postgres {
        // Two imports at once must not both find the same title free. SQLite has one writer anyway.
        tx.execute_unprepared("lock table todos in share row exclusive mode").await?;
    }
    let mut imported = Vec::with_capacity(titles.len());
    for title in titles {
        if Entity::find().filter(Column::Title.eq(&title)).one(&tx).await?.is_some() {
            return Err(TodoError::Exists(title));
        }
        imported.push(insert(&tx, &events, title).await?);
    }
    Ok((StatusCode::CREATED, Json(imported)))
}

async fn insert(tx: &Tx, events: &Events, title: String) -> Result<Model, TodoError> {
    let todo = ActiveModel { title: Set(title), completed: Set(false), version: Set(1), ..Default::default() };
    let todo = todo.insert(tx).await?;
    events.push(TodoCreated(Change::created(todo.data())))?;
    Ok(todo)
}

pub(crate) async fn patch(
    tx: Tx,
    events: Events,
    Path(id): Path<i64>,
    Json(patch): Json<TodoPatch>,
) -> Result<Json<Model>, TodoError> {
    let title = patch.title.as_deref().map(checked).transpose()?;
    let mut todo = find_for_update(&tx, id).await?;
    if let Some(title) = title.filter(|title| *title != todo.title) {
        let before = todo.data();
        todo = change(&tx, todo, |todo| todo.title = Set(title)).await?;
        events.push(TodoRenamed(between(&before, &todo)))?;
    }
    if let Some(completed) = patch.completed.filter(|completed| *completed != todo.completed) {
        let before = todo.data();
        todo = change(&tx, todo, |todo| todo.completed = Set(completed)).await?;
        let change = between(&before, &todo);
        if completed {
            events.push(TodoCompleted(change))?;
        } else {
            events.push(TodoReopened(change))?;
        }
    }
    Ok(Json(todo))
}

pub(crate) async fn delete(tx: Tx, events: Events, Path(id): Path<i64>) -> Result<StatusCode, TodoError> {
    let todo = find_for_update(&tx, id).await?;
    Entity::delete_by_id(id).exec(&tx).await?;
    let before = todo.data();
    let after = Model { version: todo.version + 1, ..todo };
    events.push(TodoDeleted(between(&before, &after)))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Locks the todo, so that the versions of its events follow each other.
async fn find_for_update(tx: &Tx, id: i64) -> Result<Model, TodoError> {
    Entity::find_by_id(id).lock_exclusive().one(tx).await?.ok_or(TodoError::NotFound)
}

async fn change(tx: &Tx, todo: Model, set: impl FnOnce(&mut ActiveModel)) -> Result<Model, DbErr> {
    let version = todo.version + 1;
    let mut todo = ActiveModel::from(todo);
    todo.version = Set(version);
    set(&mut todo);
    todo.update(tx).await
}

fn between(before: &TodoData, after: &Model) -> Change<TodoData> {
    Change::between(before, after.data()).expect("a todo serializes to JSON")
}
