/* Two servers may have given a message two UIDs; then the worker moves it to a third one. A client that has not been told
   yet changes or expunges it at the old one, and Dovecot says OK and does nothing. The index's log says where it went: each
   move of ours is written there. */
#include "compat.h"
#include "array.h"
#include "guid.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-transaction-log-private.h"
#include "last_error.h"
#include "mark.h"
#include "spans.h"
#include "follow.h"

struct follow_move {
	uint32_t from, to;
	uint32_t log_seq;
	uint64_t log_offset;
};
ARRAY_DEFINE_TYPE(follow_move, struct follow_move);

static struct {
	guid_128_t guid;
	bool known;
	/* The mailbox with this GUID as it is now; the client's own handle may be behind. NULL: no message was moved there. */
	struct mailbox *box;
	ARRAY_TYPE(follow_move) moves;
	bool writing;
} f;

static void follow_move_add(uint32_t from, uint32_t to, uint32_t log_seq, uint64_t log_offset, void *context)
{
	ARRAY_TYPE(follow_move) *moves = context;
	struct follow_move *move = array_append_space(moves);

	move->from = from;
	move->to = to;
	move->log_seq = log_seq;
	move->log_offset = log_offset;
}

static bool follow_has_moves(struct mailbox *box)
{
	struct mail_index_view *view;
	bool diverged;

	if (mail_index_refresh(box->index) < 0)
		return FALSE;
	view = mail_index_view_open(box->index);
	diverged = dt_mark_view_has_diverged(view);
	mail_index_view_close(&view);
	if (!diverged)
		return FALSE;
	i_array_init(&f.moves, 8);
	dt_rs_moves(box->index->log->filepath, follow_move_add, &f.moves);
	return array_count(&f.moves) > 0;
}

static bool follow_open(const unsigned char mailbox_guid[16])
{
	struct mailbox *box;

	if (f.known && memcmp(f.guid, mailbox_guid, sizeof(f.guid)) == 0)
		return f.box != NULL;
	dt_follow_end();
	memcpy(f.guid, mailbox_guid, sizeof(f.guid));
	f.known = TRUE;
	box = dt_spans_find_open(mailbox_guid);
	if (box == NULL || !follow_has_moves(box))
		return FALSE;
	dt_error_keep(box->storage);
	f.box = mailbox_alloc(box->list, box->vname, MAILBOX_FLAG_IGNORE_ACLS);
	if (mailbox_open(f.box) < 0 || mailbox_sync(f.box, 0) < 0)
		mailbox_free(&f.box);
	dt_error_give_back(box->storage);
	return f.box != NULL;
}

void dt_follow_end(void)
{
	if (f.box != NULL) {
		struct mail_storage *storage = f.box->storage;

		dt_error_keep(storage);
		mailbox_free(&f.box);
		dt_error_give_back(storage);
	}
	if (array_is_created(&f.moves))
		array_free(&f.moves);
	f.known = FALSE;
}

bool dt_follow_is_writing(void)
{
	return f.writing;
}

static bool follow_exists(uint32_t uid)
{
	uint32_t seq;

	return mail_index_lookup_seq(f.box->view, uid, &seq);
}

/* Where the message is now that was moved there; 0: nowhere. */
static uint32_t follow_to(uint32_t to)
{
	const struct follow_move *move;

	/* In the order in which they happened: UIDs only rise. */
	array_foreach(&f.moves, move) {
		if (move->from == to)
			to = move->to;
	}
	return follow_exists(to) ? to : 0;
}

/* What was done before the copy was made is in the copy, or the worker does it again: it may have been undone since. */
static bool follow_is_before(const struct dt_stale *stale, const struct follow_move *move)
{
	return stale->log_seq < move->log_seq ||
		(stale->log_seq == move->log_seq && stale->log_offset < move->log_offset);
}

static void follow_update(struct mail *mail, const struct dt_stale *stale)
{
	struct mail_keywords *keywords;

	if (stale->add != 0)
		mail_update_flags(mail, MODIFY_ADD, stale->add);
	if (stale->remove != 0)
		mail_update_flags(mail, MODIFY_REMOVE, stale->remove);
	if (stale->add_keywords[0] != NULL) {
		keywords = mailbox_keywords_create_valid(f.box, stale->add_keywords);
		mail_update_keywords(mail, MODIFY_ADD, keywords);
		mailbox_keywords_unref(&keywords);
	}
	if (stale->remove_keywords[0] != NULL) {
		keywords = mailbox_keywords_create_valid(f.box, stale->remove_keywords);
		mail_update_keywords(mail, MODIFY_REMOVE, keywords);
		mailbox_keywords_unref(&keywords);
	}
}

static const char *follow_do(uint32_t uid, const struct dt_stale *stale)
{
	struct mailbox_transaction_context *trans;
	struct mail *mail;
	const char *guid = NULL;

	dt_error_keep(f.box->storage);
	f.writing = TRUE;
	trans = mailbox_transaction_begin(f.box, MAILBOX_TRANSACTION_FLAG_NO_NOTIFY, "dovetail");
	mail = mail_alloc(trans, 0, NULL);
	if (mail_set_uid(mail, uid)) {
		if (mail_get_special(mail, MAIL_FETCH_GUID, &guid) == 0)
			guid = t_strdup(guid);
		else
			guid = NULL;
		if (stale->expunge) {
			dt_spans_tell_expunge(f.box, uid);
			mail_expunge(mail);
		} else {
			follow_update(mail, stale);
		}
	}
	mail_free(&mail);
	if (mailbox_transaction_commit(&trans) < 0 || mailbox_sync(f.box, 0) < 0) {
		e_error(f.box->event, "dovetail: Changing a message that was given another UID (%u) failed: %s",
			uid, mailbox_get_last_internal_error(f.box, NULL));
	}
	f.writing = FALSE;
	dt_error_give_back(f.box->storage);
	return guid;
}

const char *dt_follow(const unsigned char mailbox_guid[16], const struct dt_stale *stale)
{
	const struct follow_move *move;
	const char *guid = NULL;
	uint32_t to;

	if (!follow_open(mailbox_guid))
		return NULL;
	array_foreach(&f.moves, move) {
		if (move->from < stale->first_uid || move->from > stale->last_uid || follow_is_before(stale, move))
			continue;
		/* maildir has no file for the UID any more before the index knows that it is expunged. */
		if ((stale->unnamed || !follow_exists(move->from)) && (to = follow_to(move->to)) != 0)
			guid = follow_do(to, stale);
	}
	return guid;
}
