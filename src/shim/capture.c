/* Watches one mail process: the notify plugin tells what happened (rich, not complete), the index transaction hook in
   spans.c tells what was written (complete, not rich). This file only collects; src/capture decides.

   Runs inside the user's session: nothing here may block, fail the caller's operation or leave an error behind in the
   mailbox. */
#define DT_COMPAT_NAMES
#define DT_COMPAT_NOTIFY
#include "compat.h"
#include "array.h"
#include "guid.h"
#include "hash.h"
#include "hash-method.h"
#include "istream.h"
#include "ostream.h"
#include "ostream-hash.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-storage-private.h"
#include "mail-storage-hooks.h"
#include "mailbox-list-private.h"
#include "mail-index-private.h"
#include "mail-transaction-log-private.h"
#include "ioloop.h"
#include "index-mail.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "dbox-storage.h"
#include "mdbox-storage.h"
#include "master-service.h"
#include "time-util.h"
#include "inbox.h"
#include "mark.h"
#include "follow.h"
#include "full.h"
#include "last_error.h"
#include "service.h"
#include "spans.h"
#include "shim.h"
#include "capture.h"

/* Between two sendings to the relay: changes that follow each other share one. */
#define CAPTURE_FLUSH_MSECS 5

#define CAPTURE_CONTEXT(obj) MODULE_CONTEXT(obj, capture_storage_module)

struct capture_box {
	union mailbox_module_context module_ctx;
	/* GUID of the mail that is being saved: Dovecot has forgotten it when notify calls mail_save() */
	char *save_guid;
	/* and its save date */
	time_t save_date;
	/* Where it is written to; what it writes passes through ours. */
	struct ostream *output;
	/* What passed, unless it is more than the limit. */
	buffer_t *body;
	uoff_t body_size, body_limit;
	bool body_known;
	/* create_box() was asked for a directory only */
	bool directory;
	/* between delete_begin and its end: the expunges of all mails are part of the deletion */
	bool deleting;
	/* dovetail_ack: a save was committed, of which the relay is to say something */
	bool awaits_ack;
	/* In this transaction messages are moved within the mailbox: Dovecot expunges the old ones even if it fails. */
	bool moves_within;
	int (*commit)(struct mailbox_transaction_context *t, struct mail_transaction_commit_changes *changes_r);
};

struct capture_txn {
	struct mailbox *box;
	void *rs;			/* NULL until there is something to tell */
	bool ignored;
};

static MODULE_CONTEXT_DEFINE_INIT(capture_storage_module, &mail_storage_module_register);
static struct notify_context *capture_notify = NULL;
static struct module *capture_module;
static struct timeout *capture_to_flush = NULL;
static struct timeval capture_flushed;
/* A doveadm command returns to the ioloop only at its end. */
static bool capture_answers_clients;
/* Flags may have been changed of mails whose GUID is not known yet. */
static bool capture_unnamed;
/* dovetail_ack is not async. */
static bool capture_acks;
/* The mailbox in which GUIDs are being looked up. */
static struct mailbox *capture_naming_box;
static struct mailbox_transaction_context *capture_naming_trans;
static struct mail *capture_naming_mail;

/* ---- GUIDs of mails whose flags were changed ---- */

/* GUID of an existing mail. sdbox may have to open its file for it. */
static const char *capture_mail_guid(struct mail *mail)
{
	enum mail_lookup_abort old_abort = mail->lookup_abort;
	const char *guid = NULL;
	int ret;

	dt_error_keep(mail->box->storage);
	mail->lookup_abort = MAIL_LOOKUP_ABORT_NEVER;
	ret = mail_get_special(mail, MAIL_FETCH_GUID, &guid);
	mail->lookup_abort = old_abort;
	dt_error_give_back(mail->box->storage);
	return ret < 0 || guid == NULL || *guid == '\0' ? NULL : guid;
}

static void capture_naming_begin(struct mailbox *box)
{
	dt_error_keep(box->storage);
	capture_naming_box = box;
	capture_naming_trans = mailbox_transaction_begin(box, MAILBOX_TRANSACTION_FLAG_NO_NOTIFY |
							 MAILBOX_TRANSACTION_FLAG_NO_CACHE_DEC, "dovetail");
	capture_naming_mail = mail_alloc(capture_naming_trans, 0, NULL);
}

static void capture_naming_end(void)
{
	if (capture_naming_box == NULL)
		return;
	mail_free(&capture_naming_mail);
	/* What had to be read from the mails' files is cached. */
	(void)mailbox_transaction_commit(&capture_naming_trans);
	dt_error_give_back(capture_naming_box->storage);
	capture_naming_box = NULL;
}

