//! Owns attempts that are made one after another while something else changes.
//! Called by the test of flips, on threads and as a helper in a cgroup of its own.
//! Must never send a second packet in one attempt: what is denied is counted packet by packet.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use anyhow::{Result, bail};

use super::client::timed_out;

/// How long to pause between two attempts: the flips need some of the processor too.
pub const PAUSE: Duration = Duration::from_millis(2);

/// Makes one attempt, and says whether it was answered.
pub type Attempt = fn(SocketAddr, Duration) -> bool;

/// A whole exchange: the handshake, a request, an answer.
pub fn tcp(to: SocketAddr, patience: Duration) -> bool {
    let exchange = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        // Closed with a RST: no port waits for the next attempt.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")?;
        stream.read_exact(&mut [0; 12])
    };
    exchange().is_ok()
}

/// One datagram and its answer. Whatever fails but the wait for the answer ends the process: it is no denial.
#[expect(clippy::unwrap_used, clippy::panic, reason = "an attempt that cannot be made ends the test")]
pub fn udp(to: SocketAddr, patience: Duration) -> bool {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
    let socket = UdpSocket::bind(any).unwrap();
    socket.set_read_timeout(Some(patience)).unwrap();
    socket.send_to(b"hello", to).unwrap();
    match socket.recv_from(&mut [0; 16]) {
        Ok(_) => true,
        Err(error) if timed_out(&error) => false,
        Err(error) => panic!("{error}"),
    }
}

/// Tries until the file `stop` exists, then prints how many attempts were made and how many of them were answered.
pub fn keep_on(how: &str, to: SocketAddr, patience: Duration, stop: &Path) -> Result<[usize; 2]> {
    let attempt: Attempt = match how {
        "tcp" => tcp,
        "udp" => udp,
        _ => bail!("no such attempt: {how}"),
    };
    let [mut made, mut answered] = [0; 2];
    while !stop.exists() {
        made += 1;
        answered += usize::from(attempt(to, patience));
        std::thread::sleep(PAUSE);
    }
    Ok([made, answered])
}
