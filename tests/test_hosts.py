"""Tests of several processes without a model: what they exchange, who is missed, and how they end together."""

import os
import re
import signal
import socket
import time

import jax
import pytest
from linked import Processes

from nemocascade.errors import UserError
from nemocascade.runtime import hosts, meeting, same_start, termination
from nemocascade.runtime.hosts import ProcessesDiffer

HERE = socket.gethostname()
WAIT = """
say("there")
if index != 1:
  exchange(b"")
time.sleep(60)
"""


def test_every_process_gets_the_values_of_all_in_their_order():
  script = """
for n in range(3):
  body = bytes([index]) * (1000 * n * index)
  assert exchange(body, f"round {n}") == [bytes([i]) * (1000 * n * i) for i in range(3)]
say("done")
"""
  with Processes(script, 2, 1, 0) as run:
    assert [(run.end(i).code, run.end(i).out) for i in range(3)] == [(0, "done\n")] * 3


@pytest.mark.parametrize(
  "victim, kind, why",
  [
    (1, signal.SIGKILL, "is gone without a word"),
    (0, signal.SIGKILL, "is gone without a word"),
    (1, signal.SIGSTOP, "has not answered for 2 s"),
    (0, signal.SIGSTOP, "has not answered for 2 s"),
  ],
)
def test_a_process_that_dies_or_stops_ends_the_others_with_a_line_that_names_it(victim, kind, why):
  with Processes(WAIT, 0, 1, 2) as run:
    for i in range(3):
      run.wait_for(i, "there")
    run.signal(victim, kind)
    others = [run.end(i) for i in range(3) if i != victim]
    pid = run.pids[victim]
    for end in others:
      assert (end.code, end.out) == (69, "")
      assert end.err.startswith(f"stopped: process {victim} ({HERE}, pid {pid}) {why}")
      assert end.err.endswith("; the same command resumes\n") and end.err.count("\n") == 1
    if kind == signal.SIGSTOP:  # It learns of it when it goes on.
      run.signal(victim, signal.SIGCONT)
      assert run.end(victim).code == 69


def test_a_process_whose_main_thread_is_busy_is_alive():
  """A compilation or a save keeps the main thread for minutes; only the exchange's limit counts for it."""
  script = """
say("there")
time.sleep(4 if index == 1 else 0)  # Twice the silence after which a process counts as lost.
exchange(b"")
"""
  with Processes(script, 0, 1) as run:
    assert [run.end(i).code for i in range(2)] == [0, 0]


def test_a_process_that_does_not_come_to_an_exchange_is_named_with_it():
  script = """
if index != 2:
  exchange(b"", "verdicts", 0.5)
time.sleep(60)
"""
  with Processes(script, 0, 1, 2) as run:
    ends = [run.end(i) for i in range(3)]
  line = f"stopped: process 2 ({HERE}, pid {ends[2].pid}) did not come to the exchange of verdicts in 0.5 s (--wait_s)"
  assert [(end.code, end.err) for end in ends] == [(69, f"{line}; the same command resumes\n")] * 3


def test_processes_in_different_exchanges_are_named():
  with Processes('exchange(b"", "tokens" if index else "verdicts")', 0, 1) as run:
    ends = [run.end(i) for i in range(2)]
  for end in ends:
    assert end.code == 1 and "the processes went different ways" in end.err
    assert f"process 1 ({HERE}, pid {ends[1].pid}) is at 'tokens'" in end.err


def test_an_index_given_twice_is_named():
  with Processes("", 0, 1, 1, count=3) as run:
    ends = [run.end(i) for i in range(3)]
  assert [end.code for end in ends] == [2, 2, 2]
  assert "--distributed: index 1 is given twice, to pid" in ends[0].err and ends[0].err.count("\n") == 1
  assert [end.err for end in ends[1:]] == ["", ""]


def test_a_process_that_is_started_beside_a_whole_run_is_refused_and_the_run_goes_on():
  with Processes('say("there")\nexchange(b"")\ntime.sleep(2)', 0, 1) as run:
    run.wait_for(1, "there")
    run.start("", 1, 2)
    late = run.end(2)
    assert late.code == 2 and "index 1 is taken by pid" in late.err
    assert [run.end(i).code for i in range(2)] == [0, 0]


def test_different_numbers_of_processes_are_named():
  with Processes("", 0, count=2) as run:
    run.start("", 1, 3)
    ends = [run.end(i) for i in range(2)]
  assert [end.code for end in ends] == [2, 2]
  assert f"process 1 ({HERE}, pid {ends[1].pid}) says 3 processes, and process 0 says 2" in ends[0].err


@pytest.mark.parametrize("index", [2, 7, -1])
def test_an_index_that_cannot_be_is_named(index):
  with Processes("", 0, count=2) as run:
    run.start("", index, 2)
    ends = [run.end(i) for i in range(2)]
  assert [end.code for end in ends] == [2, 2] and ends[1].err == ""
  assert ends[0].err == f"error: --distributed: process {index} ({HERE}, pid {ends[1].pid}): INDEX is from 0 to 1\n"


