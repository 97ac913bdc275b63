//! Owns the node: mount, process, host name and cgroup namespaces of its own, in them containerd, kubelet and kube-proxy.
//! Called by `main`: `start` from outside, `inside` as the first process of the new namespaces.
//! Must never write a setting of the machine: what kubelet writes into /proc/sys goes to plain files.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use lab::process::{Process, until};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::wait::{WaitStatus, waitpid},
    unistd::{Pid, sethostname},
};

use crate::{
    addresses::at,
    control::{PATIENCE, binary, programs},
    pki::{Pki, text},
    place::{Place, Where},
};

/// The first node's name in the cluster.
pub(crate) const NAME: &str = "worker-1";
/// The second node's.
pub(crate) const SECOND_NAME: &str = "worker-2";

/// What kubelet would change for the whole machine.
const SYSCTLS: [&str; 5] = [
    "vm/overcommit_memory",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Names that mean on the node what they do not mean in the control plane (the shape of CVE-2020-8562).
const HOSTS: &str = "127.0.0.1 localhost\n<node> worker-1\n<link-local> metadata.lab\n<loopback> loopback.lab\n";

const CONTAINERD: &str = r#"version = 2
root = "@/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "@/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:lab"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "@/cni"
"#;

const CNI: &str = r#"{"cniVersion": "1.0.0", "name": "lab", "plugins": [
  {"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "dataDir": "@/cni-addresses",
   "ranges": [[{"subnet": "<pods>"}]], "routes": [{"dst": "<everything>"}]}}]}
"#;

const KUBELET: &str = "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true, cacheTTL: 30s}, x509: {clientCAFile: '@/../pki/ca.crt'}}
authorization: {mode: Webhook}
tlsCertFile: '@/../pki/kubelet-#-tls.crt'
tlsPrivateKeyFile: '@/../pki/kubelet-#-tls.key'
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: '@/resolv.conf'
volumePluginDir: '@/volume-plugins'
syncFrequency: 1s
evictionHard: {memory.available: 20Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
";

/// A running node: everything in it ends with this process.
pub(crate) struct Node {
    process: Process,
    directory: PathBuf,
}

impl Node {
    /// Starts it; kubelet announces it to the API server by itself.
    pub(crate) fn start(place: &Place, pki: &Pki, node: Where, images: &[PathBuf]) -> Result<Node> {
        let [first, other] = at().pods_of;
        let pods = if node == Where::Second { other } else { first };
        let (number, name, address) =
            if node == Where::Second { ("2", SECOND_NAME, at().second) } else { ("1", NAME, at().node) };
        let directory = place.directory.join(name);
        for (file, content) in
            [("containerd.toml", CONTAINERD), ("kubelet.yaml", KUBELET), ("cni/10-lab.conflist", CNI)]
        {
            let path = directory.join(file);
            fs::create_dir_all(path.parent().context("a file stands in a directory")?)?;
            let content = content.replace("<pods>", pods).replace("<everything>", at().everything);
            fs::write(path, content.replace('#', number).replace('@', &text(&directory)?))?;
        }
        fs::write(directory.join("resolv.conf"), "")?;
        let hosts = HOSTS.replace("<node>", at().node).replace("<link-local>", at().link_local);
        fs::write(directory.join("hosts"), hosts.replace("<loopback>", at().loopback))?;
        ensure!(pki.path(&format!("{name}.kubeconfig")).is_file(), "no kubeconfig for kubelet");
        let mut command = place.command(Path::new("/usr/bin/unshare"), node)?;
        command.args(["--mount", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "--kill-child", "--"]);
        // By the process, not by the path: a build may have put another file there since this run began.
        command
            .arg(format!("/proc/{}/exe", std::process::id()))
            .args(["--programs", programs()])
            .args((at().family == "ip6").then_some("--ipv6"))
            .args(["node", name, address])
            .arg(&place.directory)
            .args(images);
        let process = Process::start(name, command, &place.directory.join(format!("{name}.log")))?;
        let mut node = Node { process, directory };
        until("containerd and kubelet run", PATIENCE, || {
            node.check()?;
            Ok(node.process.printed().contains("kubelet runs"))
        })?;
        Ok(node)
    }

    /// Fails if a part of it has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.process.check()
    }

    /// The process that is in the node's namespaces.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// A directory as the node's own processes see it.
    pub(crate) fn seen(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.process.id())).join(path.trim_start_matches('/'))
    }

    /// Where kubelet keeps the volumes of a pod.
    pub(crate) fn volumes(&self, pod: &str) -> PathBuf {
        self.directory.join("kubelet/pods").join(pod).join("volumes")
    }
}

