//! The commits of a log, one after the other.
//!
//! Guarantees that a commit is given whole or not at all, and that what is given tiles the bytes up to
//! [`Commits::end`]. Where records end and what was torn is decided as in `mail_transaction_log_file_sync()`.

use super::fields::Fields;
use super::record::{self, Record};
use super::{Header, LogError};

/// Bytes of `struct mail_transaction_header`.
const RECORD_HEADER_BYTES: usize = 8;
/// Bytes of a whole BOUNDARY record.
const BOUNDARY_BYTES: usize = 12;

/// What became visible at once: the records of one group, or the one record of none. Offsets count from the file's begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    pub begin: u64,
    pub end: u64,
    /// Without the BOUNDARY record. Never empty, unless the boundary had nothing behind it.
    pub records: Vec<Record>,
}

/// Iterates over the commits in bytes of a log. After an error it gives nothing more.
#[derive(Clone)]
pub struct Commits<'a> {
    bytes: &'a [u8],
    offset: u64,
    /// How many of the bytes are behind us.
    position: usize,
    state: State,
}

#[derive(Clone)]
enum State {
    Reading,
    Refused(LogError),
    Ended,
}

impl<'a> Commits<'a> {
    /// `bytes` are those of the file from `offset` on, which is a commit boundary or the header's end
    /// (`header.hdr_size`). A wrong offset gives an error or garbage that happens to look like records.
    pub fn new(header: &Header, bytes: &'a [u8], offset: u64) -> Commits<'a> {
        let refused = if offset < u64::from(header.hdr_size) {
            Some("records do not begin inside the file's header")
        } else if offset.checked_add(bytes.len() as u64).is_none() {
            Some("the bytes reach beyond the largest possible file")
        } else {
            None
        };
        let state = match refused {
            Some(reason) => State::Refused(LogError::Corrupted { offset, reason: reason.into() }),
            None => State::Reading,
        };
        Commits { bytes, offset, position: 0, state }
    }

    /// The file offset up to which all commits were complete and given. After the iteration: what stands behind it was
    /// not written to its end (yet), or is broken.
    pub fn end(&self) -> u64 {
        self.at(self.position)
    }

    fn at(&self, position: usize) -> u64 {
        self.offset.saturating_add(position as u64)
    }

    fn corrupted(&self, position: usize, reason: impl Into<String>) -> LogError {
        LogError::Corrupted { offset: self.at(position), reason: reason.into() }
    }

    /// Type and size of the record that begins at `position`. `None` if it was not written to its end.
    fn record_at(&self, position: usize) -> Result<Option<(u32, usize)>, LogError> {
        let mut fields = Fields::new(self.bytes.get(position..).unwrap_or_default());
        let available = fields.rest().len();
        let (Some(size), Some(kind)) = (fields.array(), fields.u32()) else { return Ok(None) };
        let Some(size) = record_size(size) else { return Ok(None) };
        if size < RECORD_HEADER_BYTES {
            return Err(self.corrupted(position, format!("a record of {size} bytes is shorter than its own header")));
        }
        Ok((size <= available).then_some((kind, size)))
    }

    fn next_commit(&mut self) -> Result<Option<Commit>, LogError> {
        let begin = self.position;
        let Some((kind, size)) = self.record_at(begin)? else { return Ok(None) };
        let (from, to) = if record::is_boundary(kind) {
            let Some(end) = self.group_end(begin, size)? else { return Ok(None) };
            (begin + size, end)
        } else {
            (begin, begin + size)
        };
        let Some(records) = self.records(from, to)? else { return Ok(None) };
        self.position = to;
        Ok(Some(Commit { begin: self.at(begin), end: self.at(to), records }))
    }

    /// Where the group ends that the BOUNDARY record at `begin` announces. `None` if it was not written to its end.
    fn group_end(&self, begin: usize, size: usize) -> Result<Option<usize>, LogError> {
        let mut fields = Fields::new(&self.bytes[begin + RECORD_HEADER_BYTES..begin + size]);
        let group = match fields.u32() {
            Some(group) if size == BOUNDARY_BYTES => group as usize,
            _ => return Err(self.corrupted(begin, format!("a boundary record has {size} bytes instead of 12"))),
        };
        if group < BOUNDARY_BYTES || group % 4 != 0 {
            return Err(self.corrupted(begin, format!("a group cannot be {group} bytes long")));
        }
        let available = self.bytes.len() - begin;
        Ok((group <= available).then_some(begin + group))
    }

    /// The records between the two positions. `None` if one of them was not written to its end.
    fn records(&self, from: usize, to: usize) -> Result<Option<Vec<Record>>, LogError> {
        let mut records = Vec::new();
        let mut position = from;
        while position < to {
            let Some((kind, size)) = self.record_at(position)? else {
                return self.torn_or_too_long(position);
            };
            if size > to - position {
                return Err(self.corrupted(position, "a record reaches beyond the end of its group"));
            }
            if record::is_boundary(kind) {
                return Err(self.corrupted(position, "a boundary stands inside a group"));
            }
            let contents = &self.bytes[position + RECORD_HEADER_BYTES..position + size];
            let record = Record::parse(self.at(position), kind, contents)
                .map_err(|reason| self.corrupted(position, format!("type {kind:#x}: {reason}")))?;
            records.push(record);
            position += size;
        }
        Ok(Some(records))
    }

    /// Of a record inside a complete group. Pages of one write may reach the disk in any order, so that zeros can stand
    /// where a record's size belongs; a size that leads out of the bytes comes from no torn write.
    fn torn_or_too_long(&self, position: usize) -> Result<Option<Vec<Record>>, LogError> {
        let size = self.bytes.get(position..).and_then(|bytes| bytes.first_chunk().copied());
        match size.and_then(record_size) {
            None => Ok(None),
            Some(_) => Err(self.corrupted(position, "a record reaches beyond the end of its group")),
        }
    }
}

impl Iterator for Commits<'_> {
    type Item = Result<Commit, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Ended => None,
            State::Refused(error) => Some(Err(error)),
            State::Reading => match self.next_commit() {
                Ok(None) => None,
                Ok(Some(commit)) => {
                    self.state = State::Reading;
                    Some(Ok(commit))
                }
                Err(error) => Some(Err(error)),
            },
        }
    }
}

/// `mail_index_offset_to_uint32()`: a number of bytes, a multiple of four, whose every stored byte has its highest bit
/// set. `None` where Dovecot gives 0: the size was not written (yet).
fn record_size(stored: [u8; 4]) -> Option<usize> {
    if stored.iter().any(|byte| byte & 0x80 == 0) {
        return None;
    }
    let size = stored.iter().fold(0, |size, byte| size << 7 | usize::from(byte & 0x7f)) << 2;
    (size != 0).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_dovecot_writes() {
        assert_eq!(record_size([0x80, 0x80, 0x80, 0x85]), Some(20));
        assert_eq!(record_size([0x80, 0x80, 0x81, 0x80]), Some(512));
        assert_eq!(record_size([0xff; 4]), Some(0x3fff_fffc));
        for unfinished in [[0; 4], [0x80; 4], [0x80, 0, 0x80, 0x85]] {
            assert_eq!(record_size(unfinished), None);
        }
    }
}
