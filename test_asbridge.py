"""The specification of asbridge, as tests: in the order of the file, each name a sentence.

    python -m pytest

Whoever reads only the names has read the specification. Rules are tested without sockets, the rest over real ones on free
ports of the loopback interface. Nothing is left behind.

What stands first is helpers, to be looked up when a test uses one. To be skipped at first reading: in section 3 what is marked
so, and at the end of section 6 "The rules a second time", models of rooms and devices beside which a homeserver is led.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import errno
import functools
import hashlib
import http.client
import itertools
import json
import logging
import os
import random
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

import asbridge
from asbridge import MatrixError


# ============================================================================
# Helpers
# ============================================================================

# -- Waiting, and being refused.

@contextlib.contextmanager
def refused(errcode, status=None, text=""):
    """What is inside must raise this MatrixError, with this in its text."""
    with pytest.raises(MatrixError) as caught:
        yield caught
    assert caught.value.errcode == errcode, caught.value
    assert status in (None, caught.value.status), caught.value
    assert text in caught.value.error, caught.value.error


def eventually(test, seconds=5.0):
    """The first true value of test(); it is asked again and again until the time is over."""
    deadline = time.monotonic() + seconds
    while not (value := test()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {test}"
        time.sleep(0.002)
    return value


@contextlib.contextmanager
def background(fn, *args, **keys):
    """Runs fn on another thread; its Future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(fn, *args, **keys)


# -- Plain data: registrations, and what stands in a request.

def registration(id="irc", url=None, users=("@_irc_.*",), aliases=("#_irc_.*",), rooms=(), exclusive=True, **more):
    """A registration as plain data; `more` adds keys or replaces them."""
    def entries(regexes):
        return [{"regex": regex, "exclusive": exclusive} for regex in regexes]
    return {"id": id, "url": url, "as_token": f"as-{id}", "hs_token": f"hs-{id}", "sender_localpart": f"_{id}_bot", "rate_limited": False,
            "namespaces": {"users": entries(users), "aliases": entries(aliases), "rooms": entries(rooms)}, **more}


RANDOM = {"as_token": "5dc01f2a9e8b47d6a3d1c7e05f9b2846", "hs_token": "b08e6f1c3a5d49727f0e1b9d8c6a4253"}


def registration_for(users=(), aliases=(), rooms=(), id="irc", exclusive=True, **more):
    """A registration of which the doctor has nothing else to say; an entry is a regex or a whole object."""
    def entries(regexes):
        return [regex if isinstance(regex, dict) else {"regex": regex, "exclusive": exclusive} for regex in regexes]
    tokens = {key: token + id for key, token in RANDOM.items()}
    return registration(id, **{**tokens, "url": "http://127.0.0.1:9009", "sender_localpart": f"{id}bot", **more},
                        namespaces={"users": entries(users), "aliases": entries(aliases), "rooms": entries(rooms)})


def read_registration(data):
    """(the registration or None, its findings as texts)."""
    reader = asbridge.RegistrationReader(data, "x.yaml")
    return reader.read(), [str(finding) for finding in reader.findings]


def in_files(*data):
    """The registrations with where they stand: in a.yaml, b.yaml, …"""
    return [(f"{chr(97 + n)}.yaml", read_registration(one)[0]) for n, one in enumerate(data)]


def registrations_of(*data, server_name="localhost"):
    """Registrations of plain data, which must be right."""
    read = [read_registration(one) for one in data]
    assert not [findings for _, findings in read if findings]
    return asbridge.Registrations(server_name, [one for one, _ in read])


def with_uris(**more):
    """One that maps URIs, as the sample does."""
    return registration(uris=asbridge.SAMPLE_REGISTRATION["uris"], **more)


V3 = "/_matrix/client/v3"
AS_LOGIN = {"type": "m.login.application_service"}
path = asbridge.client_path


def quote(text):
    return urllib.parse.quote(text, safe="")


def pattern_of(where):
    """The path of a row, with the names of this table for variables."""
    return (asbridge.PREFIXES.get(where[0], where[0]) + where[1:]).replace("{roomId}", "{room}").replace("{userId}", "{user}")


# -- Sockets: servers and clients of bytes.

def closed_port():
    """A port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def nowhere():
    """The URL of an application service that is down."""
    return f"http://127.0.0.1:{closed_port()}"


@pytest.fixture
def serve():
    """Starts an HTTP server that answers what it was asked, as JSON; it ends with the test."""
    made = []

    def echo(request):
        try:
            body = request.body(100_000).decode("latin-1")
            return asbridge.json_response(200, {"method": request.method, "path": request.path, "query": request.query,
                                                "headers": request.headers, "body": body})
        except MatrixError as error:
            return asbridge.json_response(error.status, error.body())

    def make(app=echo, **keys):
        made.append(asbridge.HttpServer(("127.0.0.1", 0), app, **keys))
        made[-1].start()
        return made[-1]
    yield make
    for server in made:
        server.stop()


@pytest.fixture
def scripted():
    """A server of raw sockets: the n-th connection is handled by the n-th script. Gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def make(*scripts):
        def run():
            with contextlib.suppress(OSError):
                for script in scripts:
                    sock, _ = listener.accept()
                    with sock:
                        sock.settimeout(5)
                        script(sock)
        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield make
    for thread in threads:
        while thread.is_alive():                             # scripts that nobody came for
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), 1).close()
            thread.join(0.01)
    listener.close()


OK_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def says(answer, times=1):
    """A script: reads a request and answers with these bytes, so many times, then closes."""
    def script(sock):
        for _ in range(times):
            if sock.recv(65_536):
                sock.sendall(answer)
    return script


@pytest.fixture
def client():
    """Makes HTTP clients; they are closed with the test."""
    made = []

    def make(url):
        made.append(asbridge.HttpClient(url))
        return made[-1]
    yield make
    for one in made:
        one.close()


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), 5)


def read_all(sock):
    """What comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65_536):
            parts.append(data)
    return b"".join(parts)


def talk(server, data):
    """Sends this and nothing more; everything that comes back until the connection is closed."""
    with connect(server) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def answers_in(data):
    """[(status, headers, JSON)] of the answers in a stream."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines[1:]}
        size = int(headers["content-length"])
        found.append((int(lines[0].split(" ")[1]), headers, json.loads(data[:size])))
        data = data[size:]
    return found


def no_threads_named(monkeypatch, prefix):
    """Threads whose names begin so can't be started any more."""
    real = threading.Thread.start

    def start_thread(thread):
        if thread.name.startswith(prefix):
            raise RuntimeError("can't start new thread")
        real(thread)
    monkeypatch.setattr(threading.Thread, "start", start_thread)


# -- A room without a homeserver.

CREATOR, MOD, USER, LOW, OUT = "@creator:localhost", "@mod:localhost", "@user:localhost", "@low:localhost", "@out:localhost"
LEVELS = {"users": {MOD: 50, LOW: -5}, "users_default": 0, "ban": 50, "kick": 50, "invite": 10, "redact": 50, "state_default": 50, "events_default": 0,
          "events": {"m.room.name": 60, "x.easy": -5}}


def room_of(version="11", levels=..., join_rule="invite", **memberships):
    """A room with these power levels (None: no such event), this join rule, and memberships by localpart; the first four are joined."""
    room = asbridge.RoomState(asbridge.ROOM_VERSIONS[version])
    if levels is ...:
        levels = {**LEVELS, "users": {**LEVELS["users"], **({CREATOR: 100} if version != "12" else {})}}

    def put(type, content, state_key="", sender=CREATOR):
        room.put(type, state_key, asbridge.StateEvent(len(room.events) + 1, sender, content))
    put("m.room.create", {"room_version": version})
    for user_id in (CREATOR, MOD, USER, LOW):
        put("m.room.member", {"membership": "join"}, user_id)
    if levels is not None:
        put("m.room.power_levels", levels)
    if join_rule:
        put("m.room.join_rules", {"join_rule": join_rule})
    for localpart, membership in memberships.items():
        put("m.room.member", {"membership": membership}, f"@{localpart}:localhost")
    return room


def allowed(room, type, sender, content=None, state_key=None):
    """None, or the errcode of the refusal."""
    try:
        return asbridge.authorise(room, asbridge.Draft(type, sender, content or {}, state_key))
    except MatrixError as error:
        assert error.error
        return error.errcode


def changes_to(room, sender, membership, target, **content):
    return allowed(room, "m.room.member", sender, {"membership": membership, **content}, target)


NO = "M_FORBIDDEN"
VERSIONS = pytest.mark.parametrize("version", ["10", "11", "12"])


# -- A store without a homeserver.

ALICE, GHOST = "@alice:localhost", "@_irc_bob:localhost"


@pytest.fixture
def open_store(tmp_path):
    """Opens stores, in memory or in a file of this name; they are closed with the test."""
    made = []

    def make(name=None, *data, server_name="localhost"):
        registrations = registrations_of(*(data or (registration(url="http://127.0.0.1:1"),)), server_name=server_name)
        made.append(asbridge.Store(str(tmp_path / name) if name else ":memory:", server_name, registrations, asbridge.Clock()))
        return made[-1]
    yield make
    for store in made:
        if store._thread.is_alive():
            store.close()


def make_room(store, *members, version="11", room_id="!r:localhost"):
    """A room with these members, whatever the rules say; its ID."""
    def job(tx):
        room = tx.add_room(room_id, asbridge.ROOM_VERSIONS[version])
        tx.append(room, asbridge.Draft("m.room.create", ALICE, {"room_version": version}, ""), 1)
        for member in (ALICE, *members):
            tx.append(room, asbridge.Draft("m.room.member", member, {"membership": "join"}, member), 2)
        return room.room_id
    return store.write(job)


def say(tx, room_id="!r:localhost", body="hello", sender=ALICE, **more):
    return tx.append(tx.room(room_id), asbridge.Draft("m.room.message", sender, {"body": body}, **more), 1000)


def texts_in(store, room=1):
    with store.read() as reader:
        return [event.content["body"] for event in reader.events(room, 0, 2**62, 10_000, False) if event.type == "m.room.message"]


class Result:
    def __init__(self, job):
        job.done.acquire(timeout=5)
        self.value, self.error = job.result, job.error


def in_one_batch(store, *fns):
    """Runs these jobs in one batch; their results, each with value and error."""
    gate, inside = threading.Event(), threading.Event()
    jobs = [asbridge._Job(fn) for fn in (lambda tx: (inside.set(), gate.wait(5)), *fns)]
    store._jobs.put(jobs[0])
    assert inside.wait(5)
    for job in jobs[1:]:
        store._jobs.put(job)
    gate.set()
    return [Result(job) for job in jobs][1:]


class FaultyDb:
    """A connection that fails at a statement, so many times."""

    def __init__(self, db, statement, times):
        self.db, self.statement, self.times = db, statement, times

    def execute(self, sql, *values):
        if sql.startswith(self.statement) and self.times:
            self.times -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(sql, *values)

    def __getattr__(self, name):
        return getattr(self.db, name)


# -- A homeserver in this process, and the program.

@pytest.fixture(scope="session", autouse=True)
def cheap_passwords():
    """A password costs a thousandth here of what it does else; yields the parameters as they are else."""
    as_they_are = dict(asbridge.SCRYPT)
    with unittest.mock.patch.dict(asbridge.SCRYPT, n=16):
        yield as_they_are


@pytest.fixture(scope="session", autouse=True)
def answered():
    """The rows of the table of endpoints that have answered a request in this run, and not with an error."""
    rows = set()

    def noting(route):
        def handler(call, *params):
            answer = route.handler(call, *params)
            rows.add((route.method, route.path))
            return answer
        return route._replace(handler=handler)
    for table in (asbridge.ROUTES, asbridge.ADMIN_ROUTES):
        table[:] = map(noting, table)
    return rows


@pytest.fixture
def start():
    """Starts homeservers with these registrations and configuration keys; they end with the test."""
    made = []

    def make(*registrations, **keys):
        made.append(asbridge.Homeserver(registrations, **keys).start())
        return made[-1]
    yield make
    for hs in made:
        hs.stop()


def ask(hs, method, path, token=None, body=None, headers=None):
    """One plain HTTP request: (status, JSON)."""
    client = asbridge.HttpClient(hs.url)
    try:
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = client.request(method, path, data, sent)
        return status, json.loads(answer or b"{}")
    finally:
        client.close()


def whole(hs, method, where, headers={}, body=None):
    """Status, headers and body of one request."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", hs.port, timeout=5)) as connection:
        connection.request(method, where, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


HERE = os.path.dirname(os.path.abspath(asbridge.__file__))
PROGRAM = os.path.join(HERE, "asbridge.py")


class Running:
    """asbridge.py as a program: its process, and the URL that it announced. As a module (compiled once) it starts sooner."""

    def __init__(self, folder, config=None, *flags, port="0", path=("-m", "asbridge")):
        arguments = [sys.executable, *path, "--port", port, *flags]
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
            arguments += ["--config", str(folder / "config.json")]
        self.process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONPATH": HERE})
        self.ready = self.process.stdout.readline()
        self.url = self.ready.rpartition(" ")[2].strip()

    def end(self, number=signal.SIGTERM):
        """Exit code, rest of stdout, stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, out, err


@pytest.fixture
def program(tmp_path):
    made = []

    def make(config=None, *flags, **keys):
        made.append(Running(tmp_path, config, *flags, **keys))
        return made[-1]
    yield make
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def person(running, name="alice"):
    """A client of somebody new, at the program."""
    client = asbridge.Client(running.url)
    client.token = client.call("POST", V3 + "/register", {"username": name, "auth": {"type": "m.login.dummy"}})["access_token"]
    return client


# -- People: what they do, and what they get.

@pytest.fixture
def hs(start):
    """A homeserver with an application service, irc, to which nothing is sent."""
    return start(registration())


@pytest.fixture
def alice(hs):
    return hs.client("alice")


@pytest.fixture
def bob(hs):
    return hs.client("bob")


@pytest.fixture
def carol(hs):
    return hs.client("carol")


@pytest.fixture
def ghost(hs):
    """A client of the application service, acting as one of its users."""
    return acting(hs, "irc", "@_irc_bob:localhost")


@pytest.fixture
def room(alice):
    """A public room of alice's."""
    return alice.create_room(preset="public_chat", room_alias_name="room")


@pytest.fixture
def pair(hs, alice, bob, carol, room):
    """alice and bob in a room; alice has synced, bob has not."""
    bob.join(room)
    return hs, alice, bob, carol, alice.sync()["next_batch"]


def again(hs, client, **more):
    """Another session, and device, of the same person."""
    session = hs.world.store.write(lambda tx: hs.api.accounts._new_session(tx, client.user_id, **more))
    return asbridge.Client(hs.url, session["access_token"])


def confirmed(password="w", **more):
    """What a body has to have for what matters: the password."""
    return {"auth": {"type": "m.login.password", "password": password, **more}}


def renamed(client, name):
    """Sets the display name."""
    client.call("PUT", path("profile", client.user_id, "displayname"), {"displayname": name})


def set_presence(client, presence, **more):
    client.ask("PUT", "presence", client.user_id, "status", body={"presence": presence, **more})


def presence_of(client, user):
    return client.ask("GET", "presence", user.user_id, "status")


def presences(answer):
    """sender → presence in the answer of a sync."""
    return {event["sender"]: event["content"]["presence"] for event in answer.get("presence", {}).get("events", [])}


@contextlib.contextmanager
def polling(hs, client, since, filter=None):
    """A long poll of somebody, from when it waits: its Future."""
    with background(client.sync, since, 60_000, filter) as future:
        eventually(lambda: hs.world.store.waiters.among({client.user_id}))
        yield future


def ids(events):
    return [event["event_id"] for event in events]


def types(events):
    return [event["type"] for event in events]


def bodies(events):
    return [event["content"]["body"] for event in events if event["type"] == "m.room.message" and "body" in event["content"]]


def joined(answer, room):
    return answer["rooms"]["join"][room]


def all_messages(client, room, dir="f", **query):
    """The whole history, page by page."""
    found, page = [], client.messages(room, dir, 7, **query)
    while True:
        found += page["chunk"]
        if "end" not in page:
            return found
        page = client.messages(room, dir, 7, **{**query, "from": page["end"]})


def ephemeral(client, room, since=None, type="m.typing"):
    """The content of the ephemeral event of this type that the next sync has, or None."""
    events = joined(client.sync(since), room).get("ephemeral", {"events": []})["events"]
    return next((event["content"] for event in events if event["type"] == type), None)


def receipt(client, room, event_id, type="m.read", **body):
    return client.call("POST", path("rooms", room, "receipt", type, event_id), body)


def reply(client, room, parent, rel_type="m.thread", body="reply", type="m.room.message", **more):
    """Sends an event that relates to another; its ID."""
    relation = {"rel_type": rel_type, "event_id": parent, **more}
    return client.send(room, type, {"msgtype": "m.text", "body": body, "m.relates_to": relation})


def relations(client, room, event_id, *more, **query):
    """The IDs of the events that relate to this one, and the whole answer."""
    answer = client.call("GET", "/_matrix/client/v1/rooms/" + "/".join(map(quote, (room, "relations", event_id, *more))), **query)
    return ids(answer["chunk"]), answer


def threads(client, room, **query):
    return client.call("GET", f"/_matrix/client/v1/rooms/{quote(room)}/threads", **query)


def bundled(event):
    return event["unsigned"].get("m.relations")


def unread(client, room, since=None, **filter):
    """[notifications, highlights] of the room and of its threads."""
    entry = joined(client.sync(since, filter={"room": {"timeline": filter}}), room)
    threads = {root: list(count.values()) for root, count in entry.get("unread_thread_notifications", {}).items()}
    return list(entry["unread_notifications"].values()), threads


def directory(client, **body):
    """The names of the rooms that a search of the directory finds."""
    return [room["name"] for room in client.call("POST", V3 + "/publicRooms", body)["chunk"]]


def restricted(alice, other, type="m.room_membership", version="11"):
    """A room of alice's that is joined by who is in the other one."""
    return alice.create_room(room_version=version, initial_state=[
        {"type": "m.room.join_rules", "content": {"join_rule": "restricted", "allow": [{"type": type, "room_id": other}]}}])


# -- People: keys of their devices.

def device_of(client):
    return client.whoami()["device_id"]


def device_keys(client, **more):
    """Device keys as a client uploads them."""
    user_id, device_id = client.user_id, device_of(client)
    return {"user_id": user_id, "device_id": device_id, "algorithms": ["m.megolm.v1.aes-sha2"], "keys": {f"ed25519:{device_id}": f"key of {device_id}"},
            "signatures": {user_id: {f"ed25519:{device_id}": "by itself"}}, **more}


def upload(client, one_time=(), fallback=None, **more):
    """Uploads device keys, one-time keys with these IDs and a fallback key; the counts."""
    body = {"device_keys": device_keys(client, **more), "one_time_keys": {f"signed_curve25519:{id}": {"key": f"{id} of {client.user_id}"} for id in one_time}}
    if fallback:
        body["fallback_keys"] = {f"signed_curve25519:{fallback}": {"key": fallback, "fallback": True}}
    return client.ask("POST", "keys", "upload", body=body)["one_time_key_counts"]


def query_keys(client, *users):
    return client.ask("POST", "keys", "query", body={"device_keys": {user.user_id: [] for user in users}})


def claim(client, of, algorithm="signed_curve25519"):
    """The ID of the key that one gets for a device of somebody; None: there is none."""
    device_id = device_of(of)
    answer = client.ask("POST", "keys", "claim", body={"one_time_keys": {of.user_id: {device_id: algorithm}}})
    keys = answer["one_time_keys"].get(of.user_id, {}).get(device_id)
    return next(iter(keys)).partition(":")[2] if keys else None


def cross_signing_keys(user_id, name="a", signed_by=None):
    """Master, self-signing and user-signing key, the latter two signed by the master key."""
    def key(usage):
        public = f"{usage}-{name}"
        return {"user_id": user_id, "usage": [usage], "keys": {f"ed25519:{public}": public}}
    signatures = {user_id: {f"ed25519:master-{signed_by or name}": "by the master key"}}
    return {"master_key": key("master"), "self_signing_key": {**key("self_signing"), "signatures": signatures},
            "user_signing_key": {**key("user_signing"), "signatures": signatures}}


# -- Application services that record what they are sent.

class Recorder:
    """An application service that writes down what it is sent, and answers with this status and JSON or bytes."""

    def __init__(self, answer=200, body={}):
        self.requests = []                                   # (method, path, headers, query, body)
        self.answers(answer, body)
        self.server = asbridge.HttpServer(("127.0.0.1", 0), self._serve)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def answers(self, answer, body={}):
        """From now on so, whatever it is asked, or by a function of request and body."""
        self.answer = answer if callable(answer) else lambda request, sent: (answer, body)

    def _serve(self, request):
        body = request.body(50_000_000)
        self.requests.append((request.method, urllib.parse.unquote(request.path), request.headers, request.query, body))
        status, answer = self.answer(request, body)
        return asbridge.Response(status, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    @property
    def transactions(self):
        """(txn_id, body) of each push that came, in order, repeated ones too."""
        return [(path.rsplit("/", 1)[1], body) for method, path, _, _, body in list(self.requests) if "/transactions/" in path]

    @property
    def events(self):
        """The events pushed, those of a repeated transaction once."""
        return [event for body in dict(self.transactions).values() for event in json.loads(body)["events"]]

    def texts(self):
        return [event["content"]["body"] for event in self.events if event["type"] == "m.room.message"]

    def stop(self):
        self.server.stop()


@pytest.fixture
def recorder():
    """Makes application services that record and answer so; they end with the test."""
    made = []

    def make(answer=200, body={}):
        made.append(Recorder(answer, body))
        return made[-1]
    yield make
    for one in made:
        one.stop()


PING = "/_matrix/client/v1/appservice/irc/ping"


@pytest.fixture
def linked(start, recorder):
    """A homeserver, an application service that records, alice, and her room which it hears; all is settled."""
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], exclusive=False))
    alice = hs.client("alice")
    room = alice.create_room()
    hs.settle()
    r.requests.clear()
    return hs, r, alice, room


def push_under_faults(hs, alice, room):
    """A message of alice's, pushed under the faults that are set; its event ID."""
    event_id = alice.say(room, "x")
    eventually(lambda: hs.advance(1) or not hs.waiting())
    return event_id


def heard(hs, recorder):
    """The texts that an application service has heard when all is pushed."""
    hs.settle()
    return recorder.texts()


def queries(recorder):
    """What an application service was asked, without the prefix of the path."""
    return [urllib.parse.unquote(request[1]).removeprefix("/_matrix/app/v1/") for request in recorder.requests if request[0] == "GET"]


def ephemeral_of(recorder, key="ephemeral"):
    return [data for body in dict(recorder.transactions).values() for data in json.loads(body).get(key, [])]


def pushed(recorder, key):
    """What came under this key, transaction by transaction."""
    return [json.loads(body)[key] for body in dict(recorder.transactions).values() if key in json.loads(body)]


def creates_what_is_asked_for(hs, token="as-irc"):
    """An application service's answer to a query: it registers the user or makes the room while the question is open."""
    def answer(request, body):
        kind, id = request.path.split("/")[-2:]
        id = urllib.parse.unquote(id)
        if kind == "users":
            assert ask(hs, "POST", V3 + "/register", token, {**AS_LOGIN, "username": asbridge.localpart_of(id)})[0] == 200
        if kind == "rooms":
            asbridge.Client(hs.url, token).create_room(preset="public_chat", room_alias_name=asbridge.localpart_of(id))
        return 200, {}
    return answer


def wound_on(hs, future):
    """Lets the pauses of somebody who waits pass."""
    return eventually(lambda: hs.advance(0.05) or future.done(), 10)


IRC_PROTOCOL = {"user_fields": ["network", "nickname"], "location_fields": ["network", "channel"], "icon": "mxc://x/y",
                "field_types": {"nickname": {"regexp": ".*", "placeholder": "nick"}},
                "instances": [{"network_id": "libera", "desc": "Libera", "fields": {"network": "irc.libera.chat"}}]}


def legacy(status, body, old_status=200, old_body={}):
    """The answers of an application service: the first on today's path, the other on the older one."""
    return lambda request, sent: (old_status, old_body) if request.path.startswith("/transactions/") else (status, body)


def network(recorder, **answers):
    """A recorder that answers third-party look-ups: by what stands after /thirdparty/; None is 404, what is no JSON a status."""
    r = recorder()

    def answer(request, body):
        found = answers.get(urllib.parse.unquote(request.path).partition("/thirdparty/")[2].replace("/", "_"))
        return (404, {"errcode": "M_NOT_FOUND"}) if found is None else (found, {}) if isinstance(found, int) else (200, found)
    r.answer = answer
    return r


def third_party(client, *where, **fields):
    return client.ask("GET", "thirdparty", *where, **fields)


def answering(*faults):
    """The answers of an application service with the registration of registration(), which does all as it should, but for these faults."""
    def answer(request, body):
        path, header, query = urllib.parse.unquote(request.path), request.headers.get("authorization", ""), request.query.get("access_token", "")
        tokens = {query} if "reads the query only" in faults else {header.removeprefix("Bearer "), query} - {""}
        if "echoes the request" in faults:
            return 500, f"\x1b[2J{urllib.parse.quote(query, safe='')} {query} {header} {json.dumps(header)}".encode()
        if "takes any token" not in faults and tokens != {"hs-irc" if "has another token" not in faults else "other"}:
            return (403, {"errcode": "M_FORBIDDEN", "error": "no"}) if "says no errcode" not in faults else (403, {})
        routes = {"transactions": "PUT", "users": "GET", "rooms": "GET", "ping": "POST", "thirdparty": "GET"}
        legacy = not path.startswith("/_matrix/app/v1/")
        name = path.removeprefix("/_matrix/app/v1").split("/")[1]
        if name not in routes or legacy != ("knows the legacy paths only" in faults):
            return (404, {"errcode": "M_UNRECOGNIZED"}) if "answers with pages" not in faults else (404, b"<h1>Not found</h1>")
        if routes[name] != request.method:
            return (405, {"errcode": "M_UNRECOGNIZED"}) if "answers with pages" not in faults else (405, b"<h1>No</h1>")
        if name in ("users", "rooms"):
            return (200, {}) if "creates" in faults else (404, b"<h1>No</h1>") if "answers with pages" in faults else (
                404, {} if "says no errcode" in faults else {"errcode": "M_NOT_FOUND"})
        if name == "thirdparty":
            return (200, {"instances": []}) if path.endswith("/good") else (200, []) if path.endswith("/bad") else (404, {})
        return transaction(body)

    def transaction(body):
        try:
            value = json.loads(body)
        except ValueError:
            return (500, b"Traceback") if "breaks" in faults else (400, {"errcode": "M_NOT_JSON"})
        if "is strict" in faults and (value.keys() - {"events", "transaction_id"} or any("org.asbridge.examiner" in event for event in value.get("events", ()))):
            return 400, {"errcode": "M_BAD_JSON"}
        return 200, b"OK" if "answers no JSON" in faults else {}
    return answer


# -- Application services that act.

def bot_of(hs, id="irc"):
    """A client with the as_token of an application service, which acts as its own user."""
    return asbridge.Client(hs.url, hs.world.registrations.by_id[id].as_token)


def acting(hs, id, user_id, register=True):
    """A client with the as_token of an application service, acting as one of its users."""
    if register:
        hs.api.accounts.register_ghost(hs.world.registrations.by_id[id], asbridge.localpart_of(user_id), inhibit_login=True)
    return asbridge.Client(hs.url, hs.world.registrations.by_id[id].as_token, user_id)


ENCRYPTING = {"receive_ephemeral": True, "org.matrix.msc3202": True}


def ghost_with_device(hs, user_id="@_irc_bob:localhost", device_id="GHOST"):
    """A ghost acting with a device of its own."""
    ghost = acting(hs, "irc", user_id)
    ghost.ask("PUT", "devices", device_id, body={"display_name": "bridge"})
    with_device = asbridge.Client(hs.url, ghost.token, user_id)
    with_device.call = functools.partial(asbridge.Client.call, with_device, device_id=device_id)
    return with_device


# -- A homeserver to be asked nonsense: what is of the wrong type.

WRONG = (None, 2**70, "x\0", [None], {}, {"x": {"x": 5}}, True)


def mutations(body):
    """The body with each value in it, however deep, replaced by each wrong one."""
    def places(value, where):
        for key, item in (value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
            yield (*where, key)
            yield from places(item, (*where, key))
    for where in places(body, ()):
        for wrong in WRONG:
            changed = copy.deepcopy(body)
            functools.reduce(lambda value, key: value[key], where[:-1], changed)[where[-1]] = wrong
            yield changed


def some(mutations):
    """Every third of them: another wrong value in each place, and in the end all of them in some. The long tests take all."""
    return itertools.islice(mutations, 0, None, 3)


class Target:
    """A homeserver to be asked nonsense: by a ghost with a device and by a person, with a fresh room for each row."""

    def __init__(self, hs):
        self.hs, self.http, self.n = hs, asbridge.HttpClient(hs.url), 0
        self.alice, self.ghost = hs.client("alice"), ghost_with_device(hs)
        self.backup = self.ghost.ask("POST", "room_keys", "version", body={"algorithm": "x", "auth_data": {}})["version"]
        self.media = self.ghost.call("POST", "/_matrix/media/v1/create")["content_uri"].rpartition("/")[2]
        self.filter = self.ghost.ask("POST", "user", self.ghost.user_id, "filter", body={})["filter_id"]
        self.fresh()

    def fresh(self):
        self.room = self.ghost.create_room(preset="public_chat")
        self.alice.join(self.room)
        self.event = self.ghost.say(self.room, "x")
        return self

    def filled(self, text, encode=lambda text: text):
        self.n += 1
        for name, value in (("user", self.ghost.user_id), ("room", self.room), ("event", self.event), ("backup", self.backup), ("n", str(self.n))):
            text = text.replace("{" + name + "}", encode(value))
        return text

    def ask(self, method, where, body=None, person=False):
        """Status and answer, which must be JSON and no failure of the homeserver."""
        query = "" if person else f"{'&' if '?' in where else '?'}user_id={quote(self.ghost.user_id)}&device_id=GHOST"
        token = self.alice.token if person else "as-irc"
        status, answer = self.http.request(method, where + query, body, {"Authorization": f"Bearer {token}"})
        return status, answer

    def reads(self):
        """What everybody reads goes on being readable, whatever was written."""
        api, ghost, alice = self.hs.api, asbridge.Who(self.ghost.user_id, "GHOST"), asbridge.Who(self.alice.user_id)
        one = asbridge.SyncFilter({"room": {"rooms": [self.room], "timeline": {"unread_thread_notifications": True, "limit": 3}}})
        for who in (alice, ghost):
            api.sync.sync(who, None, one)
        api.keys.query(alice, {ghost.user_id: []})
        with contextlib.suppress(MatrixError):               # she may have been thrown out
            api.history.messages(alice, self.room, None, True, 3, asbridge.Filter(), lazy=True)
            api.relations.threads(alice, self.room, False, None, 3)
            api.directory.hierarchy(alice, self.room, False, 1, 0, 3)
        api.directory.public(0, 3)
        api.data.tags(ghost, self.room)
        api.directory.search_users(alice, "bob", 3)
        assert api.accounts.device(ghost, "GHOST") and self.alice.user_id in self.hs.world.store.users


@pytest.fixture(scope="module")
def target():
    with asbridge.Homeserver([registration()]) as hs:
        yield Target(hs)


# -- An application service of our own, between a homeserver that says yes to everything and whoever pushes to it.

class FakeHomeserver:
    """Answers like a homeserver on which everything succeeds, and notes what it was asked. `fail` makes it refuse."""

    def __init__(self, port=0):
        self.asked, self.fail, self.users = [], None, set()
        self.server = asbridge.HttpServer(("127.0.0.1", port), self.answer)
        self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def answer(self, request):
        body = asbridge.parse_object(request.body(10**7)) if request.method != "GET" else {}
        self.asked.append((request.method, request.path, request.query, body))
        failure = self.fail(request) if self.fail else None
        if failure:
            return asbridge.json_response(failure.status, failure.body())
        if request.path.endswith("/register"):
            if body["username"] in self.users:
                return asbridge.json_response(400, {"errcode": "M_USER_IN_USE", "error": "taken"})
            self.users.add(body["username"])
        user = request.query.get("user_id", "@ircbot:test")
        if request.path.endswith("/members"):
            return asbridge.json_response(200, {"chunk": []})
        return asbridge.json_response(200, {
            "user_id": user, "room_id": "!room:test", "event_id": "$" + secrets.token_hex(8),
            "joined": {}, "joined_rooms": [], "duration_ms": 1})

    def paths(self, pattern):
        return [asked for asked in list(self.asked) if re.search(pattern, asked[1])]

    def said(self):
        return [asked[3]["body"] for asked in self.paths("/send/m.room.message/")]


@pytest.fixture
def fake():
    homeserver = FakeHomeserver()
    yield homeserver
    homeserver.server.stop()


def bridge_registration(**other):
    data = {"id": "irc", "url": "http://127.0.0.1:0", "as_token": "as-secret", "hs_token": "hs-secret",
            "sender_localpart": "ircbot",
            "namespaces": {"users": [{"regex": "@_irc_.*", "exclusive": True}],
                           "aliases": [{"regex": "#_irc_.*", "exclusive": True}]},
            "asbridge.sample": {"irc_port": 0}, **other}
    reader = asbridge.RegistrationReader(data, "test")
    read = reader.read()
    assert read, reader.findings
    return read


class Handled(asbridge.AppService):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events, self.gate, self.entered = [], None, threading.Event()

    def on_event(self, event):
        self.entered.set()
        if self.gate:
            assert self.gate.wait(10)
        self.events.append(event["event_id"])
        if event["type"] == "poison":
            raise ZeroDivisionError("poison")

    def on_user_query(self, user_id):
        return user_id == "@_irc_bob:test"

    def on_alias_query(self, alias):
        return alias == "#_irc_lobby:test"


@pytest.fixture
def service(fake):
    it = Handled(bridge_registration(), fake.url)
    it.start()
    yield it
    it.stop()


@pytest.fixture
def bridge(fake):
    it = asbridge.IrcBridge(bridge_registration(), fake.url)
    it.start()
    yield it
    it.stop()


PUSH = "/_matrix/app/v1/transactions/"


def as_request(service, method, path, body=b"", token="hs-secret", path_token=None):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    target = path + (f"?access_token={path_token}" if path_token else "")
    connection.request(method, target, data, {"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def some_events(*ids, type="m.room.message"):
    common = {"type": type, "room_id": "!r:test", "sender": "@a:test", "content": {}}
    return {"events": [{"event_id": id, **common} for id in ids]}


def push(bridge, type, content, sender="@alice:test", room_id="!room:test", **other):
    """An event comes from the homeserver."""
    event = {"event_id": "$" + secrets.token_hex(8), "type": type, "content": content, "sender": sender,
             "room_id": room_id, "origin_server_ts": 1, **other}
    assert as_request(bridge, "PUT", PUSH + secrets.token_hex(8), {"events": [event]}) == (200, {})
    return event["event_id"]


def message(bridge, body, msgtype="m.text", **other):
    content = {"msgtype": msgtype, "body": body, **other.pop("content", {})}
    return push(bridge, "m.room.message", content, **other)


# -- IRC clients, and a homeserver with a bridge for them.

class Irc:
    """A raw IRC client."""

    def __init__(self, bridge, nick=None, *channels):
        self.sock = socket.create_connection(("127.0.0.1", bridge.irc_port), 10)
        self.nick, self.lines, self.buffer = nick, [], b""
        if nick:
            self.send(f"NICK {nick}", f"USER {nick} 0 * :{nick} the person")
            self.wait(" (376|422) ")
        for channel in channels:
            self.send(f"JOIN {channel}")
            self.wait(f" 366 {re.escape(nick)} {re.escape(channel)} ")

    def send(self, *lines):
        self.sock.sendall("".join(line + "\r\n" for line in lines).encode())

    def __del__(self):
        if hasattr(self, "sock"):                            # else nobody listened
            self.sock.close()

    def wait(self, pattern, seconds=10.0):
        """The first line, old or new, that matches; it and what came before is used up."""
        deadline = time.monotonic() + seconds
        while True:
            for at, line in enumerate(self.lines):
                if re.search(pattern, line):
                    del self.lines[:at + 1]
                    return line
            self.sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                raise AssertionError(f"no {pattern!r}; there is {self.lines[-8:]}") from None
            assert data, f"closed; no {pattern!r}; there is {self.lines[-8:]}"
            *whole, self.buffer = (self.buffer + data).split(b"\r\n")
            self.lines += [line.decode() for line in whole]

    def never(self, pattern):
        """Nothing that matches came before the answer to a PING sent now."""
        token = secrets.token_hex(4)
        self.send(f"PING {token}")
        seen = len(self.lines)
        while not any(token in line for line in self.lines[seen:]):
            self.wait_more()
        assert not [line for line in self.lines if re.search(pattern, line)]

    def wait_more(self):
        self.sock.settimeout(10)
        *whole, self.buffer = (self.buffer + self.sock.recv(65536)).split(b"\r\n")
        self.lines += [line.decode() for line in whole]

    def closed(self):
        self.sock.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(65536):
                pass
        return True


def channel_is_known(bridge, name="#lobby"):
    eventually(lambda: bridge.channels[name].room_id)


def in_lobby(bridge):
    """bob, in a channel whose room is there."""
    bob = Irc(bridge, "bob", "#lobby")
    channel_is_known(bridge)
    eventually(lambda: not bridge.sql("SELECT * FROM irc_spool"))         # and so who is in the room has been asked
    return bob


def sample(irc_port=0):
    return {**asbridge.SAMPLE_REGISTRATION, "url": "http://127.0.0.1:0", "asbridge.sample": {"irc_port": irc_port}}


class World:
    """A homeserver with the sample bridge, and people on it."""

    def __init__(self, hs, database):
        self.hs, self.people, self.database = hs, {}, database

    bridge = property(lambda self: self.hs.samples[0])

    def client(self, name):
        if name not in self.people:
            self.people[name] = self.hs.client(name)
        return self.people[name]

    def restart_bridge(self):
        registration = self.hs.world.registrations.by_id["irc"]
        self.bridge.stop()
        self.hs.samples[0] = asbridge.IrcBridge(registration, self.hs.url, asbridge.beside(self.database, "irc"))
        self.bridge.start()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    database = str(tmp_path_factory.mktemp("world") / "hs.db")
    with asbridge.Homeserver([sample()], database=database) as hs:
        yield World(hs, database)


def unique(name):
    return f"{name}{secrets.token_hex(3)}"


def alias_of(world, channel):
    return f"#_irc_{channel[1:]}:{world.bridge.server_name}"


def join(world, client, channel):
    """Joins the room of a channel that somebody on IRC has opened."""
    eventually(lambda: world.bridge.channels[channel].room_id)
    return client.join(alias_of(world, channel))


def member(user_id, membership):
    """A test for wait_for()."""
    wanted = ("m.room.member", user_id, membership)
    return lambda e: (e["type"], e.get("state_key"), e["content"].get("membership")) == wanted


# ============================================================================
# 1. Vocabulary
# ============================================================================

# -- Errors.

def test_an_error_is_rendered_as_the_standard_error_response():
    error = MatrixError("M_LIMIT_EXCEEDED", "slow down", retry_after_ms=5)
    assert error.status == 429 and error.body() == {"errcode": "M_LIMIT_EXCEEDED", "error": "slow down", "retry_after_ms": 5}
    assert MatrixError("M_FORBIDDEN", "", 418).status == 418 and MatrixError("ORG.EXAMPLE", "").status == 400


def test_an_error_may_have_any_further_keys():
    extra = {"self": 1, "http_status": 2, "extra": 3}
    assert MatrixError("M_X", "x", 400, **extra).body() == {"errcode": "M_X", "error": "x", **extra}


# -- Identifiers.

@pytest.mark.parametrize("sigil, text", [
    ("@", "@alice:localhost"), ("@", "@_irc_a=c3=a1/+-.:localhost:8448"), ("@", "@A b\x01é:[1234:5678::abcd]:5678"), ("@", "@a:1.2.3.4"),
    ("@", "@" + "a" * 244 + ":localhost"), ("#", "#_irc_#lobby:localhost"), ("#", "#a:b"), ("!", "!opaque:localhost"), ("!", "!" + "x" * 43), ("$", "$" + "x" * 43)])
def test_an_identifier_is_a_sigil_a_localpart_and_a_server_name(sigil, text):
    assert asbridge.check_id(sigil, text) == text


@pytest.mark.parametrize("sigil, text", [
    ("@", None), ("@", 5), ("@", ["@a:b"]), ("@", ""), ("@", "@"), ("@", "alice:localhost"), ("@", "#alice:localhost"), ("@", "@alice"), ("@", "@alice:"),
    ("@", "@:localhost"), ("@", "@a:b c"), ("@", "@a:b:c"), ("@", "@a:localhost:123456"), ("@", "@a:localhost\n"), ("@", "@a\0:localhost"),
    ("@", "@" + "a" * 245 + ":localhost"), ("@", "@" + "é" * 123 + ":localhost"), ("#", "#a"), ("#", "#:b"), ("!", "!a\0b"), ("$", "$" + "x" * 255)])
def test_what_is_no_identifier_is_refused(sigil, text):
    with refused("M_INVALID_PARAM", 400, f"{sigil}localpart:server"):
        asbridge.check_id(sigil, text)


def test_an_identifier_of_another_server_is_refused_by_name():
    assert asbridge.check_id("@", "@a:localhost", "localhost") == "@a:localhost"
    with refused("M_INVALID_PARAM", text="localhost"):
        asbridge.check_id("@", "@a:LOCALHOST", "localhost")


@pytest.mark.parametrize("id, localpart, server", [
    ("@a:b", "a", "b"), ("#x:[::1]:80", "x", "[::1]:80"), ("!" + "h" * 43, "h" * 43, ""), ("@a:b:c", "a", "b:c")])
def test_the_server_name_is_what_stands_after_the_first_colon(id, localpart, server):
    assert (asbridge.localpart_of(id), asbridge.server_of(id)) == (localpart, server)


@pytest.mark.parametrize("text, localpart", [
    ("bob", "bob"), ("Bob", "bob"), ("#", "=23"), ("á", "=c3=a1"), ("=", "=3d"), ("a b", "a=20b"), ("[m]\\`{|}^~", "=5bm=5d=5c=60=7b=7c=7d=5e=7e"),
    ("a.b_c-d/e+f", "a.b_c-d/e+f"), ("", ""), ("😀", "=f0=9f=98=80"), ("a:b@c", "a=3ab=40c"), ("\0", "=00"), ("\udc80", "=3f")])
def test_other_characters_are_mapped_to_the_alphabet_of_user_ids(text, localpart):
    assert asbridge.to_localpart(text) == localpart
    assert re.fullmatch(r"[a-z0-9._=/+-]*", localpart)


@pytest.mark.parametrize("text", ["É", "\u212a", "İ"])
def test_only_the_bytes_a_to_z_are_converted_to_lower_case(text):
    assert asbridge.to_localpart(text) == "".join(f"={byte:02x}" for byte in text.encode())


@pytest.mark.parametrize("text", ["bob", "#lobby", "á b=c", "=23", "😀/+", "==", ""])
def test_the_mapping_can_be_reversed(text):
    assert asbridge.from_localpart(asbridge.to_localpart(text)) == text


@pytest.mark.parametrize("localpart, text", [("=zz", "=zz"), ("=", "="), ("=C3", "=C3"), ("=ff", "\ufffd"), ("a=2", "a=2")])
def test_a_localpart_that_was_not_mapped_is_read_as_it_stands(localpart, text):
    assert asbridge.from_localpart(localpart) == text


# -- JSON.

@pytest.mark.parametrize("data,why", [
    (b"[" * 100_000, "nested deeper than 100 levels"), (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels"), (b'{"a":NaN}', "NaN is no number"), (b"[-Infinity]", "-Infinity is no number"),
    (b"1e400", "1e400 is no number"), (b'{"a":1e400}', "1e400 is no number"), (b'"\\ud800"', "surrogates not allowed"), ("{}".encode("utf-16"), "it is UTF-16"), ("{}".encode("utf-16-le"), "it is UTF-16"), ("{}".encode("utf-16-be"), "it is UTF-16"),
    ("{}".encode("utf-32"), "it is UTF-16 or UTF-32"), (b"\xef\xbb\xbf{}", "byte order mark"), ("\ufeff{}", "byte order mark"), (b'{"a":1,}', "line 1 column "),
    *((data, "") for data in (b"{", b"nope", b"NaN", b'{"a":Infinity}', b"\xff", b'"\xed\xa0\x80"', b'{"\\udfff":1}', b'["\\uD83D x"]', b'{"a":' * 100_000, b"1" * 5000, b"'a'", b'"\n"', b"{} {}", b" "))],
    ids=itertools.count())
def test_what_is_not_json_is_refused_and_told_why(data, why):
    with refused("M_NOT_JSON", 400, why):
        asbridge.parse_json(data)


def test_of_a_key_that_stands_twice_the_last_value_counts():
    assert asbridge.parse_object(b'{"a": 1, "b": {"x": 1, "x": 2}, "a": 3}') == {"a": 3, "b": {"x": 2}}


def test_surrogates_in_pairs_are_one_character():
    assert asbridge.parse_json(b'"\\ud83d\\ude00 \\\\ud800"') == "😀 \\ud800"


def test_json_that_was_read_can_be_checked_and_written_however_deep_it_is():
    def written(depth):
        try:
            value = asbridge.parse_object(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
        except MatrixError:
            return None
        asbridge.check_canonical(value)
        return asbridge.to_json(value) == asbridge.canonical_json(value)
    assert [written(depth) for depth in (50, 5000)] == [True, None]
    assert all(written(depth) in (True, None) for depth in range(100, 1000, 50))


def test_no_body_is_an_empty_object():
    assert asbridge.parse_object(b"") == {}


@pytest.mark.parametrize("data", [b"[]", b"null", b"5", b'"a"', b"true"])
def test_a_body_that_is_no_object_is_bad_json(data):
    with refused("M_BAD_JSON", 400, "object"):
        asbridge.parse_object(data)


def test_canonical_json_is_sorted_compact_and_not_escaped():
    value = {"b": [1, True, None], "a": {"é": "日", "\"": "\\/\n\x01"}, "B": -0}
    assert asbridge.canonical_json(value) == '{"B":0,"a":{"\\"":"\\\\/\\n\\u0001","é":"日"},"b":[1,true,null]}'


@pytest.mark.parametrize("value", [{}, {"a": 2**53 - 1, "b": [-(2**53) + 1, True, None, "1.5", {"c": {}}]}])
def test_canonical_json_holds_integers_of_53_bits(value):
    assert asbridge.check_canonical(value) is None


@pytest.mark.parametrize("value", [1.0, {"a": 0.5}, {"a": {"b": [2**53]}}, [-(2**53)], {"a": [[1e300]]}, -0.0])
def test_canonical_json_holds_no_fractions_and_no_larger_integers(value):
    with refused("M_BAD_JSON", 400, "2^53"):
        asbridge.check_canonical(value)


def test_json_that_is_already_written_goes_into_an_answer_as_it_is():
    raw = asbridge.Raw('{"z":1, "a":2}')
    assert asbridge.to_json({"events": [raw, ("x",)], "k\n": None}) == '{"events":[{"z":1, "a":2},["x"]],"k\\n":null}'
    with pytest.raises(ValueError):
        asbridge.to_json({"a": float("nan")})


@pytest.mark.parametrize("value, type_", [("x", str), ("", str), (0, int), (False, bool), ({}, dict), ([], list)])
def test_a_field_of_a_body_is_read_if_it_has_its_type(value, type_):
    assert asbridge.field({"key": value}, "key", type_) == value


@pytest.mark.parametrize("value, type_", [(5, str), (True, int), (1, bool), (1.0, int), ("1", int), ([], dict), ({}, list)])
def test_a_field_of_another_type_is_bad_json(value, type_):
    with refused("M_BAD_JSON", 400, "'key'"):
        asbridge.field({"key": value}, "key", type_, None)


@pytest.mark.parametrize("value", [["hunter2"], {"a": "hunter2"}, 5771932, 5771932.5, True])
@pytest.mark.parametrize("key", ["password", "new_password", "access_token", "client_secret", "pass", "auth", "identifier"])
def test_no_error_repeats_a_secret_that_is_of_the_wrong_type(key, value):
    with refused("M_BAD_JSON", 400, f"'{key}' must be a string, not ") as caught:
        asbridge.field({key: value}, key, str)
    assert not re.search("hunter2|5771932", caught.value.error)
    with refused("M_BAD_JSON", 400, "a JSON object") as caught:
        asbridge.parse_object(json.dumps([{key: value}]).encode())
    assert not re.search("hunter2|5771932", caught.value.error)


@pytest.mark.parametrize("body", [{}, {"key": None}])
def test_a_field_that_is_not_there_is_missing_unless_it_has_a_default(body):
    assert asbridge.field(body, "key", str, "else") == "else" and asbridge.field(body, "key", str, None) is None
    with refused("M_MISSING_PARAM", 400, "'key'"):
        asbridge.field(body, "key", str)


def test_a_value_in_an_error_text_is_short():
    assert len(asbridge.shorten("x" * 1000)) == 81 and asbridge.shorten({"a": "é"}) == '{"a": "\\u00e9"}'


# -- Time.

def waiting_on(clock, one, seconds):
    """A thread that waits on this bell."""
    thread = threading.Thread(target=clock.wait, args=(one, clock.monotonic() + seconds), daemon=True)
    thread.start()
    eventually(lambda: one in clock._waiting or not thread.is_alive())
    return thread


@pytest.mark.parametrize("seconds", [60, float("inf")])
def test_waiting_ends_when_the_bell_rings_and_may_last_for_ever_till_then(seconds):
    clock, one = asbridge.Clock(), asbridge.bell()
    thread = waiting_on(clock, one, seconds)
    asbridge.release(one)
    thread.join(5)
    assert not thread.is_alive() and not clock._waiting


def test_waiting_ends_at_once_when_the_bell_has_rung_before():
    clock, one = asbridge.Clock(), asbridge.bell()
    asbridge.release(one)
    asbridge.release(one)                                    # twice is no error
    began = time.monotonic()
    clock.wait(one, clock.monotonic() + 60)
    assert time.monotonic() - began < 5 and one.locked()


@pytest.mark.parametrize("seconds", [0.02, 0, -5])
def test_waiting_ends_when_the_time_is_over(seconds):
    clock, began = asbridge.Clock(), time.monotonic()
    clock.wait(asbridge.bell(), clock.monotonic() + seconds)
    assert max(0, seconds) * 0.9 <= time.monotonic() - began < 5


def test_winding_the_clock_on_wakes_all_who_wait():
    clock = asbridge.Clock()
    threads = [waiting_on(clock, asbridge.bell(), 3600) for _ in range(3)]
    clock.advance(60)
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def test_winding_the_clock_on_moves_the_time_that_stamps_and_the_time_that_waits():
    clock = asbridge.Clock()
    now, monotonic = clock.now(), clock.monotonic()
    clock.advance(3600)
    assert 3_600_000 <= clock.now() - now < 3_660_000 and 3600 <= clock.monotonic() - monotonic < 3660


def test_a_clock_with_a_start_stands_still_but_for_what_it_is_wound_on():
    clock = asbridge.Clock(1000)
    assert clock.now() == clock.now() == 1000
    clock.advance(1.5)
    assert clock.now() == 2500


# -- Chance.

def test_what_an_owner_draws_does_not_depend_on_what_others_draw():
    one, other = asbridge.Chance("7"), asbridge.Chance("7")
    other.text("b"), other.text("b")
    drawn = one.text("a"), one.text("a", 43)
    assert drawn == (other.text("a"), other.text("a", 43)) and drawn[0] != drawn[1][:18] and len(drawn[1]) == 43
    assert asbridge.Chance().text("a") != asbridge.Chance().text("a")


# ============================================================================
# 2. Plumbing
# ============================================================================

# -- The HTTP server: connections.

def test_a_connection_is_kept_alive(serve):
    server = serve()
    with connect(server) as sock:
        for n in range(3):
            sock.sendall(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % n)
            (status, headers, answer), = answers_in(sock.recv(65_536))
            assert status == 200 and answer["path"] == f"/{n}" and "connection" not in headers
        assert len(server.connections) == 1


def test_requests_may_come_before_the_answer_to_the_last_one(serve):
    data = talk(serve(), b"POST /1 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /2 HTTP/1.1\r\nHost: h\r\n\r\n"
                         b"POST /3 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\nGET /4 HTTP/1.1\r\nHost: h\r\n\r\n")
    assert [(answer["path"], answer["body"]) for _, _, answer in answers_in(data)] == [("/1", "abc"), ("/2", ""), ("/3", "x"), ("/4", "")]


def test_a_body_that_the_application_does_not_read_is_skipped(serve):
    server = serve(lambda request: asbridge.json_response(200, request.path))
    data = talk(server, b"POST /1 HTTP/1.1\r\nHost: h\r\nContent-Length: 29\r\n\r\nGET /x HTTP/1.1\r\nHost: h\r\n\r\n_" + b"GET /2 HTTP/1.1\r\nHost: h\r\n\r\n")
    assert [answer for _, _, answer in answers_in(data)] == ["/1", "/2"]


@pytest.mark.parametrize("head, kept", [
    (b"GET / HTTP/1.1\r\nHost: h\r\n", True), (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n", False), (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Keep-Alive, Close\r\n", False),
    (b"GET / HTTP/1.0\r\n", False), (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n", True)])
def test_http_1_0_closes_unless_asked_not_to_and_http_1_1_the_other_way_round(serve, head, kept):
    answers = answers_in(talk(serve(), (head + b"\r\n") * 2))
    said = answers[0][1].get("connection")
    assert len(answers) == (2 if kept else 1) and said == ("close" if not kept else "keep-alive" if b"HTTP/1.0" in head else None)


def test_who_expects_100_continue_gets_it_before_the_body_is_read(serve):
    with connect(serve()) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ok")
        (status, _, answer), = answers_in(sock.recv(65_536))
    assert status == 200 and answer["body"] == "ok"


def test_who_expects_100_continue_for_too_large_a_body_is_told_so_instead(serve):
    with connect(serve()) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\nExpect: 100-continue\r\n\r\n")
        (status, headers, answer), = answers_in(read_all(sock))
    assert (status, answer["errcode"], headers["connection"]) == (413, "M_TOO_LARGE", "close")


def test_a_client_of_http_1_0_does_not_know_of_100_continue(serve):
    answers = answers_in(talk(serve(), b"POST / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok"))
    assert [(status, answer["body"]) for status, _, answer in answers] == [(200, "ok")]


def test_a_large_answer_arrives_whole(serve):
    server = serve(lambda request: asbridge.Response(200, b"x" * 3_000_000))
    assert talk(server, GET).endswith(b"\r\n\r\n" + b"x" * 3_000_000)


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nabc"])
def test_a_client_that_goes_away_leaves_nothing_behind(serve, caplog, data):
    server = serve()
    assert talk(server, data) == b"" and eventually(lambda: not server.connections)
    assert talk(server, GET).startswith(b"HTTP/1.1 200 ") and not caplog.records


# -- The HTTP server: heads.

def test_a_request_says_its_method_path_query_and_headers(serve):
    (_, _, answer), = answers_in(talk(serve(), b"PUT http://h:1/a%2Fb/?x=1&y=%C3%A9&z=&x=2 HTTP/1.1\r\nHost: h\r\nX-A: \t 1 \r\nx-a:2\r\n\r\n"))
    assert (answer["method"], answer["path"], answer["query"]) == ("PUT", "/a%2Fb/", {"x": "2", "y": "é", "z": ""})
    assert answer["headers"] == {"host": "h:1", "x-a": "1, 2"}


@pytest.mark.parametrize("host", ["h", "EXAMPLE.org.", "my_bridge:8008", "127.0.0.1:8008", "[::1]:8008", "[fe80::1%25eth0]", "xn--e1afmkfd.example:", ""])
def test_a_host_has_any_name(serve, host):
    (status, _, answer), = answers_in(talk(serve(), b"GET / HTTP/1.1\r\nHost: " + host.encode() + b"\r\n\r\n"))
    assert status == 200 and answer["headers"]["host"] == host


def test_only_http_1_0_needs_no_host(serve):
    assert talk(serve(), b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("target,path", [(b"http://real:1/a", "/a"), (b"HTTPS://real:1", "/"), (b"http://real:1?x=/y", "/")])
def test_a_target_with_a_host_of_its_own_overrides_the_header(serve, target, path):
    server = serve()
    for _ in range(2):                                       # the same headers are not taken for read already
        (_, _, first), (_, _, second) = answers_in(talk(server, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert (first["path"], first["headers"]["host"], second["headers"]["host"]) == (path, "real:1", "localhost")


def test_options_may_ask_about_the_server_as_a_whole(serve):
    (status, _, answer), = answers_in(talk(serve(), b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n"))
    assert (status, answer["path"]) == (200, "*")


def test_what_is_odd_in_a_head_and_can_be_read_in_one_way_only_is_taken(serve):
    head = b"GET /{}|^[] HTTP/1.1\r\nHost: h\r\nX_under: a\tb\r\nEmpty:\r\nLatin: caf\xe9\r\nTransfer_Encoding: chunked\r\nContent-Length: 000\r\n\r\n"
    (status, _, answer), = answers_in(talk(serve(), head))
    assert (status, answer["path"]) == (200, "/{}|^[]")
    assert answer["headers"] == {"host": "h", "x_under": "a\tb", "empty": "", "latin": "caf\xe9", "transfer_encoding": "chunked", "content-length": "000"}


def test_a_query_is_utf_8_percent_encoded_or_not_and_anything_else_is_refused_and_not_replaced(serve):
    server = serve()
    (_, _, answer), = answers_in(talk(server, "GET /?a=%C3%A9&b=é&%C3%A9=%2B+%2526 HTTP/1.1\r\nHost: h\r\n\r\n".encode()))
    assert answer["query"] == {"a": "é", "b": "é", "é": "+ %26"}
    for query in (b"%FF", b"a=%FE", b"a=\xff", b"%ED%A0%80=1", b"a=%C0%AF"):
        (status, _, answer), = answers_in(talk(server, b"GET /?" + query + b" HTTP/1.1\r\nHost: h\r\n\r\n"))
        assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM")


@pytest.mark.parametrize("extra", [b"\r\n", b"\r\n\r\n"])
def test_empty_lines_before_the_first_request_are_ignored(serve, extra):
    assert [status for status, _, _ in answers_in(talk(serve(), extra + GET))] == [200]


def test_an_empty_line_after_a_body_is_ignored(serve):
    data = talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert [status for status, _, _ in answers_in(data)] == [200, 200]


def test_a_content_length_that_comes_twice_alike_is_taken(serve):
    (_, _, answer), = answers_in(talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok"))
    assert answer["body"] == "ok"


def test_a_content_length_of_any_length_is_answered(serve):
    assert talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n").startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))


@pytest.mark.parametrize("head", [
    b"GET / HTTP/1.1\r\nHost: h\r\nA: b\nC: d", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n c", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n\tc", b"GET / HTTP/1.1\r\nHost: h\r\nA : b", b"GET / HTTP/1.1\r\nHost: h\r\nA",
    b"GET / HTTP/1.1\r\nHost: h\r\n: b", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\rc", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\0", b"GET / HTTP/1.1\r\nHost: h\r\nA\xe9: b", b"GET / HTTP/1.1\r\nHost: h\r\n A: b",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5, 6", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: -1",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: +5", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x5", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: ", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: \xb2",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1_0", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip",
    b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, identity", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked",
    b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked;q=1",
    b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding : chunked", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \x0bchunked", b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n chunked",
    b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\x0b", b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5 5",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5,5", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x01", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x7f", b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x1b[31m",
    b"GET / HTTP/1.1", b"GET / HTTP/1.1\r\nhosts: h", b"GET / HTTP/1.1\r\nHost: h\r\nHost: h", b"GET / HTTP/1.1\r\nHost: h\r\nhost: evil", b"GET / HTTP/1.0\r\nHost: h\r\nHost: h",
    b"GET / HTTP/1.1\r\nHost: h/x", b"GET / HTTP/1.1\r\nHost: h, i", b"GET / HTTP/1.1\r\nHost: u@h", b"GET / HTTP/1.1\r\nHost: h:x", b"GET / HTTP/1.1\r\nHost: h i", b"GET / HTTP/1.1\r\nHost: http://h",
    b"GET x HTTP/1.1\r\nHost: h", b"GET x?y=://h/z HTTP/1.1\r\nHost: h", b"GET * HTTP/1.1\r\nHost: h", b"CONNECT h:80 HTTP/1.1\r\nHost: h", b"GET ftp://h/ HTTP/1.1\r\nHost: h",
    b"GET http:/// HTTP/1.1\r\nHost: h", b"GET http://u@h/ HTTP/1.1\r\nHost: h", b"GET http://h:x/ HTTP/1.1\r\nHost: h", b"GET \\x HTTP/1.1\r\nHost: h", b"G" * 33 + b" / HTTP/1.1\r\nHost: h",
    b"GET /", b"GET / x HTTP/1.1", b"GET  / HTTP/1.1", b"GET / HTTP/2.0", b"GET / http/1.1", b"G(T / HTTP/1.1", b"\x16\x03\x01", b"GET / HTTP/1.1 "])
def test_a_head_that_two_readers_could_read_differently_is_refused_and_the_connection_closed(serve, head):
    (status, headers, answer), = answers_in(talk(serve(), head + b"\r\n\r\nGET /evil HTTP/1.1\r\nHost: h\r\n\r\n"))
    assert (status, answer["errcode"], headers["connection"]) == (400, "M_UNKNOWN", "close")


@pytest.mark.parametrize("target", [b"/a\nX:y", b"/a\rX:y", b"/a\0"])
def test_a_request_line_has_no_control_characters(serve, target):
    assert talk(serve(), b"GET " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_head_whose_lines_end_in_bare_lf_is_refused_at_once(serve):
    with connect(serve()) as sock:
        sock.settimeout(0.5)
        sock.sendall(b"GET / HTTP/1.1\nHost: h\n\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("head", [
    "GET /x?access_token=hunter2 y HTTP/1.1", "GET /x?access_token=hunter2 HTTP/9.9", "GET /x HTTP/1.1\r\nAuthorization : Bearer hunter2",
    "GET /x HTTP/1.1\r\nAuthorization= Bearer hunter2", "GET /x HTTP/1.1\r\nHost: x\r\n Authorization: Bearer hunter2", "GET /x HTTP/1.1\r\nAuthorization:\r\n hunter2",
    "GET /x HTTP/1.1\r\nhunter2", "GET _matrix/x?access_token=hunter2 HTTP/1.1\r\nHost: h", "GET ftp://h/x?access_token=hunter2 HTTP/1.1\r\nHost: h"])
def test_what_is_wrong_with_a_head_is_said_without_the_token_in_it(head):
    with refused("M_UNKNOWN", 400) as caught:
        asbridge.Request(head)
    assert "hunter2" not in caught.value.error


def test_too_large_a_head_is_431(serve):
    server = serve()
    many, long = b"A: b\r\n" * 101, b"A: " + b"b" * 200_000 + b"\r\n"
    for headers in (many, long):
        assert talk(server, b"GET / HTTP/1.1\r\nHost: h\r\n" + headers + b"\r\n").startswith(b"HTTP/1.1 431 ")
    assert talk(server, b"GET / HTTP/1.1\r\nHost: h\r\n" + b"A: b\r\n" * 99 + b"\r\n").startswith(b"HTTP/1.1 200 ")


def in_pieces(*pieces):
    """What reads a head that comes like this."""
    connection, left = asbridge.Connection.__new__(asbridge.Connection), list(pieces)
    connection.buffer = b""

    def receive(deadline):
        connection.buffer += left.pop(0)
        return True
    connection.receive = receive
    return connection.read_head


def test_a_head_is_the_same_in_whatever_pieces_it_comes():
    right, wrong = b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\nA: b\r\n"
    for cut in range(1, len(right)):
        assert in_pieces(b"\r\n", right[:cut], right[cut:])() == right[:-4]
    for cut in range(1, len(wrong)):
        with refused("M_UNKNOWN", 400, "CRLF"):
            in_pieces(wrong[:cut], wrong[cut:])()


def test_a_head_that_comes_byte_by_byte_is_looked_through_once(monkeypatch):
    looked, head = [], b"GET / HTTP/1.1\r\nHost: h\r\nA: " + b"x" * 5000 + b"\r\n\r\n"
    monkeypatch.setattr(asbridge, "BARE_LF", unittest.mock.Mock(search=lambda data, start=0: looked.append(len(data) - start)))
    assert in_pieces(*(head[n:n + 1] for n in range(len(head))))() == head[:-4] and sum(looked) < 6 * len(head)


def test_a_head_has_65536_bytes_at_most(serve):
    head = b"GET / HTTP/1.1\r\nHost: h\r\nA: "
    assert talk(serve(), head + b"b" * (asbridge.MAX_HEAD_BYTES - len(head) + 10) + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")


def test_the_answer_to_head_has_the_length_of_the_body_but_no_body(serve):
    server = serve(lambda request: asbridge.Response(200, b"12345", "text/plain", b"X-More: 1\r\n"))
    data = talk(server, b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert data == b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\nX-More: 1\r\n\r\n"


def test_a_head_that_is_refused_has_no_body_in_its_answer_either(serve):
    data = talk(serve(), b"HEAD /?%FF HTTP/1.1\r\nHost: h\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 400 ") and data.endswith(b"\r\n\r\n") and b"Content-Length: 0" not in data


# -- The HTTP server: bodies.

@pytest.mark.parametrize("body", [
    b"5\r\nhello\r\n0\r\n\r\n", b"2\r\nhe\r\n3;name=value\r\nllo\r\n0\r\nTrailer: x\r\n\r\n", b"00005\r\nhello\r\n000\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n"])
def test_a_body_may_come_in_chunks(serve, body):
    (_, _, answer), = answers_in(talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: Chunked\r\n\r\n" + body))
    assert answer["body"] == "hello"


@pytest.mark.parametrize("body", [b"x\r\n", b"-1\r\n", b"0x5\r\nhello\r\n", b"5\r\nhelloo\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"FFFFFFFFF\r\n", b"\r\n", pytest.param(b"5" * 5000, id="long"),
                                  b" 5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"1_0\r\n", b"5\n\r\nhello\r\n0\r\n\r\n", b"\n5\r\nhello\r\n0\r\n\r\n",
                                  b"5;a\nb\r\nhello\r\n0\r\n\r\n", b"5;a\rb\r\nhello\r\n0\r\n\r\n", b"5;\0\r\nhello\r\n0\r\n\r\n", b"5 a\r\nhello\r\n0\r\n\r\n",
                                  b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"0\r\nA: b\n\r\n\r\n", b"0\r\nA\rB: c\r\n\r\n", b"0\n\r\n\r\n"])
def test_a_chunk_that_is_not_what_it_says_is_refused(serve, body):
    data = talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"GET /evil HTTP/1.1\r\nHost: h\r\n\r\n")
    (status, headers, _), = answers_in(data)
    assert status == 400 and headers["connection"] == "close"


def test_a_body_in_chunks_has_100_trailers_at_most(serve):
    for trailers, status in ((100, 200), (101, 431)):
        body = b"0\r\n" + b"A: b\r\n" * trailers + b"\r\n"
        assert answers_in(talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body))[0][0] == status


@pytest.mark.parametrize("head, body", [(b"Content-Length: 100001", b""), (b"Transfer-Encoding: chunked", b"186A1\r\n"),
                                        (b"Transfer-Encoding: chunked", b"C350\r\n" + b"x" * 50_000 + b"\r\nC351\r\n")], ids=["length", "first chunk", "second chunk"])
def test_too_large_a_body_is_413(serve, head, body):
    (status, headers, answer), = answers_in(talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\n" + head + b"\r\n\r\n" + body))
    assert (status, answer["errcode"], headers["connection"]) == (413, "M_TOO_LARGE", "close") and "100000 bytes" in answer["error"]


def test_a_body_of_just_the_limit_is_taken(serve):
    (status, _, answer), = answers_in(talk(serve(), b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000))
    assert status == 200 and len(answer["body"]) == 100_000


def test_a_client_that_sends_too_large_a_body_gets_to_read_the_413(serve):
    client = asbridge.HttpClient(f"http://127.0.0.1:{serve().port}")
    with contextlib.closing(client):
        assert client.request("PUT", "/", b"x" * 8_000_000)[0] == 413


@pytest.mark.parametrize("head", [b"Content-Length: 65537", b"Transfer-Encoding: chunked", b"Expect: 100-continue\r\nContent-Length: 5"])
def test_after_a_body_that_is_too_long_to_skip_the_connection_is_closed(serve, head):
    server = serve(lambda request: asbridge.json_response(200, request.path))
    with connect(server) as sock:
        sock.sendall(b"POST /1 HTTP/1.1\r\nHost: h\r\n" + head + b"\r\n\r\n")
        (status, headers, _), = answers_in(read_all(sock))
    assert status == 200 and headers["connection"] == "close"


# -- The HTTP server: deadlines.

@pytest.mark.parametrize("reads", [0, 1000])
def test_a_client_that_does_not_read_its_answer_or_too_slowly_is_given_up(serve, monkeypatch, caplog, reads):
    monkeypatch.setattr(asbridge, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(asbridge, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(asbridge, "BODY_BYTES_PER_SECOND", 10**9)
    server = serve(lambda request: asbridge.Response(200, b"x" * 15_000_000))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0.01)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(GET)
        eventually(lambda: server.connections)

        def given_up():
            with contextlib.suppress(OSError):
                sock.recv(reads) if reads else None
            return not server.connections
        assert eventually(given_up) and not caplog.records


def test_an_answer_that_is_read_slowly_arrives_whole(serve, monkeypatch):
    patient, limit = threading.Event(), asbridge.time_limit

    def time_limit(sock, seconds):
        limit(sock, seconds)
        if seconds == asbridge.ANSWER_SECONDS:
            patient.set()
    monkeypatch.setattr(asbridge, "IDLE_SECONDS", 0.01)      # what does not fit has ANSWER_SECONDS
    monkeypatch.setattr(asbridge, "time_limit", time_limit)
    server = serve(lambda request: asbridge.Response(200, b"x" * 15_000_000))
    with connect(server) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        assert patient.wait(5)
        assert read_all(sock).count(b"x") >= 15_000_000


def test_a_client_that_does_not_wait_for_its_answer_harms_nobody(serve, caplog):
    reached, gone = threading.Event(), threading.Event()

    def app(request):
        reached.set()
        gone.wait(5)
        return asbridge.Response(200, b"x" * 1_000_000)
    server = serve(app)
    with connect(server) as sock:
        sock.sendall(GET)
        assert reached.wait(5)
    gone.set()
    assert eventually(lambda: not server.connections)
    assert talk(server, GET).startswith(b"HTTP/1.1 200 ") and not caplog.records


def test_after_a_body_that_did_not_come_in_time_the_rest_of_it_is_no_request(serve, monkeypatch):
    monkeypatch.setattr(asbridge, "HEAD_SECONDS", 0.05)
    monkeypatch.setattr(asbridge, "IDLE_SECONDS", 0.02)
    with connect(serve()) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 500\r\n\r\nabc")
        answer = b""
        while data := sock.recv(65_536):
            if not answer:
                sock.sendall(b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n")
            answer += data
    assert answer.startswith(b"HTTP/1.1 408 ") and answer.count(b"HTTP/1.1 ") == 1 and b"smuggled" not in answer


def test_a_head_has_a_deadline(serve, monkeypatch):
    monkeypatch.setattr(asbridge, "HEAD_SECONDS", 0.05)
    monkeypatch.setattr(asbridge, "IDLE_SECONDS", 0.02)
    with connect(serve()) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nA: ")
        (status, headers, _), = answers_in(read_all(sock))
    assert status == 408 and headers["connection"] == "close"


def test_a_silent_connection_may_stay(serve, monkeypatch):
    monkeypatch.setattr(asbridge, "HEAD_SECONDS", 0.01)
    monkeypatch.setattr(asbridge, "IDLE_SECONDS", 0.01)
    server = serve()
    with connect(server) as sock:
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.sendall(GET)
        sock.settimeout(5)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_body_in_chunks_has_one_deadline(serve, monkeypatch):
    monkeypatch.setattr(asbridge, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(asbridge, "BODY_BYTES_PER_SECOND", 10**9)
    with connect(serve()) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.settimeout(0.01)
        for _ in range(40):
            with contextlib.suppress(TimeoutError):
                assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
                return
            sock.sendall(b"1\r\nx\r\n")
    raise AssertionError("still reading")


# -- The HTTP server: what there is too little of, and the end.

def test_at_the_cap_the_connection_that_is_idle_for_longest_goes(serve):
    server = serve(max_connections=2)
    with connect(server) as first, connect(server) as second:
        for sock in (second, first):
            sock.sendall(GET)
            assert answers_in(sock.recv(65_536))[0][0] == 200
            eventually(lambda: all(connection.idle_since for connection in server.connections))
        assert talk(server, GET).startswith(b"HTTP/1.1 200 ")
        assert read_all(second) == b""
        first.sendall(GET)
        assert answers_in(first.recv(65_536))[0][0] == 200


def test_connections_leave_handles_for_the_rest(serve, monkeypatch):
    for limit, cap in ((250, 150), (50, 10), (-1, 10_000), (1_000_000, 10_000)):
        monkeypatch.setattr(os, "sysconf", lambda name, limit=limit: {"SC_OPEN_MAX": limit}[name])
        assert serve().max_connections == cap


def test_where_no_handle_is_left_the_connection_that_is_idle_for_longest_goes_and_it_is_said_once(serve, monkeypatch, caplog):
    server, take, missing = serve(), socket.socket.accept, [errno.EMFILE] * 3
    with connect(server) as idle:
        idle.sendall(GET)
        assert idle.recv(65_536)
        eventually(lambda: all(connection.idle_since for connection in server.connections))

        def accept(sock):
            if sock is server.socket and missing:
                raise OSError(missing.pop(), "Too many open files")
            return take(sock)
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert talk(server, GET).startswith(b"HTTP/1.1 200 ")
        assert read_all(idle) == b"" and not missing
    assert [record.getMessage() for record in caplog.records] == [
        f"no more connections can be taken on port {server.port}: Too many open files; there are 1 (ulimit -n and -u say what a process may have)"]


def test_where_no_thread_is_left_a_connection_is_closed_and_the_next_is_served(serve, monkeypatch, caplog):
    server, left = serve(), [3]

    def start_new_thread(*args):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        return real(*args)
    real = asbridge._thread.start_new_thread
    monkeypatch.setattr(asbridge._thread, "start_new_thread", start_new_thread)
    for _ in range(3):
        with connect(server) as sock:
            assert read_all(sock) == b""
    assert talk(server, GET).startswith(b"HTTP/1.1 200 ")
    assert len(caplog.records) == 1 and "can't start new thread" in caplog.text and "Traceback" not in caplog.text


def test_a_server_can_be_stopped_where_no_handle_or_thread_is_left(serve, monkeypatch):
    for name, error in (("create_connection", OSError(errno.EMFILE, "Too many open files")), (None, RuntimeError("can't start new thread"))):
        server = serve()
        with monkeypatch.context() as patch:
            patch.setattr(*((socket, name) if name else (threading.Thread, "start")), unittest.mock.Mock(side_effect=error))
            server.stop()
        with pytest.raises(OSError):
            connect(server).close()
        server.stop = lambda: None


def test_stopping_ends_idle_connections(serve):
    server = serve()
    with connect(server) as sock:
        sock.sendall(GET)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        server.stop()
        assert read_all(sock)[-1:] in (b"", b"}") and eventually(lambda: not server.connections)
        with pytest.raises(OSError):
            connect(server).close()
    server.stop = lambda: None


def test_a_server_that_was_never_started_can_be_stopped():
    server = asbridge.HttpServer(("127.0.0.1", 0), lambda request: asbridge.Response(200, b""))
    server.stop()
    with pytest.raises(OSError):
        connect(server).close()


# -- The HTTP client.

def test_the_client_keeps_its_connection_for_the_next_request(scripted, client):
    one = client(scripted(says(OK_ANSWER, 3)))
    assert [one.request("GET", "/", seconds=5) for _ in range(3)] == [(200, b"ok")] * 3


@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
def test_the_client_survives_a_server_that_closed_the_kept_connection(scripted, client, method):
    one = client(scripted(says(OK_ANSWER), says(OK_ANSWER)))
    assert one.request(method, "/", b"", seconds=5) == (200, b"ok")
    eventually(one._went_away)                               # the end of the stream has come
    assert one.request(method, "/", b"", seconds=5) == (200, b"ok")


@pytest.mark.skipif(os.name != "posix", reason="handles are numbered otherwise")
def test_the_client_keeps_its_connection_whatever_the_number_of_its_handle(scripted, client):
    asbridge.raise_handles()
    one, taken = client(scripted(says(OK_ANSWER, 3))), []
    try:
        while not taken or taken[-1] < 1030:                 # past what select() can take
            taken.append(os.open(os.devnull, os.O_RDONLY))
        assert [one.request("GET", "/", seconds=5) for _ in range(3)] == [(200, b"ok")] * 3
    finally:
        for handle in taken:
            os.close(handle)


def test_a_request_that_is_given_up_while_it_connects_is_not_sent(scripted, client):
    one = client(scripted(says(OK_ANSWER)))
    connect = one._connect
    one._connect = lambda deadline: (connect(deadline), one.abort())[0]
    with pytest.raises(OSError):
        one.request("PUT", "/", b"", seconds=5)


def hangs_up_on_the_second_request(sock):
    says(OK_ANSWER)(sock)
    sock.recv(65_536)


def test_a_request_on_a_kept_connection_that_ends_unanswered_is_repeated(scripted, client):
    one = client(scripted(hangs_up_on_the_second_request, says(OK_ANSWER)))
    assert [one.request("PUT", "/", b"", seconds=5) for _ in range(2)] == [(200, b"ok")] * 2


def test_a_post_is_not_repeated_for_it_may_have_been_done(scripted, client):
    one = client(scripted(hangs_up_on_the_second_request, says(OK_ANSWER)))
    assert one.request("POST", "/", b"", seconds=5) == (200, b"ok")
    with pytest.raises(ConnectionError):
        one.request("POST", "/", b"", seconds=5)


def test_a_request_on_a_new_connection_is_not_repeated(scripted, client):
    with pytest.raises(ConnectionError):
        client(scripted(lambda sock: sock.recv(100), says(OK_ANSWER))).request("PUT", "/", b"", seconds=5)


def test_a_repeated_request_keeps_its_deadline(scripted, client, monkeypatch):
    one, deadlines, exchange = client(scripted(hangs_up_on_the_second_request, says(OK_ANSWER))), [], asbridge.HttpClient._exchange
    monkeypatch.setattr(asbridge.HttpClient, "_exchange", lambda *given: (deadlines.append(given[5]), exchange(*given))[1])
    for _ in range(2):
        one.request("PUT", "/", b"", seconds=5)
    assert len(deadlines) == 3 and deadlines[1] == deadlines[2]


@pytest.mark.parametrize("start_of_answer", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
def test_an_answer_that_trickles_has_one_deadline(scripted, client, start_of_answer):
    over = threading.Event()

    def trickle(sock):
        sock.recv(65_536)
        sock.sendall(start_of_answer)
        while not over.wait(0.01):
            sock.sendall(b"H")
    one, began = client(scripted(trickle)), time.monotonic()
    with pytest.raises(TimeoutError):
        one.request("GET", "/", seconds=0.1)
    over.set()
    assert 0.09 <= time.monotonic() - began < 1 and one._connection is None


def test_a_server_that_says_nothing_is_given_up_in_time(scripted, client):
    over = threading.Event()
    with pytest.raises(TimeoutError):
        client(scripted(lambda sock: over.wait(5))).request("GET", "/", seconds=0.05)
    over.set()


def test_the_client_follows_no_redirect(scripted, client):
    url = scripted(says(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 2\r\n\r\nno"))
    assert client(url).request("GET", "/", seconds=5) == (302, b"no")


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"])
@pytest.mark.parametrize("size", [99, 100, 101])
def test_of_an_answer_no_more_than_the_limit_is_read(scripted, client, answer, size):
    one = client(scripted(says(answer % (size, b"x" * size))))
    if size <= 100:
        assert one.request("GET", "/", seconds=5, limit=100) == (200, b"x" * size)
    else:
        with pytest.raises(ValueError, match="100 bytes"):
            one.request("GET", "/", seconds=5, limit=100)
        assert one._connection is None


def test_an_answer_without_a_length_ends_with_the_connection(scripted, client):
    one = client(scripted(says(b"HTTP/1.0 200 OK\r\n\r\nhello"), says(OK_ANSWER)))
    assert [one.request("GET", "/", seconds=5) for _ in range(2)] == [(200, b"hello"), (200, b"ok")]


def test_an_answer_that_breaks_off_is_an_error(scripted, client):
    with pytest.raises(http.client.IncompleteRead):
        client(scripted(says(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"))).request("GET", "/", seconds=5)


@pytest.mark.parametrize("answer", [b"garbage\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + b"A: b\r\n" * 200 + b"\r\n"])
def test_an_answer_that_is_not_http_is_an_http_exception(scripted, client, answer):
    with pytest.raises(http.client.HTTPException):
        client(scripted(says(answer))).request("GET", "/", seconds=5)


@pytest.mark.parametrize("early", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n" * 3,
                                   b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"])
def test_an_answer_may_be_announced_by_others(scripted, client, early):
    one = client(scripted(says(early + OK_ANSWER, 2)))
    assert [one.request("GET", "/", seconds=5) for _ in range(2)] == [(200, b"ok")] * 2


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok, and more", OK_ANSWER * 2, b"HTTP/1.1 204 No\r\n\r\nbody", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"])
def test_what_comes_behind_an_answer_is_not_taken_for_the_next_one(scripted, client, answer):
    """The connection is left, though the server would keep it: the rest may come when the next request is under way."""
    one = client(scripted(says(answer, 2), says(OK_ANSWER)))
    assert one.request("GET", "/", seconds=5)[0] in (200, 204) and one._connection is None
    assert one.request("GET", "/", seconds=5) == (200, b"ok")


@pytest.mark.parametrize("start_of_answer, more", [
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), (b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 60_000 + b"\r\n"), (b"", b"H" * 5000),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 5000),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"e" * 5000 + b"\r\nx\r\n"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: trailer\r\n" * 100)])
def test_of_an_answer_that_does_not_end_little_is_read(scripted, client, start_of_answer, more):
    sent = []

    def floods(sock):
        sock.recv(65_536)
        sock.sendall(start_of_answer)
        while True:
            sock.sendall(more)
            sent.append(len(more))
    one = client(scripted(floods))
    with pytest.raises((ValueError, http.client.HTTPException)):
        one.request("GET", "/", seconds=5, limit=1000)
    assert one._connection is None and sum(sent) < 20_000_000        # what the kernel's buffers hold is no matter of ours


@pytest.mark.parametrize("answer, seen", [(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno", (413, b"no")), (OK_ANSWER, None)])
def test_a_server_that_answers_and_closes_before_it_has_the_request_is_heard_if_it_refuses(scripted, client, answer, seen):
    def hasty(sock):
        sock.recv(100)
        sock.sendall(answer)
    one, body = client(scripted(hasty)), b"x" * 30_000_000
    if seen:
        assert one.request("PUT", "/", body, seconds=5) == seen and one._connection is None
    else:
        with pytest.raises(ConnectionResetError, match="200 and closed before it had the request"):
            one.request("PUT", "/", body, seconds=5)


def test_over_tls_too_an_answer_that_trickles_has_one_deadline(scripted, client, monkeypatch):
    """Without certificates, which nobody wants to renew here."""
    ssl, over = pytest.importorskip("ssl"), threading.Event()

    def context(protocol):
        made = ssl.SSLContext(protocol)
        made.check_hostname, made.verify_mode, made.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
        made.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
        return made
    monkeypatch.setattr(ssl, "create_default_context", lambda: context(ssl.PROTOCOL_TLS_CLIENT))

    def serve(sock):
        with context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(sock, server_side=True) as tls:
            tls.recv(65_536)
            tls.sendall(OK_ANSWER)
            tls.recv(65_536)
            while not over.wait(0.01):
                tls.sendall(b"H")
    one = client(scripted(serve).replace("http:", "https:"))
    assert one.request("GET", "/", seconds=5) == (200, b"ok")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        one.request("POST", "/", b"", seconds=0.1)
    over.set()
    assert 0.09 <= time.monotonic() - began < 1 and one._connection is None


def test_the_client_keeps_the_path_of_the_url_and_uses_no_proxy(serve, client, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    one = client(f"http://127.0.0.1:{serve().port}/as/irc/")
    assert json.loads(one.request("GET", "/_matrix/app/v1/x?y=1", headers={"X-Y": "z"})[1])["path"] == "/as/irc/_matrix/app/v1/x"


def test_a_refused_connection_is_an_os_error(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        client(f"http://127.0.0.1:{port}").request("GET", "/", seconds=5)


# -- SQLite.

@pytest.mark.parametrize("name", ["a b.db", "a?mode=ro.db", "a#b%20.db", "é.db"])
def test_any_file_name_may_be_a_database(tmp_path, name):
    with contextlib.closing(asbridge.open_sqlite(str(tmp_path / name))) as db:
        db.execute("CREATE TABLE t (x)")
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",) and db.execute("PRAGMA synchronous").fetchone() == (2,)
    with contextlib.closing(asbridge.open_sqlite(str(tmp_path / name), read_only=True)) as db, pytest.raises(sqlite3.OperationalError):
        db.execute("INSERT INTO t VALUES (1)")
    assert (tmp_path / name).exists()


# ============================================================================
# 3. Registrations and namespaces
# ============================================================================

# -- What an application service claims.

@pytest.mark.parametrize("regex, id, matches", [
    ("@_irc_.*", "@_irc_bob:localhost", True), ("@_irc_", "@_irc_bob:localhost", True), ("_irc_.*", "@_irc_bob:localhost", False), (".*_irc_", "@_irc_bob:localhost", True),
    ("^@_irc_.*", "@_irc_bob:localhost", True), ("@_irc_.*:localhost$", "@_irc_bob:localhost", True), ("@_irc_b$", "@_irc_bob:localhost", False), ("@_IRC_", "@_irc_bob:localhost", False),
    ("@a|@_irc", "@_irc_bob:localhost", True), ("a|_irc", "@_irc_bob:localhost", False), ("@_irc_.*", "@x_irc_bob:localhost", False)])
def test_a_namespace_is_matched_from_the_start_of_the_id(regex, id, matches):
    claims = registrations_of(registration(users=[regex])).claims("users", id)
    assert [str(claim) for claim in claims] == ([f"{id} matches users[0]"] if matches else [])


def test_rooms_and_aliases_are_matched_whole():
    both = registrations_of(registration(aliases=["#_irc_.*:localhost"], rooms=["!abc", "!x.*"]))
    assert [str(claim) for claim in both.claims("rooms", "!xyz")] == ["!xyz matches rooms[1]"]
    assert both.claims("aliases", "#_irc_a:localhost") and not both.claims("aliases", "#_irc_a:other") and not both.claims("users", "!abc:localhost")


@pytest.mark.parametrize("id", ["@_irc_bob:elsewhere", "@_irc_bob", "@_irc_bob:localhost:8448", "@_irc_bob:LOCALHOST", "@_irc_bot:elsewhere"])
def test_only_local_users_are_in_a_namespace(id):
    assert registrations_of(registration(users=[".*"])).claims("users", id) == ()


@pytest.mark.parametrize("regex, yes, no", [
    ("[[:alnum:]]+", "aZ5", "_"), ("[[:alpha:]]", "aZ", "5_"), ("[[:digit:]]", "5", "a٥"), ("[[:upper:]]", "A", "a"), ("[[:lower:]]", "a", "A"), ("[[:space:]]", " \t\n\v\f\r", "a\x1c\x1f\x08\x0e"),
    ("[[:blank:]]", " \t", "\na"), ("[[:punct:]]", "!@[]\\^`{|}~-_./", "a5 "), ("[[:xdigit:]]", "0aF", "g"), ("[[:cntrl:]]", "\x00\x7f", "a"), ("[[:graph:]]", "a!", " \x7f"),
    ("[[:print:]]", "a ", "\x7f\n"), ("[^[:alnum:]]", "_-", "a5"), ("[[:alpha:]_.-]", "a_.-", "5"), ("[]a]", "]a", "b"), ("[^]a]", "b", "]a"), ("[a[:digit:]-]", "a5-", "b"),
    ("\\[[:alpha:]", "", "a"), ("[\\]x]", "]x", "\\"), ("[[:digit:][:upper:]]", "5A", "a")])
def test_posix_character_classes_are_translated(regex, yes, no):
    pattern = asbridge.compile_regex(regex)
    assert [one for one in yes if not pattern.match(one)] == [] and [one for one in no if pattern.match(one)] == []


@pytest.mark.parametrize("regex", ["[[:foo:]]", "(", "[a", "a**", "\\", "(?a)(?u)x", "a{99999999999999999999}", "(" * 2000 + ")" * 2000],
                         ids=["class", "(", "[a", "a**", "backslash", "flags", "repeats", "brackets"])
def test_what_is_no_regex_is_an_error(regex):
    with pytest.raises(re.error):
        asbridge.compile_regex(regex)


@pytest.mark.filterwarnings("ignore:Possible")
@pytest.mark.parametrize("regex", ["[" * 20_000, "[[:a" * 10_000, "[[:a:" * 10_000, "[" * 20_000 + "\\"], ids=range(4))
def test_a_bracket_that_does_not_end_is_refused_in_no_time(regex):
    began = time.process_time()
    with pytest.raises(re.error):
        asbridge.compile_regex(regex)
    assert time.process_time() - began < 1


def test_what_is_longer_than_an_id_is_held_against_no_regex_and_not_remembered():
    some = registrations_of(registration(users=["@_irc_.*"]))
    long = "@_irc_" + "x" * 240 + ":localhost"
    assert some.claims("users", long) == () and some.claims("users", long[:6] + long[7:]) and some.known.cache_info().currsize == 1
    with refused("M_INVALID_PARAM"):
        asbridge.explain(some, long)


def test_what_an_id_matches_is_remembered():
    some = registrations_of(registration())
    assert some.claims("users", "@_irc_a:localhost") is some.claims("users", "@_irc_a:localhost")
    assert some.known.cache_info().maxsize


# -- Whose is it? Who owns an ID, and who may create it.

def test_the_own_user_of_an_application_service_is_in_its_namespace_and_exclusive():
    claim, = registrations_of(registration(users=["@_irc_.*"], exclusive=False)).claims("users", "@_irc_bot:localhost")
    assert claim.exclusive and claim.namespace is None and str(claim) == "@_irc_bot:localhost is its sender_localpart user"


def test_several_application_services_may_have_to_do_with_one_id_each_with_its_first_reason():
    some = registrations_of(registration("a", users=["@x", "@x_.*"]), registration("b", users=["@nobody", "@x_y"]), registration("c", users=["@y"]))
    assert [(claim.registration.id, str(claim)) for claim in some.claims("users", "@x_y:localhost")] == [
        ("a", "@x_y:localhost matches users[0]"), ("b", "@x_y:localhost matches users[1]")]


def test_an_exclusive_entry_counts_before_one_that_is_not():
    data = registration(namespaces={"users": [{"regex": "@x.*", "exclusive": False}, {"regex": "@x_.*", "exclusive": True}]})
    some = registrations_of(data)
    assert some.owner("users", "@x_y:localhost").namespace.index == 1 and some.owner("users", "@xy:localhost") is None


def test_the_owner_is_who_claims_exclusively():
    some = registrations_of(registration("a", users=["@x_.*"], exclusive=False), registration("b", users=["@x_.*"]))
    a, b = some
    assert some.owner("users", "@x_1:localhost").registration is b and some.owner("users", "@x_1:localhost", other_than=b) is None
    assert some.owner("users", "@x_1:localhost", other_than=a).registration is b and some.owner("aliases", "#x_1:localhost") is None


def test_a_person_may_create_what_nobody_claims_exclusively():
    some = registrations_of(registration("a", users=["@x_.*"], aliases=["#x_.*"], exclusive=False))
    some.check_may_create("users", "@x_1:localhost", None)
    some.check_may_create("aliases", "#x_1:localhost", None)
    some.check_may_create("users", "@alice:localhost", None)


@pytest.mark.parametrize("kind, id, told", [("users", "@_irc_1:localhost", "users[0] '@_irc_.*'"), ("aliases", "#_irc_1:localhost", "aliases[0] '#_irc_.*'"),
                                            ("users", "@_irc_bot:localhost", "sender_localpart user"), ("users", "@_other_bot:localhost", "sender_localpart user")])
def test_a_person_may_not_create_inside_an_exclusive_namespace_and_is_told_whose_it_is(kind, id, told):
    some = registrations_of(registration(), registration("other", users=[], aliases=[]))
    with refused("M_EXCLUSIVE", 400, told) as caught:
        some.check_may_create(kind, id, None)
    assert id in caught.value.error and repr("other" if "_other_" in id else "irc") in caught.value.error


def test_an_application_service_may_create_inside_its_namespace_only():
    some = registrations_of(registration(users=["@_irc_.*", "@_x_.*"]), registration("none", users=()))
    some.check_may_create("users", "@_irc_1:localhost", some.by_id["irc"])
    some.check_may_create("users", "@_irc_bot:localhost", some.by_id["irc"])
    with refused("M_EXCLUSIVE", 400, "'@_irc_.*', '@_x_.*'"):
        some.check_may_create("users", "@alice:localhost", some.by_id["irc"])
    with refused("M_EXCLUSIVE", 400, "no regex"):
        some.check_may_create("users", "@alice:localhost", some.by_id["none"])


def test_an_exclusive_claim_binds_every_other_application_service_also_one_that_claims_the_same():
    some = registrations_of(registration("a", users=["@x_.*"], exclusive=False), registration("b", users=["@x_.*"]))
    with refused("M_EXCLUSIVE", 400, "'b'"):
        some.check_may_create("users", "@x_1:localhost", some.by_id["a"])
    some.check_may_create("users", "@x_1:localhost", some.by_id["b"])


def test_an_application_service_may_act_as_the_users_of_its_namespaces_exclusive_or_not():
    some = registrations_of(registration(users=["@alice:.*"], exclusive=False))
    some.check_claims(some.by_id["irc"], "users", "@alice:localhost", "M_FORBIDDEN")
    some.check_claims(some.by_id["irc"], "users", "@_irc_bot:localhost", "M_FORBIDDEN")


@pytest.mark.parametrize("user_id", ["@bob:localhost", "@_irc_x:elsewhere", "", "nonsense", "@_other_bot:localhost"])
def test_an_application_service_may_not_act_as_anybody_else(user_id):
    some = registrations_of(registration(), registration("other"))
    with refused("M_FORBIDDEN", 403, "'@_irc_.*'"):
        some.check_claims(some.by_id["irc"], "users", user_id, "M_FORBIDDEN")


def test_an_application_service_is_found_by_the_digest_of_its_token():
    some = registrations_of(registration())
    digest = hashlib.sha256(b"as-irc").digest()
    assert some.of_as_token(digest).id == "irc" and some.of_hs_token(digest) is None and some.of_as_token(b"") is None


# -- Whose is it? Who is interested.

def audience(*data, room_id="!r:localhost", members=(), aliases=()):
    return asbridge.Audience(registrations_of(*data), room_id, members, aliases)


@pytest.mark.parametrize("keys, sender, target, reason", [
    ({}, "@_irc_a:localhost", None, "sender @_irc_a:localhost matches users[0]"),
    ({}, "@alice:localhost", "@_irc_a:localhost", "target @_irc_a:localhost matches users[0]"),
    ({}, "@_irc_b:localhost", "@_irc_a:localhost", "sender @_irc_b:localhost matches users[0]"),
    ({}, "@_irc_bot:localhost", None, "sender @_irc_bot:localhost is its sender_localpart user"),
    ({"members": ["@alice:localhost", "@_irc_a:localhost"]}, "@alice:localhost", None, "member @_irc_a:localhost matches users[0]"),
    ({"members": ["@_irc_bot:localhost"]}, "@alice:localhost", None, "member @_irc_bot:localhost is its sender_localpart user"),
    ({"aliases": ["#x:localhost", "#_irc_x:localhost"]}, "@alice:localhost", None, "alias #_irc_x:localhost matches aliases[0]"),
    ({"room_id": "!_irc_r"}, "@alice:localhost", None, "room !_irc_r matches rooms[0]"),
    ({"members": ["@alice:localhost", "@_irc_a:elsewhere"], "aliases": ["#x:localhost"]}, "@alice:localhost", "@bob:localhost", None)])
def test_an_application_service_is_interested_for_a_reason(keys, sender, target, reason):
    found = audience(registration(rooms=["!_irc_.*"]), **keys).interested(sender, target)
    assert found == ({"irc": reason} if reason else {})


def test_each_interested_application_service_gets_its_own_reason():
    one = audience(registration("a", users=["@a_.*"]), registration("b", users=["@b_.*"]), registration("c", users=["@c_.*"]), members=["@b_1:localhost"])
    assert one.interested("@a_1:localhost", "@c_1:localhost") == {"a": "sender @a_1:localhost matches users[0]", "c": "target @c_1:localhost matches users[0]",
                                                                  "b": "member @b_1:localhost matches users[0]"}


def test_interest_ends_with_the_last_that_it_hangs_on():
    one = audience(registration(), members=["@_irc_a:localhost", "@_irc_b:localhost"], aliases=["#_irc_x:localhost"])
    told = []
    for kind, id in (("users", "@_irc_a:localhost"), ("users", "@_irc_b:localhost"), ("users", "@_irc_b:localhost"), ("aliases", "#_irc_x:localhost")):
        one.remove(kind, id)
        told.append(one.interested("@alice:localhost", None).get("irc"))
    assert told == ["member @_irc_b:localhost matches users[0]", "alias #_irc_x:localhost matches aliases[0]", "alias #_irc_x:localhost matches aliases[0]", None]
    one.add("users", "@_irc_a:localhost")
    assert "irc" in one.interested("@alice:localhost", None)


def test_a_message_in_a_busy_room_costs_no_regex():
    one = audience(registration(), members=["@_irc_a:localhost", "@alice:localhost"])
    one.interested("@alice:localhost", None)
    misses = one.registrations.known.cache_info().misses
    for _ in range(10):
        one.interested("@alice:localhost", None)
    assert one.registrations.known.cache_info().misses == misses


# -- Whose is it? URIs.

@pytest.mark.parametrize("kind, uri, id", [
    ("users", "irc://localhost/Bob,isuser", "@_irc_bob:localhost"), ("users", "irc://localhost/b%5Bo%5D,isnick", "@_irc_b=5bo=5d:localhost"), ("users", "irc://localhost/a%2Cb,isnick", "@_irc_a=2cb:localhost"),
    ("users", "irc://localhost/bob", None), ("users", "xirc://localhost/bob,isuser", None), ("users", "irc://localhost/bob,isuser#x", None), ("users", "irc://localhost/bob,isuser\n", None),
    ("aliases", "irc://localhost/%23lobby", "#_irc_lobby:localhost"), ("aliases", "irc://localhost/#lobby", "#_irc_lobby:localhost"), ("aliases", "irc://localhost/Lob%C3%A9,ischannel", "#_irc_Lobé:localhost"),
    ("aliases", "irc://elsewhere/lobby", None), ("aliases", "", None)])
def test_a_uri_that_matches_as_a_whole_is_an_id(kind, uri, id):
    assert registrations_of(with_uris()).map_uri(kind, uri) == id


def test_the_first_rule_that_matches_wins_and_the_result_must_be_in_that_namespace():
    first = registration("a", users=["@a_.*"], uris={"users": [{"regex": "x:(?P<n>.*)", "user_id": "@b_{n}:{server_name}"}, {"regex": "(?P<n>.*)", "user_id": "@a_1:{server_name}"}]})
    some = registrations_of(first, registration("b", users=["@b_.*"], uris={"users": [{"regex": "x:.*", "user_id": "@b_1:{server_name}"}]}))
    assert some.map_uri("users", "x:1") is None and some.map_uri("users", "y:1") == "@a_1:localhost" and some.map_uri("aliases", "y:1") is None


@pytest.mark.parametrize("template", [None, 5, "@{other}:x", "@{}:x", "@{0}:x", "@{nick.x}:x", "@{nick[0]}:x", "@{nick", "@nick}"])
def test_a_template_has_the_named_groups_of_its_regex_and_server_name(template):
    one, findings = read_registration(registration(uris={"users": [{"regex": "(?P<nick>.*)", "user_id": template}]}))
    assert one is None and findings[0].startswith("x.yaml: uris.users[0].user_id: ")


@pytest.mark.parametrize("regex, template", [
    ("x:(?P<server_name>.*)", "@_irc_{server_name}:localhost"),
    ("x:(?P<n>.*)", "@_irc_{n:d}:localhost"), ("x:(?P<n>.*)", "@_irc_{n:>999999999999}:x")])
def test_a_template_that_cannot_be_filled_is_refused_at_the_start(regex, template):
    assert read_registration(registration(uris={"users": [{"regex": regex, "user_id": template}]}))[1]


@pytest.mark.parametrize("kind, uri", [("users", f"irc://localhost/{'x' * 300},isuser"), ("aliases", "irc://localhost/a:b"), ("aliases", "irc://localhost/a%00b"), ("aliases", "irc://localhost/" + "x" * 300)])
def test_what_a_uri_is_mapped_to_is_an_id_of_this_server(kind, uri):
    assert registrations_of(with_uris()).map_uri(kind, uri) is None


# -- Why? What explain() says.

def explainer(*registrations):
    return functools.partial(asbridge.explain, asbridge.Registrations("localhost", [asbridge.read_registration(one, "here") for one in registrations]))


def test_explain_names_who_claims_a_user_who_owns_it_and_who_may_create_it():
    explain = explainer(registration(url="http://x"), registration("all", users=["@.*"], exclusive=False, url="http://y"), registration("no", users=[]))
    said = explain("@_irc_bob:localhost")
    assert [(one["id"], one["matches"], one["exclusive"]) for one in said["appservices"]] == [
        ("irc", True, True), ("all", True, False), ("no", False, False)]
    assert said["owner"] == {"appservice": "irc", "reason": "@_irc_bob:localhost matches users[0]"} and said["may_create"] == ["irc"]
    assert [query["appservice"] for query in said["query"]] == ["irc", "all"]
    assert said["query"][0]["request"] == "GET /_matrix/app/v1/users/%40_irc_bob%3Alocalhost"
    free = explain("@carol:localhost")
    assert free["owner"] is None and free["may_create"] == ["people", "all"] and explain("@Carol:localhost")["may_create"] == ["all"]
    assert explain("@_irc_bot:localhost")["appservices"][0]["reason"] == "@_irc_bot:localhost is its sender_localpart user"
    assert explain("@_irc_bob:elsewhere.org")["local"] is False and not explain("@_irc_bob:elsewhere.org")["appservices"][0]["matches"]


def test_explain_takes_aliases_room_ids_and_uris_and_says_what_else_is_none_of_them():
    explain = explainer({**asbridge.SAMPLE_REGISTRATION}, registration("rooms", rooms=["!abc.*"], exclusive=False))
    assert explain("#_irc_x:localhost")["kind"] == "alias" and explain("#_irc_x:localhost")["owner"]["appservice"] == "irc"
    assert explain("!abcd:localhost")["appservices"][1]["matches"] and explain("!abcd:localhost")["query"] == []
    uri = explain("irc://localhost/Bob,isnick")
    assert uri["kind"] == "uri" and uri["maps_to"] == "@_irc_bob:localhost" and [one["maps_to"] for one in uri["uris"]] == ["@_irc_bob:localhost", None]
    assert explain("irc://elsewhere/x")["maps_to"] is None
    for nonsense in ("", "bob", "$event", " @x:y", "http:"):
        with refused("M_INVALID_PARAM", 400, "URI"):
            explain(nonsense)


@pytest.mark.parametrize("regex, id, miss", [
    ("@irc_.*",                 "@Irc_bob:localhost",     "differs at character 2: 'irc_.*' is wanted, 'Irc_bob:localhost' is there; it is only the case"),
    ("@irc_.*",                 "@alice:localhost",       "differs at character 2: 'irc_.*' is wanted, 'alice:localhost' is there"),
    ("@irc_[a-z]+:example.org", "@irc_bob:localhost",     "differs at character 10: 'example.org' is wanted, 'localhost' is there"),
    ("@irc_[0-9]{3}",           "@irc_12",                "differs at character 7: '{3}' is wanted, '2' is there"),
    ("irc_.*",                  "@irc_bob:localhost",     "differs at character 1: 'irc_.*' is wanted"),
    ("@irc_bob:localhost.de",   "@irc_bob:localhost",     "differs at character 19: '.de' is wanted, nothing is there"),
    ("@(irc|xmpp)_.*",          "@icq_x:localhost",       "differs at character 2: '(irc|xmpp)_.*' is wanted, 'icq_x:localhost' is there"),
])
def test_the_nearest_miss_of_a_regex_is_where_the_id_stops_being_what_it_wants(regex, id, miss):
    namespace = asbridge.Namespace("users", 0, regex, True, asbridge.compile_regex(regex))
    assert asbridge.explain_namespace(namespace, id)["miss"] == miss and not asbridge.explain_namespace(namespace, id)["matches"]


@pytest.mark.parametrize("regex, id, matches, unanchored, whole", [
    ("@irc_.*",   "@irc_bob:localhost",       True,  True,  True),
    ("@irc_",     "@irc_bob:localhost",       True,  True,  False),
    ("irc_.*",    "@irc_bob:localhost",       False, True,  False),
    ("@x.*",      "@irc_bob:localhost",       False, False, False),
])
def test_a_namespace_says_how_a_search_and_a_full_match_would_decide(regex, id, matches, unanchored, whole):
    namespace = asbridge.Namespace("users", 0, regex, True, asbridge.compile_regex(regex))
    said = asbridge.explain_namespace(namespace, id)
    assert (said["matches"], said["unanchored"], said["whole"]) == (matches, unanchored, whole)


# -- Reading a registration.

def test_a_registration_has_the_keys_of_the_specification():
    data = registration(url="http://h:1/base", rate_limited=True, protocols=["irc"], receive_ephemeral=True, **{"de.sorunome.msc2409.push_ephemeral": True,
                        "org.matrix.msc3202": True, "io.element.msc4190": True, "asbridge.sample": {"irc_port": 6667}, "com.example": 1})
    one, findings = read_registration(data)
    assert not findings and (one.id, one.url, one.as_token, one.hs_token, one.sender_localpart) == ("irc", "http://h:1/base", "as-irc", "hs-irc", "_irc_bot")
    assert (one.rate_limited, one.protocols, one.receive_ephemeral, one.push_ephemeral, one.msc3202) == (True, ("irc",), True, True, True)
    assert one.sample == {"irc_port": 6667} and one.unknown == ("com.example",) and one.sender("h") == "@_irc_bot:h"


def test_what_a_registration_need_not_have_has_defaults():
    one, findings = read_registration({key: registration()[key] for key in ("id", "url", "as_token", "hs_token", "sender_localpart")} | {"namespaces": {}})
    assert not findings and one.url is None and one.rate_limited is True and not one.receive_ephemeral and one.protocols == () and one.namespaces["rooms"] == ()


@pytest.mark.parametrize("key", ["id", "url", "as_token", "hs_token", "sender_localpart", "namespaces"])
def test_a_registration_without_a_required_key_is_refused(key):
    one, findings = read_registration({name: value for name, value in registration().items() if name != key})
    assert one is None and len(findings) == 1 and findings[0].startswith(f"x.yaml: {key}: is missing; write ")


@pytest.mark.parametrize("key, value", [
    *[(key, value) for key in ("id", "as_token", "hs_token", "sender_localpart") for value in (5, None, ["x"], True)], ("id", ""), ("as_token", ""), ("hs_token", ""),
    ("url", 5), ("url", "localhost:1"), ("url", "ftp://h"), ("url", "http://"), ("url", "http://h?x=1"), ("url", ""), ("sender_localpart", ""),
    ("sender_localpart", "@bot:localhost"), ("sender_localpart", "a b"), ("sender_localpart", "x" * 201), ("namespaces", []), ("namespaces", None), ("rate_limited", "no"), ("rate_limited", 0),
    ("receive_ephemeral", "true"), ("org.matrix.msc3202", 1), ("uris", []), *(("asbridge.sample", value) for value in (None, [], "abc", 5, True)), ("protocols", 5),
    *(("url", value) for value in ("http://[::1", "http://localhost:abc", "http://localhost:99999", "http://a b:80"))])
def test_a_key_of_the_wrong_kind_is_one_finding_that_names_it(key, value):
    one, findings = read_registration(registration(**{key: value}))
    assert one is None and len(findings) == 1 and findings[0].startswith(f"x.yaml: {key}: ") and "; write " in findings[0]


def test_an_empty_registration_lacks_every_required_key():
    assert len(read_registration({})[1]) == 6


@pytest.mark.parametrize("data", [None, [], "x", 5])
def test_a_registration_that_is_no_object_is_refused(data):
    one, findings = read_registration(data)
    assert one is None and len(findings) == 1 and "is not an object" in findings[0]


@pytest.mark.parametrize("entry, where", [
    ({"regex": "@a"}, "exclusive"), ({"exclusive": True}, "regex"), ({"regex": "@a", "exclusive": "true"}, "exclusive"), ({"regex": "@a", "exclusive": None}, "exclusive"),
    ({"regex": 5, "exclusive": True}, "regex"), ({"regex": "(", "exclusive": True}, "regex"), ({"regex": "[[:foo:]]", "exclusive": True}, "regex"),
    ({"regex": "a{99999999999}", "exclusive": True}, "regex"), ({"regex": "*a", "exclusive": False}, "regex")])
@pytest.mark.parametrize("kind", ["users", "aliases", "rooms"])
def test_each_entry_of_a_namespace_must_have_regex_and_exclusive(kind, entry, where):
    good = {"regex": "@ok", "exclusive": True}
    one, findings = read_registration(registration(namespaces={kind: [good, entry]}))
    assert one is None and len(findings) == 1 and findings[0].startswith(f"x.yaml: namespaces.{kind}[1].{where}: ")


@pytest.mark.parametrize("value", [5, {}, "x", True])
def test_a_namespace_that_is_no_list_is_refused(value):
    assert read_registration(registration(namespaces={"aliases": value}))[1][0].startswith("x.yaml: namespaces.aliases: ")


def test_everything_that_is_wrong_is_found_at_once():
    _, findings = read_registration({"id": 5, "url": "x", "as_token": "t", "hs_token": "t", "namespaces": {"users": [5, {"regex": "("}], "rooms": 1}, "rate_limited": "no",
                                     "uris": {"users": [{"regex": "(?P<a>.)", "user_id": "{b}"}], "aliases": 5}, "asbridge.sample": {"irc_port": "x"}})
    wanted = ["id", "url", "sender_localpart", "hs_token", "rate_limited", "namespaces.users[0].regex", "namespaces.users[0].exclusive", "namespaces.users[1].regex",
              "namespaces.users[1].exclusive", "namespaces.rooms", "uris.users[0].user_id", "uris.aliases", "asbridge.sample.irc_port"]
    assert sorted(finding.split(": ")[1] for finding in findings) == sorted(wanted)


def test_no_token_stands_in_a_finding_or_in_the_text_of_a_registration():
    one, _ = read_registration(registration(as_token="SECRET-A", hs_token="SECRET-H"))
    assert "SECRET" not in repr(one) + str(one) + repr(asbridge.Claim(one, "@a:b", None))
    for token in ("SECRET", ["SECRET"], {"a": "SECRET"}):
        assert "SECRET" not in "".join(read_registration(registration(as_token=token, hs_token=token))[1] + read_registration(registration(as_token=token))[1])


@pytest.mark.parametrize("text", ['{"id": "\\ud800"}', '{"id": NaN}', '{"id": [Infinity]}', '{"\\udc00": 1}', '{"a": ' + "[" * 100_000, "a: " + "[" * 2000], ids=range(6))
def test_what_json_cannot_hold_and_what_is_nested_too_deeply_is_no_registration(text):
    with pytest.raises(ValueError):
        asbridge.parse_registration(text)


def together_findings(*data):
    """What check_together finds between registrations that stand in a.yaml, b.yaml, …"""
    return [str(finding) for finding in asbridge.check_together(in_files(*data))]


def test_id_and_as_token_are_unique():
    assert together_findings(registration(), registration("b"), registration("c")) == []
    same_id, = together_findings(registration(), registration(as_token="other", hs_token="x"))
    same_token, = together_findings(registration(), registration("b", as_token="as-irc"))
    assert same_id.startswith("b.yaml: id: is already that of a.yaml") and same_token.startswith("b.yaml: as_token: is already that of a.yaml")


def test_a_token_of_one_is_not_the_other_token_of_another():
    findings = together_findings(registration(), registration("b", hs_token="as-irc"))
    assert any("b.yaml: hs_token: is the as_token of a.yaml" in finding for finding in findings) and "as-irc" not in "".join(findings)


def test_three_registrations_alike_are_two_findings_for_each_key():
    assert len(together_findings(registration(), registration(), registration())) == 4


def test_a_registration_file_is_loaded_or_everything_wrong_with_it_is_said(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(registration("one")))
    assert asbridge.load_registration(str(path)).id == "one"
    path.write_text(json.dumps({**registration("one"), "url": "x", "hs_token": 5}))
    with pytest.raises(asbridge.ConfigError) as caught:
        asbridge.load_registration(str(path))
    assert len(caught.value.findings) == 2


# -- YAML. To be skipped at first reading.

HEISENBRIDGE = """\
id: heisenbridge
url: http://127.0.0.1:9898
as_token: abcDEF0123
hs_token: ghiJKL4567
rate_limited: false
sender_localpart: heisenbridge
namespaces:
    users:
    - regex: '@irc_.*'
      exclusive: true
    - regex: '@heisenbridge:.*'
      exclusive: true
    aliases: []
    rooms: []
"""
PYYAML = """\
as_token: abcDEF0123
hs_token: ghiJKL4567
id: heisenbridge
namespaces:
  aliases: []
  rooms: []
  users:
  - exclusive: true
    regex: '@irc_.*'
  - exclusive: true
    regex: '@heisenbridge:.*'
rate_limited: false
sender_localpart: heisenbridge
url: http://127.0.0.1:9898
"""
PYYAML_FLOW = """\
---
as_token: abcDEF0123
hs_token: ghiJKL4567
id: heisenbridge
namespaces:
  aliases: []
  rooms: []
  users:
  - {exclusive: true, regex: '@irc_.*'}
  - {exclusive: true, regex: '@heisenbridge:.*'}
rate_limited: false
sender_localpart: heisenbridge
url: http://127.0.0.1:9898
"""
JS_YAML = """\
id: heisenbridge
url: 'http://127.0.0.1:9898'
as_token: abcDEF0123
hs_token: ghiJKL4567
rate_limited: false
sender_localpart: heisenbridge
namespaces:
  users:
    - regex: '@irc_.*'
      exclusive: true
    - regex: '@heisenbridge:.*'
      exclusive: true
  aliases: []
  rooms: []
"""
GO_YAML = """\
id: heisenbridge
url: http://127.0.0.1:9898
as_token: abcDEF0123
hs_token: ghiJKL4567
rate_limited: false
sender_localpart: heisenbridge
namespaces:
    users:
        - regex: '@irc_.*'
          exclusive: true
        - regex: '@heisenbridge:.*'
          exclusive: true
    aliases: []
    rooms: []
"""
BY_HAND = """\
\ufeff# Registration of the bridge
"id":   heisenbridge      # a comment
'url':  "http://127.0.0.1:9898"

as_token: "abcDEF0123"\r
hs_token:
  ghiJKL4567
rate_limited: False
sender_localpart: heisenbridge
namespaces:
  users:
  -
    regex: "@irc_.*"      # it's a regex
    exclusive: True

  # - regex: '@no_.*'
  - exclusive: TRUE
    regex: '@heisenbridge:.*'
  aliases: [ ]            # none
  rooms: []"""


@pytest.mark.parametrize("text", [HEISENBRIDGE, PYYAML, PYYAML_FLOW, JS_YAML, GO_YAML, BY_HAND],
                         ids=["ruamel", "PyYAML", "PyYAML-flow", "js-yaml", "yaml.v3", "by-hand"])
def test_yaml_that_bridges_write_is_read(text):
    assert asbridge.parse_registration(text) == {
        "id": "heisenbridge", "url": "http://127.0.0.1:9898", "as_token": "abcDEF0123", "hs_token": "ghiJKL4567", "rate_limited": False,
        "sender_localpart": "heisenbridge", "namespaces": {"users": [{"regex": "@irc_.*", "exclusive": True}, {"regex": "@heisenbridge:.*", "exclusive": True}],
                                                           "aliases": [], "rooms": []}}


def test_a_registration_may_be_json():
    assert asbridge.parse_registration('\ufeff {"id": "é",\n "url": null}') == {"id": "é", "url": None}
    with pytest.raises(ValueError, match="line 2"):
        asbridge.parse_registration('{"id":\n oops}')


@pytest.mark.parametrize("text, value", [
    ("null", None), ("~", None), ("", None), ("Null", None), ("true", True), ("FALSE", False), ("yes", "yes"), ("off", "off"), ("5", 5), ("-7", -7), ("1.5", 1.5),
    ("0x1f", "0x1f"), ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("2001-01-01", "2001-01-01"), ("a b", "a b"), ("a#b", "a#b"), ("a # b", "a"),
    ("http://h:1/p?x=1#f", "http://h:1/p?x=1#f"), ("'it''s #1'", "it's #1"), ("it's", "it's"), ("it's # x", "it's"), ("say \"hi\"", "say \"hi\""), ("''", ""), ('""', ""),
    ('"\\\\d \\"q\\" \\x41\\u00e9 \\/ \\t"', "\\d \"q\" Aé / \t"), ("'\\d: # [a]'", "\\d: # [a]"), ("\\d+", "\\d+"), ("^@_?irc_([a-z0-9]+|x{1,3}):localhost$", "^@_?irc_([a-z0-9]+|x{1,3}):localhost$"),
    ("[]", []), ("{}", {}), ("[a, 'b, c', 5, [null]]", ["a", "b, c", 5, [None]]), ("{exclusive: true, regex: '@a:.*'}", {"exclusive": True, "regex": "@a:.*"}),
    ("[{a: 1}, {b: http://h:1/}]", [{"a": 1}, {"b": "http://h:1/"}]), ("---", "---"), ("-x", "-x"), (":x", ":x"), ("[a :b]", ["a :b"]), ("?a", "?a"), (".", "."), ("日本", "日本"), ("$x", "$x"), ("a\\", "a\\"),
    ('"\\\\x41 \\\\u0041"', "\\x41 \\u0041"), ('"\\U0001F600 \\ud83d\\ude00"', "😀 😀"), ('"\\0\\a\\b\\t\\n\\v\\f\\r\\e\\ \\N\\_\\L\\P"', "\0\a\b\t\n\v\f\r\x1b \x85\xa0\u2028\u2029"), ("don 't # x", "don 't"), ("a, 'b # c'", "a, 'b"), ("[a, 'b # c', d]", ["a", "b # c", "d"]), ("[it's, b\"c\", http://h:1]", ["it's", 'b"c"', "http://h:1"]), ('{"a":"b # c","d": [\'# e\']}', {"a": "b # c", "d": ["# e"]}),
    ("'a' # 'b'", "a"), ('"a # b" # c', "a # b"), ("[a, b] # c]", ["a", "b"]), ('{"a" :"b # c"} #', {"a": "b # c"}), ("[a#b, c#]", ["a#b", "c#"]), ("# a", None),
    ("\xa0a\xa0", "\xa0a\xa0"), ("a\u3000b", "a\u3000b"), ("{1: a, true: b, null: c}", {"1": "a", "true": "b", "null": "c"}), ("a:\xa0b", "a:\xa0b")])
def test_a_scalar_of_yaml_is_the_value_that_yaml_says(text, value):
    assert asbridge.Yaml(f"key: {text}\nlast: 1\n").read() == {"key": value, "last": 1}


@pytest.mark.parametrize("text, value", [
    ("", None), ("# nothing\n\n", None), ("- 1\n- - 2\n  - 3\n-\n- a: 1\n  b:\n  - 4\n", [1, [2, 3], None, {"a": 1, "b": [4]}]),
    ("a:\n- b:\n    c: 1\n  d: 2\ne:\n", {"a": [{"b": {"c": 1}, "d": 2}], "e": None}), ("a.b: 1\n'c d': 2\n", {"a.b": 1, "c d": 2}),
    ("-   a: 1\n    b: 2\n", [{"a": 1, "b": 2}]), ("plain", "plain")])
def test_a_block_of_yaml_is_a_mapping_or_a_list(text, value):
    assert asbridge.Yaml(text).read() == value


@pytest.mark.parametrize("text, line", [
    ("a: 1\nb: &x 2\n", 2), ("a: *x\n", 1), ("a: !!bool 'true'\n", 1), ("a: 1\nb: |\n  text\n", 2), ("a: >-\n  text\n", 1), ("a: 1\n---\nb: 2\n", 2), ("%YAML 1.2\n---\na: 1\n", 1),
    ("a: 1\n...\n", 2), ("... a\n", 1), ("---\ta\n", 1), ("a: 1\nb: 2\na: 3\n", 3), ("a:\n\tb: 1\n", 2), ("a: b: c\n", 1), ("a: 1\nb: [1, 2\n", 2), ("a: {b: 1\n", 1), ("a: [1 2]]\n", 1), ("a: {b}\n", 1),
    ("a: 'open\n", 1), ("a: \"open\n", 1), ("a: 'b' c\n", 1), ('a: "\\q"\n', 1), ("a: plain\n  goes on\n", 2), ("a: 1\n  b: 2\n", 2), ("a:\n    b: 1\n  c: 2\n", 3),
    ("a: 1\n\n# c\n- 2\n", 4), ("- 1\na: 2\n", 2), ("a: %x\n", 1), ("a: @x\n", 1), ("a: `x`\n", 1), ("a: [1,, 2]\n", 1), ("b: [}\n", 1),
    ("a: 1\nb: ]\n", 2), ("a: -\n", 1), ("a: - b\n", 1), ("? a\n", 1), ("a: ? b\n", 1), ("a: : b\n", 1), ("a: [- b]\n", 1), ("a: , b\n", 1), ("---\n---\na: 1\n", 2), ("a: {[b]: c}\n", 1),
    ("a: {? b: c}\n", 1), ("a: [?b]\n", 1), ("a: {,}\n", 1), ("a: [\xa0]\nb: [,\n", 2), ("a: 1\n\xa0b: 2\n", 2), ("a: 1\nb: \x0b\n", 2), ("# \x1b[2J\na: 1\n", 1), ("a: 1\u2028b: 2\n", 1), ("a: x\x85\n", 1), ("a: x\ufeff\n", 1),
    (f"a: {'9' * 5000}\n", 1), ("a: 1.0e999\n", 1), ("a: 1\nb: \"\\ud800\"\n", 2), ('a: "\\x4"\n', 1), ('a: "\\U00110000"\n', 1), ('a: "\\Uffffffff"\n', 1), ('a: "b" "c"\n', 1), ("a: ' # b\n", 1), ("a: 'b'# c\n", 1), ("a: [b # c]\n", 1), ("a: [b]# c\n", 1),
    ("it's: 1\nb: 2\n", 1), ("a: 1\nb:\n  @c: 1\n  d: 2\n", 3), ("a: {exclusive: true, exclusive: false}\n", 1)])
def test_yaml_that_is_not_read_is_refused_with_its_line_number(text, line):
    with pytest.raises(ValueError, match=rf"^line {line}: "):
        asbridge.parse_registration(text)


@pytest.mark.parametrize("token", ["1e3", "12345e678", "1E+5", "089", "012"])
def test_digits_without_a_point_that_are_no_integer_are_a_text(token):
    assert asbridge.Yaml(f"as_token: {token}\n").read() == {"as_token": token}


def test_a_line_full_of_quotes_is_read_in_no_time():
    def seconds(quotes):
        began = time.perf_counter()
        with contextlib.suppress(asbridge.YamlError):
            asbridge.Yaml("a: " + "x'y" * quotes + ' "')
        return time.perf_counter() - began
    assert min(seconds(26) for _ in range(3)) < 40 * min(seconds(13) for _ in range(3))


@pytest.mark.parametrize("text", ["a" + " " * 20_000 + "b: 1", "a: " + "x y " * 5000, "a: '" + "''" * 10_000, "a: [" + "b, " * 6000, "- " * 400 + "a", "a: " + "# " * 10_000,
                                  'a: "' + "\\\\" * 10_000, "a: [" + "b " * 10_000, "a: 1\nb: 2\n" + "c: \n" * 5000], ids=range(9))
def test_no_yaml_of_20_kb_takes_long_to_read(text):
    began = time.process_time()
    with contextlib.suppress(asbridge.YamlError):
        asbridge.Yaml(text).read()
    assert time.process_time() - began < 1


def test_an_apostrophe_in_a_comment_belongs_to_the_comment():
    assert asbridge.Yaml("a: don't # it's\n").read() == {"a": "don't"}


# -- What a regex can match. To be skipped at first reading.

def tree_of(regex):
    return asbridge.tree_of(asbridge.compile_regex(regex))


def steps(tree, text):
    """How many steps Python's way of matching takes until it has tried everything: the first alternative first, back to the next where it fails."""
    count = 0

    def match(parts, at, then):
        nonlocal count
        count += 1
        if not parts:
            return then(at)
        part, rest = parts[0], parts[1:]
        if isinstance(part, asbridge.OneOf):
            if part.first <= asbridge.EDGES:
                return (at == 0 if "start" in part.first else at == len(text)) and match(rest, at, then)
            return at < len(text) and text[at] in part.first and match(rest, at + 1, then)
        if isinstance(part, asbridge.Chain):
            return match(part.parts + rest, at, then)
        if isinstance(part, asbridge.Choice):
            return any(match((one, *rest), at, then) for one in part.parts)
        again = asbridge.Repeat(part.part, max(0, part.low - 1), part.high - 1)
        more = part.high > 0 and match((part.part,), at, lambda end: (end > at) and match((again, *rest), end, then))
        return more or (part.low == 0 and match(rest, at, then))
    match((tree,), 0, lambda at: False)
    return count


HARMLESS = [
    "@_irc_.*", "@_irc_.*:example\\.org", "^@_irc_.*:localhost$", "@x_([a-z]+_)*[0-9]+", "@(?P<name>[^:]+):localhost", "@([a-z0-9.]+_)+bot", "@irc_(?:a|b|cd)*:x", "@.*_.*:x",
    "(?i)@IRC_[a-z]*[0-9]", "@[[:alnum:]]+_[[:digit:]]+:x", "", ".*", "@a?b?c?", "@(?:irc|xmpp|telegram)_.*", "@_irc_[^_]*_.*:x", "@a{2,5}b", "@(ab|ac)*d", r"@\w+:x", "@.{1,64}:x", "[^ -~]+é", "(?i)(a|A)*b"]
EXPONENTIAL = ["(a+)+$", "(a|a)*b", "@(.*)*:x", "([a-z]+)*[0-9]", "(a*)*b", "(a|ab?)*c", "(?:a|aa)+$", "([a-z]*_?)*:", "(.*a){30}b", "(?:[a-z]+)+[0-9]", "(\\w+\\d?)*!", "(a?){40}b",
               "a?" * 30 + "b", "(?:a|b?a)" * 30 + "c", "(?x)(a+) *b", "(?s)(?:.|\n)*b", "(?i)(?:k|\u212ax?)*b"]

# What bridges put into their registrations, and what is written by hand for them.
OF_BRIDGES = [
    "^@whatsapp_.*:example\\.org$", "^@whatsappbot:example\\.org$", "^@signal_[0-9a-f-]{36}:example\\.org$", "@telegram_[0-9]+:example\\.org", "#telegram_.*:example\\.org", "^@.*:example\\.org$", "@hbirc_.*",
    "^@heisenbridge:example\\.org$", "@irc_.*:example\\.org", "#irc_.*:example\\.org", "@irc\\.example\\.org_.*", "@_github_.*:example\\.org", "#github_(.+)_(.+):example\\.org", "#github_disc_(.+)_(.+)_([0-9]+):example\\.org",
    "@_webhooks_.*", "#jira_.*:example\\.org", "@_discordpuppet_.*:example\\.org", "@_mx_puppet_slack_.*", "@_discord_.*", "#_discord_[0-9]+_[0-9]+:example\\.org", "@!discord_.*", "@slack_[a-zA-Z0-9]+_U[A-Z0-9]+:.*", "@gitter_.*", "#gitter_.*",
    "@_xmpp_.*", "#_bifrost_[^_]+_.*", "@_(?:facebook|instagram)_.*", "@(?:heisenbridge|hbirc_.*):example\\.org", "#twitter_@.*", "@_irc_[[:alnum:]_]+:example\\.org", ".*:example\\.org", "!.*"]


@pytest.mark.parametrize("regex", HARMLESS)
def test_a_harmless_regex_costs_little_for_255_characters_whatever_they_are(regex):
    pattern = asbridge.compile_regex(regex)
    assert asbridge.cost_of(pattern).verdict == "harmless"
    for hostile in ("a", "_", "@", "ab", "a_", "@a", "aab", "x_a", "1", "a1", ":x", "a:"):
        for start in ("", "@", "@x_", "@_irc_", "@irc_"):
            text = start + (hostile * 255)[:254 - len(start)] + "!"
            before = time.thread_time()
            pattern.match(text)
            assert time.thread_time() - before < 0.05


def test_the_regexes_of_bridges_in_use_are_harmless():
    kinds = {"users": [], "aliases": [], "rooms": []}
    for regex in OF_BRIDGES:
        kinds[{"#": "aliases", "!": "rooms"}.get(regex[0], "users")].append(regex)
    assert [regex for regex in OF_BRIDGES if asbridge.cost_of(asbridge.compile_regex(regex)).verdict != "harmless"] == [] and read_registration(registration(**kinds))[0]


@pytest.mark.parametrize("regex", EXPONENTIAL)
def test_an_exponential_regex_is_known_as_one_and_says_why(regex):
    cost = asbridge.cost_of(asbridge.compile_regex(regex))
    assert cost.verdict == "exponential" and cost.reason.startswith("it ")


@pytest.mark.parametrize("regex,char", [("(a+)+$", "a"), ("(a|a)*b", "a"), ("(.*)*:x", "a"), ("([a-z]+)*[0-9]", "z"), ("(a|ab?)*c", "a"), ("([a-z]*_?)*:", "a")])
def test_each_further_character_doubles_the_steps_of_an_exponential_regex(regex, char):
    counts = [steps(tree_of(regex), char * n + "!") for n in (6, 7, 8, 9)]
    assert all(after > 1.6 * before for before, after in itertools.pairwise(counts)), counts


@pytest.mark.parametrize("regex", HARMLESS)
def test_the_steps_of_a_harmless_regex_are_within_its_bound(regex):
    cost, tree = asbridge.cost_of(asbridge.compile_regex(regex)), tree_of(regex)
    for text in ("a" * 40, "@x_" + "ab_" * 12, "@_irc_" + "_a" * 20, "@irc_" + "abcd" * 9, "@" + "a_" * 20):
        assert steps(tree, text) <= 30 * len(text) * max(cost.ways, len(text))


@pytest.mark.parametrize("regex,ways", [("@_irc_.*", 1), ("@x_([a-z]+_)*[0-9]+", 1), ("@.*:x", 256), ("@.*_.*:x", 65536), ("@(?:irc|xmpp)_", 1), ("@(a|[ab])c", 1), ("@(a|ab?)c", 2), ("@a?a", 2), ("@a{3}a", 1),
                                        ("@.*_.*_.*:x", 256**3), ("@(?:a|b){1,3}a", 3), ("@[^:]*:x", 1), ("@([a-z]+\\.)*[a-z]+:x", 128)])
def test_the_ways_of_a_regex_multiply_in_a_row_add_up_in_a_choice_and_are_one_where_the_next_character_decides(regex, ways):
    cost = asbridge.cost_of(asbridge.compile_regex(regex))
    assert cost.ways == ways and cost.verdict == ("harmless" if ways <= 100_000 else "heavy")


@pytest.mark.parametrize("regex,what", [("@(?=a).*", "a look-around"), ("@(?!a).*", "a look-around"), ("(?<=@)a", "a look-around"), ("(?<!@)a", "a look-around"), ("(?!)", "a look-around"),
                                        (r"@(.)\1", "a back-reference"), ("(?P<a>.)(?P=a)", "a back-reference"), ("(@)?(?(1)a|b)", "a condition"), ("@(?>a+)b", "an atomic group"),
                                        ("@a++b", "a possessive repeat"), (r"@a\b", "a word boundary"), ("@(?i:a)", "flags in its middle"), ("(?a)(?:\\W|é)*b", "the flag a or m"), ("(?m)(?:^a\n|a\n)*b", "the flag a or m"), ("(" * 60 + "a" + "?)" * 60, None)])
def test_what_no_tree_can_show_is_not_analysable_and_named(regex, what):
    cost = asbridge.cost_of(asbridge.compile_regex(regex))
    assert (cost.verdict, cost.reason) == ("not analysable", what) if what else cost.verdict != "not analysable"


@pytest.mark.parametrize("regexes,text", [
    (["a"], "a"), (["a", "b"], None), ([".*_irc", "foo_.*"], "foo_irc"), (["[a-z]+_.*", "irc.*"], "irc_"), (["a*b", "[^b]*c?b"], "b"), (["(ab)+", "a(ba)*b", "....+"], "abab"), (["a{3}", "a{2,4}", "a+"], "aaa"),
    (["(?i)ABC", "abc"], "abc"), ([r"\d\w\s", "5. "], "5a "), (["[^a-z]", "[a-c]"], None), (["é", "[а-я]"], "é"), (["a|b|", "b|c"], "b"), ([""], ""), (["a{0}b", "b"], "b"), (["[]]", "."], "]"),
    (["^a$", "a"], "a"), (["a$b", "a.*b"], None), (["^^a$$", "a"], "a")])
def test_a_shortest_text_that_several_regexes_match_is_found(regexes, text):
    assert asbridge.common(*(asbridge.chain(asbridge.BEFORE, tree_of(regex), asbridge.BEHIND) for regex in regexes)) == text


@pytest.mark.parametrize("regex", ["@.*[ab].{12}:x", "@" + "(a?)" * 60 + ":x", "@.{0,200}_.{0,200}:x", "@[a-z]{0,255}[a-z0-9]{0,255}:x", "@(a|b|ab|ba)*(x{0,50}y{0,50}){0,20}:x"])
def test_a_search_for_a_common_text_ends_soon_with_or_without_one(regex):
    before = time.thread_time()
    with contextlib.suppress(asbridge.NotAnalysable):
        assert re.match(regex, asbridge.common(asbridge.ids_of("users", "x"), asbridge.chain(tree_of(regex), asbridge.ANYTHING)))
    assert time.thread_time() - before < 5


@pytest.mark.parametrize("where,data", [
    ("namespaces.users[0].regex", registration(users=["@(a+)+:example\\.org"])), ("namespaces.aliases[0].regex", registration(aliases=["#" + ".*a" * 8])),
    ("uris.users[0].regex", registration(uris={"users": [{"regex": "(a+)+", "user_id": "@_irc_x:{server_name}"}]}))])
def test_a_regex_that_can_take_for_ever_is_refused_with_the_reason(where, data):
    one, findings = read_registration(data)
    assert one is None and len(findings) == 1 and findings[0].startswith(f"x.yaml: {where}: ") and "can take for ever: it " in findings[0]


def test_a_uri_is_longer_than_an_id_and_matched_as_a_whole_so_that_its_regex_has_to_be_plainer():
    cost = [asbridge.cost_of(asbridge.compile_regex("x:(.*),(.*),(.*)"), uri).verdict for uri in (False, True)]
    assert cost == ["harmless", "exponential"] and asbridge.cost_of(asbridge.compile_regex("x:([^,]*),([^,]*),(.*)"), uri=True) == ("harmless", 2049, "it can match a text in 2,049 ways")
    one, findings = read_registration(registration(uris={"users": [{"regex": "x:(.*),(.*),(.*)", "user_id": "@_irc_x:{server_name}"}]}))
    assert one is None and "uris.users[0].regex" in findings[0] and "can take for ever" in findings[0]


@pytest.mark.parametrize("regex", [*EXPONENTIAL, "@.*_.*_.*:x", r"@a\b", "@(?=a).*", r"@(.)\1", "(?m)@a", "@a++b", "@a?+b", "(?:a|b|ab|ba){0,16}c"])
def test_each_regex_that_is_refused_or_warned_of_is_looked_at(regex):
    assert asbridge.DESERVES_A_LOOK.search(regex)
    assert asbridge.cost_of(asbridge.compile_regex(regex)).verdict in (("exponential",) if regex in EXPONENTIAL else ("heavy", "not analysable"))


@pytest.mark.parametrize("regex", [r"#(?:\d+[^0-9])*x", r"#(?:\s+[^ ])*x", r"#(?:\w+[^a-z0-9_])*x"])
def test_digits_letters_and_spaces_are_more_than_those_of_ascii(regex):
    assert asbridge.cost_of(asbridge.compile_regex(regex)).verdict == "exponential"


@pytest.mark.parametrize("regex", [r"@(?:\w+[^\w])*x", r"@(?:[a-z]+[^a-zé])*x", r"@(?:\d+[^\d])*x"])
def test_what_is_no_member_of_a_class_is_none_beyond_ascii_either(regex):
    assert asbridge.cost_of(asbridge.compile_regex(regex)).verdict == "harmless"


# -- The doctor: what can be used, and is not what was meant. To be skipped at first reading.

def told(*data, server_name="example.org", port=8008):
    """The doctor's findings in registrations that stand in a.yaml, b.yaml, …"""
    return asbridge.Doctor(server_name, port).examine(in_files(*data))


def complaints(*data, **keys):
    """The same in short: the level, where without the file, and the name of the complaint."""
    def name(finding):
        return next(name for name, texts in asbridge.COMPLAINTS.items() if all(
            re.fullmatch(re.sub(r"\\\{\w+\\\}", ".*", re.escape(text)), said) for text, said in zip(texts, (finding.level, finding.what, finding.why, finding.right), strict=True)))
    return [(finding.level, finding.where, name(finding)) for finding in told(*data, **keys)]


CLEAN = {
    "heisenbridge": registration_for(["@irc_.*:example\\.org", "@heisenbridge:example\\.org"], sender_localpart="heisenbridge", url="http://127.0.0.1:9898"),
    "mautrix-python": registration_for(["@telegram_.*:example\\.org", "@telegrambot:example\\.org"], ["\\#telegram_.*:example\\.org"], url="http://localhost:29317", sender_localpart="a8sd7f6a",
                                       **{"de.sorunome.msc2409.push_ephemeral": True, "push_ephemeral": True}),
    "mautrix-go": registration_for(["^@whatsappbot:example\\.org$", "^@whatsapp_.*:example\\.org$"], url="http://localhost:29318", **{"io.element.msc4190": True, "receive_ephemeral": True}),
    "matrix-appservice-irc": registration_for(["@oftc_.*:example\\.org"], ["#oftc_#.*:example\\.org"], protocols=["irc"], url="http://localhost:8090", sender_localpart="ircbot"),
    "double puppet": registration_for(["@.*:example\\.org"], exclusive=False, url=None, sender_localpart="x8f0b1"),
    "archive": registration_for(rooms=["!.*"], exclusive=False),
}


@pytest.mark.parametrize("name", CLEAN)
def test_of_a_registration_as_bridges_write_them_the_doctor_says_nothing(name):
    assert told(CLEAN[name]) == []


@pytest.mark.parametrize("regex,server_name", [("@_irc_.*", "localhost"), ("@irc_.*", "example.org"), ("@_irc_bridge_.*", "example.org")])
def test_the_examples_of_the_specification_get_one_gentle_warning(regex, server_name):
    assert complaints(registration_for([regex], [regex.replace("@", "#")]), server_name=server_name) == [("warning", "a.yaml: namespaces.users[0].regex", "open")]


@pytest.mark.parametrize("kind,regex,complaint,better", [
    ("users", "_irc_.*", "never", "@_irc_.*"), ("users", "^_irc_.*:example\\.org$", "never", "@_irc_.*:example\\.org$"), ("users", "#_irc_.*", "never", "@_irc_.*"), ("users", "@_irc_bob$", "never", "@_irc_bob"),
    ("aliases", "irc_.*", "never", "#irc_.*"), ("rooms", "[a-z]+", "never", "![a-z]+"), ("users", "@irc_ .*", "never", "@irc_.*:example\\.org"), ("users", "x(?P<a>.)", "never", "@x(?P<a>.)"),
    ("users", "@irc_.*:other\\.org", "elsewhere", "@irc_.*:example\\.org"), ("users", "^@irc_.*:localhost$", "elsewhere", "^@irc_.*:example\\.org$"), ("aliases", "#irc_.*:other", "elsewhere", "#irc_.*:example\\.org"),
    ("users", "", "empty", "@irc_.*:example\\.org"), ("users", ".*", "everybody", "@irc_.*:example\\.org"), ("users", "@.*", "everybody", "@irc_.*:example\\.org"), ("users", "@.*:example\\.org", "everybody", "@irc_.*:example\\.org"),
    ("aliases", "#", "everybody", "#irc_.*:example\\.org")])
def test_a_regex_that_is_wrong_is_an_error_with_what_to_write_instead(kind, regex, complaint, better):
    assert ("error", f"a.yaml: namespaces.{kind}[0].regex", complaint) in complaints(registration_for(**{kind: [regex]}))
    assert better in "".join(finding.right for finding in told(registration_for(**{kind: [regex]})) if finding.level == "error")


@pytest.mark.parametrize("kind,regex,complaint,better", [
    ("users", ".*_irc.*:example\\.org", "no sigil", "@.*_irc.*:example\\.org"), ("users", "@irc_.*:example.org", "dot", "@irc_.*:example\\.org"), ("users", "@irc.bot_.*:example\\.org", "dot", "@irc\\.bot_.*:example\\.org"),
    ("users", "@a_.*:example\\.org|b_.*:example\\.org", "unanchored", "@a_.*:example\\.org|@b_.*:example\\.org"), ("aliases", "#a_.*:example\\.org|irc_.*:example\\.org", "unanchored", "|#irc_"),
    ("users", "@_irc_", "part", "@_irc_.*"), ("users", "@_irc_[a-z]+", "part", "@_irc_[a-z]+.*"), ("users", "@_irc_[[:alnum:]]+:example\\.org", "posix", "@_irc_[a-zA-Z0-9]+:example\\.org"),
    ("users", "@_irc_(?!bot).*:example\\.org", "not analysable", "do without"), ("users", r"@(.)\1.*:example\.org", "not analysable", "do without"), ("users", "@.*_.*_.*:example\\.org", "heavy", "[^_]*_")])
def test_a_regex_that_may_not_be_what_was_meant_is_a_warning_with_what_to_write_instead(kind, regex, complaint, better):
    found = registration_for(**{kind: [{"regex": regex, "exclusive": kind != "rooms"}]})
    assert [(level, name) for level, _, name in complaints(found) if name != "open"] == [("warning", complaint)]
    assert better in "".join(finding.right for finding in told(found))


@pytest.mark.parametrize("regex", ["@irc_.*:example\\.org", "@irc_[a-z.]+:example\\.org", "@irc_[^a.b]*:example\\.org", "@irc_\\d.x:example\\.org", "@irc_a.*b:example\\.org", "@irc_.+:example\\.org", "@irc_..:example\\.org"])
def test_a_dot_that_is_meant_to_match_anything_is_not_complained_of(regex):
    assert "dot" not in [name for _, _, name in complaints(registration_for([regex]))]


def test_an_exclusive_room_namespace_is_warned_of_for_the_specification_leaves_it_undefined():
    assert complaints(registration_for(rooms=["!.*:example\\.org"])) == [("warning", "a.yaml: namespaces.rooms[0].regex", "exclusive rooms")]


def test_an_entry_that_stands_twice_is_warned_of():
    assert complaints(registration_for(["@a:example\\.org", "@a:example\\.org"], ["#a:example\\.org"])) == [("warning", "a.yaml: namespaces.users[1].regex", "twice")]


def test_that_no_server_is_named_is_said_once_with_what_others_would_take():
    finding, = told(registration_for(["@irc_.*", "@x:example\\.org", "@bot:.*"], ["#irc_.*"]))
    assert finding.level == "warning" and finding.what.count("; neither does ") == 2 and "@irc_:elsewhere" in finding.why and "'@irc_.*:example\\.org'" in finding.right


@pytest.mark.parametrize("key", ["as_token", "hs_token"])
@pytest.mark.parametrize("token", ["example-as-token-change-me-wfghWEGh3wgWHEf3478sHFWE", "30c05ae90a248a4188e620216fa72e349803310ec83e2a77b34fe90be6081f46", "312df522183efd404ec1cd22d2ffa4bbc76a8c1ccf541dd692eef281356bb74e", "secret",
                                   "test", "as_token", "This value is generated when generating the registration", "<random string here>", "0" * 40, "a1b2c3d4e5f6a7b", "CHANGE_ME_CHANGE_ME"])
def test_a_token_that_can_be_guessed_is_warned_of_and_never_printed(key, token):
    finding, = told(registration_for(["@a:example\\.org"], **{key: token}))
    assert finding.level == "warning" and finding.where == f"a.yaml: {key}" and finding.what.startswith(("looks like an example", "has 15 characters"))
    assert token not in (repr(finding) if token not in ("test", "secret", "as_token") else finding.what)


@pytest.mark.parametrize("url,level,complaint,better", [
    ("http://0.0.0.0:9009/base", "warning", "any address", "'http://127.0.0.1:9009/base'"), ("http://[::]:9009", "warning", "any address", "'http://127.0.0.1:9009'"),
    ("http://h:9009/_matrix/app/v1", "error", "path", "'http://h:9009'"), ("http://h/base/_matrix/app/v1/", "error", "path", "'http://h/base'"),
    ("http://127.0.0.1:8008", "error", "own port", "where the application service listens"), ("http://localhost:8008", "error", "own port", "where the application service listens")])
def test_a_url_that_leads_elsewhere_is_complained_of(url, level, complaint, better):
    data = registration_for(["@a:example\\.org"], url=url)
    assert complaints(data) == [(level, "a.yaml: url", complaint)] and better in told(data)[0].right


@pytest.mark.parametrize("url", ["http://127.0.0.1:9009/base", "http://bridge:8008", "https://example.org", None])
def test_a_url_that_can_be_called_is_not_complained_of(url):
    assert told(registration_for(["@a:example\\.org"], url=url)) == []


@pytest.mark.parametrize("more,key,near", [({"recieve_ephemeral": True}, "recieve_ephemeral", "receive_ephemeral"), ({"namespaces": {"user": []}}, "namespaces.user", "namespaces.users")])
def test_a_key_that_nobody_reads_is_warned_of_with_the_nearest_one(more, key, near):
    finding, = told({**registration_for(), **more})
    assert (finding.level, finding.where, finding.right) == ("warning", f"a.yaml: {key}", f"the nearest one is '{near}'")


@pytest.mark.parametrize("user_id,found", [("@y_{n}:{server_name}", ["uri"]), ("@x_{n}:other", ["uri"]), ("@x_{n}:{server_name}", [])])
def test_a_uri_that_would_be_mapped_out_of_the_namespaces_is_an_error_with_an_example(user_id, found):
    data = registration_for(["@x_.*:example\\.org"], uris={"users": [{"regex": "x:(?P<n>[a-z]+)", "user_id": user_id}]})
    assert [name for _, _, name in complaints(data)] == found and all("of x:a" in finding.what for finding in told(data))


@pytest.mark.parametrize("regex", [r"@(?:(?:(?:\w)?){20})*irc", r"@(?:irc){3,}\w{100}", "@" + "(?:" * 200 + "a" + ")?" * 200, "@" + "|".join(f"a{n}.*" for n in range(300))])
def test_the_doctor_soon_gives_up_what_is_too_much_for_it(regex):
    began = time.process_time()
    namespace = asbridge.Namespace("users", 0, regex, True, asbridge.compile_regex(regex))
    list(asbridge.NamespaceDoctor(namespace, "localhost").examine())
    if asbridge.cost_of(namespace.pattern).verdict != "exponential":
        asbridge.explain_namespace(namespace, "@nobody:localhost")
    assert time.process_time() - began < 3


def test_the_nearest_miss_in_another_case_is_asked_for_only_where_that_is_harmless():
    regex = "@(?:[a-z]+[A-Z])*_x"
    assert asbridge.cost_of(asbridge.compile_regex(regex)).verdict == "harmless" and asbridge.without_case(regex) is None
    assert "differs at character" in asbridge.nearest_miss(regex, "@" + "a" * 60)[1]


@pytest.mark.parametrize("regex,right", [("@_irc_.*|@_dc_.*", "(?:@_irc_.*|@_dc_.*):example\\.org"), ("@_irc_", "@_irc_.*"), ("@_irc_|@_dc_", "(?:@_irc_|@_dc_).*"), ("@_irc_.+:[^:]+", "@_irc_.+:example\\.org")])
def test_what_the_doctor_says_to_write_still_claims_what_was_claimed(regex, right):
    found = told(registration_for([regex]))
    assert any(right in finding.right for finding in found), [str(finding) for finding in found]
    assert not any(f"{regex}:example" in finding.right for finding in found)


@pytest.mark.parametrize("one,other,example", [
    ("@irc_.*", "@irc_x_.*", "@irc_x_:example.org"), ("@irc_.*", "@.*_irc:.*", "@irc_irc:example.org"), ("@[a-z]+_.*", "@irc.*:example\\.org", "@irc_:example.org"), ("@irc_.*", "@xmpp_.*", None), ("@a$", "@a.*", None),
    ("@irc_[a-m].*", "@irc_[n-z].*", None), ("@irc_.*:example\\.org", "@irc_.*:other", None), ("@irc_(?=x).*", "@irc_.*", None)])
@pytest.mark.parametrize("exclusive", [True, False])
def test_two_that_claim_the_same_exclusively_are_an_error_with_an_id_that_both_match(one, other, example, exclusive):
    both = registration_for([one]), registration_for([{"regex": other, "exclusive": exclusive}], id="b")
    found = [finding for finding, (*_, name) in zip(told(*both), complaints(*both), strict=True) if name == "overlap"]
    assert len(found) == bool(example and exclusive) and all(f"matches {example}, and" in finding.what and finding.level == "error" for finding in found)
    assert all(re.match(regex, example) for regex in (one, other) if example)


def test_two_that_have_the_same_sender_localpart_are_an_error():
    assert complaints(registration_for(), registration_for(id="b", sender_localpart="ircbot")) == [("error", "b.yaml: sender_localpart", "same sender")]


def test_a_sender_localpart_in_the_exclusive_namespace_of_another_is_an_error():
    theirs = registration_for(["@b.*:example\\.org"])
    assert complaints(theirs, registration_for(id="b")) == [("error", "b.yaml: sender_localpart", "taken sender")]
    assert complaints(registration_for(id="b"), theirs) == [("error", "a.yaml: sender_localpart", "taken sender")]
    assert complaints(registration_for(["@b.*:example\\.org"], exclusive=False), registration_for(id="b")) == []
    assert complaints(registration_for(["@irc.*:example\\.org"])) == []


def test_every_complaint_of_the_doctor_is_tested_and_says_why():
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    assert [name for name, (level, _, why, _) in asbridge.COMPLAINTS.items() if not (level in ("error", "warning") and why and f'"{name}"' in source)] == []


# ============================================================================
# 4. Room rules
# ============================================================================

# -- Events as they are sent.

def an_event(**more):
    text = '{"event_id":"$' + "e" * 43 + '","content":{"body":"é"},"sender":"@a:b","type":"m.x"}'
    return asbridge.Event(**{"tick": 5, "type": "m.x", "state_key": None, "sender": "@a:b", "ts": 1000, "json": text, "redacted_because": None, "replaces_state": None,
                             "prev_content": None, "device_id": "DEV", "txn_id": "t\"1", "related": 0, **more})


def test_an_event_for_a_client_has_its_age_and_what_came_before():
    told = json.loads(an_event(prev_content='{"body":"old"}', replaces_state="$old", redacted_because='{"type":"m.room.redaction"}').for_client(3000))
    assert told["unsigned"] == {"age": 2000, "prev_content": {"body": "old"}, "replaces_state": "$old", "redacted_because": {"type": "m.room.redaction"}} and told["event_id"] == "$" + "e" * 43
    assert json.loads(an_event().for_client(0))["unsigned"] == {"age": 0}


@pytest.mark.parametrize("who, told", [(("@a:b", "DEV"), True), (("@a:b", "OTHER"), False), (("@x:b", "DEV"), False), ((None, None), False)])
def test_only_the_device_that_sent_an_event_finds_its_transaction_id_again(who, told):
    assert (json.loads(an_event().for_client(3000, *who))["unsigned"].get("transaction_id") == "t\"1") == told


def test_an_event_for_an_application_service_has_user_id_and_what_is_unsigned_at_the_top_for_old_software():
    told = json.loads(an_event(prev_content='{"body":"old"}', replaces_state="$old").for_appservice(3000, ',"invite_room_state":[]'))
    unsigned = {"age": 2000, "prev_content": {"body": "old"}, "replaces_state": "$old"}
    assert told["unsigned"] == {**unsigned, "invite_room_state": []} and unsigned.items() <= told.items()
    assert (told["user_id"], told["sender"], told["content"]) == ("@a:b", "@a:b", {"body": "é"})


# -- May this be sent?

def test_a_room_begins_with_its_creation_and_the_join_of_its_creator():
    room = asbridge.RoomState(asbridge.ROOM_VERSIONS["11"])
    assert allowed(room, "m.room.member", CREATOR, {"membership": "join"}, CREATOR) == NO and allowed(room, "m.room.create", CREATOR, {}, "") is None
    room.put("m.room.create", "", asbridge.StateEvent(1, CREATOR, {}))
    assert allowed(room, "m.room.create", CREATOR, {}, "") == NO and changes_to(room, USER, "join", USER) == NO and allowed(room, "m.room.topic", CREATOR, {}, "") == NO
    assert changes_to(room, CREATOR, "join", CREATOR) is None


def test_who_is_not_in_the_room_may_not_send():
    for membership in ("leave", "invite", "ban", "knock"):
        assert allowed(room_of(out=membership), "m.room.message", OUT) == NO


@VERSIONS
@pytest.mark.parametrize("type, state_key, who", [
    ("m.room.message", None, [CREATOR, MOD, USER]), ("m.room.topic", "", [CREATOR, MOD]), ("m.room.name", "", [CREATOR]), ("m.room.name", None, [CREATOR]),
    ("x.easy", None, [CREATOR, MOD, USER, LOW]), ("x.easy", "", [CREATOR, MOD, USER, LOW]), ("m.room.message", "", [CREATOR, MOD])])
def test_an_event_needs_the_power_that_its_type_needs(version, type, state_key, who):
    room = room_of(version)
    assert [user for user in (CREATOR, MOD, USER, LOW) if allowed(room, type, user, {}, state_key) is None] == who


@VERSIONS
def test_without_power_levels_the_creator_has_100_and_everybody_may_send_anything(version):
    room = room_of(version, None)
    assert room.power(CREATOR) == (asbridge.ALL_POWER if version == "12" else 100) and room.power(USER) == 0
    assert allowed(room, "m.room.topic", USER, {}, "") is None and room.needed("kick") == 50 and room.needed("invite") == 0


def test_empty_power_levels_are_power_levels():
    room = room_of("11", {})
    assert (room.power(CREATOR), room.needed_to_send("m.room.topic", True)) == (0, 50)
    assert allowed(room, "m.room.topic", USER, {}, "") == NO and allowed(room, "m.room.power_levels", USER, {"users": {USER: 100}}, "") == NO


@pytest.mark.parametrize("levels, user_id, power", [({"users_default": 7}, USER, 7), ({"users": {USER: -3}}, USER, -3), ({"users": {USER: 5}, "users_default": 7}, USER, 5), ({"users": {}}, CREATOR, 0)])
def test_power_is_what_the_power_levels_say(levels, user_id, power):
    assert room_of("11", levels).power(user_id) == power


def test_a_state_key_that_is_a_user_id_belongs_to_that_user():
    room = room_of()
    assert allowed(room, "m.room.topic", MOD, {}, MOD) is None and allowed(room, "m.room.topic", MOD, {}, USER) == NO and allowed(room, "m.room.topic", MOD, {}, "@") == NO
    assert allowed(room, "m.room.topic", MOD, {}, "x@y") is None


# -- May this be sent? Membership.

@pytest.mark.parametrize("join_rule, membership, errcode", [
    ("public", "leave", None), ("public", "knock", None), ("public", "ban", "M_BAD_STATE"), ("public", "join", None), ("invite", "leave", NO), ("invite", "invite", None), ("invite", "join", None),
    ("invite", "ban", "M_BAD_STATE"), ("knock", "knock", NO), ("knock", "invite", None), ("restricted", "leave", NO), ("restricted", "invite", None), ("knock_restricted", "leave", NO),
    ("knock_restricted", "invite", None), ("private", "leave", NO), (None, "leave", NO), (None, "invite", None), ("x.unknown", "leave", NO)])
def test_the_join_rule_and_the_own_membership_say_who_may_join(join_rule, membership, errcode):
    assert changes_to(room_of(join_rule=join_rule, out=membership), OUT, "join", OUT) == errcode


@pytest.mark.parametrize("membership", ["invite", "join"])
@pytest.mark.parametrize("join_rule", ["private", "x.unknown"])
def test_nobody_joins_by_a_join_rule_that_is_not_known(join_rule, membership):
    assert changes_to(room_of(join_rule=join_rule, out=membership), OUT, "join", OUT) == NO


def test_nobody_joins_for_another():
    assert changes_to(room_of(join_rule="public"), MOD, "join", OUT) == NO


@pytest.mark.parametrize("voucher, errcode", [(MOD, None), (CREATOR, None), (USER, NO), (OUT, NO), ("@nobody:localhost", NO), (None, NO), (5, NO), ([], NO), ({}, NO)])
@pytest.mark.parametrize("join_rule", ["restricted", "knock_restricted"])
def test_a_restricted_join_needs_a_member_who_may_invite(join_rule, voucher, errcode):
    assert changes_to(room_of(join_rule=join_rule), OUT, "join", OUT, join_authorised_via_users_server=voucher) == errcode


@pytest.mark.parametrize("sender, target, before, errcode", [
    (MOD, OUT, "leave", None), (CREATOR, OUT, "leave", None), (USER, OUT, "leave", NO), (OUT, "@x:localhost", "join", NO), (MOD, OUT, "invite", None), (MOD, OUT, "knock", None),
    (MOD, OUT, "join", NO), (MOD, OUT, "ban", NO), ("@x:localhost", OUT, "leave", NO)])
def test_a_member_with_the_power_may_invite_who_is_neither_in_the_room_nor_banned(sender, target, before, errcode):
    assert changes_to(room_of(out=before), sender, "invite", target) == errcode


@pytest.mark.parametrize("sender, target, before, errcode", [
    (OUT, OUT, "join", None), (OUT, OUT, "invite", None), (OUT, OUT, "knock", None), (OUT, OUT, "leave", NO), (OUT, OUT, "ban", NO),            # to leave, to decline
    (MOD, OUT, "join", None), (MOD, OUT, "invite", None), (MOD, OUT, "knock", None), (USER, OUT, "join", NO), (USER, OUT, "invite", NO),         # to kick, to take back
    (MOD, CREATOR, None, NO), (MOD, MOD, None, None), (CREATOR, MOD, None, None), ("@x:localhost", OUT, "join", NO), (MOD, OUT, "ban", None), (USER, OUT, "ban", NO)])
def test_one_leaves_by_oneself_and_makes_others_leave_with_more_power_than_theirs(sender, target, before, errcode):
    room = room_of(**({"out": before} if before else {}))
    assert changes_to(room, sender, "leave", target) == errcode


def test_to_unban_needs_the_power_to_ban_and_to_kick():
    users = {CREATOR: 100, MOD: 50}
    for levels, errcode in (({"ban": 50, "kick": 50}, None), ({"ban": 60, "kick": 50}, NO), ({"ban": 50, "kick": 60}, NO)):
        assert changes_to(room_of("11", {"users": users, **levels}, out="ban"), MOD, "leave", OUT) == errcode


@pytest.mark.parametrize("sender, target, errcode", [
    (MOD, OUT, None), (MOD, USER, None), (MOD, MOD, NO), (MOD, CREATOR, NO), (CREATOR, MOD, None), (USER, LOW, NO), (OUT, USER, NO), (CREATOR, CREATOR, NO)])
@pytest.mark.parametrize("before", ["leave", "invite", "ban", "knock"])
def test_a_member_with_the_power_may_ban_who_has_less(sender, target, errcode, before):
    assert changes_to(room_of(out=before), sender, "ban", target) == errcode


@pytest.mark.parametrize("join_rule, before, sender, errcode", [
    ("knock", "leave", OUT, None), ("knock_restricted", "leave", OUT, None), ("knock", "knock", OUT, None), ("knock", "invite", OUT, NO), ("knock", "join", OUT, NO), ("knock", "ban", OUT, NO),
    ("knock", "leave", MOD, NO), ("public", "leave", OUT, NO), ("invite", "leave", OUT, NO), ("restricted", "leave", OUT, NO), (None, "leave", OUT, NO)])
def test_one_may_knock_where_the_join_rule_says_so_unless_one_is_in_invited_or_banned(join_rule, before, sender, errcode):
    assert changes_to(room_of(join_rule=join_rule, out=before), sender, "knock", OUT) == errcode


def test_who_may_invite_may_send_a_third_party_invite():
    assert allowed(room_of("11", {"users": {MOD: 20}, "invite": 10}), "m.room.third_party_invite", MOD, {}, "token") is None
    assert allowed(room_of("11", {"users": {MOD: 60}, "invite": 70}), "m.room.third_party_invite", MOD, {}, "token") == NO


@pytest.mark.parametrize("content, target", [({}, OUT), ({"membership": None}, OUT), ({"membership": "x"}, OUT), ({"membership": ["join"]}, OUT), ({"membership": "join"}, None), ({"membership": "join"}, "")])
def test_a_membership_must_be_known_and_be_somebodys(content, target):
    assert allowed(room_of(), "m.room.member", OUT, content, target) == "M_BAD_JSON"


def test_a_membership_is_that_of_a_user_id():
    assert allowed(room_of(), "m.room.member", MOD, {"membership": "invite"}, "foo") is not None


def test_a_refusal_of_a_join_of_someone_banned_is_m_bad_state_and_of_an_invitation_of_a_member_says_so():
    with refused("M_BAD_STATE", 403, "banned"):
        asbridge.authorise(room_of(out="ban"), asbridge.Draft("m.room.member", OUT, {"membership": "join"}, OUT))
    with refused("M_FORBIDDEN", 403, "already in the room"):
        asbridge.authorise(room_of(), asbridge.Draft("m.room.member", MOD, {"membership": "invite"}, USER))


def test_a_refusal_for_lack_of_power_says_how_much_is_needed():
    with refused("M_FORBIDDEN", 403, "@user:localhost has power 0; m.room.name needs 60"):
        asbridge.authorise(room_of(), asbridge.Draft("m.room.name", USER, {}, ""))
    with refused("M_FORBIDDEN", 403, "@user:localhost has power 0; to invite needs 10"):
        asbridge.authorise(room_of(), asbridge.Draft("m.room.member", USER, {"membership": "invite"}, OUT))


def spec_allows_membership(room, sender, target, membership, voucher):
    """Rule 5, by the letter of the specification, to be compared with the program."""
    def at(user):
        return room.membership(user)

    def may(action, default):
        return room.power(sender) >= room.content("m.room.power_levels").get(action, default)
    rule = room.join_rule
    if membership == "join":
        if sender != target or at(sender) == "ban":
            return False
        if rule in ("restricted", "knock_restricted"):
            return at(sender) in ("join", "invite") or (at(voucher) == "join" and room.power(voucher) >= room.content("m.room.power_levels").get("invite", 0))
        return rule == "public" or at(sender) in ("invite", "join")
    if membership == "invite":
        return at(sender) == "join" and at(target) not in ("join", "ban") and may("invite", 0)
    if membership == "leave":
        if sender == target:
            return at(sender) in ("invite", "join", "knock")
        if at(sender) != "join" or (at(target) == "ban" and not may("ban", 50)):
            return False
        return may("kick", 50) and room.power(target) < room.power(sender)
    if membership == "ban":
        return at(sender) == "join" and may("ban", 50) and room.power(target) < room.power(sender)
    return rule in ("knock", "knock_restricted") and sender == target and at(sender) not in ("ban", "invite", "join")


@VERSIONS
def test_the_membership_rules_are_those_of_the_specification(version):
    dice = random.Random(int(version))
    states, rules = ["join", "invite", "leave", "ban", "knock"], ["public", "invite", "knock", "restricted", "knock_restricted"]
    outcomes = set()
    for _ in range(3000):
        levels = {key: dice.choice([0, 10, 50]) for key in dice.sample(["ban", "kick", "invite"], 2)} | {"users": {MOD: 50, USER: dice.choice([0, 10, 50])}}
        room = room_of(version, levels, dice.choice(rules), user=dice.choice(states), mod=dice.choice(["join", "join", "leave"]), out=dice.choice(states))
        sender, target = dice.choice([CREATOR, MOD, USER, OUT]), dice.choice([CREATOR, MOD, USER, OUT])
        membership, voucher = dice.choice(states), dice.choice([MOD, USER, OUT])
        result = changes_to(room, sender, membership, target, join_authorised_via_users_server=voucher) is None
        assert result == spec_allows_membership(room, sender, target, membership, voucher), (room.events, sender, target, membership, voucher)
        outcomes.add((membership, result))
    assert len(outcomes) == 10


# -- May this be sent? Power levels.

def sets_levels(sender, version="11", base=None, **changes):
    """None or the errcode: `sender` changes these keys of the power levels; ... removes one."""
    room = room_of(version) if base is None else room_of(version, base)
    content = {key: value for key, value in {**room.content("m.room.power_levels"), **changes}.items() if value is not ...}
    return allowed(room, "m.room.power_levels", sender, content, "")


@pytest.mark.parametrize("content", [
    {"ban": "50"}, {"kick": 5.0}, {"users_default": None}, {"invite": True}, {"events": []}, {"events": {"x": "1"}}, {"notifications": {"room": None}}, {"users": []}, {"users": {USER: "5"}},
    {"users": {USER: True}}, {"users": None}])
def test_power_levels_are_integers(content):
    assert allowed(room_of(), "m.room.power_levels", CREATOR, content, "") == "M_BAD_JSON"


@pytest.mark.parametrize("key", ["user", "@user", "user:localhost", "", "@:x"])
def test_the_keys_of_users_are_user_ids(key):
    assert allowed(room_of(), "m.room.power_levels", CREATOR, {"users": {CREATOR: 100, key: 5}}, "") in ("M_INVALID_PARAM", "M_BAD_JSON")


@pytest.mark.parametrize("changes, errcode", [
    ({}, None), ({"ban": 40}, None), ({"ban": 51}, NO), ({"kick": ...}, None), ({"invite": 50}, None), ({"notifications": {"room": 50}}, None), ({"notifications": {"room": 51}}, NO),
    ({"events": {"m.room.name": 60, "x.easy": 50}}, None), ({"events": {"m.room.name": 50, "x.easy": -5}}, NO), ({"events": {"x.easy": -5}}, NO), ({"events": {"m.room.name": 60}}, None),
    ({"users": {CREATOR: 100, MOD: 50, LOW: 50}}, None), ({"users": {CREATOR: 100, MOD: 50, LOW: 51}}, NO), ({"users": {CREATOR: 100, MOD: 51, LOW: -5}}, NO), ({"users": {CREATOR: 100, MOD: 0, LOW: -5}}, None),
    ({"users": {MOD: 50, LOW: -5}}, NO), ({"users": {CREATOR: 99, MOD: 50, LOW: -5}}, NO), ({"users": {CREATOR: 100, MOD: 50}}, None), ({"users_default": 51}, NO), ({"state_default": 51}, NO)])
def test_nobody_gives_or_takes_power_above_their_own(changes, errcode):
    assert sets_levels(MOD, **changes) == errcode


def test_nobody_takes_power_from_an_equal_but_everybody_from_themselves():
    base = {"users": {MOD: 50, USER: 50, CREATOR: 100}}
    assert sets_levels(MOD, base=base, users={MOD: 50, USER: 0, CREATOR: 100}) == NO and sets_levels(MOD, base=base, users={USER: 50, CREATOR: 100}) is None


def test_a_level_above_ones_own_may_not_be_removed():
    assert sets_levels(MOD, base={**LEVELS, "ban": 60}, ban=...) == NO and sets_levels(MOD, base={**LEVELS, "notifications": {"room": 60}}, notifications=...) == NO


@VERSIONS
def test_the_first_power_levels_of_a_room_may_say_anything(version):
    users = {MOD: 100} if version == "12" else {CREATOR: 1000, MOD: 100}
    assert allowed(room_of(version, None), "m.room.power_levels", CREATOR, {"users": users, "ban": 5000}, "") is None


# -- May this be sent? Creators, in room version 12.

def room_with_creators(*more):
    room = room_of("12")
    room.put("m.room.create", "", asbridge.StateEvent(1, CREATOR, {"room_version": "12", "additional_creators": list(more)}))
    return room


def test_creators_have_all_power_for_ever_in_room_version_12():
    room = room_with_creators(USER)
    assert room.creators == {CREATOR, USER} and room.power(USER) == room.power(CREATOR) > 2**53 - 1
    assert changes_to(room, MOD, "ban", USER) == NO and changes_to(room, USER, "ban", MOD) is None and changes_to(room, USER, "leave", CREATOR) == NO
    assert allowed(room, "m.room.power_levels", USER, {"ban": 2**53 - 1, "users": {MOD: 2**53 - 1}}, "") is None


@pytest.mark.parametrize("named", [CREATOR, USER])
def test_creators_cannot_stand_in_the_power_levels_of_room_version_12(named):
    assert allowed(room_with_creators(USER), "m.room.power_levels", CREATOR, {"users": {named: 100}}, "") == NO


@pytest.mark.parametrize("version", ["10", "11"])
def test_before_room_version_12_the_creator_has_what_the_power_levels_say(version):
    room = room_of(version, {"users": {CREATOR: 10}})
    room.put("m.room.create", "", asbridge.StateEvent(1, CREATOR, {"additional_creators": [USER]}))
    assert (room.power(CREATOR), room.power(USER), room.creators) == (10, 0, {CREATOR})


# -- Redaction.

REDACTIONS = [
    ("m.room.message", {"body": "x", "msgtype": "m.text"}, {"10": [], "11": [], "12": []}),
    ("m.room.member", {"membership": "join", "displayname": "x", "join_authorised_via_users_server": "@a:b", "reason": "x"}, ["membership", "join_authorised_via_users_server"]),
    ("m.room.create", {"creator": "@a:b", "room_version": "11", "m.federate": True, "x": 1}, {"10": ["creator"], "11": ..., "12": ...}),
    ("m.room.join_rules", {"join_rule": "restricted", "allow": [], "x": 1}, ["join_rule", "allow"]),
    ("m.room.power_levels", {**dict.fromkeys(["ban", "events_default", "kick", "redact", "state_default", "users_default", "invite"], 1), "users": {}, "events": {}, "notifications": {}},
     {"10": ["ban", "events_default", "kick", "redact", "state_default", "users_default", "users", "events"],
      "11": ["ban", "events_default", "kick", "redact", "state_default", "users_default", "invite", "users", "events"]}),
    ("m.room.history_visibility", {"history_visibility": "joined", "x": 1}, ["history_visibility"]),
    ("m.room.redaction", {"redacts": "$x", "reason": "x"}, {"10": [], "11": ["redacts"]}),
    ("m.room.aliases", {"aliases": ["#a:b"]}, []), ("m.room.topic", {"topic": "x"}, []), ("x.custom", {"membership": "join", "users": {}}, []),
]


@VERSIONS
@pytest.mark.parametrize("type, content, kept", REDACTIONS, ids=[row[0] for row in REDACTIONS])
def test_a_redaction_keeps_what_the_room_version_keeps(version, type, content, kept):
    keys = kept.get(version, kept.get("11")) if isinstance(kept, dict) else kept
    expected = content if keys is ... else {key: content[key] for key in keys}
    assert asbridge.redacted_content(asbridge.ROOM_VERSIONS[version], type, content) == expected


def test_a_redaction_keeps_the_signed_part_of_a_third_party_invite():
    content = {"membership": "invite", "third_party_invite": {"display_name": "x", "signed": {"token": "t"}}}
    assert asbridge.redacted_content(asbridge.ROOM_VERSIONS["11"], "m.room.member", content) == {"membership": "invite", "third_party_invite": {"signed": {"token": "t"}}}
    assert asbridge.redacted_content(asbridge.ROOM_VERSIONS["10"], "m.room.member", content) == {"membership": "invite"}


def test_a_redacted_event_keeps_its_id_sender_and_place():
    text = '{"event_id":"$e","content":{"body":"é"},"origin_server_ts":5,"redacts":"$x","room_id":"!r","sender":"@a:b","state_key":"","type":"m.x"}'
    assert json.loads(asbridge.redacted_json(asbridge.ROOM_VERSIONS["11"], text)) == {
        "event_id": "$e", "content": {}, "origin_server_ts": 5, "room_id": "!r", "sender": "@a:b", "state_key": "", "type": "m.x"}


# -- Who may see it?

def seen(visibilities, memberships, upto=12):
    """The ticks from 1 on that visible_ranges() lets see."""
    ranges = asbridge.visible_ranges(visibilities, memberships)
    assert all(first <= last for first, last in ranges) and all(a[1] < b[0] - 1 for a, b in zip(ranges, ranges[1:], strict=False))
    return [tick for tick in range(1, upto) if any(first <= tick <= last for first, last in ranges)]


CAME_AND_WENT = [(3, "invite"), (5, "join"), (8, "leave")]


@pytest.mark.parametrize("visibility, ticks", [("world_readable", range(2, 12)), ("shared", range(2, 9)), ("invited", range(3, 9)), ("joined", range(5, 9))])
def test_a_member_who_came_and_went_sees_what_the_visibility_says(visibility, ticks):
    assert seen([(0, visibility)], CAME_AND_WENT)[-len(ticks):] == list(ticks) and len(seen([(0, visibility)], CAME_AND_WENT)) - len(ticks) == (visibility in ("world_readable", "shared"))


@pytest.mark.parametrize("visibility, ticks", [("world_readable", range(1, 12)), ("shared", ()), ("invited", range(3, 12)), ("joined", ())])
def test_somebody_invited_sees_only_what_is_for_those_invited_or_for_all(visibility, ticks):
    assert seen([(0, visibility)], [(3, "invite")]) == list(ticks)


def test_without_a_history_visibility_it_is_shared():
    assert seen([], [(5, "join")]) == list(range(1, 12)) and seen([], []) == [] and seen([], [(5, "invite")]) == []


def test_a_history_visibility_that_is_not_understood_is_shared():
    assert seen([(1, "x.secret")], [(5, "join")]) == list(range(1, 12))


def test_a_change_of_visibility_is_seen_if_either_side_of_it_is():
    assert seen([(1, "joined"), (4, "world_readable"), (7, "joined")], []) == [4, 5, 6, 7]


def test_a_change_of_visibility_holds_from_then_on_only():
    assert seen([(0, "joined"), (4, "shared")], [(8, "join")]) == [4, 5, 6, 7, 8, 9, 10, 11]


def spec_may_see(tick, visibilities, memberships):
    """Server behaviour 1 to 5 of the module Room History Visibility, by the letter."""
    def at(changes, when, default):
        return ([default] + [value for change, value in changes if change <= when])[-1]

    def allow(visibility, membership):
        joins_later = any(change > tick and value == "join" for change, value in memberships)
        return (visibility == "world_readable" or membership == "join" or (visibility == "shared" and joins_later)
                or (visibility == "invited" and membership == "invite"))
    return any(allow(at(visibilities, tick - one, "shared"), at(memberships, tick - other, "leave"))
               for one, other in ((0, 0), *([(1, 0)] if tick in dict(visibilities) else []), *([(0, 1)] if tick in dict(memberships) else [])))


def test_history_visibility_is_that_of_the_specification():
    dice = random.Random(7)
    for _ in range(3000):
        ticks = dice.sample(range(1, 16), dice.randint(0, 9))
        split = dice.randint(0, len(ticks))
        visibilities = [(tick, dice.choice(["world_readable", "shared", "invited", "joined"])) for tick in sorted(ticks[:split])]
        memberships = [(tick, dice.choice(["join", "join", "leave", "invite", "ban", "knock"])) for tick in sorted(ticks[split:])]
        assert seen(visibilities, memberships, 18) == [tick for tick in range(1, 18) if spec_may_see(tick, visibilities, memberships)], (visibilities, memberships)


# ============================================================================
# 5. Store
# ============================================================================

# -- The database.

def test_a_database_remembers_what_was_stored(open_store):
    store = open_store("a.db")
    make_room(store, GHOST)
    event_id = store.write(say)
    store.write(lambda tx: tx.add_user(ALICE, "hash", None, 5))
    store.write(lambda tx: tx.add_session(ALICE, "DEV", None, b"digest", 5, None))
    store.close()
    again = open_store("a.db")
    with again.read() as reader:
        assert reader.event(1, event_id).content == {"body": "hello"} and set(reader.members(1)) == {GHOST, ALICE}
    assert again.sessions == {b"digest": (ALICE, "DEV")} and again.users == {ALICE}
    assert again.write(lambda tx: tx.room("!r:localhost").joined) == {ALICE, GHOST}


def test_a_database_in_memory_leaves_nothing_behind(open_store):
    store = open_store()
    assert os.path.exists(store.path)
    store.close()
    assert not os.path.exists(os.path.dirname(store.path))


def test_a_new_database_is_made_in_one_transaction(tmp_path):
    path = str(tmp_path / "a.db")
    with contextlib.closing(asbridge.open_sqlite(path)) as db, contextlib.suppress(asbridge.DatabaseError):
        asbridge.create_schema(FaultyDb(db, "INSERT INTO meta", 1), path, "localhost")
    with contextlib.closing(asbridge.open_sqlite(path)) as db:
        asbridge.create_schema(db, path, "localhost")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere there are no such names")
@pytest.mark.parametrize("name", ["a?mode=ro", "a#b%20c", "ä 日\n", b"\xff".decode("utf-8", "surrogateescape"), "'; --"])
def test_a_database_may_have_any_name(open_store, tmp_path, name):
    make_room(open_store(name))
    assert {os.fsencode(one) for one in os.listdir(tmp_path)} == {os.fsencode(name + end) for end in ("", "-wal", "-shm", "-lock")}


def test_a_database_of_an_older_version_gets_the_tables_that_it_lacks_and_keeps_what_it_has(open_store, tmp_path):
    store = open_store("a.db")
    store.write(lambda tx: tx.add_session(ALICE, "DEV", None, b"digest", 5, None))
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:
        db.executescript("DROP TABLE to_device; DROP TABLE signatures; PRAGMA user_version = 1")
    again = open_store("a.db")
    assert again.sessions == {b"digest": (ALICE, "DEV")}
    with again.read() as reader:
        assert reader.all("SELECT * FROM to_device") == reader.all("SELECT * FROM signatures") == []
        assert reader.one("PRAGMA user_version")[0] == asbridge.SCHEMA_VERSION


#: The tables and columns of version 3. They stay as they are here: what comes later, UPGRADES must bring to such a database.
VERSION_3 = """
meta: key value
users: user_id password appservice displayname avatar_url deactivated created_ts
devices: user_id device_id display_name last_seen_ts last_seen_ip
sessions: token user_id device_id
rooms: n room_id version published
events: tick room type state_key sender ts json replaces redacted_by relates_to rel_type device_id txn_id
state: room type state_key tick
memberships: user_id room membership tick forgotten
aliases: alias room creator
receipts: room type user_id thread_id tick event_id ts
outbox: appservice tick reason
transactions: appservice txn_id last_tick events body acknowledged_ts
pushed: appservice key_changes
network_rooms: appservice network room
account_data: user_id room_id type tick json
filters: filter_id user_id json
media: media_id content_type filename user_id created_ts content
device_keys: user_id device_id json
one_time_keys: user_id device_id key_id json
fallback_keys: user_id device_id algorithm key_id json used
cross_signing: user_id usage json
signatures: user_id key signer key_id signature tick
key_changes: user_id tick
to_device: tick user_id device_id json appservice
to_device_txns: user_id device_id type txn_id ts
backups: version user_id algorithm auth_data etag
backup_keys: version room_id session_id json
"""


def test_a_database_of_version_3_gets_the_columns_that_a_new_one_has(open_store, tmp_path):
    tables = dict(line.split(": ") for line in VERSION_3.strip().splitlines())
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:
        db.executescript("".join(f"CREATE TABLE {name} ({columns.replace(' ', ', ')});" for name, columns in tables.items()) +
                         "INSERT INTO meta VALUES ('server_name', 'localhost'), ('position', 0); PRAGMA user_version = 3")

    def columns(path):
        with open_store(path).read() as reader:
            return reader.all("SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table' "
                              "AND m.name NOT LIKE 'sqlite_%' ORDER BY m.name, c.cid")
    assert columns("a.db") == columns("new.db")


def test_client_transactions_of_an_older_database_are_still_known(open_store, tmp_path):
    store, draft = open_store("a.db"), asbridge.Draft("m.room.message", ALICE, {"body": "hello"})
    make_room(store)
    event_id = store.write(lambda tx: tx.append(tx.room("!r:localhost"), draft, 5, "DEV", "txn"))
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:       # as version 2 had it
        db.executescript("DROP INDEX sent; DROP TABLE to_device_txns; CREATE TABLE client_txns (sender TEXT, device_id TEXT, path TEXT, txn_id TEXT, "
                         "event_id TEXT NOT NULL, PRIMARY KEY (sender, device_id, path, txn_id)) WITHOUT ROWID; PRAGMA user_version = 2")
    store = open_store("a.db")
    assert store.write(lambda tx: tx.sent(1, draft, "DEV", "txn")) == event_id
    with store.read() as reader:
        assert reader.one("SELECT count(*) FROM sqlite_master WHERE name = 'client_txns'")[0] == 0


def test_client_transactions_of_messages_to_devices_are_known_for_a_day(open_store):
    store = open_store()
    first = [store.write(lambda tx, at=at: tx.first_to_device(ALICE, "DEV", "m.x", "1", at)) for at in (0, 1000, asbridge.REMEMBERED_MS, asbridge.REMEMBERED_MS + 1)]
    assert first == [True, False, False, True]
    assert [store.write(lambda tx, of=of: tx.first_to_device(*of, "1", asbridge.REMEMBERED_MS + 2)) for of in (
        (ALICE, "OTHER", "m.x"), (ALICE, "DEV", "m.y"), (GHOST, "DEV", "m.x"), (ALICE, "DEV", "m.x"))] == [True, True, True, False]


def test_a_database_that_was_made_for_another_server_name_is_refused_and_let_go(open_store):
    open_store("a.db").close()
    with pytest.raises(asbridge.DatabaseError, match="'localhost', not 'other.org'") as held:
        open_store("a.db", server_name="other.org")
    assert open_store("a.db").position == 0 and held


def test_a_database_of_a_newer_version_is_refused(open_store, tmp_path):
    open_store("a.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:
        db.execute(f"PRAGMA user_version = {asbridge.SCHEMA_VERSION + 1}")
    with pytest.raises(asbridge.DatabaseError, match="not a database of this asbridge"):
        open_store("a.db")


def test_a_database_in_no_directory_is_refused(open_store):
    with pytest.raises(asbridge.DatabaseError, match="a.db can't be used as a database: there is no directory .*nowhere"):
        open_store("nowhere/a.db")


@pytest.mark.parametrize("kind, text", [("text", "not a database"), ("directory", "is a directory"), ("foreign", "not a database of this asbridge"), ("wal", "not a database of this asbridge"),
                                        ("unwritable", "may only be read"), ("folder", "nothing may be written in")])
def test_a_refused_database_is_named_with_the_reason_and_nothing_is_left_beside_it(open_store, tmp_path, monkeypatch, kind, text):
    path = tmp_path / "a.db"
    if kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_bytes(b"dear diary " * 100)
    else:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(f"PRAGMA journal_mode = {'WAL' if kind == 'wal' else 'DELETE'}; CREATE TABLE somebody_elses (x);")
    refusing = {"unwritable": str(path), "folder": str(tmp_path)}.get(kind)
    monkeypatch.setattr(os, "access", lambda where, mode: where != refusing)              # who is root may all
    with pytest.raises(asbridge.DatabaseError, match=f"a.db .*{text}"):
        open_store("a.db")
    assert os.listdir(tmp_path) == ["a.db"]


def test_a_database_is_held_by_one_process(tmp_path):
    path = str(tmp_path / "a.db")
    with contextlib.closing(asbridge.hold_database(path)):
        program = f"import asbridge\ntry: asbridge.hold_database({path!r})\nexcept asbridge.DatabaseError as e: print(e)"
        told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=HERE, timeout=20)
        assert "is in use by another asbridge" in told.stdout, told
        with pytest.raises(asbridge.DatabaseError, match="is in use"):
            asbridge.hold_database(path)
    asbridge.hold_database(path).close()


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_second_process_on_a_link_to_the_same_database_is_refused(tmp_path):
    (tmp_path / "a.db").touch()
    (tmp_path / "b.db").symlink_to("a.db")
    with contextlib.closing(asbridge.hold_database(str(tmp_path / "a.db"))), pytest.raises(asbridge.DatabaseError):
        asbridge.hold_database(str(tmp_path / "b.db")).close()


def test_a_database_whose_first_start_was_cut_short_is_taken_up(open_store, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "cut.db", isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 2")
        db.execute("BEGIN")
        db.execute("CREATE TABLE half (x)")
        db.executemany("INSERT INTO half VALUES (?)", [("x" * 5000,)] * 50)  # more than fits: some is in the file, and what was there in the journal
        for end in ("", "-journal"):
            (tmp_path / f"a.db{end}").write_bytes((tmp_path / f"cut.db{end}").read_bytes())
    assert os.path.getsize(tmp_path / "a.db-journal") > 500
    store = open_store("a.db")
    make_room(store)
    assert store.write(say) and texts_in(store) == ["hello"]


@pytest.mark.parametrize("fails", ["SELECT token", "SELECT appservice FROM outbox", "UPDATE meta"])
def test_a_store_that_can_not_be_opened_leaves_nothing_open(tmp_path, monkeypatch, fails):
    opened, real = [], asbridge.open_sqlite
    monkeypatch.setattr(asbridge, "open_sqlite", lambda *args, **more: opened.append(FaultyDb(real(*args, **more), fails, 1)) or opened[-1])
    for path in (str(tmp_path / "a.db"), ":memory:"):
        with pytest.raises((sqlite3.Error, asbridge.DatabaseError)):
            asbridge.Store(path, "localhost", registrations_of(registration()), asbridge.Clock())
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            opened[-1].db.execute("SELECT 1")
    asbridge.hold_database(str(tmp_path / "a.db")).close()


# -- The one who writes: ticks and batches.

def first_id(tx):
    return tx.events(1, 0, 2**62, 9, False, asbridge.Filter(types=["m.room.message"]))[0].event_id


def test_ticks_rise_and_go_on_after_a_restart(open_store):
    store = open_store("a.db")
    make_room(store)
    ticks = [asbridge.tick_of(store.write(say)) for _ in range(3)]
    assert ticks == sorted(set(ticks)) and store.position == ticks[-1]
    store.close()
    again = open_store("a.db")
    assert again.position == ticks[-1] and asbridge.tick_of(again.write(say)) > ticks[-1]


def test_all_that_waits_is_stored_with_one_commit(open_store):
    store, statements = open_store(), []
    make_room(store)
    store._tx.db.set_trace_callback(statements.append)
    results = in_one_batch(store, *[lambda tx, n=n: say(tx, body=str(n)) for n in range(20)])
    assert statements.count("COMMIT") == 2 and statements.count("BEGIN IMMEDIATE") == 2        # one more for the job that held the others up
    assert texts_in(store) == [str(n) for n in range(20)] and not [result.error for result in results if result.error]


def test_the_events_of_a_batch_go_into_the_database_together(open_store):
    store, statements = open_store(), []
    make_room(store, GHOST)
    store._tx.db.set_trace_callback(statements.append)
    results = in_one_batch(store, *[lambda tx, n=n: say(tx, body=str(n)) for n in range(100)])
    for table in ("events", "outbox"):
        sizes = [statement.count(",'m.room.message',") if table == "events" else statement.count("('irc',") for statement in statements
                 if statement.startswith(f"INSERT INTO {table} ")]
        assert sizes == [64, 32, 4]
    assert not [statement for statement in statements if "SAVEPOINT" in statement] and texts_in(store) == [str(n) for n in range(100)]
    assert [asbridge.tick_of(result.value) for result in results] == sorted(asbridge.tick_of(result.value) for result in results)


@pytest.mark.parametrize("count, sizes", [(0, []), (1, [1]), (2, [2]), (3, [2, 1]), (7, [4, 2, 1]), (8, [8]), (20, [8, 8, 4]), (31, [8, 8, 8, 4, 2, 1])])
def test_many_rows_are_inserted_by_statements_of_few_sizes(count, sizes):
    pieces = [*asbridge.in_powers_of_two(range(count), 8)]
    assert [len(piece) for piece in pieces] == sizes and [one for piece in pieces for one in piece] == [*range(count)]


def test_a_job_sees_what_those_before_it_in_the_batch_have_stored(open_store):
    store = open_store()
    make_room(store)

    def look(tx):
        own = say(tx, body="2")
        return [event.content["body"] for event in tx.events(1, 0, 2**62, 9, False) if event.type == "m.room.message"], tx.event(1, own).event_id == own
    first, second, third = in_one_batch(store, lambda tx: say(tx, body="1"), look, lambda tx: tx.event(1, first_id(tx)).content)

    assert second.value == (["1", "2"], True) and third.value == {"body": "1"} and texts_in(store) == ["1", "2"]


def random_job(rnd, n, seen):
    """A job that changes something, looks, or is refused in the end; what it saw goes into `seen`."""
    kind, refuse = rnd.choice(["say", "say", "say", "state", "profile", "redact", "look", "alias"]), rnd.random() < 0.3
    early, target, sender = rnd.random() < 0.5, rnd.random(), rnd.choice([ALICE, GHOST])

    def redact(tx):
        events = tx.events(1, 0, 2**62, 1000, False, asbridge.Filter(types=["m.room.message"]))
        if events:
            tx.redact(tx.room("!r:localhost"), events[int(target * len(events))], tx.tick())
    change = {"say": lambda tx: say(tx, body=f"{n}", sender=sender), "profile": lambda tx: tx.set_profile(GHOST, "displayname", f"{n}"), "redact": redact,
              "state": lambda tx: tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.topic", ALICE, {"topic": f"{n}"}, ""), 1000),
              "alias": lambda tx: tx.add_alias(f"#a{n}:localhost", tx.room("!r:localhost"), ALICE), "look": lambda tx: None}[kind]

    def job(tx):
        if early:
            say(tx, body=f"{n} first")
        change(tx)
        seen.append((n, len(tx.events(1, 0, 2**62, 1000, False)), tx.room("!r:localhost").content("m.room.topic")) if kind == "look" else n)
        if refuse:
            raise MatrixError("M_FORBIDDEN", f"{n}")
    return job


def all_that_is_there(store):
    with store.read() as reader:
        events = [(event.type, event.sender, event.content, event.redacted_because is None) for event in reader.events(1, 0, 2**62, 10_000, False)]
        return (events, reader.user(GHOST).displayname, reader.aliases_of(1), [reason for (reason,) in reader.all("SELECT reason FROM outbox ORDER BY tick")],
                [event.content for event in reader.state_at(1)])


@pytest.mark.parametrize("seed", range(12))
def test_the_jobs_of_one_batch_leave_what_they_would_leave_one_by_one(open_store, seed):
    outcomes, seen, rnd = [], [], random.Random(seed)
    jobs = [random_job(rnd, n, seen) for n in range(rnd.choice([3, 10, 40]))]
    for run in (lambda store: in_one_batch(store, *jobs), lambda store: [in_one_batch(store, one)[0] for one in jobs]):
        store = open_store()
        seen.clear()
        make_room(store, GHOST)
        store.write(lambda tx: tx.add_user(GHOST, None, "irc", 1))
        results = run(store)
        outcomes.append((all_that_is_there(store), [*seen], [result.error and result.error.error for result in results], [*store._tx.room("!r:localhost").events]))
    assert outcomes[0] == outcomes[1] and (len(jobs) < 10 or any(outcomes[0][2]))


def test_a_client_transaction_that_comes_twice_in_one_batch_makes_one_event(open_store):
    store, draft = open_store(), asbridge.Draft("m.room.message", ALICE, {"body": "once"})
    make_room(store)

    def once(device, txn_id):
        def fn(tx):
            return tx.sent(1, draft, device, txn_id) or tx.append(tx.room("!r:localhost"), draft, 5, device, txn_id)
        return fn
    results = in_one_batch(store, once("DEV", "1"), once("DEV", "2"), once("DEV", "1"), once("OTHER", "1"), once(None, "1"), once(None, "1"))
    ids = [result.value for result in results]
    assert ids[0] == ids[2] and ids[4] == ids[5] and len({*ids}) == 4 and len(texts_in(store)) == 4
    assert store.write(once("DEV", "2")) == ids[1] and store.write(once(None, "1")) == ids[4]


def test_a_batch_has_256_jobs_at_most(open_store):
    store, statements = open_store(), []
    store._tx.db.set_trace_callback(statements.append)
    assert len({result.value for result in in_one_batch(store, *[lambda tx: tx.tick() for _ in range(300)])}) == 300
    assert statements.count("COMMIT") == 3


def test_a_refused_job_undoes_only_itself(open_store):
    store = open_store()
    make_room(store)

    def no(tx):
        say(tx, body="no")
        tx.add_user("@no:localhost", None, None, 5)
        raise MatrixError("M_FORBIDDEN", "no")
    first, second, third = in_one_batch(store, lambda tx: say(tx, body="1"), no, lambda tx: say(tx, body="3"))
    assert second.error.errcode == "M_FORBIDDEN" and first.value and third.value and texts_in(store) == ["1", "3"] and store.users == set()


def test_a_refused_job_undoes_what_it_changed_in_the_caches(open_store):
    store = open_store()
    make_room(store)

    def no(tx):
        room = tx.room("!r:localhost")
        tx.append(room, asbridge.Draft("m.room.member", GHOST, {"membership": "join"}, GHOST), 5)
        tx.add_alias("#_irc_x:localhost", room, ALICE)
        tx.add_room("!new:localhost", asbridge.ROOM_VERSIONS["12"])
        raise MatrixError("M_FORBIDDEN", "no")
    _, after = in_one_batch(store, no, lambda tx: (tx.room("!r:localhost").joined, tx.room("!new:localhost"), tx.audience(tx.room("!r:localhost")).why, tx.members(1)))
    assert after.value == ({ALICE}, None, {}, [ALICE])


def test_a_refused_job_leaves_nothing_in_an_outbox(open_store):
    store, frozen = open_store(), []
    make_room(store)
    store.on_frozen = frozen.append

    def no(tx):
        say(tx, sender=GHOST)
        raise MatrixError("M_FORBIDDEN", "no")
    in_one_batch(store, no, say)
    with store.read() as reader:
        assert not frozen and reader.count_waiting("irc") == 0 and reader.transactions("irc") == []


def test_a_refused_acknowledgement_leaves_the_transaction_open(open_store):
    store = open_store()
    make_room(store, GHOST)

    def no(tx):
        tx.acknowledge("irc", tx.boxes["irc"].open.txn_id)
        raise MatrixError("M_FORBIDDEN", "no")
    in_one_batch(store, no, say)
    with store.read() as reader:
        assert [acknowledged for _, _, acknowledged in reader.transactions("irc")] == [None]


def test_a_wakeup_comes_after_the_commit_to_those_whom_it_concerns(open_store):
    store = open_store()
    make_room(store)
    inside, outside = store.waiters.enter(ALICE), store.waiters.enter("@other:localhost")
    store.write(say)
    assert inside.acquire(timeout=5) and not outside.acquire(blocking=False)
    store.waiters.leave(ALICE, inside)
    store.waiters.leave("@other:localhost", outside)
    assert store.waiters._bells == {} and store.moved_since(store.started_at) == {1} and not store.moved_since(store.position)


def test_memberships_are_read_all_or_only_the_new_ones_and_those_of_some_rooms(hs, alice):
    one, two, three = (alice.create_room() for _ in range(3))
    with hs.world.store.read() as reader:
        every = reader.memberships_of(alice.user_id)
        first, second, _ = every
        assert [row.room_id for row in every] == [one, two, three]
        assert reader.memberships_of(alice.user_id, second.tick) == every[2:]
        assert reader.memberships_of(alice.user_id, reader.position(), [first.room], [three]) == [every[0], every[2]]


def test_closing_waits_for_what_is_queued(open_store):
    store, gate = open_store("a.db"), threading.Event()
    make_room(store)
    jobs = [asbridge._Job(fn) for fn in (lambda tx: gate.wait(5), say, say)]
    for job in jobs:
        store._jobs.put(job)
    gate.set()
    store.close()
    assert len(texts_in(open_store("a.db"))) == 2


# -- The one who writes: what fails.

def test_a_job_that_fails_gets_an_error_of_its_own_and_the_others_of_the_batch_are_stored(open_store, caplog):
    store = open_store()
    make_room(store)

    def broken(tx):
        say(tx, body="no")
        raise ZeroDivisionError("secret")
    first, second, third = in_one_batch(store, lambda tx: say(tx, body="1"), broken, lambda tx: say(tx, body="3"))
    assert (second.error.errcode, second.error.status) == ("M_UNKNOWN", 500) and "secret" not in second.error.error
    assert texts_in(store) == ["1", "3"] and first.value and third.value and "secret" in caplog.text


def test_a_job_whose_statement_fails_gets_an_error_and_the_others_of_the_batch_are_stored(open_store):
    store = open_store()
    make_room(store)
    store._tx.db.execute("CREATE TRIGGER no BEFORE INSERT ON events WHEN NEW.sender = '@no:localhost' BEGIN SELECT RAISE(ROLLBACK, 'the disk is full'); END")
    first, second, third = in_one_batch(store, lambda tx: say(tx, body="1"), lambda tx: say(tx, sender="@no:localhost"), lambda tx: say(tx, body="3"))
    assert second.error.status == 500 and texts_in(store) == ["1", "3"]


def test_when_the_commit_fails_each_job_is_run_again(open_store):
    store, runs = open_store(), []
    make_room(store)
    store._tx.db = FaultyDb(store._tx.db, "COMMIT", 0)

    def job(n):
        def fn(tx):
            runs.append(n)
            if n == 0:
                tx.db.times = 0 if runs.count(0) > 1 else 1
            return say(tx, body=str(n))
        return fn
    results = in_one_batch(store, job(0), job(1), job(2))
    assert runs == [0, 1, 2, 0, 1, 2] and texts_in(store) == ["0", "1", "2"] and not [result.error for result in results if result.error]
    assert [asbridge.tick_of(result.value) for result in results] == sorted({asbridge.tick_of(result.value) for result in results})


def test_when_the_commit_keeps_failing_each_job_is_told_so_and_the_next_is_stored(open_store):
    store = open_store()
    make_room(store, GHOST)
    store._tx.db = FaultyDb(store._tx.db, "COMMIT", 0)

    def fails(tx):
        tx.db.times = 1
        return say(tx, body="no")
    results = in_one_batch(store, fails, fails)
    store._tx.db.times = 0
    assert [result.error.status for result in results] == [500, 500] and store.write(lambda tx: say(tx, body="yes")) and texts_in(store) == ["yes"]
    with store.read() as reader:
        assert store.position == reader.position()


class FailingAt(FaultyDb):
    """A connection whose n-th statement fails from now on, and if `lasting` each one after it but ROLLBACK. If it is `undone`,
    SQLite has rolled the whole transaction back by itself, as it does where the disk is full.
    """

    def __init__(self, db, n, code, undone=False, lasting=False):
        self.db, self.left, self.code, self.undone, self.lasting, self.failed = db, n, code, undone, lasting, ""

    def execute(self, sql, *values):
        self.left -= 1
        if (self.left == 0 or (self.left < 0 and self.lasting)) and sql != "ROLLBACK":
            self.failed = self.failed or sql
            if self.undone and self.db.in_transaction:
                self.db.execute("ROLLBACK")
            error = sqlite3.OperationalError("the disk is on fire")
            error.sqlite_errorcode = self.code
            raise error
        return self.db.execute(sql, *values)


def jobs_of_all_kinds(n, since):
    """Each with whether what it does is there, asked of a reader."""
    ghost, person, room_id = f"@_irc_g{n}:localhost", f"@p{n}:localhost", f"!new{n}:localhost"

    def said(text):
        return lambda reader: reader.one("SELECT 1 FROM events WHERE tick > ? AND instr(json, ?)", since, f'"{text} {n}"')

    def account(tx):
        tx.add_user(person, None, None, 5)
        tx.add_session(person, "DEV", None, b"%d" % n, 5, None)
        tx.put_device_keys(person, "DEV", "{}")

    def new_room(tx):
        room = tx.add_room(room_id, asbridge.ROOM_VERSIONS["11"])
        for member in (ALICE, ghost):
            tx.append(room, asbridge.Draft("m.room.member", member, {"membership": "join"}, member), 5)
        tx.add_alias(f"#_irc_{n}:localhost", room, ALICE)

    def refused_late(tx):
        say(tx, body=f"never {n}")
        tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.topic", ALICE, {"topic": f"never {n}"}, ""), 5)
        raise MatrixError("M_FORBIDDEN", "no")

    def acknowledge(tx):
        box = tx.boxes.get("irc")
        tx.acknowledge("irc", box.open.txn_id if box and box.open else 0)
        say(tx, body=f"acknowledged {n}")

    def receipt(tx):
        event_id = say(tx, body=f"read {n}", sender=GHOST)
        tx.add_receipt(tx.room("!r:localhost"), "m.read", ALICE, "", event_id, n)

    def topic(tx):
        tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.topic", ALICE, {"topic": f"{n}"}, ""), 5)
    return [(lambda tx: say(tx, body=f"said {n}"), said("said")),
            (account, lambda reader: reader.user(person) and reader.device_keys(person, "DEV")), (refused_late, said("never")),
            (new_room, lambda reader: reader.room_row(room_id) and reader.memberships_of(ghost)), (acknowledge, said("acknowledged")),
            (topic, lambda reader: f"{n}" in [event.content.get("topic") for event in reader.state_at(1)]),
            (receipt, said("read"))]


def check_caches(store):
    """What the store remembers is what the database says."""
    store.write(lambda tx: None)
    tx = store._tx
    with store.read() as reader:
        assert (tx.boxes, tx.tick_now, store.position) == (reader.outboxes(), reader.position(), reader.position())
        assert store.users == {id for (id,) in reader.all("SELECT user_id FROM users")}
        assert store.sessions == {token: (user, device) for token, user, device in reader.all("SELECT * FROM sessions")}
        for room in tx.rooms.values():
            assert {key: one.tick for key, one in room.events.items()} == {
                (type, key): tick for type, key, tick in reader.all("SELECT type, state_key, tick FROM state WHERE room = ?", room.n)}
            assert room.joined == {*reader.members(room.n)} and room.room_id == reader.room_row(room.room_id).room_id
            if room.audience:
                fresh = asbridge.Audience(store.registrations, room.room_id, room.joined, reader.aliases_of(room.n))
                assert room.audience.interested(ALICE, None).keys() == fresh.interested(ALICE, None).keys()


@pytest.mark.parametrize("code, undone, lasting", [
    (sqlite3.SQLITE_CORRUPT, False, False), (sqlite3.SQLITE_FULL, True, False), (sqlite3.SQLITE_IOERR, True, True), (sqlite3.SQLITE_READONLY, False, True)])
def test_whichever_statement_of_a_batch_fails_what_is_answered_is_what_is_stored_and_remembered(open_store, code, undone, lasting):
    store, failed = open_store(None, registration(url="http://127.0.0.1:1", receive_ephemeral=True)), []
    make_room(store, GHOST)
    real = store._tx.db
    for n in itertools.count(1):
        jobs = jobs_of_all_kinds(n, store.position)
        store._tx.db = faulty = FailingAt(real, n + 3, code, undone, lasting)     # three are of the batch before
        results = in_one_batch(store, *[job for job, _ in jobs])
        store._tx.db = real
        if not faulty.failed:
            break
        failed.append(faulty.failed.split(" ")[0])
        with store.read() as reader:
            done = [bool(there(reader)) for _, there in jobs]
            receipts = {event_id for (event_id,) in reader.all("SELECT event_id FROM receipts")}
        assert done == [not result.error for result in results], (n, faulty.failed, [result.error for result in results])
        assert {result.error.status for result in results if result.error} <= {500, 403} and done.count(False) in ((1,) if not lasting else range(8))
        kept = [list(data["content"]) for data in store._tx.ephemeral.get("irc", {}).values()]
        assert {id for (id,) in kept} <= receipts
        check_caches(store)
    assert {"INSERT", "UPDATE", "DELETE", "SELECT", "SAVEPOINT", "RELEASE", "COMMIT", "BEGIN"} <= {*failed} and len(failed) > 40


def test_on_a_full_disk_what_fits_is_stored_and_the_rest_of_the_batch_is_refused_wherever_it_became_full(open_store):
    store, seen = open_store(), set()
    make_room(store, GHOST)
    for pages in range(12):
        store._tx.db.execute(f"PRAGMA max_page_count = {store._tx.db.execute('PRAGMA page_count').fetchone()[0] + pages}")
        large = [lambda tx, n=n: say(tx, body=f"{pages}.{n} " + "x" * 6000) for n in range(4)]
        large[2:2] = [lambda tx: (say(tx, body="never"), tx.put_media(f"m{pages}", "", None, ALICE, 1, b"x" * 30_000))]       # in a savepoint
        results = in_one_batch(store, *large)
        store._tx.db.execute("PRAGMA max_page_count = 1000000")
        with store.read() as reader:
            stored = [reader.event(1, one.value) is not None for one in results if isinstance(one.value, str) and not one.error]
            assert bool(reader.media(f"m{pages}")) == (not results[2].error)
        assert all(stored) and {one.error.status for one in results if one.error} <= {500}
        assert [text[:text.index(" ")] for text in texts_in(store) if text.startswith(f"{pages}.")] == [
            f"{pages}.{n}" for n, one in zip((0, 1, None, 2, 3), results, strict=True) if n is not None and not one.error]
        seen.add(len(stored))
        check_caches(store)
    assert len(seen) > 2 and {0, 4} <= seen


def test_a_question_that_fails_is_answered_so_and_the_next_one_is_not(open_store, caplog):
    store = open_store()
    make_room(store)
    for statement in ("SELECT", "COMMIT", "BEGIN"):
        with store.read():
            pass
        store._readers.put(FaultyDb(store._readers.get(), statement, 1))
        with refused("M_UNKNOWN", 500, "could not read"), store.read() as reader:
            reader.room_row("!r:localhost")
        assert texts_in(store) == [] and caplog.text.count("disk I/O error") == 1
        caplog.clear()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere what is open can't be moved")
def test_nothing_is_stored_in_a_database_that_was_deleted_or_replaced_and_it_goes_on_when_it_is_back(open_store, tmp_path, caplog):
    store, away = open_store("a.db"), tmp_path / "away"
    make_room(store)
    assert texts_in(store) == []
    away.mkdir()
    for ends, other in ((("", "-wal", "-shm"), False), (("", "-wal", "-shm"), True), ([""], False), ([""], True), (["-wal"], True)):
        for end in ends:
            os.rename(tmp_path / f"a.db{end}", away / f"a.db{end}")
            if other:
                (tmp_path / f"a.db{end}").touch()
        with refused("M_UNKNOWN", 500):
            store.write(say)
        with store.read(), refused("M_UNKNOWN", 500), store.read():
            pass                                             # another connection would see another database
        assert "deleted, moved or replaced" in caplog.text and "Traceback" not in caplog.text
        for end in ends:
            os.replace(away / f"a.db{end}", tmp_path / f"a.db{end}")
    assert store.write(say) and texts_in(store) == ["hello"]


def test_where_another_process_has_locked_the_database_a_batch_waits_once_and_all_its_jobs_are_refused(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(asbridge, "LOCKED_MS", 50)
    store, begins = open_store("a.db"), []
    make_room(store)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store._tx.db.set_trace_callback(lambda statement: begins.append(statement) if statement.startswith("BEGIN") else None)
        jobs = [asbridge._Job(say) for _ in range(20)]
        for job in jobs:
            store._jobs.put(job)
        results = [Result(job) for job in jobs]
        assert {(result.error.errcode, result.error.status) for result in results} == {("M_UNKNOWN", 500)} and len(begins) < 10
        other.execute("ROLLBACK")
    assert store.write(say) and texts_in(store) == ["hello"]


def test_what_was_committed_is_not_run_again_whatever_happens_while_it_is_published(open_store):
    store = open_store()
    make_room(store)

    def boom(transaction):
        store.on_frozen = lambda transaction: None
        raise RuntimeError("can't start new thread")
    store.on_frozen = boom
    results = in_one_batch(store, *[lambda tx, n=n: say(tx, sender=GHOST, body=str(n)) for n in range(3)])
    assert texts_in(store) == ["0", "1", "2"] and not [result.error for result in results if result.error]


# -- Reading.

def test_readers_see_nothing_before_the_commit(open_store):
    store, inside, gate = open_store(), threading.Event(), threading.Event()
    make_room(store)
    before = store.position

    def slow(tx):
        event_id = say(tx)
        tx.add_user("@new:localhost", None, None, 5)
        inside.set()
        gate.wait(5)
        return event_id
    thread = threading.Thread(target=store.write, args=(slow,))
    thread.start()
    assert inside.wait(5)
    with store.read() as reader:
        assert reader.position() == before == store.position and reader.user("@new:localhost") is None and "@new:localhost" not in store.users
        gate.set()
        thread.join(5)
        assert reader.position() == before                   # a reader stays in its moment
    assert texts_in(store) == ["hello"] and store.position == before + 1 and "@new:localhost" in store.users


def test_who_reads_cannot_write(open_store):
    with open_store().read() as reader, pytest.raises(sqlite3.OperationalError):
        reader.db.execute("DELETE FROM meta")


def test_connections_for_reading_are_few_and_are_given_back(open_store):
    store = open_store()
    for _ in range(3 * asbridge.READERS):
        with contextlib.suppress(KeyError), store.read():
            raise KeyError
    with contextlib.ExitStack() as stack:
        for _ in range(asbridge.READERS):
            stack.enter_context(store.read())
        assert store._readers.empty()
    assert store._readers.qsize() == asbridge.READERS


def test_no_more_connections_are_opened_than_read_at_a_time(open_store, monkeypatch):
    store, opened, inside = open_store("a.db"), [], threading.Event()
    make_room(store)
    monkeypatch.setattr(asbridge, "LOG_SECONDS", 5)
    monkeypatch.setattr(asbridge, "open_sqlite", lambda *args, of=asbridge.open_sqlite, **keys: opened.append(1) or of(*args, **keys))

    def read():
        with store.read() as reader:
            inside.set()
            eventually(store._readers.empty)                 # the others have been taken away
            assert reader.position()
    thread = threading.Thread(target=read)
    thread.start()
    assert inside.wait(5)
    store._log_limit = 0
    store._shorten_log()
    thread.join(5)
    with store.read() as reader:
        assert reader.position() and len(opened) == 1 and store._log_limit == asbridge.MAX_LOG_BYTES


def test_who_reads_for_long_holds_up_the_writer_for_a_moment_only(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_LOG_BYTES", 500_000)
    monkeypatch.setattr(asbridge, "LOG_SECONDS", 0.01)
    store = open_store("a.db")
    make_room(store)
    with store.read() as reader:
        before = reader.position()
        for _ in range(30):
            store.write(lambda tx: say(tx, body="x" * 60_000))
        assert os.path.getsize(tmp_path / "a.db-wal") > 1_500_000 and reader.position() == before
    for _ in range(100):
        store.write(lambda tx: say(tx, body="x" * 60_000))
        assert os.path.getsize(tmp_path / "a.db-wal") < 5_000_000            # SQLite itself begins again at 1,000 pages
    assert len(texts_in(store)) == 130


def test_the_write_ahead_log_stays_short_where_readers_overlap(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_LOG_BYTES", 1_000_000)
    store, stopping, reads = open_store("a.db"), threading.Event(), []
    make_room(store)
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def read(own, other):                                    # each begins before the other ends
        while not stopping.is_set():
            own.acquire(timeout=5)
            with store.read() as reader:
                reader.position()
                other.release()
                own.acquire(timeout=0.05)
                reads.append(1)
            own.release()
    threads = [threading.Thread(target=read, args=order) for order in (turns, turns[::-1])]
    for thread in threads:
        thread.start()
    sizes = []
    for _ in range(60):
        store.write(lambda tx: say(tx, body="x" * 60_000))
        sizes.append(os.path.getsize(tmp_path / "a.db-wal"))
    stopping.set()
    for thread in threads:
        thread.join(5)
    assert max(sizes) < 1_200_000 and sum(before > after for before, after in itertools.pairwise(sizes)) >= 3 and reads


def test_the_write_ahead_log_stays_short_behind_a_symbolic_link(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_LOG_BYTES", 500_000)
    (tmp_path / "far").mkdir()
    try:
        os.symlink(tmp_path / "far" / "real.db", tmp_path / "a.db")
    except OSError:
        pytest.skip("there are no symbolic links here")
    store = open_store("a.db")
    make_room(store)
    for _ in range(20):
        store.write(lambda tx: say(tx, body="x" * 60_000))
    assert eventually(lambda: os.path.getsize(tmp_path / "far" / "real.db-wal") < 700_000)


# -- Waiting for news.

def test_of_many_who_are_woken_only_a_few_look_at_a_time():
    waiters, most, looking, guard = asbridge.Waiters(asbridge.Clock()), [], [0], threading.Lock()

    def poll():
        waiting = waiters.enter(ALICE)
        started.release()
        waiters.wait(waiting, waiters.clock.monotonic() + 60)
        with guard:
            looking[0] += 1
            most.append(looking[0])
        turn.wait(5)
        with guard:
            looking[0] -= 1
        waiters.leave(ALICE, waiting)
    started, turn = threading.Semaphore(0), threading.Event()
    threads = [threading.Thread(target=poll, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
        started.acquire()
    waiters.wake({ALICE})
    eventually(lambda: looking[0] == asbridge.MAX_LOOKING)
    turn.set()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert max(most) <= asbridge.MAX_LOOKING and len(most) == 20 and not waiters._looking and not waiters._to_ring and not waiters._bells


def test_who_goes_away_before_it_is_woken_holds_up_nobody():
    waiters = asbridge.Waiters(asbridge.Clock())
    bells = [waiters.enter(ALICE) for _ in range(3 * asbridge.MAX_LOOKING)]
    waiters._asleep.update(bells)                            # as if each were in wait(), on a thread of its own
    waiters.wake({ALICE})
    rung = [one for one in bells if one.acquire(blocking=False)]
    assert len(rung) == asbridge.MAX_LOOKING
    for one in (one for one in bells if one not in rung[1:]):
        waiters.leave(ALICE, one)
    assert waiters._looking == {*rung[1:]} and not waiters._to_ring
    for one in rung[1:]:
        waiters.leave(ALICE, one)
    assert not waiters._looking and not waiters._to_ring and not waiters._bells


def test_who_looks_when_there_is_news_takes_nobodys_turn_and_looks_again():
    waiters = asbridge.Waiters(asbridge.Clock())
    busy = [waiters.enter(ALICE) for _ in range(2 * asbridge.MAX_LOOKING)]   # in their first look, which may take long
    waiters.wake()
    assert not waiters._looking
    asleep = waiters.enter(GHOST)
    waiters._asleep.add(asleep)
    waiters.wake({GHOST})
    assert asleep.acquire(blocking=False)
    began = time.monotonic()
    for one in busy:
        waiters.wait(one, waiters.clock.monotonic() + 60)
    assert time.monotonic() - began < 5 and waiters._asleep == {asleep}


# -- Events.

def test_an_event_id_has_43_characters_and_says_its_tick(open_store):
    store = open_store()
    make_room(store)
    event_id = store.write(say)
    assert re.fullmatch(r"\$[A-Za-z0-9_-]{43}", event_id) and asbridge.tick_of(event_id) == store.position
    with store.read() as reader:
        assert reader.event(1, event_id).event_id == event_id and json.loads(reader.event(1, event_id).json)["event_id"] == event_id


def test_an_event_id_is_bound_to_the_content():
    ids = [asbridge.event_id_of(tick, text) for tick, text in ((5, "a"), (5, "b"), (6, "a"), (2**48 - 1, "a"))]
    assert len(set(ids)) == 4 and [asbridge.tick_of(id) for id in ids] == [5, 5, 6, 2**48 - 1] and ids[0][9:] == ids[2][9:]


def test_an_event_is_not_found_by_another_id_or_in_another_room(open_store):
    store = open_store()
    make_room(store)
    make_room(store, room_id="!s:localhost")
    event_id = store.write(say)
    forged = event_id[:-1] + ("A" if event_id[-1] != "A" else "B")
    with store.read() as reader:
        assert reader.event(1, forged) is None and reader.event(2, event_id) is None and reader.event(1, event_id)


@pytest.mark.parametrize("id", ["", "$", "$" + "x" * 42, "$" + "x" * 44, "!" + "x" * 43, "$" + "é" * 43, "$abc:localhost", "$" + "x" * 43 + "\n"])
def test_what_is_no_event_id_of_ours_has_no_tick(id):
    assert asbridge.tick_of(id) == -1


def test_an_event_has_65536_bytes_at_most(open_store):
    store = open_store()
    make_room(store)
    with refused("M_TOO_LARGE", 413, "65536"):
        store.write(lambda tx: say(tx, body="é" * 32_700))
    assert store.write(lambda tx: say(tx, body="é" * 32_000)) and len(texts_in(store)) == 1


def test_in_room_version_12_the_room_id_is_the_hash_of_its_creation(open_store):
    store = open_store()
    room_id = make_room(store, version="12")
    with store.read() as reader:
        create = reader.state_event(1, "m.room.create", "")
        assert room_id == "!" + create.event_id[1:] and reader.room_row(room_id).n == 1 and reader.room_row("!r:localhost") is None
        assert json.loads(create.json)["room_id"] == room_id
    assert store.write(lambda tx: (tx.room(room_id).room_id, tx.room("!r:localhost"))) == (room_id, None)


def test_a_state_event_knows_what_it_replaced(open_store):
    store = open_store()
    make_room(store)
    for topic in ("one", "two"):
        store.write(lambda tx, topic=topic: tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.topic", ALICE, {"topic": topic}, ""), 5))
    with store.read() as reader:
        event = reader.state_event(1, "m.room.topic", "")
        assert json.loads(event.prev_content) == {"topic": "one"} and event.content == {"topic": "two"} and reader.contents(1, ["m.room.topic", "m.x"]) == {"m.room.topic": {"topic": "two"}}
        assert [state.content for state in reader.state_at(1, event.tick - 1, type="m.room.topic")] == [{"topic": "one"}]
        assert [value for _, value in reader.changes([1], "m.room.topic", "topic")[1]] == ["one", "two"]


def test_the_last_rooms_new_or_old_are_kept_in_memory_and_no_more(open_store, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_CACHED_ROOMS", 3)
    store = open_store()
    for n in range(6):
        make_room(store, room_id=f"!{n}:localhost")
    assert len(store._tx.rooms) <= 3
    store._tx.rooms.clear()
    assert store.write(lambda tx: [tx.room(f"!{n}:localhost").joined for n in range(6)]) == [{ALICE}] * 6 and len(store._tx.rooms) == 3


def test_a_redaction_takes_the_content_from_the_database_and_from_the_state(open_store):
    store = open_store()
    make_room(store)
    event_id = store.write(lambda tx: tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.topic", ALICE, {"topic": "secret"}, ""), 5))

    def redact(tx):
        room = tx.room("!r:localhost")
        redaction = tx.append(room, asbridge.Draft("m.room.redaction", ALICE, {"redacts": event_id}, redacts=event_id), 6)
        tx.redact(room, tx.event(room.n, event_id), asbridge.tick_of(redaction))
        return room.content("m.room.topic")
    assert store.write(redact) == {}
    with store.read() as reader:
        event = reader.event(1, event_id)
        assert event.content == {} and json.loads(event.redacted_because)["content"] == {"redacts": event_id} and event.event_id == event_id
        assert not reader.one("SELECT 1 FROM events WHERE json LIKE '%secret%'")


@pytest.mark.parametrize("filter, found", [
    ({}, "abcd"), ({"types": ["m.a"]}, "a"), ({"types": ["m.*"]}, "abc"), ({"types": ["*"]}, "abcd"), ({"types": []}, ""), ({"not_types": ["m.a", "x*"]}, "bc"), ({"types": ["m.*"], "not_types": ["m.b"]}, "ac"),
    ({"types": ["m.[c]"]}, "c"), ({"types": ["m.?"]}, ""), ({"senders": ["@1:x"]}, "ac"), ({"senders": []}, ""), ({"not_senders": ["@1:x"]}, "bd"), ({"types": ["m.a", "x.d"], "senders": ["@1:x"]}, "a")])
def test_a_filter_passes_the_same_events_in_sql_and_out_of_it(open_store, filter, found):
    store = open_store()
    make_room(store)
    names = {"m.a": "@1:x", "m.b": "@2:x", "m.[c]": "@1:x", "x.d": "@2:x"}

    def job(tx):
        for type, sender in names.items():
            tx.append(tx.room("!r:localhost"), asbridge.Draft(type, sender, {}), 5)
    start = store.position
    store.write(job)
    one = asbridge.Filter(**filter)
    with store.read() as reader:
        events, all_events = [reader.events(1, start, 2**62, 100, False, which) for which in (one, asbridge.Filter())]
    assert "".join(event.type.strip("[].mx") for event in events) == found and [event for event in all_events if one.passes(event)] == events


@pytest.mark.parametrize("filter", [{"senders": 1500}, {"not_senders": 1500}, {"types": 1500}, {"not_types": 1500}])
def test_a_filter_may_have_many_entries(open_store, filter):
    (key, count), = filter.items()
    with open_store().read() as reader:
        assert reader.events(1, 0, 2**62, 10, False, asbridge.Filter(**{key: [f"@u{n}:localhost" for n in range(count)]})) == []


# -- The outbox.

def waiting_texts(body):
    return [event["content"].get("body") for event in json.loads(body)["events"]]


def acknowledge_all(store, id="irc"):
    """Acknowledges until nothing is open; the transactions in order."""
    done = []
    while open := store._tx.boxes[id].open:
        done.append(open)
        store.write(lambda tx, open=open: tx.acknowledge(id, open.txn_id))
    return done


def test_an_event_is_stored_with_who_gets_it_and_why(open_store):
    store = open_store()
    make_room(store)
    ids = [store.write(lambda tx, sender=sender: say(tx, sender=sender)) for sender in (ALICE, GHOST)]
    ids.append(store.write(lambda tx: tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.member", ALICE, {"membership": "invite"}, GHOST), 5)))
    with store.read() as reader:
        assert [reader.reason("irc", asbridge.tick_of(id)) for id in ids] == [None, f"sender {GHOST} matches users[0]", f"target {GHOST} matches users[0]"]


def test_interest_is_decided_by_the_state_at_the_time_of_the_event(open_store):
    store = open_store()
    make_room(store)

    def job(tx):
        room, ticks = tx.room("!r:localhost"), []
        for membership in ("invite", "join", "leave"):
            ticks += [tx.append(room, asbridge.Draft("m.room.member", GHOST if membership != "leave" else ALICE, {"membership": membership}, GHOST), 5), say(tx)]
        tx.add_alias("#_irc_x:localhost", room, ALICE)
        ticks.append(say(tx))
        tx.delete_alias("#_irc_x:localhost", room)
        ticks.append(say(tx))
        return [(tx.reason("irc", asbridge.tick_of(id)) or "").split(" ")[0] for id in ticks]
    assert store.write(job) == ["sender", "", "sender", "member", "target", "", "alias", ""]


def test_each_interested_application_service_has_an_outbox_of_its_own(open_store):
    store = open_store(None, registration("a", url="http://127.0.0.1:1", users=["@_irc_.*"], exclusive=False), registration("b", url="http://127.0.0.1:1", users=["@_irc_.*"], exclusive=False),
                       registration("c", url="http://127.0.0.1:1", users=["@x"]), registration("d", url=None, users=["@_irc_.*"], exclusive=False))
    make_room(store, GHOST)
    with store.read() as reader:
        assert [reader.count_waiting(id) for id in "abcd"] == [1, 1, 0, 0]          # url null: nothing is queued


def test_a_backlog_goes_in_transactions_of_100_events_at_most_in_order(open_store):
    store, frozen = open_store(), []
    make_room(store)
    store.on_frozen = frozen.append
    store.write(lambda tx: [say(tx, sender=GHOST, body=str(n)) for n in range(250)] and None)
    assert len(frozen) == 1
    with store.read() as reader:
        assert reader.count_waiting("irc") == 250
    done = acknowledge_all(store)
    assert [one.events for one in done] == [100, 100, 50] and done == frozen and sum([waiting_texts(one.body) for one in done], []) == [str(n) for n in range(250)]
    assert [one.txn_id for one in done] == sorted({one.txn_id for one in done})
    with store.read() as reader:
        assert reader.count_waiting("irc") == 0


def test_while_a_transaction_is_open_no_other_is_made(open_store):
    store, frozen = open_store(), []
    make_room(store)
    store.on_frozen = frozen.append
    for n in range(5):
        store.write(lambda tx, n=n: say(tx, sender=GHOST, body=str(n)))
    assert [waiting_texts(one.body) for one in frozen] == [["0"]]
    store.write(lambda tx: tx.acknowledge("irc", frozen[0].txn_id))
    assert [waiting_texts(one.body) for one in frozen] == [["0"], ["1", "2", "3", "4"]]


def test_a_transaction_never_changes(open_store):
    store = open_store("a.db")
    make_room(store)
    event_id = store.write(lambda tx: say(tx, sender=GHOST))
    frozen = store._tx.boxes["irc"].open
    store.clock.advance(3600)
    store.write(lambda tx: tx.redact(tx.room("!r:localhost"), tx.event(1, event_id), 1))
    store.write(lambda tx: say(tx, sender=GHOST, body="later"))
    store.close()
    assert open_store("a.db")._tx.boxes["irc"].open == frozen and waiting_texts(frozen.body) == ["hello"]


def test_what_waits_when_the_server_stops_is_frozen_by_the_next_batch_after_the_start(open_store):
    store = open_store("a.db")
    make_room(store, GHOST)
    store.write(lambda tx: say(tx, body="second"))
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute("UPDATE transactions SET acknowledged_ts = 1")        # as if it had died right after the acknowledgement
        db.commit()
    store.close()
    again, frozen = open_store("a.db"), []
    again.on_frozen = frozen.append
    again.write(lambda tx: None)
    assert [waiting_texts(one.body) for one in frozen] == [["second"]]


def test_only_the_open_transaction_can_be_acknowledged_and_only_once(open_store):
    store = open_store()
    make_room(store, GHOST)
    first = store._tx.boxes["irc"].open
    store.write(say)
    for id, txn_id in (("irc", first.txn_id + 1), ("nobody", first.txn_id), ("irc", first.txn_id), ("irc", first.txn_id)):
        store.write(lambda tx, id=id, txn_id=txn_id: tx.acknowledge(id, txn_id))
    with store.read() as reader:
        assert [acknowledged is None for _, _, acknowledged in reader.transactions("irc")] == [False, True]


def test_transaction_ids_rise_though_the_real_clock_goes_back(open_store, monkeypatch):
    store = open_store()
    make_room(store, GHOST)
    monkeypatch.setattr(asbridge.time, "time_ns", lambda: 1000)
    for _ in range(3):
        store.write(say)
        store.write(lambda tx: tx.acknowledge("irc", tx.boxes["irc"].open.txn_id))
    with store.read() as reader:
        ids = [txn_id for txn_id, _, _ in reader.transactions("irc")]
    assert ids[1:] == [ids[0] + n for n in range(1, len(ids))] and len(ids) == 4


def test_a_transaction_id_is_not_used_again_with_a_new_database(open_store):
    ids = []
    for name in ("a.db", "b.db"):
        store = open_store(name)
        make_room(store, GHOST)
        ids.append(store._tx.boxes["irc"].open.txn_id)
        store.clock.advance(-10**9)
    assert ids[0] < ids[1] and abs(ids[1] - time.time() * 1e6) < 60e6


def test_of_the_acknowledged_transactions_the_last_1000_are_kept(open_store, monkeypatch):
    assert (asbridge.KEPT_TRANSACTIONS, asbridge.PRUNED_AT_ONCE) == (1000, 100)
    monkeypatch.setattr(asbridge, "KEPT_TRANSACTIONS", 5)
    monkeypatch.setattr(asbridge, "PRUNED_AT_ONCE", 3)
    store, counts = open_store("a.db"), []
    make_room(store, GHOST)
    acknowledge_all(store)
    for n in range(20):
        store.write(lambda tx, n=n: say(tx, body=str(n)))
        acknowledge_all(store)
        with store.read() as reader:
            kept = [waiting_texts(body) for _, body, _ in reader.transactions("irc")]
            assert reader.one("SELECT count(*) FROM outbox")[0] == sum(map(len, kept)) and reader.count_waiting("irc") == 0
        assert kept[-5:] == [[str(one)] for one in range(n - 4, n + 1)] or n < 5
        counts.append(len(kept))
        if n == 12:
            store.close()
            store = open_store("a.db")                       # what there is is counted
    assert max(counts) == 8 and min(counts[5:]) == 6 and counts[-1] < 9


def test_events_for_an_application_service_are_as_clients_get_them(open_store):
    store = open_store()
    make_room(store)
    event_id = store.write(lambda tx: tx.append(tx.room("!r:localhost"), asbridge.Draft("m.room.member", GHOST, {"membership": "join"}, GHOST), 1000))
    event, = json.loads(store._tx.boxes["irc"].open.body)["events"]
    age = event["unsigned"]["age"]
    assert event == {"event_id": event_id, "room_id": "!r:localhost", "sender": GHOST, "user_id": GHOST, "type": "m.room.member", "state_key": GHOST, "origin_server_ts": 1000,
                     "content": {"membership": "join"}, "unsigned": {"age": age}, "age": age} and age > 0


# ============================================================================
# 6. The homeserver
# ============================================================================

# -- Exclusive namespaces.

def test_a_person_cannot_register_inside_an_exclusive_namespace(hs):
    with refused("M_EXCLUSIVE", 400, "'@_irc_.*'") as caught:
        hs.client("_irc_bob")
    assert "'irc'" in caught.value.error and "users[0]" in caught.value.error


def test_a_person_can_register_inside_a_namespace_that_is_not_exclusive(start):
    hs = start(registration(exclusive=False))
    assert hs.client("_irc_bob").user_id == "@_irc_bob:localhost"


@pytest.mark.parametrize("exclusive", [True, False])
def test_nobody_can_register_an_application_services_own_user(start, exclusive):
    hs = start(registration(users=["@other_.*"], exclusive=exclusive))
    with refused("M_EXCLUSIVE", 400, "sender_localpart"):
        hs.client("_irc_bot")


def test_an_application_service_cannot_register_outside_its_own_namespace(hs):
    with refused("M_EXCLUSIVE", 400, "'@_irc_.*'"):
        acting(hs, "irc", "@alice:localhost")


def test_an_application_service_cannot_register_in_anothers_exclusive_namespace(start):
    hs = start(registration(), registration("xmpp", users=["@_.*"], exclusive=False))
    with refused("M_EXCLUSIVE", 400, "'irc'"):
        acting(hs, "xmpp", "@_irc_bob:localhost")
    assert acting(hs, "xmpp", "@_xmpp_bob:localhost").whoami()["user_id"] == "@_xmpp_bob:localhost"


@pytest.mark.parametrize("username,errcode", [("_irc_x", "M_EXCLUSIVE"), ("alice", "M_USER_IN_USE"), ("Ümlaut", "M_INVALID_USERNAME"),
                                              ("a" * 250, "M_INVALID_USERNAME"), ("", "M_INVALID_USERNAME"), (None, "M_MISSING_PARAM")])
def test_register_available_tells_what_registering_would_tell(hs, username, errcode):
    hs.client("alice")
    with refused(errcode, 400):
        asbridge.Client(hs.url).call("GET", V3 + "/register/available", username=username)
    assert asbridge.Client(hs.url).call("GET", V3 + "/register/available", username="bob") == {"available": True}


def test_a_person_can_neither_create_nor_delete_an_alias_in_an_exclusive_namespace(hs):
    alice, room = hs.client("alice"), bot_of(hs).create_room(room_alias_name="_irc_lobby", preset="public_chat")
    alice.join(room)
    for change in (lambda: alice.set_alias("#_irc_x:localhost", room), lambda: alice.delete_alias("#_irc_lobby:localhost"),
                   lambda: alice.create_room(room_alias_name="_irc_y")):
        with refused("M_EXCLUSIVE", 400, "'#_irc_.*'"):
            change()


def test_an_application_service_has_full_control_over_the_aliases_in_its_namespace_and_none_outside(start):
    hs = start(registration(exclusive=False))
    alice, bot = hs.client("alice"), bot_of(hs)
    room = alice.create_room()
    alice.set_alias("#_irc_x:localhost", room)
    bot.delete_alias("#_irc_x:localhost")
    bot.set_alias("#_irc_y:localhost", room)
    for change in (lambda: bot.set_alias("#other:localhost", room), lambda: bot.delete_alias("#other:localhost")):
        with refused("M_EXCLUSIVE", 400, "outside"):
            change()


def test_another_application_service_cannot_take_an_alias_in_an_exclusive_namespace(start):
    hs = start(registration(), registration("xmpp", aliases=["#_.*"], exclusive=False))
    bot = bot_of(hs, "xmpp")
    room = bot.create_room()
    with refused("M_EXCLUSIVE", 400, "'irc'"):
        bot.set_alias("#_irc_x:localhost", room)


# -- Interest: what is pushed to whom.

def test_an_event_of_a_room_without_anybody_of_the_namespace_is_pushed_to_nobody(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    alice = hs.client("alice")
    event_id = alice.say(alice.create_room(), "secret")
    hs.settle()
    assert not r.requests and hs.why(event_id, "irc")["reason"] is None


def test_the_sender_in_the_namespace_makes_interest_and_the_echo_is_kept(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    event_id = bob.say(bob.create_room(), "mine")
    assert heard(hs, r) == ["mine"] and hs.why(event_id, "irc")["reason"] == "sender @_irc_bob:localhost matches users[0]"


def test_the_target_of_a_membership_makes_interest_so_that_an_invitation_of_a_ghost_reaches_its_service(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    alice = hs.client("alice")
    acting(hs, "irc", "@_irc_bob:localhost")
    room = alice.create_room(invite=["@_irc_bob:localhost"])
    alice.say(room, "not yet")
    hs.settle()
    assert [(event["type"], event["state_key"]) for event in r.events] == [("m.room.member", "@_irc_bob:localhost")]
    assert hs.why(r.events[0]["event_id"], "irc")["reason"] == "target @_irc_bob:localhost matches users[0]"


def test_an_invitation_and_a_knock_are_pushed_with_what_one_may_know_of_the_room(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, users=["@_irc_.*", "@alice:.*"], exclusive=False))
    alice, bob = hs.client("alice"), hs.client("bob")
    room = alice.create_room(name="Tea", initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}])
    alice.invite(room, "@_irc_bot:localhost"), bob.ask("POST", "knock", room, body={}), alice.set_state(room, "m.room.name", {"name": "Coffee"})
    hs.settle()
    told = {key: event["unsigned"][key] for event in r.events for key in ("invite_room_state", "knock_room_state") if key in event["unsigned"]}
    assert [{event["type"]: event["content"] for event in part}["m.room.name"] for part in told.values()] == [{"name": "Tea"}] * 2 == [{"name": "Tea"}] * len(told)
    assert all(event.keys() == {"type", "state_key", "sender", "content"} for part in told.values() for event in part)
    assert told["invite_room_state"][0]["type"] == "m.room.create" and told["invite_room_state"][-1]["state_key"] == alice.user_id


def test_a_service_that_claims_the_alias_of_a_new_room_gets_its_first_event_too(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, users=[], namespaces={"aliases": [{"regex": "#log_.*", "exclusive": False}]}))
    alice = hs.client("alice")
    for version in ("11", "12"):
        alice.create_room(room_alias_name=f"log_{version}", room_version=version)
    hs.settle()
    assert [event["type"] for event in r.events].count("m.room.create") == 2 and len({event["room_id"] for event in r.events}) == 2


def test_an_invitation_of_a_ghost_that_does_not_exist_reaches_its_service_whatever_it_answered(start, recorder):
    r = recorder(lambda request, body: (404 if request.method == "GET" else 200, {}))
    hs = start(registration(url=r.url))
    alice = hs.client("alice")
    alice.invite(alice.create_room(), "@_irc_new:localhost")
    hs.settle()
    assert [event["state_key"] for event in r.events] == ["@_irc_new:localhost"]


def test_a_joined_member_makes_interest_until_it_has_left(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    alice, bob = hs.client("alice"), acting(hs, "irc", "@_irc_bob:localhost")
    room = alice.create_room(preset="public_chat")
    alice.say(room, "before")
    bob.join(room)
    event_id = alice.say(room, "during")
    bob.leave(room)
    alice.say(room, "after")
    assert heard(hs, r) == ["during"] and hs.why(event_id, "irc")["reason"] == "member @_irc_bob:localhost matches users[0]"
    assert r.events[-1]["content"]["membership"] == "leave"


def test_an_alias_of_the_room_makes_interest_until_it_is_deleted(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, exclusive=False))
    alice = hs.client("alice")
    room = alice.create_room()
    alice.say(room, "before")
    alice.set_alias("#_irc_x:localhost", room)
    event_id = alice.say(room, "during")
    alice.delete_alias("#_irc_x:localhost")
    alice.say(room, "after")
    assert heard(hs, r) == ["during"] and hs.why(event_id, "irc")["reason"] == "alias #_irc_x:localhost matches aliases[0]"


@pytest.mark.parametrize("version", ["10", "11", "12"])
def test_the_room_id_makes_interest(start, recorder, version):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room(room_version=version)
    event_id = alice.say(room, "hello")
    assert heard(hs, r) == ["hello"] and hs.why(event_id, "irc")["reason"] == f"room {room} matches rooms[0]"
    assert r.events[0]["type"] == "m.room.create" and {event["room_id"] for event in r.events} == {room}


def test_the_services_own_user_exists_from_the_start_and_makes_interest(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, users=[], sender_localpart="bridge"))
    alice = hs.client("alice")
    room = alice.create_room(invite=["@bridge:localhost"])
    bot_of(hs).join(room)
    event_id = alice.say(room, "hello")
    assert heard(hs, r) == ["hello"] and "sender_localpart" in hs.why(event_id, "irc")["reason"]


def test_several_services_interested_in_one_event_each_get_it(start, recorder):
    one, two, three = recorder(), recorder(), recorder()
    hs = start(registration("one", one.url, users=["@alice.*"], exclusive=False), registration("two", two.url, rooms=["!.*"]),
               registration("three", three.url, users=["@carol.*"]))
    alice = hs.client("alice")
    alice.say(alice.create_room(), "hello")
    hs.settle()
    assert one.texts() == two.texts() == ["hello"] and not three.requests


# -- Accounts: registering and logging in.

def test_registration_is_user_interactive_with_the_dummy_stage(hs):
    status, challenge = ask(hs, "POST", V3 + "/register", body={"username": "alice", "password": "w"})
    assert status == 401 and challenge["flows"] == [{"stages": ["m.login.dummy"]}] and challenge["params"] == {} and challenge["session"]
    status, answer = ask(hs, "POST", V3 + "/register", body={"username": "alice", "password": "w", "auth": {"type": "m.login.dummy", "session": challenge["session"]}})
    assert status == 200 and answer["user_id"] == "@alice:localhost" and answer["access_token"] and answer["device_id"]


def test_a_name_that_is_none_or_taken_is_refused_before_the_challenge(hs):
    hs.client("alice")
    for username, errcode in (("alice", "M_USER_IN_USE"), ("A b", "M_INVALID_USERNAME"), (5, "M_BAD_JSON")):
        assert ask(hs, "POST", V3 + "/register", body={"username": username})[1]["errcode"] == errcode


def test_without_a_name_the_homeserver_makes_one_up(start):
    status, answer = ask(start(), "POST", V3 + "/register", body={"auth": {"type": "m.login.dummy"}})
    assert status == 200 and re.fullmatch(r"@[a-z0-9]+:localhost", answer["user_id"])


def test_inhibit_login_registers_without_a_session(start):
    status, answer = ask(start(), "POST", V3 + "/register", body={"username": "a", "inhibit_login": True, "auth": {"type": "m.login.dummy"}})
    assert status == 200 and "access_token" not in answer and "device_id" not in answer


def test_people_cannot_register_where_registration_is_closed_which_is_told_before_the_challenge_but_ghosts_can(start):
    hs = start(registration(), open_registration=False)
    for auth in ({}, {"auth": {"type": "m.login.dummy"}}):
        assert ask(hs, "POST", V3 + "/register", body={"username": "a", **auth})[0] == 403
    assert ask(hs, "POST", V3 + "/register", "as-irc", {**AS_LOGIN, "username": "_irc_a"})[0] == 200


def test_there_are_no_guests(start):
    assert ask(start(), "POST", V3 + "/register?kind=guest", body={})[0] == 403


def test_a_password_logs_in_by_localpart_or_whole_id_and_a_wrong_one_does_not(hs):
    hs.client("alice", "wonderland")
    client = asbridge.Client(hs.url)
    for user in ("alice", "@alice:localhost"):
        answer = client.call("POST", V3 + "/login", {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": user},
                                                     "password": "wonderland", "device_id": "D", "initial_device_display_name": "phone"})
        assert (answer["user_id"], answer["device_id"]) == ("@alice:localhost", "D")
    for user, password in (("alice", "x"), ("nobody", "wonderland")):
        with refused("M_FORBIDDEN", 403):
            client.call("POST", V3 + "/login", {"type": "m.login.password", "user": user, "password": password})


def test_a_password_is_kept_as_scrypt_has_it_with_a_salt_of_its_own(cheap_passwords):
    with unittest.mock.patch.dict(asbridge.SCRYPT, cheap_passwords):
        stored = asbridge.hash_password("secret")
    name, salt, key = stored.split("$")
    assert (name, len(salt)) == ("scrypt", 32) and asbridge.hash_password("secret").split("$")[1] != salt
    assert key == hashlib.scrypt(b"secret", salt=bytes.fromhex(salt), n=16_384, r=8, p=1).hex()


def test_two_with_the_same_password_have_it_stored_differently_and_a_guess_costs_the_same_for_whoever_it_is(start, monkeypatch, cheap_passwords):
    hs, calls = start(registration()), []
    monkeypatch.setitem(asbridge.SCRYPT, "n", cheap_passwords["n"])

    def scrypt(password, salt, **how):
        calls.append((how["n"], how["r"], how["p"]))
        return hashlib.sha256(salt + password).digest()
    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    hs.client("alice", "w"), hs.client("bob", "w"), hs.client("carol"), acting(hs, "irc", "@_irc_bob:localhost")
    with hs.world.store.read() as reader:
        stored = [reader.user(f"@{name}:localhost").password.split("$") for name in ("alice", "bob")]
    assert all(kind == "scrypt" and len(salt) == 32 for kind, salt, _ in stored) and stored[0][1] != stored[1][1] and stored[0][2] != stored[1][2]
    calls.clear()
    for name in ("alice", "carol", "_irc_bob", "nobody", "@nobody:localhost", "@x:elsewhere"):
        with refused("M_FORBIDDEN", 403, "wrong user name or password"):
            hs.api.accounts.login(name, "x")
    assert calls == [(16_384, 8, 1)] * 6                     # 16 MiB each


def test_somebody_without_a_password_cannot_log_in_with_one(hs):
    hs.client("alice")
    for user in ("alice", "_irc_bot"):
        with refused("M_FORBIDDEN", 403):
            asbridge.Client(hs.url).call("POST", V3 + "/login", {"type": "m.login.password", "user": user, "password": ""})


@pytest.mark.parametrize("body,errcode", [
    ({"type": "m.login.sso", "user": "a"}, "M_UNKNOWN"), ({"user": "a"}, "M_MISSING_PARAM"), ({"type": "m.login.password"}, "M_MISSING_PARAM"),
    ({"type": "m.login.password", "user": "a"}, "M_MISSING_PARAM"), ({"type": "m.login.password", "user": 5, "password": ""}, "M_BAD_JSON"),
    ({"type": "m.login.password", "identifier": {"type": "m.id.phone", "user": "a"}, "password": ""}, "M_UNKNOWN")])
def test_a_login_that_is_none_is_refused(start, body, errcode):
    status, answer = ask(start(), "POST", V3 + "/login", body=body)
    assert (status, answer["errcode"]) == (400, errcode)


def test_the_login_flows_are_listed(start):
    flows = ask(start(), "GET", V3 + "/login")[1]["flows"]
    assert [flow["type"] for flow in flows] == ["m.login.password", "m.login.application_service"]


def test_a_new_login_of_a_device_ends_the_token_that_it_had(hs):
    alice = hs.client("alice", "w")
    device = alice.whoami()["device_id"]
    hs.api.accounts.login("alice", "w", device_id=device)
    with refused("M_UNKNOWN_TOKEN", 401):
        alice.whoami()


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_logout_ends_the_session_and_its_device(hs, everywhere):
    alice = hs.client("alice", "w")
    other = again(hs, alice, device_id="OTHER")
    assert ask(hs, "POST", V3 + "/logout" + "/all" * everywhere, alice.token, b"") == (200, {})
    with refused("M_UNKNOWN_TOKEN", 401):
        alice.whoami()
    if everywhere:
        with refused("M_UNKNOWN_TOKEN", 401):
            other.whoami()
    else:
        assert [device["device_id"] for device in other.call("GET", V3 + "/devices")["devices"]] == ["OTHER"]


def test_whoami_says_user_device_and_that_it_is_no_guest(start):
    answer = start().client("alice").whoami()
    assert answer["user_id"] == "@alice:localhost" and answer["is_guest"] is False and answer["device_id"]


def test_devices_are_listed_named_and_only_ones_own(alice, bob):
    device = alice.whoami()["device_id"]
    assert alice.call("GET", V3 + f"/devices/{device}")["display_name"] == ""          # null lets matrix-commander crash
    alice.call("PUT", V3 + f"/devices/{device}", {"display_name": "laptop"})
    assert [(one["device_id"], one["display_name"]) for one in alice.call("GET", V3 + "/devices")["devices"]] == [(device, "laptop")]
    for change in (lambda: bob.call("GET", V3 + f"/devices/{device}"), lambda: bob.call("PUT", V3 + f"/devices/{device}", {"display_name": "mine"})):
        with refused("M_NOT_FOUND", 404):
            change()


def test_a_device_is_deleted_by_its_user_who_confirms_it(hs):
    alice = hs.client("alice", "w")
    old = again(hs, alice, device_id="OLD")
    assert ask(hs, "DELETE", V3 + "/devices/OLD", alice.token, b"")[1]["flows"] == [{"stages": ["m.login.password"]}] and old.whoami()
    assert alice.ask("DELETE", "devices", "OLD", body=confirmed()) == {}
    with refused("M_UNKNOWN_TOKEN", 401):
        old.whoami()


def test_to_delete_devices_that_are_not_there_takes_no_time(hs):
    who, deleted = asbridge.Who(hs.client("alice").user_id), []
    hs.world.store.write(lambda tx: setattr(tx, "delete_device", lambda *args: deleted.append(args)))
    hs.api.accounts.delete_devices(who, ["", *map(str, range(100_000)), *[who.device_id or "x"] * 1000])
    assert deleted == []


def test_who_names_nothing_as_a_device_to_delete_loses_none(hs):
    alice = hs.client("alice", "w")
    other = again(hs, alice)
    with contextlib.suppress(MatrixError):
        alice.ask("POST", "delete_devices", body={"devices": [None], **confirmed()})
    assert alice.whoami() and other.whoami()


def test_a_change_of_a_session_that_has_ended_is_refused_though_it_was_asked_before(hs, alice):
    who = hs.api.identify(asbridge.Request(f"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {alice.token}"), "user")
    hs.api.accounts.logout(who)
    for change in (lambda: hs.api.data.set_account_data(who, "", "x", {}), lambda: hs.api.data.add_filter(who, {}),
                   lambda: hs.api.data.set_tag(who, "!r:localhost", "u.x", {}), lambda: hs.api.rooms.create(who, {}),
                   lambda: hs.api.media.upload(who, b"x", "text/plain", None)):
        with refused("M_UNKNOWN_TOKEN", 401):
            change()


# -- Accounts: changing the password, and deactivating.

@pytest.mark.parametrize("where,body", [("/account/password", {"new_password": "n"}), ("/account/deactivate", {}), ("/delete_devices", {"devices": []})])
def test_what_matters_is_confirmed_by_the_password(hs, where, body):
    alice = hs.client("alice", "w")
    hs.client("bob", "b")
    status, first = ask(hs, "POST", V3 + where, alice.token, body)
    assert status == 401 and set(first) == {"session", "flows", "params"} and first["flows"] == [{"stages": ["m.login.password"]}]
    session = first["session"]
    for auth, errcode in (({"session": session}, None), ({"type": "m.login.dummy"}, None), ({"type": "m.login.password", "password": "x"}, "M_FORBIDDEN"),
                          ({"type": "m.login.password"}, "M_MISSING_PARAM"), ({"type": "m.login.password", "password": 5}, "M_BAD_JSON"),
                          ({"type": "m.login.password", "password": "b", "user": "bob"}, "M_FORBIDDEN"),
                          ({"type": "m.login.password", "password": "w", "identifier": {"type": "m.id.user", "user": "@bob:localhost"}}, "M_FORBIDDEN")):
        status, answer = ask(hs, "POST", V3 + where, alice.token, {**body, "auth": {"session": session, **auth}})
        assert status == 401 and answer.get("errcode") == errcode and answer["session"] == session and answer["flows"] == first["flows"]
        assert ("error" in answer) == (errcode is not None)
    assert ask(hs, "POST", V3 + where, body=body)[1]["errcode"] == "M_MISSING_TOKEN"
    assert ask(hs, "POST", V3 + where, alice.token, {**body, "auth": []})[1]["errcode"] == "M_BAD_JSON"
    assert ask(hs, "POST", V3 + where, alice.token, {**body, **confirmed(session=session)})[0] == 200


@pytest.mark.parametrize("who", [{}, {"user": "alice"}, {"user": "@alice:localhost"}, {"identifier": {"type": "m.id.user", "user": "alice"}},
                                 {"identifier": {"type": "m.id.user", "user": "@alice:localhost"}}])
def test_the_password_is_confirmed_with_or_without_the_users_name(hs, who):
    assert hs.client("alice", "w").call("POST", V3 + "/account/password", {"new_password": "n", **confirmed(**who)}) == {}


def test_a_sync_that_waits_is_told_when_its_session_ends(hs, alice):
    other = again(hs, alice)
    tokens = [client.sync()["next_batch"] for client in (alice, other)]
    with background(alice.sync, tokens[0], 30_000) as first, background(other.sync, tokens[1], 200) as second:
        eventually(lambda: len(hs.world.store.waiters._bells.get(alice.user_id, ())) == 2)
        alice.ask("POST", "logout")
        with refused("M_UNKNOWN_TOKEN", 401):
            first.result(5)
        assert second.result(5)["next_batch"]                # the other session goes on


@pytest.mark.parametrize("logout_devices", [None, True, False])
def test_a_new_password_ends_the_other_sessions_unless_they_are_to_stay(hs, logout_devices):
    alice = hs.client("alice", "w")
    other = again(hs, alice)
    options = {} if logout_devices is None else {"logout_devices": logout_devices}
    assert alice.call("POST", V3 + "/account/password", {"new_password": "n", **options, **confirmed()}) == {}
    assert len(alice.call("GET", V3 + "/devices")["devices"]) == (2 if logout_devices is False else 1)
    with contextlib.nullcontext() if logout_devices is False else refused("M_UNKNOWN_TOKEN", 401):
        other.whoami()
    with refused("M_FORBIDDEN", 403):
        hs.api.accounts.login("alice", "w")
    assert hs.api.accounts.login("alice", "n")["user_id"] == "@alice:localhost"


def test_a_new_password_that_is_none_is_refused(start):
    alice = start().client("alice", "w")
    for body, errcode in (({}, "M_MISSING_PARAM"), ({"new_password": 5}, "M_BAD_JSON"), ({"new_password": ""}, "M_INVALID_PARAM"), ({"new_password": "n", "logout_devices": 1}, "M_BAD_JSON")):
        with refused(errcode, 400):
            alice.call("POST", V3 + "/account/password", {**body, **confirmed()})


def test_a_service_cannot_change_a_password_and_is_told_so_beforehand(start):
    hs = start(registration(users=["@alice:.*"]))
    hs.client("alice2", "w")
    alice = acting(hs, "irc", "@alice:localhost")
    with refused("M_FORBIDDEN", 403, "application service"):
        alice.call("POST", V3 + "/account/password", {"new_password": "n"})
    assert alice.call("GET", V3 + "/capabilities")["capabilities"]["m.change_password"] == {"enabled": False}
    assert hs.client("bob").call("GET", V3 + "/capabilities")["capabilities"]["m.change_password"] == {"enabled": True}


@pytest.mark.parametrize("erase", [{}, {"erase": False}, {"erase": True}])
def test_a_deactivated_account_leaves_its_rooms_and_keeps_nothing_but_its_name(hs, erase):
    alice, bob = hs.client("alice", "w"), hs.client("bob")
    other = again(hs, alice)
    joined, invited, knocked = bob.create_room(preset="public_chat"), bob.create_room(invite=[alice.user_id]), bob.create_room(
        initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}])
    alice.join(joined), alice.ask("POST", "knock", knocked, body={}), alice.set_displayname("Alice"), alice.set_account_data("org.x", {"a": 1})
    alice.call("PUT", path("profile", alice.user_id, "m.tz"), {"m.tz": "UTC"}), upload(alice), alice.ask("POST", "keys", "device_signing", "upload", body={"master_key": {"user_id": alice.user_id, "usage": ["master"], "keys": {"ed25519:x": "x"}}, **confirmed()})
    alice.ask("POST", "room_keys", "version", body={"algorithm": "a", "auth_data": {}})
    alice.ask("PUT", "room_keys", "keys", joined, "s", version="1", body={"first_message_index": 0, "forwarded_count": 0, "is_verified": True, "session_data": {}})
    openid = alice.ask("POST", "user", alice.user_id, "openid", "request_token", body={})["access_token"]
    assert alice.call("POST", V3 + "/account/deactivate", {**erase, **confirmed()}) == {"id_server_unbind_result": "success"}
    for room in (joined, invited, knocked):
        assert bob.state(room, "m.room.member", "@alice:localhost") == {"membership": "leave"}
    for client in (alice, other):
        with refused("M_UNKNOWN_TOKEN", 401):
            client.whoami()
    for password in ("w", "x"):
        with refused("M_USER_DEACTIVATED", 403):
            asbridge.Client(hs.url).call("POST", V3 + "/login", {"type": "m.login.password", "user": "alice", "password": password})
    assert ask(hs, "POST", V3 + "/register", body={"username": "alice", "password": "p"})[1]["errcode"] == "M_USER_IN_USE"
    assert bob.profile("@alice:localhost") == {} and bob.call("POST", V3 + "/user_directory/search", {"search_term": "alice"})["results"] == []
    assert ask(hs, "GET", "/_matrix/federation/v1/openid/userinfo?access_token=" + openid)[0] == 401
    with hs.world.store.read() as reader:
        for table in ("devices", "sessions", "account_data", "device_keys", "one_time_keys", "cross_signing", "backups"):
            assert reader.all(f"SELECT * FROM {table} WHERE user_id = '@alice:localhost'") == []
        assert reader.all("SELECT * FROM backup_keys") == []


def test_deactivation_ends_what_waits_in_sync_and_nobody_acts_as_the_account_any_more(start):
    hs = start(registration(users=["@alice:.*"], exclusive=False))
    alice, acting_as = hs.client("alice", "w"), asbridge.Client(hs.url, "as-irc", "@alice:localhost")
    other = again(hs, alice)
    acting_as.whoami()
    since = alice.sync()["next_batch"]
    with ThreadPoolExecutor() as pool:
        looks = [pool.submit(one.sync, since, 30_000) for one in (alice, other)]
        eventually(lambda: len(hs.world.store.waiters._bells.get("@alice:localhost", ())) == 2)
        asbridge.Client(hs.url, alice.token).call("POST", V3 + "/account/deactivate", confirmed())
        for look in looks:
            with refused("M_UNKNOWN_TOKEN", 401):
                look.result(5)
    for one in (alice, other):
        with refused("M_UNKNOWN_TOKEN", 401):
            one.sync(since)
    with refused("M_USER_DEACTIVATED", 403):
        acting_as.whoami()


def test_an_account_stays_deactivated_over_a_restart(start, tmp_path):
    database = str(tmp_path / "hs.db")
    hs = start(registration(), database=database)
    acting(hs, "irc", "@_irc_bob:localhost").call("POST", V3 + "/account/deactivate", {})
    hs.stop()
    with refused("M_USER_DEACTIVATED", 403):
        acting(start(registration(), database=database), "irc", "@_irc_bob:localhost", register=False).whoami()


def test_a_service_deactivates_a_ghost_without_a_password_and_it_is_no_ghost_any_more(hs):
    ghost, bot = acting(hs, "irc", "@_irc_bob:localhost"), bot_of(hs)
    room = ghost.create_room(preset="public_chat")
    bot.join(room)
    assert ghost.call("POST", V3 + "/account/deactivate", {}) == {"id_server_unbind_result": "success"}
    assert list(bot.joined_members(room)) == [bot.user_id]
    for use in (ghost.whoami, lambda: bot.call("POST", V3 + "/login", {"type": "m.login.application_service", "user": "_irc_bob"})):
        with refused("M_USER_DEACTIVATED", 403):
            use()
    with refused("M_USER_IN_USE", 400):
        bot.call("POST", V3 + "/register", {"type": "m.login.application_service", "username": "_irc_bob"})
    with refused("M_FORBIDDEN", 403, "user_id="):
        bot.call("POST", V3 + "/account/deactivate", {})
    assert bot.whoami()["user_id"] == "@_irc_bot:localhost"


# -- Accounts: profiles.

def test_a_profile_spreads_into_the_rooms_that_one_has_joined(hs, alice, bob, room):
    left = alice.create_room()
    alice.leave(left)
    alice.set_displayname("Al")
    alice.set_avatar_url("mxc://localhost/a")
    assert alice.joined_members(room)[alice.user_id] == {"display_name": "Al", "avatar_url": "mxc://localhost/a"}
    assert alice.profile() == {"displayname": "Al", "avatar_url": "mxc://localhost/a"}
    assert "displayname" not in alice.state(left, "m.room.member", alice.user_id)
    assert ask(hs, "GET", path("profile", alice.user_id, "displayname")) == (200, {"displayname": "Al"})
    assert ask(hs, "GET", path("profile", bob.user_id, "avatar_url")) == (200, {})


def test_a_change_of_name_does_not_repeat_why_one_came(alice, bob, room):
    bob.call("POST", path("join", room), {"reason": "just looking"})
    bob.set_displayname("Bobby")
    assert alice.state(room, "m.room.member", bob.user_id) == {"membership": "join", "displayname": "Bobby"}


def test_an_empty_name_is_none(hs, alice, room):
    alice.set_avatar_url("mxc://localhost/x")
    for key in ("displayname", "avatar_url"):
        alice.ask("PUT", "profile", alice.user_id, key, body={key: ""})
        assert ask(hs, "GET", path("profile", alice.user_id, key)) == (200, {})
    assert alice.profile() == {} and alice.state(room, "m.room.member", alice.user_id) == {"membership": "join"}


def test_a_profile_belongs_to_its_user_and_an_unknown_one_is_not_found(alice, bob):
    with refused("M_FORBIDDEN", 403):
        bob.call("PUT", path("profile", alice.user_id, "displayname"), {"displayname": "x"})
    for where in (["@nobody:localhost"], ["@nobody:localhost", "displayname"], ["@alice:elsewhere", "avatar_url"]):
        with refused("M_NOT_FOUND", 404):
            bob.ask("GET", "profile", *where)
    with refused("M_NOT_FOUND", 404):
        bob.call("GET", path("profile", alice.user_id, "shoe_size"))
    with refused("M_BAD_JSON", 400):
        bob.call("PUT", path("profile", bob.user_id, "displayname"), {"displayname": 5})


@pytest.mark.parametrize("value", ["Europe/London", None, 0, [{"a": "é"}], {}])
def test_a_profile_may_have_fields_of_ones_own_of_any_type(hs, alice, room, value):
    before, where = alice.sync()["next_batch"], path("profile", alice.user_id, "m.tz")
    alice.call("PUT", where, {"m.tz": value, "other": 1})
    alice.call("PUT", path("profile", alice.user_id, "com.example.pronouns"), {"com.example.pronouns": "she"})
    assert ask(hs, "GET", where) == (200, {"m.tz": value})
    assert alice.profile() == {"displayname": "alice", "m.tz": value, "com.example.pronouns": "she"}
    assert alice.sync(since=before).get("rooms", {}) == {}   # only displayname and avatar_url are copied into rooms
    alice.call("DELETE", where), alice.call("DELETE", where)
    assert ask(hs, "GET", where)[1]["errcode"] == "M_NOT_FOUND" and "m.tz" not in alice.profile()


def test_a_deleted_displayname_is_gone_from_the_rooms_too(alice, room):
    alice.call("DELETE", path("profile", alice.user_id, "displayname"))
    assert alice.profile() == {} and alice.state(room, "m.room.member", alice.user_id) == {"membership": "join"}


@pytest.mark.parametrize("key, body, errcode", [
    ("m.tz", {}, "M_MISSING_PARAM"), ("displayname", {}, "M_MISSING_PARAM"), ("avatar_url", {"displayname": "x"}, "M_MISSING_PARAM"),
    ("Shoe", {"Shoe": 1}, "M_INVALID_PARAM"), ("1x", {"1x": 1}, "M_INVALID_PARAM"), ("a/b", {"a/b": 1}, "M_INVALID_PARAM"), ("a\n", {"a\n": 1}, "M_INVALID_PARAM"),
    ("x" * 256, {"x" * 256: 1}, "M_KEY_TOO_LARGE"), ("a" * 255, {"a" * 255: "x" * 65_400}, "M_PROFILE_TOO_LARGE"), ("a", {"a": "é" * 33_000}, "M_PROFILE_TOO_LARGE")])
def test_a_profile_field_has_a_name_a_value_and_a_largest_size(alice, key, body, errcode):
    with refused(errcode, 400):
        alice.call("PUT", path("profile", alice.user_id, key), body)
    assert alice.profile() == {"displayname": "alice"}


def test_a_profile_has_64_KiB_at_most_with_all_its_fields(alice):
    alice.call("PUT", path("profile", alice.user_id, "a"), {"a": "x" * 40_000})
    for key in ("b", "displayname"):
        alice.call("PUT", path("profile", alice.user_id, "a"), {"a": "x" * 65_480})      # in place of what was there
        with refused("M_PROFILE_TOO_LARGE", 400):
            alice.call("PUT", path("profile", alice.user_id, key), {key: "y" * 200})


def test_a_ghosts_profile_fields_are_set_by_its_application_service(alice, ghost):
    where = path("profile", ghost.user_id, "com.example.network")
    ghost.call("PUT", where, {"com.example.network": {"id": "libera"}})
    assert alice.profile(ghost.user_id)["com.example.network"] == {"id": "libera"}
    for method, body in (("PUT", {"com.example.network": 1}), ("DELETE", None)):
        with refused("M_FORBIDDEN", 403):
            alice.call(method, where, body)


# -- What may be seen of a room.

@pytest.mark.parametrize("visibility,seen", [("world_readable", ["early", "invited", "joined"]), ("shared", ["early", "invited", "joined"]),
                                             ("invited", ["invited", "joined"]), ("joined", ["joined"])])
def test_who_has_joined_sees_as_much_as_the_history_visibility_says(alice, bob, visibility, seen):
    room = alice.create_room(initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": visibility}}])
    alice.say(room, "early")
    alice.invite(room, bob.user_id)
    alice.say(room, "invited")
    bob.join(room)
    alice.say(room, "joined")
    assert bodies(all_messages(bob, room)) == seen == bodies(reversed(all_messages(bob, room, "b")))
    assert bodies(joined(bob.sync(filter={"room": {"timeline": {"limit": 100}}}), room)["timeline"]["events"]) == seen


@pytest.mark.parametrize("visibility,seen", [("shared", ["before", "during"]), ("invited", ["during"]), ("joined", ["during"]),
                                             ("world_readable", ["before", "during", "after"])])
def test_who_has_left_sees_what_was_there_until_then(alice, bob, visibility, seen):
    room = alice.create_room(preset="public_chat", initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": visibility}}])
    alice.say(room, "before")
    bob.join(room)
    alice.say(room, "during")
    alice.set_state(room, "m.room.topic", {"topic": "then"})
    bob.leave(room)
    alice.say(room, "after")
    alice.set_state(room, "m.room.topic", {"topic": "now"})
    assert bodies(all_messages(bob, room)) == seen
    assert bob.state(room, "m.room.topic") == {"topic": "now" if visibility == "world_readable" else "then"}
    topic = next(event["content"]["topic"] for event in bob.all_state(room) if event["type"] == "m.room.topic")
    assert topic == bob.state(room, "m.room.topic")["topic"]


def test_who_was_never_there_sees_nothing_unless_the_room_is_world_readable(alice, bob, room):
    alice.set_alias("#two:localhost", room)
    event_id = alice.say(room, "hello")
    looks = [lambda: bob.messages(room), lambda: bob.all_state(room), lambda: bob.members(room), lambda: bob.state(room, "m.room.create"),
             lambda: bob.call("GET", path("rooms", room, "context", event_id)), lambda: bob.call("GET", path("rooms", room, "aliases"))]
    for look in looks:
        with refused("M_FORBIDDEN", 403):
            look()
    alice.set_state(room, "m.room.history_visibility", {"history_visibility": "world_readable"})
    event_id = alice.say(room, "for everybody")
    assert bodies(bob.messages(room)["chunk"]) == ["for everybody"]
    for look in looks:
        assert look()


def test_who_is_invited_sees_neither_the_state_nor_the_timeline_of_a_shared_room(alice, bob):
    room = alice.create_room(invite=[bob.user_id])
    alice.say(room, "x")
    for look in (lambda: bob.messages(room), lambda: bob.all_state(room), lambda: bob.state(room, "m.room.name"), lambda: bob.members(room)):
        with refused("M_FORBIDDEN", 403):
            look()


def test_what_was_said_between_leaving_and_coming_back_stays_hidden_in_a_joined_room(alice, bob):
    room = alice.create_room(preset="public_chat", initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}])
    bob.join(room)
    alice.say(room, "one")
    bob.leave(room)
    hidden = alice.say(room, "two")
    bob.join(room)
    alice.say(room, "three")
    assert bodies(all_messages(bob, room)) == ["one", "three"]
    with refused("M_NOT_FOUND", 404):
        bob.event(room, hidden)


class History:
    """A room's events, all of them in order, and what the specification lets somebody see of them."""

    def __init__(self, events, user_id):
        self.events, self.ids = events, [event["event_id"] for event in events]
        def changes(type, key, name):
            return [(n, event["content"][name]) for n, event in enumerate(events, 1) if (event["type"], event.get("state_key")) == (type, key)]
        self.visibilities = changes("m.room.history_visibility", "", "history_visibility")
        self.memberships = [(0, "leave"), *changes("m.room.member", user_id, "membership")]
        self.seen = [n for n in range(1, len(events) + 1) if spec_may_see(n, self.visibilities, self.memberships)]
        self.now, self.open = self.memberships[-1][1], self.visibilities[-1][1] == "world_readable"
        left = [n for (n, _), (_, before) in zip(self.memberships[1:], self.memberships, strict=False) if before == "join"]
        self.upto = len(events) if self.now == "join" or self.open else left[-1] if left else 0      # as when the state may be seen; 0: not at all

    def seen_ids(self):
        return [self.ids[n - 1] for n in self.seen]

    def state(self, upto, type=None):
        found = {(event["type"], event["state_key"]): event["event_id"] for event in self.events[:upto] if "state_key" in event}
        return {event_id for (kind, _), event_id in found.items() if type in (None, kind)}

    def children(self, parent):
        return [self.ids[n - 1] for n in self.seen if self.events[n - 1]["content"].get("m.relates_to", {}).get("event_id") == parent]


def happens(dice, alice, bob, room):
    """Some events, between which the visibility changes and bob comes and goes."""
    said = [alice.say(room, "first")]
    for n in range(16):
        what = dice.choice(["say", "say", "reply", "visibility", "visibility", "topic", "come", "come", "go", "put out", "invite"])
        with contextlib.suppress(MatrixError):               # not everything is possible always
            if what == "say":
                said.append(alice.say(room, str(n)))
            elif what == "reply":
                alice.send(room, "m.room.message", {"body": "r", "m.relates_to": {"rel_type": "m.thread", "event_id": dice.choice(said)}})
            elif what == "visibility":
                alice.set_state(room, "m.room.history_visibility", {"history_visibility": dice.choice(["world_readable", "shared", "invited", "joined"])})
            elif what == "topic":
                alice.set_state(room, "m.room.topic", {"topic": str(n)})
            elif what == "invite":
                alice.invite(room, bob.user_id)
            elif what == "put out":
                dice.choice([alice.kick, alice.ban])(room, bob.user_id)
            elif what == "go":
                bob.leave(room)
            else:
                with contextlib.suppress(MatrixError):
                    alice.ask("POST", "rooms", room, "unban", body={"user_id": bob.user_id})
                bob.join(room)
    return said


def readable(client, *where, **query):
    """What this way to read answers; None if it is refused."""
    try:
        return client.call("GET", path(*where).replace("/v3/", "/v1/" if {"relations", "threads"} & {*where} else "/v3/", 1), **query)
    except MatrixError as error:
        assert error.errcode in ("M_FORBIDDEN", "M_NOT_FOUND"), error
        return None


class Eyes:
    """What bob finds in a room by each way to read it, held against what he may see."""

    def __init__(self, bob, room, history):
        self.bob, self.room, self.history, self.seen = bob, room, history, history.seen_ids()

    def look(self, *where, **query):
        return readable(self.bob, "rooms", self.room, *where, **query)

    def check_messages(self):
        for dir in "fb":
            page = self.look("messages", dir=dir, limit=100, filter='{"lazy_load_members":true}')
            assert (page is None) == (not self.seen and not self.history.upto)
            assert ids(page["chunk"] if page else []) == (self.seen if dir == "f" else self.seen[::-1])
            assert page is None or {*ids(page.get("state", []))} <= self.history.state(self.history.upto)

    def check_events(self):
        history, seen = self.history, self.seen
        for n, event_id in enumerate(history.ids, 1):
            assert (self.look("event", event_id) is not None) == (n in history.seen)
            around = self.look("context", event_id, limit=100)
            assert (around is not None) == (n in history.seen)
            if around:
                assert [*ids(around["events_before"][::-1]), event_id, *ids(around["events_after"])] == seen
                assert {*ids(around["state"])} == history.state(min(history.seen[-1], history.upto))
            then, members = min(n, history.upto), self.look("members", at=asbridge.tick_of(event_id))
            assert (members is not None) == (then in history.seen) or (then and then + 1 in history.seen)        # right before what one sees, too
            assert members is None or {*ids(members["chunk"])} == history.state(then, "m.room.member")

    def check_threads(self, said):
        children = {root: self.history.children(root) for root in said if root in self.seen}
        for root in said:
            page = self.look("relations", root, "m.thread")
            assert (page is not None) == (root in self.seen) and ids(page["chunk"] if page else []) == children.get(root, [])[::-1]
        page = self.look("threads")
        threads = {event["event_id"]: bundled(event)["m.thread"] for event in page["chunk"]} if page else {}
        assert {root: (one["count"], one["latest_event"]["event_id"]) for root, one in threads.items()} == {
            root: (len(found), found[-1]) for root, found in children.items() if found}

    def check_state(self):
        upto, events = self.history.upto, self.history.events
        for where, type in (("state", None), ("members", "m.room.member")):
            page = self.look(where)
            assert {*ids(page["chunk"] if isinstance(page, dict) else page or [])} == self.history.state(upto, type) and (page is not None) == bool(upto)
        topic = next((event for event in events[upto - 1::-1] if event["type"] == "m.room.topic"), None) if upto else None
        assert self.look("state", "m.room.topic") == (topic and topic["content"])
        assert (self.look("joined_members") is not None) == (readable(self.bob, "events", room_id=self.room) is not None) == (self.history.now == "join")

    def check_initial_sync(self):
        first = self.look("initialSync", limit=100)
        assert (first is not None) == bool(self.history.upto)
        if first:
            assert ids(first["messages"]["chunk"]) == self.seen and {*ids(first["state"])} == self.history.state(self.history.upto)
            assert self.history.now == "join" or not (first["presence"] or first["receipts"])

    def check_sync(self, since):
        history = self.history
        rooms = self.bob.sync(since, filter={"room": {"rooms": [self.room], "include_leave": True, "timeline": {"limit": 100}}}).get("rooms", {})
        section = {"join": "join", "invite": "invite"}.get(history.now, "leave")
        entry = rooms.get(section, {}).get(self.room)
        assert list(rooms) == ([section] if len(history.memberships) > 1 else [])
        if section == "invite" or not entry:
            return
        shown, own = ids(entry["timeline"]["events"]), [history.ids[history.memberships[-1][0] - 1]]
        assert shown == own or shown == (self.seen if since is None else self.seen[-len(shown):])
        state = {*ids(entry["state"]["events"])}
        assert state == history.state(min(history.ids.index(shown[0]), history.upto)) if since is None and shown != own else state <= {*history.ids[:history.upto]}


@pytest.mark.parametrize("seed", range(8))
def test_each_way_to_read_a_room_shows_what_the_history_visibility_lets_one_see(alice, bob, seed):
    room = alice.create_room(preset="public_chat")
    start, said = bob.sync()["next_batch"], happens(random.Random(seed), alice, bob, room)
    eyes = Eyes(bob, room, History(all_messages(alice, room), bob.user_id))
    eyes.check_messages()
    eyes.check_events()
    eyes.check_threads(said)
    eyes.check_state()
    eyes.check_initial_sync()
    for since in (None, start):
        eyes.check_sync(since)


# -- Aliases.

def test_an_alias_is_made_found_and_deleted(hs, alice, bob, room):
    alice.set_alias("#two:localhost", room)
    assert ask(hs, "GET", path("directory", "room", "#two:localhost")) == (200, {"room_id": room, "servers": ["localhost"]})
    assert alice.call("GET", path("rooms", room, "aliases")) == {"aliases": ["#room:localhost", "#two:localhost"]}
    with refused("M_UNKNOWN", 409):
        alice.set_alias("#two:localhost", room)
    with refused("M_FORBIDDEN", 403):
        bob.delete_alias("#two:localhost")
    with refused("M_FORBIDDEN", 403):
        bob.set_alias("#three:localhost", room)
    alice.delete_alias("#two:localhost")
    for look in (lambda: alice.resolve("#two:localhost"), lambda: alice.delete_alias("#two:localhost")):
        with refused("M_NOT_FOUND", 404):
            look()


@pytest.mark.parametrize("alias", ["#x", "#x:elsewhere.org", "x:localhost", "#:localhost", "#" + "x" * 250 + ":localhost"])
def test_an_alias_that_is_none_is_refused(alice, room, alias):
    with refused("M_INVALID_PARAM", 400):
        alice.set_alias(alias, room)


# -- How a room begins.

ORDER = ["m.room.create", "m.room.member", "m.room.power_levels", "m.room.canonical_alias", "m.room.join_rules", "m.room.history_visibility",
         "m.room.guest_access", "org.example.state", "m.room.name", "m.room.topic", "m.room.member"]


@pytest.mark.parametrize("version", ["10", "11", "12"])
def test_the_events_of_a_new_room_come_in_the_order_of_the_specification(alice, bob, version):
    room = alice.create_room(name="n", topic="t", invite=[bob.user_id], room_alias_name="x", room_version=version,
                             initial_state=[{"type": "org.example.state", "content": {}}])
    events = all_messages(alice, room)
    assert types(events) == ORDER and events[0]["content"]["room_version"] == version
    assert alice.resolve("#x:localhost") == room and events[3]["content"] == {"alias": "#x:localhost"}


@pytest.mark.parametrize("options,rules", [
    ({}, ("invite", "shared", "can_join")), ({"visibility": "public"}, ("public", "shared", "forbidden")),
    ({"preset": "private_chat"}, ("invite", "shared", "can_join")), ({"preset": "public_chat"}, ("public", "shared", "forbidden")),
    ({"preset": "trusted_private_chat"}, ("invite", "shared", "can_join")), ({"visibility": "public", "preset": "private_chat"}, ("invite", "shared", "can_join"))])
def test_a_preset_sets_join_rule_history_visibility_and_guest_access(alice, options, rules):
    room = alice.create_room(**options)
    assert (alice.state(room, "m.room.join_rules")["join_rule"], alice.state(room, "m.room.history_visibility")["history_visibility"],
            alice.state(room, "m.room.guest_access")["guest_access"]) == rules


@pytest.mark.parametrize("version", ["10", "11", "12"])
def test_a_trusted_private_chat_gives_those_invited_the_creators_power(alice, bob, version):
    room = alice.create_room(preset="trusted_private_chat", invite=[bob.user_id], room_version=version)
    bob.join(room)
    bob.set_state(room, "m.room.power_levels", {**bob.state(room, "m.room.power_levels"), "kick": 99})
    assert bob.state(room, "m.room.create").get("additional_creators") == ([bob.user_id] if version == "12" else None)


def test_the_creator_is_named_as_the_room_version_wants_it(alice):
    old, new, newest = (alice.create_room(room_version=version) for version in ("10", "11", "12"))
    assert alice.state(old, "m.room.create")["creator"] == alice.user_id and "creator" not in alice.state(new, "m.room.create")
    assert alice.state(new, "m.room.power_levels")["users"] == {alice.user_id: 100} and alice.state(newest, "m.room.power_levels")["users"] == {}
    levels = alice.state(newest, "m.room.power_levels")
    assert levels["events"]["m.room.tombstone"] > levels["state_default"] and ":" not in newest
    assert "!" + alice.all_state(newest)[0]["event_id"][1:] == newest


def test_a_new_room_has_the_configured_version_and_keeps_creation_content(start):
    alice = start(room_version="10").client("alice")
    room = alice.create_room(creation_content={"type": "m.space", "room_version": "1", "creator": "@x:y"}, unknown_key=1)
    create = alice.state(room, "m.room.create")
    assert (create["type"], create["room_version"], create["creator"]) == ("m.space", "10", alice.user_id)


def test_initial_state_wins_over_the_preset_and_name_over_initial_state(alice):
    room = alice.create_room(preset="private_chat", name="new", initial_state=[
        {"type": "m.room.join_rules", "content": {"join_rule": "knock"}}, {"type": "m.room.name", "content": {"name": "old"}},
        {"type": "a", "state_key": "k", "content": {"v": 1}}])
    assert alice.state(room, "m.room.join_rules") == {"join_rule": "knock"}
    assert alice.state(room, "m.room.name") == {"name": "new"} and alice.state(room, "a", "k") == {"v": 1}


def test_power_level_content_override_is_laid_over_the_default(alice):
    room = alice.create_room(power_level_content_override={"events_default": 10, "users": {alice.user_id: 100, "@bob:localhost": 20}})
    levels = alice.state(room, "m.room.power_levels")
    assert (levels["events_default"], levels["users"]["@bob:localhost"], levels["ban"]) == (10, 20, 50)


def test_is_direct_stands_in_the_invitations(alice, bob):
    room = alice.create_room(is_direct=True, invite=[bob.user_id])
    assert alice.state(room, "m.room.member", bob.user_id)["is_direct"] is True


@pytest.mark.parametrize("options,errcode", [
    ({"room_version": "1"}, "M_UNSUPPORTED_ROOM_VERSION"), ({"room_version": 11}, "M_BAD_JSON"), ({"preset": "x"}, "M_INVALID_PARAM"),
    ({"visibility": "x"}, "M_INVALID_PARAM"), ({"invite": "bob"}, "M_BAD_JSON"), ({"invite": ["bob"]}, "M_INVALID_PARAM"),
    ({"invite": ["@alice:localhost"]}, "M_INVALID_ROOM_STATE"), ({"room_alias_name": "a:b"}, "M_INVALID_PARAM"), ({"room_alias_name": "taken"}, "M_ROOM_IN_USE"),
    ({"name": 5}, "M_BAD_JSON"), ({"initial_state": [5]}, "M_BAD_JSON"), ({"initial_state": [{"type": "a"}]}, "M_MISSING_PARAM"),
    ({"initial_state": [{"type": "m.room.create", "content": {}}]}, "M_INVALID_ROOM_STATE"), ({"creation_content": {"x": 1.5}}, "M_BAD_JSON"),
    ({"power_level_content_override": {"users": {"@bob:localhost": 100}}}, "M_BAD_JSON"), ({"power_level_content_override": {"ban": "50"}}, "M_BAD_JSON"),
    ({"power_level_content_override": []}, "M_BAD_JSON"), ({"is_direct": 1}, "M_BAD_JSON"),
    ({"room_version": "12", "power_level_content_override": {"users": {"@alice:localhost": 100}}}, "M_INVALID_ROOM_STATE"),
    ({"room_version": "12", "creation_content": {"additional_creators": ["bob"]}}, "M_INVALID_PARAM")])
def test_a_room_that_cannot_be_is_refused_as_a_whole(alice, options, errcode):
    first = alice.create_room(room_alias_name="taken")
    with refused(errcode, 400):
        alice.create_room(**options)
    assert alice.joined_rooms() == [first]


@pytest.mark.parametrize("options", [{"invite": [f"@u{n}:localhost" for n in range(600)], "initial_state": [{"type": "x", "content": {}}] * 401},
                                     {"invite": ["@bob:localhost"] * 1001}], ids=["both", "invite"])
def test_a_room_that_would_begin_with_too_many_events_is_refused_and_told_what_else_to_do(hs, options):
    status, answer = ask(hs, "POST", V3 + "/createRoom", hs.client("alice").token, options)
    assert (status, answer["errcode"]) == (413, "M_TOO_LARGE") and "1000" in answer["error"] and "when the room is there" in answer["error"]


def test_a_topic_is_told_as_text_in_the_newer_form_too(alice):
    assert alice.state(alice.create_room(topic="T"), "m.room.topic") == {"topic": "T", "m.topic": {"m.text": [{"body": "T", "mimetype": "text/plain"}]}}


def test_third_party_identifiers_are_refused_by_name(hs, alice, room):
    for method, where, body, status, errcode in (
            ("POST", "/createRoom", {"invite_3pid": [{"medium": "email", "address": "a@b"}]}, 403, "M_FORBIDDEN"), ("POST", "/createRoom", {"invite_3pid": []}, 200, None),
            ("POST", f"/rooms/{room}/invite", {"medium": "email", "address": "a@b"}, 403, "M_FORBIDDEN"),
            ("POST", "/login", {"type": "m.login.password", "identifier": {"type": "m.id.thirdparty", "medium": "email", "address": "a@b"}, "password": "x"}, 400, "M_UNKNOWN")):
        got, answer = ask(hs, method, V3 + where, alice.token, body)
        assert (got, answer.get("errcode")) == (status, errcode) and (errcode is None or "user IDs only" in answer["error"])


@pytest.mark.parametrize("options", [{}, {"preset": "trusted_private_chat", "invite": ["@bob:localhost"]}])
@pytest.mark.parametrize("more", [5, "@a:b", ["nobody"], [5], [{}], [{}, 5], {}])
def test_additional_creators_are_user_ids(alice, bob, more, options):
    with refused("M_INVALID_PARAM" if isinstance(more, list) else "M_BAD_JSON", 400):
        alice.create_room(room_version="12", creation_content={"additional_creators": more}, **options)


# -- What happens in rooms: who comes and goes.

def test_a_room_is_joined_by_id_or_alias_and_again_without_effect(alice, bob, room):
    assert bob.join("#room:localhost") == bob.join(room) == bob.call("POST", path("rooms", room, "join"))["room_id"] == room
    assert len([event for event in all_messages(bob, room) if event.get("state_key") == bob.user_id]) == 1
    assert set(bob.joined_members(room)) == {alice.user_id, bob.user_id} and bob.joined_rooms() == [room]


@pytest.mark.parametrize("content, name", [({}, "alice"), ({"displayname": "other"}, "other")])
def test_a_member_event_of_ones_own_carries_the_profile_as_far_as_it_says_nothing_else(alice, bob, content, name):
    room = bob.create_room(preset="public_chat")
    alice.set_state(room, "m.room.member", {"membership": "join", **content}, alice.user_id)
    assert alice.state(room, "m.room.member", alice.user_id) == {"membership": "join", "displayname": name}
    alice.set_state(room, "m.room.member", {"membership": "leave"}, alice.user_id)
    assert bob.state(room, "m.room.member", alice.user_id) == {"membership": "leave"}


def test_a_join_carries_the_profile_and_the_reason(alice, bob, room):
    bob.set_displayname("Bob")
    bob.call("POST", path("join", room), {"reason": "why not"})
    assert alice.state(room, "m.room.member", bob.user_id) == {"membership": "join", "displayname": "Bob", "reason": "why not"}


def test_what_does_not_exist_cannot_be_joined(bob):
    for room, errcode in (("!nowhere:localhost", "M_FORBIDDEN"), ("#nowhere:localhost", "M_NOT_FOUND")):
        with refused(errcode):
            bob.join(room)
    with refused("M_INVALID_PARAM", 400):
        bob.join("#nothing")


def test_a_private_room_is_joined_by_those_invited_only(alice, bob, carol):
    room = alice.create_room()
    alice.invite(room, bob.user_id, "come")
    assert bob.join(room) == room
    with refused("M_FORBIDDEN", 403, "uninvited"):
        carol.join(room)


def test_who_is_in_a_room_cannot_be_invited(alice, bob, room):
    bob.join(room)
    with refused("M_FORBIDDEN", 403, "already in the room"):           # mautrix-python reads the text
        alice.invite(room, bob.user_id)


@pytest.mark.parametrize("user_id,errcode", [("bob", "M_INVALID_PARAM"), ("@bob:elsewhere", "M_INVALID_PARAM"), (5, "M_BAD_JSON"), (None, "M_MISSING_PARAM")])
def test_an_invitation_of_nobody_is_refused(alice, room, user_id, errcode):
    with refused(errcode, 400):
        alice.call("POST", path("rooms", room, "invite"), {"user_id": user_id})


def test_an_invitation_can_be_declined_and_taken_back(alice, bob, carol):
    room = alice.create_room(invite=[bob.user_id, carol.user_id])
    bob.leave(room, "no thanks")
    alice.kick(room, carol.user_id)
    assert {event["state_key"]: event["content"]["membership"] for event in alice.members(room)} == {
        alice.user_id: "join", bob.user_id: "leave", carol.user_id: "leave"}
    with refused("M_FORBIDDEN", 403):
        bob.join(room)


def test_one_leaves_and_may_not_leave_twice(hs, bob, room):
    bob.join(room)
    assert ask(hs, "POST", path("rooms", room, "leave"), bob.token, b"") == (200, {})
    with refused("M_FORBIDDEN", 403, "not in room"):
        bob.leave(room)
    with refused("M_FORBIDDEN", 403):
        bob.say(room, "still here")


def test_a_kick_needs_power_and_carries_its_reason(alice, bob, carol, room):
    bob.join(room), carol.join(room)
    with refused("M_FORBIDDEN", 403):
        bob.kick(room, carol.user_id)
    alice.kick(room, bob.user_id, "rude")
    assert alice.state(room, "m.room.member", bob.user_id) == {"membership": "leave", "reason": "rude"}
    carol.kick(room, carol.user_id, "bye")                             # oneself: needs no power (heisenbridge on PART)
    assert set(alice.joined_members(room)) == {alice.user_id}


def test_who_is_not_in_the_room_cannot_be_kicked(alice, bob, room):
    with refused("M_FORBIDDEN", 403):
        alice.kick(room, bob.user_id)


def test_who_kicks_oneself_leaves_with_a_reason_or_declines_and_needs_no_power(alice, bob, carol, room):
    bob.join(room), alice.invite(room, carol.user_id)
    for client in (bob, carol):                              # heisenbridge on PART, matrix-appservice-bridge on leave with a reason
        client.kick(room, client.user_id, "gone")
        assert alice.state(room, "m.room.member", client.user_id) == {"membership": "leave", "reason": "gone"}


def test_a_kick_does_not_lift_a_ban(alice, bob, room):
    alice.ban(room, bob.user_id)
    with contextlib.suppress(MatrixError):
        alice.kick(room, bob.user_id)
    assert alice.state(room, "m.room.member", bob.user_id)["membership"] == "ban"


def test_an_invitation_and_a_ban_that_say_nothing_new_are_no_second_event(alice, bob, carol, room):
    bob.join(room)
    alice.call("PUT", path("rooms", room, "state", "m.room.power_levels"), {**alice.state(room, "m.room.power_levels"), "users": {alice.user_id: 100, bob.user_id: 100}})
    for verb, name in (("invite", "invite"), ("ban", "ban")):
        for client, extra in ((alice, {}), (alice, {}), (alice, {"reason": "new"}), (alice, {"reason": "new"}), (bob, {"reason": "new"})):
            client.call("POST", path("rooms", room, verb), {"user_id": carol.user_id, **extra})
    seen = [(one["content"]["membership"], one["content"].get("reason"), one["sender"]) for one in all_messages(alice, room) if one.get("state_key") == carol.user_id]
    assert sorted(seen, key=str) == sorted([(name, reason, who) for name in ("invite", "ban")
                                            for reason, who in ((None, alice.user_id), ("new", alice.user_id), ("new", bob.user_id))], key=str)


def test_a_ban_keeps_out_until_it_is_lifted(alice, bob, room):
    bob.join(room)
    alice.ban(room, bob.user_id, "spam")
    with refused("M_BAD_STATE", 403, "banned"):                        # mautrix-python unbans on this code only
        bob.join(room)
    with refused("M_FORBIDDEN", 403, "banned"):
        alice.invite(room, bob.user_id)
    alice.unban(room, bob.user_id)
    bob.join(room)
    with refused("M_BAD_STATE", 403, "not banned"):
        alice.unban(room, bob.user_id)
    with refused("M_FORBIDDEN", 403):
        bob.ban(room, alice.user_id)


def test_nobody_from_outside_is_told_who_is_banned_or_in_the_room(alice, bob, carol, room):
    alice.ban(room, carol.user_id)
    for change in (bob.unban, bob.kick, bob.ban, bob.invite):
        for user in (alice.user_id, carol.user_id):
            with refused("M_FORBIDDEN", 403, f"{bob.user_id} is not in room"):
                change(room, user)


def test_a_room_is_forgotten_only_after_leaving_and_then_gives_nothing_away(hs, bob, room):
    bob.join(room)
    with refused("M_UNKNOWN", 400, "leave it first"):
        bob.call("POST", path("rooms", room, "forget"), {})
    bob.leave(room)
    assert bob.messages(room)["chunk"]
    assert ask(hs, "POST", path("rooms", room, "forget"), bob.token, b"") == (200, {})
    with refused("M_FORBIDDEN", 403):
        bob.messages(room)
    assert "rooms" not in bob.sync(filter={"room": {"include_leave": True}})
    bob.join(room)                                                     # and coming back, one sees again
    assert bodies(bob.messages(room)["chunk"]) == [] and bob.joined_rooms() == [room]


@pytest.mark.parametrize("rule", ["knock", "knock_restricted"])
def test_a_knock_is_answered_by_an_invitation(alice, bob, carol, rule):
    room = alice.create_room(name="n", initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": rule}}])
    assert bob.call("POST", path("knock", room), {"reason": "please"})["room_id"] == room
    state = bob.sync()["rooms"]["knock"][room]["knock_state"]["events"]
    assert "m.room.name" in types(state) and state[-1]["content"] == {"membership": "knock", "displayname": "bob", "reason": "please"}
    alice.invite(room, bob.user_id)
    bob.join(room)
    with refused("M_FORBIDDEN", 403):
        bob.call("POST", path("knock", room), {})
    carol.call("POST", path("knock", room), {})
    alice.kick(room, carol.user_id)
    assert carol.sync()["next_batch"] and room not in carol.joined_rooms()


def test_one_cannot_knock_at_a_room_that_does_not_take_it(alice, bob, room):
    with refused("M_FORBIDDEN", 403, "knock"):
        bob.call("POST", path("knock", room), {})
    with refused("M_FORBIDDEN", 403, "there is no room"):
        bob.call("POST", path("knock", "!none:localhost"), {})
    with refused("M_FORBIDDEN", 403, "can't knock here: the join rule of the room is 'public'"):      # which is no secret
        bob.call("POST", path("knock", alice.create_room(preset="public_chat")), {})


def test_who_is_in_a_restricted_room_needs_nobody_to_vouch_for_a_new_name(alice, bob, room):
    other = restricted(alice, room)
    bob.join(room), bob.join(other)
    assert bob.state(other, "m.room.member", bob.user_id)["join_authorised_via_users_server"] == alice.user_id
    bob.set_state(other, "m.room.member", {"membership": "join", "displayname": "Bob"}, bob.user_id)
    assert bob.state(other, "m.room.member", bob.user_id) == {"membership": "join", "displayname": "Bob"}


def test_a_new_name_goes_only_into_rooms_whose_rules_take_it(alice, bob, room):
    closed = alice.create_room(invite=[bob.user_id])
    bob.join(room), bob.join(closed)
    alice.set_state(closed, "m.room.join_rules", {"join_rule": "private"})           # by which nobody may send a join, not even who is in it
    bob.set_displayname("Bob")
    assert [alice.state(one, "m.room.member", bob.user_id)["displayname"] for one in (room, closed)] == ["Bob", "bob"]


@pytest.mark.parametrize("version", ["10", "11", "12"])
def test_a_restricted_room_is_joined_by_members_of_the_other_room(alice, bob, carol, room, version):
    closed = restricted(alice, room, version=version)
    bob.join(room)
    bob.join(closed)
    assert alice.state(closed, "m.room.member", bob.user_id)["join_authorised_via_users_server"] == alice.user_id
    with refused("M_FORBIDDEN", 403):
        carol.join(closed)
    alice.invite(closed, carol.user_id)
    carol.join(closed)
    assert "join_authorised_via_users_server" not in alice.state(closed, "m.room.member", carol.user_id)


def test_nobody_can_vouch_for_oneself_at_a_restricted_room(alice, bob, room):
    with refused("M_FORBIDDEN", 403):
        bob.set_state(restricted(alice, room), "m.room.member",
                      {"membership": "join", "join_authorised_via_users_server": alice.user_id}, bob.user_id)


def test_an_allow_condition_of_another_type_lets_nobody_in(alice, bob, room):
    bob.join(room)
    with refused("M_FORBIDDEN", 403):
        bob.join(restricted(alice, room, "org.example.other"))


@pytest.mark.parametrize("key", ["bob", "@bob:elsewhere.org"])
def test_a_member_event_needs_a_local_user(alice, room, key):
    with refused("M_INVALID_PARAM", 400):
        alice.set_state(room, "m.room.member", {"membership": "invite"}, key)


def test_membership_by_put_state_follows_the_same_rules(alice, bob, carol, room):
    bob.set_state(room, "m.room.member", {"membership": "join", "displayname": "B"}, bob.user_id)
    assert alice.joined_members(room)[bob.user_id]["display_name"] == "B"
    with refused("M_FORBIDDEN", 403):
        bob.set_state(room, "m.room.member", {"membership": "join"}, carol.user_id)
    with refused("M_FORBIDDEN", 403, "uninvited"):
        bob.set_state(alice.create_room(), "m.room.member", {"membership": "join"}, bob.user_id)
    with refused("M_BAD_JSON", 400):
        bob.set_state(room, "m.room.member", {"membership": "x"}, bob.user_id)


# -- What happens in rooms: what is sent.

def test_a_client_transaction_sends_once_for_each_device_and_room(alice, bob, room):
    other = alice.create_room()
    first = alice.say(room, "one", "t")
    assert alice.say(room, "other text", "t") == first and alice.say(other, "one", "t") != first
    assert alice.send(room, "org.example", {}, "t") != first
    bob.join(room)
    assert bob.say(room, "one", "t") != first
    assert bodies(alice.messages(room)["chunk"]) == ["one", "one"]


def test_another_device_of_the_same_user_has_transactions_of_its_own(hs):
    one = hs.client("alice", "w")
    two = again(hs, one)
    room = one.create_room()
    first, second = one.say(room, "x", "t"), two.say(room, "x", "t")
    assert first != second
    events = {event["event_id"]: event["unsigned"] for event in one.messages(room)["chunk"]}
    assert events[first]["transaction_id"] == "t" and "transaction_id" not in events[second]


def test_client_transactions_of_a_service_count_for_each_user_that_it_acts_as(hs):
    bob, carol = acting(hs, "irc", "@_irc_bob:localhost"), acting(hs, "irc", "@_irc_carol:localhost")
    room = bob.create_room(preset="public_chat")
    carol.join(room)
    first = bob.say(room, "x", "t")
    assert bob.say(room, "x", "t") == first != carol.say(room, "x", "t")


def test_client_transactions_are_remembered_over_a_restart(start, tmp_path):
    hs = start(database=str(tmp_path / "a.db"))
    alice = hs.client("alice")
    room = alice.create_room()
    first = alice.say(room, "x", "t")
    hs.stop()
    again = asbridge.Client(start(database=str(tmp_path / "a.db")).url, alice.token)
    assert again.say(room, "x", "t") == first and bodies(again.messages(room)["chunk"]) == ["x"]


def test_a_refused_transaction_can_be_tried_again(bob, room):
    with refused("M_FORBIDDEN", 403):
        bob.say(room, "x", "t")
    bob.join(room)
    assert bob.say(room, "x", "t").startswith("$")


@pytest.mark.parametrize("body,errcode", [(b"", None), (b"[]", "M_BAD_JSON"), (b"{", "M_NOT_JSON"), (b'{"a":1.5}', "M_BAD_JSON"), (b'{"a":9007199254740992}', "M_BAD_JSON"),
                                          (b'{"a":NaN}', "M_NOT_JSON"), (b'{"a":"\\ud800"}', "M_NOT_JSON"), (b"\xff", "M_NOT_JSON"), (b'{"a":9007199254740991}', None)])
def test_an_event_is_canonical_json(hs, alice, room, body, errcode):
    status, answer = ask(hs, "PUT", path("rooms", room, "send", "x", "t"), alice.token, body)
    assert (status, answer.get("errcode")) == ((200, None) if errcode is None else (400, errcode))


def test_an_event_that_is_too_large_is_refused(alice, room):
    with refused("M_TOO_LARGE", 413):
        alice.say(room, "x" * 65_536)
    assert alice.say(room, "x" * 64_000)


@pytest.mark.parametrize("type,state_key", [("t" * 256, None), ("t" * 256, ""), ("t", "k" * 256)])
def test_type_and_state_key_have_255_bytes_at_most(alice, room, type, state_key):
    with pytest.raises(MatrixError):
        alice.send(room, type, {}) if state_key is None else alice.set_state(room, type, {}, state_key)


@pytest.mark.parametrize("depth", [500, 950])
def test_json_may_be_nested_to_a_limit_only_and_never_makes_the_homeserver_fail(hs, alice, room, depth):
    deep = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    statuses = [ask(hs, "PUT", path("user", alice.user_id, "account_data", "x"), alice.token, deep)[0],
                ask(hs, "PUT", path("rooms", room, "state", "x", ""), alice.token, deep)[0], ask(hs, "GET", path("rooms", room, "state", "x"), alice.token)[0]]
    assert 500 not in statuses


@pytest.mark.parametrize("spelling", ["m.room.topic", "m.room.topic/", "m.room.topic/key"])
def test_state_is_set_and_read_with_and_without_key_and_with_a_trailing_slash(hs, alice, room, spelling):
    url = path("rooms", room, "state") + "/" + spelling
    event_id = ask(hs, "PUT", url, alice.token, {"topic": "t"})[1]["event_id"]
    assert ask(hs, "GET", url, alice.token) == (200, {"topic": "t"})
    event = ask(hs, "GET", url + "?format=event", alice.token)[1]
    assert event["event_id"] == event_id and event["state_key"] == ("key" if spelling.endswith("key") else "")


def test_missing_state_is_not_found(hs, alice, room):
    for url in ("org.none", "org.none/", "org.none/key"):
        status, answer = ask(hs, "GET", path("rooms", room, "state") + "/" + url, alice.token)
        assert (status, answer["errcode"]) == (404, "M_NOT_FOUND")


def test_state_that_is_replaced_tells_what_was_before(alice, room):
    alice.set_state(room, "m.room.topic", {"topic": "old"})
    event = alice.event(room, alice.set_state(room, "m.room.topic", {"topic": "new"}))
    assert event["unsigned"]["prev_content"] == {"topic": "old"}


def test_state_that_says_nothing_new_is_the_event_that_said_it_first(alice):
    room = alice.create_room()
    first = alice.set_state(room, "m.room.topic", {"topic": "tea"})
    assert alice.set_state(room, "m.room.topic", {"topic": "tea"}) == first
    assert alice.set_state(room, "m.room.topic", {"topic": "cake"}) != first
    assert alice.set_state(room, "x.flag", {"is": True}) != alice.set_state(room, "x.flag", {"is": 1})
    alice.set_displayname("Alice")
    before = len(alice.messages(room)["chunk"])
    alice.set_displayname("Alice")
    assert len(alice.messages(room)["chunk"]) == before


def test_state_needs_power_and_a_user_id_as_key_belongs_to_that_user(alice, bob, carol, room):
    bob.join(room)
    with refused("M_FORBIDDEN", 403, "needs 50"):
        bob.set_state(room, "m.room.topic", {"topic": "x"})
    alice.set_state(room, "m.room.power_levels", {**alice.state(room, "m.room.power_levels"), "state_default": 0})
    bob.set_state(room, "org.example", {}, bob.user_id)
    with refused("M_FORBIDDEN", 403):
        bob.set_state(room, "org.example", {}, carol.user_id)


def test_a_canonical_alias_must_point_to_the_room(alice, room):
    other = alice.create_room(room_alias_name="other")
    for content in ({"alias": "#other:localhost"}, {"alt_aliases": ["#none:localhost"]}):
        with refused("M_BAD_ALIAS", 400):
            alice.set_state(room, "m.room.canonical_alias", content)
    alice.set_alias("#two:localhost", room)
    alice.set_state(room, "m.room.canonical_alias", {"alias": "#room:localhost", "alt_aliases": ["#two:localhost"]})


def test_a_canonical_alias_without_a_list_of_alternatives_does_no_harm(alice, room):
    with contextlib.suppress(MatrixError):
        alice.set_state(room, "m.room.canonical_alias", {"alt_aliases": 5})
    alice.set_state(room, "m.room.canonical_alias", {"alias": "#room:localhost"})


@pytest.mark.parametrize("version", ["10", "11", "12"])
def test_a_redaction_takes_the_content_away_and_says_why(alice, version):
    room = alice.create_room(room_version=version)
    event_id = alice.say(room, "secret")
    redaction = alice.redact(room, event_id, "oops", "t")
    assert alice.redact(room, event_id, "oops", "t") == redaction
    event = alice.event(room, event_id)
    assert event["content"] == {} and event["unsigned"]["redacted_because"]["event_id"] == redaction
    because = alice.event(room, redaction)
    assert because["content"] == {"reason": "oops", "redacts": event_id} and because["redacts"] == event_id
    assert "secret" not in json.dumps(alice.messages(room)) + json.dumps(alice.sync())


def test_a_client_transaction_of_a_redaction_belongs_to_the_event_that_it_redacts(alice, room):
    first, second = alice.say(room, "1"), alice.say(room, "2")
    redaction = alice.call("PUT", path("rooms", room, "redact", first, "t"), {})["event_id"]
    assert alice.call("PUT", path("rooms", room, "redact", first, "t"), {})["event_id"] == redaction
    other = alice.call("PUT", path("rooms", room, "redact", second, "t"), {})["event_id"]
    assert other != redaction and alice.call("PUT", path("rooms", room, "redact", second, "t"), {})["event_id"] == other
    alice.call("PUT", path("rooms", room, "redact", redaction, "u"), {})
    third = alice.say(room, "3")
    assert alice.call("PUT", path("rooms", room, "redact", third, "t"), {})["event_id"] not in (redaction, other)
    assert bodies(all_messages(alice, room)) == []


def test_others_events_are_redacted_with_power_only(alice, bob, carol, room):
    bob.join(room)
    hers, his = alice.say(room, "hers"), bob.say(room, "his")
    with refused("M_FORBIDDEN", 403, "redact"):
        bob.redact(room, hers)
    alice.redact(room, his)
    bob.redact(room, bob.say(room, "mine"))
    with refused("M_FORBIDDEN", 403):
        carol.redact(room, hers)
    with refused("M_NOT_FOUND", 404):
        alice.redact(alice.create_room(), hers)
    with refused("M_FORBIDDEN", 403):
        alice.redact(room, alice.all_state(room)[0]["event_id"])


def test_a_redaction_may_come_by_send_as_in_room_version_11(alice, room):
    event_id = alice.say(room, "x")
    alice.send(room, "m.room.redaction", {"redacts": event_id})
    assert alice.event(room, event_id)["content"] == {}


def test_redacted_state_loses_its_effect(alice, room):
    alice.redact(room, alice.set_state(room, "m.room.topic", {"topic": "t"}))
    assert alice.state(room, "m.room.topic") == {}
    redacted = alice.set_state(room, "m.room.join_rules", {"join_rule": "invite", "x": 1})
    alice.redact(room, redacted)
    assert alice.state(room, "m.room.join_rules") == {"join_rule": "invite"}


# -- Reading.

def test_an_event_is_found_in_its_own_room_only(alice, room):
    event_id = alice.say(room, "x")
    event = alice.event(room, event_id)
    assert (event["event_id"], event["room_id"], event["sender"]) == (event_id, room, alice.user_id) and event["unsigned"]["age"] >= 0
    for wrong in (alice.create_room(), room):
        with refused("M_NOT_FOUND", 404):
            alice.event(wrong, event_id if wrong != room else event_id[:-1] + ("A" if event_id[-1] != "A" else "B"))


def test_an_event_that_may_not_be_seen_is_not_found(alice, bob, room):
    with refused("M_NOT_FOUND", 404):
        bob.event(room, alice.say(room, "x"))


def test_members_are_told_as_they_are_or_were_and_by_membership(alice, bob, carol, room):
    bob.join(room)
    then = alice.sync()["next_batch"]
    bob.leave(room)
    alice.invite(room, carol.user_id)

    def members(**query):
        return {event["state_key"][1:].partition(":")[0]: event["content"]["membership"]
                for event in alice.call("GET", path("rooms", room, "members"), **query)["chunk"]}
    assert members() == {"alice": "join", "bob": "leave", "carol": "invite"} and members(at=then) == {"alice": "join", "bob": "join"}
    assert members(membership="join") == {"alice": "join"} and members(not_membership="leave") == {"alice": "join", "carol": "invite"}
    assert members(at=then, membership="leave") == {}


def test_joined_members_have_names_and_are_for_members(hs, alice, bob, room):
    alice.set_avatar_url("mxc://localhost/a")
    assert alice.joined_members(room) == {alice.user_id: {"display_name": "alice", "avatar_url": "mxc://localhost/a"}}
    for client in (bob, hs.client("dave")):
        with refused("M_FORBIDDEN", 403):
            client.joined_members(room)


def test_the_event_that_is_nearest_to_a_time_is_found_among_those_that_may_be_seen(hs, alice, bob, ghost, room):
    where = f"/_matrix/client/v1/rooms/{quote(room)}/timestamp_to_event"
    ghost.join(room)
    early, late = (ghost.send(room, "m.room.message", {"body": "x"}, ts=ts) for ts in (1000, 3000))
    for ts, direction, found in ((1000, "f", early), (1000, "b", early), (1001, "f", late), (2999, "b", early), (5000, "b", late)):
        assert alice.call("GET", where, ts=ts, dir=direction)["event_id"] == found
    assert alice.call("GET", where, ts=0, dir="f") == {"event_id": early, "origin_server_ts": 1000}
    for ts, direction in ((999, "b"), (2**53 - 1, "f")):
        with refused("M_NOT_FOUND", 404):
            alice.call("GET", where, ts=ts, dir=direction)
    for query in ({"ts": 5}, {"dir": "f"}):
        with refused("M_MISSING_PARAM", 400):
            alice.call("GET", where, **query)
    with refused("M_FORBIDDEN", 403):
        bob.call("GET", where, ts=0, dir="f")


def test_joined_members_are_for_a_service_with_any_of_its_users_in_the_room(hs, ghost):
    assert list(bot_of(hs).joined_members(ghost.create_room())) == ["@_irc_bob:localhost"]


def test_messages_go_both_ways_to_both_ends(alice, room):
    for i in range(20):
        alice.say(room, f"n{i}")
    forwards = all_messages(alice, room, "f")
    assert forwards[0]["type"] == "m.room.create" and bodies(forwards) == [f"n{i}" for i in range(20)]
    assert ids(all_messages(alice, room, "b")) == ids(reversed(forwards))
    last = alice.messages(room, "b", 1000)
    assert last["start"] and alice.messages(room, "b", 10, **{"from": last["end"]}).keys() == {"start", "chunk"}


def test_messages_start_from_a_sync_token_and_stop_at_another(alice, room):
    first = alice.sync()["next_batch"]
    alice.say(room, "in between")
    second = alice.sync(first)["next_batch"]
    alice.say(room, "after")
    assert bodies(alice.messages(room, "f", 10, **{"from": second})["chunk"]) == ["after"]
    assert bodies(alice.messages(room, "b", 10, **{"from": second, "to": first})["chunk"]) == ["in between"]
    assert bodies(alice.messages(room, "f", 10, **{"from": first, "to": second})["chunk"]) == ["in between"]


def test_a_page_of_messages_ends_after_some_bytes_and_goes_on_after_them(alice, room, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_PAGE_BYTES", 1000)
    for n in range(7):
        alice.say(room, f"{n}" * 300)
    assert len(alice.messages(room, limit=1000)["chunk"]) == 2
    assert [body[0] for body in bodies(all_messages(alice, room))] == list("0123456")


@pytest.mark.parametrize("filter,expected", [
    ({"types": ["m.room.message"]}, ["m.room.message"] * 2), ({"types": ["org.*"]}, ["org.x"]), ({"types": []}, []),
    ({"not_types": ["m.*"]}, ["org.x"]), ({"types": ["m.room.message"], "senders": ["@bob:localhost"]}, ["m.room.message"]),
    ({"types": ["m.room.message"], "not_senders": ["@bob:localhost"]}, ["m.room.message"]), ({"senders": []}, []), ({"types": ["m.room.mess?ge", "[o]*"]}, [])])
def test_messages_are_filtered(alice, bob, room, filter, expected):
    bob.join(room)
    alice.say(room, "a"), bob.say(room, "b"), alice.send(room, "org.x", {})
    assert types(alice.messages(room, "f", 100, filter=json.dumps(filter))["chunk"]) == expected


def test_a_filters_limit_counts_where_the_query_has_none(alice, room):
    assert len(alice.call("GET", path("rooms", room, "messages"), filter='{"limit":3}')["chunk"]) == 3
    assert len(alice.call("GET", path("rooms", room, "messages"), filter='{"limit":3}', limit=2)["chunk"]) == 2


def test_messages_with_lazy_loading_come_with_the_members_who_speak(alice, bob, carol, room):
    bob.join(room), carol.join(room), carol.say(room, "before"), bob.say(room, "1"), alice.say(room, "2")
    page = alice.messages(room, limit=2, filter='{"lazy_load_members": true}')
    assert [event["state_key"] for event in page["state"]] == [alice.user_id, bob.user_id] and page["state"][1]["content"]["membership"] == "join"
    assert "state" not in alice.messages(room, limit=2)
    carol.leave(room), bob.set_displayname("Bob")            # which carol does not see any more
    assert [event["content"].get("displayname") for event in carol.messages(room, limit=3, filter='{"lazy_load_members": true}')["state"]] == ["alice", "bob", None]


@pytest.mark.parametrize("query", [{"dir": "x"}, {"limit": "x"}, {"limit": -1}, {"from": "x"}, {"to": "-1"}, {"filter": "{"}, {"filter": '{"types":5}'}, {"filter": '{"limit":"1"}'}])
def test_a_query_for_messages_that_is_none_is_refused(alice, room, query):
    with pytest.raises(MatrixError) as caught:
        alice.call("GET", path("rooms", room, "messages"), **query)
    assert caught.value.status == 400


@pytest.mark.parametrize("query", [{"timeout": "0" * 5000}, {"since": "0" * 20 + "9" * 30 + "0" * 4300}])
def test_a_number_with_thousands_of_digits_is_refused(alice, query):
    with refused("M_INVALID_PARAM", 400):
        alice.call("GET", V3 + "/sync", **query)


@pytest.mark.parametrize("where", ["sync", "messages"])
def test_a_filter_may_name_thousands_of_types(alice, room, where):
    many = {"types": [f"t{i}" for i in range(1500)]}
    if where == "sync":
        assert alice.sync(filter={"room": {"timeline": many}})["next_batch"]
    else:
        assert alice.messages(room, filter=json.dumps(many))["chunk"] == []


@pytest.mark.parametrize("names", [["*a" * 200], ["x" * 256], ["*" * 300], ["x"] * 5001, ["x"] * 100 + [f"*{n}" for n in range(51)]])
def test_a_filter_has_a_largest_size(alice, room, names):
    for use in (lambda: alice.messages(room, filter=json.dumps({"types": names})), lambda: alice.ask("POST", "user", alice.user_id, "filter", body={"room": {"timeline": {"not_types": names}}})):
        with refused("M_INVALID_PARAM", 400, "255 characters"):
            use()


def test_no_filter_takes_long(hs, alice, room):
    event_id = alice.send(room, "a" * 255, {})
    hostile = {"types": ["*a" * 127 + "b", "*a*a*a*a*a*a*a*b"] * 25, "not_types": [f"*a*{n}*b" for n in range(50)] + ["x"] * 4950}
    began = time.thread_time()
    with hs.world.store.read() as reader:
        assert not asbridge.event_filter(hostile).passes(reader.event(1, event_id))
        assert reader.events(1, 0, 2**62, 100, False, asbridge.event_filter(hostile)) == []
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("contains,expected", [(True, ["i"]), (False, ["t"])])
def test_a_filter_may_ask_for_events_with_a_url(alice, room, contains, expected):
    alice.say(room, "t"), alice.send(room, "m.room.message", {"msgtype": "m.image", "body": "i", "url": "mxc://localhost/x"})
    assert bodies(alice.messages(room, filter=json.dumps({"types": ["m.room.message"], "contains_url": contains}))["chunk"]) == expected


@pytest.mark.parametrize("limit,before,after", [(0, 0, 0), (1, 0, 1), (4, 2, 2), (100, 5, 5)])
def test_the_context_of_an_event_is_what_stood_around_it(alice, room, limit, before, after):
    ids = [alice.say(room, f"n{i}") for i in range(11)]
    context = alice.call("GET", path("rooms", room, "context", ids[5]), limit=limit, filter='{"types":["m.room.message"]}')
    assert context["event"]["event_id"] == ids[5]
    assert [event["event_id"] for event in context["events_before"]] == ids[:5][::-1][:before]
    assert [event["event_id"] for event in context["events_after"]] == ids[6:][:after]
    assert "m.room.create" in types(context["state"])
    earlier = alice.messages(room, "b", 1, **{"from": context["start"]})["chunk"]
    assert earlier[0]["event_id"] == (ids[4 - before] if before < 5 else alice.messages(room, "f", 1000)["chunk"][-12]["event_id"])


def test_lazy_loading_gives_a_context_the_members_who_speak(alice, bob, carol, room):
    bob.join(room), carol.join(room)
    where = path("rooms", room, "context", [bob.say(room, str(n)) for n in range(3)][1])
    for narrow, members in (({}, {alice.user_id, bob.user_id, carol.user_id}), ({"lazy_load_members": True}, {bob.user_id})):
        found = alice.call("GET", where, limit=2, filter=json.dumps(narrow))
        assert {event["state_key"] for event in found["state"] if event["type"] == "m.room.member"} == members


def test_an_event_says_what_membership_one_had_then(alice, bob, room):
    before = alice.say(room, "before")
    alice.invite(room, bob.user_id)
    since, while_invited = bob.sync()["next_batch"], alice.say(room, "invited")
    bob.join(room)
    after = alice.say(room, "after")
    at = {event["event_id"]: event["unsigned"]["membership"] for event in all_messages(bob, room)}
    assert [at[before], at[while_invited], at[after]] == ["leave", "invite", "join"]
    own = [event for event in all_messages(bob, room) if event.get("state_key") == bob.user_id]
    assert [event["unsigned"]["membership"] for event in own] == ["invite", "join"]      # with the event itself
    assert {event["event_id"]: event["unsigned"]["membership"] for event in joined(bob.sync(since), room)["timeline"]["events"]}.items() <= at.items()
    since = bob.sync()["next_batch"]
    assert bob.event(room, before)["unsigned"]["membership"] == "leave"
    alice.say(room, "x")
    assert [event["unsigned"]["membership"] for event in joined(bob.sync(since), room)["timeline"]["events"]] == ["join"]


# -- Sync.

def test_the_first_sync_has_the_state_before_the_timeline_and_the_last_ten_events(alice, room):
    for i in range(12):
        alice.say(room, f"n{i}")
    entry = joined(alice.sync(), room)
    assert bodies(entry["timeline"]["events"]) == [f"n{i}" for i in range(2, 12)] and entry["timeline"]["limited"] is True
    assert types(entry["state"]["events"]) == ["m.room.create", "m.room.member", "m.room.power_levels", "m.room.canonical_alias", "m.room.join_rules",
                                               "m.room.history_visibility", "m.room.guest_access"]
    assert entry["summary"] == {"m.heroes": [], "m.joined_member_count": 1, "m.invited_member_count": 0}


def test_the_next_sync_has_what_is_new_and_nothing_else(alice, room):
    alice.create_room()
    since = alice.sync()["next_batch"]
    keys = {"device_one_time_keys_count": {"signed_curve25519": 0}, "device_unused_fallback_key_types": []}      # in every answer
    assert alice.sync(since) == {"next_batch": since, **keys}
    alice.say(room, "new")
    answer = alice.sync(since)
    assert list(answer["rooms"]["join"]) == [room] and "account_data" not in answer
    entry = joined(answer, room)
    assert bodies(entry["timeline"]["events"]) == ["new"] and entry["timeline"]["limited"] is False and entry["state"]["events"] == []
    assert alice.sync(since)["next_batch"] == answer["next_batch"] and alice.sync(answer["next_batch"]) == {"next_batch": answer["next_batch"], **keys}


def test_a_limited_timeline_has_the_state_of_the_gap_and_a_prev_batch_that_leads_into_it(alice, room):
    since = alice.sync()["next_batch"]
    alice.set_state(room, "m.room.topic", {"topic": "in the gap"})
    sent = [alice.say(room, f"n{i}") for i in range(20)]
    timeline = joined(answer := alice.sync(since, filter={"room": {"timeline": {"limit": 5}}}), room)["timeline"]
    assert timeline["limited"] is True and ids(timeline["events"]) == sent[-5:]
    assert [event["content"] for event in joined(answer, room)["state"]["events"]] == [{"topic": "in the gap"}]
    gap = alice.messages(room, "b", 100, **{"from": timeline["prev_batch"], "to": since})["chunk"]
    assert ids(reversed(gap))[1:] == sent[:-5]


def test_a_long_poll_ends_with_the_first_event(hs, alice, bob, room):
    bob.join(room)
    since = bob.sync()["next_batch"]
    with polling(hs, bob, since) as future:
        assert not future.done()
        alice.say(room, "wake up")
        assert bodies(joined(future.result(5), room)["timeline"]["events"]) == ["wake up"]


def test_a_long_poll_ends_with_an_invitation_and_with_account_data(hs, alice, bob):
    for cause, key in ((lambda: alice.create_room(invite=[bob.user_id]), "rooms"), (lambda: bob.set_account_data("x", {}), "account_data")):
        since = bob.sync()["next_batch"]
        with polling(hs, bob, since) as future:
            cause()
            assert key in future.result(5)


def test_a_long_poll_does_not_look_where_nothing_has_happened(hs, alice, bob, room, monkeypatch):
    bob.join(room)
    since, looks, read = bob.sync()["next_batch"], [], asbridge.Window.read
    monkeypatch.setattr(asbridge.Window, "read", lambda window: looks.append(window.since) or read(window))
    with polling(hs, bob, since) as future:
        hs.world.store.waiters.wake()
        eventually(lambda: hs.world.store.waiters._looking == set())
        assert looks == []
        alice.say(room, "wake up")
        assert bodies(joined(future.result(5), room)["timeline"]["events"]) == ["wake up"]
    assert looks == [int(since)]


def test_a_long_poll_ends_empty_after_its_time(hs, alice):
    since = alice.sync()["next_batch"]
    with polling(hs, alice, since) as future:
        hs.advance(61)
        found = future.result(5)
    assert found["next_batch"] == since and not found.keys() & {"rooms", "account_data", "to_device"}


def test_a_long_poll_does_not_wake_for_what_its_filter_leaves_out(hs, alice, room):
    since = alice.sync()["next_batch"]
    with polling(hs, alice, since, {"room": {"timeline": {"types": ["m.room.message"]}}}) as future:
        alice.send(room, "org.other", {})
        alice.say(room, "this")
        assert bodies(joined(future.result(5), room)["timeline"]["events"]) == ["this"]


def test_a_since_from_the_future_is_treated_as_none(alice, room):
    answer = alice.sync("99999999999", 30_000)
    assert room in answer["rooms"]["join"] and int(answer["next_batch"]) < 99999999999
    with refused("M_INVALID_PARAM", 400):
        alice.sync("s_1")


def test_an_invitation_comes_once_with_stripped_state(alice, bob):
    room = alice.create_room(name="n", invite=[bob.user_id], is_direct=True)
    answer = bob.sync()
    events = answer["rooms"]["invite"][room]["invite_state"]["events"]
    assert {"m.room.create", "m.room.name", "m.room.join_rules"} <= set(types(events)) and all(set(event) == {"type", "state_key", "sender", "content"} for event in events)
    assert [(event["state_key"], event["content"]["membership"]) for event in events if event["type"] == "m.room.member"] == [
        (alice.user_id, "join"), (bob.user_id, "invite")]
    alice.say(room, "not for bob yet")
    assert "rooms" not in bob.sync(answer["next_batch"])


def test_a_newly_joined_room_comes_with_its_whole_state(alice, bob, room):
    since = bob.sync()["next_batch"]
    alice.say(room, "before")
    bob.join(room)
    entry = joined(bob.sync(since), room)
    assert {"m.room.create", "m.room.power_levels"} <= set(types(entry["state"]["events"] + entry["timeline"]["events"]))
    assert bodies(entry["timeline"]["events"]) == ["before"] and entry["timeline"]["events"][-1]["state_key"] == bob.user_id
    assert entry["summary"] == {"m.heroes": [alice.user_id], "m.joined_member_count": 2, "m.invited_member_count": 0}


@pytest.mark.parametrize("how", ["leave", "kick", "ban"])
def test_a_room_that_one_has_left_comes_once_with_what_was_until_then(alice, bob, room, how):
    bob.join(room)
    since = bob.sync()["next_batch"]
    alice.say(room, "last words")
    bob.leave(room) if how == "leave" else getattr(alice, how)(room, bob.user_id)
    alice.say(room, "behind his back")
    answer = bob.sync(since)
    timeline = answer["rooms"]["leave"][room]["timeline"]["events"]
    assert bodies(timeline) == ["last words"] and timeline[-1]["content"]["membership"] == ("ban" if how == "ban" else "leave")
    assert "rooms" not in bob.sync(answer["next_batch"]) and "rooms" not in bob.sync()
    assert bodies(bob.sync(filter={"room": {"include_leave": True}})["rooms"]["leave"][room]["timeline"]["events"]) == ["last words"]


def test_the_timeline_of_a_room_that_one_has_left_ends_with_that_though_the_rest_could_be_read(alice, bob, room):
    alice.set_state(room, "m.room.history_visibility", {"history_visibility": "world_readable"})
    bob.join(room)
    since = bob.sync()["next_batch"]
    bob.leave(room), alice.set_state(room, "m.room.topic", {"topic": "later"}), alice.say(room, "later")
    entry = bob.sync(since)["rooms"]["leave"][room]
    assert [event.get("state_key") for event in entry["timeline"]["events"]] == [bob.user_id] and entry["state"]["events"] == []
    assert bodies(all_messages(bob, room)) == ["later"]


def test_another_device_is_told_of_a_leave_after_which_the_room_was_forgotten(alice, bob, room):
    bob.join(room)
    since = bob.sync()["next_batch"]
    alice.say(room, "history"), bob.leave(room), bob.call("POST", path("rooms", room, "forget"), {})
    answer = bob.sync(since)
    assert [event["content"]["membership"] for event in answer["rooms"]["leave"][room]["timeline"]["events"]] == ["leave"]
    assert "rooms" not in bob.sync(answer["next_batch"])


def test_a_timeline_begins_after_what_one_may_not_see_so_that_no_state_is_missing(alice, bob, carol, room):
    since = bob.sync()["next_batch"]
    alice.say(room, "seen"), alice.set_state(room, "m.room.history_visibility", {"history_visibility": "joined"})
    carol.join(room), bob.join(room)
    entry = joined(bob.sync(since), room)
    timeline, state = entry["timeline"], {event["state_key"] for event in entry["state"]["events"] if event["type"] == "m.room.member"}
    assert [event["state_key"] for event in timeline["events"]] == [bob.user_id] and timeline["limited"] and carol.user_id in state
    assert bodies(bob.messages(room, "b", **{"from": timeline["prev_batch"]})["chunk"]) == ["seen"]


def test_a_declined_invitation_comes_as_a_room_that_one_has_left(alice, bob):
    room = alice.create_room(invite=[bob.user_id])
    since = bob.sync()["next_batch"]
    bob.leave(room)
    entry = bob.sync(since)["rooms"]["leave"][room]
    assert [(event["sender"], event["content"]["membership"]) for event in entry["timeline"]["events"]] == [(bob.user_id, "leave")] and entry["state"]["events"] == []


def test_an_invitation_that_is_withdrawn_comes_as_a_room_that_one_has_left(alice, bob):
    room = alice.create_room(invite=[bob.user_id])
    since = bob.sync()["next_batch"]
    alice.kick(room, bob.user_id)
    assert bob.sync(since)["rooms"]["leave"][room]["timeline"]["events"][0]["sender"] == alice.user_id


def test_who_was_put_out_and_invited_again_between_two_syncs_is_invited(alice, bob, room):
    """In one section only: clients that handle the leave after the invitation would forget the latter."""
    bob.join(room)
    since = bob.sync()["next_batch"]
    alice.kick(room, bob.user_id), alice.invite(room, bob.user_id)
    rooms = bob.sync(since)["rooms"]
    assert list(rooms) == ["invite"] and list(rooms["invite"]) == [room]


def test_a_room_that_one_knocks_at_comes_with_its_stripped_state(alice, bob):
    room = alice.create_room(name="n", initial_state=[{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}])
    since = bob.sync()["next_batch"]
    bob.call("POST", path("knock", room))
    answer = bob.sync(since)
    events = answer["rooms"]["knock"][room]["knock_state"]["events"]
    assert events[-1]["content"]["membership"] == "knock" and "m.room.name" in types(events) and "rooms" not in bob.sync(answer["next_batch"])
    bob.leave(room)
    assert list(bob.sync(answer["next_batch"])["rooms"]) == ["leave"]


def test_state_that_changed_while_one_was_away_is_told_after_coming_back(alice, bob):
    room = alice.create_room(preset="public_chat", initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}])
    bob.join(room)
    since = bob.sync()["next_batch"]
    bob.leave(room)
    alice.set_state(room, "m.room.topic", {"topic": "new"})
    bob.join(room)
    entry = joined(bob.sync(since), room)
    assert {"topic": "new"} in [event["content"] for event in entry["state"]["events"] + entry["timeline"]["events"]]


def test_full_state_gives_the_whole_state_again(alice, room):
    since = alice.sync()["next_batch"]
    entry = joined(alice.call("GET", V3 + "/sync", since=since, full_state="true"), room)
    assert "m.room.create" in types(entry["state"]["events"]) and entry["timeline"]["events"] == []


def test_lazy_loading_gives_the_members_who_speak(alice, bob, carol, room):
    bob.join(room), carol.join(room)
    for i in range(12):
        bob.say(room, f"n{i}")
    lazy = {"room": {"state": {"lazy_load_members": True}, "timeline": {"limit": 5}}}
    entry = joined(answer := alice.sync(filter=lazy), room)
    assert {event["state_key"] for event in entry["state"]["events"] if event["type"] == "m.room.member"} == {alice.user_id, bob.user_id}
    carol.say(room, "me too")
    entry = joined(alice.sync(answer["next_batch"], filter=lazy), room)
    assert {event["state_key"] for event in entry["state"]["events"]} - {alice.user_id} == {carol.user_id}


def test_a_sync_filter_chooses_rooms_and_kinds(alice, room):
    other = alice.create_room()
    alice.typing(room), alice.set_account_data("a", {}), alice.set_account_data("b", {}), alice.set_account_data("c", {}, room)
    assert list(alice.sync(filter={"room": {"rooms": [other]}})["rooms"]["join"]) == [other]
    assert list(alice.sync(filter={"room": {"not_rooms": [other]}})["rooms"]["join"]) == [room]
    answer = alice.sync(filter={"account_data": {"types": ["a"]}, "room": {"ephemeral": {"types": []}, "account_data": {"not_types": ["c"]}, "state": {"types": []}}})
    assert types(answer["account_data"]["events"]) == ["a"] and not {"ephemeral", "account_data"} & joined(answer, room).keys()
    assert joined(answer, room)["state"]["events"] == []


@pytest.mark.parametrize("part, missing", [("timeline", "timeline"), ("state", "state"), ("ephemeral", "ephemeral"), ("account_data", "account_data")])
def test_each_part_of_a_filter_may_choose_rooms(alice, room, part, missing):
    alice.typing(room), alice.set_account_data("c", {}, room)
    for _ in range(12):
        alice.say(room, "x")
    entry = joined(alice.sync(), room)
    assert all(entry[key]["events"] for key in ("timeline", "state", "ephemeral", "account_data"))
    for narrow in ({"not_rooms": [room]}, {"rooms": []}):
        entry = joined(alice.sync(filter={"room": {part: narrow}}), room)
        assert not entry.get(missing, {"events": []})["events"]
    assert joined(alice.sync(filter={"room": {part: {"rooms": [room]}}}), room)[missing]["events"]


@pytest.mark.parametrize("source", [
    {"event_fields": "x"}, {"room": {"include_leave": "true"}}, {"room": {"state": {"lazy_load_members": "false"}}}, {"room": {"timeline": {"lazy_load_members": 1}}},
    {"room": {"timeline": {"unread_thread_notifications": "x"}}}])
def test_a_filter_takes_only_what_is_of_the_right_type(alice, source):
    for use in (lambda: alice.sync(filter=source), lambda: alice.call("POST", path("user", alice.user_id, "filter"), source)):
        with refused("M_BAD_JSON", 400):
            use()


def test_a_timeline_of_which_no_event_is_wanted_is_limited_and_read_from_its_end(alice, bob, room):
    since, said = alice.sync()["next_batch"], [bob.join(room), bob.say(room, "1"), bob.say(room, "2")]
    told = joined(alice.sync(since, filter={"room": {"timeline": {"limit": 0}}}), room)["timeline"]
    assert told["events"] == [] and told["limited"] and bodies(alice.messages(room, "b", 2, **{"from": told["prev_batch"]})["chunk"]) == ["2", "1"] and said


def test_a_room_that_one_has_joined_and_left_since_comes_with_its_state(alice, bob):
    room, since = alice.create_room(preset="public_chat", name="Tea"), bob.sync()["next_batch"]
    bob.join(room), bob.leave(room)
    state = bob.sync(since)["rooms"]["leave"][room]["state"]["events"]
    assert {"m.room.create", "m.room.name"} <= {*types(state)}
    bob.join(room)
    since = bob.sync()["next_batch"]
    alice.set_state(room, "m.room.name", {"name": "Coffee"}), bob.leave(room)
    left = bob.sync(since)["rooms"]["leave"][room]
    assert types(left["state"]["events"]) == [] and types(left["timeline"]["events"]) == ["m.room.name", "m.room.member"]


@pytest.mark.parametrize("narrow, found", [
    ({"senders": ["@bob:localhost"]}, ["picture", "b"]), ({"not_senders": ["@bob:localhost"]}, ["a"]), ({"types": ["m.room.*"], "not_types": ["m.room.member"]}, ["a", "picture", "b"]),
    ({"contains_url": True}, ["picture"]), ({"contains_url": False, "types": ["m.room.message"]}, ["a", "b"]), ({"types": []}, []), ({"limit": 1}, ["b"]), ({"limit": 0}, []), ({"limit": -1}, [])])
def test_a_filter_chooses_what_the_timeline_has(alice, bob, room, narrow, found):
    bob.join(room)
    since = alice.sync()["next_batch"]
    alice.say(room, "a"), bob.send(room, "m.room.message", {"msgtype": "m.image", "body": "picture", "url": "mxc://localhost/x"}), bob.say(room, "b")
    rooms = alice.sync(since, filter={"room": {"timeline": narrow}}).get("rooms", {"join": {room: {"timeline": {"events": []}}}})
    assert bodies(rooms["join"][room].get("timeline", {"events": []})["events"]) == found


def test_state_that_a_filter_keeps_out_of_the_timeline_comes_as_state(alice, room):
    narrow = {"room": {"timeline": {"types": ["m.room.message"], "limit": 2}}}
    since = alice.sync()["next_batch"]

    def news():
        entry = joined(alice.sync(since, filter=narrow), room)
        return bodies(entry["timeline"]["events"]), [event["content"]["topic"] for event in entry["state"]["events"]]
    alice.set_state(room, "m.room.topic", {"topic": "1"})
    assert news() == ([], ["1"])
    alice.say(room, "a")
    alice.set_state(room, "m.room.topic", {"topic": "2"})
    assert news() == (["a"], ["2"])
    alice.say(room, "b"), alice.say(room, "c")
    assert news() == (["b", "c"], ["2"])
    alice.set_state(room, "m.room.topic", {"topic": "3"})
    assert news() == (["b", "c"], ["2", "3"])
    entry = joined(alice.sync(since, filter={"room": {"timeline": {"types": ["m.room.topic"]}, "state": {"not_types": ["m.room.member"]}}}), room)
    assert types(entry["timeline"]["events"]) == ["m.room.topic"] * 3 and entry["state"]["events"] == []       # not twice


def test_a_filter_may_leave_state_with_a_url_out(alice, room):
    alice.set_state(room, "m.room.avatar", {"url": "mxc://localhost/x"})
    for _ in range(12):
        alice.say(room, "x")
    for contains, found in ((True, {"m.room.avatar"}), (None, {"m.room.avatar", "m.room.create"}), (False, {"m.room.create"})):
        state = joined(alice.sync(filter={"room": {"state": {"contains_url": contains}}}), room)["state"]["events"]
        assert {"m.room.avatar", "m.room.create"} & set(types(state)) == found


@pytest.mark.parametrize("source, errcode", [({"event_format": "federation"}, "M_INVALID_PARAM"), ({"event_format": 5}, "M_BAD_JSON"), ({"presence": []}, "M_BAD_JSON"),
                                             ({"presence": {"types": "x"}}, "M_BAD_JSON"), ({"room": {"timeline": {"rooms": [5]}}}, "M_BAD_JSON"), ({"room": {"timeline": {"limit": "x"}}}, "M_BAD_JSON")])
def test_a_sync_filter_that_is_none_is_refused(alice, source, errcode):
    with refused(errcode, 400):
        alice.sync(filter=source)
    assert alice.sync(filter={"event_format": "client", "event_fields": ["type"]})


def test_lazy_loading_tells_all_changes_of_members_in_a_gap(alice, bob, carol, room):
    lazy = {"room": {"state": {"lazy_load_members": True}, "timeline": {"limit": 2}}}
    since = alice.sync(filter=lazy)["next_batch"]
    bob.join(room), carol.join(room), carol.leave(room), bob.say(room, "1"), alice.say(room, "2"), alice.say(room, "3")
    entry = joined(alice.sync(since, filter=lazy), room)
    assert {event["state_key"]: event["content"]["membership"] for event in entry["state"]["events"]} == {bob.user_id: "join", carol.user_id: "leave", alice.user_id: "join"}


def test_lazy_loading_tells_who_comes_back_between_two_syncs_who_has_left_meanwhile(bob, carol, room):
    lazy = {"room": {"state": {"lazy_load_members": True}}}
    bob.join(room), carol.join(room)
    since = bob.sync(filter=lazy)["next_batch"]
    carol.leave(room), bob.leave(room), bob.join(room)
    entry = joined(bob.sync(since, filter=lazy), room)
    assert entry["timeline"]["limited"]
    assert {event["state_key"]: event["content"]["membership"] for event in entry["state"]["events"] if event["type"] == "m.room.member"} == {carol.user_id: "leave", bob.user_id: "leave"}


def test_lazy_loading_gives_those_by_whom_a_room_without_a_name_is_known(alice, bob, carol):
    lazy = {"room": {"state": {"lazy_load_members": True}, "timeline": {"limit": 1}}}
    room = alice.create_room(preset="public_chat")
    carol.join(room), bob.join(room), alice.say(room, "x")

    def members():
        entry = joined(alice.sync(filter=lazy), room)
        return entry["summary"]["m.heroes"], [event["state_key"] for event in entry["state"]["events"] if event["type"] == "m.room.member"]
    assert members() == ([carol.user_id, bob.user_id], [alice.user_id, carol.user_id, bob.user_id])        # who came first
    carol.leave(room), bob.leave(room), alice.say(room, "x")
    assert set(members()[0]) == {carol.user_id, bob.user_id}
    alice.set_state(room, "m.room.name", {"name": "n"}), alice.say(room, "x")
    assert members()[1] == [alice.user_id]


def test_who_has_left_is_told_of_the_leave_and_not_by_whom_the_room_is_known(alice, bob, carol):
    room = alice.create_room(preset="public_chat")
    bob.join(room), carol.join(room)
    since = bob.sync()["next_batch"]
    bob.leave(room)
    entry = bob.sync(since, filter={"room": {"state": {"lazy_load_members": True}, "timeline": {"types": ["m.reaction"]}}})["rooms"]["leave"][room]
    told = [(event["state_key"], event["content"]["membership"]) for part in ("timeline", "state") for event in entry[part]["events"]]
    assert told == [(bob.user_id, "leave")]


@pytest.mark.parametrize("where", ["sync?since=", "rooms/{room}/messages?from=", "rooms/{room}/messages?to=", "rooms/{room}/members?at="])
def test_a_token_that_is_none_is_refused(alice, room, where):
    for token in ("x", "s1_2", "-1", "1.5"):
        with refused("M_INVALID_PARAM", 400):
            alice.call("GET", f"{V3}/{where.format(room=room)}{token}")


def test_timelines_put_together_are_the_history_none_twice_none_missing(alice, bob, carol, room):
    """A property: whatever the limits and whoever writes meanwhile, sync and messages together are the room."""
    bob.join(room), carol.join(room)

    def write(client, name):
        for i in range(40):
            client.say(room, f"{name}{i}")
            if i % 10 == 0:
                client.typing(room), client.set_state(room, "m.room.member", {"membership": "join", "displayname": f"{name}{i}"}, client.user_id)
    seen, since, limits = [], None, [1, 2, 3, 7, 50]
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, client, client.user_id[1]) for client in (alice, bob, carol)]
        while True:
            over = all(writer.done() for writer in writers)
            answer = alice.sync(since, 0, {"room": {"timeline": {"limit": limits[len(seen) % 5]}}})
            timeline = answer.get("rooms", {}).get("join", {}).get(room, {}).get("timeline", {"events": []})
            gap, start = [], timeline.get("prev_batch")
            while timeline.get("limited") and start:
                page = alice.messages(room, "b", 4, **{"from": start, "to": since})
                gap, start = gap + page["chunk"], page.get("end")
            seen += [event["event_id"] for event in [*reversed(gap), *timeline["events"]]]
            since = answer["next_batch"]
            if over:
                break
        [writer.result() for writer in writers]
    history = ids(all_messages(alice, room))
    assert seen == history and len(set(seen)) == len(seen) >= 132


def test_a_sync_says_of_many_rooms_what_it_says_of_each_alone(alice, bob, carol, monkeypatch):
    for number in range(7):
        room = alice.create_room(preset="public_chat", invite=[carol.user_id] if number % 2 else [])
        for say in range(number):
            alice.say(room, f"{say}")
        if number != 3:
            bob.join(room)
        if number == 4:
            bob.leave(room)
        if number == 5:
            receipt(bob, room, alice.say(room, "read"))
            alice.set_state(room, "m.room.history_visibility", {"history_visibility": "joined"})
    carol.join(room)
    answers = []
    for rooms_at_once in (1, 3, 100):
        monkeypatch.setattr(asbridge, "ROOMS_AT_ONCE", rooms_at_once)
        answers.append([re.sub(r'"age": \d+', '"age": 0', json.dumps(one.sync()["rooms"])) for one in (alice, bob, carol)])
    assert answers[0] == answers[1] == answers[2] and len(json.loads(answers[0][1])["join"]) == 5


def test_a_filter_by_url_is_for_events_of_rooms_and_does_no_harm_elsewhere(pair):
    hs, alice, bob, _, since = pair
    bob.typing(bob.joined_rooms()[0])
    part = {"contains_url": True}
    chosen = {"presence": part, "account_data": part, "room": {"ephemeral": part, "account_data": part, "state": part, "timeline": part}}
    assert alice.ask("GET", "sync", filter=json.dumps(chosen))["next_batch"]


# -- Sync: the state after the timeline.

@pytest.mark.parametrize("prefix", ["", "org.matrix.msc4222."])
def test_the_state_may_be_asked_for_as_it_is_after_the_timeline(alice, bob, room, prefix):

    def sync(since=None, client=alice, section="join", **more):
        answer = client.call("GET", V3 + "/sync", since=since, **{f"{prefix}use_state_after": "true"}, **more)
        entry = answer["rooms"][section][room]
        assert "state" not in entry
        return types(entry.get("timeline", {"events": []})["events"]), {event["type"]: event["content"] for event in entry[f"{prefix}state_after"]["events"]}, answer["next_batch"]
    alice.set_state(room, "m.room.topic", {"topic": "1"})
    timeline, state, since = sync()
    assert timeline[-1] == "m.room.topic" and state["m.room.topic"] == {"topic": "1"} and "m.room.create" in state
    alice.say(room, "x")
    assert sync(since)[:2] == (["m.room.message"], {})
    alice.set_state(room, "m.room.topic", {"topic": "2"})
    alice.set_state(room, "m.room.topic", {"topic": "3"})
    assert sync(since)[1] == {"m.room.topic": {"topic": "3"}}
    assert sync(since, filter=json.dumps({"room": {"timeline": {"limit": 1}}}))[:2] == (["m.room.topic"], {"m.room.topic": {"topic": "3"}})
    since = sync(since)[2]
    alice.typing(room)
    assert sync(since)[:2] == ([], {})                       # there, though it is empty
    assert sync(sync(since)[2], full_state="true")[1]["m.room.topic"] == {"topic": "3"}
    bob.join(room)
    since = bob.sync()["next_batch"]
    bob.leave(room)
    assert sync(since, bob, "leave")[1] == {"m.room.member": {"membership": "leave"}}


@pytest.mark.parametrize("name, key", [("use_state_after", "state_after"), ("org.matrix.msc4222.use_state_after", "org.matrix.msc4222.state_after")])
def test_a_sync_may_have_the_state_at_the_end_of_the_timeline_in_place_of_that_at_its_start(alice, room, name, key):
    first = joined(alice.ask("GET", "sync", **{name: "true"}, filter=json.dumps({"room": {"timeline": {"limit": 1}}})), room)
    assert "state" not in first and {event["type"] for event in first[key]["events"]} == {
        event["type"] for event in alice.all_state(room)}
    since = alice.sync()["next_batch"]
    alice.set_state(room, "m.room.topic", {"topic": "one"})
    alice.set_state(room, "m.room.topic", {"topic": "two"})
    alice.say(room, "after")
    entry = joined(alice.ask("GET", "sync", since=since, **{name: "true"}), room)
    assert [event["content"] for event in entry[key]["events"]] == [{"topic": "two"}] and len(entry["timeline"]["events"]) == 3
    assert key not in joined(alice.ask("GET", "sync", since=since, **{name: "false"}), room)


# -- Sync: the echo of one's own event.

@pytest.mark.parametrize("related", [True, False])
def test_the_device_that_sent_a_relation_sees_it_in_its_sync_a_little_later_than_the_others(pair, monkeypatch, related):
    hs, alice, bob, _, since = pair
    room = alice.joined_rooms()[0]
    root = alice.say(room, "root")
    tokens = [client.sync()["next_batch"] for client in (alice, bob, alice)]
    monkeypatch.setattr(asbridge, "ECHO_SECONDS", 0.3)
    with polling(hs, alice, tokens[2]) as own, polling(hs, bob, tokens[1]) as others:
        began = time.monotonic()
        alice.send(room, "m.room.message", {"body": "x", **({"m.relates_to": {"rel_type": "m.thread", "event_id": root}} if related else {})})
        assert others.result(5) and time.monotonic() - began < 0.3
        own.result(5)
        assert (time.monotonic() - began >= 0.3) == related


# -- Sync: what comes of those whom one ignores.

def test_what_an_ignored_user_says_does_not_come_but_what_changes_the_room_does(alice, bob, room):
    bob.join(room)
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {bob.user_id: {}}})
    since = alice.sync()["next_batch"]
    before = bob.say(room, "unheard")
    bob.set_displayname("Bobby")
    alice.say(room, "own")
    events = joined(alice.sync(since), room)["timeline"]["events"]
    assert bodies(events) == ["own"] and [event["content"].get("displayname") for event in events if event["type"] == "m.room.member"] == ["Bobby"]
    assert "unheard" not in bodies(alice.messages(room)["chunk"])
    own = alice.ask("GET", "rooms", room, "context", alice.say(room, "again"))
    assert "unheard" not in bodies(own["events_before"])
    assert alice.event(room, before)["content"]["body"] == "unheard"     # asked for by its ID, it is there
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {}})
    assert "unheard" in bodies(alice.messages(room)["chunk"])


def test_an_invitation_of_an_ignored_user_does_not_come(alice, bob, carol):
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {bob.user_id: {}}})
    since = alice.sync()["next_batch"]
    bob.create_room(invite=[alice.user_id])
    wanted = carol.create_room(invite=[alice.user_id])
    assert list(alice.sync(since)["rooms"]["invite"]) == list(alice.sync()["rooms"]["invite"]) == [wanted]


@pytest.mark.parametrize("content", [{}, {"ignored_users": []}, {"ignored_users": ["@bob:localhost"]}, {"ignored_users": "@bob:localhost"}, {"ignored_users": None}])
def test_a_list_of_ignored_users_that_is_none_ignores_nobody(alice, bob, room, content):
    bob.join(room)
    alice.set_account_data("m.ignored_user_list", content)
    bob.say(room, "heard")
    assert "heard" in bodies(joined(alice.sync(), room)["timeline"]["events"])


def test_the_relations_of_an_event_are_without_those_of_whom_one_ignores(alice, bob, room):
    bob.join(room)
    said = alice.say(room, "x")
    reaction = {"m.relates_to": {"rel_type": "m.annotation", "event_id": said, "key": "+"}}
    bob.send(room, "m.reaction", reaction), alice.send(room, "m.reaction", reaction)
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {bob.user_id: {}}})
    found = alice.call("GET", f"/_matrix/client/v1/rooms/{room}/relations/{said}")["chunk"]
    assert [event["sender"] for event in found] == [alice.user_id]


def test_a_long_poll_does_not_end_with_what_somebody_ignored_says(hs, alice, bob, room):
    bob.join(room)
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {bob.user_id: {}}})
    since = alice.sync()["next_batch"]
    with polling(hs, alice, since) as future:
        bob.say(room, "not this")
        alice.say(room, "this")
        assert bodies(joined(future.result(5), room)["timeline"]["events"]) == ["this"]


# -- The older way: /events and a room's /initialSync.

def test_events_are_a_plain_list_of_what_happened_since_a_token_and_the_next_token(pair):
    hs, alice, bob, carol, since = pair
    room = alice.joined_rooms()[0]
    bob.say(room, "one")
    bob.typing(room)
    invited = carol.create_room(invite=[alice.user_id])
    answer = alice.ask("GET", "events", **{"from": since})
    assert answer["start"] == since and bodies([event for event in answer["chunk"] if event["type"] == "m.room.message"]) == ["one"]
    assert {(event["type"], event.get("room_id")) for event in answer["chunk"]} >= {("m.room.message", room), ("m.typing", room), ("m.room.member", invited)}
    assert alice.ask("GET", "events", **{"from": answer["end"]})["chunk"] == []
    other = alice.create_room()
    chunk = alice.ask("GET", "events", room_id=room, **{"from": answer["end"]})["chunk"]
    assert other not in [event.get("room_id") for event in chunk]
    with refused("M_FORBIDDEN", 403):
        carol.ask("GET", "events", room_id=room)


def test_events_wait_from_now_on_if_no_token_is_given(pair):
    hs, alice, bob, _, since = pair
    room = alice.joined_rooms()[0]
    with background(alice.ask, "GET", "events", timeout="20000") as waiting:
        eventually(lambda: hs.world.store.waiters.among({alice.user_id}))
        bob.say(room, "now")
        assert bodies(waiting.result(5)["chunk"]) == ["now"]


def test_the_initial_sync_of_a_room_is_its_state_and_its_last_messages(alice, bob, carol, room):
    bob.join(room)
    for n in range(5):
        alice.say(room, str(n))
    bob.set_account_data("org.x", {"a": 1}, room)
    bob.receipt(room, read := alice.say(room, "5"))
    alice.sync()
    answer = bob.ask("GET", "rooms", room, "initialSync", limit=4)
    assert list(answer["receipts"][0]["content"]) == [read] and presences({"presence": {"events": answer["presence"]}}) == {
        alice.user_id: "online", bob.user_id: "offline"}
    assert (answer["room_id"], answer["membership"], answer["visibility"]) == (room, "join", "private")
    assert bodies(answer["messages"]["chunk"]) == ["2", "3", "4", "5"]
    older = bob.messages(room, "b", 2, **{"from": answer["messages"]["start"]})["chunk"]
    assert bodies(older) == ["1", "0"]
    assert {event["type"] for event in answer["state"]} >= {"m.room.create", "m.room.member", "m.room.power_levels"}
    assert answer["account_data"] == [{"type": "org.x", "content": {"a": 1}}]
    with refused("M_FORBIDDEN", 403):
        carol.ask("GET", "rooms", room, "initialSync")


# -- Clients' data: account data, tags, filters, OpenID.

def test_account_data_is_kept_and_synced_for_the_account_and_for_rooms(alice, bob, room):
    since = alice.sync()["next_batch"]
    for where in (None, room):
        with refused("M_NOT_FOUND", 404):
            alice.account_data("org.x", where)
        alice.set_account_data("org.x", {"where": where or "account"}, where)
        assert alice.account_data("org.x", where) == {"where": where or "account"}
    for since in (since, None):
        answer = alice.sync(since)
        assert answer["account_data"]["events"][0] == {"type": "org.x", "content": {"where": "account"}}
        assert joined(answer, room)["account_data"]["events"] == [{"type": "org.x", "content": {"where": room}}]
    with refused("M_FORBIDDEN", 403):
        bob.call("GET", path("user", alice.user_id, "account_data", "org.x"))


def test_account_data_of_a_room_that_was_set_before_joining_comes_with_the_join(alice, bob):
    room = alice.create_room(invite=[bob.user_id])
    bob.set_account_data("x", {"a": 1}, room)
    since = bob.sync()["next_batch"]
    bob.join(room)
    assert {"type": "x", "content": {"a": 1}} in bob.sync(since)["rooms"]["join"][room]["account_data"]["events"]


def test_tags_are_set_taken_off_and_told_as_account_data(alice, bob, room):
    tags = path("user", alice.user_id, "rooms", room, "tags")
    assert alice.call("GET", tags) == {"tags": {}}
    alice.call("PUT", tags + "/m.favourite", {"order": 0.5})
    alice.call("PUT", tags + "/u.work", {})
    assert alice.call("GET", tags) == {"tags": {"m.favourite": {"order": 0.5}, "u.work": {}}} == alice.account_data("m.tag", room)
    alice.call("DELETE", tags + "/u.work")
    assert joined(alice.sync(), room)["account_data"]["events"] == [{"type": "m.tag", "content": {"tags": {"m.favourite": {"order": 0.5}}}}]
    with refused("M_FORBIDDEN", 403):
        bob.call("GET", tags)


def test_account_data_that_is_no_list_of_tags_does_not_spoil_tagging(alice, room):
    alice.set_account_data("m.tag", {"tags": 5}, room)
    alice.call("PUT", path("user", alice.user_id, "rooms", room, "tags", "u.x"), {})
    assert alice.account_data("m.tag", room) == {"tags": {"u.x": {}}}


def test_a_stored_filter_is_given_back_used_and_ones_own(alice, bob, room):
    source = {"room": {"timeline": {"limit": 1, "types": ["m.room.message"]}}}
    url = path("user", alice.user_id, "filter")
    filter_id = alice.call("POST", url, source)["filter_id"]
    assert alice.call("GET", f"{url}/{filter_id}") == source and alice.call("POST", url, source)["filter_id"] == filter_id
    alice.say(room, "1"), alice.say(room, "2"), alice.set_state(room, "x", {})
    for filter in (filter_id, source):
        assert bodies(joined(alice.sync(filter=filter), room)["timeline"]["events"]) == ["2"]
    with refused("M_NOT_FOUND", 404):
        alice.call("GET", url + "/999")
    with refused("M_NOT_FOUND", 404):
        bob.sync(filter=filter_id)
    with refused("M_FORBIDDEN", 403):
        bob.call("GET", f"{url}/{filter_id}")


@pytest.mark.parametrize("source", [{"room": 5}, {"room": {"timeline": {"limit": "1"}}}, {"room": {"timeline": {"types": "x"}}}, {"room": {"rooms": [5]}}])
def test_a_filter_that_is_none_is_refused(alice, source):
    for use in (lambda: alice.sync(filter=source), lambda: alice.call("POST", path("user", alice.user_id, "filter"), source)):
        with refused("M_BAD_JSON", 400):
            use()


@pytest.mark.parametrize("method, where, body, status, errcode", [
    ("PUT", "C/profile/{user}/displayname", {"displayname": "x" * 257}, 400, "M_INVALID_PARAM"), ("PUT", "C/profile/{user}/avatar_url", {"avatar_url": "mxc://" + "x" * 1000}, 400, "M_INVALID_PARAM"),
    ("PUT", "C/presence/{user}/status", {"presence": "online", "status_msg": "x" * 1001}, 400, "M_INVALID_PARAM"), ("PUT", "U/rooms/{room}/tags/x", {"x": "y" * 66_000}, 413, "M_TOO_LARGE")])
def test_what_others_are_shown_or_what_is_written_anew_each_time_has_a_largest_size(target, method, where, body, status, errcode):
    got, answer = target.ask(method, target.filled(pattern_of(where), quote), json.dumps(body).encode())
    assert (got, json.loads(answer)["errcode"]) == (status, errcode)
    assert target.ghost.profile()["displayname"] != "x" * 257


def test_an_openid_token_tells_a_third_party_who_somebody_is_for_an_hour(hs, alice, bob):
    made = alice.call("POST", path("user", alice.user_id, "openid", "request_token"), {})
    assert made["token_type"] == "Bearer" and made["matrix_server_name"] == "localhost" and made["expires_in"] == 3600
    where = "/_matrix/federation/v1/openid/userinfo?access_token="
    assert ask(hs, "GET", where + made["access_token"]) == (200, {"sub": alice.user_id})
    assert ask(hs, "GET", where + alice.token)[1]["errcode"] == "M_UNKNOWN_TOKEN"
    assert ask(hs, "GET", path("account", "whoami"), made["access_token"])[0] == 401
    with refused("M_FORBIDDEN", 403):
        bob.call("POST", path("user", alice.user_id, "openid", "request_token"), {})
    hs.advance(3601)
    assert ask(hs, "GET", where + made["access_token"])[0] == 401


# -- The directory: of rooms.

def test_the_directory_has_the_published_rooms_with_the_fields_that_clients_read(hs, alice, bob):
    alice.create_room(name="private", visibility="private", preset="public_chat")
    alice.create_room(name="listed, but for those invited only", visibility="public", preset="private_chat")
    big = alice.create_room(name="Big", topic="t", visibility="public", room_alias_name="big", creation_content={"type": "m.space"})
    small = alice.create_room(name="Small", visibility="public", initial_state=[
        {"type": "m.room.history_visibility", "content": {"history_visibility": "world_readable"}}, {"type": "m.room.guest_access", "content": {"guest_access": "can_join"}}])
    bob.join(big)
    answer = ask(hs, "GET", V3 + "/publicRooms")[1]
    assert answer["total_room_count_estimate"] == 2 and answer["chunk"] == [
        {"room_id": big, "num_joined_members": 2, "world_readable": False, "guest_can_join": False, "join_rule": "public", "name": "Big",
         "topic": "t", "canonical_alias": "#big:localhost", "room_type": "m.space"},
        {"room_id": small, "num_joined_members": 1, "world_readable": True, "guest_can_join": True, "join_rule": "public", "name": "Small"}]


def test_the_directory_is_paged_and_searched(alice):
    for i in range(5):
        alice.create_room(name=f"room {i}", visibility="public")
    seen, since = [], None
    while True:
        page = alice.call("GET", V3 + "/publicRooms", limit=2, since=since)
        seen += [room["name"] for room in page["chunk"]]
        if not (since := page.get("next_batch")):
            break
    assert seen == [f"room {i}" for i in range(5)] and page["prev_batch"]
    found = alice.call("POST", V3 + "/publicRooms", {"filter": {"generic_search_term": "ROOM 3"}, "limit": 10})
    assert [room["name"] for room in found["chunk"]] == ["room 3"]


def test_the_directory_is_searched_by_the_types_of_rooms(alice):
    for name, type in (("plain", None), ("space", "m.space"), ("other", "org.x")):
        alice.create_room(name=name, visibility="public", creation_content={"type": type} if type else {})
    for types, found in (([None], ["plain"]), (["m.space"], ["space"]), ([None, "org.x"], ["plain", "other"]), (["none"], []), ([], ["plain", "space", "other"])):
        assert directory(alice, filter={"room_types": types}) == found
    with refused("M_BAD_JSON", 400, "room_types"):
        directory(alice, filter={"room_types": [5]})


def test_the_pages_of_the_directory_lead_forth_and_back(alice):
    for i in range(5):
        alice.create_room(name=f"room {i}", visibility="public")
    pages, since = [], None
    while since is not None or not pages:
        page = alice.call("POST", V3 + "/publicRooms", {"limit": 2, **({"since": since} if since else {})})
        assert page["total_room_count_estimate"] == 5
        pages.append([room["name"] for room in page["chunk"]])
        since = page.get("next_batch")
    assert pages == [["room 0", "room 1"], ["room 2", "room 3"], ["room 4"]]
    assert directory(alice, limit=2, since=page["prev_batch"]) == pages[1]
    assert len(directory(alice, limit=0)) == len(alice.call("GET", V3 + "/publicRooms", limit=0)["chunk"]) == 5       # no limit, as Synapse has it


def test_a_room_that_all_have_left_is_not_listed(alice):
    room = alice.create_room(name="over", visibility="public")
    assert directory(alice) == ["over"]
    alice.leave(room)
    assert directory(alice) == []


def test_the_directory_of_another_server_is_refused_with_the_reason(alice):
    alice.create_room(name="here", visibility="public")
    for method, body in (("GET", None), ("POST", {})):
        assert alice.call(method, V3 + "/publicRooms", body, server="localhost")["total_room_count_estimate"] == 1
        with refused("M_FORBIDDEN", 403, "elsewhere"):
            alice.call(method, V3 + "/publicRooms", body, server="elsewhere")


def test_an_application_service_keeps_a_directory_for_each_of_its_networks(start, recorder):
    r = recorder(200, {"instances": [{"network_id": "libera"}]})
    hs = start(registration("irc", r.url, protocols=["irc"]), registration("other", users=["@x.*"], aliases=[]))
    alice, irc, other = hs.client("alice"), hs.appservice("irc"), hs.appservice("other")
    own, both, tea, coffee, hidden = (alice.create_room(name=name, preset=preset, visibility=visibility) for name, preset, visibility in (
        ("own", None, "public"), ("both", None, "public"), ("tea", "public_chat", None), ("coffee", "public_chat", None), ("hidden", None, None)))
    for service, network, rooms in ((irc, "libera", (both, tea, hidden)), (irc, "of/tc", (tea,)), (other, "libera", (coffee,))):
        for room in rooms:
            for _ in range(2):                               # again is no error
                assert service.ask("PUT", "directory", "list", "appservice", network, room, body={"visibility": "public"}) == {}
    network = third_party(alice, "protocol", "irc")["instances"][0]["instance_id"]
    assert network == "irc|libera" and directory(alice, third_party_instance_id=network) == ["both", "tea"]
    assert directory(alice, third_party_instance_id="irc|of/tc") == ["tea"] and directory(alice, third_party_instance_id="other|libera") == ["coffee"]
    assert directory(alice, third_party_instance_id="irc|none") == directory(alice, third_party_instance_id="none") == []
    assert directory(alice) == ["own", "both"] and directory(alice, include_all_networks=True) == ["own", "both", "tea", "coffee"]
    assert directory(alice, include_all_networks=True, filter={"generic_search_term": "T"}) == ["both", "tea"]
    irc.ask("PUT", "directory", "list", "appservice", "libera", tea, body={"visibility": "private"})
    assert directory(alice, third_party_instance_id="irc|libera") == ["both"] and directory(alice, third_party_instance_id="irc|of/tc") == ["tea"]
    with refused("M_INVALID_PARAM", 400, "include_all_networks"):
        directory(alice, include_all_networks=True, third_party_instance_id="irc|libera")
    assert {"room_id", "num_joined_members", "world_readable", "guest_can_join", "join_rule", "name"} == set(
        alice.call("POST", V3 + "/publicRooms", {"include_all_networks": True})["chunk"][0])


def test_a_directory_of_a_network_is_for_its_service_and_for_rooms_that_there_are(hs, alice):
    room, irc = alice.create_room(preset="public_chat"), hs.appservice("irc")
    where = ("directory", "list", "appservice", "irc")
    with refused("M_FORBIDDEN", 403, "as_token"):
        alice.ask("PUT", *where, room, body={"visibility": "public"})
    for room_id, body, errcode in (("!none:localhost", {}, "M_NOT_FOUND"), (room, {"visibility": "x"}, "M_INVALID_PARAM"), (room, {"visibility": 5}, "M_BAD_JSON")):
        with refused(errcode):
            irc.ask("PUT", *where, room_id, body=body)


def test_a_network_is_not_listed_while_its_service_is_gone(start):
    one, two = registration("one"), registration("two", users=["@two.*"], aliases=[])
    hs = start(one, two)
    alice = hs.client("alice")
    room = alice.create_room(name="tea", preset="public_chat")
    hs.appservice("two").ask("PUT", "directory", "list", "appservice", "net", room, body={"visibility": "public"})
    for registrations, found in (([one], []), ([one, two], ["tea"])):
        hs.reread = lambda: [asbridge.read_registration(each, "test") for each in registrations]
        hs.reload()
        assert directory(alice, third_party_instance_id="two|net") == directory(alice, include_all_networks=True) == found


@pytest.mark.parametrize("since", ["9" * 5000, "x", "-1", "01", "\u0661"])
def test_a_place_in_the_directory_that_is_none_is_refused(alice, since):
    assert alice.call("POST", V3 + "/publicRooms", {"since": "1"})
    with refused("M_INVALID_PARAM", 400, "since"):
        alice.call("POST", V3 + "/publicRooms", {"since": since})


def test_a_room_is_listed_by_those_with_the_power_to_name_it(hs, alice, bob, room):
    bob.join(room)
    url = path("directory", "list", "room", room)
    assert ask(hs, "GET", url) == (200, {"visibility": "private"})
    with refused("M_FORBIDDEN", 403):
        bob.call("PUT", url, {"visibility": "public"})
    with refused("M_INVALID_PARAM", 400):
        alice.call("PUT", url, {"visibility": "x"})
    alice.call("PUT", url, {"visibility": "public"})
    assert ask(hs, "GET", url) == (200, {"visibility": "public"})
    assert ask(hs, "GET", path("directory", "list", "room", "!none:localhost"))[0] == 404


# -- The directory: of what is in a space.

def hierarchy(client, room, **query):
    answer = client.call("GET", f"/_matrix/client/v1/rooms/{urllib.parse.quote(room)}/hierarchy", **query)
    return [entry["room_id"] for entry in answer["rooms"]], answer


def test_a_space_lists_the_rooms_below_it_that_one_may_see(alice, bob, room):
    hidden = alice.create_room()
    below = alice.create_room(preset="public_chat", creation_content={"type": "m.space"})
    space = alice.create_room(preset="public_chat", creation_content={"type": "m.space"})
    for parent, child, order in ((space, below, "b"), (space, room, "a"), (space, hidden, "c"), (below, room, "a")):
        alice.set_state(parent, "m.space.child", {"via": ["localhost"], "order": order}, child)
    assert hierarchy(bob, space)[0] == [space, room, below]
    assert hierarchy(alice, space)[0] == [space, room, below, hidden]
    assert hierarchy(bob, space, max_depth=0)[0] == [space]
    first = hierarchy(bob, space, limit=2)[1]["rooms"][0]
    assert first["room_type"] == "m.space" and [event["state_key"] for event in first["children_state"]] == [room, below, hidden]


def test_of_a_space_no_more_is_looked_at_than_is_shown(alice, monkeypatch):
    space, looked_at, look = alice.create_room(creation_content={"type": "m.space"}), [], asbridge.Directory._space_entry
    children = [alice.create_room() for _ in range(6)]
    for n, child in enumerate(children):
        alice.set_state(space, "m.space.child", {"via": ["localhost"], "order": str(n)}, child)
    monkeypatch.setattr(asbridge.Directory, "_space_entry", lambda *args: looked_at.append(args[3]) or look(*args))
    rooms, answer = hierarchy(alice, space, limit=2)
    assert rooms == [space, children[0]] and looked_at == [space, *children[:2]]
    pages = [rooms]
    while "next_batch" in answer:
        rooms, answer = hierarchy(alice, space, limit=2, **{"from": answer["next_batch"]})
        pages.append(rooms)
    assert [*itertools.chain(*pages)] == [space, *children]


@pytest.mark.parametrize("allow, seen", [
    (lambda space: [{"type": "m.room_membership", "room_id": space}], True), (lambda space: [{"type": "m.room_membership", "room_id": "!gone:localhost"}], False),
    (lambda space: [{"type": "org.example.other", "room_id": space}], False), (lambda space: ["x", 5, {}, {"room_id": 5}], False), (lambda space: {"room_id": space}, False), (lambda space: None, False)])
def test_a_restricted_room_is_seen_in_a_hierarchy_by_who_is_in_a_room_that_it_names(alice, bob, carol, allow, seen):
    space = alice.create_room(preset="public_chat", creation_content={"type": "m.space"})
    rule = {"join_rule": "restricted", "allow": allow(space)}
    room = alice.create_room(initial_state=[{"type": "m.room.join_rules", "content": rule}])
    alice.set_state(space, "m.space.child", {"via": ["localhost"]}, room)
    bob.join(space)
    assert hierarchy(bob, space)[0] == [space, room] * seen + [space] * (not seen)
    assert hierarchy(carol, space)[0] == [space]


def test_a_hierarchy_goes_down_before_it_goes_on_and_only_below_spaces(alice):
    spaces, rooms = ([alice.create_room(creation_content={"type": type} if type else {}) for _ in range(3)] for type in ("m.space", None))
    for parent, child, order in ((spaces[0], rooms[0], "a"), (spaces[0], spaces[1], "b"), (spaces[0], rooms[1], "c"), (spaces[1], spaces[2], "a"), (spaces[2], rooms[2], "a"),
                                 (rooms[0], rooms[2], "a")):
        alice.set_state(parent, "m.space.child", {"via": ["localhost"], "order": order}, child)
    found, answer = hierarchy(alice, spaces[0])
    assert found == [spaces[0], rooms[0], spaces[1], spaces[2], rooms[2], rooms[1]]
    assert [bool(entry["children_state"]) for entry in answer["rooms"]] == [True, False, True, True, False, False]


def test_a_room_to_which_a_short_and_a_long_way_lead_is_as_far_down_as_the_short_one(alice):
    a, b, c = (alice.create_room(creation_content={"type": "m.space"}) for _ in range(3))
    d = alice.create_room()
    for parent, child, order in ((a, b, "1"), (a, c, "2"), (b, c, "1"), (c, d, "1")):
        alice.set_state(parent, "m.space.child", {"via": ["localhost"], "order": order}, child)
    assert hierarchy(alice, a, max_depth=2)[0] == [a, b, c, d] and hierarchy(alice, a, max_depth=1)[0] == [a, b, c]


@pytest.mark.parametrize("order", [5, "é", "x" * 51, "\n", None, ""])
def test_a_child_of_a_space_whose_order_is_no_order_comes_last(alice, order):
    space, rooms = alice.create_room(creation_content={"type": "m.space"}), [alice.create_room() for _ in range(3)]
    for child, its in zip(rooms, [order, "~" * 50, " "], strict=True):
        alice.set_state(space, "m.space.child", {"via": ["localhost"], "order": its}, child)
    assert hierarchy(alice, space)[0] == [space, rooms[2], rooms[1], rooms[0]]


def test_a_room_summary_tells_what_a_room_is_to_who_may_join_it(hs, alice, bob):
    room = alice.create_room(name="Tea", topic="green", room_alias_name="tea", preset="public_chat", initial_state=[
        {"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}])
    where = "/_matrix/client/v1/room_summary/" + quote("#tea:localhost")
    told = {"room_id": room, "num_joined_members": 1, "world_readable": False, "guest_can_join": False, "join_rule": "public", "name": "Tea", "topic": "green",
            "canonical_alias": "#tea:localhost", "room_version": "11", "encryption": "m.megolm.v1.aes-sha2"}
    assert ask(hs, "GET", where) == (200, told) and bob.call("GET", where) == told and alice.call("GET", where) == {**told, "membership": "join"}
    alice.set_state(room, "m.room.join_rules", {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": "!x:localhost"}, 5]})
    assert alice.call("GET", where)["allowed_room_ids"] == ["!x:localhost"] and ask(hs, "GET", where)[1]["errcode"] == "M_NOT_FOUND"


def test_a_room_summary_is_for_the_ghost_that_its_service_names(hs, ghost):
    own, other = ghost.create_room(preset="private_chat"), bot_of(hs).create_room(preset="private_chat")
    assert ghost.call("GET", f"/_matrix/client/v1/room_summary/{quote(own)}")["membership"] == "join"
    with refused("M_NOT_FOUND", 404):
        ghost.call("GET", f"/_matrix/client/v1/room_summary/{quote(other)}")


def test_a_hierarchy_comes_in_pages_and_may_have_what_is_suggested_only(alice, bob, room):
    space, other = alice.create_room(preset="public_chat", creation_content={"type": "m.space"}), alice.create_room(preset="public_chat")
    alice.set_state(space, "m.space.child", {"via": ["localhost"]}, room)
    alice.set_state(space, "m.space.child", {"via": ["localhost"], "suggested": True}, other)
    assert hierarchy(bob, space, suggested_only="true")[0] == [space, other]
    first, answer = hierarchy(bob, space, limit=2)
    assert len(first) == 2 and first + hierarchy(bob, space, limit=2, **{"from": answer["next_batch"]})[0] == hierarchy(bob, space)[0]
    alice.set_state(space, "m.space.child", {}, room)
    assert room not in hierarchy(bob, space)[0]
    with refused("M_FORBIDDEN", 403):
        hierarchy(bob, alice.create_room())


# -- The directory: of users.

def test_the_user_directory_has_those_whom_one_meets(alice, bob, carol, room):
    search = lambda client, term, **more: client.call("POST", path("user_directory", "search"), {"search_term": term, **more})  # noqa: E731
    assert search(bob, "alice")["results"] == []
    bob.join(room)
    alice.set_displayname("Alice Liddell")
    assert search(bob, "LIDD") == {"results": [{"user_id": alice.user_id, "display_name": "Alice Liddell"}], "limited": False}
    assert search(bob, "carol")["results"] == []
    carol.create_room(visibility="public")
    assert [one["user_id"] for one in search(bob, "carol")["results"]] == [carol.user_id]
    assert search(bob, "localhost", limit=1)["limited"]


# -- Relations: threads, edits, reactions.

def test_the_events_that_relate_to_one_are_listed_the_latest_first(alice, bob, room):
    bob.join(room)
    root = alice.say(room, "root")
    first, second = reply(bob, room, root), reply(alice, room, root, "m.annotation", type="m.reaction", key="x")
    alice.say(room, "unrelated")
    assert relations(bob, room, root)[0] == [second, first]
    assert relations(bob, room, root, dir="f")[0] == [first, second]
    assert relations(bob, room, root, "m.thread")[0] == [first]
    assert relations(bob, room, root, "m.annotation", "m.reaction")[0] == [second]
    assert relations(bob, room, root, "m.annotation", "m.room.message")[0] == []


def test_nobody_annotates_an_event_with_the_same_key_twice(alice, bob, room):
    bob.join(room)
    root = alice.say(room, "x")
    react = functools.partial(reply, rel_type="m.annotation", type="m.reaction")
    first = react(bob, room, root, key="+")
    with refused("M_DUPLICATE_ANNOTATION", 400):
        react(bob, room, root, key="+")
    react(bob, room, root, key="-")
    react(alice, room, root, key="+")
    bob.redact(room, first)
    react(bob, room, root, key="+")                          # what was taken back may be said again


def test_relations_come_in_pages(alice, room):
    root = alice.say(room, "root")
    sent = [reply(alice, room, root, body=str(n)) for n in range(5)]
    got, answer = relations(alice, room, root, limit=2)
    while "next_batch" in answer:
        more, answer = relations(alice, room, root, limit=2, **{"from": answer["next_batch"]})
        got += more
    assert got == sent[::-1]


def test_relations_of_relations_are_found_if_they_are_asked_for(alice, room):
    root = alice.say(room, "root")
    child = reply(alice, room, root)
    grandchild = reply(alice, room, child, "m.annotation", type="m.reaction", key="x")
    assert relations(alice, room, root)[0] == [child]
    found, answer = relations(alice, room, root, recurse="true")
    assert found == [grandchild, child] and answer["recursion_depth"] >= 2


def test_a_redacted_event_relates_to_nothing(alice, room):
    root = alice.say(room, "root")
    child = reply(alice, room, root)
    alice.redact(room, child)
    assert relations(alice, room, root)[0] == []


def test_relations_are_for_those_who_may_see_them(alice, bob, room):
    root = alice.say(room, "root")
    reply(alice, room, root)
    with pytest.raises(MatrixError) as caught:
        relations(bob, room, root)
    assert caught.value.status in (403, 404)
    other = alice.create_room()
    elsewhere = reply(alice, other, root)
    assert elsewhere not in relations(alice, room, root)[0]


def test_a_room_has_threads_the_one_with_the_latest_reply_first_each_with_its_summary(alice, bob, carol, room):
    bob.join(room)
    one, two = alice.say(room, "one"), alice.say(room, "two")
    reply(bob, room, two)
    reply(bob, room, one)
    last = reply(bob, room, one, body="last")
    found = threads(alice, room)["chunk"]
    assert ids(found) == [one, two]
    summary = bundled(found[0])["m.thread"]
    assert summary["count"] == 2 and summary["latest_event"]["event_id"] == last and summary["current_user_participated"]
    carol.join(room)
    assert threads(carol, room, include="participated")["chunk"] == []
    first = threads(alice, room, limit=1)
    rest = threads(alice, room, limit=1, **{"from": first["next_batch"]})
    assert ids(first["chunk"] + rest["chunk"]) == [one, two] and "next_batch" not in rest


def test_the_root_of_a_thread_has_its_summary_wherever_it_is_read(alice, bob, room):
    bob.join(room)
    root = alice.say(room, "root")
    reply(bob, room, root)
    last = reply(bob, room, root, body="last")
    edit = reply(bob, room, last, "m.replace", **{"m.new_content": {"body": "the last"}})
    edit = bob.send(room, "m.room.message", {"body": "*", "m.new_content": {}, "m.relates_to": {"rel_type": "m.replace", "event_id": last}})
    start = path("rooms", room)
    found = [next(event for event in events if event["event_id"] == root) for events in (
        alice.messages(room, "b", 50)["chunk"], [alice.call("GET", start + "/event/" + root)], [alice.call("GET", start + "/context/" + root)["event"]],
        alice.call("GET", start + "/context/" + last)["events_before"], joined(alice.sync(filter={"room": {"timeline": {"limit": 5}}}), room)["timeline"]["events"],
        threads(alice, room)["chunk"])]
    for event in found:
        thread = bundled(event)["m.thread"]
        assert (thread["count"], thread["latest_event"]["event_id"], thread["current_user_participated"]) == (2, last, True)
        assert bundled(thread["latest_event"])["m.replace"]["event_id"] == edit
    assert bundled(relations(alice, room, root, "m.thread")[1]["chunk"][0])["m.replace"]["event_id"] == edit
    everything = joined(alice.sync(filter={"room": {"timeline": {"limit": 100}}}), room)["timeline"]
    assert not everything["limited"] and not any(bundled(event) for event in everything["events"])      # all that relates is in it


def test_an_edited_event_keeps_its_content_and_carries_its_latest_valid_replacement(alice, bob, room):
    bob.join(room)
    original = alice.say(room, "cake")

    def edit(client, parent=original, type="m.room.message", **content):
        return client.send(room, type, {"body": "* x", "m.relates_to": {"rel_type": "m.replace", "event_id": parent}, **content})

    def read():
        event = alice.call("GET", path("rooms", room, "event", original))
        return event["content"]["body"], (bundled(event) or {}).get("m.replace", {}).get("event_id")
    edit(bob, **{"m.new_content": {}}), edit(alice), edit(alice, type="org.x", **{"m.new_content": {}})
    assert read() == ("cake", None)
    first, second = edit(alice, **{"m.new_content": {"body": "1"}}), edit(alice, **{"m.new_content": {"body": "2"}})
    assert read() == ("cake", second)
    edit(alice, second, **{"m.new_content": {}})             # an edit of an edit is none
    assert bundled(alice.call("GET", path("rooms", room, "event", second))) is None
    alice.redact(room, second)
    assert read() == ("cake", first)
    alice.redact(room, original)
    assert bundled(alice.call("GET", path("rooms", room, "event", original))) is None


def test_references_are_listed_without_those_of_ignored_users_and_state_has_none(alice, bob, carol, room):
    bob.join(room), carol.join(room)
    parent = alice.say(room, "parent")
    one, two = reply(bob, room, parent, "m.reference"), reply(carol, room, parent, "m.reference")

    def chunk(client, event_id=parent):
        return ((bundled(client.call("GET", path("rooms", room, "event", event_id))) or {}).get("m.reference") or {}).get("chunk")
    assert chunk(alice) == [{"event_id": one}, {"event_id": two}]
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {carol.user_id: {}}})
    assert chunk(alice) == [{"event_id": one}]
    alice.set_account_data("m.ignored_user_list", {"ignored_users": {carol.user_id: {}, bob.user_id: {}}})
    assert chunk(alice) is None
    state = alice.set_state(room, "m.room.topic", {"topic": "x"})
    reply(bob, room, state, "m.reference")
    assert chunk(bob, state) is None


def test_what_relates_to_an_event_after_one_has_left_is_not_bundled(alice, bob, room):
    bob.join(room)
    root = alice.say(room, "root")
    reply(alice, room, root)
    bob.leave(room)
    reply(alice, room, root)
    for client, count in ((alice, 2), (bob, 1)):
        assert bundled(client.call("GET", path("rooms", room, "event", root)))["m.thread"]["count"] == count


def test_a_thread_cannot_start_from_an_event_that_relates_to_another(alice, room):
    root = alice.say(room, "root")
    inside = reply(alice, room, root)
    with refused("M_UNKNOWN", 400, "thread"):
        reply(alice, room, inside)
    quote = alice.send(room, "m.room.message", {"body": "x", "m.relates_to": {"m.in_reply_to": {"event_id": root}}})
    assert reply(alice, room, quote) and reply(alice, room, "$unknown")      # a plain reply has no rel_type


def test_who_began_a_thread_has_participated_in_it(alice, bob, room):
    bob.join(room)
    reply(bob, room, root := alice.say(room, "root"))
    found = threads(alice, room, include="participated")["chunk"]
    assert ids(found) == [root] and bundled(found[0])["m.thread"]["current_user_participated"]


def test_who_has_left_is_still_told_the_threads_as_they_were(alice, bob, room):
    bob.join(room)
    reply(bob, room, root := alice.say(room, "root"))
    bob.leave(room)
    reply(alice, room, root)
    found = threads(bob, room)["chunk"]
    assert [(event["event_id"], bundled(event)["m.thread"]["count"]) for event in found] == [(root, 1)]


# -- Receipts and read markers.

def test_receipts_are_told_to_all_and_private_ones_to_nobody_else(alice, bob, room):
    bob.join(room)
    event_id, since = alice.say(room, "x"), alice.sync()["next_batch"]
    bob.receipt(room, event_id, "m.read.private")
    assert "rooms" not in alice.sync(since)
    assert list(ephemeral(bob, room, type="m.receipt")[event_id]["m.read.private"]) == [bob.user_id]
    bob.receipt(room, event_id)
    assert ephemeral(alice, room, since, "m.receipt")[event_id]["m.read"][bob.user_id]["ts"] > 0
    bob.call("POST", path("rooms", room, "receipt", "m.read", event_id), {"thread_id": "main"})
    assert "thread_id" not in ephemeral(bob, room, type="m.receipt")[event_id]["m.read"][bob.user_id]
    told = [event["content"][event_id] for event in joined(bob.sync(), room)["ephemeral"]["events"]]         # one event for each thread
    assert [content["m.read"][bob.user_id].get("thread_id") for content in told if "m.read" in content] == [None, "main"]


def test_a_receipt_needs_a_known_type_and_membership(alice, bob, room):
    with refused("M_INVALID_PARAM", 400):
        alice.receipt(room, "$x", "m.unread")
    with refused("M_FORBIDDEN", 403):
        bob.receipt(room, "$x")


def test_read_markers_are_account_data_and_receipts(alice, room):
    one, two = alice.say(room, "1"), alice.say(room, "2")
    since = alice.sync()["next_batch"]
    alice.call("POST", path("rooms", room, "read_markers"), {"m.fully_read": one, "m.read": two})
    assert alice.account_data("m.fully_read", room) == {"event_id": one}
    entry = joined(alice.sync(since), room)
    assert entry["account_data"]["events"] == [{"type": "m.fully_read", "content": {"event_id": one}}] and two in entry["ephemeral"]["events"][0]["content"]
    with refused("M_BAD_JSON", 405):
        alice.set_account_data("m.fully_read", {"event_id": two}, room)


def test_a_receipt_moves_forward_only(alice, bob, room):
    bob.join(room)
    one, two = alice.say(room, "1"), alice.say(room, "2")
    receipt(bob, room, two)
    since = alice.sync()["next_batch"]
    receipt(bob, room, one), receipt(bob, room, two), receipt(bob, room, "$unknown")
    assert "rooms" not in alice.sync(since) and list(ephemeral(alice, room, type="m.receipt")) == [two]
    receipt(bob, room, one, "m.read.private"), receipt(bob, room, one, thread_id="main")     # each kind for itself
    assert set(ephemeral(bob, room, type="m.receipt")) == {one, two}


def test_a_receipt_is_for_an_event_in_its_thread(alice, room):
    root, other = alice.say(room, "root"), alice.say(room, "other")
    inside = reply(alice, room, root)
    reaction = reply(alice, room, inside, "m.annotation", type="m.reaction", key="x")
    for event_id, thread_id in ((root, "main"), (root, root), (inside, root), (reaction, root), (other, "main")):
        assert receipt(alice, room, event_id, thread_id=thread_id) == {}
    for event_id, thread_id in ((inside, "main"), (reaction, "main"), (other, root), (inside, other), (inside, "$x"), (inside, "x"),
                                (inside, ""), (inside, None), (inside, 5)):
        with refused("M_INVALID_PARAM", 400, "thread"):
            receipt(alice, room, event_id, thread_id=thread_id)
    with refused("M_INVALID_PARAM", 400, "thread_id"):
        receipt(alice, room, root, "m.fully_read", thread_id="main")
    with refused("M_INVALID_PARAM", 400, "no event ID"):
        receipt(alice, room, "~local:1")


def test_read_markers_may_move_a_private_receipt(alice, bob, room):
    bob.join(room)
    event_id, since = alice.say(room, "1"), alice.sync()["next_batch"]
    bob.call("POST", path("rooms", room, "read_markers"), {"m.read.private": event_id, "m.read": None})
    assert list(ephemeral(bob, room, type="m.receipt")[event_id]) == ["m.read.private"] and "rooms" not in alice.sync(since)


# -- Typing.

def test_typing_is_told_until_it_stops_or_runs_out(hs, alice, bob, room):
    bob.join(room)
    since = alice.sync()["next_batch"]
    bob.typing(room, timeout=20_000)
    assert ephemeral(alice, room, since) == {"user_ids": [bob.user_id]}
    since = alice.sync(since)["next_batch"]
    hs.advance(21)
    assert joined(alice.sync(since, 5000), room)["ephemeral"]["events"] == [{"type": "m.typing", "content": {"user_ids": []}}]
    alice.typing(room)
    assert ephemeral(bob, room) == {"user_ids": [alice.user_id]}
    since = bob.sync()["next_batch"]
    alice.typing(room, False)
    assert ephemeral(bob, room, since) == {"user_ids": []}
    assert ephemeral(bob, room) is None                      # who begins is told only who types


def test_typing_is_for_oneself_in_a_room_that_one_is_in(alice, bob, room):
    for client, user in ((bob, bob), (alice, bob)):
        with refused("M_FORBIDDEN", 403):
            client.call("PUT", path("rooms", room, "typing", user.user_id), {"typing": True})
    with refused("M_MISSING_PARAM", 400):
        alice.call("PUT", path("rooms", room, "typing", alice.user_id), {})


def test_who_leaves_stops_typing(alice, bob, room):
    bob.join(room), bob.typing(room), bob.leave(room)
    assert ephemeral(alice, room) is None


def test_who_typed_when_the_homeserver_stopped_types_no_more(tmp_path):
    keys = {"database": str(tmp_path / "hs.db")}
    with asbridge.Homeserver(**keys) as hs:
        alice, bob = hs.client("alice"), hs.client("bob")
        room = alice.create_room(invite=[bob.user_id])
        bob.join(room)
        bob.typing(room)
        since = alice.sync()["next_batch"]
    with asbridge.Homeserver(**keys) as hs:
        alice.close()
        events = asbridge.Client(hs.url, alice.token).sync(since)["rooms"]["join"][room]["ephemeral"]["events"]
        assert events == [{"type": "m.typing", "content": {"user_ids": []}}]


def test_who_typed_stops_when_there_is_a_thread_for_it_again(hs, alice, monkeypatch):
    room = alice.create_room()
    with monkeypatch.context() as patch:
        no_threads_named(patch, "typing")
        alice.typing(room, timeout=1000)
    bob = hs.client("bob")
    alice.invite(room, bob.user_id)
    bob.join(room)
    bob.typing(room, timeout=30_000)
    hs.advance(2)
    eventually(lambda: hs.api.typing._rooms[1][1].keys() == {bob.user_id})


# -- Presence.

def test_who_syncs_is_online_and_offline_some_time_after_the_last_sync(pair):
    hs, alice, bob, _, since = pair
    assert presence_of(alice, bob) == {"presence": "offline", "currently_active": False}
    bob.sync()
    answer = alice.sync(since)
    assert presences(answer) == {bob.user_id: "online"} and answer["presence"]["events"][0]["type"] == "m.presence"
    found = presence_of(alice, bob)
    assert found.pop("last_active_ago") >= 0 and found == {"presence": "online", "currently_active": True}
    assert presences(alice.sync(answer["next_batch"])) == {}
    hs.advance(asbridge.OFFLINE_SECONDS + 1)
    eventually(lambda: presence_of(alice, bob)["presence"] == "offline")
    assert presences(alice.sync(since))[bob.user_id] == "offline"


def test_a_change_of_presence_wakes_who_shares_a_room_and_nobody_else(pair):
    hs, alice, bob, carol, since = pair
    other = carol.sync()["next_batch"]
    with polling(hs, alice, since) as waiting, polling(hs, carol, other) as stranger:
        bob.sync()
        assert presences(waiting.result(5)) == {bob.user_id: "online"}
        assert not stranger.done()
        carol.create_room()
        assert presences(stranger.result(5)) == {}


def test_a_long_poll_keeps_one_online_while_it_waits(pair):
    hs, alice, bob, _, since = pair
    with polling(hs, bob, bob.sync()["next_batch"]) as waiting:
        hs.advance(asbridge.OFFLINE_SECONDS + 1)
        assert presence_of(alice, bob)["presence"] == "online"
        alice.create_room(invite=[bob.user_id])
        waiting.result(5)


def test_who_is_online_and_does_nothing_becomes_unavailable_until_something_is_done(pair):
    hs, alice, bob, _, since = pair
    bob.sync(timeout=0)
    polling = functools.partial(hs.api.presence.polling, asbridge.Who(bob.user_id, device_of(bob)), "online", 600.0)
    polling()
    hs.advance(asbridge.UNAVAILABLE_SECONDS + 1)
    eventually(lambda: presence_of(alice, bob)["presence"] == "unavailable")
    polling()                                                # to go on polling is to do nothing
    assert presence_of(alice, bob)["presence"] == "unavailable"
    bob.typing(bob.joined_rooms()[0])
    assert presence_of(alice, bob)["presence"] == "online"
    set_presence(bob, "unavailable")
    bob.say(bob.joined_rooms()[0], "back")
    assert presence_of(alice, bob)["presence"] == "online"


def test_of_several_devices_those_count_that_sync_and_have_synced_since_the_user_said_something(pair):
    hs, alice, bob, _, _ = pair
    other = again(hs, bob)
    other.ask("GET", "sync", set_presence="online")
    bob.ask("GET", "sync", set_presence="unavailable")
    assert presence_of(alice, bob)["presence"] == "online"
    hs.advance(asbridge.OFFLINE_SECONDS + 1)                 # the other one has gone
    bob.ask("GET", "sync", set_presence="unavailable")
    assert presence_of(alice, bob)["presence"] == "unavailable"
    other.ask("GET", "sync", set_presence="online")
    for _ in range(3):                                       # the other one goes, this one stays
        hs.advance(asbridge.OFFLINE_SECONDS * 0.6)
        bob.ask("GET", "sync", set_presence="unavailable")
    assert presence_of(alice, bob)["presence"] == "unavailable"
    other.ask("GET", "sync", set_presence="online"), set_presence(bob, "unavailable")
    again(hs, bob).ask("GET", "sync", set_presence="unavailable")
    assert presence_of(alice, bob)["presence"] == "unavailable"


def test_what_a_user_says_stays_though_the_client_goes_on_syncing(pair):
    hs, alice, bob, _, since = pair
    since_bob = bob.sync()["next_batch"]
    set_presence(bob, "unavailable", status_msg="at lunch")
    for _ in range(2):
        bob.sync(since_bob)
    bob.create_room()
    found = presence_of(alice, bob)
    assert (found["presence"], found["status_msg"], found["currently_active"]) == ("unavailable", "at lunch", False)
    assert presences(alice.sync(since)) == {bob.user_id: "unavailable"}
    set_presence(bob, "online")
    assert "status_msg" not in presence_of(alice, bob)


@pytest.mark.parametrize("wish, becomes", [("online", "online"), ("unavailable", "unavailable"), ("offline", "offline")])
def test_a_sync_says_with_set_presence_what_it_is_to_mean(pair, wish, becomes):
    hs, alice, bob, _, since = pair
    bob.ask("GET", "sync", set_presence=wish)
    assert presence_of(alice, bob)["presence"] == becomes
    bob.ask("GET", "sync", set_presence="online")            # another wish than the last of this device
    assert presence_of(alice, bob)["presence"] == "online"
    with refused("M_INVALID_PARAM", 400, "unavailable"):
        bob.ask("GET", "sync", set_presence="away")


def test_presence_is_for_who_shares_a_room_and_set_by_oneself(pair):
    hs, alice, bob, carol, since = pair
    for user in (alice.user_id, "@nobody:localhost"):
        with refused("M_FORBIDDEN", 403):
            carol.ask("GET", "presence", user, "status")
    with refused("M_FORBIDDEN", 403):
        alice.ask("PUT", "presence", bob.user_id, "status", body={"presence": "online"})
    for body in ({}, {"presence": "away"}, {"presence": 5}, {"presence": "online", "status_msg": 5}):
        with pytest.raises(MatrixError) as caught:
            alice.ask("PUT", "presence", alice.user_id, "status", body=body)
        assert caught.value.status == 400
    carol.sync()
    assert presences(carol.sync()) == {carol.user_id: "online"}   # oneself is never a stranger


def test_an_initial_sync_names_who_is_there_and_a_filter_leaves_them_out(pair):
    hs, alice, bob, _, since = pair
    bob.sync()
    assert presences(alice.sync()) == {alice.user_id: "online", bob.user_id: "online"}
    for part in ({"types": []}, {"not_types": ["m.presence"]}, {"not_senders": [alice.user_id, bob.user_id]}):
        assert "presence" not in alice.ask("GET", "sync", filter=json.dumps({"presence": part}))
    assert presences(alice.ask("GET", "sync", filter=json.dumps({"presence": {"senders": [bob.user_id]}}))) == {bob.user_id: "online"}


def test_who_joins_is_told_who_is_there_and_the_others_that_somebody_has_come(alice, bob, room):
    tokens = {client: client.sync()["next_batch"] for client in (alice, bob)}
    bob.join(room)
    assert presences(bob.sync(tokens[bob])) == {alice.user_id: "online"} and presences(alice.sync(tokens[alice])) == {bob.user_id: "online"}


def test_after_a_restart_of_the_homeserver_one_is_told_who_is_not_there_any_more(start, tmp_path):
    hs = start(database=str(tmp_path / "a.db"))
    alice, bob = hs.client("alice"), hs.client("bob")
    bob.join(alice.create_room(preset="public_chat"))
    bob.sync()
    since, both = alice.sync()["next_batch"], [alice.user_id, bob.user_id]
    hs.stop()
    answer = asbridge.Client(start(database=str(tmp_path / "a.db")).url, alice.token).sync(since)
    assert presences(answer) == dict(zip(both, ("online", "offline"), strict=True))


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), MatrixError("M_UNKNOWN", "full")])
def test_a_change_of_presence_that_could_not_be_told_is_tried_again(pair, monkeypatch, error):
    hs, alice, bob, _, since = pair
    bob.sync()
    write, fails = hs.world.store.write, []

    def failing(fn, token=None):
        if threading.current_thread().name == "presence" and len(fails) < 2:
            fails.append(1)
            raise error
        return write(fn, token)
    monkeypatch.setattr(hs.world.store, "write", failing)
    since = alice.sync(since)["next_batch"]
    hs.advance(asbridge.OFFLINE_SECONDS + 1)
    eventually(lambda: fails)
    eventually(lambda: hs.advance(2) or presence_of(alice, bob)["presence"] == "offline")
    assert presences(alice.sync(since))[bob.user_id] == "offline"


def test_a_sync_of_who_is_online_already_writes_nothing(pair):
    hs, alice, bob, _, since = pair
    position = hs.world.store.position
    for _ in range(3):
        alice.sync(since)
    assert hs.world.store.position == position


def test_a_ghost_is_what_its_service_says_and_stays_so(hs, alice, ghost):
    ghost.join(alice.create_room(preset="public_chat"))
    set_presence(ghost, "online", status_msg="on IRC")
    hs.advance(3 * asbridge.UNAVAILABLE_SECONDS)
    assert presence_of(bot_of(hs), ghost)["status_msg"] == "on IRC"      # who may act as it may ask, too
    set_presence(ghost, "offline")
    assert presence_of(alice, ghost)["presence"] == "offline"


def test_a_ghost_that_is_online_does_not_go_idle(hs, alice, ghost):
    ghost.join(alice.create_room(preset="public_chat"))
    set_presence(ghost, "online")
    set_presence(alice, "online")
    hs.advance(asbridge.OFFLINE_SECONDS + 1)
    eventually(lambda: presence_of(ghost, alice)["presence"] == "offline")
    hs.advance(asbridge.UNAVAILABLE_SECONDS)
    set_presence(alice, "online")
    hs.advance(asbridge.OFFLINE_SECONDS + 1)
    eventually(lambda: presence_of(ghost, alice)["presence"] == "offline")    # the timer has looked at both
    assert presence_of(alice, ghost)["presence"] == "online"


def test_each_change_of_presence_is_told(pair):
    hs, alice, bob, _, since = pair
    since = bob.sync()["next_batch"]
    for presence in ("unavailable", "online"):
        set_presence(alice, presence)
        answer = bob.sync(since)
        since = answer["next_batch"]
        assert presences(answer) == {alice.user_id: presence}


def test_who_asks_for_a_sync_without_end_is_offline_after_the_longest_that_there_is(pair):
    hs, alice, bob, _, since = pair
    bob.ask("GET", "sync", timeout=2**53 - 1)
    hs.advance(asbridge.MAX_SYNC_SECONDS + asbridge.OFFLINE_SECONDS + 1)
    hs.api.presence._expire()
    assert presence_of(alice, bob)["presence"] == "offline"


# -- Media.

@pytest.mark.parametrize("old", [True, False])
def test_what_is_uploaded_is_downloaded_with_its_type_and_name(hs, alice, old):
    status, answer = ask(hs, "POST", "/_matrix/media/v3/upload?filename=na%C3%AFve%20caf%C3%A9.png", alice.token, b"\x89PNG\0", {"Content-Type": "image/png"})
    assert status == 200 and answer["content_uri"].startswith("mxc://localhost/")
    where = ("/_matrix/media/v3/download/" if old else "/_matrix/client/v1/media/download/") + answer["content_uri"][6:]
    headers = {} if old else {"Authorization": f"Bearer {alice.token}"}
    connection = http.client.HTTPConnection("127.0.0.1", hs.port, timeout=5)
    for suffix, name in (("", "na%C3%AFve%20caf%C3%A9.png"), ("/other.png", "other.png"), ("?allow_redirect=true&allow_remote=true", "na%C3%AFve%20caf%C3%A9.png")):
        connection.request("GET", where + suffix, headers=headers)
        response = connection.getresponse()
        assert (response.status, response.read(), response.headers["Content-Type"]) == (200, b"\x89PNG\0", "image/png")
        assert response.headers["Content-Disposition"] == f"inline; filename*=UTF-8''{name}" and "sandbox" in response.headers["Content-Security-Policy"]
    connection.close()


def test_what_could_be_run_is_no_inline_content(hs, alice):
    uri = ask(hs, "POST", "/_matrix/media/r0/upload", alice.token, b"<script>", {"Content-Type": "text/html"})[1]["content_uri"]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", hs.port, timeout=5)) as connection:
        connection.request("GET", "/_matrix/media/r0/download/" + uri[6:])
        assert connection.getresponse().headers["Content-Disposition"] == "attachment"


@pytest.mark.parametrize("old", [True, False])
def test_the_thumbnail_of_a_picture_is_the_picture(hs, alice, old):
    base = "/_matrix/media/v3" if old else "/_matrix/client/v1/media"
    headers = {} if old else {"Authorization": f"Bearer {alice.token}"}
    picture, text = (ask(hs, "POST", f"/_matrix/media/v3/upload?filename={name}", alice.token, b"content", {"Content-Type": type})[1]["content_uri"][6:]
                     for name, type in (("a%22b%C3%A9.png", "image/PNG; x=y"), ("t.txt", "text/plain")))
    for query in ("width=32&height=32", "width=320&height=240&method=crop&animated=true&allow_redirect=true&allow_remote=false&timeout_ms=1"):
        status, answer, body = whole(hs, "GET", f"{base}/thumbnail/{picture}?{query}", headers)
        assert (status, answer["Content-Type"], body) == (200, "image/PNG; x=y", b"content")
        assert answer["Content-Disposition"] == "inline; filename*=UTF-8''a%22b%C3%A9.png"
    for where, query, status, errcode in ((text, "width=32&height=32", 400, "M_UNKNOWN"), (picture, "", 400, "M_MISSING_PARAM"), (picture, "width=32", 400, "M_MISSING_PARAM"),
                                          (picture, "width=0&height=5", 400, "M_INVALID_PARAM"), (picture, "width=5&height=5&method=shrink", 400, "M_INVALID_PARAM"),
                                          ("localhost/none", "width=5&height=5", 404, "M_NOT_FOUND"), ("elsewhere/" + picture[10:], "width=5&height=5", 404, "M_NOT_FOUND")):
        got, _, body = whole(hs, "GET", f"{base}/thumbnail/{where}?{query}", headers)
        assert (got, json.loads(body)["errcode"]) == (status, errcode)
    assert whole(hs, "GET", f"{base}/thumbnail/{picture}?width=32&height=32")[0] == (200 if old else 401)


def test_a_user_uploads_four_large_files_at_a_time_and_any_number_of_small_ones(hs, alice, bob):
    with contextlib.ExitStack() as going:
        for _ in range(asbridge.MAX_UPLOADS):
            going.enter_context(hs.api.media.uploading(asbridge.Who(alice.user_id)))
        large = bytes(asbridge.SMALL_UPLOAD + 1)
        assert [ask(hs, "POST", "/_matrix/media/v3/upload", *one)[0] for one in ((bob.token, large), (alice.token, large[1:]))] == [200, 200]
        status, answer = ask(hs, "POST", "/_matrix/media/v3/upload", alice.token, large)
        assert (status, answer["errcode"], answer["retry_after_ms"]) == (429, "M_LIMIT_EXCEEDED", 1000)
    assert ask(hs, "POST", "/_matrix/media/v3/upload", alice.token, large)[0] == 200 and not hs.api.media._under_way


def test_media_without_a_type_are_bytes(hs, alice):
    for headers in ({}, {"Content-Type": ""}):
        uri = ask(hs, "POST", "/_matrix/media/v3/upload", alice.token, b"x", headers)[1]["content_uri"]
        assert whole(hs, "GET", "/_matrix/media/v3/download/" + uri[6:])[1]["Content-Type"] == "application/octet-stream"


def test_media_that_is_not_there_not_allowed_or_too_large_is_refused(start):
    hs = start(max_upload_bytes=10)
    alice = hs.client("alice")
    assert ask(hs, "GET", "/_matrix/media/v3/download/localhost/none")[1]["errcode"] == "M_NOT_FOUND"
    assert ask(hs, "GET", "/_matrix/media/v3/download/elsewhere/none")[0] == 404
    assert ask(hs, "GET", "/_matrix/client/v1/media/download/localhost/none")[1]["errcode"] == "M_MISSING_TOKEN"
    assert ask(hs, "POST", "/_matrix/media/v3/upload", alice.token, b"x" * 11)[1]["errcode"] == "M_TOO_LARGE"
    for url in ("/_matrix/media/v3/config", "/_matrix/client/v1/media/config"):
        assert ask(hs, "GET", url, alice.token) == (200, {"m.upload.size": 10})


def created(client):
    uri = client.call("POST", "/_matrix/media/v1/create", {})["content_uri"]
    return uri.removeprefix("mxc://")


def test_a_media_uri_can_be_made_before_its_content(hs, alice, bob):
    media = created(alice)
    with refused("M_NOT_YET_UPLOADED", 504):
        bob.call("GET", f"/_matrix/client/v1/media/download/{media}", timeout_ms=0)
    with background(ask, hs, "GET", f"/_matrix/client/v1/media/download/{media}", bob.token) as waiting:
        assert ask(hs, "PUT", f"/_matrix/media/v3/upload/{media}", alice.token, b'"late"', {"Content-Type": "application/json"})[0] == 200
        assert waiting.result(5) == (200, "late")


def test_a_media_uri_whose_content_has_not_come_in_a_day_is_none_any_more(hs, alice, bob):
    media = created(alice)
    hs.advance(asbridge.UNUSED_MEDIA_MS / 1000 + 1)
    with refused("M_NOT_FOUND", 404):
        bob.call("GET", f"/_matrix/client/v1/media/download/{media}")


def test_the_content_of_a_media_uri_comes_once_and_from_who_made_it(hs, alice, bob):
    media = created(alice)
    assert ask(hs, "PUT", f"/_matrix/media/v3/upload/{media}", bob.token, b"x")[1]["errcode"] == "M_FORBIDDEN"
    assert ask(hs, "PUT", f"/_matrix/media/v3/upload/{media}", alice.token, b"x")[0] == 200
    status, answer = ask(hs, "PUT", f"/_matrix/media/v3/upload/{media}", alice.token, b"y")
    assert (status, answer["errcode"]) == (409, "M_CANNOT_OVERWRITE_MEDIA")
    assert ask(hs, "PUT", "/_matrix/media/v3/upload/localhost/nothing", alice.token, b"x")[0] == 404
    late = created(alice)
    hs.advance(25 * 3600)
    assert ask(hs, "PUT", f"/_matrix/media/v3/upload/{late}", alice.token, b"x")[0] == 404


# -- Keys: of devices.

def test_device_keys_are_queried_as_they_were_uploaded_with_the_devices_name(alice, bob):
    assert upload(alice) == {"signed_curve25519": 0}
    alice.ask("PUT", "devices", device_of(alice), body={"display_name": "Alice's phone"})
    found = query_keys(bob, alice, bob)
    assert found["device_keys"] == {alice.user_id: {device_of(alice): {**device_keys(alice), "unsigned": {"device_display_name": "Alice's phone"}}}, bob.user_id: {}}
    assert found["failures"] == {} and found["master_keys"] == {}
    one = bob.ask("POST", "keys", "query", body={"device_keys": {alice.user_id: ["OTHER"]}})
    assert one["device_keys"] == {alice.user_id: {}}


def test_keys_are_told_though_the_service_of_an_unknown_ghost_does_not_answer(start, recorder):
    r = recorder(503)
    hs = start(registration(url=r.url))
    alice = hs.client("alice")
    upload(alice)
    found = alice.ask("POST", "keys", "query", body={"device_keys": {"@_irc_x:localhost": [], alice.user_id: [], "@_irc_y:localhost": []}})
    assert list(found["device_keys"][alice.user_id]) == [device_of(alice)] and found["device_keys"]["@_irc_x:localhost"] == {}
    assert sorted(path.rpartition("/")[2] for _, path, *_ in r.requests) == ["@_irc_x:localhost", "@_irc_y:localhost"]


def test_one_time_keys_go_out_in_the_order_in_which_they_came(alice, bob):
    upload(alice, one_time="ZAM")
    with refused("M_BAD_JSON"):
        bob.ask("POST", "keys", "claim", body={"one_time_keys": {alice.user_id: {device_of(alice): 5}}})
    assert [claim(bob, alice, algorithm) for algorithm in ("*", "signed", "signed_curve25519", "signed_curve25519", "signed_curve25519")] == [None, None, "Z", "A", "M"]


def test_a_device_with_keys_that_is_renamed_is_new_to_others(alice, bob, room):
    bob.join(room)
    upload(bob)
    since = alice.sync()["next_batch"]
    bob.ask("PUT", "devices", device_of(bob), body={"display_name": "phone"})
    assert alice.sync(since)["device_lists"]["changed"] == [bob.user_id]


def test_keys_of_a_user_on_another_server_are_a_failure_of_that_server(alice):
    found = alice.ask("POST", "keys", "query", body={"device_keys": {"@x:other.org": []}})
    assert list(found["failures"]) == ["other.org"] and found["device_keys"] == {}


@pytest.mark.parametrize("body, errcode", [
    ({"device_keys": {"user_id": "@bob:localhost", "device_id": "X"}}, "M_INVALID_PARAM"), ({"device_keys": []}, "M_BAD_JSON"), ({"one_time_keys": {"noalgorithm": {}}}, "M_INVALID_PARAM"),
    ({"one_time_keys": {"signed_curve25519:A": 5}}, "M_INVALID_PARAM"), ({"fallback_keys": {"signed_curve25519:A": None}}, "M_INVALID_PARAM"), ({"one_time_keys": 1}, "M_BAD_JSON")])
def test_keys_that_are_not_of_the_device_that_uploads_them_or_not_of_their_form_are_refused(alice, body, errcode):
    with refused(errcode, 400):
        alice.ask("POST", "keys", "upload", body=body)


def test_a_one_time_key_is_claimed_once_and_then_the_fallback_key_again_and_again(alice, bob):
    assert upload(alice, one_time="AB", fallback="F") == {"signed_curve25519": 2}
    sync = alice.sync()
    assert (sync["device_one_time_keys_count"], sync["device_unused_fallback_key_types"]) == ({"signed_curve25519": 2}, ["signed_curve25519"])
    assert [claim(bob, alice) for _ in range(4)] == ["A", "B", "F", "F"]
    sync = alice.sync()
    assert (sync["device_one_time_keys_count"], sync["device_unused_fallback_key_types"]) == ({"signed_curve25519": 0}, [])
    upload(alice, fallback="F")                              # the same again is still used, a new one is not
    assert alice.sync()["device_unused_fallback_key_types"] == []
    upload(alice, fallback="G")
    assert alice.sync()["device_unused_fallback_key_types"] == ["signed_curve25519"] and claim(bob, alice) == "G"
    assert claim(bob, alice, "other") is None and claim(alice, bob) is None


def test_each_one_time_key_goes_to_one_of_many_who_claim_at_the_same_time(alice, bob, carol):
    ids = [f"K{n:02}" for n in range(40)]
    upload(alice, one_time=ids)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: claim((bob, carol)[n % 2], alice), range(48)))
    assert sorted(id for id in got if id) == ids and got.count(None) == 8


def test_a_one_time_key_may_be_uploaded_again_but_not_with_another_content(alice):
    assert upload(alice, one_time="A") == upload(alice, one_time="A") == {"signed_curve25519": 1}
    with refused("M_INVALID_PARAM", 400, "already exists"):
        alice.ask("POST", "keys", "upload", body={"one_time_keys": {"signed_curve25519:A": "other"}})


def test_a_device_that_is_gone_takes_its_keys_along(hs, alice, bob):
    second = again(hs, alice)
    upload(second, one_time="A", fallback="F")
    device_id = device_of(second)
    bob.ask("PUT", "sendToDevice", "m.x", "1", body={"messages": {alice.user_id: {device_id: {}}}})
    second.ask("POST", "logout")
    assert query_keys(bob, alice)["device_keys"] == {alice.user_id: {}}
    with hs.world.store.read() as reader:
        assert [reader.all(f"SELECT * FROM {table}") for table in ("device_keys", "one_time_keys", "fallback_keys", "to_device")] == [[]] * 4


# -- Keys: whose are new.

def test_sync_names_who_shares_a_room_and_has_a_new_device(hs, alice, bob, carol, room):
    bob.join(room)
    carol_alone = carol.create_room()
    since = alice.sync()["next_batch"]
    upload(carol)                                            # in no room with alice
    assert "device_lists" not in alice.sync(since)
    with polling(hs, alice, since) as future:
        upload(bob)
        found = future.result(5)
    assert found["device_lists"] == {"changed": [bob.user_id], "left": []}
    assert "device_lists" not in alice.sync(found["next_batch"])
    assert "device_lists" not in alice.sync() and carol_alone
    since = alice.sync()["next_batch"]
    upload(bob)                                              # nothing new in it
    assert "device_lists" not in alice.sync(since)
    bob.ask("POST", "logout")
    assert alice.sync(since)["device_lists"]["changed"] == [bob.user_id]


def test_sync_names_whom_one_meets_and_whom_one_meets_no_more(alice, bob, carol, room):
    for client in (alice, bob, carol):
        upload(client)
    tokens = {client: client.sync()["next_batch"] for client in (alice, bob)}
    bob.join(room)
    assert alice.sync(tokens[alice])["device_lists"] == {"changed": [bob.user_id], "left": []}
    assert bob.sync(tokens[bob])["device_lists"] == {"changed": [alice.user_id], "left": []}
    tokens = {client: client.sync()["next_batch"] for client in (alice, bob)}
    bob.leave(room)
    assert alice.sync(tokens[alice])["device_lists"] == {"changed": [], "left": [bob.user_id]}
    assert bob.sync(tokens[bob])["device_lists"] == {"changed": [], "left": [alice.user_id]}


def test_who_is_still_met_in_another_room_has_not_left(alice, bob, room):
    other = alice.create_room(preset="public_chat")
    upload(bob)
    for id in (room, other):
        bob.join(id)
    since = alice.sync()["next_batch"]
    bob.leave(other)
    assert alice.sync(since)["device_lists"]["left"] == []


@pytest.mark.parametrize("filter", [{"rooms": []}, {"not_rooms": ["{room}"]}])
def test_device_lists_do_not_depend_on_the_rooms_that_a_filter_chooses(alice, bob, room, filter):
    upload(bob)
    since = alice.sync()["next_batch"]
    bob.join(room)
    assert alice.sync(since, filter={"room": json.loads(json.dumps(filter).replace("{room}", room))})["device_lists"]["changed"] == [bob.user_id]


@pytest.mark.parametrize("how", ["declined", "taken back", "unbanned"])
def test_who_was_never_in_a_room_does_not_learn_who_is(alice, bob, carol, how):
    upload(alice), upload(bob)
    room = alice.create_room(invite=[bob.user_id, carol.user_id])
    bob.join(room)
    since = carol.sync()["next_batch"]
    if how == "declined":
        carol.leave(room)
    else:
        for verb in ("kick",) if how == "taken back" else ("ban", "unban"):
            alice.call("POST", path("rooms", room, verb), {"user_id": carol.user_id})
    assert "device_lists" not in carol.sync(since)


# -- Keys: messages to devices.

def test_a_message_to_a_device_comes_with_its_next_sync_and_is_gone_when_that_is_acknowledged(hs, alice, bob):
    other = again(hs, alice)
    since = alice.sync()["next_batch"]
    bob.ask("PUT", "sendToDevice", "m.room_key", "1", body={"messages": {alice.user_id: {device_of(alice): {"n": 1}, "GONE": {}}, "@nobody:localhost": {"*": {}}}})
    message = {"type": "m.room_key", "sender": bob.user_id, "content": {"n": 1}}
    found = alice.sync(since)
    assert found["to_device"] == {"events": [message]} == alice.sync(since)["to_device"] == alice.sync()["to_device"]
    assert "to_device" not in other.sync() and "to_device" not in alice.sync(found["next_batch"])
    assert "to_device" not in alice.sync(since)              # was acknowledged
    assert "to_device" not in alice.sync()


def test_what_a_sync_acknowledges_is_gone_even_if_it_has_nothing_new_to_look_for(hs, alice, bob):
    since = alice.sync()["next_batch"]
    bob.ask("PUT", "sendToDevice", "m.room_key", "1", body={"messages": {alice.user_id: {"*": {}}}})
    since = alice.sync(since)["next_batch"]
    with background(alice.sync, since, 30_000) as future:
        eventually(lambda: hs.world.store.waiters._asleep)
        with hs.world.store.read() as reader:
            assert reader.to_device(alice.user_id, device_of(alice)) == []
        alice.set_account_data("x", {})
        future.result(5)
    assert not hs.api.sync.handed


def test_a_sync_is_answered_even_if_nothing_can_be_stored(hs, alice, bob, room):
    since = alice.sync()["next_batch"]
    bob.ask("PUT", "sendToDevice", "m.room_key", "1", body={"messages": {alice.user_id: {"*": {}}}})
    found = alice.sync(since)
    alice.say(room, "there is something new")
    store = hs.world.store
    store._tx.db = FaultyDb(store._tx.db, "COMMIT", 1000)
    assert bob.sync()["next_batch"]                          # who was offline, and comes back
    assert joined(alice.sync(found["next_batch"]), room)["timeline"]["events"]           # who has messages to devices to drop
    store._tx.db.times = 0
    assert "to_device" not in alice.sync(found["next_batch"]) and alice.say(room, "there is room again")


def test_a_message_to_all_devices_wakes_each_and_is_sent_once_for_its_transaction_id(hs, alice, bob):
    other = again(hs, alice)
    tokens = [client.sync()["next_batch"] for client in (alice, other)]
    with polling(hs, other, tokens[1]) as future:
        for _ in range(2):
            bob.ask("PUT", "sendToDevice", "m.x", "same", body={"messages": {alice.user_id: {"*": {"n": 1}}}})
        assert len(future.result(5)["to_device"]["events"]) == 1
    assert len(alice.sync(tokens[0])["to_device"]["events"]) == 1
    bob.ask("PUT", "sendToDevice", "m.y", "same", body={"messages": {alice.user_id: {"*": {"n": 2}}}})
    assert [message["type"] for message in alice.sync(tokens[0])["to_device"]["events"]] == ["m.x", "m.y"]


@pytest.mark.parametrize("keys", [{"algorithms": None}, {"keys": None}, {"signatures": None}, {"algorithms": "x"}, {"keys": []}, {"signatures": 5}])
def test_device_keys_that_others_could_not_read_are_refused(alice, bob, keys):
    with refused("M_BAD_JSON", 400, next(iter(keys))):
        alice.ask("POST", "keys", "upload", body={"device_keys": {key: value for key, value in device_keys(alice, **keys).items() if value is not None}})
    assert bob.ask("POST", "keys", "query", body={"device_keys": {alice.user_id: []}})["device_keys"][alice.user_id] == {}


def test_who_is_invited_banned_or_has_declined_was_met_in_no_room_and_has_not_left(alice, bob, carol):
    upload(bob), upload(carol)
    since, room = alice.sync()["next_batch"], alice.create_room(invite=[bob.user_id, carol.user_id])
    assert "device_lists" not in alice.sync(since)
    since = alice.sync()["next_batch"]
    bob.leave(room), alice.ask("POST", "rooms", room, "ban", body={"user_id": carol.user_id})
    assert "device_lists" not in alice.sync(since)


def test_what_has_changed_in_device_lists_may_be_asked_for(alice, bob, room):
    since = alice.sync()["next_batch"]
    upload(bob), bob.join(room)
    changes = "/_matrix/client/v3/keys/changes"
    assert alice.call("GET", changes, **{"from": since, "to": "1"}) == {"changed": [bob.user_id], "left": []} == alice.sync(since)["device_lists"]
    since = alice.sync()["next_batch"]
    assert alice.call("GET", changes, **{"from": since, "to": since}) == {"changed": [], "left": []}
    bob.leave(room)
    assert alice.call("GET", changes, **{"from": since, "to": since}) == {"changed": [], "left": [bob.user_id]}
    with refused("M_MISSING_PARAM", 400):
        alice.call("GET", changes, to="5")


def test_messages_to_devices_outlive_the_homeserver(start, tmp_path):
    hs = start(database=str(tmp_path / "a.db"))
    alice, bob = hs.client("alice"), hs.client("bob")
    bob.ask("PUT", "sendToDevice", "m.x", "1", body={"messages": {alice.user_id: {"*": {}}}})
    hs.stop()
    assert len(asbridge.Client(start(database=str(tmp_path / "a.db")).url, alice.token).sync()["to_device"]["events"]) == 1


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": {"alice": {}}}, {"messages": {"@a:localhost": []}}, {"messages": {"@a:localhost": {"D": "x"}}}])
def test_messages_to_devices_that_are_not_objects_are_refused(alice, body):
    with pytest.raises(MatrixError) as caught:
        alice.ask("PUT", "sendToDevice", "m.x", "1", body=body)
    assert caught.value.status == 400


def test_a_message_to_a_device_is_not_taken_away_by_events_which_does_not_carry_it(alice, bob):
    since = alice.sync()["next_batch"]
    bob.ask("PUT", "sendToDevice", "m.room_key", "1", body={"messages": {alice.user_id: {"*": {}}}})
    alice.ask("GET", "events")
    assert len(alice.sync(since)["to_device"]["events"]) == 1


# -- Keys: cross-signing.

def test_cross_signing_keys_are_seen_by_others_but_for_the_user_signing_key(alice, bob, room):
    bob.join(room)
    since = bob.sync()["next_batch"]
    keys = cross_signing_keys(alice.user_id)
    alice.ask("POST", "keys", "device_signing", "upload", body=keys)
    assert bob.sync(since)["device_lists"]["changed"] == [alice.user_id]
    for client, usages in ((alice, ("master", "self_signing", "user_signing")), (bob, ("master", "self_signing"))):
        found = query_keys(client, alice)
        assert {usage: found[f"{usage}_keys"].get(alice.user_id) for usage in ("master", "self_signing", "user_signing")} == {
            usage: {"signatures": {}, **keys[f"{usage}_key"]} if usage in usages else None for usage in ("master", "self_signing", "user_signing")}


def test_cross_signing_keys_are_replaced_with_the_password_only_but_uploaded_again_without(hs):
    answer = hs.api.accounts.register("alice", "secret")
    alice = asbridge.Client(hs.url, answer["access_token"])
    keys = cross_signing_keys(alice.user_id)
    for _ in range(2):
        assert alice.ask("POST", "keys", "device_signing", "upload", body=keys) == {}
    other = cross_signing_keys(alice.user_id, "b")
    status, challenge = ask(hs, "POST", "/_matrix/client/v3/keys/device_signing/upload", alice.token, other)
    assert status == 401 and challenge["flows"] == [{"stages": ["m.login.password"]}] and challenge["session"]
    auth = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "alice"}, "password": "secret"}
    assert alice.ask("POST", "keys", "device_signing", "upload", body={**other, "auth": auth}) == {}
    assert query_keys(alice, alice)["master_keys"][alice.user_id]["keys"] == other["master_key"]["keys"]


def test_an_application_service_replaces_cross_signing_keys_of_its_users_without_confirmation(ghost):
    for name in "ab":
        assert ghost.ask("POST", "keys", "device_signing", "upload", body=cross_signing_keys(ghost.user_id, name)) == {}
    assert query_keys(ghost, ghost)["master_keys"][ghost.user_id]["keys"] == {"ed25519:master-b": "master-b"}


@pytest.mark.parametrize("change, errcode", [
    (lambda keys: keys["master_key"].update(user_id="@bob:localhost"), "M_INVALID_PARAM"), (lambda keys: keys["master_key"].update(usage=["other"]), "M_INVALID_PARAM"),
    (lambda keys: keys["master_key"].update(keys={}), "M_INVALID_PARAM"), (lambda keys: keys["master_key"].update(keys={"ed25519:A": "A", "ed25519:B": "B"}), "M_INVALID_PARAM"),
    (lambda keys: keys["master_key"].update(keys={"ed25519:A": "B"}), "M_INVALID_PARAM"), (lambda keys: keys["self_signing_key"].pop("signatures"), "M_INVALID_SIGNATURE"),
    (lambda keys: keys["user_signing_key"].update(signatures={"@alice:localhost": {"ed25519:other": "x"}}), "M_INVALID_SIGNATURE"), (lambda keys: keys.pop("master_key"), "M_MISSING_PARAM"),
    (lambda keys: keys.update(master_key=5), "M_BAD_JSON")])
def test_cross_signing_keys_of_another_form_or_unsigned_are_refused(alice, change, errcode):
    keys = cross_signing_keys(alice.user_id)
    change(keys)
    with refused(errcode, 400):
        alice.ask("POST", "keys", "device_signing", "upload", body=keys)


def test_signatures_are_merged_into_what_is_queried_and_others_are_seen_only_by_who_made_them(alice, bob, carol, room):
    for client in (alice, bob, carol):
        client.join(room)
        upload(client)
        client.ask("POST", "keys", "device_signing", "upload", body=cross_signing_keys(client.user_id))
    tokens = {client: client.sync()["next_batch"] for client in (alice, carol)}
    device, master = device_keys(alice), cross_signing_keys(bob.user_id)["master_key"]
    signed = {alice.user_id: {device["device_id"]: {**device, "signatures": {alice.user_id: {"ed25519:self_signing-a": "S"}}}},
              bob.user_id: {"master-a": {**master, "signatures": {alice.user_id: {"ed25519:user_signing-a": "U"}}}}}
    assert alice.ask("POST", "keys", "signatures", "upload", body=signed) == {"failures": {}}
    by_self = query_keys(bob, alice)["device_keys"][alice.user_id][device["device_id"]]["signatures"][alice.user_id]
    assert by_self == {f"ed25519:{device['device_id']}": "by itself", "ed25519:self_signing-a": "S"}
    assert query_keys(alice, bob)["master_keys"][bob.user_id]["signatures"] == {alice.user_id: {"ed25519:user_signing-a": "U"}}
    assert query_keys(carol, bob)["master_keys"][bob.user_id]["signatures"] == {}
    assert alice.sync(tokens[alice])["device_lists"]["changed"] == [alice.user_id, bob.user_id]
    assert carol.sync(tokens[carol])["device_lists"]["changed"] == [alice.user_id]


@pytest.mark.parametrize("user, name, change, errcode", [
    ("@alice:localhost", "GONE", {}, "M_NOT_FOUND"), ("@bob:localhost", "self_signing-a", {}, "M_NOT_FOUND"), ("@alice:localhost", "master-a", {"usage": ["x"]}, "M_INVALID_SIGNATURE"),
    ("@alice:localhost", "master-a", {"signatures": {}}, "M_INVALID_SIGNATURE"), ("@alice:localhost", "master-a", {"signatures": {"@alice:localhost": {"ed25519:D": 5}}}, "M_BAD_JSON"),
    ("@alice:localhost", "master-a", {"signatures": {"@alice:localhost": {f"ed25519:{n}": "x" for n in range(51)}}}, "M_TOO_LARGE")])
def test_a_signature_on_what_was_not_uploaded_so_is_a_failure_of_that_key(alice, bob, user, name, change, errcode):
    for client in (alice, bob):
        client.ask("POST", "keys", "device_signing", "upload", body=cross_signing_keys(client.user_id))
    key = {**cross_signing_keys(user)["master_key"], "signatures": {alice.user_id: {"ed25519:D": "x"}}, **change}
    failures = alice.ask("POST", "keys", "signatures", "upload", body={user: {name: key}})["failures"]
    assert failures[user][name]["errcode"] == errcode


def test_the_end_of_all_devices_ends_what_was_signed_of_them_and_no_more(hs, alice, bob):
    for client in (alice, bob):
        upload(client)
        client.ask("POST", "keys", "device_signing", "upload", body=cross_signing_keys(client.user_id))
    device, master = device_keys(alice), cross_signing_keys(alice.user_id)["master_key"]
    alice.ask("POST", "keys", "signatures", "upload", body={
        alice.user_id: {device["device_id"]: {**device, "signatures": {alice.user_id: {"ed25519:self_signing-a": "S"}}}}})
    bob.ask("POST", "keys", "signatures", "upload", body={
        alice.user_id: {"master-a": {**master, "signatures": {bob.user_id: {"ed25519:user_signing-a": "U"}}}}})
    alice.ask("POST", "logout", "all")
    assert query_keys(bob, alice)["master_keys"][alice.user_id]["signatures"] == {bob.user_id: {"ed25519:user_signing-a": "U"}}
    with hs.world.store.read() as reader:
        assert [row[0] for row in reader.signatures(alice.user_id, bob.user_id)] == ["master-a"]


def test_of_two_first_master_keys_at_the_same_time_the_second_needs_to_be_confirmed(hs, alice):
    keys, who = hs.api.keys, asbridge.Who(alice.user_id, device_of(alice))
    both = [{"master": cross_signing_keys(alice.user_id, name)["master_key"]} for name in "ab"]
    assert [keys.check_cross_signing(who, one) for one in both] == [False, False]
    keys.upload_cross_signing(who, both[0], False)
    with refused("M_FORBIDDEN", 403, "meanwhile"):
        keys.upload_cross_signing(who, both[1], False)
    assert query_keys(alice, alice)["master_keys"][alice.user_id]["keys"] == both[0]["master"]["keys"]


def test_signatures_that_all_fail_are_no_news(alice):
    since = alice.sync()["next_batch"]
    alice.ask("POST", "keys", "signatures", "upload", body={alice.user_id: {"GONE": {"signatures": {alice.user_id: {"ed25519:D": "x"}}}}})
    assert "device_lists" not in alice.sync(since)


def test_a_new_master_key_drops_what_the_old_one_had_signed(ghost):
    ghost.ask("POST", "keys", "device_signing", "upload", body=cross_signing_keys(ghost.user_id))
    ghost.ask("POST", "keys", "device_signing", "upload", body={"master_key": cross_signing_keys(ghost.user_id, "b")["master_key"]})
    assert query_keys(ghost, ghost)["self_signing_keys"] == {}
    with refused("M_INVALID_SIGNATURE"):
        ghost.ask("POST", "keys", "device_signing", "upload", body={"self_signing_key": cross_signing_keys(ghost.user_id)["self_signing_key"]})


# -- Key backups.

def backup_key(verified=False, index=0, forwarded=0, data="x"):
    return {"is_verified": verified, "first_message_index": index, "forwarded_count": forwarded, "session_data": {"ciphertext": data}}


def test_a_key_backup_is_made_found_changed_and_deleted(alice, bob):
    with refused("M_NOT_FOUND", 404):
        alice.ask("GET", "room_keys", "version")
    first, second = (alice.ask("POST", "room_keys", "version", body={"algorithm": "m.a", "auth_data": {"n": n}})["version"] for n in (1, 2))
    assert alice.ask("GET", "room_keys", "version") == {"version": second, "algorithm": "m.a", "auth_data": {"n": 2}, "count": 0, "etag": "0"}
    assert alice.ask("GET", "room_keys", "version", first)["auth_data"] == {"n": 1}
    alice.ask("PUT", "room_keys", "version", second, body={"algorithm": "m.a", "auth_data": {"n": 3}, "version": second})
    assert alice.ask("GET", "room_keys", "version", second)["auth_data"] == {"n": 3}
    with refused("M_INVALID_PARAM", 400):
        alice.ask("PUT", "room_keys", "version", second, body={"algorithm": "m.b", "auth_data": {}})
    with refused("M_NOT_FOUND", 404):
        bob.ask("GET", "room_keys", "version", second)
    alice.ask("DELETE", "room_keys", "version", second)
    assert alice.ask("GET", "room_keys", "version")["version"] == first
    for wrong in (second, "x", "9" * 30):
        with refused("M_NOT_FOUND", 404):
            alice.ask("DELETE", "room_keys", "version", wrong)


def test_backed_up_keys_are_put_and_read_and_deleted_one_by_one_by_room_or_together(alice):
    version = alice.ask("POST", "room_keys", "version", body={"algorithm": "m.a", "auth_data": {}})["version"]
    put = functools.partial(alice.ask, "PUT", "room_keys", "keys", version=version)
    assert put("!a:b", "s1", body=backup_key()) == {"count": 1, "etag": "1"}
    assert put("!a:b", body={"sessions": {"s2": backup_key(), "s1": backup_key()}}) == {"count": 2, "etag": "2"}
    assert put(body={"rooms": {"!c:d": {"sessions": {"s3": backup_key(data="y")}}}}) == {"count": 3, "etag": "3"}
    get = functools.partial(alice.ask, "GET", "room_keys", "keys", version=version)
    assert get("!c:d", "s3") == backup_key(data="y") and get("!a:b") == {"sessions": {"s1": backup_key(), "s2": backup_key()}}
    assert get() == {"rooms": {"!a:b": get("!a:b"), "!c:d": {"sessions": {"s3": backup_key(data="y")}}}}
    with refused("M_NOT_FOUND", 404):
        get("!c:d", "s1")
    assert get("!e:f") == {"sessions": {}}
    delete = functools.partial(alice.ask, "DELETE", "room_keys", "keys", version=version)
    assert delete("!a:b", "s1") == {"count": 2, "etag": "4"} and delete("!a:b", "s1") == {"count": 2, "etag": "4"}
    assert delete("!a:b") == {"count": 1, "etag": "5"} and delete() == {"count": 0, "etag": "6"}
    assert get() == {"rooms": {}}


@pytest.mark.parametrize("old, new, replaces", [
    ({}, {"data": "n"}, False), ({}, {"verified": True, "index": 5}, True), ({"verified": True}, {"index": 0}, False), ({"index": 5}, {"index": 4, "forwarded": 9}, True),
    ({"index": 4}, {"index": 5}, False), ({"forwarded": 2}, {"forwarded": 1}, True), ({"forwarded": 1}, {"forwarded": 2}, False)])
def test_a_backed_up_key_is_replaced_by_a_better_one_only(alice, old, new, replaces):
    version = alice.ask("POST", "room_keys", "version", body={"algorithm": "m.a", "auth_data": {}})["version"]
    old, new = backup_key(**old), backup_key(**{"data": "new", **new})
    for key in (old, new):
        alice.ask("PUT", "room_keys", "keys", "!a:b", "s", body=key, version=version)
    assert alice.ask("GET", "room_keys", "keys", "!a:b", "s", version=version) == (new if replaces else old)


def test_keys_go_into_the_last_backup_only_and_the_error_names_it(alice):
    first, second = (alice.ask("POST", "room_keys", "version", body={"algorithm": "m.a", "auth_data": {}})["version"] for _ in range(2))
    with refused("M_WRONG_ROOM_KEYS_VERSION", 403) as caught:
        alice.ask("PUT", "room_keys", "keys", "!a:b", "s", body=backup_key(), version=first)
    assert caught.value.extra["current_version"] == second
    with refused("M_NOT_FOUND", 404):
        alice.ask("PUT", "room_keys", "keys", "!a:b", "s", body=backup_key(), version="999")
    with refused("M_MISSING_PARAM", 400):
        alice.ask("PUT", "room_keys", "keys", "!a:b", "s", body=backup_key())
    with refused("M_BAD_JSON", 400):
        alice.ask("PUT", "room_keys", "keys", "!a:b", "s", body={**backup_key(), "is_verified": "yes"}, version=second)


# -- Push rules.

RULES = V3 + "/pushrules/global"


def rule_ids(client, kind):
    return [rule["rule_id"] for rule in client.call("GET", V3 + "/pushrules/")["global"][kind]]


def test_the_default_rules_are_those_of_the_specification(alice):
    rules = alice.call("GET", V3 + "/pushrules/")
    prefix = ".m.rule."
    assert {kind: [rule["rule_id"].removeprefix(prefix) for rule in rules["global"][kind]] for kind in rules["global"]} == {
        "override": ["master", "suppress_notices", "invite_for_me", "member_event", "is_user_mention", "contains_display_name",
                     "is_room_mention", "roomnotif", "tombstone", "reaction", "room.server_acl", "suppress_edits"],
        "content": ["contains_user_name"], "room": [], "sender": [],
        "underride": ["call", "encrypted_room_one_to_one", "room_one_to_one", "message", "encrypted"]}
    everything = [rule for kind in rules["global"].values() for rule in kind]
    assert all(rule["default"] and rule["enabled"] == (rule["rule_id"] != ".m.rule.master") for rule in everything)
    by_id = {rule["rule_id"].removeprefix(prefix): rule for rule in everything}
    assert by_id["master"]["conditions"] == by_id["master"]["actions"] == []
    assert by_id["invite_for_me"]["conditions"] == [
        {"kind": "event_match", "key": "type", "pattern": "m.room.member"},
        {"kind": "event_match", "key": "content.membership", "pattern": "invite"},
        {"kind": "event_match", "key": "state_key", "pattern": alice.user_id}]
    assert by_id["is_user_mention"]["conditions"] == [
        {"kind": "event_property_contains", "key": r"content.m\.mentions.user_ids", "value": alice.user_id}]
    assert by_id["is_user_mention"]["actions"] == ["notify", {"set_tweak": "sound", "value": "default"}, {"set_tweak": "highlight"}]
    assert by_id["is_room_mention"]["conditions"] == [
        {"kind": "event_property_is", "key": r"content.m\.mentions.room", "value": True}, {"kind": "sender_notification_permission", "key": "room"}]
    assert by_id["room_one_to_one"]["conditions"][0] == {"kind": "room_member_count", "is": "2"}
    assert by_id["tombstone"]["conditions"][1] == {"kind": "event_match", "key": "state_key", "pattern": ""}
    assert by_id["contains_user_name"]["pattern"] == "alice" and "conditions" not in by_id["contains_user_name"]
    assert by_id["call"]["actions"] == ["notify", {"set_tweak": "sound", "value": "ring"}]


def test_rules_are_found_with_and_without_a_trailing_slash_and_as_account_data(alice):
    rules = alice.call("GET", V3 + "/pushrules/")
    assert alice.call("GET", V3 + "/pushrules") == rules == alice.account_data("m.push_rules")
    assert alice.call("GET", RULES) == alice.call("GET", RULES + "/") == rules["global"]
    assert {"type": "m.push_rules", "content": rules} in alice.sync()["account_data"]["events"]
    with refused("M_BAD_JSON", 405):
        alice.set_account_data("m.push_rules", {})


def test_a_new_rule_is_the_most_important_of_the_users_and_stands_above_the_servers(alice, bob):
    for id in ("one", "two"):
        alice.call("PUT", f"{RULES}/override/{id}", {"conditions": [], "actions": []})
        alice.call("PUT", f"{RULES}/content/{id}", {"pattern": "x", "actions": ["notify"]})
    assert rule_ids(alice, "override")[:4] == [".m.rule.master", "two", "one", ".m.rule.suppress_notices"]
    assert rule_ids(alice, "content") == ["two", "one", ".m.rule.contains_user_name"]
    assert alice.call("GET", f"{RULES}/content/two") == {"rule_id": "two", "default": False, "enabled": True, "pattern": "x", "actions": ["notify"]}
    assert rule_ids(bob, "content") == [".m.rule.contains_user_name"]


@pytest.mark.parametrize("query, order", [
    ({}, ["c", "b", "a"]), ({"before": "c"}, ["a", "c", "b"]), ({"after": "c"}, ["c", "a", "b"]), ({"before": "b", "after": "c"}, ["c", "a", "b"]),
    ({"after": "b"}, ["c", "b", "a"])])
def test_a_rule_that_is_set_again_stays_or_goes_beside_another(alice, query, order):
    for id in ("a", "b", "c"):
        alice.call("PUT", f"{RULES}/room/!{id}", {"actions": []})
    alice.call("PUT", f"{RULES}/room/!a/enabled", {"enabled": False})
    alice.call("PUT", f"{RULES}/room/!a", {"actions": ["notify"]}, **{key: "!" + id for key, id in query.items()})
    assert rule_ids(alice, "room") == ["!" + id for id in order]
    assert alice.call("GET", f"{RULES}/room/!a") == {"rule_id": "!a", "default": False, "enabled": False, "actions": ["notify"]}


def test_a_rule_is_enabled_and_its_actions_are_changed_also_of_the_servers_rules(alice):
    since = alice.sync()["next_batch"]
    url = f"{RULES}/underride/.m.rule.message"
    assert alice.call("GET", url + "/enabled") == {"enabled": True} and alice.call("GET", url + "/actions") == {"actions": ["notify"]}
    alice.call("PUT", url + "/enabled", {"enabled": False}), alice.call("PUT", url + "/actions", {"actions": []})
    assert alice.call("GET", url + "/enabled") == {"enabled": False} and alice.call("GET", url + "/actions") == {"actions": []}
    assert alice.sync(since)["account_data"]["events"] == [{"type": "m.push_rules", "content": alice.call("GET", V3 + "/pushrules/")}]


def test_all_rules_together_have_a_size_that_is_bounded(alice, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_RULES_BYTES", 10_000)
    with refused("M_TOO_LARGE", 413):
        alice.call("PUT", f"{RULES}/content/x", {"pattern": "x", "actions": [{"set_tweak": "x" * 9000}]})
    assert rule_ids(alice, "content") == [".m.rule.contains_user_name"]


def test_a_rule_is_deleted_but_not_one_of_the_servers(alice):
    alice.call("PUT", f"{RULES}/sender/@bob:localhost", {"actions": []})
    assert alice.call("DELETE", f"{RULES}/sender/@bob:localhost") == {} and rule_ids(alice, "sender") == []
    for kind, id, errcode in (("sender", "@bob:localhost", "M_NOT_FOUND"), ("override", ".m.rule.master", "M_INVALID_PARAM")):
        with refused(errcode):
            alice.call("DELETE", f"{RULES}/{kind}/{id}")
    assert ".m.rule.master" in rule_ids(alice, "override")


@pytest.mark.parametrize("where, body, errcode", [
    ("override/.x", {"actions": []}, "M_INVALID_PARAM"), ("override/.m.rule.master", {"actions": []}, "M_INVALID_PARAM"),
    ("override/a%2Fb", {"actions": []}, "M_INVALID_PARAM"), ("override/a%5Cb", {"actions": []}, "M_INVALID_PARAM"), ("bogus/x", {"actions": []}, "M_INVALID_PARAM"),
    ("override/x", {}, "M_MISSING_PARAM"), ("override/x", {"actions": [5]}, "M_BAD_JSON"), ("override/x", {"actions": [], "conditions": ["x"]}, "M_BAD_JSON"),
    ("content/x", {"actions": []}, "M_MISSING_PARAM"), ("content/x", {"actions": [], "pattern": 5}, "M_BAD_JSON"),
    ("override/x?before=y", {"actions": []}, "M_UNKNOWN"), ("override/x?after=.m.rule.master", {"actions": []}, "M_UNKNOWN"),
    ("override/x/enabled", {"enabled": True}, "M_NOT_FOUND"), ("override/.m.rule.master/enabled", {"enabled": 1}, "M_BAD_JSON"),
    ("override/.m.rule.master/actions", {"actions": "notify"}, "M_BAD_JSON")])
def test_a_rule_that_is_none_is_refused(hs, alice, where, body, errcode):
    status, answer = ask(hs, "PUT", f"{RULES}/{where}", alice.token, body)
    assert answer["errcode"] == errcode and status == (404 if errcode == "M_NOT_FOUND" else 400)
    assert alice.call("GET", RULES) == json.loads(asbridge.default_rules(alice.user_id))["global"]
    with refused("M_NOT_FOUND", 404):
        alice.call("GET", RULES + "/override/x")


# -- Push rules: which one decides.

class FakeRoom(asbridge.RoomFacts):
    """What conditions ask about a room."""

    def __init__(self, displayname="Alice", members=3, power=0, notifications=None):
        super().__init__(None, 1, displayname)
        self.members = lambda upto: min(members, upto)
        self.state = asbridge.RoomState(asbridge.ROOM_VERSIONS["11"])
        levels = {"users": {"@bob:localhost": power}, "notifications": notifications or {}}
        self.state.put("m.room.power_levels", "", asbridge.StateEvent(1, "@bob:localhost", levels))


def decides(content=None, type="m.room.message", change=lambda rules: None, state_key=None, **room):
    """The ID of the rule that decides on an event of bob for alice, whether it notifies, and whether it is highlighted."""
    rules = json.loads(asbridge.default_rules("@alice:localhost"))
    change(rules["global"])
    event = {"type": type, "sender": "@bob:localhost", "room_id": "!r:localhost", "content": content if content is not None else {"body": "hello"},
             **({"state_key": state_key} if state_key is not None else {})}
    notable = asbridge.Notable(FakeRoom(**room), type, asbridge.canonical_json(event))
    rule = asbridge.PushRules(json.dumps(rules)).first(notable)
    return rule and (rule.id.removeprefix(".m.rule."), rule.notify, rule.highlight)


@pytest.mark.parametrize("content, keys, rule", [
    ({"body": "hello"}, {}, ("message", True, False)), ({"body": "hello"}, {"members": 2}, ("room_one_to_one", True, False)),
    ({"body": "x"}, {"type": "m.room.encrypted"}, ("encrypted", True, False)),
    ({"body": "x"}, {"type": "m.room.encrypted", "members": 2}, ("encrypted_room_one_to_one", True, False)),
    ({"body": "alice", "msgtype": "m.notice"}, {}, ("suppress_notices", False, False)),
    ({"membership": "join"}, {"type": "m.room.member", "state_key": "@bob:localhost"}, ("member_event", False, False)),
    ({"membership": "invite"}, {"type": "m.room.member", "state_key": "@alice:localhost"}, ("invite_for_me", True, False)),
    ({"body": "x", "m.mentions": {"user_ids": ["@carol:localhost", "@alice:localhost"]}}, {}, ("is_user_mention", True, True)),
    ({"body": "x", "m.mentions": {"user_ids": "@alice:localhost"}}, {}, ("message", True, False)),
    ({"body": "x", "m.mentions": {"room": True}}, {"power": 50}, ("is_room_mention", True, True)),
    ({"body": "x", "m.mentions": {"room": True}}, {"power": 49}, ("message", True, False)),
    ({"body": "x", "m.mentions": {"room": True}}, {"power": 10, "notifications": {"room": 10}}, ("is_room_mention", True, True)),
    ({"body": "x", "m.mentions": {"room": 1}}, {"power": 50}, ("message", True, False)),
    ({"body": "hey @room!"}, {"power": 50}, ("roomnotif", True, True)), ({"body": "hey @room!"}, {}, ("message", True, False)),
    ({"body": "hey @rooms"}, {"power": 50}, ("message", True, False)),
    ({"body": "thanks, ALICE!"}, {"displayname": "x"}, ("contains_user_name", True, True)), ({"body": "malice"}, {}, ("message", True, False)),
    ({"body": "Hi \"A. (l) Ice\"", "x": 1}, {"displayname": "A. (L) ice"}, ("contains_display_name", True, True)),
    ({"body": 'so, "Al*ce"?'}, {"displayname": '"al*Ce"'}, ("contains_display_name", True, True)),
    ({"body": "nothing"}, {"displayname": ""}, ("message", True, False)),
    ({"body": "alice", "m.mentions": {}}, {}, ("message", True, False)),         # who mentions says whom
    ({"body": "* alice", "m.relates_to": {"rel_type": "m.replace"}, "m.mentions": {}}, {}, ("suppress_edits", False, False)),
    ({"body": "x"}, {"type": "m.reaction"}, ("reaction", False, False)), ({}, {"type": "m.room.server_acl", "state_key": ""}, ("room.server_acl", False, False)),
    ({}, {"type": "m.room.tombstone", "state_key": ""}, ("tombstone", True, True)), ({}, {"type": "m.room.tombstone"}, None),
    ({}, {"type": "m.call.invite"}, ("call", True, False)), ({}, {"type": "m.room.topic", "state_key": ""}, None)])
def test_the_first_default_rule_that_matches_decides(content, keys, rule):
    assert decides(content, **keys) == rule


def test_the_users_rules_come_first_and_by_kind():
    def change(rules):
        rules["override"].insert(1, {"rule_id": "mute", "enabled": True, "conditions": [{"kind": "event_match", "key": "content.body", "pattern": "quiet*"}], "actions": ["dont_notify"]})
        rules["content"].insert(0, {"rule_id": "cake", "enabled": True, "pattern": "cake*lie", "actions": ["notify", {"set_tweak": "highlight", "value": False}]})
        rules["room"].append({"rule_id": "!r:localhost", "enabled": True, "actions": []})
        rules["sender"].append({"rule_id": "@bob:localhost", "enabled": True, "actions": ["notify", {"set_tweak": "highlight"}]})
    assert decides({"body": "quiet, cake is a lie"}, change=change) == ("mute", False, False)
    assert decides({"body": "the cake: a lie."}, change=change) == ("cake", True, False)
    assert decides({"body": "pancake lies"}, change=change) == ("!r:localhost", False, False)
    assert decides(change=lambda rules: (change(rules), rules["room"].clear())) == ("@bob:localhost", True, True)


def test_a_disabled_rule_is_not_asked_and_the_master_rule_silences_all():
    assert decides(change=lambda rules: rules["underride"][3].update(enabled=False)) is None
    assert decides({"body": "alice"}, change=lambda rules: rules["override"][0].update(enabled=True)) == ("master", False, False)


@pytest.mark.parametrize("condition, holds", [
    ({"kind": "event_match", "key": "content.topic", "pattern": "lunc?*"}, True), ({"kind": "event_match", "key": "content.topic", "pattern": "lunc"}, False),
    ({"kind": "event_match", "key": "content.topic", "pattern": "*PLANS"}, True), ({"kind": "event_match", "key": "content.topic", "pattern": "*[p]lans"}, False),
    ({"kind": "event_match", "key": "content.n", "pattern": "*"}, False), ({"kind": "event_match", "key": "content.none", "pattern": "*"}, False),
    ({"kind": "event_match", "key": "content.body", "pattern": "ex*ple"}, True), ({"kind": "event_match", "key": "content.body", "pattern": "xampl"}, False),
    ({"kind": "event_match", "key": "content.body", "pattern": "*event*"}, True), ({"kind": "event_match", "key": "content.body", "pattern": "e*t"}, True),
    ({"kind": "event_match", "key": "content.body", "pattern": "\"say\nso\""}, True), ({"kind": "event_match", "key": "sender", "pattern": "@bob:*"}, True),
    ({"kind": "event_match", "key": "type", "pattern": "org.*"}, True), ({"kind": "event_match", "key": "type", "pattern": 5}, False),
    ({"kind": "event_property_is", "key": "content.n", "value": 1}, True), ({"kind": "event_property_is", "key": "content.n", "value": True}, False),
    ({"kind": "event_property_is", "key": r"content.m\.fed\\.x", "value": None}, True), ({"kind": "event_property_is", "key": "content.list", "value": ["a"]}, False),
    ({"kind": "event_property_is", "key": "content.n"}, False), ({"kind": "event_property_contains", "key": "content.list", "value": "a"}, True),
    ({"kind": "event_property_contains", "key": "content.list", "value": "A"}, False), ({"kind": "event_property_contains", "key": "content.topic", "value": "l"}, False),
    ({"kind": "room_member_count", "is": "3"}, True), ({"kind": "room_member_count", "is": "==3"}, True), ({"kind": "room_member_count", "is": "<3"}, False),
    ({"kind": "room_member_count", "is": "<=3"}, True), ({"kind": "room_member_count", "is": ">2"}, True), ({"kind": "room_member_count", "is": ">=4"}, False),
    ({"kind": "room_member_count", "is": "many"}, False), ({"kind": "room_member_count"}, False), ({"kind": "org.unknown"}, False), ({"kind": ["x"]}, False), ({}, False)])
def test_a_condition_holds_or_does_not_and_an_unknown_one_never_does(condition, holds):
    content = {"topic": "Lunch plans", "body": "An example event. \"Say\nso\"", "n": 1, "m.fed\\": {"x": None}, "list": ["a", {}]}
    rule = {"rule_id": "mine", "enabled": True, "conditions": [condition], "actions": ["notify"]}
    found = decides(content, "org.example", lambda rules: rules["override"].insert(1, rule))
    assert found == (("mine", True, False) if holds else None)


def test_no_pattern_takes_long():
    began = time.monotonic()
    for words in (True, False):
        assert not asbridge.glob_matcher("*".join("a" * 30) + "*b", words)("a " * 30_000)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("pattern", ["*a" * 60 + "*b", "a?" * 127 + "b", "?" * 255, "!?" * 127 + "b", "a" * 127 + "?" + "a" * 126 + "b"])
@pytest.mark.parametrize("body", ["a" * 60_000, "!" * 60_000])
def test_one_pattern_and_one_body_of_the_largest_size_take_no_second(pattern, body):
    began = time.thread_time()
    asbridge.glob_matcher(pattern, True)(body), asbridge.glob_matcher(pattern, False)(body)
    assert time.thread_time() - began < 0.5


def test_what_is_unread_is_counted_in_no_more_events_than_ones_own_rules_leave_time_for(hs, alice, bob, room, monkeypatch):
    bob.join(room)
    said = [alice.say(room, "x") for _ in range(10)]
    with hs.world.store.read() as reader:
        size = len(reader.event(1, said[0]).json)
    monkeypatch.setattr(asbridge, "MAX_LOOKS", 1000 * size)
    assert unread(bob, room)[0][0] == 10
    bob.call("PUT", f"{RULES}/content/x", {"pattern": "?" * 250, "actions": []})
    assert unread(bob, room)[0][0] in (2, 3, 4)


def test_a_pattern_has_a_largest_length_and_what_is_longer_matches_nothing(alice):
    for kind, parts in (("content", {"pattern": "x" * 256}), ("override", {"conditions": [{"kind": "event_match", "key": "type", "pattern": "*" * 256}]})):
        with refused("M_INVALID_PARAM", 400, "255"):
            alice.call("PUT", f"{RULES}/{kind}/long", {"actions": [], **parts})
    alice.call("PUT", f"{RULES}/content/fits", {"actions": [], "pattern": "x" * 255})
    name = "Al?ce " * 50                                     # a display name is no shorter than people make it
    assert decides({"body": name + "!"}, displayname=name) == ("message", True, False)


# -- What is unread, by these rules.

def test_what_others_say_after_ones_join_and_receipt_is_unread(alice, bob, room):
    alice.say(room, "before"), bob.join(room)
    assert unread(bob, room) == ([0, 0], {})
    one, two = alice.say(room, "1"), alice.say(room, "bob!")
    assert unread(bob, room) == ([2, 1], {}) and unread(alice, room) == ([0, 0], {})
    since = bob.sync()["next_batch"]
    receipt(bob, room, one)
    assert unread(bob, room, since) == ([1, 1], {})
    receipt(bob, room, two, "m.read.private")
    assert unread(bob, room, since) == ([0, 0], {})
    alice.say(room, "3")
    assert unread(bob, room, since) == unread(bob, room) == ([1, 0], {})


def test_a_private_receipt_is_told_to_a_client_that_filters_receipts_out_by_its_counts(alice, bob, room):
    bob.join(room)
    event_id = alice.say(room, "x")
    filter = {"room": {"ephemeral": {"types": []}}}
    since = bob.sync(filter=filter)["next_batch"]
    receipt(bob, room, event_id, "m.read.private")
    assert joined(bob.sync(since, filter=filter), room) == {"unread_notifications": {"notification_count": 0, "highlight_count": 0}}


def test_who_sends_something_has_read_what_stands_before_it(alice, bob, room):
    bob.join(room)
    alice.say(room, "1"), renamed(bob, "Bobby"), alice.say(room, "2")
    assert unread(bob, room) == ([2, 0], {})                 # a change of the profile is no answer
    bob.say(room, "3")
    assert unread(bob, room) == ([0, 0], {})


def test_unread_counts_are_the_same_whether_they_grow_or_are_counted_anew(hs, alice, bob, carol, room):
    bob.join(room), carol.join(room)
    gone = alice.say(room, "bob, this goes away")
    assert unread(bob, room) == ([1, 1], {})
    alice.redact(room, gone), alice.say(room, "bob: x"), alice.say(room, "y")
    grown = unread(bob, room)
    hs.api.sync.unread = asbridge.Unread()
    assert grown == unread(bob, room) == ([2, 1], {})
    alice.say(room, "Robert"), renamed(bob, "Robert")      # rules ask for the name as it is now
    assert unread(bob, room) == ([3, 2], {})
    bob.call("PUT", f"{RULES}/room/{urllib.parse.quote(room)}", {"actions": []})
    assert unread(bob, room) == ([2, 2], {})                 # what names him stands above rooms


def test_who_comes_back_has_nothing_unread_of_the_time_before(alice, bob, room):
    bob.join(room), alice.say(room, "1")
    assert unread(bob, room) == ([1, 0], {})
    bob.leave(room), alice.say(room, "2"), bob.join(room), alice.say(room, "3")
    assert unread(bob, room) == ([1, 0], {})


def test_what_an_ignored_user_says_is_not_unread(alice, bob, carol, room):
    bob.join(room), carol.join(room)
    bob.set_account_data("m.ignored_user_list", {"ignored_users": {carol.user_id: {}}})
    alice.say(room, "1"), carol.say(room, "bob")
    assert unread(bob, room) == ([1, 0], {})


def test_a_thread_has_counts_of_its_own_where_the_filter_asks_for_them(alice, bob, room):
    bob.join(room)
    root, other = alice.say(room, "root"), alice.say(room, "other")
    first = reply(alice, room, root, body="bob")
    last = reply(alice, room, root), alice.say(room, "main")
    assert unread(bob, room) == ([5, 1], {})
    assert unread(bob, room, unread_thread_notifications=True) == ([3, 0], {root: [2, 1]})
    receipt(bob, room, last[1], thread_id="main"), receipt(bob, room, first, thread_id=root)
    assert unread(bob, room, unread_thread_notifications=True) == ([0, 0], {root: [1, 0]})
    reply(bob, room, root)                                   # in the thread, and so it has read that
    reply(alice, room, other)
    assert unread(bob, room, unread_thread_notifications=True) == ([0, 0], {other: [1, 0]})
    receipt(bob, room, alice.say(room, "x"))                 # without a thread: all of them
    assert unread(bob, room, unread_thread_notifications=True) == ([0, 0], {})


def test_of_what_is_unread_the_newest_500_events_are_looked_at_and_each_once(alice, bob, carol, room, monkeypatch):
    bob.join(room)
    monkeypatch.setattr(asbridge, "MAX_UNREAD", 5)
    for n in range(8):
        alice.say(room, f"bob {n}")
    asked = []
    first = asbridge.PushRules.first
    monkeypatch.setattr(asbridge.PushRules, "first", lambda self, event: asked.append(event) or first(self, event))
    assert unread(bob, room) == ([5, 5], {}) and len(asked) == 5
    carol.join(room)                                         # comings and goings take nobody's place
    alice.say(room, "x")
    assert unread(bob, room) == ([5, 4], {}) and len(asked) == 6


# -- The rules a second time: models of rooms, devices and counts, written from the specification alone, to be skipped at first reading.
# The largest is of rooms (room versions 10 to 12: Authorisation rules, Redactions; Client-Server API: Room membership, Room history visibility;
# Application Service API: Pushing events). A homeserver is led through a random walk beside it. It must accept what the model allows, refuse
# what it forbids, and show and push what the model says, no more and no less. The others follow in the order of the section.

SERVER = "localhost"
BEGINNING_LEVELS = {"users_default": 0, "events_default": 0, "state_default": 50, "ban": 50, "kick": 50, "redact": 50, "invite": 0, "historical": 100,
                    "events": {"m.room.name": 50, "m.room.avatar": 50, "m.room.canonical_alias": 50, "m.room.power_levels": 100, "m.room.history_visibility": 100,
                               "m.room.encryption": 100, "m.room.server_acl": 100, "m.room.tombstone": 100}}
BEGINNINGS = {"private_chat": ("invite", "can_join"), "trusted_private_chat": ("invite", "can_join"), "public_chat": ("public", "forbidden")}
KEPT = {"m.room.member": {"membership", "join_authorised_via_users_server"}, "m.room.join_rules": {"join_rule", "allow"}, "m.room.create": {"creator"},
        "m.room.history_visibility": {"history_visibility"},
        "m.room.power_levels": {"ban", "events", "events_default", "kick", "redact", "state_default", "users", "users_default"}}
KEPT_SINCE_11 = {**KEPT, "m.room.power_levels": KEPT["m.room.power_levels"] | {"invite"}, "m.room.redaction": {"redacts"}}
FACE = {f"m.room.{what}" for what in ("create", "name", "avatar", "topic", "join_rules", "canonical_alias", "encryption", "member")}     # what who is invited is shown


class Refused(Exception):
    """The model forbids it, with this errcode."""


def allow(condition, errcode="M_FORBIDDEN"):
    if not condition:
        raise Refused(errcode)


class Fact:
    """One event of a room."""

    def __init__(self, type, sender, content, state_key=None):
        self.type, self.sender, self.content, self.state_key = type, sender, content, state_key
        self.sent = content                                  # as it was before a redaction
        self.event_id = ""                                   # when the homeserver has told it
        self.vouchers = set()                                # one of these lets the sender in (Restricted rooms)


class ModelRoom:
    """One room: its history, and the state that follows from it."""

    def __init__(self, version):
        self.version, self.room_id, self.aliases = int(version), "", {}      # alias → who made it
        self.history, self.state = [], {}
        self.moment = "shared", {}                           # visibility, user → membership
        self.told = 0                                        # so many events of the history the homeserver has told
        self.changed, self.joined, self.left = {}, {}, {}    # user → where in the history the last own member event is, the last join, the last end of one

    # what the state says

    def content(self, type, state_key=""):
        return self.state[type, state_key].content if (type, state_key) in self.state else {}

    def membership(self, user):
        return self.content("m.room.member", user).get("membership", "leave")

    def knows(self, user):
        """Whether the user may know that there is such a room, other than by joining or knocking."""
        return ("m.room.member", user) in self.state

    def members(self, membership="join"):
        return {user for type, user in self.state if type == "m.room.member" and self.membership(user) == membership}

    @property
    def visibility(self):
        value = self.content("m.room.history_visibility").get("history_visibility")
        return value if value in ("world_readable", "shared", "invited", "joined") else "shared"

    @property
    def creators(self):
        create = self.state["m.room.create", ""]
        return {create.sender, *(create.content.get("additional_creators", ()) if self.version >= 12 else ())}

    def level(self, user):
        levels = self.content("m.room.power_levels")
        if self.version >= 12 and user in self.creators:
            return float("inf")
        if ("m.room.power_levels", "") not in self.state:
            return 100 if user in self.creators else 0
        return levels.get("users", {}).get(user, levels.get("users_default", 0))

    def may(self, user, action):
        return self.level(user) >= self.content("m.room.power_levels").get(action, 0 if action == "invite" else 50)

    def needed(self, type, is_state):
        levels = self.content("m.room.power_levels")
        default = levels.get("state_default", 50) if is_state else levels.get("events_default", 0)
        return levels.get("events", {}).get(type, default) if ("m.room.power_levels", "") in self.state else 0

    # Authorisation rules, numbered as in room version 12

    def check(self, fact):
        if fact.type == "m.room.create":                                                                                    # 1
            return
        if fact.type == "m.room.member":                                                                                    # 5
            return self.check_member(fact)
        allow(self.membership(fact.sender) == "join")                                                                       # 6
        allow(self.level(fact.sender) >= self.needed(fact.type, fact.state_key is not None))                                # 8
        allow(fact.state_key in (None, fact.sender) or not fact.state_key.startswith("@"))                                  # 9
        if fact.type == "m.room.power_levels":                                                                              # 10
            self.check_levels(fact)

    def check_member(self, fact):
        sender, target, wish = fact.sender, fact.state_key, fact.content["membership"]
        mine, theirs, itself = self.membership(sender), self.membership(target), sender == target
        rule, above = self.content("m.room.join_rules").get("join_rule", "invite"), self.level(sender) > self.level(target)
        if len(self.history) == 1:                                                                                          # 5.3.1
            return allow(itself and sender == self.history[0].sender)
        allow(wish in ("join", "invite", "leave", "ban", "knock"), "M_BAD_JSON")
        allow(not (wish == "join" and itself and theirs == "ban"), "M_BAD_STATE")
        allow({
            "join":   itself and (rule == "public"
                                  or (theirs in ("join", "invite") and rule in ("invite", "knock", "restricted", "knock_restricted"))
                                  or (bool(fact.vouchers) and rule in ("restricted", "knock_restricted"))),                 # 5.3
            "invite": mine == "join" and theirs not in ("join", "ban") and self.may(sender, "invite"),                      # 5.4
            "leave":  theirs in ("join", "invite", "knock") if itself else
                      mine == "join" and above and self.may(sender, "kick") and (theirs != "ban" or self.may(sender, "ban")),   # 5.5
            "ban":    mine == "join" and above and self.may(sender, "ban"),                                                 # 5.6
            "knock":  itself and theirs not in ("ban", "invite", "join") and rule in ("knock", "knock_restricted"),         # 5.7
        }[wish])

    def check_levels(self, fact):
        old, new, mine = self.content("m.room.power_levels"), fact.content, self.level(fact.sender)
        allow(self.version < 12 or not self.creators & new.get("users", {}).keys())                                         # 10.4
        if ("m.room.power_levels", "") not in self.state:                                                                   # 10.5
            return
        changes = [(old.get(key), new.get(key), mine) for key in ("users_default", "events_default", "state_default", "ban", "redact", "kick", "invite")]
        for group in ("events", "notifications", "users"):
            before, after = old.get(group, {}), new.get(group, {})
            changes += [(before.get(key), after.get(key), mine - 1 if group == "users" and key != fact.sender else mine) for key in before | after]
        for before, after, most in changes:                                                                                 # 10.6 to 10.10
            allow(before == after or ((before is None or before <= most) and (after is None or after <= mine)))

    # what happens

    def append(self, fact):
        self.check(fact)
        fact.before = fact.after = self.moment
        if fact.state_key is not None:
            self.state[fact.type, fact.state_key] = fact
            if fact.type in ("m.room.member", "m.room.history_visibility"):
                self.moment = fact.after = self.visibility, {user: self.membership(user) for type, user in self.state if type == "m.room.member"}
        if fact.type == "m.room.member":
            user, at = fact.state_key, len(self.history)
            self.changed[user] = at
            if self.membership(user) == "join":
                self.joined[user] = at
            elif fact.before[1].get(user) == "join":
                self.left[user] = at
        self.history.append(fact)
        return fact

    def redact(self, fact):
        """Redactions. What is left of it is also what is left of the state, if it is the state."""
        if fact.type != "m.room.create" or self.version < 11:
            kept = (KEPT if self.version < 11 else KEPT_SINCE_11).get(fact.type, set())
            fact.content = {key: value for key, value in fact.content.items() if key in kept}

    # who may see it

    def may_see(self, user, at):
        """Room history visibility, Server behaviour. An own member event and one of the visibility are seen if one side of them is."""
        later = at < self.joined.get(user, -1)
        return any(visibility == "world_readable" or members.get(user) == "join" or (visibility == "shared" and later)
                   or (visibility == "invited" and members.get(user) == "invite") for visibility, members in (self.history[at].before, self.history[at].after))

    def seen_by(self, user, upto=None):
        """The events that a user may see of the first `upto`."""
        return [fact for at, fact in enumerate(self.history[:upto]) if self.may_see(user, at)]

    def state_after(self, upto):
        return {(fact.type, fact.state_key): fact for fact in self.history[:upto] if fact.state_key is not None}


class Service:
    """An application service: what its registration claims, by the start of the ID."""

    def __init__(self, id, users=(), aliases=(), rooms=(), exclusive=True):
        self.id, self.users, self.aliases, self.rooms, self.exclusive = id, tuple(users), tuple(aliases), tuple(rooms), exclusive
        self.bot = f"@_{id}_bot:{SERVER}"

    def registration(self, url):
        return registration(self.id, url, self.users, self.aliases, self.rooms, self.exclusive)

    def claims(self, id):
        kinds = {"@": self.users, "#": self.aliases, "!": self.rooms}
        return id == self.bot or any(re.match(regex, id) for regex in kinds[id[0]])


class Model:
    """Users, rooms and application services. Its verbs are those of asbridge.Client, with who does it before: each does what the homeserver has
    to do, or is Refused.
    """

    def __init__(self, services):
        self.services, self.rooms, self.names, self.forgotten = services, {}, {}, set()

    def service_of(self, user):
        """The application service through which a user speaks."""
        return next((service for service in self.services if service.claims(user)), None)

    def room_of(self, alias):
        return next((room for room in self.rooms.values() if alias in room.aliases), None)

    def hearers(self, room, fact):
        """Pushing events: who is interested in the sender, in the target, in a member or an alias of the room, or in the room."""
        ids = {fact.sender, *room.members(), *room.aliases} | ({fact.state_key} if fact.type == "m.room.member" else set())
        return {service.id for service in self.services if any(map(service.claims, ids))}

    def _append(self, room, fact):
        hearers = self.hearers(room, fact)
        room.append(fact)
        fact.hearers = hearers
        if fact.type == "m.room.member":
            self.forgotten.discard((fact.state_key, room.room_id))
        return fact

    def _member(self, room, sender, user, membership, reason=None):
        content = {"membership": membership, **({"reason": reason} if reason else {})}
        if membership in ("join", "invite", "knock") and user in self.names:
            content["displayname"] = self.names[user]
        fact = Fact("m.room.member", sender, content, user)
        fact.vouchers = self.vouchers(room, user) if membership == "join" else set()
        return self._append(room, fact)

    def vouchers(self, room, user):
        """Restricted rooms: who may let the user in that is in one of the rooms which the join rule names."""
        rules = room.content("m.room.join_rules")
        others = [self.rooms.get(rule["room_id"]) for rule in rules.get("allow", ())]
        needs = rules.get("join_rule") in ("restricted", "knock_restricted") and room.membership(user) not in ("join", "invite")
        entitled = needs and any(other and other.membership(user) == "join" for other in others)
        return {member for member in room.members() if room.may(member, "invite")} if entitled else set()

    def _known(self, room_id):
        allow(room_id in self.rooms)
        return self.rooms[room_id]

    def _resolve(self, room_or_alias):
        if room_or_alias.startswith("#"):
            room = self.room_of(room_or_alias)
            allow(room, "M_NOT_FOUND")
            return room
        return self._known(room_or_alias)

    # creation

    def create_room(self, user, room_version, preset, invite=(), room_alias_name=None, initial_state=(), power_level_content_override=None, name=None, creation_content=None):
        room, alias = ModelRoom(room_version), f"#{room_alias_name}:{SERVER}" if room_alias_name else None
        if alias:
            self._may_own(user, alias)
        create, trusted = {"room_version": room_version, **(creation_content or {})}, invite if preset == "trusted_private_chat" else ()
        levels = {**copy.deepcopy(BEGINNING_LEVELS), "users": {}, **(power_level_content_override or {})}
        if room.version >= 12:
            creators = {*create.get("additional_creators", ()), *trusted} - {user}
            if trusted or "additional_creators" in create:
                create["additional_creators"] = sorted(creators)
            levels["events"] = {**BEGINNING_LEVELS["events"], "m.room.tombstone": 150} if levels["events"] == BEGINNING_LEVELS["events"] else levels["events"]
        elif "users" not in (power_level_content_override or {}):
            levels["users"] = dict.fromkeys([user, *trusted], 100)
        allow(room.version >= 12 or user in levels["users"], "M_BAD_JSON")
        if room.version < 11:
            create["creator"] = user
        allow(not (alias and self.room_of(alias)), "M_ROOM_IN_USE")
        join_rule, guests = BEGINNINGS[preset]
        first = [Fact("m.room.create", user, create, ""), None, Fact("m.room.power_levels", user, levels, ""), *([Fact("m.room.canonical_alias", user, {"alias": alias}, "")] if alias else ()),
                 Fact("m.room.join_rules", user, {"join_rule": join_rule}, ""), Fact("m.room.history_visibility", user, {"history_visibility": "shared"}, ""),
                 Fact("m.room.guest_access", user, {"guest_access": guests}, ""),
                 *(Fact(event["type"], user, event["content"], event["state_key"]) for event in initial_state), *([Fact("m.room.name", user, {"name": name}, "")] if name else ())]
        room.aliases.update({alias: user} if alias else {})
        try:
            for fact in first:
                self._append(room, fact) if fact else self._member(room, user, user, "join")
            for other in invite:
                self._member(room, user, other, "invite")
        except Refused as refused:
            raise Refused("M_INVALID_ROOM_STATE" if refused.args == ("M_FORBIDDEN",) else refused.args[0]) from None
        return room

    # membership

    def join(self, user, room_or_alias):
        room = self._resolve(room_or_alias)
        if room.membership(user) != "join":
            self._member(room, user, user, "join")

    def knock(self, user, room_or_alias, reason):
        self._member(self._resolve(room_or_alias), user, user, "knock", reason)

    def leave(self, user, room_id, reason):
        self._member(self._known(room_id), user, user, "leave", reason)

    def invite(self, user, room_id, other, reason):
        self._member(self._known(room_id), user, other, "invite", reason)

    def ban(self, user, room_id, other, reason):
        self._member(self._known(room_id), user, other, "ban", reason)

    def kick(self, user, room_id, other, reason):
        room = self._known(room_id)
        allow((user == other or room.membership(user) == "join") and room.membership(other) in ("join", "invite", "knock"))
        self._member(room, user, other, "leave", reason)

    def unban(self, user, room_id, other, reason):
        room = self._known(room_id)
        allow(room.membership(user) == "join" or (user == other and room.knows(user)))
        allow(room.membership(other) == "ban", "M_BAD_STATE")
        self._member(room, user, other, "leave", reason)

    def forget(self, user, room_id):
        room = self._known(room_id)
        allow(room.membership(user) in ("leave", "ban"), "M_UNKNOWN")
        if user in room.changed:
            self.forgotten.add((user, room_id))

    def set_displayname(self, user, name):
        """Goes into the rooms that the user is in, as far as their rules let it."""
        self.names[user] = name
        for room in self.rooms.values():
            if room.membership(user) == "join" and room.content("m.room.member", user).get("displayname") != name:
                with contextlib.suppress(Refused):
                    fact = Fact("m.room.member", user, {**room.content("m.room.member", user), "displayname": name}, user)
                    fact.vouchers = room.state["m.room.member", user].vouchers
                    self._append(room, fact)

    def deactivate(self, user):
        for room in self.rooms.values():
            if room.membership(user) in ("join", "invite", "knock"):
                self._member(room, user, user, "leave")
        self.names.pop(user, None)

    # events

    def say(self, user, room_id, text):
        return self._append(self._known(room_id), Fact("m.room.message", user, {"msgtype": "m.text", "body": text}))

    def send(self, user, room_id, type, content):
        return self._append(self._known(room_id), Fact(type, user, content))

    def set_state(self, user, room_id, type, content, state_key=""):
        if type == "m.room.member" and content.get("membership") in ("join", "invite", "knock") and state_key in self.names:
            content = {"displayname": self.names[state_key], **content}
        room, fact = self._known(room_id), Fact(type, user, content, state_key)
        if (type, state_key) == ("m.room.member", user):
            open_to_all = room.content("m.room.join_rules").get("join_rule") in ("public", "knock", "knock_restricted")
            allow(room.knows(user) or open_to_all or content.get("membership") in ("join", "knock"))
        else:
            allow(room.membership(user) == "join")
        if type == "m.room.canonical_alias":
            old = room.content(type)
            for alias in [content.get("alias"), *content.get("alt_aliases", ())]:
                allow(not alias or alias in [old.get("alias"), *old.get("alt_aliases", ())] or alias in room.aliases, "M_BAD_ALIAS")
        if type == "m.room.member" and content.get("membership") == "join":
            fact.vouchers = self.vouchers(room, state_key)
        now = room.state.get((type, state_key))
        if now and now.sender == user and not fact.vouchers and json.dumps(now.content, sort_keys=True) == json.dumps(content, sort_keys=True):
            room.check(fact)
            return now                                       # nothing would change: the event that says so already
        return self._append(room, fact)

    def redact(self, user, room_id, event_id, reason):
        room = self._known(room_id)
        allow(room.membership(user) == "join")
        target = next((fact for fact in room.history if fact.event_id == event_id), None)
        may = target and (target.sender == user or room.may(user, "redact"))
        allow(target and (may or target in room.seen_by(user)), "M_NOT_FOUND")
        allow(may and target.type != "m.room.create")
        fact = self._append(room, Fact("m.room.redaction", user, {"redacts": event_id, "reason": reason}))
        room.redact(target)
        return fact

    # aliases

    def _may_own(self, user, alias):
        service = self.service_of(user)
        allow(not service or service.claims(alias), "M_EXCLUSIVE")
        allow(not any(other.exclusive and other is not service and other.claims(alias) for other in self.services), "M_EXCLUSIVE")

    def set_alias(self, user, alias, room_id):
        room = self._known(room_id)
        allow(self.service_of(user) or room.membership(user) == "join")
        self._may_own(user, alias)
        allow(not self.room_of(alias), "M_UNKNOWN")
        room.aliases[alias] = user

    def delete_alias(self, user, alias):
        self._may_own(user, alias)
        room = self.room_of(alias)
        allow(room, "M_NOT_FOUND")
        powerful = room.membership(user) == "join" and room.level(user) >= room.needed("m.room.canonical_alias", True)
        allow(powerful or self.service_of(user) or room.aliases[alias] == user)
        del room.aliases[alias]


class Walker(asbridge.Client):
    """A client with the verbs that the model has and asbridge.Client has not."""

    def knock(self, room_or_alias, reason):
        self.ask("POST", "knock", room_or_alias, body={"reason": reason})

    def forget(self, room_id):
        self.ask("POST", "rooms", room_id, "forget", body={})

    def deactivate(self):
        by_password = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": self.user_id}, "password": "secret"}
        self.ask("POST", "account", "deactivate", body={} if self.acts_as else {"auth": by_password})


class Listener:
    """What an application service is sent; a transaction that comes again is the same, and counts once."""

    def __init__(self, recorder):
        self.events, self.bodies = [], {}
        self.url, recorder.answer = recorder.url, self.take

    def take(self, request, body):
        if "/transactions/" in request.path:
            if request.path not in self.bodies:
                self.events += json.loads(body)["events"]
            assert self.bodies.setdefault(request.path, body) == body
        return 200, {}


class Follower:
    """A client of one user that keeps what /sync tells: of each room the timeline and the state."""

    def __init__(self, model, client, rng, limit=10, lazy=False, include_leave=False, ignored=(), after=False):
        """`after`: it asks for the state at the end of each timeline, in place of that at its start."""
        self.model, self.client, self.rng, self.user, self.lazy, self.include_leave, self.ignored = model, client, rng, client.user_id, lazy, include_leave, ignored
        self.filter = {"room": {"timeline": {"limit": limit}, "state": {"lazy_load_members": lazy}, "include_leave": include_leave}}
        self.since, self.at = None, {}                       # room → how long its history was at the last look
        self.timelines, self.states, self.inside, self.counts = {}, {}, set(), {}
        self.after, self.full = "org.matrix.msc4222.state_after" if after else "", False
        if ignored:
            client.set_account_data("m.ignored_user_list", {"ignored_users": {user: {} for user in ignored}})

    def hears(self, fact):
        """Ignoring users: their messages are left out, their state is not."""
        return fact.state_key is not None or fact.sender not in self.ignored

    def expected(self, room, upto=None):
        return [fact.event_id for fact in room.seen_by(self.user, upto) if self.hears(fact)]

    def look(self):
        self.full = self.rng.random() < 0.1
        more = {"org.matrix.msc4222.use_state_after": "true"} if self.after else {}
        answer = self.client.ask("GET", "sync", since=self.since, filter=json.dumps(self.filter), full_state="true" if self.full else None, **more)
        found = {room_id: (section, entry) for section, rooms in answer.get("rooms", {}).items() for room_id, entry in rooms.items()}
        assert sum(map(len, answer.get("rooms", {}).values())) == len(found)
        for room in self.model.rooms.values():
            self.check_section(room, found.get(room.room_id, ("", {}))[0])
        for room_id, (section, entry) in found.items():
            getattr(self, f"take_{section}")(self.model.rooms[room_id], entry)
        self.since, self.at = answer["next_batch"], {room.room_id: len(room.history) for room in self.model.rooms.values()}

    def check_section(self, room, section):
        """Where the room stands in the answer; '' is nowhere."""
        since, membership = self.at.get(room.room_id, 0), room.membership(self.user)
        changed = room.changed.get(self.user, -1) >= since
        if membership == "join":
            news = changed or any(self.hears(fact) for fact in room.history[since:])
            assert section == "join" or (section == "" and not news), (section, membership)
        elif membership in ("invite", "knock"):
            shown = changed and room.state["m.room.member", self.user].sender not in self.ignored
            assert section == (membership if shown else ""), (section, membership)
        else:
            shown = changed and (self.since is not None or (self.include_leave and (self.user, room.room_id) not in self.model.forgotten))
            assert section == ("leave" if shown else ""), (section, membership)

    def take_join(self, room, entry):
        self.take(room, entry, len(room.history))
        self.inside.add(room.room_id)
        if "summary" in entry:
            self.counts[room.room_id] = [entry["summary"][f"m.{membership}_member_count"] for membership in ("joined", "invited")]
        assert self.counts[room.room_id] == [len(room.members("join")), len(room.members("invite"))]

    def take_leave(self, room, entry):
        """Up to the point where the user has left, and that last event even to whom may see no other."""
        last, gone = room.changed[self.user], (self.user, room.room_id) in self.model.forgotten
        events, own = [event["event_id"] for event in entry["timeline"]["events"]], room.history[last].event_id
        assert events[-1] == own and not set(events) - {own, *([] if gone else self.expected(room, last + 1))}
        if not gone and room.left.get(self.user) == last and (room.room_id in self.inside or self.since is None):
            self.take(room, entry, last + 1)
        self.inside.discard(room.room_id)

    def take_invite(self, room, entry, key="invite_state"):
        self.inside.discard(room.room_id)
        events = entry[key]["events"]
        shown = {(event["type"], event["state_key"]): (event["sender"], event["content"]) for event in events}
        assert all(event.keys() == {"type", "state_key", "sender", "content"} and event["type"] in FACE for event in events) and len(shown) == len(events)
        assert {("m.room.create", ""), ("m.room.join_rules", ""), ("m.room.member", self.user)} <= shown.keys()
        assert shown == {key: (room.state[key].sender, room.state[key].content) for key in shown}

    def take_knock(self, room, entry):
        self.take_invite(room, entry, "knock_state")

    def take(self, room, entry, upto):
        """Puts the timeline and the state to what is there. Who comes in reads back to the beginning."""
        fresh = room.room_id not in self.inside
        timeline, old, state = entry.get("timeline", {"events": [], "limited": False}), self.timelines.get(room.room_id, []), {} if fresh or self.full else self.states[room.room_id]
        known = [] if fresh else old
        gap = self.gap(room, timeline["prev_batch"], set(known)) if fresh or timeline["limited"] else []
        whole = [*known, *gap, *(event["event_id"] for event in timeline["events"])]
        assert whole == self.expected(room, upto) and set(old) <= set(whole)
        self.check_then(room, timeline["events"])
        changes = entry.get(self.after, timeline)["events"] if self.after else [*entry.get("state", timeline)["events"], *timeline["events"]]
        state.update({(event["type"], event["state_key"]): event["event_id"] for event in changes if "state_key" in event})
        self.timelines[room.room_id], self.states[room.room_id] = whole, state
        self.check_state(room, state, {event["sender"] for event in timeline["events"]}, upto)

    def gap(self, room, token, known):
        """What /messages has before this token, down to what is known."""
        found = []
        while True:
            page = self.client.messages(room.room_id, "b", self.rng.choice([1, 2, 5, 50]), **{"from": token})
            ids = [event["event_id"] for event in page["chunk"]]
            found += itertools.takewhile(lambda id: id not in known, ids)
            if known & set(ids) or "end" not in page:
                return found[::-1]
            token = page["end"]

    def check_then(self, room, events):
        """unsigned.membership: what the user was at the event, and with it."""
        facts = {fact.event_id: fact for fact in room.history}
        assert all(event["unsigned"]["membership"] == facts[event["event_id"]].after[1].get(self.user, "leave") for event in events)

    def check_state(self, room, state, speakers, upto):
        """All of it; with lazy loading of the members at least those who speak."""
        right = {key: fact.event_id for key, fact in room.state_after(upto).items()}
        if self.lazy:
            assert speakers <= {key for type, key in state if type == "m.room.member"}
            right = {(type, key): id for (type, key), id in right.items() if type != "m.room.member" or (type, key) in state}
        assert state == right

    def check_all(self):
        """After a look: everything that was put together, and the same asked for."""
        for room_id in self.inside:
            assert self.timelines[room_id] == self.expected(self.model.rooms[room_id])
        assert set(self.client.joined_rooms()) == self.inside == {id for id, room in self.model.rooms.items() if room.membership(self.user) == "join"}
        for room in self.model.rooms.values():
            self.check_room(room)

    def check_room(self, room):
        gone = (self.user, room.room_id) in self.model.forgotten
        user, membership = None if gone else self.user, room.membership(self.user)
        visible = [(fact.event_id, fact.content) for fact in room.seen_by(user) if self.hears(fact)]
        now = membership == "join" or room.visibility == "world_readable"
        upto = len(room.history) if now else room.left.get(user, -1) + 1
        with contextlib.nullcontext() if visible or now or upto else refused("M_FORBIDDEN", 403):
            assert [(event["event_id"], event["content"]) for event in all_messages(self.client, room.room_id)] == visible
        one = self.rng.choice(room.history)
        with contextlib.nullcontext() if one in room.seen_by(user) else refused("M_NOT_FOUND", 404):
            assert self.client.event(room.room_id, one.event_id)["content"] == one.content
        with contextlib.nullcontext() if upto else refused("M_FORBIDDEN", 403):
            state = room.state_after(upto)
            assert {(event["type"], event["state_key"]): (event["event_id"], event["content"]) for event in self.client.all_state(room.room_id)} == {
                key: (fact.event_id, fact.content) for key, fact in state.items()}
            assert {event["event_id"] for event in self.client.members(room.room_id)} == {fact.event_id for (type, _), fact in state.items() if type == "m.room.member"}
        service = self.model.service_of(self.user)
        with contextlib.nullcontext() if self.user in room.members() or (service and any(map(service.claims, room.members()))) else refused("M_FORBIDDEN", 403):
            assert self.client.joined_members(room.room_id).keys() == room.members()


SERVICES = (Service("irc", ["@_irc_.*"], ["#_irc_.*"]), Service("pub", ["@dave:.*", "@_pub_.*"], ["#pub_.*"], ["![A-Ma-m].*"], exclusive=False),
            Service("log", rooms=["!.*"], exclusive=False))
PEOPLE = ("alice", "bob", "carol", "erin")
VERBS = {"say": 20, "join": 16, "invite": 8, "set_state": 20, "leave": 3, "kick": 5, "ban": 5, "unban": 4, "knock": 3, "redact": 6, "send": 2, "forget": 1, "set_alias": 3,
         "delete_alias": 2, "create_room": 1.5, "set_displayname": 1, "deactivate": 0.3}


class Walk:
    """Some people and application services in some rooms. `server` has a url, and restart()."""

    def __init__(self, seed, server, listeners, leavers=()):
        """`leavers`: people who may deactivate their account, as two of the ghosts may."""
        self.rng, self.server, self.listeners, self.model = random.Random(seed), server, listeners, Model(SERVICES)
        self.numbers, self.heard, self.leavers = itertools.count(1), 0, {f"@{name}:{SERVER}" for name in (*leavers, "_irc_b", "_irc_c")}
        tokens = {f"@{name}:{SERVER}": (self.register(name, {"password": "secret"} if name in leavers else {}), None) for name in (*PEOPLE, "dave", *leavers)}
        for name in ("irc_a", "irc_b", "irc_c", "pub_a"):
            asbridge.Client(server.url, f"as-{name[:3]}").call("POST", f"{V3}/register", {"type": "m.login.application_service", "username": f"_{name}", "inhibit_login": True})
        for service, localpart in (("pub", "dave"), ("irc", "_irc_a"), ("irc", "_irc_b"), ("irc", "_irc_c"), ("irc", "_irc_bot"), ("pub", "_pub_a")):
            tokens[f"@{localpart}:{SERVER}"] = f"as-{service}", f"@{localpart}:{SERVER}"
        self.clients = {user: Walker(server.url, token, acts_as) for user, (token, acts_as) in tokens.items()}
        self.users = [*self.clients]
        self.model.names = {user: user[1:].partition(":")[0] for user in self.users}
        self.everybody = [*self.users, f"@_irc_unknown:{SERVER}", f"@nobody:{SERVER}"]
        self.followers = [self.follower(f"@{name}:{SERVER}", **how) for name, how in (
            ("alice", {"limit": 3}), ("alice", {"limit": 100}), ("bob", {"limit": 1, "lazy": True}), ("carol", {"limit": 7, "ignored": [f"@bob:{SERVER}"]}),
            ("dave", {"limit": 5, "after": True}), ("erin", {"limit": 2, "include_leave": True}), ("_irc_a", {"limit": 4}))]

    def register(self, name, more):
        return asbridge.Client(self.server.url).call("POST", f"{V3}/register", {"username": name, "auth": {"type": "m.login.dummy"}, **more})["access_token"]

    def follower(self, user, **how):
        return Follower(self.model, self.clients[user], self.rng, **how)

    def go(self, steps, restarts=()):
        for step in range(steps):
            if step in restarts:
                self.restart()
            self.step()
            if self.rng.random() < 0.15:
                self.hear()
                self.rng.choice(self.followers).look()
            if self.rng.random() < 0.01:                     # another device, which knows nothing yet
                old = self.followers.pop(self.rng.randrange(len(self.followers)))
                self.followers.append(self.follower(old.user, limit=self.rng.choice([1, 2, 5, 100]), lazy=self.rng.random() < 0.5, include_leave=self.rng.random() < 0.5, ignored=old.ignored,
                                                    after=self.rng.random() < 0.3))
        self.restart()
        self.hear()
        for follower in self.followers:
            follower.look()
            follower.check_all()

    def restart(self):
        self.server.restart()
        for client in self.clients.values():
            client.close()
            client.url = self.server.url

    def step(self):
        """One verb of one user, in the model and over HTTP."""
        verb = self.rng.choices([*VERBS], [*VERBS.values()])[0] if len(self.model.rooms) > 2 else "create_room"
        verb = "say" if verb == "deactivate" and not self.leavers.intersection(self.users) else verb
        room = self.any_room()
        user = self.any_user(verb, room)
        args, keys = self.any(verb, user, room)
        self.number = str(next(self.numbers))
        try:
            allowed, expected = getattr(self.model, verb)(user, *args, **keys), "allowed"
        except Refused as refused:
            allowed, expected = None, refused.args[0]
        answer, got = self.ask(user, verb, args, keys)
        assert got == expected, f"the homeserver: {got} ({answer}), the model: {expected}, for {user} {verb} {args} {keys}"
        if verb == "create_room" and allowed:
            allowed.room_id, self.model.rooms[answer] = answer, allowed
        elif verb == "deactivate":
            self.users.remove(user)
        elif isinstance(allowed, Fact):                      # an event ID is answered
            assert allowed.event_id in ("", answer)
            allowed.event_id = answer

    def ask(self, user, verb, args, keys):
        client = self.clients[user]
        client.new_txn_id = lambda: self.number
        try:
            return getattr(client, verb)(*args, **keys), "allowed"
        except MatrixError as error:
            return error, error.errcode

    def hear(self):
        """What the application services are sent: first the one that hears every room, in the order in which things were written."""
        log = self.listeners["log"].events
        waiting = sum(len(room.history) - room.told for room in self.model.rooms.values())
        eventually(lambda: len(log) >= self.heard + waiting)
        for event in log[self.heard:]:
            room = self.model.rooms[event["room_id"]]
            self.check_told(room.history[room.told], event)
            room.told += 1
        self.heard += waiting
        assert len(log) == self.heard
        facts = {fact.event_id: (room, fact) for room in self.model.rooms.values() for fact in room.history}
        order = [facts[event["event_id"]] for event in log]
        for service in self.model.services:
            wanted = [fact.event_id for room, fact in order if service.id in fact.hearers or service.claims(room.room_id)]
            found = self.listeners[service.id].events
            eventually(lambda: len(found) >= len(wanted))
            assert [event["event_id"] for event in found] == wanted

    def check_told(self, fact, event):
        told = dict(event["content"])
        voucher = told.pop("join_authorised_via_users_server", None)
        assert (event["type"], event["sender"], event.get("state_key")) == (fact.type, fact.sender, fact.state_key)
        if voucher and "join_authorised_via_users_server" not in fact.content:
            assert voucher in fact.vouchers
            told = event["content"]
            fact.content = {**fact.content, "join_authorised_via_users_server": voucher}
        assert event["content"] in (fact.content, fact.sent) and fact.event_id in ("", event["event_id"])
        fact.event_id = event["event_id"]

    # what somebody might do

    def any_room(self):
        """Mostly one of the last."""
        rooms = [*self.model.rooms.values()]
        return self.rng.choice(rooms[-self.rng.choice([3, 3, 3, 3, 6, 50]):]) if rooms else None

    def any_user(self, verb, room):
        """Mostly one to whom it is open: from outside for what one does there, else somebody in the room, often with some power."""
        if verb == "deactivate":
            return self.rng.choice(sorted(self.leavers.intersection(self.users)))
        inside = [user for user in self.users if room and room.membership(user) == "join"]
        if verb in ("join", "knock", "forget"):
            outside = [user for user in self.users if user not in inside]
            inside = [user for user in outside if room.membership(user) == "invite"] or outside
        powers = [user for user in inside if room.level(user) > 0] if verb in ("kick", "ban", "unban", "set_state", "invite", "redact") else inside
        return self.rng.choice(self.rng.choices([powers or inside or self.users, inside or self.users, self.users], [4, 4, 2])[0])

    def any_alias(self):
        return self.rng.choice([f"#{name}{n}:{SERVER}" for name in ("town", "_irc_", "pub_") for n in "12"])

    def any(self, verb, user, room):
        """Arguments for a verb."""
        rng, reason, other = self.rng, str(next(self.numbers)), self.rng.choice(self.everybody)
        if verb == "create_room":
            return self.any_creation(user)
        if verb in ("kick", "ban", "unban", "invite"):
            here = sorted(room.members({"kick": "join", "unban": "ban", "ban": "join", "invite": "knock"}[verb]))
            return (room.room_id, rng.choice(here) if here and rng.random() < 0.7 else other, reason), {}
        if verb in ("join", "knock"):
            where = rng.choices([room.room_id, self.any_alias(), f"!none:{SERVER}"], [90, 10, 1])[0]
            return (where, *([reason] if verb == "knock" else [])), {}
        return {"say": lambda: (room.room_id, reason), "send": lambda: (room.room_id, rng.choice(["m.sticker", "x.high", "m.room.topic"]), {"body": reason}),
                "leave": lambda: (room.room_id, reason), "forget": lambda: (room.room_id,), "set_displayname": lambda: (reason,), "deactivate": lambda: (),
                "set_alias": lambda: (self.any_alias(), room.room_id), "delete_alias": lambda: (self.any_alias(),),
                "redact": lambda: (room.room_id, self.any_event(room), reason), "set_state": lambda: (room.room_id, *self.any_state(room, user, other))}[verb](), {}

    def any_event(self, room):
        known = [fact.event_id for fact in room.history if fact.event_id]
        states = [fact.event_id for fact in room.state.values() if fact.event_id]
        return self.rng.choice(states if self.rng.random() < 0.4 and states else known or ["$none"])

    def any_creation(self, user):
        rng = self.rng
        options = {"room_version": rng.choice(["10", "11", "12"]), "preset": rng.choice([*BEGINNINGS])}
        if rng.random() < 0.8:
            options["invite"] = rng.sample([other for other in self.everybody if other != user], rng.choice([1, 3, 5]))
        if rng.random() < 0.3:
            options["room_alias_name"] = self.any_alias()[1:].partition(":")[0]
        if rng.random() < 0.3:
            options["initial_state"] = [{"type": type, "state_key": "", "content": self.any_content(type, user)} for type in ("m.room.join_rules", "m.room.history_visibility")]
        if rng.random() < 0.3:
            options["power_level_content_override"] = {rng.choice(["invite", "state_default", "events_default", "kick"]): rng.choice([0, 50, 100]),
                                                       **({"users": {user: 100, rng.choice(self.users): 50}} if rng.random() < 0.4 else {})}
        if rng.random() < 0.3:
            options["name"] = "a name"
        if rng.random() < 0.2 and options["room_version"] == "12":
            options["creation_content"] = {"additional_creators": [rng.choice(self.users)]}
        return (), options

    def any_state(self, room, user, other):
        """Type, content and state key."""
        rng = self.rng
        type = rng.choice(["m.room.power_levels", "m.room.power_levels", "m.room.join_rules", "m.room.join_rules", "m.room.history_visibility", "m.room.history_visibility",
                           "m.room.member", "m.room.topic", "m.room.name", "m.room.canonical_alias", "m.room.guest_access", "m.room.tombstone", "x.flag", "x.own"])
        if type == "m.room.member":
            target = rng.choice([user, other])
            return type, {"membership": rng.choice(["join", "leave", "ban", "invite", "knock", "sleep"])}, target
        if type == "x.own":
            return type, self.any_content(type, user), rng.choice([user, other, "key"])
        if type == "m.room.power_levels":
            return type, self.any_levels(room), ""
        if type == "m.room.canonical_alias" and room.aliases and rng.random() < 0.8:
            return type, {"alias": rng.choice([*room.aliases])}, ""
        return type, self.any_content(type, user), ""

    def any_content(self, type, user):
        rng = self.rng
        return {"m.room.join_rules": lambda: {"join_rule": rng.choice(["public", "public", "public", "invite", "knock", "restricted", "knock_restricted", "knock_restricted", "private"]),
                                              "allow": [{"type": "m.room_membership", "room_id": room_id} for room_id in rng.sample([*self.model.rooms], min(2, len(self.model.rooms)))]},
                "m.room.history_visibility": lambda: {"history_visibility": rng.choice(["shared", "shared", "invited", "joined", "joined", "world_readable", "x.none"])},
                "m.room.canonical_alias": lambda: {"alias": self.any_alias(), "alt_aliases": [self.any_alias()] if rng.random() < 0.3 else []},
                "m.room.guest_access": lambda: {"guest_access": rng.choice(["can_join", "forbidden"])},
                "m.room.tombstone": lambda: {"body": "moved", "replacement_room": rng.choice([*self.model.rooms])},
                }.get(type, lambda: {"is": rng.choice([True, 1, False, 0, "text"])})()

    def any_levels(self, room):
        """The levels as they are, but for one or two."""
        rng, levels = self.rng, copy.deepcopy(room.content("m.room.power_levels"))
        for _ in range(rng.choice([1, 1, 2])):
            level, group = rng.choice([-10, 0, 0, 25, 50, 50, 50, 75, 100, 101]), rng.choice(["", "users", "users", "users", "users", "events", "notifications"])
            place = levels.setdefault(group, {}) if group else levels
            key = rng.choice({"": ["users_default", "events_default", "state_default", "ban", "redact", "kick", "invite"], "users": sorted(room.members()) or self.everybody,
                              "events": ["m.room.message", "m.room.topic", "m.room.redaction", "m.room.join_rules", "x.high"], "notifications": ["room"]}[group])
            if rng.random() < 0.25:
                place.pop(key, None)
            else:
                place[key] = level
        return levels


class Embedded:
    """A homeserver in this process, with its database on disk."""

    def __init__(self, database, registrations, **keys):
        self.start = lambda: asbridge.Homeserver(copy.deepcopy(registrations), database=str(database), **keys).start()
        self.hs = self.start()

    @property
    def url(self):
        return self.hs.url

    def restart(self):
        self.hs.stop()
        self.hs = self.start()


@pytest.mark.parametrize("seed", [3])
def test_a_walk_beside_a_model_of_the_rules_meets_no_difference(seed, recorder, tmp_path):
    listeners = {service.id: Listener(recorder()) for service in SERVICES}
    server = Embedded(tmp_path / "walk.db", [service.registration(listeners[service.id].url) for service in SERVICES])
    try:
        Walk(seed, server, listeners).go(250, restarts=[100])
    finally:
        server.hs.stop()


class Post:
    """What was sent to the devices of one user, and what each of them got."""

    def __init__(self, devices):
        self.names = {device: device_of(device) for device in devices}
        self.sent, self.got = {device: [] for device in devices}, {device: [] for device in devices}     # got: but for answers lost on the way
        self.tokens, self.acknowledged = {device: [("", 0)] for device in devices}, dict.fromkeys(devices, 0)      # token and how many had been sent then

    def send(self, sender, user_id, txn_id, contents, times):
        for _ in range(times):                               # it may be sent again, with the same transaction ID
            sender.ask("PUT", "sendToDevice", "m.x", txn_id, body={"messages": {user_id: contents}})
        for device, name in self.names.items():
            if content := contents.get(name, contents.get("*")):
                self.sent[device].append(content["n"])

    def sync(self, device, token, upto, lost):
        answer = device.sync(token or None)
        found = [message["content"]["n"] for message in answer.get("to_device", {}).get("events", [])]
        assert found == self.sent[device][max(upto, self.acknowledged[device]):]
        self.acknowledged[device] = max(self.acknowledged[device], upto)
        if not lost:
            self.got[device] += found
            self.tokens[device].append((answer["next_batch"], len(self.sent[device])))


@pytest.mark.parametrize("seed", range(2))
def test_each_message_comes_to_each_device_until_a_later_token_acknowledges_it_in_order_and_over_restarts(start, tmp_path, seed):
    rnd, keys = random.Random(seed), {"database": str(tmp_path / "a.db")}
    hs = start(**keys)
    alice, bob = hs.client("alice"), hs.client("bob")
    devices = [alice, again(hs, alice)]
    post = Post(devices)
    for n in range(120):
        act, device = rnd.choice(["send"] * 5 + ["sync"] * 5 + ["again", "old", "anew"] + ["restart"] * (n % 40 == 0)), rnd.choice(devices)
        if act == "send":
            name = post.names[device]
            post.send(bob, alice.user_id, f"{n}", rnd.choice([{"*": {"n": n}}, {name: {"n": n}}, {name: {"n": n}, "*": {"n": -n}}]), rnd.choice([1, 1, 2]))
        elif act == "restart":
            hs.stop()
            hs = start(**keys)
            for client in (*devices, bob):
                client.close()
                client.url = hs.url
        else:
            tokens = post.tokens[device]
            post.sync(device, *{"sync": tokens[-1], "again": tokens[-1], "old": rnd.choice(tokens), "anew": ("", 0)}[act], lost=act != "sync")
    for device in devices:
        post.sync(device, *post.tokens[device][-1], lost=False)
    assert post.got == post.sent and all(len(found) > 20 for found in post.got.values())


class Meetings:
    """Who met whom, and whose keys changed, as a list of moments; each an independent copy."""

    def __init__(self, rooms):
        self.rooms, self.keys, self.moments = {room: set() for room in rooms}, {}, []

    def note(self):
        self.moments.append({room: frozenset(members) for room, members in self.rooms.items()})

    @staticmethod
    def together(moment, one, other):
        return any({one, other} <= members for members in moment.values())

    def expected(self, one, since):
        """Who must be in changed, and in left, for what happened from this moment on."""
        window, changed, left = self.moments[since:], set(), set()
        for other, at in self.keys.items():
            met = [other == one or self.together(moment, one, other) for moment in window]
            if met[-1] and (at > since or not all(met)):
                changed.add(other)
            if any(met) and not met[-1]:
                left.add(other)
        return changed, left

    def check(self, one, since, changed, left):
        """What a sync names: at least whom it must, and nobody who is not met any more, or is still."""
        must_change, must_leave = self.expected(one, since)
        assert must_change <= set(changed) and must_leave <= set(left)
        assert all(other == one or self.together(self.moments[-1], one, other) for other in changed)
        assert not any(self.together(self.moments[-1], one, other) for other in left)

    def joins(self, person, room):
        person.join(room)
        self.rooms[room].add(person.user_id)

    def leaves(self, person, room, forgets):
        person.leave(room)
        self.rooms[room].discard(person.user_id)
        if forgets:
            person.call("POST", path("rooms", room, "forget"), {})

    def is_kicked(self, user_id, room, by):
        by.kick(room, user_id)
        self.rooms[room].discard(user_id)


@pytest.mark.parametrize("seed, forgets", [(1, False), (2, True)])
def test_device_lists_name_everybody_whose_keys_are_new_or_who_is_newly_met_and_who_is_met_no_more(alice, bob, carol, seed, forgets):
    rnd, people = random.Random(seed), [alice, bob, carol]
    rooms = [alice.create_room(preset="public_chat") for _ in range(3)]
    alice.leave(rooms[2])
    model = Meetings(rooms)
    for room in rooms[:2]:
        model.rooms[room].add(alice.user_id)
    model.note()
    tokens = {person: [(person.sync()["next_batch"], 0)] for person in people}
    for n in range(150):
        act, person, room = rnd.choice(["join"] * 4 + ["leave"] * 3 + ["kick", "rename", "key", "key", "sync", "sync", "sync"]), rnd.choice(people), rnd.choice(rooms)
        others = sorted(model.rooms[room] - {alice.user_id})
        if act == "join":
            model.joins(person, room)
        elif act == "leave" and person.user_id in model.rooms[room] and len(model.rooms[room]) > 1:
            model.leaves(person, room, forgets)
        elif act == "kick" and others and alice.user_id in model.rooms[room]:
            model.is_kicked(rnd.choice(others), room, by=alice)
        elif act == "rename":
            renamed(person, f"name {n}")
        elif act == "key":
            upload(person, change=n)
            model.keys[person.user_id] = len(model.moments)
        model.note()
        if act == "sync":
            token, since = rnd.choice(tokens[person][-2:])
            answer = person.sync(token)
            model.check(person.user_id, since, **answer.get("device_lists", {"changed": [], "left": []}))
            tokens[person].append((answer["next_batch"], len(model.moments) - 1))


class Counts:
    """An independent model of the default push rules and of receipts, for one user in a room of three."""

    def __init__(self, who, name):
        self.who, self.name, self.events, self.read = who, name, [], {}      # thread (-1: all, 0: main) → number of the event

    def happened(self, id, sender, content, type, root, room_power):
        body, mentions = content.get("body", ""), content.get("m.mentions")
        notify, highlight = type == "m.room.message", False
        if mentions is None:                                 # the older rules
            highlight = bool(re.search(rf"(?i)\b({re.escape(self.name)})\b", body)) or (bool(re.search(r"(?<!\w)@room(?!\w)", body)) and room_power)
        elif self.who in mentions.get("user_ids", []) or (mentions.get("room") and room_power):
            highlight = True
        if content.get("msgtype") == "m.notice":
            notify = highlight = False
        if content.get("m.relates_to", {}).get("rel_type") == "m.replace" and not highlight:
            notify = False
        if type == "m.reaction" and not highlight:
            notify = False
        self.events.append({"id": id, "own": sender == self.who, "notify": notify or highlight, "highlight": highlight, "root": root})
        if sender == self.who:
            self.read[root] = len(self.events) - 1

    def receipt(self, thread, id):
        n = next(n for n, event in enumerate(self.events) if event["id"] == id)
        self.read[thread] = max(n, self.read.get(thread, -1))

    def counts(self):
        found = {0: [0, 0]}
        for n, event in enumerate(self.events):
            if event["notify"] and not event["own"] and n > self.read.get(-1, -1) and n > self.read.get(event["root"], -1):
                count = found.setdefault(event["root"], [0, 0])
                count[0] += 1
                count[1] += event["highlight"]
        main = found.pop(0)
        return main, found


class Chat:
    """Three who talk in a room, of whom two are modelled; does() lets one of them do something."""

    def __init__(self, seed, hs, alice, bob, carol, room):
        self.rnd, self.hs, self.alice, self.bob, self.carol, self.room = random.Random(seed), hs, alice, bob, carol, room
        self.models = {client: Counts(client.user_id, asbridge.localpart_of(client.user_id)) for client in (bob, carol)}
        self.sent, self.roots = [], []                       # (event ID, root of its thread or 0, who); what may be a root

    def any_content(self, act, n):
        """(type, content, root of its thread or 0)."""
        rnd, body = self.rnd, self.rnd.choice(["x", "bob: hello", "for carol?", "bobby", "@room", "@rooms", "CAROL"])
        content = {"msgtype": rnd.choice(["m.text", "m.text", "m.text", "m.notice"]), "body": body}
        if rnd.random() < 0.5:
            content["m.mentions"] = rnd.choice([{}, {"user_ids": [self.bob.user_id]}, {"user_ids": [self.carol.user_id, "@x:y"]}, {"room": True}])
        root = rnd.choice(self.roots) if act in ("thread", "react", "edit") and self.roots else 0
        if act == "react" and root:
            return "m.reaction", {"m.relates_to": {"rel_type": "m.annotation", "event_id": root, "key": str(n)}}, 0
        if act == "edit" and root:
            return "m.room.message", {**content, "m.relates_to": {"rel_type": "m.replace", "event_id": root}, "m.new_content": {"body": body}}, 0
        return "m.room.message", {**content, **({"m.relates_to": {"rel_type": "m.thread", "event_id": root}} if root else {})}, root

    def says(self, client, act, n):
        type, content, root = ("m.room.topic", {"topic": "x"}, 0) if act == "state" else self.any_content(act, n)
        id = client.set_state(self.room, type, {"topic": f"bob {n}"}) if act == "state" else client.send(self.room, type, content)
        for model in self.models.values():
            model.happened(id, client.user_id, content, type, root, client is self.alice)
        self.sent.append((id, root, client))
        if act == "say":
            self.roots.append(id)

    def redacts(self):
        id, _, whose = self.rnd.choice(self.sent)
        if whose is self.alice and id not in self.roots:
            self.alice.redact(self.room, id)
            for model in self.models.values():
                next(event for event in model.events if event["id"] == id)["notify"] = False

    def reads(self, client, threaded):
        id, root, _ = self.rnd.choice(self.sent[-8:])
        with contextlib.suppress(MatrixError) if threaded else contextlib.nullcontext():     # one that was redacted is in no thread any more
            receipt(client, self.room, id, **({"thread_id": root or "main"} if threaded else {"type": self.rnd.choice(["m.read", "m.read.private"])}))
            self.models[client].receipt(root if threaded else -1, id)

    def looks(self, client):
        main, threads = self.models[client].counts()
        assert unread(client, self.room, unread_thread_notifications=True) == (main, threads)
        assert unread(client, self.room) == ([sum(column) for column in zip(main, *threads.values(), strict=True)], {})

    def does(self, act, client, n):
        if act in ("say", "thread", "react", "edit") or (act == "state" and client is self.alice):
            self.says(client, act, n)
        elif act == "redact" and self.sent:
            self.redacts()
        elif act in ("receipt", "threaded") and client is not self.alice and self.sent:
            self.reads(client, act == "threaded")
        elif act == "anew":
            self.hs.api.sync.unread = asbridge.Unread()      # as after a restart
        elif act == "look" and client is not self.alice:
            self.looks(client)


@pytest.mark.parametrize("seed", [4, 11])
def test_what_is_unread_is_what_the_default_rules_and_the_receipts_say(hs, alice, bob, carol, room, seed):
    bob.join(room), carol.join(room)
    chat = Chat(seed, hs, alice, bob, carol, room)
    for n in range(140):
        act = chat.rnd.choice(["say"] * 6 + ["thread"] * 3 + ["react", "edit", "state", "redact", "receipt", "anew"] + ["threaded"] * 4 + ["look"] * 3)
        chat.does(act, chat.rnd.choice([alice, bob, carol]), n)


@pytest.mark.parametrize("how", [
    "ignored",
    "not ignored any more",
    "redacted by somebody ignored",
    "own message redacted"])
def test_what_is_unread_is_the_same_counted_on_and_counted_anew(hs, alice, bob, carol, room, how):
    bob.join(room), carol.join(room)
    ignore = lambda *users: bob.set_account_data("m.ignored_user_list", {"ignored_users": {user.user_id: {} for user in users}})  # noqa: E731
    if how == "not ignored any more":
        ignore(carol)
    if how == "redacted by somebody ignored":
        ignore(alice)
    said, own = carol.say(room, "bob"), bob.say(room, "x") if how == "own message redacted" else None
    unread(bob, room)
    if how == "ignored":
        ignore(carol)
    elif how == "not ignored any more":
        ignore()
    else:
        alice.redact(room, own or said)
    grown = unread(bob, room)
    hs.api.sync.unread = asbridge.Unread()
    assert grown == unread(bob, room)


@pytest.mark.parametrize("seed", range(2))
def test_threads_have_the_count_the_latest_event_and_the_participants_that_a_model_of_them_has(alice, bob, carol, room, seed):
    bob.join(room), carol.join(room)
    rnd, people = random.Random(seed), [alice, bob, carol]
    roots, replies = [(client, client.say(room, "root")) for client in [*people, alice]], []
    for n in range(80):
        client, (_, root) = rnd.choice(people), rnd.choice(roots)
        act = rnd.choice(["reply"] * 4 + ["redact", "edit", "react", "redact root"])
        if act == "reply":
            replies.append((client, root, reply(client, room, root, body=str(n))))
        elif act == "redact" and replies:
            gone = rnd.choice(replies)
            alice.redact(room, gone[2])
            replies.remove(gone)
        elif act in ("edit", "react") and replies:
            reply(client, room, rnd.choice(replies)[2], *(["m.replace"] if act == "edit" else ["m.annotation"]), key=str(n))
        elif act == "redact root" and n % 4 == 0:
            alice.redact(room, root)
        if n % 5 == 0:
            latest = sorted({root for _, root, _ in replies}, key=lambda root: -max(i for i, one in enumerate(replies) if one[1] == root))
            for client in people:
                listed = threads(client, room)["chunk"]
                assert ids(listed) == latest
                for sender, root in roots:
                    of = [one for one in replies if one[1] == root]
                    found = ((bundled(client.event(room, root)) or {}).get("m.thread"))
                    assert (found and (found["count"], found["latest_event"]["event_id"], found["current_user_participated"])) == (
                        (len(of), of[-1][2], client in (sender, *(one[0] for one in of))) if of else None)
                    assert relations(client, room, root, "m.thread", dir="f")[0] == [one[2] for one in of]


@pytest.mark.parametrize("seed", range(2))
def test_no_one_time_key_is_handed_out_twice_or_lost_though_batches_and_commits_fail(start, seed):
    hs = start(registration(url=nowhere(), **ENCRYPTING))
    alice, ghost, rnd = hs.client("alice"), ghost_with_device(hs), random.Random(seed)
    ids = [f"signed_curve25519:K{n:03}" for n in range(60)]
    ghost.ask("POST", "keys", "upload", body={"device_keys": device_keys(ghost), "one_time_keys": {id: {"key": id} for id in ids}, "fallback_keys": {"signed_curve25519:F": {"key": "F"}}})
    store, who, got, refused_ = hs.world.store, asbridge.Who(alice.user_id), [], []
    store._tx.db = FaultyDb(store._tx.db, "COMMIT", 0)

    def claiming(n):
        for _ in range(10):
            try:
                keys = hs.api.keys.claim(who, {ghost.user_id: {"GHOST": "signed_curve25519"}})["one_time_keys"]
                got.extend(keys[ghost.user_id]["GHOST"])
            except MatrixError as error:
                refused_.append(error.status)

    def failing(tx):
        if rnd.random() < 0.5:
            tx.db.times = rnd.choice([1, 1, 3])              # this COMMIT fails, and of those after it some
        else:
            raise sqlite3.OperationalError("disk I/O error")
    threads = [threading.Thread(target=claiming, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(MatrixError):
            store.write(failing)
    store._tx.db.times = 0
    with store.read() as reader:
        left = [row[0] for row in reader.all("SELECT key_id FROM one_time_keys")]
    assert sorted(got + left) == ids and len(got) + len(refused_) == 50 and hs.api.keys.claim(who, {ghost.user_id: {"GHOST": "signed_curve25519"}})


@pytest.mark.parametrize("script", [
    "A:online =online B:online +20 B:online +20 =online +15 =offline",
    "A:online +29 =online A:online +29 =online +2 =offline B:online =online",
    "A~online B~online +299 =online +2 =unavailable A~online =unavailable B! =online +299 =online +2 =unavailable +400 =offline",
    "A~online +301 =unavailable B:online =online +301 =unavailable +400 =offline A! =offline",
    "A:offline =offline B:online =online A:offline +25 A:offline =online +6 =offline",
    "A:unavailable =unavailable +10 A:unavailable +301 =offline A! =offline B:online =online",
    "A~unavailable +301 =unavailable A! =online +301 =unavailable +400 =offline",
    "A~online B~unavailable =online B~online =online A~unavailable =online"])
def test_presence_is_what_two_devices_make_of_it_and_each_change_is_told_once(pair, script):
    hs, alice, bob, _, since = pair
    hs.api.presence.timer.stop()                             # the test does what it does, at once
    devices, seen = {"A": bob, "B": again(hs, bob)}, "offline"
    for step in script.split():
        if step[0] == "+":
            hs.advance(float(step))
            hs.api.presence._expire()
        elif step[0] == "=":
            answer = alice.sync(since)
            since, told = answer["next_batch"], presences(answer)
            told.pop(alice.user_id, None)                    # who goes on and off as she looks
            assert presence_of(alice, bob)["presence"] == step[1:] and told == ({bob.user_id: step[1:]} if step[1:] != seen else {}), step
            seen = step[1:]
        elif step[1] == "!":
            devices[step[0]].typing(alice.joined_rooms()[0], False)
        else:
            who = asbridge.Who(bob.user_id, device_of(devices[step[0]]))
            hs.api.presence.polling(who, step[2:], 600.0 if step[1] == "~" else 0.0)


# ============================================================================
# 7. Delivery
# ============================================================================

# -- Pushing: events.

def test_a_push_has_the_client_event_format_and_what_old_software_reads(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    event_id = alice.say(room, "hello")
    hs.settle()
    event, create = r.events[-1], r.events[0]
    assert event.keys() == {"event_id", "room_id", "sender", "origin_server_ts", "type", "content", "unsigned", "age", "user_id"}
    assert (event["event_id"], event["room_id"], event["sender"], event["user_id"]) == (event_id, room, alice.user_id, alice.user_id)
    assert isinstance(event["age"], int) and event["unsigned"] == {"age": event["age"]}
    assert create["state_key"] == "" and event["content"] == {"msgtype": "m.text", "body": "hello"}


def test_a_push_is_a_put_with_the_token_in_the_header_and_for_old_software_in_the_query(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url + "/some/path/", rooms=["!.*"], hs_token="h s&=%"))
    hs.client("alice").create_room()
    hs.settle()
    method, where, headers, query, body = r.requests[0]
    assert method == "PUT" and re.fullmatch(r"/some/path/_matrix/app/v1/transactions/[0-9]+", where)
    assert headers["authorization"] == "Bearer h s&=%" and query == {"access_token": "h s&=%"}
    assert headers["content-type"] == "application/json" and list(json.loads(body)) == ["events"]


def test_a_pushed_redaction_says_at_the_top_and_in_its_content_what_it_redacts(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    event_id = alice.say(room, "x")
    alice.redact(room, event_id)
    hs.settle()
    assert r.events[-1]["redacts"] == r.events[-1]["content"]["redacts"] == event_id


@pytest.mark.parametrize("status,body", [(500, {}), (404, {}), (401, {"errcode": "M_UNKNOWN_TOKEN"}), (202, {}), (302, {}), (503, b"<html>")])
def test_a_transaction_comes_again_with_the_same_id_and_the_same_bytes_until_200(start, recorder, status, body):
    r = recorder(status, body)
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    for attempt in range(1, 4):
        eventually(lambda: hs.delivery.worker("irc").failures == attempt)
        alice.say(room, f"later {attempt}")
        hs.advance(10)
    r.answers(200)
    eventually(lambda: hs.advance(5) or not hs.waiting())
    pushes = r.transactions
    first = [push for push in pushes if push[0] == pushes[0][0]]
    assert len(first) >= 4 and len(set(first)) == 1 and r.texts() == ["later 1", "later 2", "later 3"]
    ids = list(dict(pushes))
    assert ids == sorted(ids, key=int) and all(transaction["acknowledged"] for transaction in hs.transactions("irc"))


@pytest.mark.parametrize("body", [{}, b"", b"OK", b"x" * 200_000, b"[]", {"errcode": "M_UNKNOWN"}], ids=range(6))
def test_any_200_is_an_acknowledgement(start, recorder, body):
    r = recorder(200, body)
    hs = start(registration(url=r.url, rooms=["!.*"]))
    hs.client("alice").create_room()
    hs.settle()
    assert len({push[0] for push in r.transactions}) == len(r.transactions)
    one = hs.delivery.worker("irc").attempts[0]
    assert one.answered().endswith("an acknowledgement, though it is not JSON") == (isinstance(body, bytes) and body != b"[]")


def test_an_acknowledgement_that_is_lost_brings_the_same_again(start):
    """The application service takes the transaction and dies before it answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    hs = start(registration(url=f"http://127.0.0.1:{listener.getsockname()[1]}", rooms=["!.*"]))
    hs.client("alice").create_room()
    seen = []
    for _ in range(2):
        listener.settimeout(5)
        connection, _ = listener.accept()
        seen.append(connection.recv(65_536).partition(b"\r\n")[0])
        connection.close()
        eventually(lambda: hs.delivery.worker("irc").failures == len(seen))
        hs.advance(5)
    listener.close()
    assert seen[0] == seen[1] and seen[0].startswith(b"PUT /_matrix/app/v1/transactions/")


def test_the_backoff_doubles_up_to_its_limit(start, recorder):
    r = recorder(503)
    hs = start(registration(url=r.url, rooms=["!.*"]), retry_first_ms=100_000, retry_max_ms=400_000)
    hs.client("alice").create_room()
    worker = hs.delivery.worker("irc")
    for attempt, seconds in enumerate((100, 200, 400, 400), 1):
        eventually(lambda: worker.failures == attempt)
        assert seconds * 0.89 <= worker.next_attempt - hs.clock.monotonic() <= seconds * 1.11
        assert len(r.requests) == attempt
        hs.advance(seconds * 1.11)
    assert [asbridge.next_delay(n, 500, 60_000) < 66.1 for n in (0, 7, 1000)] == [True] * 3


def test_a_success_ends_the_backoff_and_the_next_failure_starts_small(start, recorder):
    r = recorder(503)
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    worker = hs.delivery.worker("irc")
    eventually(lambda: worker.failures == 1)
    r.answers(200)
    eventually(lambda: hs.advance(1) or not hs.waiting())
    alice.say(room, "at once")
    hs.settle()
    assert r.texts() == ["at once"] and worker.failures == 0


def test_a_successful_ping_ends_the_backoff(start, recorder):
    r = recorder(503)
    hs = start(registration(url=r.url, rooms=["!.*"]), retry_first_ms=3_600_000, retry_max_ms=3_600_000)
    hs.client("alice").create_room()
    eventually(lambda: hs.delivery.worker("irc").failures == 1)
    with refused("M_BAD_STATUS", 502):
        bot_of(hs).call("POST", PING, {})
    r.answers(200)
    bot_of(hs).call("POST", PING, {})
    hs.settle()


def test_a_service_that_is_down_holds_up_nobody(start, recorder):
    r = recorder()
    hs = start(registration("down", nowhere(), rooms=["!.*"]), registration("up", r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    for i in range(20):
        alice.say(room, f"n{i}")
    eventually(lambda: len(r.texts()) == 20)
    assert bodies(reversed(alice.messages(room)["chunk"])) == [f"n{i}" for i in range(20)]
    eventually(lambda: set(hs.waiting()) == {"down"})


def test_a_service_that_does_not_answer_holds_up_nobody(start, recorder):
    slow, quick, go = recorder(), recorder(), threading.Event()
    slow.answer = lambda request, body: (go.wait(10), (200, {}))[1]
    hs = start(registration("slow", slow.url, rooms=["!.*"]), registration("quick", quick.url, rooms=["!.*"]))
    alice = hs.client("alice")
    alice.say(alice.create_room(), "x")
    eventually(lambda: quick.texts() == ["x"])
    assert len(eventually(lambda: slow.requests)) == 1                 # one is in flight, and no other
    go.set()
    hs.settle()
    assert slow.texts() == ["x"]


def test_a_backlog_goes_in_batches_of_a_hundred_at_most_and_in_order(start, recorder):
    r = recorder(503)
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    eventually(lambda: hs.delivery.worker("irc").failures)
    for i in range(250):
        alice.say(room, f"n{i}")
    r.answers(200)
    eventually(lambda: hs.advance(1) or not hs.waiting())
    sizes = [len(json.loads(body)["events"]) for body in dict(r.transactions).values()]
    assert max(sizes) == 100 and len(sizes) <= 5 and r.texts() == [f"n{i}" for i in range(250)]


def test_what_waits_survives_a_restart_and_goes_on_at_once_with_the_same_id(start, recorder, tmp_path):
    r = recorder(503)
    config, database = registration(url=r.url, rooms=["!.*"]), str(tmp_path / "a.db")
    hs = start(config, database=database)
    alice = hs.client("alice")
    room = alice.create_room()
    eventually(lambda: hs.delivery.worker("irc").failures)
    alice.say(room, "while it was down")
    hs.stop()
    before = r.transactions[0]
    r.answers(200)
    start(config, database=database).settle()
    assert r.transactions.count(before) >= 2 and r.texts() == ["while it was down"]


def test_a_transaction_id_rises_and_is_not_used_again_with_a_new_database(start, recorder):
    r = recorder()
    config = registration(url=r.url, rooms=["!.*"])
    for _ in range(2):
        hs = start(config)
        alice = hs.client("alice")
        alice.say(alice.create_room(), "x")
        hs.settle()
        hs.stop()
    ids = [int(id) for id, _ in r.transactions]
    assert ids == sorted(set(ids)) and ids[0] > 1_700_000_000_000_000


def test_to_a_service_whose_url_is_null_nothing_is_sent_and_nothing_is_queued(start):
    hs = start(registration(url=None, rooms=["!.*"]))
    alice = hs.client("alice")
    event_id = alice.say(alice.create_room(invite=["@_irc_new:localhost"]), "x")
    assert not hs.waiting() and not hs.transactions("irc") and hs.why(event_id, "irc")["reason"] is None
    with refused("M_NOT_FOUND", 404):
        alice.profile("@_irc_x:localhost")


def test_what_could_not_be_pushed_for_want_of_a_thread_is_pushed_when_there_is_one(start, recorder, monkeypatch, caplog):
    r = recorder()
    with monkeypatch.context() as patch:
        no_threads_named(patch, "push")
        hs = start(registration(url=r.url, rooms=["!.*"]))
        alice = hs.client("alice")
        room = alice.create_room()
        alice.say(room, "first")
        assert hs.waiting()["irc"] > 1 and not r.transactions
    alice.say(room, "second")
    hs.settle()
    assert r.texts() == ["first", "second"]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["application service irc: nothing can be pushed: can't start new thread"]


def test_an_error_in_the_push_itself_does_not_end_it(linked, monkeypatch):
    hs, r, alice, room = linked
    worker, fails = hs.delivery.worker("irc"), [1]
    push = worker._push
    monkeypatch.setattr(worker, "_push", lambda transaction: 1 / 0 if fails and fails.pop() else push(transaction))
    push_under_faults(hs, alice, room)
    assert not fails and r.texts() == ["x"]


def test_the_log_says_whose_failure_it_was():
    told = asbridge.read_registration(registration(url="http://127.0.0.1:1"), "here")
    for failure, text in ((asbridge.Answer(403, b"{}"), "403: it rejects the hs_token"), (asbridge.Answer(500, b"oops hs-irc"), "it answered 500 oops (hs_token)"),
                          (ConnectionRefusedError(), "nothing listens at http://127.0.0.1:1"), (TimeoutError(), "it did not answer in time"),
                          (BrokenPipeError(), "it closed the connection"), (http.client.IncompleteRead(b""), "it closed the connection, or said a wrong length"),
                          (http.client.BadStatusLine("SSH-2.0"), "what it answered is not HTTP/1.1 (BadStatusLine: SSH-2.0)"),
                          (ValueError("the answer does not end"), "what it answered is not HTTP/1.1 (ValueError: the answer does not end)"),
                          (MatrixError("M_NOT_JSON", "the body is not JSON"), "the body is not JSON"),
                          (MatrixError("M_UNKNOWN", "the homeserver could not store this"), "the homeserver could not store this")):
        assert asbridge.advice(told, failure).startswith(text)


# -- Pushing: ephemeral data.

@pytest.mark.parametrize("flags, keys", [
    ({"receive_ephemeral": True}, ["ephemeral"]), ({"de.sorunome.msc2409.push_ephemeral": True}, ["de.sorunome.msc2409.ephemeral"]),
    ({"receive_ephemeral": True, "de.sorunome.msc2409.push_ephemeral": True}, ["ephemeral", "de.sorunome.msc2409.ephemeral"]), ({}, [])])
def test_typing_and_receipts_are_pushed_to_a_service_that_wants_them_under_the_names_that_it_reads(start, recorder, flags, keys):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], **flags))
    alice = hs.client("alice")
    room = alice.create_room()
    event_id = alice.say(room, "x")
    alice.typing(room)
    alice.receipt(room, event_id)
    hs.settle()
    for key in ("ephemeral", "de.sorunome.msc2409.ephemeral"):
        found = ephemeral_of(r, key)
        assert {data["type"] for data in found} == ({"m.typing", "m.receipt"} if key in keys else set())
        assert all(data["room_id"] == room for data in found)
    if keys:
        typing, receipt = (next(data for data in ephemeral_of(r, keys[0]) if data["type"] == kind) for kind in ("m.typing", "m.receipt"))
        assert typing["content"]["user_ids"] == [alice.user_id] and alice.user_id in receipt["content"][event_id]["m.read"]


def test_a_private_receipt_is_for_the_service_of_its_user_only(start, recorder):
    mine, other = recorder(), recorder()
    hs = start(registration("irc", mine.url, receive_ephemeral=True), registration("other", other.url, rooms=["!.*"], users=[], aliases=[], receive_ephemeral=True))
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    room = bob.create_room()
    event_id = bob.say(room, "x")
    bob.receipt(room, event_id, "m.read.private")
    bob.receipt(room, event_id)
    hs.settle()
    kinds = lambda r: [next(iter(data["content"][event_id])) for data in ephemeral_of(r)]  # noqa: E731
    assert kinds(other) == ["m.read"] and sorted(kinds(mine)) == ["m.read", "m.read.private"]


def test_ephemeral_data_that_waits_is_the_latest_of_each_kind(start, recorder):
    r = recorder(500, {"errcode": "M_UNKNOWN"})
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True))
    alice = hs.client("alice")
    room = alice.create_room()
    sent = [alice.say(room, str(n)) for n in range(3)]
    eventually(lambda: r.transactions)
    for event_id in sent:
        alice.receipt(room, event_id)
    alice.typing(room, timeout=100_000)
    hs.advance(60)
    r.answers(200)
    hs.advance(120)
    hs.settle()
    receipts = [data for data in ephemeral_of(r) if data["type"] == "m.receipt"]
    assert [list(data["content"]) for data in receipts] == [[sent[-1]]]
    assert all(data["content"]["user_ids"] == [] for data in ephemeral_of(r) if data["type"] == "m.typing")


@pytest.mark.parametrize("way", ["leave", "kick", "ban", "deactivate", "at once"])
def test_who_leaves_stops_typing_for_application_services_too(start, recorder, way):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True))
    alice, bob = hs.client("alice"), hs.client("bob", "w")
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    if way == "at once":                                     # in one batch of the writer
        def job(tx):
            hs.api.typing._change(tx, tx.room(room), {bob.user_id: 1e12})
            tx.append(tx.room(room), asbridge.Draft("m.room.member", bob.user_id, {"membership": "leave"}, bob.user_id), 5)
        hs.world.store.write(job)
    else:
        bob.typing(room)
        hs.settle()
        {"leave": lambda: bob.leave(room), "kick": lambda: alice.kick(room, bob.user_id), "ban": lambda: alice.ask("POST", "rooms", room, "ban", body={"user_id": bob.user_id}),
         "deactivate": lambda: bob.ask("POST", "account", "deactivate", body=confirmed())}[way]()
    hs.settle()
    assert [data["content"]["user_ids"] for data in ephemeral_of(r) if data["type"] == "m.typing"] == [[bob.user_id], []][way == "at once":]
    assert not hs.api.typing._rooms[1][1]


def test_who_types_in_one_batch_is_known_to_the_next_in_it(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True))
    alice, bob = hs.client("alice"), hs.client("bob")
    room, typing = alice.create_room(preset="public_chat"), hs.api.typing
    bob.join(room)
    hs.settle()
    now = hs.clock.monotonic()
    hs.world.store.write(lambda tx: [typing._change(tx, tx.room(room), {user.user_id: now + 5}) for user in (alice, bob)] and None)
    hs.settle()
    told = lambda: [data["content"]["user_ids"] for data in ephemeral_of(r) if data["type"] == "m.typing"][-1]  # noqa: E731
    assert told() == [alice.user_id, bob.user_id] == joined(alice.sync(), room)["ephemeral"]["events"][0]["content"]["user_ids"]
    typing.timer.stop()
    hs.advance(10)                                           # alice goes on at the moment when both have run out

    def job(tx):
        typing._change(tx, tx.room(room), {alice.user_id: now + 60})
        typing._drop_expired(tx)
    hs.world.store.write(job)
    hs.settle()
    assert told() == [alice.user_id] == joined(alice.sync(), room)["ephemeral"]["events"][0]["content"]["user_ids"]


def test_what_a_refused_job_did_to_who_types_is_undone(hs, alice, bob, room):
    bob.join(room), alice.typing(room)
    typing, far = hs.api.typing, hs.clock.monotonic() + 60

    def refused_job(tx):
        tx.append(tx.room(room), asbridge.Draft("m.room.member", alice.user_id, {"membership": "leave"}, alice.user_id), 5)
        raise MatrixError("M_FORBIDDEN", "no")
    done = in_one_batch(hs.world.store, refused_job, lambda tx: typing._change(tx, tx.room(room), {bob.user_id: far}))
    assert [bool(job.error) for job in done] == [True, False]
    assert joined(alice.sync(), room)["ephemeral"]["events"][0]["content"]["user_ids"] == [alice.user_id, bob.user_id]


def test_who_has_stopped_typing_is_told_of_after_any_time_and_of_any_room(start, recorder, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_CACHED_ROOMS", 1)
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True))
    alice = hs.client("alice")
    room = alice.create_room()
    alice.typing(room, timeout=60_000)
    hs.settle()
    hs.pause("irc")
    others = [alice.create_room() for _ in range(3)]         # the writer lets go of the room
    hs.advance(120)
    hs.resume("irc")
    hs.settle()
    typing = [data for data in ephemeral_of(r) if data["type"] == "m.typing" and data["room_id"] == room]
    assert [data["content"]["user_ids"] for data in typing] == [[alice.user_id], []] and len(others) == 3


def test_receipts_of_several_threads_wait_beside_each_other(start, recorder):
    r = recorder(500, {"errcode": "M_UNKNOWN"})
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True))
    alice = hs.client("alice")
    room = alice.create_room()
    root = alice.say(room, "x")
    reply = alice.send(room, "m.room.message", {"body": "x", "m.relates_to": {"rel_type": "m.thread", "event_id": root}})
    eventually(lambda: r.transactions)
    receipt(alice, room, root, thread_id="main"), receipt(alice, room, reply, thread_id=root)
    r.answers(200)
    hs.advance(120)
    hs.settle()
    assert {id for data in ephemeral_of(r) if data["type"] == "m.receipt" for id in data["content"]} == {root, reply}


def test_a_transaction_with_ephemeral_data_does_not_change_either(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True))
    alice = hs.client("alice")
    room = alice.create_room()
    hs.settle()
    r.requests.clear()
    r.answers(500, {"errcode": "M_UNKNOWN"})
    alice.typing(room)
    eventually(lambda: r.transactions)
    alice.typing(room, False)
    r.answers(200)
    hs.advance(1)
    hs.settle()
    first = [body for txn_id, body in r.transactions if txn_id == r.transactions[0][0]]
    assert len(first) >= 2 and len(set(first)) == 1 and json.loads(first[0])["events"] == []


@pytest.mark.parametrize("who", ["ghost", "stranger", "roommate"])
def test_presence_is_pushed_of_its_own_users_and_of_who_is_in_a_room_with_them(start, recorder, who):
    r = recorder()
    hs = start(registration(url=r.url, receive_ephemeral=True))
    alice, ghost = hs.client("alice"), acting(hs, "irc", "@_irc_bob:localhost")
    if who == "roommate":
        ghost.join(alice.create_room(preset="public_chat"))
    client = ghost if who == "ghost" else alice
    for presence in ("online", "unavailable"):
        set_presence(client, presence, status_msg="x")
        hs.settle()
    found = [data for data in ephemeral_of(r) if data["type"] == "m.presence"]
    assert all("room_id" not in data and data["content"]["status_msg"] == "x" for data in found)
    assert [(data["sender"], data["content"]["presence"]) for data in found] == [(client.user_id, "online"), (client.user_id, "unavailable")] * (who != "stranger")


# -- Pushing: to services that encrypt.

@pytest.mark.parametrize("flags, comes", [
    (ENCRYPTING, True), ({"de.sorunome.msc2409.push_ephemeral": True, "org.matrix.msc3202": True}, True),
    ({"receive_ephemeral": True}, False), ({"de.sorunome.msc2409.push_ephemeral": True}, False), ({"org.matrix.msc3202": True}, False), ({}, False)])
def test_a_message_to_a_ghosts_device_is_pushed_once_and_in_order_to_a_service_that_encrypts_without_sync(start, recorder, flags, comes):
    r = recorder()
    hs = start(registration(url=r.url, **flags))
    alice, ghost = hs.client("alice"), ghost_with_device(hs)
    for n in range(3):
        alice.ask("PUT", "sendToDevice", "m.x", str(n), body={"messages": {ghost.user_id: {"*": {"n": n}}}})
    hs.settle()
    messages = [message for part in pushed(r, "de.sorunome.msc2409.to_device") for message in part]
    assert messages == ([{"type": "m.x", "sender": alice.user_id, "content": {"n": n}, "to_user_id": ghost.user_id, "to_device_id": "GHOST"} for n in range(3)] if comes else [])
    if not comes:                                            # it is left for a /sync of the ghost
        session = hs.api.accounts.login_ghost(hs.world.registrations.by_id["irc"], ghost.user_id, device_id="GHOST")
        assert len(asbridge.Client(hs.url, session["access_token"]).sync()["to_device"]["events"]) == 3


def test_messages_to_a_ghosts_device_wait_for_a_service_that_is_down_over_a_restart(start, recorder, tmp_path):
    r = recorder(500, {"errcode": "M_UNKNOWN"})
    keys = {"database": str(tmp_path / "a.db")}
    hs = start(registration(url=r.url, **ENCRYPTING), **keys)
    alice, ghost = hs.client("alice"), ghost_with_device(hs)
    for n in range(150):
        alice.ask("PUT", "sendToDevice", "m.x", str(n), body={"messages": {ghost.user_id: {"*": {"n": n}}}})
    hs.stop()
    r.answers(200)
    hs = start(registration(url=r.url, **ENCRYPTING), **keys)
    hs.settle()
    parts = pushed(r, "de.sorunome.msc2409.to_device")
    assert [message["content"]["n"] for part in parts for message in part] == list(range(150)) and max(map(len, parts)) == 100


def test_a_service_hears_how_many_keys_its_ghosts_have_left_under_both_names(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, **ENCRYPTING))
    alice, ghost = hs.client("alice"), ghost_with_device(hs)
    ghost.ask("POST", "keys", "upload", body={"device_keys": device_keys(ghost), "one_time_keys": {"signed_curve25519:A": {}, "signed_curve25519:B": {}},
                                              "fallback_keys": {"signed_curve25519:F": {}}})
    assert device_of(ghost) == "GHOST" and claim(alice, ghost) == "A"
    hs.settle()
    counts = [{ghost.user_id: {"GHOST": {"signed_curve25519": 1}}}]
    assert pushed(r, "org.matrix.msc3202.device_one_time_keys_count")[-1:] == pushed(r, "org.matrix.msc3202.device_one_time_key_counts")[-1:] == counts
    assert pushed(r, "org.matrix.msc3202.device_unused_fallback_key_types")[-1] == {ghost.user_id: {"GHOST": ["signed_curve25519"]}}
    assert [claim(alice, ghost) for _ in range(2)] == ["B", "F"]
    hs.settle()
    assert pushed(r, "org.matrix.msc3202.device_one_time_keys_count")[-1] == {ghost.user_id: {"GHOST": {"signed_curve25519": 0}}}
    assert pushed(r, "org.matrix.msc3202.device_unused_fallback_key_types")[-1] == {ghost.user_id: {"GHOST": []}}
    alice.ask("PUT", "sendToDevice", "m.x", "1", body={"messages": {ghost.user_id: {"*": {}}}})
    hs.settle()
    assert {"de.sorunome.msc2409.to_device", "org.matrix.msc3202.device_one_time_keys_count"} <= json.loads(r.transactions[-1][1]).keys()


@pytest.mark.parametrize("way", ["PUT", "PUT again", "login"])
def test_a_service_hears_with_each_transaction_that_a_new_device_has_no_keys_until_it_has(start, recorder, way):
    r = recorder()
    hs = start(registration(url=r.url, **ENCRYPTING))
    alice, bot, counts = hs.client("alice"), bot_of(hs), "org.matrix.msc3202.device_one_time_keys_count"
    if way == "PUT again":                                   # as a bridge does at each start
        hs.world.store.write(lambda tx: tx.add_device(bot.user_id, "DEV", None, 5))
    if way == "login":
        hs.api.accounts.login_ghost(hs.world.registrations.by_id["irc"], bot.user_id, device_id="DEV")
    else:
        bot.ask("PUT", "devices", "DEV", body={})
    room = alice.create_room(preset="public_chat", invite=[bot.user_id])
    hs.settle()
    assert pushed(r, counts) and [part for part in pushed(r, counts) if part != {bot.user_id: {"DEV": {"signed_curve25519": 0}}}] == []
    bot.join(room), alice.say(room, "hello")
    hs.settle()
    assert counts in json.loads(r.transactions[-1][1])
    bot.call = functools.partial(asbridge.Client.call, bot, device_id="DEV")
    bot.ask("POST", "keys", "upload", body={"device_keys": device_keys(bot), "one_time_keys": {"signed_curve25519:A": {}}})
    hs.settle()
    assert pushed(r, counts)[-1] == {bot.user_id: {"DEV": {"signed_curve25519": 1}}}
    alice.say(room, "hello again")
    hs.settle()
    assert counts not in json.loads(r.transactions[-1][1])


def test_of_a_new_device_that_never_has_keys_a_service_hears_a_few_times(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, **ENCRYPTING))
    bot = bot_of(hs)
    bot.ask("PUT", "devices", "DEV", body={})
    room = bot.create_room()
    for n in range(2 * asbridge.KEYLESS_TELLINGS):
        bot.say(room, str(n)), hs.settle()
    assert len(pushed(r, "org.matrix.msc3202.device_one_time_keys_count")) == asbridge.KEYLESS_TELLINGS


def test_of_a_new_device_that_is_gone_before_it_had_keys_a_service_hears_no_more(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, **ENCRYPTING))
    bot = bot_of(hs)
    bot.ask("PUT", "devices", "DEV", body={}), bot.ask("DELETE", "devices", "DEV", body={})
    bot.create_room()
    hs.settle()
    assert pushed(r, "org.matrix.msc3202.device_one_time_keys_count") == []


def test_a_service_hears_whose_devices_changed_in_the_rooms_of_its_ghosts(start, recorder):
    r, other = recorder(), recorder()
    hs = start(registration(url=r.url, **ENCRYPTING), registration("plain", other.url, users=("@_irc_.*",), exclusive=False, receive_ephemeral=True, namespaces={
        "users": [{"regex": "@alice:.*", "exclusive": False}]}))
    alice, bob, ghost = hs.client("alice"), hs.client("bob"), ghost_with_device(hs)
    upload(bob)                                              # in no room of a ghost
    room = alice.create_room(preset="public_chat")
    ghost.join(room)
    hs.settle()
    assert pushed(r, "org.matrix.msc3202.device_lists") == []
    upload(alice)
    hs.settle()
    assert pushed(r, "org.matrix.msc3202.device_lists") == [{"changed": [alice.user_id], "left": []}]
    alice.ask("POST", "logout")
    hs.settle()
    assert pushed(r, "org.matrix.msc3202.device_lists")[1:] == [{"changed": [alice.user_id], "left": []}]
    assert not any("msc3202" in body.decode() for _, body in other.transactions)


def test_a_change_of_devices_while_a_service_is_down_comes_after_a_restart(start, recorder, tmp_path):
    r = recorder()
    keys = {"database": str(tmp_path / "a.db")}
    hs = start(registration(url=r.url, **ENCRYPTING), **keys)
    alice, ghost = hs.client("alice"), ghost_with_device(hs)
    ghost.join(alice.create_room(preset="public_chat"))
    hs.settle()
    r.answers(500, {"errcode": "M_UNKNOWN"})
    alice.create_room(invite=[ghost.user_id])                # holds the line
    eventually(lambda: hs.waiting()["irc"])
    upload(alice)
    hs.stop()
    r.answers(200)
    start(registration(url=r.url, **ENCRYPTING), **keys).settle()
    assert pushed(r, "org.matrix.msc3202.device_lists") == [{"changed": [alice.user_id], "left": []}]


# -- Calling: the older paths.

@pytest.mark.parametrize("status,body,falls_back", [
    (404, {}, True), (405, b"", True), (500, b"no", True), (501, {}, True), (404, {"errcode": "M_UNRECOGNIZED"}, True), (404, {"errcode": "M_NOT_FOUND"}, False),
    (500, {"errcode": "M_UNKNOWN"}, False), (401, {}, False), (403, {}, False), (503, {}, False), (400, {}, False)])
def test_the_older_path_is_tried_at_once_where_the_new_one_is_not_known(start, recorder, status, body, falls_back):
    r = recorder(legacy(status, body))
    hs = start(registration(url=r.url, rooms=["!.*"]))
    hs.client("alice").create_room()
    if falls_back:
        hs.settle()
        (new_id, sent), (old_id, again) = r.transactions[:2]
        assert r.requests[1][1] == f"/transactions/{new_id}" and (new_id, sent) == (old_id, again)
        assert r.requests[1][2]["authorization"] == "Bearer hs-irc"
    else:
        eventually(lambda: hs.delivery.worker("irc").failures)
        assert len(r.requests) == 1


def test_the_new_path_comes_first_every_time(start, recorder):
    r = recorder(legacy(404, {}))
    hs = start(registration(url=r.url, rooms=["!.*"]))
    alice = hs.client("alice")
    room = alice.create_room()
    hs.settle()
    count = len(r.requests)
    alice.say(room, "x")
    hs.settle()
    assert "/_matrix/app/v1/" in r.requests[count][1] and "/_matrix/app/v1/" not in r.requests[count + 1][1]


def test_a_200_of_the_older_path_counts_with_a_json_body_only(start, recorder):
    r = recorder(legacy(404, {}, 200, b"<html>welcome"))
    hs = start(registration(url=r.url, rooms=["!.*"]))
    hs.client("alice").create_room()
    eventually(lambda: hs.delivery.worker("irc").failures)
    assert len(r.requests) == 2 and hs.waiting()


@pytest.mark.parametrize("kind", ["users", "rooms"])
def test_a_query_falls_back_to_the_older_path_too(start, recorder, kind):
    r = recorder()
    hs = start(registration(url=r.url))
    create = creates_what_is_asked_for(hs)
    r.answer = lambda request, body: (404, b"") if request.path.startswith("/_matrix") else create(request, body)
    alice = hs.client("alice")
    assert alice.profile("@_irc_x:localhost") if kind == "users" else alice.resolve("#_irc_x:localhost")
    assert queries(r) == [f"{kind}/{'@' if kind == 'users' else '#'}_irc_x:localhost", f"/{kind}/{'@' if kind == 'users' else '#'}_irc_x:localhost"]


# -- Asking: pings.

def test_a_ping_goes_both_ways_and_tells_how_long_it_took(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    answer = bot_of(hs).call("POST", PING, {"transaction_id": "meow"})
    assert answer.keys() == {"duration_ms"} and 0 <= answer["duration_ms"] < 5000
    method, where, headers, _, body = r.requests[0]
    assert (method, where, json.loads(body)) == ("POST", "/_matrix/app/v1/ping", {"transaction_id": "meow"}) and headers["authorization"] == "Bearer hs-irc"
    assert ask(hs, "POST", PING, "as-irc", b"")[0] == 200 and r.requests[1][4] == b"{}"


def test_a_ping_that_is_answered_with_an_error_tells_status_and_body(start, recorder):
    r = recorder(403, b'{"errcode": "M_FORBIDDEN"}')
    status, answer = ask(start(registration(url=r.url)), "POST", PING, "as-irc", {})
    assert (status, answer["errcode"], answer["status"], answer["body"]) == (502, "M_BAD_STATUS", 403, '{"errcode": "M_FORBIDDEN"}')
    assert len(r.requests) == 1 and "hs_token" in answer["error"] and "hs-irc" not in answer["error"]


def test_a_ping_that_reaches_nobody_failed_to_connect(start):
    with refused("M_CONNECTION_FAILED", 502, "nothing listens"):
        bot_of(start(registration(url=nowhere()))).call("POST", PING, {})


def test_a_ping_that_is_not_answered_in_time_timed_out(start):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        hs = start(registration(url=f"http://127.0.0.1:{silent.getsockname()[1]}"), query_timeout_ms=50)
        with refused("M_CONNECTION_TIMEOUT", 504):
            bot_of(hs).call("POST", PING, {})


def test_a_ping_without_a_url_says_so(start):
    with refused("M_URL_NOT_SET", 400):
        bot_of(start(registration())).call("POST", PING, {})


def test_a_ping_is_for_the_service_itself(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url), registration("other", r.url))
    for client in (bot_of(hs, "other"), hs.client("alice")):
        with refused("M_FORBIDDEN", 403):
            client.call("POST", PING, {})
    assert ask(hs, "POST", PING, body={})[1]["errcode"] == "M_MISSING_TOKEN" and ask(hs, "POST", PING, "x", {})[1]["errcode"] == "M_UNKNOWN_TOKEN"
    assert not r.requests


# -- Asking: for users and aliases.

@pytest.mark.parametrize("verb", ["invite", "create_room", "profile", "displayname", "keys"])
def test_an_unknown_ghost_is_asked_for_and_the_caller_waits_until_it_is_created(start, recorder, verb):
    r = recorder()
    hs = start(registration(url=r.url))
    r.answer = creates_what_is_asked_for(hs)
    alice, ghost = hs.client("alice"), "@_irc_new:localhost"
    answer = {"invite": lambda: alice.invite(alice.create_room(), ghost), "create_room": lambda: alice.create_room(invite=[ghost]),
              "profile": lambda: alice.profile(ghost), "displayname": lambda: alice.call("GET", path("profile", ghost, "displayname")),
              "keys": lambda: alice.call("POST", V3 + "/keys/query", {"device_keys": {ghost: []}})}[verb]()
    assert queries(r) == [f"users/{ghost}"] and ghost in hs.world.store.users
    assert r.requests[0][2]["authorization"] == "Bearer hs-irc" and r.requests[0][3] == {"access_token": "hs-irc"}
    if verb in ("profile", "displayname"):
        assert answer == {"displayname": "_irc_new"}


def test_what_comes_while_it_is_asked_for_is_found_whatever_the_service_answers(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    create = creates_what_is_asked_for(hs)
    r.answer = lambda request, body: (create(request, body), (404, {"errcode": "M_NOT_FOUND"}))[1]
    alice = hs.client("alice")
    assert alice.resolve("#_irc_x:localhost")[:1] == "!" and alice.profile("@_irc_bob:localhost")["displayname"] == "_irc_bob"
    assert len(queries(r)) == 2


@pytest.mark.parametrize("verb", ["join", "resolve"])
def test_an_unknown_alias_is_asked_for_and_the_caller_waits_until_the_room_is_created(start, recorder, verb):
    r = recorder()
    hs = start(registration(url=r.url))
    r.answer = creates_what_is_asked_for(hs)
    room = getattr(hs.client("alice"), verb)("#_irc_Läb/or:localhost")
    assert room.startswith("!") and queries(r) == ["rooms/#_irc_Läb/or:localhost"]


def test_what_exists_or_lies_outside_is_not_asked_for(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    alice, bob = hs.client("alice"), acting(hs, "irc", "@_irc_bob:localhost")
    room = bob.create_room(room_alias_name="_irc_x", preset="public_chat")
    alice.join("#_irc_x:localhost")
    alice.profile("@_irc_bob:localhost"), alice.profile("@_irc_bot:localhost"), alice.resolve("#_irc_x:localhost")
    alice.call("POST", V3 + "/keys/query", {"device_keys": {"@_irc_bob:localhost": [], "@_irc_z:elsewhere.org": []}})
    for look in (lambda: alice.profile("@nobody:localhost"), lambda: alice.profile("@_irc_x:elsewhere.org"), lambda: alice.resolve("#nothing:localhost"),
                 lambda: alice.resolve("#_irc_x:elsewhere.org")):
        with refused("M_NOT_FOUND", 404):
            look()
    assert not queries(r)


@pytest.mark.parametrize("look", [lambda client: client.profile("@_irc_x:localhost"), lambda client: client.resolve("#_irc_x:localhost"),
                                  lambda client: client.join("#_irc_x:localhost")])
def test_a_404_to_a_question_is_a_404_for_who_asked_at_once(start, recorder, look):
    r = recorder(404, {"errcode": "M_NOT_FOUND"})
    with refused("M_NOT_FOUND", 404):
        look(start(registration(url=r.url)).client("alice"))
    assert len(queries(r)) == 1


@pytest.mark.parametrize("look", [lambda client: client.profile("@_irc_x:localhost"), lambda client: client.join("#_irc_x:localhost")])
def test_a_200_to_a_question_creates_nothing_by_itself_and_the_log_says_so(start, recorder, caplog, look):
    hs = start(registration(url=recorder().url))
    with refused("M_NOT_FOUND", 404):
        look(hs.client("alice"))
    assert [record.message for record in caplog.records if "as if it had created it, but it has not" in record.message and "application service irc was asked" in record.message]


@pytest.mark.parametrize("look", [lambda client: client.profile("@_irc_x:localhost"), lambda client: client.join("#_irc_x:localhost")])
def test_a_question_without_an_answer_is_asked_again_and_is_then_a_408_for_who_asked(start, recorder, look):
    r = recorder(503)
    hs = start(registration(url=r.url))
    with background(look, hs.client("alice")) as future:
        wound_on(hs, future)
        with refused("M_UNKNOWN", 408, "'irc'"):
            future.result()
    assert len(queries(r)) == 3


@pytest.mark.parametrize("status,answer", [(200, b"["), (200, b"\xff\0"), (200, b"null"), (200, b"[" * 100_000), (404, b"\xff"), (404, b"[]"), (404, {"errcode": 5, "error": ["x"]})])
def test_an_answer_to_a_query_is_its_status_whatever_its_body_says(start, recorder, status, answer):
    r = recorder()
    hs = start(registration(url=r.url))
    r.answers(status, answer)
    assert ask(hs, "GET", f"{V3}/profile/@_irc_bob:localhost", hs.client("alice").token) == (404, {"errcode": "M_NOT_FOUND", "error": "there is no user @_irc_bob:localhost"})
    assert ask(hs, "POST", PING, "as-irc", {})[0] == (200 if status == 200 else 502)


def test_a_service_that_comes_back_while_it_is_asked_is_not_missed(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    create = creates_what_is_asked_for(hs)
    r.answer = lambda request, body: create(request, body) if len(r.requests) > 1 else (503, {})
    with background(hs.client("alice").resolve, "#_irc_x:localhost") as future:
        wound_on(hs, future)
        assert future.result().startswith("!")


def test_an_invitation_asks_once_and_does_not_wait_for_a_service_that_is_down(start):
    hs = start(registration(url=nowhere()))
    alice = hs.client("alice")
    room = alice.create_room()
    alice.invite(room, "@_irc_x:localhost")
    assert alice.state(room, "m.room.member", "@_irc_x:localhost")["membership"] == "invite"


def test_equal_questions_in_flight_are_shared(start, recorder):
    r, go = recorder(), threading.Event()
    hs = start(registration(url=r.url))
    create = creates_what_is_asked_for(hs)
    r.answer = lambda request, body: (go.wait(10), create(request, body))[1]
    clients = [hs.client(f"p{i}") for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.resolve, "#_irc_x:localhost") for client in clients]
        eventually(lambda: sum(connection.idle_since is None for connection in hs._server.connections) == 4)
        go.set()
        assert len({future.result(5) for future in futures}) == 1
    assert len(queries(r)) == 1


def test_those_who_are_invited_to_a_new_room_are_asked_for_at_the_same_time_and_only_so_many(start, recorder):
    service, all_here = recorder(), threading.Barrier(asbridge.MAX_ASKED)
    def answer(request, body):
        if "/users/" in request.path:
            all_here.wait(5)
        return 404, {"errcode": "M_NOT_FOUND"}
    service.answer = answer
    alice = start(registration(url=service.url)).client("alice")
    alice.create_room(invite=[f"@_irc_{n}:localhost" for n in range(asbridge.MAX_ASKED + 20)])
    assert len({where for _, where, *_ in service.requests if "/users/" in where}) == asbridge.MAX_ASKED


def test_a_service_is_never_asked_about_its_own_and_others_are(start, recorder):
    r, other = recorder(), recorder()
    other.answers(404, {"errcode": "M_NOT_FOUND"})
    hs = start(registration(url=r.url, exclusive=False), registration("other", other.url, users=["@_irc_.*"], aliases=["#_irc_.*"], exclusive=False))
    for look in (lambda: bot_of(hs).profile("@_irc_x:localhost"), lambda: bot_of(hs).resolve("#_irc_x:localhost"), lambda: bot_of(hs).join("#_irc_x:localhost")):
        with refused("M_NOT_FOUND", 404):
            look()
    assert not queries(r) and queries(other) == ["users/@_irc_x:localhost", "rooms/#_irc_x:localhost", "rooms/#_irc_x:localhost"]


def test_a_session_of_a_ghost_never_makes_its_own_service_be_asked(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    acting(hs, "irc", "@_irc_bob:localhost")
    token = hs.api.accounts.login_ghost(hs.world.registrations.by_id["irc"], "_irc_bob")["access_token"]
    with refused("M_NOT_FOUND", 404):
        asbridge.Client(hs.url, token).profile("@_irc_other:localhost")
    assert r.requests == []


def test_if_the_first_of_two_services_is_down_the_second_is_asked(start, recorder):
    r = recorder(404, {"errcode": "M_NOT_FOUND"})
    down = registration("down", nowhere(), users=["@_irc_.*"], exclusive=False)
    hs = start(down, registration("up", r.url, users=["@_irc_.*"], exclusive=False), query_timeout_ms=100)
    with background(hs.client("alice").profile, "@_irc_x:localhost") as future:
        wound_on(hs, future)
    with pytest.raises(MatrixError):
        future.result()
    assert len(r.requests) == 1


def test_a_question_holds_up_nothing_else(start, recorder):
    r, go = recorder(), threading.Event()
    r.answer = lambda request, body: (go.wait(10), (404, {}))[1]
    hs = start(registration(url=r.url))
    alice, bob = hs.client("alice"), hs.client("bob")
    with background(alice.resolve, "#_irc_x:localhost") as future:
        eventually(lambda: r.requests)
        assert bob.say(bob.create_room(), "meanwhile") and not future.done()
        go.set()
        with refused("M_NOT_FOUND", 404):
            future.result(5)


def test_two_services_that_ask_about_each_other_do_not_ask_for_ever(start, recorder):
    one, two = recorder(), recorder()
    hs = start(registration("one", one.url, users=["@one_.*"]), registration("two", two.url, users=["@two_.*"]))
    for mine, id, other in ((one, "one", "@two_x:localhost"), (two, "two", "@one_x:localhost")):
        def answer(request, body, id=id, other=other):
            with contextlib.suppress(MatrixError):
                hs.appservice(id).profile(other)
            return 404, {"errcode": "M_NOT_FOUND"}
        mine.answer = answer
    with refused("M_NOT_FOUND", 404):
        hs.client("alice").profile("@one_x:localhost")
    assert len(one.requests) + len(two.requests) < 10


def test_what_a_service_answers_does_not_carry_its_token_to_a_client(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url), query_timeout_ms=200)
    r.answer = lambda request, body: (500, f"error at {request.path}?access_token=hs-irc".encode())
    with background(hs.client("alice").profile, "@_irc_x:localhost") as future:
        wound_on(hs, future)
    with pytest.raises(MatrixError) as caught:
        future.result()
    assert caught.value.status == 408 and "hs-irc" not in caught.value.error


def test_what_is_asked_of_several_at_once_is_asked_one_after_the_other_where_there_is_no_thread(monkeypatch):
    no_threads_named(monkeypatch, "")
    assert asbridge.at_once(lambda n: n * n, [1, 2, 3]) == [1, 4, 9]


# -- Asking: for third-party networks.

def look_ups(recorder):
    return [(path.partition("/thirdparty/")[2], query) for _, path, _, query, _ in recorder.requests if "/thirdparty/" in path]


def test_the_protocols_of_all_services_are_listed_with_their_instances_joined(start, recorder, caplog):
    one = network(recorder, protocol_irc=IRC_PROTOCOL)
    two = network(recorder, protocol_irc={**IRC_PROTOCOL, "icon": "mxc://x/other", "instances": [{"network_id": "oftc"}]}, **{"protocol_x/y": None},
                  protocol_sms={"instances": [], "icon": None})
    hs = start(registration("one", one.url, protocols=["irc", "irc"]), registration("two", two.url, users=["@t.*"], aliases=[], protocols=["irc", "sms"]),
               registration("three", None, users=["@u.*"], aliases=[], protocols=["irc"]))
    alice = hs.client("alice")
    instances = [{**IRC_PROTOCOL["instances"][0], "instance_id": "one|libera"}, {"network_id": "oftc", "instance_id": "two|oftc"}]
    assert third_party(alice, "protocols") == {"irc": {**IRC_PROTOCOL, "instances": instances}, "sms": {"instances": [], "icon": None}}
    assert third_party(alice, "protocol", "irc") == {**IRC_PROTOCOL, "instances": instances}
    assert look_ups(one) == [("protocol/irc", {"access_token": "hs-one"})]
    assert one.requests[0][2]["authorization"] == "Bearer hs-one"
    with refused("M_NOT_FOUND", 404, "xmpp"):
        third_party(alice, "protocol", "xmpp")
    assert not [record for record in caplog.records if "third-party" in record.message]       # nobody without a url is asked


def test_what_is_known_of_a_protocol_is_asked_for_again_after_a_minute_and_after_reading_the_registrations(start, recorder):
    r = network(recorder, protocol_irc=IRC_PROTOCOL)
    hs = start(registration(url=r.url, protocols=["irc"]))
    alice = hs.client("alice")
    for asked, then in ((1, lambda: None), (1, lambda: hs.advance(61)), (2, hs.reload), (3, lambda: None)):
        assert third_party(alice, "protocols")["irc"]["instances"][0]["instance_id"] == "irc|libera" and len(look_ups(r)) == asked
        then()
    r.answers(404, {"errcode": "M_NOT_FOUND"})
    hs.advance(61)
    assert third_party(alice, "protocols") == {}


def test_the_services_of_a_protocol_are_asked_with_the_fields_and_their_answers_are_joined(start, recorder):
    bobs = [{"userid": f"@{id}_bob:localhost", "protocol": "irc", "fields": {"nickname": "bob"}} for id in ("one", "two")]
    tea = {"alias": "#one_tea:localhost", "protocol": "irc", "fields": {"channel": "#tea"}}
    one, two = network(recorder, user_irc=bobs[:1], location_irc=[tea]), network(recorder, user_irc=bobs[1:])
    other = network(recorder)
    hs = start(*(registration(id, r.url, users=[f"@{id}_.*"], aliases=[], protocols=[protocol])
                 for id, r, protocol in (("one", one, "irc"), ("two", two, "irc"), ("three", other, "sms"))))
    alice = hs.client("alice")
    fields = {"nickname": "bob ü&=", "user_id": "5"}
    assert third_party(alice, "user", "irc", **fields) == bobs and third_party(alice, "location", "irc", channel="#tea") == [tea]
    assert ask(hs, "GET", f"{V3}/thirdparty/location/irc?channel=%23tea&access_token={alice.token}") == (200, [tea])
    assert look_ups(one)[0] == ("user/irc", {**fields, "access_token": "hs-one"}) and not look_ups(other)
    assert look_ups(one)[2] == ("location/irc", {"channel": "#tea", "access_token": "hs-one"})
    for where, text in ((("user", "sms"), "asked: three"), (("location", "xmpp"), "none declares")):
        with refused("M_NOT_FOUND", 404, text):
            third_party(alice, *where)


def test_a_reverse_look_up_asks_every_service_with_a_protocol(start, recorder, caplog):
    bob = {"userid": "@irc_bob:localhost", "protocol": "irc", "fields": {"nickname": "bob"}}
    tea = {"alias": "#irc_tea:localhost", "protocol": "irc", "fields": {"channel": "#tea"}}
    one, two, three = network(recorder), network(recorder, user=[bob], location=[tea]), network(recorder, user=[bob])
    hs = start(registration("one", one.url, protocols=["x"]), registration("two", two.url, users=["@irc_.*"], aliases=[], protocols=["irc"]),
               registration("three", three.url, users=["@z.*"], aliases=[]))
    alice = hs.client("alice")
    assert third_party(alice, "user", userid=bob["userid"]) == [bob] and third_party(alice, "location", alias=tea["alias"]) == [tea]
    assert look_ups(one) == [("user", {"userid": bob["userid"], "access_token": "hs-one"}), ("location", {"alias": tea["alias"], "access_token": "hs-one"})]
    assert not look_ups(three)
    two.answer = one.answer
    for where, query in (("user", {"userid": "@irc_eve:localhost"}), ("location", {"alias": "#irc_none:localhost"})):
        with refused("M_NOT_FOUND", 404, "asked: one, two"):
            third_party(alice, where, **query)
    assert not [record for record in caplog.records if "third-party" in record.message]       # 404 is an answer


@pytest.mark.parametrize("where,errcode", [("user", "M_MISSING_PARAM"), ("location", "M_MISSING_PARAM"), ("user?userid=bob", "M_INVALID_PARAM"), ("user/?userid=", "M_INVALID_PARAM"),
                                           ("location?alias=@a:b", "M_INVALID_PARAM"), ("room", "M_UNRECOGNIZED"), ("protocol", "M_UNRECOGNIZED")])
def test_a_look_up_of_nothing_is_refused(hs, where, errcode):
    assert ask(hs, "GET", f"{V3}/thirdparty/{where}", hs.client("alice").token)[1]["errcode"] == errcode
    assert ask(hs, "GET", f"{V3}/thirdparty/protocols")[1]["errcode"] == "M_MISSING_TOKEN"


def test_a_look_up_falls_back_to_the_unstable_path(start, recorder):
    r = recorder(lambda request, body: (200, IRC_PROTOCOL) if "/unstable/" in request.path else (404, {"errcode": "M_UNRECOGNIZED"}))
    hs = start(registration(url=r.url, protocols=["irc"]))
    assert set(third_party(hs.client("alice"), "protocols")) == {"irc"}
    r.answer = lambda request, body: (200, [{"userid": "@a:b", "protocol": "irc", "fields": {}}]) if "/unstable/" in request.path else (404, b"")
    assert third_party(hs.client("alice2"), "user", "irc", nickname="a")[0]["userid"] == "@a:b"
    assert r.requests[-1][1] == "/_matrix/app/unstable/thirdparty/user/irc" and r.requests[-1][3] == {"nickname": "a", "access_token": "hs-irc"}


def test_a_service_is_not_asked_about_its_own_network_while_it_waits(start, recorder):
    bob = {"userid": "@two_bob:localhost", "protocol": "irc", "fields": {}}
    one, two = network(recorder, protocol_irc=IRC_PROTOCOL, user_irc=[bob]), network(recorder, protocol_irc=IRC_PROTOCOL, user_irc=[bob])
    hs = start(registration("one", one.url, users=["@one_.*"], protocols=["irc"]), registration("two", two.url, users=["@two_.*"], aliases=[], protocols=["irc"]))
    def instances(client):
        return [one["instance_id"] for one in third_party(client, "protocols")["irc"]["instances"]]
    ghost = acting(hs, "one", "@one_x:localhost")
    ghost.ask("PUT", "devices", "D", body={})
    ghost.call = functools.partial(ghost.call, device_id="D")
    assert instances(ghost) == ["two|libera"] and third_party(ghost, "user", "irc", nickname="bob") == [bob]
    assert not look_ups(one) and look_ups(two)[-1] == ("user/irc", {"nickname": "bob", "access_token": "hs-two"})      # without user_id
    assert instances(hs.client("alice")) == ["one|libera", "two|libera"]
    assert instances(hs.appservice("one")) == ["one|libera", "two|libera"]             # what is known needs no question


@pytest.mark.parametrize("garbage", [500, 403, b"no json", b"", b"[]", b"5", b"null", b"NaN", b'"irc"', b"{}", {"instances": {}}, {"instances": [5]}, {"instances": [{}]}, {"instances": [{"network_id": 5}]},
                                     {"instances": [], "icon": 5}, {"instances": [], "user_fields": {}}, {"instances": [], "x": float("inf")}])
def test_a_service_that_fails_or_tells_nonsense_of_a_protocol_is_left_out(start, recorder, caplog, garbage):
    bad, good = network(recorder, protocol_irc=garbage), network(recorder, protocol_irc=IRC_PROTOCOL)
    hs = start(registration("bad", bad.url, protocols=["irc"]), registration("good", good.url, users=["@g.*"], aliases=[], protocols=["irc"]))
    found = third_party(hs.client("alice"), "protocols")
    assert [one["instance_id"] for one in found["irc"]["instances"]] == ["good|libera"]
    assert [record.args[0] for record in caplog.records if "third-party" in record.message] == ["bad"]


@pytest.mark.parametrize("garbage", [500, b"no json", b"5", {}, [{}], [5], [{"userid": 5, "protocol": "irc", "fields": {}}], [{"userid": "@a:b", "protocol": "irc"}],
                                     [{"userid": "@a:b", "protocol": None, "fields": {}}], [{"userid": "@a:b", "protocol": "irc", "fields": []}]])
def test_a_service_that_fails_or_tells_nonsense_of_a_user_is_left_out(start, recorder, caplog, garbage):
    bob = {"userid": "@g_bob:localhost", "protocol": "irc", "fields": {"nickname": "bob"}}
    bad, good = network(recorder, user_irc=garbage), network(recorder, user_irc=[bob])
    hs = start(registration("bad", bad.url, protocols=["irc"]), registration("good", good.url, users=["@g.*"], aliases=[], protocols=["irc"]))
    assert third_party(hs.client("alice"), "user", "irc") == [bob]
    assert [record.args[0] for record in caplog.records if "third-party" in record.message] == ["bad"]


def test_of_a_list_of_users_the_entries_that_are_none_are_left_out_and_the_others_told(start, recorder, caplog):
    bobs = [{"userid": f"@_irc_{name}:localhost", "protocol": "irc", "fields": {"nickname": name}} for name in ("bob", "rob")]
    hs = start(registration(url=network(recorder, user_irc=[bobs[0], {"userid": 5}, None, bobs[1]]).url, protocols=["irc"]))
    assert third_party(hs.client("alice"), "user", "irc") == bobs
    assert ["only a part can be used" in record.message for record in caplog.records if "third-party" in record.message] == [True]


def test_several_services_that_do_not_answer_cost_one_deadline(start, recorder):
    go = threading.Event()
    dead = [recorder() for _ in range(4)]
    for r in dead:
        r.answer = lambda request, body: (go.wait(20), (200, []))[1]
    good = network(recorder, protocol_irc=IRC_PROTOCOL)
    hs = start(*(registration(f"as{n}", r.url, users=[f"@{n}_.*"], aliases=[], protocols=["irc"]) for n, r in enumerate([*dead, good])), query_timeout_ms=400)
    began = time.monotonic()
    assert third_party(hs.client("alice"), "protocols")["irc"]["instances"][0]["instance_id"] == "as4|libera"
    assert time.monotonic() - began < 1.5
    go.set()


OTHERS = [b"", b"[" * 100_000, b"NaN", b"1e400", b'"\\ud800"', b"\xff\xfe[\0]\0", b'[{"userid":"@a:b","protocol":"irc","fields":{"' + b"k" * 1_000_000 + b'":1}}]']     # answers that are no value of a wrong type


def test_no_value_of_a_wrong_type_in_the_answers_of_a_service_makes_the_homeserver_fail(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, protocols=["irc"]))
    alice, client = hs.client("alice"), asbridge.HttpClient(hs.url)
    people = [{"userid": "@_irc_bob:localhost", "protocol": "irc", "fields": {"nickname": "bob"}}]
    places = [{"alias": "#_irc_x:localhost", "protocol": "irc", "fields": {"channel": "#x"}}]
    for where, right in (("protocols", IRC_PROTOCOL), ("user/irc", people), ("location/irc", places), ("user?userid=@_irc_bob:localhost", people)):
        for answer in (*WRONG, *some(mutations(right)), *OTHERS):
            r.answer = lambda request, body, answer=answer: (200, answer)
            hs.advance(61)                                   # what it said about a protocol is forgotten
            status, found = client.request("GET", f"{V3}/thirdparty/{where}", None, {"Authorization": f"Bearer {alice.token}"})
            assert status == 200 or (status, json.loads(found)["errcode"]) == (404, "M_NOT_FOUND"), (where, answer, status, found)
    client.close()


# -- What passes.

def test_the_trace_draws_each_exchange_as_two_arrows(linked, caplog):
    hs, r, alice, room = linked
    caplog.set_level("DEBUG", "asbridge.trace")
    hs.faults("irc").lose_ack()
    push_under_faults(hs, alice, room)
    bot_of(hs, "irc").whoami()
    with refused("M_FORBIDDEN"):
        acting(hs, "irc", "@carol:localhost", register=False).whoami()
    lines = [record.getMessage() for record in caplog.records if record.name == "asbridge.trace"]
    txn_id = r.transactions[0][0]
    number = r"[0-9.]+ ms"
    for line, regex in zip(lines, (
            rf"HS ---> irc        #[0-9]+ +PUT transactions/{txn_id}, 1 event, m.room.message of @alice:localhost, attempt 1",
            rf"HS <-/- irc        #[0-9]+ +200 in {number}; it answered, but the answer was lost on the way; fault: lose_ack; attempt 2 in 0.[45][0-9]* s",
            rf"HS ---> irc        #[0-9]+ +PUT transactions/{txn_id}, 1 event, m.room.message of @alice:localhost, attempt 2",
            rf"HS <--- irc        #[0-9]+ +200 in {number}",
            r"HS <--- irc        #[0-9]+ +GET /_matrix/client/v3/account/whoami as @_irc_bot:localhost",
            rf"HS ---> irc        #[0-9]+ +200 in {number}",
            r"HS <--- irc        #[0-9]+ +GET /_matrix/client/v3/account/whoami as @carol:localhost",
            rf"HS ---> irc        #[0-9]+ +403 in {number}"), strict=True):
        assert re.fullmatch(regex, line), (regex, line)


def test_a_stranger_can_not_write_a_line_of_the_trace_or_of_the_log(linked, caplog):
    hs, r, alice, room = linked
    caplog.set_level("DEBUG", "asbridge")
    r.answer = lambda request, body: (500, b"boom\nHS <--- irc 200 forged\x1b[2J") if "/transactions/" in request.path else (200, {})
    alice.send(room, "m.evil\nHS <--- irc #9 200 forged\x1b[31m", {})
    eventually(lambda: hs.delivery.worker("irc").failures)
    ask(hs, "GET", "/_matrix/client/v3/directory/room/%23_irc_%0A%1b[2J:localhost", "as-irc")
    messages = [record.getMessage() for record in caplog.records]
    assert any("forged" in message for message in messages) and not [message for message in messages if "\n" in message or "\x1b" in message]


def test_what_passes_is_kept_in_a_ring_and_comes_again_when_it_changes():
    wire = asbridge.Wire(asbridge.Clock())
    def one():
        return asbridge.Exchange(wire.number(), 5, "hs", "irc", "ping", "POST", "/x", {})
    first, second = wire.begin(one()), wire.begin(one())
    now, news = wire.since(0, 0)
    assert news == [first, second] and wire.since(now, 0) == (now, []) and first.n < first.seq < second.n < second.seq == now
    wire.end(first)
    assert wire.since(now, 0)[1] == [first] and first.seq > now and wire.since(now + 100, 0)[1] == [second, first]
    for _ in range(asbridge.KEPT_EXCHANGES):
        wire.whole(wire.number(), one)
    assert len(wire.since(0, 0)[1]) == asbridge.KEPT_EXCHANGES and wire.find(first.n) is None


def test_who_looks_for_what_passes_waits_until_something_does():
    wire, seen = asbridge.Wire(asbridge.Clock()), []
    looking = threading.Thread(target=lambda: seen.append(wire.since(0, 5)))
    looking.start()
    eventually(lambda: wire._bells)
    wire.begin(asbridge.Exchange(wire.number(), 5, "hs", "irc", "ping", "POST", "/x", {}))
    looking.join()
    assert seen[0][0] == 2 and len(seen[0][1]) == 1 and not wire._bells


# -- Faults.

@pytest.mark.parametrize("fault, more, came, statuses, error", [
    ("lose_ack",  {},                 2, [200, 200],  "the answer was lost"),
    ("refuse",    {},                 1, [None, 200], "nothing listens"),
    ("status",    {"status": 503},    1, [503, 200],  None),
    ("delay",     {"delay_ms": 5000}, 1, [200],       None),
    ("garbage",   {},                 1, [200],       None),
    ("duplicate", {},                 2, [200],       None),
])
def test_a_fault_happens_once_and_what_was_not_acknowledged_comes_again_the_same(linked, fault, more, came, statuses, error):
    hs, r, alice, room = linked
    getattr(hs.faults("irc"), fault)(**more)
    assert [one["fault"] for one in hs.faults("irc").told()] == [fault]
    push_under_faults(hs, alice, room)
    assert len(r.transactions) == came and len(set(r.transactions)) == 1 and hs.faults("irc").told() == []
    attempts = hs.transactions("irc")[-1]["attempts"]
    assert [one["status"] for one in attempts] == statuses and attempts[0]["fault"] == fault and (error or "") in (attempts[0]["error"] or "")
    assert attempts[-1]["fault"] is None or len(attempts) == 1
    push_under_faults(hs, alice, room)
    assert len(r.transactions) == came + 1 and len(hs.transactions("irc")[-1]["attempts"]) == 1


def test_a_fault_may_happen_some_times_on_queries_or_on_pings(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url))
    alice = hs.client("alice")
    hs.faults("irc").status(on="ping", status=418, times=2)
    hs.faults("irc").refuse(on="queries")
    hs.faults("irc").lose_ack(times=3)
    for _ in range(2):
        with refused("M_BAD_STATUS"):
            hs.delivery.ping(hs.delivery.registration("irc"), None)
    hs.delivery.ping(hs.delivery.registration("irc"), None)
    alice.create_room(invite=["@_irc_bob:localhost"])        # asks once
    assert [path for _, path, _, _, _ in r.requests if "/users/" in path] == []
    assert [one["fault"] for one in hs.faults("irc").told()] == ["lose_ack"]
    hs.faults("irc").clear()
    assert hs.faults("irc").told() == []


def test_a_fault_with_a_probability_and_a_seed_is_the_same_in_every_run():
    def drawn(seed):
        faults = asbridge.Faults()
        faults.lose_ack(probability=0.5, seed=seed)
        return [bool(faults.take("transaction")) for _ in range(50)]
    assert drawn(7) == drawn(7) != drawn(8) and 10 < sum(drawn(7)) < 40


@pytest.mark.parametrize("wrong", [{"fault": "explode"}, {"on": "mondays"}, {"times": 0}, {"probability": 0}, {"probability": 1.5}, {"delay_ms": -1}, {"status": 99}])
def test_a_fault_that_can_not_be_is_refused_and_changes_nothing(wrong):
    faults = asbridge.Faults()
    with refused("M_INVALID_PARAM", 400):
        faults.add(wrong.pop("fault", "refuse"), **wrong)
    assert faults.told() == []


@pytest.mark.parametrize("twice", [("lose_ack", "lose_ack"), ("status", "refuse")])
def test_of_two_faults_of_a_sort_one_acts_at_a_time(linked, twice):
    hs, r, alice, room = linked
    for fault in twice:
        hs.faults("irc").add(fault)
    push_under_faults(hs, alice, room)
    assert len(hs.transactions("irc")[-1]["attempts"]) == (3 if len(set(twice)) == 1 else 2)


def test_a_delay_as_long_as_an_answer_is_waited_for_is_no_answer(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url), push_timeout_ms=2000)
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    hs.faults("irc").delay(delay_ms=2000)
    push_under_faults(hs, bob, bob.create_room())
    first = hs.transactions("irc")[0]["attempts"]
    assert "did not answer in time" in first[0]["error"] and first[1]["status"] == 200


def test_garbage_does_not_acknowledge_what_was_refused(linked):
    hs, r, alice, room = linked
    r.answers(500, {"errcode": "M_UNKNOWN"})
    hs.faults("irc").garbage()
    alice.say(room, "x")
    eventually(lambda: hs.delivery.worker("irc").failures)
    assert hs.waiting() == {"irc": 1}


@pytest.mark.parametrize("fault, more, came", [("lose_ack", {}, 2), ("duplicate", {}, 2), ("delay", {"delay_ms": 100}, 1), ("garbage", {}, 1)])
def test_faults_are_the_same_for_a_service_that_knows_the_older_paths_only(linked, fault, more, came):
    hs, r, alice, room = linked
    r.answer = lambda request, body: (404, b"no") if request.path.startswith("/_matrix/app/v1") else (200, {})
    hs.faults("irc").add(fault, **more)
    push_under_faults(hs, alice, room)
    assert len([path for _, path, *_ in r.requests if path.startswith("/transactions/")]) == came and hs.transactions("irc")[-1]["acknowledged"]


@pytest.mark.parametrize("on", ["transactions", "queries"])
def test_what_a_fault_delays_is_not_sent_any_more_after_the_end(linked, monkeypatch, on):
    monkeypatch.setattr(asbridge.Delivery.stop, "__defaults__", (0.1,))
    hs, r, alice, room = linked
    hs.faults("irc").delay(on=on, delay_ms=9000)
    if on == "queries":
        with background(alice.profile, "@_irc_x:localhost") as asked:
            eventually(lambda: hs.delivery._lines)
            hs.stop()
            with pytest.raises((MatrixError, asbridge.Unreachable)):
                asked.result()
    else:
        alice.say(room, "x")
        eventually(lambda: hs.inspector.status()["appservices"][0]["open"])
        began = time.monotonic()
        hs.reset()
        assert time.monotonic() - began < 1
    assert not r.requests


# -- Levers: pause, retry, skip, replay.

def test_while_it_is_paused_nothing_is_pushed_and_then_all_of_it_in_order(linked):
    hs, r, alice, room = linked
    hs.pause("irc")
    for n in range(3):
        alice.say(room, str(n))
    hs.advance(1000)
    assert hs.inspector.status()["appservices"][0]["state"] == "paused" and not r.requests
    with pytest.raises(AssertionError, match="3 events for 'irc', paused"):
        hs.settle(0.05)
    hs.resume("irc")
    assert heard(hs, r) == ["0", "1", "2"]


def test_a_pause_outlives_a_change_of_the_registration(linked):
    hs, r, alice, room = linked
    hs.pause("irc")
    alice.say(room, "x")
    hs.reread = lambda: [asbridge.read_registration(registration(url=r.url, rooms=["!.*"], users=["@other_.*"], exclusive=False), "here")]
    assert hs.reload() == ["changed 'irc'"]
    hs.advance(100)
    assert hs.inspector.status()["appservices"][0]["state"] == "paused" and not r.requests
    hs.resume("irc")
    assert heard(hs, r) == ["x"]


def test_a_retry_ends_the_backoff(linked):
    hs, r, alice, room = linked
    hs.faults("irc").refuse()
    alice.say(room, "x")
    one = eventually(lambda: hs.inspector.status()["appservices"][0]["state"] == "backing off" and hs.inspector.status()["appservices"][0])
    assert one["failures"] == 1 and one["down_since"] and one["next_attempt"] > one["down_since"] and one["open"]["events"] == 1
    hs.retry("irc")
    assert heard(hs, r) == ["x"] and eventually(lambda: hs.inspector.status()["appservices"][0]["down_since"] is None)


def test_a_retry_while_an_attempt_is_under_way_counts_for_the_next(linked):
    hs, r, alice, room = linked
    go = threading.Event()
    r.answer = lambda request, body: (go.wait(20), (503, {}))[1] if len(r.transactions) == 1 else (200, {})
    alice.say(room, "x")
    eventually(lambda: r.transactions)
    hs.retry("irc")
    go.set()
    hs.settle(0.4)                                           # the backoff would be longer
    assert len(r.transactions) == 2


def test_a_transaction_that_is_refused_for_ever_can_be_skipped(linked):
    hs, r, alice, room = linked
    hs.faults("irc").status(times=1)
    alice.say(room, "poison")
    eventually(lambda: hs.delivery.worker("irc").failures)
    alice.say(room, "after")
    opened = hs.inspector.status()["appservices"][0]["open"]["txn_id"]
    assert hs.skip("irc") == opened
    assert heard(hs, r) == ["after"]
    with refused("M_NOT_FOUND", 404, "no transaction is open"):
        hs.skip("irc")
    alice.say(room, "again")
    assert heard(hs, r) == ["after", "again"]


def test_a_transaction_that_is_skipped_while_it_is_under_way_delays_the_next_in_no_way(linked):
    hs, r, alice, room = linked
    go = threading.Event()
    r.answer = lambda request, body: (200, {}) if b"after" in body else (go.wait(20), (503, {}))[1]
    alice.say(room, "stuck")
    eventually(lambda: r.transactions)
    alice.say(room, "after")
    hs.skip("irc")
    hs.settle(3)
    assert r.texts()[-1] == "after" and hs.transactions("irc")[-1]["attempts"][0]["status"] == 200
    go.set()
    assert hs.delivery.worker("irc").failures == 0


def test_a_replay_sends_the_same_bytes_with_the_same_id_or_with_a_new_one(linked):
    hs, r, alice, room = linked
    alice.say(room, "x")
    hs.settle()
    first = r.transactions[-1]
    assert hs.replay("irc") == first[0]
    hs.settle()
    assert r.transactions == [first, first] and len(hs.transactions("irc")[-1]["attempts"]) == 2
    new = hs.replay("irc", first[0], new_id=True)
    hs.settle()
    assert int(new) > int(first[0]) and r.transactions[-1] == (new, first[1]) and hs.transactions("irc")[-1]["acknowledged"]
    alice.say(room, "y")
    hs.settle()
    assert len(r.transactions) == 4 and r.texts()[-1] == "y" and int(r.transactions[-1][0]) > int(new)
    with refused("M_NOT_FOUND", 404):
        hs.replay("irc", "17")
    hs.pause("irc")
    alice.say(room, "z")
    with refused("M_UNKNOWN", 409, "is open"):
        hs.replay("irc")
    hs.resume("irc")
    hs.settle()


def test_a_replay_survives_a_restart(start, recorder, tmp_path):
    r, database = recorder(), str(tmp_path / "hs.db")
    hs = start(registration(url=r.url), database=database)
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    bob.say(bob.create_room(), "x")
    hs.settle()
    hs.pause("irc")
    sent = r.transactions[-1]
    new = hs.replay("irc", new_id=True)
    hs.stop()
    hs = start(registration(url=r.url), database=database)
    hs.settle()
    assert r.transactions[-1] == (new, sent[1])


@pytest.mark.parametrize("lever", ["pause", "resume", "retry", "skip", "replay", "faults"])
def test_a_lever_for_an_unknown_service_names_those_that_there_are(hs, lever):
    with refused("M_NOT_FOUND", 404, "only irc"):
        getattr(hs, lever)("nobody")
    if lever != "faults":
        with refused("M_URL_NOT_SET", 400):
            getattr(hs, lever)("irc")


# -- Everything at once, and registrations that are read again while things wait.

def to_device_of(r):
    return [message["content"]["n"] for part in pushed(r, "de.sorunome.msc2409.to_device") for message in part]


class Everything:
    """A homeserver, a person and a ghost with a device in one room, and all that can be pushed to the service of the ghost."""

    def __init__(self, start, data, keys):
        self.restart_with = lambda: start(data, **keys)
        self.hs = self.restart_with()
        self.alice, self.ghost = self.hs.client("alice"), ghost_with_device(self.hs)
        self.room = self.alice.create_room(preset="public_chat")
        self.ghost.join(self.room)
        self.ghost.ask("POST", "keys", "upload", body={"device_keys": device_keys(self.ghost), "one_time_keys": {f"signed_curve25519:{n}": {} for n in range(50)}})
        self.said, self.sent, self.claimed, self.changes, self.last = [], [], 0, 0, ""

    def say(self, n):
        self.last = self.alice.say(self.room, str(n))
        self.said.append(str(n))

    def message(self, n):
        self.alice.ask("PUT", "sendToDevice", "m.x", f"{n}", body={"messages": {self.ghost.user_id: {"*": {"n": n}}}})
        self.sent.append(n)

    def claim(self, n):
        claim(self.alice, self.ghost)
        self.claimed += 1

    def keys(self, n):
        upload(self.alice, change=n)
        self.changes += 1

    def typing(self, n):
        self.alice.typing(self.room, bool(n % 2))

    def receipt(self, n):
        if self.last:
            self.alice.receipt(self.room, self.last)

    def restart(self, n):
        self.hs.stop()
        self.hs = self.restart_with()
        for client in (self.alice, self.ghost):
            client.close()
            client.url = self.hs.url

    def check_all_came_once(self, r):
        came, event_ids = r.transactions, ids(r.events)
        assert all(len({body for id, body in came if id == txn_id}) == 1 for txn_id, _ in came) and len(came) > len(dict(came))
        assert [id for id, _ in came] == sorted([id for id, _ in came], key=int)        # the next one after the acknowledgement only
        assert r.texts() == self.said and len(set(event_ids)) == len(event_ids) and to_device_of(r) == self.sent

    def check_keys_and_receipts(self, r):
        counts = [part[self.ghost.user_id]["GHOST"]["signed_curve25519"] for part in pushed(r, "org.matrix.msc3202.device_one_time_keys_count") if self.ghost.user_id in part]
        counts = list(itertools.dropwhile(lambda count: not count, counts))  # before it had uploaded any
        assert counts[-1] == 50 - self.claimed and counts == sorted(counts, reverse=True)
        lists = pushed(r, "org.matrix.msc3202.device_lists")
        assert {self.alice.user_id} <= {user for part in lists for user in part["changed"]} and len(lists) <= self.changes + 1
        assert [data["content"] for data in ephemeral_of(r) if data["type"] == "m.receipt"]


@pytest.mark.parametrize("seed", range(2))
def test_with_everything_at_once_each_transaction_keeps_its_bytes_and_all_comes_once_and_in_order_over_restarts(start, recorder, tmp_path, seed):
    rnd = random.Random(seed)

    def unreliable(request, body):
        fate = rnd.random()
        if fate < 0.3:
            raise ConnectionError                            # it was taken, but the answer gets lost
        return (500, {"errcode": "M_UNKNOWN"}) if fate < 0.5 else (200, {})
    r = recorder(unreliable)
    it = Everything(start, registration(url=r.url, **ENCRYPTING), {"database": str(tmp_path / "a.db"), "retry_first_ms": 1, "retry_max_ms": 3})
    for n in range(90):
        getattr(it, rnd.choice(["say", "say", "message", "message", "claim", "keys", "typing", "receipt", "restart" if n % 10 == 0 else "say"]))(n)
    r.answers(200)
    it.hs.settle()
    it.check_all_came_once(r)
    it.check_keys_and_receipts(r)


def test_ephemeral_data_that_waits_survives_a_commit_that_fails(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], receive_ephemeral=True), retry_first_ms=1, retry_max_ms=3)
    alice = hs.client("alice")
    room = alice.create_room()
    hs.settle()
    gate, db = threading.Event(), FaultyDb(hs.world.store._tx.db, "COMMIT", 0)
    hs.world.store._tx.db = db

    def answer(request, body):
        if not gate.is_set():
            gate.wait(5)
            db.times = 1                                     # the acknowledgement can't be stored at first
        return 200, {}
    r.answer = answer
    event_id = alice.say(room, "x")
    alice.receipt(room, event_id)
    gate.set()
    hs.settle()
    assert [list(data["content"]) for data in ephemeral_of(r) if data["type"] == "m.receipt"] == [[event_id]]


class Reloading:
    """A homeserver whose one registration changes: an application service with a ghost that has a device with keys."""

    def __init__(self, start, r, folder, **more):
        self.r, self.file = r, folder / "r.json"
        self.write(**more)
        self.hs = start(str(self.file), retry_first_ms=1, retry_max_ms=3)
        self.alice, self.ghost = self.hs.client("alice"), ghost_with_device(self.hs)
        self.room = self.alice.create_room(preset="public_chat")
        self.ghost.join(self.room)
        self.ghost.ask("POST", "keys", "upload", body={"device_keys": device_keys(self.ghost), "one_time_keys": {f"signed_curve25519:{n}": {} for n in range(9)}})
        self.hs.settle()
        self.n = 0

    def write(self, **more):
        self.file.write_text(json.dumps(registration(**{"url": self.r.url, **more})))

    def reload(self, **more):
        self.write(**more)
        self.hs.reload()

    def message(self, times=1):
        for self.n in range(self.n, self.n + times):
            self.alice.ask("PUT", "sendToDevice", "m.x", str(self.n), body={"messages": {self.ghost.user_id: {"*": {"n": self.n}}}})
        self.n += 1

    def refuse(self):
        self.r.answers(500, {"errcode": "M_UNKNOWN"})
        self.alice.say(self.room, "holds the line")
        eventually(lambda: self.hs.waiting())

    def accept(self):
        self.r.answers(200)
        self.hs.settle()

    def left_for_sync(self):
        session = self.hs.api.accounts.login_ghost(self.hs.world.registrations.by_id["irc"], self.ghost.user_id, device_id="GHOST")
        return [message["content"]["n"] for message in asbridge.Client(self.hs.url, session["access_token"]).sync().get("to_device", {}).get("events", [])]


@pytest.mark.parametrize("then", [{},
                                  {"org.matrix.msc3202": True}, {"de.sorunome.msc2409.push_ephemeral": True}])
def test_what_waits_for_a_service_that_takes_no_more_ephemeral_data_is_left_for_the_device(start, recorder, tmp_path, then):
    it = Reloading(start, recorder(), tmp_path, **ENCRYPTING)
    it.refuse()
    it.message(3)
    it.alice.typing(it.room)
    it.reload(**then)
    it.message(2)
    it.accept()
    assert to_device_of(it.r) + it.left_for_sync() == [0, 1, 2, 3, 4]
    if "org.matrix.msc3202" not in then:                     # neither is it told what it does not want
        assert not any("msc3202" in body.decode() for _, body in it.r.transactions if b"holds the line" in body)


@pytest.mark.parametrize("meanwhile", [{"url": None, **ENCRYPTING}, {"url": None}])
def test_what_waits_for_a_service_is_kept_while_it_has_no_url(start, recorder, tmp_path, meanwhile):
    it = Reloading(start, recorder(), tmp_path, **ENCRYPTING)
    it.refuse()
    said = [it.alice.say(it.room, str(n)) for n in range(3)]
    it.reload(**meanwhile)
    it.alice.say(it.room, "not for it"), upload(it.alice), it.alice.typing(it.room)
    position = len(it.r.requests)
    it.reload(**ENCRYPTING)
    it.accept()
    it.alice.say(it.room, "again for it")
    it.hs.settle()
    assert it.r.texts() == ["holds the line", "0", "1", "2", "again for it"] and said and len(it.r.requests) > position
    assert it.alice.user_id in {user for part in pushed(it.r, "org.matrix.msc3202.device_lists") for user in part["changed"]}


def test_a_service_that_begins_to_encrypt_hears_at_once_how_many_keys_its_ghosts_have(start, recorder, tmp_path):
    it = Reloading(start, recorder(), tmp_path)
    it.reload(**ENCRYPTING)
    eventually(lambda: pushed(it.r, "org.matrix.msc3202.device_one_time_keys_count"), 0.5)
    assert pushed(it.r, "org.matrix.msc3202.device_one_time_keys_count") == [{it.ghost.user_id: {"GHOST": {"signed_curve25519": 9}}}]


@pytest.mark.parametrize("seed, last", [(0, ENCRYPTING), (1, ENCRYPTING), (2, {})])
def test_through_any_changes_of_a_registration_each_event_comes_once_and_each_message_to_the_service_or_the_device(start, recorder, tmp_path, caplog, seed, last):
    r, rnd = recorder(), random.Random(seed)
    it, said = Reloading(start, r, tmp_path, **ENCRYPTING), []
    r.answer = lambda request, body: (200, {}) if rnd.random() < 0.5 else (500, {"errcode": "M_UNKNOWN"})
    for n in range(80):
        act = rnd.choice(["say", "message", "message", "receipt", "keys", "reload"])
        if act == "say":
            said.append(it.alice.say(it.room, f"{n}"))
        elif act == "message":
            it.message()
        elif act == "receipt" and said:
            it.alice.receipt(it.room, said[-1])
        elif act == "keys":
            upload(it.alice, change=n), claim(it.alice, it.ghost)
        elif act == "reload":
            it.reload(**rnd.choice([{}, ENCRYPTING, {"receive_ephemeral": True}, {"org.matrix.msc3202": True}, {"de.sorunome.msc2409.push_ephemeral": True}]))
    it.reload(**ENCRYPTING)
    r.answers(500, {"errcode": "M_UNKNOWN"})
    said.append(it.alice.say(it.room, "holds the line"))
    eventually(lambda: it.hs.delivery.worker("irc").failures > 12)
    it.message(3)
    it.reload(**last)
    it.message()
    it.accept()
    came = r.transactions
    assert all(len({body for id, body in came if id == txn_id}) == 1 for txn_id, _ in came)
    assert [event["event_id"] for event in r.events if event["type"] == "m.room.message"] == said
    assert sorted(to_device_of(r) + it.left_for_sync()) == list(range(it.n)) and to_device_of(r) == sorted(to_device_of(r))
    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


# ============================================================================
# 8. Routes
# ============================================================================

# -- Which handler is it?

@pytest.mark.parametrize("method,where,status", [("GET", "/_matrix/client/v3/nothing", 404), ("GET", "/_matrix/client/v3/rooms/!x:y", 404), ("GET", V3 + "/sync/", 404),
                                                 ("GET", "/_matrix/client/v3/createRoom", 405), ("POST", V3 + "/sync", 405), ("PATCH", V3 + "/login", 405), ("GET", "//_matrix/client/versions", 404)])
def test_an_unknown_path_is_404_and_a_wrong_method_405(hs, method, where, status):
    got, answer = ask(hs, method, where, hs.client("alice").token, b"")
    assert (got, answer["errcode"]) == (status, "M_UNRECOGNIZED")


@pytest.mark.parametrize("method,where", [
    # search, notifications, the older way to sync, sliding sync
    ("POST", V3 + "/search"), ("GET", V3 + "/notifications"), ("GET", V3 + "/initialSync"),
    ("POST", "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"), ("POST", "/_matrix/client/unstable/org.matrix.msc3575/sync"),
    # refresh tokens, single sign-on, OAuth, tokens to log in with, third-party identifiers, dehydrated devices
    ("POST", V3 + "/refresh"), ("GET", V3 + "/login/sso/redirect"), ("GET", V3 + "/login/cas/redirect"), ("GET", V3 + "/auth/m.login.sso/fallback/web"),
    ("GET", "/_matrix/client/v1/auth_metadata"), ("POST", "/_matrix/client/v1/login/get_token"), ("GET", V3 + "/account/3pid"), ("POST", V3 + "/account/3pid/add"),
    ("POST", V3 + "/register/email/requestToken"), ("POST", V3 + "/account/password/email/requestToken"), ("GET", "/_matrix/client/v1/register/m.login.registration_token/validity"),
    ("GET", "/_matrix/client/unstable/org.matrix.msc2697.v2/dehydrated_device"),
    # what moderators and administrators do, room upgrades, calls, links
    ("POST", V3 + "/rooms/!x:localhost/report"), ("POST", V3 + "/rooms/!x:localhost/report/$x"), ("POST", V3 + "/users/@x:localhost/report"), ("GET", V3 + "/admin/whois/@x:localhost"),
    ("GET", "/_synapse/admin/v1/users/@x:localhost/admin"), ("POST", V3 + "/rooms/!x:localhost/upgrade"),
    ("GET", V3 + "/voip/turnServer"), ("GET", "/_matrix/client/v1/media/preview_url"), ("GET", "/_matrix/media/v3/preview_url"),
    # federation
    ("GET", "/_matrix/federation/v1/version"), ("PUT", "/_matrix/federation/v1/send/1"), ("GET", "/_matrix/federation/v1/publicRooms"), ("GET", "/_matrix/key/v2/server"),
    ("GET", "/.well-known/matrix/server"), ("GET", "/.well-known/matrix/support")])
def test_what_is_left_out_is_not_recognised(hs, method, where):
    token = hs.client("alice").token
    for spelling in (where, where.replace("/v3/", "/r0/")):
        status, answer = ask(hs, method, spelling, token, {} if method != "GET" else None)
        assert (status, answer["errcode"]) == (404, "M_UNRECOGNIZED")


@pytest.mark.parametrize("method,where,body", [("POST", V3 + "/register?kind=guest", {}), ("GET", V3 + "/publicRooms?server=elsewhere", None), ("POST", V3 + "/publicRooms?server=elsewhere", {})])
def test_what_is_left_out_of_an_endpoint_is_forbidden_with_the_reason(hs, method, where, body):
    status, answer = ask(hs, method, where, hs.client("alice").token, body)
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN") and re.search("guests|no other", answer["error"])


@pytest.mark.parametrize("method,where,body", [
    ("GET", V3 + "/joined_rooms?unknown=x&_cacheBuster=1", b""), ("GET", "/_matrix/client/versions?user_id=@nobody:localhost", b""), ("GET", "/_matrix/client/r0/login", b""),
    ("POST", V3 + "/createRoom", b'{"com.beeper.auto_join_invites": true, "org.x": {"a": 1}}'), ("POST", V3 + "/logout", b'{"unknown": []}')])
def test_what_an_endpoint_does_not_know_is_ignored(hs, method, where, body):
    headers = {"Content-Type": "application/json; charset=utf-8", "Accept-Encoding": "gzip, deflate"}      # nio and matrix-commander on GETs, too
    assert ask(hs, method, where, hs.client("alice").token, body, headers)[0] == 200


@pytest.mark.parametrize("where", ["client/r0/account/whoami", "client/v3/account/whoami", "client/unstable/account/whoami", "client/unstable/rooms/{}/threads", "client/v1/rooms/{}/threads",
                                   "media/v1/config", "media/r0/config", "media/v3/config", "client/v1/media/config"])
def test_the_spellings_of_a_route_are_one(hs, alice, room, where):
    assert ask(hs, "GET", "/_matrix/" + where.format(room), alice.token)[0] == 200


@pytest.mark.parametrize("where", ["client/v1/account/whoami", "client/v9/account/whoami", "client/v3/rooms/{}/threads", "client/r0/rooms/{}/threads", "media/v9/config", "client/v3/media/config"])
def test_an_endpoint_is_not_found_under_a_version_that_it_never_had(hs, alice, room, where):
    status, answer = ask(hs, "GET", "/_matrix/" + where.format(room), alice.token)
    assert (status, answer["errcode"]) == (404, "M_UNRECOGNIZED")


@pytest.mark.parametrize("encode", [lambda id: id, lambda id: urllib.parse.quote(id, safe=""), lambda id: id.replace(":", "%3a"),
                                    lambda id: "".join(f"%{ord(c):02X}" for c in id)])
def test_a_path_may_be_percent_encoded_or_not(hs, alice, room, encode):
    assert ask(hs, "GET", f"{V3}/rooms/{encode(room)}/state/m.room.member/{encode(alice.user_id)}", alice.token)[1]["membership"] == "join"


def test_a_segment_is_decoded_after_splitting(hs, alice, room):
    alice.set_state(room, "org.x", {"v": 1}, "a/b ü%+")
    assert ask(hs, "GET", f"{V3}/rooms/{room}/state/org.x/a%2Fb%20%C3%BC%25+", alice.token) == (200, {"v": 1})
    assert ask(hs, "GET", f"{V3}/rooms/{room}/state/org.x/%FF", alice.token)[1]["errcode"] == "M_INVALID_PARAM"


def test_braces_in_a_path_are_letters_like_others(hs):
    token = hs.client("alice").token
    for where, status in (("/profile/{}", 404), ("/profile/{userId}", 404), ("/joined_rooms/{}", 404), ("/rooms/{}/state", 403), ("/{}", 404)):
        assert ask(hs, "GET", V3 + where, token)[0] == status


def test_an_endpoint_has_no_other_spelling(hs):
    token = hs.client("alice").token
    for where in ("/_matrix/client/*/joined_rooms", "/_matrix/client/%72%30/joined_rooms", "/_matrix/client/V3/joined_rooms", "/_matrix/client//joined_rooms", "/_MATRIX/client/v3/joined_rooms",
                  "/_matrix/client/v3/../v3/joined_rooms", "/_matrix/client/v3/joined%5Frooms", "/_matrix/client/v3/joined_rooms%2F"):
        status, answer = ask(hs, "GET", where, token)
        assert (status, answer["errcode"]) == (404, "M_UNRECOGNIZED")


def test_a_path_of_the_table_has_a_handler_and_is_found(start):
    for route in asbridge.ROUTES:
        found, params = asbridge.Router(asbridge.ROUTES).find(route.method, re.sub(r"{\w+}", "x", route.path))
        assert found.handler is route.handler and list(params) == re.findall(r"{(\w+)}", route.path)


# -- Who is asking?

def test_without_a_user_id_a_service_acts_as_its_own_user(hs):
    assert bot_of(hs).whoami() == {"user_id": "@_irc_bot:localhost", "is_guest": False}
    assert ask(hs, "GET", V3 + "/account/whoami?user_id=", "as-irc")[1]["user_id"] == "@_irc_bot:localhost"


def test_what_a_service_does_is_done_by_the_user_that_it_acts_as(hs):
    bob, carol = acting(hs, "irc", "@_irc_bob:localhost"), acting(hs, "irc", "@_irc_carol:localhost")
    room = bob.create_room(invite=[carol.user_id])
    carol.join(room)
    assert carol.event(room, carol.say(room, "x"))["sender"] == carol.user_id
    assert bob.joined_rooms() == carol.joined_rooms() == [room] and bot_of(hs).joined_rooms() == []


ACTS = [("GET", "/account/whoami", None), ("GET", "/joined_rooms", None), ("GET", "/sync", None), ("POST", "/createRoom", {}), ("GET", "/devices", None),
        ("GET", "/capabilities", None), ("POST", "/keys/query", {"device_keys": {}}), ("PUT", "/user/{user}/account_data/x", {}),
        ("POST", "/user/{user}/filter", {}), ("PUT", "/profile/{user}/displayname", {"displayname": "x"}), ("GET", "/rooms/{room}/state", None),
        ("PUT", "/rooms/{room}/send/x/1", {}), ("PUT", "/rooms/{room}/state/x", {}), ("POST", "/join/{room}", {}), ("POST", "/rooms/{room}/leave", {}), ("GET", "/rooms/{room}/messages", None),
        ("PUT", "/rooms/{room}/typing/{user}", {"typing": True}), ("POST", "/rooms/{room}/receipt/m.read/$x", {}), ("GET", "/rooms/{room}/joined_members", None),
        ("PUT", "/directory/room/%23_irc_x:localhost", {"room_id": "{room}"}), ("POST", "/rooms/{room}/read_markers", {}), ("GET", "/user/{user}/rooms/{room}/tags", None)]


@pytest.mark.parametrize("method,where,body", ACTS)
def test_a_service_acts_as_any_user_of_its_namespace_on_every_route(hs, ghost, method, where, body):
    room = ghost.create_room()
    where = V3 + where.format(room=room, user=ghost.user_id)
    body = json.loads(json.dumps(body).replace("{room}", room))
    for user_id, text in (("@alice:localhost", "outside the namespaces"), ("@_irc_carol:localhost", "not registered"), ("@_irc_bob:elsewhere", "outside the namespaces")):
        status, answer = ask(hs, method, f"{where}?user_id={user_id}", "as-irc", body)
        assert (status, answer["errcode"]) == (403, "M_FORBIDDEN") and text in answer["error"]
    assert ask(hs, method, f"{where}?user_id={ghost.user_id}", "as-irc", body)[0] == 200


def test_a_persons_token_ignores_user_id(hs, alice, bob):
    assert asbridge.Client(hs.url, alice.token, bob.user_id).whoami()["user_id"] == alice.user_id


def test_a_service_may_act_and_log_in_as_a_person_in_its_namespace(start):
    hs = start(registration("puppet", None, users=["@.*:localhost"], exclusive=False))
    alice = hs.client("alice")
    room = alice.create_room()
    puppet = acting(hs, "puppet", alice.user_id, register=False)
    assert alice.event(room, puppet.say(room, "by puppet"))["sender"] == alice.user_id
    session = ask(hs, "POST", V3 + "/login", "as-puppet", {**AS_LOGIN, "identifier": {"type": "m.id.user", "user": "alice"}})[1]
    assert asbridge.Client(hs.url, session["access_token"]).whoami()["user_id"] == alice.user_id
    assert alice.whoami()["user_id"] == alice.user_id


@pytest.mark.parametrize("header,query,status", [("as-irc", None, 200), (None, "as-irc", 200), ("as-irc", "as-irc", 200), ("as-irc", "", 200),
                                                 ("as-irc", "x", 401), ("x", "as-irc", 401), ("", None, 401), (None, None, 401), (None, "", 401)])
def test_a_token_comes_in_the_header_or_in_the_query_and_never_two_of_them(hs, header, query, status):
    headers = {} if header is None else {"Authorization": f"Bearer {header}"}
    answer = ask(hs, "GET", V3 + "/account/whoami" + ("" if query is None else f"?access_token={query}"), headers=headers)
    assert answer[0] == status
    if status == 401:
        assert answer[1]["errcode"] == ("M_UNKNOWN_TOKEN" if header and query else "M_MISSING_TOKEN")


def test_an_unknown_token_is_refused_and_an_hs_token_is_called_that(hs):
    status, answer = ask(hs, "GET", V3 + "/account/whoami", "hs-irc")
    assert (status, answer["errcode"]) == (401, "M_UNKNOWN_TOKEN") and "hs_token" in answer["error"] and "'irc'" in answer["error"]
    status, answer = ask(hs, "GET", V3 + "/account/whoami", "nonsense")
    assert (status, answer["errcode"], answer["soft_logout"]) == (401, "M_UNKNOWN_TOKEN", False) and "nonsense" not in answer["error"]


@pytest.mark.parametrize("where", ["/_matrix/client/versions", V3 + "/login", "/.well-known/matrix/client"])
def test_a_route_without_a_user_ignores_user_id(start, where):
    assert ask(start(registration()), "GET", where + "?user_id=@nobody:localhost", "as-irc")[0] == 200


@pytest.mark.parametrize("where", [V3 + "/publicRooms", V3 + "/profile/@_irc_bot:localhost", V3 + "/directory/room/%23_irc_x:localhost"])
def test_a_public_route_ignores_user_id(hs, where):
    bot_of(hs).create_room(room_alias_name="_irc_x")
    assert ask(hs, "GET", where + "?user_id=@_irc_unregistered:localhost", "as-irc")[0] == 200


def test_what_everybody_may_ask_does_not_look_at_the_user_and_device_that_a_service_names(ghost):
    assert ghost.ask("GET", "profile", ghost.user_id, device_id="GONE") == {"displayname": "_irc_bob"}


def test_a_person_does_not_act_as_another_device(alice):
    assert alice.ask("GET", "account", "whoami", device_id="OTHER")["device_id"] == device_of(alice) != "OTHER"


# -- Who is asking, and how often?

def test_a_rate_limit_is_told_and_forgiven_in_time(start):
    hs = start(rate_limit={"per_second": 0.1, "burst": 2})
    alice = hs.client("alice")
    room = alice.create_room()
    alice.say(room, "x")
    with refused("M_LIMIT_EXCEEDED", 429) as caught:
        alice.say(room, "y")
    assert 0 < caught.value.extra["retry_after_ms"] <= 10_001
    status, headers, _ = whole(hs, "POST", f"{V3}/createRoom", {"Authorization": f"Bearer {alice.token}"})
    assert status == 429 and 0 < int(headers["Retry-After"]) <= 11     # in seconds
    alice.messages(room), hs.client("bob").create_room()               # reading is free, and so is everybody else
    hs.advance(caught.value.extra["retry_after_ms"] / 1000)
    alice.say(room, "y")


@pytest.mark.parametrize("rate_limited,ghosts", [(True, 2), (False, 5)])
def test_a_services_own_user_is_not_limited_and_its_ghosts_as_the_registration_says(start, rate_limited, ghosts):
    hs = start(registration(rate_limited=rate_limited), rate_limit={"per_second": 0.001, "burst": 2})
    for client, allowed in ((bot_of(hs), 5), (acting(hs, "irc", "@_irc_bob:localhost"), ghosts)):
        done = 0
        with contextlib.suppress(MatrixError):
            for done in range(5):
                client.create_room()
            done = 5
        assert done == allowed


# -- What every request and answer has.

@pytest.mark.parametrize("method,where,status", [("OPTIONS", V3 + "/sync", 204), ("GET", "/_matrix/client/versions", 200), ("GET", V3 + "/sync", 401),
                                                 ("GET", "/_matrix/client/v3/nothing", 404), ("DELETE", V3 + "/sync", 405), ("POST", V3 + "/register", 401), ("HEAD", "/_matrix/client/versions", 200)])
def test_every_answer_may_be_read_by_a_page_of_any_origin(start, method, where, status):
    got, headers, body = whole(start(), method, where)
    assert got == status and headers["Access-Control-Allow-Origin"] == "*"
    assert headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST, PUT, DELETE, OPTIONS"
    assert headers["Access-Control-Allow-Headers"] == "X-Requested-With, Content-Type, Authorization, Date"
    assert (body == b"") == (method in ("OPTIONS", "HEAD"))


@pytest.mark.parametrize("body,errcode", [(b"{", "M_NOT_JSON"), (b"[]", "M_BAD_JSON"), (b"5", "M_BAD_JSON"), (b"\xff", "M_NOT_JSON")])
def test_a_body_that_is_no_object_is_refused(hs, body, errcode):
    assert ask(hs, "POST", V3 + "/createRoom", hs.client("alice").token, body)[1]["errcode"] == errcode


def test_an_empty_body_is_an_empty_object(hs, bob, room):
    for where in (path("join", room), path("rooms", room, "leave"), path("rooms", room, "forget"), V3 + "/createRoom", V3 + "/logout"):
        assert ask(hs, "POST", where, bob.token, b"")[0] == 200


def test_a_body_without_a_token_is_small_and_with_one_as_large_as_configured(start):
    hs = start(max_request_bytes=100_000)
    alice = hs.client("alice")
    assert ask(hs, "POST", V3 + "/login", body=b'"' + b"x" * 66_000)[1]["errcode"] == "M_TOO_LARGE"
    assert ask(hs, "POST", V3 + "/createRoom", alice.token, b'"' + b"x" * 66_000)[1]["errcode"] == "M_NOT_JSON"
    assert ask(hs, "POST", V3 + "/createRoom", alice.token, b'"' + b"x" * 100_000)[0] == 413


def test_an_error_shows_neither_a_traceback_nor_a_token(hs, alice):
    hs.api.rooms.joined = lambda who: 1 / 0
    status, answer = ask(hs, "GET", V3 + "/joined_rooms", alice.token)
    assert (status, answer["errcode"]) == (500, "M_UNKNOWN") and "division" not in answer["error"]


@pytest.mark.parametrize("path", [
    "/sync?access_token=hunter2", "/sync&access_token=hunter2", "/sync%3Faccess_token=hunter2", "/sync%26access_token%3Dhunter2", "/access_token=hunter2", "/sync/?access_token=hunter2",
    "/sync;access_token=hunter2", "/rooms/x&access_token=hunter2/state", "/rooms/x%26access_token%3Dhunter2/state", "/events?limit=1&from=x%26access_token=hunter2",
    "/sync?timeout=1%26access_token%3Dhunter2", "/rooms/!x%0Aaccess_token=hunter2/join?access_token=hunter2"])
def test_a_token_in_a_url_stands_in_no_error_and_in_no_line_of_the_log(target, caplog, path):
    caplog.set_level(logging.DEBUG, "asbridge")
    for method in ("GET", "POST", "PATCH"):
        for token in (None, target.hs.client(f"u{secrets.token_hex(4)}").token):
            answer = ask(target.hs, method, V3 + path, token, {} if method == "POST" else None)
            assert "hunter2" not in str(answer) and answer[0] >= 400
    assert caplog.text.count(V3) >= 6 and "hunter2" not in caplog.text and all("\n" not in record.getMessage() for record in caplog.records)


def test_a_client_that_hangs_up_in_a_long_poll_is_noticed_and_one_that_waits_goes_on(hs, alice, room):
    since = alice.sync()["next_batch"]
    head = f"GET {V3}/sync?timeout=600000&since={since} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {alice.token}\r\n\r\n".encode()
    before, asleep = set(hs._server.connections), hs.world.store.waiters._asleep
    with connect(hs) as waiting, connect(hs) as gone:
        for n, sock in enumerate((waiting, gone)):
            sock.sendall(head)
            eventually(lambda n=n: len(asleep) > n)
        gone.close()
        hs.advance(asbridge.LOOK_SECONDS)
        assert eventually(lambda: len(hs._server.connections - before) == 1)
        alice.say(room, "still there?")
        assert b"still there?" in waiting.recv(65_536)


# -- What stands in a path, a query, a body.

# Each is another name than the others, however alike they look.
NAMES = ["x", "X", "\u0445", "\uff58", "x.", "x ", " x", "x\u200b", "\u00e9", "e\u0301", "x/y", "x%2Fy", "x\\y", ".", "..", "%2E", "{}", "*", "%", "+", "?", "#", "'", '"', "x\n", "x" * 240]


@pytest.mark.parametrize("where", ["rooms/{room}/state/org.x/{}", "rooms/{room}/state/{}/key", "user/{user}/account_data/{}", "user/{user}/rooms/{room}/account_data/{}",
                                   "room_keys/keys/{}/s", "room_keys/keys/{room}/{}"])
def test_what_is_stored_under_an_odd_name_is_found_under_it_and_under_no_other(alice, room, where):
    before, _, after = [segment.format(room=room, user=alice.user_id) for segment in where.partition("{}")[0].split("/")], None, where.partition("{}")[2]
    before, after, query = before[:-1], [segment for segment in after.split("/") if segment], {}
    if before[0] == "room_keys":
        query = {"version": alice.ask("POST", "room_keys", "version", body={"algorithm": "x", "auth_data": {}})["version"]}
    contents = {name: {"first_message_index": n, "forwarded_count": 0, "is_verified": False, "session_data": {"n": n}} for n, name in enumerate(NAMES)}
    for name, content in contents.items():
        alice.call("PUT", asbridge.client_path(*before, name, *after), content, **query)
    assert {name: alice.ask("GET", *before, name, *after, **query) for name in NAMES} == contents


def test_two_aliases_that_look_alike_are_two(alice, room):
    aliases, before = [f"#{name}:localhost" for name in NAMES], alice.ask("GET", "rooms", room, "aliases")["aliases"]
    for alias in aliases:
        alice.set_alias(alias, room)
    assert sorted(alice.ask("GET", "rooms", room, "aliases")["aliases"]) == sorted(aliases + before)
    for alias in aliases:
        assert alice.resolve(alias) == room
        alice.delete_alias(alias)
    assert alice.ask("GET", "rooms", room, "aliases")["aliases"] == before


def like(id):
    """What looks like this ID and is not it, percent-encoded."""
    sigil, rest = urllib.parse.quote(id[0]), id[1:]
    found = [sigil + other for other in (rest.upper(), rest + ".", rest + "%00", rest + "%20", "%20" + rest, rest + "%2F", rest + ":8448", rest.replace("localhost", "elsewhere"),
                                        rest.replace("localhost", "LOCALHOST"), rest.replace("l", "%D3%8F"), rest + "%E2%80%8B", rest + "x" * 10_000, sigil + rest)]
    found += [rest, "%EF%BC%A0" + rest, "%2525" + rest, quote(quote(id))]
    return [each for each in found if urllib.parse.unquote(each) != id]


def test_what_looks_like_the_id_of_a_user_a_room_or_an_event_is_none(hs, alice, room):
    event, wrong, client = alice.say(room, "x"), [], asbridge.HttpClient(hs.url)
    alice.call("PUT", path("user", alice.user_id, "account_data", "x"), {"secret": 1})
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    bits = event[:-1] + digits[digits.index(event[-1]) ^ 1]       # the same bytes in base64
    for ids, where, statuses in ((like(alice.user_id), "profile/{}", {404, 400}), (like(alice.user_id), "user/{}/account_data/x", {403}), (like(alice.user_id), "presence/{}/status", {403, 404, 400}),
                                 (like(room), "rooms/{}/state", {403}), (like(room), "rooms/{}/messages", {403}), (like(room), "rooms/{}/joined_members", {403, 404}),
                                 ([*like(event), bits], f"rooms/{room}/event/{{}}", {404}), ([*like(event), bits], f"rooms/{room}/context/{{}}", {404})):
        for id in ids:
            status, answer = client.request("GET", f"{V3}/{where.format(id)}", None, {"Authorization": f"Bearer {alice.token}"})
            if status not in statuses or json.loads(answer)["errcode"] not in ("M_NOT_FOUND", "M_FORBIDDEN", "M_INVALID_PARAM"):
                wrong.append((where, id[:60], status, answer[:100]))
    for id in like(room):
        status, answer = client.request("POST", f"{V3}/join/{id}", b"{}", {"Authorization": f"Bearer {alice.token}"})
        if (status, json.loads(answer)["errcode"]) not in ((403, "M_FORBIDDEN"), (400, "M_INVALID_PARAM")):
            wrong.append(("join", id[:60], status, answer[:100]))
    client.close()
    assert wrong == [] and alice.joined_rooms() == [room]


def target_of(where, values):
    return pattern_of(where).format(**{name: quote(value) for name, value in values.items()})


NO_NUMBER = ["x", "-1", "1.5", "1e3", "0x1", "%20" + "1", "1%00", "%D9%A3", "1_0", "9" * 20, "9007199254740992", "NaN", "[]", "{}", "9" * 4000]
ANY = ["", "0", "1", "9007199254740991"]
MUCH = ["9007199254740992", "9" * 20, "9" * 4000]
NO_WORD = ["x", "%20", "%00", "TRUE", "1", "x" * 4000]
INVALID = (400, "M_INVALID_PARAM")
PARAMETERS = [                           # of a GET by alice: what is right, what is not and how that is answered
    ("C/sync", "since", ANY, NO_NUMBER, INVALID), ("C/sync", "timeout", ["", "0", "1"], NO_NUMBER, INVALID), ("C/sync", "full_state", ["", "true"], NO_WORD, INVALID),
    ("C/sync", "set_presence", ["", "offline", "unavailable"], [*NO_WORD, "busy"], INVALID), ("C/sync", "filter", ["", "{}", "0"[:0]], ["x", "-1", "01", "%D9%A1", "9" * 4000, "[]"], (404, "M_NOT_FOUND")),
    ("C/sync", "filter", ['{"room":{"timeline":{"limit":-5}}}', '{"room":{"timeline":{"limit":99999999999999999999}}}', '{"event_format":"client","x":1}'],
     ['{"room":5}', '{"room":{"timeline":{"limit":"x"}}}', '{"room":{"timeline":{"limit":1.5}}}', '{"room":{"rooms":[5]}}', '{"room":{"timeline":{"types":"x"}}}'], (400, "M_BAD_JSON")),
    ("C/sync", "filter", [], ["{", "{'a':1}", '{"a":NaN}', '{"a":"\\ud800"}', '{"a":' + "[" * 200 + "]" * 200 + "}", "{\0}"], (400, "M_NOT_JSON")),
    ("C/events", "from", ANY, NO_NUMBER, INVALID), ("C/events", "timeout", ["", "0"], NO_NUMBER, INVALID), ("C/events", "room_id", ["", "{room}"], ["x", "@alice:localhost"], (403, "M_FORBIDDEN")),
    ("R/messages", "from", ANY, NO_NUMBER, INVALID), ("R/messages", "to", ANY, NO_NUMBER, INVALID), ("R/messages", "dir", ["", "b", "f"], [*NO_WORD, "B", "forwards"], INVALID),
    ("R/messages", "limit", [*ANY, *MUCH], NO_NUMBER[:9], INVALID), ("R/messages", "filter", ["", "{}", '{"limit":-5}', '{"limit":99999999999999999999}'], ["5", "[]", '"x"', '{"limit":"x"}', '{"types":[5]}', '{"rooms":{}}'], (400, "M_BAD_JSON")),
    ("R/messages", "filter", [], ["x", "{", "%00", "{" * 200], (400, "M_NOT_JSON")),
    ("R/context/{event}", "limit", [*ANY, *MUCH], NO_NUMBER[:9], INVALID), ("R/initialSync", "limit", [*ANY, *MUCH], NO_NUMBER[:9], INVALID),
    ("R/members", "at", ANY, NO_NUMBER, INVALID), ("R/members", "membership", ["", "join", "ban"], [*NO_WORD, "Join"], INVALID), ("R/members", "not_membership", ["", "leave"], NO_WORD, INVALID),
    ("R/state/m.room.create/", "format", ["", "event", "content"], [*NO_WORD, "Event"], INVALID),
    *(row for where in ("N/{event}", "V/rooms/{room}/threads", "V/rooms/{room}/hierarchy") for row in (
        (where, "from", ANY[:3], NO_NUMBER, INVALID), (where, "limit", ["", *ANY[2:], *MUCH], ["0", *NO_NUMBER[:9]], INVALID))),
    ("N/{event}", "dir", ["", "b"], NO_WORD, INVALID), ("N/{event}", "recurse", ["", "true"], NO_WORD, INVALID), ("V/rooms/{room}/threads", "include", ["", "all", "participated"], NO_WORD, INVALID),
    ("V/rooms/{room}/timestamp_to_event?dir=f", "ts", ["0"], NO_NUMBER, INVALID), ("V/rooms/{room}/timestamp_to_event?ts=0", "dir", ["f"], NO_WORD, INVALID),
    ("V/rooms/{room}/hierarchy", "max_depth", ANY, NO_NUMBER, INVALID), ("V/rooms/{room}/hierarchy", "suggested_only", ["", "true"], NO_WORD, INVALID),
    ("C/publicRooms", "since", ANY, NO_NUMBER, INVALID), ("C/publicRooms", "limit", [*ANY, *MUCH], NO_NUMBER[:9], INVALID), ("C/publicRooms", "server", ["", "localhost"], ["LOCALHOST", "localhost.", "elsewhere"], (403, "M_FORBIDDEN")),
    ("M/download/localhost/{media}", "timeout_ms", ["", "0", "120000"], [*NO_NUMBER, "120001"], INVALID), ("M/thumbnail/localhost/{media}?height=5", "width", ["1"], ["0", *NO_NUMBER], INVALID),
    ("C/user/{user}/filter/{filter}", "x", [""], ["%FF", "%C0%AF", "%ED%A0%80"], INVALID),
]


def test_each_parameter_of_a_query_is_taken_or_refused_by_name(hs, alice, room):
    values = {"room": room, "user": alice.user_id, "event": alice.say(room, "x"), "filter": alice.ask("POST", "user", alice.user_id, "filter", body={})["filter_id"],
              "media": hs.api.media.upload(asbridge.Who(alice.user_id), b"x", "image/png", None).rpartition("/")[2]}
    client, wrong = asbridge.HttpClient(hs.url), []
    for where, name, right, refused_ones, (status, errcode) in PARAMETERS:
        for value in right + refused_ones:
            target = target_of(where, values) + ("&" if "?" in where else "?") + f"{name}=" + (value if value[:1] != "{" and "%" in value else quote(value.replace("{room}", room)))
            got, answer = client.request("GET", target, None, {"Authorization": f"Bearer {alice.token}"}, limit=10**7)
            expected = (200, None) if value in right else (status, errcode)
            if (got, json.loads(answer).get("errcode") if "M/" not in where or got != 200 else None) != expected or (got != 200 and len(answer) > 500):
                wrong.append((where, name, value, got, answer[:100]))
    client.close()
    assert wrong == []


def test_a_limit_that_is_too_large_is_the_largest_there_is(alice, room, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_PAGE", 3)
    for limit in (4, 10**10, 10**4000):
        assert len(alice.messages(room, limit=limit)["chunk"]) == 3


@pytest.mark.parametrize("method,where,ids,status,errcode", [
    ("GET", "C/directory/room/{}", ["x", "@x:localhost", "%23x", "%23:localhost", "%23x:", "%23x:local%20host", "%23x%00:localhost", "%23" + "x" * 255 + ":localhost", "%23x%FF:localhost", ".."], 400, "M_INVALID_PARAM"),
    ("GET", "C/directory/room/{}", ["%23x:elsewhere", "%23X:localhost", "%23x:localhost."], 404, "M_NOT_FOUND"),
    ("PUT", "C/directory/room/{}", ["x", "%23x:elsewhere", "%23x:LOCALHOST", "%23x:localhost.", "%23x%00:localhost", "%23" + "x" * 255 + ":localhost"], 400, "M_INVALID_PARAM"),
    ("POST", "C/join/{}", ["", "x", "..", "@x:localhost", "$x", "%21" + "x" * 255, "!x%00:localhost", "!%FF", "%23x"], 400, "M_INVALID_PARAM"),
    ("POST", "C/join/{}", ["!x:localhost", "!x:elsewhere", "!" + "x" * 200], 403, "M_FORBIDDEN"), ("POST", "C/join/{}", ["%23x:localhost", "%23x:elsewhere"], 404, "M_NOT_FOUND"),
    ("PUT", "C/user/{user}/rooms/{}/account_data/x", ["", "x", "..", "@x:localhost", "%23x:localhost", "!%00", "!" + "x" * 255], 400, "M_INVALID_PARAM"),
    ("PUT", "C/user/{user}/rooms/{}/tags/x", ["", "x", "%23x:localhost"], 400, "M_INVALID_PARAM"),
    ("PUT", "C/devices/{}", ["", "*", "%00", "a%0Ab", "%1B%5B2J", "%E2%80%AE", "x" * 256, "x" * 10_000, "%FF"], 400, "M_INVALID_PARAM"),
    ("GET", "C/presence/{}/status", ["", "x", "%23x:localhost", "@x", "@x:", "@:localhost", "@x%00:localhost", "@" + "x" * 255 + ":localhost"], 400, "M_INVALID_PARAM"),
    ("GET", "C/user/{user}/filter/{}", ["", "x", "-1", "01", "1%20", "%D9%A1", "9" * 100], 404, "M_NOT_FOUND"), ("GET", "C/room_keys/version/{}", ["", "x", "-1", "01", "%D9%A1", "9" * 100], 404, "M_NOT_FOUND"),
    ("GET", "M/download/localhost/{}", ["", "..", "%2F", "%2E%2E%2Fx", "%00", "x" * 10_000], 404, "M_NOT_FOUND"),
    ("PUT", "R/state/{}/x", ["x" * 256, "%C3%A9" * 128, "%FF"], 400, "M_INVALID_PARAM"), ("PUT", "R/state/x/{}", ["x" * 256, "%C3%A9" * 128, "%FF"], 400, "M_INVALID_PARAM"),
    ("PUT", "R/send/{}/t", ["x" * 256, "%FF"], 400, "M_INVALID_PARAM"), ("POST", "R/receipt/m.read/{}", ["", "x", "@x:localhost", "$" + "x" * 255], 400, "M_INVALID_PARAM")])
def test_an_id_that_is_none_is_refused_where_it_would_be_stored_and_found_nowhere(target, method, where, ids, status, errcode):
    for id in ids:
        body = {"room_id": target.room} if "directory" in where else {}
        got, answer = target.ask(method, target.filled(pattern_of(where), quote).replace("{}", id), json.dumps(body).encode() if method != "GET" else None)
        assert (got, json.loads(answer)["errcode"]) == (status, errcode) and len(answer) < 500, (id, got, answer)


def test_neither_a_login_nor_a_registration_creates_a_device_that_cannot_be_named(hs):
    bodies = [("login", {**AS_LOGIN, "user": "_irc_bot"}), ("register", {**AS_LOGIN, "username": "_irc_bob"}), ("register", {"username": "bob", "auth": {"type": "m.login.dummy"}})]
    for (where, body), device_id in itertools.product(bodies, ["*", "a\0", "a\nb", "x" * 256]):
        status, answer = ask(hs, "POST", f"{V3}/{where}", "as-irc" if "type" in body else None, {**body, "device_id": device_id})
        assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM")


NUL, LONG_KEY = b'{"a":"\\u0000b","\\u0000":"\\u0001"}', b'{"' + b"k" * 1_000_000 + b'":1}'
SHAPES = [                                                   # JSON, what an event makes of it, what all else does, and a word of the text that says why not
    (b'{"a":' * 100_000, "M_NOT_JSON", "M_NOT_JSON", "nested deeper than 100 levels"), (b'{"a":NaN}', "M_NOT_JSON", "M_NOT_JSON", "NaN is no number"),
    (b'{"a":[-Infinity]}', "M_NOT_JSON", "M_NOT_JSON", "-Infinity is no number"), (b'{"a":1e400}', "M_NOT_JSON", "M_NOT_JSON", "1e400 is no number"),
    (b'{"a":"\\udc00"}', "M_NOT_JSON", "M_NOT_JSON", "surrogates"), (b'{"\\ud800":1}', "M_NOT_JSON", "M_NOT_JSON", "surrogates"), (b'{"a":"\0"}', "M_NOT_JSON", "M_NOT_JSON", "control character"),
    (b'{"a":9007199254740992}', "M_BAD_JSON", None, "(2^53)-1"), (b'{"a":[-9007199254740992]}', "M_BAD_JSON", None, "(2^53)-1"), (b'{"a":0.5}', "M_BAD_JSON", None, "numbers are integers"), (b'{"a":1e2}', "M_BAD_JSON", None, "numbers are integers"),
    (LONG_KEY, "M_TOO_LARGE", None, "65536"), (NUL, None, None, ""), (b'{"a":1,"a":{"b":1,"b":2}}', None, None, ""), (b'{"a":9007199254740991,"b":-9007199254740991}', None, None, ""),
    (b'{"a":' * 90 + b"1" + b"}" * 90, None, None, ""), ('{"é":"\U0001f600\u2028"}'.encode(), None, None, "")]
BODY_SHAPES = [(b"[]", "M_BAD_JSON", "object, not a list"), (b"null", "M_BAD_JSON", "object, not null"), (b'"{}"', "M_BAD_JSON", "object, not"), ("{}".encode("utf-16"), "M_NOT_JSON", "UTF-16"),
               ("{}".encode("utf-16-le"), "M_NOT_JSON", "UTF-16"), (b"\xef\xbb\xbf{}", "M_NOT_JSON", "byte order mark"), (b"\xff", "M_NOT_JSON", "UTF-8"), (b"{} {}", "M_NOT_JSON", "Extra data")]


def endpoints_that_store(alice, room):
    """Name → method, path, and what a body is put into."""
    return {"event": ("PUT", path("rooms", room, "send", "org.x", secrets.token_hex(4)), b"%b"), "state": ("PUT", path("rooms", room, "state", "org.x", "k"), b"%b"),
            "account data": ("PUT", path("user", alice.user_id, "account_data", "org.x"), b"%b"), "data of a room": ("PUT", path("user", alice.user_id, "rooms", room, "account_data", "org.x"), b"%b"),
            "filter": ("POST", path("user", alice.user_id, "filter"), b"%b"), "profile": ("PUT", path("profile", alice.user_id, "displayname"), b'{"displayname":"x","other":%b}'),
            "to-device": ("PUT", path("sendToDevice", "org.x", secrets.token_hex(4)), b'{"messages":{"@alice:localhost":{"*":%b}}}')}


def what_was_stored(alice, room, name, answer):
    if name == "filter":
        return alice.ask("GET", "user", alice.user_id, "filter", answer["filter_id"])
    if name == "to-device":
        return [event["content"] for event in alice.sync()["to_device"]["events"]][-1]
    return {"event": lambda: alice.event(room, answer["event_id"])["content"], "state": lambda: alice.call("GET", path("rooms", room, "state", "org.x", "k")),
            "account data": lambda: alice.account_data("org.x"), "data of a room": lambda: alice.account_data("org.x", room)}[name]()


@pytest.mark.parametrize("name", ["event", "state", "account data", "data of a room", "filter", "profile", "to-device"])
def test_every_shape_of_json_is_refused_with_the_reason_or_comes_back_as_it_was(hs, alice, room, name):
    for data, in_event, elsewhere, why in SHAPES:
        method, where, around = endpoints_that_store(alice, room)[name]
        errcode = in_event if name in ("event", "state") else elsewhere
        status, answer = ask(hs, method, where, alice.token, around % data)
        assert (status, answer.get("errcode")) == ((200, None) if errcode is None else (413 if errcode == "M_TOO_LARGE" else 400, errcode)), data[:50]
        assert why in answer["error"] if errcode else name == "profile" or repr(sorted(what_was_stored(alice, room, name, answer).items())) == repr(sorted(json.loads(data).items()))
    for data, errcode, why in BODY_SHAPES:
        status, answer = ask(hs, *endpoints_that_store(alice, room)[name][:2], alice.token, data)
        assert (status, answer["errcode"]) == (400, errcode) and why in answer["error"], data


def test_a_nul_in_a_text_is_a_character_like_others_wherever_it_is_stored_and_looked_for(alice, bob, room):
    bob.join(room)
    event_id = alice.say(room, "a\0b")
    assert bob.messages(room)["chunk"][0]["content"]["body"] == joined(bob.sync(), room)["timeline"]["events"][-1]["content"]["body"] == "a\0b"
    for key in ("+\0a", "+\0b"):                             # one is not the other
        bob.send(room, "m.reaction", {"m.relates_to": {"rel_type": "m.annotation", "event_id": event_id, "key": key}})
    with refused("M_DUPLICATE_ANNOTATION"):
        bob.send(room, "m.reaction", {"m.relates_to": {"rel_type": "m.annotation", "event_id": event_id, "key": "+\0a"}})
    renamed(bob, "B\0b")
    assert joined(alice.sync(), room)["timeline"]["events"][-1]["content"]["displayname"] == "B\0b"
    assert [one["user_id"] for one in alice.ask("POST", "user_directory", "search", body={"search_term": "b\0b"})["results"]] == [bob.user_id]
    read = bob.sync()["next_batch"]
    alice.say(room, "B is a part of the name only")
    assert unread(bob, room, read)[0][1] == 0


# -- Handlers: accounts. Ghosts.

def test_a_ghost_is_registered_with_the_bare_as_token(hs):
    status, answer = ask(hs, "POST", V3 + "/register", "as-irc", {**AS_LOGIN, "username": "_irc_bob"})
    assert status == 200 and answer["user_id"] == "@_irc_bob:localhost"
    assert asbridge.Client(hs.url, answer["access_token"]).whoami()["device_id"] == answer["device_id"]


@pytest.mark.parametrize("query", ["", "?kind=user", "?user_id=@_irc_bob:localhost", "?access_token=as-irc"])
def test_registration_of_a_ghost_takes_what_bridges_send_with_it(hs, query):
    token = None if "access_token" in query else "as-irc"
    assert ask(hs, "POST", V3 + "/register" + query, token, {**AS_LOGIN, "username": "_irc_bob"})[0] == 200


def test_the_2016_spelling_of_the_user_name_is_read(hs):
    assert ask(hs, "POST", "/_matrix/client/r0/register", "as-irc", {**AS_LOGIN, "user": "_irc_bob"})[1]["user_id"] == "@_irc_bob:localhost"
    assert ask(hs, "POST", "/_matrix/client/r0/login", "as-irc", {**AS_LOGIN, "user": "_irc_bob"})[1]["user_id"] == "@_irc_bob:localhost"


def test_inhibit_login_registers_a_ghost_without_a_session(hs):
    answer = ask(hs, "POST", V3 + "/register", "as-irc", {**AS_LOGIN, "username": "_irc_bob", "inhibit_login": True})
    assert answer[0] == 200 and not {"access_token", "device_id"} & answer[1].keys()
    assert acting(hs, "irc", "@_irc_bob:localhost", register=False).call("GET", V3 + "/devices") == {"devices": []}


@pytest.mark.parametrize("username,errcode", [("alice", "M_EXCLUSIVE"), ("_irc_bob", "M_USER_IN_USE"), ("_irc_bot", "M_USER_IN_USE"), ("_irc_a:b", "M_INVALID_USERNAME"),
                                              ("_irc_ä", "M_INVALID_USERNAME"), ("_irc_a b", "M_INVALID_USERNAME"), ("", "M_INVALID_USERNAME"), ("_irc_" + "x" * 250, "M_INVALID_USERNAME"),
                                              (5, "M_BAD_JSON")])
def test_a_ghost_that_cannot_be_registered_is_refused(hs, username, errcode):
    acting(hs, "irc", "@_irc_bob:localhost")
    status, answer = ask(hs, "POST", V3 + "/register", "as-irc", {**AS_LOGIN, "username": username})
    assert (status, answer["errcode"]) == (400, errcode)


def test_a_ghost_may_have_a_historical_name_and_a_person_may_not(hs):
    assert ask(hs, "POST", V3 + "/register", "as-irc", {**AS_LOGIN, "username": "_irc_[Bob]|"})[1]["user_id"] == "@_irc_[Bob]|:localhost"
    with refused("M_INVALID_USERNAME", 400):
        hs.client("Bob")


@pytest.mark.parametrize("where,body", [("register", {"username": "_irc_x"}), ("login", {"user": "_irc_bot"})])
@pytest.mark.parametrize("token,errcode", [(None, "M_MISSING_TOKEN"), ("nonsense", "M_UNKNOWN_TOKEN"), ("hs-irc", "M_UNKNOWN_TOKEN"), ("person", "M_FORBIDDEN")])
def test_a_ghost_is_neither_registered_nor_logged_in_without_the_as_token(hs, where, body, token, errcode):
    token = hs.client("alice").token if token == "person" else token
    status, answer = ask(hs, "POST", f"{V3}/{where}", token, {**AS_LOGIN, **body})
    assert (status, answer["errcode"]) == (403 if token and errcode == "M_FORBIDDEN" else 401, errcode)      # with 401 a client would forget its session


@pytest.mark.parametrize("user,status,errcode", [("_irc_bob", 200, None), ("@_irc_bob:localhost", 200, None), ("_irc_bot", 200, None), ("alice", 400, "M_EXCLUSIVE"),
                                                 ("@_irc_bob:elsewhere", 400, "M_EXCLUSIVE"), ("_irc_unknown", 403, "M_FORBIDDEN")])
def test_a_ghost_is_logged_in_with_the_as_token(hs, user, status, errcode):
    acting(hs, "irc", "@_irc_bob:localhost"), hs.client("alice")
    answer = ask(hs, "POST", V3 + "/login", "as-irc", {**AS_LOGIN, "identifier": {"type": "m.id.user", "user": user}, "device_id": "D"})
    assert (answer[0], answer[1].get("errcode")) == (status, errcode)
    if status == 200:
        assert asbridge.Client(hs.url, answer[1]["access_token"]).whoami()["device_id"] == "D"


def test_an_as_token_without_the_login_type_is_told_what_is_missing(start):
    status, answer = ask(start(registration()), "POST", V3 + "/register", "as-irc", {"username": "_irc_x"})
    assert status == 400 and "m.login.application_service" in answer["error"]


# -- Handlers: accounts. Devices.

@pytest.mark.parametrize("name", ["device_id", "org.matrix.msc3202.device_id"])
def test_a_service_acts_as_a_device_of_its_user(hs, ghost, name):
    assert "device_id" not in ghost.whoami()
    ghost.ask("PUT", "devices", "DEV", body={})
    assert ghost.ask("GET", "account", "whoami", **{name: "DEV"})["device_id"] == "DEV"
    bot = bot_of(hs)
    with refused("M_UNKNOWN_DEVICE", 400):                   # the device must be of the user who is named, or of the sender
        bot.ask("GET", "account", "whoami", **{name: "DEV"})
    bot.ask("PUT", "devices", "BOT", body={})
    assert bot.ask("GET", "account", "whoami", **{name: "BOT"}) == {"user_id": bot.user_id, "device_id": "BOT", "is_guest": False}


def test_a_service_creates_names_and_deletes_devices_of_its_users(hs, ghost):
    target = "/_matrix/client/v3/devices/DEV?user_id=" + urllib.parse.quote(ghost.user_id)
    assert ask(hs, "PUT", target, ghost.token, {"display_name": "one"}) == (201, {})
    assert ask(hs, "PUT", target, ghost.token, {"display_name": "two"}) == (200, {})
    assert [(device["device_id"], device["display_name"]) for device in ghost.ask("GET", "devices")["devices"]] == [("DEV", "two")]
    assert ghost.ask("DELETE", "devices", "DEV") == {} and ghost.ask("GET", "devices")["devices"] == []
    ghost.ask("PUT", "devices", "DEV", body={})
    assert ghost.ask("POST", "delete_devices", body={"devices": ["DEV"]}) == {} and ghost.ask("GET", "devices")["devices"] == []


def test_a_device_keeps_its_name_if_none_is_given(alice):
    for body in ({"display_name": "phone"}, {"device_name": "x"}, {}):
        alice.ask("PUT", "devices", device_of(alice), body=body)
    assert alice.ask("GET", "devices", device_of(alice))["display_name"] == "phone"


def test_a_person_does_not_create_devices(alice):
    with refused("M_NOT_FOUND", 404):
        alice.ask("PUT", "devices", "NEW", body={"display_name": "x"})


def test_what_is_for_a_device_needs_one(ghost):
    with refused("M_MISSING_PARAM", 400, "device_id"):
        ghost.ask("POST", "keys", "upload", body={})


def test_each_device_of_a_ghost_has_its_own_transaction_ids_and_sees_its_own(ghost):
    room = ghost.create_room()
    for device_id in "AB":
        ghost.ask("PUT", "devices", device_id, body={})
    sent = [ghost.call("PUT", path("rooms", room, "send", "m.room.message", "1"), {"body": "x", "msgtype": "m.text"}, **query)["event_id"]
            for query in ({}, {"device_id": "A"}, {"device_id": "B"}, {"device_id": "A"})]
    assert sent[1] == sent[3] and len(set(sent)) == 3
    for device_id, transaction_id in (("A", "1"), ("B", None)):
        assert ghost.ask("GET", "rooms", room, "event", sent[1], device_id=device_id)["unsigned"].get("transaction_id") == transaction_id


# -- Handlers: rooms. Times.

@pytest.mark.parametrize("ts", [0, 1, 2**53 - 1])
def test_a_service_sets_the_time_of_what_it_sends_and_of_state(start, recorder, ts):
    r = recorder()
    hs = start(registration(url=r.url))
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    room = bob.create_room()
    ids = [bob.send(room, "x", {}, "t", ts), bob.set_state(room, "x", {}, "", ts), bob.set_state(room, "m.room.member", {"membership": "join", "reason": "x"}, bob.user_id, ts)]
    assert [bob.event(room, id)["origin_server_ts"] for id in ids] == [ts] * 3
    assert types(bob.messages(room)["chunk"])[:3] == ["m.room.member", "x", "x"]      # the order is that of arrival
    hs.settle()
    assert [event["origin_server_ts"] for event in r.events[-3:]] == [ts] * 3 and all(event["age"] >= 0 for event in r.events)


@pytest.mark.parametrize("ts", ["-1", "x", "1.5", str(2**53), "1e3", "٣"])
def test_a_time_that_is_none_is_refused_to_a_service_and_ignored_for_people(hs, alice, ghost, ts):
    for client, status in ((ghost, 400), (alice, 200)):
        room, query = client.create_room(), "?ts=" + urllib.parse.quote(ts) + (f"&user_id={ghost.user_id}" if client is bob else "")
        for where in ("send/x/1", "state/x/"):
            assert ask(hs, "PUT", f"{V3}/rooms/{room}/{where}{query}", client.token, {})[0] == status


def test_ts_is_ignored_for_people_and_on_other_routes(alice, ghost):
    room = alice.create_room()
    assert alice.event(room, alice.send(room, "x", {}, ts=5))["origin_server_ts"] > 1_000_000_000_000
    room = ghost.create_room()
    answer = ghost.call("PUT", path("rooms", room, "redact", ghost.say(room, "x"), "1"), {}, ts=5)
    assert ghost.event(room, answer["event_id"])["origin_server_ts"] > 1_000_000_000_000


# -- Handlers: for application services, and for everybody.

@pytest.mark.parametrize("version", ["v1", "r0", "unstable"])
@pytest.mark.parametrize("kind,uri,status,expected", [
    ("user", "irc://localhost/Bob,isuser", 200, "@_irc_bob:localhost"), ("user", "irc://localhost/a%5Bb,isnick", 200, "@_irc_a=5bb:localhost"),
    ("alias", "irc://localhost/%23Lobby", 200, "#_irc_Lobby:localhost"), ("alias", "irc://localhost/lobby,ischannel", 200, "#_irc_lobby:localhost"),
    ("user", "irc://elsewhere/bob,isuser", 404, "M_NOT_FOUND"), ("user", "irc://localhost/bob,isuser/more", 404, "M_NOT_FOUND"), ("alias", "xmpp:x@y", 404, "M_NOT_FOUND"),
    ("user", None, 400, "M_MISSING_PARAM"), ("user", "no uri", 400, "M_INVALID_PARAM"), ("alias", "irc:" + "x" * 2048, 400, "M_INVALID_PARAM")])
def test_a_uri_is_mapped_to_an_id_for_everybody(start, version, kind, uri, status, expected):
    hs = start(with_uris())
    answer = ask(hs, "GET", f"/_matrix/app/{version}/{kind}" + ("" if uri is None else "?" + urllib.parse.urlencode({"uri": uri})))
    assert (answer[0], answer[1].get({"user": "user_id", "alias": "alias"}[kind], answer[1].get("errcode"))) == (status, expected)


def test_a_uri_is_not_mapped_outside_the_namespace(start):
    hs = start(with_uris(users=["@other_.*"]))
    assert ask(hs, "GET", "/_matrix/app/v1/user?uri=irc://localhost/bob,isuser")[0] == 404


def test_versions_capabilities_and_well_known_tell_a_client_what_there_is(start):
    hs = start(public_url="https://matrix.example.org", room_version="12")
    versions = ask(hs, "GET", "/_matrix/client/versions")[1]
    assert {"r0.6.1", "v1.1", "v1.7", "v1.11", "v1.16"} <= set(versions["versions"]) and "v1.17" not in versions["versions"]
    assert ask(hs, "GET", "/.well-known/matrix/client") == (200, {"m.homeserver": {"base_url": "https://matrix.example.org"}})
    rooms = hs.client("alice").call("GET", V3 + "/capabilities")["capabilities"]["m.room_versions"]
    assert rooms == {"default": "12", "available": {"10": "stable", "11": "stable", "12": "stable"}}


# -- The table, row by row: who may, and what is told to those who may not.

ASKERS = {   # who asks: token and query, and what rows for a user, for a service and for anybody ("maybe") say; None: what they say to all
    "no token":                                ("", "", "M_MISSING_TOKEN", "M_MISSING_TOKEN", None),
    "a wrong token":                           ("nonsense", "", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN"),
    "a token that was logged out":             ("{logged out}", "", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN"),
    "the token of somebody deactivated":       ("{deactivated}", "", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN"),
    "a service's hs_token":                    ("hs-irc", "", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN", "M_UNKNOWN_TOKEN"),
    "a service as a person":                   ("as-irc", "user_id=@alice:localhost", "M_FORBIDDEN", "M_FORBIDDEN", None),
    "a service as another's user":             ("as-irc", "user_id=@_other_bot:localhost", "M_FORBIDDEN", "M_FORBIDDEN", None),
    "a service as a ghost that there is not":  ("as-irc", "user_id=@_irc_nobody:localhost", "M_FORBIDDEN", "M_FORBIDDEN", None),
    "a service as a user of another server":   ("as-irc", "user_id=@_irc_x:elsewhere", "M_FORBIDDEN", "M_FORBIDDEN", None),
    "a service as what is no user ID":         ("as-irc", "user_id=nonsense", "M_FORBIDDEN", "M_FORBIDDEN", None),
    "a service as a ghost that is deactivated": ("as-irc", "user_id=@_irc_gone:localhost", "M_USER_DEACTIVATED", "M_USER_DEACTIVATED", None),
    "a service as a device that there is not": ("as-irc", "device_id=GONE", "M_UNKNOWN_DEVICE", "M_UNKNOWN_DEVICE", None),
    "the same, as some still write it":        ("as-irc", "org.matrix.msc3202.device_id=GONE", "M_UNKNOWN_DEVICE", "M_UNKNOWN_DEVICE", None),
    "a person":                                ("{person}", "", "may", "M_FORBIDDEN", None),
}
ASKERS_AS = {query: says for token, query, *says in ASKERS.values() if token == "as-irc"}
TO_ALL = {   # what the rows for which no user is needed answer to whoever asks, with every variable 'x' and an empty body
    "GET /_matrix/client/versions": 200, "GET /.well-known/matrix/client": 200, "GET C/login": 200, "GET C/publicRooms": 200,
    "GET C/register/available": "M_MISSING_PARAM", "POST C/register": 401, "POST C/login": "M_MISSING_PARAM", "GET /_matrix/federation/v1/openid/userinfo": "M_MISSING_TOKEN",
    "GET C/profile/{userId}": "M_NOT_FOUND", "GET C/profile/{userId}/{keyName}": "M_NOT_FOUND", "GET C/directory/room/{roomAlias}": "M_INVALID_PARAM",
    "GET L/room/{roomId}": "M_NOT_FOUND", "GET M/download/{serverName}/{mediaId}": "M_NOT_FOUND", "GET M/download/{serverName}/{mediaId}/{fileName}": "M_NOT_FOUND",
    "GET M/thumbnail/{serverName}/{mediaId}": "M_MISSING_PARAM", "GET A/user": "M_MISSING_PARAM", "GET A/alias": "M_MISSING_PARAM", "GET V/room_summary/{roomId}": "M_NOT_FOUND",
}


def row_of(text):
    """(method, path) of a row that is written as in the table."""
    method, path = text.split()
    return method, asbridge.PREFIXES.get(path[0], path[0]) + path[1:]


class Asking:
    """Requests over one connection, each with a token: (status, answer)."""

    def __init__(self, hs):
        self.http = asbridge.HttpClient(hs.url)

    def __call__(self, method, where, token, body=b"{}"):
        data = None if method == "GET" else body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.request(method, where, data, {"Authorization": f"Bearer {token}"} if token else {})


@pytest.fixture
def asking(start):
    hs = start(registration(), registration("other", users=("@_other_.*",), aliases=()))
    asked = Asking(hs)
    yield hs, asked
    asked.http.close()


def test_each_row_of_the_table_refuses_whoever_may_not_ask_it(asking):
    hs, asked = asking
    people = {"person": hs.client("person"), "logged out": hs.client("loggedout"), "deactivated": hs.client("deactivated", "w")}
    acting(hs, "irc", "@_irc_gone:localhost").ask("POST", "account", "deactivate", body={})
    people["logged out"].ask("POST", "logout"), people["deactivated"].ask("POST", "account", "deactivate", body=confirmed())
    to_all, position, wrong = {row_of(text): answer for text, answer in TO_ALL.items()}, hs.world.store.position, []
    for route, (token, query, *says) in itertools.product(asbridge.ROUTES, ASKERS.values()):
        says = dict(zip(("user", "appservice", "maybe"), says, strict=True)).get(route.auth.replace("self", "user")) or to_all[route.method, route.path]
        if says == 401 and token == "as-irc":                # a service registers in another way
            says = "M_MISSING_PARAM"
        if route.path.endswith("/room_summary/{roomId}") and token == "as-irc":      # it tells what the user whom a service names may know
            says = next(iter(ASKERS_AS.get(query, [says])))
        if says == "may":
            continue
        token = people[token[1:-1]].token if token[:1] == "{" else token
        status, answer = asked(route.method, re.sub(r"{\w+}", "x", route.path) + f"?{query}", token)
        got = json.loads(answer).get("errcode", status)
        if got != says or (isinstance(says, str) and status != asbridge.ERRORS[says]):
            wrong.append((route.method, route.path, token, query, status, answer[:80]))
    assert wrong == [] and hs.world.store.position == position
    assert {(route.method, route.path) for route in asbridge.ROUTES if route.auth in ("nobody", "maybe")} == to_all.keys()


# What a person is told who puts another's where the own should stand. It is the same for what there is not.
ANOTHERS = {"userId": "M_FORBIDDEN", "deviceId": "M_NOT_FOUND", "filterId": "M_NOT_FOUND", "version": "M_NOT_FOUND"}
ANOTHERS_BUT = {"DELETE C/devices/{deviceId}": 200}          # of one's devices those that there are go
TOLD = {     # the specification wants it told whether there is such
    "GET C/profile/{userId}": (200, "M_NOT_FOUND"), "GET C/profile/{userId}/{keyName}": (200, "M_NOT_FOUND"), "PUT M/upload/{serverName}/{mediaId}": ("M_FORBIDDEN", "M_NOT_FOUND"),
    **{f"GET {prefix}/{where}": (200, "M_NOT_FOUND") for prefix in "MD" for where in ("download/{serverName}/{mediaId}", "download/{serverName}/{mediaId}/{fileName}",
                                                                                    "thumbnail/{serverName}/{mediaId}")}}


def whole_body(path):
    """A body that the row with this path takes."""
    if "room_keys/version" in path:
        return {"algorithm": "x", "auth_data": {}}
    if "room_keys" in path:
        return SESSION if "{sessionId}" in path else {"sessions": {}} if "{roomId}" in path else {"rooms": {}}
    return confirmed() if "{deviceId}" in path else {"displayname": "x", "membership": "join"}


def test_each_row_of_the_table_keeps_from_a_person_what_is_anothers_and_whether_there_is_such(asking):
    hs, asked = asking
    alice, bob = hs.client("alice", "w"), hs.client("bob")
    def belongings(who):
        return {"userId": who.user_id, "deviceId": device_of(who), "filterId": who.ask("POST", "user", who.user_id, "filter", body={})["filter_id"],
                "version": who.ask("POST", "room_keys", "version", body=whole_body("room_keys/version"))["version"]}
    own, others = belongings(alice), belongings(bob)
    none = {"userId": "@none:localhost", "deviceId": "NONE", "filterId": "9999", "version": "9999", "mediaId": "none"}
    waiting = bob.call("POST", "/_matrix/media/v1/create")["content_uri"].rpartition("/")[2]
    filled = hs.api.media.upload(asbridge.Who(bob.user_id), b"x", "image/png", None).rpartition("/")[2]
    common = {"serverName": "localhost", "fileName": "x", "keyName": "displayname", "type": "x", "tag": "x", "roomId": "!x:localhost", "sessionId": "s"}
    told, but, wrong = {row_of(row): says for row, says in TOLD.items()}, {row_of(row): says for row, says in ANOTHERS_BUT.items()}, []
    for method, where, *_ in asbridge.ROUTES:
        keys = where + ("?version={version}" if "room_keys/keys" in where else "?width=1&height=1")
        for name in set(re.findall(r"{(\w+)}", keys)) & none.keys():
            media = waiting if method == "PUT" else filled
            rows = [{**common, "mediaId": media, **own, **({} if name == "mediaId" else {name: others[name]})}, {**common, "mediaId": media, **own, name: none[name]}]
            answers = [asked(method, keys.format(**{key: quote(value) for key, value in row.items()}), alice.token, whole_body(where)) for row in rows]
            got = tuple(status if status < 300 else json.loads(answer)["errcode"] for status, answer in answers)
            same = len({answer.decode("latin-1").replace(row[name], "…") for row, (_, answer) in zip(rows, answers, strict=True)}) == 1
            says = told.get((method, where)) or (but.get((method, where), ANOTHERS.get(name)),) * 2
            if got != says or (not same and (method, where) not in told):
                wrong.append((method, where, name, got, answers))
    assert wrong == [] and bob.whoami()


# A known and an unknown user in a body.
NAMED = [("POST", "C/keys/query", {"device_keys": {"{user}": []}}), ("POST", "C/keys/claim", {"one_time_keys": {"{user}": {"D": "signed_curve25519"}}}),
         ("POST", "C/keys/signatures/upload", {"{user}": {"D": {"user_id": "{user}", "signatures": {}}}}), ("PUT", "C/sendToDevice/x/{n}", {"messages": {"{user}": {"*": {}, "D": {}}}}),
         ("POST", "R/kick", {"user_id": "{user}"}), ("POST", "R/unban", {"user_id": "{user}"}), ("POST", "R/invite", {"user_id": "{user}"}), ("POST", "R/ban", {"user_id": "{user}"}),
         ("PUT", "R/state/m.room.member/{user}", {"membership": "invite"}), ("PUT", "R/state/m.room.member/{user}", {"membership": "join"}), ("PUT", "R/typing/{user}", {"typing": True}),
         ("POST", "C/user_directory/search", {"search_term": "{user}"}), ("PUT", "U/account_data/m.ignored_user_list", {"ignored_users": {"{user}": {}}}),
         ("POST", "C/createRoom", {"invite": ["{user}"], "preset": "trusted_private_chat"}), ("PUT", "R/state/m.room.power_levels", {"users": {"@alice:localhost": 100, "{user}": 50}}),
         ("POST", "C/delete_devices", {"devices": ["{device}"], **confirmed()})]


def test_no_row_tells_whether_a_user_that_a_body_names_is_there(asking):
    hs, asked = asking
    alice, bob = hs.client("alice", "w"), hs.client("bob")
    for n, (method, where, body) in enumerate(NAMED):
        answers = []
        for user_id, device_id in ((bob.user_id, device_of(bob)), ("@none:localhost", "NONE")):
            def filled(text, values):
                return functools.reduce(lambda so_far, name: so_far.replace("{" + name + "}", values[name]), values, text)
            values = {"user": user_id, "device": device_id, "n": f"{n}{device_id}", "roomId": alice.create_room()}
            status, answer = asked(method, filled(row_of(f"{method} {where}")[1], {**values, "userId": "@alice:localhost"}), alice.token, filled(json.dumps(body), values).encode())
            answers.append((status, re.sub(rb'("(?:room|event)_id":|not in the room )[^,}]*', rb"\1", answer).replace(user_id.encode(), b"")))
        assert answers[0] == answers[1], (method, where)
    assert bob.whoami()


def test_a_ping_for_another_service_does_not_tell_whether_there_is_such(asking):
    _, asked = asking
    told = [asked("POST", f"/_matrix/client/v1/appservice/{id}/ping", "as-irc") for id in ("other", "none")]
    assert told[0][0] == told[1][0] == 403 and told[0][1].replace(b"other", b"none") == told[1][1]


def test_a_login_says_the_same_of_a_wrong_password_and_of_whom_there_is_not_and_works_as_long_for_it(asking, monkeypatch):
    hs, asked = asking
    hs.client("alice", "w"), hs.client("nopassword"), acting(hs, "irc", "@_irc_bob:localhost")
    hashed = []
    monkeypatch.setattr(asbridge, "hash_password", lambda *args: hashed.append(args) or "x")
    for user in ("alice", "@alice:localhost", "nopassword", "_irc_bob", "none", "@none:localhost", "@alice:elsewhere", "@", "x" * 300):
        status, answer = asked("POST", V3 + "/login", None, {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": user}, "password": "x"})
        assert (status, json.loads(answer)) == (403, {"errcode": "M_FORBIDDEN", "error": "wrong user name or password"}), user
    assert len(hashed) == 9


# -- The table, row by row: which rooms are whose.

# 200; 403 M_FORBIDDEN, 404 M_NOT_FOUND; ban: 403 M_BAD_STATE; in: 400 M_UNKNOWN, still in it. `member` has no power; `peek` is in a
# world-readable room, which it may not join; the others are in a room for those invited, with shared history, or were.
ROOM_ROWS = """
                                              member  never  none  peek  left  kicked  banned  invited  knocked  forgot
    POST   C/join/{roomId}                    200     403    403   403   403   403     ban     200      403      403
    POST   R/join                             200     403    403   403   403   403     ban     200      403      403
    POST   C/knock/{roomId}                   403     403    403   403   403   403     403     403      403      403
    POST   R/invite                           200     403    403   403   403   403     403     403      403      403
    POST   R/leave                            200     403    403   403   403   403     403     200      200      403
    POST   R/kick                             403     403    403   403   403   403     403     403      403      403
    POST   R/ban                              403     403    403   403   403   403     403     403      403      403
    POST   R/unban                            403     403    403   403   403   403     403     403      403      403
    POST   R/forget                           in      200    200   200   200   200     200     in       in       200
    PUT    R/send/{eventType}/{txnId}         200     403    403   403   403   403     403     403      403      403
    PUT    R/redact/{eventId}/{txnId}         403     403    403   403   403   403     403     403      403      403
    GET    R/state                            200     403    403   200   200   200     200     403      403      403
    GET    R/state/{eventType}                200     403    403   200   200   200     200     403      403      403
    GET    R/state/{eventType}/{stateKey}     200     403    403   200   200   200     200     403      403      403
    PUT    R/state/{eventType}                200     403    403   403   403   403     403     403      403      403
    PUT    R/state/{eventType}/{stateKey}     200     403    403   403   403   403     403     403      403      403
    GET    R/event/{eventId}                  200     404    404   200   200   200     200     404      404      404
    GET    R/members                          200     403    403   200   200   200     200     403      403      403
    GET    R/joined_members                   200     403    403   403   403   403     403     403      403      403
    GET    R/messages                         200     403    403   200   200   200     200     403      403      403
    GET    R/context/{eventId}                200     403    403   200   200   200     200     403      403      403
    GET    N/{eventId}                        200     404    404   200   200   200     200     404      404      404
    GET    N/{eventId}/{relType}              200     404    404   200   200   200     200     404      404      404
    GET    N/{eventId}/{relType}/{eventType}  200     404    404   200   200   200     200     404      404      404
    GET    V/rooms/{roomId}/threads           200     403    403   200   200   200     200     403      403      403
    GET    V/rooms/{roomId}/timestamp_to_event 200    403    403   200   200   200     200     403      403      403
    GET    V/room_summary/{roomId}            200     404    404   200   404   404     404     200      404      404
    PUT    R/typing/{userId}                  200     403    403   403   403   403     403     403      403      403
    POST   R/receipt/{receiptType}/{eventId}  200     403    403   403   403   403     403     403      403      403
    POST   R/read_markers                     200     403    403   403   403   403     403     403      403      403
    GET    R/initialSync                      200     403    403   200   200   200     200     403      403      403
    GET    R/aliases                          200     403    403   200   403   403     403     403      403      403
    GET    V/rooms/{roomId}/hierarchy         200     403    403   200   403   403     403     200      403      403
    GET    L/room/{roomId}                    200     404    404   200   200   200     200     200      200      200
    PUT    L/room/{roomId}                    403     404    404   404   403   403     403     403      403      403
    PUT    L/appservice/{networkId}/{roomId}  403     403    403   403   403   403     403     403      403      403
    PUT    C/directory/room/{roomAlias}       200     403    403   403   403   403     403     403      403      403
    GET    C/events                           200     403    403   403   403   403     403     403      403      403
    GET    C/sync                             join    -      -     -     leave leave   leave   invite   knock    -
    GET    U/rooms/{roomId}/account_data/{type} 404   404    404   404   404   404     404     404      404      404
    PUT    U/rooms/{roomId}/account_data/{type} 200   200    200   200   200   200     200     200      200      200
    GET    U/rooms/{roomId}/tags              200     200    200   200   200   200     200     200      200      200
    PUT    U/rooms/{roomId}/tags/{tag}        200     200    200   200   200   200     200     200      200      200
    DELETE U/rooms/{roomId}/tags/{tag}        200     200    200   200   200   200     200     200      200      200
    PUT    K/keys/{roomId}                    404     404    404   404   404   404     404     404      404      404
    GET    K/keys/{roomId}                    404     404    404   404   404   404     404     404      404      404
    DELETE K/keys/{roomId}                    404     404    404   404   404   404     404     404      404      404
    PUT    K/keys/{roomId}/{sessionId}        404     404    404   404   404   404     404     404      404      404
    GET    K/keys/{roomId}/{sessionId}        404     404    404   404   404   404     404     404      404      404
    DELETE K/keys/{roomId}/{sessionId}        404     404    404   404   404   404     404     404      404      404
"""
ROOM_CODES = {"403": (403, "M_FORBIDDEN"), "404": (404, "M_NOT_FOUND"), "ban": (403, "M_BAD_STATE"), "in": (400, "M_UNKNOWN"), "200": (200, None)}
STANDINGS = ROOM_ROWS.split("\n")[1].split()


class House:
    """A room in which everybody stands as their name says, and one into which everybody may look."""

    def __init__(self, hs):
        self.hs, self.rooms, self.n = hs, hs.api.rooms, 0
        self.clients = {name: hs.client(name) for name in ("alice", *STANDINGS)}
        self.who = {name: asbridge.Who(client.user_id) for name, client in self.clients.items()}
        self.open, self.open_event = self.build("world_readable"), self.say()
        self.room = self.build()

    def build(self, visibility="shared"):
        alice, rooms = self.who["alice"], self.rooms
        state = [{"type": "m.room.join_rules", "content": {"join_rule": "knock"}}, {"type": "m.room.history_visibility", "content": {"history_visibility": visibility}}]
        self.room = room = rooms.create(alice, {"initial_state": state, "power_level_content_override": {"users": {alice.user_id: 100}, "events": {"org.x": 0}, "redact": 100}})
        self.early = self.say()
        inside = [] if visibility == "world_readable" else ["member", "left", "kicked", "banned", "forgot"]
        for name in inside and [*inside, "invited"]:
            rooms.invite(alice, room, self.who[name].user_id)
        for name in inside:
            rooms.join(self.who[name], room)
        if inside:
            rooms.knock(self.who["knocked"], room)
            rooms.set_membership(self.who["left"], room, self.who["left"].user_id, "leave")
            rooms.kick(alice, room, self.who["kicked"].user_id)
            rooms.set_membership(alice, room, self.who["banned"].user_id, "ban")
            rooms.set_membership(self.who["forgot"], room, self.who["forgot"].user_id, "leave")
            rooms.forget(self.who["forgot"], room)
        rooms.set_state(alice, room, "m.room.join_rules", "", {"join_rule": "invite"})
        self.late = self.say()
        return room

    def say(self):
        self.n += 1
        return self.rooms.send(self.who["alice"], self.room, "m.room.message", {"body": str(self.n)}, str(self.n))

    def place(self, standing):
        """The room ID and an event in it."""
        if standing == "none":
            return "!" + "x" * 18 + ":localhost", "$" + "x" * 43
        return (self.open, self.open_event) if standing == "peek" else (self.room, self.early)

    def ask(self, asked, method, path, standing, event_id=None):
        """(status, answer) of a row for somebody who stands so to the room."""
        self.n += 1
        room, event = self.place(standing)
        values = {"roomId": room, "eventId": event_id or event, "userId": self.who[standing].user_id, "eventType": "org.x" if method == "PUT" else "m.room.create", "txnId": f"t{self.n}",
                  "stateKey": "", "relType": "m.thread", "receiptType": "m.read", "networkId": "n", "roomAlias": f"#x{self.n}:localhost", "type": "x", "tag": "x", "sessionId": "s"}
        filter = {"room": {"rooms": [room], "include_leave": True}}
        query = {"sync": {"filter": json.dumps(filter)}, "events": {"room_id": room}, "keys": {"version": "1"}}.get(path.split("/")[4 if "room_keys" not in path else 5], {})
        body = whole_body(path) if "room_keys" in path else {"room_id": room, "user_id": self.who["left"].user_id, "m.read": event, "typing": True, "visibility": "public"}
        if path.endswith("/timestamp_to_event"):
            query = {"ts": 0, "dir": "f"}
        if path.endswith("/unban"):
            body["user_id"] = self.who["banned"].user_id
        return asked(method, path.format(**{key: quote(value) for key, value in values.items()}) + "?" + urllib.parse.urlencode(query), self.clients[standing].token, body)


def test_each_row_that_leads_to_a_room_is_for_those_whom_it_concerns_and_tells_others_nothing(asking):
    hs, asked = asking
    house, wrong, rows = House(hs), [], [line.split() for line in ROOM_ROWS.split("\n")[2:-1]]
    for method, where, *cells in rows:
        path, answers = row_of(f"{method} {where}")[1], {}
        for standing, says in zip(STANDINGS, cells, strict=True):
            status, answer = answers[standing] = house.ask(asked, method, path, standing)
            told = json.loads(answer)
            got = next(iter(told.get("rooms", {"-": 0})), "-") if path.endswith("/sync") else (status, told.get("errcode") if status >= 400 else None)
            if got != ROOM_CODES.get(says, says):
                wrong.append((method, where, standing, says, status, answer[:100]))
            if "{eventId}" in path and standing in ("left", "kicked", "banned", "member"):
                late = house.late if standing != "member" else house.open_event
                hidden = [house.ask(asked, method, path, standing, event_id) for event_id in (late, "$" + "y" * 43)]
                if hidden[0][0] != hidden[1][0] or hidden[0][1].replace(late.encode(), b"$" + b"y" * 43) != hidden[1][1]:
                    wrong.append((method, where, standing, "an event", hidden))
        if not path.endswith(("/sync", "/events")):          # to somebody who was never there, as if there were no room
            bare = [answers[name][1].replace(house.place(name)[0].encode(), b"").replace(house.who[name].user_id.encode(), b"") for name in ("never", "none")]
            if bare[0] != bare[1]:
                wrong.append((method, where, *bare))
        if method != "GET" and "200" in cells and "/user/" not in path:
            house.build()
    assert wrong == []


def test_each_row_that_names_a_room_or_an_event_is_in_the_table_of_rooms():
    asked = {row_of(" ".join(line.split()[:2])) for line in ROOM_ROWS.split("\n")[2:-1]}
    assert not [route.path for route in asbridge.ROUTES if re.search("{roomId}|{eventId}", route.path) and (route.method, route.path) not in asked]


PUTS = [  # what else one may try to put into a room, to see whether there is one, who is in it, and what has been there
    ("state/m.room.create/", {}), ("state/m.room.canonical_alias/", {"alias": "#none:localhost"}), ("state/" + "x" * 300, {}), ("send/" + "x" * 300 + "/1", {}),
    ("send/x/2", {"body": "x" * 70_000}), ("send/m.room.redaction/3", {"redacts": "{event}"}), ("send/x/4", {"m.relates_to": {"rel_type": "m.thread", "event_id": "{event}"}}),
    ("state/m.room.power_levels", {"users": 5}), ("state/m.room.member/nobody", {"membership": "join"}),
    *((f"state/m.room.member/{target}", {"membership": membership}) for target in ("{own}", "{member}") for membership in ("join", "knock", "leave", "invite", "ban", "x", 5))]


def test_whatever_a_stranger_puts_into_a_room_is_answered_as_if_there_were_none(asking):
    hs, asked = asking
    house = House(hs)
    def told(standing, where, body):
        room, event = house.place(standing)
        names = {"{own}": house.who["never"].user_id, "{member}": house.who["member"].user_id, "{event}": event}
        where, body = (functools.reduce(lambda text, name: text.replace(name, names[name]), names, text) for text in (where, json.dumps(body)))
        status, answer = asked("PUT", f"{V3}/rooms/{room}/{where}", house.clients["never"].token, body.encode())
        return status, answer.replace(room.encode(), b"").replace(event.encode(), b"")
    for where, body in PUTS:
        assert told("never", where, body) == told("none", where, body), (where, body)


@pytest.mark.parametrize("standing", ["left", "kicked", "banned", "invited", "knocked", "forgot", "never"])
def test_who_is_not_in_a_room_does_not_find_out_who_is(asking, standing):
    hs, asked = asking
    house = House(hs)
    for how, body in (("kick", {}), ("ban", {}), ("unban", {}), ("invite", {}), ("state/m.room.member/{}", {"membership": "leave"}), ("state/m.room.member/{}", {"membership": "invite"})):
        told = set()
        for target in ("@alice:localhost", "@banned:localhost" if standing != "banned" else "@kicked:localhost", "@none:localhost"):
            method, where = ("PUT", how.format(target)) if "{}" in how else ("POST", how)
            told.add(asked(method, f"{V3}/rooms/{house.room}/{where}", house.clients[standing].token, {"user_id": target, **body}))
        assert len(told) == 1 and next(iter(told))[0] == 403, (how, told)


def test_a_member_does_not_find_out_whether_there_was_an_event_before_the_own_join_where_that_is_hidden(asking):
    hs, asked = asking
    alice, bob = hs.client("alice"), hs.client("bob")
    def events_in(visibility):
        room = alice.create_room(preset="public_chat", initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": visibility}}])
        root = alice.say(room, "root")
        events = [alice.send(room, "m.room.message", {"body": "x", "m.relates_to": {"rel_type": "m.thread", "event_id": root}}), "$" + "y" * 43]
        bob.join(room)
        return room, events
    tries = [("POST", "receipt/m.read/{e}", {}), ("POST", "receipt/m.read/{e}", {"thread_id": "main"}), ("POST", "receipt/m.read/{e}", {"thread_id": "$z"}), ("PUT", "redact/{e}/1", {}),
             ("PUT", "send/m.room.redaction/2", {"redacts": "{e}"}), ("PUT", "send/m.room.message/3", {"m.relates_to": {"rel_type": "m.thread", "event_id": "{e}"}}),
             *(("GET", where, {}) for where in ("event/{e}", "context/{e}", "relations/{e}", "relations/{e}/m.thread"))]
    found = {}
    for visibility in ("joined", "shared"):
        room, events = events_in(visibility)
        same = []
        for method, where, body in tries:
            api = V3.replace("v3", "v1") if where.startswith("relations") else V3
            told = [asked(method, f"{api}/rooms/{room}/{where.replace('{e}', event)}", bob.token, json.dumps(body).replace("{e}", event).encode()) for event in events]
            same.append(len({(status, re.sub(rb"\$[\w-]{43}", b"", answer)) for status, answer in told}) == 1)
        found[visibility] = same, "m.receipt" in types(joined(bob.sync(), room).get("ephemeral", {"events": []})["events"])
    assert found == {"joined": ([True] * len(tries), False), "shared": ([True, *[False] * (len(tries) - 1)], True)}      # where it may be seen, it is told


# -- The table, row by row: what is of the wrong type.

RELATED = {"rel_type": "m.thread", "event_id": "{event}", "key": "+", "is_falling_back": True, "m.in_reply_to": {"event_id": "{event}"}}
CONDITIONS = [{"kind": "event_match", "key": "content.body", "pattern": "x*"}, {"kind": "room_member_count", "is": ">1"}, {"kind": "contains_display_name"},
              {"kind": "event_property_is", "key": "content.x", "value": 1}, {"kind": "event_property_contains", "key": "content.x", "value": 1},
              {"kind": "sender_notification_permission", "key": "room"}]
ACTIONS = ["notify", {"set_tweak": "highlight", "value": False}]
EVENTS = {"limit": 5, "types": ["m.*"], "not_types": ["x"], "senders": ["{user}"], "not_senders": ["x"], "contains_url": False, "lazy_load_members": True,
          "unread_thread_notifications": True}
SIGNED = {"user_id": "{user}", "usage": ["master"], "keys": {"ed25519:K": "K"}, "signatures": {"{user}": {"ed25519:K": "s"}}}
SESSION = {"first_message_index": 0, "forwarded_count": 0, "is_verified": False, "session_data": {"x": 1}}
AUTH = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "nobody"}, "user": "x", "password": "", "session": "s"}
PERSON = "as a person"
BODIES = [
    ("POST", "C/register", {"type": "m.login.application_service", "username": "_irc_new", "user": "x", "device_id": "D", "initial_device_display_name": "x", "inhibit_login": True}),
    ("POST", "C/register", {"username": "root", "password": "", "auth": {"type": "m.login.dummy", "session": "s"}, "inhibit_login": True}, PERSON),
    ("POST", "C/login", {"type": "m.login.application_service", "identifier": {"type": "m.id.user", "user": "_irc_bob"}, "user": "_irc_bob", "device_id": "LOGIN", "initial_device_display_name": "x"}),
    ("POST", "C/account/password", {"new_password": "x", "logout_devices": False, "auth": AUTH}), ("POST", "C/account/password", {"new_password": "x", "auth": AUTH}, PERSON),
    ("POST", "C/account/deactivate", {"erase": True, "auth": AUTH}, PERSON), ("DELETE", "C/devices/OTHER", {"auth": AUTH}), ("POST", "C/delete_devices", {"devices": ["OTHER"], "auth": AUTH}),
    ("PUT", "C/devices/GHOST", {"display_name": "x"}), ("PUT", "C/profile/{user}/displayname", {"displayname": "x"}), ("PUT", "C/profile/{user}/avatar_url", {"avatar_url": "mxc://x/x"}),
    ("PUT", "U/account_data/m.ignored_user_list", {"ignored_users": {"@carol:localhost": {}}}), ("PUT", "U/rooms/{room}/account_data/m.tag", {"tags": {"x": {"order": 1}}}),
    ("PUT", "U/rooms/{room}/tags/x", {"order": 0.5}),
    ("POST", "U/filter", {"presence": {}, "account_data": {}, "room": {"rooms": ["{room}"], "not_rooms": ["x"], "include_leave": True, "timeline": EVENTS, "state": {}, "ephemeral": {}, "account_data": {}}}),
    ("PUT", "C/pushrules/global/override/a", {"actions": ACTIONS, "conditions": CONDITIONS}), ("PUT", "C/pushrules/global/content/b", {"actions": ACTIONS, "pattern": "x"}),
    ("PUT", "C/pushrules/global/room/{room}", {"actions": ACTIONS}), ("PUT", "C/pushrules/global/override/.m.rule.master/enabled", {"enabled": False}),
    ("PUT", "C/pushrules/global/underride/.m.rule.message/actions", {"actions": ACTIONS}),
    ("POST", "C/keys/upload", {"device_keys": {"user_id": "{user}", "device_id": "GHOST", "algorithms": ["x"], "keys": {"ed25519:GHOST": "k"}, "signatures": {"{user}": {"ed25519:GHOST": "s"}}},
                               "one_time_keys": {"signed_curve25519:A": {"key": "k"}, "curve25519:B": "k"}, "fallback_keys": {"signed_curve25519:F": {"key": "k", "fallback": True}},
                               "org.matrix.msc2732.fallback_keys": {"signed_curve25519:F": {"key": "k"}}}),
    ("POST", "C/keys/query", {"device_keys": {"{user}": ["GHOST"]}, "timeout": 10}), ("POST", "C/keys/claim", {"one_time_keys": {"{user}": {"GHOST": "signed_curve25519"}}, "timeout": 10}),
    ("POST", "C/keys/device_signing/upload", {"master_key": SIGNED, "self_signing_key": {**SIGNED, "usage": ["self_signing"]}, "auth": AUTH}),
    ("POST", "C/keys/signatures/upload", {"{user}": {"GHOST": {"user_id": "{user}", "signatures": {"{user}": {"ed25519:K": "s"}}}, "K": SIGNED}}),
    ("PUT", "C/sendToDevice/m.x/{n}", {"messages": {"{user}": {"*": {"x": 1}, "GHOST": {"x": 1}}}}),
    ("PUT", "K/version/{backup}", {"algorithm": "x", "auth_data": {"x": 1}}),
    ("PUT", "K/keys?version={backup}", {"rooms": {"{room}": {"sessions": {"s": SESSION}}}}), ("PUT", "K/keys/{room}?version={backup}", {"sessions": {"s": SESSION}}),
    ("PUT", "K/keys/{room}/t?version={backup}", SESSION), ("PUT", "C/presence/{user}/status", {"presence": "online", "status_msg": "x"}),
    ("POST", "C/createRoom", {"room_version": "11", "visibility": "private", "preset": "public_chat", "invite": ["@alice:localhost"], "is_direct": True, "room_alias_name": "", "name": "x",
                              "topic": "x", "creation_content": {"type": "x", "m.federate": True}, "initial_state": [{"type": "m.room.topic", "state_key": "", "content": {"topic": "x"}}],
                              "power_level_content_override": {"users": {"{user}": 100}, "notifications": {"room": 50}, "events": {"x": 1}, "ban": 50}}),
    ("POST", "C/createRoom", {"room_version": "12", "creation_content": {"additional_creators": ["@alice:localhost"]}, "preset": "trusted_private_chat"}),
    ("POST", "C/join/{room}", {"reason": "x", "third_party_signed": {}}), ("POST", "R/join", {"reason": "x"}), ("POST", "C/knock/{room}", {"reason": "x"}),
    ("POST", "R/invite", {"user_id": "@carol:localhost", "reason": "x"}), ("POST", "R/kick", {"user_id": "@carol:localhost", "reason": "x"}),
    ("POST", "R/ban", {"user_id": "@carol:localhost", "reason": "x"}), ("POST", "R/unban", {"user_id": "@carol:localhost", "reason": "x"}), ("POST", "R/leave", {"reason": "x"}),
    ("PUT", "R/send/m.room.message/{n}", {"body": "x", "msgtype": "m.text", "m.relates_to": RELATED, "m.mentions": {"user_ids": ["@alice:localhost"], "room": True}, "m.new_content": {"body": "x"}}),
    ("PUT", "R/send/m.room.message/{n}", {"body": "* x", "m.relates_to": {"rel_type": "m.replace", "event_id": "{event}"}, "m.new_content": {"body": "x"}}),
    ("PUT", "R/send/m.reaction/{n}", {"m.relates_to": {"rel_type": "m.annotation", "event_id": "{event}", "key": "+"}}), ("PUT", "R/send/m.room.redaction/{n}", {"redacts": "{event}", "reason": "x"}),
    ("PUT", "R/redact/{event}/{n}", {"reason": "x", "redacts": "x"}),
    *(("PUT", f"R/state/{type}/{key}", content) for type, key, content in (
        ("m.room.name", "", {"name": "x"}), ("m.room.avatar", "", {"url": "mxc://x/x"}), ("m.room.guest_access", "", {"guest_access": "x"}), ("m.room.tombstone", "", {"body": "x", "replacement_room": "x"}),
        ("m.room.join_rules", "", {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": "{room}"}]}),
        ("m.room.history_visibility", "", {"history_visibility": "joined"}), ("m.room.canonical_alias", "", {"alias": "", "alt_aliases": []}),
        ("m.room.member", "{user}", {"membership": "join", "displayname": "x", "avatar_url": "x", "reason": "x", "join_authorised_via_users_server": "x"}),
        ("m.room.member", "@alice:localhost", {"membership": "leave", "displayname": "x", "third_party_invite": {"signed": {}}}),
        ("m.space.child", "{room}", {"via": ["x"], "order": "x", "suggested": True}), ("m.room.create", "", {"room_version": "11"}),
        ("m.room.power_levels", "", {"users": {"{user}": 100}, "users_default": 0, "events": {"x": 0}, "events_default": 0, "state_default": 0, "ban": 0, "invite": 0, "notifications": {"room": 0}}))),
    ("PUT", "R/typing/{user}", {"typing": True, "timeout": 1000}), ("POST", "R/receipt/m.read/{event}", {"thread_id": "main"}),
    ("POST", "R/read_markers", {"m.fully_read": "{event}", "m.read": "{event}", "m.read.private": "{event}"}), ("PUT", "C/directory/room/%23_irc_{n}:localhost", {"room_id": "{room}"}),
    ("PUT", "L/room/{room}", {"visibility": "public"}), ("PUT", "L/appservice/net/{room}", {"visibility": "public"}),
    ("POST", "C/publicRooms", {"limit": 5, "since": "0", "filter": {"generic_search_term": "x", "room_types": [None]}, "include_all_networks": False, "third_party_instance_id": ""}),
    ("POST", "C/user_directory/search", {"search_term": "x", "limit": 5}), ("POST", "V/appservice/irc/ping", {"transaction_id": "x"}),
    ("POST", "K/version", {"algorithm": "x", "auth_data": {"x": 1}}),
]

# Of these, even what is right is refused.
REFUSED = {"C/account/password", "C/account/deactivate", "C/knock/{room}", "R/kick", "R/unban", "R/state/m.room.create/", "V/appservice/irc/ping"}


def failing(target, method, where, body, person=(), chosen=some):
    """What goes wrong with this body and those that are like it. `chosen`: which of the mutations."""
    target.fresh()
    route = pattern_of(where)
    values = [json.dumps(body), *map(json.dumps, WRONG), "{", '{"x":1e400}', "\ud800", *map(json.dumps, chosen(mutations(body)))]
    for value in values:
        data = target.filled(value).encode("utf-8", "surrogatepass")
        status, answer = target.ask(method, target.filled(route, quote), data, bool(person))
        if status >= 500 or (status >= 400 and status != 401 and "errcode" not in json.loads(answer)):
            yield status, data.decode("utf-8", "replace"), answer[:100]
        elif value is values[0] and (status < 300) == (where in REFUSED):
            yield status, "is what should be taken", answer
        elif status < 300:
            try:
                target.reads()
            except Exception as error:
                yield "after this", data.decode(), repr(error)
                return


def test_no_value_of_a_wrong_type_in_a_body_makes_the_homeserver_fail_then_or_later(start):
    target = Target(start(registration()))
    assert [(*row[:2], *what) for row in BODIES for what in failing(target, *row)] == []


def test_each_row_that_reads_a_body_is_asked_nonsense():
    router = asbridge.Router(asbridge.ROUTES)
    asked = {router.find(row[0], re.sub(r"{\w+}", "x", pattern_of(row[1].partition("?")[0])))[0].path.partition("{stateKey}")[0] for row in BODIES}
    bodiless = ("/logout", "/all", "/forget", "/request_token", "/create", "/upload", "/{mediaId}", "{eventType}")
    assert not [route.path for route in asbridge.ROUTES if route.method in ("PUT", "POST") and route.path not in asked
                and not route.path.partition("{stateKey}")[0].rstrip("/").endswith(bodiless)]


WRONG_QUERIES = ["", "x", "-1", "9" * 20, "9007199254740991", "%00%FF", "%D9%A3", "[]", '{"limit":"x"}', '{"types":[5],"limit":-5}', '{"room":{"timeline":5}}']
QUERIES = ("limit", "from", "to", "since", "timeout", "dir", "ts", "at", "version", "filter", "membership", "set_presence", "full_state", "max_depth", "uri", "width", "timeout_ms", "room_id")
WRONG_SEGMENTS = ["%00", "%F0%9F%92%A5", "%FF", "%20", "x" * 300, "@", "%23", "$", "..", "%2F", "'%22%5B%2A"]


def sources(route):
    """The constants of the handler of a row, among which are the names in the query that it reads itself."""
    handler = next((cell.cell_contents.handler for cell in route.handler.__closure__ or () if isinstance(cell.cell_contents, asbridge.Route)), route.handler)
    return handler.__code__.co_consts


def values_of(target):
    user, room = target.ghost.user_id, target.room
    return {"userId": user, "roomId": room, "eventId": target.event, "deviceId": "GHOST", "type": "org.x", "tag": "x", "filterId": target.filter, "kind": "override", "ruleId": ".m.rule.master",
            "eventType": "m.room.member", "txnId": "t", "version": target.backup, "sessionId": "s", "stateKey": user, "relType": "m.thread", "receiptType": "m.read",
            "roomAlias": "#_irc_x:localhost", "networkId": "n", "serverName": "localhost", "mediaId": "none", "fileName": "x", "protocol": "x", "appserviceId": "irc", "keyName": "displayname"}


def test_no_query_makes_the_homeserver_fail(target):
    values, failed = {name: quote(value) for name, value in values_of(target).items()}, []
    for route in asbridge.ROUTES:
        if route.method != "GET" and "/send/" not in route.path and "/state/" not in route.path and "room_keys" not in route.path:
            continue
        where, constants = route.path.format(**values), str(sources(route))
        for name, wrong in itertools.product(QUERIES, WRONG_QUERIES):
            if name == "timeout" and route.path.endswith("/events"):
                continue                                     # it would wait so long
            if name not in ("filter", "ts", "version") and name not in constants:
                continue
            status, answer = target.ask(route.method, f"{where}?{name}={quote(wrong) if wrong[:1] != '%' else wrong}", None if route.method == "GET" else b"{}")
            if status >= 500:
                failed.append((route.method, route.path, name, wrong, status))
    assert failed == []


def test_no_segment_of_a_path_makes_the_homeserver_fail(target):
    values, failed = {name: quote(value) for name, value in values_of(target).items()}, []
    for route in asbridge.ROUTES:
        for name, wrong in itertools.product(re.findall(r"{(\w+)}", route.path), WRONG_SEGMENTS):
            if route.method == "DELETE" and name == "deviceId":
                continue
            status, answer = target.ask(route.method, route.path.format(**{**values, name: wrong}), None if route.method == "GET" else b"{}")
            if status >= 500:
                failed.append((route.method, route.path, name, wrong, status, answer))
    target.reads()
    assert failed == []


# ============================================================================
# 9. Inspector
# ============================================================================

# -- Why.

def inspect(hs, method, path, body=None, **headers):
    return ask(hs, method, "/_asbridge/" + path, None, body, headers)


def test_why_says_for_which_rule_an_event_was_pushed_and_what_became_of_it(linked):
    hs, r, alice, room = linked
    event_id = alice.say(room, "x")
    hs.settle()
    said = hs.why(event_id, "irc")
    assert said["pushed"] and said["reason"] == f"room {room} matches rooms[0]" and said["state"] == "acknowledged"
    assert said["transaction"]["txn_id"] == r.transactions[-1][0] and [one["status"] for one in said["transaction"]["attempts"]] == [200]
    assert said["summary"] == [f"it goes to irc: room {room} matches rooms[0]", "irc has acknowledged it", "attempt 1: acknowledged"]
    hs.faults("irc").status(status=403)
    late = alice.say(room, "y")
    eventually(lambda: hs.delivery.worker("irc").failures)
    later = alice.say(room, "z")
    assert hs.why(late, "irc")["state"] == "in a transaction" and hs.why(later, "irc")["state"] == "waiting"
    assert "attempt 1: it answered 403 (fault: status)" in hs.why(late, "irc")["summary"] and hs.why(later, "irc")["transaction"] is None


def test_why_names_every_rule_that_said_no_and_the_nearest_miss(start, recorder):
    hs = start(registration(url=recorder().url, users=["@irc_.*"], sender_localpart="bridge"))
    alice, Irc = hs.client("alice"), hs.client("xmpp_bob")
    room = alice.create_room(preset="public_chat", room_alias_name="town")
    Irc.join(room)
    event_id = alice.say(room, "x")
    said = hs.why(event_id, "irc")
    assert not said["pushed"] and said["transaction"] is None and said["state"] is None
    assert [(rule["rule"], rule["id"], rule["matches"]) for rule in said["rules"]] == [
        ("sender", "@alice:localhost", False), ("member", "@alice:localhost", False), ("member", "@xmpp_bob:localhost", False),
        ("alias", "#town:localhost", False), ("room", room, False)]
    assert said["rules"][0]["namespace"] == "users[0] '@irc_.*'" and "differs at character 2" in said["rules"][0]["miss"]
    assert "no regex for rooms" in said["rules"][-1]["miss"] and "no rule says yes" in said["summary"][0]


def test_why_goes_by_the_members_at_the_time_of_the_event(start, recorder):
    hs = start(registration(url=recorder().url))
    alice, bob = hs.client("alice"), acting(hs, "irc", "@_irc_bob:localhost")
    room = alice.create_room(preset="public_chat")
    before = alice.say(room, "before")
    bob.join(room)
    during = alice.say(room, "during")
    bob.leave(room)
    assert not any(rule["matches"] for rule in hs.why(before, "irc")["rules"])
    assert [rule["id"] for rule in hs.why(during, "irc")["rules"] if rule["matches"]] == ["@_irc_bob:localhost"]


def test_why_knows_of_a_service_without_a_url_and_of_one_that_came_later(start, recorder):
    hs = start(registration(), registration("late", users=[], url=recorder().url))
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    event_id = bob.say(bob.create_room(), "x")
    assert hs.why(event_id, "irc")["summary"] == ["nothing is sent to irc: its url is null"]
    hs.reread = lambda: [asbridge.read_registration(registration("late", users=["@_irc_.*"], exclusive=False, url=hs.url), "here")]
    hs.reload()
    assert "was not loaded or another" in hs.why(event_id, "late")["summary"][0]
    with refused("M_NOT_FOUND", 404, "only late"):
        hs.why(event_id, "irc")
    for unknown in ("$x", "$" + "A" * 43, ""):
        with refused("M_NOT_FOUND", 404):
            hs.why(unknown, "late")


def test_why_tells_who_was_only_invited_and_takes_nothing_for_too_long_ago_before_anything_was_pruned(start, recorder):
    hs = start(registration(url=recorder().url))
    alice = hs.client("alice")
    room = alice.create_room()
    before = alice.say(room, "before")
    alice.invite(room, "@_irc_bot:localhost")
    after = alice.say(room, "after")
    assert "no rule says yes" in hs.why(before, "irc")["summary"][0]
    assert any("@_irc_bot:localhost" in line and "only invited" in line for line in hs.why(after, "irc")["summary"])


def test_why_says_that_an_alias_may_have_come_later(start, recorder):
    hs = start(registration(url=recorder().url, exclusive=False))
    alice = hs.client("alice")
    room = alice.create_room()
    before = alice.say(room, "before")
    alice.set_alias("#_irc_x:localhost", room)
    assert "did not have that alias" in hs.why(before, "irc")["summary"][0]


def test_why_is_quick_with_a_long_regex_and_many_members(start, recorder):
    hs = start(registration(url=recorder().url, users=["@" + "|@".join(f"irc{n}_.*" for n in range(300))], exclusive=False))
    alice = hs.client("alice")
    room = alice.create_room(preset="public_chat")
    for n in range(40):
        hs.client(f"u{n}").join(room)
    began = time.process_time()
    rules = hs.why(alice.say(room, "x"), "irc")["rules"]
    assert time.process_time() - began < 2 and len(rules) == 2 + asbridge.MAX_MISSES


def test_why_says_what_is_too_long_ago_to_be_known(linked, monkeypatch):
    hs, r, alice, room = linked
    event_id = alice.say(room, "first")
    hs.settle()
    monkeypatch.setattr(asbridge, "KEPT_TRANSACTIONS", 2), monkeypatch.setattr(asbridge, "PRUNED_AT_ONCE", 2)
    for n in range(9):
        alice.say(room, str(n)), hs.settle()
    assert "too long ago" in hs.why(event_id, "irc")["summary"][0]


def test_explain_says_whether_an_id_exists_and_whom_a_query_would_ask(linked):
    hs, r, alice, room = linked
    assert hs.explain(alice.user_id)["exists"] and hs.explain(room)["exists"] and not hs.explain("#_irc_x:localhost")["exists"]
    assert any("GET /_matrix/app/v1/rooms/" in line for line in hs.explain("#_irc_x:localhost")["summary"])
    acting(hs, "irc", "@_irc_bob:localhost")
    assert not any("is asked" in line for line in hs.explain("@_irc_bob:localhost")["summary"])


# -- Levers, and a lesson.

def test_the_api_answers_what_the_embedded_homeserver_does(linked):
    hs, r, alice, room = linked
    event_id = alice.say(room, "x")
    hs.settle()
    quoted = urllib.parse.quote(event_id)
    assert inspect(hs, "GET", f"why?event={quoted}&appservice=irc") == (200, hs.why(event_id, "irc"))
    assert inspect(hs, "GET", "explain?id=%40_irc_x:localhost") == (200, hs.explain("@_irc_x:localhost"))
    last = inspect(hs, "GET", "transactions?appservice=irc&limit=1")[1]["transactions"]
    assert len(last) == 1 and last[0]["txn_id"] == r.transactions[-1][0] and last[0]["events"][0]["event_id"] == event_id
    assert last[0]["attempts"] == hs.transactions("irc")[-1]["attempts"] and "content" not in last[0]["events"][0]
    status = inspect(hs, "GET", "status")[1]
    one = status["appservices"][0]
    assert (one["id"], one["state"], one["waiting"], one["failures"], one["last_acknowledged"]["txn_id"]) == ("irc", "idle", 0, 0, r.transactions[-1][0])
    assert one["latency_ms"] > 0 and status["server_name"] == "localhost" and one["namespaces"]["users"] == [{"regex": "@_irc_.*", "exclusive": False}]


def test_the_levers_of_the_api_do_what_they_say(linked):
    hs, r, alice, room = linked
    irc = {"appservice": "irc"}
    assert inspect(hs, "POST", "faults", {**irc, "fault": "status", "status": 503, "times": 2})[1]["faults"][0]["times"] == 2
    assert inspect(hs, "GET", "faults?appservice=irc")[1]["faults"][0]["status"] == 503
    assert inspect(hs, "DELETE", "faults?appservice=irc")[1] == {} and hs.faults("irc").told() == []
    inspect(hs, "POST", "pause", irc)
    event_id = inspect(hs, "POST", "say", {"room_id": room, "user_id": alice.user_id, "body": "<img onerror=x>"})[1]["event_id"]
    assert hs.why(event_id, "irc")["state"] == "in a transaction" and not r.requests
    skipped = inspect(hs, "POST", "skip", irc)[1]["txn_id"]
    inspect(hs, "POST", "resume", irc), inspect(hs, "POST", "retry", irc)
    assert inspect(hs, "POST", "replay", {**irc, "txn_id": skipped})[1] == {"txn_id": skipped}
    hs.settle()
    new = inspect(hs, "POST", "replay", {**irc, "new_id": True})[1]["txn_id"]
    hs.settle()
    assert [txn_id for txn_id, _ in r.transactions] == [skipped, new]
    assert inspect(hs, "POST", "ping", irc)[1]["duration_ms"] >= 0
    before = hs.clock.now()
    assert inspect(hs, "POST", "clock", {"advance": 3600})[1]["wound"] == 3600 and hs.clock.now() >= before + 3_600_000


def test_rooms_and_people_are_enough_for_a_lesson_without_another_client(linked):
    hs, r, alice, room = linked
    assert inspect(hs, "POST", "people", {"name": "bob"}) == (200, {"user_id": "@bob:localhost"})
    assert inspect(hs, "GET", "people")[1] == {"people": ["@alice:localhost", "@bob:localhost"]}
    public = alice.create_room(preset="public_chat", name="Town", room_alias_name="town")
    rooms = {one["room_id"]: one for one in inspect(hs, "GET", "rooms")[1]["rooms"]}
    entered = {room: inspect(hs, "POST", "rooms", {"user_id": "@bob:localhost", "room": room})[1] for room in ("#town:localhost", "Village", alice.user_id)}
    assert entered["#town:localhost"] == {"room_id": public} and entered[alice.user_id]["room_id"] in alice.sync()["rooms"]["invite"]
    assert [one["members"] for one in inspect(hs, "GET", "rooms")[1]["rooms"] if one["name"] == "Village"] == [1]
    assert inspect(hs, "POST", "rooms", {"user_id": "@bob:localhost", "room": "#nowhere:localhost"})[1]["errcode"] == "M_NOT_FOUND"
    assert rooms[public] == {"room_id": public, "name": "Town", "alias": "#town:localhost", "members": 1}
    assert inspect(hs, "POST", "say", {"room_id": "#town:localhost", "user_id": "@bob:localhost", "body": "hi"})[0] == 200
    seen = inspect(hs, "GET", f"timeline?room={urllib.parse.quote(public)}&limit=1")[1]
    assert seen["events"][0]["content"] == {"msgtype": "m.text", "body": "hi"} and seen["people"] == seen["members"] == ["@alice:localhost", "@bob:localhost"]
    acting(hs, "irc", "@_irc_ghost:localhost")
    for user_id, errcode in (("@_irc_ghost:localhost", "M_NOT_FOUND"), ("@nobody:localhost", "M_NOT_FOUND")):
        assert inspect(hs, "POST", "say", {"room_id": public, "user_id": user_id, "body": "hi"})[1]["errcode"] == errcode
    assert inspect(hs, "POST", "say", {"room_id": room, "user_id": "@bob:localhost", "body": "hi"})[1]["errcode"] == "M_FORBIDDEN"
    assert inspect(hs, "GET", "timeline?room=!x")[0] == 404
    said = [(one.source, one.method, one.status) for one in hs.delivery.wire.since(0, 0)[1] if "/send/" in one.path and one.client]
    assert said == [("@bob:localhost", "PUT", 200), ("@bob:localhost", "PUT", 403)]      # as a client's would look


# -- What passes.

def test_a_service_that_registers_a_ghost_is_seen_as_itself(linked):
    hs, r, alice, room = linked
    asbridge.Client(hs.url, "as-irc").call("POST", "/_matrix/client/v3/register", {"type": "m.login.application_service", "username": "_irc_bob"})
    ask(hs, "GET", "/favicon.ico")
    last = hs.delivery.wire.since(0, 0)[1][-2:]
    assert any((one.source, one.client, one.path) == ("irc", False, "/_matrix/client/v3/register") for one in last)
    assert not any("favicon" in one.path for one in hs.delivery.wire.since(0, 0)[1])


def test_an_exchange_opens_to_headers_and_bodies_without_any_token(linked):
    hs, r, alice, room = linked
    since = inspect(hs, "GET", "exchanges")[1]["next"]
    alice.say(room, "x"), bot_of(hs, "irc").whoami()
    ask(hs, "POST", "/_matrix/client/v3/register", body={"username": "carol", "password": "secret", "auth": {"type": "m.login.dummy"}})
    hs.settle()
    found = eventually(lambda: (news := inspect(hs, "GET", f"exchanges?since={since}")[1]["exchanges"]) and len(news) >= 4 and all(one["done"] for one in news) and news)
    kinds = sorted((one["from"], one["to"], one["lane"], one["kind"]) for one in found)
    assert kinds == [("@alice:localhost", "hs", "client", "request"), ("hs", "irc", "appservice", "transaction"),
                     ("irc", "hs", "appservice", "request"), ("somebody", "hs", "client", "request")]
    for one in found:
        whole = inspect(hs, "GET", f"exchange?n={one['n']}")[1]
        assert whole["request"]["headers"] and whole["answer"]["body"] and whole["status"] == 200
        text = json.dumps(whole)
        assert not any(secret in text for secret in ("hs-irc", "as-irc", alice.token, "secret")), text
    pushed = next(one for one in found if one["kind"] == "transaction")
    assert pushed["first"] == {"type": "m.room.message", "sender": "@alice:localhost"} and pushed["events"] == pushed["attempt"] == 1
    assert inspect(hs, "GET", "exchange?n=999999")[0] == 404


def test_whoever_looks_at_what_passes_is_answered_as_soon_as_something_does(linked):
    hs, r, alice, room = linked
    since = inspect(hs, "GET", "exchanges")[1]["next"]
    with ThreadPoolExecutor() as pool:
        looking = pool.submit(inspect, hs, "GET", f"exchanges?since={since}&timeout=10000")
        eventually(lambda: hs.delivery.wire._bells)
        alice.whoami()
        assert looking.result()[1]["exchanges"][0]["path"] == "/_matrix/client/v3/account/whoami"
        since = inspect(hs, "GET", "exchanges")[1]["next"]
        looking = pool.submit(inspect, hs, "GET", f"exchanges?since={since}&timeout=10000")
        eventually(lambda: hs.delivery.wire._bells)
        hs.stop()                                            # and does not wait for it
        looking.result()


@pytest.mark.parametrize("body", [
    '{"pass\\u0077ord": "hunter2"}', '{"Password": "hunter2"}', '{"password": ["hunter2", "hunter2"]}', '{"auth": {"type": "x", "password": "hunter2"}}', "password=hunter2&x=1",
    "{'password': 'hunter2'}", '{"access_token": "hunter2', '{"a": 1, "as_token":"hunter2"', '{"pass": "hunter2"}', '{"client_secret": "hunter2"}', "GET /x?access_token=hunter2 HTTP/1.1"])
def test_no_password_or_token_in_a_body_is_shown_whatever_the_body_is(body):
    assert "hunter2" not in asbridge.shown_body(body.encode()) and asbridge.shown_body(b'{"body": "the password is x", "n": [1]}') == '{"body":"the password is x","n":[1]}'


@pytest.mark.parametrize("name", ["Authorization", "X-Auth-Token", "Proxy-Authorization", "X-Api-Key", "Cookie", "Referer"])
def test_of_a_header_that_may_hold_a_secret_only_the_name_is_shown(target, name):
    ask(target.hs, "GET", "/_matrix/client/versions", headers={name: "http://x/?hunter2"})
    ask(target.hs, "GET", "/_matrix/client/v3/sync&access_token=hunter2")
    for one in target.hs.delivery.wire.since(0, 0)[1][-2:]:
        assert "hunter2" not in json.dumps(inspect(target.hs, "GET", f"exchange?n={one.n}")[1])
    assert name.lower() in target.hs.delivery.wire.since(0, 0)[1][-2].headers


def test_of_a_huge_head_only_a_part_is_kept(target):
    ask(target.hs, "GET", "/_matrix/client/versions", headers={f"X-{n}": "x" * 900 for n in range(50)})
    assert sum(map(len, target.hs.delivery.wire.since(0, 0)[1][-1].headers.values())) < 10_000


def test_a_service_that_repeats_what_it_was_asked_does_not_make_its_token_known(linked, caplog):
    hs, r, alice, room = linked
    r.answer = lambda request, body: (404, f"Cannot PUT {request.path}?access_token={request.query['access_token']} {request.headers['authorization']}".encode())
    alice.say(room, "x")
    eventually(lambda: hs.delivery.worker("irc").failures)
    told = json.dumps([inspect(hs, "GET", f"exchange?n={one.n}")[1] for one in hs.delivery.wire.since(0, 0)[1]]) + caplog.text
    with pytest.raises(AssertionError) as caught:
        hs.settle(0)
    assert "Cannot PUT" in told and "hs-irc" not in told + str(caught.value)
    told = asbridge.advice(hs.delivery.registration("irc"), http.client.BadStatusLine("PUT /x?access_token=hs-irc"))
    assert told == "what it answered is not HTTP/1.1 (BadStatusLine: PUT /x?access_token=(hs_token))"
    cut = [asbridge.advice(hs.delivery.registration("irc"), http.client.BadStatusLine("x" * length + "hs-irc" + "y" * 60_000)) for length in range(170, 200)]
    assert not [one for one in cut if "xhs" in one or len(one) > 300]


def test_of_a_service_that_repeats_its_other_token_it_is_not_kept(linked):
    hs, r, alice, room = linked
    r.answers(500, b"you are as-irc")
    alice.say(room, "x")
    assert eventually(lambda: [one.answer for one in hs.delivery.worker("irc").attempts if one.status == 500])[0] == b"you are (as_token)"


def test_what_is_printed_of_an_object_has_no_secret_in_it(start, recorder):
    r = recorder()
    hs = start(registration(url=r.url, rooms=["!.*"], as_token="SECRET-A", hs_token="SECRET-H"), admin_token="SECRET-ADMIN")
    alice = hs.client("alice", "SECRET-PW")
    alice.say(alice.create_room(), "x"), hs.appservice("irc").whoami()
    ask(hs, "POST", V3 + "/login", body={"type": "m.login.password", "user": "alice", "password": "SECRET-PW"})
    hs.settle()
    exchanges = hs.delivery.wire.since(0, 0)[1]
    shown = repr([hs, hs.config, hs.world.settings, hs.world.registrations.by_id, hs.delivery.worker("irc").attempts, exchanges, alice, hs.appservice("irc")])
    assert len(exchanges) > 4 and "SECRET" not in shown and alice.token not in shown and "/v3/login" in shown


# -- The bridge examiner.

def examined(url, queries=True, ms=5000, **keys):
    """What the examiner finds: outcome and what was seen, by test."""
    one = asbridge.read_registration(registration(url=url, **keys), "here")
    return {row.test: row for row in asbridge.Examiner(one, asbridge.Settings(query_timeout_ms=ms), queries).results()}


def failed(found):
    return [row.test for row in found.values() if row.outcome == "failed"]


REFUSALS = ["refuses a transaction without a token", "refuses a wrong token in the header", "refuses a wrong token in the query"]
TAKEN = ["takes an empty transaction", "takes the same transaction again", "takes the hs_token from the header alone", "takes unknown keys in a transaction",
         "takes an event of an unknown type and shape", "takes an event of a room that it does not know", "takes ephemeral data",
         "takes ephemeral data, by its older name"]
UNKNOWN = ["says 404 to an unknown path", "says 405 to a wrong method"]
UNKNOWN_ONES = ["answers when asked for an unknown user", "answers when asked for an unknown alias"]


@pytest.mark.parametrize("fault,fails", [
    ("none", []), ("takes any token", REFUSALS), ("breaks", ["refuses broken JSON, and is not broken by it"]), ("answers no JSON", ["answers a ping", *TAKEN]),
    ("answers with pages", [*UNKNOWN, *UNKNOWN_ONES]), ("says no errcode", REFUSALS), ("creates", []), ("reads the query only", ["takes the hs_token from the header alone"]),
    ("is strict", [TAKEN[3], TAKEN[4], TAKEN[6], TAKEN[7]]), ("knows the legacy paths only", ["answers a ping", "takes an empty transaction"])])
def test_the_examiner_finds_each_fault_of_an_application_service_and_no_other(recorder, fault, fails):
    service = recorder(answering(fault))
    found = examined(service.url)
    assert failed(found) == sorted(fails, key=list(found).index), [row for row in found.values() if row.outcome == "failed"]
    assert [row.test for row in found.values() if row.outcome == "skipped"] == ["describes its protocols"]


def test_every_check_of_the_examiner_can_fail(recorder):
    shown = {*REFUSALS, *TAKEN, *UNKNOWN, *UNKNOWN_ONES, "answers a ping", "refuses broken JSON, and is not broken by it", "listens at its url", "describes its protocols"}
    assert {test for test, _, _ in asbridge.Examiner.CHECKS} == shown


def test_the_examiner_says_that_only_the_legacy_paths_are_known_and_goes_on_with_them(recorder):
    service = recorder(answering("knows the legacy paths only"))
    found = examined(service.url)
    assert found["takes an empty transaction"].seen.startswith("only the legacy path /transactions/… is known: 200 {}; at today's 404 M_UNRECOGNIZED")
    assert "the ping came with v1.7" in found["answers a ping"].seen
    assert any(path.startswith("/users/@_irc_") for _, path, _, _, _ in service.requests)


def test_the_examiner_asks_for_unknown_users_and_aliases_only_if_told(recorder):
    service = recorder(answering("creates"))
    found = examined(service.url, queries=False)
    assert [found[test].outcome for test in UNKNOWN_ONES] == ["skipped"] * 2 and "--queries" in found[UNKNOWN_ONES[0]].seen
    assert not [path for _, path, _, _, _ in service.requests if "/users/" in path or "/rooms/" in path]
    found = examined(service.url)
    assert [found[test].outcome for test in UNKNOWN_ONES] == ["passed"] * 2
    assert re.fullmatch(r"#_irc_asbridge-nobody-[0-9a-f]{8}:localhost: 200 \{\}: it says that it created it", found[UNKNOWN_ONES[1]].seen)
    found = examined(service.url, namespaces={"users": [{"regex": "@(?=x).*", "exclusive": True}]})
    assert (found[UNKNOWN_ONES[0]].outcome, found[UNKNOWN_ONES[1]].outcome) == ("skipped", "skipped")
    assert "no ID could be made up for '@(?=x).*'" in found[UNKNOWN_ONES[0]].seen and "claims no aliases" in found[UNKNOWN_ONES[1]].seen


@pytest.mark.parametrize("kind,regex", [
    ("users", "@_irc_.*"), ("users", "^@_irc_[^:]+:localhost$"), ("users", r"@telegram_(\d+):localhost"), ("users", "@(?:tg|telegram)_[0-9]+(:localhost)?"),
    ("users", r"@x\.y[[:alnum:]_]+:local"), ("users", "@slack_[A-Za-z0-9]{1,20}"), ("users", "@_(?P<a>x|y)_.+?:.*"), ("aliases", "#_irc_.*:localhost"), ("aliases", "#.*")])
def test_an_id_that_nobody_has_is_made_up_from_the_regex_of_a_namespace(kind, regex):
    one = asbridge.Namespace(kind, 0, regex, True, asbridge.compile_regex(regex))
    id = asbridge.nobody(one, "localhost")
    assert one.pattern.match(id) and asbridge.check_id(asbridge.KINDS[kind], id, "localhost") != asbridge.nobody(one, "localhost")


@pytest.mark.parametrize("regex", ["@bot:localhost", "@_irc_.*:elsewhere", "@(?=x).*", "@[xy]:localhost"])
def test_no_id_is_made_up_where_the_regex_leaves_no_room_for_one(regex):
    assert asbridge.nobody(asbridge.Namespace("users", 0, regex, True, asbridge.compile_regex(regex)), "localhost") is None


def put_to(service):
    """(txn_id, body) of each transaction."""
    return [(path.rsplit("/", 1)[1], body) for method, path, _, _, body in service.requests if method == "PUT"]


def test_the_events_of_the_examiner_look_real_and_are_from_nobody(recorder):
    service = recorder(answering())
    examined(service.url)
    events = [event for _, body in put_to(service) if body.endswith(b"}") for event in json.loads(body)["events"]]
    assert len(events) == 2
    for event in events:
        assert asbridge.tick_of(event["event_id"]) >= 0 and event["age"] >= 0 and event["unsigned"]["age"] >= 0 and abs(event["origin_server_ts"] / 1000 - time.time()) < 60
        assert event["sender"].endswith(".invalid") and event["room_id"].endswith(".invalid") and event["type"] != "m.room.message"


def test_no_transaction_of_the_examiner_has_the_id_of_another_or_of_a_homeserver(recorder):
    service = recorder(answering())
    for _ in range(2):
        examined(service.url)
    ids = [txn_id for txn_id, _ in put_to(service)]
    twice = [(txn_id, body) for txn_id, body in put_to(service) if ids.count(txn_id) > 1]
    assert len(twice) == 4 and len(set(twice)) == 2 and not any(txn_id.isdigit() for txn_id in ids)


def test_the_examiner_asks_no_more_of_one_that_can_not_be_reached():
    found = examined(nowhere())
    assert failed(found) == ["listens at its url"] and "nothing listens at" in found["listens at its url"].seen
    assert {row.seen for row in list(found.values())[1:]} == {"it can't be reached"} and {row.outcome for row in list(found.values())[1:]} == {"skipped"}


def test_the_examiner_asks_no_more_of_one_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        found = examined(f"http://127.0.0.1:{silent.getsockname()[1]}", ms=150)
        assert time.monotonic() - began < 3
    assert failed(found) == ["answers a ping", "takes an empty transaction"] and found["answers a ping"].seen == "it did not answer in time"
    assert {row.outcome for row in list(found.values())[3:]} == {"skipped"}


def test_the_examiner_asks_no_more_of_one_with_another_registration(recorder):
    service = recorder(answering("has another token"))
    found = examined(service.url)
    assert failed(found) == ["answers a ping", "takes an empty transaction"] and "it rejects the hs_token" in found["takes an empty transaction"].seen
    assert {row.seen for row in list(found.values())[3:]} == {"it rejects the hs_token"}


def test_the_examiner_has_nothing_to_ask_where_the_url_is_null():
    assert {(row.outcome, row.seen) for row in examined(None).values()} == {("skipped", "its url is null: nothing is sent to it")}


@pytest.mark.parametrize("protocols,outcome", [(["good"], "passed"), (["good", "unknown"], "passed"), (["good", "bad"], "failed"), ([], "skipped")])
def test_the_examiner_asks_for_each_protocol_of_the_registration(recorder, protocols, outcome):
    service = recorder(answering())
    row = examined(service.url, protocols=protocols)["describes its protocols"]
    assert row.outcome == outcome and all(f"{protocol}: " in row.seen for protocol in protocols)


def test_the_examiner_can_be_asked_from_a_running_server(start, recorder):
    r = recorder(answering())
    hs = start(registration(url=r.url))
    status, told = inspect(hs, "POST", "examine", {"appservice": "irc"})
    assert status == 200 and {one["outcome"] for one in told["results"]} == {"passed", "skipped"} and "test" in told["results"][0]


def test_the_examiner_tells_no_tokens_and_nothing_that_moves_a_cursor(recorder):
    service = recorder(answering("echoes the request"))
    seen = str(examined(service.url, hs_token='hs/"+token').values())
    assert seen.count("(token)") > 20 and "\\x1b" not in seen and "\x1b" not in seen and "hs/" not in seen and "hs%2" not in seen


# -- The table: for the owner of the homeserver alone.

ADMIN_ASKERS = {  # who asks: token and headers, and what each row says if there is an admin_token, and if there is none; None: it may
    "no token": (None, {}, "M_MISSING_TOKEN", None), "a wrong one": ("x", {}, "M_UNKNOWN_TOKEN", None), "a person": ("{alice}", {}, "M_UNKNOWN_TOKEN", None),
    "a service": ("as-irc", {}, "M_UNKNOWN_TOKEN", None), "an hs_token": ("hs-irc", {}, "M_UNKNOWN_TOKEN", None), "the owner": ("hunter2", {}, None, None),
    "another site's page": ("hunter2", {"Origin": "http://evil.example"}, "M_FORBIDDEN", "M_FORBIDDEN"), "another name": ("hunter2", {"Host": "evil.example"}, "M_FORBIDDEN", "M_FORBIDDEN")}


@pytest.mark.parametrize("admin_token", ["hunter2", None])
def test_each_row_of_the_inspector_is_for_the_owner_of_the_homeserver_alone(start, admin_token):
    hs = start(registration(), **({"admin_token": admin_token} if admin_token else {}))
    alice, http_client, wrong = hs.client("alice").token, asbridge.HttpClient(hs.url), []
    for route, (token, headers, *says) in itertools.product(asbridge.ADMIN_ROUTES, ADMIN_ASKERS.values()):
        token = {"{alice}": alice}.get(token, token)
        status, answer = http_client.request(route.method, route.path, None if route.method == "GET" else b"{}", {**headers, **({"Authorization": f"Bearer {token}"} if token else {})})
        says = says[admin_token is None] if route.auth != "nobody" else None
        got = status, json.loads(answer)["errcode"] if status in (401, 403) else None
        if got != (asbridge.ERRORS[says], says) if says else status in (401, 403) or (route.auth == "nobody" and status != 200):
            wrong.append((route.method, route.path, token, headers, status, answer[:80]))
    http_client.close()
    assert wrong == [] and {route.auth for route in asbridge.ADMIN_ROUTES[1:]} == {"admin"}


def test_an_admin_token_is_asked_for_where_there_is_one_and_needed_beyond_this_machine(start):
    hs = start(admin_token="hunter2")
    for token, errcode in ((None, "M_MISSING_TOKEN"), ("wrong", "M_UNKNOWN_TOKEN"), (hs.client("alice").token, "M_UNKNOWN_TOKEN")):
        status, answer = ask(hs, "GET", "/_asbridge/status", token)
        assert (status, answer["errcode"]) == (401, errcode)
    assert ask(hs, "GET", "/_asbridge/status", "hunter2")[0] == 200
    hs = start(bind="0.0.0.0")
    status, answer = inspect(hs, "GET", "status")
    assert status == 403 and "admin_token" in answer["error"]
    hs = start(bind="0.0.0.0", admin_token="hunter2")
    assert ask(hs, "GET", "/_asbridge/status", "hunter2", headers={"Host": "matrix.example.org"})[0] == 200
    assert ask(hs, "GET", "/_asbridge/status", "hunter2", headers={"Host": "a.example", "Origin": "http://b.example"})[0] == 403


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:8008"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "192.168.0.7"},
    {"Host": ""}, {"Host": "localhost.evil.example"}, {"Host": "127.0.0.1.nip.io:8008"}, {"Host": "localhost@evil.example"}, {"Host": "evil.example#localhost"},
    {"Host": "localhost:1, evil.example"}, {"Host": "evil.example:localhost"}, {"Host": "[::1].evil.example"}, {"Host": "[fe80::1]:8008"}, {"Host": "0.0.0.0"},
    {"Host": "0x7f.1"}, {"Host": "2130706433"}, {"Host": "127.1"}, {"Host": "localhost:8008x"}, {"Host": "//localhost"}, {"Host": "l\u00f6calhost"},
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}, {"Origin": "file://"}, {"Origin": ""}, {"Origin": "http://127.0.0.1.evil.example"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    {"Origin": "http://evil.example", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="},
    {"Origin": "http://evil.example", "Content-Type": "text/plain"}, {"Origin": "http://evil.example", "Content-Type": "application/x-www-form-urlencoded"},
    {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}, {"Origin": "null", "Content-Type": "multipart/form-data; boundary=x"}])
def test_the_inspector_answers_to_no_other_host_name_and_to_no_other_sites_page(target, headers):
    for method, path, body in (("GET", "status", None), ("POST", "clock", {"advance": 3600}), ("POST", "people", {"name": "mallory"})):
        status, answer = inspect(target.hs, method, path, body, **headers)
        assert (status, answer["errcode"]) in ((403, "M_FORBIDDEN"), (400, "M_UNKNOWN")) and (status == 403 or "Host is one name" in answer["error"])
    assert target.hs.clock.wound == 0 and "@mallory:localhost" not in target.hs.inspector.people()


@pytest.mark.parametrize("headers", [
    {}, {"Host": "localhost"}, {"Host": "127.0.0.1:1"}, {"Host": "[::1]:8008"}, {"Host": "127.8.8.8"}, {"Sec-Fetch-Site": "none"},
    {"Host": "localhost:1", "Origin": "http://localhost:1", "Sec-Fetch-Site": "same-origin"}, {"Upgrade": "websocket", "Connection": "Upgrade"}])
def test_the_inspector_answers_to_its_own_page_and_to_programs_on_this_machine(target, headers):
    assert inspect(target.hs, "GET", "status", **headers)[0] == 200


def test_the_inspector_goes_by_the_host_that_is_asked_for_whichever_way_a_request_says_it(target):
    for line, host, status in (("/", "localhost", 200), ("http://evil.example/", "localhost", 403), ("http://localhost/", "evil.example", 200), ("/", "localhost\r\nHost: evil.example", 400)):
        assert talk(target.hs, f"GET {line}_asbridge/status HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("method, path, body, errcode", [
    ("GET", "why?event=$x", None, "M_MISSING_PARAM"), ("GET", "explain", None, "M_MISSING_PARAM"), ("GET", "explain?id=x", None, "M_INVALID_PARAM"),
    ("GET", "exchanges?since=x", None, "M_INVALID_PARAM"), ("POST", "faults", {"appservice": "irc", "fault": "x"}, "M_INVALID_PARAM"),
    ("POST", "faults", {"appservice": "irc", "fault": "refuse", "probability": "x"}, "M_BAD_JSON"), ("POST", "faults", {"fault": "refuse"}, "M_MISSING_PARAM"),
    ("POST", "faults", {"appservice": "irc", "fault": "refuse", "time": 3}, "M_BAD_JSON"),
    ("POST", "clock", {"advance": -1}, "M_BAD_JSON"), ("POST", "clock", {"advance": True}, "M_BAD_JSON"), ("POST", "clock", {}, "M_BAD_JSON"),
    ("POST", "replay", {"appservice": "irc", "txn_id": "x"}, "M_INVALID_PARAM"), ("POST", "pause", {"appservice": 5}, "M_BAD_JSON"),
    ("POST", "people", {"name": "Bad Name"}, "M_INVALID_USERNAME"), ("GET", "nothing", None, "M_UNRECOGNIZED"), ("POST", "status", {}, "M_UNRECOGNIZED"),
    ("GET", "transactions?appservice=nobody", None, "M_NOT_FOUND"), ("POST", "skip", [], "M_BAD_JSON"), ("POST", "retry", b"{", "M_NOT_JSON")])
def test_nonsense_to_the_api_is_refused_in_the_form_of_the_specification(target, method, path, body, errcode):
    status, answer = inspect(target.hs, method, path, body)
    assert answer["errcode"] == errcode and answer["error"] and 400 <= status < 500


ADMIN_BODIES = [
    ("rooms", {"user_id": "@alice:localhost", "room": "new"}), ("rooms", {"user_id": "@alice:localhost", "room": "#none:localhost"}), ("rooms", {"user_id": "@alice:localhost", "room": "@carol:localhost"}),
    ("people", {"name": "erin"}), ("say", {"user_id": "@alice:localhost", "room_id": "!x:localhost", "body": "x"}), ("clock", {"advance": 1}), ("examine", {"appservice": "irc", "queries": False}),
    ("faults", {"appservice": "irc", "fault": "status", "on": "transactions", "times": 1, "probability": 0.5, "seed": 1, "delay_ms": 1, "status": 500}),
    ("pause", {"appservice": "irc"}), ("resume", {"appservice": "irc"}), ("retry", {"appservice": "irc"}), ("skip", {"appservice": "irc"}), ("ping", {"appservice": "irc"}),
    ("replay", {"appservice": "irc", "txn_id": "1", "new_id": True})]
ADMIN_QUERIES = ["exchanges?since={}", "exchanges?timeout={}", "exchange?n={}", "transactions?appservice=irc&limit={}", "transactions?appservice={}", "explain?id={}", "why?event={}&appservice=irc",
                 "why?event=$x&appservice={}", "timeline?room={}", "timeline?room=!x:localhost&limit={}", "faults?appservice={}"]


def test_no_value_of_a_wrong_type_makes_the_inspector_fail(start):
    target = Target(start(registration()))
    asked = [("POST", where, body) for where, right in ADMIN_BODIES for body in (right, *WRONG, *some(mutations(right)))]
    asked += [("GET", where.format(value if value[:1] == "%" else quote(value)), None) for where in ADMIN_QUERIES for value in (*WRONG_QUERIES, "@" + "x" * 300, "x:" + "y" * 3000, "@a:b\0")]
    failed = [(*one, status) for one in asked for status, answer in [inspect(target.hs, *one)]
              if (status >= 500 and answer["errcode"] == "M_UNKNOWN") or (status >= 400 and not (answer.get("errcode") and answer.get("error")))]
    assert failed == []
    assert {path for path, _ in ADMIN_BODIES} == {route.path.removeprefix("/_asbridge/") for route in asbridge.ADMIN_ROUTES if route.method == "POST"}
    target.hs.faults("irc").clear()
    target.reads()


# -- The page.

def test_the_page_runs_its_own_script_only_loads_nothing_from_elsewhere_and_stands_in_no_frame(target):
    pages = []
    for _ in range(2):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", target.hs.port)) as connection:
            connection.request("GET", "/", headers={"Origin": "http://evil.example"})
            answer = connection.getresponse()
            page, headers = answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
        nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", headers["content-security-policy"])[1]
        assert answer.status == 200 and headers["content-type"] == "text/html; charset=utf-8" and "access-control-allow-origin" not in headers
        assert "default-src 'none'" in headers["content-security-policy"] and "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and page.count(f'nonce="{nonce}"') == 2 and "{nonce}" not in page
        pages.append(nonce)
    assert pages[0] != pages[1]
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://|innerHTML|insertAdjacentHTML|document\.write|\son\w+="|\sstyle=\"""", asbridge.PAGE)


def test_the_inspector_has_no_cors_headers_and_its_own_page_may_ask(target):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", target.hs.port)) as connection:
        for method in ("GET", "OPTIONS"):
            connection.request(method, "/_asbridge/status", headers={"Host": "localhost:1", "Origin": "http://localhost:1"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 300 and not any("access-control" in name.lower() for name, _ in answer.getheaders())


# ============================================================================
# 10. The application service
# ============================================================================

# -- AppService: whom it answers.

AS_ROWS = {"_put_transaction": (PUSH + "1", "/transactions/1"), "_get_existence": ("/_matrix/app/v1/users/%40_irc_none%3Atest", "/rooms/%23_irc_none%3Atest"),
           "_post_ping": ("/_matrix/app/v1/ping",), "_get_third_party": ("/_matrix/app/v1/thirdparty/protocol/x", "/_matrix/app/unstable/thirdparty/user")}


def test_each_endpoint_of_an_application_service_refuses_a_missing_hs_token_with_401_and_a_wrong_one_with_403(service):
    for method, _, handler in asbridge.AppService.ROUTES:
        for where in AS_ROWS[handler]:                       # a new row must be put in here
            for token, in_query, says in ((None, None, (401, "M_MISSING_TOKEN")), ("other", None, (403, "M_FORBIDDEN")), ("as-secret", None, (403, "M_FORBIDDEN")),
                                          (None, "other", (403, "M_FORBIDDEN")), ("hs-secret", "other", (403, "M_FORBIDDEN")), ("other", "hs-secret", (403, "M_FORBIDDEN"))):
                status, answer = as_request(service, method, where, some_events("$1"), token, in_query)
                assert (status, answer["errcode"]) == says and "hs-secret" not in str(answer), (method, where, token, in_query)
    assert service.events == []


@pytest.mark.parametrize("token, in_query", [("hs-secret", None), (None, "hs-secret"), ("hs-secret", "hs-secret")])
def test_an_application_service_takes_the_hs_token_from_the_header_or_the_query_or_from_both(service, token, in_query):
    for method, where in ((method, where) for method, _, handler in asbridge.AppService.ROUTES for where in AS_ROWS[handler]):
        assert as_request(service, method, where, some_events("$1"), token, in_query)[0] not in (401, 403)
    assert service.events == ["$1"]


def test_the_endpoint_of_an_application_service_answers_strangers_as_the_homeserver_does(service, caplog):
    own, long = b"Host: h\r\nAuthorization: Bearer hs-secret\r\n", b"x" * 10_000
    for head, status, errcode in (
            (b"GET /_matrix/app/v1/users/%FF HTTP/1.1\r\n" + own, 400, "M_INVALID_PARAM"), (b"GET /_matrix/app/v1/users/%00 HTTP/1.1\r\n" + own, 404, "M_NOT_FOUND"),
            (b"GET /_matrix/app/v1/users/.. HTTP/1.1\r\n" + own, 404, "M_NOT_FOUND"), (b"GET /_matrix/app/v1/users/" + long + b" HTTP/1.1\r\n" + own, 404, "M_NOT_FOUND"),
            (b"GET /_matrix/app/v1/nothing HTTP/1.1\r\n" + own, 404, "M_UNRECOGNIZED"), (b"GET " + PUSH.encode() + b"1 HTTP/1.1\r\n" + own, 405, "M_UNRECOGNIZED"),
            (b"GET /_matrix/app/v1/rooms/a/b HTTP/1.1\r\n" + own, 404, "M_UNRECOGNIZED"), (b"GET /{} HTTP/1.1\r\n" + own, 404, "M_UNRECOGNIZED"), (b"OPTIONS * HTTP/1.1\r\n" + own, 404, "M_UNRECOGNIZED"),
            (b"PATCH " + PUSH.encode() + b"1 HTTP/1.1\r\n" + own, 405, "M_UNRECOGNIZED"), (b"PUT " + PUSH.encode() + b"1?access_token=%FF HTTP/1.1\r\n" + own, 400, "M_INVALID_PARAM"),
            (b"PUT " + PUSH.encode() + b"1 HTTP/1.1\r\n" + own, 400, "M_BAD_JSON"), (b"PUT " + PUSH.encode() + b"1 HTTP/1.1\r\nContent-Length: 1\r\n" + own, 400, "M_NOT_JSON"),
            (b"PUT " + PUSH.encode() + b"1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n" + own, 400, "M_UNKNOWN"),
            (b"PUT " + PUSH.encode() + b"1 HTTP/1.1\r\nContent-Length: 99999999999\r\n" + own, 413, "M_TOO_LARGE"), (b"GET / HTTP/1.1\r\nA: " + long * 7 + b"\r\n", 431, "M_UNKNOWN")):
        got, _, answer = answers_in(talk(service._server, head + b"\r\n["))[0]
        assert (got, answer["errcode"]) == (status, errcode), head
    assert service.events == [] and not [record for record in caplog.records if record.exc_info]


def test_a_homeserver_that_goes_away_inside_a_transaction_is_no_failure_of_the_service(caplog):
    service = asbridge.AppService(asbridge.read_registration(registration(url="http://127.0.0.1:0"), "here"), "http://127.0.0.1:1")
    service.listen()
    service._server.start()
    try:
        with connect(service._server) as sock:
            sock.sendall(b"PUT /_matrix/app/v1/transactions/1 HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer hs-irc\r\nContent-Length: 99\r\n\r\n{")
        assert eventually(lambda: not service._server.connections) and not caplog.records
    finally:
        service.stop()


def test_a_transaction_may_have_unknown_keys_and_events_of_unknown_types(service):
    body = {**some_events("$1", type="org.example.new"), "ephemeral": [{}], "de.sorunome.x": 1}
    assert as_request(service, "PUT", PUSH + "1", body) == (200, {})
    assert service.events == ["$1"]


@pytest.mark.parametrize("body, errcode", [(b"{", "M_NOT_JSON"), (b"[]", "M_BAD_JSON"), (b"{}", "M_BAD_JSON"),
                                           (b'{"events": {}}', "M_BAD_JSON")])
def test_a_broken_transaction_is_400(service, body, errcode):
    status, answer = as_request(service, "PUT", PUSH + "1", body)
    assert (status, answer["errcode"]) == (400, errcode)


EVENT = {"event_id": "$1", "type": "m.room.member", "room_id": "!room:test", "sender": "@alice:test", "state_key": "@_irc_bob:test", "origin_server_ts": 5,
         "content": {"membership": "invite", "displayname": "x"}, "unsigned": {"age": 5}}
PUSHED = {"events": [EVENT], "ephemeral": [{"type": "m.receipt", "room_id": "!room:test", "content": {"$1": {"m.read": {"@alice:test": {"ts": 1}}}}}],
          "de.sorunome.msc2409.to_device": [{"type": "m.x", "sender": "@alice:test", "content": {}, "to_user_id": "@_irc_bob:test", "to_device_id": "D"}],
          "org.matrix.msc3202.device_lists": {"changed": ["@alice:test"], "left": []}, "org.matrix.msc3202.device_one_time_keys_count": {"@_irc_bob:test": {"D": {"signed_curve25519": 5}}}}

WRITTEN = ("membership", "displayname", "body", "msgtype", "url", "m.relates_to", "m.new_content", "name", "topic", "alias", "aliases", "redacts", "replacement_room")


@pytest.mark.parametrize("kind", ["an application service", "the IRC bridge"])
def test_no_value_of_a_wrong_type_in_what_a_homeserver_sends_makes_a_service_fail(fake, request, caplog, kind):
    service = request.getfixturevalue("service" if kind == "an application service" else "bridge")
    if kind == "the IRC bridge":
        bob = Irc(service, "bob", "#lobby")
        channel_is_known(service)
    types = ("m.room.message", "m.room.name", "m.room.topic", "m.room.aliases", "m.room.canonical_alias", "m.room.redaction", "m.room.tombstone")
    message = {"msgtype": "m.text", "body": "x", "url": "mxc://x/y", "m.relates_to": {"rel_type": "m.replace", "event_id": "$0", "m.in_reply_to": {"event_id": "$0"}}, "m.new_content": {"body": "y", "msgtype": "m.text"}}
    contents = [(type, dict.fromkeys(WRITTEN, wrong)) for type, wrong in itertools.product(types, WRONG)] + [("m.room.message", one) for one in mutations(message)]
    written = [{"events": [{**EVENT, "type": type, "content": content}]} for type, content in contents if isinstance(content, dict)]
    for n, body in enumerate((*WRONG, *some(mutations(PUSHED)), *written)):
        if body is written[0]:
            caplog.clear()                                   # from here on as any homeserver may send it: nothing to be logged as failed
        status, answer = as_request(service, "PUT", f"{PUSH}w{n}", json.dumps(body).replace("$1", f"$w{n}").encode())
        assert status == 200 or (status, answer["errcode"]) == (400, "M_BAD_JSON"), (body, status, answer)
    for body in WRONG:
        assert as_request(service, "POST", "/_matrix/app/v1/ping", json.dumps(body).encode())[0] in (200, 400)
    for kind, segment in itertools.product(("users", "rooms", "thirdparty/protocol", "thirdparty/user", "thirdparty/location"), WRONG_SEGMENTS):
        status, answer = as_request(service, "GET", f"/_matrix/app/v1/{kind}/{segment}")
        assert (status, answer["errcode"]) in ((404, "M_NOT_FOUND"), (404, "M_UNRECOGNIZED"), (400, "M_INVALID_PARAM")), (kind, segment, status, answer)
    assert as_request(service, "PUT", PUSH + "last", some_events("$last")) == (200, {}) and not [record for record in caplog.records if record.exc_info]
    if kind == "the IRC bridge":
        message(service, "still here")
        bob.wait("still here")


# -- AppService: each event is handled once.

@pytest.mark.parametrize("strange", [{"content": None}, {"content": []}, {"content": 5}, {"state_key": ["@a:test"]}, {"state_key": {}}, {"room_id": []}])
def test_a_member_event_of_a_strange_shape_is_handled_like_any_other(service, strange):
    event = {"event_id": "$strange", "type": "m.room.member", "room_id": "!r:test", "sender": "@a:test", "state_key": "@a:test", "content": {}, **strange}
    assert as_request(service, "PUT", PUSH + "strange", {"events": [event]}) == (200, {}) and service.events == ["$strange"]


def test_events_are_handled_in_order_on_the_new_and_the_old_path(service):
    assert as_request(service, "PUT", PUSH + "1", some_events("$1", "$2")) == (200, {})
    assert as_request(service, "PUT", "/transactions/2", some_events("$3")) == (200, {})
    assert service.events == ["$1", "$2", "$3"]


def test_the_same_transaction_again_is_200_without_effect(service):
    for _ in range(2):
        assert as_request(service, "PUT", PUSH + "1", some_events("$1")) == (200, {})
    assert service.events == ["$1"]


def test_an_event_that_comes_in_another_transaction_is_handled_once(service):
    as_request(service, "PUT", PUSH + "1", some_events("$1", "$2"))
    as_request(service, "PUT", PUSH + "2", some_events("$2", "$3"))
    assert service.events == ["$1", "$2", "$3"]


def test_two_overlapping_deliveries_of_a_transaction_run_it_once(service):
    service.gate = threading.Event()
    answers = []

    def deliver():
        answers.append(as_request(service, "PUT", PUSH + "1", some_events("$1", "$2")))
    threads = [threading.Thread(target=deliver) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert service.entered.wait(10)
    service.gate.set()
    for thread in threads:
        thread.join(10)
    assert answers == [(200, {}), (200, {})]
    assert service.events == ["$1", "$2"]


@pytest.mark.parametrize("key", ["ephemeral", "de.sorunome.msc2409.ephemeral"])
def test_ephemeral_data_is_handed_over_after_the_events_and_not_again_with_a_repeated_transaction(service, key):
    typing = {"type": "m.typing", "room_id": "!r:test", "content": {"user_ids": []}}
    found = []
    service.on_ephemeral = lambda data: found.append(data) or 1 / 0      # it fails, and the rest goes on
    for _ in range(2):
        assert as_request(service, "PUT", PUSH + "1", {**some_events("$1"), key: [typing, {"type": "m.presence"}]}) == (200, {})
    assert found == [typing, {"type": "m.presence"}] and service.events == ["$1"]
    assert as_request(service, "PUT", PUSH + "2", {**some_events("$2"), key: "x"}) == (200, {}) and service.events == ["$1", "$2"]


def test_an_event_that_raises_counts_as_handled_and_does_not_block_the_rest(service, caplog):
    body = {"events": some_events("$1", type="poison")["events"] + some_events("$2")["events"]}
    assert as_request(service, "PUT", PUSH + "1", body) == (200, {})
    as_request(service, "PUT", PUSH + "2", body)
    assert service.events == ["$1", "$2"]
    assert "$1 failed" in caplog.text


def test_what_was_handled_is_remembered_on_disk(fake, tmp_path):
    for handled in (["$1", "$2"], ["$3"]):
        service = Handled(bridge_registration(), fake.url, str(tmp_path / "as.db"))
        service.start()
        as_request(service, "PUT", PUSH + "1", some_events("$1", "$2"))
        as_request(service, "PUT", PUSH + "2", some_events("$2", "$3")) if handled == ["$3"] else None
        service.stop()
        assert service.events == handled


def test_a_transaction_id_that_is_used_again_for_other_events_does_not_swallow_them(service):
    for events in (some_events("$one"), some_events("$two"), some_events("$one", "$two")):
        assert as_request(service, "PUT", PUSH + "1", events)[0] == 200
    assert service.events == ["$one", "$two"]


def test_after_a_crash_only_the_event_in_hand_comes_again(fake, tmp_path):
    class Crash(BaseException):
        pass

    class Crashing(Handled):
        def on_event(self, event):
            super().on_event(event)
            if event["event_id"] == "$2":
                raise Crash

    database = str(tmp_path / "as.db")
    service = Crashing(bridge_registration(), fake.url, database)
    with pytest.raises(Crash):
        for event in some_events("$1", "$2", "$3")["events"]:
            service._handle(event)
    service.stop()
    service = Handled(bridge_registration(), fake.url, database)
    service.start()
    as_request(service, "PUT", PUSH + "1", some_events("$1", "$2", "$3"))
    service.stop()
    assert service.events == ["$2", "$3"]


def test_an_event_that_needs_a_homeserver_that_is_away_is_pushed_again(tmp_path):
    class Answering(asbridge.AppService):
        def on_event(self, event):
            self.bot.say("!room:test", "heard")

    service = Answering(bridge_registration(), "http://127.0.0.1:1", str(tmp_path / "as.db"))
    service.start()
    try:
        body = some_events("$one")
        assert as_request(service, "PUT", "/_matrix/app/v1/transactions/1", body)[0] == 503
        homeserver = FakeHomeserver()
        service.bot.url = service.client.url = homeserver.url
        service.client.close()
        assert as_request(service, "PUT", "/_matrix/app/v1/transactions/1", body)[0] == 200
        assert len(homeserver.paths("/send/m.room.message/")) == 1
        homeserver.server.stop()
    finally:
        service.stop()


# -- AppService: what it is asked, and how it starts.

@pytest.mark.parametrize("prefix", ["/_matrix/app/v1", ""])
def test_a_query_for_a_user_or_an_alias_is_answered_by_the_hook_for_it(service, prefix):
    assert as_request(service, "GET", prefix + "/users/%40_irc_bob%3Atest") == (200, {})
    assert as_request(service, "GET", prefix + "/rooms/%23_irc_lobby%3Atest") == (200, {})
    for path in ("/users/%40_irc_eve%3Atest", "/rooms/%23_irc_none%3Atest"):
        status, answer = as_request(service, "GET", prefix + path)
        assert (status, answer["errcode"]) == (404, "M_NOT_FOUND")


@pytest.mark.parametrize("version", ["v1", "unstable"])
def test_a_third_party_look_up_is_answered_by_the_hook_for_it(service, version):
    prefix = f"/_matrix/app/{version}/thirdparty/"
    for where in ("protocol/irc", "user/irc?nickname=bob", "user?userid=@_irc_bob:test", "location/irc?channel=%23tea", "location?alias=%23a:test"):
        status, answer = as_request(service, "GET", prefix + where)
        assert (status, answer["errcode"]) == (404, "M_NOT_FOUND")
    service.on_third_party_protocol = lambda protocol: {"instances": [], "protocol": protocol}
    service.on_third_party_user = lambda protocol, fields: [{"userid": "@a:b", "protocol": protocol, "fields": fields}]
    assert as_request(service, "GET", prefix + "protocol/a%2Fb") == (200, {"instances": [], "protocol": "a/b"})
    assert as_request(service, "GET", prefix + "user/irc?nickname=b%26&access_token=hs-secret") == (200, [
        {"userid": "@a:b", "protocol": "irc", "fields": {"nickname": "b&"}}])
    assert as_request(service, "GET", prefix + "user?userid=%40a:b") == (200, [{"userid": "@a:b", "protocol": "", "fields": {"userid": "@a:b"}}])
    assert as_request(service, "GET", prefix + "protocol/irc", token="wrong")[0] == 403
    assert as_request(service, "GET", prefix + "other/irc")[0] == 404


def test_an_application_service_answers_under_the_path_of_its_url(fake):
    service = Handled(bridge_registration(url="http://127.0.0.1:0/a/b/"), fake.url)
    service.start()
    assert service.url == f"http://127.0.0.1:{service.port}/a/b"
    assert as_request(service, "POST", "/a/b/_matrix/app/v1/ping", {"transaction_id": "x"}) == (200, {})
    assert as_request(service, "POST", "/_matrix/app/v1/ping", {})[0] == 404
    service.stop()
    service.stop()


def test_an_application_service_that_starts_learns_the_server_name_and_asks_for_a_ping(fake, service):
    asked = eventually(lambda: fake.paths("/appservice/irc/ping"))
    assert asked[0][0] == "POST" and service.server_name == "test"


def test_an_application_service_waits_for_a_homeserver_that_is_not_there_yet():
    clock, port = asbridge.Clock(), closed_port()
    service = Handled(bridge_registration(url=None), f"http://127.0.0.1:{port}", clock=clock)
    service.start()
    homeserver = FakeHomeserver(port)
    eventually(lambda: clock.advance(20) or homeserver.paths("/ping"))
    service.stop()
    homeserver.server.stop()


@pytest.mark.parametrize("value", [5, None, [], {}, {"user_id": 5}])
def test_an_application_service_goes_on_asking_what_only_claims_to_be_a_homeserver(caplog, value):
    server, asked = asbridge.HttpServer(("127.0.0.1", 0), lambda request: asbridge.json_response(200, value)), []
    server.start()
    service = asbridge.AppService(bridge_registration(), f"http://127.0.0.1:{server.port}")
    service.clock.wait = lambda lock, until: (asked.append(until), setattr(service, "stopping", len(asked) == 3))
    service._hello()
    service.stop()
    server.stop()
    assert len(asked) == 3 and not [record for record in caplog.records if record.exc_info]


def test_a_bot_is_ten_lines(fake):
    class Echo(asbridge.AppService):
        def on_event(self, event):
            me, content = self.bot.user_id, event["content"]
            if event["type"] == "m.room.member" and event["state_key"] == me and content["membership"] == "invite":
                self.bot.join(event["room_id"])
            elif event["type"] == "m.room.message" and event["sender"] != me:
                self.bot.say(event["room_id"], content["body"], txn_id=event["event_id"])

    bot = Echo(bridge_registration(), fake.url)
    bot.start()
    push(bot, "m.room.member", {"membership": "invite"}, state_key="@ircbot:test", room_id="!r:test")
    event_id = message(bot, "hello", room_id="!r:test")
    message(bot, "hello", room_id="!r:test", sender="@ircbot:test")
    bot.stop()
    assert len(fake.paths("/join/%21r%3Atest")) == 1
    assert fake.said() == ["hello"] and fake.paths("/send/")[0][1].endswith(event_id.replace("$", "%24"))


# -- Asking the homeserver: Client and Intent.

def test_a_client_raises_what_the_homeserver_answers(fake):
    fake.fail = lambda request: asbridge.MatrixError("M_LIMIT_EXCEEDED", "slower", retry_after_ms=7)
    with pytest.raises(asbridge.MatrixError) as caught:
        asbridge.Client(fake.url, "token").create_room()
    assert (caught.value.status, caught.value.errcode) == (429, "M_LIMIT_EXCEEDED")
    assert caught.value.extra == {"retry_after_ms": 7}


@pytest.mark.parametrize("told", [{"http_status": 200, "self": 1}, {"errcode": ["x"], "error": 5}, {"status": "x", "extra": {}, "body": 1}])
def test_a_refusal_of_the_homeserver_may_say_anything(fake, told):
    refusal = asbridge.MatrixError("M_FORBIDDEN", "no")
    refusal.body = lambda: told
    fake.fail = lambda request: refusal
    with pytest.raises(asbridge.MatrixError) as caught:
        asbridge.Client(fake.url, "token").create_room()
    assert caught.value.status == 403 and caught.value.extra == {key: value for key, value in told.items() if key not in ("errcode", "error")}


def test_an_intent_is_of_a_whole_user_id(service):
    with refused("M_INVALID_PARAM", text="bob is not of the form @localpart:server"):
        service.intent("bob")


def test_an_intent_registers_its_ghost_once_and_acts_as_it(fake, service):
    ghost = service.intent("@_irc_bob:test")
    ghost.say("!r:test", "one")
    ghost.say("!r:test", "two", txn_id="t/2")
    registered = [asked[3] for asked in fake.paths("/register") if asked[3]["username"] == "_irc_bob"]
    assert registered == [{"type": "m.login.application_service", "username": "_irc_bob", "inhibit_login": True}]
    sent = fake.paths("/send/")
    assert [asked[2]["user_id"] for asked in sent] == ["@_irc_bob:test"] * 2
    assert sent[1][1].endswith("/rooms/%21r%3Atest/send/m.room.message/t%2F2")


def test_an_intent_takes_m_user_in_use_for_a_success(fake, service):
    fake.fail = lambda request: asbridge.MatrixError("M_USER_IN_USE", "taken") if "register" in request.path else None
    assert service.intent("@_irc_bob:test").say("!r:test", "one").startswith("$")


def test_an_intent_joins_when_it_must_and_is_invited_when_it_may_not(fake, service):
    refusals = {"/send/": 1, "/join/": 1}

    def fail(request):
        for part in refusals:
            if part in request.path and refusals[part]:
                refusals[part] -= 1
                return asbridge.MatrixError("M_FORBIDDEN", "not in room")
        return None
    fake.fail = fail
    service.intent("@_irc_bob:test").say("!r:test", "one")
    verbs = [re.search("/(send|join|invite)", asked[1])[1] for asked in fake.paths("/(send|join|invite)")]
    assert verbs == ["send", "join", "invite", "join", "send"]


# ============================================================================
# 11. The sample: an IRC bridge
# ============================================================================

# -- The words of IRC.

@pytest.mark.parametrize("line, command, params", [
    ("PRIVMSG #a :hello  world ", "PRIVMSG", ["#a", "hello  world "]),
    (":nick!u@h privmsg #a hello", "PRIVMSG", ["#a", "hello"]),
    ("@tag=1 PING :x", "PING", ["x"]),
    ("USER a 0 * :Real Name", "USER", ["a", "0", "*", "Real Name"]),
    ("PRIVMSG a ::)", "PRIVMSG", ["a", ":)"]),
    ("AWAY :", "AWAY", [""]),
    ("   ", "", []),
    (":prefix", "", []),
])
def test_a_line_is_a_command_and_parameters(line, command, params):
    assert asbridge.parse_line(line) == (command, params)


def test_only_spaces_part_the_words_of_a_line():
    assert asbridge.parse_line("JOIN #a\u2003b\xa0c\x1dd\x0b") == ("JOIN", ["#a\u2003b\xa0c\x1dd\x0b"])


def test_names_fold_as_rfc_1459_says():
    assert asbridge.fold("Foo[]\\~") == "foo{}|^"


def test_a_line_is_utf_8_or_else_latin_1_and_cut_to_512_bytes():
    assert asbridge.decode_line("é€".encode()) == "é€"
    assert asbridge.decode_line("é".encode("latin-1")) == "é"
    assert asbridge.decode_line(("x" * 509 + "é").encode()) == "x" * 509


def test_a_long_text_is_split_between_words_and_loses_nothing():
    text = " ".join(f"wörd{n}" for n in range(300))
    lines = asbridge.irc_lines("alice!alice@test", "PRIVMSG", "#lobby", text)
    assert len(lines) > 4 and all(len(line.encode()) <= 510 for line in lines)
    assert " ".join(line.partition(" :")[2] for line in lines) == text


def test_a_text_without_words_is_split_between_characters():
    pieces = asbridge.split_text("€" * 1000, 400)
    assert "".join(pieces) == "€" * 1000 and all(len(piece.encode()) <= 400 for piece in pieces)


def test_each_line_of_an_action_is_an_action_and_empty_lines_are_left_out():
    assert asbridge.irc_lines("a!a@b", "PRIVMSG", "#c", "waves\n\nand goes", action=True) == [
        ":a!a@b PRIVMSG #c :\x01ACTION waves\x01", ":a!a@b PRIVMSG #c :\x01ACTION and goes\x01"]


def test_a_huge_message_does_not_flood_irc():
    lines = asbridge.irc_lines("a!a@b", "PRIVMSG", "#c", "x\n" * 30_000)
    assert len(lines) == asbridge.MAX_LINES and "more lines" in lines[-1]


@pytest.mark.parametrize("text, nick", [
    ("alice", "alice"), ("a.b", "a_b"), ("1st", "_1st"), ("", "_"), ("é" * 50, "_" * 30)])
def test_any_name_becomes_a_valid_nick(text, nick):
    assert asbridge.as_nick(text) == nick and asbridge.NICK.fullmatch(nick)


def test_the_quotation_before_a_reply_is_left_out():
    assert asbridge.strip_quote("> <@bob:test> hi\n> there\n\nyes\n> no") == ("yes\n> no", "@bob:test")


# -- The server.

def test_an_irc_client_is_welcomed_by_001_to_005_and_a_motd(bridge):
    bob = Irc(bridge)
    bob.send("CAP LS 302", "NICK bob", "USER bob 0 * :Bob")
    assert " CAP * LS :" in bob.wait("CAP")
    bob.send("CAP REQ :sasl")
    bob.wait("CAP bob NAK :sasl")
    bob.send("CAP END")
    for number in ("001", "002", "003", "004", "005", "251", "255", "375", "372", "376"):
        bob.wait(f"^:irc.asbridge {number} bob ")


def test_before_registration_commands_are_refused_by_451(bridge):
    bob = Irc(bridge)
    bob.send("JOIN #lobby")
    bob.wait(" 451 ")


@pytest.mark.parametrize("line, answer", [
    ("NICK", "431"), ("NICK 1bob", "432 bob 1bob"), ("NICK Taken", "433 bob Taken"),
    ("NONSENSE", "421 bob NONSENSE"), ("JOIN", "461"), ("JOIN lobby", "403"), ("PART #none", "403"),
    ("PART #busy", "442"), ("PRIVMSG", "411"), ("PRIVMSG taken", "412"),
    ("PRIVMSG nobody :x", "401 bob nobody"), ("PRIVMSG #none :x", "403"), ("PRIVMSG #busy :x", "404"),
    ("USER a b c d", "462"), ("PASS x", "462"), ("TOPIC #busy :x", "442"), ("MODE #busy", "324"),
    ("MODE #busy b", "368"), ("MODE #busy +o bob", "482"), ("MODE bob", "221"), ("MODE taken +i", "502"),
    ("KICK #busy taken", "442"), ("INVITE nobody #busy", "401"), ("WHOIS nobody", "401"),
    ("WHOIS taken", "311 bob taken"), ("WHO #busy", "352 bob #busy taken"),
    ("NAMES #busy", "353 bob = #busy :taken"), ("NAMES #none", "366 bob #none"), ("LIST", "321"),
    ("MOTD", "375"), ("LUSERS", "251"), ("AWAY :tea", "306"), ("AWAY", "305"),
    ("USERHOST taken", "302 bob :taken="), ("ISON nobody taken", "303 bob :taken"), ("VERSION", "351"),
])
def test_a_command_is_answered_by_its_numeric(bridge, line, answer):
    _taken, bob = Irc(bridge, "taken", "#busy"), Irc(bridge, "bob")
    bob.send(line)
    assert bob.wait(r"^:irc.asbridge \d+ ").startswith(f":irc.asbridge {answer}")


def test_a_ping_is_answered_by_a_pong(bridge):
    bob = Irc(bridge, "bob")
    bob.send("PING :a b")
    assert bob.wait("PONG") == ":irc.asbridge PONG irc.asbridge :a b"


def test_irc_people_hear_each_other_at_once_and_not_themselves(bridge):
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve")
    eve.send("JOIN #Lobby")
    eve.wait(" 366 ")
    bob.wait(":eve!eve@127.0.0.1 JOIN #lobby")
    bob.send("PRIVMSG #lobby :hello", "NOTICE eve :psst")
    eve.wait("^:bob!bob@127.0.0.1 PRIVMSG #lobby :hello$")
    eve.wait("^:bob!bob@127.0.0.1 NOTICE eve :psst$")
    bob.send("NICK Bobby", "TOPIC #lobby :tea")
    eve.wait("^:bob!bob@127.0.0.1 NICK :Bobby$")
    eve.wait("TOPIC #lobby :tea")
    bob.send("PART #lobby :bye")
    eve.wait("PART #lobby :bye")
    eve.send("JOIN 0")
    eve.wait("eve!eve@127.0.0.1 PART #lobby")
    bob.never("PRIVMSG #lobby|eve.*PART")


def test_a_quit_is_seen_once_by_who_shares_channels(bridge):
    bob, eve = Irc(bridge, "bob", "#a", "#b"), Irc(bridge, "eve", "#a", "#b")
    bob.send("QUIT :gone")
    bob.wait("ERROR")
    assert bob.closed()
    eve.wait("^:bob!bob@127.0.0.1 QUIT :Quit: gone")
    eve.never("QUIT")


def test_an_overlong_line_is_cut_and_what_is_relayed_fits_512_bytes(bridge):
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    bob.send("PRIVMSG #lobby :" + "x" * 20_000, "PRIVMSG #lobby :after")
    got = ""
    while not (line := eve.wait("PRIVMSG")).endswith("after"):
        assert len(line.encode()) <= 510
        got += line.partition(" :")[2]
    assert got == "x" * (510 - len("PRIVMSG #lobby :"))


def test_no_line_waits_for_another_to_be_acknowledged(bridge):
    _bob = Irc(bridge, "bob")                                # kept: else its socket is closed at once
    assert [client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for client in bridge.irc.clients] == [1]


def test_a_slow_reader_is_dropped_and_the_others_do_not_wait(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "SEND_BYTES", 20_000)
    slow, eve = Irc(bridge, "slow", "#lobby"), Irc(bridge, "eve", "#lobby")
    channel_is_known(bridge)
    client = bridge.people["slow"]
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def dropped():
        message(bridge, "x" * 5_000)
        eve.wait("PRIVMSG")
        eve.never("QUIT :Excess")
        return client.fate
    assert eventually(dropped) == "Too slow to read" and len(client.waiting) <= 20_000
    eve.wait("^:slow!slow@127.0.0.1 QUIT :Too slow to read")
    slow.wait("^ERROR :Closing link: Too slow to read$")     # it may still read why; each line before it is a whole one
    assert slow.closed()


def test_an_idle_client_is_pinged_and_a_dead_one_dropped(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "IDLE_PING_SECONDS", 0.1)
    bob = Irc(bridge, "bob")
    bob.wait("^PING")
    bob.send("PONG :irc.asbridge")
    bob.wait("^PING")
    bob.wait("^ERROR :.*Ping timeout")
    assert bob.closed()


def test_who_does_not_register_in_time_is_told_and_dropped(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "REGISTER_SECONDS", 0.1)
    silent, busy = Irc(bridge), Irc(bridge)
    busy.send("CAP LS 302", "NICK busy", "USER busy 0 * :busy never ends CAP")
    with contextlib.suppress(OSError):
        while True:
            busy.send("PONG x")
    silent.wait("^ERROR :Closing link: Not registered in time: NICK and USER are wanted$")
    assert silent.closed() and busy.closed()
    eventually(lambda: not bridge.irc.clients)


@pytest.mark.parametrize("last", ["PRIVMSG #lobby :x", "QUIT", None])
def test_a_client_that_leaves_while_the_disk_is_full_takes_up_no_room_afterwards(bridge, monkeypatch, last):
    def full(*args, **job):
        raise sqlite3.OperationalError("database or disk is full")
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    channel_is_known(bridge)
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "spool", full)
        bob.send(last) if last else bob.sock.close()
        eve.wait("^:bob!.* QUIT ")
        eventually(lambda: len(bridge.irc.clients) == 1)
    assert not last or bob.closed()
    assert list(bridge.people) == ["eve"] and bridge.channels["#lobby"].people == {bridge.people["eve"]}


def test_past_the_most_clients_one_is_told_and_dropped_and_the_others_stay(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_CLIENTS", 1)
    bob, late = Irc(bridge, "bob"), Irc(bridge)
    late.wait("^ERROR :Closing link: Too many clients$")
    assert late.closed()
    bob.never("ERROR")
    bob.send("QUIT")
    assert bob.closed()
    eventually(lambda: not bridge.irc.clients)
    Irc(bridge, "next")


@pytest.mark.parametrize("line", ["POST /x HTTP/1.1", "GET http://127.0.0.1:6667/ HTTP/1.0"])
def test_a_web_page_cannot_speak_irc_for_its_reader(bridge, line):
    page = Irc(bridge)
    page.send(line, "Host: 127.0.0.1:6667", "", "NICK bob", "USER bob 0 * :bob", "JOIN #lobby")
    page.wait("^ERROR :Closing link: This is IRC, not HTTP$")
    assert page.closed() and not bridge.people


def test_a_line_without_an_end_is_forgotten_but_for_its_beginning(bridge):
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    bob.sock.sendall(b"PRIVMSG #lobby :" + b"\0\xff" * 500_000)
    bob.sock.sendall(b"\nPRIVMSG #lobby :after\n")           # LF alone ends a line, too
    assert len(eve.wait("PRIVMSG #lobby :").encode()) <= 510
    eve.wait("PRIVMSG #lobby :after$")
    bob.never("ERROR")


NONSENSE = [
    b"", b"\0", b"\r", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"\xff\xfe\xfd", b":", b"@", b"@tag", b":x", b": :", b"@a :b  ", b"x" * 5_000,
    b"NICK", b"NICK :", b"NICK \0", b"USER", b"USER : : : :", b"USER \xff \0 \x01 :\xff", b"CAP", b"CAP :", b"CAP \x01", b"CAP REQ", b"PING", b"PING :",
    b"JOIN :", b"JOIN ,", b"JOIN #", b"JOIN #a\0b", b"JOIN #a:b", b"JOIN #a b c", b"JOIN &x", b"JOIN #" + b"x" * 64, b"JOIN \x07", b"PART ,,,", b"PART :#x,#y",
    b"TOPIC #", b"TOPIC : :", b"NAMES ,", b"NAMES \0", b"LIST \0", b"LIST #,#x", b"MODE :", b"MODE #", b"MODE # " + b"+o" * 200, b"MODE bob " + b"+" * 400,
    b"INVITE : :", b"INVITE bob #", b"KICK : :", b"PRIVMSG , :x", b"PRIVMSG :", b"PRIVMSG \0 \0", b"PRIVMSG bob :\x01", b"NOTICE , :x", b"NOTICE",
    b"AWAY :\x01\0", b"WHO :", b"WHO \0", b"WHO * o", b"WHOIS :", b"WHOIS ,,", b"WHOIS a b c", b"USERHOST " + b"bob " * 100, b"ISON :", b"ISON " + b"bob " * 100,
    b"VERSION x y z", b"do_join", b"__init__ x", b"SPOOL x", b"\xe2\x80\xa8"]


@pytest.mark.parametrize("registered", [False, True])
def test_no_line_whatever_it_is_makes_the_server_fail_or_drop_who_sent_it(bridge, caplog, monkeypatch, registered):
    monkeypatch.setattr(asbridge, "LINES_PER_SECOND", 5000)
    bob = Irc(bridge, *["bob"] * registered)
    bob.sock.sendall(b"\r\n".join([*NONSENSE, b""]))
    bob.never("^ERROR")
    assert bool(bridge.people) == registered and not [record for record in caplog.records if record.exc_info]


def test_more_channels_than_a_client_may_have_are_refused_by_405(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_CHANNELS", 3)
    bob = Irc(bridge, "bob")
    bob.send("JOIN " + ",".join(f"#{n}" for n in range(5)))
    bob.wait(" 405 bob #3 ")
    bob.wait(" 405 bob #4 ")
    bob.send("PART #0", "JOIN #4")
    bob.wait(" 366 bob #4 ")


def test_more_channels_than_there_may_be_are_refused_by_437_and_on_matrix_too(fake, bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_ROOMS", 1)
    bob = Irc(bridge, "bob", "#one")
    bob.send("JOIN #two")
    bob.wait(" 437 bob #two ")
    assert as_request(bridge, "GET", "/_matrix/app/v1/rooms/%23_irc_two%3Atest")[0] == 404
    assert as_request(bridge, "GET", "/_matrix/app/v1/rooms/%23_irc_one%3Atest")[0] == 200
    Irc(bridge, "eve", "#one").send("PART #one")
    bob.wait("eve!.* PART #one")
    bob.send("PART #one", "JOIN #three")                     # those that nobody is on any more keep out nobody
    bob.wait(" 366 bob #three ")


def test_what_makes_work_for_matrix_is_refused_by_437_while_too_much_waits(fake, bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_SPOOLED", 3)
    fake.fail = lambda request: asbridge.MatrixError("M_UNKNOWN", "away", 503)
    bob = Irc(bridge, "bob", "#lobby")
    bob.send(*[f"PRIVMSG #lobby :{n}" for n in range(5)], "JOIN #other", "NICK rob", "TOPIC #lobby :x")
    for what in ("#lobby", "#lobby", "#other", "rob", "#lobby"):
        bob.wait(f" 437 bob {what} ")
    bob.send("PART #lobby :bye")                             # who is in may always leave
    bob.wait("PART #lobby :bye")
    fake.fail = None
    eventually(lambda: bridge.ring() or len(fake.said()) == 3)
    eventually(lambda: not bridge.is_behind())
    bob.send("JOIN #other")
    bob.wait(" 366 ")


def test_of_too_many_recipients_the_rest_is_named_by_407_and_each_is_told_once(bridge):
    bob, eve = Irc(bridge, "bob"), Irc(bridge, "eve")
    bob.send(f"PRIVMSG eve,EVE,{','.join(f'n{n}' for n in range(60))} :hello")
    eve.wait("PRIVMSG eve :hello")
    eve.never("PRIVMSG")
    bob.wait(" 401 bob n8 ")
    bob.wait(" 407 bob n9 ")


def test_a_list_may_be_long_but_not_endless(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "MAX_LISTED", 3)
    bob = Irc(bridge, "bob", *[f"#{n}" for n in range(5)])
    eventually(lambda: not bridge.sql("SELECT * FROM irc_spool"))     # and so who is in the room has been asked
    with bridge.lock:
        for n in range(5):
            bridge.channels["#0"].enter(bridge.person(f"@m{n}:test"))
    bob.send("LIST", "WHO #0")
    for pattern in (" 322 bob #2 ", "NOTICE bob :and 2 more", " 323 ", " 352 bob #0 .* m1 ", "NOTICE bob :and 3 more", " 315 "):
        bob.wait(pattern)


def test_what_makes_much_work_slows_its_client_more(bridge):
    bob = Irc(bridge, "bob", "#lobby")
    client = bridge.people["bob"]

    def cost(line):
        before = client.paid_until
        bob.send(line)
        eventually(lambda: client.paid_until > before)
        return round((client.paid_until - before) * asbridge.LINES_PER_SECOND, 1)
    client.paid_until = bridge.clock.monotonic() - 1
    assert cost("PING x") == 1 and cost("PRIVMSG #lobby :x") == 1 and cost("JOIN " + ",".join(f"#{n}" for n in range(9))) > 9
    assert cost("NICK rob") >= asbridge.NICK_COST + 20       # of ten channels one ghost leaves, and another comes


def test_a_flood_is_slowed_and_kills_nobody(bridge, monkeypatch):
    monkeypatch.setattr(asbridge, "LINES_PER_SECOND", 5000)
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    bob.send(*[f"PRIVMSG #lobby :{n}" for n in range(1000)])
    eve.wait(":999$")
    bob.never("ERROR")


@pytest.mark.parametrize("allowed", [0, 1])
def test_an_irc_client_for_which_there_is_no_thread_is_closed_and_the_next_is_taken(bridge, monkeypatch, caplog, allowed):
    left, real = [allowed], threading.Thread.start

    def start_thread(thread):
        if thread.name in ("irc to 127.0.0.1", "irc from 127.0.0.1"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        real(thread)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_thread)
        assert Irc(bridge).closed()
        eventually(lambda: not bridge.irc.clients)
    assert Irc(bridge, "bob", "#lobby") and len(bridge.irc.clients) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "irc: no more IRC clients can be taken: can't start new thread; there are 0"]


def test_when_a_bridge_has_stopped_it_takes_no_connection_any_more_and_no_thread_of_it_waits_for_one(bridge):
    for _ in range(5):
        bridge.stop()
        assert not [thread for thread in threading.enumerate() if thread is bridge.irc._accepter]
        bridge = asbridge.IrcBridge(bridge_registration(), bridge.homeserver_url)
        bridge.start()
    bridge.stop()


# -- The bridge, with a homeserver that says yes.

@pytest.mark.parametrize("ask", [lambda bridge: bridge.on_user_query("@_irc_bob:test"), lambda bridge: bridge.on_third_party_user("", {"userid": "@_irc_bob:test"})])
def test_irc_does_not_wait_for_a_homeserver_that_has_not_yet_said_its_name(fake, ask):
    asked, answer = threading.Event(), threading.Event()

    def slow(request):
        if request.path.endswith("/whoami"):
            asked.set()
            answer.wait(10)
    fake.fail = slow
    bridge = asbridge.IrcBridge(bridge_registration(), fake.url)
    bridge.start()
    try:
        bob = Irc(bridge, "bob")
        asker = threading.Thread(target=ask, args=[bridge])
        asker.start()
        assert asked.wait(10)
        bob.send("PING still-here")
        bob.wait("PONG .*still-here", 5)
        assert asker.is_alive()                              # it waits, and it alone
    finally:
        answer.set()
        asker.join()
        bridge.stop()


def test_what_irc_says_is_sent_as_the_ghost_with_its_time_and_external_url(fake, bridge):
    bob = Irc(bridge, "Bob[x]", "#lobby")
    before = bridge.clock.now()
    bob.send("PRIVMSG #lobby :hello \x02bold\x02", "PRIVMSG #lobby :\x01ACTION waves\x01", "NOTICE #lobby :hm",
             "PRIVMSG #lobby :\x01VERSION\x01")
    eventually(lambda: len(fake.said()) == 3)
    sent = fake.paths("/send/m.room.message/")
    assert [(asked[3]["msgtype"], asked[3]["body"]) for asked in sent] == [
        ("m.text", "hello bold"), ("m.emote", "waves"), ("m.notice", "hm")]
    assert {asked[2]["user_id"] for asked in sent} == {"@_irc_bob=5bx=5d:test"}
    assert before <= int(sent[0][2]["ts"]) <= bridge.clock.now()
    assert sent[0][3]["external_url"] == "irc://test/%23lobby"
    assert fake.paths("/displayname")[0][3] == {"displayname": "Bob[x]"}


def test_join_creates_the_room_and_part_quit_and_nick_move_the_ghosts(fake, bridge):
    bob = Irc(bridge, "bob", "#Lobby")
    bob.send("NICK rob", "PART #lobby :tea")
    eventually(lambda: len(fake.paths("/leave")) == 2)
    assert fake.paths("/createRoom")[0][3] == {
        "preset": "public_chat", "room_alias_name": "_irc_lobby", "name": "#Lobby"}
    moves = [(re.search("/(join|leave)", asked[1])[1], asked[2].get("user_id"), asked[3].get("reason"))
             for asked in fake.paths("/(join|leave)$|/join/")]
    assert moves == [("join", "@_irc_bob:test", None), ("join", "@_irc_rob:test", None),
                     ("leave", "@_irc_bob:test", "is now known as rob"), ("leave", "@_irc_rob:test", "tea")]


def test_nothing_is_lost_doubled_or_reordered_while_the_homeserver_is_away(fake, tmp_path):
    clock, database = asbridge.Clock(), str(tmp_path / "as.db")
    bridge = asbridge.IrcBridge(bridge_registration(), fake.url, database, clock)
    bridge.start()
    bob = Irc(bridge, "bob", "#lobby")
    eventually(lambda: fake.paths("/join/"))
    fake.fail = lambda request: asbridge.MatrixError("M_UNKNOWN", "away", 503) if "/send/" in request.path else None
    bob.send(*[f"PRIVMSG #lobby :{n}" for n in range(5)])
    bob.never("nothing")
    eventually(lambda: clock.advance(60) or len(fake.said()) > 2)    # attempts, all of the first line
    assert set(fake.said()) == {"0"} and len({asked[1] for asked in fake.paths("/send/")}) == 1
    bridge.stop()
    fake.fail, first = None, fake.paths("/send/")[0][1]
    fake.asked.clear()
    bridge = asbridge.IrcBridge(bridge_registration(), fake.url, database, clock)
    bridge.start()
    eventually(lambda: len(fake.said()) == 5)
    assert fake.said() == ["0", "1", "2", "3", "4"] and fake.paths("/send/")[0][1] == first
    eventually(lambda: not bridge.sql("SELECT * FROM irc_spool"))
    bridge.stop()


def test_a_line_that_is_refused_for_good_is_told_and_dropped(fake, bridge):
    bob = in_lobby(bridge)
    fake.fail = lambda request: asbridge.MatrixError("M_BAD_JSON", "no good") if "/send/" in request.path else None
    bob.send("PRIVMSG #lobby :one")
    bob.wait("NOTICE bob :Matrix refuses that: no good")
    fake.fail = None
    bob.send("PRIVMSG #lobby :two")
    eventually(lambda: fake.said()[-1] == "two")


def test_ctcp_stays_on_irc_but_for_what_me_sends(fake, bridge):
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    for text in ("\x01VERSION\x01", "\x01DCC SEND x 1 2 3\x01", "\x01", "\x01\x01", "\x01ACTION\x01", "\x01PING"):
        bob.send(f"PRIVMSG #lobby :{text}")
        eve.wait(f"PRIVMSG #lobby :{text}$")
    bob.send("PRIVMSG #lobby :\x01ACTION has no end", "PRIVMSG #lobby :no \x01VERSION\x01 in the middle")
    eventually(lambda: len(fake.said()) == 2)
    assert [(asked[3]["msgtype"], asked[3]["body"]) for asked in fake.paths("/send/")] == [
        ("m.emote", "has no end"), ("m.text", "no VERSION in the middle")]


def test_no_control_character_of_irc_comes_to_matrix(fake, bridge):
    bob = in_lobby(bridge)
    hostile = "a\0b\rc\x01d\x1be\x7f"
    bob.send(f"PRIVMSG #lobby :{hostile}", f"TOPIC #lobby :{hostile}", f"PART #lobby :{hostile}")
    eventually(lambda: fake.paths("/leave"))
    assert fake.said() == ["abcde"] and fake.paths("/m.room.topic")[-1][3] == {"topic": "abcde"} and fake.paths("/leave")[0][3] == {"reason": "abcde"}


def test_nobody_on_irc_is_the_services_own_user(fake, tmp_path):
    fake_bot = {"sender_localpart": "_irc_bot"}
    bridge = asbridge.IrcBridge(bridge_registration(**fake_bot), fake.url)
    bridge.start()
    for nick in ("bot", "BoT"):
        bob = Irc(bridge)
        bob.send("USER bob 0 * :bob", f"NICK {nick}")
        bob.wait(f" 433 . {nick} ")
    bob.send("NICK bots")
    bob.wait(" 001 bots ")
    bob.send("NICK bot")
    bob.wait(" 433 bots bot ")
    bridge.stop()


def test_two_have_never_the_same_nick_whatever_its_case_and_whether_on_irc_or_matrix(bridge):
    _others = Irc(bridge, "x[]\\^"), Irc(bridge, "bob", "#lobby")
    channel_is_known(bridge)
    push(bridge, "m.room.member", {"membership": "join", "displayname": "alic"}, state_key="@alice:test")
    new = Irc(bridge, "new")
    for nick in ("BOB", "x{}|^", "X[]\\^", "alice", "ALICE"):
        new.send(f"NICK {nick}")
        new.wait(f" 433 new {re.escape(nick)} ")
    new.send("NICK alic", "NICK alice_m", "NICK Alic")       # a display name is nobody's nick
    new.wait("^:alice_m!new@127.0.0.1 NICK :Alic$")


def test_different_nicks_are_different_ghosts_and_a_ghost_tells_its_nick(bridge):
    letters = [chr(n) for n in range(0x21, 0x7f)]
    nicks = [nick for pair in itertools.product(letters, ["", *letters]) if asbridge.NICK.fullmatch(nick := "".join(pair))]
    ghosts = {bridge.ghost_id(nick): nick.lower() for nick in nicks}
    assert len(ghosts) == len({nick.lower() for nick in nicks})
    assert all(bridge.ghost_nick(ghost) == nick and asbridge.STRICT_LOCALPART.fullmatch(asbridge.localpart_of(ghost)) for ghost, nick in ghosts.items())


ALIKE = ["#a", "#A", "#a{", "#a[", "#a~", "#a^", "#a/b", "#a%2Fb", "#a%2fb", "#a=2fb", "#\xe4", "#a\u0308", "#\u0430", "#a#b", "#a?b", "#a\u2003b", "#a\xa0b",
         "#a.b", "#a@b", "#a\u202eb", "##", "###", "#\U0001f600", "#_irc_a", "#a+b", "#a&b", "#'\"<>"]


def test_two_channels_never_have_the_same_alias_unless_irc_takes_them_for_one(bridge):
    for one, other in itertools.combinations(ALIKE, 2):
        assert (bridge.channel_alias(one) == bridge.channel_alias(other)) == (asbridge.fold(one) == asbridge.fold(other)), (one, other)
    for name in ALIKE:
        assert asbridge.is_channel(name) and bridge.channel_of(bridge.channel_alias(name)) == asbridge.fold(name)
        asbridge.check_id("#", bridge.channel_alias(name), "test")


def test_each_channel_is_asked_for_by_its_own_name(fake, bridge):
    bob = Irc(bridge, "bob")
    bob.send(*[f"JOIN {name}" for name in ALIKE])
    eventually(lambda: len(fake.paths("/createRoom")) == len(set(map(asbridge.fold, ALIKE))))
    made = {asked[3]["room_alias_name"] for asked in fake.paths("/createRoom")}
    assert made == {"_irc_" + asbridge.fold(name)[1:] for name in ALIKE}


INJECTED = "x\r\nQUIT :y\nPRIVMSG bob :\x01DCC z\x01\0\r:irc.asbridge KILL bob\x01"

HOSTILE_EVENTS = [
    ("m.room.message", {"msgtype": "m.text", "body": INJECTED}, {}), ("m.room.message", {"msgtype": "m.emote", "body": INJECTED}, {}),
    ("m.room.message", {"msgtype": "m.notice", "body": INJECTED}, {}), ("m.room.message", {"msgtype": INJECTED, "body": INJECTED}, {}),
    ("m.room.message", {"msgtype": "m.image", "body": INJECTED, "url": INJECTED}, {}),
    ("m.room.message", {"msgtype": "m.file", "body": "x", "file": {"url": "\n\x01DCC SEND\x01"}}, {}),
    ("m.room.message", {"msgtype": "m.location", "body": "x", "geo_uri": "\n\x01DCC SEND\x01"}, {}),
    ("m.room.message", {"msgtype": "m.text", "body": f"> <@{INJECTED}:x> a\n\n{INJECTED}", "m.relates_to": {"m.in_reply_to": {"event_id": "$x"}}}, {}),
    ("m.sticker", {"body": INJECTED, "url": INJECTED}, {}), ("m.room.topic", {"topic": INJECTED}, {"state_key": ""}),
    ("m.room.member", {"membership": "join", "displayname": INJECTED}, {"state_key": "@new:test"}),
    ("m.room.member", {"membership": "leave", "reason": INJECTED}, {"state_key": "@alice:test"}),
    ("m.room.member", {"membership": "ban", "reason": INJECTED}, {"state_key": "@_irc_eve:test"}),
    ("m.room.redaction", {"redacts": INJECTED, "reason": INJECTED}, {})]


def test_nothing_that_comes_from_matrix_is_a_command_on_irc(bridge):
    bob, _eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    channel_is_known(bridge)
    for type, content, other in HOSTILE_EVENTS:
        push(bridge, "m.room.member", {"membership": "join"}, state_key="@alice:test")
        push(bridge, type, content, **other)
    message(bridge, "the end", sender="@carol:test")
    bob.send("WHOIS new", "NAMES #lobby", "LIST", "PING end")
    while not any("the end" in line for line in bob.lines) or not any("PONG" in line for line in bob.lines):
        bob.wait_more()
    assert len(bob.lines) > 40 and any("KICK #lobby eve" in line for line in bob.lines) and any(" 311 bob new " in line for line in bob.lines)
    for line in bob.lines:
        assert re.match(r":(eve!eve@127.0.0.1|(alice!alice|carol!carol|new!new)@test) (PRIVMSG|NOTICE|JOIN|PART|TOPIC|KICK) #lobby"
                        r"|:irc.asbridge (\d{3}|PONG) ", line), line
        assert not re.search(r"[\r\n\0]", line) and ("\x01" not in line or re.search(r" :\x01ACTION [^\x01]*\x01$", line)), line


ODD = [None, 5, 1.5, True, [], {}, [[]], "", "\ud83d\ude00", {"event_id": []}]


def test_an_event_of_any_shape_is_read_without_failing(bridge, caplog):
    _bob = in_lobby(bridge)
    for odd in ODD:
        contents = [{"msgtype": odd, "body": odd, "url": odd, "file": odd, "geo_uri": odd, "m.relates_to": odd}, {"msgtype": "m.location", "body": odd, "geo_uri": odd},
                    {"msgtype": "m.image", "body": odd, "url": odd, "file": odd}, {"body": "> <@x:y> z\n", "m.relates_to": {"m.in_reply_to": odd}},
                    {"body": "x", "m.relates_to": {"rel_type": odd, "m.in_reply_to": {"event_id": odd}}, "m.new_content": odd},
                    {"m.relates_to": {"rel_type": "m.replace"}, "m.new_content": {"msgtype": odd, "body": odd}}, odd]
        events = [("m.room.message", {"content": content}) for content in contents]
        events += [("m.room.redaction", {"content": {"redacts": odd}}), ("m.room.redaction", {"redacts": odd}), ("m.room.topic", {"state_key": odd}),
                   ("m.room.topic", {"content": {"topic": odd}, "state_key": ""}), ("m.room.member", {})]
        events += [("m.room.member", {"content": {"membership": membership, "displayname": odd, "reason": odd}, "state_key": "@odd:test"})
                   for membership in ("join", odd, "leave")]
        events = [{"event_id": "$" + secrets.token_hex(8), "type": type, "sender": "@alice:test", "room_id": "!room:test", "origin_server_ts": 2**53 - 1,
                   "content": {}, **other} for type, other in events]
        assert as_request(bridge, "PUT", PUSH + secrets.token_hex(8), {"events": events}) == (200, {})
        assert not [record.getMessage() for record in caplog.records if record.exc_info], odd


def test_what_is_no_state_event_sets_no_topic(bridge):
    bob = in_lobby(bridge)
    push(bridge, "m.room.topic", {"topic": "spoofed"}), push(bridge, "m.room.topic", {"topic": "spoofed"}, state_key="x")
    push(bridge, "m.room.topic", {"topic": "tea"}, state_key="")
    bob.wait("TOPIC #lobby :tea")
    assert bridge.channels["#lobby"].topic == "tea"
    bob.never("spoofed")


@pytest.mark.parametrize("wish", ["5", [1], {}, True, -5, None])
def test_a_homeserver_that_wants_to_be_asked_later_but_does_not_say_when_is_asked_again(fake, bridge, wish):
    bob = in_lobby(bridge)
    left = [1]
    fake.fail = lambda request: asbridge.MatrixError("M_LIMIT_EXCEEDED", "slower", retry_after_ms=wish) if "/send/" in request.path and left and left.pop() else None
    bob.send("PRIVMSG #lobby :one")
    eventually(lambda: not left)
    eventually(lambda: bridge.clock.advance(1) or len(fake.paths("/send/")) == 2)


def test_matrix_people_are_seen_on_irc(bridge):
    bob = in_lobby(bridge)
    push(bridge, "m.room.member", {"membership": "join", "displayname": "Alice"}, state_key="@alice:test")
    bob.wait("^:alice!alice@test JOIN #lobby$")
    bob.send("NAMES #lobby", "WHOIS alice")
    bob.wait("353 bob = #lobby :alice bob$")
    assert bob.wait(" 311 ").endswith("alice alice test * :Alice")
    message(bridge, "one\ntwo")
    bob.wait("^:alice!alice@test PRIVMSG #lobby :one$")
    bob.wait("^:alice!alice@test PRIVMSG #lobby :two$")
    push(bridge, "m.room.topic", {"topic": "tea"}, state_key="")
    bob.wait("^:alice!alice@test TOPIC #lobby :tea$")
    push(bridge, "m.room.member", {"membership": "leave", "reason": "bye"}, state_key="@alice:test")
    bob.wait("^:alice!alice@test PART #lobby :bye$")


def test_a_matrix_person_whose_nick_is_taken_gets_another_and_keeps_it(fake, tmp_path):
    for nick in ("alice", "else"):
        bridge = asbridge.IrcBridge(bridge_registration(), fake.url, str(tmp_path / "as.db"))
        bridge.start()
        _other = Irc(bridge, nick)
        bob = Irc(bridge, "bob", "#lobby")
        channel_is_known(bridge)
        push(bridge, "m.room.member", {"membership": "join"}, state_key="@alice:test")
        bob.wait(":alice_m!alice@test JOIN")
        bridge.stop()


def test_what_ghosts_and_the_bot_send_is_not_echoed(bridge):
    bob = in_lobby(bridge)
    message(bridge, "echo", sender="@_irc_bob:test")
    message(bridge, "echo", sender="@ircbot:test")
    bob.never("echo")


@pytest.mark.parametrize("content, line", [
    ({"msgtype": "m.emote", "body": "waves"}, "PRIVMSG #lobby :\x01ACTION waves\x01"),
    ({"msgtype": "m.notice", "body": "hm"}, "NOTICE #lobby :hm"),
    ({"msgtype": "m.image", "body": "cat.png", "url": "mxc://test/1"}, "PRIVMSG #lobby :an image: cat.png mxc://test/1"),
    ({"msgtype": "m.text", "body": "* ab", "m.new_content": {"msgtype": "m.text", "body": "ab"},
      "m.relates_to": {"rel_type": "m.replace", "event_id": "$x"}}, "PRIVMSG #lobby :* ab"),
    ({"msgtype": "m.text", "body": "> <@_irc_bob:test> hi\n\nyes",
      "m.relates_to": {"m.in_reply_to": {"event_id": "$x"}}},
     "PRIVMSG #lobby :bob: yes"),
    ({"msgtype": "m.text", "body": "\x01ACTION spoofs\x01\r"}, "PRIVMSG #lobby :ACTION spoofs"),
    ({"algorithm": "m.megolm"}, "PRIVMSG #lobby :"),
])
def test_a_matrix_message_is_readable_on_irc(bridge, content, line):
    bob = in_lobby(bridge)
    if "algorithm" in content:
        push(bridge, "m.room.encrypted", content)
        line = "NOTICE #lobby :(an encrypted message, which the bridge can't read)"
    else:
        push(bridge, "m.room.message", content)
    assert bob.wait("^:alice!alice@test ") == ":alice!alice@test " + line


@pytest.mark.parametrize("quoted", ["@nobody:test", "@carol:elsewhere", "@_irc_=01ACTION:test", "@_irc_:test", "x"])
def test_who_is_only_quoted_gets_no_nick(bridge, quoted):
    bob = in_lobby(bridge)
    content = {"msgtype": "m.text", "body": f"> <{quoted}> hi\n\nyes", "m.relates_to": {"m.in_reply_to": {"event_id": "$x"}}}
    push(bridge, "m.room.message", content)
    assert bob.wait("^:alice!alice@test ") == ":alice!alice@test PRIVMSG #lobby :yes"
    assert set(bridge.people) == {"bob", "alice"} and bridge.sql("SELECT nick FROM irc_nicks") == [("alice",)]


@pytest.mark.parametrize("ts", [0, -1, 2**53 - 1, 10**30])
def test_a_message_of_any_time_reaches_irc(bridge, ts):
    bob = in_lobby(bridge)
    message(bridge, "hello", origin_server_ts=ts)
    bob.wait("PRIVMSG #lobby :hello$")


def test_a_redaction_and_a_reply_say_what_they_are_about(bridge):
    bob = in_lobby(bridge)
    first = message(bridge, "first words")
    message(bridge, "right", sender="@carol:test", content={"m.relates_to": {"m.in_reply_to": {"event_id": first}}})
    bob.wait(":carol!carol@test PRIVMSG #lobby :alice: right")
    push(bridge, "m.room.redaction", {"redacts": first})
    bob.wait("ACTION deletes alice's message of 00:00:00 UTC\x01")
    push(bridge, "m.room.redaction", {}, redacts="$unknown")
    bob.wait("ACTION deletes a message\x01")


def test_a_kick_on_matrix_is_a_kick_on_irc(fake, bridge):
    bob = in_lobby(bridge)
    push(bridge, "m.room.member", {"membership": "leave", "reason": "enough"}, state_key="@_irc_bob:test")
    bob.wait("^:alice!alice@test KICK #lobby bob :enough")
    bob.send("PRIVMSG #lobby :again")
    bob.wait(" 404 ")


def test_a_nick_that_a_matrix_person_has_is_in_use(bridge):
    bob = in_lobby(bridge)
    message(bridge, "hello")
    bob.wait("hello")
    bob.send("NICK Alice")
    bob.wait(" 433 bob Alice ")


def test_a_room_that_the_homeserver_has_lost_is_created_again(fake, bridge):
    bob = Irc(bridge, "bob", "#lobby")
    eventually(lambda: fake.paths("/join/"))
    bob.send("PART #lobby", "JOIN #lobby")
    fake.asked.clear()
    lost = ["/join/", "/directory/"]

    def fail(request):
        for part in lost:
            if part in request.path and not fake.paths("/createRoom"):
                return asbridge.MatrixError("M_NOT_FOUND", "no such room")
        return None
    fake.fail = fail
    eventually(lambda: fake.paths("/createRoom"))
    bob.never("KICK")


def test_irc_formatting_reaches_irc_people_and_is_left_out_on_matrix(fake, bridge):
    bob, eve = Irc(bridge, "bob", "#lobby"), Irc(bridge, "eve", "#lobby")
    bob.send("PRIVMSG #lobby :\x1ditalic\x1d \x0304,01red\x0f 4")
    eve.wait(":\x1ditalic\x1d \x0304,01red\x0f 4$")
    eventually(lambda: fake.said() == ["italic red 4"])


def test_a_private_message_opens_one_direct_room_and_uses_it_again(fake, bridge):
    bob = in_lobby(bridge)
    message(bridge, "here I am")
    bob.wait("here I am")
    fake.asked.clear()
    bob.send("PRIVMSG alice :one", "PRIVMSG ALICE :two")
    eventually(lambda: fake.said() == ["one", "two"])
    rooms = fake.paths("/createRoom")
    assert len(rooms) == 1 and rooms[0][2]["user_id"] == "@_irc_bob:test"
    assert rooms[0][3] == {"preset": "trusted_private_chat", "is_direct": True, "invite": ["@alice:test"]}


def test_an_invited_ghost_joins_a_direct_room_and_its_messages_are_private(fake, bridge):
    bob = Irc(bridge, "bob")
    invite = {"room_id": "!direct:test", "state_key": "@_irc_bob:test"}
    push(bridge, "m.room.member", {"membership": "invite", "is_direct": True}, **invite)
    eventually(lambda: bridge.direct)
    message(bridge, "psst", room_id="!direct:test")
    bob.wait("^:alice!alice@test PRIVMSG bob :psst$")
    bob.send("PRIVMSG alice :yes?", "QUIT")
    eventually(lambda: fake.said() == ["yes?"])
    assert "/rooms/%21direct%3Atest/send/" in fake.paths("/send/")[0][1]
    assert bob.closed()
    eventually(lambda: not bridge.irc.clients)
    event_id = message(bridge, "still there?", room_id="!direct:test")
    eventually(lambda: len(fake.said()) == 2)
    assert "not on IRC" in fake.said()[1]
    assert fake.paths("/send/")[1][1].endswith("/away-" + event_id.replace("$", "%24"))


def test_an_invited_ghost_that_is_not_connected_refuses(fake, bridge):
    invite = {"membership": "invite", "is_direct": True}
    push(bridge, "m.room.member", invite, state_key="@_irc_eve:test", room_id="!d:test")
    left = eventually(lambda: fake.paths("/rooms/%21d%3Atest/leave"))
    assert left[0][2]["user_id"] == "@_irc_eve:test" and left[0][3]["reason"] == "eve is not on IRC"


def test_a_user_query_says_yes_only_for_nicks_that_are_connected(fake, bridge):
    _bob = Irc(bridge, "Bob")
    assert as_request(bridge, "GET", "/_matrix/app/v1/users/%40_irc_bob%3Atest")[0] == 200
    assert "_irc_bob" in [asked[3]["username"] for asked in fake.paths("/register")]
    assert as_request(bridge, "GET", "/_matrix/app/v1/users/%40_irc_eve%3Atest")[0] == 404


def test_an_alias_query_creates_the_room_of_a_channel(fake, bridge):
    assert as_request(bridge, "GET", "/_matrix/app/v1/rooms/%23_irc_tea%3Atest")[0] == 200
    assert [asked[3]["room_alias_name"] for asked in fake.paths("/createRoom")] == ["_irc_tea"]
    for alias in ("%23other%3Atest", "%23_irc_%3Atest", "%23_irc_a%2Cb%3Atest", "%23_irc_tea%3Aelsewhere"):
        assert as_request(bridge, "GET", f"/_matrix/app/v1/rooms/{alias}")[0] == 404


@pytest.mark.parametrize("where,found", [
    ("user/irc?nickname=bob", {"userid": "@_irc_bob:test", "protocol": "irc", "fields": {"nickname": "Bob"}}), ("user/irc?nickname=eve", None), ("user/irc", None), ("user/sms?nickname=bob", None),
    ("user?userid=%40_irc_bob%3Atest", {"userid": "@_irc_bob:test", "protocol": "irc", "fields": {"nickname": "Bob"}}), ("user?userid=@bob:test", None), ("user?userid=@_irc_eve:test", None),
    ("location/irc?channel=%23Tea", {"alias": "#_irc_tea:test", "protocol": "irc", "fields": {"channel": "#tea"}}), ("location/irc?channel=tea", None), ("location/sms?channel=%23tea", None),
    ("location?alias=%23_irc_tea:test", {"alias": "#_irc_tea:test", "protocol": "irc", "fields": {"channel": "#tea"}}), ("location?alias=%23tea:test", None),
    ("location?alias=%23_irc_tea:elsewhere", None), ("protocol/sms", None)])
def test_the_irc_network_can_be_looked_up_in_both_directions(bridge, where, found):
    _bob = Irc(bridge, "Bob")
    status, answer = as_request(bridge, "GET", "/_matrix/app/v1/thirdparty/" + where)
    assert (status, answer) == (200, [found]) if found else (status, answer["errcode"]) == (404, "M_NOT_FOUND")


# -- The bridge, with a real homeserver.

def test_irc_and_matrix_talk_in_a_channel(world):
    alice, channel, nick = world.client(unique("alice")), "#" + unique("lobby"), unique("bob")
    bob = Irc(world.bridge, nick, channel)
    room_id = join(world, alice, channel)
    alice_nick = asbridge.localpart_of(alice.user_id)
    bob.wait(f":{alice_nick}!.* JOIN {channel}")
    alice.say(room_id, "hello from Matrix")
    bob.wait(f":{alice_nick}!.* PRIVMSG {channel} :hello from Matrix")
    bob.send(f"PRIVMSG {channel} :hello from IRC")
    event = alice.wait_for(lambda e: e["content"].get("body") == "hello from IRC")
    assert event["sender"] == world.bridge.ghost_id(nick) and event["content"]["external_url"].startswith("irc://")
    assert alice.joined_members(room_id)[event["sender"]]["display_name"] == nick
    bob.never("hello from IRC")


def test_a_matrix_user_creates_a_channel_by_joining_its_alias(world):
    alice, channel = world.client(unique("alice")), "#" + unique("tea")
    room_id = alice.join(alias_of(world, channel))
    bob = Irc(world.bridge, unique("bob"), channel)
    bob.send(f"PRIVMSG {channel} :found you")
    assert alice.wait_for(lambda e: e["content"].get("body") == "found you")["room_id"] == room_id
    world.hs.settle()
    bob.send(f"NAMES {channel}")
    assert asbridge.localpart_of(alice.user_id) in bob.wait(" 353 ")


def test_a_matrix_user_finds_the_irc_network_and_who_is_on_it(world):
    alice, nick, channel = world.client("alice"), unique("bob"), unique("#tea")
    _bob = Irc(world.bridge, nick)
    protocol = third_party(alice, "protocols")["irc"]
    assert protocol["instances"][0]["instance_id"] == "irc|irc" and protocol["user_fields"] == ["nickname"] and protocol["location_fields"] == ["channel"]
    user, = third_party(alice, "user", "irc", nickname=nick)
    assert third_party(alice, "user", userid=user["userid"]) == [user] and user["fields"] == {"nickname": nick}
    location, = third_party(alice, "location", "irc", channel=channel)
    assert third_party(alice, "location", alias=location["alias"]) == [location]
    assert alice.join(location["alias"]) == alice.resolve(alias_of(world, channel))


def test_topics_nicks_and_parts_cross_the_bridge(world):
    alice, channel, nick = world.client(unique("alice")), "#" + unique("top"), unique("bob")
    room_id = alice.join(alias_of(world, channel))
    bob = Irc(world.bridge, nick, channel)
    bob.send(f"TOPIC {channel} :tea time")
    alice.wait_for(lambda e: e["type"] == "m.room.topic" and e["content"]["topic"] == "tea time")
    other = unique("rob")
    bob.send(f"NICK {other}")

    old, new = world.bridge.ghost_id(nick), world.bridge.ghost_id(other)
    alice.wait_for(member(new, "join"))
    alice.wait_for(member(old, "leave"))
    bob.send("QUIT :good night")
    assert alice.wait_for(member(new, "leave"))["content"]["reason"] == "Quit: good night"
    assert set(alice.joined_members(room_id)) == {alice.user_id, world.bridge.bot.user_id}


def test_private_messages_cross_the_bridge_both_ways(world):
    alice, channel, nick = world.client(unique("alice")), "#" + unique("priv"), unique("bob")
    bob = Irc(world.bridge, nick, channel)
    join(world, alice, channel)
    alice_nick = asbridge.localpart_of(alice.user_id)
    bob.wait(f"{alice_nick}!.* JOIN")
    bob.send(f"PRIVMSG {alice_nick} :a secret")
    invite = alice.wait_for(member(alice.user_id, "invite"))
    room_id = alice.join(invite["room_id"])
    alice.wait_for(lambda e: e["content"].get("body") == "a secret")
    alice.say(room_id, "and another")
    bob.wait(f":{alice_nick}!.* PRIVMSG {nick} :and another")
    bob.send(f"PRIVMSG {alice_nick} :a third")
    assert alice.wait_for(lambda e: e["content"].get("body") == "a third")["room_id"] == room_id


def test_a_matrix_user_starts_a_private_talk(world):
    alice, nick = world.client(unique("alice")), unique("bob")
    bob = Irc(world.bridge, nick)
    room_id = alice.create_room(preset="trusted_private_chat", is_direct=True, invite=[world.bridge.ghost_id(nick)])
    alice.wait_for(member(world.bridge.ghost_id(nick), "join"))
    alice.say(room_id, "psst")
    line = bob.wait(f"PRIVMSG {nick} :psst")
    bob.send(f"PRIVMSG {line[1:].partition('!')[0]} :yes?")
    assert alice.wait_for(lambda e: e["content"].get("body") == "yes?")["room_id"] == room_id


def test_many_lines_cross_the_bridge_once_and_in_order(world):
    alice, channel = world.client(unique("alice")), "#" + unique("many")
    room_id = alice.join(alias_of(world, channel))
    bob = Irc(world.bridge, unique("bob"), channel)
    bob.send(*[f"PRIVMSG {channel} :{n}" for n in range(50)])
    alice.wait_for(lambda e: e["content"].get("body") == "49", seconds=20)
    assert bodies(alice.messages(room_id, limit=100)["chunk"])[::-1] == [str(n) for n in range(50)]


def test_a_channel_with_a_strange_name_is_one_room_from_either_side(world):
    alice, bob = world.client("alice"), Irc(world.bridge, unique("bob"))
    for name in ("#a%2Fb", "#a/b", "#a?b#\u2003"):
        name += unique("n")
        bob.send(f"JOIN {name}")
        bob.wait(f" 366 {bob.nick} {re.escape(name)} ")
        room_id = alice.join(alias_of(world, name))
        bob.wait(f"^:alice!alice@localhost JOIN {re.escape(name)}$")
        alice.say(room_id, "hello")
        assert bob.wait("PRIVMSG") == f":alice!alice@localhost PRIVMSG {name} :hello"


def test_a_bridge_that_is_started_again_finds_its_rooms_and_its_ghosts_leave(world):
    alice, channel, nick = world.client(unique("alice")), "#" + unique("again"), unique("bob")
    bob = Irc(world.bridge, nick, channel)
    room_id = join(world, alice, channel)
    bob.wait("JOIN")
    world.restart_bridge()
    ghost = world.bridge.ghost_id(nick)
    alice.wait_for(member(ghost, "leave"))
    assert world.bridge.bot.user_id in alice.joined_members(room_id)      # though it is called like a ghost
    bob = Irc(world.bridge, nick, channel)
    alice.say(room_id, "welcome back")
    bob.wait("PRIVMSG .* :welcome back")
    bob.send(f"PRIVMSG {channel} :thanks")
    assert alice.wait_for(lambda e: e["content"].get("body") == "thanks")["room_id"] == room_id


# ============================================================================
# 12. Running it
# ============================================================================

# -- The configuration.

def configured(tmp_path, capsys, text):
    """Exit code and stderr of a start with this configuration, which is wrong."""
    file = tmp_path / "c.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    code = asbridge.main(["--config", str(file)])
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return code, err


def test_every_key_of_the_design_is_a_key_of_the_configuration():
    fields = {one.name for one in asbridge.dataclasses.fields(asbridge.Config)}
    assert fields == set(asbridge.CONFIG_KEYS) == {
        "server_name", "bind", "port", "database", "registrations", "open_registration", "public_url", "admin_token", "max_event_bytes", "max_request_bytes",
        "max_upload_bytes", "retry_first_ms", "retry_max_ms", "push_timeout_ms", "query_timeout_ms", "room_version", "rate_limit", "one_cpu"}
    config = asbridge.ConfigReader({}, "x", "").read()
    assert (config.server_name, config.bind, config.port, config.database, config.room_version) == ("localhost", "127.0.0.1", 8008, "asbridge.db", "11")
    assert (config.max_event_bytes, config.max_request_bytes, config.max_upload_bytes) == (65536, 2**20, 50 * 2**20)
    assert (config.retry_first_ms, config.retry_max_ms, config.push_timeout_ms, config.query_timeout_ms) == (500, 60000, 60000, 10000)


@pytest.mark.parametrize("text", [HEISENBRIDGE, json.dumps(registration("heisenbridge"))])
def test_a_registration_alone_is_a_configuration(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    config = asbridge.read_config(str(tmp_path / "r.yaml"))
    assert [one.id for one in config.registrations] == ["heisenbridge"] and config.port == 8008


def test_paths_in_a_configuration_are_relative_to_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.yaml").write_text(HEISENBRIDGE)
    (tmp_path / "sub" / "c.json").write_text(json.dumps({"registrations": ["r.yaml", registration()], "database": "d.db"}))
    config = asbridge.read_config(str(tmp_path / "sub" / "c.json"))
    assert [one.id for one in config.registrations] == ["heisenbridge", "irc"] and config.database == str(tmp_path / "sub" / "d.db")


@pytest.mark.parametrize("keys", [{"public_url": ""}, {"public_url": "https://matrix.example.org/x"}, {"admin_token": None}, {"admin_token": "open sesame"},
                                  {"retry_first_ms": 5, "retry_max_ms": 5}])
def test_a_value_that_is_right_is_no_finding(keys):
    config = asbridge.ConfigReader(keys, "x", "").read()
    assert {key: getattr(config, key) for key in keys} == keys


@pytest.mark.parametrize("key,value", [
    ("server_name", ""), ("server_name", "a b"), ("server_name", 5), ("bind", 5), ("port", "8008"), ("port", 65536), ("port", -1), ("port", True), ("database", 5), ("database", ""), ("database", "a\0b"),
    ("registrations", {}), ("open_registration", "yes"), ("open_registration", 1), ("public_url", 5), ("public_url", "foo"), ("public_url", "http://"),
    ("public_url", "https://x/?y"), ("admin_token", 5), ("admin_token", ""), ("admin_token", " "), ("admin_token", "gehe\u00edm"), ("admin_token", "a\nb"), ("max_event_bytes", 0), ("max_event_bytes", "1"),
    ("max_request_bytes", -1), ("max_upload_bytes", 1.5), ("retry_first_ms", 0), ("retry_max_ms", None), ("push_timeout_ms", "1"), ("query_timeout_ms", 0),
    ("room_version", "1"), ("room_version", 11), ("rate_limit", 5), ("rate_limit", {"per_second": 1}), ("rate_limit", {"per_second": 0, "burst": 1}), ("rate_limit", {"per_second": 1, "burst": "2"})])
def test_a_key_with_a_wrong_value_is_named_with_what_would_be_right(tmp_path, capsys, key, value):
    code, err = configured(tmp_path, capsys, {key: value})
    assert code == 2 and f"c.json: {key}: is " in err and "write " in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("value", [5771932, ["5771932"], " 5771932", {"a": "5771932"}])
def test_no_finding_repeats_the_admin_token(tmp_path, capsys, value):
    code, err = configured(tmp_path, capsys, {"admin_token": value})
    assert code == 2 and "admin_token: is none that can be used; write a long random text" in err and "5771932" not in err


@pytest.mark.parametrize("keys", [{"retry_first_ms": 9000, "retry_max_ms": 8999}, {"retry_first_ms": 60_001}, {"retry_max_ms": 499}])
def test_the_first_pause_between_attempts_is_not_longer_than_the_last(tmp_path, capsys, keys):
    code, err = configured(tmp_path, capsys, keys)
    assert code == 2 and re.search(r"c.json: retry_first_ms: is \d+, more than retry_max_ms, which is \d+; write a smaller number\n$", err)


@pytest.mark.parametrize("key,nearest", [("servername", "server_name"), ("prot", "port"), ("registration", "registrations"), ("zzz", "")])
def test_an_unknown_key_names_the_nearest_known_one(tmp_path, capsys, key, nearest):
    code, err = configured(tmp_path, capsys, {key: 1})
    assert code == 2 and key in err and f"'{nearest}" in err


@pytest.mark.parametrize("key", ["as_token", "hs_token", "sender_localpart", "namespaces"])
def test_a_registration_alone_is_known_as_one_even_if_a_key_is_missing(tmp_path, capsys, key):
    code, err = configured(tmp_path, capsys, {name: value for name, value in registration().items() if name != key})
    assert code == 2 and f"c.json: {key}: is missing; write " in err and len(err.splitlines()) == 1


def test_all_findings_are_printed_and_not_the_first(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("id: x\nurl: 5\n")
    twins = [registration(), registration()]
    code, err = configured(tmp_path, capsys, {"port": "x", "colour": 1, "registrations": [*twins, "bad.yaml", "missing.json", 5]})
    assert code == 2
    for part in ("port", "colour", "registrations[1]: id", "registrations[1]: as_token", "bad.yaml: url", "bad.yaml: as_token: is missing", "missing.json", "registrations[4]"):
        assert part in err, part


@pytest.mark.parametrize("entry", [{}, None])
def test_an_empty_registration_is_a_finding(tmp_path, capsys, entry):
    with pytest.raises(asbridge.ConfigError):
        asbridge.ConfigReader({"registrations": [entry]}, "x", "").read()


@pytest.mark.parametrize("text", ["", "[]", "5", "{", '{"a": 1,}', "\x00", "a: [1", "- x"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, capsys, text):
    code, err = configured(tmp_path, capsys, text)
    assert code == 2 and "c.json" in err


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert asbridge.main(["--config", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_role_of_an_application_service_needs_a_sample(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(registration()))
    assert asbridge.main(["--role", "appservice", "--config", str(tmp_path / "r.json")]) == 2
    assert "asbridge.sample" in capsys.readouterr().err


# -- The homeserver in one piece, for a program or a test.

def test_an_embedded_homeserver_starts_on_a_free_port_and_ends_with_the_block():
    with asbridge.Homeserver(registrations=[registration()]) as hs:
        assert hs.client("alice").whoami()["user_id"] == "@alice:localhost" and hs.appservice("irc").whoami()
        folder = os.path.dirname(hs.world.store.path)
        assert os.path.exists(folder)
    assert not os.path.exists(folder)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", hs.port), 1)
    hs.stop()                                                          # again is no error


def test_two_homeservers_in_one_process_know_nothing_of_each_other(start):
    one, two = start(registration(), server_name="one.org"), start(server_name="two.org")
    alice = one.client("alice")
    assert alice.user_id == "@alice:one.org" and two.client("alice").user_id == "@alice:two.org"
    with refused("M_UNKNOWN_TOKEN", 401):
        asbridge.Client(two.url, alice.token).whoami()


EMBEDDED = """
import signal, sys, threading
sys.path.insert(0, {here!r})
before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
import asbridge
with asbridge.Homeserver(registrations=[{registration!r}]) as hs:
    alice = hs.client("alice")
    alice.say(alice.create_room(), "x")
    while not hs.delivery.worker("irc").failures: pass
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
"""


def embedded(url):
    script = EMBEDDED.format(here=HERE, registration=registration(url=url, rooms=["!.*"]))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)


def test_an_embedded_homeserver_touches_no_signals_and_ends():
    assert embedded(nowhere()).returncode == 0


def test_an_embedded_homeserver_says_nothing():
    result = embedded(nowhere())
    assert (result.stdout, result.stderr) == ("", "")


def test_settle_says_what_is_stuck(start):
    hs = start(registration(url=nowhere(), rooms=["!.*"]))
    hs.client("alice").create_room()
    with pytest.raises(AssertionError, match=r"[0-9]+ events for 'irc'"):
        hs.settle(timeout=0.05)


def test_a_thousand_messages_to_a_service_that_was_down_arrive_once_and_in_order(start, recorder):
    r = recorder(503)
    hs = start(registration(url=r.url))
    alice, bob = hs.client("alice"), acting(hs, "irc", "@_irc_bob:localhost")
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    eventually(lambda: hs.delivery.worker("irc").failures)
    for i in range(1000):
        alice.say(room, f"n{i}")
    r.answers(200)
    eventually(lambda: hs.advance(1) or not hs.waiting(), 10)
    sizes = [len(json.loads(body)["events"]) for body in dict(r.transactions).values()]
    assert r.texts() == [f"n{i}" for i in range(1000)] and len(sizes) <= 13 and max(sizes) == 100


def test_wait_for_gives_the_first_event_past_or_to_come_with_these_values(hs, alice, bob, room):
    first, _ = alice.say(room, "x"), alice.say(room, "x")
    assert hs.wait_for(type="m.room.message", body="x")["event_id"] == first
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(hs.wait_for, type="m.room.member", state_key=bob.user_id, membership="join")
        bob.join(room)
        assert waiting.result()["sender"] == bob.user_id


def test_wait_for_that_waits_in_vain_prints_the_nearest_events_and_where_they_went(start, recorder):
    hs = start(registration(url=recorder().url))
    with pytest.raises(AssertionError, match="no events at all"):
        hs.wait_for(0.01, type="m.x")
    alice = hs.client("alice")
    event_id = alice.say(alice.create_room(), "hello")
    with pytest.raises(AssertionError) as caught:
        hs.wait_for(0.01, type="m.room.message", sender=alice.user_id, body="good bye")
    lines = str(caught.value).splitlines()
    assert "body='good bye'" in lines[0] and event_id in lines[1] and "body is 'hello'" in lines[1] and "did not go to irc: no rule says yes" in lines[2]


def test_wait_for_says_which_key_no_event_has(hs, room):
    with pytest.raises(AssertionError, match="no event at all has 'typ'"):
        hs.wait_for(0.01, typ="m.room.message")


def test_a_seeded_homeserver_is_the_same_in_every_run(start):
    def run(seed):
        hs = start(registration(), seed=seed)
        alice, bob = hs.client("alice"), acting(hs, "irc", "@_irc_bob:localhost")
        room = alice.create_room(preset="public_chat", room_version="12")
        first = alice.create_room(preset="public_chat")
        bob.join(first)
        hs.advance(2.5)
        alice.say(first, "hello"), alice.set_state(first, "m.room.topic", {"topic": "x"})
        answer = json.dumps([alice.token, room, first, alice.sync()])
        hs.reset()
        return answer, json.dumps([(one := hs.client("alice")).token, one.create_room()])
    one, two, other = run(7), run(7), run(8)
    assert one == two and one[0] != other[0] and '"age": 2500' in one[0]
    assert json.loads(one[1])[0] != json.loads(one[0])[0]    # a reset is another world, for a service that remembers events


def test_a_reset_is_a_new_world_behind_the_same_port(start, recorder, tmp_path):
    r = recorder()
    hs = start(registration(url=r.url))
    url, bob = hs.url, acting(hs, "irc", "@_irc_bob:localhost")
    room = bob.create_room(room_alias_name="_irc_x")
    hs.settle()
    hs.advance(100)
    before = r.transactions[-1][0]
    hs.reset()
    assert hs.url == url and hs.clock.wound == 0 and not hs.explain(room)["exists"] and not hs.explain("@_irc_bob:localhost")["exists"]
    bob = acting(hs, "irc", "@_irc_bob:localhost")
    bob.create_room(room_alias_name="_irc_x")
    hs.settle()
    assert int(r.transactions[-1][0]) > int(before)
    with pytest.raises(ValueError, match="would delete"):
        start(database=str(tmp_path / "hs.db")).reset()


def test_after_a_reset_a_sample_is_the_same_with_all_that_its_registration_says_of_it(start):
    hs = start({**asbridge.SAMPLE_REGISTRATION, "url": "http://127.0.0.1:0", "asbridge.sample": {"irc_port": 0, "prefix": "_irc_x_", "irc_bind": "localhost"}})
    before = [(bridge.prefix, bridge.irc.address[0], bridge.irc_port) for bridge in hs.samples]
    hs.reset()
    assert [(bridge.prefix, bridge.irc.address[0], bridge.irc_port) for bridge in hs.samples] == before and before[0][:2] == ("_irc_x_", "localhost")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="not to be told here")
def test_a_program_that_embeds_it_keeps_its_processors(start):
    before = os.sched_getaffinity(0)
    start(one_cpu=True)
    assert os.sched_getaffinity(0) == before


# -- The homeserver in one piece: how it starts and ends.

def test_a_registration_that_is_wrong_is_refused_when_embedded():
    with pytest.raises(asbridge.ConfigError, match="as_token"):
        asbridge.Homeserver([registration(), registration()])


@pytest.mark.parametrize("changes", [{"hs_token": "schl\u00fcssel\u20ac"}, {"as_token": "a\nb"}, {"asbridge.sample": {"irc_port": 70000}}])
def test_a_registration_that_could_not_work_is_refused_at_the_start(changes):
    with pytest.raises(asbridge.ConfigError):
        asbridge.read_registration({**registration(), **changes}, "here")


def test_an_embedded_homeserver_checks_its_keys_like_a_configuration():
    with pytest.raises(asbridge.ConfigError, match="'server_name'"):
        asbridge.Homeserver(server_nam="x")


def open_files():
    """Of this process: how many of each."""
    return collections.Counter(os.readlink(f"/proc/self/fd/{n}").partition(":[")[0] for n in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{n}"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are looked up in /proc")
@pytest.mark.parametrize("fails", ["port", "IRC port", "database", "disk", "thread of http", "thread of the writer"])
def test_a_start_that_fails_half_way_leaves_no_thread_no_open_file_and_can_be_tried_again(tmp_path, monkeypatch, fails):
    (tmp_path / "text").write_text("dear diary " * 100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {fails: taken.getsockname()[1]}
        before, files = {*threading.enumerate()}, open_files()
        with monkeypatch.context() as patch:
            if fails.startswith("thread"):
                no_threads_named(patch, fails.split()[-1])
            if fails == "disk":
                patch.setattr(asbridge.World, "add_senders", unittest.mock.Mock(side_effect=MatrixError("M_UNKNOWN", "full")))
            hs = asbridge.Homeserver([sample(port.get("IRC port", 0))], port=port.get("port", 0), database=str(tmp_path / "text") if fails == "database" else ":memory:")
            with pytest.raises((OSError, asbridge.DatabaseError, MatrixError, RuntimeError)):
                hs.start()
        eventually(lambda: {*threading.enumerate()} <= before)
        eventually(lambda: open_files() <= files)            # fewer, where what a test before had open is gone meanwhile
        assert os.listdir(tmp_path / "tmp") == []
        hs.stop()                                            # is no error
    if fails != "database":
        hs.start().stop()


def test_a_homeserver_that_was_stopped_starts_again(tmp_path):
    hs = asbridge.Homeserver(database=str(tmp_path / "hs.db"))
    for _ in range(2):
        hs.start()
        assert ask(hs, "GET", "/_matrix/client/versions")[0] == 200
        hs.stop()
    hs.stop()


DAMAGES = {
    "no server name": "DELETE FROM meta", "no position": "DELETE FROM meta WHERE key = 'position'", "position": "UPDATE meta SET value = 'x' WHERE key = 'position'",
    "server name": "UPDATE meta SET value = CAST(x'c4' AS TEXT) WHERE key = 'server_name'",
    "schema": "PRAGMA writable_schema = 1; UPDATE sqlite_master SET name = CAST(x'c4' AS TEXT) WHERE name = 'sessions'",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_refused_in_words(tmp_path, capsys, damage):
    path, config = str(tmp_path / "a.db"), tmp_path / "c.json"
    asbridge.Store(path, "localhost", asbridge.Registrations("localhost"), asbridge.Clock()).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(DAMAGES[damage])
    with pytest.raises(asbridge.DatabaseError, match="is damaged|can't be used"):
        asbridge.Homeserver(database=path, samples=False).start()
    config.write_text(json.dumps({"database": "a.db"}))
    assert asbridge.main(["explain", "@alice:localhost", "--config", str(config)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", [None, "UPDATE irc_nicks SET nick = NULL", "UPDATE irc_nicks SET nick = x'ff'"])
def test_a_damaged_database_of_a_bridge_alone_is_refused_in_words(tmp_path, capsys, damage):
    config, path = tmp_path / "c.json", tmp_path / "hs-irc.db"
    config.write_text(json.dumps({"database": "hs.db", "registrations": [sample()]}))
    path.write_bytes(b"no database" * 100 if damage is None else b"")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        if damage:
            db.executescript(asbridge.IrcBridge.SCHEMA + "INSERT INTO irc_nicks VALUES ('@a:b', 'a');" + damage)
    args = asbridge.parse_args(["--role", "appservice", "--homeserver", "http://127.0.0.1:1", "--config", str(config)])
    assert asbridge.run(asbridge.config_of(args), args, asbridge.bell()) == 1
    assert re.search(r"hs-irc\.db (is damaged|can't be used)", capsys.readouterr().err)


def test_a_database_in_a_folder_that_is_not_there_is_refused_with_its_name(tmp_path):
    with pytest.raises(asbridge.DatabaseError, match="nowhere"):
        asbridge.Homeserver(database=str(tmp_path / "nowhere" / "x.db")).start()


def test_registrations_are_read_again_while_it_runs(start, recorder, tmp_path):
    one, two, path = recorder(), recorder(), tmp_path / "r.json"
    path.write_text(json.dumps(registration("one", one.url, rooms=["!.*"])))
    hs = start(str(path))
    alice = hs.client("alice")
    room = alice.create_room()
    hs.settle()
    assert hs.reload() == []
    path.write_text(json.dumps(registration("two", two.url, rooms=["!.*"])))
    assert sorted(hs.reload()) == ["added 'two'", "removed 'one'"]
    before = len(one.events)
    alice.say(room, "for two")
    hs.settle()
    assert two.texts() == ["for two"] and len(one.events) == before
    with refused("M_UNKNOWN_TOKEN", 401):
        asbridge.Client(hs.url, "as-one").whoami()
    assert asbridge.Client(hs.url, "as-two").whoami()["user_id"] == "@_two_bot:localhost"


def test_a_registration_that_is_wrong_changes_nothing_when_it_is_read_again(start, recorder, tmp_path):
    r, path = recorder(), tmp_path / "r.json"
    path.write_text(json.dumps(registration(url=r.url)))
    hs = start(str(path))
    path.write_text("{}")
    with pytest.raises(asbridge.ConfigError):
        hs.reload()
    assert asbridge.Client(hs.url, "as-irc").whoami()["user_id"] == "@_irc_bot:localhost"


def test_what_waits_for_a_service_goes_to_its_new_address_after_reading_again(start, recorder, tmp_path):
    r, path = recorder(), tmp_path / "r.json"
    path.write_text(json.dumps(registration(url=nowhere(), rooms=["!.*"])))
    hs = start(str(path))
    alice = hs.client("alice")
    alice.say(alice.create_room(), "kept")
    path.write_text(json.dumps(registration(url=r.url, rooms=["!.*"])))
    assert hs.reload() == ["changed 'irc'"]
    hs.settle()
    assert r.texts() == ["kept"]


def test_to_stop_while_a_service_has_an_event_in_hand_is_no_failure(start, recorder, caplog):
    r, busy = recorder(), threading.Event()
    hs = start(registration(url=r.url, rooms=["!.*"]))

    def answer(request, body):
        busy.set()
        eventually(lambda: hs.world.stopping)
        return 503, {"errcode": "M_UNKNOWN", "error": "the application service stops"}
    r.answer = answer
    hs.client("alice").create_room()
    assert busy.wait(5)
    worker = hs.delivery.worker("irc")
    stopping = hs.delivery.stop
    hs.delivery.stop = lambda: (eventually(lambda: worker.failures), stopping())
    hs.stop()
    assert worker.failures == 1 and not [record for record in caplog.records if record.levelno >= logging.WARNING]


# -- The command line.

@pytest.mark.parametrize("flags", [["--port", "99999"], ["--server-name", "a b"]])
def test_a_wrong_flag_is_named(flags, capsys):
    assert asbridge.main(flags) == 2
    assert "command line" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--port", "x"], ["--role", "x"], ["--colour"], ["frobnicate"], ["generate"]])
def test_a_wrong_command_line_ends_with_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        asbridge.main(flags)
    assert caught.value.code == 2 and capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["--prot", "8080"], ["--prot=8080"], ["-v", "--prot", "1", "explain", "@x:localhost"]])
def test_an_unknown_option_is_named_with_the_nearest_one(arguments, capsys):
    with pytest.raises(SystemExit):
        asbridge.main(arguments)
    assert f"there is no option {next(one for one in arguments if 'prot' in one)}; the nearest one is --port" in capsys.readouterr().err


def test_flags_override_the_file(tmp_path):
    (tmp_path / "c.json").write_text('{"server_name": "a", "port": 1, "bind": "0.0.0.0", "database": "x.db", "room_version": "12"}')
    config = asbridge.config_of(asbridge.parse_args(["--config", str(tmp_path / "c.json"), "--server-name", "b", "--port", "0", "--bind", "127.0.0.1", "--database", ":memory:"]))
    assert (config.server_name, config.port, config.bind, config.database, config.room_version) == ("b", 0, "127.0.0.1", ":memory:", "12")


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        asbridge.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"asbridge {asbridge.__version__}\n"


# -- The commands that answer a question and end: generate, routes, explain.

@pytest.mark.parametrize("arguments", [["my", "--url", "localhost:29300"], ["my", "--url", "http://"]])
def test_generate_refuses_a_url_that_cannot_be_called(capsys, arguments):
    assert asbridge.main(["generate", *arguments]) == 2
    assert "--url: is" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["@x_", "MyBridge_", "my bridge_"])
def test_the_bot_of_a_generated_registration_lies_in_its_namespace(prefix):
    made = asbridge.read_registration(asbridge.generate_registration("my", "http://127.0.0.1:1", prefix), "generated")
    assert made.namespaces["users"][0].pattern.match(made.sender("localhost"))


@pytest.mark.parametrize("server", ["[::1]:8448", "matrix.example.org:8448", "localhost"])
def test_a_generated_registration_claims_users_of_the_server(server):
    one = read_registration(asbridge.generate_registration("my", "http://127.0.0.1:1", None, server))[0]
    assert asbridge.Registrations(server, [one]).claim_of(one, "users", f"@my_x:{server}")


def test_generate_prints_a_registration_with_fresh_tokens(capsys):
    made = []
    for _ in range(2):
        assert asbridge.main(["generate", "my", "--url", "http://127.0.0.1:1234", "--prefix", "my+"]) == 0
        made.append(json.loads(capsys.readouterr().out))
    hs_registration = asbridge.read_registration(made[0], "generated")
    assert hs_registration.id == "my" and hs_registration.url == "http://127.0.0.1:1234" and made[0]["as_token"] != made[1]["as_token"]
    assert hs_registration.namespaces["users"][0].pattern.match("@my+bob:localhost") and not hs_registration.namespaces["users"][0].pattern.match("@myyy:localhost")
    assert hs_registration.namespaces["aliases"][0].exclusive and made[0]["as_token"] != made[0]["hs_token"]


def test_routes_prints_the_table(capsys):
    assert asbridge.main(["routes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(asbridge.ROUTES) + len(asbridge.ADMIN_ROUTES) and any(re.match(r"GET +/_matrix/client/v3/sync +user +Syncing", line) for line in lines)


def test_explain_says_why_nobody_may_create_what_two_claim_exclusively_or_what_is_no_name_for_people(tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"registrations": [registration(), registration("news", users=["@_i.*"], aliases=[])]}))
    for id, why in (("@_irc_bob:localhost", "nobody, for irc and news claim it exclusively"), ("@Bob:localhost", asbridge.NOBODY_MAY)):
        assert asbridge.main(["explain", id, "--config", str(file)]) == 0
        assert f"who may create it: {why}" in capsys.readouterr().out.splitlines()


def test_explain_without_a_configuration_says_whose_registration_it_goes_by(capsys):
    assert asbridge.main(["explain", "@_irc_bob:localhost"]) == 0
    assert "(by the registration of the sample; --config FILE asks yours)" in capsys.readouterr().err


def test_explain_of_the_command_line_reads_registrations_and_database_and_changes_neither(tmp_path, capsys):
    database, file = tmp_path / "hs.db", tmp_path / "x.json"
    file.write_text(json.dumps({"registrations": [registration()], "database": "hs.db"}))
    command = ["explain", "@_irc_bob:localhost", "--config", str(file)]
    assert asbridge.main(command) == 0 and not database.exists()
    assert capsys.readouterr().out.splitlines() == ["irc: @_irc_bob:localhost matches users[0], exclusively", "it belongs to irc", "who may create it: irc"]
    with asbridge.Homeserver([registration()], database=str(database)) as hs:
        acting(hs, "irc", "@_irc_bob:localhost")
        assert asbridge.main(command) == 0 and "it exists" in capsys.readouterr().out    # beside the one that runs
    before = database.read_bytes()
    assert asbridge.main([*command, "--json"]) == 0 and json.loads(capsys.readouterr().out)["exists"] is True and database.read_bytes() == before
    assert asbridge.main(["explain", "bob", "--config", str(file)]) == 2 and "is no user ID" in capsys.readouterr().err
    file.write_text("{")
    assert asbridge.main(command) == 2
    database.write_bytes(b"nonsense" * 1000)
    file.write_text(json.dumps({"registrations": [registration()], "database": "hs.db"}))
    assert asbridge.main(command) == 2


# -- The commands that answer a question and end: check, and the examiner.

def checked(tmp_path, capsys, config, *flags):
    """Exit code and stdout of `check` for this configuration."""
    (tmp_path / "c.json").write_text(config if isinstance(config, str) else json.dumps(config))
    code = asbridge.main([*flags, "check", "--config", str(tmp_path / "c.json")])
    out, err = capsys.readouterr()
    assert err == "" and os.listdir(tmp_path) == ["c.json"], "it changes nothing"
    return code, out.replace(str(tmp_path) + os.sep, "")


def test_check_says_of_each_finding_where_what_why_and_what_to_write_and_counts_them(tmp_path, capsys):
    data = {"server_name": "example.org", "registrations": [registration_for(["_irc_.*", "@irc_.*:example.org"], url="http://h:1", as_token="secret")]}
    assert checked(tmp_path, capsys, data) == (1, """\
warning: c.json: registrations[0]: as_token: looks like an example
    why:   whoever guesses it can act as every user of this application service, or feed it with events
    write: a long random text, as `python asbridge.py generate` makes it
error: c.json: registrations[0]: namespaces.users[0].regex: '_irc_.*' matches no user ID
    why:   it is matched from the start of the whole ID, which begins with '@' and ends with the server's name
    write: '@_irc_.*'
warning: c.json: registrations[0]: namespaces.users[1].regex: '@irc_.*:example.org' has a '.' where a plain one seems to be meant
    why:   it stands for any character
    write: '@irc_.*:example\\.org'
1 error, 2 warnings
""")


def test_check_ends_with_0_where_nothing_is_wrong_and_with_warnings_alone(tmp_path, capsys):
    assert checked(tmp_path, capsys, registration_for(["@irc_.*:localhost"])) == (0, "nothing to complain of\n")
    code, out = checked(tmp_path, capsys, registration_for(["@irc_.*"]))
    assert code == 0 and out.startswith("warning: c.json: namespaces.users[0].regex: ") and out.endswith("\n1 warning\n")


def test_check_says_of_a_configuration_that_cannot_be_used_all_that_can_be_said(tmp_path, capsys):
    broken = {**registration_for(["_irc_.*", "("], id="b"), "hs_token": 5}
    code, out = checked(tmp_path, capsys, {"prot": 1, "registrations": [broken, registration_for(["x"]), "none.yaml"]})
    assert code == 1 and out.endswith("\n6 errors\n")
    for part in ("c.json: prot: is not a key of the configuration\n    the nearest one is 'port'", "registrations[0]: hs_token: is no text", "registrations[0]: namespaces.users[1].regex: '(' is not a regex",
                 "registrations[0]: namespaces.users[0].regex: '_irc_.*' matches no user ID", "registrations[1]: namespaces.users[0].regex: 'x' matches no user ID", "none.yaml: can't be read"):
        assert f"error: {part}" in out or f"error: c.json: {part}" in out, part


@pytest.mark.parametrize("text", ["{", "[]", "id: [", ""])
def test_check_of_what_is_no_configuration_is_an_error(tmp_path, capsys, text):
    code, out = checked(tmp_path, capsys, text)
    assert code == 1 and out.startswith("error: c.json: ") and out.endswith("\n1 error\n")


def test_check_prints_json(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(registration_for(["_irc_.*"])))
    assert asbridge.main(["check", "--json", "--config", str(tmp_path / "c.json")]) == 1
    finding, = json.loads(capsys.readouterr().out)
    assert list(finding) == ["level", "where", "what", "why", "right"] and finding["level"] == "error" and finding["right"] == "write '@_irc_.*'"


def test_what_is_wrong_is_said_in_lines_of_their_own_whatever_it_is(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"registrations": ["a\x1b[2J", "b\0", "c\nd"], "\x07": 1}))
    for arguments in ([], ["check"]):
        assert asbridge.main([*arguments, "--config", str(tmp_path / "c.json")]) > 0
        told = "".join(capsys.readouterr())
        assert all(line.isprintable() for line in told.splitlines()) and "a\\x1b[2J" in told and "c\\nd" in told


def test_python_does_not_wonder_about_a_regex_on_stderr(tmp_path, recwarn):
    (tmp_path / "c.json").write_text(json.dumps(registration_for(["@irc_[[a].*"])))
    asbridge.main(["check", "--config", str(tmp_path / "c.json")])
    assert not recwarn.list


def test_check_without_a_configuration_is_of_the_sample_whose_tokens_are_examples(capsys):
    assert asbridge.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "warning: built in: registrations[0]: as_token: looks like an example" in out and "hs_token" in out and out.endswith("\n3 warnings\n") and "change-me" not in out


def test_check_knows_the_server_that_the_registrations_are_for(tmp_path, capsys):
    data = registration_for(["@irc_.*:example\\.org"])
    assert checked(tmp_path, capsys, data)[0] == 1 and checked(tmp_path, capsys, data, "--server-name", "example.org")[0] == 0
    assert asbridge.main(["check", "--config", str(tmp_path / "c.json"), "--server-name", "example.org"]) == 0


def test_check_knows_the_own_port(tmp_path, capsys):
    data = registration_for(["@irc_.*:localhost"], url="http://localhost:8008")
    assert checked(tmp_path, capsys, data)[0] == 1 and checked(tmp_path, capsys, data, "--port", "8448")[0] == 0
    assert checked(tmp_path, capsys, {"port": 8448, "registrations": [data]})[0] == 0


@pytest.mark.parametrize("flags", [["--server-name", "a b", "check"], ["check", "--server-name", ""]])
def test_check_with_a_wrong_flag_ends_with_2(flags, capsys):
    assert asbridge.main(flags) == 2
    assert "command line: server_name" in capsys.readouterr().err


def checking(*arguments):
    """Exit code of check; the log of this process stays as it was."""
    log = asbridge.log
    handlers, propagate, level, traced = log.handlers[:], log.propagate, log.level, asbridge.trace.level
    try:
        return asbridge.main(["check", *arguments])
    finally:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
        asbridge.trace.setLevel(traced)


def examining(tmp_path, capsys, *flags, **keys):
    """Exit code, stdout and stderr of check --examine with this configuration, on a free port unless it has one."""
    (tmp_path / "c.json").write_text(json.dumps({"port": 0, **keys}))
    code = checking("--config", str(tmp_path / "c.json"), "--examine", *flags)
    return code, *capsys.readouterr()


def test_the_sample_passes_every_check_of_the_examiner(capsys, monkeypatch):
    monkeypatch.setattr(asbridge, "SAMPLE_REGISTRATION", sample())
    assert checking("--port", "0", "--examine") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["appservice", "test", "outcome", "spec", "seen"] and lines[-1] == "19 passed, 0 failed, 0 skipped" and err == ""
    assert {line.index("passed") for line in lines[1:-1]} == {lines[0].index("outcome")}


def test_examine_ends_with_1_if_something_failed_and_prints_json_if_told(tmp_path, capsys, recorder):
    good, bad = recorder(), recorder()
    good.answer, bad.answer = answering(), answering("breaks")
    first = registration(url=good.url, as_token="other")
    assert examining(tmp_path, capsys, registrations=[first])[0] == 0
    code, out, _ = examining(tmp_path, capsys, "--json", registrations=[first, {**registration(url=bad.url), "id": "two"}])
    rows = json.loads(out)
    assert code == 1 and len(rows) == 2 * len(asbridge.Examiner.CHECKS) and "hs-irc" not in out
    assert [row for row in rows if row["outcome"] == "failed"] == [
        {"appservice": "two", "test": "refuses broken JSON, and is not broken by it", "outcome": "failed", "spec": "Standard error response",
         "seen": '500 "Traceback"; right would be 400 M_NOT_JSON'}]


def test_an_application_service_finds_its_homeserver_while_it_is_examined(tmp_path, capsys, recorder):
    service, told, port = recorder(), [], closed_port()

    def answer(request, body):
        if request.path.endswith("/ping"):
            client = asbridge.Client(f"http://127.0.0.1:{port}", "as-irc")
            told.append((client.user_id, client.call("POST", V3 + "/register", {"type": "m.login.application_service", "username": "_irc_x"})["user_id"]))
            client.close()
        return answering()(request, body)
    service.answer = answer
    code, out, _ = examining(tmp_path, capsys, port=port, registrations=[registration(url=service.url)])
    assert code == 0 and told == [("@_irc_bot:localhost", "@_irc_x:localhost")]


def test_examine_says_what_to_do_where_the_port_of_the_homeserver_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = examining(tmp_path, capsys, port=taken.getsockname()[1], registrations=[registration(url="http://127.0.0.1:1")])
    assert code == 1 and out == "" and "stop it for that moment" in err and "Traceback" not in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = examining(tmp_path, capsys, registrations=[sample(taken.getsockname()[1])])
    assert code == 1 and out == "" and "asbridge.sample.irc_port" in err and "stop it" not in err


def test_an_examination_can_be_interrupted(tmp_path, capsys, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt
    monkeypatch.setattr(asbridge.Examiner, "results", interrupt)
    assert examining(tmp_path, capsys, registrations=[registration()]) == (130, "", "")


def test_examine_waits_for_one_that_is_about_to_start_and_leaves_a_sample_that_runs_alone(tmp_path, capsys, recorder):
    url = nowhere()
    code, out, err = examining(tmp_path, capsys, registrations=[registration(url=url)], query_timeout_ms=50)
    assert code == 1 and f"nothing listens yet at {url}; start irc now" in err and "1 failed, 18 skipped" in out
    service = recorder(answering())
    code, out, err = examining(tmp_path, capsys, registrations=[registration(url=service.url, **{"asbridge.sample": {"irc_port": 1}})])
    assert code == 0 and err == "" and service.transactions


# -- The log.

def test_the_log_may_be_json(program):
    err = program({"database": ":memory:", "registrations": [registration()]}, "--log-format", "json", "-v").end()[2]
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines and all({"ts", "level", "message"} <= line.keys() for line in lines)


def test_a_quiet_program_says_nothing_while_all_is_well(program):
    assert program({"database": ":memory:", "registrations": [registration(url=nowhere())]}, "-q").end() == (0, "", "")


@pytest.mark.parametrize("format, coloured", [("text", False), ("text", True), ("json", False)])
def test_the_trace_is_lines_in_colour_on_a_terminal_or_json(format, coloured):
    record = logging.makeLogRecord({"name": "asbridge.trace", "msg": "HS ---> irc", "created": 1.5, "exchange": {"arrow": "--->", "back": False, "status": None, "n": 7}})
    if format == "json":
        assert json.loads(asbridge.JsonLines().format(record))["n"] == 7
        return
    line = asbridge.Lines(coloured).format(record)
    assert line.startswith("\x1b[36m") == coloured and line.endswith("\x1b[0m" if coloured else "HS ---> irc")
    record.exchange = {"arrow": "<---", "back": True, "status": 403}
    assert asbridge.Lines(coloured).format(record).startswith("\x1b[31m") == coloured
    del record.exchange
    assert "\x1b" not in asbridge.Lines(coloured).format(record)


def test_at_the_start_the_log_says_of_each_service_what_waits_for_it(program):
    config = {"registrations": [registration(url=nowhere(), rooms=["!.*"])]}
    running = program(config)
    person(running).create_room()
    running.end()
    err = program(config).end()[2]
    line = next(line for line in err.splitlines() if "application service irc at" in line)
    assert "does not answer" in line and re.search(r"\bevents that wait: [1-9]", line) and "@_irc_.*" in line


def test_of_a_service_without_a_url_the_log_says_so(start, caplog):
    caplog.set_level(logging.INFO, "asbridge")
    asbridge.describe(start(registration()))
    assert "application service irc without a url (nothing is sent): " in caplog.text and "None" not in caplog.text
    assert asbridge.IrcBridge(bridge_registration(url=None), "http://127.0.0.1:1").url == ""


def test_at_the_start_the_log_warns_of_a_namespace_that_can_never_match_and_of_nothing_else_that_the_doctor_finds(start, caplog):
    asbridge.describe(start(registration(users=["_irc_.*", "@_irc_.*", "@.*_irc"], aliases=["#irc:other"])))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "application service irc: namespaces.users[0].regex: '_irc_.*' matches no user ID; write '@_irc_.*'",
        "application service irc: namespaces.aliases[0].regex: '#irc:other' matches no alias of localhost; "
        "write '#irc:localhost', or give the other name as server_name (--server-name)"]


def test_at_the_start_and_when_registrations_are_read_again_the_log_warns_of_a_regex_that_can_be_slow_or_can_not_be_analysed(start, caplog, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(registration(users=["@_irc_.*_.*_.*:x"], aliases=["#(?=_irc).*"], uris={"users": [{"regex": "x:(.*),(.*)", "user_id": "@_irc_x:{server_name}"}]})))
    hs = start(str(tmp_path / "r.json"), server_name="x")
    told = ["namespaces.users[0].regex: '@_irc_.*_.*_.*:x' can be slow: it can match a text in 16,777,216 ways", "namespaces.aliases[0].regex: '#(?=_irc).*' can't be analysed, for it has a look-around",
            "uris.users: 'x:(.*),(.*)' can be slow: it can match a text in 4,198,401 ways"]
    for say in (lambda: asbridge.describe(hs), lambda: asbridge.reload(hs)):
        caplog.clear(), say()
        assert [record.getMessage().split("; ")[0] for record in caplog.records if record.levelname == "WARNING"] == [f"application service irc: {one}" for one in told]
        (tmp_path / "r.json").write_text((tmp_path / "r.json").read_text().replace("as-irc", "as-other"))
    caplog.clear(), asbridge.reload(hs)                      # nothing new, nothing said
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# -- The program: starts, says that it is ready, and ends on a signal.

def test_the_program_announces_itself_in_one_line_and_ends_with_0_on_sigterm(program, tmp_path):
    running = program({"registrations": [registration()]}, "--port-file", str(tmp_path / "port"), path=(PROGRAM,))
    assert re.fullmatch(r"asbridge ready at http://127\.0\.0\.1:[0-9]+\n", running.ready)
    assert running.url.endswith(":" + (tmp_path / "port").read_text().strip()) and ask(running, "GET", "/_matrix/client/versions")[0] == 200
    code, out, err = running.end()
    assert (code, out) == (0, "") and "irc" in err and "as-irc" not in err and "hs-irc" not in err and (tmp_path / "asbridge.db").exists()


def test_the_program_ends_with_0_on_sigint(program):
    assert program({"database": ":memory:"}).end(signal.SIGINT)[0] == 0


def test_two_signals_that_come_together_are_one(program):
    running = program({"database": ":memory:"})
    running.process.send_signal(signal.SIGINT)
    assert running.end(signal.SIGTERM)[0] == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_sighup_reads_the_registrations_again(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(registration()))
    (tmp_path / "x.json").write_text(json.dumps({"port": 0, "registrations": ["r.json"]}))
    with subprocess.Popen([sys.executable, os.path.join(HERE, "asbridge.py"), "--config", "x.json"], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            (tmp_path / "r.json").write_text(json.dumps(registration("other")))
            process.send_signal(signal.SIGHUP)
            line = next(line for line in process.stderr if "read again" in line)
            assert "added 'other'" in line and "removed 'irc'" in line
        finally:
            process.terminate()
        assert process.wait(10) == 0


def test_the_program_suggests_the_inspector_and_three_things_that_can_be_pasted(program):
    running = program({"registrations": [sample()], "database": ":memory:"})
    code, out, err = running.end()
    tries = [line.partition("try: ")[2] for line in err.splitlines() if "try: " in line]
    assert code == 0 and out == "" and [line.split()[0] for line in tries] == ["open", "irssi", "(printf", "curl"] and running.url in tries[3]
    body = re.search(r"-d '(.*)'", tries[3])[1]
    assert json.loads(body)["auth"] == {"type": "m.login.dummy"}


def test_a_port_that_is_taken_is_named_with_the_way_out(program):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        code, out, err = program({"database": ":memory:"}, port=str(taken.getsockname()[1])).end()
    assert code == 1 and out == "" and "--port 0" in err and str(taken) not in err and "Traceback" not in err


def test_a_second_process_on_the_same_database_is_refused(program):
    first = program({})
    code, out, err = program({}).end()
    assert code == 1 and out == "" and "in use" in err and "Traceback" not in err and ask(first, "GET", "/_matrix/client/versions")[0] == 200


def test_a_database_of_another_server_name_is_refused(program):
    program({}).end()
    code, _, err = program({}, "--server-name", "other.org").end()
    assert code == 1 and "'localhost'" in err and "Traceback" not in err


def test_in_the_role_of_a_homeserver_no_sample_runs(program):
    err = program({"registrations": [sample()], "database": ":memory:"}, "--role", "homeserver").end()[2]
    assert "try: irssi" not in err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="not to be told here")
@pytest.mark.parametrize("one_cpu", [True, False])
def test_the_program_keeps_to_one_processor_unless_told_otherwise(program, one_cpu):
    running = program({} if one_cpu else {"one_cpu": False})
    allowed, threads = set(), os.listdir(f"/proc/{running.process.pid}/task")
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):        # it may have ended meanwhile
            allowed.add(frozenset(os.sched_getaffinity(int(thread))))
    assert len(threads) > 2 and len(allowed) == 1 and {len(one) for one in allowed} == {1 if one_cpu else len(os.sched_getaffinity(0))}


def test_a_message_that_was_answered_survives_a_kill_while_others_are_being_sent(program):
    running = program({})
    alice = person(running)
    room = alice.create_room()
    answered = []

    def write():
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                answered.append(alice.say(room, "x"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write)
        eventually(lambda: len(answered) > 50)
        running.process.kill()
        running.process.wait()
    again = asbridge.Client(program({}).url, alice.token)
    history = [event["event_id"] for event in again.messages(room, "f", 1000)["chunk"] if event["type"] == "m.room.message"]
    assert history[:len(answered)] == answered and len(history) <= len(answered) + 1


# -- The README, the example, and the file itself.

def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def python_of_the_readme(start, old="http://127.0.0.1:29300", new=None):
    """What the README's Python block that has this in it defines, fixtures as context managers, when `new` stands for `old` in it."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme(), re.S) if start in block)
    assert old in code
    names = {}
    with unittest.mock.patch.dict(sys.modules, pytest=unittest.mock.Mock(fixture=contextlib.contextmanager)):
        exec(compile(code.replace(old, new or f"http://127.0.0.1:{closed_port()}"), "README.md", "exec"), names)
    return names


def test_the_bridge_in_the_readme_has_the_bug_that_its_test_shows_and_the_cure_cures_it():
    lesson = python_of_the_readme("class Greeter")
    with lesson["hs"]() as hs, pytest.raises(AssertionError, match="attempt 1: it answered, but the answer was lost"):
        lesson["test_it_greets_once_even_if_it_dies_before_its_answer_arrives"](hs)
    cured = python_of_the_readme("class Greeter", '"hello yourself")\n\n@', '"hello yourself", txn_id=event["event_id"])\n\n@')
    with cured["hs"]() as hs:
        cured["test_it_greets_once_even_if_it_dies_before_its_answer_arrives"](hs)


def test_the_bridge_of_ten_lines_in_the_readme_passes_what_is_said_both_ways(tmp_path, monkeypatch, capsys):
    made = asbridge.generate_registration("tty", f"http://127.0.0.1:{closed_port()}")
    (tmp_path / "tty.json").write_text(json.dumps(made))
    monkeypatch.chdir(tmp_path)
    with asbridge.Homeserver(registrations=["tty.json"]) as hs:
        def typed():
            alice = hs.client("alice")
            room = alice.join("#tty_room:localhost")
            yield "hello from the terminal\n"
            hs.wait_for(sender="@tty_you:localhost", body="hello from the terminal")
            alice.say(room, "hello back")
            hs.settle()
        monkeypatch.setattr(sys, "stdin", typed())
        python_of_the_readme("class Terminal", "http://127.0.0.1:8008", hs.url)["bridge"].stop()
    assert capsys.readouterr().out.endswith("@tty_you:localhost m.room.message hello from the terminal\n"
                                            "@alice:localhost m.room.message hello back\n")


def test_the_readme_says_in_which_section_a_thing_stands_and_links_to_headings_that_are_there():
    with open(asbridge.__file__, encoding="utf-8") as file:
        source = file.read()
    sections = [source[:at.start()].count("\n") for at in re.finditer(r"(?m)^# [0-9]+\. ", source)]
    tops = ast.parse(source).body
    named = [node for node in tops if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    lines = {node.name: node.lineno for node in named} | {
        f"{node.name}.{inner.name}": inner.lineno for node in named for inner in node.body if isinstance(inner, ast.FunctionDef)} | {
        node.target.id: node.lineno for node in tops if isinstance(node, ast.AnnAssign)}
    told = [(name, int(number)) for number, names in re.findall(r"section\s([0-9]+),((?:\s`[\w.]+`,?)+)", readme())
            for name in re.findall(r"`([\w.]+)`", names)]
    assert len(told) > 15 and told == [(name, sum(start < lines.get(name, 0) for start in sections)) for name, _ in told]
    headings = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"(?m)^##+ (.*)$", readme())]
    links = re.findall(r"\]\(#([^)]*)\)", readme())
    assert len(links) > 20 and not set(links) - set(headings)


def test_the_readme_names_every_route_of_the_inspector_and_every_verb_for_tests():
    text = readme()
    api = text[text.index("## The inspector's API"):text.index("## Promises")]
    assert not [route.path for route in asbridge.ADMIN_ROUTES[1:] if not re.search(rf"\b{route.path.removeprefix('/_asbridge/')}\b", api)]
    assert not [fault for fault in asbridge.FAULTS if f"`{fault}`" not in api]
    verbs = [name for name, verb in vars(asbridge.Homeserver).items() if callable(verb) and name[0] != "_" and name not in ("start", "stop")]
    assert len(verbs) > 12 and not [name for name in verbs if not re.search(rf"\b{name}\b", text)]


def test_the_example_registration_is_the_one_that_is_built_in():
    with open(os.path.join(HERE, "example_registration.json"), encoding="utf-8") as file:
        assert json.load(file) == asbridge.SAMPLE_REGISTRATION


def sections():
    """Number, title and first line of each section, and the lines of the file."""
    with open(PROGRAM, encoding="utf-8") as file:
        lines = file.read().splitlines()
    rule = "# " + "=" * 76
    return [(int(match[1]), match[2], index + 1) for index, line in enumerate(lines)
            if (match := re.fullmatch(r"# ([0-9]+)\. (.+)", line)) and lines[index - 1] == lines[index + 1] == rule], lines


def test_no_section_refers_to_one_below_it():
    found, lines = sections()
    tree = ast.parse("\n".join(lines))

    def section_of(node):
        return max((number for number, _, first in found if first <= node.lineno), default=0)
    home = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            home[node.name] = section_of(node)
        for target in node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []:
            home.update({name.id: section_of(node) for name in ast.walk(target) if isinstance(name, ast.Name)})
    down = []
    for top in tree.body:
        own = {node.arg for node in ast.walk(top) if isinstance(node, ast.arg)} | {
            node.id for node in ast.walk(top) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
        down += [f"{node.id} in line {node.lineno}" for node in ast.walk(top) if isinstance(node, ast.Name)
                 and isinstance(node.ctx, ast.Load) and node.id not in own and home.get(node.id, 0) > section_of(node)]
    assert len(home) > 200 and down == []


def test_what_the_front_page_sends_its_readers_to_is_there():
    paths, _, places = asbridge.__doc__.partition("The test stands")[0].partition("Reading paths\n")[2].partition("To add ...")
    with open(asbridge.__file__, encoding="utf-8") as file:
        parts = re.findall(r"(?m)^ *# -- (.*)", file.read())
    named = re.findall(r'"([^"]+)"', " ".join(paths.split()))
    assert len(named) >= 6 and not [name for name in named if not any(part.startswith(name) for part in parts)]
    for place in re.findall(r"[A-Z]\w+\.\w+|[A-Z_]{5,}", places) + re.findall(r"\b[A-Z]\w+\.\w+\b", asbridge.__doc__):
        functools.reduce(getattr, place.split("."), asbridge)


def test_the_contents_in_the_docstring_are_the_banners():
    banners = [(number, title) for number, title, _ in sections()[0]]
    contents = [(int(number), title) for number, title in re.findall(r"^ *([0-9]+)\. +(.+?)(?:  .*)?$", asbridge.__doc__, re.M)]
    assert [number for number, _ in banners] == sorted({number for number, _ in banners}) and contents == banners


# -- The tests themselves. This one is the last, for it looks back at all.

def test_every_row_of_the_table_has_answered_some_test(request, answered):
    run = {item.name.partition("[")[0] for item in request.session.items}
    if not {name for name in globals() if name.startswith("test_")} <= run:
        pytest.skip("only some of the tests are run")
    assert not [f"{route.method} {route.path}" for route in asbridge.ROUTES + asbridge.ADMIN_ROUTES if (route.method, route.path) not in answered]
