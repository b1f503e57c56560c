//! Trouble on the receiving side: its user waits with the reason in the status, others go on, and it resumes by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cluster::imap::Appended;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, mail_of_size, Scene, SOON};

/// For what has been refused some times: the pauses between the tries grow.
const DEADLINE: Duration = Duration::from_secs(90);

/// The reason for which something waits at A for B.
fn reason(t: &Scene) -> String {
    t.a().status()[0]["last_error"].clone()
}

fn wait_for_reason(t: &Scene, parts: &[&str]) {
    wait_until(DEADLINE, &format!("A's status says {parts:?}"), || {
        let reason = reason(t);
        parts.iter().all(|part| reason.contains(part))
    });
}

fn another_goes_on(t: &Scene, other: &str) {
    t.a().deliver(other, &mail("for another"));
    wait_until(SOON, "the mail for another is on B", || t.b().has_inbox(other));
    wait_until(SOON, "B shows it", || t.b().imap(other).select("INBOX").uids().len() == 1);
}

/// Everything is on both servers, each message once.
fn all_arrives(t: &Scene, inbox: usize) {
    let snapshot = t.converged_within(DEADLINE, &t.user);
    let guids: BTreeSet<&str> = snapshot.messages("INBOX").iter().map(|message| message.guid.as_str()).collect();
    assert_eq!((snapshot.messages("INBOX").len(), guids.len()), (inbox, inbox));
    wait_until(SOON, "nothing is pending and no reason is left", || {
        let peer = &t.a().status()[0];
        peer["pending"] == "0" && peer["last_error"].is_empty()
    });
    for server in t.servers() {
        assert_eq!(server.status()[0]["failed"], "0", "on {}", server.name());
    }
}

#[test]
fn a_user_whom_the_peer_does_not_know_waits_with_the_reason_and_arrives_when_he_is_added() {
    let other = "story-unknown-there-other";
    let b = Setup::new("b", Format::Sdbox).only_user(other);
    let t = Scene::on(Cluster::start(vec![Setup::new("a", Format::Sdbox), b]), "story-unknown-there");
    t.expects_in_log("unknown here");
    (1..=3).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    let mut imap = t.a().imap(&t.user);
    imap.ok("CREATE Work");
    imap.append("Work", &mail("in Work"));
    let mut imap = imap.select("INBOX");
    imap.ok("STORE 1 +FLAGS (\\Seen kept)");
    imap.ok("STORE 2 +FLAGS (\\Deleted)");
    imap.ok("EXPUNGE");
    wait_for_reason(&t, &[&t.user, "unknown"]);
    another_goes_on(&t, other);
    wait_for_reason(&t, &[&t.user, "unknown"]);

    t.b().add_user(&t.user);
    all_arrives(&t, 2);
    assert_eq!(t.settled().messages("Work").len(), 1);
    // And the other way.
    t.b().deliver(&t.user, &mail("from b"));
    all_arrives(&t, 3);
}

