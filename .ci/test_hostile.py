"""What the README promises of strangers, as tests that take too long for the quick ones.

    python -m pytest -q .ci/test_hostile.py

What is random follows a seed, as in test_durability.py.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import http.client
import io
import itertools
import json
import logging
import os
import pathlib
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_durability import (  # noqa: F401
    HERE,
    PROGRAM,
    V3,
    Irc,
    Sender,
    asbridge,
    check_all,
    eventually,
    linux,
    person,
    program,
    pushed,
    recorder,
    registration,
    rng,
    say,
    waiting,
)

import test_asbridge

# ============================================================================
# HTTP: a hundred thousand requests that should not be
# ============================================================================


SAMPLE = {**asbridge.SAMPLE_REGISTRATION, "url": "http://127.0.0.1:0", "asbridge.sample": {"irc_port": 0}}


def with_deadlines(**seconds):
    """What stands before the program so that it has other deadlines."""
    code = f"import sys; sys.path.insert(0, {HERE!r}); import asbridge; vars(asbridge).update({seconds!r}); sys.exit(asbridge.main(sys.argv[3:]))"
    return (sys.executable, "-c", code)


def limited(limit):
    """The program with no more handles than that; "1024:" may be raised."""
    return ("sh", "-c", f'ulimit {"-S " if limit[-1:] == ":" else ""}-n {limit.rstrip(":")}; exec "$@"', "sh")


def connected(one, source=None):
    return socket.create_connection(("127.0.0.1", one.port), 20, (source, 0) if source else None)


def deaf(one):
    """A connection that takes hardly anything."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", one.port))
    return sock


def rest_of(sock):
    """What comes until the other side closes; a reset is an end, too."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65_536):
            parts.append(data)
    return b"".join(parts)


def answers_of(data):
    """(status, body) of each answer in a stream of them."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        size = int(re.search(rb"Content-Length: (\d+)", head)[1])
        yield int(head[9:12]), data[:size]
        data = data[size:]


class Held:
    """Handles, threads and memory of a process, to be compared with what it holds later."""

    def __init__(self, one):
        self.one, (self.handles, self.threads, self.memory) = one, self.now(one)

    @staticmethod
    def now(one):
        proc = pathlib.Path(f"/proc/{one.process.pid}")
        return len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")), one.resident()

    def comes_back(self, megabytes, seconds=15.0):
        """A few may stay: eight connections to the database, two handles each."""
        deadline = time.monotonic() + seconds
        while True:
            handles, threads, memory = self.now(self.one)
            if handles <= self.handles + 20 and threads <= self.threads + 8 and memory <= self.memory + megabytes * 2**20:
                return (memory - self.memory) / 2**20
            assert time.monotonic() < deadline, (vars(self), handles, threads, memory)
            time.sleep(0.01)


