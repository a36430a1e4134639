"""The initializer makes every site matter, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from attn_deploy.errors import UsageError
from attn_deploy.export.capture import capture
from attn_deploy.export.initializer import MASKED_BELOW, ForwardTap, InitReport, initialize
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import LoadedSource
from attn_deploy.inputs import ExampleInput
from attn_deploy.session import DimBounds

IMAGE = (1, 3, 32, 32)

MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=48,
                                      num_heads=(3, 6)),
    "se": lambda: timm.create_model("mobilenetv3_small_050"),
    "coatnet": lambda: timm.create_model("coatnet_nano_rw_224", img_size=96, depths=(1, 1, 2, 2), stem_width=16,
                                         embed_dim=(16, 32, 64, 64)),
}  # fmt: skip
SIDES = {"vit": 32, "swin": 56, "se": 64, "coatnet": 96}


def made(kind: str, seed: int = 0) -> nn.Module:
    module = MODELS[kind]()
    side = SIDES[kind]
    initialize(module, {"x": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))}, seed=seed)
    return module


@pytest.mark.parametrize("kind", MODELS)
def test_every_site_is_seen_by_the_parity_of_the_whole_model(kind: str) -> None:
    side = SIDES[kind]
    source = LoadedSource("tiny", "tiny", made(kind), (ExampleInput("x", (1, 3, side, side)),), "initializer")
    captured = capture(source, {"batch": DimBounds()})
    sites = rewrite(captured, recognize(captured)).sites
    assert sites
    assert all(site.proven for site in sites)


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_finite_and_depend_on_the_input(kind: str) -> None:
    side = SIDES[kind]
    module = made(kind)
    with torch.no_grad():
        first, second = module(torch.randn(2, 3, side, side))
    assert torch.isfinite(first).all()
    assert 0.05 < first.std() < 50
    assert not torch.allclose(first, second, rtol=0.05)


def test_the_same_seed_gives_the_same_tensors_whatever_the_global_state() -> None:
    torch.manual_seed(1)
    first = made("vit").state_dict()
    torch.manual_seed(2)
    again = made("vit").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_seed_gives_other_tensors() -> None:
    first, other = made("vit").state_dict(), made("vit", seed=1).state_dict()
    assert not any(torch.equal(first[n], other[n]) for n in first if n.endswith("weight"))


def test_index_buffers_and_masks_stay_as_they_are() -> None:
    fresh, module = MODELS["swin"](), made("swin")
    left = {n: b for n, b in fresh.named_buffers() if not b.is_floating_point() or n.endswith("attn_mask")}
    after = dict(module.named_buffers())
    assert left
    assert all(torch.equal(value, after[name]) for name, value in left.items())


def test_no_norm_weight_or_batch_statistic_is_zero_or_at_its_default() -> None:
    for name, value in made("se").state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            assert (value > 0).all()
            assert not torch.allclose(value, torch.ones_like(value))


def test_a_module_that_does_not_run_on_its_example_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match="does not run") as caught:
        initialize(nn.Linear(3, 4), {"input": torch.zeros(2, 5)})
    assert caught.value.where == "Linear, module (root)"
    assert "input=[2, 5]" in str(caught.value)


class Corrupted(ForwardTap):
    """One attention looks at all keys alike, or one gate has the wrong sign; without a number it only counts them."""

    def __init__(self, attention: int | None = None, gate: int | None = None) -> None:
        super().__init__()
        self.attention = attention
        self.gate_number = gate
        self.attentions = 0
        self.gates = 0

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        self.attentions += 1
        is_it = self.attentions - 1 == self.attention
        return torch.where(scores > MASKED_BELOW, 0.0, scores) if is_it else scores

    def gate(self, output: Tensor) -> Tensor:
        self.gates += 1
        return -output if self.gates - 1 == self.gate_number else output


class SharedHeads(nn.Module):
    """A user's module: nn.MultiheadAttention, then attention with cosine scores and a temperature per head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        packed = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        query, key = (nn.functional.normalize(part, dim=-1) for part in packed[:2])
        attended = (query @ key.transpose(-2, -1) * self.temperature).softmax(-1) @ packed[2]
        return x + self.out(attended.transpose(1, 2).flatten(2))


