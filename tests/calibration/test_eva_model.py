"""`initialize_lora_eva_weights`: what it learns from, what it does to a model, and that it agrees with PEFT.

Models are float64 where numbers are compared that were summed in another order.
"""

import copy
import math
import warnings

import numpy as np
import peft
import pytest
import torch
from models import VOCABULARY, Snapshot, gpt2
from torch import nn

import lora_ref
from lora_ref import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model
from lora_ref.calibration import eva_statistics
from lora_ref.calibration.eva import initialize_lora_eva_weights
from lora_ref.core.model import describe
from lora_ref.numerics import pca
from spec_tests import agree, close, distance

WIDTH = 12
QUIET = {"show_progress_bar": False}


class Block(nn.Module):
    """q, k and v see the same tensor; o and the head see others."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        y = torch.tanh(self.q(x)) * self.k(x) + self.v(x)  # no token sees another
        return self.head(torch.relu(self.o(y)))


def block(dtype=torch.float64):
    torch.manual_seed(0)
    model = Block().to(dtype)
    with torch.no_grad():
        model.embed.weight *= 1.5 ** -torch.arange(WIDTH)  # a spectrum that can be told apart
    return model


def config(targets=("q", "k", "v", "o"), r=2, rho=2.0, tau=0.99, whiten=False, adjust=True, **options):
    options = {"r": r, "lora_alpha": 4, "target_modules": list(targets), "init_lora_weights": "eva"} | options
    chosen = EvaConfig(rho=rho, tau=tau, whiten=whiten, adjust_scaling_factors=adjust)
    return LoraConfig(eva_config=chosen, **options)


def tokens(n=4, shape=(8, 6), seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, shape, generator=g)} | more for _ in range(n)]


def started(settings, data=None, model=None, **options):
    model = get_peft_model(block() if model is None else model, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="EVA: ")
        initialize_lora_eva_weights(model, tokens() if data is None else data, **QUIET | options)
    return model


def scatter(model, data):
    """What the layers after the embedding see: singular values, components V^T, rounding (terms, size) of X^T X.

    It sums products over all rows, and its eigenvectors are exact to their width: |E| <= terms u |X|^2.
    """
    X = torch.cat([model.embed(batch["input_ids"]) for batch in data]).flatten(0, 1).detach()
    _, S, Vt = torch.linalg.svd(X - X.mean(0))
    return S, Vt, sum(X.shape), S.square().sum()


def are_components(A, S, Vt, terms, size):
    """A's rows are the first components, but for their signs: E turns them by |E| / (the gap of the eigenvalues)."""
    r = len(A)
    gap = -S.square().diff()[:r].max()
    close((A @ Vt[:r].T).abs(), torch.eye(r), terms, size / gap, dtype="float64")


def factors(model):
    return {name: layer.factors("default") for name, layer in model.lora_layers().items()}


def ranks(model):
    return {name: layer.r["default"] for name, layer in model.lora_layers().items()}


# -- what is learnt ----------------------------------------------------------------------------


def test_the_factors_are_the_principal_components_of_each_layers_inputs():
    model, data = block(), tokens(5)
    want = scatter(model, data)
    got = factors(started(config(rho=1.0, tau=1.0), data, model))
    assert list(got) == ["q", "k", "v", "o"]
    for name in "qkv":
        A, B = got[name]
        are_components(A, *want)
        assert not B.any()
        assert torch.equal(A, got["q"][0])
    assert distance(got["o"][0], got["q"][0]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whiten", [True, False])
def test_the_start_is_the_base_model_bit_for_bit(dtype, whiten):
    data, model = tokens(), block(dtype)
    before = [model(**batch) for batch in data]
    model = started(config(whiten=whiten), data, model)
    for batch, y in zip(data, before, strict=True):
        assert torch.equal(model(**batch), y)
    A = factors(model)["q"][0]
    assert A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(A.to(dtype).to(A.dtype), A)  # rounded to the base's dtype


def test_without_autocast_the_factors_stay_in_half_precision():
    model = get_peft_model(block(torch.bfloat16), config(), autocast_adapter_dtype=False)
    initialize_lora_eva_weights(model, tokens(16), **QUIET)
    assert {A.dtype for A, _ in factors(model).values()} == {torch.bfloat16}


def padded(filler, label=-100):
    """The last two positions are padding, the first has no label; what stands there is `filler`."""
    data = tokens(4)
    for i, batch in enumerate(data):
        batch["attention_mask"] = torch.ones(8, 6, dtype=torch.long)
        batch["attention_mask"][:, -2:] = 0
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, 0] = label
        batch["input_ids"][:, [0, -2, -1]] = (filler + i) % 50
    return data


