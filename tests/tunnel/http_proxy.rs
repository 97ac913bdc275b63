//! Through an HTTP proxy, as HTTPS_PROXY and NO_PROXY say: the tunnel comes up, comes back, and a refusal is told.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    bare::{Agent, SERVER, Who, agent_by, connected},
    certs::NAME,
    kube::KubeApi,
    load::{Load, request},
    servers::{
        eventually,
        http_proxy::{HttpProxy, Manner},
        proxy_server::{ProxyServer, Spec},
    },
};
use tokio::time::timeout;

use crate::{at, in_place, serve_endpoint, soak};

const PROXY: &str = "10.0.0.9";
const PROXY_PORT: u16 = 3128;

fn proxy_address() -> Result<SocketAddr> {
    Ok(format!("{PROXY}:{PROXY_PORT}").parse()?)
}

/// A dial through a server reaches the endpoint.
async fn dials(server: &ProxyServer) -> Result<()> {
    let mut stream = server.load().connect().await?;
    timeout(Duration::from_secs(5), request(&mut stream)).await.context("a stuck connection")?
}

/// Waits until the tunnel's status holds a text.
async fn told(agent: &Agent, words: &str) -> Result<()> {
    let (what, mut last) = (format!("the status says `{words}`"), String::new());
    let told = eventually(&what, Duration::from_secs(20), async || {
        last = agent.status().await.map(|status| format!("{:?}", status.tunnel)).unwrap_or_default();
        Ok(last.contains(words))
    });
    told.await.with_context(|| format!("{last}\n{}", agent.process.printed())).map(drop)
}

#[test]
fn the_tunnel_comes_up_through_a_proxy_and_a_refusal_is_told() {
    in_place(&[PROXY], async |place| {
        serve_endpoint().await?;
        let spec = Spec::new("a", 0, 1);
        let server = spec.start(place)?;
        let target = format!("{NAME}:{}", spec.agents.port());
        // Nobody here knows the server's name but the proxy.
        let api = KubeApi::start(at(6443), &place.certs).await?;
        api.leases(Some(1));
        let kubeconfig = api.kubeconfig(&place.certs, &place.directory)?;
        let there = std::fs::read_to_string(&kubeconfig)?.replace(&format!("{SERVER}:6443"), &format!("{NAME}:6443"));
        std::fs::write(&kubeconfig, there)?;
        let of_api = format!("{NAME}:6443");
        let names = [(target.as_str(), spec.agents), (of_api.as_str(), at(6443))];
        let proxy = HttpProxy::start(proxy_address()?, &names).await?;
        let leases = ["--count-server-leases", &format!("--kubeconfig={}", kubeconfig.display())];
        let url = format!("http://guard:p%40ss%3Aword@{PROXY}:{PROXY_PORT}");
        let mut agent = Agent::start_in(place, &target, &leases, &[("HTTPS_PROXY", &url)])?;
        agent.connected(&["a"]).await?;
        dials(&server).await?;
        told(&agent, &format!("{target} through {PROXY}:{PROXY_PORT}")).await?;
        // `guard:p@ss:word`; and what the control plane dials does not come here.
        let asked = proxy.asked();
        let wanted = Some("Basic Z3VhcmQ6cEBzczp3b3Jk".to_owned());
        for each in [&target, &of_api] {
            ensure!(asked.contains(&(each.clone(), wanted.clone())), "{each}: {asked:?}");
        }
        ensure!(asked.iter().all(|(to, _)| *to == target || *to == of_api), "{asked:?}");
        let leases = agent.status().await?.tunnel.and_then(|tunnel| tunnel.leases).context("no leases")?;
        ensure!(api.listed() > 0 && leases.last_error.is_none(), "{leases:?}");
        // Whatever the proxy does, the reason is told, and the tunnel is back when it connects again.
        let refusals = [
            (
                Manner::Say("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"),
                "407 Proxy Authentication Required (user",
            ),
            (Manner::Say("HTTP/1.1 403 Forbidden\r\nVia: x\r\n\r\nby policy"), "refuses to connect to proxies.example"),
            (Manner::Say("SSH-2.0-OpenSSH_9.2\r\n"), "`SSH-2.0-OpenSSH_9.2`"),
            (Manner::Say(""), "it hung up"),
            (Manner::Silent, "no answer within 10s (the HTTP proxy, TCP and TLS)"),
        ];
        let mut slowest = Duration::ZERO;
        for (manner, words) in refusals {
            proxy.set(manner);
            proxy.listener.cut();
            told(&agent, words).await?;
            proxy.set(Manner::Connect);
            proxy.listener.cut();
            slowest = slowest.max(agent.connected(&["a"]).await?);
            dials(&server).await?;
        }
        drop(proxy);
        told(&agent, &format!("cannot connect to the HTTP proxy {PROXY}:{PROXY_PORT}")).await?;
        let _proxy = HttpProxy::start(proxy_address()?, &names).await?;
        agent.connected(&["a"]).await?;
        let printed = agent.process.printed();
        ensure!(printed.contains("the tunnel goes through the HTTP proxy"), "{printed}");
        ensure!(!printed.contains("p%40ss") && !printed.contains("Z3Vh") && !printed.contains("p@ss"), "a password");
        println!("http-proxy: five refusals told, the tunnel back at most {slowest:.1?} after each");
        Ok(())
    });
}

