//! Opening: a new file, the file of the last start, or a refusal that changes nothing.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::checkpoint::Checkpoints;
use super::{from_sql, to_sql, Journal, JournalError, Lock, FORMAT};

/// "Dvtl": tells our files from other SQLite databases.
const APPLICATION_ID: i32 = 0x4476_746c;
/// The file within its folder.
pub const FILE_NAME: &str = "journal.sqlite";
/// Numbers that are given away between two looks of the disk at how many.
const RESERVE: u64 = 1 << 20;
/// More than one transaction takes.
const RESERVE_LEFT_MIN: u64 = 1 << 16;
/// Peers have bits in a signed 64-bit number.
const PEERS_MAX: usize = 62;

const SCHEMA: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE peers (bit INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dropped INTEGER NOT NULL DEFAULT 0) STRICT;
-- What some peer has not acknowledged. `peers`: their bits. `crc`: of all that stays as it is. With an origin: another
-- server's, which is passed on; `via`: who sent it to us, and sends it to the peers in `given` as well.
CREATE TABLE changes (seq INTEGER PRIMARY KEY, user TEXT NOT NULL, at_us INTEGER NOT NULL, peers INTEGER NOT NULL,
    crc INTEGER NOT NULL, frame BLOB NOT NULL, origin TEXT, origin_epoch INTEGER, origin_seq INTEGER, via TEXT,
    given INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX changes_of_user ON changes (user, seq);
CREATE INDEX changes_of_others ON changes (origin, origin_seq) WHERE origin IS NOT NULL;
-- Runs of numbers of each peer's epoch whose changes are applied here.
CREATE TABLE applied (peer TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (peer, first))
    STRICT, WITHOUT ROWID;
CREATE TABLE epochs (peer TEXT PRIMARY KEY, epoch INTEGER NOT NULL) STRICT, WITHOUT ROWID;
-- Users whose mail is replicated with some of the peers only.
CREATE TABLE user_peers (user TEXT PRIMARY KEY, servers TEXT NOT NULL) STRICT, WITHOUT ROWID;
-- Up to which number each server's changes of a user are applied here.
CREATE TABLE seen (user TEXT NOT NULL, origin TEXT NOT NULL, epoch INTEGER NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (user, origin)) STRICT, WITHOUT ROWID;
-- How far each mailbox's transaction log is known; `tail`: the bytes before that place.
CREATE TABLE logs (user TEXT NOT NULL, mailbox BLOB NOT NULL, private_user TEXT NOT NULL, index_id INTEGER NOT NULL,
    log_seq INTEGER NOT NULL, end INTEGER NOT NULL, tail BLOB NOT NULL, path BLOB,
    -- The part that was last read from the log itself.
    healed_seq INTEGER, healed INTEGER, healed_to_seq INTEGER, healed_to INTEGER,
    -- Of what comes behind the end something was told.
    was_told INTEGER NOT NULL DEFAULT 0,
    -- When and where it got its name; our last change that named it or put something into it.
    named_clock INTEGER NOT NULL DEFAULT 0, named_by TEXT NOT NULL DEFAULT '', own_seq INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (user, mailbox, private_user)) STRICT, WITHOUT ROWID;
-- What was last told or applied of a name.
CREATE TABLE subscriptions (user TEXT NOT NULL, path BLOB NOT NULL, subscribed INTEGER NOT NULL, clock INTEGER NOT NULL,
    origin TEXT NOT NULL, PRIMARY KEY (user, path)) STRICT, WITHOUT ROWID;
-- Mailboxes that have become one with another.
CREATE TABLE aliases (user TEXT NOT NULL, mailbox BLOB NOT NULL, is_now BLOB NOT NULL, at_us INTEGER NOT NULL,
    PRIMARY KEY (user, mailbox)) STRICT, WITHOUT ROWID;
-- What a worker may have done to a user's list of mailboxes.
CREATE TABLE coming (user TEXT NOT NULL, peer TEXT NOT NULL, seq INTEGER NOT NULL, change BLOB NOT NULL,
    PRIMARY KEY (user, peer, seq)) STRICT, WITHOUT ROWID;
-- Messages that are not here at the UIDs that they have, or had, on the peer.
CREATE TABLE elsewhere (user TEXT NOT NULL, mailbox BLOB NOT NULL, peer TEXT NOT NULL, uid INTEGER NOT NULL,
    guid TEXT NOT NULL, here INTEGER NOT NULL, moved INTEGER NOT NULL, at_us INTEGER NOT NULL,
    PRIMARY KEY (user, mailbox, peer, uid)) STRICT, WITHOUT ROWID;
CREATE INDEX elsewhere_by_age ON elsewhere (at_us);
CREATE INDEX elsewhere_by_guid ON elsewhere (user, mailbox, guid);
-- Changes of flags that a peer may not have heard of when it made what is still to come.
CREATE TABLE flags (user TEXT NOT NULL, clock INTEGER NOT NULL, origin TEXT NOT NULL, change BLOB NOT NULL,
    at_us INTEGER NOT NULL, PRIMARY KEY (user, clock, origin)) STRICT, WITHOUT ROWID;
CREATE INDEX flags_by_clock ON flags (clock);
-- Our own that an earlier one of a peer has undone here.
CREATE TABLE redo (id INTEGER PRIMARY KEY, user TEXT NOT NULL, change BLOB NOT NULL) STRICT;
-- What needs a comparison or a person.
CREATE TABLE failed (peer TEXT NOT NULL, user TEXT NOT NULL, mailbox BLOB NOT NULL, seq INTEGER NOT NULL,
    at_us INTEGER NOT NULL, error TEXT NOT NULL, frame BLOB, PRIMARY KEY (peer, user, mailbox, seq)) STRICT, WITHOUT ROWID;
";

/// What the journal needs to know.
pub struct Options<'a> {
    /// It lies there, with its lock.
    pub folder: &'a Path,
    pub server: &'a str,
    pub peers: &'a [String],
    /// Of this boot of the machine: with another one, a power failure may have taken the last commits.
    pub boot: &'a str,
    /// Microseconds since 1970; the epoch of a new journal.
    pub now_us: u64,
}

