use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex as StdMutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Mutex, OwnedMutexGuard};

/// How long a handle waits for a savepoint that somebody else has open. A savepoint that is waited for by its own work,
/// through a task, never ends.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Work that is done after the commit.
pub(crate) type AfterCommit = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where a handle works: in the transaction itself, or in one of its savepoints.
///
/// A savepoint holds the turn of the scope it is opened in until it ends. So only the innermost scope executes anything,
/// and nothing of another branch of the request comes into a savepoint, or is rolled back with it.
#[derive(Default)]
pub(crate) struct Scope {
    /// Held by the statement at work, or by the savepoint that is open.
    turn: Arc<Mutex<()>>,
    /// How often a savepoint was opened or ended in it: odd while one is open.
    savepoints: AtomicU32,
    failed: AtomicBool,
    transient: AtomicBool,
    ended: AtomicBool,
    after_commit: StdMutex<Vec<AfterCommit>>,
    /// How many savepoints this is inside of.
    pub(super) depth: u32,
}

impl Scope {
    pub(super) fn inside(&self) -> Arc<Self> {
        Arc::new(Self { depth: self.depth + 1, ..Self::default() })
    }

    /// Waits for the statement at work, or for the end of a savepoint; `None` if that takes too long.
    pub(super) async fn turn(&self) -> Option<OwnedMutexGuard<()>> {
        if let Ok(turn) = self.turn.clone().try_lock_owned() {
            return Some(turn);
        }
        let waiting = self.turn.clone().lock_owned();
        tokio::pin!(waiting);
        loop {
            let before = self.savepoints.load(Ordering::SeqCst);
            if let Ok(turn) = tokio::time::timeout(LONGEST_WAIT, &mut waiting).await {
                return Some(turn);
            }
            // A statement may take as long as it likes, and there may be many savepoints, one after the other.
            if before % 2 == 1 && before == self.savepoints.load(Ordering::SeqCst) {
                return None;
            }
        }
    }

    /// A savepoint was opened in it, or the one that is open ends.
    pub(super) fn count_savepoint(&self) {
        self.savepoints.fetch_add(1, Ordering::SeqCst);
    }

    /// For good.
    pub(super) fn fail(&self, transient: bool) {
        self.transient.store(transient, Ordering::SeqCst);
        self.failed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Whether it has failed for a reason of load or chance.
    pub(crate) fn has_failed_by_chance(&self) -> bool {
        self.has_failed() && self.transient.load(Ordering::SeqCst)
    }

    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    pub(super) fn push_after_commit(&self, work: AfterCommit) {
        self.after_commit.lock().unwrap_or_else(PoisonError::into_inner).push(work);
    }

    pub(crate) fn take_after_commit(&self) -> Vec<AfterCommit> {
        std::mem::take(&mut *self.after_commit.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").field("depth", &self.depth).field("failed", &self.failed).finish_non_exhaustive()
    }
}
