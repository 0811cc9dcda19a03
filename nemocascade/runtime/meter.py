"""What the steps of a stage take: seconds of each phase by host, tokens a second, FLOPs utilisation, goodput."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax

from nemocascade.config import ModelConfig
from nemocascade.model.size import matmul_params
from nemocascade.report.metrics import Phases, compile_seconds
from nemocascade.runtime import hosts
from nemocascade.runtime.outcome import Spent

# Device kind of JAX -> products and sums of dense bf16 matrices a second, from the pages of Google Cloud on each TPU
# version and from NVIDIA's data sheets (without sparsity). A device of these TPUs is a chip. Other kinds have no
# utilisation.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}
BETWEEN = "between_steps"  # The phase in which metrics and checkpoints are written, and held-out prompts scored.
RECORD = {  # JSON schema of Meter.record.
  "type": "object",
  "properties": {"began": {"type": "number"}, "counted_s": {"type": "number", "minimum": 0}},
  "required": ["began", "counted_s"],
}


class Meter:
  """Measures the steps of a stage. Every process has one, and calls `step` for every step."""

  def __init__(self, config: ModelConfig, record: Mapping[str, Any]):
    """
    Args:
      config: the model whose FLOPs are counted.
      record: the result of `record` in the checkpoint that the stage resumes from, or empty.
    """
    self._params, self._peak = matmul_params(config), PEAK_FLOPS.get(jax.devices()[0].device_kind)
    # Seconds since the epoch, because the wall time includes that between two runs of a stage.
    self._began, self._counted_s = record.get("began", time.time()), record.get("counted_s", 0.0)
    self._compiled_s = compile_seconds()

  def record(self) -> dict[str, float]:
    """The goodput's state as JSON, for the stage's checkpoints: a step that was lost to a kill does not count."""
    return {"began": self._began, "counted_s": self._counted_s}

  def step(
    self, phases: Phases, spent: Spent, *, counts: bool, mine: Mapping[str, int] | None = None
  ) -> tuple[dict[str, float], dict[str, int]]:
    """Measures a finished step.

    Args:
      phases: the seconds of this process; their sums begin anew.
      spent: the tokens of the step in all processes, without those in `mine`.
      counts: whether the step changed the parameters.
      mine: fields of Spent -> tokens of this process, which are added up over the processes.

    Returns:
      (metrics, the sums of `mine` over all processes). The metrics are
      "time/PHASE": seconds, the median over hosts; with several processes also those of the slowest one, and which
        it is: "time/slowest/PHASE", "time/slowest_host/PHASE";
      "time/step": the slowest host's seconds of all phases; "time/compile": those of them that XLA compiled;
      "speed/tokens": tokens a second and device, sampled ones if there are any, else trained ones;
      "speed/mfu": the FLOPs of Spent.flops as a share of the devices' peak, on devices of PEAK_FLOPS;
      "speed/goodput": share of the wall time since the stage's first start that was in steps that count, without
        compilations and without what is done between steps.
    """
    compiled_s, self._compiled_s = compile_seconds() - self._compiled_s, compile_seconds()
    own = {"seconds": phases.take(), "compile": compiled_s, "tokens": dict(mine or {})}
    found = hosts.exchange(own, "the times of a step")
    tokens = {name: sum(of["tokens"][name] for of in found) for name in own["tokens"]}
    spent, seconds = spent.plus(**tokens), [of["seconds"] for of in found]
    whole = max(sum(of.values()) for of in seconds)
    compiled = min(whole, max(of["compile"] for of in found))
    metrics = _times(seconds) | {"time/step": whole, "time/compile": compiled}
    if whole > 0:
      rate = 1 / (whole * jax.device_count())
      metrics["speed/tokens"] = (spent.sampled or spent.trained) * rate
      if self._peak:
        metrics["speed/mfu"] = spent.flops(self._params) * rate / self._peak
    between = max(of.get(BETWEEN, 0.0) for of in seconds)
    self._counted_s += max(0.0, whole - compiled - between) * counts
    metrics["speed/goodput"] = min(1.0, self._counted_s / max(time.time() - self._began, 1e-9))
    return metrics, tokens


def _times(seconds: list[dict[str, float]]) -> dict[str, float]:
  """The metrics of each phase, from the phases of every process."""
  metrics: dict[str, float] = {}
  for phase in seconds[0]:
    of = [host.get(phase, 0.0) for host in seconds]
    metrics[f"time/{phase}"] = statistics.median(of)
    if len(of) > 1:
      metrics |= {f"time/slowest/{phase}": max(of), f"time/slowest_host/{phase}": float(of.index(max(of)))}
  return metrics
