//! Comparing: an empty server is seeded, equal and slightly different ones are compared. Beside it, where Dovecot still has dsync's
//! own replication, `doveadm backup` and `doveadm sync` of the same mails over TCP.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::cluster::ports::PortBlock;
use crate::cluster::snapshot::table;
use crate::cluster::{holds_within, Cluster, Format, Proxy, Server, Setup};
use crate::outage::deliver;
use crate::report::{Report, Value};
use crate::variant::{mail, stored, Variant};
use crate::Plan;

const CLIENTS: usize = 4;
const DEADLINE: Duration = Duration::from_secs(600);
/// One user whose INBOX is large.
const BIG: &str = "seed-big";

pub fn measure(plan: &Plan, report: &mut Report) {
    let users: Vec<String> = (0..plan.seed_users).map(|n| format!("seed-{n}")).collect();
    let count = plan.seed_users * plan.seed_mails;
    println!("seeding: {} users with {} mails each", plan.seed_users, plan.seed_mails);
    let mut ports = PortBlock::reserve();
    let others = report.has(Variant::Dsync).then(|| ["c", "d"].map(|name| (name, ports.take())));
    let alone = |name| Setup::new(name, Format::Sdbox).only_with(&[]).extra("doveadm_password = secret\n", "");
    let mut setups = vec![alone("a"), alone("b")];
    setups.extend(others.iter().flatten().map(|(name, port)| {
        let listener = format!("service doveadm {{\n  inet_listener {{\n    port = {port}\n  }}\n}}\n");
        alone(name).without_plugin().extra(&listener, "")
    }));
    let cluster = Cluster::start(setups);
    let [a, b, rest @ ..] = cluster.servers() else { unreachable!("two servers, or four") };
    for server in cluster.servers() {
        users.iter().map(String::as_str).chain([BIG]).for_each(|user| server.add_user(user));
    }

    let delivery = deliver(a, &users, count, &mail);
    let rate = |time: Duration| Value::exact(count as f64 / time.as_secs_f64());
    report.add("seeding: local delivery, 4 LMTP clients", "mails/s", Variant::Dovetail, rate(delivery));

    // The mails were just written: for all who read them they are in the page cache.
    for ((server, (_, port)), verb) in rest.iter().zip(others.iter().flatten()).zip(["backup", "sync"]) {
        let time = in_parallel(&users, |user| {
            let there = format!("tcp:127.0.0.1:{port}");
            let output = a.try_doveadm(&[verb, "-u", user, &there]);
            assert!(output.status.success(), "doveadm {verb}: {}", String::from_utf8_lossy(&output.stderr));
        });
        assert_eq!(all(server, &users), count, "doveadm {verb}");
        let name = format!("seeding: doveadm {verb} -u, {CLIENTS} at once");
        report.add(&name, "mails/s", Variant::Dsync, rate(time));
    }

    // a, whose name is the lower one, connects.
    let line = Proxy::to(b.ports.relay);
    become_peers(a, b, &line);
    let start = Instant::now();
    a.doveadm(&["dovetail", "resync", "-A"]);
    let seeding = start.elapsed();
    assert_eq!(all(b, &users), count, "seeding");
    report.add("seeding: doveadm dovetail resync -A", "mails/s", Variant::Dovetail, rate(seeding));
    let megabytes = count as f64 * mail(0).len() as f64 / 1e6;
    let speed = Value::exact(megabytes / seeding.as_secs_f64());
    report.add("  the same", "MB/s", Variant::Dovetail, speed);
    let ratio = Value::exact(seeding.as_secs_f64() / delivery.as_secs_f64());
    report.add("  its time over the delivery's", "", Variant::Dovetail, ratio);

    compare(a, &line, &["-A"], "equal servers", plan.seed_users, report);
    for user in users.iter().take(10) {
        b.untold(&["flags", "add", "-u", user, "\\Flagged", "mailbox", "INBOX", "uid", "7"], b"");
    }
    let found = compare(a, &line, &["-A"], "10 flags differ", plan.seed_users, report);
    assert_eq!(found, 10);

    println!("comparing one mailbox of {} mails", plan.seed_big);
    let small = |number: usize| format!("Subject: {number}\r\n\r\nsmall\r\n").into_bytes();
    deliver(a, &[BIG.to_owned()], plan.seed_big, &small);
    assert!(holds_within(DEADLINE, || stored(b, BIG) == plan.seed_big && a.has_nothing_pending()), "b never had all");
    b.untold(&["flags", "add", "-u", BIG, "\\Flagged", "mailbox", "INBOX", "uid", "77"], b"");
    let name = format!("one flag of {} mails differs", plan.seed_big);
    let found = compare(a, &line, &["-u", BIG], &name, 1, report);
    assert_eq!(found, 1);
}

