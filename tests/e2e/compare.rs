//! `doveadm dovetail compare`, `resync` and `progress`: two servers are compared, seeded and repaired.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::cluster::snapshot::table;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, mail_of_size, stories, Scene, SOON};
use crate::servers::set_peers;

/// What stands in the list of what failed is compared after half a minute.
const BY_ITSELF: Duration = Duration::from_secs(120);
/// The same, where a killed worker may have left a lock, which Dovecot respects for some minutes.
const LOCKED: Duration = Duration::from_secs(300);

fn untold(server: &Server, args: &[&str]) {
    server.untold(args, b"");
}

fn untold_mail(server: &Server, user: &str, mailbox: &str, subject: &str) {
    server.untold(&["save", "-u", user, "-m", mailbox], &mail(subject));
}

/// What the command prints.
fn differences(server: &Server, args: &[&str]) -> Vec<BTreeMap<String, String>> {
    let all: Vec<&str> = ["-f", "tab", "dovetail"].iter().chain(args).copied().collect();
    table(&server.doveadm(&all)).collect()
}

/// The same in words: mailbox, what, UID.
fn words(server: &Server, args: &[&str]) -> BTreeSet<String> {
    let word = |row: BTreeMap<String, String>| format!("{} {} {}", row["mailbox"], row["what"], row["uid"]);
    differences(server, args).into_iter().map(word).collect()
}

fn are_equal(t: &Scene, args: &[&str]) {
    for server in t.servers() {
        assert_eq!(differences(server, args), [], "compared by {}", server.name());
    }
}

/// The relay forgets all, as if it had just been installed.
fn forget_journal(server: &Server) {
    server.stop();
    fs::remove_dir_all(server.outside("/state/dovetail")).expect("the relay's journal");
    server.start();
}

fn is_connected(server: &Server) -> bool {
    server.try_status().is_some_and(|status| status.peers.iter().all(|peer| peer.state == "connected"))
}

fn wait_for_connection(t: &Scene) {
    wait_until(SOON, "the relays are connected", || t.servers().iter().all(is_connected));
}

const DBOXES: [(Format, Format); 2] = [(Format::Sdbox, Format::Sdbox), (Format::Mdbox, Format::Sdbox)];
const MAILDIRS: [(Format, Format); 2] = [(Format::Maildir, Format::Maildir), (Format::Sdbox, Format::Maildir)];

fn in_pairs(pairs: [(Format, Format); 2], name: &str, story: fn(&Scene)) {
    for (a, b) in pairs {
        let user = format!("story-{name}-{a:?}-{b:?}").to_lowercase();
        let t = Scene::on(Cluster::pair(a, b), &user);
        // Or its look for users of whom nobody has told finds what is delivered here without being told.
        wait_until(SOON, "the relays have looked at all after their start", || {
            t.servers().iter().all(Server::has_looked)
        });
        story(&t);
    }
}

/// Users with mail of before the plugin was there.
fn fill(server: &Server, user: &str, mails: usize) {
    untold(server, &["mailbox", "create", "-u", user, "-s", "Work", "Work/Old", "Empty"]);
    for n in 0..mails {
        untold_mail(server, user, ["INBOX", "Work", "Work/Old"][n % 3], &format!("mail {n}"));
    }
    untold(server, &["flags", "add", "-u", user, "\\Seen \\Flagged", "mailbox", "INBOX", "uid", "1"]);
    untold(server, &["flags", "add", "-u", user, "\\Answered $Label work", "mailbox", "Work", "uid", "2"]);
    untold(server, &["expunge", "-u", user, "mailbox", "Work", "uid", "1"]);
    untold(server, &["mailbox", "unsubscribe", "-u", user, "Work/Old"]);
    untold(server, &["mailbox", "subscribe", "-u", user, "Nowhere"]);
}

#[test]
fn an_empty_server_is_seeded_dbox() {
    in_pairs(DBOXES, "seed", an_empty_server_is_seeded);
}

#[test]
fn an_empty_server_is_seeded_maildir() {
    in_pairs(MAILDIRS, "seed", an_empty_server_is_seeded);
}

