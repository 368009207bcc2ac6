/* Question: how many additions a second does this server answer, how late, and at what cost in CPU
 * time, if the asking side costs as little as it can? One thread, one epoll; the same for a counter
 * server and for Redis (INCRBY).
 *
 * Command: cc -O2 -o generator generator.c && ./generator --port 8080 --connections 40
 *          ./generator --help lists the rest. One JSON object on stdout; exit 1 and one line on
 *          stderr, without any JSON, on a wrong reply, a lost connection or silence of 10 s.
 *
 * A connection sends its requests in bursts of --in-flight and sends the next burst when all of the
 * last one are answered, as redis-benchmark -P does. A request's latency is from its burst's send
 * (in churn: from the connect) to the read that brought its reply.
 *
 * Every reply is checked, and together they prove the run exact: the totals before and after each
 * addition must link into one chain from the first total to the last, so a hash of every total
 * after less a hash of every total before, summed over all replies in any order, must telescope to
 * the hash of the last total less that of the first. It holds modulo 2^64, for any amounts.
 *
 * Invalid if: anybody else adds to the same counter (the chain is then broken and says so); the
 * server shares this core; or "generator_cpu_share" is near 1 while the server has time left: then
 * the rate is this program's and only the server's CPU time per request says something. */

#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "xxh64.h"

#define RANDOM_FRAMES 1000000
#define IN_FLIGHT_MAX 65536
#define CONNECTIONS_MAX 60000
#define OPENING_AT_ONCE 64 /* connections being opened: few, so that no listen backlog overflows */
#define SILENCE_MS 10000   /* without any reply for so long, the run has failed */
#define SLACK_S 60         /* for opening and closing; the alarm that bounds the whole run */
#define HOLD_S 600         /* --mode idle lets go after this, should nobody close its stdin */
#define READ_BYTES (1 << 20)
#define HELD_BYTES_MAX 32 /* more than any reply: 8 bytes, or ":9223372036854775807\r\n" */
#define CPU_CLOCKS_MAX 64
#define EVENTS 512
#define SUB_BUCKETS 64 /* per power of two: a latency is known to 1.6 % */
#define BUCKETS ((64 - 5) * SUB_BUCKETS)

enum mode { STEADY, CHURN, IDLE };
enum phase { OPENING, WARMING_UP, MEASURING, ENDING };

static struct {
    uint16_t port;
    size_t connections;
    size_t in_flight;
    double warmup_s;
    double measured_s;
    uint64_t amount;
    bool random_amounts;
    bool redis;
    enum mode mode;
    clockid_t cpu_clocks[CPU_CLOCKS_MAX]; /* of the server's processes */
    size_t cpu_clock_count;
} options = {.connections = 40, .in_flight = 1, .warmup_s = 0.2, .measured_s = 1, .amount = 1};

/* All requests, encoded beforehand; every connection walks round and round. The first in_flight
 * requests stand behind the last once more, so that a burst is always one piece of memory. */
static struct {
    uint8_t *bytes;
    uint64_t *amounts;
    size_t requests;
    size_t request_bytes;
} pool;

struct connection {
    int fd;
    size_t unanswered;     /* of the present burst */
    uint64_t burst_at_ns;
    uint64_t last_total;
    size_t answer_index;   /* in the pool, of the request that the next reply answers */
    size_t send_offset;    /* in pool.bytes */
    size_t unsent_bytes;   /* of the present burst */
    bool waits_to_send;
    uint8_t held[HELD_BYTES_MAX]; /* the beginning of a reply that has not arrived completely */
    size_t held_bytes;
};

static struct {
    int epoll_fd;
    struct connection *connections;
    size_t opening; /* the next one to open */
    size_t opened;
    size_t busy; /* connections with a burst that is not answered */
    enum phase phase;
    uint64_t begin_ns, end_ns;                    /* of the measured part: planned, then real */
    uint64_t server_cpu_ns, own_cpu_ns;           /* in the measured part */
    uint64_t requests_in_all, requests;           /* `requests` are those measured */
    uint64_t first_total, amounts_sum, chain_sum; /* modulo 2^64 */
    uint64_t latency_counts[BUCKETS], latency_max_ns;
} run;

