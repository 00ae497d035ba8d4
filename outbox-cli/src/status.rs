use std::fmt::Write;

use outbox_seaorm::{Outbox, SubscriptionStatus};

use crate::{
    Answer,
    output::{Output, or_dash, table},
};

pub(crate) async fn status(outbox: &Outbox) -> Answer {
    let status = outbox.status().await?;
    let head = ["subscription", "pending", "leased", "delivered", "dead", "oldest", "last error"];
    let rows = status.subscriptions.iter().map(|each| {
        [
            name(each),
            each.pending.to_string(),
            each.leased.to_string(),
            each.delivered.to_string(),
            each.dead.to_string(),
            or_dash(each.oldest_pending_age_seconds.map(|age| format!("{age:.1} s"))),
            or_dash(each.last_error.as_ref()),
        ]
    });
    let mut text = table(head, rows);
    let unrouted = &status.unrouted;
    if unrouted.waiting > 0 {
        let alive = status.workers.iter().any(outbox_seaorm::WorkerStatus::is_alive);
        let why = if alive { "" } else { ": no worker is running" };
        let _ = writeln!(text, "{} events are not routed yet{why}", unrouted.waiting);
    }
    if unrouted.set_aside > 0 {
        let _ = writeln!(text, "{} events could not be routed: outbox unrouted", unrouted.set_aside);
    }
    for worker in &status.workers {
        let seen = worker.last_seen_seconds;
        let _ = writeln!(text, "worker {}, seen {seen:.0} s ago: {}", worker.id, worker.subscriptions.join(", "));
    }
    Ok(Output::new(text, status))
}

fn name(each: &SubscriptionStatus) -> String {
    let paused = each.paused.then_some("paused");
    let circuit = (each.circuit != "closed").then(|| format!("circuit {}", each.circuit));
    let notes: Vec<String> = paused.map(str::to_owned).into_iter().chain(circuit).collect();
    if notes.is_empty() { each.name.clone() } else { format!("{} ({})", each.name, notes.join(", ")) }
}
