// The upstream and the clients of a gateway under test, in one single-threaded process.
//
//   wire [-U PORT] [-m] [-b] -t TOKENS
//     -U PORT    be an upstream on 127.0.0.1:PORT: 1 KiB of JSON for every request, after its body; N bytes under
//                /api/v3/bytes/N; under /api/v3/echo the request head as received
//     -A N       the same on 127.0.0.2 and the addresses behind it, N in all
//     -m         the upstream returns a hash of the token it saw, and the clients check that it is the one they sent
//     -b         never sleep during a run, so that the gateway never has to wake this process (the fairest comparison)
//     -t TOKENS  the known tokens, one per line
//
// After "ready", each line on standard input starts a run, whose result is one line of JSON; then the next line may follow.
// The process exits at the end of standard input, also during a run, so that it never outlives run.py.
//
//   port=N [pid=N,N] [secs=S] [warm=S] [stall=S] [seed=N] [path=P] | GROUP [| GROUP]
//   GROUP: kind=K [conns=N] [count=N] [rate=R] [bad=PERCENT] [spread=N] [down=N] [up=N] [fields=N] [query=N] [paths=N]
//     kind     h  known token in the header, nothing to rewrite
//              q  known token in the query and per_page=1000: strip and clamp
//              m  h and q in turn
//              i  unknown token, header and query in turn; half of them from a set of 16, half never seen before
//              x  unknown token, header and query in turn; never seen before
//     count    end after this many responses; without a count the run ends after secs
//     rate     requests per second over all connections of the group, latency measured from the intended time of sending;
//              without it the loop is closed: each connection sends again when it has its response
//     bad      this share of h, q and m becomes i
//     spread   how many of the known tokens are used, each in turn
//     down     ask for a response of N bytes
//     up       POST with a body of N bytes
//     fields   so many more header fields
//     query    so many more bytes in the query
//     paths    the path ends in /rI/x, with I from 0 to N-1 in turn
//
// It supports only what the benchmark needs: bodies with a Content-Length.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;

// Every epoll entry points to a structure that starts with one of these.
enum source { STDIN, LISTENER, UPSTREAM, CLIENT };

static int epoll_fd;
static bool mirror, busy_poll, line_waits;

static void fatal(const char *what, const char *detail)
{
    printf("{\"fatal\":\"%s: %s\"}\n", what, detail);
    fflush(stdout);
    exit(1);
}

static u64 now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void watch(int fd, void *entry, uint32_t events, int operation)
{
    struct epoll_event event = {.events = events, .data.ptr = entry};
    if (epoll_ctl(epoll_fd, operation, fd, &event))
        fatal("epoll_ctl", strerror(errno));
}

static struct sockaddr_in loopback(int port)
{
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

// FNV-1a: identifies a token without revealing it.
static u64 fingerprint(const char *s, size_t n)
{
    u64 h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)s[i]) * 0x100000001b3ull;
    return h;
}

// The value of a header in a head that ends at `end`, without leading blanks; NULL if there is none.
static const char *header(const char *head, const char *end, const char *name, size_t *length)
{
    size_t n = strlen(name);
    for (const char *line = memchr(head, '\n', end - head); line && ++line < end; line = memchr(line, '\n', end - line)) {
        if ((size_t)(end - line) <= n || line[n] != ':' || strncasecmp(line, name, n))
            continue;
        const char *value = line + n + 1, *stop = memchr(value, '\r', end - value);
        if (!stop)
            stop = end;
        while (value < stop && *value == ' ')
            value++;
        *length = stop - value;
        return value;
    }
    return NULL;
}

// What bodies consist of.
static char block[65536];