/// How the journal begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    pub epoch: u64,
    /// It was made just now.
    pub is_new: bool,
    /// The machine was started since, and not all was looked at after that: its last commits may be lost.
    pub is_after_boot: bool,
    /// Since when (seconds since 1970) users may have had their first mail, and nobody told of it: shortly before the last commit of the
    /// first relay. Later ones do not count: nobody knows if all users were looked for.
    pub unheard_since: Option<i64>,
}

/// Between what was told last and the last commit, at the most.
const UNHEARD_MARGIN_SECS: i64 = 600;

impl Journal {
    /// Opens or makes the journal in a folder that exists.
    ///
    /// # Errors
    ///
    /// A file that is damaged, foreign, another server's or of an unknown format: it stays as it is.
    pub fn open(options: &Options, lock: Lock) -> Result<(Journal, Start), JournalError> {
        let path = options.folder.join(FILE_NAME);
        let is_new = !path.exists();
        let sqlite = |error| JournalError::Sqlite { path: path.clone(), error };
        let written_secs = written_secs(&path);
        match is_new {
            true => create(&path, options)?,
            false => check(&path, options.server)?,
        }
        let db = connect(&path).map_err(sqlite)?;
        let checkpoints = Checkpoints::start(&path).map_err(|error| JournalError::Io { path: path.clone(), error })?;
        let mut journal = Journal {
            path: path.clone(),
            db,
            peers: Vec::new(),
            seq: 0,
            seq_at_start: 0,
            reserved: 0,
            is_writing: false,
            is_urgent: false,
            is_broken: Cell::new(false),
            bytes: 0,
            checkpoints,
            _lock: lock,
        };
        let (epoch, is_after_boot) = journal.begin(options, written_secs)?;
        let unheard_since = journal.meta("unheard_since")?;
        Ok((journal, Start { epoch, is_new, is_after_boot: is_after_boot && !is_new, unheard_since }))
    }

