/* `doveadm dovetail ...`: parses arguments and prints; what it says comes from the relay. */
#include "compat.h"
#include "time-util.h"
#include "net.h"
#include "doveadm.h"
#include "doveadm-cmd.h"
#include "doveadm-print.h"
#include "shim.h"

#include <sysexits.h>

/* They exist in the doveadm binary only, and this library is loaded elsewhere too. */
#pragma weak doveadm_cmd_register_ver2
#pragma weak doveadm_print_init
#pragma weak doveadm_print_is_initialized
#pragma weak doveadm_print_header
#pragma weak doveadm_print_header_simple
#pragma weak doveadm_print
#pragma weak doveadm_print_num
#pragma weak doveadm_exit_code
#pragma weak doveadm_cmd_param_str
#pragma weak doveadm_cmd_param_bool
#pragma weak doveadm_cmd_param_array

#define DT_DATE_FORMAT "%Y-%m-%d"
#define DT_TIME_FORMAT "%Y-%m-%d %H:%M:%S"

static void cmd_dovetail_status_row(void *context, const struct dt_status_row *row)
{
	doveadm_print(row->peer);
	doveadm_print(row->state);
	doveadm_print_num(row->pending);
	doveadm_print_num(row->behind_secs);
	doveadm_print_num(row->dropped);
	doveadm_print_num(row->process_dropped);
	doveadm_print_num(row->unacknowledged);
	doveadm_print_num(row->failed);
	doveadm_print(row->conflicts);
	doveadm_print(row->last_error);
}

