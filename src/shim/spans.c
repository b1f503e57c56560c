#include "compat.h"
#include "array.h"
#include "llist.h"
#include "guid.h"
#include "mail-namespace.h"
#include "mail-user.h"
#include "mail-storage-private.h"
#include "mail-storage-hooks.h"
#include "mail-index-private.h"
#include "mail-index-transaction-private.h"
#include "mail-transaction-log-private.h"
#include "maildir-storage.h"
#include "full.h"
#include "making.h"
#include "spans.h"
#include "uidlist.h"

#include <sys/stat.h>
#include <unistd.h>

#define DT_SPANS_BOX_CONTEXT(obj) \
	MODULE_CONTEXT(obj, dt_spans_mailbox_module)
#define DT_SPANS_TRANS_CONTEXT_REQUIRE(obj) \
	MODULE_CONTEXT_REQUIRE(obj, dt_spans_trans_module)

/* UIDs that are known to be expunged: forgotten when there are more ranges, which costs a look at the log. */
#define DT_SPANS_TOLD_MAX 10000

/* A created mailbox writes a handful of spans before its GUID is known. */
#define DT_SPANS_PENDING_MAX 64

struct dt_spans_log {
	uint32_t last_seq;
};

struct dt_spans_mailbox {
	union mailbox_module_context module_ctx;
	struct dt_spans_mailbox *prev, *next;
	struct mailbox *box;

	guid_128_t guid;
	struct dt_spans_log main_log, pvt_log;
	/* Messages whose expunge was told: when it is executed it is no news. */
	ARRAY_TYPE(seq_range) told_expunges;
	/* Written before the GUID was known. */
	ARRAY(struct dt_span) pending;

	bool guid_known:1;
};

struct dt_spans_trans {
	union mail_index_transaction_module_context module_ctx;
};

static MODULE_CONTEXT_DEFINE_INIT(dt_spans_mailbox_module,
				  &mail_storage_module_register);
static MODULE_CONTEXT_DEFINE_INIT(dt_spans_trans_module,
				  &mail_index_module_register);

/* All mailboxes that are allocated, so that an index can be traced to its mailbox. Usually one to three. */
static struct dt_spans_mailbox *dt_spans_mailboxes;
static void (*dt_spans_report)(const struct dt_span *span);

static const char *dt_spans_owner(struct mailbox *box)
{
	struct mail_namespace *ns = mailbox_get_namespace(box);

	return ns->owner == NULL ? NULL : ns->owner->username;
}

static void dt_spans_flush_pending(struct dt_spans_mailbox *sbox)
{
	struct dt_span *span;

	if (!array_is_created(&sbox->pending))
		return;
	array_foreach_modifiable(&sbox->pending, span) {
		memcpy(span->mailbox_guid, sbox->guid, GUID_128_SIZE);
		dt_spans_report(span);
	}
	array_free(&sbox->pending);
}

/* Must not be called inside of a commit: mdbox and maildir may have to write the GUID first. */
static void dt_spans_learn_guid(struct dt_spans_mailbox *sbox)
{
	struct mailbox_metadata metadata;

	dt_uidlist_await(sbox->box);
	i_zero(&metadata);
	if (sbox->box->v.get_metadata(sbox->box, MAILBOX_METADATA_GUID,
				      &metadata) < 0 ||
	    guid_128_is_empty(metadata.guid)) {
		e_debug(sbox->box->event, "dovetail: "
			"Mailbox GUID isn't known, its log ranges are reported without it");
		return;
	}
	memcpy(sbox->guid, metadata.guid, GUID_128_SIZE);
	sbox->guid_known = TRUE;
	dt_spans_flush_pending(sbox);
}

static int dt_spans_mailbox_open(struct mailbox *box)
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);

	if (sbox->module_ctx.super.open(box) < 0)
		return -1;
	/* The GUID is set only after the opening when the mailbox is being created. */
	if (!box->creating && box->opened) T_BEGIN {
		dt_spans_learn_guid(sbox);
	} T_END;
	return 0;
}

static int
dt_spans_mailbox_create(struct mailbox *box,
			const struct mailbox_update *update, bool directory)
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);

	if (sbox->module_ctx.super.create_box(box, update, directory) < 0)
		return -1;
	if (box->opened) T_BEGIN {
		dt_spans_learn_guid(sbox);
	} T_END;
	return 0;
}

