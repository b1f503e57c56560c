//! Peers, relays and configurations that fail: mail goes on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dovetail::journal::FORMAT;

use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Version};
use crate::scene::{as_user, mail, Scene, SOON};

fn pair(user: &str) -> Scene {
    Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), user)
}

/// Delivers `count` mails, one connection each; the slowest one's time.
fn deliver_and_time(server: &Server, user: &str, count: usize) -> Duration {
    let deliver = |i| {
        let start = Instant::now();
        server.deliver(user, &mail(&format!("mail {i}")));
        start.elapsed()
    };
    (0..count).map(deliver).max().unwrap_or_default()
}

/// Far above any delivery on a working machine, far below any timeout.
const NO_DELAY: Duration = Duration::from_secs(2);

#[test]
fn a_relay_killed_in_the_stream_comes_back_and_catches_up() {
    let t = pair("story-killed-relay");
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("dovetail");
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut lmtp = t.a().lmtp();
            for i in 0..150 {
                lmtp.deliver(&[&t.user], &mail(&format!("mail {i}")));
            }
        });
        let mut killed = 0;
        while !sender.is_finished() && killed < 3 {
            let pids = t.b().pids("dovetail");
            pids.iter().for_each(|pid| signal(*pid, "KILL"));
            killed += pids.len();
            wait_until(SOON, "B's relay runs again", || t.b().pids("dovetail").iter().any(|pid| !pids.contains(pid)));
        }
        assert!(killed > 0, "no relay was killed");
    });
    assert_eq!(t.settled().messages("INBOX").len(), 150);
}

#[test]
fn a_peer_that_is_away_gets_everything_when_it_is_back() {
    let t = pair("story-away");
    t.expects_in_log("dovetail");
    t.a().deliver(&t.user, &mail("before"));
    t.settled();

    t.b().stop();
    let slowest = deliver_and_time(t.a(), &t.user, 20);
    assert!(slowest < NO_DELAY, "a delivery took {slowest:?} while the peer was away");
    wait_until(SOON, "A's status shows pending changes and the reason", || {
        let peer = &t.a().status()[0];
        peer["pending"].parse::<u64>().is_ok_and(|n| n >= 20) && !peer["last_error"].is_empty()
    });

    // It tries again and again, and not with each mail.
    let log = t.a().log();
    let reasons = log.lines().filter(|line| line.contains("failed: Connection refused")).count();
    assert!(reasons <= 2, "one line while the peer starts, and one while it is away:\n{log}");

    t.b().start();
    assert_eq!(t.settled().messages("INBOX").len(), 21);
    wait_until(SOON, "nothing is pending", || t.a().status()[0]["pending"] == "0");
}

/// Of its journal; what is in it then.
fn set_format(server: &Server, format: i32) -> Vec<u8> {
    let path = server.outside("/state/dovetail/journal.sqlite");
    let journal = rusqlite::Connection::open(&path).expect("the journal");
    journal.pragma_update(None, "user_version", format).expect("it is written");
    journal.close().expect("nothing more is written");
    std::fs::read(path).expect("the journal")
}

#[test]
fn a_journal_of_an_unknown_format_is_refused_and_left_as_it_is_while_mail_goes_on() {
    let t = pair("story-unknown-format");
    for text in ["Peer ", "its format is 99", "dovetail"] {
        t.expects_in_log(text);
    }
    t.a().deliver(&t.user, &mail("before"));
    t.settled();
    t.b().stop();
    let written = set_format(t.b(), 99);
    t.b().start();
    let slowest = deliver_and_time(t.b(), &t.user, 5);
    assert!(slowest < NO_DELAY, "a delivery took {slowest:?} while there was no relay");
    let path = format!("{}/state/dovetail/journal.sqlite", t.b().dir());
    let said = format!(
        "The relay cannot start: the journal fails: {path}: its format is 99, and this version of Dovetail knows {FORMAT} only - it \
         is left as it is"
    );
    wait_until(SOON, "the log says why", || t.b().log().contains(&said));
    let found = std::fs::read(t.b().outside("/state/dovetail/journal.sqlite")).expect("the journal");
    assert!(found == written, "it is another one");
    t.b().stop();
    set_format(t.b(), FORMAT);
    t.b().start();
    assert_eq!(t.settled().messages("INBOX").len(), 6);
}

