//! What must hold after a crash, whichever it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dovetail::journal::Journal;

use crate::workload::{self, How, State};

/// By their names.
pub type Files = BTreeMap<String, Vec<u8>>;

pub type Workload = fn(&Path, &mut dyn FnMut(&Journal, How));

/// A folder that goes when the test ends, with one for the journal in it; in memory if the machine has one there.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let shm = PathBuf::from("/dev/shm");
        let base = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let folder = Folder(base.join(format!("dovetail-journal-{name}-{}", std::process::id())));
        folder.empty();
        folder
    }

    pub fn journal(&self) -> PathBuf {
        self.0.join("journal")
    }

    pub fn empty(&self) {
        let _ = std::fs::remove_dir_all(&self.0);
        std::fs::create_dir_all(self.journal()).unwrap();
    }

    /// The journal's files but the index of the write-ahead log, which is mapped into memory and made anew. As each file is
    /// closed, its locks are given back; no other process wants them.
    pub fn files(&self) -> Files {
        let names = std::fs::read_dir(self.journal()).unwrap().map(|entry| entry.unwrap().file_name());
        let names = names.map(|name| name.into_string().unwrap()).filter(|name| !name.ends_with("-shm"));
        names.map(|name| (name.clone(), std::fs::read(self.journal().join(name)).unwrap())).collect()
    }

    /// Puts the files there, as a crash left them.
    pub fn put(&self, files: &Files) {
        self.empty();
        for (name, bytes) in files {
            std::fs::write(self.journal().join(name), bytes).unwrap();
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a workload has committed when it is interrupted.
pub struct Crash<'a> {
    /// For people.
    pub what: String,
    /// What is in the journal after each commit of the workload.
    pub states: &'a [State],
    /// Of these, so many commits have returned.
    pub said: usize,
    /// So many must not be lost.
    pub kept: usize,
    /// With another boot, the power has failed.
    pub boot: Option<&'static str>,
}

impl Crash<'_> {
    /// The journal opens, and is as it was after one of the commits that may be the last one; and it can be used.
    pub fn check(&self, folder: &Path) {
        let Crash { what, states, said, kept, boot } = self;
        let last = (*said).min(states.len() - 1);
        // As the relay would that was under way, perhaps with opening it.
        let next = states[last].how;
        let how = How { boot: boot.unwrap_or(next.boot), ..next };
        let reopen = || workload::open(folder, how).unwrap_or_else(|error| panic!("{what}: {error}"));
        let (journal, start) = reopen();
        let found = State::of(&journal, folder, how);
        let is_same = |state: &State| match boot {
            Some(_) => state.how.peers == how.peers && state.rows == found.rows,
            None => *state == found,
        };
        let may_be = &states[kept.saturating_sub(1)..=last];
        if !may_be.iter().any(is_same) {
            let unlike: Vec<String> = may_be.iter().map(|state| state.unlike(&found)).collect();
            panic!("{what}: after {said} commits there is none of {}\n{}", may_be.len(), unlike.join("\n"));
        }
        assert!(*kept == 0 || !start.is_new, "{what}");
        let told = said.checked_sub(1).map_or(0, |last| states[last].seq);
        assert!(found.seq >= told, "{what}: the peers know number {told}, and {} would be given away", found.seq + 1);
        assert_eq!(strangers(folder), [""; 0], "{what}");
        drop(journal);

        let (mut journal, _) = reopen();
        assert_eq!(State::of(&journal, folder, how), found, "{what}: it is another one when it is opened once more");
        assert_eq!(journal.next_seq().unwrap(), found.seq + 1, "{what}");
        journal.append("jane", 1, b"goes on", how.peers).unwrap();
        journal.commit().unwrap();
    }
}

/// Files that should not be beside an open journal.
fn strangers(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let ours = ["journal.lock", "journal.lock-journal", "journal.sqlite", "journal.sqlite-shm", "journal.sqlite-wal"];
    names.filter(|name| !ours.contains(&name.as_str())).collect()
}

/// What is in the journal after each commit of the workload.
pub fn states_after(workload: Workload, folder: &Folder) -> Vec<State> {
    let mut states = Vec::new();
    workload(&folder.journal(), &mut |journal, how| states.push(State::of(journal, &folder.journal(), how)));
    states
}
