"""What the README promises of kill -9, of full and locked disks, and of long queues, as tests that really do it.

    python -m pytest -q .ci/test_durability.py

They take some minutes, so they stand apart from the quick ones. What is random follows a seed, which is printed when a
test fails; DURABILITY_SEED=… repeats it, as far as threads and processes can be repeated. Nothing is left behind.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import random
import re
import resource
import secrets
import shutil
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

import asbridge  # noqa: E402

PROGRAM = os.path.join(HERE, "asbridge.py")
V3 = "/_matrix/client/v3"
# A server ends when the process that started it does, even if that was killed.
BOUND = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
ROOT = hasattr(os, "getuid") and os.getuid() == 0
linux = pytest.mark.skipif(sys.platform != "linux", reason="this is looked up in /proc")


# ============================================================================
# Helpers
# ============================================================================

def registration(url=None, id="as"):
    """An application service that hears every room."""
    namespaces = {"users": [{"regex": f"@_{id}_.*", "exclusive": True}], "aliases": [], "rooms": [{"regex": "!.*", "exclusive": False}]}
    return {"id": id, "url": url, "as_token": f"as-{id}", "hs_token": f"hs-{id}", "sender_localpart": f"_{id}_bot",
            "rate_limited": False, "namespaces": namespaces}


def eventually(test, seconds=10.0):
    """The first true value of test(); it is asked again and again until the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := test()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {test}"
        time.sleep(0.005)
    return value


@pytest.fixture
def rng():
    seed = int(os.environ.get("DURABILITY_SEED") or secrets.randbelow(1_000_000))
    print(f"DURABILITY_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def say(capsys):
    """Prints a figure, also when the test passes."""
    def line(text):
        with capsys.disabled():
            print(f"\n    {text}", end=" ", flush=True)
    return line


class Program:
    """asbridge.py as a program: its process, and the URL that it announces. What it logs is in the file `log`."""

    def __init__(self, folder, config=None, *flags, port="0", before=()):
        command = [*BOUND, *before, sys.executable, PROGRAM, "--port", port, *flags]
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
            command += ["--config", str(folder / "config.json")]
        self.log = folder / "log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
        self._ready = None

    @property
    def ready(self):
        """The line that it prints; '' if it ended before."""
        if self._ready is None:
            self._ready = self.process.stdout.readline()
        return self._ready

    @property
    def url(self):
        assert self.ready, self.log.read_text()[-3000:]
        return self.ready.split(" ")[3].strip()

    @property
    def port(self):
        return urllib.parse.urlsplit(self.url).port

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self, seconds=10.0):
        """The exit code after SIGTERM, and how long it took."""
        began = time.monotonic()
        self.process.terminate()
        return self.process.wait(seconds), time.monotonic() - began

    def resident(self):
        """Bytes of memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


@pytest.fixture
def program(tmp_path):
    """Starts programs in the test's folder; they end with the test, and none of them may have shown a traceback."""
    made = []

    def make(config=None, *flags, **keys):
        made.append(Program(tmp_path, config, *flags, **keys))
        return made[-1]
    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()
    log = (tmp_path / "log").read_text() if made else ""
    assert "Traceback" not in log, log[max(0, log.index("Traceback") - 500):][:4000]


class Recorder:
    """An application service that keeps what it is sent. `answer` may be replaced: () -> status."""

    def __init__(self):
        self.pushes = []                                     # (txn_id, body), in the order of their coming
        self.taken = []                                      # those that were answered 200
        self.answer = lambda: 200
        self.server = asbridge.HttpServer(("127.0.0.1", 0), self._serve)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def _serve(self, request):
        body = request.body(50_000_000)
        if "/transactions/" not in request.path:
            return asbridge.Response(200, b"{}")
        push = int(request.path.rsplit("/", 1)[1]), body
        self.pushes.append(push)
        if (status := self.answer()) == 200:
            self.taken.append(push)
        return asbridge.Response(status, b"{}")


@pytest.fixture
def recorder():
    made = Recorder()
    yield made
    made.server.stop()


def pushed(pushes):
    """The IDs of the events of these transactions. One that comes again is the last one, with the same bytes."""
    bodies, last = {}, 0
    for txn_id, body in pushes:
        assert txn_id >= last, f"{txn_id} came after {last}"
        assert bodies.setdefault(txn_id, body) == body, f"{txn_id} came again with other bytes"
        last = txn_id
    return [event["event_id"] for body in bodies.values() for event in json.loads(body)["events"]]


def person(url, name="alice"):
    client = asbridge.Client(url)
    client.token = client.call("POST", V3 + "/register", {"username": name, "auth": {"type": "m.login.dummy"}})["access_token"]
    return client