/* Dovecot's index of the mailboxes asks for each new one that it finds (node_lookup_guid()), and does without. */
static int
dt_spans_mailbox_get_metadata(struct mailbox *box,
			      enum mailbox_metadata_items items,
			      struct mailbox_metadata *metadata_r)
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);

	if (!box->opened && !box->creating && (items & MAILBOX_METADATA_GUID) != 0 && dt_making_is(box)) {
		mail_storage_set_error(box->storage, MAIL_ERROR_NOTFOUND, T_MAIL_ERR_MAILBOX_NOT_FOUND(box->vname));
		return -1;
	}
	return sbox->module_ctx.super.get_metadata(box, items, metadata_r);
}

static int
dt_spans_mailbox_update(struct mailbox *box,
			const struct mailbox_update *update)
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);
	struct dt_span span;

	i_zero(&span);
	if (sbox->guid_known)
		memcpy(span.old_mailbox_guid, sbox->guid, GUID_128_SIZE);
	if (sbox->module_ctx.super.update_box(box, update) < 0)
		return -1;
	if (!guid_128_is_empty(update->mailbox_guid) && box->opened) T_BEGIN {
		dt_spans_learn_guid(sbox);
		if (!guid_128_is_empty(span.old_mailbox_guid) &&
		    memcmp(span.old_mailbox_guid, sbox->guid, GUID_128_SIZE) != 0) {
			const struct mail_transaction_log_file *log = box->index->log->head;
			struct stat st;

			span.user = dt_spans_owner(box);
			span.mailbox = box;
			span.index_id = box->index->indexid;
			/* Not how far it was read here: others may have written more. */
			if (log != NULL && fstat(log->fd, &st) == 0) {
				span.log_seq = log->hdr.file_seq;
				span.begin = span.end = st.st_size;
			}
			memcpy(span.mailbox_guid, sbox->guid, GUID_128_SIZE);
			dt_spans_report(&span);
		}
	} T_END;
	return 0;
}

static void dt_spans_mailbox_free(struct mailbox *box)
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);

	dt_spans_flush_pending(sbox);
	if (array_is_created(&sbox->told_expunges))
		array_free(&sbox->told_expunges);
	DLLIST_REMOVE(&dt_spans_mailboxes, sbox);
	sbox->module_ctx.super.free(box);
}

bool dt_spans_is_maildir(struct mailbox *box)
{
	return strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0;
}

bool dt_spans_is_watched(struct mailbox *box)
{
	static const char *const storages[] = { "sdbox", "mdbox", MAILDIR_STORAGE_NAME, NULL };

	return box->virtual_vfuncs == NULL && dt_spans_owner(box) != NULL &&
		str_array_find(storages, box->storage->name);
}

static void dt_spans_mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	struct dt_spans_mailbox *sbox;

	if (!dt_spans_is_watched(box))
		return;

	sbox = p_new(box->pool, struct dt_spans_mailbox, 1);
	sbox->box = box;
	sbox->module_ctx.super = *v;
	box->vlast = &sbox->module_ctx.super;
	v->open = dt_spans_mailbox_open;
	v->create_box = dt_spans_mailbox_create;
	v->get_metadata = dt_spans_mailbox_get_metadata;
	v->update_box = dt_spans_mailbox_update;
	v->free = dt_spans_mailbox_free;
	MODULE_CONTEXT_SET(box, dt_spans_mailbox_module, sbox);
	DLLIST_PREPEND(&dt_spans_mailboxes, sbox);
}

static struct dt_spans_mailbox *
dt_spans_find_mailbox(const struct mail_index *index, bool *private_r)
{
	struct dt_spans_mailbox *sbox, *found = NULL;

	/* The same index is shared by all mailboxes opened on it: prefer one whose GUID is known. */
	for (sbox = dt_spans_mailboxes; sbox != NULL; sbox = sbox->next) {
		if (sbox->box->index != index && sbox->box->index_pvt != index)
			continue;
		found = sbox;
		if (sbox->guid_known)
			break;
	}
	if (found != NULL)
		*private_r = found->box->index_pvt == index;
	return found;
}

struct mailbox *dt_spans_find_open(const unsigned char guid[16])
{
	struct dt_spans_mailbox *sbox;

	for (sbox = dt_spans_mailboxes; sbox != NULL; sbox = sbox->next) {
		if (sbox->guid_known && sbox->box->opened && !sbox->box->mailbox_deleted &&
		    memcmp(sbox->guid, guid, GUID_128_SIZE) == 0)
			return sbox->box;
	}
	return NULL;
}

static struct mail_transaction_log_file *
dt_spans_find_file(struct mail_index *index, uint32_t file_seq)
{
	struct mail_transaction_log_file *file;

	for (file = index->log->files; file != NULL; file = file->next) {
		if (file->hdr.file_seq == file_seq)
			return file;
	}
	return NULL;
}

