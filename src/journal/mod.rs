//! The relay's memory on disk: what was changed here and which peers have it, what of theirs is applied, how far each
//! mailbox's log is known.
//!
//! Everything that belongs together is written in one transaction of an SQLite database (WAL): a change, its number and
//! the place in the log behind it. So whatever a crash takes away, it takes the whole: a change that is missing leaves the
//! log's known end before it, and is found again there. A transaction is in the file when [`Journal::commit`] returns and
//! survives the end of this process; a power failure may take the last ones ([`Journal::open`] then skips numbers that may
//! have been given away). Commits do not wait for the disk but for one in thousands: that is
//! the checkpoint's thread's business.
//!
//! It must not know sockets, mailboxes or peers' connections. One relay at a time: [`Lock`].
#![forbid(unsafe_code)]

mod bonds;
mod changes;
mod checkpoint;
mod coming;
mod elsewhere;
mod failed;
mod flags;
mod inbox;
mod list;
mod lock;
mod logs;
mod open;
mod peers;
mod redo;
mod seen;

pub use changes::{PassedOn, Stored, Trimmed};
pub use elsewhere::Elsewhere;
pub use failed::Failed;
pub use flags::FlagChange;
pub use list::{Alias, NamedMailbox};
pub use lock::Lock;
pub use logs::KnownLog;
pub use open::{Options, Start};
pub use seen::Seen;

use std::cell::Cell;
use std::path::PathBuf;

use rusqlite::Connection;

use checkpoint::Checkpoints;

/// The format of the file that this version reads and writes.
pub const FORMAT: i32 = 6;

/// Why the journal cannot be used. Nothing was changed in it.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{path}: this is no journal of Dovetail: {why} - it is left as it is; move it away to begin a new one")]
    NotOurs { path: PathBuf, why: String },
    #[error("{path}: its format is {found}, and this version of Dovetail knows {FORMAT} only - it is left as it is")]
    Format { path: PathBuf, found: i32 },
    #[error(
        "{path}: it belongs to server '{found}', and this is '{expected}' (dovetail_server): a copied or renamed server \
         must begin with a journal of its own; move this one away"
    )]
    OtherServer { path: PathBuf, found: String, expected: String },
    #[error("{path}: it is damaged: {why} - it is left as it is; move it away, and all mailboxes are compared anew")]
    Damaged { path: PathBuf, why: String },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: {error}")]
    Sqlite { path: PathBuf, error: rusqlite::Error },
    #[error("{path}: a write failed, and what was written with it must not be kept alone")]
    Broken { path: PathBuf },
}

/// See the module.
pub struct Journal {
    path: PathBuf,
    db: Connection,
    /// Names of peers, by their bit.
    peers: Vec<String>,
    seq: u64,
    /// The same when it was opened.
    seq_at_start: u64,
    /// Numbers up to this one may be given away without telling the disk.
    reserved: u64,
    is_writing: bool,
    is_urgent: bool,
    /// A write failed. SQLite may have rolled back the transaction, or not: neither may anything of it be committed, nor what comes
    /// behind it become durable.
    is_broken: Cell<bool>,
    /// Bytes of the changes that are stored.
    bytes: u64,
    checkpoints: Checkpoints,
    _lock: Lock,
}

impl Journal {
    /// Number of the last change.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Bytes of the changes that some peer has not acknowledged.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes everything since the last commit durable against the end of this process.
    pub fn commit(&mut self) -> Result<(), JournalError> {
        self.is_urgent = false;
        if self.is_writing {
            self.run(|db| db.execute_batch("COMMIT"))?;
            self.is_writing = false;
            self.checkpoints.note();
            if self.checkpoints.take_is_long() {
                // Only here nobody commits meanwhile: it takes one wait for the disk every few thousand commits.
                self.run(|db| db.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(())))?;
            }
            self.reserve(self.seq)?;
        }
        Ok(())
    }

    /// Something waits for [`Journal::commit`].
    pub fn is_writing(&self) -> bool {
        self.is_writing
    }

    /// Something waits for it that peers must not hear of before.
    pub fn is_urgent(&self) -> bool {
        self.is_urgent
    }

    /// Begins a transaction if none is open. Peers hear of what it brings only when it is committed.
    fn write(&mut self) -> Result<(), JournalError> {
        self.is_urgent = true;
        self.write_sometime()
    }

    /// The same for what may be forgotten: it is found out again.
    fn write_sometime(&mut self) -> Result<(), JournalError> {
        if !self.is_writing {
            self.run(|db| db.execute_batch("BEGIN IMMEDIATE"))?;
            self.is_writing = true;
        }
        Ok(())
    }

    fn run<T>(&self, f: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, JournalError> {
        if self.is_broken.get() {
            return Err(JournalError::Broken { path: self.path.clone() });
        }
        f(&self.db).map_err(|error| {
            let is_failure = matches!(error, rusqlite::Error::SqliteFailure(..));
            self.is_broken.set(self.is_writing && is_failure);
            JournalError::Sqlite { path: self.path.clone(), error }
        })
    }

    fn damaged(&self, why: String) -> JournalError {
        JournalError::Damaged { path: self.path.clone(), why }
    }

    fn bit_of(&self, peer: &str) -> i64 {
        self.peers.iter().position(|name| name == peer).map_or(0, |at| 1 << at)
    }
}

/// SQLite's integers are signed; our numbers use all bits but the highest.
fn to_sql(number: u64) -> i64 {
    number as i64
}

fn from_sql(number: i64) -> u64 {
    number as u64
}

#[cfg(test)]
mod tests;
