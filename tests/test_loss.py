"""The loss against references: ten lines of numpy, sentence-transformers, and one process for two."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional as F

from b3_lightning.mining import listed
from b3_lightning.model.loss import (
    Direction,
    LossSettings,
    Rows,
    Temperature,
    contrastive_loss,
    ignored_columns,
    info_nce,
    same_key,
)
from b3_lightning.types import OF_FILE


def unit(n_rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n_rows, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def reference(query: Tensor, target: Tensor, temperature: float, ignore: Tensor) -> float:
    total = 0.0
    for row in range(len(query)):
        terms = [
            torch.exp(query[row] @ target[other] / temperature)
            for other in range(len(target))
            if other == row or not ignore[row, other]
        ]
        total -= float(torch.log(torch.exp(query[row] @ target[row] / temperature) / torch.stack(terms).sum()))
    return total / len(query)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_values_with_and_without_masks(temperature: float) -> None:
    query, target = unit(5, 0), unit(5, 1)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    some = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)) < 0.4
    for ignore in (nothing, some, ~nothing):
        found = info_nce(query @ target.T, temperature=temperature, ignore_BC=ignore)
        assert float(found) == pytest.approx(reference(query, target, temperature, ignore), rel=1e-9, abs=1e-12)


def test_everything_but_the_positive_masked_costs_nothing() -> None:
    query, target = unit(4, 0), unit(4, 1)
    assert float(info_nce(query @ target.T, temperature=0.1, ignore_BC=torch.ones(4, 4, dtype=torch.bool))) == 0


NEGATIVES = ["square", "triangle", "a word"]


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize(("symmetric", "hardness"), [(False, 0.0), (False, 4.0), (True, 0.0)])
def test_equal_to_sentence_transformers(
    models: dict[str, str], symmetric: bool, negatives: bool, hardness: float
) -> None:
    model = SentenceTransformer(models["bert"], device="cpu").eval()
    texts = [["a red circle", "the blue bar", "0123"], ["circle", "bar", "digits"], *([NEGATIVES] if negatives else [])]
    theirs = MultipleNegativesRankingLoss(
        model,
        scale=20.0,
        directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
        partition_mode="per_direction" if symmetric else "joint",
        hardness_mode="all_negatives" if hardness else None,
        hardness_strength=hardness,
    )
    with torch.no_grad():
        expected = theirs([model.preprocess(side) for side in texts], None)
        query, *columns = (F.normalize(model(model.preprocess(side))["sentence_embedding"], dim=1) for side in texts)
    column = torch.cat(columns)
    directions = [Direction(query, column, torch.zeros(3, len(column), dtype=torch.bool))]
    if symmetric:
        directions.append(Direction(columns[0], query, torch.zeros(3, 3, dtype=torch.bool)))
    settings = LossSettings(hardness=hardness)
    found = contrastive_loss(directions, settings=settings, temperature=0.05, first_row=0)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_matryoshka_is_the_mean_over_widths() -> None:
    query, target = unit(5, 0), unit(5, 1)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    found = contrastive_loss(
        [Direction(query, target, nothing)],
        settings=LossSettings(matryoshka_dims=[2, 4]),
        temperature=0.1,
        first_row=0,
    )
    parts = [(F.normalize(query[:, :width], dim=1), F.normalize(target[:, :width], dim=1)) for width in (2, 4, 6)]
    expected = sum(reference(*part, 0.1, nothing) for part in parts) / 3
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_keys_mark_equal_targets_other_positives_of_a_query_and_rows_of_a_group() -> None:
    rows = Rows(torch.arange(4), torch.tensor([0, 1, 0, 2]), torch.tensor([5, 5, 6, 7]), torch.tensor([-1, 3, -1, 3]))
    assert same_key(rows, rows).tolist() == [
        [True, True, True, False],
        [True, True, False, True],
        [True, False, True, False],
        [False, True, False, True],
    ]


def test_listed_values_are_found_in_every_column_that_holds_them() -> None:
    masked = torch.tensor([[7, -1], [9, 4], [-1, -1], [3, 8]])
    assert listed(masked, torch.tensor([4, 7, 9, 7, -1])).tolist() == [
        [False, True, False, True, False],
        [True, False, True, False, False],
        [False] * 5,
        [False] * 5,
    ]


@pytest.mark.parametrize("seed", range(5))
def test_listed_equals_a_plain_comparison(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(-1, 12, (9,), generator=generator)
    masked = torch.randint(-1, 12, (6, 4), generator=generator)
    expected = ((masked[:, :, None] == value) & (masked[:, :, None] >= 0)).any(dim=1)
    assert torch.equal(listed(masked, value), expected)


def test_what_is_ignored_and_never_the_positive() -> None:
    score = torch.tensor([[0.5, 0.7, 0.55, 0.1, 0.2], [0.2, 0.3, 0.9, 0.1, 0.2]])
    rows = Rows(torch.tensor([10, 11]), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([-1, -1]))
    row = torch.tensor([10, 11, 12, -1, OF_FILE])
    columns = Rows(row, torch.tensor([0, 1, 2, -1, -1]), torch.tensor([0, 1, 1, -1, 1]), torch.full((5,), -1))
    masked = torch.tensor([[1], [1]])

    def ignored(**settings: object) -> list[list[int]]:
        chosen = LossSettings(**{"mask_same": False, "mask_planned": False} | settings)  # type: ignore[arg-type]
        return ignored_columns(score, rows, columns, None, masked, chosen, 0).int().tolist()

    assert ignored() == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]  # an empty place is no negative
    assert ignored(mask_same=True) == [[0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]
    # a listed target is left out whichever row holds it, not where the pairs file calls it a negative
    assert ignored(mask_planned=True) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]
    assert ignored(mask_margin=0.1) == [[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]


def test_a_learned_temperature_moves_within_its_range() -> None:
    settings = LossSettings(temperature=0.1, learn_temperature="per_task", temperature_range=(0.05, 0.2))
    temperature = Temperature(settings, n_tasks=2)
    assert [float(torch.as_tensor(temperature(task)).detach()) for task in (0, 1, None)] == pytest.approx([0.1] * 3)
    loss = info_nce(unit(4, 0, torch.float32) @ unit(4, 1, torch.float32).T, temperature=temperature(1))
    loss.backward()
    gradient = temperature.log_scale_T.grad
    assert gradient is not None
    assert gradient[0] == 0
    assert gradient[1] != 0
    with torch.no_grad():
        temperature.log_scale_T.copy_(torch.tensor([5.0, -5.0]))
    temperature.keep_in_range()
    assert [float(torch.as_tensor(temperature(task)).detach()) for task in (0, 1)] == pytest.approx([0.05, 0.2])


def test_a_learned_temperature_stays_float32_where_the_model_does_not() -> None:
    """bfloat16 is 0.016 apart at these values: every usual step would be rounded away."""
    temperature = Temperature(LossSettings(temperature=0.05, learn_temperature="global")).to(torch.bfloat16)
    assert temperature.log_scale_T.dtype == torch.float32
    assert float(torch.as_tensor(temperature()).detach()) == pytest.approx(0.05)
    assert temperature.double().log_scale_T.dtype == torch.float64


def test_the_whole_width_counts_once() -> None:
    query, target = unit(4, 0), unit(4, 1)
    directions = [Direction(query, target, torch.zeros(4, 4, dtype=torch.bool))]
    width = query.shape[1]
    found = [
        contrastive_loss(directions, settings=LossSettings(matryoshka_dims=dims), temperature=0.1, first_row=0)
        for dims in ([2], [2, width])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be a number above 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number above 0"),
        ({"hardness": float("nan")}, "hardness=nan"),
        ({"temperature": 0.9, "learn_temperature": "global"}, "outside temperature_range"),
        ({"temperature_range": (0.01, 0.1)}, "temperature_range=.* is without effect with learn_temperature=none"),
        ({"hardness": -1.0}, "hardness=-1.0"),
        ({"matryoshka_dims": [0]}, "matryoshka_dims"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**settings)  # type: ignore[arg-type]
