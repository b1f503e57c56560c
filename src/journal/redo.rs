//! Changes of flags of this server that an earlier one of a peer has undone in the mailbox: they are to be made once more.

use super::{Journal, JournalError};

impl Journal {
    /// With what made it known.
    pub fn note_redo(&mut self, user: &str, change: &[u8]) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached("INSERT INTO redo (user, change) VALUES (?, ?)")?.execute((user, change)).map(drop)
        })
    }

    /// The first ones of the user, in order, with their numbers.
    pub fn redos(&self, user: &str, most: usize) -> Result<Vec<(i64, Vec<u8>)>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached("SELECT id, change FROM redo WHERE user = ? ORDER BY id LIMIT ?")?;
            let rows = rows.query_map((user, most as i64), |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        })
    }

    /// All encoded changes, with their users.
    pub fn all_redos(&self) -> Result<Vec<(String, Vec<u8>)>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare("SELECT user, change FROM redo ORDER BY id")?;
            let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        })
    }

    /// They are made, or never will be.
    pub fn forget_redos(&mut self, user: &str, last: i64) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| db.prepare_cached("DELETE FROM redo WHERE user = ? AND id <= ?")?.execute((user, last)).map(drop))
    }
}
