//! Owns the server that traffic is measured with, in the node of a lab, and a client's short connections.
//! Called by `wire` and `flood`; the server is this program again: `nodeguard-kernel-bench serve`.
//! Must never give one listener a process, threads or a buffer that the other one has not.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::Result;
pub(crate) use lab::traffic::{Ask, CHUNK, Conversation, NODE_CPU, OTHER_CPU, pin, pin_thread};
use lab::{
    lab::Lab,
    net::Who,
    process::{Process, command},
    traffic::{in_both, listen},
};
use nix::time::{ClockId, clock_gettime};
use socket2::SockRef;

/// Serves conversations at two ports, the first one guarded, and answers each connection at the next ports with a byte after this much work.
/// The process starts in the guarded cgroup.
pub(crate) fn serve(address: IpAddr, ports: [u16; 2], work: Duration, beside: &Path) -> Result<()> {
    pin(NODE_CPU)?;
    let conversations = in_both(beside, |which| {
        let port = ports[which];
        let connections = listen((address, port + 1).into())?;
        // Longer than the library's default: the flood must not fill the queue of the allowed.
        SockRef::from(&connections).listen(4096)?;
        thread::spawn(move || connections.incoming().flatten().for_each(|stream| answer(stream, work)));
        listen((address, port).into())
    })?;
    lab::traffic::serve(conversations)
}

/// A client that is gone already is no error.
fn answer(mut stream: TcpStream, work: Duration) {
    let until = busy().map(|now| now + work);
    while until.zip(busy()).is_some_and(|(until, now)| now < until) {}
    let _ = stream.write_all(b"!");
}

/// The processor time that this thread had so far.
fn busy() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

/// Starts the server in the node and waits until it listens. Nothing ordinary disturbs it.
pub(crate) fn start(lab: &Lab, ports: [u16; 2], work: Duration) -> Result<Process> {
    let mut serve = command(&std::env::current_exe()?, lab.net.open(Who::Node)?, lab.guarded())?;
    serve.args(["serve", "0.0.0.0"]).args(ports.map(|port| port.to_string()));
    serve.arg(work.as_micros().to_string()).arg(lab.guarded().with_file_name("elsewhere"));
    Process::start_ready("server", serve, &lab.directory.join("serve.log"))
}

/// How long a client waits for a connection, and again for the answer: far less than the second after which a lost SYN is sent again.
const PATIENCE: Duration = Duration::from_millis(20);

/// Opens a connection and ends it when it is answered; whether it was.
pub(crate) fn connection(to: SocketAddr) -> bool {
    let answered = TcpStream::connect_timeout(&to, PATIENCE).and_then(|mut stream| {
        // Ended with a RST: no port waits.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_exact(&mut [0])
    });
    answered.is_ok()
}