fn an_empty_server_is_seeded(t: &Scene) {
    let users: Vec<String> = (1..=3).map(|n| format!("{}-{n}", t.user)).collect();
    for user in &users {
        t.servers().iter().for_each(|server| server.add_user(user));
        fill(t.a(), user, 12);
        // One that is fetched.
        t.a().untold(&["save", "-u", user, "-m", "Work/Old"], &mail_of_size(100_000));
    }
    wait_for_connection(t);
    let found = differences(t.a(), &["resync", "-A"]);
    let seeded: BTreeSet<&str> = found.iter().map(|row| row["user"].as_str()).collect();
    let all: BTreeSet<&str> = users.iter().map(String::as_str).collect();
    // Who opens a maildir may write to its log, and what is before that is read there: it may be told before it differs twice.
    match t.a().format() {
        Format::Maildir => assert!(seeded.is_subset(&all), "{found:?}"),
        _ => assert_eq!(seeded, all, "{found:?}"),
    }
    for user in &users {
        let snapshot = t.converged(user);
        let counts = ["INBOX", "Work", "Work/Old"].map(|mailbox| snapshot.messages(mailbox).len());
        assert_eq!(counts, [4, 3, 5], "{user}");
    }
    are_equal(t, &["compare", "-A"]);
    assert_eq!(t.a().status()[0]["failed"], "0");
    let progress = &table(&t.a().doveadm(&["-f", "tab", "dovetail", "progress"])).collect::<Vec<_>>()[0];
    assert_eq!((progress["state"].as_str(), progress["users"] == progress["users_done"]), ("idle", true));

    // It goes on from there.
    t.b().deliver(&users[0], &mail("new"));
    assert_eq!(t.converged(&users[0]).messages("INBOX").len(), 5);
}

/// On both, and each without the other's knowledge. What must be found, compared by A.
fn plant(t: &Scene) -> BTreeSet<String> {
    let user = t.user.as_str();
    t.expects_in_log("Peer ");
    let mut imap = t.a().imap(user);
    (1..=5).for_each(|n| drop(imap.append("INBOX", &mail(&format!("mail {n}")))));
    imap.ok("CREATE Work");
    imap.append("Work", &mail("work"));
    imap.ok("SUBSCRIBE Work");
    drop(imap);
    t.settled();
    are_equal(t, &["compare", "-u", user]);

    untold_mail(t.a(), user, "INBOX", "missing on b");
    untold(t.b(), &["flags", "add", "-u", user, "\\Flagged planted", "mailbox", "INBOX", "uid", "1"]);
    untold(t.b(), &["expunge", "-u", user, "mailbox", "INBOX", "uid", "3"]);
    untold_mail(t.b(), user, "Work", "extra on b");
    untold(t.b(), &["mailbox", "create", "-u", user, "Extra"]);
    untold_mail(t.b(), user, "Extra", "in an extra mailbox");
    untold(t.b(), &["mailbox", "subscribe", "-u", user, "News"]);
    t.servers().iter().for_each(forget_journal);
    wait_for_connection(t);
    let found = [
        "INBOX flags 1",
        "INBOX mail_missing_there 3",
        "INBOX mail_missing_there 6",
        "Work mail_missing_here 2",
        "Extra mailbox_missing_here 0",
        "News subscription_missing_here 0",
    ];
    found.map(str::to_owned).into()
}

fn planted_are_gone(t: &Scene) {
    let snapshot = t.settled();
    // B's log knows who expunged the third.
    let counts = ["INBOX", "Work", "Extra"].map(|mailbox| snapshot.messages(mailbox).len());
    assert_eq!(counts, [5, 2, 1]);
    are_equal(t, &["compare", "-u", &t.user]);
}

#[test]
fn differences_are_found_nothing_else_is_and_resync_removes_them() {
    in_pairs(DBOXES, "planted", |t| {
        let planted = plant(t);
        let user = t.user.as_str();
        // Nobody else must look: what is written to a log makes the relay read what is before.
        assert_eq!(words(t.a(), &["compare", "-u", user]), planted);
        assert_eq!(words(t.a(), &["resync", "-n", "-u", user]), planted);
        for server in t.servers() {
            let counters = server.counters();
            assert_eq!((counters.applied, counters.healed), (0, 0), "something was told to {}", server.name());
        }
        assert_eq!(words(t.a(), &["resync", "-u", user]), planted);
        planted_are_gone(t);
    });
}

/// Who opens one writes to its log, and the relay reads there what is before.
#[test]
fn differences_of_maildirs_are_found_or_healed_by_their_logs_and_resync_removes_them() {
    in_pairs(MAILDIRS, "planted", |t| {
        plant(t);
        let found = words(t.a(), &["resync", "-u", &t.user]);
        // No log of a mailbox tells of those.
        assert_eq!(found, ["News subscription_missing_here 0".to_owned()].into());
        planted_are_gone(t);
    });
}

