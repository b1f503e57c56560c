//! Relays that prove to each other who they are, and all kinds of others who cannot.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rcgen::{date_time_ymd, CertificateParams, DnType, Issuer, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned};

use super::house::*;
use dovetail::relay::Config;
use dovetail::settings::Tls;
use dovetail::tls::{authority, Credentials};
use dovetail::wire::frame;
use dovetail::wire::proto::frame::Kind;
use dovetail::wire::proto::{BodyRequest, Hello, Known};

/// Lines of the log, of all tests of this process.
pub struct Lines(Mutex<Vec<String>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

pub fn lines() -> &'static Lines {
    static LINES: OnceLock<Lines> = OnceLock::new();
    static SET: std::sync::Once = std::sync::Once::new();
    let lines = LINES.get_or_init(|| Lines(Mutex::default()));
    SET.call_once(|| {
        log::set_logger(lines).unwrap();
        log::set_max_level(log::LevelFilter::Info);
    });
    lines
}

fn until_logged(text: &str) {
    until(text, || lines().0.lock().unwrap().iter().any(|line| line.contains(text)));
}

pub fn lines_with(text: &str) -> usize {
    lines().0.lock().unwrap().iter().filter(|line| line.contains(text)).count()
}

/// An authority with certificates of these servers.
fn authority_of(house: &House, name: &str, servers: &[&str]) -> PathBuf {
    let folder = house.path(name);
    authority::init(&folder).unwrap();
    let servers: Vec<String> = servers.iter().map(|server| (*server).to_owned()).collect();
    authority::issue(&folder, &servers).unwrap();
    folder
}

fn files(folder: &Path, server: &str) -> Tls {
    Tls {
        ca: Some(folder.join("ca.pem")),
        cert: folder.join(format!("{server}.pem")),
        key: folder.join(format!("{server}.key")),
        fingerprints: Vec::new(),
    }
}

/// Gives a server its certificate.
fn with_tls(config: &mut Config, folder: &Path) {
    with_files(config, &files(folder, &config.server));
}

fn with_files(config: &mut Config, files: &Tls) {
    let peers: Vec<&str> = config.peers.iter().map(|peer| peer.name.as_str()).collect();
    config.tls = Some(Arc::new(Credentials::load(files, &config.server, &peers).unwrap()));
}

#[test]
fn a_pair_over_tls_sends_changes_both_ways() {
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let (a, b) = house.pair_with(|config| with_tls(config, &folder));
    let mut imap = a.process("imap");
    // More than TLS takes at once.
    (1..=3000).for_each(|uid| imap.save("jane", uid));
    let mut applied = 0;
    while applied < 3000 {
        let (worker, apply) = b.next_job();
        applied += apply.changes.len();
        worker.applied(&apply);
    }
    until("all are acknowledged", || a.peer("b").pending == 0);

    b.process("lmtp").save("joe", 1);
    let (_, apply) = a.next_job();
    assert_eq!(apply.changes[0].stamp.as_ref().unwrap().origin, "b");
}

#[test]
fn what_is_said_last_is_heard_also_if_the_end_comes_with_it() {
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let load = |name: &str, peer: &str| Credentials::load(&files(&folder, name), name, &[peer]).unwrap();
    let (mut a, mut b) = (load("a", "b").connect("b").unwrap(), load("b", "a").accept().unwrap());
    let (mut to_b, mut to_a) = UnixStream::pair().unwrap();
    [&to_b, &to_a].into_iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
    let mut buffer = [0; 65_536];
    let mut heard = Vec::new();
    a.flush(&mut to_b).unwrap();
    while b.proves("a").is_err() {
        let _ = b.read(&mut to_a, &mut buffer, |_| ());
        let _ = a.read(&mut to_b, &mut buffer, |_| ());
    }
    b.write(&mut to_a, b"last words").unwrap();
    b.say_end(&mut to_a);
    while heard.is_empty() {
        assert!(a.read(&mut to_b, &mut buffer, |bytes| heard.extend_from_slice(bytes)).unwrap(), "it ends before");
    }
    assert_eq!(heard, b"last words");
    assert!(!a.read(&mut to_b, &mut buffer, |_| panic!("nothing more")).unwrap());
}

