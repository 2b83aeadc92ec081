"""Training of quantized networks with proximal operators.

The method lives here and knows nothing of data sets, command lines or particular networks. One training step is, with ``w`` the
latent weights of the quantized layers, ``Q`` the hard quantizer, ``r`` a rate, ``e`` the epoch counted from 0 and ``lr`` the
learning rate of the step:

    ============== ======================= ======================================= =================== ==============
    mode           gradient is taken at    update                                  strength            hard quantizer
    ============== ======================= ======================================= =================== ==============
    lazy           prox_binary_s(w)        w <- clip(w - step)                     s = r (constant)    binarize
    prox           w                       w <- clip(prox_binary_t(w - step))      t = lr * r * e      binarize
    prox_ternary   w                       w <- clip(prox_ternary_t(w - step))     t = lr * r * e      ternarize
    ============== ======================= ======================================= =================== ==============

``step`` is whatever the base optimizer (SGD, Adam, ...) does with the gradient, ``clip`` is to [-1, 1].

Where to read on: ``selectors`` (which parameters), ``quantizers`` (to what), ``proximal`` (how), ``modes`` (the table above as
objects), ``optimizer`` (the step itself), ``metrics`` (what is watched), ``side_by_side`` (many tensors in one buffer), ``packing``
(the finished network as a file of bits) and ``codes`` (one tensor of it).

Source: Bai, Wang, Liberty: "ProxQuant: Quantized Neural Networks via Proximal Operators", ICLR 2019.
"""

from quantize.metrics import binary_level, measure, quantization_error, sign_change
from quantize.modes import FULL_PRECISION, MODES, ProjectionMode
from quantize.optimizer import ProjectedOptimizer
from quantize.packing import PackedError, load_packed, save_packed
from quantize.proximal import prox_binary, prox_ternary
from quantize.quantizers import binarize, ternarize
from quantize.selectors import quantizable_layers, select_all_layers, select_inner_layers

__all__ = [
    "FULL_PRECISION",
    "MODES",
    "PackedError",
    "ProjectedOptimizer",
    "ProjectionMode",
    "binarize",
    "binary_level",
    "load_packed",
    "measure",
    "prox_binary",
    "prox_ternary",
    "quantizable_layers",
    "quantization_error",
    "save_packed",
    "select_all_layers",
    "select_inner_layers",
    "sign_change",
    "ternarize",
]
