/* One turn of the server in one call: every connection that is ready is read and verified, the sum
 * is added once, every reply is sent.
 *
 * Here is what needs no decision. Whatever does is an event, which Python decides before the next
 * call: plain.py does the same in Python, and tests/turn/test_engines.py holds both to one contract.
 * No descriptor is opened, closed or watched here, and nothing is known of workers and deadlines. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include "frames.h"
#include "turn.h"

enum {
    READ_BYTES = 65536,
    READ_FRAMES = READ_BYTES / FRAME_BYTES + 1, /* with the frame that had begun before */
    REPLY_ROOM = READ_FRAMES * REPLY_BYTES,
    ROUNDS = 16
};

struct connection {
    uint32_t serial; /* changes when it is forgotten */
    uint32_t owed;   /* frames that wait for a store */
    uint32_t tag;    /* whose it is, to Python; 0: nobody's */
    int64_t left;    /* bytes that are still to be read; below 0: without an end */
    int64_t read_at_ns;
    uint8_t held[FRAME_BYTES]; /* of a frame that has begun */
    uint8_t held_bytes;
    bool serves; /* its frames are taken here; otherwise Python is told that it is ready */
    bool holds;  /* replies that came before wait for the kernel: these wait behind them */
    bool tells;  /* Python wants to know when nothing is owed */
    bool fresh;  /* none of its frames was taken or refused yet */
};

struct turn_engine {
    int epoll;
    uint64_t max_amount;
    struct turn_state *state;
    struct connection *connections; /* by descriptor */
    size_t room;
    struct turn_part parts[TURN_PARTS];
    struct epoll_event ready[TURN_PARTS];
    uint8_t in[FRAME_BYTES + READ_BYTES];
    uint64_t amounts[TURN_PARTS * READ_FRAMES]; /* pages that no turn reaches are never touched */
    uint8_t out[REPLY_ROOM];
    uint8_t unsent[TURN_PARTS * REPLY_ROOM];
    size_t unsent_bytes;
    uint8_t refused[TURN_PARTS * TURN_HELLO_BYTES];
    size_t refusals;
};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void tell(struct turn_engine *engine, int fd, enum turn_kind kind, const uint8_t *bytes,
                 size_t size) {
    struct turn_event *event = &engine->state->event[engine->state->events++];
    *event = (struct turn_event){(int32_t)kind, fd, (uint32_t)size, bytes};
}

struct turn_engine *turn_open(int epoll, uint64_t max_amount, struct turn_state *state) {
    struct turn_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL) return NULL;
    engine->epoll = epoll;
    engine->max_amount = max_amount;
    engine->state = state;
    return engine;
}

void turn_close(struct turn_engine *engine) {
    free(engine->connections);
    free(engine);
}

int turn_add(struct turn_engine *engine, int fd) {
    size_t wanted = (size_t)fd + 1;
    if (wanted > engine->room) {
        size_t room = wanted + wanted / 2;
        struct connection *grown = realloc(engine->connections, room * sizeof *grown);
        if (grown == NULL) return -1;
        memset(grown + engine->room, 0, (room - engine->room) * sizeof *grown);
        engine->connections = grown;
        engine->room = room;
    }
    struct connection *connection = &engine->connections[fd];
    *connection =
        (struct connection){.serial = connection->serial, .left = -1, .fresh = true};
    return 0;
}

void turn_forget(struct turn_engine *engine, int fd) {
    struct connection *connection = &engine->connections[fd];
    *connection = (struct connection){.serial = connection->serial + 1, .left = -1};
}

void turn_serve_frames(struct turn_engine *engine, int fd, int serves) {
    engine->connections[fd].serves = serves != 0;
}

void turn_hold_replies(struct turn_engine *engine, int fd, int holds) {
    engine->connections[fd].holds = holds != 0;
}

void turn_limit(struct turn_engine *engine, int fd, int64_t bytes) {
    engine->connections[fd].left = bytes;
}

/* What it has asked for so far is another connection's now, which is gone. */
void turn_void(struct turn_engine *engine, int fd) {
    struct connection *connection = &engine->connections[fd];
    connection->serial++;
    connection->owed = 0;
    connection->tells = false;
}

void turn_tell(struct turn_engine *engine, int fd) { engine->connections[fd].tells = true; }

void turn_join(struct turn_engine *engine, int fd, uint32_t tag) {
    engine->connections[fd].tag = tag;
}

uint32_t turn_serial(const struct turn_engine *engine, int fd) {
    return engine->connections[fd].serial;
}

uint32_t turn_owed(const struct turn_engine *engine, int fd) {
    return engine->connections[fd].owed;
}

uint32_t turn_held(const struct turn_engine *engine, int fd) {
    return engine->connections[fd].held_bytes;
}

