//! One Dovecot under test: its folder, its namespace, starting and stopping it, running programs in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::checker::{self, Checker};
use super::config::{self, Ports};
use super::doveadm::Doveadm;
use super::imap::Imap;
use super::janitor::Janitor;
use super::lmtp::Lmtp;
use super::network::Namespace;
use super::pop3::Pop3;
use super::ports::{PortBlock, LOOPBACK};
use super::snapshot::{table, Body};
use super::{holds_within, wait_until, Format, Setup, Version};

/// Where the distribution keeps Dovecot's programs and modules; ours are added there.
const PKGLIBDIR: &str = "/usr/lib/dovecot";

/// What is said in the place of what where a part of a name may have no dots; no more is made of dots in the tests.
const ESCAPES: [(&str, &str); 3] = [(".", "%2e"), ("%2e", "%252e"), ("%252e", "%25252e")];

const START_DEADLINE: Duration = Duration::from_secs(20);

/// Folders that may be disks of their own, each with room for all that the tests write: mail, and what the relay remembers.
pub const SMALL_DISKS: [&str; 2] = ["home", "state"];
const SMALL_DISK: &str = "size=48m";

/// Where a server's Dovecot is installed.
pub struct Root {
    path: PathBuf,
    /// Our files as `make install DESTDIR=` laid them out.
    stage: PathBuf,
}

/// The plugin, below the folder of Dovecot's modules.
const PLUGIN: &str = "lib20_dovetail_plugin.so";

impl Root {
    /// Server `a` lives in DOVETAIL_TEST_ROOT_A with the files of DOVETAIL_TEST_STAGE_A, and so on.
    pub fn of(server: &str) -> Root {
        let variable = |what: &str| std::env::var_os(format!("DOVETAIL_TEST_{what}_{}", server.to_uppercase()));
        let path = variable("ROOT").map_or(PathBuf::from("/"), PathBuf::from);
        let stage = variable("STAGE")
            .or(std::env::var_os("DOVETAIL_TEST_STAGE"))
            .map_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("target/stage"), PathBuf::from);
        Root { path, stage }
    }

    /// A path inside this root as it is seen from outside.
    pub fn outside(&self, inside: &str) -> PathBuf {
        self.path.join(inside.trim_start_matches('/'))
    }

    fn version(&self) -> (Version, String) {
        let output = Command::new("chroot").arg(&self.path).args(["dovecot", "--version"]).output().expect("chroot");
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let version = match text.get(..4) {
            Some("2.3.") => Version::V23,
            Some("2.4.") => Version::V24,
            _ => panic!(
                "cannot run Dovecot in {}: version {text:?} {}",
                self.path.display(),
                String::from_utf8_lossy(&output.stderr)
            ),
        };
        (version, text)
    }
}

pub struct Server {
    setup: Setup,
    root: Root,
    version: Version,
    version_text: String,
    /// The server's folder as it sees it itself.
    dir: String,
    pub ports: Ports,
    _port_block: PortBlock,
    master: Mutex<Option<Child>>,
    log_checked: Mutex<usize>,
    /// None: that of this process.
    network: Option<Namespace>,
    janitor: Arc<Janitor>,
}

impl Server {
    pub fn prepare(
        setup: Setup,
        root: Root,
        cluster_dir: &str,
        network: Option<Namespace>,
        janitor: Arc<Janitor>,
    ) -> Server {
        let (version, version_text) = root.version();
        let mut block = PortBlock::reserve();
        let ports = Ports { imap: block.take(), pop3: block.take(), lmtp: block.take(), relay: block.take() };
        let dir = format!("{cluster_dir}/{}", setup.name);
        let server = Server {
            setup,
            root,
            version,
            version_text,
            dir,
            ports,
            _port_block: block,
            master: Mutex::new(None),
            log_checked: Mutex::new(0),
            network,
            janitor,
        };
        server.make_folder();
        server
    }