static void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("generator: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static void on_alarm(int signal_number) {
    (void)signal_number;
    static const char message[] = "generator: the run did not end in time\n";
    if (write(STDERR_FILENO, message, sizeof message - 1) < 0) _exit(3);
    _exit(1);
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec time;
    if (clock_gettime(clock, &time) != 0) fail("cannot read the CPU clock of a server process");
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

static uint64_t server_cpu_ns(void) {
    uint64_t sum_ns = 0;
    for (size_t i = 0; i < options.cpu_clock_count; i++) sum_ns += clock_ns(options.cpu_clocks[i]);
    return sum_ns;
}

/* --- latencies: a log-linear histogram, SUB_BUCKETS for each power of two --- */

static void record_latency(uint64_t latency_ns, size_t requests) {
    size_t bucket = latency_ns;
    if (latency_ns >= SUB_BUCKETS) {
        int shift = 63 - __builtin_clzll(latency_ns) - 6;
        bucket = (size_t)(shift + 1) * SUB_BUCKETS + ((latency_ns >> shift) & (SUB_BUCKETS - 1));
    }
    run.latency_counts[bucket] += requests;
    if (latency_ns > run.latency_max_ns) run.latency_max_ns = latency_ns;
}

/* The middle of the bucket in which the given share of all requests is reached. */
static double latency_us(double share) {
    uint64_t seen = 0;
    for (size_t bucket = 0; bucket < BUCKETS; bucket++) {
        seen += run.latency_counts[bucket];
        if (seen == 0 || (double)seen < share * (double)run.requests) continue;
        if (bucket < SUB_BUCKETS) return (double)bucket / 1e3;
        int shift = (int)(bucket / SUB_BUCKETS) - 1;
        uint64_t low_ns = (uint64_t)(SUB_BUCKETS + bucket % SUB_BUCKETS) << shift;
        double middle_ns = (double)low_ns + (double)(1ULL << shift) / 2;
        double max_ns = (double)run.latency_max_ns;
        return (middle_ns < max_ns ? middle_ns : max_ns) / 1e3;
    }
    return 0;
}

/* --- requests --- */

/* A permutation of 64-bit numbers that looks random (splitmix64): counted inputs give outputs that
 * all differ. */
static uint64_t scrambled(uint64_t number) {
    number += 0x9E3779B97F4A7C15ULL;
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9ULL;
    number = (number ^ (number >> 27)) * 0x94D049BB133111EBULL;
    return number ^ (number >> 31);
}

/* Encodes one addition; gives back its size. 128 bytes are enough. */
static size_t encode_request(uint64_t amount, uint8_t *out) {
    if (!options.redis) {
        store_big_endian(out, amount);
        store_big_endian(out + 8, amount_checksum(amount));
        return FRAME_BYTES;
    }
    char text[DECIMAL_DIGITS_MAX + 1];
    int digits = snprintf(text, sizeof text, "%llu", (unsigned long long)amount);
    static const char command[] = "*3\r\n$6\r\nINCRBY\r\n$7\r\ncounter\r\n$%d\r\n%s\r\n";
    return (size_t)sprintf((char *)out, command, digits, text);
}

static void fill_pool(void) {
    uint8_t request[128];
    pool.requests = options.random_amounts ? RANDOM_FRAMES : 1;
    pool.request_bytes = encode_request(options.amount, request);
    size_t stored = pool.requests + options.in_flight;
    pool.bytes = malloc(stored * pool.request_bytes);
    pool.amounts = malloc(stored * sizeof *pool.amounts);
    if (pool.bytes == NULL || pool.amounts == NULL) fail("no memory for %zu requests", stored);
    for (size_t i = 0; i < stored; i++) {
        size_t number = i % pool.requests;
        uint64_t amount = options.random_amounts ? scrambled(number) : options.amount;
        pool.amounts[i] = amount;
        encode_request(amount, request);
        memcpy(pool.bytes + i * pool.request_bytes, request, pool.request_bytes);
    }
}

/* --- replies --- */

/* What a total adds to the sum that must telescope: not linear, so wrong totals do not cancel. */
static uint64_t fingerprint(uint64_t total) {
    total ^= total >> 29;
    total *= 0x9E3779B185EBCA87ULL;
    return total ^ (total >> 32);
}

static inline void check_total(struct connection *connection, uint64_t total) {
    uint64_t amount = pool.amounts[connection->answer_index];
    uint64_t before = total - amount;
    if (!options.random_amounts && before - connection->last_total > INT64_MAX)
        fail("wrong total %llu after adding %llu: this connection was told %llu before",
             (unsigned long long)total, (unsigned long long)amount,
             (unsigned long long)connection->last_total);
    connection->last_total = total;
    if (++connection->answer_index == pool.requests) connection->answer_index = 0;
    run.amounts_sum += amount;
    run.chain_sum += fingerprint(total) - fingerprint(before);
}

/* Takes one reply from the front of `data`; gives back its size, 0 if it is not all there. */
static inline size_t take_reply(const uint8_t *data, size_t bytes, uint64_t *total) {
    if (!options.redis) {
        if (bytes < REPLY_BYTES) return 0;
        *total = load_big_endian(data);
        return REPLY_BYTES;
    }
    const uint8_t *end = memchr(data, '\n', bytes < HELD_BYTES_MAX ? bytes : HELD_BYTES_MAX);
    if (end == NULL) {
        if (bytes >= HELD_BYTES_MAX) fail("Redis said: %.*s", (int)bytes, (const char *)data);
        return 0;
    }
    const uint8_t *at = data + 1;
    uint64_t value = 0;
    while (at < end && isdigit(*at)) value = value * 10 + (uint64_t)(*at++ - '0');
    if (data[0] != ':' || at + 1 != end)
        fail("Redis said: %.*s", (int)(end - data), (const char *)data);
    *total = value;
    return (size_t)(end - data) + 1;
}

/* --- one connection --- */

static void watch(int operation, struct connection *connection, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(run.epoll_fd, operation, connection->fd, &event) != 0)
        fail("epoll_ctl: %s", strerror(errno));
}

