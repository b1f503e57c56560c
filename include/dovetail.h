/* What the C shim and Rust say to each other. Generated from src/host by cbindgen: `make header`. */

#ifndef DOVETAIL_H
#define DOVETAIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 What is said of a save that was committed.
 */
#define DT_ACK_OK 0

/*
 It is to be taken back, and has failed then.
 */
#define DT_ACK_FAIL -1

/*
 Bytes of `dt_span.tail`.
 */
#define DT_SPAN_TAIL_SIZE 64

/*
 Messages were added.
 */
#define DT_SPAN_APPENDS 1

/*
 Flags or keywords were changed.
 */
#define DT_SPAN_FLAGS 2

/*
 Messages went or are asked to, and dt_spans_tell_expunge() was not told before.
 */
#define DT_SPAN_EXPUNGES 4

#define DT_MAILBOX_CREATE 0

#define DT_MAILBOX_DELETE 1

#define DT_MAILBOX_RENAME 2

#define DT_MAILBOX_SUBSCRIBE 3

#define DT_MAILBOX_UNSUBSCRIBE 4

/*
 Bytes that the mailbox's index keeps for us.
 */
#define DT_MARK_SIZE 200

/*
 A mailbox, as the relay knows it.

 Strings everywhere here are NUL-terminated and valid for the duration of the call only.
 */
struct dt_mailbox {
  /*
   Its owner.
   */
  const char *user;
  /*
   All zero: not known.
   */
  uint8_t guid[16];
  /*
   Below the owner's inbox namespace.
   */
  const char *name;
  /*
   Between the parts of `name`.
   */
  char separator;
  /*
   By what the storage separates, if that cannot be in a name; otherwise 0.
   */
  char storage_separator;
  /*
   0: not known, like the next two.
   */
  uint32_t uid_validity;
  uint32_t uid_next;
  uint64_t highest_modseq;
};

/*
 A message that is being saved or copied.
 */
struct dt_save {
  /*
   NULL: known only after the commit.
   */
  const char *guid;
  uint32_t flags;
  /*
   NULL-terminated.
   */
  const char *const *keywords;
  /*
   Seconds since 1970, like `save_date`. 0: not known.
   */
  int64_t received_date;
  int64_t save_date;
  /*
   0 without a body: not known.
   */
  uint64_t size;
  /*
   NULL: not sent along.
   */
  const uint8_t *body;
  /*
   NULL: not a copy.
   */
  const struct dt_mailbox *copied_from;
  uint32_t copied_from_uid;
};

/*
 A saved message got its UID.
 */
struct dt_saved {
  uint32_t uid;
  /*
   NULL: as told in dt_save.
   */
  const char *guid;
};

/*
 What a commit wrote to the transaction log of a mailbox's index.
 */
struct dt_span {
  /*
   The mailbox's owner.
   */
  const char *user;
  /*
   All zero if it could not be found out.
   */
  uint8_t mailbox_guid[16];
  /*
   Whose private (.pvt) index was written; NULL for the mailbox's main index.
   */
  const char *private_user;
  /*
   mail_index_header.indexid
   */
  uint32_t index_id;
  /*
   Written: bytes begin..end-1 of the log file log_seq.
   */
  uint32_t log_seq;
  uint64_t begin;
  uint64_t end;
  /*
   Where the file before this one ended, if this is the first span of its file that this process reports for the
   open mailbox; otherwise (and if there is no file before) 0.
   */
  uint32_t prev_log_seq;
  uint64_t prev_log_end;
  /*
   DT_SPAN_APPENDS and so on: what it did to messages.
   */
  uint32_t touched;
  /*
   Messages that it added.
   */
  uint32_t appends;
  /*
   The last bytes of the log before `end`.
   */
  uint8_t tail[DT_SPAN_TAIL_SIZE];
  uintptr_t tail_size;
  /*
   If not all zero, nothing was written: the mailbox had this GUID before, until the log was as long as `end`.
   */
  uint8_t old_mailbox_guid[16];
  /*
   The `struct mailbox`; NULL if the span could only be reported after the mailbox was gone.
   */
  void *mailbox;
};

/*
 GUID of a message in an open mailbox, valid until the next call. Empty if the message is gone; NULL if nothing is known of it.
 */
typedef const char *(*DtGuidOf)(const uint8_t *mailbox_guid, uint32_t uid);

/*
 What a client did to messages, perhaps at UIDs that they do not have any more.
 */
