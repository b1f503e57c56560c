/* Everything in which Dovecot 2.3 and 2.4 differ, so that no other file needs an #if on the version.
   Include it first: it brings Dovecot's lib.h. A file that wants one of the larger parts defines its DT_COMPAT_ name
   before. */
#ifndef DOVETAIL_COMPAT_H
#define DOVETAIL_COMPAT_H

#include "config.h"
#include "lib.h"

#include <dlfcn.h>

/* 2.4.0 replaced plugin {} settings by typed ones. */
#if DOVECOT_VERSION_MAJOR > 2 || (DOVECOT_VERSION_MAJOR == 2 && DOVECOT_VERSION_MINOR >= 4)
#  define DOVETAIL_DOVECOT_24 1
#endif

/* ---- notify plugin: looked up, because doveadm loads us before it and a link-time reference binds to nothing ---- */

#ifdef DT_COMPAT_NOTIFY
#include "notify-plugin.h"

static inline struct notify_context *compat_notify_register(const struct notify_vfuncs *vfuncs)
{
	typeof(notify_register) *func = dlsym(RTLD_DEFAULT, "notify_register");

	return func == NULL ? NULL : func(vfuncs);
}

static inline void compat_notify_unregister(struct notify_context **ctx)
{
	typeof(notify_unregister) *func = dlsym(RTLD_DEFAULT, "notify_unregister");

	if (func != NULL && *ctx != NULL) {
#ifdef DOVETAIL_DOVECOT_24
		func(ctx);
#else
		func(*ctx);
#endif
	}
	*ctx = NULL;
}
#endif

/* ---- settings: plugin {} on 2.3, typed ones on 2.4 ---- */

#ifdef DT_COMPAT_SETTINGS
#include "array.h"
#include "mail-user.h"
#include "mail-storage-settings.h"
#include "master-service.h"
#include "master-service-settings.h"
#include "shim.h"

#ifdef DOVETAIL_DOVECOT_24
#include "settings.h"
#include "settings-parser.h"

/* All are strings without %variables: a value that Dovecot's config process refused would stop the mail service. */
struct dovetail_settings {
	pool_t pool;
	const char *dovetail_server;
	const char *dovetail_peers;
	const char *dovetail_socket;
	const char *dovetail_worker_socket;
	const char *dovetail_workers;
	const char *dovetail_worker_plugins;
	const char *dovetail_process_queue_size;
	const char *dovetail_relay_queue_size;
	const char *dovetail_state_dir;
	const char *dovetail_journal_size;
	const char *dovetail_journal_days;
	const char *dovetail_compare_interval;
	const char *dovetail_inline_body_size;
	const char *dovetail_ack;
	const char *dovetail_ack_timeout;
	const char *dovetail_ack_on_timeout;
	const char *dovetail_ca;
	const char *dovetail_cert;
	const char *dovetail_key;
	const char *dovetail_peer_fingerprints;
	const char *dovetail_insecure_plaintext;
};

#define DEF(name) { \
	.type = SET_STR_NOVARS, .key = #name, \
	.offset = offsetof(struct dovetail_settings, name) }
static const struct setting_define dovetail_setting_defines[] = {
	DEF(dovetail_server),
	DEF(dovetail_peers),
	DEF(dovetail_socket),
	DEF(dovetail_worker_socket),
	DEF(dovetail_workers),
	DEF(dovetail_worker_plugins),
	DEF(dovetail_process_queue_size),
	DEF(dovetail_relay_queue_size),
	DEF(dovetail_state_dir),
	DEF(dovetail_journal_size),
	DEF(dovetail_journal_days),
	DEF(dovetail_compare_interval),
	DEF(dovetail_inline_body_size),
	DEF(dovetail_ack),
	DEF(dovetail_ack_timeout),
	DEF(dovetail_ack_on_timeout),
	DEF(dovetail_ca),
	DEF(dovetail_cert),
	DEF(dovetail_key),
	DEF(dovetail_peer_fingerprints),
	DEF(dovetail_insecure_plaintext),
	SETTING_DEFINE_LIST_END
};
#undef DEF

