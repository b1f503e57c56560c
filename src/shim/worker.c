#define DT_COMPAT_NAMES
#define DT_COMPAT_WORKER
#include "compat.h"
#include "array.h"
#include "str.h"
#include "ioloop.h"
#include "istream.h"
#include "safe-mkstemp.h"
#include "module-dir.h"
#include "master-service.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-search-build.h"
#include "mail-storage-private.h"
#include "mail-storage-service.h"
#include "mailbox-list-private.h"
#include "index-mail.h"
#include "inbox.h"
#include "making.h"
#include "spans.h"
#include "full.h"
#include "stray.h"
#include "worker.h"

#include <limits.h>
#include <unistd.h>
#include <sys/stat.h>

/* Each fails only if another process does something at the same moment. */
#define DT_CREATE_TRIES 5

/* A mailbox in which a message is looked up by its GUID is read for that from its beginning to its end. */

struct dt_worker_mailbox {
	struct mailbox *box;
	struct mailbox_transaction_context *trans;
};

static struct {
	struct mail_storage_service_ctx *storage_service;
	char *allowed_plugins, *plugins;
	struct io *io;
	char *error;

	struct mail_storage_service_user *service_user;
	struct mail_user *user;
	struct mail_namespace *ns;

	/* The open mailbox and its transaction that is being built. */
	struct mailbox *box;
	struct mailbox_transaction_context *trans;
	/* Reused through `trans`. */
	struct mail *mail;
	/* `trans` saves messages, otherwise it changes them. */
	bool saving;
	/* So many, and the GUID if it is one. */
	unsigned int saves;
	char *saved_guid;
	/* What is written now was asked for by the relay; otherwise it was found in the mailbox. */
	bool writing;

	/* Where messages are copied from. */
	struct mailbox *source;

	/* Body that is being read. */
	struct mailbox_transaction_context *body_trans;
	struct mail *body_mail;
	struct istream *body_input;

	/* Returned strings. */
	string_t *result;
} w;

/* Plugins that act on what they see, which the server where it happened did already. */
static const char *const dt_worker_acting_plugins[] = {
	"dovetail", "notify", "notify_status", "mail_log", "push_notification",
	"welcome", "lazy_expunge", "last_login", "replication", "quota_clone",
	"sieve", "imap_sieve", "autocreate", "charset_alias", "trash",
	"expire", "antispam", "fts_autoindex",
	NULL
};

int dt_worker_set_error(const char *fmt, ...)
{
	va_list args;

	i_free(w.error);
	va_start(args, fmt);
	w.error = i_strdup_vprintf(fmt, args);
	va_end(args);
	return -1;
}

int dt_worker_set_box_error(struct mailbox *box, const char *what)
{
	enum mail_error error;
	const char *text = mailbox_get_last_internal_error(box, &error);
	/* What a retry may mend is everything else. */
	bool never = error == MAIL_ERROR_PARAMS || error == MAIL_ERROR_NOTPOSSIBLE;

	/* "Internal error occurred. Refer to server log for more information. [2026-11-24 23:00:26]": the same error is to
	   read the same. */
	return dt_worker_set_error("%s%s: %s", never ? "impossible here: " : "", what, t_strcut(text, '['));
}

static bool dt_worker_box_notfound(struct mailbox *box)
{
	return mailbox_get_last_mail_error(box) == MAIL_ERROR_NOTFOUND;
}

struct mail_namespace *dt_worker_namespace(void)
{
	return w.ns;
}

struct mailbox *dt_worker_box(void)
{
	return w.box;
}

const char *dt_worker_keep(const char *text)
{
	str_truncate(w.result, 0);
	str_append(w.result, text);
	return str_c(w.result);
}

void dt_worker_refresh(void)
{
	/* mailbox_list_index_refresh() reads the index only once in what the ioloop holds for one moment, and a job may be
	   long. */
	io_loop_time_refresh();
}

static struct mailbox *dt_worker_alloc(const char *vname, enum mailbox_flags flags)
{
	struct mail_namespace *ns;

	/* Below our namespace there may be others. Mailboxes of other users are none of his, whatever a peer calls his. */
	ns = mail_namespace_find(w.user->namespaces, vname);
	if (ns->type != MAIL_NAMESPACE_TYPE_PRIVATE)
		ns = w.ns;
	return mailbox_alloc(ns->list, vname, flags | MAILBOX_FLAG_IGNORE_ACLS);
}

const char *dt_worker_error(void)
{
	return w.error == NULL ? "unknown error" : w.error;
}

static const char *const *dt_worker_split(const char *list)
{
	return t_strsplit_spaces(list, " ,");
}

/* Those of dovetail_worker_plugins that mail_plugins has as well, but never one that acts by itself. */
static int
dt_worker_choose_plugins(const char **plugins_r, const char **error_r)
{
	const char *const *allowed = dt_worker_split(w.allowed_plugins);
	const char *const *all;
	string_t *str = t_str_new(64);

	if (compat_mail_plugins_global(w.storage_service, &all, error_r) < 0)
		return -1;
	for (; *all != NULL; all++) {
		if (!str_array_find(allowed, *all) ||
		    str_array_find(dt_worker_acting_plugins, *all) ||
		    strncmp(*all, "imap_", 5) == 0)
			continue;
		if (str_len(str) > 0)
			str_append_c(str, ' ');
		str_append(str, *all);
	}
	*plugins_r = str_c(str);
	return compat_mail_plugins_load(w.storage_service, *plugins_r, error_r);
}

void dt_worker_allow_plugins(const char *plugins)
{
	i_free(w.allowed_plugins);
	w.allowed_plugins = i_strdup(plugins);
}

/* -- User */

/* Who lists the mailboxes while a client makes one takes its folder away, which is no mailbox yet, and the client's CREATE fails
   (mailbox_list_drop_noselect, the default of Dovecot 2.4). A worker lists them often, so it leaves them alone. */
