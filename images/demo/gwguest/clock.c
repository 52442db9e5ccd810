/* Does time ever step back, and how far does it leap? Samples both clocks every millisecond. */
#define _GNU_SOURCE
#include "gwguest.h"

#define TICK_NS 1000000
#define PRIORITY 40

struct watch {
    clockid_t id;
    int64_t last;
    counter back_steps, worst_back_ns, largest_gap_ns;
};
static struct watch real = {.id = CLOCK_REALTIME}, monotonic = {.id = CLOCK_MONOTONIC};
static struct worker sampler;
static counter samples;

static void look(struct watch *w)
{
    int64_t now = clock_ns(w->id), step = now - w->last;
    if (w->last && step < 0) {
        w->back_steps++;
        if (-step > w->worst_back_ns)
            w->worst_back_ns = -step;
    }
    if (w->last && step > w->largest_gap_ns)
        w->largest_gap_ns = step;
    w->last = now;
}

static void *sampler_body(void *unused)
{
    (void)unused;
    thread_real_time(PRIORITY);
    real.last = monotonic.last = 0;
    while (worker_wait(&sampler, TICK_NS)) {
        look(&real);
        look(&monotonic);
        samples++;
    }
    return NULL;
}

void clock_set(bool on)
{
    if (on == sampler.running)
        return;
    if (on)
        worker_start(&sampler, sampler_body, NULL);
    else
        worker_stop(&sampler);
}

void clock_reset(void)
{
    real.largest_gap_ns = monotonic.largest_gap_ns = 0;
}

static void one(struct text *out, const char *name, const struct watch *w)
{
    append(out, ",\"%s\":{\"back_steps\":%lld,\"worst_back_ms\":%.3f,\"largest_gap_ms\":%.3f}",
           name, (long long)w->back_steps, (double)w->worst_back_ns / 1e6,
           (double)w->largest_gap_ns / 1e6);
}

void clock_stats(struct text *out)
{
    append(out, "{\"on\":%s,\"samples\":%lld", sampler.running ? "true" : "false",
           (long long)samples);
    one(out, "realtime", &real);
    one(out, "monotonic", &monotonic);
    append(out, "}");
}