class Sender(threading.Thread):
    """Sends numbers into a room as fast as it can, over a kept connection: messages, and every seventh as state. One that was
    not answered with 200 is sent again, the same. `where()`: the port of the server, or 0 while it is down.
    """

    def __init__(self, name, token, room_id, where, padding=0, states=True, pause=0.0):
        super().__init__(daemon=True)
        self.name, self.where, self.padding, self.states, self.pause = name, where, padding, states, pause
        self.stopping = False
        self.room = f"{V3}/rooms/{urllib.parse.quote(room_id)}"
        self.headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.answered = []                                   # event IDs; the n-th belongs to the number n
        self.refused = []                                    # (status, body) of the others
        self.seconds = []                                    # how long each answer took
        self.start()

    def run(self):
        connection = None
        while not self.stopping:
            if connection is not None and connection.port != self.where():
                connection.close()
            port, number = self.where(), len(self.answered)
            if connection is None or connection.port != port:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            path = f"/send/m.room.message/{self.name}-{number}"
            if self.states and number % 7 == 6:
                path = f"/state/org.example.number/{self.name}"
            content = {"msgtype": "m.text", "body": f"{self.name} {number}", "padding": "x" * self.padding}
            began = time.monotonic()
            try:
                connection.request("PUT", self.room + path, json.dumps(content), self.headers)
                answer = connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, http.client.HTTPException):
                connection.close()
                connection = None
                time.sleep(0.005)
                continue
            self.seconds.append(time.monotonic() - began)
            if answer.status == 200:
                self.answered.append(body["event_id"])
            else:
                self.refused.append((answer.status, body))
                time.sleep(0.005)
            if self.pause:
                time.sleep(self.pause)
        if connection is not None:
            connection.close()

    def stop(self):
        self.stopping = True
        self.join(40)
        assert not self.is_alive()


class Irc:
    """A raw IRC client. OSError when the connection is gone."""

    def __init__(self, port, nick, channel):
        self.socket, self.lines, self.buffer = socket.create_connection(("127.0.0.1", port), 10), [], b""
        self.send(f"NICK {nick}", f"USER {nick} 0 * :{nick}")
        self.wait(" 376 ")
        self.send(f"JOIN {channel}")
        self.wait(f" 366 {nick} {channel} ")

    def __del__(self):
        if hasattr(self, "socket"):
            self.socket.close()

    def send(self, *lines):
        self.socket.sendall("".join(line + "\r\n" for line in lines).encode())

    def wait(self, pattern):
        """The next line that matches; it and those before it are used up."""
        while True:
            for at, line in enumerate(self.lines):
                if re.search(pattern, line):
                    del self.lines[:at + 1]
                    return line
            self.receive()

    def receive(self):
        if not (data := self.socket.recv(65_536)):
            raise ConnectionError("closed")
        *whole, self.buffer = (self.buffer + data).split(b"\r\n")
        self.lines += [line.decode() for line in whole]


def irc_port(running):
    return int(re.search(r"IRC on port (\d+)", running.ready)[1])


@contextlib.contextmanager
def looking(path):
    """A connection that only reads, to a database which may be in use."""
    with contextlib.closing(sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True, isolation_level=None)) as db:
        yield db


@contextlib.contextmanager
def copied(database):
    """A connection to a copy of the files as they lie there: what a killed process has left is not touched."""
    folder = database.parent / "copy"
    folder.mkdir()
    for end in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{database}{end}", folder / f"{database.name}{end}")
    with contextlib.closing(sqlite3.connect(folder / database.name, isolation_level=None)) as db:
        yield db
    shutil.rmtree(folder)


HALF = {
    "a tick that was drawn again": "SELECT tick FROM events WHERE tick > (SELECT value FROM meta WHERE key = 'position')",
    "state that is not the last event of its kind":
        "SELECT room, type, state_key, max(tick) AS last FROM events WHERE state_key IS NOT NULL GROUP BY room, type, state_key "
        "HAVING last IS NOT (SELECT s.tick FROM state s WHERE s.room = events.room AND s.type = events.type "
        "AND s.state_key = events.state_key)",
    "state without an event": "SELECT tick FROM state EXCEPT SELECT tick FROM events",
    "a membership that is not the state's":
        "SELECT room, user_id, tick FROM memberships EXCEPT SELECT room, state_key, tick FROM state WHERE type = 'm.room.member'",
    "a member without membership":
        "SELECT room, state_key, tick FROM state WHERE type = 'm.room.member' EXCEPT SELECT room, user_id, tick FROM memberships",
    "a client's transaction with two events":
        "SELECT sender, device_id, room, type, txn_id FROM events WHERE txn_id IS NOT NULL "
        "GROUP BY sender, device_id, room, type, txn_id HAVING count(*) > 1",
    "a room without m.room.create": "SELECT n FROM rooms EXCEPT SELECT room FROM state WHERE type = 'm.room.create'",
    "a room without power levels": "SELECT n FROM rooms EXCEPT SELECT room FROM state WHERE type = 'm.room.power_levels'",
    "an event that nobody will push":       # pruning begins when a thousand are kept, and takes whole transactions
        "SELECT tick FROM events WHERE tick > (SELECT CASE WHEN count(*) < 1000 THEN 0 ELSE min(last_tick) END FROM transactions) "
        "EXCEPT SELECT tick FROM outbox",
    "something to push that is no event": "SELECT tick FROM outbox EXCEPT SELECT tick FROM events",
    "a transaction that has not the events of its ticks":
        "SELECT txn_id, events FROM (SELECT *, lag(last_tick) OVER (ORDER BY txn_id) AS before FROM transactions) t "
        "WHERE before IS NOT NULL AND events <> (SELECT count(*) FROM outbox o WHERE o.appservice = t.appservice "
        "AND tick > before AND tick <= last_tick)",
    "two open transactions": "SELECT count(*) FROM transactions WHERE acknowledged_ts IS NULL HAVING count(*) > 1",
    "an open transaction that is not the last":
        "SELECT txn_id FROM transactions WHERE acknowledged_ts IS NULL AND txn_id < (SELECT max(txn_id) FROM transactions)",
}


