//! What clients see that keep a view of a mailbox (RFC 7162, QRESYNC), while messages get other UIDs, and on another server.

use std::collections::BTreeMap;

use crate::cluster::imap::{Answer, Imap};
use crate::cluster::{wait_until, Cluster, Format, Server, Setup, Snapshot, CONVERGE_DEADLINE};
use crate::scene::{mail, Scene, SOON};

/// What a client knows of INBOX, and takes to the next server.
#[derive(Clone, Default)]
struct View {
    uid_validity: u32,
    modseq: u64,
    /// Flags by UID.
    messages: BTreeMap<u32, Vec<String>>,
    /// By sequence numbers; with what it was told of, and not yet what it is.
    exists: usize,
}

/// A client with INBOX selected. Checks each answer: UIDs only rise, the counts agree, HIGHESTMODSEQ never falls.
struct Client {
    imap: Imap,
    view: View,
    modseq_here: u64,
}

impl Client {
    /// Selects with what is known, then asks for what is new.
    fn select(server: &Server, user: &str, view: View) -> Client {
        let mut client = Client::select_as_known(server, user, view);
        client.fetch_new();
        client
    }

    /// The same where it may not have been told all. If the number of messages does not fit then, it looks which there are.
    fn select_and_count(server: &Server, user: &str, view: View) -> Client {
        let mut client = Client::select_as_known(server, user, view);
        if !client.has_fetched_new() {
            let uids = client.imap.uids();
            client.view.messages.retain(|uid, _| uids.contains(uid));
            for uid in uids.iter().filter(|uid| !client.view.messages.contains_key(uid)).copied().collect::<Vec<_>>() {
                let answer = client.imap.ok(&format!("UID FETCH {uid} (FLAGS)"));
                client.take(&answer);
            }
            assert_eq!(client.view.messages.len(), client.view.exists);
        }
        client
    }

    fn select_as_known(server: &Server, user: &str, view: View) -> Client {
        let mut imap = server.imap(user);
        imap.ok("ENABLE QRESYNC");
        let known = match view.uid_validity {
            0 => "SELECT INBOX".to_owned(),
            uid_validity => format!("SELECT INBOX (QRESYNC ({uid_validity} {}))", view.modseq),
        };
        let answer = imap.ok(&known);
        let mut client = Client { imap, view, modseq_here: 0 };
        client.take(&answer);
        client
    }

    fn ok(&mut self, command: &str) {
        let answer = self.imap.ok(command);
        self.take(&answer);
        self.fetch_new();
    }

    fn fetch_new(&mut self) {
        let is_all = self.has_fetched_new();
        assert!(is_all, "{} messages are there, and known are {:?}", self.view.exists, self.view.messages.keys());
    }

    /// Of messages of which it only knows that they are there. More may come with the answer. False: the number does not fit.
    fn has_fetched_new(&mut self) -> bool {
        for _ in 0..5 {
            let last = self.view.messages.keys().next_back().copied().unwrap_or(0);
            let answer = self.imap.ok(&format!("UID FETCH {}:* (FLAGS)", last + 1));
            self.take(&answer);
            if self.view.messages.len() == self.view.exists {
                return true;
            }
        }
        false
    }

    fn take(&mut self, answer: &Answer) {
        let lines = answer.lines();
        if let Some(uid_validity) = lines.iter().find_map(|line| number(line, "[UIDVALIDITY ")) {
            if self.view.uid_validity != uid_validity as u32 {
                self.view = View { uid_validity: uid_validity as u32, ..View::default() };
            }
            // The count is that of this server.
            self.view.exists = 0;
        }
        let is_selected = lines.iter().any(|line| line.contains("[UIDVALIDITY "));
        for line in &lines {
            if let Some(exists) = line.strip_suffix(" EXISTS").and_then(|count| count.parse().ok()) {
                assert!(is_selected || exists >= self.view.exists, "EXISTS fell without a word: {line}");
                self.view.exists = exists;
            } else if let Some(uids) = line.strip_prefix("VANISHED (EARLIER) ") {
                ranges(uids).for_each(|uid| drop(self.view.messages.remove(&uid)));
            } else if let Some(uids) = line.strip_prefix("VANISHED ") {
                for uid in ranges(uids) {
                    self.view.messages.remove(&uid);
                    self.view.exists -= 1;
                }
            } else if let Some(modseq) = number(line, "[HIGHESTMODSEQ ") {
                assert!(modseq >= self.modseq_here, "HIGHESTMODSEQ fell from {}: {line}", self.modseq_here);
                (self.modseq_here, self.view.modseq) = (modseq, modseq);
            } else if line.contains(" FETCH (") {
                self.take_fetch(line);
            }
        }
    }

