//! Owns the audit file: JSON lines, rotation, and the thread that writes it.
//! Called by `recorder` with each record.
//! Must never make a dial wait for the disk: a record that does not fit in the queue or cannot be written is counted as lost and reported.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{dial::audit::record::Record, sys::lock::lock};

/// How many records may wait for the disk.
const WAITING: usize = 4096;
/// How much is written at once.
const BATCH: usize = 256 << 10;
/// How often a file that cannot be written is logged again.
const TELL: Duration = Duration::from_secs(30);
/// How long the end of the daemon waits for the disk.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where the audit file is and how large it may get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// The file.
    pub path: PathBuf,
    /// The size from which it is moved to `path.1`, bytes.
    pub max_size: u64,
    /// How many moved files are kept.
    pub max_backups: u32,
}

/// The state of the audit file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FileState {
    /// The file.
    pub path: String,
    /// Records that were written.
    pub written: u64,
    /// Records that were not written.
    pub lost: u64,
    /// Why the last write failed, if it did.
    pub error: Option<String>,
}

impl FileState {
    /// What to report if records are missing or the file cannot be written.
    pub fn weakened(&self) -> Option<String> {
        let FileState { path, lost, error, .. } = self;
        match (error, lost) {
            (Some(error), lost) => {
                Some(format!("the audit file {path} cannot be written ({error}); {lost} records are missing from it"))
            }
            (None, 0) => None,
            (None, lost) => Some(format!("{lost} records are missing from the audit file {path} (the log has them)")),
        }
    }
}

/// What the thread is asked to do.
enum Order {
    Line(Vec<u8>),
    Reopen,
    Finish(SyncSender<()>),
}

/// What both ends count.
#[derive(Default)]
struct FileCounts {
    written: AtomicU64,
    lost: AtomicU64,
    error: Mutex<Option<String>>,
}

/// The daemon's end of the queue to the thread.
pub struct AuditFile {
    path: PathBuf,
    orders: SyncSender<Order>,
    counts: Arc<FileCounts>,
}

impl AuditFile {
    /// Starts the thread. A file that cannot be opened is reported like one that cannot be written later.
    pub fn start(config: FileConfig) -> io::Result<AuditFile> {
        let (orders, received) = sync_channel(WAITING);
        let counts = Arc::<FileCounts>::default();
        let path = config.path.clone();
        let mut writer = Writer { config, open: None, counts: Arc::clone(&counts), told: None };
        if let Err(error) = writer.open() {
            writer.failed(&error);
        }
        std::thread::Builder::new().name("audit file".to_owned()).spawn(move || writer.run(&received))?;
        Ok(AuditFile { path, orders, counts })
    }

