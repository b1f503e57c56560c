//! Mailboxes that two servers made, named or took away while they were cut off from each other.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::cluster::imap::Imap;
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot};
use crate::scene::{mail, Scene, SOON};

/// A pair whose relays are connected over lines. One story at a time: a cut is one for all users.
struct Pair {
    cluster: Arc<Cluster>,
    turn: Mutex<()>,
}

fn pair(a: Format, b: Format) -> &'static Pair {
    static PAIRS: [[OnceLock<Pair>; 3]; 3] = [const { [const { OnceLock::new() }; 3] }; 3];
    PAIRS[a as usize][b as usize].get_or_init(|| {
        let setups = vec![Setup::new("a", a).over_a_line(), Setup::new("b", b).over_a_line()];
        Pair { cluster: Arc::new(Cluster::start(setups)), turn: Mutex::new(()) }
    })
}

fn play(a: Format, b: Format, name: &str, story: fn(&Clash)) {
    let pair = pair(a, b);
    let turn = pair.turn.lock().unwrap_or_else(|e| e.into_inner());
    let t = Scene::shared(pair.cluster.clone(), &format!("story-clash-{name}"));
    t.expects_in_log("Peer ");
    story(&Clash { t, _turn: turn });
}

struct Clash {
    t: Scene,
    _turn: MutexGuard<'static, ()>,
}

impl Clash {
    /// Mailboxes with a mail each, on both.
    fn given(&self, mailboxes: &[&str]) {
        self.t.a().deliver(&self.t.user, &mail("welcome"));
        let mut imap = self.at_a();
        for mailbox in mailboxes {
            imap.ok(&format!("CREATE {mailbox}"));
            imap.append(mailbox, &mail(mailbox));
        }
        self.t.settled();
    }

    fn at_a(&self) -> Imap {
        self.t.a().imap(&self.t.user)
    }

    fn at_b(&self) -> Imap {
        self.t.b().imap(&self.t.user)
    }

    /// While neither hears of the other: what happens on a, then what happens on b.
    fn apart(&self, on_a: impl FnOnce(&mut Imap), on_b: impl FnOnce(&mut Imap)) -> Snapshot {
        self.t.lines.iter().for_each(|line| line.hang(true));
        // Told before the other one does something: a change gets its clock then.
        let is_told = |server: &Server| server.status().iter().all(|peer| peer["pending"] != "0");
        on_a(&mut self.at_a());
        wait_until(SOON, "what a did is told", || is_told(self.t.a()));
        on_b(&mut self.at_b());
        wait_until(SOON, "what b did is told", || is_told(self.t.b()));
        self.t.lines.iter().for_each(|line| line.hang(false));
        let snapshot = self.settled();
        // What comes afterwards means the same on both.
        let name = snapshot.mailboxes.keys().next_back().expect("there is INBOX at least").clone();
        self.at_a().select(&name).command("STORE 1:* +FLAGS ($AfterA)");
        self.at_b().append(&name, &mail("after"));
        self.at_b().select(&name).ok("STORE 1:* +FLAGS ($AfterB)");
        let after = self.settled();
        assert_eq!(after.messages(&name).len(), snapshot.messages(&name).len() + 1);
        snapshot
    }

    fn settled(&self) -> Snapshot {
        let snapshot = self.t.settled();
        wait_until(SOON, "nothing is pending", || self.t.servers().iter().all(Server::has_nothing_pending));
        self.t.settled();
        snapshot
    }
}

