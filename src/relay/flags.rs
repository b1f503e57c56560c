//! Changes of flags that servers made before they had heard of each other's: [`crate::merge::flags`] decides which holds.
//!
//! What comes is compared with what was changed here later, and only the rest of it is applied. And as a change gets its clock
//! when it is told, not when it is made, one of ours may be told with a later clock than a peer's that was applied to the
//! mailbox behind it. Everywhere else ours holds: here it is made once more ([`super::redo`]).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use prost::Message;

use super::durable::sent_change;
use super::engine::Engine;
use super::spans::Place;
use crate::change;
use crate::journal::{Elsewhere, FlagChange, JournalError};
use crate::merge::flags::{Range, Update};
use crate::merge::rule::Rule;
use crate::wire::proto::op::What;
use crate::wire::proto::{Apart, Change, Expunge, FlagUpdate, Mailbox, MessageRange, Op, SeqOf, Span, Stamp};

/// Longer than a change of ours waits until it is told, mostly.
const RACE_MS_MAX: u64 = 60_000;
/// In the place of one that says nothing.
const NO_UID: (u32, u32) = (0, 0);
/// Changes of one user that are compared, and users.
const RACES_PER_USER_MAX: usize = 256;
const USERS_MAX: usize = 10_000;
/// Between two looks at what can be forgotten.
const FORGET_EVERY_MS: u64 = 1_000;

fn update(flags: &FlagUpdate) -> Update {
    let range = |range: &MessageRange| Range { first: range.first_uid, last: range.last_uid, guid: range.guid.clone() };
    Update {
        messages: flags.messages.iter().map(range).collect(),
        add: flags.add,
        remove: flags.remove,
        add_keywords: flags.add_keywords.iter().cloned().collect(),
        remove_keywords: flags.remove_keywords.iter().cloned().collect(),
    }
}

fn operation(update: Update) -> Op {
    let range =
        |Range { first, last, guid }| MessageRange { first_uid: first, last_uid: last, guid, ..Default::default() };
    let flags = FlagUpdate {
        messages: update.messages.into_iter().map(range).collect(),
        add: update.add,
        remove: update.remove,
        add_keywords: update.add_keywords.into_iter().collect(),
        remove_keywords: update.remove_keywords.into_iter().collect(),
    };
    Op { what: Some(What::Flags(flags)) }
}

fn updates(change: &Change) -> Vec<Update> {
    let of_op = |op: &Op| match &op.what {
        Some(What::Flags(flags)) => Some(update(flags)),
        _ => None,
    };
    change.ops.iter().filter_map(of_op).collect()
}

/// What a job says of messages by their GUIDs.
#[derive(Default)]
struct Coming {
    /// Saved ones.
    saved: HashSet<String>,
    /// By mailbox and GUID, the UIDs with which new ones are saved there. Nobody has them below.
    new: HashMap<(Vec<u8>, String), HashSet<u32>>,
    /// By mailbox and GUID, the UIDs that they have there.
    named: HashMap<(Vec<u8>, String), HashSet<u32>>,
    /// Those that get other UIDs.
    moved: HashSet<String>,
    /// By origin and mailbox, the GUIDs of new ones by the UIDs with which it saved them.
    names: HashMap<(String, Vec<u8>), Names>,
}

/// GUIDs of messages by the UIDs that a server has given them.
type Names = BTreeMap<u32, String>;

impl Coming {
    fn add(&mut self, mailbox: &[u8], change: &Change) {
        for what in change.ops.iter().filter_map(|op| op.what.as_ref()) {
            match what {
                What::Save(save) => {
                    let uid = save.birth.as_ref().map_or(0, |birth| birth.uid);
                    self.saved.insert(save.guid.clone());
                    self.name(mailbox, uid, &save.guid);
                    // What is told again may have been here before.
                    if !save.found && !save.kept {
                        self.new.entry((mailbox.to_vec(), save.guid.clone())).or_default().insert(uid);
                        let origin = change.stamp.as_ref().map(|stamp| stamp.origin.clone()).unwrap_or_default();
                        let names = self.names.entry((origin, mailbox.to_vec())).or_default();
                        names.insert(uid, save.guid.clone());
                    }
                }
                What::Flags(FlagUpdate { messages, .. }) | What::Expunge(Expunge { messages }) => {
                    messages.iter().for_each(|range| self.name(mailbox, range.first_uid, &range.guid));
                }
                What::Apart(Apart { messages }) => {
                    messages.iter().for_each(|range| self.name(mailbox, range.first_uid, &range.guid));
                }
                What::Claim(claim) => drop(self.moved.insert(claim.guid.clone())),
                What::Nack(nack) => drop(self.moved.insert(nack.guid.clone())),
                _ => {}
            }
        }
    }

