"""Chat with a checkpoint in the terminal. Answers are streamed; thoughts have a bar at their left and are dim.

  python -m experiments.chat --checkpoint=runs/tiny/sft/latest --thinking
  python -m experiments.chat --checkpoint=hf:DIR --thinking --tools=python

A line that ends in a backslash goes on in the next one. Ctrl-C stops the answer, Ctrl-D quits, /help lists the
commands. With --tools=python the model may run Python in the sandbox. It gets the results until it answers without a
call. --mesh=data:1,expert:8 shares the model among several devices.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from experiments.generate import MOST_TOKENS, TEMPERATURE, TOP_P
from nemocascade.data.chat_parse import Delta, Turn
from nemocascade.data.tool_format import ToolCall
from nemocascade.errors import UserError, unknown
from nemocascade.fields import flag, text, whole, word
from nemocascade.mesh import make_mesh, mesh_sizes
from nemocascade.rollout.conversation import Conversation
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.voice import Kept
from nemocascade.runtime.launch import MESH, launch
from nemocascade.runtime.parts import from_checkpoint
from nemocascade.sandbox.python_tool import PythonTool
from nemocascade.sandbox.sandbox import Sandbox

TOOLS = ("none", "python")
MOST_ROUNDS = 100  # Answers to one question at most. All but the last call a tool.
HELP = """\
/think      think before answers from now on
/nothink    answer at once
/tools      the tools on offer; /tools python, /tools none
/reset      forget the conversation
/help       this
A line that ends in \\ goes on in the next one.
Ctrl-C stops an answer, Ctrl-D leaves."""
THOUGHT = "\u2502 "  # A bar down the left side of thoughts.
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run(
  checkpoint: str, thinking: bool, temperature: float, top_p: float, max_new_tokens: int,
  context: int, seed: int, system: str, tools: str, mesh: str = "data:1",
) -> None:  # fmt: skip
  tool = Tools()
  offered = tool.offer(tools)
  programs, tokenizer, params = from_checkpoint(checkpoint, make_mesh(**mesh_sizes(mesh)))
  if tokenizer is None:
    raise UserError(f"--checkpoint={checkpoint!r}: has no tokenizer, so it cannot be talked to")
  options, weights = Options(temperature, top_p=top_p), programs.sampling_weights(params)
  voice = Kept(programs.engine(context - 1, context), weights, options, seed=seed)
  conversation = Conversation(
    voice, tokenizer, max_new_tokens=max_new_tokens, thinking=thinking, system=system or None, tools=offered
  )
  # If a script starts this command in the background, SIGINT is ignored, and Python keeps that setting.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  Terminal(conversation, tool).talk()


class Tools:
  """The tools that the model may call."""

  def __init__(self):
    self.name = "none"
    self._python: PythonTool | None = None

  def offer(self, name: str) -> list[dict]:
    """Selects the tools "none" or "python", and returns their schemas.

    Raises:
      UserError: the name is unknown, or this machine has no way to confine programs.
    """
    if name not in TOOLS:
      raise unknown("tool", name, TOOLS)
    if name == "python" and self._python is None:
      self._python = PythonTool(Sandbox(workers=1))
    self.name = name
    return [self._python.schema] if name == "python" else []

  def call(self, call: ToolCall, stopped: Callable[[], bool]) -> str:
    return self._python.call(call.name, call.arguments, stopped=stopped)

  def reset(self) -> None:
    if self._python is not None:
      self._python.reset()


class Terminal:
  """Reads the user's lines and prints the conversation."""

  def __init__(self, conversation: Conversation, tools: Tools):
    self.conversation, self.tools = conversation, tools
    self._dimmed = False
    self._in_thoughts = False
    self._complained = False  # Whether a format error of this answer was printed.
    self._asked = False

  def talk(self) -> None:
    """Reads and answers lines until Ctrl-D."""
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401  Gives `input` its line editing.
    print(f"{self._state()}; /help for help")
    while True:
      try:
        line = read()
      except EOFError:
        print()
        return
      except KeyboardInterrupt:
        print("\nCtrl-D leaves")
        continue
      try:
        if line.startswith("/"):
          self._command(*line[1:].split())
        elif line:
          self._answer(line)
      except UserError as error:
        print(f"error: {error}; /reset begins anew")
      except KeyboardInterrupt:
        print()

  def _command(self, name: str = "help", *words: str) -> None:
    commands = {
      "think": self._think, "nothink": self._nothink, "tools": self._tools,
      "reset": self._reset, "help": self._help,
    }  # fmt: skip
    if name not in commands:
      print(unknown("command", f"/{name}", [f"/{command}" for command in commands]))
    elif words and name != "tools":
      print(f"/{name} stands alone")
    else:
      commands[name](*words)

  def _think(self) -> None:
    self.conversation.thinking = True
    print(self._state())

  def _nothink(self) -> None:
    self.conversation.thinking = False
    print(self._state())

  def _tools(self, *words: str) -> None:
    if words:
      try:
        self.conversation.offer(self.tools.offer(words[0]))
      except UserError as error:
        print(error)
        return
    print(self._state())
    for schema in self.conversation.tools:
      function = schema["function"]
      parameters = ", ".join(function["parameters"]["properties"])
      print(f"  {function['name']}({parameters}): {function['description']}")

  def _reset(self) -> None:
    self.conversation.reset()
    self.tools.reset()
    print("the conversation is forgotten")

  def _help(self) -> None:
    print(HELP)

  def _state(self) -> str:
    mode = "thinking" if self.conversation.thinking else "not thinking"
    return f"{mode}, tools: {self.tools.name}"

  def _answer(self, text: str) -> None:
    """Answers one question, with as many rounds of tool calls as needed, at most MOST_ROUNDS."""
    with interruptible() as stopped:
      if not self._asked:
        self._asked = True
        self._write("(the first answer waits for its programs to compile)\n", dim=True)
      self.conversation.ask(text)
      for _ in range(MOST_ROUNDS):
        for delta in self.conversation.answer(stopped):
          self._show(delta)
        turn = self.conversation.turn
        self._end(turn, stopped())
        results = self._results(turn, stopped)
        if not results or stopped():
          return
        self.conversation.respond(results)
      print(f"(stopped after {MOST_ROUNDS} rounds)")

  def _results(self, turn: Turn, stopped: Callable[[], bool]) -> list[str]:
    """The responses to an answer's tool calls, malformed ones included; empty if there are none."""
    if self.tools.name == "none" or not turn.finished:
      return []
    results = []
    for call in turn.tool_calls:
      results.append(self.tools.call(call, stopped))
      self._write(f"< {results[-1]}\n", dim=True)
    if turn.error is not None and turn.error.kind in ("tool_call", "after_call"):
      results.append(turn.error.as_response())
      self._write(f"< {results[-1]}\n", dim=True)
    return results

  def _show(self, delta: Delta) -> None:
    if delta.reasoning:
      # Each line of thoughts has a mark, because terminals and copied text may not show what is dim.
      begin = "" if self._in_thoughts else THOUGHT
      self._write(begin + delta.reasoning.replace("\n", f"\n{THOUGHT}"), dim=True)
      self._in_thoughts = True
    if delta.content and self._in_thoughts:
      self._write("\n", dim=True)
      self._in_thoughts = False
    self._write(delta.content)
    if delta.tool_call is not None:
      arguments = "\n".join(delta.tool_call.arguments.values())
      self._write(f"\n> {delta.tool_call.name}\n{arguments}", dim=True)
    if delta.error is not None and not self._complained:
      self._complained = True
      self._write(f"\n[{delta.error.message}]\n", dim=True)

  def _end(self, turn: Turn, stopped: bool) -> None:
    self._in_thoughts = self._complained = False
    if not turn.finished:
      self._write(" [stopped]" if stopped else " [cut off: no more tokens]", dim=True)
    self._write("\n")

  def _write(self, text: str, *, dim: bool = False) -> None:
    if not text:
      return
    if sys.stdout.isatty() and dim != self._dimmed:
      sys.stdout.write(DIM if dim else PLAIN)
    self._dimmed = dim
    sys.stdout.write(shown(text))
    sys.stdout.flush()


