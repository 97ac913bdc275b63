//! Dials to ClusterIPs: to an endpoint that is judged as any address where Services are watched, and refused with their own reason where not.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use lab::{
    bare::{Place, ours},
    kube::KubeApi,
    process::Process,
    servers::{
        eventually,
        fake::{Dials, Fake, Manners},
    },
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};

use crate::{
    PORT, at,
    dropin::{OURS, get},
    in_place,
};

/// Pods of this node, of another one, and a Service's address that somebody serves: a dial there would be one past the judgement.
const HERE: &str = "10.244.1.9";
const THERE: &str = "10.244.2.9";
const AS_IT_IS: &str = "10.96.0.66";
const PLACES: [&str; 3] = [HERE, THERE, AS_IT_IS];

fn policy(tunnel: &str) -> String {
    format!(
        "apiVersion: nodeguard.dev/v1alpha1\nkind: NodeGuardPolicy\nmetadata: {{name: services}}\nspec:\n  mode: Enforce\n  guard: []\n  tunnel: {tunnel}\n"
    )
}

/// Each place says its address to whoever connects.
async fn serve(ports: &[u16]) -> Result<()> {
    for (address, port) in PLACES.iter().flat_map(|address| ports.iter().map(move |port| (*address, *port))) {
        let listener = TcpListener::bind((address, port)).await?;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    stream.write_all(address.as_bytes()).await?;
                    stream.shutdown().await?;
                    stream.read(&mut [0; 1]).await
                });
            }
        });
    }
    Ok(())
}

/// An agent, and the stream that it made.
struct Lab {
    dials: Dials,
    records: PathBuf,
    /// How many dials were asked about: each has a record once it is over.
    asked: AtomicUsize,
    _agent: Process,
    _server: Fake,
}

impl Lab {
    async fn start(place: &Place, policy: &str, more: &[&str]) -> Result<Lab> {
        let records = place.directory.join("audit.log");
        let mut server = Fake::start(place, PORT, Manners::default()).await?;
        let file = format!("--audit-file={}", records.display());
        let agent = ours(place, PORT, policy, &[&[file.as_str(), "--node-name=here"], more].concat())?;
        let dials = server.dials().await?;
        Ok(Lab { dials, records, asked: AtomicUsize::new(0), _agent: agent, _server: server })
    }

    /// Who answers at an address, or why nobody does.
    async fn ask(&self, address: &str) -> Result<String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut connection = match timeout(Duration::from_secs(10), self.dials.dial(address)).await? {
            Ok(connection) => connection,
            Err(error) => return Ok(error.to_string()),
        };
        let said: Bytes = timeout(Duration::from_secs(5), connection.receive()).await?.context("it ended")?;
        connection.close().await?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// Asks until the answer holds these words.
    async fn until(&self, address: &str, words: &str) -> Result<Duration> {
        let mut said = String::new();
        let answered = eventually(words, Duration::from_secs(15), async || {
            said = self.ask(address).await?;
            // A refusal holds the address, too.
            let refused = said.starts_with("nodeguard refuses ") && !PLACES.contains(&words);
            Ok(said == words || (refused && said.contains(words)))
        });
        answered.await.with_context(|| format!("{address}: {said}"))
    }

    /// Refused, with these words and this reason.
    async fn refused(&self, address: &str, reason: &str, words: &str) -> Result<()> {
        let said = self.ask(address).await?;
        ensure!(said.starts_with("nodeguard refuses ") && said.contains(words), "{address}: {said}");
        let record = self.record(address).await?;
        ensure!(record["verdict"] == "refused" && record["reason"] == reason, "{address}: {record}");
        Ok(())
    }

    /// The last record of an address, once all that were asked about have theirs: that of a dial that was answered comes after its close.
    async fn record(&self, address: &str) -> Result<Value> {
        let mut found = None;
        eventually(&format!("a record of {address}"), Duration::from_secs(5), async || {
            let text = std::fs::read_to_string(&self.records).unwrap_or_default();
            let all: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            let complete = all.len() >= self.asked.load(Ordering::Relaxed);
            found = all.into_iter().rfind(|record| record["requested"] == address);
            Ok(complete && found.is_some())
        })
        .await?;
        found.context("a record")
    }
}

/// A metric without labels.
fn metric(name: &str) -> Result<f64> {
    let (_, _, text) = get(OURS, "/metrics")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.with_context(|| format!("no {name}"))?.parse().context("no number")
}

