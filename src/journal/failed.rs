//! What could not be done and needs a comparison or a person.

use rusqlite::Row;

use super::{from_sql, to_sql, Journal, JournalError};

/// Of so many, the changes are kept: each has less than 64 KiB.
const CHANGES_MAX: i64 = 1_000;

/// A change of a peer that can never be applied, or a mailbox that has to be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failed {
    /// Whose change; empty: the mailbox here has to be compared with all peers.
    pub peer: String,
    pub user: String,
    /// GUID of the mailbox; empty: all of the user's.
    pub mailbox: Vec<u8>,
    /// The change's number; 0 for a mailbox.
    pub seq: u64,
    pub at_us: u64,
    pub error: String,
    /// The change, encoded. Kept for a person's eyes, and not handed out.
    pub change: Option<Vec<u8>>,
}

impl Journal {
    /// Remembers it; one that is there already stays.
    pub fn fail(&mut self, failed: &Failed) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached(
                "INSERT OR IGNORE INTO failed (peer, user, mailbox, seq, at_us, error, frame) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, \
                         CASE WHEN (SELECT count(*) FROM failed WHERE frame IS NOT NULL) < ?8 THEN ?7 END)",
            )?
            .execute((
                &failed.peer,
                &failed.user,
                &failed.mailbox,
                to_sql(failed.seq),
                to_sql(failed.at_us),
                &failed.error,
                &failed.change,
                CHANGES_MAX,
            ))
        })
        .map(drop)
    }

    /// The oldest ones, without their changes.
    pub fn failed(&self, count_max: usize) -> Result<Vec<Failed>, JournalError> {
        self.run(|db| {
            let mut rows =
                db.prepare_cached("SELECT peer, user, mailbox, seq, at_us, error FROM failed ORDER BY at_us LIMIT ?")?;
            let rows = rows.query_map([count_max as i64], read)?;
            rows.collect()
        })
    }

    /// What was compared by a person is forgotten: of one user, or (None) all. How many there were.
    pub fn clear_failed(&mut self, user: Option<&str>) -> Result<u64, JournalError> {
        self.write()?;
        let cleared = self.run(|db| match user {
            Some(user) => db.prepare_cached("DELETE FROM failed WHERE user = ?")?.execute([user]),
            None => db.execute("DELETE FROM failed", []),
        })?;
        if user.is_none() {
            self.run(|db| db.execute("UPDATE peers SET dropped = 0", []))?;
        }
        Ok(cleared as u64)
    }

    /// Users of whom something has been listed since before then and is to be compared; those of whom it was listed first come first.
    pub fn users_to_compare(&self, before_us: u64, count_max: usize) -> Result<Vec<String>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(
                "SELECT user FROM failed WHERE seq = 0 AND user != '' AND at_us <= ? \
                 GROUP BY user ORDER BY min(at_us) LIMIT ?",
            )?;
            let rows = rows.query_map((to_sql(before_us), count_max as i64), |row| row.get(0))?;
            rows.collect()
        })
    }

    /// The user was compared with all peers: what was listed of him until then is over.
    pub fn was_compared(&mut self, user: &str, until_us: u64) -> Result<u64, JournalError> {
        self.write()?;
        let cleared = self.run(|db| {
            db.prepare_cached("DELETE FROM failed WHERE user = ? AND at_us <= ?")?.execute((user, to_sql(until_us)))
        })?;
        Ok(cleared as u64)
    }

    /// Forgets how many changes the peer will not get if nobody is left who has to be compared with it for that. True: it has.
    pub fn forget_dropped(&mut self, peer: &str) -> Result<bool, JournalError> {
        let is_listed =
            self.run(|db| db.prepare_cached("SELECT 1 FROM failed WHERE peer = ? AND seq = 0")?.exists([peer]))?;
        if is_listed {
            return Ok(false);
        }
        self.write()?;
        self.run(|db| db.execute("UPDATE peers SET dropped = 0 WHERE name = ?", [peer]))?;
        Ok(true)
    }

    /// How many there are.
    pub fn failed_count(&self) -> Result<u64, JournalError> {
        self.run(|db| db.prepare_cached("SELECT count(*) FROM failed")?.query_row([], |row| row.get(0).map(from_sql)))
    }
}

fn read(row: &Row) -> rusqlite::Result<Failed> {
    Ok(Failed {
        peer: row.get(0)?,
        user: row.get(1)?,
        mailbox: row.get(2)?,
        seq: from_sql(row.get(3)?),
        at_us: from_sql(row.get(4)?),
        error: row.get(5)?,
        change: None,
    })
}
