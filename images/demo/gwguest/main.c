/* Starts what the kernel command line asks for and serves the control port. */
#define _GNU_SOURCE
#include "gwguest.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define CONTROL_PORT 7777
#define DEFAULT_STAMP_RATE 4
#define DEFAULT_CHECK_RATE 16
#define DEFAULT_LOG_RATE 100

static char host_name[65];

void stats_json(struct text *out)
{
    struct sysinfo memory = {0};
    sysinfo(&memory);
    append(out, "{\"name\":\"%s\",\"pid\":%d,\"uptime_s\":%.3f,\"realtime_ns\":%lld", host_name,
           getpid(), (double)clock_ns(CLOCK_BOOTTIME) / 1e9, (long long)clock_ns(CLOCK_REALTIME));
    append(out, ",\"memory\":{\"total_bytes\":%llu,\"free_bytes\":%llu}",
           (unsigned long long)memory.totalram * memory.mem_unit,
           (unsigned long long)memory.freeram * memory.mem_unit);
    append(out, ",\"echo\":");
    echo_stats(out);
    append(out, ",\"stamp\":");
    stamp_stats(out);
    append(out, ",\"dirty\":");
    dirty_stats(out);
    append(out, ",\"log\":");
    disklog_stats(out);
    append(out, ",\"clock\":");
    clock_stats(out);
    append(out, "}");
}

static bool command_stamp(const char *line)
{
    int64_t mib = 0, rate = DEFAULT_STAMP_RATE, check = DEFAULT_CHECK_RATE;
    if (!word_number(line, "mib", &mib))
        return false;
    word_number(line, "rate", &rate);
    word_number(line, "check", &check);
    stamp_set(mib, (double)rate, (double)check);
    return true;
}

static bool command_dirty(const char *line)
{
    int64_t rate, mib = 0;
    if (!word_number(line, "rate", &rate))
        return false;
    word_number(line, "mib", &mib);
    dirty_set((double)rate, mib);
    return true;
}

static bool command_log(const char *line)
{
    char device[56];
    int64_t rate = DEFAULT_LOG_RATE, fresh = 0;
    if (!word_value(line, "dev", device, sizeof device) || strpbrk(device, "\"\\"))
        return false;
    word_number(line, "rate", &rate);
    word_number(line, "fresh", &fresh);
    if (!strcmp(device, "off"))
        disklog_stop();
    else
        disklog_set(device, rate, fresh != 0);
    return true;
}

static bool command_clock(const char *line)
{
    int64_t on;
    if (!word_number(line, "on", &on))
        return false;
    clock_set(on != 0);
    return true;
}

static bool command_corrupt(const char *line)
{
    int64_t page = 0;
    word_number(line, "page", &page);
    return stamp_corrupt(page);
}

static bool command_reset(const char *line)
{
    (void)line;
    clock_reset();
    disklog_reset();
    return true;
}

static bool command_nothing(const char *line)
{
    (void)line;
    return true;
}

static const struct {
    const char *verb;
    bool (*act)(const char *line);
    const char *usage;
} COMMANDS[] = {
    {"ping", command_nothing, "ping"},
    {"stats", command_nothing, "stats"},
    {"check", command_nothing, "check: one whole pass over the stamped pages, now"},
    {"stamp", command_stamp, "stamp mib=N [rate=MB/s] [check=MB/s]; mib=0 ends it"},
    {"corrupt", command_corrupt, "corrupt [page=N]: one wrong bit in a stamped page"},
    {"dirty", command_dirty, "dirty rate=MB/s [mib=N]; rate=0 ends it"},
    {"log", command_log, "log dev=NAME|off [rate=RECORDS/s, 0: fastest] [fresh=1]"},
    {"clock", command_clock, "clock on=0|1"},
    {"reset", command_reset, "reset: forget the largest gaps"},
    {"poweroff", command_nothing, "poweroff"},
};
#define COMMAND_COUNT (sizeof COMMANDS / sizeof *COMMANDS)

