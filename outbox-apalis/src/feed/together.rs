//! Calls of many subscriptions travel together: one statement instead of one for each.

use std::collections::{BTreeMap, BTreeSet};

use super::calls::{Answer, Call, Kind};

/// How much one call asks for at most, if it is of several subscriptions.
const MOST: usize = 2000;

/// Calls of one kind, each of another subscription.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) kind: Kind,
    pub(crate) calls: Vec<(usize, Call)>,
}

/// Which calls wait for the next batch. Of each kind that travels together one batch is under way at most; meanwhile the
/// next one gathers.
#[derive(Debug, Default)]
pub(crate) struct Together {
    kinds: BTreeMap<Kind, Gathering>,
    /// Calls that travel alone, about a subscription as a whole.
    alone: Vec<(usize, Call)>,
}

#[derive(Debug, Default)]
struct Gathering {
    under_way: bool,
    calls: Vec<(usize, Call)>,
    size: usize,
    /// Whoever may have wanted to call, and has to wait.
    waiting: BTreeSet<usize>,
    /// With how many others a subscription may travel, if its last call has failed: half as many each time, so that one
    /// that cannot be stored is soon alone, and the others go on.
    suspects: BTreeMap<usize, usize>,
}

const TOGETHER: [Kind; 6] = [Kind::Claim, Kind::Settle, Kind::Note, Kind::Renew, Kind::Check, Kind::Reserve];

impl Gathering {
    fn may_join(&self, index: usize) -> bool {
        let of = |index: &usize| self.suspects.get(index).copied().unwrap_or(usize::MAX);
        let most = self.calls.iter().map(|(index, _)| of(index)).min().unwrap_or(usize::MAX).min(of(&index));
        !self.under_way && self.calls.len() < most && (self.calls.is_empty() || self.size < MOST)
    }
}

impl Together {
    /// Whether this subscription may make such a call now.
    pub(crate) fn may(&self, index: usize, kind: Kind) -> bool {
        self.kinds.get(&kind).is_none_or(|gathering| gathering.may_join(index))
    }

    /// A subscription has said all that it wants; what it may not have yet, it is to be asked about again.
    pub(crate) fn asked(&mut self, index: usize) {
        for kind in TOGETHER {
            let gathering = self.kinds.entry(kind).or_default();
            if !gathering.may_join(index) {
                gathering.waiting.insert(index);
            }
        }
    }

    pub(crate) fn push(&mut self, index: usize, call: Call) {
        if !TOGETHER.contains(&call.kind()) {
            self.alone.push((index, call));
            return;
        }
        let gathering = self.kinds.entry(call.kind()).or_default();
        gathering.size += call.size();
        gathering.calls.push((index, call));
    }

    /// Another one looks as well, which expects nothing.
    pub(crate) fn join(&mut self, index: usize, call: Call) {
        let gathering = self.kinds.entry(call.kind()).or_default();
        gathering.size += 1;
        gathering.calls.push((index, call));
    }

    /// Whether somebody claims, so that others may as well.
    pub(crate) fn claims(&self) -> bool {
        self.kinds.get(&Kind::Claim).is_some_and(|gathering| !gathering.calls.is_empty())
    }

    #[cfg(test)]
    pub(crate) fn results(&self, index: usize) -> usize {
        let of = |(of, call): &(usize, Call)| match call {
            Call::Settle(reports) if *of == index => reports.iter().map(|report| report.finished.len()).sum(),
            _ => 0,
        };
        self.kinds.get(&Kind::Settle).map_or(0, |gathering| gathering.calls.iter().map(of).sum())
    }

    /// What is to be called now.
    pub(crate) fn batches(&mut self) -> Vec<Batch> {
        let alone = self.alone.drain(..).map(|(index, call)| Batch { kind: call.kind(), calls: vec![(index, call)] });
        let mut batches: Vec<Batch> = alone.collect();
        for (kind, gathering) in self.kinds.iter_mut().filter(|(_, gathering)| !gathering.calls.is_empty()) {
            gathering.under_way = true;
            gathering.size = 0;
            batches.push(Batch { kind: *kind, calls: std::mem::take(&mut gathering.calls) });
        }
        batches
    }

    /// A batch was answered. Returns whom to ask again what they want.
    pub(crate) fn answered(&mut self, kind: Kind, answers: &[(usize, Answer)]) -> BTreeSet<usize> {
        let Some(gathering) = self.kinds.get_mut(&kind).filter(|_| TOGETHER.contains(&kind)) else {
            return BTreeSet::new();
        };
        gathering.under_way = false;
        for (index, answer) in answers {
            if answer.is_failure() {
                gathering.suspects.insert(*index, (answers.len() / 2).max(1));
            } else {
                gathering.suspects.remove(index);
            }
        }
        std::mem::take(&mut gathering.waiting)
    }
}

#[cfg(test)]
mod tests {
    use outbox_core::store::StoreError;

    use super::*;

    fn settle() -> Call {
        Call::Settle(Vec::new())
    }

    fn settled(works: bool) -> Answer {
        let settled = if works { Ok(Vec::new()) } else { Err(StoreError::new("no")) };
        Answer::Settled { reports: Vec::new(), settled }
    }

    /// All of these want to settle; returns who travels together in the next batch.
    fn next(together: &mut Together, who: &[usize]) -> Vec<usize> {
        for index in who {
            if together.may(*index, Kind::Settle) {
                together.push(*index, settle());
            }
            together.asked(*index);
        }
        let mut batches = together.batches();
        assert!(batches.len() <= 1);
        batches.pop().map(|batch| batch.calls.into_iter().map(|(index, _)| index).collect()).unwrap_or_default()
    }

    #[test]
    fn what_comes_while_a_batch_is_under_way_is_the_next_batch() {
        let mut together = Together::default();
        assert_eq!(next(&mut together, &[1, 2]), [1, 2]);
        assert_eq!(next(&mut together, &[3, 1]), [0_usize; 0]);
        let again = together.answered(Kind::Settle, &[(1, settled(true)), (2, settled(true))]);
        // Who was asked before it went may have wanted to.
        assert!(again.contains(&1) && again.contains(&3));
        assert_eq!(next(&mut together, &[3, 1]), [3, 1]);
    }

    #[test]
    fn one_that_cannot_be_stored_is_soon_alone() {
        let (mut together, bad) = (Together::default(), 5);
        let mut left = vec![0, 1, 2, 3, 4, 5, 6, 7];
        let mut rounds = Vec::new();
        while left != [bad] {
            let batch = next(&mut together, &left);
            let works = !batch.contains(&bad);
            rounds.push(batch.len());
            left.retain(|index| !batch.contains(index));
            let answers: Vec<_> = batch.iter().map(|index| (*index, settled(works))).collect();
            together.answered(Kind::Settle, &answers);
            if !works {
                // They wait for a while before they try again.
                left.extend(batch);
            }
            assert!(rounds.len() < 20, "{rounds:?}");
        }
        assert_eq!(rounds, [8, 4, 4, 2, 2, 1]);
        // The others travel together again, and it does not come between them.
        assert_eq!(next(&mut together, &[0, 1, bad, 2]), [0, 1, 2]);
    }

    #[test]
    fn what_is_about_a_subscription_as_a_whole_waits_for_nobody() {
        let mut together = Together::default();
        together.push(1, Call::Change(super::super::calls::Change::Pause));
        together.push(2, Call::Change(super::super::calls::Change::Pause));
        let batches = together.batches();
        assert_eq!(batches.iter().map(|batch| batch.calls.len()).collect::<Vec<_>>(), [1, 1]);
        assert!(together.may(3, Kind::Change));
    }
}
