"""Chat with a checkpoint in a browser. Answers are streamed, thoughts are set apart.

  python -m experiments.serve --checkpoint=runs/tiny/sft/latest
  python -m experiments.serve --checkpoint=hf:DIR --port=9000

Then open http://127.0.0.1:8000. Several pages are answered at a time. Only this machine reaches them. --host=0.0.0.0
opens them to whoever reaches this machine; there is no password. The model can call no tools here; experiments.chat has
them.
"""

import collections
import http.server
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema

from experiments.generate import MOST_TOKENS, TEMPERATURE, TOP_P
from nemocascade.data.chat_parse import Delta
from nemocascade.errors import UserError
from nemocascade.fields import text, whole
from nemocascade.mesh import make_mesh, mesh_sizes
from nemocascade.rollout.conversation import Conversation
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.scheduler import Scheduler
from nemocascade.rollout.service import Service
from nemocascade.rollout.voice import Served
from nemocascade.runtime.launch import MESH, launch
from nemocascade.runtime.parts import from_checkpoint

PAGE = Path(__file__).with_suffix(".html")
LOCAL = ("127.0.0.1", "localhost")
KEPT = 32  # Conversations that are remembered: those of the pages used last.
SLOTS = 8  # Answers that are decoded at a time; others wait.
LONGEST = 1 << 20  # Bytes of a request at most.
REQUEST = {  # JSON schema of a request.
  "type": "object",
  "required": ["chat"],
  "properties": {
    "chat": {"type": "string", "maxLength": 100},
    "text": {"type": "string"},
    "thinking": {"type": "boolean"},
  },
}


class Chats:
  """The conversations of open pages, each under the name that its page gave it. Each gives one answer at a time."""

  def __init__(self, make: Callable[[], Conversation]):
    """
    Args:
      make: begins a conversation.
    """
    self._make, self._lock = make, threading.Lock()  # The lock guards the next two.
    self._of: collections.OrderedDict[str, tuple[Conversation, threading.Lock]] = collections.OrderedDict()
    self._asked = False  # Whether a page has asked something.

  def answer(self, chat: str, text: str, thinking: bool, stopped: Callable[[], bool]) -> Iterator[dict[str, str]]:
    """Yields the parts of the answer: {"thought"}, {"said"}, {"note"}, what the reader should know besides,
    or {"wait"}, the same until the next part.

    Args:
      stopped: asked every few tokens; the answer ends when it returns true.
    """
    with self._lock:
      conversation, own = self._of[chat] = self._of.pop(chat, None) or (self._make(), threading.Lock())
      while len(self._of) > KEPT:
        self._of.popitem(last=False)
      first, self._asked = not self._asked, True
    if first:
      yield {"wait": "the first answer waits for its programs to compile"}
    with own:
      conversation.thinking = thinking
      try:
        conversation.ask(text)
      except UserError as error:
        yield {"note": f"{error}; begin anew"}
        return
      try:
        yield from map(_part, conversation.answer(stopped))
      except (UserError, RuntimeError) as error:
        self.forget(chat)  # Its last message has no answer.
        yield {"note": f"{error}; begin anew"}
        return
      assert conversation.turn is not None
      if not conversation.turn.finished:
        yield {"note": "stopped" if stopped() else "cut off: no more tokens"}

  def forget(self, chat: str) -> None:
    with self._lock:
      self._of.pop(chat, None)


def _part(delta: Delta) -> dict[str, str]:
  """What a page is told of a piece of an answer."""
  if delta.tool_call is not None:
    return {"note": f"calls {delta.tool_call.name}, which is not on offer here"}
  if delta.error is not None:
    return {"note": delta.error.message}
  return {"thought": delta.reasoning} if delta.reasoning else {"said": delta.content}


def _closed(connection: socket.socket) -> bool:
  """Whether the other side, which has nothing more to send, has closed the connection."""
  try:
    ready, _, _ = select.select([connection], [], [], 0)
    return bool(ready) and not connection.recv(1, socket.MSG_PEEK)
  except OSError:
    return True


