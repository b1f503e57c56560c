/* The only way from Rust into Dovecot's log. Main thread only. */
#include "compat.h"
#include "shim.h"

void dt_log(int level, const char *text)
{
	switch (level) {
	case DT_LOG_ERROR:
		i_error("dovetail: %s", text);
		break;
	case DT_LOG_WARNING:
		i_warning("dovetail: %s", text);
		break;
	case DT_LOG_INFO:
		i_info("dovetail: %s", text);
		break;
	default:
		i_debug("dovetail: %s", text);
		break;
	}
}
