"""Weights go where ``load_weights`` puts them, faster; and what does not arrive is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import pytest
import torch

from roll_vllm.errors import WeightUpdateError
from roll_vllm.worker import loading
from roll_vllm.worker.checksums import model_checksums
from roll_vllm.worker.loading import WeightLoader
from roll_vllm.worker.memory import StorageMemory

HIDDEN, INNER, VOCAB, PADDED, RANKS = 4, 12, 10, 16, 2
QKV = {"q_proj": (0, 4), "k_proj": (4, 2), "v_proj": (6, 2)}
GATE_UP = {"gate_proj": 0, "up_proj": 1}

Weights = dict[str, torch.Tensor]
Pairs = Iterable[tuple[str, torch.Tensor]]


class Toy(torch.nn.Module):
    """One rank of two, with loaders that write as vLLM's do."""

    def __init__(self, rank: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
        super().__init__()
        self.rank, self.tied, self.calls = rank, tied, 0

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.full(shape, -7.0, dtype=dtype), requires_grad=False)

        shard = PADDED // RANKS
        self.embed_tokens = torch.nn.Module()
        self.embed_tokens.weight = parameter(shard, HIDDEN)
        self.qkv_proj = torch.nn.Module()
        self.qkv_proj.weight = parameter(8, HIDDEN)
        self.gate_up_proj = torch.nn.Module()
        self.gate_up_proj.weight = parameter(2 * INNER // RANKS, HIDDEN)
        self.down_proj = torch.nn.Module()
        self.down_proj.weight = parameter(HIDDEN, INNER // RANKS)
        self.norm = torch.nn.Module()
        self.norm.weight = parameter(HIDDEN)
        self.lm_head = self.embed_tokens if tied else torch.nn.Module()
        if not tied:
            self.lm_head.weight = parameter(shard, HIDDEN)

    def load_weights(self, weights: Pairs) -> None:
        self.calls += 1
        for name, tensor in weights:
            module, _, _ = name.removeprefix("model.").partition(".")
            if module == "lm_head" and self.tied:
                continue
            self.load_one(module, tensor)

    def load_one(self, module: str, tensor: torch.Tensor) -> None:
        if module in QKV:
            start, size = QKV[module]
            target = self.qkv_proj.weight.data.narrow(0, start, size)
        elif module in GATE_UP:
            size = INNER // RANKS
            tensor = tensor.narrow(0, self.rank * size, size)
            target = self.gate_up_proj.weight.data.narrow(0, GATE_UP[module] * size, size)
        elif module == "down_proj":
            size = INNER // RANKS
            tensor = tensor.narrow(1, self.rank * size, size)
            target = self.down_proj.weight.data
        elif module in ("embed_tokens", "lm_head"):
            self.load_vocabulary(getattr(self, module).weight, tensor)
            return
        else:
            target = dict(self.named_parameters())[f"{module}.weight"].data
        assert target.shape == tensor.shape
        target.copy_(tensor)

    def load_vocabulary(self, parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
        shard = PADDED // RANKS
        start = min(self.rank * shard, VOCAB)
        assert tensor.shape[0] == VOCAB
        rows = tensor.narrow(0, start, min(start + shard, VOCAB) - start)
        parameter[: rows.shape[0]].data.copy_(rows)
        parameter[rows.shape[0] :].data.fill_(0)


def checkpoint(seed: int, dtype: torch.dtype = torch.float32, tied: bool = False) -> Weights:
    """Every tensor, in one piece of memory as it comes from a bucket."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.q_proj.weight": (4, HIDDEN),
        "model.k_proj.weight": (2, HIDDEN),
        "model.v_proj.weight": (2, HIDDEN),
        "model.gate_proj.weight": (INNER, HIDDEN),
        "model.up_proj.weight": (INNER, HIDDEN),
        "model.down_proj.weight": (HIDDEN, INNER),
        "model.norm.weight": (HIDDEN,),
    } | ({} if tied else {"lm_head.weight": (VOCAB, HIDDEN)})
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = torch.randn(sum(sizes), generator=generator).to(dtype).split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def loaded_natively(weights: Mapping[str, torch.Tensor], **model: Any) -> dict[str, str]:
    other = Toy(**model)
    with torch.no_grad():
        other.load_weights(weights.items())
    return model_checksums(other)


def update(loader: WeightLoader, weights: Weights, split: int = 100) -> tuple[int, int]:
    """One complete set, in buckets of ``split`` tensors; returns how many were replayed and loaded."""
    pairs = list(weights.items())
    loader.begin()
    for start in range(0, len(pairs), split):
        loader.load(pairs[start : start + split])
    loader.finish()
    return loader.replayed, loader.loaded


# --- the same as load_weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [100, 3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", range(RANKS))
def test_learned_once_then_replayed(rank: int, dtype: torch.dtype, split: int) -> None:
    model = Toy(rank, dtype)
    loader = WeightLoader(model, tied=False)
    assert update(loader, checkpoint(0, dtype), split) == (0, 9)
    calls = model.calls
    for seed in (1, 2):
        weights = checkpoint(seed, dtype)
        assert update(loader, weights, split) == (9, 0)
        assert model_checksums(model) == loaded_natively(weights, rank=rank, dtype=dtype)
    assert model.calls == calls


def test_any_order_and_any_split() -> None:
    model = Toy()
    loader = WeightLoader(model, tied=False)
    for seed in range(6):
        pairs = list(checkpoint(seed).items())
        pairs = pairs[seed:] + pairs[:seed]
        assert update(loader, dict(pairs), split=seed + 1) == ((9, 0) if seed else (0, 9))
        assert model_checksums(model) == loaded_natively(dict(pairs))


def test_sources_of_any_layout() -> None:
    """Routes are learned from one layout and replayed from others: all are contiguous, not all start at 0."""
    model = Toy(1)
    loader = WeightLoader(model, tied=False)
    update(loader, {name: tensor.clone() for name, tensor in checkpoint(0).items()})
    weights = checkpoint(1)
    assert update(loader, weights) == (9, 0)
    assert model_checksums(model) == loaded_natively(weights, rank=1)


def test_the_same_list_again_with_new_values() -> None:
    """A sender that shares its memory sends the same list after each step of training."""
    model = Toy(1)
    loader = WeightLoader(model, tied=False)
    weights = checkpoint(0)
    pairs = list(weights.items())
    for seed in range(5):
        for name, tensor in checkpoint(seed).items():
            weights[name].copy_(tensor)
        loader.begin()
        loader.load(pairs)
        loader.finish()
        assert (loader.replayed, loader.loaded) == ((9, 0) if seed else (0, 9))
        assert model_checksums(model) == loaded_natively(weights, rank=1)
        if seed == 3:
            loader.forget()


def test_not_a_number_arrives_bit_by_bit() -> None:
    model = Toy(dtype=torch.bfloat16)
    loader = WeightLoader(model, tied=False)
    for seed in range(3):
        weights = checkpoint(seed, torch.bfloat16)
        for number, tensor in enumerate(weights.values()):
            bits = tensor.view(torch.int16).view(-1)
            bits[:: number + 1] = 0x7F80 + 1 + seed + number  # NaN, each with a payload of its own
        assert update(loader, weights)[0] == (9 if seed else 0)
        assert model_checksums(model) == loaded_natively(weights, dtype=torch.bfloat16)


def test_sleeping_storages_keep_the_routes() -> None:
    model = Toy(1)
    loader = WeightLoader(model, tied=False)
    memory = StorageMemory(model, [])
    update(loader, checkpoint(0))
    for seed in (1, 2):
        memory.sleep(2)
        memory.wake(["weights"])
        weights = checkpoint(seed)
        assert update(loader, weights) == (9, 0)
        assert model_checksums(model) == loaded_natively(weights, rank=1)


def test_a_loader_that_reads_ahead() -> None:
    """``itertools.groupby`` asks for the next tensor before it hands out the last of a group."""

    class ReadsAhead(Toy):
        def load_weights(self, weights: Pairs) -> None:
            for _, group in groupby(weights, key=lambda pair: pair[0].startswith("model.")):
                super().load_weights(list(group))

    model = ReadsAhead()
    loader = WeightLoader(model, tied=False)
    update(loader, checkpoint(0))
    weights = checkpoint(1)
    assert update(loader, weights) == (9, 0)
    assert model_checksums(model) == loaded_natively(weights)


@pytest.mark.parametrize("rank", range(RANKS))
def test_one_memory_under_two_names(rank: int) -> None:
    """A trainer may tie at first what the engine keeps apart."""
    model = Toy(rank)
    loader = WeightLoader(model, tied=False)
    for seed in range(4):
        weights = checkpoint(seed)
        if seed < 2:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        assert update(loader, weights) == ((9, 0) if seed else (0, 9))
        assert model_checksums(model) == loaded_natively(weights, rank=rank)


# --- loaders that do more than copy ----------------------------------------------------------------------


class Odd(Toy):
    """Loads ``norm`` in a way of its own."""

    def __init__(self, load_norm: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.load_norm = load_norm

    def load_one(self, module: str, tensor: torch.Tensor) -> None:
        if module == "norm":
            self.load_norm(self.norm.weight.data, tensor)
        else:
            super().load_one(module, tensor)


def computes_first(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor * 2)


def computes_later(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)
    target.mul_(2)


def computes_on_the_way(target: torch.Tensor, tensor: torch.Tensor) -> None:
    torch.mul(tensor, 2, out=target)
    target.copy_(target)


def element_by_element(target: torch.Tensor, tensor: torch.Tensor) -> None:
    for index, value in enumerate(tensor.tolist()):
        target[index].fill_(2 * value)


def broadcasts(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor[:1])


def overwrites(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)
    target.copy_(tensor.flip(0))


def fills_over_the_copy(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)
    target[:2].zero_()


@pytest.mark.parametrize(
    "load_norm",
    [
        computes_first,
        computes_later,
        computes_on_the_way,
        element_by_element,
        broadcasts,
        overwrites,
        fills_over_the_copy,
    ],
)
def test_what_is_no_copy_always_goes_through_load_weights(
    load_norm: Callable[[torch.Tensor, torch.Tensor], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, native = Odd(load_norm), Odd(load_norm)
    loader = WeightLoader(model, tied=False)
    for seed in range(3):
        weights = checkpoint(seed)
        assert update(loader, weights) == ((8, 1) if seed else (0, 9))
        native.load_weights(weights.items())
        assert model_checksums(model) == model_checksums(native)
    assert "model.norm.weight cannot be replayed as a copy" in caplog.text


def fills_then_copies(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.zero_()
    target[1:].copy_(tensor[1:])


def copies_in_pieces(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target[::2] = tensor[::2]
    target[1::2] = tensor.view(2, 2)[:, 1]


@pytest.mark.parametrize("load_norm", [fills_then_copies, copies_in_pieces])
def test_copies_and_padding_are_replayed(load_norm: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    model, native = Odd(load_norm), Odd(load_norm)
    loader = WeightLoader(model, tied=False)
    for seed in range(3):
        weights = checkpoint(seed)
        assert update(loader, weights) == ((9, 0) if seed else (0, 9))
        native.load_weights(weights.items())
        assert model_checksums(model) == model_checksums(native)


class Scalar(torch.nn.Module):
    """One element, loaded by value as vLLM's ``default_weight_loader`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def load_weights(self, weights: Pairs) -> None:
        for _, tensor in weights:
            self.scale.data.fill_(tensor.item())


def test_a_value_is_not_taken_for_padding() -> None:
    model = Scalar()
    loader = WeightLoader(model, tied=False)
    for value in (2.0, 3.0, 3.0, 4.0):
        assert update(loader, {"scale": torch.tensor([value])}) == (0, 1)
        assert model.scale.item() == value


# --- what does not arrive --------------------------------------------------------------------------------


def test_an_unknown_name() -> None:
    loader = WeightLoader(Toy(), tied=False)
    with pytest.raises(WeightUpdateError, match=r"Toy cannot load bias\.weight \(float32, shape \[3\]\): KeyError"):
        loader.load([("bias.weight", torch.zeros(3))])
    assert not loader.dirty
    weights = checkpoint(0)
    with pytest.raises(WeightUpdateError, match=r"Toy cannot load bias\.weight"):
        loader.load([*weights.items(), ("bias.weight", torch.zeros(3))])
    assert loader.dirty
    assert update(loader, weights) == (0, 9)


def test_a_tensor_that_is_silently_left_out() -> None:
    class Skips(Toy):
        def load_weights(self, weights: Pairs) -> None:
            super().load_weights((name, tensor) for name, tensor in weights if "norm" not in name)

    loader = WeightLoader(Skips(), tied=False)
    with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight match no parameter of Skips"):
        loader.load(list(checkpoint(0).items()))
    assert loader.dirty


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("left_out", list(checkpoint(0)))
def test_partial_sets(left_out: str, known: bool) -> None:
    loader = WeightLoader(Toy(), tied=False)
    if known:
        update(loader, checkpoint(0))
    weights = checkpoint(1)
    rest = weights.pop(left_out)
    loader.begin()
    loader.load(list(weights.items()))
    module = left_out.removeprefix("model.").partition(".")[0]
    parameter = {**dict.fromkeys(QKV, "qkv_proj"), **dict.fromkeys(GATE_UP, "gate_up_proj")}.get(module, module)
    assert loader.missing() == [f"{parameter}.weight"]
    with pytest.raises(WeightUpdateError, match=rf"reached 5 of 6 parameters; not .*: {parameter}\.weight\. Send"):
        loader.finish()
    loader.load([(left_out, rest)])
    loader.finish()


def test_a_set_starts_empty() -> None:
    loader = WeightLoader(Toy(), tied=False)
    update(loader, checkpoint(0))
    loader.begin()
    assert not loader.dirty
    assert len(loader.missing()) == 6
    with pytest.raises(WeightUpdateError, match="reached 0 of 6"):
        loader.finish()


def test_a_hole_in_a_parameter() -> None:
    """As many elements as the parameter has, but some twice and some never."""

    def twice(target: torch.Tensor, tensor: torch.Tensor) -> None:
        target[:2].copy_(tensor[:2])
        target[:2].copy_(tensor[:2])

    loader = WeightLoader(Odd(twice), tied=False)
    loader.load(list(checkpoint(0).items()))
    assert loader.missing() == ["norm.weight"]


def test_long_lists_are_cut() -> None:
    model = torch.nn.Module()
    for number in range(30):
        model.register_parameter(f"p{number:02}", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(WeightUpdateError, match=r"p00, .*, p09 and 20 more\. Send"):
        WeightLoader(model, tied=False).finish()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8], ids=str)
def test_a_dtype_that_the_engine_has_not(dtype: torch.dtype, known: bool) -> None:
    model = Toy()
    loader = WeightLoader(model, tied=False)
    if known:
        update(loader, checkpoint(0))
        loader.begin()
    before = model_checksums(model)
    weights = checkpoint(1) | {"lm_head.weight": torch.zeros(VOCAB, HIDDEN, dtype=dtype)}
    with pytest.raises(WeightUpdateError, match=rf"lm_head\.weight \({str(dtype)[6:]}, .*Nothing of this bucket"):
        loader.load(list(weights.items()))
    assert not loader.dirty
    assert model_checksums(model) == before


def test_a_dtype_of_another_parameter() -> None:
    model = Toy()
    model.norm.weight = torch.nn.Parameter(torch.zeros(HIDDEN, dtype=torch.bfloat16), requires_grad=False)
    loader = WeightLoader(model, tied=False)
    with pytest.raises(WeightUpdateError, match=r"norm\.weight has dtype float32, but .* holds bfloat16: cast it"):
        loader.load(list(checkpoint(0).items()))
    assert loader.dirty


def test_a_wrong_shape_before_routes_are_known() -> None:
    loader = WeightLoader(Toy(), tied=False)
    with pytest.raises(WeightUpdateError, match=r"cannot load model\.norm\.weight \(float32, shape \[5\]\): Assertion"):
        loader.load([("model.norm.weight", torch.zeros(5))])
    assert not loader.dirty


@pytest.mark.parametrize("change", [lambda t: t.T.contiguous(), lambda t: t[:-1], lambda t: t[None], torch.flatten])
def test_a_wrong_shape_after_routes_are_known(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Toy()
    loader = WeightLoader(model, tied=False)
    update(loader, checkpoint(0))
    before = model_checksums(model)
    weights = checkpoint(1)
    weights["model.up_proj.weight"] = change(weights["model.up_proj.weight"])
    loader.begin()
    with pytest.raises(WeightUpdateError, match=r"model\.up_proj\.weight .* the engine takes it as float32"):
        loader.load(list(weights.items()))
    assert not loader.dirty
    assert model_checksums(model) == before


def test_after_an_error_the_next_set_is_sound() -> None:
    class Fails(Toy):
        failing = True

        def load_one(self, module: str, tensor: torch.Tensor) -> None:
            if module == "v_proj" and self.failing:
                raise RuntimeError("disk on fire")
            super().load_one(module, tensor)

    model = Fails()
    loader = WeightLoader(model, tied=False)
    with pytest.raises(WeightUpdateError, match="RuntimeError: disk on fire"):
        loader.load(list(checkpoint(0).items()))
    assert loader.dirty
    model.failing = False
    weights = checkpoint(1)
    update(loader, weights)
    assert model_checksums(model) == loaded_natively(weights)


# --- tied heads and parameters of one storage ------------------------------------------------------------


@pytest.mark.parametrize("split", [100, 1])
@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_tied_head_may_be_sent(rank: int, head_first: bool, split: int) -> None:
    model = Toy(rank, tied=True)
    loader = WeightLoader(model, tied=True)
    for seed in range(3):
        weights = checkpoint(seed, tied=True)
        head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        sent = head | weights if head_first else weights | head
        assert update(loader, sent, split) == ((8, 0) if seed else (0, 8))
        assert model_checksums(model) == loaded_natively(weights, rank=rank, tied=True)
    assert update(loader, checkpoint(9, tied=True), split) == (8, 0)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_tied_head_that_differs(rank: int) -> None:
    loader = WeightLoader(Toy(rank, tied=True), tied=True)
    for seed in range(2):
        weights = checkpoint(seed, tied=True)
        row = 9 if rank else 3  # the first is in the second rank's shard
        changed = weights["model.embed_tokens.weight"].clone()
        changed[row, 1] += 1
        for head in (changed, changed[:-1], changed.double()):
            with pytest.raises(WeightUpdateError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
                update(loader, weights | {"lm_head.weight": head})


def test_a_head_alone_touches_nothing() -> None:
    loader = WeightLoader(Toy(tied=True), tied=True)
    assert not loader.touches_parameters(["lm_head.weight", "model.layers.0.rotary_emb.inv_freq"])
    assert loader.touches_parameters(["lm_head.weight", "model.norm.weight"])
    assert WeightLoader(Toy(), tied=False).touches_parameters(["lm_head.weight"])
    loader.load([("lm_head.weight", torch.zeros(VOCAB, HIDDEN)), ("rotary_emb.inv_freq", torch.zeros(2))])
    assert not loader.dirty


class Halves(torch.nn.Module):
    """Two parameters in one storage."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(6)
        self.first = torch.nn.Parameter(whole[:2], requires_grad=False)
        self.second = torch.nn.Parameter(whole[2:], requires_grad=False)

    def load_weights(self, weights: Pairs) -> None:
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)


def test_parameters_that_share_a_storage() -> None:
    model = Halves()
    loader = WeightLoader(model, tied=False)
    loader.load([("first", torch.ones(2))])
    assert loader.missing() == ["second"]
    loader.load([("second", torch.full((4,), 2.0))])
    loader.finish()
    assert update(loader, {"second": torch.full((4,), 4.0), "first": torch.full((2,), 3.0)}) == (2, 0)
    assert [*model.first.tolist(), *model.second.tolist()] == [3, 3, 4, 4, 4, 4]


def test_new_parameters_mean_new_routes() -> None:
    model = Toy()
    loader = WeightLoader(model, tied=False)
    update(loader, checkpoint(0))
    loader.rescan()
    assert update(loader, checkpoint(1)) == (9, 0)
    model.norm.weight = torch.nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)
    loader.rescan()
    weights = checkpoint(2)
    assert update(loader, weights) == (0, 9)
    assert model_checksums(model) == loaded_natively(weights)


def test_gradients_are_not_recorded() -> None:
    model = Toy().requires_grad_(True)
    loader = WeightLoader(model, tied=False)
    for seed in range(2):
        update(loader, checkpoint(seed))
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in model.parameters())


def test_many_tensors_are_fast() -> None:
    """Finding the sender of a write must not take longer with every tensor that is sent."""
    count = 3000

    class Many(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number in range(count):
                self.register_parameter(f"p{number}", torch.nn.Parameter(torch.zeros(2), requires_grad=False))

        def load_weights(self, weights: Pairs) -> None:
            parameters = dict(self.named_parameters())
            for name, tensor in weights:
                parameters[name].data.copy_(tensor)

    looked_at = 0

    class Counted(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            nonlocal looked_at
            looked_at += 1
            return super().__getitem__(key)

    init = loading._Recorder.__init__

    def counting(self: Any, *args: Any) -> None:
        init(self, *args)
        self._spans = Counted(self._spans)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading._Recorder, "__init__", counting)
        rows = torch.randn(count, 2)
        update(WeightLoader(Many(), tied=False), {f"p{number}": row for number, row in enumerate(rows)})
    assert count <= looked_at < 3 * count


def test_heads_are_judged_by_the_embeddings_of_a_model_of_the_same_names() -> None:
    """The one that quantised weights were loaded into is gone by then."""
    first, second = (WeightLoader(Toy(tied=True), tied=True) for _ in range(2))
    weights = checkpoint(0, tied=True)
    update(second, weights)
    first._model.load_state_dict(second._model.state_dict())
    first.remember_embeddings(second)
    head = weights["model.embed_tokens.weight"]
    first.load([("lm_head.weight", head)])
    first.check_tied_heads()
    first.load([("lm_head.weight", head + 1)])
    with pytest.raises(WeightUpdateError, match="ties them"):
        first.check_tied_heads()
    assert not first.dirty


def test_optional_parameters_need_not_be_reached() -> None:
    model = Toy()
    model.attention = torch.nn.Module()
    model.attention.k_scale = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)
    with pytest.raises(WeightUpdateError, match=r"attention\.k_scale"):
        update(WeightLoader(model, tied=False), checkpoint(0))
    update(WeightLoader(model, tied=False, optional={"attention.k_scale"}), checkpoint(0))
