//! Three servers, all of which are written to.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, mail_of_size, Scene};

/// Long enough for connections that were lost to be noticed and made again.
const CUT_DEADLINE: Duration = Duration::from_secs(90);

fn setups<const COUNT: usize>(formats: [Format; COUNT]) -> Vec<Setup> {
    ["a", "b", "c", "d", "e"].into_iter().zip(formats).map(|(name, format)| Setup::new(name, format)).collect()
}

/// Delivers mails, flags and expunges on one server, while others do the same.
fn write(server: &Server, user: &str, mails: usize) {
    let name = server.name();
    let mut lmtp = server.lmtp();
    let mut imap = server.imap(user).select("INBOX");
    for n in 0..mails {
        lmtp.deliver(&[user], &mail(&format!("{name} {n}")));
        // Whichever it is: perhaps another server's, which a third one does not have yet.
        imap.ok("STORE * +FLAGS (\\Seen)");
        imap.ok(&format!("STORE * {}FLAGS ($Important)", ["+", "-"][n % 2]));
    }
}

fn write_on_all(servers: &[Server], user: &str, mails: usize) {
    std::thread::scope(|scope| {
        for server in servers {
            scope.spawn(|| write(server, user, mails));
        }
    });
}

fn assert_each_once(snapshot: &Snapshot, count: usize) {
    let guids: BTreeSet<_> = snapshot.messages("INBOX").iter().map(|message| message.guid.clone()).collect();
    assert_eq!((snapshot.messages("INBOX").len(), guids.len()), (count, count));
}

fn three_that_are_written_to_at_once_converge(formats: [Format; 3], user: &str) {
    let t = Scene::on(Cluster::start(setups(formats)), user);
    // Dovecot's maildir, of \\Recent alone: see merge.rs.
    t.expects_in_log("Recent flags state corrupted");
    t.a().deliver(user, &mail("first"));
    t.settled();
    write_on_all(t.servers(), user, 12);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 37);
    // One after the other, each on the next server, as soon as it shows.
    let flags = ["\\Flagged", "\\Answered", "\\Draft"];
    for (n, server) in t.servers().iter().cycle().take(9).enumerate() {
        server.imap(user).select("INBOX").ok(&format!("STORE 1:* {}FLAGS ({})", ["+", "-"][n / 3 % 2], flags[n % 3]));
    }
    t.settled();
}

#[test]
fn three_that_are_written_to_at_once_converge_sdbox() {
    three_that_are_written_to_at_once_converge([Format::Sdbox; 3], "story-three-sdbox");
}

#[test]
fn three_that_are_written_to_at_once_converge_of_three_formats() {
    three_that_are_written_to_at_once_converge([Format::Maildir, Format::Sdbox, Format::Mdbox], "story-three-mixed");
}

#[test]
fn five_that_are_written_to_at_once_converge() {
    let user = "story-five";
    let formats = [Format::Sdbox, Format::Mdbox, Format::Maildir, Format::Sdbox, Format::Mdbox];
    let t = Scene::on(Cluster::start(setups(formats)), user);
    t.expects_in_log("Recent flags state corrupted");
    t.a().deliver(user, &mail("first"));
    t.settled();
    write_on_all(t.servers(), user, 4);
    let flags = ["\\Flagged", "\\Answered", "\\Draft", "$Work", "$Home"];
    for (server, flag) in t.servers().iter().zip(flags) {
        server.imap(user).select("INBOX").ok(&format!("STORE 1:* +FLAGS ({flag})"));
    }
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 21);
    for (server, flag) in t.servers().iter().zip(flags) {
        server.imap(user).select("INBOX").ok(&format!("STORE 1:* -FLAGS ({flag})"));
    }
    let snapshot = t.settled();
    assert!(snapshot.messages("INBOX").iter().all(|m| flags.iter().all(|flag| !m.flags.contains(&(*flag).to_owned()))));
}

#[test]
fn one_that_was_down_gets_what_the_other_two_did() {
    let user = "story-three-down";
    let t = Scene::on(Cluster::start(setups([Format::Sdbox; 3])), user);
    t.expects_in_log("dovetail");
    t.a().deliver(user, &mail("first"));
    t.settled();
    let c = &t.servers()[2];
    c.stop();
    write_on_all(&t.servers()[..2], user, 6);
    t.b().imap(user).select("INBOX").ok("STORE 1:3 +FLAGS (\\Answered)");
    let status = t.a().status();
    let rows: Vec<_> = status.iter().map(|row| (row["peer"].as_str(), row["state"] == "connected")).collect();
    assert_eq!(rows, [("b", true), ("c", false)]);
    c.start();
    write(c, user, 3);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 16);
}

