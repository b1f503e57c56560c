//! What a certificate says: whose it is, until when, and its fingerprint.

use ring::digest;
use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

use super::trust::{Fingerprint, TrustError};

/// Names of one certificate that are looked at.
const NAMES_MAX: usize = 64;

/// Names of hosts in it. A wildcard is the name of nobody: it would stand for servers that do not exist yet.
pub fn read_names(certificate: &CertificateDer<'_>) -> Result<Vec<String>, TrustError> {
    let certificate =
        EndEntityCert::try_from(certificate).map_err(|error| TrustError::Unreadable(error.to_string()))?;
    let names = certificate.valid_dns_names().filter(|name| !name.contains('*')).take(NAMES_MAX);
    Ok(names.map(str::to_owned).collect())
}

/// The same; none of one that cannot be read.
pub fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    read_names(certificate).unwrap_or_default()
}

/// Whether it has the server's name.
pub fn is_of(certificate: &CertificateDer<'_>, server: &str) -> bool {
    has(&names(certificate), server)
}

pub fn has(names: &[String], server: &str) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case(server))
}

pub fn fingerprint(certificate: &[u8]) -> Fingerprint {
    let mut fingerprint = Fingerprint::default();
    fingerprint.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
    fingerprint
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since 1970 until which it is valid (RFC 5280, 4.1); none if it cannot be read.
pub fn not_after(certificate: &[u8]) -> Option<u64> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (_, certificate, _) = element(certificate)?;
    let (_, mut rest, _) = element(certificate)?;
    if rest.first() == Some(&VERSION) {
        rest = element(rest)?.2;
    }
    // Serial number, algorithm, issuer.
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (tag, validity, _) = element(rest)?;
    let (_, _, after) = element(validity)?;
    let (kind, time, _) = element(after)?;
    (tag == SEQUENCE).then(|| seconds(kind, time))?
}

/// The first element of DER: its tag, what is in it, what is behind it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first & 0x80 != 0 {
        let (bytes, behind) = rest.split_at_checked(usize::from(first & 0x7f))?;
        if bytes.len() > 4 {
            return None;
        }
        length = bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        rest = behind;
    }
    let (inside, behind) = rest.split_at_checked(length)?;
    Some((tag, inside, behind))
}

/// Of a UTCTime or GeneralizedTime: YYMMDDHHMMSSZ or YYYYMMDDHHMMSSZ.
fn seconds(kind: u8, time: &[u8]) -> Option<u64> {
    const UTC_TIME: u8 = 0x17;
    let text = std::str::from_utf8(time).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = text.split_at_checked(if kind == UTC_TIME { 2 } else { 4 })?;
    let year: i64 = match (kind, year.parse().ok()?) {
        (UTC_TIME, year @ 0..=49) => 2000 + year,
        (UTC_TIME, year) => 1900 + year,
        (_, year) => year,
    };
    let parts: Vec<i64> = (0..rest.len()).step_by(2).filter_map(|at| rest.get(at..at + 2)?.parse().ok()).collect();
    let [month, day, hour, minute, second] = parts[..] else { return None };
    // Days since 1970 of the Gregorian calendar, whose years begin in March here.
    let (shifted, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    u64::try_from(days * 86_400 + hour * 3_600 + minute * 60 + second).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{date_time_ymd, CertificateParams, KeyPair};

    fn of_day(year: i32, month: u8, day: u8) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["a".to_owned(), "*.test".to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, month, day);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_says_until_when_it_is_valid() {
        for (year, month, day, seconds) in [
            (1970, 1, 1, 0),
            (2000, 2, 29, 951_782_400),
            (2049, 12, 31, 2_524_521_600),
            (2050, 1, 1, 2_524_608_000),
            (2100, 3, 1, 4_107_542_400),
        ] {
            assert_eq!(not_after(&of_day(year, month, day)), Some(seconds), "{year}-{month}-{day}");
        }
    }

    #[test]
    fn a_wildcard_is_nobodys_name() {
        let certificate = of_day(2049, 1, 1);
        assert_eq!(names(&certificate), ["a"]);
        assert!(is_of(&certificate, "A") && !is_of(&certificate, "b.test"));
    }

    #[test]
    fn whatever_is_no_certificate_says_nothing() {
        let whole = of_day(2049, 1, 1);
        for end in 0..whole.len() {
            let _ = not_after(&whole[..end]);
        }
        for at in 0..whole.len().min(200) {
            let mut bytes = whole.to_vec();
            bytes[at] = 0xff;
            let _ = not_after(&bytes);
        }
        assert_eq!(not_after(b""), None);
        assert!(names(&CertificateDer::from(b"no certificate".to_vec())).is_empty());
    }
}
