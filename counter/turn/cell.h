/* The total in memory with the tag of the addition that was made last, side by side so that both
 * change at once: cffi reads this text as it stands. */

struct cell {
    uint64_t total;
    uint64_t tag; /* the place of a process, plus 1, in the upper 8 bits; the number of its addition */
};

/* Whether this program has an instruction that swaps 16 bytes; whether the processor has it is not
 * asked here. */
int cell_can_swap(void);

/* Adds with a tag: 0, and the total before it is in *before, also where this process dies inside. The
 * addition whose tag is replaced is noted to be done, in `done`: a row for each of `places`, a cell
 * for each that notes it. -1 where nothing was done, as there is no such instruction. */
int cell_add(struct cell *cell, uint64_t amount, uint64_t tag, uint64_t *before, uint64_t *done,
             uint32_t places);
