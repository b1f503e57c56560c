//! Where a story is played: two servers, a user of its own, and a look at the logs afterwards.

use std::ops::Deref;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::cluster::server::is_of_doveadm;
use crate::cluster::{Cluster, Format, Server, Setup, Snapshot};

/// Deadline for what happens on one server by itself, such as an expunge at logout.
pub const SOON: Duration = Duration::from_secs(10);

/// What Dovecot says by itself: when it is stopped or reloaded while it starts a process or lists its users, as after each start of a relay; and of a
/// maildir that is renamed while another process opens it.
const DOVECOTS_OWN: [&str; 6] = [
    "Failed to read configuration: fd_read() failed: Connection reset by peer",
    "run/config) failed: read(size=8192) failed: Connection reset by peer",
    "auth-worker: Aborted LIST request",
    "net_connect_unix(auth-worker) failed",
    "userdb list: User listing returned failure",
    "/dovecot-uidlist.lock was immediately deleted under us",
];

/// And of a dbox that is renamed before the list of mailboxes learns its size: index_storage_list_index_update_sync() takes no
/// missing file for an answer.
fn is_dovecots_own(line: &str) -> bool {
    let is_renamed =
        line.contains(": stat(/") && line.ends_with("/dovecot.index.log) failed: No such file or directory");
    // Its stats process may be slow to greet.
    let is_slow = line.contains("/stats-writer (") && line.contains(": Timeout waiting for handshake response");
    is_renamed || is_slow || is_of_doveadm(line) || DOVECOTS_OWN.iter().any(|text| line.contains(text))
}

pub struct Scene {
    cluster: Arc<Cluster>,
    /// Nobody else's user.
    pub user: String,
    here: usize,
    there: usize,
    /// How much of each server's log was there before.
    log_starts: Vec<usize>,
    allowed: Mutex<Vec<String>>,
}

impl Scene {
    /// A scene on a cluster of its own; `user` is free to choose.
    pub fn on(cluster: Cluster, user: &str) -> Scene {
        Scene::at(Arc::new(cluster), user, 0, 1)
    }

    /// On a cluster that others use, too.
    pub fn shared(cluster: Arc<Cluster>, user: &str) -> Scene {
        Scene::at(cluster, user, 0, 1)
    }

    fn at(cluster: Arc<Cluster>, user: &str, here: usize, there: usize) -> Scene {
        let shared = Arc::strong_count(&cluster) > 1;
        let log_starts = cluster.servers().iter().map(|s| if shared { s.log().len() } else { 0 }).collect();
        Scene { cluster, user: user.to_owned(), here, there, log_starts, allowed: Mutex::new(Vec::new()) }
    }

    /// The server on which the story happens.
    pub fn here(&self) -> &Server {
        self.server(self.here)
    }

    /// Its peer, on which it must show.
    pub fn there(&self) -> &Server {
        self.server(self.there)
    }

    fn server(&self, index: usize) -> &Server {
        let servers = self.cluster.servers();
        &servers[index.min(servers.len() - 1)]
    }

    /// Waits until both servers show the same.
    pub fn settled(&self) -> Snapshot {
        self.cluster.converged(&self.user)
    }

    /// This story causes log lines with `text`: they are no fault. A crash is one, unless `text` tells of it.
    pub fn expects_in_log(&self, text: &str) {
        self.allowed.lock().unwrap_or_else(|e| e.into_inner()).push(text.to_owned());
    }

    /// Error lines of the servers' logs that belong to this story, or to none.
    fn complaints(&self) -> Vec<String> {
        let allowed = self.allowed.lock().unwrap_or_else(|e| e.into_inner());
        let mut complaints = Vec::new();
        for (server, start) in self.cluster.servers().iter().zip(&self.log_starts) {
            let log = server.log();
            for line in log.get(*start..).unwrap_or_default().lines() {
                let bad = ["Panic:", "Fatal:", "Error:"].iter().any(|word| line.contains(word));
                let of_other = line.contains("story-") && !line.contains(&self.user);
                if bad
                    && !of_other
                    && !is_dovecots_own(line)
                    && !allowed
                        .iter()
                        .any(|text| line.contains(text.as_str()) && (!tells_of_crash(line) || tells_of_crash(text)))
                {
                    complaints.push(format!("{}: {line}", server.name()));
                }
            }
            complaints.extend(server.findings().iter().map(|found| format!("{}: {found}", server.name())));
        }
        complaints
    }
}

fn tells_of_crash(text: &str) -> bool {
    ["Panic:", "killed with signal"].iter().any(|words| text.contains(words))
}

