/* Question: how fast can any server of this protocol be on one core? One thread, one epoll, one
 * recv and one send for each readable connection, every frame verified, and nothing else: nobody
 * answers with fewer system calls, so what the others reach is a share of this.
 *
 * Command: cc -O2 -o floor floor.c && ./floor PORT     (0 takes a free port; SIGTERM ends it)
 *
 * Invalid if: it runs on the core of its load generator, or that generator has no time left; then
 * it is the generator that was measured, and every share of the floor looks too good. It has no
 * limits, no deadlines and no durability: it is a yardstick, not a server to run. */

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "xxh64.h"

#define READ_BYTES 65536 /* one read takes at most 4,096 frames */
#define BACKLOG 4096
#define EVENTS 512

struct connection {
    int fd;
    bool refused;              /* a frame was bad: close when the replies before it are out */
    uint8_t held[FRAME_BYTES]; /* the beginning of a frame that has not arrived completely */
    size_t held_bytes;
    uint8_t *unsent; /* replies that the kernel did not take; nothing is read while there are any */
    size_t unsent_bytes;
};

static int epoll_fd;
static uint64_t total;
static uint8_t frames_buffer[FRAME_BYTES + READ_BYTES];
static uint8_t replies_buffer[(READ_BYTES / FRAME_BYTES + 1) * REPLY_BYTES];

static void give_up(const char *what) {
    perror(what);
    exit(1);
}

static void watch(int operation, int fd, uint32_t events, struct connection *connection) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(epoll_fd, operation, fd, &event) != 0) give_up("floor: epoll_ctl");
}

static void close_connection(struct connection *connection) {
    close(connection->fd);
    free(connection->unsent);
    free(connection);
}

/* Adds the frames up to the first bad one and writes their replies; gives back how many. */
static size_t add_frames(const uint8_t *frames, size_t count, uint8_t *replies) {
    size_t done = 0;
    for (; done < count; done++) {
        uint64_t amount = load_big_endian(frames + done * FRAME_BYTES);
        if (load_big_endian(frames + done * FRAME_BYTES + 8) != amount_checksum(amount)) break;
        total += amount;
        store_big_endian(replies + done * REPLY_BYTES, total);
    }
    return done;
}

/* Sends, and keeps what the kernel did not take; false when the peer is gone. */
static bool send_replies(struct connection *connection, const uint8_t *replies, size_t bytes) {
    ssize_t sent = send(connection->fd, replies, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return false;
    if (sent < 0) sent = 0;
    if ((size_t)sent == bytes) return true;
    connection->unsent_bytes = bytes - (size_t)sent;
    connection->unsent = malloc(connection->unsent_bytes);
    if (connection->unsent == NULL) give_up("floor: malloc");
    memcpy(connection->unsent, replies + sent, connection->unsent_bytes);
    watch(EPOLL_CTL_MOD, connection->fd, EPOLLOUT, connection);
    return true;
}

static void on_readable(struct connection *connection) {
    memcpy(frames_buffer, connection->held, connection->held_bytes);
    ssize_t got = recv(connection->fd, frames_buffer + connection->held_bytes, READ_BYTES, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        close_connection(connection);
        return;
    }
    size_t bytes = connection->held_bytes + (size_t)got;
    size_t whole = bytes / FRAME_BYTES;
    connection->held_bytes = bytes % FRAME_BYTES;
    memcpy(connection->held, frames_buffer + whole * FRAME_BYTES, connection->held_bytes);

    size_t good = add_frames(frames_buffer, whole, replies_buffer);
    connection->refused = good < whole;
    bool alive = good == 0 || send_replies(connection, replies_buffer, good * REPLY_BYTES);
    if (!alive || (connection->refused && connection->unsent == NULL)) close_connection(connection);
}

static void on_writable(struct connection *connection) {
    ssize_t sent =
        send(connection->fd, connection->unsent, connection->unsent_bytes, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) close_connection(connection);
        return;
    }
    connection->unsent_bytes -= (size_t)sent;
    memmove(connection->unsent, connection->unsent + sent, connection->unsent_bytes);
    if (connection->unsent_bytes > 0) return;
    free(connection->unsent);
    connection->unsent = NULL;
    if (connection->refused) {
        close_connection(connection);
    } else {
        watch(EPOLL_CTL_MOD, connection->fd, EPOLLIN, connection);
    }
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EAGAIN || errno == ECONNABORTED)) return;
        if (fd < 0) give_up("floor: accept");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        struct connection *connection = calloc(1, sizeof *connection);
        if (connection == NULL) give_up("floor: calloc");
        connection->fd = fd;
        watch(EPOLL_CTL_ADD, fd, EPOLLIN, connection);
    }
}

static int listen_on(uint16_t port) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, length) != 0 || listen(listener, BACKLOG) != 0)
        give_up("floor: cannot listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("Listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int argc, char **argv) {
    char *end = "";
    long port = argc == 2 ? strtol(argv[1], &end, 10) : -1;
    if (port < 0 || port > 65535 || *end != '\0') {
        fputs("usage: floor PORT (0 takes a free one)\n", stderr);
        return 2;
    }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on((uint16_t)port);
    watch(EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (connection == NULL) {
                accept_all(listener);
            } else if (connection->unsent != NULL) {
                on_writable(connection);
            } else {
                on_readable(connection);
            }
        }
    }
}