/// A file that another process has locked; not any more when this is dropped.
struct Locked(#[expect(dead_code, reason = "the lock goes with it")] File);

impl Locked {
    fn hold(path: &Path) -> Locked {
        let file = File::options().read(true).write(true).open(path).expect("a file to lock");
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        wait_until(SOON, "the file can be locked", || {
            // SAFETY: both are alive. A lock of the open file: other tests of this process may open and close it.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0 }
        });
        Locked(file)
    }
}

/// A lock that is a file.
struct DotLocked(PathBuf);

impl DotLocked {
    fn hold(path: PathBuf) -> DotLocked {
        let hostname = fs::read_to_string("/proc/sys/kernel/hostname").expect("the host's name");
        // Dovecot respects it as long as this process lives.
        let holder = format!("{}:{}", std::process::id(), hostname.trim_end());
        wait_until(SOON, "the lock is nobody's", || {
            File::create_new(&path).is_ok_and(|mut file| file.write_all(holder.as_bytes()).is_ok())
        });
        DotLocked(path)
    }
}

impl Drop for DotLocked {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn in_home(server: &Server, user: &str, path: &str) -> PathBuf {
    server.outside(&format!("/home/{user}/{path}"))
}

fn a_lock_that_another_process_holds<L>(format: Format, user: &str, hold: impl Fn(&Scene) -> L) {
    let t = Scene::on(Cluster::pair(format, format), user);
    t.expects_in_log(user);
    t.a().deliver(user, &mail("first"));
    t.settled();
    let lock = hold(&t);
    t.a().deliver(user, &mail("second"));
    t.a().imap(user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen)");
    another_goes_on(&t, &format!("{user}-other"));
    wait_for_reason(&t, &[user, "mailbox INBOX", "Timeout"]);
    drop(lock);
    all_arrives(&t, 2);
}

#[test]
fn a_mailbox_that_is_locked_on_the_peer_holds_up_its_user_only_and_resumes_sdbox() {
    a_lock_that_another_process_holds(Format::Sdbox, "story-locked-sdbox", |t| {
        Locked::hold(&in_home(t.b(), &t.user, "sdbox/mailboxes/INBOX/dbox-Mails/dovecot.index.log"))
    });
}

/// A try may take long: here as long as the worker waits for the lock.
#[test]
fn the_reason_stays_in_the_status_while_what_was_refused_is_tried_again() {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), "story-tried-again");
    t.expects_in_log(&t.user);
    t.a().deliver(&t.user, &mail("first"));
    t.settled();
    let lock = Locked::hold(&in_home(t.b(), &t.user, "sdbox/mailboxes/INBOX/dbox-Mails/dovecot.index.log"));
    t.a().deliver(&t.user, &mail("second"));
    wait_for_reason(&t, &[&t.user, "Timeout"]);
    let tries = t.b().counters().refused;
    wait_until(DEADLINE, "it was tried once more", || {
        let reason = reason(&t);
        assert!(reason.contains(&t.user), "the reason is not in the status: {reason:?}");
        t.b().counters().refused > tries
    });
    drop(lock);
    all_arrives(&t, 2);
}

#[test]
fn a_mailbox_that_is_locked_on_the_peer_holds_up_its_user_only_and_resumes_mdbox() {
    a_lock_that_another_process_holds(Format::Mdbox, "story-locked-mdbox", |t| {
        Locked::hold(&in_home(t.b(), &t.user, "mdbox/mailboxes/INBOX/dbox-Mails/dovecot.index.log"))
    });
}

#[test]
fn a_map_that_is_locked_on_the_peer_holds_up_its_user_only_and_resumes() {
    a_lock_that_another_process_holds(Format::Mdbox, "story-locked-map", |t| {
        Locked::hold(&in_home(t.b(), &t.user, "mdbox/storage/dovecot.map.index.log"))
    });
}

#[test]
fn a_mailbox_that_is_locked_on_the_peer_holds_up_its_user_only_and_resumes_maildir() {
    a_lock_that_another_process_holds(Format::Maildir, "story-locked-maildir", |t| {
        DotLocked::hold(in_home(t.b(), &t.user, "Maildir/dovecot-uidlist.lock"))
    });
}

/// Before anybody has heard that there are locks.
#[test]
fn users_whose_maildirs_are_locked_in_one_moment_do_not_hold_all_of_the_peers_workers() {
    let t = Scene::on(Cluster::pair(Format::Maildir, Format::Maildir), "story-locked-at-once-0");
    t.expects_in_log("story-locked-at-once");
    // More than there are workers.
    let users: Vec<String> = (0..5).map(|n| format!("story-locked-at-once-{n}")).collect();
    for user in &users {
        t.a().deliver(user, &mail("first"));
        t.converged(user);
    }
    let locks: Vec<DotLocked> =
        users.iter().map(|user| DotLocked::hold(in_home(t.b(), user, "Maildir/dovecot-uidlist.lock"))).collect();
    users.iter().for_each(|user| t.a().deliver(user, &mail("second")));
    wait_until(SOON, "they are being applied", || t.a().status()[0]["pending"] == "5");
    // As long as Dovecot waits for one lock, less than it waits with it for a maildir.
    another_goes_on(&t, "story-locked-at-once-other");
    wait_until(DEADLINE, "all of them wait", || {
        let waiting = t.a().doveadm(&["-f", "tab", "dovetail", "waiting"]);
        users.iter().all(|user| waiting.lines().any(|line| line.starts_with(&format!("{user}\tb\tsend\t"))))
    });
    drop(locks);
    users.iter().for_each(|user| assert_eq!(t.converged_within(DEADLINE, user).messages("INBOX").len(), 2));
    all_arrives(&t, 2);
}

