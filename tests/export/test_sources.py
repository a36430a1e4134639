"""Sources: a string becomes a model with its inputs, or a message that says what to do."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attn_deploy.errors import CaptureError, UsageError
from attn_deploy.export.capture import capture
from attn_deploy.export.sources import LoadedSource, SourceRequest, load_source
from attn_deploy.inputs import ExampleInput, make_feeds, parse_input
from attn_deploy.session import DimBounds

BATCH = {"batch": DimBounds()}
SMALL_VIT = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_classes": 5}


def request(weights: str | None = None, *inputs: str, **arguments: Any) -> SourceRequest:
    return SourceRequest("", weights, arguments, [parse_input(i) for i in inputs])


def outputs(source: LoadedSource) -> dict[str, np.ndarray]:
    """What the captured model gives for a batch of 3."""
    captured = capture(source, BATCH)
    return captured.reference(make_feeds(captured.inputs, batch=3, seed=0))


def test_timm_takes_its_arguments_and_says_how_images_are_prepared() -> None:
    source = load_source("timm:vit_tiny_patch16_224", request(**SMALL_VIT))
    assert source.inputs == (ExampleInput("x", (1, 3, 32, 32)),)
    assert source.preprocess is not None
    assert source.preprocess.crop == (32, 32)
    assert source.labels is None
    assert "initializer, seed 0" in source.weights
    assert outputs(source)["output"].shape == (3, 5)


def test_timm_s_own_error_is_told_with_the_argument() -> None:
    with pytest.raises(UsageError, match="timm could not build") as raised:
        load_source("timm:vit_tiny_patch16_224", request(colour="red"))
    assert "colour" in str(raised.value)


def test_torchvision_gives_labels_only_for_its_own_classes() -> None:
    source = load_source("torchvision:squeezenet1_1", request("init:package", "x=1x3x64x64"))
    assert source.labels is not None
    assert len(source.labels) == 1000
    assert source.inputs[0].shape == (1, 3, 64, 64)
    assert load_source("torchvision:squeezenet1_1", request("init:package", num_classes=4)).labels is None


@pytest.fixture
def hf_folder(tmp_path: Path) -> Any:
    transformers = pytest.importorskip("transformers")

    def make(kind: str) -> Path:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        if kind == "bert":
            config = transformers.BertConfig(**small, vocab_size=50, max_position_embeddings=12)
            config.architectures = ["BertModel"]
        else:
            config = transformers.ViTConfig(**small, image_size=16, patch_size=8, num_labels=3)
            config.architectures = ["ViTForImageClassification"]
        config.save_pretrained(tmp_path)
        return tmp_path

    return make


def test_a_transformers_folder_with_text_gives_ids_below_the_vocabulary_and_a_mask(hf_folder: Any) -> None:
    source = load_source(f"hf:{hf_folder('bert')}", request())
    assert [(i.name, i.shape, i.dtype) for i in source.inputs] == [
        ("input_ids", (1, 12), "int64"), ("attention_mask", (1, 12), "int64"),
    ]  # fmt: skip
    assert make_feeds(source.inputs, batch=64, seed=0)["input_ids"].max() == 49
    found = outputs(source)
    assert {"last_hidden_state", "pooler_output"} == found.keys()
    assert found["last_hidden_state"].shape == (3, 12, 16)


def test_a_transformers_folder_with_images_gives_their_size_and_the_labels(hf_folder: Any) -> None:
    source = load_source(f"hf:{hf_folder('vit')}", request())
    assert source.inputs[0].name == "pixel_values"
    assert source.inputs[0].shape == (1, 3, 16, 16)
    assert source.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert outputs(source)["logits"].shape == (3, 3)


FACTORY = """
from dataclasses import dataclass
import torch
from torch import Tensor, nn

@dataclass
class Result:
    scores: Tensor
    hidden: Tensor
torch.utils._pytree.register_dataclass(Result)

class Net(nn.Module):
    def __init__(self, width, as_dict):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 4), nn.Linear(4, width)
        self.as_dict = as_dict
    def forward(self, x, *, ids):
        hidden = x + self.embedding(ids)
        scores = self.linear(hidden)
        return {"scores": scores, "hidden": hidden} if self.as_dict else Result(scores, hidden)

def make(width=3, as_dict=True):
    return Net(width, as_dict), {"x": torch.zeros(1, 5, 4), "ids": torch.tensor([[0, 3, 10, 1, 2]])}

def bare():
    return nn.Linear(4, 2)

def nothing():
    return 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_factory"
    sys.modules.pop("own_factory", None)


@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "dataclass"])
def test_a_factory_s_inputs_and_outputs_keep_their_names(own_module: str, as_dict: bool) -> None:
    source = load_source(f"{own_module}:make", request(width=6, as_dict=as_dict))
    assert source.weights == "as the factory made them"
    assert [(i.name, i.dtype) for i in source.inputs] == [("x", "float32"), ("ids", "int64")]
    assert make_feeds(source.inputs, batch=64, seed=0)["ids"].max() == 10
    found = outputs(source)
    assert list(found) == ["scores", "hidden"]
    assert found["scores"].shape == (3, 5, 6)