static void send_more(struct connection *connection) {
    ssize_t sent = send(connection->fd, pool.bytes + connection->send_offset,
                        connection->unsent_bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) fail("a connection was lost: %s", strerror(errno));
    if (sent > 0) {
        connection->unsent_bytes -= (size_t)sent;
        connection->send_offset += (size_t)sent;
        connection->send_offset %= pool.requests * pool.request_bytes;
    }
    bool waits = connection->unsent_bytes > 0;
    if (waits != connection->waits_to_send) {
        watch(EPOLL_CTL_MOD, connection, waits ? EPOLLIN | EPOLLOUT : EPOLLIN);
        connection->waits_to_send = waits;
    }
}

static void begin_burst(struct connection *connection, size_t requests, uint64_t now_ns) {
    connection->unanswered = requests;
    connection->unsent_bytes = requests * pool.request_bytes;
    connection->burst_at_ns = now_ns;
    run.busy++;
    send_more(connection);
}

/* Takes the next of 200 loopback addresses for this end. A closed connection's port is not to be
 * had for a second: with one address, thousands of connects a second would soon search for one. */
static void bind_next_address(int fd) {
    static uint32_t turn;
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + turn++ % 200)};
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &(int){1}, sizeof(int));
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0)
        fail("cannot bind to a loopback address: %s", strerror(errno));
}

static int new_socket(int flags) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0) fail("no socket: %s; raise the descriptor limit (ulimit -n)", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(options.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval limit = {.tv_sec = SILENCE_MS / 1000};
    if (options.mode == CHURN) bind_next_address(fd);
    if (!(flags & SOCK_NONBLOCK)) {
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    }
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0 && errno != EINPROGRESS)
        fail("cannot connect to 127.0.0.1:%d: %s", options.port, strerror(errno));
    return fd;
}