def server(host: str, port: int, chats: Chats, about: str) -> http.server.ThreadingHTTPServer:
  """The server, bound to its port. `about` is the headline of the page."""
  page = PAGE.read_text().replace("ABOUT", json.dumps(about).replace("<", "\\u003c"), 1).encode()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      if self.path != "/":
        return self.send_error(404)
      self._head("text/html; charset=utf-8")
      self.wfile.write(page)

    def do_POST(self):
      # Pages of other sites can send neither this type nor this host, so they cannot ask in a reader's name.
      if self.headers.get("Content-Type") != "application/json":
        return self.send_error(415)
      if host in LOCAL and (self.headers.get("Host") or "").partition(":")[0] not in LOCAL:
        return self.send_error(403)
      if (asked := self._request()) is None:
        return self.send_error(400)
      self._head("application/x-ndjson")
      if self.path == "/forget":
        chats.forget(asked["chat"])
      elif self.path == "/answer" and asked.get("text"):
        self._stream(asked)

    def _request(self) -> dict[str, Any] | None:
      try:
        length = int(self.headers.get("Content-Length", ""))
        asked = json.loads(self.rfile.read(length)) if 0 < length <= LONGEST else None
        jsonschema.validate(asked, REQUEST)
      except (ValueError, RecursionError, jsonschema.ValidationError):
        return None
      return asked

    def _stream(self, asked: dict[str, Any]) -> None:
      gone: list[bool] = []  # Whether the reader has left, or pressed stop.
      left = lambda: bool(gone) or _closed(self.connection)  # noqa: E731
      for part in chats.answer(asked["chat"], asked["text"], asked.get("thinking", False), left):
        try:
          self.wfile.write(json.dumps(part).encode() + b"\n")
          self.wfile.flush()
        except OSError:
          gone.append(True)  # The conversation ends its turn by itself; its state stays whole.

    def _head(self, kind: str) -> None:
      self.send_response(200)
      self.send_header("Content-Type", kind)
      self.send_header("Cache-Control", "no-store")
      self.end_headers()

    def log_message(self, *_) -> None:
      pass

  try:
    return http.server.ThreadingHTTPServer((host, port), Handler)
  except OSError as error:
    raise UserError(f"--host={host} --port={port}: {error.strerror or error}; give another port") from error


def run(
  checkpoint: str, host: str, port: int, temperature: float, top_p: float, max_new_tokens: int, context: int,
  seed: int, mesh: str = "data:1",
) -> None:  # fmt: skip
  programs, tokenizer, params = from_checkpoint(checkpoint, make_mesh(**mesh_sizes(mesh)))
  if tokenizer is None:
    raise UserError(f"--checkpoint={checkpoint!r}: has no tokenizer, so it cannot be talked to")
  weights, options = programs.sampling_weights(params), Options(temperature, top_p=top_p)
  scheduler = Scheduler(programs.engine(context - 1, context), weights, slots=SLOTS)
  with Service(scheduler) as service:
    make = lambda: Conversation(Served(service, options, seed=seed), tokenizer, max_new_tokens=max_new_tokens)
    _serve(host, port, Chats(make), checkpoint, service)


def _serve(host: str, port: int, chats: Chats, about: str, service: Service) -> None:
  with server(host, port, chats, about) as serving:
    serving.service_actions = service.check  # type: ignore[method-assign]  # Called twice a second; ends the server.
    print(f"http://{host}:{serving.server_port} (Ctrl-C ends it)", flush=True)
    try:
      serving.serve_forever()
    except KeyboardInterrupt:
      print()


if __name__ == "__main__":
  launch(
    run,
    config=False,
    checkpoint=(text("STAGE/checkpoints/STEP, STAGE/latest, a converted checkpoint, or hf:DIR."), ""),
    host=(text("The address to listen at; 0.0.0.0 is all of this machine's.", empty=False), "127.0.0.1"),
    port=(whole("The port to listen at; 0 takes a free one.", 0, high=65535), 8000),
    temperature=(TEMPERATURE, 1.0),
    top_p=(TOP_P, 0.95),
    max_new_tokens=(whole("Tokens of an answer at most.", high=MOST_TOKENS), 1024),
    context=(whole("Tokens of a conversation at most.", 2, high=MOST_TOKENS), 4096),
    seed=(whole("Seed of the sampling.", 0), 0),
    mesh=(MESH, "data:1"),
  )
