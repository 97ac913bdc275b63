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
        args::{Cli, Command},
        check_policy::check,
        config, log,
        remove_pins::remove_pins,
        show_status::show_status,
    },
    daemon::{agent, edit::NothingInForce, memory, run},
    report::lines::lines,
};

/// The command failed or found an error.
const FOUND: u8 = 1;
/// No daemon answers.
const UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let done = |()| ExitCode::SUCCESS;
    let otherwise = |code| move |good: bool| if good { ExitCode::SUCCESS } else { ExitCode::from(code) };
    let outcome = match Cli::parse().command {
        Command::Run(args) => {
            log::start(args.half.log_format, coloured(&err));
            config::resolve(*args).map_err(Into::into).and_then(|config| daemon(run::run(config))).map(done)
        }
        Command::Agent(args) => {
            log::start(args.half.log_format, coloured(&err));
            config::resolve_agent(*args).map_err(Into::into).and_then(|config| daemon(agent::run(config))).map(done)
        }
        Command::Check { file, output } => {
            check(&file, output, coloured(&out), &mut out).map(otherwise(FOUND)).context("cannot print the findings")
        }
        Command::Status { admin_socket, bpffs, output } => {
            show_status(&admin_socket, &bpffs, output, &mut out, &mut err).map(otherwise(UNREACHABLE))
        }
        Command::Unpin { admin_socket, bpffs, output } => {
            remove_pins(&admin_socket, &bpffs, output, &mut out).map(done)
        }
    };
    outcome.unwrap_or_else(|error| {
        let _ = match error.downcast_ref::<NothingInForce>() {
            // The colours act, and nothing else in it does.
            Some(nothing) if coloured(&err) => writeln!(err, "error: {}", nothing.render(true)),
            Some(_) | None => lines(&mut err, &format!("error: {error:#}")),
        };
        ExitCode::from(FOUND)
    })
}

/// Runs a daemon to its end, with as many file descriptors as the system allows. One thread is enough: it moves about 1 GiB per second, a second
/// thread would cost more in wake-ups than it gains, and a node's cores are for its pods.
fn daemon(run: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
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
    Ok(())
}

/// Whether to print colour: only on a terminal, and not if NO_COLOR is set (<https://no-color.org>).
fn coloured(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