/* Empty means "not set": the defaults are src/settings.rs's. */
static const struct dovetail_settings dovetail_default_settings = {
	.dovetail_server = "",
	.dovetail_peers = "",
	.dovetail_socket = "",
	.dovetail_worker_socket = "",
	.dovetail_workers = "",
	.dovetail_worker_plugins = "",
	.dovetail_process_queue_size = "",
	.dovetail_relay_queue_size = "",
	.dovetail_state_dir = "",
	.dovetail_journal_size = "",
	.dovetail_journal_days = "",
	.dovetail_compare_interval = "",
	.dovetail_inline_body_size = "",
	.dovetail_ack = "",
	.dovetail_ack_timeout = "",
	.dovetail_ack_on_timeout = "",
	.dovetail_ca = "",
	.dovetail_cert = "",
	.dovetail_key = "",
	.dovetail_peer_fingerprints = "",
	.dovetail_insecure_plaintext = "",
};

const struct setting_parser_info dovetail_setting_parser_info = {
	.name = "dovetail",
	.defines = dovetail_setting_defines,
	.defaults = &dovetail_default_settings,
	.struct_size = sizeof(struct dovetail_settings),
	.pool_offset1 = 1 + offsetof(struct dovetail_settings, pool),
};

static inline int compat_settings_each(struct mail_user *user, dt_setting_each each, void *context, const char **error_r)
{
	struct event *event = user != NULL ? user->event : master_service_get_event(master_service);
	const struct dovetail_settings *set;
	const struct master_service_settings *master_set = master_service_get_service_settings(master_service);

	if (settings_get(event, &dovetail_setting_parser_info, 0, &set, error_r) < 0)
		return -1;
	for (unsigned int i = 0; dovetail_setting_defines[i].key != NULL; i++) {
		const struct setting_define *def = &dovetail_setting_defines[i];
		const char *const *value = CONST_PTR_OFFSET(set, def->offset);

		if (**value != '\0')
			each(context, def->key, *value);
	}
	settings_free(set);
	if (master_set != NULL) {
		each(context, "base_dir", master_set->base_dir);
		each(context, "state_dir", master_set->state_dir);
	}
	return 0;
}

#else
#include "doveadm-settings.h"

/* A module for Dovecot's config process exists on 2.4 only. */
const char dovetail_setting_parser_info[1] = "";

static const struct mail_user_settings *dt_settings_read(const char **error_r)
{
	static const struct mail_user_settings *cached = NULL;
	static const struct setting_parser_info *roots[] = { &mail_user_setting_parser_info, NULL };
	struct master_service_settings_input input;
	struct master_service_settings_output output;
	void **sets;

	if (cached != NULL)
		return cached;
	i_zero(&input);
	input.roots = roots;
	input.module = "mail";
	input.service = master_service_get_name(master_service);
	if (master_service_settings_read(master_service, &input, &output, error_r) < 0)
		return NULL;
	sets = master_service_settings_get_others(master_service);
	cached = sets[0];
	return cached;
}

static void
dt_plugin_envs_each(const ARRAY_TYPE(const_string) *envs, dt_setting_each each, void *context)
{
	const char *const *env;
	unsigned int count;

	if (!array_is_created(envs))
		return;
	env = array_get(envs, &count);
	for (unsigned int i = 0; i + 1 < count; i += 2) {
		if (str_begins(env[i], "dovetail_"))
			each(context, env[i], env[i + 1]);
	}
}

static inline int compat_settings_each(struct mail_user *user, dt_setting_each each, void *context, const char **error_r)
{
	const struct doveadm_settings **doveadm_set = dlsym(RTLD_DEFAULT, "doveadm_settings");
	const struct mail_user_settings *set;

	if (user == NULL && doveadm_set != NULL && *doveadm_set != NULL) {
		dt_plugin_envs_each((const void *)&(*doveadm_set)->plugin_envs, each, context);
		each(context, "base_dir", (*doveadm_set)->base_dir);
		return 0;
	}
	set = user != NULL ? user->set : dt_settings_read(error_r);
	if (set == NULL)
		return -1;
	dt_plugin_envs_each((const void *)&set->plugin_envs, each, context);
	each(context, "base_dir", set->base_dir);
	each(context, "state_dir", master_service_settings_get(master_service)->state_dir);
	return 0;
}
#endif
#endif

/* ---- names of mailboxes ---- */

