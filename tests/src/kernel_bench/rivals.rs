//! Owns what other guards the same port is measured with: nftables with a set and with a verdict map, iptables with an ipset.
//! Called by `flood` for their rules in the node's namespace, and by `edit` for what loading their sets takes.
//! Must never be set up worse than their own documents say: no connection tracking, the port matched first, one look-up in a set of intervals.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use ipnet::IpNet;
use lab::{
    net::isolated,
    process::{run_tool, until},
};

/// Another way to guard a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rival {
    NftSet,
    NftMap,
    Ipset,
}

impl Rival {
    pub(crate) const ALL: [Rival; 3] = [Rival::NftSet, Rival::NftMap, Rival::Ipset];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Rival::NftSet => "nftables, set",
            Rival::NftMap => "nftables, map",
            Rival::Ipset => "iptables, ipset",
        }
    }

    /// Guards a port of the calling thread's network namespace; the prefixes must not overlap.
    pub(crate) fn install(self, port: u16, nets: &[IpNet]) -> Result<()> {
        match self {
            Rival::NftSet => nft_table(&elements("set allowed { type ipv4_addr", nets, ""), port, "@allowed accept"),
            Rival::NftMap => nft_table(
                &elements("map verdicts { type ipv4_addr : verdict", nets, " : accept"),
                port,
                "vmap @verdicts",
            ),
            Rival::Ipset => {
                run_tool("ipset", &["restore"], &ipset_text(nets))?;
                let port = port.to_string();
                let rule = ["-w", "-A", "INPUT", "-p", "tcp", "--dport", &port];
                let allowed = ["-m", "set", "--match-set", "allowed", "src", "-j", "ACCEPT"];
                run_tool(iptables(), &[&rule[..], &allowed].concat(), "")?;
                run_tool(iptables(), &[&rule[..], &["-j", "DROP"]].concat(), "").map(drop)
            }
        }
    }

    /// Takes it away again.
    pub(crate) fn remove(self) -> Result<()> {
        if self != Rival::Ipset {
            return nft("delete table ip bench\n");
        }
        run_tool(iptables(), &["-w", "-F", "INPUT"], "")?;
        // A rule that was removed holds its set a moment longer.
        let destroyed = || Ok(run_tool("ipset", &["destroy", "allowed"], "").is_ok());
        until("the ipset is free", Duration::from_secs(5), destroyed)
    }
}

/// What loading the prefixes into a set of nftables takes; `None` where there is no `nft` or the kernel has no such sets.
pub(crate) fn load_set(nets: &[IpNet]) -> Result<Option<Duration>> {
    let text = format!("table ip bench {{\n{}\n}}\n", elements("set allowed { type ipv4_addr; auto-merge", nets, ""));
    isolated(&[], || {
        if nft("table ip probe {\nset s { type ipv4_addr; flags interval; }\n}\n").is_err() {
            return Ok(None);
        }
        let started = Instant::now();
        nft(&text)?;
        Ok(Some(started.elapsed()))
    })
}

/// What the kernel says that an ipset of these prefixes takes; `None` where there is no ipset.
pub(crate) fn ipset_bytes(nets: &[IpNet]) -> Result<Option<f64>> {
    isolated(&[], || {
        if run_tool("ipset", &["restore"], &ipset_text(nets)).is_err() {
            return Ok(None);
        }
        let said = run_tool("ipset", &["list", "-t", "allowed"], "")?;
        Ok(said.lines().find_map(|line| line.strip_prefix("Size in memory:")?.trim().parse().ok()))
    })
}

/// A set or map of intervals, with something behind each prefix.
fn elements(of: &str, nets: &[IpNet], behind: &str) -> String {
    let all: Vec<String> = nets.iter().map(|net| format!("{net}{behind}")).collect();
    format!("{of}; flags interval; elements = {{ {} }}; }}", all.join(", "))
}

fn ipset_text(nets: &[IpNet]) -> String {
    let added: String = nets.iter().map(|net| format!("add allowed {net}\n")).collect();
    format!("create allowed hash:net family inet maxelem {}\n{added}", nets.len().max(65_536))
}

/// The classic one where it is there: its match calls ipset without a layer between.
fn iptables() -> &'static str {
    if Path::new("/usr/sbin/iptables-legacy").is_file() { "iptables-legacy" } else { "iptables" }
}

/// A table with a set or a map, and a chain on the way in.
fn nft_table(set: &str, port: u16, by: &str) -> Result<()> {
    let rules = format!("tcp dport {port} ip saddr {by}\ntcp dport {port} counter drop");
    let hook = "type filter hook input priority filter; policy accept;";
    nft(&format!("table ip bench {{\n{set}\nchain input {{ {hook}\n{rules}\n}}\n}}\n"))
}

fn nft(text: &str) -> Result<()> {
    run_tool("nft", &["-f", "-"], text).map(drop)
}
