"""Tests of the service: readers in several threads are answered together, and one that leaves frees its place."""

import http.client
import itertools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import ENGINE, T, spell
from test_engine import table, toy_engine
from test_scheduler import REQUESTS, assert_same, expected
from tiny_checkpoint import TOKENIZER

from experiments import serve
from nemocascade.data.tokenizer import IM_END
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.rollout.conversation import Conversation
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.scheduler import Request, Scheduler
from nemocascade.rollout.service import Service
from nemocascade.rollout.voice import Served

pytestmark = pytest.mark.usefixtures("compiled_fast")
END = 400  # Where the model ends every answer.
SCRIPT = np.array((spell("the cat sat on the mat and thinks of 12 ") * T)[:END] + [IM_END] * (T - END), np.int32)


@pytest.fixture(scope="module")
def service():
  with Service(Scheduler(ENGINE, SCRIPT, slots=2)) as service:
    yield service


def request(length, most=T - END):
  return Request([5] * length, most, options=Options(0.0))


def until(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_readers_in_several_threads_get_their_own_tokens(service):
  lengths, got = (300, 340, 380, 395), {}
  read = lambda n: got.update({n: [t for piece in service.stream(request(n)) for t in piece]})  # noqa: E731
  threads = [threading.Thread(target=read, args=(n,)) for n in lengths]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert got == {n: SCRIPT[n : END + 1].tolist() for n in lengths}
  with pytest.raises(UserError, match="the prompt has 0 tokens"):
    service.stream(Request([]))


def test_a_stream_that_is_closed_frees_its_slot_or_its_place_in_the_queue(service):
  streams = [service.stream(request(1)) for _ in range(6)]  # More than slots and prompts that wait.
  until(lambda: any([next(stream) for stream in streams]))
  for stream in streams:
    stream.close()
  until(lambda: not service.scheduler.open)
  assert [t for piece in service.stream(request(END - 3)) for t in piece] == SCRIPT[END - 3 : END + 1].tolist()


def test_a_reader_that_leaves_ends_its_request(monkeypatch):
  begun, gone, steps = [], threading.Event(), itertools.count()
  with Service(Scheduler(ENGINE, SCRIPT[:1].repeat(T), slots=2)) as service:
    step = service.scheduler.step
    # After a while the answer does not go on before the reader has left.
    monkeypatch.setattr(service.scheduler, "step", lambda: (next(steps) < 9 or gone.wait(60)) and step())

    def make():
      begun.append(Conversation(Served(service, Options(0.0)), TOKENIZER, max_new_tokens=900))
      return begun[0]

    serving = serve.server("127.0.0.1", 0, serve.Chats(make), "")
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=60)
    body = json.dumps({"chat": "a", "text": "go", "thinking": False})
    connection.request("POST", "/answer", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert b"compile" in reply.readline() and b"said" in reply.readline()
    reply.close()
    connection.close()
    gone.set()
    until(lambda: begun[0].turn is not None and not service.scheduler.open)
    serving.shutdown()
    serving.server_close()
  assert not begun[0].turn.finished and len(begun[0].tokens) < 300


def test_what_ends_the_thread_is_raised_to_the_readers(monkeypatch):
  service = Service(Scheduler(ENGINE, SCRIPT, slots=2))
  monkeypatch.setattr(service.scheduler, "step", lambda: jnp.zeros(2) + jnp.zeros(3))
  service.check()
  chats = serve.Chats(lambda: Conversation(Served(service, Options(0.0)), TOKENIZER))
  *_, last = chats.answer("a", "go", False, bool)
  assert "answering requests has failed: " in last["note"] and last["note"].endswith("; begin anew")
  with pytest.raises(RuntimeError, match="answering requests has failed: "):
    list(service.stream(request(9)))
  with pytest.raises(RuntimeError, match="answering requests has failed: "):
    service.check()  # Ends the server.
  service.close()


def test_logits_that_are_not_finite_are_said_to_the_reader():
  with Service(Scheduler(toy_engine(), table() * jnp.nan, slots=2)) as service:
    with pytest.raises(UserError, match="the model's logits are not finite"):
      list(service.stream(REQUESTS[0]))


def test_the_devices_of_a_mesh_decode_the_same_requests():
  s = Scheduler(toy_engine(mesh=make_mesh(2, 2, of=jax.devices()[:4])), table(), slots=2, look=3)
  numbers = [s.submit(request) for request in REQUESTS]
  s.run()
  for number, answer in zip(numbers, expected(), strict=True):
    assert_same(s.answer(number), answer)
