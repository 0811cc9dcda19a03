"""The hybrid model: embedding, blocks in a pattern, head; for whole rows, prefill and one decoded token."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.kernels.distillation import top_logprobs
from nemocascade.kernels.product import product
from nemocascade.kernels.token_logprob import token_logprob
from nemocascade.mesh import constrain_batch, constrain_rows
from nemocascade.model.attention import Attention
from nemocascade.model.decode_state import DecodeState, at_repeat, grow, repeat_state
from nemocascade.model.layers import MLP, RMSNorm, normal
from nemocascade.model.mamba import Mamba
from nemocascade.model.moe import MoE
from nemocascade.model.pattern import plan
from nemocascade.model.remat import block_input, rematerialized
from nemocascade.model.routing import all_blocks, of_units, record_of
from nemocascade.model.sampling_weights import STEPS
from nemocascade.model.sequence_parallel import Layout, layout
from nemocascade.segments import segment_starts
from nemocascade.types import DistanceFn, Params, Prefix, Prompts, Routing, Scores

MIXERS = {"M": Mamba, "E": MoE, "*": Attention, "-": MLP}


class Block(nn.Module):
  """A residual block: a call returns (x + mixer(norm(x)), Routing of an MoE block or None)."""

  config: ModelConfig
  letter: str
  mesh: Mesh | None = None
  samples: bool = False

  def setup(self):
    self.norm = RMSNorm(self.config)
    where = {"-": (), "E": (self.mesh, self.samples)}  # An MLP treats each token independently.
    self.mixer = MIXERS[self.letter](self.config, *where.get(self.letter, (self.mesh,)))

  def _on(self, x_BTD) -> Layout:
    return layout(self.config, self.mesh, x_BTD.shape[0])

  def __call__(self, x_BTD, segment_ids_BT, recorded_BTX=None):
    x_BTD = block_input(x_BTD)
    y, routing = self.mixer(self.norm(x_BTD), segment_ids_BT, *[recorded_BTX] * (self.letter == "E")), None
    if self.letter == "E":
      y, routing = y
    return self._on(x_BTD).constrain(x_BTD + y), routing

  def prefill(self, x_BTD, segment_ids_BT, recorded_BTX=None):
    if self.letter == "E":
      x_BTD, routing = self(x_BTD, segment_ids_BT, recorded_BTX)
      return x_BTD, self.mixer.fresh_state(x_BTD.shape[0]), routing
    x_BTD = block_input(x_BTD)
    y, state = self.mixer.prefill(self.norm(x_BTD), segment_ids_BT)
    return self._on(x_BTD).constrain(x_BTD + y), state, None

  def after(self, state, x_BTD, segment_ids_BT, length_B, recorded_BTX=None):
    if self.letter == "E":
      return self(x_BTD, segment_ids_BT, recorded_BTX)
    return self.extend(state, x_BTD, segment_ids_BT, length_B)[1:]

  def extend(self, state, x_BTD, segment_ids_BT, length_B):
    if self.letter == "E":
      return state, *self(x_BTD, segment_ids_BT)
    x_BTD = block_input(x_BTD)
    state, y = self.mixer.extend(state, self.norm(x_BTD), segment_ids_BT, length_B)
    return state, self._on(x_BTD).constrain(x_BTD + y), None

  def step(self, state, x_BD, length_B, active_B, at=None):
    at = (at,) if self.letter == "*" else ()
    state, y = self.mixer.step(state, self.norm(x_BD), length_B, active_B, *at)
    return state, constrain_rows(x_BD + y, self.mesh)


class Unit(nn.Module):
  """Consecutive blocks. Its methods have the signature of a scan's body: (carry, slices and shared values ...).

  `recorded` has the sampler's experts for each block, [B, T, X], or is None.
  """

  config: ModelConfig
  letters: str
  mesh: Mesh | None = None
  samples: bool = False

  def setup(self):
    block = rematerialized(Block, self.config.remat, methods=["__call__", "prefill", "after"])
    self.blocks = [block(self.config, letter, self.mesh, self.samples) for letter in self.letters]

  def _each(self, recorded):
    return zip(self.blocks, recorded or (None,) * len(self.blocks), strict=True)

  def __call__(self, x_BTD, segment_ids_BT, recorded):
    routings = []
    for block, recorded_BTX in self._each(recorded):
      x_BTD, routing = block(x_BTD, segment_ids_BT, recorded_BTX)
      routings.append(routing)
    return x_BTD, tuple(routings)

  def prefill(self, x_BTD, segment_ids_BT, recorded):
    states, routings = [], []
    for block, recorded_BTX in self._each(recorded):
      x_BTD, state, routing = block.prefill(x_BTD, segment_ids_BT, recorded_BTX)
      states.append(state)
      routings.append(routing)
    return x_BTD, (tuple(states), tuple(routings))

  def after(self, x_BTD, state, segment_ids_BT, length_B, recorded):
    routings = []
    for (block, recorded_BTX), block_state in zip(self._each(recorded), state, strict=True):
      x_BTD, routing = block.after(block_state, x_BTD, segment_ids_BT, length_B, recorded_BTX)
      routings.append(routing)
    return x_BTD, tuple(routings)

  def extend(self, x_BTD, state, segment_ids_BT, length_B):
    states, routings = [], []
    for block, block_state in zip(self.blocks, state, strict=True):
      block_state, x_BTD, routing = block.extend(block_state, x_BTD, segment_ids_BT, length_B)
      states.append(block_state)
      routings.append(routing)
    return x_BTD, tuple(states), tuple(routings)

  def step(self, x_BD, state, length_B, active_B, at=None):
    """`at`: the repeat of this unit, if its key-value caches are those of all repeats; other states are its own."""
    states = []
    for block, block_state in zip(self.blocks, state, strict=True):
      block_state, x_BD = block.step(block_state, x_BD, length_B, active_B, at)
      states.append(block_state)
    return x_BD, tuple(states), ()

  def extend_at(self, carry, i, *shared):
    return at_repeat(self.extend, carry, i, *shared)

  def step_at(self, carry, i, *shared):
    # A copy of a whole cache would cost more than the rest of a step.
    return at_repeat(self.step, carry, i, *shared, i, stacked_caches=True)


def _scanned(n: int):
  """A Unit that is scanned n times over stacked parameters."""
  shared = dict(
    variable_axes={"params": 0, STEPS: 0},
    split_rngs={"params": True},
    length=n,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  rows = dict(in_axes=(nn.broadcast, 0), **shared)
  after = dict(in_axes=(0, nn.broadcast, nn.broadcast, 0), **shared)
  sliced = dict(in_axes=(0, nn.broadcast, nn.broadcast), **shared)
  methods = {"__call__": rows, "prefill": rows, "after": after} | dict.fromkeys(("extend_at", "step_at"), sliced)
  return nn.scan(Unit, methods=methods)


class Hybrid(nn.Module):
  """The language model. All methods are pure: call `apply({"params": params}, ..., method=name)`.

  With a mesh, rows are sharded over its devices and experts over its axis `expert`; results are the same. With
  config.sequence_parallel, rows that would not fill the devices are split by tokens (model/sequence_parallel.py).
  `samples`: whether its weights are those of sampling (config.sampling_weights). It changes no number.
  """

  config: ModelConfig
  mesh: Mesh | None = None
  samples: bool = False

  def setup(self):
    c = self.config
    V, D = c.vocab_size, c.hidden_size
    self.embedding = self.param("embedding", normal(c, "vocab", "embed"), (V, D), c.param_dtype)
    self.plan = plan(c.hybrid_override_pattern)
    unit = lambda letters, n: (Unit if n == 1 else _scanned(n))(c, letters, self.mesh, self.samples)
    self.units = [unit(letters, n) for letters, n in self.plan]
    self.norm_f = RMSNorm(c)
    if not c.tie_word_embeddings:
      self.lm_head = self.param("lm_head", normal(c, "embed", "vocab"), (D, V), c.param_dtype)

  def _embed(self, tokens):
    # Cast after the look-up, so that gradients of repeated tokens are summed in the parameter's dtype.
    x = self.embedding[tokens].astype(self.config.dtype)
    return self._on(tokens).constrain(x) if tokens.ndim > 1 else constrain_rows(x, self.mesh)

  def _on(self, tokens_BT) -> Layout:
    return layout(self.config, self.mesh, tokens_BT.shape[0])

  def _padded(self, *arrays_BT):
    """The arrays, padded with 0 at the end of the rows to a length that the layout allows; None stays None."""
    B, T = arrays_BT[0].shape[:2]
    more = layout(self.config, self.mesh, B).length(T, self.config) - T
    pad = lambda a: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2))
    return [a_BT if a_BT is None else pad(a_BT) for a_BT in arrays_BT]

  def _recorded(self, experts_BTY):
    """(unit, its record) of all units."""
    return zip(self.units, of_units(experts_BTY, self.plan, self.config.num_experts_per_tok), strict=True)

  def head(self):
    head = self.embedding.T if self.config.tie_word_embeddings else self.lm_head
    return head.astype(self.config.dtype)

  def hidden(self, tokens_BT, segment_ids_BT, experts_BTY=None):
    """(h_BTD after the final norm, Routing of all MoE blocks in order, or None without MoE blocks).

    Args:
      experts_BTY: the sampler's experts (see Rollout). The routers take them if config.router_replay is set,
        otherwise they compare them with their own choice.
    """
    T = tokens_BT.shape[1]
    tokens_BT, segment_ids_BT, experts_BTY = self._padded(tokens_BT, segment_ids_BT, experts_BTY)
    x_BTD, routings = self._embed(tokens_BT), []
    for unit, recorded in self._recorded(experts_BTY):
      x_BTD, routing = unit(x_BTD, segment_ids_BT, recorded)
      routings.append(routing)
    return self.norm_f(x_BTD)[:, :T], all_blocks(routings)

  def logits(self, tokens_BT, segment_ids_BT):
    """fp32 [B, T, V]: entry t predicts token t + 1."""
    h_BTD, _ = self.hidden(tokens_BT, segment_ids_BT)
    return product(h_BTD, self.head(), 1, jnp.float32)

  __call__ = logits

  def states(self, tokens_BT, segment_ids_BT, experts_BTY=None):
    """(x_BTD, Routing or None): token t is predicted from x[t], with logits x[t] @ head; x[0] is 0."""
    T = tokens_BT.shape[1]
    tokens_BT, segment_ids_BT, experts_BTY = self._padded(tokens_BT, segment_ids_BT, experts_BTY)
    h_BTD, routing = self.hidden(tokens_BT, segment_ids_BT, experts_BTY)
    return self._on(tokens_BT).shift(h_BTD)[:, :T], routing

  def take_in(self, prompts: Prompts) -> tuple[Prefix, Routing | None]:
    """Prefills each prompt once for all rows that continue it: (Prefix, Routing or None)."""
    last_QD, state, routing = self._take_in(prompts.tokens_QP, prompts.length_Q, prompts.experts_QPY)
    return Prefix(self.norm_f(last_QD), state.units), routing

  def states_after(self, prefix: Prefix, length_Q, tokens_BT, segment_ids_BT, experts_BTY=None):
    """`states` of rows whose first document continues a prompt; the Routing does not include the prompts.

    Args:
      length_Q: int32, lengths of the prompts; each has B // Q consecutive rows.
    """
    (B, T), G = tokens_BT.shape, tokens_BT.shape[0] // length_Q.shape[0]
    tokens_BT, segment_ids_BT, experts_BTY = self._padded(tokens_BT, segment_ids_BT, experts_BTY)
    state = repeat_state(self._decode_state(length_Q, prefix.units), G)
    if self.mesh is not None:
      state = constrain_batch(state, B, self.mesh)
    x_BTD, routings = self._embed(tokens_BT), []
    for (unit, recorded), unit_state in zip(self._recorded(experts_BTY), state.units, strict=True):
      x_BTD, routing = unit.after(x_BTD, unit_state, segment_ids_BT, state.length_B, recorded)
      routings.append(routing)
    on, before_B1D = self._on(tokens_BT), jnp.repeat(prefix.last_QD, G, axis=0)[:, None]
    return on.constrain(on.shift(self.norm_f(x_BTD), before_B1D))[:, :T], all_blocks(routings)

  def score(
    self, tokens_BT, segment_ids_BT, wanted_BT=None, distance: DistanceFn | None = None,
    after: tuple[Prefix, jax.Array] | None = None, temperature=1.0, experts_BTY=None,
  ) -> Scores:  # fmt: skip
    """log p(token t | earlier tokens of its document) with p = softmax(logits / temperature).

    It makes no [B, T, V] array.

    Args:
      wanted_BT: bool, the tokens to score, or None for all. Others get 0.
      distance: computes Scores.distance_BT; it has its own temperature.
      after: (Prefix, length_Q) of the prompts that the rows' first documents continue, or None.
      temperature: scalar above 0, traced or not; for log-probabilities and entropy.
      experts_BTY: as in `hidden`.
    """
    T, tokens = tokens_BT.shape[1], self._padded(tokens_BT, segment_ids_BT, wanted_BT, experts_BTY)
    tokens_BT, segment_ids_BT, wanted_BT, experts_BTY = tokens
    if after is None:
      x_BTD, routing = self.states(tokens_BT, segment_ids_BT, experts_BTY)
    else:
      x_BTD, routing = self.states_after(*after, tokens_BT, segment_ids_BT, experts_BTY)
    scored_BT = _predicted(segment_ids_BT, wanted_BT, goes_on=after is not None)
    # Each device applies the whole head to its own tokens, so that the head's gradient is summed once.
    on_own = self._on(tokens_BT).on_own
    logprob = on_own(token_logprob, shared=[1, 4])
    logprob_BT, entropy_BT, normalizer_BT = logprob(x_BTD, self.head(), tokens_BT, scored_BT, jnp.float32(temperature))
    distance_BT = distance(x_BTD, self.head(), scored_BT, on_own) if distance else None
    return Scores(logprob_BT[:, :T], entropy_BT[:, :T], routing, distance_BT, normalizer_BT[:, :T])

  def likeliest(self, tokens_BT, segment_ids_BT, wanted_BT, k: int, temperature=1.0, experts_BTY=None):
    """(tokens_BTK, logprobs_BTK) of the k most likely tokens at place t; 0 where not wanted."""
    T, tokens = tokens_BT.shape[1], self._padded(tokens_BT, segment_ids_BT, wanted_BT, experts_BTY)
    tokens_BT, segment_ids_BT, wanted_BT, experts_BTY = tokens
    x_BTD, _ = self.states(tokens_BT, segment_ids_BT, experts_BTY)
    top = self._on(tokens_BT).on_own(functools.partial(top_logprobs, k=k), shared=[1, 3])
    found = top(x_BTD, self.head(), _predicted(segment_ids_BT, wanted_BT), jnp.float32(temperature))
    return tuple(a_BTK[:, :T] for a_BTK in found)

  def _next(self, x_BD):
    """fp32 logits_BV of the next token."""
    return constrain_rows(product(self.norm_f(x_BD), self.head(), 1, jnp.float32), self.mesh)

  def prefill(self, tokens_BT, length_B, capacity: int):
    """Processes each row's first length_B tokens: (logits_BV of the next token, DecodeState).

    Args:
      capacity: places in the key-value caches, at least T.
    """
    return self.prefill_recorded(tokens_BT, length_B, capacity)[:2]

  def prefill_recorded(self, tokens_BT, length_B, capacity: int):
    """`prefill` of a model whose config has router_record: (logits_BV, DecodeState, experts_BTY of the tokens).

    After each `step`, `experts_of` the state has the experts of the token that was taken in.
    """
    T = tokens_BT.shape[1]
    last_BD, state, routing = self._take_in(tokens_BT, length_B)
    return self._next(last_BD), grow(state, capacity), record_of(routing, length_B, T)

  def _take_in(self, tokens_BT, length_B, experts_BTY=None):
    """(last_BD: each row's last token before the final norm, DecodeState of at least T places, Routing or None)."""
    (experts_BTY,) = [None] if experts_BTY is None else self._padded(experts_BTY)
    tokens_BT, segment_ids_BT = self._given(tokens_BT, length_B)
    x_BTD, states, routings = self._embed(tokens_BT), [], []
    for unit, recorded in self._recorded(experts_BTY):
      x_BTD, (state, routing) = unit.prefill(x_BTD, segment_ids_BT, recorded)
      states.append(state)
      routings.append(routing)
    return self._last(x_BTD, length_B), self._decode_state(length_B, tuple(states)), all_blocks(routings)

  def _given(self, tokens_BT, length_B):
    """(tokens_BT padded as the layout needs, segment_ids_BT of rows whose first length_B tokens are one document)."""
    (tokens_BT,) = self._padded(tokens_BT)
    return tokens_BT, (jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]).astype(jnp.int32)

  def _last(self, x_BTD, length_B):
    return self._on(x_BTD).take(x_BTD, length_B[:, None] - 1)[:, 0]

  def _decode_state(self, length_B, units: tuple) -> DecodeState:
    return DecodeState(length_B.astype(jnp.int32), units, tuple(n > 1 for _, n in self.plan))

  def extend(self, state: DecodeState, tokens_BT, length_B):
    """Processes each row's next length_B tokens at once: (state, logits_BV of the token after them).

    It equals `step` token by token, within rounding. A row whose length_B is 0 keeps its state; its logits mean
    nothing. The caches need room: at most `places` tokens a row, old and new ones together.
    """
    return self.extend_recorded(state, tokens_BT, length_B)[:2]

  def extend_recorded(self, state: DecodeState, tokens_BT, length_B):
    """`extend` of a model whose config has router_record: (state, logits_BV, experts_BTY of the tokens)."""
    T = tokens_BT.shape[1]
    tokens_BT, segment_ids_BT = self._given(tokens_BT, length_B)
    x_BTD, units, routing = self._go_on("extend", state, self._embed(tokens_BT), segment_ids_BT, state.length_B)
    state = state.replace(length_B=state.length_B + length_B.astype(jnp.int32), units=units)
    return state, self._next(self._last(x_BTD, length_B)), record_of(routing, length_B, T)

  def step(self, state: DecodeState, tokens_B, active_B):
    """Processes one token of every active row: (state, logits_BV of the next token). See sampling_weights.for_steps."""
    x_BD, units, _ = self._go_on("step", state, self._embed(tokens_B), state.length_B, active_B)
    return state.replace(length_B=state.length_B + active_B.astype(jnp.int32), units=units), self._next(x_BD)

  def _go_on(self, method: str, state: DecodeState, x, *shared):
    """(x after all units, their new states, Routing or None); `method` is "extend" or "step", which has no Routing."""
    states, routings = [], []
    for unit, unit_state, (_, n) in zip(self.units, state.units, self.plan, strict=True):
      if n == 1:
        x, unit_state, routing = getattr(unit, method)(x, unit_state, *shared)
      else:
        (x, unit_state), routing = getattr(unit, f"{method}_at")((x, unit_state), jnp.arange(n), *shared)
      states.append(unit_state)
      routings.append(routing)
    return x, tuple(states), all_blocks(routings)


def _predicted(segment_ids_BT, wanted_BT=None, *, goes_on: bool = False):
  """bool [B, T]: the wanted tokens that have an earlier token in their document."""
  starts_BT = segment_starts(segment_ids_BT)
  if goes_on:  # The first document began before the row.
    starts_BT = starts_BT.at[:, 0].set(False)
  scored_BT = (segment_ids_BT > 0) & ~starts_BT
  return scored_BT if wanted_BT is None else scored_BT & wanted_BT


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh parameters, without partitioning metadata."""
  return nn.meta.unbox(_init(config, key))


def _init(config: ModelConfig, key):
  tokens_BT = jnp.zeros((1, 8), jnp.int32)
  return Hybrid(config).init(key, tokens_BT, tokens_BT + 1)["params"]


def logical_axes(config: ModelConfig):
  """A tree like that of init_params, with a tuple of logical axis names for each array."""
  return axes_of(functools.partial(_init, config))


def axes_of(init):
  """The logical axes of the parameters that `init(key)` returns with partitioning metadata."""
  specs = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
  return jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))
