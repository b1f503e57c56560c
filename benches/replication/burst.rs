//! Many users, one mail each, all at once: how long until the peer has all, and what it takes there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::Server;
use crate::processes::{memory_kb, Processes};
use crate::report::{Report, Value};
use crate::variant::{mail, Running, Variant};
use crate::Plan;

const CLIENTS: usize = 8;
const DEADLINE: Duration = Duration::from_secs(60);

/// The first mail of each user makes his INBOX; the second finds it.
const ROUNDS: [(usize, &str); 2] = [(1, "first mail"), (2, "next mail")];

pub fn measure(variant: Variant, cluster: &Running, plan: &Plan, report: &mut Report) {
    let users: Vec<String> = (0..plan.burst_users).map(|n| format!("burst-{n}")).collect();
    for (round, what) in ROUNDS {
        println!("{}: {} users at once, {what}", variant.name(), users.len());
        let ended = AtomicBool::new(false);
        let (last_ok, all_there, peak) = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| Peak::watch(cluster.b(), variant, &ended));
            let watcher = scope.spawn(|| wait_for_files(cluster.b(), &users, round));
            let last_ok = deliver(cluster.a(), &users);
            let all_there = watcher.join().expect("the watcher");
            ended.store(true, Ordering::Relaxed);
            (last_ok, all_there, sampler.join().expect("the sampler"))
        });
        let after = match all_there {
            Ok(at) => Value::exact(at.saturating_duration_since(last_ok).as_secs_f64()),
            Err(missing) => {
                report.note(format!("{}: burst, {what}: {missing} users' mails never came", variant.name()));
                Value::more_than(DEADLINE.as_secs_f64())
            }
        };
        report.add(&format!("{} users at once, {what}: b has all after", users.len()), "s", variant, after);
        report.add(&format!("  processes on b, {what}"), "", variant, Value::exact(peak.processes as f64));
        report.add(&format!("  their PSS, {what}"), "MB", variant, Value::exact(peak.pss_kb as f64 / 1024.0));
        report.add(&format!("  their RSS, {what}"), "MB", variant, Value::exact(peak.rss_kb as f64 / 1024.0));
        if all_there.is_ok() {
            check_by_imap(cluster.b(), &users, round);
        }
    }
}

/// Returns the time of the last OK.
fn deliver(server: &Server, users: &[String]) -> Instant {
    std::thread::scope(|scope| {
        let clients: Vec<_> = users
            .chunks(users.len().div_ceil(CLIENTS))
            .map(|users| {
                scope.spawn(move || {
                    let mut lmtp = server.lmtp();
                    for (number, user) in users.iter().enumerate() {
                        lmtp.deliver(&[user], &mail(number));
                    }
                    Instant::now()
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("an LMTP client")).max().expect("there are clients")
    })
}

/// Time at which every user had the mail, or how many never had. 500 polling IMAP clients would measure themselves; the mail's
/// file gets its name right before the index entry. `check_by_imap` makes sure afterwards.
fn wait_for_files(server: &Server, users: &[String], uid: usize) -> Result<Instant, usize> {
    let mut missing: Vec<_> = users
        .iter()
        .map(|user| server.outside(&format!("/home/{user}/sdbox/mailboxes/INBOX/dbox-Mails/u.{uid}")))
        .collect();
    let end = Instant::now() + DEADLINE;
    loop {
        missing.retain(|path| !path.exists());
        let now = Instant::now();
        if missing.is_empty() {
            return Ok(now);
        }
        if now > end {
            return Err(missing.len());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn check_by_imap(server: &Server, users: &[String], count: usize) {
    for user in users {
        let exists = server.imap(user).ok("SELECT INBOX").exists();
        assert_eq!(exists, Some(count as u32), "mails of {user} on {}", server.name());
    }
}

/// The most that the replication's processes took at one time.
#[derive(Default)]
struct Peak {
    processes: usize,
    pss_kb: u64,
    rss_kb: u64,
}

impl Peak {
    fn watch(server: &Server, variant: Variant, ended: &AtomicBool) -> Peak {
        let mut processes = Processes::of(server, variant);
        let mut peak = Peak::default();
        while !ended.load(Ordering::Relaxed) {
            let pids = processes.list();
            let memory = pids.iter().map(|pid| memory_kb(*pid));
            let (pss_kb, rss_kb) = memory.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            peak.processes = peak.processes.max(pids.len());
            peak.pss_kb = peak.pss_kb.max(pss_kb);
            peak.rss_kb = peak.rss_kb.max(rss_kb);
            std::thread::sleep(Duration::from_millis(50));
        }
        peak
    }
}
