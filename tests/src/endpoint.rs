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

use crate::{
    bench::print_line,
    client::{pattern, sum},
    lock,
};

/// Bytes in one read or write.
pub(crate) const CHUNK: usize = 64 << 10;
pub(crate) static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// What was read for each id.
type Sums = Arc<Mutex<HashMap<String, String>>>;

/// Serves at an address, and prints that it does.
pub async fn listen(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    print_line("ready")?;
    serve(listener).await
}

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
                let mut left: usize = count.parse()?;
                while left > 0 {
                    left -= stream.get_mut().write(&ZEROS[..left.min(CHUNK)]).await?;
                }
            }
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

async fn sink(stream: &mut BufReader<TcpStream>, mut left: usize) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let got = stream.read(&mut buffer[..left.min(CHUNK)]).await?;
        ensure!(got > 0, "closed with {left} bytes missing");
        left -= got;
    }
    Ok(())
}
