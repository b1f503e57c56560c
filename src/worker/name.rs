//! A mailbox's path, as servers name it to each other, and its virtual name here.
use super::storage::{Namespace, Result};
use crate::change::MESSAGE_GUID_BYTES_MAX;

/// Parts of a path at most; Dovecot's own limits are on the whole name.
const PARTS_MAX: usize = 64;
/// Bytes of a virtual name at most; Dovecot's MAILBOX_LIST_NAME_MAX_LENGTH.
const NAME_BYTES_MAX: usize = 4096;
/// Before the hexadecimal number of a character that cannot be in a part of a name here.
const ESCAPE: char = '%';
/// Its own number.
const ESCAPE_HEX: &str = "25";

/// The virtual name of the mailbox with this path, e.g. `Archive/2024` for `["Archive", "2024"]`.
pub fn vname(path: &[String], namespace: &Namespace) -> Result<String> {
    if let [inbox] = path {
        if inbox == "INBOX" {
            return Ok("INBOX".into());
        }
    }
    if path.is_empty() || path.len() > PARTS_MAX {
        return Err(format!("malformed mailbox path: {} parts", path.len()));
    }
    let mut vname = namespace.prefix.clone();
    for (i, part) in path.iter().enumerate() {
        // Dovecot allows the other control characters that Unicode knows.
        if part.is_empty() || part.chars().any(|c| c < ' ') {
            return Err("malformed mailbox path: a part is empty or has control characters".into());
        }
        if i > 0 {
            vname.push(namespace.separator);
        }
        escape(part, namespace, &mut vname);
    }
    if vname.len() > NAME_BYTES_MAX {
        return Err(format!("malformed mailbox path: {} bytes", vname.len()));
    }
    if let Some(prefix) = namespace.foreign.iter().find(|prefix| is_below(&vname, prefix, namespace)) {
        return Err(format!(
            "impossible here: its name is one of the namespace '{prefix}', which is not the user's own"
        ));
    }
    Ok(vname)
}

/// Whether Dovecot looks for a mailbox of this name in the namespace with this prefix: mail_namespace_find().
fn is_below(vname: &str, prefix: &str, own: &Namespace) -> bool {
    let name = prefix.strip_suffix(own.separator).unwrap_or(prefix);
    prefix.len() > own.prefix.len() && (vname == name || vname.starts_with(prefix))
}

/// The path of the mailbox with this virtual name, the other way round. None: it is not below the namespace.
pub fn path(vname: &str, namespace: &Namespace) -> Option<Vec<String>> {
    if vname.eq_ignore_ascii_case("INBOX") {
        return Some(vec!["INBOX".into()]);
    }
    let name = vname.strip_prefix(namespace.prefix.as_str())?;
    let mut path: Vec<String> = name.split(namespace.separator).map(|part| unescape(part, namespace)).collect();
    if path[0].eq_ignore_ascii_case("INBOX") {
        path[0] = "INBOX".into();
    }
    Some(path)
}

/// A part as it can stand in a name here: `a%2eb` for `a.b` where the dot separates. What looks so by itself gets a number
/// more, `%252e` for `%2e`: so two parts never get one name, and each name stands for one part.
fn escape(part: &str, namespace: &Namespace, name: &mut String) {
    for (at, c) in part.char_indices() {
        if is_unusable(c, namespace) {
            name.push(ESCAPE);
            name.push_str(&hex(c));
            continue;
        }
        name.push(c);
        if c == ESCAPE && escaped(&part[at + 1..], namespace).is_some() {
            name.push_str(ESCAPE_HEX);
        }
    }
}

fn unescape(part: &str, namespace: &Namespace) -> String {
    let mut whole = String::with_capacity(part.len());
    let mut rest = part;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match escaped(rest, namespace).filter(|_| c == ESCAPE) {
            Some((true, of)) => {
                whole.push(of);
                rest = &rest[hex(of).len()..];
            }
            Some((false, _)) => {
                whole.push(c);
                rest = &rest[ESCAPE_HEX.len()..];
                let next = rest.find(ESCAPE).unwrap_or(rest.len());
                whole.push_str(&rest[..next]);
                rest = &rest[next..];
            }
            None => whole.push(c),
        }
    }
    whole
}

/// What stands behind an escape: the number of this character, at once (true) or behind numbers of the escape itself.
fn escaped(rest: &str, namespace: &Namespace) -> Option<(bool, char)> {
    let number = rest.trim_start_matches(ESCAPE_HEX);
    let mut unusable = [Some(namespace.separator), namespace.storage_separator].into_iter().flatten();
    unusable.find(|c| number.starts_with(&hex(*c))).map(|c| (number.len() == rest.len(), c))
}

fn is_unusable(c: char, namespace: &Namespace) -> bool {
    c == namespace.separator || Some(c) == namespace.storage_separator
}

fn hex(c: char) -> String {
    format!("{:02x}", u32::from(c))
}

