//! Applied changes have no side effects: what a delivery, an expunge or a new mailbox sets off, it sets off once, on the
//! server on which it happened.

use std::fs;

use crate::cluster::{wait_until, Cluster, Format, Server, Setup};
use crate::scene::{mail_of_size, Scene, SOON};

/// Notes that it was run, and with what.
const EFFECT: &str = "#!/bin/sh
echo \"$*\" >>{DIR}/home/effects
cat >/dev/null
";

const BEFORE_SIEVE: &str = r#"require ["vacation", "fileinto", "mailbox", "vnd.dovecot.pipe", "copy"];
pipe :copy "effect" ["sieve"];
if header :contains "subject" "file me" { fileinto :create "Filed"; }
if header :contains "subject" "holiday" { vacation :addresses ["you@client.test"] "I am away"; }
"#;

const SPAM_SIEVE: &str = r#"require ["vnd.dovecot.pipe", "copy"];
pipe :copy "effect" ["imapsieve"];
"#;

const EXTRA_23: &str = "
mail_plugins = $mail_plugins quota lazy_expunge last_login welcome mail_log push_notification
protocol lmtp {
  mail_plugins = $mail_plugins sieve
}
protocol imap {
  mail_plugins = $mail_plugins imap_sieve
}
namespace inbox {
  mailbox Spam {
    auto = create
  }
}
sendmail_path = {DIR}/bin/effect vacation
plugin {
  sieve_plugins = sieve_imapsieve sieve_extprograms
  sieve_global_extensions = +vnd.dovecot.pipe
  sieve_pipe_bin_dir = {DIR}/bin
  sieve_before = {DIR}/home/before.sieve
  imapsieve_mailbox1_name = Spam
  imapsieve_mailbox1_causes = APPEND COPY
  imapsieve_mailbox1_before = file:{DIR}/home/spam.sieve
  push_notification_driver = dlog
  mail_log_events = save copy expunge
  lazy_expunge = Expunged
  last_login_dict = file:{DIR}/home/last-login
  welcome_script = welcome welcome
  quota = count:User quota
  quota_vsizes = yes
  quota_rule = *:storage=200K
  quota_warning = storage=50%% quota-warning quota
}
service welcome {
  executable = script {DIR}/bin/effect
  user = mail
  unix_listener welcome {
    mode = 0666
  }
}
service quota-warning {
  executable = script {DIR}/bin/effect
  user = mail
  unix_listener quota-warning {
    mode = 0666
  }
}
";

const EXTRA_24: &str = "
mail_plugins {
  quota = yes
  lazy_expunge = yes
  last_login = yes
  welcome = yes
  mail_log = yes
  push_notification = yes
}
mail_log_events = save copy expunge
push_notification dlog {
}
protocol lmtp {
  mail_plugins {
    sieve = yes
  }
}
protocol imap {
  mail_plugins {
    imap_sieve = yes
  }
}
namespace inbox {
  mailbox Spam {
    auto = create
  }
}
sendmail_path = {DIR}/bin/effect vacation
sieve_plugins = sieve_imapsieve sieve_extprograms
sieve_global_extensions {
  vnd.dovecot.pipe = yes
}
sieve_pipe_bin_dir = {DIR}/bin
sieve_script before {
  type = before
  path = {DIR}/home/before.sieve
}
mailbox Spam {
  sieve_script spam {
    type = before
    cause = append copy
    path = {DIR}/home/spam.sieve
  }
}
lazy_expunge_mailbox = Expunged
last_login {
  dict file {
    path = {DIR}/home/last-login
  }
}
welcome {
  execute welcome {
    args = welcome
  }
}
quota \"User quota\" {
  storage_size = 200K
  warning half {
    quota_storage_percentage = 50
    execute quota-warning {
      args = quota
    }
  }
}
service welcome {
  executable = script {DIR}/bin/effect
  user = mail
  unix_listener welcome {
    mode = 0666
  }
}
service quota-warning {
  executable = script {DIR}/bin/effect
  user = mail
  unix_listener quota-warning {
    mode = 0666
  }
}
";

fn setup(name: &str) -> Setup {
    Setup::new(name, Format::Sdbox)
        .extra(EXTRA_23, EXTRA_24)
        .file("bin/effect", EFFECT)
        // Programs of several users write to it, in any order.
        .file("home/effects", "")
        .file("home/before.sieve", BEFORE_SIEVE)
        .file("home/spam.sieve", SPAM_SIEVE)
}

