"""Damages every state file of a cascade in many ways, resumes it, and checks that the damage is reported.

  python tests/damages.py
  python tests/damages.py --only=cascade.json

The cascade trains a reward model and then SFT, which is resumed from its last step (four of four). A damage
passes in two cases: the run ends with one line that names the file, and nothing was trained; or the previous
checkpoint is used, stderr says so, and the stage ends with the same parameters. The exit code is 1 if any
damage fails.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from chaos import stage_differences

from configs.recipe import conversations, generated
from configs.tiny import cascade as config
from experiments import cascade
from nemocascade.errors import UserError

STAGE = "sft"
JSON_TEXTS = {
  "a list": "[]", "null": "null", "another file's": '{"stages": [{}]}', "empty": "", "a number": "3",
  "text": '"stages"', "deep": 50_000 * "[", "not closed": '{"config": {', "no UTF-8": b"{\xff\xfe}", "zero bytes": b"\0" * 99,
}  # fmt: skip
Harm = Callable[[Path], object]


def text(value: str | bytes) -> Harm:
  return lambda path: path.write_bytes(value if isinstance(value, bytes) else value.encode())


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x04
  path.write_bytes(data)


def lose(path: Path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace(old: str, new: str) -> Harm:
  def harm(path: Path) -> None:
    before = path.read_text()
    assert old in before, f"{path} has no {old!r}"
    path.write_text(before.replace(old, new, 1))

  return harm


def folder(path: Path) -> None:
  lose(path)
  path.mkdir()


def file(path: Path) -> None:
  lose(path)
  path.write_text("")


def pipe(path: Path) -> None:
  lose(path)
  os.mkfifo(path)


def loop(path: Path) -> None:
  lose(path)
  path.symlink_to(path)


def add(path: Path) -> None:
  (path / "extra").write_text("x")


def drop_sizes(path: Path) -> None:
  """Keeps only the file sizes; older checkpoints above one GiB had no checksums."""
  path.write_text(json.dumps({name: of[:1] for name, of in json.loads(path.read_text()).items()}))


def damages(workdir: Path) -> list[tuple[str, str, Harm]]:
  """All damages as (file, description, function that does the damage)."""
  of_json = {
    **{name: text(value) for name, value in JSON_TEXTS.items()},
    "a folder": folder,
    "a pipe": pipe,
    "a loop": loop,
  }
  found = [(name, what, harm) for name in ("config.json", "cascade.json") for what, harm in of_json.items()]
  found += [
    ("cascade.json", "a stage's name is a number", replace('"name": "sft"', '"name": 3')),
    ("cascade.json", "a score is text", replace('"wall_s": ', '"wall_s": "x", "was": ')),
    ("cascade.json", "another status", replace('"status": "running"', '"status": "ran"')),
    ("cascade.json", "no teachers", replace('"teachers"', '"teacher"')),
    ("cascade.json", "cut", cut),
    ("config.json", "cut", cut),
    ("config.json", "another seed", replace('"seed": 0', '"seed": 1')),
  ]
  steps = f"{STAGE}/checkpoints/4"
  files = sorted(
    p for p in (workdir / steps).rglob("*") if p.is_file() and p.stat().st_size and p.name != "checksums.json"
  )
  for path in files[:: max(1, len(files) // 4)]:
    found += [(str(path.relative_to(workdir)), harm.__name__, harm) for harm in (cut, flip, lose)]
  found += [(steps, harm.__name__, harm) for harm in (folder, file, add)]
  found += [(f"{steps}/{part}", "lose", lose) for part in ("params", "rest", "record")]
  sums = f"{steps}/checksums.json"
  found += [(sums, harm.__name__, harm) for harm in (lose, cut, folder, drop_sizes)]
  found += [(sums, name, text(JSON_TEXTS[name])) for name in ("a list", "null", "empty")]
  for name in (f"{STAGE}/model/config.json", f"{STAGE}/model/tokenizer.model", "tokenizer/tokenizer.model"):
    found += [(name, harm.__name__, harm) for harm in (cut, flip, folder)]
  found += [(f"{STAGE}/model/config.json", name, text(JSON_TEXTS[name])) for name in ("a list", "null")]
  metrics = f"{STAGE}/metrics.jsonl"
  found += [
    (metrics, "a line that is a number", replace("\n", "\n7\n")),
    (metrics, "a line cut off", replace('"loss/sft"', "\n")),
    (metrics, "a step that is text", replace('"step": 1', '"step": "1"')),
    (metrics, "a folder", folder),
  ]
  judge = "reward_model/checkpoints/6"
  big = max((workdir / judge / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
  found += [(str(big.relative_to(workdir)), harm.__name__, harm) for harm in (cut, flip, lose)]
  found += [(f"{judge}/params", "folder", folder), (f"{judge}/checksums.json", "lose", lose)]
  data = max((workdir / "data").rglob("*array_record*"), key=lambda p: p.stat().st_size)
  found += [(str(data.relative_to(workdir)), harm.__name__, harm) for harm in (cut, flip, lose)]
  return found


def smoke() -> config.ConfigDict:
  """Config of a cascade: a reward model, then SFT of four steps with a checkpoint after each."""
  c = config.get_config("smoke")
  c.order, c.evaluation.greedy = ("reward_model", STAGE), ()
  c.evaluation.prompts, c.domains = 4, generated("math", "instruction", "preference")
  c.evaluation.long_domains = ()
  with c.unlocked():
    c.stages.sft.sources = conversations(math=60, instruction=60)
  c.stages.sft.update(steps=4, save_every=1)
  return c


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default="", help="The damages whose file holds this text.")
  only = parser.parse_args().only
  with tempfile.TemporaryDirectory() as temporary:
    whole, workdir = Path(temporary) / "whole", Path(temporary) / "run"
    cascade.run(smoke(), workdir)
    record = json.loads((workdir / "cascade.json").read_text())
    record["stages"][-1]["status"] = "running"
    (workdir / "cascade.json").write_text(json.dumps(record, indent=1))
    (workdir / "compilations").rename(Path(temporary) / "compilations")
    (workdir / "compilations").symlink_to(Path(temporary) / "compilations")
    shutil.copytree(workdir, whole, symlinks=True)
    wrong, number = 0, 0
    for name, what, harm in damages(workdir):
      if only in name:
        number += 1
        shutil.rmtree(workdir)
        shutil.copytree(whole, workdir, symlinks=True)
        harm(workdir / name)
        verdict, said = outcome(whole, workdir, name)
        wrong += verdict == "WRONG"
        print(f"{number:3} {verdict:7} {name}: {what}: {said.replace(str(workdir) + '/', '')[:150]}", flush=True)
  print(f"{number} damages, {wrong} that were not noticed, not named or trained on")
  return 1 if wrong else 0


def outcome(whole: Path, workdir: Path, name: str) -> tuple[str, str]:
  """Resumes the damaged cascade; returns ("refused", "before" or "WRONG", the message)."""
  errors = io.StringIO()
  place = re.sub(r"(checkpoints/\d+)/.*", r"\1", name)  # It may name the checkpoint instead of a file in it.
  trained = lambda: sorted(p.name for p in (workdir / STAGE / "checkpoints").iterdir())
  before = trained()
  try:
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
      cascade.run(smoke(), workdir)
  except UserError as error:
    said = " ".join(str(error).split())
    ok = place in said and "\n" not in str(error) and len(said.replace(str(workdir), "")) < 250 and trained() == before
    return ("refused" if ok else "WRONG"), said
  except Exception as error:
    return "WRONG", repr(error)
  said = next((line for line in errors.getvalue().splitlines() if place in line), "")
  shutil.rmtree(next((workdir / STAGE / "checkpoints").glob("damaged-*"), workdir / "none"), ignore_errors=True)
  for path in (workdir / STAGE / "checkpoints").glob("damaged-*"):
    path.unlink()
  different = stage_differences(whole / STAGE, workdir / STAGE)
  return ("before" if said and not different else "WRONG"), said or f"nothing said; {different}"


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
