//! One record of a commit: `struct mail_transaction_header` and what its type says.
//!
//! Guarantees that contents which Dovecot would refuse are refused (`log_view_is_record_valid()`,
//! `mail_index_sync_record()`), with a reason and without an offset: where the record stands is the caller's to tell.
//! Numbers of extensions stay numbers here. [`ExtIntro::ext_id`] tells how a name is found for one.

use super::fields::Fields;

/// `enum mail_transaction_type`.
mod kind {
    pub const EXPUNGE: u32 = 0x0000_0001;
    pub const APPEND: u32 = 0x0000_0002;
    pub const FLAG_UPDATE: u32 = 0x0000_0004;
    pub const HEADER_UPDATE: u32 = 0x0000_0020;
    pub const EXT_INTRO: u32 = 0x0000_0040;
    pub const EXT_RESET: u32 = 0x0000_0080;
    pub const EXT_HDR_UPDATE: u32 = 0x0000_0100;
    pub const EXT_REC_UPDATE: u32 = 0x0000_0200;
    pub const KEYWORD_UPDATE: u32 = 0x0000_0400;
    pub const KEYWORD_RESET: u32 = 0x0000_0800;
    pub const EXT_ATOMIC_INC: u32 = 0x0000_1000;
    pub const EXPUNGE_GUID: u32 = 0x0000_2000;
    pub const MODSEQ_UPDATE: u32 = 0x0000_8000;
    pub const EXT_HDR_UPDATE32: u32 = 0x0001_0000;
    pub const INDEX_DELETED: u32 = 0x0002_0000;
    pub const INDEX_UNDELETED: u32 = 0x0004_0000;
    pub const BOUNDARY: u32 = 0x0008_0000;
    pub const ATTRIBUTE_UPDATE: u32 = 0x0010_0000;
    pub const MASK: u32 = 0x0fff_ffff;
    /// Set along with an expunge, so that a flipped bit expunges nothing.
    pub const EXPUNGE_PROT: u32 = 0x0000_cd90;
    pub const EXTERNAL: u32 = 0x1000_0000;
    pub const SYNC: u32 = 0x2000_0000;
}

/// Where the fields of `struct mail_index_header` begin that [`super::fold`] tells of; four bytes each.
pub(super) const UID_VALIDITY_AT: u32 = 24;
pub(super) const NEXT_UID_AT: u32 = 28;

/// One change to the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it begins, in bytes from the file's begin.
    pub offset: u64,
    /// What was done to the mailbox already; without it, what the next sync is asked to do. See [`super`].
    pub external: bool,
    /// Written by a dsync or by our own applying: no user asked for it here. Expunges lose it when they are carried out.
    pub sync: bool,
    pub what: What,
}

/// What a record says. The lists are never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    Append(Vec<Append>),
    /// As old Dovecots wrote it. Since 2.0 it is [`What::ExpungeGuid`].
    Expunge(Vec<UidRange>),
    ExpungeGuid(Vec<ExpungeGuid>),
    FlagUpdate(Vec<FlagUpdate>),
    KeywordUpdate {
        modify: Modify,
        name: String,
        ranges: Vec<UidRange>,
    },
    /// All keywords are taken away.
    KeywordReset(Vec<UidRange>),
    /// Changes to `struct mail_index_header`. That one came before the changes to messages or after them
    /// ("prepend") is told by nothing but its place in the commit.
    HeaderUpdate(Vec<HeaderUpdate>),
    /// Which extension the `Ext` records behind it speak of.
    ExtIntro(Vec<ExtIntro>),
    ExtReset {
        new_reset_id: u32,
        preserve_data: bool,
    },
    /// Changes to the extension's header, in the form of 16 or of 32 bits.
    ExtHeaderUpdate(Vec<HeaderUpdate>),
    /// Contents are not read: their length depends on the intro.
    ExtRecordUpdate,
    ExtAtomicInc,
    ModseqUpdate(Vec<ModseqUpdate>),
    AttributeUpdate(Vec<Attribute>),
    /// The mailbox is being deleted.
    IndexDeleted,
    /// It stays after all, with everything that was in it.
    IndexUndeleted,
    /// A type that is not known here, without its flags.
    Other(u32),
}

/// `struct mail_index_record`: a message that came, with its first flags, Dovecot's internal ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Append {
    pub uid: u32,
    pub flags: u8,
}

