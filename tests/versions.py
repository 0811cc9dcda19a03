"""Imports every module and runs a smoke stage with the installed versions; for environments without the test tools.

python tests/versions.py
"""

import importlib
import importlib.metadata
import json
import pkgutil
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "array_record", "protobuf")


def main() -> None:
  sys.path.insert(0, str(ROOT))
  print("Python", sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in CHECKED))
  import nemocascade

  for module in pkgutil.walk_packages(nemocascade.__path__, "nemocascade."):
    importlib.import_module(module.name)
  with tempfile.TemporaryDirectory() as folder:
    questions = Path(folder, "in.jsonl")
    questions.write_text(json.dumps({"messages": [{"role": "user", "content": "Which is a bird?"}]}) + "\n")
    start = f"--config.init_from={folder}/sft/latest"
    config = lambda stage: f"--config={ROOT}/configs/tiny/{stage}.py:smoke"
    for words in (
      ("sft", config("sft"), f"--workdir={folder}"),
      ("rl", config("if_rl"), f"--workdir={folder}/if_rl", start),
      ("generate", f"--checkpoint={folder}/if_rl/rl/latest", f"--input={questions}", f"--output={folder}/out.jsonl"),
      ("convert", f"--source={folder}/if_rl/rl/latest", f"--target=hf:{folder}/published"),
      ("score", f"--checkpoint=hf:{folder}/published", f"--input={questions}", f"--output={folder}/scored.jsonl"),
    ):
      command(*words)
    command("sft", config("sft"), f"--workdir={folder}")  # It is finished.


def command(name: str, *flags: str) -> None:
  """Runs a command in this process. Exits if it fails."""
  sys.argv = [name, *flags]
  try:
    runpy.run_module(f"experiments.{name}", run_name="__main__")
  except SystemExit as ended:
    if ended.code:
      sys.exit(f"experiments.{name} {' '.join(flags)}: exit code {ended.code}")


if __name__ == "__main__":
  main()