static const char *capture_name(const unsigned char mailbox_guid[16], uint32_t uid)
{
	struct mailbox *box = dt_spans_find_open(mailbox_guid);

	if (box != capture_naming_box) {
		capture_naming_end();
		if (box != NULL)
			capture_naming_begin(box);
	}
	if (box == NULL)
		return NULL;
	if (mail_set_uid(capture_naming_mail, uid))
		return capture_mail_guid(capture_naming_mail);
	/* Another one that is open may not have been synced since it came. */
	return uid < mail_index_get_header(box->view)->next_uid ? "" : NULL;
}

/* Must not be called inside of a commit. */
static void capture_name_all(void)
{
	if (!capture_unnamed)
		return;
	capture_unnamed = FALSE;
	T_BEGIN {
		dt_rs_name(capture_name);
		capture_naming_end();
		dt_rs_follow(dt_follow);
		dt_follow_end();
	} T_END;
}

/* ---- sending ---- */

static void capture_flush(void *context ATTR_UNUSED)
{
	timeout_remove(&capture_to_flush);
	capture_flushed = ioloop_timeval;
	capture_name_all();
	dt_rs_flush();
}

/* LMTP answers in the ioloop's next turn, and timeouts come first in each. */
static void capture_flush_next_turn(void *context ATTR_UNUSED)
{
	timeout_remove(&capture_to_flush);
	capture_to_flush = timeout_add_short_to(io_loop_get_root(), 0, capture_flush, (void *)NULL);
}

/* Sends when the client has its answer: each time the relay is woken it works on the client's time. A process killed before
   that is noticed by its intents. */
static void capture_flush_soon(void)
{
	struct ioloop *ioloop = io_loop_get_root();

	if (capture_to_flush != NULL)
		return;
	if (timeval_diff_msecs(&ioloop_timeval, &capture_flushed) >= CAPTURE_FLUSH_MSECS)
		capture_to_flush = timeout_add_short_to(ioloop, 0, capture_flush_next_turn, (void *)NULL);
	else
		capture_to_flush = timeout_add_short_to(ioloop, CAPTURE_FLUSH_MSECS, capture_flush, (void *)NULL);
}

static bool capture_may_wait(bool is_full)
{
	return capture_answers_clients && current_ioloop != NULL && !is_full;
}

static void capture_noted(bool is_full)
{
	if (capture_may_wait(is_full))
		capture_flush_soon();
	else
		capture_flush(NULL);
}

/* ---- names ---- */

static struct mail_namespace *capture_namespace(struct mailbox *box)
{
	return box->list->ns;
}

/* Mailboxes of a user; not public ones (nobody's). */
static bool capture_box_is_ours(struct mailbox *box)
{
	return CAPTURE_CONTEXT(box) != NULL && capture_namespace(box)->type != MAIL_NAMESPACE_TYPE_PUBLIC;
}

static void capture_box_names(struct mailbox *box, const char *vname, struct dt_mailbox *ref_r)
{
	const struct mail_namespace *ns = capture_namespace(box);
	size_t prefix_len = strlen(ns->prefix);

	i_zero(ref_r);
	ref_r->user = ns->owner->username;
	ref_r->separator = mail_namespace_get_sep(capture_namespace(box));
	ref_r->storage_separator = compat_storage_separator(ns);
	if (box->inbox_any && vname == box->vname) {
		/* Another's INBOX may have no name but its namespace's. */
		ref_r->name = "INBOX";
		return;
	}
	/* Below the inbox namespace and in shared ones the prefix is this server's own business; the prefix of another
	   private namespace is part of the name. */
	if (((ns->flags & NAMESPACE_FLAG_INBOX_USER) != 0 || ns->type == MAIL_NAMESPACE_TYPE_SHARED) &&
	    prefix_len > 0 && strncmp(vname, ns->prefix, prefix_len) == 0)
		vname += prefix_len;
	ref_r->name = vname;
}

static void capture_box_ref(struct mailbox *box, struct dt_mailbox *ref_r)
{
	capture_box_names(box, box->vname, ref_r);
	(void)dt_spans_mailbox_guid(box, ref_r->guid);
}

/* Identity and state as they are now, by a second handle: the caller's own is not to be touched (it may be closed, or
   just being created). Leaves the mailbox's last error alone. */
