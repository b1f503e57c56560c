/* INBOX is born on every server by itself: it gets its GUID from its owner's name, so that it is the same mailbox
   everywhere. For the plugin in mail processes and for the worker. */
#ifndef DOVETAIL_INBOX_H
#define DOVETAIL_INBOX_H

struct module;
struct mail_user;

/* For users that use the plugin `module`, or for all users if it is NULL. Call the deinit with the same module. */
void dt_inbox_init(struct module *module);
void dt_inbox_deinit(struct module *module);

/* The GUID with which the INBOX of this user is born. */
void dt_inbox_guid(const struct mail_user *user, unsigned char guid_r[16]);

#endif
