//! The thread on which leases are claimed, renewed and given back.
//!
//! Handlers run on the threads of the application. One that blocks its thread, with a lock or a computation, may hold up
//! all of them; on a thread of their own claims, acknowledgements and renewals go on, with connections of their own.

use std::{io, thread};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

/// Ends, with everything that runs on it, when it is dropped.
#[derive(Debug)]
pub(crate) struct FeedThread {
    runtime: Handle,
    _alive: oneshot::Sender<()>,
}

impl FeedThread {
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (alive, dropped) = oneshot::channel::<()>();
        thread::Builder::new().name("outbox-feed".to_owned()).spawn(move || {
            // Nothing is ever sent: the error is the drop.
            let _ = runtime.block_on(dropped);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, _alive: alive })
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}
