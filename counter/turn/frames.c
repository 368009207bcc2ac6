/* The frames of a read are verified here, and their replies written: no socket, no clock, and no
 * rule but protocol.py's, to which tests/turn/test_frames.py holds it.
 *
 * - Frames that are all alike, which is what counting ones sends, are compared: one is verified.
 * - Small amounts are looked up.
 * - The others are hashed, in blocks sorted by the length of their texts. 64-bit amounts have 19
 *   digits as often as 20, and a branch on it would be foreseen every second time.
 *
 * A block is verified as if it were good, with no way out between its frames, so that the processor
 * works on several at once; where it is not, it is judged again, frame by frame.
 * benchmarks/frames.c has the figures: 64-bit amounts take 10 ns, where dividing and hashing one
 * after another takes 26. */

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "frames.h"
#include "xxh64.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "texts are written and hashed by words, as a little-endian machine has them"
#endif

enum {
    TABLE_SIZE = 4096, /* amounts below are looked up; 32 KiB, of which ones need a single line */
    TABLE_DIGITS = 4,  /* the others have at least so many */
    DIGITS = 20,       /* of the longest amount */
    LENGTHS = DIGITS - TABLE_DIGITS + 1,
    BLOCK = 64 /* 32 takes 5% more time; 128 takes 2% less, and twice the stack of 35 KB */
};

/* Numbers side by side, by whatever vectors the processor has. */
typedef uint16_t eight __attribute__((vector_size(16)));
typedef uint32_t four __attribute__((vector_size(16)));
typedef uint64_t two __attribute__((vector_size(16)));

/* What a frame's checksum is, and the text that it has to be of: its last digits. */
struct record {
    uint64_t checksum; /* in network order, as everywhere here */
    uint8_t unused[4]; /* 32 bytes in all, and 16 digits aligned */
    uint8_t text[DIGITS];
};

static uint64_t table[TABLE_SIZE]; /* the checksums of the smallest amounts */

