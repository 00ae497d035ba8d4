//! The statements of the store, one set for each database.
//!
//! Both sets take the same parameters and answer with the same columns. Lists travel as one JSON parameter, so a
//! statement is the same for one row and for ten thousand. Durations are in seconds.

/// How a database flushes.
#[derive(Debug)]
pub(crate) enum Flush {
    /// In one round trip.
    AtOnce(&'static str),
    /// Statement by statement, where a statement costs no round trip. $1 events, in their order; $2 … $8 what they share.
    InSteps { insert_events: &'static str },
}

/// How a database stores reports.
#[derive(Debug)]
pub(crate) enum Settle {
    /// In one round trip. $1 leases, each with what comes next in its lane; $2 finished deliveries, each with the index of
    /// its lease. Returns the index of each lease that is held, and `done`: false if a commit holds the lane at this
    /// moment. A delivery that is gone already is not moved and not subtracted from its lane.
    AtOnce(&'static str),
    /// Statement by statement, where a statement costs no round trip.
    InSteps(SettleSteps),
}

#[derive(Debug)]
pub(crate) struct SettleSteps {
    /// $1 finished deliveries. Returns those that were still there: a report that is stored twice counts once.
    pub(crate) delete_deliveries: &'static str,

    /// $1 finished deliveries. A replayed delivery replaces its history.
    pub(crate) insert_delivered: &'static str,

    /// $1 finished deliveries.
    pub(crate) insert_dead_letters: &'static str,

    /// $1 reports of lanes that are held.
    pub(crate) advance_lanes: &'static str,

    /// $1 reports of lanes that are held.
    pub(crate) delete_empty_lanes: &'static str,
}

/// The statements of one database.
#[derive(Debug)]
pub(crate) struct Sql {
    pub(crate) schema_version: &'static str,
    pub(crate) generation: &'static str,
    pub(crate) instance: &'static str,
    pub(crate) bump_generation: &'static str,
    pub(crate) subscriptions: &'static str,

    /// Everything at once: $1 events, $2 matches (index of the event, subscription, key), $3 generation, $4 … $10 what the events share. Returns the number of events, 0 if the generation is
    /// old, and what a `CommitId` consists of.
    pub(crate) flush: Flush,

    /// $1 deliveries. Due after the wait of their events, or before if it is a head start; the later of it and
    /// `not_before` counts.
    pub(crate) insert_deliveries: &'static str,

    /// $1 lanes with the number of their new deliveries. A lane that exists keeps its due time: it may be leased, backing
    /// off, or waiting for a delayed event. A new one is due with its first delivery (primary key). Its token starts at
    /// random: a lane that was deleted and came back must not repeat the tokens of its former life, or a late result from
    /// then would pass the fence.
    pub(crate) upsert_lanes: &'static str,

    /// $1 subscription, $2 keys. After a backfill: what it put before a delayed delivery does not wait for it. Lanes that a
    /// worker has tried keep their lease or backoff.
    pub(crate) due_with_head: &'static str,

    /// $1 subscription: seconds until its next lane is due, negative if it is, and the state of its circuit; nothing if it
    /// is paused. Asked before a claim, so that an idle poll takes no write lock. Index: outbox_lanes_due.
    pub(crate) next_due: &'static str,

    /// $1 subscription, $2 lanes, $3 lease, $4 worker, $5 whether this is the probe of an open circuit, $6 attempts to count:
    /// 1, or 0 for a relay, whose claim is no attempt. Index: outbox_lanes_due.
    pub(crate) claim: &'static str,

    /// $1 subscription, $2 seconds until another may probe if this one tells nothing. One caller wins.
    pub(crate) take_probe: &'static str,

    /// $1 subscription, $2 seconds until the next probe, $3 failures to count.
    pub(crate) open_circuit: &'static str,

    /// $1 subscription.
    pub(crate) close_circuit: &'static str,

    /// $1 subscription, $2 keys, $3 run. `queued` is the position, also where the event is missing. Index: primary key of the deliveries; `cross join` holds the planner to it, which
    /// otherwise reads all deliveries of the subscription.
    pub(crate) runs: &'static str,

    /// $1 reports. The lanes whose lease is still held: neither taken over nor ended by its holder.
    pub(crate) held: &'static str,

    /// $1 subscription, $2 key, $3 token, $4 log: of a lane whose lease is held.
    pub(crate) note_attempt: &'static str,

    /// After `keep` the lease goes on; after `retry` the head waits; after `yield` and `release` the lane is due with its
    /// next delivery; after `hold` it is not due until an operator decides. A lane without deliveries is deleted.
    pub(crate) settle: Settle,

    /// $1 lanes, $2 lease, $3 worker. Hands leases over with a new token and counts the attempt. Returns the lanes whose
    /// lease was still held.
    pub(crate) take_over: &'static str,

    /// $1 lanes, $2 lease. Returns the lanes whose lease was still held.
    pub(crate) renew: &'static str,

    /// $1 name.
    pub(crate) subscription_by_name: &'static str,

    /// $1 name, $2 filter, $3 ordering, $4 first position of the backfill.
    pub(crate) insert_subscription: &'static str,

    /// $1 id, $2 filter, $3 ordering.
    pub(crate) update_subscription: &'static str,

    /// The names of subscriptions that a flush which is still under way may not know in their present form.
    pub(crate) unsettled_subscriptions: &'static str,

    /// $1 subscription: the events that such a flush may have written.
    pub(crate) missed_events: &'static str,

    /// $1 subscription: whether no such flush can be left. Asked before the events are read, so that what commits
    /// later is found the next time.
    pub(crate) settle_subscription: &'static str,

    /// $1 subscription.
    pub(crate) forget_change: &'static str,

    /// $1 name.
    pub(crate) pause: &'static str,

    /// $1 name.
    pub(crate) resume: &'static str,

    /// $1 subscription; one after another.
    pub(crate) remove: &'static [&'static str],

    /// What a flush that did not know of the removal has written for a subscription that is gone.
    pub(crate) remove_orphans: &'static [&'static str],

    /// The first position at or after time $1. Index: outbox_events_recorded.
    pub(crate) first_position_since: &'static str,

    /// $1 first position, $2 number.
    pub(crate) events_from: &'static str,

    /// $1 subscription, $2 first position; null ends the backfill.
    pub(crate) set_backfill: &'static str,

    /// $1 subscription, $2 positions: those that have a delivery, a history or a dead letter already.
    pub(crate) positions_known: &'static str,

    /// $1 consumer, $2 event id.
    pub(crate) inbox_insert: &'static str,

    /// $1 worker, $2 subscriptions.
    pub(crate) heartbeat: &'static str,

    /// $1 seconds.
    pub(crate) forget_workers: &'static str,

    /// $1 worker.
    pub(crate) forget_worker: &'static str,
    pub(crate) workers: &'static str,
    pub(crate) status: &'static str,

    /// $1 subscription: finished deliveries of each of the last seven days, `days_ago` 0 for today.
    pub(crate) activity: &'static str,

    /// $1 subscription, $2 whether leased, $3 number, $4 position of one event or null. A lease is on a lane's head.
    pub(crate) list_unfinished: &'static str,

    /// $1 subscription, $2 number, $3 position of one event or null.
    pub(crate) list_delivered: &'static str,

    /// $1 subscription, $2 number, $3 position of one event or null.
    pub(crate) list_dead: &'static str,

    /// $1 event id.
    pub(crate) position_of: &'static str,
}
