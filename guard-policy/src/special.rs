//! Owns the special addresses, which no wider prefix includes: loopback, link-local, multicast, unspecified.
//! Called by `authorize`, by `tables/destinations` and by `daemon/agent`.
//! Must never depend on a policy: these addresses are special everywhere.

use std::net::IpAddr;

use crate::refusal::Refusal;

/// The refusal for a special address, `None` for any other. A special address is dialled only if a prefix names exactly this address;
/// a multicast address is never dialled.
pub fn special(address: IpAddr) -> Option<Refusal> {
    match address {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some(Refusal::Unspecified),
        IpAddr::V4(v4) if v4.is_loopback() => Some(Refusal::Loopback),
        IpAddr::V4(v4) if v4.is_link_local() => Some(Refusal::LinkLocal),
        IpAddr::V4(v4) if v4.is_multicast() || v4.is_broadcast() => Some(Refusal::Multicast),
        IpAddr::V6(v6) if v6.is_unspecified() => Some(Refusal::Unspecified),
        IpAddr::V6(v6) if v6.is_loopback() => Some(Refusal::Loopback),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some(Refusal::LinkLocal),
        IpAddr::V6(v6) if v6.is_multicast() => Some(Refusal::Multicast),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}