/// Each has served the user by itself: other mailboxes of the same names, the same UIDs for other mails.
fn two_servers_with_mail_of_their_own_are_joined(t: &Scene) {
    let user = t.user.as_str();
    for server in t.servers() {
        fill(server, user, 9);
        untold(server, &["mailbox", "create", "-u", user, server.name()]);
        untold_mail(server, user, server.name(), "at home");
    }
    wait_for_connection(t);
    // What is not told by their logs first.
    differences(t.a(), &["resync", "-u", user]);
    let snapshot = t.settled();
    let counts = ["INBOX", "Work", "Work/Old", "a", "b"].map(|mailbox| snapshot.messages(mailbox).len());
    assert_eq!(counts, [6, 4, 6, 1, 1]);
    are_equal(t, &["compare", "-u", user]);
}

#[test]
fn two_servers_with_mail_of_their_own_are_joined_dbox() {
    in_pairs(DBOXES, "joined", two_servers_with_mail_of_their_own_are_joined);
}

#[test]
fn two_servers_with_mail_of_their_own_are_joined_maildir() {
    in_pairs(MAILDIRS, "joined", two_servers_with_mail_of_their_own_are_joined);
}

/// Its disk is gone, and what the others remember of it is not.
#[test]
fn a_server_that_was_lost_comes_back_empty_and_is_seeded() {
    let formats = [("a", Format::Sdbox), ("b", Format::Maildir), ("c", Format::Sdbox)];
    let t = Scene::on(Cluster::start(formats.map(|(name, format)| Setup::new(name, format)).into()), "story-replaced");
    t.expects_in_log("Peer ");
    let users: Vec<String> = (1..=2).map(|n| format!("{}-{n}", t.user)).collect();
    for user in &users {
        t.servers().iter().for_each(|server| server.add_user(user));
        for n in 1..=10 {
            t.servers().iter().for_each(|server| server.deliver(user, &mail(&format!("mail {n}"))));
        }
        let mut imap = t.a().imap(user);
        imap.ok("CREATE Work");
        imap.append("Work", &mail("work"));
        imap.select("INBOX").ok("STORE 3:7 +FLAGS (\\Seen work)");
        t.converged(user);
    }
    let before: Vec<Snapshot> = users.iter().map(|user| t.converged(user)).collect();
    let lost = &t.servers()[2];
    lost.stop();
    for user in &users {
        fs::remove_dir_all(lost.outside(&format!("/home/{user}"))).expect("the user's mail");
    }
    fs::remove_dir_all(lost.outside("/state/dovetail")).expect("the relay's journal");
    lost.start();
    wait_for_connection(&t);
    differences(t.a(), &["resync", "-A"]);
    for (user, before) in users.iter().zip(before) {
        assert_eq!(before.difference(&t.converged(user)), "", "{user}");
    }
    are_equal(&t, &["compare", "-A"]);
    t.servers()[2].deliver(&users[0], &mail("new"));
    t.converged(&users[0]);
}

#[test]
fn a_mailbox_that_stands_in_the_list_of_what_failed_is_compared_by_itself() {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), "story-listed");
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("story-listed");
    t.a().deliver(&t.user, &mail("first"));
    let mut imap = t.a().imap(&t.user);
    imap.ok("CREATE Gone");
    (1..=3).for_each(|n| drop(imap.append("Gone", &mail(&format!("mail {n}")))));
    imap.ok("CREATE Lost");
    imap.append("Lost", &mail("lost"));
    drop(imap);
    t.settled();
    // Beside Dovecot's back: nothing tells that it was deleted.
    fs::remove_dir_all(t.b().outside(&format!("/home/{}/sdbox/mailboxes/Gone", t.user))).expect("remove it");
    t.b().kill("dovetail");
    let failed = || t.b().try_status().map_or(0, |status| status.counters.unwrap_or_default().failed);
    wait_until(SOON, "it is listed", || failed() == 1);
    wait_until(BY_ITSELF, "it is compared, and is not listed any more", || {
        t.b().try_status().is_some_and(|status| status.counters.unwrap_or_default().failed == 0)
    });
    assert_eq!(t.settled().messages("Gone").len(), 3);
    are_equal(&t, &["compare", "-u", &t.user]);
}

const SMALL_JOURNAL_23: &str = "plugin {\n  dovetail_journal_size = 1M\n}\n";
const SMALL_JOURNAL_24: &str = "dovetail_journal_size = 1M\n";