/// Lines of the log about notifications and about what was done to mails.
fn notifications(server: &Server) -> Vec<String> {
    // LMTP, which was only waited for, sets up its plugins, too.
    let of_mail = |line: &&str| line.contains("txn push_notification") || line.contains(": save: ");
    server.log().lines().filter(of_mail).map(str::to_owned).collect()
}

/// What was run on a server, sorted.
fn effects(server: &Server) -> Vec<String> {
    let text = fs::read_to_string(server.outside("/home/effects")).unwrap_or_default();
    let mut effects: Vec<String> = text.lines().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect();
    effects.sort();
    effects
}

/// Whether last_login noted him.
fn has_logged_in(server: &Server, user: &str) -> bool {
    fs::read_to_string(server.outside("/home/last-login")).is_ok_and(|text| text.contains(user))
}

/// Mails of a user's mailbox, counted without any program of Dovecot: those have effects.
fn files(server: &Server, user: &str, mailbox: &str) -> usize {
    let dir = server.outside(&format!("/home/{user}/sdbox/mailboxes/{mailbox}/dbox-Mails"));
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("u.")).count()
}

fn to_you(subject: &str, size: usize) -> Vec<u8> {
    let mut mail =
        format!("From: sender@client.test\r\nTo: you@client.test\r\nSubject: {subject}\r\n\r\n").into_bytes();
    mail.extend(mail_of_size(size));
    mail
}

#[test]
fn what_a_change_sets_off_happens_once_and_on_its_own_server() {
    let mut setups = vec![setup("a"), setup("b")];
    let is_single = std::env::var_os("DOVETAIL_TEST_SINGLE").is_some();
    if is_single {
        setups = vec![setup("a").without_plugin()];
    }
    let t = Scene::on(Cluster::start(setups), "story-effects");
    let (a, b) = (t.here(), t.there());
    sets_off_once(&t, a, b, "story-effects-a", is_single);
    if !is_single {
        sets_off_once(&t, b, a, "story-effects-b", is_single);
    }
}

/// Nobody has touched this user's mail on either server.
fn sets_off_once(t: &Scene, here: &Server, peer: &Server, user: &str, is_single: bool) {
    let (effects_there, notifications_there) = (effects(peer), notifications(peer));
    let notifications_here = notifications(here);
    let (name, ran) = (here.name(), effects(here));
    let wait_for = |new: &[&str]| {
        let mut expected: Vec<String> = ran.iter().cloned().chain(new.iter().map(|&name| name.to_owned())).collect();
        expected.sort();
        wait_until(SOON, &format!("{name} ran {expected:?}"), || effects(here) == expected);
        expected
    };

    // When mail comes in that a sieve script files and answers, that fills half the quota, into a new INBOX.
    here.deliver(user, &to_you("holiday", 100));
    here.deliver(user, &to_you("file me", 100));
    here.deliver(user, &to_you("large", 120_000));
    wait_for(&["quota", "sieve", "sieve", "sieve", "vacation", "welcome"]);

    // Then the peer has the mails, filed alike, and nobody but its worker has touched them.
    wait_until(SOON, "the peer has the mails", || files(peer, user, "INBOX") == 2 && files(peer, user, "Filed") == 1);
    if !is_single {
        assert!(!has_logged_in(peer, user), "last_login ran on {}", peer.name());
    }
    assert!(has_logged_in(here, user), "last_login did not run on {name}");

    // When a client appends to a mailbox with a script, and expunges a mail that lazy_expunge keeps.
    let mut imap = here.imap(user);
    imap.append("Spam", &to_you("spam", 100));
    let mut imap = imap.select("INBOX");
    imap.ok("STORE 1 +FLAGS (\\Deleted)");
    imap.ok("EXPUNGE");
    imap.ok("LOGOUT");
    let expected = wait_for(&["imapsieve", "quota", "sieve", "sieve", "sieve", "vacation", "welcome"]);

    // Then the kept mail is there once, and still nothing was run on the peer.
    let snapshot = t.converged(user);
    assert_eq!((snapshot.messages("INBOX").len(), snapshot.messages("Expunged").len()), (1, 1));
    assert_eq!(effects(here), expected);
    assert!(notifications(here).len() > notifications_here.len(), "{name} notified nobody:\n{}", here.log());
    if !is_single {
        assert_eq!(notifications(peer), notifications_there, "{} notified somebody", peer.name());
        assert_eq!(effects(peer), effects_there, "{} ran something", peer.name());
    }
}
