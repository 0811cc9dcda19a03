"""The hybrid: embedding, a pattern of blocks, head; as rows, as prefill, as one decoded token."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.kernels.distillation import top_logprobs
from nemocascade.kernels.product import product
from nemocascade.kernels.token_logprob import token_logprob
from nemocascade.mesh import constrain_batch, constrain_rows, on_own_rows
from nemocascade.model.attention import Attention
from nemocascade.model.layers import MLP, RMSNorm, normal
from nemocascade.model.mamba import Mamba
from nemocascade.model.moe import MoE
from nemocascade.segments import segment_starts
from nemocascade.types import DistanceFn, Params, Prefix, Prompts, Routing, Scores

# Repeats that make a loop: it copies each one's parameters and states at every pass, so that two are
# faster one after the other.
REPEATS = 3
MIXERS = {"M": Mamba, "E": MoE, "*": Attention, "-": MLP}


@struct.dataclass
class DecodeState:
  """All that decoding remembers of B rows."""

  length_B: jax.Array  # int32; tokens taken in so far.
  units: tuple  # The state of each unit of the pattern.
  stacked: tuple[bool, ...] = struct.field(pytree_node=False)  # Units whose leaves are [n, B, ...].


def plan(pattern: str) -> list[tuple[str, int]]:
  """The pattern as (unit, repeats): greedily the unit that covers most from where it stands.

  Repeats are scanned, so that a model of many blocks compiles as few.
  """
  units, at = [], 0
  while at < len(pattern):
    best = (pattern[at], 1)
    for size in range(1, (len(pattern) - at) // 2 + 1):
      unit, n = pattern[at : at + size], 1
      while pattern.startswith(unit, at + n * size):
        n += 1
      if n >= REPEATS and n * size > len(best[0]) * best[1]:
        best = (unit, n)
    units.append(best)
    at += len(best[0]) * best[1]
  # Neighbours that do not repeat are one unit.
  merged: list[tuple[str, int]] = []
  for unit, n in units:
    if n == 1 and merged and merged[-1][1] == 1:
      merged[-1] = (merged[-1][0] + unit, 1)
    else:
      merged.append((unit, n))
  return merged


class Block(nn.Module):
  """x + mixer(norm(x)); what an MoE's router did comes out beside it."""

  config: ModelConfig
  letter: str
  mesh: Mesh | None = None

  def setup(self):
    self.norm = RMSNorm(self.config)
    # Of all mixers only experts lie apart.
    where = (self.mesh,) if self.letter == "E" else ()
    self.mixer = MIXERS[self.letter](self.config, *where)

  def __call__(self, x_BTD, segment_ids_BT):
    y = self.mixer(self.norm(x_BTD), segment_ids_BT)
    y, routing = y if self.letter == "E" else (y, None)
    return constrain_rows(x_BTD + y, self.mesh), routing

  def prefill(self, x_BTD, segment_ids_BT):
    if self.letter == "E":
      x_BTD, routing = self(x_BTD, segment_ids_BT)
      return x_BTD, (), routing
    y, state = self.mixer.prefill(self.norm(x_BTD), segment_ids_BT)
    return constrain_rows(x_BTD + y, self.mesh), state, None

  def extend(self, state, x_BTD, segment_ids_BT, length_B):
    if self.letter == "E":
      return self(x_BTD, segment_ids_BT)
    y = self.mixer.extend(state, self.norm(x_BTD), segment_ids_BT, length_B)
    return constrain_rows(x_BTD + y, self.mesh), None

  def step(self, state, x_BD, length_B, active_B):
    state, y = self.mixer.step(state, self.norm(x_BD), length_B, active_B)
    return state, constrain_rows(x_BD + y, self.mesh)