    fn take_fetch(&mut self, line: &str) {
        // With QRESYNC each answer has the UID.
        let uid = number(line, "UID ").unwrap_or_else(|| panic!("no UID: {line}")) as u32;
        let flags = line.split_once("FLAGS (").and_then(|(_, rest)| rest.split_once(')')).map(|(flags, _)| flags);
        let Some(flags) = flags else { return };
        let mut flags: Vec<String> =
            flags.split(' ').filter(|flag| !flag.is_empty() && *flag != "\\Recent").map(str::to_owned).collect();
        flags.sort();
        self.view.messages.insert(uid, flags);
        if let Some(modseq) = number(line, "MODSEQ (") {
            self.view.modseq = self.view.modseq.max(modseq);
        }
    }
}

/// The number behind these words.
fn number(line: &str, words: &str) -> Option<u64> {
    let rest = line.split_once(words)?.1;
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}

fn ranges(uids: &str) -> impl Iterator<Item = u32> + '_ {
    uids.split(',').flat_map(|range| {
        let (first, last) = range.split_once(':').unwrap_or((range, range));
        first.parse::<u32>().expect("a UID")..=last.parse().expect("a UID")
    })
}

/// By UID, as the servers have them.
fn flags_of(snapshot: &Snapshot) -> BTreeMap<u32, Vec<String>> {
    snapshot.mailboxes["INBOX"].messages.iter().map(|(uid, message)| (*uid, message.flags.clone())).collect()
}

fn over_lines(formats: [Format; 2], user: &str) -> Scene {
    let [a, b] = formats;
    let setups = vec![Setup::new("a", a).over_a_line(), Setup::new("b", b).over_a_line()];
    let t = Scene::on(Cluster::start(setups), user);
    t.expects_in_log("dovetail");
    t.expects_in_log("Recent flags state corrupted");
    (0..3).for_each(|n| t.a().deliver(user, &mail(&format!("first {n}"))));
    t.settled();
    t
}

fn settled(t: &Scene) -> Snapshot {
    t.settled();
    wait_until(SOON, "nothing is pending", || t.servers().iter().all(Server::has_nothing_pending));
    t.settled()
}

/// Mails, flags and expunges on both, of which neither hears from the other.
fn apart(t: &Scene, mails: usize) {
    t.lines.iter().for_each(|line| line.hang(true));
    for server in t.servers() {
        (0..mails).for_each(|n| server.deliver(&t.user, &mail(&format!("{} {n}", server.name()))));
        let mut imap = server.imap(&t.user).select("INBOX");
        imap.ok("STORE 1 +FLAGS (\\Flagged)");
        imap.ok("STORE * +FLAGS (\\Seen $Important)");
        imap.ok("STORE 4 +FLAGS (\\Deleted)");
        imap.ok("EXPUNGE");
    }
}