def test_masked_tokens_have_no_influence_at_all():
    one, other = (factors(started(config(), padded(filler))) for filler in (3, 31))
    for name in one:
        assert torch.equal(one[name][0], other[name][0])
    kept = [{"input_ids": batch["input_ids"][:, 1:-2]} for batch in padded(3)]
    agree({name: A for name, (A, _) in factors(started(config(), kept)).items()}, {n: A for n, (A, _) in one.items()})


def test_a_label_mask_that_is_not_used_or_has_another_value_masks_nothing():
    def with_labels(filler, **options):
        settings = config()
        settings.eva_config = EvaConfig(**options)
        return factors(started(settings, padded(filler)))["q"][0]

    for options in ({"use_label_mask": False}, {"label_mask_value": -1}):
        assert not torch.equal(with_labels(3, **options), with_labels(31, **options))


def test_a_mask_of_other_positions_is_refused_by_name():
    data = tokens(1, attention_mask=torch.ones(8, 5))
    with pytest.raises(ValueError, match=r"q: its input has the positions \(8, 6\), the batch's mask \(8, 5\)"):
        started(config(), data)
    classes = tokens(4, labels=torch.zeros(8))  # one label a sample masks no tokens
    assert torch.equal(factors(started(config(), classes))["q"][0], factors(started(config()))["q"][0])


def test_flattened_inputs_are_masked_in_their_order():
    batch = {"attention_mask": torch.tensor([[1, 0], [0, 1]])}
    rows = eva_statistics.kept_rows(torch.arange(4.0)[:, None], batch, EvaConfig())
    assert rows.flatten().tolist() == [0.0, 3.0]


def test_the_rows_that_count_can_be_chosen():
    asked = []

    def first_token(x, batch, name):
        asked.append((name, batch["input_ids"].shape))
        return x[:, 0]

    got = factors(started(config(), prepare_layer_inputs_fn=first_token))
    want = factors(started(config(), [{"input_ids": batch["input_ids"][:, :1]} for batch in tokens()]))
    agree({name: A for name, (A, _) in got.items()}, {name: A for name, (A, _) in want.items()})
    assert {name for name, _ in asked} == set("qkvo")


def test_neither_training_mode_nor_another_adapter_has_any_influence():
    class Dropping(Block):
        def __init__(self):
            super().__init__()
            self.embed = nn.Sequential(self.embed, nn.Dropout(0.5))

    torch.manual_seed(0)
    base = Dropping().eval()
    want = factors(started(config(), model=copy.deepcopy(base)))
    model = get_peft_model(base.train(), LoraConfig(target_modules=[*"qkv"], init_lora_weights=False), "other")
    model.add_adapter("default", config())
    model.set_adapter(["other", "default"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="EVA: ")
        initialize_lora_eva_weights(model, tokens(), **QUIET)
    for name, (A, _) in factors(model).items():
        assert torch.equal(A, want[name][0])
    assert model.active_adapters == ["other", "default"]


# -- shared inputs -----------------------------------------------------------------------------


def counted(monkeypatch, module, function):
    calls, original = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1])
    return calls


