//! Owns the endpoint that agents dial: bytes by the megabyte, both ways.
//! Called by the tunnel bench as a process of its own, so that its work counts for nobody, by the lab's node and by tests.
//! Must never speak first: the proxy-server may send bytes before its own answer.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use crate::lab::client::{Digest, pattern};

/// Bytes in one read or write.
const CHUNK: usize = 64 << 10;

/// What was read for each id.
type Sums = Arc<Mutex<HashMap<String, String>>>;

/// Serves until it is killed. A line asks: `SINK N` and `SOURCE N` for any bytes, `GET N SEED` for bytes of the pattern and the end behind them,
/// `PUT ID` to read to the end, `SUM ID` for what was read there. Behind any other line nothing is read again.
pub async fn serve(listener: TcpListener) -> Result<()> {
    let sums = Sums::default();
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(answer(stream, Arc::clone(&sums)));
    }
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
                sink(&mut stream, count.parse()?).await?;
                stream.get_mut().write_all(b"k").await?;
            }
            ["SOURCE", count] => {
                let (mut left, buffer) = (count.parse::<usize>()?, vec![0; CHUNK]);
                while left > 0 {
                    let most = buffer.len().min(left);
                    stream.get_mut().write_all(buffer.get(..most).unwrap_or_default()).await?;
                    left -= most;
                }
            }
            ["GET", count, seed] => {
                stream.get_mut().write_all(&pattern(seed.parse()?, count.parse()?)).await?;
                return Ok(stream.get_mut().shutdown().await?);
            }
            ["PUT", id] => {
                let read = digest(&mut stream).await.unwrap_or_else(|error| format!("error {error}"));
                sums.lock().ok().context("sums")?.insert(id.to_owned(), read);
                return Ok(());
            }
            ["SUM", id] => {
                let read = sums.lock().ok().context("sums")?.remove(id).unwrap_or_else(|| "none".to_owned());
                return Ok(stream.get_mut().write_all(format!("{read}\n").as_bytes()).await?);
            }
            _ => std::future::pending().await,
        }
    }
}

async fn sink(stream: &mut BufReader<TcpStream>, mut left: u64) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left)?);
        let got = stream.read(buffer.get_mut(..most).unwrap_or_default()).await?;
        ensure!(got > 0, "closed with {left} bytes missing");
        left -= got as u64;
    }
    Ok(())
}

async fn digest(stream: &mut BufReader<TcpStream>) -> Result<String> {
    let (mut digest, mut buffer) = (Digest::default(), vec![0; CHUNK]);
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(digest.finish()),
            count => digest.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}
