#ifndef DT_FULL_H
#define DT_FULL_H

struct mailbox;
struct mail_keywords;
struct mail_index_transaction;
struct module;

/* What Dovecot does when a disk is full, and replication cannot live with. For mailboxes of users that use the plugin `module`, or
   for all if it is NULL, in a worker: there an index is never kept in memory, as what is in it is acknowledged to a peer. */
void dt_full_init(struct module *module);
void dt_full_deinit(struct module *module);

/* Dovecot went on with the mailbox's index in memory. What is done there ends with the session, but for what is in maildir's files.
   Not of mailboxes that never have another one. */
bool dt_full_is_in_memory(struct mailbox *box);

/* Maildir's sync is about to expunge messages though there are files that its list of UIDs does not know: they may be those messages'.
   Or it has just forgotten its list (maildir_uidlist_sync_finish()), and with it skipped what clients have asked it to expunge, which
   would count as done. Says so in the log, and has the files read by the next sync. */
bool dt_full_would_lose(struct mail_index_transaction *t, struct mailbox *box, bool expunges);

/* Maildir renames a mail's file first, and then writes which keywords the letters in its name stand for: if there is no room for that,
   the letters stand for others or for none, and so do the keywords. Writes it before. 0, or -1 with the mailbox's error. */
int dt_full_keep_keywords(struct mailbox *box, const struct mail_keywords *keywords);

#endif
