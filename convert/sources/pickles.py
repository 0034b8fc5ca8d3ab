"""PyTorch pickles read as tables of tensors, without running what they call.

A pickle is a program. This reader knows the few instructions that tensors and plain containers
need, turns them into records that do nothing, and refuses any other instruction by name. It opens
no file and needs no torch.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from jlayer.checkpoint.safetensors import MAX_DIMS, MAX_TENSORS
from jlayer.checkpoint.source import SourceFile
from jlayer.convert.sources.archive import Entry
from jlayer.convert.sources.files import Checksum, Place, Strided, TensorInfo
from jlayer.errors import CheckpointError
from jlayer.strict import is_tensor_name

# 723 tensors take 19,000 instructions; 2.5 million take a second.
MAX_INSTRUCTIONS = 30 * MAX_TENSORS
MAX_DEPTH = 64
_ORDERED_DICT = "collections OrderedDict"
_REBUILD = "torch._utils _rebuild_tensor_v2"
_REBUILD_TYPED = "torch._utils _rebuild_tensor_v3"  # for dtypes without a storage of their own
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_UNTYPED = "torch.storage UntypedStorage"
# torch's storages -> dtype and bytes an element. Most dtypes are refused later, by tensor name.
_STORAGES = {
    "torch FloatStorage": ("float32", 4),
    "torch HalfStorage": ("float16", 2),
    "torch BFloat16Storage": ("bfloat16", 2),
    "torch DoubleStorage": ("float64", 8),
    "torch LongStorage": ("int64", 8),
    "torch IntStorage": ("int32", 4),
    "torch ShortStorage": ("int16", 2),
    "torch CharStorage": ("int8", 1),
    "torch ByteStorage": ("uint8", 1),
    "torch BoolStorage": ("bool", 1),
    "torch ComplexFloatStorage": ("complex64", 8),
    "torch ComplexDoubleStorage": ("complex128", 16),
    _UNTYPED: (None, 1),
}
_TYPED_DTYPES = {
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
}
_GLOBALS = {
    *(_ORDERED_DICT, _REBUILD, _REBUILD_TYPED, _REBUILD_PARAMETER, *_STORAGES),
    *(f"torch {dtype}" for dtype in _TYPED_DTYPES),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
SAFER = "take the model's safetensors"


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    """The memory that tensors are views of; `dtype` is None for bytes."""

    dtype: str | None
    item_bytes: int
    n_elements: int
    entry: Entry


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as a view of a storage; offset and strides in elements of the tensor's dtype."""

    storage: _Storage
    dtype: str
    item_bytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape)

    def place(self, name: str, file: SourceFile) -> Place:
        offset = self.storage.entry.offset + self.offset * self.item_bytes
        if not self._is_plain():
            return Place(name, file, offset, strided=Strided(self.shape, self.strides))
        n_bytes, entry = math.prod(self.shape) * self.item_bytes, self.storage.entry
        # A CRC of 0 means none: torch.save can be told to leave them out.
        whole = self.offset == 0 and n_bytes == entry.n_bytes and entry.crc
        return Place(name, file, offset, checksum=Checksum(n_bytes, entry.crc) if whole else None)

    def _is_plain(self):
        """Whether its elements lie in order; the stride of an axis of size 1 does not matter."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return math.prod(self.shape) == 0
            step *= size
        return True


class _Ordered(dict):
    """An OrderedDict. Its state alone may be set, and only to the versions that torch keeps."""


def read_records(raw: bytes, entries: dict[str, Entry], *, where: str) -> dict[str, TensorRecord]:
    """The tensors by name that the pickle `raw` builds from an archive's `entries`.

    Raises CheckpointError: unsafe, damaged, no table of tensors, or a tensor beyond the data.
    """
    return _Pickle(raw, entries, where).tensors()


class _Pickle:
    """The part of the pickle machine that a table of tensors needs; it calls nothing."""

    def __init__(self, raw: bytes, entries: dict[str, Entry], where: str):
        self._raw, self._entries, self._where = raw, entries, where
        self._stack, self._marked, self._memo = [], [], {}
        self._storages: dict[str, _Storage] = {}

    def tensors(self) -> dict[str, TensorRecord]:
        """Runs the pickle; the table of tensors that it builds."""
        table = self._run()
        if not isinstance(table, dict):
            raise CheckpointError(
                f"{self._where}: holds {_article(table)}, expected names with tensors; {SAFER}"
            )
        others = [name for name, value in table.items() if not isinstance(value, TensorRecord)]
        if others:
            kinds = [f"{name[:80]!a} is {_article(table[name])}" for name in others[:20]]
            raise CheckpointError(
                f"{self._where}: not only tensors: {', '.join(kinds)}; save the tensors alone"
            )
        for name in table:
            _check_name(name, self._where)
        if len(table) > MAX_TENSORS:
            raise CheckpointError(
                f"{self._where}: {len(table)} tensors, over the limit of {MAX_TENSORS}"
            )
        return table

    def _run(self):
        try:
            for opcode, argument, at in _instructions(self._raw, self._where):
                if opcode == "STOP":
                    if at + 1 != len(self._raw):
                        raise self._unsafe(f"{len(self._raw) - at - 1} bytes after its end")
                    return self._stack.pop()
                self._step(opcode, argument)
        except (IndexError, KeyError, ValueError):
            raise self._unsafe("damaged (its instructions do not fit together)") from None
        raise self._unsafe("cut off")

    def _step(self, opcode, argument):
        stack = self._stack
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _PUTS:
            self._memo[argument] = stack[-1]
        elif opcode in _GETS:
            stack.append(self._memo[argument])
        elif opcode == "MARK":
            if len(self._marked) == MAX_DEPTH:
                raise self._unsafe(f"nested deeper than {MAX_DEPTH} levels")
            self._marked.append(stack)
            self._stack = []
        elif opcode in _TUPLES:
            self._push_tuple(_TUPLES[opcode])
        elif opcode == "TUPLE":
            self._stack = self._marked.pop()
            self._stack.append(tuple(stack))
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode == "EMPTY_LIST":
            stack.append([])
        elif opcode == "GLOBAL":
            stack.append(self._global(argument))
        elif opcode == "REDUCE":
            arguments = stack.pop()
            stack.append(self._reduce(stack.pop(), arguments))
        elif opcode == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif opcode == "PROTO":
            if argument != 2:
                raise self._unknown(f"protocol {argument}, where torch.save writes 2")
        else:
            self._fill(opcode)

    def _fill(self, opcode):
        """Runs an instruction that puts values into a container."""
        if opcode in ("APPENDS", "SETITEMS"):
            items, self._stack = self._stack, self._marked.pop()
        elif opcode in ("APPEND", "BUILD"):
            items = [self._stack.pop()]
        elif opcode == "SETITEM":
            items = [self._stack.pop(-2), self._stack.pop()]
        else:
            raise self._unknown(f"instruction {opcode}")
        target = self._stack[-1]
        if opcode.startswith("APPEND") and type(target) is list:
            target.extend(items)
        elif opcode.startswith("SETITEM") and isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                self._set(target, key, value)
        elif opcode == "BUILD" and type(target) is _Ordered:
            if type(items[0]) is not dict or set(items[0]) - {"_metadata"}:
                raise self._unsafe("state other than torch's versions for an OrderedDict")
        else:
            raise self._unsafe(f"{opcode} on {_article(target)}")

    def _push_tuple(self, n):
        items = tuple(self._stack[-n:])
        if len(items) < n:
            raise IndexError
        self._stack[-n:] = [items]

    def _set(self, target, key, value):
        if type(key) is not str:
            raise self._unsafe(f"{_article(key)} as a key, expected a name")
        if key in target:
            raise CheckpointError(
                f"{self._where}: key {key[:80]!a} stands twice; which one is meant is unknown"
            )
        target[key] = value

    def _global(self, name):
        if name not in _GLOBALS:
            raise self._unsafe(_dotted(name))
        return _Global(name)

    def _reduce(self, function, arguments):
        name = function.name if isinstance(function, _Global) else None
        if type(arguments) is not tuple:
            raise self._unsafe(f"a call with {_article(arguments)}")
        if name == _ORDERED_DICT and not arguments:
            return _Ordered()
        if name in (_REBUILD, _REBUILD_TYPED):
            return self._tensor(name, arguments)
        if name == _REBUILD_PARAMETER and len(arguments) == 3:
            tensor, needs_grad, hooks = arguments
            if isinstance(tensor, TensorRecord) and type(needs_grad) is bool and hooks == {}:
                return tensor
        raise self._unsafe(f"a call of {_dotted(name) if name else _article(function)}")

    def _storage(self, identity):
        """Resolves torch's reference to the archive: ("storage", kind, key, device, elements)."""
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise self._unsafe("a reference to something other than a storage")
        _, kind, key, device, n_elements = identity
        if (
            not isinstance(kind, _Global)
            or kind.name not in _STORAGES
            or not (type(key) is str and type(device) is str and _is_size(n_elements))
        ):
            raise self._unsafe("a reference to a storage of no known kind")
        entry = self._entries.get(f"data/{key}")
        dtype, item_bytes = _STORAGES[kind.name]
        if entry is None or entry.n_bytes != n_elements * item_bytes:
            stored = "missing" if entry is None else f"{entry.n_bytes} bytes"
            raise CheckpointError(
                f"{self._where}: storage {key[:80]!a} is {stored}, expected "
                f"{n_elements * item_bytes} bytes; fetch the file again"
            )
        storage = _Storage(dtype, item_bytes, n_elements, entry)
        if self._storages.setdefault(key, storage) != storage:
            raise self._unsafe(f"storage {key!a} as two kinds")
        return storage

    def _tensor(self, name, arguments):
        if len(arguments) != (7 if name == _REBUILD_TYPED else 6):
            raise self._no_tensor(name)
        storage, offset, shape, strides, needs_grad, hooks, *typed = arguments
        if (
            not isinstance(storage, _Storage)
            or not (_is_size(offset) and _are_sizes(shape) and _are_sizes(strides))
            or len(shape) != len(strides)
            or type(needs_grad) is not bool
            or not (isinstance(hooks, dict) and not hooks)
        ):
            raise self._no_tensor(name)
        dtype, item_bytes = storage.dtype, storage.item_bytes
        if typed:
            dtype = typed[0].name.removeprefix("torch ") if isinstance(typed[0], _Global) else None
            item_bytes = _TYPED_DTYPES.get(dtype, 0)
        if not dtype or not item_bytes:
            raise self._no_tensor(name)
        n_elements = storage.n_elements * storage.item_bytes // item_bytes
        reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and reach > n_elements:
            raise CheckpointError(
                f"{self._where}: a tensor of shape {list(shape)} and strides {list(strides)} "
                f"reaches to element {reach} of the {n_elements} in its storage; fetch it again"
            )
        return TensorRecord(storage, dtype, item_bytes, offset, shape, strides)

    def _no_tensor(self, name):
        return self._unsafe(f"a call of {_dotted(name)} with arguments that make no tensor")

    def _unknown(self, what):
        """The refusal of an instruction that is not known; it names what the pickle asks for."""
        asked = ", ".join(list(asked_for(self._raw))[:5])
        return self._unsafe(f"{asked} ({what})" if asked else what)

    def _unsafe(self, what):
        return unsafe(self._where, what)


