//! The admin HTTP server, on an address of its own. What it is asked it hands to
//! [`Operations`], which the app implements; nothing is decided here.
//!
//! | endpoint | answers |
//! | --- | --- |
//! | `GET /healthz` | 200 while the process lives |
//! | `GET /readyz` | 200 when clients can be served, else 503 and why |
//! | `GET /metrics` | Prometheus text |
//! | `GET /api/v1/status` | [`api::Status`] |
//! | `POST /api/v1/reload?yes=true` | reads proxy.yaml again: [`api::ReloadAnswer`], or 422 and why not; `yes` where it ends the migration |
//! | `POST /api/v1/switchover` | [`api::SwitchoverAnswer`]; 409 where it was not done |
//! | `GET /api/v1/switchover` | [`api::History`]; 422 where no side can be asked |
//! | `POST /api/v1/complete` | ends the migration: [`api::ReloadAnswer`], or 422 and why not |
//! | `GET /api/v1/wait?timeout_ms=N` | [`api::WaitAnswer`]; 408 when the time is over |
//! | `GET /api/v1/quarantine` | [`api::QuarantineList`] |
//! | `POST /api/v1/quarantine/retry`, `…/discard` | [`api::QuarantineAnswer`]; 409 where not all was done |
//! | `GET /api/v1/strays` | [`api::StrayList`] |
//! | `POST /api/v1/strays/acknowledge` | [`api::AcknowledgedStrays`], or 422 and why not |
//! | `POST /api/v1/mismatches/acknowledge` | records it in the mismatch log: [`api::Recorded`], or 422 and why not |
//! | `POST /api/v1/mismatches/statistics` | writes what the shadow reads came to now: [`api::Recorded`], or 422 and why not |
//! | `POST /api/v1/schema/heal` | [`api::HealAnswer`]; 409 where something is left |
//! | `POST /api/v1/verify`, `/api/v1/repair` | [`Event`]s, a JSON line each, while it runs; it ends when nobody reads them |
//! | `GET /api/v1/backfill`, `POST …`, `POST …/cancel` | [`api::BackfillAnswer`], or 422 and why not |
//! | `GET /api/v1/shadows` | [`api::ShadowsAnswer`]: shadow reads by fingerprint, coverage, latencies |
//! | `GET /api/v1/shadows/plans?fingerprint=…` | [`Plans`], or 422 and why not |
//! | `GET /api/v1/explain?sql=…` | how a statement would be handled |
//!
//! With `admin_token` set, all but `/healthz` and `/readyz` ask for `Authorization: Bearer`.

pub mod api;
pub mod client;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Deserialize;
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::api::{
    AcknowledgeRequest, AcknowledgeStraysRequest, AcknowledgedStrays, BackfillAnswer, BackfillCancelRequest,
    BackfillRequest, DiscardRequest, ExplainAnswer, Failure, HealAnswer, HealRequest, History, QuarantineAnswer,
    QuarantineList, Recorded, ReloadAnswer, RetryRequest, ShadowsAnswer, Status, StrayList, SwitchoverAnswer,
    SwitchoverRequest, VerifyRequest, WaitAnswer,
};
use crate::config::Secret;
use crate::reconcile::report::Event;
use crate::shadow::Plans;

/// What an operator may ask of the running proxy.
pub trait Operations: Send + Sync + 'static {
    /// Why clients cannot be served, where they cannot.
    fn ready(&self) -> Result<(), String>;
    fn status(&self) -> impl Future<Output = Status> + Send;
    fn reload(self: Arc<Self>, yes: bool) -> impl Future<Output = Result<ReloadAnswer, String>> + Send;
    fn switchover(
        self: Arc<Self>,
        request: SwitchoverRequest,
    ) -> impl Future<Output = Result<SwitchoverAnswer, String>> + Send;
    fn complete(self: Arc<Self>) -> impl Future<Output = Result<ReloadAnswer, String>> + Send;
    fn history(&self) -> impl Future<Output = Result<History, String>> + Send;
    fn wait_caught_up(&self, timeout: Duration) -> impl Future<Output = Result<WaitAnswer, String>> + Send;
    fn shadows(&self) -> ShadowsAnswer;
    fn plans(&self, fingerprint: &str) -> impl Future<Output = Result<Plans, String>> + Send;
    fn explain(&self, sql: &str) -> impl Future<Output = ExplainAnswer> + Send;
    fn quarantine(&self) -> impl Future<Output = Result<QuarantineList, String>> + Send;
    fn retry_held(&self, request: RetryRequest) -> impl Future<Output = Result<QuarantineAnswer, String>> + Send;
    fn heal(&self, request: HealRequest) -> impl Future<Output = Result<HealAnswer, String>> + Send;
    /// Compares existing rows, or mends them. Events until it is done; dropping the receiver ends
    /// it.
    fn reconcile(self: Arc<Self>, request: VerifyRequest, mend: bool) -> Result<mpsc::Receiver<Event>, String>;
    fn discard_held(&self, request: DiscardRequest) -> impl Future<Output = Result<QuarantineAnswer, String>> + Send;
    fn strays(&self) -> impl Future<Output = Result<StrayList, String>> + Send;
    fn acknowledge_strays(
        &self,
        request: AcknowledgeStraysRequest,
    ) -> impl Future<Output = Result<AcknowledgedStrays, String>> + Send;
    fn acknowledge(&self, request: AcknowledgeRequest) -> impl Future<Output = Result<Recorded, String>> + Send;
    fn record_statistics(&self) -> impl Future<Output = Result<Recorded, String>> + Send;
    fn backfill(&self) -> BackfillAnswer;
    fn start_backfill(&self, request: BackfillRequest) -> impl Future<Output = Result<BackfillAnswer, String>> + Send;
    fn cancel_backfill(
        &self,
        request: BackfillCancelRequest,
    ) -> impl Future<Output = Result<BackfillAnswer, String>> + Send;
}

