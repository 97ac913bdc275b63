//! A flood of strangers' SYNs: every packet is counted, the events say how much they leave out, and the daemon does not notice.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use guard_common::packet::TCP;
use lab::{
    amount,
    bare::{cpu_of, memory},
    client::Outcome,
    daemon::packets as count,
    lab::{KUBELET, Lab, POLICY},
    net::Who,
    packets::{self, Flow, ip},
    process::until,
};
use nix::sys::socket::{MsgFlags, SockFlag, SockType, SockaddrIn, sendto, socket};
use nodeguard::report::status::Status;

/// SYNs a second at most, of all senders together.
const RATE: u32 = 110_000;

pub(crate) fn seconds() -> u32 {
    amount(3, 30)
}

/// What a process used: seconds of processor time and KiB of resident memory.
fn used(id: u32) -> (f64, f64) {
    (cpu_of(id).unwrap(), memory(id, "VmRSS").unwrap())
}

fn health(status: &Status, name: &str) -> u64 {
    status.health.iter().find(|health| health.name == name).unwrap().count
}

/// A SYN to kubelet's port from an address and port of its number.
fn syn(number: u32) -> Vec<u8> {
    // Strangers of 10.0.16.0/20: nobody answers there, and no rule admits them.
    let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 16, 0)) | (number & 0xfff));
    let port = 1024 + (number >> 12) as u16 % 60_000;
    let flow = Flow { from: (source, port).into(), to: Who::Node.at(false, KUBELET) };
    ip(flow, TCP, &packets::syn(flow, number))
}

/// Sends for so long, at most at the rate; how many went out.
pub(crate) fn send(seconds: u32) -> u64 {
    // An IP_HDRINCL socket: the kernel fills in the header's checksum.
    let raw = socket(
        nix::sys::socket::AddressFamily::Inet,
        SockType::Raw,
        SockFlag::empty(),
        nix::sys::socket::SockProtocol::Raw,
    );
    let raw = raw.unwrap();
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(Who::Node.v4(), 0));
    let started = Instant::now();
    let mut sent = 0u64;
    while started.elapsed() < Duration::from_secs(seconds.into()) {
        if sent > (started.elapsed().as_secs_f64() * f64::from(RATE)) as u64 {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        for _ in 0..64 {
            // A full queue is told, and what is told is not counted.
            sent += u64::from(
                sendto(std::os::fd::AsRawFd::as_raw_fd(&raw), &syn(sent as u32), &to, MsgFlags::empty()).is_ok(),
            );
        }
    }
    sent
}

#[test]
fn every_packet_of_a_flood_is_counted_and_the_daemon_does_not_notice() {
    let mut lab = Lab::new(POLICY).unwrap();
    let id = lab.daemon().unwrap().process.id();
    let daemon = lab.daemon.as_ref().unwrap();
    // The address is resolved, and the first events have made their room.
    lab.net.run(Who::Stranger, || Ok(send(1))).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let (before, (cpu, memory)) = (daemon.status().unwrap(), used(id));
    let started = Instant::now();
    let sent = lab.net.run(Who::Stranger, || Ok(send(seconds()))).unwrap();
    let took = started.elapsed();
    let denied = || count(&daemon.status().unwrap(), "no-selector") - count(&before, "no-selector");
    until("all have arrived", Duration::from_secs(5), || Ok(denied() >= sent)).ok();
    let (cpu_after, memory_after) = used(id);
    let after = daemon.status().unwrap();
    let untold = |name: &str| health(&after, name) - health(&before, name);
    let [repeated, sampled, lost] = ["events-repeated", "events-sampled", "events-lost"].map(untold);
    let share = (cpu_after - cpu) / took.as_secs_f64();
    println!(
        "flood: {sent} SYNs in {took:.1?} ({:.0} a second), {} denied and counted; events: {repeated} repeated, {sampled} sampled out, {lost} lost; daemon {:.2} of a core, {memory} -> {memory_after} KiB",
        sent as f64 / took.as_secs_f64(),
        denied(),
        share
    );
    assert_eq!(denied(), sent, "exact to the packet");
    assert!(repeated + sampled + lost < sent, "some are told");
    assert!(share < 0.5, "{share:.2} of a core");
    assert!(memory_after <= memory * 1.1, "{memory} -> {memory_after} KiB");
    assert_eq!(lab.healthz(Who::Peer, false).unwrap(), Outcome::Http(200));
}
