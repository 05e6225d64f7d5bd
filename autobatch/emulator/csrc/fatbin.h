/* Which architectures each of the program's kernels was compiled for. */
#ifndef ABG_FATBIN_H
#define ABG_FATBIN_H

/* Reads one `__cudaRegisterFatBinary`; the result is its handle. NULL for want of memory. */
void **abg_register_fatbin(const void *wrapper);

/* Takes note that a kernel, known by its stub on the host, belongs to a handle's binary. */
void abg_register_kernel(void **handle, const void *kernel);

/* The architecture whose code a card of this compute capability would run for a kernel, as 10 * major + minor: the
 * newest machine code of its own major version that is not above it, else the newest PTX that is not. 0 where there is
 * neither; the capability itself where the kernel's binary is not known. */
int abg_chosen_architecture(const void *kernel, int major, int minor);

#endif