#[test]
fn what_goes_over_the_line_is_not_to_be_read() {
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let listener = house.listener();
    let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| with_tls(config, &folder));
    let a = house.server_with("a", &[("b", address(&listener))], |config| with_tls(config, &folder));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (near, far) = (listener.accept().unwrap().0, b.connect_raw());
    for (mut from, mut to) in
        [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far.try_clone().unwrap(), near.try_clone().unwrap())]
    {
        let seen = seen.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                seen.lock().unwrap().extend_from_slice(&buffer[..length]);
                let _ = to.write_all(&buffer[..length]);
            }
        });
    }
    a.process("imap").save("jane-whom-nobody-knows", 1);
    let (worker, apply) = b.next_job();
    assert_eq!(apply.user, "jane-whom-nobody-knows");
    worker.applied(&apply);
    until("it is acknowledged", || a.peer("b").acked == 1);
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 1000 && !seen.windows(8).any(|some| some == b"jane-who"), "{} bytes", seen.len());
}

#[test]
fn pinned_certificates_need_no_authority() {
    lines();
    let house = House::new();
    let (ours, theirs) = (authority_of(&house, "ca-a", &["a"]), authority_of(&house, "ca-b", &["b"]));
    let pin = |folder: &Path, server: &str| {
        let entries = authority::show(folder).unwrap();
        let hex = &entries.iter().find(|entry| entry.name == server).unwrap().fingerprint;
        let bytes = (0..32).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap());
        (server.to_owned(), bytes.collect::<Vec<u8>>().try_into().unwrap())
    };
    let (pin_a, pin_b) = (pin(&ours, "a"), pin(&theirs, "b"));
    let pair = house.pair_with(|config| {
        let (folder, pin) = if config.server == "a" { (&ours, &pin_b) } else { (&theirs, &pin_a) };
        let files = Tls { ca: None, fingerprints: vec![pin.clone()], ..files(folder, &config.server) };
        with_files(config, &files);
    });
    drop(pair);

    // Another one of the same authority is not enough.
    let renewed = authority_of(&house, "ca-new", &["a", "b"]);
    let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| {
        with_files(config, &Tls { fingerprints: vec![pin_a.clone()], ..files(&renewed, "b") });
    });
    let mut other = Attacker::of(&renewed, "a").connect(b.connect_raw());
    other.try_greet("a");
    assert!(other.wire.is_closed());
    until_logged(
        "turned away: its certificate is not the one whose fingerprint dovetail_peer_fingerprints names, but ",
    );
}

#[test]
fn a_server_refuses_to_start_with_files_that_are_not_right() {
    lines();
    use std::os::unix::fs::PermissionsExt;
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let load = |files: &Tls| Credentials::load(files, "a", &["b"]).unwrap_err();
    let right = files(&folder, "a");
    assert!(Credentials::load(&right, "a", &["b"]).is_ok());

    let wrong = |edit: &dyn Fn(&mut Tls), reason: &str| {
        let mut files = right.clone();
        edit(&mut files);
        let error = load(&files);
        assert!(error.contains(reason), "{error}");
    };
    wrong(&|files| files.ca = Some("/nowhere".into()), "dovetail_ca: /nowhere: No such file");
    wrong(&|files| files.ca = Some(folder.join("a.key")), "there is no certificate in PEM format in it");
    wrong(&|files| files.cert = folder.join("b.pem"), "it is a certificate of 'b', not of 'a'");
    wrong(&|files| files.key = folder.join("b.key"), "it is not the key of the certificate in dovetail_cert");
    wrong(&|files| files.key = folder.join("a.pem"), "everybody on this machine may use it");
    wrong(&|files| files.key = folder.clone(), "it is no file");
    std::fs::set_permissions(folder.join("a.key"), PermissionsExt::from_mode(0o604)).unwrap();
    wrong(&|_| {}, "dovetail_key: ");
    wrong(&|_| {}, "everybody on this machine may use it (mode 604)");
    std::fs::set_permissions(folder.join("a.key"), PermissionsExt::from_mode(0o640)).unwrap();
    assert!(Credentials::load(&right, "a", &["b"]).is_ok());
    // One that expires is used, and each start says so.
    let (chain, key) = Attacker::with(&["a"], Some(&folder), |params| {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        params.not_after = date_time_ymd(1970, 1, 1) + since_1970 + Duration::from_secs(86_400 * 3 + 3_600);
    })
    .pem;
    std::fs::write(house.path("old.pem"), chain).unwrap();
    std::fs::write(house.path("old.key"), key).unwrap();
    std::fs::set_permissions(house.path("old.key"), PermissionsExt::from_mode(0o600)).unwrap();
    let old = Tls { cert: house.path("old.pem"), key: house.path("old.key"), ..right.clone() };
    assert!(Credentials::load(&old, "a", &["b"]).is_ok());
    until_logged("old.pem: it expires in 3 days.");
    let same = Credentials::load(&right, "a", &["b", "B"]).unwrap_err();
    assert!(same.contains("dovetail_peers: 'B' and 'b' are one name in a certificate"), "{same}");
    let bad = Credentials::load(&right, "a", &["b-"]).unwrap_err();
    assert!(bad.contains("dovetail_peers: 'b-' cannot stand in a certificate"), "{bad}");
}