@pytest.mark.parametrize(
  "place, said", [("1,0", ""), ("2,2", "from 0 to 1"), ("0,0", "PROCESSES"), ("2,-1", "from 0 to 1")]
)
def test_a_place_that_cannot_be_is_named_without_the_others_too(place, said):
  where = f"127.0.0.1:{Processes('').address.split(':')[1]},{place}"
  assert said in meeting.misplaced(meeting.parse(where, 1))
  if said:
    with pytest.raises(UserError, match=said):
      hosts.connect(where, connect_s=0.2)


def test_processes_that_never_come_are_named():
  with Processes("", 0, 2, count=4, connect_s=1) as run:
    ends = [run.end(i) for i in range(2)]
  assert [(end.code, end.err) for end in ends] == [
    (69, "error: 1 s passed without processes 1, 3 of 4 (--connect_s)\n"), (69, "")
  ]  # fmt: skip


def test_a_coordinator_that_is_not_there_is_named():
  with Processes("", 1, count=2, connect_s=0.5) as run:
    end = run.end(0)
  assert end.code == 69
  assert end.err == f"error: process 0 ({run.address}) did not answer within 0.5 s (--connect_s)\n"


def test_an_error_of_all_processes_is_printed_once():
  with Processes('time.sleep(index / 2)\nfail("error: rows=7: must be even")', 0, 1, 2) as run:
    ends = [run.end(i) for i in range(3)]
  assert [(end.code, end.err) for end in ends] == [(2, "error: rows=7: must be even\n"), (2, ""), (2, "")]


@pytest.mark.parametrize("user, code", [(True, 2), (False, 1)])
def test_an_error_of_one_process_ends_all_with_its_line_and_code(user, code):
  script = f"""
if index == 1:
  fail("error: no room", {code}, {user})
exchange(b"")
"""
  with Processes(script, 0, 1, 2) as run:
    ends = [run.end(i) for i in range(3)]
  line = f"stopped: process 1 ({HERE}, pid {ends[1].pid}): error: no room\n"
  assert [(end.code, end.err) for end in ends] == [(code, line)] * 3


def test_a_death_is_the_reason_for_the_errors_that_it_causes():
  """A collective fails in the processes that are left: they must not report that as the reason."""
  script = """
if index == 1:
  os.kill(os.getpid(), signal.SIGSTOP)
fail("error: collective", 1, False)
"""
  with Processes(script, 0, 1) as run:
    end = run.end(0)
  assert end.code == 69 and end.err.startswith("stopped: process 1 (")


STEPS = """
link.saves = True
say("there")
for step in range(1000):
  time.sleep(0.02 * (1 + index))  # The processes are at different steps, until they exchange.
  if step % 10 == 0:
    exchange(b"")
  if link.passing():
    say("saved", step)
    break
"""


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_all_processes_save_at_the_same_step_after_sigterm_to_one(asked):
  with Processes(STEPS, 0, 1, 2) as run:
    for i in range(3):
      run.wait_for(i, "there")
    run.signal(asked, signal.SIGTERM)
    ends = [run.end(i) for i in range(3)]
  assert [end.code for end in ends] == [0, 0, 0]
  assert len({end.out for end in ends}) == 1 and ends[0].out.startswith("saved")


def test_a_step_that_does_not_end_within_the_grace_ends_unsaved():
  with Processes('link.saves = True\nsay("there")\ntime.sleep(60)', 0, 1, grace_s=0.5) as run:
    for i in range(2):
      run.wait_for(i, "there")
    run.signal(1, signal.SIGTERM)
    ends = [run.end(i) for i in range(2)]
  line = f"stopped: process 1 ({HERE}, pid {ends[1].pid}) got SIGTERM and no step ended within 0.5 s (--grace_s)"
  assert [(end.code, end.err) for end in ends] == [(75, f"{line}; the same command resumes\n")] * 2


def test_sigterm_before_the_first_step_ends_all_at_once():
  with Processes('say("there")\ntime.sleep(60)', 0, 1) as run:
    for i in range(2):
      run.wait_for(i, "there")
    run.signal(0, signal.SIGTERM)
    ends = [run.end(i) for i in range(2)]
  assert [end.code for end in ends] == [75, 75] and all("got SIGTERM before its first step" in e.err for e in ends)


COMMAND = """
import os, time
print(os.getpid(), flush=True)
from nemocascade.fields import text
from nemocascade.runtime import hosts
from nemocascade.runtime.launch import launch

def run(word):
  import jax
  assert hosts.exchange(jax.process_index(), "numbers") == [0, 1] and jax.device_count() == 2
  print("there", flush=True)
  time.sleep(60)

launch(run, config=False, several=True, word=(text("A word."), ""))
"""


def test_a_command_with_different_flags_is_refused_by_process_0_alone():
  with Processes("") as run:
    for i, word in enumerate("ab"):
      run.run(COMMAND, f"--distributed={run.address},2,{i}", f"--word={word}")
    ends = [run.end(i) for i in range(2)]
  assert [(end.code, end.err) for end in ends] == [
    (2, "error: processes differ in flags.word: 'a' in process 0, 'b' in process 1\n"), (2, "")
  ]  # fmt: skip


