//! Single faults at the worst moments, each by name.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::cluster::imap::Appended;
use crate::cluster::server::signal;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail, mail_of_size, Scene, SOON};

/// For what was lost to be looked for and sent.
const DEADLINE: Duration = Duration::from_secs(60);

fn pair(user: &str) -> Scene {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Sdbox), user);
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("dovetail");
    // mail_cache_purge_write() renames the new cache before its number is committed to the index.
    t.expects_in_log("Deleting corrupted cache: reset_id mismatch");
    t
}

fn settled(t: &Scene) -> crate::cluster::Snapshot {
    t.converged_within(DEADLINE, &t.user)
}

fn kill(server: &Server, services: &[&str]) {
    let pids: Vec<u32> = services.iter().flat_map(|service| server.pids(service)).collect();
    pids.iter().for_each(|pid| signal(*pid, "KILL"));
}

/// Kills the relay and waits for the next one.
fn restart_relay(server: &Server) {
    let old = server.pids("dovetail");
    old.iter().for_each(|pid| signal(*pid, "KILL"));
    wait_until(SOON, "the relay runs again", || server.pids("dovetail").iter().any(|pid| !old.contains(pid)));
}

/// The files of a user's mails, without a program of Dovecot that would look for him.
fn mail_files(server: &Server, user: &str, mailbox: &str) -> Vec<PathBuf> {
    let folder = server.outside(&format!("/home/{user}/sdbox/mailboxes/{mailbox}/dbox-Mails"));
    let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    files.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("u."))).collect()
}

/// The copy's record and the expunge's are both in the socket of a relay that never reads them.
#[test]
fn a_move_whose_two_records_are_both_lost() {
    let t = pair("story-lost-move");
    t.a().imap(&t.user).ok("CREATE Archive");
    (1..=3).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    settled(&t);
    let relay = t.a().pids("dovetail")[0];
    signal(relay, "STOP");
    let mut imap = t.a().imap(&t.user).select("INBOX");
    imap.ok("UID MOVE 2 Archive");
    kill(t.a(), &["imap"]);
    restart_relay(t.a());
    let snapshot = settled(&t);
    assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (2, 1));
    // And it is no accident of what came later.
    t.b().imap(&t.user).select("Archive").ok("UID MOVE 1 INBOX");
    let snapshot = settled(&t);
    assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Archive").len()), (3, 0));
}

/// The worker has saved the mail, nobody was told, and the user expunges it: sent again, it must not come back.
#[test]
fn a_worker_killed_between_commit_and_acknowledgement_while_the_user_expunges() {
    let t = pair("story-unacknowledged");
    t.a().deliver(&t.user, &mail("stays"));
    settled(&t);
    for round in 1..=10 {
        let before = mail_files(t.b(), &t.user, "INBOX").len();
        let pids: Vec<u32> = ["dovetail-worker", "dovetail"].iter().flat_map(|s| t.b().pids(s)).collect();
        t.a().deliver(&t.user, &mail(&format!("comes and goes {round}")));
        wait_until(SOON, "b has the mail's file", || mail_files(t.b(), &t.user, "INBOX").len() > before);
        pids.iter().for_each(|pid| signal(*pid, "KILL"));
        // If the file was there, and the commit was not, it comes when it is sent again. Then sdbox may find the file, and make
        // the index anew, which ends sessions.
        let (mut imap, mut uid) = (None, 0);
        wait_until(DEADLINE, "the mail is there", || {
            let mut session = t.b().imap(&t.user).select("INBOX");
            uid = session.uids().get(1).copied().unwrap_or(0);
            imap = Some(session);
            uid != 0
        });
        let mut imap = imap.expect("a session");
        imap.ok(&format!("UID STORE {uid} +FLAGS (\\Deleted)"));
        imap.ok(&format!("UID EXPUNGE {uid}"));
        assert_eq!(settled(&t).messages("INBOX").len(), 1, "in round {round} the mail is back");
    }
    restart_relay(t.a());
    restart_relay(t.b());
    assert_eq!(settled(&t).messages("INBOX").len(), 1);
}

/// Of a user, and of a mailbox, that no relay has ever heard of.
#[test]
fn a_process_killed_after_its_very_first_commit() {
    let t = pair("story-first-commit");
    t.a().deliver("story-first-commit-other", &mail("so that the relays know each other"));
    t.converged_within(DEADLINE, "story-first-commit-other");
    let relay = t.a().pids("dovetail")[0];
    signal(relay, "STOP");
    t.a().deliver(&t.user, &mail("first"));
    kill(t.a(), &["lmtp"]);
    signal(relay, "CONT");
    assert_eq!(settled(&t).messages("INBOX").len(), 1);

    signal(relay, "STOP");
    let mut imap = t.a().imap(&t.user);
    imap.ok("CREATE Fresh");
    imap.append("Fresh", &mail("first in Fresh"));
    kill(t.a(), &["imap"]);
    signal(relay, "CONT");
    assert_eq!(settled(&t).messages("Fresh").len(), 1);
}

