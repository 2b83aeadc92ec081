"""The method once more, as plainly as it can be said: numpy, float64, one entry or one tensor at a time."""

import itertools

import numpy as np


def sign(w: float) -> float:
    return 1.0 if w >= 0 else -1.0


def binarize(w: np.ndarray) -> np.ndarray:
    return np.array([sign(x) for x in w.ravel()]).reshape(w.shape)


def ternarize(w: np.ndarray) -> np.ndarray:
    flat = w.ravel().astype(np.float64)
    delta = 0.7 * np.mean(np.abs(flat))
    high = [x for x in flat if x >= delta and x > 0]
    low = [x for x in flat if x <= -delta and x < 0]
    levels = {True: np.mean(high) if high else 0.0, False: np.mean(low) if low else 0.0}
    result = [levels[True] if x >= delta and x > 0 else levels[False] if x <= -delta and x < 0 else 0.0 for x in flat]
    return np.array(result).reshape(w.shape)


def prox_binary(w: np.ndarray, strength: float) -> np.ndarray:
    def soft(x: float) -> float:
        return np.sign(x) * max(abs(x) - strength, 0.0)

    return np.array([sign(x) * (1 + soft(abs(x) - 1)) for x in w.ravel()]).reshape(w.shape)


def prox_ternary(w: np.ndarray, strength: float) -> np.ndarray:
    return (w + strength * ternarize(w)) / (1 + strength)


def by_row(quantizer, w: np.ndarray, *arguments) -> np.ndarray:
    return np.array([quantizer(row, *arguments) for row in w.reshape(len(w), -1)]).reshape(w.shape)


def greedy(w: np.ndarray, bits: int, size) -> np.ndarray:
    residual, total = w.ravel().astype(np.float64), np.zeros(w.size)
    for _ in range(bits):
        term = size(np.abs(residual)) * binarize(residual)
        total, residual = total + term, residual - term
    return total.reshape(w.shape)


def lower_median(values: np.ndarray) -> float:
    return np.sort(values)[(len(values) - 1) // 2]


def greedy_median(w: np.ndarray, bits: int = 1) -> np.ndarray:
    return greedy(w, bits, lower_median)


def greedy_mean(w: np.ndarray, bits: int = 1) -> np.ndarray:
    return greedy(w, bits, np.mean)


def alternating(w: np.ndarray, bits: int = 2, rounds: int = 3) -> np.ndarray:
    """Least squares by numpy, which takes the smallest solution; the nearest value by a look at all of them."""
    flat = w.ravel().astype(np.float64)
    codes, residual = np.zeros((w.size, bits)), flat.copy()
    amplitudes = np.zeros(bits)
    for i in range(bits):
        codes[:, i], amplitudes[i] = binarize(residual), np.mean(np.abs(residual))
        residual = residual - amplitudes[i] * codes[:, i]
    every_code = np.array(list(itertools.product((-1.0, 1.0), repeat=bits)))
    for _ in range(rounds - 1):
        amplitudes = np.sort(np.abs(np.linalg.lstsq(codes, flat, rcond=None)[0]))[::-1]
        codes = every_code[np.argmin(np.abs(flat[:, None] - every_code @ amplitudes), axis=1)]
    return (codes @ amplitudes).reshape(w.shape)


def uniform(w: np.ndarray, bits: int = 4, rounds: int = 10) -> np.ndarray:
    multiples = np.array([(2 * j - 2**bits + 1) / 2 for j in range(2**bits)])
    step = 2 * np.mean(np.abs(w)) * 2.0 ** (1 - bits)

    def nearest(step: float) -> np.ndarray:
        return np.array([multiples[np.argmin(np.abs(x - step * multiples))] for x in w.ravel()])

    for _ in range(rounds):
        code = nearest(step)
        step = code @ w.ravel() / (code @ code)
    return (step * nearest(step)).reshape(w.shape)


def learned_sides(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    threshold = 0.05 * np.max(np.abs(w))
    return (w >= threshold) & (w > 0), (w <= -threshold) & (w < 0)


def learned_ternary(w: np.ndarray, positive: float, negative: float) -> np.ndarray:
    high, low = learned_sides(w)
    return np.where(high, positive, np.where(low, negative, 0.0))


def soft(w: np.ndarray, q: np.ndarray, strength: float) -> np.ndarray:
    return q + np.sign(w - q) * np.maximum(np.abs(w - q) - strength, 0)


def quadratic(w: np.ndarray, q: np.ndarray, strength: float) -> np.ndarray:
    return q if np.isinf(strength) else (w + strength * q) / (1 + strength)


def piecewise_affine(w: np.ndarray, levels: list[float], slope: float) -> np.ndarray:
    def one(x: float) -> float:
        if x <= levels[0] or x >= levels[-1]:
            return levels[0] if x <= levels[0] else levels[-1]
        upper = next(i for i, level in enumerate(levels) if level >= x)
        low, high = levels[upper - 1], levels[upper]
        centre = (low + high) / 2
        return min(max(centre + (x - centre) / slope, low), high) if slope else (high if x >= centre else low)

    return np.array([one(x) for x in w.ravel()]).reshape(w.shape)
