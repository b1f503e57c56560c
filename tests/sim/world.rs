//! The whole cluster: relays and workers as they are, around them a simulated world. One seed and one schedule give one run.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use dovetail::relay::connection::{Pipe, Stream};
use dovetail::relay::outside::Outside;
use dovetail::relay::stepped::Stepped;
use dovetail::relay::{Config, Connection as Kind, Peer};
use dovetail::time::Time;
use dovetail::wire::frame;
use dovetail::wire::proto::{self, frame::Kind as Said};
use dovetail::worker::connection::Connection;
use dovetail::worker::job::Jobs;
use mio::Token;
use prost::Message;

use super::chance::Chance;
use super::ledger::Ledger;
use super::local::{short, Local};
use super::mailbox::Mailbox;
use super::net::{Event, Net, Network, Owner, PipeEnd};
use super::schedule::{Schedule, Step, SERVERS};
use super::storage::ModelStorage;

use super::story::{self, speaker, tell};

/// All faults are over then; what is left to do must come to an end in this time.
const WIND_DOWN_US: u64 = 900_000_000;
/// Nothing may be left to do for so long.
const QUIET_US: u64 = 5_000_000;
/// A relay that ends by itself is started again after this.
const RESTART_US: u64 = 5_000_000;
/// Events of one run: it goes round in circles.
const EVENTS_MAX: u64 = 2_000_000;

type Shared = Rc<RefCell<Local>>;

/// What an engine sees of the world.
struct View {
    network: Network,
    local: Shared,
    server: usize,
    began_us: u64,
    instance: u64,
    /// Workers that it connected to: their ends.
    new_workers: Rc<RefCell<Vec<(u64, usize)>>>,
    last_worker: Rc<RefCell<u64>>,
}

impl Time for View {
    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.network.borrow().now_us - self.began_us)
    }

    fn now_us(&self) -> u64 {
        self.local.borrow().now_us()
    }
}

impl Outside for View {
    fn instance(&mut self) -> io::Result<Vec<u8>> {
        Ok([self.instance, self.server as u64].iter().flat_map(|number| number.to_le_bytes()).collect())
    }

    fn watch(&mut self, stream: &mut Stream, token: Token) -> io::Result<()> {
        match stream {
            Stream::Pipe(pipe) => {
                pipe.register(token);
                Ok(())
            }
            _ => Err(ErrorKind::Unsupported.into()),
        }
    }

    fn wait(&mut self, _: Option<Duration>, _: &mut Vec<Token>) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }

    fn connect_peer(&mut self, address: SocketAddr) -> io::Result<Stream> {
        let end = self.network.borrow_mut().connect(self.server, usize::from(address.port()) - 1);
        Ok(Stream::Pipe(Box::new(PipeEnd { network: self.network.clone(), end })))
    }

    fn connect_worker(&mut self, _: &Path) -> io::Result<Stream> {
        *self.last_worker.borrow_mut() += 1;
        let number = *self.last_worker.borrow();
        let (here, there) =
            self.network.borrow_mut().pair(Owner::Relay(self.server), Owner::Worker(self.server, number), true);
        self.new_workers.borrow_mut().push((number, there));
        Ok(Stream::Pipe(Box::new(PipeEnd { network: self.network.clone(), end: here })))
    }

    fn resolve(&mut self, _: usize, _: String) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

/// A worker's clocks.
struct WorkerTime(Shared, Network);

impl Time for WorkerTime {
    fn elapsed(&self) -> Duration {
        Duration::from_micros(self.1.borrow().now_us)
    }

    fn now_us(&self) -> u64 {
        self.0.borrow().now_us()
    }
}

/// A worker's connection. Bodies that it asks for are answered at once, out of the other server's mailbox: a worker waits for
/// them, and here nobody can.
struct WorkerPipe {
    pipe: PipeEnd,
    locals: Rc<Vec<Shared>>,
    server: usize,
    answers: Vec<u8>,
}

