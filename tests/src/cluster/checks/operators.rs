//! Owns what operators do through the API server: its proxies, logs, exec, attach, port-forward, cp.
//! Called by `checks`, for each egress protocol and each streaming protocol.
//! Must never trust a transfer: each has its checksum.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::client::{Digest, pattern};

use crate::{
    control::Egress,
    install::Cluster,
    kubectl::{Stream, finish},
    node::NAME,
    place::Where,
    table::Table,
};

/// Long enough for a transfer on a machine that others use too.
const LONG: Duration = Duration::from_secs(90);

/// What goes through the API server's proxies.
pub(crate) fn proxies(cluster: &Cluster<'_>, egress: Egress, table: &mut Table) -> Result<()> {
    let node = format!("/api/v1/nodes/{NAME}/proxy");
    for (path, holds) in
        [("healthz", "ok"), ("pods", "\"kind\":\"PodList\""), ("stats/summary", "\"node\""), ("metrics", "# TYPE")]
    {
        table.check("kubectl", &format!("nodes/proxy {path}"), egress, "answered", || {
            let said = cluster.kubectl.run(&["get", "--raw", &format!("{node}/{path}")])?;
            ensure!(said.contains(holds), "no {holds} in {} bytes", said.len());
            Ok("answered".to_owned())
        })?;
    }
    for (what, path) in [
        ("pods/proxy, 20 MB", "/api/v1/namespaces/default/pods/web:8080/proxy/bytes"),
        ("services/proxy, 20 MB", "/api/v1/namespaces/default/services/web:80/proxy/bytes"),
    ] {
        table.check("kubectl", what, egress, "20000000 bytes, equal", || {
            let said = cluster.kubectl.all(Stream::WebSocket, &["get", "--raw", path], Vec::new(), LONG)?;
            ensure!(said.code == 0, "{}", said.error);
            same_bytes(cluster, &said.out)
        })?;
    }
    Ok(())
}

/// What is upgraded to a stream.
pub(crate) fn streams(cluster: &Cluster<'_>, egress: Egress, stream: Stream, table: &mut Table) -> Result<()> {
    let by = format!("{egress}, {}", stream.name());
    let kubectl = |arguments: &[&str], input: Vec<u8>| cluster.kubectl.all(stream, arguments, input, LONG);
    // Logs are plain HTTP whatever the stream is.
    if stream == Stream::WebSocket {
        table.check("kubectl", "logs", egress, "lines", || {
            let said = kubectl(&["logs", "web", "-c", "ticks", "--tail=3"], Vec::new())?;
            ensure!(said.text() == "tick\ntick\ntick\n", "{:?} {}", said.text(), said.error);
            Ok("lines".to_owned())
        })?;
        table.check("kubectl", "logs -f, as they are written", egress, "lines", || follow(cluster))?;
    }
    table.check("kubectl", "exec, exit code", &by, "exit code 7", || {
        let said = kubectl(&["exec", "web", "-c", "web", "--", "sh", "-c", "exit 7"], Vec::new())?;
        Ok(format!("exit code {}", said.code))
    })?;
    table.check("kubectl", "exec, 5 MB on stdin", &by, "equal", || {
        let bytes = pattern(5, 5_000_000);
        let said = kubectl(&["exec", "-i", "web", "-c", "web", "--", "sha256sum"], bytes.clone())?;
        let sum = sum(&bytes);
        ensure!(said.text().starts_with(&sum), "the pod read {:?} {}, sent was {sum}", said.text(), said.error);
        Ok("equal".to_owned())
    })?;
    table.check("kubectl", "attach", &by, "lines", || attach(cluster, stream))?;
    table.check("kubectl", "port-forward, 20 MB", &by, "20000000 bytes, equal", || forward(cluster, stream))?;
    table.check("kubectl", "cp there and back, 3 MB", &by, "equal", || copy(cluster, stream))
}

/// Many at once.
pub(crate) fn crowd(cluster: &Cluster<'_>, egress: Egress, stream: Stream, table: &mut Table) -> Result<()> {
    let by = format!("{egress}, {}", stream.name());
    table.check("kubectl", "50 execs at once", &by, "50 answered", || many(cluster, stream))
}

/// SHA-256 in hexadecimal.
fn sum(bytes: &[u8]) -> String {
    let mut digest = Digest::default();
    digest.update(bytes);
    digest.finish().split(' ').nth(1).unwrap_or_default().to_owned()
}