#[test]
fn a_peer_for_whom_the_journal_ran_full_is_compared_by_itself() {
    let a = Setup::new("a", Format::Sdbox).extra(SMALL_JOURNAL_23, SMALL_JOURNAL_24);
    let t = Scene::on(Cluster::start(vec![a, Setup::new("b", Format::Sdbox)]), "story-overflow");
    t.expects_in_log("Peer ");
    t.expects_in_log("did not fit into the journal any more");
    (1..=4).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    t.settled();
    t.b().stop();
    let mut imap = t.a().imap(&t.user).select("INBOX");
    imap.ok("STORE 1 +FLAGS (\\Seen $Label)");
    imap.ok("STORE 2 +FLAGS (\\Deleted)");
    imap.ok("EXPUNGE");
    let body = mail_of_size(20_000);
    (0..80).for_each(|_| drop(imap.append("INBOX", &body)));
    drop(imap);
    let dropped = || t.a().status()[0]["dropped"].parse::<u64>().expect("a number");
    wait_until(SOON, "changes are dropped", || dropped() > 2);
    t.b().start();
    wait_until(BY_ITSELF, "it was compared", || dropped() == 0 && t.a().status()[0]["failed"] == "0");
    let snapshot = t.settled();
    // A's log knows that the second was expunged.
    assert_eq!(snapshot.messages("INBOX").len(), 83);
    are_equal(&t, &["compare", "-u", &t.user]);
}

/// Looks do not wait for the peers: without their bodies, which would not fit, the peer would fetch them one by one.
#[test]
fn mail_that_nobody_has_told_of_is_compared_where_the_journal_has_no_room() {
    let setup = |name| Setup::new(name, Format::Sdbox).only_with(&[]).extra(SMALL_JOURNAL_23, SMALL_JOURNAL_24);
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), "story-no-room");
    for text in ["Peer ", "A server that connected as a peer"] {
        t.expects_in_log(text);
    }
    wait_until(SOON, "the relays have looked at all after their start", || t.servers().iter().all(Server::has_looked));
    let user = "story-no-room-later";
    t.servers().iter().for_each(|server| server.add_user(user));
    let mut imap = t.a().imap(user);
    (0..100).for_each(|n| drop(imap.append("INBOX", &mail(&format!("mail {n}")))));
    drop(imap);
    t.servers().iter().for_each(|server| set_peers(server, t.servers(), None));
    t.a().wait_for_log("nobody has told of its messages, and the journal has no room for so many now");
    assert_eq!(t.converged_within(BY_ITSELF, user).messages("INBOX").len(), 100);
    wait_until(BY_ITSELF, "it was compared", || t.a().status()[0]["failed"] == "0");
    are_equal(&t, &["compare", "-u", user]);
}

#[test]
fn a_seeding_that_is_interrupted_goes_on_and_doubles_nothing() {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), "story-interrupted");
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("Peer ");
    t.expects_in_log("dovetail");
    let users: Vec<String> = (1..=3).map(|n| format!("{}-{n}", t.user)).collect();
    for user in &users {
        t.servers().iter().for_each(|server| server.add_user(user));
        fill(t.a(), user, 150);
    }
    wait_for_connection(&t);
    std::thread::scope(|scope| {
        // The relay that it asks is killed.
        scope.spawn(|| t.a().try_doveadm(&["dovetail", "resync", "-A"]));
        wait_until(SOON, "the seeding has begun", || {
            t.b().try_status().is_some_and(|s| s.counters.unwrap().applied > 5)
        });
        t.a().kill("dovetail");
        t.b().kill("dovetail");
    });
    for user in &users {
        let snapshot = t.converged_within(BY_ITSELF, user);
        let counts = ["INBOX", "Work", "Work/Old"].map(|mailbox| snapshot.messages(mailbox).len());
        assert_eq!(counts, [50, 49, 50], "{user}");
    }
    wait_until(BY_ITSELF, "all were compared", || t.a().try_status().is_some_and(|s| s.counters.unwrap().failed == 0));
    are_equal(&t, &["compare", "-A"]);
}

/// Many at once: a's relay must not have heard of them, so it forgets all.
fn fill_quickly(t: &Scene, users: &[String], mails: usize) {
    t.b().stop();
    for user in users {
        let mut imap = t.a().imap(user);
        for n in 0..mails {
            let mut mail = mail(&format!("mail {n}"));
            if n % 10 == 0 {
                // One that is fetched.
                mail.extend(mail_of_size(40_000));
            }
            imap.append("INBOX", &mail);
        }
    }
    forget_journal(t.a());
    t.b().start();
    wait_for_connection(t);
}

fn subjects(server: &Server, user: &str) -> Vec<String> {
    let fetched = server.doveadm(&["-f", "tab", "fetch", "-u", user, "hdr.subject", "mailbox", "INBOX", "all"]);
    let mut subjects: Vec<String> = fetched.lines().skip(1).map(str::to_owned).collect();
    subjects.sort();
    subjects
}