/// A try takes as long as Dovecot waits for the lock, some times.
#[test]
fn users_whose_maildirs_are_locked_on_the_peer_do_not_hold_all_of_its_workers() {
    let t = Scene::on(Cluster::pair(Format::Maildir, Format::Maildir), "story-locked-some-0");
    t.expects_in_log("story-locked-some");
    // As many as there are workers.
    let users: Vec<String> = (0..3).map(|n| format!("story-locked-some-{n}")).collect();
    for user in &users {
        t.a().deliver(user, &mail("first"));
        t.converged(user);
    }
    let locks: Vec<DotLocked> =
        users.iter().map(|user| DotLocked::hold(in_home(t.b(), user, "Maildir/dovecot-uidlist.lock"))).collect();
    users.iter().for_each(|user| t.a().deliver(user, &mail("second")));
    wait_until(DEADLINE, "all of them wait", || {
        let waiting = t.a().doveadm(&["-f", "tab", "dovetail", "waiting"]);
        users.iter().all(|user| waiting.lines().any(|line| line.starts_with(&format!("{user}\tb\tsend\t"))))
    });
    let tries = t.b().counters().refused;
    another_goes_on(&t, "story-locked-some-other");
    wait_until(DEADLINE, "they were tried again", || t.b().counters().refused > tries);
    another_goes_on(&t, "story-locked-some-third");
    drop(locks);
    users.iter().for_each(|user| assert_eq!(t.converged_within(DEADLINE, user).messages("INBOX").len(), 2));
    all_arrives(&t, 2);
}

/// The status has one row for each peer, with one reason.
#[test]
fn of_two_users_who_wait_the_status_names_who_waits_longer_and_then_the_other() {
    let (unknown, unwritable) = ("story-two-wait-unknown", "story-two-wait-unwritable");
    let b = Setup::new("b", Format::Sdbox).only_user(unwritable);
    let t = Scene::on(Cluster::start(vec![Setup::new("a", Format::Sdbox), b]), unknown);
    t.expects_in_log("story-two-wait");
    t.a().deliver(unwritable, &mail("first"));
    t.converged(unwritable);
    t.a().deliver(unknown, &mail("waits longer"));
    wait_for_reason(&t, &[unknown, "unknown here"]);
    let home = in_home(t.b(), unwritable, "");
    std::os::unix::fs::chown(&home, Some(0), None).expect("chown");
    t.a().deliver(unwritable, &mail("waits"));
    t.b().wait_for_log(&format!("User {unwritable}: change"));
    wait_for_reason(&t, &[unknown, "unknown here", "(and 1 other user waits)"]);
    for format in ["flow", "table", "tab", "json"] {
        let waiting = t.a().doveadm(&["-f", format, "dovetail", "waiting"]);
        for part in [unknown, unwritable, "unknown here", "mailbox INBOX", "next_try"] {
            assert!(waiting.contains(part), "{format}: {waiting}");
        }
    }

    t.b().add_user(unknown);
    wait_for_reason(&t, &[unwritable, "mailbox INBOX"]);
    std::os::unix::fs::chown(&home, Some(8), None).expect("chown");
    t.converged_within(DEADLINE, unwritable);
    all_arrives(&t, 1);
}

/// `struct mail_transaction_log_header`.
const LOG_HEADER: usize = 40;

fn is_open(path: &Path) -> bool {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let files = processes.flat_map(|process| fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten());
    files.flat_map(|file| fs::read_link(file.path())).any(|file| file == path)
}