def check_whole(db):
    """Nothing in a homeserver's database is half: what belongs together is there together. One AS, which hears all rooms."""
    found = {what: rows for what, sql in HALF.items() if (rows := db.execute(f"{sql} LIMIT 5").fetchall())}
    assert not found
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def events_in(db, after=0):
    """{event ID: body}, in the order of the room."""
    return dict(db.execute("SELECT json_extract(json, '$.event_id'), json_extract(json, '$.content.body') FROM events "
                           "WHERE tick > ? ORDER BY tick", (after,)))


def waiting(database):
    """How many events have not been acknowledged."""
    with looking(database) as db:
        return db.execute("SELECT count(*) FROM outbox WHERE tick > (SELECT coalesce(max(last_tick), 0) FROM transactions "
                          "WHERE acknowledged_ts IS NOT NULL)").fetchone()[0]


def check_all(database, senders, recorder):
    """What was answered is there, once, in the order of its sending; what is there was pushed, once, in its order, until it was
    taken.
    """
    with looking(database) as db:
        check_whole(db)
        events = events_in(db)
    for sender in senders:
        numbers = [body for body in events.values() if body and body.startswith(sender.name + " ")]
        assert numbers[:len(sender.answered)] == [f"{sender.name} {n}" for n in range(len(sender.answered))]
        assert len(numbers) <= len(sender.answered) + 1                # the last may not have been answered
        assert [events.get(id) for id in sender.answered] == numbers[:len(sender.answered)]
    assert pushed(recorder.pushes) == pushed(recorder.taken) == list(events)


# ============================================================================
# The homeserver is killed
# ============================================================================