static void capture_box_ref_now(struct mailbox *box, const char *vname, struct dt_mailbox *ref_r)
{
	struct mailbox *box2;
	struct mailbox_metadata metadata;
	struct mailbox_status status;

	capture_box_names(box, vname, ref_r);
	dt_error_keep(box->storage);
	box2 = mailbox_alloc(box->list, vname, MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	if (mailbox_open(box2) == 0) {
		if (mailbox_get_metadata(box2, MAILBOX_METADATA_GUID, &metadata) == 0)
			memcpy(ref_r->guid, metadata.guid, sizeof(ref_r->guid));
		mailbox_get_open_status(box2, STATUS_UIDVALIDITY | STATUS_UIDNEXT, &status);
		/* maildir gives a new mailbox its UIDVALIDITY only when it is first synced. */
		if (status.uidvalidity == 0 && mailbox_sync(box2, 0) == 0)
			mailbox_get_open_status(box2, STATUS_UIDVALIDITY | STATUS_UIDNEXT, &status);
		ref_r->uid_validity = status.uidvalidity;
		ref_r->uid_next = status.uidnext;
	}
	mailbox_free(&box2);
	dt_error_give_back(box->storage);
}

/* ---- transactions ---- */

/* Takes a message back that was saved just now: its sender will try again. By a second handle, as the caller's has not seen it yet. */
static bool capture_take_back(struct mailbox *box, const ARRAY_TYPE(seq_range) *uids)
{
	struct mailbox *box2 = mailbox_alloc(box->list, box->vname, MAILBOX_FLAG_IGNORE_ACLS);
	struct mailbox_transaction_context *trans;
	const struct seq_range *range;
	struct mail *mail;
	uint32_t uid, seq;
	bool is_gone = FALSE;

	dt_error_keep(box->storage);
	if (mailbox_open(box2) == 0 && mailbox_sync(box2, 0) == 0) {
		trans = mailbox_transaction_begin(box2, 0, "dovetail");
		mail = mail_alloc(trans, 0, NULL);
		array_foreach(uids, range) {
			for (uid = range->seq1; uid <= range->seq2; uid++) {
				if (mail_set_uid(mail, uid))
					mail_expunge(mail);
			}
		}
		mail_free(&mail);
		is_gone = mailbox_transaction_commit(&trans) == 0 &&
			mailbox_sync(box2, MAILBOX_SYNC_FLAG_EXPUNGE) == 0;
		array_foreach(uids, range) {
			for (uid = range->seq1; is_gone && uid <= range->seq2; uid++)
				is_gone = !mail_index_lookup_seq(box2->view, uid, &seq);
		}
	}
	mailbox_free(&box2);
	dt_error_give_back(box->storage);
	if (!is_gone)
		i_error("dovetail: Mailbox %s: a mail that is not acknowledged could not be taken back: "
			"its sender is told OK", box->vname);
	return is_gone;
}

/* The outermost of all that commit the transaction, so what it returns is what the caller gets. Everything is unlocked by now
   (transaction_save_commit_post() of each storage), notify has told of it, and `t` is freed. */
static int capture_commit_and_wait(struct mailbox_transaction_context *t,
				   struct mail_transaction_commit_changes *changes_r)
{
	struct mailbox *box = t->box;
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	/* What is called here may commit others, which save nothing. */
	bool outer_awaits_ack = cbox->awaits_ack, moves_within = cbox->moves_within;
	/* After a COPY that failed imap commits what it has read of the source, and then sends the error. Dovecot's index of the
	   mailbox list would replace it by a copy. */
	bool has_error = box->storage->error_string != NULL;
	bool awaits_ack;
	int ret;

	cbox->awaits_ack = cbox->moves_within = FALSE;
	if (has_error)
		dt_error_keep(box->storage);
	ret = cbox->commit(t, changes_r);
	if (has_error && ret < 0)
		dt_error_forget(box->storage);
	else if (has_error)
		dt_error_give_back(box->storage);
	awaits_ack = cbox->awaits_ack;
	cbox->awaits_ack = outer_awaits_ack;
	if (ret < 0 || !awaits_ack)
		return ret;
	capture_flush(NULL);
	if (dt_rs_await_ack(capture_namespace(box)->owner->username, box->vname, !moves_within) == DT_ACK_OK ||
	    !capture_take_back(box, &changes_r->saved_uids))
		return 0;
	mail_storage_set_error(box->storage, MAIL_ERROR_TEMP, "The mail could not be replicated, try again later");
	return -1;
}

static void *capture_transaction_begin(struct mailbox_transaction_context *t)
{
	struct capture_txn *txn = i_new(struct capture_txn, 1);
	struct capture_box *cbox = CAPTURE_CONTEXT(t->box);

	txn->box = t->box;
	txn->ignored = !capture_box_is_ours(t->box) || cbox->deleting;
	if (!txn->ignored) {
		/* saved_uids is empty otherwise */
		t->flags |= MAILBOX_TRANSACTION_FLAG_ASSIGN_UIDS;
		if (capture_acks && cbox->commit == NULL) {
			cbox->commit = t->box->v.transaction_commit;
			t->box->v.transaction_commit = capture_commit_and_wait;
		}
	}
	return txn;
}

static void *capture_txn_rs(struct capture_txn *txn)
{
	struct dt_mailbox ref;

	if (txn->rs == NULL) {
		capture_box_ref(txn->box, &ref);
		txn->rs = dt_rs_transaction_begin(&ref);
	}
	return txn->rs;
}

static void capture_read_body(struct mail *mail, struct dt_save *save)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(mail->box);
	struct istream *input;
	const unsigned char *data;
	unsigned char *body;
	size_t size, pos = 0;
	uoff_t old_offset, mail_size, limit;

	if (cbox->body_known) {
		save->size = cbox->body_size;
		if (cbox->body_size <= cbox->body_limit)
			save->body = cbox->body->data;
		return;
	}
	if (mail_get_physical_size(mail, &mail_size) < 0)
		return;
	save->size = mail_size;
	limit = dt_rs_inline_body_size();
	if (mail_size > limit || mail_get_stream(mail, NULL, NULL, &input) < 0)
		return;
	old_offset = input->v_offset;
	i_stream_seek(input, 0);
	limit = I_MIN(limit, mail_size);
	body = t_malloc_no0(limit + 1);
	while (i_stream_read_more(input, &data, &size) > 0) {
		if (size > limit - pos) {
			/* larger than announced: let it be read from the mailbox */
			pos = SIZE_MAX;
			break;
		}
		memcpy(body + pos, data, size);
		pos += size;
		i_stream_skip(input, size);
	}
	if (pos != SIZE_MAX && input->eof && input->stream_errno == 0) {
		save->body = body;
		save->size = pos;
	}
	i_stream_seek(input, old_offset);
}

