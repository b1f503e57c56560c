#ifndef DT_STRAY_H
#define DT_STRAY_H

struct mailbox;
struct maildir_uidlist;

/* Maildir moves a message's file to its place before dovecot-uidlist says which GUID the message has. A worker that is killed in
   between leaves a stray: a message whose GUID is its file's name. So these names say that a worker made them, and for which
   GUID. Where the GUID is a maildir's file name itself, Dovecot takes that. */

struct dt_stray_signing {
	const char *hostname;
	struct maildir_uidlist *locked;
};

/* File names that are made from now on are for this GUID, until the end of the signing. In the data stack frame. */
void dt_stray_sign(struct mailbox *box, const char *guid, struct dt_stray_signing *signing_r);
void dt_stray_unsign(struct dt_stray_signing *signing);

bool dt_stray_is(const char *guid);

/* Whether a message with this GUID gets a name from Dovecot when it is committed. One signing is for one GUID: there must be no
   other one in the transaction. */
bool dt_stray_needs_name(struct mailbox *box, const char *guid);

#endif
