//! Comparisons of users with peers: what a person asks for, and what stands in the list of what failed.
//!
//! [`crate::compare`] decides; here it is asked, here and there ([`super::questions`]), and told. Both sides are asked while nothing of
//! the user is on its way between them, and what comes in between is noticed, so an answer of ours and one of theirs are of
//! one moment. A difference counts if it is there twice, with more time in between than a process takes to tell of what it
//! did. What is to be repaired stands in the journal until it is: a relay that is killed goes on with the next start.
//! Bounded: so many users at once, and what one may have.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use mio::Token;
use prost::Message as _;

use super::engine::{Close, Engine, Role};
use super::local::OUT_BYTES_MAX;
use super::order::HOLD_MS_MAX;
use super::questions::{at_once, tell_frames, Asker, Unanswered, Wanted};
use crate::change::{self, GUID_BYTES, MESSAGE_GUID_BYTES_MAX};
use crate::compare::descent::{Ask, Descent};
use crate::compare::list::{self, List, Pairs};
use crate::compare::repair::{Apart, Difference, Keys, MoreFlags, Repair, Telling};
use crate::compare::{BodyHash, InRange, Mailbox, Message, Range};
use crate::journal::{Failed, JournalError};
use crate::merge::mailbox::Named;
use crate::wire::proto::frame::Kind;
use crate::wire::proto::{
    self, Answer, CompareList, CompareRequest, Question, Survey, Surveyed, Tell, TellOf, UidRange,
};

/// Users who are compared at the same time.
const RUNS_MAX: usize = 8;
/// That one round begins: some end at once.
const BEGUN_MAX: usize = 64;
/// Between two looks at a difference: what nobody told of within that time is looked for by others.
const CONFIRM_MS: u64 = HOLD_MS_MAX + 200;
/// How often a user is told of and compared again, until nothing differs.
const ROUNDS_MAX: u32 = 6;
/// For how long a comparison waits for a moment without changes, if none of them is acknowledged; and if they are.
const SETTLE_MS_MAX: u64 = 120_000;
const SETTLING_MS_MAX: u64 = 15 * 60_000;
const POLL_MS: u64 = 50;
/// And for answers: a mailbox may be large.
const ANSWER_MS_MAX: u64 = 15 * 60_000;
/// Until what could not be compared is tried again, doubling.
const RETRY_MS_MIN: u64 = 60_000;
const RETRY_MS_MAX: u64 = 3_600_000;
/// For so long a change that was set aside has its user compared; what that cannot mend needs a person.
const ASIDE_US_MAX: u64 = 3_600_000_000;
/// What a peer answers to one question.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Between two looks into the list of what failed, and users that one brings.
const LIST_EVERY_MS: u64 = 5_000;
const LISTED_MAX: usize = 100;
/// A person is told that it still goes on.
const ALIVE_EVERY_MS: u64 = 1_000;
/// Ranges in a part of a request, and flags of messages.
const RANGES_MAX: usize = 1_000;
const FLAGS_MAX: usize = 64;
/// Mailboxes and subscriptions of one user.
const NAMES_MAX: usize = 100_000;
/// Users that one look into the journal brings.
const USERS_AT_ONCE: usize = 1_000;

/// A user who is to be compared.
struct User {
    repair: bool,
    /// Every message is read.
    bodies: bool,
    /// A person waits for it: what does not work now is an error.
    asked: bool,
    /// Nobody does, and nothing is known to differ.
    in_background: bool,
    due_ms: u64,
    /// After the last one that did not come to its end.
    pause_ms: u64,
}

impl User {
    /// Whose mail is to be made the same, and nobody waits for it.
    fn listed(due_ms: u64) -> User {
        User { repair: true, bodies: false, asked: false, in_background: false, due_ms, pause_ms: 0 }
    }
}

/// All of them, by name and by when their turn is.
#[derive(Default)]
struct Users {
    by_name: BTreeMap<Arc<str>, User>,
    by_due: BTreeSet<(u64, Arc<str>)>,
}

impl Users {
    /// If he is not there already.
    fn add(&mut self, name: &Arc<str>, user: User) {
        if !self.by_name.contains_key(name) {
            self.by_due.insert((user.due_ms, name.clone()));
            self.by_name.insert(name.clone(), user);
        }
    }

    fn take(&mut self, name: &Arc<str>) -> Option<User> {
        let user = self.by_name.remove(name)?;
        self.by_due.remove(&(user.due_ms, name.clone()));
        Some(user)
    }

    fn retain(&mut self, is_wanted: impl Fn(&Arc<str>, &User) -> bool) {
        self.by_name.retain(|name, user| is_wanted(name, user));
        self.by_due.retain(|(_, name)| self.by_name.contains_key(name));
    }

    /// Who waits for nothing but his turn, the first first.
    fn due(&self, now_ms: u64) -> impl Iterator<Item = (&Arc<str>, &User)> {
        let due = self.by_due.iter().take_while(move |(due_ms, _)| *due_ms <= now_ms);
        due.filter_map(|(_, name)| Some((name, self.by_name.get(name)?)))
    }

    /// When somebody's time comes.
    fn next_due_ms(&self, now_ms: u64) -> Option<u64> {
        self.by_due.range((now_ms + 1, "".into())..).next().map(|(due_ms, _)| *due_ms)
    }
}

