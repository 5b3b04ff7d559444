from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tt_ray.config import ModelConfig
from tt_ray.data.tokens import TokenLayout
from tt_ray.model.transformer import TrajectoryTransformer, visibility

LAYOUT = TokenLayout(observation_dim=2, action_dim=1, num_bins=6)  # D = 5
CONFIG = ModelConfig(num_layers=2, num_heads=2, embed_dim=8, context_transitions=4)


def random_model(seed: int = 0) -> TrajectoryTransformer:
    torch.manual_seed(seed)
    model = TrajectoryTransformer(CONFIG, LAYOUT).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LAYOUT.num_bins, (batch, length), generator=generator)


@pytest.mark.parametrize(
    ("observation_dim", "action_dim", "parameters"),
    [(11, 3, 1_225_472), (17, 6, 1_468_544), (27, 8, 1_792_640)],
    ids=["hopper", "halfcheetah", "ant"],
)
def test_published_parameter_counts(observation_dim: int, action_dim: int, parameters: int) -> None:
    layout = TokenLayout(observation_dim, action_dim, num_bins=100)
    assert TrajectoryTransformer(ModelConfig(), layout).num_parameters == parameters


def changed_logits(position: int, length: int = 19) -> list[int]:
    """Positions whose logits change when the token at `position` does."""
    model, tokens = random_model(), random_tokens(1, length)
    other = tokens.clone()
    other[0, position] = (tokens[0, position] + 1) % LAYOUT.num_bins
    difference = (model(tokens) - model(other)).abs().amax(dim=-1)[0]
    return [t for t in range(length) if difference[t] > 0]


@pytest.mark.parametrize("position", [t for t in range(19) if t % 5 != 4])
def test_a_token_changes_its_own_logits_and_later_ones(position: int) -> None:
    assert changed_logits(position) == list(range(position, 19))


@pytest.mark.parametrize("position", [4, 9, 14])
def test_a_value_token_changes_its_own_logits_only(position: int) -> None:
    assert changed_logits(position) == [position]


def test_the_mask_by_hand() -> None:
    assert visibility(5, 3).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_every_slot_has_its_own_embeddings_but_the_stop_token() -> None:
    model = random_model()
    positions = torch.tensor(0)

    def embed(token: int, slot: int) -> Tensor:
        return model.embed(torch.tensor(token), torch.tensor(slot), positions)

    assert not torch.equal(embed(2, 0), embed(2, 3))
    stop = LAYOUT.stop_token
    assert torch.equal(embed(stop, 0), embed(stop, 3))
    assert not torch.equal(embed(stop, 0), embed(0, 1))


def test_rows_of_a_batch_do_not_mix() -> None:
    model, tokens = random_model(), random_tokens(4, 12)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=1e-10, atol=1e-10)


def test_too_long_a_sequence_is_refused() -> None:
    model = random_model()
    assert model(random_tokens(1, model.max_tokens)).shape == (1, 19, 7)
    with pytest.raises(ValueError, match="20 tokens do not fit the model's context of 19"):
        model(random_tokens(1, 20))


def test_dropout_is_for_training_only() -> None:
    model, tokens = random_model(), random_tokens(2, 9)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


GOAL = TokenLayout(observation_dim=2, action_dim=1, num_bins=6, goal_slots=(1, 0), partial=True)


def goal_model(layout: TokenLayout = GOAL) -> TrajectoryTransformer:
    torch.manual_seed(0)
    model = TrajectoryTransformer(CONFIG, layout).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def test_the_mask_with_a_goal_by_hand() -> None:
    """Two goal tokens, two transitions of four: the value columns are 5 and 9."""
    assert visibility(10, 4, goal_dim=2).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize("goal_dim", [3, 5, 7])
def test_a_goal_as_long_as_a_transition_hides_none_of_its_own(goal_dim: int) -> None:
    seen = visibility(goal_dim + 8, 4, goal_dim)[-1].tolist()
    assert seen == [True] * goal_dim + [True, True, True, False] * 2


def test_a_goal_has_its_slots_embeddings_and_the_first_positions() -> None:
    """The goal model is the plain one, told each token's slot, position and mask."""
    model, tokens = goal_model(), random_tokens(3, 2 + 13)
    assert model.max_tokens == 2 + 19
    assert model.token_embedding.num_embeddings == 6 * 5 + 2
    tokens[0, 0] = tokens[0, 7] = tokens[1, 3] = GOAL.hidden_token
    tokens[2, 12:] = GOAL.stop_token
    rows = torch.empty_like(tokens)
    for place in range(15):
        slot = (1, 0)[place] if place < 2 else (place - 2) % 5
        for row, token in enumerate(tokens[:, place].tolist()):
            rows[row, place] = {6: 30, 7: 31}.get(token, slot * 6 + token)
    x = model.token_embedding(rows) + model.position_embedding[:15]
    for block in model.blocks:
        x, _, _ = block(x, visibility(15, 5, 2))
    hidden = model.final_norm(x)
    expected = torch.stack([hidden[:, 2 + t] @ model.head[t % 5].T for t in range(13)], dim=1)
    logits = model(tokens)
    assert logits.shape == (3, 13, 7)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", [0, 1])
def test_a_goal_token_changes_all_logits(place: int) -> None:
    model, tokens = goal_model(), random_tokens(1, 2 + 19)
    other = tokens.clone()
    other[0, place] = (tokens[0, place] + 1) % 6
    assert ((model(tokens) - model(other)).abs().amax(dim=-1) > 0).all()


def test_too_long_a_sequence_after_a_goal_is_refused() -> None:
    model = goal_model()
    with pytest.raises(ValueError, match="22 tokens do not fit the model's context of 21"):
        model(random_tokens(1, 22))
