//! The events of this process' commits, on their way to its router: it need not read them again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use outbox_core::RecordedEvent;

/// How many events wait here at most, and how large their payloads are together. The router finds the others by looking.
const MOST: usize = 2000;
const MOST_BYTES: usize = 4 << 20;

/// An event that is committed and perhaps not routed.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) event: RecordedEvent,
    /// In seconds, by the database's clock.
    pub(crate) due: f64,
}

#[derive(Debug, Default)]
pub(crate) struct Handed(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Whether there is a router that takes them.
    taken: bool,
    events: Vec<Committed>,
    bytes: usize,
    /// There may be events that are not among these.
    look: bool,
}

impl Handed {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this process has a router. The first one has it, until it is dropped.
    pub(crate) fn is_taken(&self) -> bool {
        self.state().taken
    }

    /// Whether the caller is the router that takes the events from now on.
    pub(crate) fn claim(&self) -> bool {
        !std::mem::replace(&mut self.state().taken, true)
    }

    pub(crate) fn give_up(&self) {
        *self.state() = State::default();
    }

    /// What is too much is found by looking.
    pub(crate) fn push(&self, events: Vec<Committed>) {
        let mut state = self.state();
        let bytes: usize = events.iter().map(|each| each.event.payload.len()).sum();
        let fits = state.events.len() + events.len() <= MOST && state.bytes + bytes <= MOST_BYTES;
        if state.taken && fits {
            state.bytes += bytes;
            state.events.extend(events);
        } else {
            state.look = true;
        }
    }

    /// Somebody else has committed, or it is not known who.
    pub(crate) fn look(&self) {
        self.state().look = true;
    }

    /// The oldest ones, `most` at most, and whether to look for others besides.
    pub(crate) fn take(&self, most: usize) -> (Vec<Committed>, bool) {
        let mut state = self.state();
        let number = state.events.len().min(most);
        let events: Vec<Committed> = state.events.drain(..number).collect();
        state.bytes -= events.iter().map(|each| each.event.payload.len()).sum::<usize>();
        (events, std::mem::take(&mut state.look))
    }

    /// Whether something has come since it was asked last.
    pub(crate) fn has_more(&self) -> bool {
        let state = self.state();
        state.look || !state.events.is_empty()
    }
}
