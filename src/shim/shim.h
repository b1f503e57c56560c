/* What the shim's files share, and the functions that Rust calls. What C calls is in include/dovetail.h, made of
   src/host by cbindgen. */
#ifndef DOVETAIL_SHIM_H
#define DOVETAIL_SHIM_H

#include "dovetail.h"

struct mail_user;

/* settings.c

   Every dovetail_* setting that is set, for a user or (NULL) for this process without a user. `base_dir` is among
   them. Returns 0, or -1 and a full sentence. */
int dt_settings_each(struct mail_user *user, dt_setting_each each, void *context, const char **error_r);

/* log.c */

enum dt_log_level { DT_LOG_DEBUG, DT_LOG_INFO, DT_LOG_WARNING, DT_LOG_ERROR };
void dt_log(int level, const char *text);
/* An event of Dovecot's, whose text is logged only if log_debug asks for it. fields: `count` keys and values in turn. */
void dt_event(const char *name, const char *const *fields, size_t count, const char *text);

#endif