def read() -> str:
  """Returns what the user types, without white space around it. A line that ends in a backslash goes on in the next."""
  lines = [input("> ")]
  while lines[-1].endswith("\\"):
    lines[-1] = lines[-1][:-1].rstrip()
    lines.append(input("... "))
  return "\n".join(lines).strip()


def shown(text: str) -> str:
  """The text with control characters made visible, so that a model cannot control the terminal."""
  return "".join(map(_shown, text))


def _shown(character: str) -> str:
  code = ord(character)
  if character in "\n\t" or 0x20 <= code < 0x7F or code >= 0xA0:
    return character
  return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
  """Inside the context, Ctrl-C does not raise: it makes the yielded function return True.

  An exception could lose the decode state.
  """
  pressed: list[int] = []
  before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
  try:
    yield lambda: bool(pressed)
  finally:
    signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
  launch(
    run,
    config=False,
    checkpoint=(text("STAGE/checkpoints/STEP, STAGE/latest, a converted checkpoint, or hf:DIR."), ""),
    thinking=(flag("Whether the assistant thinks before it answers."), False),
    temperature=(TEMPERATURE, 1.0),
    top_p=(TOP_P, 0.95),
    max_new_tokens=(whole("Tokens of an answer at most.", high=MOST_TOKENS), 1024),
    context=(whole("Tokens of the conversation at most.", 2, high=MOST_TOKENS), 4096),
    seed=(whole("Seed of the sampling.", 0), 0),
    system=(text("The system turn; empty is the family's own."), ""),
    tools=(word("What the model may call: none or python.", TOOLS), "none"),
    mesh=(MESH, "data:1"),
  )
