"""Metrics to trackio, in its folder on this machine or wherever its own environment variables say.

The callback of transformers is not used: it names runs so that two of them flow into one, opens a run again after the
stage's last measurement without closing it, and can publish what it logged.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback

from .errors import UserError

log = logging.getLogger(__name__)


def check() -> None:
    """A UserError where trackio is not installed."""
    if not find_spec("trackio"):
        raise UserError("trackio is not installed", "training.use_trackio", "run: pip install 'strong2weak[trackio]'")


class TrackioReport(TrainerCallback):  # type: ignore[misc]
    """One run of trackio for one stage; `goes_on` continues the latest run of that name."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], goes_on: bool) -> None:
        import trackio

        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                self._run = trackio.init(
                    project, name, config=dict(config), resume="allow" if goes_on else "never", embed=False
                )
        except ValueError as error:
            raise UserError(str(error), "training.trackio_project", "choose another name") from error
        log.debug("%s", said.getvalue())
        log.info("metrics go to trackio, look at them with: trackio show --project %s", project)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Hands on numbers; names that begin with eval_ are those of measurements."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if numbers:
            self._run.log(numbers, step=state.global_step)

    def close(self) -> None:
        """Ends the run, once everything has been handed over."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