/// All of it but the first bytes of the log, when no process has it open.
fn overwrite_index(folder: &Path, name: &str, kept: usize) {
    for (name, kept) in [(format!("{name}.log"), kept), (name.to_owned(), 0)] {
        let path = folder.join(name);
        wait_until(DEADLINE, &format!("nobody has {} open", path.display()), || !is_open(&path));
        // Without much in the log there is no other file yet.
        let Ok(mut bytes) = fs::read(&path) else { continue };
        let garbage = b"this is no index\n".iter().cycle();
        bytes.iter_mut().zip(garbage).skip(kept).for_each(|(byte, garbage)| *byte = *garbage);
        fs::write(&path, bytes).expect("write");
    }
}

/// Of the messages in the INBOX; none while Dovecot cannot open it.
fn guids(server: &Server, user: &str) -> Vec<String> {
    let guids = |snapshot: Snapshot| snapshot.messages("INBOX").iter().map(|message| message.guid.clone()).collect();
    Snapshot::try_take(server, user, false).map(guids).unwrap_or_default()
}

/// A dbox's index is all that it knows of its mails: Dovecot makes a new one, without them or without their flags.
fn an_index_that_is_overwritten(format: Format, user: &str, kept: usize) {
    let t = Scene::on(Cluster::pair(format, format), user);
    for text in [user, "dovetail"] {
        t.expects_in_log(text);
    }
    (1..=3).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.settled();
    let folder = match format {
        Format::Sdbox => "sdbox/mailboxes/INBOX/dbox-Mails",
        _ => "mdbox/mailboxes/INBOX/dbox-Mails",
    };
    overwrite_index(&in_home(t.b(), user, folder), "dovecot.index", kept);

    (4..=5).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    wait_until(DEADLINE, "B's list of what failed has the mailbox", || {
        let failed = t.b().doveadm(&["-f", "tab", "dovetail", "failed"]);
        failed.lines().any(|line| line.contains(user) && line.contains("mailbox INBOX: its index was made anew"))
    });
    // It goes on, both ways, and comes to an end. Dovecot's rebuild of an mdbox takes a mail that is in its file and not yet in
    // the map for a lost one, so that a mail that is saved just then is there twice, also without us: B gets its own afterwards.
    t.a().deliver(user, &mail("mail 6"));
    wait_until(DEADLINE, "A's new mails are on B", || {
        let [a, b] = [t.a(), t.b()].map(|server| guids(server, user));
        a.len() == 6 && a[3..].iter().all(|guid| b.contains(guid))
    });
    wait_until(DEADLINE, "nothing is left to do", || t.servers().iter().all(Server::has_nothing_pending));
    t.b().deliver(user, &mail("mail 7"));
    wait_until(DEADLINE, "new mails are on both servers", || {
        let [a, b] = [t.a(), t.b()].map(|server| guids(server, user));
        a.len() == 7 && [3, 4, 5, 6].iter().all(|at| b.contains(&a[*at])) && b.iter().all(|guid| a.contains(guid))
    });
    wait_until(DEADLINE, "nothing is left to do", || t.servers().iter().all(Server::has_nothing_pending));
    for server in t.servers() {
        let guids = guids(server, user);
        let distinct: BTreeSet<_> = guids.iter().collect();
        assert_eq!(distinct.len(), guids.len(), "a mail is on {} twice: {guids:?}", server.name());
    }
    assert_eq!((guids(t.a(), user).len(), t.b().status()[0]["failed"].as_str()), (7, "1"));

    // Messages that a rebuild of an mdbox finds again get other UIDs.
    t.b().doveadm(&["force-resync", "-u", user, "INBOX"]);
    wait_until(DEADLINE, "all mails are on both servers, each once", || {
        let [mut a, mut b] = [t.a(), t.b()].map(|server| guids(server, user));
        a.sort();
        b.sort();
        a.len() == 7 && a == b
    });
}

#[test]
fn an_index_that_is_overwritten_on_the_peer_is_no_silent_loss_sdbox() {
    an_index_that_is_overwritten(Format::Sdbox, "story-overwritten-sdbox", 0);
}

#[test]
fn an_index_that_is_overwritten_on_the_peer_is_no_silent_loss_mdbox() {
    an_index_that_is_overwritten(Format::Mdbox, "story-overwritten-mdbox", 0);
}