static inline uint64_t load(const uint8_t *data) {
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

static inline void store(uint8_t *data, uint64_t word) { memcpy(data, &word, sizeof word); }

static inline unsigned digits_of(uint64_t amount) {
    static const uint64_t powers[DIGITS] = {
        1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000, 1000000000, 10000000000,
        100000000000, 1000000000000, 10000000000000, 100000000000000, 1000000000000000,
        10000000000000000, 100000000000000000, 1000000000000000000, 10000000000000000000U};
    amount |= 1; /* 0 has a digit too, and no other amount has more for it */
    unsigned bits = 64 - (unsigned)__builtin_clzll(amount);
    unsigned digits = bits * 1233 >> 12; /* as many, or one more: log 2 is 1233 / 4096 */
    return digits + 1 - (amount < powers[digits]);
}

/* The 16 digits of two numbers below 10^8, which are split in half, and their halves, and theirs,
 * all at once: a text takes 4 ns, where ten divisions by 100, one after another, take 11. */
static inline eight sixteen_digits(uint64_t left, uint64_t right) {
    two numbers = {left, right};
    four upper = (four)numbers / 10000;
    /* Modulo 2^16, which is enough of a rest below 10^4; the word above it is no rest. */
    eight rest = (eight)numbers - (eight)upper * (eight){10000, 0, 0, 0, 10000, 0, 0, 0};
    eight fours = (eight)((two)upper | (two)rest << 48 >> 16); /* each with a 0 behind it */
    eight hundreds = fours / 100;
    rest = fours - hundreds * (eight){100, 0, 100, 0, 100, 0, 100, 0};
    eight pairs = hundreds | (eight)((four)rest << 16);
    eight tens = pairs * 103 >> 10;
    return (tens | (pairs - tens * 10) << 8) + ('0' << 8 | '0');
}

/* The text with zeros in front. */
static inline void write_text(uint64_t amount, uint8_t text[DIGITS]) {
    static const char pairs[] =
        "00010203040506070809101112131415161718192021222324252627282930313233343536373839"
        "40414243444546474849505152535455565758596061626364656667686970717273747576777879"
        "8081828384858687888990919293949596979899";
    uint64_t above = amount / 100000000;
    unsigned first = (unsigned)(above / 100000000); /* at most 1844 */
    eight others = sixteen_digits(above % 100000000, amount % 100000000);
    memcpy(text, pairs + 2 * (first / 100), 2);
    memcpy(text + 2, pairs + 2 * (first % 100), 2);
    memcpy(text + 4, &others, sizeof others);
}

static inline uint64_t text_checksum(const uint8_t text[DIGITS], size_t digits) {
    return htobe64(xxh64_short(text + DIGITS - digits, digits));
}

static uint64_t hashed(uint64_t amount) {
    uint8_t text[DIGITS];
    write_text(amount, text);
    return text_checksum(text, digits_of(amount));
}

/* When the library is loaded, in 40 us. */
__attribute__((constructor)) static void fill_table(void) {
    for (uint64_t amount = 0; amount < TABLE_SIZE; amount++) table[amount] = hashed(amount);
}

static uint64_t checksum_of(uint64_t amount) {
    return amount < TABLE_SIZE ? table[amount] : hashed(amount);
}

/* The bits that are wrong in any checksum of these records. */
static uint64_t wrong_bits(const struct record *record, const struct record *end, size_t digits) {
    uint64_t wrong = 0;
    for (; record < end; record++) wrong |= text_checksum(record->text, digits) ^ record->checksum;
    return wrong;
}

/* Whether a block has no frame that is refused. If so, its amounts are added to the sum. */
static bool block_is_good(const uint8_t *frames, size_t count, uint64_t max_amount,
                            uint64_t *amounts, uint64_t *sum) {
    struct record sorted[LENGTHS][BLOCK];
    struct record *next[LENGTHS];
    for (size_t length = 0; length < LENGTHS; length++) next[length] = sorted[length];
    uint64_t wrong = 0, added = 0, largest = 0;
    for (const uint8_t *end = frames + count * FRAME_BYTES; frames < end; frames += FRAME_BYTES) {
        uint64_t amount = be64toh(load(frames)), checksum = load(frames + 8);
        *amounts++ = amount;
        added += amount;
        largest = amount > largest ? amount : largest;
        if (amount < TABLE_SIZE) {
            wrong |= table[amount] ^ checksum;
            continue;
        }
        struct record *record = next[digits_of(amount) - TABLE_DIGITS]++;
        record->checksum = checksum;
        write_text(amount, record->text);
    }
    for (size_t length = 0; largest >= TABLE_SIZE && length < LENGTHS; length++)
        wrong |= wrong_bits(sorted[length], next[length], length + TABLE_DIGITS);
    if (wrong != 0 || largest > max_amount) return false;
    *sum += added;
    return true;
}

static enum frame_refusal judge(const uint8_t *frame, uint64_t max_amount) {
    uint64_t amount = be64toh(load(frame));
    if (load(frame + 8) != checksum_of(amount)) return FRAME_CHECKSUM;
    return amount > max_amount ? FRAME_LIMIT : FRAME_GOOD;
}

static struct batch verify_mixed(const uint8_t *frames, size_t count, uint64_t max_amount,
                                   uint64_t *amounts) {
    struct batch batch = {.refusal = FRAME_GOOD};
    while (batch.count < count) {
        const uint8_t *block = frames + batch.count * FRAME_BYTES;
        size_t left = count - batch.count, size = left < BLOCK ? left : BLOCK;
        if (block_is_good(block, size, max_amount, amounts + batch.count, &batch.sum)) {
            batch.count += size;
            continue;
        }
        for (const uint8_t *end = block + size * FRAME_BYTES; block < end; block += FRAME_BYTES) {
            batch.refusal = judge(block, max_amount);
            if (batch.refusal != FRAME_GOOD) return batch;
            batch.sum += amounts[batch.count++];
        }
    }
    return batch;
}

struct batch frames_verify(const uint8_t *frames, size_t count, uint64_t max_amount,
                           uint64_t *amounts) {
    struct batch batch = {.refusal = FRAME_GOOD};
    if (count == 0) return batch;
    /* Each is like the one before it: 0.2 ns a frame, and at once where the second is another. */
    if (count > 1 && memcmp(frames, frames + FRAME_BYTES, (count - 1) * FRAME_BYTES) != 0)
        return verify_mixed(frames, count, max_amount, amounts);
    batch.refusal = judge(frames, max_amount);
    if (batch.refusal != FRAME_GOOD) return batch;
    amounts[0] = be64toh(load(frames));
    batch.count = count;
    batch.sum = amounts[0] * count;
    batch.uniform = true;
    return batch;
}

/* Unrolled, because a loop of six instructions takes 0.3 or 0.6 ns by where the linker puts it. */
void totals_write(const struct batch *batch, const uint64_t *amounts, uint64_t before,
                  uint8_t *replies) {
    size_t count = batch->count;
    if (batch->uniform) {
        uint64_t amount = amounts[0];
#pragma GCC unroll 4
        for (size_t i = 0; i < count; i++)
            store(replies + i * REPLY_BYTES, htobe64(before += amount));
    } else {
#pragma GCC unroll 4
        for (size_t i = 0; i < count; i++)
            store(replies + i * REPLY_BYTES, htobe64(before += amounts[i]));
    }
}

void frame_write(uint64_t amount, uint8_t frame[FRAME_BYTES]) {
    store(frame, htobe64(amount));
    store(frame + 8, checksum_of(amount));
}
