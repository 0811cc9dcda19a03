"""Splits text into words and sentences as the reference checkers of IFEval and IFBench do.

IFEval counts sentences with Punkt, but uses rules of its own to find their first and last words.
IFBench uses Punkt for both. The Python package `punkt` contains Punkt's English model, so nothing is
downloaded at run time.
"""

from __future__ import annotations

import functools
import re
from typing import Any


def words(text: str) -> list[str]:
  return re.findall(r"\w+", text)


def punkt(text: str) -> list[str]:
  """Sentences by Punkt (Kiss and Strunk, 2006); its model knows abbreviations such as Dr. and Inc."""
  return _punkt().tokenize(text)


def tokens(text: str) -> list[str]:
  """Words and punctuation marks by NLTK's word tokenizer; a full stop is a separate token."""
  return [token for sentence in punkt(text) for token in _tokenizer().tokenize(sentence)]


@functools.cache
def _punkt() -> Any:
  """NLTK's Punkt with the English model of NLTK's data `punkt_tab`, from the package `punkt`."""
  import punkt as package
  from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

  model, parameters = package.load_model("english"), PunktParameters()
  parameters.abbrev_types = set(model.abbrev_types)
  parameters.collocations = {tuple(pair) for pair in model.collocations}
  parameters.sent_starters = set(model.sent_starters)
  for word, contexts in model.ortho_context.items():
    parameters.add_ortho_context(word, int(contexts))
  return PunktSentenceTokenizer(parameters)


@functools.cache
def _tokenizer() -> Any:
  from nltk.tokenize import NLTKWordTokenizer

  return NLTKWordTokenizer()


_DOT, _STOP = "\ue000", "\ue001"  # Placeholders: a full stop within a sentence; a sentence's end.
_LETTER = "([A-Za-z])"
_STARTERS = (
  r"(Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|He\s|She\s|It\s|They\s|Their\s|Our\s|We\s|But\s|However\s|That\s"
  r"|This\s|Wherever)"
)
_BEFORE_PHD = (
  (r"(Mr|St|Mrs|Ms|Dr)\.", rf"\1{_DOT}"),
  (r"\.(com|net|org|io|gov|edu|me)", rf"{_DOT}\1"),
  (r"([0-9])\.([0-9])", rf"\1{_DOT}\2"),
)
_AFTER_PHD = (
  (rf"\s{_LETTER}\. ", rf" \1{_DOT} "),
  (rf"([A-Z]\.[A-Z]\.(?:[A-Z]\.)?) {_STARTERS}", rf"\1{_STOP} \2"),
  (rf"{_LETTER}\.{_LETTER}\.{_LETTER}\.", rf"\1{_DOT}\2{_DOT}\3{_DOT}"),
  (rf"{_LETTER}\.{_LETTER}\.", rf"\1{_DOT}\2{_DOT}"),
  (rf" (Inc|Ltd|Jr|Sr|Co)\. {_STARTERS}", rf" \1{_STOP} \2"),
  (r" (Inc|Ltd|Jr|Sr|Co)\.", rf" \1{_DOT}"),
  (rf" {_LETTER}\.", rf" \1{_DOT}"),
)
# Moves a closing quotation mark before the mark that ends the sentence.
_QUOTES = ((".”", "”."), ('."', '".'), ('!"', '"!'), ('?"', '"?'))


def by_rules(text: str) -> list[str]:
  """Sentences by IFEval's rules: each . ? ! ends one, except in abbreviations and numbers."""
  text = f" {text}  ".replace("\n", " ")
  for pattern, replacement in _BEFORE_PHD:
    text = re.sub(pattern, replacement, text)
  text = re.sub(r"\.{2,}", lambda dots: _DOT * len(dots[0]) + _STOP, text)
  text = text.replace("Ph.D.", f"Ph{_DOT}D{_DOT}")
  for pattern, replacement in _AFTER_PHD:
    text = re.sub(pattern, replacement, text)
  for pair, swapped in _QUOTES:
    text = text.replace(pair, swapped)
  for mark in ".?!":
    text = text.replace(mark, mark + _STOP)
  sentences = [piece.strip() for piece in text.replace(_DOT, ".").split(_STOP)]
  return sentences if sentences[-1] else sentences[:-1]