#[test]
fn a_log_that_is_overwritten_behind_its_header_on_the_peer_is_no_silent_loss_sdbox() {
    an_index_that_is_overwritten(Format::Sdbox, "story-header-sdbox", LOG_HEADER);
}

#[test]
fn a_log_that_is_overwritten_behind_its_header_on_the_peer_is_no_silent_loss_mdbox() {
    an_index_that_is_overwritten(Format::Mdbox, "story-header-mdbox", LOG_HEADER);
}

fn a_map_that_is_overwritten(user: &str, kept: usize) {
    let t = Scene::on(Cluster::pair(Format::Mdbox, Format::Mdbox), user);
    // Dovecot closes a map's index whose log it cannot read, but not the view (mdbox_map_open_internal()).
    for text in [user, "dovetail", "Panic: Leaked view for index", "killed with signal 6"] {
        t.expects_in_log(text);
    }
    (1..=3).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.a().imap(user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen kept)");
    t.settled();
    overwrite_index(&in_home(t.b(), user, "mdbox/storage"), "dovecot.map.index", kept);
    (4..=5).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.a().imap(user).select("INBOX").ok("STORE 2 +FLAGS (\\Seen)");
    all_arrives(&t, 5);
    t.b().deliver(user, &mail("mail 6"));
    all_arrives(&t, 6);
}

/// Dovecot makes a map anew from the mails' files, and with it the indexes.
#[test]
fn a_map_that_is_overwritten_on_the_peer_loses_no_mail() {
    a_map_that_is_overwritten("story-map", 0);
}

#[test]
fn a_maps_log_that_is_overwritten_behind_its_header_on_the_peer_loses_no_mail() {
    a_map_that_is_overwritten("story-map-header", LOG_HEADER);
}

/// More than the last pages of its files have room for: flags and keywords of what is there, and a mail.
fn a_disk_that_is_full_on_the_peer(format: Format, user: &str) {
    let setups = vec![Setup::new("a", format), Setup::new("b", format).on_small_disks()];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log(user);
    (1..=3).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.settled();
    t.b().fill("home", 0);
    let mut imap = t.a().imap(user).select("INBOX");
    for n in 0..60 {
        imap.ok(&format!("STORE 1 +FLAGS (keyword-{})", n % 20));
        imap.ok(&format!("STORE 2 +FLAGS (\\Seen keyword-{})", n % 3));
        imap.ok("STORE 2 -FLAGS (\\Seen)");
    }
    t.a().deliver(user, &mail_of_size(20_000));
    wait_for_reason(&t, &[user, "mailbox INBOX"]);
    t.b().free("home");
    all_arrives(&t, 4);
    // Maildir's letters stand for the same keywords as before.
    let keywords = |count: usize| (0..count).map(|n| format!("keyword-{n}")).collect::<BTreeSet<_>>();
    let inbox = t.converged(user);
    let flags: Vec<BTreeSet<_>> =
        inbox.messages("INBOX").iter().map(|message| message.flags.iter().cloned().collect()).collect();
    assert_eq!(flags, [keywords(20), keywords(3), keywords(0), keywords(0)]);
}

#[test]
fn a_disk_that_is_full_on_the_peer_keeps_its_user_waiting_with_the_reason_sdbox() {
    a_disk_that_is_full_on_the_peer(Format::Sdbox, "story-full-sdbox");
}

#[test]
fn a_disk_that_is_full_on_the_peer_keeps_its_user_waiting_with_the_reason_mdbox() {
    a_disk_that_is_full_on_the_peer(Format::Mdbox, "story-full-mdbox");
}

#[test]
fn a_disk_that_is_full_on_the_peer_keeps_its_user_waiting_with_the_reason_maildir() {
    a_disk_that_is_full_on_the_peer(Format::Maildir, "story-full-maildir");
}

