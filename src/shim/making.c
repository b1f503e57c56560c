/* See making.h. */
#include "compat.h"
#include "mail-storage-private.h"
#include "mailbox-list-private.h"
#include "spans.h"
#include "making.h"

#include <sys/stat.h>
#include <time.h>

/* A mailbox is made at once, if nobody is stopped in between. */
#define DT_MAKING_SECS 2
/* The log of a mailbox of dbox that is being made is shorter. */
#define DT_MAKING_LOG_SIZE 4096

/* By what is made last: of a maildir tmp/, of dbox the index's UIDVALIDITY. */
static bool making_is_done(struct mailbox *box, const char *path)
{
	const char *index;
	struct stat st;
	bool is_done;

	if (dt_spans_is_maildir(box))
		return stat(t_strconcat(path, "/tmp", NULL), &st) == 0;
	if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_INDEX, &index) <= 0)
		return TRUE;
	index = t_strconcat(index, "/", box->index_prefix, NULL);
	if (stat(index, &st) == 0)
		return TRUE;
	if (stat(t_strconcat(index, ".log", NULL), &st) < 0)
		return FALSE;
	if (st.st_size >= DT_MAKING_LOG_SIZE)
		return TRUE;

	/* Like one who makes it: what is missing is not made. */
	box = mailbox_alloc(box->list, box->vname, MAILBOX_FLAG_READONLY | MAILBOX_FLAG_IGNORE_ACLS);
	box->creating = TRUE;
	is_done = mailbox_open(box) < 0 || mail_index_get_header(box->view)->uid_validity != 0;
	mailbox_free(&box);
	return is_done;
}

bool dt_making_is(struct mailbox *box)
{
	const char *path;
	struct stat st;
	bool is = FALSE;

	if (mailbox_is_autocreated(box))
		return FALSE;
	T_BEGIN {
		if (mailbox_get_path_to(box, MAILBOX_LIST_PATH_TYPE_MAILBOX, &path) > 0 &&
		    (stat(path, &st) == 0 ? st.st_mtime + DT_MAKING_SECS >= time(NULL) : errno == ENOENT))
			is = !making_is_done(box, path);
	} T_END;
	return is;
}
