/* What the worker needs of Dovecot's storage: one user and one mailbox open at a time. The logic is in src/worker, the
   unsafe half in src/host/worker.rs.

   Functions that return int: 1 or 0 as described, -1 on error; then dt_worker_error() says why. All strings are UTF-8
   without control characters and mailbox names are virtual names, prefix included. */
#ifndef DOVETAIL_WORKER_H
#define DOVETAIL_WORKER_H

#include "dovetail.h"

struct mail;
struct mailbox;
struct mailbox_transaction_context;
struct mail_namespace;
struct mail_storage_service_ctx;

enum dt_existence {
	DT_EXISTENCE_NONE = 0,
	/* \NoSelect: exists for its children only. */
	DT_EXISTENCE_DIRECTORY,
	DT_EXISTENCE_MAILBOX,
};

/* -- Called by service.c */

/* Which plugins a worker may load. 0 if ok, -1 and a full sentence otherwise. */
int dt_worker_init(struct mail_storage_service_ctx *storage_service,
		   const char **error_r);
void dt_worker_deinit(void);
/* FALSE if there is a connection already. */
bool dt_worker_connection_init(int fd);

/* -- For look.c */

/* What other processes do to the list of mailboxes is seen from now on. */
void dt_worker_refresh(void);
/* 1 = it is there, 0 = it isn't (any more) */
int dt_worker_box_guid(struct mailbox *box, unsigned char guid_r[16]);
/* Both return -1. */
int dt_worker_set_error(const char *fmt, ...) ATTR_FORMAT(1, 2);
int dt_worker_set_box_error(struct mailbox *box, const char *what);
/* A copy that is valid until the next call. */
const char *dt_worker_keep(const char *text);
struct mail_namespace *dt_worker_namespace(void);
/* The open one. */
struct mailbox *dt_worker_box(void);
/* The one that is being built; begins it. */
struct mailbox_transaction_context *dt_worker_transaction(void);
struct mailbox_transaction_context *dt_worker_read_begin(struct mailbox *box);
/* 1 = found, 0 = not (any more) */
int dt_worker_get_guid(struct mail *mail, uint32_t uid, const char **guid_r);

/* -- Called by Rust */

/* dovetail_worker_plugins, before dt_worker_init(). */
void dt_worker_allow_plugins(const char *plugins);
const char *dt_worker_error(void);
/* Stop watching the connection; the fd itself is Rust's. */
void dt_worker_connection_closed(void);

/* 1 = opened, 0 = no such user. `brief`: locks are waited for only briefly. */
int dt_worker_user_open(const char *username, bool brief);
/* The one that is open. */
struct mail_user *dt_worker_user(void);
/* Closes all that is open of the user and takes root's privileges back. */
void dt_worker_user_close(void);
/* The private namespace with the INBOX. */
const char *dt_worker_namespace_prefix(void);
char dt_worker_namespace_separator(void);
/* By what the storage separates, if that cannot be in a name; otherwise 0. */
char dt_worker_namespace_storage_separator(void);
/* The prefixes of namespaces that are not the user's own. */
void dt_worker_foreign_prefixes(void (*each)(const char *prefix, void *context), void *context);
/* The GUID with which the user's INBOX is born. */
void dt_worker_inbox_guid(unsigned char guid_r[16]);
/* All whom the userdb lists; no user is open. 1 = all listed */
int dt_worker_users(void (*each)(const char *username, void *context), void *context);
/* 1 = one of his mailboxes' logs was written to since then (seconds since 1970), 0 = none was, or he has another name */
int dt_worker_was_written_since(const char *username, int64_t since);
/* A new file without a name in mail_temp_dir; -1 on error. */
int dt_worker_temp_file(void);

int dt_worker_existence(const char *vname, enum dt_existence *existence_r);
/* 1 = found, 0 = there is no such mailbox */
int dt_worker_guid_of(const char *vname, unsigned char guid_r[16]);
/* The mailboxes of all private namespaces, with nothing but their names and GUIDs. 1 = all listed, 0 = one was renamed
   or deleted meanwhile */
int dt_worker_list_guids(void (*each)(const struct dt_listed *listed, void *context), void *context);
/* 1 = created, 0 = exists already */
int dt_worker_create(const char *vname, bool directory,
		     const struct dt_mailbox_update *update);
/* 1 = renamed, 0 = the source doesn't exist or the destination does */
int dt_worker_rename(const char *from, const char *to);
/* 1 = deleted, 0 = doesn't exist */
int dt_worker_delete(const char *vname);
/* The same if it has no messages; 0 also if it has some */
int dt_worker_delete_empty(const char *vname);
/* 1 = done */
int dt_worker_set_subscribed(const char *vname, bool subscribed);