/// Dovecot marks a mailbox as deleted before it does it. Nobody can open it then, and after five minutes Dovecot brings it back.
#[test]
fn a_deletion_that_has_no_room_on_the_peer_is_done_when_there_is_some() {
    let user = "story-full-delete";
    let setups = vec![Setup::new("a", Format::Sdbox), Setup::new("b", Format::Maildir).on_small_disks()];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log(user);
    t.a().deliver(user, &mail("first"));
    t.a().imap(user).ok("CREATE Work");
    t.settled();
    t.b().fill("home", 0);
    t.a().imap(user).ok("DELETE Work");
    // It may do with the room that is left in some file.
    let is_gone = || !in_home(t.b(), user, "Maildir/.Work").exists();
    wait_until(DEADLINE, "A's status says it", || reason(&t).contains("mailbox Work") || is_gone());
    t.b().free("home");
    wait_until(DEADLINE, "it is gone on B", is_gone);
    all_arrives(&t, 1);
}

/// What Dovecot goes on with in memory is not on the peer alone in the end.
#[test]
fn what_a_session_does_in_memory_while_its_disk_is_full_makes_no_difference() {
    let user = "story-full-memory";
    let setups = vec![Setup::new("a", Format::Maildir).on_small_disks(), Setup::new("b", Format::Sdbox)];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log("No space left");
    (1..=12).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.settled();
    let mut imap = t.a().imap(user).select("INBOX");
    t.a().fill("home", 0);
    for _ in 0..20 {
        imap.ok("UID STORE 5 +FLAGS (\\Seen)");
        imap.ok("UID STORE 5 -FLAGS (\\Seen)");
    }
    imap.ok("UID STORE 2,12 +FLAGS (\\Deleted)");
    imap.ok("EXPUNGE");
    t.a().free("home");
    imap.ok("LOGOUT");
    assert_eq!(t.converged_within(DEADLINE, user).messages("INBOX").len(), 10);
}

/// What comes in with the sync that finds messages gone may be those messages, under other UIDs.
#[test]
fn what_a_session_expunges_in_memory_does_not_come_back_with_the_mail_that_follows() {
    let user = "story-full-expunges";
    let setups = vec![Setup::new("a", Format::Maildir).on_small_disks(), Setup::new("b", Format::Sdbox)];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log("No space left");
    (1..=12).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    let mut imap = t.a().imap(user).select("INBOX");
    imap.ok("CREATE Work");
    imap.ok("UID COPY 7 INBOX");
    t.settled();
    t.a().fill("home", 0);
    for _ in 0..20 {
        imap.ok("UID STORE 5 +FLAGS (\\Seen)");
        imap.ok("UID STORE 5 -FLAGS (\\Seen)");
    }
    t.a().free("home");
    imap.ok("UID STORE 2,7,12 +FLAGS (\\Deleted)");
    imap.append("INBOX", &mail("the next one"));
    imap.ok("EXPUNGE");
    imap.ok("UID MOVE 4 Work");
    imap.ok("LOGOUT");
    let snapshot = t.converged_within(DEADLINE, user);
    // The copy of 7 is one.
    assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Work").len()), (10, 1));
}

/// That messages were given other UIDs does not mean those of which there was a copy.
#[test]
fn a_copy_made_in_memory_stays_apart_though_messages_seem_to_have_other_uids() {
    let user = "story-full-copy";
    let setups = vec![Setup::new("a", Format::Maildir).on_small_disks(), Setup::new("b", Format::Sdbox)];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log(user);
    (1..=6).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    let mut files = fs::read_dir(in_home(t.a(), user, "Maildir/new")).expect("its files").flatten();
    let file_of_6 = files.find(|file| fs::read_to_string(file.path()).is_ok_and(|text| text.contains("mail 6")));
    let file_of_6 = file_of_6.expect("six mails").file_name().into_string().expect("a name");
    t.settled();
    let mut imap = t.a().imap(user).select("INBOX");
    t.a().fill("home", 0);
    for _ in 0..20 {
        imap.ok("UID STORE 5 +FLAGS (\\Seen)");
        imap.ok("UID STORE 5 -FLAGS (\\Seen)");
    }
    t.a().free("home");
    let in_cur = in_home(t.a(), user, "Maildir/cur").join(format!("{file_of_6}:2,"));
    fs::remove_file(in_cur).expect("remove");
    imap.ok("UID COPY 3 INBOX");
    imap.ok("LOGOUT");
    let snapshot = t.converged_within(DEADLINE, user);
    let guids: BTreeSet<&str> = snapshot.messages("INBOX").iter().map(|message| message.guid.as_str()).collect();
    assert_eq!(snapshot.messages("INBOX").len(), guids.len() + 1, "one is there twice");
}

