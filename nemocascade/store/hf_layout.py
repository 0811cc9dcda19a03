"""How Hugging Face tensors map to our parameter tree: names, shapes, transpositions.

"Their" and "theirs" mean Hugging Face's tensors, "our" and "ours" the leaves of our tree.
"""

import dataclasses
import math

import numpy as np

from nemocascade.config import ModelConfig
from nemocascade.model.pattern import plan


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one of their matrices is in our tree: leaf[index] = theirs.reshape(split).transpose(axes)."""

  leaf: str  # "units_0/blocks_1/mixer/up_proj"
  index: tuple[int, ...]  # (repeat of the unit, expert); only the axes that the leaf stacks.
  split: tuple[int, ...]
  axes: tuple[int, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of leaf[index]."""
    return tuple(self.split[axis] for axis in self.axes)

  def ours(self, theirs: np.ndarray) -> np.ndarray:
    return theirs.reshape(self.split).transpose(self.axes)

  def theirs(self, ours: np.ndarray) -> np.ndarray:
    """The inverse of `ours`, without joining the split dimensions."""
    return ours.transpose(np.argsort(self.axes))


@dataclasses.dataclass(frozen=True)
class Named:
  """One of their tensors. If it has several parts, they are stacked along its first axis."""

  name: str
  shape: tuple[int, ...]
  parts: tuple[Place, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
  """How a folder names its tensors; transformers loads all four combinations."""

  prefix: str = "backbone"  # Or "model".
  stacked: bool = False  # Whether the experts of a block are one 3-D tensor.


def tree_of(names) -> Tree:
  """How the tensors with these names are named."""
  return Tree(
    prefix="model" if any(name.startswith("model.") for name in names) else "backbone",
    stacked=any(name.endswith(".mixer.experts.up_proj") for name in names),
  )


def usual(name: str) -> str:
  """The name as transformers writes it; other code names the embedding differently."""
  for prefix in ("backbone", "model"):
    for other in ("embedding", "embed_tokens"):
      if name == f"{prefix}.{other}.weight":
        return f"{prefix}.embeddings.weight"
  return name


def layout(c: ModelConfig, tree: Tree) -> dict[str, Named]:
  """All their tensors by name, in the order of the blocks."""
  V, D = c.vocab_size, c.hidden_size
  entries = [_one(f"{tree.prefix}.embeddings.weight", (V, D), "embedding", ())]
  for i, (letter, block, index) in enumerate(blocks(c.hybrid_override_pattern)):
    prefix = f"{tree.prefix}.layers.{i}."
    entries.append(_one(f"{prefix}norm.weight", (D,), f"{block}/norm/weight", index))
    for name, leaf, split, axes, *flat in MIXERS[letter](c):
      shape = flat[0] if flat else split
      entries.append(Named(f"{prefix}mixer.{name}", shape, (Place(f"{block}/mixer/{leaf}", index, split, axes),)))
    if letter == "E":
      entries += _experts(c, prefix, block, index, tree)
  entries.append(_one(f"{tree.prefix}.norm_f.weight", (D,), "norm_f/weight", ()))
  if c.tie_word_embeddings:  # transformers does not tie weights: it needs the head as a separate tensor.
    entries.append(_one("lm_head.weight", (V, D), "embedding", ()))
  else:
    entries.append(Named("lm_head.weight", (V, D), (Place("lm_head", (), (V, D), (1, 0)),)))
  return {entry.name: entry for entry in entries}


def _one(name, shape, leaf, index):
  return Named(name, shape, (Place(leaf, index, shape, tuple(range(len(shape)))),))


def blocks(pattern: str):
  """Yields (letter, path in our tree, index in stacked leaves) of each block in order."""
  for u, (unit, repeats) in enumerate(plan(pattern)):
    for repeat in range(repeats):
      for b, letter in enumerate(unit):
        yield letter, f"units_{u}/blocks_{b}", (repeat,) if repeats > 1 else ()


def _experts(c: ModelConfig, prefix: str, block: str, index: tuple[int, ...], tree: Tree):
  E, F, L = c.n_routed_experts, c.moe_intermediate_size, c.moe_latent_size or c.hidden_size
  for name, shape in (("up_proj", (F, L)), ("down_proj", (L, F))):
    places = tuple(Place(f"{block}/mixer/{name}", (*index, e), shape, (1, 0)) for e in range(E))
    if tree.stacked:
      yield Named(f"{prefix}mixer.experts.{name}", (E, *shape), places)
    else:
      for e, place in enumerate(places):
        yield Named(f"{prefix}mixer.experts.{e}.{name}.weight", shape, (place,))


# Tensors of each mixer, without experts: (their name, our leaf, split, axes[, their shape if it is not split]).


def _linear(name, leaf, out, into):
  """Their linear weights are [out, in], ours are [in, out]."""
  return f"{name}.weight", leaf, (out, into), (1, 0)


def _mamba(c: ModelConfig):
  D, I, M, W = c.hidden_size, c.mamba_inner_size, c.mamba_num_heads, c.conv_kernel
  C = I + 2 * c.n_groups * c.ssm_state_size
  yield _linear("in_proj", "in_proj", I + C + M, D)
  yield "conv1d.weight", "conv1d", (C, W), (1, 0), (C, 1, W)
  if c.use_conv_bias:
    yield "conv1d.bias", "conv1d_bias", (C,), (0,)
  for name in ("A_log", "D", "dt_bias"):
    yield name, name, (M,), (0,)
  yield "norm.weight", "norm", (I,), (0,)
  yield _linear("out_proj", "out_proj", D, I)


def _attention(c: ModelConfig):
  D, K, H = c.hidden_size, c.num_key_value_heads, c.head_dim
  R = c.num_attention_heads // K
  yield "q_proj.weight", "q_proj", (K, R, H, D), (3, 0, 1, 2), (K * R * H, D)
  for name in ("k_proj", "v_proj"):
    yield f"{name}.weight", name, (K, H, D), (2, 0, 1), (K * H, D)
  yield "o_proj.weight", "o_proj", (D, K, R, H), (1, 2, 3, 0), (D, K * R * H)


def _moe(c: ModelConfig):
  D, S, L = c.hidden_size, c.moe_shared_expert_intermediate_size, c.moe_latent_size
  yield _linear("gate", "gate", c.n_routed_experts, D)
  yield "gate.e_score_correction_bias", "e_score_correction_bias", (c.n_routed_experts,), (0,)
  if L:
    yield _linear("fc1_latent_proj", "fc1_latent_proj", L, D)
    yield _linear("fc2_latent_proj", "fc2_latent_proj", D, L)
  yield _linear("shared_experts.up_proj", "shared_up_proj", S, D)
  yield _linear("shared_experts.down_proj", "shared_down_proj", D, S)


def _mlp(c: ModelConfig):
  yield _linear("up_proj", "up_proj", c.intermediate_size, c.hidden_size)
  yield _linear("down_proj", "down_proj", c.hidden_size, c.intermediate_size)


MIXERS = {"M": _mamba, "*": _attention, "E": _moe, "-": _mlp}


def part_bytes(named: Named, itemsize: int) -> int:
  """The number of bytes in each part of one of their tensors."""
  return itemsize * math.prod(named.shape) // len(named.parts)