impl Read for WorkerPipe {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.answers.is_empty() {
            return self.pipe.read(bytes);
        }
        let length = bytes.len().min(self.answers.len());
        bytes[..length].copy_from_slice(&self.answers[..length]);
        self.answers.drain(..length);
        Ok(length)
    }
}

impl Write for WorkerPipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Each frame comes whole.
        let said = bytes.get(frame::HEADER_BYTES..).and_then(|bytes| proto::Frame::decode(bytes).ok());
        if let Some(Said::BodyRequest(request)) = said.and_then(|frame| frame.kind) {
            let chunk = self.answer(&request);
            self.answers.extend(frame::encode(&Said::BodyChunk(chunk).into()).expect("a small frame"));
            return Ok(bytes.len());
        }
        self.pipe.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl WorkerPipe {
    fn answer(&self, request: &proto::BodyRequest) -> proto::BodyChunk {
        let none = proto::BodyChunk { id: request.id, last: true, ..Default::default() };
        let of_name = |local: &&Shared| local.try_borrow().is_ok_and(|local| local.name == request.origin);
        let Some(origin) = self.locals.iter().find(of_name) else {
            return proto::BodyChunk { error: "not a peer".into(), ..none };
        };
        let origin = origin.borrow();
        let net = self.pipe.network.borrow();
        if !net.is_joined(self.server, origin.server) || !net.is_listening[origin.server] {
            return proto::BodyChunk { error: format!("peer {} is not connected", origin.name), ..none };
        }
        let mailboxes = origin.users().get(&request.user).map(|user| &user.mailboxes);
        let is_it = |mailbox: &Mailbox| request.mailbox.as_ref().is_some_and(|wanted| wanted.guid == mailbox.guid);
        let mut all: Vec<&Mailbox> = mailboxes.into_iter().flat_map(BTreeMap::values).collect();
        // One that has become another is found by what the relay keeps of that.
        all.sort_by_key(|mailbox| !is_it(mailbox));
        let message = all.into_iter().flat_map(|mailbox| mailbox.messages.values()).find(|it| it.guid == request.guid);
        match message {
            Some(message) => proto::BodyChunk { data: message.body.clone(), ..none },
            None => proto::BodyChunk { gone: true, ..none },
        }
    }
}

struct Worker {
    connection: Connection<WorkerPipe>,
    jobs: Jobs,
    storage: ModelStorage,
    end: usize,
}

struct Server {
    name: String,
    relay: Option<Stepped>,
    happened: Vec<Token>,
    /// Of the round that is to come; others were called off.
    stamp: u64,
    is_due: bool,
    local: Shared,
    workers: BTreeMap<u64, Worker>,
    new_workers: Rc<RefCell<Vec<(u64, usize)>>>,
    last_worker: Rc<RefCell<u64>>,
    starts: u64,
    boot: u64,
    folder: PathBuf,
    /// Lengths of the journal's write-ahead log: to which a power failure may set it back.
    log_lengths: Vec<u64>,
    is_stopped: bool,
}

/// See the module.
pub struct World {
    network: Network,
    servers: Vec<Server>,
    locals: Rc<Vec<Shared>>,
    ledger: Rc<RefCell<Ledger>>,
    chance: Chance,
    folder: PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        self.servers.iter_mut().for_each(|server| server.relay = None);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// How a run ended.
pub struct Well {
    /// Tells this run from others.
    pub events: u64,
    /// What differed until the servers were compared.
    pub differed: Option<String>,
}

/// Plays the schedule. The error: what did not hold; after a comparison, if there may be one.
pub fn play(schedule: &Schedule, may_compare: bool, folder: &Path) -> Result<Well, String> {
    let mut world = World::new(schedule, folder);
    world.run(schedule, may_compare)
}

impl World {
    fn new(schedule: &Schedule, folder: &Path) -> World {
        let network: Network = Rc::new(RefCell::new(Net::new(schedule.servers, schedule.seed)));
        let ledger = Rc::new(RefCell::new(Ledger::default()));
        let local = |server: usize| {
            let name = SERVERS[server].to_owned();
            let offset_us = schedule.offsets_us[server];
            if offset_us != 0 {
                tell(|| format!("{name}: the clock is wrong by {} s", offset_us / 1_000_000));
            }
            let mut local = Local::new(server, name, network.clone(), schedule.seed, ledger.clone());
            local.offset_us = offset_us;
            Rc::new(RefCell::new(local))
        };
        let locals: Rc<Vec<Shared>> = Rc::new((0..schedule.servers).map(local).collect());
        let server = |server: usize| Server {
            name: SERVERS[server].to_owned(),
            relay: None,
            happened: Vec::new(),
            stamp: 0,
            is_due: false,
            local: locals[server].clone(),
            workers: BTreeMap::new(),
            new_workers: Rc::default(),
            last_worker: Rc::default(),
            starts: 0,
            boot: 1,
            folder: folder.join(SERVERS[server]),
            log_lengths: Vec::new(),
            is_stopped: false,
        };
        let servers: Vec<Server> = (0..schedule.servers).map(server).collect();
        for server in &servers {
            std::fs::create_dir_all(&server.folder).expect("a folder for the journal");
        }
        let chance = Chance::new(schedule.seed, 2);
        World { network, servers, locals, ledger, chance, folder: folder.to_owned() }
    }