int64_t turn_read_at(const struct turn_engine *engine, int fd) {
    return engine->connections[fd].read_at_ns;
}

/* Tells of a refused frame, which is in `in` behind `good` others. */
static void refuse(struct turn_engine *engine, int fd, enum turn_kind kind, size_t good,
                   size_t size) {
    uint8_t *refused = engine->refused + engine->refusals++ * TURN_HELLO_BYTES;
    memcpy(refused, engine->in + good * FRAME_BYTES, size);
    tell(engine, fd, kind, refused, size);
}

/* Verifies what `in` holds, which begins with what was held: the good frames join the turn. */
static void take_frames(struct turn_engine *engine, int fd, size_t bytes) {
    struct connection *connection = &engine->connections[fd];
    struct turn_state *state = engine->state;
    bool had_begun = connection->held_bytes > 0;
    size_t whole = bytes / FRAME_BYTES;
    uint64_t *amounts = engine->amounts + state->amounts;
    struct batch batch = frames_verify(engine->in, whole, engine->max_amount, amounts);
    size_t good = batch.count;
    if (good > 0) {
        engine->parts[state->parts++] =
            (struct turn_part){fd, connection->serial, connection->tag, batch, amounts};
        state->tagged += connection->tag != 0;
        state->frames += good;
        state->sum += batch.sum;
        state->amounts += batch.uniform ? 1 : good;
    }
    /* Whether it is one is Python's to say, which gets what stands behind it too. */
    bool may_greet = connection->fresh && good == 0 && batch.refusal == FRAME_CHECKSUM;
    size_t rest = batch.refusal == FRAME_GOOD ? bytes % FRAME_BYTES : 0;
    connection->held_bytes = (uint8_t)rest;
    memcpy(connection->held, engine->in + whole * FRAME_BYTES, rest);
    if (rest > 0 && (good > 0 || !had_begun)) tell(engine, fd, TURN_BEGUN, NULL, 0);
    if (rest == 0 && had_begun && !may_greet) tell(engine, fd, TURN_COMPLETED, NULL, 0);
    if (may_greet)
        refuse(engine, fd, TURN_HELLO, 0, bytes < TURN_HELLO_BYTES ? bytes : TURN_HELLO_BYTES);
    else if (batch.refusal == FRAME_CHECKSUM)
        refuse(engine, fd, TURN_CHECKSUM, good, FRAME_BYTES);
    else if (batch.refusal == FRAME_LIMIT)
        refuse(engine, fd, TURN_LIMIT, good, FRAME_BYTES);
    connection->fresh = connection->fresh && whole == 0;
}

static void read_connection(struct turn_engine *engine, int fd) {
    struct connection *connection = &engine->connections[fd];
    size_t held = connection->held_bytes, room = READ_BYTES;
    if (connection->left >= 0 && connection->left < READ_BYTES) room = (size_t)connection->left;
    memcpy(engine->in, connection->held, held);
    ssize_t got = recv(fd, engine->in + held, room, 0);
    if (got < 0) {
        if (errno != EAGAIN && errno != EINTR) tell(engine, fd, TURN_RESET, NULL, 0);
        return;
    }
    if (got == 0) {
        tell(engine, fd, TURN_END, NULL, 0);
        return;
    }
    connection->read_at_ns = engine->state->now_ns;
    take_frames(engine, fd, held + (size_t)got);
    if (connection->left >= 0 && (connection->left -= got) == 0)
        tell(engine, fd, TURN_DRAINED, NULL, 0);
}

static void take_ready(struct turn_engine *engine, int fd, uint32_t events) {
    /* A peer that reset is not counted any more, whatever it left in the socket. */
    if (events & (EPOLLERR | EPOLLHUP)) {
        tell(engine, fd, TURN_RESET, NULL, 0);
    } else if (engine->connections[fd].serves) {
        read_connection(engine, fd);
    } else {
        tell(engine, fd, TURN_READY, NULL, 0);
    }
}

static int receive(struct turn_engine *engine) {
    int most = TURN_PARTS - engine->state->parts;
    int count = epoll_wait(engine->epoll, engine->ready, most, 0);
    for (int i = 0; i < count; i++) {
        struct epoll_event *ready = &engine->ready[i];
        take_ready(engine, ready->data.fd, ready->events);
    }
    return count;
}

static void begin(struct turn_engine *engine) {
    struct turn_state *state = engine->state;
    state->events = state->parts = state->tagged = 0;
    state->frames = state->sum = state->amounts = 0;
    state->now_ns = now_ns();
    engine->unsent_bytes = engine->refusals = 0;
}