/// Checks a message's GUID: maildir makes it the name of a file.
pub fn check_message_guid(guid: &str) -> Result<()> {
    let bad = |c: char| c.is_control() || c == '/' || c == ':';
    if guid.is_empty() || guid.len() > MESSAGE_GUID_BYTES_MAX || guid.starts_with('.') || guid.contains(bad) {
        return Err("malformed change: a message's GUID cannot be one".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: &[&str], prefix: &str, separator: char) -> Result<String> {
        let path: Vec<String> = path.iter().map(|p| p.to_string()).collect();
        vname(&path, &Namespace { prefix: prefix.into(), separator, ..Default::default() })
    }

    #[test]
    fn inbox_has_no_prefix_but_mailboxes_below_it_do() {
        assert_eq!(name(&["INBOX"], "INBOX.", '.').unwrap(), "INBOX");
        assert_eq!(name(&["INBOX", "a"], "INBOX.", '.').unwrap(), "INBOX.INBOX.a");
        assert_eq!(name(&["a", "b"], "INBOX.", '.').unwrap(), "INBOX.a.b");
        assert_eq!(name(&["a", "b"], "", '/').unwrap(), "a/b");
    }

    #[test]
    fn a_virtual_name_has_its_path() {
        let path = |vname: &str, prefix: &str, separator| {
            let namespace = Namespace { prefix: prefix.into(), separator, ..Default::default() };
            path(vname, &namespace).map(|path| path.join(" "))
        };
        assert_eq!(path("a/b c", "", '/').unwrap(), "a b c");
        assert_eq!(path("INBOX.a.b", "INBOX.", '.').unwrap(), "a b");
        assert_eq!(path("inbox", "INBOX.", '.').unwrap(), "INBOX");
        assert_eq!(path("other.a", "INBOX.", '.'), None);
    }

    #[test]
    fn a_part_cannot_become_two() {
        assert_eq!(name(&["a.b", "c/d"], "", '.').unwrap(), "a%2eb.c/d");
    }

    fn maildir() -> Namespace {
        Namespace { separator: '/', storage_separator: Some('.'), ..Default::default() }
    }

    #[test]
    fn no_name_is_one_of_another_users_namespace() {
        let foreign = vec!["user/".to_owned(), "INBOX/public/".to_owned()];
        let in_own = |path: &[&str], prefix: &str, foreign: &[String]| {
            let namespace =
                Namespace { prefix: prefix.into(), separator: '/', foreign: foreign.to_vec(), ..Default::default() };
            let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
            vname(&path, &namespace)
        };
        for path in [&["user", "jane", "INBOX"][..], &["user", "jane"], &["user"]] {
            assert!(in_own(path, "", &foreign).unwrap_err().contains("the namespace 'user/'"), "{path:?}");
            assert!(in_own(path, "INBOX/", &foreign).is_ok(), "{path:?}");
        }
        assert!(in_own(&["public", "news"], "INBOX/", &foreign).is_err());
        assert!(in_own(&["users"], "", &foreign).is_ok() && in_own(&["a", "user", "b"], "", &foreign).is_ok());
        assert!(in_own(&["a"], "INBOX/", &[String::new()]).is_ok());
    }

    #[test]
    fn what_a_storage_cannot_have_in_a_name_is_escaped() {
        for (part, name) in [
            ("a.b/c", "a%2eb%2fc"),
            (".", "%2e"),
            ("100%", "100%"),
            ("%41", "%41"),
            ("%2e", "%252e"),
            ("%252e", "%25252e"),
            ("%25", "%25"),
            ("%2.", "%2%2e"),
            ("%2f.%2E", "%252f%2e%2E"),
        ] {
            assert_eq!(vname(&[part.into()], &maildir()).unwrap(), name);
            assert_eq!(path(name, &maildir()).unwrap(), [part]);
        }
    }

    proptest::proptest! {
        #[test]
        fn each_path_has_a_name_of_its_own(path in proptest::collection::vec("[%./25ef ]{1,8}", 1..4)) {
            let name = vname(&path, &maildir()).unwrap();
            proptest::prop_assert_eq!(super::path(&name, &maildir()).unwrap(), path);
        }

        #[test]
        fn each_name_has_a_path_of_its_own(parts in proptest::collection::vec("[%25ef ]{1,8}", 1..4)) {
            let name = parts.join("/");
            let path = super::path(&name, &maildir()).unwrap();
            proptest::prop_assert_eq!(vname(&path, &maildir()).unwrap(), name);
        }
    }

    #[test]
    fn a_message_guid_cannot_leave_its_folder() {
        assert!(check_message_guid("1795477334.M123P456.mx1,S=12").is_ok());
        assert!(check_message_guid("d30cca35decd046bb179000083ecc375").is_ok());
        for bad in ["", "../../etc/passwd", ".", "a:2,S", "a\nb", &"x".repeat(256)] {
            assert!(check_message_guid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn malformed_paths_are_refused() {
        assert!(name(&[], "", '/').is_err());
        assert!(name(&["a", ""], "", '/').is_err());
        assert!(name(&["a\0b"], "", '/').is_err());
        assert!(name(&["a\r\n"], "", '/').is_err());
        assert!(name(&[&"x".repeat(5000)], "", '/').is_err());
        assert!(name(&["a"; 65], "", '/').is_err());
    }
}
