//! Owns the demo: the main job in a lab, line by line. Also what the lab runs inside the node and pods (`helper`).
//! Called by `cargo xtask demo`, and by the lab for its helpers.
//! Must never end well with a line that is not as expected.

use std::{sync::mpsc, time::Duration};

use anyhow::{Result, bail, ensure};
use lab::{
    bench::print_line,
    daemon::binary,
    helper,
    lab::{Lab, POLICY},
    main_job::main_job,
    net::Who,
    table::Table,
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("helper") => helper::main(arguments.get(1..).unwrap_or_default()),
        Some("--stay") => demo(true),
        None => demo(false),
        Some(other) => bail!("no such option: {other}"),
    }
}

fn demo(stay: bool) -> Result<()> {
    print_line(
        "\nA control plane with the real proxy-server, a node with nodeguard and a kubelet, a pod, a stranger, a peer of an allowed\n\
        network and one that is excepted: six network namespaces of their own, nothing outside is touched.\n",
    )?;
    let mut lab = Lab::new(POLICY)?;
    let mut table = Table::new(None)?;
    main_job(&mut lab, &mut table)?;
    print_line(&format!("\n$ nodeguard status\n{}", lab.daemon()?.said("status", &[])?.text()))?;
    if stay {
        keep(&mut lab)?;
    }
    let (_, other) = table.sum()?;
    ensure!(other.is_empty(), "{} lines are not as expected", other.len());
    Ok(())
}

/// Prints what to try and waits for ctrl-c.
fn keep(lab: &mut Lab) -> Result<()> {
    let [stranger, peer] =
        [Who::Stranger, Who::Peer].map(|who| format!("nsenter --net=/run/netns/{}", lab.net.namespace(who)));
    let (nodeguard, directory, policy) = (binary()?, lab.directory.display(), lab.policy());
    let (ca, socket) = (lab.certs.path("ca.crt"), &lab.server()?.socket);
    print_line(&format!(
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
    ))?;
    let (stop, stopped) = mpsc::channel();
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(tokio::signal::ctrl_c())?;
        Ok(stop.send(())?)
    });
    while stopped.recv_timeout(Duration::from_secs(1)).is_err() {
        lab.daemon()?.process.check()?;
    }
    Ok(())
}