void dt_spans_tell_expunge(struct mailbox *box, uint32_t uid)
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);

	if (!array_is_created(&sbox->told_expunges))
		i_array_init(&sbox->told_expunges, 8);
	else if (array_count(&sbox->told_expunges) >= DT_SPANS_TOLD_MAX)
		array_clear(&sbox->told_expunges);
	seq_range_array_add(&sbox->told_expunges, uid);
}

void dt_spans_forget_told(void)
{
	struct dt_spans_mailbox *sbox;

	for (sbox = dt_spans_mailboxes; sbox != NULL; sbox = sbox->next) {
		if (array_is_created(&sbox->told_expunges))
			array_clear(&sbox->told_expunges);
	}
}

static bool dt_spans_is_told_expunge(const struct mail_index *index, uint32_t uid)
{
	struct dt_spans_mailbox *sbox;

	for (sbox = dt_spans_mailboxes; sbox != NULL; sbox = sbox->next) {
		if (sbox->box->index == index && array_is_created(&sbox->told_expunges) &&
		    seq_range_exists(&sbox->told_expunges, uid))
			return TRUE;
	}
	return FALSE;
}

/* What the transaction does to messages. Called before it is committed, when it still has sequences instead of UIDs. */
static unsigned int dt_spans_touched(struct mail_index_transaction *t)
{
	const struct mail_index_flag_update *update;
	const struct mail_transaction_expunge_guid *expunge;
	unsigned int touched = 0;

	if (t->reset)
		return DT_SPAN_APPENDS | DT_SPAN_EXPUNGES;
	if (array_is_created(&t->appends) && array_count(&t->appends) > 0)
		touched |= DT_SPAN_APPENDS;
	if (array_is_created(&t->keyword_updates) && array_count(&t->keyword_updates) > 0)
		touched |= DT_SPAN_FLAGS;
	if (array_is_created(&t->updates)) {
		array_foreach(&t->updates, update) {
			if (((update->add_flags | update->remove_flags) & MAIL_FLAGS_NONRECENT) != 0)
				touched |= DT_SPAN_FLAGS;
		}
	}
	/* Requests, too: whoever reads the log behind one takes it for told. Those of a deletion, which may fail before they are carried
	   out, nobody tells. */
	if (array_is_created(&t->expunges)) {
		array_foreach(&t->expunges, expunge) {
			uint32_t uid;

			mail_index_lookup_uid(t->view, expunge->uid, &uid);
			if (!dt_spans_is_told_expunge(t->view->index, uid))
				touched |= DT_SPAN_EXPUNGES;
		}
	}
	return touched;
}

/* The bytes before `end`. */
static size_t dt_spans_read_tail(struct mail_transaction_log_file *file, uoff_t end, unsigned char tail_r[DT_SPAN_TAIL_SIZE])
{
	size_t size = I_MIN(end, DT_SPAN_TAIL_SIZE);
	ssize_t ret;

	/* A log that is read instead of mapped is in memory together with what was just written to it. */
	if (file->buffer != NULL && end - size >= file->buffer_offset &&
	    end - file->buffer_offset <= file->buffer->used) {
		memcpy(tail_r, CONST_PTR_OFFSET(file->buffer->data, end - size - file->buffer_offset), size);
		return size;
	}
	ret = pread(file->fd, tail_r, size, end - size);

	return ret < 0 ? 0 : ret;
}

static void
dt_spans_committed(struct dt_spans_mailbox *sbox, bool private,
		   struct mail_index *index, unsigned int touched, unsigned int appends,
		   const struct mail_index_transaction_commit_result *result)
{
	struct dt_spans_log *log = private ? &sbox->pvt_log : &sbox->main_log;
	struct mail_transaction_log_file *file;
	struct dt_span span;

	i_zero(&span);
	span.user = dt_spans_owner(sbox->box);
	if (private)
		span.private_user = sbox->box->storage->user->username;
	span.index_id = index->indexid;
	span.log_seq = result->log_file_seq;
	span.begin = result->log_file_offset - result->commit_size;
	span.end = result->log_file_offset;
	span.touched = touched;
	span.appends = appends;

	file = dt_spans_find_file(index, result->log_file_seq);
	if (file != NULL) {
		span.index_id = file->hdr.indexid;
		span.tail_size = dt_spans_read_tail(file, span.end, span.tail);
		if (log->last_seq != result->log_file_seq) {
			span.prev_log_seq = file->hdr.prev_file_seq;
			span.prev_log_end = file->hdr.prev_file_offset;
		}
	}
	log->last_seq = result->log_file_seq;

	if (!sbox->guid_known) {
		/* The owner's name lives as long as the mailbox does, which
		   flushes these at the latest when it is freed. */
		if (!array_is_created(&sbox->pending))
			i_array_init(&sbox->pending, 4);
		if (array_count(&sbox->pending) == DT_SPANS_PENDING_MAX)
			dt_spans_flush_pending(sbox);
		else
			array_push_back(&sbox->pending, &span);
		if (array_is_created(&sbox->pending))
			return;
	}
	span.mailbox = sbox->box;
	memcpy(span.mailbox_guid, sbox->guid, sizeof(span.mailbox_guid));
	dt_spans_report(&span);
}

