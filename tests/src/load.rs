//! Owns the load: what the control plane does through an agent, how long that takes, and the endpoint that agents dial.
//! Called by the tunnel bench, for one agent after the other (the endpoint is a process of its own: its work counts for nobody), and by tests.
//! Must never treat the agents differently: all that differs is the address.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream, ToSocketAddrs, UnixStream},
    sync::watch,
    task::JoinSet,
    time::{timeout, timeout_at},
};

use crate::{
    client::{pattern, sum},
    lock,
    servers::read_head,
};

/// Bytes in one read or write.
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
            let head = read_head(&mut stream).await?;
            ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
            Ok(stream)
        };
        timeout(PATIENCE, connecting).await.context("no answer to CONNECT")?
    }

    /// So many connections at once.
    pub async fn connect_all(&self, count: usize) -> Result<Vec<UnixStream>> {
        let mut open = Vec::with_capacity(count);
        while open.len() < count {
            let connect = |load: Load| async move { load.connect().await };
            let batch = 100.min(count - open.len());
            open.extend(at_once((0..batch).map(|_| connect(self.clone()))).await?);
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
        let client = |mut stream: UnixStream| async move {
            let (mut took, end) = (Vec::new(), Instant::now() + time);
            while Instant::now() < end {
                let started = Instant::now();
                if !matches!(timeout(PATIENCE, request(&mut stream)).await, Ok(Ok(()))) {
                    took.push(PATIENCE);
                    break;
                }
                took.push(started.elapsed());
            }
            Ok(took)
        };
        let took = at_once(self.connect_all(connections).await?.into_iter().map(client)).await?;
        Ok(latency(took.concat()))
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
        let started = Instant::now();
        let dials = |load: Load| async move { load.dials(count / AT_ONCE).await };
        let took = at_once((0..AT_ONCE).map(|_| dials(self.clone()))).await?;
        Ok(took.concat().len() as f64 / started.elapsed().as_secs_f64())
    }

    /// What four bulk and four small clients get in so much time; beside an endpoint that never reads and is flooded, if asked.
    pub async fn beside(&self, stalled: bool, time: Duration) -> Result<Beside> {
        const PIECE: usize = 256 << 10;
        let streams = self.connect_all(4).await?;
        let flooded = if stalled { Some(self.connect().await?) } else { None };
        let flood = tokio::spawn(async move {
            let Some(mut stream) = flooded else { return };
            let _ = stream.write_all(b"NEVER\n").await;
            while stream.write_all(&ZEROS).await.is_ok() {}
            // It is cut, which is fair: it stays away.
        });
        let end = tokio::time::Instant::now() + time;
        let bulk = |mut stream: UnixStream| async move {
            let mut moved = 0;
            while let Ok(Ok(())) = timeout_at(end, transfer(&mut stream, Way::ToControlPlane, PIECE)).await {
                moved += PIECE;
            }
            Ok(moved)
        };
        let (moved, small) = tokio::join!(at_once(streams.into_iter().map(bulk)), self.requests(4, time));
        flood.abort();
        let mib = moved?.into_iter().sum::<usize>() as f64 / f64::from(1 << 20);
        // Where no request can even be dialled, each would have taken all of the patience.
        let latency = small.unwrap_or_else(|_| latency(vec![PATIENCE]));
        Ok(Beside { throughput: mib / time.as_secs_f64(), latency })
    }
}

/// One small request and its answer.
pub async fn request(stream: &mut UnixStream) -> Result<()> {
    stream.write_all(format!("SOURCE {ANSWER}\n").as_bytes()).await?;
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer).await?;
    Ok(())
}

/// Does all of these at once; what each came to, if none failed.
async fn at_once<T: Send + 'static>(
    tasks: impl Iterator<Item = impl Future<Output = Result<T>> + Send + 'static>,
) -> Result<Vec<T>> {
    tasks.collect::<JoinSet<_>>().join_all().await.into_iter().collect()
}

/// Moves so many bytes over these, an equal part over each, all at once; how long that took.
pub async fn transfer_all(streams: &mut Vec<UnixStream>, way: Way, bytes: usize) -> Result<Duration> {
    let each = bytes / streams.len().max(1);
    let moved = |mut stream: UnixStream| async move { transfer(&mut stream, way, each).await.map(|()| stream) };
    let started = Instant::now();
    *streams = at_once(std::mem::take(streams).into_iter().map(moved)).await?;
    Ok(started.elapsed())
}