    fn run(&mut self, schedule: &Schedule, may_compare: bool) -> Result<Well, String> {
        for server in 0..self.servers.len() {
            let at = self.chance.below(100_000);
            self.network.borrow_mut().at(at, Event::Start(server));
        }
        for local in self.locals.iter() {
            local.borrow_mut().is_slow = schedule.is_slow;
        }
        let mut over_us = 1_000_000;
        for (at, (at_us, _)) in schedule.steps.iter().enumerate() {
            self.network.borrow_mut().at(*at_us, Event::Step(at));
            over_us = over_us.max(*at_us + 1_000_000);
        }
        self.go_on(over_us, schedule)?;
        tell(|| "All faults are over.".into());
        self.heal();
        let mut until_us = over_us;
        self.settle(&mut until_us, schedule)?;
        let mut end = self.check_end();
        let differed = end.clone().err().filter(|_| may_compare);
        if let Some(why) = &differed {
            tell(|| format!("The servers are compared: {why}"));
            self.compare();
            self.settle(&mut until_us, schedule)?;
            end = self.check_end();
        }
        end.map(|()| Well { events: self.network.borrow().count(), differed })
    }

    /// Until nothing has happened for a while.
    fn settle(&mut self, until_us: &mut u64, schedule: &Schedule) -> Result<(), String> {
        let mut quiet_since = *until_us;
        let give_up_us = *until_us + WIND_DOWN_US;
        while *until_us < give_up_us {
            *until_us += 500_000;
            self.go_on(*until_us, schedule)?;
            match self.is_quiet() {
                true if *until_us >= quiet_since + QUIET_US => return Ok(()),
                true => {}
                false => quiet_since = *until_us,
            }
        }
        Err(format!("something is stuck: {}", self.what_is_left()))
    }

    /// As it happens in the background now and then.
    fn compare(&mut self) {
        for server in 0..self.servers.len() {
            let it = &mut self.servers[server];
            story::speaks(&it.name);
            if let Some(relay) = &mut it.relay {
                relay.compare("jane");
            }
            self.wake(server);
        }
    }

    /// Until that time.
    fn go_on(&mut self, until_us: u64, schedule: &Schedule) -> Result<(), String> {
        self.network.borrow_mut().at(until_us, Event::Step(usize::MAX));
        loop {
            self.look_around();
            let Some(event) = self.network.borrow_mut().next_event() else { return Ok(()) };
            story::set_now(self.network.borrow().now_us);
            match event {
                Event::Step(usize::MAX) => return Ok(()),
                Event::Step(at) => self.step(&schedule.steps[at].1),
                Event::Arrive(end) => self.network.borrow_mut().arrive(end),
                Event::Round(server, stamp) if self.servers[server].stamp == stamp => self.round(server),
                Event::Round(..) => {}
                Event::Work(server, number) => self.work(server, number),
                Event::Flush(server, number) => self.servers[server].local.borrow_mut().flush(number),
                Event::Start(server) => self.start(server)?,
            }
            if let Some(broken) = &self.ledger.borrow().broken {
                return Err(broken.clone());
            }
            if self.network.borrow().count() > EVENTS_MAX {
                return Err(format!("it goes round in circles: {}", self.what_is_left()));
            }
        }
    }

