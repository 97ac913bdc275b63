//! Owns the endpoint that agents dial under load.
//! Called by the bench, as a process of its own so that its work counts for nobody, and by tests.
//! Must never speak first: the proxy-server may send bytes before its own answer.

use anyhow::Result;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// Bytes in one read or write.
const CHUNK: usize = 64 << 10;

/// Serves until it is killed. A line asks: `SINK N`, `SOURCE N`, or `NEVER` read again.
pub async fn serve(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(answer(stream));
    }
}

async fn answer(stream: TcpStream) -> Result<()> {
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
                let (mut left, mut buffer) = (count.parse::<u64>()?, vec![0; CHUNK]);
                while left > 0 {
                    let most = buffer.len().min(usize::try_from(left)?);
                    let got = stream.read(buffer.get_mut(..most).unwrap_or_default()).await?;
                    anyhow::ensure!(got > 0, "closed with {left} bytes missing");
                    left -= got as u64;
                }
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
            _ => std::future::pending().await,
        }
    }
}
