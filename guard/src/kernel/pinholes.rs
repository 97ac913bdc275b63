//! Owns registering sockets with the kernel: the sock_ops program turns a registered cookie into a pinhole when it connects.
//! Called by `dial`, with the cookie of a socket that a permit allows to connect.
//! Must never keep a registration whose socket is gone: the cookie is forgotten when the dial ends without a connection.

use std::sync::Mutex;

use aya::maps::{HashMap, MapData, MapError};
use guard_common::abi::Pinhole;

use crate::{dial::Pinholes, lock::lock};

/// Registers sockets in the kernel's cookie table.
pub struct KernelPinholes {
    cookies: Mutex<HashMap<MapData, u64, Pinhole>>,
}

impl KernelPinholes {
    /// Takes over the table. What an earlier daemon left in it is dropped: cookies are never given out twice, and the sockets
    /// behind them are gone.
    pub fn new(mut cookies: HashMap<MapData, u64, Pinhole>) -> Result<KernelPinholes, MapError> {
        let left: Vec<u64> = cookies.keys().flatten().collect();
        for cookie in left {
            cookies.remove(&cookie)?;
        }
        Ok(KernelPinholes { cookies: Mutex::new(cookies) })
    }
}

impl Pinholes for KernelPinholes {
    /// Fails where the table is full: then the dial is refused.
    fn register(&self, cookie: u64) -> Result<(), String> {
        let pinhole = Pinhole::of(Pinhole::TUNNEL);
        let mut cookies = lock(&self.cookies);
        cookies.insert(cookie, pinhole, 0).map_err(|error| format!("no pinhole in the kernel: {error}"))
    }

    /// Used up by the connection in the usual case, so that nothing is there any more.
    fn forget(&self, cookie: u64) {
        let removed = lock(&self.cookies).remove(&cookie);
        if let Err(error) = removed {
            tracing::trace!(cookie, %error, "no registration to take back");
        }
    }
}
