//! Users whose mail is replicated with some of the peers only.

use rusqlite::OptionalExtension;

use super::{from_sql, to_sql, Journal, JournalError};

/// Keys in `meta`, with a peer's name behind.
const REMOVED: &str = "removed:";

impl Journal {
    /// None: with all of them, as with most users.
    pub fn set_user_peers(&mut self, user: &str, servers: Option<&[String]>) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| match servers {
            Some(servers) => db
                .prepare_cached("INSERT OR REPLACE INTO user_peers (user, servers) VALUES (?, ?)")?
                .execute((user, servers.join("\n"))),
            None => db.prepare_cached("DELETE FROM user_peers WHERE user = ?")?.execute([user]),
        })
        .map(drop)
    }

    /// All such users.
    pub fn user_peers(&self) -> Result<Vec<(String, Vec<String>)>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare("SELECT user, servers FROM user_peers")?;
            let rows = rows.query_map([], |row| {
                let servers: String = row.get(1)?;
                Ok((row.get(0)?, servers.lines().map(str::to_owned).collect()))
            })?;
            rows.collect()
        })
    }

    /// The numbers of this user's changes that the peer has not acknowledged.
    pub fn pending_of_user(&self, user: &str, peer: &str) -> Result<Vec<u64>, JournalError> {
        let bit = self.bit_of(peer);
        self.run(|db| {
            let mut rows =
                db.prepare_cached("SELECT seq FROM changes WHERE user = ? AND peers & ? != 0 ORDER BY seq")?;
            let rows = rows.query_map((user, bit), |row| row.get(0).map(from_sql))?;
            rows.collect()
        })
    }

    /// The first of the changes `from` to `up_to` that the peer has not acknowledged, of one user or of all.
    pub fn first_pending_of(
        &self,
        peer: &str,
        user: Option<&str>,
        from: u64,
        up_to: u64,
    ) -> Result<Option<u64>, JournalError> {
        let of_user = if user.is_some() { "user = ?4" } else { "?4 IS NULL" };
        self.run(|db| {
            db.prepare_cached(&format!(
                "SELECT seq FROM changes WHERE seq BETWEEN ?1 AND ?2 AND peers & ?3 != 0 AND {of_user} \
                 ORDER BY seq LIMIT 1"
            ))?
            .query_row((to_sql(from), to_sql(up_to), self.bit_of(peer), user), |row| row.get(0).map(from_sql))
            .optional()
        })
    }

    /// How many of the changes up to this number the peer has not acknowledged, of one user or of all. Looks at all of them.
    pub fn count_pending(&self, peer: &str, user: Option<&str>, up_to: u64) -> Result<u64, JournalError> {
        let of_user = if user.is_some() { "user = ?3" } else { "?3 IS NULL" };
        self.run(|db| {
            db.prepare_cached(&format!(
                "SELECT count(*) FROM changes WHERE seq <= ?1 AND peers & ?2 != 0 AND {of_user}"
            ))?
            .query_row((to_sql(up_to), self.bit_of(peer), user), |row| row.get(0).map(from_sql))
        })
    }

    /// This peer is gone for good: from the next start on it is none, although it is configured. What it has not acknowledged, and that users are
    /// to be compared with it, is forgotten then.
    pub fn remove_peer(&mut self, peer: &str) -> Result<(), JournalError> {
        self.put(&format!("{REMOVED}{peer}"), 1)?;
        self.run(|db| db.execute("DELETE FROM failed WHERE peer = ? AND seq = 0", [peer])).map(drop)
    }

    /// Those that were removed, and are configured still.
    pub fn removed_peers(&self) -> Result<Vec<String>, JournalError> {
        self.run(|db| {
            let mut rows =
                db.prepare("SELECT substr(key, length(?1) + 1) FROM meta WHERE substr(key, 1, length(?1)) = ?1")?;
            let rows = rows.query_map([REMOVED], |row| row.get(0))?;
            rows.collect()
        })
    }

    /// Whoever is not configured any more may be so again later, as a new one.
    pub(super) fn forget_removed(&mut self, configured: &[String]) -> Result<(), JournalError> {
        for peer in self.removed_peers()?.iter().filter(|peer| !configured.contains(peer)) {
            self.run(|db| db.execute("DELETE FROM meta WHERE key = ?", [format!("{REMOVED}{peer}")]))?;
        }
        Ok(())
    }
}