#[test]
fn a_relay_that_hangs_delays_no_mail() {
    let t = pair("story-hung-relay");
    t.expects_in_log("dovetail");
    t.a().deliver(&t.user, &mail("before"));
    t.settled();
    let relay = t.a().pids("dovetail")[0];
    signal(relay, "STOP");
    let slowest = deliver_and_time(t.a(), &t.user, 5);
    signal(relay, "CONT");
    assert!(slowest < NO_DELAY, "a delivery took {slowest:?} while the relay hung");
    t.a().imap(&t.user).select("INBOX").ok("STORE 1:* +FLAGS (\\Seen)");
}

/// Bytes that are no frame, and what the log says of them.
const GARBAGE: [(&[u8], &str); 5] = [
    (b"\xff\x00\x00\x01x", "the frame is of version 255, and only version 1 is known here"),
    (b"GET / HTTP/1.0\r\n\r\n", "the frame is of version 71, and only version 1 is known here"),
    (b"\x01\xff\xff\xff", "the frame is 16777215 bytes long, and at most 65536 are allowed"),
    (b"\x01\x00\x00\x04\xff\xff\xff\xff", "the frame cannot be decoded: "),
    // A field that nobody knows.
    (b"\x01\x00\x00\x03\xf8\x3f\x01", "the frame is of a kind that is not known here"),
];

/// Sends it, and waits until the other side closes the connection.
fn say_garbage<S: Read + Write>(mut stream: S, garbage: &[u8]) {
    // It may be closed before all is written.
    let _ = stream.write_all(garbage);
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer);
    let timed_out = end.is_err_and(|e| matches!(e.kind(), std::io::ErrorKind::WouldBlock));
    assert!(!timed_out, "the relay kept a connection open that sent {garbage:?}");
}

/// Each reason is in the log once, together with `who`.
fn garbage_closes_that_connection_only(user: &str, who: &str, say: impl Fn(&Scene, &[u8])) {
    let t = pair(user);
    t.expects_in_log("dovetail");
    t.a().deliver(user, &mail("before"));
    t.settled();
    for (garbage, reason) in GARBAGE {
        say(&t, garbage);
        t.b().wait_for_log(reason);
        let log = t.b().log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(reason)).collect();
        assert!(lines.len() == 1 && lines[0].contains(who), "{reason}: {lines:#?}");
    }
    assert_eq!(t.b().counters().malformed, GARBAGE.len() as u64);
    t.a().deliver(user, &mail("to it"));
    t.b().deliver(user, &mail("from it"));
    assert_eq!(t.settled().messages("INBOX").len(), 3);
}

#[test]
fn garbage_on_the_relays_port_closes_that_connection_only() {
    garbage_closes_that_connection_only("story-garbage-port", "A server that connected as a peer", |t, garbage| {
        let stream = t.b().connect(t.b().ports.relay).expect("connect to the relay");
        stream.set_read_timeout(Some(SOON)).expect("timeout");
        say_garbage(stream, garbage);
    });
}

#[test]
fn garbage_on_the_relays_unix_socket_closes_that_connection_only() {
    garbage_closes_that_connection_only("story-garbage-socket", "Local process unknown: ", |t, garbage| {
        let stream = UnixStream::connect(t.b().outside("/run/dovetail")).expect("connect to the relay");
        stream.set_read_timeout(Some(SOON)).expect("timeout");
        say_garbage(stream, garbage);
    });
}

#[test]
fn what_goes_on_is_told_to_root_and_the_relays_own_user_only() {
    use std::os::unix::fs::MetadataExt;
    let t = pair("story-who-asks");
    t.expects_in_log("it asks what only root and the relay's own user may know");
    let socket = t.b().outside("/run/dovetail");
    let ask = |uid: u32| {
        let socket = socket.clone();
        as_user(uid, move || {
            let text = |error: String| Err::<(), String>(error);
            [
                dovetail::relay::client::status(&socket, None, SOON).map_or_else(text, |_| Ok(())),
                dovetail::relay::client::failed(&socket, SOON).map_or_else(text, |_| Ok(())),
                dovetail::relay::client::waiting(&socket, SOON).map_or_else(text, |_| Ok(())),
                dovetail::relay::client::clear_failed(&socket, None, SOON).map_or_else(text, |_| Ok(())),
            ]
        })
    };
    let relay = t.b().pids("dovetail")[0];
    let own = std::fs::metadata(format!("/proc/{relay}")).expect("a process").uid();
    assert_ne!(own, 0);
    for uid in [0, own] {
        assert!(ask(uid).iter().all(Result::is_ok), "{uid}: {:?}", ask(uid));
    }
    // Who may well tell what he did.
    for answer in ask(8) {
        assert!(answer.is_err_and(|error| error.contains("it has one for root and its own user only")));
    }
    t.b().wait_for_log("it asks what only root and the relay's own user may know");
}

