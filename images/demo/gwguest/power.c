/* The ACPI power button, read from every input device that has one, ends in a clean power-off. */
#define _GNU_SOURCE
#include "gwguest.h"

#include <fcntl.h>
#include <linux/input.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/poll.h>
#include <sys/reboot.h>
#include <unistd.h>

#define DEVICES 16
#define GRACE_US 100000

void power_off(void)
{
    /* The log ends between two records, everybody is told, then the lights go out. The rest of
     * the root file system is memory: there is nothing to unmount. */
    disklog_stop();
    signal(SIGTERM, SIG_IGN);
    kill(-1, SIGTERM);
    usleep(GRACE_US);
    sync();
    reboot(RB_POWER_OFF);
}

static bool has_power_key(int fd)
{
    unsigned char keys[KEY_MAX / 8 + 1] = {0};
    return ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 &&
           (keys[KEY_POWER / 8] & 1 << KEY_POWER % 8);
}

static void *power_body(void *unused)
{
    (void)unused;
    struct pollfd buttons[DEVICES];
    nfds_t count = 0;
    for (int i = 0; i < DEVICES; i++) {
        char name[32];
        snprintf(name, sizeof name, "/dev/input/event%d", i);
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && has_power_key(fd))
            buttons[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
        else if (fd >= 0)
            close(fd);
    }
    if (!count)
        fprintf(stderr, "gwguest: no power button found\n");
    while (count && poll(buttons, count, -1) > 0) {
        for (nfds_t i = 0; i < count; i++) {
            struct input_event event;
            if (!(buttons[i].revents & POLLIN) ||
                read(buttons[i].fd, &event, sizeof event) != sizeof event)
                continue;
            if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
                power_off();
        }
    }
    return NULL;
}

void power_start(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, power_body, NULL);
}