#[derive(Debug, PartialEq)]
enum Step {
    /// For a moment without changes.
    Settle,
    /// Both sides are asked for the list, or what the descent wants.
    Asked,
    Pause(u64),
    /// Both sides tell.
    Tell,
}

/// One user and one peer.
struct Run {
    id: u64,
    user: Arc<str>,
    peer: usize,
    /// Those with whom he is compared next.
    peers: Vec<usize>,
    /// Those who have the same, and those who were not connected.
    equal: Vec<usize>,
    away: Vec<usize>,
    repair: bool,
    bodies: bool,
    asked: bool,
    in_background: bool,
    pause_ms: u64,
    began_us: u64,
    patience: Patience,
    step: Step,
    round: u32,
    generation: u64,
    /// Our number of the question.
    question: u64,
    partly: Vec<Surveyed>,
    partly_bytes: usize,
    answer_by_ms: u64,
    ours: Option<Vec<Surveyed>>,
    theirs: Option<Vec<Surveyed>>,
    pairs: Pairs,
    descent: Option<Descent>,
    found: Repair,
    /// What differed the last time.
    known: Option<Keys>,
    is_reported: bool,
    mails: u64,
    errors: Vec<String>,
}

/// With a user who has changes all the time, or so many that they take a while.
struct Patience {
    /// Until then, whatever happens.
    end_ms: u64,
    /// Until then, if nothing does.
    idle_ms: u64,
    /// The first change that the peer had not acknowledged.
    first_pending: Option<u64>,
}

impl Patience {
    fn from(now_ms: u64) -> Patience {
        Patience { end_ms: now_ms + SETTLING_MS_MAX, idle_ms: now_ms + SETTLE_MS_MAX, first_pending: None }
    }

    fn is_over(&mut self, now_ms: u64, first_pending: Option<u64>) -> bool {
        if first_pending > self.first_pending {
            self.first_pending = first_pending;
            self.idle_ms = now_ms + SETTLE_MS_MAX;
        }
        self.idle_ms.min(self.end_ms) <= now_ms
    }
}

/// Who waits at the other end of doveadm.
struct Listener {
    users: HashSet<Arc<str>>,
    /// Comparisons up to this one had begun before.
    after: u64,
    /// The userdb is asked for them.
    is_listing: bool,
    repair: bool,
    bodies: bool,
    error: String,
}

impl Listener {
    /// It has not begun before it was asked for.
    fn waits_for(&self, run: &Run) -> bool {
        run.id > self.after && (run.repair || !self.repair) && (run.bodies || !self.bodies)
    }
}

/// How far it is.
#[derive(Default)]
struct Progress {
    users: u64,
    users_done: u64,
    mails: u64,
    mails_done: u64,
    began_ms: u64,
    ended_ms: u64,
}

/// See the module.
#[derive(Default)]
pub struct Comparisons {
    users: Users,
    runs: Vec<Run>,
    listeners: HashMap<Token, Listener>,
    /// The listener for whom the userdb is asked, by the question's number.
    listing: HashMap<u64, Token>,
    progress: Progress,
    last_id: u64,
    list_at_ms: u64,
    alive_at_ms: u64,
}

impl Comparisons {
    /// When [`Engine::tick_comparisons`] has something to do although nothing else happened.
    pub fn wake_up_ms(&self, now_ms: u64) -> Option<u64> {
        let runs = self.runs.iter().map(|run| match run.step {
            Step::Settle => now_ms + POLL_MS,
            Step::Pause(until_ms) => until_ms,
            Step::Asked | Step::Tell => run.answer_by_ms,
        });
        let alive = (!self.listeners.is_empty()).then_some(self.alive_at_ms);
        let users = self.next(now_ms).map(|_| now_ms).or_else(|| self.users.next_due_ms(now_ms));
        runs.chain(alive).chain(users).chain((self.list_at_ms != u64::MAX).then_some(self.list_at_ms)).min()
    }

    fn want(&mut self, user: &Arc<str>, wanted: User, now_ms: u64) {
        if !self.is_busy() {
            self.progress = Progress { began_ms: now_ms, ..Progress::default() };
        }
        let known = self.users.take(user);
        if known.as_ref().is_none_or(|known| known.in_background) {
            self.progress.users += 1;
        }
        let wanted = match known {
            Some(known) => User {
                repair: known.repair || wanted.repair,
                bodies: known.bodies || wanted.bodies,
                asked: known.asked || wanted.asked,
                in_background: false,
                due_ms: if wanted.asked { now_ms } else { known.due_ms },
                ..known
            },
            None => wanted,
        };
        self.users.add(user, wanted);
    }

    /// When it is his turn among all users.
    pub fn want_in_background(&mut self, user: &Arc<str>, now_ms: u64) {
        self.users.add(user, User { in_background: true, ..User::listed(now_ms) });
    }

    /// Nobody is compared, or to be now.
    pub fn is_idle(&self, now_ms: u64) -> bool {
        self.runs.is_empty() && self.users.due(now_ms).next().is_none()
    }