impl Deref for Scene {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Scene {
    /// What the servers said and noticed. With DOVETAIL_TEST_KEEP, their folders are copied there.
    fn tell(&self) {
        for (server, start) in self.cluster.servers().iter().zip(&self.log_starts) {
            let log = server.log();
            let mut lines: Vec<&str> = log.get(*start..).unwrap_or_default().lines().collect();
            lines.retain(|line| !line.contains("story-") || line.contains(&self.user));
            let skipped = lines.len().saturating_sub(200);
            eprintln!("---- log of {} (Dovecot {}), {skipped} lines left out", server.name(), server.version_text());
            for line in &lines[skipped..] {
                eprintln!("{line}");
            }
            let counters = server.try_status().and_then(|status| status.counters).unwrap_or_default();
            eprintln!("---- what {} noticed: {:?}", server.name(), counters.notes);
            server.findings().iter().for_each(|found| eprintln!("---- found in a process of it:\n{found}"));
            if let Some(keep) = std::env::var_os("DOVETAIL_TEST_KEEP") {
                let keep = Path::new(&keep).join(format!("{}-{}", self.user, server.name()));
                let _ = Command::new("cp").arg("-a").arg(server.outside("")).arg(&keep).status();
                eprintln!("---- {} is kept in {}", server.name(), keep.display());
            }
        }
    }
}

/// Complains, or tells of the servers if the test failed.
impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return self.tell();
        }
        let complaints = self.complaints();
        if !complaints.is_empty() {
            self.tell();
            panic!("the servers complained:\n{}", complaints.join("\n"));
        }
    }
}

/// Plays a story on the shared pair of servers with these formats; `back`: from b to a.
pub fn play(a: Format, b: Format, back: bool, name: &str, story: fn(&Scene)) {
    let (here, there) = if back { (1, 0) } else { (0, 1) };
    let user = format!("story-{name}-{here}{there}");
    story(&Scene::at(shared_pair(a, b), &user, here, there));
}

/// One pair for all stories with the same formats: starting Dovecot takes longer than most of them. It lives as long as
/// the test process; its janitor ends it.
fn shared_pair(a: Format, b: Format) -> Arc<Cluster> {
    static PAIRS: [[OnceLock<Arc<Cluster>>; 3]; 3] = [const { [const { OnceLock::new() }; 3] }; 3];
    let cell = &PAIRS[a as usize][b as usize];
    cell.get_or_init(|| {
        let setup = |name, format| Setup::new(name, format).extra(AUTOEXPUNGE, AUTOEXPUNGE);
        let mut setups = vec![setup("a", a), setup("b", b)];
        if std::env::var_os("DOVETAIL_TEST_SINGLE").is_some() {
            // To check a story itself: it must hold on a plain Dovecot that is its own peer.
            setups = vec![setup("a", a).without_plugin()];
        }
        Arc::new(Cluster::start(setups))
    })
    .clone()
}

const AUTOEXPUNGE: &str = "
namespace inbox {
  mailbox Short {
    autoexpunge_max_mails = 2
  }
}
";

/// Declares stories as functions of a scene and makes each a test for every pair of formats, both ways.
macro_rules! stories {
    ($( $(#[$doc:meta])* fn $name:ident($scene:ident) $body:block )*) => {
        $( $(#[$doc])* fn $name($scene: &crate::scene::Scene) $body )*
        crate::scene::stories!(@pair sdbox_to_sdbox Sdbox Sdbox false, $($name)*);
        crate::scene::stories!(@pair sdbox_to_sdbox_back Sdbox Sdbox true, $($name)*);
        crate::scene::stories!(@pair mdbox_to_mdbox Mdbox Mdbox false, $($name)*);
        crate::scene::stories!(@pair maildir_to_maildir Maildir Maildir false, $($name)*);
        crate::scene::stories!(@pair sdbox_to_mdbox Sdbox Mdbox false, $($name)*);
        crate::scene::stories!(@pair mdbox_to_sdbox Sdbox Mdbox true, $($name)*);
        crate::scene::stories!(@pair mdbox_to_maildir Mdbox Maildir false, $($name)*);
        crate::scene::stories!(@pair maildir_to_mdbox Mdbox Maildir true, $($name)*);
        crate::scene::stories!(@pair maildir_to_sdbox Maildir Sdbox false, $($name)*);
        crate::scene::stories!(@pair sdbox_to_maildir Maildir Sdbox true, $($name)*);
    };
    (@pair $pair:ident $a:ident $b:ident $back:literal, $($name:ident)*) => {
        mod $pair {
            use crate::cluster::Format;
            $(
                #[test]
                fn $name() {
                    crate::scene::play(Format::$a, Format::$b, $back, stringify!($name), super::$name);
                }
            )*
        }
    };
}
pub(crate) use stories;

/// In a thread that is another user.
pub fn as_user<T: Send + 'static>(uid: u32, act: impl FnOnce() -> T + Send + 'static) -> T {
    let act = move || {
        // SAFETY: it only changes this thread, as the C library's function would not.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }, 0);
        act()
    };
    std::thread::spawn(act).join().expect("no panic")
}

/// A small mail.
pub fn mail(subject: &str) -> Vec<u8> {
    format!("From: sender@client.test\r\nTo: you@client.test\r\nSubject: {subject}\r\n\r\nHello from {subject}.\r\n")
        .into_bytes()
}

/// A mail whose whole text has exactly `size` bytes, in lines, from a fixed sequence.
pub fn mail_of_size(size: usize) -> Vec<u8> {
    let mut text = b"Subject: sized\n\n".to_vec();
    text.truncate(size);
    let mut state = 1u32;
    while text.len() < size {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let end_of_line = text.len() % 77 == 76;
        text.push(if end_of_line { b'\n' } else { b'a' + (state >> 24) as u8 % 26 });
    }
    text
}
