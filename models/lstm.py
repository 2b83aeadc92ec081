"""The language model of the paper: embedding, one LSTM layer, linear decoder.

    ============ ========== ======================================
    words, units parameters of them weights of matrices
    ============ ========== ======================================
    10,000, 300   6,732,400 6,720,000 (embedding, 2 in LSTM, decoder)
    ============ ========== ======================================

Network, initialization and regime are those of Xu et al.: "Alternating Multi-bit Quantization for Recurrent Neural Networks",
ICLR 2018, which the paper follows.
"""

from typing import Any

from torch import Tensor, nn

# Plain SGD; the rate is divided by 1.2 after an epoch whose validation is not the best so far, and the run ends below 0.001.
REGIME: dict[int, dict[str, Any]] = {0: {"optimizer": "SGD", "lr": 20.0, "clip_norm": 0.25, "plateau": 1.2, "end_below": 0.001}}


class LanguageModel(nn.Module):
    """Predicts each next word of several streams of text.

    Args:
        words: size of the vocabulary.
        hidden: units of the LSTM, and length of a word's embedding.
        dropout: share of the embedded input, and of the LSTM's output, that is zeroed in training.
    """

    regime = REGIME

    def __init__(self, words: int, hidden: int = 300, dropout: float = 0.5) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(words, hidden)
        self.lstm = nn.LSTM(hidden, hidden)
        self.decoder = nn.Linear(hidden, words)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def start(self, streams: int) -> list[Tensor]:
        """Hidden and cell state before the first word, each ``(1, streams, hidden)``: zeros."""
        return [self.decoder.weight.new_zeros(1, streams, self.hidden) for _ in range(2)]

    def forward(self, tokens: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``(steps, streams)`` words to ``(steps, streams, words)`` logits, and the states after the last step."""
        output, states = self.lstm(self.dropout(self.embedding(tokens)), (hidden, cell))
        return self.decoder(self.dropout(output)), states

    def quantizable(self) -> list[tuple[str, nn.Parameter]]:
        """What is quantized: every weight matrix, those of embedding and decoder too; no bias."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.dim() == 2]

    @property
    def config(self) -> dict[str, int]:
        """What ``lstm`` needs to build this one."""
        return {"hidden": self.hidden, "num_classes": self.decoder.out_features}

    @property
    def size(self) -> str:
        """In words."""
        return f"{self.hidden} units"


def lstm(dataset: str = "ptb", hidden: int = 300, num_classes: int = 10_000) -> LanguageModel:
    """The language model for a text.

    Args:
        dataset: name of the data set; the network is the same for all.
        hidden: units of the LSTM.
        num_classes: words in the vocabulary.

    Raises:
        ValueError: on numbers of units or words that cannot be.
    """
    for name, value, least in (("hidden", hidden, 1), ("num_classes", num_classes, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise ValueError(f"{name} {value!r}: a whole number from {least} up is accepted")
    return LanguageModel(num_classes, hidden)