/* Connects and sends the first addition, at once if the kernel has the connection already. */
static void open_connection(struct connection *connection) {
    uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
    connection->fd = new_socket(SOCK_NONBLOCK);
    connection->held_bytes = 0;
    connection->waits_to_send = false;
    watch(EPOLL_CTL_ADD, connection, EPOLLIN);
    begin_burst(connection, 1, now_ns);
}

static void after_burst(struct connection *connection, uint64_t now_ns) {
    bool goes_on = run.phase == WARMING_UP || run.phase == MEASURING;
    run.busy--;
    if (options.mode == CHURN) {
        close(connection->fd);
        if (goes_on) open_connection(connection);
    } else if (run.phase == OPENING) {
        run.opened++;
        if (run.opening < options.connections) open_connection(&run.connections[run.opening++]);
    } else if (goes_on) {
        begin_burst(connection, options.in_flight, now_ns);
    }
}

static void on_replies(struct connection *connection) {
    static uint8_t buffer[HELD_BYTES_MAX + READ_BYTES];
    memcpy(buffer, connection->held, connection->held_bytes);
    ssize_t got = recv(connection->fd, buffer + connection->held_bytes, READ_BYTES, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got < 0) fail("a connection was lost: %s", strerror(errno));
    if (got == 0) fail("the server closed a connection with requests on it");
    uint64_t now_ns = clock_ns(CLOCK_MONOTONIC), total;
    size_t bytes = connection->held_bytes + (size_t)got, used = 0, taken, replies = 0;
    while ((taken = take_reply(buffer + used, bytes - used, &total)) > 0) {
        if (++replies > connection->unanswered) fail("more replies than requests");
        check_total(connection, total);
        used += taken;
    }
    connection->held_bytes = bytes - used;
    memcpy(connection->held, buffer + used, connection->held_bytes);
    connection->unanswered -= replies;
    run.requests_in_all += replies;
    if (run.phase == MEASURING) {
        run.requests += replies;
        record_latency(now_ns - connection->burst_at_ns, replies);
    }
    if (replies > 0 && connection->unanswered == 0) after_burst(connection, now_ns);
}

/* --- the run --- */

static void begin_measuring(uint64_t now_ns) {
    run.phase = MEASURING;
    run.begin_ns = now_ns;
    run.end_ns = now_ns + (uint64_t)(options.measured_s * 1e9);
    run.server_cpu_ns = server_cpu_ns();
    run.own_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

static void end_measuring(uint64_t now_ns) {
    run.phase = ENDING;
    run.end_ns = now_ns;
    run.server_cpu_ns = server_cpu_ns() - run.server_cpu_ns;
    run.own_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - run.own_cpu_ns;
}

static void begin_warmup(void) {
    uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
    run.phase = WARMING_UP;
    run.begin_ns = now_ns + (uint64_t)(options.warmup_s * 1e9);
    if (options.mode == STEADY)
        for (size_t i = 0; i < options.connections; i++)
            begin_burst(&run.connections[i], options.in_flight, now_ns);
}

/* Serves events until no connection waits for a reply. */
static void serve_events(void) {
    struct epoll_event events[EVENTS];
    while (run.busy > 0) {
        int count = epoll_wait(run.epoll_fd, events, EVENTS, SILENCE_MS);
        if (count == 0)
            fail("%zu of %zu connections had no reply for %d s; has the server fewer workers than "
                 "connections?", run.busy, options.connections, SILENCE_MS / 1000);
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) send_more(connection);
            if (events[i].events & ~(uint32_t)EPOLLOUT) on_replies(connection);
        }
        uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
        if (run.phase == OPENING && run.opened == options.connections && options.mode == STEADY)
            begin_warmup();
        else if (run.phase == WARMING_UP && now_ns >= run.begin_ns)
            begin_measuring(now_ns);
        else if (run.phase == MEASURING && now_ns >= run.end_ns)
            end_measuring(now_ns);
    }
}