def test_a_homeserver_that_is_killed_fifty_times_keeps_what_it_answered_and_pushes_it_once(program, recorder, rng, tmp_path, say):
    config = {"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20}
    database, port, began = tmp_path / "asbridge.db", 0, time.monotonic()
    recorder.answer = lambda: rng.choices((200, 503), (9, 1))[0] if rng.random() < 0.8 else time.sleep(rng.random() * 0.03) or 200
    running = program(config)
    alice = person(running.url)
    room, port = alice.create_room(), running.port
    senders = [Sender(f"s{n}", alice.token, room, lambda: port) for n in range(4)]
    seen, lost = 0, []
    for kill in range(50):
        if kill % 5:
            port = running.port                              # when it is ready
        time.sleep(rng.uniform(0.0, 0.4))                    # every fifth time while it starts
        running.kill()
        port = 0
        answered = [id for sender in senders for id in list(sender.answered)]
        with copied(database) as db:
            check_whole(db)
            kept = events_in(db)
        lost = [id for id in answered if id not in kept]
        assert not lost and len(kept) >= seen, f"kill {kill}: {lost[:5]} of {len(answered)}"
        seen = len(kept)
        running = program(config)
    port = running.port
    many = [len(sender.answered) for sender in senders]
    eventually(lambda: all(len(sender.answered) > before for sender, before in zip(senders, many, strict=True)))
    for sender in senders:
        sender.stop()
    eventually(lambda: not waiting(database), 30)
    assert not [refusal for sender in senders for refusal in sender.refused]
    check_all(database, senders, recorder)
    assert running.end()[0] == 0
    pushes, transactions = len(recorder.pushes), len(dict(recorder.pushes))
    say(f"50 kills, {sum(len(s.answered) for s in senders)} sends, {transactions} transactions in {pushes} attempts, "
        f"{time.monotonic() - began:.0f} s")


# ============================================================================
# The IRC bridge is killed
# ============================================================================

class Gate:
    """Stands before the bridge, which has another port each time that it starts. Lets transactions pass while it is open."""

    def __init__(self):
        self.port, self.open = 0, False
        self.server = asbridge.HttpServer(("127.0.0.1", 0), self._serve)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def _serve(self, request):
        body = request.body(50_000_000)
        if not self.port or ("/transactions/" in request.path and not self.open):
            return asbridge.Response(503, b"{}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(request.method, request.path, body, {"Authorization": request.headers["authorization"]})
            answer = connection.getresponse()
            return asbridge.Response(answer.status, answer.read())
        except (OSError, http.client.HTTPException):
            return asbridge.Response(502, b"{}")
        finally:
            connection.close()


class Speaker(threading.Thread):
    """A person on IRC who speaks numbers, and is sure of each when a PONG has followed it. Lives as long as the bridge."""

    def __init__(self, name, port, number):
        super().__init__(daemon=True)
        self.name, self.port, self.number = name, port, number         # the next number
        self.sure, self.heard = [], []                       # lines
        self.there, self.quiet = threading.Event(), False
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            irc = Irc(self.port, self.name, "#lobby")
            self.there.set()
            while not self.quiet:
                line, self.number = f"{self.name} {self.number}", self.number + 1
                irc.send(f"PRIVMSG #lobby :{line}", f"PING :{line}")
                self.listen(irc, f" PONG irc.asbridge :{line}")
                self.sure.append(line)
            self.listen(irc, "never")
        self.there.set()

    def listen(self, irc, end):
        while True:
            while irc.lines:
                line = irc.lines.pop(0)
                if line.endswith(end):
                    return
                if match := re.match(r":(m\d)!\S+ PRIVMSG #lobby :(\1 \d+)$", line):
                    self.heard.append(match[2])
            irc.receive()


def messages_in(database):
    """The texts of all messages, in the order of the room."""
    with looking(database) as db:
        return [text for (text,) in db.execute(
            "SELECT json_extract(json, '$.content.body') FROM events WHERE type = 'm.room.message' ORDER BY tick")]


def check_heard(lives, said):
    """Between two kills somebody on IRC has heard all that was said on Matrix, and at most one line of before again. How many
    lines came again; how many nobody on IRC has heard, for they died in a socket or nobody was there.
    """
    last, again, lost, place = -1, 0, 0, {text: at for at, text in enumerate(said)}
    for life in filter(None, lives):
        at = [place[text] for text in life]
        assert at == list(range(at[0], at[0] + len(at))), life
        assert at[0] >= last, f"more than one line again: {life[:5]} after {said[last]}"
        again, lost, last = again + (at[0] == last), lost + max(0, at[0] - last - 1), at[-1]
    assert last == len(said) - 1
    return again, lost


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.server.stop()


def test_a_bridge_that_is_killed_hands_each_line_to_matrix_once_and_repeats_at_most_one_on_irc(program, gate, rng, tmp_path, say):
    began, names, numbers = time.monotonic(), ("i0", "i1"), collections.Counter()
    sample = {**asbridge.SAMPLE_REGISTRATION, "url": gate.url, "asbridge.sample": {"irc_port": 0}}
    homeserver = program({"registrations": [sample], "retry_first_ms": 5, "retry_max_ms": 20}, "--role", "homeserver", "-q")
    flags = ["--role", "appservice", "--homeserver", homeserver.url, "-q"]
    senders, sure, heard = [], [], {name: [] for name in names}
    for kill in range(27):
        bridge = program({"registrations": [{**sample, "url": "http://127.0.0.1:0"}]}, *flags)
        if kill % 6 == 5:
            time.sleep(rng.uniform(0.0, 0.3))                # it is killed while it starts
            bridge.kill()
            continue
        gate.port = urllib.parse.urlsplit(bridge.url).port
        speakers = [Speaker(name, irc_port(bridge), numbers[name]) for name in names]
        for speaker in speakers:
            speaker.there.wait(10)
        if not senders:
            people = [person(homeserver.url, f"m{n}") for n in range(2)]
            rooms = [one.join("#_irc_lobby:localhost") for one in people]
            senders = [Sender(f"m{n}", people[n].token, rooms[n], lambda: homeserver.port, states=False, pause=0.003) for n in range(2)]
        gate.open = True
        time.sleep(rng.uniform(0.0, rng.choice((0.1, 0.7))))             # often while it catches up
        if kill < 26:
            bridge.kill()
            gate.port, gate.open = 0, False
        else:
            for one in senders:
                one.stop()
            for speaker in speakers:
                speaker.quiet = True
            eventually(lambda: not waiting(tmp_path / "asbridge.db"), 30)
            with looking(tmp_path / "asbridge-irc.db") as db:
                eventually(lambda: not db.execute("SELECT count(*) FROM irc_spool").fetchone()[0], 30)
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert bridge.end()[0] == 0
        for speaker in speakers:
            speaker.join(10)
            assert not speaker.is_alive()
            numbers[speaker.name] = speaker.number
            sure += speaker.sure
            heard[speaker.name].append(speaker.heard)
    texts = messages_in(tmp_path / "asbridge.db")
    for name in names:
        spoken = [text for text in texts if text.startswith(f"{name} ")]
        assert spoken == sorted(set(spoken), key=lambda text: int(text[3:]))             # each once, and in order
        assert [text for text in sure if text.startswith(f"{name} ") and text not in set(spoken)] == []
    said = [text for text in texts if text.startswith("m")]
    assert sorted(said) == sorted(f"{sender.name} {n}" for sender in senders for n in range(len(sender.answered)))
    counts = [check_heard(heard[name], said) for name in names]
    assert homeserver.end()[0] == 0
    say(f"26 kills, {len(sure)} lines from IRC, all on Matrix, and {sum(numbers.values()) - len(sure)} of which IRC was not sure; "
        f"{len(said)} from Matrix, (again, not heard) {counts}, {time.monotonic() - began:.0f} s")


# ============================================================================
# The order of writes: what kill -9 can't show, for the kernel keeps what was written
# ============================================================================

def traced(log):
    """[(begins at, ended at, name, arguments, result)] of a log of strace, in the order of their beginning. Threads of the
    program stop at each call until it is noted, so the order of the lines is the order in which they caused each other.
    """
    calls, open_calls = [], {}
    for at, line in enumerate(log.read_text(errors="replace").splitlines()):
        thread, _, text = line.partition(" ")
        text = text.strip()
        if match := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            if thread in open_calls:
                open_calls.pop(thread)[1:5:3] = [at, match[1].rpartition("= ")[2]]
        elif match := re.match(r"(\w+)\((.*)", text):
            unfinished = text.endswith("<unfinished ...>")
            calls.append([at, at, match[1], match[2], "" if unfinished else text.rpartition("= ")[2]])
            if unfinished:
                open_calls[thread] = calls[-1]
    return calls


def check_synced(calls, texts):
    """Each of these was written to a write-ahead log, then that was synced, and only then it went into a socket."""
    def first(text, names, where):
        return next(call for call in calls if call[2] in names and text in call[3] and where(call[3].partition(">")[0]))
    syncs = [call for call in calls if call[2] in ("fdatasync", "fsync") and "-wal>" in call[3] and call[4].startswith("0")]
    for text in texts:
        written = first(text, ("pwrite64", "write", "pwritev", "writev"), lambda file: file.endswith("-wal"))
        answered = first(text, ("sendto", "sendmsg", "write", "writev"), lambda file: "socket:" in file or "TCP" in file)
        assert any(written[1] < sync[0] and sync[1] < answered[0] for sync in syncs), f"{text} was answered before it was on the disk"
    return len(syncs)


@pytest.fixture
def strace(tmp_path):
    """What to write before a command to have its writes noted in the file `calls`."""
    command = ["strace", "-D", "-f", "-y", "-s", "5000", "-e", "trace=fdatasync,fsync,pwrite64,pwritev,write,writev,sendto,sendmsg",
               "-o", str(tmp_path / "calls")]
    if not shutil.which("strace"):
        pytest.skip("there is no strace here")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()[:200]}")
    return command


def test_an_event_is_on_the_disk_before_it_is_answered(program, recorder, strace, tmp_path, say):
    running = program({"registrations": [registration(recorder.url)]}, before=strace)
    alice = person(running.url)
    room = alice.create_room()
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port) for n in range(3)]
    eventually(lambda: sum(len(sender.answered) for sender in senders) > 250, 60)
    for sender in senders:
        sender.stop()
    assert running.end(20)[0] == 0
    answered = [id for sender in senders for id in sender.answered]
    syncs = check_synced(eventually(lambda: traced(tmp_path / "calls")), answered)
    say(f"{len(answered)} events were synced before they were answered, by {syncs} syncs")