    fn name(&mut self, mailbox: &[u8], uid: u32, guid: &str) {
        if uid != 0 && !guid.is_empty() {
            self.named.entry((mailbox.to_vec(), guid.to_owned())).or_default().insert(uid);
        }
    }

    fn is_new(&self, mailbox: &[u8], uid: u32, guid: &str) -> bool {
        self.new.get(&(mailbox.to_vec(), guid.to_owned())).is_some_and(|uids| uids.contains(&uid))
    }

    /// The UIDs there of all that have the GUID.
    fn uids(&self, mailbox: &[u8], guid: &str) -> impl Iterator<Item = u32> + '_ {
        self.named.get(&(mailbox.to_vec(), guid.to_owned())).into_iter().flatten().copied()
    }
}

/// Of messages that share their GUID with others in the mailbox, by UID there and GUID, the later changes that mean them.
type OfCopies = HashMap<(u32, String), Vec<Update>>;

fn mailbox_guid(change: &Change) -> &[u8] {
    change.mailbox.as_ref().map(|mailbox| mailbox.guid.as_slice()).unwrap_or_default()
}

/// What the journal has of a change.
struct Kept {
    clock: u64,
    origin: String,
    mailbox: Vec<u8>,
    updates: Vec<Update>,
}

impl Kept {
    /// Its updates. `names`: of the messages of this origin.
    fn named(&self, origin: &str, names: &Names) -> Vec<Update> {
        let mut updates = self.updates.clone();
        if self.origin == origin {
            updates.iter_mut().for_each(|update| name(update, names));
        }
        updates
    }
}

/// One of the two in a race.
struct Runner {
    at_ms: u64,
    /// In which order they were given to a worker, those of one job together, or told.
    turn: u64,
    mailbox: Mailbox,
    updates: Vec<Update>,
    made: Stamp,
    /// A worker was given it; otherwise a client here made it.
    is_applied: bool,
    /// Where the last of it stands in the mailbox's log, rather too late than too early: what is made again in vain harms nothing.
    place: Option<Place>,
}

/// A change of ours that stands in a mailbox before an earlier one, and what both touch.
pub struct Undone {
    made: Stamp,
    mailbox: Mailbox,
    update: Update,
}

impl Undone {
    /// As changes that a worker may apply.
    fn changes(self, user: &str) -> Vec<Change> {
        let Undone { made, mailbox, update } = self;
        let mailbox = Mailbox { uid_next: 0, highest_modseq: 0, ..mailbox };
        let changes = operation(update).what.map(|what| change::split(vec![what], user, &mailbox, 0));
        let changes = changes.into_iter().flatten();
        changes.map(|change| Change { stamp: Some(made.clone()), ..change }).collect()
    }
}

/// What races, of each user.
#[derive(Default)]
pub struct Races {
    users: HashMap<Arc<str>, VecDeque<Runner>>,
    turn: u64,
}

impl Races {
    fn add(&mut self, user: &Arc<str>, runner: Runner) {
        if self.users.len() >= USERS_MAX {
            self.users.retain(|_, of_user| of_user.back().is_some_and(|last| last.at_ms + RACE_MS_MAX > runner.at_ms));
        }
        let of_user = self.users.entry(user.clone()).or_default();
        while of_user.front().is_some_and(|first| first.at_ms + RACE_MS_MAX < runner.at_ms)
            || of_user.len() >= RACES_PER_USER_MAX
        {
            of_user.pop_front();
        }
        of_user.push_back(runner);
    }

    /// A worker is given a job.
    fn begin_job(&mut self) {
        self.turn += 1;
    }

    /// A change is in it: a peer's, or one of ours that is made again, in several parts.
    fn is_applied(&mut self, user: &Arc<str>, made: Stamp, mailbox: Mailbox, updates: Vec<Update>, now_ms: u64) {
        if updates.is_empty() {
            return;
        }
        let turn = self.turn;
        self.add(user, Runner { at_ms: now_ms, turn, mailbox, updates, made, is_applied: true, place: None });
    }