int turn_receive(struct turn_engine *engine, int fd) {
    struct turn_state *state = engine->state;
    begin(engine);
    if (fd >= 0) {
        read_connection(engine, fd);
        return 1;
    }
    int all = 0, count, parts;
    do {
        parts = state->parts;
        count = receive(engine);
        all += count > 0 ? count : 0;
    } while (state->parts > parts && state->parts < TURN_PARTS && state->events == 0);
    return all;
}

void turn_keep(struct turn_engine *engine, struct turn_part *parts, uint64_t *amounts) {
    struct turn_state *state = engine->state;
    state->events = 0;
    memcpy(amounts, engine->amounts, state->amounts * sizeof *amounts);
    for (int i = 0; i < state->parts; i++) {
        struct turn_part *part = &parts[i];
        struct connection *connection = &engine->connections[engine->parts[i].fd];
        *part = engine->parts[i];
        part->amounts = amounts + (part->amounts - engine->amounts);
        connection->owed += (uint32_t)part->batch.count;
        if (connection->owed >= TURN_UNREAD_FRAMES && !connection->tells) {
            connection->tells = true;
            tell(engine, part->fd, TURN_FULL, NULL, 0);
        }
    }
}

/* Sends replies; what the kernel does not take is Python's. */
static void send_replies(struct turn_engine *engine, int fd, size_t size) {
    struct connection *connection = &engine->connections[fd];
    ssize_t sent = 0;
    if (!connection->holds) {
        sent = send(fd, engine->out, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            tell(engine, fd, TURN_RESET, NULL, 0);
            return;
        }
        if (sent < 0) sent = 0;
        if ((size_t)sent == size) return;
    }
    uint8_t *unsent = engine->unsent + engine->unsent_bytes;
    size_t rest = size - (size_t)sent;
    memcpy(unsent, engine->out + sent, rest);
    engine->unsent_bytes += rest;
    connection->holds = true;
    tell(engine, fd, TURN_UNSENT, unsent, rest);
}

int turn_shares(const struct turn_engine *engine, const struct turn_part *parts, int count,
                struct turn_share *shares) {
    int found = 0;
    uint64_t offset = 0;
    if (parts == NULL) parts = engine->parts;
    for (int i = 0; i < count; i++) {
        const struct turn_part *part = &parts[i];
        offset += part->batch.sum;
        if (part->tag == 0 || part->batch.count == 0) continue;
        shares[found++] = (struct turn_share){part->tag, part->batch.count, offset};
    }
    return found;
}

static bool is_live(const struct turn_engine *engine, const struct turn_part *part) {
    return part->batch.count > 0 && engine->connections[part->fd].serial == part->serial;
}

uint64_t turn_live(const struct turn_engine *engine, const struct turn_part *parts, int count) {
    uint64_t frames = 0;
    for (int i = 0; i < count; i++) frames += is_live(engine, &parts[i]) ? parts[i].batch.count : 0;
    return frames;
}

static void answer(struct turn_engine *engine, const struct turn_part *parts, int count,
                   uint64_t before) {
    for (int i = 0; i < count; i++) {
        const struct turn_part *part = &parts[i];
        if (is_live(engine, part)) {
            totals_write(&part->batch, part->amounts, before, engine->out);
            send_replies(engine, part->fd, part->batch.count * REPLY_BYTES);
        }
        before += part->batch.sum;
    }
}

void turn_answer(struct turn_engine *engine, uint64_t before) {
    engine->state->events = 0;
    answer(engine, engine->parts, engine->state->parts, before);
}

void turn_answer_kept(struct turn_engine *engine, const struct turn_part *parts, int count,
                      uint64_t before) {
    begin(engine);
    answer(engine, parts, count, before);
    for (int i = 0; i < count; i++) {
        if (!is_live(engine, &parts[i])) continue;
        struct connection *connection = &engine->connections[parts[i].fd];
        connection->owed -= (uint32_t)parts[i].batch.count;
        if (connection->owed == 0 && connection->tells) {
            connection->tells = false;
            tell(engine, parts[i].fd, TURN_ANSWERED, NULL, 0);
        }
    }
}

int turn_serve(struct turn_engine *engine, uint64_t *total, uint64_t *requests, uint64_t *reads,
               int64_t longest_ns) {
    struct turn_state *state = engine->state;
    int64_t until_ns = 0;
    for (int round = 0; round < ROUNDS; round++) {
        begin(engine);
        if (round == 0) until_ns = state->now_ns + longest_ns;
        int ready = receive(engine);
        if (state->tagged > 0) return 1;
        if (state->parts > 0) {
            uint64_t before = __atomic_fetch_add(total, state->sum, __ATOMIC_SEQ_CST);
            *requests += state->frames;
            *reads += (uint64_t)state->parts;
            answer(engine, engine->parts, state->parts, before);
        }
        if (ready <= 0 || state->events > 0 || state->now_ns >= until_ns) break;
    }
    return state->events > 0;
}