/// What is interrupted, and when, is decided by a seed (`DOVETAIL_TEST_SEED`).
#[test]
fn a_seeding_that_is_interrupted_again_and_again_while_all_is_written_to_doubles_nothing() {
    const MAILS: usize = 100;
    let given = std::env::var("DOVETAIL_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()));
    println!("again: DOVETAIL_TEST_SEED={seed}");
    let mut state = seed;
    let mut below = |end: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % end
    };
    let setups = ["a", "b"].map(|name| Setup::new(name, Format::Sdbox).over_a_line());
    let t = Scene::on(Cluster::start(setups.into()), "story-torn");
    for text in ["killed with signal 9", "Peer ", "dovetail"] {
        t.expects_in_log(text);
    }
    let users: Vec<String> = (1..=2).map(|n| format!("{}-{n}", t.user)).collect();
    t.servers().iter().for_each(|server| users.iter().for_each(|user| server.add_user(user)));
    fill_quickly(&t, &users, MAILS);
    let mut expected: Vec<String> = (0..MAILS).map(|n| format!("mail {n}")).collect();
    let applied = |server: &Server| server.try_status().map_or(0, |status| status.counters.unwrap_or_default().applied);
    for round in 0..5 {
        let (threshold, victim, side) = (below(13), below(4), below(2) as usize);
        println!(
            "round {round}: {threshold} changes, then {}",
            ["relay a", "relay b", "a worker", "the line"][victim as usize]
        );
        std::thread::scope(|scope| {
            scope.spawn(|| t.a().try_doveadm(&["dovetail", "resync", "-A"]));
            for server in t.servers() {
                let users = &users;
                scope.spawn(move || {
                    for n in 0..6 {
                        let subject = format!("round {round}, {n} on {}", server.name());
                        users.iter().for_each(|user| server.deliver(user, &mail(&subject)));
                    }
                });
            }
            let before = applied(t.b());
            // What is written comes in any case.
            wait_until(BY_ITSELF, "so much was applied", || applied(t.b()) >= before + threshold);
            match victim {
                0 => drop(t.a().kill("dovetail")),
                1 => drop(t.b().kill("dovetail")),
                2 => drop(t.servers()[side].kill("dovetail-worker")),
                _ => t.lines.iter().for_each(crate::cluster::Line::cut),
            }
        });
        for n in 0..6 {
            expected.extend(["a", "b"].map(|name| format!("round {round}, {n} on {name}")));
        }
        wait_until(BY_ITSELF, "the relays are connected", || t.servers().iter().all(is_connected));
    }
    differences(t.a(), &["resync", "-A"]);
    expected.sort();
    for user in &users {
        t.converged_within(BY_ITSELF, user);
        assert_eq!(subjects(t.a(), user), expected, "{user}");
    }
    are_equal(&t, &["compare", "-A"]);
}

/// Both were kept by dsync, and have got a mail each that it has not brought to the other one.
fn a_pair_that_dsync_has_kept_is_joined(t: &Scene) {
    let user = t.user.as_str();
    let [a, b] = t.servers() else { panic!("a pair") };
    fill(a, user, 9);
    let (driver, folder) = match a.format() {
        Format::Sdbox => ("sdbox", "sdbox"),
        Format::Mdbox => ("mdbox", "mdbox"),
        Format::Maildir => ("maildir", "Maildir"),
    };
    let home = |server: &Server| server.outside(&format!("/home/{user}"));
    untold(a, &["backup", "-u", user, &format!("{driver}:{}/home/{user}/copy", a.dir())]);
    fs::create_dir_all(home(b)).expect("the user's home");
    let status = std::process::Command::new("chown").arg("--reference").arg(home(a)).arg(home(b)).status();
    assert!(status.is_ok_and(|status| status.success()), "chown");
    let moved = std::process::Command::new("mv").arg(home(a).join("copy")).arg(home(b).join(folder)).status();
    assert!(moved.is_ok_and(|status| status.success()), "mv");
    for server in t.servers() {
        untold_mail(server, user, "INBOX", &format!("only on {}", server.name()));
    }
    let before = Snapshot::take(a, user, false);
    // From now on they are Dovetail's.
    t.servers().iter().for_each(forget_journal);
    t.expects_in_log("Peer ");
    wait_for_connection(t);
    a.deliver(user, &mail("new on a"));
    b.deliver(user, &mail("new on b"));
    differences(a, &["resync", "-u", user]);
    let after = t.settled();
    let counts = ["INBOX", "Work", "Work/Old"].map(|mailbox| after.messages(mailbox).len());
    assert_eq!(counts, [3 + 2 + 2, 2, 3]);
    for mailbox in ["Work", "Work/Old"] {
        assert_eq!(before.mailboxes[mailbox].messages, after.mailboxes[mailbox].messages, "{mailbox}");
        assert_eq!(before.mailboxes[mailbox].guid, after.mailboxes[mailbox].guid, "{mailbox}");
    }
    are_equal(t, &["compare", "-u", user]);
}

