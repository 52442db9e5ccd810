/* One page for people, one document for programs, over the smallest useful HTTP. */
#define _GNU_SOURCE
#include "gwguest.h"

#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HTTP_PORT 80

static const char HTML[] =
    "<!doctype html><meta charset=utf-8><title>%s</title>"
    "<style>body{font:1.1em sans-serif;margin:3em;max-width:50em}pre{background:#eee;padding:1em}"
    "</style><h1>%s</h1><p>up for %.1f s. Each request is answered by a running virtual machine."
    "<p><a href=/stats.json>stats.json</a><pre>%s</pre>";

static void answer(int fd)
{
    char request[1024], body[6144], stats[3072], name[65] = "", head[192];
    ssize_t n = recv(fd, request, sizeof request - 1, 0);
    if (n <= 0)
        return;
    request[n] = '\0';
    struct text out = {stats, 0, sizeof stats}, page = {body, 0, sizeof body}, top = {head, 0, 192};
    const char *kind = "text/html; charset=utf-8", *status = "200 OK";
    stats_json(&out);
    gethostname(name, sizeof name - 1);
    if (!strncmp(request, "GET /stats.json ", 16)) {
        kind = "application/json";
        append(&page, "%s\n", stats);
    } else if (!strncmp(request, "GET / ", 6)) {
        append(&page, HTML, name, name, (double)clock_ns(CLOCK_BOOTTIME) / 1e9, stats);
    } else {
        status = "404 Not Found";
        append(&page, "not here; try /\n");
    }
    append(&top,
           "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n",
           status, kind, page.used);
    if (send(fd, head, top.used, MSG_NOSIGNAL | MSG_MORE) > 0)
        send(fd, body, page.used, MSG_NOSIGNAL);
    shutdown(fd, SHUT_WR);
    recv(fd, request, sizeof request, 0);
}

static void *page_body(void *argument)
{
    int fd = (int)(intptr_t)argument;
    struct timeval patience = {.tv_sec = 2};
    for (;;) {
        int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0)
            continue;
        setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        answer(client);
        close(client);
    }
    return NULL;
}

void page_start(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(HTTP_PORT)};
    int yes = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0 || listen(fd, 16) < 0) {
        perror("gwguest: cannot listen on TCP port 80");
        return;
    }
    pthread_t thread;
    pthread_create(&thread, NULL, page_body, (void *)(intptr_t)fd);
}
