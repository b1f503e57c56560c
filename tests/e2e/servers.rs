//! Servers come and go: one is added to those that are there, `doveadm dovetail peer remove` for one that is gone for good.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot, CONVERGE_DEADLINE};
use crate::scene::{mail, Scene, SOON};

fn peers(server: &Server) -> Vec<String> {
    let status = server.try_status().unwrap_or_default();
    status.peers.iter().map(|peer| peer.peer.clone()).collect()
}

fn is_connected(server: &Server) -> bool {
    server.try_status().is_some_and(|status| status.peers.iter().all(|peer| peer.state == "connected"))
}

fn exit_status(server: &Server, args: &[&str]) -> i32 {
    server.try_doveadm(args).status.code().unwrap_or(-1)
}

/// Of those who are left.
fn are_equal(one: &Server, other: &Server, user: &str) -> Snapshot {
    let (mut difference, mut result) = (String::new(), None);
    wait_until(CONVERGE_DEADLINE, &format!("{} and {} are equal", one.name(), other.name()), || {
        let taken = Snapshot::try_take(one, user, true).and_then(|a| Ok((a, Snapshot::try_take(other, user, true)?)));
        difference = taken.as_ref().map_or_else(String::clone, |(a, b)| a.difference(b));
        result = taken.ok().map(|(a, _)| a);
        difference.is_empty()
    });
    result.expect("it was taken")
}

/// All others but that one, from now on.
pub fn set_peers(server: &Server, all: &[Server], but: Option<&str>) {
    let others = all.iter().filter(|other| other.name() != server.name() && Some(other.name()) != but);
    let peers: Vec<_> =
        others.map(|other| (other.name().to_owned(), format!("127.0.0.1:{}", other.ports.relay))).collect();
    server.configure(&peers);
    let before = server.pids("dovetail");
    server.reload();
    let is_new = || server.pids("dovetail").iter().all(|pid| !before.contains(pid));
    wait_until(SOON, "the relay knows its peers", || is_new() && self::peers(server).len() == peers.len());
}

/// It has the lowest name: it was the one that decided where UIDs clash.
#[test]
fn a_server_that_is_gone_for_good_holds_nothing_back_and_may_come_again_as_a_new_one() {
    let setups = ["a", "b", "c"].map(|name| Setup::new(name, Format::Sdbox));
    let t = Scene::on(Cluster::start(setups.into()), "story-removed");
    for text in ["Peer ", "anvil", "A server that connected as a peer", "killed with signal 9", "The relay ends"] {
        t.expects_in_log(text);
    }
    let user = t.user.as_str();
    let [gone, b, c] = t.servers() else { panic!("three servers") };
    let survivors = [b, c];
    for server in t.servers() {
        server.add_user(user);
        server.deliver(user, &mail(&format!("of {}", server.name())));
        // Two processes that make a new user's INBOX at once may stop each other, in Dovecot.
        t.settled();
    }

    // Given a server that is lost.
    gone.kill_all();
    fs::remove_dir_all(gone.outside(&format!("/home/{user}"))).expect("its mail");
    fs::remove_dir_all(gone.outside("/state/dovetail")).expect("its journal");
    for server in survivors {
        server.deliver(user, &mail(&format!("while it is lost, of {}", server.name())));
        wait_until(SOON, "its changes are kept", || server.status()[0]["pending"] != "0");
        assert_eq!(exit_status(server, &["dovetail", "wait", "-t", "1"]), 75);
    }

    // When it is removed.
    for server in survivors {
        assert_ne!(exit_status(server, &["dovetail", "peer", "remove", "nobody"]), 0);
        assert_eq!(exit_status(server, &["dovetail", "peer", "remove", "a"]), 0);
        wait_until(SOON, "it is listed no more", || peers(server).len() == 1);
    }

    // Then nothing is kept for it, and nothing waits for it, also after the next start.
    wait_until(SOON, "the others are connected", || survivors.into_iter().all(is_connected));
    for server in survivors {
        assert_eq!(exit_status(server, &["dovetail", "wait", "-t", "60"]), 0);
        assert_eq!(server.status()[0]["pending"], "0");
        server.kill("dovetail");
        wait_until(SOON, "the relay runs again", || peers(server).len() == 1);
    }
    wait_until(SOON, "the others are connected", || survivors.into_iter().all(is_connected));
    // Neither do UIDs that clash.
    std::thread::scope(|scope| {
        for server in survivors {
            scope.spawn(move || {
                (1..=5).for_each(|n| server.deliver(user, &mail(&format!("both {n}, of {}", server.name()))));
            });
        }
    });
    assert_eq!(exit_status(b, &["dovetail", "resync", "-A"]), 0);
    assert_eq!(are_equal(b, c, user).messages("INBOX").len(), 15);

    // One that comes by its name is turned away until it is made a peer again, as a new one.
    gone.start();
    wait_until(SOON, "it is turned away", || {
        gone.try_status().is_some_and(|status| status.peers.iter().all(|peer| peer.state == "refused"))
    });
    for but in [Some("a"), None] {
        survivors.into_iter().for_each(|server| set_peers(server, t.servers(), but));
    }
    wait_until(Duration::from_secs(60), "all are connected", || t.servers().iter().all(is_connected));
    b.doveadm(&["dovetail", "resync", "-A"]);
    assert_eq!(t.settled().messages("INBOX").len(), 15);
    gone.deliver(user, &mail("new"));
    assert_eq!(t.settled().messages("INBOX").len(), 16);
}

