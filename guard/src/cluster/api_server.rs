//! Owns requests to the API server: where it is and as whom (a kubeconfig, or the service account of a pod), and the transport of a kube client.
//! Called by `leases` and `services/watch`.
//! Must never trust a server that the configuration's CA does not vouch for, and never write anything there.
//!
//! kube reads the kubeconfig and speaks Kubernetes. TLS, proxy and credentials are ours: docs/adr/0008-borrowed-and-by-hand.md.

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use data_encoding::BASE64_NOPAD;
use hyper::{
    Request, Response,
    body::{Body, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use kube::{
    Client,
    config::{Kubeconfig, KubeconfigError},
};
use rustls::pki_types::ServerName;
use secrecy::ExposeSecret;
use tokio::{io::BufReader, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tower::BoxError;

use crate::{
    net::{
        host_port::{HostPort, HostPortError},
        http_connect,
        http_connect::ConnectProxyError,
        http_proxy::{HttpProxy, ProxyEnvironment},
        remote_host::RemoteHost,
        tls::{CredentialBytes, TlsError, TlsOptions},
    },
    sys::error_chain::chain,
};

/// The files of a pod's service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The default port of an HTTP proxy: that of net/http.
pub(crate) const PROXY_PORT: u16 = 80;
/// How long the server may take for the head of an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long the connection may be silent before it is probed, and the time between probes; it ends after three without an answer.
const PROBES: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiServerError {
    /// The kubeconfig cannot be used.
    #[error("--kubeconfig {path}: {problem}")]
    Kubeconfig {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        problem: KubeconfigProblem,
    },
    /// Neither a kubeconfig nor a pod.
    #[error("no --kubeconfig is given, and this is not a pod: KUBERNETES_SERVICE_HOST is not set")]
    NotAPod,
    /// KUBERNETES_SERVICE_HOST or `tls-server-name`.
    #[error("`{0}` is neither a DNS name nor an address")]
    Name(String),
    /// The CA, certificate, key or token cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No TCP or TLS connection.
    #[error("cannot connect to the API server")]
    Connect(#[from] io::Error),
    /// No connection through the HTTP proxy.
    #[error(transparent)]
    Proxy(#[from] ConnectProxyError),
    /// No answer in time.
    #[error("the API server did not answer within {PATIENCE:?}")]
    Timeout,
    /// The request cannot be written.
    #[error("the request to the API server is not valid HTTP")]
    Request(#[from] hyper::http::Error),
    /// The answer is not HTTP.
    #[error("cannot read the API server's answer")]
    Answer(#[from] hyper::Error),
}

/// What is wrong with a kubeconfig.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KubeconfigProblem {
    /// The file cannot be read.
    #[error("{0}")]
    Read(io::Error),
    /// The file is not a kubeconfig.
    #[error("{}", chain(.0))]
    Parse(KubeconfigError),
    /// No `current-context`, or no context, cluster or user of that name.
    #[error("it has no {kind} `{name}`")]
    Missing {
        /// What is missing.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Anybody would be trusted.
    #[error("insecure-skip-tls-verify is set: whoever answers could decide what the guard knows of the cluster")]
    Insecure,
    /// Not HTTPS.
    #[error("`server` does not begin with https://")]
    NotHttps,
    /// No host.
    #[error("server: {0}")]
    Server(HostPortError),
    /// Another kind of proxy.
    #[error("its proxy-url is not that of an HTTP proxy")]
    ProxyUrl,
    /// Data that is not base64.
    #[error("{0} is not base64")]
    Base64(&'static str),
    /// Nobody would be trusted.
    #[error("its cluster has no certificate-authority")]
    NoCa,
    /// No credentials.
    #[error("its user has neither a client certificate nor a token (exec and auth-provider are not supported)")]
    NoCredentials,
}

/// The text of an error of kube: the server's own words or our error, if either is the cause.
pub(crate) fn explain(error: &(dyn Error + 'static)) -> String {
    let mut cause = Some(error);
    while let Some(each) = cause {
        if let Some(own) = each.downcast_ref::<ApiServerError>() {
            return chain(own);
        }
        if let Some(kube::Error::Api(status)) = each.downcast_ref::<kube::Error>() {
            return format!("the API server answered {}: {}", status.code, status.message);
        }
        cause = each.source();
    }
    chain(error)
}

/// A kube client whose requests each read the configuration and its files again, over a connection of their own that lasts `longest` at
/// most. `wrap` gets each answer.
pub(crate) fn client<B>(
    kubeconfig: Option<PathBuf>,
    environment: ProxyEnvironment,
    longest: Duration,
    wrap: impl Fn(Response<Incoming>) -> Response<B> + Clone + Send + 'static,
) -> Client
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let send = move |request: Request<kube::client::Body>| {
        let (kubeconfig, environment, wrap) = (kubeconfig.clone(), environment.clone(), wrap.clone());
        async move {
            let server = ApiServer::new(kubeconfig.as_deref(), &environment)?;
            let answer = timeout(PATIENCE, server.send(request, longest)).await;
            Ok::<_, ApiServerError>(wrap(answer.map_err(|_| ApiServerError::Timeout)??))
        }
    };
    Client::new(tower::service_fn(send), "default")
}

/// Where the API server is, and as whom it is asked.
#[derive(Clone, Debug)]
struct ApiServer {
    host: RemoteHost,
    /// The name that its certificate must be for.
    tls_name: String,
    /// The path before that of each request.
    prefix: String,
    ca: FileOrInline,
    identity: Option<(FileOrInline, FileOrInline)>,
    token: Option<FileOrInline>,
}

/// A part of the credentials.
#[derive(Clone)]
enum FileOrInline {
    File(PathBuf),
    Inline(Vec<u8>),
}

impl std::fmt::Debug for FileOrInline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FileOrInline::File(path) => path.fmt(f),
            FileOrInline::Inline(_) => f.write_str("inline"),
        }
    }
}

impl FileOrInline {
    fn read(&self, what: &'static str) -> Result<Vec<u8>, TlsError> {
        match self {
            FileOrInline::Inline(bytes) => Ok(bytes.clone()),
            FileOrInline::File(path) => {
                std::fs::read(path).map_err(|error| TlsError::Read { what, path: path.clone(), error })
            }
        }
    }

    /// Data of a kubeconfig comes before a file.
    fn of(what: &'static str, data: Option<&str>, file: Option<String>) -> Result<Option<Self>, KubeconfigProblem> {
        let Some(data) = data else { return Ok(file.map(|file| FileOrInline::File(file.into()))) };
        let bytes = BASE64_NOPAD.decode(data.trim().trim_end_matches('=').as_bytes());
        bytes.map(|bytes| Some(FileOrInline::Inline(bytes))).map_err(|_| KubeconfigProblem::Base64(what))
    }
}

impl ApiServer {
    /// From a kubeconfig, or as in a pod; through the HTTP proxy that it names, or else that of the environment.
    fn new(kubeconfig: Option<&Path>, environment: &ProxyEnvironment) -> Result<ApiServer, ApiServerError> {
        let mut server = match kubeconfig {
            Some(path) => ApiServer::from_file(path)
                .map_err(|problem| ApiServerError::Kubeconfig { path: path.to_path_buf(), problem })?,
            None => ApiServer::in_cluster(|name| std::env::var(name).ok())?,
        };
        if server.host.http_proxy.is_none() {
            server.host.http_proxy = environment.proxy_for(&server.host.at).map(Arc::new);
        }
        Ok(server)
    }

    fn in_cluster(variable: impl Fn(&str) -> Option<String>) -> Result<ApiServer, ApiServerError> {
        let name = variable("KUBERNETES_SERVICE_HOST").ok_or(ApiServerError::NotAPod)?;
        let port = variable("KUBERNETES_SERVICE_PORT").and_then(|port| port.parse().ok()).unwrap_or(443);
        let file = |name: &str| FileOrInline::File(Path::new(SERVICE_ACCOUNT).join(name));
        Ok(ApiServer {
            host: RemoteHost { at: HostPort { name: name.clone(), port }, http_proxy: None },
            tls_name: name,
            prefix: String::new(),
            ca: file("ca.crt"),
            identity: None,
            token: Some(file("token")),
        })
    }

    fn from_file(path: &Path) -> Result<ApiServer, KubeconfigProblem> {
        // Relative paths in it become those below its directory.
        match Kubeconfig::read_from(path) {
            Ok(config) => ApiServer::from_kubeconfig(config),
            Err(KubeconfigError::ReadConfig(error, _)) => Err(KubeconfigProblem::Read(error)),
            Err(error) => Err(KubeconfigProblem::Parse(error)),
        }
    }

    fn from_kubeconfig(config: Kubeconfig) -> Result<ApiServer, KubeconfigProblem> {
        let missing = |kind, name: &str| KubeconfigProblem::Missing { kind, name: name.to_owned() };
        let name = config.current_context.unwrap_or_default();
        let context = config.contexts.into_iter().find(|each| each.name == name).and_then(|each| each.context);
        let context = context.ok_or_else(|| missing("current-context", &name))?;
        let cluster = config.clusters.into_iter().find(|each| each.name == context.cluster);
        let cluster = cluster.and_then(|each| each.cluster).ok_or_else(|| missing("cluster", &context.cluster))?;
        let name = context.user.unwrap_or_default();
        let user = config.auth_infos.into_iter().find(|each| each.name == name).and_then(|each| each.auth_info);
        let user = user.ok_or_else(|| missing("user", &name))?;
        if cluster.insecure_skip_tls_verify == Some(true) {
            return Err(KubeconfigProblem::Insecure);
        }
        let server = cluster.server.unwrap_or_default();
        let rest = server.strip_prefix("https://").ok_or(KubeconfigProblem::NotHttps)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let at = HostPort::parse(authority, 443).map_err(KubeconfigProblem::Server)?;
        let proxy = cluster.proxy_url.filter(|url| !url.is_empty()).map(|url| HttpProxy::parse(&url, PROXY_PORT));
        let http_proxy = proxy.transpose().map_err(|_| KubeconfigProblem::ProxyUrl)?.map(Arc::new);
        let data = cluster.certificate_authority_data.as_deref();
        let ca = FileOrInline::of("certificate-authority-data", data, cluster.certificate_authority)?;
        let data = user.client_certificate_data.as_deref();
        let certificate = FileOrInline::of("client-certificate-data", data, user.client_certificate)?;
        let data = user.client_key_data.as_ref().map(ExposeSecret::expose_secret);
        let key = FileOrInline::of("client-key-data", data, user.client_key)?;
        let token = match (user.token_file, user.token) {
            (Some(file), _) => Some(FileOrInline::File(file.into())),
            (None, token) => token.map(|token| FileOrInline::Inline(token.expose_secret().as_bytes().to_vec())),
        };
        let identity = certificate.zip(key);
        if identity.is_none() && token.is_none() {
            return Err(KubeconfigProblem::NoCredentials);
        }
        Ok(ApiServer {
            tls_name: cluster.tls_server_name.unwrap_or_else(|| at.name.clone()),
            prefix: if path.is_empty() { String::new() } else { format!("/{}", path.trim_end_matches('/')) },
            host: RemoteHost { at, http_proxy },
            ca: ca.ok_or(KubeconfigProblem::NoCa)?,
            identity,
            token,
        })
    }

    async fn send<B>(&self, mut request: Request<B>, longest: Duration) -> Result<Response<Incoming>, ApiServerError>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        let identity = match &self.identity {
            Some((certificate, key)) => Some((certificate.read("client-certificate")?, key.read("client-key")?)),
            None => None,
        };
        let token = self.token.as_ref().map(|token| token.read("token")).transpose()?;
        let credentials = CredentialBytes {
            ca: self.ca.read("certificate-authority")?,
            identity,
            token: token.map(|token| String::from_utf8_lossy(&token).trim().to_owned()),
            crl: None,
        };
        let mut client = credentials.client(&TlsOptions::default())?;
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name =
            ServerName::try_from(self.tls_name.clone()).map_err(|_| ApiServerError::Name(self.tls_name.clone()))?;
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = format!("{}{path}", self.prefix).parse().map_err(hyper::http::Error::from)?;
        let host = header::HeaderValue::from_str(&self.host.to_string()).map_err(hyper::http::Error::from)?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, host);
        headers.insert(header::USER_AGENT, header::HeaderValue::from_static("nodeguard"));
        if let Some(bearer) = credentials.bearer()? {
            let bearer = header::HeaderValue::from_bytes(bearer.as_bytes());
            let mut bearer = bearer.map_err(hyper::http::Error::from)?;
            bearer.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, bearer);
        }

        let stream = match &self.host.http_proxy {
            Some(proxy) => {
                let mut stream = BufReader::new(http_connect::connect_to_proxy(proxy).await?);
                http_connect::request_connect(&mut stream, proxy, &self.host.at).await?;
                stream
            }
            None => BufReader::new(TcpStream::connect((self.host.at.name.as_str(), self.host.at.port)).await?),
        };
        let probes = socket2::TcpKeepalive::new().with_time(PROBES).with_interval(PROBES).with_retries(3);
        socket2::SockRef::from(stream.get_ref()).set_tcp_keepalive(&probes)?;
        let tls = TlsConnector::from(Arc::new(client)).connect(name, stream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
        // The connection ends once nobody holds the sender or reads the answer any more.
        tokio::spawn(timeout(longest, connection));
        Ok(sender.send_request(request).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "
apiVersion: v1
kind: Config
current-context: here
clusters:
- {name: c, cluster: {server: 'https://10.0.0.1:6443/base/', certificate-authority: pki/ca.crt, tls-server-name: kubernetes}}
contexts:
- {name: here, context: {cluster: c, user: u, namespace: n}}
users:
- {name: u, user: {tokenFile: /t, client-certificate-data: YWJj, client-key: k}}
";

    fn read(text: &str) -> (Result<ApiServer, KubeconfigProblem>, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubeconfig");
        std::fs::write(&file, text).unwrap();
        (ApiServer::from_file(&file), directory.path().to_path_buf())
    }

    #[test]
    fn a_kubeconfig_says_where_and_as_whom() {
        let (server, directory) = read(CONFIG);
        let server = server.unwrap();
        assert_eq!(
            (server.host.to_string().as_str(), server.tls_name.as_str(), server.prefix.as_str()),
            ("10.0.0.1:6443", "kubernetes", "/base")
        );
        assert!(matches!(server.ca, FileOrInline::File(path) if path == directory.join("pki/ca.crt")));
        let (certificate, key) = server.identity.unwrap();
        assert!(matches!(certificate, FileOrInline::Inline(bytes) if bytes == b"abc"));
        assert!(matches!(key, FileOrInline::File(path) if path == directory.join("k")));
        assert!(matches!(server.token, Some(FileOrInline::File(path)) if path == Path::new("/t")));
        assert!(server.host.http_proxy.is_none());
        let with = CONFIG.replace("tls-server-name", "proxy-url: 'http://proxy.example', tls-server-name");
        let proxy = read(&with).0.unwrap().host.http_proxy.map(|proxy| proxy.to_string());
        assert_eq!(proxy.as_deref(), Some("proxy.example:80"));
    }

    #[test]
    fn what_would_trust_anybody_or_prove_nothing_is_refused() {
        for (from, to) in [
            ("certificate-authority: pki/ca.crt", "insecure-skip-tls-verify: true"),
            ("https://", "http://"),
            ("certificate-authority: pki/ca.crt, ", ""),
            ("current-context: here", "current-context: there"),
            ("user: {tokenFile: /t, client-certificate-data: YWJj, client-key: k}", "user: {exec: {command: aws}}"),
            ("YWJj", "'*'"),
            ("tls-server-name", "proxy-url: 'socks5://proxy.example', tls-server-name"),
        ] {
            let text = CONFIG.replace(from, to);
            assert_ne!(text, CONFIG);
            let problem = read(&text).0.unwrap_err();
            assert!(!matches!(problem, KubeconfigProblem::Read(_) | KubeconfigProblem::Parse(_)), "{to}: {problem}");
        }
        assert!(matches!(read("a: [").0, Err(KubeconfigProblem::Parse(_))));
        assert!(matches!(ApiServer::from_file(Path::new("/nowhere")), Err(KubeconfigProblem::Read(_))));
        assert!(ApiServer::in_cluster(|_| None).is_err());
        let variable = |name: &str| (name == "KUBERNETES_SERVICE_HOST").then(|| "fd00::1".to_owned());
        assert_eq!(ApiServer::in_cluster(variable).unwrap().host.to_string(), "[fd00::1]:443");
    }

    #[test]
    fn an_error_has_our_words_or_the_servers() {
        let io = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = kube::Error::Service(Box::new(ApiServerError::Connect(io)));
        assert_eq!(explain(&error), "cannot connect to the API server: connection refused");
        let status = kube::core::Status::failure("leases is forbidden", "Forbidden").with_code(403);
        let error = kube::Error::Api(status.boxed());
        assert_eq!(explain(&error), "the API server answered 403: leases is forbidden");
    }
}