fn of_dsync(format: Format) {
    let user = format!("story-dsync-{format:?}").to_lowercase();
    // dsync does not keep them.
    let cluster = Cluster::pair(format, format).without_save_dates();
    a_pair_that_dsync_has_kept_is_joined(&Scene::on(cluster, &user));
}

#[test]
fn a_pair_that_dsync_has_kept_is_joined_and_nothing_is_doubled_sdbox() {
    of_dsync(Format::Sdbox);
}

#[test]
fn a_pair_that_dsync_has_kept_is_joined_and_nothing_is_doubled_mdbox() {
    of_dsync(Format::Mdbox);
}

#[test]
fn a_pair_that_dsync_has_kept_is_joined_and_nothing_is_doubled_maildir() {
    of_dsync(Format::Maildir);
}

/// The first row of `doveadm dovetail progress`.
fn progress(server: &Server) -> Option<(String, BTreeMap<String, u64>)> {
    let output = server.try_doveadm(&["-f", "tab", "dovetail", "progress"]);
    let mut row = table(&String::from_utf8_lossy(&output.stdout)).next()?;
    let state = row.remove("state")?;
    Some((state, row.into_iter().filter_map(|(name, value)| Some((name, value.parse().ok()?))).collect()))
}

#[test]
fn progress_says_how_far_a_seeding_is_also_after_its_relay_was_killed() {
    const MAILS: u64 = 40;
    let setups = ["a", "b"].map(|name| Setup::new(name, Format::Sdbox).over_a_line());
    let t = Scene::on(Cluster::start(setups.into()), "story-progress");
    for text in ["killed with signal 9", "Peer ", "dovetail"] {
        t.expects_in_log(text);
    }
    let users: Vec<String> = (1..=3).map(|n| format!("{}-{n}", t.user)).collect();
    t.servers().iter().for_each(|server| users.iter().for_each(|user| server.add_user(user)));
    fill_quickly(&t, &users, MAILS as usize);
    let when = |what: &str, is_so: &dyn Fn(&str, &BTreeMap<String, u64>) -> bool| {
        let mut last = None;
        wait_until(BY_ITSELF, what, || {
            last = progress(t.a());
            last.as_ref().is_some_and(|(state, row)| is_so(state, row))
        });
        last.expect("it was waited for").1
    };
    t.lines.iter().for_each(|line| line.delay(Duration::from_millis(20)));
    std::thread::scope(|scope| {
        scope.spawn(|| t.a().try_doveadm(&["dovetail", "resync", "-A"]));
        // All is known by then, and nothing of it can be there.
        let row = when("all differences are known", &|state, row| {
            let is_known = state == "running" && row["mails"] == 3 * MAILS;
            if is_known {
                t.lines.iter().for_each(|line| line.hang(true));
            }
            is_known
        });
        assert_eq!(row["users"], 3);
        assert!(row["users_done"] < 3 && row["mails_done"] == row["users_done"] * MAILS, "{row:?}");
        t.a().kill("dovetail");
        for line in &t.lines {
            line.delay(Duration::ZERO);
            line.hang(false);
        }
    });
    wait_until(BY_ITSELF, "the relays are connected", || t.servers().iter().all(is_connected));
    differences(t.a(), &["resync", "-A"]);
    let row = when("it is over", &|state, row| state == "idle" && row["users"] > 0);
    // The next relay counts anew; what had come by then is not missing any more.
    assert!(row["users"] >= 3 && row["users_done"] == row["users"], "{row:?}");
    assert!(row["mails_done"] == row["mails"] && row["mails"] <= 3 * MAILS, "{row:?}");
    users.iter().for_each(|user| assert_eq!(t.converged(user).messages("INBOX").len(), MAILS as usize));
    are_equal(&t, &["compare", "-A"]);
}

#[test]
fn both_are_written_to_while_they_are_compared_dbox() {
    in_pairs(DBOXES, "live", both_are_written_to_while_they_are_compared);
}

