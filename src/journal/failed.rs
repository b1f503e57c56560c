//! What could not be done and needs a comparison or a person.

use rusqlite::{Connection, Row};

use super::{from_sql, to_sql, Journal, JournalError};

/// Of so many, the changes are kept: each has less than 64 KiB.
const CHANGES_MAX: i64 = 1_000;
/// So many of a mailbox are set aside for one reason: a comparison that does not help tells the same again and again.
const SAME_MAX: i64 = 10;

/// A change of a peer that can never be applied, or a mailbox that has to be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failed {
    /// Whose change, or with whom the mailbox has to be compared; empty: with all peers.
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
    /// Remembers it; one that is there already stays as it is, and so do enough of the same. But if its user is being compared, since
    /// `compared_us`, it stands there as of now: the comparison may have been there before. True: it was not there.
    pub fn fail(&mut self, failed: &Failed, compared_us: Option<u64>) -> Result<bool, JournalError> {
        self.write()?;
        let sql = "SELECT count(*) FROM failed WHERE frame IS NOT NULL";
        let kept = |db: &Connection| db.prepare_cached(sql)?.query_row([], |row| row.get::<_, i64>(0));
        let change = match &failed.change {
            Some(change) if self.run(kept)? < CHANGES_MAX => Some(change),
            _ => None,
        };
        let at_us = compared_us.map_or(failed.at_us, |since_us| failed.at_us.max(since_us + 1));
        let added = self.run(|db| {
            db.prepare_cached(
                "INSERT OR IGNORE INTO failed (peer, user, mailbox, seq, at_us, error, frame) \
                 SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE ?4 = 0 \
                 OR (SELECT count(*) FROM failed WHERE peer = ?1 AND user = ?2 AND mailbox = ?3 AND error = ?6) < ?8",
            )?
            .execute((
                &failed.peer,
                &failed.user,
                &failed.mailbox,
                to_sql(failed.seq),
                to_sql(at_us),
                &failed.error,
                change,
                SAME_MAX,
            ))
        })?;
        if added == 0 && compared_us.is_some() {
            let sql = "UPDATE failed SET at_us = max(at_us, ?) WHERE peer = ? AND user = ? AND mailbox = ? AND seq = ?";
            let key = (to_sql(at_us), &failed.peer, &failed.user, &failed.mailbox, to_sql(failed.seq));
            self.run(|db| db.prepare_cached(sql)?.execute(key))?;
        }
        Ok(added > 0)
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

    /// Users of whom something has been listed since before then and is to be compared with others than these peers, which are away; those of
    /// whom it was listed first come first. What was set aside counts if it is younger than that.
    pub fn users_to_compare(
        &self,
        before_us: u64,
        aside_since_us: u64,
        away: &[&str],
        count_max: usize,
    ) -> Result<Vec<String>, JournalError> {
        let away = away.iter().fold(0, |bits, peer| bits | self.bit_of(peer));
        self.run(|db| {
            let mut rows = db.prepare_cached(
                "SELECT user FROM failed WHERE (seq = 0 OR at_us > ?) AND user != '' AND at_us <= ? \
                 AND peer NOT IN (SELECT name FROM peers WHERE (? >> bit) & 1) \
                 GROUP BY user ORDER BY min(at_us) LIMIT ?",
            )?;
            let limits = (to_sql(aside_since_us), to_sql(before_us), away, count_max as i64);
            let rows = rows.query_map(limits, |row| row.get(0))?;
            rows.collect()
        })
    }

    /// Whether the user is one of them.
    pub fn is_to_compare(&self, user: &str, aside_since_us: u64) -> Result<bool, JournalError> {
        self.run(|db| {
            db.prepare_cached("SELECT 1 FROM failed WHERE user = ? AND (seq = 0 OR at_us > ?)")?
                .exists((user, to_sql(aside_since_us)))
        })
    }

    /// All users who are known here are to be compared with the peer.
    pub fn compare_all_with(&mut self, peer: &str, at_us: u64, why: &str) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.execute(
                "INSERT OR IGNORE INTO failed (peer, user, mailbox, seq, at_us, error) \
                 SELECT ?1, user, x'', 0, ?2, ?3 \
                 FROM (SELECT user FROM logs UNION SELECT user FROM seen) WHERE user != ''",
                (peer, to_sql(at_us), why),
            )
        })
        .map(drop)
    }

    /// How many entries stand for something that has to be compared, of one user or of all; with this peer, or at all.
    pub fn to_compare(&self, user: Option<&str>, peer: Option<&str>) -> Result<u64, JournalError> {
        let of_user = if user.is_some() { "user = ?1" } else { "?1 IS NULL" };
        let with_peer = if peer.is_some() { "peer = ?2" } else { "?2 IS NULL" };
        self.run(|db| {
            db.prepare_cached(&format!("SELECT count(*) FROM failed WHERE seq = 0 AND {of_user} AND {with_peer}"))?
                .query_row((user, peer), |row| row.get(0).map(from_sql))
        })
    }

    /// The user was compared with these peers, and has the same there: what was listed with them until then is over. If none is `left`,
    /// so is all else; what was listed with all, or with a server that is no peer of his, is listed with those who are left.
    pub fn was_compared(
        &mut self,
        user: &str,
        equal: &[&str],
        left: &[&str],
        until_us: u64,
    ) -> Result<(), JournalError> {
        self.write()?;
        let until_us = to_sql(until_us);
        let listed: Vec<String> = self.run(|db| {
            let mut rows = db.prepare_cached("SELECT DISTINCT peer FROM failed WHERE user = ?")?;
            let rows = rows.query_map([user], |row| row.get(0))?;
            rows.collect()
        })?;
        for peer in listed.iter().map(String::as_str).filter(|peer| !left.contains(peer)) {
            let is_over = left.is_empty() || equal.contains(&peer);
            for left in left.iter().filter(|_| !is_over) {
                let sql = "INSERT OR IGNORE INTO failed (peer, user, mailbox, seq, at_us, error) \
                           SELECT ?1, user, mailbox, seq, at_us, error FROM failed \
                           WHERE peer = ?2 AND user = ?3 AND seq = 0 AND at_us <= ?4";
                self.run(|db| db.prepare_cached(sql)?.execute((left, peer, user, until_us)))?;
            }
            let sql = "DELETE FROM failed WHERE peer = ? AND user = ? AND at_us <= ? AND (seq = 0 OR ?)";
            self.run(|db| db.prepare_cached(sql)?.execute((peer, user, until_us, is_over)))?;
        }
        Ok(())
    }

    /// The peer is none of the user's any more: what was listed with it is to be compared with the others.
    pub fn compare_without(&mut self, user: &str, peer: &str) -> Result<(), JournalError> {
        self.write()?;
        let sql = "UPDATE OR REPLACE failed SET peer = '' WHERE peer = ? AND user = ? AND seq = 0";
        self.run(|db| db.prepare_cached(sql)?.execute((peer, user))).map(drop)
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
