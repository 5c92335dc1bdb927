/* A library for LD_PRELOAD that makes the k-th access that changes a file below a folder fail, as on a disk that fills.

   failing_writes_arm(folder, k, error, forever) starts counting: the k-th access fails with `error`, and with `forever` all later
   ones too. failing_writes_count() returns the number of accesses since then. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int target, code, forever, count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void failing_writes_arm(const char *folder, int k, int error, int all_later) {
  pthread_mutex_lock(&mutex);
  snprintf(root, sizeof root, "%s", folder);
  target = k, code = error, forever = all_later, count = 0;
  pthread_mutex_unlock(&mutex);
}

int failing_writes_count(void) { return count; }

/* Returns whether this access to an absolute path fails. */
static int fails(const char *path) {
  if (!root[0] || strncmp(path, root, strlen(root))) return 0;
  pthread_mutex_lock(&mutex);
  count++;
  int failing = target > 0 && (count == target || (forever && count > target));
  pthread_mutex_unlock(&mutex);
  if (failing) errno = code;
  return failing;
}

static int fails_at(int folder, const char *path) {
  char full[2 * PATH_MAX], base[PATH_MAX] = "", link[64];
  if (!root[0]) return 0;
  if (path[0] == '/') return fails(path);
  if (folder == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
  }
  snprintf(full, sizeof full, "%s/%s", base, path);
  return fails(full);
}

static int fails_fd(int fd) {
  char path[PATH_MAX], link[64];
  if (!root[0]) return 0;
  int saved = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define NEXT(name, type, ...) \
  static type (*next)(__VA_ARGS__); \
  if (!next) next = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(name, int, const char *, int, ...); \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if ((flags & O_CREAT) && fails_at(AT_FDCWD, path)) return -1; \
    return next(path, flags, mode); \
  }
#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    NEXT(name, int, int, const char *, int, ...); \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if ((flags & O_CREAT) && fails_at(folder, path)) return -1; \
    return next(folder, path, flags, mode); \
  }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define FD(name, type, arguments, values, ...) \
  type name arguments { NEXT(name, type, __VA_ARGS__); if (fails_fd(fd)) return -1; return next values; }
FD(write, ssize_t, (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
FD(pwrite, ssize_t, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), int, const void *, size_t, off_t)
FD(pwrite64, ssize_t, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), int, const void *, size_t, off64_t)
FD(writev, ssize_t, (int fd, const struct iovec *v, int n), (fd, v, n), int, const struct iovec *, int)
FD(sendfile, ssize_t, (int fd, int in, off_t *o, size_t n), (fd, in, o, n), int, int, off_t *, size_t)
FD(sendfile64, ssize_t, (int fd, int in, off64_t *o, size_t n), (fd, in, o, n), int, int, off64_t *, size_t)
FD(ftruncate, int, (int fd, off_t n), (fd, n), int, off_t)
FD(ftruncate64, int, (int fd, off64_t n), (fd, n), int, off64_t)
FD(fsync, int, (int fd), (fd), int)
FD(fdatasync, int, (int fd), (fd), int)

/* A failing close has closed the file nevertheless. */
int close(int fd) {
  NEXT(close, int, int);
  int failing = 0;
  if (root[0]) {
    int saved = errno, flags = fcntl(fd, F_GETFL);
    errno = saved;
    failing = flags >= 0 && (flags & O_ACCMODE) != O_RDONLY && fails_fd(fd);
  }
  int error = errno, result = next(fd);
  if (!failing) return result;
  errno = error;
  return -1;
}

int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir, int, const char *, mode_t);
  return fails_at(AT_FDCWD, path) ? -1 : next(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
  NEXT(mkdirat, int, int, const char *, mode_t);
  return fails_at(folder, path) ? -1 : next(folder, path, mode);
}
int rename(const char *old, const char *new) {
  NEXT(rename, int, const char *, const char *);
  return fails_at(AT_FDCWD, new) ? -1 : next(old, new);
}
int renameat(int a, const char *old, int b, const char *new) {
  NEXT(renameat, int, int, const char *, int, const char *);
  return fails_at(b, new) ? -1 : next(a, old, b, new);
}
