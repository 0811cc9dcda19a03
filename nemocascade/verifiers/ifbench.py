"""Checkers of IFBench's instructions (arXiv 2507.02833) on counts, words and sentences.

Each rule is that of the reference implementation, even where it is odd. words:start_verb is missing,
because no package has the data of its part-of-speech tagger.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Iterable

from nemocascade.verifiers import sentences
from nemocascade.verifiers.ifeval import whole_words

TIMES = (1, 2, 3, 5, 7)  # Required counts of the five keywords of count:keywords_multiple.
NAMES = (
  "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander "
  "Amelia Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella "
  "Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope "
  "Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan"
).split()
PRONOUNS = frozenset(
  "i me we us you he him she her it they them my mine our ours your yours his hers its their theirs "
  "myself ourselves yourself yourselves himself herself itself themselves this that these those who "
  "whom whose which what whoever whomever whatever whichever anybody anyone anything everybody "
  "everyone everything nobody nothing somebody someone something each either neither both all some "
  "any none".split()
)
NO_MARKS = str.maketrans("", "", string.punctuation)
EDGES = string.punctuation + " "


def bare_words(text: str) -> list[str]:
  return text.translate(NO_MARKS).split()


def rises(numbers: Iterable[int]) -> bool:
  return all(a < b for a, b in itertools.pairwise(numbers))


# ---- counts and ratios


def word_count_range(text: str, *, min_words: int, max_words: int) -> bool:
  return min_words <= len(sentences.words(text)) <= max_words


def unique_word_count(text: str, *, N: int) -> bool:
  return len({word.strip(EDGES) for word in text.lower().split()}) >= N


def numbers(text: str, *, N: int) -> bool:
  """Whether there are N runs of digits once punctuation is removed: 1,200 and 1.5 are one each."""
  return len(re.findall(r"\d+", text.translate(NO_MARKS))) == N


def keywords_multiple(text: str, **keywords: str) -> bool:
  """keyword1 .. keyword5 appear 1, 2, 3, 5 and 7 times."""
  given = [keywords[f"keyword{i}"].strip() for i in range(1, len(TIMES) + 1)]
  return all(whole_words(text, word) == n for word, n in zip(given, TIMES, strict=True))


def conjunctions(text: str, *, small_n: int) -> bool:
  found = {w for w in text.split() if w.strip(EDGES).lower() in _CONJUNCTIONS}
  return len(found) >= small_n


_CONJUNCTIONS = frozenset(("and", "but", "for", "nor", "or", "so", "yet"))


def person_names(text: str, *, N: int) -> bool:
  return sum(bool(re.search(rf"\b{name}\b", text)) for name in NAMES) >= N


def pronouns(text: str, *, N: int) -> bool:
  tokens = sentences.tokens(text.replace("/", " ").lower())
  return sum(token in PRONOUNS for token in tokens) >= N


def punctuation(text: str) -> bool:
  """The text contains ?! or !? or ‽, and besides it each of . , ! ? ; : at least once."""
  if not any(mark in text for mark in ("!?", "?!", "‽")):
    return False
  rest = text.replace("?!", "", 1) if "?!" in text else text.replace("!?", "", 1)
  return all(mark in rest for mark in ".,!?;:")


# Those of NLTK's English list without an apostrophe: words are runs of letters and digits.
_STOP_WORDS = frozenset(
  "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it "
  "its itself they them their theirs themselves what which who whom this that these those am is are was were be been "
  "being have has had having do does did doing a an the and but if or because as until while of at by for with about "
  "against between into through during before after above below to from up down in out on off over under again further "
  "then once here there when where why how all any both each few more most other some such no nor not only own same so "
  "than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma "
  "mightn mustn needn shan shouldn wasn weren won wouldn".split()
)


def stop_words(text: str, *, percentage: int) -> bool:
  """Stop words are at most this percentage of the words."""
  words = sentences.words(text)
  return bool(words) and 100 * sum(word.lower() in _STOP_WORDS for word in words) <= percentage * len(words)


def overlap(text: str, *, reference_text: str, percentage: int) -> bool:
  """The percentage of the text's trigrams found in the reference is within 2 points of the target."""
  ours, theirs = (
    set(zip(tokens, tokens[1:], tokens[2:])) for tokens in (sentences.tokens(text), sentences.tokens(reference_text))
  )
  return bool(ours) and abs(100 * len(ours & theirs) / len(ours) - percentage) <= 2


def _endings(text: str) -> tuple[int, int, int]:
  """The numbers of sentences that end in a full stop, a question mark, an exclamation mark."""
  ends = Counter(sentence[-1:] for sentence in sentences.punkt(text))
  return ends["."], ends["?"], ends["!"]


def sentence_type(text: str) -> bool:
  statements, questions, _ = _endings(text)
  return statements == 2 * questions


