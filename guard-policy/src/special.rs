//! Owns the special addresses, which no wider prefix includes: loopback, link-local, cloud metadata, multicast, unspecified, and the IPv6
//! addresses that stand for one of them.
//! Called by `authorize`, by `tables/destinations` and by `tunnel/advertise`.
//! Must never depend on a policy: these addresses are special everywhere.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::refusal::Refusal;

/// The special prefixes. The first one that contains an address decides.
const PREFIXES: [(&str, Refusal); 18] = [
    ("0.0.0.0/8", Refusal::Unspecified),
    ("127.0.0.0/8", Refusal::Loopback),
    ("169.254.0.0/16", Refusal::LinkLocal),
    ("224.0.0.0/4", Refusal::Multicast),
    ("255.255.255.255/32", Refusal::Multicast),
    ("::/128", Refusal::Unspecified),
    ("::1/128", Refusal::Loopback),
    ("fe80::/10", Refusal::LinkLocal),
    ("ff00::/8", Refusal::Multicast),
    // Azure (WireServer) and Alibaba Cloud.
    ("168.63.129.16/32", Refusal::CloudMetadata),
    ("100.100.100.200/32", Refusal::CloudMetadata),
    // AWS (instance metadata; credentials of EKS pods), Google Cloud, Oracle Cloud, Akamai (Linode), Scaleway.
    ("fd00:ec2::254/128", Refusal::CloudMetadata),
    ("fd00:ec2::23/128", Refusal::CloudMetadata),
    ("fd20:ce::254/128", Refusal::CloudMetadata),
    ("fd00:c1::a9fe:a9fe/128", Refusal::CloudMetadata),
    ("fd00:a9fe:a9fe::1/128", Refusal::CloudMetadata),
    ("fd00:42::42/128", Refusal::CloudMetadata),
    // RFC 8215: where the IPv4 address stands depends on the network, so all of it is special.
    ("64:ff9b:1::/48", Refusal::LocalNat64),
];

static SPECIAL: LazyLock<Vec<(IpNet, Refusal)>> =
    LazyLock::new(|| PREFIXES.iter().filter_map(|(prefix, refusal)| Some((prefix.parse().ok()?, *refusal))).collect());

/// The refusal for a special address, `None` for any other. A special address is dialled only if a prefix names exactly this address;
/// a multicast address is never dialled.
pub fn special(address: IpAddr) -> Option<Refusal> {
    let listed =
        |address: IpAddr| SPECIAL.iter().find(|(prefix, _)| prefix.contains(&address)).map(|(_, refusal)| *refusal);
    let address = address.to_canonical();
    listed(address).or_else(|| listed(stands_for(address)?.into()))
}

/// Every special prefix, also of IPv6 addresses that stand for special IPv4 addresses.
pub(crate) fn special_prefixes() -> impl Iterator<Item = IpNet> {
    SPECIAL.iter().flat_map(|(prefix, _)| forms(*prefix))
}

/// A prefix, and the prefixes of the IPv6 addresses that stand for the IPv4 addresses in it.
pub(crate) fn forms(prefix: IpNet) -> impl Iterator<Item = IpNet> {
    let embedded = match prefix {
        IpNet::V4(prefix) => EMBEDDINGS.iter().filter_map(|embedding| embedding.prefix(prefix)).collect(),
        IpNet::V6(_) => Vec::new(),
    };
    [prefix].into_iter().chain(embedded)
}

/// The IPv4 address that an IPv6 address stands for, wherever a translator or a tunnel of a well-known form is on the way.
pub(crate) fn stands_for(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else { return None };
    EMBEDDINGS.iter().find_map(|embedding| embedding.address(address))
}

/// A form of IPv6 address that contains an IPv4 address at a fixed place.
struct Embedding {
    before: u128,
    /// The number of bits before the IPv4 address.
    bits: u8,
}

const EMBEDDINGS: [Embedding; 4] = [
    // NAT64, 64:ff9b::/96 (RFC 6052).
    Embedding { before: 0x0064_ff9b << 96, bits: 96 },
    // 6to4, 2002::/16 (RFC 3056).
    Embedding { before: 0x2002 << 112, bits: 16 },
    // IPv4-compatible, ::/96 (RFC 4291).
    Embedding { before: 0, bits: 96 },
    // IPv4-translated, ::ffff:0:0:0/96 (RFC 2765).
    Embedding { before: 0xffff << 48, bits: 96 },
];

