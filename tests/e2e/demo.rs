//! `make demo`, as people run and end it: nothing is left behind when the prompt is back.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use crate::cluster::wait_until;

/// It builds itself, if need be, and starts two Dovecots.
const DEADLINE: Duration = Duration::from_secs(240);

/// `make demo` in a process group of its own, as a shell starts it.
struct Demo {
    make: Child,
    lines: Receiver<String>,
    heard: String,
}

impl Demo {
    fn start(arguments: &[&str]) -> Demo {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let stage = std::env::var_os("DOVETAIL_TEST_STAGE").map_or(root.join("target/stage"), PathBuf::from);
        let mut make = Command::new("make");
        // Other tests use the stage.
        make.args(["-o", "stage", "demo"]).arg(format!("STAGE={}", stage.display())).args(arguments);
        make.current_dir(root).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        // SAFETY: signal() may be called between fork and exec. Who started the tests may have had them ignore it.
        unsafe {
            make.pre_exec(|| {
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                Ok(())
            });
        }
        let mut make = make.spawn().expect("make");
        let stdout = make.stdout.take().expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Demo { make, lines, heard: String::new() }
    }

    fn wait_for(&mut self, text: &str) {
        let until = Instant::now() + DEADLINE;
        loop {
            let patience = until.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(patience);
            let line = line.unwrap_or_else(|_| panic!("the demo does not say {text:?}:\n{}", self.heard));
            self.heard += &format!("{line}\n");
            if line.contains(text) {
                return;
            }
        }
    }

    /// How the names of all of its folders begin.
    fn folder(&self) -> String {
        let group = self.make.id();
        let is_demo = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(" (demo) ") && stat.split(' ').nth(4) == Some(&group.to_string())
        };
        let pid = processes().find(is_demo).expect("the demo runs");
        format!("dovetail-{pid}-")
    }

    /// Ctrl-C: the terminal signals the whole group.
    fn interrupt(&self) {
        signal_group(self.make.id(), libc::SIGINT);
    }

    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until(DEADLINE, "make has ended", || {
            status = self.make.try_wait().expect("a child");
            status.is_some()
        });
        status.expect("just waited for")
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // After a failure. What it started is ended by its janitor.
        if matches!(self.make.try_wait(), Ok(None)) {
            signal_group(self.make.id(), libc::SIGKILL);
            let _ = self.make.wait();
        }
    }
}

fn signal_group(group: u32, number: i32) {
    // SAFETY: takes numbers only.
    unsafe { libc::kill(-(group as libc::pid_t), number) };
}

fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Folders, and processes that were started with one of them or that have it mounted. The tests' own process has what is
/// mounted for all.
fn left(folder: &str) -> Vec<String> {
    let folders = fs::read_dir("/tmp").expect("/tmp").flatten().map(|entry| entry.path().display().to_string());
    let mut left: Vec<String> = folders.filter(|path| path.starts_with(&format!("/tmp/{folder}"))).collect();
    for pid in processes() {
        let has = |file: &str| {
            let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            text.windows(folder.len()).any(|part| part == folder.as_bytes())
        };
        if has("cmdline") || has("mountinfo") {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            left.push(format!("process {pid} {}", name.trim()));
        }
    }
    left
}

#[test]
fn a_demo_that_is_ended_by_ctrl_c_leaves_nothing_behind() {
    let mut demo = Demo::start(&[]);
    demo.wait_for("Ctrl-C ends both");
    let folder = demo.folder();
    let found = left(&folder);
    for name in ["dovecot", "dovetail", "sh", &folder] {
        assert!(found.iter().any(|what| what.contains(name)), "no {name} in {found:?}");
    }
    demo.interrupt();
    let status = demo.wait();
    assert_eq!(left(&folder), Vec::<String>::new());
    assert!(!status.success());
}

#[test]
fn a_demo_that_ends_by_itself_leaves_nothing_behind() {
    let mut demo = Demo::start(&["ONCE=1"]);
    demo.wait_for("Starting two Dovecots");
    let folder = demo.folder();
    demo.wait_for("Both directions work.");
    let status = demo.wait();
    assert_eq!(left(&folder), Vec::<String>::new());
    assert!(status.success(), "{status}, signal {:?}:\n{}", status.signal(), demo.heard);
}

/// Its servers are being started.
#[test]
fn a_demo_of_both_directions_that_is_ended_by_ctrl_c_leaves_nothing_behind() {
    let mut demo = Demo::start(&["ONCE=1"]);
    demo.wait_for("Starting two Dovecots");
    let folder = demo.folder();
    wait_until(DEADLINE, "a Dovecot was started", || left(&folder).iter().any(|what| what.contains("dovecot")));
    demo.interrupt();
    let status = demo.wait();
    assert_eq!(left(&folder), Vec::<String>::new());
    assert!(!status.success());
}
