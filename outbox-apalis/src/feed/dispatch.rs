//! The cores of all subscriptions of a process, and what they want of the store together. It waits for nothing either.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use super::{
    calls::{Answer, Call, Kind},
    core::{Core, Moment},
    together::{Batch, Together},
};

#[derive(Default)]
pub(crate) struct Dispatch {
    cores: Vec<Option<Core>>,
    together: Together,
    /// To whom something has happened since it last said what it wants.
    touched: BTreeSet<usize>,
    /// When time alone changes what each wants.
    timeouts: BTreeSet<(Instant, usize)>,
    timeout_of: Vec<Option<Instant>>,
    /// Whose core has panicked: a bug, of which the others know nothing.
    broken: Vec<usize>,
}

impl Dispatch {
    /// A core begins.
    pub(crate) fn begin(&mut self, index: usize, core: Core) {
        if self.cores.len() <= index {
            self.cores.resize_with(index + 1, || None);
            self.timeout_of.resize(index + 1, None);
        }
        self.cores[index] = Some(core);
        self.touched.insert(index);
    }

    /// A core is over.
    pub(crate) fn end(&mut self, index: usize) {
        self.set_timeout(index, None);
        if let Some(core) = self.cores.get_mut(index) {
            *core = None;
        }
    }

    /// Those whose core has panicked since the last time; it is gone.
    pub(crate) fn broken(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.broken)
    }

    /// The cores, with the index of each.
    pub(crate) fn indexes(&self) -> Vec<usize> {
        self.cores.iter().enumerate().filter_map(|(index, core)| core.as_ref().map(|_| index)).collect()
    }

    pub(crate) fn core(&self, index: usize) -> Option<&Core> {
        self.cores.get(index)?.as_ref()
    }

    /// Asks a core something that changes nothing of what it wants.
    pub(crate) fn look<T>(&mut self, index: usize, look: impl FnOnce(&mut Core) -> T) -> Option<T> {
        self.cores.get_mut(index)?.as_mut().map(look)
    }

    /// Something happens to a core.
    pub(crate) fn touch<T>(&mut self, index: usize, happens: impl FnOnce(&mut Core) -> T) -> Option<T> {
        let core = self.cores.get_mut(index)?.as_mut()?;
        let happened = catch_unwind(AssertUnwindSafe(|| happens(core)));
        if happened.is_err() {
            self.end(index);
            self.broken.push(index);
        }
        self.touched.insert(index);
        happened.ok()
    }

    /// Something happens to all of them.
    pub(crate) fn touch_all(&mut self, mut happens: impl FnMut(&mut Core)) {
        for index in self.indexes() {
            self.touch(index, &mut happens);
        }
    }

    /// It is later.
    pub(crate) fn time_passes(&mut self, now: Instant) {
        while let Some((at, index)) = self.timeouts.first().copied().filter(|(at, _)| *at <= now) {
            self.timeouts.remove(&(at, index));
            self.timeout_of[index] = None;
            self.touched.insert(index);
        }
    }

    /// When time alone changes what somebody wants.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.timeouts.first().map(|(at, _)| *at)
    }

    /// One to whom something has happened: to be asked what it wants.
    pub(crate) fn next_touched(&mut self) -> Option<usize> {
        self.touched.pop_first()
    }

    /// Gathers what a core wants of the store.
    pub(crate) fn gather(&mut self, index: usize, at: Moment) {
        let mut together = std::mem::take(&mut self.together);
        self.touch(index, |core| {
            while let Some(call) = core.next_call(at, |kind| together.may(index, kind)) {
                together.push(index, call);
            }
            together.asked(index);
        });
        self.together = together;
        self.touched.remove(&index);
        self.plan(index, at.now);
    }

    fn plan(&mut self, index: usize, now: Instant) {
        let timeout = self.core(index).map(|core| core.next_timeout(now, |kind| self.together.may(index, kind)));
        self.set_timeout(index, timeout);
    }

    fn set_timeout(&mut self, index: usize, timeout: Option<Instant>) {
        let Some(before) = self.timeout_of.get_mut(index) else { return };
        if let Some(before) = std::mem::replace(before, timeout) {
            self.timeouts.remove(&(before, index));
        }
        self.timeouts.extend(timeout.map(|at| (at, index)));
    }

    /// How many results of a core are gathered to be stored.
    #[cfg(test)]
    pub(crate) fn gathered_results(&self, index: usize) -> usize {
        self.together.results(index)
    }

    /// What is to be asked of the store now. Where one claims, others look too whose turn comes soon: so a process that
    /// serves many subscriptions and has nothing to do asks as often as if it served one.
    pub(crate) fn batches(&mut self, at: Moment) -> Vec<Batch> {
        if self.together.claims() {
            for index in self.indexes() {
                if self.together.may(index, Kind::Claim)
                    && let Some(call) = self.cores[index].as_mut().and_then(|core| core.joins(at))
                {
                    self.together.join(index, call);
                    self.plan(index, at.now);
                }
            }
        }
        self.together.batches()
    }

    /// The store has answered; `None` if the call has panicked, and nobody knows what is stored.
    pub(crate) fn answered(
        &mut self,
        kind: Kind,
        indexes: &[usize],
        answers: Option<Vec<(usize, Answer)>>,
        mut at: impl FnMut() -> Moment,
    ) {
        let is_broken = answers.is_none();
        let answers = answers.unwrap_or_default();
        let again = self.together.answered(kind, &answers);
        self.touched.extend(again);
        if is_broken {
            for index in indexes {
                self.end(*index);
                self.broken.push(*index);
            }
        }
        for (index, answer) in answers {
            let at = at();
            self.touch(index, |core| core.answered(answer, at));
        }
    }
}

impl Batch {
    /// Whose calls these are.
    pub(crate) fn indexes(&self) -> Vec<usize> {
        self.calls.iter().map(|(index, _): &(usize, Call)| *index).collect()
    }
}
