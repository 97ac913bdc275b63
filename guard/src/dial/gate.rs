//! Owns the beginning of a dial for which the policy requires TLS (`tls: Required`): a ClientHello, then the backend's answer to it.
//! Called by `serve`, before `relay`.
//! Must never pass on a byte to the backend before a whole ClientHello has come, nor a byte from the backend that is not an answer to it.

use std::{io, mem::MaybeUninit, time::Duration};

use bytes::BytesMut;
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::dial::{
    connections::{CloseReason, Ending},
    hello::{ANSWER, ClientHello, Told, judge_answer},
    queue::Queued,
};

/// How long a side may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often an incomplete answer is looked at again: its first bytes nearly always come together.
const AGAIN: Duration = Duration::from_millis(5);

/// Waits until both sides have begun with TLS. The backend then has the ClientHello, and its answer is still in the socket.
pub(crate) async fn gate(backend: &mut TcpStream, queued: &mut Queued, ending: &Ending) -> Result<(), CloseReason> {
    tokio::select! {
        biased;
        reason = ending.ended() => Err(reason),
        begun = begun(backend, queued, PATIENCE) => begun,
    }
}

async fn begun(backend: &mut TcpStream, queued: &mut Queued, patience: Duration) -> Result<(), CloseReason> {
    let held = timeout(patience, hello(backend, queued)).await.map_err(|_elapsed| CloseReason::NotTls)??;
    let passed_on = async {
        backend.write_all(&held).await.map_err(|_| CloseReason::BackendReset)?;
        queued.wrote(held.len());
        tokio::select! {
            told = answered(backend) => told,
            () = queued.closed() => Err(CloseReason::ControlPlaneClosed),
        }
    };
    timeout(patience, passed_on).await.map_err(|_elapsed| CloseReason::NotTls)?
}

/// Collects the ClientHello, and the bytes that came in one piece with its end.
async fn hello(backend: &TcpStream, queued: &mut Queued) -> Result<BytesMut, CloseReason> {
    let (mut reader, mut held) = (ClientHello::default(), BytesMut::new());
    let mut first = [0];
    loop {
        let bytes = tokio::select! {
            biased;
            bytes = queued.next() => bytes.ok_or(CloseReason::ControlPlaneClosed)?,
            spoke = backend.peek(&mut first) => return Err(match spoke {
                Ok(0) => CloseReason::BackendClosed,
                Ok(_) => CloseReason::NotTls,
                Err(_) => CloseReason::BackendReset,
            }),
        };
        let told = reader.push(&bytes);
        // Copied: a piece of one byte may keep a whole buffer.
        held.extend_from_slice(&bytes);
        match told {
            Told::NotYet => {}
            Told::Not(why) => {
                tracing::debug!(why, "not TLS from the control plane");
                return Err(CloseReason::NotTls);
            }
            Told::Tls => break,
        }
    }
    // A backend that speaks first does not speak TLS either. Its bytes are in the socket by now.
    match SockRef::from(backend).peek(&mut [MaybeUninit::uninit()]) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(held),
        Err(_) => Err(CloseReason::BackendReset),
        Ok(0) => Err(CloseReason::BackendClosed),
        Ok(_) => Err(CloseReason::NotTls),
    }
}

async fn answered(backend: &TcpStream) -> Result<(), CloseReason> {
    loop {
        let mut first = [0; ANSWER];
        let count = backend.peek(&mut first).await.map_err(|_| CloseReason::BackendReset)?;
        if count == 0 {
            return Err(CloseReason::BackendClosed);
        }
        match judge_answer(first.get(..count).unwrap_or_default()) {
            Told::NotYet => sleep(AGAIN).await,
            Told::Not(why) => {
                tracing::debug!(why, "not TLS from the backend");
                return Err(CloseReason::NotTls);
            }
            Told::Tls => return Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