    /// Gives what happened to whom it concerns.
    fn look_around(&mut self) {
        loop {
            let accepting = std::mem::take(&mut self.network.borrow_mut().accepting);
            for (server, end) in &accepting {
                let pipe = Box::new(PipeEnd { network: self.network.clone(), end: *end });
                let kind = match self.network.borrow().is_local(*end) {
                    true => Kind::Local { uid: None },
                    false => Kind::Peer,
                };
                story::speaks(SERVERS[*server]);
                if let Some(relay) = &mut self.servers[*server].relay {
                    let _ = relay.accept(pipe, kind);
                    self.wake(*server);
                }
            }
            for server in 0..self.servers.len() {
                let new = std::mem::take(&mut *self.servers[server].new_workers.borrow_mut());
                new.into_iter().for_each(|(number, end)| self.begin_worker(server, number, end));
            }
            let happened = self.network.borrow_mut().take_happened();
            if happened.is_empty() && accepting.is_empty() {
                return;
            }
            for (owner, token) in happened {
                match owner {
                    Owner::Relay(server) => {
                        self.servers[server].happened.extend(token);
                        self.wake(server);
                    }
                    Owner::Worker(server, number) => {
                        let delay = self.chance.below(200);
                        self.network.borrow_mut().after(delay, Event::Work(server, number));
                    }
                    Owner::Process(server, number) => self.servers[server].local.borrow_mut().lost_relay(number),
                }
            }
        }
    }

    /// The engine has a round soon.
    fn wake(&mut self, server: usize) {
        if !self.servers[server].is_due {
            self.servers[server].is_due = true;
            self.servers[server].stamp += 1;
            let stamp = self.servers[server].stamp;
            self.network.borrow_mut().after(5, Event::Round(server, stamp));
        }
    }

    fn round(&mut self, server: usize) {
        let it = &mut self.servers[server];
        it.is_due = false;
        let Some(relay) = &mut it.relay else { return };
        story::speaks(&it.name);
        match relay.round(std::mem::take(&mut it.happened)) {
            Ok(Some(timeout)) => {
                it.stamp += 1;
                let us = timeout.as_micros().max(1) as u64;
                self.network.borrow_mut().after(us, Event::Round(server, it.stamp));
            }
            Ok(None) => {}
            Err(reason) => {
                // Where a run's journals are is of this run only.
                let reason = reason.replace(&*it.folder.to_string_lossy(), "");
                tell(|| format!("{}: the relay ends: {reason}", it.name));
                self.kill_relay(server);
                self.network.borrow_mut().after(RESTART_US, Event::Start(server));
                return;
            }
        }
        self.note_log_length(server);
    }

    fn note_log_length(&mut self, server: usize) {
        let it = &mut self.servers[server];
        let length = std::fs::metadata(it.folder.join("journal.sqlite-wal")).map_or(0, |data| data.len());
        if it.log_lengths.last().is_none_or(|last| *last < length) {
            it.log_lengths.push(length);
        }
    }

    fn begin_worker(&mut self, server: usize, number: u64, end: usize) {
        let local = self.servers[server].local.clone();
        let pipe = PipeEnd { network: self.network.clone(), end };
        let pipe = WorkerPipe { pipe, locals: self.locals.clone(), server, answers: Vec::new() };
        let worker = Worker {
            connection: Connection::new(pipe),
            jobs: Jobs::new(Box::new(WorkerTime(local.clone(), self.network.clone()))),
            storage: ModelStorage::new(local),
            end,
        };
        self.servers[server].workers.insert(number, worker);
    }

