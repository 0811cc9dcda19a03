"""Tests of graders with a time limit: a hang is killed, answers are never mixed up, no state is kept."""

import concurrent.futures
import functools
import os
import subprocess

import graders
import pytest

from nemocascade.domains import domain
from nemocascade.sandbox import confinement, limited
from nemocascade.verifiers.verdict import Completion, Verdict


def cause(function, *arguments, **limits):
  with pytest.raises(limited.NoAnswer) as caught:
    limited.call(function, *arguments, **limits)
  return caught.value.cause


@pytest.mark.parametrize("value", [None, True, 1.5, "\ud800 é\n{}", [1, {"a": [None]}]])
def test_values_go_to_the_grader_and_back_and_it_is_prepared_once(value):
  assert limited.call(graders.echo, value) == [value, 1]


@pytest.mark.parametrize(
  "function, arguments, expected",
  [
    (graders.spin, (), "time"),
    (graders.wait, (60,), "time"),
    (graders.die, (0,), "crash"),
    (graders.die, (1,), "crash"),
    (graders.hoard, (), "memory"),
    (graders.fail, ("no such shape",), "error"),
    (graders.unserializable, (), "error"),
  ],
)
def test_a_grader_that_gives_up_says_why_and_the_next_question_is_answered(function, arguments, expected):
  limited.call(graders.echo, 0)  # Starts the process first, so that the short limit applies to the grader alone.
  assert cause(function, *arguments, limit_s=0.5 if expected == "time" else 20) == expected
  assert limited.call(graders.echo, "next") == ["next", 1]


def test_a_late_answer_is_never_the_answer_to_a_later_question():
  limited.call(graders.echo, 0)
  for place in range(3):
    assert cause(graders.wait, 0.3, limit_s=0.1) == "time"
    assert limited.call(graders.echo, place) == [place, 1]


def test_answers_stay_with_their_questions_when_many_ask_at_once():
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: limited.call(graders.echo, i), range(200)))
  assert found == [[i, 1] for i in range(200)]


def test_a_domain_keeps_its_verdicts_in_order_while_all_processes_judge():
  def judge(row, completion):
    if row == 3:
      return limited.call(graders.fail, "odd")
    return Verdict(limited.call(graders.echo, row)[0], "echoed")

  verdicts = domain.one_by_one(judge)(list(range(40)), [Completion(())] * 40)
  assert [v.reward for v in verdicts] == [0.0 if i == 3 else i for i in range(40)]
  assert [i for i, v in enumerate(verdicts) if v.masked] == [3] and verdicts[3].cause == "error"


def test_what_a_grader_prints_is_not_an_answer():
  forged = '{"id": 1, "value": "forged"}\n' * 20
  assert limited.call(graders.shout, forged) == "own answer"
  assert limited.call(graders.echo, 1) == [1, 1]


def test_only_answers_are_remembered_by_a_cache(tmp_path):
  @functools.cache
  def grade(path):
    return limited.call(graders.read, path, limit_s=20)

  for _ in range(2):
    with pytest.raises(limited.NoAnswer):
      grade("/no/such/file")
  assert grade.cache_info().currsize == 0


def test_a_process_that_is_killed_from_outside_is_replaced():
  limited.call(graders.echo, 0)
  for worker in list(limited._running):
    worker.process.kill()
    worker.process.wait()
  assert limited.call(graders.echo, 1) == [1, 1]


def test_a_killed_grader_leaves_no_process(monkeypatch):
  stopped, stop = [], limited._Worker.stop
  monkeypatch.setattr(limited._Worker, "stop", lambda worker: (stop(worker), stopped.append(worker)))
  assert cause(graders.spin, limit_s=0.3) == "time"
  ended = stopped[-1]  # The last one; the list may also hold a process that an earlier test left.
  assert ended.process.poll() is not None and ended not in limited._running


@pytest.mark.parametrize("function", [graders.connect, graders.start_process])
def test_a_grader_reaches_no_network_and_starts_no_process(function):
  assert cause(function, limit_s=20) == "error"


@pytest.mark.skipif(not confinement.bubblewraps(), reason="no bubblewrap here")
def test_a_confined_grader_sees_no_files_but_code_and_can_change_none(tmp_path):
  secret = tmp_path / "secret"
  secret.write_text("x")
  assert cause(graders.read, str(secret)) == "error"
  assert cause(graders.read, "/etc/passwd") == "error"
  assert cause(graders.read, f"/proc/{os.getpid()}/environ") == "error"
  assert cause(graders.write, graders.__file__) == "error"
  assert limited.call(graders.pid) == 1  # It has its own process namespace.


def test_without_bubblewrap_the_limits_hold_too(monkeypatch):
  monkeypatch.setattr(limited, "_prefixes", lambda module: [["/no/such/bwrap"], []])
  worker = limited._start("graders")
  try:
    assert worker.ask("echo", [1], 20) == [1, 1]
    for name in ("connect", "start_process", "hoard"):
      with pytest.raises(limited.NoAnswer):
        worker.ask(name, [], 20)
  finally:
    worker.stop()


def test_a_module_that_cannot_be_imported_is_named(monkeypatch):
  with pytest.raises(limited.NoAnswer, match="no_such_grader"):
    limited._start("no_such_grader")


def test_a_function_that_no_other_process_could_find_is_refused():
  with pytest.raises(ValueError, match="top level"):
    limited.call(lambda: 1)


def test_the_processes_end_with_the_one_that_started_them():
  program = (
    "import graders; from nemocascade.sandbox import limited; limited.call(graders.echo, 1);"
    "(worker,) = limited._running; print(worker.process.pid)"
  )
  import sys

  path = os.pathsep.join([os.path.dirname(graders.__file__), limited._ROOT])
  done = subprocess.run(
    [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path},
    capture_output=True, text=True, timeout=120, check=True,
  )  # fmt: skip
  with pytest.raises(ProcessLookupError):
    os.kill(int(done.stdout), 0)