static void worker_keep_folders(struct mail_user *user)
{
	struct mail_namespace *ns;

	for (ns = user->namespaces; ns != NULL; ns = ns->next)
		compat_list_drop_noselect(ns->list, FALSE);
}

int dt_worker_user_open(const char *username, bool brief)
{
	struct mail_storage_service_input input;
	const char *error;
	int ret;

	i_assert(w.user == NULL && w.service_user == NULL);

	T_BEGIN {
		compat_storage_service_input_init(&input, w.plugins, brief);
		input.username = username;
		ret = mail_storage_service_lookup(w.storage_service, &input,
						  &w.service_user, &error);
		if (ret <= 0) {
			w.service_user = NULL;
			if (ret < 0)
				(void)dt_worker_set_error("%s", error);
		} else if (compat_storage_service_user_override(w.service_user, w.plugins,
								brief, &error) < 0 ||
			   mail_storage_service_next(w.storage_service,
						     w.service_user, &w.user,
						     &error) < 0) {
			ret = dt_worker_set_error("%s", error);
			w.user = NULL;
		}
		if (ret > 0) {
			/* Applying has no side effects. */
			w.user->dsyncing = TRUE;
			w.ns = mail_namespace_find_inbox(w.user->namespaces);
			worker_keep_folders(w.user);
		}
	} T_END;
	if (ret <= 0)
		dt_worker_user_close();
	return ret;
}

struct mail_user *dt_worker_user(void)
{
	return w.user;
}

void dt_worker_user_close(void)
{
	if (w.user != NULL) T_BEGIN {
		dt_worker_close();
		mail_user_deinit(&w.user);
	} T_END;
	w.ns = NULL;
	/* This also switches back to our own log prefix. */
	if (w.service_user != NULL)
		mail_storage_service_user_unref(&w.service_user);
	if (getuid() == 0 && geteuid() != 0 && seteuid(0) < 0)
		i_fatal("dovetail: seteuid(0) failed: %m");
}

const char *dt_worker_namespace_prefix(void)
{
	return w.ns->prefix;
}

char dt_worker_namespace_separator(void)
{
	return mail_namespace_get_sep(w.ns);
}

char dt_worker_namespace_storage_separator(void)
{
	return compat_storage_separator(w.ns);
}

void dt_worker_foreign_prefixes(void (*each)(const char *prefix, void *context), void *context)
{
	struct mail_namespace *ns;

	for (ns = w.user->namespaces; ns != NULL; ns = ns->next) {
		if (ns->type != MAIL_NAMESPACE_TYPE_PRIVATE)
			each(ns->prefix, context);
	}
}

void dt_worker_inbox_guid(unsigned char guid_r[16])
{
	dt_inbox_guid(w.user, guid_r);
}

int dt_worker_temp_file(void)
{
	int fd;

	T_BEGIN {
		string_t *path = t_str_new(128);

		mail_user_set_get_temp_prefix(path, w.user->set);
		fd = safe_mkstemp(path, 0600, (uid_t)-1, (gid_t)-1);
		if (fd == -1) {
			(void)dt_worker_set_error("safe_mkstemp(%s) failed: %m",
						  str_c(path));
		} else if (unlink(str_c(path)) < 0) {
			(void)dt_worker_set_error("unlink(%s) failed: %m",
						  str_c(path));
			i_close_fd(&fd);
		}
	} T_END;
	return fd;
}

int dt_worker_users(void (*each)(const char *username, void *context), void *context)
{
	const char *username;
	int ret;

	/* Without a mask 2.4 lists nobody: match_user() in its auth compares each with it. */
	mail_storage_service_all_init_mask(w.storage_service, "*");
	while ((ret = mail_storage_service_all_next(w.storage_service, &username)) > 0)
		each(username, context);
	return ret < 0 ? dt_worker_set_error("the userdb does not list them") : 1;
}

/* -- Mailbox list */

int dt_worker_existence(const char *vname, enum dt_existence *existence_r)
{
	enum mailbox_existence existence;
	struct mailbox *box;
	int ret = 1;

	T_BEGIN {
		box = dt_worker_alloc(vname, 0);
		if (mailbox_exists(box, FALSE, &existence) < 0)
			ret = dt_worker_set_box_error(box, "mailbox_exists()");
		mailbox_free(&box);
	} T_END;
	if (ret < 0)
		return -1;
	switch (existence) {
	case MAILBOX_EXISTENCE_NONE:
		*existence_r = DT_EXISTENCE_NONE;
		break;
	case MAILBOX_EXISTENCE_NOSELECT:
		*existence_r = DT_EXISTENCE_DIRECTORY;
		break;
	case MAILBOX_EXISTENCE_SELECT:
		*existence_r = DT_EXISTENCE_MAILBOX;
		break;
	}
	return 1;
}

int dt_worker_box_guid(struct mailbox *box, unsigned char guid_r[16])
{
	struct mailbox_metadata metadata;
	const char *path;

	/* mailbox_get_metadata(), in which Dovecot 2.3 panics when the list's index cannot be read: that
	   index_list_get_metadata() takes for a success without a GUID. */
	i_zero(&metadata);
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) < 0 ||
	    box->v.get_metadata(box, MAILBOX_METADATA_GUID, &metadata) < 0) {
		return dt_worker_box_notfound(box) ? 0 :
			dt_worker_set_box_error(box, "Looking up the mailbox's GUID");
	}
	if (guid_128_is_empty(metadata.guid))
		return dt_worker_set_error("Looking up the mailbox's GUID: the index of the mailboxes cannot be read");
	memcpy(guid_r, metadata.guid, sizeof(metadata.guid));
	return 1;
}

int dt_worker_guid_of(const char *vname, unsigned char guid_r[16])
{
	struct mailbox *box;
	int ret;

	T_BEGIN {
		box = dt_worker_alloc(vname, 0);
		ret = dt_worker_box_guid(box, guid_r);
		mailbox_free(&box);
	} T_END;
	return ret;
}

