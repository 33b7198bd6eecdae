/* A queue is closed while another thread of it is faster than the one that closes: the method must still be there for as
 * long as that one is in `wake`. Exits with 0 if it is. */
#include "io_method.h"

#include <semaphore.h>
#include <time.h>

static struct flexkv_io_method method;
static sem_t asleep, closed;
static int was_closed;

/* Wakes the thread, and then takes as long as it needs to close everything; 200 ms if it may not. */
static void slow_wake(void *context)
{
    struct timespec until;

    flexkv_io_threads.wake(context);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 200000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    was_closed = !sem_timedwait(&closed, &until);
}

static void wait_method(void *context, int64_t timeout_ns)
{
    if (timeout_ns < 0)           /* from here on, who closes the queue has to wake its thread */
        sem_post(&asleep);
    flexkv_io_threads.wait(context, timeout_ns);
}

static void close_method(void *context, uint64_t lost)
{
    flexkv_io_threads.close(context, lost);
    sem_post(&closed);
}

int main(void)
{
    static uint8_t memory[4096];
    int files[] = { 0 };
    struct flexkv_io_options options = { memory, sizeof(memory), files, 1, 1, 1000000000, &method };
    struct flexkv_io_queue *queue;

    method = flexkv_io_threads;
    method.wake = slow_wake;
    method.wait = wait_method;
    method.close = close_method;
    sem_init(&asleep, 0, 0);
    sem_init(&closed, 0, 0);
    if (flexkv_io_queue_open(&queue, &options))
        return 2;
    sem_wait(&asleep);
    flexkv_io_queue_close(queue);
    return was_closed;
}
