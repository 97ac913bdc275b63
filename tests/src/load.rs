//! Owns the load: what the control plane does through an agent, and how long that takes.
//! Called by the tunnel bench, for one agent after the other, and by tests.
//! Must never treat the agents differently: all that differs is the address.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, copy_buf, sink},
    net::UnixStream,
    task::JoinSet,
    time::timeout,
};

const CHUNK: usize = 64 << 10;
static ZEROS: [u8; CHUNK] = [0; CHUNK];
/// An answer that takes longer is none: it counts as this long.
const PATIENCE: Duration = Duration::from_secs(8);
/// What a small request is answered with, bytes.
const ANSWER: usize = 1 << 10;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the node.
    ToControlPlane,
    /// To the node.
    ToNode,
}

/// Milliseconds at the middle and near the end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latency {
    /// Half are faster.
    pub p50: f64,
    /// All but one of a hundred are faster.
    pub p99: f64,
}

/// What went on beside a stalled endpoint, or without one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside {
    /// MiB per second of everybody else.
    pub throughput: f64,
    /// Small requests of everybody else.
    pub latency: Latency,
}

/// A way through one agent.
#[derive(Clone)]
pub struct Load {
    /// The proxy-server's socket.
    pub socket: Arc<Path>,
    /// The endpoint, by the address that leads to this agent.
    pub destination: String,
}

impl Load {
    /// A connection, as the API server makes it.
    pub async fn connect(&self) -> Result<UnixStream> {
        let connecting = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            let request = format!("CONNECT {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", self.destination);
            stream.write_all(request.as_bytes()).await?;
            let mut head = Vec::with_capacity(64);
            while !head.ends_with(b"\r\n\r\n") {
                ensure!(stream.read_buf(&mut head).await? > 0, "the proxy-server hung up");
            }
            ensure!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
            Ok(stream)
        };
        timeout(PATIENCE, connecting).await.context("no answer to CONNECT")?
    }

    /// So many connections at once.
    pub async fn connect_all(&self, count: usize) -> Result<Vec<UnixStream>> {
        let mut open = Vec::with_capacity(count);
        while open.len() < count {
            let mut batch = JoinSet::new();
            for _ in 0..100.min(count - open.len()) {
                let load = self.clone();
                batch.spawn(async move { load.connect().await });
            }
            for stream in batch.join_all().await {
                open.push(stream?);
            }
        }
        Ok(open)
    }

    /// Moves so many bytes over so many new connections; MiB per second.
    pub async fn throughput(&self, way: Way, connections: usize, bytes: usize) -> Result<f64> {
        let took = transfer_all(&mut self.connect_all(connections).await?, way, bytes).await?;
        Ok(bytes as f64 / f64::from(1 << 20) / took.as_secs_f64())
    }

    /// Small requests over so many open connections, for so long.
    pub async fn requests(&self, connections: usize, time: Duration) -> Result<Latency> {
        let streams = self.connect_all(connections).await?;
        let mut clients = JoinSet::new();
        for mut stream in streams {
            clients.spawn(async move {
                let (mut took, end) = (Vec::new(), Instant::now() + time);
                while Instant::now() < end {
                    let started = Instant::now();
                    if !matches!(timeout(PATIENCE, request(&mut stream)).await, Ok(Ok(()))) {
                        took.push(PATIENCE);
                        break;
                    }
                    took.push(started.elapsed());
                }
                took
            });
        }
        Ok(latency(clients.join_all().await.into_iter().flatten().collect()))
    }

    /// Dials one after the other; what each took.
    pub async fn dials(&self, count: usize) -> Result<Vec<Duration>> {
        let mut took = Vec::with_capacity(count);
        for _ in 0..count {
            let started = Instant::now();
            let stream = self.connect().await?;
            took.push(started.elapsed());
            drop(stream);
        }
        Ok(took)
    }

    /// Dials by 32 at once; how many per second.
    pub async fn dial_rate(&self, count: usize) -> Result<f64> {
        const AT_ONCE: usize = 32;
        let (started, mut dialling) = (Instant::now(), JoinSet::new());
        for _ in 0..AT_ONCE {
            let load = self.clone();
            dialling.spawn(async move {
                for _ in 0..count / AT_ONCE {
                    drop(load.connect().await?);
                }
                anyhow::Ok(())
            });
        }
        for done in dialling.join_all().await {
            done?;
        }
        Ok((count / AT_ONCE * AT_ONCE) as f64 / started.elapsed().as_secs_f64())
    }

    /// What four bulk and four small clients get in so much time; beside an endpoint that never reads and is flooded, if asked.
    pub async fn beside(&self, stalled: bool, time: Duration) -> Result<Beside> {
        let bulk = self.connect_all(4).await?;
        let flooded = if stalled { Some(self.connect().await?) } else { None };
        let (moved, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let flood = tokio::spawn(async move {
            let Some(mut stream) = flooded else { return };
            let chunk = vec![0; CHUNK];
            let _ = stream.write_all(b"NEVER\n").await;
            while stream.write_all(&chunk).await.is_ok() {}
            // It is cut, which is fair: it stays away.
        });
        let (started, mut clients) = (Instant::now(), JoinSet::new());
        for mut stream in bulk {
            let (moved, over) = (Arc::clone(&moved), Arc::clone(&over));
            clients.spawn(async move {
                const PIECE: usize = 256 << 10;
                while !over.load(Ordering::Relaxed) && transfer(&mut stream, Way::ToControlPlane, PIECE).await.is_ok() {
                    moved.fetch_add(PIECE as u64, Ordering::Relaxed);
                }
            });
        }
        // Where no request can even be dialled, each would have taken all of the patience.
        let none = PATIENCE.as_secs_f64() * 1e3;
        let small = self.requests(4, time).await.unwrap_or(Latency { p50: none, p99: none });
        let throughput = moved.load(Ordering::Relaxed) as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        flood.abort();
        let _ = timeout(Duration::from_secs(1), async { while clients.join_next().await.is_some() {} }).await;
        Ok(Beside { throughput, latency: small })
    }
}

