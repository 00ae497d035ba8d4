//! The statements of the store, one set for each database.
//!
//! Both sets take the same parameters and answer with the same columns. Lists travel as one JSON parameter, so a
//! statement is the same for one row and for ten thousand. Durations are in seconds.

/// How a database flushes.
#[derive(Debug)]
pub(crate) enum Flush {
    /// In one round trip: the events with a mark each, and nothing else. Both take what the events share as $1 … $7. `many`:
    /// $8 events. `one`: then the columns of the event. Return of each event in their order its position, when it was
    /// recorded and when it is due, and what a `CommitId` consists of.
    Marked { one: &'static str, many: &'static str },
    /// Statement by statement, where a statement costs no round trip, and routed by the same transaction. $1 events, in their
    /// order; $2 … $8 what they share.
    /// `insert_marks`: $1 positions; what waits before them is too much for a request.
    Routed { insert_events: &'static str, insert_marks: &'static str },
}

/// How a database routes.
#[derive(Debug)]
pub(crate) enum Route {
    /// In one statement, beside others who do the same.
    AtOnce(RouteStatements),
    /// Statement by statement, where a write transaction excludes all others. $1 positions: takes their marks away.
    InSteps { take_marks: &'static str },
}

#[derive(Debug)]
pub(crate) struct RouteStatements {
    /// As `unrouted`, with whole events: for a process that takes new lanes, and would read them afterwards. The payload is
    /// null if it has more than 4 KiB.
    pub(crate) unrouted_whole: &'static str,

    /// $1 generation; $2 events, each with its due time in seconds; $3 lanes, numbered and sorted; $4 deliveries, each with
    /// the number of its lane; $5 who would lease new lanes; $6 floor, $7 last position and $8 number of the events: whether
    /// there are other marks in between is looked for, unless the number is null. One row: the current `generation`; whether the row of
    /// `outbox_meta` was `locked`, and the marks were `complete`: nothing is routed otherwise; how many were `taken`;
    /// `leased`, the new lanes with their tokens; `others`, the subscriptions of which other lanes have changed.
    pub(crate) route: &'static str,

    /// The same for one event: $1 generation; $2 its position; $3 its due time; $4 lanes, each with its token and who would
    /// lease it if it is new; $5 floor, null if no other mark is looked for. Answers like `route`, in a row for each lane
    /// and one at least.
    pub(crate) route_one: &'static str,

    /// $1 lanes: those that somebody has locked.
    pub(crate) held_lanes: &'static str,

    /// $1 positions: those whose marks somebody has locked.
    pub(crate) held_marks: &'static str,

    /// The transactions that may still store events with positions they have drawn.
    pub(crate) writers: &'static str,

    /// Ends the sessions of this role that have been at routing for 3 s: a statement whose client is frozen.
    pub(crate) end_stuck: &'static str,
}

/// A page of events in one order of parameters, by what is found through an index: $1 event type, $2 aggregate type, $3
/// aggregate id, $4 tenant, $5 kind of the actor, $6 and $7 from when to before when they were stored, $8 the position
/// they come before, each null for any; $9 number.
#[derive(Debug)]
pub(crate) struct ListEvents {
    pub(crate) of_aggregate: &'static str,
    pub(crate) of_type: &'static str,
    pub(crate) of_tenant: &'static str,
    pub(crate) of_all: &'static str,
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
}

/// The statements of one database.
#[derive(Debug)]
pub(crate) struct Sql {
    pub(crate) schema_version: &'static str,

    /// Changes nothing, and has to be written.
    pub(crate) write_the_same: &'static str,
    /// The generation, and `waits`: whether there may be events that are not routed.
    pub(crate) generation: &'static str,
    pub(crate) instance: &'static str,

    /// The generation, with the lock that routing takes: nothing is routed until the transaction ends. Where a write
    /// transaction excludes all others anyway there is none.
    pub(crate) lock_generation: Option<&'static str>,

    /// To another value, which it has never had: it is compared for equality only.
    pub(crate) bump_generation: &'static str,

