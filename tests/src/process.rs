//! Owns processes of a lab: started in a namespace and a cgroup, ended by their id; the built programs; and waiting.
//! Called by everything that starts something or waits for something.
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

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Variables of the machine that would lead a program out of the lab.
const PROXIES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

/// A running process; it is killed when this is dropped.
pub struct Process {
    name: String,
    child: Child,
    /// The file with everything that it printed.
    pub log: PathBuf,
}

impl Process {
    /// Starts a command; its output goes to a log file.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        for name in PROXIES {
            if !command.get_envs().any(|(given, _)| given == name) {
                command.env_remove(name);
            }
        }
        let child =
            command.stdout(file.try_clone()?).stderr(file).spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Process { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// Starts a command with an empty log and waits until it prints `ready`.
    pub fn start_ready(name: &str, command: Command, log: &Path) -> Result<Process> {
        File::create(log)?;
        let mut process = Process::start(name, command, log)?;
        process.until("ready", Duration::from_secs(10), |process| Ok(process.printed().contains("ready")))?;
        Ok(process)
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits until it has ended.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let mut ended = None;
        until("the end", patience, || {
            ended = self.child.try_wait()?;
            Ok(ended.is_some())
        })
        .with_context(|| format!("{}:\n{}", self.name, self.printed()))?;
        ended.context("it has ended")
    }

    /// Asks it to end with SIGTERM and waits until it has.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(Duration::from_secs(10))
    }

    /// Fails if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, self.printed()),
        }
    }

    /// Waits until a condition holds; fails if the process ends before.
    pub fn until(
        &mut self,
        what: &str,
        patience: Duration,
        mut holds: impl FnMut(&Process) -> Result<bool>,
    ) -> Result<()> {
        until(&format!("{}: {what}", self.name), patience, || {
            self.check()?;
            holds(self)
        })
        .with_context(|| self.printed())
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

/// The directory of the built binaries: the one of this program, or (for a test) the one above.
pub fn target() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let directory = own.parent().context("a binary stands in a directory")?;
    Ok(if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory }.to_path_buf())
}

/// A program of this project that is built already.
pub fn built(name: &str) -> Result<PathBuf> {
    let binary = target()?.join(name);
    ensure!(binary.is_file(), "{} is missing: `cargo xtask test` builds it", binary.display());
    Ok(binary)
}

/// A program of the upstream project.
pub fn upstream(name: &str) -> Result<PathBuf> {
    let binary = target()?.with_file_name("upstream").join(name);
    ensure!(binary.is_file(), "{} is missing: run `cargo xtask setup`", binary.display());
    Ok(binary)
}

/// A program of the system, which may lie where only root looks.
pub fn tool(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}

/// Runs a command with this input to its end; what it printed. Fails if the command does.
pub fn run(mut command: Command, input: &str) -> Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a program of the system with this input; what it printed. Fails if the program does.
pub fn run_tool(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = tool(program);
    command.args(arguments);
    run(command, input)
}

/// Runs a command to its end, at most ten seconds.
pub fn output(mut command: Command) -> Result<Output> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot start")?;
    let ended = until("the end of a command", Duration::from_secs(10), || Ok(child.try_wait()?.is_some()));
    if ended.is_err() {
        child.kill()?;
    }
    ended?;
    Ok(child.wait_with_output()?)
}

/// Waits until a condition holds.
pub fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patience;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("not within {patience:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