// Sends up to `*left` bytes of a body. False if the connection is broken.
static bool send_body(int fd, long *left)
{
    while (*left) {
        ssize_t n = send(fd, block, *left < (long)sizeof block ? *left : (long)sizeof block, MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN;
        *left -= n;
    }
    return true;
}

// ---- upstream ------------------------------------------------------------------------------------------------------

enum { HEAD_MAX = 16384, BODY = 1024 };

struct upstream {
    enum source source;
    int fd;
    bool blocked; // waits for room to write
    size_t have, out_at, out_have;
    long body_left, fill_left; // of the request's body; of a response's that is taken from `block`
    bool owes;                 // `out` is to be sent once the request's body has been read
    char in[HEAD_MAX], out[HEAD_MAX + 1024];
};

struct listener {
    enum source source;
    int fd;
};

static void upstream_listen(int port, int nth)
{
    struct sockaddr_in address = loopback(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK + nth);
    int one = 1;
    struct listener *listener = calloc(1, sizeof *listener);
    listener->source = LISTENER;
    listener->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener->fd, (void *)&address, sizeof address) || listen(listener->fd, 4096))
        fatal("cannot listen for the upstream", strerror(errno));
    watch(listener->fd, listener, EPOLLIN, EPOLL_CTL_ADD);
}

static void upstream_accept(struct listener *listener)
{
    int fd;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct upstream *u = calloc(1, sizeof *u);
        u->source = UPSTREAM;
        u->fd = fd;
        no_delay(fd);
        watch(fd, u, EPOLLIN, EPOLL_CTL_ADD);
    }
}

