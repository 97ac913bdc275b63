//! Owns the tests of `gate`: what reaches the backend and what comes back, whoever begins with what.

use bytes::Bytes;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};

use crate::{
    dial::{
        budget::Budget,
        gate::*,
        limits::Limits,
        queue::{Queue, queue},
        relay::{Relayed, relay},
    },
    wire::frames::{Packet, Payload},
};

struct Rig {
    backend: TcpStream,
    queue: Queue,
    ending: Ending,
    outbound: mpsc::Receiver<Packet>,
    relayed: JoinHandle<Relayed>,
}

/// A dial through the gate, as `dial` carries it.
async fn rig() -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let backend = listener.accept().await.unwrap().0;
    let ending = Ending::default();
    let (queue, mut queued) = queue(&Budget::new(Limits::default()), ending.clone());
    let (sender, outbound) = mpsc::channel(16);
    let end = ending.clone();
    let relayed = tokio::spawn(async move {
        if let Err(reason) = gate(&mut ours, &mut queued, &end).await {
            end.end(reason);
        }
        relay(ours, queued, 7, &sender, &end).await
    });
    Rig { backend, queue, ending, outbound, relayed }
}

/// The shortest hello: TLS 1.2 without extensions.
fn hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([9; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    let length = body.len() as u8;
    [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &body].concat()
}

const SERVER_HELLO: &[u8] = b"\x16\x03\x03\x00\x40\x02\x00\x00\x3c";

/// Every DATA that came out, and the error of the close.
async fn said(outbound: &mut mpsc::Receiver<Packet>) -> (Vec<u8>, String) {
    let mut all = Vec::new();
    loop {
        match outbound.recv().await.unwrap().payload {
            Some(Payload::Data(data)) => all.extend_from_slice(&data.data),
            Some(Payload::CloseResponse(close)) => return (all, close.error),
            other => panic!("{other:?}"),
        }
    }
}

/// What the backend gets, and whether that ended with a FIN.
async fn got(backend: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let clean = backend.read_to_end(&mut all).await.is_ok();
    (all, clean)
}

#[tokio::test]
async fn tls_passes_whole_in_whatever_pieces() {
    for piece in [1, 7, 1000] {
        let Rig { mut backend, queue, mut outbound, relayed, .. } = rig().await;
        let bytes = [&hello()[..], b"more"].concat();
        for part in bytes.chunks(piece) {
            assert!(queue.push(Bytes::copy_from_slice(part)).is_ok());
            assert!(queue.push(Bytes::new()).is_ok());
        }
        let mut seen = vec![0; bytes.len()];
        let first = hello().len();
        backend.read_exact(&mut seen[..first]).await.unwrap();
        backend.write_all(&SERVER_HELLO[..3]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        backend.write_all(&SERVER_HELLO[3..]).await.unwrap();
        backend.read_exact(&mut seen[first..]).await.unwrap();
        assert_eq!(seen, bytes);
        let answer = outbound.recv().await.unwrap().payload;
        assert!(matches!(answer, Some(Payload::Data(data)) if data.data == SERVER_HELLO), "the answer, whole");
        assert!(queue.push(Bytes::from_static(b"after")).is_ok());
        queue.close();
        assert_eq!(got(&mut backend).await, (b"after".to_vec(), true));
        drop(backend);
        assert_eq!(said(&mut outbound).await, (Vec::new(), String::new()));
        let relayed = relayed.await.unwrap();
        assert_eq!((relayed.to_backend, relayed.reason), (bytes.len() as u64 + 5, CloseReason::ControlPlaneClosed));
    }
}

#[tokio::test]
async fn plain_text_never_reaches_the_backend() {
    for (begin, rest) in
        [(&b"G"[..], &b"ET / HTTP/1.1\r\n\r\n"[..]), (b"\x16\x03\x01\x00\x2f", b"\x02"), (b"", b"SSH-2.0-x")]
    {
        let Rig { mut backend, queue, mut outbound, relayed, .. } = rig().await;
        assert!(queue.push(Bytes::copy_from_slice(begin)).is_ok());
        assert!(queue.push(Bytes::copy_from_slice(rest)).is_ok());
        assert_eq!(got(&mut backend).await, (Vec::new(), false), "no byte, and a RST");
        assert_eq!(said(&mut outbound).await, (Vec::new(), "closed by the guard: not-tls".to_owned()));
        let relayed = relayed.await.unwrap();
        assert_eq!((relayed.to_backend, relayed.to_control_plane, relayed.reason), (0, 0, CloseReason::NotTls));
    }
}

#[tokio::test]
async fn a_backend_that_speaks_first_or_plainly_is_not_heard() {
    // Before anything was said; before the hello is whole; as the answer to it.
    for when in 0..3 {
        let Rig { mut backend, queue, mut outbound, relayed, .. } = rig().await;
        let hello = hello();
        if when == 0 {
            backend.write_all(b"SSH-2.0-OpenSSH\r\n").await.unwrap();
        }
        if when == 1 {
            assert!(queue.push(Bytes::copy_from_slice(&hello[..9])).is_ok());
            tokio::time::sleep(Duration::from_millis(20)).await;
            backend.write_all(b"220 mail\r\n").await.unwrap();
        }
        if when == 2 {
            assert!(queue.push(Bytes::copy_from_slice(&hello)).is_ok());
            backend.read_exact(&mut vec![0; hello.len()]).await.unwrap();
            backend.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        }
        let (data, error) = said(&mut outbound).await;
        assert_eq!((data, error), (Vec::new(), "closed by the guard: not-tls".to_owned()), "{when}");
        let relayed = relayed.await.unwrap();
        assert_eq!((relayed.to_control_plane, relayed.reason), (0, CloseReason::NotTls));
        assert_eq!(relayed.to_backend, if when == 2 { hello.len() as u64 } else { 0 });
        assert!(!got(&mut backend).await.1, "a RST");
    }
}

#[tokio::test]
async fn whoever_ends_it_meanwhile_is_the_reason() {
    let Rig { backend: _held, queue, mut outbound, relayed, .. } = rig().await;
    queue.close();
    let _ = said(&mut outbound).await;
    assert_eq!(relayed.await.unwrap().reason, CloseReason::ControlPlaneClosed);
    let Rig { backend, mut outbound, relayed, queue: _open, .. } = rig().await;
    drop(backend);
    let _ = said(&mut outbound).await;
    assert_eq!(relayed.await.unwrap().reason, CloseReason::BackendClosed);
    let Rig { backend: _held, ending, mut outbound, relayed, queue: _open } = rig().await;
    ending.end(CloseReason::PolicyChanged);
    let _ = said(&mut outbound).await;
    assert_eq!(relayed.await.unwrap().reason, CloseReason::PolicyChanged);
}

#[tokio::test]
async fn nobody_is_waited_for_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let mut backend = listener.accept().await.unwrap().0;
    let (to_it, mut queued) = queue(&Budget::new(Limits::default()), Ending::default());
    let patience = Duration::from_millis(50);
    assert_eq!(
        begun(&mut ours, &mut queued, patience).await,
        Err(CloseReason::NotTls),
        "a control plane that says nothing"
    );
    assert!(to_it.push(hello().into()).is_ok());
    assert_eq!(begun(&mut ours, &mut queued, patience).await, Err(CloseReason::NotTls), "a backend that says nothing");
    backend.write_all(&SERVER_HELLO[..2]).await.unwrap();
    assert_eq!(judge_answer(&SERVER_HELLO[..2]), Told::NotYet);
    assert_eq!(timeout(patience, answered(&ours)).await.ok(), None, "one that says half");
}
