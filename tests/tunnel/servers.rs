//! Several proxy-servers: behind one address, at several, by name; those that come, go and fail over.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{
    bare::{Agent, Place, SERVER, connected},
    certs::NAME,
    kube::KubeApi,
    load::{Steady, request},
    net::hosts,
    servers::{
        Balancer, eventually,
        fake::{Fake, Manners},
        proxy_server::{ProxyServer, Spec},
    },
};
use nix::sys::signal::Signal;
use nodeguard::tunnel::handle::{StreamPhase, StreamState};
use tokio::time::timeout;

use crate::{ENDPOINT, PORT, at, in_place, serve_endpoint};

/// What `--sync-interval-cap` is in these tests, and what a busy machine may add.
const BACKOFF: Duration = Duration::from_millis(500);
const SLACK: Duration = Duration::from_secs(4);

fn three() -> [Spec<'static>; 3] {
    [Spec::new("a", 0, 3), Spec::new("b", 1, 3), Spec::new("c", 2, 3)]
}

/// An agent that dials the balancer.
fn agent(place: &Place, more: &[&str]) -> Result<Agent> {
    Agent::start(place, &at(PORT).to_string(), more)
}

/// A dial through a server reaches the endpoint at once: it is not stuck.
async fn dials(server: &ProxyServer) -> Result<()> {
    let mut stream = server.load().connect().await?;
    timeout(Duration::from_secs(5), request(&mut stream)).await.context("a stuck connection")?
}

#[test]
fn servers_behind_a_balancer_are_all_found_and_found_again() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let specs = three();
        let mut servers: Vec<ProxyServer> = specs.iter().map(|spec| spec.start(place)).collect::<Result<_>>()?;
        let addresses: Vec<SocketAddr> = specs.iter().map(|spec| spec.agents).collect();
        let balancer = Balancer::start(at(PORT), &addresses).await?;
        let mut agent = agent(place, &[])?;
        let found = agent.connected(&["a", "b", "c"]).await?;
        for server in &servers {
            dials(server).await?;
        }
        // One is killed: the others serve on, and it is back within the backoff once it is.
        let steady = Steady::start(&servers[0].load(), 4, 1).await?;
        servers[1].process.signal(Signal::SIGKILL)?;
        servers[1].process.wait(Duration::from_secs(5))?;
        agent.connected(&["a", "c"]).await?;
        dials(&servers[2]).await?;
        servers[1] = specs[1].start(place)?;
        let restarted = agent.connected(&["a", "b", "c"]).await?;
        ensure!(restarted < BACKOFF * 3 + SLACK, "{restarted:?}");
        dials(&servers[1]).await?;
        let asked = steady.end().await?;
        // The balancer fails over: every connection is lost, and new ones come up through its successor.
        balancer.listener.cut();
        drop(balancer);
        agent.until("the loss", Duration::from_secs(5), |all| connected(all).is_empty()).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let successor = Balancer::start(at(PORT), &addresses).await?;
        let failed_over = agent.connected(&["a", "b", "c"]).await?;
        ensure!(failed_over < BACKOFF * 4 + SLACK, "{failed_over:?}");
        for server in &servers {
            dials(server).await?;
        }
        // A failover in one moment: streams end, and the address answers all the time.
        successor.listener.cut();
        // Until the agent has noticed, it says what was.
        agent.until("the loss", Duration::from_secs(5), |all| connected(all).len() < servers.len()).await?;
        let at_once = agent.connected(&["a", "b", "c"]).await?;
        for server in &servers {
            dials(server).await?;
        }
        println!(
            "servers: three behind one address found in {found:.1?}; one restarted, there again {restarted:.1?} later ({asked} requests beside it, none failed); balancer back, all there {failed_over:.1?} later; every connection cut, all there {at_once:.1?} later"
        );
        Ok(())
    });
}

#[test]
fn every_address_that_is_named_and_every_record_of_a_name_is_dialled() {
    in_place(&["10.0.0.11", "fd00::11"], async |place| {
        serve_endpoint().await?;
        let names = hosts(&format!("{SERVER} {NAME}\nfd00::11 {NAME}\n"))?;
        let spec = |id: &'static str, index: u16, address: &str| {
            let mut spec = Spec::new(id, index, 1);
            spec.agents = address.parse().unwrap();
            spec
        };
        // Two records of one name, and an address of its own that is the second one's server again.
        let [a, b, c] = [
            spec("a", 0, &format!("{SERVER}:8132")),
            spec("b", 1, "[fd00::11]:8132"),
            spec("c", 2, &format!("{SERVER}:8133")),
        ];
        let servers = [a.start(place)?, b.start(place)?, c.start(place)?];
        let more = [&format!("--proxy-server-host={SERVER}:8132"), "--proxy-server-port=8132"];
        let mut agent = Agent::start(place, &format!("{NAME},{SERVER}:8133"), &more)?;
        agent.connected(&["a", "b", "c"]).await?;
        for server in &servers {
            dials(server).await?;
        }
        // A record goes and another comes: with the next look, after a loss at the latest, that is so.
        let d = spec("d", 3, "10.0.0.11:8132");
        let d = d.start(place)?;
        std::fs::write(names.path(), format!("{SERVER} {NAME}\n10.0.0.11 {NAME}\n"))?;
        drop(servers);
        let servers = [a.start(place)?];
        agent.connected(&["a", "d"]).await?;
        dials(&d).await?;
        dials(&servers[0]).await?;
        Ok(())
    });
}