/// Serves until `stop`.
pub async fn serve<O: Operations>(
    listener: TcpListener,
    operations: Arc<O>,
    metrics: PrometheusHandle,
    token: Option<Secret>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let guarded = Router::new()
        .route("/metrics", get(move || async move { metrics.render() }))
        .route("/api/v1/status", get(status::<O>))
        .route("/api/v1/reload", post(reload::<O>))
        .route("/api/v1/switchover", get(history::<O>).post(switchover::<O>))
        .route("/api/v1/complete", post(complete::<O>))
        .route("/api/v1/wait", get(wait::<O>))
        .route("/api/v1/shadows", get(shadows::<O>))
        .route("/api/v1/shadows/plans", get(plans::<O>))
        .route("/api/v1/explain", get(explain::<O>))
        .route("/api/v1/verify", post(verify::<O>))
        .route("/api/v1/repair", post(repair::<O>))
        .route("/api/v1/quarantine", get(quarantine::<O>))
        .route("/api/v1/quarantine/retry", post(retry_held::<O>))
        .route("/api/v1/quarantine/discard", post(discard_held::<O>))
        .route("/api/v1/strays", get(strays::<O>))
        .route("/api/v1/strays/acknowledge", post(acknowledge_strays::<O>))
        .route("/api/v1/mismatches/acknowledge", post(acknowledge::<O>))
        .route("/api/v1/mismatches/statistics", post(record_statistics::<O>))
        .route("/api/v1/schema/heal", post(heal::<O>))
        .route("/api/v1/backfill", get(backfill::<O>).post(start_backfill::<O>))
        .route("/api/v1/backfill/cancel", post(cancel_backfill::<O>))
        .route_layer(middleware::from_fn_with_state(token, authorize));
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready::<O>))
        .merge(guarded)
        .with_state(operations);
    axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>())
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

/// Who is recorded as having asked: whoever they say they are, else where they asked from.
fn named(said: Option<String>, peer: SocketAddr) -> String {
    said.filter(|name| !name.trim().is_empty())
        .unwrap_or_else(|| format!("admin API from {}", peer.ip()))
}

async fn authorize(State(token): State<Option<Secret>>, request: Request, next: Next) -> Response {
    let Some(token) = token else {
        return next.run(request).await;
    };
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    if given.is_some_and(|given| bool::from(given.ct_eq(token.expose().as_bytes()))) {
        next.run(request).await
    } else {
        failure(StatusCode::UNAUTHORIZED, "the admin token is missing or wrong".into())
    }
}

