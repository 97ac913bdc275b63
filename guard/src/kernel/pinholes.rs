//! Owns registering sockets with the kernel: the sock_ops program turns a registered cookie into a pinhole when it connects.
//! Called by `dial`, with the cookie of a socket that a permit allows to connect; by `upgrade`, which carries open pinholes over.
//! Must never keep a registration whose socket is gone: the cookie is forgotten when the dial ends without a connection.

use std::{path::Path, sync::Mutex};

use aya::{
    Ebpf,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use guard_common::abi::{FlowKey, Pinhole, opener_slot};

use crate::{
    kernel::{
        error::LoadError,
        tables::ruleset_maps::{pinned_map, take},
    },
    sys::lock::lock,
};

/// Why a socket was not registered.
#[derive(Debug, thiserror::Error)]
#[error("no pinhole in the kernel")]
pub struct PinholeError {
    /// The cookie of the socket.
    pub cookie: u64,
    /// What the table says; usually that it is full.
    #[source]
    pub source: MapError,
}

/// Lets a socket through the kernel half of this node, and takes that back.
pub trait Pinholes: Send + Sync + 'static {
    /// Registers a socket before it connects. Without a registration the dial fails.
    fn register(&self, cookie: u64) -> Result<(), PinholeError>;
    /// Takes the registration of a socket back that did not connect.
    fn forget(&self, cookie: u64);
}

/// Registers sockets in the kernel's cookie table.
pub struct KernelPinholes {
    cookies: Mutex<HashMap<MapData, u64, Pinhole>>,
}

impl KernelPinholes {
    /// Takes over the table and removes what an earlier daemon left in it: the kernel never gives a cookie out twice, and those sockets are
    /// gone.
    pub fn new(mut cookies: HashMap<MapData, u64, Pinhole>) -> Result<KernelPinholes, MapError> {
        let left: Vec<u64> = cookies.keys().flatten().collect();
        for cookie in left {
            cookies.remove(&cookie)?;
        }
        Ok(KernelPinholes { cookies: Mutex::new(cookies) })
    }
}

/// The open pinholes, for callers that have to open one without a socket.
pub struct OpenPinholes {
    flows: HashMap<MapData, FlowKey, Pinhole>,
    openers: Array<MapData, u8>,
}

impl OpenPinholes {
    /// Opens the tables by their pins: `PINHOLES`, those of the tunnel, or `OPENED`, all others.
    pub fn pinned(pins: &Path, table: &'static str) -> Result<OpenPinholes, LoadError> {
        OpenPinholes::open(table, |name| pinned_map(pins, name))
    }

    /// Takes the tables out of a loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<OpenPinholes, LoadError> {
        OpenPinholes::open("PINHOLES", |name| take(ebpf, name))
    }

    fn open(
        table: &'static str,
        mut map: impl FnMut(&'static str) -> Result<Map, LoadError>,
    ) -> Result<OpenPinholes, LoadError> {
        Ok(OpenPinholes { flows: map(table)?.try_into()?, openers: map("OPENERS")?.try_into()? })
    }

    /// Opens one. Fails if the table is full.
    pub fn insert(&mut self, flow: FlowKey, pinhole: Pinhole) -> Result<(), MapError> {
        self.openers.set(opener_slot(&flow.source), 1, 0)?;
        self.flows.insert(flow, pinhole, 0)
    }

    /// Closes one. Fails if it is not open.
    pub fn remove(&mut self, flow: &FlowKey) -> Result<(), MapError> {
        self.flows.remove(flow)
    }
}

impl Pinholes for KernelPinholes {
    /// Fails if the table is full.
    fn register(&self, cookie: u64) -> Result<(), PinholeError> {
        let pinhole = Pinhole::of(Pinhole::TUNNEL);
        let mut cookies = lock(&self.cookies);
        cookies.insert(cookie, pinhole, 0).map_err(|source| PinholeError { cookie, source })
    }

    /// The connection usually used the registration up, and nothing is left to remove.
    fn forget(&self, cookie: u64) {
        let removed = lock(&self.cookies).remove(&cookie);
        if let Err(error) = removed {
            tracing::trace!(cookie, %error, "no registration to take back");
        }
    }
}
