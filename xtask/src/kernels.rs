//! Owns `cargo xtask test kernels`: the kernel half on Debian's kernels in virtual machines, and on the kernel of this machine.
//! Called by `test`.
//! Must never install a kernel: it only unpacks the packages.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use cpio::newc;

use crate::shell::{command, find, read, root, run, say};

/// The packages that depend on the newest kernel of a line.
const LINES: [(&str, &str); 2] = [("6.1", "linux-image-cloud-amd64"), ("6.12", "linux-image-6.12-cloud-amd64")];
/// An emulated machine needs 5 s to boot, and as long again for the trial.
const PATIENCE: Duration = Duration::from_secs(150);

/// What the trial on one kernel printed.
struct Row {
    kernel: String,
    lines: Vec<String>,
}

/// Tries every kernel; returns how many checks passed and failed.
pub(crate) fn kernels() -> Result<(usize, usize)> {
    let guest = build_guest()?;
    let mut rows = vec![on_this_machine(&guest)?];
    for (line, package) in LINES {
        let image = kernel_image(line, package)?;
        rows.push(in_a_machine(&image, &initramfs(&guest)?)?);
    }
    let checks: Vec<(usize, usize)> = rows.iter().map(Row::checks).collect();
    table(&rows);
    shapes(&rows);
    Ok(checks.iter().fold((0, 0), |(held, failed), (more, fewer)| (held + more, failed + fewer)))
}

