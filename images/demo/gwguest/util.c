/* What every part shares: text, command words, time, pacing, threads. */
#define _GNU_SOURCE
#include "gwguest.h"

#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SECOND 1000000000LL
/* After a pause the work missed meanwhile is not made up for: at most this much is due at once. */
#define BURST_S 0.05

void append(struct text *out, const char *format, ...)
{
    va_list args;
    if (out->used + 1 >= out->size)
        return;
    va_start(args, format);
    int n = vsnprintf(out->at + out->used, out->size - out->used, format, args);
    va_end(args);
    if (n > 0)
        out->used += (size_t)n < out->size - out->used ? (size_t)n : out->size - out->used - 1;
}

const char *word_value(const char *line, const char *key, char *value, size_t size)
{
    size_t length = strlen(key);
    for (const char *at = line; (at = strstr(at, key)); at += length) {
        bool starts = at == line || at[-1] == ' ' || at[-1] == '\n';
        if (!starts || at[length] != '=')
            continue;
        at += length + 1;
        size_t n = strcspn(at, " \t\r\n");
        if (n >= size)
            n = size - 1;
        memcpy(value, at, n);
        value[n] = '\0';
        return value;
    }
    return NULL;
}

bool word_number(const char *line, const char *key, int64_t *number)
{
    char value[32], *end;
    if (!word_value(line, key, value, sizeof value) || !*value)
        return false;
    errno = 0;
    long long parsed = strtoll(value, &end, 10);
    if (errno || *end || parsed < 0)
        return false;
    *number = parsed;
    return true;
}

int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static uint32_t crc_table[256];

static void crc_fill(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
        crc_table[i] = c;
    }
}

uint32_t crc32_of(const void *data, size_t length)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, crc_fill);
    uint32_t crc = ~0u;
    for (const uint8_t *at = data; length--; at++)
        crc = crc_table[(crc ^ *at) & 0xFF] ^ (crc >> 8);
    return ~crc;
}

int64_t pacer_due(struct pacer *pacer, double units_per_s)
{
    int64_t now = clock_ns(CLOCK_MONOTONIC);
    if (pacer->last_ns)
        pacer->credit += (double)(now - pacer->last_ns) / 1e9 * units_per_s;
    pacer->last_ns = now;
    double most = units_per_s * BURST_S + 1;
    if (pacer->credit > most)
        pacer->credit = most;
    int64_t due = (int64_t)pacer->credit;
    pacer->credit -= (double)due;
    return due;
}

void worker_start(struct worker *w, void *(*body)(void *), void *argument)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    w->stop = w->poked = false;
    w->running = pthread_create(&w->thread, NULL, body, argument) == 0;
}

void worker_stop(struct worker *w)
{
    if (!w->running)
        return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    w->running = false;
}

void worker_poke(struct worker *w)
{
    if (!w->running)
        return;
    pthread_mutex_lock(&w->lock);
    w->poked = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

bool worker_wait(struct worker *w, int64_t ns)
{
    pthread_mutex_lock(&w->lock);
    int64_t until = clock_ns(CLOCK_MONOTONIC) + ns;
    struct timespec at = {.tv_sec = until / SECOND, .tv_nsec = until % SECOND};
    int ended = ns == 0 ? ETIMEDOUT : 0;
    while (!w->stop && !w->poked && !ended)
        ended = ns < 0 ? pthread_cond_wait(&w->wake, &w->lock)
                       : pthread_cond_timedwait(&w->wake, &w->lock, &at);
    w->poked = false;
    bool go_on = !w->stop;
    pthread_mutex_unlock(&w->lock);
    return go_on;
}

void thread_real_time(int priority)
{
    struct sched_param parameters = {.sched_priority = priority};
    pthread_setschedparam(pthread_self(), SCHED_FIFO, &parameters);
}

void thread_background(void)
{
    /* Heavy writers must not keep a person's shell or the control port waiting. */
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 10);
}
