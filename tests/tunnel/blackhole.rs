//! A way to the server that swallows packets without a word: the stream is given up in time, and the tunnel comes back.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{
    client::{Stream, through, timed_out},
    daemon::{StreamPhase, stream},
    lab::{BYTES, Lab, POLICY},
    net::{SWITCH, Who, ip, name},
    process::{run_tool, until},
};

/// After so much silence the kernel gives up, having asked several times (`docs/konnectivity.md`).
const GIVEN_UP: Duration = Duration::from_secs(20);
/// A hole that swallows the first probes of an idle stream, but not the last.
const FLEETING: Duration = Duration::from_secs(16);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(5);
/// The wait between attempts, one that is under way while the way comes back, and the second between two looks of TCP at a lost SYN.
const BACK: Duration = Duration::from_secs(10);

/// Netfilter drops whatever comes to the control plane, or no more.
fn swallow(lab: &Lab, on: bool) -> Result<()> {
    let rules = if on {
        "add table inet hole\nadd chain inet hole in { type filter hook input priority 0; policy drop; }\n"
    } else {
        "delete table inet hole\n"
    };
    lab.net.run(Who::ControlPlane, || run_tool("nft", &["-f", "-"], rules)).map(drop)
}

/// The control plane's port of the switch: nobody's link but its own goes down.
fn unplug(lab: &Lab, down: bool) -> Result<()> {
    ip(&["-n", &name(&lab.id, SWITCH), "link", "set", "to-cont", if down { "down" } else { "up" }], "")
}

/// What TCP knows of the node's and the control plane's connections.
fn sockets(lab: &Lab) -> String {
    let of = |who| {
        let options = ["--tcp", "--numeric", "--info", "--options", "--oneline"];
        lab.net.run(who, || run_tool("ss", &options, "")).unwrap_or_else(|error| format!("{error:#}"))
    };
    format!("node:\n{}control plane:\n{}", of(Who::Node), of(Who::ControlPlane))
}

fn is_connected(lab: &mut Lab) -> Result<bool> {
    Ok(stream(&lab.daemon()?.status()?).state == StreamPhase::Connected)
}

/// What dials the endpoint through the tunnel.
fn dial(lab: &Lab) -> Result<Box<dyn Stream>> {
    let bytes = SocketAddr::new(Who::Node.v4().into(), BYTES).to_string();
    through(lab.server()?, &bytes).map_err(|outcome| anyhow::anyhow!("{outcome:?}"))
}

/// A lab whose daemon carries one dial.
fn with_an_open_dial() -> Result<(Lab, Box<dyn Stream>)> {
    let mut lab = Lab::new(POLICY)?;
    let open = dial(&lab)?;
    until("a dial is open", Duration::from_secs(5), || {
        Ok(lab.daemon()?.status()?.dials.is_some_and(|dials| dials.open == 1))
    })?;
    Ok((lab, open))
}

/// Whether a reader stays. One that hung up when its time-out is over would make the server speak, and the silence counts anew from there.
fn goes_on(read: std::io::Result<usize>) -> bool {
    read.map_or_else(|error| timed_out(&error), |count| count > 0)
}

/// How long the stream lived on, and how long the tunnel took to be back; what was open through it has ended meanwhile.
fn given_up_and_back(hole: fn(&Lab, bool) -> Result<()>, busy: bool) -> Result<(Duration, Duration)> {
    let (mut lab, mut open) = with_an_open_dial()?;
    let mut buffer = vec![0; 64 << 10];
    if busy {
        // More than is through when the way ends: bytes are then under way that nobody acknowledges.
        writeln!(open, "GET {} 1", 256 << 20)?;
        for _ in 0..64 {
            ensure!(open.read(&mut buffer)? > 0, "the endpoint hung up");
        }
    }
    let reading = std::thread::spawn(move || while goes_on(open.read(&mut buffer)) {});
    hole(&lab, true)?;
    let started = Instant::now();
    until("the stream is given up", GIVEN_UP + SLACK, || Ok(!is_connected(&mut lab)?))
        .map_err(|error| error.context(sockets(&lab)))?;
    let gone = started.elapsed();
    let said = stream(&lab.daemon()?.status()?).last_error.unwrap_or_default();
    ensure!(said.contains("the stream ended") || said.contains("cannot connect") || said.is_empty(), "{said}");
    until("what was open has ended", Duration::from_secs(6), || {
        Ok(lab.daemon()?.status()?.dials.is_some_and(|dials| dials.open == 0))
    })?;
    hole(&lab, false)?;
    let healed = Instant::now();
    until("the tunnel is back", BACK + SLACK, || is_connected(&mut lab))?;
    let back = healed.elapsed();
    until("a dial is answered again", Duration::from_secs(10), || Ok(dial(&lab).is_ok()))?;
    ensure!(lab.daemon()?.printed().contains("tunnel lost"), "no line of the log says so");
    drop(lab);
    reading.join().map_err(|_| anyhow::anyhow!("the reader"))?;
    Ok((gone, back))
}

#[test]
fn a_server_behind_a_filter_that_drops_is_given_up() {
    let (gone, back) = given_up_and_back(swallow, false).context("netfilter").unwrap();
    println!(
        "blackhole: packets dropped by netfilter, stream idle: given up after {gone:.1?}; back {back:.1?} after it was mended"
    );
}

#[test]
fn a_server_whose_link_is_down_is_given_up() {
    let (gone, back) = given_up_and_back(unplug, true).context("link").unwrap();
    println!(
        "blackhole: link down, bytes on their way: given up after {gone:.1?}; back {back:.1?} after it was mended"
    );
}

#[test]
fn an_idle_stream_outlives_the_loss_of_a_few_probes() {
    let outlives = || -> Result<()> {
        let (mut lab, open) = with_an_open_dial()?;
        swallow(&lab, true)?;
        std::thread::sleep(FLEETING);
        swallow(&lab, false)?;
        std::thread::sleep(GIVEN_UP + SLACK - FLEETING);
        ensure!(is_connected(&mut lab)?, "{}", lab.daemon()?.printed());
        ensure!(
            lab.daemon()?.status()?.dials.is_some_and(|dials| dials.open == 1)
                && !lab.daemon()?.printed().contains("tunnel lost")
        );
        drop(open);
        Ok(())
    };
    outlives().unwrap();
}