    fn make_folder(&self) {
        let dir = self.outside("");
        for part in ["run", "state", "home", "bin"] {
            fs::create_dir_all(dir.join(part)).unwrap_or_else(|e| panic!("mkdir {}/{part}: {e}", dir.display()));
        }
        // The janitor unmounts them.
        for disk in SMALL_DISKS.iter().filter(|_| self.setup.small_disks) {
            let options = ["-t", "tmpfs", "-o", SMALL_DISK, "tmpfs"].map(std::ffi::OsStr::new);
            run("mount", &[&options[..], &[dir.join(disk).as_os_str()]].concat());
            fs::set_permissions(dir.join(disk), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
        }
        for (path, text) in &self.setup.files {
            use std::os::unix::fs::PermissionsExt;
            fs::write(dir.join(path), text.replace("{DIR}", &self.dir)).unwrap_or_else(|e| panic!("{path}: {e}"));
            let mode = if path.starts_with("bin/") { 0o755 } else { 0o644 };
            fs::set_permissions(dir.join(path), fs::Permissions::from_mode(mode)).expect("chmod");
        }
        // Mail processes, which are not root, write their log lines here too when they cannot reach the log service.
        fs::write(dir.join("log"), "").expect("log");
        run("chown", &["-R".as_ref(), "8:8".as_ref(), dir.join("home").as_os_str(), dir.join("log").as_os_str()]);
        let installed = self.root.outside(PKGLIBDIR);
        let copy = dir.join("lib");
        run("cp", &["-a".as_ref(), installed.as_os_str(), copy.as_os_str()]);
        if self.setup.plugin {
            let ours = self.root.stage.join(PKGLIBDIR.trim_start_matches('/'));
            assert!(
                ours.join("modules").exists(),
                "our files are not in {}: run the tests by `make test`, or `make stage` first",
                ours.display()
            );
            run("cp", &["-a".as_ref(), ours.join(".").as_os_str(), copy.as_os_str()]);
            let plugin = copy.join("modules").join(PLUGIN);
            if self.setup.can_panic {
                self.make_panics(&plugin);
            }
            if let Some(checker) = Checker::get() {
                self.check(checker, &copy, &plugin);
            }
            let example = match self.version {
                Version::V23 => "dovecot-plugin-2.3.conf.example",
                Version::V24 => "dovecot-plugin.conf.example",
            };
            let example = Path::new(env!("CARGO_MANIFEST_DIR")).join(example);
            fs::copy(&example, dir.join(config::EXAMPLE)).unwrap_or_else(|e| panic!("{}: {e}", example.display()));
        }
    }

    /// Has the programs of its Dovecot run under a checker.
    fn check(&self, checker: &Checker, lib: &Path, plugin: &Path) {
        assert_eq!(self.root.path, Path::new("/"), "the checker is here, and not in another root");
        if let Some(build) = checker.build() {
            // Dovecot's config process is not checked, and goes on with the plain build.
            let settings = lib.join("modules/settings/libdovetail_settings.so");
            if settings.exists() {
                fs::remove_file(&settings).expect("a link");
                fs::copy(plugin, &settings).expect("the plugin");
            }
            self.copy_build(build, plugin);
        }
        checker.prepare(lib, PKGLIBDIR, &self.dir, &self.outside(""));
    }

    /// What a checker has found in its processes.
    pub fn findings(&self) -> Vec<String> {
        checker::findings(&self.outside(""))
    }

    /// Another build of the plugin, `make stage-panics` or `make stage-asan`, in the place of the one that is installed.
    fn copy_build(&self, build: &str, plugin: &Path) {
        let mut built = self.root.stage.clone().into_os_string();
        built.push(build);
        let built = Path::new(&built).join(PLUGIN);
        fs::copy(&built, plugin).unwrap_or_else(|e| panic!("{}: {e}: `make stage{build}` builds it", built.display()));
    }

    /// The configuration without our plugin, see [`Server::untold`].
    fn write_untold(&self, text: &str) {
        let example = fs::read_to_string(self.outside(&format!("/{}", config::EXAMPLE))).expect("the example");
        let without = match self.version {
            Version::V23 => example.replace("mail_plugins notify dovetail\n", "mail_plugins notify\n"),
            Version::V24 => example.replace("  dovetail = yes\n", "  dovetail = no\n"),
        };
        assert_ne!(example, without, "the example loads the plugin in another way");
        let name = format!("untold-{}", config::EXAMPLE);
        fs::write(self.outside(&format!("/{name}")), without).expect("write");
        fs::write(self.outside("/untold.conf"), text.replace(config::EXAMPLE, &name)).expect("write");
    }

    /// Puts the build that can panic in the place of the plugin, and makes the folder that it reads.
    fn make_panics(&self, plugin: &Path) {
        self.copy_build("-panics", plugin);
        let folder = self.outside("/panics");
        fs::create_dir(&folder).expect("mkdir");
        fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("chmod");
    }

    /// The next who comes by that place panics; see src/guard.rs. The server must be one that [can](Setup::that_can_panic).
    pub fn provoke(&self, place: &str) {
        fs::write(self.outside(&format!("/panics/{place}")), "").expect("the folder of panics");
    }

    /// Whether somebody did.
    pub fn has_panicked(&self, place: &str) -> bool {
        !self.outside(&format!("/panics/{place}")).exists()
    }

    /// The plugin as it is installed.
    pub fn installed_plugin(&self) -> Vec<u8> {
        let path = self.root.stage.join(PKGLIBDIR.trim_start_matches('/')).join("modules").join(PLUGIN);
        fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    pub fn configure(&self, peers: &[(String, String)]) {
        let text = config::Server {
            setup: &self.setup,
            version: self.version,
            dir: &self.dir,
            ports: &self.ports,
            peers,
            is_apart: self.network.is_some(),
        }
        .text()
        .replace("{DIR}", &self.dir);
        fs::write(self.outside("/dovecot.conf"), &text).expect("dovecot.conf");
        if self.setup.plugin {
            self.write_untold(&text);
        }
    }

    /// Starts Dovecot and waits until it answers on all its ports.
    pub fn start(&self) {
        let mut master = self.master.lock().unwrap_or_else(|e| e.into_inner());
        assert!(master.is_none(), "{} runs already", self.name());
        // The last exec makes the master the process that is spawned here.
        let script = r#"mount --bind "$1" "$2" && exec chroot "$3" dovecot -F -c "$4""#;
        let mut command = Command::new("unshare");
        if let Some(network) = &self.network {
            command = Command::new("nsenter");
            command.args(["--net", "--target", &network.pid().to_string(), "unshare"]);
        }
        let child = command
            .args(["--mount", "--propagation", "private", "sh", "-c", script, "dovetail-test"])
            .arg(self.outside("/lib"))
            .arg(self.root.outside(PKGLIBDIR))
            .arg(&self.root.path)
            .arg(self.conf())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("unshare");
        self.janitor.add_master(child.id());
        *master = Some(child);
        let child = master.as_mut().expect("just started");
        let ports = [self.ports.imap, self.ports.pop3, self.ports.lmtp];
        let mut ended = None;
        let answers = holds_within(START_DEADLINE, || {
            ended = child.try_wait().expect("wait for Dovecot's master");
            ended.is_some() || ports.iter().all(|port| self.greets(*port))
        });
        if ended.is_some() || !answers {
            let mut stderr = String::new();
            if let (true, Some(mut pipe)) = (ended.is_some(), child.stderr.take()) {
                let _ = std::io::Read::read_to_string(&mut pipe, &mut stderr);
            }
            panic!("Dovecot {} did not start ({ended:?}): {stderr}\n{}", self.name(), self.log());
        }
    }

    /// Whether a program answers there: the master starts them when it has opened all of its ports.
    fn greets(&self, port: u16) -> bool {
        let Ok(mut stream) = self.connect(port) else { return false };
        let timeout = stream.set_read_timeout(Some(START_DEADLINE));
        timeout.is_ok() && std::io::Read::read(&mut stream, &mut [0]).is_ok_and(|size| size > 0)
    }

    /// To one of its ports, as from the server itself.
    pub fn connect(&self, port: u16) -> io::Result<TcpStream> {
        match &self.network {
            Some(network) => network.connect(port),
            None => TcpStream::connect((LOOPBACK, port)),
        }
    }

    /// Its own network, if it has one.
    pub fn network(&self) -> Option<&Namespace> {
        self.network.as_ref()
    }

    /// Stops Dovecot as `systemctl stop` does and waits for its end.
    pub fn stop(&self) {
        let Some(mut child) = self.master.lock().unwrap_or_else(|e| e.into_inner()).take() else {
            return;
        };
        let processes = self.processes_of(child.id());
        signal(child.id(), "TERM");
        let ended = |child: &mut Child| matches!(child.try_wait(), Ok(Some(_)) | Err(_));
        if !holds_within(Duration::from_secs(10), || ended(&mut child)) {
            eprintln!("{}: Dovecot did not stop within 10 s, killing it", self.name());
            signal(child.id(), "KILL");
            let _ = child.wait();
        }
        self.janitor.remove_master(child.id());
        // As systemd does with what is left of a service: sessions that wait for a lock outlive their master.
        if !holds_within(Duration::from_secs(10), || processes().is_empty()) {
            eprintln!("{}: some processes did not stop within 10 s, killing them", self.name());
            kill_until_none(processes);
        }
    }

    /// Those of the server, now and later, each time it is called.
    fn processes_of(&self, master: u32) -> impl Fn() -> Vec<String> {
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let own = namespace(master);
        // While it is held, no other server's gets its number.
        let held = fs::File::open(format!("/proc/{master}/ns/mnt")).ok();
        move || {
            let _ = &held;
            let all = fs::read_dir("/proc").expect("/proc").flatten();
            let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
            let mut pids: Vec<u32> = pids.filter(|pid| own.is_some() && namespace(*pid) == own).collect();
            // The master first, so that it logs nothing of the others; theirs are lower where the numbers began anew.
            pids.sort_by_key(|pid| *pid != master);
            pids.iter().map(u32::to_string).collect()
        }
    }

    /// Kills all of it at once, as a power failure does.
    pub fn kill_all(&self) {
        let Some(mut master) = self.master.lock().unwrap_or_else(|e| e.into_inner()).take() else { return };
        let processes = self.processes_of(master.id());
        assert!(!processes().is_empty(), "its master runs");
        kill_until_none(|| {
            let _ = master.try_wait();
            processes()
        });
        let _ = master.wait();
        self.janitor.remove_master(master.id());
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    pub fn name(&self) -> &str {
        &self.setup.name
    }

    pub fn format(&self) -> Format {
        self.setup.format
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub fn version_text(&self) -> &str {
        &self.version_text
    }

    /// The server's folder as it sees it itself.
    pub fn dir(&self) -> &str {
        &self.dir
    }

    /// A path below the server's folder, seen from outside.
    pub fn outside(&self, below: &str) -> PathBuf {
        self.root.outside(&format!("{}{below}", self.dir))
    }

    pub fn conf(&self) -> String {
        format!("{}/dovecot.conf", self.dir)
    }

    /// The name of a mailbox of these parts here. A dot in a part is said otherwise where Dovecot allows none.
    pub fn mailbox(&self, parts: &[&str]) -> String {
        let Setup { separator, prefix, .. } = &self.setup;
        let escaped = |part: &&str| match self.has_dots() {
            true => (*part).to_owned(),
            false => ESCAPES.iter().rev().fold((*part).to_owned(), |part, (from, to)| part.replace(from, to)),
        };
        match parts {
            ["INBOX"] => "INBOX".into(),
            _ => prefix.clone() + &parts.iter().map(escaped).collect::<Vec<_>>().join(&separator.to_string()),
        }
    }

    /// The name as a server has it that separates by slashes and allows dots, from the one that it has here.
    pub fn common_name(&self, name: &str) -> String {
        let Setup { separator, prefix, .. } = &self.setup;
        let parts = name.strip_prefix(prefix).unwrap_or(name).split(*separator);
        let unescaped = |part: &str| match self.has_dots() {
            true => part.to_owned(),
            false => ESCAPES.iter().fold(part.to_owned(), |part, (to, from)| part.replace(from, to)),
        };
        parts.map(unescaped).collect::<Vec<_>>().join("/")
    }

    /// Patterns that match all mailboxes: doveadm's "*" does not pass a namespace's prefix.
    pub fn all_mailboxes(&self) -> Vec<String> {
        match self.setup.prefix.as_str() {
            "" => vec!["*".into()],
            prefix => vec!["INBOX".into(), format!("{prefix}*")],
        }
    }

    /// Whether a part of a name may have them.
    fn has_dots(&self) -> bool {
        self.setup.separator != '.' && self.setup.format != Format::Maildir
    }

    /// Whether the user's INBOX exists here, asked without touching it (any program of Dovecot would create it).
    pub fn has_inbox(&self, user: &str) -> bool {
        let index = match self.format() {
            Format::Sdbox => "sdbox/mailboxes/INBOX/dbox-Mails/dovecot.index.log",
            Format::Mdbox => "mdbox/mailboxes/INBOX/dbox-Mails/dovecot.index.log",
            Format::Maildir => "Maildir/dovecot.index.log",
        };
        self.outside(&format!("/home/{user}/{index}")).exists()
    }

    /// A user whom it did not know: see [`Setup::only_user`].
    pub fn add_user(&self, user: &str) {
        let line = config::user_line(&self.dir, user, "");
        let file = fs::OpenOptions::new().append(true).open(self.outside(&format!("/{}", config::USERS)));
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the file of its users");
    }

    // ---- Programs ---------------------------------------------------------------------------------------------------

    /// A program of this server's root, in its namespace, while its Dovecot runs.
    pub fn command(&self, program: &str) -> Command {
        let master = self.master.lock().unwrap_or_else(|e| e.into_inner());
        let pid = master.as_ref().unwrap_or_else(|| panic!("{} is stopped", self.name())).id();
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--root", "--wd", "--target", &pid.to_string()]).current_dir("/");
        if let Some(checker) = Checker::get().filter(|_| self.setup.plugin) {
            command.envs(checker.environment(&self.dir));
        }
        command.arg(program);
        command
    }

    pub fn try_doveadm(&self, args: &[&str]) -> Output {
        self.run_with_input(self.command("doveadm").args(["-c", &self.conf()]).args(args), b"")
    }

    /// doveadm's standard output; panics if it fails.
    pub fn doveadm(&self, args: &[&str]) -> String {
        String::from_utf8_lossy(&self.doveadm_bytes(args, b"")).into_owned()
    }

    /// For many questions. It reads mail as any of the server's processes does.
    pub fn doveadm_process(&self) -> io::Result<Doveadm> {
        Doveadm::connect(&self.outside("/run/doveadm-server"))
    }

    pub fn doveadm_bytes(&self, args: &[&str], input: &[u8]) -> Vec<u8> {
        let output = self.run_with_input(self.command("doveadm").args(["-c", &self.conf()]).args(args), input);
        assert!(
            output.status.success(),
            "{}: doveadm {args:?} failed ({}): {}",
            self.name(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    /// doveadm without our plugin: what it does nobody is told of. By a configuration of its own, as Dovecot 2.4 does not take
    /// `-o mail_plugins=`.
    pub fn untold(&self, args: &[&str], input: &[u8]) {
        let conf = format!("{}/untold.conf", self.dir);
        let output = self.run_with_input(self.command("doveadm").args(["-c", &conf]).args(args), input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: doveadm {args:?} failed ({}): {stderr}", self.name(), output.status);
    }

    /// The rows of `doveadm dovetail status`: one for each peer.
    pub fn status(&self) -> Vec<BTreeMap<String, String>> {
        table(&self.doveadm(&["-f", "tab", "dovetail", "status"])).collect()
    }

    fn relay_status(&self, user: Option<&str>) -> Result<dovetail::wire::proto::Status, String> {
        dovetail::relay::client::status(&self.outside("/run/dovetail"), user, Duration::from_secs(10))
    }

    /// What the relay counts, asked as doveadm asks it.
    pub fn counters(&self) -> dovetail::wire::proto::Counters {
        self.relay_status(None).unwrap_or_else(|error| panic!("{}: {error}", self.name())).counters.unwrap_or_default()
    }

    /// The same, if it answers.
    pub fn try_status(&self) -> Option<dovetail::wire::proto::Status> {
        self.relay_status(None).ok()
    }

    /// Whether the relay answers, nothing of it is still on its way to a peer, and nothing is to be looked at.
    pub fn has_nothing_pending(&self) -> bool {
        self.relay_status(None).is_ok_and(|status| is_at_rest(&status))
    }

    /// The same, of one user.
    pub fn has_nothing_pending_of(&self, user: &str) -> bool {
        self.what_is_pending_of(user).is_none()
    }

    /// A line that says it.
    pub fn what_is_pending_of(&self, user: &str) -> Option<String> {
        let status = match self.relay_status(Some(user)) {
            Ok(status) => status,
            Err(error) => return Some(format!("  {}: {error}\n", self.name())),
        };
        if is_at_rest(&status) {
            return None;
        }
        let changes: Vec<_> = status.peers.iter().map(|peer| format!("{} to {}", peer.pending, peer.peer)).collect();
        let looking = status.counters.unwrap_or_default().looking;
        Some(format!("  {}: {changes:?} pending, {looking} users looked at\n", self.name()))
    }

    /// Whether the relay answers and has looked at all that it wanted to look at.
    pub fn has_looked(&self) -> bool {
        self.relay_status(None).is_ok_and(|status| status.counters.unwrap_or_default().looking == 0)
    }

    /// Delivers by the real dovecot-lda.
    pub fn lda(&self, user: &str, mail: &[u8]) {
        self.lda_to(user, "INBOX", mail);
    }

    /// Into a mailbox that exists.
    pub fn lda_to(&self, user: &str, mailbox: &str, mail: &[u8]) {
        let program = format!("{PKGLIBDIR}/dovecot-lda");
        let args = ["-c", &self.conf(), "-d", user, "-m", mailbox];
        let output = self.run_with_input(self.command(&program).args(args), mail);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: dovecot-lda -d {user} failed ({}): {stderr}", self.name(), output.status);
    }

    fn run_with_input(&self, command: &mut Command, input: &[u8]) -> Output {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("nsenter");
        let mut stdin = child.stdin.take().expect("piped");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // A program that does not read its input closes it: no matter.
                let _ = stdin.write_all(input);
            });
            child.wait_with_output().expect("wait")
        })
    }

    /// Process ids of a service of this Dovecot (its name as in the configuration).
    pub fn pids(&self, service: &str) -> Vec<u32> {
        let text = self.doveadm(&["-f", "tab", "process", "status", service]);
        let pids = text.lines().filter_map(|line| {
            let mut fields = line.split('\t');
            (fields.next() == Some(service)).then(|| fields.next().and_then(|pid| pid.parse().ok())).flatten()
        });
        pids.collect()
    }

    /// `doveadm reload`, and no client comes to one of the old processes any more: those turn it away (421, BYE).
    pub fn reload(&self) {
        let old: Vec<_> = ["lmtp", "imap-login", "pop3-login"].iter().flat_map(|service| self.pids(service)).collect();
        self.doveadm(&["reload"]);
        let are_gone = || old.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        wait_until(Duration::from_secs(30), "the old processes are gone", are_gone);
    }

    /// Kills the processes of a service with SIGKILL; returns how many there were.
    pub fn kill(&self, service: &str) -> usize {
        let pids = self.pids(service);
        for pid in &pids {
            signal(*pid, "KILL");
        }
        pids.len()
    }

    // ---- Disks ------------------------------------------------------------------------------------------------------

    /// Leaves so many bytes free on one of [`SMALL_DISKS`].
    pub fn fill(&self, disk: &str, room: u64) {
        let mut ballast = File::create(self.ballast(disk)).expect("its directory has room");
        let mut size = 0;
        loop {
            match ballast.write(&[0; 64 << 10]) {
                Ok(written) => size += written as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{}: cannot fill {disk}: {error}", self.name()),
            }
        }
        ballast.set_len(size.saturating_sub(room)).expect("truncate");
    }

    /// The disk has room again.
    pub fn free(&self, disk: &str) {
        let _ = fs::remove_file(self.ballast(disk));
    }

    fn ballast(&self, disk: &str) -> PathBuf {
        self.outside(&format!("/{disk}/ballast"))
    }

    // ---- Mail -------------------------------------------------------------------------------------------------------

    pub fn imap(&self, user: &str) -> Imap {
        Imap::login(self.connect(self.ports.imap).expect("connect to IMAP"), user)
    }

    pub fn lmtp(&self) -> Lmtp {
        Lmtp::greeted(self.connect(self.ports.lmtp).expect("connect to LMTP"))
    }

    pub fn pop3(&self, user: &str) -> Pop3 {
        Pop3::login(self.connect(self.ports.pop3).expect("connect to POP3"), user)
    }

    /// Delivers one mail by LMTP; panics unless Dovecot takes it.
    pub fn deliver(&self, user: &str, mail: &[u8]) {
        self.lmtp().deliver(&[user], mail);
    }

    /// The bytes of all of a user's mails, as stored.
    pub fn bodies(&self, user: &str) -> Vec<Body> {
        Body::fetch_all(self, user)
    }

    // ---- Log --------------------------------------------------------------------------------------------------------

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.outside("/log")).unwrap_or_default()).into_owned()
    }

    pub fn wait_for_log(&self, text: &str) {
        wait_until(Duration::from_secs(10), &format!("{} logs {text:?}", self.name()), || self.log().contains(text));
    }

    /// Log lines since the last call that no healthy server writes, except those that contain one of `allowed`.
    pub fn new_complaints(&self, allowed: &[&str]) -> Vec<String> {
        let log = self.log();
        let mut checked = self.log_checked.lock().unwrap_or_else(|e| e.into_inner());
        let new = log.get(*checked..).unwrap_or_default();
        // Leave a line that is still being written for the next time.
        let complete = new.rfind('\n').map_or(0, |end| end + 1);
        *checked += complete;
        new[..complete]
            .lines()
            .filter(|line| ["Panic:", "Fatal:", "Error:"].iter().any(|word| line.contains(word)))
            .filter(|line| !is_of_doveadm(line))
            .filter(|line| !allowed.iter().any(|text| line.contains(text)))
            .map(|line| format!("{}: {line}", self.name()))
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        let findings = self.findings();
        if !std::thread::panicking() {
            assert!(findings.is_empty(), "in processes of {}:\n{}", self.name(), findings.join("\n"));
        }
    }
}

/// Whether it is the server's doveadm process that failed, and not we: whoever asked it hears of it.
pub fn is_of_doveadm(line: &str) -> bool {
    line.contains(" doveadm(") && line.contains("Error:") && !line.contains("dovetail: ")
}

/// Those that a process has started meanwhile come next.
fn kill_until_none(mut processes: impl FnMut() -> Vec<String>) {
    wait_until(Duration::from_secs(10), "all of its processes are dead", || {
        let pids = processes();
        let _ = Command::new("kill").arg("-KILL").args(&pids).stderr(Stdio::null()).status();
        pids.is_empty()
    });
}

/// A process that is to stop has stopped.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
    if name == "STOP" && status.expect("kill").success() {
        let is_stopped = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|fields| !fields.trim_start().starts_with(['R', 'S', 'D']))
        };
        wait_until(Duration::from_secs(10), "the process has stopped", is_stopped);
    }
}

pub fn require_root() {
    use std::os::unix::fs::MetadataExt;
    let uid = fs::metadata("/proc/self").expect("/proc").uid();
    assert!(uid == 0, "the end-to-end tests start real Dovecots in mount namespaces: run them as root (now uid {uid})");
}

fn run(program: &str, args: &[&std::ffi::OsStr]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn is_at_rest(status: &dovetail::wire::proto::Status) -> bool {
    status.peers.iter().all(|peer| peer.pending == 0)
        && status.counters.as_ref().is_none_or(|counters| counters.looking == 0)
}
