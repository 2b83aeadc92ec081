"""The method once more, as plainly as it can be said: numpy, float64, one entry or one tensor at a time."""

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