def test_a_line_from_irc_is_on_the_disk_before_a_pong_that_follows_it(program, strace, tmp_path):
    sample = {**asbridge.SAMPLE_REGISTRATION, "url": "http://127.0.0.1:0", "asbridge.sample": {"irc_port": 0}}
    flags = ["--role", "appservice", "--homeserver", "http://127.0.0.1:1"]                # nobody is there: it waits in the spool
    running = program({"registrations": [sample]}, *flags, before=strace)
    bob = Irc(irc_port(running), "bob", "#lobby")
    lines = [f"line-{secrets.token_hex(8)}" for _ in range(20)]
    for line in lines:
        bob.send(f"PRIVMSG #lobby :{line}", f"PING {line}")
        bob.wait(f"PONG .*{line}")
    assert running.end(20)[0] == 0
    check_synced(traced(tmp_path / "calls"), lines)


# ============================================================================
# SIGTERM
# ============================================================================

def test_on_sigterm_under_load_what_was_answered_is_kept_and_pushed_once(program, recorder, rng, tmp_path, say):
    config = {"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20}
    database, port, took = tmp_path / "asbridge.db", 0, []
    recorder.answer = lambda: time.sleep(rng.random() * 0.05) or 200
    running = program(config)
    alice = person(running.url)
    room, port = alice.create_room(), running.port
    senders = [Sender(f"s{n}", alice.token, room, lambda: port) for n in range(4)]
    for _ in range(6):
        time.sleep(rng.uniform(0.1, 0.6))
        code, seconds = running.end()
        assert code == 0
        took.append(seconds)
        running = program(config)
        port = running.port
    for sender in senders:
        sender.stop()
    eventually(lambda: not waiting(database), 30)
    check_all(database, senders, recorder)
    assert not [refusal for sender in senders for refusal in sender.refused if refusal[0] != 503]
    say(f"{sum(len(s.answered) for s in senders)} sends, ended within {max(took):.2f} s")
    assert max(took) < 2


def test_on_sigterm_an_attempt_that_is_answered_soon_is_acknowledged(program, recorder, tmp_path):
    config = {"registrations": [registration(recorder.url)]}
    running = program(config)
    recorder.answer = lambda: time.sleep(0.7) or 200
    person(running.url).create_room()
    eventually(lambda: recorder.pushes)
    assert running.end()[0] == 0
    recorder.answer = lambda: 200
    assert program(config).ready
    eventually(lambda: not waiting(tmp_path / "asbridge.db"))
    assert len(dict(recorder.pushes)) == len(recorder.pushes)           # none came again


def test_on_sigterm_neither_a_service_that_hangs_nor_those_who_wait_hold_it_up(program, recorder, tmp_path, say):
    config, release = {"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20}, threading.Event()
    running = program(config)
    alice = person(running.url)
    alice.create_room()
    eventually(lambda: not waiting(tmp_path / "asbridge.db"))
    since = alice.sync()["next_batch"]
    request = f"GET {V3}/sync?timeout=60000&since={since} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}\r\n\r\n".encode()
    polls = [socket.create_connection(("127.0.0.1", running.port), 10) for _ in range(200)]
    for one in polls:
        one.sendall(request)
    recorder.answer = lambda: release.wait(20) and 200
    person(running.url, "bob").create_room()
    eventually(lambda: [push for push in recorder.pushes if b"@bob" in push[1]])
    last = recorder.pushes[-1]
    try:
        code, seconds = running.end()
        say(f"ended after {seconds:.2f} s")
        assert code == 0 and seconds < 2
    finally:
        release.set()
        recorder.answer = lambda: 200
    for one in polls:
        with one:
            answer = one.recv(65_536)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 ")), answer[:300]
    before = len(recorder.pushes)
    assert program(config).ready
    eventually(lambda: not waiting(tmp_path / "asbridge.db"))
    assert recorder.pushes[before] == last                   # the same ID and the same bytes
    pushed(recorder.pushes)


# ============================================================================
# Disks that are full, databases that are locked, files that are something else
# ============================================================================

class Disk:
    """A small file system of its own, in a mount namespace that ends with the process that holds it."""

    def __init__(self, folder, size):
        folder.mkdir()
        mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo mounted && exec cat'
        hold = [*BOUND, "unshare", *([] if ROOT else ["-r"]), "-m", "sh", "-c", mount, str(folder)]
        self.holder = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "mounted\n":
            pytest.skip(f"no file system of our own can be mounted here: {self.holder.communicate()[1].strip()[:200]}")
        self.path = pathlib.Path(f"/proc/{self.holder.pid}/root{folder}")                # the same folder, seen from outside
        self.enter = ["nsenter", "-t", str(self.holder.pid), *([] if ROOT else ["-U", "--preserve-credentials"]), "-m"]

    def fill(self, but=0):
        """Leaves so many bytes, and a few."""
        free = os.statvfs(self.path)
        with contextlib.suppress(OSError), open(self.path / "filler", "ab") as file:
            file.write(b"x" * max(0, free.f_bavail * free.f_frsize - but))

    def read_only(self):
        subprocess.run([*self.enter, "mount", "-o", "remount,ro", str(self.path).partition("/root")[2]], check=True)

    def end(self):
        self.holder.kill()
        self.holder.communicate()


@pytest.fixture
def disk(tmp_path):
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("there are no unshare and nsenter here")
    made = []

    def make(size):
        made.append(Disk(tmp_path / "disk", size))
        return made[-1]
    yield make
    for one in made:
        one.end()


def check_refusals(refusals):
    assert all(status >= 500 and body["errcode"] == "M_UNKNOWN" and body["error"] for status, body in refusals), refusals[:3]


def create_rooms(client, until):
    """Rooms, which are a dozen events each, made or refused until it is enough: how many of each."""
    made, refusals, deadline = 0, [], time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline, f"only {len(refusals)} rooms were refused, {made} made"
        try:
            client.create_room(name="x" * 200)
            made += 1
        except asbridge.MatrixError as error:
            refusals.append((error.status, error.body()))
    return made, refusals


def upload(running, token, size):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/_matrix/media/v3/upload", b"x" * size, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def check_goes_on(senders, recorder):
    """Everybody is answered again, without a restart, and what was answered is pushed."""
    many = [len(sender.answered) for sender in senders]
    eventually(lambda: all(len(sender.answered) > before + 30 for sender, before in zip(senders, many, strict=True)), 30)
    for sender in senders:
        sender.stop()
    answered = {id for sender in senders for id in sender.answered}
    eventually(lambda: answered <= set(pushed(recorder.pushes)), 30)


@linux
def test_on_a_full_disk_changes_are_refused_and_nothing_is_half_and_with_room_again_it_goes_on(program, recorder, disk, tmp_path, say):
    full = disk("20m")
    config = {"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20}
    flags = ["--database", str(tmp_path / "disk" / "asbridge.db")]
    running = program(config, *flags, before=full.enter)
    alice = person(running.url)
    room, database = alice.create_room(), full.path / "asbridge.db"
    since = alice.sync()["next_batch"]
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port, padding) for n, padding in enumerate((0, 300, 9000))]
    eventually(lambda: all(len(sender.answered) > 20 for sender in senders))
    full.fill(but=2_000_000)
    uploads = [upload(running, alice.token, 4_000_000) for _ in range(12)]               # too large, beside sends that are not:
    assert not [status for status, _ in uploads if status == 200]                        # SQLite ends such a transaction by itself
    check_refusals(uploads)
    full.fill(but=300_000)
    made, refusals = create_rooms(alice, lambda: all(len(sender.refused) > 20 for sender in senders))
    check_refusals(refusals + [one for sender in senders for one in sender.refused])
    full.fill()
    pushes = len(recorder.pushes)
    # What can't be acknowledged is pushed again; seldom the last acknowledgement still had room.
    eventually(lambda: len(recorder.pushes) > pushes + 3 or all_acknowledged(running))
    assert alice.messages(room)["chunk"] and alice.sync(since)["next_batch"]             # who only reads notices nothing
    again = len(recorder.pushes) - len(dict(recorder.pushes))
    (full.path / "filler").unlink()
    check_goes_on(senders, recorder)
    assert running.end()[0] == 0
    shutil.copyfile(database, tmp_path / "copy.db")          # SQLite would follow the way through /proc to another file
    with looking(tmp_path / "copy.db") as db:
        assert db.execute("SELECT count(*) FROM rooms").fetchone() == (1 + made,)
        assert db.execute("SELECT count(*) FROM media").fetchone() == (0,)
    check_all(tmp_path / "copy.db", senders, recorder)
    say(f"{made} rooms made, {len(refusals)} refused; {sum(len(s.refused) for s in senders)} sends refused; {again} transactions again")

    full.fill()
    running = program(config, *flags, before=full.enter)
    assert running.ready == "" and running.process.wait(10) == 1
    assert re.search(r"^asbridge: .*asbridge.db can't be used as a database: .*(full|I/O)", running.log.read_text().splitlines()[-1])
    (full.path / "filler").unlink()
    running = program(config, *flags, before=full.enter)
    assert alice_at(running, alice).say(room, "there is room") and running.end()[0] == 0


def all_acknowledged(running):
    one = asbridge.Client(running.url).call("GET", "/_asbridge/status")["appservices"][0]
    return one["open"] is None and one["waiting"] == 0


def alice_at(running, alice):
    """The same person, at a server that was started again."""
    return asbridge.Client(running.url, alice.token)


@linux
def test_when_files_may_not_grow_changes_are_refused_and_when_they_may_again_it_goes_on(program, recorder, tmp_path, say):
    running = program({"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20})
    alice = person(running.url)
    room, database = alice.create_room(), tmp_path / "asbridge.db"
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port, 3000) for n in range(3)]
    eventually(lambda: all(len(sender.answered) > 20 for sender in senders))
    size = os.path.getsize(f"{database}-wal") + 200_000
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    made, refusals = create_rooms(alice, lambda: all(len(sender.refused) > 20 for sender in senders))
    check_refusals(refusals + [one for sender in senders for one in sender.refused])
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_goes_on(senders, recorder)
    eventually(lambda: not waiting(database))
    check_all(database, senders, recorder)
    say(f"{made} rooms made, {len(refusals)} refused; {sum(len(s.refused) for s in senders)} sends refused")
    assert running.end()[0] == 0


@pytest.mark.parametrize("seconds", [1, 7])                  # SQLite waits for five
def test_while_another_process_has_locked_the_database_changes_wait_or_are_refused_and_then_go_on(program, recorder, tmp_path, seconds):
    running = program({"registrations": [registration(recorder.url)], "retry_first_ms": 5, "retry_max_ms": 20})
    alice = person(running.url)
    room, database, since = alice.create_room(), tmp_path / "asbridge.db", alice.sync()["next_batch"]
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port) for n in range(3)]
    eventually(lambda: all(len(sender.answered) > 20 for sender in senders))
    with contextlib.closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        many, began = sum(len(sender.answered) for sender in senders), time.monotonic()
        while time.monotonic() < began + seconds:
            assert alice.messages(room)["chunk"] and alice.sync(since)["next_batch"]     # who only reads notices nothing
            time.sleep(0.05)
        assert sum(len(sender.answered) for sender in senders) <= many + len(senders)    # those that had been stored already
        other.execute("ROLLBACK")
    check_goes_on(senders, recorder)
    eventually(lambda: not waiting(database))
    check_refusals([one for sender in senders for one in sender.refused])
    assert seconds > 5 or not any(sender.refused for sender in senders)
    check_all(database, senders, recorder)
    assert running.end()[0] == 0