/* The total now, over a connection of its own. Adds 0. */
static uint64_t ask_total(void) {
    uint8_t request[128], reply[HELD_BYTES_MAX];
    size_t request_bytes = encode_request(0, request), bytes = 0;
    uint64_t total = 0;
    int fd = new_socket(0);
    if (send(fd, request, request_bytes, MSG_NOSIGNAL) != (ssize_t)request_bytes)
        fail("cannot ask for the total: %s", strerror(errno));
    while (take_reply(reply, bytes, &total) == 0) {
        ssize_t got = recv(fd, reply + bytes, sizeof reply - bytes, 0);
        if (got < 0) fail("cannot read the total: %s", strerror(errno));
        if (got == 0) fail("the server closed the connection that asked for the total");
        bytes += (size_t)got;
    }
    close(fd);
    run.requests_in_all++;
    return total;
}

static void open_all(void) {
    run.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    run.connections = calloc(options.connections, sizeof *run.connections);
    if (run.connections == NULL) fail("no memory for %zu connections", options.connections);
    for (size_t i = 0; i < options.connections; i++) {
        struct connection *connection = &run.connections[i];
        connection->last_total = run.first_total;
        connection->answer_index = i * pool.requests / options.connections;
        connection->send_offset = connection->answer_index * pool.request_bytes;
    }
    size_t at_once = options.connections;
    if (options.mode == CHURN) begin_warmup();
    else if (at_once > OPENING_AT_ONCE) at_once = OPENING_AT_ONCE;
    while (run.opening < at_once) open_connection(&run.connections[run.opening++]);
}

static void hold_until_stdin_closes(void) {
    char ignored[64];
    printf("{\"connections\": %zu}\n", run.opened);
    fflush(stdout);
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    while (poll(&in, 1, HOLD_S * 1000) > 0 && read(STDIN_FILENO, ignored, sizeof ignored) > 0) {}
}

static void close_all(void) {
    if (options.mode == CHURN) return; /* each was closed after its reply */
    for (size_t i = 0; i < options.connections; i++) close(run.connections[i].fd);
}

static void check_run(void) {
    uint64_t last_total = ask_total();
    if (last_total != run.first_total + run.amounts_sum)
        fail("the total went from %llu to %llu, but what was answered adds up to %llu",
             (unsigned long long)run.first_total, (unsigned long long)last_total,
             (unsigned long long)run.amounts_sum);
    if (options.mode != IDLE && run.requests == 0) fail("no reply came in the measured time");
    if (run.chain_sum != fingerprint(last_total) - fingerprint(run.first_total))
        fail("the totals do not link into one chain: some reply was wrong");
}

static void print_result(void) {
    double elapsed_s = (double)(run.end_ns - run.begin_ns) / 1e9;
    printf("{\"requests\": %llu, \"requests_in_all\": %llu, \"elapsed_s\": %.6f, \"rate\": %.1f, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, \"max_us\": %.2f, "
           "\"generator_cpu_share\": %.4f, \"server_cpu_us_per_request\": ",
           (unsigned long long)run.requests, (unsigned long long)run.requests_in_all, elapsed_s,
           (double)run.requests / elapsed_s, latency_us(0.5), latency_us(0.99), latency_us(0.999),
           (double)run.latency_max_ns / 1e3, (double)run.own_cpu_ns / 1e9 / elapsed_s);
    if (options.cpu_clock_count > 0)
        printf("%.4f}\n", (double)run.server_cpu_ns / 1e3 / (double)run.requests);
    else
        puts("null}");
}

/* --- the command line --- */

static const char usage[] =
    "generator --port PORT [option...]: loads a counter server on 127.0.0.1\n"
    "  --connections N     connections, or in churn how many are open at a time (40)\n"
    "  --in-flight N       requests of one burst on a connection (1)\n"
    "  --warmup SECONDS    before the measured part (0.2)\n"
    "  --seconds SECONDS   the measured part (1)\n"
    "  --amount N|random   what each request adds; random: uniform over 64 bits, a million (1)\n"
    "  --protocol NAME     counter, or redis: INCRBY counter N (counter)\n"
    "  --mode NAME         steady; churn: connect, add once, close; idle: connect, add once, hold\n"
    "                      until stdin closes (steady)\n"
    "  --cpu-of PID,...    processes whose CPU time is read, for server_cpu_us_per_request\n";