#[test]
fn where_only_one_has_certificates_both_logs_say_so() {
    lines();
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let start = |with: &str| {
        let edit = |config: &mut Config| {
            if config.server == with {
                with_tls(config, &folder);
            }
        };
        let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], edit);
        (house.server_with("a", &[("b", b.address())], edit), b)
    };
    let (a, b) = start("a");
    until("A is told", || a.peer("b").last_error.ends_with("in the TLS handshake: is dovetail_cert set there?"));
    until_logged("turned away: the frame is of version 22, and only version 1 is known here: it speaks TLS.");
    drop((a, b));
    let (a, _b) = start("b");
    until("A is told", || a.peer("b").last_error.ends_with("only version 1 is known here: it speaks TLS"));
}

// ---- Others.

/// A client that trusts everybody and shows what it has.
struct Attacker {
    shows: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    /// Of what it made by itself.
    pem: (String, String),
}

#[derive(Debug)]
struct TrustsAll;

impl ServerCertVerifier for TrustsAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

impl Attacker {
    fn of(folder: &Path, server: &str) -> Attacker {
        let chain = CertificateDer::pem_file_iter(folder.join(format!("{server}.pem"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(folder.join(format!("{server}.key"))).unwrap();
        Attacker { shows: Some((chain.map(Result::unwrap).collect(), key)), pem: Default::default() }
    }

    /// Of its own making: `edit`ed, signed by the authority of the folder, or by itself.
    fn with(names: &[&str], folder: Option<&Path>, edit: impl FnOnce(&mut CertificateParams)) -> Attacker {
        let key = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        edit(&mut params);
        let certificate = match folder {
            None => params.self_signed(&key).unwrap(),
            Some(folder) => {
                let ca_key = KeyPair::from_pem(&std::fs::read_to_string(folder.join("ca.key")).unwrap()).unwrap();
                let mut ca = CertificateParams::default();
                ca.distinguished_name = Default::default();
                ca.distinguished_name.push(DnType::CommonName, "Dovetail CA");
                params.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap()
            }
        };
        let shown = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let pem = (certificate.pem(), key.serialize_pem());
        Attacker { shows: Some((vec![certificate.der().clone()], shown)), pem }
    }

    fn connect(&self, socket: TcpStream) -> Foreign {
        let builder = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustsAll));
        let config = match &self.shows {
            Some((chain, key)) => builder.with_client_auth_cert(chain.clone(), key.clone_key()).unwrap(),
            None => builder.with_no_client_auth(),
        };
        let tls = ClientConnection::new(Arc::new(config), ServerName::try_from("b").unwrap()).unwrap();
        Foreign { wire: Wire::tls(StreamOwned::new(tls, socket)) }
    }
}

struct Foreign {
    wire: Wire,
}

impl Foreign {
    /// Whether it is heard or not.
    fn try_greet(&mut self, server: &str) {
        let hello = Hello { server: server.into(), instance: b"x".to_vec(), epoch: 5, ..Default::default() };
        self.wire.try_send(Kind::Hello(hello));
    }
}

/// B with peers whom the test plays, both of which connect to it.
fn b_with_two_peers(house: &House, folder: &Path) -> Server {
    let peers = [("a", "127.0.0.1:9".into()), ("a2", "127.0.0.1:9".into())];
    house.server_with("b", &peers, |config| with_tls(config, folder))
}

#[test]
fn who_cannot_prove_to_be_a_peer_is_turned_away_and_a_good_peer_goes_on() {
    lines();
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "a2", "b", "x"]);
    let foreign = authority_of(&house, "other-ca", &["a"]);
    let b = b_with_two_peers(&house, &folder);
    let mut good = Attacker::of(&folder, "a").connect(b.connect_raw()).wire;
    good.greet("a");

    let mut count = 0;
    let mut refused = |attacker: Attacker, greets_as: &str, reason: &str| {
        let mut connection = attacker.connect(b.connect_raw());
        connection.try_greet(greets_as);
        assert!(connection.wire.is_closed());
        until_logged(&format!("turned away: {reason}"));
        count += 1;
        until("it is counted", || b.noted("turned_away") == count);
    };
    refused(Attacker::of(&foreign, "a"), "a", "its certificate was not issued by dovetail_ca.");
    refused(Attacker::with(&["a"], None, |_| {}), "a", "its certificate was not issued by dovetail_ca.");
    refused(
        Attacker::with(&["a"], Some(&folder), |params| params.not_after = date_time_ymd(2020, 1, 1)),
        "a",
        "its certificate has expired.",
    );
    refused(
        Attacker::with(&["a"], Some(&folder), |params| params.not_before = date_time_ymd(2200, 1, 1)),
        "a",
        "its certificate is not valid yet",
    );
    refused(
        Attacker::with(&["*"], Some(&folder), |params| {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::CodeSigning];
        }),
        "a",
        "its certificate is not trusted: ",
    );
    refused(Attacker::of(&folder, "x"), "x", "its certificate is of 'x', which is not in dovetail_peers here.");
    refused(Attacker::with(&["*.test"], Some(&folder), |_| {}), "a", "its certificate is of '', which is not in");
    refused(Attacker::of(&folder, "a2"), "a", "it calls itself 'a', and its certificate is of 'a2', not of 'a'.");
    refused(Attacker { shows: None, pem: Default::default() }, "a", "it has shown no certificate.");

    // Nor who does not speak TLS 1.3 at all.
    let mut without = b.connect();
    without.say_hello("a");
    assert_eq!(without.rest()[0], 0x15, "an alert");
    until_logged("turned away: it does not speak TLS.");
    let mut old = b.connect();
    old.send_bytes(&client_hello_of_tls_1_2());
    assert_eq!(old.rest(), [0x15, 3, 3, 0, 2, 2, 70], "the fatal alert protocol_version");
    until_logged("turned away: it does not speak TLS 1.3.");

    good.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    good.next_ack(1);
}