def foreign(path, tmp_path):
    """A database of some other program."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE bookmarks (url TEXT); INSERT INTO bookmarks VALUES ('https://example.org')")


def made_later(path, tmp_path):
    """A database of an asbridge to come."""
    ours(path, tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def ours(path, tmp_path):
    asbridge.Homeserver(database=str(path)).start().stop()


NO_DATABASES = {"text": lambda path, _: path.write_text("dear diary\n" * 1000), "a folder": lambda path, _: path.mkdir(),
                "of another program": foreign, "of a newer version": made_later}


def check_not_started(running, name, unchanged):
    """It ended with 1 and one line that names the file, and left the file alone."""
    before = unchanged()
    assert running.ready == "" and running.process.wait(15) == 1
    lines = running.log.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("asbridge: ") and name in lines[0], lines
    assert unchanged() == before
    return lines[0]


def hash_of(path):
    return lambda: path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", NO_DATABASES)
def test_what_is_no_database_of_ours_is_refused_and_left_alone(program, tmp_path, kind):
    path = tmp_path / "some.db"
    NO_DATABASES[kind](path, tmp_path)
    before = hash_of(path)()
    running = program({}, "--database", str(path))
    check_not_started(running, "some.db", hash_of(path))
    assert hash_of(path)() == before


def test_a_database_that_another_asbridge_has_open_is_refused(program, tmp_path):
    first = program({}, "-q")
    assert first.ready
    assert "in use" in check_not_started(program({}), "asbridge.db", lambda: None)
    assert person(first.url) and first.end()[0] == 0


def test_a_database_that_another_process_keeps_locked_is_refused_at_the_start(program, tmp_path):
    ours(tmp_path / "asbridge.db", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "asbridge.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        check_not_started(program({}, "-q"), "asbridge.db", hash_of(tmp_path / "asbridge.db"))


def test_a_database_that_may_only_be_read_is_refused(program, disk, tmp_path):
    where = disk("4m")
    ours(tmp_path / "ours.db", tmp_path)
    shutil.copyfile(tmp_path / "ours.db", where.path / "asbridge.db")
    where.read_only()
    running = program({}, "--database", str(tmp_path / "disk" / "asbridge.db"), before=where.enter)
    check_not_started(running, "asbridge.db", hash_of(where.path / "asbridge.db"))


def test_a_client_that_dies_inside_a_body_is_no_failure_of_the_homeserver(program):
    running = program({"database": ":memory:"})
    alice = person(running.url)
    head = f"POST {V3}/createRoom HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}\r\nContent-Length: 50\r\n\r\n{{"
    for at_once in (False, True):
        with socket.create_connection(("127.0.0.1", running.port)) as sock:
            sock.sendall(head.encode())
            time.sleep(0.1)
            if at_once:                                      # it is reset, as where its process is killed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.1)
    assert alice.joined_rooms() == []
    assert running.end()[0] == 0 and " ERROR " not in running.log.read_text()


# ============================================================================
# Constant load
# ============================================================================

class Asker(threading.Thread):
    """Asks the same again and again, as fast as it is answered."""

    def __init__(self, port, token, path):
        super().__init__(daemon=True)
        self.request = f"GET {V3}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        self.socket = socket.create_connection(("127.0.0.1", port), 30)
        self.answers, self.wrong, self.stopping = 0, [], False
        self.start()

    def run(self):
        with self.socket, self.socket.makefile("rb") as stream:
            while not self.stopping:
                self.socket.sendall(self.request)
                status, length = stream.readline(), 0
                while (line := stream.readline()) != b"\r\n":
                    length = int(line[15:]) if line.lower().startswith(b"content-length:") else length
                body = stream.read(length)
                self.answers += 1
                if b" 200 " not in status:
                    self.wrong.append(body)

    def stop(self):
        self.stopping = True
        self.join(30)
        assert not self.is_alive() and not self.wrong, self.wrong[:3]


def test_the_write_ahead_log_stays_small_under_writers_and_readers_that_never_pause(program, recorder, tmp_path, say):
    running = program({"registrations": [registration(recorder.url)]})
    alice = person(running.url)
    room = alice.create_room()
    log, size, began = tmp_path / "asbridge.db-wal", 0, time.monotonic()
    senders = [Sender(f"s{n}", alice.token, room, lambda: running.port) for n in range(3)]
    paths = [f"/sync?timeout=0&since={alice.sync()['next_batch']}", f"/rooms/{urllib.parse.quote(room)}/messages?dir=f&limit=1000"]
    askers = [Asker(running.port, alice.token, path) for path in paths * 4]
    while time.monotonic() < began + 20:
        size = max(size, log.stat().st_size)
        time.sleep(0.02)
    for one in senders + askers:
        one.stop()
    slowest = max(second for sender in senders for second in sender.seconds)
    say(f"{sum(len(s.answered) for s in senders) / 20:.0f} sends/s, {sum(a.answers for a in askers) / 20:.0f} reads/s, "
        f"slowest send {slowest:.2f} s, log at most {size / 2**20:.1f} MiB")
    assert size < 10 * 2**20                                 # MAX_LOG_BYTES, and the batch that passes it
    assert slowest < 3
    with contextlib.closing(sqlite3.connect(tmp_path / "asbridge.db", timeout=1)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0          # and nobody is reading for ever


# ============================================================================
# A long queue
# ============================================================================

# A homeserver in a process of its own. For each number that it reads it stores so many messages, as its own writer does.
FILLED = """
import sys
import asbridge
hs = asbridge.Homeserver([{registration!r}], database="asbridge.db", retry_first_ms=50, retry_max_ms=100).start()
alice = hs.client("alice")
room_id, sender, number = alice.create_room(), alice.user_id, 0
print(hs.port, alice.token, room_id, flush=True)

