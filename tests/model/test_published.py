"""Imported models give the published ones' logits, in every way in which this program decodes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_originals import (
    AuthorsGPT,
    PortGPT,
    authors_settings,
    randomized,
    write_authors_run,
    write_port_run,
)
from torch import Tensor, nn

from tt_ray.config import ModelConfig
from tt_ray.data.limited import read_apart
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError
from tt_ray.model.cache import SearchCache
from tt_ray.model.native import NativeCache
from tt_ray.model.published import (
    AUTHORS_NAMES,
    Sizes,
    authors_model,
    port_model,
    port_sizes,
    read_sizes,
)
from tt_ray.model.transformer import TrajectoryTransformer
from tt_ray.planning.expansions import SearchSettings, Transitionwise

LAYOUT = TokenLayout(observation_dim=4, action_dim=2, num_bins=10)  # D = 8
CONFIG = ModelConfig(num_layers=3, num_heads=2, embed_dim=32, context_transitions=4)
LENGTH = 4 * 8 - 1


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def sizes_of(port: bool) -> Sizes:
    settings = authors_settings(CONFIG, LAYOUT)
    positions = LENGTH + port
    sizes = read_sizes({**settings, "block_size": positions}, AUTHORS_NAMES, "model_config.pkl")
    assert sizes.config == CONFIG
    return sizes


def random_tokens(length: int, stop: bool) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, LAYOUT.num_bins, (3, length), generator=generator)
    if stop:
        tokens[1, length // 2 :] = LAYOUT.stop_token
    return tokens


def same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 7, 8, 9, LENGTH])
@pytest.mark.parametrize("seed", range(2))
def test_the_released_code(length: int, seed: int) -> None:
    theirs = randomized(AuthorsGPT(CONFIG, LAYOUT), seed=seed)
    ours = authors_model(weights_of(theirs), sizes_of(port=False), "state_40.pt")
    tokens = random_tokens(length, stop=True)
    with torch.inference_mode():
        same(ours(tokens), theirs(tokens), 1e-5)
        same(ours.double()(tokens), theirs.double()(tokens), 1e-10)


@pytest.mark.parametrize("length", [1, 7, 8, 9, LENGTH])
@pytest.mark.parametrize("shared_head", [False, True])
def test_the_port(length: int, shared_head: bool) -> None:
    theirs = randomized(PortGPT(CONFIG, LAYOUT, shared_head))
    sizes = Sizes(**{**vars(sizes_of(port=True)), "shared_head": shared_head})
    ours = port_model(weights_of(theirs), sizes, "model_last.pt")
    tokens = random_tokens(length, stop=False)
    with torch.inference_mode():
        logits = ours(tokens)
        same(logits[..., :-1], theirs(tokens), 1e-5)
        assert (logits[..., -1] == -torch.inf).all()
        same(ours.double()(tokens)[..., :-1], theirs.double()(tokens), 1e-10)


def imported_port() -> TrajectoryTransformer:
    theirs = randomized(PortGPT(CONFIG, LAYOUT), scale=0.2)
    return port_model(weights_of(theirs), sizes_of(port=True), "model_last.pt").double()


def test_a_port_decodes_alike_in_the_cache_and_in_native_code() -> None:
    """Three ways to the same search: the whole model at once, a token at a time, and in C++."""
    model = imported_port()
    sizes: dict[str, Any] = {"beams": 4, "horizon": 2, "max_context_transitions": 2, "window": 4, "keep": 1}
    values = torch.linspace(-1, 2, LAYOUT.num_bins + 1, dtype=torch.float64)
    native = NativeCache(model, episodes=2, copies=2, **sizes, reward_values=values, value_values=values)
    settings = SearchSettings(2, 4, 2)
    eager = Transitionwise(
        SearchCache(model, episodes=2, copies=2, **sizes), settings, LAYOUT, values, values
    )
    tokens = random_tokens(LAYOUT.slots + LAYOUT.observation_dim, stop=False)[:2]
    uniforms = torch.rand(2, 2, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for decoder in (native, eager):
        decoder.open(tokens, [1, 1])
        rewards, ahead, chosen = decoder.expand(uniforms)
        found.append((rewards, ahead, chosen, decoder.candidate_actions.clone()))
    for one, other in zip(*found, strict=True):
        same(one.double(), other.double(), 1e-9)
    actions = found[0][3][:, 0]  # [E, n, M] of the first beam
    with torch.inference_mode():
        whole = torch.cat([tokens[:, None].expand(-1, 2, -1), actions], dim=-1).flatten(0, 1)
        mean = model(whole)[:, -1].softmax(-1) @ values
    same(found[0][0][:, 0].flatten(), mean, 1e-9)


MODEL_CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda w: w.pop("ln_f.bias"), "ln_f.bias is missing"),
    (lambda w: w.update(extra=np.zeros(3, np.float32)), "extra belongs to no model"),
    (lambda w: w.update({"head.weight": w["head.weight"][:, :-1]}), r"head.weight is \[8, 10, 32\]"),
    (lambda w: w.update({"pos_emb": np.full_like(w["pos_emb"], np.nan)}), "no finite number"),
    (lambda w: w["blocks.1.attn.mask"].fill(1), "blocks.1.attn.mask: hides other tokens"),
    (lambda w: w.update({"blocks.0.attn.mask": np.ones((1, 1, 2, 2), np.float32)}), "hides other tokens"),
]


@pytest.mark.parametrize(("change", "said"), MODEL_CHANGES, ids=[said for _, said in MODEL_CHANGES])
def test_weights_that_are_not_of_the_settings(change: Callable[[dict[str, Any]], Any], said: str) -> None:
    weights = {name: value.copy() for name, value in weights_of(AuthorsGPT(CONFIG, LAYOUT)).items()}
    change(weights)
    with pytest.raises(UserError, match=said) as caught:
        authors_model(weights, sizes_of(port=False), "state_40.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layer": None}, "n_layer"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_layer": True}, "n_layer: expected int"),
        ({"transition_dim": 9}, "transition_dim is 9, but it should be 8"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_sizes({**authors_settings(CONFIG, LAYOUT), **change}, AUTHORS_NAMES, "model_config.pkl")


def test_more_layers_than_weights_cost_nothing() -> None:
    settings = {**authors_settings(CONFIG, LAYOUT), "n_layer": 10**12}
    sizes = read_sizes(settings, AUTHORS_NAMES, "model_config.pkl")
    for convert in (authors_model, port_model):
        with pytest.raises(UserError, match="no weights for 1000000000000 layers"):
            convert(weights_of(AuthorsGPT(CONFIG, LAYOUT)), sizes, "state_40.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_the_released_code_read_apart(tmp_path: Path, legacy: bool) -> None:
    theirs = randomized(AuthorsGPT(CONFIG, LAYOUT))
    write_authors_run(tmp_path, theirs, CONFIG, LAYOUT, legacy=legacy)
    names = ["model_config.pkl", "data_config.pkl"]
    arrays = read_apart(
        "tt_ray.model.inert:read_run", tmp_path, weights="state_40.pt", settings=names, bins=None
    )
    plain = json.loads(arrays.pop("settings").tobytes())
    made = plain["model_config.pkl"]
    assert made.pop("_class") == "trajectory.models.transformers.GPT"
    assert made == authors_settings(CONFIG, LAYOUT)
    assert plain["data_config.pkl"]["penalty"] == -100
    assert arrays.keys() == {f"weights/{name}" for name in theirs.state_dict()}
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(arrays[f"weights/{name}"], value.numpy())


def rename_in_pickle(file: Path, old: bytes, new: bytes) -> None:
    """A `.pt` file as another version would have written it: the names in its pickle end with line breaks."""
    with zipfile.ZipFile(file) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    assert any(old in content for name, content in parts if name.endswith("data.pkl"))
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts:
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("numpy_module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_files_of_the_port_read_apart(tmp_path: Path, numpy_module: bytes) -> None:
    edges = np.sort(np.random.default_rng(0).normal(size=(LAYOUT.slots, LAYOUT.num_bins + 1)))
    turned = np.asfortranarray(edges)
    write_port_run(tmp_path, PortGPT(CONFIG, LAYOUT), CONFIG, LAYOUT, turned, strategy="quantile")
    rename_in_pickle(tmp_path / "discretizer.pt", b"numpy._core.multiarray", numpy_module)
    arrays = read_apart(
        "tt_ray.model.inert:read_run", tmp_path, weights="model_last.pt", settings=[], bins="discretizer.pt"
    )
    np.testing.assert_array_equal(arrays["bins/edges"], edges)
    np.testing.assert_array_equal(arrays["bins/centers"], (edges[:, 1:] + edges[:, :-1]) * 0.5)
    assert arrays["weights/blocks.0.attn_mask"].dtype == np.bool_
    plain = json.loads(arrays["settings"].tobytes())
    assert plain == {"discretizer.pt": {"strategy": "quantile", "n_bins": LAYOUT.num_bins}}


def test_the_port_names_its_sizes_otherwise() -> None:
    section = {
        "vocab_size": 10,
        "transition_dim": 8,
        "observation_dim": 4,
        "action_dim": 2,
        "seq_len": 32,
        "embedding_dim": 32,
        "num_layers": 3,
        "num_heads": 2,
        "residual_dropout": 0.1,
    }
    sizes = port_sizes(section, "config.yaml: model")
    assert (sizes.config, sizes.layout, sizes.shared_head) == (CONFIG, LAYOUT, True)
    assert not port_sizes({**section, "use_sep_heads": True}, "config.yaml: model").shared_head
