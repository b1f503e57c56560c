/* The only way from Rust into Dovecot's log and events. Main thread only. */
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

void dt_event(const char *name, const char *const *fields, size_t count, const char *text)
{
	struct event *event = event_create(NULL);

	event_set_append_log_prefix(event, "dovetail: ");
	event_set_name(event, name);
	for (size_t i = 0; i < count; i++)
		event_add_str(event, fields[i * 2], fields[i * 2 + 1]);
	e_debug(event, "%s", text);
	event_unref(&event);
}
