#ifndef DT_UIDLIST_H
#define DT_UIDLIST_H

struct mailbox;

/* A session that comes upon a maildir whose list of UIDs is not there yet writes one over that which another session, which makes the
   mailbox, has written meanwhile: the mailbox would get another GUID (maildir_uidlist_get_mailbox_guid()). Looks again when nobody can
   write it. */
void dt_uidlist_await(struct mailbox *box);
/* The lock could not be had. If the mailbox was renamed in that moment it is there under the new name, until this process ends. */
bool dt_uidlist_may_have_left_lock(void);

#endif