    /// Where it stands in its mailbox's log, or a part of it. (Spans of other mailboxes, committed just before it, may name it as
    /// well.) What changes of ours that were told meanwhile, and stand before it, have of it.
    fn stands(&mut self, user: &str, applied: &SeqOf, mailbox: &[u8], place: Place) -> Vec<Undone> {
        let Some(of_user) = self.users.get_mut(user) else { return vec![] };
        let is_it = |Stamp { origin, epoch, seq, .. }: &Stamp| {
            (origin, *epoch, *seq) == (&applied.origin, applied.epoch, applied.seq)
        };
        let Some(turn) = of_user.iter().rfind(|one| one.is_applied && is_it(&one.made)).map(|last| last.turn) else {
            return vec![];
        };
        let mut found = Vec::new();
        for at in 0..of_user.len() {
            let one = &mut of_user[at];
            let is_in_job = one.is_applied && one.turn == turn && is_it(&one.made);
            if !is_in_job || one.place >= Some(place) || one.mailbox.guid != mailbox {
                continue;
            }
            one.place = Some(place);
            let ours = of_user.iter().filter(|runner| !runner.is_applied);
            found.extend(ours.flat_map(|ours| undone(of_user, &of_user[at], ours)));
        }
        found
    }

    /// One of ours is told. What of it those that were applied have behind it.
    fn is_told(
        &mut self,
        user: &Arc<str>,
        made: Stamp,
        mailbox: Mailbox,
        updates: Vec<Update>,
        place: Place,
        now_ms: u64,
    ) -> Vec<Undone> {
        self.turn += 1;
        let place = Some(place);
        let ours = Runner { at_ms: now_ms, turn: self.turn, mailbox, updates, made, is_applied: false, place };
        let undone = self.users.get(user).map_or_else(Vec::new, |of_user| {
            of_user.iter().filter(|runner| runner.is_applied).flat_map(|other| undone(of_user, other, &ours)).collect()
        });
        self.add(user, ours);
        undone
    }
}

/// What of ours the other one, which a worker was given before ours was told, has behind it. What a later change of a peer has decided,
/// which stands behind both, stays.
fn undone(all: &VecDeque<Runner>, other: &Runner, ours: &Runner) -> Vec<Undone> {
    let is_behind = other.place.is_some_and(|place| Some(place) > ours.place);
    if !is_behind || ours.turn < other.turn || other.mailbox.guid != ours.mailbox.guid {
        return vec![];
    }
    let pairs = ours.updates.iter().flat_map(|ours| other.updates.iter().filter_map(|other| ours.common(other)));
    let pairs: Vec<Update> = pairs.collect();
    if pairs.is_empty() {
        return vec![];
    }
    let is_later = |one: &&Runner| {
        (one.made.clock, &one.made.origin) > (ours.made.clock, &ours.made.origin)
            && one.is_applied
            && one.mailbox.guid == ours.mailbox.guid
    };
    let left = all
        .iter()
        .filter(is_later)
        .flat_map(|one| &one.updates)
        .fold(pairs, |left, later| left.into_iter().flat_map(|update| update.without(later)).collect());
    left.into_iter().map(|update| Undone { made: ours.made.clone(), mailbox: ours.mailbox.clone(), update }).collect()
}

/// Those of the range that have names get them.
fn named(range: &Range, names: &Names) -> Vec<Range> {
    let Range { first, last, guid } = range;
    if !guid.is_empty() || first > last {
        return vec![range.clone()];
    }
    let unnamed = |first, last| Range { first, last, guid: String::new() };
    let (mut parts, mut next) = (Vec::new(), Some(*first));
    for (uid, guid) in names.range(first..=last) {
        parts.extend(next.filter(|next| next < uid).map(|next| unnamed(next, uid - 1)));
        parts.push(Range { first: *uid, last: *uid, guid: guid.clone() });
        next = uid.checked_add(1);
    }
    parts.extend(next.filter(|next| next <= last).map(|next| unnamed(next, *last)));
    parts
}

fn name(update: &mut Update, names: &Names) {
    update.messages = update.messages.iter().flat_map(|range| named(range, names)).collect();
}

/// What later changes leave of it.
fn left_of(mut part: Update, later: &[Update], apart: &HashSet<String>) -> Vec<Update> {
    // A mailbox may have copies of a message, with its GUID: they stay in this order.
    let mut uids: HashMap<String, Vec<(u32, u32)>> = HashMap::new();
    for range in &part.messages {
        uids.entry(range.guid.clone()).or_default().push((range.first, range.last));
    }
    let is_apart = |range: &&mut Range| apart.contains(&range.guid);
    for range in part.messages.iter_mut().filter(is_apart) {
        (range.first, range.last) = NO_UID;
    }
    let mut left = later
        .iter()
        .fold(vec![part], |left, later| left.into_iter().flat_map(|update| update.without(later)).collect());
    for update in &mut left {
        let mut uids: HashMap<&str, _> =
            uids.iter().map(|(guid, uids)| (guid.as_str(), uids.iter().copied())).collect();
        for range in update.messages.iter_mut().filter(is_apart) {
            let uid = uids.get_mut(range.guid.as_str()).and_then(Iterator::next);
            (range.first, range.last) = uid.unwrap_or(NO_UID);
        }
    }
    left
}