/// `cut`: 0 between a and b, 1 between a and c, 2 between b and c.
fn two_that_are_cut_from_each_other_converge_through_the_third(cut: usize, user: &str) {
    let t = Scene::on(Cluster::start_apart(setups([Format::Sdbox; 3])), user);
    t.expects_in_log("dovetail");
    t.a().deliver(user, &mail("first"));
    t.settled();
    t.lines[cut].hang(true);
    write_on_all(t.servers(), user, 6);
    assert_each_once(&t.converged_while_busy(CUT_DEADLINE, user), 19);
    write_on_all(t.servers(), user, 2);
    t.lines[cut].hang(false);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 25);
}

#[test]
fn a_and_b_that_are_cut_from_each_other_converge_through_c() {
    two_that_are_cut_from_each_other_converge_through_the_third(0, "story-cut-ab");
}

#[test]
fn a_and_c_that_are_cut_from_each_other_converge_through_b() {
    two_that_are_cut_from_each_other_converge_through_the_third(1, "story-cut-ac");
}

#[test]
fn b_and_c_that_are_cut_from_each_other_converge_through_a() {
    two_that_are_cut_from_each_other_converge_through_the_third(2, "story-cut-bc");
}

fn three_in_a_chain_converge(middle: &str, formats: [Format; 3], user: &str) {
    let setups = setups(formats).into_iter().map(|setup| match setup.name == middle {
        true => setup,
        false => setup.only_with(&[middle]),
    });
    let t = Scene::on(Cluster::start(setups.collect()), user);
    t.expects_in_log("Recent flags state corrupted");
    // In the middle's maildir a client's session may find a mail before the worker that saves it is done.
    t.expects_in_log("a server told of a message that never came here");
    t.a().deliver(user, &mail("first"));
    t.settled();
    // One that does not ride along.
    t.a().deliver(user, &mail_of_size(200_000));
    t.servers()[2].deliver(user, &mail_of_size(300_000));
    t.settled();
    write_on_all(t.servers(), user, 8);
    assert_each_once(&t.converged_within(CUT_DEADLINE, user), 27);
}

#[test]
fn three_in_a_chain_converge_sdbox() {
    three_in_a_chain_converge("b", [Format::Sdbox; 3], "story-chain-sdbox");
}

#[test]
fn three_in_a_chain_converge_of_three_formats() {
    three_in_a_chain_converge("c", [Format::Mdbox, Format::Sdbox, Format::Maildir], "story-chain-mixed");
}

#[test]
fn relays_that_are_killed_while_they_pass_on_lose_nothing() {
    let user = "story-three-killed";
    let setups = setups([Format::Sdbox; 3]).into_iter().map(|setup| match setup.name.as_str() {
        "b" => setup,
        _ => setup.only_with(&["b"]),
    });
    let t = Scene::on(Cluster::start(setups.collect()), user);
    t.expects_in_log("dovetail");
    t.expects_in_log("killed with signal 9");
    t.a().deliver(user, &mail("first"));
    t.settled();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for server in [1, 0, 1, 2, 1].map(|at| &t.servers()[at]) {
                server.kill("dovetail");
                wait_until(CUT_DEADLINE, "the relay is back", || server.try_status().is_some());
            }
            is_over.store(true, Ordering::SeqCst);
        });
        for server in t.servers() {
            let is_over = &is_over;
            scope.spawn(move || {
                let mut lmtp = server.lmtp();
                for n in 0..40 {
                    lmtp.deliver(&[user], &mail(&format!("{} {n}", server.name())));
                    if is_over.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
        }
    });
    let snapshot = t.converged_within(CUT_DEADLINE, user);
    assert_each_once(&snapshot, snapshot.messages("INBOX").len());
    for (server, flag) in t.servers().iter().zip(["\\Seen", "$Important", "\\Flagged"]) {
        server.imap(user).select("INBOX").ok(&format!("STORE 1:* +FLAGS ({flag})"));
    }
    let snapshot = t.converged_within(CUT_DEADLINE, user);
    assert!(snapshot.messages("INBOX").iter().all(|message| message.flags.len() == 3));
}