def small_bert(head: Callable[[transformers.BertConfig], nn.Module] = transformers.BertModel) -> nn.Module:
    return head(transformers.BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        intermediate_size=128))  # fmt: skip


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, 100, (2, 16), generator=generator),
            "attention_mask": (torch.arange(16) < torch.tensor([[16], [12]])).long()}  # fmt: skip


def image(side: int) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int, int]] = {
    "vit": (MODELS["vit"], image(32), 3, 0),
    "swin": (MODELS["swin"], image(56), 2, 0),
    "mobilenetv3": (MODELS["se"], image(64), 0, 9),
    "seresnet18": (lambda: timm.create_model("seresnet18"), image(64), 0, 8),
    # Convolutions with attention behind them: with statistics of photographs on half of the images, one left 38 dB.
    "coatnet": (MODELS["coatnet"], image(96), 4, 2),
    "bert": (small_bert, tokens(), 2, 0),
    "user module": (SharedHeads, {"x": torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))}, 2, 0),
}


def settled(case: str) -> tuple[nn.Module, dict[str, Tensor], InitReport]:
    factory, example, _, _ = CASES[case]
    module = factory()
    return module, example, initialize(module, example)


def first_output(module: nn.Module, example: dict[str, Tensor], tap: ForwardTap) -> Tensor:
    with torch.no_grad(), tap:
        output = module(**example)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("case", CASES)
def test_no_attention_can_be_deleted_and_no_gate_negated_above_30_db(case: str) -> None:
    module, example, _ = settled(case)
    count = Corrupted()
    expected = first_output(module, example, count)
    assert (count.attentions, count.gates) == CASES[case][2:]
    taps = [Corrupted(attention=i) for i in range(count.attentions)] + [Corrupted(gate=i) for i in range(count.gates)]
    for tap in taps:
        noise = (first_output(module, example, tap) - expected).square().mean()
        sqnr_db = 10 * torch.log10(expected.square().mean() / noise)
        assert sqnr_db < 30, (tap.attention, tap.gate_number)


@pytest.mark.parametrize("case", [case for case, (_, _, attentions, _) in CASES.items() if attentions])
def test_the_softmax_is_neither_uniform_nor_a_choice_of_one_key(case: str) -> None:
    _, _, report = settled(case)
    assert len(report.attentions) == CASES[case][2]
    assert all(0.35 < attention.entropy < 0.65 for attention in report.attentions)
    assert report.mean_entropy is not None
    assert not report.notes


def test_a_temperature_takes_the_gain_where_queries_and_keys_are_normalized() -> None:
    module, _, report = settled("user module")
    assert [attention.site for attention in report.attentions] == ["first", ""]
    assert module.get_parameter("temperature").min() > 4 * 0.4


def test_queries_and_keys_grow_and_values_do_not() -> None:
    """Rows of the packed weight of vit: the gain is the same square root for queries and keys."""
    module, _, report = settled("vit")
    query, key, value = module.get_parameter("blocks.0.attn.qkv.weight").detach().chunk(3)
    assert report.attentions[0].gain > 1.5
    growth = report.attentions[0].gain ** 0.5
    assert query.std() / value.std() == pytest.approx(growth, rel=0.05)
    assert key.std() / value.std() == pytest.approx(growth, rel=0.05)


def test_tied_weights_stay_tied_and_position_ids_stay_as_they_are() -> None:
    module = small_bert(transformers.BertForMaskedLM)
    positions = module.get_buffer("bert.embeddings.position_ids").clone()
    initialize(module, tokens())
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert torch.equal(module.get_buffer("bert.embeddings.position_ids"), positions)


def test_the_module_is_left_in_eval_mode_with_its_flags_and_the_global_generator_is_not_moved() -> None:
    module = MODELS["vit"]().train()
    module.get_parameter("cls_token").requires_grad_(False)
    before = torch.get_rng_state()
    initialize(module, image(32))
    assert not module.training
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["cls_token"]
    assert torch.equal(torch.get_rng_state(), before)


def test_without_attention_the_report_says_so() -> None:
    report = initialize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), {"input": torch.randn(3, 4)})
    assert report.mean_entropy is None
    assert report.notes == ("no softmax over keys",)