fn sessions_that_stay_selected_see_legal_changes(formats: [Format; 2], user: &str) {
    let t = over_lines(formats, user);
    apart(&t, 5);
    let mut clients: Vec<Client> =
        t.servers().iter().map(|server| Client::select(server, user, View::default())).collect();
    t.lines.iter().for_each(|line| line.hang(false));
    wait_until(CONVERGE_DEADLINE, "all have what both saved", || {
        clients.iter_mut().for_each(|client| client.ok("NOOP"));
        clients.iter().all(|client| client.view.messages.len() == 3 + 2 * 4)
    });
    let snapshot = settled(&t);
    wait_until(SOON, "all see the same as the servers have", || {
        clients.iter_mut().for_each(|client| client.ok("NOOP"));
        clients.iter().all(|client| client.view.messages == flags_of(&snapshot))
    });
    // As those do that come now.
    for server in t.servers() {
        assert_eq!(Client::select(server, user, View::default()).view.messages, flags_of(&snapshot));
    }
}

#[test]
fn sessions_that_stay_selected_see_legal_changes_sdbox() {
    sessions_that_stay_selected_see_legal_changes([Format::Sdbox; 2], "story-selected-sdbox");
}

#[test]
fn sessions_that_stay_selected_see_legal_changes_maildir_and_mdbox() {
    sessions_that_stay_selected_see_legal_changes([Format::Maildir, Format::Mdbox], "story-selected-maildir");
}

fn a_client_that_moves_to_and_fro_misses_nothing(formats: [Format; 2], user: &str) {
    let t = over_lines(formats, user);
    let mut view = View::default();
    for turn in 0..6 {
        let (here, there) = if turn % 2 == 0 { (t.a(), t.b()) } else { (t.b(), t.a()) };
        let mut client = Client::select(here, user, view);
        assert_eq!(client.view.messages, flags_of(&settled(&t)), "turn {turn}, on {}", here.name());
        // What it does itself, and what others do on both while it is away.
        client.ok("UID STORE * +FLAGS ($Mine)");
        client.ok("NOOP");
        view = client.view.clone();
        drop(client);
        settled(&t);
        let others = if turn % 3 == 0 { [here, here] } else { [here, there] };
        for (n, server) in others.into_iter().enumerate() {
            (0..2).for_each(|mail_n| server.deliver(user, &mail(&format!("{turn} {n} {mail_n}"))));
            let mut imap = server.imap(user).select("INBOX");
            imap.ok(&format!("STORE 2 {}FLAGS (\\Answered)", ["+", "-"][(turn + n) % 2]));
            imap.ok("STORE 3 +FLAGS (\\Deleted)");
            imap.ok("EXPUNGE");
            settled(&t);
        }
    }
}

#[test]
fn a_client_that_moves_to_and_fro_misses_nothing_sdbox() {
    a_client_that_moves_to_and_fro_misses_nothing([Format::Sdbox; 2], "story-moves-sdbox");
}

#[test]
fn a_client_that_moves_to_and_fro_misses_nothing_maildir_and_mdbox() {
    a_client_that_moves_to_and_fro_misses_nothing([Format::Maildir, Format::Mdbox], "story-moves-maildir");
}

/// Who read on one of them meanwhile, or was away, and comes back there.
fn a_client_that_comes_back_after_a_cut_has_the_right_view(formats: [Format; 2], user: &str) {
    let t = over_lines(formats, user);
    let before = Client::select(t.a(), user, View::default()).view;
    apart(&t, 5);
    // Of which a has no change of its own.
    t.b().imap(user).select("INBOX").ok("STORE 2:3 +FLAGS (\\Answered)");
    let meanwhile = Client::select(t.a(), user, before.clone()).view;
    let highest = |server: &Server| Snapshot::take(server, user, false).mailboxes["INBOX"].highest_modseq;
    let in_the_cut: Vec<u64> = t.servers().iter().map(highest).collect();
    t.lines.iter().for_each(|line| line.hang(false));
    let all = flags_of(&settled(&t));
    assert_eq!(all.len(), 3 + 2 * 4);
    assert_eq!(Client::select(t.a(), user, meanwhile).view.messages, all);
    for server in t.servers() {
        assert_eq!(Client::select(server, user, before.clone()).view.messages, all, "on {}", server.name());
    }
    // Whichever of the two has used up more modseqs meanwhile.
    for (from, to) in [(t.a(), t.b()), (t.b(), t.a())] {
        let view = Client::select(from, user, before.clone()).view;
        to.imap(user).select("INBOX").ok("STORE 1:2 -FLAGS (\\Flagged \\Answered)");
        to.imap(user).select("INBOX").ok("STORE 2 +FLAGS (\\Draft)");
        let moved = Client::select(to, user, view).view;
        assert_eq!(moved.messages, flags_of(&settled(&t)), "from {} to {}", from.name(), to.name());
        to.imap(user).select("INBOX").ok("STORE 1:2 -FLAGS (\\Draft)");
        settled(&t);
    }
    let healed = t.servers().iter().map(highest);
    assert!(healed.zip(in_the_cut).all(|(now, then)| now >= then), "HIGHESTMODSEQ fell");
}