def test_layers_with_the_same_input_share_one_decomposition(monkeypatch):
    updates = counted(monkeypatch, pca, "update")
    found = counted(monkeypatch, pca, "components")
    started(config(tau=1.0), tokens(3))
    assert len(updates) == 3 * 2  # batches, distinct inputs
    assert len(found) == 3 * 2  # after 1, 2 and 3 batches


def test_equal_inputs_that_are_not_the_same_tensor_are_not_shared(monkeypatch):
    class Copies(Block):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.q(x) + self.k(x.clone())

    model = Copies()
    updates = counted(monkeypatch, pca, "update")
    got = factors(started(config(["q", "k"], rho=1.0), tokens(2), model))
    assert len(updates) == 2 * 2
    assert torch.equal(got["q"][0], got["k"][0])


def test_a_tensor_that_was_changed_in_place_is_another_input():
    class InPlace(Block):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            y = self.q(x)
            x[..., 0] = 100 * y[..., 0]
            return self.k(x)

    got = factors(started(config(["q", "k"], rho=1.0), tokens(2), InPlace()))
    assert got["k"][0][0, 0] > 0.999
    assert got["q"][0][0, 0].abs() < 0.999


def test_a_layer_that_is_called_again_with_something_else_does_not_share():
    class Twice(Block):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.q(x) + self.k(x) + self.k(100 * torch.sin(7 * x))

    got = factors(started(config(["q", "k"], rho=1.0), tokens(2), Twice()))
    assert distance(got["q"][0], got["k"][0]) > 0.1


def test_whitening_divides_once_where_inputs_are_shared():
    model, data = block(), tokens(5)
    S, _, terms, size = scatter(model, data)
    for A, _ in [factors(started(config(rho=1.0, tau=1.0, whiten=True), data))[name] for name in "qkv"]:
        # |E| / sigma^2 of sigma, and a norm of WIDTH numbers
        close(A.norm(dim=1) ** -2, S[:2], terms + WIDTH, size / S[:2])


# -- ranks, scaling, configuration -------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
def test_the_budget_is_kept_within_the_limits(rho):
    pattern = {"q": 3, "o": 4}
    got = ranks(started(config([*"qkvo", "head"], rho=rho, rank_pattern=pattern)))
    r = {name: pattern.get(name, 2) for name in [*"qkvo", "head"]}
    assert sum(got.values()) == sum(r.values())
    assert all(rank <= round(r[name] * rho) for name, rank in got.items())
    assert got == r or rho > 1
    assert got != r or rho < 2


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_what_it_was_in_every_layer(use_rslora):
    settings = config(use_rslora=use_rslora, alpha_pattern={"o": 6}, rank_pattern={"q": 3, "o": 1})
    before = {name: layer.scaling["default"] for name, layer in get_peft_model(block(), settings).lora_layers().items()}
    model = started(settings, prepare_layer_inputs_fn=two_or_twelve_directions)
    assert ranks(model) == {"q": 2, "k": 2, "v": 2, "o": 2}  # q lost one, o won one
    for name, layer in model.lora_layers().items():
        # alpha * sqrt(rank / r) / sqrt(rank)
        close(layer.scaling["default"], before[name], terms=5, size=before[name])
    settings.eva_config.adjust_scaling_factors = False
    for layer in started(settings, prepare_layer_inputs_fn=two_or_twelve_directions).lora_layers().values():
        r, alpha = layer.r["default"], layer.lora_alpha["default"]
        assert alpha in (4, 6)
        assert layer.scaling["default"] == alpha / (math.sqrt(r) if use_rslora else r)


def two_or_twelve_directions(x, batch, name):
    """q, k and v see two directions with half of the variance each, the others twelve of a twelfth."""
    return torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]) * (torch.arange(WIDTH) < (2 if name in "qkv" else WIDTH))


