from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.data.windows import WindowSet
from tt_ray.errors import UserError
from tt_ray.evaluation import attention
from tt_ray.evaluation.attention import (
    SCORES,
    AttentionStudy,
    attention_weights,
    fresh,
    full_windows,
    head_scores,
    mean_attention,
    scored_keys,
    share_beyond,
    shuffled,
    study_attention,
    token_kinds,
)
from tt_ray.evaluation.attention_figures import heads_figure, maps_figure
from tt_ray.model.transformer import Attention, TrajectoryTransformer, visibility

PLAIN = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)  # D = 5
LAYOUTS = {
    "plain": PLAIN,
    "goal": TokenLayout(observation_dim=2, action_dim=1, num_bins=6, goal_slots=(1, 0)),
    "partial": TokenLayout(observation_dim=2, action_dim=1, num_bins=6, partial=True),
}
CONFIG = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=5)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def make_model(layout: TokenLayout = PLAIN) -> TrajectoryTransformer:
    """A model with sharp attention, in double precision."""
    torch.manual_seed(0)
    model = TrajectoryTransformer(CONFIG, layout).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return model


def make_tokens(layout: TokenLayout = PLAIN, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, layout.num_bins, (count, layout.goal_dim + 24), generator=generator)
    if layout.partial:
        tokens[:, ::5] = layout.hidden_token
    return tokens


def visible_of(layout: TokenLayout, transitions: int = 5) -> np.ndarray:
    length = layout.goal_dim + transitions * layout.slots - 1
    return visibility(length, layout.slots, layout.goal_dim).numpy()


def spread(keys: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """One head that looks evenly at `keys` [T, T], or at all it sees where there are none: [1, 1, T, T]."""
    chosen = np.where(keys.any(axis=1, keepdims=True), keys, visible)
    return (chosen / chosen.sum(axis=1, keepdims=True))[None, None]


def keys_by_hand(layout: TokenLayout, transitions: int = 5) -> dict[str, np.ndarray]:
    """The definitions read aloud, a pair of tokens at a time."""
    visible, goal, slots = visible_of(layout, transitions), layout.goal_dim, layout.slots
    found = {name: np.zeros_like(visible) for name in SCORES}
    for query in range(goal, len(visible)):
        target = query - goal + 1
        transition, slot = target // slots, target % slots
        for key in range(goal, query + 1):
            own, own_slot = (key - goal) // slots, (key - goal) % slots
            if transition < 3 or own_slot == slots - 1:
                continue
            found["markovian"][query, key] = own in (transition - 1, transition)
            found["striated"][query, key] = own < transition and own_slot == slot
    return found


@every_layout
def test_weights_mix_the_values_into_what_the_module_answers(layout: TokenLayout) -> None:
    model, seen = make_model(layout), []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs, output)))
    model(make_tokens(layout))
    assert len(seen) == CONFIG.num_layers
    for module, (x, mask), (mixed, _, value) in seen:
        weights = attention_weights(module, x, mask)
        torch.testing.assert_close(module.proj((weights @ value).transpose(1, 2).flatten(2)), mixed)