    /// Whose turn it is; who is asked for goes first.
    fn next(&self, now_ms: u64) -> Option<Arc<str>> {
        if self.runs.len() >= RUNS_MAX {
            return None;
        }
        let next = |asked: bool| {
            let mut due = self.users.due(now_ms);
            due.find(|(name, user)| user.asked == asked && !self.is_running(name)).map(|(name, _)| name.clone())
        };
        next(true).or_else(|| next(false))
    }

    /// Somebody is whom a person asked for, or of whom something is listed.
    fn is_busy(&self) -> bool {
        self.users.by_name.values().any(|user| !user.in_background) || self.runs.iter().any(|run| !run.in_background)
    }

    pub fn is_running(&self, user: &str) -> bool {
        self.running_since_us(user).is_some()
    }

    pub fn running_since_us(&self, user: &str) -> Option<u64> {
        self.runs.iter().find(|run| *run.user == *user).map(|run| run.began_us)
    }
}

impl Engine {
    // ---- What a person asks for --------------------------------------------------------------------------------------

    pub fn compare(&mut self, token: Token, request: &CompareRequest) {
        let listener = Listener {
            users: HashSet::new(),
            after: self.comparisons.last_id,
            is_listing: request.all,
            repair: request.repair,
            bodies: request.bodies,
            error: String::new(),
        };
        self.comparisons.listeners.insert(token, listener);
        self.comparisons.alive_at_ms = self.now_ms + ALIVE_EVERY_MS;
        if self.peers.is_empty() {
            return self.listener_hears(token, "there is no peer (dovetail_peers)");
        }
        if !request.all {
            match change::check_user(&request.user) {
                Ok(()) => self.compare_users(token, vec![request.user.clone()]),
                Err(error) => self.listener_hears(token, &error.to_string()),
            }
            return self.end_listeners();
        }
        self.comparisons.last_id += 1;
        let id = self.comparisons.last_id;
        self.comparisons.listing.insert(id, token);
        self.want_answer(Asker::Own(id), "".into(), 0, Wanted::Users);
    }

    fn users_are_listed(&mut self, token: Token, outcome: Result<Vec<Surveyed>, Unanswered>) {
        let listed = outcome.map(|said| said.into_iter().flat_map(|said| said.subscribed).flat_map(|name| name.path));
        let known = self.known_users();
        let users: BTreeSet<String> = match listed {
            Ok(listed) => listed.filter(|user| change::check_user(user).is_ok()).chain(known).collect(),
            Err(why) => {
                self.listener_hears(token, &format!("the userdb does not list all users: {}", why.error));
                known.into_iter().collect()
            }
        };
        if let Some(listener) = self.comparisons.listeners.get_mut(&token) {
            listener.is_listing = false;
        }
        self.compare_users(token, users.into_iter().collect());
        self.end_listeners();
    }

