#include "compat.h"
#include "mail-storage-private.h"
#include "mail-index-private.h"
#include "mark.h"

bool dt_mark_view_has_diverged(struct mail_index_view *view)
{
	const unsigned char *bytes;
	const void *data;
	uint32_t ext_id;
	size_t size;

	/* It is not ours to register. */
	if (!mail_index_ext_lookup(view->index, DT_MARK_NAME, &ext_id))
		return FALSE;
	mail_index_get_header_ext(view, ext_id, &data, &size);
	bytes = data;
	return size > 4 && memcmp(bytes, DT_MARK_MAGIC, 4) == 0 && (bytes[4] & DT_MARK_DIVERGED) != 0;
}

bool dt_mark_has_diverged(struct mailbox *box)
{
	return dt_mark_view_has_diverged(box->view);
}
