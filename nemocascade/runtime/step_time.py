"""Seconds of an RL step on a TPU slice at the limits of its chips, from counts of tokens and sizes of arrays.

Nothing runs, so these are lower bounds: every chip computes at its peak or moves bytes at its full rate, whichever
takes longer. docs/pod.md has the results and says what they leave out.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nemocascade.config import ModelConfig
from nemocascade.errors import UserError, unknown
from nemocascade.model.hybrid import Hybrid, init_params
from nemocascade.model.sampling_weights import GATHERED
from nemocascade.model.size import matmul_params
from nemocascade.rollout import episode
from nemocascade.runtime import signals
from nemocascade.runtime.meter import PEAK_FLOPS
from nemocascade.sandbox import limited

WEIGHT = 2  # Bytes of a parameter in products, bf16.
STATE = 12  # Bytes of a parameter in a checkpoint: itself and Adam's moments, fp32.
# Bytes that the processes exchange for a completion: its verdict with a reason of 200 characters, and its lengths and
# flags, as JSON.
EXCHANGED = 320
# Seconds of process 0 for each process in an exchange of small messages: 0.9 ms for 16 processes, 7 ms for 128.
MET = 55e-6
TEXT = 4  # Bytes of a token in samples.jsonl, whose completions are exchanged as texts.
# Forward passes that a training step costs in FLOPs (the backward pass as two), and in rows sent to experts: forward,
# its recomputation, and backward.
PASSES, SENDS = 4, 3


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of a chip and its host."""

  flops: float  # bf16 FLOP/s.
  memory: float  # Bytes/s of its HBM.
  links: float  # Bytes/s that it receives from other chips: half of the bidirectional figure.
  network: float  # Bytes/s of the data centre network, of a chip's share.
  cores: int  # vCPUs of a host.
  of_host: int  # Chips of a host.


# https://cloud.google.com/tpu/docs/v5p-training
CHIPS = {"v5p": Chip(PEAK_FLOPS["TPU v5p"], 2.765e12, 600e9, 50e9 / 8, cores=208, of_host=4)}


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a step.

  Attributes:
    seconds: at the limit.
    limit: what takes that long: "FLOPs", "HBM", "links", "cores", "network" or "process_0".
    parts: limit -> the seconds that it alone would take.
  """

  name: str
  seconds: float
  limit: str
  parts: dict[str, float]

  @classmethod
  def of(cls, name: str, **parts: float) -> "Phase":
    limit = max(parts, key=lambda part: parts[part])
    return cls(name, parts[limit], limit, parts)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a model that a step's time depends on.

  Attributes:
    matmul: parameters multiplied for a token.
    shared, routed: the parameters outside and inside the routed experts, without those of an untied embedding.
    params: all of them.
    state: bytes of a row's decode state without key-value caches.
    cache: bytes of key-value caches a token.
    attention: FLOPs of a token's attention for each token that it sees.
    sent: bytes that a token sends to its experts and gets back in a forward pass, if all are on other chips.
  """

  matmul: int
  shared: int
  routed: int
  params: int
  state: int
  cache: int
  attention: int
  sent: int

  @classmethod
  @functools.cache
  def of(cls, config: ModelConfig) -> "Sizes":
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    blocks = config.hybrid_override_pattern.count
    width = config.moe_latent_size or config.hidden_size
    routed = blocks("E") * config.n_routed_experts * 2 * width * config.moe_intermediate_size
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    state_of = lambda tokens: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_state(config, tokens)))
    short, long = state_of(config.chunk_size), state_of(2 * config.chunk_size)
    cache = (long - short) // config.chunk_size
    return cls(
      matmul_params(config), params - routed - embedding, routed, params, short - cache * config.chunk_size, cache,
      blocks("*") * 4 * config.num_attention_heads * config.head_dim,
      blocks("E") * config.num_experts_per_tok * 2 * width * WEIGHT,
    )  # fmt: skip

  def forward(self, tokens: float, seen: float) -> float:
    """FLOPs of a forward pass over tokens that see `seen` earlier ones on average."""
    return tokens * (2 * self.matmul + self.attention * seen)


def _state(config: ModelConfig, tokens: int):
  """The shapes of the decode state of one row with room for `tokens` tokens."""
  struct = jax.ShapeDtypeStruct
  shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
  prefill = lambda params, *rows: Hybrid(config).apply({"params": params}, *rows, tokens, method="prefill")
  rows = struct((1, config.chunk_size), jnp.int32), struct((1,), jnp.int32)
  return jax.eval_shape(prefill, shapes, *rows)[1].units


