//! `make demo`: two Dovecots that replicate to each other, for people to try.
//!
//! Starts a pair with the example configuration, shows both directions with their lag, and stays until Ctrl-C. With
//! DOVETAIL_DEMO_ONCE=1 it ends by itself, with status 0 only if both directions worked.

#[path = "../tests/e2e/cluster/mod.rs"]
mod cluster;

use std::time::{Duration, Instant};

use cluster::imap::Imap;
use cluster::{holds_within, Cluster, Format, Server, PASSWORD};

const USER: &str = "demo";
const DEADLINE: Duration = Duration::from_secs(20);

fn main() {
    let once = std::env::var("DOVETAIL_DEMO_ONCE").is_ok_and(|v| !v.is_empty() && v != "0");
    println!("Starting two Dovecots on 127.0.0.1 ...");
    let cluster = Cluster::pair(Format::Sdbox, Format::Sdbox);
    for server in cluster.servers() {
        println!(
            "  {}: Dovecot {}, mail in {}",
            server.name(),
            server.version_text(),
            server.outside("/home").display()
        );
    }

    let connected = |server: &Server| server.status().iter().all(|peer| peer["state"] == "connected");
    if !holds_within(DEADLINE, || cluster.servers().iter().all(connected)) {
        println!("The relays have not connected to each other within {DEADLINE:?}; going on.");
    }
    let result = mail_from_a_to_b(&cluster).and_then(|()| flag_from_b_to_a(&cluster));
    if let Err(error) = &result {
        println!("FAILED: {error}");
        cluster.print_logs();
    }
    println!();
    print!("{}", cluster.a().doveadm(&["-f", "table", "dovetail", "status"]));
    if once {
        drop(cluster);
        println!("{}", if result.is_ok() { "Both directions work." } else { "The demo failed." });
        std::process::exit(i32::from(result.is_err()));
    }

    println!("\nTry it (user {USER}, password {PASSWORD}; any other user works too):");
    for server in cluster.servers() {
        let ports = &server.ports;
        println!(
            "  {}: IMAP 127.0.0.1:{}   POP3 127.0.0.1:{}   LMTP 127.0.0.1:{}",
            server.name(),
            ports.imap,
            ports.pop3,
            ports.lmtp
        );
        println!("     curl -s 'imap://{USER}:{PASSWORD}@127.0.0.1:{}/INBOX;UID=1'", ports.imap);
        println!("     log: {}", server.outside("/log").display());
    }
    println!("\nCtrl-C ends both and removes everything.");
    // Ctrl-C ends this process; the janitor, in a process group of its own, does the rest.
    loop {
        std::thread::park();
    }
}

fn mail_from_a_to_b(cluster: &Cluster) -> Result<(), String> {
    // The client on B has INBOX open as soon as there is one.
    let mail = b"From: alice@example.org\r\nTo: demo@example.org\r\nSubject: Greetings from A\r\n\r\nHello B!\r\n";
    println!("\nA mail is delivered to A by LMTP ...");
    cluster.a().deliver(USER, mail);
    let delivered = Instant::now();
    if !holds_within(DEADLINE, || cluster.b().has_inbox(USER)) {
        return Err(format!("no INBOX appeared on B within {DEADLINE:?}"));
    }
    let mut client = cluster.b().imap(USER).select("INBOX");
    wait_for(&mut client, "the mail on B", |client| client.ok("NOOP").is_ok() && !client.uids().is_empty())?;
    println!("  first mail, which made the mailbox too: on B {:.1} ms after A's answer", millis(delivered));

    let mut lmtp = cluster.a().lmtp();
    lmtp.deliver(&[USER], mail);
    let delivered = Instant::now();
    wait_for(&mut client, "the second mail on B", |client| {
        client.ok("NOOP");
        client.uids().len() == 2
    })?;
    println!("  second mail: a client on B sees it {:.1} ms after A's answer", millis(delivered));
    let answer = client.ok("FETCH 2 (UID FLAGS BODY.PEEK[HEADER.FIELDS (FROM SUBJECT)])");
    for line in String::from_utf8_lossy(answer.literal().unwrap_or_default()).lines().filter(|l| !l.is_empty()) {
        println!("  B> {line}");
    }
    Ok(())
}

fn flag_from_b_to_a(cluster: &Cluster) -> Result<(), String> {
    println!("\nA client on B marks the second mail as \\Seen and $Important ...");
    let mut on_a = cluster.a().imap(USER).select("INBOX");
    let mut on_b = cluster.b().imap(USER).select("INBOX");
    on_b.ok("STORE 2 +FLAGS (\\Seen $Important)");
    let stored = Instant::now();
    wait_for(&mut on_a, "the flags on A", |client| {
        client.ok("NOOP");
        let answer = client.ok("FETCH 2 FLAGS");
        answer.contains("\\Seen") && answer.contains("$Important")
    })?;
    println!("  a client on A sees them {:.1} ms after B's answer", millis(stored));
    println!("  A> {}", on_a.ok("FETCH 2 (UID FLAGS)").lines().join(" "));
    Ok(())
}

fn wait_for(client: &mut Imap, what: &str, mut condition: impl FnMut(&mut Imap) -> bool) -> Result<(), String> {
    // A tight poll, for the lag that is shown: each round is a command and its answer.
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        if condition(client) {
            return Ok(());
        }
    }
    Err(format!("waited {DEADLINE:?} in vain for {what}"))
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
