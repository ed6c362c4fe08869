"""Which layouts are proven to train what one process trains: those of the parity grid (tests/README.md)."""

from megatron_ext.config import Layout, RunConfig

_DENSE = ("", "TP", "TP SP", "PP", "PP VPP", "TP SP PP", "CP", "TP CP", "TP SP CP", "CP PP")
_MOE = (
    "",
    "TP SP ETP",
    "PP",
    "PP VPP",
    "EP",
    "EP allgather",
    "TP SP EP ETP allgather",
    "TP SP EP",
    "TP SP EP ETP",
    "PP EP",
    "PP VPP EP",
    "TP SP PP EP",
    "TP SP PP EP ETP",
    "CP",
    "CP EP",
    "TP SP CP EP",
    "TP SP CP PP EP ETP",
    "CP PP VPP",
)
PROVEN = {False: frozenset(_DENSE), True: frozenset(_MOE)}
"""Of dense and of MoE models: the degrees above 1 of each layout of the grid; data parallelism is in all of them."""


def kind_of(run: RunConfig, layout: Layout) -> str:
    """The degrees of `layout` above 1, in words of the grid."""
    parallel, is_moe = run.parallel, run.model.is_moe
    words = {
        "TP": layout.tp > 1,
        "SP": parallel.sequence_parallel,
        "CP": layout.cp > 1,
        "PP": layout.pp > 1,
        "VPP": parallel.virtual_pipeline_model_parallel_size is not None,
        "EP": is_moe and layout.ep > 1,
        "ETP": is_moe and layout.etp > 1,
        "allgather": is_moe and parallel.moe_token_dispatcher_type == "allgather",
        "flex": is_moe and parallel.flex_backend is not None,
    }
    return " ".join(word for word, is_on in words.items() if is_on)


def is_proven(run: RunConfig, layout: Layout) -> bool:
    """Whether a layout of this kind is in the grid; of the sizes of degrees and of models tools/prove.py tells."""
    return kind_of(run, layout) in PROVEN[run.model.is_moe]
