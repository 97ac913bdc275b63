//! Owns one lab: everything that stands in it, and that nothing of it is left.
//! Called by every integration test and by the demo.
//! Must never share a namespace, a cgroup or a bpffs directory with another lab.

mod attacks;
pub mod client;
pub mod daemon;
pub mod helper;
pub mod main_job;
pub mod net;

use std::{
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nodeguard::kernel::{cgroups::root::v2_root, pins::pins};
use serde::de::DeserializeOwned;

use self::{
    client::{Outcome, https, tcp, through},
    daemon::{Daemon, Rights, Setup},
    helper::Answer,
    net::{Net, Who},
};
pub use crate::process::target;
use crate::{
    certs::{Certs, ServerCert},
    process::{Process, built, command, output, until, upstream},
    servers::proxy_server::{ProxyServer, Spec},
    sweep,
};

/// The policy that a lab starts with.
pub const POLICY: &str = "\
apiVersion: nodeguard.dev/v1alpha1
kind: NodeGuardPolicy
metadata:
  name: lab
spec:
  mode: Enforce
  guard:
    - name: kubelet
      node: {ports: [10250]}
      allow:
        - tunnel: {}
        - ipBlock: {cidr: 10.0.8.0/24, except: [10.0.8.66/32]}
        - ipBlock: {cidr: 'fd00:8::/32', except: ['fd00:8::66/128']}
    - name: web
      pods: {cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}
      allow:
        - tunnel: {}
  tunnel:
    dial:
      - node: {ports: [10250, 7001]}
      - pods: {cidrs: [10.244.1.0/24, 'fd01:244:1::/64'], ports: [8080]}
";

/// The guarded and the open port of the pod.
pub const POD_PORTS: [u16; 2] = [8080, 8081];
/// Kubelet's port.
pub const KUBELET: u16 = 10250;
/// Where the node takes and gives bytes by the megabyte; no rule guards it.
pub const BYTES: u16 = 7001;

/// Labs of this process so far.
static NUMBER: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// A lab. Everything in it ends when this is dropped.
pub struct Lab {
    /// Names it on this machine.
    pub id: String,
    /// Its files: policy, sockets, logs, certificates, its own bpffs.
    pub directory: PathBuf,
    /// The namespaces.
    pub net: Net,
    /// The certificates.
    pub certs: Certs,
    /// The real proxy-server.
    pub server: Option<ProxyServer>,
    /// The guard.
    pub daemon: Option<Daemon>,
    /// How the next guard is started.
    pub setup: Setup,
    /// The cgroup whose sockets are guarded: those of the node and of the pod.
    pub guarded: PathBuf,
    elsewhere: PathBuf,
    helpers: Vec<Process>,
}

impl Lab {
    /// Namespaces, kubelet stand-in and pod; neither proxy-server nor guard.
    pub fn bare() -> Result<Lab> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces and loads eBPF programs, which needs root"
        );
        SWEEP.call_once(sweep::stale);
        let id = format!("{}-{}", sweep::own_name()?, NUMBER.fetch_add(1, Ordering::Relaxed));
        let built = Lab::build(&id, Path::new(sweep::LABS).join(&id));
        if built.is_err() {
            sweep::remove(&id);
        }
        built
    }

    /// The whole: proxy-server and guard with this policy, the tunnel connected.
    pub fn new(policy: &str) -> Result<Lab> {
        Lab::with(policy, Rights::Root)
    }

    /// The same with a guard that may do this.
    pub fn with(policy: &str, rights: Rights) -> Result<Lab> {
        let mut lab = Lab::bare()?;
        lab.setup.rights = rights;
        lab.write_policy(policy)?;
        lab.start_server(ServerCert::Good)?;
        lab.start_daemon()?.connected()?;
        Ok(lab)
    }

    fn build(id: &str, directory: PathBuf) -> Result<Lab> {
        fs::create_dir_all(directory.join("policy"))?;
        fs::create_dir_all(directory.join("bpf"))?;
        mount(Some("bpf"), &directory.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount -t bpf")?;
        let cgroup = sweep::cgroup(&v2_root()?, id);
        let [guarded, elsewhere] = ["node", "elsewhere"].map(|part| cgroup.join(part));
        fs::create_dir_all(&guarded)?;
        fs::create_dir_all(&elsewhere)?;
        let mut lab = Lab {
            id: id.to_owned(),
            net: Net::new(id)?,
            certs: Certs::new(&directory.join("certs"))?,
            directory,
            server: None,
            daemon: None,
            setup: Setup::default(),
            guarded,
            elsewhere,
            helpers: Vec::new(),
        };
        let [certificate, key] = ["kubelet.crt", "kubelet.key"].map(|file| lab.certs.path(file).display().to_string());
        let listen = |port: u16| format!("[::]:{port}");
        lab.start_in(Who::Node, "", &["kubelet", &listen(KUBELET), &certificate, &key])?;
        lab.start_in(Who::Node, "", &["bytes", &listen(BYTES)])?;
        for port in POD_PORTS {
            lab.start_in(Who::Pod, "", &["pod", &listen(port)])?;
        }
        Ok(lab)
    }

    /// Writes the policy in place.
    pub fn write_policy(&self, policy: &str) -> Result<()> {
        Ok(fs::write(self.policy(), policy)?)
    }

    /// The policy file.
    pub fn policy(&self) -> PathBuf {
        self.directory.join("policy/policy.yaml")
    }

    /// Starts the proxy-server with such a certificate.
    pub fn start_server(&mut self, cert: ServerCert) -> Result<()> {
        self.server = None;
        self.certs.server(cert)?;
        let (spec, namespace) = (Spec::alone(), self.net.open(Who::ControlPlane)?);
        let program = command(&upstream(spec.binary)?, namespace, &self.elsewhere)?;
        self.server = Some(spec.run(program, &self.certs, &self.directory)?);
        Ok(())
    }

    /// Starts the guard.
    pub fn start_daemon(&mut self) -> Result<&mut Daemon> {
        let daemon = Daemon::start(self.daemon_command()?, &self.directory)?;
        Ok(self.daemon.insert(daemon))
    }

    /// Starts the guard and waits for nothing.
    pub fn start_unfinished(&self) -> Result<Process> {
        Process::start("nodeguard", self.daemon_command()?, &self.directory.join("nodeguard.log"))
    }

    /// The guard.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("no guard runs")
    }

    /// The proxy-server.
    pub fn server(&self) -> Result<&ProxyServer> {
        self.server.as_ref().context("no proxy-server runs")
    }

    /// Where the guard pins its programs and maps.
    pub fn pins(&self) -> PathBuf {
        pins(&self.directory.join("bpf/nodeguard"))
    }

    /// Asks kubelet's `/healthz` directly, from somebody's place.
    pub fn healthz(&self, who: Who, v6: bool) -> Result<Outcome> {
        let ca = self.certs.path("ca.crt");
        self.net.run(who, || Ok(https(tcp(Who::Node.at(v6, KUBELET)), "/healthz", &ca)))
    }

    /// Asks kubelet's `/healthz` through the tunnel, at an address of the node.
    pub fn healthz_dialled(&self, to: &str) -> Result<Outcome> {
        Ok(https(through(self.server()?, to), "/healthz", &self.certs.path("ca.crt")))
    }

    /// Runs a helper to its end in a cgroup below the guarded one (`""`: in it); what it found.
    pub fn ask<T: DeserializeOwned>(&self, who: Who, cgroup: &str, arguments: &[&str]) -> Result<T> {
        let said = output(&mut self.helper(who, cgroup, arguments)?)?;
        serde_json::from_slice(&said.out).with_context(|| format!("helper {arguments:?}: {}", said.error))
    }

    /// One attempt from a cgroup below the guarded one, and how it ended.
    pub fn once(&self, who: Who, cgroup: &str, how: &str, to: SocketAddr) -> Result<Answer> {
        self.ask(who, cgroup, &["once", how, &to.to_string()])
    }

    /// Makes a cgroup below the guarded one.
    pub fn make_cgroup(&self, cgroup: &str) -> Result<()> {
        Ok(fs::create_dir_all(self.guarded.join(cgroup))?)
    }

    /// Removes an empty cgroup below the guarded one.
    pub fn remove_cgroup(&self, cgroup: &str) -> Result<()> {
        let path = self.guarded.join(cgroup);
        until("the cgroup is empty", Duration::from_secs(5), || Ok(fs::remove_dir(&path).is_ok()))
    }

    /// A helper's command line, in a cgroup below the guarded one.
    pub fn helper(&self, who: Who, cgroup: &str, arguments: &[&str]) -> Result<Command> {
        helper_command(self.net.open(who)?, &self.guarded.join(cgroup), arguments)
    }

    /// Starts a helper that lasts as long as the lab, in a cgroup below the guarded one, and waits until it is ready; its log.
    pub fn start_in(&mut self, who: Who, cgroup: &str, arguments: &[&str]) -> Result<PathBuf> {
        self.start_at(self.net.open(who)?, cgroup, arguments)
    }

    /// The same in any network namespace. What a cgroup beside the guarded one holds (`../elsewhere`) is another machine's.
    pub fn start_at(&mut self, namespace: File, cgroup: &str, arguments: &[&str]) -> Result<PathBuf> {
        let helper = helper_command(namespace, &self.guarded.join(cgroup), arguments)?;
        let what = arguments.first().unwrap_or(&"helper");
        let log = self.directory.join(format!("{what}-{}.log", self.helpers.len()));
        self.helpers.push(Process::start_ready(what, helper, &log)?);
        Ok(log)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let (true, Some(daemon)) = (std::thread::panicking(), &self.daemon) {
            let printed = daemon.printed();
            let lines: Vec<&str> = printed.lines().filter(|line| !line.contains("connection denied")).collect();
            let tail = lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n");
            let _ = writeln!(std::io::stderr(), "the guard's last lines:\n{tail}");
        }
        self.daemon = None;
        self.server = None;
        self.helpers.clear();
        sweep::remove(&self.id);
    }
}

fn helper_command(namespace: File, cgroup: &Path, arguments: &[&str]) -> Result<Command> {
    let mut helper = command(&built("nodeguard-demo")?, namespace, cgroup)?;
    helper.arg("helper").args(arguments);
    Ok(helper)
}
