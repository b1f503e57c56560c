//! Which UID a message has, when servers gave UIDs before they had talked.
//!
//! IMAP (RFC 3501 2.3.1.1): UIDs rise, and one names the same message for ever; Dovecot gives a message no UID below
//! UIDNEXT. So a message of another server that has such a UID there cannot get it here, and must get a higher one
//! everywhere: its *claim*, the highest UID that anyone gave it. If every server that cannot put a message where it is
//! claimed raised the claim, two of them could go on for ever. Only the *acting resolver* does: of the servers that are
//! connected, the one with the lowest name. The others say that they cannot (a *nack*), and meanwhile have the message at
//! their next UID. Servers may disagree about who it is while connections come and go: the highest claim wins.
//!
//! Once nothing is written any more and all have heard everything, a message has the same UID everywhere (the tests play it).

/// What a server knows of its own mailbox and its place among the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Here {
    /// Where the message is; None: it is not in this mailbox.
    pub stands: Option<u32>,
    /// UIDNEXT.
    pub next: u32,
    /// Whether this server is the acting resolver.
    pub resolves: bool,
}

/// What another server says of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct There {
    /// Its UID there.
    pub uid: u32,
    /// UIDNEXT there.
    pub next: u32,
    /// How often it was raised before.
    pub raised: u32,
}

/// Where to put a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// Where it is.
    Stay,
    /// At this UID. If it lies above the one that the other server has, it is to be told.
    At(u32),
    /// A message that is not here yet: at the next UID, for the time being.
    Next,
}

/// What to tell the others when the message has its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tell {
    Nothing,
    /// That it is claimed where it stands.
    Claim,
    /// That it is not where they have it.
    Nack,
}

/// Room above the UIDs that are known to be taken: what is saved meanwhile should fit below. Doubles each time.
const ROOM: u32 = 2;
const ROOM_DOUBLINGS_MAX: u32 = 16;

/// Another server has the message at a UID, because it was saved there or because it was raised there.
pub fn place(here: Here, there: There) -> Put {
    match here.stands {
        // It may have been raised here since.
        Some(stands) if stands >= there.uid => Put::Stay,
        _ if there.uid >= here.next => Put::At(there.uid),
        _ if here.resolves => Put::At(raise(here, there)),
        Some(_) => Put::Stay,
        None => Put::Next,
    }
}

/// What must be told of a message that is `stands` here and `there` on another server.
pub fn tell(stands: u32, there: u32, resolves: bool) -> Tell {
    match (stands == there, resolves) {
        (true, _) => Tell::Nothing,
        // Only the acting resolver puts it at another UID, and that is a higher one.
        (false, true) => Tell::Claim,
        (false, false) => Tell::Nack,
    }
}

/// Another server cannot put the message where it was claimed, which is `there.uid`. None: nothing to do here.
pub fn answer(here: Here, there: There) -> Option<Put> {
    match here.stands.filter(|_| here.resolves)? {
        stands if stands <= there.uid => Some(Put::At(raise(here, there))),
        // It was raised since. That claim may have come there before the message, and for nothing; or it was another server's.
        _ => Some(Put::Stay),
    }
}

/// UIDNEXT to reach when a message was claimed that is not here: when it comes, it must not fit at its first UID.
pub fn reserve(there: There) -> u32 {
    there.next.max(there.uid.saturating_add(1))
}

