"""An SFT step of transformers' NemotronHForCausalLM with torch's AdamW, for bench train."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import NemotronHForCausalLM

NAME = f"transformers {transformers.__version__} NemotronHForCausalLM, torch {torch.__version__} AdamW"
# Implementations of experts in transformers. Another, batched_mm, copies the matrices of every token.
EXPERTS = ("grouped_mm", "eager")


class Step:
  """Weights are fp32 and the optimizer is fused.

  Attributes:
    experts: an element of EXPERTS.
    first_loss: the loss of the first step, in nats; None before it.
  """

  def __init__(self, folder: Path, tokens_BT: np.ndarray, dtype: str, optimizer: dict, experts: str):
    """Args: see `fastest`."""
    self.experts, self.first_loss = experts, None
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts)
    self._model, self._tokens_BT = model.train(), torch.tensor(tokens_BT, dtype=torch.long)
    self._bf16 = dtype == "bfloat16"
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(), lr=optimizer["peak_lr"], betas=(0.9, 0.95), weight_decay=optimizer["weight_decay"],
      fused=True,
    )  # fmt: skip

  def step(self) -> float:
    """Runs the next step; returns its loss in nats."""
    with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
      loss = self._model(input_ids=self._tokens_BT, labels=self._tokens_BT, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    found = float(loss.detach())
    if self.first_loss is None:
      self.first_loss = found
    return found


def fastest(folder: Path, tokens_BT: np.ndarray, dtype: str, optimizer: dict) -> Step:
  """The step with the implementation of experts whose second step is the fastest.

  Args:
    folder: a model in Hugging Face's layout.
    tokens_BT: rows of one document each; all tokens but the first are learned.
    dtype: of products; by autocast if it is bfloat16.
    optimizer: peak_lr and weight_decay.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
  torch.manual_seed(0)
  found = {}
  for experts in EXPERTS:
    try:
      step = Step(folder, tokens_BT, dtype, optimizer, experts)
      step.step()
      began = time.perf_counter()
      step.step()
    except (RuntimeError, NotImplementedError, ValueError) as error:  # Not every form runs in every dtype on a CPU.
      print(f"transformers' experts by {experts} do not run: {str(error).splitlines()[0][:200]}", file=sys.stderr)
      continue
    found[experts] = time.perf_counter() - began, step
    print(f"transformers' experts by {experts}: {found[experts][0]:.3f} s", file=sys.stderr)
  if not found:
    raise RuntimeError("no form of transformers' experts runs here")
  return min(found.values(), key=lambda pair: pair[0])[1]
