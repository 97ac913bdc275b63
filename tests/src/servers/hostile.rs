//! Owns what a hostile or broken server may send once a stream is up: one attack after the other.
//! Called by the tunnel tests, for a minute in an ordinary run and for ten in a soak.
//! Must never wait for an agent that does not read: an attack is bounded in packets and in time.

use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use nodeguard::wire::frames::{DialRequest, Packet, Payload};
use tokio::time::timeout;

use super::fake::{Agent, close, close_dial, data, dial};

/// How long an attack may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a server does to an agent. The last one ends the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attack {
    /// Dials that are refused, without end, and no answer is read.
    DialsUnread,
    /// Dials to an endpoint that answers, without end.
    Dials,
    /// The same `random` for many dials, taken back while they are under way.
    SameRandom,
    /// Malformed addresses and unknown protocols.
    Malformed,
    /// Types that do not exist, payloads of another type, no payload.
    UnknownKinds,
    /// Bytes and closes for connections that never existed.
    UnknownIds,
    /// Messages without bytes on an open connection.
    Empty,
    /// Megabytes for an endpoint that never reads.
    Flood,
    /// Every order of dial, bytes, close and taking back.
    Orders,
    /// One message that is larger than the protocol allows.
    Oversize,
}

impl Attack {
    /// Attacks through a stream, with so many packets. The agent may end the stream: that is a fair answer.
    pub async fn run(self, agent: &mut Agent, endpoint: &str, packets: usize) {
        let _ = timeout(PATIENCE, self.attack(agent, endpoint, packets)).await;
    }

    async fn attack(self, agent: &mut Agent, endpoint: &str, packets: usize) -> Result<()> {
        /// The `random` of the dials whose connection an attack needs.
        const RANDOM: i64 = 0x0123_4567;
        let count = packets as i64;
        match self {
            Attack::DialsUnread => {
                for random in 0..count {
                    agent.outbound.send(Ok(dial("192.0.2.1:1", random))).await?;
                }
            }
            Attack::Dials => send_and_read(agent, (0..count).map(|random| dial(endpoint, random))).await?,
            Attack::SameRandom => {
                let packets = (0..count).map(|number| if number % 7 == 6 { close_dial(1) } else { dial(endpoint, 1) });
                send_and_read(agent, packets).await?;
            }
            Attack::Malformed => {
                let long = "x".repeat(70_000);
                let addresses =
                    ["", ":", "a", "a:", ":1", "a:0", "a:65536", "[::1", "[fe80::1%eth0]:1", "a:http", "\0:1", &long];
                let mut sent: Vec<Packet> = addresses.iter().map(|address| dial(address, 1)).collect();
                for protocol in ["", "udp", "unix", "TCP", "tcp4", &long] {
                    let (protocol, address) = (protocol.to_owned(), endpoint.to_owned());
                    let payload = Payload::DialRequest(DialRequest { protocol, address, random: i64::MIN });
                    sent.push(Packet { kind: 0, payload: Some(payload) });
                }
                // Each is 70 kB at most: a few rounds are enough.
                send_and_read(agent, sent.into_iter().cycle().take(packets.min(500))).await?;
            }
            Attack::UnknownKinds => {
                let payloads = [None, dial(endpoint, 1).payload, data(1, Bytes::from_static(b"x")).payload];
                let mut sent = Vec::new();
                for kind in [0, 1, 2, 3, 4, 5, 6, 7, 8, 1000, -1, i32::MAX, i32::MIN] {
                    sent.extend(payloads.iter().map(|payload| Packet { kind, payload: payload.clone() }));
                }
                send_and_read(agent, sent.into_iter().cycle().take(packets)).await?;
            }
            Attack::UnknownIds => {
                let packets = (0..count).map(|number| match number % 3 {
                    0 => data(number * 977, Bytes::from_static(b"x")),
                    1 => close(-number),
                    _ => close_dial(number),
                });
                send_and_read(agent, packets).await?;
            }
            Attack::Empty => {
                let id = agent.open(endpoint, RANDOM).await?;
                send_and_read(agent, (0..count).map(|_| data(id, Bytes::new()))).await?;
            }
            Attack::Flood => {
                let id = agent.open(endpoint, RANDOM).await?;
                agent.outbound.send(Ok(data(id, Bytes::from_static(b"NEVER\n")))).await?;
                let chunk = Bytes::from(vec![0; 1 << 20]);
                send_and_read(agent, (0..64).map(|_| data(id, chunk.clone()))).await?;
            }
            Attack::Orders => {
                for round in 0..count / 20 {
                    let id = agent.open(endpoint, RANDOM).await?;
                    let mut steps = [
                        data(id, Bytes::from_static(b"SOURCE 70000\n")),
                        close(id),
                        close(id),
                        close_dial(1),
                        dial(endpoint, 1),
                    ];
                    // Another order each round.
                    steps.rotate_left(usize::try_from(round).unwrap_or(0) % 5);
                    if round % 2 == 1 {
                        steps.reverse();
                    }
                    send_and_read(agent, steps.into_iter()).await?;
                }
            }
            Attack::Oversize => {
                let id = agent.open(endpoint, RANDOM).await?;
                let chunk = Bytes::from(vec![0; (4 << 20) - 100]);
                agent.outbound.send(Ok(data(id, chunk))).await?;
                agent.outbound.send(Ok(data(id, Bytes::from(vec![0; 5 << 20])))).await?;
                while agent.inbound.message().await?.is_some() {}
            }
        }
        Ok(())
    }
}

/// Sends, and reads whatever comes meanwhile and shortly after.
async fn send_and_read(agent: &mut Agent, packets: impl Iterator<Item = Packet> + Send) -> Result<()> {
    let Agent { inbound, outbound, .. } = agent;
    let sending = async {
        for packet in packets {
            outbound.send(Ok(packet)).await?;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        Ok(())
    };
    let reading = async { while matches!(inbound.message().await, Ok(Some(_))) {} };
    tokio::select! {
        sent = sending => sent,
        () = reading => bail!("the agent ended the stream"),
    }
}
