//! Owns the traffic that is measured: a server in the node, and what a client does with it.
//! Called by the benches of the kernel half and of the cluster; each starts the server as a process of its own, in a namespace and a cgroup.
//! Must never count bytes that have not arrived, nor give one side of a comparison a buffer that the other one has not: where it happens to
//! lie is worth more than what is measured.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Bytes of a buffer.
pub const CHUNK: usize = 256 << 10;

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
    pin_thread(Pid::from_raw(0), cpu)
}

/// The same for some thread.
pub fn pin_thread(thread: Pid, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(thread, &set)?)
}

/// A buffer that conversations share.
pub type Buffer = Arc<Mutex<Vec<u8>>>;

/// One of the right size.
pub fn buffer() -> Buffer {
    Arc::new(Mutex::new(vec![0; CHUNK]))
}

/// Serves conversations at a port.
pub fn serve(address: SocketAddr) -> Result<()> {
    pin(NODE_CPU)?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    crate::bench::print_ready()?;
    converse_at(&listener, &buffer())
}

/// Serves conversations at a listener, with a buffer that others may have, too.
pub fn converse_at(listener: &TcpListener, buffer: &Buffer) -> Result<()> {
    for stream in listener.incoming() {
        let (stream, buffer) = (stream?, Arc::clone(buffer));
        thread::spawn(move || converse(stream, &buffer));
    }
    Ok(())
}

fn converse(mut stream: TcpStream, buffer: &Mutex<Vec<u8>>) -> Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let mut head = [0; 9];
        match stream.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let [ask, count @ ..] = head;
        let mut left = usize::try_from(u64::from_be_bytes(count))?;
        let mut buffer = buffer.lock().map_err(|_| anyhow!("another conversation failed"))?;
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
}

impl Conversation {
    /// Connects, in the calling thread's network namespace.
    pub fn open(to: SocketAddr) -> Result<Conversation> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).with_context(|| to.to_string())?;
        stream.set_nodelay(true)?;
        Ok(Conversation { stream })
    }

    /// Asks once, with a buffer that other conversations have, too, and what it took until all had arrived.
    pub fn ask(&mut self, ask: Ask, count: usize, buffer: &mut [u8]) -> Result<Duration> {
        let letter = match ask {
            Ask::Get => b'G',
            Ask::Put => b'P',
            Ask::Transact => b'T',
        };
        let started = Instant::now();
        self.stream.write_all(&[&[letter][..], &(count as u64).to_be_bytes()].concat())?;
        match ask {
            Ask::Get => read_all(&mut self.stream, buffer, count)?,
            Ask::Put => {
                let mut left = count;
                while left > 0 {
                    left -= self.stream.write(buffer.get(..left.min(CHUNK)).unwrap_or_default())?;
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