#ifdef DT_COMPAT_NAMES
#include "mail-namespace.h"
#include "mail-storage-settings.h"
#include "mailbox-list-private.h"

/* What the storage separates by, if Dovecot refuses names that have it (mailbox_verify_name(), mailbox_list_is_valid_fs_name()):
   its hierarchy separator, or the "/" of its files; otherwise 0. */
static inline char compat_storage_separator(const struct mail_namespace *ns)
{
	char ns_separator = mail_namespace_get_sep((struct mail_namespace *)ns);
	char separator = mailbox_list_get_hierarchy_sep(ns->list);
#ifdef DOVETAIL_DOVECOT_24
	bool escapes = ns->list->mail_set->mailbox_list_storage_escape_char[0] != '\0';
#else
	bool escapes = ns->list->set.storage_name_escape_char != '\0';
#endif

	if (separator == ns_separator && (ns->list->props & MAILBOX_LIST_PROP_NO_ROOT) == 0)
		separator = '/';
	return escapes || separator == ns_separator ? '\0' : separator;
}
#endif

/* ---- service.c and worker.c ---- */

#ifdef DT_COMPAT_SERVICE
#include "master-interface.h"
#include "master-service.h"
#include "master-service-settings.h"

/* A process that reads settings for many users keeps the connection to 2.3's config service open; in 2.4 all settings
   come in one file. */
#ifdef DOVETAIL_DOVECOT_24
#define COMPAT_MASTER_SERVICE_FLAG_MANY_USERS 0
#else
#define COMPAT_MASTER_SERVICE_FLAG_MANY_USERS MASTER_SERVICE_FLAG_KEEP_CONFIG_OPEN
#endif

static inline int compat_master_service_settings_read(const char **error_r)
{
#ifdef DOVETAIL_DOVECOT_24
	return master_service_settings_read_simple(master_service, error_r);
#else
	return master_service_settings_read_simple(master_service, NULL, error_r);
#endif
}
#endif

/* How the worker uses only some of a user's mail_plugins, and waits less for locks. 2.4: the setting is overridden at the lookup, which also loads
   them. 2.3: none are loaded at the lookup; we load ours, and set them after the lookup. */
#ifdef DT_COMPAT_WORKER
#include "array.h"
#include "module-dir.h"
#include "settings-parser.h"
#include "master-service.h"
#include "master-service-settings.h"
#include "mail-storage-service.h"
#include "mail-storage-settings.h"
#include "mailbox-list-private.h"

/* A user whose mailbox is locked for longer waits for its turn, and the worker goes on with others. */
#define COMPAT_WORKER_LOCK_TIMEOUT(brief) ((brief) ? "1 secs" : "10 secs")

#define COMPAT_WORKER_FLAGS \
	(MAIL_STORAGE_SERVICE_FLAG_USERDB_LOOKUP | \
	 MAIL_STORAGE_SERVICE_FLAG_TEMP_PRIV_DROP | \
	 MAIL_STORAGE_SERVICE_FLAG_NO_IDLE_TIMEOUT)

#ifdef DOVETAIL_DOVECOT_24
#include "settings.h"

static inline struct mail_storage_service_ctx *compat_storage_service_init(void)
{
	return mail_storage_service_init(master_service, COMPAT_WORKER_FLAGS);
}

/* Whether the list takes folders away that are no mailboxes, where it is configured so. */
static inline void compat_list_drop_noselect(struct mailbox_list *list, bool drop)
{
	struct mail_storage_settings *set = (struct mail_storage_settings *)list->mail_set;

	set->mailbox_list_drop_noselect = drop && (list->props & MAILBOX_LIST_PROP_NO_NOSELECT) != 0;
}

/* Fills the input, but for the user's name. In the data stack. */
static inline void
compat_storage_service_input_init(struct mail_storage_service_input *input, const char *plugins, bool brief)
{
	const char **overrides = t_new(const char *, 3);

	overrides[0] = t_strconcat("mail_plugins=", plugins, NULL);
	overrides[1] = t_strconcat("mail_max_lock_timeout=", COMPAT_WORKER_LOCK_TIMEOUT(brief), NULL);
	i_zero(input);
	input->service = master_service_get_name(master_service);
	input->code_override_fields = overrides;
}

