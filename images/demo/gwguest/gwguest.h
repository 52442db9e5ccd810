/* gwguest: the helper inside the demo guest, so that a test can see what a move does to it.
 *
 * One process, a few threads; each part sleeps in the kernel until it is asked for something:
 *   echo     UDP 7     sends every datagram back as it came, at real-time priority
 *   control  UDP 7777  "verb key=value ..." in, one JSON object out
 *   page     TCP 80    / for people, /stats.json for programs
 *   power    evdev     the ACPI power button means a clean power-off
 *   stamp    memory whose every page is known, re-written and checked
 *   dirty    memory written at a chosen rate
 *   disklog  acknowledged, checksummed records on a disk
 *   clock    does time ever step back, how far does it leap
 *
 * Only the control thread starts and stops parts. Counters are atomics, read by anyone.
 * Rates are MB/s of 10^6 bytes; sizes are MiB; times are nanoseconds unless named otherwise.
 */
#ifndef GWGUEST_H
#define GWGUEST_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define PAGE 4096u

typedef _Atomic int64_t counter;

/* A bounded text under construction: append() never overflows, it truncates. */
struct text {
    char *at;
    size_t used, size;
};
void append(struct text *out, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The value of "key=" among the words of a command, or NULL. Copied into `value`. */
const char *word_value(const char *line, const char *key, char *value, size_t size);
bool word_number(const char *line, const char *key, int64_t *number);

int64_t clock_ns(clockid_t clock);
uint32_t crc32_of(const void *data, size_t length);

/* Work paced by ticks: how many units are due now, never more than a short burst. */
struct pacer {
    int64_t last_ns;
    double credit;
};
int64_t pacer_due(struct pacer *pacer, double units_per_s);

/* A thread with a stop flag that can be woken while it waits. */
struct worker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool running, stop, poked;
};
void worker_start(struct worker *w, void *(*body)(void *), void *argument);
void worker_stop(struct worker *w);             /* returns when the thread has ended */
bool worker_wait(struct worker *w, int64_t ns); /* false: asked to stop. ns < 0: until poked */
void worker_poke(struct worker *w);             /* ends a wait, the next one if none is on */
void thread_real_time(int priority);
void thread_background(void);

void echo_start(void);
void echo_stats(struct text *out);

void stamp_set(int64_t mib, double write_rate, double check_rate);
/* What one whole pass found. `stamps`, the sum of all pages' generations, only rises while a guest
 * lives: who keeps an earlier one outside sees pages that went back together with all that the
 * guest remembers of them, by how many writes. */
struct stamp_found {
    int64_t bad, stamps; /* bad is -1 when nothing is stamped */
};
struct stamp_found stamp_check_now(void);
bool stamp_corrupt(int64_t page);
void stamp_stats(struct text *out);

void dirty_set(double rate, int64_t mib);
void dirty_stats(struct text *out);

void disklog_set(const char *device, int64_t records_per_s, bool fresh);
void disklog_stop(void);
void disklog_reset(void);
void disklog_stats(struct text *out);

void clock_set(bool on);
void clock_reset(void);
void clock_stats(struct text *out);

void page_start(void);
void stats_json(struct text *out);

void power_start(void);
void power_off(void);

#endif
