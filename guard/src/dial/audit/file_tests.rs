//! Owns the tests of the audit file: rotation, a file that is moved, one that cannot be written, a full disk, a queue that is full.

use crate::dial::audit::{file::*, record::DialOutcome};

fn record(requested: &str) -> Record {
    Record {
        time: "2026-01-01T00:00:00.000Z".to_owned(),
        server: "s".to_owned(),
        requested: requested.to_owned(),
        service: None,
        dialled: Some("10.0.0.1:80".parse().unwrap()),
        rule: None,
        outcome: DialOutcome::Refused,
        reason: "loopback",
        message: None,
        to_backend: 0,
        to_control_plane: 0,
        milliseconds: 1,
    }
}

fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        record["requested"].as_str().unwrap().to_owned()
    };
    text.lines().map(line).collect()
}

fn start(path: &Path, max_size: u64, max_backups: u32) -> AuditFile {
    AuditFile::start(FileConfig { path: path.to_path_buf(), max_size, max_backups }).unwrap()
}

#[test]
fn a_record_is_one_line_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let file = start(&path, 1 << 20, 2);
    let hostile = "a\nb\"}:80\u{1b}[31m";
    file.write(&record(hostile));
    file.write(&record("b:80"));
    file.finish();
    assert_eq!(lines(&path), [hostile, "b:80"]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let first: serde_json::Value =
        serde_json::from_str(std::fs::read_to_string(&path).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!((first["dialled"].as_str(), first["verdict"].as_str()), (Some("10.0.0.1:80"), Some("refused")));
    assert_eq!((file.state().written, file.state().lost), (2, 0));
}

#[test]
fn it_rotates_and_keeps_so_many() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let file = start(&path, 500, 2);
    for number in 0..9 {
        file.write(&record(&format!("{number}:80")));
        file.finish();
    }
    let all: Vec<_> = [2, 1].iter().flat_map(|number| lines(&backup(&path, *number))).chain(lines(&path)).collect();
    let newest: Vec<String> = (9 - all.len()..9).map(|number| format!("{number}:80")).collect();
    assert_eq!(all, newest);
    assert!((3..9).contains(&all.len()) && !backup(&path, 3).exists());
    for path in [path.clone(), backup(&path, 1), backup(&path, 2)] {
        assert!(std::fs::metadata(path).unwrap().len() <= 500);
    }
}

#[test]
fn a_file_that_is_moved_away_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (path, moved) = (directory.path().join("audit.log"), directory.path().join("old"));
    let file = start(&path, 1 << 20, 1);
    file.write(&record("1:80"));
    file.finish();
    std::fs::rename(&path, &moved).unwrap();
    file.write(&record("2:80"));
    file.finish();
    assert_eq!((lines(&moved), lines(&path)), (vec!["1:80".to_owned()], vec!["2:80".to_owned()]));
    std::fs::remove_file(&path).unwrap();
    file.reopen();
    file.finish();
    assert!(path.exists(), "reopened at once, not with the next record");
}

#[test]
fn a_file_that_cannot_be_written_is_told_and_nothing_waits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("missing/audit.log");
    let file = start(&path, 1 << 20, 1);
    let weakened = file.state().weakened().unwrap();
    assert!(weakened.contains("cannot be written (No such file"), "{weakened}");
    file.write(&record("1:80"));
    file.finish();
    assert_eq!((file.state().written, file.state().lost), (0, 1));
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    file.write(&record("2:80"));
    file.finish();
    assert_eq!((lines(&path), file.state().error.clone()), (vec!["2:80".to_owned()], None));
    assert!(file.state().weakened().unwrap().starts_with("1 records are missing"), "what is missing stays told");
    // A pipe that nobody reads, or a directory, is no file.
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(start(&pipe, 1 << 20, 1).state().error.is_some());
    assert!(start(directory.path(), 1 << 20, 1).state().error.is_some());
}

#[test]
fn a_queue_that_is_full_loses_records_and_never_waits() {
    let directory = tempfile::tempdir().unwrap();
    let (orders, received) = sync_channel(2);
    let file = AuditFile { path: directory.path().join("a"), orders, counts: Arc::default() };
    for _ in 0..5 {
        file.write(&record("1:80"));
    }
    assert_eq!(file.state().lost, 3);
    drop(received);
    file.write(&record("1:80"));
    file.finish();
    assert_eq!(file.state().lost, 4);
}

#[test]
fn a_full_disk_leaves_whole_lines_only() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    // A file system of 64 KiB, in a mount namespace of a thread of its own.
    let body = || {
        use nix::{
            mount::{MsFlags, mount},
            sched::{CloneFlags, unshare},
        };
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let directory = tempfile::tempdir().unwrap();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        let path = directory.path().join("audit.log");
        let mut writer = Writer {
            config: FileConfig { path: path.clone(), max_size: 1 << 20, max_backups: 1 },
            open: None,
            counts: Arc::default(),
            told: None,
        };
        let mut line = serde_json::to_vec(&record("1:80")).unwrap();
        line.push(b'\n');
        let (mut written, mut error) = (0, None);
        while error.is_none() && written < 10_000 {
            match writer.write(&line.repeat(7)) {
                Ok(()) => written += 7,
                Err(failed) => error = Some(failed),
            }
        }
        assert_eq!(error.unwrap().raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(lines(&path).len(), written);
        std::fs::write(&path, "").unwrap();
        writer.write(&line).unwrap();
        assert_eq!(lines(&path).len(), 1);
        drop(writer);
        nix::mount::umount(directory.path()).unwrap();
    };
    std::thread::scope(|scope| scope.spawn(body).join()).unwrap();
}
