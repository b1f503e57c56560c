//! Changes of flags that a peer may not have heard of when it made one of its own which is still to come.

use super::{from_sql, to_sql, Journal, JournalError};

/// A change of flags that was made here, or applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlagChange {
    pub clock: u64,
    pub origin: String,
    /// Encoded.
    pub change: Vec<u8>,
}

impl Journal {
    /// With the change itself, or with what says that it is applied.
    pub fn note_flags(&mut self, user: &str, change: &FlagChange, at_us: u64) -> Result<(), JournalError> {
        self.write()?;
        let FlagChange { clock, origin, change } = change;
        self.run(|db| {
            db.prepare_cached(
                "INSERT OR REPLACE INTO flags (user, clock, origin, change, at_us) VALUES (?, ?, ?, ?, ?)",
            )?
            .execute((user, to_sql(*clock), origin, change, to_sql(at_us)))
        })
        .map(drop)
    }

    /// Those of the user from this clock on, in order.
    pub fn flags_from(&self, user: &str, clock: u64) -> Result<Vec<FlagChange>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(
                "SELECT clock, origin, change FROM flags WHERE user = ? AND clock >= ? ORDER BY clock, origin",
            )?;
            let rows = rows.query_map((user, to_sql(clock)), |row| {
                Ok(FlagChange { clock: from_sql(row.get(0)?), origin: row.get(1)?, change: row.get(2)? })
            })?;
            rows.collect()
        })
    }

    /// Users with the clock of the last one.
    pub fn users_with_flags(&self) -> Result<Vec<(String, u64)>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare("SELECT user, max(clock) FROM flags GROUP BY user")?;
            let rows = rows.query_map([], |row| Ok((row.get(0)?, from_sql(row.get(1)?))))?;
            rows.collect()
        })
    }

    /// Every peer has heard of all up to this clock before it made what is still to come.
    pub fn forget_flags(&mut self, clock: u64) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| db.prepare_cached("DELETE FROM flags WHERE clock <= ?")?.execute([to_sql(clock)])).map(drop)
    }

    /// Drops what is too old, and, where too many bytes are kept, the older half: then what comes last holds.
    pub fn trim_flags(&mut self, bytes_max: u64, oldest_us: u64) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| {
            db.execute("DELETE FROM flags WHERE at_us < ?", [to_sql(oldest_us)])?;
            let bytes: i64 =
                db.query_row("SELECT coalesce(sum(length(change)), 0) FROM flags", [], |row| row.get(0))?;
            if from_sql(bytes) > bytes_max {
                db.execute(
                    "DELETE FROM flags WHERE clock <= \
                     (SELECT clock FROM flags ORDER BY clock LIMIT 1 OFFSET (SELECT count(*) / 2 FROM flags))",
                    [],
                )?;
            }
            Ok(())
        })
    }
}