struct dt_stale {
  uint32_t first_uid;
  uint32_t last_uid;
  /*
   Where it stands in the index's log.
   */
  uint32_t log_seq;
  uint64_t log_offset;
  /*
   It could not be found out which message it is: it may be on its way.
   */
  bool unnamed;
  /*
   Otherwise flags and keywords were changed.
   */
  bool expunge;
  uint32_t add;
  uint32_t remove;
  /*
   NULL-terminated.
   */
  const char *const *add_keywords;
  const char *const *remove_keywords;
};

/*
 Does it to the message where it is now, see follow.h.
 */
typedef const char *(*DtFollow)(const uint8_t *mailbox_guid, const struct dt_stale *stale);

/*
 A message was moved from a UID to another, by the commit at that place of the log.
 */
typedef void (*DtMove)(uint32_t from,
                       uint32_t to,
                       uint32_t log_seq,
                       uint64_t log_offset,
                       void *context);

/*
 A row of `doveadm dovetail status`.
 */
struct dt_status_row {
  const char *peer;
  const char *state;
  const char *last_error;
  uint64_t pending;
  uint64_t behind_secs;
  uint64_t dropped;
  /*
   Changes that this server's mail processes could not tell the relay, since it was started.
   */
  uint64_t process_dropped;
  /*
   Of this server, in each row.
   */
  uint64_t unacknowledged;
  /*
   What needs a comparison or a person, of all peers and of this server.
   */
  uint64_t failed;
  /*
   Changes of two servers that did not go together, by kind, of all peers, since the relay was started.
   */
  const char *conflicts;
};

/*
 A row of `doveadm dovetail failed`.
 */
struct dt_failed_row {
  /*
   Whose change; empty: a mailbox of this server.
   */
  const char *peer;
  const char *user;
  /*
   In hexadecimal digits.
   */
  const char *mailbox_guid;
  const char *error;
  /*
   0: no change but a mailbox.
   */
  uint64_t seq;
  /*
   Since when, in seconds since 1970.
   */
  uint64_t since;
};

/*
 A row of `doveadm dovetail waiting`.
 */
struct dt_waiting_row {
  const char *user;
  /*
   To or from whom; empty: it is this server's own business.
   */
  const char *peer;
  const char *what;
  const char *reason;
  /*
   Seconds since 1970.
   */
  uint64_t since;
  /*
   The same; 0: now.
   */
  uint64_t next_try;
};

/*
 A row of `doveadm dovetail compare`.
 */
struct dt_difference_row {
  const char *user;
  const char *peer;
  const char *mailbox;
  const char *what;
  const char *detail;
  uint32_t uid;
};

/*
 What `doveadm dovetail progress` prints.
 */
struct dt_progress {
  bool is_running;
  uint64_t users;
  uint64_t users_done;
  uint64_t mails;
  uint64_t mails_done;
  uint64_t secs;
  uint64_t mails_per_sec;
  uint64_t secs_left;
  /*
   Of the pass over all users; none: there is none.
   */
  uint64_t background_users;
  uint64_t background_users_done;
  uint64_t background_secs_left;
};

/*
 A row of `doveadm dovetail cert`.
 */
struct dt_cert_row {
  /*
   The server's; the authority's is empty.
   */
  const char *name;
  /*
   SHA-256, in hexadecimal digits.
   */
  const char *fingerprint;
  const char *file;
  /*
   Seconds since 1970; 0: not known.
   */
  uint64_t not_after;
};

/*
 Called with each setting.
 */
typedef void (*dt_setting_each)(void *context, const char *name, const char *value);

/*
 State of the open mailbox as of the last sync.
 */
struct dt_mailbox_status {
  uint8_t guid[16];
  uint32_t uid_validity;
  uint32_t uid_next;
  uint32_t messages;
  uint64_t highest_modseq;
};

/*
 What to set of a mailbox; zero leaves it as it is.
 */
struct dt_mailbox_update {
  uint8_t guid[16];
  uint32_t uid_validity;
  uint32_t min_uid_next;
  uint64_t min_highest_modseq;
};

/*
 A message that the worker saves or copies.
 */
struct dt_worker_save {
  const char *guid;
  /*
   0: the next one.
   */
  uint32_t uid;
  uint32_t flags;
  /*
   NULL-terminated.
   */
  const char *const *keywords;
  /*
   Seconds since 1970, like `save_date`. There 0: now.
   */
  int64_t received_date;
  int64_t save_date;
};

/*
 What to change of messages.
 */
struct dt_worker_flags {
  uint32_t add;
  uint32_t remove;
  /*
   NULL-terminated, like `remove_keywords`.
   */
  const char *const *add_keywords;
  const char *const *remove_keywords;
};