    /// $1 version of the tables. For tables that were emptied: a generation that no process has a copy of.
    pub(crate) restore_meta: &'static str,
    pub(crate) subscriptions: &'static str,

    pub(crate) flush: Flush,

    /// $1 floor, $2 number: the marks that are next in the order of positions, with what matching needs of their events and
    /// the current generation. A mark whose event is gone has nothing else. Index: primary key, outbox_unrouted_rare.
    pub(crate) unrouted: &'static str,

    /// $1 position they come after, $2 number: the same of events that are looked for before it is their turn. Index:
    /// outbox_unrouted_rare.
    pub(crate) unrouted_ahead: &'static str,

    /// $1 floor: the last mark. Index: primary key.
    pub(crate) last_unrouted: &'static str,

    /// $1 floor, $2 last position: a mark in between, if there is one. Index: primary key.
    pub(crate) unrouted_until: &'static str,

    pub(crate) route: Route,

    /// How many events wait, up to a million, how many were set aside, and the age of the oldest in seconds.
    pub(crate) count_unrouted: &'static str,

    /// $1 position. Nothing if the event is routed.
    pub(crate) unrouted_mark: &'static str,

    /// $1 the position they come before or null, $2 number. Index: outbox_unrouted_rare.
    pub(crate) list_set_aside: &'static str,

    /// $1 positions, or null for all that were set aside; so does the next.
    pub(crate) put_back: &'static str,
    pub(crate) discard_set_aside: &'static str,

    /// $1 position, $2 error. The mark stays, for an operator.
    pub(crate) set_aside: &'static str,

    /// $1 deliveries, of a backfill or a replay: they come before what is routed, in the order of their positions, since what
    /// routing draws for `seq` begins at 2^40. Due after the wait of their events, or before if it is a head start; the later of it and
    /// `not_before` counts. An event whose time somebody broke is due from now.
    pub(crate) insert_deliveries: &'static str,

    /// $1 lanes with the number of their new deliveries. A lane that exists keeps its due time: it may be leased, backing
    /// off, or waiting for a delayed event. A new one is due with its first delivery (primary key). Its token starts at
    /// random: a lane that was deleted and came back must not repeat the tokens of its former life, or a late result from
    /// then would pass the fence.
    pub(crate) upsert_lanes: &'static str,

    /// $1 subscription, $2 keys. After a backfill: what it put before a delayed delivery does not wait for it. Lanes that a
    /// worker has tried keep their lease or backoff.
    pub(crate) due_with_head: &'static str,

    /// $1 subscriptions: for each, seconds until its next lane is due, negative if it is, and the state of its circuit;
    /// nothing of one that is paused. Asked before a claim, so that an idle poll takes no write lock. Index:
    /// outbox_lanes_due.
    pub(crate) next_due: &'static str,

    /// $1 what is wanted: of each subscription how many lanes, whether this is the probe of an open circuit, and due time and
    /// key of the lane after which to begin: null for the first. $2 lease, $3 worker, $4 attempts to count: 1, or 0 for a
    /// relay, whose claim is no attempt. The last lane of each subscription comes with the due time it had, `was_due_at`.
    /// SQLite takes the first row only, and always begins with the first lane: a claim leaves nothing behind in the index.
    /// Index: outbox_lanes_due.
    pub(crate) claim: &'static str,

    /// $1 subscription, $2 the tenant after which to begin, $3 tenants that are passed, $4 lanes, $5 lease, $6 worker. A lane
    /// that is due of each of the next hundred tenants, until there are as many. Index: outbox_lanes_tenant.
    pub(crate) claim_others: &'static str,

    /// $1 subscription, $2 seconds until another may probe if this one tells nothing. One caller wins.
    pub(crate) take_probe: &'static str,

    /// $1 of each subscription how many seconds are to be reserved, and how far ahead anybody reserves at most. What is
    /// further ahead is from before the clock stepped back. Returns after how many seconds the reserved ones begin.
    pub(crate) reserve: &'static str,

    /// $1 subscription, $2 seconds until the next probe, $3 failures to count.
    pub(crate) open_circuit: &'static str,

    /// $1 subscription.
    pub(crate) close_circuit: &'static str,