/// RFC 5246, 7.4.1.2; without the extension that names versions there is no TLS 1.3.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2f, 1, 0]);
    // Signature algorithms.
    hello.extend([0, 8, 0, 13, 0, 4, 0, 2, 4, 3]);
    let mut message = vec![1, 0, 0, hello.len() as u8];
    message.extend(hello);
    let mut record = vec![0x16, 3, 1, 0, message.len() as u8];
    record.extend(message);
    record
}

#[test]
fn a_peer_that_says_what_it_must_not_is_cut_off_and_a_good_peer_goes_on() {
    lines();
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "a2", "b"]);
    let b = b_with_two_peers(&house, &folder);
    let mut good = Attacker::of(&folder, "a").connect(b.connect_raw()).wire;
    good.greet("a");
    let bad = Attacker::of(&folder, "a2");

    let mut malformed = 0;
    let mut cut_off = |says: &dyn Fn(&mut Wire), reason: &str| {
        let mut connection = bad.connect(b.connect_raw()).wire;
        connection.greet("a2");
        says(&mut connection);
        assert!(connection.is_closed());
        until(reason, || b.peer("a2").last_error.contains(reason));
        malformed += 1;
        assert_eq!(b.status().counters.unwrap().malformed, malformed, "{reason}");
    };
    cut_off(&|wire| wire.send_change_of("a", "jane", 1), "it sent change 1 of server 'a'");
    cut_off(&|wire| wire.send_change_of("b", "jane", 1), "it sent change 1 of server 'b'");
    cut_off(&|wire| wire.send_bytes(&[1, 1, 0, 1]), "the frame is 65537 bytes long");
    cut_off(&|wire| wire.send_bytes(&[2]), "the frame is of version 2");
    cut_off(&|wire| wire.send_bytes(&[1, 0, 0, 1, 0xff]), "the frame cannot be decoded");
    cut_off(&|wire| wire.say_hello("a2"), "it greeted twice");

    cut_off(
        &|wire| wire.send_change_of("a2", &"u".repeat(60_000), 1),
        "it sent a change of a user whose name has 60000 bytes",
    );
    let origin = "o".repeat(60_000);
    cut_off(
        &|wire| wire.send(Kind::Known(Known { origin: origin.clone(), epoch: 1, seqs: vec![1], user: "jane".into() })),
        "it has changes of a server that has no name",
    );
    // It asks and asks, and takes no answer.
    cut_off(
        &|wire| {
            let request = |id| Kind::BodyRequest(BodyRequest { id, user: "jane".into(), ..Default::default() });
            let requests = |at: u64| (at * 1_000..).take(1_000).map(request);
            let bytes = |at| requests(at).flat_map(|kind| frame::encode(&kind.into()).unwrap()).collect::<Vec<u8>>();
            (0..).take_while(|at| wire.try_send_bytes(&bytes(*at))).count();
        },
        "it asks for more and more and does not read the answers",
    );

    // Who ends in mid-frame is not counted among them.
    let mut truncated = bad.connect(b.connect_raw()).wire;
    truncated.greet("a2");
    truncated.send_bytes(&[1, 0, 0, 50, 1, 2]);
    drop(truncated);
    until("it is noticed", || b.peer("a2").last_error == "the connection was closed inside a frame");

    good.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    good.next_ack(1);
}

