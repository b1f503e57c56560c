/* What the worker needs to look at a user's mailboxes: which there are, how they came to be so, what a message is. */
#define DT_COMPAT_WORKER
#include "compat.h"
#include "array.h"
#include "str.h"
#include "hash.h"
#include "mailbox-log.h"
#include "mailbox-list-private.h"
#include "mailbox-list-iter.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mail-transaction-log-private.h"
#include "inbox.h"
#include "mark.h"
#include "spans.h"
#include "stray.h"
#include "worker.h"

/* -- The list of mailboxes */

/* Names whose subscription was changed since then, as the mailbox log knows them: by the hash of their name. */
static bool look_subscription_changed(struct mailbox_list *list, const char *vname, int64_t since)
{
	struct mailbox_log *log = mailbox_list_get_changelog(list);
	struct mailbox_log_iter *iter;
	const struct mailbox_log_record *rec;
	guid_128_t name_hash;
	bool changed = FALSE;

	if (log == NULL)
		return FALSE;
	mailbox_name_get_sha128(vname, name_hash);
	iter = mailbox_log_iter_init(log);
	while ((rec = mailbox_log_iter_next(iter)) != NULL) {
		if ((rec->type == MAILBOX_LOG_RECORD_SUBSCRIBE || rec->type == MAILBOX_LOG_RECORD_UNSUBSCRIBE) &&
		    mailbox_log_record_get_timestamp(rec) >= since && guid_128_equals(rec->mailbox_guid, name_hash))
			changed = TRUE;
	}
	(void)mailbox_log_iter_deinit(&iter);
	return changed;
}

static int
look_list_mailbox(struct mail_namespace *ns, const struct mailbox_info *info, int64_t since,
		  void (*each)(const struct dt_listed *listed, void *context), void *context)
{
	struct mailbox_status status;
	struct dt_listed listed;
	struct mailbox *box;
	int ret = 0;

	i_zero(&listed);
	listed.vname = info->vname;
	box = mailbox_alloc(ns->list, info->vname, MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	if (!dt_spans_is_watched(box)) {
		/* not replicated */
	} else if ((ret = dt_worker_box_guid(box, listed.guid)) <= 0) {
		/* It may have been deleted just now. */
	} else if (mailbox_get_status(box, STATUS_UIDVALIDITY, &status) < 0) {
		ret = 0;
		if (mailbox_get_last_mail_error(box) != MAIL_ERROR_NOTFOUND)
			ret = dt_worker_set_box_error(box, t_strdup_printf("Looking at mailbox %s", info->vname));
	} else {
		/* maildir gives a new mailbox its UIDVALIDITY only when it is first synced. */
		if (status.uidvalidity == 0 && mailbox_sync(box, 0) == 0)
			mailbox_get_open_status(box, STATUS_UIDVALIDITY, &status);
		listed.uid_validity = status.uidvalidity;
		listed.subscription_changed = look_subscription_changed(ns->list, info->vname, since);
		each(&listed, context);
	}
	mailbox_free(&box);
	return ret;
}

int dt_worker_list(int64_t since, void (*each)(const struct dt_listed *listed, void *context), void *context)
{
	struct mail_namespace *ns = dt_worker_namespace();
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	int ret = 1;

	dt_worker_refresh();
	iter = mailbox_list_iter_init(ns->list, "*",
				      MAILBOX_LIST_ITER_NO_AUTO_BOXES | MAILBOX_LIST_ITER_SKIP_ALIASES);
	while ((info = mailbox_list_iter_next(iter)) != NULL) T_BEGIN {
		if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) == 0 &&
		    look_list_mailbox(ns, info, since, each, context) < 0)
			ret = -1;
	} T_END;
	if (mailbox_list_iter_deinit(&iter) < 0 && ret > 0)
		ret = dt_worker_set_error("Listing mailboxes: %s", mailbox_list_get_last_error(ns->list, NULL));
	return ret;
}

int dt_worker_list_subscribed(int64_t since, void (*each)(const struct dt_listed *listed, void *context), void *context)
{
	static const char *const all[] = { "*", NULL };
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	struct dt_listed listed;

	i_zero(&listed);
	iter = mailbox_list_iter_init_namespaces(dt_worker_namespace()->user->namespaces, all,
						 MAIL_NAMESPACE_TYPE_MASK_ALL,
						 MAILBOX_LIST_ITER_SELECT_SUBSCRIBED |
						 MAILBOX_LIST_ITER_RETURN_NO_FLAGS);
	while ((info = mailbox_list_iter_next(iter)) != NULL) T_BEGIN {
		if (info->ns->type == MAIL_NAMESPACE_TYPE_PRIVATE) {
			listed.vname = info->vname;
			listed.subscription_changed = look_subscription_changed(info->ns->list, info->vname, since);
			each(&listed, context);
		}
	} T_END;
	if (mailbox_list_iter_deinit(&iter) < 0)
		return dt_worker_set_error("Listing subscriptions failed");
	return 1;
}

