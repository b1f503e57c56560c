//! Which changes of the peers are applied here.

use super::{from_sql, to_sql, Journal, JournalError};

impl Journal {
    /// The peer's epoch and the runs (first, last) of its numbers that are applied here.
    pub fn applied(&self, peer: &str) -> Result<(u64, Vec<(u64, u64)>), JournalError> {
        self.run(|db| {
            let mut epoch = db.prepare("SELECT epoch FROM epochs WHERE peer = ?")?;
            let epoch = epoch.query_map([peer], |row| row.get(0).map(from_sql))?.next().transpose()?.unwrap_or(0);
            let mut rows = db.prepare("SELECT first, last FROM applied WHERE peer = ? ORDER BY first")?;
            let runs = rows.query_map([peer], |row| Ok((from_sql(row.get(0)?), from_sql(row.get(1)?))))?;
            Ok((epoch, runs.collect::<rusqlite::Result<_>>()?))
        })
    }

    /// The peer begins a new epoch: nothing of it is applied.
    pub fn begin_epoch(&mut self, peer: &str, epoch: u64) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.execute("DELETE FROM applied WHERE peer = ?", [peer])?;
            db.execute("DELETE FROM coming WHERE peer = ?", [peer])?;
            db.execute("INSERT OR REPLACE INTO epochs (peer, epoch) VALUES (?, ?)", (peer, to_sql(epoch)))
        })
        .map(drop)
    }

    /// Servers whose changes ever came here.
    pub fn origins(&self) -> Result<Vec<String>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare("SELECT peer FROM epochs ORDER BY peer")?;
            let rows = rows.query_map([], |row| row.get(0))?;
            rows.collect()
        })
    }

    /// Changes of this server come through others.
    pub fn note_origin(&mut self, origin: &str) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| db.execute("INSERT OR IGNORE INTO epochs (peer, epoch) VALUES (?, 0)", [origin])).map(drop)
    }

    /// Its name was made up, as far as can be known. If not, what is forgotten with it costs applying some of it again, which changes
    /// nothing.
    pub fn forget_origin(&mut self, origin: &str) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.execute("DELETE FROM epochs WHERE peer = ? AND epoch = 0", [origin])?;
            db.execute("DELETE FROM seen WHERE origin = ?", [origin])
        })
        .map(drop)
    }

    /// The run that begins with `first` ends with `last` now, or (none) is there no more.
    pub fn set_applied(&mut self, peer: &str, first: u64, last: Option<u64>) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| match last {
            Some(last) => db
                .prepare_cached("INSERT OR REPLACE INTO applied (peer, first, last) VALUES (?, ?, ?)")?
                .execute((peer, to_sql(first), to_sql(last))),
            None => {
                db.prepare_cached("DELETE FROM applied WHERE peer = ? AND first = ?")?.execute((peer, to_sql(first)))
            }
        })
        .map(drop)
    }
}
