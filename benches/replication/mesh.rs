//! Several servers that are written to: how long two need to become the same after they were cut from each other, and what five take
//! beside two.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::cluster::{holds_within, Cluster, Server, Setup};
use crate::lag;
use crate::load::Pace;
use crate::outage::deliver;
use crate::processes::{cpu_ms, Processes};
use crate::report::{Report, Value};
use crate::variant::{mail, stored, Variant};
use crate::Plan;

const VARIANT: Variant = Variant::Dovetail;
const DEADLINE: Duration = Duration::from_secs(300);
/// Who get the mail in turn.
const USERS: usize = 20;
/// On each server.
const MAILS_PER_SEC: f64 = 40.0;
const FLAGS_PER_SEC: f64 = 10.0;

/// Both accept mail for the same users, and flag the same message, while the lines between them hang.
pub fn measure_partition(plan: &Plan, report: &mut Report) {
    let secs = plan.partition_secs;
    println!(
        "partition: {secs} s with {MAILS_PER_SEC} mails and {FLAGS_PER_SEC} flags per second on each of two servers"
    );
    let running = VARIANT.start_with(false, &Setup::over_a_line);
    let users: Vec<String> = (0..USERS).map(|n| format!("partition-{n}")).collect();
    deliver(running.a(), &users, USERS, &mail);
    let count = |server: &Server| users.iter().map(|user| stored(server, user)).sum::<usize>();
    let is_settled = || running.servers().iter().all(Server::has_nothing_pending);
    assert!(holds_within(DEADLINE, || count(running.b()) == USERS && is_settled()), "the first mails never reached b");

    running.lines.iter().for_each(|line| line.hang(true));
    let written = std::thread::scope(|scope| {
        let sides: Vec<_> =
            running.servers().iter().map(|server| scope.spawn(|| write(server, &users, f64::from(secs)))).collect();
        sides.into_iter().map(|side| side.join().expect("a side's writer")).sum::<usize>()
    });
    running.lines.iter().for_each(|line| line.hang(false));
    let start = Instant::now();
    let all = USERS + written;
    let has_all = || running.servers().iter().all(|server| count(server) == all);
    let merged = holds_within(DEADLINE, || has_all() && is_settled());
    let took = start.elapsed();
    report.add("partition: mails saved during it", "", VARIANT, Value::exact(written as f64));
    let value = if merged { Value::exact(took.as_secs_f64()) } else { Value::more_than(DEADLINE.as_secs_f64()) };
    report.add(&format!("  both the same after {secs} s of it"), "s", VARIANT, value);
    users.iter().for_each(|user| drop(running.converged(user)));
}

/// Mails and flags at their rates for so long; how many mails.
fn write(server: &Server, users: &[String], secs: f64) -> usize {
    let times = |rate: f64| (rate * secs) as usize;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut pace = Pace::per_sec(FLAGS_PER_SEC);
            for number in 0..times(FLAGS_PER_SEC) {
                pace.wait();
                let sign = if number / users.len() % 2 == 0 { '+' } else { '-' };
                let user = &users[number % users.len()];
                server.imap(user).select("INBOX").ok(&format!("STORE 1 {sign}FLAGS.SILENT (\\Flagged)"));
            }
        });
        let mut lmtp = server.lmtp();
        let mut pace = Pace::per_sec(MAILS_PER_SEC);
        for number in 0..times(MAILS_PER_SEC) {
            pace.wait();
            lmtp.deliver(&[&users[number % users.len()]], &mail(number));
        }
    });
    times(MAILS_PER_SEC)
}

/// The same mails to the first of two servers, and of five.
pub fn measure_mesh(plan: &Plan, report: &mut Report) {
    for names in [&["a", "b"][..], &["a", "b", "c", "d", "e"]] {
        let count = names.len();
        println!("mesh: {} mails to one of {count} servers", plan.mesh_mails);
        let running = VARIANT.start_all(names);
        let circumstances = format!("the last of {count} servers");
        lag::measure_lmtp(VARIANT, &running, plan, &circumstances, report);

        let users: Vec<String> = (0..USERS).map(|n| format!("mesh-{n}")).collect();
        let before = spent(&running);
        let mut lmtp = running.a().lmtp();
        let mut pace = Pace::per_sec(MAILS_PER_SEC);
        for number in 0..plan.mesh_mails {
            pace.wait();
            lmtp.deliver(&[&users[number % users.len()]], &mail(number));
        }
        let has_all = |server: &Server| {
            users.iter().map(|user| stored(server, user)).sum::<usize>() == plan.mesh_mails
                && server.has_nothing_pending()
        };
        assert!(holds_within(DEADLINE, || running.servers().iter().all(has_all)), "the mails never reached all");
        let after = spent(&running);
        let per_mail = |server: &str| (after[server] - before[server]) / plan.mesh_mails as f64;
        let (first, last) = (names[0], names[count - 1]);
        report.add(
            &format!("CPU per mail, the first of {count} servers"),
            "ms",
            VARIANT,
            Value::exact(per_mail(first)),
        );
        report.add(&format!("CPU per mail, {circumstances}"), "ms", VARIANT, Value::exact(per_mail(last)));
    }
}

/// CPU time in ms of each server's relay and workers that run now.
fn spent(cluster: &Cluster) -> HashMap<String, f64> {
    let of = |server: &Server| Processes::of(server, VARIANT).list().into_iter().map(cpu_ms).sum();
    cluster.servers().iter().map(|server| (server.name().to_owned(), of(server))).collect()
}
