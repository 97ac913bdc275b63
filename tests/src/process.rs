//! Owns processes of a lab: started in a namespace and a cgroup, ended by their id.
//! Called by `lab`, `server` and `daemon`.
//! Must never end a process that it did not start.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A running process; it is killed when this is dropped.
pub struct Process {
    name: String,
    child: Child,
    /// Everything that it printed.
    pub log: PathBuf,
}

/// A command that will run in a namespace and a cgroup.
pub fn command(program: &Path, namespace: File, cgroup: &Path) -> Result<Command> {
    let procs = cgroup.join("cgroup.procs");
    let join = File::options().write(true).open(&procs).with_context(|| procs.display().to_string())?;
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    let enter = move || {
        (&join).write_all(b"0")?;
        setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
    };
    // SAFETY: between fork and exec only two system calls are made, on descriptors opened before.
    unsafe { command.pre_exec(enter) };
    Ok(command)
}

impl Process {
    /// Starts it, its output going to a log file.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        // What is set on the machine must lead nobody out of the lab.
        for name in ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"] {
            if !command.get_envs().any(|(given, _)| given == name) {
                command.env_remove(name);
            }
        }
        let child =
            command.stdout(file.try_clone()?).stderr(file).spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Process { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits for its end, at most so long.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {patience:?}:\n{}", self.name, self.printed());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Fails if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, self.printed()),
        }
    }

    /// Everything that it printed so far.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program of the system, which may lie where only root looks.
pub fn tool(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}

/// Runs a command to its end, at most ten seconds.
pub fn output(mut command: Command) -> Result<Output> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot start")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            bail!("a command took longer than ten seconds");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child.wait_with_output()?)
}

/// Waits until something is so.
pub fn until(what: &str, patience: Duration, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        if Instant::now() > deadline {
            bail!("not within {patience:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
