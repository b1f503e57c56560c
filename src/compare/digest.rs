//! Digests of messages: equal on two servers if, and but for chance only if, the messages are.

use ring::digest::{Context, SHA256};

use super::{BodyHash, Message};

/// FNV-1a, 64 bits. Against chance, not against who wants two mails to look alike: he could do so with a GUID as well.
const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// Of the messages of a range or a mailbox, in order of their UIDs.
#[derive(Clone, Debug)]
pub struct Digest {
    value: u64,
    messages: u32,
}

impl Default for Digest {
    fn default() -> Digest {
        Digest { value: BASIS, messages: 0 }
    }
}

impl Digest {
    pub fn add(&mut self, message: &Message) {
        self.messages += 1;
        self.bytes(&message.uid.to_be_bytes());
        self.bytes(message.guid.as_bytes());
        self.bytes(&message.flags.to_be_bytes());
        for keyword in sorted_keywords(&message.keywords) {
            // No keyword has a NUL.
            self.bytes(&[0]);
            self.bytes(keyword.as_bytes());
        }
        self.bytes(&[0, 0]);
        if let Some(body) = &message.body {
            self.bytes(body);
        }
    }

    pub fn value(&self) -> u64 {
        self.value
    }

    pub fn messages(&self) -> u32 {
        self.messages
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.value = (self.value ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
    }
}

/// A message's contents, header and body, as they come: any number of CRs before an LF are one, as formats keep them or not, and
/// convert them when they save.
pub struct Contents {
    hash: Context,
    /// That may belong to an LF.
    crs: u64,
}

impl Default for Contents {
    fn default() -> Contents {
        Contents { hash: Context::new(&SHA256), crs: 0 }
    }
}

impl Contents {
    pub fn push(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| matches!(byte, b'\r' | b'\n')) {
            let (text, end) = match part.split_last() {
                Some((end @ (b'\r' | b'\n'), text)) => (text, Some(end)),
                _ => (part, None),
            };
            if !text.is_empty() {
                self.push_crs();
                self.hash.update(text);
            }
            match end {
                Some(b'\r') => self.crs += 1,
                Some(_) => {
                    self.crs = 0;
                    self.hash.update(b"\r\n");
                }
                None => {}
            }
        }
    }

    /// Those that belong to no LF.
    fn push_crs(&mut self) {
        for _ in 0..std::mem::take(&mut self.crs) {
            self.hash.update(b"\r");
        }
    }

    pub fn finish(mut self) -> BodyHash {
        self.push_crs();
        let mut hash = BodyHash::default();
        hash.copy_from_slice(self.hash.finish().as_ref());
        hash
    }
}

/// They have no case and no order.
pub fn sorted_keywords(keywords: &[String]) -> Vec<String> {
    let mut keywords: Vec<String> = keywords.iter().map(|keyword| keyword.to_ascii_lowercase()).collect();
    keywords.sort();
    keywords.dedup();
    keywords
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(messages: &[Message]) -> u64 {
        let mut digest = Digest::default();
        messages.iter().for_each(|message| digest.add(message));
        digest.value()
    }

    fn message(uid: u32, guid: &str, flags: u32, keywords: &[&str]) -> Message {
        let keywords = keywords.iter().map(|k| (*k).to_owned()).collect();
        Message { uid, guid: guid.into(), flags, keywords, body: None }
    }

    /// Two versions of Dovetail must agree.
    #[test]
    fn it_is_what_it_has_always_been() {
        assert_eq!(digest(&[]), BASIS);
        assert_eq!(digest(&[message(1, "a", 8, &["$Label", "work"])]), 0x6a4a_f9b5_d8b5_ad52);
    }

    #[test]
    fn each_part_of_a_message_counts_and_the_case_and_order_of_keywords_do_not() {
        let one = message(1, "a", 8, &["x", "y"]);
        let others = [
            message(2, "a", 8, &["x", "y"]),
            message(1, "b", 8, &["x", "y"]),
            message(1, "a", 0, &["x", "y"]),
            message(1, "a", 8, &["x"]),
            message(1, "a", 8, &["xy"]),
            Message { body: Some([1; 32]), ..message(1, "a", 8, &["x", "y"]) },
        ];
        for other in others {
            assert_ne!(digest(std::slice::from_ref(&one)), digest(std::slice::from_ref(&other)), "{other:?}");
        }
        assert_eq!(digest(&[one]), digest(&[message(1, "a", 8, &["Y", "X"])]));
    }

    fn contents(pieces: &[&[u8]]) -> BodyHash {
        let mut contents = Contents::default();
        pieces.iter().for_each(|piece| contents.push(piece));
        contents.finish()
    }

    #[test]
    fn contents_are_the_same_with_either_end_of_lines_in_whatever_pieces() {
        let mail = b"Subject: a\r\n\r\nx\ry\r\n\r\r\n.\r";
        let as_dbox = b"Subject: a\n\nx\ry\n\r\n.\r";
        let plain: Vec<u8> = b"Subject: a\r\n\r\nx\ry\r\n\r\n.\r".to_vec();
        let expected = ring::digest::digest(&SHA256, &plain);
        assert_eq!(contents(&[mail]), expected.as_ref());
        for text in [&mail[..], as_dbox] {
            for at in 0..text.len() {
                assert_eq!(contents(&[&text[..at], &text[at..]]), expected.as_ref(), "{at}");
            }
            assert_eq!(contents(&text.chunks(1).collect::<Vec<_>>()), expected.as_ref());
        }
    }

    #[test]
    fn contents_differ_in_each_byte() {
        let all: [&[u8]; 6] = [b"", b"a", b"b", b"a\n", b"a\r", b"a\n\n"];
        let hashes: std::collections::BTreeSet<BodyHash> = all.iter().map(|text| contents(&[text])).collect();
        assert_eq!(hashes.len(), all.len());
    }
}