    fn known_users(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            match self.journal.users(&after, USERS_AT_ONCE) {
                Ok(users) if users.is_empty() => return all,
                Ok(users) => {
                    after = users.last().cloned().unwrap_or_default();
                    all.extend(users);
                }
                Err(error) => {
                    self.fail(error);
                    return all;
                }
            }
        }
    }

    fn compare_users(&mut self, token: Token, users: Vec<String>) {
        let Some(listener) = self.comparisons.listeners.get_mut(&token) else { return };
        let (repair, bodies) = (listener.repair, listener.bodies);
        let users: Vec<Arc<str>> = users.iter().map(|user| user.as_str().into()).collect();
        listener.users.extend(users.iter().cloned());
        for user in users {
            if repair {
                // Until it is done, whoever dies meanwhile.
                self.remember_failed(&Failed {
                    user: user.to_string(),
                    at_us: self.outside.now_us(),
                    error: "to be compared with all peers, as doveadm was asked to".to_owned(),
                    ..Default::default()
                });
            }
            let wanted = User { repair, bodies, asked: true, ..User::listed(self.now_ms) };
            self.comparisons.want(&user, wanted, self.now_ms);
        }
    }

    fn listener_hears(&mut self, token: Token, error: &str) {
        if let Some(listener) = self.comparisons.listeners.get_mut(&token).filter(|l| l.error.is_empty()) {
            listener.error = change::printable(error);
        }
        self.end_listeners();
    }

    /// Those who wait for nobody any more hear so.
    fn end_listeners(&mut self) {
        let is_done = |listener: &Listener| listener.users.is_empty() && !listener.is_listing;
        let done: Vec<Token> =
            self.comparisons.listeners.iter().filter(|(_, listener)| is_done(listener)).map(|(t, _)| *t).collect();
        for token in done {
            let Some(listener) = self.comparisons.listeners.remove(&token) else { continue };
            self.send(token, &Kind::CompareList(CompareList { error: listener.error, ..Default::default() }).into());
        }
    }

    pub fn progress(&self) -> proto::Progress {
        let progress = &self.comparisons.progress;
        let is_running = self.comparisons.is_busy();
        let now_ms = if is_running { self.now_ms } else { progress.ended_ms };
        proto::Progress {
            users: progress.users,
            users_done: progress.users_done,
            mails: progress.mails,
            mails_done: progress.mails_done,
            elapsed_ms: now_ms.saturating_sub(progress.began_ms),
            is_running,
            background_users: self.background.users,
            background_users_done: self.background.done,
            background_left_ms: self.background.left_ms(self.now_ms),
        }
    }

    // ---- Whose turn it is ---------------------------------------------------------------------------------------------

    pub fn tick_comparisons(&mut self) {
        if self.is_stopping() {
            return;
        }
        self.take_listed();
        for _ in 0..BEGUN_MAX {
            let Some(user) = self.comparisons.next(self.now_ms) else { break };
            self.begin_run(user);
        }
        for id in self.comparisons.runs.iter().map(|run| run.id).collect::<Vec<_>>() {
            self.tick_run(id);
        }
        if !self.comparisons.listeners.is_empty() && self.comparisons.alive_at_ms <= self.now_ms {
            self.comparisons.alive_at_ms = self.now_ms + ALIVE_EVERY_MS;
            self.keep_listeners();
        }
    }

    /// Whoever went away is not waited for.
    fn keep_listeners(&mut self) {
        let sockets = &self.sockets;
        let is_there = |token: &Token| sockets.get(token).is_some_and(|socket| matches!(socket.role, Role::Local(_)));
        self.comparisons.listeners.retain(|token, _| is_there(token));
        let listeners = &self.comparisons.listeners;
        let is_waited_for = |user: &Arc<str>| listeners.values().any(|listener| listener.users.contains(user));
        self.comparisons.users.retain(|name, user| user.repair || is_waited_for(name));
        let tokens: Vec<Token> = self.comparisons.listeners.keys().copied().collect();
        for token in tokens {
            self.send(token, &Kind::CompareList(CompareList { more: true, ..Default::default() }).into());
        }
    }

    /// What stands in the list of what failed for a while: most of what leads there is still going on at first.
    fn take_listed(&mut self) {
        let Some(after_us) = self.config.compare_listed_after_us.filter(|_| !self.peers.is_empty()) else {
            self.comparisons.list_at_ms = u64::MAX;
            return;
        };
        if self.comparisons.list_at_ms > self.now_ms {
            return;
        }
        self.comparisons.list_at_ms = self.now_ms + LIST_EVERY_MS;
        let due = self.comparisons.users.due(self.now_ms).take(LISTED_MAX).count();
        let away: Vec<&str> = self.peers.iter().filter(|peer| !peer.is_up()).map(|peer| peer.name.as_str()).collect();
        if self.counts.counters.failed == 0 || due >= LISTED_MAX || away.len() == self.peers.len() {
            return;
        }
        let before_us = self.outside.now_us().saturating_sub(after_us);
        // Those who are to be tried again later do not count.
        let count_max = LISTED_MAX + self.comparisons.users.by_name.len();
        match self.journal.users_to_compare(before_us, self.aside_since_us(), &away, count_max) {
            Ok(users) => {
                // A malformed change may name anybody.
                let users = users.iter().filter(|user| change::check_user(user).is_ok());
                for user in users.map(|user| Arc::from(user.as_str())) {
                    if !self.comparisons.is_running(&user) {
                        self.comparisons.want(&user, User::listed(self.now_ms), self.now_ms);
                    }
                }
            }
            Err(error) => self.fail(error),
        }
    }

    fn aside_since_us(&self) -> u64 {
        self.outside.now_us().saturating_sub(ASIDE_US_MAX)
    }

    fn begin_run(&mut self, user: Arc<str>) {
        let Some(wanted) = self.comparisons.users.take(&user) else { return };
        let mut peers: Vec<usize> = self.peers_of(&user).collect();
        peers.reverse();
        self.comparisons.last_id += 1;
        let run = Run {
            id: self.comparisons.last_id,
            user,
            peer: 0,
            peers,
            equal: vec![],
            away: vec![],
            repair: wanted.repair,
            bodies: wanted.bodies,
            asked: wanted.asked,
            in_background: wanted.in_background,
            pause_ms: wanted.pause_ms,
            began_us: self.outside.now_us(),
            patience: Patience::from(self.now_ms),
            step: Step::Settle,
            round: 0,
            generation: 0,
            question: 0,
            partly: vec![],
            partly_bytes: 0,
            answer_by_ms: 0,
            ours: None,
            theirs: None,
            pairs: vec![],
            descent: None,
            found: Repair::default(),
            known: None,
            is_reported: false,
            mails: 0,
            errors: vec![],
        };
        self.questions.watch(&run.user);
        self.next_peer(run);
    }

    /// Goes on with the next peer, or ends.
    fn next_peer(&mut self, mut run: Run) {
        let mails = std::mem::take(&mut run.mails);
        if !run.in_background {
            self.comparisons.progress.mails_done += mails;
        }
        while let Some(peer) = run.peers.pop() {
            if !self.peers[peer].is_up() {
                run.away.push(peer);
                continue;
            }
            run.peer = peer;
            run.is_reported = false;
            run.round = 0;
            self.start_over(&mut run);
            run.patience = Patience::from(self.now_ms);
            self.comparisons.runs.push(run);
            return;
        }
        self.end_run(run);
    }

    fn end_run(&mut self, run: Run) {
        let has_failed = !run.errors.is_empty();
        if run.repair && !(has_failed && run.equal.is_empty()) {
            if let Err(error) = self.is_compared(&run) {
                return self.fail(error);
            }
        }
        if !run.in_background {
            self.comparisons.progress.users_done += 1;
            self.comparisons.progress.ended_ms = self.now_ms;
        }
        self.questions.forget(&run.user);
        for error in run.errors.iter().filter(|_| !run.asked) {
            log::warn!("A comparison did not come to its end: {error}.");
        }
        let is_listed = || self.journal.is_to_compare(&run.user, self.aside_since_us()).unwrap_or(true);
        if run.repair && has_failed && !run.in_background && is_listed() {
            let pause_ms = (run.pause_ms * 2).clamp(RETRY_MS_MIN, RETRY_MS_MAX);
            let due_ms = self.now_ms + pause_ms;
            let user = User { bodies: run.bodies, pause_ms, ..User::listed(due_ms) };
            self.comparisons.users.add(&run.user, user);
            self.comparisons.progress.users += 1;
        }
        let away = run.away.first().map(|peer| &self.peers[*peer].name);
        let away = away.map(|name| format!("user {}: server {name} is not connected", run.user));
        for listener in self.comparisons.listeners.values_mut() {
            let was_waiting = listener.waits_for(&run) && listener.users.remove(&run.user);
            let error = run.errors.first().or(away.as_ref());
            if let Some(error) = error.filter(|_| was_waiting && listener.error.is_empty()) {
                listener.error = change::printable(error);
            }
        }
        self.end_listeners();
    }

    fn is_compared(&mut self, run: &Run) -> Result<(), JournalError> {
        let name = |peer: &usize| self.peers[*peer].name.as_str();
        let equal: Vec<&str> = run.equal.iter().map(name).collect();
        let left: Vec<usize> = self.peers_of(&run.user).filter(|peer| !run.equal.contains(peer)).collect();
        let left: Vec<&str> = left.iter().map(name).collect();
        if run.in_background {
            // Nobody asked.
        } else if left.is_empty() {
            log::info!("User {}: his mail was compared with that of all peers, and is the same.", run.user);
        } else if !equal.is_empty() {
            let (equal, left) = (equal.join(", "), left.join(", "));
            log::info!(
                "User {}: his mail was compared with that of {equal}, and is the same; with {left} it is not yet.",
                run.user
            );
        }
        self.journal.was_compared(&run.user, &equal, &left, run.began_us)?;
        self.counts.counters.failed = self.journal.failed_count()?;
        for peer in &mut self.peers {
            if peer.outbox.stats().dropped > 0 && self.journal.forget_dropped(&peer.name)? {
                peer.outbox.forget_dropped();
            }
        }
        Ok(())
    }

    // ---- One comparison -----------------------------------------------------------------------------------------------

    fn start_over(&mut self, run: &mut Run) {
        run.step = Step::Settle;
        run.pairs.clear();
        run.descent = None;
        run.found = Repair::default();
    }

    fn take_run(&mut self, id: u64) -> Option<Run> {
        let at = self.comparisons.runs.iter().position(|run| run.id == id)?;
        Some(self.comparisons.runs.swap_remove(at))
    }

    fn tick_run(&mut self, id: u64) {
        let Some(run) = self.comparisons.runs.iter().find(|run| run.id == id) else { return };
        let (user, peer) = (run.user.clone(), run.peer);
        match run.step {
            Step::Pause(until_ms) if until_ms <= self.now_ms => {}
            Step::Settle => {}
            Step::Asked | Step::Tell if run.answer_by_ms <= self.now_ms => {
                return self.fail_run(id, "there is no answer");
            }
            _ => return,
        }
        let first_pending = match self.first_pending_of_user(&user, peer) {
            Ok(first) => first,
            Err(error) => return self.fail(error),
        };
        if first_pending.is_some() || !self.is_settled(&user, peer) {
            let Some(run) = self.comparisons.runs.iter_mut().find(|run| run.id == id) else { return };
            run.step = Step::Settle;
            if run.patience.is_over(self.now_ms, first_pending) {
                self.fail_run(id, "changes of the user are still under way");
            }
            return;
        }
        let Some(mut run) = self.take_run(id) else { return };
        run.generation = self.questions.watch(&user);
        let (theirs, ours) = (survey(&run, true), survey(&run, false));
        run.step = Step::Asked;
        (run.ours, run.theirs) = (None, None);
        self.ask(&mut run, std::iter::once(Question { survey: Some(theirs), ..Default::default() }));
        let id = run.id;
        self.comparisons.runs.push(run);
        self.want_answer(Asker::Own(id), user, peer, Wanted::Survey(ours));
    }

    /// The peer.
    fn ask(&mut self, run: &mut Run, questions: impl Iterator<Item = Question>) {
        (run.partly, run.partly_bytes) = (Vec::new(), 0);
        run.answer_by_ms = self.now_ms + ANSWER_MS_MAX;
        self.comparisons.last_id += 1;
        run.question = self.comparisons.last_id;
        for question in questions {
            if let Some(link) = self.peers[run.peer].link.as_mut().filter(|link| link.session.is_up()) {
                link.session.bulk(Kind::Question(Question { id: run.question, ..question }));
            }
        }
    }

    pub fn take_answer(&mut self, index: usize, answer: Answer) {
        let is_of = |run: &&mut Run| run.peer == index && run.question == answer.id;
        let Some(run) = self.comparisons.runs.iter_mut().find(is_of) else { return };
        let id = run.id;
        if let Some(surveyed) = answer.surveyed {
            run.partly_bytes += surveyed.encoded_len() + std::mem::size_of::<Surveyed>();
            run.partly.push(surveyed);
            if run.partly_bytes > ANSWER_BYTES_MAX {
                return self.fail_run(id, "it answers too much");
            }
        }
        if answer.more {
            return;
        }
        if !answer.error.is_empty() {
            let error = format!("there: {}", change::printable(&answer.error));
            return self.fail_or_start_over(id, &error, answer.gone);
        }
        run.theirs = Some(std::mem::take(&mut run.partly));
        self.go_on(id);
    }

    /// Our own workers have answered.
    pub fn ours_are_known(&mut self, id: u64, outcome: Result<Vec<Surveyed>, Unanswered>) {
        if let Some(token) = self.comparisons.listing.remove(&id) {
            return self.users_are_listed(token, outcome);
        }
        let Some(run) = self.comparisons.runs.iter_mut().find(|run| run.id == id) else { return };
        match outcome {
            Ok(said) => run.ours = Some(said),
            Err(why) => return self.fail_or_start_over(id, &format!("here: {}", why.error), why.is_gone),
        }
        self.go_on(id);
    }

    /// A mailbox may have been renamed, or a worker gone (`is_gone`).
    fn fail_or_start_over(&mut self, id: u64, error: &str, is_gone: bool) {
        let Some(mut run) = self.take_run(id) else { return };
        run.round += 1;
        if run.round >= ROUNDS_MAX || run.step == Step::Tell && !is_gone {
            self.comparisons.runs.push(run);
            return self.fail_run(id, error);
        }
        self.forget_questions_of(id);
        run.known = None;
        self.start_over(&mut run);
        self.comparisons.runs.push(run);
    }

    fn fail_run(&mut self, id: u64, error: &str) {
        let Some(mut run) = self.take_run(id) else { return };
        self.forget_questions_of(id);
        run.errors.push(format!("user {}, server {}: {error}", run.user, self.peers[run.peer].name));
        self.next_peer(run);
    }

    /// The connection is gone.
    pub fn comparisons_without(&mut self, index: usize) {
        // It may come back without what it had.
        self.comparisons.runs.iter_mut().for_each(|run| run.equal.retain(|peer| *peer != index));
        let ids: Vec<u64> = self.comparisons.runs.iter().filter(|run| run.peer == index).map(|run| run.id).collect();
        ids.into_iter().for_each(|id| self.fail_run(id, "the connection broke"));
    }

    /// Both have answered.
    fn go_on(&mut self, id: u64) {
        let is_whole = |run: &Run| run.id == id && run.ours.is_some() && run.theirs.is_some();
        let Some(at) = self.comparisons.runs.iter().position(is_whole) else { return };
        let mut run = self.comparisons.runs.swap_remove(at);
        let (ours, theirs) = (run.ours.take().unwrap_or_default(), run.theirs.take().unwrap_or_default());
        if run.step == Step::Tell {
            run.round += 1;
            run.known = None;
            run.patience = Patience::from(self.now_ms);
            self.start_over(&mut run);
            self.comparisons.runs.push(run);
            return;
        }
        if self.questions.watch(&run.user) != run.generation {
            // Something came in between: the same once more.
            run.step = Step::Settle;
            self.comparisons.runs.push(run);
            return;
        }
        let have_bodies = || ours.iter().chain(&theirs).all(|said| said.bodies);
        if run.descent.as_ref().is_some_and(Descent::has_bodies) && !have_bodies() {
            self.comparisons.runs.push(run);
            return self.fail_run(id, "its version of Dovetail does not compare bodies");
        }
        let is_taken = match &mut run.descent {
            None => take_lists(&mut run, &ours, &theirs),
            Some(descent) => take_descent(descent, &ours, &theirs),
        };
        if !is_taken {
            self.comparisons.runs.push(run);
            return self.fail_run(id, "it answers what it was not asked");
        }
        if run.bodies {
            // To read all takes longer.
            run.patience = Patience::from(self.now_ms);
        }
        loop {
            if run.descent.as_ref().is_some_and(|descent| descent.ask().is_some()) {
                run.step = Step::Settle;
                self.comparisons.runs.push(run);
                return;
            }
            if let Some(descent) = run.descent.take() {
                run.found.add(descent.finish());
            }
            match run.pairs.pop() {
                Some((ours, theirs)) => run.descent = Some(Descent::new(ours, theirs, run.bodies)),
                None => return self.all_is_found(run),
            }
        }
    }

    fn all_is_found(&mut self, mut run: Run) {
        if run.found.is_empty() {
            run.equal.push(run.peer);
            return self.next_peer(run);
        }
        let Some(known) = run.known.replace(run.found.keys()) else {
            run.step = Step::Pause(self.now_ms + CONFIRM_MS);
            run.found = Repair::default();
            self.comparisons.runs.push(run);
            return;
        };
        let mut found = std::mem::take(&mut run.found);
        found.retain_known(&known);
        let is_something = !found.differences.is_empty();
        if is_something && !std::mem::replace(&mut run.is_reported, true) {
            self.report(&run, &found);
            self.note_in_background(&run, &found);
        }
        if !run.repair {
            return self.next_peer(run);
        }
        if run.round >= ROUNDS_MAX {
            let why = match found.differences.first() {
                Some(Difference { path, what, .. }) => {
                    format!("there are still differences: {} {}", change::printable(&path.join("/")), what.name())
                }
                None => "something else differs each time".to_owned(),
            };
            run.errors.push(format!("user {}, server {}: {why}", run.user, self.peers[run.peer].name));
            return self.next_peer(run);
        }
        if run.mails == 0 {
            run.mails = found.mails;
            if !run.in_background {
                self.comparisons.progress.mails += found.mails;
            }
        }
        self.have_told(run, &found);
    }

    /// Nobody knew of it.
    fn note_in_background(&mut self, run: &Run, found: &Repair) {
        let Some(first) = found.differences.first().filter(|_| run.in_background) else { return };
        let count = found.count();
        self.counts.note("background_differences", count as u64);
        log::warn!(
            "User {}: {count} differences from server {} were found in the background, and are repaired; the first: {} {}",
            run.user,
            self.peers[run.peer].name,
            change::printable(&first.path.join("/")),
            first.what.name()
        );
    }

    fn report(&mut self, run: &Run, found: &Repair) {
        let peer = &self.peers[run.peer].name;
        let difference = |difference: &Difference| proto::Difference {
            user: run.user.to_string(),
            peer: peer.clone(),
            path: difference.path.clone(),
            what: difference.what.name().to_owned(),
            uid: difference.uid,
            detail: change::printable(&difference.detail),
        };
        let mut all: Vec<_> = found.differences.iter().map(difference).collect();
        if found.is_cut_off() {
            let (user, peer) = (run.user.to_string(), peer.clone());
            all.push(proto::Difference { user, peer, what: "and_more".into(), ..Default::default() });
        }
        let listeners: Vec<Token> = (self.comparisons.listeners.iter())
            .filter(|(_, listener)| listener.waits_for(run) && listener.users.contains(&run.user))
            .map(|(token, _)| *token)
            .collect();
        for token in listeners {
            let waiting = self.sockets.get(&token).map_or(0, |socket| socket.connection.waiting());
            if waiting > OUT_BYTES_MAX {
                self.comparisons.listeners.remove(&token);
                self.close(token, Close::Malformed("it does not read its answers".into()));
                continue;
            }
            for difference in &all {
                let differences = vec![difference.clone()];
                self.send(
                    token,
                    &Kind::CompareList(CompareList { differences, more: true, ..Default::default() }).into(),
                );
            }
        }
    }

    /// Each side tells what the other lacks.
    fn have_told(&mut self, mut run: Run, found: &Repair) {
        let tell = |tellings: &[Telling]| Tell {
            user: run.user.to_string(),
            mailboxes: at_once(tellings.iter().flat_map(parts)),
            ..Default::default()
        };
        let (ours, theirs) = (tell(&found.ours), tell(&found.theirs));
        run.step = Step::Tell;
        run.answer_by_ms = self.now_ms + ANSWER_MS_MAX;
        (run.ours, run.theirs) = (None, None);
        if theirs.mailboxes.is_empty() {
            run.theirs = Some(vec![]);
        } else {
            let frames = tell_frames(theirs).into_iter();
            self.ask(&mut run, frames.map(|tell| Question { tell: Some(tell), ..Default::default() }));
        }
        let (id, user, peer) = (run.id, run.user.clone(), run.peer);
        if ours.mailboxes.is_empty() {
            run.ours = Some(vec![]);
        }
        self.comparisons.runs.push(run);
        if !ours.mailboxes.is_empty() {
            self.want_answer(Asker::Own(id), user, peer, Wanted::Tell(ours));
        }
        self.go_on(id);
    }
}

