//! After an outage: how fast a peer that was away catches up, and how long a relay that was restarted looks at all users.

use std::time::{Duration, Instant};

use crate::cluster::server::signal;
use crate::cluster::{holds_within, Server};
use crate::processes::memory_kb;
use crate::report::{Report, Value};
use crate::variant::{mail, stored, Running, Variant};
use crate::Plan;

const CLIENTS: usize = 4;
const USERS: usize = 50;
const DEADLINE: Duration = Duration::from_secs(300);

pub fn measure(variant: Variant, cluster: &Running, plan: &Plan, report: &mut Report) {
    let users: Vec<String> = (0..USERS).map(|n| format!("outage-{n}")).collect();
    println!("{}: {} mails while b is away, then {} users swept", variant.name(), plan.outage_mails, plan.sweep_users);
    deliver(cluster.a(), &users, USERS, &mail);
    let has_all = |count: usize| users.iter().map(|user| stored(cluster.b(), user)).sum::<usize>() == count;
    assert!(holds_within(DEADLINE, || has_all(USERS)), "the first mails never reached b");

    cluster.b().stop();
    let local = deliver(cluster.a(), &users, plan.outage_mails, &mail);
    let rate = |time: Duration| plan.outage_mails as f64 / time.as_secs_f64();
    report.add("local delivery, 4 LMTP clients, b away", "mails/s", variant, Value::exact(rate(local)));
    cluster.b().start();
    let start = Instant::now();
    let caught_up = holds_within(DEADLINE, || has_all(USERS + plan.outage_mails));
    let took = start.elapsed();
    report.add("catch-up after the outage", "mails/s", variant, Value::exact(if caught_up { rate(took) } else { 0.0 }));
    let ratio = took.as_secs_f64() / local.as_secs_f64();
    report.add("  its time over the delivery's", "", variant, Value::exact(ratio));

    cluster.b().stop();
    let changes_before = changes(cluster.a());
    flag(cluster.a(), &users);
    cluster.b().start();
    let start = Instant::now();
    let caught_up = holds_within(DEADLINE, || cluster.a().has_nothing_pending());
    let rate = (changes(cluster.a()) - changes_before) as f64 / start.elapsed().as_secs_f64();
    let value = Value::exact(if caught_up { rate } else { 0.0 });
    report.add("catch-up with flags, one message each", "changes/s", variant, value);

    let many: Vec<String> = (0..plan.sweep_users).map(|n| format!("sweep-{n}")).collect();
    deliver(cluster.a(), &many, many.len(), &mail);
    assert!(holds_within(DEADLINE, || cluster.a().has_nothing_pending()), "b never had the swept users' mails");
    let old = cluster.a().pids("dovetail");
    old.iter().for_each(|pid| signal(*pid, "KILL"));
    assert!(holds_within(DEADLINE, || cluster.a().pids("dovetail").iter().any(|pid| !old.contains(pid))));
    let start = Instant::now();
    let swept = holds_within(DEADLINE, || cluster.a().has_looked());
    let value = if swept { Value::exact(start.elapsed().as_secs_f64()) } else { Value::more_than(300.0) };
    report.add(&format!("a restarted relay has looked at {} users", many.len()), "s", variant, value);
    let rss: u64 = cluster.a().pids("dovetail").iter().map(|pid| memory_kb(*pid).1).sum();
    report.add("  its RSS then", "MB", variant, Value::exact(rss as f64 / 1024.0));
}

/// How many changes the server's processes have told of.
fn changes(server: &Server) -> u64 {
    server.try_status().and_then(|status| status.counters).map_or(0, |counters| counters.changes)
}

/// Flags each message of the users' INBOXes by a command of its own, by four clients.
fn flag(server: &Server, users: &[String]) {
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                for user in users.iter().skip(client).step_by(CLIENTS) {
                    let mut imap = server.imap(user).select("INBOX");
                    for number in 1..=stored(server, user) {
                        imap.ok(&format!("STORE {number} +FLAGS.SILENT (\\Flagged)"));
                    }
                }
            });
        }
    });
}

/// `count` mails to the users in turn, by four clients; how long it took.
pub fn deliver(server: &Server, users: &[String], count: usize, mail: &(impl Fn(usize) -> Vec<u8> + Sync)) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut lmtp = server.lmtp();
                for number in (client..count).step_by(CLIENTS) {
                    lmtp.deliver(&[&users[number % users.len()]], &mail(number));
                }
            });
        }
    });
    start.elapsed()
}