def sentence_balance(text: str) -> bool:
  return len(set(_endings(text))) == 1


def sentence_words(text: str) -> bool:
  """Three sentences of equal length in characters, in which no word is repeated."""
  found = sentences.punkt(text)
  words = bare_words(" ".join(found).lower())
  return len(found) == 3 and len({len(s.strip()) for s in found}) == 1 and len(words) == len(set(words))


# ---- words


def alphabet(text: str) -> bool:
  """The initials of consecutive words follow the alphabet, from Z on to A."""
  firsts = [word[0].lower() for word in bare_words(text)]
  if not firsts or firsts[0] not in string.ascii_lowercase:
    return False
  start = ord(firsts[0]) - ord("a")
  return all(f == string.ascii_lowercase[(start + i) % 26] for i, f in enumerate(firsts))


def vowels(text: str) -> bool:
  """One line that uses at most three different vowels."""
  text = text.strip()
  return "\n" not in text and len(set(text.lower()) & set("aeiou")) <= 3


def consonants(text: str) -> bool:
  """Every word contains two adjacent consonants."""
  return all(re.search("[bcdfghj-np-tv-z]{2}", word) for word in text.lower().split())


def palindromes(text: str) -> bool:
  words = [word for word in bare_words(text.lower()) if len(word) > 4]
  return sum(word == word[::-1] for word in words) >= 10


_PRIMES = frozenset(n for n in range(2, 100) if all(n % k for k in range(2, n)))


def prime_lengths(text: str) -> bool:
  return all(len(word) in _PRIMES for word in bare_words(text))


def repeats(text: str, *, small_n: int) -> bool:
  return max(Counter(bare_words(text.lower())).values(), default=0) <= small_n


def words_japanese(text: str, *, N: int) -> bool:
  """Every N-th word contains a Japanese character, unless it is a number."""
  nth = [word.strip(EDGES) for word in text.split()[N - 1 :: N]]
  return all(re.search("[\u3040-\u30ff\u4e00-\u9fff]", w) for w in nth if w and not w.isdigit())


def odd_even_syllables(text: str) -> bool:
  """Words with an odd and with an even number of syllables alternate."""
  import syllapy  # Reads its dictionary when it is imported.

  odd = [syllapy.count(word) % 2 for word in bare_words(text.lower())]
  return all(a != b for a, b in itertools.pairwise(odd))


def last_first(text: str) -> bool:
  """The last word of each sentence is the first word of the next."""
  for one, after in itertools.pairwise(sentences.punkt(text)):
    last, first = one.rstrip(EDGES).split(), after.lstrip(EDGES).split()
    if not last or not first or last[-1].lower() != first[0].lower():
      return False
  return True


def paragraph_last_first(text: str) -> bool:
  lines = [line.strip().lower().strip(EDGES).split() for line in text.split("\n")]
  return all(words[0] == words[-1] for words in lines if words)


def no_consecutive(text: str) -> bool:
  words = bare_words(text.lower())
  return all(a[0] != b[0] for a, b in itertools.pairwise(words))


def _marked_words(text: str) -> list[str]:
  return [token for token in sentences.tokens(text) if any(char.isalnum() for char in token)]


def keywords_specific_position(text: str, *, keyword: str, n: int, m: int) -> bool:
  """The keyword is the m-th word of the n-th sentence, ignoring case."""
  found = sentences.punkt(text)
  words = _marked_words(found[n - 1]) if 1 <= n <= len(found) else []
  return 1 <= m <= len(words) and words[m - 1].lower() == keyword.strip().lower()


def words_position(text: str, *, keyword: str) -> bool:
  """The keyword is both the second word and the second to last, ignoring case."""
  words = _marked_words(text.lower())
  return len(words) > 1 and words[1] == words[-2] == keyword.strip().lower()


# ---- sentences


def alliteration_increment(text: str) -> bool:
  """Each sentence has more alliterating words than the one before."""
  return rises([-1, *map(_alliterating, sentences.punkt(text))])


# The number of words that begin with the same letter as an adjacent word.
def _alliterating(sentence: str) -> int:
  words = [word.lstrip(EDGES) for word in sentence.lower().split()]
  firsts = [word[0] for word in words if word]
  runs = [len(list(run)) for _, run in itertools.groupby(firsts)]
  return sum(length for length in runs if length > 1)


def sentence_keyword(text: str, *, word: str, N: int) -> bool:
  found = sentences.punkt(text)
  return 1 <= N <= len(found) and whole_words(found[N - 1], word) > 0


def increment(text: str, *, small_n: int) -> bool:
  """Each sentence has `small_n` more words than the one before."""
  counts = [len(bare_words(sentence)) for sentence in sentences.punkt(text)]
  return all(b == a + small_n for a, b in itertools.pairwise(counts))
