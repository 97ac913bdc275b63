//! Owns what the guard costs traffic that it lets through: established connections, both ways and by requests, and new connections.
//! Called by `main`, and by `flood` for the server in the node of a lab; the server is this program again: `nodeguard-kernel-bench serve`.
//! Must never compare listeners that differ in more than the guard: same process, threads and buffers, one in the guarded cgroup, one beside it.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use lab::{
    bench::{Goal, Pairs, Row, progress, round_of},
    lab::Lab,
    net::Who,
    process::{Process, command},
    traffic::{self, CHUNK, KINDS, NODE_CPU, OTHER_CPU, connect, in_both, listen, pin},
};
use nix::time::{ClockId, clock_gettime};
use socket2::SockRef;

use crate::{
    Amount,
    prefixes::{PORT, document},
    undisturbed,
};

/// The listener without the guard.
pub(crate) const FREE_PORT: u16 = 20_250;
/// How long new connections are opened in a turn.
const SLICE: Duration = Duration::from_millis(10);
/// How long a client waits for a connection, and again for the answer: far less than the second after which a lost SYN is sent again.
const PATIENCE: Duration = Duration::from_millis(20);

/// Serves conversations at the guarded port and at the free one, and answers each connection at the next ports with a byte after this much
/// work. The process starts in the guarded cgroup.
pub(crate) fn serve(work: Duration, beside: &Path) -> Result<()> {
    pin(NODE_CPU)?;
    let conversations = in_both(beside, |which| {
        let at = |next: u16| listen((Ipv4Addr::UNSPECIFIED, [PORT, FREE_PORT][which] + next).into());
        let connections = at(1)?;
        // Longer than the library's default: the flood must not fill the queue of the allowed.
        SockRef::from(&connections).listen(4096)?;
        thread::spawn(move || connections.incoming().flatten().for_each(|stream| answer(stream, work)));
        at(0)
    })?;
    traffic::serve(conversations)
}

/// A client that is gone already is no error.
fn answer(mut stream: TcpStream, work: Duration) {
    // The processor time that this thread had so far.
    let busy = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from);
    let until = busy().map(|now| now + work);
    while until.zip(busy()).is_some_and(|(until, now)| now < until) {}
    let _ = stream.write_all(b"!");
}

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

/// A lab with the guard, and the server, which works so long for each new connection. Nothing ordinary disturbs it.
pub(crate) fn lab_with(text: &str, work: Duration) -> Result<(Lab, Process)> {
    let mut lab = Lab::bare()?;
    lab.write_policy(text)?;
    lab.start_daemon()?;
    let mut serve = command(&std::env::current_exe()?, lab.net.open(Who::Node)?, &lab.guarded)?;
    serve.args(["serve", &work.as_micros().to_string()]).arg(lab.guarded.with_file_name("elsewhere"));
    let server = Process::start_ready("server", serve, &lab.directory.join("serve.log"))?;
    Ok((lab, server))
}

pub(crate) fn measure(amount: Amount) -> Result<Vec<Row>> {
    let (lab, _server) = lab_with(&document(&["10.0.8.0/24".parse()?]), Duration::ZERO)?;
    lab.net.run(Who::Peer, || {
        pin(OTHER_CPU)?;
        undisturbed(true)?;
        let [guarded, free] = [PORT, FREE_PORT].map(|port| Who::Node.at(false, port));
        let mut sides = [connect(guarded)?, connect(free)?];
        let mut buffer = vec![0; CHUNK];
        let mut rows = Vec::new();
        let names = ["throughput to the node", "throughput from the node", "requests and answers"];
        for (kind, what) in KINDS.iter().zip(names) {
            let turn = |side: usize| kind.turn(&mut sides[side], &mut buffer);
            rows.push(rounds(amount, &format!("established: {what}"), kind.unit, Some(("at least", 0.99)), turn)?);
        }
        rows.push(rounds(amount, "new connections", "1/s", None, |side| {
            let at = Who::Node.at(false, [PORT, FREE_PORT][side] + 1);
            let (started, mut count) = (Instant::now(), 0);
            while started.elapsed() < SLICE {
                count += u32::from(connection(at));
            }
            Ok((count.into(), started.elapsed()))
        })?);
        Ok(rows)
    })
}

/// Both sides, with the guard and without, in turns that say how much they did in what time.
fn rounds(
    amount: Amount,
    what: &str,
    unit: &'static str,
    goal: Goal,
    mut turn: impl FnMut(usize) -> Result<(f64, Duration)>,
) -> Result<Row> {
    let what = format!("{what}, with | without");
    progress(&what);
    let mut pairs = Pairs::default();
    for round in 0..amount.rounds {
        pairs.add(round_of(Duration::from_secs_f64(amount.seconds * 2.0), round, &mut turn)?);
    }
    Ok(pairs.row(what, unit, goal))
}