/*
 A mailbox in the list, or (without a GUID) a name that is subscribed to.
 */
struct dt_listed {
  const char *vname;
  uint8_t guid[16];
  uint32_t uid_validity;
  /*
   Since the time that was asked for.
   */
  bool subscription_changed;
};

/*
 What a message is, as far as the index's log does not tell.
 */
struct dt_message_info {
  const char *guid;
  /*
   As mail_generate_guid_128_hash() makes it.
   */
  uint8_t guid_128[16];
  /*
   Seconds since 1970, like `save_date`. There 0: not known.
   */
  int64_t received_date;
  int64_t save_date;
  uint64_t size;
  /*
   See stray.h.
   */
  bool is_stray;
};

/*
 A user of this process. But for his peers, the settings of the first one decide for the process.
 */
void dt_rs_capture_init(void *user, const char *username, const char *process);

void dt_rs_capture_deinit(void);

uint64_t dt_rs_inline_body_size(void);

void *dt_rs_transaction_begin(const struct dt_mailbox *mailbox);

void dt_rs_save(void *txn, const struct dt_save *save);

void dt_rs_flags(void *txn, uint32_t uid, const char *guid, uint32_t add, uint32_t remove);

void dt_rs_keywords(void *txn,
                    uint32_t uid,
                    const char *guid,
                    const char *const *old,
                    const char *const *new_);

void dt_rs_expunge(void *txn, uint32_t uid, const char *guid);

/*
 Called inside of a commit: only notes. dt_rs_flush() is to be called soon; true: so much waits that it is to be called now.
 wants_ack: dt_rs_await_ack() will be called.
 */
bool dt_rs_commit(void *txn,
                  const struct dt_mailbox *mailbox,
                  const struct dt_saved *saved,
                  uintptr_t saved_count,
                  bool wants_ack);

/*
 The same, for a mailbox whose index is in memory only because its disk is full. UIDNEXT as the session has it, or 0.
 */
bool dt_rs_commit_in_memory(void *txn,
                            uint32_t uid_next);

/*
 Notes it, as dt_rs_commit() does.
 */
bool dt_rs_rollback(void *txn);

void dt_rs_mailbox_op(int op,
                      const struct dt_mailbox *mailbox,
                      const char *new_name,
                      bool directory);

/*
 The user's list of mailboxes is about to be changed.
 */
void dt_rs_intend(const struct dt_mailbox *mailbox);

/*
 Notes it, as dt_rs_commit() does.
 */
bool dt_rs_span(const struct dt_span *span);

/*
 Asks for the GUIDs of messages whose flags were changed, before it is told. They are not looked up while the client
 waits: dbox may have to open a file for each.
 */
void dt_rs_name(DtGuidOf guid_of);

/*
 Calls `follow` with what clients did to messages that were there before; see follow.h.
 */
void dt_rs_follow(DtFollow follow);

/*
 Calls `each` with the moves that the index's log, and the one before it, tell of: from which UID to which.
 */
void dt_rs_moves(const char *path,
                 DtMove each,
                 void *context);

/*
 Whether clients' answers wait for more than the commit.
 */
bool dt_rs_acks(void);

/*
 Sends what was noted, and waits until the save that was committed last is as safe as dovetail_ack wants, or the time is over.
 `user` and `mailbox`: for the log. `can_fail`: it can be taken back.
 */
int dt_rs_await_ack(const char *user,
                    const char *mailbox,
                    bool can_fail);

/*
 The client has its answer: what could wait until then is sent.
 */
void dt_rs_flush(void);

/*
 `user`: NULL: of all users.

 # Safety
 `user` is NUL-terminated or null.
 */
int dt_rs_status(const char *user,
                 void (*row)(void*, const struct dt_status_row*),
                 void *context,
                 char *error,
                 uintptr_t error_size);

int dt_rs_failed(void (*row)(void*, const struct dt_failed_row*),
                 void *context,
                 char *error,
                 uintptr_t error_size);

int dt_rs_waiting(void (*row)(void*, const struct dt_waiting_row*),
                  void *context,
                  char *error,
                  uintptr_t error_size);

/*
 `user`: NULL: all users. `bodies`: every mail is read.

 # Safety
 `user` is NUL-terminated or null.
 */
int dt_rs_compare(const char *user,
                  bool repair,
                  bool bodies,
                  void (*row)(void*, const struct dt_difference_row*),
                  void *context,
                  char *error,
                  uintptr_t error_size);

/*
 # Safety
 `progress` can be written to.
 */
