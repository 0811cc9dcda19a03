"""Runs transformers' `generate` for bench rollout, with the form of its experts that is fastest here."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import NemotronHForCausalLM

EXPERTS = ("grouped_mm", "batched_mm", "eager")  # The forms of its experts.


class Peer:
  """A model of transformers in one dtype.

  Attributes:
    name: what is measured.
  """

  def __init__(self, folder: Path, dtype: str):
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    self._folder, self._dtype = folder, getattr(torch, dtype)
    self._load(EXPERTS[0])

  def _load(self, experts: str) -> None:
    self._model = NemotronHForCausalLM.from_pretrained(
      self._folder, dtype=self._dtype, experts_implementation=experts
    ).eval()
    self.name = f"transformers {transformers.__version__} generate, torch {torch.__version__}, experts by {experts}"

  def choose(self, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
    """Keeps the fastest form of the experts; returns {form: seconds of `generate`}, each after a run of two tokens."""
    seconds = {}
    for experts in EXPERTS:
      self._load(experts)
      self.generate(prompts, 2)
      seconds[experts] = self.generate(prompts, new)
    self._load(min(seconds, key=seconds.__getitem__))
    self.generate(prompts, 2)
    return seconds

  def generate(self, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Seconds of sampling `new` tokens after each of equally long prompts."""
    ids_BT = torch.tensor(prompts)
    began = time.perf_counter()
    with torch.no_grad():
      out_BT = self._model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, min_new_tokens=new, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, use_cache=True, pad_token_id=0,
      )  # fmt: skip
    took = time.perf_counter() - began
    assert out_BT.shape[1] == ids_BT.shape[1] + new
    return took

  def logprobs(self, row_BT: np.ndarray) -> np.ndarray:
    """fp32 [B, T - 1]: log-probabilities of all tokens but the first."""
    ids_BT = torch.tensor(row_BT, dtype=torch.long)
    with torch.no_grad():
      logprobs_BTV = torch.log_softmax(self._model(ids_BT, use_cache=False).logits[:, :-1].float(), dim=-1)
    return logprobs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0].numpy()
