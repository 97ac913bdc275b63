//! Owns processes of a lab: started in a namespace and a cgroup, ended by their id; the built programs; and waiting.
//! Called by everything that starts something or waits for something.
//! Must never end a process that it did not start.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
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

/// A child process that is killed when this is dropped.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running process; it is killed when this is dropped.
pub struct Process {
    name: String,
    child: Killed,
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
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Process { name: name.to_owned(), child: Killed(child), log: log.to_path_buf() })
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
        self.child.0.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.id().cast_signed()), signal)?)
    }

    /// Waits until it has ended.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let mut ended = None;
        until("the end", patience, || {
            ended = self.child.0.try_wait()?;
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
        match self.child.0.try_wait()? {
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

/// A command that will run in a namespace and a cgroup.
pub fn command(program: &Path, namespace: File, cgroup: &Path) -> Result<Command> {
    command_in(program, namespace, &[cgroup.to_path_buf()])
}

/// The same in a cgroup of each hierarchy.
pub fn command_in(program: &Path, namespace: File, cgroups: &[PathBuf]) -> Result<Command> {
    let open = |path: PathBuf| File::options().write(true).open(&path).with_context(|| path.display().to_string());
    let joined: Vec<File> = cgroups.iter().map(|cgroup| open(cgroup.join("cgroup.procs"))).collect::<Result<_>>()?;
    let mut command = tool(program);
    let enter = move || {
        joined.iter().try_for_each(|mut cgroup| cgroup.write_all(b"0"))?;
        setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
    };
    // SAFETY: between fork and exec only system calls are made, on descriptors opened before.
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
    there(target()?.join(name), "test")
}

/// A program of the upstream project.
pub fn upstream(name: &str) -> Result<PathBuf> {
    there(target()?.with_file_name("upstream").join(name), "setup")
}

/// A file that a task makes.
pub(crate) fn there(file: PathBuf, task: &str) -> Result<PathBuf> {
    ensure!(file.is_file(), "{} is missing: `cargo xtask {task}` makes it", file.display());
    Ok(file)
}

/// A program of the system, which may lie where only root looks.
pub fn tool(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}

/// What came of a command.
#[derive(Debug)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub out: Vec<u8>,
    /// Its standard error.
    pub error: String,
}

impl Said {
    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// Fails with its standard error unless its exit code is 0.
    pub fn good(self) -> Result<Said> {
        ensure!(self.code == 0, "{}", self.error.trim());
        Ok(self)
    }
}

/// Runs a command to its end with this on its standard input; it is killed when it takes too long.
pub fn finish(command: &mut Command, input: &[u8], patience: Duration) -> Result<Said> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let (id, mut stdin) = (Pid::from_raw(child.id().cast_signed()), child.stdin.take().context("stdin")?);
    let (ended, end) = mpsc::channel();
    std::thread::scope(|scope| {
        // A command that reads nothing closes its end early.
        scope.spawn(move || drop(stdin.write_all(input)));
        scope.spawn(move || drop(ended.send(child.wait_with_output())));
        let Ok(output) = end.recv_timeout(patience) else {
            kill(id, Signal::SIGKILL)?;
            bail!("not within {patience:?}: {}", String::from_utf8_lossy(&end.recv()??.stderr).trim());
        };
        let output = output?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(Said { code: output.status.code().unwrap_or(-1), out: output.stdout, error })
    })
}

/// Runs a command to its end, at most ten seconds.
pub fn output(command: &mut Command) -> Result<Said> {
    finish(command, b"", Duration::from_secs(10))
}

/// Runs a command with this input to its end; what it printed. Fails if the command does.
pub fn run(mut command: Command, input: &str) -> Result<String> {
    const PATIENCE: Duration = Duration::from_secs(300);
    let said = finish(&mut command, input.as_bytes(), PATIENCE)?;
    Ok(said.good().with_context(|| format!("{command:?}"))?.text())
}

/// Runs a program of the system with this input; what it printed. Fails if the program does.
pub fn run_tool(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = tool(program);
    command.args(arguments);
    run(command, input)
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