int dt_rs_progress(struct dt_progress *progress, char *error, uintptr_t error_size);

/*
 Waits until all peers have applied what was done here until now. `user`: NULL: by all users. `secs`: for how long at most; NULL: as usual.
 0: they have. 1: somebody lacks something, and the error says who and what. -1: it could not be asked. -2: `secs` is no number.

 # Safety
 The strings are NUL-terminated or null.
 */
int dt_rs_wait(const char *user,
               const char *secs,
               char *error,
               uintptr_t error_size);

/*
 Forgets a peer that is gone for good; `changes`: how many it had not acknowledged.

 # Safety
 `peer` is NUL-terminated, `changes` can be written to.
 */
int dt_rs_peer_remove(const char *peer, uint64_t *changes, char *error, uintptr_t error_size);

/*
 Lets a peer in again of which there were two.

 # Safety
 `peer` is NUL-terminated.
 */
int dt_rs_peer_accept(const char *peer, char *error, uintptr_t error_size);

/*
 `user`: NULL: of all users.

 # Safety
 `user` is NUL-terminated or null, `cleared` can be written to.
 */
int dt_rs_failed_clear(const char *user, uint64_t *cleared, char *error, uintptr_t error_size);

/*
 Makes an authority. `folder`: NULL: that of dovetail_ca, or the usual one. Each certificate that was made is a row.

 # Safety
 `folder` is NUL-terminated or null.
 */
int dt_rs_cert_init(const char *folder,
                    void (*row)(void*, const struct dt_cert_row*),
                    void *context,
                    char *error,
                    uintptr_t error_size);

/*
 The same for certificates of servers; `names` ends with NULL.

 # Safety
 As of `dt_rs_cert_init`; `names` are NUL-terminated.
 */
int dt_rs_cert_issue(const char *folder,
                     const char *const *names,
                     void (*row)(void*, const struct dt_cert_row*),
                     void *context,
                     char *error,
                     uintptr_t error_size);

/*
 Each certificate in the folder is a row.

 # Safety
 As of `dt_rs_cert_init`.
 */
int dt_rs_cert_show(const char *folder,
                    void (*row)(void*, const struct dt_cert_row*),
                    void *context,
                    char *error,
                    uintptr_t error_size);

/*
 A service begins: its main thread is woken for what other threads say.
 */
void dt_rs_service_init(void);

/*
 The service ends.
 */
void dt_rs_service_deinit(void);

/*
 Another thread has something for the main thread.
 */
void dt_rs_service_wakeup(void);

/*
 Loaded by mail_plugins.
 */
void dovetail_plugin_init(void *module);

/*
 The process ends.
 */
void dovetail_plugin_deinit(void);

/*
 Loaded by doveadm.
 */
void doveadm_dovetail_plugin_init(void *_module);

/*
 Nothing is to be undone: doveadm frees its commands itself.
 */
void doveadm_dovetail_plugin_deinit(void);

/*
 Reads the settings and makes the journal's folder, while the process may. `uid` and `gid` are those that it will have,
 or -1; it will have so many connections at the same time. 0 if ok; otherwise it was logged what is wrong.
 */
int dt_rs_relay_configure(uid_t uid,
                          gid_t gid,
                          unsigned int client_limit);

/*
 Starts the engine. The master listens for it on `listener_count` sockets from `first_listener` on. 0 if ok; otherwise the
 reason was logged.
 */
int dt_rs_relay_start(int first_listener,
                      int listener_count);

/*
 A connection to `listener` begins; the fd is ours. `is_peer`: it did not come over a Unix socket.
 */
void dt_rs_relay_accept(int fd, int listener, bool is_peer);

/*
 The process ends: says goodbye to whom it can.
 */
void dt_rs_relay_stop(void);

/*
 Reads the settings, while the process may. 0 if ok; otherwise it was logged what is wrong.
 */
int dt_rs_worker_configure(void);

/*
 Whether it is the relay that has connected: root, or the owner of its journal's folder. Whatever the mode of our socket is, nobody else may
 have mail read and changed. What is wrong is logged once.
 */
bool dt_rs_worker_is_relay(int fd);

/*
 A connection from the relay begins; there is none so far.
 */
void dt_rs_worker_connected(int fd);

/*
 There is input from the relay, or its end.
 */
void dt_rs_worker_input(void);

/*
 The process ends.
 */
void dt_rs_worker_disconnect(void);

/*
 One of our commits has written something.

 # Safety
 The span is valid during the call.
 */
void dt_rs_worker_span(const struct dt_span *span);

#endif  /* DOVETAIL_H */
