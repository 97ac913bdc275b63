//! One record for every dial, whatever becomes of it; and the file that they go to.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lab::{
    bare::{Place, Who, ours},
    load::serve,
    process::Process,
    servers::{
        eventually,
        fake::{Agent, Fake, Manners, close, close_dial, data, dial},
    },
};
use nix::sys::signal::Signal;
use nodeguard::wire::frames::{DialRequest, Packet, Payload};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use crate::{
    PORT,
    dropin::{OURS, get},
    in_place, soak,
};

const POLICY: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata: {name: audit}
spec:
  mode: Enforce
  guard: []
  tunnel:
    dial:
      - node: {ports: [10250]}
      - pods: {cidrs: [10.0.0.0/24], ports: [7000-7004]}
      - {pods: {cidrs: [10.0.0.0/24], ports: [7005]}, tls: Required}
";

/// A random of each dial, so that a record's dial is known by its port or name.
struct Server {
    agent: Agent,
    next: i64,
}

impl Server {
    async fn send(&self, packet: Packet) {
        let _ = self.agent.outbound.send(Ok(packet)).await;
    }

    async fn dial(&mut self, address: &str) -> i64 {
        self.next += 1;
        self.send(dial(address, self.next)).await;
        self.next
    }

    /// Opens a dial.
    async fn open(&mut self, address: &str) -> Result<i64> {
        self.next += 1;
        self.agent.open(address, self.next).await
    }
}

/// The records of a file.
fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"))).collect()
}

async fn records_become(path: &Path, count: usize) -> Result<Vec<Value>> {
    let what = format!("{count} records");
    let become_so = eventually(&what, Duration::from_secs(10), async || Ok(records(path).len() >= count));
    become_so.await.with_context(|| format!("{:#?}", records(path)))?;
    // One record too many would come a moment later.
    sleep(Duration::from_millis(200)).await;
    let records = records(path);
    ensure!(records.len() == count, "{} records of {count} dials", records.len());
    Ok(records)
}

fn text<'a>(record: &'a Value, field: &str) -> &'a str {
    record.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn run(test: impl AsyncFnOnce(&Place, PathBuf) -> Result<()> + Send) {
    in_place(&[], async |place| test(place, place.directory.join("audit.log")).await);
}

async fn connected(fake: &mut Fake) -> Result<Server> {
    Ok(Server { agent: fake.agent().await?, next: 0 })
}

/// An address that neither answers nor refuses: a listener whose queue is full.
async fn silent(address: SocketAddr) -> Result<(TcpListener, Vec<TcpStream>)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(address)?;
    let listener = socket.listen(1)?;
    let mut held = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
        held.push(stream?);
        ensure!(held.len() < 64, "the queue does not fill");
    }
    Ok((listener, held))
}

fn start(place: &Place, file: &Path) -> Result<Process> {
    ours(place, PORT, POLICY, &["--audit-file", &file.display().to_string(), "--drain-timeout=1s"])
}