@every_layout
def test_maps_are_means_over_windows_and_the_model_stays_as_it_is(
    layout: TokenLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model(layout), make_tokens(layout)
    before = model(tokens)
    each = np.stack([mean_attention(model, window[None]) for window in tokens])
    monkeypatch.setattr(attention, "CHUNK", 2 * 2 * tokens.shape[1] ** 2)  # two windows at a time
    maps = mean_attention(model, tokens)
    np.testing.assert_allclose(maps, each.mean(axis=0), atol=1e-12)
    assert each.std(axis=0).max() > 0.05
    np.testing.assert_allclose(maps.sum(axis=-1), 1.0)
    assert (maps[..., ~visible_of(layout)] == 0).all()
    assert torch.equal(model(tokens), before)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("layout", [LAYOUTS["plain"], LAYOUTS["goal"]], ids=["plain", "goal"])
def test_the_keys_that_count(layout: TokenLayout) -> None:
    visible = visible_of(layout)
    found, wanted = scored_keys(layout, len(visible)), keys_by_hand(layout)
    for name in SCORES:
        assert ((found[name] & visible) == (wanted[name] & visible)).all()
        assert (found[name] & visible).any()
    queries = np.flatnonzero((wanted["striated"] & visible).any(axis=1)) - layout.goal_dim
    assert queries.tolist() == [14, 15, 16, 17, 19, 20, 21, 22]  # 18 and 23 predict values


@pytest.mark.parametrize("layout", [LAYOUTS["plain"], LAYOUTS["goal"]], ids=["plain", "goal"])
def test_a_head_made_for_a_score_gets_the_highest(layout: TokenLayout) -> None:
    visible = visible_of(layout)
    keys = {name: keys & visible for name, keys in keys_by_hand(layout).items()}
    for name in SCORES:
        assert head_scores(spread(keys[name], visible), visible, layout)[name].values == pytest.approx(1.0)
        # One key of each query's is as good as all of them.
        first = keys[name] & (keys[name].cumsum(axis=1) == 1)
        assert head_scores(spread(first, visible), visible, layout)[name].values == pytest.approx(1.0)
        uniform = head_scores(spread(visible, visible), visible, layout)[name]
        assert uniform.values == pytest.approx(0.0)
        assert uniform.mass.item() == pytest.approx(uniform.uniform)
        away = head_scores(spread(visible & ~keys[name], visible), visible, layout)[name]
        assert away.mass == pytest.approx(0.0)
        assert away.values == pytest.approx(-uniform.uniform / (1 - uniform.uniform))


def test_what_half_a_stripe_is_worth() -> None:
    visible = visible_of(PLAIN, 4)  # queries 14 to 18, targets 0 to 4 of the fourth transition
    striated = keys_by_hand(PLAIN, 4)["striated"] & visible
    maps = (spread(striated, visible) + spread(visible, visible)) / 2
    # 12 keys that are no value's are seen at place 14, then one more each; three are the stripe's.
    uniform = np.mean([3 / 12, 3 / 13, 3 / 14, 3 / 15])
    score = head_scores(maps, visible, PLAIN)["striated"]
    assert score.uniform == pytest.approx(uniform)
    assert score.mass.item() == pytest.approx((1 + uniform) / 2)
    assert score.values.item() == pytest.approx(0.5)


def test_one_stripe_is_told_from_several() -> None:
    visible = visible_of(PLAIN)
    striated = keys_by_hand(PLAIN)["striated"] & visible
    far = striated & (striated[:, ::-1].cumsum(axis=1)[:, ::-1] > 1)  # all but the last key of each query
    assert share_beyond(spread(striated & ~far, visible), PLAIN).item() == pytest.approx(0.0)
    assert share_beyond(spread(far, visible), PLAIN).item() == pytest.approx(1.0)
    # Of three keys two lie beyond (targets in the fourth transition), of four keys three (in the fifth).
    several = share_beyond(spread(striated, visible), PLAIN).item()
    assert several == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert share_beyond(np.zeros((1, 1, 24, 24)), PLAIN).item() == 0.0


def test_windows_that_are_too_short_for_the_scores_are_refused() -> None:
    visible = visible_of(PLAIN, 3)
    refusal = r"a window of 3 transitions is too short .* at least 4 are needed \(model.context_transitions\)"
    with pytest.raises(UserError, match=refusal):
        head_scores(spread(visible, visible), visible, PLAIN)
    with pytest.raises(UserError, match=refusal):
        study_attention(make_model(), make_tokens()[:, :14])


def test_the_controls_have_learned_nothing() -> None:
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for make in (fresh, shuffled):
        one, same, other = make(model, 0), make(model, 0), make(model, 1)
        weights = [dict(m.named_parameters())["blocks.0.attention.qkv.weight"] for m in (one, same, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert not torch.equal(weights[0].double(), model.blocks[0].attention.qkv.weight)  # type: ignore[union-attr,operator]
    for name, value in shuffled(model, 0).named_parameters():
        assert torch.equal(value.flatten().sort().values, state[name].flatten().sort().values)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_making_a_control_leaves_the_random_stream_alone() -> None:
    model = make_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fresh(model, 0)
    shuffled(model, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def study() -> AttentionStudy:
    return study_attention(make_model(), make_tokens(), control_seeds=3)


def test_a_study_has_every_head_and_the_line_that_it_must_beat(study: AttentionStudy) -> None:
    model, tokens = make_model(), make_tokens()
    visible = visible_of(PLAIN)
    assert study.windows == 6
    wanted = head_scores(mean_attention(model, tokens), visible, PLAIN)
    for name in SCORES:
        assert study.scores[name].values == pytest.approx(wanted[name].values)
        for kind, make in (("fresh", fresh), ("shuffled", shuffled)):
            assert study.control[name][kind].shape == (3, 2, 2)
            third = head_scores(mean_attention(make(model, 2), tokens), visible, PLAIN)[name]
            assert study.control[name][kind][2] == pytest.approx(third.values)
        assert study.line(name) == max(values.max() for values in study.control[name].values())
        # Newly initialised attention is almost uniform; that of shuffled numbers is not.
        assert np.abs(study.control[name]["fresh"]).max() < 0.01
    assert np.abs(study.control["markovian"]["shuffled"]).max() > 0.01
    plain = study.to_json()
    assert [(row["layer"], row["head"]) for row in plain["heads"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    best = max(plain["heads"], key=lambda row: row["striated"])
    assert (plain["striated"]["layer"], plain["striated"]["head"]) == (best["layer"], best["head"])
    assert plain["striated"]["above_control"] == (best["striated"] > plain["striated"]["control"])
    assert plain["control_seeds"] == 3


def window_set(lengths: list[int], layout: TokenLayout = PLAIN, window: int = 5) -> WindowSet:
    """Windows of episodes of these lengths; every token of a row is the row's number."""
    offsets = np.cumsum([0, *lengths])
    rows = np.repeat(np.arange(offsets[-1], dtype=np.uint8)[:, None], layout.slots, axis=1)
    ends = np.zeros(offsets[-1], dtype=bool)
    return WindowSet.build(rows, offsets, ends, np.arange(len(lengths)), window, layout)


def test_whole_windows_are_spread_over_all_that_there_are() -> None:
    windows = window_set([7, 3, 6])  # whole ones start at rows 0, 1, 2 and 10, 11
    assert full_windows(windows, 100)[:, 0].tolist() == [0, 1, 2, 10, 11]
    chosen = full_windows(windows, 3)
    assert chosen.shape == (3, 24)
    assert chosen[:, 0].tolist() == [0, 2, 11]
    assert chosen[1].tolist() == np.repeat([2, 3, 4, 5, 6], 5)[:-1].tolist()


def test_whole_windows_of_a_goal_model_begin_with_the_goal() -> None:
    chosen = full_windows(window_set([7, 3, 6], LAYOUTS["goal"]), 100)
    assert chosen.shape == (5, 26)
    assert chosen[:, :2].tolist() == [[6, 6]] * 3 + [[15, 15]] * 2


def test_episodes_without_a_whole_window_are_refused() -> None:
    with pytest.raises(UserError, match="no held-out episode has the 5 transitions of the model's window"):
        full_windows(window_set([4, 3]), 10)


def test_kinds_of_tokens() -> None:
    names = [None if kind is None else kind.name[0] for kind in token_kinds(LAYOUTS["goal"], 12)]
    assert names == [None, None, "O", "O", "A", "R", "V", "O", "O", "A", "R", "V"]


@pytest.mark.filterwarnings("error")
@every_layout
def test_figures_name_the_heads_that_stand_out(layout: TokenLayout, tmp_path: Path) -> None:
    study = study_attention(make_model(layout), make_tokens(layout, 3), control_seeds=2)
    for draw in (maps_figure, heads_figure):
        draw(study, tmp_path / "figure.png")
        draw(study, tmp_path / f"{draw.__name__}.svg")
        assert min(imread(tmp_path / "figure.png").shape[:2]) > 300
    (tmp_path / "figure.png").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads_figure.svg", "maps_figure.svg"]
    maps, heads = ((tmp_path / f"{name}_figure.svg").read_text() for name in ("maps", "heads"))
    for name, title in (("markovian", "Markovian"), ("striated", "striated")):
        layer, head = (place + 1 for place in study.scores[name].best)
        score = f"{study.scores[name].values.max():.2f}"
        assert f"most {title}: layer {layer}, head {head}, {score} (" in maps
        assert f"<!-- most {title}: layer {layer}, head {head} -->" in heads
        assert f"score {score}, controls up to {study.line(name):.3f}" in heads
    assert maps.count("<!-- head 1") == maps.count("<!-- head 2") == 2
    kinds = ["observation", "action", "reward", "value", *(["goal"] if layout.goal_dim else [])]
    assert all(f"<!-- {kind} -->" in maps for kind in kinds)
    assert ("<!-- goal -->" in maps) == bool(layout.goal_dim)