static int worker_list_guid(struct mailbox_list *list, const char *vname,
			    void (*each)(const struct dt_listed *listed, void *context), void *context)
{
	struct mailbox *box = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	struct dt_listed listed;
	int ret;

	i_zero(&listed);
	listed.vname = vname;
	if ((ret = dt_worker_box_guid(box, listed.guid)) > 0)
		each(&listed, context);
	mailbox_free(&box);
	return ret;
}

/* Like mailbox_guid_cache_refresh(), for which a mailbox that is being renamed or deleted is an error. */
static int worker_list_guids_of(struct mail_namespace *ns,
				void (*each)(const struct dt_listed *listed, void *context), void *context)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	enum mailbox_existence existence;
	struct mailbox *box;
	int ret, result = 1;

	iter = mailbox_list_iter_init(ns->list, "*", MAILBOX_LIST_ITER_NO_AUTO_BOXES | MAILBOX_LIST_ITER_SKIP_ALIASES);
	while ((info = mailbox_list_iter_next(iter)) != NULL) T_BEGIN {
		if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) == 0) {
			ret = worker_list_guid(ns->list, info->vname, each, context);
			result = I_MIN(result, ret);
		}
	} T_END;
	if (mailbox_list_iter_deinit(&iter) < 0)
		result = dt_worker_set_error("Listing mailboxes: %s", mailbox_list_get_last_error(ns->list, NULL));

	if (ns->prefix_len > 1 && !mail_namespace_prefix_is_inbox(ns)) T_BEGIN {
		const char *vname = t_strndup(ns->prefix, ns->prefix_len - 1);

		box = mailbox_alloc(ns->list, vname, MAILBOX_FLAG_IGNORE_ACLS);
		if (mailbox_exists(box, FALSE, &existence) == 0 && existence == MAILBOX_EXISTENCE_SELECT) {
			ret = worker_list_guid(ns->list, vname, each, context);
			result = I_MIN(result, ret);
		}
		mailbox_free(&box);
	} T_END;
	return result;
}

int dt_worker_list_guids(void (*each)(const struct dt_listed *listed, void *context), void *context)
{
	struct mail_namespace *ns;
	int ret, result = 1;

	dt_worker_refresh();
	for (ns = w.user->namespaces; ns != NULL; ns = ns->next) {
		if (ns->type == MAIL_NAMESPACE_TYPE_PRIVATE && ns->alias_for == NULL) {
			ret = worker_list_guids_of(ns, each, context);
			result = I_MIN(result, ret);
		}
	}
	return result;
}

static bool worker_was_written_since(struct mailbox_list *list, const char *vname, time_t since)
{
	struct mailbox *box = mailbox_alloc(list, vname, MAILBOX_FLAG_IGNORE_ACLS);
	const char *path;
	struct stat st;
	bool was = mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_INDEX, &path) > 0 &&
		stat(t_strconcat(path, "/", box->index_prefix, ".log", NULL), &st) == 0 && st.st_mtime >= since;

	mailbox_free(&box);
	return was;
}

int dt_worker_was_written_since(const char *username, int64_t since)
{
	struct mailbox_list_iterate_context *iter;
	const struct mailbox_info *info;
	int ret = 0;

	if (strcmp(w.user->username, username) != 0)
		return 0;
	iter = mailbox_list_iter_init(w.ns->list, "*", MAILBOX_LIST_ITER_NO_AUTO_BOXES | MAILBOX_LIST_ITER_SKIP_ALIASES);
	while (ret == 0 && (info = mailbox_list_iter_next(iter)) != NULL) T_BEGIN {
		if ((info->flags & (MAILBOX_NOSELECT | MAILBOX_NONEXISTENT)) == 0 &&
		    worker_was_written_since(w.ns->list, info->vname, since))
			ret = 1;
	} T_END;
	if (mailbox_list_iter_deinit(&iter) < 0 && ret == 0)
		ret = dt_worker_set_error("Listing mailboxes: %s", mailbox_list_get_last_error(w.ns->list, NULL));
	return ret;
}

static void
dt_worker_convert_update(const struct dt_mailbox_update *src,
			 struct mailbox_update *dest_r)
{
	i_zero(dest_r);
	memcpy(dest_r->mailbox_guid, src->guid, sizeof(dest_r->mailbox_guid));
	dest_r->uid_validity = src->uid_validity;
	dest_r->min_next_uid = src->min_uid_next;
	dest_r->min_highest_modseq = src->min_highest_modseq;
}

/* A file's name has its limits, and Dovecot takes a mailbox whose path is beyond for one that is not there. */
static bool worker_is_too_long(struct mailbox *box)
{
	const char *path, *error, *const *names;

	/* A name like "../a" must not be asked for its path. */
	if (!mailbox_list_is_valid_name(box->list, box->name, &error) ||
	    mailbox_list_get_path(box->list, box->name, MAILBOX_LIST_PATH_TYPE_DIR, &path) <= 0)
		return FALSE;
	for (names = t_strsplit(path, "/"); *names != NULL; names++) {
		if (strlen(*names) > NAME_MAX)
			return TRUE;
	}
	return FALSE;
}

static int worker_create(const char *vname, bool directory, const struct mailbox_update *update, bool *vanished_r)
{
	struct mailbox *box = dt_worker_alloc(vname, 0);
	enum mail_error error;
	int ret = 1;

	*vanished_r = FALSE;
	/* The name was allowed where it was created. */
	mailbox_skip_create_name_restrictions(box, TRUE);
	if (mailbox_create(box, directory ? NULL : update, directory) < 0) {
		error = mailbox_get_last_mail_error(box);
		if (error == MAIL_ERROR_EXISTS)
			ret = 0;
		else if (worker_is_too_long(box))
			ret = dt_worker_set_error("impossible here: its name is too long for the storage");
		else {
			*vanished_r = error == MAIL_ERROR_NOTFOUND;
			ret = dt_worker_set_box_error(box, "mailbox_create()");
		}
	}
	mailbox_free(&box);
	return ret;
}

