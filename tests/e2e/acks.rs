//! `dovetail_ack`: a client is told that its mail is saved when peers have it, too.

use std::fs;
use std::time::{Duration, Instant};

use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail, mail_of_size, Scene, SOON};

fn setup(name: &str, format: Format, ack: &str, timeout: &str, on_timeout: &str) -> Setup {
    let settings =
        format!("dovetail_ack = {ack}\ndovetail_ack_timeout = {timeout}\ndovetail_ack_on_timeout = {on_timeout}\n");
    Setup::new(name, format).extra(&format!("plugin {{\n{settings}}}\n"), &settings)
}

fn pair(user: &str, format: Format, ack: &str, timeout: &str, on_timeout: &str) -> Scene {
    let setup = |name| setup(name, format, ack, timeout, on_timeout);
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), user);
    t.expects_in_log("Peer ");
    wait_until(SOON, "the relays are connected", || t.servers().iter().all(is_connected));
    t
}

fn is_connected(server: &Server) -> bool {
    server.try_status().is_some_and(|status| status.peers.iter().all(|peer| peer.state == "connected"))
}

fn mails_in(server: &Server, user: &str, mailbox: &str) -> usize {
    server.doveadm(&["search", "-u", user, "mailbox", mailbox, "all"]).lines().count()
}

fn mails(server: &Server, user: &str) -> usize {
    mails_in(server, user, "INBOX")
}

fn unacknowledged(server: &Server) -> u64 {
    server.status()[0]["unacknowledged"].parse().expect("a number")
}

/// However it was saved.
fn a_server_is_lost_right_after_its_ok(format: Format, way: &str, save: fn(&Scene, &[u8])) {
    // Its time is long: what takes longer on a busy machine is no fault.
    let user = format!("story-lost-{way}-{format:?}").to_lowercase();
    let t = pair(&user, format, "peers:1", "60s", "fail");
    // Who is killed last notices the others.
    t.expects_in_log("anvil");
    t.expects_in_log("dovetail");
    save(&t, &mail("first"));
    assert_eq!(mails(t.b(), &user), 1, "it was told OK before b had it");
    // Too large to ride along.
    save(&t, &mail_of_size(200_000));
    t.a().kill_all();
    fs::remove_dir_all(t.a().outside("/home")).expect("its storage");
    fs::remove_dir_all(t.a().outside("/state")).expect("its state");
    assert_eq!(mails(t.b(), &user), 2);
    let size =
        t.b().doveadm(&["-f", "tab", "fetch", "-u", &user, "size.physical", "mailbox", "INBOX", "larger", "100k"]);
    assert!(size.lines().nth(1).is_some_and(|size| size.parse::<u64>().is_ok_and(|size| size >= 200_000)), "{size}");
}

fn by_lmtp(t: &Scene, mail: &[u8]) {
    t.a().deliver(&t.user, mail);
}

fn by_append(t: &Scene, mail: &[u8]) {
    t.a().imap(&t.user).append("INBOX", mail);
}

#[test]
fn with_peers_1_a_server_lost_after_its_ok_loses_no_mail_sdbox() {
    a_server_is_lost_right_after_its_ok(Format::Sdbox, "lmtp", by_lmtp);
    a_server_is_lost_right_after_its_ok(Format::Sdbox, "append", by_append);
}

#[test]
fn with_peers_1_a_server_lost_after_its_ok_loses_no_mail_mdbox() {
    a_server_is_lost_right_after_its_ok(Format::Mdbox, "lmtp", by_lmtp);
    a_server_is_lost_right_after_its_ok(Format::Mdbox, "lda", |t, mail| t.a().lda(&t.user, mail));
}

#[test]
fn with_peers_1_a_server_lost_after_its_ok_loses_no_mail_maildir() {
    a_server_is_lost_right_after_its_ok(Format::Maildir, "lmtp", by_lmtp);
    a_server_is_lost_right_after_its_ok(Format::Maildir, "append", by_append);
}

