/* The load generator's exchange, as Python sees it: cffi reads this text as it stands. */

enum {
    LOAD_READY = 64,          /* so many connections at most are read before they are sent to */
    LOAD_BURSTS = 16,         /* so many bursts of one connection are in flight at most */
    LOAD_READ_BYTES = 65536,  /* of one connection at a time */
    LOAD_FRAMES = 8192,       /* what the replies in such a read are answered with */
    LOAD_TAPE_REPLIES = 65536 /* so many are recorded by one call at most */
};

/* What Python has to decide. */
enum load_kind {
    LOAD_POLLED = 1, /* a connection that was not lent is ready: the mask of epoll */
    LOAD_RECEIVED,   /* so many bytes are in `received`, 0 at the end: not, or not only, replies */
    LOAD_UNSENT,     /* so many bytes, the last of what is in flight, the kernel did not take */
    LOAD_FAILED      /* the error of a read, or of a send: its frames are in flight */
};

struct load_event {
    int32_t kind;
    int32_t fd;
    int32_t value;
};

/* Frames that were sent together. */
struct load_burst {
    int64_t sent_ns;
    int64_t count;
};

/* A connection, at its descriptor's place. */
struct load_connection {
    int32_t bursts; /* in flight; 0: it is not lent */
    struct load_burst burst[LOAD_BURSTS];
    int64_t in_flight; /* frames in them */
    uint64_t last_total;
    uint64_t number; /* in the recording */
};

/* Frames that were sent and answered together, as the recording has them. */
struct load_record {
    uint64_t sent_ns;
    uint64_t answered_ns;
    uint64_t number;
    uint64_t count;
};

struct load {
    /* From Python. */
    int32_t epoll;
    int32_t descriptors; /* places in `connections`: for each that is watched, there is one */
    struct load_connection *connections;
    const uint8_t *frames; /* LOAD_FRAMES frames of the amount */
    uint64_t amount;
    int64_t measure_from_ns;
    int64_t left;     /* requests: fewer than so many may be sent by one call */
    uint64_t *counts; /* the histogram's buckets */
    struct load_record *bursts; /* the tapes: LOAD_TAPE_REPLIES each, or NULL */
    uint64_t *totals;

    /* What the last call has done. */
    int64_t exchanged;       /* requests answered, and as many sent */
    int64_t spent;           /* of those, sent in the measured part */
    uint64_t latency_sum_ns; /* of the measured ones */
    int64_t latency_max_ns;
    int64_t measured_at_ns; /* when the last of them was read; 0: none was */
    int64_t records;        /* on the tape of bursts; on the other one is what was answered */
    int64_t now_ns;         /* after the last read */
    struct load_event event[LOAD_READY];
    uint8_t received[LOAD_READ_BYTES];
};

/* Exchanges replies for frames, on all lent connections that are ready, until none is, Python is
 * needed or the time is over; gives back how many events there are. */
int load_exchange(struct load *load, int64_t longest_ns);

/* The first lent connection from `fd` on whose oldest frame was sent before then; -1: none. */
int load_sent_before(const struct load *load, int fd, int64_t moment_ns);
