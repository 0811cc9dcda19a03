"""Times conversion in both directions against copying the same files, on a generated folder of shards."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments import convert
from nemocascade.config import ModelConfig
from nemocascade.store.hf_config import config_fields
from nemocascade.store.hf_layout import Tree, layout
from nemocascade.store.tensor_files import write_shards

# The published model's sizes, but 32 experts. PATTERN has few blocks.
MODEL = dict(
  vocab_size=131072, hidden_size=2688, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
  mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8, n_routed_experts=32,
  num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
  param_dtype="bfloat16", dtype="bfloat16",
)  # fmt: skip
PATTERN = "MEM*E"
REPEATS = 3  # Runs of each side, in turns; the best of each is compared.


def cases(directory: str = "", **model) -> Iterator[dict]:
  """Yields a line for each direction; ratio is our bytes per second over those of a copy.

  Args:
    directory: where the files are made and removed; by default the system's temporary directory.
    **model: changed fields of the generated model.
  """
  with tempfile.TemporaryDirectory(dir=directory or None) as place:
    root = Path(place)
    source = root / "hf"
    _generate(source, ModelConfig(**MODEL | {"hybrid_override_pattern": PATTERN} | model))
    size = sum(file.stat().st_size for file in source.iterdir())
    ours, copied, back = root / "ours", root / "copied", root / "back"
    inward = lambda: convert.run(f"hf:{source}", str(ours))
    outward = lambda: convert.run(str(ours), f"hf:{back}")
    copy = lambda: shutil.copytree(source, copied)
    for case, work, made in (("hf_to_ours", inward, ours), ("ours_to_hf", outward, back)):
      if work is outward:
        inward()
      best = {"ours": 0.0, "peer": 0.0}
      for _ in range(REPEATS):
        for who, act, path in (("peer", copy, copied), ("ours", work, made)):
          best[who] = max(best[who], size / _seconds(act))
          shutil.rmtree(path)  # Deleted at once, so that pending writes do not slow the next run.
      yield dict(
        case=case, ours=best["ours"] / 1e9, peer=best["peer"] / 1e9, peer_name="shutil.copytree",
        unit="GB/s", ratio=best["ours"] / best["peer"],
      )  # fmt: skip


def _seconds(act: Callable[[], object]) -> float:
  os.sync()  # Completes pending writes of the run before, which are not timed.
  began = time.perf_counter()
  act()
  return time.perf_counter() - began


def _generate(path: Path, config: ModelConfig) -> None:
  path.mkdir()
  specs = {name: ("BF16", named.shape) for name, named in layout(config, Tree()).items()}
  numbers = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(ml_dtypes.bfloat16)

  def blocks(name: str) -> Iterator[np.ndarray]:
    left = int(np.prod(specs[name][1]))
    for start in range(0, left, len(numbers)):
      yield numbers[: left - start]

  write_shards(path, specs, blocks, limit=1_000_000_000)
  (path / "config.json").write_text(json.dumps(config_fields(config)))
