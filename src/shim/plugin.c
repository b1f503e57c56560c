/* What Dovecot's module loader needs from C. The symbols that it looks up are Rust's (src/host/plugin.rs): C symbols
   linked into a Rust library are not exported. */
#include "compat.h"
#include "shim.h"

/* Compared by module_dir_load(): built for another Dovecot means a clear refusal, not a crash. */
const char dt_abi_version[] = DOVECOT_ABI_VERSION;

/* Dovecot's own version, for people. */
const char dt_dovecot_version[] = DOVECOT_VERSION;
