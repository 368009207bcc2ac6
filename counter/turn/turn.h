/* The server's turn, as Python sees it: cffi reads this text as it stands, behind frames.h. */

enum {
    TURN_PARTS = 64,           /* so many connections at most are read before they are answered */
    TURN_UNREAD_FRAMES = 4096, /* so many frames of a connection may wait for a store */
    TURN_HELLO_BYTES = 64      /* so many of what is no frame: a hello has 48, and none behind it */
};

/* What Python has to decide; TURN_UNSENT, the two refusals and TURN_HELLO come with bytes. */
enum turn_kind {
    TURN_READY = 1, /* a descriptor that Python serves can be read or written */
    TURN_BEGUN,     /* a frame has begun that is not whole */
    TURN_COMPLETED, /* the frame that had begun is whole, and none has begun behind it */
    TURN_CHECKSUM,  /* a frame is refused for its checksum */
    TURN_LIMIT,     /* a frame is refused for its amount */
    TURN_END,       /* the peer sends no more */
    TURN_RESET,     /* the connection is gone */
    TURN_DRAINED,   /* what was to be read at most has been read */
    TURN_UNSENT,    /* replies that the kernel did not take */
    TURN_FULL,      /* very many frames wait for a store */
    TURN_ANSWERED,  /* nothing waits for a store any more; follows TURN_FULL, or turn_tell() */
    TURN_HELLO = 13 /* a connection begins with what is no frame */
};

struct turn_event {
    int32_t kind;
    int32_t fd;
    uint32_t size;
    const uint8_t *bytes; /* until the next call */
};

/* What one connection asks in one turn. */
struct turn_part {
    int32_t fd;
    uint32_t serial; /* of the connection: a descriptor's number is used again */
    uint32_t tag;    /* that turn_join() gave it */
    struct batch batch;
    uint64_t *amounts;
};

/* What a part that bears a tag adds, and the sum of the turn up to and including it. */
struct turn_share {
    uint32_t tag;
    uint64_t frames;
    uint64_t offset;
};

/* What the calls below give back besides; read by Python, written here. */
struct turn_state {
    int32_t events;     /* so many of `event` */
    int32_t parts;      /* of the turn that was received */
    int32_t tagged;     /* so many of them bear a tag */
    uint64_t frames;    /* in it */
    uint64_t sum;       /* of it, modulo 2^64 */
    uint64_t amounts;   /* so many cells of memory does it take */
    int64_t now_ns;     /* of the last receive, by the monotonic clock */
    struct turn_event event[512];
};

struct turn_engine;

struct turn_engine *turn_open(int epoll, uint64_t max_amount, struct turn_state *state);
void turn_close(struct turn_engine *engine);

/* Of a connection; turn_add() gives back -1 where memory is missing. */
int turn_add(struct turn_engine *engine, int fd);
void turn_forget(struct turn_engine *engine, int fd);
void turn_serve_frames(struct turn_engine *engine, int fd, int serves);
void turn_hold_replies(struct turn_engine *engine, int fd, int holds);
void turn_limit(struct turn_engine *engine, int fd, int64_t bytes);
void turn_void(struct turn_engine *engine, int fd);
void turn_tell(struct turn_engine *engine, int fd);
void turn_join(struct turn_engine *engine, int fd, uint32_t tag);
uint32_t turn_serial(const struct turn_engine *engine, int fd);
uint32_t turn_owed(const struct turn_engine *engine, int fd);
uint32_t turn_held(const struct turn_engine *engine, int fd);
int64_t turn_read_at(const struct turn_engine *engine, int fd);

/* Reads what is ready until that is nothing or the turn is full, or reads one descriptor; gives back
 * how many were ready. */
int turn_receive(struct turn_engine *engine, int fd);
/* Keeps the turn that was received beyond the next one, in memory of Python's. */
void turn_keep(struct turn_engine *engine, struct turn_part *parts, uint64_t *amounts);
uint64_t turn_live(const struct turn_engine *engine, const struct turn_part *parts, int count);
/* Writes down what the parts that bear a tag add, of the turn that was received where `parts` is
 * NULL; gives back how many they are. */
int turn_shares(const struct turn_engine *engine, const struct turn_part *parts, int count,
                struct turn_share *shares);
/* Answers the turn that was received, or one that was kept. */
void turn_answer(struct turn_engine *engine, uint64_t before);
void turn_answer_kept(struct turn_engine *engine, const struct turn_part *parts, int count,
                      uint64_t before);
/* Receives, adds and answers until nothing is ready, Python is needed, or the time is over; gives
 * back whether it is needed: there are events, or a turn with tags was received and not added. */
int turn_serve(struct turn_engine *engine, uint64_t *total, uint64_t *requests, uint64_t *reads,
               int64_t longest_ns);