/// Whoever knows the new one comes to it before it knows them; a worker may be asking Dovecot's auth just then, or have got a job
/// just when Dovecot's master ends it.
fn expects_reloads(t: &Scene) {
    for text in [
        "Peer ",
        "A server that connected as a peer",
        "Disconnected unexpectedly",
        "could not be applied",
        "a worker went away in mid-job",
        // Sockets are made anew.
        "auth-master: userdb lookup",
        "to a worker failed: No such file",
    ] {
        t.expects_in_log(text);
    }
}

/// How many mails were taken, and how often one had to come again. A process that Dovecot ends at a reload says so, also of a mail
/// that it has saved.
fn deliver_until(server: &Server, user: &str, is_over: &AtomicBool) -> (usize, usize) {
    let (mut taken, mut again) = (0, 0);
    while !is_over.load(Ordering::Relaxed) {
        taken += 1;
        let mail = mail(&format!("live {taken}, of {}", server.name()));
        wait_until(SOON, "the mail is taken", || {
            let is_taken = server.lmtp().try_deliver(&[user], &mail)[0].starts_with("250");
            again += usize::from(!is_taken);
            is_taken
        });
        std::thread::park_timeout(Duration::from_secs(1));
    }
    (taken, again)
}

/// By the procedure in docs/OPERATIONS.md.
#[test]
fn a_third_server_is_added_to_a_pair_that_is_written_to() {
    let setup = |name, peers: &[&str]| Setup::new(name, Format::Sdbox).only_with(peers);
    let setups = vec![setup("a", &["b"]), setup("b", &["a"]), setup("c", &[])];
    let t = Scene::on(Cluster::start(setups), "story-added");
    expects_reloads(&t);
    let user = t.user.as_str();
    let quiet = "story-added-quiet";
    let [a, b, c] = t.servers() else { panic!("three servers") };
    for server in t.servers() {
        server.add_user(user);
        server.add_user(quiet);
    }
    (1..=20).for_each(|n| a.deliver(if n % 2 == 0 { user } else { quiet }, &mail(&format!("before {n}"))));
    wait_until(SOON, "b has all", || a.has_nothing_pending());

    let is_over = AtomicBool::new(false);
    let (taken, again) = std::thread::scope(|scope| {
        let writers = [a, b].map(|server| scope.spawn(|| deliver_until(server, user, &is_over)));
        t.servers().iter().for_each(|server| set_peers(server, t.servers(), None));
        wait_until(Duration::from_secs(60), "all are connected", || t.servers().iter().all(is_connected));
        // Nobody has to ask for those whom the relays know; this has them, and all others, compared now. Who is written to all the
        // time may not be through.
        let seeded = exit_status(a, &["dovetail", "resync", "-A"]);
        assert!([0, 75].contains(&seeded), "{seeded}");
        is_over.store(true, Ordering::Relaxed);
        let delivered = writers.into_iter().map(|writer| writer.join().expect("it delivers"));
        delivered.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    });
    assert_eq!(exit_status(a, &["dovetail", "resync", "-A"]), 0);
    for server in [a, b] {
        assert_eq!(exit_status(server, &["dovetail", "wait", "-t", "120"]), 0);
    }
    assert_eq!(t.converged(quiet).messages("INBOX").len(), 10);
    let count = t.settled().messages("INBOX").len();
    assert!((10 + taken..=10 + taken + again).contains(&count), "{count} of {taken}, {again} of them again");
    c.deliver(user, &mail("new"));
    assert_eq!(t.settled().messages("INBOX").len(), count + 1);
    assert_eq!(c.doveadm(&["-f", "tab", "dovetail", "compare", "-A"]).lines().skip(1).count(), 0);
}

/// Without being asked.
#[test]
fn users_are_compared_with_a_server_that_becomes_a_peer() {
    let setup = |name, peers: &[&str]| Setup::new(name, Format::Sdbox).only_with(peers);
    let setups = vec![setup("a", &["b"]), setup("b", &["a"]), setup("c", &[])];
    let t = Scene::on(Cluster::start(setups), "story-becomes");
    expects_reloads(&t);
    let [a, b, _] = t.servers() else { panic!("three servers") };
    (1..=5).for_each(|n| a.deliver(&t.user, &mail(&format!("before {n}"))));
    wait_until(SOON, "b has all", || a.has_nothing_pending());
    t.servers().iter().for_each(|server| set_peers(server, t.servers(), None));
    for server in [a, b] {
        assert_eq!(exit_status(server, &["dovetail", "wait", "-t", "150"]), 0, "they are compared first");
    }
    assert_eq!(t.settled().messages("INBOX").len(), 5);
}
