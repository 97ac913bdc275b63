//! The `nodeguard` command: parses, calls the library, turns the outcome into an exit code.

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
        admin::{self, AskError},
        snapshot,
    },
};

/// It found something wrong, or failed.
const FOUND: u8 = 1;
/// No daemon could be reached.
const UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => {
            init_log(args.log_format);
            config::resolve(*args)
                .map_err(Into::into)
                .and_then(|config| daemon(run::run(config, coloured(&io::stderr()))))
        }
        Command::Agent(args) => {
            init_log(args.log_format);
            config::resolve_agent(*args)
                .map_err(Into::into)
                .and_then(|config| daemon(agent::run(config, coloured(&io::stderr()))))
        }
        Command::Check { file, output } => check(&file, output, coloured(&io::stdout()), &mut io::stdout().lock())
            .map(|good| if good { ExitCode::SUCCESS } else { ExitCode::from(FOUND) })
            .context("cannot write the findings"),
        Command::Status { admin_socket, bpffs, output } => status(&admin_socket, &bpffs, output),
        Command::Unpin { admin_socket, bpffs, output } => remove(&admin_socket, &bpffs, output),
    };
    outcome.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "error: {error:#}");
        ExitCode::from(FOUND)
    })
}

/// Runs a daemon to its end, with every file descriptor that the system grants. All of it on one thread, which moves about a GiB a second:
/// a second one would cost more for waking each other than it brings, and a node's cores are for its pods.
fn daemon(run: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most)?;
    memory::keep_buffers();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
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
    let (status, code) = match runtime.block_on(admin::ask(socket)) {
        Ok(status) => (status, ExitCode::SUCCESS),
        Err(error @ AskError::Unreachable(..)) => {
            let _ = writeln!(io::stderr(), "{error}; this is what the pins say");
            (snapshot::from_pins(bpffs), ExitCode::from(UNREACHABLE))
        }
        Err(error) => return Err(error.into()),
    };
    let mut out = io::stdout().lock();
    match output {
        Output::Table => status.render(&mut out)?,
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &status)?;
            writeln!(out)?;
        }
    }
    Ok(code)
}

fn remove(socket: &std::path::Path, bpffs: &std::path::Path, output: Output) -> anyhow::Result<ExitCode> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        anyhow::bail!("a daemon answers on {} and would put everything back: stop it first", socket.display());
    }
    let unpinned = unpin(bpffs).with_context(|| bpffs.display().to_string())?;
    let mut out = io::stdout().lock();
    if output == Output::Json {
        serde_json::to_writer_pretty(&mut out, &unpinned)?;
        writeln!(out)?;
        return Ok(ExitCode::SUCCESS);
    }
    if unpinned.removed.is_empty() {
        writeln!(out, "Nothing is pinned in {}; this node was not guarded from there.", bpffs.display())?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(
        out,
        "Removed {} pins from {}. This node is not guarded any more.",
        unpinned.removed.len(),
        bpffs.display()
    )?;
    for (whose, ports) in [("node", &unpinned.node_ports), ("pod", &unpinned.pod_ports)] {
        if !ports.is_empty() {
            let ports: Vec<String> = ports.iter().take(32).map(u16::to_string).collect();
            writeln!(out, "Open now to everyone who can reach them: {whose} ports {}", ports.join(", "))?;
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

/// Colour only on a terminal, and not where <https://no-color.org> is asked for.
fn coloured(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
