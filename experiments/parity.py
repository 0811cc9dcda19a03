"""Compares our model with transformers' layer by layer, on the same folder and the same random tokens.

  python -m experiments.parity --checkpoint=hf:DIR

Both compute in --dtype from the folder's weights. dt is clamped as in transformers. If the folder's config
has another clamp, a last line reports the error with that one. Needs the [hf] extra.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nemocascade.config import BLOCK_KINDS, ModelConfig
from nemocascade.errors import UserError
from nemocascade.field_table import DTYPES
from nemocascade.fields import text, whole, word
from nemocascade.model.hybrid import Block, Hybrid, init_params
from nemocascade.model.layers import RMSNorm
from nemocascade.runtime.launch import launch
from nemocascade.store import hf
from nemocascade.store.hf_layout import blocks


def run(checkpoint: str, tokens: int, new_tokens: int, dtype: str, seed: int) -> dict[str, float]:
  """Prints the table. Returns its rows: name -> relative error, or share of equal greedy tokens."""
  if not checkpoint.startswith(hf.PREFIX):
    raise UserError(f"--checkpoint={checkpoint!r}: give hf:DIR, a Hugging Face folder")
  theirs_of = _transformers()
  source = hf.open_source(checkpoint.removeprefix(hf.PREFIX))
  meant = dataclasses.replace(source.config, dtype=dtype, param_dtype=dtype)
  c = dataclasses.replace(meant, time_step_limit=(meant.time_step_min, math.inf))
  shapes = jax.eval_shape(functools.partial(init_params, c), jax.random.key(0))
  params = hf.load_params(source, shapes)
  tokens_BT = np.random.default_rng(seed).integers(0, c.vocab_size, (2, tokens))

  new_BN = greedy(c, params, tokens_BT, new_tokens)
  row_BT = np.concatenate([tokens_BT, new_BN], axis=1)
  expected = theirs_of(source.path, dtype, row_BT)
  rows = {}
  for name, found in states(c, params, row_BT):
    rows[name] = _relative(found, expected[name])
  print(f"{'':24} relative error ({dtype}, {row_BT.shape[0]} rows of {row_BT.shape[1]} tokens)")
  for name, error in rows.items():
    print(f"{name:24} {error:.1e}")
  same_BN = expected["logits"][:, tokens - 1 : -1].argmax(-1) == new_BN
  rows["greedy tokens"] = float(same_BN.mean())
  print(f"{'greedy tokens':24} {'  '.join(f'{same_N.sum()}/{new_tokens}' for same_N in same_BN)}")
  if meant.time_step_limit != c.time_step_limit:
    rows["without the clamp"] = _relative(logits_of(meant, params, row_BT), expected["logits"])
    print(
      f"this folder means dt in {list(meant.time_step_limit)}, which other commands compute: its logits are"
      f" {rows['without the clamp']:.1e} from transformers, which clamps dt at {meant.time_step_min}"
    )
  return rows


def states(c: ModelConfig, params, tokens_BT):
  """Yields (name, value) of the embedding, every layer's output, the last norm and the logits."""
  ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def block(letter, params, x_BTD):
    return Block(c, letter).apply({"params": params}, x_BTD, ids_BT)[0]

  x_BTD = params["embedding"].astype(c.dtype)[tokens_BT]
  yield "embedding", x_BTD
  for i, (letter, path, index) in enumerate(blocks(c.hybrid_override_pattern)):
    unit, name = path.split("/")
    own = jax.tree.map(lambda leaf, index=index: leaf[index], params[unit][name])
    x_BTD = block(letter, own, x_BTD)
    yield f"{i} {BLOCK_KINDS[letter]}", x_BTD
  yield "last norm", RMSNorm(c).apply({"params": params["norm_f"]}, x_BTD)
  yield "logits", logits_of(c, params, tokens_BT)  # From the whole model, so that its scans are compared too.


def logits_of(c: ModelConfig, params, tokens_BT):
  """fp32 logits [B, T, V]; each row is one document."""
  return jax.jit(Hybrid(c).apply)({"params": params}, jnp.array(tokens_BT), jnp.ones(tokens_BT.shape, jnp.int32))


def greedy(c: ModelConfig, params, prompt_BP, N: int) -> np.ndarray:
  """[B, N] greedy tokens, decoded by prefill and cached steps."""
  model, (B, P) = Hybrid(c), prompt_BP.shape

  @jax.jit
  def decode(params, prompt_BP):
    logits_BV, state = model.apply({"params": params}, prompt_BP, jnp.full((B,), P), P + N, method="prefill")

    def tick(carry, _):
      state, logits_BV = carry
      token_B = jnp.argmax(logits_BV, axis=-1)
      active_B = jnp.ones((B,), bool)
      return model.apply({"params": params}, state, token_B, active_B, method="step"), token_B

    return jax.lax.scan(tick, (state, logits_BV), length=N)[1].T

  return np.asarray(decode(params, jnp.array(prompt_BP)))


def _transformers():
  """A function (path, dtype, tokens_BT) -> transformers' states, fp32, named as in `states`.

  Raises:
    UserError: transformers or torch is not installed.
  """
  try:
    import torch
    from transformers import NemotronHForCausalLM
  except ImportError as error:
    raise UserError(
      f"parity compares with transformers 5 and torch, which are not installed ({error}): pip install -e '.[hf]'"
    ) from error

  def theirs(path: Path, dtype: str, tokens_BT) -> dict[str, np.ndarray]:
    model = NemotronHForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    pattern, found = model.config.hybrid_override_pattern, {}
    names = [f"{i} {BLOCK_KINDS[letter]}" for i, letter in enumerate(pattern)]
    modules = [model.model.embeddings, *model.model.layers, model.model.norm_f]
    for name, module in zip(["embedding", *names, "last norm"], modules, strict=True):
      module.register_forward_hook(lambda module, taken, given, name=name: found.update({name: given.float().numpy()}))
    with torch.no_grad():
      logits = model(torch.tensor(tokens_BT), use_cache=False).logits
    return found | {"logits": logits.float().numpy()}

  return theirs


def _relative(found, expected: np.ndarray) -> float:
  """|found - expected| / |expected|."""
  found = np.asarray(found, np.float32)
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
  launch(
    run,
    config=False,
    checkpoint=(text("hf:DIR, the folder to compare on.", empty=False), ""),
    tokens=(whole("Random tokens that each row begins with.", 2), 61),
    new_tokens=(whole("Tokens decoded greedily after them."), 64),
    dtype=(word(f"What both compute in: {' or '.join(DTYPES)}.", DTYPES), "float32"),
    seed=(whole("Seed of the random tokens.", 0), 0),
  )
