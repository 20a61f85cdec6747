"""Starts the other processes of a run on this machine; they end when the first one does."""

import os
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from sparsify.common import signals


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher by subprocesses, with two differences.

    Every five seconds Lightning checks whether a process has failed, and then kills the first with
    SIGKILL, so that even a run that was stopped properly cannot return its own exit status. And if
    the first process is killed, Lightning's others live on and wait for it. Outside of a command,
    as in a user's script, this class does what Lightning does.
    """

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        if self.cluster_environment.creates_processes_externally or not signals.active():
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        os.environ[signals.PARENT] = str(os.getpid())
        try:
            self._call_children_scripts()
        finally:
            os.environ.pop(signals.PARENT, None)
        signals.started(self.procs)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        done = threading.Event()
        threading.Thread(target=signals.watch_ranks, args=(done,), daemon=True).start()
        try:
            return function(*args, **kwargs)
        finally:
            done.set()


def use_own_launcher(strategy: Strategy) -> None:
    """Replace a strategy's launcher by ours, if it is Lightning's."""
    found: Any = strategy._launcher
    if type(found) is _SubprocessScriptLauncher:
        strategy._launcher = Launcher(
            found.cluster_environment, found.num_processes, found.num_nodes
        )