static bool capture_is_maildir(struct mailbox *box)
{
	return dt_spans_is_maildir(box);
}

/* System flags that belong to the mailbox's owner: in a shared mailbox some may be the user's own (INDEXPVT). */
static enum mail_flags capture_flags(struct mailbox *box, enum mail_flags flags)
{
	flags &= MAIL_FLAGS_NONRECENT;
	if (box->view_pvt != NULL)
		flags &= ~mailbox_get_private_flags_mask(box);
	return flags;
}

static void capture_saved(struct capture_txn *txn, struct mail *mail, struct mail *copied_from)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(txn->box);
	struct dt_mailbox source;
	struct dt_save save;
	time_t date;

	i_zero(&save);
	save.guid = cbox->save_guid;
	save.flags = capture_flags(txn->box, mail_get_flags(mail));
	save.keywords = mail_get_keywords(mail);
	dt_error_keep(mail->box->storage);
	if (mail_get_received_date(mail, &date) == 0)
		save.received_date = date;
	save.save_date = cbox->save_date;
	if (copied_from != NULL && capture_box_is_ours(copied_from->box) &&
	    capture_namespace(copied_from->box)->owner == capture_namespace(txn->box)->owner) {
		/* The peer copies as well; if it can't, it asks for the body. */
		capture_box_ref(copied_from->box, &source);
		save.copied_from = &source;
		save.copied_from_uid = copied_from->uid;
	} else {
		capture_read_body(mail, &save);
	}
	dt_error_give_back(mail->box->storage);
	/* dbox would have to open the file for each flag that is changed. (maildir keeps it in dovecot-uidlist.) */
	if (save.guid != NULL)
		index_mail_cache_add(INDEX_MAIL(mail), MAIL_CACHE_GUID, save.guid, strlen(save.guid));
	dt_rs_save(capture_txn_rs(txn), &save);
}

static void capture_mail_save(void *_txn, struct mail *mail)
{
	struct capture_txn *txn = _txn;

	if (txn->ignored)
		return;
	T_BEGIN {
		capture_saved(txn, mail, NULL);
	} T_END;
}

static void capture_mail_copy(void *_txn, struct mail *src, struct mail *dst)
{
	struct capture_txn *txn = _txn;

	if (txn->ignored)
		return;
	T_BEGIN {
		capture_saved(txn, dst, src);
	} T_END;
}

static void capture_mail_expunge(void *_txn, struct mail *mail)
{
	struct capture_txn *txn = _txn;

	/* Of what a deletion expunges a look tells, if the mailbox is still there. */
	if (txn->ignored || mail->saving)
		return;
	dt_spans_tell_expunge(txn->box, mail->uid);
	T_BEGIN {
		/* Worth opening the file, which is to go anyway: on the peer no other mail may go instead. */
		dt_rs_expunge(capture_txn_rs(txn), mail->uid, capture_mail_guid(mail));
	} T_END;
}