/// Nobody is left to tell the relay of him but the userdb.
#[test]
fn a_new_users_first_mail_while_the_relay_was_away() {
    let (known, new) = ("story-known-user", "story-new-user");
    let server = |name| Setup::new(name, Format::Sdbox).only_user(known).only_user(new);
    let t = Scene::on(Cluster::start(vec![server("a"), server("b")]), new);
    t.expects_in_log("killed with signal 9");
    t.a().deliver(known, &mail("so that the relays know each other"));
    t.converged_within(DEADLINE, known);
    signal(t.a().pids("dovetail")[0], "STOP");
    t.a().deliver(new, &mail("first"));
    kill(t.a(), &["lmtp"]);
    restart_relay(t.a());
    assert_eq!(settled(&t).messages("INBOX").len(), 1);
}

#[test]
fn a_relay_cut_in_mid_frame() {
    let t = pair("story-cut-frame");
    t.a().deliver(&t.user, &mail("before"));
    settled(&t);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let body = mail_of_size(1 << 20);
            let mut lmtp = t.a().lmtp();
            (0..20).for_each(|_| lmtp.deliver(&[&t.user], &body));
        });
        while !sender.is_finished() {
            for server in t.servers() {
                restart_relay(server);
            }
        }
    });
    assert_eq!(settled(&t).messages("INBOX").len(), 21);
}

/// Dovecot drops a keyword's removal beside its addition in one transaction, and the other way round.
#[test]
fn keywords_that_come_and_go_and_are_applied_together() {
    let t = pair("story-keywords");
    (1..=2).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    t.a().imap(&t.user).select("INBOX").ok("STORE 2 +FLAGS (stays)");
    settled(&t);
    let relay = t.a().pids("dovetail")[0];
    signal(relay, "STOP");
    let mut imap = t.a().imap(&t.user).select("INBOX");
    for change in ["1 +FLAGS (goes)", "1 -FLAGS (goes)", "2 -FLAGS (stays)", "2 +FLAGS (stays)"] {
        imap.ok(&format!("STORE {change}"));
    }
    signal(relay, "CONT");
    let snapshot = settled(&t);
    let keywords: Vec<String> = snapshot.messages("INBOX").iter().map(|message| message.flags.join(" ")).collect();
    assert_eq!(keywords, ["", "stays"]);
}

/// A small file system over a user's home; gone with the test.
struct SmallHome(PathBuf);

impl SmallHome {
    fn mount(server: &Server, user: &str) -> SmallHome {
        let home = server.outside(&format!("/home/{user}"));
        fs::create_dir_all(&home).expect("mkdir");
        let options = "size=1m,uid=8,gid=8,mode=0700";
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&home).status().expect("mount");
        assert!(done.success(), "mount: {done}");
        SmallHome(home)
    }
}