def uneven(**options):
    """Five layers of r = 1: o and head end with rank 0."""
    model = block()
    settings = config([*"qkvo", "head"], r=1, rho=2.0, **options)
    return started(settings, model=model, prepare_layer_inputs_fn=two_or_twelve_directions), model


def test_rank_0_takes_the_adapter_away():
    model, base = uneven()
    assert ranks(model) == {"q": 2, "k": 2, "v": 1}
    assert type(base.o) is type(base.head) is nn.Linear
    assert model.peft_config["default"].target_modules == ["q", "k", "v"]
    assert not any("lora" in name and ("o." in name or "head" in name) for name, _ in base.named_parameters())


def test_rank_0_leaves_another_adapter_alone():
    everywhere = LoraConfig(target_modules=[*"qkvo", "head"], init_lora_weights=False)
    model = get_peft_model(block(), everywhere, "other")
    model.add_adapter("default", config([*"qkvo", "head"], r=1, bias="lora_only"))
    want = model(tokens()[0]["input_ids"])
    initialize_lora_eva_weights(model, tokens(), prepare_layer_inputs_fn=two_or_twelve_directions, **QUIET)
    assert model.active_adapters == ["other"]
    assert list(model.peft_config) == ["other", "default"]
    assert torch.equal(model(tokens()[0]["input_ids"]), want)
    assert [name for name, layer in model.lora_layers().items() if "default" in layer.adapters()] == ["q", "k", "v"]
    assert len(model.lora_layers()) == 5
    model.set_adapter("default")
    biases = [name for name, p in model.get_base_model().named_parameters() if p.requires_grad and "bias" in name]
    assert biases == [f"{name}.base_layer.bias" for name in "qkv"]


def test_a_bias_that_belonged_to_a_layer_of_rank_0_is_frozen():
    _, base = uneven(bias="lora_only")
    for name in [*"qkvo", "head"]:
        assert getattr(base, name).bias.requires_grad is (name in "qkv")


def test_everything_else_of_the_adapter_survives():
    settings = config(["q", "k", "v", "o"], lora_dropout=0.25, modules_to_save=["head"])
    model = get_peft_model(block(), settings)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q"], init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model().head.modules_to_save["default"].bias += 1
    head = model.get_base_model().head.modules_to_save["default"].bias
    model.train()
    model.get_base_model().o.eval()
    other = [x.clone() for x in model.lora_layers()["q"].factors("other")]
    initialize_lora_eva_weights(model, tokens(16), **QUIET)
    assert model.get_base_model().head.modules_to_save["default"].bias is head
    assert model.lora_layers()["q"].lora_dropout["default"].p == 0.25
    assert list(model.lora_layers()["q"].lora_A) == ["default", "other"]
    assert all(torch.equal(x, y) for x, y in zip(other, model.lora_layers()["q"].factors("other"), strict=True))
    assert model.training
    assert not model.get_base_model().o.training
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(on is ("default" in name) for name, on in trains.items())
    assert settings.rank_pattern == {}  # the user's own is not touched
    assert model.get_base_model().q.base_layer.weight.grad is None


def outputs(model, data):
    model.eval()
    with torch.no_grad():
        return [model(**batch) for batch in data]


