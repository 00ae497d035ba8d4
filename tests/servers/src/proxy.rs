use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
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
    /// As `Freeze`, once the servers have sent this many answers since the start of the proxy: a client that is stopped
    /// between two statements.
    FreezeAfter(usize),
    /// Everything is forwarded this much later.
    Delay(Duration),
    /// A connection that sends COMMIT is closed before the server sees it.
    CutBeforeCommit,
    /// A connection that sends COMMIT is closed after the server has got it and before the client has the answer.
    CutAfterCommit,
    /// A connection that sends COMMIT gets nothing any more after the server has got it, and stays open.
    MuteAfterCommit,
}

/// A TCP proxy in front of a server, with faults on demand.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    old: watch::Sender<Old>,
    state: Arc<State>,
}

/// What happens to connections that were made before.
#[derive(Clone, Copy, Debug, Default)]
struct Old {
    /// Connections with a smaller number are closed.
    closed: usize,
    /// What connections with a smaller number carry is swallowed.
    swallowed: usize,
}

#[derive(Debug, Default)]
struct State {
    /// The server for new connections.
    port: AtomicU16,
    /// How many connections were made.
    made: AtomicUsize,
    cuts: AtomicUsize,
    /// How many answers were forwarded.
    answers: AtomicUsize,
}

/// One connection.
#[derive(Clone)]
struct Connection {
    number: usize,
    faults: watch::Receiver<Fault>,
    old: watch::Receiver<Old>,
    state: Arc<State>,
    /// Set when a COMMIT has passed whose answer must not come back.
    silenced: Arc<Mutex<bool>>,
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
        let ((fault, faults), (old, olds)) = (watch::channel(Fault::None), watch::channel(Old::default()));
        let state = Arc::new(State { port: port.into(), ..State::default() });
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *faults.borrow() != Fault::Refuse {
                    let number = shared.made.fetch_add(1, Ordering::SeqCst);
                    let (faults, old, state) = (faults.clone(), olds.clone(), shared.clone());
                    let connection = Connection { number, faults, old, state, silenced: Arc::default() };
                    tokio::spawn(connection.forward(client));
                }
            }
        });
        Self { address, fault, old, state }
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

    /// Leads new connections to the server on another port of this machine. Those that exist stay where they are.
    pub fn switch(&self, port: u16) {
        self.state.port.store(port, Ordering::SeqCst);
    }

    /// Closes the connections that exist. New ones pass.
    pub fn close_existing(&self) {
        let made = self.state.made.load(Ordering::SeqCst);
        self.old.send_modify(|old| old.closed = made);
    }

    /// Swallows what the connections that exist carry, in both directions and without closing them, even if one end does:
    /// neither end hears of the other again. New ones pass.
    pub fn swallow_existing(&self) {
        let made = self.state.made.load(Ordering::SeqCst);
        self.old.send_modify(|old| old.swallowed = made);
    }

    /// How many connections were cut at a COMMIT.
    #[must_use]
    pub fn cuts(&self) -> usize {
        self.state.cuts.load(Ordering::SeqCst)
    }

    /// How many answers of servers were forwarded.
    #[must_use]
    pub fn answers(&self) -> usize {
        self.state.answers.load(Ordering::SeqCst)
    }

    /// How many connections were made.
    #[must_use]
    pub fn made(&self) -> usize {
        self.state.made.load(Ordering::SeqCst)
    }
}

impl Connection {
    async fn forward(self, client: TcpStream) {
        let port = self.state.port.load(Ordering::SeqCst);
        let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let (mut faults, mut old) = (self.faults.clone(), self.old.clone());
        tokio::select! {
            () = self.clone().requests(from_client, to_server) => {}
            () = self.clone().answers(from_server, to_client) => {}
            _ = faults.wait_for(|fault| *fault == Fault::Refuse) => {}
            _ = old.wait_for(|old| self.number < old.closed) => {}
        }
    }

    async fn requests(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = self.read(&mut from, &mut buffer).await {
            let fault = self.hold().await;
            let commits = buffer[..n].windows(7).any(|bytes| bytes == b"COMMIT\0");
            if commits && fault == Fault::CutBeforeCommit {
                self.state.cuts.fetch_add(1, Ordering::SeqCst);
                return;
            }
            if commits && matches!(fault, Fault::CutAfterCommit | Fault::MuteAfterCommit) {
                *self.silenced.lock().expect("no panic") = true;
                self.state.cuts.fetch_add(1, Ordering::SeqCst);
            }
            if to.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    }

    async fn answers(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = self.read(&mut from, &mut buffer).await {
            let fault = self.hold().await;
            let silenced = *self.silenced.lock().expect("no panic");
            if silenced && fault == Fault::MuteAfterCommit {
                std::future::pending().await
            }
            // Counted first: the next request is held already when the client has the answer.
            self.state.answers.fetch_add(1, Ordering::SeqCst);
            if silenced || to.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    }

    /// Reads, and goes on reading for good once what it reads is swallowed.
    async fn read(&self, from: &mut OwnedReadHalf, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let read = from.read(buffer).await;
            if self.number >= self.old.borrow().swallowed {
                return read;
            }
            if !matches!(read, Ok(1..)) {
                return std::future::pending().await;
            }
        }
    }

    /// Waits as long as the fault says.
    async fn hold(&mut self) -> Fault {
        // The sender lives as long as the test.
        let state = &self.state;
        let passes = |fault: &Fault| match fault {
            Fault::Freeze => false,
            Fault::FreezeAfter(answers) => state.answers.load(Ordering::SeqCst) < *answers,
            _ => true,
        };
        let fault = self.faults.wait_for(passes).await.map_or(Fault::None, |fault| *fault);
        if let Fault::Delay(delay) = fault {
            tokio::time::sleep(delay).await;
        }
        fault
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers each byte with one of its own.
    async fn server(answer: u8) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    while client.read_u8().await.is_ok() && client.write_u8(answer).await.is_ok() {}
                });
            }
        });
        port
    }

    async fn client(proxy: &Proxy) -> TcpStream {
        TcpStream::connect(proxy.address).await.unwrap()
    }

    async fn answer(client: &mut TcpStream) -> std::io::Result<u8> {
        client.write_u8(0).await?;
        client.read_u8().await
    }

    #[tokio::test]
    async fn existing_connections_are_swallowed_while_new_ones_pass() {
        let proxy = Proxy::start(server(1).await).await;
        let mut old = client(&proxy).await;
        assert_eq!(answer(&mut old).await.unwrap(), 1);
        proxy.swallow_existing();
        let mut new = client(&proxy).await;
        assert_eq!(answer(&mut new).await.unwrap(), 1);
        let silence = tokio::time::timeout(Duration::from_millis(50), answer(&mut old)).await;
        assert!(silence.is_err(), "{silence:?}");
    }

    #[tokio::test]
    async fn new_connections_lead_to_the_other_server() {
        let proxy = Proxy::start(server(1).await).await;
        let mut old = client(&proxy).await;
        assert_eq!(answer(&mut old).await.unwrap(), 1);
        proxy.switch(server(2).await);
        assert_eq!(answer(&mut old).await.unwrap(), 1);
        proxy.close_existing();
        assert!(answer(&mut old).await.is_err());
        assert_eq!(answer(&mut client(&proxy).await).await.unwrap(), 2);
    }
}
