//! Owns asking the cluster: the real kubectl, bounded in time, its output and exit code.
//! Called by everything that installs or checks something.
//! Must never wait without a bound.

use std::{
    io::{BufRead, BufReader, Lines, Read},
    process::{ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    control::binary,
    place::{Place, Where},
};
use crate::process::{Killed, Said, finish};

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
    place: &'a Place,
    words: Vec<String>,
    stream: Stream,
    input: Vec<u8>,
    patience: Duration,
}

impl<'a> Call<'a> {
    /// A call as the administrator of the cluster at a place, its words separated by spaces.
    pub(crate) fn new(place: &'a Place, words: &str) -> Call<'a> {
        let words = words.split_whitespace().map(str::to_owned).collect();
        let patience = Duration::from_secs(60);
        Call { place, words, stream: Stream::WebSocket, input: Vec::new(), patience }
    }

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
        let mut command = self.place.command(&binary("kubectl")?, Where::Control)?;
        for name in ["KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "KUBECTL_PORT_FORWARD_WEBSOCKETS"] {
            command.env(name, (self.stream == Stream::WebSocket).to_string());
        }
        let directory = &self.place.directory;
        command.env("KUBECONFIG", directory.join("pki/admin.kubeconfig")).env("HOME", directory).args(&self.words);
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
