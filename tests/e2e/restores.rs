//! State that is older than what others remember of it: a mailbox or a whole server restored from a backup, a log that lost its end
//! in a power failure, a machine that was cloned.

use std::fs;
use std::time::Duration;

use crate::cluster::backup::{copy, folder, Backup};
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, Scene, SOON};

/// What was noticed is compared after half a minute, for as long as it takes.
const BY_ITSELF: Duration = Duration::from_secs(150);

fn is_connected(server: &Server) -> bool {
    server.try_status().is_some_and(|status| status.peers.iter().all(|peer| peer.state == "connected"))
}

fn wait_for_connection(t: &Scene) {
    wait_until(BY_ITSELF, "the relays are connected", || t.servers().iter().all(is_connected));
}

fn nothing_is_listed(t: &Scene) -> bool {
    t.servers().iter().all(|server| {
        server.try_status().is_some_and(|status| status.counters.is_some_and(|c| c.failed == 0 && c.looking == 0))
    })
}

/// When all that was noticed is repaired.
fn repaired(t: &Scene) -> Snapshot {
    wait_until(BY_ITSELF, "nothing is to be compared any more", || nothing_is_listed(t));
    let snapshot = t.converged_within(BY_ITSELF, &t.user);
    for server in t.servers() {
        assert_eq!(server.doveadm(&["-f", "tab", "dovetail", "compare", "-u", &t.user]).lines().skip(1).count(), 0);
    }
    snapshot
}

fn guids(snapshot: &Snapshot, mailbox: &str) -> Vec<String> {
    let mut guids: Vec<String> = snapshot.messages(mailbox).iter().map(|message| message.guid.clone()).collect();
    guids.sort();
    guids
}

fn in_formats(formats: &[Format], name: &str, story: fn(&Scene)) {
    in_pairs(formats, name, |pair| pair, story);
}

fn in_pairs(formats: &[Format], name: &str, with: fn(Cluster) -> Cluster, story: fn(&Scene)) {
    for format in formats {
        let user = format!("story-{name}-{format:?}").to_lowercase();
        let t = Scene::on(with(Cluster::pair(*format, *format)), &user);
        for text in ["Peer ", "A server that connected as a peer", &user] {
            t.expects_in_log(text);
        }
        story(&t);
    }
}

/// Work and INBOX have five each; the third of Work is flagged.
fn begin(t: &Scene) {
    let mut imap = t.a().imap(&t.user);
    imap.ok("CREATE Work");
    for n in 1..=5 {
        imap.append("INBOX", &mail(&format!("inbox {n}")));
        imap.append("Work", &mail(&format!("work {n}")));
    }
    imap.select("Work").ok("STORE 3 +FLAGS (\\Flagged $Label)");
    t.settled();
}

/// And go on, on both servers; one of Work is expunged.
fn go_on(t: &Scene) -> Snapshot {
    let mut imap = t.a().imap(&t.user);
    (6..=7).for_each(|n| drop(imap.append("Work", &mail(&format!("work {n}")))));
    imap.append("INBOX", &mail("inbox 6"));
    let mut imap = imap.select("Work");
    imap.ok("STORE 1,4 +FLAGS (\\Seen late)");
    imap.ok("STORE 2 +FLAGS (\\Deleted)");
    imap.ok("EXPUNGE");
    drop(imap);
    t.settled();
    t.b().imap(&t.user).append("Work", &mail("work 8"));
    t.settled()
}

/// Nothing is lost, nothing is there twice, nothing that was expunged is back.
fn has_all(before: &Snapshot, after: &Snapshot) {
    for mailbox in ["INBOX", "Work"] {
        assert_eq!(guids(before, mailbox), guids(after, mailbox), "{mailbox}");
    }
    assert_eq!(before.mailboxes["INBOX"].messages, after.mailboxes["INBOX"].messages);
}

/// Not of an mdbox: its mails are where all mailboxes' are, and Dovecot makes it anew again and again then.
#[test]
fn a_single_mailbox_is_restored_from_a_copy() {
    in_formats(&[Format::Sdbox, Format::Maildir], "mailbox-restored", |t| {
        begin(t);
        let backup = Backup::of_mailbox(t.b(), &t.user, "Work");
        let before = go_on(t);
        t.b().stop();
        backup.restore();
        t.b().start();
        has_all(&before, &repaired(t));
        t.b().imap(&t.user).append("Work", &mail("new"));
        assert_eq!(t.settled().messages("Work").len(), 8);
    });
}