// Writes the answer to the head in `in[..length]` into `out`.
static void upstream_answer(struct upstream *u, size_t length)
{
    static char json[BODY + 1];
    if (!json[0]) {
        memset(json, 'x', BODY);
        memcpy(json, "[\"", 2);
        memcpy(json + BODY - 2, "\"]", 2);
    }
    u->out_at = 0;
    size_t digits = 0;
    const char *body = header(u->in, u->in + length, "content-length", &digits);
    u->body_left = body ? atol(body) : 0;
    if (length > 18 && !memcmp(u->in, "GET /api/v3/bytes/", 18)) {
        u->fill_left = atol(u->in + 18);
        u->out_have = sprintf(u->out, "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %ld\r\n\r\n", u->fill_left);
        return;
    }
    if (length > 17 && !memcmp(u->in, "GET /api/v3/echo", 16)) {
        int n = sprintf(u->out, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n\r\n", length);
        memcpy(u->out + n, u->in, length);
        u->out_have = n + length;
        return;
    }
    char seen[64] = "";
    if (mirror) {
        size_t n = 0;
        const char *token = header(u->in, u->in + length, "private-token", &n);
        sprintf(seen, "X-Seen: %016lx\r\n", token ? fingerprint(token, n) : 0);
    }
    u->out_have = sprintf(u->out,
                          "HTTP/1.1 200 OK\r\nServer: up\r\nDate: Sun, 22 Nov 2026 19:00:00 GMT\r\n"
                          "Content-Type: application/json\r\nContent-Length: %d\r\n"
                          "Cache-Control: max-age=0, private, must-revalidate\r\n"
                          "X-Per-Page: 100\r\nX-Next-Page: 2\r\nVary: Origin\r\n%s\r\n%s",
                          BODY, seen, json);
}

// Sends the rest of the response. False if the connection is broken.
static bool upstream_flush(struct upstream *u)
{
    while (u->out_at < u->out_have) {
        ssize_t n = send(u->fd, u->out + u->out_at, u->out_have - u->out_at, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return false;
        if (n < 0)
            break;
        u->out_at += n;
    }
    if (u->out_at == u->out_have && !send_body(u->fd, &u->fill_left))
        return false;
    bool blocked = u->out_at < u->out_have || u->fill_left;
    if (blocked != u->blocked)
        watch(u->fd, u, EPOLLIN | (blocked ? EPOLLOUT : 0), EPOLL_CTL_MOD);
    u->blocked = blocked;
    return true;
}

static void upstream_event(struct upstream *u, uint32_t events)
{
    bool alive = true;
    if (events & EPOLLOUT)
        alive = upstream_flush(u);
    if (alive && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && u->have < HEAD_MAX) {
        static char sink[65536];
        bool in_body = u->body_left > 0;
        size_t room = !in_body ? HEAD_MAX - u->have : u->body_left < (long)sizeof sink ? u->body_left : sizeof sink;
        ssize_t n = recv(u->fd, in_body ? sink : u->in + u->have, room, 0);
        if (n <= 0)
            alive = n < 0 && errno == EAGAIN;
        else if (in_body)
            u->body_left -= n;
        else
            u->have += n;
    }
    while (alive && !u->blocked) {
        if (u->owes) {
            if (u->body_left)
                break;
            u->owes = false;
            alive = upstream_flush(u);
            continue;
        }
        char *end = memmem(u->in, u->have, "\r\n\r\n", 4);
        if (!end)
            break;
        size_t length = end + 4 - u->in;
        upstream_answer(u, length);
        size_t body = u->have - length < (size_t)u->body_left ? u->have - length : (size_t)u->body_left;
        u->body_left -= body;
        u->have -= length + body;
        memmove(u->in, u->in + length + body, u->have);
        u->owes = true;
    }
    if (!alive || (u->have == HEAD_MAX && !u->blocked)) {
        close(u->fd);
        free(u);
    }
}

// ---- tokens --------------------------------------------------------------------------------------------------------

static char **tokens;
static size_t token_count;

static void load_tokens(const char *file)
{
    FILE *f = fopen(file, "r");
    if (!f)
        fatal("cannot read the token file", strerror(errno));
    char line[512];
    size_t room = 0;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\r\n")] = 0;
        if (!*line)
            continue;
        if (strlen(line) > 255)
            fatal("the token file", "a token is longer than 255 bytes");
        if (token_count == room)
            tokens = realloc(tokens, (room = room ? room * 2 : 1024) * sizeof *tokens);
        tokens[token_count++] = strdup(line);
    }
    fclose(f);
    if (!token_count)
        fatal("the token file", "has no tokens");
}

static u64 random_state = 88172645463325252ull, unknown_counter;

static u64 random_u64(void) // xorshift
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

// An unknown token of the usual length; n distinct numbers give n distinct tokens (the factor is odd).
static void unknown_token(char out[21], u64 n)
{
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    u64 v = n * 0x9E3779B97F4A7C15ull;
    memcpy(out, "unknown--", 9);
    for (int i = 9; i < 20; i++, v >>= 6)
        out[i] = alphabet[v & 63];
    out[20] = 0;
}

// ---- clients -------------------------------------------------------------------------------------------------------

// Latencies by microsecond to 256, then 128 steps for each power of two: 0.8 % exact.
enum { BUCKETS = 256 + 56 * 128 };

struct group {
    char kind;
    int conns, bad_percent;
    u64 count, spread, paths;
    long down, up, fields, query;
    double rate;

    struct client *all;
    int *idle, idle_at, idle_have; // a ring of indices into `all`
    u64 picked;                    // requests made so far, to take tokens and places in turn

    u64 sent, done, done_in_time, errors, reconnects, known_wrong, unknown_wrong, mixed_up;
    u64 status[600], latency[BUCKETS], latency_max, slow; // `slow`: 0.9 s or more
};

struct client {
    enum source source;
    int fd;
    struct group *group;
    bool busy, known, last; // `last`: the gateway closes after this answer
    u64 due, token, seen;   // `token`, `seen`: fingerprints of what was sent and what the upstream saw
    int status;
    long body_left; // -1 while the head is being read
    long up_left;   // of the request's body
    size_t have;
    char in[8192];
};

static struct {
    int port, pids[32], pid_count;
    double secs, warm, stall;
    u64 seed;
    char path[256];
    struct group groups[4];
    int group_count;
} run;

static u64 in_flight, last_progress, measured_from;

static int bucket(u64 us)
{
    if (us < 256)
        return us;
    int shift = 63 - __builtin_clzll(us) - 7;
    int b = 256 + (shift - 1) * 128 + (int)(us >> shift) - 128;
    return b < BUCKETS ? b : BUCKETS - 1;
}

static u64 percentile(const struct group *g, double share)
{
    u64 total = 0, seen = 0;
    for (int i = 0; i < BUCKETS; i++)
        total += g->latency[i];
    for (int i = 0; i < BUCKETS; i++)
        if ((seen += g->latency[i]) > share * total || (total && seen == total))
            return i < 256 ? (u64)i : (128ull + (i - 256) % 128) << ((i - 256) / 128 + 1);
    return 0;
}

static void dial(struct client *c)
{
    struct sockaddr_in address = loopback(run.port);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0)
        fatal("cannot make a socket", strerror(errno));
    if (connect(c->fd, (void *)&address, sizeof address))
        fatal("cannot connect to the gateway", strerror(errno));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    no_delay(c->fd);
    watch(c->fd, c, EPOLLIN, EPOLL_CTL_ADD);
}

