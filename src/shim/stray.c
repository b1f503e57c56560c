/* See stray.h. */
#include "compat.h"
#include "hostpid.h"
#include "mail-storage-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "spans.h"
#include "stray.h"
#include "worker.h"

/* Behind the hostname, which cannot have it (maildir_filename_generate()); before the hashed GUID. */
#define STRAY_SIGN "_dovetail-"

static const char *stray_sign(const char *guid)
{
	guid_128_t hash;

	mail_generate_guid_128_hash(guid, hash);
	return t_strconcat(STRAY_SIGN, guid_128_to_string(hash), NULL);
}

void dt_stray_sign(struct mailbox *box, const char *guid, struct dt_stray_signing *signing_r)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);

	i_zero(signing_r);
	/* The lock's file says on which host its process lives: it must be the true name. It can be taken twice. */
	if (maildir_uidlist_lock(mbox->uidlist) > 0)
		signing_r->locked = mbox->uidlist;
	signing_r->hostname = my_hostname;
	my_hostname = t_strconcat(my_hostname, stray_sign(guid), NULL);
}

void dt_stray_unsign(struct dt_stray_signing *signing)
{
	my_hostname = signing->hostname;
	if (signing->locked != NULL)
		maildir_uidlist_unlock(signing->locked);
}

bool dt_stray_is(const char *guid)
{
	return strstr(guid, STRAY_SIGN) != NULL;
}

/* As maildir_filename_check_conflicts(), which also compares the sizes. */
bool dt_stray_needs_name(struct mailbox *box, const char *guid)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);

	if (strstr(guid, ",S=") == NULL || strstr(guid, ",W=") == NULL)
		return TRUE;
	return maildir_uidlist_refresh(mbox->uidlist) < 0 ||
		maildir_uidlist_get_full_filename(mbox->uidlist, guid) != NULL;
}

int dt_worker_stray(const char *guid, uint32_t *uid_r)
{
	struct mailbox *box = dt_worker_box();
	struct mailbox_transaction_context *trans;
	struct mail *mail;
	uint32_t seq, count = mail_index_view_get_messages_count(box->view);
	int ret = 0;

	if (!dt_spans_is_maildir(box))
		return 0;
	T_BEGIN {
		const char *sign = stray_sign(guid);

		trans = dt_worker_read_begin(box);
		mail = mail_alloc(trans, MAIL_FETCH_GUID, NULL);
		for (seq = 1; seq <= count && ret == 0; seq++) T_BEGIN {
			const char *name;

			mail_set_seq(mail, seq);
			*uid_r = mail->uid;
			ret = dt_worker_get_guid(mail, mail->uid, &name);
			if (ret > 0 && strstr(name, sign) == NULL)
				ret = 0;
		} T_END;
		mail_free(&mail);
		mailbox_transaction_rollback(&trans);
	} T_END;
	return ret;
}

bool dt_worker_may_be_ours(uint32_t uid, const char *guid)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(dt_worker_box());
	enum maildir_uidlist_rec_flag flags;
	const char *name;
	/* If it is gone nobody knows. */
	bool is_ours = TRUE;

	T_BEGIN {
		if (maildir_uidlist_lookup(mbox->uidlist, uid, &flags, &name) > 0) {
			is_ours = strstr(name, stray_sign(guid)) != NULL ||
				strcmp(t_strcut(name, MAILDIR_INFO_SEP), guid) == 0;
		}
	} T_END;
	return is_ours;
}

int dt_worker_adopt(uint32_t uid, const char *guid)
{
	struct mailbox *box = dt_worker_box();
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);

	maildir_uidlist_set_ext(mbox->uidlist, uid, MAILDIR_UIDLIST_REC_EXT_GUID, guid);
	if (maildir_uidlist_update(mbox->uidlist) < 0)
		return dt_worker_set_box_error(box, "Writing dovecot-uidlist");
	return 1;
}