fn raise(here: Here, there: There) -> u32 {
    let free = here.next.max(there.next).max(there.uid.saturating_add(1));
    free.saturating_add((ROOM << there.raised.min(ROOM_DOUBLINGS_MAX)) - ROOM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

    /// By its number.
    type Message = u8;

    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    enum What {
        Save,
        Claim,
        Nack,
        Expunge,
    }

    /// A change on its way; UID and UIDNEXT are the sender's.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Change {
        what: What,
        message: Message,
        uid: u32,
        next: u32,
        raised: u32,
    }

    #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
    struct Server {
        next: u32,
        messages: BTreeMap<Message, u32>,
        expunged: BTreeSet<Message>,
        /// Every UID that was ever given, and to whom.
        given: BTreeMap<u32, Message>,
    }

    impl Server {
        fn put(&mut self, message: Message, uid: u32) {
            assert!(uid >= self.next, "Dovecot would not do that");
            assert_eq!(self.given.insert(uid, message), None, "a UID names two messages");
            self.next = uid + 1;
            self.messages.insert(message, uid);
        }
    }

    /// Servers, each with a line to each other one that keeps its order.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Cluster {
        servers: Vec<Server>,
        lines: BTreeMap<(usize, usize), VecDeque<Change>>,
        /// The last that came over each line. It comes again if the line is lost before the acknowledgement, so many times.
        had: BTreeMap<(usize, usize), Change>,
        again: usize,
        cut: BTreeSet<(usize, usize)>,
        /// Who are never connected: what one of them sends comes to the other through others.
        apart: BTreeSet<(usize, usize)>,
        saved: Message,
    }

    impl Cluster {
        fn new(count: usize) -> Cluster {
            let servers = vec![Server { next: 1, ..Default::default() }; count];
            let (lines, had) = (BTreeMap::new(), BTreeMap::new());
            Cluster { servers, lines, had, again: 0, cut: BTreeSet::new(), apart: BTreeSet::new(), saved: 0 }
        }

        /// Each is connected with the one before it and the one behind it only, in this order.
        fn chain(order: &[usize]) -> Cluster {
            let mut cluster = Cluster::new(order.len());
            for (at, one) in order.iter().enumerate() {
                for other in &order[(at + 2).min(order.len())..] {
                    cluster.apart.insert((*one.min(other), *one.max(other)));
                }
            }
            cluster
        }

        fn connected(&self, a: usize, b: usize) -> bool {
            let pair = (a.min(b), a.max(b));
            a != b && !self.cut.contains(&pair) && !self.apart.contains(&pair)
        }

        /// Directly, or through others.
        fn reaches(&self, from: usize, to: usize) -> bool {
            if self.cut.is_empty() {
                return true;
            }
            let mut reached = BTreeSet::from([from]);
            let mut next = vec![from];
            while let Some(at) = next.pop() {
                let new = (0..self.servers.len()).filter(|other| self.connected(at, *other) && reached.insert(*other));
                next.extend(new.collect::<Vec<_>>());
            }
            reached.contains(&to)
        }

        fn send(&mut self, from: usize, what: What, message: Message, uid: u32, raised: u32) {
            let change = Change { what, message, uid, raised, next: self.servers[from].next };
            for to in (0..self.servers.len()).filter(|to| *to != from) {
                self.lines.entry((from, to)).or_default().push_back(change.clone());
            }
        }

        fn save(&mut self, at: usize) {
            let (message, uid) = (self.saved, self.servers[at].next);
            self.saved += 1;
            self.servers[at].put(message, uid);
            self.send(at, What::Save, message, uid, 0);
        }

        fn expunge(&mut self, at: usize, nth: usize) {
            let message = self.servers[at].messages.keys().nth(nth).copied();
            if let Some(message) = message {
                self.servers[at].messages.remove(&message);
                self.servers[at].expunged.insert(message);
                self.send(at, What::Expunge, message, 0, 0);
            }
        }

        fn send_again(&mut self, from: usize, to: usize) {
            let Some(change) = self.had.remove(&(from, to)) else { return };
            self.lines.entry((from, to)).or_default().push_front(change);
            self.again -= 1;
            if self.again == 0 {
                self.had.clear();
            }
        }

        /// The next change on this line arrives.
        fn deliver(&mut self, from: usize, to: usize) {
            let Some(change) = self.lines.get_mut(&(from, to)).and_then(VecDeque::pop_front) else { return };
            if self.again > 0 {
                self.had.insert((from, to), change.clone());
            }
            let resolves = (0..to).all(|lower| !self.reaches(lower, to));
            let server = &mut self.servers[to];
            let here = Here { stands: server.messages.get(&change.message).copied(), next: server.next, resolves };
            let there = There { uid: change.uid, next: change.next, raised: change.raised };
            let put = match change.what {
                What::Expunge => {
                    server.messages.remove(&change.message);
                    server.expunged.insert(change.message);
                    None
                }
                _ if server.expunged.contains(&change.message) => None,
                What::Claim if here.stands.is_none() => None,
                What::Save | What::Claim => Some(place(here, there)),
                What::Nack => answer(here, there),
            };
            match put {
                Some(Put::At(uid)) => server.put(change.message, uid),
                Some(Put::Next) => server.put(change.message, here.next),
                Some(Put::Stay) | None => {}
            }
            let is_unknown = here.stands.is_none() && !server.expunged.contains(&change.message);
            server.next = match change.what {
                What::Save => server.next.max(change.next),
                What::Claim if is_unknown => server.next.max(reserve(there)),
                What::Nack if is_unknown && resolves => server.next.max(reserve(there)),
                _ => server.next,
            };
            let stands = put.and_then(|_| server.messages.get(&change.message).copied());
            match stands.map(|stands| (stands, tell(stands, change.uid, resolves))) {
                Some((stands, Tell::Claim)) => self.send(to, What::Claim, change.message, stands, change.raised + 1),
                Some((_, Tell::Nack)) => self.send(to, What::Nack, change.message, change.uid, change.raised),
                _ => {}
            }
            self.lines.retain(|_, line| !line.is_empty());
        }

        fn lines(&self) -> Vec<(usize, usize)> {
            self.lines.keys().copied().filter(|(from, to)| self.reaches(*from, *to)).collect()
        }

        /// All connections are there, and everything arrives.
        fn settle(&mut self) {
            self.cut.clear();
            for turn in 0..10_000 {
                let lines = self.lines();
                if lines.is_empty() {
                    return;
                }
                let (from, to) = lines[turn % lines.len()];
                self.deliver(from, to);
            }
            panic!("it goes on for ever: {self:?}");
        }

        fn check(mut self) {
            self.settle();
            let first = &self.servers[0];
            for server in &self.servers[1..] {
                assert_eq!(server.messages, first.messages);
            }
            assert_eq!(first.messages.len() + first.expunged.len(), usize::from(self.saved), "one is lost");
        }
    }

    #[test]
    fn two_servers_with_two_saves_each_an_expunge_and_a_cut_agree_in_every_order() {
        agree_in_every_order(Cluster::new(2), &[2, 2], 1, 1);
    }

    #[test]
    fn two_servers_with_a_save_each_that_are_both_expunged_agree_in_every_order() {
        agree_in_every_order(Cluster::new(2), &[1, 1], 2, 1);
    }

    #[test]
    fn two_servers_agree_in_every_order_in_which_changes_come_twice() {
        agree_in_every_order(Cluster { again: 2, ..Cluster::new(2) }, &[1, 1], 1, 0);
    }

    #[test]
    fn three_servers_two_of_which_are_saved_to_agree_in_every_order() {
        agree_in_every_order(Cluster::new(3), &[1, 1, 0], 0, 0);
        agree_in_every_order(Cluster::chain(&[0, 2, 1]), &[1, 1, 0], 0, 0);
    }

    /// With the saves of each, expunges and cuts of the first from the second that are left.
    fn agree_in_every_order(cluster: Cluster, saves: &[usize], expunges: usize, cuts: usize) {
        let mut seen = HashSet::new();
        let mut open = vec![(cluster, saves.to_vec(), expunges, cuts)];
        while let Some((cluster, saves, expunges, cuts)) = open.pop() {
            if !seen.insert((cluster.clone(), saves.clone(), expunges, cuts)) {
                continue;
            }
            cluster.clone().check();
            let mut try_it = |saves, expunges, cuts, step: &dyn Fn(&mut Cluster)| {
                let mut next = cluster.clone();
                step(&mut next);
                open.push((next, saves, expunges, cuts));
            };
            for at in 0..saves.len() {
                if saves[at] > 0 {
                    let mut left = saves.clone();
                    left[at] -= 1;
                    try_it(left, expunges, cuts, &|cluster| cluster.save(at));
                }
                // Of the first ones, so that two go one after the other, whichever is first.
                for nth in (0..cluster.servers[at].messages.len()).take(expunges) {
                    try_it(saves.clone(), expunges - 1, cuts, &|cluster| cluster.expunge(at, nth));
                }
            }
            for (from, to) in cluster.lines() {
                try_it(saves.clone(), expunges, cuts, &|cluster| cluster.deliver(from, to));
            }
            for (from, to) in cluster.had.keys().copied() {
                try_it(saves.clone(), expunges, cuts, &|cluster| cluster.send_again(from, to));
            }
            if cluster.cut.is_empty() && cuts > 0 {
                try_it(saves, expunges, cuts - 1, &|cluster| {
                    cluster.cut.insert((0, 1));
                });
            } else if !cluster.cut.is_empty() {
                try_it(saves, expunges, cuts, &|cluster| cluster.cut.clear());
            }
        }
        assert!(seen.len() > 1_000, "{}", seen.len());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Save(usize),
        Expunge(usize, usize),
        Deliver(usize),
        SendAgain(usize, usize),
        Cut(usize, usize),
        Mend,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..5usize).prop_map(Step::Save),
            1 => (0..5usize, 0..4usize).prop_map(|(at, nth)| Step::Expunge(at, nth)),
            8 => (0..20usize).prop_map(Step::Deliver),
            1 => (0..5usize, 0..5usize).prop_map(|(a, b)| Step::SendAgain(a, b)),
            1 => (0..5usize, 0..5usize).prop_map(|(a, b)| Step::Cut(a, b)),
            1 => Just(Step::Mend),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..Default::default() })]
        #[test]
        fn any_servers_agree_whatever_happened_before(count in 2..=5usize, steps in prop::collection::vec(step(), 0..100)) {
            play(Cluster { again: 10, ..Cluster::new(count) }, count, steps);
        }

        #[test]
        fn any_servers_in_a_chain_agree_whatever_happened_before(
            order in Just(vec![0, 1, 2, 3, 4]).prop_shuffle(),
            count in 3..=5usize,
            steps in prop::collection::vec(step(), 0..100),
        ) {
            let order: Vec<usize> = order.into_iter().filter(|server| *server < count).collect();
            play(Cluster { again: 10, ..Cluster::chain(&order) }, count, steps);
        }
    }

    /// The claim that holds went to a server before it had the message, and the acting resolver had it from another one.
    #[test]
    fn a_claim_that_the_acting_resolver_had_from_another_one_is_told_again() {
        use Step::{Cut, Deliver, Expunge, Save};
        let from = [Save(2), Save(4), Save(2), Deliver(11), Deliver(18), Cut(3, 2)].into_iter();
        let steps = from.chain([0; 7].map(Deliver)).chain([Deliver(5), Save(1), Deliver(3), Deliver(0), Expunge(4, 0)]);
        play(Cluster { again: 10, ..Cluster::chain(&[4, 3, 2, 1, 0]) }, 5, steps.collect());
    }

    fn play(mut cluster: Cluster, count: usize, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Save(at) => cluster.save(at % count),
                Step::Expunge(at, nth) => cluster.expunge(at % count, nth),
                Step::Deliver(nth) => {
                    let lines = cluster.lines();
                    if !lines.is_empty() {
                        let (from, to) = lines[nth % lines.len()];
                        cluster.deliver(from, to);
                    }
                }
                Step::SendAgain(from, to) => cluster.send_again(from % count, to % count),
                Step::Cut(a, b) if a % count != b % count => {
                    cluster.cut.insert(((a % count).min(b % count), (a % count).max(b % count)));
                }
                Step::Cut(..) => {}
                Step::Mend => cluster.cut.clear(),
            }
        }
        cluster.check();
    }
}
