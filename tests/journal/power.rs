//! What a workload does to its files is recorded, and some of what was not synced is lost.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crate::chance::Chance;
use crate::crash::{states_after, Crash, Files, Folder, Workload};
use crate::disk::{Disk, Loss};
use crate::syscalls::{self, Call};
use crate::workload::{self, hash};

enum Event {
    Call(Call),
    /// A commit has returned; the files as they are then.
    Said(Files),
}

/// Runs the workload once and notes what it does.
fn record(workload: Workload, folder: &Folder) -> Vec<Event> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let for_calls = events.clone();
    folder.empty();
    syscalls::watch(&folder.journal(), move |call| for_calls.lock().unwrap().push(Event::Call(call)));
    workload(&folder.journal(), &mut |_, _| events.lock().unwrap().push(Event::Said(folder.files())));
    syscalls::unwatch();
    let mut events = events.lock().unwrap();
    std::mem::take(&mut *events)
}

#[test]
fn a_power_failure_at_any_write_leaves_a_prefix_and_no_number_is_given_twice() {
    let folder = Folder::new("power");
    let states = states_after(workload::everything, &folder);
    let events = record(workload::everything, &folder);
    let mut disk = Disk::new();
    let (mut said, mut kept) = (0, 0);
    let mut checked = HashSet::new();
    for (number, event) in events.iter().enumerate() {
        let call = match event {
            Event::Call(call) => call,
            Event::Said(files) => {
                assert!(disk.now() == *files, "a call was not seen");
                said += 1;
                continue;
            }
        };
        disk.apply(call);
        // A commit does not wait for that, but there are checkpoints.
        if matches!(call, Call::Sync(name) if name == "journal.sqlite-wal") {
            kept = said;
        }
        for loss in [Loss::All, Loss::SomeFiles, Loss::SomeSectors] {
            let files = disk.after(loss, &mut Chance::new(number as u64, loss as u64));
            if checked.insert(hash(&(&files, said))) {
                folder.put(&files);
                let what = format!("the power failed behind call {number} ({call}, {loss:?})");
                Crash { what, states: &states, said, kept, boot: Some("later") }.check(&folder.journal());
            }
        }
    }
    assert!(checked.len() > 400, "{}", checked.len());
}

/// It is all that the disk has since.
#[test]
fn a_power_failure_behind_the_first_commit_since_the_journal_was_closed_is_noticed() {
    let folder = Folder::new("power-closed");
    let events = record(workload::closed, &folder);
    let last_said = events.iter().rposition(|event| matches!(event, Event::Said(_))).unwrap();
    let mut disk = Disk::new();
    for event in &events[..last_said] {
        if let Event::Call(call) = event {
            disk.apply(call);
        }
    }
    folder.put(&disk.after(Loss::All, &mut Chance::new(1, Loss::All as u64)));
    let (journal, _) = workload::open(&folder.journal(), workload::NEXT_BOOT).unwrap();
    let listed = journal.failed(9).unwrap();
    assert_eq!(listed.iter().map(|entry| entry.user.as_str()).collect::<Vec<_>>(), ["jane"; 3], "with each peer");
}
