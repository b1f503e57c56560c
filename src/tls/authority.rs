//! A small private authority, for people who have none: a folder with its certificate and key, and those of the servers.
//!
//! Guarantees that nothing is overwritten, and that nobody but the owner can read a key, also while it is written.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    date_time_ymd, BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;

use super::trust::Trust;
use super::{certificate, check_name, files};
use crate::settings::check_server_name;
use crate::time::{Clocks, Time};

/// Where it is if nobody says otherwise.
pub const FOLDER: &str = "/etc/dovecot/dovetail";
/// The authority's name, which its servers' certificates name as their issuer.
const NAME: &str = "Dovetail CA";
const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const MODE_FOLDER: u32 = 0o700;
/// Writing, by others than the owner.
const MODE_WRITE_OTHERS: u32 = 0o022;
const MODE_KEY: u32 = 0o600;
const MODE_CERT: u32 = 0o644;
const SECS_PER_DAY: u64 = 86_400;
/// How long a certificate is valid.
const DAYS: u64 = 3_650;
/// A server's clock may be behind by this much.
const DAYS_BEFORE: u64 = 1;

/// A certificate in the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub file: PathBuf,
    /// The server's name; the authority's is empty.
    pub name: String,
    /// Seconds since 1970; 0: not known.
    pub not_after: u64,
    /// SHA-256, in hexadecimal digits.
    pub fingerprint: String,
}

/// Makes the authority. What was made.
pub fn init(folder: &Path) -> Result<Vec<Entry>, String> {
    make_folder(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let key = generate()?;
    let certificate = authority().self_signed(&key).map_err(|error| error.to_string())?;
    write_pair(folder, "ca", &key, &certificate.pem())?;
    Ok(vec![entry(folder.join(CA_CERT), certificate.der())])
}

/// Makes certificates for servers of these names. What was made.
pub fn issue(folder: &Path, servers: &[String]) -> Result<Vec<Entry>, String> {
    for server in servers {
        check_server_name(server)
            .and_then(|()| if server == "ca" { Err("it is the authority's") } else { Ok(()) })
            .map_err(|why| format!("'{}': {why}", server.escape_debug()))?;
        check_name(server)?;
    }
    let path = folder.join(CA_KEY);
    let key = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("{}: there is no authority yet: doveadm dovetail cert init", path.display()),
        _ => format!("{}: {error}", path.display()),
    })?;
    // The library's error may show what it could not read.
    let key = KeyPair::from_pem(&key).map_err(|_| format!("{}: it is no private key", path.display()))?;
    let trust = Trust::new(files::roots(&folder.join(CA_CERT))?, Vec::new(), &[], &ring::default_provider());
    let issuer = Issuer::new(authority(), key);
    servers.iter().map(|server| issue_one(folder, server, &issuer, &trust)).collect()
}

fn issue_one(folder: &Path, server: &str, issuer: &Issuer<'_, KeyPair>, trust: &Trust) -> Result<Entry, String> {
    let key = generate()?;
    let mut params = of_server(server)?;
    params.distinguished_name = named(server);
    let certificate = params.signed_by(&key, issuer).map_err(|error| error.to_string())?;
    if let Err(error) = trust.check(server, certificate.der(), &[]) {
        let folder = folder.display();
        return Err(format!(
            "{folder}: its authority was not made by doveadm dovetail cert init, or is too old: {error}"
        ));
    }
    write_pair(folder, server, &key, &certificate.pem())?;
    Ok(entry(folder.join(format!("{server}.pem")), certificate.der()))
}

/// All certificates in the folder, the authority's first.
pub fn show(folder: &Path) -> Result<Vec<Entry>, String> {
    let wrong = |error: io::Error| format!("{}: {error}", folder.display());
    let mut paths = Vec::new();
    for found in std::fs::read_dir(folder).map_err(wrong)? {
        paths.push(found.map_err(wrong)?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "pem"));
    paths.sort_by_key(|path| (path.file_name() != Some(CA_CERT.as_ref()), path.clone()));
    paths.into_iter().map(|path| files::chain(&path).map(|chain| entry(path, &chain[0]))).collect()
}

fn entry(file: PathBuf, certificate: &CertificateDer<'_>) -> Entry {
    Entry {
        file,
        name: certificate::names(certificate).join(","),
        not_after: certificate::not_after(certificate).unwrap_or_default(),
        fingerprint: certificate::hex(&certificate::fingerprint(certificate)),
    }
}

fn generate() -> Result<KeyPair, String> {
    KeyPair::generate().map_err(|error| format!("no key can be made: {error}"))
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_from_now(params)
}

fn of_server(server: &str) -> Result<CertificateParams, String> {
    let mut params = CertificateParams::new(vec![server.to_owned()]).map_err(|error| error.to_string())?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(valid_from_now(params))
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}

fn valid_from_now(mut params: CertificateParams) -> CertificateParams {
    let today = Clocks::default().now_us() / 1_000_000 / SECS_PER_DAY;
    let at_day = |day: u64| date_time_ymd(1970, 1, 1) + Duration::from_secs(day * SECS_PER_DAY);
    params.not_before = at_day(today.saturating_sub(DAYS_BEFORE));
    params.not_after = at_day(today + DAYS);
    params
}

fn make_folder(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(MODE_FOLDER).create(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => check_folder(folder),
        made => made,
    }
}

/// Who can write to it can put another authority in the place of this one.
fn check_folder(folder: &Path) -> io::Result<()> {
    let mode = std::fs::metadata(folder)?.permissions().mode() & 0o7777;
    match mode & MODE_WRITE_OTHERS {
        0 => Ok(()),
        _ => Err(io::Error::other(format!("others than its owner can write to it (mode {mode:04o})"))),
    }
}

/// Both or none.
fn write_pair(folder: &Path, name: &str, key: &KeyPair, certificate: &str) -> Result<(), String> {
    let (of_key, of_certificate) = (folder.join(format!("{name}.key")), folder.join(format!("{name}.pem")));
    if of_certificate.exists() {
        return Err(format!("{}: it is there already, and is not overwritten", of_certificate.display()));
    }
    write_new(&of_key, &key.serialize_pem(), MODE_KEY)?;
    write_new(&of_certificate, certificate, MODE_CERT).inspect_err(|_| drop(std::fs::remove_file(&of_key)))
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), String> {
    let wrong = |error: io::Error| match error.kind() {
        ErrorKind::AlreadyExists => format!("{}: it is there already, and is not overwritten", path.display()),
        _ => format!("{}: {error}", path.display()),
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(wrong)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| {
        let _ = std::fs::remove_file(path);
        wrong(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let folder = std::env::temp_dir().join(format!("dovetail-authority-{}", std::process::id()));
        DirBuilder::new().create(&folder).unwrap();
        let init_with = |mode| {
            std::fs::set_permissions(&folder, PermissionsExt::from_mode(mode)).unwrap();
            init(&folder)
        };
        for mode in [0o770, 0o702, 0o1777] {
            let error = init_with(mode).unwrap_err();
            assert!(error.ends_with(&format!("others than its owner can write to it (mode {mode:04o})")), "{error}");
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        assert_eq!(init_with(0o755).unwrap().len(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
