use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::runtime::Handle;

/// Runs `work` where it is awaited. If the future is dropped before the end, which a request's is whenever a client
/// hangs up, the rest runs in a task of its own. A task from the start would cost each request another thread's wake-up.
pub(crate) fn to_its_end<T>(work: impl Future<Output = T> + Send + 'static) -> ToItsEnd<T>
where
    T: Send + 'static,
{
    ToItsEnd { work: Some(Box::pin(work)), runtime: Handle::current() }
}

/// See [`to_its_end`]. It must be polled once at least to begin.
pub(crate) struct ToItsEnd<T: Send + 'static> {
    work: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    runtime: Handle,
}

/// The work panicked, as in a task.
#[derive(Debug, thiserror::Error)]
#[error("it panicked")]
pub(crate) struct Panicked;

impl<T: Send + 'static> Future for ToItsEnd<T> {
    type Output = Result<T, Panicked>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // Taken out, so that what has panicked is not polled again.
        let mut work = self.work.take().expect("not polled after its end");
        match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
            Ok(Poll::Pending) => {
                self.work = Some(work);
                Poll::Pending
            }
            Ok(Poll::Ready(answer)) => Poll::Ready(Ok(answer)),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    }
}

impl<T: Send + 'static> Drop for ToItsEnd<T> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.runtime.spawn(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::oneshot, time::timeout};

    use super::*;

    #[tokio::test]
    async fn it_ends_although_nobody_waits() {
        let (tell, told) = oneshot::channel();
        let work = to_its_end(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            tell.send(()).expect("somebody listens");
        });
        assert!(timeout(Duration::from_millis(1), work).await.is_err());
        told.await.expect("the rest was done");
    }

    #[tokio::test]
    async fn a_panic_is_an_error() {
        let panicked = to_its_end(async {
            tokio::task::yield_now().await;
            assert!(std::env::args().count() == 0, "of the test");
        });
        panicked.await.expect_err("it panicked");
    }
}