async fn ready<O: Operations>(State(operations): State<Arc<O>>) -> Response {
    match operations.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn status<O: Operations>(State(operations): State<Arc<O>>) -> Json<Status> {
    Json(operations.status().await)
}

#[derive(Deserialize)]
struct ReloadQuery {
    /// Also where it ends the way back.
    #[serde(default)]
    yes: bool,
}

async fn reload<O: Operations>(State(operations): State<Arc<O>>, Query(query): Query<ReloadQuery>) -> Response {
    match operations.reload(query.yes).await {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn switchover<O: Operations>(
    State(operations): State<Arc<O>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Json(mut request): Json<SwitchoverRequest>,
) -> Response {
    request.by = Some(named(request.by, peer));
    let dry_run = request.dry_run;
    match operations.switchover(request).await {
        Ok(answer) if answer.done || dry_run => Json(answer).into_response(),
        Ok(answer) => (StatusCode::CONFLICT, Json(answer)).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn strays<O: Operations>(State(operations): State<Arc<O>>) -> Response {
    match operations.strays().await {
        Ok(list) => Json(list).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn acknowledge_strays<O: Operations>(
    State(operations): State<Arc<O>>,
    Json(request): Json<AcknowledgeStraysRequest>,
) -> Response {
    match operations.acknowledge_strays(request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn acknowledge<O: Operations>(
    State(operations): State<Arc<O>>,
    Json(request): Json<AcknowledgeRequest>,
) -> Response {
    answer_recorded(operations.acknowledge(request).await)
}

async fn record_statistics<O: Operations>(State(operations): State<Arc<O>>) -> Response {
    answer_recorded(operations.record_statistics().await)
}

fn answer_recorded(answer: Result<Recorded, String>) -> Response {
    match answer {
        Ok(recorded) => Json(recorded).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn complete<O: Operations>(State(operations): State<Arc<O>>) -> Response {
    match operations.complete().await {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn history<O: Operations>(State(operations): State<Arc<O>>) -> Response {
    match operations.history().await {
        Ok(history) => Json(history).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

#[derive(Deserialize)]
struct WaitQuery {
    timeout_ms: u64,
}

async fn wait<O: Operations>(State(operations): State<Arc<O>>, Query(query): Query<WaitQuery>) -> Response {
    match operations.wait_caught_up(Duration::from_millis(query.timeout_ms)).await {
        Ok(answer) if answer.caught_up => Json(answer).into_response(),
        Ok(answer) => (StatusCode::REQUEST_TIMEOUT, Json(answer)).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn shadows<O: Operations>(State(operations): State<Arc<O>>) -> Json<ShadowsAnswer> {
    Json(operations.shadows())
}

#[derive(Deserialize)]
struct PlansQuery {
    fingerprint: String,
}

async fn plans<O: Operations>(State(operations): State<Arc<O>>, Query(query): Query<PlansQuery>) -> Response {
    match operations.plans(&query.fingerprint).await {
        Ok(plans) => Json(plans).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

#[derive(Deserialize)]
struct ExplainQuery {
    sql: String,
}

async fn explain<O: Operations>(State(operations): State<Arc<O>>, Query(query): Query<ExplainQuery>) -> Response {
    Json(operations.explain(&query.sql).await).into_response()
}

async fn verify<O: Operations>(State(operations): State<Arc<O>>, Json(request): Json<VerifyRequest>) -> Response {
    lines(operations.reconcile(request, false))
}

async fn repair<O: Operations>(
    State(operations): State<Arc<O>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Json(mut request): Json<VerifyRequest>,
) -> Response {
    request.actor = Some(named(request.actor, peer));
    lines(operations.reconcile(request, true))
}

/// A body that grows as events come.
fn lines(events: Result<mpsc::Receiver<Event>, String>) -> Response {
    let events = match events {
        Ok(events) => events,
        Err(why) => return failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    };
    let lines = futures_util::stream::unfold(events, |mut events| async {
        let mut line = serde_json::to_vec(&events.recv().await?).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, Infallible>(line), events))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

async fn quarantine<O: Operations>(State(operations): State<Arc<O>>) -> Response {
    match operations.quarantine().await {
        Ok(list) => Json(list).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn retry_held<O: Operations>(State(operations): State<Arc<O>>, Json(request): Json<RetryRequest>) -> Response {
    answer_held(operations.retry_held(request).await)
}

async fn discard_held<O: Operations>(
    State(operations): State<Arc<O>>,
    Json(request): Json<DiscardRequest>,
) -> Response {
    answer_held(operations.discard_held(request).await)
}

async fn heal<O: Operations>(
    State(operations): State<Arc<O>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Json(mut request): Json<HealRequest>,
) -> Response {
    request.actor = Some(named(request.actor, peer));
    match operations.heal(request).await {
        Ok(answer) if answer.done => Json(answer).into_response(),
        Ok(answer) => (StatusCode::CONFLICT, Json(answer)).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

fn answer_held(answer: Result<QuarantineAnswer, String>) -> Response {
    match answer {
        Ok(answer) if answer.done => Json(answer).into_response(),
        Ok(answer) => (StatusCode::CONFLICT, Json(answer)).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

async fn backfill<O: Operations>(State(operations): State<Arc<O>>) -> Json<BackfillAnswer> {
    Json(operations.backfill())
}

async fn start_backfill<O: Operations>(
    State(operations): State<Arc<O>>,
    Json(request): Json<BackfillRequest>,
) -> Response {
    answer_backfill(operations.start_backfill(request).await)
}

async fn cancel_backfill<O: Operations>(
    State(operations): State<Arc<O>>,
    Json(request): Json<BackfillCancelRequest>,
) -> Response {
    answer_backfill(operations.cancel_backfill(request).await)
}

fn answer_backfill(answer: Result<BackfillAnswer, String>) -> Response {
    match answer {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => failure(StatusCode::UNPROCESSABLE_ENTITY, why),
    }
}

fn failure(code: StatusCode, error: String) -> Response {
    (code, Json(Failure { error })).into_response()
}
