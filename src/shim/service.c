#define DT_COMPAT_SERVICE
#define DT_COMPAT_WORKER
#include "compat.h"
#include "ioloop.h"
#include "restrict-access.h"
#include "dovetail.h"
#include "worker.h"
#include "service.h"

#include <sys/resource.h>
#include <unistd.h>

#define DT_RELAY_SERVICE_NAME "dovetail"
#define DT_WORKER_SERVICE_NAME "dovetail-worker"

/* Mail service comes first: without this, a relay that wakes up takes the CPU from the process that woke it, before its
   client has the answer. */
#define DT_SERVICE_NICE 10

static struct io *dt_service_io;
static bool dt_service_runs = FALSE;

bool dt_service_is_this_process(void)
{
	return dt_service_runs;
}

static void dt_service_wakeup(void *context ATTR_UNUSED)
{
	dt_rs_service_wakeup();
}

void dt_service_watch(int fd)
{
	i_assert(dt_service_io == NULL);
	dt_service_io = io_add(fd, IO_READ, dt_service_wakeup, (void *)NULL);
}

void dt_service_unwatch(void)
{
	io_remove(&dt_service_io);
}

void dt_service_connection_closed(void)
{
	master_service_client_connection_destroyed(master_service);
}

void dt_service_stop(void)
{
	master_service_stop(master_service);
}

/* -- Relay */

static bool dt_relay_idle_die(void)
{
	/* Its connections to peers are not the master's business. */
	return FALSE;
}

static void dt_relay_connected(struct master_service_connection *conn)
{
	master_service_client_connection_accept(conn);
	dt_rs_relay_accept(conn->fd, conn->listen_fd, conn->remote_ip.family != 0);
}

static int dt_relay_main(void)
{
	struct restrict_access_settings access;
	const char *error;

	/* Settings and the log before privileges are dropped. */
	if (compat_master_service_settings_read(&error) < 0)
		i_fatal("%s", error);
	master_service_init_log(master_service);
	dt_rs_service_init();
	restrict_access_get_env(&access);
	if (dt_rs_relay_configure(access.uid, access.gid,
				  master_service_get_client_limit(master_service)) < 0)
		return FATAL_DEFAULT;
	restrict_access_by_env(RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);
	restrict_access_allow_coredumps(TRUE);

	master_service_set_die_with_master(master_service, TRUE);
	master_service_set_idle_die_callback(master_service, dt_relay_idle_die);
	if (dt_rs_relay_start(MASTER_LISTEN_FD_FIRST, master_service_get_socket_count(master_service)) < 0)
		return FATAL_DEFAULT;
	master_service_init_finish(master_service);

	master_service_run(master_service, dt_relay_connected);

	dt_rs_relay_stop();
	return 0;
}

/* -- Worker */

static void dt_worker_connected(struct master_service_connection *conn)
{
	master_service_client_connection_accept(conn);
	if (!dt_rs_worker_is_relay(conn->fd)) {
		i_close_fd(&conn->fd);
		master_service_client_connection_destroyed(master_service);
		return;
	}
	if (!dt_worker_connection_init(conn->fd)) {
		i_error("dovetail-worker must be configured with client_limit=1");
		i_close_fd(&conn->fd);
		master_service_client_connection_destroyed(master_service);
	}
}

static int dt_worker_main(void)
{
	struct mail_storage_service_ctx *storage_service;
	const char *error;

	if (compat_master_service_settings_read(&error) < 0)
		i_fatal("%s", error);
	master_service_init_log_with_pid(master_service);
	dt_rs_service_init();
	if (dt_rs_worker_configure() < 0)
		return FATAL_DEFAULT;
	/* Runs as root unless the service's user is set. */
	restrict_access_by_env(RESTRICT_ACCESS_FLAG_ALLOW_ROOT, NULL);

	storage_service = compat_storage_service_init();
	if (dt_worker_init(storage_service, &error) < 0)
		i_fatal("dovetail_worker_plugins: %s", error);
	restrict_access_allow_coredumps(TRUE);
	master_service_set_die_with_master(master_service, TRUE);
	master_service_init_finish(master_service);

	master_service_run(master_service, dt_worker_connected);

	dt_worker_deinit();
	mail_storage_service_deinit(&storage_service);
	return 0;
}

int dt_service_main(int argc, char *argv[])
{
	bool worker = FALSE;
	int c, ret;

	dt_service_runs = TRUE;
	/* The name must be known before Dovecot parses the arguments. */
	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "-w") == 0)
			worker = TRUE;
	}
	master_service = master_service_init(
		worker ? DT_WORKER_SERVICE_NAME : DT_RELAY_SERVICE_NAME,
		COMPAT_MASTER_SERVICE_FLAG_MANY_USERS, &argc, &argv, "w");
	while ((c = master_getopt(master_service)) > 0) {
		if (c != 'w')
			return FATAL_DEFAULT;
	}

	if (setpriority(PRIO_PROCESS, 0, DT_SERVICE_NICE) < 0)
		i_warning("setpriority(%d) failed: %m", DT_SERVICE_NICE);
	ret = worker ? dt_worker_main() : dt_relay_main();
	dt_rs_service_deinit();
	master_service_deinit(&master_service);
	return ret;
}