static void capture_mail_update_flags(void *_txn, struct mail *mail, enum mail_flags old_flags)
{
	struct capture_txn *txn = _txn;
	enum mail_flags new_flags;

	if (txn->ignored || mail->saving)
		return;
	new_flags = capture_flags(txn->box, mail_get_flags(mail));
	old_flags = capture_flags(txn->box, old_flags);
	if (new_flags == old_flags)
		return;
	if (!dt_mark_has_diverged(mail->box)) {
		dt_rs_flags(capture_txn_rs(txn), mail->uid, NULL, new_flags & ~old_flags, old_flags & ~new_flags);
		return;
	}
	/* Where messages get other UIDs, it may be at another one when the client has its answer. */
	T_BEGIN {
		dt_rs_flags(capture_txn_rs(txn), mail->uid, capture_mail_guid(mail), new_flags & ~old_flags,
			    old_flags & ~new_flags);
	} T_END;
}

static void
capture_mail_update_keywords(void *_txn, struct mail *mail, const char *const *old_keywords)
{
	struct capture_txn *txn = _txn;

	if (txn->ignored || mail->saving)
		return;
	T_BEGIN {
		const char *guid = dt_mark_has_diverged(mail->box) ? capture_mail_guid(mail) : NULL;

		dt_rs_keywords(capture_txn_rs(txn), mail->uid, guid, old_keywords, mail_get_keywords(mail));
	} T_END;
}

/* On maildir the GUID is the final file name. It is in memory: the commit has just written it to dovecot-uidlist. */
static const char *capture_maildir_guid(struct mailbox *box, uint32_t uid)
{
	struct maildir_mailbox *mbox = (struct maildir_mailbox *)box;
	enum maildir_uidlist_rec_flag flags;
	const char *guid, *fname;

	guid = maildir_uidlist_lookup_ext(mbox->uidlist, uid, MAILDIR_UIDLIST_REC_EXT_GUID);
	if (guid != NULL && *guid != '\0')
		return guid;
	if (maildir_uidlist_lookup(mbox->uidlist, uid, &flags, &fname) <= 0)
		return NULL;
	return t_strcut(fname, MAILDIR_INFO_SEP);
}

/* UIDs (and GUIDs) that the saves got. */
static bool capture_committed_saves(struct mailbox *box, const struct mail_transaction_commit_changes *changes,
				    void *rs, struct dt_mailbox *ref)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	const struct seq_range *range;
	ARRAY(struct dt_saved) saved;
	struct dt_saved *s;
	bool maildir = capture_is_maildir(box);

	t_array_init(&saved, 8);
	array_foreach(&changes->saved_uids, range) {
		for (uint32_t uid = range->seq1; uid <= range->seq2; uid++) {
			s = array_append_space(&saved);
			s->uid = uid;
			if (maildir)
				s->guid = capture_maildir_guid(box, uid);
			ref->uid_next = I_MAX(ref->uid_next, uid + 1);
		}
	}
	cbox->awaits_ack = capture_acks;
	return dt_rs_commit(rs, ref, array_front(&saved), array_count(&saved), capture_acks);
}

static void capture_committed(struct capture_txn *txn, struct mail_transaction_commit_changes *changes)
{
	struct mailbox *box = txn->box;
	struct dt_mailbox ref;
	bool is_full;

	/* Its names were told when the transaction began. */
	i_zero(&ref);
	(void)dt_spans_mailbox_guid(box, ref.guid);
	ref.uid_validity = changes->uid_validity;
	if (ref.uid_validity == 0 && box->view != NULL)
		ref.uid_validity = mail_index_get_header(box->view)->uid_validity;
	if (box->index->log->head != NULL)
		ref.highest_modseq = box->index->log->head->sync_highest_modseq;
	if (array_count(&changes->saved_uids) == 0)
		is_full = dt_rs_commit(txn->rs, &ref, NULL, 0, FALSE);
	else T_BEGIN {
		is_full = capture_committed_saves(box, changes, txn->rs, &ref);
	} T_END;
	capture_unnamed = TRUE;
	capture_noted(is_full);
}

static void capture_transaction_commit(void *_txn, struct mail_transaction_commit_changes *changes)
{
	struct capture_txn *txn = _txn;
	struct capture_box *cbox = CAPTURE_CONTEXT(txn->box);

	if (txn->rs != NULL && dt_full_is_in_memory(txn->box)) {
		if (array_count(&changes->saved_uids) > 0)
			cbox->awaits_ack = capture_acks;
		capture_noted(dt_rs_commit_in_memory(txn->rs, txn->box->view == NULL ? 0 :
						     mail_index_get_header(txn->box->view)->next_uid));
	} else if (txn->rs != NULL)
		capture_committed(txn, changes);
	i_free(txn);
}

static void capture_transaction_rollback(void *_txn)
{
	struct capture_txn *txn = _txn;

	if (txn->rs != NULL)
		capture_noted(dt_rs_rollback(txn->rs));
	i_free(txn);
}

/* ---- mailboxes ---- */

