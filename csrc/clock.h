/* Times for waits. */
#ifndef FLEXKV_CLOCK_H
#define FLEXKV_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The time of `clock` in `timeout_ms` milliseconds. */
static inline struct timespec after(clockid_t clock, int timeout_ms)
{
    struct timespec until;

    clock_gettime(clock, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (timeout_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    return until;
}

#endif