static void redial(struct client *c)
{
    close(c->fd);
    c->group->reconnects++;
    dial(c);
}

// Sends what fits of the request's body, and waits for room for the rest. False if the connection is broken.
static bool push(struct client *c)
{
    bool alive = send_body(c->fd, &c->up_left);
    if (alive)
        watch(c->fd, c, EPOLLIN | (c->up_left ? EPOLLOUT : 0), EPOLL_CTL_MOD);
    return alive;
}

static void rest(struct client *c)
{
    struct group *g = c->group;
    if (c->busy)
        in_flight--;
    c->busy = false;
    g->idle[(g->idle_at + g->idle_have++) % g->conns] = c - g->all;
}

// The next token of the group, and where it goes: 'h' header or 'q' query.
static char next_token(struct group *g, struct client *c, char out[256])
{
    u64 n = g->picked++;
    char kind = g->kind;
    if (kind != 'i' && kind != 'x' && g->bad_percent && random_u64() % 100 < (u64)g->bad_percent)
        kind = 'i';
    c->known = kind != 'i' && kind != 'x';
    if (c->known) {
        // A step that shares no factor with the spread visits every token once before it repeats.
        u64 at = n * (g->spread % 7919 ? 7919 : 1) % g->spread;
        strcpy(out, tokens[at * (token_count / g->spread)]);
        return kind == 'm' ? "hq"[n & 1] : kind;
    }
    bool repeated = kind == 'i' && random_u64() % 2;
    unknown_token(out, repeated ? random_u64() % 16 : ++unknown_counter);
    return "hq"[n & 1];
}

// Writes the head of the next request of the group.
static int write_head(struct client *c, char out[HEAD_MAX])
{
    struct group *g = c->group;
    char token[256], path[sizeof run.path + 64], query[320];
    u64 turn = g->picked;
    char place = next_token(g, c, token);
    if (g->down)
        sprintf(path, "/api/v3/bytes/%ld", g->down);
    else if (g->paths)
        sprintf(path, "%s/r%lu/x", run.path, turn % g->paths);
    else
        strcpy(path, run.path);
    if (place == 'h')
        strcpy(query, "per_page=20&order_by=id");
    else
        sprintf(query, "private_token=%s&per_page=1000&order_by=id", token);
    int n = sprintf(out, "%s %s?%s", g->up ? "POST" : "GET", path, query);
    for (long i = 0; i < g->query; i++)
        out[n++] = i % 16 == 0 ? '&' : i % 16 == 4 ? '=' : 'a' + i % 16;
    n += sprintf(out + n, " HTTP/1.1\r\nHost: gitlab.example.com\r\nUser-Agent: wire/1\r\nAccept: */*\r\n");
    if (place == 'h')
        n += sprintf(out + n, "PRIVATE-TOKEN: %s\r\n", token);
    for (long i = 0; i < g->fields; i++)
        n += sprintf(out + n, "X-Field-%02ld: value of a field\r\n", i);
    if (g->up)
        n += sprintf(out + n, "Content-Type: application/octet-stream\r\nContent-Length: %ld\r\n", g->up);
    n += sprintf(out + n, "\r\n");
    c->token = mirror ? fingerprint(token, strlen(token)) : 0;
    return n;
}