/// Equal servers with very many mails: one user's, copied to others as they lie on both.
pub fn measure_million(plan: &Plan, report: &mut Report) {
    let users: Vec<String> = (0..plan.million_users).map(|n| format!("million-{n}")).collect();
    let count = plan.million_users * plan.million_mails;
    println!("comparing {count} mails");
    let alone = |name| Setup::new(name, Format::Mdbox).only_with(&[]);
    let cluster = Cluster::start(vec![alone("a"), alone("b")]);
    let [a, b] = cluster.servers() else { unreachable!("two servers") };
    for server in cluster.servers() {
        users.iter().for_each(|user| server.add_user(user));
    }
    let line = Proxy::to(b.ports.relay);
    become_peers(a, b, &line);
    let small = |number: usize| format!("Subject: {number}\r\n\r\nsmall\r\n").into_bytes();
    deliver(a, &users[..1], plan.million_mails, &small);
    let is_there = || messages(b, &users[0]) == plan.million_mails && a.has_nothing_pending();
    assert!(holds_within(DEADLINE, is_there), "b never had all");
    for server in cluster.servers() {
        for user in &users[1..] {
            let home = |user: &str| server.outside(&format!("/home/{user}"));
            let copied = Command::new("cp").arg("-aT").args([home(&users[0]), home(user)]).status();
            assert!(copied.expect("cp").success());
        }
        assert_eq!(users.iter().map(|user| messages(server, user)).sum::<usize>(), count);
    }
    let found = compare(a, &line, &["-A"], &format!("{count} equal mails"), plan.million_users, report);
    assert_eq!(found, 0);
}

/// In the INBOX, as Dovecot says, of whatever format.
fn messages(server: &Server, user: &str) -> usize {
    let status = server.doveadm(&["-f", "tab", "mailbox", "status", "-u", user, "messages", "INBOX"]);
    let row = table(&status).next();
    row.and_then(|row| row["messages"].parse().ok()).unwrap_or(0)
}

/// How many differences were found.
fn compare(a: &Server, line: &Proxy, whom: &[&str], name: &str, users: usize, report: &mut Report) -> usize {
    let (before, start) = (line.passed(), Instant::now());
    let args = [&["-f", "tab", "dovetail", "compare"], whom].concat();
    let output = a.try_doveadm(&args);
    let (took, bytes) = (start.elapsed(), line.passed() - before);
    report.add(&format!("compare: {name}"), "s", Variant::Dovetail, Value::exact(took.as_secs_f64()));
    let kilobytes = Value::exact(bytes as f64 / 1000.0 / users as f64);
    report.add(&format!("  on the wire for each user, {name}"), "kB", Variant::Dovetail, kilobytes);
    String::from_utf8_lossy(&output.stdout).lines().skip(1).count()
}

fn become_peers(a: &Server, b: &Server, line: &Proxy) {
    let address = |port: u16| format!("127.0.0.1:{port}");
    for (server, peer, port) in [(a, "b", line.port), (b, "a", a.ports.relay)] {
        server.configure(&[(peer.to_owned(), address(port))]);
        server.doveadm(&["reload"]);
    }
    let is_connected =
        |server: &Server| server.try_status().is_some_and(|status| status.peers.iter().any(|p| p.state == "connected"));
    assert!(holds_within(DEADLINE, || is_connected(a) && is_connected(b)), "they never connected");
}

fn all(server: &Server, users: &[String]) -> usize {
    users.iter().map(|user| stored(server, user)).sum()
}

fn in_parallel(users: &[String], work: impl Fn(&str) + Sync) -> Duration {
    let (start, next) = (Instant::now(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while let Some(user) = users.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(user);
                }
            });
        }
    });
    start.elapsed()
}

/// What it costs a client that its mail is on the relay's disk, or on a peer's, before it is answered.
pub fn measure_acks(plan: &Plan, report: &mut Report) {
    for mode in ["async", "relay", "peers:1"] {
        println!("dovetail_ack = {mode}: {} mails", plan.ack_mails);
        let cluster = Variant::Dovetail.start_with(false, &|setup| {
            setup.extra(&format!("plugin {{\n  dovetail_ack = {mode}\n}}\n"), &format!("dovetail_ack = {mode}\n"))
        });
        let mut lmtp = cluster.a().lmtp();
        let times: Vec<Option<Duration>> = (0..plan.ack_mails)
            .map(|number| {
                let start = Instant::now();
                lmtp.deliver(&["acks"], &mail(number));
                Some(start.elapsed())
            })
            .collect();
        for percent in [50.0, 99.0] {
            let value = Value::percentile(&times, percent, DEADLINE);
            report.add(&format!("LMTP with dovetail_ack = {mode}, p{percent}"), "ms", Variant::Dovetail, value);
        }
    }
}