/// A server by its name or address, an environment, and whether the proxy is asked.
type Case<'a> = (&'a str, Vec<(&'a str, &'a str)>, bool);

#[test]
fn whom_a_proxy_is_asked_for_is_as_the_upstream_agent_has_it() {
    in_place(&[PROXY, Who::Theirs.address()], async |place| {
        let spec = Spec::new("a", 0, 1);
        let server = spec.start(place)?;
        let port = spec.agents.port();
        let by_name = format!("{NAME}:{port}");
        let proxy = HttpProxy::start(proxy_address()?, &[(by_name.as_str(), spec.agents)]).await?;
        let (url, bare) = (format!("http://u:p@{PROXY}:{PROXY_PORT}/"), format!("{PROXY}:{PROXY_PORT}"));
        let (here, elsewhere) = (format!("10.0.0.1:{port},x"), format!("10.0.0.1:{}", port + 1));
        let cases: [Case<'_>; 8] = [
            (NAME, vec![("HTTPS_PROXY", &url), ("NO_PROXY", "other.example")], true),
            (SERVER, vec![("https_proxy", &bare)], true),
            (SERVER, vec![("HTTPS_PROXY", &url), ("NO_PROXY", "10.1.0.0/16,.example")], true),
            (SERVER, vec![("HTTPS_PROXY", &url), ("NO_PROXY", &elsewhere)], true),
            (SERVER, vec![("HTTPS_PROXY", &url), ("no_proxy", &here)], false),
            (SERVER, vec![("HTTPS_PROXY", &url), ("NO_PROXY", "a, 10.0.0.0/8")], false),
            (SERVER, vec![("HTTPS_PROXY", &url), ("NO_PROXY", "*")], false),
            (SERVER, vec![("HTTP_PROXY", &url), ("ALL_PROXY", &url)], false),
        ];
        for (host, variables, through) in &cases {
            let mut seen = Vec::new();
            for who in Who::BOTH {
                let process = agent_by(who, place, (host, port), variables)?;
                let load = Load { destination: format!("{}:9", who.address()), ..server.load() };
                // Without an agent the answer is 500; with one whose endpoint does not listen, 502.
                let dialled = eventually("a dial through the agent", Duration::from_secs(10), async || {
                    Ok(load.connect().await.is_err_and(|error| error.to_string().contains(" 502 ")))
                });
                dialled.await.with_context(|| format!("{who:?} {variables:?}: {}", process.printed()))?;
                drop(process);
                // As `default` falls back to any agent, the next must not find this one.
                tokio::time::sleep(Duration::from_millis(100)).await;
                let mut asked = proxy.asked();
                asked.dedup();
                seen.push(asked);
            }
            let [ours, theirs] = &seen[..] else { continue };
            ensure!(ours == theirs, "{variables:?}: ours {ours:?}, upstream {theirs:?}");
            ensure!(ours.is_empty() != *through, "{variables:?}: {ours:?}");
        }
        println!("http-proxy: {} environments, the upstream agent asks the proxy the same", cases.len());
        Ok(())
    });
}

#[test]
fn a_variable_that_cannot_be_used_ends_the_start_and_shows_no_password() {
    in_place(&[], async |place| {
        for (url, words) in [
            ("socks5://u:secret@10.0.0.9:1080", "only an HTTP proxy can be used"),
            ("https://u:secret@10.0.0.9:3128", "would be sent in the clear"),
            ("http://u:secret@:3128", "names no proxy"),
        ] {
            let mut agent = Agent::start_in(place, SERVER, &[], &[("HTTPS_PROXY", url)])?;
            let status = agent.process.wait(Duration::from_secs(10))?;
            let printed = agent.process.printed();
            ensure!(!status.success() && printed.contains(words) && !printed.contains("secret"), "{url}: {printed}");
        }
        Ok(())
    });
}

/// Behind a proxy that goes on answering, only HTTP/2's own probes tell that the server is gone.
#[test]
fn a_server_that_falls_silent_behind_a_proxy_is_given_up() {
    if !soak() {
        println!("http-proxy: the silent server takes more than a minute: `cargo xtask soak tunnel silent`");
        return;
    }
    in_place(&[PROXY], async |place| {
        let spec = Spec::new("a", 0, 1);
        let mut server = spec.start(place)?;
        let _proxy = HttpProxy::start(proxy_address()?, &[]).await?;
        let url = format!("http://{PROXY}:{PROXY_PORT}");
        let mut agent = Agent::start_in(place, &spec.agents.to_string(), &[], &[("HTTPS_PROXY", &url)])?;
        agent.connected(&["a"]).await?;
        server.process.signal(nix::sys::signal::Signal::SIGSTOP)?;
        let given_up = "the silent server is given up";
        let gone = agent.until(given_up, Duration::from_secs(90), |all| connected(all).is_empty()).await?;
        server.process.signal(nix::sys::signal::Signal::SIGKILL)?;
        server.process.wait(Duration::from_secs(5))?;
        let _server = spec.start(place)?;
        let back = agent.connected(&["a"]).await?;
        println!(
            "http-proxy: a server that fell silent behind a proxy is given up after {gone:.1?}; back {back:.1?} after it was"
        );
        Ok(())
    });
}
