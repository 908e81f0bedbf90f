/* LD_PRELOAD=jumping_clock.so: the wall clock falls back an hour, 6 s after the process began.
 * The monotonic clock, by which seconds are measured, goes on. */
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long begun;

__attribute__((constructor)) static void begin(void) {
    struct timespec now;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    begun = now.tv_sec;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    struct timespec now;
    int code = syscall(SYS_clock_gettime, clock, time);
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    if (clock == CLOCK_REALTIME && now.tv_sec - begun > 6)
        time->tv_sec -= 3600;
    return code;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}