static void bad_usage(const char *flag, const char *text) {
    fprintf(stderr, "generator: %s %s: not a value for it\n%s", flag, text, usage);
    exit(2);
}

static double number_option(const char *flag, const char *text, double low, double high) {
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end != '\0' || !(number >= low && number <= high)) bad_usage(flag, text);
    return number;
}

static uint64_t amount_option(const char *text) {
    char *end;
    errno = 0;
    uint64_t amount = strtoull(text, &end, 10);
    if (!isdigit((unsigned char)text[0]) || *end != '\0' || errno != 0) bad_usage("--amount", text);
    return amount;
}

static void cpu_option(const char *text) {
    for (;;) {
        char *end;
        pid_t pid = (pid_t)strtol(text, &end, 10);
        if (end == text || pid <= 0 || options.cpu_clock_count == CPU_CLOCKS_MAX)
            bad_usage("--cpu-of", text);
        if (clock_getcpuclockid(pid, &options.cpu_clocks[options.cpu_clock_count++]) != 0)
            fail("--cpu-of %d: there is no such process", (int)pid);
        if (*end != ',') return;
        text = end + 1;
    }
}

static int choice_option(const char *flag, const char *text, const char *const *names) {
    for (int i = 0; names[i] != NULL; i++)
        if (strcmp(text, names[i]) == 0) return i;
    bad_usage(flag, text);
    return -1;
}

static void set_option(int flag, const char *text) {
    static const char *const protocols[] = {"counter", "redis", NULL};
    static const char *const modes[] = {"steady", "churn", "idle", NULL};
    if (flag == 'p') options.port = (uint16_t)number_option("--port", text, 1, 65535);
    if (flag == 'c')
        options.connections = (size_t)number_option("--connections", text, 1, CONNECTIONS_MAX);
    if (flag == 'f')
        options.in_flight = (size_t)number_option("--in-flight", text, 1, IN_FLIGHT_MAX);
    if (flag == 'w') options.warmup_s = number_option("--warmup", text, 0, 600);
    if (flag == 's') options.measured_s = number_option("--seconds", text, 0.01, 600);
    if (flag == 'a') options.random_amounts = strcmp(text, "random") == 0;
    if (flag == 'a' && !options.random_amounts) options.amount = amount_option(text);
    if (flag == 'r') options.redis = choice_option("--protocol", text, protocols) == 1;
    if (flag == 'm') options.mode = (enum mode)choice_option("--mode", text, modes);
    if (flag == 'u') cpu_option(text);
}

static void read_options(int argc, char **argv) {
    static const struct option flags[] = {
        {"port", 1, NULL, 'p'},    {"connections", 1, NULL, 'c'}, {"in-flight", 1, NULL, 'f'},
        {"warmup", 1, NULL, 'w'},  {"seconds", 1, NULL, 's'},     {"amount", 1, NULL, 'a'},
        {"protocol", 1, NULL, 'r'}, {"mode", 1, NULL, 'm'},       {"cpu-of", 1, NULL, 'u'},
        {"help", 0, NULL, 'h'},    {NULL, 0, NULL, 0}};
    int flag;
    while ((flag = getopt_long(argc, argv, "", flags, NULL)) != -1) {
        if (flag == 'h') {
            fputs(usage, stdout);
            exit(0);
        }
        if (flag == '?') exit(2);
        set_option(flag, optarg);
    }
    if (options.port == 0 || optind != argc) {
        fputs(usage, stderr);
        exit(2);
    }
    if (options.redis && options.random_amounts) bad_usage("--amount", "random --protocol redis");
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    signal(SIGALRM, on_alarm);
    double limit_s = options.warmup_s + options.measured_s + SLACK_S;
    alarm((unsigned)limit_s + (options.mode == IDLE ? HOLD_S : 0));
    fill_pool();
    run.first_total = ask_total();
    open_all();
    serve_events();
    if (options.mode == IDLE) hold_until_stdin_closes();
    close_all();
    check_run();
    if (options.mode != IDLE) print_result();
    return 0;
}