#[test]
fn a_client_that_comes_back_after_a_cut_has_the_right_view_sdbox() {
    a_client_that_comes_back_after_a_cut_has_the_right_view([Format::Sdbox; 2], "story-back-sdbox");
}

#[test]
fn a_client_that_comes_back_after_a_cut_has_the_right_view_maildir_and_mdbox() {
    a_client_that_comes_back_after_a_cut_has_the_right_view([Format::Maildir, Format::Mdbox], "story-back-maildir");
}

/// Who changes the server while they are cut finds messages by their number and UIDs, and can miss changes of flags until they are
/// changed again: docs/PROTOCOL.md, "Clients that keep a view".
fn a_client_that_moves_during_a_cut_finds_what_is_there(formats: [Format; 2], user: &str) {
    let t = over_lines(formats, user);
    let here = Client::select(t.a(), user, View::default()).view;
    apart(&t, 5);
    // So that the numbers differ: with the same one, and other mails at the same UIDs, a client takes them for those.
    t.b().deliver(user, &mail("one more"));
    let here = Client::select(t.a(), user, here).view;
    let mut client = Client::select_and_count(t.b(), user, here.clone());
    let uids = |view: &View| view.messages.keys().copied().collect::<Vec<u32>>();
    let at_b = Snapshot::take(t.b(), user, false);
    assert_eq!(uids(&client.view), flags_of(&at_b).into_keys().collect::<Vec<_>>());
    assert_ne!(uids(&client.view), uids(&here));
    client.ok("STORE 2 +FLAGS.SILENT (\\Deleted)");
    client.ok("EXPUNGE");
    client.ok("UID STORE * +FLAGS ($Mine)");
    let there = client.view.clone();
    drop(client);
    t.lines.iter().for_each(|line| line.hang(false));
    let all: Vec<u32> = flags_of(&settled(&t)).into_keys().collect();
    assert_eq!(all.len(), 3 + 2 * 4);
    // Back, to where it was before, and on the way that others go only now.
    let mut view = there;
    for server in [t.a(), t.b(), t.a()] {
        view = Client::select_and_count(server, user, view).view;
        assert_eq!(uids(&view), all, "on {}", server.name());
    }
    assert_eq!(uids(&Client::select_and_count(t.b(), user, here).view), all);
    // Flags that are changed again.
    t.b().imap(user).select("INBOX").ok("STORE 1:* FLAGS (\\Draft)");
    let flags = flags_of(&settled(&t));
    for server in t.servers() {
        let seen = Client::select(server, user, view.clone()).view.messages;
        assert_eq!(seen, flags, "on {}", server.name());
    }
}

#[test]
fn a_client_that_moves_during_a_cut_finds_what_is_there_sdbox() {
    a_client_that_moves_during_a_cut_finds_what_is_there([Format::Sdbox; 2], "story-changes-sdbox");
}

#[test]
fn a_client_that_moves_during_a_cut_finds_what_is_there_maildir_and_mdbox() {
    a_client_that_moves_during_a_cut_finds_what_is_there([Format::Maildir, Format::Mdbox], "story-changes-maildir");
}
