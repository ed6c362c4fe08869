r"""Web text as FineWeb filtered it, by datatrove, e-mail and IP addresses masked: pip install "datatrove[processing]".

python tools/preprocess.py corpus --tokenizer tok --output data/en --deduplicate \
    --filters examples.filters.web:Web

LANGUAGE says how words are told apart: with English, a Japanese document is a handful of words. FineWeb also left out
near copies (MinHash), which needs all documents at once: run datatrove's own pipeline before, and give its output here.
"""

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import PIIFormatter

from megatron_ext.data.prepare.filters import Dropped

LANGUAGE = "eng"


class Web:
    """Repetition, quality, then personal data in what stays."""

    def __init__(self) -> None:
        self.filters = [
            GopherRepetitionFilter(language=LANGUAGE),
            GopherQualityFilter(language=LANGUAGE),
            FineWebQualityFilter(language=LANGUAGE),
        ]
        self.mask = PIIFormatter()

    def __call__(self, text: str) -> str | Dropped:
        """The text without personal data, or which filter left it out and why."""
        document = Document(text=text, id="")
        for one in self.filters:
            result = one.filter(document)
            keep, reason = result if isinstance(result, tuple) else (result, "")
            if not keep:
                return Dropped(f"{type(one).__name__} {reason}".strip())
        return self.mask.format(text)
