use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// How a destination of webhooks treats its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Takes everything.
    Good,
    /// Accepts and never answers.
    Silent,
    /// Sends a byte now and then.
    Dripping,
    /// Refuses with an answer of 100 MB.
    Endless,
    /// Redirects to itself.
    Circular,
}

/// A destination of webhooks that may misbehave.
#[derive(Debug)]
pub struct Destination {
    /// Its manner.
    pub manner: Manner,
    /// Where it listens.
    pub url: String,
    most_open: Arc<AtomicUsize>,
}

impl Destination {
    /// Listens on a port of this machine.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}/hook", listener.local_addr().expect("a bound port"));
        let (open, most_open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let most = most_open.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (open, most) = (open.clone(), most.clone());
                tokio::spawn(async move {
                    most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    // The client may go at any time.
                    let _ = answer(stream, manner).await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { manner, url, most_open }
    }

    /// How many connections were open at the same time, at most.
    #[must_use]
    pub fn most_open(&self) -> usize {
        self.most_open.load(Ordering::SeqCst)
    }
}

async fn answer(mut stream: TcpStream, manner: Manner) -> std::io::Result<()> {
    let mut request = vec![0; 64 * 1024];
    loop {
        if stream.read(&mut request).await? == 0 {
            return Ok(());
        }
        match manner {
            Manner::Good => stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await?,
            Manner::Silent => while stream.read(&mut request).await? > 0 {},
            Manner::Dripping => {
                stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
                loop {
                    stream.write_all(b"x").await?;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Manner::Endless => {
                stream.write_all(b"HTTP/1.1 500 No\r\ncontent-length: 104857600\r\n\r\n").await?;
                for _ in 0..1600 {
                    stream.write_all(&[b'x'; 65536]).await?;
                }
            }
            Manner::Circular => {
                stream.write_all(b"HTTP/1.1 302 Found\r\nlocation: /hook\r\ncontent-length: 0\r\n\r\n").await?;
            }
        }
    }
}
