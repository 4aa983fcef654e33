"""What the README promises of strangers, as tests that take too long for the quick ones.

    python -m pytest -q .ci/test_hostile.py

What is random follows a seed, as in test_durability.py.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_durability import V3, asbridge, eventually, linux, person, program, recorder, registration, rng, say  # noqa: F401

import asbridge

# ============================================================================
# HTTP: a hundred thousand requests that should not be
# ============================================================================


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


def random_regex(rng, atoms, depth):  # noqa: F811
    kind = rng.random() if depth else 0
    if kind < 0.3:
        return rng.choice(atoms)
    if kind < 0.55:
        return "".join([random_regex(rng, atoms, depth - 1) for _ in range(rng.randint(1, 4))])
    if kind < 0.75:
        return "(?:" + "|".join([random_regex(rng, atoms, depth - 1) for _ in range(rng.randint(2, 3))]) + ")"
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,3}", "{0,30}", "{3,}", "*?", "+?", "??"])
    return f"(?:{random_regex(rng, atoms, depth - 1)}){repeat}"


def random_text(rng, alphabet):  # noqa: F811
    """A short text again and again, and an end at which most matches fail."""
    pumped = "".join([rng.choice(alphabet) for _ in range(rng.randint(1, 4))])
    return ("".join(rng.choices("ab1_", k=rng.randint(0, 2))) + pumped * 32)[:32] + "!"


def test_no_random_regex_takes_more_steps_than_it_is_thought_to(rng, say):  # noqa: F811
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
IN_TIME, BROKE_OFF, NO_HTTP, CLOSED = "did not answer in time", "in the middle of its answer", "not HTTP/1.1", "closed the connection without an answer"
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
    "not_modified": (says(b"HTTP/1.1 304 X\r\n\r\n"), 304), "unauthorized": (says(plain(401)), 401), "forbidden": (says(plain(403)), 403),
    "unknown": (says(plain(404, b"nothing \x1b[2J here")), 404), "fails": (says(plain(500, b'{"errcode": "M_X", "error": {"a": [1]}}')), 500),
    "unavailable": (says(plain(503, b"x" * 60_000)), 503), "status_999": (says(plain(999)), 999),
    "promises": (says(OK + b"Content-Length: 2147483648\r\n\r\nxx"), IN_TIME), "too_long": (says(plain(200, length=3)), IN_TIME),
    "silent": (says(), IN_TIME), "trickle": (trickles(), IN_TIME), "trickled_body": (trickles(OK + b"Content-Length: 5000\r\n\r\n"), IN_TIME),
    "trickled_headers": (trickles(OK, b"X: y\r\n"), IN_TIME), "closes": (says(then=False), CLOSED),
    "half": (says(plain(200, b"half", length=100), then=False), BROKE_OFF), "half_chunk": (says(CHUNKED + b"9\r\nhalf", then=False), BROKE_OFF),
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
        found = {"protocol": {"instances": [{"network_id": "good"}]}, "user": [{"userid": "@good__x:localhost", "protocol": "shared", "fields": {}}],
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
    running = program({"registrations": [claims(one.url, name) for name, one in services.items()], "push_timeout_ms": 1000, "query_timeout_ms": 1000,
                       "retry_max_ms": 2000, "port": 0, "database": str(tmp_path / "a.db")}, "--role", "homeserver")
    alice = person(running.url)
    room = alice.create_room()
    before = running.resident()
    with ThreadPoolExecutor(len(names) * 3 + 3) as pool:
        asked = {}
        for name in names:
            bot = asbridge.Client(running.url, f"as-{name}")
            asked[name] = [pool.submit(outcome, alice.profile, f"@{name}__x:localhost"), pool.submit(outcome, alice.resolve, f"#{name}__x:localhost"),
                           pool.submit(outcome, bot.call, "POST", f"/_matrix/client/v1/appservice/{name}/ping", {})]
        shared = [pool.submit(outcome, alice.ask, "GET", "thirdparty", *what) for what in (["protocols"], ["user", "shared"], ["location", "shared"])]
        said = [outcome(alice.say, room, f"n{n}") for n in range(20)]
        eventually(lambda: all(f'"n{n}"' in "".join(body for _, _, body in services["good"].bodies) for n in range(20)), 5)
        longest = max(seconds for seconds, _ in said)
        protocols, users, locations = [future.result(20)[1] for future in shared]
        found = {name: [future.result(30) for future in futures] for name, futures in asked.items()}
    grown = running.resident() - before
    assert [one["network_id"] for one in protocols["shared"]["instances"]] == ["good"]
    assert [one["userid"] for one in users] == ["@good__x:localhost"] and [one["alias"] for one in locations] == ["#good__x:localhost"]
    say(f"the longest wait for a message {longest:.2f} s, for a query {max(one[0] for each in found.values() for one in each):.1f} s; {grown >> 20} MiB more")
    wrong, log = {}, running.log.read_text()
    for name, (_, why) in ROGUES.items():
        status = why if isinstance(why, int) else 0
        failed = isinstance(why, str) and why or status >= 500
        query = (408, "M_UNKNOWN") if failed else (404, "M_NOT_FOUND")
        ping = {"": "duration_ms", IN_TIME: (504, "M_CONNECTION_TIMEOUT")}.get(why, (502, "M_BAD_STATUS" if status else "M_CONNECTION_FAILED"))
        expected = [query, query, ping]
        seen = [list(one)[0] if isinstance(one, dict) else one for _, one in found[name]]
        words = f"application service {name}: transaction [0-9]+ .* did not go through: .*{why or '.'}"
        if seen != expected or bool(re.search(words, log)) != bool(why):
            wrong[name] = seen, re.findall(f"application service {name}\\b.*", log)[:3]
        assert not any(b"\ncookie:" in head.lower() for head in services[name].told)
    assert not wrong
    assert "/stolen" not in {path for path, _, _ in services["good"].bodies} and {token for _, token, _ in services["good"].bodies} == {"Bearer hs-good"}
    assert sum(seconds for seconds, _ in said) < 10 and grown < 60 << 20
    assert all(seconds < 8 for each in found.values() for seconds, _ in each)
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
        for name, (seconds, results) in zip(ROGUES, pool.map(examine, ROGUES)):
            assert len(results) == len(asbridge.Examiner.CHECKS) and {one.outcome for one in results} <= {"passed", "failed", "skipped"}, name
            assert any(one.outcome == "failed" for one in results) and seconds < 15, (name, seconds)
            assert not any(char in one.seen for one in results for char in "\x1b\r\n") and not any(f"hs-{name}" in one.seen for one in results)


# ============================================================================
# IRC clients that misbehave
# ============================================================================


# ============================================================================
# Many at once
# ============================================================================


# ============================================================================
# Faults of the machine
# ============================================================================