/// One small request and its answer.
pub async fn request(stream: &mut UnixStream) -> Result<()> {
    stream.write_all(format!("SOURCE {ANSWER}\n").as_bytes()).await?;
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer).await?;
    Ok(())
}

/// Moves so many bytes over these, an equal part over each, all at once; how long that took.
pub async fn transfer_all(streams: &mut Vec<UnixStream>, way: Way, bytes: usize) -> Result<Duration> {
    let each = bytes / streams.len().max(1);
    let (started, mut moves) = (Instant::now(), JoinSet::new());
    for mut stream in streams.drain(..) {
        moves.spawn(async move { transfer(&mut stream, way, each).await.map(|()| stream) });
    }
    let moved = moves.join_all().await;
    let took = started.elapsed();
    for stream in moved {
        streams.push(stream?);
    }
    Ok(took)
}

async fn transfer(stream: &mut UnixStream, way: Way, bytes: usize) -> Result<()> {
    match way {
        Way::ToControlPlane => {
            stream.write_all(format!("SOURCE {bytes}\n").as_bytes()).await?;
            let mut got = BufReader::with_capacity(CHUNK, stream).take(bytes as u64);
            let count = copy_buf(&mut got, &mut sink()).await?;
            ensure!(count == bytes as u64, "closed after {count} of {bytes} bytes");
        }
        Way::ToNode => {
            stream.write_all(format!("SINK {bytes}\n").as_bytes()).await?;
            let mut left = bytes;
            while left > 0 {
                let most = left.min(CHUNK);
                stream.write_all(&ZEROS[..most]).await?;
                left -= most;
            }
            stream.read_exact(&mut [0; 1]).await?;
        }
    }
    Ok(())
}

/// The middle and the end of many.
pub fn latency(mut took: Vec<Duration>) -> Latency {
    took.sort_unstable();
    let at = |share: f64| {
        let index = ((took.len() as f64 * share) as usize).min(took.len().saturating_sub(1));
        took.get(index).map_or(f64::INFINITY, |time| time.as_secs_f64() * 1e3)
    };
    Latency { p50: at(0.5), p99: at(0.99) }
}
