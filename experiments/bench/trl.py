"""Runs TRL's GRPOTrainer for bench_rl: its own training loop in a thread, one step per call.

Settings outside the recipe are those that are fastest on a CPU.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from ml_collections import ConfigDict
from transformers import NemotronHForCausalLM, PreTrainedTokenizerFast, TrainerCallback

NAME = f"trl {trl.__version__} GRPOTrainer (transformers {transformers.__version__}, torch {torch.__version__})"
EXPERTS = "grouped_mm"  # The experts' implementation in transformers; its default.
CHUNK = 80  # Chunk length of their scan in tokens: a whole row.


class Trainer:
  """A context manager. Each call of `step` runs one training step.

  Attributes:
    seconds: the duration of each step.
    phases: {phase: seconds} of each step.
  """

  def __init__(
    self, folder: Path, c: ConfigDict, prompts: list[str], letters: list[str], reward: Callable[[str, str], float]
  ):
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    self.seconds, self.phases = [], []
    self._mine, self._yours = threading.Semaphore(0), threading.Semaphore(0)
    self._thread, self._ended = ThreadPoolExecutor(1), False
    r, o = c.rollout, c.optimizer
    arguments = trl.GRPOConfig(
      output_dir=str(folder), use_cpu=True, seed=c.seed, max_steps=c.steps,
      # The recipe's settings.
      per_device_train_batch_size=r.prompts * r.completions, num_generations=r.completions,
      max_completion_length=r.total_tokens - r.prompt_tokens, temperature=r.temperature, top_p=r.top_p,
      shuffle_dataset=False, loss_type="dapo", scale_rewards="group", beta=0.0,
      learning_rate=o.peak_lr, lr_scheduler_type="constant", adam_beta1=o.b1, adam_beta2=o.b2,
      adam_epsilon=o.eps, weight_decay=o.weight_decay, max_grad_norm=o.clip_norm,
      # No recomputation, no reports, no checkpoints.
      bf16=c.model.dtype == "bfloat16", fp16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
      report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=EXPERTS)
    for module in model.modules():
      if hasattr(module, "chunk_size"):
        module.chunk_size = CHUNK
    tokenizer = PreTrainedTokenizerFast(
      tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<unk>",
      unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    score = lambda completions, letter, **_: [reward(*pair) for pair in zip(completions, letter, strict=True)]
    self._new_tokens = arguments.max_completion_length
    self._prompts = prompts
    self._trainer = trl.GRPOTrainer(
      model, score, arguments, Dataset.from_dict({"prompt": prompts, "letter": letters}),
      processing_class=tokenizer, callbacks=[_Turns(self)],
    )  # fmt: skip
    self._clock: dict[str, float] = {}
    for phase, name in (("rollout", "_generate"), ("verdict", "_calculate_rewards"), ("inputs", "_prepare_inputs")):
      setattr(self._trainer, name, self._timed(phase, getattr(self._trainer, name)))
    self.description = (
      f"TRL on {torch.get_num_threads()} threads, fp32 weights, experts by {EXPERTS}, scan in chunks of {CHUNK}"
    )

  def _timed(self, phase: str, fn: Callable) -> Callable:
    def timed(*args, **kwargs):
      began = time.perf_counter()
      try:
        return fn(*args, **kwargs)
      finally:
        self._clock[phase] = self._clock.get(phase, 0.0) + time.perf_counter() - began

    return timed

  def prompt_tokens(self) -> list[list[int]]:
    """The prompts as TRL tokenizes them."""
    return self._trainer._tokenize_prompts(self._prompts)[0]

  def logprobs(self, row_BT: np.ndarray, new: int) -> np.ndarray:
    """fp32 [B, new]: log-probabilities of the last `new` tokens of each row, as in TRL's loss."""
    row_BT = torch.tensor(row_BT, dtype=torch.long)
    with torch.no_grad():
      return self._trainer._get_per_token_logps_and_entropies(
        self._trainer.model, row_BT, torch.ones_like(row_BT), new
      )[0].numpy()

  def __enter__(self):
    self._loop = self._thread.submit(self._train)
    return self

  def _train(self) -> None:
    try:
      self._trainer.train()
    finally:
      self._yours.release()

  def step(self) -> None:
    """Runs one step. Raises what the trainer raised."""
    before = len(self.seconds)
    self._mine.release()
    self._yours.acquire()
    if len(self.seconds) == before:
      self._loop.result()

  def __exit__(self, *_) -> None:
    self._ended = True
    self._mine.release()
    self._thread.shutdown()

  def began(self) -> None:
    """Called by the trainer's thread before a step; waits for `step`, or ends the thread."""
    self._mine.acquire()
    if self._ended:
      raise SystemExit
    self._clock.clear()
    self._clock["began"] = time.perf_counter()

  def ended(self) -> None:
    """Called by the trainer's thread after a step; records its times.

    Raises:
      RuntimeError: a completion stopped before its full length.
    """
    took, of = time.perf_counter() - self._clock["began"], self._clock
    (tokens,) = self._trainer._metrics["train"]["completions/mean_length"][-1:]
    if tokens != self._new_tokens:
      raise RuntimeError(f"a completion of TRL's stopped early: {tokens} tokens on average")
    self.seconds.append(took)
    self.phases.append(
      {
        "rollout": of["rollout"],
        "verdict": of["verdict"],
        "advantage": of["inputs"] - of["rollout"] - of["verdict"],
        "update": took - of["inputs"],
      }
    )
    self._yours.release()


class _Turns(TrainerCallback):
  """Calls the Trainer at the start and the end of each step."""

  def __init__(self, of: Trainer):
    self._of = of

  def on_step_begin(self, *_, **__):
    self._of.began()

  def on_step_end(self, *_, **__):
    self._of.ended()
