"""Instruction following: a program checks every constraint of the prompt."""

from __future__ import annotations

from nemocascade.domains.domain import Verify, one_by_one
from nemocascade.sandbox import limited
from nemocascade.verifiers import instructions
from nemocascade.verifiers.verdict import Completion, Row, Verdict, no_verdict

GRADING_MODES = ("binary", "fraction")


def judge(row: Row, completion: Completion) -> Verdict:
  """Reward 1 iff every instruction is followed; in mode "fraction", the share that is followed.

  If any instruction cannot be checked, the verdict is masked.
  """
  names = row["instruction_id_list"]
  arguments = row.get("kwargs") or [None] * len(names)
  if not names or len(arguments) != len(names):
    return no_verdict("row", f"{len(names)} instructions with {len(arguments)} kwargs")
  if why := unsupported(row):
    return no_verdict("unknown", why)
  answer = limited.call(instructions.check, completion.content, names, arguments)
  if "row" in answer:
    return no_verdict("row", answer["row"])
  broken = [name for name, kept in zip(names, answer["kept"], strict=True) if not kept]
  kept = len(names) - len(broken)
  reward = kept / len(names) if row.get("grading_mode") == "fraction" else float(not broken)
  return Verdict(reward, f"broken: {', '.join(broken)}" if broken else "kept")


def unsupported(row: Row) -> str:
  """Names an instruction or the grading mode of the row that there is no checker of here; else ""."""
  mode = row.get("grading_mode") or GRADING_MODES[0]
  if mode not in GRADING_MODES:
    return f"unknown grading mode {mode!r}"
  unknown = [name for name in row["instruction_id_list"] if name not in instructions.CHECKERS]
  return f"unknown instruction {unknown[0]!r}" if unknown else ""


def make_verify() -> Verify:
  return one_by_one(judge)