class Unit(nn.Module):
  """A run of blocks. Its methods have the signature of a scan: (carry, slice, shared ...)."""

  config: ModelConfig
  letters: str
  mesh: Mesh | None = None

  def setup(self):
    block = nn.remat(Block, methods=["__call__", "prefill", "extend"]) if self.config.remat else Block
    self.blocks = [block(self.config, letter, self.mesh) for letter in self.letters]

  def __call__(self, x_BTD, segment_ids_BT):
    routings = []
    for block in self.blocks:
      x_BTD, routing = block(x_BTD, segment_ids_BT)
      routings.append(routing)
    return x_BTD, tuple(routings)

  def prefill(self, x_BTD, segment_ids_BT):
    states, routings = [], []
    for block in self.blocks:
      x_BTD, state, routing = block.prefill(x_BTD, segment_ids_BT)
      states.append(state)
      routings.append(routing)
    return x_BTD, (tuple(states), tuple(routings))

  def extend(self, x_BTD, state, segment_ids_BT, length_B):
    routings = []
    for block, block_state in zip(self.blocks, state, strict=True):
      x_BTD, routing = block.extend(block_state, x_BTD, segment_ids_BT, length_B)
      routings.append(routing)
    return x_BTD, tuple(routings)

  def step(self, x_BD, state, length_B, active_B):
    states = []
    for block, block_state in zip(self.blocks, state, strict=True):
      block_state, x_BD = block.step(block_state, x_BD, length_B, active_B)
      states.append(block_state)
    return x_BD, tuple(states)

  def step_at(self, carry, i, length_B, active_B):
    """`step` of the i-th repeat, whose state is replaced among those of all: (x_BD, stacked state)."""
    x_BD, stacked = carry
    x_BD, state = self.step(x_BD, jax.tree.map(lambda a: a[i], stacked), length_B, active_B)
    return (x_BD, jax.tree.map(lambda a, new: a.at[i].set(new), stacked, state)), None


