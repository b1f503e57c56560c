/* Reports the exact range that each commit writes to a mailbox's transaction log: a span. For the plugin in mail
   processes and for the worker. */
#ifndef DOVETAIL_SPANS_H
#define DOVETAIL_SPANS_H

#include "dovetail.h"

struct mailbox;
struct module;

/* `report` is called inside of the commit, often with the mailbox's locks held: it may copy, never call storage code.
   Spans of a mailbox that is just being created are reported as soon as its GUID is known, in order. Mailboxes are
   watched for users that use the plugin `module`, or for all users if it is NULL (then call it after
   mail_storage_service_init()). Call the deinit with the same module. */
void dt_spans_init(struct module *module, void (*report)(const struct dt_span *span));
void dt_spans_deinit(struct module *module);

/* Whether we know how this storage keeps its mailboxes: sdbox, mdbox and maildir of a user. Not virtual mailboxes, which
   only mirror others, nor a mail that is being delivered, which is opened as "raw" storage. */
bool dt_spans_is_watched(struct mailbox *box);
bool dt_spans_is_maildir(struct mailbox *box);

/* The peers are told of this expunge: neither the request nor its execution is DT_SPAN_EXPUNGES. */
void dt_spans_tell_expunge(struct mailbox *box, uint32_t uid);

/* The peers will not be told of any of those that are not executed yet. */
void dt_spans_forget_told(void);

/* An open mailbox with this GUID, or NULL. */
struct mailbox *dt_spans_find_open(const unsigned char guid[16]);

/* The GUID of an open mailbox as the spans carry it; FALSE if it is not known. Needs no I/O. */
bool dt_spans_mailbox_guid(struct mailbox *box, unsigned char guid_r[16]);

#endif
