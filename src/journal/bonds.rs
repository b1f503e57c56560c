//! By what the peers are known again, and a new epoch for a server whose state was set back.
//!
//! What is said to a peer by which it knows us again, and what it is told that we have of it, is on the disk before.

use super::{from_sql, to_sql, Journal, JournalError, Stored};

/// Keys in `meta`, with a peer's name behind.
const BONDS: &str = "bonds:";
const DISPUTED: &str = "disputed:";
const BEGUN_ANEW: &str = "begun-anew:";

impl Journal {
    /// What was last kept of the peer; empty: nothing.
    pub fn bonds(&self, peer: &str) -> Result<Vec<u8>, JournalError> {
        Ok(self.meta(&format!("{BONDS}{peer}"))?.unwrap_or_default())
    }

    /// It is on the disk when this returns, with all that was written before.
    pub fn keep_bonds(&mut self, peer: &str, bonds: &[u8]) -> Result<(), JournalError> {
        self.put_durably(&format!("{BONDS}{peer}"), bonds)
    }

    /// Why nobody is let in by this peer's name until a person decides; None: that is not so.
    pub fn disputed(&self, peer: &str) -> Result<Option<String>, JournalError> {
        self.meta(&format!("{DISPUTED}{peer}"))
    }

    pub fn set_disputed(&mut self, peer: &str, why: Option<&str>) -> Result<(), JournalError> {
        self.put_or_forget(&format!("{DISPUTED}{peer}"), why)
    }

    /// When this server last began anew because the peer said that it was set back.
    pub fn begun_anew_us(&self, peer: &str) -> Result<Option<u64>, JournalError> {
        Ok(self.meta(&format!("{BEGUN_ANEW}{peer}"))?.map(from_sql))
    }

    pub fn note_begun_anew(&mut self, peer: &str, at_us: Option<u64>) -> Result<(), JournalError> {
        self.put_or_forget(&format!("{BEGUN_ANEW}{peer}"), at_us.map(to_sql))
    }

    fn put_or_forget(&mut self, key: &str, value: Option<impl rusqlite::ToSql>) -> Result<(), JournalError> {
        match value {
            Some(value) => self.put(key, value),
            None => {
                self.write()?;
                self.run(|db| db.execute("DELETE FROM meta WHERE key = ?", [key])).map(drop)
            }
        }
    }

    /// This server's state was set back: its numbers are not to be trusted. What it had not told the peers when it started is dropped,
    /// as they may have had it long ago, and all users are to be compared with them. The new epoch, and what was done since the
    /// start and needs a new stamp. `epoch` and `seq`: of what peers have heard of, both are behind these. It is gone only when it is
    /// committed that it is stored again.
    pub fn begin_anew(
        &mut self,
        (epoch, seq): (u64, u64),
        now_us: u64,
        why: &str,
    ) -> Result<(u64, Vec<Stored>), JournalError> {
        let again = self.skip_numbers(seq)?;
        let epoch = now_us.max(epoch.saturating_add(1));
        self.run(|db| {
            db.execute("DELETE FROM changes", [])?;
            db.execute("DELETE FROM meta WHERE substr(key, 1, length(?1)) = ?1", [BONDS])
        })?;
        self.bytes = 0;
        self.put("epoch", to_sql(epoch))?;
        for peer in self.peers.clone().iter().filter(|peer| !peer.is_empty()) {
            self.compare_all_with(peer, now_us, why)?;
        }
        Ok((epoch, again))
    }

    fn put_durably(&mut self, key: &str, value: impl rusqlite::ToSql) -> Result<(), JournalError> {
        self.commit()?;
        self.run(|db| {
            db.pragma_update(None, "synchronous", "FULL")?;
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))?;
            db.pragma_update(None, "synchronous", "NORMAL")
        })
    }
}