int dt_worker_create(const char *vname, bool directory,
		     const struct dt_mailbox_update *_update)
{
	struct mailbox_update update;
	unsigned int tries = 0;
	bool vanished;
	int ret;

	dt_worker_convert_update(_update, &update);
	w.writing = TRUE;
	/* See worker_keep_folders(): a client may list them meanwhile. */
	do T_BEGIN {
		ret = worker_create(vname, directory, &update, &vanished);
	} T_END; while (vanished && ++tries < DT_CREATE_TRIES);
	w.writing = FALSE;
	return ret;
}

int dt_worker_rename(const char *from, const char *to)
{
	struct mailbox *src, *dest;
	enum mail_error error;
	const char *errstr;
	bool never;
	int ret = 1;

	T_BEGIN {
		src = dt_worker_alloc(from, 0);
		dest = dt_worker_alloc(to, 0);
		mailbox_skip_create_name_restrictions(dest, TRUE);
		/* Empty parents go with it, as they did where it was renamed. */
		compat_list_drop_noselect(src->list, TRUE);
		if (mailbox_rename(src, dest) < 0) {
			errstr = mailbox_get_last_internal_error(src, &error);
			if (error == MAIL_ERROR_NOTFOUND ||
			    error == MAIL_ERROR_EXISTS)
				ret = 0;
			else if (worker_is_too_long(dest))
				ret = dt_worker_set_error("impossible here: its name is too long for the storage");
			else {
				never = error == MAIL_ERROR_PARAMS || error == MAIL_ERROR_NOTPOSSIBLE;
				ret = dt_worker_set_error("%smailbox_rename(%s): %s", never ? "impossible here: " : "",
							  to, errstr);
			}
		}
		compat_list_drop_noselect(src->list, FALSE);
		mailbox_free(&dest);
		mailbox_free(&src);
	} T_END;
	return ret;
}

static int worker_delete(const char *vname, bool must_be_empty)
{
	struct mailbox *box;
	int ret = 1;

	T_BEGIN {
		box = dt_worker_alloc(vname, 0);
		w.writing = TRUE;
		if ((must_be_empty ? mailbox_delete_empty(box) : mailbox_delete(box)) < 0) {
			if (dt_worker_box_notfound(box) ||
			    (must_be_empty && mailbox_get_last_mail_error(box) == MAIL_ERROR_EXISTS))
				ret = 0;
			else
				ret = dt_worker_set_box_error(box, "mailbox_delete()");
		}
		mailbox_free(&box);
		w.writing = FALSE;
	} T_END;
	return ret;
}

int dt_worker_delete(const char *vname)
{
	return worker_delete(vname, FALSE);
}

int dt_worker_delete_empty(const char *vname)
{
	return worker_delete(vname, TRUE);
}

int dt_worker_set_subscribed(const char *vname, bool subscribed)
{
	struct mailbox *box;
	int ret = 1;

	T_BEGIN {
		box = dt_worker_alloc(vname, 0);
		if (mailbox_set_subscribed(box, subscribed) < 0)
			ret = dt_worker_set_box_error(box, "mailbox_set_subscribed()");
		mailbox_free(&box);
	} T_END;
	return ret;
}

/* -- The open mailbox */

int dt_worker_open(const char *vname, bool readonly)
{
	int ret = 1;

	dt_worker_close();
	T_BEGIN {
		w.box = dt_worker_alloc(vname, readonly ? MAILBOX_FLAG_READONLY : 0);
		if (dt_making_is(w.box))
			ret = 0;
		/* Without it the modseqs that we set would not be kept. */
		else if ((!readonly &&
			  mailbox_enable(w.box, MAILBOX_FEATURE_CONDSTORE) < 0) ||
			 mailbox_open(w.box) < 0) {
			ret = dt_worker_box_notfound(w.box) ? 0 :
				dt_worker_set_box_error(w.box, "mailbox_open()");
		} else if (mailbox_sync(w.box, 0) < 0) {
			ret = dt_worker_box_notfound(w.box) ? 0 :
				dt_worker_set_box_error(w.box, "mailbox_sync()");
		}
	} T_END;
	if (ret <= 0)
		dt_worker_close();
	return ret;
}

void dt_worker_close(void)
{
	dt_worker_body_close();
	dt_worker_rollback();
	T_BEGIN {
		if (w.source != NULL)
			mailbox_free(&w.source);
		if (w.box != NULL)
			mailbox_free(&w.box);
	} T_END;
}

int dt_worker_sync(void)
{
	int ret = 1;

	T_BEGIN {
		if (mailbox_sync(w.box, 0) < 0)
			ret = dt_worker_set_box_error(w.box, "mailbox_sync()");
	} T_END;
	return ret;
}

void dt_worker_status(struct dt_mailbox_status *status_r)
{
	struct mailbox_status status;

	i_zero(status_r);
	T_BEGIN {
		mailbox_get_open_status(w.box, STATUS_MESSAGES | STATUS_UIDNEXT |
					STATUS_UIDVALIDITY | STATUS_HIGHESTMODSEQ,
					&status);
		if (!dt_spans_mailbox_guid(w.box, status_r->guid))
			(void)dt_worker_box_guid(w.box, status_r->guid);
	} T_END;
	status_r->messages = status.messages;
	status_r->uid_next = status.uidnext;
	status_r->uid_validity = status.uidvalidity;
	status_r->highest_modseq = status.highest_modseq;
}

int dt_worker_update(const struct dt_mailbox_update *_update)
{
	struct mailbox_update update;
	int ret = 1;

	dt_worker_convert_update(_update, &update);
	T_BEGIN {
		w.writing = TRUE;
		ret = mailbox_update(w.box, &update) < 0 ? -1 : 1;
		w.writing = FALSE;
		if (ret < 0)
			ret = dt_worker_set_box_error(w.box, "mailbox_update()");
		/* With another UIDVALIDITY maildir begins anew with the index, which a mailbox that is open does not expect. */
		else if (update.uid_validity == 0 && mailbox_sync(w.box, 0) < 0)
			ret = dt_worker_set_box_error(w.box, "mailbox_sync()");
	} T_END;
	return ret;
}

