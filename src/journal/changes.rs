//! The changes of this server, and those of others that it passes on, that some peer has not acknowledged.

use rusqlite::Row;

use super::{from_sql, to_sql, Journal, JournalError, Seen};

/// Changes that are looked at for their age at once.
const TRIM_CHANGES: i64 = 1_000;

/// A change as it was stored: the encoded frame that is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub seq: u64,
    pub user: String,
    /// When, in microseconds since 1970.
    pub at_us: u64,
    pub frame: Vec<u8>,
    /// Who sends it to the peer as well; None: nobody but us.
    pub expected: Option<String>,
}

/// Another server's change that is passed on.
pub struct PassedOn<'a> {
    /// Its origin and its number there.
    pub change: &'a Seen,
    /// Who sent it to us.
    pub via: &'a str,
    /// Peers that get it from that one as well.
    pub given: &'a [&'a str],
}

/// What was dropped to stay within bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trimmed {
    pub changes: u64,
    /// Of these, those that the peer does not get from another server.
    pub missing: u64,
    /// Whose they were.
    pub users: Vec<String>,
    /// The last number that was dropped.
    pub up_to: u64,
}

impl Journal {
    /// The number that the next change gets. The disk knows of it.
    pub fn next_seq(&mut self) -> Result<u64, JournalError> {
        if self.seq >= self.reserved {
            // Nobody expects so many in one transaction; better torn than a number given twice.
            self.commit()?;
        }
        Ok(self.seq + 1)
    }

    /// Stores the change with the number that [`Journal::next_seq`] told, for the peers.
    pub fn append(&mut self, user: &str, at_us: u64, frame: &[u8], peers: &[&str]) -> Result<(), JournalError> {
        self.insert(user, at_us, frame, peers, None)
    }

    /// The same for a change that is passed on.
    pub fn pass_on(
        &mut self,
        user: &str,
        at_us: u64,
        frame: &[u8],
        peers: &[&str],
        passed_on: &PassedOn,
    ) -> Result<(), JournalError> {
        self.insert(user, at_us, frame, peers, Some(passed_on))
    }