static void cmd_dovetail_status(struct doveadm_cmd_context *cctx)
{
	const char *user = NULL;
	char error[1024];

	(void)doveadm_cmd_param_str(cctx, "user", &user);
	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("peer");
	doveadm_print_header_simple("state");
	doveadm_print_header("pending", "pending", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header("behind_secs", "behind_secs", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header("dropped", "dropped", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header("process_dropped", "process_dropped", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header("unacknowledged", "unacknowledged", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header("failed", "failed", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header_simple("conflicts");
	doveadm_print_header("last_error", "last_error", DOVEADM_PRINT_HEADER_FLAG_EXPAND);
	if (dt_rs_status(user, cmd_dovetail_status_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
	}
}

static void cmd_dovetail_failed_row(void *context, const struct dt_failed_row *row)
{
	doveadm_print(row->peer);
	doveadm_print(row->user);
	doveadm_print(row->mailbox_guid);
	doveadm_print_num(row->seq);
	doveadm_print(t_strflocaltime(DT_TIME_FORMAT, (time_t)row->since));
	doveadm_print(row->error);
}

static void cmd_dovetail_failed(struct doveadm_cmd_context *cctx)
{
	char error[1024];

	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("peer");
	doveadm_print_header_simple("user");
	doveadm_print_header_simple("mailbox_guid");
	doveadm_print_header("seq", "seq", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header_simple("since");
	doveadm_print_header("error", "error", DOVEADM_PRINT_HEADER_FLAG_EXPAND);
	if (dt_rs_failed(cmd_dovetail_failed_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
	}
}

static void cmd_dovetail_failed_clear(struct doveadm_cmd_context *cctx)
{
	const char *user = NULL;
	char error[1024];
	uint64_t cleared = 0;
	bool all = FALSE;

	(void)doveadm_cmd_param_str(cctx, "user", &user);
	(void)doveadm_cmd_param_bool(cctx, "all-users", &all);
	if ((user != NULL) == all) {
		i_error("Either -u <user> or -A must be given");
		doveadm_exit_code = EX_USAGE;
		return;
	}
	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header("cleared", "cleared", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	if (dt_rs_failed_clear(user, &cleared, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
		return;
	}
	doveadm_print_num(cleared);
}

static void cmd_dovetail_waiting_row(void *context, const struct dt_waiting_row *row)
{
	doveadm_print(row->user);
	doveadm_print(row->peer);
	doveadm_print(row->what);
	doveadm_print(t_strflocaltime(DT_TIME_FORMAT, (time_t)row->since));
	doveadm_print(row->next_try == 0 ? "now" : t_strflocaltime(DT_TIME_FORMAT, (time_t)row->next_try));
	doveadm_print(row->reason);
}

static void cmd_dovetail_waiting(struct doveadm_cmd_context *cctx)
{
	char error[1024];

	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("user");
	doveadm_print_header_simple("peer");
	doveadm_print_header_simple("what");
	doveadm_print_header_simple("since");
	doveadm_print_header_simple("next_try");
	doveadm_print_header("reason", "reason", DOVEADM_PRINT_HEADER_FLAG_EXPAND);
	if (dt_rs_waiting(cmd_dovetail_waiting_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
	}
}

static void cmd_dovetail_cert_row(void *context, const struct dt_cert_row *row)
{
	doveadm_print(*row->name == '\0' ? "-" : row->name);
	doveadm_print(row->not_after == 0 ? "?" : t_strfgmtime(DT_DATE_FORMAT, (time_t)row->not_after));
	doveadm_print(row->file);
	doveadm_print(row->fingerprint);
}

static const char *cmd_dovetail_cert_begin(struct doveadm_cmd_context *cctx)
{
	const char *folder = NULL;

	(void)doveadm_cmd_param_str(cctx, "directory", &folder);
	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("server");
	doveadm_print_header_simple("expires");
	doveadm_print_header_simple("file");
	doveadm_print_header("sha256", "sha256", DOVEADM_PRINT_HEADER_FLAG_EXPAND);
	return folder;
}

static void cmd_dovetail_cert_init(struct doveadm_cmd_context *cctx)
{
	const char *folder = cmd_dovetail_cert_begin(cctx);
	char error[1024];

	if (dt_rs_cert_init(folder, cmd_dovetail_cert_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_CANTCREAT;
	}
}

static void cmd_dovetail_cert_issue(struct doveadm_cmd_context *cctx)
{
	const char *const *names, *folder;
	char error[1024];

	if (!doveadm_cmd_param_array(cctx, "server", &names) || *names == NULL) {
		i_error("The names of servers must be given");
		doveadm_exit_code = EX_USAGE;
		return;
	}
	folder = cmd_dovetail_cert_begin(cctx);
	if (dt_rs_cert_issue(folder, names, cmd_dovetail_cert_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_CANTCREAT;
	}
}

static void cmd_dovetail_cert_show(struct doveadm_cmd_context *cctx)
{
	const char *folder = cmd_dovetail_cert_begin(cctx);
	char error[1024];

	if (dt_rs_cert_show(folder, cmd_dovetail_cert_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_NOINPUT;
	}
}

static void cmd_dovetail_difference_row(void *context, const struct dt_difference_row *row)
{
	doveadm_print(row->user);
	doveadm_print(row->peer);
	doveadm_print(row->mailbox);
	doveadm_print(row->what);
	doveadm_print_num(row->uid);
	doveadm_print(row->detail);
}

/* What differs is printed; with repair, it does not any more when the command ends. */
static void cmd_dovetail_compare_users(struct doveadm_cmd_context *cctx, bool repair)
{
	const char *user = NULL;
	char error[1024];
	bool all = FALSE, bodies = FALSE;

	(void)doveadm_cmd_param_str(cctx, "user", &user);
	(void)doveadm_cmd_param_bool(cctx, "all-users", &all);
	(void)doveadm_cmd_param_bool(cctx, "bodies", &bodies);
	if ((user != NULL) == all) {
		i_error("Either -u <user> or -A must be given");
		doveadm_exit_code = EX_USAGE;
		return;
	}
	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("user");
	doveadm_print_header_simple("peer");
	doveadm_print_header_simple("mailbox");
	doveadm_print_header_simple("what");
	doveadm_print_header("uid", "uid", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	doveadm_print_header("detail", "detail", DOVEADM_PRINT_HEADER_FLAG_EXPAND);
	if (dt_rs_compare(user, repair, bodies, cmd_dovetail_difference_row, NULL, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
	}
}

static void cmd_dovetail_compare(struct doveadm_cmd_context *cctx)
{
	cmd_dovetail_compare_users(cctx, FALSE);
}

static void cmd_dovetail_resync(struct doveadm_cmd_context *cctx)
{
	bool nothing = FALSE;

	(void)doveadm_cmd_param_bool(cctx, "no-change", &nothing);
	cmd_dovetail_compare_users(cctx, !nothing);
}

static void cmd_dovetail_progress(struct doveadm_cmd_context *cctx)
{
	static const char *const headers[] = { "users_done", "users", "mails_done", "mails", "mails_per_sec",
					       "secs", "secs_left" };
	struct dt_progress progress;
	char error[1024];
	unsigned int i;

	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header_simple("state");
	for (i = 0; i < N_ELEMENTS(headers); i++)
		doveadm_print_header(headers[i], headers[i], DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	if (dt_rs_progress(&progress, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
		return;
	}
	doveadm_print(progress.is_running ? "running" : "idle");
	doveadm_print_num(progress.users_done);
	doveadm_print_num(progress.users);
	doveadm_print_num(progress.mails_done);
	doveadm_print_num(progress.mails);
	doveadm_print_num(progress.mails_per_sec);
	doveadm_print_num(progress.secs);
	doveadm_print_num(progress.secs_left);
	if (progress.background_users == 0)
		return;
	doveadm_print("background");
	doveadm_print_num(progress.background_users_done);
	doveadm_print_num(progress.background_users);
	for (i = 0; i < 4; i++)
		doveadm_print_num(0);
	doveadm_print_num(progress.background_secs_left);
}

static void cmd_dovetail_wait(struct doveadm_cmd_context *cctx)
{
	const char *user = NULL, *secs = NULL;
	char error[1024];
	int ret;

	(void)doveadm_cmd_param_str(cctx, "user", &user);
	(void)doveadm_cmd_param_str(cctx, "timeout", &secs);
	if ((ret = dt_rs_wait(user, secs, error, sizeof(error))) != 0) {
		i_error("%s", error);
		doveadm_exit_code = ret == -2 ? EX_USAGE : EX_TEMPFAIL;
	}
}

static void cmd_dovetail_peer_remove(struct doveadm_cmd_context *cctx)
{
	const char *peer = NULL;
	char error[1024];
	uint64_t changes = 0;

	if (!doveadm_cmd_param_str(cctx, "peer", &peer) || *peer == '\0') {
		i_error("The name of the peer must be given");
		doveadm_exit_code = EX_USAGE;
		return;
	}
	if (!doveadm_print_is_initialized())
		doveadm_print_init(DOVEADM_PRINT_TYPE_TABLE);
	doveadm_print_header("forgotten_changes", "forgotten_changes", DOVEADM_PRINT_HEADER_FLAG_NUMBER);
	if (dt_rs_peer_remove(peer, &changes, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
		return;
	}
	doveadm_print_num(changes);
}

static void cmd_dovetail_peer_accept(struct doveadm_cmd_context *cctx)
{
	const char *peer = NULL;
	char error[1024];

	if (!doveadm_cmd_param_str(cctx, "peer", &peer) || *peer == '\0') {
		i_error("The name of the peer must be given");
		doveadm_exit_code = EX_USAGE;
		return;
	}
	if (dt_rs_peer_accept(peer, error, sizeof(error)) < 0) {
		i_error("%s", error);
		doveadm_exit_code = EX_TEMPFAIL;
	}
}

static struct doveadm_cmd_ver2 doveadm_dovetail_cmds[] = {
	{
		.name = "dovetail cert init",
		.usage = "[-d <directory>]",
		.cmd = cmd_dovetail_cert_init,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('d', "directory", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail cert issue",
		.usage = "[-d <directory>] <server> [<server> ...]",
		.cmd = cmd_dovetail_cert_issue,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('d', "directory", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('\0', "server", CMD_PARAM_ARRAY, CMD_PARAM_FLAG_POSITIONAL)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail cert show",
		.usage = "[-d <directory>]",
		.cmd = cmd_dovetail_cert_show,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('d', "directory", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail compare",
		.usage = "-u <user>|-A [-b]",
		.cmd = cmd_dovetail_compare,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('A', "all-users", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('b', "bodies", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail resync",
		.usage = "-u <user>|-A [-b] [-n]",
		.cmd = cmd_dovetail_resync,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('A', "all-users", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('b', "bodies", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAM('n', "no-change", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail peer accept",
		.usage = "<peer>",
		.cmd = cmd_dovetail_peer_accept,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('\0', "peer", CMD_PARAM_STR, CMD_PARAM_FLAG_POSITIONAL)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail peer remove",
		.usage = "<peer>",
		.cmd = cmd_dovetail_peer_remove,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('\0', "peer", CMD_PARAM_STR, CMD_PARAM_FLAG_POSITIONAL)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail progress",
		.usage = "",
		.cmd = cmd_dovetail_progress,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail status",
		.usage = "[-u <user>]",
		.cmd = cmd_dovetail_status,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		/* Before the one whose name it begins with: doveadm takes the first that fits. */
		.name = "dovetail failed clear",
		.usage = "-u <user>|-A",
		.cmd = cmd_dovetail_failed_clear,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('A', "all-users", CMD_PARAM_BOOL, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		/* doveadm has long options for all of them: --timeout, too. */
		.name = "dovetail wait",
		.usage = "[-u <user>] [-t <secs>]",
		.cmd = cmd_dovetail_wait,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAM('u', "user", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAM('t', "timeout", CMD_PARAM_STR, 0)
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail waiting",
		.usage = "",
		.cmd = cmd_dovetail_waiting,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAMS_END
	},
	{
		.name = "dovetail failed",
		.usage = "",
		.cmd = cmd_dovetail_failed,
DOVEADM_CMD_PARAMS_START
DOVEADM_CMD_PARAMS_END
	},
};

void dt_doveadm_init(void)
{
	unsigned int i;

	for (i = 0; i < N_ELEMENTS(doveadm_dovetail_cmds); i++)
		doveadm_cmd_register_ver2(&doveadm_dovetail_cmds[i]);
}