static inline int
compat_storage_service_user_override(struct mail_storage_service_user *user ATTR_UNUSED,
				     const char *plugins ATTR_UNUSED, bool brief ATTR_UNUSED,
				     const char **error_r ATTR_UNUSED)
{
	return 0;
}

/* The mail_plugins of all users: a NULL-terminated list in the data stack. */
static inline int
compat_mail_plugins_global(struct mail_storage_service_ctx *ctx ATTR_UNUSED,
			   const char *const **plugins_r, const char **error_r)
{
	const struct mail_user_settings *set;

	if (settings_get(master_service_get_event(master_service), &mail_user_setting_parser_info,
			 SETTINGS_GET_FLAG_NO_EXPAND, &set, error_r) < 0)
		return -1;
	*plugins_r = array_is_created(&set->mail_plugins) ?
		p_strarray_dup(pool_datastack_create(), settings_boollist_get(&set->mail_plugins)) :
		t_new(const char *, 1);
	settings_free(set);
	return 0;
}

static inline int
compat_mail_plugins_load(struct mail_storage_service_ctx *ctx ATTR_UNUSED,
			 const char *plugins ATTR_UNUSED, const char **error_r ATTR_UNUSED)
{
	return 0;
}
#else
static inline struct mail_storage_service_ctx *compat_storage_service_init(void)
{
	return mail_storage_service_init(master_service, NULL,
					 COMPAT_WORKER_FLAGS | MAIL_STORAGE_SERVICE_FLAG_NO_PLUGINS);
}

static inline void compat_list_drop_noselect(struct mailbox_list *list, bool drop)
{
	list->set.no_noselect = drop && (list->props & MAILBOX_LIST_PROP_NO_NOSELECT) != 0;
}

static inline void
compat_storage_service_input_init(struct mail_storage_service_input *input, const char *plugins ATTR_UNUSED,
				  bool brief ATTR_UNUSED)
{
	i_zero(input);
	input->module = "mail";
	input->service = master_service_get_name(master_service);
}

static inline int
compat_storage_service_user_override(struct mail_storage_service_user *user, const char *plugins, bool brief,
				     const char **error_r)
{
	return mail_storage_service_user_set_setting(user, "mail_plugins", plugins, error_r) > 0 &&
		mail_storage_service_user_set_setting(user, "mail_max_lock_timeout",
						      COMPAT_WORKER_LOCK_TIMEOUT(brief), error_r) > 0 ? 0 : -1;
}

static inline const struct mail_user_settings *
compat_mail_user_settings_global(struct mail_storage_service_ctx *ctx, const char **error_r)
{
	const struct setting_parser_context *parser;
	const struct setting_parser_info *user_info;
	struct mail_storage_service_input input;

	compat_storage_service_input_init(&input, NULL, FALSE);
	if (mail_storage_service_read_settings(ctx, &input, pool_datastack_create(),
					       &user_info, &parser, error_r) < 0)
		return NULL;
	return master_service_settings_parser_get_others(master_service, parser)[0];
}

static inline int
compat_mail_plugins_global(struct mail_storage_service_ctx *ctx,
			   const char *const **plugins_r, const char **error_r)
{
	const struct mail_user_settings *set;

	if ((set = compat_mail_user_settings_global(ctx, error_r)) == NULL)
		return -1;
	*plugins_r = t_strsplit_spaces(set->mail_plugins, ", ");
	return 0;
}

static inline int
compat_mail_plugins_load(struct mail_storage_service_ctx *ctx, const char *plugins, const char **error_r)
{
	struct module_dir_load_settings mod_set;
	const struct mail_user_settings *set;

	if (*plugins == '\0')
		return 0;
	if ((set = compat_mail_user_settings_global(ctx, error_r)) == NULL)
		return -1;
	i_zero(&mod_set);
	mod_set.abi_version = DOVECOT_ABI_VERSION;
	mod_set.binary_name = master_service_get_name(master_service);
	mod_set.setting_name = "dovetail_worker_plugins";
	mod_set.require_init_funcs = TRUE;
	return module_dir_try_load_missing(&mail_storage_service_modules, set->mail_plugin_dir, plugins,
					   &mod_set, error_r);
}
#endif
#endif

#endif
