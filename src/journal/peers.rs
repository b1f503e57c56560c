//! Users whose mail is replicated with some of the peers only.

use super::{Journal, JournalError};

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
            let rows = rows.query_map((user, bit), |row| row.get(0).map(super::from_sql))?;
            rows.collect()
        })
    }
}
