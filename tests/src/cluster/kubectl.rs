//! Owns asking the cluster: the real kubectl, bounded, its output and exit code.
//! Called by everything that installs or checks something.
//! Must never wait without a bound.

use std::{
    io::{Read, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    control::binary,
    pki::Pki,
    place::{Place, Where},
};

/// kubectl as the cluster's administrator.
pub(crate) struct Kubectl<'a> {
    place: &'a Place,
    program: PathBuf,
    kubeconfig: PathBuf,
}

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Said {
    /// Its exit code.
    pub(crate) code: i32,
    /// What it printed.
    pub(crate) out: Vec<u8>,
    /// What it complained about.
    pub(crate) error: String,
}

impl Said {
    /// What it printed, as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

/// Streaming over WebSocket or SPDY: kubectl offers both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// The newer one.
    WebSocket,
    /// The older one.
    Spdy,
}

impl Stream {
    /// In words.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Stream::WebSocket => "WebSocket",
            Stream::Spdy => "SPDY",
        }
    }
}

impl<'a> Kubectl<'a> {
    /// For this cluster.
    pub(crate) fn new(place: &'a Place, pki: &Pki) -> Result<Kubectl<'a>> {
        Ok(Kubectl { place, program: binary("kubectl")?, kubeconfig: pki.path("admin.kubeconfig") })
    }

    /// The command line, to be run as one likes.
    pub(crate) fn command(&self, stream: Stream, arguments: &[&str]) -> Result<Command> {
        let mut command = self.place.command(&self.program, Where::Control)?;
        let web_socket = if stream == Stream::WebSocket { "true" } else { "false" };
        command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", web_socket);
        command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", web_socket);
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.place.directory).args(arguments);
        Ok(command)
    }

    /// Runs one that has to succeed; what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String> {
        let said = self.all(Stream::WebSocket, arguments, Vec::new(), Duration::from_secs(60))?;
        if said.code != 0 {
            bail!("kubectl {}: {}", arguments.join(" "), said.error.trim());
        }
        Ok(said.text())
    }

    /// Brings a manifest into the cluster.
    pub(crate) fn apply(&self, manifest: &str) -> Result<()> {
        let arguments = ["apply", "-f", "-"];
        let said = self.all(Stream::WebSocket, &arguments, manifest.as_bytes().to_vec(), Duration::from_secs(60))?;
        if said.code != 0 {
            bail!("kubectl apply: {}\n{manifest}", said.error.trim());
        }
        Ok(())
    }

    /// Runs one with this on its standard input, however it ends.
    pub(crate) fn all(&self, stream: Stream, arguments: &[&str], input: Vec<u8>, patience: Duration) -> Result<Said> {
        let mut command = self.command(stream, arguments)?;
        finish(&mut command, input, patience).with_context(|| format!("kubectl {}", arguments.join(" ")))
    }
}

/// Runs a command to its end with this on its standard input; it is killed when it takes too long.
pub(crate) fn finish(command: &mut Command, input: Vec<u8>, patience: Duration) -> Result<Said> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut stdin, mut stdout, mut stderr) = (
        child.stdin.take().context("stdin")?,
        child.stdout.take().context("stdout")?,
        child.stderr.take().context("stderr")?,
    );
    std::thread::scope(|scope| {
        // One that reads nothing closes its end early.
        scope.spawn(move || drop(stdin.write_all(&input)));
        let out = scope.spawn(move || {
            let mut out = Vec::new();
            drop(stdout.read_to_end(&mut out));
            out
        });
        let error = scope.spawn(move || {
            let mut text = Vec::new();
            drop(stderr.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        });
        let code = wait(&mut child, patience)?;
        let (out, error) = (out.join().unwrap_or_default(), error.join().unwrap_or_default());
        match code {
            Some(code) => Ok(Said { code, out, error }),
            None => bail!("not within {patience:?}: {}", error.trim()),
        }
    })
}

/// The exit code, if it ends in time.
fn wait(child: &mut Child, patience: Duration) -> Result<Option<i32>> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code().unwrap_or(-1)));
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}