    fn insert(
        &mut self,
        user: &str,
        at_us: u64,
        frame: &[u8],
        peers: &[&str],
        passed_on: Option<&PassedOn>,
    ) -> Result<(), JournalError> {
        self.write()?;
        let bits = |peers: &[&str]| peers.iter().map(|peer| self.bit_of(peer)).fold(0, |bits, bit| bits | bit);
        let (peers, given) = (bits(peers), passed_on.map_or(0, |passed_on| bits(passed_on.given)));
        let seq = self.seq + 1;
        self.run(|db| {
            db.prepare_cached(
                "INSERT INTO changes (seq, user, at_us, peers, crc, frame, origin, origin_epoch, origin_seq, via, given) \
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )?
            .execute((
                to_sql(seq),
                user,
                to_sql(at_us),
                peers,
                crc(seq, at_us, user, frame),
                frame,
                passed_on.map(|passed_on| passed_on.change.origin.as_str()),
                passed_on.map(|passed_on| to_sql(passed_on.change.epoch)),
                passed_on.map(|passed_on| to_sql(passed_on.change.seq)),
                passed_on.map(|passed_on| passed_on.via),
                given,
            ))
        })?;
        self.put("seq", to_sql(seq))?;
        self.seq = seq;
        self.bytes += frame.len() as u64;
        Ok(())
    }

    /// The peer has applied the change.
    pub fn acknowledge(&mut self, peer: &str, seq: u64) -> Result<(), JournalError> {
        self.clear(peer, seq, seq).map(drop)
    }

    /// The peer has applied all up to `seq`, or does without them; how many there were.
    pub fn acknowledge_up_to(&mut self, peer: &str, seq: u64) -> Result<u64, JournalError> {
        self.clear(peer, 0, seq)
    }

    /// Whose change has this number, if the peer has not acknowledged it.
    pub fn pending_of(&self, peer: &str, seq: u64) -> Result<Option<String>, JournalError> {
        let bit = self.bit_of(peer);
        self.run(|db| {
            db.prepare_cached("SELECT user FROM changes WHERE seq = ? AND peers & ? != 0")?
                .query_map((to_sql(seq), bit), |row| row.get(0))?
                .next()
                .transpose()
        })
    }

    /// The number here of another server's change of the user that is to be passed on to the peer.
    pub fn pending_of_other(&self, peer: &str, user: &str, change: &Seen) -> Result<Option<u64>, JournalError> {
        let bit = self.bit_of(peer);
        self.run(|db| {
            db.prepare_cached(
                "SELECT seq FROM changes \
                 WHERE origin = ?1 AND origin_seq = ?2 AND origin_epoch = ?3 AND peers & ?4 != 0 AND user = ?5",
            )?
            .query_map((&change.origin, to_sql(change.seq), to_sql(change.epoch), bit, user), |row| {
                row.get(0).map(from_sql)
            })?
            .next()
            .transpose()
        })
    }

    /// The last change of another server that is to be passed on to the peer; 0: none. Looks at all of them.
    pub fn last_passed_on(&self, peer: &str) -> Result<u64, JournalError> {
        let bit = self.bit_of(peer);
        let sql = "SELECT coalesce(max(seq), 0) FROM changes WHERE origin IS NOT NULL AND peers & ? != 0";
        self.run(|db| db.query_row(sql, [bit], |row| row.get(0).map(from_sql)))
    }

    /// What no peer lacks any more goes.
    fn clear(&mut self, peer: &str, first: u64, last: u64) -> Result<u64, JournalError> {
        self.write_sometime()?;
        let (bit, first, last) = (self.bit_of(peer), to_sql(first), to_sql(last));
        let (cleared, bytes) = self.run(|db| {
            let cleared = db
                .prepare_cached(
                    "UPDATE changes SET peers = peers & ~?1 WHERE seq BETWEEN ?2 AND ?3 AND peers & ?1 != 0",
                )?
                .execute((bit, first, last))?;
            let mut gone = db.prepare_cached(
                "DELETE FROM changes WHERE seq BETWEEN ? AND ? AND peers = 0 RETURNING length(frame)",
            )?;
            let mut bytes = 0;
            let mut rows = gone.query((first, last))?;
            while let Some(row) = rows.next()? {
                bytes += from_sql(row.get(0)?);
            }
            Ok((cleared as u64, bytes))
        })?;
        self.bytes = self.bytes.saturating_sub(bytes);
        Ok(cleared)
    }

    /// How many changes the peer has not acknowledged, and their bytes. Looks at all of them.
    pub fn pending(&self, peer: &str) -> Result<(u64, u64), JournalError> {
        let bit = self.bit_of(peer);
        self.run(|db| {
            db.query_row(
                "SELECT count(*), coalesce(sum(length(frame)), 0) FROM changes WHERE peers & ? != 0",
                [bit],
                |row| Ok((from_sql(row.get(0)?), from_sql(row.get(1)?))),
            )
        })
    }

    /// A peer knows of numbers up to `seq` that were given away and forgotten. Takes out the changes of this start, which
    /// got some of them again; the next number is behind. They are gone only when it is committed that they are stored again.
    pub fn skip_numbers(&mut self, seq: u64) -> Result<Vec<Stored>, JournalError> {
        self.commit()?;
        self.reserve(self.seq.max(seq))?;
        self.write()?;
        let start = to_sql(self.seq_at_start);
        let again = self.run(|db| {
            let mut rows =
                db.prepare("SELECT seq, user, at_us, crc, frame, via, given FROM changes WHERE seq > ? ORDER BY seq")?;
            let rows = rows.query_map([start], |row| read(row, 0).map(|(stored, _)| stored))?;
            let again = rows.collect::<rusqlite::Result<Vec<Stored>>>()?;
            db.execute("DELETE FROM changes WHERE seq > ?", [start])?;
            Ok(again)
        })?;
        self.bytes = self.bytes.saturating_sub(again.iter().map(|stored| stored.frame.len() as u64).sum());
        self.seq = self.seq.max(seq);
        self.put("seq", to_sql(self.seq))?;
        Ok(again)
    }

    /// The hybrid clock as it was last noted; 0 at first.
    pub fn clock(&self) -> Result<u64, JournalError> {
        Ok(self.meta::<i64>("clock")?.map_or(0, from_sql))
    }

    /// Notes the clock, with what it gave a time to or what was heard.
    pub fn note_clock(&mut self, clock: u64) -> Result<(), JournalError> {
        self.write_sometime()?;
        self.run(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES ('clock', ?)")?.execute([to_sql(clock)])
        })
        .map(drop)
    }

    /// The number of the first change that the peer has not acknowledged.
    pub fn first_pending(&self, peer: &str) -> Result<Option<u64>, JournalError> {
        let bit = self.bit_of(peer);
        self.run(|db| {
            db.prepare_cached("SELECT seq FROM changes WHERE peers & ? != 0 ORDER BY seq LIMIT 1")?
                .query_map([bit], |row| row.get(0).map(from_sql))?
                .next()
                .transpose()
        })
    }

    /// Of what the peer has not acknowledged, the next ones behind `after`, of one user or of all, up to about that many
    /// bytes.
    pub fn unacknowledged(
        &self,
        peer: &str,
        user: Option<&str>,
        after: u64,
        bytes_max: usize,
    ) -> Result<Vec<Stored>, JournalError> {
        let bit = self.bit_of(peer);
        let mut found = Vec::new();
        let mut bytes = 0;
        let of_user = if user.is_some() { "user = ?3" } else { "?3 IS NULL" };
        let stored = self.run(|db| {
            let mut query = db.prepare_cached(&format!(
                "SELECT seq, user, at_us, crc, frame, via, given FROM changes \
                 WHERE seq > ?1 AND peers & ?2 != 0 AND {of_user} ORDER BY seq"
            ))?;
            let mut rows = query.query((to_sql(after), bit, user))?;
            while let Some(row) = rows.next()? {
                let (stored, is_whole) = read(row, bit)?;
                if !is_whole {
                    return Ok(Err(stored.seq));
                }
                bytes += stored.frame.len();
                found.push(stored);
                if bytes >= bytes_max {
                    break;
                }
            }
            Ok(Ok(found))
        })?;
        stored.map_err(|seq| self.damaged(format!("change {seq} is not what was written")))
    }