/// While all runs, and it is written to at once, by whoever does not know.
#[test]
fn a_single_mailbox_is_restored_under_a_running_relay_and_its_log_grows_again() {
    in_formats(&[Format::Sdbox, Format::Maildir], "restored-live", |t| {
        begin(t);
        let backup = Backup::of_mailbox(t.b(), &t.user, "Work");
        let before = go_on(t);
        backup.restore();
        let mut imap = t.b().imap(&t.user).select("Work");
        imap.ok("STORE 5 +FLAGS (\\Answered)");
        imap.append("Work", &mail("new on b"));
        drop(imap);
        let after = repaired(t);
        assert_eq!(guids(&before, "INBOX"), guids(&after, "INBOX"));
        let (before, after) = (guids(&before, "Work"), guids(&after, "Work"));
        assert!(before.iter().all(|guid| after.contains(guid)), "lost: {before:?}, {after:?}");
        assert_eq!(after.len(), 8, "and the new one");
    });
}

#[test]
fn a_log_has_lost_its_end_in_a_power_failure() {
    in_pairs(&[Format::Sdbox, Format::Maildir], "log-rolled-back", Cluster::without_save_dates, |t| {
        begin(t);
        let below = match t.b().format() {
            Format::Sdbox => "/dbox-Mails",
            _ => "",
        };
        let backup = Backup::of(t.b(), &format!("{}{below}", folder(t.b(), &t.user, "Work")));
        let before = go_on(t);
        // auth may outlive it for a moment.
        t.expects_in_log("anvil");
        t.b().kill_all();
        backup.restore_index();
        t.b().start();
        has_all(&before, &repaired(t));
    });
}

/// The machine was not started in between, but the relay is to believe it.
fn is_another_boot(server: &Server) {
    let journal = rusqlite::Connection::open(server.outside("/state/dovetail/journal.sqlite")).expect("the journal");
    let set = journal.execute("UPDATE meta SET value = 'before' WHERE key = 'boot'", []).expect("it is written");
    assert_eq!(set, 1);
}