/// What both sides are asked next; the mailbox as the one that is asked has it.
fn survey(run: &Run, of_theirs: bool) -> Survey {
    let user = run.user.to_string();
    let Some((descent, ask)) = run.descent.as_ref().and_then(|descent| Some((descent, descent.ask()?))) else {
        return Survey { user, ..Default::default() };
    };
    let mailbox = if of_theirs { descent.theirs() } else { descent.ours() };
    let mailbox = Some(named(mailbox));
    let (messages, ranges) = match ask {
        Ask::Digests(ranges) => (false, ranges),
        Ask::Messages(ranges) => (true, ranges),
    };
    let (ranges, bodies) = (ranges.iter().map(uid_range).collect(), descent.has_bodies());
    Survey { user, mailbox, messages, ranges, bodies, ..Default::default() }
}

fn named(mailbox: &Mailbox) -> proto::Mailbox {
    proto::Mailbox { guid: mailbox.guid.clone(), path: mailbox.path.clone(), ..Default::default() }
}

fn uid_range(range: &Range) -> UidRange {
    UidRange { first: range.first, last: range.last }
}

/// In parts that fit into frames.
fn parts(telling: &Telling) -> Vec<TellOf> {
    let mailbox = Some(named(&telling.mailbox));
    let first = TellOf {
        mailbox: mailbox.clone(),
        create: telling.create,
        subscribed: telling.subscribed,
        was: telling.was.clone(),
        saves: telling.saves.iter().take(RANGES_MAX).map(uid_range).collect(),
        flags: vec![],
        apart: vec![],
    };
    let mut all = vec![first];
    for saves in telling.saves.get(RANGES_MAX..).unwrap_or_default().chunks(RANGES_MAX) {
        let saves = saves.iter().map(uid_range).collect();
        all.push(TellOf { mailbox: mailbox.clone(), saves, ..Default::default() });
    }
    for flags in telling.flags.chunks(FLAGS_MAX) {
        let update = |more: &MoreFlags| proto::FlagUpdate {
            messages: vec![proto::MessageRange {
                first_uid: more.uid,
                last_uid: more.uid,
                guid: more.guid.clone(),
                ..Default::default()
            }],
            add: more.flags,
            add_keywords: more.keywords.clone(),
            ..Default::default()
        };
        all.push(TellOf { mailbox: mailbox.clone(), flags: flags.iter().map(update).collect(), ..Default::default() });
    }
    for apart in telling.apart.chunks(FLAGS_MAX) {
        let message = |apart: &Apart| proto::MessageRange {
            first_uid: apart.uid,
            last_uid: apart.uid,
            guid: apart.guid.clone(),
            ..Default::default()
        };
        all.push(TellOf { mailbox: mailbox.clone(), apart: apart.iter().map(message).collect(), ..Default::default() });
    }
    all
}

