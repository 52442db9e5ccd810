/* Acknowledged, checksummed records on a disk, so that a lost or torn write is seen.
 *
 * Record s lies at offset (s - 1) * 4096 and is acknowledged once pwrite() on an O_DIRECT|O_DSYNC
 * descriptor returned. The log never wraps: it stops at the end of the device. A log found on the
 * device is continued after its last intact record, so it survives restarts of the guest.
 * An error is counted and the same record is tried again.
 *
 * Layout, little-endian: "GODWITLG", u32 record size, u32 CRC-32 of the record with this field 0,
 * u64 sequence, u64 log id, u64 CLOCK_REALTIME, u64 CLOCK_MONOTONIC, filler words.
 */
#define _GNU_SOURCE
#include "gwguest.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/poll.h>
#include <sys/random.h>
#include <unistd.h>

#define RECORD PAGE
#define SCAN_RECORDS 64
#define TICK_NS 5000000
#define RETRY_NS 100000000
#define MAGIC "GODWITLG"

struct record {
    char magic[8];
    uint32_t size, crc;
    uint64_t sequence, log_id, real_ns, monotonic_ns;
    uint64_t filler[(RECORD - 48) / 8];
};
_Static_assert(sizeof(struct record) == RECORD, "one record fills its slot");

static struct worker writer;
static char path[64];
static counter wanted_rate, acknowledged, first, errors, last_errno, largest_gap_ns;
static _Atomic uint64_t log_id;
static _Atomic(const char *) state = "off";
static bool from_scratch;

static uint32_t record_crc(struct record *r)
{
    uint32_t kept = r->crc, crc;
    r->crc = 0;
    crc = crc32_of(r, RECORD);
    r->crc = kept;
    return crc;
}

/* Waits for a device node that the kernel is still probing. -1: asked to stop. */
static int open_device(void)
{
    int watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    inotify_add_watch(watch, "/dev", IN_CREATE | IN_ATTRIB);
    int fd;
    while ((fd = open(path, O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC)) < 0) {
        char events[4096];
        struct pollfd ready = {.fd = watch, .events = POLLIN};
        last_errno = errno;
        state = "waiting";
        if (!worker_wait(&writer, 0))
            break;
        /* The timeout is only there so that a request to stop is seen. */
        poll(&ready, 1, 500);
        while (read(watch, events, sizeof events) > 0)
            ;
    }
    close(watch);
    return fd;
}

/* The number of intact records of one log from the start of the device; leaves its id. */
static int64_t scan(int fd, struct record *records)
{
    int64_t found = 0;
    for (;;) {
        ssize_t n = pread(fd, records, SCAN_RECORDS * RECORD, found * RECORD);
        for (int64_t i = 0; i < SCAN_RECORDS; i++) {
            struct record *r = &records[i];
            if ((i + 1) * (int64_t)RECORD > n || memcmp(r->magic, MAGIC, 8) ||
                r->sequence != (uint64_t)found + 1 || (found && r->log_id != log_id) ||
                r->crc != record_crc(r))
                return found;
            log_id = r->log_id;
            found++;
        }
    }
}

static void compose(struct record *r, uint64_t sequence)
{
    memcpy(r->magic, MAGIC, 8);
    r->size = RECORD;
    r->sequence = sequence;
    r->log_id = log_id;
    for (unsigned i = 0; i < sizeof r->filler / 8; i++)
        r->filler[i] = (sequence + i) * 0x9E3779B97F4A7C15u;
    r->real_ns = (uint64_t)clock_ns(CLOCK_REALTIME);
    r->monotonic_ns = (uint64_t)clock_ns(CLOCK_MONOTONIC);
    r->crc = record_crc(r);
}

/* False: the log has to end (full, or asked to stop). */
static bool write_one(int fd, struct record *r, int64_t *last_ack_ns)
{
    compose(r, (uint64_t)acknowledged + 1);
    for (;;) {
        ssize_t n = pwrite(fd, r, RECORD, acknowledged * (int64_t)RECORD);
        if (n == RECORD)
            break;
        if (n == 0 || (n < 0 && errno == ENOSPC)) {
            state = "full";
            return false;
        }
        errors++;
        last_errno = n < 0 ? errno : EIO;
        if (!worker_wait(&writer, RETRY_NS))
            return false;
    }
    int64_t now = clock_ns(CLOCK_MONOTONIC);
    int64_t gap = now - *last_ack_ns;
    if (*last_ack_ns && gap > largest_gap_ns)
        largest_gap_ns = gap;
    *last_ack_ns = now;
    acknowledged++;
    return true;
}

static void *writer_body(void *unused)
{
    (void)unused;
    struct record *records = aligned_alloc(PAGE, SCAN_RECORDS * RECORD);
    struct pacer pacer = {0};
    int64_t last_ack_ns = 0;
    int fd = records ? open_device() : -1;
    if (fd >= 0) {
        uint64_t fresh_id;
        acknowledged = from_scratch ? 0 : scan(fd, records);
        if (!acknowledged && getrandom(&fresh_id, sizeof fresh_id, GRND_INSECURE) == sizeof fresh_id)
            log_id = fresh_id;
        first = acknowledged + 1;
        state = "running";
        bool more = true;
        while (more && worker_wait(&writer, wanted_rate ? TICK_NS : 0)) {
            int64_t due = wanted_rate ? pacer_due(&pacer, (double)wanted_rate) : 1;
            while (more && due--)
                more = write_one(fd, records, &last_ack_ns);
        }
        close(fd);
    }
    free(records);
    return NULL;
}

void disklog_set(const char *device, int64_t records_per_s, bool fresh)
{
    char wanted[sizeof path];
    snprintf(wanted, sizeof wanted, "%s%s", *device == '/' ? "" : "/dev/", device);
    wanted_rate = records_per_s;
    if (writer.running && !fresh && !strcmp(wanted, path))
        return;
    disklog_stop();
    memcpy(path, wanted, sizeof path);
    from_scratch = fresh;
    acknowledged = first = errors = last_errno = largest_gap_ns = 0;
    state = "starting";
    worker_start(&writer, writer_body, NULL);
}

void disklog_stop(void)
{
    worker_stop(&writer);
    state = "off";
}

void disklog_reset(void)
{
    largest_gap_ns = 0;
}

/* What the kernel takes for the device's size now: it hears of a growth by itself. 0: no device. */
static long long device_bytes(void)
{
    char name[sizeof path + 32], line[32] = "";
    const char *slash = strrchr(path, '/');
    snprintf(name, sizeof name, "/sys/class/block/%s/size", slash ? slash + 1 : path);
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, line, sizeof line - 1) < 0)
        line[0] = '\0';
    if (fd >= 0)
        close(fd);
    return atoll(line) * 512;
}

void disklog_stats(struct text *out)
{
    append(out,
           "{\"state\":\"%s\",\"device\":\"%s\",\"device_bytes\":%lld,\"rate\":%lld,"
           "\"log_id\":\"%016llx\",\"first\":%lld,"
           "\"acknowledged\":%lld,\"errors\":%lld,\"errno\":%lld,\"largest_gap_ms\":%.3f}",
           state, path, device_bytes(), (long long)wanted_rate, (unsigned long long)log_id, (long long)first,
           (long long)acknowledged, (long long)errors, (long long)last_errno,
           (double)largest_gap_ns / 1e6);
}
