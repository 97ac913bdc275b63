//! Owns an HTTP proxy: CONNECT, and the ways to refuse it.
//! Called by tests of the tunnel through one, and as `nodeguard-demo helper http-proxy`.
//! Must never connect to a name that it was not told the address of.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// How it takes a CONNECT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    /// It connects.
    #[default]
    Connect,
    /// It says this and hangs up.
    Say(&'static str),
    /// It says nothing.
    Silent,
}

#[derive(Default)]
struct State {
    manner: Manner,
    asked: Vec<(String, Option<String>)>,
}

/// A running proxy.
pub struct HttpProxy {
    state: Arc<Mutex<State>>,
    cut: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Drop for HttpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HttpProxy {
    /// Listens; names have these addresses.
    pub async fn start(address: SocketAddr, names: &[(&str, SocketAddr)]) -> Result<HttpProxy> {
        let listener = TcpListener::bind(address).await.with_context(|| address.to_string())?;
        let names: HashMap<String, SocketAddr> =
            names.iter().map(|(name, address)| ((*name).to_owned(), *address)).collect();
        let (state, names): (Arc<Mutex<State>>, _) = (Arc::default(), Arc::new(names));
        let (cut, cuts) = watch::channel(());
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (state, names, mut cuts) = (Arc::clone(&shared), Arc::clone(&names), cuts.clone());
                cuts.mark_unchanged();
                tokio::spawn(async move {
                    tokio::select! {
                        served = serve(near, &state, &names) => served,
                        _ = cuts.changed() => Ok(()),
                    }
                });
            }
        });
        Ok(HttpProxy { state, cut, task })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From the next CONNECT on.
    pub fn set(&self, manner: Manner) {
        self.state().manner = manner;
    }

    /// To whom it was asked to connect since the last look, and by whom (`Proxy-Authorization`).
    pub fn asked(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut self.state().asked)
    }

    /// Ends every connection.
    pub fn cut(&self) {
        self.cut.send_replace(());
    }
}

async fn serve(mut near: TcpStream, state: &Mutex<State>, names: &HashMap<String, SocketAddr>) -> Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        ensure!(request.len() < 8 << 10, "a long request");
        ensure!(near.read_buf(&mut request).await? > 0, "hung up");
    }
    let text = String::from_utf8(request)?;
    let mut lines = text.lines();
    let line = lines.next().unwrap_or_default();
    let target = line.strip_prefix("CONNECT ").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
    let target = target.with_context(|| format!("no CONNECT: {line}"))?.to_owned();
    let authorization = lines.find_map(|line| line.strip_prefix("Proxy-Authorization: ")).map(str::to_owned);
    let manner = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asked.push((target.clone(), authorization));
        state.manner
    };
    match manner {
        Manner::Connect => {}
        Manner::Say(said) => return Ok(near.write_all(said.as_bytes()).await?),
        Manner::Silent => std::future::pending().await,
    }
    let Some(address) = names.get(&target).copied().or(target.parse().ok()) else {
        near.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\nno such host").await?;
        bail!("no address for {target}");
    };
    let mut far = TcpStream::connect(address).await?;
    near.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut near, &mut far).await?;
    Ok(())
}
