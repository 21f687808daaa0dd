"""Parsing a sentence into nested templates (句模版解析:语言的层次结构).

Source: Scientific Spaces article 5577 (minimum entropy, part 3) and its software nlp-zero (article 5597).

Method. A sentence is a block; a block is produced by one template whose holes are blocks again, down to single words:

    score(block) = max over the templates that match all of it of [ln(f / sum of all f) + sum over holes of score(hole)]
    score(block) = null_score * (words - 1)    where no template matches; it is shown flat, and one word scores 0

f is the support of a template. A hole takes one word or more; fixed words without a hole between them stand next to
each other; a template without a hole at a side begins (ends) with its fixed word there.

Which match of a block is taken: 1. the higher score, rounded to 4 digits; 2. more fixed words in the template of the
block; 3. the leftmost, that is the one whose positions of fixed words come first in lexical order. So the block
雪梨和苹果和香蕉 is (雪梨)和((苹果)和(香蕉)), split at the first 和. Two matches of a block differ in these positions,
hence the tree is unique. The rule holds for each block by itself, inner blocks first.

What we do differently, and why:
- The author's program finds every block anew wherever it occurs, in exponential time, and recurses. This one keeps the
  score of each block and of each partial match (an interval programme over a trie of templates), and nothing recurses:
  n words of which r are fixed in some template take O(n + r^2) memory and time proportional to r^2 partial matches.
- A template of holes alone would produce a block from itself for ever; it is ignored, but counts in the sum of all f.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kexue._checks import check_real
from kexue.words import _parser as kernels
from kexue.words._display import gap, join_words
from kexue.words._text import check_words
from kexue.words._wordtrie import WordTrie
from kexue.words.templates import Template

_MOST_CELLS = 100_000_000  # 8 bytes each


class Tree:
    """A block of a sentence: its template, and the blocks in the holes of the template.

    Attributes:
        template: Tuple of words and None (a hole); None when no template matches the block.
        children: The blocks in the holes, left to right.
        score: Score of the block, the higher the better; 0 for a word by itself.

    ``str(tree)`` puts each block into parentheses. Trees are compared by words, templates and children.
    """

    __slots__ = ("_begin", "_end", "_tokens", "children", "score", "template")

    def __init__(
        self,
        tokens: tuple[str, ...],
        begin: int,
        end: int,
        template: tuple[str | None, ...] | None,
        children: tuple[Tree, ...],
        score: float,
    ) -> None:
        self._tokens, self._begin, self._end = tokens, begin, end
        self.template = template
        self.children = children
        self.score = score

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the block."""
        return self._tokens[self._begin : self._end]

    @property
    def text(self) -> str:
        """The words joined, with spaces except in Chinese and the like."""
        return join_words(self.words)

    def nodes(self) -> list[Tree]:
        """The block and all inside it, each before its children."""
        found, stack = [], [self]
        while stack:
            tree = stack.pop()
            found.append(tree)
            stack.extend(reversed(tree.children))
        return found

    def _build(self, leaf: Callable[[Tree], Any], branch: Callable[[Tree, list[Any]], Any]) -> Any:
        """Fold the tree from its leaves to its root, without recursion."""
        done: dict[int, Any] = {}
        for tree in reversed(self.nodes()):
            parts = [done.pop(id(child)) for child in tree.children]
            done[id(tree)] = leaf(tree) if tree.template is None else branch(tree, parts)
        return done[id(self)]

    def __str__(self) -> str:
        # Pieces are written once, from left to right: a string per level would take quadratic time.
        pieces: list[str] = []
        ends: list[str] = []  # the last word written, for the space behind it
        stack: list[Any] = [self]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                pieces.append(item)
            elif isinstance(item, tuple):
                word, opening = item
                if ends:
                    space = gap(ends[-1], word)
                    pieces.append(space)
                pieces.append("(" if opening else word)
                if opening:
                    ends.clear()
                else:
                    ends[:] = [word]
            elif item.template is None:
                stack.extend((word, False) for word in reversed(item.words))
            else:
                blocks = iter(item.children)
                parts: list[Any] = []
                for word in item.template:
                    if word is None:
                        block = next(blocks)
                        parts.extend([(block._tokens[block._begin], True), block, ")"])
                    else:
                        parts.append((word, False))
                stack.extend(reversed(parts))
        return "".join(pieces)

    def __repr__(self) -> str:
        return f"Tree({str(self)!r}, score={self.score:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tree):
            return NotImplemented
        mine, theirs = self.nodes(), other.nodes()
        return (
            self.words == other.words
            and len(mine) == len(theirs)
            and all(
                (a.template, a._begin - self._begin, a._end - self._begin)
                == (b.template, b._begin - other._begin, b._end - other._begin)
                for a, b in zip(mine, theirs, strict=True)
            )
        )

    def __hash__(self) -> int:
        return hash((self.words, self.template, len(self.children)))

    def __reduce__(self) -> tuple[Any, ...]:
        rows = [(t._begin, t._end, t.template, len(t.children), t.score) for t in reversed(self.nodes())]
        return _restore, (self._tokens, rows)

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON values: template, text, words, score, children."""

        def entry(tree: Tree, children: list[Any]) -> dict[str, Any]:
            return {
                "template": None if tree.template is None else list(tree.template),
                "text": tree.text,
                "words": list(tree.words),
                "score": tree.score,
                "children": children,
            }

        found: dict[str, Any] = self._build(lambda tree: entry(tree, []), entry)
        return found

    def to_nltk(self) -> Any:
        """The tree as `nltk.Tree`: labels are templates ("[X]的[X]", or "*" without one), leaves are the words.

        Raises:
            ImportError: nltk is not installed.
        """
        try:
            from nltk import Tree as NltkTree
        except ImportError as error:
            raise ImportError("to_nltk() needs nltk (pip install nltk); to_dict() does not") from error

        def branch(tree: Tree, children: list[Any]) -> Any:
            blocks = iter(children)
            pattern = tree.template or ()
            label = "_".join("[X]" if word is None else word for word in pattern)
            return NltkTree(label, [next(blocks) if word is None else word for word in pattern])

        return self._build(lambda tree: NltkTree("*", list(tree.words)), branch)


def _restore(tokens: tuple[str, ...], rows: list[Any]) -> Tree:
    done: list[Tree] = []
    for begin, end, template, count, score in rows:
        children = tuple(reversed(done[len(done) - count :])) if count else ()
        if count:
            del done[len(done) - count :]
        done.append(Tree(tokens, begin, end, template, children, score))
    return done[-1]


class TemplateParser:
    """Parse sentences into nested templates.

    Args:
        templates: :class:`Template` objects (``TemplateMiner.templates_``), pairs (pattern, support), or a mapping
            pattern -> support. Holes in a row are one; supports of equal patterns are added.
        tokenize: Splits a text into words; None splits at white space. A :class:`Segmenter` is one.
        null_score: Price of each further word of a block that no template matches.

    Attributes:
        templates: Pattern -> support, as used.

    Raises:
        ValueError: An empty pattern, or a support that is not a positive number.
        TypeError: Something else than templates.

    Reference:
        Scientific Spaces, articles 5577 and 5597.

    Example:
        >>> templates = {(None, "和", None): 5, (None, "的", None, "是", None, "呢"): 2}
        >>> tree = TemplateParser(templates).parse("雪梨 和 苹果 和 香蕉 的 颜色 是 什么 呢")
        >>> print(tree)
        ((雪梨)和((苹果)和(香蕉)))的(颜色)是(什么)呢
        >>> tree.template, [child.text for child in tree.children]
        ((None, '的', None, '是', None, '呢'), ['雪梨和苹果和香蕉', '颜色', '什么'])
    """

    def __init__(
        self,
        templates: Iterable[Template] | Iterable[tuple[Sequence[str | None], float]] | Mapping[Any, float],
        tokenize: Callable[[str], Sequence[str]] | None = None,
        null_score: float = -20.0,
    ) -> None:
        check_real("null_score", null_score)
        if tokenize is not None and not callable(tokenize):
            raise TypeError(f"tokenize must be a function from str to a list of str, or None; got {tokenize!r}")
        self.tokenize = tokenize
        self.null_score = float(null_score)
        self.templates: dict[tuple[str | None, ...], float] = {}
        for number, (pattern, support) in enumerate(_pairs(templates)):
            shape = _normal(pattern, number)
            check_real(f"support of template {number}", support, above=0.0)
            self.templates[shape] = self.templates.get(shape, 0) + support
        total = math.log(sum(self.templates.values())) if self.templates else 0.0
        fixed = [pattern for pattern in self.templates if pattern != (None,)]
        self._trie = WordTrie.build(fixed)
        shares = np.array([math.log(self.templates[pattern]) - total for pattern in fixed] + [-math.inf])
        self._ends = (self._trie.closed >= 0) | (self._trie.opened >= 0)
        self._closed, self._opened = shares[self._trie.closed], shares[self._trie.opened]

    def __repr__(self) -> str:
        return f"TemplateParser({len(self.templates)} templates, null_score={self.null_score:g})"

    def parse(self, text: str | Sequence[str]) -> Tree:
        """Find the best tree of one sentence.

        Args:
            text: The sentence, or its words.

        Returns:
            The tree; for a sentence without words a block without words, score 0.

        Raises:
            ValueError: More than 10 000 words that are fixed in templates (800 MB).
            TypeError: Neither a str nor a sequence of str.
        """
        tokens = tuple(self._words(text))
        n, trie = len(tokens), self._trie
        words = np.fromiter((trie.numbers.get(token, -1) for token in tokens), np.int64, n)
        present = np.unique(words[words >= 0])
        node, link, link_word, link_hole, link_to = kernels.restrict(
            trie.first, trie.keys, trie.child, self._ends, present
        )
        used = np.zeros(present.size + 1, np.bool_)
        used[link_word] = True
        local = np.where(words >= 0, np.searchsorted(present, words), present.size)
        places = np.flatnonzero(used[local])
        if n == 0:
            return Tree(tokens, 0, 0, None, (), 0.0)
        if (places.size + 1) ** 2 > _MOST_CELLS:
            raise ValueError(
                f"a sentence may have at most {math.isqrt(_MOST_CELLS) - 1} words that templates fix; got "
                f"{places.size} in {n} words (split the text into sentences)"
            )
        bounds, score, fixed, positions = kernels.parse(
            n,
            places,
            local[places],
            link,
            link_word,
            link_hole,
            link_to,
            trie.depth[node].astype(np.int64),
            self._closed[node],
            self._opened[node],
            present.size,
            self.null_score,
        )
        score = score + 0.0  # 0 instead of -0.0
        return _tree(tokens, bounds.tolist(), score.tolist(), fixed.tolist(), positions.tolist())

    def _words(self, text: Any) -> list[str]:
        if isinstance(text, str):
            return check_words(text.split() if self.tokenize is None else self.tokenize(text), "tokenize(text)")
        if isinstance(text, (bytes, Mapping)) or not isinstance(text, (Sequence, np.ndarray)):
            raise TypeError(f"text must be a str or a sequence of str; got {type(text).__name__}")
        return check_words(text, "text")


def _pairs(templates: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(templates, (str, bytes)) or not isinstance(templates, Iterable):
        raise TypeError(f"templates must be Template objects or pairs (pattern, support); got {templates!r}")
    for number, item in enumerate(templates.items() if isinstance(templates, Mapping) else templates):
        if isinstance(item, Template):
            yield item.pattern, item.support
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            yield item[0], item[1]
        else:
            raise TypeError(f"template {number} must be a Template or a pair (pattern, support); got {item!r}")


def _normal(pattern: Any, number: int) -> tuple[str | None, ...]:
    """The pattern as a tuple, holes in a row as one."""
    if not isinstance(pattern, (tuple, list)) or not all(word is None or isinstance(word, str) for word in pattern):
        raise TypeError(f"the pattern of template {number} must be a tuple of str and None; got {pattern!r}")
    shape = [word for k, word in enumerate(pattern) if word is not None or k == 0 or pattern[k - 1] is not None]
    if not shape or "" in shape:
        raise ValueError(f"the pattern of template {number} must have non-empty words or holes; got {pattern!r}")
    return tuple(shape)


def _tree(
    tokens: tuple[str, ...], bounds: list[list[int]], score: list[float], fixed: list[int], positions: list[int]
) -> Tree:
    """Put blocks together; each comes after the one around it."""
    done: dict[tuple[int, int], Tree] = {}
    for b in range(len(bounds) - 1, -1, -1):
        begin, end = bounds[b]
        places = positions[fixed[b] : fixed[b + 1]]
        template: list[str | None] = []
        children: list[Tree] = []
        before = begin - 1
        for place in [*places, end] if places else []:
            if place > before + 1:
                template.append(None)
                children.append(done.pop((before + 1, place)))
            if place < end:
                template.append(tokens[place])
            before = place
        done[begin, end] = Tree(tokens, begin, end, tuple(template) if places else None, tuple(children), score[b])
    return done[0, len(tokens)]
