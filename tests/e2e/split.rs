//! Two servers, each in a network of its own, with the cable between them unplugged: what both did meanwhile becomes one.
//!
//! One cut for all cases, each of a user of his own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::cluster::imap::Imap;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, Scene};

/// Long enough for connections that were lost to be noticed and made again.
const CUT_DEADLINE: Duration = Duration::from_secs(90);
/// Mails that each user has in INBOX before the cut. "Work" has one.
const BEFORE: usize = 3;

/// What happens on a server, with INBOX selected.
type Story = fn(&mut Imap);

struct Case {
    name: &'static str,
    on_a: Story,
    on_b: Story,
}

fn append(imap: &mut Imap, mailbox: &str, subjects: &[&str]) {
    subjects.iter().for_each(|subject| drop(imap.append(mailbox, &mail(subject))));
}

fn expunge(imap: &mut Imap, message: usize) {
    imap.ok(&format!("STORE {message} +FLAGS (\\Deleted)"));
    imap.ok("EXPUNGE");
}

const CASES: [Case; 9] = [
    Case {
        name: "appended",
        on_a: |a| append(a, "INBOX", &["a 1", "a 2", "a 3"]),
        on_b: |b| append(b, "INBOX", &["b 1", "b 2"]),
    },
    Case {
        name: "expunged-on-a",
        on_a: |a| {
            append(a, "INBOX", &["a"]);
            expunge(a, BEFORE + 1);
        },
        on_b: |b| append(b, "INBOX", &["b"]),
    },
    Case {
        name: "expunged-on-b",
        on_a: |a| append(a, "INBOX", &["a"]),
        on_b: |b| {
            append(b, "INBOX", &["b"]);
            expunge(b, BEFORE + 1);
        },
    },
    Case {
        name: "expunged-on-both",
        on_a: |a| {
            append(a, "INBOX", &["a"]);
            expunge(a, BEFORE + 1);
        },
        on_b: |b| {
            append(b, "INBOX", &["b"]);
            expunge(b, BEFORE + 1);
        },
    },
    Case {
        name: "expunged-and-flagged",
        on_a: |a| expunge(a, 1),
        on_b: |b| drop(b.ok("STORE 1 +FLAGS (\\Flagged $Important)")),
    },
    Case {
        name: "flags",
        on_a: |a| {
            a.ok("STORE 1 +FLAGS (\\Seen $A)");
            a.ok("STORE 2 +FLAGS (\\Flagged)");
            a.ok("STORE 2 -FLAGS (\\Flagged)");
        },
        on_b: |b| {
            b.ok("STORE 1 +FLAGS (\\Answered $B)");
            b.ok("STORE 2 +FLAGS (\\Flagged)");
        },
    },
    Case { name: "deleted-and-used", on_a: |a| drop(a.ok("DELETE Work")), on_b: |b| append(b, "Work", &["late"]) },
    Case { name: "renamed", on_a: |a| drop(a.ok("RENAME Work Job")), on_b: |b| drop(b.ok("RENAME Work Toil")) },
    Case {
        name: "created",
        on_a: |a| {
            a.ok("CREATE New");
            append(a, "New", &["a"]);
        },
        on_b: |b| {
            b.ok("CREATE New");
            append(b, "New", &["b"]);
        },
    },
];

/// What became of a user.
struct Healed {
    before: Snapshot,
    /// On a and on b, when the cable was plugged in again.
    apart: [Snapshot; 2],
    healed: Snapshot,
    /// After a mail more on each.
    after: Snapshot,
}

fn play(formats: [Format; 2], prefix: &str) -> BTreeMap<&'static str, Healed> {
    let [a, b] = formats;
    let t = Scene::on(Cluster::start_apart(vec![Setup::new("a", a), Setup::new("b", b)]), prefix);
    t.expects_in_log("dovetail");
    t.expects_in_log("Recent flags state corrupted");
    let user = |case: &Case| format!("{prefix}-{}", case.name);
    let all = || CASES.iter().map(|case| t.converged_while_busy(CUT_DEADLINE, &user(case)));
    for case in &CASES {
        (0..BEFORE).for_each(|n| t.a().deliver(&user(case), &mail(&format!("before {n}"))));
        let mut imap = t.a().imap(&user(case));
        imap.ok("CREATE Work");
        append(&mut imap, "Work", &["work"]);
    }
    let is_idle = || t.servers().iter().all(Server::has_nothing_pending);
    wait_until(CUT_DEADLINE, "all have their mail", is_idle);
    let before: Vec<Snapshot> = all().collect();

    t.lines[0].hang(true);
    CASES.iter().for_each(|case| (case.on_a)(&mut t.a().imap(&user(case)).select("INBOX")));
    CASES.iter().for_each(|case| (case.on_b)(&mut t.b().imap(&user(case)).select("INBOX")));
    let take = |case: &Case| [t.a(), t.b()].map(|server| Snapshot::take(server, &user(case), false));
    let apart: Vec<[Snapshot; 2]> = CASES.iter().map(take).collect();
    t.lines[0].hang(false);
    wait_until(CUT_DEADLINE, "all is heard", is_idle);
    let healed: Vec<Snapshot> = all().collect();

    for server in t.servers() {
        CASES.iter().for_each(|case| server.deliver(&user(case), &mail("after")));
        wait_until(CUT_DEADLINE, "the mail is there", is_idle);
    }
    let after = all();
    let users = before.into_iter().zip(apart).zip(healed).zip(after);
    let users = users.map(|(((before, apart), healed), after)| Healed { before, apart, healed, after });
    CASES.iter().map(|case| case.name).zip(users).collect()
}

