//! The header of a log file, `struct mail_transaction_log_header`.
//!
//! Guarantees that a header that is given belongs to a log that the other modules can read. The checks are those of
//! `mail_transaction_log_file_read_hdr()`, except for the index id's: which one is right is the caller's to know.

use super::fields::Fields;
use super::LogError;

pub(super) const MAJOR_VERSION: u8 = 1;
/// `MAIL_TRANSACTION_LOG_HEADER_MIN_SIZE`: fields behind it are 0 where the header is shorter.
pub(super) const BYTES_MIN: usize = 24;
/// Bytes of the header that are known here; a longer one is skipped over.
const BYTES_KNOWN: usize = 40;
/// The minor version that brought the compatibility flags.
const MINOR_WITH_COMPAT_FLAGS: u8 = 2;
const COMPAT_LITTLE_ENDIAN: u8 = 0x01;

/// What a log file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub major_version: u8,
    pub minor_version: u8,
    /// Where the first record begins, in bytes from the file's begin.
    pub hdr_size: u16,
    /// Ties the log to its index. A timestamp of one second: a restored index may have it again.
    pub indexid: u32,
    /// Number of this file; each rotation counts up.
    pub file_seq: u32,
    /// The file that was rotated into this one, and its size. 0 if there was none, or if the index was reset.
    pub prev_file_seq: u32,
    pub prev_file_offset: u32,
    /// When the file was made, in UNIX seconds.
    pub create_stamp: u32,
    /// The highest modseq before the first record. 0 if modseqs were not tracked.
    pub initial_modseq: u64,
    /// `enum mail_index_header_compat_flags`; 0 below version 1.2.
    pub compat_flags: u8,
}

impl Header {
    /// Reads the header from the file's first bytes; 40 are enough. What stands behind it is not looked at.
    ///
    /// # Errors
    ///
    /// If the bytes are too few, or the log is one that cannot be read here: see [`LogError`].
    pub fn parse(bytes: &[u8]) -> Result<Header, LogError> {
        let cut = |needed| LogError::HeaderCut { length: bytes.len(), needed };
        let major_version = *bytes.first().ok_or_else(|| cut(BYTES_MIN))?;
        if major_version != MAJOR_VERSION {
            return Err(LogError::UnknownVersion(major_version));
        }
        let mut known = [0; BYTES_KNOWN];
        let length = bytes.len().min(BYTES_KNOWN);
        known[..length].copy_from_slice(&bytes[..length]);
        let header = fields(&known).ok_or_else(|| cut(BYTES_MIN))?;
        // First: on a log of the other endianness all but these flags looks broken.
        header.check_compat_flags(length)?;
        let hdr_size = usize::from(header.hdr_size);
        if hdr_size < BYTES_MIN {
            return Err(LogError::HeaderTooSmall(header.hdr_size));
        }
        if bytes.len() < hdr_size.min(BYTES_KNOWN) {
            return Err(cut(hdr_size.min(BYTES_KNOWN)));
        }
        known[hdr_size.min(BYTES_KNOWN)..].fill(0);
        let header = fields(&known).ok_or_else(|| cut(BYTES_MIN))?;
        if header.indexid == 0 {
            return Err(LogError::MarkedCorrupted);
        }
        Ok(header)
    }

    /// Whether the index was made new or reset with this file: whatever an older file tells is void. The caller has to
    /// ask where it goes on from one file to the next; no record says it. A rebuild (`doveadm force-resync` on sdbox and
    /// mdbox) keeps index id, UIDVALIDITY and UIDs, and appends all messages once more.
    pub fn begins_anew(&self) -> bool {
        self.prev_file_seq == 0
    }

    fn check_compat_flags(&self, length: usize) -> Result<(), LogError> {
        if self.minor_version < MINOR_WITH_COMPAT_FLAGS || length < BYTES_KNOWN {
            return Ok(());
        }
        match self.compat_flags {
            COMPAT_LITTLE_ENDIAN => Ok(()),
            0 => Err(LogError::BigEndian),
            other => Err(LogError::UnknownFeatures(other)),
        }
    }
}

fn fields(known: &[u8; BYTES_KNOWN]) -> Option<Header> {
    let mut fields = Fields::new(known);
    Some(Header {
        major_version: fields.u8()?,
        minor_version: fields.u8()?,
        hdr_size: fields.u16()?,
        indexid: fields.u32()?,
        file_seq: fields.u32()?,
        prev_file_seq: fields.u32()?,
        prev_file_offset: fields.u32()?,
        create_stamp: fields.u32()?,
        initial_modseq: fields.u64()?,
        compat_flags: fields.u8()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a log by Dovecot 2.3.19: index id 0x6b060a69, file 3 behind file 2 that ended at 1100.
    const BYTES: [u8; 40] = [
        1, 3, 40, 0, 0x69, 0x0a, 0x06, 0x6b, 3, 0, 0, 0, 2, 0, 0, 0, 0x4c, 4, 0, 0, 0x69, 0x0a, 0x06, 0x6b, 12, 0, 0,
        0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    ];

    fn with(changes: &[(usize, u8)]) -> Result<Header, LogError> {
        let mut bytes = BYTES;
        for (at, byte) in changes {
            bytes[*at] = *byte;
        }
        Header::parse(&bytes)
    }

    #[test]
    fn a_header_is_read() {
        let header = Header::parse(&BYTES).unwrap();
        assert_eq!((header.major_version, header.minor_version, header.hdr_size), (1, 3, 40));
        assert_eq!((header.indexid, header.file_seq), (0x6b06_0a69, 3));
        assert_eq!((header.prev_file_seq, header.prev_file_offset), (2, 1100));
        assert_eq!((header.create_stamp, header.initial_modseq, header.compat_flags), (0x6b06_0a69, 12, 1));
        assert!(!header.begins_anew());
    }

    #[test]
    fn logs_that_cannot_be_read_are_refused() {
        assert_eq!(with(&[(0, 2)]), Err(LogError::UnknownVersion(2)));
        assert_eq!(with(&[(32, 0)]), Err(LogError::BigEndian));
        assert_eq!(with(&[(2, 0), (3, 40), (32, 0)]), Err(LogError::BigEndian));
        assert_eq!(with(&[(32, 3)]), Err(LogError::UnknownFeatures(3)));
        assert_eq!(with(&[(2, 23)]), Err(LogError::HeaderTooSmall(23)));
        assert_eq!(with(&[(4, 0), (5, 0), (6, 0), (7, 0)]), Err(LogError::MarkedCorrupted));
        assert_eq!(Header::parse(&[]), Err(LogError::HeaderCut { length: 0, needed: 24 }));
        assert_eq!(Header::parse(&BYTES[..39]), Err(LogError::HeaderCut { length: 39, needed: 40 }));
    }

    #[test]
    fn fields_behind_a_short_header_are_zero() {
        let header = with(&[(1, 1), (2, 24)]).unwrap();
        assert_eq!((header.initial_modseq, header.compat_flags), (0, 0));
    }
}
