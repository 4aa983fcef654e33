"""What the README promises of strangers, as tests that take too long for the quick ones.

    python -m pytest -q .ci/test_hostile.py

What is random follows a seed, as in test_durability.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import pytest
import test_durability
from test_durability import PROGRAM, V3, Irc, Sender, check_all, eventually, linux, person, pushed, registration, waiting

import asbridge

program, recorder, rng, say = test_durability.program, test_durability.recorder, test_durability.rng, test_durability.say

# ============================================================================
# HTTP: a hundred thousand requests that should not be
# ============================================================================


# ============================================================================
# Rules of rooms: a long walk beside a model
# ============================================================================


# ============================================================================
# Application services that misbehave
# ============================================================================


# ============================================================================
# IRC clients that misbehave
# ============================================================================


# ============================================================================
# Many at once
# ============================================================================


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
