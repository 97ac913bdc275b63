//! Owns the `nodeguard` command: it parses the command line, calls the library, and turns the outcome into an exit code.
//! Called by the operating system.
//! Must never decide anything that a library test could not reach.

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;
use nodeguard::{
    cli::{
        args::{Cli, Command, LogFormat, Output},
        check_policy::check,
        config,
    },
    daemon::{agent, memory, run},
    kernel::links::unpin::unpin,
    report::{
        ask::{AskError, ask},
        status_tables, stopped,
    },
};

/// The command failed or found an error.
const FOUND: u8 = 1;
/// No daemon answers.
const UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => {
            init_log(args.half.log_format);
            config::resolve(*args)
                .map_err(Into::into)
                .and_then(|config| daemon(run::run(config, coloured(&io::stderr()))))
        }
        Command::Agent(args) => {
            init_log(args.half.log_format);
            config::resolve_agent(*args)
                .map_err(Into::into)
                .and_then(|config| daemon(agent::run(config, coloured(&io::stderr()))))
        }
        Command::Check { file, output } => check(&file, output, coloured(&io::stdout()), &mut io::stdout().lock())
            .map(|good| if good { ExitCode::SUCCESS } else { ExitCode::from(FOUND) })
            .context("cannot print the findings"),
        Command::Status { admin_socket, bpffs, output } => status(&admin_socket, &bpffs, output),
        Command::Unpin { admin_socket, bpffs, output } => remove(&admin_socket, &bpffs, output),
    };
    outcome.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "error: {error:#}");
        ExitCode::from(FOUND)
    })
}

/// Runs a daemon to its end, with as many file descriptors as the system allows. One thread is enough: it moves about 1 GiB per second, a second
/// thread would cost more in wake-ups than it gains, and a node's cores are for its pods.
fn daemon(run: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most)?;
    memory::keep_buffers();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?;
    runtime.block_on(async {
        tokio::select! {
            ended = run => ended,
            () = memory::forget_the_start() => Ok(()),
        }
    })?;
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(ExitCode::SUCCESS)
}

fn status(socket: &std::path::Path, bpffs: &std::path::Path, output: Output) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, code) = match runtime.block_on(ask(socket)) {
        Ok(status) => (status, ExitCode::SUCCESS),
        Err(error @ AskError::Unreachable(..)) => {
            let _ = writeln!(io::stderr(), "{error}; showing what the pins say");
            (stopped::from_pins(bpffs), ExitCode::from(UNREACHABLE))
        }
        Err(error) => return Err(error.into()),
    };
    let mut out = io::stdout().lock();
    match output {
        Output::Table => status_tables::write(&status, &mut out)?,
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &status)?;
            writeln!(out)?;
        }
    }
    Ok(code)
}

fn remove(socket: &std::path::Path, bpffs: &std::path::Path, output: Output) -> anyhow::Result<ExitCode> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!("a daemon answers on {} and would restore everything; stop it first", socket.display());
    }
    let unpinned = unpin(bpffs).with_context(|| bpffs.display().to_string())?;
    let mut out = io::stdout().lock();
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut out, &unpinned)?;
        writeln!(out)?;
        return Ok(ExitCode::SUCCESS);
    }
    if unpinned.removed.is_empty() {
        writeln!(out, "Nothing is pinned in {}, so no guard with this --bpffs was in force.", bpffs.display())?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(out, "Removed {} pins from {}. This node is no longer guarded.", unpinned.removed.len(), bpffs.display())?;
    for (whose, ports) in [("node", &unpinned.node_ports), ("pod", &unpinned.pod_ports)] {
        if !ports.is_empty() {
            let ports: Vec<String> = ports.iter().take(32).map(u16::to_string).collect();
            writeln!(out, "Now open to everyone who can reach them: {whose} ports {}", ports.join(", "))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn init_log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(coloured(&io::stderr()));
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

/// Whether to print colour: only on a terminal, and not if NO_COLOR is set (<https://no-color.org>).
fn coloured(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