def test_a_wrong_time_limit_of_one_process_ends_the_others_with_it():
  with Processes("") as run:
    for i, words in enumerate(([], ["--connect_s=-8"])):
      run.run(COMMAND, f"--distributed={run.address},2,{i}", "--word=a", *words)
    ends = [run.end(i) for i in range(2)]
  assert [end.code for end in ends] == [2, 2]
  assert "process 1" in ends[0].err and "--connect_s=-8.0: must be a finite number above 0" in ends[0].err


def test_jax_does_not_abort_when_the_process_of_its_coordinator_dies():
  with Processes("") as run:
    for i in range(2):
      run.run(COMMAND, f"--distributed={run.address},2,{i}")
    for i in range(2):
      run.wait_for(i, "there")
    run.signal(0, signal.SIGKILL)
    end = run.end(1)
  assert end.code == 69 and "*** Check failure" not in end.err
  assert end.err.splitlines()[-1].startswith(f"stopped: process 0 ({HERE}, pid {run.pids[0]}) is gone without a word")


@pytest.fixture
def sigterm(monkeypatch):
  """SIGTERM for this process: the object that handles it, and the verdicts that would end it."""
  before, wakeup, ends = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1), []
  monkeypatch.setattr(termination, "end", ends.append)
  handles = termination.Termination()
  handles.listen(grace_s=0.2)
  yield handles, ends
  signal.signal(signal.SIGTERM, before)
  signal.set_wakeup_fd(wakeup)


def until(found) -> None:
  for _ in range(500):
    if found():
      return
    time.sleep(0.01)
  raise AssertionError("nothing came")


def test_sigterm_to_a_single_process_is_answered_at_the_end_of_the_step(sigterm):
  handles, ends = sigterm
  handles.saves = True
  assert not handles.stopping()
  os.kill(os.getpid(), signal.SIGTERM)
  until(handles.stopping)
  time.sleep(0.4)  # Past the grace: the step has ended within it.
  assert not ends


def test_sigterm_to_a_single_process_that_ends_no_step_in_time(sigterm):
  handles, ends = sigterm
  os.kill(os.getpid(), signal.SIGTERM)
  until(lambda: ends)
  handles.saves = True
  os.kill(os.getpid(), signal.SIGTERM)
  until(lambda: len(ends) == 2)
  assert [end.code for end in ends] == [75, 75]
  assert "before its first step" in ends[0].line and "no step ended within 0.2 s" in ends[1].line


def started(monkeypatch, *others: dict) -> None:
  """Compares the start of this process with others that differ in some parts."""
  monkeypatch.setattr(same_start, "exchange", lambda here, what: [here, *({**here, **other} for other in others)])
  same_start.check({"rows": 8, "model": {"hidden_size": 16}}, {"wait_s": 600.0})


@pytest.mark.parametrize(
  "others, said",
  [
    ([{"config": {"rows": 16, "model": {"hidden_size": 16}}}], "config.rows: 8 in process 0, 16 in process 1"),
    (
      [
        {},
        {"config": {"rows": 8, "model": {"hidden_size": 32}}},
        {"config": {"rows": 8, "model": {"hidden_size": 32}}},
      ],
      "config.model.hidden_size: 16 in process 0, 32 in processes 2, 3",
    ),
    ([{"flags": {"wait_s": "60.0"}}], "flags.wait_s: '600.0' in process 0, '60.0' in process 1"),
    (
      [{"packages": same_start.packages() | {"jax": "0.1"}}],
      f"packages.jax: '{jax.__version__}' in process 0, '0.1' in",
    ),
    ([{"code": {}, "config": {}}], "processes differ in code.configs/__init__.py: '"),
  ],
)
def test_processes_that_start_differently_are_named(monkeypatch, others, said):
  with pytest.raises(UserError, match=re.escape(said)):
    started(monkeypatch, *others)


def test_processes_that_start_alike_go_on(monkeypatch):
  started(monkeypatch, {}, {})


def test_a_decision_that_differs_is_named():
  notes = [[["drawn prompts", 1], ["verdicts", 2]], [["drawn prompts", 1], ["verdicts", 2]]]
  hosts._compare(notes, "rounds")
  notes[1][1] = ["verdicts", 3]
  with pytest.raises(
    ProcessesDiffer, match=r"process 1 .* process 0: verdicts \(decision 2 before the exchange of rounds"
  ):
    hosts._compare(notes, "rounds")
  with pytest.raises(ProcessesDiffer, match=r"verdicts \(decision 2"):
    hosts._compare([notes[0], notes[1][:1]], "rounds")


def test_an_exchange_of_one_process_gives_what_one_of_several_gives():
  """JSON has no tuples and no numbers as keys: code that needs them fails in one process too."""
  assert hosts.exchange({1: (2, 3)}, "numbers") == [{"1": [2, 3]}]
  assert hosts.spent() == {}


def test_auto_without_a_cluster_is_refused():
  with pytest.raises(UserError, match="--distributed=auto: this is no TPU pod, nor a Slurm"):
    meeting.parse("auto", 1)