static void capture_mailbox_create(struct mailbox *box)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	struct dt_mailbox ref;

	if (!capture_box_is_ours(box))
		return;
	T_BEGIN {
		if (cbox->directory)
			capture_box_names(box, box->vname, &ref);
		else
			capture_box_ref_now(box, box->vname, &ref);
		dt_rs_mailbox_op(DT_MAILBOX_CREATE, &ref, NULL, cbox->directory);
	} T_END;
	capture_flush(NULL);
}

static void *capture_mailbox_delete_begin(struct mailbox *box)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	unsigned char *guid;

	if (!capture_box_is_ours(box))
		return NULL;
	guid = i_malloc(GUID_128_SIZE);
	(void)dt_spans_mailbox_guid(box, guid);
	cbox->deleting = TRUE;
	return guid;
}

static void capture_mailbox_delete_commit(void *_txn, struct mailbox *box)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	unsigned char *guid = _txn;
	struct dt_mailbox ref;

	if (guid == NULL)
		return;
	T_BEGIN {
		capture_box_names(box, box->vname, &ref);
		memcpy(ref.guid, guid, sizeof(ref.guid));
		dt_rs_mailbox_op(DT_MAILBOX_DELETE, &ref, NULL, guid_128_is_empty(guid));
	} T_END;
	capture_flush(NULL);
	cbox->deleting = FALSE;
	i_free(guid);
}

static void capture_mailbox_delete_rollback(void *_txn)
{
	unsigned char *guid = _txn;

	/* The box is not known here; delete_box() below resets its mark. */
	i_free(guid);
}

static void capture_mailbox_rename(struct mailbox *src, struct mailbox *dest)
{
	struct dt_mailbox ref, new_ref;

	if (!capture_box_is_ours(src) || !capture_box_is_ours(dest))
		return;
	T_BEGIN {
		capture_box_ref_now(dest, dest->vname, &new_ref);
		capture_box_names(src, src->vname, &ref);
		memcpy(ref.guid, new_ref.guid, sizeof(ref.guid));
		ref.uid_validity = new_ref.uid_validity;
		ref.uid_next = new_ref.uid_next;
		dt_rs_mailbox_op(DT_MAILBOX_RENAME, &ref, new_ref.name, guid_128_is_empty(ref.guid));
	} T_END;
	capture_flush(NULL);
}

static void capture_mailbox_set_subscribed(struct mailbox *box, bool subscribed)
{
	struct dt_mailbox ref;

	/* To another's mailbox it is not the owner's subscription. */
	if (!capture_box_is_ours(box) || capture_namespace(box)->type != MAIL_NAMESPACE_TYPE_PRIVATE)
		return;
	T_BEGIN {
		capture_box_names(box, box->vname, &ref);
		dt_rs_mailbox_op(subscribed ? DT_MAILBOX_SUBSCRIBE : DT_MAILBOX_UNSUBSCRIBE, &ref, NULL, FALSE);
	} T_END;
	capture_flush(NULL);
}

static const struct notify_vfuncs capture_notify_vfuncs = {
	.mail_transaction_begin = capture_transaction_begin,
	.mail_save = capture_mail_save,
	.mail_copy = capture_mail_copy,
	.mail_expunge = capture_mail_expunge,
	.mail_update_flags = capture_mail_update_flags,
	.mail_update_keywords = capture_mail_update_keywords,
	.mail_transaction_commit = capture_transaction_commit,
	.mail_transaction_rollback = capture_transaction_rollback,
	.mailbox_create = capture_mailbox_create,
	.mailbox_delete_begin = capture_mailbox_delete_begin,
	.mailbox_delete_commit = capture_mailbox_delete_commit,
	.mailbox_delete_rollback = capture_mailbox_delete_rollback,
	.mailbox_rename = capture_mailbox_rename,
	.mailbox_set_subscribed = capture_mailbox_set_subscribed,
};

/* ---- our own vfuncs: what notify does not tell ---- */

static void capture_remember_guid(struct capture_box *cbox, const char *guid)
{
	i_free(cbox->save_guid);
	cbox->save_guid = guid == NULL || *guid == '\0' ? NULL : i_strdup(guid);
}

static void capture_body_passes(void *context, const void *data, size_t size)
{
	struct capture_box *cbox = context;

	cbox->body_size += size;
	if (cbox->body_size <= cbox->body_limit)
		buffer_append(cbox->body, data, size);
}

static const struct hash_method capture_body_method = {
	.name = "dovetail",
	.loop = capture_body_passes,
};

/* The body is copied while it is written: reading it back would open the file once more. By now all plugins that change
   what is stored (compression, encryption) have put their streams beneath ours. */
