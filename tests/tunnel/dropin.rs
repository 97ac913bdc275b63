//! In the place of the upstream agent: the same flags with the same defaults, the same endpoints, the same metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::CommandFactory;
use lab::{
    bare::{Place, Who, agent, server, upstream},
    client::{Outcome, through},
    process::{Process, until},
};

use crate::{PORT, in_place, serve_endpoint};

/// A flag of `proxy-agent --help`: its type (empty for a switch) and its default (empty for none).
type Flags = BTreeMap<String, (String, String)>;

/// What `--help` of a Go program says of its flags: `--name type   words (default X)`.
fn flags_of(help: &str) -> Flags {
    let flag = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("-v, ").unwrap_or(line);
        let (name, rest) = line.strip_prefix("--")?.split_once(' ')?;
        // Name and type, then at least two spaces, then the words.
        let kind = rest.split("  ").next().unwrap_or_default().trim();
        let default =
            rest.rsplit_once(" (default ").and_then(|(_, default)| default.strip_suffix(')')).unwrap_or_default();
        Some((name.to_owned(), (kind.to_owned(), default.trim_matches('"').to_owned())))
    };
    help.lines().filter(|line| line.trim_start().starts_with('-')).filter_map(flag).collect()
}

#[test]
fn every_flag_of_the_upstream_agent_is_taken_with_its_default() {
    let said = Command::new(upstream("proxy-agent").unwrap()).arg("--help").output().unwrap();
    let theirs =
        flags_of(&format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr)));
    assert!(theirs.len() >= 40, "not read: {theirs:?}");
    let mut checked = 0;
    for command in ["agent", "run"] {
        let cli = nodeguard::cli::args::Cli::command();
        let ours = cli.find_subcommand(command).unwrap();
        for (name, (kind, default)) in &theirs {
            let names = |arg: &&clap::Arg| {
                arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|all| all.contains(&name.as_str()))
            };
            let arg = ours.get_arguments().find(names).unwrap_or_else(|| panic!("`{command}` does not take --{name}"));
            let own: Vec<_> = arg.get_default_values().iter().map(|value| value.to_str().unwrap()).collect();
            let want = match (name.as_str(), kind.as_str()) {
                // Made anew by each start.
                ("agent-id", _) => String::new(),
                // pflag names no default that is false, empty or zero.
                (_, "") if default.is_empty() => "false".to_owned(),
                // Written as Go prints a duration.
                ("keepalive-time", _) => default.trim_end_matches("0m0s").to_owned(),
                _ => default.clone(),
            };
            assert_eq!(own.join(","), want, "the default of --{name}");
            checked += 1;
        }
    }
    println!(
        "dropin: {} flags of the upstream agent, each with its default, by `run` and `agent` ({checked} compared)",
        theirs.len()
    );
}

/// A metric: HELP, TYPE, and the names of its labels (and the bounds of its buckets).
type Families = BTreeMap<String, (String, String, BTreeSet<String>)>;

/// The families of one prefix in Prometheus' text format.
fn families_of(text: &str, prefix: &str) -> Families {
    let mut families = Families::new();
    let heads: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    assert_eq!(heads.len(), heads.iter().collect::<BTreeSet<_>>().len(), "a family twice: {heads:?}");
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            families.entry(name.to_owned()).or_default().0 = help.to_owned();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            families.entry(name.to_owned()).or_default().1 = kind.to_owned();
        } else if let Some((sample, _)) = line.rsplit_once(' ') {
            let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
            let part = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
            let family = part.filter(|family| families.contains_key(*family)).unwrap_or(name).to_owned();
            let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
            let label = |label: &str| {
                if label.starts_with("le=") {
                    label.to_owned()
                } else {
                    label.split('=').next().unwrap_or_default().to_owned()
                }
            };
            families.entry(family).or_default().2.extend(labels.map(label));
        }
    }
    families.retain(|name, _| name.starts_with(prefix));
    families
}

/// A GET on loopback: status, content type, body.
pub(crate) fn get(port: u16, path: &str) -> Result<(u16, String, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")?;
    let header = |name: &str| head.lines().find_map(|line| line.to_lowercase().strip_prefix(name).map(str::to_owned));
    let kind = header("content-type: ").unwrap_or_default();
    let body = if header("transfer-encoding: ").is_some() { unchunked(body)? } else { body.to_owned() };
    Ok((code, kind, body))
}

fn unchunked(mut body: &str) -> Result<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("a chunk")?;
        let size = usize::from_str_radix(size.trim(), 16)?;
        whole.push_str(rest.get(..size).context("a short chunk")?);
        body = rest.get(size + 2..).unwrap_or_default();
        if size == 0 {
            return Ok(whole);
        }
    }
}

