/* A storage's last error, over what is done to the storage behind its caller's back. */
#ifndef DOVETAIL_LAST_ERROR_H
#define DOVETAIL_LAST_ERROR_H

#include "lib.h"
#include "array.h"
#include "mail-storage-private.h"

static inline void dt_error_swap(struct mail_storage *storage)
{
	struct mail_storage_error *err =
		array_idx_modifiable(&storage->error_stack, array_count(&storage->error_stack) - 1);
	char *text = err->error_string;

	err->error_string = storage->error_string;
	storage->error_string = text;
	text = err->last_internal_error;
	err->last_internal_error = storage->last_internal_error;
	storage->last_internal_error = text;
}

/* As mail_storage_last_error_push(), but the string itself comes back, and not a copy: imap's COPY holds it from the failed
   commit until it has sent it, and commits and closes mailboxes in between. */
static inline void dt_error_keep(struct mail_storage *storage)
{
	mail_storage_last_error_push(storage);
	dt_error_swap(storage);
}

static inline void dt_error_give_back(struct mail_storage *storage)
{
	mail_storage_last_error_pop(storage);
}

/* Instead of that: there is another one since then. */
static inline void dt_error_forget(struct mail_storage *storage)
{
	struct mail_storage_error *err;

	dt_error_swap(storage);
	err = array_idx_modifiable(&storage->error_stack, array_count(&storage->error_stack) - 1);
	err->error = storage->error;
	err->last_error_is_internal = storage->last_error_is_internal;
	mail_storage_last_error_pop(storage);
}

#endif
