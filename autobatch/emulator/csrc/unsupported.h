/* A call that torch imports and this emulation does not have: it fails, its name is noted and said, and it never pretends.
 * The build writes one line for each such symbol of the torch that it is built for. The codes are the
 * libraries' own for "not supported". */
#ifndef ABG_UNSUPPORTED_H
#define ABG_UNSUPPORTED_H

#include "state.h"

#define ABG_UNSUPPORTED(name, status)                       \
    ABG_EXPORT int name(void);                              \
    ABG_EXPORT int name(void) {                             \
        abg_note_unsupported(#name);                        \
        return status;                                      \
    }

/* The same for a call that gives a text. */
#define ABG_UNSUPPORTED_TEXT(name)                          \
    ABG_EXPORT const char *name(int status);                \
    ABG_EXPORT const char *name(int status) {               \
        (void)status;                                       \
        const char *text = abg_unsupported_text();          \
        return text ? text : "not supported by the emulated GPU"; \
    }

#endif
