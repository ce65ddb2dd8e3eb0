"""Right-padded batches and the mask of what is predicted."""

from __future__ import annotations

import numpy as np

from kimisys.trainer.batch import make_batch


def test_the_mask_selects_the_predictions_of_completions() -> None:
    batch = make_batch([[5, 6, 7], [5]], [[8, 9], [3]], pad=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [5, 3, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    predicted = batch.tokens[:, 1:][batch.mask > 0]
    assert predicted.tolist() == [8, 9, 3]


def test_rows_are_cut_to_the_longest_of_them() -> None:
    batch = make_batch([[5, 6, 7], [5], [4, 4]], [[8, 9], [3], [2]], pad=0)
    short = batch.rows(np.array([1, 2]))
    assert short.tokens.tolist() == [[5, 3, 0], [4, 4, 2]]
    assert short.mask.tolist() == [[1, 0], [0, 1]]


def test_an_empty_completion_predicts_nothing() -> None:
    batch = make_batch([[5, 6]], [[]], pad=0)
    assert batch.mask.sum() == 0
    assert len(batch.rows(np.array([0]))) == 1