def _scanned(n: int):
  """Unit repeated n times over stacked parameters."""
  shared = dict(
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=n,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  rows = dict(in_axes=nn.broadcast, **shared)
  sliced = dict(in_axes=(0, nn.broadcast, nn.broadcast), **shared)
  return nn.scan(Unit, methods={"__call__": rows, "prefill": rows, "extend": sliced, "step_at": sliced})


class Hybrid(nn.Module):
  """The language model. Every method is pure under `apply({"params": params}, ..., method=name)`.

  With a mesh, rows lie over its devices and experts over its axis `expert`; numbers are the same.
  """

  config: ModelConfig
  mesh: Mesh | None = None

  def setup(self):
    c = self.config
    V, D = c.vocab_size, c.hidden_size
    self.embedding = self.param("embedding", normal(c, "vocab", "embed"), (V, D), c.param_dtype)
    self.plan = plan(c.hybrid_override_pattern)
    unit = lambda letters, n: (Unit if n == 1 else _scanned(n))(c, letters, self.mesh)
    self.units = [unit(letters, n) for letters, n in self.plan]
    self.norm_f = RMSNorm(c)
    if not c.tie_word_embeddings:
      self.lm_head = self.param("lm_head", normal(c, "embed", "vocab"), (D, V), c.param_dtype)

  def _embed(self, tokens):
    # Cast after the look-up: the gradients of a token's many rows are then summed in the parameter's dtype.
    return constrain_rows(self.embedding[tokens].astype(self.config.dtype), self.mesh)

  def head(self):
    head = self.embedding.T if self.config.tie_word_embeddings else self.lm_head
    return head.astype(self.config.dtype)

  def hidden(self, tokens_BT, segment_ids_BT):
    """(h_BTD after the last norm, Routing of the MoE blocks in their order, or None)."""
    x_BTD, routings = self._embed(tokens_BT), []
    for unit in self.units:
      x_BTD, routing = unit(x_BTD, segment_ids_BT)
      routings.append(routing)
    return self.norm_f(x_BTD), _all_blocks(routings)

  def logits(self, tokens_BT, segment_ids_BT):
    """fp32 [B, T, V]: entry t is of the token after t."""
    h_BTD, _ = self.hidden(tokens_BT, segment_ids_BT)
    return product(h_BTD, self.head(), 1, jnp.float32)

  __call__ = logits

  def states(self, tokens_BT, segment_ids_BT):
    """(x_BTD: what token t is predicted from, times the head its logits; Routing or None)."""
    h_BTD, routing = self.hidden(tokens_BT, segment_ids_BT)
    return jnp.pad(h_BTD[:, :-1], ((0, 0), (1, 0), (0, 0))), routing

  def take_in(self, prompts: Prompts) -> tuple[Prefix, Routing | None]:
    """What rows that go on from the prompts need of them, computed once for all rows of a prompt."""
    last_QD, state, routing = self._take_in(prompts.tokens_QP, prompts.length_Q)
    return Prefix(self.norm_f(last_QD), state.units), routing

  def states_after(self, prefix: Prefix, length_Q, tokens_BT, segment_ids_BT):
    """`states` of rows whose first document goes on from a prompt; the routing is of the rows alone."""
    B, G = tokens_BT.shape[0], tokens_BT.shape[0] // length_Q.shape[0]
    state = repeat_state(self._decode_state(length_Q, prefix.units), G)
    if self.mesh is not None:
      state = constrain_batch(state, B, self.mesh)
    x_BTD, routings = self._embed(tokens_BT), []
    for unit, unit_state in zip(self.units, state.units, strict=True):
      x_BTD, routing = unit.extend(x_BTD, unit_state, segment_ids_BT, state.length_B)
      routings.append(routing)
    before_B1D = jnp.repeat(prefix.last_QD, G, axis=0)[:, None]
    h_BTD = jnp.concatenate([before_B1D, self.norm_f(x_BTD)[:, :-1]], axis=1)
    return constrain_rows(h_BTD, self.mesh), _all_blocks(routings)

  def score(
    self, tokens_BT, segment_ids_BT, wanted_BT=None, distance: DistanceFn | None = None, after=None,
    temperature=1.0,
  ) -> Scores:  # fmt: skip
    """log p(token t | the document before t) with p = softmax(logits / temperature), without a [B, T, V] array.

    `wanted_BT`: bool; the tokens to score, all where it is None. Others get 0.
    `after`: (Prefix, length_Q) of the prompts that the rows' first documents go on from.
    `temperature`: scalar above 0, traced or not; of log-probabilities and entropy. `distance` has its own.
    """
    if after is None:
      x_BTD, routing = self.states(tokens_BT, segment_ids_BT)
    else:
      x_BTD, routing = self.states_after(*after, tokens_BT, segment_ids_BT)
    scored_BT = _predicted(segment_ids_BT, wanted_BT, goes_on=after is not None)
    # Each device has the whole head for its own rows: its gradient is then summed once.
    logprob = on_own_rows(token_logprob, self.mesh, shared=[1, 4])
    logprob_BT, entropy_BT = logprob(x_BTD, self.head(), tokens_BT, scored_BT, jnp.float32(temperature))
    distance_BT = distance(x_BTD, self.head(), scored_BT) if distance else None
    return Scores(logprob_BT, entropy_BT, routing, distance_BT)

  def likeliest(self, tokens_BT, segment_ids_BT, wanted_BT, k: int, temperature=1.0):
    """(tokens_BTK, logprobs_BTK) of the k tokens that are likeliest to stand at t; 0 where not wanted."""
    x_BTD, _ = self.states(tokens_BT, segment_ids_BT)
    top = on_own_rows(functools.partial(top_logprobs, k=k), self.mesh, shared=[1, 3])
    return top(x_BTD, self.head(), _predicted(segment_ids_BT, wanted_BT), jnp.float32(temperature))

  def _next(self, x_BD):
    """fp32 logits_BV of the token after."""
    return constrain_rows(product(self.norm_f(x_BD), self.head(), 1, jnp.float32), self.mesh)

  def prefill(self, tokens_BT, length_B, capacity: int):
    """Takes in each row's first length_B tokens: (logits_BV of the token after, DecodeState)."""
    last_BD, state, _ = self._take_in(tokens_BT, length_B)
    return self._next(last_BD), _make_room(state, capacity - tokens_BT.shape[1])

  def _take_in(self, tokens_BT, length_B):
    """(last_BD: each row's last token before the last norm, DecodeState without room, Routing or None)."""
    segment_ids_BT = (jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]).astype(jnp.int32)
    x_BTD, states, routings = self._embed(tokens_BT), [], []
    for unit in self.units:
      x_BTD, (state, routing) = unit.prefill(x_BTD, segment_ids_BT)
      states.append(state)
      routings.append(routing)
    last_BD = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    return last_BD, self._decode_state(length_B, tuple(states)), _all_blocks(routings)

  def _decode_state(self, length_B, units: tuple) -> DecodeState:
    return DecodeState(length_B.astype(jnp.int32), units, tuple(n > 1 for _, n in self.plan))

  def step(self, state: DecodeState, tokens_B, active_B):
    """Takes in one token of every active row: (state, logits_BV of the token after)."""
    x_BD, states = self._embed(tokens_B), []
    for unit, unit_state, (_, n) in zip(self.units, state.units, self.plan, strict=True):
      if n == 1:
        x_BD, unit_state = unit.step(x_BD, unit_state, state.length_B, active_B)
      else:
        (x_BD, unit_state), _ = unit.step_at((x_BD, unit_state), jnp.arange(n), state.length_B, active_B)
      states.append(unit_state)
    logits_BV = self._next(x_BD)
    length_B = state.length_B + active_B.astype(jnp.int32)
    return state.replace(length_B=length_B, units=tuple(states)), logits_BV