/// UIDs in INBOX, by the messages' GUIDs.
fn uids(snapshot: &Snapshot) -> BTreeMap<&str, u32> {
    snapshot.mailboxes["INBOX"].messages.iter().map(|(uid, message)| (message.guid.as_str(), *uid)).collect()
}

/// Messages that have another UID than some server gave them.
fn renumbered(user: &Healed) -> BTreeSet<&str> {
    let healed = uids(&user.healed);
    let given = user.apart.iter().flat_map(uids);
    given.filter(|(guid, uid)| healed.get(guid).is_some_and(|now| now != uid)).map(|(guid, _)| guid).collect()
}

/// What must hold of a case afterwards.
macro_rules! rules {
    ($( fn $name:ident($user:ident: $case:literal) $body:block )*) => {
        $( fn $name($user: &Healed) $body )*
        const RULES: &[(&str, &str, fn(&Healed))] = &[$( (stringify!($name), $case, $name) ),*];
    };
}

fn what_both_did_while_they_were_cut_becomes_one(formats: [Format; 2], prefix: &str) {
    let healed = play(formats, prefix);
    for (name, case, rule) in RULES {
        // Said where it does not hold.
        println!("{name}");
        rule(&healed[case]);
    }
}

#[test]
fn what_both_did_while_they_were_cut_becomes_one_sdbox() {
    what_both_did_while_they_were_cut_becomes_one([Format::Sdbox; 2], "story-split-sdbox");
}

#[test]
fn what_both_did_while_they_were_cut_becomes_one_mdbox_and_maildir() {
    what_both_did_while_they_were_cut_becomes_one([Format::Mdbox, Format::Maildir], "story-split-mixed");
}

rules! {
    fn only_mails_saved_while_they_were_cut_get_other_uids(user: "appended") {
        let before = uids(&user.before);
        let saved = user.apart.iter().flat_map(uids).filter(|(guid, _)| !before.contains_key(guid)).count();
        assert_eq!((saved, user.healed.messages("INBOX").len()), (5, BEFORE + 5));
        let renumbered = renumbered(user);
        assert!(renumbered.iter().all(|guid| !before.contains_key(guid)), "one from before the cut has another UID");
        // What has its UID on one server alone could keep it.
        assert!((4..=5).contains(&renumbered.len()), "{renumbered:?}");
        assert_eq!(before, uids(&user.healed).into_iter().filter(|(guid, _)| before.contains_key(guid)).collect());
    }

    fn no_uid_of_one_server_names_a_mail_of_the_other(user: "appended") {
        let given: Vec<BTreeMap<u32, &str>> = user.apart.iter().map(|one| uids(one).into_iter().map(|(guid, uid)| (uid, guid)).collect()).collect();
        for (guid, uid) in uids(&user.healed) {
            assert!(given.iter().all(|given| given.get(&uid).is_none_or(|named| *named == guid)), "UID {uid}");
        }
    }

    fn what_comes_after_the_cut_keeps_its_uid(user: "appended") {
        let (healed, after) = (uids(&user.healed), uids(&user.after));
        assert_eq!(after.len(), healed.len() + 2);
        assert!(healed.iter().all(|(guid, uid)| after[guid] == *uid));
    }

    fn a_mail_that_a_expunged_before_it_clashed_stays_away(user: "expunged-on-a") {
        let theirs = uids(&user.apart[1]);
        assert_eq!(user.healed.messages("INBOX").len(), BEFORE + 1);
        assert!(uids(&user.healed).keys().all(|guid| theirs.contains_key(guid)));
    }

    fn a_mail_that_b_expunged_before_it_clashed_stays_away(user: "expunged-on-b") {
        let ours = uids(&user.apart[0]);
        assert_eq!(user.healed.messages("INBOX").len(), BEFORE + 1);
        assert!(uids(&user.healed).keys().all(|guid| ours.contains_key(guid)));
    }

    fn mails_that_both_expunged_before_they_clashed_stay_away(user: "expunged-on-both") {
        assert_eq!(uids(&user.healed), uids(&user.before));
        assert_eq!(user.after.messages("INBOX").len(), BEFORE + 2);
    }

    fn an_expunge_wins_over_flags(user: "expunged-and-flagged") {
        assert_eq!(user.healed.messages("INBOX").len(), BEFORE - 1);
    }

    fn different_flags_all_hold_and_of_one_the_later(user: "flags") {
        let flags: Vec<&[String]> = user.healed.messages("INBOX").iter().map(|message| &message.flags[..]).collect();
        assert_eq!(flags[0], ["$A", "$B", "\\Answered", "\\Seen"]);
        assert_eq!(flags[1], ["\\Flagged"]);
    }

    fn a_mailbox_deleted_on_one_and_used_on_the_other_stays(user: "deleted-and-used") {
        assert_eq!(user.healed.messages("Work").len(), 2);
    }

    fn of_two_names_the_later_holds(user: "renamed") {
        assert_eq!(user.healed.mailboxes.keys().collect::<Vec<_>>(), ["INBOX", "Toil"]);
        assert_eq!(user.healed.messages("Toil").len(), 1);
    }

    fn two_mailboxes_of_one_name_become_one(user: "created") {
        assert_eq!(user.healed.messages("New").len(), 2);
    }
}
