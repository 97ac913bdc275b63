//! Owns a node: mount, process, host name and cgroup namespaces of its own, in them containerd, kubelet and kube-proxy.
//! Called by the cluster: `start` from outside, `inside` as the first process of the new namespaces.
//! Must never write a setting of the machine: what kubelet writes into /proc/sys goes to plain files.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::wait::waitpid,
    unistd::sethostname,
};

use super::{
    PATIENCE,
    addresses::{at, filled},
    control::{binary, programs},
    eventually,
    pki::Pki,
    place::{Place, Where},
    say,
};
use crate::{
    process::{Process, run, tool},
    sweep,
};

/// The first node's name in the cluster.
pub const NAME: &str = "worker-1";
/// The second node's.
pub const SECOND_NAME: &str = "worker-2";

/// What kubelet would change for the whole machine.
const SYSCTLS: [&str; 5] = [
    "vm/overcommit_memory",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// The files of a node.
const FILES: [(&str, &str); 5] = [
    ("containerd.toml", include_str!("files/containerd.toml")),
    ("kubelet.yaml", include_str!("files/kubelet.yaml")),
    ("cni/10-lab.conflist", include_str!("files/cni.conflist")),
    ("resolv.conf", ""),
    // Names that mean on the node what they do not mean in the control plane (the shape of CVE-2020-8562).
    ("hosts", "127.0.0.1 localhost\n<node> worker-1\n<link-local> metadata.lab\n<loopback> loopback.lab\n"),
];

const KUBELET: &str =
    "--config=<directory>/kubelet.yaml --kubeconfig=<pki>/<name>.kubeconfig --root-dir=<directory>/kubelet
    --cert-dir=<directory>/kubelet-certificates --hostname-override=<name> --node-ip=<address> -v=2";

/// The limits of conntrack are settings of the whole machine.
const KUBE_PROXY: &str =
    "--kubeconfig=<pki>/kube-proxy.kubeconfig --hostname-override=<name> --proxy-mode=nftables --cluster-cidr=<pods>
    --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0";

/// The address of containerd, in the node's own /run.
const CONTAINERD: [&str; 2] = ["--address", "/run/containerd/containerd.sock"];

/// A running node: everything in it ends with this process.
pub struct Node {
    /// The process that is in the node's namespaces.
    pub process: Process,
    directory: PathBuf,
}

/// A text with what differs from node to node in the place of its names.
fn of_node(text: &str, lab: &Path, name: &str, address: &str) -> String {
    let [first, second] = at().pods_of;
    filled(text)
        .replace("<directory>", &lab.join(name).display().to_string())
        .replace("<pki>", &lab.join("pki").display().to_string())
        .replace("<pods of the node>", if name == NAME { first } else { second })
        .replace("<name>", name)
        .replace("<address>", address)
}

impl Node {
    /// Starts it; kubelet announces it to the API server by itself.
    pub fn start(place: &Place, pki: &Pki, node: Where, images: &[PathBuf]) -> Result<Node> {
        let (name, address) = if node == Where::Second { (SECOND_NAME, at().second) } else { (NAME, at().node) };
        let directory = place.directory.join(name);
        for (file, content) in FILES {
            let path = directory.join(file);
            fs::create_dir_all(path.parent().context("a file stands in a directory")?)?;
            fs::write(path, of_node(content, &place.directory, name, address))?;
        }
        ensure!(pki.path(&format!("{name}.kubeconfig")).is_file(), "no kubeconfig for kubelet");
        let mut command = place.command(Path::new("/usr/bin/unshare"), node)?;
        command.args(["--mount", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "--kill-child", "--"]);
        // By the process, not by the path: a build may have put another file there since this run began.
        command
            .arg(format!("/proc/{}/exe", std::process::id()))
            .args(["--programs", programs()])
            .args(at().v6().then_some("--ipv6"))
            .args(["node", name, address])
            .arg(&place.directory)
            .args(images);
        let process = Process::start(name, command, &place.directory.join(format!("{name}.log")))?;
        let mut node = Node { process, directory };
        node.process.until("kubelet runs", PATIENCE, |process| Ok(process.printed().contains("kubelet runs")))?;
        Ok(node)
    }

    /// A directory as the node's own processes see it.
    pub fn seen(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.process.id())).join(path.trim_start_matches('/'))
    }

    /// Where kubelet keeps the volumes of a pod.
    pub fn volumes(&self, pod: &str) -> PathBuf {
        self.directory.join("kubelet/pods").join(pod).join("volumes")
    }
}

