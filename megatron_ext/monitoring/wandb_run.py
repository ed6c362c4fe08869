"""Weights & Biases: one run across interruptions, and no way for it to stop training."""

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_ext.config import WandbConfig

log = logging.getLogger(__name__)

# Without a limit wandb waits at the end until the network is back, and the job with it.
_FINISH_SECONDS = 60


def new_run_id() -> str:
    """An identifier for a W&B run."""
    return secrets.token_hex(4)


class WandbRun:
    """A W&B run, or nothing where W&B is off or failed. Credentials come from WANDB_API_KEY or `wandb login`."""

    def __init__(self, settings: WandbConfig, run_id: str, directory: Path, configuration: Mapping[str, Any]) -> None:
        self._run: Any = None
        if settings.mode == "off":
            return
        modes: list[Literal["online", "offline"]] = ["offline"] if settings.mode == "offline" else ["online", "offline"]
        for mode in modes:
            try:
                self._run = _start(settings, mode, run_id, directory, configuration)
                return
            except Exception as error:  # noqa: BLE001 - whatever W&B does, training goes on
                log.warning("W&B could not start in mode %s: %s", mode, error)
        log.warning("training goes on without W&B; everything is in the metrics file")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Report `values` for `step`."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # noqa: BLE001 - whatever W&B does, training goes on
            log.warning("W&B stopped taking reports (%s); everything is in the metrics file", error)
            self._run = None

    def load(self, shares: list[float]) -> Any:
        """A load over experts as W&B draws it over time: a heat map with one row an expert."""
        if self._run is None:
            return None
        import numpy
        import wandb

        if len(shares) > wandb.Histogram.MAX_LENGTH:
            return None  # W&B draws no more; the metrics file has it
        return wandb.Histogram(np_histogram=(numpy.array(shares), numpy.arange(len(shares) + 1)))

    def close(self, *, failed: bool = False) -> None:
        """Finish the run."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:  # noqa: BLE001 - whatever W&B does, training goes on
            log.warning("W&B could not finish: %s", error)


def _start(
    settings: WandbConfig,
    mode: Literal["online", "offline"],
    run_id: str,
    directory: Path,
    configuration: Mapping[str, Any],
) -> Any:
    import wandb  # slow to import, and not needed where it is off

    if mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("no credentials: set WANDB_API_KEY or run `wandb login`")
    where = Path(settings.directory) if settings.directory else directory
    where.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or directory.name,
        id=run_id,
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(where),
        config=dict(configuration),
        settings=wandb.Settings(init_timeout=30, finish_timeout=_FINISH_SECONDS, console="off", silent=True),
    )
