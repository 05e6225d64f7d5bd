"""The hook inside of a training command: Python runs it at its start, since its folder is on PYTHONPATH.

It imports the standard library alone, and does nothing but wait for torch to be imported. Another `sitecustomize`, which this
one hides, runs as it would have. The folder stays on PYTHONPATH, for the processes that this one starts.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_SETUP = json.loads(os.environ.get("AUTOBATCH_HOOK", "{}"))


def _send(**message: object) -> None:
    """Tell the program that started this something; a trial whose probe is gone has nothing more to do."""
    rank = os.environ.get("RANK", "")
    message.update(pid=os.getpid(), rank=int(rank) if rank.isdecimal() else 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.sendto(json.dumps(message).encode(), _SETUP["channel"])
        except OSError:
            if not _SETUP.get("training"):
                os._exit(1)


class _AfterTorch:
    """Finds torch as it would be found, and runs the watcher once it has been imported."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """Find torch, once, and wrap what imports it."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _watch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _watch_training() -> None:
    sys.path.append(_SETUP["package_root"])
    with contextlib.suppress(Exception):  # whatever hinders it, the training goes on
        from autobatch.command.aftermath import watch_end

        watch_end(_send)
    sys.path.remove(_SETUP["package_root"])


def _watch() -> None:
    if _SETUP.get("training"):
        _watch_training()
        return
    sys.path.append(_SETUP["package_root"])
    try:
        from autobatch.command.watching import watch
    except Exception as error:
        version = "{}.{}".format(*sys.version_info)
        _send(
            kind="failed",
            error={
                "kind": "WorkloadError",
                "message": f"the command's Python {version} ({sys.executable}) cannot load autobatch "
                f"({type(error).__name__}: {error}): install autobatch there too",
                "traceback": "",
            },
        )
        os._exit(4)
    finally:
        sys.path.remove(_SETUP["package_root"])
    watch(_SETUP, _send)


def _chain() -> None:
    """Run the `sitecustomize` that would have been run without this one."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if _SETUP:
    sys.meta_path.insert(0, _AfterTorch())
if _SETUP and not _SETUP.get("training"):
    _send(kind="hello", program=" ".join(sys.orig_argv)[:500], ranks=os.environ.get("WORLD_SIZE"))
_chain()
