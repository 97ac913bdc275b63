//! Owns asking the API server: where it is and as whom (a kubeconfig, or what a pod gets), one GET, one request of a client library.
//! Called by `leases`, and by `services`, whose watches are kube-rs': they go through here too.
//! Must never trust a server that the configuration's CA does not vouch for, and never write anything there.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use data_encoding::BASE64_NOPAD;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    body::{Body, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use tokio::{io::BufReader, net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::net::{
    host_port::HostPort,
    http_connect,
    http_connect::ConnectProxyError,
    http_proxy::{HttpProxy, ProxyEnvironment},
    remote_host::RemoteHost,
    tls::{CredentialBytes, TlsError, TlsOptions},
};

/// What a pod gets.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The port of an HTTP proxy that is named without one: net/http's.
pub(crate) const PROXY_PORT: u16 = 80;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the connection may be silent before it is probed, and how far apart probes are; after three without an answer it is over.
const PROBES: Duration = Duration::from_secs(10);
/// How large an answer may be.
const MOST: usize = 4 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The kubeconfig, or what a pod gets.
    #[error("{0}")]
    Config(String),
    /// Certificates or token.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No connection.
    #[error("cannot connect to the API server: {0}")]
    Io(#[from] io::Error),
    /// No way through the HTTP proxy.
    #[error(transparent)]
    Proxy(#[from] ConnectProxyError),
    /// Nothing in time.
    #[error("the API server gave no answer within {PATIENCE:?}")]
    Patience,
    /// Not HTTP.
    #[error("the API server's answer cannot be read: {0}")]
    Answer(String),
    /// It refused.
    #[error("the API server answered {code}: {message}")]
    Status {
        /// The HTTP status.
        code: u16,
        /// Kubernetes' word for it.
        reason: String,
        /// In words.
        message: String,
    },
}

/// Where the API server is, and as whom it is asked; the files are read for each request.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    host: RemoteHost,
    name: String,
    prefix: String,
    ca: Source,
    identity: Option<(Source, Source)>,
    token: Option<Source>,
}

/// Something in a file or in the configuration itself.
#[derive(Clone, Debug)]
enum Source {
    File(PathBuf),
    Inline(Vec<u8>),
}