/// Each is a test for some pairs of formats.
macro_rules! clashes {
    ($( $(#[$doc:meta])* fn $name:ident($t:ident) $body:block )*) => {
        $( $(#[$doc])* fn $name($t: &Clash) $body )*
        clashes!(@pair sdbox_to_sdbox Sdbox Sdbox, $($name)*);
        clashes!(@pair mdbox_to_maildir Mdbox Maildir, $($name)*);
    };
    (@pair $pair:ident $a:ident $b:ident, $($name:ident)*) => {
        mod $pair {
            use crate::cluster::Format;
            $(
                #[test]
                fn $name() {
                    super::play(Format::$a, Format::$b, stringify!($name), super::$name);
                }
            )*
        }
    };
}

clashes! {
    fn two_of_one_name_with_mail_become_one(t) {
        t.given(&[]);
        let snapshot = t.apart(
            |a| {
                a.ok("CREATE Work");
                (0..3).for_each(|n| drop(a.append("Work", &mail(&format!("a {n}")))));
            },
            |b| {
                b.ok("CREATE Work");
                (0..2).for_each(|n| drop(b.append("Work", &mail(&format!("b {n}")))));
            },
        );
        assert_eq!(snapshot.messages("Work").len(), 5);
        t.at_a().select("Work").ok("STORE 2:4 +FLAGS (\\Deleted)");
        t.at_a().select("Work").ok("EXPUNGE");
        assert_eq!(t.settled().messages("Work").len(), 3);
    }

    fn of_two_of_one_name_the_one_with_mail_stays(t) {
        t.given(&[]);
        let before = |imap: &mut Imap| imap.command("STATUS Work (UIDVALIDITY)").lines().join("");
        let mut kept = String::new();
        t.apart(
            |a| {
                a.ok("CREATE Work");
                a.append("Work", &mail("a"));
                kept = before(a);
            },
            |b| drop(b.ok("CREATE Work")),
        );
        assert_eq!(before(&mut t.at_a()), kept, "its clients have to read it anew");
    }

    fn two_empty_ones_of_one_name_become_one(t) {
        t.given(&[]);
        let snapshot = t.apart(|a| drop(a.ok("CREATE Work")), |b| drop(b.ok("CREATE Work")));
        assert!(snapshot.mailboxes.contains_key("Work"));
    }

    fn a_mailbox_deleted_on_one_side_and_used_on_the_other_stays(t) {
        t.given(&["Work"]);
        let snapshot = t.apart(|a| drop(a.ok("DELETE Work")), |b| drop(b.append("Work", &mail("late"))));
        assert_eq!(snapshot.messages("Work").len(), 2);
        t.at_a().ok("DELETE Work");
        assert!(!t.settled().mailboxes.contains_key("Work"), "who knows what is in it may delete it");
    }

    fn a_mailbox_deleted_on_one_side_and_read_on_the_other_goes(t) {
        t.given(&["Work"]);
        let snapshot = t.apart(
            |a| drop(a.ok("DELETE Work")),
            |b| {
                b.ok("SELECT Work");
                b.ok("STORE 1 +FLAGS (\\Seen)");
            },
        );
        assert!(!snapshot.mailboxes.contains_key("Work"));
    }

    fn a_mailbox_deleted_on_both_goes(t) {
        t.given(&["Work"]);
        let snapshot = t.apart(|a| drop(a.ok("DELETE Work")), |b| drop(b.ok("DELETE Work")));
        assert!(!snapshot.mailboxes.contains_key("Work"));
    }

    fn a_mailbox_made_anew_on_one_side_and_used_on_the_other_has_all(t) {
        t.given(&["Work"]);
        let snapshot = t.apart(
            |a| {
                a.ok("DELETE Work");
                a.ok("CREATE Work");
                a.append("Work", &mail("new"));
            },
            |b| drop(b.append("Work", &mail("late"))),
        );
        assert_eq!(snapshot.messages("Work").len(), 3);
    }

    fn of_two_renames_the_later_holds(t) {
        t.given(&["Work", "Play"]);
        let snapshot = t.apart(
            |a| {
                a.ok("RENAME Work Job");
                a.ok("RENAME Play Game");
            },
            |b| {
                b.ok("RENAME Work Toil");
                b.ok("RENAME Play Sport");
            },
        );
        assert_eq!(snapshot.mailboxes.keys().collect::<Vec<_>>(), ["INBOX", "Sport", "Toil"]);
        assert_eq!((snapshot.messages("Sport").len(), snapshot.messages("Toil").len()), (1, 1));
    }

    fn a_mailbox_renamed_on_one_side_and_deleted_on_the_other_stays(t) {
        t.given(&["Work", "Play"]);
        let snapshot = t.apart(
            |a| {
                a.ok("RENAME Work Job");
                a.ok("DELETE Play");
            },
            |b| {
                b.ok("DELETE Work");
                b.ok("RENAME Play Sport");
            },
        );
        assert_eq!(snapshot.mailboxes.keys().collect::<Vec<_>>(), ["INBOX", "Job", "Sport"]);
        assert_eq!((snapshot.messages("Job").len(), snapshot.messages("Sport").len()), (1, 1));
    }

    fn a_mailbox_renamed_onto_one_that_was_made_meanwhile_becomes_one_with_it(t) {
        t.given(&["Work"]);
        let snapshot = t.apart(
            |a| {
                a.ok("RENAME Work Play");
                a.append("Play", &mail("a"));
            },
            |b| {
                b.ok("CREATE Play");
                b.append("Play", &mail("b"));
                b.append("Work", &mail("b in Work"));
            },
        );
        assert_eq!(snapshot.messages("Play").len(), 4);
        assert!(!snapshot.mailboxes.contains_key("Work"));
    }

    fn a_mailbox_made_below_one_that_is_renamed_is_there_once(t) {
        t.given(&["Family", "Family/Child"]);
        let snapshot = t.apart(
            |a| {
                a.ok("RENAME Family Clan");
                a.ok("CREATE Clan/Baby");
                a.append("Clan/Baby", &mail("baby"));
            },
            |b| {
                b.ok("CREATE Family/New");
                b.append("Family/New", &mail("new"));
            },
        );
        assert_eq!(snapshot.messages("Clan/Child").len(), 1);
        assert_eq!(snapshot.messages("Clan/New").len() + snapshot.messages("Family/New").len(), 1);
    }

    fn a_child_renamed_below_a_parent_that_is_renamed_is_there_once(t) {
        t.given(&["Family", "Family/Child", "Family/Other"]);
        let snapshot = t.apart(
            |a| drop(a.ok("RENAME Family Clan")),
            |b| {
                b.ok("RENAME Family/Child Family/Grown");
                b.ok("RENAME Family/Other Away");
            },
        );
        let named = |name: &str| snapshot.mailboxes.keys().filter(|found| found.ends_with(name)).count();
        assert_eq!((named("Child"), named("Grown"), named("Other"), named("Away")), (0, 1, 0, 1));
    }

    fn two_mailboxes_that_are_put_below_each_other_are_there_once(t) {
        t.given(&["One", "Two"]);
        let snapshot = t.apart(|a| drop(a.ok("RENAME One Two/One")), |b| drop(b.ok("RENAME Two One/Two")));
        let mails: usize = snapshot.mailboxes.values().map(|mailbox| mailbox.messages.len()).sum();
        assert_eq!((snapshot.mailboxes.len(), mails), (3, 3), "{:?}", snapshot.names);
    }

    fn mail_follows_a_mailbox_that_swaps_names_with_another(t) {
        t.given(&["One", "Two"]);
        let snapshot = t.apart(
            |a| {
                a.ok("RENAME One Third");
                a.ok("RENAME Two One");
                a.ok("RENAME Third Two");
            },
            |b| (0..3).for_each(|n| drop(b.append("One", &mail(&format!("to the first {n}"))))),
        );
        assert_eq!((snapshot.messages("One").len(), snapshot.messages("Two").len()), (1, 4));
    }

    fn a_mailbox_that_is_renamed_to_and_fro_on_both_is_there_once(t) {
        t.given(&["One"]);
        let snapshot = t.apart(
            |a| ["One Two", "Two One", "One Two"].iter().for_each(|names| drop(a.ok(&format!("RENAME {names}")))),
            |b| ["One Two", "Two One"].iter().for_each(|names| drop(b.ok(&format!("RENAME {names}")))),
        );
        assert_eq!(snapshot.mailboxes.keys().collect::<Vec<_>>(), ["INBOX", "One"]);
        assert_eq!(snapshot.messages("One").len(), 1);
    }

    fn two_mailboxes_that_take_each_others_names_are_there_once(t) {
        t.given(&["One", "Two"]);
        t.at_a().append("Two", &mail("second of Two"));
        t.settled();
        let snapshot = t.apart(
            |a| {
                a.ok("RENAME Two Second");
                a.ok("RENAME One Two");
            },
            |b| {
                b.ok("RENAME One First");
                b.ok("RENAME Two One");
            },
        );
        assert_eq!(snapshot.mailboxes.keys().collect::<Vec<_>>(), ["First", "INBOX", "One"]);
        assert_eq!((snapshot.messages("First").len(), snapshot.messages("One").len()), (1, 2));
    }

    fn two_mailboxes_that_swap_names_on_both_are_there_once(t) {
        t.given(&["One", "Two"]);
        t.at_a().append("Two", &mail("second of Two"));
        t.settled();
        let swap = |imap: &mut Imap| {
            imap.ok("RENAME One Third");
            imap.ok("RENAME Two One");
            imap.ok("RENAME Third Two");
        };
        let snapshot = t.apart(swap, swap);
        assert_eq!(snapshot.mailboxes.keys().collect::<Vec<_>>(), ["INBOX", "One", "Two"]);
        assert_eq!((snapshot.messages("One").len(), snapshot.messages("Two").len()), (2, 1));
    }

    fn of_two_subscriptions_the_later_holds(t) {
        t.given(&["Work", "Play"]);
        t.at_a().ok("SUBSCRIBE Play");
        t.settled();
        let snapshot = t.apart(
            |a| {
                a.ok("SUBSCRIBE Work");
                a.ok("UNSUBSCRIBE Play");
            },
            |b| {
                b.ok("SUBSCRIBE Work");
                b.ok("UNSUBSCRIBE Work");
                b.ok("UNSUBSCRIBE Play");
                b.ok("SUBSCRIBE Play");
            },
        );
        assert_eq!(snapshot.subscriptions, ["Play"]);
    }
}

/// Not on a maildir: there Dovecot 2.3's `doveadm mailbox status *` fails on a parent that does not exist.
fn a_child_made_below_a_parent_that_is_deleted_stays(t: &Clash) {
    t.given(&["Family"]);
    let snapshot = t.apart(
        |a| drop(a.ok("DELETE Family")),
        |b| {
            b.ok("CREATE Family/Child");
            b.append("Family/Child", &mail("child"));
        },
    );
    assert_eq!(snapshot.messages("Family/Child").len(), 1);
    assert!(!snapshot.mailboxes.contains_key("Family"), "who deleted it knew what was in it");
}

#[test]
fn a_child_made_below_a_parent_that_is_deleted_stays_sdbox() {
    play(Format::Sdbox, Format::Sdbox, "child-sdbox", a_child_made_below_a_parent_that_is_deleted_stays);
}

#[test]
fn a_child_made_below_a_parent_that_is_deleted_stays_mdbox() {
    play(Format::Mdbox, Format::Mdbox, "child-mdbox", a_child_made_below_a_parent_that_is_deleted_stays);
}

fn a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere(t: &Clash) {
    t.given(&["Work"]);
    let copy = |imap: &mut Imap| {
        imap.ok("SELECT Work");
        imap.ok("COPY 1 Work");
    };
    let snapshot = t.apart(
        |a| {
            a.append("Work", &mail("a"));
            copy(a);
            copy(a);
        },
        |b| {
            copy(b);
            b.append("Work", &mail("b"));
        },
    );
    let of_work = snapshot.messages("Work");
    let guids: BTreeSet<&str> = of_work.iter().map(|message| message.guid.as_str()).collect();
    assert_eq!((guids.len(), of_work.len()), (3, 6));
}

#[test]
fn a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere_sdbox() {
    let story = a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere;
    play(Format::Sdbox, Format::Sdbox, "copied-sdbox", story);
}

#[test]
fn a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere_mdbox() {
    let story = a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere;
    play(Format::Mdbox, Format::Mdbox, "copied-mdbox", story);
}

#[test]
fn a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere_maildir() {
    let story = a_mail_that_both_copy_into_its_own_mailbox_is_lost_nowhere;
    play(Format::Maildir, Format::Maildir, "copied-maildir", story);
}