/// Builds the guest as one static binary, so that the machine needs nothing else.
fn build_guest() -> Result<PathBuf> {
    let target = "x86_64-unknown-linux-gnu";
    let mut build = command(find("cargo").context("cargo is not in PATH")?);
    build.args(["build", "--quiet", "--locked", "--package", "nodeguard-tests", "--bin", "nodeguard-guest"]);
    run(build.args(["--target", target]).env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    let (built, stripped) =
        (root().join("target").join(target).join("debug/nodeguard-guest"), directory()?.join("init"));
    run(command("strip").arg("-o").arg(&stripped).arg(&built))?;
    Ok(stripped)
}

fn directory() -> Result<PathBuf> {
    let directory = root().join("target/kernels");
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// Unpacks the newest packaged kernel of a line; returns the path of its image.
fn kernel_image(line: &str, package: &str) -> Result<PathBuf> {
    let newest = || {
        let known = read(command("apt-cache").args(["depends", package])).unwrap_or_default();
        known.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-").map(str::to_owned))
    };
    let newest = match newest() {
        Some(newest) => newest,
        None => {
            run(command("apt-get").args(["update", "-qq"]))?;
            newest().with_context(|| format!("apt knows no kernel {line} (package {package})"))?
        }
    };
    let image = directory()?.join(format!("vmlinuz-{newest}"));
    if !image.is_file() {
        say(format!("  unpacking Debian's kernel {newest}"));
        // The image gets its name only when it is complete; an unpacking that was interrupted is removed.
        let place = directory()?.join("unpacking");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place)?;
        let download = ["-qq", "-o", "APT::Sandbox::User=root", "download", &format!("linux-image-{newest}")];
        run(command("apt-get").args(download).current_dir(&place))?;
        let mut packages = fs::read_dir(&place)?.flatten().map(|entry| entry.path());
        let package = packages.next().context("apt-get download left no package")?;
        run(command("dpkg-deb").arg("-x").arg(&package).arg(&place))?;
        fs::rename(place.join(format!("boot/vmlinuz-{newest}")), &image)?;
        fs::remove_dir_all(&place)?;
    }
    Ok(image)
}

/// Writes the root file system.
fn initramfs(guest: &Path) -> Result<PathBuf> {
    let path = directory()?.join("initramfs");
    fs::write(&path, archive(&fs::read(guest)?)?)?;
    Ok(path)
}

/// The archive of a root file system with one program, /init (Linux, buffer-format.rst).
fn archive(init: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    let mut add = |entry: newc::Builder, data: &[u8]| -> Result<()> {
        let mut writer = entry.write(&mut archive, u32::try_from(data.len())?);
        writer.write_all(data)?;
        writer.finish()?;
        Ok(())
    };
    add(newc::Builder::new("dev").mode(0o040_755), &[])?;
    // The first process writes here before it mounts /dev.
    add(newc::Builder::new("dev/console").mode(0o020_600).rdev_major(5).rdev_minor(1), &[])?;
    add(newc::Builder::new("init").mode(0o100_755), init)?;
    newc::trailer(&mut archive)?;
    Ok(archive)
}

/// Boots a kernel with the guest as its only process and reads the console until the machine is off.
fn in_a_machine(image: &Path, initramfs: &Path) -> Result<Row> {
    let log = directory()?.join(format!("{}.log", image.file_name().unwrap_or_default().to_string_lossy()));
    let mut qemu = command(find("qemu-system-x86_64").context("qemu-system-x86_64 is not installed")?);
    qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "1536", "-smp", "2", "-nographic", "-no-reboot", "-nic", "none"]);
    qemu.arg("-kernel").arg(image).arg("-initrd").arg(initramfs);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 oops=panic"]);
    let mut machine = qemu.stdout(fs::File::create(&log)?).stderr(Stdio::null()).spawn().context("qemu")?;
    let started = Instant::now();
    while machine.try_wait()?.is_none() {
        if started.elapsed() > PATIENCE {
            machine.kill()?;
            machine.wait()?;
            bail!("{} did not end within {PATIENCE:?}; its console is in {}", image.display(), log.display());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Row::read(&String::from_utf8_lossy(&fs::read(&log)?))
        .with_context(|| format!("the console is in {}", log.display()))
}

/// Runs the same on this machine, in a cgroup, a network namespace and a bpf file system of its own.
fn on_this_machine(guest: &Path) -> Result<Row> {
    let script = r#"set -e
        ip link set lo up
        mkdir -p "$1/bpf"; mount -t bpf bpf "$1/bpf"
        exec "$0" --host "$1""#;
    let name = format!("nodeguard-lab-{}", std::process::id());
    let directory = directory()?.join(&name);
    fs::create_dir_all(&directory)?;
    let mut trial = command("unshare");
    trial.args(["--net", "--mount", "sh", "-c", script]).arg(guest).arg(&directory);
    let output = trial.output().context("unshare")?;
    // The pins are gone with the mount, and the cgroups are empty.
    let cgroups = read(command("sh").args(["-c", "findmnt -n -o TARGET -t cgroup2 | head -n 1"]))?;
    for below in ["caller", "elsewhere", ""] {
        let _ = fs::remove_dir(Path::new(&cgroups).join(&name).join(below));
    }
    let _ = fs::remove_dir_all(&directory);
    let said = String::from_utf8_lossy(&output.stdout);
    Row::read(&said).with_context(|| format!("{said}{}", String::from_utf8_lossy(&output.stderr)))
}

impl Row {
    fn read(said: &str) -> Result<Row> {
        let words =
            ["KERNEL ", "PROGRAM ", "NAMESPACE ", "EDGE ", "CONNECTION ", "SHAPE ", "DETAIL ", "CORPUS ", "TRIED "];
        let lines: Vec<String> = said
            .lines()
            .filter_map(|line| words.iter().find_map(|word| line.find(word).map(|at| line[at..].trim().to_owned())))
            .collect();
        let kernel = lines
            .iter()
            .find_map(|line| line.strip_prefix("KERNEL "))
            .context("the trial printed no kernel version")?
            .to_owned();
        ensure!(lines.iter().any(|line| line == "TRIED whole"), "the trial ended early:\n{}", tail(said));
        Ok(Row { kernel, lines })
    }

    fn of(&self, word: &str) -> impl Iterator<Item = Vec<&str>> {
        let lines = self.lines.iter().filter(move |line| line.starts_with(word));
        lines.map(|line| line.split(' ').skip(1).collect())
    }

    /// How many checks passed and failed.
    fn checks(&self) -> (usize, usize) {
        let held = |good: bool| if good { (1, 0) } else { (0, 1) };
        let programs = self.of("PROGRAM").map(|words| held(matches!(words.get(1), Some(&"attached" | &"loaded"))));
        let connections = self.of("CONNECTION").map(|words| held(words.get(1) == Some(&"as-expected")));
        let corpus = self.of("CORPUS").map(|words| held(words.get(1) == Some(&"0")));
        let shapes = self.of("SHAPE").map(|words| held(words.first() == Some(&"as-expected")));
        programs.chain(connections).chain(shapes).chain(corpus).fold((0, 0), |(a, b), (c, d)| (a + c, b + d))
    }
}

fn table(rows: &[Row]) {
    for row in rows {
        let namespace = row.of("NAMESPACE").flatten().next().unwrap_or("?");
        let edge = row.of("EDGE").flatten().next().unwrap_or("?");
        say(format!("\n{}  (namespace of a listener from: {namespace}; edge tier on loopback: {edge})", row.kernel));
        for words in row.of("PROGRAM") {
            let [name, state, verified] = words[..] else { continue };
            say(format!("  {name:<16} loads, {state:<9} {verified:>7} instructions verified"));
        }
        let wrong: Vec<&str> =
            row.of("CONNECTION").filter(|words| words.get(1) != Some(&"as-expected")).map(|words| words[0]).collect();
        say(format!(
            "  {} connections, {} not as expected {}",
            row.of("CONNECTION").count(),
            wrong.len(),
            wrong.join(" ")
        ));
        for words in row.of("CORPUS") {
            let [compared, differences] = words[..] else { continue };
            say(format!("  {compared} decisions compared with the host's, {differences} differences"));
        }
    }
}

/// Prints each shape of packet with its result on each kernel.
fn shapes(rows: &[Row]) {
    let short = |row: &Row| row.kernel.split('-').next().unwrap_or_default().to_owned();
    let header: Vec<String> = rows.iter().map(|row| format!("{:>9}", short(row))).collect();
    say(format!("\n  {:<48}{}", "shape of packet", header.concat()));
    let name = |words: &[&str]| words.get(1..).unwrap_or_default().join(" ");
    for shape in rows.iter().take(1).flat_map(|row| row.of("SHAPE")).map(|words| name(&words)) {
        let of = |row: &Row| {
            let words = row.of("SHAPE").find(|words| name(words) == shape);
            words.map_or("-", |words| if words.first() == Some(&"as-expected") { "ok" } else { "WRONG" })
        };
        let cells: Vec<String> = rows.iter().map(|row| format!("{:>9}", of(row))).collect();
        say(format!("  {shape:<48}{}", cells.concat()));
    }
    for (row, words) in rows.iter().flat_map(|row| row.of("DETAIL").map(move |words| (row, words))) {
        say(format!("  {}: {}", short(row), words.join(" ")));
    }
}

fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_root_file_system_has_a_console_and_the_program() {
        let archive = archive(b"program").expect("an archive");
        let mut rest = archive.as_slice();
        let mut found = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).expect("an entry");
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).expect("its bytes");
            found.push((entry.name().to_owned(), entry.mode(), (entry.rdev_major(), entry.rdev_minor()), bytes));
            rest = reader.finish().expect("the next entry");
        }
        let want = [
            ("dev".to_owned(), 0o040_755, (0, 0), Vec::new()),
            ("dev/console".to_owned(), 0o020_600, (5, 1), Vec::new()),
            ("init".to_owned(), 0o100_755, (0, 0), b"program".to_vec()),
        ];
        assert_eq!(found, want);
    }
}
