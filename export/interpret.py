"""Running a torch.export graph node by node: to record values inside it, or to corrupt one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from attn_deploy.export.graph import constants

Override = Callable[[Node, tuple[Any, ...]], Any]


class _Recorder(Interpreter):
    def __init__(
        self, program: ExportedProgram, record: Collection[str], override: tuple[str, Override] | None
    ) -> None:
        super().__init__(program.graph_module)
        self._record = record
        self._override = override
        self.values: dict[str, Any] = {}
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.current: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.current = n
        if n.name in self._record:
            self.arguments[n.name] = self.fetch_args_kwargs_from_env(n)[0]
        if self._override is not None and n.name == self._override[0]:
            value = self._override[1](n, self.fetch_args_kwargs_from_env(n)[0])
        else:
            value = super().run_node(n)
        if n.name in self._record:
            self.values[n.name] = value
        return value


class Run:
    """One run: `outputs` in graph order, and values and arguments of the recorded nodes by name."""

    def __init__(self, outputs: list[Tensor], values: dict[str, Any], arguments: dict[str, tuple[Any, ...]]) -> None:
        self.outputs = outputs
        self.values = values
        self.arguments = arguments


class RunError(Exception):
    """Raised when a node cannot be computed from its operands."""

    def __init__(self, node: Node, cause: Exception) -> None:
        super().__init__(f"{node.name}: {cause}")
        self.node = node


def input_order(program: ExportedProgram) -> list[str]:
    """The names under which the user's inputs are fed, in the order of the graph's inputs."""
    spec = program.call_spec.in_spec
    assert spec is not None
    _, keyword = spec.children() if hasattr(spec, "children") else spec.children_specs
    names = [str(name) for name in (keyword.context or [])]
    user_inputs = [str(n) for n in program.graph_signature.user_inputs]
    return user_inputs[: len(user_inputs) - len(names)] + names


def run(
    program: ExportedProgram,
    feeds: Mapping[str, Tensor],
    *,
    record: Collection[str] = (),
    override: tuple[str, Override] | None = None,
) -> Run:
    """Runs the program on feeds by input name, recording nodes by name; `override` computes one node differently.

    Raises RunError where shapes do not fit.
    """
    known = constants(program)
    order = dict(zip((str(n) for n in program.graph_signature.user_inputs), input_order(program), strict=True))
    arguments = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            arguments.append(known[node.name] if node.name in known else feeds[order[node.name]])
    recorder = _Recorder(program, record, override)
    with torch.no_grad():
        try:
            outputs = recorder.run(*arguments)
        except (IndexError, RuntimeError) as error:
            assert recorder.current is not None
            raise RunError(recorder.current, error) from error
    tensors = [o for o in outputs if isinstance(o, Tensor)]
    return Run(tensors, recorder.values, recorder.arguments)