static void fire(struct client *c, u64 due)
{
    static char request[HEAD_MAX];
    int n = write_head(c, request);
    c->due = due;
    c->have = 0;
    c->body_left = -1;
    c->last = false;
    c->busy = true;
    in_flight++;
    c->group->sent++;
    bool sent = send(c->fd, request, n, MSG_NOSIGNAL) == n;
    if (!sent) {
        redial(c); // it was closed while idle: a client would retry on a new one
        sent = send(c->fd, request, n, MSG_NOSIGNAL) == n;
    }
    c->up_left = c->group->up;
    if (sent && (!c->up_left || push(c)))
        return;
    c->group->errors++;
    rest(c);
}

static void finish(struct client *c)
{
    struct group *g = c->group;
    u64 t = now_ns();
    last_progress = t;
    g->done++;
    g->status[c->status]++;
    if (c->known && c->status != 200)
        g->known_wrong++;
    else if (!c->known && c->status != 401)
        g->unknown_wrong++;
    else if (c->known && mirror && c->seen != c->token)
        g->mixed_up++;
    if (c->due >= measured_from) {
        u64 us = (t - c->due) / 1000;
        g->latency[bucket(us)]++;
        g->slow += us >= 900000;
        if (us > g->latency_max)
            g->latency_max = us;
    }
    rest(c);
    if (c->last)
        redial(c);
}

static void broken(struct client *c)
{
    if (c->busy) {
        c->group->errors++;
        rest(c);
    }
    redial(c);
}

// Parses the head in `in[..have]`. 1: done, 0: incomplete, -1: unsupported response.
static int read_head(struct client *c)
{
    char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end)
        return c->have == sizeof c->in ? -1 : 0;
    size_t n;
    const char *length = header(c->in, end, "content-length", &n);
    if (c->have < 12 || memcmp(c->in, "HTTP/1.1 ", 9) || !length)
        return -1;
    c->status = atoi(c->in + 9);
    if (c->status < 200 || c->status > 599)
        return -1;
    const char *close_it = header(c->in, end, "connection", &n);
    c->last = close_it && n == 5 && !strncasecmp(close_it, "close", 5);
    const char *seen = mirror ? header(c->in, end, "x-seen", &n) : NULL;
    c->seen = seen ? strtoull(seen, NULL, 16) : 0;
    c->body_left = atol(length) - (long)(c->have - (end + 4 - c->in));
    return c->body_left < 0 ? -1 : 1; // surplus bytes after the response
}

static void client_event(struct client *c, uint32_t events)
{
    static char sink[65536];
    if (c->busy && c->up_left && (events & EPOLLOUT) && !push(c)) {
        broken(c);
        return;
    }
    if (!(events & ~EPOLLOUT))
        return;
    bool in_head = !c->busy || c->body_left < 0;
    size_t room = sizeof sink;
    if (!c->busy)
        c->have = 0;
    if (in_head)
        room = sizeof c->in - c->have;
    else if ((size_t)c->body_left < room)
        room = c->body_left;
    ssize_t n = recv(c->fd, in_head ? c->in + c->have : sink, room, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n > 0 && !c->busy) // a response without a request
        c->group->errors++;
    if (n <= 0 || !c->busy) {
        broken(c);
        return;
    }
    if (in_head) {
        c->have += n;
        int read = read_head(c);
        if (read <= 0) {
            if (read < 0)
                broken(c);
            return;
        }
    } else {
        c->body_left -= n;
    }
    if (c->body_left == 0 && c->up_left)
        broken(c); // answered before the request was sent
    else if (c->body_left == 0)
        finish(c);
}

// ---- runs ----------------------------------------------------------------------------------------------------------

