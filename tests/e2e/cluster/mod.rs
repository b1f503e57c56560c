//! Real Dovecots for the tests and the demo: throw-away, on loopback, with our plugin laid over the installed files.
//!
//! Each server lives in a mount namespace of its own in which a copy of Dovecot's folder of programs and modules, with
//! our files added, covers the installed one. Nothing on the system changes, and nothing stays behind: see `janitor`.
//! A server may run in another root (another Debian release); all share the loopback network.

// The demo uses less of it than the tests do.
#![allow(dead_code)]

pub mod backup;
pub mod checker;
pub mod config;
pub mod doveadm;
pub mod imap;
pub mod janitor;
pub mod line;
pub mod lmtp;
pub mod network;
pub mod pop3;
pub mod ports;
pub mod server;
pub mod snapshot;
pub mod wait;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::line::{Line, Proxy};
use dovetail::tls::authority;

use self::network::{Cable, Namespace};
use self::ports::LOOPBACK;
pub use self::server::Server;
pub use self::snapshot::Snapshot;
pub use self::wait::{holds_within, holds_within_slowly, wait_until};

/// How long a cluster that works may take to become identical. Generous: test machines are small and shared.
pub const CONVERGE_DEADLINE: Duration = Duration::from_secs(60);

/// What static passdbs on all servers accept.
pub const PASSWORD: &str = "pass";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Sdbox,
    Mdbox,
    Maildir,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V23,
    V24,
}

/// One server to be, before it is started.
#[derive(Clone)]
pub struct Setup {
    pub name: String,
    pub format: Format,
    /// Start it with our plugin and the example configuration.
    pub plugin: bool,
    /// More configuration, behind everything else, in 2.3's and in 2.4's syntax. `{DIR}` is the server's folder.
    pub extra_23: String,
    pub extra_24: String,
    /// Files below the server's folder: those in `bin/` are programs, those in `home/` belong to the mail user.
    pub files: Vec<(String, String)>,
    /// Instead of the right value of `dovetail_peers`.
    pub peers: Option<String>,
    /// Of the other servers, only these are its peers.
    pub only_with: Option<Vec<String>>,
    /// Others reach its relay over a line that can be cut.
    pub line: bool,
    /// Who is not in the file of users does not exist.
    pub has_no_other_users: bool,
    /// Of the namespace with the INBOX.
    pub separator: char,
    pub prefix: String,
    /// Plaintext where the servers are apart.
    pub insecure: bool,
    /// Mail and the relay's journal lie on disks that can be filled.
    pub small_disks: bool,
    /// See [`Server::provoke`].
    pub can_panic: bool,
}

impl Setup {
    pub fn new(name: &str, format: Format) -> Setup {
        Setup {
            name: name.into(),
            format,
            plugin: true,
            extra_23: String::new(),
            extra_24: String::new(),
            files: vec![(config::USERS.into(), String::new())],
            peers: None,
            only_with: None,
            line: false,
            has_no_other_users: false,
            separator: '/',
            prefix: String::new(),
            insecure: false,
            small_disks: false,
            can_panic: false,
        }
    }

    pub fn insecure(mut self) -> Setup {
        self.insecure = true;
        self
    }

    pub fn without_plugin(mut self) -> Setup {
        self.plugin = false;
        self
    }

    pub fn peers(mut self, value: &str) -> Setup {
        self.peers = Some(value.into());
        self
    }

    /// The servers must agree.
    pub fn only_with(mut self, peers: &[&str]) -> Setup {
        self.only_with = Some(peers.iter().map(|peer| (*peer).to_owned()).collect());
        self
    }

    fn has_peer(&self, name: &str) -> bool {
        self.name != name && self.only_with.as_ref().is_none_or(|peers| peers.iter().any(|peer| peer == name))
    }

    /// Names of mailboxes, as this server has them.
    pub fn names(mut self, prefix: &str, separator: char) -> Setup {
        (self.prefix, self.separator) = (prefix.into(), separator);
        self
    }

    pub fn over_a_line(mut self) -> Setup {
        self.line = true;
        self
    }

    /// See [`Server::fill`].
    pub fn on_small_disks(mut self) -> Setup {
        self.small_disks = true;
        self
    }