int
dt_worker_get_guid(struct mail *mail, uint32_t uid, const char **guid_r)
{
	/* mail_set_uid() does not take 0. */
	if (uid == 0 || !mail_set_uid(mail, uid) || mail->expunged)
		return 0;
	if (mail_get_special(mail, MAIL_FETCH_GUID, guid_r) < 0) {
		if (mail->expunged || dt_worker_box_notfound(mail->box) ||
		    mailbox_get_last_mail_error(mail->box) == MAIL_ERROR_EXPUNGED)
			return 0;
		return dt_worker_set_box_error(mail->box, "Reading a message's GUID");
	}
	return 1;
}

struct mailbox_transaction_context *
dt_worker_read_begin(struct mailbox *box)
{
	return mailbox_transaction_begin(box,
		MAILBOX_TRANSACTION_FLAG_NO_NOTIFY |
		MAILBOX_TRANSACTION_FLAG_NO_CACHE_DEC, "dovetail");
}

int dt_worker_message_guid(uint32_t uid, const char **guid_r)
{
	struct mailbox_transaction_context *trans;
	struct mail *mail;
	const char *guid;
	int ret;

	T_BEGIN {
		trans = dt_worker_read_begin(w.box);
		mail = mail_alloc(trans, MAIL_FETCH_GUID, NULL);
		ret = dt_worker_get_guid(mail, uid, &guid);
		if (ret > 0) {
			*guid_r = dt_worker_keep(guid);
		}
		mail_free(&mail);
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret;
}

static int
dt_worker_search_guid(struct mailbox_transaction_context *trans, const char *guid,
		      void (*each)(uint32_t first_uid, uint32_t last_uid, void *context), void *context)
{
	struct mail_search_args *args;
	struct mail_search_context *ctx;
	struct mail_search_arg *arg;
	struct mail *mail;

	args = mail_search_build_init();
	arg = mail_search_build_add(args, SEARCH_GUID);
	arg->value.str = p_strdup(args->pool, guid);
	ctx = mailbox_search_init(trans, args, NULL, 0, NULL);
	mail_search_args_unref(&args);
	while (mailbox_search_next(ctx, &mail))
		each(mail->uid, mail->uid, context);
	if (mailbox_search_deinit(&ctx) < 0) {
		return dt_worker_set_box_error(mailbox_transaction_get_mailbox(trans),
					       "Searching for a message's GUID");
	}
	return 1;
}

int dt_worker_find_messages(const char *guid, void (*each)(uint32_t first_uid, uint32_t last_uid, void *context),
			    void *context)
{
	struct mailbox_transaction_context *trans;
	int ret;

	T_BEGIN {
		trans = dt_worker_read_begin(w.box);
		ret = dt_worker_search_guid(trans, guid, each, context);
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret;
}

int dt_worker_guids(uint32_t first_uid, void (*each)(uint32_t uid, const char *guid, void *context), void *context)
{
	struct mailbox_transaction_context *trans;
	struct mail_search_args *args;
	struct mail_search_context *ctx;
	struct mail_search_arg *arg;
	struct mail *mail;
	const char *guid;
	int ret = 1;

	T_BEGIN {
		trans = dt_worker_read_begin(w.box);
		args = mail_search_build_init();
		arg = mail_search_build_add(args, SEARCH_UIDSET);
		p_array_init(&arg->value.seqset, args->pool, 1);
		seq_range_array_add_range(&arg->value.seqset, I_MAX(first_uid, 1), (uint32_t)-1);
		ctx = mailbox_search_init(trans, args, NULL, MAIL_FETCH_GUID, NULL);
		mail_search_args_unref(&args);
		while (ret >= 0 && mailbox_search_next(ctx, &mail)) {
			ret = dt_worker_get_guid(mail, mail->uid, &guid);
			if (ret > 0)
				each(mail->uid, guid, context);
		}
		if (mailbox_search_deinit(&ctx) < 0 && ret >= 0)
			ret = dt_worker_set_box_error(w.box, "Reading messages' GUIDs");
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret < 0 ? -1 : 1;
}

int dt_worker_was_expunged(uint32_t uid, const char *guid)
{
	int ret = 0;

	T_BEGIN {
		ARRAY_TYPE(seq_range) filter;
		ARRAY_TYPE(mailbox_expunge_rec) expunges;
		const struct mailbox_expunge_rec *rec;
		guid_128_t guid_128;

		mail_generate_guid_128_hash(guid, guid_128);
		t_array_init(&filter, 1);
		t_array_init(&expunges, 1);
		seq_range_array_add(&filter, uid);
		/* All of the log that is still there. */
		(void)mailbox_get_expunges(w.box, 0, &filter, &expunges);
		array_foreach(&expunges, rec) {
			/* Without a GUID it may have been another message. */
			if (rec->uid == uid &&
			    guid_128_equals(rec->guid_128, guid_128))
				ret = 1;
		}
	} T_END;
	return ret;
}

/* -- Transactions */

static void dt_worker_begin(bool saving)
{
	enum mailbox_transaction_flags flags =
		MAILBOX_TRANSACTION_FLAG_SYNC |
		MAILBOX_TRANSACTION_FLAG_NO_NOTIFY;

	if (w.trans != NULL) {
		i_assert(w.saving == saving);
		return;
	}
	/* An expunge inside of an external transaction would leak its file or bring the message back. */
	if (saving)
		flags |= MAILBOX_TRANSACTION_FLAG_EXTERNAL |
			MAILBOX_TRANSACTION_FLAG_ASSIGN_UIDS;
	w.saving = saving;
	w.saves = 0;
	w.trans = mailbox_transaction_begin(w.box, flags, "dovetail");
	if (!saving)
		w.mail = mail_alloc(w.trans, 0, NULL);
}

struct mailbox_transaction_context *dt_worker_transaction(void)
{
	if (w.trans == NULL)
		dt_worker_begin(FALSE);
	return w.trans;
}

/* Before the names of files that are saved are made. Only for one message at a time. */
static void dt_worker_sign(const char *guid, struct dt_stray_signing *signing_r)
{
	i_zero(signing_r);
	if (guid != NULL && dt_spans_is_maildir(w.box))
		dt_stray_sign(w.box, guid, signing_r);
}

static void dt_worker_unsign(struct dt_stray_signing *signing)
{
	if (signing->hostname != NULL)
		dt_stray_unsign(signing);
}

bool dt_worker_is_maildir(void)
{
	return dt_spans_is_maildir(w.box);
}

bool dt_worker_is_saved_alone(const char *guid)
{
	return dt_spans_is_maildir(w.box) && dt_stray_needs_name(w.box, guid);
}

/* NULL if there are none. */
static int dt_worker_keywords(const char *const *names, struct mail_keywords **keywords_r)
{
	int ret = 0;

	*keywords_r = NULL;
	if (names[0] == NULL)
		return 0;
	T_BEGIN {
		*keywords_r = mailbox_keywords_create_valid(w.box, names);
		if (dt_full_keep_keywords(w.box, *keywords_r) < 0) {
			mailbox_keywords_unref(keywords_r);
			ret = dt_worker_set_box_error(w.box, "dovecot-keywords");
		}
	} T_END;
	return ret;
}

static void dt_worker_keywords_unref(struct mail_keywords **keywords)
{
	if (*keywords != NULL)
		mailbox_keywords_unref(keywords);
}

static struct mail_save_context *
dt_worker_save_alloc(const struct dt_worker_save *save, struct mail_keywords *keywords)
{
	struct mail_save_context *ctx;

	ctx = mailbox_save_alloc(w.trans);
	mailbox_save_set_flags(ctx, save->flags & MAIL_FLAGS_NONRECENT, keywords);
	mailbox_save_set_received_date(ctx, save->received_date, 0);
	if (save->save_date != 0)
		mailbox_save_set_save_date(ctx, save->save_date);
	if (save->uid != 0)
		mailbox_save_set_uid(ctx, save->uid);
	if (*save->guid != '\0')
		mailbox_save_set_guid(ctx, save->guid);
	i_free(w.saved_guid);
	if (w.saves++ == 0)
		w.saved_guid = i_strdup(save->guid);
	return ctx;
}

static int
dt_worker_save_input(struct mail_save_context *ctx, const char *guid,
		     struct istream *input)
{
	ssize_t ret;

	/* This frees the context if it fails. */
	if (mailbox_save_begin(&ctx, input) < 0)
		return dt_worker_set_box_error(w.box, "mailbox_save_begin()");
	/* dbox would have to open the file for each flag that is changed. (maildir keeps it in dovecot-uidlist.) */
	if (!dt_spans_is_maildir(w.box) && ctx->dest_mail != NULL &&
	    *guid != '\0') {
		index_mail_cache_add(INDEX_MAIL(ctx->dest_mail),
				     MAIL_CACHE_GUID, guid, strlen(guid));
	}
	do {
		if (mailbox_save_continue(ctx) < 0) {
			mailbox_save_cancel(&ctx);
			return dt_worker_set_box_error(w.box, "mailbox_save_continue()");
		}
	} while ((ret = i_stream_read(input)) > 0 || ret == -2);
	if (input->stream_errno != 0) {
		mailbox_save_cancel(&ctx);
		return dt_worker_set_error("read(%s) failed: %s",
					   i_stream_get_name(input),
					   i_stream_get_error(input));
	}
	if (mailbox_save_finish(&ctx) < 0)
		return dt_worker_set_box_error(w.box, "mailbox_save_finish()");
	return 1;
}

int dt_worker_save(const struct dt_worker_save *save, const void *data, size_t size,
		   int fd)
{
	struct mail_save_context *ctx;
	struct mail_keywords *keywords;
	struct istream *input;
	int ret;

	dt_worker_begin(TRUE);
	if (dt_worker_keywords(save->keywords, &keywords) < 0)
		return -1;
	T_BEGIN {
		ctx = dt_worker_save_alloc(save, keywords);
		if (fd == -1) {
			input = i_stream_create_from_data(data, size);
			i_stream_set_name(input, "(inline body)");
		} else {
			input = i_stream_create_fd(fd, IO_BLOCK_SIZE);
			i_stream_set_name(input, "(fetched body)");
			i_stream_seek(input, 0);
		}
		ret = dt_worker_save_input(ctx, save->guid, input);
		i_stream_unref(&input);
	} T_END;
	dt_worker_keywords_unref(&keywords);
	return ret;
}

static int dt_worker_copy_mail(const struct dt_worker_save *save, struct mail *mail)
{
	struct mail_save_context *ctx, *copy_ctx;
	struct mail_keywords *keywords;
	struct dt_stray_signing signing;
	uint32_t save_date = save->save_date;
	time_t now = ioloop_time;
	int ret;

	dt_worker_begin(TRUE);
	if (dt_worker_keywords(save->keywords, &keywords) < 0)
		return -1;
	copy_ctx = ctx = dt_worker_save_alloc(save, keywords);
	/* Copies without reading the body take their save date from here, not from the context. */
	if (save->save_date != 0)
		ioloop_time = save->save_date;
	dt_worker_sign(save->guid, &signing);
	ret = mailbox_copy(&ctx, mail) < 0 ? -1 : 1;
	dt_worker_unsign(&signing);
	ioloop_time = now;
	/* The transaction keeps the context. As when it is captured: maildir keeps the date in its cache only, where Dovecot
	   puts it only if others are there. */
	if (ret > 0 && save_date != 0 && strcmp(w.box->storage->name, "mdbox") != 0 &&
	    copy_ctx->dest_mail != NULL && copy_ctx->dest_mail->seq != 0) {
		index_mail_cache_add(INDEX_MAIL(copy_ctx->dest_mail), MAIL_CACHE_SAVE_DATE, &save_date,
				     sizeof(save_date));
	}
	if (ret < 0) {
		/* It may have been expunged just now. */
		ret = mailbox_get_last_mail_error(w.box) == MAIL_ERROR_EXPUNGED ? 0 :
			dt_worker_set_box_error(w.box, "mailbox_copy()");
	}
	dt_worker_keywords_unref(&keywords);
	return ret;
}

static void dt_worker_first_uid(uint32_t first_uid, uint32_t last_uid ATTR_UNUSED, void *context)
{
	uint32_t *uid = context;

	if (*uid == 0)
		*uid = first_uid;
}

static int
dt_worker_copy_from(const struct dt_worker_save *save, uint32_t source_uid)
{
	struct mailbox_transaction_context *trans;
	struct mail *mail;
	const char *guid;
	uint32_t uid = 0;
	int ret;

	trans = dt_worker_read_begin(w.source);
	mail = mail_alloc(trans, 0, NULL);
	ret = dt_worker_get_guid(mail, source_uid, &guid);
	if (ret == 0 || (ret > 0 && strcmp(guid, save->guid) != 0)) {
		ret = dt_worker_search_guid(trans, save->guid, dt_worker_first_uid, &uid);
		if (ret > 0 && (uid == 0 || !mail_set_uid(mail, uid)))
			ret = 0;
	}
	if (ret > 0)
		ret = dt_worker_copy_mail(save, mail);
	mail_free(&mail);
	mailbox_transaction_rollback(&trans);
	return ret;
}

static int dt_worker_no_size(struct mail *mail ATTR_UNUSED, uoff_t *size_r ATTR_UNUSED)
{
	return -1;
}

/* A copy in maildir is given the file name that its GUID is, if no file has it. A message that gets its second new UID had
   it before: whoever still knows that file's old UID would take the copy for the expunged message. Where the size in the
   name is not the copy's, Dovecot takes a new name (maildir_filename_check_conflicts()). */
static void dt_worker_want_new_filename(struct mail *mail, const char *guid)
{
	struct mail_private *pmail = (struct mail_private *)mail;

	if (dt_spans_is_maildir(mail->box) && strstr(guid, ",S=") != NULL)
		pmail->v.get_physical_size = dt_worker_no_size;
}

int dt_worker_duplicate(uint32_t uid, uint32_t new_uid)
{
	struct mailbox_transaction_context *trans;
	struct dt_worker_save save;
	struct mail *mail;
	time_t received, saved;
	int ret;

	i_zero(&save);
	save.uid = new_uid;
	T_BEGIN {
		trans = dt_worker_read_begin(w.box);
		mail = mail_alloc(trans, 0, NULL);
		ret = dt_worker_get_guid(mail, uid, &save.guid);
		if (ret > 0 && mail_get_received_date(mail, &received) < 0) {
			ret = mail->expunged || mailbox_get_last_mail_error(w.box) == MAIL_ERROR_EXPUNGED ? 0 :
				dt_worker_set_box_error(w.box, "Reading a message's dates");
		}
		if (ret > 0) {
			save.guid = t_strdup(save.guid);
			save.flags = mail_get_flags(mail);
			save.keywords = mail_get_keywords(mail);
			save.received_date = received;
			if (mail_get_save_date(mail, &saved) > 0)
				save.save_date = saved;
			dt_worker_want_new_filename(mail, save.guid);
			ret = dt_worker_copy_mail(&save, mail);
		}
		mail_free(&mail);
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret;
}

int dt_worker_copy(const struct dt_worker_save *save, const char *source_vname,
		   uint32_t source_uid)
{
	bool had_trans = w.trans != NULL;
	int ret = 1;

	T_BEGIN {
		if (w.source != NULL &&
		    strcmp(mailbox_get_vname(w.source), source_vname) != 0)
			mailbox_free(&w.source);
		if (w.source == NULL)
			w.source = dt_worker_alloc(source_vname,
						   MAILBOX_FLAG_READONLY);
		if (mailbox_sync(w.source, 0) < 0) {
			ret = dt_worker_box_notfound(w.source) ? 0 :
				dt_worker_set_box_error(w.source,
					t_strdup_printf("mailbox_sync(%s)", source_vname));
		} else {
			ret = dt_worker_copy_from(save, source_uid);
		}
		if (ret <= 0)
			mailbox_free(&w.source);
		/* The caller knows of none, and may sync the mailbox. */
		if (ret <= 0 && !had_trans)
			dt_worker_rollback();
	} T_END;
	return ret;
}

int dt_worker_update_flags(uint32_t first_uid, uint32_t last_uid,
			   const struct dt_worker_flags *flags)
{
	struct mail_keywords *add, *remove = NULL;
	uint32_t seq, seq2;

	dt_worker_begin(FALSE);
	if (dt_worker_keywords(flags->add_keywords, &add) < 0)
		return -1;
	T_BEGIN {
		if (flags->remove_keywords[0] != NULL)
			remove = mailbox_keywords_create_valid(w.box, flags->remove_keywords);
		mailbox_get_seq_range(w.box, first_uid, last_uid, &seq, &seq2);
		for (; seq > 0 && seq <= seq2; seq++) {
			mail_set_seq(w.mail, seq);
			if (flags->add != 0)
				mail_update_flags(w.mail, MODIFY_ADD,
					flags->add & MAIL_FLAGS_NONRECENT);
			if (flags->remove != 0)
				mail_update_flags(w.mail, MODIFY_REMOVE,
					flags->remove & MAIL_FLAGS_NONRECENT);
			if (add != NULL)
				mail_update_keywords(w.mail, MODIFY_ADD, add);
			if (remove != NULL)
				mail_update_keywords(w.mail, MODIFY_REMOVE, remove);
		}
	} T_END;
	dt_worker_keywords_unref(&add);
	dt_worker_keywords_unref(&remove);
	return 1;
}

int dt_worker_expunge(uint32_t first_uid, uint32_t last_uid)
{
	uint32_t seq, seq2;

	dt_worker_begin(FALSE);
	T_BEGIN {
		mailbox_get_seq_range(w.box, first_uid, last_uid, &seq, &seq2);
		for (; seq > 0 && seq <= seq2; seq++) {
			const char *guid;

			mail_set_seq(w.mail, seq);
			dt_spans_tell_expunge(w.box, w.mail->uid);
			/* Only what is known without opening a file gets into the log, where dt_worker_was_expunged()
			   looks for it. */
			(void)mail_get_special(w.mail, MAIL_FETCH_GUID, &guid);
			mail_expunge(w.mail);
		}
	} T_END;
	return 1;
}

int dt_worker_commit(void (*saved)(uint32_t first_uid, uint32_t last_uid,
				   void *context), void *context)
{
	struct mail_transaction_commit_changes changes;
	const struct seq_range *range;
	struct dt_stray_signing signing;
	int ret = 1;

	if (w.trans == NULL)
		return 1;
	T_BEGIN {
		if (w.mail != NULL)
			mail_free(&w.mail);
		w.writing = TRUE;
		dt_worker_sign(w.saved_guid, &signing);
		ret = mailbox_transaction_commit_get_changes(&w.trans, &changes);
		dt_worker_unsign(&signing);
		i_free(w.saved_guid);
		w.writing = FALSE;
		if (ret < 0) {
			ret = dt_worker_set_box_error(w.box, "Commit");
		} else {
			ret = 1;
			array_foreach(&changes.saved_uids, range)
				saved(range->seq1, range->seq2, context);
			pool_unref(&changes.pool);
			/* This also executes expunges, which were only requested so far. */
			if (mailbox_sync(w.box, 0) < 0)
				ret = dt_worker_set_box_error(w.box, "mailbox_sync()");
		}
	} T_END;
	return ret;
}

void dt_worker_rollback(void)
{
	if (w.trans == NULL)
		return;
	T_BEGIN {
		if (w.mail != NULL)
			mail_free(&w.mail);
		mailbox_transaction_rollback(&w.trans);
		i_free(w.saved_guid);
	} T_END;
}

/* -- Reading a body */

int dt_worker_body_open(uint32_t uid, const char *guid)
{
	const char *have_guid;
	int ret;

	dt_worker_body_close();
	T_BEGIN {
		w.body_trans = dt_worker_read_begin(w.box);
		w.body_mail = mail_alloc(w.body_trans, MAIL_FETCH_STREAM_HEADER |
					 MAIL_FETCH_STREAM_BODY, NULL);
		ret = dt_worker_get_guid(w.body_mail, uid, &have_guid);
		if (ret > 0 && strcmp(guid, have_guid) != 0)
			ret = 0;
		if (ret > 0 && mail_get_stream(w.body_mail, NULL, NULL,
					       &w.body_input) < 0) {
			if (w.body_mail->expunged ||
			    mailbox_get_last_mail_error(w.box) == MAIL_ERROR_EXPUNGED)
				ret = 0;
			else
				ret = dt_worker_set_box_error(w.box, "mail_get_stream()");
		}
	} T_END;
	if (ret <= 0)
		dt_worker_body_close();
	return ret;
}

ssize_t dt_worker_body_read(void *buffer, size_t size)
{
	const unsigned char *data;
	size_t have;
	ssize_t ret = 0;

	T_BEGIN {
		if (i_stream_read_more(w.body_input, &data, &have) > 0) {
			ret = I_MIN(size, have);
			memcpy(buffer, data, ret);
			i_stream_skip(w.body_input, ret);
		} else if (w.body_input->stream_errno != 0) {
			ret = dt_worker_set_error("read(%s) failed: %s",
						  i_stream_get_name(w.body_input),
						  i_stream_get_error(w.body_input));
		}
	} T_END;
	return ret;
}

void dt_worker_body_close(void)
{
	if (w.body_trans == NULL)
		return;
	T_BEGIN {
		/* The stream belongs to the mail. */
		w.body_input = NULL;
		mail_free(&w.body_mail);
		mailbox_transaction_rollback(&w.body_trans);
	} T_END;
}

static void dt_worker_span(const struct dt_span *_span)
{
	struct dt_span span = *_span;

	if (w.writing)
		span.touched = span.appends = 0;
	dt_rs_worker_span(&span);
}

/* -- The connection from the relay */

static void dt_worker_readable(void *context ATTR_UNUSED)
{
	dt_rs_worker_input();
}

bool dt_worker_connection_init(int fd)
{
	if (w.io != NULL)
		return FALSE;
	w.io = io_add(fd, IO_READ, dt_worker_readable, (void *)NULL);
	dt_rs_worker_connected(fd);
	return TRUE;
}

void dt_worker_connection_closed(void)
{
	io_remove(&w.io);
	master_service_client_connection_destroyed(master_service);
}

int dt_worker_init(struct mail_storage_service_ctx *storage_service,
		   const char **error_r)
{
	const char *plugins;

	w.storage_service = storage_service;
	if (dt_worker_choose_plugins(&plugins, error_r) < 0)
		return -1;
	w.plugins = i_strdup(plugins);
	w.result = str_new(default_pool, 128);
	dt_inbox_init(NULL);
	dt_spans_init(NULL, dt_worker_span);
	dt_full_init(NULL);
	return 0;
}

void dt_worker_deinit(void)
{
	dt_rs_worker_disconnect();
	dt_worker_user_close();
	dt_full_deinit(NULL);
	dt_spans_deinit(NULL);
	dt_inbox_deinit(NULL);
	str_free(&w.result);
	i_free(w.plugins);
	i_free(w.allowed_plugins);
	i_free(w.error);
}
