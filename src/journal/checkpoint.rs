//! Moves what was committed from the write-ahead log into the database, in a thread of its own: it waits for the disk.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{bounded, Receiver, Sender};
use rusqlite::Connection;

/// Commits between two checkpoints.
const COMMITS: u32 = 1_000;
/// Pages of 4 kB in the write-ahead log from which on it is begun anew.
const LOG_PAGES_MAX: i64 = 4_000;

pub struct Checkpoints {
    commits: u32,
    /// The write-ahead log is in the database but for a small rest, and should be begun anew.
    is_long: Arc<AtomicBool>,
    sender: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpoints {
    pub fn start(path: &Path) -> io::Result<Checkpoints> {
        let (sender, receiver) = bounded(1);
        let path = path.to_owned();
        let is_long = Arc::new(AtomicBool::new(false));
        let for_thread = is_long.clone();
        let thread = std::thread::Builder::new()
            .name("dovetail-disk".into())
            .spawn(move || run(&path, &receiver, &for_thread))?;
        Ok(Checkpoints { commits: 0, is_long, sender: Some(sender), thread: Some(thread) })
    }

    /// Whether it is time to begin the write-ahead log anew; said once.
    pub fn take_is_long(&self) -> bool {
        self.is_long.swap(false, Ordering::AcqRel)
    }

    /// Something was committed.
    pub fn note(&mut self) {
        self.commits += 1;
        if self.commits >= COMMITS {
            self.commits = 0;
            // If one is under way, the next time is early enough.
            let _ = self.sender.as_ref().map(|sender| sender.try_send(()));
        }
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        self.sender.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Passive: never in the way of the engine's commits. But while commits go on, the log is not begun anew after it.
fn checkpoint(db: &Connection, is_long: &AtomicBool) -> rusqlite::Result<()> {
    let pages: i64 = db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get(1))?;
    is_long.store(pages > LOG_PAGES_MAX, Ordering::Release);
    Ok(())
}

fn run(path: &Path, receiver: &Receiver<()>, is_long: &AtomicBool) {
    let Ok(db) = Connection::open(path) else { return };
    let _ = db.busy_timeout(Duration::from_secs(5));
    let mut last_error = String::new();
    while receiver.recv().is_ok() {
        let error = checkpoint(&db, is_long).err().map(|error| error.to_string()).unwrap_or_default();
        if error != last_error && !error.is_empty() {
            log::error!("{}: a checkpoint failed: {error}.", path.display());
        }
        last_error = error;
    }
}