/// Those of the UIDs here that are of other messages than the one that a server has at `uid`, although all have one GUID: the server
/// has these, too, under other UIDs. `known`: what is not here at its UID there; `there`: UIDs that it names.
fn others_of(uid: u32, here: HashSet<u32>, known: &[Elsewhere], there: impl Iterator<Item = u32>) -> HashSet<u32> {
    let here_of = |uid: u32| known.iter().find(|one| one.uid == uid).map_or(uid, |one| one.here);
    let was_moved = |from: u32, to: u32| known.iter().any(|one| one.moved && one.uid == from && one.here == to);
    let stands = here_of(uid);
    let there = known.iter().map(|one| one.uid).chain(there);
    let others: HashSet<u32> = there.filter(|other| *other != uid).map(here_of).collect();
    here.into_iter().filter(|at| others.contains(at) && *at != stands && !was_moved(*at, stands)).collect()
}

/// The messages of which a change of flags gives the UIDs alone get their names, if there are not too many.
fn name_all(change: &mut Change, names: &Names) {
    if names.is_empty() {
        return;
    }
    let mut named = change.clone();
    for op in &mut named.ops {
        let Some(What::Flags(flags)) = &op.what else { continue };
        let mut update = update(flags);
        name(&mut update, names);
        *op = operation(update);
    }
    if change::check_change(&named).is_ok() {
        *change = named;
    }
}