#[test]
fn without_a_peer_the_client_is_told_ok_after_the_timeout_once_and_it_is_counted() {
    let t = pair("story-ack-ok", Format::Sdbox, "peers:1", "5s", "ok");
    t.expects_in_log("is not acknowledged as dovetail_ack wants");
    t.a().deliver(&t.user, &mail("first"));
    assert_eq!((mails(t.b(), &t.user), unacknowledged(t.a())), (1, 0));
    t.b().stop();
    let began = Instant::now();
    t.a().deliver(&t.user, &mail("second"));
    assert!(began.elapsed() > Duration::from_secs(3), "it has waited for {:?}", began.elapsed());
    // Then nobody waits for who is away, in whatever process.
    let began = Instant::now();
    (3..=5).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    let mut imap = t.a().imap(&t.user);
    (6..=8).for_each(|n| drop(imap.append("INBOX", &mail(&format!("mail {n}")))));
    assert!(began.elapsed() < Duration::from_secs(15), "they have waited for {:?}", began.elapsed());
    wait_until(SOON, "all are counted", || unacknowledged(t.a()) == 7);
    t.a()
        .wait_for_log("is not acknowledged as dovetail_ack wants: 0 peers of 1 have applied it, and these have not: b");

    t.b().start();
    assert_eq!(t.settled().messages("INBOX").len(), 8);
    imap.append("INBOX", &mail("mail 9"));
    assert_eq!((mails(t.b(), &t.user), unacknowledged(t.a())), (9, 7));
    drop(imap);
    t.settled();
}

fn it_fails_and_is_there_once_when_it_is_tried_again(format: Format) {
    let user = format!("story-ack-fail-{format:?}").to_lowercase();
    // The second mail once took longer than two seconds, beside a simulation.
    let t = pair(&user, format, "peers:1", "5s", "fail");
    t.expects_in_log("is not acknowledged as dovetail_ack wants");
    t.expects_in_log("could not be replicated");
    let mut imap = t.a().imap(&user);
    imap.ok("CREATE Work");
    for server in t.servers() {
        wait_until(SOON, "both have the mailbox", || {
            server.doveadm(&["mailbox", "list", "-u", &user]).contains("Work")
        });
    }
    t.a().deliver(&user, &mail("first"));
    t.a().deliver(&user, &mail("second"));
    t.settled();
    t.b().stop();

    let replies = t.a().lmtp().try_deliver(&[&user], &mail("third"));
    assert!(replies[0].starts_with("451 "), "{replies:?}");
    assert_eq!(mails(t.a(), &user), 2);
    let mut imap = imap.select("INBOX");
    let third = [crate::cluster::imap::Appended { flags: "", date: "", mail: &mail("third") }];
    assert!(imap.try_append_all("INBOX", &third).result.starts_with("NO "));
    for command in ["COPY 1 Work", "MOVE 1 Work"] {
        let result = imap.command(command).result;
        assert!(
            result.starts_with("NO ") && result.contains("The mail could not be replicated"),
            "{command}: {result}"
        );
    }
    assert_eq!((mails(t.a(), &user), mails_in(t.a(), &user, "Work")), (2, 0));
    // Of this one Dovecot expunges the old message, whether it fails or not.
    imap.ok("MOVE 2 INBOX");
    assert_eq!(mails(t.a(), &user), 2);

    t.b().start();
    wait_until(SOON, "the relays are connected", || t.servers().iter().all(is_connected));
    wait_until(SOON, "b has all", || t.a().has_nothing_pending());
    t.a().deliver(&user, &mail("third"));
    imap.ok("NOOP");
    imap.ok("MOVE 1 Work");
    drop(imap);
    let snapshot = t.settled();
    assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Work").len()), (2, 1));
}

#[test]
fn what_fails_is_nowhere_and_is_there_once_when_it_is_tried_again_sdbox() {
    it_fails_and_is_there_once_when_it_is_tried_again(Format::Sdbox);
}

#[test]
fn what_fails_is_nowhere_and_is_there_once_when_it_is_tried_again_mdbox() {
    it_fails_and_is_there_once_when_it_is_tried_again(Format::Mdbox);
}

#[test]
fn what_fails_is_nowhere_and_is_there_once_when_it_is_tried_again_maildir() {
    it_fails_and_is_there_once_when_it_is_tried_again(Format::Maildir);
}

