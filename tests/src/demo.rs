//! The demo: the main job in a lab, line by line. Also what the lab runs inside the node and pods (`helper`).

use std::{io::Write, process::ExitCode, sync::mpsc, time::Duration};

use anyhow::Result;
use lab::{
    attempts::{Line, main_job},
    helper,
    lab::{Lab, POLICY},
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
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(stay: bool) -> Result<bool> {
    let mut out = std::io::stdout();
    writeln!(
        out,
        "\nA control plane with the real proxy-server, a node with nodeguard and a kubelet, a pod, a stranger, a peer of an allowed"
    )?;
    writeln!(
        out,
        "network and one that is excepted: six network namespaces of their own, nothing outside is touched.\n"
    )?;
    let mut lab = Lab::new(POLICY)?;
    writeln!(out, "{:<22} {:<32} {:<8} {:<30} {:<14} {:<18} OK", "WHO", "TO", "WAY", "EXPECTED", "SEEN", "REASON")?;
    let lines = main_job(&mut lab, |Line { who, to, way, expected, seen, reason, ok }| {
        let reason = if reason.is_empty() { "-" } else { reason };
        writeln!(
            out,
            "{who:<22} {to:<32} {way:<8} {expected:<30} {seen:<14} {reason:<18} {}",
            if *ok { "yes" } else { "NO" }
        )?;
        Ok(out.flush()?)
    })?;
    writeln!(out, "\n$ nodeguard status\n{}", lab.daemon()?.status_text()?)?;
    let expected = lines.iter().filter(|line| line.ok).count();
    if stay {
        keep(&mut lab, &mut out)?;
    }
    writeln!(out, "{expected} of {} as expected", lines.len())?;
    Ok(expected == lines.len())
}

/// Prints what to try and waits for ctrl-c.
fn keep(lab: &mut Lab, out: &mut impl Write) -> Result<()> {
    let namespace = |who: Who| format!("nsenter --net=/run/netns/{}", lab.net.namespace(who));
    let (binary, directory) = (lab::daemon::binary()?, lab.directory.display().to_string());
    let ca = lab.certs.path("ca.crt").display().to_string();
    let socket = lab.server()?.socket.display().to_string();
    writeln!(out, "The lab stays until ctrl-c. In another shell, as root:\n")?;
    writeln!(
        out,
        "  # the stranger: no answer\n  {} curl -m 2 -k https://10.0.0.2:10250/healthz",
        namespace(Who::Stranger)
    )?;
    writeln!(
        out,
        "  # the allowed peer: ok\n  {} curl -m 2 --cacert {ca} https://10.0.0.2:10250/healthz",
        namespace(Who::Peer)
    )?;
    writeln!(
        out,
        "  # a dial as the API server makes it\n  printf 'CONNECT 10.244.1.2:8080 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\nGET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' | socat -t 2 - UNIX-CONNECT:{socket}"
    )?;
    writeln!(out, "  # edits come into force by themselves\n  $EDITOR {}", lab.policy().display())?;
    writeln!(out, "  {} status --admin-socket {directory}/admin.sock", binary.display())?;
    writeln!(out, "  tail -f {directory}/nodeguard.log\n")?;
    out.flush()?;
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
