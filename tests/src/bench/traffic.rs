//! Owns the traffic that is measured: a server in the node, and what a client does with it.
//! Called by the benches of the kernel half and of the cluster; each starts the server as a process of its own, in a namespace and a cgroup.
//! Must never count bytes that have not arrived, or use a buffer for one side alone: its place in memory outweighs what is measured.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use socket2::SockRef;

/// Bytes of a buffer.
pub const CHUNK: usize = 256 << 10;

/// The processor of the node.
pub const NODE_CPU: usize = 1;
/// That of everybody else.
pub const OTHER_CPU: usize = 0;

/// A kind of traffic.
pub struct Kind {
    /// What the server is asked: `P` to take bytes and to answer with one when it has them all, `G` to give bytes, `T` to answer each byte with one.
    ask: u8,
    /// How much is asked for in a turn, and how many of the unit that is.
    count: usize,
    units: f64,
    /// Its unit.
    pub unit: &'static str,
}

/// Bytes to the node and from it, and requests.
pub const KINDS: [Kind; 3] = [
    Kind { ask: b'P', count: 4 << 20, units: 4.0, unit: "MiB/s" },
    Kind { ask: b'G', count: 4 << 20, units: 4.0, unit: "MiB/s" },
    Kind { ask: b'T', count: 200, units: 200.0, unit: "1/s" },
];

impl Kind {
    /// A turn over a connection, with a buffer that others have, too: how much was done in what time. It is over when all has arrived.
    pub fn turn(&self, stream: &mut TcpStream, buffer: &mut [u8]) -> Result<(f64, Duration)> {
        let started = Instant::now();
        stream.write_all(&[&[self.ask][..], &(self.count as u64).to_be_bytes()].concat())?;
        match self.ask {
            b'G' => read_all(stream, buffer, self.count)?,
            b'P' => {
                write_all(stream, buffer, self.count)?;
                stream.read_exact(&mut [0])?;
            }
            _ => {
                for _ in 0..self.count {
                    stream.write_all(b"?")?;
                    stream.read_exact(&mut [0])?;
                }
            }
        }
        Ok((self.units, started.elapsed()))
    }
}

/// Connects, in the calling thread's network namespace.
pub fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).with_context(|| to.to_string())?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Pins the calling thread, and what it starts, to a processor.
pub fn pin(cpu: usize) -> Result<()> {
    pin_thread(Pid::from_raw(0), cpu)
}

/// Pins a thread to a processor.
pub fn pin_thread(thread: Pid, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(thread, &set)?)
}

/// Makes a socket twice, by its index: in the cgroup that the process is in, and in the one beside it, where the process stays. A socket keeps
/// the cgroup that it was made in; an accepted one has its listener's.
pub fn in_both<T>(beside: &Path, mut make: impl FnMut(usize) -> Result<T>) -> Result<[T; 2]> {
    let first = make(0)?;
    fs::write(beside.join("cgroup.procs"), "0").context("cannot go to the other cgroup")?;
    Ok([first, make(1)?])
}

/// A listener of the server.
pub fn listen(at: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(at).with_context(|| format!("cannot listen on {at}"))
}

/// Prints that it listens, and serves conversations on both listeners with one buffer.
pub fn serve(listeners: [TcpListener; 2]) -> Result<()> {
    super::print_line("ready")?;
    let buffer = Arc::new(Mutex::new(vec![0; CHUNK]));
    let serving = listeners.map(|listener| {
        let buffer = Arc::clone(&buffer);
        thread::spawn(move || -> Result<()> {
            for stream in listener.incoming() {
                let (stream, buffer) = (stream?, Arc::clone(&buffer));
                thread::spawn(move || converse(stream, &buffer));
            }
            Ok(())
        })
    });
    for thread in serving {
        thread.join().ok().context("a listener")??;
    }
    Ok(())
}

/// Fixes the size of a socket's buffers, and of those that it accepts. With the kernel's own sizing the throughput differs by a fifth from one
/// connection to the next.
pub fn fixed<S: AsFd>(socket: S) -> Result<S> {
    SockRef::from(&socket).set_recv_buffer_size(CHUNK)?;
    SockRef::from(&socket).set_send_buffer_size(CHUNK)?;
    Ok(socket)
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
        let count = usize::try_from(u64::from_be_bytes(count))?;
        let mut buffer = buffer.lock().map_err(|_| anyhow!("another conversation failed"))?;
        match ask {
            b'G' => write_all(&mut stream, &buffer, count)?,
            b'P' => {
                read_all(&mut stream, &mut buffer, count)?;
                stream.write_all(b"!")?;
            }
            b'T' => {
                for _ in 0..count {
                    stream.read_exact(&mut head[..1])?;
                    stream.write_all(b"!")?;
                }
            }
            _ => bail!("no such request"),
        }
    }
}

fn write_all(stream: &mut TcpStream, buffer: &[u8], mut left: usize) -> Result<()> {
    while left > 0 {
        left -= stream.write(buffer.get(..left.min(CHUNK)).unwrap_or_default())?;
    }
    Ok(())
}

fn read_all(stream: &mut TcpStream, buffer: &mut [u8], mut left: usize) -> Result<()> {
    while left > 0 {
        let most = left.min(buffer.len());
        let count = stream.read(buffer.get_mut(..most).unwrap_or_default())?;
        ensure!(count > 0, "closed too early");
        left -= count;
    }
    Ok(())
}