#[test]
fn a_malformed_setting_is_named_and_mail_goes_on() {
    let setup = Setup::new("a", Format::Sdbox).peers("nonsense");
    let t = Scene::on(Cluster::start(vec![setup]), "story-malformed");
    t.expects_in_log("dovetail");
    deliver_and_time(t.a(), &t.user, 3);
    assert_eq!(t.a().imap(&t.user).select("INBOX").uids().len(), 3);
    t.a().wait_for_log("dovetail_peers");
    let status = t.a().try_doveadm(&["dovetail", "status"]);
    let why = String::from_utf8_lossy(&status.stderr).into_owned();
    assert!(!status.status.success() && why.contains("dovetail_peers") && why.contains("nonsense"), "{why}");
}

#[test]
fn an_unknown_setting_is_named_and_mail_goes_on() {
    let setup =
        Setup::new("a", Format::Sdbox).peers("b=127.0.0.1:1").extra("plugin {\n  dovetail_colour = green\n}\n", "");
    let cluster = Cluster::start(vec![setup]);
    if cluster.a().version() == Version::V24 {
        // Dovecot 2.4 itself refuses to start with unknown settings, whoever's they are, and says which.
        let conf = format!("{}/unknown.conf", cluster.a().dir());
        let text = std::fs::read_to_string(cluster.a().outside("/dovecot.conf")).expect("its configuration");
        let text = format!("{text}\ndovetail_colour = green\n");
        std::fs::write(cluster.a().outside("/unknown.conf"), text).expect("write");
        let asked = cluster.a().command("doveconf").args(["-c", &conf]).output().expect("doveconf");
        let why = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(!asked.status.success() && why.contains("dovetail_colour"), "{why}");
        return;
    }
    let t = Scene::on(cluster, "story-unknown");
    t.expects_in_log("dovetail");
    deliver_and_time(t.a(), &t.user, 3);
    assert_eq!(t.a().imap(&t.user).select("INBOX").uids().len(), 3);
    t.a().wait_for_log("dovetail_colour");
    let status = t.a().try_doveadm(&["dovetail", "status"]);
    let why = String::from_utf8_lossy(&status.stderr).into_owned();
    assert!(!status.status.success() && why.contains("Unknown setting dovetail_colour"), "{why}");
}

#[test]
fn a_peer_that_is_not_on_loopback_is_refused() {
    // 192.0.2.0/24 is reserved for documentation.
    let setup = Setup::new("a", Format::Sdbox).peers("b=192.0.2.1:4192");
    let t = Scene::on(Cluster::start(vec![setup]), "story-not-loopback");
    t.expects_in_log("dovetail");
    deliver_and_time(t.a(), &t.user, 3);
    t.a().wait_for_log("192.0.2.1");
    t.a().wait_for_log("dovetail_insecure_plaintext");
    assert_eq!(t.a().imap(&t.user).select("INBOX").uids().len(), 3);
}

#[test]
fn without_a_relay_mail_goes_on_and_one_line_says_why() {
    let setup = Setup::new("a", Format::Sdbox)
        .peers("b=127.0.0.1:1")
        .extra("plugin {\n  dovetail_socket = no-relay-here\n}\n", "dovetail_socket = no-relay-here\n");
    let t = Scene::on(Cluster::start(vec![setup]), "story-no-relay");
    t.expects_in_log("no-relay-here");
    let mut imap = t.a().imap(&t.user).select("INBOX");
    for i in 0..20 {
        imap.append("INBOX", &mail(&format!("mail {i}")));
    }
    imap.ok("STORE 1:* +FLAGS (\\Seen)");
    imap.ok("LOGOUT");
    t.a().wait_for_log("no-relay-here");
    let log = t.a().log();
    let lines = log.lines().filter(|line| line.contains("no-relay-here")).count();
    assert!(lines <= 2, "one line for one session, not one for each mail:\n{log}");
    // That its end waits for nobody, a test of the link says.
    (0..5).for_each(|n| t.a().lda(&t.user, &mail(&format!("by lda {n}"))));
    assert_eq!(t.a().imap(&t.user).select("INBOX").uids().len(), 25);
}

