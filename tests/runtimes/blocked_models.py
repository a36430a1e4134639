"""Small CNNs as torch.onnx makes them, of random weights: what ONNX Runtime's blocked layout is left for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass
class Network:
    """Adds nodes one after another; each method takes and gives the name of a value."""

    channels_in: int = 3
    side: int = 12
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    channels: dict[str, int] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        self.channels["x"] = self.channels_in

    def node(self, operator: str, *inputs: str, channels: int | None = None, **attributes: object) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"net/{name}", **attributes))
        self.channels[name] = self.channels[inputs[0]] if channels is None else channels
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        scale = scale or 1.4 / np.sqrt(np.prod(shape[1:]) or 1)
        content = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(content, f"weight_{len(self.weights)}"))
        return self.weights[-1].name

    def constant(self, content: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(content, f"weight_{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, out: int, taps: int = 1, *, stride: int = 1, depthwise: bool = False) -> str:
        into = self.channels[x]
        weight = self.weight(out, 1 if depthwise else into, taps, taps)
        return self.node(
            "Conv", x, weight, self.weight(out, scale=0.3), channels=out, kernel_shape=[taps] * 2, strides=[stride] * 2,
            pads=[taps // 2] * 4, group=into if depthwise else 1,
        )  # fmt: skip

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def activation(self, x: str, name: str) -> str:
        return self.silu(x) if name == "Silu" else self.node(name, x)

    def mean(self, x: str) -> str:
        return self.node("GlobalAveragePool", x)

    def squeeze_excite(self, x: str, reduced: int, inner: str = "Relu", gate: str = "Sigmoid") -> str:
        hidden = self.activation(self.conv(self.mean(x), reduced), inner)
        attributes = {"alpha": 1 / 6, "beta": 0.5} if gate == "HardSigmoid" else {}
        return self.node("Mul", x, self.node(gate, self.conv(hidden, self.channels[x]), **attributes))

    def channel_conv(self, x: str) -> str:
        """Efficient channel attention."""
        count = self.channels[x]
        line = self.node("Reshape", self.mean(x), self.constant(np.array([0, 1, count])))
        mixed = self.node("Conv", line, self.weight(1, 1, 5), kernel_shape=[5], pads=[2, 2])
        gate = self.node("Reshape", self.node("Sigmoid", mixed), self.constant(np.array([0, count, 1, 1])))
        return self.node("Mul", x, gate)

    def pixel_gate(self, x: str) -> str:
        gate = self.node("Sigmoid", self.conv(x, 1, 3))
        return self.node("Mul", x, gate)

    def bottleneck(self, x: str, out: int, taps: int, *, stride: int = 1, act: str = "Silu", gated: bool) -> str:
        """An inverted bottleneck: expansion, depthwise convolution, squeeze-and-excitation, projection."""
        wide = self.activation(self.conv(x, 3 * self.channels[x]), act)
        wide = self.activation(self.conv(wide, self.channels[wide], taps, stride=stride, depthwise=True), act)
        if gated:
            wide = self.squeeze_excite(wide, max(self.channels[x] // 4, 1), act)
        narrow = self.conv(wide, out)
        return self.node("Add", narrow, x) if out == self.channels[x] and stride == 1 else narrow

    def model(self, y: str, *, batch: int | str = "batch") -> bytes:
        """Ends in scores [batch, channels of y]."""
        count = self.channels[y]
        scores = self.node("Flatten", self.mean(self.conv(y, count, 3)))
        shape = [batch, self.channels_in, self.side, self.side]
        graph = helper.make_graph(
            self.nodes, "network", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(scores, TensorProto.FLOAT, [batch, count])], self.weights,
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString())


def residual_block(gate: str, *, channels: int = 64) -> bytes:
    """SE-ResNet's or ECA-ResNet's block between two convolutions."""
    net = Network()
    stem = net.node("Relu", net.conv("x", channels, 3))
    inner = net.node("Relu", net.conv(net.node("Relu", net.conv(stem, 32)), 32, 3))
    wide = net.conv(inner, channels)
    gated = net.squeeze_excite(wide, 16) if gate == "se" else net.channel_conv(wide)
    return net.model(net.node("Relu", net.node("Add", gated, stem)))


def bottlenecks(act: str, *, channels: int = 24, gated: bool = True) -> bytes:
    """Two inverted bottlenecks, of 5x5 with stride 2 and of 3x3 with a residual; channels are no whole blocks."""
    net = Network()
    stem = net.activation(net.conv("x", channels, 3), act)
    first = net.bottleneck(stem, channels + 8, 5, stride=2, act=act, gated=gated)
    return net.model(net.bottleneck(first, channels + 8, 3, act=act, gated=gated))


def hard_gates() -> bytes:
    """MobileNetV3's gate on ReLU, in 40 channels."""
    net = Network()
    stem = net.node("Relu", net.conv("x", 40, 3))
    wide = net.node("Relu", net.conv(stem, 40, 5, depthwise=True))
    return net.model(net.conv(net.squeeze_excite(wide, 12, "Relu", "HardSigmoid"), 24))


def attention_by_pixels() -> bytes:
    """A gate per channel and one per pixel, as in CBAM."""
    net = Network()
    stem = net.node("Relu", net.conv("x", 32, 3))
    return net.model(net.pixel_gate(net.squeeze_excite(net.conv(stem, 32, 3), 8)))


def plain_silu() -> bytes:
    """Convolutions with SiLU between them, and no gate."""
    net = Network()
    stem = net.silu(net.conv("x", 24, 3))
    return net.model(net.silu(net.conv(net.silu(net.conv(stem, 40)), 48, 3, stride=2)))
