"""What a run is trained to do, and on what kind of data."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import config


@config
class PretrainTask:
    """The next token of every document, over all tokens alike."""

    kind: Literal["pretrain"]

    @property
    def reads(self) -> Literal["text", "chat"]:
        """The kind of prepared data that it is trained on."""
        return "text"


@config
class SftTask:
    """Supervised fine-tuning: the answers of conversations that tools/preprocess.py --chat prepared.

    Samples are packed by best fit into rows of data.sequence_length; tokens see those of their own sample alone.
    """

    kind: Literal["sft"]
    weighting: Literal["token", "sample", "row"] = "token"
    """The loss is the mean over the global batch of all tokens that are trained on (token), of each sample's own mean,
    so that short answers count as much as long ones (sample), or of tokens by the weight of their row (row)."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """NEFTune (arXiv 2310.05914): in training, noise between -1 and 1 times this / sqrt(tokens of the sample x hidden
    size) is added to embeddings; 5 to 15 there. 0: none."""

    @property
    def reads(self) -> Literal["text", "chat"]:
        """The kind of prepared data that it is trained on."""
        return "chat"


TaskConfig = Annotated[PretrainTask | SftTask, Field(discriminator="kind")]
PRETRAIN = PretrainTask(kind="pretrain")
