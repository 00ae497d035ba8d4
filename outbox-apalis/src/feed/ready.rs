//! Which of the lanes that are ready comes next: tenants share the slots.
//!
//! A tenant with attempts under way comes behind those that have fewer. While there are several tenants, none takes the
//! last fifth of the slots: one whose attempts are slow, or who has very many, leaves room for others.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

/// So long another tenant is expected to come again.
const REMEMBERED: Duration = Duration::from_secs(60);

pub(crate) type Tenant = Option<Arc<str>>;

/// In the order in which they became ready, and by tenant. Lanes without one are those of one more tenant.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    tenants: BTreeMap<Tenant, Queue>,
    /// The tenant that was seen last, and the last other one.
    seen: [Option<(Tenant, Instant)>; 2],
    turns: u64,
}

#[derive(Debug, Default)]
struct Queue {
    /// Keys whose next delivery can start. One that was lost and claimed again may stand here twice.
    keys: VecDeque<String>,
    /// Attempts under way.
    running: usize,
    /// When one of them began last, counted in turns.
    turn: u64,
}

impl Ready {
    /// A lane of this tenant has come.
    pub(crate) fn sees(&mut self, tenant: &Tenant, now: Instant) {
        let [last, other] = &mut self.seen;
        if last.as_ref().is_none_or(|(seen, _)| seen != tenant) {
            std::mem::swap(last, other);
            *last = Some((tenant.clone(), now));
        } else if let Some((_, at)) = last {
            *at = now;
        }
    }

    /// How many slots of so many one tenant may take, and of how many its subscription allows.
    pub(crate) fn most_of_one(&self, slots: usize, allowed: usize, now: Instant) -> usize {
        let other_at = self.seen[1].as_ref().map(|(_, at)| *at);
        let are_several = other_at.is_some_and(|at| now.saturating_duration_since(at) < REMEMBERED);
        if are_several && slots > 1 { allowed.min(slots - (slots / 5).max(1)) } else { allowed }
    }

    /// A lane can start, behind those of its tenant that wait.
    pub(crate) fn push_back(&mut self, tenant: &Tenant, key: String) {
        self.queue(tenant).keys.push_back(key);
    }

    /// A lane can start, before those of its tenant that wait.
    pub(crate) fn push_front(&mut self, tenant: &Tenant, key: String) {
        self.queue(tenant).keys.push_front(key);
    }

    fn queue(&mut self, tenant: &Tenant) -> &mut Queue {
        if !self.tenants.contains_key(tenant) {
            self.tenants.insert(tenant.clone(), Queue::default());
        }
        self.tenants.get_mut(tenant).expect("it was just inserted")
    }

    /// The next one: of the tenant that has the fewest attempts under way, less than `most`; of several, of the one that
    /// has waited longest for its turn.
    pub(crate) fn pop(&mut self, most: usize) -> Option<String> {
        let waits = |queue: &&mut Queue| !queue.keys.is_empty() && queue.running < most;
        let queue = self.tenants.values_mut().filter(waits).min_by_key(|queue| (queue.running, queue.turn))?;
        self.turns += 1;
        queue.turn = self.turns;
        queue.keys.pop_front()
    }

    /// An attempt of this tenant has begun.
    pub(crate) fn begins(&mut self, tenant: &Tenant) {
        self.queue(tenant).running += 1;
    }

    /// An attempt of this tenant is over.
    pub(crate) fn ends(&mut self, tenant: &Tenant) {
        let queue = self.queue(tenant);
        queue.running -= 1;
        if queue.running == 0 && queue.keys.is_empty() {
            self.tenants.remove(tenant);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tenants.values().all(|queue| queue.keys.is_empty())
    }

    /// The keys, some of them perhaps twice.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &String> {
        self.tenants.values().flat_map(|queue| &queue.keys)
    }

    /// Those who have lanes here that cannot start yet: more of theirs are of no use now.
    pub(crate) fn crowd(&self) -> Vec<String> {
        let waiting = self.tenants.iter().filter(|(_, queue)| !queue.keys.is_empty());
        waiting.filter_map(|(tenant, _)| tenant.as_deref().map(str::to_owned)).collect()
    }

    #[cfg(test)]
    pub(crate) fn running(&self) -> usize {
        self.tenants.values().map(|queue| queue.running).sum()
    }

    pub(crate) fn clear(&mut self) {
        self.tenants.values_mut().for_each(|queue| queue.keys.clear());
        self.tenants.retain(|_, queue| queue.running > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        Some(name.into())
    }

    /// Starts all that may start; returns them.
    fn start(ready: &mut Ready, tenants: &BTreeMap<&str, Tenant>, most: usize, slots: usize) -> Vec<String> {
        let mut started = Vec::new();
        while started.len() < slots
            && let Some(key) = ready.pop(most)
        {
            ready.begins(&tenants[&key[..1]]);
            started.push(key);
        }
        started
    }

    #[test]
    fn without_tenants_lanes_come_in_their_order() {
        let mut ready = Ready::default();
        ["1", "2", "3"].into_iter().for_each(|key| ready.push_back(&None, key.to_owned()));
        ready.push_front(&None, "0".to_owned());
        ready.sees(&None, Instant::now());
        assert_eq!(ready.most_of_one(4, usize::MAX, Instant::now()), usize::MAX);
        let keys: Vec<String> = std::iter::from_fn(|| ready.pop(usize::MAX)).collect();
        assert_eq!(keys, ["0", "1", "2", "3"]);
        assert!(ready.is_empty() && ready.crowd().is_empty());
    }

    #[test]
    fn whoever_has_fewer_under_way_comes_first() {
        let mut ready = Ready::default();
        let tenants = BTreeMap::from([("a", tenant("a")), ("b", tenant("b")), ("c", None)]);
        for key in ["a1", "a2", "a3", "a4", "b1", "b2", "c1"] {
            ready.push_back(&tenants[&key[..1]], key.to_owned());
        }
        assert_eq!(start(&mut ready, &tenants, usize::MAX, 4), ["c1", "a1", "b1", "a2"]);
        assert_eq!(ready.crowd(), ["a", "b"]);
        ready.ends(&tenants["b"]);
        ready.push_back(&tenants["c"], "c2".to_owned());
        assert_eq!(start(&mut ready, &tenants, 2, 4), ["b2", "c2"], "two of one tenant at most");
        assert_eq!(ready.keys().collect::<Vec<_>>(), ["a3", "a4"]);
        ready.clear();
        assert!(ready.is_empty() && ready.crowd().is_empty());
        ["a", "a", "b", "c", "c"].into_iter().for_each(|name| ready.ends(&tenants[name]));
        assert!(ready.tenants.is_empty());
    }

    #[test]
    fn while_there_are_several_tenants_none_takes_the_last_slots() {
        let (mut ready, now) = (Ready::default(), Instant::now());
        ready.sees(&tenant("a"), now);
        assert_eq!(ready.most_of_one(10, 20, now), 20);
        ready.sees(&tenant("b"), now);
        ready.sees(&tenant("a"), now);
        assert_eq!([2, 9, 10].map(|slots| ready.most_of_one(slots, 20, now)), [1, 8, 8]);
        assert_eq!(ready.most_of_one(10, 3, now), 3);
        assert_eq!(ready.most_of_one(1, 20, now), 20, "nobody could start");
        ready.sees(&tenant("a"), now + REMEMBERED);
        assert_eq!(ready.most_of_one(10, 20, now + REMEMBERED), 20, "the other has gone");
    }
}