    fn begin(&mut self, options: &Options, written_secs: Option<i64>) -> Result<(u64, bool), JournalError> {
        let epoch = self.number("epoch")?;
        self.reserved = self.number("reserved")?;
        let last: Option<i64> = self.run(|db| db.query_row("SELECT max(seq) FROM changes", [], |row| row.get(0)))?;
        self.seq = self.number("seq")?.max(last.map_or(0, from_sql));
        let boot: Option<String> = self.meta("boot")?;
        let is_after_boot = boot.as_deref() != Some(options.boot);
        let has_lost_power = boot.is_some() && is_after_boot && self.meta::<i64>("clean")? != Some(1);
        if is_after_boot {
            // Numbers that were given away may have been forgotten.
            self.seq = self.seq.max(self.reserved);
            self.put("seq", to_sql(self.seq))?;
            // And logs may have been set back: what is told of them is news.
            self.write()?;
            self.run(|db| db.execute("UPDATE logs SET healed_seq = NULL, healed_to_seq = NULL", []))?;
        }
        self.seq_at_start = self.seq;
        self.put("clean", 0)?;
        self.put("boot", options.boot)?;
        if boot.is_some() && is_after_boot {
            self.put("unlooked", 1)?;
        }
        if let Some(secs) = written_secs {
            let since: Option<i64> = self.meta("unheard_since")?;
            // 0 would be always, and was never meant.
            let since = since.filter(|since| *since != 0).map_or(secs, |since| since.min(secs));
            self.put("unheard_since", since)?;
        }
        self.begin_peers(options.peers, options.now_us)?;
        if has_lost_power {
            // The logs may have lost their ends together with what is known of them here, and peers have forgotten what they had told.
            for peer in self.peers.clone().iter().filter(|peer| !peer.is_empty()) {
                self.compare_all_with(peer, options.now_us, "the power of this server failed")?;
            }
        }
        self.bytes = from_sql(
            self.run(|db| db.query_row("SELECT coalesce(sum(length(frame)), 0) FROM changes", [], |row| row.get(0)))?,
        );
        self.commit()?;
        self.run(|db| db.pragma_update(None, "synchronous", "NORMAL"))?;
        let unlooked: Option<i64> = self.meta("unlooked")?;
        Ok((epoch, is_after_boot || unlooked == Some(1)))
    }

    /// All that a power failure may have taken has been looked for, and journaled: until then every start is one after the boot.
    pub fn is_looked_at(&mut self) -> Result<(), JournalError> {
        self.put("unlooked", 0)
    }

    /// Gives each peer its bit; those that are not configured any more, or were removed, are forgotten. With a new one all users who are
    /// known are to be compared: it lacks what was before.
    fn begin_peers(&mut self, configured: &[String], now_us: u64) -> Result<(), JournalError> {
        self.write()?;
        self.forget_removed(configured)?;
        let removed = self.removed_peers()?;
        let names: Vec<&String> = configured.iter().filter(|name| !removed.contains(name)).collect();
        let known: Vec<(i64, String)> = self.run(|db| {
            let mut rows = db.prepare("SELECT bit, name FROM peers")?;
            let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        })?;
        let mut peers = vec![String::new(); PEERS_MAX];
        for (bit, name) in known {
            let place = usize::try_from(bit).ok().and_then(|bit| peers.get_mut(bit));
            match place {
                Some(place) if names.contains(&&name) => *place = name,
                _ => self.forget_peer(bit)?,
            }
        }
        for name in names {
            if peers.iter().any(|peer| peer == name) {
                continue;
            }
            let Some(bit) = peers.iter().position(String::is_empty) else {
                return Err(self.damaged(format!("it has room for {PEERS_MAX} peers only")));
            };
            self.run(|db| db.execute("INSERT INTO peers (bit, name) VALUES (?, ?)", (bit as i64, name)))?;
            self.compare_all_with(name, now_us, "it was no peer before (dovetail_peers)")?;
            peers[bit].clone_from(name);
        }
        self.peers = peers;
        Ok(())
    }

    fn forget_peer(&mut self, bit: i64) -> Result<(), JournalError> {
        self.run(|db| {
            db.execute("DELETE FROM peers WHERE bit = ?", [bit])?;
            db.execute("UPDATE changes SET peers = peers & ~(1 << ?)", [bit])?;
            db.execute("DELETE FROM changes WHERE peers = 0", [])
        })
        .map(drop)
    }

    /// The end was asked for, and everything is committed.
    pub fn close(mut self) -> Result<(), JournalError> {
        self.put("clean", 1)?;
        self.commit()
    }

    /// Before a number above `reserved` is given away, the disk must know. That is told between two transactions: what is
    /// written together must not be torn by it.
    pub(super) fn reserve(&mut self, seq: u64) -> Result<(), JournalError> {
        if seq + RESERVE_LEFT_MIN < self.reserved {
            return Ok(());
        }
        let reserved = seq + RESERVE;
        self.run(|db| {
            db.pragma_update(None, "synchronous", "FULL")?;
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('reserved', ?)", [to_sql(reserved)])?;
            db.pragma_update(None, "synchronous", "NORMAL")
        })?;
        self.reserved = reserved;
        Ok(())
    }

    fn number(&self, key: &str) -> Result<u64, JournalError> {
        let number: Option<i64> = self.meta(key)?;
        number.map(from_sql).ok_or_else(|| self.damaged(format!("it has no '{key}'")))
    }