def test_inputs_that_a_factory_does_not_show_are_asked_for_and_taken(own_module: str) -> None:
    with pytest.raises(UsageError, match="inputs are not known") as raised:
        load_source(f"{own_module}:bare", request())
    assert "--input input=" in str(raised.value)
    source = load_source(f"{own_module}:bare", request(None, "input=1x4"))
    assert outputs(source)["output"].shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("mak", {}, ["has no 'mak'", "did you mean make"]),
        ("nothing", {}, ["did not return a model", "int"]),
        ("make", {"height": 3}, ["raised TypeError", "height", "--source-arg"]),
    ],
)
def test_a_factory_that_gives_no_model_says_why(
    own_module: str, name: str, arguments: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UsageError) as raised:
        load_source(f"{own_module}:{name}", request(**arguments))
    for part in parts:
        assert part in str(raised.value)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def saved(path: Path, dynamic: bool) -> Path:
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    program = torch.export.export(Small().eval(), (torch.randn(2, 4),), dynamic_shapes=shapes)
    torch.export.save(program, str(path))
    return path


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_saved_program_keeps_its_batch_as_it_was_traced(tmp_path: Path, dynamic: bool) -> None:
    source = load_source(str(saved(tmp_path / "m.pt2", dynamic)), request())
    captured = capture(source, BATCH)
    assert captured.dims == ({"batch": DimBounds()} if dynamic else {})
    assert captured.reference(make_feeds(captured.inputs, batch=2, seed=0))["output"].shape == (2, 2)


def test_a_saved_program_takes_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights does not apply"):
        load_source(str(saved(tmp_path / "m.pt2", True)), request("init:0"))


class Payload:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_inside_a_saved_program_is_refused_and_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt2", True)
    harmful = tmp_path / "harmful.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(harmful, "w") as new:
        replaced = 0
        for name in old.namelist():
            content = old.read(name)
            if "/sample_inputs/" in name:
                content, replaced = pickle.dumps(Payload(tmp_path / "run")), replaced + 1
            new.writestr(name, content)
    assert replaced == 1
    with pytest.raises(UsageError, match=r"\.pt2 file cannot be read"):
        load_source(str(harmful), request())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_from_their_file(own_module: str, tmp_path: Path, suffix: str) -> None:
    state = {"weight": torch.full((2, 4), 0.5), "bias": torch.ones(2)}
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    source = load_source(f"{own_module}:bare", request(str(path), "input=1x4"))
    assert isinstance(source.module, nn.Linear)
    assert torch.equal(source.module.weight, state["weight"])
    assert source.weights == path.name


def test_weights_that_do_not_fit_name_the_keys_and_shapes(own_module: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 4), "offset": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="do not fit") as raised:
        load_source(f"{own_module}:bare", request(str(tmp_path / "w.safetensors"), "input=1x4"))
    for part in ("missing bias", "unexpected offset", "weight [3, 4]", "weight [2, 4]"):
        assert part in str(raised.value)


def test_pickled_weights_are_refused_and_not_run(own_module: str, tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "run")}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="weights file cannot be read"):
        load_source(f"{own_module}:bare", request(str(tmp_path / "w.pt"), "input=1x4"))
    assert not (tmp_path / "run").exists()


class Inner(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "branch" and x.mean() > 0:
            return x
        return self.linear(x[:, :3] if self.kind == "shape" else x)


class Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Identity(), Inner(kind)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "what", "line", "advice"),
    [
        ("branch", "cannot be traced", "x.mean() > 0", "torch.where"),
        ("shape", "does not run on its example", "self.linear(x[:, :3]", "--input"),
    ],
)
def test_a_model_that_cannot_be_captured_is_told_by_module_line_and_advice(
    kind: str, what: str, line: str, advice: str
) -> None:
    source = LoadedSource("m", "m", Outer(kind).eval(), (ExampleInput("x", (1, 4)),), "")
    with pytest.raises(CaptureError, match=what) as raised:
        capture(source, BATCH)
    where = str(raised.value.where)
    assert "module blocks.1" in where
    assert "test_sources.py:" in where
    assert line in where
    assert advice in str(raised.value.next_step)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4) * 2


def test_a_batch_that_the_model_fixes_is_told_with_the_way_out() -> None:
    source = LoadedSource("m", "m", FixedBatch().eval(), (ExampleInput("x", (2, 4)),), "")
    with pytest.raises(CaptureError) as raised:
        capture(source, BATCH)
    assert "--dynamic none" in str(raised.value.next_step)
    assert capture(source, {}).dims == {}


def test_config_of_a_folder_is_read_without_the_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UsageError, match="config cannot be read") as raised:
        load_source(f"hf:{tmp_path}", request())
    assert "no_such_model" in str(raised.value)


@dataclass
class Info:
    """A dataclass that is not registered with torch is a leaf of the result."""

    value: int = 0


class GivesInfo(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"y": x, "info": Info()}


def test_an_output_that_is_no_tensor_is_refused_with_its_type() -> None:
    source = LoadedSource("m", "m", GivesInfo().eval(), (ExampleInput("x", (1, 4)),), "")
    with pytest.raises(UsageError, match="not a tensor") as raised:
        capture(source, BATCH)
    assert raised.value.got == "Info"
