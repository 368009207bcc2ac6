/* One turn of the load generator in one call: the replies of all connections that are ready are read,
 * checked, measured and recorded, and as many frames are sent again.
 *
 * Here is what needs no decision: connections that are lent, whole replies to frames of one amount,
 * each of them a rise. Whatever is anything else is an event, and nothing has been done about it:
 * counter/load/connection.py does the same in Python and decides, and tests/load/test_engines.py
 * holds both to one contract. No descriptor is opened, closed or watched here. */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include "load.h"

enum {
    FRAME_BYTES = 16,
    REPLY_BYTES = 8,
    BUCKET_BITS = 7,    /* of counter/results/histogram.py: 128 buckets to each doubling, */
    HISTOGRAM_BITS = 42 /* up to 2^42 ns */
};

/* Beyond, a rise cannot be told from a fall modulo 2^64. */
static const uint64_t CHECKABLE_SUM = UINT64_C(1) << 63;

/* A connection that is to be sent to, and how many frames. */
struct answered {
    int fd;
    int64_t replies;
};

static int64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void tell(struct load *load, int *events, int fd, enum load_kind kind, int64_t value) {
    load->event[(*events)++] = (struct load_event){(int32_t)kind, fd, (int32_t)value};
}

static uint64_t total_at(const struct load *load, int64_t index) {
    uint64_t word;
    memcpy(&word, load->received + index * REPLY_BYTES, sizeof word);
    return be64toh(word);
}

/* Whether each total is at least the amount above the one before it. */
static bool all_rise(const struct load *load, uint64_t last, int64_t replies) {
    for (int64_t i = 0; i < replies; i++) {
        uint64_t total = total_at(load, i), rise = total - last;
        if (rise < load->amount || rise >= CHECKABLE_SUM) return false;
        last = total;
    }
    return true;
}

/* Whether what was read needs no decision. */
static bool is_plain(const struct load *load, const struct load_connection *connection,
                     int64_t bytes) {
    int64_t replies = bytes / REPLY_BYTES;
    const struct load_burst *oldest = &connection->burst[0];
    if (bytes == 0 || bytes % REPLY_BYTES != 0) return false;
    if (replies > connection->in_flight || replies >= load->left) return false;
    if (connection->bursts == LOAD_BURSTS && replies < oldest->count) return false; /* no room */
    if ((load->now_ns - oldest->sent_ns) >> HISTOGRAM_BITS != 0) return false;
    return all_rise(load, connection->last_total, replies);
}

static void measure(struct load *load, int64_t sent_ns, int64_t count) {
    if (sent_ns < load->measure_from_ns) return;
    int64_t took_ns = load->now_ns - sent_ns;
    int bits = 64 - __builtin_clzll((unsigned long long)took_ns | 1);
    int shift = bits > BUCKET_BITS + 1 ? bits - BUCKET_BITS - 1 : 0;
    load->counts[((int64_t)shift << BUCKET_BITS) + (took_ns >> shift)] += (uint64_t)count;
    load->latency_sum_ns += (uint64_t)(took_ns * count);
    if (took_ns > load->latency_max_ns) load->latency_max_ns = took_ns;
    load->measured_at_ns = load->now_ns;
}

static void record(struct load *load, uint64_t number, int64_t sent_ns, int64_t count) {
    if (load->bursts == NULL) return;
    load->bursts[load->records++] = (struct load_record){
        (uint64_t)sent_ns, (uint64_t)load->now_ns, number, (uint64_t)count};
}

/* Counts replies, which belong to the oldest bursts. */
static void settle(struct load *load, struct load_connection *connection, int64_t replies) {
    if (load->totals != NULL) {
        memcpy(load->totals + load->exchanged, load->received, (size_t)replies * REPLY_BYTES);
    }
    load->exchanged += replies;
    load->left -= replies;
    connection->last_total = total_at(load, replies - 1);
    connection->in_flight -= replies;
    int32_t over = 0;
    while (replies > 0) {
        struct load_burst *burst = &connection->burst[over];
        int64_t count = replies < burst->count ? replies : burst->count;
        measure(load, burst->sent_ns, count);
        record(load, connection->number, burst->sent_ns, count);
        burst->count -= count;
        replies -= count;
        if (burst->count == 0) over++;
    }
    connection->bursts -= over;
    memmove(connection->burst, connection->burst + over,
            (size_t)connection->bursts * sizeof *connection->burst);
}

/* Reads those that are ready, up to one whose bytes are Python's; gives back how many are to be sent
 * to. */
static int receive(struct load *load, const struct epoll_event *ready, int count,
                   struct answered *answered, int *events) {
    int answers = 0;
    for (int i = 0; i < count; i++) {
        int fd = ready[i].data.fd;
        struct load_connection *connection = &load->connections[fd];
        if (connection->bursts == 0) {
            tell(load, events, fd, LOAD_POLLED, ready[i].events);
            continue;
        }
        if (load->totals != NULL && load->exchanged > LOAD_TAPE_REPLIES - LOAD_FRAMES) break;
        ssize_t bytes = recv(fd, load->received, LOAD_READ_BYTES, 0);
        load->now_ns = clock_ns();
        if (bytes < 0) {
            if (errno != EAGAIN && errno != EINTR) tell(load, events, fd, LOAD_FAILED, errno);
        } else if (is_plain(load, connection, bytes)) {
            settle(load, connection, bytes / REPLY_BYTES);
            answered[answers++] = (struct answered){fd, bytes / REPLY_BYTES};
        } else {
            tell(load, events, fd, LOAD_RECEIVED, bytes);
            break;
        }
    }
    return answers;
}

/* Sends as many frames as were answered. */
static void send_again(struct load *load, int fd, int64_t count, int *events) {
    struct load_connection *connection = &load->connections[fd];
    ssize_t bytes = count * FRAME_BYTES;
    int64_t sent_ns = clock_ns();
    connection->burst[connection->bursts++] = (struct load_burst){sent_ns, count};
    connection->in_flight += count;
    if (sent_ns >= load->measure_from_ns) load->spent += count;
    ssize_t sent = send(fd, load->frames, (size_t)bytes, MSG_NOSIGNAL);
    if (sent == bytes) return;
    if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        tell(load, events, fd, LOAD_FAILED, errno);
    } else {
        tell(load, events, fd, LOAD_UNSENT, bytes - (sent < 0 ? 0 : sent));
    }
}

int load_exchange(struct load *load, int64_t longest_ns) {
    struct epoll_event ready[LOAD_READY];
    struct answered answered[LOAD_READY];
    int64_t until_ns = clock_ns() + longest_ns;
    int events = 0, answers;
    load->exchanged = load->spent = load->records = 0;
    load->latency_max_ns = load->measured_at_ns = 0;
    load->latency_sum_ns = 0;
    do {
        int count = epoll_wait(load->epoll, ready, LOAD_READY, 0);
        answers = receive(load, ready, count, answered, &events);
        for (int i = 0; i < answers; i++)
            send_again(load, answered[i].fd, answered[i].replies, &events);
    } while (answers > 0 && events == 0 && clock_ns() < until_ns);
    return events;
}

int load_sent_before(const struct load *load, int fd, int64_t moment_ns) {
    for (; fd < load->descriptors; fd++) {
        const struct load_connection *connection = &load->connections[fd];
        if (connection->bursts > 0 && connection->burst[0].sent_ns < moment_ns) return fd;
    }
    return -1;
}