/// From `first` to `last`, both included; UIDs between them need not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    pub first: u32,
    pub last: u32,
}

/// `struct mail_transaction_expunge_guid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpungeGuid {
    pub uid: u32,
    /// The message is expunged only if this is its GUID; 0 if nobody said. Of GUIDs that are not of 128 bits it is a
    /// hash: `mail_generate_guid_128_hash()`.
    pub guid_128: [u8; 16],
}

/// `struct mail_transaction_flag_update`: flags become (flags & !remove) | add.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlagUpdate {
    pub first_uid: u32,
    pub last_uid: u32,
    pub add: u8,
    pub remove: u8,
    /// Not 0: the messages get a new modseq, whether a flag changed or not.
    pub modseq_inc_flag: u8,
}

/// `enum modify_type`. Dovecot never writes `Replace` of a keyword.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modify {
    Add,
    Remove,
    Replace,
}

/// Bytes of a header (of the index or of an extension) that are overwritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderUpdate {
    pub offset: u32,
    pub data: Vec<u8>,
}

/// `struct mail_transaction_ext_intro`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtIntro {
    /// The extension's number in the index, or `None` for one that is named instead. Numbers count the extensions in the
    /// order in which the index got them: first those in `dovecot.index`, then every name of an intro that was not there
    /// yet. In a log that [begins anew](super::Header::begins_anew) that is the order of new names since its begin, with
    /// one trap: `keywords` also takes a number, without an intro, when the mailbox's first keyword is used
    /// (`keywords_ext_register()`).
    pub ext_id: Option<u32>,
    /// Empty if the number says it.
    pub name: String,
    pub reset_id: u32,
    pub hdr_size: u32,
    pub record_size: u16,
    pub record_align: u16,
    pub flags: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModseqUpdate {
    pub uid: u32,
    pub modseq: u64,
}

/// A mailbox attribute (METADATA) that was set or unset. Its value is not in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    pub set: bool,
    pub private: bool,
    pub key: String,
}

/// Whether a record of this type announces a group.
pub(super) fn is_boundary(kind: u32) -> bool {
    kind & kind::MASK == kind::BOUNDARY
}

type Reason = String;
type Parsed<T> = Result<T, Reason>;

impl Record {
    /// The record at `offset` with this type, flags included. On an error: why its contents cannot be right.
    pub(super) fn parse(offset: u64, kind: u32, contents: &[u8]) -> Parsed<Record> {
        if contents.is_empty() {
            return Err("the record is empty".into());
        }
        let what = What::parse(kind & kind::MASK, contents)?;
        Ok(Record { offset, external: kind & kind::EXTERNAL != 0, sync: kind & kind::SYNC != 0, what })
    }
}

impl What {
    fn parse(kind: u32, contents: &[u8]) -> Parsed<What> {
        const EXPUNGE: u32 = kind::EXPUNGE | kind::EXPUNGE_PROT;
        const EXPUNGE_GUID: u32 = kind::EXPUNGE_GUID | kind::EXPUNGE_PROT;
        let fields = Fields::new(contents);
        Ok(match kind {
            EXPUNGE => What::Expunge(uid_ranges(fields)?),
            EXPUNGE_GUID => What::ExpungeGuid(expunge_guids(fields)?),
            _ if kind & (kind::EXPUNGE | kind::EXPUNGE_GUID) != 0 => {
                return Err("the record would expunge, but its protecting bits are missing".into());
            }
            kind::APPEND => What::Append(appends(fields)?),
            kind::FLAG_UPDATE => What::FlagUpdate(flag_updates(fields)?),
            kind::KEYWORD_UPDATE => keyword_update(fields)?,
            kind::KEYWORD_RESET => What::KeywordReset(uid_ranges(fields)?),
            kind::HEADER_UPDATE => What::HeaderUpdate(index_header_updates(fields)?),
            kind::EXT_INTRO => What::ExtIntro(ext_intros(fields)?),
            kind::EXT_RESET => ext_reset(fields)?,
            kind::EXT_HDR_UPDATE => What::ExtHeaderUpdate(header_updates(fields)?),
            kind::EXT_HDR_UPDATE32 => What::ExtHeaderUpdate(header_updates_32(fields)?),
            kind::EXT_REC_UPDATE => What::ExtRecordUpdate,
            kind::EXT_ATOMIC_INC => What::ExtAtomicInc,
            kind::MODSEQ_UPDATE => What::ModseqUpdate(modseq_updates(fields)?),
            kind::ATTRIBUTE_UPDATE => What::AttributeUpdate(attributes(contents)?),
            kind::INDEX_DELETED => What::IndexDeleted,
            kind::INDEX_UNDELETED => What::IndexUndeleted,
            other => What::Other(other),
        })
    }
}

