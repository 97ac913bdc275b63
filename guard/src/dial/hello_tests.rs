//! Owns the tests of `hello`: real hellos, made-up ones, broken ones, each in every piecemeal.

use std::sync::Arc;

use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use super::*;

/// What rustls sends first.
fn real(versions: &[&'static rustls::SupportedProtocolVersion], name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// What rustls answers to that, or says without having been asked sensibly.
fn answered(hello: &[u8]) -> Vec<u8> {
    let key = rcgen::generate_simple_self_signed(vec!["a".to_owned()]).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], key.signing_key.serialize_der().try_into().unwrap())
        .unwrap();
    let mut server = ServerConnection::new(Arc::new(config)).unwrap();
    server.read_tls(&mut &hello[..]).unwrap();
    let _ = server.process_new_packets();
    let mut bytes = Vec::new();
    server.write_tls(&mut bytes).unwrap();
    bytes
}

fn told(bytes: &[u8]) -> Told {
    ClientHello::default().push(bytes)
}

/// One ClientHello, cut into records of these lengths.
fn hello(session: usize, suites: usize, extensions: &[(u16, usize)], record: usize) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(session as u8);
    body.extend(vec![1; session]);
    body.extend((2 * suites as u16).to_be_bytes());
    body.extend(vec![0x13; 2 * suites]);
    body.extend([1, 0]);
    let mut list = Vec::new();
    for (kind, length) in extensions {
        list.extend(kind.to_be_bytes());
        list.extend((*length as u16).to_be_bytes());
        list.extend(vec![0; *length]);
    }
    body.extend((list.len() as u16).to_be_bytes());
    body.extend(list);
    let mut message = vec![CLIENT_HELLO];
    message.extend(&(body.len() as u32).to_be_bytes()[1..]);
    message.extend(body);
    let mut bytes = Vec::new();
    for part in message.chunks(record) {
        bytes.extend([HANDSHAKE, 3, 1]);
        bytes.extend((part.len() as u16).to_be_bytes());
        bytes.extend(part);
    }
    bytes
}

#[test]
fn real_hellos_and_their_answers_are_tls() {
    for versions in [&[&rustls::version::TLS13][..], &[&rustls::version::TLS12], rustls::ALL_VERSIONS] {
        for name in ["node-1", "10.0.0.7", &"a.".repeat(60)] {
            let hello = real(versions, name.trim_end_matches('.'));
            assert_eq!(told(&hello), Told::Tls);
            assert_eq!(told(&hello[..hello.len() - 1]), Told::NotYet);
            let answer_bytes = answered(&hello);
            assert_eq!(judge_answer(&answer_bytes), Told::Tls);
            for count in 0..ANSWER {
                assert_eq!(judge_answer(&answer_bytes[..count]), Told::NotYet, "{count}");
            }
        }
    }
    // An alert: what a server says to a hello that it does not like.
    let alert = answered(&hello(0, 1, &[], 1000));
    assert_eq!((alert[0], judge_answer(&alert)), (ALERT, Told::Tls));
}

#[test]
fn other_protocols_are_told_by_their_first_byte() {
    for plain in ["GET / HTTP/1.1\r\n", "SSH-2.0-OpenSSH", "PRI * HTTP/2.0", "\u{0}\u{0}", "220 mail", "{", "\u{17}"] {
        assert!(matches!(told(&plain.as_bytes()[..1]), Told::Not(_)), "{plain:?}");
        assert!(matches!(judge_answer(&plain.as_bytes()[..1]), Told::Not(_)), "{plain:?}");
    }
    // SSL 2 has its length first; SSL 3 is no TLS; a server's first message is not a client's, and the other way round.
    let other =
        [&b"\x80\x2e\x01\x03\x01"[..], b"\x16\x03\x00", b"\x16\x02", b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\x40\x01"];
    for bytes in other.into_iter().chain([&b"\x16\x03\x01\x00\x05\x02"[..], b"\x16\x03\x01\x00\x05\x01\x01\x00\x00"]) {
        assert!(matches!(told(bytes), Told::Not(_)), "{bytes:?}");
    }
    for bytes in
        [&b"\x16\x03\x03\x00\x40\x01\x00"[..], b"\x15\x03\x03\x00\x03\x01\x00", b"\x15\x03\x03\x00\x02\x03\x00"]
    {
        assert!(matches!(judge_answer(bytes), Told::Not(_)), "{bytes:?}");
    }
}

#[test]
fn a_hello_that_does_not_hold_together_is_none() {
    let good = hello(32, 3, &[(0, 5), (43, 3)], 1000);
    assert_eq!(told(&good), Told::Tls);
    assert!(matches!(told(&hello(33, 1, &[], 1000)), Told::Not(_)), "a session id of 33 bytes");
    assert!(matches!(told(&hello(0, 0, &[], 1000)), Told::Not(_)), "no cipher suites");
    assert!(matches!(told(&hello(0, 1, &[(5, 1), (5, 1)], 1000)), Told::Not(_)), "an extension twice");
    let mut longer = good.clone();
    longer.push(0);
    longer[4] += 1;
    assert!(matches!(told(&longer), Told::Not(_)), "a record that goes on");
    for at in [5 + 1, 5 + 2, 5 + 3, 5 + 4 + 34, 5 + 4 + 67, 5 + 4 + 68] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert_ne!(told(&bad), Told::Tls, "byte {at}");
    }
}

proptest! {
    #[test]
    fn pieces_do_not_matter_and_no_prefix_is_enough(
        session in 0usize..=32,
        suites in 1usize..60,
        kinds in prop::collection::btree_map(any::<u16>(), 0usize..300, 0..12),
        record in 1usize..600,
        piece in 1usize..700,
        behind in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let extensions: Vec<_> = kinds.into_iter().collect();
        let hello = hello(session, suites, &extensions, record);
        prop_assert_eq!(told(&hello[..hello.len() - 1]), Told::NotYet);
        let mut reader = ClientHello::default();
        let all: Vec<u8> = hello.iter().chain(&behind).copied().collect();
        let mut taken = 0;
        for part in all.chunks(piece) {
            taken += part.len();
            prop_assert_eq!(reader.push(part), if taken >= hello.len() { Told::Tls } else { Told::NotYet });
        }
    }

    #[test]
    fn what_is_told_of_any_bytes_does_not_depend_on_the_pieces(bytes in prop::collection::vec(any::<u8>(), 0..400), start in any::<bool>(), piece in 1usize..50) {
        let bytes = if start { [&b"\x16\x03\x01\x00\x90\x01\x00\x00\x8c\x03\x03"[..], &bytes].concat() } else { bytes };
        let mut reader = ClientHello::default();
        let last = bytes.chunks(piece).map(|part| reader.push(part)).last().unwrap_or(Told::NotYet);
        prop_assert_eq!(last, told(&bytes));
        prop_assert!(reader.message.len() <= LONGEST + 4);
        let _ = judge_answer(&bytes);
    }

    #[test]
    fn a_changed_length_is_never_taken_for_the_whole(at in 0usize..3, by in 1u8..=255) {
        let good = hello(8, 2, &[(1, 4)], 1000);
        let mut bad = good.clone();
        // Lengths of the handshake message: with another one it ends elsewhere than its record.
        bad[6 + at] = bad[6 + at].wrapping_add(by);
        prop_assert_ne!(told(&bad), Told::Tls);
    }
}