def asked_for(raw: bytes) -> Iterator[str]:
    """The names that a pickle asks Python for and that no tensor needs, as far as they can be read.

    For messages only: what this misses is refused by its instruction.
    """
    pushed, memo = [], {}
    try:
        for opcode, argument, _ in _instructions(raw, ""):
            if opcode in ("GLOBAL", "INST") and argument not in _GLOBALS:
                yield _dotted(argument)
            elif opcode == "STACK_GLOBAL" and len(pushed) > 1:
                yield ".".join(ascii(part)[1:-1][:80] for part in pushed[-2:])
            elif opcode in ("PUT", "MEMOIZE", *_PUTS) and pushed:
                memo[len(memo) if argument is None else argument] = pushed[-1]
            elif opcode in ("GET", *_GETS):
                pushed.append(memo.get(argument, "?"))
            elif isinstance(argument, str):
                pushed.append(argument)
    except CheckpointError:
        return


def _instructions(raw, where):
    """(name, argument, position) of each instruction; at most MAX_INSTRUCTIONS."""
    n = 0
    try:
        for opcode, argument, at in pickletools.genops(raw):
            n += 1
            if n > MAX_INSTRUCTIONS:
                raise CheckpointError(
                    f"{where}: pickle of over {MAX_INSTRUCTIONS} instructions, the limit; {SAFER}"
                )
            yield opcode.name, argument, at
    except (ValueError, OverflowError, struct.error):
        raise unsafe(where, "a pickle that is damaged or cut off") from None


def _check_name(name, where):
    if not is_tensor_name(name):
        raise CheckpointError(f"{where}: tensor {name[:80]!a}: not a name that a tensor may have")


def _is_size(value):
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value):
    return type(value) is tuple and len(value) <= MAX_DIMS and all(map(_is_size, value))


def _article(value):
    """The kind of a pickle's value, with its article."""
    kinds = {_Ordered: "a dict", TensorRecord: "a tensor", int: "an int", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__.strip('_').lower()}")


def _dotted(name):
    return ascii(name)[1:-1][:160].replace(" ", ".")


def unsafe(where: str, what: str) -> CheckpointError:
    """The refusal of a pickle that holds `what`."""
    return CheckpointError(
        f"{where}: unsafe pickle: {what}; expected tensors and plain containers alone; {SAFER}"
    )