/// False: an answer is malformed.
fn take_lists(run: &mut Run, ours: &[Surveyed], theirs: &[Surveyed]) -> bool {
    let (Some(ours), Some(theirs)) = (list_of(ours), list_of(theirs)) else { return false };
    (run.found, run.pairs) = list::compare(&ours, &theirs, run.bodies);
    true
}

fn list_of(said: &[Surveyed]) -> Option<List> {
    let mut list = List::default();
    for surveyed in said {
        for found in &surveyed.mailboxes {
            let mailbox = found.mailbox.as_ref()?;
            let is_valid = mailbox.guid.len() == GUID_BYTES && change::check_path(&mailbox.path).is_ok();
            if !is_valid || list.mailboxes.len() >= NAMES_MAX {
                return None;
            }
            list.mailboxes.push(Mailbox {
                guid: mailbox.guid.clone(),
                path: mailbox.path.clone(),
                uid_validity: mailbox.uid_validity,
                uid_next: mailbox.uid_next,
                messages: found.messages,
                digest: found.digest,
                named: Named { clock: found.named_clock, origin: found.named_by.clone() },
            });
        }
        for name in &surveyed.subscribed {
            if change::check_path(&name.path).is_err() || list.subscribed.len() >= NAMES_MAX {
                return None;
            }
            list.subscribed.insert(name.path.clone());
        }
    }
    Some(list)
}

