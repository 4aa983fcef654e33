"""An application service that others have written, mautrix-python's, under faults and a clock."""

import asyncio
import socket
import threading

import pytest

import asbridge

appservice = pytest.importorskip("mautrix.appservice", reason="needs mautrix: python -m pip install mautrix")
with socket.create_server(("127.0.0.1", 0)) as probe:
    PORT = probe.getsockname()[1]                            # a free one


class Bot:
    """A mautrix-python appservice on a thread of its own. It joins where it is invited and answers every message."""

    def __init__(self, url, registration):
        self.heard, self.loop = [], asyncio.new_event_loop()
        self.az = appservice.AppService(url, "localhost", registration["as_token"], registration["hs_token"],
                                        registration["sender_localpart"], id=registration["id"], loop=self.loop)
        self.az.matrix_event_handler(self.on_event)
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(self.az.start("127.0.0.1", PORT))
        self.az.ready = True

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(5)

    async def on_event(self, event):
        if str(event.type) == "m.room.member" and event.state_key == self.az.bot_mxid and event.content.membership.value == "invite":
            await self.az.intent.join_room_by_id(event.room_id)
        elif str(event.type) == "m.room.message" and event.sender != self.az.bot_mxid:
            self.heard.append(event.content.body)
            await self.az.intent.send_text(event.room_id, f"you said: {event.content.body}")

    def stop(self):
        self.run(self.az.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)


# The test proper: these twenty lines are what somebody writes about a bridge of their own.

@pytest.fixture
def hs():
    with asbridge.Homeserver([asbridge.generate_registration("mau", f"http://127.0.0.1:{PORT}")]) as hs:
        yield hs


def test_mautrix_hears_a_message_once_whatever_happens_to_the_acknowledgement(hs):
    bot = Bot(hs.url, vars(hs.config.registrations[0]))
    alice = hs.client("alice")
    room = alice.create_room(invite=["@mau_bot:localhost"])
    hs.wait_for(type="m.room.member", sender="@mau_bot:localhost", membership="join")
    hs.settle()
    hs.faults("mau").lose_ack(times=2)                       # the bot gets it and answers 200, twice for nothing
    alice.say(room, "one")
    hs.wait_for(sender="@mau_bot:localhost", body="you said: one")
    while hs.waiting():
        hs.advance(60)                                       # a minute of backoff is over
    pushed = next(each for each in hs.transactions("mau") if any(one["content"].get("body") == "one" for one in each["events"]))
    assert [attempt["fault"] for attempt in pushed["attempts"]] == ["lose_ack", "lose_ack", None]
    assert bot.heard == ["one"]
    bot.stop()                                               # now it is down
    late = alice.say(room, "two")
    assert hs.why(late, "mau")["state"] == "in a transaction"
    bot = Bot(hs.url, vars(hs.config.registrations[0]))
    hs.advance(60)
    hs.wait_for(sender="@mau_bot:localhost", body="you said: two")
    hs.settle()
    assert bot.heard == ["two"]
    bot.stop()