/// Waits until the user's INBOX on the server has that many messages.
fn has_mails(server: &Server, user: &str, count: usize) {
    let what = format!("{user} has {count} mails on {}", server.name());
    wait_until(CUT_DEADLINE, &what, || {
        server.has_inbox(user)
            && Snapshot::try_take(server, user, true).is_ok_and(|all| all.messages("INBOX").len() == count)
    });
}

#[test]
fn a_user_is_replicated_with_the_peers_that_the_userdb_names() {
    let (jane, joe, jack, jim) = ("story-peers-jane", "story-peers-joe", "story-peers-jack", "story-peers-jim");
    let [a, b, c] = setups([Format::Sdbox; 3]).try_into().unwrap_or_else(|_| panic!());
    // jack's changes go from a to c through b, although a and c are connected.
    let a = a.user_with_peers(jane, "b").user_with_peers(joe, "c").user_with_peers(jack, "b");
    let b = b.user_with_peers(jane, "a").user_with_peers(joe, "-").user_with_peers(jack, "a,c");
    let c = c.user_with_peers(jane, "-").user_with_peers(joe, "a").user_with_peers(jack, "b");
    let t = Scene::on(Cluster::start(vec![a, b, c]), jim);
    let (b, c) = (t.b(), &t.servers()[2]);
    for user in [jane, joe, jack, jim] {
        t.a().deliver(user, &mail("one"));
        t.a().deliver(user, &mail_of_size(100_000));
    }
    for (server, user) in [(b, jane), (c, joe), (b, jack), (c, jack), (b, jim), (c, jim)] {
        has_mails(server, user, 2);
    }
    c.deliver(jack, &mail("three"));
    c.deliver(joe, &mail("three"));
    has_mails(t.a(), jack, 3);
    has_mails(t.a(), joe, 3);
    b.imap(jane).select("INBOX").ok("STORE 1 +FLAGS (\\Flagged)");
    wait_until(CUT_DEADLINE, "nothing is pending", || t.servers().iter().all(Server::has_nothing_pending));
    assert!(!c.has_inbox(jane) && !b.has_inbox(joe), "a server that is not in a user's set never gets his mail");
    t.settled();
}

#[test]
fn a_change_from_a_server_that_is_not_a_users_peer_is_refused_with_the_reason() {
    let user = "story-peers-refused";
    let [a, b, c] = setups([Format::Sdbox; 3]).try_into().unwrap_or_else(|_| panic!());
    let t = Scene::on(Cluster::start(vec![a, b, c.user_with_peers(user, "-")]), user);
    t.expects_in_log("not among the user's peers");
    t.a().deliver(user, &mail("one"));
    has_mails(t.b(), user, 1);
    wait_until(CUT_DEADLINE, "a knows why", || {
        let status = t.a().status();
        status
            .iter()
            .any(|peer| peer["peer"] == "c" && peer["last_error"].contains("server a is not among the user's peers"))
    });
    assert!(!t.servers()[2].has_inbox(user));
}

/// The relay knows of whom his mail is for from the worker that finds it.
#[test]
fn a_new_users_mail_that_nobody_told_of_goes_to_his_peers_only() {
    let (known, new) = ("story-peers-known", "story-peers-new");
    let setups = setups([Format::Sdbox; 3]).into_iter().map(|setup| {
        let peers = match setup.name.as_str() {
            "a" => "b",
            "b" => "a",
            _ => "-",
        };
        setup.user_with_peers(new, peers)
    });
    let t = Scene::on(Cluster::start(setups.collect()), new);
    t.expects_in_log("dovetail");
    t.expects_in_log("killed with signal 9");
    // Dovecot's master, of a process that is killed before it has said that it is idle.
    t.expects_in_log("command startup failed, throttling");
    t.a().deliver(known, &mail("so that the relays know each other"));
    t.converged(known);
    t.a().pids("dovetail").iter().for_each(|pid| signal(*pid, "STOP"));
    t.a().deliver(new, &mail("one"));
    t.a().deliver(new, &mail_of_size(100_000));
    // It may have ended by itself, which the relay that stands still does not hear either.
    t.a().kill("lmtp");
    assert!(t.a().kill("dovetail") >= 1);
    has_mails(t.b(), new, 2);
    wait_until(CUT_DEADLINE, "nothing is pending", || t.servers().iter().all(Server::has_nothing_pending));
    assert!(!t.servers()[2].has_inbox(new), "a server that is not in a user's set never gets his mail");
}
