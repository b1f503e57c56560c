//! The files that the settings name. Every error names the setting and the file, and shows nothing of what is in it.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor};

/// No certificate is as long.
const BYTES_MAX: u64 = 1 << 20;
/// What others than owner and group may do.
const MODE_OTHERS: u32 = 0o007;

/// Those who issue certificates.
pub fn roots(path: &Path) -> Result<Vec<TrustAnchor<'static>>, String> {
    let wrong = |why: &str| format!("dovetail_ca: {}: {why}", path.display());
    certificates(path, "dovetail_ca")?
        .iter()
        .map(|certificate| match webpki::anchor_from_trusted_cert(certificate) {
            Ok(anchor) => Ok(anchor.to_owned()),
            Err(error) => Err(wrong(&format!("a certificate cannot be read: {error}"))),
        })
        .collect()
}

/// The server's own certificate, then those between it and the authority.
pub fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    certificates(path, "dovetail_cert")
}

pub fn key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let wrong = |why: &str| format!("dovetail_key: {}: {why}", path.display());
    let (bytes, mode) = read(path, "dovetail_key")?;
    if mode & MODE_OTHERS != 0 {
        return Err(wrong(&format!(
            "everybody on this machine may use it (mode {:03o}): chmod 600 it, or make a new one",
            mode & 0o777
        )));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| wrong("there is no private key in PEM format in it"))
}

fn certificates(path: &Path, setting: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let (bytes, _) = read(path, setting)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(format!("{setting}: {}: there is no certificate in PEM format in it", path.display())),
    }
}

/// What is in it, and its mode.
fn read(path: &Path, setting: &str) -> Result<(Vec<u8>, u32), String> {
    let wrong = |why: String| format!("{setting}: {}: {why}", path.display());
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if !metadata.is_file() || metadata.len() > BYTES_MAX {
        return Err(wrong("it is no file, or too long for one with certificates".into()));
    }
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
    Ok((bytes, metadata.mode()))
}