/// Dovecot deletes a mailbox's mails first: asks for it in the log, and then does it. Who syncs next does what was asked for.
#[test]
fn a_deletion_that_has_no_room_after_it_asked_for_its_expunges_is_no_difference() {
    let user = "story-full-deletion";
    let setups = vec![Setup::new("a", Format::Sdbox).on_small_disks(), Setup::new("b", Format::Sdbox)];
    let t = Scene::on(Cluster::start(setups), user);
    // Dovecot 2.3 panics when it closes an sdbox to which it could not write, in workers that look, too.
    for text in
        ["No space left", user, "a worker went away in mid-job", "Panic: Leaked view for index", "killed with signal 6"]
    {
        t.expects_in_log(text);
    }
    t.a().deliver(user, &mail("first"));
    let mailboxes = ["x1", "x2", "x3"];
    let mut imap = t.a().imap(user);
    for mailbox in mailboxes {
        imap.ok(&format!("CREATE {mailbox}"));
        for n in 1..=3 {
            imap.append(mailbox, &mail(&format!("mail {n}")));
        }
    }
    t.settled();
    // What is asked for takes 68 bytes.
    for (mailbox, room) in mailboxes.iter().zip([70..100, 100..130, 130..160]) {
        let log = in_home(t.a(), user, &format!("sdbox/mailboxes/{mailbox}/dbox-Mails/dovecot.index.log"));
        let has_room = (0..1_000).any(|_| {
            for command in
                [&format!("SELECT {mailbox}"), "STORE 1 +FLAGS (\\Seen)", "STORE 1 -FLAGS (\\Seen)", "UNSELECT"]
            {
                imap.ok(command);
            }
            room.contains(&(4096 - fs::metadata(&log).expect("its log").len() % 4096))
        });
        assert!(has_room, "the last page of {mailbox}'s log never has {room:?} bytes left");
    }
    t.a().fill("home", 0);
    let answers = mailboxes.map(|mailbox| imap.command(&format!("DELETE {mailbox}")));
    t.a().free("home");
    let left = mailboxes.map(|mailbox| t.a().imap(user).command(&format!("EXAMINE {mailbox}")).exists());
    assert!(left.contains(&Some(0)), "no deletion came so far: {left:?}, {answers:?}");
    assert_eq!(t.converged_within(DEADLINE, user).messages("INBOX").len(), 1);
}

/// Without us this ends with an empty mailbox, and files that nobody finds.
#[test]
fn a_maildir_whose_list_of_uids_cannot_be_written_takes_no_mail_for_expunged() {
    let user = "story-full-uidlist";
    let setups = vec![Setup::new("a", Format::Maildir).on_small_disks(), Setup::new("b", Format::Sdbox)];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log(user);
    // maildir_save_sync_index() has an assertion for a list of UIDs that it could not make.
    for text in ["Panic: file maildir-save.c", "killed with signal 6"] {
        t.expects_in_log(text);
    }
    let mut there = 0;
    let (mut seen, mut asked_for) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..8 {
        (1..=12).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
        there += 12;
        let mut imap = t.a().imap(user).select("INBOX");
        let mut uids = imap.uids();
        let guids = imap.ok("UID FETCH 1:* X-GUID").lines();
        let guids: BTreeMap<u32, String> = guids.iter().filter_map(|line| uid_and_guid(line)).collect();
        seen.extend(guids.values().cloned());
        t.a().fill("home", 0);
        let mut told = 0;
        for _ in 0..6 {
            let uid = uids.remove((round * 3 + 1) % uids.len());
            let asked = [format!("UID STORE {uid} +FLAGS (\\Deleted)"), format!("UID EXPUNGE {uid}"), "NOOP".into()];
            let answers = asked.map(|command| imap.try_command(&command));
            let lines = answers.iter().flatten().flat_map(|answer| answer.lines());
            told += lines.filter(|line| line.ends_with(" EXPUNGE")).count();
            // Dovecot says OK, and may do it when it has room.
            there -= 1;
            asked_for.insert(guids[&uid].clone());
            assert!(told <= asked_for.len(), "{told} messages are expunged instead of {}", asked_for.len());
            let message = Appended { flags: "", date: "", mail: &mail("while it is full") };
            match imap.append_unless_lost("INBOX", &[message]) {
                Ok(answer) => there += usize::from(answer.is_ok()),
                Err(_) => {
                    imap = t.a().imap(user);
                    imap.command("SELECT INBOX");
                }
            }
            // Whoever opens it may be who breaks it.
            t.a().imap(user).command("SELECT INBOX");
        }
        t.a().free("home");
    }
    let snapshot = t.converged_within(DEADLINE, user);
    let found: BTreeSet<String> = snapshot.messages("INBOX").iter().map(|message| message.guid.clone()).collect();
    assert!(found.len() >= there, "{} of {there} messages are left", found.len());
    let lost: Vec<&String> = seen.iter().filter(|guid| !asked_for.contains(*guid) && !found.contains(*guid)).collect();
    assert!(lost.is_empty(), "nobody asked for these to be expunged: {lost:?}");
}

