//! Owns the traffic that is measured: a server in the node, and what a client does with it.
//! Called by the benches of the kernel half and of the cluster; each starts the server as a process of its own, in a namespace and a cgroup.
//! Must never count bytes that have not arrived.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use socket2::SockRef;

const CHUNK: usize = 256 << 10;

/// The processor of the node.
pub const NODE_CPU: usize = 1;
/// That of everybody else.
pub const OTHER_CPU: usize = 0;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Bytes from the node.
    Get,
    /// Bytes to the node, which answers with one when it has them all.
    Put,
    /// Requests of one byte, each answered with one.
    Transact,
}

/// Holds the calling thread to a processor; its children, too.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Serves conversations at a port, and takes and closes connections at the next one.
pub fn serve(address: SocketAddr) -> Result<()> {
    pin(NODE_CPU)?;
    let listen =
        |address: SocketAddr| TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"));
    let conversations = listen(address)?;
    let connections = listen(SocketAddr::new(address.ip(), address.port() + 1))?;
    // Longer than the library makes it: the flood must not be what fills the queue of the allowed.
    socket2::SockRef::from(&connections).listen(4096)?;
    crate::bench::print_ready()?;
    std::thread::spawn(move || connections.incoming().for_each(drop));
    for stream in conversations.incoming() {
        let stream = stream?;
        std::thread::spawn(move || converse(stream));
    }
    Ok(())
}

fn converse(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut head = [0; 9];
        match stream.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let [ask, count @ ..] = head;
        let mut left = usize::try_from(u64::from_be_bytes(count))?;
        match ask {
            b'G' => {
                while left > 0 {
                    left -= stream.write(buffer.get(..left.min(CHUNK)).unwrap_or_default())?;
                }
            }
            b'P' => {
                read_all(&mut stream, &mut buffer, left)?;
                stream.write_all(b"!")?;
            }
            b'T' => {
                for _ in 0..left {
                    stream.read_exact(&mut head[..1])?;
                    stream.write_all(b"!")?;
                }
            }
            _ => bail!("no such request"),
        }
    }
}

fn read_all(stream: &mut TcpStream, buffer: &mut [u8], mut left: usize) -> Result<()> {
    while left > 0 {
        let most = left.min(buffer.len());
        let count = stream.read(buffer.get_mut(..most).unwrap_or_default())?;
        if count == 0 {
            bail!("closed too early");
        }
        left -= count;
    }
    Ok(())
}

/// A client's conversation.
pub struct Conversation {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Conversation {
    /// Connects, in the calling thread's network namespace.
    pub fn open(to: SocketAddr) -> Result<Conversation> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).with_context(|| to.to_string())?;
        stream.set_nodelay(true)?;
        Ok(Conversation { stream, buffer: vec![0; CHUNK] })
    }

    /// Asks once, and what it took until all had arrived.
    pub fn ask(&mut self, ask: Ask, count: usize) -> Result<Duration> {
        let letter = match ask {
            Ask::Get => b'G',
            Ask::Put => b'P',
            Ask::Transact => b'T',
        };
        let started = Instant::now();
        self.stream.write_all(&[&[letter][..], &(count as u64).to_be_bytes()].concat())?;
        match ask {
            Ask::Get => read_all(&mut self.stream, &mut self.buffer, count)?,
            Ask::Put => {
                let mut left = count;
                while left > 0 {
                    left -= self.stream.write(self.buffer.get(..left.min(CHUNK)).unwrap_or_default())?;
                }
                self.stream.read_exact(&mut [0])?;
            }
            Ask::Transact => {
                for _ in 0..count {
                    self.stream.write_all(b"?")?;
                    self.stream.read_exact(&mut [0])?;
                }
            }
        }
        Ok(started.elapsed())
    }
}

/// Opens and ends one connection after the other for so long; how many were there. One that is not there within a second is given up.
pub fn connections(to: SocketAddr, time: Duration) -> Result<u64> {
    let (started, mut count) = (Instant::now(), 0);
    while started.elapsed() < time {
        if let Ok(stream) = TcpStream::connect_timeout(&to, Duration::from_secs(1)) {
            // Ended with a RST: no port waits.
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            count += 1;
        }
    }
    Ok(count)
}
