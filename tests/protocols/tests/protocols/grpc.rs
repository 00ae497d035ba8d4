//! A tonic server and tonic clients, over a socket.

use std::{
    convert::Infallible,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream, stream::BoxStream};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use outbox_axum::{Decision, Error, Events, OutboxLayer, Tx};
use outbox_core::NewEvent;
use outbox_seaorm::Outbox;
use sea_orm::ConnectionTrait;
use tokio::{net::TcpListener, task::AbortHandle};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    client::GrpcService,
    codegen::{StdError, http, http::uri::PathAndQuery},
    metadata::MetadataMap,
    server::NamedService,
    service::Routes,
    transport::{Channel, Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;
use tonic_web::{GrpcWebClientLayer, GrpcWebLayer};
use tower::{Layer, Service, service_fn};

use crate::support::{database, insert, stored};

#[derive(Clone, PartialEq, prost::Message)]
struct Order {
    #[prost(string, tag = "1")]
    op: String,
}

/// What the handler does is the name of the order.
async fn place(request: Request<Order>) -> Result<Response<Order>, Status> {
    let missing = |error: outbox_axum::MissingLayer| Status::internal(error.to_string());
    let tx = Tx::from_extensions(request.extensions()).map_err(missing)?;
    let events = Events::from_extensions(request.extensions()).map_err(missing)?;
    let order = request.into_inner();
    store(&tx, &events, &order.op).await.map_err(status)?;
    match order.op.as_str() {
        "twice" => insert(&tx, "twice").await.map_err(|error| status(error.into()))?,
        "ignored" => drop(insert(&tx, "ignored").await),
        "conflict" => drop(tx.execute_unprepared("insert into lines values ('missing')").await.unwrap()),
        "panic" => panic!("boom"),
        "slow" => tokio::time::sleep(Duration::from_secs(60)).await,
        "refused" => return Err(Status::failed_precondition("closed on Sundays: 100 %")),
        _ => {}
    }
    let rehearsed = order.op == "rehearsed";
    let mut response = Response::new(order);
    if rehearsed {
        response.extensions_mut().insert(Decision::Rollback);
    }
    Ok(response)
}

async fn store(tx: &Tx, events: &Events, op: &str) -> Result<(), Error> {
    insert(tx, op).await?;
    events.push(NewEvent::dynamic("order.placed", "order", op, &())?)?;
    Ok(())
}

fn status(error: Error) -> Status {
    Status::new(Code::from(error.grpc_code()), error.sentence())
}

/// Answers with messages, then with an error or a success, whatever the name says.
async fn watch(request: Request<Order>) -> Result<Response<BoxStream<'static, Result<Order, Status>>>, Status> {
    let tx = Tx::from_extensions(request.extensions()).unwrap();
    let order = request.into_inner();
    insert(&tx, &order.op).await.unwrap();
    if order.op == "refused" {
        return Err(Status::not_found("no such order"));
    }
    let messages = [Ok(order.clone()), Ok(order)].into_iter().chain([Err(Status::data_loss("in the trailers"))]);
    Ok(Response::new(stream::iter(messages).boxed()))
}

#[derive(Clone)]
struct Shop;

impl NamedService for Shop {
    const NAME: &'static str = "shop.Shop";
}

impl Service<http::Request<Body>> for Shop {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let mut grpc = tonic::server::Grpc::new(ProstCodec::<Order, Order>::default());
        if request.uri().path() == "/shop.Shop/Watch" {
            async move { Ok(grpc.server_streaming(service_fn(watch), request).await) }.boxed()
        } else {
            async move { Ok(grpc.unary(service_fn(place), request).await) }.boxed()
        }
    }
}

/// The ways in which people put it together.
#[derive(Clone, Copy, Debug)]
enum Setup {
    /// The layer on tonic's own server.
    Tonic,
    /// The layer on an axum router with the service in it.
    Axum,
    /// gRPC-Web is translated inside of the layer.
    WebInside,
    /// gRPC-Web is translated outside of the layer.
    WebOutside,
}

const ALL: [Setup; 4] = [Setup::Tonic, Setup::Axum, Setup::WebInside, Setup::WebOutside];

impl Setup {
    fn is_web(self) -> bool {
        matches!(self, Self::WebInside | Self::WebOutside)
    }
}