    /// See [`Server::provoke`].
    pub fn that_can_panic(mut self) -> Setup {
        self.can_panic = true;
        self.extra(
            "import_environment = $import_environment DOVETAIL_PANICS={DIR}/panics\n",
            "import_environment {\n  DOVETAIL_PANICS = {DIR}/panics\n}\n",
        )
    }

    /// What our code takes for the machine's clock is wrong by so much; see src/time.rs. Dovecot's own times are right.
    pub fn with_a_clock_off_by(self, hours: i64) -> Setup {
        let secs = hours * 3_600;
        self.that_can_panic().extra(
            &format!("import_environment = $import_environment DOVETAIL_CLOCK_OFFSET_SECS={secs}\n"),
            &format!("import_environment {{\n  DOVETAIL_CLOCK_OFFSET_SECS = {secs}\n}}\n"),
        )
    }

    /// `{DIR}` in the text becomes the server's folder.
    pub fn file(mut self, path: &str, text: &str) -> Setup {
        self.files.push((path.into(), text.into()));
        self
    }

    /// This user's peers, as the userdb gives them.
    pub fn user_with_peers(self, user: &str, peers: &str) -> Setup {
        self.user(&config::user_line("{DIR}", user, &format!("userdb_dovetail_peers={peers}")))
    }

    /// Nobody else exists but whom [`Server::add_user`] adds.
    pub fn only_user(mut self, user: &str) -> Setup {
        self.has_no_other_users = true;
        self.user(&config::user_line("{DIR}", user, ""))
    }

    /// Whose mail is this system user's.
    pub fn system_user(self, user: &str, uid: u32) -> Setup {
        self.user(&format!("{user}:x:{uid}:{uid}::{{DIR}}/home/{user}::\n"))
    }

    fn user(mut self, line: &str) -> Setup {
        let users = self.files.iter_mut().find(|(path, _)| path == config::USERS);
        users.expect("every server has the file").1 += line;
        self
    }

    pub fn extra(mut self, v23: &str, v24: &str) -> Setup {
        self.extra_23 += v23;
        self.extra_24 += v24;
        self
    }
}

pub struct Cluster {
    servers: Vec<Server>,
    /// To the relays whose setup wants one.
    pub lines: Vec<Line>,
    /// Whether save dates are compared.
    has_save_dates: bool,
    /// Unless a server says that it has lost those of a user.
    loses_save_dates: fn(&Server, &str) -> bool,
    ignores_empty_folders: bool,
    /// The first so many are held to be the same.
    members: AtomicUsize,
    reachable: Reachable,
    // Dropped after the servers: removes what they leave.
    janitor: Arc<janitor::Janitor>,
}

impl Cluster {
    /// Starts the servers, every one a peer of every other; returns when all of them answer. All share the loopback network.
    pub fn start(setups: Vec<Setup>) -> Cluster {
        Cluster::prepare(setups, false)
    }

    /// The same over TLS, each in a network of its own, with a line between each two: that of the first and the second first, then
    /// that of the first and the third.
    pub fn start_apart(setups: Vec<Setup>) -> Cluster {
        Cluster::prepare(setups, true)
    }

