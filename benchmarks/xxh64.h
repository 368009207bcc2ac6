/* The checksum of a frame: XXH64, seed 0, of an amount's decimal ASCII text.
 *
 * Question: is this amount's checksum what the frame says? Written from the public specification
 * (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md) so that the C programs here need
 * no library. Only its form for inputs below 32 bytes: the longest text, 2^64 - 1, has 20 digits.
 *
 * Command: none, it is included by floor.c and generator.c.
 *
 * Invalid if: any vector of docs/protocol.md disagrees. compare.py would notice at once: floor.c
 * and generator.c share this file, but every other server is asked with its frames too. */

#ifndef XXH64_H
#define XXH64_H

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define FRAME_BYTES 16
#define REPLY_BYTES 8
#define DECIMAL_DIGITS_MAX 20

#define XXH64_PRIME_1 0x9E3779B185EBCA87ULL
#define XXH64_PRIME_2 0xC2B2AE3D27D4EB4FULL
#define XXH64_PRIME_3 0x165667B19E3779F9ULL
#define XXH64_PRIME_4 0x85EBCA77C2B2AE63ULL
#define XXH64_PRIME_5 0x27D4EB2F165667C5ULL

static inline uint64_t rotate_left(uint64_t value, int bits) {
    return (value << bits) | (value >> (64 - bits));
}

/* XXH64 with seed 0 of fewer than 32 bytes. */
static inline uint64_t xxh64_short(const uint8_t *data, size_t bytes) {
    uint64_t hash = XXH64_PRIME_5 + bytes;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint64_t lane;
        memcpy(&lane, data, 8);
        hash ^= rotate_left(le64toh(lane) * XXH64_PRIME_2, 31) * XXH64_PRIME_1;
        hash = rotate_left(hash, 27) * XXH64_PRIME_1 + XXH64_PRIME_4;
    }
    if (bytes >= 4) {
        uint32_t lane;
        memcpy(&lane, data, 4);
        hash ^= le32toh(lane) * XXH64_PRIME_1;
        hash = rotate_left(hash, 23) * XXH64_PRIME_2 + XXH64_PRIME_3;
        bytes -= 4, data += 4;
    }
    for (; bytes > 0; bytes--, data++) {
        hash ^= *data * XXH64_PRIME_5;
        hash = rotate_left(hash, 11) * XXH64_PRIME_1;
    }
    hash = (hash ^ (hash >> 33)) * XXH64_PRIME_2;
    hash = (hash ^ (hash >> 29)) * XXH64_PRIME_3;
    return hash ^ (hash >> 32);
}

/* Writes the decimal text so that it ends at `end`; gives back where it starts. */
static inline uint8_t *decimal_text(uint64_t amount, uint8_t *end) {
    static const char pairs[] =
        "00010203040506070809101112131415161718192021222324252627282930313233343536373839"
        "40414243444546474849505152535455565758596061626364656667686970717273747576777879"
        "8081828384858687888990919293949596979899";
    for (; amount >= 100; amount /= 100) {
        end -= 2;
        memcpy(end, pairs + 2 * (amount % 100), 2);
    }
    if (amount >= 10) {
        end -= 2;
        memcpy(end, pairs + 2 * amount, 2);
    } else {
        *--end = (uint8_t)('0' + amount);
    }
    return end;
}

static inline uint64_t amount_checksum(uint64_t amount) {
    uint8_t text[DECIMAL_DIGITS_MAX];
    uint8_t *end = text + DECIMAL_DIGITS_MAX;
    uint8_t *start = decimal_text(amount, end);
    return xxh64_short(start, (size_t)(end - start));
}

/* The 8 bytes at `data`, big-endian, at any alignment. */
static inline uint64_t load_big_endian(const uint8_t *data) {
    uint64_t value;
    memcpy(&value, data, 8);
    return be64toh(value);
}

static inline void store_big_endian(uint8_t *data, uint64_t value) {
    value = htobe64(value);
    memcpy(data, &value, 8);
}

#endif
