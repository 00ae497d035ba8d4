//! `POST /op`: an order and its events in the request's transaction, and whatever its mode adds.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use outbox_axum::{Decision, Error, Events, Tx};
use outbox_core::{NewEvent, PushError, check_id};
use outbox_seaorm::SavepointError;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::time::sleep;

use crate::{app::App, events::OrderPlaced, late, mode::Mode, tables};

/// The longest text that the mode `big` builds; far above what any limit of the library lets through.
const LONGEST_TEXT: usize = 64 * 1024 * 1024;

#[derive(Debug, Deserialize)]
pub(crate) struct Op {
    op: String,
    key: String,
    n: u32,
    mode: Mode,
    #[serde(default)]
    arg: String,
}

/// Why an op was not carried out.
#[derive(Debug)]
pub(crate) enum OpError {
    Raw(serde_json::Error),
    TooLong,
    Outbox(Error),
}

impl<E: Into<Error>> From<E> for OpError {
    fn from(error: E) -> Self {
        Self::Outbox(error.into())
    }
}

impl IntoResponse for OpError {
    fn into_response(self) -> Response {
        let (status, text) = match self {
            Self::Raw(error) => (StatusCode::UNPROCESSABLE_ENTITY, format!("arg is not JSON: {error}")),
            Self::TooLong => (StatusCode::PAYLOAD_TOO_LARGE, format!("a text has at most {LONGEST_TEXT} bytes")),
            Self::Outbox(error) => return error.into_response(),
        };
        (status, Json(json!({ "error": text }))).into_response()
    }
}

pub(crate) async fn op(
    State(app): State<App>,
    tx: Tx,
    events: Events,
    Json(op): Json<Op>,
) -> Result<Response, OpError> {
    check_id("op", &op.op).map_err(PushError::from)?;
    match op.mode {
        Mode::OnlyEvents => {
            op.push(&events, 1)?;
            return Ok(op.created());
        }
        Mode::OnlyRead => {
            let seq = tables::seq(app.outbox().reader(), &op.key).await?;
            return Ok(Json(json!({ "op": op.op, "seq": seq })).into_response());
        }
        Mode::PanicBefore => panic!("asked to panic before writing"),
        Mode::SleepBefore(time) => sleep(time).await,
        _ => {}
    }
    let first = op.write(&tx).await?;
    op.push(&events, first)?;
    op.add(&tx, &events).await?;
    op.answer(&app, tx, events).await
}

impl Op {
    /// Writes the order and returns the running number of its first event.
    async fn write(&self, tx: &Tx) -> Result<i64, OpError> {
        let last = tables::advance(tx, &self.key, self.n).await?;
        tables::insert_order(tx, &self.op, &self.key).await?;
        if self.mode == Mode::Swallow {
            let _ = self.fail(tx).await;
            let _ = tables::touch_order(tx, &self.op).await;
        }
        Ok(last - i64::from(self.n) + 1)
    }

    /// A statement that cannot succeed: the order is there already.
    async fn fail(&self, tx: &Tx) -> Result<(), Error> {
        Ok(tables::insert_order(tx, &self.op, &self.key).await?)
    }

    fn push(&self, events: &Events, first: i64) -> Result<(), OpError> {
        for i in 0..i64::from(self.n) {
            let event = NewEvent::of(&OrderPlaced { seq: Some(first + i), ..self.extra(i) })?;
            events.push(match self.mode {
                Mode::Delay(delay) => event.delay(delay),
                Mode::Priority(priority) => event.priority(priority),
                _ => event,
            })?;
        }
        Ok(())
    }

    fn extra(&self, i: i64) -> OrderPlaced {
        OrderPlaced { op: self.op.clone(), i, key: self.key.clone(), seq: None, text: None, raw: None }
    }

    /// The first event behind those of every mode.
    fn next(&self) -> OrderPlaced {
        self.extra(self.n.into())
    }

