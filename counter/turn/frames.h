/* Frames to amounts, totals to replies: protocol.py's rules in C. cffi reads this text as it
 * stands, so it has no line for the preprocessor: it is included once, after what it needs. */

enum { FRAME_BYTES = 16, REPLY_BYTES = 8 };

/* Why a frame is refused. The checksum is judged before the limit. */
enum frame_refusal { FRAME_GOOD, FRAME_CHECKSUM, FRAME_LIMIT };

/* What is good of the frames of one read: the first ones, up to the first that is refused. */
struct batch {
    size_t count;
    uint64_t sum;               /* of their amounts, modulo 2^64 */
    bool uniform;               /* the first amount is the amount of each, and alone is written */
    enum frame_refusal refusal; /* of the frame behind them; FRAME_GOOD: there is none */
};

/* Verifies `count` whole frames, at any alignment. `amounts` has room for as many and gets those of
 * the batch; what is behind them means nothing. */
struct batch frames_verify(const uint8_t *frames, size_t count, uint64_t max_amount,
                           uint64_t *amounts);

/* Writes the reply to each frame of a batch: the total after it, when `before` was the total. The
 * replies may take the place of the amounts. */
void totals_write(const struct batch *batch, const uint64_t *amounts, uint64_t before,
                  uint8_t *replies);

/* Writes the frame that asks to add `amount`. */
void frame_write(uint64_t amount, uint8_t frame[16]);
