//! Messages that are not here where a peer has them, for as long as it may name them by the UIDs that they have there.

use rusqlite::Row;

use super::{to_sql, Journal, JournalError};

/// A message by the UID that it has, or had, on a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    pub mailbox: Vec<u8>,
    pub uid: u32,
    pub guid: String,
    /// As a worker said it, see `worker::elsewhere::Known`.
    pub here: u32,
    /// It had this UID here, too, so all peers may know it by that.
    pub moved: bool,
    /// Only this peer called it so.
    pub alone: bool,
}

/// How `moved` and `alone` are stored: never both.
fn scope(elsewhere: &Elsewhere) -> u8 {
    match (elsewhere.moved, elsewhere.alone) {
        (true, _) => 1,
        (false, true) => 2,
        (false, false) => 0,
    }
}

fn read(row: &Row) -> rusqlite::Result<Elsewhere> {
    let scope: u8 = row.get(4)?;
    let (moved, alone) = (scope == 1, scope == 2);
    Ok(Elsewhere { mailbox: row.get(0)?, uid: row.get(1)?, guid: row.get(2)?, here: row.get(3)?, moved, alone })
}

impl Journal {
    /// A worker has found out.
    pub fn note_elsewhere(
        &mut self,
        user: &str,
        peer: &str,
        elsewhere: &Elsewhere,
        at_us: u64,
    ) -> Result<(), JournalError> {
        // With the acknowledgement, or before it.
        self.write()?;
        // Where the peer's own message has this UID, that is meant, not one that was moved here.
        let or = if elsewhere.moved { "IGNORE" } else { "REPLACE" };
        if elsewhere.moved {
            self.run(|db| {
                db.prepare_cached(
                    "UPDATE elsewhere SET here = ? WHERE user = ? AND mailbox = ? AND here = ? AND guid = ?",
                )?
                .execute((elsewhere.here, user, &elsewhere.mailbox, elsewhere.uid, &elsewhere.guid))
            })?;
        }
        self.run(|db| {
            db.prepare_cached(&format!(
                "INSERT OR {or} INTO elsewhere (user, mailbox, peer, uid, guid, here, moved, at_us) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            ))?
            .execute((
                user,
                &elsewhere.mailbox,
                peer,
                elsewhere.uid,
                &elsewhere.guid,
                elsewhere.here,
                scope(elsewhere),
                to_sql(at_us),
            ))
        })
        .map(drop)
    }

    /// What is known of these UIDs of the peer.
    pub fn elsewhere(
        &self,
        user: &str,
        peer: &str,
        mailbox: &[u8],
        (first, last): (u32, u32),
    ) -> Result<Vec<Elsewhere>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(
                "SELECT mailbox, uid, guid, here, moved FROM elsewhere \
                 WHERE user = ? AND mailbox = ? AND peer = ? AND uid BETWEEN ? AND ?",
            )?;
            let rows = rows.query_map((user, mailbox, peer, first, last), read)?;
            rows.collect()
        })
    }

    /// What is known of the peer's messages with this GUID: of the message, and of its copies in the mailbox.
    pub fn elsewhere_of(
        &self,
        user: &str,
        peer: &str,
        mailbox: &[u8],
        guid: &str,
    ) -> Result<Vec<Elsewhere>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(
                "SELECT mailbox, uid, guid, here, moved FROM elsewhere \
                 WHERE user = ? AND mailbox = ? AND guid = ? AND peer = ?",
            )?;
            let rows = rows.query_map((user, mailbox, guid, peer), read)?;
            rows.collect()
        })
    }

    /// Users of whom something is known.
    /// The mailbox's messages went with it.
    pub fn forget_messages(&mut self, user: &str, mailbox: &[u8]) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached("DELETE FROM elsewhere WHERE user = ? AND mailbox = ?")?.execute((user, mailbox))
        })
        .map(drop)
    }

    pub fn users_elsewhere(&self) -> Result<Vec<String>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare("SELECT DISTINCT user FROM elsewhere")?;
            let rows = rows.query_map([], |row| row.get(0))?;
            rows.collect()
        })
    }

    /// Changes as old as this are not sent any more.
    pub fn forget_elsewhere(&mut self, oldest_us: u64) -> Result<(), JournalError> {
        let mut is_any = false;
        self.run(|db| {
            is_any =
                db.prepare_cached("SELECT 1 FROM elsewhere WHERE at_us < ? LIMIT 1")?.exists([to_sql(oldest_us)])?;
            Ok(())
        })?;
        if is_any {
            self.write_sometime()?;
            self.run(|db| db.execute("DELETE FROM elsewhere WHERE at_us < ?", [to_sql(oldest_us)]))?;
        }
        Ok(())
    }
}
