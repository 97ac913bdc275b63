//! Owns asking the kernel's connection tracking where a connection of this process goes, in the network namespace of the calling thread.
//! Called by `dial/arrival`, for each backend that is not this node.
//! Must never take "not known" for an answer: that is an error, and the caller decides.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NlaBuffer, NlasIterator};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};

// The kernel's `nfnetlink.h` and `nfnetlink_conntrack.h`: NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_NEW and IPCTNL_MSG_CT_GET.
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// The headers of netlink and of nfnetlink.
const HEADERS: usize = 16 + 4;
const NLMSG_ERROR: u16 = 2;
/// More than any answer about one connection.
const ANSWER: usize = 8 << 10;

/// Where a TCP connection from `local` to `remote` really goes. `None` if it is not tracked, and so not translated either.
///
/// Fails without CAP_NET_ADMIN, and where the kernel has no nf_conntrack_netlink.
pub(crate) fn destination(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<SocketAddr>> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    socket.send(&request(local, remote), 0)?;
    let mut answer = Vec::with_capacity(ANSWER);
    // The kernel answers within the call that sends: there is something to read, or there never will be.
    socket.recv(&mut answer, libc::MSG_DONTWAIT)?;
    match parse(&answer)? {
        TrackAnswer::Entry(goes_to) => Ok(Some(goes_to)),
        TrackAnswer::Error(libc::ENOENT) => Ok(None),
        TrackAnswer::Error(code) => Err(io::Error::from_raw_os_error(code)),
    }
}

/// What the kernel answers.
#[derive(Debug, PartialEq, Eq)]
enum TrackAnswer {
    /// Where replies of the connection come from.
    Entry(SocketAddr),
    /// An error number.
    Error(i32),
}

fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let attribute = |kind, value: &[u8]| DefaultNla::new(kind, value.to_vec());
    let nested = |kind, inside: &[DefaultNla]| {
        let mut value = vec![0; inside.buffer_len()];
        inside.emit(&mut value);
        DefaultNla::new(kind | NLA_F_NESTED, value)
    };
    let (family, addresses) = match (local.ip(), remote.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            (libc::AF_INET, [attribute(CTA_IP_V4_SRC, &from.octets()), attribute(CTA_IP_V4_DST, &to.octets())])
        }
        (from, to) => {
            (libc::AF_INET6, [attribute(CTA_IP_V6_SRC, &octets(from)), attribute(CTA_IP_V6_DST, &octets(to))])
        }
    };
    let ports = [
        attribute(CTA_PROTO_NUM, &[libc::IPPROTO_TCP as u8]),
        attribute(CTA_PROTO_SRC_PORT, &local.port().to_be_bytes()),
        attribute(CTA_PROTO_DST_PORT, &remote.port().to_be_bytes()),
    ];
    let tuple = nested(CTA_TUPLE_ORIG, &[nested(CTA_TUPLE_IP, &addresses), nested(CTA_TUPLE_PROTO, &ports)]);
    let mut bytes = vec![0; HEADERS + tuple.buffer_len()];
    let length = bytes.len() as u32;
    let (headers, rest) = bytes.split_at_mut(HEADERS);
    headers[..4].copy_from_slice(&length.to_ne_bytes());
    headers[4..6].copy_from_slice(&CT_GET.to_ne_bytes());
    headers[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    headers[16] = family as u8;
    tuple.emit(rest);
    bytes
}

fn parse(answer: &[u8]) -> io::Result<TrackAnswer> {
    let truncated = || io::Error::other("an answer of conntrack that ends early");
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(truncated)?;
    if kind == NLMSG_ERROR {
        let code = answer.get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
        return Ok(TrackAnswer::Error(-code.ok_or_else(truncated)?));
    }
    if kind != CT_NEW {
        return Err(io::Error::other("unexpected message of conntrack"));
    }
    let length = answer.get(..4).and_then(|length| length.try_into().ok()).map(u32::from_ne_bytes);
    let message = answer.get(HEADERS..length.ok_or_else(truncated)? as usize).ok_or_else(truncated)?;
    let entry = || {
        let reply = attribute(message, CTA_TUPLE_REPLY)?;
        let (addresses, ports) = (attribute(reply.value(), CTA_TUPLE_IP)?, attribute(reply.value(), CTA_TUPLE_PROTO)?);
        let port = u16::from_be_bytes(attribute(ports.value(), CTA_PROTO_SRC_PORT)?.value().try_into().ok()?);
        let v4 =
            || Some(Ipv4Addr::from(<[u8; 4]>::try_from(attribute(addresses.value(), CTA_IP_V4_SRC)?.value()).ok()?));
        let v6 =
            || Some(Ipv6Addr::from(<[u8; 16]>::try_from(attribute(addresses.value(), CTA_IP_V6_SRC)?.value()).ok()?));
        Some(SocketAddr::new(v4().map(IpAddr::V4).or_else(|| v6().map(IpAddr::V6))?, port))
    };
    entry().map(TrackAnswer::Entry).ok_or_else(truncated)
}

/// The attribute of a kind.
fn attribute(attributes: &[u8], kind: u16) -> Option<NlaBuffer<&[u8]>> {
    NlasIterator::new(attributes).map_while(Result::ok).find(|attribute| attribute.kind() == kind)
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The entry that the kernel would send for a request, whose replies come from the address that was asked for.
    fn entry(mut request: Vec<u8>) -> Vec<u8> {
        request[4..6].copy_from_slice(&CT_NEW.to_ne_bytes());
        // The tuple of the request becomes the one of the replies.
        request[HEADERS + 2..HEADERS + 4].copy_from_slice(&(CTA_TUPLE_REPLY | NLA_F_NESTED).to_ne_bytes());
        request
    }

    proptest! {
        #[test]
        fn an_entry_says_where_replies_come_from(from in any::<SocketAddr>(), to in any::<SocketAddr>()) {
            prop_assume!(from.is_ipv4() == to.is_ipv4());
            let parsed = parse(&entry(request(from, to))).unwrap();
            prop_assert_eq!(parsed, TrackAnswer::Entry(SocketAddr::new(from.ip(), from.port())));
        }

        #[test]
        fn no_answer_panics(bytes in prop::collection::vec(any::<u8>(), 0..120), cut in 0usize..120, at in 0usize..120) {
            let _ = parse(&bytes);
            let mut broken = entry(request("10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap()));
            broken.truncate(cut);
            if let Some(byte) = broken.get_mut(at) {
                *byte ^= bytes.first().copied().unwrap_or(0xff);
            }
            let _ = parse(&broken);
        }
    }

    #[test]
    fn an_error_is_its_number() {
        let mut answer = vec![0; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        answer[16..20].copy_from_slice(&(-libc::ENOENT).to_ne_bytes());
        assert_eq!(parse(&answer).unwrap(), TrackAnswer::Error(libc::ENOENT));
    }
}
