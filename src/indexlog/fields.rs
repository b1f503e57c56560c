//! Little-endian fields read one after the other from the front of some bytes.
//!
//! Guarantees that a read either gives the whole field or `None` and takes nothing. It must not know what the fields mean.

/// Bytes not read yet, and how many were before them: some contents are padded to a multiple of four from their begin.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    rest: &'a [u8],
    taken: usize,
}

impl<'a> Fields<'a> {
    pub fn new(bytes: &'a [u8]) -> Fields<'a> {
        Fields { rest: bytes, taken: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        self.taken += length;
        Some(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Skips what is missing to a multiple of four. The last padding may be missing altogether.
    pub fn align(&mut self) {
        let padding = self.taken.next_multiple_of(4) - self.taken;
        let _ = self.bytes(padding.min(self.rest.len()));
    }
}