/// The first process of the node's namespaces: mounts, then the three services, until one of them ends.
pub(crate) fn inside(name: &str, address: &str, lab: &Path, images: &[String]) -> Result<()> {
    let directory = &lab.join(name);
    sethostname(name)?;
    mounts(lab, directory)?;
    let mut services = vec![containerd(directory)?];
    for image in images {
        let mut import = Command::new("ctr");
        import.args([
            "--address",
            "/run/containerd/containerd.sock",
            "--namespace",
            "k8s.io",
            "images",
            "import",
            image,
        ]);
        let output = import.output().context("ctr")?;
        ensure!(output.status.success(), "ctr images import {image}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let kubeconfig = |user: &str| format!("--kubeconfig={}", lab.join(format!("pki/{user}.kubeconfig")).display());
    let kubelet = [
        format!("--config={}", directory.join("kubelet.yaml").display()),
        kubeconfig(name),
        format!("--root-dir={}", directory.join("kubelet").display()),
        format!("--cert-dir={}", directory.join("kubelet-certificates").display()),
        format!("--hostname-override={name}"),
        format!("--node-ip={address}"),
        "-v=2".to_owned(),
    ];
    services.push(service(directory, "kubelet", &binary("kubelet")?, &kubelet)?);
    let proxy = [
        kubeconfig("kube-proxy"),
        format!("--hostname-override={name}"),
        "--proxy-mode=nftables".to_owned(),
        format!("--cluster-cidr={}", at().pods),
        // These are settings of the whole machine.
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-tcp-timeout-established=0".to_owned(),
        "--conntrack-tcp-timeout-close-wait=0".to_owned(),
    ];
    services.push(service(directory, "kube-proxy", &binary("kube-proxy")?, &proxy)?);
    say("kubelet runs")?;
    // The first process inherits and reaps every orphan: shims, and what they leave.
    loop {
        match waitpid(None, None).context("waiting")? {
            WaitStatus::Exited(pid, code) => ended(&services, pid, &format!("exit code {code}"))?,
            WaitStatus::Signaled(pid, signal, _) => ended(&services, pid, signal.as_str())?,
            WaitStatus::Stopped(..)
            | WaitStatus::PtraceEvent(..)
            | WaitStatus::PtraceSyscall(..)
            | WaitStatus::Continued(..)
            | WaitStatus::StillAlive => {}
        }
    }
}

fn ended(services: &[(&'static str, Child)], pid: Pid, how: &str) -> Result<()> {
    let same = |child: &Child| i32::try_from(child.id()) == Ok(pid.as_raw());
    match services.iter().find(|(_, child)| same(child)) {
        Some((name, _)) => bail!("{name} ended: {how}"),
        None => Ok(()),
    }
}

fn containerd(directory: &Path) -> Result<(&'static str, Child)> {
    let config = format!("--config={}", directory.join("containerd.toml").display());
    let service = service(directory, "containerd", Path::new("/usr/bin/containerd"), &[config])?;
    until("containerd answers", Duration::from_secs(60), || {
        std::thread::sleep(Duration::from_millis(50));
        let mut version = Command::new("ctr");
        version.args(["--address", "/run/containerd/containerd.sock", "version"]);
        Ok(version.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()))
    })?;
    Ok(service)
}

fn service(
    directory: &Path,
    name: &'static str,
    program: &Path,
    arguments: &[String],
) -> Result<(&'static str, Child)> {
    let log = File::options().create(true).append(true).open(directory.join(format!("{name}.log")))?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok((name, command.spawn().with_context(|| format!("cannot start {name}"))?))
}

/// The node's own view: fresh /proc, /sys, bpffs and cgroup trees whose roots are the node's cgroups, and nothing of the machine to write to.
fn mounts(lab: &Path, directory: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let on = |kind: &str, path: &str, flags: MsFlags, data: Option<&str>| {
        fs::create_dir_all(path)?;
        mount(Some(kind), path, Some(kind), flags, data).with_context(|| format!("mount -t {kind} {path}"))
    };
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let hierarchies = hierarchies()?;

    // The lab's directory stands below /run, which becomes the node's own: it is held open and put back where it was.
    let own = File::open(lab)?;
    on("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755"))?;
    fs::create_dir_all(lab)?;
    let held = PathBuf::from(format!("/proc/self/fd/{}", own.as_raw_fd()));
    mount(Some(&held), lab, none, MsFlags::MS_BIND, none).context("the lab's directory")?;
    // Containers are mounted below it, and volumes with propagation ask for a shared mount.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("shared mounts")?;

    on("proc", "/proc", safe, None)?;
    let settings = directory.join("sysctl");
    for name in SYSCTLS {
        let (setting, file) = (Path::new("/proc/sys").join(name), settings.join(name.replace('/', "-")));
        fs::create_dir_all(&settings)?;
        fs::write(&file, fs::read(&setting)?)?;
        mount(Some(&file), &setting, none, MsFlags::MS_BIND, none).with_context(|| setting.display().to_string())?;
    }

    umount2("/sys", MntFlags::MNT_DETACH).context("umount /sys")?;
    on("sysfs", "/sys", safe, None)?;
    mount(Some("tmpfs"), "/sys/fs/cgroup", Some("tmpfs"), safe, Some("mode=755")).context("/sys/fs/cgroup")?;
    for (path, kind, options) in hierarchies {
        fs::create_dir_all(&path)?;
        mount(Some(kind.as_str()), &path, Some(kind.as_str()), safe, options.as_deref())
            .with_context(|| format!("mount -t {kind} {}", path.display()))?;
    }
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), None::<&str>).context("bpffs")?;
    mount(Some(&directory.join("hosts")), "/etc/hosts", none, MsFlags::MS_BIND, none).context("/etc/hosts")?;
    for path in ["/var/log", "/var/lib/cni"] {
        on("tmpfs", path, MsFlags::MS_NOSUID, None)?;
    }
    Ok(())
}

/// Every cgroup hierarchy of the machine: where it is mounted, of which type, with which controllers.
fn hierarchies() -> Result<Vec<(PathBuf, String, Option<String>)>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found = Vec::new();
    for line in table.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        let [kind, _, options] = filesystem.split(' ').collect::<Vec<_>>()[..] else { continue };
        if !kind.starts_with("cgroup") {
            continue;
        }
        let path = PathBuf::from(mount.split(' ').nth(4).context("mountinfo has a mount point")?);
        let controllers = (kind == "cgroup").then(|| {
            let of_super_block = options.split(',').filter(|option| !["rw", "ro"].contains(option));
            of_super_block.collect::<Vec<_>>().join(",")
        });
        found.push((path, kind.to_owned(), controllers));
    }
    ensure!(!found.is_empty(), "this machine has no cgroups mounted");
    Ok(found)
}

fn say(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