def chips_of(topology: str) -> tuple[Chip, int]:
  """(the chip, their number) of a slice such as v5p:4x4x4.

  Raises:
    UserError: a kind of chip without figures here, or another form.
  """
  kind, _, shape = topology.partition(":")
  if kind not in CHIPS:
    raise unknown(f"kind of chip in --topology={topology!r}", kind, CHIPS)
  if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape):
    raise UserError(f"--topology={topology!r}: give KIND:CHIPSxCHIPS, such as v5p:4x4x4")
  return CHIPS[kind], math.prod(int(side) for side in shape.split("x"))


def step(
  c: ConfigDict, topology: str, *, verify: float, verifiers: int = limited.WORKERS, length: float = 1.0
) -> list[Phase]:
  """The phases of a step of an RL stage whose completions are all equally long.

  All rows are decoded by one program. The weights that a chip lacks are gathered once a step before that
  (model.sampling_weights="gathered"), or for every token. The other phases gather them a few times a step, which is
  little beside their FLOPs and left out. Tokens are sent to the experts' chips.

  Args:
    verify: CPU seconds of parsing and verifying a completion.
    verifiers: completions that a host verifies at once.
    length: of the completions, as a share of the most tokens.

  Raises:
    UserError: see `chips_of`; or the mesh does not divide the slice.
  """
  chip, n = chips_of(topology)
  model = ModelConfig.from_fields(c.model.to_dict())
  r, of = c.rollout, Sizes.of(model)
  expert = c.mesh.expert if c.mesh.expert > 0 else n // c.mesh.data
  if n % expert:
    raise UserError(f"mesh.expert={expert} does not divide the {n} chips of {topology}")
  B, sampled = r.prompts * r.completions, length * (r.total_tokens - r.prompt_tokens)
  tokens = r.prompt_tokens + sampled
  flops, links = of.forward(B * tokens, tokens / 2) / (n * chip.flops), B * tokens * of.sent / (n * chip.links)
  links *= (expert - 1) / expert
  scored, hosts = sum(signal.phase == "score" for signal in signals.wanted(c)), -(-n // chip.of_host)
  return [
    *_decode(of, chip, n, expert, -(-B // n), r.prompt_tokens, sampled, model.sampling_weights == GATHERED),
    Phase.of("verify", cores=B * verify / (hosts * verifiers)),
    Phase.of(
      "exchange",
      network=exchanged(c) * hosts / (chip.network * chip.of_host),
      process_0=sampled / episode.look(hosts) * hosts * MET,
    ),
    *[Phase.of("score", FLOPs=scored * flops, links=scored * links)] * bool(scored),
    Phase.of("train", FLOPs=PASSES * flops * c.updates, links=SENDS * links * c.updates),
    Phase.of("save", network=of.params * STATE / c.save_every / (n * chip.network)),
  ]


def exchanged(c: ConfigDict) -> int:
  """Bytes that the processes of a step exchange. Process 0 gets all of them, and sends them to every process."""
  r = c.rollout
  return r.prompts * r.completions * EXCHANGED + min(c.samples, r.prompts) * r.total_tokens * TEXT


def cores(topology: str) -> int:
  """The vCPUs of all hosts of a slice."""
  chip, n = chips_of(topology)
  return n * chip.cores // chip.of_host


def _decode(
  of: Sizes, chip: Chip, n: int, expert: int, rows: int, prompt: int, sampled: float, gathered: bool
) -> list[Phase]:
  """Decoding `sampled` tokens of `rows` rows a chip, of `n` chips in groups of `expert` that share the experts.

  Args:
    gathered: whether the weights are gathered once a step; then they are a phase of their own.
  """
  weights = WEIGHT * (of.shared + of.routed / expert)  # What a chip's rows are multiplied with.
  missing = weights - WEIGHT * (of.shared + of.routed) / n
  seen = prompt + sampled / 2
  states = rows * (2 * of.state + of.cache * seen)
  sent = rows * of.sent * (expert - 1) / expert
  # What is gathered is written and read; what stays is read.
  moved, received = (weights, sent) if gathered else (2 * weights, sent + missing)
  decode = Phase.of(
    "decode",
    FLOPs=sampled * of.forward(rows, seen) / chip.flops,
    HBM=sampled * (moved + states) / chip.memory,
    links=sampled * received / chip.links,
  )
  return [*[Phase.of("reshard", HBM=weights / chip.memory, links=missing / chip.links)] * gathered, decode]