    fn work(&mut self, server: usize, number: u64) {
        let Some(mut worker) = self.servers[server].workers.remove(&number) else { return };
        story::speaks(&format!("{} worker", self.servers[server].name));
        while self.network.borrow().is_readable(worker.end) {
            if !worker.input() {
                // Its connection goes with it.
                use dovetail::worker::storage::Storage;
                worker.storage.unlock_user();
                return;
            }
        }
        self.servers[server].workers.insert(number, worker);
    }

    fn start(&mut self, server: usize) -> Result<(), String> {
        let peers = (0..self.servers.len()).filter(|peer| *peer != server);
        let peers = peers.map(|peer| Peer { name: SERVERS[peer].into(), address: format!("127.0.0.1:{}", peer + 1) });
        let it = &mut self.servers[server];
        if it.relay.is_some() || it.is_stopped {
            return Ok(());
        }
        it.starts += 1;
        let config = Config {
            server: it.name.clone(),
            peers: peers.collect(),
            worker_socket: "/worker".into(),
            workers: 2,
            queue_bytes_max: 1 << 20,
            journal: it.folder.clone(),
            journal_bytes_max: 1 << 30,
            compare_listed_after_us: None,
            compare_interval_ms: None,
            journal_age_us_max: 1 << 50,
            client_limit: 10_000,
            boot: format!("boot {}", it.boot),
            tls: None,
            insecure_plaintext: false,
            software: "simulated".into(),
        };
        let view = View {
            network: self.network.clone(),
            local: it.local.clone(),
            server,
            began_us: self.network.borrow().now_us,
            instance: it.starts,
            new_workers: it.new_workers.clone(),
            last_worker: it.last_worker.clone(),
        };
        tell(|| format!("{}: the relay starts", it.name));
        story::speaks(&it.name);
        match Stepped::begin(config, Box::new(view)) {
            Ok(relay) => it.relay = Some(relay),
            Err(error) => {
                tell(|| format!("{}: it cannot: {error}", it.name));
                self.network.borrow_mut().after(RESTART_US, Event::Start(server));
                return Ok(());
            }
        }
        it.log_lengths.clear();
        self.network.borrow_mut().is_listening[server] = true;
        self.note_log_length(server);
        self.wake(server);
        Ok(())
    }

    fn kill_relay(&mut self, server: usize) {
        self.network.borrow_mut().is_listening[server] = false;
        self.network.borrow_mut().close_all_of(Owner::Relay(server));
        let it = &mut self.servers[server];
        it.relay = None;
        it.happened.clear();
        it.is_due = false;
        it.stamp += 1;
    }

    fn step(&mut self, step: &Step) {
        let names = |server: &usize| SERVERS[*server];
        match step {
            Step::Act { server, slot, what, in_between } => {
                let mut local = self.servers[*server].local.borrow_mut();
                match in_between {
                    true => local.do_in_between(*slot, what.clone()),
                    false => local.act(*slot, what),
                }
            }
            Step::EndProcess { server, slot } => self.servers[*server].local.borrow_mut().end_process(*slot),
            Step::KillProcess { server, slot } => self.servers[*server].local.borrow_mut().kill_process(*slot),
            Step::KillWorker { server, after } => {
                self.servers[*server].local.borrow_mut().kill_worker_in = Some(*after);
            }
            Step::KillRelay { server, down_us } => {
                if self.servers[*server].relay.is_some() {
                    tell(|| format!("{}: the relay is killed", names(server)));
                    self.kill_relay(*server);
                    self.network.borrow_mut().after(*down_us, Event::Start(*server));
                }
            }
            Step::PowerFailure { server, commits, down_us } => self.fail_power(*server, *commits, *down_us),
            Step::Cut { one, two } => {
                tell(|| format!("The connection between {} and {} is cut", names(one), names(two)));
                self.network.borrow_mut().cut(*one, *two);
            }
            Step::Block { from, to, blocked } => {
                let does = if *blocked { "Nothing gets" } else { "All gets" };
                tell(|| format!("{does} from {} to {} from now on", names(from), names(to)));
                self.network.borrow_mut().set_blocked(*from, *to, *blocked);
            }
            Step::Clock { server, by_us } => {
                tell(|| format!("{}: the clock jumps by {} s", names(server), *by_us as f64 / 1e6));
                self.servers[*server].local.borrow_mut().offset_us += by_us;
            }
            Step::Disk { server, is_full } => self.set_disk_full(*server, *is_full),
        }
    }