    fn prepare(setups: Vec<Setup>, apart: bool) -> Cluster {
        server::require_root();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("dovetail-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let roots: Vec<server::Root> = setups.iter().map(|setup| server::Root::of(&setup.name)).collect();
        let mut folders: Vec<PathBuf> = roots.iter().map(|root| root.outside(&format!("/tmp/{id}"))).collect();
        folders.dedup();
        let janitor = Arc::new(janitor::Janitor::watch(&folders));

        let servers: Vec<Server> = setups
            .into_iter()
            .zip(roots)
            .map(|(setup, root)| {
                let network = apart.then(Namespace::new);
                Server::prepare(setup, root, &format!("/tmp/{id}"), network, janitor.clone())
            })
            .collect();
        let (lines, reachable) = match apart {
            true => {
                certify(&servers);
                wire_up(&servers)
            }
            false => share_loopback(&servers),
        };
        for server in &servers {
            server.start();
        }
        // Maildir has them in its cache only, which may go with a killed process.
        let has_save_dates = servers.iter().all(|server| server.format() != Format::Maildir);
        let members = AtomicUsize::new(servers.len());
        Cluster {
            servers,
            lines,
            has_save_dates,
            loses_save_dates: |_, _| false,
            ignores_empty_folders: false,
            members,
            reachable,
            janitor,
        }
    }

    pub fn pair(format_a: Format, format_b: Format) -> Cluster {
        Cluster::start(vec![Setup::new("a", format_a), Setup::new("b", format_b)])
    }

    /// Compares save dates in every format: nothing is killed.
    pub fn with_save_dates(self) -> Cluster {
        Cluster { has_save_dates: true, ..self }
    }

    /// An index that Dovecot makes anew has others.
    pub fn without_save_dates(self) -> Cluster {
        Cluster { has_save_dates: false, ..self }
    }

    /// Does not compare them of users of whom this is true on some server.
    pub fn without_save_dates_where(self, loses_save_dates: fn(&Server, &str) -> bool) -> Cluster {
        Cluster { loses_save_dates, ..self }
    }

    /// Who is killed while he creates a mailbox may leave a folder, which is none yet.
    pub fn ignoring_empty_folders(self) -> Cluster {
        Cluster { ignores_empty_folders: true, ..self }
    }

    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Those that are held to be the same.
    pub fn members(&self) -> &[Server] {
        &self.servers[..self.members.load(Ordering::Relaxed)]
    }

    /// From now on only the first so many are: the others are not there yet, or any more.
    pub fn set_members(&self, count: usize) {
        self.members.store(count, Ordering::Relaxed);
    }

    /// Only members are peers from now on. Who runs is told; returns when all members are connected.
    pub fn connect_members(&self, deadline: Duration) {
        let members = self.members();
        for (server, reachable) in members.iter().zip(&self.reachable) {
            let is_member = |name: &str| members.iter().any(|member| member.name() == name);
            let peers: Vec<_> = reachable.iter().filter(|(name, _)| is_member(name)).cloned().collect();
            server.configure(&peers);
            server.doveadm(&["reload"]);
        }
        let is_connected = |server: &Server| {
            let peers = server.try_status().unwrap_or_default().peers;
            peers.len() == members.len() - 1 && peers.iter().all(|peer| peer.state == "connected")
        };
        wait_until(deadline, "all members are connected", || members.iter().all(is_connected));
    }

    pub fn a(&self) -> &Server {
        &self.servers[0]
    }

    pub fn b(&self) -> &Server {
        &self.servers[1]
    }

    /// Waits until all servers show the same mail state for `user`; panics with the differences if they never do.
    pub fn converged(&self, user: &str) -> Snapshot {
        self.converged_within(CONVERGE_DEADLINE, user)
    }

    pub fn converged_within(&self, deadline: Duration, user: &str) -> Snapshot {
        self.converge(deadline, user, false)
    }

    /// The same, where there may always be something pending of other users.
    pub fn converged_while_busy(&self, deadline: Duration, user: &str) -> Snapshot {
        self.converge(deadline, user, true)
    }

    fn converge(&self, deadline: Duration, user: &str, is_busy: bool) -> Snapshot {
        let (first, others) = self.members().split_first().expect("a cluster has servers");
        let mut difference = String::new();
        let mut result = None;
        // A look at a server would create the user's INBOX there; do not race the first change for that. Nor look at it while
        // the worker is creating it: Dovecot may give it another GUID then.
        let may_be_pending = is_busy || self.members().len() == 1;
        let not_yet = || {
            let without = self.members().iter().find(|s| !s.has_inbox(user));
            let without = without.map(|s| format!("  {user} has no INBOX on {}\n", s.name()));
            let pending = || self.members().iter().filter(|_| !may_be_pending).find_map(|s| s.what_is_pending_of(user));
            without.or_else(pending)
        };
        let until = Instant::now() + deadline;
        let converged = holds_within_slowly(deadline, || {
            let is_time = holds_within(until.saturating_duration_since(Instant::now()), || match not_yet() {
                Some(why) => {
                    difference = why;
                    false
                }
                None => true,
            });
            if !is_time {
                return false;
            }
            let has_save_dates =
                self.has_save_dates && !self.servers.iter().any(|server| (self.loses_save_dates)(server, user));
            let take = |server| {
                let mut snapshot = Snapshot::try_take(server, user, has_save_dates)?;
                if self.ignores_empty_folders {
                    snapshot.forget_empty_folders();
                }
                Ok(snapshot)
            };
            let wanted = match take(first) {
                Ok(wanted) => wanted,
                Err(error) => {
                    difference = error;
                    return false;
                }
            };
            difference.clear();
            for other in others {
                difference += &take(other).map_or_else(|error| error, |theirs| wanted.difference(&theirs));
            }
            result = Some(wanted);
            difference.is_empty()
        });
        if !converged {
            panic!("{user}'s mail did not become the same everywhere within {deadline:?}:\n{difference}");
        }
        // Metadata is equal; now every byte.
        let bodies = first.bodies(user);
        for other in others {
            let theirs = other.bodies(user);
            snapshot::compare_bodies(first.name(), &bodies, other.name(), &theirs);
        }
        result.expect("a snapshot was compared")
    }

    /// All servers' logs, for a test that failed.
    pub fn print_logs(&self) {
        for server in &self.servers {
            eprintln!("---- log of {} ({}) ----\n{}", server.name(), server.version_text(), server.log());
        }
    }
}

/// What each server could have as peers: (name, address of the relay).
type Reachable = Vec<Vec<(String, String)>>;

/// Gives each server those of them that its setup wants.
fn configure(servers: &[Server], reachable: &Reachable) {
    for (server, peers) in servers.iter().zip(reachable) {
        let peers: Vec<_> = peers.iter().filter(|(name, _)| server.setup().has_peer(name)).cloned().collect();
        server.configure(&peers);
    }
}

/// Configures servers that share the loopback network. Their lines are those that their setups want.
fn share_loopback(servers: &[Server]) -> (Vec<Line>, Reachable) {
    let mut lines = Vec::new();
    let mut address = |server: &Server| {
        let mut port = server.ports.relay;
        if server.setup().line {
            let proxy = Proxy::to(port);
            port = proxy.port;
            lines.push(Line::Proxy(proxy));
        }
        format!("{LOOPBACK}:{port}")
    };
    let relays: Vec<(String, String)> = servers.iter().map(|s| (s.name().to_owned(), address(s))).collect();
    let others = |server: &Server| relays.iter().filter(|(name, _)| name != server.name()).cloned().collect();
    let reachable = servers.iter().map(others).collect();
    configure(servers, &reachable);
    (lines, reachable)
}

/// Gives each server a certificate of one authority, whose folder is the first one's.
fn certify(servers: &[Server]) {
    let names: Vec<String> = servers.iter().map(|server| server.name().to_owned()).collect();
    let authority = servers[0].outside("/authority");
    authority::init(&authority).and_then(|_| authority::issue(&authority, &names)).expect("certificates");
    for server in servers {
        let folder = server.outside(&format!("/{}", config::TLS));
        std::fs::create_dir(&folder).expect("mkdir");
        for file in ["ca.pem".to_owned(), format!("{}.pem", server.name()), format!("{}.key", server.name())] {
            std::fs::copy(authority.join(&file), folder.join(&file)).expect("a file of the authority");
        }
    }
}

/// Configures servers with networks of their own. Their lines are cables.
fn wire_up(servers: &[Server]) -> (Vec<Line>, Reachable) {
    let mut lines = Vec::new();
    let mut peers: Reachable = servers.iter().map(|_| Vec::new()).collect();
    for (one, first) in servers.iter().enumerate() {
        for (other, second) in servers.iter().enumerate().skip(one + 1) {
            let ends = [first, second].map(|server| server.network().expect("each has one"));
            let cable = Cable::between(ends[0], ends[1]);
            let relay =
                |server: &Server, address| (server.name().to_owned(), format!("{address}:{}", server.ports.relay));
            peers[one].push(relay(second, &cable.addresses[1]));
            peers[other].push(relay(first, &cable.addresses[0]));
            lines.push(Line::Cable(cable));
        }
    }
    configure(servers, &peers);
    (lines, peers)
}
