//! What a killed run left behind is removed by the next one.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use lab::{lab::target, process::until, sweep};
use nodeguard::kernel::{cgroups::root::v2_root, pins::pins};

#[test]
fn a_killed_lab_is_removed_by_the_next() {
    let mut demo = Command::new(target().unwrap().join("nodeguard-demo"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let prefix = format!("{}-{}-", demo.id(), sweep::start_time(demo.id()).unwrap());
    let id = format!("{prefix}0");
    let lab = Path::new(sweep::LABS).join(&id);
    let cgroup = sweep::cgroup(&v2_root().unwrap(), &id);
    until("its guard is in force", Duration::from_secs(30), || {
        Ok(pins(&lab.join("bpf/nodeguard")).join("links/guard_ingress").exists())
    })
    .unwrap();
    demo.kill().unwrap();
    demo.wait().unwrap();
    let processes = || fs::read_to_string(cgroup.join("node/cgroup.procs")).unwrap_or_default().lines().count();
    assert!(processes() > 0, "its helpers outlive it");
    sweep::stale();
    assert!(!lab.exists() && !cgroup.exists());
    let namespaces = fs::read_dir("/run/netns").unwrap().flatten();
    assert_eq!(namespaces.filter(|entry| entry.file_name().to_string_lossy().contains(&prefix)).count(), 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&id), "its bpffs is unmounted, and with it what was pinned is gone");
}