    /// All processes end, and the journal is as it was some commits ago.
    fn fail_power(&mut self, server: usize, commits: usize, down_us: u64) {
        if self.servers[server].relay.is_none() {
            return;
        }
        tell(|| format!("{}: power failure, the journal's last {commits} commits are lost", SERVERS[server]));
        let it = &mut self.servers[server];
        let kept = it.log_lengths.len().saturating_sub(1 + commits);
        let length = it.log_lengths.get(kept).copied().unwrap_or(0);
        let copies: Vec<(PathBuf, Vec<u8>)> = ["journal.sqlite", "journal.sqlite-wal"]
            .iter()
            .filter_map(|name| Some((it.folder.join(name), std::fs::read(it.folder.join(name)).ok()?)))
            .collect();
        self.kill_relay(server);
        let it = &mut self.servers[server];
        it.workers.clear();
        it.boot += 1;
        it.local.borrow_mut().kill_all_processes();
        it.local.borrow_mut().unlock();
        for (path, mut bytes) in copies {
            if path.extension().is_some_and(|extension| extension == "sqlite-wal") {
                bytes.truncate(length as usize);
            }
            std::fs::write(path, bytes).expect("the journal as it was");
        }
        // What stands for a full disk is in there, too.
        let _ = self.write_disk(server);
        self.network.borrow_mut().after(down_us, Event::Start(server));
    }

    /// Nothing can be written: not to mailboxes by workers, not to the journal.
    fn set_disk_full(&mut self, server: usize, is_full: bool) {
        tell(|| format!("{}: the disk {}", SERVERS[server], if is_full { "is full" } else { "has room again" }));
        self.servers[server].local.borrow_mut().is_disk_full = is_full;
        // While the engine writes nothing can be changed: then its commit still had room.
        if let (Err(_), false) = (self.write_disk(server), is_full) {
            self.kill_relay(server);
            self.network.borrow_mut().after(1_000, Event::Start(server));
            let _ = self.write_disk(server);
        }
    }

    /// Into the journal: whether there is room for it.
    fn write_disk(&self, server: usize) -> rusqlite::Result<()> {
        let statement = match self.servers[server].local.borrow().is_disk_full {
            true => {
                "CREATE TRIGGER IF NOT EXISTS full BEFORE INSERT ON changes BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
            }
            false => "DROP TRIGGER IF EXISTS full",
        };
        let path = self.servers[server].folder.join("journal.sqlite");
        let db = rusqlite::Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        db.busy_timeout(Duration::ZERO)?;
        db.execute_batch(statement)
    }

    /// All faults are over.
    fn heal(&mut self) {
        for server in 0..self.servers.len() {
            for other in 0..self.servers.len() {
                self.network.borrow_mut().set_blocked(server, other, false);
            }
            if self.servers[server].local.borrow().is_disk_full {
                self.set_disk_full(server, false);
            }
            self.servers[server].is_stopped = false;
            let mut local = self.servers[server].local.borrow_mut();
            local.kill_worker_in = None;
            local.act_all();
            drop(local);
            if self.servers[server].relay.is_none() {
                self.network.borrow_mut().after(1_000, Event::Start(server));
            }
        }
    }

    fn is_quiet(&self) -> bool {
        self.servers.iter().all(|server| {
            let Some(relay) = &server.relay else { return false };
            let status = relay.status();
            let is_settled = |peer: &proto::PeerStatus| peer.state == "connected" && peer.pending == 0;
            let is_looking = status.counters.as_ref().is_some_and(|counters| counters.looking > 0);
            status.peers.iter().all(is_settled)
                && !is_looking
                && !relay.is_comparing()
                && server.local.borrow().is_quiet()
        })
    }

