"""Kill exports at every file operation, one after the other, and look at what each leaves.

crash_run.py FOLDER: prints, as JSON, by scenario the operations at which a child was killed, and
how often what lay at the place then was nothing, version 1 or version 2.
"""

import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import safetensors.torch
import torch
from transformers.utils.logging import disable_progress_bar

from sparsify import SparseCausalLM
from sparsify.common import replace
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file.file import MaskWriter
from sparsify.export.mask_file.index import FILE_NAME
from tests.conftest import tiny_llama, word_tokenizer
from tests.export.test_folder import masked_module

WATCHED = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.", "tempfile.")
Digest = dict[str, str] | None


class Reaper:
    """Kills this process at its ``at``-th file operation, whose name it writes to ``pipe``."""

    def __init__(self, at: int, pipe: int) -> None:
        self.left = at
        self.pipe = pipe

    def step(self, operation: str) -> None:
        if self.left == 0:
            os.write(self.pipe, operation.encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(args[0], int):
            flags = args[2] if isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.step(f"open {Path(os.fsdecode(args[0])).name}")
        elif event.startswith(WATCHED):
            self.step(event)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with a step before it and one after it."""

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.step(f"before {name}")
            result = call(*args, **kwargs)
            self.step(f"after {name}")
            return result

        return stepped

    def halfway(self, write: Callable[..., None]) -> Callable[..., None]:
        """A native write of a file, with a step at which half of it is there."""

        def stepped(tensors: Any, path: Any, **kwargs: Any) -> None:
            write(tensors, path, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            self.step(f"half of {Path(path).name}")
            write(tensors, path, **kwargs)

        return stepped

    def watch(self, exchange: bool) -> None:
        """From here on; hooks cannot be taken off."""
        write = self.halfway(safetensors.torch.serialize_file)
        safetensors.torch.serialize_file = self.around("safetensors", write)
        add = MaskWriter.add
        MaskWriter.add = self.around("a mask", add)  # type: ignore[method-assign]
        os.fsync = lambda handle: self.step("fsync")
        swap = replace._exchange if exchange else _no_exchange
        replace._exchange = self.around("exchange", swap)
        sys.addaudithook(self.audit)


def _no_exchange(one: Path, other: Path) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def killed_at(at: int, exchange: bool, work: Callable[[], None]) -> str | None:
    """Do the work in a child that dies at an operation; its name, or None if it came to the end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Reaper(at, write).watch(exchange)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    operation = os.read(read, 1000).decode()
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return operation
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return None


def digest(folder: Path) -> Digest:
    """The hashes of all files by name; None where there is no folder."""
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): hashlib.sha256(contents(path)).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(path: Path) -> bytes:
    """All bytes; those of a safetensors header in a fixed order, since its writer has none."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


class Scenario:
    """Kills at every operation of one kind of export."""

    def __init__(self, folder: Path, modules: dict[str, SparseCausalLM], known: dict[str, Digest]):
        self.place = folder / "out"
        self.modules = modules
        self.known = known

    def export(self, version: str) -> None:
        export(self.modules[version].masked, self.place, {"run": version}, overwrite=True)

    def run(self, before: str, exchange: bool = True, start: int = 0) -> dict[str, Any]:
        operations: list[str] = []
        found: Counter[str] = Counter()
        self.export("version 1")
        while True:
            if before == "nothing":
                shutil.rmtree(self.place)
            at = start + len(operations)
            operation = killed_at(at, exchange, lambda: self.export("version 2"))
            state = self.state()
            if operation is None:
                assert state == "version 2"
                assert os.listdir(self.place.parent) == ["out"]
                return {"operations": operations, "found": dict(found)}
            operations.append(operation)
            found[state] += 1
            if state == "nothing" and before != "nothing":
                self.check_hidden()
            else:
                assert state in (before, "version 2"), (operation, state)
            self.export("version 1")
            assert self.state() == "version 1"
            assert os.listdir(self.place.parent) == ["out"], operation

    def state(self) -> str:
        """Which version lies at the place; fails at a mixture."""
        found = digest(self.place)
        names = [name for name, expected in self.known.items() if found == expected]
        assert names, f"a mixture lies at the place: {found}"
        return names[0]

    def check_hidden(self) -> None:
        """With nothing at the place, both versions are whole beside it."""
        partial, former = sorted(self.place.parent.glob(".out.partial-*"))
        assert digest(partial) == self.known["version 2"]
        assert digest(former) == self.known["version 1"]
        assert former.name == f"{partial.name}.former"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # What a killed process has written stays, flushed or not; it is power cuts that take it.
    os.fsync = lambda handle: None
    gc.disable()  # in a child it would touch, and so copy, all that Python holds
    disable_progress_bar()
    modules = {
        f"version {seed}": masked_module(tiny_llama(seed), word_tokenizer()) for seed in (1, 2)
    }
    known: dict[str, Digest] = {"nothing": None}
    for version, module in modules.items():
        export(module.masked, folder / version, {"run": version})
        known[version] = digest(folder / version)
    one, two = known["version 1"] or {}, known["version 2"] or {}
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {"model.safetensors", FILE_NAME, MANIFEST}
    results: dict[str, Any] = {}

    def run(name: str, before: str, exchange: bool = True, start: int = 0) -> None:
        (folder / name).mkdir()
        results[name] = Scenario(folder / name, modules, known).run(before, exchange, start)

    run("over a former", "version 1")
    run("first", "nothing")
    # Up to here it is the same as with it.
    start = results["over a former"]["operations"].index("before exchange")
    run("without exchange", "version 1", exchange=False, start=start)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
