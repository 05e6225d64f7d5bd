/* The real library's call of the same name: used only for what needs no card, such as its version. */
#ifndef ABG_REAL_H
#define ABG_REAL_H

#include <dlfcn.h>
#include <stddef.h>

/* The first of the libraries, by file name, that is loaded already: torch loads them out of reach of RTLD_NEXT. */
static inline void *abg_real(const char *name, const char *const *libraries) {
    void *found = dlsym(RTLD_NEXT, name);
    for (; !found && *libraries; libraries++) {
        void *library = dlopen(*libraries, RTLD_LAZY | RTLD_NOLOAD);
        if (library) found = dlsym(library, name);
    }
    return found;
}

#define ABG_REAL(name, ...) abg_real(name, (const char *const[]){__VA_ARGS__, NULL})

#endif
