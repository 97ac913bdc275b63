//! Owns the demo: the main job in a lab, line by line. Also what the lab runs inside the node and pods (`helper`).
//! Called by `cargo xtask demo`, and by the lab for its helpers.
//! Must never end well with a line that is not as expected.

use std::{
    io::{Write, stdout},
    process::ExitCode,
    sync::mpsc,
    time::Duration,
};

use anyhow::Result;
use lab::{
    daemon::binary,
    helper,
    lab::{Lab, POLICY},
    main_job::{Line, main_job},
    net::Who,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some("helper") => helper::main(arguments.get(1..).unwrap_or_default()).map(|()| true),
        Some("--stay") => demo(true),
        None => demo(false),
        Some(other) => Err(anyhow::anyhow!("no such option: {other}")),
    };
    outcome.map_or_else(
        |error| {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        },
        |as_expected| if as_expected { ExitCode::SUCCESS } else { ExitCode::FAILURE },
    )
}

fn demo(stay: bool) -> Result<bool> {
    let mut out = stdout();
    out.write_all(
        b"\nA control plane with the real proxy-server, a node with nodeguard and a kubelet, a pod, a stranger, a peer of an allowed\n\
          network and one that is excepted: six network namespaces of their own, nothing outside is touched.\n\n",
    )?;
    let mut lab = Lab::new(POLICY)?;
    print_line(["WHO", "TO", "WAY", "EXPECTED", "SEEN", "REASON", "OK"])?;
    let lines = main_job(&mut lab, |Line { who, to, way, expected, seen, reason, ok }| {
        let reason = if reason.is_empty() { "-" } else { reason };
        print_line([who, to, way, expected, seen, reason, if *ok { "yes" } else { "NO" }])
    })?;
    writeln!(out, "\n$ nodeguard status\n{}", lab.daemon()?.status_text()?)?;
    if stay {
        keep(&mut lab)?;
    }
    let expected = lines.iter().filter(|line| line.ok).count();
    writeln!(out, "{expected} of {} as expected", lines.len())?;
    Ok(expected == lines.len())
}

/// A line of the table, at once: the next attempt takes a moment.
fn print_line([who, to, way, expected, seen, reason, ok]: [&str; 7]) -> Result<()> {
    let mut out = stdout();
    writeln!(out, "{who:<22} {to:<32} {way:<8} {expected:<30} {seen:<14} {reason:<18} {ok}")?;
    Ok(out.flush()?)
}

/// Prints what to try and waits for ctrl-c.
fn keep(lab: &mut Lab) -> Result<()> {
    let [stranger, peer] =
        [Who::Stranger, Who::Peer].map(|who| format!("nsenter --net=/run/netns/{}", lab.net.namespace(who)));
    let (nodeguard, directory, policy) = (binary()?, lab.directory.display(), lab.policy());
    let (ca, socket) = (lab.certs.path("ca.crt"), &lab.server()?.socket);
    writeln!(
        stdout(),
        r"The lab stays until ctrl-c. In another shell, as root:

  # the stranger: no answer
  {stranger} curl -m 2 -k https://10.0.0.2:10250/healthz
  # the allowed peer: ok
  {peer} curl -m 2 --cacert {} https://10.0.0.2:10250/healthz
  # a dial as the API server makes it
  printf 'CONNECT 10.244.1.2:8080 HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n' | socat -t 2 - UNIX-CONNECT:{}
  # edits come into force by themselves
  $EDITOR {}
  {} status --admin-socket {directory}/admin.sock
  tail -f {directory}/nodeguard.log
",
        ca.display(),
        socket.display(),
        policy.display(),
        nodeguard.display(),
    )?;
    let (stop, stopped) = mpsc::channel();
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(tokio::signal::ctrl_c())?;
        Ok(stop.send(())?)
    });
    while stopped.recv_timeout(Duration::from_secs(1)).is_err() {
        lab.daemon()?.process().check()?;
    }
    Ok(())
}