/// What was applied has no sync of its own, neither in the mailbox's log nor in the journal, and who told it has forgotten it.
#[test]
fn a_log_and_what_the_relay_knew_of_it_have_lost_their_ends_in_a_power_failure() {
    in_pairs(&[Format::Sdbox, Format::Maildir], "both-rolled-back", Cluster::without_save_dates, |t| {
        begin(t);
        let below = match t.b().format() {
            Format::Sdbox => "/dbox-Mails",
            _ => "",
        };
        let index = Backup::of(t.b(), &format!("{}{below}", folder(t.b(), &t.user, "Work")));
        let state = Backup::of(t.b(), "/state/dovetail");
        let mut imap = t.a().imap(&t.user).select("Work");
        imap.ok("STORE 1,4 +FLAGS (\\Seen late)");
        imap.ok("STORE 2 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
        drop(imap);
        t.settled();
        t.b().imap(&t.user).select("Work").ok("STORE 4 +FLAGS (\\Answered)");
        let before = t.settled();
        t.expects_in_log("anvil");
        t.b().kill_all();
        index.restore_index();
        state.restore();
        is_another_boot(t.b());
        t.b().start();
        let after = repaired(t);
        assert_eq!(before.messages("Work"), after.messages("Work"));
        has_all(&before, &after);
    });
}

/// What all of a server is restored from: its mail, what its relay remembers, or one of them.
const ALL: [&str; 2] = ["/home", "/state"];

/// B, to which all is applied, is set back: what it has, it has from A.
fn a_server_is_restored(t: &Scene, what: &[&str]) {
    begin(t);
    t.a().imap(&t.user).ok("CREATE Old");
    t.settled();
    t.b().stop();
    let backups: Vec<Backup> = what.iter().map(|below| Backup::of(t.b(), below)).collect();
    t.b().start();
    wait_for_connection(t);
    let knows_names = what.contains(&"/state");
    if knows_names {
        t.a().imap(&t.user).ok("RENAME Old New");
    }
    let before = go_on(t);
    t.b().stop();
    backups.iter().for_each(Backup::restore);
    t.b().start();
    wait_for_connection(t);
    let after = repaired(t);
    has_all(&before, &after);
    assert_eq!(after.mailboxes.contains_key("New"), knows_names, "the later name holds, whoever compares first");
    assert_ne!(after.mailboxes.contains_key("Old"), knows_names);
    // Numbers that were given before are not taken for those.
    t.b().deliver(&t.user, &mail("new on b"));
    t.a().deliver(&t.user, &mail("new on a"));
    assert_eq!(t.settled().messages("INBOX").len(), 8);
}

fn peer_has_noticed(t: &Scene) {
    assert!(t.a().log().contains("Peer b: it has lost its state, or was set back"), "its peer has noticed");
}

fn both_have_noticed(t: &Scene) {
    assert!(t.b().log().contains("this server was set back"), "it has noticed");
    peer_has_noticed(t);
}

#[test]
fn a_whole_server_is_restored_from_last_week() {
    in_formats(&[Format::Sdbox, Format::Maildir, Format::Mdbox], "server-restored", |t| {
        a_server_is_restored(t, &ALL);
        both_have_noticed(t);
    });
}

#[test]
fn the_mail_of_a_server_is_restored_and_what_its_relay_knows_is_not() {
    in_formats(&[Format::Sdbox, Format::Maildir], "mail-restored", |t| a_server_is_restored(t, &["/home"]));
}

#[test]
fn what_a_relay_knows_is_restored_and_the_mail_is_not() {
    in_formats(&[Format::Sdbox, Format::Maildir], "state-restored", |t| {
        a_server_is_restored(t, &["/state"]);
        both_have_noticed(t);
    });
}

/// By clients of the server that is restored: its own log knows it no more, and those of its peers have it from a worker.
#[test]
fn what_was_expunged_on_the_server_that_is_restored_does_not_come_back() {
    in_formats(&[Format::Sdbox, Format::Maildir, Format::Mdbox], "expunged-there", |t| {
        begin(t);
        t.b().stop();
        let backups = ALL.map(|below| Backup::of(t.b(), below));
        t.b().start();
        wait_for_connection(t);
        let mut imap = t.b().imap(&t.user).select("Work");
        imap.ok("STORE 2 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
        imap.ok("MOVE 3 INBOX");
        drop(imap);
        t.settled();
        let before = go_on(t);
        t.b().stop();
        backups.iter().for_each(Backup::restore);
        t.b().start();
        wait_for_connection(t);
        let after = repaired(t);
        has_all(&before, &after);
        assert_eq!((after.messages("Work").len(), after.messages("INBOX").len()), (5, 7));
    });
}

/// Comparing deletes nothing.
#[test]
fn a_mailbox_that_was_deleted_since_the_backup_comes_back_with_its_mails() {
    in_formats(&[Format::Sdbox, Format::Maildir], "deleted-since", |t| {
        begin(t);
        t.a().imap(&t.user).ok("CREATE Gone");
        t.a().imap(&t.user).append("Gone", &mail("gone"));
        t.settled();
        t.b().stop();
        let backups = ALL.map(|below| Backup::of(t.b(), below));
        t.b().start();
        wait_for_connection(t);
        t.a().imap(&t.user).ok("DELETE Gone");
        let before = go_on(t);
        assert!(!before.mailboxes.contains_key("Gone"));
        t.b().stop();
        backups.iter().for_each(Backup::restore);
        t.b().start();
        wait_for_connection(t);
        let after = repaired(t);
        has_all(&before, &after);
        assert_eq!(after.messages("Gone").len(), 1);
    });
}

/// What its relay knew is gone, as on a new machine with the old one's disk of mails.
#[test]
fn a_server_without_its_state_is_compared_by_itself() {
    in_formats(&[Format::Sdbox, Format::Maildir], "state-lost", |t| {
        begin(t);
        t.b().stop();
        t.a().imap(&t.user).append("Work", &mail("work 6"));
        fs::remove_dir_all(t.b().outside("/state/dovetail")).expect("what the relay knows");
        t.b().start();
        wait_for_connection(t);
        assert_eq!(repaired(t).messages("Work").len(), 6);
        // It cannot know that there was something.
        peer_has_noticed(t);
    });
}

/// What users have deleted comes back only if somebody wants it.
#[test]
fn mails_of_a_backup_that_are_imported_are_new() {
    in_formats(&[Format::Sdbox], "imported", |t| {
        begin(t);
        let user = t.user.as_str();
        let backup = Backup::of(t.b(), "/home");
        t.a().doveadm(&["expunge", "-u", user, "mailbox", "Work", "all"]);
        t.a().doveadm(&["expunge", "-u", user, "mailbox", "INBOX", "uid", "1:3"]);
        t.settled();
        let path = backup.kept.strip_prefix(t.b().outside("")).expect("it is below").to_string_lossy().into_owned();
        let location = format!("sdbox:{}/{path}/{user}/sdbox", t.b().dir());
        t.b().doveadm(&["import", "-u", user, &location, "", "mailbox", "Work"]);
        let snapshot = t.settled();
        assert_eq!((snapshot.messages("Work").len(), snapshot.messages("INBOX").len()), (5, 2));
    });
}

/// A, who connects to B. The clone has another folder, and ports of its own.
#[test]
fn two_servers_of_one_name_are_refused_until_a_person_decides() {
    let setup = |name, peer| Setup::new(name, Format::Sdbox).only_with(&[peer]);
    let twin = setup("twin", "b").extra("plugin {\n  dovetail_server = a\n}\n", "dovetail_server = a\n");
    let t = Scene::on(Cluster::start(vec![setup("a", "b"), setup("b", "a"), twin]), "story-cloned");
    for text in ["Peer ", "A server that connected as a peer", "story-cloned"] {
        t.expects_in_log(text);
    }
    let [a, b, twin] = t.servers() else { panic!("three servers") };
    let user = t.user.as_str();
    let state = |server: &Server| {
        let status = server.try_status().unwrap_or_default();
        status.peers.first().map(|peer| (peer.state.clone(), peer.last_error.clone())).unwrap_or_default()
    };
    twin.stop();
    wait_until(BY_ITSELF, "a and b are connected", || [a, b].into_iter().all(is_connected));
    a.deliver(user, &mail("first"));
    wait_until(SOON, "b has it", || a.has_nothing_pending());

    // Given a copy of all that a is.
    a.stop();
    for below in ALL {
        fs::remove_dir_all(twin.outside(below)).expect("what was there");
        copy(&a.outside(below), &twin.outside(below));
    }
    a.start();
    wait_until(BY_ITSELF, "a and b are connected", || [a, b].into_iter().all(is_connected));

    // When it runs beside a.
    twin.start();
    wait_until(BY_ITSELF, "b says it", || state(b).0 == "disputed");
    assert!(state(b).1.contains("doveadm dovetail peer accept a"), "{}", state(b).1);
    for server in [a, twin] {
        wait_until(BY_ITSELF, "it is refused", || state(server).0 == "refused");
        wait_until(BY_ITSELF, "it says why", || state(server).1.contains("two servers call themselves a"));
    }
    let said = b.log().matches("Until then nothing is replicated with either").count();
    assert_eq!(said, 1, "the log says it once");
    b.kill("dovetail");
    t.expects_in_log("killed with signal 9");
    wait_until(SOON, "the next relay says it, too", || state(b).0 == "disputed");
    a.deliver(user, &mail("while nobody listens"));

    // Then a person decides.
    twin.stop();
    assert_ne!(b.try_doveadm(&["dovetail", "peer", "accept", "nobody"]).status.code(), Some(0));
    b.doveadm(&["dovetail", "peer", "accept", "a"]);
    wait_until(BY_ITSELF, "a and b are connected", || [a, b].into_iter().all(is_connected));
    b.deliver(user, &mail("after"));
    for server in [a, b] {
        wait_until(SOON, "it has all", || Snapshot::take(server, user, false).messages("INBOX").len() == 3);
    }
}