#[test]
fn with_relay_the_relay_is_waited_for_and_no_peer() {
    let t = pair("story-ack-relay", Format::Sdbox, "relay", "2s", "ok");
    t.expects_in_log("is not acknowledged as dovetail_ack wants");
    t.b().stop();
    t.a().deliver(&t.user, &mail("first"));
    t.a().imap(&t.user).append("INBOX", &mail("second"));
    assert_eq!(unacknowledged(t.a()), 0);
    // Neither is one that hangs waited for again and again.
    let relay = t.a().pids("dovetail")[0];
    signal(relay, "STOP");
    let mut imap = t.a().imap(&t.user);
    let began = Instant::now();
    (3..=12).for_each(|n| drop(imap.append("INBOX", &mail(&format!("mail {n}")))));
    assert!(began.elapsed() < Duration::from_secs(15), "they have waited for {:?}", began.elapsed());
    signal(relay, "CONT");
    wait_until(SOON, "they are counted", || unacknowledged(t.a()) > 0);
    drop(imap);
    t.b().start();
    assert_eq!(t.settled().messages("INBOX").len(), 12);
}

/// Neither is it saved if the relay is not there, and it is there once when it is tried again.
#[test]
fn with_relay_and_fail_a_relay_that_hangs_makes_it_fail() {
    let t = pair("story-ack-relay-fail", Format::Sdbox, "relay", "2s", "fail");
    t.expects_in_log("is not acknowledged as dovetail_ack wants");
    t.expects_in_log("could not be replicated");
    t.b().stop();
    t.a().deliver(&t.user, &mail("first"));
    let mut imap = t.a().imap(&t.user);
    imap.append("INBOX", &mail("second"));
    let [relay] = t.a().pids("dovetail")[..] else { panic!("one relay") };
    signal(relay, "STOP");
    let third = [crate::cluster::imap::Appended { flags: "", date: "", mail: &mail("third") }];
    let result = imap.try_append_all("INBOX", &third).result;
    assert!(result.starts_with("NO "), "{result}");
    let replies = t.a().lmtp().try_deliver(&[&t.user], &mail("third"));
    assert!(replies[0].starts_with("451 "), "{replies:?}");
    assert_eq!(mails(t.a(), &t.user), 2);
    signal(relay, "CONT");
    wait_until(SOON, "the relay answers", || t.a().try_status().is_some());
    // What hung is not waited for again for a while.
    wait_until(SOON, "it is saved", || t.a().lmtp().try_deliver(&[&t.user], &mail("third"))[0].starts_with("250 "));
    drop(imap);
    t.b().start();
    assert_eq!(t.settled().messages("INBOX").len(), 3);
}

#[test]
fn with_peers_2_of_three_servers_both_others_have_it_or_it_fails() {
    let setups = ["a", "b", "c"].map(|name| setup(name, Format::Sdbox, "peers:2", "10s", "fail"));
    let t = Scene::on(Cluster::start(setups.into()), "story-ack-peers-2");
    for text in ["Peer ", "is not acknowledged as dovetail_ack wants", "could not be replicated"] {
        t.expects_in_log(text);
    }
    let user = t.user.as_str();
    wait_until(SOON, "the relays are connected", || t.servers().iter().all(is_connected));
    let c = &t.servers()[2];
    for (n, subject) in ["first", "second"].into_iter().enumerate() {
        t.a().deliver(user, &mail(subject));
        for server in t.servers() {
            assert_eq!(mails(server, user), n + 1, "it was told OK before {} had it", server.name());
        }
    }
    c.stop();
    let replies = t.a().lmtp().try_deliver(&[user], &mail("third"));
    assert!(replies[0].starts_with("451 "), "{replies:?}");
    assert_eq!(mails(t.a(), user), 2);
    t.a().wait_for_log("1 peers of 2 have applied it, and these have not: c");
    c.start();
    wait_until(SOON, "the relays are connected", || t.servers().iter().all(is_connected));
    wait_until(SOON, "c has all", || t.a().has_nothing_pending());
    t.a().deliver(user, &mail("third"));
    assert_eq!(mails(c, user), 3);
    assert_eq!(t.settled().messages("INBOX").len(), 3);
}