/// The first process of the node's namespaces: mounts, then the three services, until one of them ends.
pub fn inside(name: &str, address: &str, lab: &Path, images: &[String]) -> Result<()> {
    let directory = &lab.join(name);
    sethostname(name)?;
    mounts(lab, directory)?;
    let service = |name: &'static str, program: PathBuf, arguments: &str| -> Result<(&'static str, Child)> {
        let log = File::options().create(true).append(true).open(directory.join(format!("{name}.log")))?;
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok((name, command.spawn().with_context(|| format!("cannot start {name}"))?))
    };
    let filled = |arguments| of_node(arguments, lab, name, address);
    let config = filled("--config=<directory>/containerd.toml");
    let containerd = service("containerd", PathBuf::from("/usr/bin/containerd"), &config)?;
    let ctr = |words: &[&str]| {
        let mut ctr = tool("ctr");
        ctr.args(CONTAINERD).args(words);
        run(ctr, "")
    };
    eventually("containerd answers", || Ok(ctr(&["version"]).is_ok()))?;
    for image in images {
        ctr(&["--namespace", "k8s.io", "images", "import", image])?;
    }
    let services = [
        containerd,
        service("kubelet", binary("kubelet")?, &filled(KUBELET))?,
        service("kube-proxy", binary("kube-proxy")?, &filled(KUBE_PROXY))?,
    ];
    say("kubelet runs")?;
    // The first process inherits and reaps every orphan: shims, and what they leave.
    loop {
        let status = waitpid(None, None).context("waiting")?;
        let ended = |child: &Child| status.pid().is_some_and(|pid| pid.as_raw() == child.id().cast_signed());
        if let Some((name, _)) = services.iter().find(|(_, child)| ended(child)) {
            bail!("{name} ended: {status:?}");
        }
    }
}

/// The node's own view: fresh /proc, /sys, bpffs and cgroup trees whose roots are the node's cgroups, and nothing of the machine to write to.
fn mounts(lab: &Path, directory: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let bind = |from: &Path, to: &Path| {
        mount(Some(from), to, none, MsFlags::MS_BIND, none).with_context(|| to.display().to_string())
    };
    let on = |kind: &str, path: &str, flags: MsFlags, data: Option<&str>| {
        fs::create_dir_all(path).with_context(|| path.to_owned())?;
        mount(Some(kind), path, Some(kind), flags, data).with_context(|| format!("mount -t {kind} {path}"))
    };
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let hierarchies = sweep::mounted();
    ensure!(!hierarchies.is_empty(), "this machine has no cgroups mounted");

    // The lab's directory stands below /run, which becomes the node's own: it is held open and put back where it was.
    let own = File::open(lab)?;
    on("tmpfs", "/run", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755"))?;
    fs::create_dir_all(lab)?;
    let held = PathBuf::from(format!("/proc/self/fd/{}", own.as_raw_fd()));
    bind(&held, lab)?;
    // Containers are mounted below it, and volumes with propagation ask for a shared mount.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("shared mounts")?;

    on("proc", "/proc", safe, None)?;
    let settings = directory.join("sysctl");
    for name in SYSCTLS {
        let (setting, file) = (Path::new("/proc/sys").join(name), settings.join(name.replace('/', "-")));
        fs::create_dir_all(&settings)?;
        fs::write(&file, fs::read(&setting)?)?;
        bind(&file, &setting)?;
    }

    umount2("/sys", MntFlags::MNT_DETACH).context("umount /sys")?;
    on("sysfs", "/sys", safe, None)?;
    on("tmpfs", "/sys/fs/cgroup", safe, Some("mode=755"))?;
    for (path, kind, options) in hierarchies {
        on(&kind, path.to_str().context("a path in UTF-8")?, safe, options.as_deref())?;
    }
    on("bpf", "/sys/fs/bpf", MsFlags::empty(), None)?;
    bind(&directory.join("hosts"), Path::new("/etc/hosts"))?;
    for path in ["/var/log", "/var/lib/cni"] {
        on("tmpfs", path, MsFlags::MS_NOSUID, None)?;
    }
    Ok(())
}