/* Opens and syncs. 1 = open, 0 = doesn't exist */
int dt_worker_open(const char *vname, bool readonly);
void dt_worker_close(void);
/* 1 = done */
int dt_worker_sync(void);
void dt_worker_status(struct dt_mailbox_status *status_r);
/* 1 = done */
int dt_worker_update(const struct dt_mailbox_update *update);
/* 1 = found, its GUID is in *guid_r until the next call, 0 = no such UID (any more) */
int dt_worker_message_guid(uint32_t uid, const char **guid_r);
/* Looks at every message. 1 = found, 0 = not found */
/* Of the messages from this UID on. */
int dt_worker_guids(uint32_t first_uid, void (*each)(uint32_t uid, const char *guid, void *context), void *context);
int dt_worker_find_messages(const char *guid, void (*each)(uint32_t first_uid, uint32_t last_uid, void *context),
			    void *context);
/* 1 = the message was expunged here as far as the transaction log reaches back, 0 = not that we know */
int dt_worker_was_expunged(uint32_t uid, const char *guid);

/* Saving and changing messages is not mixed in one transaction; the first call begins it. */

/* The body is data, or what is in the file if fd != -1 (from its start). 1 = done */
int dt_worker_save(const struct dt_worker_save *save, const void *data, size_t size,
		   int fd);
/* Copies from another (or the same) mailbox of the user if the message there has the GUID: the one with the UID if it
   is the one, otherwise any. 1 = done, 0 = not found there */
int dt_worker_copy(const struct dt_worker_save *save, const char *source_vname,
		   uint32_t source_uid);
/* Saves the open mailbox's own message once more, as it is, at another UID. 1 = done, 0 = it isn't there */
int dt_worker_duplicate(uint32_t uid, uint32_t new_uid);
/* 1 = done, also if there are no such messages */
int dt_worker_update_flags(uint32_t first_uid, uint32_t last_uid,
			   const struct dt_worker_flags *flags);
/* 1 = done, also if there are no such messages */
int dt_worker_expunge(uint32_t first_uid, uint32_t last_uid);
/* 1 = committed. The callback gets the UIDs that the saved messages were given. */
int dt_worker_commit(void (*saved)(uint32_t first_uid, uint32_t last_uid,
				   void *context), void *context);
void dt_worker_rollback(void);

/* look.c */

/* The mailboxes of the namespace with the INBOX. 1 = all listed */
int dt_worker_list(int64_t since, void (*each)(const struct dt_listed *listed, void *context), void *context);
/* The names in all private namespaces that are subscribed to, whether there is a mailbox or not. 1 = all listed */
int dt_worker_list_subscribed(int64_t since, void (*each)(const struct dt_listed *listed, void *context),
			      void *context);
/* How many deletions of the mailbox the mailbox log has, as far as it goes back (a client's stands there twice, see
   capture_log_deletion()). 1 = all of it was read */
int dt_worker_deletions(const unsigned char guid[16], uint32_t *count_r);
/* The open mailbox's transaction log; the one before it has ".2" behind. */
const char *dt_worker_log_path(void);
/* UIDs of all messages in the open mailbox. */
void dt_worker_uids(void (*each)(uint32_t first_uid, uint32_t last_uid, void *context), void *context);
/* 1 = found, its GUID is valid until the next call; 0 = no such message (any more) */
int dt_worker_message_info(uint32_t uid, struct dt_message_info *info_r);
/* Of the open mailbox. */
bool dt_worker_is_maildir(void);
/* Only one such message may be in a transaction. */
bool dt_worker_is_saved_alone(const char *guid);
/* The open mailbox's stray (see stray.h) for this GUID. 1 = found, 0 = there is none */
int dt_worker_stray(const char *guid, uint32_t *uid_r);
/* Whether the file of a message in the open maildir has a name that a worker would give it. */
bool dt_worker_may_be_ours(uint32_t uid, const char *guid);
/* Gives a stray its GUID. */
int dt_worker_adopt(uint32_t uid, const char *guid);
/* Keywords with spaces between them, valid until the next call. 1 = found, 0 = no such message (any more) */
int dt_worker_message_flags(uint32_t uid, uint32_t *flags_r, const char **keywords_r);
/* What the open mailbox's index keeps for us; all zero: nothing. */
void dt_worker_mark_read(unsigned char mark_r[DT_MARK_SIZE]);
/* In the transaction that is being built. */
void dt_worker_mark_write(uint32_t offset, const unsigned char *data, size_t size);

/* Reads the message's body. 1 = opened, 0 = no such message with this GUID */
int dt_worker_body_open(uint32_t uid, const char *guid);
/* >0 = bytes read into the buffer, 0 = all was read */
ssize_t dt_worker_body_read(void *buffer, size_t size);
void dt_worker_body_close(void);

#endif
