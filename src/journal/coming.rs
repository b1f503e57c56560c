//! Changes to a user's list of mailboxes that a worker was given and has not said to have applied: if it dies, nobody can
//! tell from the list who did what is found in it.

use super::{to_sql, Journal, JournalError};

impl Journal {
    /// A worker is about to apply the encoded change; [`Journal::commit`] before it is told.
    pub fn note_coming(&mut self, user: &str, peer: &str, seq: u64, change: &[u8]) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO coming (user, peer, seq, change) VALUES (?, ?, ?, ?)")?.execute((
                user,
                peer,
                to_sql(seq),
                change,
            ))
        })
        .map(drop)
    }

    /// It was applied, or never will be.
    pub fn forget_coming(&mut self, user: &str, peer: &str, seq: u64) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| {
            db.prepare_cached("DELETE FROM coming WHERE user = ? AND peer = ? AND seq = ?")?.execute((
                user,
                peer,
                to_sql(seq),
            ))
        })
        .map(drop)
    }

    /// Whether a worker was given it before.
    pub fn is_coming(&self, user: &str, peer: &str, seq: u64) -> Result<bool, JournalError> {
        self.run(|db| {
            db.prepare_cached("SELECT 1 FROM coming WHERE user = ? AND peer = ? AND seq = ?")?.exists((
                user,
                peer,
                to_sql(seq),
            ))
        })
    }

    /// The encoded changes of this user.
    pub fn coming(&self, user: &str) -> Result<Vec<Vec<u8>>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached("SELECT change FROM coming WHERE user = ? ORDER BY peer, seq")?;
            let rows = rows.query_map([user], |row| row.get(0))?;
            rows.collect()
        })
    }
}