impl Drop for SmallHome {
    fn drop(&mut self) {
        // Lazily: a process may still be in it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// What passes through our copy of the body must still fail where it fails without us.
#[test]
fn a_full_disk_on_this_side_refuses_what_it_has_no_room_for() {
    for format in [Format::Sdbox, Format::Mdbox, Format::Maildir] {
        let cluster = Cluster::start(vec![Setup::new("a", format), Setup::new("b", Format::Sdbox)]);
        cluster.a().stop();
        let user = "story-full-here";
        let home = SmallHome::mount(cluster.a(), user);
        cluster.a().start();
        let t = Scene::on(cluster, user);
        for text in ["dovetail", "No space left", "not enough disk space", "Disk quota", "No quota", "Out of disk"] {
            t.expects_in_log(text);
        }
        t.a().deliver(user, &mail("before"));
        settled(&t);
        let ballast = home.0.join("ballast");
        fs::write(&ballast, vec![0; 800 << 10]).expect("room for it");

        // Small ones ride along with the change, large ones do not.
        let mut answers = Vec::new();
        for size in [30 << 10, 400 << 10].repeat(8) {
            let mail = mail_of_size(size);
            let message = Appended { flags: "", date: "", mail: &mail };
            answers.push((size, t.a().imap(user).try_append_all("INBOX", &[message]).is_ok()));
        }
        for size in [30 << 10, 400 << 10] {
            assert!(answers.contains(&(size, false)), "{format:?}: {size} bytes always had room: {answers:?}");
        }
        fs::remove_file(&ballast).expect("remove");
        let taken = answers.iter().filter(|(_, ok)| *ok).count();
        assert!(taken > 0, "{format:?}: nothing had room");
        assert_eq!(settled(&t).messages("INBOX").len(), 1 + taken, "{format:?}");
        t.a().stop();
    }
}

#[test]
fn a_full_disk_on_the_peer() {
    let cluster = Cluster::start(vec![Setup::new("a", Format::Sdbox), Setup::new("b", Format::Sdbox)]);
    cluster.b().stop();
    let user = "story-full-disk";
    let home = SmallHome::mount(cluster.b(), user);
    // A server's mounts are those of the moment in which it was started.
    cluster.b().start();
    let t = Scene::on(cluster, user);
    for text in ["dovetail", "No space left", "not enough disk space", "Disk quota", "No quota", "Out of disk"] {
        t.expects_in_log(text);
    }
    t.a().deliver(user, &mail("before"));
    settled(&t);
    let ballast = home.0.join("ballast");
    fs::write(&ballast, vec![0; 600 << 10]).expect("room for it");

    (0..4).for_each(|_| t.a().deliver(user, &mail_of_size(200 << 10)));
    wait_until(DEADLINE, "a's status says why the user waits", || {
        let status = &t.a().status()[0];
        status["pending"] != "0" && status["last_error"].contains(user)
    });
    // Others go on.
    let other = "story-full-disk-other";
    t.a().deliver(other, &mail("of another user"));
    wait_until(DEADLINE, "the other user's mail is there", || !mail_files(t.b(), other, "INBOX").is_empty());

    fs::remove_file(&ballast).expect("remove");
    let enlarged = Command::new("mount").args(["-o", "remount,size=16m"]).arg(&home.0).status().expect("mount");
    assert!(enlarged.success());
    assert_eq!(settled(&t).messages("INBOX").len(), 5);
    wait_until(SOON, "nothing is pending", || t.a().status()[0]["pending"] == "0");
    t.b().stop();
}

/// Maildir moves the files of new mails to their place before dovecot-uidlist knows their GUIDs.
#[test]
fn a_worker_killed_when_a_maildir_has_the_mails_and_not_yet_their_guids() {
    let t = Scene::on(Cluster::pair(Format::Sdbox, Format::Maildir), "story-stray");
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("dovetail");
    t.a().deliver(&t.user, &mail("stays"));
    settled(&t);
    for round in 1..=20 {
        let mails: Vec<Vec<u8>> = (0..4).map(|n| mail(&format!("round {round}, mail {n}"))).collect();
        let appended: Vec<Appended> = mails.iter().map(|mail| Appended { flags: "", date: "", mail }).collect();
        kill_when_files_come(&t, || t.a().imap(&t.user).append_all("INBOX", &appended));
    }
    // Dovecot respects the lock that a killed process leaves on dovecot-uidlist for two minutes.
    let snapshot = t.converged_within(Duration::from_secs(240), &t.user);
    assert_eq!(snapshot.messages("INBOX").len(), 81);
}

/// The files of copies cannot have the names that their GUIDs are.
#[test]
fn a_worker_killed_when_a_maildir_has_copies_and_not_yet_their_guids() {
    let t = Scene::on(Cluster::pair(Format::Maildir, Format::Maildir), "story-stray-copies");
    t.expects_in_log("killed with signal 9");
    t.expects_in_log("dovetail");
    (0..4).for_each(|n| t.a().deliver(&t.user, &mail(&format!("mail {n}"))));
    settled(&t);
    for _ in 1..=20 {
        kill_when_files_come(&t, || {
            let mut imap = t.a().imap(&t.user);
            imap.command("SELECT INBOX");
            imap.command("COPY 1:4 INBOX")
        });
    }
    let snapshot = t.converged_within(Duration::from_secs(240), &t.user);
    assert_eq!(snapshot.messages("INBOX").len(), 84);
}

/// Kills B's workers as soon as what is done brings files into its maildir.
fn kill_when_files_come<T: Send>(t: &Scene, done: impl FnOnce() -> T + Send) {
    let folder = t.b().outside(&format!("/home/{}/Maildir/cur", t.user));
    let files = || fs::read_dir(&folder).map_or(0, Iterator::count);
    let before = files();
    let pids = t.b().pids("dovetail-worker");
    std::thread::scope(|scope| {
        scope.spawn(done);
        let deadline = std::time::Instant::now() + SOON;
        // No pause: the moment is short.
        while files() == before && std::time::Instant::now() < deadline {}
        kill_at_once(&pids);
    });
}

fn kill_at_once(pids: &[u32]) {
    for pid in pids {
        // SAFETY: no memory is involved; the processes were started by this test.
        unsafe { libc::kill(*pid as i32, libc::SIGKILL) };
    }
}
