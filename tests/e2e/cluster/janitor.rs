//! Cleans up after a cluster, however its owner ends.
//!
//! A small shell process in a process group of its own holds the list of the Dovecot masters and the cluster's folders.
//! It acts when its standard input closes: at the owner's drop, and just the same when the owner was killed.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;

const SCRIPT: &str = r#"
masters=
while read -r verb pid; do
    case $verb in
    add) masters="$masters $pid" ;;
    remove)
        rest=
        for master in $masters; do [ "$master" = "$pid" ] || rest="$rest $master"; done
        masters=$rest ;;
    esac
done
running() {
    # A zombie has no executable any more.
    for master in $masters; do [ -e "/proc/$master/exe" ] && return 0; done
    return 1
}
for signal in TERM KILL; do
    running || break
    for master in $masters; do kill -$signal "$master" 2>/dev/null; done
    tries=0
    while running && [ $tries -lt 100 ]; do sleep 0.05; tries=$((tries + 1)); done
done
# What a test mounted.
for folder; do
    awk -v below="$folder/" 'index($2, below) == 1 { print $2 }' /proc/mounts | while read -r mount; do
        umount -l "$mount" 2>/dev/null
    done
done
# Processes that outlived their master for a moment may still write.
tries=0
while ! rm -rf "$@" 2>/dev/null && [ $tries -lt 100 ]; do sleep 0.05; tries=$((tries + 1)); done
"#;

pub struct Janitor {
    process: Child,
    input: Mutex<Option<ChildStdin>>,
}

impl Janitor {
    pub fn watch(folders: &[PathBuf]) -> Janitor {
        use std::os::unix::process::CommandExt;
        let mut process = Command::new("sh")
            .args(["-c", SCRIPT, "dovetail-janitor"])
            .args(folders)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh");
        let input = process.stdin.take();
        Janitor { process, input: Mutex::new(input) }
    }

    pub fn add_master(&self, pid: u32) {
        self.tell("add", pid);
    }

    pub fn remove_master(&self, pid: u32) {
        self.tell("remove", pid);
    }

    fn tell(&self, verb: &str, pid: u32) {
        let mut input = self.input.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(input) = input.as_mut() {
            writeln!(input, "{verb} {pid}").expect("the janitor reads");
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.input.lock().unwrap_or_else(|e| e.into_inner()).take();
        let _ = self.process.wait();
    }
}
