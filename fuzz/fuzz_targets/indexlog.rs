//! A whole log file, header included, of any bytes: no panic, no end to memory, and commits that tile what was read.

#![cfg_attr(fuzzing, no_main)]

use dovetail::indexlog::{fold, Commit, Commits, Header};

pub fn run(bytes: &[u8]) {
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
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(bytes));
