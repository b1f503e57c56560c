//! One relay at a time: while Dovecot reloads, the old process and the new one overlap, and no number may be given twice.

use std::path::Path;

use rusqlite::{Connection, ErrorCode};

/// The right to use the journal in this folder. Given back when it is dropped or its process ends.
pub struct Lock {
    /// An exclusive transaction that never writes: SQLite's file lock is one that the kernel takes back.
    _transaction: Connection,
}

impl Lock {
    /// None: another process has it.
    pub fn try_take(folder: &Path) -> rusqlite::Result<Option<Lock>> {
        let db = Connection::open(folder.join("journal.lock"))?;
        db.busy_timeout(std::time::Duration::ZERO)?;
        match db.execute_batch("BEGIN EXCLUSIVE") {
            Ok(()) => Ok(Some(Lock { _transaction: db })),
            Err(rusqlite::Error::SqliteFailure(error, _)) if error.code == ErrorCode::DatabaseBusy => Ok(None),
            Err(error) => Err(error),
        }
    }
}
