//! A journal whose files were changed anywhere, cut, or replaced: it opens or is refused, and what is read of it is what was
//! written or an error; never a panic.

#![cfg_attr(fuzzing, no_main)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use dovetail::journal::{Journal, JournalError, Lock, Options};

const CHANGES: u64 = 40;
const PEERS: [&str; 2] = ["b", "c"];

/// Where it lies, and its files: (name, bytes), as they were while it was open.
struct Base(PathBuf, Vec<(String, Vec<u8>)>);

fn open(folder: &Path) -> Result<Journal, JournalError> {
    let peers = PEERS.map(str::to_owned);
    let options = Options { folder, server: "a", peers: &peers, boot: "boot", now_us: 77 };
    let lock = Lock::try_take(folder).expect("a lock").expect("nobody else has it");
    Journal::open(&options, lock).map(|(journal, _)| journal)
}

fn frame(seq: u64) -> Vec<u8> {
    vec![seq as u8; 100 + seq as usize * 40]
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("dovetail-fuzz-journal-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut journal = open(&folder).expect("a new journal");
        for seq in 1..=CHANGES {
            journal.next_seq().expect("a number");
            journal.append(&format!("user-{}", seq % 5), seq, &frame(seq), &PEERS).expect("an append");
            if seq % 3 == 0 {
                journal.acknowledge("b", seq).expect("an acknowledgement");
            }
            if seq % 10 == 0 {
                journal.commit().expect("a commit");
            }
        }
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&folder).expect("the folder").flatten() {
            let name = entry.file_name().into_string().expect("a name");
            if !name.contains("lock") && !name.ends_with("-shm") {
                files.push((name, std::fs::read(entry.path()).expect("its bytes")));
            }
        }
        files.sort();
        Base(folder, files)
    })
}

pub fn run(bytes: &[u8]) {
    let Base(folder, files) = base();
    let Some((choice, changes)) = bytes.split_first() else { return };
    for entry in std::fs::read_dir(folder).expect("the folder").flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
    for (number, (name, content)) in files.iter().enumerate() {
        let mut content = content.clone();
        if usize::from(*choice) % files.len() == number {
            match choice >> 6 {
                // Some bytes of it are others.
                0 | 1 => {
                    for change in changes.chunks_exact(4) {
                        let at = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize % content.len();
                        content[at] = change[3];
                    }
                }
                2 => content.truncate(changes.iter().fold(0, |at, byte| at << 8 | usize::from(*byte)) % content.len()),
                _ => content = changes.to_vec(),
            }
        }
        std::fs::write(folder.join(name), content).expect("a file");
    }
    let Ok(journal) = open(folder) else { return };
    for peer in PEERS {
        let _ = journal.pending(peer);
        let _ = journal.first_pending(peer);
        for stored in journal.unacknowledged(peer, None, 0, usize::MAX).unwrap_or_default() {
            // What has a checksum is what was written.
            assert_eq!(stored.frame, frame(stored.seq));
        }
    }
    let _ = journal.users("", 100).map(|users| users.iter().for_each(|user| drop(journal.logs(user))));
    let _ = journal.failed(100);
    let _ = journal.aliases();
    let _ = journal.clock();
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(bytes));