impl Source {
    fn read(&self, what: &'static str) -> Result<Vec<u8>, TlsError> {
        match self {
            Source::Inline(bytes) => Ok(bytes.clone()),
            Source::File(path) => {
                std::fs::read(path).map_err(|error| TlsError::Read { what, path: path.clone(), error })
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    current_context: String,
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    contexts: Vec<NamedContext>,
    #[serde(default)]
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: ContextOf,
}

#[derive(Deserialize)]
struct ContextOf {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
}

impl Api {
    /// As a kubeconfig says, or as a pod asks; through the HTTP proxy that it names, or that the environment does.
    pub(crate) fn new(kubeconfig: Option<&Path>, environment: &ProxyEnvironment) -> Result<Api, ApiError> {
        let mut api = Api::direct(kubeconfig)?;
        if api.host.http_proxy.is_none() {
            api.host.http_proxy = environment.proxy_for(&api.host.at).map(Arc::new);
        }
        Ok(api)
    }

    fn direct(kubeconfig: Option<&Path>) -> Result<Api, ApiError> {
        match kubeconfig {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| ApiError::Config(format!("--kubeconfig {}: {error}", path.display())))?;
                Api::read(&text, path.parent().unwrap_or(Path::new("")))
                    .map_err(|error| ApiError::Config(format!("--kubeconfig {}: {error}", path.display())))
            }
            None => Api::in_cluster(|name| std::env::var(name).ok()),
        }
    }

    fn in_cluster(variable: impl Fn(&str) -> Option<String>) -> Result<Api, ApiError> {
        let missing = || {
            ApiError::Config(
                "no --kubeconfig is given, and this is no pod: KUBERNETES_SERVICE_HOST is not set".to_owned(),
            )
        };
        let name = variable("KUBERNETES_SERVICE_HOST").ok_or_else(missing)?;
        let port = variable("KUBERNETES_SERVICE_PORT").and_then(|port| port.parse().ok()).unwrap_or(443);
        let file = |name: &str| Source::File(Path::new(SERVICE_ACCOUNT).join(name));
        Ok(Api {
            host: RemoteHost { at: HostPort { name: name.clone(), port }, http_proxy: None },
            name,
            prefix: String::new(),
            ca: file("ca.crt"),
            identity: None,
            token: Some(file("token")),
        })
    }

    fn read(text: &str, directory: &Path) -> Result<Api, String> {
        let Kubeconfig { current_context, clusters, contexts, users } =
            serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        let context = contexts.into_iter().find(|context| context.name == current_context);
        let ContextOf { cluster, user } =
            context.ok_or(format!("it has no context `{current_context}` (current-context)"))?.context;
        let named = clusters.into_iter().find(|each| each.name == cluster);
        let cluster = named.ok_or(format!("it has no cluster `{cluster}`"))?.cluster;
        let named = users.into_iter().find(|each| each.name == user);
        let user = named.ok_or(format!("it has no user `{user}`"))?.user;
        if cluster.insecure_skip_tls_verify {
            return Err(
                "insecure-skip-tls-verify is set: whoever answered would decide what the guard takes for the cluster"
                    .to_owned(),
            );
        }
        let rest = cluster.server.strip_prefix("https://").ok_or("`server` does not begin with https://")?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let at = HostPort::parse(authority, 443).map_err(|error| error.to_string())?;
        let mut host = RemoteHost { at, http_proxy: None };
        if let Some(url) = cluster.proxy_url.filter(|url| !url.is_empty()) {
            let proxy = HttpProxy::parse(&url, PROXY_PORT).map_err(|_| "its proxy-url is none of an HTTP proxy")?;
            host.http_proxy = Some(Arc::new(proxy));
        }
        let source = |file: Option<PathBuf>, data: Option<String>| match (data, file) {
            (Some(data), _) => BASE64_NOPAD
                .decode(data.trim().trim_end_matches('=').as_bytes())
                .map(|bytes| Some(Source::Inline(bytes)))
                .map_err(|_| "data that is not base64"),
            (None, Some(file)) => Ok(Some(Source::File(directory.join(file)))),
            (None, None) => Ok(None),
        };
        let ca = source(cluster.certificate_authority, cluster.certificate_authority_data)?
            .ok_or("its cluster has no certificate-authority")?;
        let certificate = source(user.client_certificate, user.client_certificate_data)?;
        let key = source(user.client_key, user.client_key_data)?;
        let token = match (user.token_file, user.token) {
            (Some(file), _) => Some(Source::File(directory.join(file))),
            (None, token) => token.map(|token| Source::Inline(token.into_bytes())),
        };
        let identity = certificate.zip(key);
        if identity.is_none() && token.is_none() {
            return Err(
                "its user has neither client certificate nor token (exec and auth-provider are not taken)".to_owned()
            );
        }
        Ok(Api {
            name: cluster.tls_server_name.unwrap_or_else(|| host.at.name.clone()),
            prefix: if path.is_empty() { String::new() } else { format!("/{}", path.trim_end_matches('/')) },
            host,
            ca,
            identity,
            token,
        })
    }

    /// Gets JSON.
    pub(crate) async fn get(&self, path: &str) -> Result<serde_json::Value, ApiError> {
        timeout(PATIENCE, self.ask(path)).await.map_err(|_| ApiError::Patience)?
    }

    async fn ask(&self, path: &str) -> Result<serde_json::Value, ApiError> {
        let answer = |error: &dyn std::fmt::Display| ApiError::Answer(error.to_string());
        let request = Request::get(path).header(header::ACCEPT, "application/json");
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| answer(&error))?;
        let response = self.send(request, PATIENCE).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MOST).collect().await;
        let body = body.map_err(|error| answer(&error))?.to_bytes();
        if status != StatusCode::OK {
            let said: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            let word = |name: &str| said.get(name).and_then(|word| word.as_str()).unwrap_or_default().to_owned();
            return Err(ApiError::Status { code: status.as_u16(), reason: word("reason"), message: word("message") });
        }
        serde_json::from_slice(&body).map_err(|error| answer(&error))
    }

    /// Sends a request for a path over a connection of its own. The answer begins in time; the connection ends with it, and after `longest`.
    pub(crate) async fn send<B>(&self, request: Request<B>, longest: Duration) -> Result<Response<Incoming>, ApiError>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        timeout(PATIENCE, self.begin(request, longest)).await.map_err(|_| ApiError::Patience)?
    }

    async fn begin<B>(&self, mut request: Request<B>, longest: Duration) -> Result<Response<Incoming>, ApiError>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let identity = match &self.identity {
            Some((certificate, key)) => Some((certificate.read("client-certificate")?, key.read("client-key")?)),
            None => None,
        };
        let token = self.token.as_ref().map(|token| token.read("token")).transpose()?;
        let contents = CredentialBytes {
            ca: self.ca.read("certificate-authority")?,
            identity,
            token: token.map(|token| String::from_utf8_lossy(&token).trim().to_owned()),
            crl: None,
        };
        let mut client = contents.client(&TlsOptions::default())?;
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = ServerName::try_from(self.name.clone())
            .map_err(|_| ApiError::Config(format!("`{}` is neither a DNS name nor an address", self.name)))?;
        let answer = |error: &dyn std::fmt::Display| ApiError::Answer(error.to_string());
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = format!("{}{path}", self.prefix).parse::<Uri>().map_err(|error| answer(&error))?;
        let header = |text: &str| header::HeaderValue::from_str(text).map_err(|error| answer(&error));
        let headers = request.headers_mut();
        headers.insert(header::HOST, header(&self.host.to_string())?);
        headers.insert(header::USER_AGENT, header::HeaderValue::from_static("nodeguard"));
        if let Some(bearer) = contents.bearer()? {
            let mut bearer = header::HeaderValue::from_bytes(bearer.as_bytes()).map_err(|error| answer(&error))?;
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
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|error| answer(&error))?;
        // It ends by itself once nobody holds the sender or reads the answer any more.
        tokio::spawn(timeout(longest, connection));
        sender.send_request(request).await.map_err(|error| answer(&error))
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

    #[test]
    fn a_kubeconfig_says_where_and_as_whom() {
        let api = Api::read(CONFIG, Path::new("/etc/k")).unwrap();
        assert_eq!(
            (api.host.to_string().as_str(), api.name.as_str(), api.prefix.as_str()),
            ("10.0.0.1:6443", "kubernetes", "/base")
        );
        assert!(matches!(api.ca, Source::File(path) if path == Path::new("/etc/k/pki/ca.crt")));
        let (certificate, key) = api.identity.unwrap();
        assert!(matches!(certificate, Source::Inline(bytes) if bytes == b"abc"));
        assert!(matches!(key, Source::File(path) if path == Path::new("/etc/k/k")));
        assert!(matches!(api.token, Some(Source::File(path)) if path == Path::new("/t")));
        assert!(api.host.http_proxy.is_none());
        let with = CONFIG.replace("tls-server-name", "proxy-url: 'http://proxy.example', tls-server-name");
        let api = Api::read(&with, Path::new("/etc/k")).unwrap();
        assert_eq!(api.host.http_proxy.map(|proxy| proxy.to_string()).as_deref(), Some("proxy.example:80"));
    }

    #[test]
    fn what_would_trust_anybody_or_prove_nothing_is_refused() {
        for (from, to) in [
            ("certificate-authority: pki/ca.crt", "insecure-skip-tls-verify: true"),
            ("https://", "http://"),
            ("certificate-authority: pki/ca.crt, ", ""),
            ("current-context: here", "current-context: there"),
            ("user: {tokenFile: /t, client-certificate-data: YWJj, client-key: k}", "user: {exec: {command: aws}}"),
            ("YWJj", "*"),
            ("tls-server-name", "proxy-url: 'socks5://proxy.example', tls-server-name"),
        ] {
            let text = CONFIG.replace(from, to);
            assert_ne!(text, CONFIG);
            assert!(Api::read(&text, Path::new("")).is_err(), "{to}");
        }
        assert!(Api::in_cluster(|_| None).is_err());
        let api = Api::in_cluster(|name| (name == "KUBERNETES_SERVICE_HOST").then(|| "fd00::1".to_owned())).unwrap();
        assert_eq!(api.host.to_string(), "[fd00::1]:443");
    }
}
