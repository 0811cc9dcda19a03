"""Buckets in memory: what gcsfs and TensorStore need of Google Cloud Storage, for tests of gs:// paths.

Objects are written whole, can't be appended to, and have no folders: a folder is there as long as an object is in it.
"""

import base64
import contextlib
import io
import json
import threading
import urllib.parse
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from orbax.checkpoint._src.path import gcs_utils

OBJECTS: dict[str, tuple[bytes, int]] = {}  # "BUCKET/NAME" -> (data, generation)
READ_ONLY = "closed"  # The bucket in which nothing can be written.
_lock, _generation = threading.RLock(), iter(range(1, 1 << 60))


def put(path: str, data: bytes) -> int:
  if path.partition("/")[0] == READ_ONLY:
    raise PermissionError(f"403: no storage.objects.create access to {path}")
  with _lock:
    OBJECTS[path] = data, next(_generation)
    return OBJECTS[path][1]


class _Written(io.BytesIO):
  """Becomes an object when it is closed."""

  def __init__(self, path: str):
    super().__init__()
    self._path = path

  def close(self) -> None:
    if not self.closed:
      put(self._path, self.getvalue())
    super().close()


class FileSystem(fsspec.AbstractFileSystem):
  """Stands for gcsfs."""

  protocol = ("gs", "gcs")
  cachable = False

  def mkdir(self, path, create_parents=True, **_):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def rmdir(self, path):
    pass

  def info(self, path, **_):
    path = self._strip_protocol(path)
    if path in OBJECTS:
      data, generation = OBJECTS[path]
      sum_ = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
      return {"name": path, "size": len(data), "type": "file", "crc32c": sum_, "generation": generation}
    if any(name.startswith(f"{path}/") for name in list(OBJECTS)):
      return {"name": path, "size": 0, "type": "directory"}
    raise FileNotFoundError(path)

  def ls(self, path, detail=True, **_):
    path = self._strip_protocol(path)
    if path in OBJECTS:
      return [self.info(path)] if detail else [path]
    below = [name.removeprefix(f"{path}/").split("/")[0] for name in list(OBJECTS) if name.startswith(f"{path}/")]
    if not below:
      raise FileNotFoundError(path)
    names = [f"{path}/{name}" for name in dict.fromkeys(below)]
    return [self.info(name) for name in names] if detail else names

  def _open(self, path, mode="rb", **_):
    path = self._strip_protocol(path)
    if mode == "rb":
      return io.BytesIO(OBJECTS[path][0] if path in OBJECTS else _missing(path))
    assert mode == "wb", f"mode {mode}: objects are written whole"
    return _Written(path)

  def cp_file(self, path1, path2, **_):
    if (path := self._strip_protocol(path1)) in OBJECTS:  # A folder is copied by its objects.
      put(self._strip_protocol(path2), OBJECTS[path][0])

  def rm(self, path, recursive=False, **_):
    path = self._strip_protocol(path)
    with _lock:
      found = [name for name in OBJECTS if name == path or (recursive and name.startswith(f"{path}/"))]
      if not found:
        raise FileNotFoundError(path)
      for name in found:
        del OBJECTS[name]


def _missing(path: str) -> bytes:
  raise FileNotFoundError(path)


class _Server(BaseHTTPRequestHandler):
  """The part of the JSON API that TensorStore uses."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *_) -> None:
    pass

  def _request(self) -> tuple[str, dict[str, str]]:
    """("BUCKET/NAME" of the object, or "BUCKET/", parameters)"""
    parts = urllib.parse.urlsplit(self.path)
    bucket, _, name = parts.path.split("/b/", 1)[1].partition("/o")
    fields = dict(urllib.parse.parse_qsl(parts.query))
    return f"{bucket}/{urllib.parse.unquote(name.removeprefix('/')) or fields.get('name', '')}", fields

  def _answer(self, status: int, data: bytes = b"", **headers: str) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _changed(self, path: str, fields: dict[str, str]) -> bool:
    """Whether a condition on the object's generation does not hold."""
    generation = OBJECTS[path][1] if path in OBJECTS else 0
    wanted, other = fields.get("ifGenerationMatch"), fields.get("ifGenerationNotMatch")
    return (wanted is not None and int(wanted) != generation) or (other is not None and int(other) == generation)

  def do_GET(self) -> None:
    path, fields = self._request()
    with _lock:
      if path.endswith("/") and fields.get("alt") != "media":
        return self._list(path, fields)
      if path not in OBJECTS:
        return self._answer(404)
      if self._changed(path, fields):
        return self._answer(304 if "ifGenerationNotMatch" in fields else 412)
      data, generation = OBJECTS[path]
    first, last = 0, len(data) - 1
    if asked := self.headers.get("Range"):
      start, _, stop = asked.removeprefix("bytes=").partition("-")
      first, last = (int(start), min(last, int(stop)) if stop else last) if start else (len(data) - int(stop), last)
      where = {"Content_Range": f"bytes {first}-{last}/{len(data)}"}
      return self._answer(206, data[first : last + 1], x_goog_generation=str(generation), **where)
    return self._answer(200, data, x_goog_generation=str(generation))

  def _list(self, bucket: str, fields: dict[str, str]) -> None:
    names = [
      path.removeprefix(bucket) for path in sorted(OBJECTS) if path.startswith(bucket + fields.get("prefix", ""))
    ]
    low, high = fields.get("startOffset", ""), fields.get("endOffset")
    items = [
      {"name": name, "size": str(len(OBJECTS[bucket + name][0])), "generation": str(OBJECTS[bucket + name][1])}
      for name in names
      if name >= low and (high is None or name < high)
    ]
    self._answer(200, json.dumps({"items": items}).encode())

  def do_POST(self) -> None:
    path, fields = self._request()
    data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    with _lock:
      if self._changed(path, fields):
        return self._answer(412)
      generation = put(path, data)
    name = path.partition("/")[2]
    said = {"name": name, "generation": str(generation), "size": str(len(data)), "metageneration": "1"}
    return self._answer(200, json.dumps(said).encode())

  def do_DELETE(self) -> None:
    path, fields = self._request()
    with _lock:
      if self._changed(path, fields):
        return self._answer(412)
      found = OBJECTS.pop(path, None)
    return self._answer(204 if found else 404)


@contextlib.contextmanager
def serving(patch) -> Iterator[None]:
  """Buckets for fsspec, etils and TensorStore in this process. `patch` is pytest's monkeypatch."""
  OBJECTS.clear()
  server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
  patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
  patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)  # Else it asks Google's library.
  fsspec.register_implementation("gcs", FileSystem, clobber=True)
  try:
    yield
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
