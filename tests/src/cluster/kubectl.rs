//! Owns asking the cluster: the real kubectl, bounded in time, its output and exit code.
//! Called by everything that installs or checks something.
//! Must never wait without a bound.

use std::{
    io::{BufRead, BufReader, Lines, Read},
    path::PathBuf,
    process::{ChildStdout, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    control::binary,
    pki::Pki,
    place::{Place, Where},
};
use crate::process::{Killed, Said, finish};

/// kubectl as the cluster's administrator.
pub(crate) struct Kubectl {
    place: Arc<Place>,
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// For the cluster at a place.
    pub(crate) fn new(place: &Arc<Place>, pki: &Pki) -> Result<Kubectl> {
        let kubeconfig = pki.path("admin.kubeconfig");
        Ok(Kubectl { place: Arc::clone(place), program: binary("kubectl")?, kubeconfig })
    }

    /// A call, its words separated by spaces.
    pub(crate) fn call(&self, words: &str) -> Call<'_> {
        let words = words.split_whitespace().map(str::to_owned).collect();
        let patience = Duration::from_secs(60);
        Call { kubectl: self, words, stream: Stream::WebSocket, input: Vec::new(), patience }
    }
}

/// The protocol of exec, attach and port-forward: kubectl offers both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// The newer one.
    WebSocket,
    /// The older one.
    Spdy,
}

impl Stream {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Stream::WebSocket => "WebSocket",
            Stream::Spdy => "SPDY",
        }
    }
}

/// A call of kubectl that is not made yet.
#[must_use]
pub struct Call<'a> {
    kubectl: &'a Kubectl,
    words: Vec<String>,
    stream: Stream,
    input: Vec<u8>,
    patience: Duration,
}

impl Call<'_> {
    /// One more word, which may hold spaces.
    pub fn word(mut self, word: impl Into<String>) -> Self {
        self.words.push(word.into());
        self
    }

    /// For `exec`: a shell runs this script in the pod.
    pub fn sh(self, script: impl Into<String>) -> Self {
        self.word("--").word("sh").word("-c").word(script)
    }

    /// What it reads on its standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Streams over this protocol.
    pub fn over(mut self, stream: Stream) -> Self {
        self.stream = stream;
        self
    }

    /// How long it may take, if not a minute.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Makes the call, and reads its lines while it runs.
    pub fn open(self) -> Result<Reading> {
        let mut child = self.command()?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        Ok(Reading { child: Killed(child), lines })
    }

    fn command(&self) -> Result<Command> {
        let mut command = self.kubectl.place.command(&self.kubectl.program, Where::Control)?;
        for name in ["KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS"] {
            command.env(name, (self.stream == Stream::WebSocket).to_string());
        }
        command.env("KUBECONFIG", &self.kubectl.kubeconfig).env("HOME", &self.kubectl.place.directory);
        command.args(&self.words);
        Ok(command)
    }

    /// Makes the call, and takes whatever comes of it.
    pub fn said(self) -> Result<Said> {
        finish(&mut self.command()?, &self.input, self.patience).with_context(|| self.name())
    }

    /// Makes the call, which has to succeed; returns what it printed.
    pub fn run(self) -> Result<String> {
        let name = self.name();
        Ok(self.said()?.good().context(name)?.text())
    }

    /// The same where it prints JSON.
    pub fn json(self) -> Result<Value> {
        Ok(serde_json::from_str(&self.run()?)?)
    }

    fn name(&self) -> String {
        format!("kubectl {}", self.words.join(" "))
    }
}

/// A kubectl whose lines are read while it runs; it is killed when this is dropped.
pub struct Reading {
    child: Killed,
    /// Its standard output. What is not read stays in the pipe, which holds minutes of it.
    pub lines: Lines<BufReader<ChildStdout>>,
}

impl Reading {
    /// Ends it; says whether it went on until now, or how it ended before.
    pub fn end(mut self) -> Result<String> {
        let mut error = self.child.0.stderr.take().context("stderr")?;
        let ended = self.child.0.try_wait()?;
        drop(self);
        let mut text = String::new();
        error.read_to_string(&mut text)?;
        let text = text.trim();
        Ok(match ended {
            None => "went on".to_owned(),
            Some(status) if status.success() || text.is_empty() => format!("ended without a word ({status})"),
            Some(status) => format!("ended with an error ({status}, {text:?})"),
        })
    }
}
