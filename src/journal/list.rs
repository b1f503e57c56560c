//! A user's list of mailboxes: who named what when, what is subscribed, which mailboxes have become one.

use rusqlite::{OptionalExtension, Row};

use super::logs::path_of;
use super::{from_sql, to_sql, Journal, JournalError};
use crate::merge::mailbox::Named;

/// A mailbox that is known by its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamedMailbox {
    /// GUID, 16 bytes.
    pub mailbox: Vec<u8>,
    pub path: Vec<String>,
    pub named: Named,
    /// Number of our last change that named it or put something into it; 0: none.
    pub own_seq: u64,
}

/// A mailbox that has become one with another; both GUIDs are 16 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    pub user: String,
    pub mailbox: Vec<u8>,
    pub is_now: Vec<u8>,
}

const COLUMNS: &str = "mailbox, path, named_clock, named_by, own_seq";
const IS_NAMED: &str = "private_user = '' AND mailbox <> x'' AND path IS NOT NULL";

fn read(row: &Row) -> rusqlite::Result<NamedMailbox> {
    Ok(NamedMailbox {
        mailbox: row.get(0)?,
        path: path_of(row.get(1)?),
        named: named(row, 2)?,
        own_seq: from_sql(row.get(4)?),
    })
}

fn stored(path: &[String]) -> Vec<u8> {
    path.join("\0").into_bytes()
}

fn named(row: &Row, at: usize) -> rusqlite::Result<Named> {
    Ok(Named { clock: from_sql(row.get(at)?), origin: row.get(at + 1)? })
}

impl Journal {
    /// The user's mailboxes whose names are known.
    pub fn named_mailboxes(&self, user: &str) -> Result<Vec<NamedMailbox>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(&format!("SELECT {COLUMNS} FROM logs WHERE user = ? AND {IS_NAMED}"))?;
            let rows = rows.query_map([user], read)?;
            rows.collect()
        })
    }

    /// One of them. A directory (without a GUID) is none.
    pub fn named_mailbox(&self, user: &str, mailbox: &[u8]) -> Result<Option<NamedMailbox>, JournalError> {
        self.run(|db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM logs WHERE user = ? AND mailbox = ? AND {IS_NAMED}"))?
                .query_row((user, mailbox), read)
                .optional()
        })
    }

    /// The mailbox has this name now. One that was not known has no known log yet (`log_seq` 0). `named`: None if that is not
    /// about the mailbox itself, but about one above.
    pub fn set_path(
        &mut self,
        user: &str,
        mailbox: &[u8],
        path: &[String],
        named: Option<&Named>,
    ) -> Result<(), JournalError> {
        self.write()?;
        let (clock, origin) = named.map(|named| (to_sql(named.clock), &named.origin)).unzip();
        self.run(|db| {
            db.prepare_cached(
                "INSERT INTO logs (user, mailbox, private_user, index_id, log_seq, end, tail, path, named_clock, named_by) \
                 VALUES (?1, ?2, '', 0, 0, 0, x'', ?3, coalesce(?4, 0), coalesce(?5, '')) \
                 ON CONFLICT (user, mailbox, private_user) DO UPDATE SET path = ?3, \
                 named_clock = coalesce(?4, named_clock), named_by = coalesce(?5, named_by)",
            )?
            .execute((user, mailbox, stored(path), clock, origin))
        })
        .map(drop)
    }

    /// Our change `seq` named the mailbox, or put something into it.
    pub fn note_own(&mut self, user: &str, mailbox: &[u8], seq: u64) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached("UPDATE logs SET own_seq = ? WHERE user = ? AND mailbox = ? AND private_user = ''")?
                .execute((to_sql(seq), user, mailbox))
        })
        .map(drop)
    }

    /// What was last told or applied of the name, and when; none: nothing.
    pub fn subscription(&self, user: &str, path: &[String]) -> Result<Option<(bool, Named)>, JournalError> {
        self.run(|db| {
            db.prepare_cached("SELECT subscribed, clock, origin FROM subscriptions WHERE user = ? AND path = ?")?
                .query_row((user, stored(path)), |row| Ok((row.get(0)?, named(row, 1)?)))
                .optional()
        })
    }

    /// Names that the user is subscribed to, of those that were ever told or applied.
    pub fn subscribed(&self, user: &str) -> Result<Vec<Vec<String>>, JournalError> {
        self.run(|db| {
            let mut rows =
                db.prepare_cached("SELECT path FROM subscriptions WHERE user = ? AND subscribed ORDER BY path")?;
            let rows = rows.query_map([user], |row| row.get(0).map(path_of))?;
            rows.collect()
        })
    }

    pub fn set_subscription(
        &mut self,
        user: &str,
        path: &[String],
        subscribed: bool,
        named: &Named,
    ) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached(
                "INSERT OR REPLACE INTO subscriptions (user, path, subscribed, clock, origin) VALUES (?, ?, ?, ?, ?)",
            )?
            .execute((user, stored(path), subscribed, to_sql(named.clock), &named.origin))
        })
        .map(drop)
    }

    /// The mailbox has become one with another; what is known of it is known of that one.
    pub fn note_alias(&mut self, user: &str, mailbox: &[u8], is_now: &[u8], at_us: u64) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached("UPDATE aliases SET is_now = ?3 WHERE user = ?1 AND is_now = ?2")?
                .execute((user, mailbox, is_now))?;
            db.prepare_cached("INSERT OR REPLACE INTO aliases (user, mailbox, is_now, at_us) VALUES (?, ?, ?, ?)")?
                .execute((user, mailbox, is_now, to_sql(at_us)))?;
            db.prepare_cached("DELETE FROM aliases WHERE user = ? AND mailbox = ?")?.execute((user, is_now))?;
            db.prepare_cached("UPDATE OR IGNORE elsewhere SET mailbox = ?3 WHERE user = ?1 AND mailbox = ?2")?
                .execute((user, mailbox, is_now))
        })
        .map(drop)
    }

    /// Which mailboxes are which now.
    pub fn aliases(&self) -> Result<Vec<Alias>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare("SELECT user, mailbox, is_now FROM aliases")?;
            let rows =
                rows.query_map([], |row| Ok(Alias { user: row.get(0)?, mailbox: row.get(1)?, is_now: row.get(2)? }))?;
            rows.collect()
        })
    }

    /// Changes as old as this are not sent any more. Whether there were any.
    pub fn forget_aliases(&mut self, oldest_us: u64) -> Result<bool, JournalError> {
        self.write_sometime()?;
        self.run(|db| db.prepare_cached("DELETE FROM aliases WHERE at_us < ?")?.execute([to_sql(oldest_us)]))
            .map(|count| count > 0)
    }
}