#[test]
fn both_are_written_to_while_they_are_compared_maildir() {
    in_pairs(MAILDIRS, "live", both_are_written_to_while_they_are_compared);
}

fn both_are_written_to_while_they_are_compared(t: &Scene) {
    let user = t.user.as_str();
    (1..=10).for_each(|n| t.a().deliver(user, &mail(&format!("first {n}"))));
    t.settled();
    untold(t.a(), &["mailbox", "create", "-u", user, "Drafts"]);
    (1..=40).for_each(|n| untold_mail(t.a(), user, ["INBOX", "Drafts"][n % 2], &format!("untold {n}")));
    t.servers().iter().for_each(forget_journal);
    t.expects_in_log("Peer ");
    wait_for_connection(t);
    std::thread::scope(|scope| {
        for server in t.servers() {
            scope.spawn(move || {
                for n in 1..=20 {
                    server.deliver(user, &mail(&format!("live {n} on {}", server.name())));
                }
            });
        }
        scope.spawn(|| {
            let mut imap = t.b().imap(user).select("INBOX");
            imap.ok("UID STORE 1:5 +FLAGS (\\Seen live)");
            imap.ok("UID STORE 2 +FLAGS (\\Deleted)");
            imap.ok("UID EXPUNGE 2");
        });
        scope.spawn(|| {
            let mut imap = t.a().imap(user).select("INBOX");
            imap.ok("UID STORE 3 +FLAGS (\\Deleted)");
            imap.ok("UID EXPUNGE 3");
            imap.ok("UID STORE 6:8 +FLAGS (\\Answered)");
        });
        scope.spawn(|| differences(t.a(), &["resync", "-u", user]));
    });
    differences(t.a(), &["resync", "-u", user]);
    let snapshot = t.converged_within(BY_ITSELF, user);
    assert_eq!(snapshot.messages("INBOX").len(), 10 + 20 + 40 - 2);
    assert_eq!(snapshot.messages("Drafts").len(), 20);
    are_equal(t, &["compare", "-u", user]);
}

/// All users, again and again, while they are written to.
#[test]
fn what_differs_and_nobody_knows_is_found_in_the_background() {
    let often = "dovetail_compare_interval = 5s\n";
    let setup = |name| Setup::new(name, Format::Sdbox).extra(&format!("plugin {{\n  {often}}}\n"), often);
    let t = Scene::on(Cluster::start(vec![setup("a"), setup("b")]), "story-background");
    let user = t.user.as_str();
    (1..=3).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.settled();
    untold_mail(t.b(), user, "INBOX", "untold");
    untold(t.b(), &["flags", "add", "-u", user, "\\Flagged planted", "mailbox", "INBOX", "uid", "1"]);
    let flags = |snapshot: &Snapshot| snapshot.messages("INBOX").first().map_or(0, |message| message.flags.len());
    wait_until(BY_ITSELF, "a has what differed", || {
        let snapshot = Snapshot::take(t.a(), user, false);
        snapshot.messages("INBOX").len() == 4 && flags(&snapshot) == 2
    });
    let progress = table(&t.a().doveadm(&["-f", "tab", "dovetail", "progress"])).collect::<Vec<_>>();
    assert_eq!((progress[1]["state"].as_str(), progress[1]["users"].as_str()), ("background", "1"));
    std::thread::scope(|scope| {
        for server in t.servers() {
            scope.spawn(move || {
                (1..=20).for_each(|n| server.deliver(user, &mail(&format!("{n} on {}", server.name()))))
            });
        }
    });
    assert_eq!(t.settled().messages("INBOX").len(), 44);
    are_equal(&t, &["compare", "-u", user]);
}

/// Beside Dovecot's back, in the mail's own file.
fn change_body(server: &Server, user: &str, from: &str, to: &str) {
    fn change_below(folder: &Path, from: &[u8], to: &[u8]) -> usize {
        let mut changed = 0;
        for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry")) {
            if entry.file_type().expect("its kind").is_dir() {
                changed += change_below(&entry.path(), from, to);
                continue;
            }
            let bytes = fs::read(entry.path()).expect("a file");
            if let Some(at) = bytes.windows(from.len()).position(|bytes| bytes == from) {
                let file = fs::File::options().write(true).open(entry.path()).expect("a mail's file");
                file.write_all_at(to, at as u64).expect("write");
                changed += 1;
            }
        }
        changed
    }
    assert_eq!(from.len(), to.len());
    let home = server.outside(&format!("/home/{user}"));
    assert_eq!(change_below(&home, from.as_bytes(), to.as_bytes()), 1, "{from}");
}

