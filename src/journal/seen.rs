//! Of each user, up to which number the changes of each server are applied here: his next change here comes after these.
//!
//! One number is enough, because a user's changes of one server are applied in order. His own changes' last number is kept
//! as well, under this server's name.

use super::{from_sql, to_sql, Journal, JournalError};

/// A change of a user, by its origin's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub origin: String,
    pub epoch: u64,
    pub seq: u64,
}

impl Journal {
    /// The change is applied, or was made here. Peers hear of it only with what says so. An earlier one changes nothing.
    pub fn set_seen(&mut self, user: &str, seen: &Seen) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached(
                "INSERT INTO seen (user, origin, epoch, seq) VALUES (?, ?, ?, ?) \
                 ON CONFLICT DO UPDATE SET epoch = excluded.epoch, seq = excluded.seq \
                 WHERE (excluded.epoch, excluded.seq) > (seen.epoch, seen.seq)",
            )?
            .execute((user, &seen.origin, to_sql(seen.epoch), to_sql(seen.seq)))
        })
        .map(drop)
    }

    /// All that is known of the user, the servers with the newest epochs first.
    pub fn seen(&self, user: &str, count_max: usize) -> Result<Vec<Seen>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(
                "SELECT origin, epoch, seq FROM seen WHERE user = ? ORDER BY epoch DESC, origin LIMIT ?",
            )?;
            let rows = rows.query_map((user, count_max as i64), |row| {
                Ok(Seen { origin: row.get(0)?, epoch: from_sql(row.get(1)?), seq: from_sql(row.get(2)?) })
            })?;
            rows.collect()
        })
    }

    /// Whether the server has begun a newer epoch, as far as the user's changes tell.
    pub fn has_newer_epoch(&self, user: &str, origin: &str, epoch: u64) -> Result<bool, JournalError> {
        self.run(|db| {
            db.prepare_cached("SELECT 1 FROM seen WHERE user = ? AND origin = ? AND epoch > ?")?.exists((
                user,
                origin,
                to_sql(epoch),
            ))
        })
    }

    /// Whether this change of the user is applied: it, or a later one of its server.
    pub fn has_seen(&self, user: &str, origin: &str, epoch: u64, seq: u64) -> Result<bool, JournalError> {
        self.run(|db| {
            db.prepare_cached("SELECT 1 FROM seen WHERE user = ? AND origin = ? AND epoch = ? AND seq >= ?")?.exists((
                user,
                origin,
                to_sql(epoch),
                to_sql(seq),
            ))
        })
    }
}
