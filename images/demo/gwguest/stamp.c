/* Memory whose every page is known, so that a page lost in a move is seen.
 *
 * Page p at generation g holds p, g, words that follow from both, and a checksum. What the writer
 * last wrote is also kept in `expected`, apart from the pages. Three readers compare: the checker,
 * pass after pass; the writer, before it writes a page anew (so a loss is never papered over); and
 * stamp_check_now(). A page and its expectation change under one lock of a stripe of locks and are
 * compared under it, so a difference means that memory was lost, never that two threads raced.
 * A bad page counts once per generation.
 */
#define _GNU_SOURCE
#include "gwguest.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define WORDS (PAGE / 8)
#define STRIPES 64
#define TICK_NS 10000000

static uint64_t *memory;
static uint32_t *expected, *counted_bad;
static int64_t pages;
static pthread_mutex_t stripes[STRIPES];
static struct worker writer, checker;
static _Atomic double write_rate, check_rate;
static counter size_mib, writes, checked, passes, rounds, bad, first_bad_page = -1;
static counter first_bad_expected, first_bad_found;

static uint64_t word_of(uint64_t page, uint64_t generation, uint64_t index)
{
    uint64_t x = (page << 40) ^ (generation << 9) ^ index;
    x *= 0x9E3779B97F4A7C15u;
    return x ^ (x >> 31);
}

static void write_page(int64_t page, uint32_t generation)
{
    uint64_t *at = memory + page * WORDS, sum;
    at[0] = (uint64_t)page;
    at[1] = generation;
    sum = at[0] + at[1];
    for (unsigned i = 2; i < WORDS - 1; i++)
        sum += at[i] = word_of((uint64_t)page, generation, i);
    at[WORDS - 1] = sum;
    expected[page] = generation;
}

/* Under the page's lock. Counts and remembers a bad page. */
static bool page_good(int64_t page)
{
    const uint64_t *at = memory + page * WORDS;
    uint32_t generation = expected[page];
    uint64_t sum = at[0] + at[1], wrong = 0;
    wrong |= at[0] ^ (uint64_t)page;
    wrong |= at[1] ^ generation;
    for (unsigned i = 2; i < WORDS - 1; i++) {
        sum += at[i];
        wrong |= at[i] ^ word_of((uint64_t)page, generation, i);
    }
    wrong |= at[WORDS - 1] ^ sum;
    checked++;
    if (!wrong)
        return true;
    if (counted_bad[page] != generation) {
        counted_bad[page] = generation;
        if (!bad++) {
            first_bad_page = page;
            first_bad_expected = generation;
            first_bad_found = (int64_t)at[1];
        }
    }
    return false;
}

static pthread_mutex_t *lock_of(int64_t page)
{
    return &stripes[page % STRIPES];
}

static void restamp(int64_t page)
{
    pthread_mutex_lock(lock_of(page));
    page_good(page);
    /* Generation 0 would look like "never counted"; it is skipped when the number wraps. */
    uint32_t next = expected[page] + 1;
    write_page(page, next ? next : 1);
    pthread_mutex_unlock(lock_of(page));
    writes++;
}

static void check(int64_t page)
{
    pthread_mutex_lock(lock_of(page));
    page_good(page);
    pthread_mutex_unlock(lock_of(page));
}

static void walk(struct worker *w, _Atomic double *rate, void (*step)(int64_t), counter *done)
{
    struct pacer pacer = {0};
    int64_t page = 0;
    thread_background();
    while (worker_wait(w, *rate > 0 ? TICK_NS : -1)) {
        for (int64_t due = pacer_due(&pacer, *rate * 1e6 / PAGE); due > 0; due--) {
            step(page);
            if (++page == pages) {
                page = 0;
                (*done)++;
            }
        }
    }
}

static void *writer_body(void *unused)
{
    (void)unused;
    walk(&writer, &write_rate, restamp, &rounds);
    return NULL;
}

static void *checker_body(void *unused)
{
    (void)unused;
    walk(&checker, &check_rate, check, &passes);
    return NULL;
}

static void release(void)
{
    worker_stop(&writer);
    worker_stop(&checker);
    if (memory) {
        munmap(memory, (size_t)pages * PAGE);
        munmap(expected, (size_t)pages * sizeof *expected);
        munmap(counted_bad, (size_t)pages * sizeof *counted_bad);
    }
    memory = NULL;
    pages = 0;
    size_mib = 0;
}

static void *map(size_t size)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

void stamp_set(int64_t mib, double new_write_rate, double new_check_rate)
{
    write_rate = new_write_rate;
    check_rate = new_check_rate;
    if (mib == size_mib) {
        worker_poke(&writer);
        worker_poke(&checker);
        return;
    }
    release();
    if (mib <= 0)
        return;
    int64_t count = mib * (1 << 20) / PAGE;
    void *region = map((size_t)count * PAGE);
    void *wanted = map((size_t)count * sizeof *expected);
    void *seen = map((size_t)count * sizeof *counted_bad);
    if (region == MAP_FAILED || wanted == MAP_FAILED || seen == MAP_FAILED) {
        perror("gwguest: no memory to stamp");
        return;
    }
    memory = region, expected = wanted, counted_bad = seen, pages = count;
    for (int i = 0; i < STRIPES; i++)
        pthread_mutex_init(&stripes[i], NULL);
    for (int64_t page = 0; page < pages; page++)
        write_page(page, 1);
    writes += pages;
    size_mib = mib;
    worker_start(&writer, writer_body, NULL);
    worker_start(&checker, checker_body, NULL);
}

struct stamp_found stamp_check_now(void)
{
    struct stamp_found all = {memory ? 0 : -1, 0};
    for (int64_t page = 0; page < pages; page++) {
        pthread_mutex_lock(lock_of(page));
        all.bad += !page_good(page);
        all.stamps += (int64_t)memory[page * WORDS + 1];
        pthread_mutex_unlock(lock_of(page));
    }
    passes += memory != NULL;
    return all;
}

bool stamp_corrupt(int64_t page)
{
    if (!memory || page >= pages)
        return false;
    pthread_mutex_lock(lock_of(page));
    memory[page * WORDS + WORDS / 2] ^= 1;
    pthread_mutex_unlock(lock_of(page));
    return true;
}

void stamp_stats(struct text *out)
{
    append(out,
           "{\"mib\":%lld,\"write_mb_s\":%g,\"check_mb_s\":%g,\"writes\":%lld,\"rounds\":%lld,"
           "\"checked\":%lld,\"passes\":%lld,\"bad\":%lld,\"first_bad\":",
           (long long)size_mib, (double)write_rate, (double)check_rate, (long long)writes,
           (long long)rounds, (long long)checked, (long long)passes, (long long)bad);
    if (first_bad_page < 0)
        append(out, "null}");
    else
        append(out, "{\"page\":%lld,\"expected\":%lld,\"found\":%lld}}", (long long)first_bad_page,
               (long long)first_bad_expected, (long long)first_bad_found);
}
