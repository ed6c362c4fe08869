r"""Japanese web text by HojiChar's filters, telephone numbers and e-mail addresses masked: pip install hojichar.

python tools/preprocess.py corpus --tokenizer tok --output data/ja --deduplicate \
    --filters examples.filters.japanese:Japanese

Run it where `examples` is a folder, or copy this file beside your own and give its name. What a filter leaves out is
counted under the filter's name; dropped.jsonl beside the data keeps some of it to look at.
"""

from hojichar import Document, document_filters

from megatron_ext.data.prepare.filters import Dropped


class Japanese:
    """Cheap filters first; personal data is masked last, in what stays."""

    def __init__(self) -> None:
        self.filters = [
            document_filters.DocumentLengthFilter(min_doc_len=100, max_doc_len=500_000),
            document_filters.AcceptJapanese(),
            document_filters.SingleCharacterRepetitionFilter(threshold=200),
            document_filters.DiscardRareKuten(max_average_sentence_length=100),
            document_filters.DiscardTooShortLines(threshold=0.5),
            document_filters.DiscardTooManyEndingEllipsis(threshold=0.7),
            document_filters.HeaderFooterTagsRemover(),
            document_filters.DiscardBBSComments(),
            document_filters.DiscardAds(),
            document_filters.DiscardAdultContentJa(),
            document_filters.DiscardDiscriminationContentJa(),
            document_filters.DiscardViolenceContentJa(),
            document_filters.MaskPersonalInformation(),
        ]

    def __call__(self, text: str) -> str | Dropped:
        """The text without personal data, or which filter left it out."""
        document = Document(text)
        for one in self.filters:
            document = one.apply(document)
            if document.is_rejected:
                return Dropped(type(one).__name__)
        return document.text
