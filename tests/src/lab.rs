//! Owns one lab: everything that stands in it, and that nothing of it is left.
//! Called by every integration test and by the demo.
//! Must never share a namespace, a cgroup or a bpffs directory with another lab.

use std::{
    fs::{self, File},
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

use crate::{
    certs::{Certs, ServerCert},
    daemon::{Build, Daemon, Place},
    helper::Answer,
    net::{Net, Who},
    process::{Process, command, output, until},
    rights::Rights,
    server::{AGENT_PORT, ProxyServer},
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
    /// The build of the next guard that is started.
    pub build: Build,
    /// Where the next guard that is started looks for the proxy-server.
    pub agent_port: u16,
    /// What the next guard that is started may do.
    pub rights: Rights,
    /// More options of the next guard that is started.
    pub options: Vec<&'static str>,
    /// More of its environment.
    pub variables: Vec<(&'static str, &'static str)>,
    cgroup: PathBuf,
    node_cgroup: PathBuf,
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
        let pid = std::process::id();
        let started = sweep::start_time(pid).context("/proc/self/stat")?;
        let id = format!("{pid}-{started}-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let directory = Path::new(sweep::LABS).join(&id);
        fs::create_dir_all(directory.join("policy"))?;
        fs::create_dir_all(directory.join("bpf"))?;
        let built = Lab::build(&id, &directory);
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
        lab.rights = rights;
        lab.write_policy(policy)?;
        lab.start_server(ServerCert::Good)?;
        lab.start_daemon()?.connected()?;
        Ok(lab)
    }

    fn build(id: &str, directory: &Path) -> Result<Lab> {
        mount(Some("bpf"), &directory.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount -t bpf")?;
        let cgroup = nodeguard::kernel::cgroup::v2_root()?.join(format!("nodeguard-lab-{id}"));
        for place in ["node", "elsewhere"] {
            fs::create_dir_all(cgroup.join(place))?;
        }
        let net = Net::new(id)?;
        let certs = Certs::new(&directory.join("certs"))?;
        let node_cgroup = cgroup.join("node");
        let mut lab = Lab {
            id: id.to_owned(),
            directory: directory.to_path_buf(),
            net,
            certs,
            server: None,
            daemon: None,
            build: Build::Own,
            agent_port: AGENT_PORT,
            rights: Rights::Root,
            options: Vec::new(),
            variables: Vec::new(),
            cgroup,
            node_cgroup,
            helpers: Vec::new(),
        };
        let (certificate, key) = (lab.certs.path("kubelet.crt"), lab.certs.path("kubelet.key"));
        let listen = |port: u16| format!("[::]:{port}");
        lab.start_helper(Who::Node, "kubelet", &[&listen(KUBELET), &text(&certificate), &text(&key)])?;
        lab.start_helper(Who::Node, "bytes", &[&listen(BYTES)])?;
        for port in POD_PORTS {
            lab.start_helper(Who::Pod, "pod", &[&listen(port)])?;
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
        self.server =
            Some(ProxyServer::start(&self.net, &self.certs, cert, &self.cgroup.join("elsewhere"), &self.directory)?);
        Ok(())
    }

    /// Starts the guard.
    pub fn start_daemon(&mut self) -> Result<&mut Daemon> {
        let daemon = Daemon::start(&self.place())?;
        Ok(self.daemon.insert(daemon))
    }

    /// Starts the guard and waits for nothing.
    pub fn start_unfinished(&self) -> Result<Process> {
        Process::start("nodeguard", Daemon::command(&self.place())?, &self.directory.join("nodeguard.log"))
    }

    /// Where a guard of this lab works.
    pub fn place(&self) -> Place<'_> {
        Place {
            net: &self.net,
            certs: &self.certs,
            cgroup: self.guarded(),
            directory: &self.directory,
            build: self.build,
            agent_port: self.agent_port,
            rights: self.rights,
            options: &self.options,
            variables: &self.variables,
        }
    }

    /// The guard.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("no guard runs")
    }

    /// The proxy-server.
    pub fn server(&self) -> Result<&ProxyServer> {
        self.server.as_ref().context("no proxy-server runs")
    }

    /// The cgroup whose sockets are guarded: those of the node and of the pod.
    pub fn guarded(&self) -> &Path {
        &self.node_cgroup
    }

    /// A helper's command line in a place of the node or the pod.
    pub fn helper(&self, who: Who, arguments: &[&str]) -> Result<Command> {
        let binary = target()?.join("nodeguard-demo");
        let mut helper = command(&binary, self.net.open(who)?, &self.node_cgroup)?;
        helper.arg("helper").args(arguments);
        Ok(helper)
    }

    /// Runs a helper to its end in a cgroup below the guarded one (`""`: in it), and what it printed.
    pub fn run_in(&self, who: Who, cgroup: &str, arguments: &[&str]) -> Result<String> {
        let binary = target()?.join("nodeguard-demo");
        let mut helper = command(&binary, self.net.open(who)?, &self.node_cgroup.join(cgroup))?;
        helper.arg("helper").args(arguments);
        let said = output(helper)?;
        ensure!(said.status.success(), "helper {arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
        Ok(String::from_utf8(said.stdout)?)
    }

    /// One attempt from a cgroup below the guarded one, and how it ended.
    pub fn once(&self, who: Who, cgroup: &str, how: &str, to: std::net::SocketAddr) -> Result<Answer> {
        let said = self.run_in(who, cgroup, &["once", how, &to.to_string()])?;
        Answer::read(&said).with_context(|| format!("a helper said {said:?}"))
    }

    /// Makes a cgroup below the guarded one.
    pub fn make_cgroup(&self, cgroup: &str) -> Result<()> {
        Ok(fs::create_dir_all(self.node_cgroup.join(cgroup))?)
    }

    /// Removes an empty cgroup below the guarded one.
    pub fn remove_cgroup(&self, cgroup: &str) -> Result<()> {
        let path = self.node_cgroup.join(cgroup);
        until("the cgroup is empty", Duration::from_secs(5), || Ok(fs::remove_dir(&path).is_ok()))
    }

    /// Starts a helper that lasts as long as the lab, in a cgroup below the guarded one.
    pub fn start_in(&mut self, who: Who, cgroup: &str, arguments: &[&str]) -> Result<PathBuf> {
        let binary = target()?.join("nodeguard-demo");
        let mut helper = command(&binary, self.net.open(who)?, &self.node_cgroup.join(cgroup))?;
        helper.arg("helper").args(arguments);
        self.keep(arguments.first().unwrap_or(&"helper"), helper)
    }

    /// The same in another network namespace.
    pub fn start_at(&mut self, namespace: File, arguments: &[&str]) -> Result<PathBuf> {
        let binary = target()?.join("nodeguard-demo");
        let mut helper = command(&binary, namespace, &self.node_cgroup)?;
        helper.arg("helper").args(arguments);
        self.keep(arguments.first().unwrap_or(&"helper"), helper)
    }

    /// The same outside the guarded cgroup: what it does is another machine's.
    pub fn start_elsewhere(&mut self, who: Who, arguments: &[&str]) -> Result<PathBuf> {
        let binary = target()?.join("nodeguard-demo");
        let mut helper = command(&binary, self.net.open(who)?, &self.cgroup.join("elsewhere"))?;
        helper.arg("helper").args(arguments);
        self.keep(arguments.first().unwrap_or(&"helper"), helper)
    }

    fn start_helper(&mut self, who: Who, what: &str, arguments: &[&str]) -> Result<()> {
        let all: Vec<&str> = [what].into_iter().chain(arguments.iter().copied()).collect();
        let helper = self.helper(who, &all)?;
        self.keep(what, helper).map(drop)
    }

    /// Starts a helper and waits until it is ready; its log.
    fn keep(&mut self, what: &str, helper: Command) -> Result<PathBuf> {
        let log = self.directory.join(format!("{what}-{}.log", self.helpers.len()));
        File::create(&log)?;
        let mut process = Process::start(what, helper, &log)?;
        until(what, Duration::from_secs(10), || {
            process.check()?;
            Ok(process.printed().contains("ready"))
        })?;
        self.helpers.push(process);
        Ok(log)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(daemon) = &self.daemon
        {
            let printed = daemon.printed();
            let tail: Vec<&str> =
                printed.lines().filter(|line| !line.contains("connection denied")).rev().take(40).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            drop(std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("the guard's last words:\n{}\n", tail.join("\n")).as_bytes(),
            ));
        }
        self.daemon = None;
        self.server = None;
        self.helpers.clear();
        sweep::remove(&self.id);
    }
}

/// The directory of the built binaries: the one that this one stands in, or (for a test) the one above.
pub fn target() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let directory = own.parent().context("a binary stands in a directory")?;
    Ok(if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory }.to_path_buf())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
