//! A whole log file, header included, of any bytes: no panic, no end to memory, and commits that tile what was read.
//!
//! After `cargo install cargo-fuzz`, with the golden logs to begin with (what is found is added to the first folder, which
//! is not checked in):
//!
//!     mkdir -p fuzz/corpus/indexlog
//!     RUSTC_BOOTSTRAP=1 cargo fuzz run indexlog fuzz/corpus/indexlog tests/golden/indexlog -- -max_total_time=60

#![no_main]

use dovetail::indexlog::{fold, Commit, Commits, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(bytes) else { return };
    let begin = usize::from(header.hdr_size);
    let Some(records) = bytes.get(begin..) else { return };
    let mut iterator = Commits::new(&header, records, begin as u64);
    let (mut commits, mut end) = (Vec::<Commit>::new(), begin as u64);
    while let Some(Ok(commit)) = iterator.next() {
        assert!(commit.begin == end && commit.end > end);
        end = commit.end;
        commits.push(commit);
    }
    assert_eq!(iterator.end(), end);
    assert!(end <= bytes.len() as u64);
    assert!(iterator.next().is_none());
    fold(&commits, |commit| commit.begin % 16 == 0);
});