// CPU time of all threads of a process. Its main thread's file alone would leave out the workers.
static u64 process_ns(int pid)
{
    char name[300];
    u64 sum = 0;
    sprintf(name, "/proc/%d/task", pid);
    DIR *tasks = opendir(name);
    if (!tasks)
        fatal("the gateway's process", "has ended");
    for (struct dirent *e; (e = readdir(tasks));) {
        if (e->d_name[0] == '.')
            continue;
        sprintf(name, "/proc/%d/task/%s/schedstat", pid, e->d_name);
        FILE *f = fopen(name, "r");
        u64 ns = 0;
        if (f && fscanf(f, "%lu", &ns) == 1)
            sum += ns;
        if (f)
            fclose(f);
    }
    closedir(tasks);
    if (!sum)
        fatal("/proc/PID/task/*/schedstat", "is missing: the kernel was built without CONFIG_SCHED_INFO");
    return sum;
}

static u64 cpu_ns(void)
{
    u64 sum = 0;
    for (int i = 0; i < run.pid_count; i++)
        sum += process_ns(run.pids[i]);
    return sum;
}

// Reads " key=value key=value" into the run (g == NULL) or into a group.
static void read_settings(char *text, struct group *g)
{
    char *save;
    for (char *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        char *value = strchr(word, '=');
        if (!value)
            fatal("not key=value", word);
        *value++ = 0;
        if (!g && !strcmp(word, "port")) run.port = atoi(value);
        else if (!g && !strcmp(word, "pid"))
            for (char *next = value; *next && run.pid_count < 32; next += *next == ',')
                run.pids[run.pid_count++] = strtol(next, &next, 10);
        else if (!g && !strcmp(word, "secs")) run.secs = atof(value);
        else if (!g && !strcmp(word, "warm")) run.warm = atof(value);
        else if (!g && !strcmp(word, "stall")) run.stall = atof(value);
        else if (!g && !strcmp(word, "seed")) run.seed = strtoull(value, NULL, 10);
        else if (!g && !strcmp(word, "path")) snprintf(run.path, sizeof run.path, "%s", value);
        else if (g && !strcmp(word, "kind")) g->kind = *value;
        else if (g && !strcmp(word, "conns")) g->conns = atoi(value);
        else if (g && !strcmp(word, "count")) g->count = strtoull(value, NULL, 10);
        else if (g && !strcmp(word, "rate")) g->rate = atof(value);
        else if (g && !strcmp(word, "bad")) g->bad_percent = atoi(value);
        else if (g && !strcmp(word, "spread")) g->spread = strtoull(value, NULL, 10);
        else if (g && !strcmp(word, "down")) g->down = atol(value);
        else if (g && !strcmp(word, "up")) g->up = atol(value);
        else if (g && !strcmp(word, "fields")) g->fields = atol(value);
        else if (g && !strcmp(word, "query")) g->query = atol(value);
        else if (g && !strcmp(word, "paths")) g->paths = strtoull(value, NULL, 10);
        else fatal("unknown setting", word);
    }
}

static void read_run(char *line)
{
    char *save;
    memset(&run, 0, sizeof run);
    run.stall = 10;
    run.seed = 1;
    strcpy(run.path, "/api/v3/projects");
    bool counted = false;
    char *part = strtok_r(line, "|\n", &save);
    if (part)
        read_settings(part, NULL);
    while ((part = strtok_r(NULL, "|\n", &save))) {
        if (run.group_count == 4)
            fatal("a run", "has at most 4 groups");
        struct group *g = &run.groups[run.group_count++];
        g->conns = 64;
        read_settings(part, g);
        if (!g->kind || !strchr("hqmix", g->kind) || g->conns < 1)
            fatal("a group", "needs a kind of h, q, m, i or x and at least one connection");
        if (g->fields < 0 || g->query < 0 || 1200 + 32 * g->fields + g->query > HEAD_MAX)
            fatal("a group", "has a larger head than fits");
        if (!g->spread || g->spread > token_count)
            g->spread = token_count;
        counted |= g->count > 0;
    }
    if (!run.port || !run.group_count || (!counted && run.secs <= 0))
        fatal("a run", "needs a port, a group, and secs or a count");
}

