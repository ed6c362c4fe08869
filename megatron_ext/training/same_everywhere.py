"""Whether all ranks have the same code, run and data: each node has its own files and its own command line."""

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_ext.checkpoint.collective import gathered
from megatron_ext.config import RunConfig, to_mapping
from megatron_ext.config.load import paths_of
from megatron_ext.errors import ConfigError, DataError, EnvironmentFault, MegatronExtError
from megatron_ext.roll_call import Answer, refused
from megatron_ext.training.data import RunData
from megatron_ext.training.planned import source_paths

_SHOWN = 8


def require_same_code(installed: Mapping[str, str]) -> None:
    """Every rank must call this, with what is installed for it.

    Raises:
        EnvironmentFault: ranks have something else than rank 0; on every rank, with what differs.
    """
    if faults := _differences(installed):
        raise EnvironmentFault(
            "the ranks do not run the same code:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + "\nInstall the same on every node, or start from one installation that all nodes see"
        ).everywhere()


def require_same_run(run: RunConfig) -> None:
    """Every rank must call this. Paths may differ but for the names they give: what lies there is compared.

    Raises:
        ConfigError: ranks have another configuration than rank 0; on every rank, with the keys.
    """
    paths = paths_of(run).keys()  # a list of them has one key
    values = {key: value for key, value in _flat(to_mapping(run)) if not paths & {key, key.rpartition(".")[0]}}
    values["names of data sources"] = list(source_paths(run.data))  # where none is given, of its path
    if faults := _differences(values):
        raise ConfigError(
            "the ranks were not started with the same configuration:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + "\nStart the same command with the same RUN.yaml on every node"
        ).everywhere()


def open_everywhere(open_here: Callable[[], RunData], *, first_rank_first: bool = False) -> RunData:
    """What `open_here` opens on this rank, without waiting for another one; every rank must call this.

    Args:
        first_rank_first: rank 0 builds what the others read.

    Raises:
        MegatronExtError: it failed on a rank; on every rank, naming those it failed on, of which the others would
            only know that they are gone.
        DataError: ranks read other data than rank 0; on every rank.
    """
    is_first, data = dist.get_rank() == 0, None
    for is_this_turn in (is_first, not is_first) if first_rank_first else (True,):
        refusal = None
        try:
            data = open_here() if is_this_turn else data
        except MegatronExtError as error:
            refusal = type(error), str(error)
        except OSError as error:
            refusal = DataError, f"{error.filename}: {error.strerror}"
        answers = gathered(Answer(dist.get_rank(), socket.gethostname(), refusal))
        if any(answer.refusal is not None for answer in answers):
            if data is not None:
                data.close()
            raise refused(answers, len(answers))
    assert data is not None
    if faults := _differences({f"source {number}": name for number, name in enumerate(data.fingerprints)}):
        data.close()
        raise DataError(
            "the ranks do not read the same data, by its fingerprints:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + "\nHave every node see the same files, or copy them there again"
        ).everywhere()
    return data


def _differences(values: Mapping[str, Any]) -> list[str]:
    """In what the ranks differ from rank 0, a line each."""
    if len(set(gathered(_digest(values)))) == 1:
        return []
    told = gathered((socket.gethostname(), dict(values)))  # only now: it is of every rank
    return list(differences(told))


def _digest(values: Mapping[str, Any]) -> str:
    """The same text for the same values, in any process."""
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def differences(told: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Where ranks, each with its host and values, differ from the first: the keys, once for those that are alike."""
    first_host, first = told[0]
    alike: dict[str, list[int]] = {}
    for rank, (_, values) in enumerate(told):
        keys = [key for key in {**first, **values} if values.get(key) != first.get(key)]
        if keys:
            more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            shown = ", ".join(f"{key} = {values.get(key)!r} ({first.get(key)!r} there)" for key in keys[:_SHOWN])
            alike.setdefault(shown + more, []).append(rank)
    for shown, ranks in alike.items():
        hosts = ", ".join(dict.fromkeys(told[rank][0] for rank in ranks))
        numbers = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        yield f"{numbers} on {hosts}, unlike rank 0 on {first_host}: {shown}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its key, as in `section.key` or `section.list.0`."""
    items: Any = None
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    if items is None or not value:
        yield prefix.rstrip("."), value
        return
    for name, item in items:
        yield from _flat(item, f"{prefix}{name}.")
