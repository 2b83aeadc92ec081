"""Training of quantized networks with proximal operators: quantizer x pull x place, in any combination.

The method lives here and knows nothing of data sets, command lines or particular networks. A quantizer Q gives each weight one of
few values, a pull P moves weights toward them at a strength t, and the place says where the gradient is taken. One step:

    eager:  w <- clip(P_t(w - step))                       the gradient is taken at w, which the model shows
    lazy:   w <- clip(w - step)                            the gradient is taken at P_t(w), which the model shows

``step`` is whatever the base optimizer (SGD, Adam, ...) does with the gradient; ``clip`` to [-1, 1] is done with some quantizers.
With ``r`` a rate, ``e`` the epoch counted from 0, ``lr`` the learning rate and ``p`` the share of the way to the freeze:

    ============== ============================ ================= ===== ============================= =====
    mode           quantizer                    pull              place strength t                    clip
    ============== ============================ ================= ===== ============================= =====
    lazy           binary                       soft              lazy  r                             yes
    prox           binary                       soft              eager lr * r * e                    yes
    prox_ternary   ternary                      quadratic         eager lr * r * e                    yes
    prox_median    greedy_median                soft              eager lr * r * e                    yes
    ttq            learned                      hard              lazy  -                             no
    stoch_bin      binary, shown as stochastic  hard              lazy  -                             yes
    prox_alt       alternating (any)            quadratic, thrice eager lr * r * e                    no
    lazy_alt       alternating (any)            hard              lazy  -                             no
    parq           binary (any)                 piecewise affine  lazy  slope from 1 to 0 with p      yes
    binary_relax   binary (any)                 quadratic         lazy  p / (1 - p)                   yes
    prox_connect   binary (any)                 soft              lazy  r * e                         yes
    ============== ============================ ================= ===== ============================= =====

Where to read on: ``selectors`` (which parameters; ``listing`` says it in words), ``quantizers`` and ``multibit`` (to what),
``pulls`` (how), ``modes`` (the table above as objects), ``optimizer`` (what a user holds) and ``projection`` (the step itself),
``metrics`` (what is watched), ``packing`` (the finished network as a file of bits), ``codes`` (one tensor of it) and
``packed_layers`` (packed in memory too). How it is fast: ``groups`` (levels by tensor and by row) and ``blocks`` (in place, in
pieces of cache size).

Source: Bai, Wang, Liberty: "ProxQuant: Quantized Neural Networks via Proximal Operators", ICLR 2019.
"""

from quantize.finished import NotFinite, NotQuantized
from quantize.listing import explain, reasons
from quantize.metrics import binary_level, measure, quantization_error, sign_change
from quantize.modes import ALL_QUANTIZERS, FULL_PRECISION, MODES, QUANTIZERS, ProjectionMode, mode
from quantize.multibit import alternating, greedy_mean, greedy_median, uniform
from quantize.optimizer import ProjectedOptimizer
from quantize.packed_layers import PackedConv2d, PackedLinear, load_packed_layers, pack_layers
from quantize.packing import PackedError, load_packed, save_packed
from quantize.pulls import piecewise_affine, prox_binary, prox_ternary, quadratic, soft
from quantize.quantizers import Quantizer, binarize, learned_ternary, ternarize
from quantize.saving import latent_in, levels_in
from quantize.selectors import quantizable_layers, select_all_layers, select_inner_layers

__all__ = [
    "ALL_QUANTIZERS",
    "FULL_PRECISION",
    "MODES",
    "QUANTIZERS",
    "NotFinite",
    "NotQuantized",
    "PackedConv2d",
    "PackedError",
    "PackedLinear",
    "ProjectedOptimizer",
    "ProjectionMode",
    "Quantizer",
    "alternating",
    "binarize",
    "binary_level",
    "explain",
    "greedy_mean",
    "greedy_median",
    "latent_in",
    "learned_ternary",
    "levels_in",
    "load_packed",
    "load_packed_layers",
    "measure",
    "mode",
    "pack_layers",
    "piecewise_affine",
    "prox_binary",
    "prox_ternary",
    "quadratic",
    "quantizable_layers",
    "quantization_error",
    "reasons",
    "save_packed",
    "select_all_layers",
    "select_inner_layers",
    "sign_change",
    "soft",
    "ternarize",
    "uniform",
]