/// Reads items until nothing is left. One that is cut short is an error.
fn all<'a, T>(mut fields: Fields<'a>, item: impl Fn(&mut Fields<'a>) -> Option<T>) -> Parsed<Vec<T>> {
    let mut items = Vec::new();
    while !fields.is_empty() {
        items.push(item(&mut fields).ok_or("the record ends inside one of its items")?);
    }
    Ok(items)
}

/// As `log_view_is_uid_range_valid()` wants them.
fn check_ranges(ranges: impl Iterator<Item = (u32, u32)>) -> Parsed<()> {
    let mut previous = 0;
    let mut any = false;
    for (first, last) in ranges {
        if first == 0 || first > last {
            return Err(format!("{first}:{last} is not a range of UIDs"));
        }
        if first <= previous {
            return Err(format!("the UIDs {first}:{last} stand behind {previous}"));
        }
        (previous, any) = (last, true);
    }
    if any {
        Ok(())
    } else {
        Err("there are no UIDs".into())
    }
}

fn uid_ranges(fields: Fields) -> Parsed<Vec<UidRange>> {
    let ranges = all(fields, |f| Some(UidRange { first: f.u32()?, last: f.u32()? }))?;
    check_ranges(ranges.iter().map(|range| (range.first, range.last)))?;
    Ok(ranges)
}

fn expunge_guids(fields: Fields) -> Parsed<Vec<ExpungeGuid>> {
    let expunges = all(fields, |f| Some(ExpungeGuid { uid: f.u32()?, guid_128: f.array()? }))?;
    if expunges.iter().any(|expunge| expunge.uid == 0) {
        return Err("there is no message with UID 0".into());
    }
    Ok(expunges)
}

fn appends(fields: Fields) -> Parsed<Vec<Append>> {
    let appends = all(fields, |f| {
        let (uid, flags) = (f.u32()?, f.u8()?);
        f.bytes(3)?;
        Some(Append { uid, flags })
    })?;
    if appends.iter().any(|append| append.uid == 0) {
        return Err("a message cannot get UID 0".into());
    }
    Ok(appends)
}

fn flag_updates(fields: Fields) -> Parsed<Vec<FlagUpdate>> {
    let updates = all(fields, |f| {
        let (first_uid, last_uid) = (f.u32()?, f.u32()?);
        let [add, remove, modseq_inc_flag, _] = f.array()?;
        Some(FlagUpdate { first_uid, last_uid, add, remove, modseq_inc_flag })
    })?;
    check_ranges(updates.iter().map(|update| (update.first_uid, update.last_uid)))?;
    Ok(updates)
}

fn keyword_update(mut fields: Fields) -> Parsed<What> {
    let mut head = || {
        let [modify, _] = fields.array()?;
        let length = fields.u16()?;
        let name = fields.bytes(length.into())?;
        fields.align();
        Some((modify, name))
    };
    let (modify, name) = head().ok_or("the record ends inside the keyword's name")?;
    let modify = match modify {
        0 => Modify::Add,
        1 => Modify::Remove,
        2 => Modify::Replace,
        other => return Err(format!("a keyword cannot be changed in way {other}")),
    };
    if name.is_empty() {
        return Err("the keyword has no name".into());
    }
    Ok(What::KeywordUpdate { modify, name: text(name)?, ranges: uid_ranges(fields)? })
}

/// A keyword, an extension or an attribute. Dovecot lets no other names into the index.
fn text(name: &[u8]) -> Parsed<String> {
    let text = std::str::from_utf8(name).map_err(|_| "a name is not UTF-8")?;
    if text.contains('\0') {
        return Err("a name has a NUL in it".into());
    }
    Ok(text.into())
}

fn header_updates(fields: Fields) -> Parsed<Vec<HeaderUpdate>> {
    all(fields, |f| {
        let (offset, size) = (f.u16()?, f.u16()?);
        let data = f.bytes(size.into())?.to_vec();
        f.align();
        Some(HeaderUpdate { offset: offset.into(), data })
    })
}

