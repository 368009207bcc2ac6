/* The addition of which a crash leaves behind whether it was made: counter/totals/ledger.py says why
 * these steps, and in this order. Here are the two that have to be quick, since whoever adds in
 * between makes them begin anew. */

#include <stdbool.h>
#include <stdint.h>

#include "cell.h"

enum { PLACE_SHIFT = 56 };

#if defined(__x86_64__)

int cell_can_swap(void) { return 1; }

/* The cell becomes `total` and `tag` if it still is what was read. A barrier, as every locked
 * instruction: what was stored before is seen by whoever sees the swap. */
static bool swap(struct cell *cell, struct cell was, uint64_t total, uint64_t tag) {
    bool done;
    __asm__ __volatile__("lock cmpxchg16b %1"
                         : "=@ccz"(done), "+m"(*cell), "+a"(was.total), "+d"(was.tag)
                         : "b"(total), "c"(tag)
                         : "memory");
    return done;
}

#else

int cell_can_swap(void) { return 0; }

#endif

int cell_add(struct cell *cell, uint64_t amount, uint64_t tag, uint64_t *before, uint64_t *done,
             uint32_t places) {
#if defined(__x86_64__)
    uint64_t place = (tag >> PLACE_SHIFT) - 1;
    struct cell was;
    do {
        was.total = __atomic_load_n(&cell->total, __ATOMIC_SEQ_CST);
        was.tag = __atomic_load_n(&cell->tag, __ATOMIC_SEQ_CST);
        uint64_t owner = was.tag >> PLACE_SHIFT;
        if (owner != 0 && owner - 1 != place) {
            uint64_t number = was.tag & (((uint64_t)1 << PLACE_SHIFT) - 1);
            __atomic_store_n(&done[(owner - 1) * places + place], number, __ATOMIC_SEQ_CST);
        }
        __atomic_store_n(before, was.total, __ATOMIC_SEQ_CST);
    } while (!swap(cell, was, was.total + amount, tag));
    return 0;
#else
    (void)cell, (void)amount, (void)tag, (void)before, (void)done, (void)places;
    return -1;
#endif
}