    /// Drops the oldest changes of whichever peer lacks most, until the journal is within its bounds. What is dropped was
    /// of the returned peer alone.
    pub fn trim(&mut self, bytes_max: u64, oldest_us: u64) -> Result<Option<(String, Trimmed)>, JournalError> {
        let too_old = self.run(|db| {
            let mut oldest = db.prepare_cached("SELECT seq, peers, at_us FROM changes ORDER BY seq LIMIT ?")?;
            let rows = oldest.query_map([TRIM_CHANGES], |row| {
                Ok((from_sql(row.get(0)?), row.get::<_, i64>(1)?, from_sql(row.get(2)?)))
            })?;
            let rows: Vec<(u64, i64, u64)> = rows.collect::<rusqlite::Result<_>>()?;
            Ok(rows.into_iter().take_while(|(_, _, at_us)| *at_us < oldest_us).last())
        })?;
        let (up_to, bits) = match too_old {
            Some((seq, peers, _)) => (seq, peers),
            None if self.bytes > bytes_max => self.place_to_trim(bytes_max)?,
            None => return Ok(None),
        };
        let bit = bits & bits.wrapping_neg();
        let Some(peer) = self.peers.get(bit.trailing_zeros() as usize).cloned() else { return Ok(None) };
        let by_user = self.run(|db| {
            let mut query = db.prepare(
                "SELECT user, count(*) FROM changes WHERE seq <= ?1 AND peers & ?2 != 0 AND given & ?2 = 0 GROUP BY user",
            )?;
            let rows = query.query_map((to_sql(up_to), bit), |row| Ok((row.get(0)?, from_sql(row.get(1)?))))?;
            rows.collect::<rusqlite::Result<Vec<(String, u64)>>>()
        })?;
        let missing = by_user.iter().map(|(_, count)| count).sum();
        let changes = self.acknowledge_up_to(&peer, up_to)?;
        self.run(|db| db.execute("UPDATE peers SET dropped = dropped + ? WHERE name = ?", (to_sql(missing), &peer)))?;
        let users = by_user.into_iter().map(|(user, _)| user).collect();
        Ok(Some((peer, Trimmed { changes, missing, users, up_to })))
    }

    /// The slowest peer's bit, and up to where its changes fill what is too much and a tenth of the rest.
    fn place_to_trim(&self, bytes_max: u64) -> Result<(u64, i64), JournalError> {
        let mut slowest = (0, 0);
        for (at, peer) in self.peers.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
            let (_, bytes) = self.pending(peer)?;
            slowest = slowest.max((bytes, 1i64 << at));
        }
        let goal = self.bytes.saturating_sub(bytes_max / 10 * 9);
        let up_to = self.run(|db| {
            let mut query = db.prepare("SELECT seq, length(frame) FROM changes WHERE peers & ? != 0 ORDER BY seq")?;
            let mut rows = query.query([slowest.1])?;
            let (mut up_to, mut bytes) = (0, 0);
            while let (true, Some(row)) = (bytes < goal, rows.next()?) {
                up_to = from_sql(row.get(0)?);
                bytes += from_sql(row.get(1)?);
            }
            Ok(up_to)
        })?;
        Ok((up_to, slowest.1))
    }

    /// How many changes were dropped for the peer and are missing there.
    pub fn dropped(&self, peer: &str) -> Result<u64, JournalError> {
        self.run(|db| {
            db.query_row("SELECT dropped FROM peers WHERE name = ?", [peer], |row| row.get::<_, i64>(0)).map(from_sql)
        })
    }
}

/// For the peer with this bit. False: it is not what was written.
fn read(row: &Row, bit: i64) -> rusqlite::Result<(Stored, bool)> {
    let is_given = row.get::<_, i64>(6)? & bit != 0;
    let stored = Stored {
        seq: from_sql(row.get(0)?),
        user: row.get(1)?,
        at_us: from_sql(row.get(2)?),
        frame: row.get(4)?,
        expected: if is_given { row.get(5)? } else { None },
    };
    let is_whole = row.get::<_, i64>(3)? == crc(stored.seq, stored.at_us, &stored.user, &stored.frame);
    Ok((stored, is_whole))
}

fn crc(seq: u64, at_us: u64, user: &str, frame: &[u8]) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&seq.to_le_bytes());
    hasher.update(&at_us.to_le_bytes());
    hasher.update(user.as_bytes());
    hasher.update(frame);
    hasher.finalize().into()
}
