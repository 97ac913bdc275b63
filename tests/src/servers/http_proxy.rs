//! Owns an HTTP proxy: CONNECT, and the ways to refuse it.
//! Called by tests of the tunnel through a proxy, and as `nodeguard-demo helper http-proxy`.
//! Must never connect to a name whose address it was not given.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, bail};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use super::{Listener, read_head};
use crate::lock;

/// How the proxy answers a CONNECT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    /// It connects.
    #[default]
    Connect,
    /// It sends this and hangs up.
    Say(&'static str),
    /// It sends nothing.
    Silent,
}

#[derive(Default)]
struct State {
    names: HashMap<String, SocketAddr>,
    manner: Manner,
    asked: Vec<(String, Option<String>)>,
}

/// A running proxy.
pub struct HttpProxy {
    state: Arc<Mutex<State>>,
    /// Its connections.
    pub listener: Listener,
}

impl HttpProxy {
    /// Listens, and resolves these names to these addresses.
    pub async fn start(address: SocketAddr, names: &[(&str, SocketAddr)]) -> Result<HttpProxy> {
        let names = names.iter().map(|(name, address)| ((*name).to_owned(), *address)).collect();
        let state = Arc::new(Mutex::new(State { names, ..State::default() }));
        let shared = Arc::clone(&state);
        let listener = Listener::start(address, move |near| serve(near, Arc::clone(&shared))).await?;
        Ok(HttpProxy { state, listener })
    }

    /// How it answers from the next CONNECT on.
    pub fn set(&self, manner: Manner) {
        lock(&self.state).manner = manner;
    }

    /// The targets since the last call, each with its `Proxy-Authorization`.
    pub fn asked(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut lock(&self.state).asked)
    }
}

async fn serve(mut near: TcpStream, state: Arc<Mutex<State>>) -> Result<()> {
    let request = read_head(&mut near).await?;
    let mut lines = request.lines();
    let line = lines.next().unwrap_or_default();
    let target = line.strip_prefix("CONNECT ").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
    let target = target.with_context(|| format!("not a CONNECT: {line}"))?;
    let authorization = lines.find_map(|line| line.strip_prefix("Proxy-Authorization: ")).map(str::to_owned);
    let (manner, address) = {
        let mut state = lock(&state);
        state.asked.push((target.to_owned(), authorization));
        (state.manner, state.names.get(target).copied().or(target.parse().ok()))
    };
    match manner {
        Manner::Connect => {}
        Manner::Say(said) => return Ok(near.write_all(said.as_bytes()).await?),
        Manner::Silent => std::future::pending().await,
    }
    let Some(address) = address else {
        near.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\nno such host").await?;
        bail!("no address for {target}");
    };
    let mut far = TcpStream::connect(address).await?;
    near.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut near, &mut far).await?;
    Ok(())
}
