"""Messages between the processes of a run: a JSON header and a body of bytes over TCP, both behind their lengths."""

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any

Header = dict[str, Any]  # "kind" names the message.
LENGTHS = struct.Struct("!II")
LONGEST = 1 << 30  # Bytes of a header or body. More is no message of ours.


def packed(kind: str, body: bytes = b"", **fields: Any) -> bytes:
  """A message as bytes."""
  header = json.dumps({"kind": kind} | fields).encode()
  return LENGTHS.pack(len(header), len(body)) + header + body


async def received(reader: asyncio.StreamReader) -> tuple[Header, bytes] | None:
  """The next message, or None if the connection has ended or what comes is no message."""
  try:
    sizes = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
    if max(sizes) > LONGEST:
      return None
    header = json.loads(await reader.readexactly(sizes[0]))
    body = await reader.readexactly(sizes[1])
  except (OSError, EOFError, ValueError):  # IncompleteReadError is an EOFError.
    return None
  return (header, body) if isinstance(header, dict) and "kind" in header else None


def prepare(writer: asyncio.StreamWriter) -> None:
  """Sends small messages at once, and keeps an idle connection known to firewalls (some forget it in 10 minutes)."""
  connection = writer.get_extra_info("socket")
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
  """Copies bytes until either side ends. Closes neither."""
  with contextlib.suppress(OSError):
    while data := await reader.read(1 << 16):
      writer.write(data)
      await writer.drain()


async def copy_both(
  one: tuple[asyncio.StreamReader, asyncio.StreamWriter], other: tuple[asyncio.StreamReader, asyncio.StreamWriter]
) -> None:
  """Copies bytes in both directions until the first of them ends."""
  ways = [asyncio.create_task(copy(one[0], other[1])), asyncio.create_task(copy(other[0], one[1]))]
  await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
  for way in ways:
    way.cancel()
