"""Lots of rollouts whose lengths are known beforehand, for the simulator: drawn from long-tailed
distributions, fitted to a trace, or read from one.

A lot is a group: a prompt and the output lengths of its samples. Siblings resemble each other as
`correlation` says, the intraclass correlation of the logarithms of their lengths: traces of long
chains of thought show 0.7 to 0.9, others 0.01 to 0.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from kimisys._core.rollout import Lots
from kimisys.errors import WorkloadError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
LogQuantile = Callable[[Floats], Floats]
"""From probabilities in (0, 1) to the logarithm of the length that has it."""

TAIL = 0.2
"""The share of trajectories that `pareto` puts into its tail."""

_MOST = 1 << 40  # tokens: what is more overflows somewhere


@dataclass(frozen=True)
class Prompts:
    """Lengths of prompts, in tokens: lognormal; all equal with sigma 0."""

    median: int = 500
    sigma: float = 0.0

    def draw(self, groups: int, random: np.random.Generator) -> Integers:
        """[groups] int64, 1 at least."""
        spread = np.exp(self.sigma * random.standard_normal(groups))
        return np.maximum(1, np.rint(self.median * spread)).astype(np.int64)


PROMPTS = Prompts()


def lognormal(
    groups: int,
    samples: int,
    *,
    median: float,
    sigma: float,
    correlation: float,
    limit: int,
    seed: int,
    prompts: Prompts = PROMPTS,
) -> Lots:
    """Output lengths exp(N(log median, sigma²)), cut at `limit` by whoever runs them.

    Raises WorkloadError for parameters that make no sense.
    """
    _check_shape(median, sigma)
    shape = Distribution(lambda z: math.log(median) + sigma * z, correlation, prompts)
    return shape.draw(groups, samples, limit=limit, seed=seed)


def pareto(
    groups: int,
    samples: int,
    *,
    median: float,
    sigma: float,
    alpha: float,
    correlation: float,
    limit: int,
    seed: int,
    prompts: Prompts = PROMPTS,
) -> Lots:
    """As `lognormal`, but the longest TAIL of the trajectories are Pareto distributed: the share
    that is longer than n falls with n to the power of -alpha."""
    _check_shape(median, sigma)
    if not alpha > 0:
        raise WorkloadError(f"alpha is {alpha}; it must be positive, 1 to 3 are long tails")
    begin = NormalDist().inv_cdf(1 - TAIL)

    def log_length(z: Floats) -> Floats:
        # beyond `begin` the logarithm is exponentially distributed
        beyond = np.maximum(1 - _normal_cdf(np.maximum(z, begin)), 1e-15)
        tail = begin * sigma + np.log(TAIL / beyond) / alpha
        return math.log(median) + np.where(z <= begin, sigma * z, tail)

    shape = Distribution(log_length, correlation, prompts)
    return shape.draw(groups, samples, limit=limit, seed=seed)


@dataclass(frozen=True)
class Distribution:
    """What groups are drawn from. log_length: from a standard normal variable to the logarithm of
    a length, nowhere falling; correlation: of siblings, see above."""

    log_length: LogQuantile
    correlation: float
    prompts: Prompts | Integers = PROMPTS
    """Integers: lengths that are drawn from, each as likely."""

    def __post_init__(self) -> None:
        if not 0 <= self.correlation <= 1:
            raise WorkloadError(f"correlation is {self.correlation}; it must be 0 to 1")

    def draw(self, groups: int, samples: int, *, limit: int, seed: int) -> Lots:
        """`groups` lots of `samples` each; equal for equal seeds. Lengths are 1 at least and may
        exceed `limit`, where the simulator cuts them."""
        for name, value in (("groups", groups), ("samples", samples), ("limit", limit)):
            if value < 1:
                raise WorkloadError(f"{name} is {value}; it must be 1 at least")
        random = np.random.default_rng(seed)
        shared = self._shared()
        of_group = random.standard_normal((groups, 1))
        own = random.standard_normal((groups, samples))
        normal = math.sqrt(shared) * of_group + math.sqrt(1 - shared) * own
        lengths = np.exp(np.minimum(self.log_length(normal), math.log(_MOST)))
        if isinstance(self.prompts, Prompts):
            prompts = self.prompts.draw(groups, random)
        else:
            prompts = random.choice(self.prompts, groups)
        whole = np.maximum(1, np.rint(lengths)).astype(np.int64)
        return Lots(prompt_tokens=prompts, lengths=whole.ravel(), samples=samples, limit=limit)

    def _shared(self) -> float:
        """The correlation of siblings' normal variables that gives their log-lengths the one asked
        for: more than it, unless log_length is linear.

        By Mehler's formula the latter is a power series in the former, whose weights are squares
        of log_length's coefficients in Hermite polynomials.
        """
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        weights = weights / weights.sum()
        values = self.log_length(nodes)
        values = values - weights @ values
        squares = np.zeros(31)
        for degree in range(1, len(squares)):
            basis = np.polynomial.hermite_e.hermeval(nodes, [0] * degree + [1])
            squares[degree] = (weights @ (values * basis)) ** 2 / math.factorial(degree)
        if squares.sum() == 0 or self.correlation == 1:  # all lengths are equal, or all siblings'
            return self.correlation
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            series = np.polynomial.polynomial.polyval(middle, squares) / squares.sum()
            low, high = (middle, high) if series < self.correlation else (low, middle)
        return (low + high) / 2


def fit(lots: Lots) -> Distribution:
    """The distribution that `lots` look drawn from: their own quantiles of length, interpolated,
    and their own correlation of siblings and lengths of prompts.

    Nothing is known beyond the limit that cut them: draws end there too.
    """
    lengths = np.minimum(np.asarray(lots.lengths), lots.limit)
    logs = np.sort(np.log(lengths))
    at = (np.arange(len(logs)) + 0.5) / len(logs)

    def log_length(z: Floats) -> Floats:
        return np.interp(_normal_cdf(z), at, logs)

    correlation = intraclass_correlation(lengths.reshape(-1, lots.samples))
    return Distribution(log_length, correlation, np.asarray(lots.prompt_tokens))


def extended(lots: Lots, groups: int, seed: int) -> Lots:
    """`lots`, and after them what their distribution goes on with, to `groups` at least."""
    missing = groups - len(lots.prompt_tokens)
    if missing <= 0:
        return lots
    rest = fit(lots).draw(missing, lots.samples, limit=lots.limit, seed=seed)
    return Lots(
        prompt_tokens=np.concatenate([lots.prompt_tokens, rest.prompt_tokens]),
        lengths=np.concatenate([lots.lengths, rest.lengths]),
        samples=lots.samples,
        limit=lots.limit,
    )


def intraclass_correlation(lengths: npt.ArrayLike) -> float:
    """Of the logarithms of `lengths` [groups, samples]: by the one-way analysis of variance, within
    0 and 1; 0 where there is a single group or sample, or nothing varies."""
    logs = np.log(np.asarray(lengths, dtype=np.float64))
    groups, samples = logs.shape
    if groups < 2 or samples < 2:
        return 0.0
    means = logs.mean(axis=1)
    between = samples * means.var(ddof=1)
    within = logs.var(axis=1, ddof=1).mean()
    whole = between + (samples - 1) * within
    return float(np.clip((between - within) / whole, 0, 1)) if whole > 0 else 0.0


def read_lengths(path: Path, limit: int = 0) -> Lots:
    """Lots of a trace: JSONL, one group a line, {"prompt_tokens": n, "lengths": [n, …]} with as
    many lengths in each. A group with the key "dropped" is left out, as nobody knows how long it
    would have become; other keys are ignored.

    limit: of output, where longer ones are cut; 0: the longest of the file. Raises WorkloadError
    for a file that cannot be read, and naming the line for what is no group.
    """
    prompts: list[int] = []
    table: list[list[int]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise WorkloadError(
            f"{path} cannot be read: {error}; it must hold lines {_FORM}"
        ) from error
    for number, line in enumerate(lines, start=1):
        group = _group(line, f"{path}, line {number}")
        if group is None:
            continue
        prompt, lengths = group
        if table and len(lengths) != len(table[0]):
            raise WorkloadError(
                f"{path}, line {number}: {len(lengths)} lengths, where others have "
                f"{len(table[0])}; every group must have the same number of samples"
            )
        prompts.append(prompt)
        table.append(lengths)
    if not table:
        raise WorkloadError(f"{path} holds no group: a line is one, {_FORM}")
    whole = np.array(table, np.int64)
    return Lots(
        prompt_tokens=np.array(prompts, np.int64),
        lengths=whole.ravel(),
        samples=whole.shape[1],
        limit=limit or int(whole.max()),
    )


def write_lengths(path: Path, lots: Lots) -> None:
    """Write what `read_lengths` reads; lengths as they end, cut at the limit."""
    table = np.minimum(np.asarray(lots.lengths), lots.limit).reshape(-1, lots.samples)
    with open(path, "w", encoding="utf-8") as stream:
        for prompt, lengths in zip(np.asarray(lots.prompt_tokens), table, strict=True):
            record = {"prompt_tokens": int(prompt), "lengths": lengths.tolist()}
            stream.write(json.dumps(record) + "\n")


_FORM = 'such as {"prompt_tokens": 120, "lengths": [900, 1100]}'


def _group(line: str, where: str) -> tuple[int, list[int]] | None:
    """Tokens of the prompt and of each sample; None for a group that was dropped."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{where} is no JSON ({error}); it must be {_FORM}") from error
    if not isinstance(record, dict) or not {"prompt_tokens", "lengths"} <= record.keys():
        raise WorkloadError(f"{where} has no prompt_tokens or no lengths; it must be {_FORM}")
    if record.get("dropped"):
        return None
    prompt, lengths = record["prompt_tokens"], record["lengths"]
    if not isinstance(lengths, list) or not lengths:
        raise WorkloadError(f"{where}: lengths is {lengths!r}; it must be a list of them")
    for name, value in (("prompt_tokens", prompt), *(("lengths", each) for each in lengths)):
        # a bool is an int to Python, and no length
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise WorkloadError(f"{where}: {name} has {value!r}; lengths are whole, 1 at least")
    return prompt, lengths


def _check_shape(median: float, sigma: float) -> None:
    if not 1 <= median <= _MOST:
        raise WorkloadError(f"median is {median}; it must be 1 token at least")
    if not 0 <= sigma <= 10:
        raise WorkloadError(f"sigma is {sigma}; it must be 0 to 10, about 1 is long-tailed")


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _normal_cdf(z: Floats) -> Floats:
    return 0.5 * (1 + _erf(np.asarray(z) / math.sqrt(2)))
