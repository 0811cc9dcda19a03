"""HBM bytes of the Mamba-2 scan on a v5p chip: of the XLA form, of a fused kernel, and the least possible.

The XLA form's bytes are the compiler's count. A fused kernel's are the passes over its arrays: it keeps decays, scores and
the running state in VMEM. For the backward pass it writes the state at the start of every chunk, in fp32.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from experiments.compile import slice_of
from nemocascade.kernels.ssd import ssd

TOKENS = 32_768  # Of one row: what a chip holds of a row of 262,144 tokens that lies over 8 chips.
M, P, U, N, CHUNK = 64, 64, 8, 128, 128  # Nano's heads, channels of a head, groups, state and chunk.
BLOCKS, FORWARD = 23, 6.4e9  # Nano's Mamba blocks, and FLOPs of a token in a forward pass.
BF16, FP32 = 2, 4


def least_bytes(*, backward: bool) -> int:
  """Bytes a token of reading each argument and writing each result once.

  The inputs are x, b and c in bf16 and the log decays in fp32; the result y and all gradients are bf16, but those of
  the log decays.
  """
  x = y = M * P * BF16
  arguments = x + 2 * U * N * BF16 + M * FP32
  return 2 * arguments + y if backward else arguments + y


def fused_bytes(*, backward: bool) -> int:
  """Bytes a token of a fused kernel. The forward pass writes the states of chunks, and the backward pass reads them."""
  return least_bytes(backward=backward) + M * P * N * FP32 // CHUNK


def xla_bytes() -> dict[str, float]:
  """{"forward", "backward"}: bytes a token of our form, by the v5p compiler's count."""
  _, (chip, *_) = slice_of("v5p:2x2x1")
  of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    (1, TOKENS, *shape), dtype, sharding=SingleDeviceSharding(chip)
  )
  args = of(M, P), of(M, dtype=jnp.float32), of(U, N), of(U, N), of(dtype=jnp.int32)

  def forward(x, a, b, c, ids):
    return ssd(x, a, b, c, ids, chunk=CHUNK)[0].astype(x.dtype)

  def both(x, a, b, c, ids, dy):
    y, pull = jax.vjp(lambda *of: forward(*of, ids), x, a, b, c)
    return y, pull(dy)

  moved = [
    jax.jit(fn).lower(*of_fn).compile().cost_analysis()["bytes accessed"] / TOKENS
    for fn, of_fn in ((forward, args), (both, (*args, args[0])))
  ]
  return {"forward": moved[0], "backward": moved[1] - moved[0]}


def cases(clock_flops: float, bandwidth: float) -> Iterator[dict]:
  """Yields lines on the scan's bytes, and on the share of a token's forward pass that the XLA form's bytes take.

  Args:
    clock_flops: the chip's FLOP/s.
    bandwidth: its bytes/s of HBM.
  """
  moved = xla_bytes()
  for what, ours in moved.items():
    backward = what == "backward"
    for name, peer in (("a fused kernel", fused_bytes), ("arguments and results once", least_bytes)):
      least = peer(backward=backward)
      yield dict(
        case=f"scan_{what}_bytes", ours=ours / 1e3, peer=least / 1e3, peer_name=name, unit="kB of HBM a token",
        ratio=least / ours,
      )  # fmt: skip
  took, products = BLOCKS * moved["forward"] / bandwidth, FORWARD / clock_flops
  yield dict(
    case="scan_forward_time", ours=took * 1e9, peer=products * 1e9, ratio=products / took,
    peer_name="all products of a token at the chip's peak", unit="ns a token in 23 blocks",
  )  # fmt: skip
