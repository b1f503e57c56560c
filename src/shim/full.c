/* See full.h. */
#include "compat.h"
#include "mail-storage-private.h"
#include "mail-storage-hooks.h"
#include "mailbox-list-private.h"
#include "mail-index-private.h"
#include "mail-index-transaction-private.h"
#include "index-storage.h"
#include "maildir-storage.h"
#include "maildir-keywords.h"
#include "maildir-uidlist.h"
#include "spans.h"
#include "full.h"

#include <dirent.h>
#include <sys/time.h>

#define FULL_CONTEXT(obj) \
	MODULE_CONTEXT_REQUIRE(obj, full_mailbox_module)

struct full_mailbox {
	union mailbox_module_context module_ctx;
};

static MODULE_CONTEXT_DEFINE_INIT(full_mailbox_module,
				  &mail_storage_module_register);
static bool full_is_worker;

static unsigned int full_count_listed(struct maildir_uidlist *uidlist)
{
	struct maildir_uidlist_iter_ctx *iter = maildir_uidlist_iter_init(uidlist);
	enum maildir_uidlist_rec_flag flags;
	const char *filename;
	unsigned int count = 0;
	uint32_t uid;

	while (maildir_uidlist_iter_next(iter, &uid, &flags, &filename))
		count++;
	maildir_uidlist_iter_deinit(&iter);
	return count;
}

/* When dovecot-uidlist cannot be written, maildir forgets what it has read of it, but not that it has read it
   (maildir_uidlist_reset()). The next save, or the close, would write a list without these messages: they would be expunged, here
   and on the peers, and their files found as new ones, if ever. */
static void full_read_uidlist_again(struct mailbox *box)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);

	if (mbox->uidlist != NULL && maildir_uidlist_is_read(mbox->uidlist) &&
	    (!maildir_uidlist_is_open(mbox->uidlist) || full_count_listed(mbox->uidlist) == 0))
		(void)maildir_uidlist_refresh(mbox->uidlist);
}

static unsigned int full_count_files(const char *path)
{
	struct dirent *entry;
	unsigned int count = 0;
	DIR *dir = opendir(path);

	if (dir == NULL)
		return 0;
	while ((entry = readdir(dir)) != NULL)
		count += entry->d_name[0] != '.';
	(void)closedir(dir);
	return count;
}

bool dt_full_would_lose(struct mail_index_transaction *t, struct mailbox *box, bool expunges)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);
	const char *path, *cur;
	unsigned int listed, files;

	if (!t->sync_transaction || mbox->uidlist == NULL || !maildir_uidlist_is_locked(mbox->uidlist))
		return FALSE;
	if (!expunges && (maildir_uidlist_is_open(mbox->uidlist) || mail_index_view_get_messages_count(t->view) == 0))
		return FALSE;
	path = mailbox_get_path(box);
	cur = t_strconcat(path, "/cur", NULL);
	listed = full_count_listed(mbox->uidlist);
	files = full_count_files(cur) + full_count_files(t_strconcat(path, "/new", NULL));
	if (files <= listed)
		return FALSE;
	mail_index_set_error(box->index, "dovetail: Mailbox %s: dovecot-uidlist has lost messages of %u files: "
			     "they are not expunged over that", box->vname, files - listed);
	/* Its time is how maildir sees that there is something new. */
	(void)utimes(cur, NULL);
	return TRUE;
}

static bool full_lacks_letters(struct maildir_keywords_sync_ctx *ctx, const struct mail_keywords *keywords)
{
	unsigned int i;

	for (i = 0; i < keywords->count; i++) {
		if (maildir_keywords_idx_char(ctx, keywords->idx[i]) == '\0')
			return TRUE;
	}
	return FALSE;
}

static bool full_are_kept(struct maildir_mailbox *mbox, struct maildir_keywords_sync_ctx *ctx, const struct mail_keywords *keywords)
{
	struct maildir_keywords *kept = maildir_keywords_init(mbox);
	struct maildir_keywords_sync_ctx *kept_ctx = maildir_keywords_sync_init_readonly(kept, mbox->box.index);
	bool ret = TRUE;
	unsigned int i;

	for (i = 0; i < keywords->count; i++) {
		/* More than there are letters have none. */
		if (maildir_keywords_idx_char(ctx, keywords->idx[i]) != maildir_keywords_idx_char(kept_ctx, keywords->idx[i]))
			ret = FALSE;
	}
	maildir_keywords_sync_deinit(&kept_ctx);
	maildir_keywords_deinit(&kept);
	return ret;
}

