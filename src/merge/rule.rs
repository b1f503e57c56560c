//! The rules by which conflicts are solved, by the names that people see: in `doveadm dovetail status` (the kinds), and in the
//! event of each conflict. docs/PROTOCOL.md says what each means, and why.

/// By which rule a conflict was solved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    UidTaken,
    LaterFlag,
    FlagMadeAgain,
    LaterName,
    NamedBack,
    NameTaken,
    LaterSubscription,
    MailStays,
    OneName,
    HigherUidValidity,
}

impl Rule {
    pub const ALL: [Rule; 10] = [
        Rule::UidTaken,
        Rule::LaterFlag,
        Rule::FlagMadeAgain,
        Rule::LaterName,
        Rule::NamedBack,
        Rule::NameTaken,
        Rule::LaterSubscription,
        Rule::MailStays,
        Rule::OneName,
        Rule::HigherUidValidity,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Rule::UidTaken => "uid_taken",
            Rule::LaterFlag => "later_flag",
            Rule::FlagMadeAgain => "flag_made_again",
            Rule::LaterName => "later_name",
            Rule::NamedBack => "named_back",
            Rule::NameTaken => "name_taken",
            Rule::LaterSubscription => "later_subscription",
            Rule::MailStays => "mail_stays",
            Rule::OneName => "one_name",
            Rule::HigherUidValidity => "higher_uidvalidity",
        }
    }

    /// What the servers disagreed about.
    pub fn kind(self) -> &'static str {
        match self {
            Rule::UidTaken => "uid",
            Rule::LaterFlag | Rule::FlagMadeAgain => "flags",
            Rule::LaterName | Rule::NamedBack | Rule::NameTaken => "rename",
            Rule::LaterSubscription => "subscription",
            Rule::MailStays => "delete",
            Rule::OneName => "mailbox",
            Rule::HigherUidValidity => "uidvalidity",
        }
    }

    pub fn named(name: &str) -> Option<Rule> {
        Rule::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_found_by_its_name() {
        Rule::ALL.into_iter().for_each(|rule| assert_eq!(Rule::named(rule.name()), Some(rule)));
        assert_eq!(Rule::named("no_rule"), None);
    }
}