    /// Queues a record.
    pub fn write(&self, record: &Record) {
        let Ok(mut line) = serde_json::to_vec(record) else { return self.lose("a record cannot be encoded") };
        line.push(b'\n');
        match self.orders.try_send(Order::Line(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.lose("the disk is slower than the dials"),
            Err(TrySendError::Disconnected(_)) => self.lose("the writing thread has ended"),
        }
    }

    /// Reopens the file before the next record.
    pub fn reopen(&self) {
        // If the queue is full, a write comes soon, and each write checks that the open file still has this name.
        let _ = self.orders.try_send(Order::Reopen);
    }

    /// Waits until the queued records are written, for at most `GOODBYE`.
    pub fn finish(&self) {
        let (done, written) = sync_channel(1);
        if self.orders.try_send(Order::Finish(done)).is_ok() {
            let _ = written.recv_timeout(GOODBYE);
        }
    }

    /// The state of the file.
    pub fn state(&self) -> FileState {
        FileState {
            path: self.path.display().to_string(),
            written: self.counts.written.load(Ordering::Relaxed),
            lost: self.counts.lost.load(Ordering::Relaxed),
            error: lock(&self.counts.error).clone(),
        }
    }

    fn lose(&self, why: &str) {
        if self.counts.lost.fetch_add(1, Ordering::Relaxed).is_multiple_of(1000) {
            tracing::error!(path = %self.path.display(), why, "records of dials are missing from the audit file");
        }
    }
}

/// The thread's end of the queue.
struct Writer {
    config: FileConfig,
    open: Option<OpenFile>,
    counts: Arc<FileCounts>,
    told: Option<Instant>,
}

struct OpenFile {
    file: File,
    /// Device and inode. Another file may take the name.
    id: (u64, u64),
    size: u64,
}

impl Writer {
    fn run(mut self, orders: &Receiver<Order>) {
        loop {
            let (mut batch, mut lines, mut finished) = (Vec::new(), 0, None);
            let mut next = match orders.recv_timeout(TELL) {
                Ok(order) => Some(order),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            while let Some(order) = next.take() {
                match order {
                    Order::Line(line) => {
                        batch.extend_from_slice(&line);
                        lines += 1;
                    }
                    Order::Reopen => self.open = None,
                    Order::Finish(done) => finished = Some(done),
                }
                if batch.len() < BATCH && finished.is_none() {
                    next = orders.try_recv().ok();
                }
            }
            if lines > 0 || self.open.is_none() {
                match self.write(&batch) {
                    Ok(()) => self.succeeded(lines),
                    Err(error) => {
                        self.counts.lost.fetch_add(lines, Ordering::Relaxed);
                        self.failed(&error);
                    }
                }
            }
            if let Some(done) = finished {
                let _ = done.try_send(());
            }
        }
    }

    /// Writes all bytes or none: a partial write on a full disk is undone.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.open()?;
        let too_large = |open: &OpenFile| open.size > 0 && open.size + bytes.len() as u64 > self.config.max_size;
        if self.open.as_ref().is_some_and(too_large) {
            self.rotate()?;
            self.open()?;
        }
        let Some(open) = &mut self.open else { return Err(io::ErrorKind::NotFound.into()) };
        match open.file.write_all(bytes) {
            Ok(()) => {
                open.size += bytes.len() as u64;
                Ok(())
            }
            Err(error) => {
                let taken_back = open.file.set_len(open.size);
                self.open = None;
                taken_back.and(Err(error))
            }
        }
    }

    /// Opens the file, again if another program moved or removed the open one.
    fn open(&mut self) -> io::Result<()> {
        let here = std::fs::metadata(&self.config.path).ok().map(|about| (about.dev(), about.ino()));
        if self.open.as_ref().is_some_and(|open| here == Some(open.id)) {
            return Ok(());
        }
        self.open = None;
        // Without O_NONBLOCK, opening a pipe would block.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let options = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).clone();
        let file = options.open(&self.config.path)?;
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        self.open = Some(OpenFile { file, id: (about.dev(), about.ino()), size: about.len() });
        Ok(())
    }

    /// Moves `audit.log` to `audit.log.1`, that to `audit.log.2`, and removes the oldest.
    fn rotate(&mut self) -> io::Result<()> {
        self.open = None;
        let path = &self.config.path;
        if self.config.max_backups == 0 {
            return std::fs::remove_file(path);
        }
        for number in (1..self.config.max_backups).rev() {
            match std::fs::rename(backup(path, number), backup(path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        std::fs::rename(path, backup(path, 1))
    }

    fn succeeded(&mut self, lines: u64) {
        self.counts.written.fetch_add(lines, Ordering::Relaxed);
        if lock(&self.counts.error).take().is_some() {
            self.told = None;
            let lost = self.counts.lost.load(Ordering::Relaxed);
            tracing::warn!(path = %self.config.path.display(), lost, "the audit file can be written again");
        }
    }

    fn failed(&mut self, error: &io::Error) {
        *lock(&self.counts.error) = Some(error.to_string());
        if self.told.is_none_or(|told| told.elapsed() > TELL) {
            self.told = Some(Instant::now());
            let lost = self.counts.lost.load(Ordering::Relaxed);
            tracing::error!(path = %self.config.path.display(), %error, lost, "the audit file cannot be written; dials go on");
        }
    }
}

fn backup(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
