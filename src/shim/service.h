/* The executable: relay (service dovetail) or worker (service dovetail-worker, argument -w). These are called by Rust, on
   the main thread only. */
#ifndef DOVETAIL_SERVICE_H
#define DOVETAIL_SERVICE_H

/* Whether this process is one of our own. */
bool dt_service_is_this_process(void);

int dt_service_main(int argc, char *argv[]);

/* A connection that the relay accepted has ended. */
void dt_service_connection_closed(void);
/* Ends the process as if the master had asked for it; the master starts another one. */
void dt_service_stop(void);

/* Calls dt_rs_service_wakeup() whenever the fd becomes readable. */
void dt_service_watch(int fd);
void dt_service_unwatch(void);

#endif