pub(crate) const OURS: u16 = 18_101;
const THEIRS: u16 = 18_102;

#[test]
fn endpoints_and_metrics_are_upstreams() {
    in_place(&[Who::Theirs.address()], async |place| {
        serve_endpoint().await?;
        compare(place)
    });
}

fn compare(place: &Place) -> Result<()> {
    let (mut ours, mut theirs) = (agent(Who::Ours, place, PORT)?, agent(Who::Theirs, place, PORT)?);
    both_answer(&mut ours, &mut theirs)?;
    // Before there is a server: the same answers on every path.
    same_answers("without a server")?;
    let server = server(place)?;
    for port in [OURS, THEIRS] {
        until("ready", Duration::from_secs(20), || Ok(get(port, "/readyz")?.0 == 200))?;
    }
    same_answers("with a server")?;

    // The same dials through both: one that works, one to a port where nobody listens.
    for address in ["10.0.0.2", "10.0.0.3"] {
        let mut stream =
            through(&server, &format!("{address}:7000")).map_err(|outcome| anyhow::anyhow!("{outcome:?}"))?;
        stream.write_all(b"SOURCE 10\n")?;
        stream.read_exact(&mut [0; 10])?;
        drop(stream);
        match through(&server, &format!("{address}:7001")) {
            Err(Outcome::NotConnected(502, _)) => {}
            other => bail!("{:?}", other.err()),
        }
    }
    // And a stream that ends with an error.
    drop(server);
    for port in [OURS, THEIRS] {
        until("the loss is seen", Duration::from_secs(20), || Ok(get(port, "/readyz")?.0 == 503))?;
    }
    same_answers("after the loss of the server")?;
    let prefix = "konnectivity_network_proxy_";
    let scrape = |port| -> Result<Families> { Ok(families_of(&get(port, "/metrics")?.2, prefix)) };
    let (own, other) = (scrape(OURS)?, scrape(THEIRS)?);
    ensure!(other.len() >= 7, "the upstream agent shows {:?}", other.keys());
    let names = |families: &Families| families.keys().cloned().collect::<BTreeSet<_>>();
    ensure!(names(&own) == names(&other), "ours {:?}\ntheirs {:?}", names(&own), names(&other));
    for (name, theirs) in &other {
        ensure!(own.get(name) == Some(theirs), "{name}: ours {:?}, theirs {theirs:?}", own.get(name));
    }
    println!(
        "dropin: {} metric families with the same name, HELP, TYPE, labels and buckets as the upstream agent's",
        other.len()
    );
    Ok(())
}

fn both_answer(ours: &mut Process, theirs: &mut Process) -> Result<()> {
    for (process, port) in [(ours, OURS), (theirs, THEIRS)] {
        until("the health port", Duration::from_secs(20), || {
            process.check()?;
            Ok(get(port, "/healthz").is_ok())
        })?;
    }
    Ok(())
}

fn same_answers(when: &str) -> Result<()> {
    for path in ["/healthz", "/readyz", "/ready", "/readyz?verbose", "/readyz?verbose=1", "/nowhere"] {
        let (code, _, body) = get(OURS, path)?;
        let (want, _, text) = get(THEIRS, path)?;
        ensure!(code == want, "{path} {when}: {code} and {want}");
        ensure!(path == "/nowhere" || body == text, "{path} {when}: {body:?} and {text:?}");
    }
    // The admin port sends a scraper on.
    let moved = |admin: u16| -> Result<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", admin))?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{admin}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let location =
            answer.lines().find_map(|line| line.to_lowercase().strip_prefix("location: ").map(str::to_owned));
        Ok((answer.split(' ').nth(1).context("no status")?.parse()?, location.unwrap_or_default()))
    };
    ensure!(moved(OURS + 100)? == (301, format!("//127.0.0.1:{OURS}/metrics")), "{:?}", moved(OURS + 100)?);
    ensure!(moved(THEIRS + 100)? == (301, format!("//127.0.0.1:{THEIRS}/metrics")), "{:?}", moved(THEIRS + 100)?);
    let kind = |port| -> Result<String> { Ok(get(port, "/metrics")?.1) };
    let (own, other) = (kind(OURS)?, kind(THEIRS)?);
    let plain = |kind: &str| kind.starts_with("text/plain") && kind.contains("version=0.0.4");
    ensure!(plain(&own) && plain(&other), "{own} and {other}");
    Ok(())
}
