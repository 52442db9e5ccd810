/* UDP echo for probes: what comes is sent back as it is, before anything else in the guest runs. */
#define _GNU_SOURCE
#include "gwguest.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#define ECHO_PORT 7
#define PRIORITY 50

static counter packets, failures;

static void *echo_body(void *argument)
{
    int fd = (int)(intptr_t)argument;
    static char data[65536];
    thread_real_time(PRIORITY);
    for (;;) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t n = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&from, &length);
        if (n < 0)
            continue;
        if (sendto(fd, data, (size_t)n, 0, (struct sockaddr *)&from, length) == n)
            packets++;
        else
            failures++;
    }
    return NULL;
}

void echo_start(void)
{
    /* A deep queue, so that a probe's burst after a pause is kept. */
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(ECHO_PORT)};
    int queue = 4 << 20;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &queue, sizeof queue);
    if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0) {
        perror("gwguest: cannot listen on UDP port 7");
        return;
    }
    pthread_t thread;
    pthread_create(&thread, NULL, echo_body, (void *)(intptr_t)fd);
}

void echo_stats(struct text *out)
{
    append(out, "{\"packets\":%lld,\"failures\":%lld}", (long long)packets, (long long)failures);
}
