//! Owns what a hostile or broken server may send once a stream is up: one attack after the other.
//! Called by the tunnel tests, for a minute in an ordinary run and for ten in a soak.
//! Must never wait for an agent that does not read: an attack is bounded in packets and in time.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use nodeguard::wire::frames::{DialRequest, Packet, Payload};
use tokio::time::timeout;

use crate::fake::{Agent, close, close_dial, data, dial};

/// How long an attack may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a server does to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Dials that are refused, without end, and no answer is read.
    DialsUnread,
    /// Dials to an endpoint that answers, without end.
    Dials,
    /// One `random` for many dials, taken back while they are under way.
    SameRandom,
    /// Addresses and protocols that are none.
    Malformed,
    /// Types that do not exist, payloads of another type, no payload.
    UnknownKinds,
    /// Bytes and closes for connections that never were.
    UnknownIds,
    /// Messages without bytes on an open connection.
    Empty,
    /// Bytes by the megabyte for an endpoint that never reads.
    Flood,
    /// Every order of dial, bytes, close and taking back.
    Orders,
    /// One message that is larger than the protocol allows.
    Oversize,
}

impl Attack {
    /// All of them; the last ends the stream.
    pub const ALL: [Attack; 10] = [
        Attack::DialsUnread,
        Attack::Dials,
        Attack::SameRandom,
        Attack::Malformed,
        Attack::UnknownKinds,
        Attack::UnknownIds,
        Attack::Empty,
        Attack::Flood,
        Attack::Orders,
        Attack::Oversize,
    ];

    /// Attacks through a stream, with so many packets. That the agent ends the stream is a fair answer.
    pub async fn run(self, agent: &mut Agent, endpoint: &str, packets: usize) {
        let _ = timeout(PATIENCE, self.attack(agent, endpoint, packets)).await;
    }

    async fn attack(self, agent: &mut Agent, endpoint: &str, packets: usize) -> Result<()> {
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
                let kinds = [0, 1, 2, 3, 4, 5, 6, 7, 8, 1000, -1, i32::MAX, i32::MIN];
                let all = kinds
                    .iter()
                    .flat_map(|kind| payloads.iter().map(|payload| Packet { kind: *kind, payload: payload.clone() }));
                let all: Vec<Packet> = all.collect();
                send_and_read(agent, all.into_iter().cycle().take(packets)).await?;
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
                let id = open(agent, endpoint).await?;
                send_and_read(agent, (0..count).map(|_| data(id, Bytes::new()))).await?;
            }
            Attack::Flood => {
                let id = open(agent, endpoint).await?;
                agent.outbound.send(Ok(data(id, Bytes::from_static(b"NEVER\n")))).await?;
                let chunk = Bytes::from(vec![0; 1 << 20]);
                send_and_read(agent, (0..64).map(|_| data(id, chunk.clone()))).await?;
            }
            Attack::Orders => {
                for round in 0..count / 20 {
                    let id = open(agent, endpoint).await?;
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
                let id = open(agent, endpoint).await?;
                let chunk = Bytes::from(vec![0; (4 << 20) - 100]);
                agent.outbound.send(Ok(data(id, chunk))).await?;
                agent.outbound.send(Ok(data(id, Bytes::from(vec![0; 5 << 20])))).await?;
                while agent.inbound.message().await?.is_some() {}
            }
        }
        Ok(())
    }
}

/// Dials, and waits for the connection's id.
async fn open(agent: &mut Agent, endpoint: &str) -> Result<i64> {
    const RANDOM: i64 = 0x0123_4567;
    agent.outbound.send(Ok(dial(endpoint, RANDOM))).await?;
    loop {
        let packet = agent.inbound.message().await?;
        match packet.and_then(|packet| packet.payload) {
            Some(Payload::DialResponse(answer)) if answer.random == RANDOM => {
                anyhow::ensure!(answer.error.is_empty(), answer.error);
                return Ok(answer.connect_id);
            }
            Some(_) => {}
            None => anyhow::bail!("the stream ended"),
        }
    }
}

/// Sends, and reads whatever comes meanwhile and a little after.
async fn send_and_read(agent: &mut Agent, packets: impl Iterator<Item = Packet> + Send) -> Result<()> {
    let Agent { inbound, outbound, .. } = agent;
    let sending = async {
        for packet in packets {
            outbound.send(Ok(packet)).await?;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        anyhow::Ok(())
    };
    tokio::select! {
        sent = sending => sent,
        ended = async { loop { match inbound.message().await { Ok(Some(_)) => {} Ok(None) | Err(_) => return } } } => {
            let () = ended;
            anyhow::bail!("the agent ended the stream")
        }
    }
}
