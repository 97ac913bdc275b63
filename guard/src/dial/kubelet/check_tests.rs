//! Owns the tests of kubelet's certificate: what holds, what does not, and when it is looked at again.

use std::{net::Ipv4Addr, path::PathBuf, sync::atomic::AtomicUsize};

use guard_policy::pin::Pin;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PublicKeyData, SanType, date_time_ymd};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

use super::*;

struct Ca(Issuer<'static, KeyPair>);

impl Ca {
    fn new(file: &Path) -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(file, params.self_signed(&key).unwrap().pem()).unwrap();
        Ca(Issuer::new(params, key))
    }

    fn leaf(&self, names: Vec<SanType>, end: i32) -> Leaf {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(end, 1, 1));
        let certificate = params.signed_by(&key, &self.0).unwrap().der().to_vec();
        Leaf { certificate, pin: Pin::of(&key.subject_public_key_info().into()), key: key.serialize_der() }
    }
}

struct Leaf {
    certificate: Vec<u8>,
    key: Vec<u8>,
    pin: Pin,
}

/// Something that listens with a certificate, and counts who came.
struct Kubelet {
    address: SocketAddr,
    came: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Kubelet {
    async fn listen(address: SocketAddr, leaf: &Leaf) -> Kubelet {
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.certificate.clone().into()], PrivateKeyDer::try_from(leaf.key.clone()).unwrap())
            .unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        let listener: TcpListener = socket.listen(64).unwrap();
        let address = listener.local_addr().unwrap();
        let came = Arc::<AtomicUsize>::default();
        let (count, acceptor) = (Arc::clone(&came), TlsAcceptor::from(Arc::new(config)));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let acceptor = acceptor.clone();
                tokio::spawn(async move { drop(acceptor.accept(stream).await) });
            }
        });
        Kubelet { address, came, task }
    }

    async fn end(self) -> SocketAddr {
        self.task.abort();
        let _ = self.task.await;
        self.address
    }

    fn came(&self) -> usize {
        self.came.load(Ordering::Relaxed)
    }
}

async fn check(
    certificates: &Certificates,
    address: SocketAddr,
    demand: &Arc<CertificateDemand>,
) -> Result<(), String> {
    let connect = async { Ok(TcpStream::connect(address).await?) };
    match certificates.check(address, demand, connect).await {
        Ok(()) => Ok(()),
        Err(CheckError::Refused(why)) => Err(why.words()),
        Err(CheckError::Unreachable(BackendError::Socket(error))) => Err(format!("unreachable: {:?}", error.kind())),
        Err(CheckError::Unreachable(error)) => Err(format!("unreachable: {error}")),
    }
}

fn demand(ca: Option<&Path>, name: Option<&str>, pins: &[Pin]) -> Arc<CertificateDemand> {
    Arc::new(CertificateDemand { ca: ca.map(PathBuf::from), name: name.map(str::to_owned), pins: pins.to_vec() })
}

/// A pin of nobody's key.
fn nobodys() -> Pin {
    format!("{}=", "A".repeat(43)).parse().unwrap()
}

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

#[tokio::test]
async fn what_the_policy_asks_for_holds_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (file, other, none) =
        (directory.path().join("ca"), directory.path().join("other"), directory.path().join("none"));
    let ca = Ca::new(&file);
    Ca::new(&other);
    let names = || vec![SanType::IpAddress(LOCAL.ip()), SanType::DnsName("node-1".try_into().unwrap())];
    let good = ca.leaf(names(), 4096);
    let kubelet = Kubelet::listen(LOCAL, &good).await;
    let at = kubelet.address;
    let certificates = Certificates::default();
    let cases = [
        (demand(Some(&file), None, &[]), ""),
        (demand(Some(&file), Some("node-1"), &[]), ""),
        (demand(Some(&file), Some("127.0.0.1"), &[good.pin]), ""),
        (demand(None, None, &[nobodys(), good.pin]), ""),
        (demand(Some(&other), None, &[]), "does not come from a CA in"),
        (demand(Some(&other), None, &[good.pin]), "does not come from a CA in"),
        (demand(Some(&file), Some("node-2"), &[]), "is not for `node-2`"),
        (demand(Some(&file), None, &[nobodys()]), "none of the pins"),
        (demand(None, None, &[nobodys()]), "none of the pins"),
        (demand(Some(&none), None, &[]), "is not usable"),
        (demand(None, None, &[]), "does not come from"),
    ];
    for (demand, want) in cases {
        match check(&certificates, at, &demand).await {
            Ok(()) => assert_eq!(want, "", "{demand:?}"),
            Err(why) => assert!(!want.is_empty() && why.contains(want), "{demand:?}: {why}"),
        }
    }
    let expired = Kubelet::listen(LOCAL, &ca.leaf(names(), 2020)).await;
    let why = check(&certificates, expired.address, &demand(Some(&file), None, &[])).await.unwrap_err();
    assert_eq!(why, "its certificate has expired");
    let plain = TcpListener::bind(LOCAL).await.unwrap();
    let plain_at = plain.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = plain.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    assert_eq!(
        check(&certificates, plain_at, &demand(None, None, &[good.pin])).await.unwrap_err(),
        "it does not speak TLS"
    );
    let gone = kubelet.end().await;
    let fresh = Certificates::default();
    assert_eq!(
        check(&fresh, gone, &demand(Some(&file), None, &[])).await.unwrap_err(),
        "unreachable: ConnectionRefused"
    );
    assert_eq!(fresh.counts(), CertificateChecks { unreachable: 1, ..CertificateChecks::default() });
}

#[tokio::test]
async fn one_handshake_serves_many_dials_until_the_listener_or_the_ca_changes() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca");
    let ca = Ca::new(&file);
    let names = || vec![SanType::IpAddress(LOCAL.ip())];
    let kubelet = Kubelet::listen(LOCAL, &ca.leaf(names(), 4096)).await;
    let (certificates, demand) = (Arc::new(Certificates::default()), demand(Some(&file), None, &[]));
    let at = kubelet.address;
    let mut dials = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (certificates, demand) = (Arc::clone(&certificates), Arc::clone(&demand));
        dials.spawn(async move { check(&certificates, at, &demand).await });
    }
    while let Some(passed) = dials.join_next().await {
        assert_eq!(passed.unwrap(), Ok(()));
    }
    assert_eq!(kubelet.came(), 1, "fifty dials at once are one handshake");

    // The CA file is written anew, with the same CA: looked at again.
    std::fs::write(&file, std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(check(&certificates, at, &demand).await, Ok(()));
    assert_eq!(kubelet.came(), 2);

    // Another process takes the port, with a certificate of nobody's: the very next dial is refused.
    let stranger = Ca::new(&directory.path().join("stranger"));
    let address = kubelet.end().await;
    let impostor = Kubelet::listen(address, &stranger.leaf(names(), 4096)).await;
    assert!(check(&certificates, at, &demand).await.unwrap_err().contains("does not come from a CA"));
    // A flood of dials makes no flood of handshakes.
    for _ in 0..20 {
        assert!(check(&certificates, at, &demand).await.is_err());
    }
    assert_eq!(impostor.came(), 1);
    // And kubelet comes back.
    let address = impostor.end().await;
    let kubelet = Kubelet::listen(address, &ca.leaf(names(), 4096)).await;
    assert_eq!(check(&certificates, at, &demand).await, Ok(()));
    assert_eq!(kubelet.came(), 1);
}
