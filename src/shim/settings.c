/* Where settings come from. What they mean is decided in src/settings.rs, so that both versions accept and refuse the
   same values with the same words. */
#define DT_COMPAT_SETTINGS
#include "compat.h"

int dt_settings_each(struct mail_user *user, dt_setting_each each, void *context, const char **error_r)
{
	return compat_settings_each(user, each, context, error_r);
}
