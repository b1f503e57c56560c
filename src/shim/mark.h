/* What our header in a mailbox's index says; src/worker/mark.rs has the format. */
#ifndef DOVETAIL_MARK_H
#define DOVETAIL_MARK_H

struct mailbox;
struct mail_index_view;

/* The index's extension. */
#define DT_MARK_NAME "dovetail"
#define DT_MARK_MAGIC "Dvtl"
/* Of the byte behind the magic: messages got other UIDs than they had. */
#define DT_MARK_DIVERGED 0x01

/* Of an open mailbox, as far as its view knows. Needs no I/O. */
bool dt_mark_has_diverged(struct mailbox *box);
bool dt_mark_view_has_diverged(struct mail_index_view *view);

#endif
