"""Tests of the terminal: input is executed, output is streamed, and Ctrl-C stops only the current answer."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_checkpoint
from in_process import run_command
from refusals import assert_refused
from scripted import Scripted, spell

from experiments import chat
from nemocascade.data.tokenizer import IM_END, THINK_END, TOOL_CALL, TOOL_CALL_END
from nemocascade.errors import UserError

ROOT = Path(__file__).parent.parent
WAIT_S = 300  # Upper bound for a busy machine; a working program is faster.


class Program:
  """`experiments.chat` on a pseudo-terminal."""

  def __init__(self, *flags: str):
    self.ours, self.theirs = pty.openpty()
    # A session leader that opens a terminal makes it its controlling terminal, so that Ctrl-C sends a signal.
    script = 'exec "$@" <"$0" >"$0" 2>&1'
    words = [sys.executable, "-m", "experiments.chat", *flags]
    self.process = subprocess.Popen(
      ["sh", "-c", script, os.ttyname(self.theirs), *words], cwd=ROOT, start_new_session=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "dumb"},
    )  # fmt: skip
    self.seen = ""

  def type(self, text: str) -> None:
    os.write(self.ours, text.encode())

  def until(self, pattern: str, *, again: str = "") -> str:
    """Reads until the pattern appears; returns the text before it and the match.

    `again` is typed once a second, because readline ignores keys between printing a prompt and reading.
    """
    deadline = time.monotonic() + WAIT_S
    while not (found := re.search(pattern, self.seen)):
      ready, _, _ = select.select([self.ours], [], [], 1.0)
      if ready:
        self.seen += os.read(self.ours, 1 << 16).decode("utf-8", "replace")
      else:
        self.type(again)
      gone = not ready and self.process.poll() is not None
      assert not gone and time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
    before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
    return before

  def close(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      self.process.kill()
    self.process.wait()
    for fd in (self.ours, self.theirs):
      os.close(fd)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.make(tmp_path_factory.mktemp("stage"), endless=True)


def test_a_conversation_at_a_pseudo_terminal(checkpoint):
  program = Program(f"--checkpoint={checkpoint}", "--temperature=0", "--max_new_tokens=3000")
  try:
    program.until(r"not thinking, tools: none; /help for help\r\n> ")

    program.type("the cat\n")  # Output appears long before all 3000 tokens are sampled ...
    program.until(r"compile\)\r\n(\x1b\[0m)?[^\r\x1b]")
    program.type("\x03")  # ... and Ctrl-C stops the answer.
    program.until(r"\[stopped\].*\r\n.*> ")
    assert program.process.poll() is None

    program.type("/nonsense\n")
    program.until(r"unknown command '/nonsense'.*\r\n> ")
    program.type("/help\n")
    assert "/nothink" in program.until(r"Ctrl-D leaves\.\r\n> ")
    program.type("/think\n")
    program.until(r"\r\nthinking, tools: none\r\n> ")
    program.type("on\n")
    dimmed = program.until(r"on\r\n\x1b\[2m\u2502 [^\x1b]")  # Thoughts are dim, with a bar at their left.
    assert "compile" not in dimmed
    program.type("\x03")
    program.until(r"\[stopped\].*\r\n.*> ")
    program.type("/nothink\n")
    program.until(r"\r\nnot thinking, tools: none\r\n> ")

    program.type("/reset\n")
    program.until(r"the conversation is forgotten\r\n> ")
    program.type("the cat\n")
    program.until(r"the cat\r\n(\x1b\[0m)?[^\r\x1b]")
    program.type("\x03")
    program.until(r"\[stopped\].*\r\n.*> ")

    program.type("\x03")  # At the prompt Ctrl-C stops nothing.
    program.until(r"Ctrl-D leaves\r\n> ", again="\x03")
    program.type("\x04")
    assert program.process.wait(WAIT_S) == 0
  finally:
    program.close()


@pytest.mark.parametrize(
  "flags, complaint",
  [
    (["--tools=pyhton"], "unknown --tools 'pyhton': did you mean 'python'?"),
    (["--context=1"], "--context=1"),
    (["--top_p=2"], "--top_p=2.0"),
    ([], "--checkpoint=''"),
  ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(flags, complaint):
  assert_refused(run_command("chat", *flags), complaint)


# The same program in this process, with a scripted model.


@pytest.fixture
def typed(monkeypatch, capsys):
  """Function that runs a terminal on the given lines and returns the output."""

  def run(lines, *answers, **settings):
    conversation, tools = Scripted(**settings), chat.Tools()
    conversation.to_say = [spell(*answer) for answer in answers]
    line = iter(lines)

    def read(prompt):
      try:
        return next(line)
      except StopIteration:
        raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat.Terminal(conversation, tools).talk()
    tools.reset()
    return conversation, capsys.readouterr().out

  return run


def call(code):
  written = f"\n<function=stateful_python_code_exec>\n<parameter=code>\n{code}\n</parameter>\n</function>\n"
  return [TOOL_CALL, written, TOOL_CALL_END, "\n", IM_END]


def test_python_runs_and_its_results_go_back_until_the_model_answers(typed):
  conversation, shown = typed(
    ["/tools python", "what is 6 * 7?", "/tools"],
    ["I think.\n", THINK_END, "\n", *call("x = 6")],
    ["More.\n", THINK_END, "\n", *call("x * 7")],
    ["So.\n", THINK_END, "\nIt is 42.", IM_END],
    thinking=True,
  )
  results = [m["content"] for m in conversation.messages if m["role"] == "tool"]
  assert results == ["", "42"]
  assert conversation.messages[-1]["content"] == "It is 42." and conversation.voice.prefills == 1
  assert "> stateful_python_code_exec\nx * 7\n< 42\n" in shown and "\n\u2502 So.\nIt is 42." in shown
  assert "stateful_python_code_exec(code): Runs Python code" in shown


def test_a_question_of_several_lines_is_typed_with_backslashes(typed):
  conversation, _ = typed(["Which is a bird? \\", "(A) owl\\", "(B) tin", "/help"], ["It is A.", IM_END])
  asked = [m["content"] for m in conversation.messages if m["role"] == "user"]
  assert asked == ["Which is a bird?\n(A) owl\n(B) tin"]


def test_a_question_that_ends_in_the_middle_is_not_asked(typed):
  conversation, _ = typed(["Which is a bird?\\"])
  assert not [m for m in conversation.messages if m["role"] == "user"]


def test_a_malformed_call_is_told_to_the_model(typed):
  conversation, shown = typed(
    ["/tools python", "go"],
    [TOOL_CALL, "print(1)", TOOL_CALL_END, IM_END],
    ["Sorry.", IM_END],
    thinking=False,
  )
  assert '"type": "tool_call"' in conversation.messages[2]["content"]
  assert "[a tool call is not <function=NAME> ... </function>]" in shown and "Sorry." in shown


def test_without_tools_a_call_is_only_shown(typed):
  conversation, shown = typed(["go"], call("1"), thinking=False)
  assert "> stateful_python_code_exec\n1" in shown
  assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_a_conversation_that_is_full_says_so_and_goes_on_after_a_reset(typed):
  conversation, shown = typed(["9" * 2000, "/reset", "go"], ["the mat", IM_END], thinking=False)
  assert "there is room for 1024; /reset begins anew" in shown
  assert shown.endswith("the mat\n\n") and len(conversation.messages) == 2


def test_commands_take_no_odd_words(typed):
  _, shown = typed(["/reset now", "/", "/tools ruby", "/tools none"], thinking=False)
  assert "/reset stands alone" in shown and "Ctrl-C stops an answer" in shown
  assert "unknown tool 'ruby'" in shown and shown.count("tools: none") == 2


def test_what_a_model_writes_does_not_steer_the_terminal():
  assert chat.shown("a\x1b[2J\r\x07\x7f\x9b\n\té") == "a␛[2J␍␇␡\ufffd\n\té"


def test_a_tool_that_there_is_not_is_refused_and_none_needs_no_sandbox():
  with pytest.raises(UserError, match="unknown tool 'bash'"):
    chat.Tools().offer("bash")
  assert chat.Tools().offer("none") == []
