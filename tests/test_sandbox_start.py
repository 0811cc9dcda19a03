"""A sandbox that cannot start, or be confined, says why, and judges no program."""

import pytest

from configs.tiny import base
from nemocascade.data.chat_parse import Turn
from nemocascade.errors import UserError
from nemocascade.runtime import parts
from nemocascade.sandbox import confinement, seccomp, worker
from nemocascade.sandbox.program import Limits, Program
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.verifiers.verdict import Completion


def script(source, stdin=""):
  return Program({"main.py": source}, stdin=stdin)


def test_without_namespaces_one_line_says_what_to_do(monkeypatch, tmp_path):
  broken = tmp_path / "bwrap"
  broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
  broken.chmod(0o755)
  for found in ([str(broken)], []):
    monkeypatch.setattr(confinement, "bubblewraps", lambda found=found: found)
    with pytest.raises(UserError, match="programs cannot be confined here .*: leave out the domains") as error:
      Sandbox()
    assert "\n" not in str(error.value)
    assert not found or "No permissions" in str(error.value)


def test_on_a_system_without_a_sandbox_domains_that_run_code_are_refused_by_name_and_the_others_judge(monkeypatch):
  """As on macOS, which has neither bubblewrap nor filters of system calls."""
  monkeypatch.setattr(seccomp.platform, "system", lambda: "Darwin")
  monkeypatch.setattr(confinement, "bubblewraps", lambda: [])
  c = base.get_config("smoke")
  for names in (None, {"math", "swe"}):
    with pytest.raises(UserError) as error:
      parts.build_domains(c, names)
    refused = "swe" if names else "code,swe,swe_agentic"
    assert str(error.value).startswith(f"domains={refused}: programs cannot be confined here")
    assert "\n" not in str(error.value)
  others = parts.build_domains(c, set(c.domains) - {"code", "swe", "swe_agentic"})
  assert len(others) == 7
  row = others["math"].rows.train(0, 0)
  right = Completion((Turn(None, f"\\boxed{{{row['expected_answer']}}}", (), None, True),))
  wrong = Completion((Turn(None, "\\boxed{-1}", (), None, True),))
  assert [verdict.reward for verdict in others["math"].verify([row, row], [right, wrong])] == [1.0, 0.0]


def test_every_way_of_confining_makes_programs_nobodys():
  for way in worker.ways():
    own = worker.Worker(way, Limits())
    result = own.run(script("import os; print(*os.getresuid(), *os.getresgid(), os.getgroups())"))
    assert result.stdout == f"{' '.join([confinement.NOBODY] * 6)} []\n", result
    own.close()


def test_root_that_may_not_give_programs_another_user_keeps_its_own(monkeypatch):
  def refuse(told):
    raise PermissionError("not here")

  monkeypatch.setattr(confinement, "map_users", refuse)
  assert Sandbox(workers=1).run(script("print(1)")).stdout == "1\n"


def test_a_folder_that_cannot_be_made_is_the_sandboxs_failure():
  own = worker.Worker(next(worker.ways()), Limits(files=1))  # A limit too low for the program's own file.
  result = own.run(script("print(1)"))
  assert (result.status, own.ended()) == ("unstarted", True) and "No space" in result.reason


def test_a_sandbox_that_does_not_start_in_time_says_nothing_of_the_program():
  own = worker.Worker(next(worker.ways()), Limits(wall_s=0.0))
  result = own.run(script("print(1)"))
  assert (result.status, result.reason) == ("unstarted", "the sandbox did not start in time")


def test_a_sandbox_that_ended_before_it_was_asked_still_says_why(monkeypatch, tmp_path):
  broken = tmp_path / "bwrap"
  broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
  broken.chmod(0o755)
  monkeypatch.setattr(confinement, "bubblewraps", lambda: [str(broken)])
  send = worker.Worker._send

  def late(self, *args):
    self._process.wait()
    return send(self, *args)

  monkeypatch.setattr(worker.Worker, "_send", late)
  with pytest.raises(UserError, match="No permissions"):
    Sandbox()


def test_without_a_filter_there_is_no_sandbox(monkeypatch):
  for code in (None, b"\0" * 8):  # A system without a filter, and a filter that the kernel refuses.
    monkeypatch.setattr(seccomp, "filter_program", lambda code=code: code)
    with pytest.raises(UserError, match="programs cannot be confined here"):
      Sandbox()
