//! Owns running other programs: where the workspace is, what a failed command prints.
//! Called by every task.
//! Must never hide a failure: a command that fails ends the task with its name and its exit code.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// The workspace root.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// A command in the workspace root, without the variables that `cargo xtask` itself was started with: they would pin the toolchain and its flags.
/// What `cargo install` and Go's packages installed is found before the rest.
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

/// Runs a command and returns what it printed; its errors are shown only if it fails.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", name(command)))?;
    if !output.status.success() {
        bail!("`{}` failed ({}): {}", name(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Where a program is, if it is anywhere.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path()).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// A heading between steps.
#[expect(clippy::print_stdout, reason = "this is what the tasks print")]
pub(crate) fn say(text: impl AsRef<str>) {
    use std::io::Write;
    println!("{}", text.as_ref());
    let _ = std::io::stdout().flush();
}

/// What went wrong.
#[expect(clippy::print_stderr, reason = "this is what the tasks print")]
pub(crate) fn complain(text: impl AsRef<str>) {
    eprintln!("{}", text.as_ref());
}

/// Where this machine keeps what `cargo install` installs.
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
