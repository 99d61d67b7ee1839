/* Faults at the level of libc: counts, logs, fails or kills at every call that changes a file below a folder, SQLite's too.

   cc -shared -fPIC -O1 -o shim.so shim.c -ldl;   LD_PRELOAD=./shim.so;   shim_arm(...) through ctypes

   Two triggers: the first at call n, the second `after` calls later. Each has a mode:
     0 nothing   1 killed before the call   2 killed after it   3 torn: half of a write, then killed
     4 fails once with err   5 fails from here on   6 fails here and twice more
   The log (kind, paths, offset, inode, bytes) is enough to replay a power cut. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char root[PATH_MAX];
static int armed, count, log_fd = -1;
static struct trigger { int at, mode, err; } first, second;

void shim_arm(const char *folder, int n, int mode, int err, int after, int mode2, int err2, int fd) {
    snprintf(root, sizeof root, "%s/", folder);
    count = 0;
    first = (struct trigger){n, mode, err};
    second = (struct trigger){n + after, mode2, err2};
    log_fd = fd;
    armed = 1;
}
int shim_count(void) { return count; }
void shim_off(void) { armed = 0; }

#define REAL(name, type, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, #name);

static ssize_t (*real_write)(int, const void *, size_t);
static void emit(const void *data, size_t size) {
    if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
    for (const char *at = data; size;) {
        ssize_t done = real_write(log_fd, at, size);
        if (done <= 0) return;
        at += done, size -= done;
    }
}
static void note(const char *kind, const char *a, const char *b, long long offset, long long inode, const void *data, size_t size) {
    if (log_fd < 0) return;
    char head[2 * PATH_MAX + 100];
    emit(head, snprintf(head, sizeof head, "%s\t%s\t%s\t%lld\t%lld\t%zu\n", kind, a, b, offset, inode, size));
    emit(data, size);
    emit("\n", 1);
}
static int below(const char *path) {
    size_t size = strlen(root) - 1;
    return !strncmp(path, root, size) && (path[size] == '/' || !path[size]);
}
static int of_path(const char *path, char *full) {
    if (!armed) return 0;
    if (path[0] == '/') snprintf(full, PATH_MAX, "%s", path);
    else {
        char here[PATH_MAX / 2];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(full, PATH_MAX, "%s/%.2000s", here, path);
    }
    return below(full);
}
static int of_fd(int fd, char *full) {
    if (!armed) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, full, PATH_MAX - 1);
    if (size < 0) return 0;
    full[size] = 0;
    return below(full);
}

enum { GO, FAIL, TORN };
static int gate(int writing) {
    count++;
    for (struct trigger *t = &first;; t = &second) {
        int past = count - t->at;
        if (t->mode && !past) {
            if (t->mode == 3 && writing) return TORN;
            if (t->mode == 1 || t->mode == 3) raise(SIGKILL);
        }
        if ((t->mode == 4 && !past) || (t->mode == 5 && past >= 0) || (t->mode == 6 && past >= 0 && past < 3)) {
            errno = t->err;
            return FAIL;
        }
        if (t == &second) return GO;
    }
}
static void after(void) {
    if ((first.mode == 2 && count == first.at) || (second.mode == 2 && count == second.at)) raise(SIGKILL);
}
static long long inode(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : (long long)status.st_ino;
}

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (!real_write) real_write = dlsym(RTLD_NEXT, "write");
    if (!of_fd(fd, path)) return real_write(fd, data, size);
    off_t at = lseek(fd, 0, SEEK_CUR);
    int how = gate(1);
    if (how == FAIL) return -1;
    if (how == TORN) { real_write(fd, data, size / 2); raise(SIGKILL); }
    ssize_t done = real_write(fd, data, size);
    if (done > 0) note("write", path, "", at, inode(fd), data, done);
    after();
    return done;
}
#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t at) { \
        REAL(name, ssize_t, int, const void *, size_t, off_t) \
        char path[PATH_MAX]; \
        if (!of_fd(fd, path)) return real(fd, data, size, at); \
        int how = gate(1); \
        if (how == FAIL) return -1; \
        if (how == TORN) { real(fd, data, size / 2, at); raise(SIGKILL); } \
        ssize_t done = real(fd, data, size, at); \
        if (done > 0) note("write", path, "", at, inode(fd), data, done); \
        after(); \
        return done; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
#define SYNC(name) \
    int name(int fd) { \
        REAL(name, int, int) \
        char path[PATH_MAX]; \
        struct stat status; \
        if (!of_fd(fd, path)) return real(fd); \
        if (gate(0) == FAIL) return -1; \
        int done = real(fd); \
        if (!done && !fstat(fd, &status)) note(S_ISDIR(status.st_mode) ? "syncdir" : "sync", path, "", 0, status.st_ino, "", 0); \
        after(); \
        return done; \
    }
SYNC(fsync)
SYNC(fdatasync)
#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(name, int, int, off_t) \
        char path[PATH_MAX]; \
        if (!of_fd(fd, path)) return real(fd, size); \
        if (gate(0) == FAIL) return -1; \
        int done = real(fd, size); \
        if (!done) note("truncate", path, "", size, inode(fd), "", 0); \
        after(); \
        return done; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)
#define ONE_PATH(name) \
    int name(const char *given) { \
        REAL(name, int, const char *) \
        char path[PATH_MAX]; \
        if (!of_path(given, path)) return real(given); \
        if (gate(0) == FAIL) return -1; \
        int done = real(given); \
        if (!done) note("unlink", path, "", 0, 0, "", 0); \
        after(); \
        return done; \
    }
ONE_PATH(unlink)
ONE_PATH(rmdir)
#define TWO_PATHS(name, kind) \
    int name(const char *given, const char *other) { \
        REAL(name, int, const char *, const char *) \
        char path[PATH_MAX], target[PATH_MAX]; \
        if (!of_path(given, path)) return real(given, other); \
        of_path(other, target); \
        if (gate(0) == FAIL) return -1; \
        int done = real(given, other); \
        if (!done) note(kind, path, target, 0, 0, "", 0); \
        after(); \
        return done; \
    }
TWO_PATHS(rename, "rename")
TWO_PATHS(link, "link")
int linkat(int a, const char *given, int b, const char *other, int flags) {
    REAL(linkat, int, int, const char *, int, const char *, int)
    char path[PATH_MAX], target[PATH_MAX];
    if (!of_path(given, path)) return real(a, given, b, other, flags);
    of_path(other, target);
    if (gate(0) == FAIL) return -1;
    int done = real(a, given, b, other, flags);
    if (!done) note("link", path, target, 0, 0, "", 0);
    after();
    return done;
}
int mkdir(const char *given, mode_t mode) {
    REAL(mkdir, int, const char *, mode_t)
    char path[PATH_MAX];
    if (!of_path(given, path)) return real(given, mode);
    if (gate(0) == FAIL) return -1;
    int done = real(given, mode);
    if (!done) note("mkdir", path, "", 0, 0, "", 0);
    after();
    return done;
}
int fchmod(int fd, mode_t mode) {
    REAL(fchmod, int, int, mode_t)
    char path[PATH_MAX];
    if (!of_fd(fd, path)) return real(fd, mode);
    if (gate(0) == FAIL) return -1;
    int done = real(fd, mode);
    after();
    return done;
}
#define OPEN(name) \
    int name(const char *given, int flags, ...) { \
        REAL(name, int, const char *, int, ...) \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        char path[PATH_MAX]; \
        struct stat status; \
        if (!(flags & (O_CREAT | O_TRUNC)) || !of_path(given, path)) return real(given, flags, mode); \
        int there = !stat(path, &status); \
        if (gate(0) == FAIL) return -1; \
        int fd = real(given, flags, mode); \
        if (fd >= 0 && !there) note("create", path, "", 0, inode(fd), "", 0); \
        else if (fd >= 0 && (flags & O_TRUNC)) note("truncate", path, "", 0, inode(fd), "", 0); \
        after(); \
        return fd; \
    }
OPEN(open)
OPEN(open64)