/// How many mails in INBOX have that in them.
fn with_text(server: &Server, user: &str, text: &str) -> usize {
    server.doveadm(&["search", "-u", user, "mailbox", "INBOX", "body", text]).lines().count()
}

stories! {
    fn a_body_that_differs_is_found_and_both_stay(t) {
        let user = t.user.as_str();
        ["one", "two", "three"].iter().for_each(|subject| t.here().deliver(user, &mail(subject)));
        t.here().imap(user).select("INBOX").ok("STORE 2 +FLAGS (\\Seen work)");
        let before = t.settled();
        change_body(t.there(), user, "Hello from two", "Jello from two");
        are_equal(t, &["compare", "-u", user]);
        let only: BTreeSet<String> = ["INBOX body 2".to_owned()].into();
        for server in t.servers() {
            assert_eq!(words(server, &["compare", "-b", "-u", user]), only, "compared by {}", server.name());
        }
        assert_eq!(words(t.here(), &["resync", "-b", "-n", "-u", user]), only);
        assert_eq!(words(t.here(), &["resync", "-b", "-u", user]), only);
        let after = t.settled();
        are_equal(t, &["compare", "-b", "-u", user]);
        are_equal(t, &["compare", "-u", user]);
        for server in t.servers() {
            let texts = ["Hello from one", "Hello from two", "Jello from two", "Hello from three"];
            assert_eq!(texts.map(|text| with_text(server, user, text)), [1; 4], "{}", server.name());
        }
        let [_, second, _] = before.messages("INBOX")[..] else { panic!("{before:?}") };
        let after: Vec<_> = after.mailboxes["INBOX"].messages.iter().collect();
        let [(1, _), (3, _), ours, theirs] = after[..] else { panic!("{after:?}") };
        for (uid, apart) in [ours, theirs] {
            assert_eq!((&apart.flags, &apart.received), (&second.flags, &second.received));
            assert!(apart.guid != second.guid && *uid > 3);
        }
        // It is over.
        t.there().deliver(user, &mail("four"));
        assert_eq!(t.settled().messages("INBOX").len(), 5);
    }

    fn formats_keep_the_same_body_in_different_ways_and_it_is_the_same(t) {
        let user = t.user.as_str();
        t.here().deliver(user, &mail("by LMTP"));
        let mut imap = t.here().imap(user);
        imap.append("INBOX", &mail("by IMAP"));
        imap.append("INBOX", b"Subject: bare\n\none\ntwo\n\n");
        imap.append("INBOX", b"Subject: mixed\r\n\none\r\ntwo\nwithout an end");
        imap.append("INBOX", &mail_of_size(300_000));
        drop(imap);
        t.settled();
        are_equal(t, &["compare", "-b", "-u", user]);
    }
}

/// Each has something else, and all notice at once.
#[test]
fn three_bodies_that_differ_all_stay_also_when_workers_and_relays_are_killed() {
    let formats = [("a", Format::Sdbox), ("b", Format::Maildir), ("c", Format::Mdbox)];
    let t = Scene::on(Cluster::start(formats.map(|(name, format)| Setup::new(name, format)).into()), "story-bodies");
    ["killed with signal 9", "Peer ", "dovetail"].iter().for_each(|text| t.expects_in_log(text));
    let user = t.user.as_str();
    ["one", "two"].iter().for_each(|subject| t.servers()[0].deliver(user, &mail(subject)));
    t.settled();
    change_body(&t.servers()[1], user, "Hello from two", "Jello from two");
    change_body(&t.servers()[2], user, "Hello from two", "Cello from two");
    std::thread::scope(|scope| {
        for server in t.servers() {
            scope.spawn(|| server.try_doveadm(&["dovetail", "resync", "-b", "-u", user]));
        }
        wait_until(SOON, "the first is set apart", || {
            t.servers().iter().any(|server| with_text(server, user, "ello from") != 2)
        });
        for service in ["dovetail-worker", "dovetail", "dovetail-worker"] {
            t.servers().iter().for_each(|server| wait_until(SOON, "it runs", || server.kill(service) > 0));
        }
    });
    wait_for_connection(&t);
    t.converged_within(LOCKED, user);
    differences(&t.servers()[0], &["resync", "-b", "-u", user]);
    t.converged_within(LOCKED, user);
    are_equal(&t, &["compare", "-b", "-u", user]);
    for server in t.servers() {
        let texts = ["Hello from one", "Hello from two", "Jello from two", "Cello from two"];
        assert_eq!(texts.map(|text| with_text(server, user, text)), [1; 4], "{}", server.name());
    }
}