static bool dt_spans_would_lose(struct mail_index_transaction *t, bool expunges)
{
	struct dt_spans_mailbox *sbox;
	bool ret = FALSE;

	/* Of the mailboxes that are opened on the index, one is being synced. */
	for (sbox = dt_spans_mailboxes; sbox != NULL && !ret; sbox = sbox->next) {
		if (sbox->box->index == t->view->index && dt_spans_is_maildir(sbox->box)) T_BEGIN {
			ret = dt_full_would_lose(t, sbox->box, expunges);
		} T_END;
	}
	return ret;
}

static int
dt_spans_trans_commit(struct mail_index_transaction *t,
		      struct mail_index_transaction_commit_result *result_r)
{
	struct dt_spans_trans *strans = DT_SPANS_TRANS_CONTEXT_REQUIRE(t);
	struct mail_index *index = t->view->index;
	struct dt_spans_mailbox *sbox;
	unsigned int touched = dt_spans_touched(t);
	unsigned int appends = array_is_created(&t->appends) ? array_count(&t->appends) : 0;
	bool private;
	int ret;

	if (t->sync_transaction && dt_spans_would_lose(t, (touched & DT_SPAN_EXPUNGES) != 0)) {
		strans->module_ctx.super.rollback(t);
		i_free(strans);
		return -1;
	}
	/* This frees the transaction. */
	ret = strans->module_ctx.super.commit(t, result_r);
	i_free(strans);

	/* A failed commit may have been written as well, if it failed only to refresh: whoever follows the spans sees a
	   gap then and looks. */
	if (ret < 0 || result_r->commit_size == 0 ||
	    MAIL_INDEX_IS_IN_MEMORY(index))
		return ret;
	sbox = dt_spans_find_mailbox(index, &private);
	if (sbox != NULL)
		dt_spans_committed(sbox, private, index, touched, appends, result_r);
	return ret;
}

static void dt_spans_trans_rollback(struct mail_index_transaction *t)
{
	struct dt_spans_trans *strans = DT_SPANS_TRANS_CONTEXT_REQUIRE(t);

	strans->module_ctx.super.rollback(t);
	i_free(strans);
}

static void dt_spans_trans_created(struct mail_index_transaction *t)
{
	/* The first hook gets no vlast. */
	struct mail_index_transaction_vfuncs *v =
		t->vlast != NULL ? t->vlast : &t->v;
	struct dt_spans_trans *strans;

	strans = i_new(struct dt_spans_trans, 1);
	strans->module_ctx.super = *v;
	t->vlast = &strans->module_ctx.super;
	v->commit = dt_spans_trans_commit;
	v->rollback = dt_spans_trans_rollback;
	MODULE_CONTEXT_SET(t, dt_spans_trans_module, strans);
}

bool dt_spans_mailbox_guid(struct mailbox *box, unsigned char guid_r[16])
{
	struct dt_spans_mailbox *sbox = DT_SPANS_BOX_CONTEXT(box);

	if (sbox == NULL || !sbox->guid_known)
		return FALSE;
	memcpy(guid_r, sbox->guid, GUID_128_SIZE);
	return TRUE;
}

static const struct mail_storage_hooks dt_spans_hooks = {
	.mailbox_allocated = dt_spans_mailbox_allocated,
};

void dt_spans_init(struct module *module,
		   void (*report)(const struct dt_span *span))
{
	dt_spans_report = report;
	if (module != NULL)
		mail_storage_hooks_add(module, &dt_spans_hooks);
	else
		mail_storage_hooks_add_internal(&dt_spans_hooks);
	mail_index_transaction_hook_register(dt_spans_trans_created);
}

void dt_spans_deinit(struct module *module)
{
	mail_index_transaction_hook_unregister(dt_spans_trans_created);
	if (module != NULL)
		mail_storage_hooks_remove(&dt_spans_hooks);
	else
		mail_storage_hooks_remove_internal(&dt_spans_hooks);
}