/// The line of a check of readiness, and whether the whole is.
fn readiness(check: &str) -> Result<(u16, String)> {
    let (code, _, lines) = get(OURS, "/readyz?verbose")?;
    let line = lines.lines().find(|line| line.contains(check)).unwrap_or_default();
    Ok((code, line.to_owned()))
}

async fn api(place: &Place) -> Result<KubeApi> {
    KubeApi::start(at(6443), &place.certs).await
}

/// A kubeconfig for an API that may not be there yet.
async fn kubeconfig(place: &Place) -> Result<String> {
    let file = api(place).await?.kubeconfig(&place.certs, &place.directory)?;
    Ok(format!("--kubeconfig={}", file.display()))
}

#[test]
fn a_cluster_ip_is_an_endpoint_that_is_judged() {
    in_place(&PLACES, async |place| {
        serve(&[443, 8443]).await?;
        let tunnel = "{dial: [pods: {cidrs: [10.0.0.0/8], ports: [443, 8443]}], serviceCidrs: [10.96.0.0/16]}";
        let lab = Lab::start(place, &policy(tunnel), &["--watch-services", &kubeconfig(place).await?]).await?;
        // What was never read is refused, and readiness says why.
        for address in ["10.96.0.9:443", "10.96.0.66:443", "hook.default.svc:443"] {
            lab.refused(address, "services-unread", "could not be read yet (--watch-services)").await?;
        }
        ensure!(lab.ask(&format!("{HERE}:8443")).await? == HERE, "a pod is dialled all the same");
        let (code, line) = readiness("services-read")?;
        ensure!(code == 503 && line.starts_with("[-]services-read failed: not read yet"), "{code} {line}");
        ensure!(
            metric("nodeguard_services_read")? == 0.0 && metric("nodeguard_services_watch_errors_total")? >= 1.0,
            "metrics"
        );

        let api = api(place).await?;
        api.objects.service("hook", "10.96.0.9", 443);
        api.objects.endpoints("hook", 8443, &[(THERE, "there", true), (HERE, "here", true)]);
        api.objects.service("odd", "10.96.0.10", 443);
        api.objects.endpoints("odd", 9443, &[(HERE, "here", true)]);
        api.objects.service("trap", "10.96.0.11", 443);
        api.objects.endpoints("trap", 8443, &[("127.0.0.1", "here", true)]);
        let read = lab.until("10.96.0.9:443", HERE).await?;
        for _ in 0..5 {
            ensure!(lab.ask("10.96.0.9:443").await? == HERE, "not the node's own endpoint");
        }
        let record = lab.record("10.96.0.9:443").await?;
        ensure!(record["dialled"] == format!("{HERE}:8443") && record["service"] == "default/hook", "{record}");
        ensure!(record["verdict"] == "admitted" && record["rule"] == "tunnel.dial[0]", "{record}");
        ensure!(lab.ask("hook.default.svc:443").await? == HERE, "by its name");
        let (code, line) = readiness("services-read")?;
        ensure!(code == 200 && line == "[+]services-read ok: 3 known, 4 endpoints, current", "{code} {line}");

        // Whatever the object says: the address that it leads to is judged.
        lab.refused("10.96.0.10:443", "port-not-named", &format!("endpoint {HERE}:9443 of Service default/odd"))
            .await?;
        lab.refused("10.96.0.11:443", "loopback", "endpoint 127.0.0.1:8443 of Service default/trap").await?;
        lab.refused("10.96.0.9:80", "service-unknown", "default/hook has no TCP port 80").await?;
        lab.refused(&format!("{AS_IT_IS}:443"), "service-unknown", "no Service of the cluster").await?;

        // Another endpoint is another answer, at once.
        api.objects.endpoints("hook", 8443, &[(THERE, "there", true), (HERE, "here", false)]);
        let changed = lab.until("10.96.0.9:443", THERE).await?;
        api.objects.endpoints("hook", 8443, &[(THERE, "there", false), (HERE, "here", false)]);
        lab.until("10.96.0.9:443", "no endpoint that accepts connections: default/hook").await?;
        api.objects.endpoints("hook", 8443, &[(HERE, "here", true)]);
        lab.until("10.96.0.9:443", HERE).await?;
        api.objects.no_service("odd");
        lab.until("10.96.0.10:443", "no Service of the cluster").await?;
        println!("services: read {read:.1?} after the API was there; another endpoint after {changed:.1?}");
        Ok(())
    });
}