static void capture_body_begin(struct mail_save_context *ctx)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(ctx->transaction->box);

	if (cbox->output != NULL || ctx->data.output == NULL || ctx->data.attach != NULL)
		return;
	if (cbox->body == NULL)
		cbox->body = buffer_create_dynamic(default_pool, 4096);
	buffer_set_used_size(cbox->body, 0);
	cbox->body_size = 0;
	/* Asked once: half a body would pass for a whole one. */
	cbox->body_limit = dt_rs_inline_body_size();
	cbox->output = ctx->data.output;
	ctx->data.output = o_stream_create_hash(cbox->output, &capture_body_method, cbox);
	o_stream_set_name(ctx->data.output, o_stream_get_name(cbox->output));
}

/* The storage gets its own stream back. */
static void capture_body_end(struct mail_save_context *ctx)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(ctx->transaction->box);

	if (cbox->output == NULL)
		return;
	o_stream_ignore_last_errors(ctx->data.output);
	o_stream_unref(&ctx->data.output);
	ctx->data.output = cbox->output;
	cbox->output = NULL;
	cbox->body_known = TRUE;
}

static int capture_save_continue(struct mail_save_context *ctx)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(ctx->transaction->box);

	capture_body_begin(ctx);
	return cbox->module_ctx.super.save_continue(ctx);
}

static int capture_save_finish(struct mail_save_context *ctx)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(ctx->transaction->box);

	capture_body_end(ctx);
	return cbox->module_ctx.super.save_finish(ctx);
}

static void capture_save_cancel(struct mail_save_context *ctx)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(ctx->transaction->box);

	capture_body_end(ctx);
	cbox->module_ctx.super.save_cancel(ctx);
}

/* dbox would make up the same kind of GUID a little later, where nobody can ask for it before the commit. The save date
   would be the file's ctime, which is not known yet and changes with every hard link: given here, it is kept in the
   cache. */
static int capture_save_begin(struct mail_save_context *ctx, struct istream *input)
{
	struct mailbox *box = ctx->transaction->box;
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	guid_128_t guid;

	cbox->body_known = FALSE;
	if (!capture_is_maildir(box)) {
		if (ctx->data.guid == NULL) {
			guid_128_generate(guid);
			mailbox_save_set_guid(ctx, guid_128_to_string(guid));
		}
		capture_remember_guid(cbox, ctx->data.guid);
	}
	if (ctx->data.save_date == (time_t)-1)
		mailbox_save_set_save_date(ctx, ioloop_time);
	cbox->save_date = ctx->data.save_date;
	return cbox->module_ctx.super.save_begin(ctx, input);
}

/* A copy keeps its source's GUID and gets a new save date (index_copy_cache_fields()). If it turns into a save,
   capture_save_begin() has the last word. */
static int capture_copy(struct mail_save_context *ctx, struct mail *mail)
{
	struct mailbox *box = ctx->transaction->box;
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	const char *guid = ctx->data.guid;
	uint32_t save_date;

	cbox->body_known = FALSE;
	if (!capture_is_maildir(box)) {
		dt_error_keep(mail->box->storage);
		if (guid == NULL && mail_get_special(mail, MAIL_FETCH_GUID, &guid) < 0)
			guid = NULL;
		dt_error_give_back(mail->box->storage);
		capture_remember_guid(cbox, guid);
	}
	cbox->save_date = ioloop_time;
	if (ctx->moving && mail->box == box)
		cbox->moves_within = TRUE;
	if (cbox->module_ctx.super.copy(ctx, mail) < 0)
		return -1;
	if (!ctx->copying_via_save && strcmp(box->storage->name, "mdbox") != 0) {
		/* A hard link's ctime belongs to all of them. (mdbox keeps the date in its index.) */
		save_date = cbox->save_date;
		index_mail_cache_add(INDEX_MAIL(ctx->dest_mail), MAIL_CACHE_SAVE_DATE, &save_date, sizeof(save_date));
	}
	return 0;
}

/* Before the list of mailboxes is changed: if we are killed before we can tell, the relay knows where to look. */
static void capture_intend(struct mailbox *box)
{
	struct dt_mailbox ref;

	if (!capture_box_is_ours(box))
		return;
	T_BEGIN {
		capture_box_names(box, box->vname, &ref);
		dt_rs_intend(&ref);
	} T_END;
}

static int capture_create_box(struct mailbox *box, const struct mailbox_update *update, bool directory)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);

	capture_intend(box);
	cbox->directory = directory;
	return cbox->module_ctx.super.create_box(box, update, directory);
}

static int capture_delete_box(struct mailbox *box)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);
	int ret;

	capture_intend(box);
	ret = cbox->module_ctx.super.delete_box(box);

	if (ret < 0)
		cbox->deleting = FALSE;
	return ret;
}

static int capture_rename_box(struct mailbox *src, struct mailbox *dest)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(src);

	capture_intend(src);
	return cbox->module_ctx.super.rename_box(src, dest);
}