fn header_updates_32(fields: Fields) -> Parsed<Vec<HeaderUpdate>> {
    all(fields, |f| {
        let (offset, size) = (f.u32()?, f.u32()?);
        let data = f.bytes(usize::try_from(size).ok()?)?.to_vec();
        f.align();
        Some(HeaderUpdate { offset, data })
    })
}

/// Dovecot writes whole fields. What changes a part of one that we tell of is not from it.
fn index_header_updates(fields: Fields) -> Parsed<Vec<HeaderUpdate>> {
    let updates = header_updates(fields)?;
    for update in &updates {
        for (name, at) in [("UIDVALIDITY", UID_VALIDITY_AT), ("next UID", NEXT_UID_AT)] {
            if update.touches(at) && update.field(at).is_none() {
                return Err(format!("a part of the {name} is overwritten"));
            }
        }
    }
    Ok(updates)
}

impl HeaderUpdate {
    fn end(&self) -> u64 {
        u64::from(self.offset) + self.data.len() as u64
    }

    fn touches(&self, at: u32) -> bool {
        u64::from(self.offset) < u64::from(at) + 4 && self.end() > u64::from(at)
    }

    /// The new value of the four bytes at `at`, if all of them are overwritten.
    pub(super) fn field(&self, at: u32) -> Option<u32> {
        let skipped = usize::try_from(at.checked_sub(self.offset)?).ok()?;
        self.data.get(skipped..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
    }
}

/// `sizeof(struct mail_transaction_ext_intro)`: what is shorter at the end is padding to Dovecot.
const EXT_INTRO_BYTES: usize = 20;

fn ext_intros(mut fields: Fields) -> Parsed<Vec<ExtIntro>> {
    let mut intros = Vec::new();
    while fields.rest().len() >= EXT_INTRO_BYTES {
        let (intro, name) = ext_intro(&mut fields).ok_or("the record ends inside an extension's name")?;
        let intro = ExtIntro { name: text(name)?, ..intro };
        if intro.ext_id.is_none() && intro.name.is_empty() {
            return Err("an extension has neither number nor name".into());
        }
        intros.push(intro);
    }
    if intros.is_empty() {
        return Err("no extension is introduced".into());
    }
    Ok(intros)
}

fn ext_intro<'a>(fields: &mut Fields<'a>) -> Option<(ExtIntro, &'a [u8])> {
    let intro = ExtIntro {
        ext_id: Some(fields.u32()?).filter(|id| *id != u32::MAX),
        name: String::new(),
        reset_id: fields.u32()?,
        hdr_size: fields.u32()?,
        record_size: fields.u16()?,
        record_align: fields.u16()?,
        flags: fields.u16()?,
    };
    let length = fields.u16()?;
    let name = fields.bytes(length.into())?;
    fields.align();
    Some((intro, name))
}

/// Old versions have only the new id.
fn ext_reset(mut fields: Fields) -> Parsed<What> {
    let new_reset_id = fields.u32().ok_or("the new reset id is missing")?;
    Ok(What::ExtReset { new_reset_id, preserve_data: fields.u8().unwrap_or(0) != 0 })
}

fn modseq_updates(fields: Fields) -> Parsed<Vec<ModseqUpdate>> {
    all(fields, |f| Some(ModseqUpdate { uid: f.u32()?, modseq: f.u64()? }))
}

/// Keys only: `[+-][ps]<key><NUL>`, as often as there are attributes, then a NUL; times and lengths follow.
fn attributes(contents: &[u8]) -> Parsed<Vec<Attribute>> {
    let mut attributes = Vec::new();
    let mut rest = contents;
    loop {
        let (change, behind) = match rest {
            [0, ..] if !attributes.is_empty() => return Ok(attributes),
            [change @ (b'+' | b'-'), behind @ ..] => (*change, behind),
            _ => return Err("an attribute is neither set nor unset".into()),
        };
        let (side, behind) = match behind {
            [side @ (b'p' | b's'), behind @ ..] => (*side, behind),
            _ => return Err("an attribute is neither private nor shared".into()),
        };
        let length = behind.iter().position(|byte| *byte == 0).ok_or("an attribute's key does not end")?;
        let (key, behind) = behind.split_at(length);
        if key.is_empty() {
            return Err("an attribute has no key".into());
        }
        attributes.push(Attribute { set: change == b'+', private: side == b'p', key: text(key)? });
        rest = &behind[1..];
    }
}
