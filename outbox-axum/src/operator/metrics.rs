//! `/metrics`: the counters of this process, and gauges that are read from the database when they are asked for.

use std::{fmt::Write, sync::OnceLock, time::Duration};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::header::CONTENT_TYPE;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use outbox_seaorm::{Outbox, SubscriptionStatus};

use super::refusal::Refusal;

const LATENCY: &str = "outbox_publish_latency_seconds";
const BUCKETS: [f64; 15] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0];

/// How often samples that nobody asks for are added up.
const UPKEEP: Duration = Duration::from_secs(5);

/// A worker that was not seen for this long is not counted.
const SEEN_WITHIN: f64 = 15.0;

/// Counts from here on, unless the application has a recorder of its own: then the counters are there.
pub(super) fn install() -> Option<&'static PrometheusHandle> {
    static INSTALLED: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        let builder = builder.set_buckets_for_metric(Matcher::Full(LATENCY.to_owned()), &BUCKETS).ok()?;
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).ok()?;
        describe();
        let upkeep = handle.clone();
        let upkeep = move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        };
        std::thread::Builder::new().name("outbox-metrics".to_owned()).spawn(upkeep).ok()?;
        Some(handle)
    });
    installed.as_ref()
}

fn describe() {
    for (counter, text) in [
        ("outbox_events_recorded_total", "Events that were committed."),
        ("outbox_events_routed_total", "Events that this process has routed to subscriptions."),
        ("outbox_delivery_attempts_total", "Attempts that were begun."),
        ("outbox_messages_published_total", "Deliveries that succeeded."),
        ("outbox_publish_errors_total", "Attempts that failed, by outcome."),
        ("outbox_operator_logins_refused_total", "Requests to the operators' listener with a wrong token."),
        ("outbox_superseded_total", "Results that were dropped because their lease was lost."),
    ] {
        metrics::describe_counter!(counter, text);
    }
    metrics::describe_histogram!(LATENCY, "From the commit of an event to its delivery.");
}

pub(super) async fn metrics(State(outbox): State<Outbox>) -> Result<Response, Refusal> {
    let (subscriptions, workers) = (outbox.backlog().await?, outbox.workers().await?);
    let unrouted = outbox.unrouted().await?;
    let mut text = install().map(PrometheusHandle::render).unwrap_or_default();
    let mut gauge = |name: &str, help: &str, value: fn(&SubscriptionStatus) -> f64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        for each in &subscriptions {
            let _ = writeln!(text, "{name}{{subscription=\"{}\"}} {}", each.name, value(each));
        }
    };
    gauge("outbox_pending_messages", "Deliveries that are not finished.", |each| each.pending as f64);
    gauge("outbox_oldest_pending_age_seconds", "Age of the oldest event that is not delivered.", |each| {
        each.oldest_pending_age_seconds.unwrap_or(0.0)
    });
    gauge("outbox_dead_letters", "Deliveries that were given up.", |each| each.dead as f64);
    gauge("outbox_paused", "1 if an operator has paused the subscription.", |each| f64::from(u8::from(each.paused)));
    gauge("outbox_circuit_open", "1 if the destination is thought to be down.", |each| {
        f64::from(u8::from(each.circuit != "closed"))
    });
    let _ = writeln!(text, "# HELP outbox_workers Workers of the subscription that were seen within 15 seconds.");
    let _ = writeln!(text, "# TYPE outbox_workers gauge");
    for each in &subscriptions {
        let working = workers.iter().filter(|worker| worker.last_seen_seconds < SEEN_WITHIN);
        let working = working.filter(|worker| worker.subscriptions.contains(&each.name)).count();
        let _ = writeln!(text, "outbox_workers{{subscription=\"{}\"}} {working}", each.name);
    }
    for (name, help, value) in [
        ("outbox_unrouted_messages", "Events that no worker has routed to subscriptions yet.", unrouted.waiting as f64),
        (
            "outbox_oldest_unrouted_age_seconds",
            "Age of the oldest event that is not routed.",
            unrouted.oldest_age_seconds.unwrap_or(0.0),
        ),
        ("outbox_set_aside_messages", "Events that could not be routed.", unrouted.set_aside as f64),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    }
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