static int capture_set_subscribed(struct mailbox *box, bool set)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);

	capture_intend(box);
	return cbox->module_ctx.super.set_subscribed(box, set);
}

/* Dovecot writes into its log of mailboxes that one was deleted when its files are gone. A process that is killed in between
   would leave neither the mailbox nor a word about it; so it is said before, too (index_storage_mailbox_delete_post()). */
static void capture_log_deletion(struct mailbox *box)
{
	guid_128_t guid;

	if (box->deleting && box->marked_deleted && dt_spans_mailbox_guid(box, guid))
		mailbox_list_add_change(box->list, MAILBOX_LOG_RECORD_DELETE_MAILBOX, guid);
}

/* Dovecot makes the storage's indexes anew, for which it opens and closes all of its mailboxes. To sync one meanwhile would end in its
   panic (mdbox_storage_rebuild_init()). */
static bool capture_is_rebuilding(struct mailbox *box)
{
	const struct mdbox_storage *mdbox = MDBOX_STORAGE(box->storage);

	return strcmp(box->storage->name, MDBOX_STORAGE_NAME) == 0 && mdbox->rebuilding_storage;
}

static void capture_close(struct mailbox *box)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);

	/* What is to be named then is in a mailbox that is open elsewhere. */
	if (!capture_is_rebuilding(box))
		capture_name_all();
	capture_log_deletion(box);
	cbox->module_ctx.super.close(box);
}

static void capture_free(struct mailbox *box)
{
	struct capture_box *cbox = CAPTURE_CONTEXT(box);

	i_free(cbox->save_guid);
	buffer_free(&cbox->body);
	cbox->module_ctx.super.free(box);
}

static void capture_mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	struct capture_box *cbox;

	if (!dt_spans_is_watched(box))
		return;
	cbox = p_new(box->pool, struct capture_box, 1);
	cbox->module_ctx.super = *v;
	box->vlast = &cbox->module_ctx.super;
	v->save_begin = capture_save_begin;
	v->save_continue = capture_save_continue;
	v->save_finish = capture_save_finish;
	v->save_cancel = capture_save_cancel;
	v->copy = capture_copy;
	v->create_box = capture_create_box;
	v->delete_box = capture_delete_box;
	v->rename_box = capture_rename_box;
	v->set_subscribed = capture_set_subscribed;
	v->close = capture_close;
	v->free = capture_free;
	MODULE_CONTEXT_SET(box, capture_storage_module, cbox);
}

static void capture_mail_user_created(struct mail_user *user)
{
	if (user->autocreated)
		return;
	dt_rs_capture_init(user, user->username, master_service_get_name(master_service));
	/* doveadm answers nobody who could lose what it saved. */
	capture_acks = capture_answers_clients && dt_rs_acks();
}

/* ---- spans ---- */

static void capture_span(const struct dt_span *_span)
{
	struct dt_span span = *_span;
	bool is_full;

	if (dt_follow_is_writing())
		span.touched = span.appends = 0;
	is_full = dt_rs_span(&span);
	/* Inside of a commit no mail can be named; what the naming itself writes is not to overtake what is being named. */
	if (capture_may_wait(is_full) || capture_naming_box != NULL || dt_follow_is_writing())
		capture_flush_soon();
	else
		dt_rs_flush();
}

static const struct mail_storage_hooks capture_hooks = {
	.mail_user_created = capture_mail_user_created,
	.mailbox_allocated = capture_mailbox_allocated,
};

void dt_capture_init(struct module *module)
{
	/* Dovecot 2.4 loads all of mail_plugins into the worker, whatever its users may use. What the worker does is told by
	   itself. */
	if (dt_service_is_this_process())
		return;
	/* doveadm loads us before notify: a link-time reference would have bound to nothing. */
	capture_notify = compat_notify_register(&capture_notify_vfuncs);
	if (capture_notify == NULL) {
		i_error("dovetail: The notify plugin is not loaded: add it to mail_plugins. "
			"Nothing is replicated from this process.");
		return;
	}
	capture_module = module;
	capture_answers_clients = strcmp(master_service_get_name(master_service), "doveadm") != 0;
	mail_storage_hooks_add(module, &capture_hooks);
	dt_inbox_init(module);
	dt_spans_init(module, capture_span);
	dt_full_init(module);
}

void dt_capture_deinit(void)
{
	if (capture_notify == NULL)
		return;
	dt_full_deinit(capture_module);
	dt_spans_deinit(capture_module);
	dt_inbox_deinit(capture_module);
	compat_notify_unregister(&capture_notify);
	mail_storage_hooks_remove(&capture_hooks);
	timeout_remove(&capture_to_flush);
	dt_rs_capture_deinit();
}