/// Whether these are the bytes that the pod serves.
fn same_bytes(cluster: &Cluster<'_>, bytes: &[u8]) -> Result<String> {
    let said = cluster.kubectl.run(&["exec", "web", "-c", "web", "--", "sha256sum", "/www/bytes"])?;
    let same = said.starts_with(&sum(bytes));
    Ok(format!("{} bytes, {}", bytes.len(), if same { "equal" } else { "other ones" }))
}

/// A log that is followed comes line by line, not at its end.
fn follow(cluster: &Cluster<'_>) -> Result<String> {
    let mut command = cluster.kubectl.command(Stream::WebSocket, &["logs", "-f", "web", "-c", "ticks", "--tail=1"])?;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("stdout")?);
    let (mut first, mut count) = (None, 0);
    for line in lines.lines() {
        ensure!(line? == "tick", "another line");
        first.get_or_insert_with(Instant::now);
        count += 1;
        if count == 10 {
            break;
        }
    }
    child.kill()?;
    child.wait()?;
    let over = first.map(|first| first.elapsed()).unwrap_or_default();
    // Ten lines, a fifth of a second apart.
    ensure!(count == 10 && over > Duration::from_millis(900), "{count} lines over {over:?}");
    Ok(format!("lines ({count} over {:.1} s)", over.as_secs_f64()))
}

fn attach(cluster: &Cluster<'_>, stream: Stream) -> Result<String> {
    let mut command = cluster.kubectl.command(stream, &["attach", "web", "-c", "ticks"])?;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("stdout")?);
    let ticks = lines.lines().map_while(Result::ok).take(3).filter(|line| line == "tick").count();
    child.kill()?;
    child.wait()?;
    ensure!(ticks == 3, "{ticks} lines");
    Ok("lines".to_owned())
}

fn forward(cluster: &Cluster<'_>, stream: Stream) -> Result<String> {
    let mut command = cluster.kubectl.command(stream, &["port-forward", "pod/web", ":8080"])?;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    let fetched = (|| {
        // "Forwarding from 127.0.0.1:36193 -> 8080"
        let line = lines.next().context("port-forward said nothing")??;
        let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).context(line.clone())?;
        let port: u16 = port.parse()?;
        cluster.place.run(Where::Control, || get(port))
    })();
    child.kill()?;
    child.wait()?;
    same_bytes(cluster, &fetched?)
}

/// The file that the pod serves, over a forwarded port.
fn get(port: u16) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(b"GET /bytes HTTP/1.0\r\nHost: web\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").context("no HTTP answer")? + 4;
    Ok(answer.split_off(body))
}

fn copy(cluster: &Cluster<'_>, stream: Stream) -> Result<String> {
    let bytes = pattern(3, 3_000_000);
    let (there, back) = (cluster.place.directory.join("there"), cluster.place.directory.join("back"));
    std::fs::write(&there, &bytes)?;
    let (from, to) = (crate::pki::text(&there)?, crate::pki::text(&back)?);
    for arguments in [["cp", "-c", "web", &from, "web:/www/copy"], ["cp", "-c", "web", "web:/www/copy", &to]] {
        let said = cluster.kubectl.all(stream, &arguments, Vec::new(), LONG)?;
        ensure!(said.code == 0, "{}", said.error);
    }
    ensure!(std::fs::read(&back)? == bytes, "other bytes came back");
    std::fs::remove_file(&back)?;
    Ok("equal".to_owned())
}

/// Each answers with its own number.
fn many(cluster: &Cluster<'_>, stream: Stream) -> Result<String> {
    let one = |number: usize| -> Result<()> {
        let said = format!("echo {number}");
        let mut command = cluster.kubectl.command(stream, &["exec", "web", "-c", "web", "--", "sh", "-c", &said])?;
        let said = finish(&mut command, Vec::new(), LONG * 2)?;
        ensure!(said.text() == format!("{number}\n"), "{:?} {}", said.text(), said.error);
        Ok(())
    };
    let started = Instant::now();
    let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..50).map(|number| scope.spawn(move || one(number))).collect();
        all.into_iter().map(|each| each.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread crashed")))).collect()
    });
    let answered = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    let first = outcomes.into_iter().find_map(Result::err).map(|error| format!(", first error: {error:#}"));
    Ok(format!("{answered} answered{}", first.unwrap_or(format!(" (in {:.1?})", started.elapsed()))))
}