    /// What the mode pushes and writes before the answer.
    async fn add(&self, tx: &Tx, events: &Events) -> Result<(), OpError> {
        match self.mode {
            Mode::SwallowLast => drop(self.fail(tx).await),
            Mode::SavepointOk => tx.savepoint(|_, events| async move { push(&events, self.next()) }).await?,
            Mode::SavepointRollback => self.roll_back_to_savepoint(tx).await?,
            Mode::SavepointError => self.fail_in_savepoint(tx).await?,
            Mode::Many(more) => {
                for i in 0..i64::from(more) {
                    push(events, self.extra(i64::from(self.n) + i))?;
                }
            }
            Mode::Big(bytes) if bytes > LONGEST_TEXT => return Err(OpError::TooLong),
            Mode::Big(bytes) => push(events, OrderPlaced { text: Some("x".repeat(bytes)), ..self.next() })?,
            Mode::Raw => push(events, OrderPlaced { raw: Some(self.raw()?), ..self.next() })?,
            Mode::Deferred => tables::insert_orphan_line(tx, &self.op).await?,
            _ => {}
        }
        Ok(())
    }

    async fn roll_back_to_savepoint(&self, tx: &Tx) -> Result<(), Error> {
        // The error that asks for the rollback carries what the push answered.
        let undone = tx.savepoint(|_, events| async move { Err::<(), _>(push(&events, self.next())) }).await;
        match undone {
            Err(SavepointError::Work(pushed)) => pushed,
            Err(SavepointError::Database(error)) => Err(error.into()),
            _ => Err(Error::Savepoint),
        }
    }

    async fn fail_in_savepoint(&self, tx: &Tx) -> Result<(), Error> {
        let failed = tx
            .savepoint(|tx, events| async move {
                push(&events, self.next())?;
                self.fail(&tx).await
            })
            .await;
        match failed {
            Err(SavepointError::Work(Error::Database(_))) => Ok(()),
            failed => Ok(failed?),
        }
    }

    /// The JSON of `arg`, digit for digit: numbers that no `f64` holds stay what they are. What `Value` does not take
    /// is refused (half of a surrogate pair, nesting without end).
    fn raw(&self) -> Result<Box<RawValue>, OpError> {
        serde_json::from_str::<Value>(&self.arg).map_err(OpError::Raw)?;
        serde_json::from_str(&self.arg).map_err(OpError::Raw)
    }

    async fn answer(&self, app: &App, tx: Tx, events: Events) -> Result<Response, OpError> {
        Ok(match self.mode {
            Mode::Status(status) if is_without_body(status) => status.into_response(),
            Mode::Status(status) => (status, self.json()).into_response(),
            Mode::Rollback200 => (Decision::Rollback, self.json()).into_response(),
            Mode::Commit409 => (StatusCode::CONFLICT, Decision::Commit, self.json()).into_response(),
            Mode::Panic => panic!("asked to panic after writing"),
            Mode::SleepAfter(time) => {
                sleep(time).await;
                self.created()
            }
            Mode::SpawnHold(wait) => late::hold(self.created(), wait, tx, &self.op),
            Mode::PushLate(wait) => late::push(self.created(), wait, events, self.next(), app.late_push_errors()),
            Mode::Stream => late::stream(self.json().to_string()),
            Mode::StreamWrite => late::stream_write(self.json().to_string(), tx, &self.op),
            Mode::OtherPool => {
                tables::seq(app.outbox().reader(), &self.key).await?;
                self.created()
            }
            _ => self.created(),
        })
    }

    fn json(&self) -> Json<Value> {
        Json(json!({ "op": self.op }))
    }

    fn created(&self) -> Response {
        (StatusCode::CREATED, self.json()).into_response()
    }
}

fn push(events: &Events, event: OrderPlaced) -> Result<(), Error> {
    events.push(event)?;
    Ok(())
}

fn is_without_body(status: StatusCode) -> bool {
    status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}
