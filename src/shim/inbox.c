#include "compat.h"
#include "guid.h"
#include "sha1.h"
#include "mail-user.h"
#include "mail-namespace.h"
#include "mail-storage-private.h"
#include "mail-storage-hooks.h"
#include "inbox.h"

#define INBOX_CONTEXT_REQUIRE(obj) MODULE_CONTEXT_REQUIRE(obj, inbox_storage_module)

static MODULE_CONTEXT_DEFINE_INIT(inbox_storage_module, &mail_storage_module_register);

void dt_inbox_guid(const struct mail_user *user, unsigned char guid_r[16])
{
	unsigned char digest[SHA1_RESULTLEN];

	T_BEGIN {
		const char *seed = t_strconcat("dovetail INBOX ", user->username, NULL);

		sha1_get_digest(seed, strlen(seed), digest);
	} T_END;
	memcpy(guid_r, digest, GUID_128_SIZE);
}

static int inbox_create_box(struct mailbox *box, const struct mailbox_update *update, bool directory)
{
	union mailbox_module_context *ctx = INBOX_CONTEXT_REQUIRE(box);
	struct mailbox_update inbox_update;

	if (update == NULL || guid_128_is_empty(update->mailbox_guid)) {
		if (update != NULL)
			inbox_update = *update;
		else
			i_zero(&inbox_update);
		dt_inbox_guid(mailbox_get_namespace(box)->owner, inbox_update.mailbox_guid);
		update = &inbox_update;
	}
	return ctx->super.create_box(box, update, directory);
}

/* As a maildir has it. A dbox would take the INBOX's GUID along, and the next INBOX is born with the same. */
static int inbox_rename_box(struct mailbox *src, struct mailbox *dest ATTR_UNUSED)
{
	mail_storage_set_error(src->storage, MAIL_ERROR_NOTPOSSIBLE, "Renaming INBOX isn't supported.");
	return -1;
}

static void inbox_mailbox_allocated(struct mailbox *box)
{
	struct mailbox_vfuncs *v = box->vlast;
	union mailbox_module_context *ctx;

	if (!box->inbox_user || mailbox_get_namespace(box)->owner == NULL)
		return;
	ctx = p_new(box->pool, union mailbox_module_context, 1);
	ctx->super = *v;
	box->vlast = &ctx->super;
	v->create_box = inbox_create_box;
	v->rename_box = inbox_rename_box;
	MODULE_CONTEXT_SET_SELF(box, inbox_storage_module, ctx);
}

static const struct mail_storage_hooks inbox_hooks = {
	.mailbox_allocated = inbox_mailbox_allocated,
};

void dt_inbox_init(struct module *module)
{
	if (module != NULL)
		mail_storage_hooks_add(module, &inbox_hooks);
	else
		mail_storage_hooks_add_internal(&inbox_hooks);
}

void dt_inbox_deinit(struct module *module)
{
	if (module != NULL)
		mail_storage_hooks_remove(&inbox_hooks);
	else
		mail_storage_hooks_remove_internal(&inbox_hooks);
}
