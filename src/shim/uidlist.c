/* See uidlist.h. */
#include "compat.h"
#include "mail-storage-private.h"
#include "mailbox-list-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "spans.h"
#include "uidlist.h"

#include <sys/stat.h>

static bool uidlist_may_have_left_lock;

void dt_uidlist_await(struct mailbox *box)
{
	struct maildir_mailbox *mbox;
	struct stat st;
	const char *dir;

	if (!dt_spans_is_maildir(box) || mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_CONTROL, &dir) <= 0)
		return;
	mbox = MAILDIR_MAILBOX(box);
	if (maildir_uidlist_is_read(mbox->uidlist) ||
	    stat(t_strconcat(dir, "/"MAILDIR_UIDLIST_NAME, NULL), &st) == 0 || errno != ENOENT)
		return;
	/* If that fails, it fails for Dovecot as well. */
	if (maildir_uidlist_lock(mbox->uidlist) > 0) {
		(void)maildir_uidlist_refresh(mbox->uidlist);
		maildir_uidlist_unlock(mbox->uidlist);
	} else {
		uidlist_may_have_left_lock = TRUE;
	}
}

bool dt_uidlist_may_have_left_lock(void)
{
	return uidlist_may_have_left_lock;
}