int dt_worker_deletions(const unsigned char guid[16], uint32_t *count_r)
{
	struct mailbox_log *log = mailbox_list_get_changelog(dt_worker_namespace()->list);
	struct mailbox_log_iter *iter;
	const struct mailbox_log_record *rec;
	int ret = 1;

	*count_r = 0;
	if (log == NULL)
		return 1;
	T_BEGIN {
		iter = mailbox_log_iter_init(log);
		while ((rec = mailbox_log_iter_next(iter)) != NULL) {
			if (rec->type == MAILBOX_LOG_RECORD_DELETE_MAILBOX &&
			    memcmp(rec->mailbox_guid, guid, GUID_128_SIZE) == 0)
				*count_r += 1;
		}
		if (mailbox_log_iter_deinit(&iter) < 0)
			ret = dt_worker_set_error("Reading the mailbox log failed");
	} T_END;
	return ret;
}

/* -- The open mailbox */

const char *dt_worker_log_path(void)
{
	return dt_worker_box()->index->log->filepath;
}

void dt_worker_uids(void (*each)(uint32_t first_uid, uint32_t last_uid, void *context), void *context)
{
	struct mailbox *box = dt_worker_box();
	uint32_t count = mail_index_view_get_messages_count(box->view);

	for (uint32_t seq = 1; seq <= count; seq++) {
		uint32_t uid;

		mail_index_lookup_uid(box->view, seq, &uid);
		each(uid, uid, context);
	}
}

int dt_worker_message_flags(uint32_t uid, uint32_t *flags_r, const char **keywords_r)
{
	struct mailbox_transaction_context *trans;
	struct mail *mail;
	int ret;

	T_BEGIN {
		trans = dt_worker_read_begin(dt_worker_box());
		mail = mail_alloc(trans, MAIL_FETCH_FLAGS, NULL);
		ret = uid != 0 && mail_set_uid(mail, uid) && !mail->expunged ? 1 : 0;
		if (ret > 0) {
			*flags_r = mail_get_flags(mail) & MAIL_FLAGS_NONRECENT;
			*keywords_r = dt_worker_keep(t_strarray_join(mail_get_keywords(mail), " "));
		}
		mail_free(&mail);
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret;
}

int dt_worker_message_info(uint32_t uid, struct dt_message_info *info_r)
{
	struct mailbox *box = dt_worker_box();
	struct mailbox_transaction_context *trans;
	struct mail *mail;
	time_t received, saved;
	uoff_t size;
	int ret;

	i_zero(info_r);
	T_BEGIN {
		trans = dt_worker_read_begin(box);
		mail = mail_alloc(trans, MAIL_FETCH_GUID | MAIL_FETCH_RECEIVED_DATE | MAIL_FETCH_SAVE_DATE |
				  MAIL_FETCH_PHYSICAL_SIZE, NULL);
		ret = dt_worker_get_guid(mail, uid, &info_r->guid);
		if (ret > 0 && (mail_get_received_date(mail, &received) < 0 ||
				mail_get_physical_size(mail, &size) < 0)) {
			ret = mail->expunged || mailbox_get_last_mail_error(box) == MAIL_ERROR_EXPUNGED ? 0 :
				dt_worker_set_box_error(box, "Reading a message's dates");
		}
		if (ret > 0) {
			info_r->guid = dt_worker_keep(info_r->guid);
			info_r->is_stray = dt_stray_is(info_r->guid);
			mail_generate_guid_128_hash(info_r->guid, info_r->guid_128);
			info_r->received_date = received;
			info_r->size = size;
			if (mail_get_save_date(mail, &saved) > 0)
				info_r->save_date = saved;
		}
		mail_free(&mail);
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret;
}

/* -- Marks: what of the peers is applied, kept in the mailbox's own index, so that one commit writes both. */

static uint32_t look_mark_ext(struct mailbox *box)
{
	return mail_index_ext_register(box->index, DT_MARK_NAME, DT_MARK_SIZE, 0, 0);
}

void dt_worker_mark_read(unsigned char mark_r[DT_MARK_SIZE])
{
	struct mailbox *box = dt_worker_box();
	const void *data;
	size_t size;

	memset(mark_r, 0, DT_MARK_SIZE);
	mail_index_get_header_ext(box->view, look_mark_ext(box), &data, &size);
	if (size > 0)
		memcpy(mark_r, data, I_MIN(size, DT_MARK_SIZE));
}

void dt_worker_mark_write(uint32_t offset, const unsigned char *data, size_t size)
{
	struct mailbox_transaction_context *trans = dt_worker_transaction();

	i_assert(offset + size <= DT_MARK_SIZE);
	mail_index_update_header_ext(trans->itrans, look_mark_ext(dt_worker_box()), offset, data, size);
}
