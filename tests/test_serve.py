"""The chat in a browser: what the page is sent, and whom the server refuses. The model is scripted."""

import http.client
import json
import threading

import pytest
from scripted import Scripted, spell

from experiments import serve
from nemocascade.data.tokenizer import IM_END, THINK_END
from nemocascade.errors import UserError


@pytest.fixture
def site():
  """(a function that posts to the server, its port, the conversations that were begun)."""
  begun, said = [], [["Hm <b>.\n", THINK_END, "\nthe mat", IM_END], ["the cat", IM_END], ["on and on"]]

  def make():
    begun.append(Scripted())
    begun[-1].to_say = [spell(*answer) for answer in said]
    return begun[-1]

  serving = serve.server("127.0.0.1", 0, serve.Chats(make), "</script>")
  thread = threading.Thread(target=serving.serve_forever, daemon=True)
  thread.start()

  def post(path, body, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()

  yield post, serving.server_port, begun
  serving.shutdown()
  serving.server_close()
  thread.join()


def joined(lines: str, kind: str) -> str:
  return "".join(part.get(kind, "") for part in map(json.loads, lines.splitlines()))


def test_thoughts_and_answers_are_apart_and_a_conversation_goes_on_until_it_is_forgotten(site):
  post, _, begun = site
  status, lines = post("/answer", {"chat": "a", "text": "the cat sat", "thinking": True})
  assert status == 200 and joined(lines, "thought") == "Hm <b>." and joined(lines, "said") == "the mat"
  _, lines = post("/answer", {"chat": "a", "text": "and?", "thinking": False})
  assert joined(lines, "said") == "the cat" and joined(lines, "thought") == joined(lines, "note") == ""
  assert len(begun) == 1 and [m["role"] for m in begun[0].messages] == ["user", "assistant"] * 2
  post("/forget", {"chat": "a"})
  _, lines = post("/answer", {"chat": "a", "text": "9" * 2000})
  assert len(begun) == 2 and "there is room for 1024; begin anew" in joined(lines, "note")


def test_that_the_first_answer_waits_is_said_only_until_it_comes(site):
  post, _, _ = site
  first = [post("/answer", {"chat": "a", "text": "the cat"})[1] for _ in range(2)]
  kinds = [[kind for line in lines.splitlines() for kind in json.loads(line)] for lines in first]
  assert kinds[0][0] == "wait" and "wait" not in kinds[0][1:] + kinds[1]
  assert '.querySelectorAll(".wait")' in serve.PAGE.read_text()  # Which the next part of the answer removes.


def test_only_the_pages_used_last_are_remembered(site):
  post, _, begun = site
  for chat in [*map(str, range(serve.KEPT + 1)), "0"]:
    post("/answer", {"chat": chat, "text": "9" * 2000})
  assert len(begun) == serve.KEPT + 2


def test_other_sites_and_malformed_requests_are_refused(site):
  post, port, begun = site
  asked = {"chat": "a", "text": "hi"}
  assert post("/answer", asked, **{"Content-Type": "text/plain"})[0] == 415
  assert post("/answer", asked, Host="example.com")[0] == 403
  for wrong in ([], {"text": "hi"}, {"chat": 3}, {"chat": "a", "thinking": 1}):
    assert post("/answer", wrong)[0] == 400
  assert not begun
  with pytest.raises(UserError, match=f"--port={port}: .*; give another port"):
    serve.server("127.0.0.1", port, serve.Chats(Scripted), "")


def test_the_page_is_whole_and_its_headline_cannot_end_the_script(site):
  connection = http.client.HTTPConnection("127.0.0.1", site[1], timeout=60)
  connection.request("GET", "/")
  page = connection.getresponse().read().decode()
  assert page.count("</script>") == 1 and "\\u003c/script>" in page and "src=" not in page


def test_a_reader_that_leaves_ends_the_answer_and_the_conversation_stays_whole():
  begun = []

  def make():
    begun.append(Scripted(max_new_tokens=900))
    begun[0].to_say = [spell("cat " * 200), spell("the mat", IM_END)]
    return begun[0]

  chats, heard = serve.Chats(make), []
  for part in chats.answer("a", "go", False, lambda: len(heard) >= 3):
    heard.append(part)
  assert heard[-1] == {"note": "stopped"} and len(begun[0].tokens) < 200
  assert {"said": "the mat"} == {"said": "".join(p.get("said", "") for p in chats.answer("a", "on", False, bool))}