fn take_descent(descent: &mut Descent, ours: &[Surveyed], theirs: &[Surveyed]) -> bool {
    match descent.ask() {
        Some(Ask::Digests(_)) => {
            let (Some(ours), Some(theirs)) = (ranges_of(ours), ranges_of(theirs)) else { return false };
            descent.take_digests(&ours, &theirs)
        }
        Some(Ask::Messages(_)) => {
            let (Some(ours), Some(theirs)) = (messages_of(ours), messages_of(theirs)) else { return false };
            descent.take_messages(&ours, &theirs)
        }
        None => false,
    }
}

fn ranges_of(said: &[Surveyed]) -> Option<Vec<InRange>> {
    let ranges = said.iter().flat_map(|surveyed| &surveyed.ranges);
    let ranges = ranges.map(|found| {
        let range = found.range.as_ref()?;
        let range = Range { first: range.first, last: range.last };
        Some(InRange { range, messages: found.messages, digest: found.digest })
    });
    ranges.collect()
}

fn messages_of(said: &[Surveyed]) -> Option<Vec<Message>> {
    let messages = said.iter().flat_map(|surveyed| &surveyed.messages);
    let messages = messages.map(|found| {
        let is_valid = (1..=MESSAGE_GUID_BYTES_MAX).contains(&found.guid.len()) && found.uid != 0;
        let body = match found.body.as_slice() {
            [] => None,
            hash => Some(BodyHash::try_from(hash).ok()?),
        };
        is_valid.then(|| Message {
            uid: found.uid,
            guid: found.guid.clone(),
            flags: found.flags,
            keywords: found.keywords.clone(),
            body,
        })
    });
    messages.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a mailbox with a million messages, `resync` said that changes of the user were still under way.
    #[test]
    fn who_has_so_much_to_be_told_is_waited_for_while_the_peer_acknowledges_it() {
        let mut patience = Patience::from(0);
        let minutes = (1..).find(|minute| patience.is_over(minute * 60_000, Some(*minute)));
        assert_eq!(minutes.map(|minute| minute * 60_000), Some(SETTLING_MS_MAX));

        let mut patience = Patience::from(0);
        assert!(!patience.is_over(1_000, Some(7)));
        assert!(!patience.is_over(SETTLE_MS_MAX, Some(7)));
        assert!(patience.is_over(1_000 + SETTLE_MS_MAX, Some(7)));
    }
}
