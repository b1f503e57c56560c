//! Digests of messages: equal on two servers if, and but for chance only if, the messages are.

use super::Message;

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
        Message { uid, guid: guid.into(), flags, keywords: keywords.iter().map(|k| (*k).to_owned()).collect() }
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
        ];
        for other in others {
            assert_ne!(digest(std::slice::from_ref(&one)), digest(std::slice::from_ref(&other)), "{other:?}");
        }
        assert_eq!(digest(&[one]), digest(&[message(1, "a", 8, &["Y", "X"])]));
    }
}