impl Engine {
    /// Takes out of a peer's changes what later changes of the same flags have decided. To be called before they are applied.
    pub fn reduce_flags<'a>(
        &mut self,
        user: &Arc<str>,
        changes: impl Iterator<Item = &'a mut Change>,
    ) -> Result<(), JournalError> {
        let is_of_flags = |change: &&mut Change| change.stamp.is_some() && !updates(change).is_empty();
        let changes: Vec<&mut Change> = changes.collect();
        let mut coming = Coming::default();
        changes.iter().for_each(|change| coming.add(self.lists.canonical(user, mailbox_guid(change)), change));
        let changes: Vec<&mut Change> = changes.into_iter().filter(is_of_flags).collect();
        let first = changes.iter().filter_map(|change| change.stamp.as_ref()).map(|stamp| stamp.clock).min();
        let kept = match first {
            Some(clock) if self.flags_clocks.get(user).is_some_and(|last| *last >= clock) => self.kept(user, clock)?,
            _ => Vec::new(),
        };
        self.races.begin_job();
        for change in changes {
            let Some(stamp) = &change.stamp else { continue };
            let made = Stamp { vector: vec![], ..stamp.clone() };
            let guid = self.lists.canonical(user, mailbox_guid(change)).to_vec();
            let stamp = stamp.clone();
            let is_later =
                |kept: &&Kept| kept.mailbox == guid && (kept.clock, &kept.origin) > (stamp.clock, &stamp.origin);
            let later: Vec<&Kept> = kept.iter().filter(is_later).collect();
            let names = match later.is_empty() {
                true => Names::new(),
                false => self.names(user, &stamp.origin, &guid, &updates(change), &coming)?,
            };
            name_all(change, &names);
            let later: Vec<Update> = later.into_iter().flat_map(|kept| kept.named(&stamp.origin, &names)).collect();
            let later: Vec<&Update> = later.iter().collect();
            let of_copies = self.of_copies(user, &stamp.origin, &guid, &updates(change), &later, &coming)?;
            let later = self.of_other_uids(user, &stamp.origin, &guid, &later)?;
            let is_apart = |range: &Range| match coming.saved.contains(&range.guid) {
                // Nobody can have changed it here by its UID.
                true => Ok(true),
                false => self.is_elsewhere(user, &stamp.origin, &guid, range.first).map(|at| at.is_some()),
            };
            let mut apart = HashSet::new();
            for range in
                updates(change).iter().flat_map(|update| &update.messages).filter(|range| !range.guid.is_empty())
            {
                if !later.is_empty() && is_apart(range)? {
                    apart.insert(range.guid.clone());
                }
            }
            self.take_out(user, change, &later, &of_copies, &apart);
            let mailbox = Mailbox { guid, ..change.mailbox.clone().unwrap_or_default() };
            self.races.is_applied(user, made, mailbox, updates(change), self.now_ms);
        }
        Ok(())
    }

    fn kept(&self, user: &str, clock: u64) -> Result<Vec<Kept>, JournalError> {
        let kept = self.journal.flags_from(user, clock)?.into_iter().filter_map(|kept| {
            let FlagChange { clock, origin, change } = kept;
            let change = Change::decode(&change[..]).ok()?;
            let mailbox = self.lists.canonical(user, mailbox_guid(&change)).to_vec();
            Some(Kept { clock, origin, mailbox, updates: updates(&change) })
        });
        Ok(kept.collect())
    }

    /// Of the messages that the server means by their UIDs alone, and that may be others here: it saved them when it had not heard of
    /// these yet.
    fn names(
        &self,
        user: &str,
        origin: &str,
        mailbox: &[u8],
        updates: &[Update],
        coming: &Coming,
    ) -> Result<Names, JournalError> {
        let unnamed = updates.iter().flat_map(|update| &update.messages).filter(|range| range.guid.is_empty());
        let span = unnamed.map(|range| (range.first, range.last));
        let Some((first, last)) = span.reduce(|all, one| (all.0.min(one.0), all.1.max(one.1))) else {
            return Ok(Names::new());
        };
        let mut names = coming.names.get(&(origin.to_owned(), mailbox.to_vec())).cloned().unwrap_or_default();
        if self.users_elsewhere.contains(user) {
            let known = self.journal.elsewhere(user, origin, mailbox, (first, last))?;
            names.extend(known.into_iter().map(|known| (known.uid, known.guid)));
        }
        Ok(names)
    }

    /// What later changes did to a copy of a message, they did not do to the message.
    fn of_copies(
        &self,
        user: &str,
        origin: &str,
        mailbox: &[u8],
        updates: &[Update],
        later: &[&Update],
        coming: &Coming,
    ) -> Result<OfCopies, JournalError> {
        let mut of_copies = OfCopies::new();
        if later.is_empty() {
            return Ok(of_copies);
        }
        for range in updates.iter().flat_map(|update| &update.messages).filter(|range| !range.guid.is_empty()) {
            let (uid, guid) = (range.first, &range.guid);
            let named = later.iter().flat_map(|update| &update.messages).filter(|other| other.guid == *guid);
            let others =
                self.other_messages(user, origin, (mailbox, uid, guid), named.map(|other| other.first), coming)?;
            if others.is_empty() {
                continue;
            }
            let mut meant: Vec<Update> = later.iter().map(|update| (*update).clone()).collect();
            for update in &mut meant {
                update.messages.retain(|other| other.guid != *guid || !others.contains(&other.first));
            }
            let meant: Vec<&Update> = meant.iter().collect();
            of_copies.insert((uid, guid.clone()), self.of_other_uids(user, origin, mailbox, &meant)?);
        }
        Ok(of_copies)
    }

    /// Which of these UIDs here are of other messages than the one that the server has at this UID, although all have its GUID.
    fn other_messages(
        &self,
        user: &str,
        origin: &str,
        (mailbox, uid, guid): (&[u8], u32, &str),
        here: impl Iterator<Item = u32>,
        coming: &Coming,
    ) -> Result<HashSet<u32>, JournalError> {
        let is_new = coming.is_new(mailbox, uid, guid);
        let (mut others, here): (HashSet<u32>, HashSet<u32>) = here.partition(|here| is_new && *here < uid);
        if here.is_empty() || coming.moved.contains(guid) {
            return Ok(others);
        }
        let known = match self.users_elsewhere.contains(user) {
            true => self.journal.elsewhere_of(user, origin, mailbox, guid)?,
            false => Vec::new(),
        };
        others.extend(others_of(uid, here, &known, coming.uids(mailbox, guid)));
        Ok(others)
    }

    /// Messages with a GUID keep their UIDs only where these name the same for the other server.
    fn of_other_uids(
        &self,
        user: &str,
        origin: &str,
        mailbox: &[u8],
        updates: &[&Update],
    ) -> Result<Vec<Update>, JournalError> {
        let mut shared: Vec<Update> = updates.iter().map(|update| (*update).clone()).collect();
        let named = shared.iter_mut().flat_map(|update| &mut update.messages).filter(|range| !range.guid.is_empty());
        for range in named {
            if self.is_elsewhere(user, origin, mailbox, range.first)?.is_some_and(|guid| guid != range.guid) {
                (range.first, range.last) = NO_UID;
            }
        }
        Ok(shared)
    }

    /// Which message the server has at a UID where it is not here.
    fn is_elsewhere(&self, user: &str, origin: &str, mailbox: &[u8], uid: u32) -> Result<Option<String>, JournalError> {
        if !self.users_elsewhere.contains(user) {
            return Ok(None);
        }
        Ok(self.journal.elsewhere(user, origin, mailbox, (uid, uid))?.pop().map(|known| known.guid))
    }

    /// `apart`: GUIDs of messages that are not here at the UIDs that they have there: of those only GUIDs are compared.
    fn take_out(
        &mut self,
        user: &str,
        change: &mut Change,
        later: &[Update],
        of_copies: &OfCopies,
        apart: &HashSet<String>,
    ) {
        let mut ops = Vec::with_capacity(change.ops.len());
        let mut is_less = false;
        for op in &change.ops {
            let Some(What::Flags(flags)) = &op.what else {
                ops.push(op.clone());
                continue;
            };
            let whole = update(flags);
            let later_of = |range: &Range| of_copies.get(&(range.first, range.guid.clone()));
            let (copies, others): (Vec<Range>, Vec<Range>) =
                whole.messages.iter().cloned().partition(|range| later_of(range).is_some());
            let with = |messages: Vec<Range>| Update { messages, ..whole.clone() };
            let of_copies =
                copies.into_iter().map(|range| (later_of(&range).map_or(later, Vec::as_slice), with(vec![range])));
            let parts = (!others.is_empty()).then(|| (later, with(others))).into_iter().chain(of_copies);
            for (later, part) in parts {
                let left = left_of(part.clone(), later, apart);
                is_less |= left != [part];
                ops.extend(left.into_iter().map(operation));
            }
        }
        if !is_less {
            return;
        }
        let path = change.mailbox.as_ref().map(|mailbox| &mailbox.path[..]).unwrap_or_default();
        self.counts.solved(user, path, Rule::LaterFlag);
        if ops.is_empty() {
            ops.push(Op { what: Some(change::nothing()) });
        }
        let reduced = Change { ops, ..change.clone() };
        // In too many pieces it stays whole: then what comes last holds.
        if change::check_change(&reduced).is_ok() {
            *change = reduced;
        }
    }

    /// A change of this server has its clock and is in the journal: peers may have made changes of the same flags meanwhile.
    /// It is of flags alone.
    pub fn note_own_flags(&mut self, user: &Arc<str>, change: &Change) -> Result<(), JournalError> {
        self.keep_flags(user, change)?;
        let updates = updates(change);
        let mailbox = change.mailbox.clone().unwrap_or_default();
        let written = change.spans.iter().filter(|span| span.mailbox_guid == mailbox.guid && span.touches);
        let Some(place) = written.map(|span| (span.log_seq, span.begin)).max() else { return Ok(()) };
        let made = Stamp { vector: vec![], ..change.stamp.clone().unwrap_or_default() };
        let undone = self.races.is_told(user, made, mailbox, updates, place, self.now_ms);
        self.make_again(user, undone)
    }

    /// For what is still to come, from peers that have not heard of it. The change is of flags alone.
    pub fn keep_flags(&mut self, user: &Arc<str>, change: &Change) -> Result<(), JournalError> {
        let Some(stamp) = &change.stamp else { return Ok(()) };
        let mailbox = Mailbox { guid: mailbox_guid(change).to_vec(), ..Default::default() };
        let kept = Change { mailbox: Some(mailbox), ops: change.ops.clone(), ..Default::default() }.encode_to_vec();
        let kept = FlagChange { clock: stamp.clock, origin: stamp.origin.clone(), change: kept };
        self.journal.note_flags(user, &kept, self.outside.now_us())?;
        let last = self.flags_clocks.entry(user.clone()).or_default();
        *last = stamp.clock.max(*last);
        Ok(())
    }

    /// Workers said what they wrote.
    pub fn note_where_flags_stand(&mut self, spans: &[Span]) {
        for span in spans {
            let user: Arc<str> = span.user.as_str().into();
            for applied in &span.applied {
                let undone = self.races.stands(&user, applied, &span.mailbox_guid, (span.log_seq, span.end));
                if let Err(error) = self.make_again(&user, undone) {
                    self.fail(error);
                }
            }
        }
    }

    fn make_again(&mut self, user: &Arc<str>, undone: Vec<Undone>) -> Result<(), JournalError> {
        for change in undone.into_iter().flat_map(|undone| undone.changes(user)) {
            self.want_redone(user, &change)?;
        }
        Ok(())
    }

    /// Says to each peer what it has heard of, and forgets what all have.
    pub fn settle_flags(&mut self) -> Result<(), JournalError> {
        let is_time = self.flags_settled_ms + FORGET_EVERY_MS <= self.now_ms;
        for index in 0..self.peers.len() {
            // What others have not told us yet may have to be passed on, with whatever clock it has.
            let others = self.peers.iter().enumerate().filter(|(other, _)| *other != index);
            let others = others.map(|(_, other)| other.heard_clock).min().unwrap_or(u64::MAX);
            let peer = &mut self.peers[index];
            let Some(link) = &mut peer.link else { continue };
            if !peer.outbox.has_pending() {
                link.session.set_heard_clock(self.clock.last().min(others));
            } else if is_time {
                let first = self.journal.unacknowledged(&peer.name, None, 0, 1)?.pop();
                // Those that are passed on may have any clock.
                if let Some(first) = first.filter(|first| first.seq > peer.last_passed_on) {
                    let clock =
                        sent_change(&first.frame).and_then(|change| change.stamp).map_or(0, |stamp| stamp.clock);
                    link.session.set_heard_clock(clock.saturating_sub(1).min(others));
                }
            }
            peer.heard_clock = peer.heard_clock.max(link.session.peers_heard_clock());
        }
        if !is_time {
            return Ok(());
        }
        self.flags_settled_ms = self.now_ms;
        let heard = self.peers.iter().map(|peer| peer.heard_clock).min().unwrap_or(0);
        // Nor what came after one that is still to be made again.
        let heard = self.redos.first_clock().map_or(heard, |clock| heard.min(clock));
        if self.flags_clocks.values().any(|clock| *clock <= heard) {
            self.journal.forget_flags(heard)?;
            self.flags_clocks.retain(|_, clock| *clock > heard);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(first: u32, last: u32, is_added: bool) -> Update {
        let (add, remove) = if is_added { (1, 0) } else { (0, 1) };
        let messages = vec![Range { first, last, guid: String::new() }];
        Update { messages, add, remove, ..Default::default() }
    }

    fn inbox() -> Mailbox {
        Mailbox { guid: vec![1; 16], ..Default::default() }
    }

    fn theirs(seq: u64) -> SeqOf {
        SeqOf { origin: "b".into(), epoch: 1, seq }
    }

    fn stamp(made: SeqOf) -> Stamp {
        let SeqOf { origin, epoch, seq } = made;
        Stamp { origin, epoch, seq, ..Default::default() }
    }

    fn ours() -> Stamp {
        Stamp { origin: "a".into(), epoch: 1, seq: 7, clock: 9, ..Default::default() }
    }

    fn updates_of(undone: Vec<Undone>) -> Vec<Update> {
        undone.into_iter().map(|undone| undone.update).collect()
    }

    #[test]
    fn what_stands_before_an_earlier_change_is_made_again() {
        let jane: Arc<str> = "jane".into();
        let told = |races: &mut Races, at| {
            updates_of(races.is_told(&jane, ours(), inbox(), vec![seen(2, 9, true)], (2, at), 0))
        };
        // Whichever is heard of first.
        for place_comes_first in [true, false] {
            let mut races = Races::default();
            races.begin_job();
            races.is_applied(&jane, stamp(theirs(1)), inbox(), vec![seen(1, 4, false)], 0);
            let (mut lost, mut stands) = (vec![], vec![]);
            if place_comes_first {
                stands = updates_of(races.stands(&jane, &theirs(1), &[1; 16], (2, 100)));
                lost = told(&mut races, 50);
            } else {
                lost.extend(told(&mut races, 50));
                stands.extend(updates_of(races.stands(&jane, &theirs(1), &[1; 16], (2, 100))));
            }
            assert_eq!([lost, stands].concat(), [seen(2, 4, true)]);
            assert_eq!(told(&mut races, 100), [], "made when it had been applied");
        }
    }

    #[test]
    fn a_change_in_several_commits_stands_where_the_last_of_it_does() {
        let jane: Arc<str> = "jane".into();
        let mut races = Races::default();
        races.begin_job();
        // In two parts, as what is made again.
        for uid in [1, 2] {
            races.is_applied(&jane, stamp(theirs(1)), inbox(), vec![seen(uid, uid, false)], 0);
        }
        let told = races.is_told(&jane, ours(), inbox(), vec![seen(1, 9, true)], (2, 50), 0);
        assert_eq!(updates_of(told), []);
        assert_eq!(updates_of(races.stands(&jane, &theirs(1), &[1; 16], (2, 40))), []);
        let both = [seen(1, 1, true), seen(2, 2, true)];
        assert_eq!(updates_of(races.stands(&jane, &theirs(1), &[1; 16], (2, 60))), both);
    }

    #[test]
    fn what_was_told_before_a_change_is_applied_was_taken_out_of_that() {
        let jane: Arc<str> = "jane".into();
        let mut races = Races::default();
        races.is_told(&jane, ours(), inbox(), vec![seen(1, 4, true)], (2, 50), 0);
        races.begin_job();
        races.is_applied(&jane, stamp(theirs(1)), inbox(), vec![seen(1, 4, false)], 0);
        assert_eq!(updates_of(races.stands(&jane, &theirs(1), &[1; 16], (2, 100))), []);
        assert_eq!(updates_of(races.stands("joe", &theirs(1), &[1; 16], (2, 100))), []);
        assert_eq!(updates_of(races.stands(&jane, &theirs(2), &[1; 16], (2, 100))), []);
    }

    #[test]
    fn what_a_later_change_of_a_peer_has_decided_is_not_made_again() {
        let jane: Arc<str> = "jane".into();
        let mut races = Races::default();
        // The job was killed, and is given again, with what is later than ours.
        races.begin_job();
        races.is_applied(&jane, stamp(theirs(1)), inbox(), vec![seen(1, 4, false)], 0);
        assert_eq!(updates_of(races.is_told(&jane, ours(), inbox(), vec![seen(1, 4, true)], (2, 50), 0)), []);
        races.begin_job();
        races.is_applied(&jane, stamp(theirs(1)), inbox(), vec![], 0);
        let later = Stamp { clock: 10, ..stamp(theirs(2)) };
        races.is_applied(&jane, later, inbox(), vec![seen(1, 2, false)], 0);
        let stands = races.stands(&jane, &theirs(1), &[1; 16], (2, 100));
        assert_eq!(updates_of(stands), [seen(3, 4, true)], "the killed worker may have done that");
        assert_eq!(updates_of(races.stands(&jane, &theirs(2), &[1; 16], (2, 200))), []);
    }

    #[test]
    fn what_was_committed_in_another_mailbox_says_nothing() {
        let jane: Arc<str> = "jane".into();
        let mut races = Races::default();
        races.begin_job();
        races.is_applied(&jane, stamp(theirs(1)), inbox(), vec![seen(1, 4, false)], 0);
        assert_eq!(updates_of(races.stands(&jane, &theirs(1), &[2; 16], (2, 900))), []);
        assert_eq!(updates_of(races.stands(&jane, &theirs(1), &[1; 16], (2, 40))), []);
        assert_eq!(updates_of(races.is_told(&jane, ours(), inbox(), vec![seen(1, 4, true)], (2, 50), 0)), []);
    }

    #[test]
    fn what_was_done_to_a_copy_later_was_not_done_to_the_message() {
        let at = |uid, here, moved| Elsewhere { mailbox: vec![], uid, guid: "x".into(), here, moved, alone: false };
        let others = |uid, here: &[u32], known: &[Elsewhere], there: &[u32]| {
            let others = others_of(uid, here.iter().copied().collect(), known, there.iter().copied());
            let mut others: Vec<u32> = others.into_iter().collect();
            others.sort();
            others
        };
        assert_eq!(others(5, &[4, 5], &[], &[4, 5]), [4], "it names both");
        assert_eq!(others(4, &[4, 10], &[at(5, 10, false)], &[4]), [10], "the other one is known to be elsewhere");
        assert_eq!(others(5, &[4, 10], &[at(5, 10, false)], &[5]), [], "4 may be what it was, and nobody has said so");
        let moved = [at(5, 11, false), at(10, 11, true)];
        assert_eq!(others(5, &[10, 11], &moved, &[5]), [], "it was at 10 here");
    }

    #[test]
    fn messages_with_names_are_told_apart_from_the_others_of_a_range() {
        let names = |all: &[u32]| all.iter().map(|uid| (*uid, format!("of {uid}"))).collect::<Names>();
        let in_words = |(first, last), all: &[u32]| {
            let parts = named(&Range { first, last, guid: String::new() }, &names(all));
            let word = |Range { first, last, guid }| if guid.is_empty() { format!("{first}-{last}") } else { guid };
            parts.into_iter().map(word).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(in_words((2, 9), &[]), "2-9");
        assert_eq!(in_words((2, 9), &[1, 2, 3, 6, 9, 10]), "of 2, of 3, 4-5, of 6, 7-8, of 9");
        assert_eq!(in_words((1, u32::MAX), &[u32::MAX]), format!("1-{}, of {}", u32::MAX - 1, u32::MAX));
        let one = Range { first: 5, last: 5, guid: "x".into() };
        assert_eq!(named(&one, &names(&[5])), [one]);
    }

    #[test]
    fn races_are_bounded() {
        let jane: Arc<str> = "jane".into();
        let mut races = Races::default();
        for n in 0..1_000 {
            races.is_told(&jane, ours(), inbox(), vec![seen(1, 1, true)], (2, n), n);
        }
        assert_eq!(races.users[&jane].len(), RACES_PER_USER_MAX);
        races.is_told(&jane, ours(), inbox(), vec![seen(1, 1, true)], (2, 0), 10 * RACE_MS_MAX);
        assert_eq!(races.users[&jane].len(), 1);
    }
}