    fn what_is_left(&self) -> String {
        let of_server = |server: &Server| {
            let Some(relay) = &server.relay else { return format!("{} has no relay", server.name) };
            let status = relay.status();
            let peers: Vec<String> = status
                .peers
                .iter()
                .map(|peer| format!("{} {} {} {}", peer.peer, peer.state, peer.pending, peer.last_error))
                .collect();
            let looking = status.counters.as_ref().map_or(0, |counters| counters.looking);
            let quiet = server.local.borrow().is_quiet();
            format!("{}: {} - looking {looking}, processes quiet {quiet}", server.name, peers.join(", "))
        };
        self.servers.iter().map(of_server).collect::<Vec<_>>().join("; ")
    }

    fn check_end(&self) -> Result<(), String> {
        for server in &self.servers {
            let failed = server.relay.as_ref().map(Stepped::failed).transpose()?.unwrap_or_default();
            // A power failure takes nothing that must be.
            if let Some(first) = failed.iter().find(|entry| entry.error != "the power of this server failed") {
                return Err(format!("{} gave something up: {}", server.name, first.error));
            }
        }
        let none = BTreeMap::new();
        let mailboxes = |server: usize| -> BTreeMap<String, Mailbox> {
            self.locals[server].borrow().users().get("jane").map_or(&none, |user| &user.mailboxes).clone()
        };
        let of_first = mailboxes(0);
        for (server, name) in SERVERS.iter().enumerate().take(self.servers.len()).skip(1) {
            equal(SERVERS[0], &of_first, name, &mailboxes(server))?;
        }
        for server in &self.servers {
            let local = server.local.borrow();
            let mailboxes = local.users().get("jane").map_or(&none, |user| &user.mailboxes);
            self.ledger.borrow().check("jane", mailboxes).map_err(|why| format!("on {}: {why}", server.name))?;
        }
        let subscribed =
            |server: usize| self.locals[server].borrow().users().get("jane").map(|user| user.subscribed.clone());
        match (1..self.servers.len())
            .find(|server| subscribed(0).unwrap_or_default() != subscribed(*server).unwrap_or_default())
        {
            Some(server) => Err(format!("subscriptions differ on {} and {}", SERVERS[0], SERVERS[server])),
            None => Ok(()),
        }
    }
}

/// Whether two servers have the same.
fn equal(
    one: &str,
    of_one: &BTreeMap<String, Mailbox>,
    two: &str,
    of_two: &BTreeMap<String, Mailbox>,
) -> Result<(), String> {
    let names = |mailboxes: &BTreeMap<String, Mailbox>| mailboxes.keys().cloned().collect::<Vec<_>>();
    if names(of_one) != names(of_two) {
        return Err(format!("{one} has mailboxes {:?}, {two} {:?}", names(of_one), names(of_two)));
    }
    for (name, left) in of_one {
        let right = &of_two[name];
        let state = |mailbox: &Mailbox| {
            format!(
                "GUID {} UIDVALIDITY {} UIDNEXT {}",
                super::local::hex(&mailbox.guid),
                mailbox.uid_validity,
                mailbox.uid_next
            )
        };
        if state(left) != state(right) {
            return Err(format!("{name} differs: {one} has {}, {two} {}", state(left), state(right)));
        }
        let words = |mailbox: &Mailbox, uid: u32| match mailbox.messages.get(&uid) {
            Some(message) => format!(
                "{} flags {:x} {:?} received {} saved {}",
                super::local::short(&message.guid),
                message.flags,
                message.keywords,
                message.received_date,
                message.save_date
            ),
            None => "nothing".into(),
        };
        let uids = left.messages.keys().chain(right.messages.keys());
        for uid in uids {
            if left.messages.get(uid) != right.messages.get(uid) {
                return Err(format!(
                    "{name} differs at UID {uid}: {one} has {}, {two} {}",
                    words(left, *uid),
                    words(right, *uid)
                ));
            }
        }
    }
    Ok(())
}

impl Worker {
    /// False at its end.
    fn input(&mut self) -> bool {
        let result = self.connection.fill().and_then(|open| {
            while let Some(kind) = self.connection.next_frame()? {
                tell_job(&kind);
                self.jobs.handle(&mut self.storage, &mut self.connection, kind)?;
                if self.storage.is_dead {
                    return Err(ErrorKind::BrokenPipe.into());
                }
            }
            Ok(open)
        });
        result.unwrap_or(false)
    }
}

fn tell_job(kind: &Said) {
    match kind {
        // Others say what the relay knows.
        Said::Apply(apply) if !apply.changes.is_empty() => {
            tell(|| {
                let changes: Vec<String> = apply.changes.iter().map(described).collect();
                format!("    {} applies {}", speaker(), changes.join("; "))
            });
        }
        Said::Look(look) if look.whole => tell(|| format!("    {} looks at all", speaker())),
        Said::Look(_) => tell(|| format!("    {} looks", speaker())),
        _ => {}
    }
}

/// Its number, its mailbox and what it does.
fn described(change: &proto::Change) -> String {
    use dovetail::wire::proto::op::What;
    let stamp = change.stamp.clone().unwrap_or_default();
    let vector: Vec<String> = stamp.vector.iter().map(|of| format!("{}{}", of.origin, of.seq)).collect();
    let mailbox = change.mailbox.clone().unwrap_or_default();
    let ranges = |ranges: &[proto::MessageRange]| {
        let of_range = |range: &proto::MessageRange| match range.last_uid == range.first_uid {
            true => format!("{}={}", range.first_uid, short(&range.guid)),
            false => format!("{}-{}", range.first_uid, range.last_uid),
        };
        ranges.iter().map(of_range).collect::<Vec<_>>().join(",")
    };
    let op = |op: &proto::Op| match op.what.as_ref() {
        Some(What::Save(save)) => {
            let told = [(save.found, " found"), (save.kept, " kept")];
            let told: String = told.iter().filter(|(is_it, _)| *is_it).map(|(_, word)| *word).collect();
            let uid = save.birth.as_ref().map_or(0, |birth| birth.uid);
            format!("save {uid}={}{told}", short(&save.guid))
        }
        Some(What::Flags(update)) => format!("flags {}", ranges(&update.messages)),
        Some(What::Expunge(expunge)) => format!("expunge {}", ranges(&expunge.messages)),
        Some(What::Apart(apart)) => format!("apart {}", ranges(&apart.messages)),
        Some(What::Claim(claim)) => {
            let proto::Claim { guid, uid, was, raised, of, of_uid } = claim;
            format!("claim {uid}={} was {was:?} of {of}{of_uid} raised {raised}", short(guid))
        }
        Some(What::Nack(nack)) => {
            let proto::Nack { guid, uid, stands, next, raised, of } = nack;
            format!("nack {uid}={} stands {stands} next {next} raised {raised} of {of}", short(guid))
        }
        Some(What::Create(create)) => {
            let was: Vec<String> = create.was.iter().map(|guid| named(guid)).collect();
            format!(
                "create had_mail {} again {} was {was:?} later {:?}",
                create.had_mail, create.again, create.later_name
            )
        }
        Some(What::Rename(rename)) => {
            let back: Vec<String> = rename.back.iter().map(|back| back.path.join("/")).collect();
            format!("rename to {} back {back:?}", rename.new_path.join("/"))
        }
        Some(What::Delete(delete)) => format!("delete keeps {}", delete.keeps),
        Some(What::Subscription(subscription)) => format!("subscription {}", subscription.subscribed),
        Some(What::Rebuilt(_)) => "rebuilt".into(),
        None => "nothing".into(),
    };
    let ops: Vec<String> = change.ops.iter().map(op).collect();
    format!(
        "{}{} [{}] {} {} v{} n{}: {}",
        stamp.origin,
        stamp.seq,
        vector.join(" "),
        mailbox.path.join("/"),
        named(&mailbox.guid),
        mailbox.uid_validity,
        mailbox.uid_next,
        ops.join(", ")
    )
}

/// Of a mailbox's GUID, enough to know it by.
fn named(guid: &[u8]) -> String {
    guid.get(8..).map_or_else(String::new, |guid| guid.iter().map(|byte| format!("{byte:02x}")).collect())
}