#[test]
fn both_servers_write_at_once_in_different_mailboxes() {
    let t = pair("story-both-write");
    t.a().deliver(&t.user, &mail("first"));
    t.a().imap(&t.user).ok("CREATE OnA");
    t.a().imap(&t.user).ok("CREATE OnB");
    t.settled();
    std::thread::scope(|scope| {
        for (server, mailbox) in [(t.a(), "OnA"), (t.b(), "OnB")] {
            let user = &t.user;
            scope.spawn(move || {
                let mut imap = server.imap(user).select(mailbox);
                for i in 1..=50 {
                    imap.append(mailbox, &mail(&format!("mail {i}")));
                    imap.ok(&format!("UID STORE {i} +FLAGS.SILENT (\\Seen)"));
                }
            });
        }
    });
    let snapshot = t.settled();
    assert_eq!((snapshot.messages("OnA").len(), snapshot.messages("OnB").len()), (50, 50));
}

/// Both servers make an INBOX by themselves, in different seconds, before they have heard of each other's.
#[test]
fn an_inbox_that_was_born_on_both_sides_becomes_one() {
    let t = pair("story-two-inboxes");
    let relays = [t.a().pids("dovetail")[0], t.b().pids("dovetail")[0]];
    relays.iter().for_each(|pid| signal(*pid, "STOP"));
    t.a().imap(&t.user).select("INBOX");
    let second = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let first = second();
    wait_until(SOON, "the next second", || second() > first);
    t.b().imap(&t.user).select("INBOX");
    relays.iter().for_each(|pid| signal(*pid, "CONT"));
    t.settled();

    t.b().deliver(&t.user, &mail("from b"));
    assert_eq!(t.settled().messages("INBOX").len(), 1);
    t.a().deliver(&t.user, &mail("from a"));
    assert_eq!(t.settled().messages("INBOX").len(), 2);
}

/// The peer's disk says no for one of the users.
#[test]
fn a_user_whose_mail_cannot_be_written_waits_with_the_reason_and_others_go_on() {
    let t = pair("story-no-permission");
    t.expects_in_log("story-no-permission");
    t.a().deliver(&t.user, &mail("first"));
    t.settled();
    let home = t.b().outside(&format!("/home/{}", t.user));
    let owner = |uid: u32| std::os::unix::fs::chown(&home, Some(uid), None).expect("chown");
    let mode = |mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&home, std::fs::Permissions::from_mode(mode)).expect("chmod");
    };
    owner(0);
    mode(0o700);
    (2..=4).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    wait_until(SOON, "A's status says who waits and why", || {
        let error = &t.a().status()[0]["last_error"];
        error.contains(&t.user) && error.contains("mailbox INBOX")
    });
    let other = "story-others-go-on";
    t.a().deliver(other, &mail("for another"));
    wait_until(SOON, "the mail for another is on B", || t.b().has_inbox(other));
    wait_until(SOON, "B shows it", || t.b().imap(other).select("INBOX").uids().len() == 1);

    owner(8);
    mode(0o700);
    assert_eq!(t.converged_within(Duration::from_secs(90), &t.user).messages("INBOX").len(), 4);
    wait_until(SOON, "nothing is pending", || t.a().status()[0]["pending"] == "0");
    assert_eq!(t.b().status()[0]["failed"], "0");
}

/// Of one mailbox only.
#[test]
fn a_mailbox_that_cannot_be_written_holds_up_its_user_only_and_resumes() {
    let t = pair("story-one-mailbox");
    t.expects_in_log("story-one-mailbox");
    t.a().imap(&t.user).append("INBOX", &mail("first"));
    t.a().imap(&t.user).ok("CREATE Work");
    t.settled();
    let folder = t.b().outside(&format!("/home/{}/sdbox/mailboxes/Work", t.user));
    let chown = |owner: &str| {
        let done = std::process::Command::new("chown").args(["-R", owner]).arg(&folder).status();
        assert!(done.expect("chown").success());
    };
    let mode = |mode: &str| {
        let done = std::process::Command::new("chmod").args(["-R", mode]).arg(&folder).status();
        assert!(done.expect("chmod").success());
    };
    chown("root");
    mode("go=");
    t.a().imap(&t.user).append("Work", &mail("waits"));
    wait_until(SOON, "A's status says who waits and why", || {
        let error = &t.a().status()[0]["last_error"];
        error.contains(&t.user) && error.contains("mailbox Work") && error.contains("ermission denied")
    });
    let other = "story-another-goes-on";
    t.a().deliver(other, &mail("for another"));
    wait_until(SOON, "the mail for another is on B", || t.b().has_inbox(other));
    chown("mail");
    assert_eq!(t.converged_within(Duration::from_secs(90), &t.user).messages("Work").len(), 1);
    wait_until(SOON, "nothing is pending", || t.a().status()[0]["pending"] == "0");
}

