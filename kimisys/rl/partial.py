"""Which tokens of a partial rollout the loss counts, and how much each: weights by token.

A trajectory that a budget cut short goes on in a later iteration, under newer weights: its tokens
were made by several policies, π_i by the last of them alone or, in a group of which a sibling was
continued, by none. Source: Kimi k1.5 technical report (arXiv 2501.12599), section "Partial
Rollouts": only the current segment needs on-policy computation, earlier ones can be left out of the
loss. The report does not say how what is older is weighted where it is kept; four answers, by name:

- ``all``: every token that the model made counts 1, whoever made it.
- ``current``: those of each row's last segment, the ones of the row's newest version. A sibling
  that was finished in an earlier iteration keeps its loss: its own last segment counts.
- ``recent``: those made at most `staleness` versions before the one that is trained.
- ``weighted``: all, each by its importance ratio, truncated: w_t = min(C, π_i(y_t)/μ(y_t)), where
  μ is the policy that made y_t. Truncation from above, to bound the variance, is that of V-trace
  (Espeholt et al., 2018, arXiv 1802.01561, section 4.1). What π_i itself made has weight 1 exactly:
  what its two log-probs differ by is rounding between engine and trainer.

With them the loss of `rl.policy_loss` takes Σ_t w_t·log π_θ(y_t) for log π_θ(y), and the same
weights for the reference: `sequence_log_probs(token_log_probs, weights)` for both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kimisys.errors import KimisysError


class TokenWeightsError(KimisysError, ValueError):
    """Weights were asked for by an unknown name, or of tensors that do not go together."""


@dataclass(frozen=True)
class Completions:
    """The tokens that models made, as the trainer holds them: position t is about the token that
    follows it, as in `Policy.policy_step`.

    mask: [rows, tokens], bool or 0/1, set where a model made the token. versions: int64[rows,
    tokens], of the weights that made each; read where the mask is set alone, and there 0 to
    `version`. version: of the weights that are trained from, π_i. log_probs: float[rows, tokens],
    log π_i(y_t) by the trainer; behaviour_log_probs: the same shape, log μ(y_t) as the engine gave
    it when it made y_t: for ``weighted`` alone. Raises TokenWeightsError, naming row and position.
    """

    mask: Tensor
    versions: Tensor
    version: int
    log_probs: Tensor | None = None
    behaviour_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dim() != 2:
            raise TokenWeightsError(
                f"mask must be [rows, tokens], got shape {tuple(self.mask.shape)}"
            )
        if self.versions.dtype != torch.int64 or self.versions.shape != self.mask.shape:
            raise TokenWeightsError(
                f"versions must be int64 {tuple(self.mask.shape)}, as mask is, "
                f"got {self.versions.dtype} {tuple(self.versions.shape)}"
            )
        if self.mask.is_floating_point():
            self._refuse((self.mask != 0) & (self.mask != 1), "mask", self.mask, "0 or 1")
        wrong = self.made & ((self.versions < 0) | (self.versions > self.version))
        wanted = f"0 to {self.version}, the version that is trained from"
        self._refuse(wrong, "versions", self.versions, wanted)

    @property
    def made(self) -> Tensor:
        """bool[rows, tokens]: the mask."""
        return self.mask != 0

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log π_i and log μ in float64, checked where the mask is set."""
        given = {"log_probs": self.log_probs, "behaviour_log_probs": self.behaviour_log_probs}
        found = []
        for name, value in given.items():
            if value is None:
                raise TokenWeightsError(f"weighted needs {name}: pass them, or choose another")
            if not value.is_floating_point() or value.shape != self.mask.shape:
                raise TokenWeightsError(
                    f"{name} must be floating point {tuple(self.mask.shape)}, as mask is, "
                    f"got {value.dtype} {tuple(value.shape)}"
                )
            self._refuse(self.made & ~torch.isfinite(value), name, value, "finite")
            found.append(value.detach().double())
        return found[0], found[1]

    @staticmethod
    def _refuse(wrong: Tensor, name: str, value: Tensor, wanted: str) -> None:
        if bool(wrong.any()):
            row, position = wrong.nonzero()[0].tolist()
            raise TokenWeightsError(
                f"{name}[{row}, {position}] is {value[row, position].item()}; "
                f"where a model made the token it must be {wanted}"
            )


def implementations() -> tuple[str, ...]:
    """The names that `token_weights` takes."""
    return tuple(_POLICIES)


def token_weights(
    name: str, completions: Completions, *, staleness: int = 1, truncation: float = 2.0
) -> Tensor:
    """The weight of each token in the loss by the policy `name`; see the head of this file.

    staleness: versions, at least 0, for ``recent`` alone. truncation: C, at least 1 so that what is
    on-policy is not cut, for ``weighted`` alone. Returns float32[rows, tokens], detached, 0 where
    the mask is not set; with ``all``, ``current`` and ``recent`` 0 or 1. Raises TokenWeightsError.
    """
    if name not in _POLICIES:
        raise TokenWeightsError(
            f"there are no token weights {name!r}; there are: {', '.join(implementations())}"
        )
    if staleness < 0:
        raise TokenWeightsError(f"staleness is {staleness}; it is a count of versions, at least 0")
    if not 1.0 <= truncation < math.inf:
        raise TokenWeightsError(f"truncation is {truncation}; it must be finite and at least 1")
    weights = _POLICIES[name](completions, staleness, truncation)
    return weights.to(torch.float32).masked_fill(~completions.made, 0.0)


def _all(completions: Completions, staleness: int, truncation: float) -> Tensor:
    return completions.made


def _current(completions: Completions, staleness: int, truncation: float) -> Tensor:
    versions = completions.versions.masked_fill(~completions.made, -1)
    if not versions.shape[1]:
        return completions.made
    return versions == versions.amax(dim=1, keepdim=True)


def _recent(completions: Completions, staleness: int, truncation: float) -> Tensor:
    return completions.versions >= completions.version - staleness


def _weighted(completions: Completions, staleness: int, truncation: float) -> Tensor:
    now, then = completions.ratios()
    # the logarithm is cut, not the ratio: a large difference does not overflow
    ratios = (now - then).clamp(max=math.log(truncation)).exp().clamp(max=truncation)
    return torch.where(completions.versions == completions.version, 1.0, ratios)


_POLICIES: dict[str, Callable[[Completions, int, float], Tensor]] = {
    "all": _all,
    "current": _current,
    "recent": _recent,
    "weighted": _weighted,
}