struct Serving {
    address: String,
    task: AbortHandle,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(setup: Setup, layer: OutboxLayer) -> Serving {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let incoming = TcpIncoming::from(listener);
    let router = Routes::new(Shop).into_axum_router();
    let server = Server::builder().accept_http1(true);
    let task = match setup {
        Setup::Tonic => {
            let mut server = server.layer(layer);
            tokio::spawn(server.add_service(Shop).serve_with_incoming(incoming))
        }
        Setup::Axum => {
            let mut server = server;
            tokio::spawn(server.add_routes(router.layer(layer).into()).serve_with_incoming(incoming))
        }
        Setup::WebInside => {
            let mut server = server.layer(layer).layer(GrpcWebLayer::new());
            tokio::spawn(server.add_service(Shop).serve_with_incoming(incoming))
        }
        Setup::WebOutside => {
            let mut server = server.layer(GrpcWebLayer::new()).layer(layer);
            tokio::spawn(server.add_service(Shop).serve_with_incoming(incoming))
        }
    };
    Serving { address, task: task.abort_handle() }
}

type Answer = Result<Response<Order>, Status>;

/// Calls with a client of the setup.
async fn call(setup: Setup, serving: &Serving, op: &str) -> Answer {
    if setup.is_web() {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let origin = serving.address.parse().unwrap();
        unary(tonic::client::Grpc::with_origin(GrpcWebClientLayer::new().layer(client), origin), op).await
    } else {
        unary(tonic::client::Grpc::new(channel(serving).await), op).await
    }
}

async fn channel(serving: &Serving) -> Channel {
    Channel::from_shared(serving.address.clone()).unwrap().connect().await.unwrap()
}

async fn unary<T>(mut client: tonic::client::Grpc<T>, op: &str) -> Answer
where
    T: GrpcService<Body>,
    T::ResponseBody: http_body::Body + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<StdError>,
    T::Error: std::fmt::Debug,
{
    client.ready().await.unwrap();
    let path = PathAndQuery::from_static("/shop.Shop/Place");
    client.unary(Request::new(Order { op: op.to_owned() }), path, ProstCodec::<Order, Order>::default()).await
}

fn outcome(metadata: &MetadataMap) -> &str {
    metadata.get("outbox-outcome").map_or("no outcome", |value| value.to_str().unwrap())
}

/// The code, the message and the outcome that the client sees.
fn refusal(answer: Answer) -> (Code, String, String) {
    let status = answer.expect_err("it is an error");
    (status.code(), status.message().to_owned(), outcome(status.metadata()).to_owned())
}

fn rolled_back(code: Code, message: &str) -> (Code, String, String) {
    (code, message.to_owned(), "rolled-back".to_owned())
}

const INTERNAL: &str = "the request failed; the log of the service says why";
const CONFLICT: &str = "this does not fit what is stored already; change the request";

#[tokio::test]
async fn a_grpc_success_commits_before_it_leaves() {
    for setup in ALL {
        let outbox = database().await;
        let serving = serve(setup, OutboxLayer::new(outbox.clone())).await;
        let answer = call(setup, &serving, "a").await.unwrap();
        assert_eq!((answer.get_ref().op.as_str(), outcome(answer.metadata())), ("a", "committed"), "{setup:?}");
        assert_eq!(stored(&outbox).await, (1, 1), "{setup:?}");
    }
}

#[tokio::test]
async fn a_grpc_error_rolls_back_and_stays_as_it_is() {
    for setup in ALL {
        let outbox = database().await;
        let serving = serve(setup, OutboxLayer::new(outbox.clone())).await;
        let refused = refusal(call(setup, &serving, "refused").await);
        assert_eq!(refused, rolled_back(Code::FailedPrecondition, "closed on Sundays: 100 %"), "{setup:?}");
        assert_eq!(refusal(call(setup, &serving, "twice").await), rolled_back(Code::Aborted, CONFLICT), "{setup:?}");
        assert_eq!(stored(&outbox).await, (0, 0), "{setup:?}");
    }
}

#[tokio::test]
async fn an_answer_of_the_layer_is_a_grpc_status() {
    for setup in ALL {
        let outbox = database().await;
        let serving = serve(setup, OutboxLayer::new(outbox.clone()).max_age(Duration::from_millis(300))).await;
        for (op, code, message) in [
            ("ignored", Code::Internal, INTERNAL),
            ("panic", Code::Internal, INTERNAL),
            ("conflict", Code::Aborted, CONFLICT),
            (
                "slow",
                Code::DeadlineExceeded,
                "this took too long and nothing of it was stored; send it faster, or less at once",
            ),
        ] {
            assert_eq!(refusal(call(setup, &serving, op).await), rolled_back(code, message), "{setup:?} {op}");
        }
        assert_eq!(stored(&outbox).await, (0, 0), "{setup:?}");
    }
}

#[tokio::test]
async fn a_busy_database_is_unavailable() {
    let outbox = database().await;
    let mut options = sea_orm::ConnectOptions::new(outbox.url());
    options.max_connections(1).acquire_timeout(Duration::from_millis(50));
    let pool = Outbox::new(sea_orm::Database::connect(options).await.unwrap());
    let held = pool.begin(outbox_core::Context::default());
    held.tx().begin_now().await.unwrap();
    for setup in ALL {
        let serving = serve(setup, OutboxLayer::new(pool.clone()).eager(true)).await;
        let answer = call(setup, &serving, "a").await;
        let retry_after = answer.as_ref().unwrap_err().metadata().get("retry-after").cloned();
        let busy = "the service is busy; send the request again in a moment";
        assert_eq!(refusal(answer), rolled_back(Code::Unavailable, busy), "{setup:?}");
        assert_eq!(retry_after.unwrap(), "1", "{setup:?}");
    }
    held.rollback().await;
}

#[tokio::test]
async fn a_decision_overrides_a_grpc_success() {
    let outbox = database().await;
    let serving = serve(Setup::Tonic, OutboxLayer::new(outbox.clone())).await;
    let answer = call(Setup::Tonic, &serving, "rehearsed").await.unwrap();
    assert_eq!(outcome(answer.metadata()), "rolled-back");
    assert_eq!(stored(&outbox).await, (0, 0));
}

async fn watched(serving: &Serving, op: &str) -> (usize, Option<Code>, String) {
    let mut client = tonic::client::Grpc::new(channel(serving).await);
    client.ready().await.unwrap();
    let path = PathAndQuery::from_static("/shop.Shop/Watch");
    let codec = ProstCodec::<Order, Order>::default();
    match client.server_streaming(Request::new(Order { op: op.to_owned() }), path, codec).await {
        Err(status) => (0, Some(status.code()), outcome(status.metadata()).to_owned()),
        Ok(response) => {
            let outcome = outcome(response.metadata()).to_owned();
            let messages: Vec<Result<Order, Status>> = response.into_inner().collect().await;
            let error = messages.iter().find_map(|message| message.as_ref().err()).map(Status::code);
            (messages.iter().filter(|message| message.is_ok()).count(), error, outcome)
        }
    }
}

#[tokio::test]
async fn an_error_behind_a_stream_comes_after_the_commit() {
    let outbox = database().await;
    let serving = serve(Setup::Tonic, OutboxLayer::new(outbox.clone())).await;
    assert_eq!(watched(&serving, "refused").await, (0, Some(Code::NotFound), "rolled-back".to_owned()));
    assert_eq!(stored(&outbox).await.0, 0);
    assert_eq!(watched(&serving, "a").await, (2, Some(Code::DataLoss), "committed".to_owned()));
    assert_eq!(stored(&outbox).await.0, 1);
}

#[tokio::test]
async fn a_client_whose_time_is_over_leaves_nothing() {
    let outbox = database().await;
    let serving = serve(Setup::Tonic, OutboxLayer::new(outbox.clone())).await;
    let mut client = tonic::client::Grpc::new(channel(&serving).await);
    client.ready().await.unwrap();
    let mut request = Request::new(Order { op: "slow".to_owned() });
    request.set_timeout(Duration::from_millis(200));
    let path = PathAndQuery::from_static("/shop.Shop/Place");
    let answer: Answer = client.unary(request, path, ProstCodec::<Order, Order>::default()).await;
    // The server's own time limit is outside of the layer: it says nothing about the outcome.
    let (code, _, outcome) = refusal(answer);
    assert!(matches!(code, Code::Cancelled | Code::DeadlineExceeded), "{code:?}");
    assert_eq!(outcome, "no outcome");
    // Waits for the write connection, which comes back when the transaction has ended.
    insert(outbox.writer(), "slow").await.unwrap();
    assert_eq!(stored(&outbox).await, (1, 0));
}
