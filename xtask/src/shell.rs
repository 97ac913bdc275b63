//! Owns running other programs: in which directory and environment, and how a failure is reported.
//! Called by every task.
//! Must never hide a failure: the error of a command that fails names the command and its exit code.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// What every build for the tests selects. Another selection unites the features of dependencies in another way, and compiles them again.
pub(crate) const MEMBERS: [&str; 5] = ["--workspace", "--exclude", "guard-ebpf", "--exclude", "nodeguard-fuzz"];

/// The workspace root.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// A command in the workspace root, without the variables of the `cargo run` that started this program: they would fix the toolchain and its
/// flags. Programs of `cargo install` and of the installed Go come first in `PATH`.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).stdin(Stdio::null()).env("PATH", search_path());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let of_cargo =
            text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text.starts_with("CARGO_BIN_");
        if of_cargo || ["CARGO", "CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "LD_LIBRARY_PATH"].contains(&&*text) {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command with its output shown.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", name(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", name(command));
    }
    Ok(())
}

/// Runs a command and returns its output; its errors are shown only if it fails.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        bail!("`{}` failed ({}): {}", name(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The path of a program, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path()).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Prints a line.
#[expect(clippy::print_stdout, reason = "this is what the tasks print")]
pub(crate) fn say(text: impl AsRef<str>) {
    use std::io::Write;
    println!("{}", text.as_ref());
    let _ = std::io::stdout().flush();
}

/// Prints an error.
#[expect(clippy::print_stderr, reason = "this is what the tasks print")]
pub(crate) fn complain(text: impl AsRef<str>) {
    eprintln!("{}", text.as_ref());
}

/// The directory into which `cargo install` installs.
pub(crate) fn cargo_bin() -> PathBuf {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    home.unwrap_or_else(|| PathBuf::from("/root/.cargo")).join("bin")
}

fn search_path() -> std::ffi::OsString {
    let own = [cargo_bin(), root().join(".cache/go/bin"), root().join(".cache/python/bin")];
    let inherited = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::join_paths(own.into_iter().chain(std::env::split_paths(&inherited)).chain(usual)).unwrap_or(inherited)
}

fn name(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