    /// $1 lanes, each with its run, $2 bytes, $3 the longest run: the first delivery of each lane, then the second of each,
    /// until the payloads of a subscription are as large; one at least. `queued` is the position, also where the event is
    /// missing. Index: primary key of the deliveries; `cross join` holds the planner to it, which otherwise reads all
    /// deliveries of the subscription.
    pub(crate) runs: &'static str,

    /// $1 reports. The lanes whose lease is still held by its worker: neither taken over nor ended. So with all that fences:
    /// the token alone may come again after a failover that has lost claims, for another worker.
    pub(crate) held: &'static str,

    /// $1 lanes with their attempt logs. Returns the lanes whose lease was still held.
    pub(crate) note_attempts: &'static str,

    /// After `keep` the lease goes on; after `retry` the head waits; after `yield` and `release` the lane is due with its
    /// next delivery; after `hold` it is not due until an operator decides. A lane without deliveries is deleted.
    pub(crate) settle: Settle,

    /// $1 lanes, $2 lease, $3 worker. Hands leases of relays over with a new token and counts the attempt. Returns the
    /// lanes whose lease was still a relay's.
    pub(crate) take_over: &'static str,

    /// $1 lanes. Those whose lease is still a relay's.
    pub(crate) relayed: &'static str,

    /// $1 lanes, $2 lease. Returns the lanes whose lease was still held.
    pub(crate) renew: &'static str,

    /// $1 name.
    pub(crate) subscription_by_name: &'static str,

    /// $1 name, $2 filter, $3 ordering, $4 and $5 first and last position of the backfill; null if there is none.
    pub(crate) insert_subscription: &'static str,

    /// $1 id, $2 filter, $3 ordering.
    pub(crate) update_subscription: &'static str,

    /// $1 name, of one that is not paused.
    pub(crate) pause: &'static str,

    /// $1 name, of one that is paused.
    pub(crate) resume: &'static str,

    /// $1 subscription. What it leaves is swept.
    pub(crate) remove: &'static str,

    /// Subscriptions that are gone and have left something.
    pub(crate) orphans: &'static str,

    /// $1 subscription, $2 number: each deletes so many rows that it has left.
    pub(crate) sweep: &'static [&'static str],

    /// The first position at or after time $1. Index: outbox_events_recorded.
    pub(crate) first_position_since: &'static str,

    /// $1 subscription, $2 first position; null ends the backfill.
    pub(crate) set_backfill: &'static str,

    /// $1 subscription, $2 positions: those that have a delivery, a history or a dead letter already.
    pub(crate) positions_known: &'static str,

    /// $1 consumer, $2 event id.
    pub(crate) inbox_insert: &'static str,

    /// As above, $3 milliseconds that the transaction may be idle for from then on, where that is for the server to say.
    pub(crate) inbox_insert_within: Option<&'static str>,

    /// $1 worker, $2 subscriptions. Returns the time.
    pub(crate) heartbeat: &'static str,

    /// $1 seconds.
    pub(crate) forget_workers: &'static str,

    /// $1 worker.
    pub(crate) forget_worker: &'static str,
    pub(crate) workers: &'static str,

    /// $1 where to stop counting what is delivered.
    pub(crate) status: &'static str,

    /// Deliveries at the head of their key that wait for longer than a delay of their event, or a day after a failure,
    /// explains: of each subscription how many, up to 1,000, and how many seconds at most. Index: outbox_lanes_due.
    pub(crate) postponed: &'static str,

    /// $1 subscription: locks the lanes that wait, and that nobody has leased. In the order of routing.
    pub(crate) lock_waiting: &'static str,

    /// $1 subscription, $2 keys of lanes that are locked: their deliveries are due when the delays of their events say so.
    pub(crate) due_as_asked: &'static str,

    /// $1 subscription, $2 keys: lanes are due with their heads.
    pub(crate) due_with_heads: &'static str,

    /// $1 subscription: finished deliveries of each of the last seven days, `days_ago` 0 for today.
    pub(crate) activity: &'static str,

