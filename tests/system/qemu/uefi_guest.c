/* A guest for UEFI: counts its boots in a variable, and tells what the variable is, over and over.
 *
 *   UEFI 1 . 1 . 1      first boot; the number after each dot is read from the flash anew
 *
 * The power button makes it write a 5 into the variable and cut its own power.
 */
#include <stdint.h>

struct guid {
    uint32_t a;
    uint16_t b, c;
    uint8_t d[8];
};

typedef uint64_t (*get_variable)(const uint16_t *, const struct guid *, uint32_t *, uint64_t *,
                                 void *);
typedef uint64_t (*set_variable)(const uint16_t *, const struct guid *, uint32_t, uint64_t,
                                 const void *);

static void out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

static void out16(uint16_t port, uint16_t value)
{
    asm volatile("outw %0, %1" ::"a"(value), "Nd"(port));
}

static uint8_t in8(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static uint16_t in16(uint16_t port)
{
    uint16_t value;
    asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void say(char letter)
{
    while (!(in8(0x3fd) & 0x20))
        ;
    out8(0x3f8, (uint8_t)letter);
}

__attribute__((section(".entry"))) uint64_t start(void *image, uint8_t *system)
{
    /* Non-volatile, for boot services and later. */
    const uint32_t kept = 7;
    const struct guid ours = {
        0x9a7d1c52, 0x60b1, 0x4e6e, {0x9c, 0x2f, 0x4e, 0x30, 0x51, 0x77, 0x18, 0x6a}};
    const uint16_t name[] = {'G', 'o', 'd', 'w', 'i', 't', 0};
    uint8_t *runtime = *(uint8_t **)(system + 0x58);
    get_variable get = *(get_variable *)(runtime + 0x48);
    set_variable set = *(set_variable *)(runtime + 0x58);
    uint64_t size = 1;
    char value = '0';

    (void)image;
    get(name, &ours, 0, &size, &value);
    value++;
    uint64_t failed = set(name, &ours, kept, 1, &value);
    say('U'), say('E'), say('F'), say('I'), say(failed ? '!' : ' ');
    out16(0x602, 0x100); /* enable the power button */
    for (;;) {
        value = '?', size = 1;
        get(name, &ours, 0, &size, &value);
        say(value), say('.');
        for (volatile uint32_t i = 0; i < 1 << 18; i++)
            ;
        if (in16(0x600) & 0x100)
            break;
    }
    value = '5';
    set(name, &ours, kept, 1, &value);
    out16(0x604, 0x2000);
    for (;;)
        asm volatile("hlt");
}
