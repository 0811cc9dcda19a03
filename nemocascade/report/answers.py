"""What the model says: the same held-out prompts before and after each stage, and samples of the training."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemocascade.report.markup import command, link, note, text
from nemocascade.report.run import Run, Stage, words

LONGEST = 600  # Characters of a text that are shown.
PROMPTS = 2  # Of each of a stage's own domains.
DOMAINS = 4  # At most, of a stage.
OPEN = 4  # Stages whose answers are all unfolded; of more, those of the last one.
SAMPLES = 6  # Of a stage's training.
Answer = Mapping[str, Any]


def before_and_after(run: Run) -> list[str]:
  """For each stage, the answers to the first held-out prompts of its own domains, before and after it."""
  parts, few = [], len(run.scored) <= OPEN
  for stage in run.scored:
    after, start = run.answers(stage), run.start_of(stage)
    before = run.answers(start) if start else {}
    shown = [d for d in (stage["domains"] or run.domains) if d in after][:DOMAINS]
    old = {(d, answer["prompt"]): answer for d, of in before.items() for answer in of}
    pairs = [_pair(stage, new, start, old.get((d, new["prompt"]))) for d in shown for new in after[d][:PROMPTS]]
    if pairs:
      side = " (side line)" if run.is_side(stage) else ""
      head = f"<summary><b>{text(words(stage['name']))}{side}</b></summary>"
      parts.append(f"<details{' open' * (few or stage is run.scored[-1])}>{head}{''.join(pairs)}</details>")
  if parts:
    about = (
      "The first held-out prompts of each stage's own domains, not chosen by their answers. Sampled at temperature 1"
      " with the same random numbers. What stands between <think> and </think> is the model's thought."
    )
    parts.insert(0, note(about))
  return parts


def _pair(stage: Stage, new: Answer, start: Stage | None, old: Answer | None) -> str:
  left = (
    f"<div>before, {text(words(start['name']))}: {verdict(old)}<pre>{_cut(old['completion'])}</pre></div>"
    if start and old
    else ""
  )
  return (
    f"<div class=pair><div class=prompt><b>{text(words(new['domain']))}</b><pre>{_cut(new['prompt'])}</pre></div>{left}"
    f"<div>after, {text(words(stage['name']))}: {verdict(new)}<pre>{_cut(new['completion'])}</pre></div></div>"
  )


def verdict(answer: Answer) -> str:
  """The verdict on an answer in words, coloured."""
  if answer["masked"]:
    return f"<span class=quiet>not judged ({_cut(answer['reason'])})</span>"
  reason = text(str(answer["reason"])[:200])
  said = "<span class=good>✓ right</span>" if answer["verdict"] >= 1 else "<span class=bad>✗ wrong</span>"
  return f"{said} <span class=note>({answer['verdict']:g}, {reason})</span>"


def _cut(said: object) -> str:
  """The text, escaped and cut: a model may have written anything."""
  said = str(said)
  return text(said[:LONGEST]) + (" ..." if len(said) > LONGEST else "")


def talk(run: Run) -> list[str]:
  """How to talk to the last model, and what it answered to prompts that it hadn't seen."""
  if not run.main:
    return []
  last = run.main[-1]
  lines = (
    f"python -m experiments.chat --checkpoint={last['checkpoint']} --thinking --temperature=0",
    f"python -m experiments.generate --checkpoint={last['checkpoint']} --input=prompts.jsonl --output=out.jsonl",
  )
  parts = [f"<pre class=command>{command(line)}</pre>" for line in lines]
  if answers := run.answers(last):
    about = (
      f"Answers of {words(last['name'])}, the last stage, to held-out prompts; one of each domain. Ask it the like: a small"
      " model knows the forms that it was trained on. In the terminal, end each line but the last with a backslash, and"
      " /reset before another question."
    )
    parts.append(note(about))
    for of in list(answers.values())[:10]:
      parts.append(f"<pre>{_cut(of[0]['prompt'])}</pre>{verdict(of[0])}<pre>{_cut(of[0]['completion'])}</pre>")
  return parts


def samples(run: Run, stage: Stage) -> str:
  """The stage's last samples of the training, folded."""
  lines = run.samples(stage)[-SAMPLES:]
  if not lines:
    return ""
  if stage["kind"] == "sft":
    parts = [f"<pre>{''.join(map(_piece, line['pieces']))}</pre>" for line in lines]
    title = f"{words(stage['name'])}: documents; what is learned is marked"
  else:
    parts = [_sample(line) for line in lines]
    title = f"{words(stage['name'])}: the last samples"
  there = link(f"../{stage['name']}/samples.jsonl", "samples.jsonl")
  return f"<details><summary>{text(title)}</summary><p class=note>All of them: {there}</p>{''.join(parts)}</details>"


def _sample(line: Answer) -> str:
  return (
    f"<p><b>{text(words(line['domain']))}</b>, step {line['step']}: {verdict(line)}</p>"
    f"<pre>{_cut(line['prompt'])}</pre><pre>{_cut(line['completion'])}</pre>"
  )


def _piece(piece: Answer) -> str:
  """A piece of a document that SFT trains on."""
  return f"<mark>{_cut(piece['text'])}</mark>" if piece["learned"] else _cut(piece["text"])


def all_samples(run: Run, stages: Sequence[Stage]) -> list[str]:
  return [part for part in (samples(run, stage) for stage in stages) if part]