impl Embedding {
    fn address(&self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let bits = address.to_bits();
        let same = (bits ^ self.before).leading_zeros() >= u32::from(self.bits);
        same.then(|| Ipv4Addr::from_bits((bits >> (96 - self.bits)) as u32))
    }

    fn prefix(&self, prefix: Ipv4Net) -> Option<IpNet> {
        let bits = self.before | u128::from(prefix.network().to_bits()) << (96 - self.bits);
        Some(Ipv6Net::new(Ipv6Addr::from_bits(bits), self.bits + prefix.prefix_len()).ok()?.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An address in a prefix: the prefix's own bits, and these for the rest.
    fn inside(prefix: IpNet, bits: u128) -> IpAddr {
        match prefix {
            IpNet::V4(prefix) => {
                Ipv4Addr::from_bits(prefix.network().to_bits() | (bits as u32 & prefix.hostmask().to_bits())).into()
            }
            IpNet::V6(prefix) => {
                Ipv6Addr::from_bits(prefix.network().to_bits() | (bits & prefix.hostmask().to_bits())).into()
            }
        }
    }

    #[test]
    fn metadata_addresses_are_special_in_every_form() {
        let cases = [
            ("169.254.169.254", Some(Refusal::LinkLocal)),
            ("168.63.129.16", Some(Refusal::CloudMetadata)),
            ("100.100.100.200", Some(Refusal::CloudMetadata)),
            ("fd00:ec2::254", Some(Refusal::CloudMetadata)),
            ("fd20:ce::254", Some(Refusal::CloudMetadata)),
            ("::ffff:100.100.100.200", Some(Refusal::CloudMetadata)),
            ("64:ff9b::169.254.169.254", Some(Refusal::LinkLocal)),
            ("64:ff9b::168.63.129.16", Some(Refusal::CloudMetadata)),
            ("64:ff9b:1::1", Some(Refusal::LocalNat64)),
            ("64:ff9b:1:a9fe:a9:fe00::", Some(Refusal::LocalNat64)),
            ("2002:a9fe:a9fe::1", Some(Refusal::LinkLocal)),
            ("2002:7f00:1:ffff::9", Some(Refusal::Loopback)),
            ("::169.254.169.254", Some(Refusal::LinkLocal)),
            ("::127.0.0.1", Some(Refusal::Loopback)),
            ("::ffff:0:169.254.169.254", Some(Refusal::LinkLocal)),
            ("64:ff9b::224.0.0.1", Some(Refusal::Multicast)),
            ("::2", Some(Refusal::Unspecified)),
            ("::1", Some(Refusal::Loopback)),
            ("64:ff9b::8.8.8.8", None),
            ("2002:808:808::1", None),
            ("::8.8.8.8", None),
            ("168.63.129.17", None),
            ("fd00:ec2::255", None),
            ("10.0.0.1", None),
            ("2001:db8::1", None),
        ];
        for (address, want) in cases {
            assert_eq!(special(address.parse().unwrap()), want, "{address}");
        }
        assert_eq!(SPECIAL.len(), PREFIXES.len(), "each prefix is one");
    }

    proptest! {
        #[test]
        fn every_form_of_a_special_address_is_special(which in 0..PREFIXES.len(), bits: u128, rest: u128) {
            let (prefix, _) = SPECIAL[which];
            let address = inside(prefix, bits);
            let refusal = special(address);
            prop_assert!(refusal.is_some(), "{address}");
            for form in forms(address.into()) {
                let form = inside(form, rest);
                // `::` and `::1` have refusals of their own.
                prop_assert!(special(form).is_some(), "{form} stands for {address}");
                prop_assert!(special_prefixes().any(|prefix| prefix.contains(&form)), "{form}");
            }
        }

        #[test]
        fn the_prefixes_are_the_special_addresses(near in any::<prop::sample::Index>(), bits: u128, keep in 0u32..128) {
            let prefixes: Vec<IpNet> = special_prefixes().collect();
            let near = inside(prefixes[near.index(prefixes.len())], bits);
            // Near a special prefix, and anywhere.
            for address in [near, inside("::/0".parse().unwrap(), bits >> keep), inside("0.0.0.0/0".parse().unwrap(), bits)] {
                let address = address.to_canonical();
                prop_assert_eq!(special(address).is_some(), prefixes.iter().any(|prefix| prefix.contains(&address)), "{}", address);
            }
        }
    }
}
