/* XXH64 with seed 0 of a short text, from the public specification
 * (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
 *
 * Only what 20 digits need: one or two words of eight bytes, one of four, up to three single bytes.
 * There is no loop, so that of texts of one length, hashed one after another, every branch is
 * foreseen; a form compiled for each length is no faster. */

#ifndef TURN_XXH64_H
#define TURN_XXH64_H

#include <stdint.h>
#include <string.h>

static const uint64_t PRIME_1 = 0x9E3779B185EBCA87, PRIME_2 = 0xC2B2AE3D27D4EB4F,
                      PRIME_3 = 0x165667B19E3779F9, PRIME_4 = 0x85EBCA77C2B2AE63,
                      PRIME_5 = 0x27D4EB2F165667C5;

static inline uint64_t rotated(uint64_t value, int bits) {
    return value << bits | value >> (64 - bits);
}

static inline uint64_t with_eight(uint64_t hash, const uint8_t *text) {
    uint64_t word;
    memcpy(&word, text, sizeof word);
    hash ^= rotated(word * PRIME_2, 31) * PRIME_1;
    return rotated(hash, 27) * PRIME_1 + PRIME_4;
}

static inline uint64_t with_four(uint64_t hash, const uint8_t *text) {
    uint32_t word;
    memcpy(&word, text, sizeof word);
    return rotated(hash ^ word * PRIME_1, 23) * PRIME_2 + PRIME_3;
}

static inline uint64_t with_one(uint64_t hash, const uint8_t *text) {
    return rotated(hash ^ *text * PRIME_5, 11) * PRIME_1;
}

/* The hash of at most 23 bytes, at any alignment, on a little-endian machine. */
static inline uint64_t xxh64_short(const uint8_t *text, size_t bytes) {
    uint64_t hash = PRIME_5 + bytes;
    const uint8_t *end = text + bytes;
    if (bytes >= 8) hash = with_eight(hash, text);
    if (bytes >= 16) hash = with_eight(hash, text + 8);
    if (bytes & 4) hash = with_four(hash, end - bytes % 8);
    text = end - bytes % 4;
    if (text < end) hash = with_one(hash, text++);
    if (text < end) hash = with_one(hash, text++);
    if (text < end) hash = with_one(hash, text++);
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

#endif
