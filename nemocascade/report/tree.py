"""The tree of a cascade as text: which stage started from which, their scores, teachers and gates' decisions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemocascade.store.record import Record


def tree(record: Record) -> str:
  """The tree, read from cascade.json alone. Stages that were trained anew since are marked.

  A line: stage, steps, mean score of all domains, scores of its own domains before and after. Below it: its teachers,
  where a gate of it fired, and the stages that started from it.
  """
  entries = [*record.stages, *record.set_aside]
  names = {e["name"] for e in entries}
  makers = {e["checkpoint"]: e["name"] for e in entries if "checkpoint" in e}
  below: dict[str, list[str]] = {}  # A stage, or a checkpoint from outside ("" for none) -> what started from it.
  for entry in entries:
    # A stage that was given more steps has another checkpoint than the one that others started from.
    parent = makers.get(entry["start"], entry.get("parent", ""))
    below.setdefault(parent if parent in names else entry["start"], []).append(entry["name"])
  of = {e["name"]: e for e in entries}
  aside = {e["name"] for e in record.set_aside}

  def branches(children: Sequence[str], indent: str) -> Iterator[str]:
    for i, name in enumerate(children):
      last = i == len(children) - 1
      yield f"{indent}{'└─ ' if last else '├─ '}{_line(of[name], name in aside)}"
      deeper = indent + ("   " if last else "│  ")
      inner = below.get(name, [])
      yield from (f"{deeper}{'│  ' if inner else '   '}{note}" for note in _notes(of[name]))
      yield from branches(inner, deeper)

  lines: list[str] = []
  for start in sorted(below.keys() - names):
    lines += [start or "fresh parameters", *branches(below[start], "")]
  return "\n".join(lines) or "no stage has begun"


def _line(entry: Mapping[str, Any], replaced: bool) -> str:
  if entry["status"] != "done":
    return f"{entry['name']}: running"
  after, before = entry.get("scores_after", {}), entry.get("scores_before", {})
  parts = [f"{entry['steps']} steps"]
  if after:
    parts.append(f"mean {sum(after.values()) / len(after):.3f}")
  for domain in entry["domains"]:
    if domain in after and domain in before:
      parts.append(f"{domain} {before[domain]:.3f} -> {after[domain]:.3f}")
  return f"{entry['name']}: {', '.join(parts)}{' (trained anew since)' if replaced else ''}"


def _notes(entry: Mapping[str, Any]) -> Iterator[str]:
  if teachers := entry.get("teachers"):
    yield "teachers: " + ", ".join(
      f"{domain}={t['stage'] or t['checkpoint']}" for domain, t in sorted(teachers.items())
    )
  for domain, gate in sorted(entry.get("gates", {}).items()):
    if gate["fell"]:
      low, high = gate["interval"]
      yield (
        f"gate of {domain}: {gate['change']:+.3f} [{low:+.3f}, {high:+.3f}] against -{gate['tolerance']:g}:"
        f" {entry['decision']}"
      )
