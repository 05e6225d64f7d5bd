"""The hook inside of a training command: Python runs it at its start, since its folder is on PYTHONPATH.

It imports the standard library alone, and does nothing but wait: in a trial for torch to be imported, in a training for the
process's end. Another `sitecustomize`, which this
one hides, runs as it would have. The folder stays on PYTHONPATH, for the processes that this one starts.
"""

from __future__ import annotations

import atexit
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
_IS_TRAINING = bool(_SETUP.get("training"))
_DEEPEST = 8
_LONGEST_TEXT = 2000


def _send(**message: object) -> None:
    """Tell the program that started this something; a trial whose probe is gone has nothing more to do."""
    rank = os.environ.get("RANK", "")
    message.update(pid=os.getpid(), rank=int(rank) if rank.isdecimal() else 0)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(not _IS_TRAINING)  # a training waits for nobody
            channel.sendto(json.dumps(message).encode(), _SETUP["channel"])
    except OSError:
        if not _IS_TRAINING:
            os._exit(1)


class _AfterTorch:
    """Finds torch as it would be found, and runs the watcher once it has been imported."""

    def __init__(self) -> None:
        self._is_finding = False

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """Find torch, and wrap what imports it: who asks only whether it is there may import it later."""
        if name != "torch" or self._is_finding:
            return None
        self._is_finding = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_finding = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _watch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _watch_end() -> None:
    """Tell, at the end of a training, what error ended it; who started the training judges it."""
    own = os.getpid()

    def tell() -> None:
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is not None and os.getpid() == own:
            _send(kind="ended_by", error=_described(error, 0))

    atexit.register(tell)


def _described(error: BaseException | None, depth: int) -> dict[str, object] | None:
    """An error with all that it carries."""
    if error is None or depth > _DEEPEST:
        return None
    return {
        "types": [base.__name__ for base in type(error).__mro__],
        "text": str(error)[:_LONGEST_TEXT],
        "cause": _described(error.__cause__, depth + 1),
        "context": None if error.__suppress_context__ else _described(error.__context__, depth + 1),
        "members": [_described(one, depth + 1) for one in getattr(error, "exceptions", ())[:_DEEPEST]],
    }


def _watch() -> None:
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


if _IS_TRAINING:
    _watch_end()
elif _SETUP:
    sys.meta_path.insert(0, _AfterTorch())
    _send(kind="hello", program=" ".join(sys.orig_argv)[:500], ranks=os.environ.get("WORLD_SIZE"))
_chain()
