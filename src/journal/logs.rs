//! How far each mailbox's transaction log is known: everything before that place was told to the peers.

use rusqlite::{OptionalExtension, Row};

use super::{from_sql, Journal, JournalError};

/// Where a log's known part ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownLog {
    pub user: String,
    /// GUID, 16 bytes.
    pub mailbox: Vec<u8>,
    /// Whose, of a private (.pvt) index; otherwise empty.
    pub private_user: String,
    pub index_id: u32,
    pub log_seq: u32,
    pub end: u64,
    /// The bytes before `end` in the log, some: with others the log is not the same.
    pub tail: Vec<u8>,
    /// The mailbox's name, part by part. Empty: not known.
    pub path: Vec<String>,
    /// What was last read from the log itself, from file and offset to file and offset: a process that tells of it only
    /// now, after the relay's restart, is too late. None: not known (any more than before).
    pub healed: Option<(Place, Place)>,
    /// Of what comes behind `end` something was told; see [`Journal::note_told`].
    pub was_told: bool,
}

/// File number and offset.
type Place = (u32, u64);

const COLUMNS: &str = "user, mailbox, private_user, index_id, log_seq, end, tail, path, healed_seq, healed, \
                       healed_to_seq, healed_to, was_told";

impl Journal {
    pub fn log(&self, user: &str, mailbox: &[u8], private_user: &str) -> Result<Option<KnownLog>, JournalError> {
        self.run(|db| {
            db.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM logs WHERE user = ? AND mailbox = ? AND private_user = ?"
            ))?
            .query_row((user, mailbox, private_user), read)
            .optional()
        })
    }

    /// All of a user.
    pub fn logs(&self, user: &str) -> Result<Vec<KnownLog>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached(&format!("SELECT {COLUMNS} FROM logs WHERE user = ?"))?;
            let rows = rows.query_map([user], read)?;
            rows.collect()
        })
    }

    /// Users with logs, in order, behind `after`.
    pub fn users(&self, after: &str, count_max: usize) -> Result<Vec<String>, JournalError> {
        self.run(|db| {
            let mut rows = db.prepare_cached("SELECT DISTINCT user FROM logs WHERE user > ? ORDER BY user LIMIT ?")?;
            let rows = rows.query_map((after, count_max as i64), |row| row.get(0))?;
            rows.collect()
        })
    }

    /// How many there are up to this one, and at all.
    pub fn count_users(&self, up_to: &str) -> Result<(u64, u64), JournalError> {
        self.run(|db| {
            let sql = "SELECT count(DISTINCT CASE WHEN user <= ? THEN user END), count(DISTINCT user) FROM logs";
            db.query_row(sql, [up_to], |row| Ok((from_sql(row.get(0)?), from_sql(row.get(1)?))))
        })
    }

    /// The last user who was compared in the background; empty: a pass begins.
    pub fn compared_in_background(&self) -> Result<String, JournalError> {
        Ok(self.meta("background")?.unwrap_or_default())
    }

    pub fn note_compared_in_background(&mut self, user: &str) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES ('background', ?)")?.execute([user])
        })
        .map(drop)
    }

    /// Whether all of the user's mail was looked at, ever.
    pub fn was_looked_at(&self, user: &str) -> Result<bool, JournalError> {
        self.run(|db| db.prepare_cached("SELECT 1 FROM logs WHERE user = ? AND mailbox = x''")?.exists([user]))
    }

    /// The log is known up to there. A path is taken where none is known: it is the name that the peers know, which only changes of the
    /// list change ([`Journal::set_path`]). A process that writes to a renamed mailbox may tell before the one that has renamed it.
    pub fn set_log(&mut self, log: &KnownLog) -> Result<(), JournalError> {
        self.write_log(log, true)
    }

    /// The same, unless more of it is known: what is told late must not set it back.
    pub fn advance_log(&mut self, log: &KnownLog) -> Result<(), JournalError> {
        self.write_log(log, false)
    }

    fn write_log(&mut self, log: &KnownLog, may_set_back: bool) -> Result<(), JournalError> {
        self.write_sometime()?;
        let path = (!log.path.is_empty()).then(|| log.path.join("\0").into_bytes());
        let healed = log.healed.map(|(from, to)| (from.0, from.1 as i64, to.0, to.1 as i64));
        self.run(|db| {
            db.prepare_cached(&format!(
                "INSERT INTO logs ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, 0) \
                 ON CONFLICT (user, mailbox, private_user) DO UPDATE SET index_id = ?4, log_seq = ?5, end = ?6, \
                 tail = ?7, path = coalesce(path, ?8), healed_seq = coalesce(?9, healed_seq), \
                 healed = coalesce(?10, healed), healed_to_seq = coalesce(?11, healed_to_seq), \
                 healed_to = coalesce(?12, healed_to), was_told = 0 \
                 WHERE ?13 OR index_id <> ?4 OR log_seq < ?5 OR (log_seq = ?5 AND end <= ?6)"
            ))?
            .execute((
                &log.user,
                &log.mailbox,
                &log.private_user,
                log.index_id,
                log.log_seq,
                log.end as i64,
                &log.tail,
                path,
                healed.map(|h| h.0),
                healed.map(|h| h.1),
                healed.map(|h| h.2),
                healed.map(|h| h.3),
                may_set_back,
            ))
        })
        .map(drop)
    }

    /// What a look found in the log was told, and its place there is not known yet: if the look ends before that, what was told is found
    /// once more.
    pub fn note_told(&mut self, user: &str, mailbox: &[u8]) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| {
            db.prepare_cached("UPDATE logs SET was_told = 1 WHERE user = ? AND mailbox = ? AND private_user = ''")?
                .execute((user, mailbox))
        })
        .map(drop)
    }

    /// The name of a mailbox whose log is known and its name is not. Forgotten, it is found out again.
    pub fn name_log(&mut self, user: &str, mailbox: &[u8], path: &[String]) -> Result<(), JournalError> {
        self.write_sometime()?;
        let path = path.join("\0").into_bytes();
        self.run(|db| {
            db.prepare_cached("UPDATE logs SET path = ? WHERE user = ? AND mailbox = ? AND path IS NULL")?
                .execute((path, user, mailbox))
        })
        .map(drop)
    }

    /// The mailbox has another GUID now.
    pub fn rename_mailbox(&mut self, user: &str, old: &[u8], new: &[u8]) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached("UPDATE OR REPLACE logs SET mailbox = ?3 WHERE user = ?1 AND mailbox = ?2")?
                .execute((user, old, new))
        })
        .map(drop)
    }

    /// The mailbox does not exist any more.
    pub fn forget_mailbox(&mut self, user: &str, mailbox: &[u8]) -> Result<(), JournalError> {
        self.forget_messages(user, mailbox)?;
        self.run(|db| db.prepare_cached("DELETE FROM logs WHERE user = ? AND mailbox = ?")?.execute((user, mailbox)))
            .map(drop)
    }
}

fn read(row: &Row) -> rusqlite::Result<KnownLog> {
    let path: Option<Vec<u8>> = row.get(7)?;
    let place = |at: usize| -> rusqlite::Result<Option<Place>> {
        let (seq, offset): (Option<u32>, Option<i64>) = (row.get(at)?, row.get(at + 1)?);
        Ok(seq.zip(offset.map(|offset| offset as u64)))
    };
    Ok(KnownLog {
        user: row.get(0)?,
        mailbox: row.get(1)?,
        private_user: row.get(2)?,
        index_id: row.get(3)?,
        log_seq: row.get(4)?,
        end: row.get::<_, i64>(5)? as u64,
        tail: row.get(6)?,
        path: path_of(path.unwrap_or_default()),
        healed: place(8)?.zip(place(10)?),
        was_told: row.get(12)?,
    })
}

pub(super) fn path_of(stored: Vec<u8>) -> Vec<String> {
    let path = String::from_utf8(stored).unwrap_or_default();
    if path.is_empty() {
        return Vec::new();
    }
    path.split('\0').map(str::to_owned).collect()
}