class Polite(threading.Thread):
    """A client that goes on asking, and how long it waited each time."""

    def __init__(self, one, path="/_matrix/client/versions", headers=None):
        super().__init__(daemon=True)
        self.http, self.path, self.headers, self.waits, self.over = asbridge.HttpClient(one.url), path, headers or {}, [], threading.Event()
        self.failed = None
        self.start()

    def run(self):
        try:
            while not self.over.wait(0.002):
                began = time.monotonic()
                status, _ = self.http.request("GET", self.path, None, self.headers)
                assert status in (200, 404), status
                self.waits.append(time.monotonic() - began)
        except Exception as error:
            self.failed = error

    def p99(self):
        """In seconds. It must have been answered every time."""
        self.over.set()
        self.join(10)
        self.http.close()
        assert self.failed is None and len(self.waits) > 20, (self.failed, len(self.waits))
        return sorted(self.waits)[len(self.waits) * 99 // 100]


class Hostile:
    """Requests that should not be. A seed gives the same ones again. `evil` is what must never be carried out."""

    HEADS = [                                                # each is refused: 400 or 431, and the connection closed
        "GET {p} HTTP/1.1", "GET {p} HTTP/1.1\r\nHost: h\r\nHost: h", "GET {p} HTTP/1.1\r\nHost: h, h", "GET {p} HTTP/1.1\r\nHost: u@h/x", "GET {p} HTTP/2.0\r\nHost: h", "GET {p}\r\nHost: h",
        "GET  {p} HTTP/1.1\r\nHost: h", "{p} GET HTTP/1.1\r\nHost: h", "GET x{p} HTTP/1.1\r\nHost: h", "GET x?://h{p} HTTP/1.1\r\nHost: h", "GET {p}\x00 HTTP/1.1\r\nHost: h", "CONNECT h:1 HTTP/1.1\r\nHost: h",
        "G(T {p} HTTP/1.1\r\nHost: h", "GGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGGG {p} HTTP/1.1\r\nHost: h", "\x16\x03\x01\x02\x00\x01", "PRI * HTTP/2.0", "GET {p} HTTP/1.1\nHost: h\n\n", "GET {p} HTTP/1.1\r\nHost: h\r\nA: b\nC: d",
        *("POST {p} HTTP/1.1\r\nHost: h\r\n" + more for more in (
            "A : b", " A: b", "A: b\r\n c", "A: b\r\n\tc", "A", ": b", "A: b\x01", "A: b\x7f", "A: b\rc", "A: b\x00", "\xe9: b", "A(: b", "A: b\r\n" * 101 + "A: b", "A: " + "x" * 66_000, "x" * 300 + "\x01: y",
            "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5, 6", "Content-Length: -5", "Content-Length: +5", "Content-Length: 0x5", "Content-Length: 5 5", "Content-Length: \x0b5", "Content-Length: 5\xa0",
            "Content-Length:", "Content-Length : 5", "Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 5", "Content-Length: 99999999999999999999",
            "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding : chunked", "Transfer-Encoding: \x0bchunked", "Transfer-Encoding:\r\n chunked", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding:")),
        "POST {p} HTTP/1.0\r\nTransfer-Encoding: chunked"]
    CHUNKS = [" 5\r\nhello\r\n", "+5\r\nhello\r\n", "0x5\r\nhello\r\n", "5\n\r\nhello\r\n", "\n5\r\nhello\r\n", "5;a\nb\r\nhello\r\n", "5;a\rb\r\nhello\r\n", "5\r\nhelloo\r\n", "5\r\nhello\n0\r\n", "FFFFFFFFF\r\n", "x\r\n", "\r\n",
              "5 a\r\nhello\r\n", "0\r\nA: b\n\r\n\r\n", "0\r\n" + "A: b\r\n" * 101, ";" * 9000, "2\r\n{}\r\nFFFFFFFF\r\n"]
    PLACES = ["/_matrix/client/v3/login", "/_matrix/client/v3/register", "/_matrix/client/v3/createRoom", "/_matrix/client/v3/profile/{}", "/_matrix/client/v3/profile/{}/displayname", "/_matrix/client/v3/rooms/{}/send/{}/{}",
              "/_matrix/client/v3/rooms/{}/state/{}/{}", "/_matrix/client/v3/join/{}", "/_matrix/client/v3/rooms/{}/messages", "/_matrix/client/v3/sync", "/_matrix/client/v3/directory/room/{}", "/_matrix/client/v3/user/{}/filter/{}",
              "/_matrix/client/v3/user/{}/account_data/{}", "/_matrix/client/v3/publicRooms", "/_matrix/client/v1/rooms/{}/relations/{}", "/_matrix/media/v3/download/{}/{}", "/_matrix/media/v3/thumbnail/{}/{}", "/_matrix/client/v3/keys/query",
              "/_matrix/client/v3/devices/{}", "/_matrix/app/v1/transactions/{}", "/_matrix/app/v1/users/{}", "/_matrix/app/v1/rooms/{}", "/_matrix/app/v1/thirdparty/user/{}", "/_asbridge/{}", "/_asbridge/why", "/{}/{}", "//{}", "/_matrix/client/*/sync"]
    IDS = ["", ".", "..", "%2E%2E", "%2F", "%2f..%2f", "%00", "%FF", "%C0%AF", "%ED%A0%80", "%", "%zz", "{}", "*", "@alice:localhost", "@ALICE:localhost", "@alice:elsewhere", "@alice:localhost.", "%EF%BC%A0alice:localhost", "%D0%B0", "\xff", "\xc3\xa9",
           "!x:localhost", "%23x:localhost", "$x", "$" + "A" * 43, "x" * 10_000, "%41" * 2000, "'%22;--", "-1", "9" * 400, "%E2%80%AE", "%1B%5B2J", "%0D%0AX:%20y"]
    NAMES = ["ts", "limit", "timeout_ms", "since", "from", "to", "filter", "dir", "at", "user_id", "device_id", "access_token", "kind", "format", "width", "membership", "set_presence", "x", ""]
    BODIES = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"a":' * 500, b"[" * 5000, b'{"user_id":5,"username":[],"type":{},"identifier":1}', b'{"a":1e999}', b'{"a":"\\ud800"}', b'{"a":"\\u0000"}', b"9" * 5000, b" " * 70_000, b'{"events":[null,5,{"event_id":5}]}']

    def __init__(self, rng, token):
        self.rng, self.token = rng, token
        evil = '{"room_alias_name":"smuggled"}'
        self.evil = ("POST /_matrix/client/v3/createRoom HTTP/1.1\r\nHost: h\r\n"
                     f"Authorization: Bearer {token}\r\nContent-Length: {len(evil)}\r\n\r\n{evil}" * 2).encode()

    def path(self):
        choice = self.rng.choice
        path = re.sub("{}", lambda _: choice(self.IDS), choice(self.PLACES))
        query = "&".join(f"{choice(self.NAMES)}={choice(self.IDS)}" for _ in range(self.rng.choice((0, 0, 1, 2))))
        return (path + ("?" + query if query else ""))[:40_000]

    def refused(self):
        """One that is refused for its shape, with what would be carried out if it were read otherwise."""
        if self.rng.random() < 0.3:
            head = f"POST {self.rng.choice(('/_matrix/client/v3/login', '/_matrix/app/v1/transactions/1'))} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {self.token}\r\nTransfer-Encoding: chunked\r\n\r\n"
            return (head.replace("POST /_matrix/app", "PUT /_matrix/app") + self.rng.choice(self.CHUNKS)).encode("latin-1") + self.evil
        head = self.rng.choice(self.HEADS).replace("{p}", "/_matrix/client/versions")
        return head.encode("latin-1") + b"\r\n\r\n" + self.evil

    def read(self):
        """One that is well-formed HTTP, with nonsense in it; and its method."""
        method, body = self.rng.choice(("GET", "GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "X")), b""
        head = f"{method} {self.path()} HTTP/1.1\r\nHost: h\r\n" + self.rng.choice(("", f"Authorization: Bearer {self.token}\r\n", "Authorization: Bearer x\r\n", "Authorization: \r\n", "A: " + "x" * 3000 + "\r\n"))
        if method not in ("GET", "HEAD", "OPTIONS"):
            body = self.rng.choice(self.BODIES)
            if self.rng.random() < 0.3:
                head, body = head + "Transfer-Encoding: chunked\r\n", (b"%x;x=y\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\nT: x\r\n\r\n"
            else:
                head += f"Content-Length: {len(body)}\r\n" * self.rng.choice((1, 1, 2))
        return method, head.encode("latin-1") + b"\r\n" + body

    def cut_off(self):
        """One whose client goes away in the middle of it."""
        _, data = self.read()
        return data[:self.rng.randrange(len(data))]


class Attack(threading.Thread):
    """Some thousands of these against one server, and what should not have come back."""

    def __init__(self, one, hostile, count, source):
        super().__init__(daemon=True)
        self.one, self.hostile, self.count, self.source, self.wrong, self.done = one, hostile, count, source, [], 0
        self.start()

    def run(self):
        try:
            while self.done < self.count and not self.wrong:
                kind = self.hostile.rng.random()
                (self.refused if kind < 0.7 else self.cut_off if kind < 0.8 else self.many)()
        except Exception as error:
            self.wrong.append(repr(error))

    def refused(self):
        data = self.hostile.refused()
        with connected(self.one, self.source) as sock:
            with contextlib.suppress(ConnectionError):       # closed while we still send
                sock.sendall(data)
            answer = rest_of(sock)
        if answer and (not answer.startswith(b"HTTP/1.1 4") or len(re.findall(rb"HTTP/1.1 [0-9]", answer)) != 1 or b"Connection: close" not in answer):
            self.wrong.append((data[:300], answer[:300]))
        self.done += 1

    def cut_off(self):
        with connected(self.one, self.source) as sock:
            if self.hostile.rng.random() < 0.5:              # with a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(self.hostile.cut_off())
        self.done += 1

    def many(self):
        """One after the other, none of which waits for the answer to the last."""
        with connected(self.one, self.source) as sock:
            asked = [self.hostile.read() for _ in range(40)]
            sender = threading.Thread(target=self.send, args=(sock, b"".join([data for _, data in asked])), daemon=True)
            sender.start()
            self.check(asked, rest_of(sock))
            sender.join()

    @staticmethod
    def send(sock, data):
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    def check(self, asked, data):
        for method, request in asked:
            head, _, data = data.partition(b"\r\n\r\n")
            if not head:
                return                                       # closed after one that is too large: the rest is not read
            size = int(re.search(rb"Content-Length: (\d+)", head)[1]) if method != "HEAD" else 0
            body, data = data[:size], data[size:]
            self.done += 1
            if not b"200" <= head[9:12] < b"500" or (body and head[9:10] == b"4" and b'"errcode"' not in body and b'"flows"' not in body):
                self.wrong.append((request[:300], head[:200], body[:200]))


def attacked(one, rng, token, count):
    """That many by four at once; how many there were."""
    attacks = [Attack(one, Hostile(random.Random(rng.random()), token), count // 4, f"127.0.0.{2 + n}") for n in range(4)]
    for attack in attacks:
        attack.join()
    assert [wrong for attack in attacks for wrong in attack.wrong[:3]] == []
    return sum(attack.done for attack in attacks)


@linux
@pytest.mark.parametrize("which", ["homeserver", "application service"])
def test_a_hundred_thousand_hostile_requests_leave_nothing_behind(program, rng, say, which):
    if which == "homeserver":
        one, count = program({"registrations": [registration()]}), 100_000
        alice = person(one.url)
        token, path, headers = alice.token, "/_matrix/client/v3/joined_rooms", {"Authorization": f"Bearer {alice.token}"}
    else:
        hs = program({"registrations": [SAMPLE]}, "--role", "homeserver")
        one, count = program({"registrations": [SAMPLE]}, "--role", "appservice", "--homeserver", hs.url), 10_000
        token, path, headers = SAMPLE["hs_token"], "/_matrix/app/v1/thirdparty/protocol/x", {"Authorization": f"Bearer {SAMPLE['hs_token']}"}
    assert one.port
    attacked(one, rng, token, count // 10)                   # caches fill
    held, polite, began = Held(one), Polite(one, path, headers), time.monotonic()
    done = attacked(one, rng, token, count)
    took, p99 = time.monotonic() - began, polite.p99()
    grown = held.comes_back(30)
    say(f"{which}: {done} hostile requests in {took:.0f} s; memory +{grown:.1f} MiB; p99 of a polite client meanwhile {p99 * 1000:.0f} ms")
    log = one.log.read_text()
    assert done >= count and p99 < 1 and "Traceback" not in log and " failed" not in log, log[-2000:]
    if which == "homeserver":
        with pytest.raises(asbridge.MatrixError, match="M_NOT_FOUND"):     # no request was carried out that stood inside another
            alice.resolve("#smuggled:localhost")



class Trickle(threading.Thread):
    """Sends a byte now and then on many connections, until the other side has closed all."""

    def __init__(self, socks, data, pause=0.1):
        super().__init__(daemon=True)
        self.open, self.data, self.pause, self.answers, self.longest = set(socks), data, pause, [], 0.0
        for sock in socks:
            sock.settimeout(0)
        self.start()

    def run(self):
        began = time.monotonic()
        for byte in itertools.cycle(self.data):
            for sock in list(self.open):
                with contextlib.suppress(BlockingIOError):
                    try:
                        sock.send(bytes([byte]))
                        if answer := sock.recv(1000):
                            self.answers.append(answer)
                            continue
                    except ConnectionError:
                        pass
                    self.open.discard(sock)                  # closed from there
                    self.longest = time.monotonic() - began
            if not self.open or time.monotonic() - began > 60:
                return
            time.sleep(self.pause)


@linux
def test_who_sends_a_byte_now_and_then_or_never_reads_is_dropped_in_time_and_others_are_answered(program, say):
    one = program({}, before=with_deadlines(HEAD_SECONDS=1.0, IDLE_SECONDS=0.5, ANSWER_SECONDS=1.0, LINGER_SECONDS=0.5))
    alice, size, n = person(one.url), 8_000_000, 12
    where = alice.call("POST", "/_matrix/media/v1/create")["content_uri"].removeprefix("mxc://")
    with contextlib.closing(asbridge.HttpClient(one.url)) as http:
        authorization = {"Authorization": f"Bearer {alice.token}"}
        assert http.request("PUT", f"/_matrix/media/v3/upload/{where}", b"x" * size, authorization)[0] == 200
    head = b"Host: h\r\nAuthorization: Bearer %b\r\n" % alice.token.encode()
    kinds = {"head": (b"", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000), "body": (b"POST /_matrix/client/v3/createRoom HTTP/1.1\r\nContent-Length: 9\r\n" + head + b"\r\n{", b" "),
             "chunks": (b"POST /_matrix/client/v3/createRoom HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + head + b"\r\n", b"1\r\n \r\n"),
             "nothing read": (f"GET /_matrix/media/v3/download/{where} HTTP/1.1\r\n".encode() + head + b"\r\n", b"")}
    kinds["pipeline"] = (b"GET /_matrix/client/v3/pushrules/ HTTP/1.1\r\n" + head + b"\r\n") * 2000, b""
    held, polite, memory = Held(one), Polite(one), []
    for _ in range(2):
        socks = {kind: [(connected if data else deaf)(one) for _ in range(n)] for kind, (_, data) in kinds.items()}
        for kind, (first, _) in kinds.items():
            for sock in socks[kind]:
                sock.settimeout(0.03 if kind == "pipeline" else 20)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    sock.sendall(first)
        trickles = [Trickle(socks[kind], data) for kind, (_, data) in kinds.items() if data]
        for trickle in trickles:
            trickle.join()
            assert trickle.longest < 20 and not trickle.open
            assert all(answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 ")) for answer in trickle.answers)
        held.comes_back(10_000)
        memory.append(one.resident() / 2**20)
        for each in socks.values():
            for sock in each:
                sock.close()
    p99 = polite.p99()
    most = held.memory / 2**20 + n * size * 2 / 2**20 + 64   # what they held at once; the allocator may keep as much for the next ones
    say(f"{n * len(kinds)} slow clients, twice: the last gone after {trickle.longest:.1f} s, p99 of a polite one meanwhile "
        f"{p99 * 1000:.0f} ms, memory {', '.join(f'{each:.0f}' for each in memory)} MiB of {most:.0f}")
    assert memory[-1] < most and p99 < 1 and "Traceback" not in one.log.read_text()


def processor_seconds(one):
    fields = pathlib.Path(f"/proc/{one.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@linux
def test_who_vanishes_in_a_long_poll_leaves_neither_a_thread_nor_a_handle(program, say):
    one = program({}, before=with_deadlines(LOOK_SECONDS=0.5))
    alice = person(one.url)
    since = alice.sync()["next_batch"]
    held = Held(one)
    asked = f"GET /_matrix/client/v3/sync?timeout=600000&since={since} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {alice.token}\r\n\r\n".encode()
    socks = [connected(one) for _ in range(300)]
    for sock in socks:
        sock.sendall(asked)
    eventually(lambda: Held.now(one)[1] >= held.threads + 300)
    for n, sock in enumerate(socks):
        if n % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    say(f"300 long polls whose clients are gone: memory {held.comes_back(60):+.1f} MiB after it")


@linux
@pytest.mark.parametrize("limit", ["1024:", "300"])
def test_two_thousand_idle_connections_hinder_nobody(program, say, limit):
    """Past the handles that there are, the connections that were idle for longest go."""
    handles = resource.getrlimit(resource.RLIMIT_NOFILE)
    if handles[1] != resource.RLIM_INFINITY and handles[1] < 2500:
        pytest.skip("this needs 2,500 handles")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(handles[0], 2500), handles[1]))
    one = program({}, before=limited(limit))
    alice, held, socks = person(one.url), Held(one), []
    try:
        for n in range(2000):
            socks.append(connected(one))
            if n % 3 == 0:
                socks[-1].sendall(b"GET /_matrix/client/versions HTTP/1.1\r\nHost: h\r\n\r\n")
        before, polite = processor_seconds(one), Polite(one)
        room = alice.create_room()
        for n in range(200):
            alice.say(room, str(n))
        p99, used = polite.p99(), processor_seconds(one) - before
        left, memory = Held.now(one)[0] - held.handles, (one.resident() - held.memory) / 2**20
        say(f"2,000 idle connections, {limit.rstrip(':')} handles to begin with: {left} are kept, with {memory:.0f} MiB; p99 of a polite client {p99 * 1000:.0f} ms, {used:.1f} s of processor")
        assert (left >= 2000) == (limit == "1024:") and p99 < 1 and len(alice.messages(room)["chunk"]) == 100
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, handles)
    held.comes_back(100)
    assert "Traceback" not in one.log.read_text()


# ============================================================================
# JSON: every field of every endpoint with every wrong type
# ============================================================================

def test_no_value_of_any_wrong_type_in_a_body_makes_the_homeserver_fail_then_or_later():
    with asbridge.Homeserver([test_asbridge.registration()]) as hs:
        target = test_asbridge.Target(hs)
        assert [(*row[:2], *what) for row in test_asbridge.BODIES
                for what in test_asbridge.failing(target, *row[:3], person=row[3:], chosen=lambda mutations: mutations)] == []


# ============================================================================
# Regexes: random ones, and how long they really take
# ============================================================================

class TooLong(Exception):
    pass


class Backtracking:
    """Matches as Python does, from what Python's own parser reads, and counts the steps up to a limit."""

    def __init__(self, pattern, limit):
        self.flags, self.limit, self.steps, self.tests = pattern.flags & ~re.VERBOSE, limit, 0, {}
        self.program = self.read(re._parser.parse(pattern.pattern))

    def read(self, items):
        return tuple(part for name, value in items for part in self.part(str(name), value))

    def part(self, name, value):
        if name == "SUBPATTERN":
            return self.read(value[3])
        if name == "BRANCH":
            return [(name, [self.read(option) for option in value[1]])]
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return [(name, value[0], value[1], self.read(value[2]))]
        return [(name, value if name == "AT" else self.one_char(name, value))]

    def one_char(self, name, value):
        """Whether a character is this one, as `re` has it."""
        def member(kind, item):
            if kind == "CATEGORY":
                return asbridge.CATEGORIES[str(item).removeprefix("CATEGORY_")]
            return "-".join([f"\\U{code:08x}" for code in (item if kind == "RANGE" else (item,))])
        if name == "ANY":
            return re.compile(".", self.flags).match
        members = [(str(kind), item) for kind, item in (value if name == "IN" else [(name.removeprefix("NOT_"), value)])]
        negated = "^" * (name == "NOT_LITERAL" or members[0][0] == "NEGATE")
        return re.compile(f"[{negated}{''.join([member(*one) for one in members if one[0] != 'NEGATE'])}]", self.flags).match

    def count(self, text, whole):
        self.text, self.steps = text, 0
        with contextlib.suppress(TooLong):
            self.match(self.program, 0, lambda at: at == len(text) or not whole)
        return self.steps

    def step(self):
        self.steps += 1
        if self.steps > self.limit:
            raise TooLong

    def match(self, parts, at, then):
        self.step()
        if not parts:
            return then(at)
        (name, *what), rest = parts[0], parts[1:]
        if name == "BRANCH":
            return any(self.match(option, at, lambda end: self.match(rest, end, then)) for option in what[0])
        if name == "AT":
            there = at == 0 if "BEGINNING" in str(what[0]) else self.text[at:] in ("", "\n")
            return there and self.match(rest, at, then)
        if name not in ("MAX_REPEAT", "MIN_REPEAT"):
            return at < len(self.text) and what[0](self.text[at]) and self.match(rest, at + 1, then)
        return self.repeat(name, *what, lambda end: self.match(rest, end, then), at)

    def repeat(self, name, low, high, body, then, at, done=0, last=-1):
        self.step()

        def again():
            return done < high and (done < low or at != last) and self.match(
                body, at, lambda end: self.repeat(name, low, high, body, then, end, done + 1, at))
        if done < low:
            return again()
        return again() or then(at) if name == "MAX_REPEAT" else then(at) or again()


FEW = ["a", "b", "ab", "ba", "aa", "[ab]", "a", "b", "^", "$", "k", "\u212a", "[\u00e9-\u212a]"]
MANY = ["a", "b", "ab", "c", ".", "[^a]", "[a-z]", "[^b_]", "_", "1", r"\w", r"\d", r"\s", r"\W", r"[^\W]", "\u00e9", r"\.", "\n",
        "[[:alpha:]]", "[[:punct:]]"]


def random_regex(rng, atoms, depth):
    kind = rng.random() if depth else 0
    if kind < 0.3:
        return rng.choice(atoms)
    if kind < 0.55:
        return "".join([random_regex(rng, atoms, depth - 1) for _ in range(rng.randint(1, 4))])
    if kind < 0.75:
        return "(?:" + "|".join([random_regex(rng, atoms, depth - 1) for _ in range(rng.randint(2, 3))]) + ")"
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,3}", "{0,30}", "{3,}", "*?", "+?", "??"])
    return f"(?:{random_regex(rng, atoms, depth - 1)}){repeat}"


def random_text(rng, alphabet):
    """A short text again and again, and an end at which most matches fail."""
    pumped = "".join([rng.choice(alphabet) for _ in range(rng.randint(1, 4))])
    return ("".join(rng.choices("ab1_", k=rng.randint(0, 2))) + pumped * 32)[:32] + "!"


def test_no_random_regex_takes_more_steps_than_it_is_thought_to(rng, say):
    verdicts, end = collections.Counter(), time.monotonic() + 20
    while time.monotonic() < end:
        atoms, whole = rng.choice([FEW, MANY]), rng.random() < 0.3
        parts = [random_regex(rng, atoms, rng.randint(1, 3)) for _ in range(rng.randint(1, 4))]
        regex = "".join([rng.choice(["", "", "", "(?i)", "(?s)"]), *parts, rng.choice(["", "b", "!", "$"])])
        try:
            pattern = asbridge.compile_regex(regex)
        except re.error:
            continue
        cost = asbridge.cost_of(pattern, uri=whole)
        verdicts[cost.verdict] += 1
        assert cost.verdict == "harmless" or asbridge.DESERVES_A_LOOK.search(regex) or whole, regex
        limit = 1500 * max(33, cost.ways)
        if cost.verdict in ("harmless", "heavy") and limit < 300_000:
            matching = Backtracking(pattern, limit)
            for _ in range(5):
                text = random_text(rng, "aab1_.c\nkK\u212a\u00e9" if atoms is MANY else "aabk\u212a")
                assert matching.count(text, whole) <= limit, (cost, regex, text)
    say(f"regexes: {dict(verdicts)}")
    assert len(verdicts) > 2


# ============================================================================
# Rules of rooms: a long walk beside a model
# ============================================================================

class Mortal:
    """asbridge.py as a program. It is started again on its database, after an end or a kill."""

    def __init__(self, program, registrations, rng):
        self.start = lambda: program({"port": 0, "database": "walk.db", "registrations": registrations}, "-q")
        self.rng, self.running = rng, self.start()

    @property
    def url(self):
        return self.running.url

    def kill(self):
        self.running.kill()

    def restart(self):
        if self.running.process.poll() is None:
            self.rng.choice([self.running.kill, self.running.end])()
        self.running = self.start()


class MortalWalk(test_asbridge.Walk):
    """A walk in which the homeserver is killed at times while it is asked. What has an ID of its own is then asked again, and
    has happened once.
    """

    def ask(self, user, verb, args, keys):
        again = verb in ("say", "send", "redact", "set_state") and "m.room.member" not in args       # nobody leaves twice
        if not again or self.rng.random() > 0.01:
            return super().ask(user, verb, args, keys)
        killer = threading.Timer(self.rng.random() * 0.003, self.server.kill)
        killer.start()
        try:
            answer = super().ask(user, verb, args, keys)
        except asbridge.Unreachable:
            answer = None
        killer.join()
        self.restart()
        again = super().ask(user, verb, args, keys)
        assert answer is None or str(answer) == str(again)   # what was answered is kept
        return again


@pytest.mark.parametrize("which", [1, 2])
def test_a_long_walk_beside_a_model_of_the_rules_with_restarts_and_kills_meets_no_difference(which, program, rng, tmp_path, say):
    recorders = {service.id: test_asbridge.Recorder() for service in test_asbridge.SERVICES}
    listeners = {id: test_asbridge.Listener(recorder) for id, recorder in recorders.items()}
    registrations = [service.registration(listeners[service.id].url) for service in test_asbridge.SERVICES]
    server = Mortal(program, registrations, rng)
    try:
        walk = MortalWalk(f"{which} {rng.random()}", server, listeners, leavers=("frank", "grace"))
        walk.go(1500, restarts=[500, 1000])
    finally:
        for recorder in recorders.values():
            recorder.stop()
    say(f"{walk.heard} events in {len(walk.model.rooms)} rooms")


# ============================================================================
# Application services that misbehave
# ============================================================================

class Rogue:
    """An application service of raw sockets. `answer(sock)` says what it wants to each request; it returns False to close. `told`: the
    heads of the requests, `waits` a server's end.
    """

    def __init__(self, answer):
        self.answer, self.told, self.waits = answer, [], threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.settimeout(20)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with sock, contextlib.suppress(OSError), sock.makefile("rb") as stream:
            while line := stream.readline():
                head = line + b"".join(iter(stream.readline, b"\r\n"))
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                stream.read(int(length[1]) if length else 0)
                self.told.append(head)
                if self.answer(self, sock) is False:
                    return

    def stop(self):
        self.waits.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def plain(status, body=b"{}", headers=b"", length=None):
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%b\r\n%b" % (status, len(body) if length is None else length, headers, body)


def says(*parts, then=True):
    """It says this, one thing after the other, and keeps the connection or closes it."""
    def answer(rogue, sock):
        for part in parts:
            sock.sendall(part)
        return then
    return answer


def floods(start, more):
    """It says this, and then the other thing for ever."""
    def answer(rogue, sock):
        sock.sendall(start)
        while not rogue.waits.is_set():
            sock.sendall(more)
    return answer


def trickles(start=b"", bits=b"H"):
    def answer(rogue, sock):
        sock.sendall(start)
        while not rogue.waits.wait(0.05):
            sock.sendall(bits)
    return answer


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
IN_TIME, BROKE_OFF, NO_HTTP = "did not answer in time", "in the middle of its answer", "not HTTP/1.1"
CLOSED = "closed the connection without an answer"
# What it answers, and why that is no answer: '' if it counts as a 200, a number if as another status.
ROGUES = {
    "html": (says(plain(200, b"<html>welcome")), ""),
    "empty": (says(plain(200, b"")), ""),
    "wrong_json": (says(plain(200, b'[{"instances": 5}, NaN]')), ""),
    "deep_json": (says(plain(200, b"[" * 60_000)), ""),
    "long_number": (says(plain(200, b"9" * 60_000)), ""),
    "gigabytes": (floods(OK + b"Content-Length: 2147483648\r\n\r\n", b"x" * 65_536), ""),
    "no_length": (floods(OK + b"\r\n", b"x" * 65_536), ""),
    "chunks": (floods(CHUNKED, b"ffff\r\n" + b"x" * 65_535 + b"\r\n"), ""),
    "small_chunks": (floods(CHUNKED, b"1\r\nx\r\n" * 1000), NO_HTTP),
    "one_chunk": (floods(CHUNKED + b"ffffffffffff\r\n", b"x" * 65_536), ""),
    "cookie": (says(plain(200, headers=b"Set-Cookie: who=you; Path=/\r\n")), ""),
    "too_short": (says(plain(200, b"{} and more", length=2)), ""),
    "twice": (says(plain(200) * 2), ""),
    "keeps_and_closes": (says(plain(200, headers=b"Connection: keep-alive\r\n"), then=False), ""),
    "closes_and_keeps": (says(plain(200, headers=b"Connection: close\r\n")), ""),
    "announces": (says(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n", plain(200)), ""),
    "created": (says(plain(201)), 201), "no_content": (says(b"HTTP/1.1 204 X\r\n\r\n"), 204), "redirect": (None, 302),
    "not_modified": (says(b"HTTP/1.1 304 X\r\n\r\n"), 304), "unauthorized": (says(plain(401)), 401),
    "forbidden": (says(plain(403)), 403), "unknown": (says(plain(404, b"nothing \x1b[2J here")), 404),
    "fails": (says(plain(500, b'{"errcode": "M_X", "error": {"a": [1]}}')), 500),
    "unavailable": (says(plain(503, b"x" * 60_000)), 503), "status_999": (says(plain(999)), 999),
    "promises": (says(OK + b"Content-Length: 2147483648\r\n\r\nxx"), IN_TIME), "too_long": (says(plain(200, length=3)), IN_TIME),
    "silent": (says(), IN_TIME), "trickle": (trickles(), IN_TIME),
    "trickled_body": (trickles(OK + b"Content-Length: 5000\r\n\r\n"), IN_TIME),
    "trickled_headers": (trickles(OK, b"X: y\r\n"), IN_TIME), "closes": (says(then=False), CLOSED),
    "half": (says(plain(200, b"half", length=100), then=False), BROKE_OFF),
    "half_chunk": (says(CHUNKED + b"9\r\nhalf", then=False), BROKE_OFF),
    "no_size": (says(CHUNKED + b"zz\r\nxx\r\n"), BROKE_OFF), "negative": (floods(CHUNKED + b"-1\r\n", b"x" * 65_536), NO_HTTP),
    "always_100": (floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), NO_HTTP), "headers": (floods(OK, b"X: y\r\n" * 1000), NO_HTTP),
    "long_header": (floods(OK + b"X: ", b"y" * 65_536), NO_HTTP), "long_line": (floods(b"", b"y" * 65_536), NO_HTTP),
    "long_trailer": (floods(CHUNKED + b"0\r\n", b"X: y\r\n" * 1000), NO_HTTP),
    "ssh": (says(b"SSH-2.0-OpenSSH_9.9\r\n", then=False), NO_HTTP), "http_2": (says(b"HTTP/2 200\r\n\r\n"), NO_HTTP),
}


def claims(url, id):
    """The registration of one that has a network of its own and shares another, and hears every room."""
    namespaces = {"users": [{"regex": f"@{id}__.*", "exclusive": True}], "aliases": [{"regex": f"#{id}__.*", "exclusive": True}],
                  "rooms": [{"regex": "!.*", "exclusive": False}]}
    return {**registration(url, id), "namespaces": namespaces, "protocols": ["shared"]}


class Friend(Rogue):
    """One that answers as it should."""

    def __init__(self):
        super().__init__(None)
        self.listener.close()
        self.bodies = []
        self.server = asbridge.HttpServer(("127.0.0.1", 0), self.respond)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def respond(self, request):
        self.bodies.append((request.path, request.headers.get("authorization"), request.body(50_000_000).decode()))
        found = {"protocol": {"instances": [{"network_id": "good"}]},
                 "user": [{"userid": "@good__x:localhost", "protocol": "shared", "fields": {}}],
                 "location": [{"alias": "#good__x:localhost", "protocol": "shared", "fields": {}}]}
        kind = request.path.partition("/thirdparty/")[2].partition("/")[0]
        return asbridge.Response(200, json.dumps(found.get(kind, {})).encode())

    def stop(self):
        self.server.stop()


@pytest.fixture
def services():
    """Those of ROGUES by their names, and a good one."""
    made = {"good": Friend()}
    made |= {name: Rogue(answer or says(plain(302, headers=b"Location: %b/stolen\r\n" % made["good"].url.encode())))
             for name, (answer, _) in ROGUES.items()}
    yield made
    for one in made.values():
        one.stop()


def outcome(fn, *args):
    """(seconds, what it returned or raised)."""
    began = time.monotonic()
    try:
        found = fn(*args)
    except asbridge.MatrixError as error:
        found = error.status, error.errcode
    return time.monotonic() - began, found


QUERY = {"": (404, "M_NOT_FOUND"), 404: (404, "M_NOT_FOUND")}


@linux
def test_whatever_services_answer_they_are_heard_out_for_a_while_and_harm_nobody_else(program, services, tmp_path, say):
    """All of them at once, each called in every way that there is."""
    names = list(ROGUES)
    running = program({"registrations": [claims(one.url, name) for name, one in services.items()], "push_timeout_ms": 1000,
                       "query_timeout_ms": 1000, "retry_max_ms": 2000}, "--role", "homeserver")
    alice = person(running.url)
    room = alice.create_room()
    before = running.resident()
    with ThreadPoolExecutor(len(names) * 3 + 3) as pool:
        asked = {}
        for name in names:
            bot = asbridge.Client(running.url, f"as-{name}")
            asked[name] = [pool.submit(outcome, alice.profile, f"@{name}__x:localhost"),
                           pool.submit(outcome, alice.resolve, f"#{name}__x:localhost"),
                           pool.submit(outcome, bot.call, "POST", f"/_matrix/client/v1/appservice/{name}/ping", {})]
        shared = [pool.submit(outcome, alice.ask, "GET", "thirdparty", *what)
                  for what in (["protocols"], ["user", "shared"], ["location", "shared"])]
        said = [outcome(alice.say, room, f"n{n}") for n in range(20)]
        eventually(lambda: all(f'"n{n}"' in "".join(body for _, _, body in services["good"].bodies) for n in range(20)), 5)
        longest = max(seconds for seconds, _ in said)
        protocols, users, locations = [future.result(20)[1] for future in shared]
        found = {name: [future.result(30) for future in futures] for name, futures in asked.items()}
    grown = running.resident() - before
    assert [one["network_id"] for one in protocols["shared"]["instances"]] == ["good"]
    assert [one["userid"] for one in users] == ["@good__x:localhost"] and [one["alias"] for one in locations] == ["#good__x:localhost"]
    slowest = max(seconds for each in found.values() for seconds, _ in each)
    say(f"the longest wait for a message {longest:.2f} s, for a query {slowest:.1f} s; {grown >> 20} MiB more")
    wrong, log = {}, running.log.read_text()
    for name, (_, why) in ROGUES.items():
        status = why if isinstance(why, int) else 500 if why else 200
        query = (408, "M_UNKNOWN") if status >= 500 else (404, "M_NOT_FOUND")
        ping = (502, "M_BAD_STATUS" if why == status else "M_CONNECTION_FAILED")
        expected = [query, query, {"": ["duration_ms"], IN_TIME: (504, "M_CONNECTION_TIMEOUT")}.get(why, ping)]
        seen = [list(one) if isinstance(one, dict) else one for _, one in found[name]]
        words = f"application service {name}: transaction [0-9]+ .* did not go through: .*{why or '.'}"
        if seen != expected or bool(re.search(words, log)) != bool(why):
            wrong[name] = seen, re.findall(f"application service {name}\\b.*", log)[:3]
        assert not any(b"\ncookie:" in head.lower() for head in services[name].told)
    assert not wrong
    assert not [path for path, _, _ in services["good"].bodies if "/stolen" in path]
    assert {token for _, token, _ in services["good"].bodies} == {"Bearer hs-good"}
    assert sum(seconds for seconds, _ in said) < 10 and grown < 60 << 20
    assert slowest < 10                                      # three attempts of a second, and the pauses between them
    code, seconds = running.end()
    assert code == 0 and seconds < 5


def test_whatever_a_service_answers_the_examiner_comes_to_an_end(services):
    """Each check has an outcome, within a time that its calls bound."""
    def examine(name):
        read = asbridge.read_registration(claims(services[name].url, name), "here")
        began = time.monotonic()
        results = asbridge.Examiner(read, asbridge.Settings(query_timeout_ms=300), queries=True).results()
        return time.monotonic() - began, results
    with ThreadPoolExecutor(8) as pool:
        for name, (seconds, results) in zip(ROGUES, pool.map(examine, ROGUES), strict=True):
            assert len(results) == len(asbridge.Examiner.CHECKS), name
            assert "failed" in {one.outcome for one in results} <= {"passed", "failed", "skipped"} and seconds < 15, (name, seconds)
            assert not any(text in one.seen for one in results for text in ("\x1b", "\r", "\n", f"hs-{name}"))

class Caller(Friend):
    """One that does one thing at a time, and calls the homeserver while it is asked: `query(client, kind, id)`, as its own user."""

    def __init__(self, id, query):
        self.id, self.query, self.turn, self.hs = id, query, threading.Lock(), ""
        super().__init__()

    def respond(self, request):
        with self.turn:
            kind, id = map(urllib.parse.unquote, request.path.split("/")[-2:])
            if kind in ("users", "rooms"):
                found = self.query(asbridge.Client(self.hs, f"as-{self.id}"), kind, id)
                return asbridge.Response(200 if found else 404, b"{}" if found else b'{"errcode": "M_NOT_FOUND"}')
            return super().respond(request)


@pytest.fixture
def callers(program):
    """Starts services that call back, and the homeserver that asks them."""
    made = []

    def make(**queries):
        made.extend(Caller(id, query) for id, query in queries.items())
        registrations = [claims(one.url, one.id) for one in made]
        running = program({"registrations": registrations, "query_timeout_ms": 500, "retry_first_ms": 5}, "--role", "homeserver")
        for one in made:
            one.hs = running.url
        return running, *made
    yield make
    for one in made:
        one.stop()


def test_a_service_may_do_anything_at_the_homeserver_while_it_is_asked(callers):
    """It makes what it is asked for, speaks, and looks for others of its own, about whom it is not asked again."""
    def query(bot, kind, id):
        name = asbridge.localpart_of(id)
        if kind == "users":
            bot.call("POST", V3 + "/register", {"type": "m.login.application_service", "username": name})
            bot.call("PUT", f"{V3}/profile/{urllib.parse.quote(id)}/displayname", {"displayname": "made"}, user_id=id)
        else:
            room = bot.create_room(room_alias_name=name, preset="public_chat")
            bot.say(room, "welcome")
        for what in (lambda: bot.profile(f"@one__not_{name}:localhost"), lambda: bot.resolve(f"#one__not_{name}:localhost")):
            assert outcome(what)[1] == (404, "M_NOT_FOUND")
        return True
    running, one = callers(one=query)
    people = [person(running.url, f"p{n}") for n in range(5)]
    began = time.monotonic()
    answers = at_once(*[lambda n=n, who=who: who.profile(f"@one__{n}:localhost") for n, who in enumerate(people)],
                      *[lambda n=n, who=who: who.join(f"#one__{n}:localhost") for n, who in enumerate(people)])
    assert answers[:5] == [{"displayname": "made"}] * 5 and len(set(answers[5:])) == 5 and time.monotonic() - began < 8
    for room, who in zip(answers[5:], people, strict=True):
        assert len(messages(who, room)) == 1
        who.say(room, f"thanks, {who.user_id}")
    eventually(lambda: all(f"thanks, {who.user_id}" in "".join(body for _, _, body in one.bodies) for who in people))


def test_services_that_ask_about_each_other_while_they_are_asked_wait_no_longer_than_their_time(callers, say):
    """Each does one thing at a time, so that none of them can answer; nobody else waits for them."""
    def asks_for(other):
        def query(bot, kind, id):
            look = bot.profile if kind == "users" else bot.resolve
            return isinstance(outcome(look, f"{id[0]}{other}__{asbridge.localpart_of(id)}:localhost")[1], str)
        return query
    running, one, two, good = callers(one=asks_for("two"), two=asks_for("one"), good=lambda bot, kind, id: False)
    people = [person(running.url, f"p{n}") for n in range(10)]
    carol = person(running.url, "carol")
    room = carol.create_room()
    with ThreadPoolExecutor(1) as pool:
        names = [f"{('one', 'two')[n % 2]}__{n}:localhost" for n in range(len(people))]
        asking = pool.submit(at_once, *[lambda n=n, who=who: outcome(who.profile, f"@{names[n]}") for n, who in enumerate(people)],
                             *[lambda n=n, who=who: outcome(who.join, f"#{names[n]}") for n, who in enumerate(people)])
        for n in range(20):
            assert outcome(carol.say, room, f"n{n}")[0] < 2
        assert outcome(carol.profile, "@good__x:localhost")[1] == (404, "M_NOT_FOUND")
        eventually(lambda: '"n19"' in "".join(body for _, _, body in good.bodies), 5)
        answers = asking.result(60)                          # (seconds, what came)
    say(f"the longest wait {max(seconds for seconds, _ in answers):.1f} s")
    assert {found for _, found in answers} <= {(408, "M_UNKNOWN"), (404, "M_NOT_FOUND")}
    assert max(seconds for seconds, _ in answers) < 10       # three attempts of half a second, and the pauses between them
    one.query = two.query = lambda bot, kind, id: False
    for other in ("one", "two"):
        assert outcome(carol.profile, f"@{other}__later:localhost")[1] in {(404, "M_NOT_FOUND"), (408, "M_UNKNOWN")}
    assert running.end()[0] == 0


def test_a_homeserver_that_stops_waits_for_no_service_that_it_asks(program):
    never = Rogue(says())
    try:
        running = program({"registrations": [claims(never.url, "never")]}, "--role", "homeserver")
        alice, bot = person(running.url), asbridge.Client(running.url, "as-never")
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(*what) for what in (
                (alice.profile, "@never__x:localhost"), (alice.resolve, "#never__x:localhost"),
                (alice.ask, "GET", "thirdparty", "protocols"), (alice.ask, "GET", "thirdparty", "user", "shared"),
                (bot.call, "POST", "/_matrix/client/v1/appservice/never/ping", {}))]
            eventually(lambda: len({head.split(b"?")[0] for head in never.told}) == 5)
            code, seconds = running.end()
            assert code == 0 and seconds < 3
            for one in asked:
                assert one.exception(5) is None or isinstance(one.exception(), (asbridge.MatrixError, asbridge.Unreachable))
    finally:
        never.stop()


# ============================================================================
# IRC clients that misbehave
# ============================================================================

HOSTILE = 200


@pytest.fixture
def irc():
    """Makes connections to an IRC server; they end with the test."""
    with contextlib.ExitStack() as made:
        def make(port, nick=None):
            sock = made.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            if nick:
                sock.sendall(f"NICK {nick}\r\nUSER {nick} 0 * :{nick}\r\n".encode())
            return sock
        yield make


def until(sock, pattern, seconds=10.0):
    """What comes, up to a line that matches."""
    data, deadline = b"", time.monotonic() + seconds
    while not re.search(pattern, data):
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        more = sock.recv(65_536)
        assert more, data[-300:]
        data += more
    return data


#: Each a way to be a nuisance: what one connection sends, without ever reading.
NUISANCES = [
    lambda n: b"\0" * 100_000,                                                               # a line without an end, and no nick
    lambda n: b"NICK n%d\r\n" % n * 2000,                                                    # never registers
    lambda n: b"NICK a%d\r\nUSER a 0 * :a\r\n" % n + b"PING :%s\r\n" % (b"x" * 490) * 2000,
    lambda n: b"NICK b%d\r\nUSER b 0 * :b\r\n" % n + b"LIST\r\nWHO #busy\r\nNAMES #busy\r\n" * 1000,
    lambda n: b"NICK c%d\r\nUSER c 0 * :c\r\n" % n + b"".join(b"JOIN #j%d-%d\r\n" % (n % 3, m) for m in range(2000)),
    lambda n: b"NICK d%d\r\nUSER d 0 * :d\r\nJOIN #busy\r\n" % n + b"".join(b"NICK d%dx%d\r\n" % (n, m) for m in range(2000)),
    lambda n: b"NICK e%d\r\nUSER e 0 * :e\r\nJOIN #busy\r\n" % n + b"PRIVMSG #busy :%s\r\n" % (b"y" * 450) * 2000,
    lambda n: b"NICK f%d\r\nUSER f 0 * :f\r\nJOIN #busy\r\n" % n + b"JOIN 0\r\nJOIN #busy\r\nMODE #busy +o f\r\n" * 700,
    lambda n: bytes(range(256)) * 400,
    lambda n: b"\r\n" * 50_000,
]


@linux
def test_two_hundred_hostile_irc_clients_cost_little_memory_and_do_not_keep_the_others_from_talking(program, irc, say):
    running = program({"registrations": [SAMPLE], "database": ":memory:"})
    assert running.ready
    port = int(eventually(lambda: re.search(r"irssi -c 127.0.0.1 -p (\d+)", running.log.read_text()))[1])
    alice, bob = person(running.url), irc(port, "bob")
    until(bob, b" 376 ")
    bob.sendall(b"JOIN #calm\r\n")
    until(bob, b" 366 ")
    room = alice.join("#_irc_calm:localhost")
    before, hostile = running.resident(), []
    for n in range(HOSTILE):
        sock = irc(port)
        sock.setblocking(False)
        hostile.append((sock, memoryview(NUISANCES[n % len(NUISANCES)](n))))
    deadline, waits, most = time.monotonic() + 10, [], 0
    while time.monotonic() < deadline:
        for at, (sock, data) in enumerate(hostile):          # as much as it takes, again and again, and read nothing
            with contextlib.suppress(OSError):
                hostile[at] = sock, data[sock.send(data):] if data else data
        began = time.monotonic()
        bob.sendall(b"PING :still\r\n")
        until(bob, b"PONG irc.asbridge :still")
        waits.append(time.monotonic() - began)
        most = max(most, running.resident())
    began = time.monotonic()
    alice.say(room, "can you hear me")
    until(bob, b"PRIVMSG #calm :can you hear me", 30)
    say(f"\n{HOSTILE} hostile IRC clients: {(most - before) / 2**20:.0f} MB more; a PING is answered in "
        f"{sorted(waits)[len(waits) // 2] * 1000:.0f} ms, at worst {max(waits) * 1000:.0f} ms; "
        f"Matrix to IRC in {(time.monotonic() - began) * 1000:.0f} ms")
    assert most - before < HOSTILE * asbridge.SEND_BYTES + 100 * 2**20 and max(waits) < 5
    for sock, _ in hostile:
        sock.close()
    bob.sendall(b"PING :after\r\n")
    until(bob, b"PONG irc.asbridge :after", 30)


def test_of_ten_thousand_joins_fifty_are_taken_and_each_other_is_refused(irc, monkeypatch):
    monkeypatch.setattr(asbridge, "LINES_PER_SECOND", 100_000)
    with asbridge.Homeserver([SAMPLE]) as hs:
        bob = irc(hs.samples[0].irc_port, "bob")
        names = [f"#j{n}" for n in range(10_000)]
        for at in range(0, len(names), 50):
            bob.sendall(f"JOIN {','.join(names[at:at + 50])}\r\n".encode())
            until(bob, b" (366|405) bob #j%d[ :]" % (at + 49))
        bridge = hs.samples[0]
        assert len(bridge.channels) == len(bridge.people["bob"].channels) == asbridge.MAX_CHANNELS
        eventually(lambda: not bridge.sql("SELECT * FROM irc_spool"))
        assert len(hs.appservice("irc").joined_rooms()) == asbridge.MAX_CHANNELS


def test_no_random_lines_make_the_irc_server_fail(irc, monkeypatch, caplog, rng):
    monkeypatch.setattr(asbridge, "LINES_PER_SECOND", 100_000)
    words = ["#a", "#A", "#b,#a", "bob", "EVE", "eve,bob,#a", "alice", "*", "0", ":", ",", "-1", "+b", "#" + "x" * 70,
             "\x01ACTION x\x01", "\0", "\xff", "\u2028", ":a b c", " ", "x" * 600]
    commands = [*sorted(set(asbridge.COMMANDS) - {"QUIT"}), "X", "privmsg"]
    with asbridge.Homeserver([SAMPLE]) as hs:
        bridge, alice = hs.samples[0], hs.client("alice")
        bob, eve = irc(bridge.irc_port, "bob"), irc(bridge.irc_port, "eve")
        eve.sendall(b"JOIN #a\r\n")
        alice.join("#_irc_a:localhost")
        for _ in range(150):
            lines = [" ".join([rng.choice(commands), *rng.choices(words, k=rng.randrange(5))]) for _ in range(20)]
            with contextlib.suppress(OSError):
                encoding = "latin-1" if rng.random() < 0.1 else "utf-8"
                bob.sendall("\r\n".join([*lines, "PING :round", ""]).encode(encoding, "replace"))
                data = until(bob, b"PONG irc.asbridge :round")
                assert all(len(line) <= asbridge.LINE_BYTES and line[:1] in (b":", b"P", b"E", b"") for line in data.split(b"\r\n"))
            eve.sendall(b"PING :eve\r\n")
            until(eve, b"PONG irc.asbridge :eve")
        eventually(lambda: not bridge.sql("SELECT * FROM irc_spool"), 60)
        hs.settle(60)
        assert not [record.getMessage() for record in caplog.records if record.exc_info]


# ============================================================================
# Secrets
# ============================================================================

def secret(name):
    return f"SECRET-{name}-{secrets.token_hex(6)}"


class Looker:
    """Asks a homeserver, and keeps every word that it says."""

    def __init__(self, url):
        self.url, self.said = url, []

    def ask(self, method, path, token=None, body=None, **headers):
        client = asbridge.HttpClient(self.url)
        with contextlib.closing(client):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            headers |= {"Authorization": f"Bearer {token}"} if token else {}
            status, answer = client.request(method, path, data, headers, limit=10**7)
        self.said.append((f"{method} {path[:80]} {status}", answer.decode()))
        with contextlib.suppress(ValueError):
            return json.loads(answer)

    def told(self, *args):
        """The same, for an answer that is a secret by its purpose."""
        answer = self.ask(*args)
        self.said.pop()
        return answer

    def raw(self, head):
        host, port = urllib.parse.urlsplit(self.url).netloc.split(":")
        with socket.create_connection((host, int(port)), 10) as sock, contextlib.suppress(OSError):
            sock.sendall(head.encode() + b"\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65_536):
                self.said.append((head[:60], data.decode("latin-1")))


def leaks(kept, said):
    return sorted({(name, where, text[max(0, text.index(form) - 80):][:160]) for where, text in said for name, value in kept.items()
                   for form in {value, urllib.parse.quote(value, safe="")} if form in text})


ECHOES = {
    "page":            lambda told: (404, f"<html>{told}</html>"),
    "error":           lambda told: (500, json.dumps({"errcode": "M_UNKNOWN", "error": told})),
    "refusal":         lambda told: (403, told),
    "acknowledgement": lambda told: (200, told),
    "object":          lambda told: (200, json.dumps([{"userid": told}])),
    "none":            lambda told: (200, "{}")}


def wrong_in_every_way(look, kept):
    """Log-ins, confirmations and bodies that are wrong, with what a careless client may write in them."""
    bad, token = kept["guess"], kept["session"]
    for value in (bad, [bad], {"a": bad}, None):
        auth = {"type": "m.login.password", "password": value, "identifier": {"type": "m.id.user", "user": "alice"}}
        look.ask("POST", V3 + "/login", None, auth)
        look.ask("POST", V3 + "/register", None, {"username": "Bad Name", "password": value})
        look.ask("POST", V3 + "/login", None, {"type": "m.login.token", "token": value, "password": value})
        for path in ("/account/password", "/account/deactivate", "/delete_devices", "/keys/device_signing/upload"):
            look.ask("POST", V3 + path, token, {"new_password": kept["new"], "devices": ["x"], "auth": auth})
        look.ask("POST", V3 + "/account/password", token, {"new_password": value})
    for raw in (f'{{"password": "{bad}"', f'"{bad}"', f'[{{"password": "{bad}"}}]', f"password={bad}", f"{{'password': '{bad}'}}",
                f'{{"password": {bad}}}'):
        for path in ("/login", "/register", "/account/password", "/delete_devices", "/keys/upload"):
            look.ask("POST", V3 + path, token, raw.encode())


def tokens_in_every_url(look, kept):
    """On every row of the table, for the right and for wrong methods, where a token belongs and where it does not."""
    ends = re.compile("/deactivate$|/logout|/sync$|/events$|exchanges$")
    rows = [route for route in asbridge.ROUTES + asbridge.ADMIN_ROUTES if not ends.search(route.path)]
    paths = [(route.method, re.sub(r"{\w+}", "x", route.path)) for route in rows]
    for method, path in paths:
        body = None if method == "GET" else {}
        for name in ("guess", "hs_token", "as_token", "other session", "admin_token"):
            look.ask(method, f"{path}?access_token={kept[name]}", None, body)
        for between in ("&access_token=", "%3Faccess_token=", "%26access_token%3D", "/?access_token%3D", ";access_token="):
            look.ask(method, path + between + kept["session"], None, body)
        look.ask("PATCH", f"{path}?access_token={kept['session']}", None, {})
    for name in ("session", "as_token", "hs_token", "admin_token"):
        token = kept[name]
        for header in (token, f"Basic {token}", f"Bearer: {token}", f"Bearer {token} x"):
            look.ask("GET", V3 + "/account/whoami", Authorization=header)
        look.ask("GET", f"{V3}/account/whoami?access_token={kept['guess']}", token)
        for head in (f"GET {V3}/sync?access_token={token} x HTTP/1.1", f"GET {V3}/sync?access_token={token} HTTP/9.1",
                     f"GET /x HTTP/1.1\r\nAuthorization : Bearer {token}", f"GET {V3}/sync?access_token={token} HTTP/1.1",
                     f"GET /x HTTP/1.1\r\nHost: x\r\n Authorization: Bearer {token}"):
            look.raw(head)


def a_service_that_repeats_everything(hs, look, kept, service):
    """It is pushed to, asked, and pinged, and answers with whatever it was told."""
    def told(request):
        target = f"{request.path}?{urllib.parse.urlencode(request.query)}"
        return f"{request.method} {target} {dict(request.headers)} {request.query} {kept['as_token']}"
    alice = asbridge.Client(hs.url, kept["session"])
    room = alice.create_room()
    for name, echo in ECHOES.items():
        def answer(request, echo=echo):
            request.body(10**7)
            status, body = echo(told(request))
            return asbridge.Response(status, body.encode())
        service.app = answer
        alice.say(room, name)
        with contextlib.suppress(asbridge.MatrixError):
            alice.invite(room, f"@_irc_{name}:localhost")
        for path in ("thirdparty/protocol/irc", "thirdparty/user/irc?x=y", "thirdparty/location?alias=%23x:localhost",
                     f"directory/room/%23_irc_{name}:localhost", f"profile/@_irc_q{name}:localhost"):
            look.ask("GET", f"{V3}/{path}", kept["session"])
        look.ask("POST", "/_matrix/client/v1/appservice/irc/ping", kept["as_token"], {"transaction_id": "x"})
        look.ask("GET", f"{V3}/account/whoami?user_id=@nobody:localhost&access_token={kept['as_token']}")
        try:
            hs.settle(0.2)
        except AssertionError as error:
            look.said.append(("settle", str(error)))
        hs.retry("irc")
    hs.settle()
    return alice, room


def all_that_the_inspector_shows(look, kept, event_id):
    def show(path, method="GET", body=None):
        return look.ask(method, f"/_asbridge/{path}", kept["admin_token"], body)
    since = 0
    while (news := show(f"exchanges?since={since}"))["exchanges"]:
        since = news["next"]
        for one in news["exchanges"]:
            show(f"exchange?n={one['n']}")
    why = f"why?appservice=irc&event={urllib.parse.quote(event_id)}"
    for path in ("status", why, "explain?id=@_irc_bob:localhost", "transactions?appservice=irc", "rooms", "people"):
        show(path)
    show("examine", "POST", {"appservice": "irc"})
    look.ask("GET", f"/?access_token={kept['admin_token']}")


def test_nothing_that_a_homeserver_says_logs_shows_or_stores_has_a_secret_in_it(tmp_path):
    kept = {name: secret(name.replace(" ", "-")) for name in ("password", "new", "guess", "as_token", "hs_token", "admin_token")}
    service = asbridge.HttpServer(("127.0.0.1", 0), lambda request: asbridge.Response(200, b"{}"))
    service.start()
    log, handlers = io.StringIO(), []
    for formatter in (asbridge.Lines(True), asbridge.JsonLines()):
        handlers.append(logging.StreamHandler(log))
        handlers[-1].setFormatter(formatter)
        asbridge.log.addHandler(handlers[-1])
    levels = asbridge.log.level, asbridge.trace.level
    asbridge.log.setLevel(logging.DEBUG), asbridge.trace.setLevel(logging.DEBUG)
    tokens = {key: kept[key] for key in ("as_token", "hs_token")}
    bridge = {**SAMPLE, **tokens, "url": f"http://127.0.0.1:{service.port}", "receive_ephemeral": True}
    bridge.pop("asbridge.sample")
    try:
        with asbridge.Homeserver([bridge], database=str(tmp_path / "hs.db"), admin_token=kept["admin_token"]) as hs:
            look = Looker(hs.url)
            account = {"username": "alice", "password": kept["password"], "auth": {"type": "m.login.dummy"}}
            kept["session"] = look.told("POST", V3 + "/register", None, account)["access_token"]
            login = {"type": "m.login.password", "user": "alice", "password": kept["password"]}
            kept["other session"] = look.told("POST", V3 + "/login", None, login)["access_token"]
            ghost = {"type": "m.login.application_service", "username": "_irc_bob"}
            kept["session of a ghost"] = look.told("POST", V3 + "/register", kept["as_token"], ghost)["access_token"]
            kept["openid"] = look.told("POST", V3 + "/user/@alice:localhost/openid/request_token", kept["session"], {})["access_token"]
            look.ask("GET", f"/_matrix/federation/v1/openid/userinfo?access_token={kept['openid']}")
            wrong_in_every_way(look, kept)
            tokens_in_every_url(look, kept)
            alice, room = a_service_that_repeats_everything(hs, look, kept, service)
            all_that_the_inspector_shows(look, kept, alice.messages(room)["chunk"][0]["event_id"])
            shown = repr([hs.config, hs.world.registrations.by_id, hs.delivery.worker("irc").attempts,
                          hs.delivery.wire.since(0, 0), alice])
            files = [(path.name, path.read_bytes().decode("latin-1")) for path in tmp_path.iterdir()]
        files += [(path.name, path.read_bytes().decode("latin-1")) for path in tmp_path.iterdir()]
    finally:
        asbridge.log.setLevel(levels[0]), asbridge.trace.setLevel(levels[1])
        for handler in handlers:
            asbridge.log.removeHandler(handler)
        service.stop()
    said = [*look.said, *(("log", line) for line in log.getvalue().splitlines()), ("repr", shown), *files]
    assert len(look.said) > 2000 and len(said) > 6000 and {name for name, _ in files} >= {"hs.db", "hs.db-wal"}
    assert leaks(kept, said) == []
    assert leaks({**kept, "x": "M_UNKNOWN_TOKEN"}, look.said)        # it would find them


def test_nothing_that_the_program_prints_has_a_secret_in_it_but_what_generate_is_for(program, tmp_path):
    kept = {name: secret(name) for name in ("as_token", "hs_token", "admin_token", "password")}
    good = {**SAMPLE, "as_token": kept["as_token"], "hs_token": kept["hs_token"]}
    config = {"registrations": [good], "admin_token": kept["admin_token"]}
    bad = {**config, "registrations": [{**good, "namespaces": {"users": [{"regex": "@_irc_.*("}]}}]}
    worse = {**config, "admin_token": [kept["admin_token"]], "prot": 1}
    running = program(config, "--trace", "-v")
    alice = person(running.url)
    alice.join("#_irc_lobby:localhost")
    for wrong in (kept["hs_token"], kept["admin_token"], kept["password"]):
        with contextlib.suppress(asbridge.MatrixError):
            asbridge.Client(running.url, wrong).whoami()
        with contextlib.suppress(http.client.HTTPException, OSError):
            asbridge.HttpClient(running.url).request("GET", f"{V3}/sync?access_token={wrong}")
    said = [("ready", running.ready)]
    running.end()
    for name, data in (("good", config), ("bad", bad), ("worse", worse)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        where = ["--config", str(tmp_path / f"{name}.json")]
        for command in (["check"], ["check", "--json"], ["check", "--examine", "--port", "0"], ["explain", "@_irc_bob:localhost"],
                        ["explain", "--json", "#_irc_x:localhost"]):
            done = subprocess.run([sys.executable, PROGRAM, *command, *where], cwd=tmp_path, capture_output=True, text=True, timeout=60)
            said.append((f"{command} {name}", done.stdout + done.stderr))
    said.append(("log", running.log.read_text()))
    said += [(path.name, path.read_bytes().decode("latin-1")) for path in tmp_path.iterdir() if ".db" in path.name]
    assert "PUT transactions/" in running.log.read_text() and sum(bool(text) for _, text in said) >= 18
    assert leaks({**kept, "session": alice.token}, said) == []
    made = subprocess.run([sys.executable, PROGRAM, "generate", "x"], capture_output=True, text=True, timeout=60)
    assert len(json.loads(made.stdout)["as_token"]) == 64 and not made.stderr


# ============================================================================
# Many at once
# ============================================================================

THREADS = 50


def at_once(*fns):
    """Calls all of these at the same moment, each on a thread of its own; what each returned, or (status, errcode)."""
    gate = threading.Barrier(len(fns))

    def run(fn):
        gate.wait(20)
        return outcome(fn)[1]
    with ThreadPoolExecutor(len(fns)) as pool:
        return list(pool.map(run, fns))


def many(fn):
    """fn(0), fn(1) … at once."""
    return at_once(*[lambda n=n: fn(n) for n in range(THREADS)])


def one_wins(answers, loser):
    """All but one were answered with this error; the answer of the one."""
    won = [one for one in answers if one != loser]
    assert len(won) == 1 and not isinstance(won[0], tuple), won
    return won[0]


@pytest.fixture
def server(program, recorder, tmp_path):
    """A homeserver with a service that hears every room."""
    config = {"registrations": [registration(recorder.url)], "database": str(tmp_path / "a.db"), "retry_first_ms": 5}
    running = program(config, "--role", "homeserver")
    assert running.ready
    return running


def again(client, **acting):
    """The same user with connections of its own."""
    made = asbridge.Client(client.url, client.token, client.acts_as)
    made.call = lambda *args, **keys: asbridge.Client.call(made, *args, **{**acting, **keys})
    return made


def members(client, room, user_id):
    """The memberships that this user has had there, in order."""
    return [one["content"]["membership"] for one in history(client, room) if one.get("state_key") == user_id]


def history(client, room):
    return client.ask("GET", "rooms", room, "messages", dir="f", limit=1000)["chunk"]


def messages(client, room):
    return [one["event_id"] for one in history(client, room) if one["type"] == "m.room.message"]


def pushed_ids(recorder):
    return [event["event_id"] for _, body in dict(recorder.taken).items() for event in json.loads(body)["events"]]


def test_of_many_who_register_one_name_one_gets_it(server):
    form, some = {"username": "carol", "auth": {"type": "m.login.dummy"}}, range(5)              # scrypt takes its time
    forms = [form | ({"password": f"secret {n}"} if n in some else {}) for n in range(THREADS)]
    answers = many(lambda n: asbridge.Client(server.url).call("POST", V3 + "/register", forms[n]))
    won = one_wins(answers, (400, "M_USER_IN_USE"))
    assert asbridge.Client(server.url, won["access_token"]).whoami()["device_id"] == won["device_id"]
    proof = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "carol"}}
    logins = [outcome(asbridge.Client(server.url).call, "POST", V3 + "/login", {**proof, "password": f"secret {n}"})[1] for n in some]
    assert [isinstance(one, dict) for one in logins] == [one is won for one in answers[:len(some)]]
    ghost = {"type": "m.login.application_service", "username": "_as_x"}
    one_wins(many(lambda n: asbridge.Client(server.url, "as-as").call("POST", V3 + "/register", ghost)), (400, "M_USER_IN_USE"))


def test_of_many_who_want_one_alias_one_gets_it_and_nothing_is_left_of_the_others(server):
    alice = person(server.url)
    rooms = [alice.create_room() for _ in range(THREADS)]
    where = f"{V3}/directory/room/{urllib.parse.quote('#tea:localhost')}"
    answers = many(lambda n: again(alice).call("PUT", where, {"room_id": rooms[n]}))
    one_wins(answers, (409, "M_UNKNOWN"))
    winner = rooms[next(n for n, one in enumerate(answers) if one == {})]
    assert alice.resolve("#tea:localhost") == winner
    one_wins(many(lambda n: again(alice).ask("DELETE", "directory", "room", "#tea:localhost")), (404, "M_NOT_FOUND"))
    made = one_wins(many(lambda n: again(alice).ask("POST", "createRoom", body={"room_alias_name": "coffee"})), (400, "M_ROOM_IN_USE"))
    assert alice.resolve("#coffee:localhost") == made["room_id"] and sorted(alice.joined_rooms()) == sorted([*rooms, made["room_id"]])


def test_one_who_joins_and_leaves_many_times_at_once_does_so_once(server, recorder):
    alice, bob = person(server.url), person(server.url, "bob")
    room = alice.create_room(preset="public_chat")
    assert many(lambda n: again(bob).join(room)) == [room] * THREADS
    assert members(alice, room, bob.user_id) == ["join"]
    assert set(map(str, many(lambda n: again(bob).ask("POST", "rooms", room, "leave", body={})))) <= {"{}", "(403, 'M_FORBIDDEN')"}
    assert members(alice, room, bob.user_id) == ["join", "leave"]
    for verb, then, late in (("invite", "invite", None), ("kick", "leave", "M_FORBIDDEN"), ("ban", "ban", None),
                             ("unban", "leave", "M_BAD_STATE")):
        answers = many(lambda n, verb=verb: again(alice).ask("POST", "rooms", room, verb, body={"user_id": bob.user_id}))
        assert {} in answers and {str(one) for one in answers} <= {"{}", f"(403, '{late}')"}, (verb, answers)
        assert members(alice, room, bob.user_id)[-1] == then
    seen = members(alice, room, bob.user_id)
    assert seen == ["join", "leave", "invite", "leave", "ban", "leave"]
    last = alice.say(room, "x")
    ids = eventually(lambda: (found := pushed_ids(recorder)) and last in found and found)
    assert ids == [one["event_id"] for one in history(alice, room)]


def test_many_who_join_at_once_are_all_there_once(server):
    alice = person(server.url)
    room = alice.create_room(preset="public_chat")
    people = [person(server.url, f"p{n}") for n in range(THREADS)]
    since = alice.sync()["next_batch"]
    assert many(lambda n: people[n].join(room)) == [room] * THREADS
    assert len(alice.ask("GET", "rooms", room, "joined_members")["joined"]) == THREADS + 1
    entry = alice.sync(since)["rooms"]["join"][room]
    assert entry["summary"]["m.joined_member_count"] == THREADS + 1
    assert all(members(alice, room, one.user_id) == ["join"] for one in people)
    half = THREADS // 2
    answers = at_once(*[lambda one=one: one.leave(room) for one in people[:half]],
                      *[lambda one=one: one.say(room, "here") for one in people[half:]])
    assert answers[:half] == [None] * half and sorted(answers[half:]) == sorted(messages(alice, room))
    assert len(alice.ask("GET", "rooms", room, "joined_members")["joined"]) == THREADS - half + 1


def test_what_comes_many_times_with_one_transaction_id_happens_once(server, recorder):
    alice = person(server.url)
    room = alice.create_room()
    sent = many(lambda n: again(alice).say(room, f"n{n}", txn_id="t"))
    assert set(sent) == set(messages(alice, room)) and len(set(sent)) == 1
    assert len(set(many(lambda n: again(alice).ask("PUT", "rooms", room, "redact", sent[0], "t", body={})["event_id"]))) == 1
    bot = asbridge.Client(server.url, "as-as")
    other = bot.create_room()
    assert len(set(many(lambda n: again(bot).say(other, f"n{n}", txn_id="t")))) == 1
    bob = person(server.url, "bob")
    device = bob.whoami()["device_id"]
    bodies = [{"messages": {bob.user_id: {device: {"n": n}}}} for n in range(THREADS)]
    assert many(lambda n: again(alice).ask("PUT", "sendToDevice", "x", "t", body=bodies[n])) == [{}] * THREADS
    assert len(bob.sync()["to_device"]["events"]) == 1
    ids = eventually(lambda: [one for one in pushed_ids(recorder) if one == sent[0]])
    assert len(ids) == 1


def test_each_key_goes_to_one_and_when_there_are_none_left_the_fallback_key_to_all(server):
    alice, bob = person(server.url), person(server.url, "bob")
    device = alice.whoami()["device_id"]
    keys = {f"signed_curve25519:k{n}": {"key": f"{n}"} for n in range(THREADS // 2)}
    last = {"signed_curve25519:last": {"key": "last", "fallback": True}}
    alice.ask("POST", "keys", "upload", body={"one_time_keys": keys, "fallback_keys": last})
    wanted = {"one_time_keys": {alice.user_id: {device: "signed_curve25519"}}}
    answers = many(lambda n: again(bob).ask("POST", "keys", "claim", body=wanted))
    claimed = [id for one in answers for id in one["one_time_keys"][alice.user_id][device]]
    assert sorted(claimed) == sorted([*keys, *[*last] * (THREADS - len(keys))])


def test_state_that_many_set_at_once_is_what_the_last_of_them_set(server):
    alice = person(server.url)
    room = alice.create_room()
    levels = alice.state(room, "m.room.power_levels")
    answers = many(lambda n: again(alice).set_state(room, "m.room.power_levels", {**levels, "events_default": n + 1}))
    assert len(set(answers)) == THREADS
    timeline = [one for one in history(alice, room) if one["type"] == "m.room.power_levels"]
    assert {one["event_id"] for one in timeline[1:]} == set(answers)
    assert alice.state(room, "m.room.power_levels")["events_default"] == timeline[-1]["content"]["events_default"]
    for before, after in itertools.pairwise(timeline):
        assert after["unsigned"]["prev_content"] == before["content"]


def test_what_two_change_at_once_is_judged_in_the_order_in_which_it_stands(server):
    """One takes the power from another who uses it at the same moment: who comes second could not any more."""
    alice, bob = person(server.url), person(server.url, "bob")
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    levels = alice.state(room, "m.room.power_levels")
    for n in range(10):
        alice.set_state(room, "m.room.power_levels", {**levels, "users": {alice.user_id: 100, bob.user_id: 99}})
        answers = at_once(lambda: again(alice).set_state(room, "m.room.power_levels", levels),
                          lambda n=n: again(bob).set_state(room, "m.room.name", {"name": f"bob was here {n}"}))
        assert answers[1] == (403, "M_FORBIDDEN") or isinstance(answers[1], str)
        order = [one["event_id"] for one in history(alice, room)][-2:]
        assert order == answers[::-1] if isinstance(answers[1], str) else order[1] == answers[0]


def test_a_session_that_ends_while_it_is_used_does_nothing_afterwards(server):
    """What was answered before is there, and nothing else; by logging out, and by deactivation."""
    admin = person(server.url)
    room = admin.create_room(preset="public_chat")
    proof = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "carl"}, "password": "secret"}
    for name, end in (("bob", lambda one: one.call("POST", V3 + "/logout", {})),
                      ("carl", lambda one: one.call("POST", V3 + "/account/deactivate", {"auth": proof}))):
        user = asbridge.Client(server.url)
        form = {"username": name, "password": "secret", "auth": {"type": "m.login.dummy"}}
        user.token = user.call("POST", V3 + "/register", form)["access_token"]
        user.join(room)
        before = set(messages(admin, room))
        answers = at_once(*[lambda user=user: again(user).say(room, "still here")] * THREADS,
                          *[lambda user=user, end=end: end(again(user))] * 3)
        said = [one for one in answers[:THREADS] if isinstance(one, str)]
        assert {one for one in answers[:THREADS] if isinstance(one, tuple)} <= {(401, "M_UNKNOWN_TOKEN"), (403, "M_FORBIDDEN")}
        assert set(messages(admin, room)) - before == set(said), name
        assert outcome(again(user).whoami)[1] == (401, "M_UNKNOWN_TOKEN"), answers[THREADS:]
        assert outcome(again(user).say, room, "again")[1] == (401, "M_UNKNOWN_TOKEN")
        assert set(messages(admin, room)) - before == set(said)


def test_small_things_that_many_change_at_once_are_all_kept(server):
    alice = person(server.url)
    me, device = alice.user_id, alice.whoami()["device_id"]
    filters = many(lambda n: again(alice).ask("POST", "user", me, "filter", body={"room": {"timeline": {"limit": n + 1}}})["filter_id"])
    assert [alice.ask("GET", "user", me, "filter", one)["room"]["timeline"]["limit"] for one in filters] == list(range(1, THREADS + 1))
    bodies = [{"pattern": f"p{n}", "actions": ["notify"]} for n in range(THREADS)]
    rules = many(lambda n: again(alice).ask("PUT", "pushrules", "global", "content", f"r{n}", body=bodies[n]))
    told = alice.ask("GET", "pushrules")["global"]["content"]
    assert rules == [{}] * THREADS and {one["rule_id"] for one in told} >= {f"r{n}" for n in range(THREADS)}
    assert many(lambda n: again(alice).ask("PUT", "user", me, "account_data", f"org.example.{n}", body={"n": n})) == [{}] * THREADS
    assert all(alice.account_data(f"org.example.{n}") == {"n": n} for n in range(THREADS))
    assert many(lambda n: again(alice).ask("PUT", "devices", device, body={"display_name": f"n{n}"})) == [{}] * THREADS
    mxc = alice.call("POST", "/_matrix/media/v1/create", {})["content_uri"]
    where = "/_matrix/media/v3/upload/" + mxc.removeprefix("mxc://")
    answers = many(lambda n: again(alice).call("PUT", where, {"n": n}))
    one_wins(answers, (409, "M_CANNOT_OVERWRITE_MEDIA"))
    kept = alice.call("GET", "/_matrix/client/v1/media/download/" + mxc.removeprefix("mxc://"))
    assert answers[kept["n"]] == {}


def test_a_backup_that_many_write_at_once_has_the_keys_of_all_of_them(server):
    alice = person(server.url)
    backup = {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": {}}
    versions = many(lambda n: again(alice).ask("POST", "room_keys", "version", body=backup)["version"])
    assert len(set(versions)) == THREADS
    current = alice.ask("GET", "room_keys", "version")["version"]
    assert current in versions and int(current) == max(map(int, versions))
    key = {"first_message_index": 1, "forwarded_count": 0, "is_verified": False, "session_data": {}}
    where = f"{V3}/room_keys/keys/{urllib.parse.quote('!r:localhost')}"
    answers = many(lambda n: again(alice).call("PUT", f"{where}/s{n}", key, version=current))
    assert max(one["count"] for one in answers) == THREADS and len({one["etag"] for one in answers}) == THREADS
    now = alice.ask("GET", "room_keys", "version")
    assert now["count"] == THREADS and now["etag"] in {one["etag"] for one in answers}
    old = str(min(map(int, versions)))
    assert set(many(lambda n: again(alice).call("PUT", f"{where}/s{n}", key, version=old))) == {(403, "M_WRONG_ROOM_KEYS_VERSION")}
    answers = many(lambda n: again(alice).call("PUT", f"{where}/same", {**key, "first_message_index": n}, version=current))
    assert alice.call("GET", f"{where}/same", version=current)["first_message_index"] == 0      # the best of them


def test_a_password_that_many_change_at_once_is_one_of_theirs(server):
    form = {"username": "dora", "password": "first", "auth": {"type": "m.login.dummy"}}
    dora = asbridge.Client(server.url)
    dora.token = dora.call("POST", V3 + "/register", form)["access_token"]
    proof = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "dora"}, "password": "first"}
    change = {"logout_devices": False, "auth": proof}
    some = range(8)                                          # scrypt takes its time
    bodies = [{**change, "new_password": f"new {n}"} for n in some]
    answers = at_once(*[lambda n=n: again(dora).call("POST", V3 + "/account/password", bodies[n]) for n in some])
    assert {} in answers and all(one == {} or one[0] == 401 for one in answers)
    logins = [outcome(asbridge.Client(server.url).call, "POST", V3 + "/login", {**proof, "password": f"new {n}"})[1] for n in some]
    assert answers[some[[isinstance(one, dict) for one in logins].index(True)]] == {}
    one_wins(logins, (403, "M_FORBIDDEN"))


# ============================================================================
# Faults of the machine
# ============================================================================

class Clocked:
    """asbridge in a process whose clock can be set: what time.time() says, but not what time.monotonic() does."""

    SCRIPT = """
import runpy, sys, time
real, real_ns, where = time.time, time.time_ns, sys.argv.pop(1)
def offset():
    with open(where) as file:
        return int(file.read() or 0)
time.time, time.time_ns = lambda: real() + offset(), lambda: real_ns() + offset() * 10**9
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

    def __init__(self, folder):
        self.offset, self.script = folder / "offset", folder / "clocked.py"
        self.script.write_text(self.SCRIPT)
        self.set(0)

    def set(self, seconds):
        self.offset.with_suffix(".new").write_text(str(seconds))
        self.offset.with_suffix(".new").replace(self.offset)


def values_of(value, key):
    """All that stands under this key, however deep."""
    if isinstance(value, dict):
        found = [value[key]] if key in value else []
        return found + [one for inner in value.values() for one in values_of(inner, key)]
    return [one for inner in value for one in values_of(inner, key)] if isinstance(value, list) else []


def nobody_types(client):
    return not any(values_of(client.sync(), "user_ids"))


def test_a_clock_that_jumps_moves_no_order_no_deadline_and_no_token(recorder, tmp_path, say):
    """Back an hour, on a year, back more than a year, and each time once more with a restart between."""
    clock, processes, last = Clocked(tmp_path), [], 0
    config = {"registrations": [{**registration(recorder.url), "receive_ephemeral": True}], "retry_first_ms": 20, "retry_max_ms": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def start():
        command = [sys.executable, str(clock.script), str(clock.offset), PROGRAM, "--port", "0", "--config", "config.json", "-q"]
        processes.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1].stdout.readline().split(" ")[3].strip()

    def stop():
        processes[-1].terminate()
        assert processes[-1].wait(10) == 0 and "Traceback" not in processes[-1].stderr.read()
    try:
        url = start()
        alice, bob, said, since = person(url), person(url, "bob"), [], None
        room = alice.create_room(preset="public_chat")
        bob.join(room)
        for step, jump in enumerate([0, -3600, 365 * 86_400, -400 * 86_400, 0] * 2):
            recorder.answer, began = iter([503, 503, 503] + [200] * 10_000).__next__, time.monotonic()
            said.append(alice.say(room, f"{step} before"))   # the retries, and typing, go across the jump
            alice.typing(room, timeout=300)
            clock.set(jump)
            if step >= 5:
                stop()
                url = start()
                alice, bob = asbridge.Client(url, alice.token), asbridge.Client(url, bob.token)
            path = f"{V3}/rooms/{urllib.parse.quote(room)}/send/m.room.message/{step}"
            ids = [alice.call("PUT", path, {"msgtype": "m.text", "body": f"{step}"})["event_id"] for _ in range(2)]
            assert ids[0] == ids[1]
            said += ids[:1]
            alice.receipt(room, ids[0])
            seen = bob.sync(since)
            assert asbridge.tick_of(ids[0]) > last and int(seen["next_batch"]) >= asbridge.tick_of(ids[0])
            last, since = int(seen["next_batch"]), seen["next_batch"]
            eventually(functools.partial(nobody_types, bob), 5)
            eventually(lambda: not waiting(tmp_path / "asbridge.db"), 5)
            assert time.monotonic() < began + 7
            stamp = alice.event(room, ids[0])["origin_server_ts"] / 1000
            assert abs(stamp - (time.time() + jump)) < 60
            for answer in (seen, alice.messages(room), bob.sync()):
                ages = [age for key in ("age", "last_active_ago") for age in values_of(answer, key)]
                assert ages and all(age >= 0 for age in ages)
            media = alice.call("POST", "/_matrix/media/v1/create")
            assert abs(media["unused_expires_at"] / 1000 - (time.time() + jump + 86_400)) < 60
        found = [event for event in alice.messages(room, limit=100)["chunk"] if event["type"] == "m.room.message"]
        assert [event["event_id"] for event in reversed(found)] == said
        assert [id for id in pushed(recorder.pushes) if id in said] == said              # and the transactions' IDs rose
        assert all(age >= 0 for _, body in recorder.pushes for age in values_of(json.loads(body), "age"))
        stop()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.skipif(os.name != "posix", reason="handles are passed on")
@pytest.mark.parametrize("shut, told", [("1", ""), ("2", "asbridge ready at "), ("012", "")])
def test_it_runs_where_stdin_stdout_or_stderr_is_closed_and_opens_nothing_in_their_place(tmp_path, shut, told):
    close = "import os, sys\nfor n in map(int, sys.argv[1]): os.close(n)\nos.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    command = [sys.executable, "-c", close, shut, PROGRAM, "--role", "homeserver", "--port", "0", "--port-file", "port"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = eventually(lambda: (tmp_path / "port").exists() and (tmp_path / "port").read_text()).strip()
            assert person(f"http://127.0.0.1:{port}").create_room()
            if sys.platform == "linux":
                assert [os.readlink(f"/proc/{process.pid}/fd/{n}") for n in shut] == ["/dev/null"] * len(shut)
        finally:
            process.terminate()
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0 and out.startswith(told) and "Traceback" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_where_the_ready_line_cannot_be_written_it_ends_and_where_the_log_cannot_it_goes_on(tmp_path, full):
    with open("/dev/full", "w") as device:
        files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: device}
        command = [sys.executable, PROGRAM, "--role", "homeserver", "--port", "0", "-v"]
        with subprocess.Popen(command, cwd=tmp_path, text=True, **files) as process:
            try:
                if full == "stdout":
                    assert "what is printed can't be written: No space left" in process.communicate(timeout=10)[1]
                else:
                    assert person(process.stdout.readline().split(" ")[3].strip()).create_room()
            finally:
                process.terminate()
            assert process.wait(10) == (full == "stdout") or process.returncode == 120     # Python's own, where nothing can be flushed


@pytest.mark.skipif(os.name != "posix", reason="what others start has another environment")
@pytest.mark.parametrize("environment", [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"TMPDIR": "/nowhere"}, {"HOME": ""}])
def test_it_starts_in_a_bare_environment(tmp_path, environment):
    command = [sys.executable, PROGRAM, "--role", "homeserver", "--port", "0", "--database", "\u00fc.db", "-v"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            alice = person(process.stdout.readline().decode().split(" ")[3].strip())
            assert alice.say(alice.create_room(name="\u65e5"), "\u672c")
        finally:
            process.terminate()
        _, err = process.communicate(timeout=10)
        assert process.returncode == 0 and b"Traceback" not in err and (tmp_path / "\u00fc.db").exists()


def seconds_of(pid):
    """What a process has worked."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@linux
def test_without_a_handle_left_it_turns_in_no_circle_and_serves_some_and_with_handles_again_all(program, recorder, tmp_path, say):
    sample = {**asbridge.SAMPLE_REGISTRATION, "url": "http://127.0.0.1:0", "asbridge.sample": {"irc_port": 0}}
    running = program({"registrations": [registration(recorder.url), sample], "retry_first_ms": 20, "retry_max_ms": 100})
    alice = person(running.url)
    room = alice.create_room()
    irc = int(re.search(r"127\.0\.0\.1 (\d+)", eventually(lambda: re.search(r"nc 127.*", running.log.read_text()))[0])[1])
    bob = Irc(irc, "bob", "#lobby")
    pid, handles = running.process.pid, len(os.listdir(f"/proc/{running.process.pid}/fd"))
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port, pause=0.02) for n in range(2)]
    eventually(lambda: all(sender.answered for sender in senders))
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (handles + 12, hard))
    with contextlib.ExitStack() as open_ones:
        before, began = seconds_of(pid), time.monotonic()
        for number in [running.port] * 60 + [irc] * 30:
            open_ones.enter_context(socket.create_connection(("127.0.0.1", number), 10))
        many = sum(len(sender.answered) for sender in senders)
        eventually(lambda: sum(len(sender.answered) for sender in senders) > many + 30, 30)         # some are let in between
        time.sleep(max(0.0, began + 3 - time.monotonic()))
        worked = (seconds_of(pid) - before) / (time.monotonic() - began)
        bob.send("PING here")
        bob.wait("PONG .*here")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    many = [len(sender.answered) for sender in senders]
    eventually(lambda: all(len(sender.answered) > before + 20 for sender, before in zip(senders, many, strict=True)), 20)
    for sender in senders:
        sender.stop()
    Irc(irc, "carol", "#lobby").send("PRIVMSG #lobby :hello")
    bob.wait("PRIVMSG #lobby :hello")
    answered = {id for sender in senders for id in sender.answered}
    eventually(lambda: answered <= set(pushed(recorder.pushes)), 20)
    log = running.log.read_text()
    assert 1 <= log.count("no more connections can be taken") <= 3 and log.count("no more IRC clients can be taken") <= 2
    refused = sum(len(sender.refused) for sender in senders)
    say(f"{len(answered)} sends, {worked:.0%} of a processor, {refused} refused, {len(log.splitlines())} lines")
    assert worked < 0.7 and len(log.splitlines()) < 300
    assert running.end()[0] == 0


@linux
def test_a_process_that_was_stopped_for_a_while_goes_on_and_has_lost_nothing(program, recorder, tmp_path):
    running = program({"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20, "push_timeout_ms": 1000})
    alice = person(running.url)
    room = alice.create_room()
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port) for n in range(3)]
    eventually(lambda: all(len(sender.answered) > 20 for sender in senders))
    with socket.create_connection(("127.0.0.1", running.port), 30) as half:
        half.sendall(b"GET /_matrix/client/versions HTTP/1.1\r\n")
        time.sleep(0.3)                                      # it has been read
        os.kill(running.process.pid, signal.SIGSTOP)
        time.sleep(11)                                       # longer than a head may take
        half.sendall(b"Host: x\r\n")
        os.kill(running.process.pid, signal.SIGCONT)
        assert half.recv(100).startswith(b"HTTP/1.1 408 ")
    many = [len(sender.answered) for sender in senders]
    eventually(lambda: all(len(sender.answered) > before + 20 for sender, before in zip(senders, many, strict=True)))
    for sender in senders:
        sender.stop()
    assert {status for sender in senders for status, _ in sender.refused} <= {408}      # it was stopped inside a request
    eventually(lambda: not waiting(tmp_path / "asbridge.db"))
    check_all(tmp_path / "asbridge.db", senders, recorder)
    assert running.end()[0] == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_storm_of_signals_reloads_a_few_times_with_one_thread_and_a_second_sigterm_ends_it_at_once(program, recorder):
    running = program({"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20})
    alice = person(running.url)
    room, threads = alice.create_room(), 0
    for n in range(300):
        running.process.send_signal(signal.SIGHUP)
        if hasattr(signal, "SIGPIPE"):
            running.process.send_signal(signal.SIGPIPE)
        if n % 50 == 0:
            alice.say(room, f"{n}")
            with contextlib.suppress(OSError):
                threads = max(threads, len(os.listdir(f"/proc/{running.process.pid}/task")))
    eventually(lambda: "read again" in running.log.read_text())
    assert threads < 30 and running.process.poll() is None
    recorder.answer = lambda: time.sleep(3) or 200
    pushes = len(recorder.pushes)
    alice.say(room, "hold it up")
    eventually(lambda: len(recorder.pushes) > pushes)
    running.process.terminate()
    time.sleep(0.3)
    running.process.terminate()
    assert running.process.wait(0.5) == 1


def test_where_its_folder_vanishes_nothing_more_is_taken_and_it_ends_as_it_should(program, recorder, tmp_path):
    (tmp_path / "there").mkdir()
    running = program({"registrations": [registration(recorder.url)]}, "--database", str(tmp_path / "there" / "a.db"))
    alice = person(running.url)
    room = alice.create_room()
    shutil.rmtree(tmp_path / "there")
    for _ in range(3):
        with pytest.raises(asbridge.MatrixError) as refused:
            alice.say(room, "into nothing")
        assert refused.value.status == 500
    assert "was deleted, moved or replaced" in running.log.read_text()
    assert running.end()[0] == 0
