/* Memory written at a chosen rate: every cache line of a page changes, page after page, round and
 * round. The rate counts whole pages, which is what a migration has to carry again. */
#define _GNU_SOURCE
#include "gwguest.h"

#include <stdio.h>
#include <sys/mman.h>

#define TICK_NS 5000000
#define LINE_WORDS 8
#define DEFAULT_MIB 64
#define WINDOW_NS 1000000000

static uint64_t *memory;
static int64_t pages;
static struct worker writer;
static _Atomic double rate, achieved;
static counter size_mib, written_pages;

static void write_page(uint64_t *at, uint64_t value)
{
    for (unsigned i = 0; i < PAGE / 8; i += LINE_WORDS)
        ((volatile uint64_t *)at)[i] = value ^ i;
}

static void *writer_body(void *unused)
{
    (void)unused;
    struct pacer pacer = {0};
    int64_t page = 0, window_pages = 0, window_start = clock_ns(CLOCK_MONOTONIC);
    uint64_t value = 1;
    thread_background();
    while (worker_wait(&writer, TICK_NS)) {
        int64_t due = pacer_due(&pacer, rate * 1e6 / PAGE);
        for (int64_t n = 0; n < due; n++) {
            write_page(memory + page * (PAGE / 8), value);
            if (++page == pages) {
                page = 0;
                value += 0x9E3779B97F4A7C15u;
            }
        }
        written_pages += due;
        window_pages += due;
        int64_t now = clock_ns(CLOCK_MONOTONIC);
        if (now - window_start >= WINDOW_NS) {
            achieved = (double)window_pages * PAGE * 1e3 / (double)(now - window_start);
            window_pages = 0;
            window_start = now;
        }
    }
    return NULL;
}

void dirty_set(double new_rate, int64_t mib)
{
    if (mib <= 0)
        mib = size_mib ? size_mib : DEFAULT_MIB;
    rate = new_rate;
    if (new_rate > 0 && mib == size_mib)
        return;
    worker_stop(&writer);
    if (memory)
        munmap(memory, (size_t)pages * PAGE);
    memory = NULL;
    size_mib = 0;
    achieved = 0;
    if (new_rate <= 0 || mib <= 0)
        return;
    pages = mib * (1 << 20) / PAGE;
    void *region = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (region == MAP_FAILED) {
        perror("gwguest: no memory to write");
        return;
    }
    memory = region;
    size_mib = mib;
    worker_start(&writer, writer_body, NULL);
}

void dirty_stats(struct text *out)
{
    append(out, "{\"mib\":%lld,\"wanted_mb_s\":%g,\"achieved_mb_s\":%.2f,\"pages\":%lld}",
           (long long)size_mib, (double)rate, (double)achieved, (long long)written_pages);
}