static bool all_counted(void)
{
    bool any = false;
    for (int i = 0; i < run.group_count; i++) {
        struct group *g = &run.groups[i];
        any |= g->count > 0;
        if (g->count && g->done + g->errors < g->count)
            return false;
    }
    return any;
}

// When a paced group sends its next request.
static u64 next_due(const struct group *g)
{
    return measured_from + (u64)(g->sent * (1e9 / g->rate));
}

static void fire_what_is_due(u64 t)
{
    for (int i = 0; i < run.group_count; i++) {
        struct group *g = &run.groups[i];
        // As many as are idle now: one that fails and becomes idle again waits for the next turn.
        for (int n = g->idle_have; n > 0; n--) {
            if ((g->count && g->sent >= g->count) || (g->rate > 0 && next_due(g) > t))
                break;
            u64 due = g->rate > 0 ? next_due(g) : now_ns();
            struct client *c = &g->all[g->idle[g->idle_at]];
            g->idle_at = (g->idle_at + 1) % g->conns;
            g->idle_have--;
            fire(c, due);
        }
    }
}

static void wait_for_events(u64 timeout_ns)
{
    static struct epoll_event events[1024];
    struct timespec limit = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    int n = epoll_pwait2(epoll_fd, events, 1024, &limit, NULL);
    for (int i = 0; i < n; i++) {
        void *entry = events[i].data.ptr;
        switch (*(enum source *)entry) {
        case LISTENER: upstream_accept(entry); break;
        case UPSTREAM: upstream_event(entry, events[i].events); break;
        case CLIENT: client_event(entry, events[i].events); break;
        case STDIN:
            if (!(events[i].events & EPOLLIN))
                exit(0);
            line_waits = true;
        }
    }
}

static void reset_counters(void)
{
    for (int i = 0; i < run.group_count; i++) {
        struct group *g = &run.groups[i];
        g->sent = g->done = g->errors = g->reconnects = g->known_wrong = g->unknown_wrong = g->mixed_up = g->latency_max = g->slow = 0;
        memset(g->status, 0, sizeof g->status);
        memset(g->latency, 0, sizeof g->latency);
    }
}

static void print_result(double secs, u64 cpu)
{
    printf("{\"secs\":%.4f,\"cpu_ns\":%lu,\"groups\":[", secs, cpu);
    for (int i = 0; i < run.group_count; i++) {
        struct group *g = &run.groups[i];
        printf("%s{\"requests\":%lu,\"in_time\":%lu,\"rps\":%.1f,\"errors\":%lu,\"reconnects\":%lu,\"known_wrong\":%lu,"
               "\"unknown_wrong\":%lu,\"mixed_up\":%lu,\"p50\":%lu,\"p99\":%lu,\"p999\":%lu,\"max\":%lu,\"slow\":%lu,\"statuses\":{",
               i ? "," : "", g->done, g->done_in_time, g->done_in_time / secs, g->errors, g->reconnects, g->known_wrong,
               g->unknown_wrong, g->mixed_up, percentile(g, .5), percentile(g, .99), percentile(g, .999), g->latency_max, g->slow);
        for (int s = 0, first = 1; s < 600; s++)
            if (g->status[s]) {
                printf("%s\"%d\":%lu", first ? "" : ",", s, g->status[s]);
                first = 0;
            }
        printf("}}");
    }
    printf("]}\n");
    fflush(stdout);
}