#[test]
fn a_corrupted_index_on_the_peer_loses_no_mail() {
    // A dbox's index is all that it knows of its mails.
    let t = Scene::on(Cluster::pair(Format::Maildir, Format::Maildir), "story-corrupt");
    // Dovecot's, about its index, and ours of the one that it makes instead, if it has the same second for a name.
    for text in ["dovecot.index", "its log is an earlier one"] {
        t.expects_in_log(text);
    }
    (0..3).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    t.settled();
    let log = t.b().outside(&format!("/home/{}/Maildir/dovecot.index.log", t.user));
    std::fs::write(&log, b"this is no index\n".repeat(20)).expect("write");
    (3..6).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    wait_until(Duration::from_secs(60), "both servers have all mails", || {
        t.servers().iter().all(|server| server.imap(&t.user).select("INBOX").uids().len() == 6)
    });
    wait_until(SOON, "nothing is pending", || t.a().status()[0]["pending"] == "0");
}

const SMALL_QUOTA_23: &str = "
mail_plugins = $mail_plugins quota
plugin {
  quota = count:User quota
  quota_vsizes = yes
  quota_rule = *:storage=10K
}
";
const SMALL_QUOTA_24: &str = "
mail_plugins {
  quota = yes
}
quota \"User quota\" {
  storage_size = 10K
}
";

#[test]
fn a_quota_that_is_full_on_the_peer_does_not_stop_what_was_taken_elsewhere() {
    let b = Setup::new("b", Format::Sdbox).extra(SMALL_QUOTA_23, SMALL_QUOTA_24);
    let t = Scene::on(Cluster::start(vec![Setup::new("a", Format::Sdbox), b]), "story-quota");
    for size in [8_000, 50_000, 2_000] {
        t.a().deliver(&t.user, &crate::scene::mail_of_size(size));
    }
    assert_eq!(t.settled().messages("INBOX").len(), 3);
    let answer = t.b().imap(&t.user).try_append_all(
        "INBOX",
        &[crate::cluster::imap::Appended { flags: "", date: "", mail: &crate::scene::mail_of_size(9_000) }],
    );
    assert!(answer.result.contains("OVERQUOTA"), "the quota is not in force: {}", answer.result);
}

#[test]
fn what_failed_is_listed_in_all_formats_of_doveadm_until_it_is_cleared() {
    let t = pair("story-failed-list");
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("Gone");
    t.a().deliver(&t.user, &mail("in the inbox"));
    t.a().imap(&t.user).ok("CREATE Gone");
    t.a().imap(&t.user).append("Gone", &mail("first"));
    t.settled();
    let gone = t.a().outside(&format!("/home/{}/sdbox/mailboxes/Gone", t.user));
    std::fs::remove_dir_all(gone).expect("remove the mailbox beside Dovecot's back");
    t.a().kill("dovetail");
    wait_until(SOON, "it is listed", || {
        t.a().try_status().is_some_and(|status| status.counters.unwrap_or_default().failed == 1)
    });
    let failed = |format| t.a().doveadm(&["-f", format, "dovetail", "failed"]);
    for format in ["flow", "table", "tab", "json"] {
        let text = failed(format);
        assert!(text.contains("mailbox_guid") && text.contains(&t.user) && text.contains("mailbox Gone"), "{text}");
    }

    let clear = |options: &[&str]| {
        let asked = t.a().try_doveadm(&[&["-f", "tab", "dovetail", "failed", "clear"][..], options].concat());
        let cleared = String::from_utf8_lossy(&asked.stdout).lines().last().map(str::to_owned).unwrap_or_default();
        (asked.status.code(), cleared)
    };
    for wrong in [&[][..], &["-A", "-u", &t.user]] {
        assert_eq!(clear(wrong).0, Some(64), "{wrong:?}");
    }
    assert_eq!(clear(&["-u", "nobody"]), (Some(0), "0".into()));
    assert_eq!(clear(&["-u", &t.user]), (Some(0), "1".into()));
    assert!(!failed("tab").contains(&t.user));
    assert_eq!(t.a().status()[0]["failed"], "0");
    assert_eq!(clear(&["-A"]), (Some(0), "0".into()));
}
