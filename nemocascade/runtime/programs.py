"""The model on its mesh, and the programs of it that are jitted once and shared by all stages of a run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from nemocascade import mesh as mesh_lib
from nemocascade.config import ModelConfig
from nemocascade.model.decode_state import row_axes
from nemocascade.model.expert_parallel import check_experts
from nemocascade.model.hybrid import Hybrid, init_params, logical_axes
from nemocascade.model.reward import RewardModel, init_reward_params, reward_axes
from nemocascade.model.router_bias import add_to_router_bias
from nemocascade.model.routing import experts_of
from nemocascade.model.sampling_weights import SHARDED, cast_products, for_steps
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.exact import ExactEngine
from nemocascade.runtime.exact import compiler_options, verifier
from nemocascade.step.balance import RouterBalance
from nemocascade.types import Params, Scores

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
  """The model of a run and its jitted methods. Holds no parameters.

  Raises UserError if the mesh's `expert` does not divide the model's experts.
  """

  config: ModelConfig
  mesh: Mesh
  _made: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  def __post_init__(self):
    if "E" in self.config.hybrid_override_pattern:
      check_experts(self.config.n_routed_experts, self.mesh.shape["expert"])

  def once(self, key: tuple, make: Callable[[], T]) -> T:
    """The result of `make`, which is called at the first call with this key only."""
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  # The parameters.

  @functools.cached_property
  def template(self) -> Params:
    """Shapes, dtypes and shardings of the parameters."""
    return self._placed(init_params, logical_axes)

  @functools.cached_property
  def reward_template(self) -> Params:
    """Shapes, dtypes and shardings of a reward model's parameters."""
    return self._placed(init_reward_params, reward_axes)

  @functools.cached_property
  def sampling_template(self) -> Params:
    """Shapes, dtypes and shardings of sampling_weights."""
    if self.config.sampling_weights == SHARDED:
      return self.template
    shapes = jax.eval_shape(functools.partial(cast_products, self.config), self.template)
    places = mesh_lib.shardings(logical_axes(self.config), self.mesh, shapes, mesh_lib.SAMPLING_RULES)
    return mesh_lib.placed(shapes, places)

  def sampling_weights(self, params: Params) -> Params:
    """The parameters as sampling uses them, made once a step from the trainer's.

    With model.sampling_weights="gathered", weights of products are in the products' dtype, experts are sharded over
    `expert` alone and all else is whole on every device, so that decoding moves no weights between devices. Arrays
    that are so already are not copied. With "sharded" these are the trainer's arrays.
    """
    if not self.resharded:
      return params
    leaves, tree = jax.tree.flatten(params)
    for i, leaf in zip(self.resharded, self._reshard([leaves[i] for i in self.resharded]), strict=True):
      leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)

  @functools.cached_property
  def resharded(self) -> dict[int, jax.ShapeDtypeStruct]:
    """Number of a leaf -> its shape in sampling_template, for those that have another dtype or sharding there."""
    pairs = enumerate(zip(jax.tree.leaves(self.template), jax.tree.leaves(self.sampling_template), strict=True))
    same = lambda a, b: a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, len(a.shape))
    return {i: there for i, (here, there) in pairs if not same(here, there)}

  @functools.cached_property
  def _reshard(self) -> Callable:
    here, there = jax.tree.leaves(self.template), self.resharded
    # Cast before they move, so that the casted bytes move.
    cast = lambda leaf, i: jax.lax.with_sharding_constraint(leaf.astype(there[i].dtype), here[i].sharding)
    places = [leaf.sharding for leaf in there.values()]
    return jax.jit(lambda leaves: list(map(cast, leaves, there)), out_shardings=places)

  def heads_template(self, Z: int) -> jax.ShapeDtypeStruct:
    """heads_ZDV of Z teachers: shape, dtype and sharding. Each device has a part of D."""
    shape = jax.ShapeDtypeStruct((Z, self.config.hidden_size, self.config.vocab_size), self.config.dtype)
    return mesh_lib.placed(shape, mesh_lib.shardings((None, "embed", None), self.mesh, shape))

  def _placed(self, init: Callable, axes: Callable) -> Params:
    shapes = jax.eval_shape(functools.partial(init, self.config), jax.random.key(0))
    return mesh_lib.placed(shapes, mesh_lib.shardings(axes(self.config), self.mesh, shapes))

  def fresh_params(self, key: jax.Array) -> Params:
    return init_params(self.config, key)

  def put(self, tree: Any) -> Any:
    """Puts rows on the mesh; those that are there stay. Every process must have all the rows of host arrays."""
    return mesh_lib.put_rows(tree, self.mesh)

  @functools.cached_property
  def model(self) -> Hybrid:
    return Hybrid(self.config, self.mesh)

  # Jitted methods of the model whose results are sharded by rows.

  @functools.cached_property
  def logprobs(self) -> Callable:
    """(params, tokens_BT, segment_ids_BT, wanted_BT, temperature) -> logprobs_BT of the wanted tokens, 0 elsewhere.

    This and the next two take experts_BTY as one more argument, if the model is to replay them.
    """
    return self._by_rows(lambda *args: self.score_fn(*args[:4], None, None, *args[4:]).logprobs_BT)

  @functools.cached_property
  def states(self) -> Callable:
    """(params, tokens_BT, segment_ids_BT[, experts_BTY]) -> states_BTD of Hybrid.states."""
    states = self._method("states")
    return self._by_rows(lambda *args: states(*args)[0])

  @functools.cached_property
  def likeliest(self) -> Callable:
    """(params, tokens_BT, segment_ids_BT, wanted_BT, k, temperature[, experts_BTY]) -> that of Hybrid.likeliest."""
    return self._by_rows(self._method("likeliest"), static_argnums=4)

  def _by_rows(self, fn: Callable, **how: Any) -> Callable:
    """`fn` of (params, tokens_BT, ...) jitted, with its results sharded by their B rows."""
    cut = lambda params, tokens_BT, *args: jax.lax.with_sharding_constraint(
      fn(params, tokens_BT, *args), mesh_lib.rows(self.mesh, len(tokens_BT))
    )
    return jax.jit(cut, **how)

  @functools.cached_property
  def heads(self) -> Callable:
    """params -> heads_ZDV of one teacher, sharded as in heads_template."""
    head = self._method("head")
    return jax.jit(lambda params: head(params)[None], out_shardings=self.heads_template(1).sharding)

  # Jitted methods of the model whose results are replicated.

  @functools.cached_property
  def score(self) -> Callable:
    """`score_fn`, jitted."""
    return self.jitted(self.score_fn)

  @functools.cached_property
  def reward(self) -> Callable:
    """`reward_fn`, jitted."""
    return self.jitted(self.reward_fn)

  def jitted(self, fn: Callable, **how: Any) -> Callable:
    """`fn` jitted, with its results replicated over the mesh."""
    return jax.jit(fn, out_shardings=mesh_lib.whole(self.mesh), **how)

  def _method(self, name: str) -> Callable:
    return lambda params, *args: self.model.apply({"params": params}, *args, method=name)

  def engine(self, prompt_tokens: int, total_tokens: int, *, records: bool = False, exact: int = 0) -> Engine:
    """The engine for prompts of at most `prompt_tokens` and rows of at most `total_tokens`; cached.

    Args:
      records: whether it records the experts of each token; a model without routers has none.
      exact: the pieces in which a step reads the rows, for an ExactEngine; 0 for an Engine.
    """
    records &= "E" in self.config.hybrid_override_pattern
    key = prompt_tokens, total_tokens, records, exact
    return self.once(("engine", *key), lambda: self._engine(*key))

  def _engine(self, prompt_tokens: int, total_tokens: int, records: bool, exact: int) -> Engine:
    model = Hybrid(dataclasses.replace(self.config, router_record=records), self.mesh, samples=True)

    recorded = "_recorded" if records else ""

    def prefill(params, tokens_BP, length_B, capacity):
      return model.apply({"params": params}, tokens_BP, length_B, capacity, method=f"prefill{recorded}")

    def step(weights, state, tokens_B, active_B):
      return model.apply(weights, state, tokens_B, active_B, method="step")

    def extend(params, state, tokens_BT, length_B):
      return model.apply({"params": params}, state, tokens_BT, length_B, method=f"extend{recorded}")

    kind: Callable = Engine
    if exact:
      verify_fn = verifier(self.score_fn_under(RouterBalance(), replay=False), exact)
      kind = functools.partial(ExactEngine, verify_fn=verify_fn, compiler_options=compiler_options(self.mesh))
    return kind(
      prefill, step, extend, row_axes, (lambda state: experts_of(state.units)) if records else None,
      prompt_tokens=prompt_tokens, total_tokens=total_tokens,
      weights_fn=functools.partial(for_steps, self.config, self.mesh),
      mesh=self.mesh, params_places=jax.tree.map(lambda p: p.sharding, self.sampling_template),
    )  # fmt: skip

  # Functions for training steps, which are jitted as a whole.

  @functools.cached_property
  def score_fn(self) -> Callable:
    """A ScoreFn (see types.py) of the model, whose routers replay the experts that they are given."""
    return self._score_fn(self.model)

  def score_fn_under(self, balance: RouterBalance, *, replay: bool = True) -> Callable:
    """The score function of a training step. It computes the balance loss only if `balance` uses it.

    Args:
      replay: whether routers take given experts instead of their own choice; otherwise they only compare them.
    """
    fields = dict(router_loss=balance.has_loss, router_replay=replay)
    return self._score_fn(Hybrid(dataclasses.replace(self.config, **fields), self.mesh))

  def _score_fn(self, model: Hybrid) -> Callable:
    def score(
      params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, after=None, temperature=1.0, experts=None
    ) -> Scores:
      rows = tokens_BT, segment_ids_BT, wanted_BT
      return self._apply(model, params, "score", *rows, distance, after, temperature, experts)

    return score

  def reward_fn(self, params, tokens_BT, segment_ids_BT):
    """fp32 reward_B of rows of one document each, by the parameters of a reward model."""
    return RewardModel(self.config, self.mesh).apply({"params": params}, tokens_BT, segment_ids_BT)

  def take_in_fn_under(self, *, replay: bool = True) -> Callable:
    """A TakeInFn (see types.py) of the model; `replay` as in score_fn_under."""
    model = Hybrid(dataclasses.replace(self.config, router_replay=replay), self.mesh)
    return lambda params, prompts: self._apply(model, params, "take_in", prompts)

  def _apply(self, model: Hybrid, params, method: str, *args):
    if self.mesh.size > 1:  # Gives gradients and their sums the parameters' shardings.
      places = jax.tree.map(lambda p: p.sharding, self.template)
      params = jax.lax.with_sharding_constraint(params, places)
    return model.apply({"params": params}, *args, method=method)

  def add_to_bias(self, params, change_LE):
    """params with `change_LE` ([MoE blocks, experts]) added to the routers' biases."""
    return add_to_router_bias(self.config, params, change_LE)