#[test]
fn leases_tell_how_many_servers_there_are() {
    in_place(&[], async |place| {
        let api = KubeApi::start(at(6443), &place.certs).await?;
        let kubeconfig = api.kubeconfig(&place.certs, &place.directory)?;
        api.leases(Some(1));
        // Each server says that it is the only one.
        let specs = [Spec::new("a", 0, 1), Spec::new("b", 1, 1), Spec::new("c", 2, 1)];
        let _servers: Vec<ProxyServer> = specs.iter().map(|spec| spec.start(place)).collect::<Result<_>>()?;
        let addresses: Vec<SocketAddr> = specs.iter().map(|spec| spec.agents).collect();
        let _balancer = Balancer::start(at(PORT), &addresses).await?;
        let config = format!("--kubeconfig={}", kubeconfig.display());
        let mut agent = agent(place, &["--count-server-leases", &config])?;
        agent.until("one stream", Duration::from_secs(10), |all| all.len() == 1).await?;
        tokio::time::sleep(BACKOFF * 2).await;
        ensure!(agent.streams().await?.len() == 1, "one lease, one stream");
        api.leases(Some(3));
        let found = agent.connected(&["a", "b", "c"]).await?;
        // What cannot be asked changes nothing, and is told.
        api.leases(None);
        let listed = api.listed();
        eventually("another list", Duration::from_secs(10), async || Ok(api.listed() > listed)).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let said = agent.status().await?.tunnel.context("no tunnel")?;
        let error = said.leases.as_ref().and_then(|leases| leases.last_error.as_deref());
        ensure!(said.known_servers == 3 && error.is_some_and(|error| error.contains("403")), "{said:#?}");
        println!("servers: a second and a third lease, both servers there {found:.1?} later");
        Ok(())
    });
}

#[test]
fn a_server_that_says_goodbye_is_replaced_at_once_and_serves_what_is_open() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let mut fake = Fake::start(place, PORT, Manners::default()).await?;
        let mut agent = agent(place, &[])?;
        let rounds = if crate::soak() { 50 } else { 5 };
        let mut held = Vec::new();
        let mut slowest = Duration::ZERO;
        for _ in 0..rounds {
            let dials = fake.dials().await?;
            let mut connection = dials.dial(ENDPOINT).await?;
            connection.fetch(1024).await?;
            // A stream that has lived is replaced at once; one that has not would be a server that refuses.
            tokio::time::sleep(Duration::from_millis(150)).await;
            let started = Instant::now();
            fake.go_away();
            dials.drains(Duration::from_secs(5)).await?;
            held.push((dials, connection));
            agent.until("a new stream", Duration::from_secs(5), |all| connected(all).len() == 1).await?;
            slowest = slowest.max(started.elapsed());
        }
        for (dials, connection) in &mut held {
            connection.fetch(1024).await?;
            ensure!(!dials.ended.is_cancelled(), "a stream with a connection was cut");
        }
        for (dials, connection) in held {
            connection.close().await?;
            dials.ends().await?;
        }
        println!("servers: {rounds} GOAWAYs, each replaced within {slowest:.1?}, every open connection served on");
        Ok(())
    });
}

#[test]
fn a_real_server_that_ends_in_good_order_hands_its_agents_over() {
    in_place(&[], async |place| {
        serve_endpoint().await?;
        let grace = ["--graceful-shutdown-timeout=15s"];
        let spec = |id: &'static str, index: u16| Spec { more: &grace, ..Spec::new(id, index, 2) };
        let (a, b) = (spec("a", 0), spec("b", 1));
        let mut servers = [a.start(place)?, b.start(place)?];
        let balancer = Balancer::start(at(PORT), &[a.agents, b.agents]).await?;
        let mut agent = agent(place, &[])?;
        agent.connected(&["a", "b"]).await?;
        let mut open = servers[0].load().connect().await?;
        request(&mut open).await?;
        balancer.set(&[b.agents]);
        servers[0].process.signal(Signal::SIGTERM)?;
        // Its GOAWAY makes the stream a draining one; what is open goes on.
        let is = |all: &[StreamState], server: &str, state| {
            all.iter().any(|stream| stream.server_id.as_deref() == Some(server) && stream.state == state)
        };
        let drains = |all: &[_]| is(all, "a", StreamPhase::Draining) && is(all, "b", StreamPhase::Connected);
        agent.until("a drains", Duration::from_secs(5), drains).await?;
        for _ in 0..10 {
            timeout(Duration::from_secs(5), request(&mut open)).await.context("a held connection")??;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        dials(&servers[1]).await?;
        drop(open);
        // With its last connection the stream ends, and with its last stream the server, long before its time is over.
        let ended = Instant::now();
        servers[0].process.wait(Duration::from_secs(10))?;
        println!("servers: a real server that got SIGTERM ended {:.1?} after its last connection", ended.elapsed());
        Ok(())
    });
}