int dt_full_keep_keywords(struct mailbox *box, const struct mail_keywords *keywords)
{
	struct maildir_mailbox *mbox;
	struct maildir_keywords_sync_ctx *ctx;
	bool lacks, kept;

	if (!dt_spans_is_maildir(box))
		return 0;
	mbox = MAILDIR_MAILBOX(box);
	ctx = maildir_keywords_sync_init_readonly(mbox->keywords, box->index);
	lacks = full_lacks_letters(ctx, keywords);
	maildir_keywords_sync_deinit(&ctx);
	if (!lacks)
		return 0;

	if (maildir_uidlist_lock(mbox->uidlist) <= 0)
		return -1;
	/* Two of them: what the file has is asked for after this one has written it. */
	ctx = maildir_keywords_sync_init(mbox->keywords, box->index);
	(void)full_lacks_letters(ctx, keywords);
	maildir_keywords_sync_deinit(&ctx);
	ctx = maildir_keywords_sync_init_readonly(mbox->keywords, box->index);
	kept = full_are_kept(mbox, ctx, keywords);
	maildir_keywords_sync_deinit(&ctx);
	maildir_uidlist_unlock(mbox->uidlist);
	return kept ? 0 : -1;
}

static void full_mailbox_close(struct mailbox *box)
{
	struct full_mailbox *fbox = FULL_CONTEXT(box);

	full_read_uidlist_again(box);
	fbox->module_ctx.super.close(box);
}

static struct mailbox_sync_context *full_sync_init(struct mailbox *box, enum mailbox_sync_flags flags)
{
	struct full_mailbox *fbox = FULL_CONTEXT(box);

	full_read_uidlist_again(box);
	return fbox->module_ctx.super.sync_init(box, flags);
}

static struct mailbox_transaction_context *
full_transaction_begin(struct mailbox *box, enum mailbox_transaction_flags flags, const char *reason)
{
	struct full_mailbox *fbox = FULL_CONTEXT(box);

	full_read_uidlist_again(box);
	return fbox->module_ctx.super.transaction_begin(box, flags, reason);
}

static bool full_has_index_files(struct mailbox *box)
{
	const char *path;

	return mailbox_list_get_root_path(box->list, MAILBOX_LIST_PATH_TYPE_INDEX, &path);
}

bool dt_full_is_in_memory(struct mailbox *box)
{
	return box->index != NULL && MAIL_INDEX_IS_IN_MEMORY(box->index) && full_has_index_files(box);
}

static void full_mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	struct full_mailbox *fbox;

	if (!dt_spans_is_watched(box) || !dt_spans_is_maildir(box))
		return;
	/* The other formats never are. */
	if (full_is_worker && full_has_index_files(box)) {
		struct index_mailbox_context *ibox = INDEX_STORAGE_CONTEXT(box);

		ibox->index_flags |= MAIL_INDEX_OPEN_FLAG_NEVER_IN_MEMORY;
	}

	fbox = p_new(box->pool, struct full_mailbox, 1);
	fbox->module_ctx.super = *v;
	box->vlast = &fbox->module_ctx.super;
	v->close = full_mailbox_close;
	v->sync_init = full_sync_init;
	v->transaction_begin = full_transaction_begin;
	MODULE_CONTEXT_SET(box, full_mailbox_module, fbox);
}

static const struct mail_storage_hooks full_hooks = {
	.mailbox_allocated = full_mailbox_allocated,
};

void dt_full_init(struct module *module)
{
	full_is_worker = module == NULL;
	if (module != NULL)
		mail_storage_hooks_add(module, &full_hooks);
	else
		mail_storage_hooks_add_internal(&full_hooks);
}

void dt_full_deinit(struct module *module)
{
	if (module != NULL)
		mail_storage_hooks_remove(&full_hooks);
	else
		mail_storage_hooks_remove_internal(&full_hooks);
}
