//! Whether some message of the open mailbox has a GUID, for many GUIDs: a look at every message for each would take a time that grows
//! with the square of their number. Pure, but for whom it asks.
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::storage::{Result, Storage};

/// Hashes of the GUIDs of all messages that are, or were, in the mailbox: of a large one, the GUIDs would fill the memory.
#[derive(Default)]
pub struct Guids {
    hashes: HashSet<u64>,
    /// Those below are in it.
    next_uid: u32,
    is_complete: bool,
}

impl Guids {
    /// There may be messages since that are not in it.
    pub fn expire(&mut self) {
        self.is_complete = false;
    }

    /// False: none has it. True: perhaps one has.
    pub fn may_have<S: Storage>(&mut self, storage: &mut S, guid: &str) -> Result<bool> {
        if !self.is_complete {
            let (hashes, next_uid) = (&mut self.hashes, &mut self.next_uid);
            storage.guids(*next_uid, &mut |uid, guid| {
                hashes.insert(hash(guid));
                *next_uid = uid.saturating_add(1);
            })?;
            self.is_complete = true;
        }
        Ok(self.hashes.contains(&hash(guid)))
    }
}

pub fn hash(guid: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    guid.hash(&mut hasher);
    hasher.finish()
}
