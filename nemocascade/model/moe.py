"""The mixture-of-experts block: a sigmoid router in fp32, squared-ReLU experts, one shared expert."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemocascade.config import ModelConfig
from nemocascade.kernels.product import einsum, product
from nemocascade.kernels.routed_matmul import dense_mlp
from nemocascade.mesh import on_own_rows
from nemocascade.model.expert_parallel import sharded_routed_mlp
from nemocascade.model.layers import constant, normal, relu2
from nemocascade.model.routing import as_record
from nemocascade.model.sampling_weights import DOWN, GATHERED, STEPS, UP
from nemocascade.model.sequence_parallel import Layout, layout
from nemocascade.segments import document_mean
from nemocascade.types import Routing


def route(x_TD, gate_DE, bias_E, c: ModelConfig):
  """(expert_TX, weight_TX, score_TE): each token's experts, their weights, and the scores of all experts.

  The bias affects only the choice; weights come from the unbiased scores. The router follows
  Nemotron-3-Nano (arXiv 2512.20848) as implemented by nemotron_h in transformers and vLLM.
  """
  logits_TE = einsum("TD,DE->TE", x_TD.astype(jnp.float32), gate_DE.astype(jnp.float32))
  score_TE = jax.nn.sigmoid(logits_TE)
  choice_TE = jax.lax.stop_gradient(score_TE) + jax.lax.stop_gradient(bias_E.astype(jnp.float32))[None]
  if c.n_group > 1:  # Only experts of the best groups, by the sum of a group's two best scores.
    T, E = choice_TE.shape
    grouped = choice_TE.reshape(T, c.n_group, E // c.n_group)
    group_TU = jnp.sum(jax.lax.top_k(grouped, min(2, E // c.n_group))[0], axis=-1)
    best_TU = jax.lax.top_k(group_TU, c.topk_group)[1]
    kept_TU = jnp.any(best_TU[..., None] == jnp.arange(c.n_group)[None, None], axis=1)
    choice_TE = jnp.where(kept_TU[..., None], grouped, -jnp.inf).reshape(T, E)
  expert_TX = jax.lax.top_k(choice_TE, c.num_experts_per_tok)[1]
  return expert_TX, _weights(score_TE, expert_TX, c), score_TE


def _weights(score_TE, expert_TX, c: ModelConfig):
  """The weights of the chosen experts: their scores, of which the gradient reaches the router."""
  weight_TX = jnp.take_along_axis(score_TE, expert_TX, axis=-1)
  if c.norm_topk_prob:
    weight_TX /= jnp.sum(weight_TX, axis=-1, keepdims=True) + 1e-20
  return weight_TX * c.routed_scaling_factor


def replay(score_TE, expert_TX, recorded_TX, c: ModelConfig):
  """Takes the sampler's choice of experts instead of the router's own (arXiv 2510.11370, R3).

  Only the choice is replayed: the weights are the scores that this router gives the recorded experts, so that its
  gradient is that of a router which chose them.

  Args:
    expert_TX: the router's own choice; it stays where there is no record.
    recorded_TX: number + 1 of the experts that the sampler chose; 0 where there is no record.

  Returns:
    (expert_TX, weight_TX, agreed_TX: bool, the recorded choices that the router makes too)
  """
  known_TX = recorded_TX > 0
  there_TX = jnp.where(known_TX, recorded_TX.astype(jnp.int32) - 1, expert_TX)
  agreed_TX = known_TX & jnp.any(there_TX[:, :, None] == expert_TX[:, None], axis=-1)
  return there_TX, _weights(score_TE, there_TX, c), agreed_TX


def balance_loss(score_BTE, chosen_BTE, segment_ids_BT, X: int, mean: Callable = document_mean):
  """loss_B1, fp32: the sum of sum_e f[e] p[e] over a row's real tokens; a token's term is 1 at equal loads.

  p[e] is the token's score of expert e divided by the sum of its scores. f[e] is the share of its
  document's tokens that chose expert e, divided by the fair share X / E; it has no gradient. The mean
  over a document's tokens is DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, eq. 17 to 20), except
  that f counts the experts chosen with the bias. Documents are weighted by their number of tokens, so
  packing documents and splitting batches do not change the loss.

  Args:
    X: experts per token.
    mean: segments.document_mean, or that of documents that lie on several devices.
  """
  real_BT = segment_ids_BT > 0
  share_BTE = mean(chosen_BTE.astype(jnp.float32), real_BT, segment_ids_BT) * score_BTE.shape[-1] / X
  p_BTE = score_BTE / jnp.maximum(jnp.sum(score_BTE, axis=-1, keepdims=True), 1e-20)
  return jnp.sum(jnp.where(real_BT[..., None], share_BTE * p_BTE, 0.0), axis=(1, 2))[:, None]


class MoE(nn.Module):
  """The routed experts and the shared expert: a call returns (y_BTD, Routing of this block)."""

  config: ModelConfig
  mesh: Mesh | None = None
  samples: bool = False  # Whether its weights are those of sampling.

  def setup(self):
    c = self.config
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    L, S = c.moe_latent_size or D, c.moe_shared_expert_intermediate_size
    f32 = jnp.float32
    self.gate = self.param("gate", normal(c, "embed", None), (D, E), f32)
    self.e_score_correction_bias = self.param(
      "e_score_correction_bias", constant(nn.initializers.zeros, None), (E,), f32
    )
    self.up_proj = self.param("up_proj", normal(c, "experts", "embed", "hidden"), (E, L, F), c.param_dtype)
    self.down_proj = self.param(
      "down_proj", normal(c, "experts", "hidden", "embed", residual=True), (E, F, L), c.param_dtype
    )
    self.shared_up_proj = self.param("shared_up_proj", normal(c, "embed", "hidden"), (D, S), c.param_dtype)
    self.shared_down_proj = self.param(
      "shared_down_proj", normal(c, "hidden", "embed", residual=True), (S, D), c.param_dtype
    )
    if c.moe_latent_size:
      self.fc1_latent_proj = self.param("fc1_latent_proj", normal(c, "embed", None), (D, L), c.param_dtype)
      self.fc2_latent_proj = self.param("fc2_latent_proj", normal(c, None, "embed"), (L, D), c.param_dtype)

  def __call__(self, x_BTD, segment_ids_BT, recorded_BTX=None):
    return self._mix(layout(self.config, self.mesh, x_BTD.shape[0]), x_BTD, segment_ids_BT, recorded_BTX)

  def _mix(self, on: Layout, x_BTD, segment_ids_BT, recorded_BTX=None, dense=None):
    c, B = self.config, x_BTD.shape[0]
    x_TD, real_T = on.tokens(x_BTD), on.tokens(segment_ids_BT > 0)
    # Runs per device; otherwise XLA gathers the scores of all tokens on every device for top_k.
    choose = on_own_rows(functools.partial(route, c=c), self.mesh, shared=[1, 2])
    expert_TX, weight_TX, score_TE = choose(x_TD, self.gate, self.e_score_correction_bias)
    record = {}
    if recorded_BTX is not None:
      recorded_TX = on.tokens(recorded_BTX)
      compare = on_own_rows(functools.partial(replay, c=c), self.mesh)
      there_TX, there_weight_TX, agreed_TX = compare(score_TE, expert_TX, recorded_TX)
      count = lambda a_TX: jnp.sum(a_TX & real_T[:, None], dtype=jnp.float32)[None]
      record = dict(recorded_L=count(recorded_TX > 0), agreed_L=count(agreed_TX))
      if c.router_replay:
        expert_TX, weight_TX = there_TX, there_weight_TX
    if c.router_record:
      record["experts_LBTX"] = on.of_tokens(as_record(expert_TX, c.n_routed_experts), B)[None]
    weight_TX = weight_TX.astype(x_BTD.dtype)
    if dense is None:
      y_TD, rows = self._apart(x_TD, expert_TX, weight_TX)
    else:
      up_DN, down_ND = dense
      E, F = c.n_routed_experts, c.moe_intermediate_size
      y_TD, rows = dense_mlp(x_TD, up_DN, down_ND, expert_TX, weight_TX, E, F)
    chosen_TE = jnp.any(expert_TX[..., None] == jnp.arange(c.n_routed_experts)[None, None], axis=1)
    load_E = jnp.sum(chosen_TE & real_T[:, None], axis=0, dtype=jnp.float32)
    loss = None
    if c.router_loss:
      score_BTE, chosen_BTE = (on.of_tokens(a, B) for a in (score_TE, chosen_TE))
      of_own = on.on_own(functools.partial(balance_loss, X=c.num_experts_per_tok, mean=on.document_mean))
      loss = jnp.sum(of_own(score_BTE, chosen_BTE, segment_ids_BT))
    dropped = (expert_TX.size - rows).astype(jnp.float32)
    return on.of_tokens(y_TD, B), Routing(load_E[None], dropped[None], loss, **record)

  def _apart(self, x_TD, expert_TX, weight_TX):
    """(y_TD of the routed experts and the shared expert, the number of choices that an expert processed)."""
    c, w = self.config, lambda p: p.astype(x_TD.dtype)
    # Whether each device has whole matrices of its experts; otherwise they are gathered over `data`.
    whole = self.samples and c.sampling_weights == GATHERED
    inside_TL = product(x_TD, self.fc1_latent_proj) if c.moe_latent_size else x_TD
    matrices = w(self.up_proj), w(self.down_proj)
    y_TL, rows = sharded_routed_mlp(self.mesh, inside_TL, *matrices, expert_TX, weight_TX, whole=whole)
    y_TD = product(y_TL, self.fc2_latent_proj) if c.moe_latent_size else y_TL
    return y_TD + product(relu2(product(x_TD, self.shared_up_proj)), self.shared_down_proj), rows

  def fresh_state(self, B: int):
    """The decode state before the first `step`: the experts of the last token, if they are recorded."""
    c = self.config
    return (
      {"experts_BX": as_record(jnp.full((B, c.num_experts_per_tok), -1), c.n_routed_experts)} if c.router_record else ()
    )

  def step(self, state, x_BD, length_B, active_B):
    del length_B
    dense = None
    if self.has_variable(STEPS, UP):
      dense = self.get_variable(STEPS, UP), self.get_variable(STEPS, DOWN)
    x_B1D, active_B1 = x_BD[:, None], active_B[:, None].astype(jnp.int32)
    y, routing = self._mix(Layout(self.mesh), x_B1D, active_B1, dense=dense)
    if self.config.router_record:
      state = {"experts_BX": routing.experts_LBTX[0, :, 0]}
    return state, y[:, 0]
