/* What a client does to a message at a UID that it does not have any more. */
#ifndef DOVETAIL_FOLLOW_H
#define DOVETAIL_FOLLOW_H

#include "dovetail.h"

/* Does it to the message where it is now, if it was given another UID. Returns its GUID then, valid until the next call;
   otherwise NULL. Must not be called inside of a commit. */
const char *dt_follow(const unsigned char mailbox_guid[16], const struct dt_stale *stale);
/* After the last of them. */
void dt_follow_end(void);
/* What is written just now is what a client did, and that is told already. */
bool dt_follow_is_writing(void);

#endif