def job(tx):
    room = tx.room(room_id)
    for n in range(number, number + 500):
        content = {{"msgtype": "m.text", "body": f"message {{n}}, which is as long as most messages are, or somewhat longer"}}
        tx.append(room, asbridge.Draft("m.room.message", sender, content), hs.clock.now())

for line in sys.stdin:
    for number in range(0, int(line), 500):
        hs.world.store.write(job)
    print("stored", flush=True)
hs.stop()
"""


class Filled(Program):
    """The above as a program."""

    def __init__(self, folder, url):
        script = FILLED.format(registration=registration(url))
        self.process = subprocess.Popen([*BOUND, sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": HERE},
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        number, self.token, self.room_id = self.process.stdout.readline().split()
        self.number = int(number)

    def store(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "stored\n"


@linux
def test_a_hundred_thousand_events_wait_for_a_service_on_the_disk_and_then_come_in_order(recorder, tmp_path, say):
    recorder.answer = lambda: 503
    running, database = Filled(tmp_path, recorder.url), tmp_path / "asbridge.db"
    try:
        running.store(2_000)                                 # what is made at the first need is there
        before, began = running.resident(), time.monotonic()
        running.store(108_000)
        filled, took = running.resident() - before, time.monotonic() - began
        recorder.answer, began, most = lambda: 200, time.monotonic(), 0
        sender = Sender("alice", running.token, running.room_id, lambda: running.number)
        with looking(database) as db:
            last = db.execute("SELECT max(tick) FROM events").fetchone()[0]
            acknowledged = "SELECT max(last_tick) FROM transactions WHERE acknowledged_ts IS NOT NULL"
            while (db.execute(acknowledged).fetchone()[0] or 0) < last:
                most = max(most, running.resident() - before)
                assert time.monotonic() < began + 90
                time.sleep(0.02)
        seconds = time.monotonic() - began
        sender.stop()
        eventually(lambda: not waiting(database))
        say(f"110,000 events stored at {108_000 / took:.0f}/s, {filled / 2**20:.1f} MiB more; caught up at {110_000 / seconds:.0f}/s, "
            f"{most / 2**20:.1f} MiB more; {len(sender.answered) / seconds:.0f} sends/s meanwhile, a send took "
            f"{statistics.median(sender.seconds) * 1000:.1f} ms, {max(sender.seconds) * 1000:.0f} ms at most")
        check_all(database, [sender], recorder)
        with looking(database) as db:
            kept, events = db.execute("SELECT count(*), sum(events) FROM transactions").fetchone()
            assert 1000 <= kept <= 1101 and db.execute("SELECT count(*) FROM outbox").fetchone()[0] == events
        assert max(filled, most) < 10 * 2**20                # SQLite keeps 2 MiB for each connection; nothing else may grow
        assert max(sender.seconds) < 1
        running.process.communicate(timeout=10)              # the end of its input is its end
        assert running.process.returncode == 0
    finally:
        running.process.kill()
        running.process.wait()