#[test]
fn a_crowd_that_says_nothing_is_cut_off_and_keeps_out_no_peer() {
    lines();
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let b = b_with_two_peers(&house, &folder);
    let mut crowd: Vec<TcpStream> = (0..90).map(|_| b.connect_raw()).collect();
    until_logged("turned away: more than 64 have not said which peer they are.");
    // They are slow, too: the begin of a ClientHello.
    crowd.iter_mut().for_each(|socket| drop(socket.write_all(&[0x16, 3, 1])));

    let mut good = Attacker::of(&folder, "a").connect(b.connect_raw()).wire;
    good.greet("a");
    good.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    good.next_ack(1);
    until_logged("turned away: it did not say who it is within 5 secs.");
    until("all of them are", || b.noted("turned_away") == 90);
    assert_eq!(b.peer("a").state, "connected");
}

#[test]
fn who_connects_again_and_again_is_turned_away_at_once_for_a_while() {
    lines();
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let b = b_with_two_peers(&house, &folder);
    let mut good = Attacker::of(&folder, "a").connect(b.connect_raw()).wire;
    good.greet("a");
    (0..1_000).for_each(|_| drop(b.connect_raw()));
    until_logged("A connection was turned away: there are too many from 127.0.0.1 in a short time.");
    until("all of them are", || b.noted("turned_away") == 1_000);

    good.send_change("jane", 1);
    let (worker, apply) = b.next_job();
    worker.applied(&apply);
    good.next_ack(1);
    // Not for long.
    drop(good);
    let attacker = Attacker::of(&folder, "a");
    until("a peer can connect again", || {
        let mut again = attacker.connect(b.connect_raw());
        again.try_greet("a");
        again.wire.is_greeted()
    });
}

/// What somebody on the wire does to the next record.
#[derive(Clone, Copy, PartialEq)]
enum Trick {
    SendTwice,
    /// The next but one comes first.
    Swap,
    /// One of its bits is another.
    Change,
}

