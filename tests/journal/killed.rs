//! A process of its own is killed at each of its calls that change files.

use std::fs::File;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::crash::{states_after, Crash, Files, Folder, Workload};
use crate::{syscalls, workload};

/// For the process that is killed: the workload, at which call, and the folder.
const CHILD: &str = "DOVETAIL_TEST_KILLED";

/// No test of its own: the process that the others start, and that is killed.
#[test]
fn child() {
    let Ok(text) = std::env::var(CHILD) else { return };
    let mut parts = text.splitn(3, ' ');
    let (name, at) = (parts.next().unwrap(), parts.next().unwrap().parse().unwrap());
    // It is its parent's.
    let folder = ManuallyDrop::new(Folder(parts.next().unwrap().into()));
    match name {
        "everything" | "recovery" => {
            die_at(&folder.journal(), at);
            let workload = if name == "recovery" { workload::recovery } else { workload::everything };
            workload(&folder.journal(), &mut |_, _| say(&folder));
        }
        "thread" => {
            let mut is_first = true;
            workload::thread(&folder.journal(), &mut |_, _| {
                say(&folder);
                if std::mem::take(&mut is_first) {
                    die_at(&folder.journal(), at);
                }
            });
        }
        _ => panic!("what is {name}?"),
    }
}

/// A file with a byte for each commit that has returned.
fn said(folder: &Folder) -> PathBuf {
    folder.0.join("said")
}

fn say(folder: &Folder) {
    let mut file = File::options().append(true).create(true).open(said(folder)).unwrap();
    file.write_all(b".").unwrap();
}

/// Ends this process in front of that call of those to come.
fn die_at(folder: &Path, at: usize) {
    let mut calls = 0;
    syscalls::watch(folder, move |call| {
        calls += 1;
        if calls == at {
            eprintln!("{call}");
            // SAFETY: it takes numbers only.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    });
}

/// Kills a process at each call of the workload, which finds these files. How many calls there are.
fn kill_at_each_call(name: &str, workload: Workload, files: &Files) -> usize {
    let folder = Folder::new(name);
    folder.put(files);
    let states = states_after(workload, &folder);
    for at in 1.. {
        folder.put(files);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::child", "--nocapture"])
            .env(CHILD, format!("{name} {at} {}", folder.0.display()))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return at - 1;
        }
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{text}");
        let commits = std::fs::read(said(&folder)).unwrap_or_default().len();
        let what = format!("killed at call {at} ({})", text.trim_end().lines().last().unwrap_or_default());
        Crash { what, states: &states, said: commits, kept: commits, boot: None }.check(&folder.journal());
    }
    unreachable!()
}

#[test]
fn a_process_that_is_killed_at_any_write_leaves_what_it_has_committed() {
    let calls = kill_at_each_call("everything", workload::everything, &Files::new());
    assert!(calls > 400, "{calls}");
}

#[test]
fn a_process_that_is_killed_at_any_write_of_a_checkpoint_leaves_what_it_has_committed() {
    let calls = kill_at_each_call("thread", workload::thread, &Files::new());
    assert!(calls > 50, "{calls}");
}

#[test]
fn a_process_that_is_killed_while_it_recovers_leaves_what_the_one_before_it_has_committed() {
    let folder = Folder::new("unclosed");
    let mut longest = Files::new();
    let length = |files: &Files| files.get("journal.sqlite-wal").map_or(0, Vec::len);
    workload::everything(&folder.journal(), &mut |_, _| {
        longest = std::cmp::max_by_key(std::mem::take(&mut longest), folder.files(), length);
    });
    assert!(length(&longest) > 100_000);
    let calls = kill_at_each_call("recovery", workload::recovery, &longest);
    assert!(calls > 50, "{calls}");
}
