//! Real proxy-servers of old releases: the same agent, dial, bytes both ways, hand-over, drain, tokens.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    bare::{Agent, Place, connected},
    kube::KubeApi,
    load::{Load, Way, request},
    servers::proxy_server::Spec,
};
use nix::sys::signal::Signal;

use crate::{at, in_place, serve_endpoint};

/// Files of `target/upstream`, oldest first.
const RELEASES: [&str; 4] = ["proxy-server-v0.0.37", "proxy-server-v0.1.2", "proxy-server-v0.29.0", "proxy-server"];

#[test]
fn servers_of_old_releases_are_served_alike() {
    for release in RELEASES {
        in_place(&[], async |place| {
            serve_endpoint().await?;
            with_certificates(place, release).await.with_context(|| format!("{release}, certificates"))?;
            with_tokens(place, release).await.with_context(|| format!("{release}, tokens"))
        });
        println!("releases: {release}: dial, refusal, bytes both ways, hand-over, drain, tokens");
    }
}

async fn with_certificates(place: &mut Place, release: &str) -> Result<()> {
    let spec = Spec { binary: release, ..Spec::new("old", 0, 1) };
    let server = spec.start(place)?;
    let mut agent = Agent::start(place, "10.0.0.1:8191", &[])?;
    agent.connected(&["old"]).await.with_context(|| server.process.printed())?;
    let load = server.load();
    for way in [Way::ToNode, Way::ToControlPlane] {
        load.throughput(way, 2, 32 << 20).await.with_context(|| format!("{way:?}"))?;
    }
    load.dials(50).await?;
    // A refusal reaches the client in some way: as a status, or (before late 2025) inside the tunnel after a 200.
    let refused = Load { destination: "10.0.0.2:7002".to_owned(), ..load.clone() };
    if let Ok(mut stream) = refused.connect().await {
        ensure!(request(&mut stream).await.is_err(), "a refused dial was served");
    }
    // A hand-over with a connection open: it goes on, and new dials are served.
    let mut open = load.connect().await?;
    request(&mut open).await?;
    place.certs.agent()?;
    agent
        .until("the hand-over", Duration::from_secs(10), |all| {
            connected(all).iter().any(|stream| stream.made_with == Some(2))
        })
        .await?;
    request(&mut open).await.context("the open connection")?;
    request(&mut load.connect().await?).await.context("a new one")?;
    // The drain: what is open is served, then the agent ends.
    agent.process.signal(Signal::SIGTERM)?;
    tokio::time::sleep(Duration::from_millis(700)).await;
    request(&mut open).await.context("an open connection of an agent that drains")?;
    drop(open);
    ensure!(agent.process.wait(Duration::from_secs(10))?.code() == Some(0), "{}", agent.process.printed());
    Ok(())
}

async fn with_tokens(place: &mut Place, release: &str) -> Result<()> {
    let api = KubeApi::start(at(6443), &place.certs).await?;
    let kubeconfig = api.kubeconfig(&place.certs, &place.directory)?;
    // Old ones ask in JSON by themselves and have no flag for it.
    let json = ["--kube-api-content-type=application/json"];
    let more: &[&str] = if release == "proxy-server" { &json } else { &[] };
    let server =
        Spec { binary: release, kubeconfig: Some(kubeconfig), more, ..Spec::new("tokens", 1, 1) }.start(place)?;
    let file = place.directory.join("token");
    std::fs::write(&file, "a-token\n")?;
    api.accept("a-token");
    let token = format!("--service-account-token-path={}", file.display());
    let mut agent = Agent::start_bare(place, "10.0.0.1:8192", &[&token], &[])?;
    agent.connected(&["tokens"]).await?;
    request(&mut server.load().connect().await?).await
}