def _in_depth_order(blocks: list[Routing]) -> Routing:
  """One unit's blocks, each [repeats, ...] where the unit is scanned, as its repeats follow each other."""
  E = blocks[0].load_LE.shape[-1]
  return Routing(
    load_LE=jnp.stack([b.load_LE.reshape(-1, E) for b in blocks], axis=1).reshape(-1, E),
    dropped_L=jnp.stack([b.dropped_L.reshape(-1) for b in blocks], axis=1).reshape(-1),
    loss=None if blocks[0].loss is None else sum(jnp.sum(b.loss) for b in blocks),
  )


def _all_blocks(of_units: list[tuple[Routing | None, ...]]) -> Routing | None:
  """What the routers of all units' blocks did, None where no block has one."""
  routed = [[block for block in blocks if block is not None] for blocks in of_units]
  units = [_in_depth_order(blocks) for blocks in routed if blocks]
  if not units:
    return None
  return Routing(
    load_LE=jnp.concatenate([u.load_LE for u in units]),
    dropped_L=jnp.concatenate([u.dropped_L for u in units]),
    loss=None if units[0].loss is None else sum(u.loss for u in units),
  )


def add_to_router_bias(config: ModelConfig, params: Params, change_LE: jax.Array) -> Params:
  """params with a row of the change added to each MoE block's bias; rows in the order of Routing's."""
  params, E, start = dict(params), config.n_routed_experts, 0
  for i, (unit, n) in enumerate(plan(config.hybrid_override_pattern)):
    blocks = [f"blocks_{b}" for b, letter in enumerate(unit) if letter == "E"]
    change = change_LE[start : start + n * len(blocks)].reshape(n, len(blocks), E)
    start += n * len(blocks)
    for b, block in enumerate(blocks):
      path = (f"units_{i}", block, "mixer", "e_score_correction_bias")
      params = _add(params, path, change[:, b] if n > 1 else change[0, b])
  return params


def _add(tree: Params, path: tuple[str, ...], change: jax.Array) -> Params:
  """The tree with the change added to the leaf at the path; the rest is shared."""
  if not path:
    return tree + change.astype(tree.dtype)
  return {**tree, path[0]: _add(tree[path[0]], path[1:], change)}


def _predicted(segment_ids_BT, wanted_BT=None, *, goes_on: bool = False):
  """bool [B, T]: the tokens that have something of their document before them, of those wanted."""
  starts_BT = segment_starts(segment_ids_BT)
  if goes_on:  # The first document began before the row.
    starts_BT = starts_BT.at[:, 0].set(False)
  scored_BT = (segment_ids_BT > 0) & ~starts_BT
  return scored_BT if wanted_BT is None else scored_BT & wanted_BT


def _make_room(state: DecodeState, tokens: int) -> DecodeState:
  """Caches of keys and values grow by `tokens` places."""

  def grow(path, leaf):
    if path[-1].key not in ("k_BKSH", "v_BKSH"):
      return leaf
    room = [(0, 0)] * (leaf.ndim - 2) + [(0, tokens), (0, 0)]
    return jnp.pad(leaf, room)

  return state.replace(units=jax.tree_util.tree_map_with_path(grow, state.units))


def repeat_state(state: DecodeState, G: int) -> DecodeState:
  """Each row G times, copies side by side: [B, ...] -> [B * G, ...]."""
  units = tuple(
    jax.tree.map(lambda a, axis=int(stacked): jnp.repeat(a, G, axis=axis), unit)
    for unit, stacked in zip(state.units, state.stacked, strict=True)
  )
  return state.replace(length_B=jnp.repeat(state.length_B, G), units=units)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh parameters, without partitioning metadata."""
  return nn.meta.unbox(_init(config, key))


def _init(config: ModelConfig, key):
  tokens_BT = jnp.zeros((1, 8), jnp.int32)
  return Hybrid(config).init(key, tokens_BT, tokens_BT + 1)["params"]


def logical_axes(config: ModelConfig):
  """The tree of init_params with a tuple of logical axis names for each array."""
  return axes_of(functools.partial(_init, config))


def axes_of(init):
  """The logical axes of what `init(key)` returns, parameters with partitioning metadata."""
  specs = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
  return jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec))
