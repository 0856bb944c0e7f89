// SPDX-License-Identifier: Apache-2.0
// Lets one call of a process fail, or records the calls that change files (see faults.py).
//
//   faults_arm(N, error)   the Nth call from now on fails with this error, once
//   faults_disarm()        none fails; returns the name of the one that has
//   faults_record(fd)      each change of a file becomes a line there; -1: none does
//
// A call that fails has not happened. But close(2) closes all the same, as it does on Linux, and
// what fails to be synced is not known to be on the disk: sync_file_range(2) has two names here, for
// where it waits it tells what fsync(2) would have told, and fsync(2) is silent about it then.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <poll.h>
#include <unistd.h>

static atomic_long target, seen;
static atomic_int error;
static _Atomic(const char *) failed;
static atomic_int record = -1;

void faults_arm(long n, int which) {
    failed = NULL;
    seen = 0;
    error = which;
    target = n;
}

const char *faults_disarm(void) {
    target = 0;
    return failed;
}

void faults_record(int fd) { record = fd; }

static int fails(const char *name) {
    if (!target || atomic_fetch_add(&seen, 1) + 1 != target)
        return 0;
    failed = name;
    errno = error;
    return 1;
}

#define REAL(type, name, params) \
    static type(*real) params; \
    if (!real) \
        real = (type(*) params)dlsym(RTLD_NEXT, #name)

// A call that is only counted, and fails with `bad`.
#define CALL(type, bad, name, params, args) \
    type name params { \
        REAL(type, name, params); \
        return fails(#name) ? (bad) : real args; \
    }

static unsigned long long ino_of(int fd) {
    struct stat found;
    return syscall(SYS_fstat, fd, &found) ? 0 : (unsigned long long)found.st_ino;
}

static unsigned long long ino_at(int dir, const char *path) {
    struct stat found;
    long r = syscall(SYS_newfstatat, dir, path, &found, AT_SYMLINK_NOFOLLOW);
    return r ? 0 : (unsigned long long)found.st_ino;
}

static void line(const char *text, int size) {
    int kept = errno;
    if (record >= 0 && syscall(SYS_write, record, text, size) != size)
        abort();
    errno = kept;
}

// The directory of a name, and its last part.
static void named(char *to, int size, int dir, const char *path) {
    char copy[4096], copy2[4096];
    snprintf(copy, sizeof copy, "%s", path);
    snprintf(copy2, sizeof copy2, "%s", path);
    unsigned long long parent =
        strchr(path, '/') ? ino_at(dir, dirname(copy)) : dir == AT_FDCWD ? ino_at(dir, ".") : ino_of(dir);
    snprintf(to, size, "%llu %s", parent, basename(copy2));
}

static void wrote(int fd, off_t at, const void *data, ssize_t size) {
    if (record < 0 || size <= 0 || fd == record)
        return;
    struct stat found;
    if (syscall(SYS_fstat, fd, &found) || !S_ISREG(found.st_mode))
        return;
    char *text = malloc(2 * size + 64), *end = text;
    end += sprintf(end, "write %llu %lld ", (unsigned long long)found.st_ino, (long long)at);
    for (ssize_t i = 0; i < size; i++)
        end += sprintf(end, "%02x", ((const unsigned char *)data)[i]);
    *end++ = '\n';
    line(text, end - text);
    free(text);
}

static void told(const char *what, int fd, long long a, long long b) {
    char text[128];
    if (record >= 0)
        line(text, snprintf(text, sizeof text, "%s %llu %lld %lld\n", what, ino_of(fd), a, b));
}

static void entered(const char *what, int dir, const char *path, int dir2, const char *path2) {
    char one[4200], two[4200], text[9000];
    if (record < 0)
        return;
    named(one, sizeof one, dir, path);
    if (path2) {
        named(two, sizeof two, dir2, path2);
        line(text, snprintf(text, sizeof text, "%s %s %s\n", what, one, two));
    } else
        line(text, snprintf(text, sizeof text, "%s %s %llu\n", what, one, ino_at(dir, path)));
}

int close(int fd) {
    REAL(int, close, (int));
    int bad = fails("close"), done = real(fd);
    if (bad)
        errno = error;
    return bad ? -1 : done;
}

#define OPEN(name, params, call, dir) \
    int name params { \
        REAL(int, name, params); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (fails(#name)) \
            return -1; \
        int fd = real call; \
        if (fd >= 0 && flags & O_CREAT) \
            entered("link", dir, path, 0, NULL); \
        return fd; \
    }
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)

#define FCNTL(name) \
    int name(int fd, int command, ...) { \
        REAL(int, name, (int, int, ...)); \
        va_list more; \
        va_start(more, command); \
        void *argument = va_arg(more, void *); \
        va_end(more); \
        return fails("fcntl") ? -1 : real(fd, command, argument); \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

// Memory for Python's own objects may be needed anywhere.
#define MMAP(name, type) \
    void *name(void *at, size_t size, int prot, int flags, int fd, type offset) { \
        REAL(void *, name, (void *, size_t, int, int, int, type)); \
        int counts = !(flags & MAP_ANONYMOUS); \
        return counts && fails("mmap") ? MAP_FAILED : real(at, size, prot, flags, fd, offset); \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int ioctl(int fd, unsigned long request, ...) {
    REAL(int, ioctl, (int, unsigned long, ...));
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    return fails("ioctl") ? -1 : real(fd, request, argument);
}

// cachestat(2) has no function in the C library of Debian 12; other calls made so are not counted.
#define CACHESTAT 451
long syscall(long number, ...) {
    REAL(long, syscall, (long, ...));
    long with[6];
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++)
        with[i] = va_arg(more, long);
    va_end(more);
    if (number == CACHESTAT && fails("cachestat"))
        return -1;
    return real(number, with[0], with[1], with[2], with[3], with[4], with[5]);
}

int sync_file_range(int fd, off64_t at, off64_t size, unsigned flags) {
    REAL(int, sync_file_range, (int, off64_t, off64_t, unsigned));
    int waits = flags & (SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER);
    return fails(waits ? "sync_file_range_wait" : "sync_file_range") ? -1 : real(fd, at, size, flags);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, (int, const void *, size_t));
    if (fails("write"))
        return -1;
    off_t at = record >= 0 ? syscall(SYS_lseek, fd, 0, SEEK_CUR) : 0;
    ssize_t done = real(fd, data, size);
    wrote(fd, at, data, done);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, pwrite64, (int, const void *, size_t, off64_t));
    ssize_t done = fails("pwrite") ? -1 : real(fd, data, size, at);
    wrote(fd, at, data, done);
    return done;
}

#define CHANGES(name, params, args, note) \
    int name params { \
        REAL(int, name, params); \
        if (fails(#name)) \
            return -1; \
        int done = real args; \
        if (done == 0) \
            note; \
        return done; \
    }
CHANGES(ftruncate64, (int fd, off64_t size), (fd, size), told("truncate", fd, size, 0))
CHANGES(fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size),
        told(mode & FALLOC_FL_PUNCH_HOLE || mode & FALLOC_FL_ZERO_RANGE ? "zero" : "grow", fd, at, size))
CHANGES(fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size),
        told(mode & FALLOC_FL_PUNCH_HOLE || mode & FALLOC_FL_ZERO_RANGE ? "zero" : "grow", fd, at, size))
CHANGES(fsync, (int fd), (fd), told("sync", fd, 0, 0))
CHANGES(fdatasync, (int fd), (fd), told("sync", fd, 0, 0))
CHANGES(rename, (const char *a, const char *b), (a, b), entered("rename", AT_FDCWD, a, AT_FDCWD, b))
CHANGES(renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), entered("rename", d, a, e, b))
CHANGES(link, (const char *a, const char *b), (a, b), entered("link", AT_FDCWD, b, 0, NULL))
CHANGES(linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f), entered("link", e, b, 0, NULL))
CHANGES(unlink, (const char *a), (a), entered("unlink", AT_FDCWD, a, 0, NULL))
CHANGES(unlinkat, (int d, const char *a, int f), (d, a, f), entered("unlink", d, a, 0, NULL))

