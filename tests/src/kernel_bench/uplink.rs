//! Owns how the node of a lab receives: by one thread on the node's processor, as a network card with one queue has its work done.
//! Called by `flood`.
//! Must never leave the work on arriving packets to whoever sends them: then a drop would cost its sender, and nobody could tell.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    lab::Lab,
    net::{Who, with_sysfs},
    process::{Process, tool, until},
    traffic::{NODE_CPU, pin_thread},
};
use nix::unistd::Pid;

use crate::precedence;

/// `ETHTOOL_STSO` and `ETHTOOL_SGRO`.
const SET_TSO: u32 = 0x1f;
const SET_GRO: u32 = 0x2c;

/// The thread that does all work on what arrives at the node, from the driver to the socket.
pub(crate) struct Uplink {
    thread: u32,
    _awake: Process,
}

/// What the thread did, since it is there.
#[derive(Clone, Copy)]
pub(crate) struct Done {
    pub(crate) packets: u64,
    pub(crate) nanoseconds: u64,
}

impl Uplink {
    /// Gives the node's uplink such a thread. The switch sends single frames: a veth pair hands bigger ones over in the sender's own time.
    pub(crate) fn of(lab: &Lab) -> Result<Uplink> {
        lab.net.run_on_switch(|| set_offload("to-node", SET_TSO, false))?;
        let before = threads()?;
        lab.net.run(Who::Node, || {
            set_offload("eth0", SET_GRO, true)?;
            with_sysfs(|sys| Ok(fs::write(sys.join("class/net/eth0/threaded"), "1")?))
        })?;
        let mut found = None;
        until("the uplink has its thread", Duration::from_secs(5), || {
            found = threads()?.into_iter().find(|thread| !before.contains(thread));
            Ok(found.is_some())
        })?;
        let thread = found.context("no thread for the uplink")?;
        let id = Pid::from_raw(i32::try_from(thread)?);
        pin_thread(id, NODE_CPU)?;
        // A card's work is done in an interrupt: no process holds it up until packets are lost.
        precedence(id, 2)?;
        Ok(Uplink { thread, _awake: awake(lab)? })
    }

    /// What the thread has done.
    pub(crate) fn done(&self, lab: &Lab) -> Result<Done> {
        let text = fs::read_to_string(format!("/proc/{}/schedstat", self.thread))?;
        let nanoseconds = text.split(' ').next().context("schedstat")?.parse()?;
        // `eth0: bytes packets`, received.
        let devices = lab.net.run(Who::Node, || Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let uplink = devices.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
        let packets = uplink.and_then(|counts| counts.split_whitespace().nth(1)).context("/proc/net/dev")?.parse()?;
        Ok(Done { packets, nanoseconds })
    }
}

/// Keeps the node's processor awake with an idle-priority process: waking a virtual processor takes its waker tens of microseconds.
fn awake(lab: &Lab) -> Result<Process> {
    let mut spin = tool("chrt");
    spin.args(["--idle", "0", "taskset", "--cpu-list", &NODE_CPU.to_string(), "sh", "-c", "while :; do :; done"]);
    Process::start("awake", spin, &lab.directory.join("awake.log"))
}

/// The kernel's threads that receive for some `eth0`.
fn threads() -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse().ok())
            && name.starts_with("napi/eth0-")
        {
            found.push(pid);
        }
    }
    Ok(found)
}

/// `ethtool -K`, in the calling thread's network namespace.
fn set_offload(interface: &str, command: u32, on: bool) -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut value = [command, u32::from(on)];
    // SAFETY: all-zero is a value of this C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    // SAFETY: the request and the value that it points to are ours, live through the call and are as long as the command says.
    let result =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCETHTOOL as _, &raw mut request) };
    ensure!(result == 0, "ethtool {interface}: {}", std::io::Error::last_os_error());
    Ok(())
}
