//! Owns what a hostile process in the lab does: forged datagrams, broadcasts, connections to nowhere, a socket that changes hands.
//! Called as `nodeguard-demo helper attack ...`, by `helper`.
//! Must never send anything outside the lab's namespaces, and never more than its arguments say.

use std::{
    fs, io,
    net::{SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Result, bail};
use etherparse::PacketBuilder;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

use super::helper::{Answer, ONCE, exchange};
use crate::bench::print_line;

/// Runs an attack by its command line, and prints what came of it.
pub(super) fn main(words: &[&str]) -> Result<()> {
    match *words {
        ["forge", from, to] => forge(from.parse()?, to.parse()?),
        ["broadcast", from, to] => print(broadcast(from.parse()?, to.parse()?)?),
        ["switch", cgroup, first, to] => print(switch(cgroup, first.parse()?, to.parse()?)?),
        ["black-hole", count, ref to @ ..] => {
            let to = to.iter().map(|to| to.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
            black_hole(count.parse()?, &to)
        }
        _ => bail!("no such attack: {}", words.join(" ")),
    }
}

fn print(answer: Answer) -> Result<()> {
    print_line(&serde_json::to_string(&answer)?)
}

/// Sends one datagram whose source is somebody else's, from a raw socket of the protocol UDP.
fn forge(from: SocketAddrV4, to: SocketAddrV4) -> Result<()> {
    let packet = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64).udp(from.port(), to.port());
    let mut bytes = Vec::new();
    packet.write(&mut bytes, b"x")?;
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP))?;
    socket.set_header_included_v4(true)?;
    socket.send_to(&bytes, &SocketAddr::from(to).into())?;
    print(Answer::NoAnswer)
}

/// Asks everybody on a network, and says whether anybody answers.
fn broadcast(from: SocketAddr, to: SocketAddr) -> Result<Answer> {
    let socket = std::net::UdpSocket::bind(from)?;
    socket.set_broadcast(true)?;
    exchange(&socket, to, ONCE)
}

/// Connects where nobody is, joins another cgroup, and connects the same socket again: what was noted about its first owner is not the second's.
fn switch(cgroup: &str, first: SocketAddr, to: SocketAddr) -> Result<Answer> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    let failed = socket.connect(&first.into());
    if failed.is_ok() {
        bail!("{first} takes connections");
    }
    fs::write(format!("{cgroup}/cgroup.procs"), "0")?;
    match socket.connect_timeout(&to.into(), ONCE) {
        Ok(()) => Ok(Answer::Reached),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(Answer::NoAnswer),
        Err(error) => Err(error.into()),
    }
}

/// Begins this many connections that nobody will ever answer, and holds them.
fn black_hole(count: usize, to: &[SocketAddr]) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let mut held = Vec::new();
    for to in to.iter().cycle().take(count) {
        let socket = Socket::new(Domain::for_address(*to), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&(*to).into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => held.push(socket),
            other => bail!("connection {} to {to}: {other:?}", held.len()),
        }
    }
    print_line("ready")?;
    std::thread::sleep(Duration::from_secs(120));
    Ok(())
}