#[test]
fn every_end_of_a_dial_has_one_record() {
    run(async |place, file| {
        let node = Who::Ours.address();
        let at = |port: u16| format!("{node}:{port}");
        serve((node, 7000)).await?;
        serve((node, 7001)).await?;
        serve((node, 7005)).await?;
        let closing = TcpListener::bind((node, 7002)).await?;
        tokio::spawn(async move {
            while let Ok((stream, _)) = closing.accept().await {
                drop(stream)
            }
        });
        let _silent = silent(at(7003).parse()?).await?;
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let mut process = start(place, &file)?;
        let mut server = connected(&mut fake).await?;

        // Before there is an answer.
        let mut expected = Vec::new();
        for (address, verdict, reason, answer) in [
            ("10.9.9.9:80".to_owned(), "refused", "address-not-named", "502"),
            ("10.9.9.9:10250".to_owned(), "refused", "another-node", "--proxy-strategies=destHost"),
            (at(22), "refused", "port-not-named", "other ports only"),
            ("127.0.0.1:7000".to_owned(), "refused", "loopback", "loopback"),
            ("no address".to_owned(), "refused", "malformed", "not host:port"),
            (at(7004), "failed", "connection-refused", "connection refused"),
            ("no-such.example:7000".to_owned(), "failed", "no-such-host", "no such host"),
        ] {
            let random = server.dial(&address).await;
            let error = server.agent.answer(random).await?.err().context("it was admitted")?;
            ensure!(answer == "502" || error.contains(answer), "{address}: {error}");
            expected.push((verdict, reason));
        }
        server.next += 1;
        let request = DialRequest { protocol: "udp".to_owned(), address: at(7000), random: server.next };
        server.send(Packet { kind: 0, payload: Some(Payload::DialRequest(request)) }).await;
        server.agent.answer(server.next).await?.err().context("udp was admitted")?;
        expected.push(("refused", "protocol"));
        let random = server.dial(&at(7003)).await;
        sleep(Duration::from_millis(100)).await;
        server.send(close_dial(random)).await;
        expected.push(("abandoned", "control-plane-gave-up"));

        // Open ones, and each way to end.
        let id = server.open(&at(7000)).await?;
        server.send(data(id, Bytes::from_static(b"SOURCE 1000\n"))).await;
        sleep(Duration::from_millis(100)).await;
        server.send(close(id)).await;
        expected.push(("admitted", "control-plane-closed"));
        server.open(&at(7002)).await?;
        expected.push(("admitted", "backend-closed"));
        let id = server.open(&at(7005)).await?;
        server.send(data(id, Bytes::from_static(b"GET / HTTP/1.1\r\n"))).await;
        expected.push(("admitted", "not-tls"));
        records_become(&file, expected.len()).await?;
        // An edit of the policy ends the one and leaves the other.
        server.open(&at(7001)).await?;
        let kept = server.open(&at(7000)).await?;
        std::fs::write(place.directory.join("policy.yaml"), POLICY.replace("7000-7004", "7000, 7002-7004"))?;
        expected.push(("admitted", "policy-changed"));
        records_become(&file, expected.len()).await?;
        // The stream ends under an open one and one under way.
        server.send(data(kept, Bytes::from_static(b"SOURCE 10\n"))).await;
        server.dial(&at(7003)).await;
        sleep(Duration::from_millis(100)).await;
        drop(server);
        expected.extend([("admitted", "tunnel-lost"), ("abandoned", "tunnel-lost")]);
        records_become(&file, expected.len()).await?;
        // And the guard ends.
        let mut server = connected(&mut fake).await?;
        server.open(&at(7000)).await?;
        process.signal(Signal::SIGTERM)?;
        ensure!(process.wait(Duration::from_secs(15))?.success(), "{}", process.printed());
        expected.push(("admitted", "drained"));

        let records = records_become(&file, expected.len()).await?;
        let mut have: Vec<_> = records.iter().map(|record| (text(record, "verdict"), text(record, "reason"))).collect();
        have.sort_unstable();
        expected.sort_unstable();
        ensure!(have == expected, "have {have:?}\nwant {expected:?}");
        let of =
            |reason: &str| records.iter().find(|record| text(record, "reason") == reason).context(reason.to_owned());
        let closed = of("control-plane-closed")?;
        ensure!(closed["toBackend"] == 12 && closed["toControlPlane"] == 1000, "{closed}");
        ensure!(text(closed, "dialled") == at(7000) && text(closed, "rule") == "tunnel.dial[1]", "{closed}");
        ensure!(text(closed, "server") == "fake" && text(closed, "requested") == at(7000), "{closed}");
        ensure!(closed["milliseconds"].as_u64() >= Some(100) && text(closed, "time").ends_with('Z'), "{closed}");
        ensure!(of("not-tls")?["toBackend"] == 0, "{}", of("not-tls")?);
        ensure!(text(of("another-node")?, "dialled") == "10.9.9.9:10250" && of("another-node")?["rule"].is_null());
        ensure!(text(of("malformed")?, "requested") == "no address" && of("malformed")?["dialled"].is_null());
        // The log has them too.
        let printed = process.printed();
        let lines = printed.lines().filter(|line| line.contains("audit: dial ")).count();
        ensure!(lines == records.len(), "{lines} lines in the log for {} records", records.len());
        println!("audit: {} dials, each with one record and one line in the log", records.len());
        Ok(())
    });
}

