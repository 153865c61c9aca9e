"""Wide gamut and high dynamic range to BT.709 as a screen of 100 % white shows it.

    signal --(PQ | HLG | gamma 2.4)--> light in cd/m2 --tone mapping--> 3 x 3 matrix --clip--> (light / white)^(1/2.4)

Sources: ITU-R BT.2100-2 for PQ and HLG (a screen of 1000 cd/m2: system gamma 1.2), BT.2390-10 for the curve that leaves
what is dark and rolls off from 1000 cd/m2 to white, applied to the largest of R, G and B so that hues stay, BT.2408 for
the white of 203 cd/m2, BT.1886 for gamma 2.4, and BT.2087 for the matrix of BT.2020.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BT2020, PQ, HLG = 9, 16, 18
HIGH_RANGE = {PQ, HLG}

WHITE, PEAK = 203.0, 1000.0
"""Of the result and of what comes in, in cd/m2; PQ beyond the peak is cut off."""
GAMMA = 2.4
ROWS = 64
"""That are converted at once, for little memory."""

Light = NDArray[np.float64]

_P3 = [[1.2249402, -0.2249402, 0.0], [-0.0420570, 1.0420570, 0.0], [-0.0196376, -0.0786361, 1.0982735]]
TO_BT709 = {
    BT2020: np.array([[1.6604910, -0.5876411, -0.0728499], [-0.1245505, 1.1328999, -0.0083494],
                      [-0.0181508, -0.1005789, 1.1187297]]),
    12: np.array(_P3),
}  # fmt: skip
"""From linear R, G, B of other primaries: BT.2020, and P3 with the white of BT.709."""
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593])


def describe(primaries: int, curve: int) -> str:
    """For a line in the log."""
    names = {BT2020: "colours of BT.2020", 12: "colours of P3"}
    if curve not in HIGH_RANGE:
        return f"{names[primaries]} are"
    curves = {PQ: "PQ", HLG: "HLG"}
    return f"high dynamic range ({curves[curve]}) is tone-mapped from {PEAK:.0f} to {WHITE:.0f} cd/m2 and"


def to_bt709(levels: NDArray[np.uint16], primaries: int, curve: int) -> NDArray[np.uint8]:
    """8-bit RGB of BT.709.

    Args:
        levels: RGB `(rows, columns, 3)` in 1/256 of a level of 8 bits.
        primaries: of TO_BT709, or those of BT.709.
        curve: PQ, HLG, or any other for the gamma of a screen.
    """
    light: Callable[[Light], Light] = {PQ: light_of_pq, HLG: light_of_hlg}.get(curve, light_of_screen)
    result = np.empty(levels.shape, np.uint8)
    matrix = TO_BT709.get(primaries, np.eye(3))
    for top in range(0, len(levels), ROWS):
        linear = light(levels[top : top + ROWS] / 65280.0)
        if curve in HIGH_RANGE:
            linear = roll_off(linear)
        shown = np.clip(linear @ matrix.T / WHITE, 0.0, 1.0) ** (1 / GAMMA)
        result[top : top + ROWS] = np.round(255.0 * shown).astype(np.uint8)
    return result


def light_of_screen(signal: Light) -> Light:
    """cd/m2 of a signal 0..1 on a screen of gamma 2.4 and the white of the result."""
    return WHITE * np.clip(signal, 0.0, 1.0) ** GAMMA


def light_of_pq(signal: Light) -> Light:
    """The electro-optical transfer function of PQ: cd/m2 of a signal 0..1."""
    root = np.clip(signal, 0.0, 1.0) ** (1 / _M2)
    return 10000.0 * (np.maximum(root - _C1, 0.0) / (_C2 - _C3 * root)) ** (1 / _M1)


def pq_of_light(light: Light) -> Light:
    """Its inverse."""
    root = (light / 10000.0) ** _M1
    return ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2


def light_of_hlg(signal: Light) -> Light:
    """cd/m2 of a signal 0..1 of HLG, R, G, B last, on a screen of the peak."""
    signal = np.clip(signal, 0.0, 1.0)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _C) / _A) + _B) / 12)
    luma = np.maximum(scene @ LUMA_2020, 1e-12)[..., None]
    return PEAK * luma**0.2 * scene


def roll_off(light: Light) -> Light:
    """From 0..PEAK to 0..WHITE cd/m2, R, G, B last, by a factor for each pixel: BT.2390's Hermite spline in PQ."""
    most = np.clip(light.max(-1, keepdims=True), 1e-6, PEAK)
    peak, white = pq_of_light(np.array([PEAK, WHITE]))
    signal, top = pq_of_light(most) / peak, white / peak
    knee = 1.5 * top - 0.5
    t = (np.maximum(signal, knee) - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * top
    mapped = light_of_pq(np.where(signal < knee, signal, spline) * peak)
    return np.minimum(light, PEAK) * (mapped / most)


_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
"""Of PQ."""
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
"""Of HLG."""