    /// $1 subscription, $2 whether leased, $3 number: the newest positions. A lease is on a lane's head.
    pub(crate) newest_unfinished: &'static str,

    /// $1 subscription, $2 number: the newest positions.
    pub(crate) newest_delivered: &'static str,

    /// $1 subscription, $2 number: the newest positions.
    pub(crate) newest_dead: &'static str,

    /// $1 subscription, $2 whether leased, $3 newest position, $4 number.
    pub(crate) list_unfinished: &'static str,

    /// $1 subscription, $2 newest position, $3 number.
    pub(crate) list_delivered: &'static str,

    /// $1 subscription, $2 newest position, $3 number.
    pub(crate) list_dead: &'static str,

    pub(crate) list_events: ListEvents,

    /// $1 event id.
    pub(crate) event_by_id: &'static str,

    /// $1 event id. A row if it is there, whatever else is in it.
    pub(crate) event_exists: &'static str,

    /// $1 position, $2 subscription or null. Of each subscription all that says where this event stands, as of one moment.
    pub(crate) standing: &'static str,

    /// $1 ids, $2 subscription, $3 event type, $4 and $5 from when to before when they died, each null for any; $6 the id
    /// they come before or null, $7 number.
    pub(crate) list_dead_letters: &'static str,

    /// $1 … $5 as above.
    pub(crate) count_dead_letters: &'static str,

    /// $1 … $5 as above, $6 the id they come after, $7 the last id, $8 number.
    pub(crate) next_dead_letters: &'static str,
    pub(crate) last_dead_letter: &'static str,

    /// $1 subscriptions. Held until the transaction ends: one replay, backfill or removal of a subscription at a time.
    pub(crate) lock_subscriptions: &'static str,

    /// $1 ids, $2 whether only those whose event is there.
    pub(crate) take_dead_letters: &'static str,

    /// $1 deliveries. In the order of routing.
    pub(crate) lock_lanes: &'static str,

    /// $1 deliveries: lanes that one of them held up are due with what comes next.
    pub(crate) release_lanes: &'static str,

    /// $1 lanes. Deletes those that have nothing left and are not held.
    pub(crate) delete_empty_lanes: &'static str,

    /// $1 deliveries: where one of them is the head now, attempts start again, at once. Leases are left alone.
    pub(crate) restart_lanes: &'static str,

    pub(crate) last_position: &'static str,

    /// What is compared with what the outbox counts on.
    pub(crate) checkup: Option<&'static str>,

    /// $1 position they come after, $2 last position, $3 event type or null, $4 number.
    pub(crate) next_positions: &'static str,

    /// $1 event ids.
    pub(crate) positions_of: &'static str,

    /// $1 positions: those that are routed. What retention waits for. Without payloads.
    pub(crate) lock_events: &'static str,

    /// $1 subscription, $2 positions.
    pub(crate) positions_unfinished: &'static str,

    /// $1 subscription, $2 positions.
    pub(crate) take_delivered: &'static str,

    /// $1 subscription, $2 positions.
    pub(crate) take_dead_letters_at: &'static str,

    /// $1 actor, $2 action, $3 target, $4 details.
    pub(crate) insert_audit: &'static str,

    /// $1 id, $2 details.
    pub(crate) update_audit: &'static str,

    /// $1 number.
    pub(crate) list_audit: &'static str,

    /// $1 action, $2 target: the details, the oldest first. Few: the table has what operators do.
    pub(crate) definitions: &'static str,

    /// $1 rules, the first that fits an event counts; $2 the shortest time of a rule; $3 the time they are not older than;
    /// $4 number. Events that nobody needs any more, the oldest first. Index: outbox_events_recorded.
    pub(crate) old_events: &'static str,

    /// $1 rules, $2 positions: those that still are old, as of now, when they are locked.
    pub(crate) still_old: &'static str,

    /// $1 positions; so do the next two.
    pub(crate) archive_events: &'static str,
    pub(crate) purge_delivered: &'static str,
    pub(crate) purge_events: &'static str,

    /// $1 seconds, $2 number. What belongs to events that are still here stays: they may be delivered again.
    pub(crate) purge_inbox: &'static str,
}