#[test]
fn a_storm_of_dials_has_as_many_records() {
    let dials = if soak() { 20_000 } else { 2000 };
    run(async |place, file| {
        let node = Who::Ours.address();
        serve((node, 7000)).await?;
        let _silent = silent(format!("{node}:7003").parse()?).await?;
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let process = start(place, &file)?;
        let server = connected(&mut fake).await?;
        let Server { agent: Agent { mut inbound, outbound, .. }, .. } = server;
        // Every answered dial is closed, in whatever order it comes.
        let closer = outbound.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(packet)) = inbound.message().await {
                if let Some(Payload::DialResponse(answer)) = packet.payload
                    && answer.error.is_empty()
                {
                    let _ = closer.send(Ok(close(answer.connect_id))).await;
                }
            }
        });
        let mut random = StdRng::seed_from_u64(5);
        for number in 0..dials {
            let port = [7000, 7000, 7003, 7004, 22][random.random_range(0..5)];
            outbound.send(Ok(dial(&format!("{node}:{port}"), number))).await?;
            if random.random_bool(0.3) {
                outbound.send(Ok(close_dial(random.random_range(0..=number)))).await?;
            }
        }
        // What still hangs is taken back; the others have their end.
        for number in 0..dials {
            outbound.send(Ok(close_dial(number))).await?;
        }
        let records = records_become(&file, usize::try_from(dials)?).await?;
        reader.abort();
        let mut kinds = BTreeMap::<_, usize>::new();
        for record in &records {
            *kinds.entry(format!("{} {}", text(record, "verdict"), text(record, "reason"))).or_default() += 1;
        }
        ensure!(kinds.len() >= 4, "{kinds:?}");
        // Moved away by a tool that then says so: there is a new file before there is a new record.
        std::fs::rename(&file, file.with_extension("old"))?;
        process.signal(Signal::SIGHUP)?;
        eventually("a new file after SIGHUP", Duration::from_secs(5), async || Ok(file.exists())).await?;
        println!("audit: {dials} dials in a storm, {} records: {kinds:?}", records.len());
        Ok(())
    });
}

#[test]
fn a_file_that_cannot_be_written_is_told_and_holds_up_no_dial() {
    run(async |place, _| {
        let node = Who::Ours.address();
        let file = place.directory.join("missing/audit.log");
        serve((node, 7000)).await?;
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let process = start(place, &file)?;
        let mut server = connected(&mut fake).await?;
        let told = async |lines: [&str; 3]| -> Result<()> {
            let mut text = String::new();
            let told = eventually("the metrics", Duration::from_secs(5), async || {
                text = get(OURS, "/metrics")?.2;
                Ok(lines.iter().all(|line| text.lines().any(|have| have == *line)))
            });
            told.await.with_context(|| format!("not {lines:?}:\n{text}")).map(drop)
        };
        let written = |count: u32| format!("nodeguard_audit_file_records_total{{result=\"written\"}} {count}");
        let lost = |count: u32| format!("nodeguard_audit_file_records_total{{result=\"lost\"}} {count}");
        for _ in 0..5 {
            let id = server.open(&format!("{node}:7000")).await?;
            server.send(close(id)).await;
        }
        told([&written(0), &lost(5), "nodeguard_audit_file_failing 1"]).await?;
        told(["nodeguard_weakened 2", &lost(5), "nodeguard_audit_file_failing 1"]).await?;
        ensure!(process.printed().contains("ERROR") && process.printed().contains("cannot be written; dials go on"));
        std::fs::create_dir(place.directory.join("missing"))?;
        let id = server.open(&format!("{node}:7000")).await?;
        server.send(close(id)).await;
        told([&written(1), &lost(5), "nodeguard_audit_file_failing 0"]).await?;
        ensure!(records(&file).len() == 1);
        Ok(())
    });
}
