#ifndef DT_MAKING_H
#define DT_MAKING_H

struct mailbox;

/* Whether a session is just making this mailbox, or will in a moment. To open it would make what is missing (maildir_mailbox_open(),
   sdbox_mailbox_open(), mdbox_mailbox_get_guid()), and the session would be told that it existed before it
   (create_maildir_subdirs(), dbox_mailbox_create()): a CREATE that worked would fail. Of one that Dovecot makes by itself
   (mailbox_autocreate()) it is always false: for those that is no failure. */
bool dt_making_is(struct mailbox *box);

#endif
