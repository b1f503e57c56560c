//! What an operation costs a mail process in instructions, which are the same on a busy machine. Needs valgrind.
//!
//! Of two sessions, a short and a long one, the difference by the operations that the long one has more. Under valgrind a
//! process is some fifty times slower, so each operation has a sending to the relay of its own, which many share otherwise, and
//! for which no client waits. So it is left out once.

use std::path::Path;
use std::time::Duration;

use crate::cluster::imap::{Appended, Imap};
use crate::cluster::{wait_until, Server, Setup};
use crate::report::{Report, Value};
use crate::variant::{mail, Variant};

const OPERATIONS: [&str; 3] = ["STORE", "APPEND", "LMTP"];
const SHORT: usize = 20;
const LONG: usize = 220;
const MAILS_FOR_STORE: usize = 50;
const DEADLINE: Duration = Duration::from_secs(60);

/// Where sending begins, see src/shim/capture.c.
const SENDING: &str = "capture_flush";
/// A string instruction counts as one for each byte.
const WITHOUT_STRING_INSTRUCTIONS: &str =
    "glibc.cpu.x86_rep_stosb_threshold=1000000000:glibc.cpu.x86_rep_movsb_threshold=1000000000";

pub fn measure(variant: Variant, report: &mut Report) {
    let cluster = variant.start_with(false, &under_valgrind);
    for operation in OPERATIONS {
        println!("{}: {operation}, instructions", variant.name());
        let [short, long] = [SHORT, LONG].map(|count| session(cluster.a(), operation, count));
        let each = |short: u64, long: u64| long.saturating_sub(short) as f64 / (LONG - SHORT) as f64;
        let (all, sending) = (each(short.all, long.all), each(short.sending, long.sending));
        report.add(&format!("instructions of {operation}"), "", variant, Value::exact(all.round()));
        let rest = Value::exact((all - sending).round());
        report.add(&format!("instructions of {operation}, without sending"), "", variant, rest);
    }
}

struct Count {
    all: u64,
    /// Of them.
    sending: u64,
}

/// The processes of `imap` and `lmtp` are counted.
fn under_valgrind(setup: Setup) -> Setup {
    if setup.name != "a" {
        return setup;
    }
    // The process is another user's when it ends.
    let script = |program: &str| {
        format!(
            "#!/bin/sh\nout={{DIR}}/home/count.$$\n: > $out\nchmod 666 $out\n\
             export GLIBC_TUNABLES={WITHOUT_STRING_INSTRUCTIONS}\n\
             exec valgrind -q --vgdb=no --tool=callgrind --callgrind-out-file=$out \
             /usr/lib/dovecot/{program} \"$@\"\n"
        )
    };
    let service = |program: &str| {
        let executable = format!("executable = {{DIR}}/bin/{program}");
        format!("service {program} {{\n  {executable}\n  service_count = 1\n  vsz_limit = 4G\n}}\n")
    };
    let services = service("imap") + &service("lmtp");
    setup.file("bin/imap", &script("imap")).file("bin/lmtp", &script("lmtp")).extra(&services, &services)
}

/// Instructions of a process with so many operations.
fn session(server: &Server, operation: &str, count: usize) -> Count {
    let user = format!("instructions-{}", operation.to_lowercase());
    if operation == "STORE" {
        fill(server, &user);
    }
    let service = if operation == "LMTP" { "lmtp" } else { "imap" };
    wait_until(DEADLINE, "earlier processes have ended", || server.pids(service).is_empty());
    let pid = match operation {
        "LMTP" => {
            let mut lmtp = server.lmtp();
            (0..count).for_each(|n| lmtp.deliver(&[&user], &mail(n)));
            server.pids(service)
        }
        "APPEND" => {
            let mut imap = server.imap(&user).select("INBOX");
            (0..count).for_each(|n| drop(imap.append("INBOX", &mail(n))));
            server.pids(service)
        }
        _ => {
            let mut imap = server.imap(&user).select("INBOX");
            for n in 0..count {
                let sign = if (n / MAILS_FOR_STORE) % 2 == 0 { '+' } else { '-' };
                imap.ok(&format!("STORE {} {sign}FLAGS (\\Flagged)", n % MAILS_FOR_STORE + 1));
            }
            server.pids(service)
        }
    };
    let mut counted = None;
    wait_until(DEADLINE, "valgrind has counted", || {
        counted = read_count(&server.outside(&format!("/home/count.{}", pid[0])));
        counted.is_some()
    });
    counted.expect("it has")
}

/// The user has mails enough, none of them flagged.
fn fill(server: &Server, user: &str) {
    let mut imap: Imap = server.imap(user).select("INBOX");
    if imap.uids().is_empty() {
        let mails: Vec<Vec<u8>> = (0..MAILS_FOR_STORE).map(mail).collect();
        let messages: Vec<_> = mails.iter().map(|mail| Appended { flags: "", date: "", mail }).collect();
        imap.append_all("INBOX", &messages);
        imap.ok("NOOP");
    }
    imap.ok("STORE 1:* -FLAGS (\\Flagged)");
}

/// None: it is not all written.
fn read_count(file: &Path) -> Option<Count> {
    let text = std::fs::read_to_string(file).ok()?;
    let all = text.lines().find_map(|line| line.strip_prefix("totals: ")?.parse().ok())?;
    let mut annotate = std::process::Command::new("callgrind_annotate");
    let output = annotate.args(["--inclusive=yes", "--auto=no", "--threshold=100"]).arg(file).output();
    let functions = String::from_utf8_lossy(&output.expect("valgrind's callgrind_annotate").stdout).into_owned();
    let line = functions.lines().find(|line| line.contains(&format!(":{SENDING} [")));
    let sending = line.and_then(|line| line.split_whitespace().next()?.replace(',', "").parse().ok());
    Some(Count { all, sending: sending.unwrap_or(0) })
}
