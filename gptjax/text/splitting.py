"""Where a long text may be cut so that its pieces encode as the whole does."""

import re
from collections.abc import Iterator

# Where every byte-level tokenizer that we know splits, GPT-2's, GPT-4's, GPT-4o's and ours among them: after a line
# break between visible characters, and before a single space between them. GPT-4o's takes a slash after punctuation and
# line breaks to both.
_CUT = re.compile(r"(?<=\S\n)(?=[^\s/])|(?<=\S)(?= \S)")
_CUT_SEARCH_CHARACTERS = 4096


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Cut a long text into pieces that encode, one by one, to the ids of the whole.

    The cuts are between words or lines, where byte-level tokenizers always split. A text without such a
    place in the last 4096 of `max_characters` is cut there, and its ids may differ around the cut.
    """
    start = 0
    while len(text) - start > max_characters:
        end = start + max_characters
        cuts = _CUT.finditer(text, max(start + 1, end - _CUT_SEARCH_CHARACTERS), end + 1)
        cut = max((match.start() for match in cuts if match.start() <= end), default=end)
        yield text[start:cut]
        start = cut
    yield text[start:]
