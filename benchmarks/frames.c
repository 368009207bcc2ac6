/* Question: what does a frame cost the compiled turn, beside the floor? counter/turn/frames.c
 * verifies a batch and writes its replies; floor.c does the same by its own loop.
 *
 * Command: cc -O2 -o frames frames.c ../counter/turn/frames.c && taskset -c 0 ./frames
 * It takes three seconds and prints a Markdown table.
 *
 * The batches of a case are cut from a mebibyte of frames, so that no branch can be learned by
 * heart. In each round both have their turn, every second round in the opposite order; medians
 * count, of nanoseconds for a frame and its reply.
 *
 * Invalid if: other work runs (the fastest and the slowest round are in brackets), or a server
 * finds its frames elsewhere than in the second cache, where they are here. */

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../counter/turn/frames.h" /* before floor.c, which defines the sizes as macros */

#undef _GNU_SOURCE /* floor.c defines it too */
#define main floor_main
#include "floor.c"
#undef main

#include <time.h>

enum { ROUNDS = 101, POOL_FRAMES = 65536, DEEPEST = 4096 };

struct way {
    double ns[ROUNDS]; /* a frame */
    size_t (*batch)(const uint8_t *frames, size_t count);
};

static uint8_t pool[POOL_FRAMES * FRAME_BYTES];
static uint8_t replies[DEEPEST * REPLY_BYTES];
static uint64_t amounts[DEEPEST];

static uint64_t random_word(void) {
    static uint64_t state = 88172645463325252;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1D;
}

static double now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static size_t by_floor(const uint8_t *frames, size_t count) {
    return add_frames(frames, count, replies);
}

static size_t by_turn(const uint8_t *frames, size_t count) {
    struct batch batch = frames_verify(frames, count, UINT64_MAX, amounts);
    totals_write(&batch, amounts, total, replies);
    total += batch.sum;
    return batch.count;
}

static void measure(struct way *way, size_t count, int round) {
    double started = now_ns();
    for (size_t i = 0; i + count <= POOL_FRAMES; i += count) {
        if (way->batch(pool + i * FRAME_BYTES, count) != count) give_up("frames: refused");
    }
    way->ns[round] = (now_ns() - started) / (double)(POOL_FRAMES / count * count);
}

static int compare(const void *one, const void *other) {
    double left = *(const double *)one, right = *(const double *)other;
    return (left > right) - (left < right);
}

static void show(const char *name, size_t count, uint64_t lowest, uint64_t highest) {
    for (size_t i = 0; i < POOL_FRAMES; i++) {
        uint64_t span = highest - lowest + 1; /* 0: all words */
        uint64_t amount = span == 0 ? random_word() : lowest + random_word() % span;
        store_big_endian(pool + i * FRAME_BYTES, amount);
        store_big_endian(pool + i * FRAME_BYTES + 8, amount_checksum(amount));
    }
    struct way floor_way = {.batch = by_floor}, turn = {.batch = by_turn};
    for (int round = 0; round < ROUNDS; round++) {
        measure(round % 2 ? &turn : &floor_way, count, round);
        measure(round % 2 ? &floor_way : &turn, count, round);
    }
    qsort(floor_way.ns, ROUNDS, sizeof(double), compare);
    qsort(turn.ns, ROUNDS, sizeof(double), compare);
    printf("| %s | %zu | %.2f [%.2f, %.2f] | %.2f [%.2f, %.2f] | %.2f |\n", name, count,
           floor_way.ns[ROUNDS / 2], floor_way.ns[0], floor_way.ns[ROUNDS - 1], turn.ns[ROUNDS / 2],
           turn.ns[0], turn.ns[ROUNDS - 1], turn.ns[ROUNDS / 2] / floor_way.ns[ROUNDS / 2]);
}

int main(void) {
    static const size_t counts[] = {1, 16, 256, 1024, 4096};
    puts("| amounts | frames | floor, ns a frame | turn, ns a frame | share |");
    puts("|---|---|---|---|---|");
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) show("1", counts[i], 1, 1);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) show("1-100", counts[i], 1, 100);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) show("0-4095", counts[i], 0, 4095);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        show("1-1000000", counts[i], 1, 1000000);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        show("64-bit", counts[i], 0, UINT64_MAX);
}
