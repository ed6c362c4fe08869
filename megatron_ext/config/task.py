"""What a run is trained to do, and on what kind of data."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import config


@config
class PretrainTask:
    """The next token of every document, over all tokens alike."""

    kind: Literal["pretrain"]

    @property
    def reads(self) -> Literal["text", "chat", "preference"]:
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
    def reads(self) -> Literal["text", "chat", "preference"]:
        """The kind of prepared data that it is trained on."""
        return "chat"


@config
class PreferenceTask:
    """Preference optimisation on the pairs of tools/preprocess.py --preference: DPO and its kin.

    The mean over the pairs of the global batch. Dropout, router noise, capacity and moves of the router's bias are off.
    """

    kind: Literal["preference"]
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "simpo", "orpo"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290). hinge: 2309.06657. ipo: 2310.12036. robust: DPO that expects a share
    label_smoothing of pairs to be the wrong way round (2403.00409). simpo: 2405.14734. orpo: 2403.07691."""
    beta: float = Field(default=0.1, gt=0)
    """How much a difference of log-probabilities counts; of ipo the paper's tau, of orpo its lambda. 0.1 is usual on
    sums (simpo 2 to 2.5), about 5 where log_probs is mean. 1e-6 to 100: beyond, fp32 has no gradient."""
    log_probs: Literal["sum", "mean"] | None = None
    """What is compared of an answer: the sum of its tokens' log-probabilities, or their mean (length-normalised DPO).
    ipo must say which: the paper has sums, its authors' experiments means. simpo and orpo have means. Default: sum."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round: of sigmoid conservative DPO (cDPO); of robust its noise."""
    gamma: float | None = Field(default=None, ge=0)
    """Of simpo, the margin between both answers that is aimed at: about half of beta."""
    nll: float = Field(default=0.0, ge=0)
    """Weight of the mean cross-entropy of the chosen answer, added to the loss of its pair (RPO 1, Llama 3: 0.2)."""
    reference: Literal["adapters_off", "file", "none"] | None = None
    """What answers are compared with. adapters_off: the base, computed beside each step. file: log-probabilities of the
    weights that the run starts from, computed once at its start and kept beside the pairs. none: nothing; simpo and
    orpo, or reference-free DPO. Default: none for simpo and orpo, adapters_off with adapters, otherwise file."""
    balance_losses: bool = False
    """Keep the balance and z-losses of routers as model says them; otherwise they are off."""

    @property
    def reads(self) -> Literal["text", "chat", "preference"]:
        """The kind of prepared data that it is trained on."""
        return "preference"

    @property
    def by_means(self) -> bool:
        """Whether the mean of an answer's log-probabilities is compared, not their sum."""
        return self.log_probs == "mean" or self.loss in WITHOUT_REFERENCE

    def reference_of(self, *, has_adapters: bool) -> Literal["adapters_off", "file", "none"]:
        """What answers are compared with, in a run with adapters or without."""
        if self.reference is not None:
            return self.reference
        if self.loss in WITHOUT_REFERENCE:
            return "none"
        return "adapters_off" if has_adapters else "file"


WITHOUT_REFERENCE = ("simpo", "orpo")
"""Losses that compare with no reference, and the mean log-probabilities of answers."""


TaskConfig = Annotated[PretrainTask | SftTask | PreferenceTask, Field(discriminator="kind")]
PRETRAIN = PretrainTask(kind="pretrain")