/// A sync that is to write the list anew, and cannot, forgets it, skips what it was asked to expunge, and counts that as done.
#[test]
fn what_a_client_expunged_while_a_maildirs_list_of_uids_could_not_be_written_is_gone_on_both() {
    let user = "story-full-expunge";
    let setups = vec![Setup::new("a", Format::Maildir).on_small_disks(), Setup::new("b", Format::Sdbox)];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log(user);
    let log = in_home(t.a(), user, "Maildir/dovecot.index.log");
    for round in 0..6 {
        // There is room in the log's last page.
        let has_room = (0..200).any(|n| {
            t.a().deliver(user, &mail(&format!("round {round}, mail {n}")));
            n > 4 && fs::metadata(&log).expect("its log").len() % 4096 < 1_000
        });
        assert!(has_room, "the last page of the log is always full");
        let mut imap = t.a().imap(user).select("INBOX");
        let uids = imap.uids();
        // When some are gone the list is written anew.
        for uid in uids.iter().skip(1) {
            t.a().fill("home", 0);
            imap.command(&format!("UID STORE {uid} +FLAGS (\\Deleted)"));
            imap.command(&format!("UID EXPUNGE {uid}"));
        }
        t.a().free("home");
        t.converged_within(DEADLINE, user);
    }
}

/// Of `1 FETCH (UID 2 X-GUID ...)`.
fn uid_and_guid(line: &str) -> Option<(u32, String)> {
    let (uid, guid) = line.split_once("(UID ")?.1.trim_end_matches(')').split_once(" X-GUID ")?;
    Some((uid.parse().ok()?, guid.into()))
}

/// Dovecot finds the files again and gives them other UIDs.
fn an_uidlist_that_is_lost_on_the_peer(a: Format, user: &str) {
    let t = Scene::on(Cluster::pair(a, Format::Maildir), user);
    t.expects_in_log(user);
    (1..=5).for_each(|n| t.a().deliver(user, &mail(&format!("mail {n}"))));
    t.a().imap(user).select("INBOX").ok("STORE 1 +FLAGS (\\Seen)");
    t.settled();
    fs::remove_file(in_home(t.b(), user, "Maildir/dovecot-uidlist")).expect("remove");
    t.b().deliver(user, &mail("mail 6"));
    // That it happened stands in the list of what failed.
    assert_eq!(t.converged_within(DEADLINE, user).messages("INBOX").len(), 6);
}

#[test]
fn an_uidlist_that_is_lost_on_the_peer_loses_no_mail_maildir() {
    an_uidlist_that_is_lost_on_the_peer(Format::Maildir, "story-uidlist-maildir");
}

#[test]
fn an_uidlist_that_is_lost_on_the_peer_loses_no_mail_sdbox() {
    an_uidlist_that_is_lost_on_the_peer(Format::Sdbox, "story-uidlist-sdbox");
}