    pub(super) fn meta<T: rusqlite::types::FromSql>(&self, key: &str) -> Result<Option<T>, JournalError> {
        self.run(|db| db.query_row("SELECT value FROM meta WHERE key = ?", [key], |row| row.get(0)).optional())
    }

    pub(super) fn put(&mut self, key: &str, value: impl rusqlite::ToSql) -> Result<(), JournalError> {
        self.write()?;
        self.run(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)")?.execute((key, value))
        })
        .map(drop)
    }
}

/// Shortly before the journal was last written to, in seconds since 1970.
fn written_secs(path: &Path) -> Option<i64> {
    let files = [path.to_owned(), path.with_extension("sqlite-wal")];
    let written = files.iter().filter_map(|file| std::fs::metadata(file).ok()?.modified().ok());
    let since = written.filter_map(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).max()?;
    // What was told last, the relay may have held in its memory, or the machine have lost.
    Some(i64::try_from(since.as_secs()).ok()?.saturating_sub(UNHEARD_MARGIN_SECS).max(1))
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(std::time::Duration::from_secs(5))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // For the first commit: the disk must know that it was not closed since.
    db.pragma_update(None, "synchronous", "FULL")?;
    // The checkpoint's thread does it.
    db.pragma_update(None, "wal_autocheckpoint", 0)?;
    db.set_prepared_statement_cache_capacity(64);
    // Not in the schema: journals of before it go on, too, and earlier relays with those that have it.
    db.execute("CREATE INDEX IF NOT EXISTS failed_of_user ON failed (user)", [])?;
    Ok(db)
}

/// Makes it under another name first: it is there whole or not at all.
fn create(path: &Path, options: &Options) -> Result<(), JournalError> {
    let io = |error| JournalError::Io { path: path.to_owned(), error };
    let unfinished = path.with_extension("new");
    match std::fs::remove_file(&unfinished) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    Connection::open(&unfinished)
        .and_then(|db| fill(&db, options))
        .map_err(|error| JournalError::Sqlite { path: unfinished.clone(), error })?;
    std::fs::rename(&unfinished, path).map_err(io)
}

fn fill(db: &Connection, options: &Options) -> rusqlite::Result<()> {
    db.execute_batch("BEGIN IMMEDIATE")?;
    db.execute_batch(SCHEMA)?;
    let mut meta = db.prepare("INSERT INTO meta (key, value) VALUES (?, ?)")?;
    meta.execute(("server", options.server))?;
    for (key, value) in [("epoch", to_sql(options.now_us)), ("seq", 0), ("reserved", 0)] {
        meta.execute((key, value))?;
    }
    db.pragma_update(None, "application_id", APPLICATION_ID)?;
    db.pragma_update(None, "user_version", FORMAT)?;
    db.execute_batch("COMMIT")?;
    // Now, not when it is opened: a process that is killed in the middle leaves what `check` may not roll back.
    db.pragma_update(None, "journal_mode", "WAL")
}

/// Looks at a file that is there, without writing to it.
fn check(path: &Path, server: &str) -> Result<(), JournalError> {
    let damaged = |why: String| JournalError::Damaged { path: path.to_owned(), why };
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(|error| damaged(error.to_string()))?;
    let pragma = |name: &str| db.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i32>(0));
    let id = pragma("application_id").map_err(|error| damaged(error.to_string()))?;
    if id != APPLICATION_ID {
        return Err(JournalError::NotOurs { path: path.to_owned(), why: format!("its application_id is {id}") });
    }
    match pragma("user_version").map_err(|error| damaged(error.to_string()))? {
        FORMAT => {}
        found => return Err(JournalError::Format { path: path.to_owned(), found }),
    }
    // After an orderly end there is nothing to look for, and it may be large.
    let clean = "SELECT value FROM meta WHERE key = 'clean'";
    let was_closed = db.query_row(clean, [], |row| row.get::<_, i64>(0)).is_ok_and(|clean| clean == 1);
    if !was_closed {
        let state: String =
            db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(|error| damaged(error.to_string()))?;
        if state != "ok" {
            return Err(damaged(state));
        }
    }
    let found: String = db
        .query_row("SELECT value FROM meta WHERE key = 'server'", [], |row| row.get(0))
        .map_err(|error| damaged(error.to_string()))?;
    if found != server {
        return Err(JournalError::OtherServer { path: PathBuf::from(path), found, expected: server.to_owned() });
    }
    Ok(())
}