#[test]
fn an_outage_keeps_what_was_known_and_says_how_old_it_is() {
    in_place(&PLACES, async |place| {
        serve(&[8443]).await?;
        let api = api(place).await?;
        api.objects.service("hook", "10.96.0.9", 443);
        api.objects.endpoints("hook", 8443, &[(HERE, "here", true)]);
        let config = format!("--kubeconfig={}", api.kubeconfig(&place.certs, &place.directory)?.display());
        // No range is declared: what is known of Services is enough.
        let tunnel = "{dial: [pods: {cidrs: [10.0.0.0/8], ports: [443, 8443]}]}";
        let lab = Lab::start(place, &policy(tunnel), &["--watch-services", &config]).await?;
        lab.until("10.96.0.9:443", HERE).await?;
        let lists = api.objects.lists();
        ensure!(lists == 2, "{lists} lists");

        for (code, known, next) in [(503, HERE, THERE), (403, THERE, HERE)] {
            api.objects.refuse(Some(code));
            let started = Instant::now();
            let (ready, line) = loop {
                let (ready, line) = readiness("services-read")?;
                if line.contains(" ago: ") {
                    break (ready, line);
                }
                ensure!(started.elapsed() < Duration::from_secs(15), "{line}");
                ensure!(lab.ask("10.96.0.9:443").await? == known, "what was known is gone");
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            ensure!(
                ready == 200 && line.starts_with("[+]services-read ok: 1 known, 1 endpoints, as of "),
                "{ready} {line}"
            );
            ensure!(line.contains("refused in the lab"), "{line}");
            ensure!(metric("nodeguard_services_age_seconds")? >= 1.0, "the age");
            ensure!(lab.ask("10.96.0.9:443").await? == known, "what was known is gone");
            // What happened meanwhile is seen when it is back, also where it cannot be watched any more.
            api.objects.endpoints("hook", 8443, &[(next, "x", true)]);
            if code == 403 {
                api.objects.forget();
            }
            api.objects.refuse(None);
            lab.until("10.96.0.9:443", next).await?;
            // Each kind has a backoff of its own.
            eventually("both kinds are current again", Duration::from_secs(15), async || {
                Ok(readiness("services-read")?.1.ends_with(", current"))
            })
            .await?;
            ensure!(metric("nodeguard_services_age_seconds")? == 0.0, "it is current");
        }
        ensure!(api.objects.lists() > lists, "it was forgotten, and nobody listed");
        Ok(())
    });
}

#[test]
fn without_watching_a_cluster_ip_is_dialled_only_where_the_policy_says_so() {
    in_place(&PLACES, async |place| {
        serve(&[443]).await?;
        let address = format!("{AS_IT_IS}:443");
        let wide = "pods: {cidrs: [10.0.0.0/8], ports: [443]}";
        let silent = policy(&format!("{{dial: [{wide}], serviceCidrs: [10.96.0.0/16]}}"));
        let lab = Lab::start(place, &silent, &[]).await?;
        lab.refused(&address, "service-address", "deploy/services.yaml, --watch-services").await?;
        lab.refused("hook.default.svc:443", "service-address", "by a name that this node's resolver does not know")
            .await?;
        let (_, _, metrics) = get(OURS, "/metrics")?;
        ensure!(
            metrics.contains("nodeguard_dials_total{outcome=\"refused\",reason=\"service-address\"} 2\n"),
            "{metrics}"
        );
        ensure!(!metrics.contains("nodeguard_services"), "metrics of what nobody watches");
        // An edit that names the range, and one that takes it back.
        let named = policy(&format!("{{dial: [{wide}, services: {{ports: [443]}}], serviceCidrs: [10.96.0.0/16]}}"));
        edit(place, &named)?;
        lab.until(&address, AS_IT_IS).await?;
        let record = lab.record(&address).await?;
        ensure!(record["dialled"] == address.as_str() && record["rule"] == "tunnel.dial[1]", "{record}");
        let mut open = lab.dials.dial(&address).await?;
        edit(place, &silent)?;
        lab.until(&address, "nodeguard refuses").await?;
        // What was open there is cut.
        let ended = async { while open.receive().await.is_some() {} };
        timeout(Duration::from_secs(5), ended).await.context("an open dial to it goes on")?;
        Ok(())
    });
}

fn edit(place: &Place, policy: &str) -> Result<()> {
    let (new, file) = (place.directory.join("new.yaml"), place.directory.join("policy.yaml"));
    std::fs::write(&new, policy)?;
    Ok(std::fs::rename(new, file)?)
}
