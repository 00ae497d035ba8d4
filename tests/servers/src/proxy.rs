use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What a proxy does to its connections from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// New connections are closed at once, and those that exist too.
    Refuse,
    /// Nothing is forwarded, in either direction, and nothing is closed.
    Freeze,
    /// Everything is forwarded this much later.
    Delay(Duration),
    /// A connection that sends COMMIT is closed before the server sees it.
    CutBeforeCommit,
    /// A connection that sends COMMIT is closed after the server has got it and before the client has the answer.
    CutAfterCommit,
}

/// A TCP proxy in front of a server, with faults on demand.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    cuts: Arc<AtomicUsize>,
}

impl Proxy {
    /// Forwards to a port of this machine.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (fault, faults) = watch::channel(Fault::None);
        let cuts = Arc::new(AtomicUsize::new(0));
        let counted = cuts.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *faults.borrow() != Fault::Refuse {
                    tokio::spawn(forward(client, port, faults.clone(), counted.clone()));
                }
            }
        });
        Self { address, fault, cuts }
    }

    /// Rewrites a URL of the server so that it goes through the proxy.
    ///
    /// # Panics
    ///
    /// If the URL does not name the server's port.
    #[must_use]
    pub fn url(&self, server_url: &str, port: u16) -> String {
        let (server, own) = (format!(":{port}/"), format!(":{}/", self.address.port()));
        assert!(server_url.contains(&server), "{server_url}");
        server_url.replace(&server, &own)
    }

    /// Where the proxy listens.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Changes what happens to all connections.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// How many connections were cut at a COMMIT.
    #[must_use]
    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }
}

async fn forward(client: TcpStream, port: u16, faults: watch::Receiver<Fault>, cuts: Arc<AtomicUsize>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // Set when a COMMIT has passed whose answer must not come back.
    let silenced = Arc::new(Mutex::new(false));
    let mut refused = faults.clone();
    tokio::select! {
        () = requests(from_client, to_server, faults.clone(), silenced.clone(), cuts) => {}
        () = answers(from_server, to_client, faults, silenced) => {}
        _ = refused.wait_for(|fault| *fault == Fault::Refuse) => {}
    }
}

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    faults: watch::Receiver<Fault>,
    silenced: Arc<Mutex<bool>>,
    cuts: Arc<AtomicUsize>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let fault = hold(faults.clone()).await;
        let commits = buffer[..n].windows(7).any(|bytes| bytes == b"COMMIT\0");
        if commits && fault == Fault::CutBeforeCommit {
            cuts.fetch_add(1, Ordering::SeqCst);
            return;
        }
        if commits && fault == Fault::CutAfterCommit {
            *silenced.lock().expect("no panic") = true;
            cuts.fetch_add(1, Ordering::SeqCst);
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

async fn answers(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    faults: watch::Receiver<Fault>,
    silenced: Arc<Mutex<bool>>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        hold(faults.clone()).await;
        if *silenced.lock().expect("no panic") || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// Waits as long as the fault says.
async fn hold(mut faults: watch::Receiver<Fault>) -> Fault {
    // The sender lives as long as the test.
    let fault = faults.wait_for(|fault| *fault != Fault::Freeze).await.map_or(Fault::None, |fault| *fault);
    if let Fault::Delay(delay) = fault {
        tokio::time::sleep(delay).await;
    }
    fault
}