CALL(ssize_t, -1, read, (int fd, void *b, size_t n), (fd, b, n))
CALL(ssize_t, -1, pread64, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
CALL(ssize_t, -1, preadv64v2, (int fd, const struct iovec *v, int n, off64_t o, int f), (fd, v, n, o, f))
CALL(int, -1, mkdir, (const char *p, mode_t m), (p, m))
CALL(int, -1, mkdirat, (int d, const char *p, mode_t m), (d, p, m))
CALL(int, -1, rmdir, (const char *p), (p))
CALL(int, -1, fstat64, (int fd, struct stat64 *s), (fd, s))
CALL(int, -1, stat64, (const char *p, struct stat64 *s), (p, s))
CALL(int, -1, lstat64, (const char *p, struct stat64 *s), (p, s))
CALL(int, -1, fstatat64, (int d, const char *p, struct stat64 *s, int f), (d, p, s, f))
CALL(off64_t, -1, lseek64, (int fd, off64_t o, int w), (fd, o, w))
CALL(int, -1, flock, (int fd, int o), (fd, o))
CALL(int, -1, fchmod, (int fd, mode_t m), (fd, m))
CALL(int, -1, fchown, (int fd, uid_t u, gid_t g), (fd, u, g))
CALL(ssize_t, -1, fgetxattr, (int fd, const char *n, void *v, size_t s), (fd, n, v, s))
CALL(int, -1, fsetxattr, (int fd, const char *n, const void *v, size_t s, int f), (fd, n, v, s, f))
CALL(ssize_t, -1, flistxattr, (int fd, char *l, size_t s), (fd, l, s))
CALL(int, -1, fremovexattr, (int fd, const char *n), (fd, n))
CALL(int, -1, mincore, (void *a, size_t n, unsigned char *v), (a, n, v))
CALL(int, -1, madvise, (void *a, size_t n, int w), (a, n, w))
CALL(int, -1, access, (const char *p, int m), (p, m))
CALL(int, -1, faccessat, (int d, const char *p, int m, int f), (d, p, m, f))
CALL(int, -1, fstatfs, (int fd, struct statfs *s), (fd, s))
CALL(int, -1, munmap, (void *a, size_t n), (a, n))
CALL(DIR *, NULL, opendir, (const char *p), (p))
CALL(DIR *, NULL, fdopendir, (int fd), (fd))
CALL(struct dirent64 *, NULL, readdir64, (DIR * d), (d))
CALL(ssize_t, -1, readlink, (const char *p, char *b, size_t n), (p, b, n))
CALL(ssize_t, -1, readlinkat, (int d, const char *p, char *b, size_t n), (d, p, b, n))
CALL(int, -1, dup, (int fd), (fd))
CALL(int, -1, socket, (int a, int b, int c), (a, b, c))
CALL(int, -1, connect, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
CALL(ssize_t, -1, recv, (int fd, void *b, size_t n, int f), (fd, b, n, f))
CALL(ssize_t, -1, send, (int fd, const void *b, size_t n, int f), (fd, b, n, f))
CALL(int, -1, poll, (struct pollfd * p, nfds_t n, int t), (p, n, t))
CALL(int, -1, eventfd, (unsigned n, int f), (n, f))

// These return the error itself.
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    REAL(int, posix_fallocate64, (int, off64_t, off64_t));
    if (fails("posix_fallocate"))
        return error;
    int done = real(fd, at, size);
    if (done == 0)
        told("grow", fd, at, size);
    return done;
}

int posix_fadvise64(int fd, off64_t at, off64_t size, int advice) {
    REAL(int, posix_fadvise64, (int, off64_t, off64_t, int));
    return fails("posix_fadvise") ? (int)error : real(fd, at, size, advice);
}

int pthread_create(pthread_t *to, const pthread_attr_t *how, void *(*what)(void *), void *with) {
    REAL(int, pthread_create, (pthread_t *, const pthread_attr_t *, void *(*)(void *), void *));
    return fails("pthread_create") ? (int)error : real(to, how, what, with);
}