static void do_run(void)
{
    unknown_counter = 1000 + (run.seed << 32); // below 1000: the repeated ones
    for (int i = 0; i < run.group_count; i++) {
        struct group *g = &run.groups[i];
        g->all = calloc(g->conns, sizeof *g->all);
        g->idle = calloc(g->conns, sizeof *g->idle);
        for (int k = 0; k < g->conns; k++) {
            g->all[k].source = CLIENT;
            g->all[k].group = g;
            dial(&g->all[k]);
            rest(&g->all[k]);
        }
    }
    u64 t = now_ns(), end = 0, cpu_from = cpu_ns(), cpu = 0, drain_until = 0;
    u64 warm_until = t + (u64)(run.warm * 1e9);
    bool warming = run.warm > 0, over = false;
    double secs = 0;
    last_progress = measured_from = t;
    if (!warming && run.secs > 0)
        end = t + (u64)(run.secs * 1e9);
    for (;; t = now_ns()) {
        if (warming && t >= warm_until) {
            warming = false;
            reset_counters();
            cpu_from = cpu_ns();
            measured_from = t = now_ns();
            if (run.secs > 0)
                end = t + (u64)(run.secs * 1e9);
        }
        if (!over && !warming && ((end && t >= end) || all_counted())) {
            over = true;
            cpu = cpu_ns() - cpu_from;
            secs = (t - measured_from) / 1e9;
            for (int i = 0; i < run.group_count; i++)
                run.groups[i].done_in_time = run.groups[i].done;
            drain_until = t + (u64)(run.stall * 1e9); // responses in flight are checked as well, but not timed
        }
        bool stalled = in_flight && t > last_progress + (u64)(run.stall * 1e9);
        if (over ? !in_flight || t >= drain_until : stalled)
            break;
        u64 wake = t + 200000000;
        if (!over) {
            fire_what_is_due(t);
            if (end && end < wake)
                wake = end;
            if (warming && warm_until < wake)
                wake = warm_until;
            for (int i = 0; i < run.group_count; i++)
                if (run.groups[i].rate > 0 && run.groups[i].idle_have && next_due(&run.groups[i]) < wake)
                    wake = next_due(&run.groups[i]);
            if (!in_flight)
                last_progress = t;
        }
        wait_for_events(busy_poll || wake < t ? 0 : wake - t);
    }
    if (!over) { // stalled: the gateway does not respond
        secs = (t - measured_from) / 1e9;
        cpu = cpu_ns() - cpu_from;
        for (int i = 0; i < run.group_count; i++)
            run.groups[i].done_in_time = run.groups[i].done;
    }
    for (int i = 0; i < run.group_count; i++) {
        struct group *g = &run.groups[i];
        for (int k = 0; k < g->conns; k++) {
            if (g->all[k].busy)
                g->errors++; // never answered
            close(g->all[k].fd);
        }
        free(g->all);
        free(g->idle);
    }
    in_flight = 0;
    print_result(secs, cpu);
}

int main(int argc, char **argv)
{
    int option, port = 0, addresses = 1;
    const char *token_file = NULL;
    while ((option = getopt(argc, argv, "U:A:mbt:")) > 0)
        switch (option) {
        case 'U': port = atoi(optarg); break;
        case 'A': addresses = atoi(optarg); break;
        case 'm': mirror = true; break;
        case 'b': busy_poll = true; break;
        case 't': token_file = optarg; break;
        default: return 2;
        }
    if (!token_file) {
        fputs("usage: wire [-U PORT] [-A N] [-m] [-b] -t TOKENS (run.py starts it)\n", stderr);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    memset(block, 'x', sizeof block);
    prctl(PR_SET_TIMERSLACK, 1); // paced requests leave on time
    epoll_fd = epoll_create1(0);
    load_tokens(token_file);
    for (int i = 0; port && i < addresses; i++)
        upstream_listen(port, i);
    static enum source standard_input = STDIN;
    watch(0, &standard_input, EPOLLIN, EPOLL_CTL_ADD);
    puts("ready");
    fflush(stdout);
    for (;;) {
        wait_for_events(3600000000000ull);
        if (!line_waits)
            continue;
        char line[2048];
        ssize_t n = read(0, line, sizeof line - 1);
        if (n <= 0)
            return 0;
        line[n] = line_waits = 0;
        read_run(line);
        do_run();
    }
}
