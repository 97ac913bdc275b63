//! Owns what operators do through the API server: its proxies, logs, exec, attach, port-forward, cp.
//! Called by `checks`, for each egress protocol and each streaming protocol.
//! Must never trust a transfer: each has its checksum.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{
    client::pattern,
    cluster::{Cluster, Egress, NAME, Stream, Table, Where, sum, text},
};

/// Long enough for a transfer on a machine that others use too.
const LONG: Duration = Duration::from_secs(90);

/// What goes through the API server's proxies.
pub(crate) fn proxies(cluster: &Cluster, egress: Egress, table: &mut Table) -> Result<()> {
    for (path, holds) in
        [("healthz", "ok"), ("pods", "\"kind\":\"PodList\""), ("stats/summary", "\"node\""), ("metrics", "# TYPE")]
    {
        table.holds("kubectl", &format!("nodes/proxy {path}"), egress, "answered", || {
            let said = cluster.kubectl(&format!("get --raw /api/v1/nodes/{NAME}/proxy/{path}")).run()?;
            ensure!(said.contains(holds), "no {holds} in {} bytes", said.len());
            Ok(())
        })?;
    }
    for (what, target) in [("pods/proxy, 20 MB", "pods/web:8080"), ("services/proxy, 20 MB", "services/web:80")] {
        table.check("kubectl", what, egress, "20000000 bytes, equal", || {
            let bytes = cluster.kubectl(&format!("get --raw /api/v1/namespaces/default/{target}/proxy/bytes"));
            same_bytes(cluster, &bytes.within(LONG).said()?.good()?.out)
        })?;
    }
    Ok(())
}

/// What is upgraded to a stream.
pub(crate) fn streams(cluster: &Cluster, egress: Egress, stream: Stream, table: &mut Table) -> Result<()> {
    let by = format!("{egress}, {}", stream.name());
    let kubectl = |words: &str| cluster.kubectl(words).over(stream).within(LONG);
    // Logs are plain HTTP whatever the stream is.
    if stream == Stream::WebSocket {
        table.holds("kubectl", "logs", egress, "lines", || {
            let said = kubectl("logs web -c ticks --tail=3").said()?;
            ensure!(said.text() == "tick\ntick\ntick\n", "{:?} {}", said.text(), said.error);
            Ok(())
        })?;
        table.check("kubectl", "logs -f, as they are written", egress, "lines", || follow(cluster))?;
    }
    table.check("kubectl", "exec, exit code", &by, "exit code 7", || {
        Ok(format!("exit code {}", kubectl("exec web -c web").sh("exit 7").said()?.code))
    })?;
    table.holds("kubectl", "exec, 5 MB on stdin", &by, "equal", || {
        let bytes = pattern(5, 5_000_000);
        let sum = sum(&bytes);
        let said = kubectl("exec -i web -c web -- sha256sum").input(bytes).said()?;
        ensure!(said.text().starts_with(&sum), "the pod read {:?} {}, sent was {sum}", said.text(), said.error);
        Ok(())
    })?;
    table.holds("kubectl", "attach", &by, "lines", || {
        let mut attached = kubectl("attach web -c ticks").open()?;
        let ticks = attached.lines.by_ref().map_while(Result::ok).take(3).filter(|line| line == "tick").count();
        ensure!(ticks == 3, "{ticks} lines");
        Ok(())
    })?;
    table.check("kubectl", "port-forward, 20 MB", &by, "20000000 bytes, equal", || {
        let mut forward = kubectl("port-forward pod/web :8080").open()?;
        // "Forwarding from 127.0.0.1:36193 -> 8080"
        let line = forward.lines.next().context("port-forward said nothing")??;
        let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).context(line.clone())?;
        let port: u16 = port.parse()?;
        let fetched = cluster.place.run(Where::Control, || get(port))?;
        drop(forward);
        same_bytes(cluster, &fetched)
    })?;
    table.holds("kubectl", "cp there and back, 3 MB", &by, "equal", || {
        let bytes = pattern(3, 3_000_000);
        let (there, back) = (cluster.place.directory.join("there"), cluster.place.directory.join("back"));
        std::fs::write(&there, &bytes)?;
        kubectl(&format!("cp -c web {} web:/www/copy", text(&there)?)).run()?;
        kubectl(&format!("cp -c web web:/www/copy {}", text(&back)?)).run()?;
        ensure!(std::fs::read(&back)? == bytes, "other bytes came back");
        Ok(std::fs::remove_file(&back)?)
    })
}

/// Many execs at once; each answers with its own number.
pub(crate) fn crowd(cluster: &Cluster, egress: Egress, stream: Stream, table: &mut Table) -> Result<()> {
    let one = |number: usize| -> Result<()> {
        let exec = cluster.kubectl("exec web -c web").sh(format!("echo {number}"));
        let said = exec.over(stream).within(LONG * 2).said()?;
        ensure!(said.text() == format!("{number}\n"), "{:?} {}", said.text(), said.error);
        Ok(())
    };
    let by = format!("{egress}, {}", stream.name());
    table.check("kubectl", "50 execs at once", &by, "50 answered", || {
        let started = Instant::now();
        let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..50).map(|number| scope.spawn(move || one(number))).collect();
            let crashed = |_| Err(anyhow::anyhow!("a thread crashed"));
            all.into_iter().map(|each| each.join().unwrap_or_else(crashed)).collect()
        });
        let answered = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        let first = outcomes.into_iter().find_map(Result::err).map(|error| format!(", first error: {error:#}"));
        Ok(format!("{answered} answered{}", first.unwrap_or(format!(" (in {:.1?})", started.elapsed()))))
    })
}

/// An exec that has to answer, in a pod or in one of its containers (`POD -c CONTAINER`).
pub(crate) fn exec(cluster: &Cluster, pod: &str) -> Result<()> {
    let said = cluster.kubectl(&format!("exec {pod} -- echo here")).run()?;
    ensure!(said == "here\n", "exec said {said:?}");
    Ok(())
}

/// Whether these are the bytes that the pod serves.
fn same_bytes(cluster: &Cluster, bytes: &[u8]) -> Result<String> {
    let said = cluster.kubectl("exec web -c web -- sha256sum /www/bytes").run()?;
    let same = said.starts_with(&sum(bytes));
    Ok(format!("{} bytes, {}", bytes.len(), if same { "equal" } else { "other ones" }))
}

/// A log that is followed comes line by line, not at its end.
fn follow(cluster: &Cluster) -> Result<String> {
    let mut log = cluster.kubectl("logs -f web -c ticks --tail=1").open()?;
    let (mut first, mut count) = (None, 0);
    for line in log.lines.by_ref().take(10) {
        ensure!(line? == "tick", "another line");
        first.get_or_insert_with(Instant::now);
        count += 1;
    }
    let over = first.map(|first| first.elapsed()).unwrap_or_default();
    // Ten lines, a fifth of a second apart.
    ensure!(count == 10 && over > Duration::from_millis(900), "{count} lines over {over:?}");
    Ok(format!("lines ({count} over {:.1} s)", over.as_secs_f64()))
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
