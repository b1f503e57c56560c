#ifndef DOVETAIL_CAPTURE_H
#define DOVETAIL_CAPTURE_H

struct module;

void dt_capture_init(struct module *module);
void dt_capture_deinit(void);

#endif