class Nested(nn.Module):
    """Names of which one is the end of another: blocks.0.q, blocks.1.q and q."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.q = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, input_ids):
        return self.q(self.blocks[0](input_ids) + self.blocks[1](input_ids))


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {r"^blocks\.0\.q": 3, "o": 1}, "alpha_pattern": {r"^blocks\.1\..*": 8}},
        {"use_rslora": True, "rank_pattern": {r"blocks\.0\..*": 1}},
        {
            "exclude_modules": ["blocks.0.k"],
            "layers_to_transform": [0, 1],
            "layers_pattern": "blocks",
            "rank_pattern": {"o": 1},
        },
        {"targets": r"blocks\.\d\.[qkv]|q", "rank_pattern": {"v": 1}},
    ],
    ids=["anchored", "rslora", "layers", "regex"],
)
def test_an_adapter_reloads_exactly_here_and_in_peft(tmp_path, options):
    options = dict(options)
    targets = options.pop("targets", None)
    settings = config(r=2, rho=1.5, **options)
    if targets:
        settings.target_modules = targets
    model = started(settings, model=Nested())
    with torch.no_grad():
        for _, B in factors(model).values():
            B.normal_()
    model.save_pretrained(tmp_path)
    assert len(set(ranks(model).values())) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a pattern that matched nothing would warn
        here = PeftModel.from_pretrained(Nested(), tmp_path)
    there = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    assert ranks(here) == ranks(model)
    assert {n: x.scaling for n, x in here.lora_layers().items()} == {
        n: x.scaling for n, x in model.lora_layers().items()
    }
    scalings = {n: m.scaling["default"] for n, m in there.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert scalings == {n: x.scaling["default"] for n, x in model.lora_layers().items()}
    data = tokens(2, seed=9)
    for x, y, z in zip(*(outputs(m, data) for m in (model, here, there)), strict=True):
        assert torch.equal(x, y)
        agree(x, z)


# -- it always ends ----------------------------------------------------------------------------


def test_it_stops_when_the_components_have_converged():
    taken = []

    def data():
        for batch in tokens(100, (64, 6)):
            taken.append(1)
            yield batch

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize_lora_eva_weights(get_peft_model(block(), config(tau=0.9)), data(), **QUIET)
    assert len(taken) < 20
    assert len(taken) & (len(taken) - 1) == 0  # a power of two: the next check after it would have been twice that


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_it_ends_after_one_pass_with_a_warning(n):
    model = get_peft_model(block(), config(tau=1.0))
    with pytest.warns(UserWarning, match=rf"2 of 2 inputs have components that had not converged .* after {n} batches"):
        initialize_lora_eva_weights(model, tokens(n), **QUIET)
    assert sum(ranks(model).values()) == 8


def test_it_takes_the_components_of_all_that_was_seen():
    data = tokens(7)
    model = block()
    want = scatter(model, data)
    are_components(factors(started(config(["q"], rho=1.0, tau=1.0), data, model))["q"][0], *want)


def test_small_batches_are_skipped_and_only_small_ones_are_an_error():
    large, small = tokens(3), tokens(1, (1, 3), seed=5)  # n = 4 components
    got, want = (factors(started(config(), data)) for data in (large[:2] + small + large[2:], large))
    assert all(torch.equal(got[name][0], want[name][0]) for name in want)
    with pytest.warns(UserWarning, match="2 of 2 inputs .* had not converged"):  # nothing new is no convergence
        initialize_lora_eva_weights(get_peft_model(block(), config()), large[:1] + 3 * small, **QUIET)
    with pytest.raises(ValueError, match=r"q, o: not called, or with fewer rows .* round\(r \* rho\) = 4"):
        started(config(), tokens(5, (1, 3)))
    with pytest.raises(ValueError, match="the dataloader is empty"):
        started(config(), [])


# -- what is refused, and that failing changes nothing ------------------------------------------


@pytest.mark.parametrize("where", ["share", "first batch", "later", "loader", "install"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_the_model_as_it_was(where, error, monkeypatch):
    model = get_peft_model(block(), config([*"qkvo", "head"], lora_dropout=0.5))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    model.get_base_model().o.eval()
    calls = []

    def forward(m, batch):
        calls.append(1)
        if len(calls) == {"share": 1, "first batch": 2, "later": 4}.get(where):
            raise error
        return m(**batch)

    def loader():
        for i, batch in enumerate(tokens(5)):
            if where == "loader" and i == 2:
                raise error
            yield batch

    if where == "install":
        original, done = lora_ref.LoraLayer.add_adapter, []

        def add_adapter(self, *args, **kwargs):
            done.append(1)
            if len(done) == 3:
                raise error
            original(self, *args, **kwargs)

        monkeypatch.setattr(lora_ref.LoraLayer, "add_adapter", add_adapter)
    before = Snapshot(model)
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_lora_eva_weights(model, loader(), forward_fn=forward, **QUIET)
    assert Snapshot(model) == before


def test_what_is_refused():
    def refused(message, settings, data=None, error=ValueError, **options):
        model = get_peft_model(block(), settings)
        before = Snapshot(model)
        with pytest.raises(error, match=message):
            initialize_lora_eva_weights(model, tokens() if data is None else data, **QUIET | options)
        assert Snapshot(model) == before

    refused("init_lora_weights=True: must be 'eva'", LoraConfig(target_modules=["q"]))
    refused(r"q: round\(r \* rho\) = round\(7 \* 2\) = 14 components are more than its 12", config(r=7))
    refused("there is no adapter 'defualt'", config(), adapter_name="defualt")
    broken = tokens(2)
    nan = get_peft_model(block(), config())
    with torch.no_grad():
        nan.get_base_model().embed.weight[3] = math.nan
    with pytest.raises(ValueError, match="q: the data hold NaN"):
        initialize_lora_eva_weights(nan, broken, **QUIET)
    with pytest.raises(TypeError, match="model is a Block"):
        initialize_lora_eva_weights(block(), tokens())
    merged = get_peft_model(block(), config())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        initialize_lora_eva_weights(merged, tokens(), **QUIET)


def test_a_missing_eva_config_is_made_with_a_warning():
    model = get_peft_model(block(), LoraConfig(r=2, target_modules=["q"], init_lora_weights="eva"))
    with pytest.warns(UserWarning, match="eva_config is None"):
        initialize_lora_eva_weights(model, tokens(16), **QUIET)
    assert model.peft_config["default"].eva_config == EvaConfig()


def test_options_that_are_given_with_the_data_need_no_warning(recwarn):
    model = get_peft_model(block(), LoraConfig(r=2, target_modules=["q"], init_lora_weights="eva"))
    given = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1))
    assert get_eva_state_dict(model, tokens(16), given, **QUIET).keys() == {"q"}
    assert not [w for w in recwarn if "eva_config" in str(w.message)]


def test_layers_that_eva_does_not_know_keep_their_factors(tmp_path):
    settings = {"r": 2, "target_modules": ["embed", "q", "o"], "init_lora_weights": "eva"}
    theirs = peft.get_peft_model(block(), peft.LoraConfig(eva_config=peft.EvaConfig(), **settings))
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(block(), tmp_path, is_trainable=True)
    embedding = model.lora_layers()["embed"].factors("default")
    with pytest.warns(UserWarning, match="linear layers only: embed keep"):
        initialize_lora_eva_weights(model, tokens(16), **QUIET)
    assert all(x is y for x, y in zip(model.lora_layers()["embed"].factors("default"), embedding, strict=True))
    model.save_pretrained(tmp_path / "again")
    assert ranks(PeftModel.from_pretrained(block(), tmp_path / "again")) == ranks(model)


def test_the_same_twice():
    one, other = (factors(started(config([*"qkvo", "head"]))) for _ in range(2))
    assert list(one) == list(other)
    for name, (A, _) in one.items():
        assert torch.equal(A, other[name][0])


def test_nothing_is_recorded_for_a_gradient():
    asked = []
    model = get_peft_model(block(), config())
    forward = lambda m, batch: (asked.append(torch.is_grad_enabled()), m(**batch))  # noqa: E731
    initialize_lora_eva_weights(model, tokens(16), forward_fn=forward, **QUIET)
    assert set(asked) == {False}


def test_the_global_generator_is_not_used():
    model = get_peft_model(block(), config())
    state = torch.random.get_rng_state()
    initialize_lora_eva_weights(model, tokens(16), **QUIET)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- against PEFT ------------------------------------------------------------------------------


def seeded_gpt2():
    torch.manual_seed(0)
    return gpt2(use_cache=False)


def sentences(n=8):
    g = torch.Generator().manual_seed(1)
    data = []
    for _ in range(n):
        ids = torch.randint(0, VOCABULARY, (16, 12), generator=g)
        mask = (torch.arange(12) < torch.randint(6, 13, (16, 1), generator=g)).long()
        data.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return data


def test_agrees_with_peft_on_a_gpt2_of_conv1d_layers():
    options = {"r": 3, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": "eva"}
    data = sentences()
    theirs = peft.get_peft_model(seeded_gpt2(), peft.LoraConfig(eva_config=peft.EvaConfig(rho=1.0, tau=0.9), **options))
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    ours = get_peft_model(seeded_gpt2(), LoraConfig(eva_config=EvaConfig(rho=1.0, tau=0.9), **options))
    before = outputs(ours, data[:1])[0].logits
    initialize_lora_eva_weights(ours, data, **QUIET)
    assert torch.equal(outputs(ours, data[:1])[0].logits, before)
    for name, (A, B) in factors(ours).items():
        module = theirs.base_model.model.get_submodule(name)
        other = module.lora_A["default"].weight
        assert A.shape == other.shape
        # orthonormal to the width of the eigenproblem, and sums as long
        close(A @ A.T, torch.eye(3), terms=2 * A.shape[1], size=1.0, dtype="float64")
        # they may have stopped at different batches: the leading directions agree to what sampling allows
        assert (A[:1] @ other[:1].T).abs().min() > 0.9
        assert not B.any()


def test_agrees_with_peft_and_numpy_on_data_of_distinct_spectra():
    torch.manual_seed(0)
    width, scale = 24, 2.0 ** -torch.arange(24)
    net = lambda: nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, 5))  # noqa: E731
    start = net()
    data = [torch.randn(400, width) * scale for _ in range(4)]
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "1"], "init_lora_weights": "eva"}
    forward = {"forward_fn": lambda m, x: m(x), "show_progress_bar": False}

    def same():
        fresh = net()
        fresh.load_state_dict(start.state_dict())
        return fresh

    theirs = peft.get_peft_model(same(), peft.LoraConfig(eva_config=peft.EvaConfig(rho=2.0), **options))
    peft.initialize_lora_eva_weights(
        theirs, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, **forward
    )
    ours = get_peft_model(same(), LoraConfig(eva_config=EvaConfig(rho=2.0), **options))
    initialize_lora_eva_weights(ours, data, **forward)
    there = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert ranks(ours) == {name: module.r["default"] for name, module in there.items()}
    for name, (A, _) in factors(ours).items():
        overlap = (A @ there[name].lora_A["default"].weight.T).diagonal().abs()
        assert overlap.min() > 0.98
        s = there[name].scaling["default"]
        close(ours.lora_layers()[name].scaling["default"], s, terms=3, size=s)  # alpha * (rank / r) / rank
    X = torch.cat(data).double().numpy()
    best = np.linalg.svd(X - X.mean(0))[2]
    A = factors(ours)["0"][0].detach().double().numpy()
    assert np.abs(np.abs(A @ best[: len(A)].T) - np.eye(len(A))).max() < 0.1  # it may have stopped before the end


def test_names_are_those_of_the_base_model():
    model, _ = uneven()
    kinds = describe(model.get_base_model()).kinds
    targets = model.peft_config["default"].target_modules
    assert set(targets) <= set(kinds)
    assert set(targets) == set(ranks(model))


def test_whitening_what_does_not_vary_is_refused_by_the_layer_s_name():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(["0"], rho=1.0, whiten=True))
    batches = [torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [4.0, 0, 0, 0]])] * 2  # along one direction alone
    with pytest.raises(ValueError, match=r"^0: EvaConfig\(whiten=True\): the inputs vary in fewer than r=2"):
        initialize_lora_eva_weights(model, batches, forward_fn=lambda m, x: m(x), show_progress_bar=False)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_factors_are_rounded_to_the_dtype_of_the_weight(whiten):
    model = get_peft_model(block(torch.bfloat16), config(whiten=whiten))
    initialize_lora_eva_weights(model, tokens(), **QUIET)
    for layer in model.lora_layers().values():
        A, B = layer.factors("default")
        assert A.dtype == torch.float32 and torch.equal(A, A.bfloat16().float()) and A.any() and not B.any()


@pytest.mark.parametrize("whiten", [False, True])
def test_components_that_were_saved_give_what_the_data_give(whiten):
    settings = config(whiten=whiten)
    found = get_eva_state_dict(get_peft_model(block(), settings), tokens(), **QUIET)
    by_data, by_state = started(settings), get_peft_model(block(), settings)
    initialize_lora_eva_weights(by_state, eva_state_dict={f"base_model.model.{k}": A for k, A in found.items()})
    assert by_state.peft_config == by_data.peft_config
    ours, theirs = by_state.state_dict(), by_data.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], x) for key, x in theirs.items())


def test_components_of_some_layers_leave_the_others_as_they_are():
    model = get_peft_model(block(), config())
    before = {name: layer.factors("default")[0].clone() for name, layer in model.lora_layers().items()}
    with pytest.warns(UserWarning, match="eva_state_dict does not name all layers: v, o keep the factors"):
        initialize_lora_eva_weights(model, None, {"q": torch.eye(WIDTH)[:3], "k": torch.eye(WIDTH)[:1]})
    after = {name: layer.factors("default")[0] for name, layer in model.lora_layers().items()}
    assert {name: A.shape[0] for name, A in after.items()} == {"q": 3, "k": 1, "v": 2, "o": 2}
    assert torch.equal(after["v"], before["v"]) and torch.equal(after["q"], torch.eye(WIDTH)[:3].double())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": torch.eye(WIDTH)[:2]}, "eva_state_dict: 'x' is no adapted linear layer; there are q, k, v, o"),
        ({"q": torch.eye(WIDTH + 1)[:2]}, r"q: components are \(2, 13\): must be \(r, 12\)"),
        ({"q": torch.ones(WIDTH)}, r"q: components are \(12,\): must be \(r, 12\)"),
        (None, "dataloader=None: give batches, or components as eva_state_dict"),
    ],
)
def test_components_that_do_not_fit_are_refused(given, words):
    model = get_peft_model(block(), config())
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        initialize_lora_eva_weights(model, None, given)
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


def test_a_function_prepares_what_the_rows_are_chosen_by():
    """As in PEFT: (batch, configuration) -> what stands for the batch."""
    data, seen = tokens(), []
    masks = [torch.arange(6).expand(8, 6) < 4 for _ in data]

    def prepared(batch, settings):
        seen.append(settings.r)
        return {"attention_mask": masks[0]}

    got = started(config(), data, prepare_model_inputs_fn=prepared)
    masked = [batch | {"attention_mask": mask} for batch, mask in zip(data, masks, strict=True)]
    want = started(config(), masked)
    assert seen == [2] * len(data)  # once for each batch
    for key, x in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], x)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("asked", [None, False, True])
def test_gathering_is_refused_only_where_it_is_asked_for_and_would_act(monkeypatch, processes, asked):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    options = QUIET if asked is None else QUIET | {"gather_distributed_inputs": asked}
    model = get_peft_model(block(), config())
    if asked and processes > 1:
        with pytest.raises(ValueError, match="gather_distributed_inputs=True: must be False with several processes"):
            get_eva_state_dict(model, tokens(), **options)
    else:
        assert get_eva_state_dict(model, tokens(), **options).keys() >= {"q"}