/* Answers one command. Every answer has "ok", and "id" when the command had one (a retry over UDP
 * can be told from an old answer); `stats` adds "stats", `check` adds "found" and "stamps". */
static void obey(const char *line, struct text *out)
{
    char id[40];
    size_t verb = strcspn(line, " \t\r\n"), i = 0;
    while (i < COMMAND_COUNT &&
           (strlen(COMMANDS[i].verb) != verb || strncmp(line, COMMANDS[i].verb, verb)))
        i++;
    append(out, "{");
    if (word_value(line, "id", id, sizeof id) && !strpbrk(id, "\"\\"))
        append(out, "\"id\":\"%s\",", id);
    if (i == COMMAND_COUNT) {
        append(out, "\"ok\":false,\"error\":\"unknown command; known:");
        for (i = 0; i < COMMAND_COUNT; i++)
            append(out, " %s", COMMANDS[i].verb);
        append(out, "\"}");
        return;
    }
    if (!COMMANDS[i].act(line)) {
        append(out, "\"ok\":false,\"error\":\"usage: %s\"}", COMMANDS[i].usage);
        return;
    }
    append(out, "\"ok\":true");
    if (!strcmp(COMMANDS[i].verb, "check")) {
        struct stamp_found all = stamp_check_now();
        append(out, ",\"found\":%lld,\"stamps\":%lld", (long long)all.bad, (long long)all.stamps);
    }
    if (!strcmp(COMMANDS[i].verb, "stats")) {
        append(out, ",\"stats\":");
        stats_json(out);
    }
    append(out, "}");
}

static int bind_control(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(CONTROL_PORT)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0) {
        perror("gwguest: cannot listen on UDP port 7777");
        exit(1);
    }
    return fd;
}

static void serve(int fd)
{
    for (;;) {
        char line[512], answer[4096];
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t n = recvfrom(fd, line, sizeof line - 1, 0, (struct sockaddr *)&from, &length);
        if (n < 0)
            continue;
        line[n] = '\0';
        struct text out = {answer, 0, sizeof answer};
        obey(line, &out);
        sendto(fd, answer, out.used, 0, (struct sockaddr *)&from, length);
        if (!strncmp(line, "poweroff", 8))
            power_off();
    }
}

/* "A[:B]" of a kernel parameter. Keeps `second` when there is no B. */
static bool pair(const char *line, const char *key, char *first, size_t size, int64_t *second)
{
    if (!word_value(line, key, first, size))
        return false;
    char *colon = strchr(first, ':');
    if (colon) {
        *colon = '\0';
        *second = atoll(colon + 1);
    }
    return true;
}

static void start_as_told(void)
{
    char line[4096] = "", value[64];
    int64_t second, on = 0;
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = read(fd, line, sizeof line - 1);
    line[n > 0 ? n : 0] = '\0';
    close(fd);
    second = DEFAULT_STAMP_RATE;
    if (pair(line, "godwit.stamp", value, sizeof value, &second))
        stamp_set(atoll(value), (double)second, DEFAULT_CHECK_RATE);
    second = 0;
    if (pair(line, "godwit.dirty", value, sizeof value, &second))
        dirty_set(atof(value), second);
    second = DEFAULT_LOG_RATE;
    if (pair(line, "godwit.log", value, sizeof value, &second) && !strpbrk(value, "\"\\"))
        disklog_set(value, second, false);
    if (word_number(line, "godwit.clock", &on))
        clock_set(on != 0);
}

int main(void)
{
    /* Nothing here may be named in a way that would break the JSON. */
    gethostname(host_name, sizeof host_name - 1);
    for (char *at = host_name; *at; at++)
        if (*at == '"' || *at == '\\' || *at < ' ')
            *at = '-';
    /* The echo is last: once it answers, commands are not lost either. */
    int control = bind_control();
    page_start();
    power_start();
    echo_start();
    start_as_told();
    serve(control);
}