/// On the way from who connects to the listener to B, for each connection: does what is wanted, once.
fn on_the_wire(listener: TcpListener, to: String, trick: Arc<Mutex<Option<Trick>>>) {
    fn record(from: &mut TcpStream) -> Option<Vec<u8>> {
        let mut record = vec![0; 5];
        from.read_exact(&mut record).ok()?;
        let length = usize::from(record[3]) << 8 | usize::from(record[4]);
        record.resize(5 + length, 0);
        from.read_exact(&mut record[5..]).ok()?;
        Some(record)
    }
    std::thread::spawn(move || {
        while let Ok((mut from, _)) = listener.accept() {
            let Ok(mut to) = TcpStream::connect(&to) else { return };
            let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(std::net::Shutdown::Both);
            });
            let trick = trick.clone();
            std::thread::spawn(move || {
                while let Some(mut bytes) = record(&mut from) {
                    match trick.lock().unwrap().take() {
                        None => {}
                        Some(Trick::SendTwice) => bytes.extend(bytes.clone()),
                        Some(Trick::Swap) => match record(&mut from) {
                            Some(mut next) => {
                                next.extend(bytes);
                                bytes = next;
                            }
                            None => break,
                        },
                        Some(Trick::Change) => bytes[7] ^= 1,
                    }
                    if to.write_all(&bytes).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
        }
    });
}

#[test]
fn records_of_tls_that_are_replayed_reordered_or_changed_end_the_connection_and_nothing_is_lost_or_done_twice() {
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "b"]);
    let b = house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| with_tls(config, &folder));
    let (listener, trick) = (house.listener(), Arc::new(Mutex::new(None)));
    let at = address(&listener);
    on_the_wire(listener, b.address(), trick.clone());
    let a = house.server_with("a", &[("b", at)], |config| with_tls(config, &folder));
    let mut imap = a.process("imap");
    for (uid, what) in (1..).zip([Trick::SendTwice, Trick::Swap, Trick::Change]) {
        until("they are connected", || a.peer("b").state == "connected" && b.peer("a").state == "connected");
        let before = b.noted("turned_away") + b.status().counters.unwrap().malformed;
        *trick.lock().unwrap() = Some(what);
        imap.save("jane", 2 * uid);
        imap.save("joe", 2 * uid + 1);
        for _ in 0..2 {
            let (worker, apply) = b.next_job();
            assert_eq!(apply.changes.len(), 1);
            worker.applied(&apply);
        }
        until("all are acknowledged", || a.peer("b").pending == 0);
        until("B has noticed", || lines_with("TLS failed: cannot decrypt peer's message") >= uid as usize);
        assert_eq!(
            b.noted("turned_away") + b.status().counters.unwrap().malformed,
            before,
            "it is a peer, and not to blame"
        );
    }
}

#[test]
fn changes_that_a_peer_replays_or_reorders_are_done_once_each() {
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "a2", "b"]);
    let b = b_with_two_peers(&house, &folder);
    let mut peer = Attacker::of(&folder, "a").connect(b.connect_raw()).wire;
    peer.greet("a");
    // Users may overtake each other.
    for (user, seq) in [("jane", 3), ("joe", 1)] {
        peer.send_change(user, seq);
        let (worker, apply) = b.next_job();
        assert_eq!((apply.user.as_str(), apply.changes.len()), (user, 1));
        worker.applied(&apply);
        peer.next_ack(seq);
    }
    // One user's changes come in order: what is behind a later one has been there, by whichever way.
    for (user, seq) in [("jane", 2), ("jane", 3), ("joe", 1), ("joe", 1)] {
        peer.send_change(user, seq);
        peer.next_ack(seq);
    }
    assert!(b.try_next_job(Duration::ZERO).is_none(), "they are acknowledged again and not done again");
}

/// Each byte comes in time, and the frame never.
#[test]
fn a_peer_that_never_ends_a_frame_is_cut_off() {
    let house = House::new();
    let folder = authority_of(&house, "ca", &["a", "a2", "b"]);
    let b = b_with_two_peers(&house, &folder);
    let mut slow = Attacker::of(&folder, "a").connect(b.connect_raw()).wire;
    slow.greet("a");
    slow.send_bytes(&[1, 0, 0xff, 0xff]);
    until("it is cut off", || {
        let _ = slow.try_send_bytes(&[0]);
        b.peer("a").last_error == "it said nothing for 15 secs"
    });
}

#[test]
fn who_is_no_peer_of_ours_gets_no_change_from_us() {
    lines();
    let house = House::new();
    let (folder, foreign) = (authority_of(&house, "ca", &["a"]), authority_of(&house, "other-ca", &["b", "c"]));
    let theirs = house.server_with("b", &[("a", "127.0.0.1:9".into())], |config| with_tls(config, &foreign));
    let a = house.server_with("a", &[("b", theirs.address())], |config| with_tls(config, &folder));
    until("it is refused", || a.peer("b").state == "refused");
    assert_eq!(a.peer("b").last_error, "its certificate was not issued by dovetail_ca");
    until_logged("turned away: it refuses this server or its certificate, and its log says why (TLS alert UnknownCA).");
}