async fn transfer(stream: &mut UnixStream, way: Way, bytes: usize) -> Result<()> {
    match way {
        Way::ToControlPlane => {
            stream.write_all(format!("SOURCE {bytes}\n").as_bytes()).await?;
            take(stream, bytes).await
        }
        Way::ToNode => {
            stream.write_all(format!("SINK {bytes}\n").as_bytes()).await?;
            give(stream, bytes).await?;
            Ok(stream.read_exact(&mut [0; 1]).await.map(drop)?)
        }
    }
}

/// Reads so many bytes, whatever they are.
async fn take(stream: &mut (impl AsyncRead + Unpin), mut left: usize) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let got = stream.read(&mut buffer[..left.min(CHUNK)]).await?;
        ensure!(got > 0, "closed with {left} bytes missing");
        left -= got;
    }
    Ok(())
}

/// Writes so many bytes, all zero.
async fn give(stream: &mut (impl AsyncWrite + Unpin), mut left: usize) -> Result<()> {
    while left > 0 {
        left -= stream.write(&ZEROS[..left.min(CHUNK)]).await?;
    }
    Ok(())
}

/// Clients that send small requests all the time: over connections that stay open, and over new ones.
pub struct Steady {
    over: watch::Sender<bool>,
    clients: JoinSet<Result<usize>>,
}

impl Steady {
    /// Begins with so many clients that hold a connection, and so many that dial for each request.
    pub async fn start(load: &Load, held: usize, dialling: usize) -> Result<Steady> {
        let (over, end) = watch::channel(false);
        let held = load.connect_all(held).await?.into_iter().map(Some);
        let client = |mut held: Option<UnixStream>| {
            let (load, end) = (load.clone(), end.clone());
            async move {
                let mut answered = 0;
                while !*end.borrow() {
                    match &mut held {
                        Some(stream) => request(stream).await.context("a held connection")?,
                        None => request(&mut load.connect().await?).await.context("a new connection")?,
                    }
                    answered += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(answered)
            }
        };
        Ok(Steady { clients: held.chain((0..dialling).map(|_| None)).map(client).collect(), over })
    }

    /// Ends the load; returns how many requests were answered, if none failed.
    pub async fn end(self) -> Result<usize> {
        self.over.send_replace(true);
        let (answered, failed): (Vec<_>, Vec<_>) = self.clients.join_all().await.into_iter().partition(Result::is_ok);
        ensure!(failed.is_empty(), "{} of the connections failed: {failed:?}", failed.len());
        Ok(answered.into_iter().flatten().sum())
    }
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

/// What was read for each id.
type Sums = Arc<Mutex<HashMap<String, String>>>;

/// Serves what agents dial. A line asks: `SINK N` and `SOURCE N` for any bytes, `GET N SEED` for bytes of the pattern and the end behind them,
/// `PUT ID` to read to the end, `SUM ID` for what was read there. Behind any other line nothing is read again. It never speaks first: the
/// proxy-server may send bytes before its own answer.
pub async fn serve(address: impl ToSocketAddrs) -> Result<()> {
    let (listener, sums) = (TcpListener::bind(address).await?, Sums::default());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, Arc::clone(&sums)));
        }
    });
    Ok(())
}

async fn answer(stream: TcpStream, sums: Sums) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(1 << 10, stream);
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["SINK", count] => {
                take(&mut stream, count.parse()?).await?;
                stream.get_mut().write_all(b"k").await?;
            }
            ["SOURCE", count] => give(stream.get_mut(), count.parse()?).await?,
            ["GET", count, seed] => {
                stream.get_mut().write_all(&pattern(seed.parse()?, count.parse()?)).await?;
                return Ok(stream.get_mut().shutdown().await?);
            }
            ["PUT", id] => {
                let mut bytes = Vec::new();
                let read = stream.read_to_end(&mut bytes).await;
                let read = read.map_or_else(|error| format!("error {error}"), |_| sum(&bytes));
                lock(&sums).insert(id.to_owned(), read);
                return Ok(());
            }
            ["SUM", id] => {
                let read = lock(&sums).remove(id).unwrap_or_else(|| "none".to_owned());
                return Ok(stream.get_mut().write_all(format!("{read}\n").as_bytes()).await?);
            }
            _ => std::future::pending().await,
        }
    }
}
